package detector

import (
	"cmp"
	"math"
	"slices"
	"time"
)

// Which source explains a flood?
//
// Addresses are judged first, then prefixes from narrow to wide. After its
// verdict a source is silent for one window of the rule; meanwhile prefixes
// around it are scored without it. So one bad host never costs its network.
//
// A prefix must reach the threshold by what its members did that are neither
// known good nor already told, and that must be MinSources addresses or more.
// If no more than three of the sources directly below it make up four fifths
// of that, they are the better explanation: then the prefix needs as many
// times the threshold, by which time one of them has crossed it alone.
//
// When an address is told for the slots that it keeps, the others that keep as
// large a share now need only half the threshold: what the first one gives
// back would take the pressure off them, and four of five would stay. For the
// same reason an address that is on its way to its own verdict does not count
// for its prefix, which would cross first.
//
// When a prefix is told, ten minutes long half the threshold is enough for its
// neighbours inside the same wider prefixes: an attacker who owns a /48 moves
// to the next /56.
//
// A prefix with known good senders in it is spared: its bad members are told
// instead, see members.go.

const (
	concentrated = 0.8
	fewChildren  = 3
	scarFor      = int64(10 * time.Minute)
	scarFactor   = 0.5
	alongFactor  = 0.5
	// A known good address that delivered nothing for so long and keeps half
	// a slot or more through a window as long is not delivering but holding:
	// a first mail buys no place in a prefix of attackers for ever.
	staleAfter = int64(time.Minute)
	staleShare = 0.5

	// Scores are compared with thresholds with this tolerance, so that the
	// order of additions does not decide.
	epsilon = 1e-9
	// A score up to this is none: what is left of a difference.
	nothing = 1e-12

	maxEvidence = 16
	maxSpared   = 16
)

// candidate is a source that crossed a rule in this evaluation.
type candidate struct {
	node      uint32
	rule      int
	score     float64
	threshold float64
	stale     bool // known good members that only hold count as bad
	tally     tally
}

// tally is what the members of a prefix did in a window.
type tally struct {
	bad     float64 // members that count
	badN    int
	good    float64 // known good members
	stale   float64 // those of them that only hold
	staleN  int
	told    float64 // members that had their verdict
	largest [fewChildren]float64
}

func (t *tally) add(o tally) {
	t.bad += o.bad
	t.badN += o.badN
	t.good += o.good
	t.stale += o.stale
	t.staleN += o.staleN
	t.told += o.told
}

// tally sums up the members of node i for rule r.
func (d *Detector) tally(i uint32, r int) tally {
	var t tally
	for c := d.nodes.at(i).child; c != 0; c = d.nodes.at(c).next {
		n := d.nodes.at(c)
		var o tally
		switch {
		case n.cool > d.now:
			o.told = d.score(c, r)
		case n.level != 0:
			o = d.tally(c, r)
		default:
			s := d.score(c, r)
			if s <= nothing {
				continue
			}
			if e := d.good(n.key); e == nil && d.onItsWay(n, r) {
				o.told = s
			} else if e == nil {
				o.bad, o.badN = s, 1
			} else {
				o.good = s
				if d.isStale(n, e, r, s) {
					o.stale, o.staleN = s, 1
				}
			}
		}
		t.add(o)
		b := o.bad + o.stale
		for j := range t.largest {
			if b > t.largest[j] {
				b, t.largest[j] = t.largest[j], b
			}
		}
	}
	return t
}

// onItsWay says whether the address n holds so many slots that it will cross a
// rule on addresses itself, in no more time than rule r has.
func (d *Detector) onItsWay(n *node, r int) bool {
	if d.cfg.Rules[r].Metric != Saturation || n.held == 0 {
		return false
	}
	share := float64(n.held) * d.p / float64(d.capacity)
	return slices.ContainsFunc(d.levels[0].sat, func(q int) bool {
		own := &d.cfg.Rules[q]
		return own.Window <= d.cfg.Rules[r].Window && share >= own.Threshold-epsilon && d.applies(q, n.key)
	})
}

