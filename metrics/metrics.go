// Package metrics shows how smtpguard fares, as numbers for Prometheus. It
// keeps what the guard last told it, so that a scrape asks nothing of the
// goroutine that decides, however often somebody scrapes.
package metrics

import (
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/hook"
)

// Sources are where numbers come from beside the guard. They are asked at a
// scrape, by any goroutine; nil: there is nothing of the kind.
type Sources struct {
	Version string
	Reports func() []abuse.Brief
	Lookups func() []abuse.LookupCount
	Hooks   func() []hook.Status
}

// Metrics are the numbers. Pulse and Event are called by the guard.
type Metrics struct {
	registry *prometheus.Registry
	sources  Sources
	pulse    atomic.Pointer[guard.Pulse]

	decisions *prometheus.CounterVec
	reasons   map[string]bool // labels of decisions so far; of the goroutine that decides
	tampers   prometheus.Counter
	saturated prometheus.Counter
	relief    prometheus.Histogram

	mu      sync.Mutex
	asked   time.Time
	reports map[abuse.State]int
}

// metric is the definition of a number. Its name is without "smtpguard_".
type metric struct {
	name   string
	kind   prometheus.ValueType
	help   string
	labels []string
	desc   *prometheus.Desc
}

const (
	gauge   = prometheus.GaugeValue
	counter = prometheus.CounterValue
)

// defined are the numbers that are made at a scrape, in the order of the table
// in docs/metrics.md.
var defined []*metric

func define(name string, kind prometheus.ValueType, help string, labels ...string) *metric {
	m := &metric{name, kind, help, labels, prometheus.NewDesc("smtpguard_"+name, help, labels, nil)}
	defined = append(defined, m)
	return m
}

var (
	buildInfo = define("build_info", gauge, "Always 1; the labels say what runs.", "version", "go")
	snapshot  = define("snapshot_timestamp_seconds", gauge, "When the deciding goroutine last told how things stand, Unix time. Old: it is stuck.")
	enforcing = define("enforcing", gauge, "1 in mode enforce, 0 in mode observe.")

	capacity = define("slots_capacity", gauge, "Connections that the mail server takes at the same time.")
	taken    = define("slots_taken", gauge, "Slots that are taken now.")
	pressure = define("pressure_ratio", gauge, "Taken slots divided by capacity.")
	isFull   = define("saturated", gauge, "1 if pressure is at or above saturation.saturated_at.")
	fullFor  = define("saturated_seconds_total", counter, "How long the server was saturated.")
	held     = define("source_held_slots", gauge, "Slots that an address holds now; the ten that hold most.", "source")

	lines       = define("log_lines_total", counter, "Lines read.", "log")
	behind      = define("log_behind_bytes", gauge, "Bytes of the log that are not read yet.", "log")
	caughtUp    = define("log_caught_up", gauge, "1 if the log is read to its end.", "log")
	lastLine    = define("log_last_event_timestamp_seconds", gauge, "Time of the newest line that said anything, Unix time; 0 before the first.", "log")
	misdated    = define("log_misdated_lines_total", counter, "Lines whose time could not be true.", "log")
	events      = define("events_total", counter, "Events by kind: opened, closed (known connections), refused, accepted (mail and logins), assumed_closed (no closing line came), ignored (no memory).", "kind")
	unlogged    = define("unlogged_connections_total", counter, "Connections that only the kernel's socket table told of.")
	tableUsable = define("socket_table_usable", gauge, "1 if the kernel's socket table can be read; 0 also with confirm: off.")
	holding     = define("socket_table_holding", gauge, "Connections in the kernel's socket table that hold a slot.")

	verdicts = define("verdicts_total", counter, "Times that a source was found over a rule, before the gate.")
	pending  = define("pending_verdicts", gauge, "Verdicts that wait for the socket table to confirm them.")

	blocks    = define("blocks", gauge, "Blocks now, by family (ipv4, ipv6), prefix length and state (in_force, observed).", "family", "prefix_length", "state")
	unsaved   = define("unsaved_blocks", gauge, "Blocks in force that could not be written down.")
	ended     = define("connections_ended_total", counter, "Connections of blocked sources that were ended.")
	prevented = define("prevented_lines_total", counter, "Log lines of sources that were blocked already.")
	leaks     = define("leaked_connections_total", counter, "Connections that sources opened more than 10 s after they were blocked.")

	fwInfo     = define("firewall_info", gauge, "Always 1; the packet filter in use, and whether it drops anything.", "backend", "real")
	fwAgrees   = define("firewall_agrees", gauge, "1 if the packet filter holds what the store says.")
	fwMissing  = define("firewall_missing_blocks", gauge, "Blocks that the packet filter did not take.")
	fwLingers  = define("firewall_lingering_sources", gauge, "Sources whose block has ended and that the packet filter still drops.")
	fwRepairs  = define("firewall_repairs_total", counter, "Times that the packet filter was made to hold what the store says.")
	dropPacket = define("dropped_packets_total", counter, "Packets that blocks have stopped; read back once a minute, with at most 20,000 blocks.")
	dropBytes  = define("dropped_bytes_total", counter, "Bytes of these packets.")

	memory   = define("detector_memory_bytes", gauge, "Memory for what is known of sources, an estimate.")
	sources  = define("detector_sources", gauge, "Addresses that are remembered now.")
	evicted  = define("detector_evictions_total", counter, "Sources that were forgotten for want of memory.")
	goods    = define("known_good_senders", gauge, "Senders that are known good.")
	faults   = define("faults_total", counter, "Errors that did not stop the daemon.")
	reports  = define("reports", gauge, "Abuse reports by state, as in `smtpguard reports list`.", "state")
	lookups  = define("lookups_total", counter, "Questions for the contact of a network, by source and result: found, none, failed.", "source", "result")
	hookTold = define("hook_events_total", counter, "Events that somebody was told of.", "hook")
	hookWait = define("hook_waiting_events", gauge, "Events that wait to be told.", "hook")
	hookSent = define("hook_messages_total", counter, "Tries to tell, by result: sent, failed.", "hook", "result")
	hookFail = define("hook_failing", gauge, "1 if the last try failed.", "hook")
)

