package guard

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// newLone is a guard that serves one command, and never runs.
func newLone(t *testing.T, ns int, st *store.Store, open func(firewall.Options) (firewall.Firewall, error), allow ...string) *Guard {
	t.Helper()
	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	for _, a := range allow {
		p.Allow = append(p.Allow, policy.AllowEntry{Prefix: netip.MustParsePrefix(a)})
	}
	g, err := New(t.Context(), Options{Policy: p, Store: st, Capacity: 100,
		OpenFirewall: func(_ context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error) {
			return open(firewall.Options{Ports: []uint16{25}, NetNS: ns, Allow: allow, MaxEntries: entries})
		},
		Self: func(context.Context) ([]Exempt, error) { return neverBlocked, nil }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Close(context.Background(), false) })
	return g
}

// A command without a daemon looks at the real packet filter, and says what it
// finds there: nobody else would.
func TestLone(t *testing.T) {
	needs(t, "nft", "iptables", "ipset")
	for name, open := range map[string]func(firewall.Options) (firewall.Firewall, error){
		firewall.NFTables: firewall.NewNFTables, firewall.IPTables: firewall.NewIPTables,
	} {
		t.Run(name, func(t *testing.T) {
			ns := newNamespace(t)
			st, err := store.Open(filepath.Join(t.TempDir(), "s.db"), store.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer st.Close()
			lone := func(allow ...string) *Guard { return newLone(t, ns, st, open, allow...) }
			run := func(line string) {
				t.Helper()
				cmd := exec.Command("nsenter", append([]string{"--net=/proc/self/fd/3"}, strings.Fields(line)...)...)
				cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(t, ns)), "netns")}
				defer cmd.ExtraFiles[0].Close()
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%s: %v\n%s", line, err, out)
				}
			}
			// check looks at everything that a command shows, with a guard of
			// its own each time.
			check := func(after string, want State, agrees bool) {
				t.Helper()
				list := must(lone().Blocks(t.Context()))
				if len(list) != 2 || list[0].State != want {
					t.Errorf("%s: Blocks says %+v, want %q", after, list, want)
				}
				x := must(lone().Explain(t.Context(), netip.MustParsePrefix("198.51.100.7/32")))
				if x.Blocked == nil || x.Blocked.State != want {
					t.Errorf("%s: Explain says %+v, want %q", after, x.Blocked, want)
				}
				if h := must(lone().History(t.Context(), netip.MustParsePrefix("198.51.100.0/24"))); len(h) != 1 || h[0].State != want {
					t.Errorf("%s: History says %+v, want %q", after, h, want)
				}
				if s := must(lone().Status(t.Context())); s.Firewall.Agrees != agrees || agrees != (s.Firewall.Error == "") {
					t.Errorf("%s: Status says %+v, want agrees %v", after, s.Firewall, agrees)
				}
				if t.Failed() {
					t.FailNow()
				}
			}
			if s := must(lone().Status(t.Context())); !s.Firewall.Agrees {
				t.Errorf("without a block nothing need be there: %+v", s.Firewall)
			}
			until := time.Now().Add(time.Hour)
			reqs := []BlockRequest{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), Until: until, By: "root"}, {Prefix: netip.MustParsePrefix("2001:db8:1::/64"), Until: until, By: "root"}}
			if out, err := lone().Block(t.Context(), reqs, false); err != nil || out[0].Error != "" {
				t.Fatal(out, err)
			}
			check("a block", InForce, true)

			faults := []string{"nft flush ruleset", "nft flush chain inet smtpguard prerouting", "nft add table inet smtpguard { flags dormant; }", "nft delete element inet smtpguard b4_24 { 198.51.100.0 }"}
			if name == firewall.IPTables {
				faults = []string{"iptables -t raw -F", "iptables -t raw -I PREROUTING -j ACCEPT", "ipset flush", "ipset del smtpguard4 198.51.100.0/24"}
			}
			for _, f := range faults {
				run(f)
				if f == "iptables -t raw -F" {
					run("iptables -t raw -X")
				}
				list := must(lone().Blocks(t.Context()))
				one := strings.Contains(f, "del") // the other one is in force
				if one != (list[1].State == InForce) {
					t.Errorf("%s: the other block is %q", f, list[1].State)
				}
				check(f, NotApplied, false)
				g := lone()
				if _, err := g.Sync(t.Context()); err != nil {
					t.Fatal(f, err)
				}
				if list := must(g.Blocks(t.Context())); list[0].State != InForce {
					t.Errorf("%s: after the sync %+v", f, list)
				}
				check("a sync after "+f, InForce, true)
			}
			if s := must(lone("192.0.2.0/24").Status(t.Context())); !s.Firewall.Agrees {
				t.Errorf("the policy was edited while no daemon ran, and what is dropped is dropped all the same: %+v", s.Firewall)
			}

			// What should not be there is named, too.
			if err := st.End(time.Now(), "somebody", must(st.Active(time.Now()))[0].ID); err != nil {
				t.Fatal(err)
			}
			if s := must(lone().Status(t.Context())); s.Firewall.Agrees || len(s.Firewall.Lingering) != 1 {
				t.Errorf("%+v, want one that lingers", s.Firewall)
			}
			must(lone().Sync(t.Context()))
			if s := must(lone().Status(t.Context())); !s.Firewall.Agrees || len(s.Firewall.Lingering) != 0 {
				t.Errorf("after the sync %+v", s.Firewall)
			}
		})
	}
}

// Somebody who has logged in since the last look is on the list of those who
// are never blocked before anybody is: by hand, by a rule, and by what is taken
// up when blocks become real.
func TestSelfBeforeBlock(t *testing.T) {
	peer := Exempt{netip.MustParsePrefix("203.0.113.1/32"), "the peer of an SSH session"}
	setup := func(t *testing.T, p func(*policy.Policy)) (w *world, login, stop func()) {
		w = newWorld(t, p)
		stop = w.run()
		time.Sleep(5 * time.Second)
		return w, func() {
			w.ownMu.Lock()
			defer w.ownMu.Unlock()
			w.own = []Exempt{peer} // and no news of it
		}, stop
	}
	t.Run("by hand", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, login, stop := setup(t, nil)
			defer stop()
			login()
			out, err := w.g.Block(t.Context(), []BlockRequest{{Prefix: peer.Prefix, For: time.Hour, By: "root"}}, false)
			if err != nil || out[0].Block != nil || !strings.Contains(out[0].Refused, peer.Why) {
				t.Errorf("%+v, %v", out, err)
			}
			w.want("")
		})
	})
	t.Run("by a rule", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, login, stop := setup(t, nil)
			defer stop()
			login()
			w.k.flood()
			time.Sleep(20 * time.Second)
			w.want(strings.TrimPrefix(five, "203.0.113.1/32 "))
		})
	})
	t.Run("taken up", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			w, login, stop := setup(t, func(p *policy.Policy) { p.Mode = policy.Observe })
			defer stop()
			w.block(peer.Prefix.String(), time.Hour)
			login()
			p := *w.policy
			p.Mode = policy.Enforce
			if _, err := w.g.Reload(t.Context(), &p); err != nil {
				t.Fatal(err)
			}
			w.want("")
		})
	})
}
