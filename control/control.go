// Package control is the daemon's Unix socket, both ends: JSON over HTTP, for
// root (and a group, by choice) only.
package control

import (
	"context"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// Guard is what the socket offers to commands. *guard.Guard is one, and so is
// *Client: a command that finds no daemon talks to the store's guard itself.
type Guard interface {
	Status(ctx context.Context) (guard.Status, error)
	View(ctx context.Context) (guard.View, error)
	Blocks(ctx context.Context) ([]guard.BlockInfo, error)
	History(ctx context.Context, p netip.Prefix) ([]guard.BlockInfo, error)
	Explain(ctx context.Context, p netip.Prefix) (guard.Explanation, error)
	Block(ctx context.Context, reqs []guard.BlockRequest, dry bool) ([]guard.BlockOutcome, error)
	Sync(ctx context.Context) (int, error)
	Unblock(ctx context.Context, p netip.Prefix, by string) ([]store.Block, error)
	Allow(ctx context.Context, e store.AllowEntry) ([]store.Block, error)
	Disallow(ctx context.Context, p netip.Prefix) (bool, error)
	Allowed(ctx context.Context) ([]guard.AllowInfo, error)
	Learn(ctx context.Context, goods []store.Good) error
	DisallowName(ctx context.Context, name string) (bool, error)
	Commit(ctx context.Context, by string, again time.Duration) (guard.Trial, error)
	Resume(ctx context.Context, by string) (bool, error)
}

// Paths of the interface, and the bounds of what is read from the other end.
const (
	pathStatus  = "/v1/status"
	pathView    = "/v1/view"
	pathBlocks  = "/v1/blocks"
	pathHistory = "/v1/history"
	pathExplain = "/v1/explain"
	pathBlock   = "/v1/block"
	pathUnblock = "/v1/unblock"
	pathAllow   = "/v1/allow"
	pathAllowed = "/v1/allowed"
	pathForget  = "/v1/disallow"
	pathLearn   = "/v1/learn"
	pathSync    = "/v1/sync"
	pathCommit  = "/v1/commit"
	pathResume  = "/v1/resume"

	maxRequest = 256 << 10
	learnChunk = 1000      // known good senders in one request
	blockChunk = 100       // blocks in one request: each may have a reason of 500 bytes
	maxAnswer  = 256 << 20 // 100,000 blocks with their evidence
	deadline   = 30 * time.Second
)

// change is the body of every request that changes something.
type change struct {
	Prefix netip.Prefix `json:"prefix,omitzero"`
	Name   string       `json:"name,omitempty"` // of the allowlist, instead of Prefix
	All    bool         `json:"all,omitempty"`
	Until  time.Time    `json:"until,omitzero"`
	Text   string       `json:"text,omitempty"`
	Good   []store.Good `json:"good,omitempty"`
	// Again is how long a trial begins anew.
	Again time.Duration `json:"again_ns,omitempty"`

	Block []guard.BlockRequest `json:"block,omitempty"`
	Dry   bool                 `json:"dry,omitempty"`
}

// failure is the body of every answer but 200.
type failure struct {
	Error   string              `json:"error"`
	Covered *guard.CoveredError `json:"covered,omitempty"`
	Blocks  []store.Block       `json:"blocks,omitempty"`   // what was done all the same
	NoTrial bool                `json:"no_trial,omitempty"` // it is guard.ErrNoTrial
}
