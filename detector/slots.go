package detector

import (
	"iter"
	"net/netip"
	"time"
)

// holder is one connection that has a slot.
type holder struct {
	node       uint32 // address
	prev, next uint32 // by age, in its generation
	up, down   uint32 // by age, of the same address
	count      int32
	since      int64
	gen        uint32
	port       uint16
}

// byAge is a list of holders, oldest first.
type byAge struct {
	head, tail uint32
	n          int
}

// Holder is a connection that has a slot.
type Holder struct {
	Addr  netip.Addr `json:"address"`
	Port  uint16     `json:"port,omitempty"` // 0: the log does not say
	Since time.Time  `json:"since"`
}

// Held is the number of connections that hold a slot, as far as is known.
func (d *Detector) Held() int { return d.old.n + d.young.n }

// Holders yields every connection that holds a slot, oldest first. The
// detector must not be used meanwhile.
func (d *Detector) Holders() iter.Seq[Holder] {
	return func(yield func(Holder) bool) {
		for _, list := range [...]*byAge{&d.old, &d.young} {
			for i := list.head; i != 0; i = d.holders.at(i).next {
				h := d.holders.at(i)
				if !yield(Holder{d.nodes.at(h.node).key.addr(), h.port, d.logTime(h.since)}) {
					return
				}
			}
		}
	}
}

// holder finds the connection from port of address k; 0 if there is none.
func (d *Detector) holder(k key, port uint16) uint32 {
	h := d.byPort.hashPort(k, port)
	n, at := d.byPort.next(h, h)
	for n != 0 {
		if x := d.holders.at(n); x.port == port && d.nodes.at(x.node).key == k {
			break
		}
		n, at = d.byPort.next(h, at+1)
	}
	return n
}

// list is the list that h is in.
func (d *Detector) list(h *holder) *byAge {
	if h.gen == d.gen {
		return &d.young
	}
	return &d.old
}

// take gives address i a slot.
func (d *Detector) take(i uint32, port uint16, count int) {
	if port != 0 {
		if h := d.holder(d.nodes.at(i).key, port); h != 0 {
			d.free(h) // its closing line was lost
		}
	}
	if d.Held() >= int(d.holders.max) {
		d.stats.Ignored++
		if d.old.n > 0 {
			d.free(d.old.head)
		} else {
			d.free(d.young.head)
		}
	}
	hi := d.holders.alloc()
	if hi == 0 {
		return
	}
	h := d.holders.at(hi)
	*h = holder{node: i, port: port, since: d.now, gen: d.gen, count: int32(min(count, 1<<30)), prev: d.young.tail}
	if h.prev != 0 {
		d.holders.at(h.prev).next = hi
	} else {
		d.young.head = hi
	}
	d.young.tail = hi
	d.young.n++

	n := d.nodes.at(i)
	h.up = n.tail
	if h.up != 0 {
		d.holders.at(h.up).down = hi
	} else {
		n.head = hi
	}
	n.tail = hi
	if port != 0 {
		d.byPort.put(d.byPort.hashPort(n.key, port), hi)
	}
	d.change(i, 1)
}

// free takes a slot back.
func (d *Detector) free(hi uint32) {
	h := d.holders.at(hi)
	l := d.list(h)
	if h.prev != 0 {
		d.holders.at(h.prev).next = h.next
	} else {
		l.head = h.next
	}
	if h.next != 0 {
		d.holders.at(h.next).prev = h.prev
	} else {
		l.tail = h.prev
	}
	l.n--
	n := d.nodes.at(h.node)
	if h.up != 0 {
		d.holders.at(h.up).down = h.down
	} else {
		n.head = h.down
	}
	if h.down != 0 {
		d.holders.at(h.down).up = h.up
	} else {
		n.tail = h.up
	}
	if h.port != 0 {
		d.byPort.delete(d.byPort.hashPort(n.key, h.port), hi)
	}
	if h.gen == d.gen && d.taken > 0 {
		d.taken--
	}
	d.change(h.node, -1)
	d.holders.release(hi)
}

// oldHeldAge is how long a connection from before the server's restart is
// thought to be held where no socket table tells: its process may have been
// ended with the daemon, by systemd or a reboot, and writes no line then. It is
// twice Exim's smtp_receive_timeout as shipped.
const oldHeldAge = 10 * time.Minute

