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
	"github.com/smtpguard/smtpguard/store"
)

// drift is what is known of differences between the store and the packet
// filter.
type drift struct {
	failed   map[netip.Prefix]error // in force by the store, not in the filter
	lingers  map[netip.Prefix]error // ended by the store, and the filter did not let go of it
	broken   error                  // the filter as a whole did not answer well
	retryAt  time.Time
	backoff  time.Duration
	repairs  uint64
	repaired time.Time
	by       string // who touched our rules last, if known
	checked  time.Time
	suspect  bool // look at the contents at the next opportunity
	fight    fight
	leakTold time.Time
}

func (d *drift) unapplied(p netip.Prefix) bool { _, ok := d.failed[p]; return ok || d.broken != nil }
func (d *drift) forget(p netip.Prefix)         { delete(d.failed, p); delete(d.lingers, p) }
func (d *drift) clear()                        { d.failed, d.lingers, d.broken, d.backoff = nil, nil, nil, 0 }

// holds tells whether the filter may still drop p, whose block has ended.
func (d *drift) holds(p netip.Prefix) bool { _, ok := d.lingers[p]; return ok || d.broken != nil }

// trouble says why the packet filter cannot be relied on to hold what the store
// says; nil: it can.
func (d *drift) trouble() error {
	switch {
	case d.broken != nil:
		return d.broken
	case d.fight.err != nil:
		return d.fight.err
	}
	for _, err := range d.failed {
		return err
	}
	for p, err := range d.lingers {
		return fmt.Errorf("it still drops %s, whose block has ended: %w", p, err)
	}
	return nil
}

func (d *drift) why(p netip.Prefix) string {
	if err := d.failed[p]; err != nil {
		return err.Error()
	}
	if d.broken != nil {
		return d.broken.Error()
	}
	return ""
}

// fail notes that the filter did not take p, or, where its block has ended, did
// not let go of it: two things that must not be taken for each other.
func (d *drift) fail(p netip.Prefix, ended bool, err error) {
	d.forget(p)
	into := &d.failed
	if ended {
		into = &d.lingers
	}
	if *into == nil {
		*into = make(map[netip.Prefix]error)
	}
	(*into)[p] = err
}

// wanted are the entries that the packet filter must hold.
func (g *Guard) wanted(now time.Time) []firewall.Entry {
	var want []firewall.Entry
	for _, b := range g.blocks.table.All() {
		if g.holds(b, now) {
			want = append(want, g.entry(b))
		}
	}
	return want
}

// restore makes the packet filter hold what the store says, and nothing
// else. In observe mode that is nothing at all.
func (g *Guard) restore(ctx context.Context) error {
	_, _ = g.liftAllowed(ctx)
	now := time.Now()
	g.adopt(ctx, now)
	if err := g.refill(ctx, now); errors.Is(err, firewall.ErrUnavailable) {
		return fmt.Errorf("firewall %s: %w", g.fw.Name(), err)
	} else if g.drift.broken != nil {
		return nil
	}
	g.drift.checked = now
	if n := len(g.wanted(now)); n > 0 {
		g.log.Info("blocks restored", "blocks", n, "backend", g.fw.Name())
	}
	return nil
}

// adopt takes the entries that are in the packet filter into a store that has
// never had a block: the file was lost or moved away, and what was blocked
// shall stay so until its time.
func (g *Guard) adopt(ctx context.Context, now time.Time) {
	if !g.enforce || !g.caps.Real || !g.caps.Expiry || g.blocks.len() > 0 {
		return
	}
	if past, err := g.o.Store.History(netip.Prefix{}, time.Time{}, 1); err != nil || len(past) > 0 {
		return
	}
	var made []*store.Block
	for in, err := range g.fw.List(ctx) {
		if err != nil {
			break // usually there is no table yet
		}
		if len(made) < g.policy.Block.MaxBlocks && in.Until.After(now) && g.gate.passes(in.Prefix) == nil {
			made = append(made, &store.Block{Prefix: in.Prefix, Reason: "found in the packet filter by a store that knew nothing of it",
				Offence: 1, Since: now, Until: in.Until.Truncate(time.Second), By: store.Self})
		}
	}
	if len(made) == 0 {
		return
	}
	if err := g.o.Store.Add(made...); err != nil {
		g.fault("writing down what the packet filter holds", err)
		return
	}
	for _, b := range made {
		g.blocks.put(*b)
	}
	g.log.Warn("the store is new, and the packet filter holds blocks: they are taken over", "blocks", len(made))
}

