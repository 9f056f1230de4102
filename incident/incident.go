// Package incident tells what a flood did and what the policy would have done
// about it: as a table, as a sentence, and as one HTML page with pictures. It
// gathers while a log is replayed, and its memory is bounded whatever the log.
package incident

import (
	"cmp"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/gaissmai/bart"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/store"
)

const (
	// maxRows bounds the sources that are told one by one.
	maxRows = 4096
	// maxServed bounds the refused senders that are counted.
	maxServed = 1 << 14
	// calm ends an incident: so long was the server not full.
	calm = 5 * time.Minute
	// A count of taken slots is believed for so long after the last line on
	// connections: nobody holds a slot in silence for longer than Exim's
	// smtp_receive_timeout (5 min). Where lines of refused connections are all
	// there is, they come several a second while the server is full.
	believed          = 5 * time.Minute
	believedUncounted = 10 * time.Second
)

// Moment is the replay's state when an event was observed.
type Moment struct {
	Time     time.Time // the detector's; the zero time before the first line
	Capacity int       // slots of the server
	Held     int       // slots that are held with the policy's blocks in force
}

// Options says what to collect.
type Options struct {
	// SaturatedAt is the share of taken slots from which the server is full.
	SaturatedAt float64
	// Pictures collects what Page needs beside the table: who held slots when.
	Pictures bool
	// Capacity and Memory are the detector's, for Pictures; 0 as there.
	Capacity int
	Memory   int64
}

// Collector gathers an incident. The zero Collector is not usable; see New. It
// is not safe for concurrent use.
type Collector struct {
	o      Options
	series *series // nil: not wanted

	started     bool
	first, now  time.Time // monotone
	shift       time.Duration
	count, peak int
	capacity    int
	fullFrom    int  // taken slots
	counted     bool // the log has the server's own counts
	evidence    time.Time

	full      bool
	fullTo    time.Time // end of the last stretch
	fullFor   time.Duration
	incidents int
	began     time.Time     // the present incident
	length    time.Duration // of full time in it
	longest   time.Duration
	met       bool // a block was made in it
	unmet     int  // incidents, before the present one, without a block
	firstIn   time.Duration
	lastIn    time.Duration
	early     bool // a block was in force when the incident began

	rows     []*Row
	byPrefix bart.Table[*Row]
	left     int // blocks of sources beyond maxRows
	blocks   int
	until    time.Time // the last end of a block
	heldNow  int       // by blocked sources
	heldPeak int

	opened, refused, accepted uint64
	// served are the sources that were refused because the server was full,
	// and how often, while with the policy's blocks there was a free slot;
	// senders are those whose mail was accepted at some time, and how much.
	served  map[netip.Addr]int
	senders map[netip.Addr]int
}

// Row is what is told of one source that the policy would have blocked.
type Row struct {
	Prefix netip.Prefix
	Rule   string // of its first block
	Storm  bool   // that rule counts opened connections, not slots
	Why    string // the verdict in a sentence
	// Since is from when on it did what it was blocked for: no earlier than
	// one window before the verdict.
	Since time.Time
	// Blocked is when it would have been blocked first, For how long in all
	// of Blocks blocks.
	Blocked time.Time
	For     time.Duration
	Blocks  int
	// Sources is the number of its addresses, as far as is known; 1 or more.
	Sources int
	// Held is the most slots that it held at a time in the log as it is, also
	// after the block; Capacity is what the server had then.
	Held, Capacity int
	// Opened and Refused are what would have been kept away: connections
	// that got a slot, and attempts that the server itself refused.
	Opened, Refused uint64

	held   int
	closes bool // closing lines of it are known
}

// Share is Held of Capacity, 0 to 1.
func (r *Row) Share() float64 {
	if r.Capacity <= 0 {
		return 0
	}
	return min(1, float64(r.Held)/float64(r.Capacity))
}

// Who is the address, or the prefix if it is more than one.
func (r *Row) Who() string { return who(r.Prefix) }

