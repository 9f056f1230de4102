// Package detector says who floods a mail server. It turns a stream of
// events (connections opened, closed, refused, mail accepted) into verdicts
// on addresses and prefixes, by arithmetic alone: it has no clock, no file
// and no goroutine, so the same events always give the same verdicts.
package detector

import (
	"net/netip"
	"time"
)

// Kind says what an Event reports.
type Kind uint8

const (
	// None is the zero value: no event.
	None Kind = iota
	// Tick is the passing of time and nothing else: a log line that is of
	// no interest but has a time, or the clock while the log is silent.
	Tick
	// Opened: the server gave a slot to a connection of Source. Count is the
	// server's own count of taken slots, this one included (0: not known).
	Opened
	// Closed: the connection of Source (and Port, if known) gave its slot
	// back. Closed never makes a holder, it only frees one that is known.
	Closed
	// Refused: the server turned Source away without giving it a slot, for
	// the reason in Reason. RefusedFull says that the server was full; it
	// does not say by whom, and Source is most often a victim.
	Refused
	// Accepted: a message from Source was accepted for delivery.
	Accepted
	// Authenticated: Source logged in with a valid password.
	Authenticated
	// AuthFailed: Source tried to log in and was turned down.
	AuthFailed
	// DaemonStarted: the mail server (re)started and counts from 1 again.
	// Connections that were open stay open, outside the new count.
	DaemonStarted
	// Sampled: the kernel's socket table was read; Count is the number of
	// connections that hold a slot now. It corrects the count as an Opened
	// line does and carries no Source.
	Sampled
)

// Reason says why a connection was refused or how it ended.
type Reason uint8

const (
	// ReasonUnknown is the zero value.
	ReasonUnknown Reason = iota

	// Why a connection was refused.

	RefusedFull    // all slots taken ("too many connections")
	RefusedPerHost // the source has too many of its own
	RefusedLoad    // load average
	RefusedPolicy  // host_reject_connection, connect ACL, tcp wrappers, not in reserve list ...

	// How a connection ended.

	ClosedQuit     // the peer said QUIT
	ClosedLost     // the peer went away
	ClosedTimeout  // the peer said nothing for too long
	ClosedDropped  // the server hung up: too many errors, DROP in an ACL, synchronization error
	ClosedRejected // refused by the server's child after it had taken a slot
	ClosedKilled   // ended from outside: SIGTERM, or a socket destroyed by us (ECONNABORTED)
	ClosedVanished // not in the kernel's socket table any more; no line told of its end
)

// Event is one thing that happened at the mail server.
type Event struct {
	// Time is the log line's own time. The zero time means "at the time of
	// the event before".
	Time time.Time
	// Source is the peer's address, unmapped and without zone. It is invalid
	// for Tick, DaemonStarted and Sampled.
	Source netip.Addr
	// Local is the server's own address and port; its zero value if the log
	// does not say.
	Local netip.AddrPort
	// Count is explained at Opened and Sampled; 0 if not known.
	Count int
	// Capacity is the number of slots that the server says it has, as it turns
	// Source away because only those in reserve are left; 0 if it does not say.
	// It counts with any Kind.
	Capacity int
	// Port is the peer's TCP port; 0 if the log does not say.
	Port uint16
	Kind Kind
	// Reason is explained at Refused and Closed.
	Reason Reason
}
