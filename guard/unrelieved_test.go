package guard

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// A server that is full while nobody is blocked: status says who is nearest,
// and what keeps him from being blocked.
func TestFullAndNobodyBlocked(t *testing.T) {
	spread := func(w *world) {
		for i := range 97 { // one slot each, no two of one net
			w.k.open(fmt.Sprintf("198.51.%d.1", 100+i), 1)
		}
	}
	t.Run("below every threshold", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			defer w.run()()
			spread(w)
			time.Sleep(20 * time.Second)
			if w.warned("nobody was blocked") {
				t.Errorf("too early: %q", w.status().Warnings)
			}
			time.Sleep(20 * time.Second)
			if !w.warned("the server has been full for 4") || !w.warned("nobody was blocked: nearest to a verdict is 198.51.") {
				t.Errorf("%q", w.status().Warnings)
			}
		})
	})
	t.Run("allowed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			defer w.run()()
			if _, err := w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("0.0.0.0/0"), By: "root"}); err != nil {
				t.Fatal(err)
			}
			w.k.flood()
			time.Sleep(40 * time.Second)
			if !w.warned("because it is allowed: ") || !w.warned("overlaps 0.0.0.0/0") {
				t.Errorf("%q", w.status().Warnings)
			}
		})
	})
	t.Run("blocked", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, nil)
			defer w.run()()
			spread(w)
			w.k.flood()
			time.Sleep(time.Minute)
			w.want(five)
			if s := w.status(); strings.Contains(fmt.Sprint(s.Warnings), "nobody was blocked") {
				t.Errorf("%q", s.Warnings)
			}
		})
	})
}

// Blocks that still drop in mode: observe are not nothing.
func TestObserveWithBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.block("203.0.113.0/24", time.Hour)
		p := *w.policy
		p.Mode = policy.Observe
		if _, err := w.g.Reload(t.Context(), &p); err != nil {
			t.Fatal(err)
		}
		if !w.warned("mode: observe: ") || !w.warned("but 1 of an earlier mode: enforce still drop") || w.warned("nothing is blocked") {
			t.Errorf("%q", w.status().Warnings)
		}
	})
}

// down is a socket table on which nothing listens.
type down struct {
	*kernel
	up bool
}

func (d *down) Listens(context.Context, []uint16) (bool, error) { return d.up, nil }

func TestNobodyListens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		d := &down{kernel: w.k}
		w.g.o.Sockets = d
		defer w.run()()
		if !w.warned("nothing listens on the SMTP ports [25 465 587]") {
			t.Errorf("%q", w.status().Warnings)
		}
		d.up = true
		if w.warned("nothing listens") {
			t.Errorf("%q", w.status().Warnings)
		}
	})
}
