package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const foreignTables = `
table inet mine {
	set spammers { type ipv4_addr; flags interval; elements = { 192.0.2.0/24 } }
	chain input {
		type filter hook input priority filter; policy accept;
		ct state established,related accept
		ip saddr @spammers drop
	}
}
table ip smtpguard { # our name, but of another family: not ours
	chain x { counter accept; }
}
`

func newNFT(t testing.TB, o Options) (*nft, netNS) {
	t.Helper()
	ns := newNetNS(t)
	return openIn(t, ns, NFTables, o).(*nft), ns
}

// TestNFTablesLayout shows the table as an administrator sees it.
func TestNFTablesLayout(t *testing.T) {
	fw, ns := newNFT(t, Options{
		Ports: []uint16{587, 25, 465, 25}, MaxEntries: 1000,
		Allow: []netip.Prefix{
			netip.MustParsePrefix("192.0.2.128/25"), netip.MustParsePrefix("192.0.2.129/32"),
			netip.MustParsePrefix("192.0.3.0/24"), netip.MustParsePrefix("255.0.0.0/8"), netip.MustParsePrefix("2001:db8::/32"),
		},
	})
	do(t, fw, "ensure\nset 192.0.2.32/27 10m")
	got := ns.run("nft", "--stateless", "list", "table", "inet", "smtpguard")
	got = strings.ReplaceAll(got, " == @", " @") // as older versions of nft write it
	for _, want := range []string{
		"elements = { 25, 465, 587 }",
		"elements = { 192.0.2.128-192.0.3.255, 255.0.0.0/8 }",
		"elements = { 2001:db8::/32 }",
		"type filter hook prerouting priority raw; policy accept;",
		"tcp dport @ports jump block comment \"smtpguard/1 ",
		"ip saddr @allow4 return", "ip6 saddr @allow6 return",
		"ip saddr @b4_32 drop", "ip saddr & 255.255.255.0 @b4_24 drop", "ip saddr & 255.255.255.224 @b4_27 drop",
		"ip6 saddr @b6_128 drop", "ip6 saddr & ffff:ffff:ffff:ffff:: @b6_64 drop",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("%q is not in the table", want)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
}

func TestNFTablesLeavesOthersAlone(t *testing.T) {
	fw, ns := newNFT(t, Options{Ports: []uint16{25}})
	ns.nft(foreignTables)
	before := ns.run("nft", "list", "ruleset")
	do(t, fw, "ensure\nset 192.0.2.0/24 10m, 192.0.2.0/27 10m\nreplace 192.0.2.1/32 10m\nunset 192.0.2.1/32")
	if err := fw.Close(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if after := ns.run("nft", "list", "ruleset"); after != before {
		t.Fatalf("before:\n%s\nafter:\n%s", before, after)
	}
}

// TestNFTablesProbe: not even the generation of the ruleset may change.
func TestNFTablesProbe(t *testing.T) {
	fw, ns := newNFT(t, Options{Ports: []uint16{25}})
	ns.nft(foreignTables)
	before, err := fw.generation(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	caps, err := fw.Probe(t.Context())
	if err != nil || !caps.Real || !caps.Counters || !caps.Timeouts {
		t.Fatalf("%+v, %v", caps, err)
	}
	after, err := fw.generation(t.Context())
	if err != nil || after != before {
		t.Fatalf("generation %d became %d, %v", before, after, err)
	}
	if got := ns.run("nft", "list", "tables"); strings.Contains(got, "probe") {
		t.Fatal(got)
	}
}

// TestNFTablesProbeWithoutRights runs on a thread that gave its rights away.
func TestNFTablesProbeWithoutRights(t *testing.T) {
	ns := newNetNS(t)
	fw, err := NewNFTables(Options{})
	if err != nil {
		t.Fatal(err)
	}
	var probeErr, ensureErr, applyErr error
	err = ns.do(func() error {
		runtime.LockOSThread()
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			return err
		}
		_, probeErr = fw.Probe(context.Background())
		_, ensureErr = fw.Ensure(context.Background())
		_, applyErr = fw.Apply(context.Background(), Batch{Set: many(1)})
		return fw.Close(context.Background(), false)
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, err := range map[string]error{"Probe": probeErr, "Ensure": ensureErr, "Apply": applyErr} {
		if !errors.Is(err, ErrUnavailable) || !errors.Is(err, unix.EPERM) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if !strings.Contains(fmt.Sprint(probeErr), "CAP_NET_ADMIN") {
		t.Errorf("no hint in: %v", probeErr)
	}
}

// TestNFTablesTamper does to our table what other people's programs do.
func TestNFTablesTamper(t *testing.T) {
	const was = "192.0.2.0/27 20m\n192.0.2.1/32 10m"
	cases := []struct{ name, script string }{
		{"flush ruleset", "flush ruleset"},
		{"delete table", "delete table inet smtpguard"},
		{"flush table", "flush table inet smtpguard"},
		{"flush base chain", "flush chain inet smtpguard prerouting"},
		{"flush our chain", "flush chain inet smtpguard block"},
		{"delete base chain", "flush chain inet smtpguard prerouting; delete chain inet smtpguard prerouting"},
		{"delete a set", "flush chain inet smtpguard block; delete set inet smtpguard b4_27"},
		{"a rule of theirs in front", "insert rule inet smtpguard prerouting accept"},
		{"a rule of theirs behind", "add rule inet smtpguard block ip saddr 192.0.2.9 drop"},
		{"a rule of theirs with our tag", `add rule inet smtpguard block accept comment "smtpguard/1 x b4_32"`},
		{"our rules in another order", ""},
		{"our rule replaced, tag kept", ""},
		{"our rule deleted", ""},
		{"a chain of theirs", "add chain inet smtpguard x { type filter hook input priority 0; }"},
		{"a set of theirs", "add set inet smtpguard x { type ipv4_addr; }"},
		{"put to sleep", "add table inet smtpguard { flags dormant; }"},
		{"another table of our name", `delete table inet smtpguard; table inet smtpguard { chain prerouting { type nat hook prerouting priority -100; }; }`},
		{"policy drop", "add chain inet smtpguard prerouting { policy drop; }"},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			fw, ns := newNFT(t, Options{Ports: []uint16{25}, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.5/32")}})
			do(t, fw, "ensure\nset 192.0.2.0/27 20m, 192.0.2.1/32 10m")
			if changed, err := fw.Ensure(t.Context()); changed || err != nil {
				t.Fatal(changed, err)
			}
			script := tc.script
			handle := func(rule string) (handle, text string) {
				for line := range strings.Lines(ns.run("nft", "-a", "list", "chain", "inet", "smtpguard", "block")) {
					if text, h, ok := strings.Cut(strings.TrimSpace(line), " # handle "); ok && strings.Contains(text, rule) {
						return strings.TrimSpace(h), text
					}
				}
				t.Fatalf("no rule %q", rule)
				return "", ""
			}
			switch tc.name {
			case "our rules in another order":
				h, text := handle("@allow4")
				script = "delete rule inet smtpguard block handle " + h + "\nadd rule inet smtpguard block " + text
			case "our rule replaced, tag kept":
				h, text := handle("@b4_32")
				script = "replace rule inet smtpguard block handle " + h + " " + strings.Replace(text, "drop", "accept", 1)
			case "our rule deleted":
				h, _ := handle("@b4_27")
				script = "delete rule inet smtpguard block handle " + h
			}
			ns.nft(script)
			// Somebody else's transaction in between must hide nothing.
			ns.nft("add table inet other; delete table inet other")

			changed, err := fw.Ensure(t.Context())
			if err != nil || !changed {
				t.Fatalf("Ensure: changed %v, %v", changed, err)
			}
			if changed, err := fw.Ensure(t.Context()); err != nil || changed {
				t.Fatalf("second Ensure: changed %v, %v", changed, err)
			}
			expect(t, fw, was) // restored from what we remember, already before Replace
			do(t, fw, "replace 192.0.2.0/27 20m, 192.0.2.1/32 10m")
			expect(t, fw, was)
			got := ns.run("nft", "list", "table", "inet", "smtpguard")
			if strings.Contains(got, "dormant") || strings.Contains(got, "accept comment") || strings.Contains(got, "set x") {
				t.Fatal(got)
			}
		})
	}
}

// TestNFTablesGone: changes to a table that is gone fail, all of them, and say
// so; Replace repairs by itself.
func TestNFTablesGone(t *testing.T) {
	fw, ns := newNFT(t, Options{})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m")
	ns.nft("flush ruleset")
	for _, b := range []Batch{{Set: many(8)}, {Unset: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}}, {Set: []Entry{{netip.MustParsePrefix("192.0.2.0/31"), time.Now().Add(time.Hour)}}}} {
		res, err := fw.Apply(t.Context(), b)
		if !errors.Is(err, ErrGone) || len(res.Failed) != len(b.Set)+len(b.Unset) {
			t.Fatalf("%v, %v", res, err)
		}
	}
	do(t, fw, "replace 192.0.2.1/32 10m")
	expect(t, fw, "192.0.2.1/32 10m")
}

// TestNFTablesOtherLayout: a table of other settings, or of an older version,
// is replaced, and its entries stay.
func TestNFTablesOtherLayout(t *testing.T) {
	fw, ns := newNFT(t, Options{Ports: []uint16{25}})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m, 2001:db8::/61 20m")
	for _, o := range []Options{
		{Ports: []uint16{25, 587}},
		{Ports: []uint16{25, 587}, Hook: "input"},
		{Hook: "input"},
		{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}},
		{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}, MaxEntries: 50},
	} {
		next := openIn(t, ns, NFTables, o)
		if changed, err := next.Ensure(t.Context()); err != nil || !changed {
			t.Fatalf("%+v: changed %v, %v", o, changed, err)
		}
		expect(t, next, "192.0.2.1/32 10m\n2001:db8::/61 20m")
		if changed, err := fw.Ensure(t.Context()); err != nil || !changed {
			t.Fatalf("the first one does not notice: changed %v, %v", changed, err)
		}
	}
}

// TestNFTablesRestored: an administrator saves the ruleset and loads it at
// boot. The layout is recognised.
func TestNFTablesRestored(t *testing.T) {
	fw, ns := newNFT(t, Options{Ports: []uint16{25}, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32"), netip.MustParsePrefix("2001:db8::9/128")}})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m, 2001:db8::/61 20m")
	saved := ns.run("nft", "list", "ruleset")
	ns.nft("flush ruleset")
	ns.nft(saved)
	next := openIn(t, ns, NFTables, fw.o)
	if changed, err := next.Ensure(t.Context()); err != nil || changed {
		t.Fatalf("changed %v, %v\n%s", changed, err, saved)
	}
	do(t, next, "set 192.0.2.1/32 30m, 192.0.2.2/32 10m")
	expect(t, next, "192.0.2.1/32 30m\n192.0.2.2/32 10m\n2001:db8::/61 20m")
}

// TestNFTablesEnsureIsCheap: after our own changes it asks for the generation
// only.
func TestNFTablesEnsureIsCheap(t *testing.T) {
	fw, ns := newNFT(t, Options{})
	do(t, fw, "ensure")
	known := func() bool {
		t.Helper()
		gen, err := fw.generation(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return fw.gen == gen
	}
	for _, script := range []string{"set 192.0.2.1/32 10m", "unset 192.0.2.1/32", "unset 192.0.2.1/32", "replace 192.0.2.0/24 10m", "set 192.0.2.0/24 20m, 192.0.2.1/32"} {
		do(t, fw, script)
		if !known() {
			t.Errorf("after %s Ensure would read everything", script)
		}
	}
	do(t, fw, "set 192.0.2.0/27 10m") // a new set and rule: look once
	do(t, fw, "ensure")
	ns.nft("add table ip foreign")
	if known() {
		t.Error("a foreign change went unnoticed")
	}
	do(t, fw, "set 192.0.2.1/32 10m") // must not hide it
	if known() {
		t.Error("our change hides a foreign one")
	}
	if changed, err := fw.Ensure(t.Context()); changed || err != nil || !known() {
		t.Errorf("changed %v, %v", changed, err)
	}
}

// TestNFTablesWatch: others' changes to our table are told with their names,
// ours and those to other tables are not.
func TestNFTablesWatch(t *testing.T) {
	fw, ns := newNFT(t, Options{})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m")
	path, err := exec.LookPath("nft")
	if err != nil {
		cannot(t, "nft is not installed")
	}
	// The kernel tells a process by the name under which it was started.
	dir := t.TempDir()
	as := func(name, script string) {
		t.Helper()
		link := filepath.Join(dir, name)
		if err := os.Symlink(path, link); err != nil && !errors.Is(err, os.ErrExist) {
			t.Fatal(err)
		}
		ns.pipe(script, link, "-f", "-")
	}
	ctx, cancel := context.WithCancel(t.Context())
	by, done := make(chan string, 1000), make(chan error, 1)
	go func() { done <- fw.Watch(ctx, func(who string) { by <- who }) }()
	defer func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Watch: %v", err)
			}
		case <-time.After(10 * time.Second):
			t.Error("Watch does not end")
		}
	}()
	// next waits for the notice of a change made under a name. Notices come in
	// order; before it only late ones of the first change may come.
	next := func(name string) {
		t.Helper()
		for timeout := time.After(10 * time.Second); ; {
			select {
			case who := <-by:
				if strings.HasPrefix(who, name+" (pid ") {
					return
				}
				if !strings.HasPrefix(who, "first (pid ") {
					t.Errorf("told of a change by %q", who)
				}
			case <-timeout:
				t.Fatalf("not told of the change by %s", name)
			}
		}
	}
	ensure := func(want bool) {
		t.Helper()
		if changed, err := fw.Ensure(t.Context()); changed != want || err != nil {
			t.Errorf("Ensure: changed %v, %v; want %v", changed, err, want)
		}
	}
	// Somebody's change, again until the watch has begun.
	for deadline := time.Now().Add(10 * time.Second); len(by) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("not told of anything")
		}
		as("first", "add set inet smtpguard x { type ipv4_addr; }; delete set inet smtpguard x")
	}

	do(t, fw, "ensure\nset 192.0.2.2/32 10m\nreplace 192.0.2.1/32 10m, 192.0.2.2/32 10m\nset 192.0.2.0/27 10m")
	fw.closeWrite() // the next change comes from another port
	do(t, fw, "set 192.0.2.3/32 10m, 192.0.2.0/27")
	as("foreign", "table ip other { chain x { counter accept; }; }; delete table ip other")
	as("foreign", "table ip smtpguard { chain x { counter accept; }; }; delete table ip smtpguard")
	ensure(false)

	as("deleter", "delete element inet smtpguard b4_32 { 192.0.2.2 }")
	next("deleter")
	ensure(true) // the layout is as it was, but an entry is missing
	ensure(false)
	do(t, fw, "replace 192.0.2.1/32 10m")
	as("flusher", "flush ruleset")
	next("flusher")
	ensure(true)
	do(t, fw, "replace 192.0.2.1/32 10m")
	ensure(false)

	// Lost notices: the entries are compared.
	fw.events.lost.Store(true)
	ensure(false)
	as("emptier", "flush set inet smtpguard b4_32")
	next("emptier")
	fw.events.tampered.Store(false)
	fw.events.lost.Store(true)
	ensure(true)
}

