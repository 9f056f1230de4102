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
	maxBuckets  = 1440
	finest      = 500 * time.Millisecond // width of the first buckets
	maxShares   = 12                     // holders kept of each bucket
	maxWide     = 6                      // and wider prefixes, of what is left
	maxHolders  = 1 << 14                // connections looked at for one bucket
	maxVerdicts = 200
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
	text   string
	spared string // why it was not blocked; "" if it was
	until  time.Time
	again  int // offence, 1 for the first
}

// series is the incident over time.
type series struct {
	who      *detector.Detector // who holds slots in the log as it is: no block takes effect
	start    time.Time
	width    time.Duration
	buckets  []bucket
	lastPlan int
	count    int

	verdicts []verdict
	unsaid   int // verdicts beyond maxVerdicts
}

func newSeries(o Options) (*series, error) {
	d, err := detector.New(detector.Config{Capacity: o.Capacity, Memory: o.Memory})
	return &series{who: d, width: finest}, err
}

// event takes an event at t, when count slots are taken.
func (s *series) event(t time.Time, m Moment, ev *detector.Event, count int, full, turnedAway, kept bool) {
	was := *ev
	s.who.Observe(&was)
	b := s.at(t)
	s.count, s.lastPlan = count, m.Held
	b.min, b.max, b.plan = min(b.min, count), max(b.max, count), max(b.plan, m.Held)
	switch ev.Kind {
	case detector.Opened:
		b.opened++
		s.snapshot(b)
	case detector.Accepted:
		b.accepted++
	}
	if turnedAway {
		b.refused++
	}
	if kept && ev.Kind != detector.Closed {
		b.kept++
	}
}

// pass lets time go by, while the server is full or not.
func (s *series) pass(from, to time.Time, full bool) {
	if s.start.IsZero() {
		return
	}
	s.at(to)
	if !full {
		return
	}
	for i := s.index(from); i < len(s.buckets); i++ {
		begin := s.start.Add(time.Duration(i) * s.width)
		end := begin.Add(s.width)
		if begin.Before(from) {
			begin = from
		}
		if end.After(to) {
			end = to
		}
		s.buckets[i].full += max(0, end.Sub(begin))
	}
}

func (s *series) index(t time.Time) int { return int(max(0, t.Sub(s.start)) / s.width) }

// at returns the bucket of t, which is the last one, and fills those before it
// with what stayed as it was.
func (s *series) at(t time.Time) *bucket {
	if s.start.IsZero() {
		s.start = t.Truncate(time.Second)
	}
	for s.index(t) >= maxBuckets {
		s.halve()
	}
	i := s.index(t)
	if len(s.buckets) <= i {
		next := bucket{min: s.count, max: s.count, plan: s.lastPlan}
		s.snapshot(&next)
		for len(s.buckets) <= i {
			s.buckets = append(s.buckets, next)
		}
	}
	return &s.buckets[len(s.buckets)-1]
}

func (s *series) halve() {
	n := 0
	for i := 0; i < len(s.buckets); i += 2 {
		b := s.buckets[i]
		if i+1 < len(s.buckets) {
			b.merge(&s.buckets[i+1])
		}
		s.buckets[n] = b
		n++
	}
	clear(s.buckets[n:])
	s.buckets = s.buckets[:n]
	s.width *= 2
}

// snapshot notes who holds slots, if that is clearly more than what b has: a
// look costs as much as there are holders.
func (s *series) snapshot(b *bucket) {
	held := s.who.Held()
	if held == 0 || held <= b.held+b.held/16 {
		return
	}
	by := make(map[netip.Addr]int)
	n := 0
	for h := range s.who.Holders() {
		by[h.Addr]++
		if n++; n >= maxHolders {
			break
		}
	}
	capacity, _ := s.who.Capacity()
	alone := max(3, capacity/50)
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
	in := s.at(t)
	s.lastPlan = m.Held
	if in.blocks == 0 {
		in.verdict = n
	}
	in.blocks++
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
