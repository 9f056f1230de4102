package guard

import (
	"errors"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/policy"
)

// Whom CSF's lists begin to name while we run is freed within seconds, is not
// forgotten while a list cannot be read or is just written anew, and counts for
// a block by hand at once.
func TestListed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		var mu sync.Mutex
		var list []Listed
		var fault error
		set := func(err error, prefixes ...string) {
			mu.Lock()
			defer mu.Unlock()
			list, fault = nil, err
			for _, p := range prefixes {
				list = append(list, Listed{policy.AllowEntry{Prefix: netip.MustParsePrefix(p), Why: "csf.allow:1"}, false})
			}
		}
		w.g.o.Listed = func(time.Time) ([]Listed, error) {
			mu.Lock()
			defer mu.Unlock()
			return list, fault
		}
		defer w.run()()
		w.block("198.51.100.7/32", time.Hour)
		w.block("198.51.100.8/32", time.Hour)
		set(nil, "198.51.100.7/32")
		time.Sleep(3 * time.Second)
		w.want("198.51.100.8/32")
		if len(w.passes[len(w.passes)-1]) != 1 {
			t.Errorf("the packet filter lets pass %v", w.passes)
		}

		refused := func(p string, want bool) {
			t.Helper()
			out, err := w.g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix(p), For: time.Hour, By: "root"}}, true)
			if err != nil || (out[0].Refused != "") != want {
				t.Errorf("%+v, %v; refused should be %v", out, err, want)
			}
		}
		set(nil, "198.51.100.7/32", "198.51.100.9/32")
		refused("198.51.100.9/32", true) // no look since
		set(errors.New("it cannot be read"))
		time.Sleep(time.Hour)
		refused("198.51.100.7/32", true)
		if n := w.g.count.Faults; n != 1 && n != 2 {
			t.Errorf("%d faults are told within an hour", n)
		}
		set(nil) // cut off
		time.Sleep(time.Hour)
		refused("198.51.100.7/32", true)
		set(nil, "198.51.100.9/32") // taken off, or just written anew
		time.Sleep(time.Minute)
		refused("198.51.100.7/32", true)
		time.Sleep(11 * time.Minute)
		refused("198.51.100.7/32", false)

		set(nil) // it is meant
		if _, err := w.g.Reload(t.Context(), w.policy); err != nil {
			t.Fatal(err)
		}
		refused("198.51.100.9/32", false)
	})
}
