package firewall

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// What our part of iptables looks like, as iptables-save -t raw shows it, and
// ip6tables-save with 6 for 4:
//
//	-A PREROUTING -m comment --comment "smtpguard/1 … jump" -j SMTPGUARD
//	-A SMTPGUARD -m set --match-set smtpguard-allow4 src -m comment … -j RETURN
//	-A SMTPGUARD -p tcp -m multiport --dports 25,465,587 -m set --match-set smtpguard4 src -m comment … -j DROP
//
// and without ipset, where each entry is a rule:
//
//	-A SMTPGUARD -s 192.0.2.7/32 -p tcp -m multiport --dports 25,465,587 -m comment --comment "smtpguard/1 … until 1795377600" -j DROP
const (
	xtChain = "SMTPGUARD"
	// xtVersion counts the layouts: rules of another one are replaced.
	xtLayoutVersion = 1
	// xtPortsPerRule is how many ports the multiport match takes.
	xtPortsPerRule = 15
	// xtRulesMax bounds the rules without ipset: every packet to our ports
	// passes all of them. Measured with 5,000: 7 times (legacy) and 18 times
	// (nft) the cost of a packet; with 500 it is still less than doubled.
	xtRulesMax = 500
)

// setName is the set of a family's entries, allowSetName that of what is
// allowed; at most 31 characters. The contents of name+xtNew replaces them.
func setName(v6 bool) string      { return "smtpguard" + familyDigit(v6) }
func allowSetName(v6 bool) string { return "smtpguard-allow" + familyDigit(v6) }

const xtNew = "-new"