// New makes the numbers. They are all 0 or absent before the first Pulse.
func New(s Sources) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry(), sources: s, reasons: make(map[string]bool)}
	m.decisions = prometheus.NewCounterVec(prometheus.CounterOpts{Name: "smtpguard_decisions_total",
		Help: "Decisions by outcome and reason: for blocked and observed the rule, or operator; else one word such as allowed, per-minute, max-blocks."}, []string{"outcome", "reason"})
	m.tampers = prometheus.NewCounter(prometheus.CounterOpts{Name: "smtpguard_tampers_total",
		Help: "Times that somebody else had changed our rules in the packet filter."})
	m.saturated = prometheus.NewCounter(prometheus.CounterOpts{Name: "smtpguard_saturations_total",
		Help: "Times that the server was full for 10 s."})
	m.relief = prometheus.NewHistogram(prometheus.HistogramOpts{Name: "smtpguard_relief_seconds",
		Help:    "Time from a verdict until the blocked source had no connection left.",
		Buckets: []float64{0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}})
	// Those that alerts look at exist before the first of them.
	for outcome, reasons := range map[guard.Outcome][]string{
		guard.Blocked: {"operator"}, guard.Observed: {"operator"}, guard.Spared: {""}, guard.Unconfirmed: {""}, guard.Expired: {""},
		guard.Refused: {"allowed", "too-wide", "no-ipv6", "max-blocks", "filter-full", "per-minute", "rules-stopped"},
		guard.Failed:  {"store", "firewall"}, guard.Lifted: {"operator", "allowed"},
	} {
		for _, r := range reasons {
			m.decisions.WithLabelValues(string(outcome), r)
		}
	}
	m.registry.MustRegister(m, m.decisions, m.tampers, m.saturated, m.relief,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Pulse takes how things stand.
func (m *Metrics) Pulse(p guard.Pulse) { m.pulse.Store(&p) }

// reasonsMost bounds the labels of decisions: a policy has at most 50 rules,
// but one that is read again and again can have others each time.
const reasonsMost = 200

// Event counts what happened.
func (m *Metrics) Event(e guard.Event) {
	switch e.On {
	case guard.OnTamper:
		m.tampers.Add(float64(e.Count))
	case guard.OnSaturated:
		m.saturated.Add(float64(e.Count))
	case guard.OnEnded:
		m.relief.Observe(e.Took.Seconds())
	}
	if e.Outcome == "" {
		return
	}
	if !m.reasons[e.Reason] {
		if len(m.reasons) >= reasonsMost {
			e.Reason = "other"
		}
		m.reasons[e.Reason] = true
	}
	m.decisions.WithLabelValues(string(e.Outcome), e.Reason).Add(float64(e.Count))
}

// Describe is prometheus.Collector's.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range defined {
		ch <- d.desc
	}
}

