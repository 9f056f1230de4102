package diagnose

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Kind is what a finding is about.
type Kind string

const (
	NotRunning  Kind = "not-running"                // Exim serves nobody at this moment
	FullFew     Kind = "slots-full-few-sources"     // a flood by sources that can be named
	FullMany    Kind = "slots-full-proper-senders"  // too few slots for the mail there is
	FullSpread  Kind = "slots-full-many-strangers"  // many sources, few of which sent mail
	FullUnknown Kind = "slots-full-unknown-holders" // the log does not tell who holds slots
	NearFull    Kind = "slots-nearly-full"          // nobody was refused, but there was no room left
	CheckLogin  Kind = "check-login-broken"         // the monitor's own password is wrong
	Load        Kind = "load"                       // refused for the load average
	Queued      Kind = "mail-only-queued"           // not delivered at once, for load or connections
	Disk        Kind = "disk"
	Port        Kind = "port-taken"
	Fork        Kind = "no-process" // Exim cannot start its children
	Config      Kind = "configuration"
	Cert        Kind = "certificate"
	Down        Kind = "daemon-down" // nothing listened, or the process was gone
	Restarts    Kind = "restarts"    // by nobody that the logs name
	Storm       Kind = "storm"       // very many connections, which the server bore
	Unexplained Kind = "check-fails" // the monitor's checks fail, the log does not show why
)

// Confidence says how far a finding can be trusted.
type Confidence string

const (
	Certain  Confidence = "certain"  // the lines say it
	Likely   Confidence = "likely"   // they fit, and nothing else does
	Possible Confidence = "possible" // worth a look
)

// Span is a stretch of time.
type Span struct {
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
}

// Source is who held slots while there were no more.
type Source struct {
	Prefix    netip.Prefix `json:"prefix"`
	Share     float64      `json:"share"` // of the slots, 0 to 1
	Addresses int          `json:"addresses"`
	Why       string       `json:"why,omitempty"` // what the rules say; empty: nothing
	// Messages were accepted from it, in all of the logs.
	Messages int `json:"messages,omitempty"`
}

// Finding is one thing that was wrong.
type Finding struct {
	Kind       Kind       `json:"kind"`
	Title      string     `json:"title"` // a sentence without its full stop
	Confidence Confidence `json:"confidence"`
	First      time.Time  `json:"first,omitzero"`
	Last       time.Time  `json:"last,omitzero"`
	// Times is how often: lines, or for slots stretches of time.
	Times int `json:"times"`
	// Explains counts the failed checks of the monitor that come from it.
	Explains int      `json:"failed_checks_explained"`
	Why      []string `json:"why"`
	Do       []string `json:"do"`
	// Lines are of the logs, bounded, with what is not printable escaped.
	Lines   []string `json:"lines,omitempty"`
	Spans   []Span   `json:"spans,omitempty"`   // the longest, bounded
	Sources []Source `json:"sources,omitempty"` // those with the largest shares, bounded
	// AcceptMax is the smtp_accept_max that would have sufficed; 0: not asked.
	AcceptMax int `json:"accept_max_needed,omitempty"`

	reasons []reason // of the monitor's that fit
	weight  int
	all     []Span
}

// Report is the answer.
type Report struct {
	First time.Time `json:"first,omitzero"`
	Last  time.Time `json:"last,omitzero"`
	// Latest is the time of Exim's last line, also if it is out of bounds.
	Latest    time.Time `json:"latest_line,omitzero"`
	Lines     uint64    `json:"lines"`
	Unparsed  uint64    `json:"unparsed"`
	Opened    uint64    `json:"opened"`
	Accepted  uint64    `json:"accepted"`
	PeakCount int       `json:"peak_count"`
	Capacity  int       `json:"capacity"`
	From      string    `json:"capacity_from"`
	Checks    int       `json:"checks"` // results of the monitor
	Failed    int       `json:"failed_checks"`
	Starts    int       `json:"daemon_starts"`
	// Findings, the most telling first; none: nothing explains a flapping.
	Findings []Finding `json:"findings"`
}

