package guard

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/sockets"
)

// table is what the kernel's socket table showed lately. The kernel is the
// truth about who holds slots now; a log line can be forged, missing or late.
type table struct {
	usable bool // the last reading worked
	at     time.Time
	past   []sample // newest last, no older than tablePast
	known  map[netip.AddrPort]bool
	seen   map[netip.AddrPort]*peer
	fresh  map[netip.Addr]seen // of past's fresh
	// phantoms counts the connections that the log told of and the table does
	// not have, since phantomsAt.
	swept      time.Time // when seen was cleared of what is gone
	phantoms   int
	phantomsAt time.Time
	distrust   time.Time // until then lines that open connections hold no slots
}

// distrusts reports whether the log has lately told of many connections that
// do not exist: somebody forges lines, or these are another host's.
func (t *table) distrusts(now time.Time) bool { return now.Before(t.distrust) }

// phantom notes a connection that the log told of and the table does not have.
// Without forgery there is one now and then: a child of the server that was
// killed, or one whose closing line was not read yet.
func (t *table) phantom(now time.Time) {
	if now.Sub(t.phantomsAt) > phantomsIn {
		t.phantoms, t.phantomsAt = 0, now
	}
	if t.phantoms++; t.phantoms > phantomsMax {
		t.distrust = now.Add(distrustFor)
	}
}

// sample is one reading of the table.
type sample struct {
	at      time.Time
	holding int
	held    map[netip.Addr]int
	fresh   []*peer // connections, in any state, that were not there before
}

// peer is a connection as the table showed it, in whatever state.
type peer struct {
	addr  netip.Addr
	last  time.Time // when it was there last
	times int       // in how many readings
}

// seen counts the connections of an address that were new lately: those that
// were there in several readings, and those that were caught only once.
type seen struct{ lasting, brief int }

// estimate is how many connections that were. One that is caught once is one
// of several that ended between two readings.
func (s seen) estimate() int { return s.lasting + briefFactor*s.brief }

// holding is how many slots p held when the table was last read.
func (t *table) holding(p netip.Prefix) int {
	if len(t.past) == 0 {
		return 0
	}
	return count(t.past[len(t.past)-1].held, p)
}

// count sums up what m has for the addresses of p.
func count(m map[netip.Addr]int, p netip.Prefix) (n int) {
	if p.IsSingleIP() {
		return m[p.Addr()]
	}
	for a, c := range m {
		if p.Contains(a) {
			n += c
		}
	}
	return n
}

const (
	// tablePast is how long readings are remembered: a connection storm is
	// confirmed by what was seen in that time.
	tablePast = 10 * time.Second
	// heldOver is the time over which the slots that a source holds are
	// averaged to confirm a verdict.
	heldOver = 5 * time.Second
	// stormShare is the share of a storm's connections that the table must bear
	// out, stormPeers the least number. A connection that lasts, or that the
	// server closed itself (TIME-WAIT), is there at every reading and counts as
	// one: forged lines beside a busy sender's own are not borne out. One that
	// the table shows only once stands for briefFactor that it never did.
	stormShare  = 0.7
	stormPeers  = 3
	briefFactor = 5
	// More than phantomsMax connections within phantomsIn that only the log
	// knows: for distrustFor the socket table alone says who holds slots.
	phantomsMax = 200
	phantomsIn  = 10 * time.Second
	distrustFor = time.Minute
	// seenMax bounds how many connections are remembered to tell new ones.
	seenMax = 100_000
	// prefixesAtOnce bounds how many verdicts on prefixes are compared with
	// the table at one look: each is compared with every address.
	prefixesAtOnce = 20
)

