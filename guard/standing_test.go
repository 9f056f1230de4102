package guard

import (
	"bufio"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// senders are good ones, n of them, known for so long.
func senders(n int, known time.Duration, messages int) (goods []store.Good) {
	now := time.Now()
	for i := range n {
		goods = append(goods, store.Good{Addr: netip.AddrFrom4([4]byte{198, 51, 100, byte(1 + i)}),
			First: now.Add(-known), Last: now.Add(-time.Minute), Messages: messages})
	}
	return goods
}

// busy lets each of the addresses open so many connections, and returns how many are
// blocked then.
func (w *world) busy(goods []store.Good, each int) (blocked int) {
	w.t.Helper()
	for _, s := range goods {
		w.lines(opens(s.Addr.String(), each, 1)...)
		time.Sleep(time.Second)
	}
	for _, b := range w.inForce() {
		if b.Prefix.Overlaps(netip.MustParsePrefix("198.51.100.0/24")) {
			blocked++
		}
	}
	return blocked
}

func (w *world) inForce() []BlockInfo {
	list, err := w.g.Blocks(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return list
}

// A rule that is far too strict blocks a tenth of the senders in good standing
// and no more; it is told, survives a restart, ends by itself and by a word.
func TestMadRule(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Confirm = policy.ConfirmOff
			p.Rules = []detector.Rule{{Name: "mad", Metric: detector.Opens, Window: time.Minute, Threshold: 5, Prefixes4: []int{32}}}
		})
		stop := w.run()
		defer func() { stop() }()
		ctx := t.Context()
		goods := senders(50, 3*time.Hour, 20)
		if err := w.g.Learn(ctx, goods); err != nil {
			t.Fatal(err)
		}
		if n := w.busy(goods[:20], 12); n != 5 {
			t.Errorf("%d of 50 are blocked, want a tenth", n)
		}
		s := w.status()
		if s.Stopped == nil || !w.warned("RULES BLOCK NOTHING") || len(s.Faults) != 1 {
			t.Fatalf("%+v, %v, %v", s.Stopped, s.Warnings, s.Faults)
		}
		if !strings.Contains(s.Stopped.Why, "6 of 50 senders in good standing") {
			t.Error(s.Stopped.Why)
		}
		// A flood is not blocked either, which is the price, and explain says so.
		w.lines(opens("203.0.113.5", 200, 1)...)
		time.Sleep(time.Second)
		if x, err := w.g.Explain(ctx, netip.MustParsePrefix("203.0.113.5/32")); err != nil || x.Blocked != nil || x.Stopped == nil ||
			len(x.Recent) == 0 || !strings.Contains(x.Recent[0].Why, "rules block nothing until") {
			t.Errorf("%+v, %v", x, err)
		}
		if o := w.block("203.0.113.5/32", time.Minute); o.Block == nil {
			t.Errorf("by hand: %+v", o)
		}
		stop()
		w.start()
		stop = w.run()
		w.lines(opens("203.0.113.6", 200, 1)...)
		time.Sleep(time.Second)
		if w.status().Stopped == nil || len(w.inForce()) != 6 {
			t.Errorf("after a restart: %+v", w.inForce())
		}
		// It ends by itself, and then the next stop lasts longer.
		time.Sleep(stopFor)
		if w.status().Stopped != nil {
			t.Error("it does not end")
		}
		w.busy(goods[20:40], 12)
		if s := w.status(); s.Stopped == nil || s.Stopped.Until.Sub(s.Stopped.Since).Round(time.Minute) != 2*stopFor {
			t.Errorf("the second: %+v", s.Stopped)
		}
		if was, err := w.g.Resume(ctx, "root"); err != nil || !was {
			t.Errorf("%v, %v", was, err)
		}
		if was, err := w.g.Resume(ctx, "root"); err != nil || was {
			t.Errorf("twice: %v, %v", was, err)
		}
		w.lines(opens("203.0.113.7", 200, 1)...)
		time.Sleep(time.Second)
		if list := w.inForce(); list[len(list)-1].Prefix.String() != "203.0.113.7/32" {
			t.Errorf("rules do not block after resume: %+v", list)
		}
	})
}

