package guard

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/store"
)

// On says what kind of thing an Event tells of.
type On string

const (
	OnBlock       On = "block" // Outcome says whether in force or observed
	OnUnblock     On = "unblock"
	OnExpire      On = "expire"
	OnSpare       On = "spare"
	OnRefuse      On = "refuse"
	OnUnconfirmed On = "unconfirmed"
	OnFail        On = "fail"
	OnEnded       On = "ended"     // the last connection of a blocked source is gone; Took says how long after the verdict
	OnSaturated   On = "saturated" // the server has been full for fullAfter
	OnRelieved    On = "relieved"  // mail flows again; Took says how long the server was full
	OnFault       On = "fault"
	OnTamper      On = "tamper" // somebody changed our rules in the packet filter; they are put back
)

var onOutcome = map[Outcome]On{Blocked: OnBlock, Observed: OnBlock, Spared: OnSpare, Refused: OnRefuse,
	Unconfirmed: OnUnconfirmed, Failed: OnFail, Lifted: OnUnblock, Expired: OnExpire}

// Event is something that happened, for those who watch: hooks and metrics.
type Event struct {
	On   On
	Time time.Time
	// Count is how many of the same this stands for; 1 unless a single act
	// concerned very many prefixes. Then Prefix is that of one of them.
	Count   int
	Prefix  netip.Prefix // zero if it is not about a source
	Outcome Outcome
	Rule    string
	Score   float64
	// Reason is Why in one word of a small fixed set: the rule for a block,
	// "operator", "allowed", "per-minute" ...; "" where there is only one.
	Reason string
	// Why is a sentence, of any length; it may hold what strangers wrote.
	Why   string
	Until time.Time
	// By is who lifted a block or changed our rules, if known.
	By   string
	Took time.Duration
	// Taken and Capacity are the server's slots, at OnSaturated and OnRelieved.
	Taken, Capacity int
}

// Pulse is how things stand, for metrics: taken on the deciding goroutine
// once a second, and cheap there whatever the number of blocks.
type Pulse struct {
	Time      time.Time
	Enforce   bool
	Capacity  int
	Count     int
	Pressure  float64
	Saturated bool
	Holders   []Holder // those with most slots first, at most 10
	Blocks    map[BlockClass]int
	Pending   int // verdicts that wait for confirmation
	Unsaved   int // blocks that could not be written down
	Logs      []LogStatus
	Confirm   bool // verdicts are confirmed in the socket table
	Usable    bool // it can be read
	Holding   int  // connections in it that hold a slot
	Backend   string
	Real      bool
	Agrees    bool // the packet filter holds what the store says
	Missing   int  // blocks that it did not take
	Lingering int  // sources that it still drops, whose block has ended
	Repairs   uint64
	Dropped   Dropped
	Counters  Counters
	Detector  detector.Stats
}

// BlockClass groups blocks by what they are.
type BlockClass struct {
	IPv6     bool
	Bits     int // prefix length
	Observed bool
}

func classOf(b *store.Block) BlockClass {
	return BlockClass{b.Prefix.Addr().Is6(), b.Prefix.Bits(), b.Observed}
}

// Dropped is what the packet filter has stopped, as far as it was read back:
// once a minute, with no more than contentMax blocks.
type Dropped struct {
	Packets, Bytes uint64
	last           map[netip.Prefix]firewall.Installed
	next           map[netip.Prefix]firewall.Installed
}

// saw takes one entry of a reading; read ends the reading. Entries count from
// 0 when they are made, so only what came since the last reading is added.
func (d *Dropped) saw(in firewall.Installed) {
	if in.Packets == 0 {
		return
	}
	was, again := d.next[in.Prefix] // of a reading that broke off
	if !again {
		was = d.last[in.Prefix]
	}
	if was.Packets > in.Packets || was.Bytes > in.Bytes {
		was = firewall.Installed{} // made anew
	}
	d.Packets += in.Packets - was.Packets
	d.Bytes += in.Bytes - was.Bytes
	if d.next == nil {
		d.next = make(map[netip.Prefix]firewall.Installed)
	}
	d.next[in.Prefix] = in
}

func (d *Dropped) read() { d.last, d.next = d.next, nil }

// tell hands an event to who watches.
func (g *Guard) tell(e Event) {
	if g.o.OnEvent == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Count = max(e.Count, 1)
	g.o.OnEvent(e)
}

// tellDecision tells of a decision that stands for n alike.
func (g *Guard) tellDecision(d Decision, n int) {
	if g.o.OnEvent == nil {
		return
	}
	e := Event{On: onOutcome[d.What], Time: d.Time, Count: n, Prefix: d.Prefix, Outcome: d.What, Rule: d.Rule, Score: d.Score,
		Reason: d.Reason, Why: d.Why, Until: d.Until}
	switch d.What {
	case Blocked, Observed:
		e.Reason = cmp.Or(d.Rule, reasonOperator)
	case Lifted:
		e.By, e.Reason = d.Why, reasonOperator
		if d.Why == store.Self || strings.HasPrefix(d.Why, store.Self+":") {
			e.Reason = reasonAllowed
		}
	}
	g.tell(e)
}