// along adds to the candidates the addresses that keep as large a share of the
// slots as one of them, and will have kept it as long in a moment.
func (d *Detector) along(active []uint32) {
	first := d.cands
	for _, r := range d.levels[0].sat {
		if !slices.ContainsFunc(first, func(c candidate) bool { return c.rule == r }) {
			continue
		}
		rule := &d.cfg.Rules[r]
		for _, i := range active {
			n := d.nodes.at(i)
			if n.cool > d.now || !d.applies(r, n.key) || slices.ContainsFunc(d.cands, func(c candidate) bool { return c.node == i }) {
				continue
			}
			t := d.threshold(n, rule)
			if s := d.score(i, r); float64(n.held) >= t*float64(d.capacity)-epsilon && s >= alongFactor*t-epsilon {
				d.cands = append(d.cands, candidate{node: i, rule: r, score: s, threshold: alongFactor * t})
			}
		}
	}
}

// isStale says whether the known good n only holds slots, see staleAfter.
func (d *Detector) isStale(n *node, e *good, r int, score float64) bool {
	rule := &d.cfg.Rules[r]
	return rule.Metric == Saturation && int64(rule.Window) >= staleAfter && n.held > 0 &&
		d.now-d.offset-e.last > int64(rule.Window) &&
		score*float64(d.capacity) >= staleShare
}

// evaluate judges all that hold slots, at a step of the grid.
func (d *Detector) evaluate() {
	for lv := range d.levels {
		l := &d.levels[lv]
		d.cands = d.cands[:0]
		if d.p > 0 && len(l.sat) > 0 {
			for _, i := range l.active {
				if d.nodes.at(i).wake <= d.integral {
					d.judge(i, l.sat)
				}
			}
			if lv == 0 {
				d.along(l.active)
			}
		}
		if lv > 0 && len(l.opn) > 0 {
			for _, i := range d.stormy {
				if int(d.nodes.at(i).level) == lv {
					d.judge(i, l.opn)
				}
			}
		}
		slices.SortStableFunc(d.cands, func(a, b candidate) int { return cmp.Compare(b.score, a.score) })
		for j := range d.cands {
			d.pronounce(&d.cands[j])
		}
	}
	for _, i := range d.stormy {
		d.nodes.at(i).listed = false
	}
	d.stormy = d.stormy[:0]
	d.followHot()
}

// judge makes a candidate of node i if it crosses one of rules, which are all
// of its level with one metric. If not, it notes how much is missing.
func (d *Detector) judge(i uint32, rules []int) {
	n := d.nodes.at(i)
	if n.cool > d.now {
		return
	}
	room := math.Inf(1)
	for _, r := range rules {
		rule := &d.cfg.Rules[r]
		if n.level == 0 && !d.applies(r, n.key) {
			continue
		}
		s := d.score(i, r)
		room = min(room, d.room(r, n.level, s))
		if rule.Metric == Saturation && d.now%d.step[r] != 0 {
			continue
		}
		if n.level == 0 {
			if s < rule.Threshold-epsilon {
				continue
			}
			if t := d.threshold(n, rule); s >= t-epsilon {
				d.cands = append(d.cands, candidate{node: i, rule: r, score: s, threshold: t})
				return
			}
			continue
		}
		t := d.prefixThreshold(n, rule)
		if s < t-epsilon {
			continue
		}
		if c, ok := d.judgePrefix(i, r, s, t); ok {
			d.cands = append(d.cands, c)
			return
		}
	}
	if d.cfg.Rules[rules[0]].Metric == Saturation {
		n.wake = d.integral + max(0, room)*float64(d.capacity)/float64(n.held)
	} else {
		n.calm = n.opens + opensIn(room)
	}
}

// Most sources are far from every threshold most of the time, and need not be
// looked at: a score grows by no more than what is held, times the pressure,
// or by one with each open, and only shrinks by itself. So what is missing to
// the lowest threshold of all says for how long nothing can happen; node.wake
// and node.calm keep that.

