package detector

import (
	"fmt"
	"net/netip"
	"time"
)

// Stats counts what the detector saw and keeps, since New.
type Stats struct {
	Opened   uint64 `json:"opened"`
	Closed   uint64 `json:"closed"` // closings of connections that were known to be open
	Refused  uint64 `json:"refused"`
	Accepted uint64 `json:"accepted"` // messages and logins
	// Assumed counts connections taken as closed without a closing line,
	// because the server counted fewer than were thought open.
	Assumed uint64 `json:"assumed_closed"`
	// Evicted counts sources (or their windows) forgotten for want of memory.
	Evicted uint64 `json:"evicted"`
	// Ignored counts events that could not be kept in full for want of memory.
	Ignored   uint64 `json:"ignored"`
	Sources   int    `json:"sources"` // distinct addresses remembered now
	KnownGood int    `json:"known_good"`
	Held      int    `json:"held"`
	PeakCount int    `json:"peak_count"` // highest count of the server, or of a sample
	// Counted is the highest count that the server wrote since it was started.
	Counted int `json:"counted"`
	// Memory is an estimate of the memory in use, in bytes.
	Memory int64 `json:"memory"`
	// Saturated is how long the server was saturated.
	Saturated time.Duration `json:"saturated_ns"`
}

// Stats returns the counters.
func (d *Detector) Stats() Stats {
	s := d.stats
	s.Held, s.Counted = d.Held(), d.maxCount
	s.KnownGood = d.goods.index.n
	s.Memory = int64(len(d.nodes.blocks))*slabSize*nodeBytes + d.index.bytes() +
		int64(len(d.goods.slab.blocks))*slabSize*goodBytes + d.goods.index.bytes() +
		int64(len(d.holders.blocks))*slabSize*holderBytes + d.byPort.bytes() +
		int64(len(d.sat.blocks))*ringsPerBlock*int64(d.sat.stride)*8 + int64(len(d.sat.owner))*8 +
		int64(len(d.opn.blocks))*ringsPerBlock*int64(d.opn.stride)*4 + int64(len(d.opn.owner))*8
	return s
}

// Explanation tells all that is known of a source, and why it is or is not
// over a rule.
type Explanation struct {
	Source netip.Prefix `json:"prefix"`
	Time   time.Time    `json:"time"` // the detector's now, in the log's time
	// Known is false if nothing of the source is remembered.
	Known bool `json:"known"`
	Held  int  `json:"held"`
	// Sources is the number of remembered addresses inside.
	Sources  int       `json:"sources"`
	Opens    int       `json:"opens"`
	Refused  int       `json:"refused"`
	Accepted int       `json:"accepted"`
	First    time.Time `json:"first,omitzero"`
	Last     time.Time `json:"last,omitzero"`
	// KnownGood lists known good senders inside, the latest first, 16 at
	// most; KnownGoodCount is how many there are.
	KnownGood      []GoodSender `json:"known_good,omitempty"`
	KnownGoodCount int          `json:"known_good_count"`
	// The server.
	Count        int     `json:"count"`
	Capacity     int     `json:"capacity"`
	CapacityFrom string  `json:"capacity_from"`
	Pressure     float64 `json:"pressure"`
	// Rules has one entry for each rule and each source that it would judge:
	// the address, and the prefixes around it.
	Rules []RuleScore `json:"rules,omitempty"`
}

// RuleScore is the standing of one source under one rule.
type RuleScore struct {
	Source    netip.Prefix  `json:"prefix"`
	Rule      string        `json:"rule"`
	Metric    Metric        `json:"metric"`
	Window    time.Duration `json:"window_ns"`
	Score     float64       `json:"score"` // of those members that count
	Threshold float64       `json:"threshold"`
	Held      int           `json:"held"`
	// Sources that count, and how many there must be (prefixes only).
	Sources    int `json:"sources"`
	MinSources int `json:"min_sources,omitempty"`
	// Excluded is the score of members that do not count: told already, or
	// known good.
	Excluded float64 `json:"excluded,omitempty"`
	// SilentUntil: the source had its verdict and has no other before.
	SilentUntil time.Time `json:"silent_until,omitzero"`
	// Need says what would have to happen for a verdict.
	Need string `json:"need"`
}

