package guard

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
)

// Outcome is what became of a verdict or of an operator's command.
type Outcome string

const (
	Blocked     Outcome = "blocked"     // in the store and in the packet filter
	Observed    Outcome = "observed"    // would be blocked; mode: observe
	Spared      Outcome = "spared"      // known good senders are in it; its bad members are judged alone
	Refused     Outcome = "refused"     // the gate said no
	Unconfirmed Outcome = "unconfirmed" // the socket table does not show it
	Failed      Outcome = "failed"      // could not be written down or applied
	Lifted      Outcome = "lifted"      // ended by an operator, or because it became allowed
	Expired     Outcome = "expired"     // its time was up
)

// Decision is one decision with its reason, as the log and `explain` show it.
type Decision struct {
	Time   time.Time    `json:"time"`
	Prefix netip.Prefix `json:"prefix"`
	What   Outcome      `json:"what"`
	Rule   string       `json:"rule,omitempty"`
	Score  float64      `json:"score,omitempty"`
	Why    string       `json:"why"`
	Until  time.Time    `json:"until,omitzero"`
	// Reason is Why in one word, where there are several; see Event.
	Reason string `json:"reason,omitempty"`
}

// noteMost is how many decisions of one act are told one by one.
const noteMost = 200

// noteAll notes the decisions of one act; of many, most are only counted.
func (g *Guard) noteAll(all []Decision) {
	for _, d := range all[:min(len(all), noteMost)] {
		g.note(d)
	}
	if more := len(all) - noteMost; more > 0 {
		g.log.Info(string(all[0].What)+" as well", "prefixes", more, "why", all[0].Why)
		g.tellDecision(all[noteMost], more)
	}
}

// note remembers a decision and logs it.
func (g *Guard) note(d Decision) {
	g.recent = bounded(append(g.recent, d), 500)
	g.tellDecision(d, 1)
	args := []any{"prefix", d.Prefix.String(), "why", d.Why}
	if d.Rule != "" {
		args = append(args, "rule", d.Rule)
	}
	if !d.Until.IsZero() {
		args = append(args, "until", d.Until.Format(time.RFC3339))
	}
	g.log.Info(string(d.What), args...)
}

// decided is a verdict that passed the gate and was confirmed, and when it
// came in by this machine's clock.
type decided struct {
	verdict detector.Verdict
	since   time.Time
}

// staleAfter is how old a verdict on past lines (read after a restart) may
// be: what was a flood then needs no block now, and if it still is one, the
// next lines and the socket table say so.
const staleAfter = 2 * time.Minute

// decide takes the detector's verdicts through the gate. Those that the
// socket table bears out are made blocks at once, others wait for it a little,
// and all for a new name of the allowlist.
func (g *Guard) decide(ctx context.Context, verdicts []detector.Verdict, now time.Time) {
	var good []decided
	for _, v := range verdicts {
		g.count.Verdicts++
		if b, ok := g.blocks.covers(v.Source); ok && (!b.Observed || !g.enforce) {
			continue // the common case, before all that costs more
		}
		if g.waits(v.Source) {
			continue
		}
		d := Decision{Time: now, Prefix: v.Source, Rule: v.Rule, Score: v.Score, Why: v.Sentence()}
		if v.KnownGood > 0 && len(v.Spared) > 0 {
			g.count.Spared++
			d.What = Spared
			g.note(d)
			continue
		}
		if now.Sub(v.Time) > staleAfter {
			continue
		}
		parts, r := g.gate.parts(v.Source)
		if r == nil {
			r = unproven(&v, g.det) // it must not wait: the next verdict may be proven
		}
		if r != nil {
			g.count.Refused++
			d.What, d.Reason, d.Why = Refused, r.Reason, d.Why+"; but "+r.Why
			g.note(d)
			continue
		}
		if len(g.blocks.lacking(parts, g.enforce)) == 0 {
			continue
		}
		if _, ok := g.confirmed(v, now); !ok || g.namesAwaited(now) {
			if len(g.pending) < 1000 {
				g.pending = append(g.pending, pending{clone(v), now})
			}
			continue
		}
		good = append(good, decided{clone(v), now})
	}
	g.enact(ctx, good, now)
}

// clone keeps a verdict beyond the detector's next call.
func clone(v detector.Verdict) detector.Verdict {
	v.Evidence = append([]detector.Evidence(nil), v.Evidence...)
	v.Spared = append([]netip.Addr(nil), v.Spared...)
	return v
}

