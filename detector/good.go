package detector

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"
	"time"
)

// GoodSender is an address that delivered accepted mail or logged in.
type GoodSender struct {
	Addr     netip.Addr `json:"address"`
	First    time.Time  `json:"first"`
	Last     time.Time  `json:"last"`     // last message or login
	Messages int        `json:"messages"` // and logins
}

// good is a GoodSender as kept. Times are the log's, in nanoseconds.
type good struct {
	key         key
	first, last int64
	messages    uint32
	// Messages in the detector's minute, and in those before it.
	minute int64
	recent [workPause + 1]uint32
}

type goods struct {
	slab   slab[good]
	index  table
	max    int
	maxAge int64
	factor float64
	hand   uint32
}

func (g *goods) init(c KnownGood) {
	g.index = newTable()
	g.maxAge = int64(c.MaxAge)
	g.factor = c.Factor
	g.slab.max = 1 << 30
}

func (g *goods) find(k key) uint32 {
	h := g.index.hash(k)
	n, at := g.index.next(h, h)
	for n != 0 && g.slab.at(n).key != k {
		n, at = g.index.next(h, at+1)
	}
	return n
}

// get is the entry of k, made if need be; then the longest unused of sixteen
// goes if there are too many.
func (g *goods) get(k key) *good {
	if i := g.find(k); i != 0 {
		return g.slab.at(i)
	}
	if g.index.n >= g.max {
		var worst uint32
		for range min(16, g.slab.used) {
			g.hand++
			if g.hand > g.slab.used {
				g.hand = 1
			}
			if worst == 0 || g.slab.at(g.hand).last < g.slab.at(worst).last {
				worst = g.hand
			}
		}
		g.index.delete(g.index.hash(g.slab.at(worst).key), worst)
		g.slab.release(worst)
	}
	i := g.slab.alloc()
	g.index.put(g.index.hash(k), i)
	e := g.slab.at(i)
	e.key = k
	return e
}

// accepted: ev.Source delivered a message or logged in.
func (d *Detector) accepted(ev *Event) {
	d.stats.Accepted++
	k := keyOf(ev.Source)
	for i := d.find(k); i != 0; {
		n := d.nodes.at(i)
		n.accepted++
		n.last = d.now
		i = n.parent
	}
	e := d.goods.get(k)
	t := d.now - d.offset
	if e.first == 0 {
		e.first = t
	}
	e.last = max(e.last, t)
	e.messages++
	m := d.now / int64(time.Minute)
	e.recent = e.upTo(m)
	e.minute = m
	e.recent[0]++
}

// upTo is e.recent when the detector's minute is m.
func (e *good) upTo(m int64) (recent [workPause + 1]uint32) {
	if age := m - e.minute; age >= 0 && age < int64(len(recent)) {
		copy(recent[age:], e.recent[:])
	}
	return recent
}

// good is what is known of the good address k; nil if nothing, or if it is too
// long ago.
func (d *Detector) good(k key) *good {
	i := d.goods.find(k)
	if i == 0 {
		return nil
	}
	if e := d.goods.slab.at(i); d.now-d.offset-e.last <= d.goods.maxAge {
		return e
	}
	return nil
}

// lately estimates the messages of e in the last minute, and in the last
// workPause minutes, in the way of window.
func (d *Detector) lately(e *good) (minute, pause float64) {
	recent := e.upTo(d.now / int64(time.Minute))
	rest := 1 - float64(d.now%int64(time.Minute))/float64(time.Minute)
	for _, n := range recent[:workPause] {
		pause += float64(n)
	}
	return float64(recent[0]) + rest*float64(recent[1]), pause + rest*float64(recent[workPause])
}

// mostSaturation is the highest saturation threshold of a known good address:
// it is not immune.
const mostSaturation = 0.9

// workingSaturation is the least one of a known good address that works.
const workingSaturation = 0.6

