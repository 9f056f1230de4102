// Package firewall drops the packets of a prefix until a time, in whatever
// packet filter the machine has.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"strings"
	"time"
)

// Entry is all that a packet filter has to know of a block.
type Entry struct {
	// Prefix is masked and not IPv4-mapped.
	Prefix netip.Prefix
	// Until is when the block ends. A backend with Capabilities.Timeouts
	// ends it by itself, also when this program is dead.
	Until time.Time
}

// Installed is an entry as read back from the packet filter.
type Installed struct {
	Prefix netip.Prefix
	// Until is when the filter itself will end the entry, or, without
	// Capabilities.Timeouts, when it was to end; zero if it does not tell.
	Until time.Time
	// Packets and Bytes are what the entry has stopped; both 0 without
	// Capabilities.Counters.
	Packets, Bytes uint64
}

// Options are the settings common to all backends.
type Options struct {
	// Ports are the TCP destination ports that blocked sources cannot reach.
	// Empty: every port and protocol.
	Ports []uint16
	// Allow are prefixes whose packets pass whatever the entries say: the
	// filter's own last guard behind the guard's gate.
	Allow []netip.Prefix
	// MaxEntries bounds the number of entries; 0 means 100,000.
	MaxEntries int
	// Hook is where packets are dropped: "prerouting" (the default when
	// empty; priority raw, ahead of conntrack, protects containers too) or
	// "input".
	Hook string
	// Timeout bounds each exchange with the filter; 0 means 5 s.
	Timeout time.Duration
	// State is a directory of ours for what a backend has to remember across a
	// kill; empty: it remembers nothing. Only csf needs it.
	State string
	// Progress, where set, makes a filter that is slow (csf) go on until all is
	// done or the context ends, rather than leave for a later call what takes
	// too long: for a command after which nobody calls again. It is called
	// after each change.
	Progress func(done, of int)
	// NetNS is the file descriptor of the network namespace to work in; 0
	// means the caller's own. For tests and the demonstration.
	NetNS int
}

// Capabilities state how a backend differs from the others.
type Capabilities struct {
	IPv6 bool
	// Prefixes: blocks wider than one address are possible.
	Prefixes bool
	// Timeouts: the filter ends an entry at its Until by itself. Without, the
	// caller unsets it.
	Timeouts bool
	// Atomic: Apply and Replace happen wholly or not at all, but for entries
	// for which there is no room.
	Atomic bool
	// Readback: List tells what is really in the filter. Expiry: with Until.
	Readback, Expiry bool
	Counters         bool
	// Real: packets are dropped. False for the memory backend.
	Real bool
	// MaxEntries is the filter's own limit; 0: none known.
	MaxEntries int
	// MaxTimeout is the longest timeout that the filter takes; 0: no limit.
	// A backend sets longer entries with MaxTimeout; the caller re-arms them.
	MaxTimeout time.Duration
}

// Warner is a Firewall that has to say something about its surroundings that
// is no error: one sentence each, with what to do.
type Warner interface {
	Warnings() []string
}

// longestEntry is longer than any block; what fits into a time.Duration does
// not take the year 9999, and what a filter does with more is not known.
const longestEntry = 200 * 365 * 24 * time.Hour

// Batch is a set of changes. A prefix is in Set or in Unset, never in both.
type Batch struct {
	Set   []Entry
	Unset []netip.Prefix
}

// Failure tells which prefix could not be changed, and why.
type Failure struct {
	Prefix netip.Prefix
	Err    error
}

// Result tells what became of a Batch.
type Result struct {
	// Failed names what was not applied. It is empty if Apply returned nil.
	Failed []Failure
}

// Errors that a caller decides on. They are wrapped: use errors.Is.
var (
	// ErrUnavailable: the filter cannot be used here (no kernel support, no
	// permission, no program). Retrying soon is pointless.
	ErrUnavailable = errors.New("packet filter not available")
	// ErrGone: our table, chain or set vanished. Ensure, then Replace.
	ErrGone = errors.New("our rules are gone from the packet filter")
	// ErrFull: the filter takes no more entries.
	ErrFull = errors.New("packet filter is full")
	// ErrUnknown: the exchange failed half-way and what is in the filter is
	// not known (timeout, lost answers). Replace before anything else.
	ErrUnknown = errors.New("state of the packet filter is not known")
)