// change applies a batch to the packet filter and notes what it did not take.
func (g *Guard) change(ctx context.Context, b firewall.Batch) error {
	now := time.Now()
	if g.drift.broken != nil {
		// What is in there is not known: only Replace, on its own timer, can
		// help; the store has the truth.
		g.repair(ctx, "", now, false)
		if errors.Is(g.drift.broken, firewall.ErrFull) && len(b.Unset) > 0 {
			// It has no room for all; what must go goes all the same.
			if _, err := g.fw.Apply(ctx, firewall.Batch{Unset: b.Unset}); err != nil {
				return err
			}
			g.drift.retryAt = now
			if len(b.Set) == 0 {
				return nil
			}
		}
		return g.drift.broken
	}
	res, err := g.fw.Apply(ctx, b)
	if errors.Is(err, firewall.ErrUnknown) && !g.caps.Atomic {
		g.broke(err, now) // a slow one: not twice in a row, there is more to do
		return err
	}
	if errors.Is(err, firewall.ErrGone) || errors.Is(err, firewall.ErrUnknown) {
		if g.drift.fight.err == nil || !now.Before(g.drift.fight.rested) || !errors.Is(err, firewall.ErrGone) {
			return g.repair(ctx, "", now, true)
		}
		// It takes long, and was just done in vain: with the next repair, then.
		// What shall not be in there is gone.
		for _, e := range b.Set {
			g.drift.fail(e.Prefix, false, g.drift.fight.err)
		}
		g.drift.retryAt = g.drift.fight.rested
		return g.drift.fight.err
	}
	for _, e := range b.Set {
		g.drift.forget(e.Prefix)
	}
	ended := make(map[netip.Prefix]bool, len(b.Unset))
	for _, p := range b.Unset {
		g.drift.forget(p)
		ended[p] = true
	}
	for _, f := range res.Failed {
		g.drift.fail(f.Prefix, ended[f.Prefix], f.Err)
	}
	if err != nil && len(res.Failed) == 0 {
		for _, e := range b.Set {
			g.drift.fail(e.Prefix, false, err)
		}
		for _, p := range b.Unset {
			g.drift.fail(p, true, err)
		}
	}
	if err != nil {
		g.fault("changing the packet filter", err)
		g.drift.retryAt = now.Add(time.Second)
	}
	return err
}

// refill makes the packet filter hold what the store says. What it does not
// take for want of room is noted block by block, and tried again; the error
// tells of it too.
func (g *Guard) refill(ctx context.Context, now time.Time) error {
	return g.refilled(g.fw.Replace(ctx, g.wanted(now)), now)
}

// refilled notes what became of a Replace.
func (g *Guard) refilled(err error, now time.Time) error {
	var part *firewall.PartialError
	switch {
	case err == nil:
		g.drift.clear()
	case errors.As(err, &part):
		news, backoff := len(g.drift.failed)+len(g.drift.lingers) != len(part.Failed), g.drift.backoff
		g.drift.clear()
		for _, f := range part.Failed {
			b, ok := g.blocks.get(f.Prefix)
			g.drift.fail(f.Prefix, !ok || !b.InForce(now), f.Err)
		}
		g.drift.backoff = time.Second // a slow one goes on at once
		if errors.Is(err, firewall.ErrFull) || !news {
			g.drift.backoff = min(max(2*backoff, time.Second), 30*time.Second)
		}
		g.drift.retryAt = now.Add(g.drift.backoff)
		if news {
			g.fault("the packet filter does not take every block", err)
		}
	default:
		g.broke(err, now)
	}
	return err
}

// repair replaces everything of ours in the packet filter by what the store
// says. force ignores the back-off.
func (g *Guard) repair(ctx context.Context, by string, now time.Time, force bool) error {
	if !force && now.Before(g.drift.retryAt) {
		return g.drift.broken
	}
	err := g.refill(ctx, now)
	if g.drift.broken != nil {
		return err
	}
	g.drift.suspect, g.drift.checked = false, now
	if err == nil || force {
		g.drift.repairs++
		g.drift.repaired = now
	}
	if by != "" {
		g.drift.by = by
	}
	return err
}

