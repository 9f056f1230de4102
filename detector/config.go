package detector

import (
	"errors"
	"fmt"
	"slices"
	"time"
)

// Config is what New needs. Its zero value, with Rules from DefaultRules, is a
// sensible detector.
type Config struct {
	// Capacity is the number of slots of the server. 0: inferred from the
	// log, see Detector.Capacity.
	Capacity int
	// Rules are tried in this order; the first that a source crosses speaks.
	Rules []Rule
	// PressureFrom and SaturatedAt are shares of the capacity: slot-time
	// counts nothing while fewer than PressureFrom of the slots are taken,
	// fully from SaturatedAt on, and linearly in between. 0 means 0.5 and 0.9.
	PressureFrom, SaturatedAt float64
	// KnownGood says how senders of accepted mail are treated.
	KnownGood KnownGood
	// Memory bounds, in bytes, what the detector keeps; 0 means 64 MiB. What
	// is left out when it is full is counted in Stats.
	Memory int64
	// MaxHeldAge ends, in the detector's books, a connection whose closing
	// line never came (a killed child writes none); 0 means 24 h. The
	// server's own count corrects most such cases long before.
	MaxHeldAge time.Duration
	// Sampled says that Sampled events come regularly, from the kernel: then
	// they alone tell how many slots are taken, and the Count of an Opened
	// event is kept as evidence only.
	Sampled bool
}

// KnownGood configures the memory of addresses that delivered accepted mail or
// logged in.
//
// A known good address is judged by Factor times the threshold, and by
// Factor², or 0.6 of the slots if that is more, while it works: while it
// delivered, in the last three minutes, a message for each slot that it holds,
// or, with one slot or two, a message. Neither makes it immune: no saturation
// threshold is raised above 0.9.
type KnownGood struct {
	Factor float64       // 1 or more; 0 means 2
	MaxAge time.Duration // since the last message or login; 0 means 30 days
	Max    int           // addresses; 0 means 100,000
}

const (
	defaultMemory     = 64 << 20
	minMemory         = 4 << 20
	maxRules          = 64
	defaultCapacity   = 100
	maxCapacity       = 1 << 20
	defaultMaxHeldAge = 24 * time.Hour
)

// DefaultRules returns the shipped rules. Thresholds were set on recorded
// floods of a server with 100 slots: a source that holds 20 of 100 slots is
// found 7.5 s after the server is full; 10 addresses of one /64 with 2 slots
// each, in 10 s; a proper sender with 20 parallel deliveries is never found.
func DefaultRules() []Rule {
	return []Rule{
		// One address that takes slots and does not give them back.
		{Name: "hog", Metric: Saturation, Window: 10 * time.Second, Threshold: 0.15,
			Prefixes4: []int{32}, Prefixes6: []int{128}},
		// The same, smaller and for longer.
		{Name: "patient", Metric: Saturation, Window: 5 * time.Minute, Threshold: 0.10,
			Prefixes4: []int{32}, Prefixes6: []int{128}},
		// Many addresses of one network with a few slots each.
		{Name: "net", Metric: Saturation, Window: 12 * time.Second, Threshold: 0.15,
			Prefixes4: []int{24}, Prefixes6: []int{64, 56, 48}, MinSources: 5},
		// The same, smaller and for longer.
		{Name: "patient-net", Metric: Saturation, Window: 5 * time.Minute, Threshold: 0.10,
			Prefixes4: []int{24}, Prefixes6: []int{64, 56, 48}, MinSources: 4},
		// Smaller still, and for a quarter of an hour.
		{Name: "stubborn", Metric: Saturation, Window: 15 * time.Minute, Threshold: 0.05,
			Prefixes4: []int{32}, Prefixes6: []int{128}},
		// Connections as fast as they go, whether or not the slots are full.
		{Name: "burst", Metric: Opens, Window: 10 * time.Second, Threshold: 120,
			Prefixes4: []int{32}, Prefixes6: []int{128}},
		{Name: "storm", Metric: Opens, Window: time.Minute, Threshold: 300,
			Prefixes4: []int{32}, Prefixes6: []int{128}},
		{Name: "storm-net", Metric: Opens, Window: time.Minute, Threshold: 1000,
			Prefixes4: []int{24}, Prefixes6: []int{64, 56, 48}, MinSources: 5},
	}
}

