package guard

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/store"
)

// liftAllowed ends the blocks that overlap the allowlist as it is now: one
// that was added since, or an address that this machine has taken on. Every
// block in force has passed the gate as it stands today. Where block.overlap
// is split, what is left of a block without those who are allowed goes on as
// its parts, in the same step.
//
// It returns the blocks that changed: first those that ended, whose Lifted is
// set, then the parts. An error says what store or packet filter do not have of
// that yet.
func (g *Guard) liftAllowed(ctx context.Context) ([]store.Block, error) {
	now := time.Now()
	var out []store.Block
	made := make(map[netip.Prefix]*store.Block)
	var order []*store.Block
	most := g.gate.block.MaxBlocks
	if g.gate.room > 0 {
		most = min(most, g.gate.room)
	}
	for _, b := range g.blocks.all() {
		if !now.Before(b.Until) {
			continue // it has run out, and is not lifted
		}
		r := g.gate.passes(b.Prefix)
		if r == nil {
			continue
		}
		parts, ref := g.gate.parts(b.Prefix)
		if ref != nil || g.blocks.len()-len(out)-1+len(made)+g.blocks.without(parts) > most {
			parts = nil // as long as there is doubt, nobody is blocked
		}
		b.LiftedBy = store.Self + ": " + r.Why
		if len(parts) > 0 {
			b.LiftedBy += fmt.Sprintf("; what is left of it stays blocked in parts (%d)", len(parts))
		}
		out = append(out, b)
		last, first := g.lastPart(b.Whole(), order), true
		for _, p := range parts {
			next := b
			next.ID, next.Prefix, next.LiftedBy, next.Ended, next.Relief = 0, p, "", 0, 0
			next.PartOf = b.Whole()
			if old, ok := g.blocks.get(p); ok {
				if !supersedes(&next, old) {
					continue
				}
				end := *old
				end.LiftedBy, end.Replaced = store.Self+": replaced by a part of "+b.Whole().String(), true
				out = append(out, end)
			}
			// The first takes the place of what it is made of: what is counted
			// of a block is counted with its part 1.
			if !first || b.Part == 0 {
				last++
				next.Part = last
			}
			first = false
			if old, ok := made[p]; !ok {
				made[p] = &next
				order = append(order, &next)
			} else if supersedes(&next, old) {
				*old = next
			}
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	err := g.exchangeAnyway(ctx, out, order, now, "lifting blocks of what is allowed")
	for _, b := range order {
		out = append(out, *b)
	}
	return out, err
}

// supersedes reports whether of two blocks of one prefix b is the one to keep:
// what is in force before what is observed, then what lasts longer.
func supersedes(b, old *store.Block) bool {
	if b.Observed != old.Observed {
		return old.Observed
	}
	return b.Until.After(old.Until)
}

// lastPart is the highest number of a part of whole, of those in the table and
// those that are made.
func (g *Guard) lastPart(whole netip.Prefix, made []*store.Block) (last int) {
	for _, b := range made {
		if b.PartOf == whole {
			last = max(last, b.Part)
		}
	}
	for _, b := range g.blocks.table.Subnets(whole) {
		if b.PartOf == whole {
			last = max(last, b.Part)
		}
	}
	return last
}
