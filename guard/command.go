package guard

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/store"
)

// BlockRequest is an operator's word that a source shall be blocked.
type BlockRequest struct {
	Prefix netip.Prefix  `json:"prefix"`
	For    time.Duration `json:"for_ns"` // 0: as long as its next offence would be
	Reason string        `json:"reason"`
	By     string        `json:"-"` // taken from the connection, never from the request
}

// Block blocks a source by hand. The gate can refuse it (*Refusal). A block
// of the same prefix that is in force is replaced by the new one.
func (g *Guard) Block(ctx context.Context, r BlockRequest) (blk store.Block, err error) {
	if !r.Prefix.IsValid() || r.Prefix != r.Prefix.Masked() {
		return blk, fmt.Errorf("%s is not a prefix", r.Prefix)
	}
	if doErr := g.do(ctx, func(ctx context.Context) { blk, err = g.blockByHand(ctx, r) }); doErr != nil {
		return blk, doErr
	}
	return blk, err
}

func (g *Guard) blockByHand(ctx context.Context, r BlockRequest) (store.Block, error) {
	now := time.Now()
	if ref := g.gate.admits(r.Prefix, now, g.blocks.len(), true); ref != nil {
		g.count.Refused++
		g.note(Decision{Time: now, Prefix: r.Prefix, What: Refused, Why: "asked by " + r.By + "; but " + ref.Why})
		return store.Block{}, ref
	}
	offence, err := g.offence(r.Prefix, now)
	if err != nil {
		return store.Block{}, err
	}
	if r.For <= 0 {
		r.For = g.gate.block.Duration(offence)
	}
	if r.Reason == "" {
		r.Reason = "by hand"
	}
	b := &store.Block{Prefix: r.Prefix, Reason: r.Reason, Offence: offence, Since: now,
		Until: now.Add(r.For).Truncate(time.Second), By: r.By, Observed: !g.enforce}
	if old, ok := g.blocks.get(r.Prefix); ok {
		o := *old
		o.Lifted, o.LiftedBy = now, r.By+": replaced by a new block"
		if err := g.o.Store.Save(o); err != nil {
			return store.Block{}, fmt.Errorf("ending the block before it: %w", err)
		}
	}
	if err := g.apply(ctx, []*store.Block{b}, nil, now); err != nil && b.ID == 0 {
		return store.Block{}, fmt.Errorf("writing the block down: %w", err)
	} else if err != nil {
		return *b, fmt.Errorf("the block of %s is written down but the packet filter did not take it yet: %w", b.Prefix, err)
	}
	return *b, nil
}

// CoveredError says that an address cannot be unblocked alone, because the
// block is one of a prefix around it.
type CoveredError struct {
	Asked netip.Prefix
	By    netip.Prefix
}

func (e *CoveredError) Error() string {
	return fmt.Sprintf("%s is not blocked by itself: it is inside the blocked %s", e.Asked, e.By)
}

// Unblock lifts the block of p and every block inside it, and returns them.
// None at all is no error: the result is empty. If there is none but a block
// around p, the error is a *CoveredError. The zero prefix means all blocks.
func (g *Guard) Unblock(ctx context.Context, p netip.Prefix, by string) (lifted []store.Block, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		if p.IsValid() {
			lifted = g.blocks.inside(p.Masked())
			if len(lifted) == 0 {
				if around, ok := g.blocks.covers(p.Masked()); ok {
					err = &CoveredError{Asked: p, By: around.Prefix}
				}
			}
		} else {
			lifted = g.blocks.all()
		}
		g.drop(p)
		if len(lifted) == 0 {
			return
		}
		for i := range lifted {
			lifted[i].LiftedBy = by
		}
		err = g.lift(ctx, lifted, time.Now())
	})
	if doErr != nil {
		return nil, doErr
	}
	return lifted, err
}

// drop forgets the verdicts on p that wait for confirmation: the operator's
// word came after them.
func (g *Guard) drop(p netip.Prefix) {
	g.pending = slices.DeleteFunc(g.pending, func(w pending) bool {
		return !p.IsValid() || p.Overlaps(w.verdict.Source)
	})
}

// lift ends blocks before their time: store first, then the packet filter.
// LiftedBy is set by the caller. The detector forgets what it knew, or the
// next line would block the source again.
func (g *Guard) lift(ctx context.Context, out []store.Block, now time.Time) error {
	for i := range out {
		out[i].Lifted = now
	}
	if err := g.o.Store.Save(out...); err != nil {
		return fmt.Errorf("noting the end of the block: %w", err)
	}
	var b firewall.Batch
	for _, o := range out {
		g.blocks.remove(o.Prefix)
		g.det.Forget(o.Prefix)
		g.drift.forget(o.Prefix)
		if !o.Observed {
			b.Unset = append(b.Unset, o.Prefix)
		}
		g.note(Decision{Time: now, Prefix: o.Prefix, What: Lifted, Why: o.LiftedBy})
	}
	g.count.Lifted += uint64(len(out))
	if len(b.Unset) == 0 {
		return nil
	}
	if err := g.change(ctx, b); err != nil {
		g.drift.suspect = true
		return fmt.Errorf("the end is written down, but the packet filter still holds the block; it is tried again: %w", err)
	}
	return nil
}

