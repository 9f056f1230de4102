// Package guard decides what is blocked, and keeps log, store and packet
// filter in agreement. One goroutine takes every decision, those of the
// detector and those of the operator, so that no command can be overtaken by
// a block on its way.
package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
	"github.com/smtpguard/smtpguard/tail"
)

// Sockets is what the guard needs of the kernel's socket table;
// *sockets.Table has it.
type Sockets interface {
	List(ctx context.Context, ports []uint16) ([]sockets.Socket, error)
	End(ctx context.Context, prefixes []netip.Prefix, ports []uint16) (sockets.Ended, error)
	CanDestroy(ctx context.Context) (bool, error)
}

// Parser turns a log line into an event; *exim.Parser is one. It is used by
// one goroutine.
type Parser interface {
	Parse(line []byte, ev *detector.Event) bool
}

// Log is a log to follow.
type Log struct {
	// Path is the name of a log: a path, a pattern, journald or - (see
	// tail.KindOf).
	Path   string
	Parser Parser
	// Fork makes a parser for one file of a pattern; only patterns need it.
	Fork func() Parser
	// Identifiers are the names that the log's programs have in the journal.
	Identifiers []string
	// Input is what - stands for; nil: standard input.
	Input io.Reader
}

// Options are the parts that a Guard works with.
type Options struct {
	Policy *policy.Policy
	Store  *store.Store
	// OpenFirewall opens the packet filter for at most so many entries. It is
	// called again when the allowlist changes: allowed prefixes pass the filter
	// whatever is blocked, as the last guard behind the gate.
	OpenFirewall func(ctx context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error)
	// Sockets is nil where verdicts are not confirmed (confirm: off) and
	// connections are not ended.
	Sockets Sockets
	// Logs are followed by Run; a Guard that only serves one command of an
	// operator has none.
	Logs []Log
	// Capacity is the number of slots if it is known (policy or the MTA's
	// configuration), else 0; CapacityFrom says where it comes from.
	Capacity     int
	CapacityFrom string
	// AskCapacity is called when the number of slots may be another one: the
	// MTA was started anew, or has counted more than it is to have. At most
	// every few seconds, on the goroutine that decides; SetCapacity is the
	// answer. nil: nobody can be asked.
	AskCapacity func()
	// Teller is told which blocks another backend than CSF has in force; nil:
	// nobody is.
	Teller Teller
	// Self returns what must never be blocked on this machine; nil means
	// the function Self.
	Self func(context.Context) ([]Exempt, error)
	// WatchSelf calls changed whenever Self may give another answer, until ctx
	// ends; nil means the function WatchSelf, or nothing where Self is given.
	WatchSelf func(ctx context.Context, changed func()) error
	// Listed returns whom other programs' lists allow now; nil: there are none.
	// It is asked every few seconds, on the goroutine that decides, and what
	// comes with an error may be a part.
	Listed func(now time.Time) ([]Listed, error)
	// DNS is asked for the names of the allowlist; nil means the machine's
	// resolver.
	DNS allow.Resolver
	// Notify is called with systemd's notify states; nil: nobody listens.
	Notify func(state string)
	Log    *slog.Logger
	// Version is shown in Status.
	Version string
	// OnEvent is told what happens, and OnPulse how things stand, about once a
	// second; nil: nobody watches. Both are called on the goroutine that
	// decides, and must not wait for anything.
	OnEvent func(Event)
	OnPulse func(Pulse)
}