// waits reports whether a verdict on p waits for confirmation.
func (g *Guard) waits(p netip.Prefix) bool {
	for _, w := range g.pending {
		if w.verdict.Source == p {
			return true
		}
	}
	return false
}

// enact makes blocks of verdicts: store first, packet filter second, sockets
// third, then a look whether it worked.
func (g *Guard) enact(ctx context.Context, good []decided, now time.Time) {
	if len(good) == 0 {
		return
	}
	g.freshSelf(ctx, selfFresh, now)
	var made []*store.Block
	var since []time.Time
	for _, d := range good {
		v := d.verdict
		if parts, r := g.gate.parts(v.Source); r == nil && len(g.blocks.lacking(parts, g.enforce)) == 0 {
			continue
		}
		parts, r := g.gate.admitsVerdict(&v, g.det, now, &g.blocks, len(made))
		g.shout()
		if r != nil {
			g.count.Refused++
			g.note(Decision{Time: now, Prefix: v.Source, What: Refused, Reason: r.Reason, Rule: v.Rule, Score: v.Score, Why: v.Sentence() + "; but " + r.Why})
			continue
		}
		parts = g.blocks.lacking(parts, g.enforce)
		offence, err := g.offence(v.Source, parts, now)
		if err != nil {
			g.fault("counting earlier blocks of "+v.Source.String(), err)
		}
		until := wholeSecond(now.Add(g.gate.block.Duration(offence)))
		for i, p := range parts {
			b := &store.Block{Prefix: p, Verdict: &v, Reason: v.Sentence(), Offence: offence,
				Since: now, Until: until, By: store.Self, Observed: !g.enforce}
			partOf(b, v.Source, i)
			made = append(made, b)
			since = append(since, d.since)
		}
	}
	if len(made) == 0 {
		return
	}
	_ = g.apply(ctx, made, nil, since, now)
}

// offence is which offence a block from now on is, of the whole or of the part
// that had most.
func (g *Guard) offence(whole netip.Prefix, parts []netip.Prefix, now time.Time) (most int, err error) {
	for i, p := range append([]netip.Prefix{whole}, parts...) {
		if i > 0 && p == whole {
			continue
		}
		n, e := g.o.Store.Offences(p, now.Add(-g.policy.Block.Forget), now)
		most, err = max(most, n), errors.Join(err, e)
	}
	return max(most, 1), err
}

// wholeSecond rounds up: packet filters count in seconds, and a block must not
// end before it begins.
func wholeSecond(t time.Time) time.Time {
	if s := t.Truncate(time.Second); !s.Equal(t) {
		return s.Add(time.Second)
	}
	return t
}

// unsavedFor is how long a block lasts at most that could not be written down:
// it is in the packet filter, which ends it by itself, and in memory.
const unsavedFor = 10 * time.Minute

// apply writes blocks down, in place of those of replaced, and brings them
// into force. since says when each was decided, to measure relief; nil for an
// operator's. It returns what could not be done.
//
// Those of verdicts do not wait for a slow disk, as it is while a flood is on:
// see diskPatience. The packet filter ends them by itself if a crash comes before
// they are written down, and the next start takes out what nobody knows of.
//
// If the store cannot be written, an operator's blocks are not made: there is
// somebody to tell. Those of verdicts are, for a short time: a flood that
// fills the disk must not switch its own end off. They are written down as
// soon as it can be, and status says so until then.
//
// If the packet filter does not take them, the blocks are written down, are
// shown as not in force, and are tried again.
func (g *Guard) apply(ctx context.Context, made []*store.Block, replaced []store.Block, since []time.Time, now time.Time) error {
	var finish func() error // nil: all is written, or owed
	var err error
	if since != nil && g.enforce {
		if finish, err = g.beginWrite(replaced, made); err != nil {
			g.unwritten(err, replaced, made, now)
		}
	} else if err := g.write(replaced, made); err != nil {
		g.fault("writing blocks down", err)
		for _, b := range made {
			g.count.Failed++
			g.note(Decision{Time: now, Prefix: b.Prefix, What: Failed, Reason: reasonStore, Why: "it could not be written down: " + err.Error()})
		}
		return err
	}
	var batch firewall.Batch
	var prefixes []netip.Prefix
	for _, b := range made {
		g.blocks.put(*b)
		if !b.Observed {
			batch.Set = append(batch.Set, g.entry(b))
			prefixes = append(prefixes, b.Prefix)
		}
	}
	err = nil // it is told
	ended := sockets.Ended{Left: -1}
	if len(batch.Set) > 0 {
		err = g.change(ctx, batch)
		ended = g.end(ctx, prefixes)
	}
	at := time.Now()
	if finish != nil {
		if werr := finish(); werr != nil {
			err = errors.Join(err, g.shorten(ctx, g.unwritten(werr, replaced, made, now)))
		}
		for _, b := range made {
			g.blocks.put(*b) // with their numbers
		}
	}
	for _, b := range made {
		if b.Observed {
			g.count.Observed++
			g.noteBlock(*b, Observed)
			continue
		}
		g.det.Forget(b.Whole())
		if g.drift.unapplied(b.Prefix) {
			g.count.Failed++
			if g.late == nil {
				g.late = make(map[netip.Prefix]bool)
			}
			g.late[b.Prefix] = true
			g.note(Decision{Time: now, Prefix: b.Prefix, What: Failed, Reason: reasonFilter, Until: b.Until, Why: b.Reason + "; written down, but the packet filter did not take it: " + g.drift.why(b.Prefix) + "; it is tried again"})
		} else {
			g.count.Blocked++
			g.noteBlock(*b, Blocked)
		}
	}
	if ended.Left >= 0 {
		g.relieved(made, since, prefixes, ended.Destroyed+ended.Signalled, ended.Left, at)
	}
	return err
}

