package guard

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
	"github.com/smtpguard/smtpguard/tail"
)

// Counters count since the start of the daemon.
type Counters struct {
	Verdicts     uint64        `json:"verdicts"`
	Blocked      uint64        `json:"blocked"`
	Observed     uint64        `json:"observed"`
	Spared       uint64        `json:"spared"`
	Refused      uint64        `json:"refused"`
	Unconfirmed  uint64        `json:"unconfirmed"`
	Failed       uint64        `json:"failed"`
	Lifted       uint64        `json:"lifted"`
	Expired      uint64        `json:"expired"`
	Ended        uint64        `json:"connections_ended"` // connections of blocked sources that were ended
	Prevented    uint64        `json:"prevented"`         // log lines of sources that were blocked already
	Leaks        uint64        `json:"leaks"`             // connections that blocked sources opened all the same
	Unlogged     uint64        `json:"unlogged"`          // connections that only the socket table told of
	Faults       uint64        `json:"faults"`
	LastRelief   time.Duration `json:"last_relief_ns"` // from the verdict to no connection left
	LastReliefAt time.Time     `json:"last_relief_at,omitzero"`
}

// Fault is an error that did not stop the daemon.
type Fault struct {
	Time time.Time `json:"time"`
	What string    `json:"what"`
	Err  string    `json:"error"`
}

// Status is what `smtpguard status --json` prints.
type Status struct {
	Version      string    `json:"version"`
	PID          int       `json:"pid"`
	Started      time.Time `json:"started"`
	Time         time.Time `json:"time"`
	Mode         string    `json:"mode"`              // observe after a trial that is over
	Trial        *Trial    `json:"trial,omitempty"`   // of mode: enforce
	Stopped      *Stop     `json:"stopped,omitempty"` // rules block nothing for now
	Capacity     int       `json:"capacity"`
	CapacityFrom string    `json:"capacity_from"`
	Count        int       `json:"count"`    // slots taken now
	Pressure     float64   `json:"pressure"` // count ÷ capacity
	Saturated    bool      `json:"saturated"`
	Holders      []Holder  `json:"holders"`         // those with most slots first, bounded
	Holding      int       `json:"holding_sources"` // how many addresses hold slots
	// Networks of which several addresses hold slots, those with most first,
	// bounded: one alone may hold few of them.
	Networks  []Network      `json:"networks,omitempty"`
	Blocks    int            `json:"blocks"` // in force
	Watched   int            `json:"observed_blocks"`
	Pending   int            `json:"pending_verdicts"`
	Logs      []LogStatus    `json:"logs"`
	Sockets   SocketStatus   `json:"sockets"`
	Firewall  FirewallStatus `json:"firewall"`
	Counters  Counters       `json:"counters"`
	Detector  detector.Stats `json:"detector"`
	Warnings  []string       `json:"warnings,omitempty"`
	Decisions []Decision     `json:"decisions,omitempty"` // the last ones, newest first
	Faults    []Fault        `json:"faults,omitempty"`    // the last ones, newest first
}

// Holder is an address that holds slots now.
type Holder struct {
	Source netip.Addr `json:"source"`
	Held   int        `json:"held"`
}

// Network is a network of which several addresses hold slots now.
type Network struct {
	Prefix    netip.Prefix `json:"prefix"`
	Held      int          `json:"held"`
	Addresses int          `json:"addresses"` // that hold them
}

// LogStatus is how far a log is read.
type LogStatus struct {
	Path     string    `json:"path"`
	Lines    uint64    `json:"lines"`
	Opens    uint64    `json:"opens"`
	Portless uint64    `json:"opens_without_port"`
	Misdated uint64    `json:"misdated"`
	Behind   int64     `json:"bytes_behind"`
	CaughtUp bool      `json:"caught_up"`
	LastLine time.Time `json:"last_line,omitzero"`
}

// SocketStatus says what can be seen and done in the kernel's socket table.
type SocketStatus struct {
	Confirm    bool   `json:"confirm"` // verdicts are confirmed there
	Usable     bool   `json:"usable"`
	CanDestroy bool   `json:"can_destroy"`
	Why        string `json:"why,omitempty"` // why not
	Holding    int    `json:"holding"`       // connections that hold a slot now
}

