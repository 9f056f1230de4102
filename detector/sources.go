package detector

import (
	"slices"
	"unsafe"
)

// node is one source: an address, or a prefix of a length that some rule
// looks at. Nodes form trees: an address hangs below its narrowest such
// prefix, that below the next wider one. A prefix counts on its own account
// what its members do, so that it still knows when they are evicted.
type node struct {
	key         key
	first, last int64 // nanoseconds, detector's time
	// cool is until when the source had its verdict: it gives no other one,
	// and prefixes around it are scored without it.
	cool int64
	// scar is until when a prefix inside this one is remembered to have had
	// a verdict: until then half the threshold is enough here and inside.
	scar int64

	// lastT and lastP are time and integral of the pressure up to which the
	// saturation rings are written.
	lastT int64
	lastP float64
	// wake is the integral of the pressure before which the source crosses no
	// saturation rule, whatever happens but that it gets another slot; 0 then,
	// and when nothing is known.
	wake float64
	// lastOpen is the time of the last open, 0: none. The opens rings are
	// written up to it; while there are none it stands for itself alone.
	lastOpen int64

	parent, child, next, prev uint32
	sat, opn                  uint32 // numbers of the rings, 0: none
	head, tail                uint32 // holders, oldest first (addresses only)
	pos                       uint32 // place in levels[level].active, if held > 0
	held                      int32
	opens, refused, accepted  uint32
	// calm is the number of opens before which it crosses no rule on opens.
	calm   uint32
	level  uint8
	listed bool // in Detector.stormy
}

// level is a prefix length of one family, or (level 0) single addresses.
type level struct {
	bits   uint8 // of 128
	v4     bool
	active []uint32 // nodes with held > 0
	sat    []int    // rules, by number
	opn    []int
	// opens is set if opens are counted here: for a rule of this level, or
	// because a wider one must be able to leave this one out.
	opens bool
	// No source here that did nothing yet crosses a rule with less than so
	// much slot-time, in seconds by slot of the capacity, and before so many
	// opens. See hurry and node.calm.
	slack float64
	calm  uint32
}

// What one of each costs, in bytes, with its place in the tables at their
// emptiest, right after they grew.
const (
	nodeBytes   = int64(unsafe.Sizeof(node{}))
	holderBytes = int64(unsafe.Sizeof(holder{}))
	goodBytes   = int64(unsafe.Sizeof(good{}))

	nodeCost   = nodeBytes + 22 + 4
	holderCost = holderBytes + 22 + 4
	goodCost   = goodBytes + 22 + 4
)

// budget divides the memory: fixed shares, so that a flood of one sort (new
// addresses, say) cannot take what another sort (held slots) needs.
func (d *Detector) budget() {
	m := float64(d.cfg.Memory)
	m -= min(float64(int64(d.cfg.KnownGood.Max)*goodCost), m/3)
	d.goods.max = max(1, min(d.cfg.KnownGood.Max, int(d.cfg.Memory/3/goodCost)))

	// Address and up to width-1 prefixes around it.
	width := max(len(d.chain4), len(d.chain6)) + 1
	satCost := float64(d.sat.stride*8 + 8)
	opnCost := float64(d.opn.stride*4 + 8)
	d.nodes.max = uint32(min(0.45*m/float64(nodeCost), 1<<30))
	d.sat.max = int(min(0.30*m/satCost, 1<<30))
	d.opn.max = int(min(0.15*m/opnCost, 1<<30))
	// What is held is never evicted: it must fit into all of these.
	h := min(0.10*m/float64(holderCost), 0.8*float64(d.sat.max)/float64(width), 0.8*float64(d.nodes.max)/float64(width))
	d.holders.max = uint32(h)
}

// find is the node of k, or 0.
func (d *Detector) find(k key) uint32 {
	h := d.index.hash(k)
	n, at := d.index.next(h, h)
	for n != 0 && d.nodes.at(n).key != k {
		n, at = d.index.next(h, at+1)
	}
	return n
}