// diskPatience is how long a block of a verdict waits for the store, which is
// to know of it first. A disk that takes longer is not waited for.
var diskPatience = time.Second

// beginWrite writes down the blocks of verdicts. Where that takes longer than
// diskPatience it goes on, and finish waits for its end; made has its numbers
// then.
func (g *Guard) beginWrite(replaced []store.Block, made []*store.Block) (finish func() error, err error) {
	if err := g.settle(); err != nil {
		return nil, err
	}
	written := make([]*store.Block, len(made))
	for i, b := range made {
		c := *b
		written[i] = &c
	}
	st, ended := g.o.Store, make(chan error, 1)
	go func() { ended <- st.Replace(replaced, written) }()
	finish = func() error {
		err := <-ended
		for i, b := range written {
			made[i].ID = b.ID
		}
		return err
	}
	late := time.NewTimer(diskPatience)
	defer late.Stop()
	select {
	case err := <-ended:
		ended <- err
		return nil, finish()
	case <-late.C:
		return finish, nil
	}
}

// unwritten owes the store what it did not take, and lets it last for a short
// time only. It returns those whose end is another then.
func (g *Guard) unwritten(err error, replaced []store.Block, made []*store.Block, now time.Time) (shorter []*store.Block) {
	g.fault("writing blocks down", err)
	for _, b := range made {
		if end := now.Add(unsavedFor).Truncate(time.Second); end.Before(b.Until) {
			b.Until = end
			shorter = append(shorter, b)
		}
	}
	g.owe(replaced, made)
	return shorter
}

// shorten gives the packet filter the new ends of blocks.
func (g *Guard) shorten(ctx context.Context, made []*store.Block) error {
	var batch firewall.Batch
	for _, b := range made {
		g.blocks.put(*b)
		batch.Set = append(batch.Set, g.entry(b))
	}
	if len(batch.Set) == 0 {
		return nil
	}
	return g.change(ctx, batch)
}

// relieved notes how many connections ended, and at now how long that took.
func (g *Guard) relieved(made []*store.Block, since []time.Time, prefixes []netip.Prefix, ended, left int, now time.Time) {
	if left > 0 {
		g.log.Warn("blocked sources still hold connections; they are ended at the next look", "left", left)
	}
	var upd []store.Block
	for i, b := range made {
		b.Ended = ended
		if len(prefixes) > 1 {
			b.Ended = min(ended, g.table.holding(b.Prefix))
		}
		if since != nil && left == 0 {
			b.Relief = max(now.Sub(since[i]), 1)
			g.count.LastRelief, g.count.LastReliefAt = b.Relief, now
			g.tell(Event{On: OnEnded, Time: now, Prefix: b.Prefix, Took: b.Relief})
		} else if since != nil {
			g.slow = bounded(append(g.slow, slow{*b, since[i]}), 1000)
		}
		g.blocks.put(*b)
		upd = append(upd, *b)
	}
	g.save(upd, "noting the relief")
}

