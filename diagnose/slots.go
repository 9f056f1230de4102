package diagnose

import (
	"cmp"
	"fmt"
	"math"
	"math/bits"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

const (
	// saturatedAt is the share of the slots from which on the server counts
	// as full.
	saturatedAt = 0.9
	// quiet ends an episode: twice as long as cPanel's monitor waits between
	// checks, so that one flood is one episode.
	quiet = 10 * time.Minute
	// sampleEvery is how often it is noted who holds slots while there are
	// no more free.
	sampleEvery = time.Second
	// maxSample bounds how long one look at the holders stands for, in a log
	// that is silent.
	maxSample = 5 * time.Minute
	// maxOpen bounds the connections of which the duration is measured.
	maxOpen = 1 << 16
	// maxGhosts bounds the slots that one address is thought to have wanted at
	// a time: as many as a large sender has. One that is refused and comes back
	// at once would else want any number.
	maxGhosts = 20
)

// episode is a time in which the slots were full, again and again.
type episode struct {
	first, last time.Time
	full        time.Duration // how long they were full
	refused     int
	check       int // of the refused, from this machine itself
	peak        int // highest count of taken slots
	capacity    int
	need        int // slots that would have sufficed, 0: not known
	lines       []string

	held    map[netip.Addr]float64 // slot-seconds while full; nil after the end
	total   float64
	victims map[netip.Addr]struct{}

	// Known when it has ended.
	kind    Kind
	turned  int      // distinct addresses that were refused
	sources int      // distinct addresses that held slots
	top     []Source // those with the largest shares
	blame   float64  // share of those that are named as the cause
	ruled   bool     // a rule names one of them
	good    float64  // share of senders of accepted mail
}

// slots follows who holds the server's slots.
type slots struct {
	det  *detector.Detector
	past []episode
	more int // episodes that are not kept
	now  *episode
	// verdicts of the rules, by source.
	verdicts map[netip.Prefix]verdict

	lastLook time.Time
	wasFull  bool

	// For the number that would have sufficed: durations of the connections
	// that ended with QUIT, by powers of the square root of 2 of a second, and
	// the ends of those that were refused if they had been let in.
	open      map[netip.AddrPort]time.Time
	durations [64]int
	ended     int
	ghosts    []ghost
	ghostsOf  map[netip.Addr]int // how many of them an address has
}

// ghost is a connection that was refused, as if it had been let in.
type ghost struct {
	until time.Time
	addr  netip.Addr
}

// verdict is what a rule said last of a source.
type verdict struct {
	at       time.Time
	sentence string
	times    float64 // its threshold
}

func newSlots(det *detector.Detector) slots {
	return slots{det: det, open: make(map[netip.AddrPort]time.Time), verdicts: make(map[netip.Prefix]verdict), ghostsOf: make(map[netip.Addr]int)}
}

// observe takes the next event. reserved: it says that the slots that are not
// in reserve are taken.
func (s *slots) observe(ev *detector.Event, line []byte, reserved, in bool) []detector.Verdict {
	at := ev.Time
	s.duration(ev)
	refused := ev.Kind == detector.Refused && ev.Reason == detector.RefusedFull || reserved
	source, loopback := ev.Source, ev.Source.IsLoopback()
	opened := ev.Kind == detector.Opened
	verdicts := s.det.Observe(ev)
	for _, v := range verdicts {
		if len(v.Spared) > 0 {
			continue // it says that the network is not to be blocked
		}
		if len(s.verdicts) >= 2*maxSources {
			clear(s.verdicts)
		}
		now := verdict{v.Time, v.Sentence(), v.Score / v.Threshold}
		if old, ok := s.verdicts[v.Source]; ok && old.times > now.times && v.Time.Sub(old.at) <= verdictFor {
			now.sentence, now.times = old.sentence, old.times // what says most
		}
		s.verdicts[v.Source] = now
	}
	if !in || at.IsZero() {
		s.wasFull = false
		return verdicts
	}
	capacity, how := s.det.Capacity()
	count := s.det.Count()
	known := how == detector.CapacityConfigured || how == detector.CapacityFromRefusals || how == detector.CapacityStated
	full := refused || known && float64(count) >= saturatedAt*float64(capacity)
	if s.now != nil && at.Sub(s.now.last) > quiet {
		s.finish()
	}
	if full && s.now == nil {
		s.begin(at)
	}
	e := s.now
	if e == nil {
		s.wasFull = false
		return verdicts
	}
	e.capacity = max(e.capacity, capacity)
	e.peak = max(e.peak, count)
	if full {
		if at.After(e.last) {
			e.last = at
		}
		s.look(at)
		s.wasFull = true
		if opened && len(e.lines) == 0 {
			e.lines = append(e.lines, show(line))
		}
	} else {
		if s.wasFull {
			s.look(at)
		}
		s.wasFull = false
	}
	if refused {
		e.refused++
		if loopback {
			e.check++
		}
		if len(e.victims) < maxSources {
			e.victims[source] = struct{}{}
		}
		if len(e.lines) < maxLines-1 || loopback && e.check == 1 {
			e.lines = append(e.lines, show(line))
		}
		if len(s.ghosts) < maxOpen && s.ghostsOf[source] < maxGhosts {
			s.ghosts = append(s.ghosts, ghost{at.Add(s.typical()), source})
			s.ghostsOf[source]++
		}
	}
	if refused || opened {
		for len(s.ghosts) > 0 && !s.ghosts[0].until.After(at) {
			a := s.ghosts[0].addr
			if s.ghostsOf[a]--; s.ghostsOf[a] == 0 {
				delete(s.ghostsOf, a)
			}
			s.ghosts = s.ghosts[1:]
		}
		e.need = max(e.need, count+len(s.ghosts))
	}
	return verdicts
}

// begin opens an episode.
func (s *slots) begin(at time.Time) {
	s.now = &episode{first: at, last: at, held: make(map[netip.Addr]float64), victims: make(map[netip.Addr]struct{})}
	s.lastLook = at
}

// look notes who holds slots; each counts for the time since the last look.
func (s *slots) look(at time.Time) {
	since := at.Sub(s.lastLook)
	if !s.wasFull {
		s.lastLook = at
		return
	}
	if since < sampleEvery {
		return
	}
	s.lastLook = at
	since = min(since, maxSample)
	e := s.now
	e.full += since
	for h := range s.det.Holders() {
		e.total += since.Seconds()
		if _, ok := e.held[h.Addr]; ok || len(e.held) < maxSources {
			e.held[h.Addr] += since.Seconds()
		}
	}
}

// finish closes the episode and says what it was.
func (s *slots) finish() {
	e := s.now
	if e == nil {
		return
	}
	s.now = nil
	if len(s.past) == maxEpisodes {
		l := &s.past[maxEpisodes-1] // the last stands for what is left out
		l.last, l.refused, l.check = e.last, l.refused+e.refused, l.check+e.check
		s.more++
		return
	}
	e.sources, e.turned = len(e.held), len(e.victims)
	if e.total > 0 {
		good := make(map[netip.Addr]int)
		for g := range s.det.KnownGood() {
			if sec, ok := e.held[g.Addr]; ok {
				good[g.Addr] = g.Messages
				e.good += sec / e.total
			}
		}
		s.blame(e, good)
	}
	switch {
	case e.refused == 0 && e.blame < manyShare:
		e.kind = NearFull
	case e.total == 0:
		e.kind = FullUnknown
	case e.blame >= fewShare:
		e.kind = FullFew
	case e.good >= manyShare:
		e.kind = FullMany
	default:
		e.kind = FullSpread
	}
	e.held, e.victims = nil, nil
	s.past = append(s.past, *e)
}

const (
	// fewShare of the slots in the hands of sources that are named makes them
	// the cause: without them the others have room.
	fewShare = 0.25
	// manyShare of the slots in the hands of senders of accepted mail make
	// the lack of slots the cause.
	manyShare = 0.5
	// verdictFor is how long a verdict stands, as the rules are silent about
	// a source for a while after one.
	verdictFor = time.Hour
	maxTop     = 8
)

// A source that the rules do not name, because it held slots for too short a
// time or because the log's times are coarse, is named all the same if it held
// such a share of them and sent no mail; a network, with so many addresses.
const (
	strangerShare    = 0.15
	strangerNetShare = 0.25
	strangerNetSize  = 5
)

// group is a source as it is shown.
type group struct {
	seconds float64
	members int
	sent    int // messages that were accepted from it
	why     string
}

// blame fills in who held the slots: sources that the rules name, strangers
// with a large share, and other addresses.
func (s *slots) blame(e *episode, good map[netip.Addr]int) {
	by, nets := make(map[netip.Prefix]*group), make(map[netip.Prefix]*group)
	add := func(m map[netip.Prefix]*group, p netip.Prefix, sec float64, sent int) *group {
		g := m[p]
		if g == nil {
			g = &group{}
			m[p] = g
		}
		g.seconds, g.members, g.sent = g.seconds+sec, g.members+1, g.sent+sent
		return g
	}
	net := func(a netip.Addr) netip.Prefix {
		p, _ := a.Prefix(map[bool]int{true: 24, false: 64}[a.Is4()])
		return p
	}
	named := func(a netip.Addr) (p netip.Prefix, ok bool) {
		for bits := a.BitLen(); bits >= 8; bits-- { // the widest that has a verdict
			wide, _ := a.Prefix(bits)
			if v, has := s.verdicts[wide]; has && v.at.After(e.first.Add(-verdictFor)) {
				p, ok = wide, true
			}
		}
		return p, ok
	}
	rest := make(map[netip.Addr]float64)
	for a, sec := range e.held {
		if p, ok := named(a); ok {
			add(by, p, sec, good[a]).why = s.verdicts[p].sentence
			continue
		}
		rest[a] = sec
		add(nets, net(a), sec, good[a])
	}
	for a, sec := range rest {
		if n := nets[net(a)]; n.sent == 0 && n.members >= strangerNetSize && n.seconds >= strangerNetShare*e.total && !s.sends(net(a)) {
			g := add(by, net(a), sec, 0)
			g.why = fmt.Sprintf("%s (%d addresses) held %.0f %% of the slots while they were full, and sent no mail", net(a), n.members, 100*n.seconds/e.total)
			continue
		}
		g := add(by, netip.PrefixFrom(a, a.BitLen()), sec, good[a])
		if good[a] == 0 && sec >= strangerShare*e.total {
			g.why = fmt.Sprintf("%s held %.0f %% of the slots while they were full, and sent no mail", a, 100*sec/e.total)
		}
	}
	for p, g := range by {
		e.top = append(e.top, Source{Prefix: p, Share: g.seconds / e.total, Addresses: g.members, Why: g.why, Messages: g.sent})
		if g.why != "" {
			e.blame += g.seconds / e.total
		}
		_, ruled := s.verdicts[p]
		e.ruled = e.ruled || ruled && g.why != ""
	}
	slices.SortFunc(e.top, func(a, b Source) int {
		return cmp.Or(cmp.Compare(min(1, len(b.Why)), min(1, len(a.Why))), cmp.Compare(b.Share, a.Share), a.Prefix.Compare(b.Prefix))
	})
	e.top = slices.Clone(e.top[:min(len(e.top), maxTop)])
}

// sends reports whether a sender of accepted mail is known in a network, also
// one that holds nothing now.
func (s *slots) sends(p netip.Prefix) bool { return s.det.Explain(p).KnownGoodCount > 0 }

// duration measures how long a connection of a proper client lasts.
func (s *slots) duration(ev *detector.Event) {
	if ev.Port == 0 {
		return
	}
	key := netip.AddrPortFrom(ev.Source, ev.Port)
	switch ev.Kind {
	case detector.Opened:
		if len(s.open) >= maxOpen {
			clear(s.open)
		}
		s.open[key] = ev.Time
	case detector.Closed:
		at, ok := s.open[key]
		if !ok {
			return
		}
		delete(s.open, key)
		if ev.Reason == detector.ClosedQuit && !ev.Time.Before(at) {
			s.durations[bucket(ev.Time.Sub(at))]++
			s.ended++
		}
	}
}

// bucket is 0 below a second and grows by one with each factor of √2.
func bucket(d time.Duration) int {
	sec := uint64(d / time.Second)
	if sec == 0 {
		return 0
	}
	b := 2*bits.Len64(sec) - 1
	if float64(sec) >= math.Sqrt2*float64(uint64(1)<<(bits.Len64(sec)-1)) {
		b++
	}
	return min(b, 63)
}

// typical is how long a proper connection takes: three of four take no longer.
func (s *slots) typical() time.Duration {
	n := 0
	for i, c := range s.durations {
		if n += c; s.ended > 0 && 4*n >= 3*s.ended {
			return max(time.Second, time.Duration(math.Pow(2, float64(i)/2)*float64(time.Second)))
		}
	}
	return 5 * time.Second
}

// flooded reports whether sources that the rules name have filled the slots.
func (s *slots) flooded() bool {
	return slices.ContainsFunc(s.past, func(e episode) bool { return e.kind == FullFew })
}
