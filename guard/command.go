package guard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// BlockRequest is an operator's word that a source shall be blocked.
type BlockRequest struct {
	Prefix netip.Prefix `json:"prefix"`
	// For is how long, or Until is until when; neither: as long as its next
	// offence would be.
	For    time.Duration `json:"for_ns,omitempty"`
	Until  time.Time     `json:"until,omitzero"`
	Reason string        `json:"reason,omitempty"`
	By     string        `json:"-"` // taken from the connection, never from the request
}

// BlockOutcome is what became of a BlockRequest: Block, or Refused, or Block
// with an Error where it is written down but not in the packet filter yet. A
// request has several where somebody in its prefix is allowed and the rest is
// blocked in parts: each is then Block.PartOf the prefix.
type BlockOutcome struct {
	Prefix netip.Prefix `json:"prefix"`
	Block  *store.Block `json:"block,omitempty"` // without ID in a dry run
	// Ends is when the block is lifted before its Until, because a trial of
	// mode: enforce runs out then; zero if it is not.
	Ends    time.Time `json:"ends,omitzero"`
	Refused string    `json:"refused,omitempty"`
	Hint    string    `json:"hint,omitempty"`
	Error   string    `json:"error,omitempty"`
	// Note is what the operator may not know and would want to, may be empty.
	Note string `json:"note,omitempty"`
}

// blockChunk is how many requests are taken at a time, so that verdicts get
// their turn in between.
const blockChunk = 1000

// Block blocks sources by hand, all in one order where there are no more than
// a thousand. The gate can refuse some and not others. A block of the same
// prefix that is in force is replaced by the new one. With dry nothing is
// changed. An error means that what has no outcome was not done.
func (g *Guard) Block(ctx context.Context, reqs []BlockRequest, dry bool) (out []BlockOutcome, err error) {
	for _, r := range reqs {
		if !r.Prefix.IsValid() || r.Prefix != policy.Canonical(r.Prefix) {
			return nil, fmt.Errorf("%s is not a prefix in its usual form", r.Prefix)
		}
	}
	for chunk := range slices.Chunk(reqs, blockChunk) {
		doErr := g.do(ctx, func(ctx context.Context) {
			var o []BlockOutcome
			o, err = g.blockByHand(ctx, chunk, dry)
			out = append(out, o...)
		})
		if err = cmp.Or(doErr, err); err != nil {
			return out, err
		}
	}
	return out, nil
}