// withDefaults fills in the zero values and tells everything that is wrong.
func (c Config) withDefaults() (Config, error) {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if c.PressureFrom == 0 {
		c.PressureFrom = 0.5
	}
	if c.SaturatedAt == 0 {
		c.SaturatedAt = 0.9
	}
	if !(c.PressureFrom > 0 && c.PressureFrom <= c.SaturatedAt && c.SaturatedAt <= 1) {
		bad("pressure_from %v and saturated_at %v: want 0 < pressure_from <= saturated_at <= 1", c.PressureFrom, c.SaturatedAt)
	}
	if c.Capacity < 0 || c.Capacity > maxCapacity {
		bad("capacity %d: want 0 (inferred) to %d slots", c.Capacity, maxCapacity)
	}
	if c.KnownGood.Factor == 0 {
		c.KnownGood.Factor = 2
	}
	if !(c.KnownGood.Factor >= 1 && c.KnownGood.Factor <= 1000) {
		bad("known good factor %v: want 1 to 1000", c.KnownGood.Factor)
	}
	if c.KnownGood.MaxAge == 0 {
		c.KnownGood.MaxAge = 30 * 24 * time.Hour
	}
	if c.KnownGood.MaxAge < 0 {
		bad("known good age %v: want more than 0", c.KnownGood.MaxAge)
	}
	if c.KnownGood.Max == 0 {
		c.KnownGood.Max = 100_000
	}
	if c.KnownGood.Max < 0 {
		bad("known good maximum %d: want 1 or more", c.KnownGood.Max)
	}
	if c.MaxHeldAge == 0 {
		c.MaxHeldAge = defaultMaxHeldAge
	}
	if c.MaxHeldAge < time.Minute {
		bad("longest held connection %v: want a minute or more", c.MaxHeldAge)
	}
	if c.Memory == 0 {
		// Room for twice the capacity in held connections, see budget.
		c.Memory = defaultMemory + int64(max(c.Capacity, 0))*4096 + int64(max(c.KnownGood.Max-100_000, 0))*goodCost
	}
	if c.Memory < minMemory {
		bad("memory %d: want %d bytes or more", c.Memory, minMemory)
	}

	if len(c.Rules) > maxRules {
		bad("%d rules: want %d at most", len(c.Rules), maxRules)
	}
	c.Rules = slices.Clone(c.Rules)
	names := make(map[string]bool)
	for i := range c.Rules {
		r := &c.Rules[i]
		if err := r.check(); err != nil {
			bad("rule %q: %w", r.Name, err)
		}
		if names[r.Name] {
			bad("rule %q: the name is taken twice", r.Name)
		}
		names[r.Name] = true
		r.Prefixes4 = slices.Clone(r.Prefixes4)
		r.Prefixes6 = slices.Clone(r.Prefixes6)
	}
	return c, errors.Join(errs...)
}

// check tells the first thing that is wrong with r.
func (r *Rule) check() error {
	switch {
	case r.Name == "":
		return errors.New("has no name")
	case r.Metric != Saturation && r.Metric != Opens:
		return errors.New("has no metric: want saturation or opens")
	case r.Window < time.Second || r.Window > 24*time.Hour || r.Window%time.Second != 0:
		return fmt.Errorf("window %v: want whole seconds, 1s to 24h", r.Window)
	case r.Metric == Saturation && !(r.Threshold > 0 && r.Threshold <= 1):
		return fmt.Errorf("threshold %v: want more than 0 and at most 1", r.Threshold)
	case r.Metric == Opens && !(r.Threshold >= 1 && r.Threshold <= 1e9):
		return fmt.Errorf("threshold %v: want 1 to 1e9 connections", r.Threshold)
	case r.MinSources < 0:
		return fmt.Errorf("min_sources %d: want 0 or more", r.MinSources)
	case len(r.Prefixes4)+len(r.Prefixes6) == 0:
		return errors.New("looks at no prefix length")
	}
	for _, b := range r.Prefixes4 {
		if b < 1 || b > 32 {
			return fmt.Errorf("prefix /%d: want /1 to /32 for IPv4", b)
		}
	}
	for _, b := range r.Prefixes6 {
		if b < 1 || b > 128 {
			return fmt.Errorf("prefix /%d: want /1 to /128 for IPv6", b)
		}
	}
	return nil
}