// opened: the server gave a slot to ev.Source.
func (d *Detector) opened(ev *Event) {
	d.stats.Opened++
	// A key that is too old is not believed any more.
	for _, l := range [...]*byAge{&d.old, &d.young} {
		most := d.cfg.MaxHeldAge
		if l == &d.old && !d.cfg.Sampled {
			most = min(most, oldHeldAge)
		}
		for l.head != 0 && d.now-d.holders.at(l.head).since > int64(most) {
			d.free(l.head)
		}
	}
	i := d.source(keyOf(ev.Source))
	if i == 0 {
		return
	}
	before, ended := d.young.n, d.endedEarly(ev)
	d.take(i, ev.Port, ev.Count)
	d.countOpen(i)
	d.recent[d.recentN%uint32(len(d.recent))] = recentOpen{d.nodes.at(i).key, d.now, int32(min(ev.Count, 1<<30)), ev.Port}
	d.recentN++
	count := ev.Count
	if d.cfg.Sampled {
		count = 0 // whoever can write a line can write any number
	}
	d.counted(count, before, ev.Port == 0)
	d.storm(i)
	if ended {
		if h := d.holder(d.nodes.at(i).key, ev.Port); h != 0 {
			d.stats.Closed++
			d.free(h)
		}
	}
}

// earlyClose is a closing line that was written before the opening one: each
// process writes its own lines, and a syslog daemon may deliver them in
// another order. Without it a short session would hold its slot for ever.
type earlyClose struct {
	key     key
	at, log int64 // detector's time and the line's own
	port    uint16
}

// closedEarly remembers a closing line of k for which nothing was open. It
// must not be one too many: whoever can have two closing lines written could
// hide his next connection from the same port.
func (d *Detector) closedEarly(ev *Event, k key) {
	log := logNanos(ev.Time)
	if log == 0 {
		return
	}
	for back := uint32(1); back <= min(d.recentN, uint32(len(d.recent))); back++ {
		o := &d.recent[(d.recentN-back)%uint32(len(d.recent))]
		if d.now-o.t > 2*disorder {
			break
		}
		if o.port == ev.Port && o.key == k {
			return // opened, and closed before
		}
	}
	d.early[d.earlyN%uint32(len(d.early))] = earlyClose{k, d.now, log, ev.Port}
	d.earlyN++
}

// endedEarly says whether the closing line for the opening line ev has come
// already: not long ago, with a time that is no earlier.
func (d *Detector) endedEarly(ev *Event) bool {
	if ev.Port == 0 || d.earlyN == 0 {
		return false
	}
	log, k := logNanos(ev.Time), keyOf(ev.Source)
	for back := uint32(1); back <= min(d.earlyN, uint32(len(d.early))); back++ {
		e := &d.early[(d.earlyN-back)%uint32(len(d.early))]
		if d.now-e.at > 2*disorder {
			break
		}
		if e.port == ev.Port && e.key == k && log != 0 && log <= e.log {
			e.port = 0
			return true
		}
	}
	return false
}

// counted takes the server's own count of taken slots, which came with an
// open line, while before of ours were held by the server's present children.
func (d *Detector) counted(count, before int, portless bool) {
	if count <= 0 {
		// A count that nothing confirmed for so long has drifted.
		if d.anchored && d.now-d.anchor > int64(time.Minute) {
			d.anchored = false
		}
		d.taken = min(d.taken+1, d.capacity)
		return
	}
	d.stats.PeakCount = max(d.stats.PeakCount, count)
	d.learnCapacity(count)
	if count > 1 {
		d.ones, d.limitless = 0, false
	} else if before > 0 && !d.limitless {
		// smtp_accept_max = 0: no slot table, every line says 1.
		d.ones++
		d.limitless = d.ones >= 5
	}
	if d.limitless {
		return
	}
	d.taken, d.anchored, d.anchor = count, true, d.now
	if count == 1 && d.ones > 0 {
		return // not yet known whether it counts at all
	}
	// More are thought open than the server counts: closing lines were
	// lost, or there are none. The oldest go; in the first case only as many
	// as were too many for so long that it is not the order of the lines.
	excess := d.young.n - count
	if !portless && d.stats.Closed*4 > d.stats.Opened-uint64(min(d.stats.Opened, uint64(d.young.n))) {
		if excess -= 8; excess <= 0 {
			d.excess = 0
			return
		}
		if d.excess == 0 {
			d.excess, d.excessFrom = excess, d.now
		}
		d.excess = min(d.excess, excess)
		if d.now-d.excessFrom <= disorder {
			return
		}
		excess, d.excess = d.excess, 0
	}
	for ; excess > 0; excess-- {
		d.free(d.young.head)
		d.stats.Assumed++
		d.taken = count
	}
}

// closed: a connection gave its slot back.
func (d *Detector) closed(ev *Event) {
	k, h := keyOf(ev.Source), uint32(0)
	if ev.Port != 0 {
		h = d.holder(k, ev.Port)
	} else if i := d.find(k); i != 0 {
		h = d.nodes.at(i).head
	}
	if h == 0 {
		if ev.Port != 0 {
			d.closedEarly(ev, k)
		}
		return
	}
	d.nodes.at(d.holders.at(h).node).last = d.now
	d.stats.Closed++
	d.free(h)
}

