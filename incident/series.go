package incident

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/store"
)

const (
	// maxBuckets bounds the points of a series. When they are used up each
	// two become one, of twice the width.
	maxBuckets  = 720
	finest      = 500 * time.Millisecond // width of the first buckets
	maxShares   = 12                     // holders kept of each bucket
	maxWide     = 6                      // and wider prefixes, of what is left
	maxHolders  = 1 << 14                // connections looked at for one bucket
	maxVerdicts = 200
	// lead is how much is shown before and after the worst occasion.
	lead = 30 * time.Second
)

// bucket is what happened in one stretch of time.
type bucket struct {
	min, max int // taken slots
	plan     int // most slots held with the policy's blocks in force
	held     int // most slots whose holders are known
	shares   []share
	full     time.Duration
	opened   uint32
	accepted uint32
	refused  uint32 // others than blocked sources, because the server was full
	kept     uint32 // opened or refused, of blocked sources
	blocks   uint32
	verdict  int // number of the first of blocks; 0: it is beyond maxVerdicts
}

// share is what one source held when most was held.
type share struct {
	who  netip.Prefix
	held int
}

func (a *bucket) merge(b *bucket) {
	a.min, a.max, a.plan = min(a.min, b.min), max(a.max, b.max), max(a.plan, b.plan)
	if b.held > a.held {
		a.held, a.shares = b.held, b.shares
	}
	a.full += b.full
	a.opened += b.opened
	a.accepted += b.accepted
	a.refused += b.refused
	a.kept += b.kept
	if a.blocks == 0 {
		a.verdict = b.verdict
	}
	a.blocks += b.blocks
}

// verdict is what is said of one block or spared source.
type verdict struct {
	at     time.Time
	who    netip.Prefix
	rule   string
	text   string // of the detector's own making
	spared string // why it was not blocked; "" if it was
	until  time.Time
	again  int // offence, 1 for the first
}

// timeline is a stretch of time in buckets of one width.
type timeline struct {
	who     *detector.Detector // who holds slots in the log as it is: no block takes effect
	start   time.Time
	width   time.Duration
	buckets []bucket
	count   int // taken slots, at the end
	plan    int

	full   time.Duration
	kept   uint64
	hot    bool      // there was a reason to look closely
	hotEnd time.Time // the last one
}

func newTimeline(who *detector.Detector) *timeline { return &timeline{who: who, width: finest} }

// worse says which of two was the worse occasion.
func (l *timeline) worse(than *timeline) bool {
	return than == nil || l.full > than.full || l.full == than.full && l.kept > than.kept
}

// series is the incident over time.
type series struct {
	who   *detector.Detector
	whole *timeline
	now   *timeline // what may become the worst occasion
	worst *timeline // nil: none yet

	verdicts []verdict
	unsaid   int // verdicts beyond maxVerdicts
}

func newSeries(o Options) (*series, error) {
	d, err := detector.New(detector.Config{Capacity: o.Capacity, Memory: o.Memory})
	if err != nil {
		return nil, err
	}
	return &series{who: d, whole: newTimeline(d), now: newTimeline(d)}, nil
}

// event takes an event at t, when count slots are taken.
func (s *series) event(t time.Time, m Moment, ev *detector.Event, count int, turnedAway, kept bool) {
	was := *ev
	s.who.Observe(&was)
	if count*2 >= m.Capacity {
		s.now.hot, s.now.hotEnd = true, t
	}
	s.whole.event(t, m, ev, count, turnedAway, kept)
	s.now.event(t, m, ev, count, turnedAway, kept)
}

// pass lets time go by, while the server is full or not.
func (s *series) pass(from, to time.Time, full bool) {
	s.whole.pass(from, to, full)
	l := s.now
	switch {
	case full:
		l.hot, l.hotEnd = true, to
		l.pass(from, to, full)
	case !l.hot && to.Sub(from) > lead:
		s.now = newTimeline(s.who) // nothing to see before, nor for so long
		s.now.count, s.now.plan = l.count, l.plan
	case l.hot && to.Sub(l.hotEnd) > lead:
		if from.Before(l.hotEnd.Add(lead)) {
			l.pass(from, l.hotEnd.Add(lead), false)
		}
		s.close()
	default:
		l.pass(from, to, full)
		if !l.hot {
			l.forget()
		}
	}
}

// close ends the present occasion.
func (s *series) close() {
	if s.now.hot && s.now.worse(s.worst) {
		s.worst = s.now
	}
	s.now = newTimeline(s.who)
}

// forget drops what lies longer back than lead, once it is twice that.
func (l *timeline) forget() {
	if n := int(lead / l.width); len(l.buckets) > 2*n {
		k := len(l.buckets) - n
		l.buckets = slices.Delete(l.buckets, 0, k)
		l.start = l.start.Add(time.Duration(k) * l.width)
	}
}