// sample reads the socket table, puts right what the detector believes,
// looks whether blocked sources still hold anything, and tries the verdicts
// that wait for confirmation.
func (g *Guard) sample(ctx context.Context, now time.Time) {
	socks, err := g.o.Sockets.List(ctx, g.policy.Ports)
	if err != nil {
		if g.table.usable || g.table.at.IsZero() {
			g.fault("reading the kernel's socket table", err)
		}
		g.table.usable, g.table.at = false, now
		return
	}
	s := sample{at: now, held: make(map[netip.Addr]int)}
	known := make(map[netip.AddrPort]bool)
	first := g.table.seen == nil
	if first {
		g.table.seen, g.table.fresh = make(map[netip.AddrPort]*peer), make(map[netip.Addr]seen)
	}
	var left []netip.Prefix
	for _, k := range socks {
		if p, old := g.table.seen[k.Remote]; old {
			p.last = now
			if p.times++; p.times == 2 {
				if n, ok := g.table.fresh[p.addr]; ok && n.brief > 0 {
					g.table.fresh[p.addr] = seen{n.lasting + 1, n.brief - 1}
				}
			}
		} else if len(g.table.seen) < seenMax {
			p := &peer{addr: k.Remote.Addr(), last: now, times: 1}
			g.table.seen[k.Remote] = p
			if first {
				p.times = 2 // not new, as far as is known
			} else {
				s.fresh = append(s.fresh, p)
				n := g.table.fresh[p.addr]
				g.table.fresh[p.addr] = seen{n.lasting, n.brief + 1}
			}
		}
		if !k.Holds() {
			continue
		}
		s.holding++
		s.held[k.Remote.Addr()]++
		known[k.Remote] = true
		if b, ok := g.blocks.realAddr(k.Remote.Addr()); ok && b.InForce(now) && !g.drift.unapplied(b.Prefix) {
			left = append(left, netip.PrefixFrom(k.Remote.Addr(), k.Remote.Addr().BitLen()))
		}
	}
	past := g.table.past
	for len(past) > 0 && now.Sub(past[0].at) > tablePast {
		for _, p := range past[0].fresh {
			n := g.table.fresh[p.addr]
			if p.times > 1 {
				n.lasting--
			} else {
				n.brief--
			}
			if g.table.fresh[p.addr] = n; n.lasting <= 0 && n.brief <= 0 {
				delete(g.table.fresh, p.addr)
			}
		}
		past = past[1:]
	}
	if now.Sub(g.table.swept) > time.Second {
		g.table.swept = now
		maps.DeleteFunc(g.table.seen, func(_ netip.AddrPort, p *peer) bool { return now.Sub(p.last) > tablePast })
	}
	before := g.table.known
	g.table.past = append(past, s)
	g.table.usable, g.table.at, g.table.known = true, now, known

	if len(left) > 0 {
		g.end(ctx, left)
	}
	g.stillSlow(now)
	if g.caughtUp() {
		g.correct(ctx, now, before, s)
	}
	g.retry(ctx, now)
}

func (g *Guard) caughtUp() bool {
	for _, l := range g.logs {
		if !l.caughtUp {
			return false
		}
	}
	return true
}

// correct tells the detector what the socket table knows better than the log:
// connections that no line told of (Exim's default log_selector has no such
// lines, and there are none from before this start), and connections that
// ended without a line, or were never there.
//
// A line is written after its connection was accepted, and every line that the
// detector has seen was read before the table: what is not in the table now
// has ended. The other way round a line may still be on its way, so a
// connection must be there twice before it is taken for one without a line.
func (g *Guard) correct(ctx context.Context, now time.Time, before map[netip.AddrPort]bool, s sample) {
	believed := make(map[netip.AddrPort]bool, len(g.table.known))
	var gone []netip.AddrPort
	for h := range g.det.Holders() {
		if h.Port == 0 {
			continue
		}
		peer := netip.AddrPortFrom(h.Addr, h.Port)
		believed[peer] = true
		if !g.table.known[peer] {
			gone = append(gone, peer)
		}
	}
	feed := func(ev detector.Event) {
		if vs := g.det.Observe(&ev); len(vs) > 0 {
			g.decide(ctx, vs, now)
		}
	}
	// First those that are gone, then the count: else the detector would make
	// room for the count by letting go of the oldest, which are the true ones.
	for _, peer := range gone {
		g.table.phantom(now)
		feed(detector.Event{Time: now, Kind: detector.Closed, Source: peer.Addr(), Port: peer.Port(), Reason: detector.ClosedVanished})
	}
	for peer := range g.table.known {
		if believed[peer] || !before[peer] {
			continue
		}
		if _, ok := g.blocks.realAddr(peer.Addr()); ok {
			continue
		}
		g.count.Unlogged++
		feed(detector.Event{Time: now, Kind: detector.Opened, Source: peer.Addr(), Port: peer.Port()})
	}
	feed(detector.Event{Time: now, Kind: detector.Sampled, Count: s.holding})
}

// pending is a verdict that the socket table has not confirmed yet, or that
// waits for a new name of the allowlist.
type pending struct {
	verdict detector.Verdict
	since   time.Time
}