// refused: the server turned ev.Source away.
func (d *Detector) refused(ev *Event) {
	d.stats.Refused++
	if ev.Source.IsValid() {
		for i := d.source(keyOf(ev.Source)); i != 0; {
			n := d.nodes.at(i)
			n.refused++
			n.last = d.now
			i = n.parent
		}
	}
	if ev.Reason != RefusedFull {
		return
	}
	d.turnedAway()
	if d.cfg.Capacity == 0 && d.maxCount >= minCapacity && !(d.how == CapacityStated && d.proof.inferred) {
		if d.maxCount < d.capacity {
			d.wakeAll() // all shares are larger now
		}
		d.capacity, d.how, d.proof.inferred = d.maxCount, CapacityFromRefusals, true
	}
	if !d.cfg.Sampled { // else the table says how full it is; whoever can write a line can write this one
		d.taken, d.anchored, d.anchor = d.capacity, true, d.now
	}
}

// restarted: the server counts from 0 again; what is open stays open.
func (d *Detector) restarted() {
	if d.young.n > 0 {
		if d.old.tail != 0 {
			d.holders.at(d.old.tail).next = d.young.head
			d.holders.at(d.young.head).prev = d.old.tail
		} else {
			d.old.head = d.young.head
		}
		d.old.tail = d.young.tail
		d.old.n += d.young.n
		d.young = byAge{}
	}
	d.gen++
	d.maxCount, d.ones, d.limitless, d.excess = 0, 0, false, 0
	d.proof.inferred = false // it may have more slots now
	if !d.cfg.Sampled {      // else the next reading of the table tells
		d.taken, d.anchored, d.anchor = 0, true, d.now
	}
}

// sampled: the kernel's table shows count taken slots.
func (d *Detector) sampled(count int) {
	if count < 0 {
		return
	}
	d.stats.PeakCount = max(d.stats.PeakCount, count)
	d.ones, d.limitless = 0, false
	d.taken, d.anchored, d.anchor = count, true, d.now
	if d.cfg.Capacity == 0 && count > d.capacity {
		d.capacity, d.how = min(count, maxCapacity), CapacityFromCount
	}
}

// How the capacity is known.
const (
	CapacityConfigured   = "configured"
	CapacityFromRefusals = "inferred from refused connections"
	CapacityStated       = "stated in the log"
	CapacityFromCount    = "inferred from the highest count"
	CapacityAssumed      = "assumed"

	// A capacity below this is not believed without being configured: every
	// second sender would be a hog.
	minCapacity = 10
)

// Capacity is the number of slots, and how it is known: CapacityConfigured, or
// the highest count since the server's start at the time of a refusal for
// want of slots (CapacityFromRefusals), or what it said itself at one
// (CapacityStated), or the highest count if it is above
// 100 (CapacityFromCount), or else 100 (CapacityAssumed). The last two are a
// guess: see Verdict.Unproven.
func (d *Detector) Capacity() (n int, how string) { return d.capacity, d.how }

func (d *Detector) learnCapacity(count int) {
	count = min(count, maxCapacity)
	d.maxCount = max(d.maxCount, count)
	if d.cfg.Capacity == 0 && count > d.capacity {
		d.capacity, d.proof.inferred = count, false
		if d.how == CapacityAssumed {
			d.how = CapacityFromCount
		}
	}
}

// Count is the number of taken slots: the server's last count and what opened
// and closed since. Connections from before the server's restart hold slots
// of nobody and are not counted. 0 if nothing is known.
func (d *Detector) Count() int {
	if d.limitless || !d.anchored {
		return d.young.n
	}
	return max(d.taken, 0)
}

// Pressure is Count divided by Capacity.
func (d *Detector) Pressure() float64 { return float64(d.Count()) / float64(d.capacity) }

// guessing says whether the log has no closing lines, or hardly any: then who
// holds is a guess from who came last, and a proper sender who comes often is
// wronged by it.
func (d *Detector) guessing() bool { return d.stats.Closed*4 < d.stats.Assumed }

// guessedAt is the pressure below which a guess counts nothing: with no more
// than the count to go by, a busy hour and a flood that has not filled the
// server look the same.
const guessedAt = 0.98

// weight is p of DESIGN.md: how much a held slot counts at the present
// pressure, 0 to 1.
func (d *Detector) weight() float64 {
	switch x := d.Pressure(); {
	case x < guessedAt && d.guessing():
		return 0
	case x >= d.cfg.SaturatedAt:
		return 1
	case x <= d.cfg.PressureFrom:
		return 0
	default:
		return (x - d.cfg.PressureFrom) / (d.cfg.SaturatedAt - d.cfg.PressureFrom)
	}
}
