package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// Trial is a first enforce that waits for the operator's word, as a router
// waits for the confirmation of a new configuration: whoever locked himself
// out cannot give it. The zero Trial is none.
//
// It is in the store before the first block. A restart neither makes it
// longer nor forgets that it ended; only an operator's Commit, or a time in
// mode: observe, lets the next one begin. The packet filter is given no block
// beyond its end: it ends also where this program is dead or hangs by then.
type Trial struct {
	State TrialState `json:"state"`
	Since time.Time  `json:"since"`
	// Until is when it ends, or ended, without the operator's word; in whole
	// seconds.
	Until time.Time `json:"until"`
	// By is who gave it, where State is Committed: store.Self where the policy
	// asked for nobody's.
	By string `json:"by,omitempty"`
}

// TrialState is how far a Trial is.
type TrialState string

const (
	OnTrial   TrialState = "running"   // enforced until Until
	Committed TrialState = "committed" // enforced for good
	TrialOver TrialState = "over"      // nobody gave his word: observed since
)

// over reports whether a trial ended without the operator's word.
func (t *Trial) over(now time.Time) bool {
	return t.State == TrialOver || t.State == OnTrial && (!now.Before(t.Until) || wentBack(t.Since, now))
}

// ends is when the packet filter lets go of a block: at its own end, or
// when the trial runs out.
func (g *Guard) ends(b *store.Block) time.Time {
	if g.trial.State == OnTrial && g.trial.Until.Before(b.Until) {
		return g.trial.Until
	}
	return b.Until
}

// holds reports whether the packet filter should hold a block now.
func (g *Guard) holds(b *store.Block, now time.Time) bool {
	return b.InForce(now) && !g.trial.over(now)
}

func (g *Guard) entry(b *store.Block) firewall.Entry {
	return firewall.Entry{Prefix: b.Prefix, Until: g.ends(b)}
}

// wentBack reports whether the clock was set back since a time that was
// written down: what was to last for minutes from then could last for years.
func wentBack(since, now time.Time) bool { return now.Before(since.Add(-5 * time.Minute)) }

// keyTrial is where the store has the Trial.
const keyTrial = "trial"

// loadTrial reads how far an earlier Guard's trial is. What cannot be read is
// taken as over: better no block than one that nobody stands for.
func (g *Guard) loadTrial() {
	v, err := g.o.Store.Meta(keyTrial)
	if err == nil && v != nil {
		err = json.Unmarshal(v, &g.trial)
	}
	if err != nil {
		g.fault("reading how far the trial of mode: enforce is; it is taken as over", err)
		g.trial = Trial{State: TrialOver}
	}
}

// saveTrial writes down how far the trial is, and never before the ends of
// blocks that an earlier step of it lifted: a restart would bring them back.
func (g *Guard) saveTrial(t Trial) error {
	err := g.settle()
	var v []byte
	if err == nil {
		v, err = json.Marshal(t)
	}
	if err == nil {
		err = g.o.Store.SetMeta(keyTrial, v)
	}
	if err != nil {
		return fmt.Errorf("writing down how far the trial of mode: enforce is: %w", err)
	}
	g.trial = t
	return nil
}

// beginTrial begins the trial of an enforcing start if the policy wants one
// and there was none yet; in mode: observe it forgets an earlier one, and
// lifts the blocks for which nobody gave his word.
func (g *Guard) beginTrial(ctx context.Context, now time.Time) error {
	switch {
	case g.policy.Mode != policy.Enforce:
		if g.trial == (Trial{}) {
			return nil
		}
		if g.trial.State != Committed {
			g.enforce = false
			if n := g.liftAll(ctx, "mode: observe ended the trial of mode: enforce", now); n > 0 {
				g.log.Warn("mode: observe ends the trial of mode: enforce: every block is lifted", "blocks", n)
			}
		}
		return g.saveTrial(Trial{})
	case g.trial.State != "":
		if w := g.noTrial(); w != "" {
			g.log.Warn(w)
		}
	case g.policy.Commit == 0:
		// Known from now on: a server that has enforced for months does not
		// go on trial because commit: is in its policy one day.
		if err := g.saveTrial(Trial{State: Committed, Since: now, By: store.Self}); err != nil {
			g.fault("noting that mode: enforce needs nobody's word", err)
		}
	default:
		if err := g.saveTrial(Trial{State: OnTrial, Since: now, Until: wholeSecond(now.Add(g.policy.Commit))}); err != nil {
			return err
		}
	}
	if g.trial.State == OnTrial && !g.trial.over(now) {
		g.log.Warn("mode: enforce is on trial: without `smtpguard commit` every block is lifted", "at", g.trial.Until.Format(time.RFC3339))
	}
	return nil
}

