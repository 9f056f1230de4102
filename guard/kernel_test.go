package guard

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// Somebody who empties our sets is found out and the blocks are put back, with
// the real kernel; also after the allowlist, and with it the table, changed.
// And a store that is lost takes over what the kernel holds.
func TestTamperedKernel(t *testing.T) {
	ns := newNamespace(t)
	nft, err := exec.LookPath("nft")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	start := func(db string) (*Guard, func()) {
		st, err := store.Open(filepath.Join(dir, db), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		ready := make(chan struct{})
		g, err := New(t.Context(), Options{Policy: p, Store: st, Capacity: 100,
			OpenFirewall: func(_ context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error) {
				return firewall.NewNFTables(firewall.Options{Ports: []uint16{25}, NetNS: ns, Allow: allow, MaxEntries: entries})
			},
			Notify: func(s string) {
				if s == "READY=1" {
					close(ready)
				}
			},
			Self: func(context.Context) ([]Exempt, error) { return neverBlocked, nil }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- g.Run(ctx) }()
		<-ready
		return g, func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := g.Close(context.Background(), false); err != nil {
				t.Error(err)
			}
			if err := st.Close(); err != nil {
				t.Error(err)
			}
		}
	}
	run := func(args ...string) {
		t.Helper()
		cmd := exec.Command("nsenter", append([]string{"--net=/proc/self/fd/3", nft}, args...)...)
		cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(t, ns)), "netns")}
		defer cmd.ExtraFiles[0].Close()
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("nft %v: %v\n%s", args, err, out)
		}
	}
	block := netip.MustParsePrefix("198.51.100.0/24")
	inForce := func(g *Guard, what string) {
		t.Helper()
		var state State
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			list, err := g.Blocks(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(list) == 1 {
				if state = list[0].State; state == InForce {
					return
				}
			}
		}
		t.Fatalf("after %s the block is %q", what, state)
	}
	g, stop := start("a.db")
	if _, err := g.Block(t.Context(), []BlockRequest{{Prefix: block, For: time.Hour, By: "root"}}, false); err != nil {
		t.Fatal(err)
	}
	inForce(g, "the block")
	for _, allow := range []string{"", "203.0.113.7/32", "203.0.113.8/32"} {
		if allow != "" {
			if _, err := g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix(allow), By: "root"}); err != nil {
				t.Fatal(err)
			}
			inForce(g, "allow "+allow)
		}
		run("flush", "set", "inet", "smtpguard", "b4_24")
		inForce(g, "flush set")
		run("flush", "ruleset")
		inForce(g, "flush ruleset")
	}
	stop()

	g, stop = start("b.db") // the store is another one
	inForce(g, "the loss of the store")
	stop()
}

// A block with an end that no packet filter takes, as a store may have it, is
// no sign that somebody changed something.
func TestFarEnd(t *testing.T) {
	needs(t, "nft", "ipset", "iptables")
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
			now := time.Now()
			if err := st.Add(&store.Block{Prefix: netip.MustParsePrefix("198.51.100.7/32"), Since: now, Until: time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC), By: "root"}); err != nil {
				t.Fatal(err)
			}
			g := newLone(t, ns, st, open)
			if err := g.restore(t.Context()); err != nil {
				t.Fatal(err)
			}
			g.checkContent(t.Context())
			if g.drift.repairs != 0 || g.drift.trouble() != nil {
				t.Errorf("%d repairs, %v", g.drift.repairs, g.drift.trouble())
			}
			list, err := g.Blocks(t.Context())
			if err != nil || len(list) != 1 || list[0].State != InForce {
				t.Errorf("%+v, %v", list, err)
			}
		})
	}
}