func TestCulprit(t *testing.T) {
	gen := func(pid uint32, name string) []byte {
		b := []byte{8, 0, byte(unix.NFTA_GEN_PROC_PID), 0, byte(pid >> 24), byte(pid >> 16), byte(pid >> 8), byte(pid)}
		name += "\x00"
		b = append(b, byte(4+len(name)), 0, byte(unix.NFTA_GEN_PROC_NAME), 0)
		b = append(b, name...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
		return b
	}
	for _, tc := range []struct {
		data []byte
		want string
	}{
		{gen(4711, "nft"), "nft (pid 4711)"},
		{gen(1, "iptables-restor"), "iptables-restor (pid 1)"},
		{gen(7, "a\nb\x1b[31m"), `"a\nb\x1b[31m" (pid 7)`},
		{gen(7, ""), "somebody"},
		{nil, "somebody"},
		{[]byte{1, 2, 3}, "somebody"},
		{[]byte{200, 0, 1, 0}, "somebody"},
		{[]byte{5, 0, byte(unix.NFTA_GEN_PROC_PID), 0, 1, 0, 0, 0}, "somebody"},
	} {
		if got := culprit(tc.data); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.data, got, tc.want)
		}
	}
}

// TestNFTablesSmallSocket: where the socket cannot be made big enough (a user
// namespace) it takes several transactions.
func TestNFTablesSmallSocket(t *testing.T) {
	fw, _ := newNFT(t, Options{})
	if err := fw.open(); err != nil {
		t.Fatal(err)
	}
	if err := fw.writeNL.SetWriteBuffer(106_496); err != nil { // half the usual limit
		t.Fatal(err)
	}
	fw.budget = 212_992
	if fw.layoutBytes()+fw.book.max*nftUpsertBytes <= fw.budget {
		t.Error("a transaction of all entries would fit")
	}
	es := many(5_000)
	for range 2 {
		if err := fw.Replace(t.Context(), es); err != nil {
			t.Fatal(err)
		}
		if got := list(t, fw); len(got) != len(es) {
			t.Fatalf("%d entries", len(got))
		}
	}
	if _, err := fw.Apply(t.Context(), Batch{Set: many(6_000)}); err != nil {
		t.Fatal(err)
	}
	if got := list(t, fw); len(got) != 6_000 {
		t.Fatalf("%d entries", len(got))
	}
}