// room is what a source at level, whose score under rule r is s, at least
// lacks to cross it: slot-time in seconds by slot of the capacity, or opens.
func (d *Detector) room(r int, level uint8, s float64) float64 {
	rule := &d.cfg.Rules[r]
	t := rule.Threshold - 2*epsilon - s
	if rule.Metric == Opens {
		return t
	}
	if level > 0 {
		t -= rule.Threshold * (1 - scarFactor)
	}
	return t * rule.Window.Seconds()
}

// opensIn is room as a number of opens.
func opensIn(room float64) uint32 { return uint32(max(0, min(math.Ceil(room), math.MaxInt32))) }

// ease is the room of a source at lv that did nothing yet.
func (d *Detector) ease(lv int) (slack float64, calm uint32) {
	slack, opens := math.Inf(1), math.Inf(1)
	for _, r := range d.levels[lv].sat {
		slack = min(slack, d.room(r, uint8(lv), 0))
	}
	for _, r := range d.levels[lv].opn {
		opens = min(opens, d.room(r, uint8(lv), 0))
	}
	return slack, opensIn(opens)
}

// hurry shortens the rest of n, at lv, which held was slots and gets one more.
func (d *Detector) hurry(n *node, was int32, lv *level) {
	switch {
	case was > 0 && n.wake > d.integral:
		n.wake = d.integral + (n.wake-d.integral)*float64(was)/float64(was+1)
	case was == 0 && n.sat == 0:
		n.wake = d.integral + lv.slack*float64(d.capacity)
	default:
		n.wake = 0
	}
}

// wakeAll has everyone judged at the next step of the grid.
func (d *Detector) wakeAll() {
	for lv := range d.levels {
		for _, i := range d.levels[lv].active {
			d.nodes.at(i).wake = 0
		}
	}
}

// prefixThreshold is what prefix n has to reach to cross rule.
func (d *Detector) prefixThreshold(n *node, rule *Rule) float64 {
	t := rule.Threshold
	if rule.Metric != Saturation {
		return t
	}
	for {
		if n.scar > d.now {
			return t * scarFactor
		}
		if n.parent == 0 {
			return t
		}
		n = d.nodes.at(n.parent)
	}
}

// judgePrefix says whether prefix i, whose members reach s all together,
// crosses rule r by those that count.
func (d *Detector) judgePrefix(i uint32, r int, s, threshold float64) (candidate, bool) {
	rule := &d.cfg.Rules[r]
	t := d.tally(i, r)
	c := candidate{node: i, rule: r, threshold: threshold, tally: t}
	c.score = s - t.told - t.good
	if c.crosses(t.badN, rule.MinSources) {
		return c, true
	}
	if t.staleN > 0 {
		c.threshold = raised(rule, threshold*d.goods.factor)
		c.score += t.stale
		c.stale = true
		return c, c.crosses(t.badN+t.staleN, rule.MinSources)
	}
	return c, false
}

// crosses says whether c's score is enough, with sources distinct addresses.
func (c *candidate) crosses(sources, least int) bool {
	if sources < max(1, least) || c.score < c.threshold-epsilon {
		return false
	}
	var part float64
	for j, v := range c.tally.largest {
		if part += v; part >= concentrated*c.score-epsilon {
			return c.score >= c.threshold*float64(j+1)/concentrated-epsilon
		}
	}
	return true
}

// storm judges address i, and marks prefixes around it to be judged, after it
// opened a connection.
func (d *Detector) storm(i uint32) {
	n := d.nodes.at(i)
	if rules := d.levels[0].opn; len(rules) > 0 && n.cool <= d.now && n.restless() {
		d.cands = d.cands[:0]
		d.judge(i, rules)
		for j := range d.cands {
			d.pronounce(&d.cands[j])
		}
	}
	for p := n.parent; p != 0; p = d.nodes.at(p).parent {
		n := d.nodes.at(p)
		if n.listed || n.cool > d.now || !n.restless() {
			continue
		}
		room := math.Inf(1)
		for _, r := range d.levels[n.level].opn {
			s := d.opnScore(n, d.window[r])
			if s >= d.cfg.Rules[r].Threshold-epsilon {
				n.listed = true
				d.stormy = append(d.stormy, p)
				break
			}
			room = min(room, d.room(r, n.level, s))
		}
		if !n.listed {
			n.calm = n.opens + opensIn(room)
		}
	}
}