// workPause: a sender works that delivers a message a slot in so many minutes,
// and, if it has a few slots only, of which nobody makes a flood alone, a
// message at all. A proven one did for so long, with so many messages.
const (
	workPause      = 3
	fewSlots       = 2
	provenMessages = 20
	provenFor      = int64(24 * time.Hour)
)

// threshold is what address n has to reach to cross rule r: more if it is
// known good, and more again if it works.
func (d *Detector) threshold(n *node, r *Rule) float64 {
	e := d.good(n.key)
	if e == nil {
		return r.Threshold
	}
	if r.Metric == Saturation && int64(r.Window) >= staleAfter && d.now-d.offset-e.last > int64(r.Window) {
		return r.Threshold // it delivered once, and only holds
	}
	t := r.Threshold * d.goods.factor
	m, pause := d.lately(e)
	held := float64(n.held)
	works := m >= 1 && workPause*m >= held || pause >= 1 && (held <= fewSlots || pause >= held)
	switch {
	case r.Metric == Saturation && int64(r.Window) < staleAfter && e.messages >= provenMessages && e.last-e.first >= provenFor:
		t = max(t*d.goods.factor, workingSaturation) // time to show that it works
	case works:
		t *= d.goods.factor
		if r.Metric == Opens {
			t += m // connections that deliver are no storm
		} else {
			t = max(t, workingSaturation)
		}
	}
	return raised(r, t)
}

// raised is t, or as much of it as r may be raised to.
func raised(r *Rule, t float64) float64 {
	if r.Metric == Saturation {
		return min(t, max(r.Threshold, mostSaturation))
	}
	return t
}

// goodIn lists the known good addresses inside k, the latest first.
func (d *Detector) goodIn(k key) []*good {
	var in []*good
	for i := uint32(1); i <= d.goods.slab.used; i++ {
		if e := d.goods.slab.at(i); e.key.bits != 0 && k.contains(e.key) && d.now-d.offset-e.last <= d.goods.maxAge {
			in = append(in, e)
		}
	}
	slices.SortFunc(in, func(a, b *good) int {
		return cmp.Or(cmp.Compare(b.last, a.last), cmp.Compare(a.key.hi, b.key.hi), cmp.Compare(a.key.lo, b.key.lo))
	})
	return in
}

// LearnGood makes a known as a good sender, as if it had delivered messages
// messages between first and last: what a store or old logs remember. What is
// known already is widened, not replaced.
func (d *Detector) LearnGood(a netip.Addr, first, last time.Time, messages int) {
	f, l := logNanos(first), logNanos(last)
	if !a.IsValid() || l == 0 || messages < 0 {
		return
	}
	if f == 0 || f > l {
		f = l
	}
	e := d.goods.get(keyOf(a))
	if e.first == 0 || f < e.first {
		e.first = f
	}
	e.last = max(e.last, l)
	e.messages = uint32(max(uint64(e.messages), min(uint64(messages), 1<<32-1)))
}

// ForgetGood makes a unknown again, as a sender.
func (d *Detector) ForgetGood(a netip.Addr) {
	if !a.IsValid() {
		return
	}
	k := keyOf(a)
	if i := d.goods.find(k); i != 0 {
		d.goods.index.delete(d.goods.index.hash(k), i)
		*d.goods.slab.at(i) = good{}
		d.goods.slab.release(i)
	}
}

// KnownGood yields the known good senders, in no particular order, at most
// Config.KnownGood.Max. The detector must not be used meanwhile.
func (d *Detector) KnownGood() iter.Seq[GoodSender] {
	return func(yield func(GoodSender) bool) {
		for i := uint32(1); i <= d.goods.slab.used; i++ {
			e := d.goods.slab.at(i)
			if e.key.bits == 0 || d.now-d.offset-e.last > d.goods.maxAge {
				continue
			}
			if !yield(e.sender()) {
				return
			}
		}
	}
}

func (e *good) sender() GoodSender {
	return GoodSender{e.key.addr(), time.Unix(0, e.first).UTC(), time.Unix(0, e.last).UTC(), int(e.messages)}
}