const (
	maxSpans = 10
	// near is how far from an episode a failed check still belongs to it: the
	// monitor looks every five minutes and tells a little later.
	near = 7 * time.Minute
)

// Report says what was found. Nothing can be read afterwards.
func (d *Diagnosis) Report() Report {
	d.slots.finish()
	r := Report{First: d.first, Last: d.last, Latest: d.latest, Lines: d.lines, Unparsed: d.unparsed, Opened: d.opened, Accepted: d.accepted, Starts: len(d.starts)}
	r.PeakCount = d.slots.det.Stats().PeakCount
	r.Capacity, r.From = d.slots.det.Capacity()
	var failed []check
	for _, c := range d.checks {
		r.Checks++
		if c.why != checkOK {
			failed = append(failed, c)
		}
	}
	r.Failed = len(failed)
	found := append(append([]Finding{}, d.slotFindings()...), d.lineFindings()...) // never null in JSON
	rest := explain(found, failed)
	found = append(found, d.monitorFindings(rest)...)
	found = append(found, d.restarts(found)...)
	found = append(found, d.machineFindings()...)
	for i := range found {
		f := &found[i]
		d.words(f, failed)
		slices.SortFunc(f.all, func(a, b Span) int { return cmp.Compare(b.Last.Sub(b.First), a.Last.Sub(a.First)) })
		f.Spans = f.all[:min(len(f.all), maxSpans)]
		slices.SortFunc(f.Spans, func(a, b Span) int { return a.First.Compare(b.First) })
	}
	// What is so now comes first, then what explains the mails, then what does
	// most harm.
	now := func(f Finding) int { return map[bool]int{true: 0, false: 1}[f.Kind == NotRunning] }
	slices.SortStableFunc(found, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(now(a), now(b)), cmp.Compare(b.Explains, a.Explains), cmp.Compare(b.weight, a.weight), cmp.Compare(b.Times, a.Times))
	})
	r.Findings = found
	return r
}

// weights say which finding does more harm, where checks do not tell.
var weights = map[Kind]int{
	NotRunning: 200, FullFew: 100, FullMany: 95, FullSpread: 92, FullUnknown: 90, Port: 85, Config: 84, Fork: 82, Down: 80, CheckLogin: 75,
	Disk: 70, Load: 65, Cert: 50, Unexplained: 45, Restarts: 40, Queued: 20, NearFull: 15, Storm: 10,
}

// slotFindings are one for each kind of episode.
func (d *Diagnosis) slotFindings() []Finding {
	var found []Finding
	for _, k := range []Kind{FullFew, FullMany, FullSpread, FullUnknown, NearFull} {
		f := Finding{Kind: k, weight: weights[k], reasons: []reason{checkFull, checkSilent}}
		longest := time.Duration(-1)
		for i := range d.slots.past {
			e := &d.slots.past[i]
			if e.kind != k {
				continue
			}
			f.Times++
			f.all = append(f.all, Span{e.first, e.last})
			if f.First.IsZero() {
				f.First = e.first
			}
			f.Last = e.last
			f.Lines = append(f.Lines, e.lines[:min(len(e.lines), maxLines-len(f.Lines))]...)
			if took := e.last.Sub(e.first); took > longest {
				longest, f.Sources = took, e.top
			}
			if k == FullMany {
				f.AcceptMax = max(f.AcceptMax, e.need)
			}
		}
		if f.Times == 0 {
			continue
		}
		if k == FullMany {
			f.AcceptMax = max(f.AcceptMax, 1)
		}
		if k == NearFull {
			f.reasons = nil
		}
		found = append(found, f)
	}
	return found
}

