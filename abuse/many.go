package abuse

import (
	"net/netip"
	"slices"

	"github.com/smtpguard/smtpguard/detector"
)

// maxRefs blocks of a case are kept one by one: their source is accused, what is
// lifted of them is learnt. Those that come after are in Case.Rest. Tests have
// less.
var maxRefs = 4000

// Bounds of the blocks that a case keeps.
const (
	// maxFull of them have all the evidence of their verdict, the first and the
	// last ones; the others one line each, for its source port.
	maxFull = 500
	// maxRestNets bounds Rest.Networks, which are widened where they are more.
	maxRestNets = 1000
)

// Rest are the blocks of a case that are not kept one by one. No report
// accuses their sources, and none says that they are victims.
type Rest struct {
	// Blocks never found room, with Connections, which are in
	// Case.Connections too.
	Blocks      int `json:"blocks,omitempty"`
	Connections int `json:"connections,omitempty"`
	// LastID is the highest Block.ID of those.
	LastID uint64 `json:"last_id,omitempty"`
	// Networks hold all their sources, and those of blocks that made room after
	// a report had told of them: each /24 or /48, or wider.
	Networks []netip.Prefix `json:"networks,omitempty"`
}

// keep remembers a block among the others of its case, or in its Rest.
func (c *Case) keep(r Ref) {
	if len(c.Blocks) >= maxRefs && !c.clear() {
		c.Rest.Blocks++
		if v := r.Verdict; v != nil {
			c.Rest.Connections += v.Opens + v.Refused
		}
		c.Rest.LastID = max(c.Rest.LastID, r.ID)
		c.Rest.cover(r.Prefix)
		return
	}
	c.Blocks = append(c.Blocks, r)
	if i := len(c.Blocks) - 1 - maxFull/2; i >= maxFull/2 {
		c.Blocks[i].Verdict = slim(c.Blocks[i].Verdict)
	}
}

// clear makes room by forgetting blocks that a mail has told of which nothing
// more will become.
func (c *Case) clear() bool {
	m := c.mail()
	if m == nil {
		return false
	}
	told := m.AfterID
	switch c.State {
	case Sent, Delivered, Deferred, Acknowledged, Answered:
		told = m.LastID
	}
	n := len(c.Blocks)
	c.Blocks = slices.DeleteFunc(c.Blocks, func(r Ref) bool {
		if r.ID == 0 || r.order() > told {
			return false
		}
		if !r.Pardoned {
			c.Rest.cover(r.Prefix)
		}
		return true
	})
	return len(c.Blocks) < n
}

// slim is a verdict with one line of evidence.
func slim(v *detector.Verdict) *detector.Verdict {
	if v == nil || len(v.Evidence) <= 1 && v.Spared == nil {
		return v
	}
	s := *v
	s.Spared, s.Evidence = nil, slices.Clone(v.Evidence[:min(len(v.Evidence), 1)])
	return &s
}

// cover adds the network of a block.
func (r *Rest) cover(p netip.Prefix) {
	n := provisional(p)
	if slices.ContainsFunc(r.Networks, func(o netip.Prefix) bool { return o.Bits() <= n.Bits() && o.Contains(n.Addr()) }) {
		return
	}
	r.Networks = append(r.Networks, n)
	for len(r.Networks) > maxRestNets {
		for i, o := range r.Networks {
			r.Networks[i] = netip.PrefixFrom(o.Addr(), max(0, o.Bits()-4)).Masked()
		}
		r.Networks = outermost(r.Networks)
	}
}

// outermost are the prefixes without those inside others, sorted.
func outermost(all []netip.Prefix) []netip.Prefix {
	slices.SortFunc(all, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits()
	})
	var outer []netip.Prefix
	for _, p := range all { // what lies in another one comes behind it
		if n := len(outer); n == 0 || !outer[n-1].Overlaps(p) {
			outer = append(outer, p)
		}
	}
	return outer
}

// within is the index of the prefix that an address lies in, of those that
// outermost returned; -1: none.
func within(outer []netip.Prefix, a netip.Addr) int {
	i, _ := slices.BinarySearchFunc(outer, a, func(p netip.Prefix, a netip.Addr) int {
		if p.Addr().Compare(a) <= 0 {
			return -1
		}
		return 1
	})
	if i > 0 && outer[i-1].Contains(a) {
		return i - 1
	}
	return -1
}
