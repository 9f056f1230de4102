package guard

import (
	"context"
	"fmt"
	"time"

	"github.com/smtpguard/smtpguard/store"
)

// takeUp begins to enforce what was only observed. What a person asked for by
// hand holds, until the end that he gave it, if it passes the gate as it
// stands now. What rules only looked at ends: they decide anew. On an error
// all of it stays observed, and the next start tries again.
func (g *Guard) takeUp(ctx context.Context, now time.Time) error {
	active, err := g.o.Store.Active(now)
	if g.unreadable("blocks", err) {
		return fmt.Errorf("reading what was observed: %w", err)
	}
	g.freshSelf(ctx, selfFresh, now)
	var ended []store.Block
	var made []*store.Block
	for _, b := range active {
		if !b.Observed {
			continue
		}
		end := b
		end.Lifted, end.LiftedBy = now, store.Self+": it was only observed, and from now on blocks are real"
		in, known := g.blocks.get(b.Prefix)
		if b.Verdict == nil && known && in.ID == b.ID && b.Until.Sub(now) >= time.Second {
			if cover, ok := g.blocks.real(b.Prefix); ok && !cover.Until.Before(b.Until) {
				end.LiftedBy = store.Self + ": it is in force with " + cover.Prefix.String()
			} else if r := g.gate.passes(b.Prefix); r != nil {
				end.LiftedBy = store.Self + ": " + r.Why
				g.count.Refused++
				g.note(Decision{Time: now, Prefix: b.Prefix, What: Refused, Reason: r.Reason, Why: "asked by " + b.By + " while blocks were only observed; but " + r.Why})
			} else {
				end.LiftedBy, end.Replaced = store.Self+": it is in force now", true
				next := b
				next.ID, next.Observed, next.Since = 0, false, now
				made = append(made, &next)
			}
		}
		ended = append(ended, end)
	}
	if len(ended) == 0 {
		return nil
	}
	if len(made) == 0 {
		err = g.o.Store.Save(ended...)
	} else if err = g.apply(ctx, made, ended, nil, now); made[0].ID != 0 {
		err = nil // written down; what the packet filter did not take is tried again, and told
	}
	if err != nil {
		return fmt.Errorf("ending what was observed: %w", err)
	}
	for _, b := range ended {
		if in, ok := g.blocks.get(b.Prefix); ok && in.Observed {
			g.blocks.remove(b.Prefix)
		}
	}
	return nil
}