// FirewallStatus says whether the packet filter holds what the store says.
type FirewallStatus struct {
	Backend string         `json:"backend"`
	Real    bool           `json:"real"` // false: nothing is ever dropped
	Agrees  bool           `json:"agrees"`
	Error   string         `json:"error,omitempty"`
	Missing []netip.Prefix `json:"missing,omitempty"` // blocks that it did not take, bounded
	// Lingering are sources whose block has ended and that it still drops,
	// bounded.
	Lingering []netip.Prefix `json:"lingering,omitempty"`
	Checked   time.Time      `json:"checked,omitzero"`
	Repairs   uint64         `json:"repairs"`
	Repaired  time.Time      `json:"repaired,omitzero"`
	By        string         `json:"repaired_after,omitempty"` // who had changed our rules
	// CSF is what CSF was told where another backend blocks; nil where it is
	// not installed.
	CSF *firewall.CSFStatus `json:"csf,omitempty"`
	// Warnings are about the packet filter's surroundings, each with what to do.
	Warnings []string `json:"warnings,omitempty"`
}

// State says whether a block does what it says.
type State string

const (
	InForce    State = "in force"
	NotApplied State = "not applied" // written down, but not in the packet filter
	OnlySeen   State = "observed"    // mode: observe; nothing is dropped
	IsLifted   State = "lifted"
	IsExpired  State = "expired"
)

// BlockInfo is a block as the commands show it.
type BlockInfo struct {
	store.Block
	State State `json:"state"`
	// Error says why State is NotApplied.
	Error string `json:"error,omitempty"`
	// Ends is when the block is lifted before its Until, because a trial of
	// mode: enforce runs out then; zero if it is not.
	Ends time.Time `json:"ends,omitzero"`
	// Packets and Bytes are what the block has stopped so far.
	Packets uint64 `json:"packets"`
	Bytes   uint64 `json:"bytes"`
}

// Explanation is what is known about a source.
type Explanation struct {
	Prefix  netip.Prefix         `json:"prefix"`
	Now     detector.Explanation `json:"now"`
	Held    int                  `json:"held_in_socket_table"` // -1: the table is not read
	Allowed *AllowInfo           `json:"allowed,omitempty"`
	Blocked *BlockInfo           `json:"blocked,omitempty"` // the block that covers it
	Waiting bool                 `json:"waiting_for_confirmation,omitempty"`
	// Stopped: no rule blocks anybody for now.
	Stopped *Stop       `json:"stopped,omitempty"`
	Inside  []BlockInfo `json:"inside,omitempty"`  // blocks now that overlap it, bounded
	History []BlockInfo `json:"history,omitempty"` // earlier blocks, bounded
	Recent  []Decision  `json:"recent,omitempty"`
}

// Status describes the daemon now.
func (g *Guard) Status(ctx context.Context) (s Status, err error) {
	err = g.do(ctx, func(ctx context.Context) { s = g.status(ctx) })
	return s, err
}

func (g *Guard) status(ctx context.Context) Status {
	now := time.Now()
	s := Status{
		Version: g.o.Version, PID: os.Getpid(), Started: g.started, Time: now, Mode: string(g.mode()),
		Count: g.det.Count(), Pressure: g.det.Pressure(), Counters: g.count, Detector: g.det.Stats(),
		Pending: len(g.pending),
	}
	s.Capacity, s.CapacityFrom = g.det.Capacity()
	if g.o.Capacity > 0 && g.o.CapacityFrom != "" {
		s.CapacityFrom = g.o.CapacityFrom
	}
	if g.trial.State != "" && g.trial.By != store.Self {
		t := g.trial
		s.Trial = &t
	}
	if stop := g.gate.standing.stop; stop.In(now) {
		s.Stopped = &stop
	}
	s.Saturated = s.Pressure >= g.policy.Saturation.SaturatedAt
	s.Holders, s.Holding = g.holders(10), len(g.held())
	for _, n := range groups(g.held()) {
		if n.Addresses > 1 && len(s.Networks) < 10 {
			s.Networks = append(s.Networks, Network{n.Prefix, n.Held, n.Addresses})
		}
	}
	for _, b := range g.blocks.table.All() {
		if g.holds(b, now) {
			s.Blocks++
		} else if b.Observed && now.Before(b.Until) {
			s.Watched++
		}
	}
	for _, l := range g.logs {
		s.Logs = append(s.Logs, l.status())
	}
	s.Sockets = g.socketStatus(ctx)
	if g.alone() {
		g.installed(ctx)
	}
	s.Firewall = FirewallStatus{Backend: g.fw.Name(), Real: g.caps.Real, Agrees: true, Missing: some(g.drift.failed), Lingering: some(g.drift.lingers),
		Checked: g.drift.checked, Repairs: g.drift.repairs, Repaired: g.drift.repaired, By: g.drift.by}
	if err := g.drift.trouble(); err != nil {
		s.Firewall.Agrees, s.Firewall.Error = false, err.Error()
	}
	s.Firewall.CSF = g.csfStatus()
	if f, ok := g.fw.(firewall.Warner); ok {
		s.Firewall.Warnings = f.Warnings()
	}
	s.Warnings = g.warnings(ctx, s)
	for i := len(g.recent) - 1; i >= 0 && len(s.Decisions) < 10; i-- {
		s.Decisions = append(s.Decisions, g.recent[i])
	}
	for i := len(g.errs) - 1; i >= 0 && len(s.Faults) < 5; i-- {
		s.Faults = append(s.Faults, g.errs[i])
	}
	return s
}