// Guard holds the state of the decisions. Its exported methods may be called
// by any goroutine.
type Guard struct {
	o         Options
	policy    *policy.Policy
	enforce   bool
	fw        firewall.Firewall // changed under fwMu, read by watch
	fwMu      sync.Mutex
	fwAllow   []netip.Prefix // what fw lets pass
	fwEntries int            // how many fw takes
	listed    listed
	asking    asking
	unwatch   context.CancelFunc
	caps      firewall.Capabilities
	log       *slog.Logger
	gate      gate
	self      []Exempt
	selfPast  selfPast
	allowed   []store.AllowEntry
	names     map[allow.Name]*named // of the allowlist; see lookUp
	det       *detector.Detector
	blocks    blocks // in force, and observed ones

	in       chan input
	commands chan func(context.Context)
	mu       sync.Mutex // serialises commands while Run is not running
	runCtx   context.Context
	runMu    sync.Mutex

	// unlisted are places in logs that are not listed any more, to be saved;
	// the zero one forgets a log.
	unlisted map[string]tail.Position

	logs    []*logState
	table   table // what the socket table showed lately
	pending []pending
	owed    owed        // to the store, which could not be written
	slow    []slow      // blocks whose connections are not gone yet
	upkeep  atomic.Bool // the store is tidied up in the background
	drift   drift
	started time.Time
	count   Counters
	late    map[netip.Prefix]bool // blocks that the packet filter did not take at once, and that were told so
	recent  []Decision            // newest last, bounded
	errs    []Fault               // newest last, bounded
	trend   []int                 // slots taken, each trendEvery, newest last, bounded
	tampers chan string
	answers chan lookedUp // of names
	// selfNews says that this machine's own addresses or routes changed.
	selfNews chan struct{}
	looking  int // names that are being looked up
	trial    Trial
	copyDue  time.Time // when the copy of the allowlist is tried again; zero: it is made
	taking   bool      // what was only observed waits to be taken up
	// filterNews is since when names' news wait to be told to the packet
	// filter, zero if there are none.
	filterNews time.Time
	goods      time.Time // when known good senders were last saved
	full       fullness
	pulsed     time.Time // when OnPulse was last called
	dropped    Dropped
	telling    telling
}

// input is what a log's goroutine hands to the deciding one: the events of
// one read, and where that read ended.
type input struct {
	log      *logState
	events   []detector.Event
	lines    int
	last     time.Time
	next     tail.Position // zero: not known
	caughtUp bool
	behind   int64
	late     bool // the lines may be older than others that came before
	gone     bool // the log is; there will be no more
	rests    bool // it is not followed for now; its place is kept
}

// New makes a Guard and loads what the store has. It changes nothing in the
// packet filter.
func New(ctx context.Context, o Options) (*Guard, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Self == nil {
		o.Self = Self
		if o.WatchSelf == nil {
			o.WatchSelf = WatchSelf
		}
	}
	g := &Guard{
		o: o, policy: o.Policy, log: o.Log,
		in:       make(chan input),
		commands: make(chan func(context.Context)),
		tampers:  make(chan string, 1),
		answers:  make(chan lookedUp),
		selfNews: make(chan struct{}, 1),
		started:  time.Now(),
	}
	det, err := newDetector(o)
	if err != nil {
		return nil, err
	}
	g.det = det
	g.gate.block = o.Policy.Block
	g.loadTrial()
	g.loadStop()
	g.enforce = o.Policy.Mode == policy.Enforce && !g.trial.over(time.Now())
	if g.allowed, err = o.Store.AllowList(); g.unreadable("the allowlist", err) {
		return nil, fmt.Errorf("reading the allowlist: %w", err)
	}
	g.copyAllow()
	g.syncNames(time.Now())
	g.refreshListed(time.Now())
	if err := g.refreshSelf(ctx); err != nil {
		return nil, err
	}
	if err := o.Store.Good(func(s store.Good) bool {
		g.det.LearnGood(s.Addr, s.First, s.Last, s.Messages)
		return true
	}); g.unreadable("known good senders", err) {
		return nil, fmt.Errorf("reading known good senders: %w", err)
	}
	active, err := o.Store.Active(time.Now())
	if g.unreadable("blocks", err) {
		return nil, fmt.Errorf("reading blocks: %w", err)
	}
	for _, b := range active {
		// The narrower history is in the store; here the one that lasts
		// longest speaks for its prefix, and a real block before an observed.
		if old, ok := g.blocks.get(b.Prefix); ok && !old.Observed && (b.Observed || old.Until.After(b.Until)) {
			continue
		}
		g.blocks.put(b)
	}
	g.fwAllow, g.fwEntries = g.filterAllow(), g.filterEntries()
	if g.fw, err = o.OpenFirewall(ctx, g.fwAllow, g.fwEntries); err != nil {
		return nil, err
	}
	if g.caps, err = g.fw.Probe(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("firewall %s: %w", g.fw.Name(), err), g.fw.Close(ctx, false))
	}
	g.gate.only4, g.gate.room = !g.caps.IPv6, g.caps.MaxEntries
	g.telling.edits = g.blocks.edits
	return g, nil
}

