package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// xtBackends are the variants of iptables, with ipset and without.
var xtBackends = []backend{
	{"iptables-nft", true, false, xtOpener(xtNFT, false)},
	{"iptables-legacy", true, false, xtOpener(xtLegacy, false)},
	{"iptables-nft without ipset", true, false, xtOpener(xtNFT, true)},
	{"iptables-legacy without ipset", true, false, xtOpener(xtLegacy, true)},
}

func xtOpener(variant string, noSets bool) func(testing.TB, netNS, Options) Firewall {
	return func(t testing.TB, ns netNS, o Options) Firewall { return newXtIn(t, ns, variant, noSets, o) }
}

func newXtIn(t testing.TB, ns netNS, variant string, noSets bool, o Options) *xt {
	t.Helper()
	o.NetNS = ns.fd
	fw, err := newXt(o, "iptables-"+variant, "ip6tables-"+variant, noSets)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, fw)
	caps, err := fw.Probe(t.Context())
	if errors.Is(err, ErrUnavailable) {
		cannot(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if caps.Timeouts == noSets {
		cannot(t, "this kernel has no ipset: %s", fw.why)
	}
	return fw
}

// onEachXt runs a test on each variant, with ipset and without.
func onEachXt(t *testing.T, o Options, f func(t *testing.T, fw *xt, ns netNS)) {
	for _, variant := range []string{xtNFT, xtLegacy} {
		for _, noSets := range []bool{false, true} {
			name := variant
			if noSets {
				name += " without ipset"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				ns := newNetNS(t)
				f(t, newXtIn(t, ns, variant, noSets, o), ns)
			})
		}
	}
}

// command is iptables, or another command of that family, of fw's variant.
func (x *xt) command(suffix string) string { return x.commands[0] + suffix }

// TestIPTablesLayout shows what an administrator sees.
func TestIPTablesLayout(t *testing.T) {
	o := Options{
		Ports: []uint16{587, 25, 465, 25}, MaxEntries: 100,
		Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32"), netip.MustParsePrefix("::ffff:198.51.100.0/120"), netip.MustParsePrefix("203.0.113.9/32")},
	}
	onEachXt(t, o, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.0/24 10m, 2001:db8::/61 20m")
		tag := func(name string) string {
			return `-m comment --comment "smtpguard/1 ` + fw.layout.digest + " " + name + `" `
		}
		const ports = "-p tcp -m multiport --dports 25,465,587 "
		until := func(p string) string {
			return tag(fmt.Sprint("until ", list(t, fw)[netip.MustParsePrefix(p)].Until.Unix()))
		}
		want4 := []string{
			"-A PREROUTING " + tag("jump") + "-j SMTPGUARD",
			"-A SMTPGUARD -m set --match-set smtpguard-allow4 src " + tag("allow") + "-j RETURN",
			"-A SMTPGUARD " + ports + "-m set --match-set smtpguard4 src " + tag("drop") + "-j DROP",
		}
		want6 := []string{
			want4[0],
			"-A SMTPGUARD " + ports + "-m set --match-set smtpguard6 src " + tag("drop") + "-j DROP",
		}
		if fw.noSets {
			want4 = []string{want4[0], // 198.51.100.0/24 has nothing to do with the entry
				"-A SMTPGUARD -s 192.0.2.9/32 " + tag("allow") + "-j RETURN",
				"-A SMTPGUARD -s 192.0.2.0/24 " + ports + until("192.0.2.0/24") + "-j DROP",
			}
			want6 = []string{want6[0], "-A SMTPGUARD -s 2001:db8::/61 " + ports + until("2001:db8::/61") + "-j DROP"}
		}
		for i, want := range [][]string{want4, want6} {
			var got []string
			for line := range strings.Lines(ns.run(fw.commands[i]+"-save", "-t", "raw")) {
				if strings.HasPrefix(line, "-A ") {
					got = append(got, strings.TrimSpace(line))
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("%s:\n%s\nwant\n%s", fw.commands[i], strings.Join(got, "\n"), strings.Join(want, "\n"))
			}
		}
		if !fw.noSets {
			got := ns.run("ipset", "list", "smtpguard4")
			for _, want := range []string{"Type: hash:net\n", "family inet ", "maxelem 4296 ", "timeout 0", "counters", "References: 1\n", "192.0.2.0/24 timeout "} {
				if !strings.Contains(got, want) {
					t.Errorf("%q is not in\n%s", want, got)
				}
			}
			if got := ns.run("ipset", "list", "-name"); got != "smtpguard4\nsmtpguard-allow4\nsmtpguard6\n" {
				t.Errorf("sets: %q", got)
			}
		}
	})
}