// restless says whether n opened so many connections that it may be over a
// threshold. The count may run over.
func (n *node) restless() bool { return int32(n.opens-n.calm) >= 0 }

// pronounce makes the verdict on c.
func (d *Detector) pronounce(c *candidate) {
	n := d.nodes.at(c.node)
	if n.cool > d.now {
		return // by another rule, in this evaluation
	}
	rule := &d.cfg.Rules[c.rule]
	n.cool = d.now + int64(rule.Window)
	v := d.verdict(c.node, c.rule, c.score, c.threshold)
	d.proof.missed = d.proof.missed || v.Unproven
	if n.level == 0 {
		d.out = append(d.out, v)
		return
	}
	v.Sources = c.tally.badN
	if c.stale {
		v.Sources += c.tally.staleN
	}
	in := d.goodIn(n.key)
	if len(in) == 0 {
		for p := n.parent; p != 0 && !v.Unproven; p = d.nodes.at(p).parent {
			d.nodes.at(p).scar = d.now + scarFor
		}
		d.out = append(d.out, v)
		return
	}
	v.KnownGood = len(in)
	for _, e := range in[:min(len(in), maxSpared)] {
		v.Spared = append(v.Spared, e.key.addr())
	}
	d.out = append(d.out, v)
	sum, count := c.tally.bad, c.tally.badN
	if c.stale {
		sum, count = sum+c.tally.stale, count+c.tally.staleN
	}
	d.spare(hot{
		node: c.node, rule: c.rule, until: n.cool, stale: c.stale,
		threshold: memberShare * sum / float64(max(1, count)), suspects: count,
	})
}

// verdict says that node i crossed rule r now.
func (d *Detector) verdict(i uint32, r int, score, threshold float64) Verdict {
	n := d.nodes.at(i)
	rule := &d.cfg.Rules[r]
	return Verdict{
		Time:      d.logTime(d.now),
		Source:    n.key.prefix(),
		Rule:      rule.Name,
		Metric:    rule.Metric,
		Window:    rule.Window,
		Score:     score,
		Threshold: threshold,
		Held:      int(n.held),
		Sources:   1,
		Opens:     int(n.opens),
		Refused:   int(n.refused),
		Accepted:  int(n.accepted),
		Capacity:  d.capacity,
		Count:     d.Count(),
		Unproven:  rule.Metric == Saturation && !d.proven(rule.Window),
		First:     d.logTime(n.first),
		Evidence:  d.evidence(n.key, rule.Metric),
	}
}

// evidence is a sample of the connections of k: for slots, those held longest;
// for storms, the latest.
func (d *Detector) evidence(k key, m Metric) []Evidence {
	ev := make([]Evidence, 0, maxEvidence)
	if m == Saturation {
		if k.bits == 128 {
			for h := d.nodes.at(d.find(k)).head; h != 0 && len(ev) < maxEvidence; h = d.holders.at(h).down {
				ev = append(ev, d.evidenceOf(h))
			}
			return ev
		}
		for _, l := range [...]*byAge{&d.old, &d.young} {
			for h := l.head; h != 0 && len(ev) < maxEvidence; h = d.holders.at(h).next {
				if k.contains(d.nodes.at(d.holders.at(h).node).key) {
					ev = append(ev, d.evidenceOf(h))
				}
			}
		}
		return ev
	}
	for back := uint32(1); back <= min(d.recentN, uint32(len(d.recent))) && len(ev) < maxEvidence; back++ {
		if o := &d.recent[(d.recentN-back)%uint32(len(d.recent))]; k.contains(o.key) {
			ev = append(ev, Evidence{Time: d.logTime(o.t), Source: o.key.addr(), Port: o.port, Count: int(o.count)})
		}
	}
	slices.Reverse(ev)
	return ev
}

func (d *Detector) evidenceOf(h uint32) Evidence {
	x := d.holders.at(h)
	return Evidence{Time: d.logTime(x.since), Source: d.nodes.at(x.node).key.addr(), Port: x.port, Count: int(x.count)}
}
