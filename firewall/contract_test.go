package firewall

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// backend is a firewall under test.
type backend struct {
	name string
	real bool
	// bare: there is no layout to build, and packets are another program's
	// matter.
	bare bool
	// in opens it in a namespace; memory needs none.
	in func(t testing.TB, ns netNS, o Options) Firewall
}

// open opens it in a namespace of its own.
func (b backend) open(t testing.TB, o Options) (Firewall, netNS) {
	t.Helper()
	var ns netNS
	if b.real {
		ns = newNetNS(t)
	}
	return b.in(t, ns, o), ns
}

// max is what the filter holds at most of n.
func (b backend) max(t testing.TB, n int) int {
	t.Helper()
	fw, _ := b.open(t, Options{})
	caps, err := fw.Probe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if caps.MaxEntries > 0 {
		return min(n, caps.MaxEntries)
	}
	return n
}

// ended closes fw at the end of the test.
func ended(t testing.TB, fw Firewall) Firewall {
	t.Cleanup(func() {
		if err := fw.Close(context.Background(), false); err != nil {
			t.Error(err)
		}
	})
	return fw
}

func openIn(t testing.TB, ns netNS, name string, o Options) Firewall {
	t.Helper()
	o.NetNS = ns.fd
	fw, _, err := Open(context.Background(), name, o)
	if errors.Is(err, ErrUnavailable) {
		cannot(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return ended(t, fw)
}

// onEach runs a test of the contract on each backend.
func onEach(t *testing.T, f func(t *testing.T, b backend)) {
	all := []backend{
		{"memory", false, false, func(_ testing.TB, _ netNS, o Options) Firewall { return NewMemory(o) }},
		{"nftables", true, false, func(t testing.TB, ns netNS, o Options) Firewall { return openIn(t, ns, NFTables, o) }},
	}
	for _, b := range slices.Concat(all, xtBackends, csfBackends()) {
		t.Run(b.name, func(t *testing.T) {
			t.Parallel() // they wait more than they work
			f(t, b)
		})
	}
}

// do carries out a script: "set 192.0.2.7/32 10m", "unset 192.0.2.0/24",
// "replace PREFIX DURATION, PREFIX DURATION"; lines are calls, commas join
// what goes into one.
func do(t testing.TB, fw Firewall, script string) {
	t.Helper()
	ctx := t.Context()
	for line := range strings.Lines(script) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		verb, rest, _ := strings.Cut(line, " ")
		var b Batch
		for part := range strings.SplitSeq(rest, ",") {
			f := strings.Fields(part)
			if len(f) == 1 {
				b.Unset = append(b.Unset, netip.MustParsePrefix(f[0]))
			} else if len(f) == 2 {
				d, err := time.ParseDuration(f[1])
				if err != nil {
					t.Fatal(err)
				}
				b.Set = append(b.Set, Entry{netip.MustParsePrefix(f[0]), time.Now().Add(d)})
			}
		}
		var err error
		var res Result
		switch verb {
		case "ensure":
			_, err = fw.Ensure(ctx)
		case "replace":
			err = fw.Replace(ctx, b.Set)
		default:
			res, err = fw.Apply(ctx, b)
		}
		if err != nil || len(res.Failed) > 0 {
			t.Fatalf("%s: %v, failed %v", line, err, res.Failed)
		}
	}
}

// dump is what the filter holds, as text, with the minutes that are left.
func dump(t testing.TB, fw Firewall) string {
	t.Helper()
	var lines []string
	for e, err := range fw.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, fmt.Sprintf("%v %.0fm", e.Prefix, time.Until(e.Until).Minutes()))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func expect(t testing.TB, fw Firewall, want string) {
	t.Helper()
	var lines []string
	for line := range strings.Lines(want) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	if got := dump(t, fw); got != strings.Join(lines, "\n") {
		t.Fatalf("the filter holds\n%s\nand should hold\n%s", got, strings.Join(lines, "\n"))
	}
}

func TestContract(t *testing.T) {
	cases := []struct{ name, script, want string }{
		{"nothing", "", ""},
		{"set", "set 192.0.2.7/32 10m", "192.0.2.7/32 10m"},
		{"set twice is once", "set 192.0.2.7/32 10m\nset 192.0.2.7/32 10m", "192.0.2.7/32 10m"},
		{"set twice in one batch, the last counts", "set 192.0.2.7/32 10m, 192.0.2.7/32 30m", "192.0.2.7/32 30m"},
		{"extend", "set 192.0.2.7/32 10m\nset 192.0.2.7/32 90m", "192.0.2.7/32 90m"},
		{"shorten", "set 192.0.2.7/32 90m\nset 192.0.2.7/32 10m", "192.0.2.7/32 10m"},
		{"unset", "set 192.0.2.7/32 10m, 192.0.2.8/32 10m\nunset 192.0.2.7/32", "192.0.2.8/32 10m"},
		{"unset what is missing", "unset 192.0.2.7/32", ""},
		{"unset of a length that was never used", "unset 192.0.2.0/27, 2001:db8::/61", ""},
		{"unset twice", "set 192.0.2.7/32 10m\nunset 192.0.2.7/32, 192.0.2.7/32\nunset 192.0.2.7/32", ""},
		{"set and unset together", "set 192.0.2.7/32 10m\nset 192.0.2.8/32 20m, 192.0.2.7/32", "192.0.2.8/32 20m"},
		{"past is unset", "set 192.0.2.7/32 10m\nset 192.0.2.7/32 -1s", ""},
		{"a year", "set 192.0.2.7/32 8760h", "192.0.2.7/32 525600m"},
		{"nested, each with its own end",
			"set 192.0.2.0/24 60m\nset 192.0.2.7/32 10m, 192.0.0.0/16 90m\nunset 192.0.2.0/24\nset 192.0.2.0/28 5m",
			"192.0.0.0/16 90m\n192.0.2.0/28 5m\n192.0.2.7/32 10m"},
		{"both families", "set 192.0.2.7/32 10m, 2001:db8::7/128 20m, 2001:db8::/64 30m, 2001:db8::/56 40m, 2001:db8::/48 50m",
			"192.0.2.7/32 10m\n2001:db8::/48 50m\n2001:db8::/56 40m\n2001:db8::/64 30m\n2001:db8::7/128 20m"},
		{"odd lengths", "set 192.0.2.32/27 10m, 198.51.0.0/13 10m\nset 192.0.2.8/29 10m, 2001:db8:0:8::/61 20m, 8000::/1 10m, 128.0.0.0/1 10m",
			"128.0.0.0/1 10m\n192.0.2.32/27 10m\n192.0.2.8/29 10m\n198.48.0.0/13 10m\n2001:db8:0:8::/61 20m\n8000::/1 10m"},
		{"the ends of the address space", "set 255.255.255.255/32 10m, 0.0.0.0/32 10m, ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128 10m, ::/128 10m",
			"0.0.0.0/32 10m\n255.255.255.255/32 10m\n::/128 10m\nffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128 10m"},
		{"replace keeps, adds, changes and removes",
			"set 192.0.2.1/32 10m, 192.0.2.2/32 10m, 192.0.2.32/27 10m, 2001:db8::1/128 10m\nreplace 192.0.2.1/32 10m, 192.0.2.2/32 30m, 192.0.3.0/24 40m",
			"192.0.2.1/32 10m\n192.0.2.2/32 30m\n192.0.3.0/24 40m"},
		{"replace by nothing", "set 192.0.2.1/32 10m, 192.0.2.32/27 10m\nreplace", ""},
		{"replace, then go on", "replace 192.0.2.0/26 10m\nset 192.0.2.0/26 20m, 192.0.2.0/25 5m\nunset 192.0.2.0/26", "192.0.2.0/25 5m"},
		{"ensure keeps", "set 192.0.2.1/32 10m, 192.0.2.0/25 5m\nensure\nensure", "192.0.2.0/25 5m\n192.0.2.1/32 10m"},
	}
	onEach(t, func(t *testing.T, b backend) {
		fw, _ := b.open(t, Options{Ports: []uint16{25, 465, 587}})
		caps, err := fw.Probe(t.Context())
		if err != nil || caps.Real != b.real || !caps.Readback || !caps.Expiry || !caps.Prefixes || !caps.IPv6 {
			t.Fatalf("capabilities %+v, %v", caps, err)
		}
		changed, err := fw.Ensure(t.Context())
		if err != nil || changed != (b.real && !b.bare) {
			t.Fatalf("first Ensure: changed %v, %v", changed, err)
		}
		for _, tc := range cases {
			t.Run(tc.name, func(t *testing.T) {
				script, want := tc.script, tc.want
				if caps.MaxTimeout > 0 && caps.MaxTimeout < 525600*time.Minute {
					want = strings.ReplaceAll(want, "525600m", fmt.Sprintf("%.0fm", caps.MaxTimeout.Minutes()))
				}
				do(t, fw, "replace")
				script = strings.ReplaceAll(script, "198.51.0.0/13", "198.48.0.0/13")
				do(t, fw, script)
				expect(t, fw, want)
				if changed, err := fw.Ensure(t.Context()); changed || err != nil {
					t.Fatalf("Ensure after our own changes: changed %v, %v", changed, err)
				}
				expect(t, fw, want)
			})
		}
	})
}

func TestContractRunsOut(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		fw, _ := b.open(t, Options{})
		if caps, err := fw.Probe(t.Context()); err != nil || !caps.Timeouts {
			t.Log("the filter ends no entry by itself", err)
			return
		}
		do(t, fw, "ensure\nset 192.0.2.1/32 1ms, 192.0.2.2/32 900ms, 192.0.2.0/27 1s, 2001:db8::/64 1s, 192.0.2.3/32 10m")
		for end := time.Now().Add(20 * time.Second); dump(t, fw) != "192.0.2.3/32 10m"; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("still there:\n%s", dump(t, fw))
			}
		}
		do(t, fw, "set 192.0.2.1/32 10m") // what ran out can come again
		expect(t, fw, "192.0.2.1/32 10m\n192.0.2.3/32 10m")
	})
}

