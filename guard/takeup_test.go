package guard

import (
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// What a person asked for by hand while blocks were only observed holds when
// they become real, until the end that he gave it; what rules observed is over,
// and nothing lists it any more. By a reload and by a restart alike.
func TestByHandHoldsFromObserve(t *testing.T) {
	for _, how := range []string{"reload", "restart"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) { p.Mode = policy.Observe })
				stop := w.run()
				defer func() { stop() }()
				w.k.flood()
				time.Sleep(12 * time.Second)
				o := w.block("203.0.113.1/32", time.Hour)
				w.block("198.51.100.0/24", 2*time.Hour)
				w.block("198.51.200.0/24", 2*time.Hour)
				if o.Block == nil || !o.Block.Observed {
					t.Fatalf("%+v", o)
				}
				w.want("")
				w.k.mu.Lock()
				clear(w.k.socks) // the flood is over: no rule blocks anybody
				w.k.mu.Unlock()
				time.Sleep(2 * time.Minute)

				p := *w.policy
				p.Mode = policy.Enforce
				p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("198.51.200.0/24"), Why: "policy.yaml:3:4"}}
				w.policy = &p
				if how == "reload" {
					if _, err := w.g.Reload(t.Context(), &p); err != nil {
						t.Fatal(err)
					}
				} else {
					stop()
					w.start()
					stop = w.run()
				}
				w.want("198.51.100.0/24 203.0.113.1/32")
				list := must(w.g.Blocks(t.Context()))
				if len(list) != 2 || !list[1].Until.Equal(o.Block.Until) || list[1].By != "root" || list[1].State != InForce {
					t.Errorf("%+v", list)
				}
				x := must(w.g.Explain(t.Context(), netip.MustParsePrefix("203.0.113.2/32")))
				if x.Blocked != nil || len(x.Inside) != 0 {
					t.Errorf("an observed block is still there: %+v %+v", x.Blocked, x.Inside)
				}
				if got := must(w.st.Active(time.Now())); len(got) != 2 {
					t.Errorf("the store has %d blocks that hold, want 2: %+v", len(got), got)
				}
				time.Sleep(time.Hour)
				w.want("198.51.100.0/24")
			})
		})
	}
}

// What was lifted because it should not have been is no offence, and neither
// is what is blocked a second time while it is blocked.
func TestNoOffence(t *testing.T) {
	offence := func(w *world, p string) int {
		w.t.Helper()
		o := w.block(p, 0)
		if o.Block == nil {
			w.t.Fatalf("%+v", o)
		}
		return o.Block.Offence
	}
	t.Run("allowed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			defer w.run()()
			customer := netip.MustParsePrefix("203.0.113.1/32")
			for range 3 {
				if n := offence(w, customer.String()); n != 1 {
					t.Errorf("offence %d after a mended mistake", n)
				}
				time.Sleep(time.Minute)
				if l, err := w.g.Allow(t.Context(), store.AllowEntry{Prefix: customer}); err != nil || len(l) != 1 {
					t.Fatal(l, err)
				}
				if _, err := w.g.Disallow(t.Context(), customer); err != nil {
					t.Fatal(err)
				}
			}
		})
	})
	t.Run("trial", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := trialWorld(t, 10*time.Minute)
			defer w.run()()
			time.Sleep(5 * time.Minute)
			offence(w, "203.0.113.1/32")
			time.Sleep(6 * time.Minute)
			if _, err := w.g.Commit(t.Context(), "root", 0); err != nil {
				t.Fatal(err)
			}
			if n := offence(w, "203.0.113.1/32"); n != 1 {
				t.Errorf("offence %d after a trial that nobody stood for", n)
			}
		})
	})
	t.Run("repeated", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			defer w.run()()
			for _, p := range []string{"203.0.113.78/31", "203.0.113.78/32", "203.0.113.78/32", "203.0.113.78/31"} {
				if n := offence(w, p); n != 1 {
					t.Errorf("%s is offence %d, want 1", p, n)
				}
				time.Sleep(time.Minute)
			}
			time.Sleep(time.Hour)
			if n := offence(w, "203.0.113.78/32"); n != 2 {
				t.Errorf("offence %d after all of them ran out, want 2", n)
			}
		})
	})
}

// TestByHandUnderShorterBlock: what was asked for by hand while it was only
// observed outlasts a real block around it that ends before.
func TestByHandUnderShorterBlock(t *testing.T) {
	for _, how := range []string{"reload", "restart"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				stop := w.run()
				defer func() { stop() }()
				w.block("203.0.113.0/24", 10*time.Minute)
				enforcing, observing := *w.policy, *w.policy
				observing.Mode = policy.Observe
				must(w.g.Reload(t.Context(), &observing))
				w.block("203.0.113.5/32", 7*24*time.Hour)
				w.block("203.0.113.9/32", 5*time.Minute)
				if how == "reload" {
					must(w.g.Reload(t.Context(), &enforcing))
				} else {
					stop()
					w.start()
					stop = w.run()
				}
				w.want("203.0.113.0/24 203.0.113.5/32")
				h := must(w.g.History(t.Context(), netip.MustParsePrefix("203.0.113.9/32")))
				if len(h) == 0 || !strings.HasSuffix(h[0].LiftedBy, "it is in force with 203.0.113.0/24") {
					t.Errorf("%+v", h)
				}
				time.Sleep(15 * time.Minute)
				w.want("203.0.113.5/32")
			})
		})
	}
}