// unreadable reports whether an error of the store is one to give up at. A
// single value that cannot be read is not: it is told, and the others count.
func (g *Guard) unreadable(what string, err error) bool {
	if errors.Is(err, store.ErrBadValue) {
		g.fault("reading "+what+" from the store in part", err)
		return false
	}
	return err != nil
}

// Close lets go of the packet filter. Blocks stay in force until their time
// unless remove is set. With a slow filter, and where CSF is to be told, that
// goes on until ctx ends; what is left then is named by a
// *firewall.RemainError. The store is the caller's.
func (g *Guard) Close(ctx context.Context, remove bool) error {
	letGo := ctx
	if !remove { // that takes no time, and must be done also after a Ctrl-C
		letGo = context.WithoutCancel(ctx)
	}
	return errors.Join(g.fw.Close(letGo, remove), g.lastWord(ctx, remove))
}

// Backend is the name of the packet filter in use.
func (g *Guard) Backend() string {
	g.fwMu.Lock()
	defer g.fwMu.Unlock()
	return g.fw.Name()
}

func newDetector(o Options) (*detector.Detector, error) {
	c := detector.Config{
		Capacity:     o.Capacity,
		Rules:        o.Policy.Rules,
		PressureFrom: o.Policy.Saturation.PressureFrom,
		SaturatedAt:  o.Policy.Saturation.SaturatedAt,
		Memory:       o.Policy.Memory,
		Sampled:      o.Sockets != nil,
		KnownGood: detector.KnownGood{
			Factor: o.Policy.KnownGood.Factor,
			MaxAge: o.Policy.KnownGood.MaxAge,
			Max:    o.Policy.KnownGood.Max,
		},
	}
	return detector.New(c)
}

// ErrStopped is returned to an operator whose command came while Run ended.
var ErrStopped = errors.New("smtpguard is stopping")

// do runs f on the goroutine that decides or, where Run was never called, on
// the caller's, one at a time.
func (g *Guard) do(ctx context.Context, f func(context.Context)) error {
	g.runMu.Lock()
	runCtx := g.runCtx
	g.runMu.Unlock()
	if runCtx == nil {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.runMu.Lock()
		runCtx = g.runCtx // Run may have begun meanwhile
		g.runMu.Unlock()
		if runCtx == nil {
			f(ctx)
			return nil
		}
		g.mu.Unlock()
		defer g.mu.Lock()
	}
	done := make(chan struct{})
	select {
	case g.commands <- func(ctx context.Context) { defer close(done); f(ctx) }:
		<-done
		return nil
	case <-runCtx.Done():
		return ErrStopped
	case <-ctx.Done():
		return ctx.Err()
	}
}

// How often the deciding goroutine looks at things.
const (
	tickEvery      = 250 * time.Millisecond  // passing of time while the log is silent
	sampleEvery    = 500 * time.Millisecond  // the socket table
	sampleFast     = 100 * time.Millisecond  // the socket table while a verdict waits for it
	structureEvery = 1500 * time.Millisecond // are our rules still there?
	contentEvery   = time.Minute             // are exactly our entries in them?
	selfEvery      = time.Minute             // this machine's addresses, gateways, resolvers
	goodEvery      = time.Minute             // known good senders to the store
	sweepEvery     = time.Second             // blocks that have run out, positions to the store
	pruneEvery     = time.Hour
)