func (g *Guard) blockByHand(ctx context.Context, reqs []BlockRequest, dry bool) ([]BlockOutcome, error) {
	now := time.Now()
	g.freshSelf(ctx, selfLeast, now) // a file of many is many requests
	out := make([]BlockOutcome, 0, len(reqs))
	var made []*store.Block
	var replaced []store.Block
	fresh := make(map[netip.Prefix]bool)
	added := 0 // of those made, in the place of no other
	for _, r := range reqs {
		parts, ref := g.gate.admits(r.Prefix, &g.blocks, added)
		for _, p := range parts {
			old, replaces := g.blocks.get(p)
			switch {
			case ref != nil:
			case fresh[p]:
				ref = &Refusal{Prefix: r.Prefix, Why: "it is named twice"}
			case replaces && !old.Observed && !g.enforce && now.Before(old.Until):
				ref = &Refusal{Prefix: r.Prefix, Why: "it is blocked until " + old.Until.Format(time.RFC3339) + " since an earlier mode: enforce, and mode: observe changes nothing in the packet filter",
					Hint: "`smtpguard unblock` lifts it"}
			}
		}
		switch {
		case ref != nil:
		case !r.Until.IsZero() && r.Until.Before(now.Add(time.Second)):
			ref = &Refusal{Prefix: r.Prefix, Why: "its end has passed"}
		}
		if end := now.Add(policy.Longest); ref == nil && r.Until.After(end) {
			ref = &Refusal{Prefix: r.Prefix, Why: "its end is more than a hundred years away", Hint: "the longest is 36500d, until " + end.Format(time.DateOnly)}
		}
		if ref != nil {
			if !dry {
				g.count.Refused++
				g.note(Decision{Time: now, Prefix: r.Prefix, What: Refused, Reason: ref.Reason, Why: "asked by " + r.By + "; but " + ref.Why})
			}
			out = append(out, BlockOutcome{Prefix: r.Prefix, Refused: ref.Why, Hint: ref.Hint})
			continue
		}
		offence, err := g.offence(r.Prefix, parts, now)
		if err != nil {
			return nil, err
		}
		until := r.Until
		if until.IsZero() {
			if r.For <= 0 {
				r.For = g.gate.block.Duration(offence)
			}
			until = now.Add(max(r.For, time.Second)) // packet filters count in seconds
		}
		for i, p := range parts {
			b := &store.Block{Prefix: p, Reason: cmp.Or(r.Reason, "by hand"), Offence: offence, Since: now,
				Until: wholeSecond(until), By: r.By, Observed: !g.enforce}
			partOf(b, r.Prefix, i)
			if old, ok := g.blocks.get(p); ok && old.ID != 0 && now.Before(old.Until) {
				end := *old
				end.Lifted, end.LiftedBy, end.Replaced = now, r.By+": replaced by a new block", true
				replaced = append(replaced, end)
			}
			made, fresh[p] = append(made, b), true
			added += g.blocks.without([]netip.Prefix{p})
			o := BlockOutcome{Prefix: p, Block: b, Note: g.hitsGood(p)}
			if end := g.ends(b); end.Before(b.Until) && !b.Observed {
				o.Ends = end
			}
			if b.Observed && g.policy.Mode == policy.Enforce {
				o.Hint = "the trial of mode: enforce is over; `smtpguard commit` enforces, and puts it in force"
			}
			out = append(out, o)
		}
	}
	if dry || len(made) == 0 {
		return out, nil
	}
	if err := g.apply(ctx, made, replaced, nil, now); err != nil && made[0].ID == 0 {
		return nil, fmt.Errorf("writing the blocks down: %w", err)
	}
	for i := range out {
		if p := out[i].Prefix; out[i].Block != nil && !out[i].Block.Observed && g.drift.unapplied(p) {
			out[i].Error = "written down, but the packet filter did not take it yet: " + g.drift.why(p)
		}
	}
	return out, nil
}

// hitsGood names the known good senders that a block of p hits.
func (g *Guard) hitsGood(p netip.Prefix) string {
	x := g.det.Explain(p)
	if x.KnownGoodCount == 0 {
		return ""
	}
	var more string
	if n := x.KnownGoodCount - 1; n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	one := x.KnownGood[0]
	return fmt.Sprintf("that hits %s%s, known good: the last mail from there was accepted at %s", one.Addr, more, one.Last.Format(time.RFC3339))
}

// Sync makes the packet filter hold what the store says, now, and returns how
// many blocks that are.
func (g *Guard) Sync(ctx context.Context) (n int, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		n = len(g.wanted(now))
		err = g.repair(ctx, "", now, true)
	})
	return n, cmp.Or(doErr, err)
}

// CoveredError says that a source stays blocked because a prefix around it is.
type CoveredError struct {
	Asked netip.Prefix
	By    netip.Prefix
}

func (e *CoveredError) Error() string {
	return fmt.Sprintf("%s is still blocked: it is inside the blocked %s", e.Asked, e.By)
}