func many(n int) []Entry {
	until := time.Now().Add(time.Hour)
	es := make([]Entry, n)
	for i := range es {
		hi, mid, lo := byte(i>>16), byte(i>>8), byte(i)
		switch i % 4 {
		case 0, 1:
			es[i].Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, hi, mid, lo}), 32)
		case 2:
			es[i].Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{11 + hi, mid, lo, 0}), 24)
		case 3:
			es[i].Prefix = netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, hi, mid, lo}), 64)
		}
		es[i].Until = until
	}
	return es
}

func list(t testing.TB, fw Firewall) map[netip.Prefix]Installed {
	t.Helper()
	m := make(map[netip.Prefix]Installed)
	for e, err := range fw.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := m[e.Prefix]; twice {
			t.Errorf("%v is listed twice", e.Prefix)
		}
		m[e.Prefix] = e
	}
	return m
}

func TestContractManyAtOnce(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		n := b.max(t, 10_001) - 1
		fw, _ := b.open(t, Options{MaxEntries: 12_000})
		do(t, fw, "ensure\nset 203.0.113.0/29 10m")
		batch := Batch{Set: many(n)}
		for range 2 { // the second time all of it is there already
			if res, err := fw.Apply(t.Context(), batch); err != nil || res.Failed != nil {
				t.Fatal(err)
			}
			if got := list(t, fw); len(got) != n+1 {
				t.Fatalf("%d entries", len(got))
			}
		}
		for _, e := range batch.Set[n/20:] {
			batch.Unset = append(batch.Unset, e.Prefix)
		}
		batch.Set = nil
		if _, err := fw.Apply(t.Context(), batch); err != nil {
			t.Fatal(err)
		}
		if got := list(t, fw); len(got) != n/20+1 {
			t.Fatalf("%d entries", len(got))
		}
		if err := fw.Replace(t.Context(), many(n)); err != nil {
			t.Fatal(err)
		}
		got := list(t, fw)
		for _, e := range many(n) {
			if _, ok := got[e.Prefix]; !ok {
				t.Fatalf("%v is missing", e.Prefix)
			}
		}
		if len(got) != n {
			t.Fatalf("%d entries", len(got))
		}
	})
}