// Run makes the packet filter what the store says, then follows the logs and
// decides until ctx ends. What it started has ended when it returns. An error
// is one that makes going on pointless.
func (g *Guard) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// From here on commands wait for the loop below; one that began before has
	// ended when the lock is got.
	g.mu.Lock()
	g.runMu.Lock()
	g.runCtx = ctx
	g.runMu.Unlock()
	g.mu.Unlock()

	if err := g.beginTrial(ctx, time.Now()); err != nil {
		return err
	}
	if g.trial.over(time.Now()) {
		g.endTrial(ctx, time.Now())
	}
	g.awaitNames(ctx, &wg)
	if err := g.restore(ctx); err != nil {
		return err
	}
	if g.enforce {
		g.enforceNow(ctx)
	}
	if g.o.Sockets != nil {
		g.sample(ctx, time.Now())
	}
	for i, l := range g.o.Logs {
		st := g.newLog(l)
		st.others = othersThan(g.o.Logs, i)
		g.logs = append(g.logs, st)
		wg.Go(func() {
			if err := st.follow(ctx, g.in, g.o.Store, g.log); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("following %s: %w", st.path, err))
			}
		})
	}
	wg.Go(func() { g.watch(ctx) })
	g.startTelling(ctx, &wg)
	if watch := g.o.WatchSelf; watch != nil {
		wg.Go(func() { g.watchSelf(ctx, watch) })
	}

	g.notify("READY=1")
	g.tellSystemd()

	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	var due struct{ sample, structure, content, self, listed, good, sweep, prune, trend time.Time }
	start := time.Now()
	lastSelf := start
	due.structure, due.content, due.self = start.Add(structureEvery), start.Add(contentEvery), start.Add(selfEvery)
	due.good, due.prune = start.Add(goodEvery), start.Add(time.Minute)
	every := func(now time.Time, at *time.Time, d time.Duration, f func()) {
		if !now.Before(*at) {
			*at = now.Add(d)
			f()
		}
	}
	fast := time.NewTimer(time.Hour)
	defer fast.Stop()
	armed := false
	for {
		if len(g.pending) > 0 && !armed {
			fast.Reset(sampleFast)
			armed = true
		}
		select {
		case <-ctx.Done():
			g.finish()
			if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
				return cause
			}
			return nil
		case in := <-g.in:
			g.take(ctx, in)
		case f := <-g.commands:
			f(ctx)
		case l := <-g.answers:
			g.answered(ctx, l, time.Now())
		case <-g.selfNews:
			// Several come at once, and whoever floods us with them gets one
			// look in a while.
			due.self = minTime(due.self, lastSelf.Add(selfLeast))
		case by := <-g.tampers:
			g.tampered(ctx, by)
		case <-fast.C:
			armed = false
			if g.o.Sockets != nil {
				g.sample(ctx, time.Now())
			} else {
				g.retry(ctx, time.Now())
			}
		case <-tick.C:
			now := time.Now()
			g.notify("WATCHDOG=1")
			g.watchTrial(ctx, now)
			g.takeUpKnown(ctx, now)
			if g.o.Sockets != nil {
				every(now, &due.sample, sampleEvery, func() { g.sample(ctx, now) })
			}
			g.passTime(ctx, now)
			g.askCapacity(now)
			g.beat(now)
			g.tellCSF(now)
			g.lookUp(ctx, &wg, now)
			g.tellUnknown(now)
			g.tellFilter(ctx, now)
			every(now, &due.sweep, sweepEvery, func() {
				if g.sweep(ctx, now) {
					g.tidy(&wg, "ending blocks in the store", func() error {
						_, err := g.o.Store.Sweep(now)
						return err
					})
				}
			})
			every(now, &due.trend, trendEvery, func() { g.trend = bounded(append(g.trend, g.det.Count()), trendMost) })
			every(now, &due.structure, structureEvery, func() { g.checkStructure(ctx) })
			every(now, &due.content, contentEvery, func() {
				g.checkContent(ctx)
				// Of 100,000 the reading takes most of a second: no more than a
				// hundredth of the time.
				due.content = now.Add(max(contentEvery, 100*time.Since(now)))
			})
			every(now, &due.listed, listedEvery, func() {
				if g.refreshListed(now) {
					due.self = now
				}
			})
			every(now, &due.self, selfEvery, func() {
				lastSelf = now
				g.syncNames(now)
				if err := g.refreshSelf(ctx); err != nil {
					g.fault("looking at this machine's own addresses", err)
				}
				g.dropAllowed()
				_, _ = g.liftAllowed(ctx)
				_ = g.renewFilter(ctx)
			})
			every(now, &due.good, goodEvery, func() { _ = g.saveGood() })
			every(now, &due.prune, pruneEvery, func() {
				before, good := now.Add(-g.policy.Block.Forget), now.Add(-g.policy.KnownGood.MaxAge)
				most := g.policy.KnownGood.Max
				g.tidy(&wg, "forgetting what is old", func() error {
					_, err := g.o.Store.Prune(before)
					_, err2 := g.o.Store.DropGood(good, most)
					return errors.Join(err, err2)
				})
			})
		}
	}
}