// broke notes that the packet filter as a whole failed; it is tried again
// after a pause that grows to half a minute.
func (g *Guard) broke(err error, now time.Time) {
	g.drift.broken = err
	g.drift.backoff = min(max(2*g.drift.backoff, time.Second), 30*time.Second)
	g.drift.retryAt = now.Add(g.drift.backoff)
	g.fault("the packet filter does not hold what the store says; it is tried again in "+g.drift.backoff.String(), err)
}

// checkStructure puts our rules back where somebody took them away.
func (g *Guard) checkStructure(ctx context.Context) {
	if !g.caps.Real {
		return
	}
	now := time.Now()
	if g.drift.fight.over(now) {
		g.log.Info("nobody undoes our repairs any more")
	}
	if now.Before(g.drift.fight.pause) {
		return
	}
	if g.drift.broken != nil || len(g.drift.failed)+len(g.drift.lingers) > 0 {
		if !now.Before(g.drift.retryAt) {
			if g.repair(ctx, "", now, false) == nil {
				g.log.Info("the packet filter holds what the store says again", "blocks", g.blocks.len())
			}
			return
		}
		if g.drift.broken != nil {
			return
		}
	}
	changed, err := g.fw.Ensure(ctx)
	if err != nil {
		g.broke(err, now)
		return
	}
	if changed {
		g.tampered(ctx, "")
		return
	}
	g.drift.checked = now
	if g.drift.suspect {
		g.drift.suspect = false
		g.checkContent(ctx)
	}
}

// tampered repairs what somebody else did to our rules and says who it was.
func (g *Guard) tampered(ctx context.Context, by string) {
	now := time.Now()
	if g.drift.broken != nil && now.Before(g.drift.retryAt) || now.Before(g.drift.fight.pause) {
		return // everything is put back then, and not before: he may be as fast as we are
	}
	changed := by == "" // found by looking: Ensure has mended the layout already
	if !changed {
		var err error
		if changed, err = g.fw.Ensure(ctx); err != nil {
			g.broke(err, now)
			return
		}
	}
	if !changed {
		g.compareContent(ctx, by)
		return
	}
	_ = g.repair(ctx, by, now, true)
	g.fought(by, now)
	if g.drift.broken == nil && g.drift.fight.err == nil {
		who := cmp.Or(by, "somebody")
		g.tell(Event{On: OnTamper, Time: now, By: by, Why: who + " changed our rules in the packet filter; they are put back"})
		g.log.Warn("our rules in the packet filter were changed; they are put back", "by", who, "blocks", len(g.wanted(now)))
	}
}

// fight is what is known of a program that undoes our repairs. It says nothing
// about the filter, which may be intact: changes go on while it lasts.
type fight struct {
	repairs []time.Time // of what somebody changed, in the last minute
	err     error       // who it is; nil: nobody
	told    time.Time
	pause   time.Time // when we put things back again
	rested  time.Time // when a repair for a new block's sake is made again
}

// fightsMost is how often a minute our rules are put back at once. Somebody
// who takes them away in a loop is a program that has to be found, and status
// names it; until then they are put back once a second, and where that takes
// long for no more than a tenth of the time.
const (
	fightsMost  = 20
	fightPause  = time.Second
	fightEffort = 10 // to 1
)

// over forgets what is more than a minute ago, and reports whether a fight has
// ended by that.
func (f *fight) over(now time.Time) bool {
	f.repairs = slices.DeleteFunc(f.repairs, func(t time.Time) bool { return now.Sub(t) > time.Minute })
	if f.err == nil || len(f.repairs) > fightsMost {
		return false
	}
	f.err, f.pause, f.rested = nil, time.Time{}, time.Time{}
	return true
}