// Explain tells what is known of p, an address or a prefix of any length.
func (d *Detector) Explain(p netip.Prefix) Explanation {
	e := Explanation{Time: d.logTime(d.now), Count: d.Count(), Capacity: d.capacity, CapacityFrom: d.how, Pressure: d.Pressure()}
	k, ok := keyOfPrefix(p)
	if !ok {
		return e
	}
	e.Source = k.prefix()
	in := d.goodIn(k)
	e.KnownGoodCount = len(in)
	for _, g := range in[:min(len(in), maxSpared)] {
		e.KnownGood = append(e.KnownGood, g.sender())
	}
	tops := d.tops(k)
	e.Known = len(tops) > 0
	for _, i := range tops {
		n := d.nodes.at(i)
		e.Held += int(n.held)
		e.Sources += d.addresses(i)
		e.Opens += int(n.opens)
		e.Refused += int(n.refused)
		e.Accepted += int(n.accepted)
		if f := d.logTime(n.first); e.First.IsZero() || f.Before(e.First) {
			e.First = f
		}
		if l := d.logTime(n.last); l.After(e.Last) {
			e.Last = l
		}
	}
	if len(tops) == 1 && d.nodes.at(tops[0]).key == k {
		for i := tops[0]; i != 0; i = d.nodes.at(i).parent {
			e.Rules = d.explainRules(e.Rules, i)
		}
	}
	return e
}

// addresses counts the remembered addresses at and below node i.
func (d *Detector) addresses(i uint32) int {
	n := d.nodes.at(i)
	if n.level == 0 {
		return 1
	}
	sum := 0
	for c := n.child; c != 0; c = d.nodes.at(c).next {
		sum += d.addresses(c)
	}
	return sum
}

func (d *Detector) explainRules(list []RuleScore, i uint32) []RuleScore {
	n := d.nodes.at(i)
	l := &d.levels[n.level]
	for _, rules := range [...][]int{l.sat, l.opn} {
		for _, r := range rules {
			if !d.applies(r, n.key) {
				continue
			}
			rule := &d.cfg.Rules[r]
			s := RuleScore{Source: n.key.prefix(), Rule: rule.Name, Metric: rule.Metric, Window: rule.Window,
				Score: d.score(i, r), Held: int(n.held), Sources: 1}
			if n.cool > d.now {
				s.SilentUntil = d.logTime(n.cool)
			}
			if n.level == 0 {
				s.Threshold = d.threshold(n, rule)
				s.Need = d.need(&s, rule, s.Score >= s.Threshold-epsilon)
			} else {
				s.MinSources = rule.MinSources
				c, over := d.judgePrefix(i, r, s.Score, d.prefixThreshold(n, rule))
				s.Excluded = max(0, s.Score-c.score)
				s.Score, s.Threshold, s.Sources = c.score, c.threshold, c.tally.badN
				if c.score > c.threshold && !over && s.Sources >= rule.MinSources {
					s.Need = "a few of its members make up most of it, and are judged before it"
				} else {
					s.Need = d.need(&s, rule, over)
				}
			}
			list = append(list, s)
		}
	}
	return list
}

// need says what would have to happen for a verdict.
func (d *Detector) need(s *RuleScore, rule *Rule, over bool) string {
	if !s.SilentUntil.IsZero() {
		return "had its verdict, and has no other before " + s.SilentUntil.Format(time.DateTime)
	}
	var text string
	switch {
	case over && rule.Metric == Saturation && d.p == 0:
		text = "is over the threshold, but the server is not under pressure"
	case over && rule.Metric == Saturation && s.Held == 0:
		text = "is over the threshold, but holds no slot now"
	case over:
		text = "is over the threshold"
	case rule.Metric == Opens:
		text = fmt.Sprintf("would have to open %.0f connections in %s; opened %.0f", s.Threshold, span(rule.Window), s.Score)
	default:
		text = fmt.Sprintf("would have to keep %s of the slots (%.0f of %d) for %s while the server is full; kept %s",
			percent(s.Threshold), s.Threshold*float64(d.capacity), d.capacity, span(rule.Window), percent(s.Score))
	}
	if s.MinSources > 1 && s.Sources < s.MinSources {
		text += fmt.Sprintf("; by %d addresses or more, %d did", s.MinSources, s.Sources)
	}
	return text
}