// tidy runs f, which only works on the store, beside the decisions: it may
// take seconds. One at a time; what comes meanwhile is done another time.
func (g *Guard) tidy(wg *sync.WaitGroup, what string, f func() error) {
	if !g.upkeep.CompareAndSwap(false, true) {
		return
	}
	wg.Go(func() {
		defer g.upkeep.Store(false)
		if err := f(); err != nil {
			g.log.Error(what, "err", err)
		}
	})
}

// finish saves what the next start needs. Blocks stay in force.
func (g *Guard) finish() {
	g.notify("STOPPING=1")
	for _, l := range g.logs {
		l.moved = l.moved || l.next != l.saved
	}
	g.savePositions()
	_ = g.settle()
	_ = g.saveGood()
}

func (g *Guard) notify(state string) {
	if g.o.Notify != nil {
		g.o.Notify(state)
	}
}

// passTime lets the detector's clock go on when there is nothing left to read
// in any log: holders that say nothing are the worst ones.
func (g *Guard) passTime(ctx context.Context, now time.Time) {
	for _, l := range g.logs {
		if !l.caughtUp {
			return
		}
	}
	g.decide(ctx, g.det.Advance(now), now)
}

// take feeds the events of one read to the detector.
func (g *Guard) take(ctx context.Context, in input) {
	l := in.log
	if in.gone || in.rests {
		g.dropLog(l, in.gone)
		return
	}
	g.listLog(l)
	fresh := l.caughtUp && !in.late // was there nothing older to read before these lines?
	l.took(in)
	if in.last.After(l.lastLine) {
		l.lastLine = in.last
	}
	now := time.Now()
	for i := range in.events {
		ev := &in.events[i]
		g.redate(l, ev, now, fresh)
		if ev.Kind == detector.DaemonStarted {
			g.asking.wanted = true
		}
		if !g.counts(l, ev, now) {
			ev.Kind = detector.Tick
		}
		if vs := g.det.Observe(ev); len(vs) > 0 {
			g.decide(ctx, vs, now)
		}
	}
}