// source is the node of address k, made if need be with the prefixes around
// it; 0 if there is no room (everything is held by somebody).
func (d *Detector) source(k key) uint32 {
	if i := d.find(k); i != 0 {
		return i
	}
	chain := d.chain6
	if k.is4() {
		chain = d.chain4
	}
	parent := uint32(0)
	for j := len(chain) - 1; j >= 0; j-- { // from wide to narrow
		lv := chain[j]
		pk := k.to(d.levels[lv].bits)
		i := d.find(pk)
		if i == 0 {
			if i = d.add(pk, lv, parent); i == 0 {
				return 0
			}
		}
		parent = i
	}
	return d.add(k, 0, parent)
}

func (d *Detector) add(k key, lv uint8, parent uint32) uint32 {
	i := d.nodes.alloc()
	if i == 0 {
		d.evict(parent)
		if i = d.nodes.alloc(); i == 0 {
			d.stats.Ignored++
			return 0
		}
	}
	n := d.nodes.at(i) // zeroed
	n.key, n.level, n.parent, n.calm = k, lv, parent, d.levels[lv].calm
	n.first, n.last, n.lastT, n.lastP = d.now, d.now, d.now, d.integral
	d.index.put(d.index.hash(k), i)
	if parent != 0 {
		p := d.nodes.at(parent)
		if p.child != 0 {
			d.nodes.at(p.child).prev = i
		}
		n.next = p.child
		p.child = i
	}
	if lv == 0 {
		d.stats.Sources++
	}
	return i
}

// dull is a score that says nothing: a thousandth of any sensible threshold.
const dull = 1e-4

// evict removes one source that holds nothing: the first that is dull, or
// else, of eight, the one with the smallest contribution. keep stays. The
// places are gone round in order, so what is new stays longest.
func (d *Detector) evict(keep uint32) {
	const sample, most = 8, 4096
	var best uint32
	var bestScore float64
	for seen, tried := 0, 0; seen < sample && tried < most && d.nodes.used > 0; tried++ {
		d.hand++
		if d.hand > d.nodes.used {
			d.hand = 1
		}
		i := d.hand
		n := d.nodes.at(i)
		// A free number has an invalid key.
		if n.key.bits == 0 || i == keep || n.child != 0 || n.held > 0 || n.cool > d.now {
			continue
		}
		seen++
		var score float64
		for w := range d.satWindows {
			score = max(score, d.satScore(i, w))
		}
		for w := range d.opnWindows {
			// A connection weighs little beside held slots; this only keeps
			// the busiest.
			score = max(score, (d.opnScore(n, w)-1)/1000)
		}
		if best == 0 || score < bestScore {
			best, bestScore = i, score
		}
		if score <= dull {
			break
		}
	}
	if best != 0 {
		d.drop(best)
		d.stats.Evicted++
	}
}

// drop removes a node without children and without held slots.
func (d *Detector) drop(i uint32) {
	n := d.nodes.at(i)
	if n.sat != 0 {
		d.sat.release(n.sat)
	}
	if n.opn != 0 {
		d.opn.release(n.opn)
	}
	if n.prev != 0 {
		d.nodes.at(n.prev).next = n.next
	} else if n.parent != 0 {
		d.nodes.at(n.parent).child = n.next
	}
	if n.next != 0 {
		d.nodes.at(n.next).prev = n.prev
	}
	if n.level == 0 {
		d.stats.Sources--
	}
	if n.listed {
		d.stormy = slices.DeleteFunc(d.stormy, func(j uint32) bool { return j == i })
	}
	if len(d.hots) > 0 {
		d.hots = slices.DeleteFunc(d.hots, func(h hot) bool { return h.node == i })
	}
	d.index.delete(d.index.hash(n.key), i)
	*n = node{}
	d.nodes.release(i)
}

