package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/smtpguard/smtpguard/guard"
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