func TestContractFull(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		fw, _ := b.open(t, Options{MaxEntries: 3})
		do(t, fw, "ensure")
		// What does not fit is named; the widest are in force, then the longest.
		wants := Batch{Set: []Entry{
			{netip.MustParsePrefix("198.51.100.1/32"), time.Now().Add(10 * time.Minute)},
			{netip.MustParsePrefix("198.51.100.2/32"), time.Now().Add(20 * time.Minute)},
			{netip.MustParsePrefix("198.51.0.0/16"), time.Now().Add(time.Minute)},
			{netip.MustParsePrefix("198.51.100.3/32"), time.Now().Add(15 * time.Minute)},
			{netip.MustParsePrefix("2001:db8::/56"), time.Now().Add(time.Minute)},
		}}
		const fits = "198.51.0.0/16 1m\n198.51.100.2/32 20m\n2001:db8::/56 1m"
		left := func(failed []Failure, err error) {
			t.Helper()
			var got []string
			for _, f := range failed {
				got = append(got, f.Prefix.String())
				if !errors.Is(f.Err, ErrFull) {
					t.Errorf("%v: %v", f.Prefix, f.Err)
				}
			}
			slices.Sort(got)
			if !errors.Is(err, ErrFull) || !slices.Equal(got, []string{"198.51.100.1/32", "198.51.100.3/32"}) {
				t.Fatalf("left out: %v, %v", got, err)
			}
		}
		var part *PartialError
		if err := fw.Replace(t.Context(), wants.Set); !errors.As(err, &part) {
			t.Fatal(err)
		}
		left(part.Failed, part)
		expect(t, fw, fits)
		do(t, fw, "replace")
		wants.Unset = []netip.Prefix{netip.MustParsePrefix("203.0.113.1/32")}
		do(t, fw, "set 203.0.113.1/32 10m")
		over, err := fw.Apply(t.Context(), wants)
		left(over.Failed, err)
		expect(t, fw, fits)

		do(t, fw, "replace\nset 192.0.2.1/32 10m, 192.0.2.0/24 10m\nset 192.0.2.2/32 1s")
		late := Batch{Set: []Entry{{netip.MustParsePrefix("192.0.2.4/32"), time.Now().Add(time.Hour)}}}
		res, err := fw.Apply(t.Context(), late)
		if !errors.Is(err, ErrFull) || len(res.Failed) != 1 || !errors.Is(res.Failed[0].Err, ErrFull) {
			t.Fatalf("%v, %v", res, err)
		}
		do(t, fw, "set 192.0.2.1/32 20m, 192.0.2.0/24 20m") // present: takes no room
		do(t, fw, "unset 192.0.2.0/24\nset 192.0.2.3/32 10m")
		for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) { // until the short one is gone
			res, err := fw.Apply(t.Context(), late)
			if err == nil {
				break
			}
			if !errors.Is(err, ErrFull) || time.Now().After(end) {
				t.Fatal(res, err)
			}
		}
		do(t, fw, "unset 192.0.2.2/32") // a filter without timeouts may have it still
		expect(t, fw, "192.0.2.1/32 20m\n192.0.2.3/32 10m\n192.0.2.4/32 60m")
	})
}

