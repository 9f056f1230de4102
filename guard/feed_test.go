package guard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// TestFullness reads looks four a second from a picture: # full, . not.
func TestFullness(t *testing.T) {
	rep := strings.Repeat
	for _, c := range []struct{ name, looks, want string }{
		{"a moment", rep("#", 39) + rep(".", 40), ""},
		{"ten seconds", rep("#", 41), "10s saturated 10s"},
		{"and free", rep("#", 41) + rep(".", 20), "10s saturated 10s, 15s relieved 10s"},
		{"not yet free", rep("#", 41) + rep(".", 19) + "#" + rep(".", 19), "10s saturated 10s"},
		{"dips", rep("###.", 11), "10s saturated 10s"},
		{"a long dip begins anew", rep("#", 30) + rep(".", 5) + rep("#", 39), ""},
		{"told once", rep("#", 400), "10s saturated 10s"},
		{"again", rep("#", 41) + rep(".", 20) + rep("#", 41), "10s saturated 10s, 15s relieved 10s, 25.25s saturated 10s"},
		{"asleep", rep("#", 20) + "z" + rep("#", 39), ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			var f fullness
			var got []string
			start := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
			now := start
			for _, look := range c.looks {
				if look == 'z' {
					now = now.Add(time.Hour)
					continue
				}
				if on, took := f.look(now, look == '#'); on != "" {
					got = append(got, fmt.Sprint(now.Sub(start), " ", on, " ", took))
				}
				now = now.Add(250 * time.Millisecond)
			}
			if s := strings.Join(got, ", "); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
		})
	}
}

// watched is a world whose events and pulses are kept.
func watched(t *testing.T, change func(*policy.Policy)) (w *world, events *[]Event, last *Pulse) {
	w = newWorld(t, change)
	events, last = new([]Event), new(Pulse)
	w.g.o.OnEvent = func(e Event) { *events = append(*events, e) }
	w.g.o.OnPulse = func(p Pulse) { *last = p }
	return w, events, last
}

// between runs f on the goroutine that decides.
func (w *world) between(f func()) {
	w.t.Helper()
	if err := w.g.do(w.t.Context(), func(context.Context) { f() }); err != nil {
		w.t.Fatal(err)
	}
}

func told(events []Event) (s []string) {
	for _, e := range events {
		s = append(s, strings.TrimSpace(fmt.Sprintf("%d %s %s %s", e.Count, e.On, e.Outcome, e.Reason)))
	}
	return s
}

// A flood from its beginning to its end, as those see it who watch.
func TestEventsOfAFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events, pulse := watched(t, func(p *policy.Policy) {
			p.Block.MaxNewPerMinute = 1
			p.Rules = []detector.Rule{{Name: "slow", Metric: detector.Saturation, Window: 40 * time.Second, Threshold: 0.3, Prefixes4: []int{32}}}
		})
		stop := w.run()
		w.k.open("198.51.100.1", 60)
		w.k.open("198.51.100.2", 38)
		time.Sleep(12 * time.Second)
		w.between(func() {
			if pulse.Holders == nil || pulse.Capacity != 100 || pulse.Time.IsZero() {
				t.Errorf("pulse: %+v", *pulse)
			}
		})
		time.Sleep(30 * time.Second)
		stop()
		got := told(*events)
		for _, want := range []string{"1 saturated", "1 block blocked slow", "1 ended", "1 refuse refused per-minute", "1 relieved"} {
			if !slices.Contains(got, want) {
				t.Errorf("nobody was told %q: %q", want, got)
			}
		}
		if want := (map[BlockClass]int{{Bits: 32}: 1}); !reflect.DeepEqual(pulse.Blocks, want) {
			t.Errorf("blocks by class: %v, want %v", pulse.Blocks, want)
		}
		if n := pulse.Counters.Blocked; n != 1 {
			t.Errorf("%d blocked", n)
		}
	})
}

