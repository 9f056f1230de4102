package detector

import (
	"slices"
	"time"
)

// Who is to blame in a prefix that is spared, as known good senders are in it?
//
// The members that are not known good, hold slots, and have half of what such
// members have on average, or more. Members that get slots later are told as
// they come, for one window. But nobody is told for what proper senders do too:
//
//   - One slot is what everybody needs to send a first mail. Who has connected
//     once is told when he has kept it for four fifths of the window. (Addresses
//     only: what a prefix opened is not known after some of it was forgotten.)
//   - Where everybody's connections hang, as with a spam scanner that is stuck,
//     one that hangs is no sign. What known good senders of other networks
//     keep without delivering just then is customary; who is told has kept
//     five times as much as the median of them and of those who were served.
//     Nobody who is known good himself is told then for holding without
//     delivering. It stays customary while the prefix is spared, and is for the
//     next that are, for one window: when all time out at once there is a moment
//     in which nobody has kept anything.
//
// So a flood with one slot each, from addresses among known good ones, is told
// some seconds later than one with several.

const (
	memberShare = 0.5
	lonelyShare = 0.8
	maxMembers  = 4096 // verdicts on members of one spared prefix at one time

	customFactor = 5
	// To say what is customary it takes known good senders who keep slots as
	// long as suspects do, of two networks or more: so many, and one to so
	// many suspects. A few who are idle at the time of a flood, or whom an
	// attacker placed there, are not everybody.
	customVoices = 5
	suspectsEach = 4
	// Who delivered within this time was served.
	served = int64(3 * time.Second)
)

// hot is a spared prefix whose bad members are looked for.
type hot struct {
	node      uint32
	rule      int
	until     int64
	threshold float64
	suspects  int     // bad members when it was spared
	customary float64 // the most that was since then
	before    float64 // the most that was for those spared before
	stale     bool
}

// followHot tells members of spared prefixes that have got slots since.
func (d *Detector) followHot() {
	if len(d.hots) == 0 {
		return
	}
	d.hots = slices.DeleteFunc(d.hots, func(h hot) bool { return h.until+int64(d.cfg.Rules[h.rule].Window) <= d.now })
	for j := range d.hots {
		h := &d.hots[j]
		if h.until <= d.now {
			continue // only remembered
		}
		if d.cfg.Rules[h.rule].Metric == Saturation && d.p == 0 {
			continue
		}
		d.follow(h)
	}
}

// follow tells the bad members of h.
func (d *Detector) follow(h *hot) {
	if d.cfg.Rules[h.rule].Metric == Saturation {
		h.customary = max(h.customary, d.customary(h))
	}
	// Asked for only when a prefix in it could be told: it takes long.
	var list []*good
	asked := false
	in := func() []*good {
		if !asked {
			list, asked = d.goodIn(d.nodes.at(h.node).key), true
		}
		return list
	}
	d.tellMembers(h.node, h, in)
}

// spare makes h one of the hot prefixes.
func (d *Detector) spare(h hot) {
	d.hots = slices.DeleteFunc(d.hots, func(o hot) bool {
		h.before = max(h.before, o.customary)
		return o.node == h.node
	})
	d.follow(&h)
	d.hots = append(d.hots, h)
}

// customary is the median of what known good senders outside h have kept since
// they last delivered, of those who were served just now or have kept as much
// as a suspect: as a score under h's rule, 0 if too few are there to tell.
func (d *Detector) customary(h *hot) float64 {
	own, rule := d.nodes.at(h.node).key, &d.cfg.Rules[h.rule]
	all := float64(d.capacity) * rule.Window.Seconds()
	kept := d.kept[:0]
	var network uint32
	several := false
	for _, i := range d.levels[0].active {
		n := d.nodes.at(i)
		if n.cool > d.now || own.contains(n.key) {
			continue
		}
		e := d.good(n.key)
		if e == nil || d.now-d.offset-e.last <= served {
			continue
		}
		s := min(d.score(i, h.rule), float64(n.held)*seconds(d.now-d.offset-e.last)/all)
		if s < h.threshold-epsilon {
			continue
		}
		kept = append(kept, s)
		top := i
		for n.parent != 0 {
			top, n = n.parent, d.nodes.at(n.parent)
		}
		several = several || network != 0 && network != top
		network = top
	}
	d.kept = kept
	if !several || len(kept) < customVoices || len(kept)*suspectsEach < h.suspects {
		return 0
	}
	for j := uint32(1); j <= d.goods.slab.used; j++ {
		if e := d.goods.slab.at(j); e.key.bits != 0 && d.now-d.offset-e.last <= served && !own.contains(e.key) {
			kept = append(kept, 0)
		}
	}
	d.kept = kept
	slices.Sort(kept)
	return kept[(len(kept)-1)/2]
}

// tellMembers makes verdicts on the bad members of node i, which is h's or
// inside it. in lists the known good addresses of h's prefix.
func (d *Detector) tellMembers(i uint32, h *hot, in func() []*good) {
	rule := &d.cfg.Rules[h.rule]
	customary := max(h.customary, h.before)
	allHang := customary*float64(d.capacity) >= staleShare
	for c := d.nodes.at(i).child; c != 0 && len(d.out) < maxMembers; c = d.nodes.at(c).next {
		n := d.nodes.at(c)
		if n.cool > d.now || rule.Metric == Saturation && n.held == 0 {
			continue
		}
		s := d.score(c, h.rule)
		if s < h.threshold-epsilon || s <= nothing {
			continue
		}
		sources := 1
		if n.level == 0 {
			if e := d.good(n.key); e != nil && !(h.stale && !allHang && d.isStale(n, e, h.rule, s)) {
				continue
			}
		} else {
			t := d.tally(c, h.rule)
			sources = t.badN
			s -= t.told
		}
		each := customFactor * customary
		if rule.Metric == Saturation && n.level == 0 && n.held == 1 && n.opens == 1 {
			each = max(each, lonelyShare/float64(d.capacity))
		}
		threshold := max(h.threshold, each*float64(sources))
		if n.level != 0 && (sources < 2 || s < threshold-epsilon || slices.ContainsFunc(in(), func(e *good) bool { return n.key.contains(e.key) })) {
			d.tellMembers(c, h, in)
			continue
		}
		if s < threshold-epsilon {
			continue
		}
		n.cool = d.now + int64(rule.Window)
		v := d.verdict(c, h.rule, s, threshold)
		d.proof.missed = d.proof.missed || v.Unproven
		v.Sources = sources
		d.out = append(d.out, v)
	}
}