// some are twenty of the prefixes, sorted.
func some(m map[netip.Prefix]error) []netip.Prefix {
	var out []netip.Prefix
	for p := range m {
		if out = append(out, p); len(out) == 20 {
			break
		}
	}
	slices.SortFunc(out, netip.Prefix.Compare)
	return out
}

// held returns who holds how many slots now: by the socket table, or where it
// is not read, by the log. The caller must not change it.
func (g *Guard) held() map[netip.Addr]int {
	if g.table.usable && len(g.table.past) > 0 {
		return g.table.past[len(g.table.past)-1].held
	}
	held := make(map[netip.Addr]int)
	for h := range g.det.Holders() {
		held[h.Addr]++
	}
	return held
}

// mode is the one in effect.
func (g *Guard) mode() policy.Mode {
	if g.enforce {
		return policy.Enforce
	}
	return policy.Observe
}

func (g *Guard) socketStatus(ctx context.Context) SocketStatus {
	if g.o.Sockets == nil {
		return SocketStatus{Why: "confirm: off"}
	}
	s := SocketStatus{Confirm: true, Usable: g.table.usable}
	if len(g.table.past) > 0 {
		s.Holding = g.table.past[len(g.table.past)-1].holding
	}
	ok, err := g.o.Sockets.CanDestroy(ctx)
	s.CanDestroy = ok
	if err != nil {
		s.Why = err.Error()
	}
	return s
}

// warnings are the sentences that an operator should read before anything
// else.
func (g *Guard) warnings(ctx context.Context, s Status) []string {
	w := g.gateWarnings(s.Time)
	w = append(w, g.unrelieved(s.Time)...)
	if g.nobodyListens(ctx) {
		w = append(w, fmt.Sprintf("nothing listens on the SMTP ports %v: is Exim down? (`systemctl status exim4`, or exim); mail cannot come in", g.policy.Ports))
	}
	switch {
	case g.policy.Mode == policy.Enforce:
	case s.Blocks > 0:
		w = append(w, fmt.Sprintf("mode: observe: everything is decided and recorded, nothing new is blocked; but %d of an earlier mode: enforce still drop packets until they end (`smtpguard unblock --all` lifts them)", s.Blocks))
	default:
		w = append(w, "mode: observe: everything is decided and recorded, nothing is blocked; set mode: enforce in the policy when the decisions are right")
	}
	if s.CapacityFrom == detector.CapacityAssumed || s.CapacityFrom == detector.CapacityFromCount {
		w = append(w, fmt.Sprintf("the number of slots is not known and taken for %d (%s): for the slots that it holds, nobody is blocked before the log shows connections refused for want of one; state capacity: in the policy (Exim's smtp_accept_max)", s.Capacity, s.CapacityFrom))
	}
	if n := s.Detector.Counted; n > s.Capacity {
		w = append(w, fmt.Sprintf("Exim has counted %d connections at once, and the number of slots is taken for %d (%s): for the slots that it holds, nobody is blocked before Exim refuses somebody for want of one; set capacity: to Exim's smtp_accept_max, or to auto", n, s.Capacity, s.CapacityFrom))
	}
	if s.Detector.KnownGood == 0 {
		w = append(w, "no sender is known good yet: `smtpguard replay --learn LOG` learns them from old logs")
	}
	if g.enforce && !g.caps.Real {
		w = append(w, "backend memory drops no packet")
	}
	for _, l := range s.Logs {
		if l.Lines > 1000 && l.Opens == 0 {
			w = append(w, l.Path+" has no connection lines; add +smtp_connection +incoming_port to Exim's log_selector")
		} else if l.Portless > 0 {
			w = append(w, l.Path+" has no ports; add +incoming_port to Exim's log_selector")
		}
		if l.Behind > 16<<20 {
			w = append(w, l.Path+" is written faster than it is read")
		}
	}
	if g.table.usable && g.table.distrusts(s.Time) {
		w = append(w, "the log tells of many connections that the kernel does not have: somebody forges lines, or Exim runs in another network namespace; the kernel alone is believed")
	}
	for _, l := range s.Logs {
		if k := tail.KindOf(l.Path); l.Lines == 0 && (k == tail.File || k == tail.Dated && len(tail.Find(l.Path)) == 0) {
			if _, err := os.Stat(l.Path); err != nil {
				w = append(w, "the log cannot be read yet: "+err.Error())
			}
		}
	}
	if s.Sockets.Confirm && !s.Sockets.Usable {
		w = append(w, "the kernel's socket table cannot be read: no verdict can be confirmed, nothing is blocked by itself")
	}
	if s.Sockets.Confirm && s.Sockets.Usable && !s.Sockets.CanDestroy {
		w = append(w, "this kernel or these privileges do not allow ending connections: after a block, slots stay taken until Exim's own smtp_receive_timeout ("+s.Sockets.Why+")")
	}
	if !s.Firewall.Agrees {
		w = append(w, "the packet filter does not hold what the store says: "+s.Firewall.Error)
	}
	for _, sentence := range s.Firewall.Warnings {
		w = append(w, "firewall "+s.Firewall.Backend+": "+sentence)
	}
	if c := s.Firewall.CSF; c != nil && c.Error != "" {
		w = append(w, "CSF is not told of every block, which are in force all the same: "+c.Error)
	}
	w = append(w, g.owedWarnings()...)
	if s.Counters.Leaks > 0 {
		w = append(w, "blocked sources still reach the server")
	}
	return w
}

