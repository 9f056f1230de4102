// Package doctor says whether this machine is ready to be protected, and what
// to do where it is not. Look gathers facts and changes nothing; Examine
// judges them, and knows nothing of the machine: so every judgement can be
// tested with a world that is stated as data.
package doctor

import (
	"slices"
)

// Status is what became of a check.
type Status string

const (
	Fail    Status = "fail" // the server is not protected, or wrongly
	Warn    Status = "warn" // it could be better, or will be wrong one day
	Skipped Status = "skip" // it could not be looked at
	Note    Status = "note" // nothing is wrong, but something could be better
	OK      Status = "ok"
)

// severity is the order in which a person wants to read.
var severity = map[Status]int{Fail: 0, Warn: 1, Skipped: 2, Note: 3, OK: 4}

// Check is one thing that was looked at.
type Check struct {
	// Name is stable, for tools.
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Says is what was found, a sentence without its full stop; Means why it
	// matters, where Status is not OK.
	Says  string `json:"says"`
	Means string `json:"means,omitempty"`
	// Mend is what to do: commands and lines to be pasted as they are, those
	// of them that are for a person to read end in a colon or a full stop.
	Mend []string `json:"mend,omitempty"`
}

// Report is all checks, the worst first.
type Report struct {
	OK      int     `json:"ok"`
	Warn    int     `json:"warn"`
	Fail    int     `json:"fail"`
	Skipped int     `json:"skipped"`
	Notes   int     `json:"notes"`
	Checks  []Check `json:"checks"`
}

// Examine judges the facts.
func Examine(f *Facts) Report {
	var r Report
	x := &exam{Facts: f, add: func(c Check) { r.Checks = append(r.Checks, c) }}
	for _, check := range []func(*exam){
		(*exam).policyFile, (*exam).mode, (*exam).daemon, (*exam).store, (*exam).unit,
		(*exam).logs, (*exam).eximAnswers, (*exam).selector, (*exam).zone, (*exam).eximListens,
		(*exam).slots, (*exam).timeouts, (*exam).reserve, (*exam).loadReserve, (*exam).perHost,
		(*exam).sockets, (*exam).capabilities, (*exam).firewall, (*exam).rules, (*exam).neighbours, (*exam).csf,
		(*exam).self, (*exam).operator, (*exam).regulars, (*exam).healthCheck, (*exam).knownGood,
		(*exam).clock, (*exam).reports,
	} {
		check(x)
	}
	slices.SortStableFunc(r.Checks, func(a, b Check) int { return severity[a.Status] - severity[b.Status] })
	for _, c := range r.Checks {
		switch c.Status {
		case OK:
			r.OK++
		case Warn:
			r.Warn++
		case Fail:
			r.Fail++
		case Note:
			r.Notes++
		default:
			r.Skipped++
		}
	}
	return r
}

// exam is the facts, and where the checks go.
type exam struct {
	*Facts
	add  func(Check)
	told map[string]told // by option, see setting
}

func (x *exam) ok(name, says string) { x.add(Check{Name: name, Status: OK, Says: says}) }

func (x *exam) note(name, says string, mend ...string) {
	x.add(Check{Name: name, Status: Note, Says: says, Mend: mend})
}

func (x *exam) skip(name, says string) { x.add(Check{Name: name, Status: Skipped, Says: says}) }

func (x *exam) warn(name, says, means string, mend ...string) {
	x.add(Check{name, Warn, says, means, mend})
}

func (x *exam) fail(name, says, means string, mend ...string) {
	x.add(Check{name, Fail, says, means, mend})
}