// Collect is prometheus.Collector's.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	put := func(d *metric, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d.desc, d.kind, v, labels...)
	}
	put(buildInfo, 1, m.sources.Version, runtime.Version())
	m.collectBesides(put)
	p := m.pulse.Load()
	if p == nil {
		return
	}
	put(snapshot, unix(p.Time))
	put(enforcing, bit(p.Enforce))
	put(capacity, float64(p.Capacity))
	put(taken, float64(p.Count))
	put(pressure, p.Pressure)
	put(isFull, bit(p.Saturated))
	put(fullFor, p.Detector.Saturated.Seconds())
	for _, h := range p.Holders {
		put(held, float64(h.Held), h.Source.String())
	}
	for _, l := range p.Logs {
		put(lines, float64(l.Lines), l.Path)
		put(behind, float64(l.Behind), l.Path)
		put(caughtUp, bit(l.CaughtUp), l.Path)
		put(lastLine, unix(l.LastLine), l.Path)
		put(misdated, float64(l.Misdated), l.Path)
	}
	for kind, n := range map[string]uint64{"opened": p.Detector.Opened, "closed": p.Detector.Closed, "refused": p.Detector.Refused,
		"accepted": p.Detector.Accepted, "assumed_closed": p.Detector.Assumed, "ignored": p.Detector.Ignored} {
		put(events, float64(n), kind)
	}
	put(unlogged, float64(p.Counters.Unlogged))
	put(tableUsable, bit(p.Usable))
	put(holding, float64(p.Holding))
	put(verdicts, float64(p.Counters.Verdicts))
	put(pending, float64(p.Pending))
	for c, n := range p.Blocks {
		family, state := "ipv4", "in_force"
		if c.IPv6 {
			family = "ipv6"
		}
		if c.Observed {
			state = "observed"
		}
		put(blocks, float64(n), family, strconv.Itoa(c.Bits), state)
	}
	put(unsaved, float64(p.Unsaved))
	put(ended, float64(p.Counters.Ended))
	put(prevented, float64(p.Counters.Prevented))
	put(leaks, float64(p.Counters.Leaks))
	put(fwInfo, 1, p.Backend, strconv.FormatBool(p.Real))
	put(fwAgrees, bit(p.Agrees))
	put(fwMissing, float64(p.Missing))
	put(fwLingers, float64(p.Lingering))
	put(fwRepairs, float64(p.Repairs))
	put(dropPacket, float64(p.Dropped.Packets))
	put(dropBytes, float64(p.Dropped.Bytes))
	put(memory, float64(p.Detector.Memory))
	put(sources, float64(p.Detector.Sources))
	put(evicted, float64(p.Detector.Evicted))
	put(goods, float64(p.Detector.KnownGood))
	put(faults, float64(p.Counters.Faults))
}

// askEvery bounds how often reports are asked for, of which there may be
// thousands.
const askEvery = 5 * time.Second

// reportsNow counts reports by state, not older than askEvery.
func (m *Metrics) reportsNow() map[abuse.State]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.reports == nil || time.Since(m.asked) >= askEvery {
		m.reports = map[abuse.State]int{abuse.Gathering: 0, abuse.Held: 0, abuse.Drafted: 0, abuse.Doubtful: 0}
		for _, b := range m.sources.Reports() {
			m.reports[b.State]++
		}
		m.asked = time.Now()
	}
	return m.reports // not changed any more
}

func (m *Metrics) collectBesides(put func(*metric, float64, ...string)) {
	if m.sources.Reports != nil {
		for s, n := range m.reportsNow() {
			put(reports, float64(n), string(s))
		}
	}
	if m.sources.Lookups != nil {
		for _, l := range m.sources.Lookups() {
			put(lookups, float64(l.Count), l.Source, l.Result)
		}
	}
	if m.sources.Hooks != nil {
		for _, h := range m.sources.Hooks() {
			put(hookTold, float64(h.Told), h.Name)
			put(hookWait, float64(h.Waiting), h.Name)
			put(hookSent, float64(h.Sent), h.Name, "sent")
			put(hookSent, float64(h.Failed), h.Name, "failed")
			put(hookFail, bit(h.Error != ""), h.Name)
		}
	}
}

func bit(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func unix(t time.Time) float64 {
	if t.IsZero() {
		return 0
	}
	return float64(t.UnixMilli()) / 1000
}