// Unblock lifts the block of p and every block inside it, and returns those
// that are lifted, everywhere. None at all is no error: the result is empty.
// If p is blocked all the same, by a block around it, the error is a
// *CoveredError. The zero prefix means all blocks.
func (g *Guard) Unblock(ctx context.Context, p netip.Prefix, by string) (lifted []store.Block, err error) {
	if p.IsValid() {
		p = policy.Canonical(p)
	}
	var late *OwedError
	for more := true; more && err == nil; {
		doErr := g.do(ctx, func(ctx context.Context) {
			var part []store.Block
			if p.IsValid() {
				part = g.blocks.inside(p)
				g.det.Forget(p)
			} else {
				part = g.blocks.all()
			}
			g.drop(p)
			now := time.Now()
			part = slices.DeleteFunc(part, func(b store.Block) bool { return !now.Before(b.Until) }) // not swept yet
			if more = len(part) > blockChunk; more {
				part = part[:blockChunk] // verdicts get their turn in between
			}
			for i := range part {
				part[i].LiftedBy = by
			}
			if len(part) > 0 {
				err = g.liftAsked(ctx, part, now)
				var still *StillDroppedError
				if errors.As(err, &late) && !errors.As(err, &still) {
					err = nil // it is told at the end
				}
				if errors.As(err, &still) { // these are, as far as packets can tell
					part = slices.DeleteFunc(part, func(b store.Block) bool { return slices.Contains(still.Prefixes, b.Prefix) })
				} else if err != nil {
					return
				}
				lifted = append(lifted, part...)
				if err != nil {
					return
				}
			}
			if !p.IsValid() || more {
				return
			}
			around, ok := g.blocks.real(p)
			if !ok && len(lifted) == 0 {
				around, ok = g.blocks.covers(p)
			}
			if ok && now.Before(around.Until) {
				err = &CoveredError{Asked: p, By: around.Whole()}
			}
		})
		err = cmp.Or(doErr, err)
	}
	if err == nil && late != nil {
		err = late
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

// liftAsked ends blocks before their time, as somebody asked for. LiftedBy is
// set by the caller. The detector forgets what it knew, or the next line would
// block the source again. A disk that is full keeps nobody blocked where a
// daemon runs that writes it down later.
func (g *Guard) liftAsked(ctx context.Context, out []store.Block, now time.Time) error {
	if g.alone() {
		return g.exchange(ctx, out, nil, now)
	}
	err := g.exchangeAnyway(ctx, out, nil, now, "lifting blocks")
	if late := (*OwedError)(nil); errors.As(err, &late) {
		late.Asked = true
	}
	return err
}

// exchange is lift of the blocks out, and in the same step the beginning of
// those that go on in their place.
func (g *Guard) exchange(ctx context.Context, out []store.Block, made []*store.Block, now time.Time) error {
	if err := g.writeExchange(out, made, now); err != nil {
		return fmt.Errorf("the end could not be written down, and everything is as before (is the disk full? `smtpguard allow add` lets somebody in all the same): %w", err)
	}
	return g.exchanged(ctx, out, made, now)
}

// exchangeAnyway is exchange for the sake of those who must not be blocked,
// whatever the disk says: what cannot be written down is owed to the store.
func (g *Guard) exchangeAnyway(ctx context.Context, out []store.Block, made []*store.Block, now time.Time, why string) error {
	err := g.writeExchange(out, made, now)
	if err != nil {
		g.fault(why, err)
		g.owe(out, made)
		err = &OwedError{Alone: g.alone(), Err: err}
	}
	return errors.Join(err, g.exchanged(ctx, out, made, now))
}

// writeExchange sets Lifted of the blocks out, and writes them and those made
// down.
func (g *Guard) writeExchange(out []store.Block, made []*store.Block, now time.Time) error {
	// The lines that led to the blocks must not be read again after a crash:
	// they would make the same blocks once more, against the operator's word.
	g.savePositions()
	for i := range out {
		out[i].Lifted = now
	}
	return g.write(written(out), made)
}

// exchanged is what exchange does in memory and in the packet filter.
func (g *Guard) exchanged(ctx context.Context, out []store.Block, made []*store.Block, now time.Time) error {
	var b firewall.Batch
	var told []Decision
	for _, o := range out {
		g.blocks.remove(o.Prefix)
		g.det.Forget(o.Prefix)
		g.drift.forget(o.Prefix)
		if !o.Observed && !slices.ContainsFunc(made, func(m *store.Block) bool { return m.Prefix == o.Prefix }) {
			b.Unset = append(b.Unset, o.Prefix)
		}
		told = append(told, Decision{Time: now, Prefix: o.Prefix, What: Lifted, Why: o.LiftedBy})
	}
	g.noteAll(told)
	g.count.Lifted += uint64(len(out))
	told = told[:0]
	for _, m := range made {
		g.blocks.put(*m)
		what := Observed
		if !m.Observed {
			b.Set = append(b.Set, g.entry(m))
			what = Blocked
			g.count.Blocked++
		} else {
			g.count.Observed++
		}
		told = append(told, Decision{Time: now, Prefix: m.Prefix, What: what, Until: m.Until, Why: m.Reason})
	}
	g.noteAll(told)
	if len(b.Unset)+len(b.Set) == 0 {
		return nil
	}
	if err := g.change(ctx, b); err != nil {
		g.drift.suspect = true
		left := slices.DeleteFunc(b.Unset, func(p netip.Prefix) bool { return !g.drift.holds(p) })
		slices.SortFunc(left, netip.Prefix.Compare)
		return &StillDroppedError{Prefixes: left, Alone: g.alone(), Err: err}
	}
	return nil
}

// alone reports whether no daemon runs.
func (g *Guard) alone() bool {
	g.runMu.Lock()
	defer g.runMu.Unlock()
	return g.runCtx == nil
}

// StillDroppedError says that blocks are lifted, and that the packet filter did
// not let go of some of them; or, without Prefixes, that it let go of all, but
// did not take every block that goes on in their place.
type StillDroppedError struct {
	Prefixes []netip.Prefix
	// Alone: no daemon runs, and nobody tries again by himself.
	Alone bool
	Err   error
}

func (e *StillDroppedError) Error() string {
	next := "it is tried again"
	if e.Alone {
		next = "no daemon runs that would try again"
	}
	if len(e.Prefixes) == 0 {
		return fmt.Sprintf("the packet filter does not hold every block that goes on; %s: %v", next, e.Err)
	}
	return fmt.Sprintf("lifted, but the packet filter still drops %s; %s: %v", firewall.Some(e.Prefixes), next, e.Err)
}

func (e *StillDroppedError) Unwrap() error { return e.Err }

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
// would take seconds. Without a daemon nobody else looks: what is wrong is
// noted.
func (g *Guard) installed(ctx context.Context) map[netip.Prefix]firewall.Installed {
	if !g.caps.Real {
		return nil
	}
	alone := g.alone()
	if alone && !g.standsAlone(ctx) {
		return nil
	}
	if !g.caps.Readback || g.blocks.len() > contentMax {
		return nil
	}
	m := make(map[netip.Prefix]firewall.Installed)
	for in, err := range g.fw.List(ctx) {
		switch {
		case err == nil:
			m[in.Prefix] = in
		case errors.Is(err, firewall.ErrGone):
			g.drift.suspect = true
			return map[netip.Prefix]firewall.Installed{}
		case alone:
			g.drift.broken = fmt.Errorf("whether the packet filter holds it cannot be read: %w", err)
			return nil
		default:
			return nil // what was last known of it counts
		}
	}
	if alone {
		g.noteDiffers(m, time.Now())
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
		g.owed.asIs(past)
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

// Allow puts a prefix or a name on the operator's allowlist and frees it. It
// returns the blocks that changed by that: those that overlapped it and ended,
// whose Lifted is set, then the parts in which the rest of them stays blocked
// (block.overlap: split). A name is looked up by Run: who it stands for is free
// when the answer is there.
func (g *Guard) Allow(ctx context.Context, e store.AllowEntry) (changed []store.Block, err error) {
	if e.Name != "" {
		return nil, g.allowName(ctx, e)
	}
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
		var liftErr error
		changed, liftErr = g.liftAllowed(ctx)
		err = errors.Join(liftErr, g.renewFilter(ctx))
	})
	if doErr != nil {
		return nil, doErr
	}
	return changed, err
}

// Disallow takes a prefix off the operator's allowlist and reports whether it
// was on it. Entries of the policy and this machine's own stay.
func (g *Guard) Disallow(ctx context.Context, p netip.Prefix) (found bool, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		if found, err = g.o.Store.AllowRemove(p.Masked()); err == nil {
			if err = g.reloadAllow(); err == nil {
				err = g.renewFilter(ctx)
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
	g.copyAllow()
	g.syncNames(time.Now())
	g.rebuildAllow()
	return nil
}

// copyAllow keeps the copy of the allowlist that outlives a damaged store.
func (g *Guard) copyAllow() {
	g.copyDue = time.Time{}
	if err := g.o.Store.CopyAllow(); err != nil {
		g.copyDue = time.Now().Add(time.Minute)
		g.fault("keeping a copy of the allowlist beside the store; it is tried again", err)
	}
}