// noTrial is the sentence for whoever relies on a commit: that begins nothing;
// empty where there is nothing to say.
func (g *Guard) noTrial() string {
	if g.policy.Mode != policy.Enforce || g.policy.Commit == 0 || g.trial.By != store.Self {
		return ""
	}
	return "commit: begins no trial, for blocks were enforced without one before: nothing is lifted without your word; `smtpguard commit --for 10m` begins one"
}

// watchTrial ends the trial when its time is up.
func (g *Guard) watchTrial(ctx context.Context, now time.Time) {
	if g.trial.State == OnTrial && g.trial.over(now) {
		g.endTrial(ctx, now)
	}
}

// endTrial lifts every block and goes on observing, whatever else fails: that
// is what the operator relies on who cannot reach the machine.
func (g *Guard) endTrial(ctx context.Context, now time.Time) {
	g.enforce = false
	why := fmt.Sprintf("nobody gave the word (`smtpguard commit`) within %s of the first enforce", g.trial.Until.Sub(g.trial.Since).Round(time.Second))
	over := g.trial
	over.State = TrialOver
	if err := g.saveTrial(over); err != nil {
		g.fault("ending the trial; a restart ends it again", err)
		g.trial = over
	}
	n := g.liftAll(ctx, why, now)
	g.log.Error("the trial of mode: enforce is over: every block is lifted, and from now on it is only observed",
		"why", why, "blocks", n, "hint", "`smtpguard commit` enforces for good, `smtpguard commit --for 10m` tries again")
	g.tellSystemd()
}

// liftAll lifts every block in force, and forgets those under way. It returns
// how many there were.
func (g *Guard) liftAll(ctx context.Context, why string, now time.Time) int {
	g.pending = nil
	var out []store.Block
	for _, b := range g.blocks.all() {
		if b.InForce(now) {
			b.LiftedBy = store.Self + ": " + why
			out = append(out, b)
		}
	}
	if len(out) == 0 {
		return 0
	}
	_ = g.exchangeAnyway(ctx, out, nil, now, "lifting every block: "+why) // told, and tried again
	return len(out)
}

// ErrNoTrial: there is nothing that waits for the operator's word.
var ErrNoTrial = errors.New("mode: enforce is not on trial, and was not: there is nothing to commit")

// Commit is the operator's word that enforcing is right: it ends the trial, or
// takes up enforcing again after it was over. With again it begins the trial
// anew from now on instead, for so long.
func (g *Guard) Commit(ctx context.Context, by string, again time.Duration) (t Trial, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		switch {
		case again < 0 || again > 24*time.Hour:
			err = errors.New("a trial lasts a day at most")
			return
		case g.policy.Mode != policy.Enforce || g.trial.State == "" || g.trial.State == Committed && again == 0:
			t, err = g.trial, ErrNoTrial
			return
		}
		next := Trial{State: Committed, Since: g.trial.Since, Until: g.trial.Until, By: by}
		if again > 0 {
			next = Trial{State: OnTrial, Since: now, Until: wholeSecond(now.Add(again))}
		}
		if err = g.saveTrial(next); err != nil {
			return
		}
		t = next
		if !g.enforce {
			g.enforceNow(ctx)
		}
		g.newEnds(ctx, now)
		g.log.Info("mode: enforce has the operator's word", "state", string(t.State), "by", by)
		g.tellSystemd()
	})
	return t, errors.Join(doErr, err)
}