// TestIPTablesManyPorts: multiport takes 15.
func TestIPTablesManyPorts(t *testing.T) {
	var o Options
	for p := range uint16(40) {
		o.Ports = append(o.Ports, 1000+p)
	}
	onEachXt(t, o, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.1/32 10m, 192.0.2.2/32 10m")
		expect(t, fw, "192.0.2.1/32 10m\n192.0.2.2/32 10m")
		want := 3
		if fw.noSets {
			want = 6
		}
		if got := strings.Count(ns.run(fw.command(""), "-t", "raw", "-S", xtChain), "-j DROP"); got != want {
			t.Errorf("%d rules, want %d", got, want)
		}
		caps, err := fw.Probe(t.Context())
		if err != nil || fw.noSets && caps.MaxEntries != xtRulesMax/3 {
			t.Errorf("%+v, %v", caps, err)
		}
		if got := strings.Join(fw.Warnings(), "\n"); fw.noSets != strings.Contains(got, "166 blocks at most") {
			t.Errorf("warnings: %q", got)
		}
	})
}

const foreignRules = `*raw
:THEIRS - [0:0]
-A PREROUTING -j THEIRS
-A THEIRS -s 198.51.100.1/32 -j ACCEPT
COMMIT
*filter
:INPUT DROP [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
`

// withoutHeads is the output of iptables-save without its times and counters.
func withoutHeads(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if !strings.HasPrefix(line, "#") {
			line, _, _ = strings.Cut(line, "[")
			b.WriteString(strings.TrimSpace(line) + "\n")
		}
	}
	return b.String()
}