func TestContractRefusesBadPrefixes(t *testing.T) {
	bad := map[string]netip.Prefix{
		"none":        {},
		"everything":  netip.MustParsePrefix("0.0.0.0/0"),
		"all of IPv6": netip.MustParsePrefix("::/0"),
		"not masked":  netip.MustParsePrefix("192.0.2.7/24"),
		"mapped":      netip.MustParsePrefix("::ffff:192.0.2.7/128"),
	}
	onEach(t, func(t *testing.T, b backend) {
		fw, _ := b.open(t, Options{})
		do(t, fw, "ensure\nset 192.0.2.1/32 10m")
		good := Entry{netip.MustParsePrefix("192.0.2.2/32"), time.Now().Add(time.Hour)}
		for name, p := range bad {
			e := Entry{p, time.Now().Add(time.Hour)}
			if res, err := fw.Apply(t.Context(), Batch{Set: []Entry{good, e}}); err == nil || len(res.Failed) != 1 || res.Failed[0].Prefix != p {
				t.Errorf("set %s: %v, %v", name, res, err)
			}
			if res, err := fw.Apply(t.Context(), Batch{Unset: []netip.Prefix{p}}); err == nil || len(res.Failed) != 1 {
				t.Errorf("unset %s: %v, %v", name, res, err)
			}
			if err := fw.Replace(t.Context(), []Entry{good, e}); err == nil {
				t.Errorf("replace %s: no error", name)
			}
		}
		both := Batch{Set: []Entry{good}, Unset: []netip.Prefix{good.Prefix}}
		if _, err := fw.Apply(t.Context(), both); err == nil {
			t.Error("set and unset at once: no error")
		}
		expect(t, fw, "192.0.2.1/32 10m")
	})
}