// change adds delta to what address i and the prefixes around it hold.
func (d *Detector) change(i uint32, delta int32) {
	for i != 0 {
		n := d.nodes.at(i)
		if n.lastP != d.integral {
			d.accrue(i) // else there is nothing to write for what it held till now
		}
		was := n.held
		n.held += delta
		lv := &d.levels[n.level]
		if delta > 0 {
			d.hurry(n, was, lv)
		}
		switch {
		case was == 0:
			n.pos = uint32(len(lv.active))
			lv.active = append(lv.active, i)
		case n.held == 0:
			last := lv.active[len(lv.active)-1]
			lv.active[n.pos] = last
			d.nodes.at(last).pos = n.pos
			lv.active = lv.active[:len(lv.active)-1]
		}
		i = n.parent
	}
}

// accrue writes what node i held up to now into its rings, which it makes
// when there is something to write.
func (d *Detector) accrue(i uint32) {
	n := d.nodes.at(i)
	if n.lastT == d.now {
		return
	}
	if n.sat == 0 {
		if n.held == 0 || d.integral == n.lastP || len(d.satWindows) == 0 {
			n.lastT, n.lastP = d.now, d.integral
			return
		}
		if n.sat = d.newSat(i); n.sat == 0 {
			d.stats.Ignored++
			n.lastT, n.lastP = d.now, d.integral
			return
		}
	}
	r := d.sat.at(n.sat)
	for j := range d.satWindows {
		w := &d.satWindows[j]
		ring := r[j*ringLen : (j+1)*ringLen]
		k0 := n.lastT / w.sub
		turn(w, ring, k0)
		if n.held == 0 || d.integral == n.lastP {
			continue
		}
		for k := max(k0, w.k-subWindows); k <= w.k; k++ {
			from, to := n.lastP, d.integral
			if k > k0 {
				from = w.bounds[k&15]
			}
			if k < w.k {
				to = w.bounds[(k+1)&15]
			}
			ring[k%ringLen] += float64(n.held) * (to - from)
		}
	}
	n.lastT, n.lastP = d.now, d.integral
}

// newSat makes saturation rings for node i. When there are no more, those of a
// source without held slots go: the first that are no more than what is to be
// written, or else the smallest of eight.
func (d *Detector) newSat(i uint32) uint32 {
	if len(d.sat.free) == 0 {
		d.sweepSat()
	}
	if r := d.sat.alloc(i); r != 0 {
		return r
	}
	var best uint32
	var bestScore float64
	n := d.nodes.at(i)
	own := float64(n.held) * (d.integral - n.lastP) / (float64(d.capacity) * seconds(d.satShortest))
	for seen, tried := 0, 0; seen < 8 && tried < 4096; tried++ {
		o := d.sat.step()
		if o == 0 || d.nodes.at(o).held > 0 {
			continue
		}
		seen++
		score := 0.0
		for w := range d.satWindows {
			score = max(score, d.satScore(o, w))
		}
		if best == 0 || score < bestScore {
			best, bestScore = o, score
		}
		if score <= own {
			break
		}
	}
	if best == 0 {
		return 0
	}
	n = d.nodes.at(best)
	d.sat.release(n.sat)
	n.sat = 0
	d.stats.Evicted++
	return d.sat.alloc(i)
}

// sweepSat frees up to two rings in which nothing is left.
func (d *Detector) sweepSat() {
	for range 2 {
		if o := d.sat.step(); o != 0 {
			n := d.nodes.at(o)
			if n.held == 0 && d.now-n.lastT > d.satMemory {
				d.sat.release(n.sat)
				n.sat = 0
			}
		}
	}
}

// step is the owner of the next record, in a circle; 0 if it is free.
func (r *rings[T]) step() uint32 {
	if len(r.owner) == 0 {
		return 0
	}
	r.hand++
	if int(r.hand) >= len(r.owner) {
		r.hand = 1
	}
	if int(r.hand) >= len(r.owner) {
		return 0
	}
	return r.owner[r.hand]
}

