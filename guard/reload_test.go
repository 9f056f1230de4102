package guard

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
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