func TestContractCancelled(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		fw, _ := b.open(t, Options{})
		do(t, fw, "ensure\nset 192.0.2.1/32 10m")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		set := []Entry{{netip.MustParsePrefix("192.0.2.2/32"), time.Now().Add(time.Hour)}}
		if res, err := fw.Apply(ctx, Batch{Set: set}); !errors.Is(err, context.Canceled) || len(res.Failed) != 1 {
			t.Errorf("Apply: %v, %v", res, err)
		}
		if err := fw.Replace(ctx, set); !errors.Is(err, context.Canceled) {
			t.Errorf("Replace: %v", err)
		}
		if _, err := fw.Ensure(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("Ensure: %v", err)
		}
		do(t, fw, "ensure\nset 192.0.2.3/32 10m") // and it works again
		expect(t, fw, "192.0.2.1/32 10m\n192.0.2.3/32 10m")
	})
}

func TestContractClose(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		if !b.real {
			t.Log("memory holds nothing beyond the process")
			return
		}
		fw, ns := b.open(t, Options{})
		do(t, fw, "ensure\nreplace 192.0.2.1/32 10m")
		if err := fw.Close(t.Context(), false); err != nil {
			t.Fatal(err)
		}
		next := b.in(t, ns, Options{})
		if changed, err := next.Ensure(t.Context()); err != nil || changed {
			t.Fatalf("changed %v, %v", changed, err)
		}
		expect(t, next, "192.0.2.1/32 10m")
		for range 2 {
			if err := next.Close(t.Context(), true); err != nil {
				t.Fatal(err)
			}
		}
		if b.bare {
			expect(t, next, "")
			return
		}
		for _, err := range next.List(t.Context()) {
			if !errors.Is(err, ErrGone) {
				t.Fatalf("list: %v", err)
			}
		}
		if res, err := next.Apply(t.Context(), Batch{Set: many(2)}); !errors.Is(err, ErrGone) || len(res.Failed) != 2 {
			t.Fatalf("%v, %v", res, err)
		}
	})
}