// What an operator does, and what one act on very many sources is worth.
func TestEventsOfAnOperator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events, pulse := watched(t, nil)
		stop := w.run()
		var reqs []BlockRequest
		for i := range 700 {
			reqs = append(reqs, BlockRequest{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 32), For: time.Hour, By: "root"})
		}
		if _, err := w.g.Block(t.Context(), reqs, false); err != nil {
			t.Fatal(err)
		}
		w.between(func() {
			if got := told(*events); len(got) != 700 || got[0] != "1 block blocked operator" {
				t.Errorf("%d events: %.200q", len(got), got)
			}
			*events = nil
		})
		time.Sleep(2 * time.Second)
		w.between(func() {
			if n := pulse.Blocks[BlockClass{Bits: 32}]; n != 700 {
				t.Errorf("%d blocks in the pulse", n)
			}
		})
		if _, err := w.g.Unblock(t.Context(), netip.Prefix{}, "root"); err != nil {
			t.Fatal(err)
		}
		w.between(func() {
			n := 0
			for _, e := range *events {
				n += e.Count
				if e.On != OnUnblock || e.By != "root" || e.Reason != "operator" || !e.Prefix.IsValid() {
					t.Errorf("%+v", e)
				}
			}
			if n != 700 || len(*events) > noteMost+1 {
				t.Errorf("%d events tell of %d unblocks", len(*events), n)
			}
			*events = nil
		})
		time.Sleep(2 * time.Second)
		w.between(func() {
			if len(pulse.Blocks) != 0 {
				t.Errorf("blocks are left in the pulse: %v", pulse.Blocks)
			}
		})
		o := w.block("192.0.2.1/32", time.Hour) // an address of this machine
		w.between(func() {
			if got := told(*events); o.Refused == "" || !slices.Equal(got, []string{"1 refuse refused allowed"}) {
				t.Errorf("%q", got)
			}
			*events = nil
		})
		if err := w.g.NoteFault(t.Context(), "telling", errors.New("no route")); err != nil {
			t.Fatal(err)
		}
		stop()
		if got := *events; len(got) != 1 || got[0].Why != "telling: no route" {
			t.Errorf("%v", got)
		}
	})
}

// stolen is a packet filter whose rules somebody takes away.
type stolen struct {
	firewall.Firewall
	gone bool
}

func (s *stolen) Ensure(ctx context.Context) (bool, error) {
	gone := s.gone
	s.gone = false
	_, err := s.Firewall.Ensure(ctx)
	return gone, err
}

func TestEventsOfTampering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events, pulse := watched(t, nil)
		fw := &stolen{Firewall: w.fw}
		w.g.fw, w.g.caps.Real = fw, true
		stop := w.run()
		time.Sleep(3 * time.Second)
		w.between(func() { fw.gone = true })
		time.Sleep(3 * time.Second)
		stop()
		if got := told(*events); !slices.Equal(got, []string{"1 tamper"}) || (*events)[0].Why != "somebody changed our rules in the packet filter; they are put back" {
			t.Errorf("%q", got)
		}
		if pulse.Repairs != 1 || !pulse.Agrees {
			t.Errorf("%+v", *pulse)
		}
	})
}

// The counters by class agree with a count of all, whatever is done.
func TestBlockClasses(t *testing.T) {
	var b blocks
	now := time.Now()
	prefixes := []string{"192.0.2.1/32", "192.0.2.0/24", "2001:db8::/64", "2001:db8::1/128"}
	for i := range 400 {
		p := netip.MustParsePrefix(prefixes[i*7%len(prefixes)])
		switch i % 5 {
		case 0, 1, 2:
			b.put(store.Block{Prefix: p, Observed: i%3 == 0, Until: now.Add(time.Duration(i%2) * time.Hour)})
		case 3:
			b.remove(p)
		case 4:
			b.expire(now)
		}
		want := map[BlockClass]int{}
		for _, blk := range b.all() {
			want[classOf(&blk)]++
		}
		if got := b.classes(); len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
			t.Fatalf("step %d: %v, want %v", i, got, want)
		}
	}
}

func TestDroppedCountsOnce(t *testing.T) {
	a, b := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32")
	var d Dropped
	read := func(whole bool, in ...firewall.Installed) {
		for _, i := range in {
			d.saw(i)
		}
		if whole {
			d.read()
		}
	}
	in := func(p netip.Prefix, n uint64) firewall.Installed {
		return firewall.Installed{Prefix: p, Packets: n, Bytes: 40 * n}
	}
	read(true, in(a, 10))
	read(false, in(a, 15)) // breaks off
	read(true, in(a, 15), in(b, 3))
	read(true, in(b, 4))
	read(true, in(a, 2), in(b, 4)) // a was made anew
	if d.Packets != 21 || d.Bytes != 840 {
		t.Errorf("%d packets, %d bytes", d.Packets, d.Bytes)
	}
}

// Old lines tell of another time: while they are read nobody is woken.
func TestNotFullWhileCatchingUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, events, _ := watched(t, func(p *policy.Policy) { p.Confirm, p.Rules = policy.ConfirmOff, nil })
		l := &logState{path: "log"}
		w.g.logs = []*logState{l}
		for range 100 {
			w.g.det.Observe(&detector.Event{Kind: detector.Opened, Time: time.Now(), Source: netip.MustParseAddr("198.51.100.1"), Port: uint16(1000 + len(*events))})
		}
		w.g.det.Observe(&detector.Event{Kind: detector.Sampled, Time: time.Now(), Count: 100})
		beat := func() {
			for range 60 {
				time.Sleep(tickEvery)
				w.g.beat(time.Now())
			}
		}
		beat()
		if len(*events) > 0 {
			t.Errorf("%v", told(*events))
		}
		l.caughtUp = true
		beat()
		if got := told(*events); !slices.Equal(got, []string{"1 saturated"}) {
			t.Errorf("%q", got)
		}
		if err := w.st.Close(); err != nil {
			t.Error(err)
		}
	})
}
