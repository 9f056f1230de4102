package detector

import (
	"net/netip"
	"time"
)

// Metric is what a Rule measures.
type Metric uint8

const (
	// Saturation is the share of the server's slot-time that a source held
	// in the window, counted only while there was pressure: 0 to 1.
	Saturation Metric = iota + 1
	// Opens is the number of connections that a source opened in the window.
	Opens
)

// Rule is a threshold on one metric over one sliding window.
type Rule struct {
	// Name is unique among the rules and appears in every verdict.
	Name   string
	Metric Metric
	// Window is the length of the sliding window, a whole number of seconds,
	// 1 s to 24 h.
	Window time.Duration
	// Threshold is reached at this value or above: 0 < t <= 1 for
	// Saturation, a number of connections for Opens.
	Threshold float64
	// Prefixes4 and Prefixes6 are the prefix lengths that the rule looks at,
	// in bits: 1 to 32 and 1 to 128. Empty: the rule leaves that family out.
	Prefixes4, Prefixes6 []int
	// MinSources is the smallest number of distinct addresses that a prefix
	// wider than one address must have in the window; 0 and 1 mean no limit.
	MinSources int
}

// Evidence is one event that led to a verdict.
type Evidence struct {
	Time   time.Time  `json:"time"`
	Source netip.Addr `json:"source"`
	Port   uint16     `json:"port,omitempty"`
	Count  int        `json:"count,omitempty"` // the server's count with this connection, 0: unknown
}

// Verdict says that a source crossed a rule, and why. It is arithmetic on
// events; whether anything is blocked is not decided here.
type Verdict struct {
	// Time is when the threshold was crossed, in the time of the log.
	Time   time.Time     `json:"time"`
	Source netip.Prefix  `json:"prefix"` // masked; /32 or /128 for one address
	Rule   string        `json:"rule"`
	Metric Metric        `json:"metric"`
	Window time.Duration `json:"window_ns"`
	// Score is the value that crossed Threshold: see Metric. For a prefix it
	// leaves out what its own over-threshold members held.
	Score     float64 `json:"score"`
	Threshold float64 `json:"threshold"`
	// Held is the number of slots that Source holds at Time.
	Held int `json:"held"`
	// Sources is the number of distinct addresses of Source in the window
	// (1 for an address; a lower bound after evictions).
	Sources int `json:"sources"`
	// Opens, Refused and Accepted count the events of Source since it was
	// first remembered; they are bounded by memory, not by the window.
	Opens    int `json:"opens"`
	Refused  int `json:"refused"`
	Accepted int `json:"accepted"`
	// Capacity and Count are the server's slots and how many were taken.
	Capacity int `json:"capacity"`
	Count    int `json:"count"`
	// Unproven: how many slots the server has is a guess, and it turned nobody
	// away for want of one within Window. It may have many more than Capacity
	// and be far from full. Of saturation only.
	Unproven bool `json:"unproven,omitempty"`
	// First is when Source was first seen, zero if forgotten.
	First time.Time `json:"first,omitzero"`
	// Spared is not empty if Source must not be blocked as a whole because
	// of known good senders in it: then the verdicts on its bad members
	// follow, and this one is only to be told.
	Spared []netip.Addr `json:"spared,omitempty"` // bounded; KnownGood has the full number
	// KnownGood is the number of known good senders inside Source.
	KnownGood int `json:"known_good,omitempty"`
	// Evidence is a bounded sample of the connections of Source, oldest first.
	Evidence []Evidence `json:"evidence,omitempty"`
}