// Reasons of refusals and of other ends, as metrics count them.
const (
	reasonOperator  = "operator"
	reasonAllowed   = "allowed"
	reasonTooWide   = "too-wide"
	reasonNoIPv6    = "no-ipv6"
	reasonMaxBlocks = "max-blocks"
	reasonRoom      = "filter-full"
	reasonPerMinute = "per-minute"
	reasonStopped   = "rules-stopped"
	reasonStore     = "store"
	reasonFilter    = "firewall"
	reasonCapacity  = "capacity-unknown"
)

// NoteFault lets a part that works beside the guard say what went wrong, so
// that `smtpguard status` shows it.
func (g *Guard) NoteFault(ctx context.Context, what string, err error) error {
	return g.do(ctx, func(context.Context) { g.fault(what, err) })
}

// holders are the n addresses that hold most slots now.
func (g *Guard) holders(n int) (list []Holder) {
	for a, n := range g.held() {
		list = append(list, Holder{a, n})
	}
	slices.SortFunc(list, func(a, b Holder) int {
		return cmp.Or(cmp.Compare(b.Held, a.Held), a.Source.Compare(b.Source))
	})
	return list[:min(len(list), n)]
}

// beat looks whether the server became full or free, and every pulseEvery
// tells how things stand.
func (g *Guard) beat(now time.Time) {
	// While old lines are read the count is that of another time.
	if g.caughtUp() {
		capacity, _ := g.det.Capacity()
		e := Event{Time: now, Taken: g.det.Count(), Capacity: capacity}
		e.On, e.Took = g.full.look(now, g.det.Pressure() >= g.policy.Saturation.SaturatedAt)
		switch e.On {
		case OnSaturated:
			var by []string
			for _, h := range g.holders(3) {
				by = append(by, fmt.Sprintf("%s holds %d", h.Source, h.Held))
			}
			e.Why = fmt.Sprintf("%d of %d slots have been taken for %s", e.Taken, e.Capacity, e.Took.Round(time.Second))
			if len(by) > 0 {
				e.Why += "; " + strings.Join(by, ", ")
			}
			g.log.Warn("the server is full", "why", e.Why)
			g.tell(e)
		case OnRelieved:
			e.Why = fmt.Sprintf("%d of %d slots are taken; the server was full for %s", e.Taken, e.Capacity, e.Took.Round(time.Second))
			g.log.Info("mail flows again", "why", e.Why)
			g.tell(e)
		}
	}
	if g.o.OnPulse != nil && now.Sub(g.pulsed) >= pulseEvery {
		g.pulsed = now
		g.o.OnPulse(g.pulse(now))
	}
}

const pulseEvery = time.Second

func (g *Guard) pulse(now time.Time) Pulse {
	p := Pulse{Time: now, Enforce: g.enforce, Count: g.det.Count(), Pressure: g.det.Pressure(), Holders: g.holders(10),
		Blocks: g.blocks.classes(), Pending: len(g.pending), Unsaved: len(g.owed.began), Confirm: g.o.Sockets != nil, Usable: g.table.usable,
		Backend: g.fw.Name(), Real: g.caps.Real, Agrees: g.drift.trouble() == nil, Missing: len(g.drift.failed), Lingering: len(g.drift.lingers),
		Repairs: g.drift.repairs, Dropped: Dropped{Packets: g.dropped.Packets, Bytes: g.dropped.Bytes}, Counters: g.count, Detector: g.det.Stats()}
	p.Capacity, _ = g.det.Capacity()
	p.Saturated = p.Pressure >= g.policy.Saturation.SaturatedAt
	if len(g.table.past) > 0 {
		p.Holding = g.table.past[len(g.table.past)-1].holding
	}
	for _, l := range g.logs {
		p.Logs = append(p.Logs, l.status())
	}
	return p
}

// When a server counts as full, and as free again. Both are told late rather
// than often: a flood whose connections churn dips below the threshold for
// moments, and a free moment is no relief.
const (
	fullAfter  = 10 * time.Second // full at every look for so long
	fullDip    = time.Second      // but for gaps no longer than this
	freeAfter  = 5 * time.Second  // not full at any look for so long
	lookedLate = 5 * time.Second  // looks further apart than this say nothing of the time between
)

// fullness follows whether the server is full.
type fullness struct {
	since  time.Time // first look at which it was full
	last   time.Time // last look at which it was
	looked time.Time
	told   bool
}

// look takes whether the server is full now, and returns OnSaturated or
// OnRelieved when that is news, with how long it has been or was full.
func (f *fullness) look(now time.Time, full bool) (On, time.Duration) {
	gap := now.Sub(f.looked)
	f.looked = now
	if !f.told && (gap > lookedLate || now.Sub(f.last) > fullDip) {
		f.since = time.Time{}
	}
	if full {
		f.last = now
		if f.since.IsZero() {
			f.since = now
		}
		if took := now.Sub(f.since); !f.told && took >= fullAfter {
			f.told = true
			return OnSaturated, took
		}
		return "", 0
	}
	if f.told && now.Sub(f.last) >= freeAfter {
		took := f.last.Sub(f.since)
		*f = fullness{looked: now}
		return OnRelieved, took
	}
	return "", 0
}