// What must not stop rules: a flood by everybody there is on a quiet server, of
// addresses that sent a mail in passing, of two old acquaintances, of any
// number that take what no rule of sense would let them, and anything where
// the limit is off.
func TestNoMadRule(t *testing.T) {
	for name, c := range map[string]struct {
		goods     []store.Good
		share     float64
		threshold float64
		want      int
	}{
		"nobody but attackers": {nil, 0.1, 5, 12},
		"known for minutes":    {senders(12, 30*time.Minute, 20), 0.1, 5, 12},
		"one mail":             {senders(12, 48*time.Hour, 1), 0.1, 5, 12},
		"two acquaintances":    {senders(2, 48*time.Hour, 9), 0.1, 5, 12},
		"off":                  {senders(12, 48*time.Hour, 9), 1, 5, 12},
		"floods of senders":    {senders(12, 48*time.Hour, 9), 0.1, 60, 12},
		"twelve acquaintances": {senders(12, 48*time.Hour, 9), 0.1, 5, 2},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) {
					p.Confirm, p.Block.MaxGoodShare = policy.ConfirmOff, c.share
					p.Rules = []detector.Rule{{Name: "mad", Metric: detector.Opens, Window: time.Minute, Threshold: c.threshold, Prefixes4: []int{32}}}
				})
				defer w.run()()
				// The times of senders are of this bubble's clock.
				now := time.Now()
				for i, s := range c.goods {
					age := s.Last.Sub(s.First)
					s.Last, s.First = now.Add(-time.Minute), now.Add(-time.Minute-age)
					c.goods[i] = s
				}
				if err := w.g.Learn(t.Context(), c.goods); err != nil {
					t.Fatal(err)
				}
				if n := w.busy(senders(12, 0, 0), int(3*c.threshold)); n != c.want {
					t.Errorf("%d of 12 are blocked, want %d; %v", n, c.want, w.status().Warnings)
				}
			})
		})
	}
}

// No flood of the corpus stops the rules, though every sender of the corpus
// that ever delivered a mail is in good standing.
func TestCorpusStopsNoRule(t *testing.T) {
	files, err := filepath.Glob("../testdata/corpus/*.log")
	if err != nil || len(files) < 10 {
		t.Fatal(files, err)
	}
	blocks := 0
	for _, name := range files {
		var evs []detector.Event
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		parser := exim.New(time.UTC)
		for sc := bufio.NewScanner(f); sc.Scan(); {
			var ev detector.Event
			if parser.Parse(sc.Bytes(), &ev) {
				evs = append(evs, ev)
			}
		}
		f.Close()
		r, err := NewReplay(policy.Default(), 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range evs {
			if ev.Kind == detector.Accepted && !ev.Time.IsZero() {
				r.Detector.LearnGood(ev.Source, evs[0].Time.Add(-48*time.Hour), evs[0].Time.Add(-time.Minute), 5)
			}
		}
		r.OnSpare = func(v detector.Verdict, reason string) {
			if strings.Contains(reason, "rules block nothing") {
				t.Errorf("%s: %s: %s", filepath.Base(name), v.Source, reason)
			}
		}
		for i := range evs {
			r.Observe(&evs[i])
		}
		blocks += r.Blocks()
	}
	if blocks < 10 {
		t.Errorf("only %d blocks in the whole corpus", blocks)
	}
	t.Log(fmt.Sprint(blocks), "blocks")
}

func TestLight(t *testing.T) {
	for _, tt := range []struct {
		metric          detector.Metric
		score           float64
		capacity, count int
		want            bool
	}{
		{detector.Saturation, 0.04, 100, 100, true},
		{detector.Saturation, 0.05, 100, 100, false},
		{detector.Saturation, 0.15, 20, 70, true}, // 3 of 70, whatever the policy says
		{detector.Opens, 59, 100, 3, true},
		{detector.Opens, 60, 100, 3, false},
	} {
		v := detector.Verdict{Metric: tt.metric, Score: tt.score, Capacity: tt.capacity, Count: tt.count, Window: time.Minute}
		if got := light(&v); got != tt.want {
			t.Errorf("%+v: %v", tt, got)
		}
	}
}