// lineFindings are one for each kind of line.
func (d *Diagnosis) lineFindings() []Finding {
	var found []Finding
	for _, k := range []struct {
		line    int
		kind    Kind
		reasons []reason
	}{
		{tLogin, CheckLogin, []reason{checkLogin}}, {tLoad, Load, []reason{checkLoad}}, {tQueued, Queued, nil},
		{tDisk, Disk, []reason{checkOther}}, {tPort, Port, []reason{checkRefuse, checkGone}}, {tFork, Fork, []reason{checkSilent, checkOther}},
		{tConfig, Config, []reason{checkRefuse, checkGone}}, {tCert, Cert, nil}, {tStorm, Storm, nil},
	} {
		t := &d.trouble[k.line]
		if t.n == 0 || k.kind == Storm && d.slots.flooded() {
			continue // a flood that filled the slots is told as that
		}
		found = append(found, Finding{Kind: k.kind, weight: weights[k.kind], reasons: k.reasons, Times: t.n,
			First: t.first, Last: t.last, Lines: t.lines, all: []Span{{t.first, t.last}}})
	}
	return found
}

// explain counts for each finding the failed checks that come from it, and
// returns those that come from none.
func explain(found []Finding, failed []check) (rest []check) {
	for _, c := range failed {
		best := -1
		for i := range found {
			f := &found[i]
			fits := slices.Contains(f.reasons, c.why) || c.why == unsaid && f.reasons != nil
			close := c.at.IsZero() || slices.ContainsFunc(f.all, func(s Span) bool {
				return !c.at.Before(s.First.Add(-near)) && !c.at.After(s.Last.Add(near))
			})
			if fits && close && (best < 0 || f.weight > found[best].weight) {
				best = i
			}
		}
		if best < 0 {
			rest = append(rest, c)
			continue
		}
		found[best].Explains++
	}
	return rest
}

// monitorFindings are what the monitor tells and the log does not.
func (d *Diagnosis) monitorFindings(rest []check) []Finding {
	kinds := map[reason]Kind{checkFull: FullUnknown, checkLogin: CheckLogin, checkLoad: Load, checkRefuse: Down, checkGone: Down}
	by := make(map[Kind]*Finding)
	for _, c := range rest {
		k, ok := kinds[c.why]
		if !ok {
			k = Unexplained
		}
		f := by[k]
		if f == nil {
			f = &Finding{Kind: k, weight: weights[k]}
			by[k] = f
		}
		f.Times++
		f.Explains++
		f.Lines = append(f.Lines, c.lines[:min(len(c.lines), maxLines-len(f.Lines))]...)
		if c.at.IsZero() {
			continue
		}
		f.all = append(f.all, Span{c.at, c.at})
		if f.First.IsZero() || c.at.Before(f.First) {
			f.First = c.at
		}
		if c.at.After(f.Last) {
			f.Last = c.at
		}
	}
	var found []Finding
	for _, k := range []Kind{FullUnknown, CheckLogin, Load, Down, Unexplained} {
		if f := by[k]; f != nil {
			found = append(found, *f)
		}
	}
	return found
}

// restarts is a finding if Exim was started often, and nothing that was found
// is the reason.
func (d *Diagnosis) restarts(found []Finding) []Finding {
	f := Finding{Kind: Restarts, weight: weights[Restarts]}
	var times []time.Time
	for _, s := range d.starts {
		if s.hup || slices.ContainsFunc(found, func(f Finding) bool {
			return f.Kind != Storm && f.Kind != Queued && f.Kind != NearFull && slices.ContainsFunc(f.all, func(p Span) bool {
				return !s.at.Before(p.First.Add(-near)) && !s.at.After(p.Last.Add(quiet))
			})
		}) {
			continue
		}
		times = append(times, s.at)
		if len(f.Lines) < maxLines {
			f.Lines = append(f.Lines, s.line)
		}
	}
	// An update or an administrator makes one or two.
	often := false
	for i := range times {
		if i >= 2 && times[i].Sub(times[i-2]) <= time.Hour {
			often = true
		}
	}
	if !often {
		return nil
	}
	f.Times, f.First, f.Last = len(times), times[0], times[len(times)-1]
	f.all = []Span{{f.First, f.Last}}
	return []Finding{f}
}