func who(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// New returns a Collector of nothing yet.
func New(o Options) (*Collector, error) {
	c := &Collector{o: o, served: make(map[netip.Addr]int), senders: make(map[netip.Addr]int)}
	if o.Pictures {
		var err error
		if c.series, err = newSeries(o); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// at makes the time of the log one that never runs backwards: after a clock
// was set back, time goes on from where it was.
func (c *Collector) at(t time.Time) time.Time {
	if t.IsZero() {
		return c.now
	}
	if !c.started {
		c.started, c.first, c.now = true, t, t
		return t
	}
	t = t.Add(c.shift)
	if back := c.now.Sub(t); back > 0 {
		c.shift += back
		t = c.now
	}
	return t
}

// Event takes an event that was observed at now; by is the block that is in
// force against its source.
func (c *Collector) Event(now func() Moment, ev *detector.Event, by *store.Block) {
	if ev.Kind == detector.Accepted {
		c.accepted++
		if _, known := c.senders[ev.Source]; known || len(c.senders) < maxServed && ev.Source.IsValid() {
			c.senders[ev.Source]++
		}
	}
	switch ev.Kind {
	case detector.Opened, detector.Closed, detector.Refused, detector.DaemonStarted:
	default:
		if c.series == nil && c.started {
			return // of no interest to the table, and most lines are like that
		}
	}
	m := now()
	c.move(c.at(m.Time))
	c.setCapacity(m.Capacity)
	var r *Row
	if by != nil {
		r, _ = c.byPrefix.Get(by.Prefix)
	}
	turnedAway := false
	switch ev.Kind {
	case detector.Opened:
		c.opened++
		if c.count++; ev.Count > 0 {
			c.count, c.counted = ev.Count, true
		}
		if r != nil {
			r.Opened++
			c.hold(r, 1)
		}
	case detector.Closed:
		c.count = max(0, c.count-1)
		if r != nil {
			r.closes = true
			c.hold(r, -1)
		}
	case detector.Refused:
		c.refused++
		if r != nil {
			r.Refused++
		}
		if ev.Reason != detector.RefusedFull {
			break
		}
		c.count = max(c.count, m.Capacity)
		if by == nil {
			turnedAway = true
			if m.Held < m.Capacity && c.now.Before(c.until) {
				if _, known := c.served[ev.Source]; known || len(c.served) < maxServed {
					c.served[ev.Source]++
				}
			}
		}
	case detector.DaemonStarted:
		c.count = 0
	default:
		c.look(m, ev, turnedAway, by != nil)
		return
	}
	c.evidence = c.now
	c.look(m, ev, turnedAway, by != nil)
}

func (c *Collector) setCapacity(n int) {
	if n != c.capacity {
		c.capacity = n
		c.fullFrom = max(1, int(math.Ceil(c.o.SaturatedAt*float64(n)-1e-9)))
	}
}

// look notes the count of taken slots as it is now.
func (c *Collector) look(m Moment, ev *detector.Event, turnedAway, kept bool) {
	if c.count > c.peak {
		c.peak = c.count
	}
	c.setFull(c.capacity > 0 && c.count >= c.fullFrom)
	if c.series != nil && c.started {
		c.series.event(c.now, m, ev, c.count, turnedAway, kept)
	}
}

// move lets time pass until t.
func (c *Collector) move(t time.Time) {
	if c.full {
		last := believed
		if !c.counted {
			last = believedUncounted
		}
		if end := c.evidence.Add(last); t.After(end) {
			c.advance(end)
			c.count = 0
			c.setFull(false)
		}
	}
	c.advance(t)
}

func (c *Collector) advance(t time.Time) {
	if !t.After(c.now) {
		return
	}
	if c.full {
		d := t.Sub(c.now)
		c.fullFor += d
		c.length += d
		c.longest = max(c.longest, c.length)
	}
	if c.series != nil {
		c.series.pass(c.now, t, c.full)
	}
	c.now = t
}

func (c *Collector) setFull(full bool) {
	if full == c.full {
		return
	}
	c.full = full
	if !full {
		c.fullTo = c.now
		return
	}
	if c.incidents > 0 && c.now.Sub(c.fullTo) < calm {
		return
	}
	if c.incidents > 0 && !c.met {
		c.unmet++
	}
	c.incidents++
	c.began, c.length = c.now, 0
	c.met = c.now.Before(c.until)
	c.early = c.early || c.met
}

// hold notes that a blocked source got a slot or gave one back, in the log as
// it is. Without closing lines nothing is known of it.
func (c *Collector) hold(r *Row, n int) {
	was := r.held
	r.held = max(0, r.held+n)
	c.heldNow += r.held - was
	if r.closes {
		c.heldMost(r)
	}
}

func (c *Collector) heldMost(r *Row) {
	if n := min(r.held, max(c.capacity, r.Capacity)); n > r.Held {
		r.Held, r.Capacity = n, max(c.capacity, r.Capacity)
	}
	c.heldPeak = max(c.heldPeak, min(c.heldNow, c.capacity))
}

// Block takes a block that the policy would have made, and the moment after it.
func (c *Collector) Block(m Moment, b *store.Block) {
	c.move(c.at(b.Since))
	c.setCapacity(m.Capacity)
	c.blocks++
	if b.Until.After(c.until) {
		c.until = b.Until
	}
	if c.full || c.incidents > 0 && c.now.Sub(c.fullTo) < calm {
		in := c.now.Sub(c.began)
		if !c.met {
			c.met = true
			c.firstIn = max(c.firstIn, in)
		}
		c.lastIn = in
	}
	r, ok := c.byPrefix.Get(b.Prefix)
	if !ok {
		if len(c.rows) >= maxRows {
			c.left++
			return
		}
		r = &Row{Prefix: b.Prefix, Blocked: b.Since, Since: b.Since, Why: b.Reason, Sources: 1}
		if v := b.Verdict; v != nil {
			r.Rule, r.Storm = v.Rule, v.Metric == detector.Opens
			r.Since = began(v)
		}
		c.rows = append(c.rows, r)
		c.byPrefix.Insert(b.Prefix, r)
	}
	r.Blocks++
	r.For += b.Until.Sub(b.Since)
	if v := b.Verdict; v != nil {
		r.Sources = max(r.Sources, v.Sources)
		c.heldNow += v.Held - r.held
		r.held = v.Held
		c.heldMost(r)
	}
	if c.series != nil && c.started {
		c.series.block(c.now, m, b)
	}
}

// began is when what led to the verdict did: within its window, and not before
// the source was first seen, or where the slots that it holds now make up for
// the score, before the oldest of them was taken.
func began(v *detector.Verdict) time.Time {
	at := v.Time.Add(-v.Window)
	if v.First.After(at) {
		at = v.First
	}
	if v.Metric == detector.Saturation && len(v.Evidence) > 0 {
		oldest := slices.MinFunc(v.Evidence, func(a, b detector.Evidence) int { return a.Time.Compare(b.Time) }).Time
		held := float64(v.Held) * v.Time.Sub(oldest).Seconds()
		if oldest.After(at) && held >= v.Score*float64(v.Capacity)*v.Window.Seconds() {
			at = oldest
		}
	}
	return at
}

// Spare takes a verdict that the gate turned down, and why.
func (c *Collector) Spare(v *detector.Verdict, reason string) {
	c.move(c.at(v.Time))
	if c.series != nil && c.started {
		c.series.spare(v, reason)
	}
}

// Rows are the sources that would have been blocked, those that held most
// first.
func (c *Collector) Rows() []*Row {
	return slices.SortedStableFunc(slices.Values(c.rows), func(a, b *Row) int {
		return cmp.Or(cmp.Compare(b.Share(), a.Share()), cmp.Compare(b.Opened+b.Refused, a.Opened+a.Refused), a.Prefix.Compare(b.Prefix))
	})
}

// Total sums up Rows: Held is what they held together at worst, For is not
// set.
func (c *Collector) Total() Row {
	t := Row{Capacity: c.capacity, Held: c.heldPeak, Blocks: c.blocks}
	for _, r := range c.rows {
		t.Opened += r.Opened
		t.Refused += r.Refused
		t.Sources += r.Sources
		t.Held = max(t.Held, r.Held)
	}
	return t
}

// Left is the number of blocks of sources that have no row, because there are
// too many.
func (c *Collector) Left() int { return c.left }

// fewTries is how often a proper sender is refused at most, and once more as
// often for each message that it sends in all of the log: he comes again after
// minutes. Who tries more often and sends so little is like those who flood.
const fewTries = 10

// Served counts the connections that were refused because the server was full,
// while with the policy's blocks in force there would have been a free slot,
// and whose they were. Left out are sources that were blocked themselves,
// sooner or later, and those that look like it.
func (c *Collector) Served() (connections, senders int) {
	for a, k := range c.served {
		if _, bad := c.byPrefix.Lookup(a); !bad && k <= fewTries*(1+c.senders[a]) {
			connections += k
			senders++
		}
	}
	return connections, senders
}

// Seen counts the connections that got a slot and those that were refused, and
// the messages that were accepted, in the log as it is.
func (c *Collector) Seen() (opened, refused, accepted uint64) {
	return c.opened, c.refused, c.accepted
}

// FullFrom is the number of taken slots from which the server is full.
func (c *Collector) FullFrom() int {
	return max(1, int(math.Ceil(c.o.SaturatedAt*float64(c.capacity)-1e-9)))
}

// Full is how long the server was full.
func (c *Collector) Full() time.Duration { return c.fullFor }