func TestIPTablesLeavesOthersAlone(t *testing.T) {
	for _, hook := range []string{"prerouting", "input"} {
		onEachXt(t, Options{Hook: hook, Ports: []uint16{25}, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}}, func(t *testing.T, fw *xt, ns netNS) {
			for i, rules := range []string{foreignRules, strings.ReplaceAll(foreignRules, "198.51.100.1/32", "2001:db8::1/128")} {
				ns.pipe(rules, fw.commands[i]+"-restore")
			}
			ns.pipe("create theirs hash:ip\nadd theirs 192.0.2.1\ncreate smtpguard hash:ip\n", "ipset", "restore")
			all := func() string {
				return withoutHeads(ns.run(fw.command("-save"))+ns.run(fw.commands[1]+"-save")) + ns.run("ipset", "save")
			}
			before := all()
			do(t, fw, "ensure\nset 192.0.2.0/24 10m, 192.0.2.0/27 10m, 2001:db8::1/128 10m\nreplace 192.0.2.1/32 10m\nunset 192.0.2.1/32")
			if all() == before {
				t.Fatal("nothing was done")
			}
			if err := fw.Close(t.Context(), true); err != nil {
				t.Fatal(err)
			}
			if after := all(); after != before {
				t.Fatalf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

// TestIPTablesProbe changes nothing.
func TestIPTablesProbe(t *testing.T) {
	onEachXt(t, Options{Ports: []uint16{25}}, func(t *testing.T, fw *xt, ns netNS) {
		ns.pipe(foreignRules, fw.command("-restore"))
		all := func() string { return withoutHeads(ns.run(fw.command("-save"))) + ns.run("ipset", "save") }
		before := all()
		caps, err := fw.Probe(t.Context())
		if err != nil || !caps.Real || caps.Timeouts == fw.noSets || !caps.Counters {
			t.Fatalf("%+v, %v", caps, err)
		}
		if after := all(); after != before {
			t.Fatalf("before:\n%s\nafter:\n%s", before, after)
		}
	})
}

// TestIPTablesTamper does to our rules and sets what other people's programs
// do: each of it is noticed by Ensure and mended, from what we remember.
func TestIPTablesTamper(t *testing.T) {
	const was = "192.0.2.0/27 20m\n192.0.2.1/32 10m\n2001:db8::1/128 10m"
	cases := []struct {
		name, sh string
		only     string // "nft": only of that variant; "sets": only with ipset
	}{
		{"iptables -F", "iptables -t raw -F", ""},
		{"iptables -F -X", "iptables -t raw -F; iptables -t raw -X", ""},
		{"ip6tables -F", "ip6tables -t raw -F", ""},
		{"iptables-restore", "printf '*raw\\nCOMMIT\\n*filter\\nCOMMIT\\n' | iptables-restore", ""},
		{"nft flush ruleset", "nft flush ruleset", "nft"},
		{"our chain flushed", "iptables -t raw -F SMTPGUARD", ""},
		{"jump gone", "iptables -t raw -D PREROUTING 1", ""},
		{"jump not first", "iptables -t raw -I PREROUTING -p tcp -j ACCEPT", ""},
		{"jump twice", "iptables -t raw -A PREROUTING -j SMTPGUARD", ""},
		{"rule gone", "iptables -t raw -D SMTPGUARD 1", ""},
		{"a rule of theirs in front", "iptables -t raw -I SMTPGUARD -j RETURN", ""},
		{"a rule of theirs behind", "iptables -t raw -A SMTPGUARD -s 192.0.2.77 -j DROP", ""},
		{"our rule replaced, tag kept", `iptables -t raw -S SMTPGUARD | sed -n 's/^-A SMTPGUARD .*\(-m comment.*\)$/-R SMTPGUARD 1 -s 192.0.2.99 \1/p' | head -1 | xargs iptables -t raw`, ""},
		{"ipset flush", "ipset flush", "sets"},
		{"one set flushed", "ipset flush smtpguard6", "sets"},
		{"an entry gone", "ipset del smtpguard4 192.0.2.0/27", "sets"},
		{"allow set emptied", "ipset flush smtpguard-allow4", "sets"},
		{"allow set filled", "ipset add smtpguard-allow4 192.0.2.0/24", "sets"},
		{"rules flushed and sets destroyed", "iptables -t raw -F; iptables -t raw -X; ip6tables -t raw -F; ip6tables -t raw -X; ipset destroy", "sets"},
		{"a set of another type", "iptables -t raw -F; ipset destroy smtpguard4; ipset create smtpguard4 hash:ip", "sets"},
		{"a set of other settings", "iptables -t raw -F; ipset destroy smtpguard4; ipset create smtpguard4 hash:net", "sets"},
	}
	o := Options{Ports: []uint16{25}, Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.5/32")}}
	onEachXt(t, o, func(t *testing.T, fw *xt, ns netNS) {
		for _, tc := range cases {
			if tc.only == "nft" && fw.families[0].variant != xtNFT || tc.only == "sets" && fw.noSets {
				continue
			}
			t.Run(tc.name, func(t *testing.T) {
				ns := netNS{t, ns.fd}
				do(t, fw, "replace 192.0.2.0/27 20m, 192.0.2.1/32 10m\nset 2001:db8::1/128 10m")
				if changed, err := fw.Ensure(t.Context()); changed || err != nil {
					t.Fatal(changed, err)
				}
				tamper(fw, ns, tc.sh)
				changed, err := fw.Ensure(t.Context())
				if err != nil || !changed {
					t.Fatalf("Ensure: changed %v, %v", changed, err)
				}
				if changed, err := fw.Ensure(t.Context()); err != nil || changed {
					t.Fatalf("second Ensure: changed %v, %v", changed, err)
				}
				expect(t, fw, was) // restored from what we remember, already before Replace
				rules := ns.run(fw.command(""), "-t", "raw", "-S")
				if strings.Contains(rules, "192.0.2.99") || strings.Contains(rules, "192.0.2.77") || strings.Count(rules, "-j SMTPGUARD") != 1 {
					t.Fatal(rules)
				}
			})
		}
	})
}

// tamper runs a shell script with the commands of fw's variant.
func tamper(fw *xt, ns netNS, script string) {
	ns.t.Helper()
	ns.run("sh", "-ec", iptablesCommand.ReplaceAllString(script, "${1}-"+fw.families[0].variant+"$2"))
}

var iptablesCommand = regexp.MustCompile(`\b(ip6?tables)(-restore)?\b`)

// TestIPTablesSurvives: what touches nothing of ours is no alarm.
func TestIPTablesSurvives(t *testing.T) {
	const was = "192.0.2.0/27 20m\n192.0.2.1/32 10m"
	cases := []struct{ name, sh string }{
		{"iptables-restore -n", "printf '*filter\\n-A INPUT -p tcp --dport 22 -j ACCEPT\\nCOMMIT\\n*raw\\n-A PREROUTING -s 192.0.2.66 -j ACCEPT\\nCOMMIT\\n' | iptables-restore -n"},
		{"a rule behind ours", "iptables -t raw -A PREROUTING -p tcp -j ACCEPT"},
		{"ipset destroy", "ipset create x hash:ip; ipset destroy smtpguard4 || ipset destroy x"},
		{"filter flushed", "iptables -F; iptables -X"},
		{"foreign sets", "ipset create other hash:net; ipset add other 192.0.2.0/24"},
	}
	onEachXt(t, Options{}, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.0/27 20m, 192.0.2.1/32 10m")
		for _, tc := range cases {
			tamper(fw, ns, tc.sh)
			if changed, err := fw.Ensure(t.Context()); err != nil || changed {
				t.Fatalf("%s: changed %v, %v", tc.name, changed, err)
			}
			expect(t, fw, was)
		}
	})
}

// TestIPTablesGone: a change of what is gone fails and says so.
func TestIPTablesGone(t *testing.T) {
	onEachXt(t, Options{}, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.1/32 10m")
		if fw.noSets {
			tamper(fw, ns, "iptables -t raw -F; iptables -t raw -X")
		} else {
			tamper(fw, ns, "iptables -t raw -F; ipset destroy smtpguard4")
		}
		for _, b := range []Batch{{Set: many(2)}, {Unset: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}}} {
			res, err := fw.Apply(t.Context(), b)
			if !errors.Is(err, ErrGone) || len(res.Failed) != len(b.Set)+len(b.Unset) {
				t.Fatalf("%v, %v", res, err)
			}
		}
		do(t, fw, "replace 192.0.2.1/32 10m")
		expect(t, fw, "192.0.2.1/32 10m")
	})
}

// TestIPTablesOtherLayout: rules of other settings are replaced, wherever they
// are, and their entries stay.
func TestIPTablesOtherLayout(t *testing.T) {
	onEachXt(t, Options{Ports: []uint16{25}}, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.1/32 10m, 2001:db8::/61 20m")
		for _, o := range []Options{
			{Ports: []uint16{25, 587}},
			{Ports: []uint16{25, 587}, Hook: "input"},
			{},
			{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32"), netip.MustParsePrefix("0.0.0.0/0")}},
			{MaxEntries: 50},
		} {
			next := newXtIn(t, ns, fw.families[0].variant, fw.noSets, o)
			changed, err := next.Ensure(t.Context())
			if err != nil || !changed && !(fw.noSets && o.MaxEntries > 0) { // no part of rules
				t.Fatalf("%+v: changed %v, %v", o, changed, err)
			}
			expect(t, next, "192.0.2.1/32 10m\n2001:db8::/61 20m")
			rules := ns.run(fw.command("-save"))
			if strings.Count(rules, "-j SMTPGUARD") != 1 || strings.Count(rules, ":SMTPGUARD ") != 1 {
				t.Fatalf("%+v:\n%s", o, rules)
			}
		}
	})
}

// TestIPTablesOtherVariant: rules that an earlier run left in the other
// variant are warned of, and removed in the end.
func TestIPTablesOtherVariant(t *testing.T) {
	for _, from := range []string{xtNFT, xtLegacy} {
		for _, noSets := range []bool{false, true} {
			t.Run(fmt.Sprintf("from %s, without ipset %v", from, noSets), func(t *testing.T) {
				t.Parallel()
				ns := newNetNS(t)
				old := newXtIn(t, ns, from, noSets, Options{})
				if strings.Contains(old.reason(), "warning") {
					t.Errorf("why: %s", old.reason())
				}
				do(t, old, "ensure\nset 192.0.2.1/32 10m")
				to := xtLegacy
				if from == xtLegacy {
					to = xtNFT
				}
				fw := newXtIn(t, ns, to, noSets, Options{})
				if want := "warning: " + old.families[0].String() + " holds "; !strings.Contains(fw.reason(), want) {
					t.Errorf("%q is not in why: %s", want, fw.reason())
				}
				do(t, fw, "ensure\nset 192.0.2.2/32 10m")
				if err := fw.Close(t.Context(), true); err != nil {
					t.Fatal(err)
				}
				for _, c := range append(old.commands[:], fw.commands[:]...) {
					if got := ns.run(c + "-save"); strings.Contains(got, xtChain) {
						t.Errorf("%s:\n%s", c, got)
					}
				}
				if got := ns.run("ipset", "list", "-name"); got != "" {
					t.Errorf("sets are left: %s", got)
				}
			})
		}
	}
}

// TestIPTablesProbeWithoutRights runs on a thread that gave rights away, all
// of them or one.
func TestIPTablesProbeWithoutRights(t *testing.T) {
	for _, keep := range []uint32{0, 1 << unix.CAP_NET_ADMIN} {
		fw, err := newXt(Options{}, "iptables-nft", "ip6tables-nft", false)
		if err != nil {
			t.Fatal(err)
		}
		var probeErr error
		err = newNetNS(t).do(func() error {
			hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
			some := [2]unix.CapUserData{{Effective: keep, Permitted: keep}}
			if err := unix.Capset(&hdr, &some[0]); err != nil {
				return err
			}
			_, probeErr = fw.Probe(context.Background())
			return fw.Close(context.Background(), false)
		})
		if err != nil {
			t.Fatal(err)
		}
		if !errors.Is(probeErr, ErrUnavailable) || !errors.Is(probeErr, unix.EPERM) || !strings.Contains(fmt.Sprint(probeErr), "CAP_NET_ADMIN and CAP_NET_RAW") {
			t.Errorf("%#x: %v", keep, probeErr)
		}
	}
}

// TestIPTablesAfterCrash: what a start that was killed left behind is no
// hindrance, and does not stay.
func TestIPTablesAfterCrash(t *testing.T) {
	ns := newNetNS(t)
	fw := newXtIn(t, ns, xtNFT, false, Options{Allow: []netip.Prefix{netip.MustParsePrefix("192.0.2.9/32")}})
	ns.run("sh", "-ec", "for s in smtpguard4-new smtpguard-allow4-new smtpguard-probe6; do ipset create $s hash:ip; done; ipset create smtpguard4 hash:net timeout 0; ipset add smtpguard4 192.0.2.1")
	ns.run("sh", "-ec", "iptables-nft -t raw -N SMTPGUARD; iptables-nft -t filter -N SMTPGUARD; iptables-nft -A INPUT -j SMTPGUARD; iptables-nft -A SMTPGUARD -j DROP")
	if _, err := fw.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	do(t, fw, "replace 192.0.2.2/32 10m")
	expect(t, fw, "192.0.2.2/32 10m")
	if got := ns.run("ipset", "list", "-name"); strings.Contains(got, "new") || strings.Contains(got, "probe") {
		t.Error(got)
	}
	if got := ns.run("iptables-nft", "-S"); strings.Contains(got, xtChain) {
		t.Error(got)
	}
}

func TestIPTablesMissing(t *testing.T) {
	fw, err := newXt(Options{}, "no-such-iptables", "no-such-ip6tables", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fw.Probe(t.Context()); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no-such-iptables is not installed") {
		t.Error(err)
	}
	if _, err := NewIPTables(Options{Hook: "output"}); err == nil || errors.Is(err, ErrUnavailable) {
		t.Error(err)
	}
}

// TestIPTablesTimeout: a command that takes too long leaves things unknown.
func TestIPTablesTimeout(t *testing.T) {
	onEachXt(t, Options{}, func(t *testing.T, fw *xt, ns netNS) {
		do(t, fw, "ensure\nset 192.0.2.1/32 10m")
		for _, f := range fw.families {
			f.timeout = -time.Hour
		}
		if _, err := fw.Ensure(t.Context()); !errors.Is(err, ErrUnknown) {
			t.Errorf("Ensure: %v", err)
		}
		if err := fw.Replace(t.Context(), many(3)); !errors.Is(err, ErrUnknown) {
			t.Errorf("Replace: %v", err)
		}
		for _, f := range fw.families {
			f.timeout = defaultTimeout
		}
		do(t, fw, "replace 192.0.2.2/32 10m\nset 192.0.2.3/32 10m")
		expect(t, fw, "192.0.2.2/32 10m\n192.0.2.3/32 10m")
	})
}

// TestIPTablesRulesKeepCounters: a change does not forget what the rules that
// stay have stopped.
func TestIPTablesRulesKeepCounters(t *testing.T) {
	ns := newNetNS(t)
	fw := newXtIn(t, ns, xtNFT, true, Options{})
	do(t, fw, "ensure\nset 127.0.0.9/32 10m")
	p := netip.MustParsePrefix("127.0.0.9/32")
	if c, err := ns.dial("127.0.0.9", "127.0.0.1:25", 100*time.Millisecond); err == nil {
		c.Close()
		t.Fatal("connected")
	}
	before := list(t, fw)[p]
	do(t, fw, "set 192.0.2.1/32 10m\nset 127.0.0.9/32 20m")
	do(t, fw, "replace 127.0.0.9/32 30m, 192.0.2.2/32 10m")
	if after := list(t, fw)[p]; before.Packets == 0 || after.Packets < before.Packets || after.Bytes < before.Bytes {
		t.Errorf("before %+v, after %+v", before, after)
	}
}

// TestIPSetFull: the kernel's own limit is told for each entry.
func TestIPSetFull(t *testing.T) {
	ns := newNetNS(t)
	s := &ipset{netNS: ns.fd, timeout: defaultTimeout}
	defer s.close()
	r, err := s.revision(t.Context(), false)
	if err != nil {
		cannot(t, "this kernel has no ipset: %v", err)
	}
	if err := s.create(t.Context(), "x", false, true, r, 64, 10); err != nil {
		t.Fatal(err)
	}
	var es []Entry
	for i := range 14 {
		es = append(es, Entry{netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, byte(i)}), 32), time.Now().Add(time.Hour)})
	}
	var refused []netip.Prefix
	err = s.add(t.Context(), "x", es, time.Now(), func(p netip.Prefix, err error) {
		if !errors.Is(ipsetError("x", err), ErrFull) {
			t.Errorf("%v: %v", p, err)
		}
		refused = append(refused, p)
	})
	if !errors.Is(ipsetError("x", err), ErrFull) || len(refused) != 4 {
		t.Errorf("%v, refused %v", err, refused)
	}
	h, err := s.header(t.Context(), "x")
	if err != nil || h.count != 10 || h.max != 10 || !h.timeouts || !h.sameKind(false) || h.refs != 0 {
		t.Errorf("%+v, %v", h, err)
	}
	if err := s.remove(t.Context(), "x", []netip.Prefix{es[0].Prefix, es[0].Prefix, netip.MustParsePrefix("10.0.0.0/8")}); err != nil {
		t.Error(err)
	}
	for _, p := range []string{"0.0.0.0/0", "2001:db8::/32"} { // the kernel is the last guard
		if err := s.add(t.Context(), "x", []Entry{{Prefix: netip.MustParsePrefix(p)}}, time.Now(), func(netip.Prefix, error) {}); err == nil {
			t.Errorf("%s was taken", p)
		}
	}
	if err := s.create(t.Context(), "x", false, true, r, 64, 10); err == nil {
		t.Error("made twice")
	}
	for range 2 {
		if err := s.destroy(t.Context(), "x"); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.header(t.Context(), "x"); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
	if _, err := s.list(t.Context(), "x"); !errors.Is(err, unix.ENOENT) {
		t.Error(err)
	}
}