func familyDigit(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

// xtLayout is the constant part of our rules.
type xtLayout struct {
	table, hook string // "raw", "PREROUTING"
	ports       []uint16
	allow       [2][]netip.Prefix // IPv4, IPv6
	maxElem     uint32
	sets        bool
	digest      string // of all the above
}

func newXtLayout(o Options, maxEntries int, sets bool) (*xtLayout, error) {
	l := &xtLayout{
		ports: slices.Clone(o.Ports), sets: sets,
	}
	if sets { // what ran out counts until the kernel collects it
		l.maxElem = uint32(min(2*int64(maxEntries)+4096, 1<<31))
	}
	slices.Sort(l.ports)
	l.ports = slices.Compact(l.ports)
	switch o.Hook {
	case "", "prerouting":
		l.table, l.hook = "raw", "PREROUTING"
	case "input":
		l.table, l.hook = "filter", "INPUT"
	default:
		return nil, fmt.Errorf("hook %q is not known; it is one of prerouting, input", o.Hook)
	}
	for i := range l.allow {
		l.allow[i] = allowPrefixes(o.Allow, i == 1)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %s %v %v %d %v", xtLayoutVersion, l.table, l.hook, l.ports, l.allow, l.maxElem, sets))
	l.digest = hex.EncodeToString(sum[:6])
	return l, nil
}

// allowPrefixes gives the prefixes of one family, each once, in order, in the
// form that an ipset takes: a /0 as its two halves.
func allowPrefixes(prefixes []netip.Prefix, v6 bool) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range prefixes {
		if p = unmapPrefix(p).Masked(); !p.IsValid() || p.Addr().Is6() != v6 {
			continue
		}
		if p.Bits() == 0 {
			upper := p.Addr().AsSlice()
			upper[0] = 0x80
			a, _ := netip.AddrFromSlice(upper)
			out = append(out, netip.PrefixFrom(p.Addr(), 1), netip.PrefixFrom(a, 1))
			continue
		}
		out = append(out, p)
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return slices.Compact(out)
}

// tag is the comment of a rule; a rule with another version or digest is of
// another layout.
func (l *xtLayout) tag(rule string) string {
	return fmt.Sprintf("smtpguard/%d %s %s", xtLayoutVersion, l.digest, rule)
}

func (l *xtLayout) comment(rule string) string {
	return `-m comment --comment "` + l.tag(rule) + `" `
}

func (l *xtLayout) jump() string { return l.comment("jump") + "-j " + xtChain }

// portMatches are what the drop rules of an entry begin with: one of them for
// each 15 ports, a single empty one for all ports and protocols.
func (l *xtLayout) portMatches() []string {
	if len(l.ports) == 0 {
		return []string{""}
	}
	var out []string
	for chunk := range slices.Chunk(l.ports, xtPortsPerRule) {
		texts := make([]string, len(chunk))
		for i, p := range chunk {
			texts[i] = strconv.Itoa(int(p))
		}
		out = append(out, "-p tcp -m multiport --dports "+strings.Join(texts, ",")+" ")
	}
	return out
}

// xtRule is a rule of our chain.
type xtRule struct {
	spec           string // behind -A SMTPGUARD
	packets, bytes uint64
}

// setRules are the rules of our chain with ipset.
func (l *xtLayout) setRules(v6 bool) []xtRule {
	match := func(set string) string { return "-m set --match-set " + set + " src " }
	var rules []xtRule
	if len(l.allow[familyIndex(v6)]) > 0 {
		rules = append(rules, xtRule{spec: match(allowSetName(v6)) + l.comment("allow") + "-j RETURN"})
	}
	for _, ports := range l.portMatches() {
		rules = append(rules, xtRule{spec: ports + match(setName(v6)) + l.comment("drop") + "-j DROP"})
	}
	return rules
}

func familyIndex(v6 bool) int {
	if v6 {
		return 1
	}
	return 0
}

// xtEntry is an entry as a rule, or as several for more than 15 ports.
type xtEntry struct {
	until          int64 // Unix seconds
	packets, bytes uint64
}

// entryRules are the rules of our chain without ipset. Of the allowlist they
// have what an entry overlaps: usually nothing, as the gate is in front.
func (l *xtLayout) entryRules(v6 bool, entries map[netip.Prefix]xtEntry) []xtRule {
	var rules []xtRule
	prefixes := make([]netip.Prefix, 0, len(entries))
	for p := range entries {
		prefixes = append(prefixes, p)
	}
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	for _, a := range l.allow[familyIndex(v6)] {
		if slices.ContainsFunc(prefixes, a.Overlaps) {
			rules = append(rules, xtRule{spec: "-s " + a.String() + " " + l.comment("allow") + "-j RETURN"})
		}
	}
	for _, p := range prefixes {
		e := entries[p]
		for _, ports := range l.portMatches() {
			rules = append(rules, xtRule{
				spec:    "-s " + p.String() + " " + ports + l.comment("until "+strconv.FormatInt(e.until, 10)) + "-j DROP",
				packets: e.packets, bytes: e.bytes,
			})
			e.packets, e.bytes = 0, 0 // the sum is kept in the first
		}
	}
	return rules
}

// xtUntil is the comment of an entry's rule, of any layout.
var xtUntil = regexp.MustCompile(`"smtpguard/\d+ [0-9a-f]{12} until (\d+)"`)

// readEntryRules is the reverse of entryRules, for the lines of list; what is
// not ours is left out.
func readEntryRules(lines []string) map[netip.Prefix]xtEntry {
	entries := make(map[netip.Prefix]xtEntry)
	for _, line := range lines {
		m := xtUntil.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		until, err := strconv.ParseInt(m[1], 10, 64)
		if err != nil {
			continue
		}
		var prefix netip.Prefix
		var packets, bytes uint64
		f := strings.Fields(line)
		for i := range f {
			switch {
			case f[i] == "-s" && i+1 < len(f):
				prefix, _ = netip.ParsePrefix(f[i+1])
			case f[i] == "-c" && i+2 < len(f):
				packets, _ = strconv.ParseUint(f[i+1], 10, 64)
				bytes, _ = strconv.ParseUint(f[i+2], 10, 64)
			}
		}
		if checkPrefix(prefix) == nil {
			e := entries[prefix]
			entries[prefix] = xtEntry{until, e.packets + packets, e.bytes + bytes}
		}
	}
	return entries
}

// script makes chain and jump anew in one transaction; parent are the lines
// of the chain that is jumped from.
func (l *xtLayout) script(parent []string, rules []xtRule) string {
	var b strings.Builder
	b.WriteString(":" + xtChain + " - [0:0]\n")
	for _, line := range jumps(parent) {
		b.WriteString("-D" + strings.TrimPrefix(line, "-A") + "\n")
	}
	b.WriteString("-I " + l.hook + " 1 " + l.jump() + "\n")
	for _, r := range rules {
		fmt.Fprintf(&b, "[%d:%d] -A %s %s\n", r.packets, r.bytes, xtChain, r.spec)
	}
	return b.String()
}

// refill replaces the content of our chain and leaves the jump.
func (l *xtLayout) refill(rules []xtRule) string {
	var b strings.Builder
	b.WriteString(":" + xtChain + " - [0:0]\n")
	for _, r := range rules {
		fmt.Fprintf(&b, "[%d:%d] -A %s %s\n", r.packets, r.bytes, xtChain, r.spec)
	}
	return b.String()
}

// removal takes chain and jumps away; empty if there is nothing.
func removal(parent, chain []string) string {
	var b strings.Builder
	for _, line := range jumps(parent) {
		b.WriteString("-D" + strings.TrimPrefix(line, "-A") + "\n")
	}
	if len(chain) > 0 {
		b.WriteString("-F " + xtChain + "\n-X " + xtChain + "\n")
	}
	return b.String()
}

// jumps are the lines that jump to our chain.
func jumps(parent []string) []string {
	var out []string
	for _, line := range parent {
		if strings.HasPrefix(line, "-A ") && jumpsToUs(line) {
			out = append(out, line)
		}
	}
	return out
}

func jumpsToUs(line string) bool {
	f := strings.Fields(line)
	return len(f) >= 2 && (f[len(f)-2] == "-j" || f[len(f)-2] == "-g") && f[len(f)-1] == xtChain
}

// intact tells whether chain and jump are our layout: one jump, in front of
// everything, and in the chain the rules that we tagged, in order. Without
// ipset their number is anybody's.
func (l *xtLayout) intact(v6 bool, parent, chain []string) bool {
	first := slices.IndexFunc(parent, func(line string) bool { return strings.HasPrefix(line, "-A ") })
	if first < 0 || len(jumps(parent)) != 1 || !l.tagged(parent[first], "jump", xtChain) || len(chain) == 0 {
		return false
	}
	chain = chain[1:] // -N
	if l.sets {
		want := l.setRules(v6)
		if len(chain) != len(want) {
			return false
		}
		for i, line := range chain {
			name, target := "drop", "DROP"
			if strings.HasSuffix(want[i].spec, "RETURN") {
				name, target = "allow", "RETURN"
			}
			if !l.tagged(line, name, target) {
				return false
			}
		}
		return true
	}
	for _, line := range chain {
		if !l.tagged(line, "allow", "RETURN") && !(strings.Contains(line, l.tag("until ")) && strings.HasSuffix(line, "-j DROP")) {
			return false
		}
	}
	return true
}

// made is intact for the layout that the jump says it is: ours, of whatever
// policy.
func (l *xtLayout) made(parent, chain []string) bool {
	first := slices.IndexFunc(parent, func(line string) bool { return strings.HasPrefix(line, "-A ") })
	if first < 0 || len(chain) == 0 {
		return false
	}
	as := &xtLayout{digest: digestIn(parent[first], xtLayoutVersion)}
	if !as.tagged(parent[first], "jump", xtChain) {
		return false
	}
	drops := !l.sets // there, each entry is one
	for _, line := range chain[1:] {
		switch {
		case as.tagged(line, "allow", "RETURN"):
		case as.tagged(line, "drop", "DROP"):
			drops = true
		case !l.sets && strings.Contains(line, as.tag("until ")) && strings.HasSuffix(line, "-j DROP"):
		default:
			return false
		}
	}
	return drops
}

func (l *xtLayout) tagged(line, name, target string) bool {
	return strings.Contains(line, `"`+l.tag(name)+`"`) && strings.HasSuffix(line, " -j "+target)
}

// untilSeconds is e's end as a rule's comment has it, rounded up.
func untilSeconds(t time.Time) int64 {
	secs := t.Unix()
	if t.Nanosecond() > 0 {
		secs++
	}
	return secs
}