// TestNFTablesTimeout: an exchange that takes too long leaves things unknown,
// and the next one works.
func TestNFTablesTimeout(t *testing.T) {
	fw, _ := newNFT(t, Options{})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m")
	usual := fw.o.Timeout
	fw.o.Timeout = -time.Hour
	if _, err := fw.Ensure(t.Context()); !errors.Is(err, ErrUnknown) {
		t.Errorf("Ensure: %v", err)
	}
	res, err := fw.Apply(t.Context(), Batch{Set: many(3)})
	if !errors.Is(err, ErrUnknown) || len(res.Failed) != 3 {
		t.Errorf("Apply: %v, %v", res, err)
	}
	if err := fw.Replace(t.Context(), many(3)); !errors.Is(err, ErrUnknown) {
		t.Errorf("Replace: %v", err)
	}
	fw.o.Timeout = usual
	do(t, fw, "replace 192.0.2.2/32 10m\nset 192.0.2.3/32 10m")
	expect(t, fw, "192.0.2.2/32 10m\n192.0.2.3/32 10m")
}

func TestMergeRanges(t *testing.T) {
	for _, tc := range []struct{ prefixes, v4, v6 string }{
		{"", "", ""},
		{"192.0.2.0/24 192.0.2.0/24 192.0.2.7/32", "192.0.2.0-192.0.2.255", ""},
		{"192.0.3.0/24 192.0.2.0/24", "192.0.2.0-192.0.3.255", ""},
		{"192.0.2.0/32 192.0.2.2/32", "192.0.2.0-192.0.2.0 192.0.2.2-192.0.2.2", ""},
		{"10.0.0.0/8 10.1.0.0/16 11.0.0.0/8 13.0.0.0/8", "10.0.0.0-11.255.255.255 13.0.0.0-13.255.255.255", ""},
		{"255.255.255.255/32 128.0.0.0/1 0.0.0.0/0", "0.0.0.0-255.255.255.255", ""},
		{"255.255.255.254/31 255.255.255.255/32", "255.255.255.254-255.255.255.255", ""},
		{"192.0.2.7/24", "192.0.2.0-192.0.2.255", ""},
		{"::ffff:192.0.2.0/120 ::ffff:0.0.0.0/64 2001:db8::/32 2001:db8:1::/48", "192.0.2.0-192.0.2.255", "2001:db8::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff"},
		{"::/0 1::/16", "", "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"},
	} {
		var ps []netip.Prefix
		for f := range strings.FieldsSeq(tc.prefixes) {
			ps = append(ps, netip.MustParsePrefix(f))
		}
		ps = append(ps, netip.Prefix{})
		for _, v6 := range []bool{false, true} {
			var got []string
			for _, r := range mergeRanges(ps, v6) {
				got = append(got, r.first.String()+"-"+r.last.String())
			}
			want := map[bool]string{false: tc.v4, true: tc.v6}[v6]
			if strings.Join(got, " ") != want {
				t.Errorf("%s: %v, want %s", tc.prefixes, got, want)
			}
		}
	}
}