func TestIPSetTimeout(t *testing.T) {
	for d, want := range map[time.Duration]uint32{
		0: 1, -time.Hour: 1, time.Nanosecond: 1, 999 * time.Millisecond: 1, time.Second: 1,
		time.Second + 1: 2, 10 * time.Minute: 600, 365 * 24 * time.Hour: ipsetMaxTimeout, 1<<63 - 1: ipsetMaxTimeout,
	} {
		if got := ipsetTimeout(d); got != want {
			t.Errorf("%v: %d, want %d", d, got, want)
		}
	}
}

// FuzzReadEntry: the kernel is trusted, but not with a panic.
func FuzzReadEntry(f *testing.F) {
	f.Add(appendEntry(nil, Entry{netip.MustParsePrefix("192.0.2.0/24"), time.Unix(2e9, 0)}, time.Unix(1e9, 0)))
	f.Add(appendEntry(nil, Entry{Prefix: netip.MustParsePrefix("2001:db8::/61")}, time.Time{}))
	f.Add([]byte{8, 0, 1, 0x80, 4, 0, 1, 0x40})
	f.Fuzz(func(t *testing.T, data []byte) {
		ad, err := netlink.NewAttributeDecoder(data)
		if err != nil {
			return
		}
		if in, ok := readEntry(ad, time.Now()); ok && !in.Prefix.IsValid() {
			t.Error(in)
		}
	})
}