// TestContractPackets is what it is all for. The server has the addresses .1,
// the client many.
func TestContractPackets(t *testing.T) {
	const (
		refused = 200 * time.Millisecond // what is dropped is sent again, and dropped
		patient = 10 * time.Second
	)
	for _, hook := range []string{"prerouting", "input"} {
		onEach(t, func(t *testing.T, b backend) {
			if !b.real || b.bare {
				t.Log("memory drops no packets, and what csf does is csf's")
				return
			}
			t.Run(hook, func(t *testing.T) {
				fw, server := b.open(t, Options{
					Hook: hook, Ports: []uint16{25, 465},
					Allow: []netip.Prefix{
						netip.MustParsePrefix("10.9.2.5/32"), netip.MustParsePrefix("10.9.2.4/31"), netip.MustParsePrefix("fd09:2::5/128"),
					},
				})
				client := newNetNS(t)
				wire(t, server, client, []string{"10.9.0.1/16", "fd09::1/16"}, []string{
					"10.9.2.2/16", "10.9.2.5/16", "10.9.2.200/16", "10.9.3.2/16",
					"fd09:2::2/16", "fd09:2::5/16", "fd09:3::2/16",
				})
				server.nft(`table inet usual {
					chain input {
						type filter hook input priority filter; policy drop
						ct state established,related accept
						tcp dport { 22, 25 } accept
						meta l4proto ipv6-icmp accept
					}
				}`)
				for _, addr := range []string{"10.9.0.1:25", "10.9.0.1:22", "[fd09::1]:25"} {
					server.echo(addr)
				}
				do(t, fw, "ensure")

				check := func(from, to string, want bool) {
					t.Helper()
					free := "10.9.3.2"
					if strings.Contains(from, ":") {
						free = "fd09:3::2"
					}
					refused, err := client.refused(from, free, to)
					if err != nil || refused == want {
						t.Errorf("%s to %s: refused is %v, %v", from, to, refused, err)
					}
				}
				c0, err := client.dial("10.9.3.2", "10.9.0.1:25", patient)
				if err != nil {
					t.Fatal(err)
				}
				defer c0.Close()
				open := func(from, to string) *struct{ alive func(bool) } {
					t.Helper()
					c, err := client.dial(from, to, patient)
					if err != nil || !echoes(c, patient) {
						t.Fatalf("%s to %s before the block: %v", from, to, err)
					}
					t.Cleanup(func() { c.Close() })
					return &struct{ alive func(bool) }{func(want bool) {
						t.Helper()
						within := refused
						if want {
							within = patient
						}
						if echoes(c, within) != want {
							t.Errorf("established connection of %s to %s: alive is %v", from, to, !want)
						}
						if !want && !echoes(c0, patient) {
							t.Error("the neighbour's is dead too, so nothing is proved")
						}
					}}
				}
				blocked4, blocked6 := open("10.9.2.2", "10.9.0.1:25"), open("fd09:2::2", "[fd09::1]:25")
				allowed4, allowed6 := open("10.9.2.5", "10.9.0.1:25"), open("fd09:2::5", "[fd09::1]:25")
				neighbour := open("10.9.3.2", "10.9.0.1:25")
				otherPort := open("10.9.2.2", "10.9.0.1:22")

				do(t, fw, "set 10.9.2.0/24 10m, fd09:2::/61 10m")
				blocked4.alive(false)
				blocked6.alive(false)
				allowed4.alive(true)
				allowed6.alive(true)
				neighbour.alive(true)
				otherPort.alive(true)
				check("10.9.2.2", "10.9.0.1:25", false)
				check("fd09:2::2", "[fd09::1]:25", false)
				check("10.9.2.5", "10.9.0.1:25", true)
				check("fd09:2::5", "[fd09::1]:25", true)
				check("10.9.3.2", "10.9.0.1:25", true)
				check("fd09:3::2", "[fd09::1]:25", true)
				check("10.9.2.2", "10.9.0.1:22", true)

				got := list(t, fw)[netip.MustParsePrefix("10.9.2.0/24")]
				if caps, _ := fw.Probe(t.Context()); caps.Counters && (got.Packets == 0 || got.Bytes < 40*got.Packets) {
					t.Errorf("counted %d packets, %d bytes", got.Packets, got.Bytes)
				}
				do(t, fw, "unset 10.9.2.0/24\nset 10.9.2.192/27 10m") // a length that had no set
				check("10.9.2.200", "10.9.0.1:25", false)
				check("10.9.2.2", "10.9.0.1:25", true)
				do(t, fw, "replace 10.9.2.2/32 10m")
				check("10.9.2.2", "10.9.0.1:25", false)
				check("10.9.2.200", "10.9.0.1:25", true)
				if err := fw.Close(t.Context(), true); err != nil {
					t.Fatal(err)
				}
				check("10.9.2.2", "10.9.0.1:25", true)
			})
		})
	}
}

// TestContractPacketsRunOut: of nested blocks each ends at its own time, as
// packets see it.
func TestContractPacketsRunOut(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		if !b.real || b.bare {
			t.Log("memory drops no packets, and what csf does is csf's")
			return
		}
		fw, server := b.open(t, Options{Ports: []uint16{25}})
		client := newNetNS(t)
		wire(t, server, client, []string{"10.9.0.1/16", "fd09::1/16"}, []string{
			"10.9.2.2/16", "10.9.2.3/16", "10.9.3.2/16", "fd09:2::2/16", "fd09:2::3/16", "fd09:3::2/16",
		})
		server.echo("10.9.0.1:25")
		server.echo("[fd09::1]:25")
		caps, err := fw.Probe(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		refused := func(from string) bool {
			t.Helper()
			free, to := "10.9.3.2", "10.9.0.1:25"
			if strings.Contains(from, ":") {
				free, to = "fd09:3::2", "[fd09::1]:25"
			}
			ok, err := client.refused(from, free, to)
			if err != nil {
				t.Fatal(err)
			}
			return ok
		}
		all := []string{"10.9.2.2", "10.9.2.3", "fd09:2::2", "fd09:2::3"}
		do(t, fw, "ensure\nset 10.9.2.0/24 1h, fd09:2::/64 1h, 10.9.2.2/32 10m, fd09:2::2/128 10m")
		for _, from := range all {
			if !refused(from) {
				t.Errorf("%s gets through", from)
			}
		}
		// Shortened, so that a slow machine has seen them in force before.
		do(t, fw, "set 10.9.2.0/24 1s, fd09:2::/64 1s")
		for end := time.Now().Add(20 * time.Second); refused(all[1]) || refused(all[3]); time.Sleep(50 * time.Millisecond) {
			if !caps.Timeouts { // the caller ends it
				do(t, fw, "unset 10.9.2.0/24, fd09:2::/64")
			}
			if time.Now().After(end) {
				t.Fatal("the wide blocks do not run out")
			}
		}
		if !refused(all[0]) || !refused(all[2]) {
			t.Error("a block inside has ended with the one around it")
		}
	})
}

