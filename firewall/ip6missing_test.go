package firewall

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Without ip6tables, IPv4 is blocked; an entry of IPv6 is named as one that
// could not be, whether new or of an earlier backend, and so is what to install.
func TestIP6TablesMissing(t *testing.T) {
	if !kernelHasIPv6() {
		cannot(t, "the kernel has no IPv6")
	}
	for name, noSets := range map[string]bool{"ipset": false, "rules alone": true} {
		t.Run(name, func(t *testing.T) {
			ns := newNetNS(t)
			x, err := newXt(Options{Ports: []uint16{25}, NetNS: ns.fd}, "iptables", "no-such-ip6tables", noSets)
			if err != nil {
				t.Fatal(err)
			}
			defer x.Close(t.Context(), true)
			caps, err := x.Probe(t.Context())
			if err != nil || caps.IPv6 {
				t.Fatalf("%+v, %v", caps, err)
			}
			if w := strings.Join(x.Warnings(), "; "); !strings.Contains(w, "no-such-ip6tables is not installed: sources of IPv6 are not blocked") {
				t.Errorf("warnings %q", w)
			}
			until := time.Now().Add(time.Hour)
			v4, v6 := netip.MustParsePrefix("198.51.100.7/32"), netip.MustParsePrefix("2001:db8::/64")
			entries := []Entry{{Prefix: v4, Until: until}, {Prefix: v6, Until: until}}
			held := func() (all []netip.Prefix) {
				t.Helper()
				for in, err := range x.List(t.Context()) {
					if err != nil {
						t.Fatal(err)
					}
					all = append(all, in.Prefix)
				}
				return all
			}
			var part *PartialError
			if err := x.Replace(t.Context(), entries); !errors.As(err, &part) || len(part.Failed) != 1 || part.Failed[0].Prefix != v6 {
				t.Errorf("Replace: %v", err)
			}
			if got := held(); len(got) != 1 || got[0] != v4 {
				t.Errorf("it holds %v", got)
			}
			res, err := x.Apply(t.Context(), Batch{Set: entries})
			if err == nil || len(res.Failed) != 1 || res.Failed[0].Prefix != v6 {
				t.Errorf("Apply: %+v, %v", res, err)
			}
			if res, err := x.Apply(t.Context(), Batch{Unset: []netip.Prefix{v4, v6}}); err != nil {
				t.Errorf("unset: %+v, %v", res, err)
			}
			if got := held(); len(got) != 0 {
				t.Errorf("it holds %v", got)
			}
		})
	}
}