// FuzzReadRules: rules in our chain may be anybody's.
func FuzzReadRules(f *testing.F) {
	l, err := newXtLayout(Options{Ports: []uint16{25}}, 0, false)
	if err != nil {
		f.Fatal(err)
	}
	p := netip.MustParsePrefix("192.0.2.0/24")
	for _, r := range l.entryRules(false, map[netip.Prefix]xtEntry{p: {until: 1795377600}}) {
		f.Add("-A SMTPGUARD " + strings.Replace(r.spec, "-j", "-c 7 420 -j", 1))
	}
	f.Add("-A SMTPGUARD -s 0.0.0.0/0 " + l.comment("until 9999999999999999999999") + "-j DROP")
	f.Fuzz(func(t *testing.T, line string) {
		for p := range readEntryRules([]string{line}) {
			if err := checkPrefix(p); err != nil {
				t.Error(err)
			}
		}
		l.intact(false, []string{line}, []string{"-N SMTPGUARD", line})
		removal([]string{line}, []string{line})
	})
}

func TestReadEntryRules(t *testing.T) {
	l, err := newXtLayout(Options{Ports: []uint16{25}}, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	want := map[netip.Prefix]xtEntry{
		netip.MustParsePrefix("192.0.2.0/24"): {1795377600, 7, 420},
		netip.MustParsePrefix("192.0.2.7/32"): {1795377601, 0, 0},
	}
	var lines []string
	for _, r := range l.entryRules(false, want) {
		line := "-A SMTPGUARD " + strings.TrimSuffix(r.spec, "-j DROP") + fmt.Sprintf("-c %d %d -j DROP", r.packets, r.bytes)
		lines = append(lines, line)
	}
	lines = append(lines, "-N SMTPGUARD", "", `-A SMTPGUARD -s 192.0.2.9/32 -m comment --comment "`+l.tag("allow")+`" -j RETURN`,
		`-A SMTPGUARD -s 192.0.2.10/32 -m comment --comment "until 1795377600" -j DROP`)
	got := readEntryRules(lines)
	if len(got) != len(want) {
		t.Errorf("%v", got)
	}
	for p, e := range want {
		if got[p] != e {
			t.Errorf("%v: %v, want %v", p, got[p], e)
		}
	}
}

func TestComplaintText(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"", ""},
		{"# Warning: iptables-legacy tables present\n", ""},
		{"iptables-restore: line 2 failed\n\nTry `iptables-restore -h' for more information.\n", ": iptables-restore: line 2 failed"},
		{"a\nb\n", ": a; b"},
		{strings.Repeat("x", 1000), ": " + strings.Repeat("x", xtOutputMax) + "..."},
	} {
		if got := complaintText(tc.in); got != tc.want {
			t.Errorf("%q: %q", tc.in, got)
		}
	}
}