func TestContractAllPorts(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		if !b.real || b.bare {
			t.Log("memory drops no packets, and what csf does is csf's")
			return
		}
		fw, server := b.open(t, Options{})
		client := newNetNS(t)
		wire(t, server, client, []string{"10.9.0.1/16"}, []string{"10.9.2.2/16", "10.9.2.3/16"})
		server.echo("10.9.0.1:8080")
		do(t, fw, "ensure\nset 10.9.2.2/32 10m")
		if refused, err := client.refused("10.9.2.2", "10.9.2.3", "10.9.0.1:8080"); err != nil || !refused {
			t.Errorf("a port that is not an SMTP port, with all ports blocked: refused is %v, %v", refused, err)
		}
	})
}

// TestContractCounters: what an entry has stopped is not forgotten when the
// table is made anew, by the next process or for another allowlist.
func TestContractCounters(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		fw, ns := b.open(t, Options{})
		if caps, err := fw.Probe(t.Context()); err != nil || !caps.Counters {
			t.Log("it does not count", err)
			return
		}
		do(t, fw, "ensure\nset 127.0.0.9/32 10m, 127.0.9.0/24 10m, 2001:db8::/64 10m")
		for _, from := range []string{"127.0.0.9", "127.0.9.9"} {
			if c, err := ns.dial(from, "127.0.0.1:25", 100*time.Millisecond); err == nil {
				c.Close()
				t.Fatal("connected")
			}
		}
		check := func(fw Firewall, what string, want map[netip.Prefix]Installed) {
			t.Helper()
			got := list(t, fw)
			for p, w := range want {
				if g := got[p]; g.Packets < w.Packets || g.Bytes < w.Bytes || g.Packets > w.Packets+5 {
					t.Errorf("%s: %v counted %d packets, %d bytes; before %d, %d", what, p, g.Packets, g.Bytes, w.Packets, w.Bytes)
				}
			}
		}
		before := list(t, fw)
		for _, p := range []string{"127.0.0.9/32", "127.0.9.0/24"} {
			if in := before[netip.MustParsePrefix(p)]; in.Packets == 0 || in.Bytes < 40*in.Packets {
				t.Fatalf("%+v", in)
			}
		}
		do(t, fw, "replace 127.0.0.9/32 20m, 127.0.9.0/24 10m, 192.0.2.1/32 10m")
		check(fw, "replace", before)
		next := b.in(t, ns, Options{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}})
		do(t, next, "replace 127.0.0.9/32 20m, 127.0.9.0/24 10m")
		check(next, "another allowlist", before)
		if changed, err := next.Ensure(t.Context()); changed || err != nil {
			t.Errorf("changed %v, %v", changed, err)
		}
		expect(t, next, "127.0.0.9/32 20m\n127.0.9.0/24 10m")
	})
}

// TestContractNoGap: while our rules are made anew, for other settings, from
// another version's, by the next process, no packet of a blocked source gets
// through.
func TestContractNoGap(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		if !b.real || b.bare {
			t.Log("memory drops no packets, and what csf does is csf's")
			return
		}
		fw, server := b.open(t, Options{})
		client := newNetNS(t)
		wire(t, server, client, []string{"10.9.0.1/16"}, []string{"10.9.2.2/16", "10.9.3.2/16"})
		blocked, free := server.flooded(client, "10.9.0.1:9", "10.9.2.2", "10.9.3.2")
		const want = "replace 10.9.2.0/24 10m, 192.0.2.1/32 10m"
		do(t, fw, want)
		more(t, free)
		time.Sleep(20 * time.Millisecond) // what is under way arrives
		for i := range 2 {
			for _, o := range []Options{
				{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}},
				{Hook: "input"},
				{MaxEntries: 50, Hook: "input"},
				{},
			} {
				next, before := b.in(t, server, o), blocked()
				if i%2 == 0 {
					if _, err := next.Ensure(t.Context()); err != nil { // takes over what is there
						t.Fatal(err)
					}
				}
				do(t, next, want)
				if n := blocked() - before; n > inBetween(b.name) {
					t.Fatalf("%d packets of the blocked source got through with %+v", n, o)
				}
			}
		}
		more(t, free)
	})
}