// redate puts an event at a time that can be true. A line that was written
// just now and says otherwise comes from a clock or a zone that is not ours,
// or from somebody who forges lines: then now is the better time. Of lines
// read late (after a restart) only the future is unbelievable.
func (g *Guard) redate(l *logState, ev *detector.Event, now time.Time, fresh bool) {
	if ev.Time.IsZero() {
		return
	}
	off := ev.Time.Sub(now)
	if off <= 5*time.Second && (!fresh || off >= -15*time.Second) {
		return
	}
	if l.misdated++; l.misdated == 10 {
		g.log.Warn("lines of the log bear another time than this machine's clock; the clock is used instead",
			"log", l.path, "off", (off / time.Second * time.Second).String(),
			"hint", "set zone: in the policy to the zone that Exim writes, or log_timezone = true in Exim")
	}
	ev.Time = now
}

// counts decides whether an event still says something to the detector.
func (g *Guard) counts(l *logState, ev *detector.Event, now time.Time) bool {
	switch ev.Kind {
	case detector.Opened, detector.Closed, detector.Refused:
	default:
		return true
	}
	if ev.Kind == detector.Opened {
		l.opens++
		if ev.Port == 0 {
			l.portless++
		}
		if g.table.usable && g.table.distrusts(now) {
			return false
		}
		// Without ports the log cannot say which connection ended, and the
		// socket table can: let it speak alone.
		if ev.Port == 0 && g.table.usable {
			return false
		}
	} else if ev.Port == 0 && ev.Kind == detector.Closed && g.table.usable {
		return false
	}
	if b, ok := g.blocks.realAddr(ev.Source); ok {
		g.count.Prevented++
		if ev.Kind == detector.Opened && ev.Time.Sub(b.Since) > 10*time.Second && now.Sub(b.Since) > 10*time.Second &&
			(g.o.Sockets == nil || g.table.known[netip.AddrPortFrom(ev.Source, ev.Port)]) {
			g.leak(b, now)
		}
		return ev.Kind == detector.Closed
	}
	return true
}

// fault notes an error that does not stop the daemon but that the operator
// should know of.
func (g *Guard) fault(what string, err error) {
	if errors.Is(err, context.Canceled) { // we are being stopped, and nobody is to be woken for that
		g.log.Info(what, "err", err)
		return
	}
	g.log.Error(what, "err", err)
	g.count.Faults++
	g.errs = bounded(append(g.errs, Fault{Time: time.Now(), What: what, Err: err.Error()}), 20)
	g.tell(Event{On: OnFault, Why: what + ": " + err.Error()})
}

// bounded drops the oldest elements beyond n.
func bounded[T any](s []T, n int) []T {
	if len(s) > n {
		s = append(s[:0], s[len(s)-n:]...)
	}
	return s
}

// refreshSelf looks again at what must never be blocked on this machine and
// rebuilds the allowlist. It fails only where there is no earlier answer.
func (g *Guard) refreshSelf(ctx context.Context) error {
	self, err := g.o.Self(ctx)
	if err != nil {
		// What was found before still counts, and another way may find more.
		own, ownErr := net.InterfaceAddrs()
		if ownErr != nil && len(g.self) == 0 && g.enforce {
			return fmt.Errorf("finding out this machine's own addresses, without which nothing can be blocked safely: %w", errors.Join(err, ownErr))
		}
		for _, a := range own {
			if p, err := netip.ParsePrefix(a.String()); err == nil {
				a := p.Addr().Unmap().WithZone("")
				self = append(self, Exempt{netip.PrefixFrom(a, a.BitLen()), "an address of this machine"})
			}
		}
	}
	g.rememberSelf(self, err, time.Now())
	g.rebuildAllow()
	return nil
}

// rebuildAllow makes the gate's allowlist anew.
func (g *Guard) rebuildAllow() {
	g.gate.allow = policy.NewAllowlist(append(g.plainEntries(time.Now()), g.namedEntries()...))
	g.gate.own = ownList(g.self)
}