// satScore is the share of the server's slot-time that node i held in window
// w, now.
func (d *Detector) satScore(i uint32, w int) float64 {
	d.accrue(i)
	n := d.nodes.at(i)
	if n.sat == 0 {
		return 0
	}
	win := &d.satWindows[w]
	ring := d.sat.at(n.sat)[w*ringLen : (w+1)*ringLen]
	return max(0, sum(win, ring, win.k, d.now)/(float64(d.capacity)*seconds(win.length)))
}

// countOpen notes that address i and the prefixes around it opened a
// connection now.
func (d *Detector) countOpen(i uint32) {
	for i != 0 {
		n := d.nodes.at(i)
		n.opens++
		n.last = d.now
		if d.levels[n.level].opens {
			d.writeOpen(i, n)
		}
		i = n.parent
	}
}

func (d *Detector) writeOpen(i uint32, n *node) {
	prev := n.lastOpen
	n.lastOpen = d.now
	if n.opn == 0 {
		if prev == 0 || d.now-prev > d.opnMemory || len(d.opnWindows) == 0 {
			return // alone: lastOpen says it all
		}
		if n.opn = d.newOpn(i); n.opn == 0 {
			d.stats.Ignored++
			return
		}
		r := d.opn.at(n.opn)
		for j := range d.opnWindows {
			w := &d.opnWindows[j]
			if k := prev / w.sub; w.k-k < ringLen {
				r[j*ringLen+int(k%ringLen)] = 1
			}
		}
	}
	r := d.opn.at(n.opn)
	for j := range d.opnWindows {
		w := &d.opnWindows[j]
		ring := r[j*ringLen : (j+1)*ringLen]
		turn(w, ring, prev/w.sub)
		ring[w.k%ringLen]++
	}
}

// newOpn makes opens rings for node i; when there are no more, the smallest of
// eight go.
func (d *Detector) newOpn(i uint32) uint32 {
	if len(d.opn.free) == 0 {
		d.sweepOpn()
	}
	if r := d.opn.alloc(i); r != 0 {
		return r
	}
	var best uint32
	var bestScore float64
	for seen, tried := 0, 0; seen < 8 && tried < 4096; tried++ {
		o := d.opn.step()
		if o == 0 {
			continue
		}
		seen++
		score := 0.0
		for w := range d.opnWindows {
			score = max(score, d.opnScore(d.nodes.at(o), w))
		}
		if best == 0 || score < bestScore {
			best, bestScore = o, score
		}
	}
	if best == 0 {
		return 0
	}
	n := d.nodes.at(best)
	d.opn.release(n.opn)
	n.opn = 0
	d.stats.Evicted++
	return d.opn.alloc(i)
}

// sweepOpn frees up to two rings in which nothing is left.
func (d *Detector) sweepOpn() {
	for range 2 {
		if o := d.opn.step(); o != 0 {
			if n := d.nodes.at(o); d.now-n.lastOpen > d.opnMemory {
				d.opn.release(n.opn)
				n.opn = 0
			}
		}
	}
}

// opnScore is the number of connections that n opened in window w, now.
func (d *Detector) opnScore(n *node, w int) float64 {
	if n.lastOpen == 0 {
		return 0
	}
	win := &d.opnWindows[w]
	k := n.lastOpen / win.sub
	if n.opn != 0 {
		return sum(win, d.opn.at(n.opn)[w*ringLen:(w+1)*ringLen], k, d.now)
	}
	switch age := win.k - k; {
	case age < subWindows:
		return 1
	case age == subWindows:
		return 1 - win.frac(d.now)
	}
	return 0
}

// score is the metric of rule r for node i, now.
func (d *Detector) score(i uint32, r int) float64 {
	if d.cfg.Rules[r].Metric == Opens {
		return d.opnScore(d.nodes.at(i), d.window[r])
	}
	return d.satScore(i, d.window[r])
}