// Blocks returns the blocks that are in force or observed now, sorted by
// prefix, each with what the packet filter says of it.
func (g *Guard) Blocks(ctx context.Context) (list []BlockInfo, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		installed := g.installed(ctx)
		for _, b := range g.blocks.all() {
			if now.Before(b.Until) {
				list = append(list, g.info(b, installed, now))
			}
		}
	})
	if doErr != nil {
		return nil, doErr
	}
	return list, err
}

// installed reads the packet filter back, nil where it cannot be done or
// would take seconds.
func (g *Guard) installed(ctx context.Context) map[netip.Prefix]firewall.Installed {
	if !g.caps.Readback || !g.caps.Real || g.blocks.len() > contentMax {
		return nil
	}
	m := make(map[netip.Prefix]firewall.Installed)
	for in, err := range g.fw.List(ctx) {
		if err != nil {
			return nil
		}
		m[in.Prefix] = in
	}
	return m
}

// History returns what p and what overlaps it went through: blocks now and
// earlier, newest first.
func (g *Guard) History(ctx context.Context, p netip.Prefix) (list []BlockInfo, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		var past []store.Block
		past, err = g.o.Store.History(p.Masked(), now.Add(-g.policy.Block.Forget), 100)
		if !g.unreadable("blocks", err) {
			err = nil
		}
		installed := g.installed(ctx)
		for _, b := range past {
			list = append(list, g.info(b, installed, now))
		}
	})
	if doErr != nil {
		return nil, doErr
	}
	return list, err
}

// Learn remembers senders of accepted mail, as old logs show them. What is
// known of them already is widened, not replaced.
func (g *Guard) Learn(ctx context.Context, goods []store.Good) (err error) {
	for _, s := range goods {
		if !s.Addr.IsValid() || s.Last.IsZero() || s.Messages < 1 {
			return fmt.Errorf("%s is not a known good sender: it has no address, time or message", s.Addr)
		}
	}
	doErr := g.do(ctx, func(context.Context) {
		for _, s := range goods {
			g.det.LearnGood(s.Addr, s.First, s.Last, s.Messages)
		}
		g.goods = time.Time{} // all of them are saved
		err = g.saveGood()
	})
	if doErr != nil {
		return doErr
	}
	return err
}

// Allow puts a prefix on the operator's allowlist and lifts the blocks that
// overlap it, which it returns.
func (g *Guard) Allow(ctx context.Context, e store.AllowEntry) (lifted []store.Block, err error) {
	if !e.Prefix.IsValid() || e.Prefix != e.Prefix.Masked() {
		return nil, fmt.Errorf("%s is not a prefix", e.Prefix)
	}
	doErr := g.do(ctx, func(ctx context.Context) {
		if err = g.o.Store.AllowAdd(e); err != nil {
			return
		}
		if err = g.reloadAllow(); err != nil {
			return
		}
		g.drop(e.Prefix)
		lifted = g.liftAllowed(ctx)
		g.renewFilter(ctx)
	})
	if doErr != nil {
		return nil, doErr
	}
	return lifted, err
}

// Disallow takes a prefix off the operator's allowlist and reports whether it
// was on it. Entries of the policy and this machine's own stay.
func (g *Guard) Disallow(ctx context.Context, p netip.Prefix) (found bool, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		if found, err = g.o.Store.AllowRemove(p.Masked()); err == nil {
			if err = g.reloadAllow(); err == nil {
				g.renewFilter(ctx)
			}
		}
	})
	if doErr != nil {
		return false, doErr
	}
	return found, err
}

func (g *Guard) reloadAllow() error {
	list, err := g.o.Store.AllowList()
	if g.unreadable("the allowlist", err) {
		return err
	}
	g.allowed = list
	g.rebuildAllow()
	return nil
}

// Allowed returns everything that is never blocked, with the reason.
func (g *Guard) Allowed(ctx context.Context) (list []AllowInfo, err error) {
	err = g.do(ctx, func(context.Context) {
		for e := range g.gate.allow.All() {
			list = append(list, AllowInfo{Prefix: e.Prefix, Why: e.Why})
		}
	})
	return list, err
}