// newEnds gives the packet filter the ends that blocks have after a change of
// the trial. What it does not take is told, and tried again.
func (g *Guard) newEnds(ctx context.Context, now time.Time) {
	g.telling.edits = g.blocks.edits - 1 // CSF is told as well
	if len(g.wanted(now)) > 0 {
		_ = g.refill(ctx, now)
	}
}

// enforceNow goes over from observing to enforcing.
func (g *Guard) enforceNow(ctx context.Context) {
	g.enforce, g.taking = true, true
	g.takeUpKnown(ctx, time.Now())
}

// takeUpKnown takes up what was only observed, if it still is to be: as
// verdicts do, it waits for names of the allowlist that nothing is known of.
func (g *Guard) takeUpKnown(ctx context.Context, now time.Time) {
	if g.taking = g.taking && g.enforce; !g.taking || g.namesAwaited(now) {
		return
	}
	g.taking = false
	if err := g.takeUp(ctx, now); err != nil {
		g.fault("what was asked for by hand while blocks were only observed is not in force", err)
	}
}

// setMode goes over to the policy's mode without a restart. To enforce needs
// another packet filter than to observe; blocks of an enforcing time that was
// no trial stay in force in mode: observe, as after a restart, until they end
// or are lifted.
func (g *Guard) setMode(ctx context.Context, now time.Time) error {
	if g.policy.Mode == policy.Enforce {
		if err := g.openFilter(ctx, g.filterAllow(), g.filterEntries()); err != nil {
			return err
		}
	}
	if err := g.beginTrial(ctx, now); err != nil {
		if g.policy.Mode != policy.Enforce { // it needs nobody's leave to block nothing
			g.enforce, g.trial = false, Trial{}
		}
		return err
	}
	if g.policy.Mode == policy.Enforce && !g.trial.over(now) {
		g.enforceNow(ctx)
		g.newEnds(ctx, now)
	} else {
		g.enforce = false
	}
	g.tellSystemd()
	return nil
}

// tellSystemd says in `systemctl status` what nobody should have to look for.
func (g *Guard) tellSystemd() {
	now := time.Now()
	switch {
	case g.trial.State == TrialOver && g.policy.Mode == policy.Enforce:
		g.notify("STATUS=observing: the trial of mode: enforce ended without `smtpguard commit`")
	case g.trial.State == OnTrial && g.enforce:
		g.notify("STATUS=enforcing on trial until " + g.trial.Until.Format(time.RFC3339) + ", then every block is lifted without `smtpguard commit`")
	case g.gate.standing.stop.In(now):
		g.notify("STATUS=rules block nothing until " + g.gate.standing.stop.Until.Format(time.RFC3339) + ": see `smtpguard status`")
	case g.enforce:
		g.notify("STATUS=enforcing")
	default:
		g.notify("STATUS=observing")
	}
}

// gateWarnings are the sentences about what keeps this program from blocking.
func (g *Guard) gateWarnings(now time.Time) (w []string) {
	switch {
	case g.policy.Mode != policy.Enforce:
	case g.trial.over(now):
		w = append(w, fmt.Sprintf("the trial of mode: enforce ended at %s without `smtpguard commit`: every block was lifted, and nothing is blocked; `smtpguard commit` enforces, `smtpguard commit --for 10m` tries again",
			g.trial.Until.Format(time.RFC3339)))
	case g.trial.State == OnTrial:
		w = append(w, fmt.Sprintf("mode: enforce is on trial: every block is lifted at %s unless you say `smtpguard commit`", g.trial.Until.Format(time.RFC3339)))
	}
	if s := g.noTrial(); s != "" {
		w = append(w, s)
	}
	if s := g.gate.standing.stop; s.In(now) {
		w = append(w, fmt.Sprintf("RULES BLOCK NOTHING until %s: %s; put the rule right, then `smtpguard resume`", s.Until.Format(time.RFC3339), s.Why))
	}
	return append(w, g.nameWarnings(now)...)
}
