package guard

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
)

// A policy counts from its reload on, also where the packet filter cannot be
// opened anew for it: that is told, and tried again.
func TestReloadFilterFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		shut := func(err error) {
			if e := w.g.do(t.Context(), func(context.Context) { w.shut = err }); e != nil {
				t.Fatal(e)
			}
		}
		why := errors.New("netlink: device or resource busy")
		shut(why)
		p := *w.policy
		p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
		done, err := w.g.Reload(t.Context(), &p)
		if err != nil || !errors.Is(done.Undone, why) || done.Mode != policy.Enforce {
			t.Errorf("%+v, %v", done, err)
		}
		if o := w.block("203.0.113.7/32", time.Hour); o.Refused == "" {
			t.Errorf("the new allowlist does not count: %+v", o)
		}
		shut(nil)
		time.Sleep(selfEvery + time.Second)
		w.want("")
		if last := w.passes[len(w.passes)-1]; join(last) != "203.0.113.7/32" {
			t.Errorf("the packet filter lets pass %v", last)
		}

		// A fault in the rules, which only the detector finds: all is as before.
		p.Allow = nil
		p.Rules = []detector.Rule{{Name: "no window"}}
		p.Capacity = 20
		if done, err = w.g.Reload(t.Context(), &p); err == nil || done.Undone != nil {
			t.Errorf("%+v, %v", done, err)
		}
		if o := w.block("203.0.113.7/32", time.Hour); o.Refused == "" {
			t.Errorf("a policy that was not taken counts: %+v", o)
		}
		if c := w.status().Capacity; c != 100 {
			t.Errorf("a policy that was not taken counts: %d slots", c)
		}
		p.Rules = nil // another detector
		if _, err := w.g.Reload(t.Context(), &p); err != nil {
			t.Error(err)
		}
		if s := w.status(); s.Capacity != 20 || s.CapacityFrom != "the policy" {
			t.Errorf("%d slots by %s", s.Capacity, s.CapacityFrom)
		}
	})
}

// Where enforcing cannot begin, the rest of the policy counts all the same, and
// what Reload says of the mode is what the guard does.
func TestReloadModeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Mode = policy.Observe })
		defer w.run()()
		shut := func(err error) {
			if e := w.g.do(t.Context(), func(context.Context) { w.shut = err }); e != nil {
				t.Fatal(e)
			}
		}
		why := errors.New("netlink: device or resource busy")
		shut(why)
		p := *w.policy
		p.Mode, p.Block.MaxBlocks = policy.Enforce, 1
		done, err := w.g.Reload(t.Context(), &p)
		if err != nil || !errors.Is(done.Undone, why) || done.Mode != policy.Observe {
			t.Errorf("%+v, %v", done, err)
		}
		if o := w.block("203.0.113.1/32", time.Hour); o.Block == nil || !o.Block.Observed {
			t.Errorf("%+v", o)
		}
		if o := w.block("203.0.113.2/32", time.Hour); o.Refused == "" {
			t.Errorf("the new max_blocks does not count: %+v", o)
		}
		shut(nil)
		if done, err = w.g.Reload(t.Context(), &p); err != nil || done.Undone != nil || done.Mode != policy.Enforce {
			t.Errorf("%+v, %v", done, err)
		}
		w.block("203.0.113.1/32", time.Hour)
		w.want("203.0.113.1/32")
	})
}

// In mode: observe, when the last block is lifted, the packet filter gives way
// to one that drops nothing; not before it has let go of everything.
func TestFilterGivesWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		c := &clinging{broken: broken{Firewall: firewall.NewMemory(firewall.Options{})}}
		w.st.Close()
		w.fw = c
		w.start()
		defer w.run()()
		w.block("198.51.100.7/32", 24*time.Hour)
		p := *w.policy
		p.Mode = policy.Observe
		if _, err := w.g.Reload(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		if err := w.g.do(t.Context(), func(context.Context) {
			w.g.o.OpenFirewall = func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
				return firewall.NewMemory(firewall.Options{}), nil
			}
		}); err != nil {
			t.Fatal(err)
		}
		c.at.Store(true)
		if _, err := w.g.Unblock(t.Context(), netip.Prefix{}, "root"); err == nil {
			t.Error("it clings, and nobody is told")
		}
		p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
		if r, err := w.g.Reload(t.Context(), &p); err != nil || r.Undone == nil {
			t.Errorf("%+v, %v", r, err)
		}
		time.Sleep(3 * selfEvery)
		w.want("198.51.100.7/32")
		if f := w.status().Firewall; f.Agrees || len(f.Lingering) != 1 {
			t.Errorf("%+v", f)
		}
		c.at.Store(false)
		time.Sleep(2 * selfEvery)
		w.want("")
		if real := w.status().Firewall; real.Backend != firewall.Memory || !real.Agrees {
			t.Errorf("%+v", real)
		}
		if err := w.g.do(t.Context(), func(context.Context) {
			if w.g.caps.Real {
				t.Error("it did not give way")
			}
		}); err != nil {
			t.Fatal(err)
		}
	})
}

// TestProofOutlivesReload: that the server was seen full is known after rules
// have changed.
func TestProofOutlivesReload(t *testing.T) {
	for _, reload := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			w.g.o.Capacity = 0
			w.g.det = must(newDetector(w.g.o))
			defer w.run()()
			w.k.open("198.51.100.9", 4)
			w.k.busy()
			time.Sleep(4 * time.Second)
			err := w.g.do(t.Context(), func(ctx context.Context) {
				full := detector.Event{Kind: detector.Refused, Reason: detector.RefusedFull, Time: time.Now()}
				w.g.decide(ctx, w.g.det.Observe(&full), time.Now())
			})
			if err != nil {
				t.Fatal(err)
			}
			if reload {
				p := *w.policy
				p.Memory *= 2
				if r := must(w.g.Reload(t.Context(), &p)); !r.Anew {
					t.Error("the answer does not say that the rules count anew")
				}
				if r := must(w.g.Reload(t.Context(), &p)); r.Anew {
					t.Error("the answer to the same policy says that the rules count anew")
				}
			}
			time.Sleep(time.Minute)
			if w.inFilter() == "" {
				t.Errorf("reload: %v, nothing is blocked: %+v", reload, w.status().Decisions)
			}
		})
	}
}
