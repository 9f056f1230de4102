package firewall

import (
	"cmp"
	"net/netip"
	"slices"
)

// addrRange is all addresses from first to last, both included.
type addrRange struct{ first, last netip.Addr }

// mergeRanges gives the fewest ranges that cover the prefixes of one family,
// in order, without overlap and without touching: an nftables interval set
// refuses a whole batch for one overlap. IPv4-mapped prefixes count as IPv4;
// invalid ones are left out.
func mergeRanges(prefixes []netip.Prefix, v6 bool) []addrRange {
	var all []addrRange
	for _, p := range prefixes {
		if p = unmapPrefix(p); p.IsValid() && p.Addr().Is6() == v6 {
			all = append(all, addrRange{p.Masked().Addr(), lastAddr(p)})
		}
	}
	slices.SortFunc(all, func(a, b addrRange) int {
		return cmp.Or(a.first.Compare(b.first), a.last.Compare(b.last))
	})
	var out []addrRange
	for _, r := range all {
		if n := len(out) - 1; n >= 0 {
			next := out[n].last.Next() // invalid behind the last address there is
			if !next.IsValid() || r.first.Compare(next) <= 0 {
				if r.last.Compare(out[n].last) > 0 {
					out[n].last = r.last
				}
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

// unmapPrefix turns ::ffff:192.0.2.0/120 into 192.0.2.0/24. A mapped prefix
// shorter than /96 has no IPv4 form and comes back as the zero Prefix.
func unmapPrefix(p netip.Prefix) netip.Prefix {
	if !p.IsValid() || !p.Addr().Is4In6() {
		return p
	}
	if p.Bits() < 96 {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
}

// lastAddr is the highest address in p.
func lastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