// info shows a block with its state.
func (g *Guard) info(b store.Block, installed map[netip.Prefix]firewall.Installed, now time.Time) BlockInfo {
	i := BlockInfo{Block: b}
	switch {
	case !b.Lifted.IsZero():
		i.State = IsLifted
	case !now.Before(b.Until):
		i.State = IsExpired
	case b.Observed:
		i.State = OnlySeen
	case !g.holds(&b, now):
		i.State, i.Error = NotApplied, "the trial of mode: enforce ended at "+g.trial.Until.Format(time.RFC3339)+" without `smtpguard commit`"
	case g.drift.unapplied(b.Prefix):
		i.State, i.Error = NotApplied, g.drift.why(b.Prefix)
	default:
		i.State = InForce
		if in, ok := installed[b.Prefix]; ok {
			i.Packets, i.Bytes = in.Packets, in.Bytes
		} else if installed != nil && g.ends(&b).Sub(now) > time.Second {
			i.State, i.Error = NotApplied, "the packet filter does not hold it; it is put back at the next check"
			g.drift.suspect = true
		}
	}
	if end := g.ends(&b); end.Before(b.Until) && (i.State == InForce || i.State == NotApplied) {
		i.Ends = end
	}
	return i
}

// Explain tells everything that bears on whether p is blocked.
func (g *Guard) Explain(ctx context.Context, p netip.Prefix) (e Explanation, err error) {
	p = p.Masked()
	doErr := g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		e = Explanation{Prefix: p, Now: g.det.Explain(p), Held: -1, Waiting: g.waits(p)}
		if g.table.usable {
			e.Held = g.table.holding(p)
		}
		if a, ok := g.gate.allow.Overlaps(p); ok {
			e.Allowed = &AllowInfo{Prefix: a.Prefix, Why: a.Why}
		}
		if stop := g.gate.standing.stop; stop.In(now) {
			e.Stopped = &stop
		}
		installed := g.installed(ctx)
		b, ok := g.blocks.real(p)
		if !ok {
			b, ok = g.blocks.covers(p)
		}
		if ok && now.Before(b.Until) {
			i := g.info(*b, installed, now)
			e.Blocked = &i
		}
		var past []store.Block
		past, err = g.o.Store.History(p, now.Add(-g.policy.Block.Forget), 20)
		if !g.unreadable("blocks", err) {
			err = nil
		}
		for _, b := range past {
			if e.Blocked != nil && b.ID == e.Blocked.ID {
				continue
			}
			i := g.info(b, installed, now)
			if i.State == IsLifted || i.State == IsExpired {
				e.History = append(e.History, i)
			} else {
				e.Inside = append(e.Inside, i)
			}
		}
		for i := len(g.recent) - 1; i >= 0 && len(e.Recent) < 20; i-- {
			if g.recent[i].Prefix.Overlaps(p) {
				e.Recent = append(e.Recent, g.recent[i])
			}
		}
	})
	if doErr != nil {
		return e, doErr
	}
	return e, err
}
