package main

import (
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// dates puts events of a log at times that can be true. The daemon compares a
// line's time with its clock; a log that is read later has no clock, so here
// the lines around it say when a line was written, for a log is in order. A
// time counts if it lies between the middle (the median) of the times before
// it and that of the times after it; else the line was forged or garbled, and
// has the time of the line before.
//
// As many as nearby/2 such lines in a row are found; of those that are a day
// or more later than the file was last written, any number. Where time really goes back, because a
// clock was set or summer time ended, the lines that follow agree, and count.
type dates struct {
	before   []int64 // the last times that counted, in ns since 1970, at most nearby
	now      time.Time
	sorted   []int64 // room for middle
	after    []int64
	misdated uint64 // lines that got another time
}

const (
	// nearby is how many events on either side are asked.
	nearby = 31
	// dateSlack is how far lines may be out of order: Exim's processes write
	// each for itself, and the daemon allows as much.
	dateSlack = 15 * time.Second
	// loneSlack is how far the first and the last lines of a log may be from
	// the others: logs are rotated by the month at the latest.
	loneSlack = 32 * 24 * time.Hour
	// zoneMost is how far lines without an offset may seem to be of the
	// future, if the log is of another zone than we think.
	zoneMost = 26 * time.Hour
	// few events at the end of a log do not outweigh what is before.
	few = nearby / 2
	// backMost is how far a clock may be set back within a log.
	backMost = 24 * time.Hour
)

// correct goes over the events of a block. next is the block after it, nil if
// there is none; written is when the file was last written to.
func (d *dates) correct(b, next *block, written time.Time) {
	for i := range b.events {
		ev := &b.events[i]
		if ev.Time.IsZero() {
			continue
		}
		if off := ev.Time.Sub(d.now); d.now.IsZero() || off > dateSlack || off < -dateSlack {
			d.gather(b.events[i+1:], next)
			if !d.credible(ev.Time.UnixNano(), written.UnixNano()) {
				d.misdated++
				if !d.now.IsZero() {
					ev.Time = d.now
				} else if len(d.after) > 0 {
					ev.Time = time.Unix(0, d.earliest()).In(ev.Time.Location())
				}
				continue
			}
		}
		d.now = ev.Time
		if len(d.before) == nearby {
			d.before = append(d.before[:0], d.before[1:]...)
		}
		d.before = append(d.before, ev.Time.UnixNano())
	}
}

// gather notes the times of the next events.
func (d *dates) gather(events []detector.Event, next *block) {
	d.after = d.after[:0]
	for {
		for i := range events {
			if len(d.after) == nearby {
				return
			}
			if !events[i].Time.IsZero() {
				d.after = append(d.after, events[i].Time.UnixNano())
			}
		}
		if next == nil {
			return
		}
		events, next = next.events, nil
	}
}

// credible reports whether a line among the others may be of time t.
func (d *dates) credible(t, written int64) bool {
	const slack = int64(dateSlack)
	if len(d.before) == 0 && len(d.after) == 0 {
		return true
	}
	if len(d.before) == 0 {
		return d.earliest()-int64(loneSlack) <= t && t <= d.middle(d.after)+slack
	}
	lo := d.middle(d.before)
	if later := written + int64(zoneMost); t > later && lo <= later {
		return false
	}
	hi := lo
	if len(d.after) > 0 {
		hi = d.middle(d.after)
	}
	switch {
	case len(d.after) == 0, lo > hi && len(d.after) < few: // too few to say that time went back
		hi = d.now.UnixNano() + int64(loneSlack)
		if lo <= written {
			hi = min(hi, written)
		}
	case lo > hi:
		return hi-int64(backMost) <= t && t <= lo+slack
	}
	return lo-slack <= t && t <= hi+slack
}

// earliest is the first time after that is not far from the others.
func (d *dates) earliest() int64 {
	d.sorted = append(d.sorted[:0], d.after...)
	slices.Sort(d.sorted)
	const odd = 2 // that may be forged
	third := d.sorted[min(odd, len(d.sorted)/2)]
	for _, t := range d.sorted {
		if t >= third-int64(loneSlack) {
			return t
		}
	}
	return third
}

// middle is the median.
func (d *dates) middle(times []int64) int64 {
	d.sorted = append(d.sorted[:0], times...)
	slices.Sort(d.sorted)
	return d.sorted[len(d.sorted)/2]
}

// typical is the middle of the first times of a log, by which logs are put in
// order: a single line says little.
func typical(times []int64) int64 {
	if len(times) == 0 {
		return 0
	}
	return (&dates{}).middle(times)
}