// inBetween is how many packets may get through when a backend's rules are made
// anew: with nftables those few that are between the old chain and the new one
// at the instant at which the kernel turns from the one to the other (each
// processor has one at most; a connection takes three). A gap of a millisecond
// lets dozens through.
func inBetween(backend string) int64 {
	if backend == NFTables {
		return 2 * int64(runtime.NumCPU()) // Ensure, then Replace
	}
	return 0
}

// TestNFTablesOlderVersion: the table of an older version, of whatever layout,
// gives way to ours without a gap.
func TestNFTablesOlderVersion(t *testing.T) {
	fw, server := newNFT(t, Options{})
	client := newNetNS(t)
	wire(t, server, client, []string{"10.9.0.1/16"}, []string{"10.9.2.2/16", "10.9.3.2/16"})
	const old = `table inet smtpguard {
		set blocked { type ipv4_addr; flags interval, timeout; elements = { 10.9.2.0/24 timeout 10m } }
		chain in { type filter hook prerouting priority -310; policy accept; ip saddr @blocked counter drop comment "smtpguard/0 x drop"; }
	}`
	server.nft(old)
	blocked, free := server.flooded(client, "10.9.0.1:9", "10.9.2.2", "10.9.3.2")
	more(t, free)
	for i := range 20 {
		if i > 0 {
			server.nft("delete table inet smtpguard\n" + old)
		}
		before := blocked()
		do(t, fw, "replace 10.9.2.0/24 10m")
		if n := blocked() - before; n > inBetween(NFTables) {
			t.Errorf("%d packets of the blocked source got through", n)
		}
		if got := server.run("nft", "list", "table", "inet", "smtpguard"); strings.Contains(got, "smtpguard/0") {
			t.Fatal(got)
		}
	}
	more(t, free)
}

// TestContractContainers: at prerouting, what is forwarded to a container is
// dropped too, with rules like Docker's for a published port. So nothing has to
// be put into DOCKER-USER.
func TestContractContainers(t *testing.T) {
	onEach(t, func(t *testing.T, b backend) {
		if !b.real || b.bare {
			t.Log("memory drops no packets, and what csf does is csf's")
			return
		}
		fw, server := b.open(t, Options{Ports: []uint16{25}})
		client, container := newNetNS(t), newNetNS(t)
		wire(t, server, client, []string{"10.9.0.1/16"}, []string{"10.9.2.2/16", "10.9.3.2/16"})
		wireAs(t, "docker0", server, container, []string{"172.17.0.1/16"}, []string{"172.17.0.2/16"})
		container.handle(func(h *netlink.Handle) error {
			return h.RouteAdd(&netlink.Route{Gw: net.ParseIP("172.17.0.1")})
		})
		if err := server.do(func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0) }); err != nil {
			cannot(t, "%v", err)
		}
		server.nft(`table ip docker {
			chain DOCKER { type nat hook prerouting priority dstnat; tcp dport 25 dnat to 172.17.0.2:25; }
			chain FORWARD { type filter hook forward priority filter; policy drop; ct state established,related accept; oifname "docker0" accept; }
		}`)
		container.echo("172.17.0.2:25")
		do(t, fw, "ensure")
		reach := func(from string, within time.Duration) bool {
			c, err := client.dial(from, "10.9.0.1:25", within)
			if err == nil {
				defer c.Close()
			}
			return err == nil && echoes(c, within)
		}
		if !reach("10.9.2.2", 10*time.Second) {
			t.Fatal("the container cannot be reached")
		}
		open, err := client.dial("10.9.2.2", "10.9.0.1:25", 10*time.Second)
		if err != nil || !echoes(open, 10*time.Second) {
			t.Fatal(err)
		}
		defer open.Close()
		do(t, fw, "set 10.9.2.0/24 10m")
		if refused, err := client.refused("10.9.2.2", "10.9.3.2", "10.9.0.1:25"); err != nil || !refused {
			t.Errorf("the blocked source reaches the container: refused is %v, %v", refused, err)
		}
		if echoes(open, 200*time.Millisecond) {
			t.Error("its established connection goes on")
		}
		if !reach("10.9.3.2", 10*time.Second) {
			t.Error("others do not")
		}
	})
}
