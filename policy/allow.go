package policy

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"
	"go4.org/netipx"

	"github.com/smtpguard/smtpguard/allow"
)

// AllowEntry is a prefix that is never blocked, and why.
type AllowEntry struct {
	// Prefix is masked and not IPv4-mapped.
	Prefix netip.Prefix `json:"prefix"`
	// Why says where the entry comes from: "policy.yaml:31:5", "address of
	// this machine", "allow add by root".
	Why string `json:"why"`
	// Note is what a person wrote beside it; may be empty.
	Note string `json:"note,omitempty"`

	fromFile bool // read from one of Policy.AllowFiles
}

// AllowName is a name whose addresses are never blocked. Reading a policy
// does not look it up.
type AllowName struct {
	Name      allow.Name `json:"name"`
	Why, Note string     // as in AllowEntry

	fromFile bool
}

// Allowlist is a set of prefixes that are never blocked. It is immutable and
// may be read by many goroutines; a change makes a new one. The nil and the
// zero Allowlist are empty.
type Allowlist struct {
	entries []AllowEntry // sorted by prefix
	table   bart.Table[AllowEntry]
}

// NewAllowlist returns the list of these entries, in canonical form. Where a
// prefix comes twice, Overlaps tells the first. An invalid prefix means no
// address and is left out.
func NewAllowlist(entries []AllowEntry) *Allowlist {
	list := &Allowlist{entries: make([]AllowEntry, 0, len(entries))}
	for _, e := range entries {
		if !e.Prefix.IsValid() {
			continue
		}
		e.Prefix = Canonical(e.Prefix)
		list.entries = append(list.entries, e)
		if _, ok := list.table.Get(e.Prefix); !ok {
			list.table.Insert(e.Prefix, e)
		}
	}
	slices.SortStableFunc(list.entries, func(a, b AllowEntry) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	return list
}

// Overlaps reports whether prefix contains, equals or lies inside an entry,
// and returns the narrowest entry that covers it, else one of those inside.
// An IPv4-mapped prefix counts as IPv4. An invalid prefix overlaps nothing.
// The time is bounded by the number of bits of an address.
func (l *Allowlist) Overlaps(prefix netip.Prefix) (AllowEntry, bool) {
	if l == nil || !prefix.IsValid() {
		return AllowEntry{}, false
	}
	prefix = Canonical(prefix)
	if e, ok := l.table.LookupPrefix(prefix); ok {
		return e, true
	}
	for _, e := range l.table.Subnets(prefix) {
		return e, true
	}
	return AllowEntry{}, false
}

// hole6 is the narrowest prefix that Without takes out of an IPv6 prefix: a
// /64 is one network, if not one host, and a /48 without one address would
// have eighty parts, each of its own length.
const hole6 = 64

// Without returns what is left of prefix when the entries inside it are taken
// out (of IPv6 the /64 around a narrower one), as the fewest prefixes, sorted;
// ok is false if nothing is left, or if the rest has more than most parts.
func (l *Allowlist) Without(prefix netip.Prefix, most int) (rest []netip.Prefix, ok bool) {
	var b netipx.IPSetBuilder
	b.AddPrefix(prefix)
	if l != nil {
		if _, covered := l.table.LookupPrefix(prefix); covered {
			return nil, false
		}
		n := 0
		for p := range l.table.Subnets(prefix) {
			if n++; n > 16*most {
				return nil, false // neighbours could join to few parts; it is not worth the time
			}
			if p.Addr().Is6() && p.Bits() > hole6 {
				p = netip.PrefixFrom(p.Addr(), hole6).Masked()
			}
			b.RemovePrefix(p)
		}
	}
	set, err := b.IPSet()
	if err != nil {
		return nil, false
	}
	rest = set.Prefixes()
	return rest, len(rest) > 0 && len(rest) <= most
}

// Contains reports whether an entry covers the address, and returns the
// narrowest one. A zone is ignored and an IPv4-mapped address counts as IPv4.
func (l *Allowlist) Contains(addr netip.Addr) (AllowEntry, bool) {
	addr = addr.Unmap()
	return l.Overlaps(netip.PrefixFrom(addr, addr.BitLen()))
}

// All yields the entries in order of their prefixes, IPv4 first.
func (l *Allowlist) All() iter.Seq[AllowEntry] {
	if l == nil {
		return slices.Values[[]AllowEntry](nil)
	}
	return slices.Values(l.entries)
}

// Len returns the number of entries.
func (l *Allowlist) Len() int {
	if l == nil {
		return 0
	}
	return len(l.entries)
}

// Canonical returns the form of a prefix in which equal ones compare equal:
// masked, and IPv4 where the prefix is IPv4-mapped (::ffff:0:0/96 and
// narrower). An invalid prefix stays invalid.
func Canonical(prefix netip.Prefix) netip.Prefix {
	if prefix.Addr().Is4In6() && prefix.Bits() >= 96 {
		prefix = netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked()
}