// TestIPSetErrors: which number means what to a caller.
func TestIPSetErrors(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want error
	}{
		{unix.ENOENT, ErrGone}, {unix.EPERM, ErrUnavailable}, {syscall.Errno(4352), ErrFull}, {unix.ENOMEM, ErrFull},
		{syscall.Errno(4102), ErrGone}, {syscall.Errno(9999), ErrGone}, {unix.EINVAL, ErrUnknown}, {context.Canceled, context.Canceled},
	} {
		got := ipsetError("doing", tc.err)
		if !errors.Is(got, tc.want) || !strings.HasPrefix(got.Error(), "doing: ") {
			t.Errorf("%v: %v", tc.err, got)
		}
	}
}

// BenchmarkIPSetInsert, BenchmarkIPSetReplace: as for nftables.
func BenchmarkIPSetInsert(b *testing.B) {
	for _, n := range []int{0, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			fw := newXtIn(b, newNetNS(b), xtNFT, false, Options{MaxEntries: 20_000_000, Ports: []uint16{25, 465, 587}})
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

func BenchmarkIPSetReplace(b *testing.B) {
	for _, n := range []int{1, 10_000, 100_000, 1_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			fw := newXtIn(b, newNetNS(b), xtNFT, false, Options{MaxEntries: n, Ports: []uint16{25, 465, 587}})
			es := many(n)
			for b.Loop() {
				if err := fw.Replace(b.Context(), es); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkIPSetCommand is the measure for BenchmarkIPSetReplace: ipset
// restore of the same.
func BenchmarkIPSetCommand(b *testing.B) {
	for _, n := range []int{1, 10_000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			ns := newNetNS(b)
			var text strings.Builder
			text.WriteString("create -exist x4 hash:net timeout 0 counters maxelem 300000\ncreate -exist x6 hash:net family inet6 timeout 0 counters maxelem 300000\nflush x4\nflush x6\n")
			for _, e := range many(n) {
				fmt.Fprintf(&text, "add x%s %v timeout 3600\n", familyDigit(e.Prefix.Addr().Is6()), e.Prefix)
			}
			for b.Loop() {
				ns.pipe(text.String(), "ipset", "restore")
			}
		})
	}
}

func BenchmarkIPSetEnsure(b *testing.B) {
	for _, n := range []int{0, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			fw := newXtIn(b, newNetNS(b), xtNFT, false, Options{MaxEntries: n + 1})
			if err := fw.Replace(b.Context(), many(n)); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if changed, err := fw.Ensure(b.Context()); changed || err != nil {
					b.Fatal(changed, err)
				}
			}
		})
	}
}