// TestNFTablesManyAllowed: as many as a list of big senders may have, with all
// the ways in which they can touch.
func TestNFTablesManyAllowed(t *testing.T) {
	var allow []netip.Prefix
	for _, e := range many(4_000) {
		allow = append(allow, e.Prefix)
	}
	allow = append(allow, netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("255.255.255.255/32"), netip.MustParsePrefix("ffff::/16"), netip.MustParsePrefix("2001:db8::/48"))
	fw, ns := newNFT(t, Options{Allow: allow})
	do(t, fw, "ensure\nset 192.0.2.1/32 10m")
	for addr, want := range map[string]bool{
		"0.1.2.3": true, "255.255.255.255": true, "255.255.255.254": false, "10.0.0.4": true, "10.0.0.2": false, "9.255.255.255": false, "11.0.2.77": true, "192.0.2.1": false,
	} {
		var err error
		_ = ns.do(func() error {
			err = exec.Command("nft", "get", "element", "inet", "smtpguard", "allow4", "{ "+addr+" }").Run()
			return nil
		})
		if (err == nil) != want {
			t.Errorf("%s is allowed: %v, want %v", addr, err == nil, want)
		}
	}
}

// TestLengthNames: names are read back as they were made, and nothing else is.
func TestLengthNames(t *testing.T) {
	for _, l := range []length{{false, 1}, {false, 32}, {true, 1}, {true, 128}, {true, 61}} {
		if got, ok := lengthFromSet(l.set()); !ok || got != l || len(l.set()) > 15 {
			t.Errorf("%v: %v, %v", l, got, ok)
		}
	}
	for _, name := range []string{"", "b4", "b4_", "b4_0", "b4_33", "b6_129", "b4_032", "b4_+3", "b5_3", "b4_-1", "allow4", "b4_3_2", "b6_99999999999999999999"} {
		if l, ok := lengthFromSet(name); ok {
			t.Errorf("%q: %v", name, l)
		}
	}
}

