package detector

import "time"

// clock turns the times of events into the detector's own time, which never
// runs backwards.
//
//   - An event that is older than the one before counts at the time of the
//     latest one: many processes write one log, out of order by milliseconds.
//   - If a hundred events in a row are older by more than two seconds, the
//     clock was set back, or one line came from the future. From then on their
//     time is the time: windows go on without a jump, and verdicts carry the
//     log's time again.
//   - A jump forward by more than five minutes is believed when the next event
//     with a time is no older (give or take two seconds). Until then the
//     event that jumped waits; if the next is older, it counts as of now. So
//     one garbled or forged line from the future changes nothing; after a
//     long silence the first event is seen one event late.
type clock struct {
	started bool
	offset  int64 // own time = log time + offset
	back    int   // events in a row that were too old
	waiting bool
	waits   Event // the event that jumped
}

const (
	disorder    = int64(2 * time.Second)
	jump        = int64(5 * time.Minute)
	backsToTurn = 100
)

// logNanos is t in nanoseconds since 1970; 0 for none, and for times that are
// no log's: before 1990 and after 2200.
func logNanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	if s := t.Unix(); s < 631152000 || s > 7258118400 {
		return 0
	}
	return t.UnixNano()
}

// logTime is own time t as the log would write it (in UTC), the zero time if
// none is known.
func (d *Detector) logTime(t int64) time.Time {
	if t == 0 || !d.started {
		return time.Time{}
	}
	return time.Unix(0, t-d.offset).UTC()
}

// tell finds the time of ev and applies it.
func (d *Detector) tell(ev *Event) {
	l := logNanos(ev.Time)
	if l == 0 {
		d.unwait(d.now)
		d.apply(ev, d.now)
		return
	}
	if !d.started {
		d.start(l)
	}
	t := l + d.offset
	if d.waiting {
		if w := logNanos(d.waits.Time) + d.offset; t >= w-disorder {
			d.unwait(w)
		} else {
			d.unwait(d.now)
		}
	}
	switch {
	case t > d.now+jump:
		d.back = 0
		d.waits, d.waiting = *ev, true
		return
	case t < d.now-disorder:
		if d.back++; d.back >= backsToTurn {
			d.back = 0
			d.offset += d.now - t
		}
		t = d.now
	default:
		d.back = 0
		t = max(t, d.now)
	}
	d.apply(ev, t)
}

// unwait applies the waiting event, if any.
func (d *Detector) unwait(t int64) {
	if d.waiting {
		d.waiting = false
		ev := d.waits
		d.apply(&ev, max(t, d.now))
	}
}

// start takes the first time of the log.
func (d *Detector) start(l int64) {
	d.started = true
	if d.lastReal != 0 {
		d.offset = d.now - l // events without a time came before it
		return
	}
	d.now = l
	for i := range d.satWindows {
		d.satWindows[i] = newWindow(time.Duration(d.satWindows[i].length), l)
	}
	for i := range d.opnWindows {
		d.opnWindows[i] = newWindow(time.Duration(d.opnWindows[i].length), l)
	}
	d.nextEval = (l/evalStep + 1) * evalStep
}