// slow is a block whose source still held connections when they were ended.
type slow struct {
	block store.Block
	since time.Time // of the verdict
}

// stillSlow looks whether the last connections of blocked sources are gone,
// and notes how long that took.
func (g *Guard) stillSlow(now time.Time) {
	var upd []store.Block
	g.slow = slices.DeleteFunc(g.slow, func(s slow) bool {
		b, ok := g.blocks.get(s.block.Prefix)
		if !ok || b.ID != s.block.ID {
			return true
		}
		if g.table.holding(b.Prefix) > 0 {
			return false
		}
		b.Relief = max(now.Sub(s.since), 1)
		g.count.LastRelief, g.count.LastReliefAt = b.Relief, now
		g.tell(Event{On: OnEnded, Time: now, Prefix: b.Prefix, Took: b.Relief})
		upd = append(upd, *b)
		return true
	})
	g.save(upd, "noting the relief")
}

// save writes changes of blocks that were written down before.
func (g *Guard) save(upd []store.Block, what string) {
	upd = slices.DeleteFunc(upd, func(b store.Block) bool { return b.ID == 0 })
	if len(upd) == 0 {
		return
	}
	if err := g.o.Store.Save(upd...); err != nil {
		g.fault(what, err)
	}
}

func (g *Guard) noteBlock(b store.Block, what Outcome) {
	d := Decision{Time: b.Since, Prefix: b.Prefix, What: what, Why: b.Reason, Until: b.Until}
	if b.Verdict != nil {
		d.Rule, d.Score = b.Verdict.Rule, b.Verdict.Score
	}
	g.note(d)
}

// tellLate tells of the blocks that came into force at a later try.
func (g *Guard) tellLate() {
	for p := range g.late {
		b, ok := g.blocks.get(p)
		if ok && g.drift.unapplied(p) {
			continue
		}
		delete(g.late, p)
		if ok && !b.Observed {
			g.count.Blocked++
			g.noteBlock(*b, Blocked)
		}
	}
}

// sweep ends the blocks whose time is up, which it reports, and saves
// positions.
func (g *Guard) sweep(ctx context.Context, now time.Time) bool {
	if g.settle() == nil { // else told when it came to that, and in the warnings of status
		g.savePositions() // never ahead of what the lines led to
	}
	g.tellLate()
	if !g.copyDue.IsZero() && !now.Before(g.copyDue) {
		g.copyAllow()
	}
	out := g.blocks.expire(now)
	if len(out) == 0 {
		return false
	}
	batch := firewall.Batch{}
	var told []Decision
	for _, b := range out {
		told = append(told, Decision{Time: now, Prefix: b.Prefix, What: Expired, Why: "its time was up"})
		g.drift.forget(b.Prefix)
		if !b.Observed {
			batch.Unset = append(batch.Unset, b.Prefix)
		}
	}
	g.noteAll(told)
	g.count.Expired += uint64(len(out))
	// The filter ends them by itself where it can; one that was made longer
	// or shorter by somebody else's hand is ended here.
	if len(batch.Unset) > 0 {
		_ = g.change(ctx, batch)
	}
	return true
}

// leak notes that a source that should be blocked still opens connections.
func (g *Guard) leak(b *store.Block, now time.Time) {
	g.count.Leaks++
	if now.Sub(g.drift.leakTold) < time.Minute {
		return
	}
	g.drift.leakTold = now
	g.fault("a blocked source still reaches the server", &leakError{b.Prefix})
	g.drift.suspect = true
}

type leakError struct{ p netip.Prefix }

func (e *leakError) Error() string {
	return e.p.String() + " opened a connection more than 10 s after it was blocked: is another network namespace, a proxy or an offloading card in between?"
}

// saveGood writes the known good senders that are new since the last time to
// the store.
func (g *Guard) saveGood() error {
	var goods []store.Good
	newest, now := g.goods, time.Now()
	for s := range g.det.KnownGood() {
		if s.Last.After(now) {
			s.Last = now // of a clock ahead of ours
		}
		if s.Last.After(g.goods) {
			goods = append(goods, store.Good{Addr: s.Addr, First: s.First, Last: s.Last, Messages: s.Messages})
			if s.Last.After(newest) {
				newest = s.Last
			}
		}
	}
	if len(goods) == 0 {
		return nil
	}
	if err := g.o.Store.SaveGood(goods); err != nil {
		g.fault("saving known good senders", err)
		return err
	}
	g.goods = newest
	return nil
}
