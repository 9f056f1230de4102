package guard

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// After any sequence of lines, commands, changes of the allowlist, of what its
// names stand for, of this machine's own addresses and of the mode, trials that
// run out, and restarts, no entry in the packet filter overlaps an allowed
// prefix, and the filter holds exactly the blocks that the store has in force.
func TestProperty(t *testing.T) {
	for seed := range uint64(30) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { randomLife(t, rand.New(rand.NewPCG(seed, 1))) })
		})
	}
	for _, s := range []string{"part", "over", "commit running", "commit committed"} {
		if _, ok := lives.Load(s); !ok && !t.Failed() {
			t.Errorf("%q never came about", s)
		}
	}
}

func randomLife(t *testing.T, r *rand.Rand) {
	w := newWorld(t, func(p *policy.Policy) {
		p.Confirm = policy.ConfirmOff
		p.Block.For = []time.Duration{20 * time.Second, time.Minute}
		p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.192/26"), Why: "test"}}
		p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "test"}}
		p.Commit = time.Duration(r.IntN(400)) * time.Second
		if r.IntN(3) == 0 {
			p.Block.Overlap = policy.OverlapRefuse
		}
	})
	z := &zone{}
	w.dns(z)
	stop := w.run()
	defer func() { stop() }()
	ctx := t.Context()
	addr := func() netip.Addr {
		if r.IntN(4) == 0 {
			a := netip.MustParseAddr("2001:db8::").As16()
			a[5], a[7], a[15] = byte(r.IntN(2)), byte(r.IntN(3)), byte(r.IntN(6))
			return netip.AddrFrom16(a)
		}
		return netip.AddrFrom4([4]byte{203, 0, 113, byte(r.IntN(256))})
	}
	prefix := func() netip.Prefix {
		a := addr()
		bits := a.BitLen() - r.IntN(12)
		p, _ := a.Prefix(bits)
		return p
	}
	allowed := map[netip.Prefix]bool{}
	var own, named []netip.Prefix // this machine's, and what the name stands for
	reload := func() {
		p := *w.policy
		if _, err := w.g.Reload(ctx, &p); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[string]bool{} // what came about, so that it is tested at all
	for step := range 140 {
		switch k := r.IntN(14); {
		case k < 4:
			a := addr()
			var evs []detector.Event
			for range 1 + r.IntN(60) {
				ev := detector.Event{Time: time.Now(), Kind: detector.Opened, Source: a, Port: uint16(1 + r.IntN(300)), Count: r.IntN(110)}
				switch r.IntN(6) {
				case 0:
					ev.Kind = detector.Closed
				case 1:
					ev.Kind, ev.Reason = detector.Refused, detector.RefusedFull
				case 2:
					ev.Source = addr()
				}
				evs = append(evs, ev)
			}
			w.lines(evs...)
		case k < 6:
			_, _ = w.g.Block(ctx, []BlockRequest{
				{Prefix: prefix(), For: time.Duration(r.IntN(90)+1) * time.Second, By: "test"},
				{Prefix: prefix(), For: time.Duration(r.IntN(90)+1) * time.Second, By: "test"}}, false)
		case k == 6:
			_, _ = w.g.Unblock(ctx, prefix(), "test")
		case k == 7:
			p := prefix()
			if _, err := w.g.Allow(ctx, store.AllowEntry{Prefix: p, By: "test"}); err != nil {
				t.Fatal(err)
			}
			allowed[p] = true
		case k == 8:
			for p := range allowed {
				if found, err := w.g.Disallow(ctx, p); err != nil || !found {
					t.Fatal(found, err)
				}
				delete(allowed, p)
				break
			}
		case k == 9 && r.IntN(4) == 0:
			stop()
			w.start()
			w.dns(z)
			stop = w.run()
		case k == 10:
			own = own[:0]
			var list []Exempt
			for range r.IntN(3) {
				a := addr()
				own = append(own, netip.PrefixFrom(a, a.BitLen()))
				list = append(list, Exempt{own[len(own)-1], "an address of this machine"})
			}
			w.takeOn(list...)
			time.Sleep(time.Second) // that long it takes at most
		case k == 11:
			named = named[:0]
			var text []string
			for range r.IntN(4) {
				a := addr()
				named, text = append(named, netip.PrefixFrom(a, a.BitLen())), append(text, a.String())
			}
			z.break_(r.IntN(4) == 0, false)
			if z.fails {
				named = named[:0]
			}
			z.set("mx.example.org", strings.Join(text, " "))
			reload() // looks it up
			time.Sleep(time.Second)
		case k == 12 && r.IntN(2) == 0:
			if t, err := w.g.Commit(ctx, "test", time.Duration(r.IntN(3)*30)*time.Second); err == nil {
				seen["commit "+string(t.State)] = true
			}
		case k == 13 && r.IntN(4) == 0:
			p := *w.policy
			p.Mode = map[policy.Mode]policy.Mode{policy.Enforce: policy.Observe, policy.Observe: policy.Enforce}[p.Mode]
			w.policy = &p
			reload()
		}
		time.Sleep(time.Duration(r.IntN(5000)) * time.Millisecond)
		synctest.Wait()
		if err := w.g.do(ctx, func(context.Context) {
			w.check(t, step)
			if w.g.trial.State == TrialOver {
				seen["over"] = true
			}
			// What is allowed is not only what the gate believes.
			truth := append(slices.Collect(maps.Keys(allowed)), netip.MustParsePrefix("203.0.113.192/26"))
			for _, p := range slices.Concat(truth, own, named) {
				if _, ok := w.g.gate.allow.Overlaps(p); !ok {
					t.Fatalf("step %d: the gate does not know that %s is allowed", step, p)
				}
			}
			for _, b := range w.g.blocks.all() {
				seen["part"] = seen["part"] || b.Part > 0
			}
		}); err != nil {
			t.Fatal(err)
		}
	}
	for s := range seen {
		lives.Store(s, true)
	}
}

// lives is what came about in any of the lives.
var lives sync.Map

// check compares filter, store and allowlist.
func (w *world) check(t *testing.T, step int) {
	now := time.Now()
	want := map[netip.Prefix]time.Time{}
	in, err := w.st.InForce(now)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range in {
		if old, ok := want[b.Prefix]; ok {
			t.Errorf("step %d: %s is in force twice, until %s and %s", step, b.Prefix, old, b.Until)
		}
		if w.g.trial.over(now) {
			t.Errorf("step %d: %s is in force, and the trial is over", step, b.Prefix)
		}
		if want[b.Prefix] = b.Until; w.g.trial.State == OnTrial && w.g.trial.Until.Before(b.Until) {
			want[b.Prefix] = w.g.trial.Until // nobody has given his word for more
		}
	}
	for e, err := range w.fw.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if a, ok := w.g.gate.allow.Overlaps(e.Prefix); ok {
			t.Fatalf("step %d: the filter holds %s, which overlaps the allowed %s", step, e.Prefix, a.Prefix)
		}
		if until, ok := want[e.Prefix]; !ok {
			t.Errorf("step %d: the filter holds %s, which is not in force in the store", step, e.Prefix)
		} else if !until.Equal(e.Until) {
			t.Errorf("step %d: %s ends at %s in the filter, want %s", step, e.Prefix, e.Until, until)
		}
		delete(want, e.Prefix)
	}
	for p := range want {
		t.Errorf("step %d: %s is in force in the store, but not in the filter", step, p)
	}
}
