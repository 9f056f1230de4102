package abuse

import (
	"fmt"
	"net/netip"
)

// of makes c the contact of a range of addresses: a report goes to it only if
// everything that is reported lies in there.
func (c Contact) of(first, last netip.Addr) Contact {
	c.First, c.Last = first, last
	return c
}

// ofNet is of for a prefix.
func (c Contact) ofNet(p netip.Prefix) Contact {
	p = p.Masked()
	return c.of(p.Addr(), lastOf(p))
}

// covers reports whether the contact is one of all of ps.
func (c Contact) covers(ps []netip.Prefix) bool {
	for _, p := range ps {
		p = p.Masked()
		if !c.First.IsValid() || p.Addr().BitLen() != c.First.BitLen() || p.Addr().Less(c.First) || c.Last.Less(lastOf(p)) {
			return false
		}
	}
	return true
}

// partWarning begins what is said where nobody is the contact of all.
const partWarning = "nobody who was found is the contact of all that is reported: "

// narrow takes recipients that a lookup chose out of a mail whose case has
// grown beyond what they are the contacts of. They are shown among the others.
func (m *Mail) narrow(reported []netip.Prefix) {
	if m.Chosen != "" {
		return
	}
	for _, r := range []*Contact{&m.To, &m.Cc} {
		if r.Address == "" || r.covers(reported) {
			continue
		}
		m.Others = append([]Contact{*r}, m.Others[:min(len(m.Others), maxContacts-1)]...)
		if r == &m.To {
			m.Warnings = append(m.Warnings, partWarning+fmt.Sprintf("%s is that of %s only", r.Address, r.Scope))
		}
		*r = Contact{}
	}
}
