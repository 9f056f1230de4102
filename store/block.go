// Package store keeps what must survive a restart: blocks, offences, known
// good senders, the operator's allowlist and positions in logs, in one bbolt
// file.
package store

import (
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// Block is a source that must not reach the mail server until a time,
// together with why and what became of it. Once written it is never deleted
// before Store.Prune: an ended block is an offence.
type Block struct {
	// ID is given by Store.Add, rising from 1.
	ID     uint64       `json:"id"`
	Prefix netip.Prefix `json:"prefix"`
	// PartOf is the prefix that was to be blocked, where Prefix is one part of
	// it because somebody in it is allowed; Part counts its parts from 1. The
	// zero Prefix and 0 otherwise.
	PartOf netip.Prefix `json:"part_of,omitzero"`
	Part   int          `json:"part,omitempty"`
	// Verdict is why; nil for a block by hand.
	Verdict *detector.Verdict `json:"verdict,omitempty"`
	// Reason is the operator's word, or the sentence that explains Verdict.
	Reason string `json:"reason"`
	// Offence is 1 for the first block of this source, 2 for the second ...
	Offence int       `json:"offence"`
	Since   time.Time `json:"since"`
	Until   time.Time `json:"until"`
	// By says who decided: "smtpguard", or "NAME (uid N)" for an operator.
	By string `json:"by"`
	// Observed: decided in observe mode; nothing was ever dropped.
	Observed bool `json:"observed,omitempty"`
	// Lifted is when the block ended before its time, zero if it did not;
	// LiftedBy says who ended it and why:
	// an operator, or Self and a colon.
	Lifted   time.Time `json:"lifted,omitzero"`
	LiftedBy string    `json:"lifted_by,omitempty"`
	// Replaced: it was lifted because another block took its place.
	Replaced bool `json:"replaced,omitempty"`
	// Ended is the number of connections of the source that were ended when
	// the block came into force, and Relief how long that took after the
	// verdict, until the socket table showed none; 0 if it was not measured.
	Ended  int           `json:"ended,omitempty"`
	Relief time.Duration `json:"relief_ns,omitempty"`
}

// Self is who made or lifted a block (By, and the beginning of LiftedBy)
// when it was this program's own decision.
const Self = "smtpguard"

// Whole is the prefix that was to be blocked: PartOf, or Prefix itself.
func (b Block) Whole() netip.Prefix {
	if b.PartOf.IsValid() {
		return b.PartOf
	}
	return b.Prefix
}

// End is when the block ended or will end: when it was lifted, else Until.
func (b Block) End() time.Time {
	if !b.Lifted.IsZero() {
		return b.Lifted
	}
	return b.Until
}

// Pardoned reports whether the block was lifted, which says that it should not
// have been: by an operator, because its source became allowed, or because
// nobody stood for the trial that it belonged to. One that another block
// replaced is not pardoned.
func (b Block) Pardoned() bool { return !b.Lifted.IsZero() && !b.Replaced }

// InForce reports whether the block should hold at time t.
func (b Block) InForce(t time.Time) bool {
	return b.Lifted.IsZero() && t.Before(b.Until) && !b.Observed
}
