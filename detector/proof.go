package detector

import "time"

// Is the server full?
//
// Where its capacity was stated, the count says so. Where it is a guess, the
// count says nothing: 96 connections fill a server of 100 slots and are a
// fifth of one of 500. Then only the server itself can tell, by turning
// somebody away for want of a slot. Until it does, verdicts on saturation are
// Unproven: they are told, and nobody is to be blocked for them.

// proof is what bears out that the server is full when the count says it is.
type proof struct {
	// inferred: the capacity is what the server, in its present run, said when
	// it turned somebody away, or the count at which it did, and it never took
	// more since.
	inferred bool
	full     bool  // it ever turned somebody away for want of a slot,
	at       int64 // the last time then
	// missed: a verdict was made without proof, and its source is silent.
	missed bool
}

// proven reports whether a verdict over window is borne out.
func (d *Detector) proven(window time.Duration) bool {
	return d.cfg.Capacity > 0 || d.proof.inferred || d.proof.full && d.now-d.proof.at <= int64(window)
}

// Disproved reports whether the server has counted more slots taken in its
// present run than it was stated to have, and turned nobody away over window:
// then it is not full when that number says so.
func (d *Detector) Disproved(window time.Duration) bool {
	return d.cfg.Capacity > 0 && d.maxCount > d.cfg.Capacity && !(d.proof.full && d.now-d.proof.at <= int64(window))
}

// turnedAway notes that the server has no slot left. Sources that are silent
// after a verdict without proof are judged again at once.
func (d *Detector) turnedAway() {
	d.proof.full, d.proof.at = true, d.now
	d.judgeAgain()
}

// stated: the server said that it has n slots, when none was left but those in
// reserve. What it did before is above what it says: a number that it was
// beyond already is not its own. With the kernel's table the number is not
// taken, as no other of the log is: a local user can write such a line, and a
// server of 15 slots makes a hog of every second sender.
func (d *Detector) stated(n int) {
	if n < max(d.maxCount, d.Count()) {
		return
	}
	d.turnedAway()
	if d.cfg.Sampled || d.cfg.Capacity != 0 || n < minCapacity || n > maxCapacity {
		return
	}
	if n < d.capacity {
		d.wakeAll() // all shares are larger now
	}
	d.capacity, d.how, d.proof.inferred = n, CapacityStated, true
	d.p = d.weight()
}

func (d *Detector) judgeAgain() {
	if !d.proof.missed {
		return
	}
	d.proof.missed = false
	d.hots = d.hots[:0]
	for lv := range d.levels {
		for _, i := range d.levels[lv].active {
			d.nodes.at(i).cool = 0
		}
	}
	d.wakeAll()
}

// SetCapacity says that the server has n slots from now on: it was not known
// before, or has changed. 0: it is not known any more, and what it was stays as
// a guess.
func (d *Detector) SetCapacity(n int) {
	n = min(max(n, 0), maxCapacity)
	if n == d.cfg.Capacity {
		return
	}
	if n == 0 {
		d.cfg.Capacity, d.how, d.proof.inferred = 0, CapacityAssumed, false
		return
	}
	d.cfg.Capacity, d.capacity, d.how = n, n, CapacityConfigured
	d.judgeAgain()
	d.wakeAll() // all shares may be larger now
	d.p = d.weight()
}

// Inherit takes over what another detector knows of the same server, though
// not of its sources: how many slots it has, as far as d is not told, and
// whether it was seen full.
func (d *Detector) Inherit(from *Detector) {
	d.proof = from.proof
	d.proof.at += d.offset - from.offset
	d.proof.missed = false
	if d.cfg.Capacity > 0 || from.cfg.Capacity > 0 {
		d.proof.inferred = false
		return
	}
	d.capacity, d.how, d.maxCount = from.capacity, from.how, max(d.maxCount, from.maxCount)
}