// fought notes that what by changed is put right, which was begun at start.
func (g *Guard) fought(by string, start time.Time) {
	f, now := &g.drift.fight, time.Now()
	f.over(now)
	if f.repairs = append(f.repairs, now); len(f.repairs) <= fightsMost {
		return
	}
	effort := fightEffort * now.Sub(start)
	f.pause, f.rested = now.Add(max(fightPause, effort)), now.Add(effort)
	f.err = fmt.Errorf("%s has changed our rules %d times within a minute, and undoes every repair: find and stop it (a cron job, another firewall program)", cmp.Or(by, "somebody"), len(f.repairs))
	if now.Sub(f.told) >= time.Minute {
		f.told = now
		g.fault("our rules are put back once a second at most; blocks are made as before", f.err)
	}
}

// watch passes on the news that somebody touched our rules, where the packet
// filter has such news.
func (g *Guard) watch(ctx context.Context) {
	for ctx.Err() == nil {
		g.fwMu.Lock()
		fw := g.fw
		watched, cancel := context.WithCancel(ctx)
		g.unwatch = cancel
		g.fwMu.Unlock()
		err := fw.Watch(watched, func(by string) {
			if by == "" {
				by = "an unknown program"
			}
			select {
			case g.tampers <- by:
			default: // one is waiting already, and looks at everything
			}
		})
		if errors.Is(err, errors.ErrUnsupported) {
			<-watched.Done() // the next one, after a reload, may have news
		}
		if ctx.Err() != nil {
			cancel()
			return
		}
		renewed := watched.Err() != nil
		cancel()
		if renewed && ctx.Err() == nil {
			continue
		}
		if err != nil {
			g.log.Warn("watching the packet filter for changes; trying again", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Second):
		}
	}
}

// contentMax is the number of entries up to which all of them are compared;
// these take the kernel 0.7 s, and the time grows with the square.
const contentMax = 100_000

// checkContent compares the entries in the packet filter with the store.
func (g *Guard) checkContent(ctx context.Context) { g.compareContent(ctx, "") }

// compareContent is checkContent after news that by changed something.
func (g *Guard) compareContent(ctx context.Context, by string) {
	if !g.caps.Real || !g.caps.Readback || g.drift.broken != nil || g.blocks.len() > contentMax {
		return
	}
	now := time.Now()
	want := make(map[netip.Prefix]time.Time)
	for _, e := range g.wanted(now) {
		want[e.Prefix] = e.Until
	}
	var b firewall.Batch
	ends := 0 // that are others than ours
	for in, err := range g.fw.List(ctx) {
		if err != nil {
			g.broke(err, now)
			return
		}
		g.dropped.saw(in)
		until, ok := want[in.Prefix]
		switch {
		case !ok:
			b.Unset = append(b.Unset, in.Prefix)
		case g.caps.Expiry && in.Until.Sub(until).Abs() > 5*time.Second &&
			(g.caps.MaxTimeout == 0 || until.Sub(now) < g.caps.MaxTimeout || in.Until.Sub(now) < g.caps.MaxTimeout/2):
			ends++ // set anew below
		default:
			delete(want, in.Prefix)
		}
	}
	g.dropped.read()
	for p, until := range want {
		_, known := g.drift.failed[p]               // tried again on a timer of its own
		if !known && until.Sub(now) > time.Second { // about to run out: both sides let go of it now
			b.Set = append(b.Set, firewall.Entry{Prefix: p, Until: until})
		}
	}
	if len(b.Set)+len(b.Unset) == 0 {
		return
	}
	g.drift.repairs++
	g.drift.repaired = now
	if by != "" {
		g.drift.by = by
	}
	_ = g.change(ctx, b)
	if g.fought(by, now); g.drift.fight.err != nil {
		return
	}
	missing, foreign := max(len(b.Set)-ends, 0), len(b.Unset)
	if missing+foreign == 0 && by == "" {
		// The filter's clock is not ours: it stands while the machine sleeps, and
		// goes on when ours is set.
		g.log.Info("entries in the packet filter had another end than in the store, as after the clock was set or the machine slept; they have the store's again", "entries", ends)
		return
	}
	g.tell(Event{On: OnTamper, Time: now, By: by, Why: fmt.Sprintf("entries in the packet filter differed from the store, %d missing, %d foreign and %d with another end; they are put right", missing, foreign, ends)})
	g.log.Warn("entries in the packet filter differed from the store; they are put right", "missing", missing, "foreign", foreign, "other_end", ends)
}
