package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// Who holds the slots is seen at a glance: a flood from a network is one line,
// and no line only says that there is one more.
func TestHeldBy(t *testing.T) {
	holder := func(a string, n int) guard.Holder { return guard.Holder{Source: netip.MustParseAddr(a), Held: n} }
	var net guard.Status
	net.Holders = []guard.Holder{holder("192.0.2.7", 9), holder("203.0.113.9", 4)}
	for _, a := range []string{"10.66.1.1", "10.66.1.2", "10.66.1.3", "10.66.1.4", "10.66.1.5", "10.66.1.6", "10.66.1.7", "10.66.1.8"} {
		net.Holders = append(net.Holders, holder(a, 7))
	}
	net.Networks = []guard.Network{{Prefix: netip.MustParsePrefix("10.66.1.0/24"), Held: 93, Addresses: 14}}
	net.Holding = 16
	four := guard.Status{Holding: 4, Holders: []guard.Holder{holder("192.0.2.1", 24), holder("192.0.2.2", 23), holder("198.51.100.3", 22), holder("203.0.113.4", 21)}}
	five := guard.Status{Holding: 5, Holders: append(four.Holders[:4:4], holder("203.0.113.5", 1))}
	many := guard.Status{Holding: 700, Saturated: true, Holders: five.Holders}
	for _, c := range []struct {
		name string
		s    guard.Status
		want string
	}{
		{"nobody", guard.Status{}, ""},
		{"a network", net, "10.66.1.0/24  93, of 14 addresses; 192.0.2.7  9; 203.0.113.9  4"},
		{"four", four, "192.0.2.1  24; 192.0.2.2  23; 198.51.100.3  22; 203.0.113.4  21"},
		{"five", five, "192.0.2.1  24; 192.0.2.2  23; 198.51.100.3  22; and 2 addresses more"},
		{"full", many, "192.0.2.1  24; 192.0.2.2  23; 198.51.100.3  22; 203.0.113.4  21; 203.0.113.5  1; and 695 addresses more"},
	} {
		if got := strings.Join(heldBy(c.s), "; "); got != c.want {
			t.Errorf("%s:\n%s\nwant\n%s", c.name, got, c.want)
		}
	}
}

// What is over is told as what it was: a block that dropped nothing is not told
// as one that did, nor one that another took the place of as an end.
func TestShowBlockThatIsOver(t *testing.T) {
	at := time.Date(2026, 11, 22, 13, 0, 0, 0, time.UTC)
	b := store.Block{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Reason: "kept 20 %", Since: at, Until: at.Add(time.Hour), By: store.Self, Offence: 1,
		Verdict: &detector.Verdict{Rule: "hog", Evidence: []detector.Evidence{{Source: netip.MustParseAddr("192.0.2.7"), Port: 4711, Time: at}}}}
	lifted := func(b store.Block) store.Block { b.Lifted, b.LiftedBy = at.Add(time.Minute), "root"; return b }
	observed := func(b store.Block) store.Block { b.Observed = true; return b }
	replaced := func(b store.Block) store.Block { b.Replaced = true; return b }
	part := func(b store.Block, n int) store.Block {
		b.Part, b.PartOf = n, netip.MustParsePrefix("192.0.2.0/24")
		return b
	}
	for _, c := range []struct {
		b              store.Block
		state          guard.State
		want           string
		evidence, part bool
	}{
		{b, guard.InForce, "in force", true, false},
		{observed(b), guard.OnlySeen, "observed", true, false},
		{b, guard.IsExpired, "expired", false, false},
		{observed(b), guard.IsExpired, "expired (only observed)", false, false},
		{lifted(b), guard.IsLifted, "lifted", false, false},
		{lifted(observed(b)), guard.IsLifted, "lifted (only observed)", false, false},
		{replaced(lifted(b)), guard.IsLifted, "replaced", false, false},
		{part(b, 1), guard.InForce, "in force", true, true},
		{part(b, 2), guard.InForce, "in force", false, false},
	} {
		var out bytes.Buffer
		showBlock(&out, guard.BlockInfo{Block: c.b, State: c.state})
		first, _, _ := strings.Cut(out.String(), "\n")
		if strings.Join(strings.Fields(first)[1:], " ") != c.want || strings.Contains(out.String(), "4711") != c.evidence || strings.Contains(out.String(), "of all of 192.0.2.0/24") != c.part {
			t.Errorf("want %q, evidence %v:\n%s", c.want, c.evidence, &out)
		}
	}
}