// PartialError is what Replace returns when the filter holds the entries and
// nothing else of ours, but for some that it did not take: there is no room for
// all, or it is slow. Its state is known. It wraps the reasons.
type PartialError struct {
	Failed []Failure // never empty
	Err    error
}

func (e *PartialError) Error() string {
	return fmt.Sprintf("%d of the blocks are not in the packet filter, the others are: %v", len(e.Failed), e.Err)
}

func (e *PartialError) Unwrap() error { return e.Err }

// RemainError is what Close with remove returns, and CSFTeller.Settle, when they
// could not take away everything: the filter still drops these sources.
type RemainError struct {
	Prefixes []netip.Prefix
	Err      error
}

func (e *RemainError) Error() string {
	return fmt.Sprintf("%d of our bans are left (%s): %v", len(e.Prefixes), Some(e.Prefixes), e.Err)
}

func (e *RemainError) Unwrap() error { return e.Err }

// Some names prefixes in a sentence: the first twenty, and how many more.
func Some(list []netip.Prefix) string {
	const most = 20
	var b strings.Builder
	for i, p := range list[:min(len(list), most)] {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(p.String())
	}
	if n := len(list) - most; n > 0 {
		fmt.Fprintf(&b, " and %d more", n)
	}
	return b.String()
}

// partial is the error of a Replace of which this became.
func partial(res Result, err error) error {
	if err == nil || len(res.Failed) == 0 {
		return err
	}
	return &PartialError{Failed: res.Failed, Err: err}
}

// Firewall is a packet filter that holds our entries and nothing else's. Its
// methods are called by one goroutine at a time.
type Firewall interface {
	// Name is the backend's name as in policy.yaml.
	Name() string
	// Probe says whether the backend can work here, without changing
	// anything that lasts. The error says what is missing and wraps
	// ErrUnavailable.
	Probe(ctx context.Context) (Capabilities, error)
	// Ensure puts table, chains, rules and sets in place, in front of every
	// rule that accepts established connections. It is idempotent and keeps
	// entries that are already there; where our layout had to be made anew
	// changed is true and entries may be missing: Replace must follow.
	Ensure(ctx context.Context) (changed bool, err error)
	// Intact reports whether the filter drops what it holds, and changes
	// nothing. It is less strict than Ensure: rules of ours that were made for
	// other Options are good enough.
	Intact(ctx context.Context) (bool, error)
	// Apply makes the changes. Set of a prefix that is present gives it the
	// new Until, shorter or longer; Unset of a missing one is no error; an
	// Entry whose Until is past is unset. Nested prefixes are independent.
	// After an error Result.Failed names what is not applied; with
	// ErrUnknown and ErrGone nothing is promised until Replace succeeds. Where
	// there is no room for all (ErrFull), removals are made, and the widest
	// entries, of equals those that last longest, go in as far as they fit.
	Apply(ctx context.Context, b Batch) (Result, error)
	// List yields the entries that the filter holds now, in no order.
	List(ctx context.Context) iter.Seq2[Installed, error]
	// Replace makes the filter hold exactly these entries, without a moment
	// in which a block that stays is missing where Capabilities.Atomic. It
	// implies Ensure. What the filter did not take, for want of room with the
	// preference of Apply, is named by a *PartialError.
	Replace(ctx context.Context, entries []Entry) error
	// Watch calls changed whenever somebody else touched our rules, with the
	// name of the culprit if known, until ctx ends. It returns
	// errors.ErrUnsupported at once where the filter has no events.
	Watch(ctx context.Context, changed func(by string)) error
	// Close lets go of the filter. Entries stay in force until their time
	// unless remove is set: then everything of ours is taken away. Where a slow
	// filter could not until ctx ended, the error is a *RemainError.
	Close(ctx context.Context, remove bool) error
}