// BenchmarkInsert is one block, from the call to the kernel's answer, with
// entries in force already.
func BenchmarkInsert(b *testing.B) {
	for _, n := range []int{0, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ns := newNetNS(b)
			fw := openIn(b, ns, NFTables, Options{MaxEntries: 20_000_000, Ports: []uint16{25, 465, 587}})
			if err := fw.Replace(b.Context(), many(n)); err != nil {
				b.Fatal(err)
			}
			var times []time.Duration
			until := time.Now().Add(time.Hour)
			for i := 0; b.Loop(); i++ {
				p := netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
				start := time.Now()
				if _, err := fw.Apply(b.Context(), Batch{Set: []Entry{{p, until}}}); err != nil {
					b.Fatal(err)
				}
				times = append(times, time.Since(start))
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Microseconds()), "p50-µs")
			b.ReportMetric(float64(times[len(times)*99/100].Microseconds()), "p99-µs")
		})
	}
}

func BenchmarkReplace(b *testing.B) {
	for _, n := range []int{1, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			fw := openIn(b, newNetNS(b), NFTables, Options{MaxEntries: n, Ports: []uint16{25, 465, 587}})
			es := many(n)
			for b.Loop() {
				if err := fw.Replace(b.Context(), es); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkNftCommand is the measure for BenchmarkReplace: nft -f of the same.
func BenchmarkNftCommand(b *testing.B) {
	for _, n := range []int{1, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ns := newNetNS(b)
			var text strings.Builder
			text.WriteString("add table inet x; delete table inet x; add table inet x\n")
			sets := make(map[string][]string)
			for _, e := range many(n) {
				set := lengthOf(e.Prefix).set()
				sets[set] = append(sets[set], e.Prefix.Addr().String()+" timeout 1h")
			}
			for set, elems := range sets {
				typ := map[bool]string{true: "ipv6_addr", false: "ipv4_addr"}[strings.HasPrefix(set, "b6")]
				fmt.Fprintf(&text, "add set inet x %s { type %s; flags timeout; counter; }\nadd element inet x %s { %s }\n", set, typ, set, strings.Join(elems, ", "))
			}
			for b.Loop() {
				ns.nft(text.String())
			}
		})
	}
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			fw := openIn(b, newNetNS(b), NFTables, Options{MaxEntries: n})
			if err := fw.Replace(b.Context(), many(n)); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if got := list(b, fw); len(got) != n {
					b.Fatal(len(got))
				}
			}
		})
	}
}

func BenchmarkEnsure(b *testing.B) {
	fw := openIn(b, newNetNS(b), NFTables, Options{})
	for b.Loop() {
		if _, err := fw.Ensure(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