func (l *timeline) event(t time.Time, m Moment, ev *detector.Event, count int, turnedAway, kept bool) {
	b := l.at(t)
	l.count, l.plan = count, m.Held
	b.min, b.max, b.plan = min(b.min, count), max(b.max, count), max(b.plan, m.Held)
	switch ev.Kind {
	case detector.Opened:
		b.opened++
		l.snapshot(b)
	case detector.Accepted:
		b.accepted++
	}
	if turnedAway {
		b.refused++
	}
	if kept && ev.Kind != detector.Closed {
		b.kept++
		l.kept++
	}
}

func (l *timeline) pass(from, to time.Time, full bool) {
	if l.start.IsZero() {
		return
	}
	l.at(to)
	if !full {
		return
	}
	l.full += to.Sub(from)
	for i := l.index(from); i < len(l.buckets); i++ {
		begin := l.start.Add(time.Duration(i) * l.width)
		end := begin.Add(l.width)
		if begin.Before(from) {
			begin = from
		}
		if end.After(to) {
			end = to
		}
		l.buckets[i].full += max(0, end.Sub(begin))
	}
}

func (l *timeline) index(t time.Time) int { return int(max(0, t.Sub(l.start)) / l.width) }

// end is when the last bucket ends.
func (l *timeline) end() time.Time { return l.start.Add(time.Duration(len(l.buckets)) * l.width) }

// at returns the bucket of t, which is the last one, and fills those before it
// with what stayed as it was.
func (l *timeline) at(t time.Time) *bucket {
	if l.start.IsZero() {
		l.start = t.Truncate(time.Second)
	}
	for l.index(t) >= maxBuckets {
		l.halve()
	}
	i := l.index(t)
	if len(l.buckets) <= i {
		next := bucket{min: l.count, max: l.count, plan: l.plan}
		l.snapshot(&next)
		// As it is now it was at the end of the last one, which has left out
		// the last few of those that came.
		if n := len(l.buckets); n > 0 && next.held > l.buckets[n-1].held {
			l.buckets[n-1].held, l.buckets[n-1].shares = next.held, next.shares
		}
		for len(l.buckets) <= i {
			l.buckets = append(l.buckets, next)
		}
	}
	return &l.buckets[len(l.buckets)-1]
}

func (l *timeline) halve() {
	n := 0
	for i := 0; i < len(l.buckets); i += 2 {
		b := l.buckets[i]
		if i+1 < len(l.buckets) {
			b.merge(&l.buckets[i+1])
		}
		l.buckets[n] = b
		n++
	}
	clear(l.buckets[n:])
	l.buckets = l.buckets[:n]
	l.width *= 2
}

// snapshot notes who holds slots, if that is clearly more than what b has: a
// look costs as much as there are holders.
func (l *timeline) snapshot(b *bucket) {
	held := l.who.Held()
	if held == 0 || held <= b.held+b.held/16 {
		return
	}
	by := make(map[netip.Addr]int)
	n := 0
	for h := range l.who.Holders() {
		by[h.Addr]++
		if n++; n >= maxHolders {
			break
		}
	}
	capacity, _ := l.who.Capacity()
	alone := max(3, capacity/50) // those with fewer slots are told as a network
	if len(by) <= maxShares {
		alone = 1
	}
	near := make(map[netip.Prefix]int)
	for a, n := range by {
		p := netip.PrefixFrom(a, a.BitLen())
		if n < alone {
			p = network(p)
		}
		near[p] += n
	}
	shares := sorted(near)
	if len(shares) > maxShares {
		far := make(map[netip.Prefix]int)
		for _, x := range shares[maxShares:] {
			bits := 16
			if x.who.Addr().Is6() {
				bits = 48
			}
			p, _ := x.who.Addr().Prefix(bits)
			far[p] += x.held
		}
		wide := sorted(far)
		shares = append(shares[:maxShares:maxShares], wide[:min(len(wide), maxWide)]...)
	}
	b.held, b.shares = held, slices.Clip(shares)
}

func sorted(m map[netip.Prefix]int) []share {
	list := make([]share, 0, len(m))
	for p, n := range m {
		list = append(list, share{p, n})
	}
	slices.SortFunc(list, func(a, b share) int { return cmp.Or(cmp.Compare(b.held, a.held), a.who.Compare(b.who)) })
	return list
}

func (s *series) block(t time.Time, m Moment, b *store.Block) {
	n := s.say(verdict{at: b.Since, who: b.Prefix, text: b.Reason, until: b.Until, again: b.Offence}, b.Verdict)
	s.now.hot, s.now.hotEnd = true, t
	for _, l := range []*timeline{s.whole, s.now} {
		in := l.at(t)
		l.plan = m.Held
		if in.blocks == 0 {
			in.verdict = n
		}
		in.blocks++
	}
}

func (s *series) spare(v *detector.Verdict, reason string) {
	s.say(verdict{at: v.Time, who: v.Source, text: v.Sentence(), spared: reason}, v)
}

// say keeps a verdict and returns its number, 0 if there are too many.
func (s *series) say(x verdict, v *detector.Verdict) int {
	if len(s.verdicts) >= maxVerdicts {
		s.unsaid++
		return 0
	}
	if v != nil {
		x.rule = v.Rule
	}
	s.verdicts = append(s.verdicts, x)
	return len(s.verdicts)
}