// patience is how long a verdict waits for confirmation.
const patience = 5 * time.Second

// retry looks again at the verdicts that wait.
func (g *Guard) retry(ctx context.Context, now time.Time) {
	if len(g.pending) == 0 {
		return
	}
	waiting := g.pending
	g.pending = nil
	var good []decided
	prefixes := 0
	for _, p := range waiting {
		if !p.verdict.Source.IsSingleIP() && now.Sub(p.since) < patience {
			if prefixes++; prefixes > prefixesAtOnce {
				g.pending = append([]pending{p}, g.pending...) // first, the next time
				continue
			}
		}
		why, ok := g.confirmed(p.verdict, now)
		switch {
		case ok && g.namesAwaited(now):
			g.pending = append(g.pending, p)
		case ok:
			good = append(good, decided(p))
		case now.Sub(p.since) < patience:
			g.pending = append(g.pending, p)
		default:
			g.count.Unconfirmed++
			g.note(Decision{Time: now, Prefix: p.verdict.Source, What: Unconfirmed, Rule: p.verdict.Rule, Score: p.verdict.Score,
				Why: "the log says: " + p.verdict.Sentence() + "; the kernel's socket table does not: " + why})
		}
	}
	g.enact(ctx, good, now)
}

// confirmed says whether the socket table bears a verdict out, and if not,
// what it shows instead.
func (g *Guard) confirmed(v detector.Verdict, now time.Time) (string, bool) {
	if g.o.Sockets == nil {
		return "", true
	}
	if !g.table.usable || len(g.table.past) == 0 {
		return "it cannot be read", false
	}
	if v.Metric == detector.Opens {
		var n seen
		if v.Source.IsSingleIP() {
			n = g.table.fresh[v.Source.Addr()]
		} else {
			for a, m := range g.table.fresh {
				if v.Source.Contains(a) && !g.isAllowed(a) {
					n.lasting += m.lasting
					n.brief += m.brief
				}
			}
		}
		need := max(stormPeers, int(stormShare*v.Threshold*min(1, float64(tablePast)/float64(v.Window))))
		if n.estimate() >= need {
			return "", true
		}
		return fmt.Sprintf("%d new connections of %s were seen there in the last %s, %d of them more than once; a storm would show about %d",
			n.lasting+n.brief, v.Source, tablePast, n.lasting, need), false
	}
	capacity, _ := g.det.Capacity()
	var sum, n int
	newest := g.table.past[len(g.table.past)-1]
	for _, s := range slices.Backward(g.table.past) {
		if now.Sub(s.at) > heldOver {
			break
		}
		sum += g.countOthers(s.held, v.Source)
		n++
	}
	held := g.countOthers(newest.held, v.Source)
	// The score is a mean over the window: half of it, held in the last
	// seconds, on a server that is under pressure, is what a true verdict
	// shows at the least.
	mean := float64(sum) / float64(max(n, 1))
	need := v.Threshold * float64(capacity) / 2
	if held > 0 && mean >= need && float64(newest.holding) >= g.policy.Saturation.PressureFrom*float64(capacity) {
		return "", true
	}
	return fmt.Sprintf("there %s holds %d of %d open connections (%.1f on average; %.1f are needed)", v.Source, held, newest.holding, mean, need), false
}

func (g *Guard) isAllowed(a netip.Addr) bool { _, ok := g.gate.allow.Contains(a); return ok }

// countOthers is count without those who are allowed: what they do bears
// nothing out.
func (g *Guard) countOthers(m map[netip.Addr]int, p netip.Prefix) (n int) {
	if _, ok := g.gate.allow.Overlaps(p); !ok || p.IsSingleIP() {
		return count(m, p)
	}
	for a, c := range m {
		if p.Contains(a) && !g.isAllowed(a) {
			n += c
		}
	}
	return n
}

// end ends the connections of prefixes that are blocked already.
func (g *Guard) end(ctx context.Context, prefixes []netip.Prefix) sockets.Ended {
	if g.o.Sockets == nil {
		return sockets.Ended{Left: -1}
	}
	ended, err := g.o.Sockets.End(ctx, prefixes, g.policy.Ports)
	if err != nil {
		g.fault("ending the connections of blocked sources", err)
	}
	g.count.Ended += uint64(ended.Destroyed + ended.Signalled)
	return ended
}