// plainEntries are the entries of the allowlist that are not names.
func (g *Guard) plainEntries(now time.Time) []policy.AllowEntry {
	entries := slices.Clone(g.policy.Allow)
	for _, s := range g.self {
		entries = append(entries, policy.AllowEntry{Prefix: s.Prefix, Why: s.Why})
	}
	for _, l := range g.listed.entries {
		entries = append(entries, l.AllowEntry)
	}
	for _, a := range g.allowed {
		if a.In(now) && a.Name == "" {
			entries = append(entries, policy.AllowEntry{Prefix: a.Prefix, Why: operatorsWhy(a)})
		}
	}
	return entries
}

// filterAllow is what the packet filter lets pass whatever is blocked: what
// people have allowed. This machine's own addresses are left to the gate:
// they come and go, and each change makes the filter's table anew.
func (g *Guard) filterAllow() []netip.Prefix {
	var allow []netip.Prefix
	for _, e := range g.policy.Allow {
		allow = append(allow, e.Prefix)
	}
	for _, l := range g.listed.entries {
		allow = append(allow, l.Prefix)
	}
	now := time.Now()
	for _, a := range g.allowed {
		if a.In(now) && a.Name == "" {
			allow = append(allow, a.Prefix)
		}
	}
	for _, e := range g.namedEntries() {
		allow = append(allow, e.Prefix)
	}
	slices.SortFunc(allow, netip.Prefix.Compare)
	return slices.Compact(allow)
}

// filterEntries is how many entries the packet filter must take: the gate
// alone says when there are enough, and what the store has must fit.
func (g *Guard) filterEntries() int {
	return max(g.gate.block.MaxBlocks, g.blocks.len()) + blockChunk
}

// renewFilter opens the packet filter anew if what it lets pass, or how many
// entries it must take, has changed.
func (g *Guard) renewFilter(ctx context.Context) error {
	allow, entries := g.filterAllow(), g.filterEntries()
	if slices.Equal(allow, g.fwAllow) && entries <= g.fwEntries {
		return nil
	}
	if err := g.openFilter(ctx, allow, entries); err != nil {
		// Tried again with the next look at this machine's addresses; until
		// then the gate alone stands before what is newly allowed.
		g.fault("opening the packet filter anew for another allowlist", err)
		g.drift.suspect = true
		return fmt.Errorf("the packet filter could not be opened anew to let pass whom the allowlist names now, which is tried again within a minute: %w", err)
	}
	return nil
}

// openFilter puts another packet filter in the place of the one in use. After
// an error that one goes on; also where the other one would drop nothing, and
// this one did not let go of everything.
func (g *Guard) openFilter(ctx context.Context, allow []netip.Prefix, entries int) error {
	now := time.Now()
	var filled error
	fw, err := g.o.OpenFirewall(ctx, allow, entries)
	var caps firewall.Capabilities
	if err == nil {
		if caps, err = fw.Probe(ctx); err == nil {
			var part *firewall.PartialError
			if filled = fw.Replace(ctx, g.wanted(now)); filled != nil && !errors.As(filled, &part) {
				err = filled
			}
		}
		if err == nil && g.caps.Real && !caps.Real { // nobody would look after what is in there
			if n := len(g.wanted(now)); n > 0 {
				err = fmt.Errorf("it holds %d blocks that the store does not have", n)
			} else {
				err = g.fw.Replace(ctx, nil)
			}
		}
		if err != nil {
			_ = fw.Close(ctx, false)
		}
	}
	if err != nil {
		return err
	}
	g.fwMu.Lock()
	old := g.fw
	g.fw, g.fwAllow, g.fwEntries = fw, allow, entries
	if g.unwatch != nil {
		g.unwatch() // the new one is watched instead
	}
	g.fwMu.Unlock()
	g.caps = caps
	g.gate.only4, g.gate.room = !caps.IPv6, caps.MaxEntries
	_ = g.refilled(filled, now) // told there
	if err := old.Close(ctx, false); err != nil {
		g.fault("closing the packet filter", err)
	}
	return nil
}
