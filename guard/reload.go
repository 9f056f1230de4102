package guard

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/policy"
)

// Reloaded is what became of a policy that was taken.
type Reloaded struct {
	// Restart are the settings that differ and need a restart.
	Restart []string
	// Anew: the rules, or what they count with, are others, and what sources did
	// before counts no more but for the slots that they hold, who is known good,
	// and that the server was seen full.
	Anew bool
	// Mode is the policy's mode from now on. It is the earlier one where the new
	// one could not be begun.
	Mode policy.Mode
	// Undone joins what the policy says and is not so yet; nil: all of it is.
	Undone error
}

// Reload takes a new policy without a restart: allowlist, rules, lengths and
// limits of blocks, known good, mode. Blocks that overlap the new allowlist are
// lifted. An error means that the policy was not taken, and all is as before.
func (g *Guard) Reload(ctx context.Context, p *policy.Policy) (r Reloaded, err error) {
	doErr := g.do(ctx, func(ctx context.Context) {
		old := g.policy
		differ := func(name string, a, b any) {
			if !reflect.DeepEqual(a, b) {
				r.Restart = append(r.Restart, name)
			}
		}
		differ("logs", old.Logs, p.Logs)
		differ("zone", old.Zone, p.Zone)
		capacity := p.Capacity > 0 && p.Capacity != old.Capacity
		if p.Capacity == 0 && old.Capacity > 0 {
			r.Restart = append(r.Restart, "capacity")
		}
		differ("confirm", old.Confirm, p.Confirm)
		differ("ports", old.Ports, p.Ports)
		differ("block.ports", old.Block.Ports, p.Block.Ports)
		differ("firewall", old.Firewall, p.Firewall)
		differ("store", old.Store, p.Store)
		differ("control", old.Control, p.Control)
		differ("reports", old.Reports, p.Reports)
		differ("metrics", old.Metrics, p.Metrics)
		differ("hooks", old.Hooks, p.Hooks)
		merged := *p
		merged.Logs, merged.Zone, merged.Confirm, merged.Ports = old.Logs, old.Zone, old.Confirm, old.Ports
		merged.Capacity = cmp.Or(p.Capacity, old.Capacity)
		merged.Block.Ports = old.Block.Ports
		merged.Firewall, merged.Store, merged.Control, merged.Reports = old.Firewall, old.Store, old.Control, old.Reports
		merged.Metrics, merged.Hooks = old.Metrics, old.Hooks
		if !reflect.DeepEqual(old.Rules, p.Rules) || old.Saturation != p.Saturation || old.KnownGood != p.KnownGood || old.Memory != p.Memory {
			o := g.o
			o.Policy = &merged
			if capacity {
				o.Capacity = p.Capacity
			}
			det, e := newDetector(o)
			if e != nil {
				err = e
				return
			}
			for s := range g.det.KnownGood() {
				det.LearnGood(s.Addr, s.First, s.Last, s.Messages)
			}
			for h := range g.det.Holders() {
				// When it was opened: all of them at once would be a storm.
				det.Observe(&detector.Event{Kind: detector.Opened, Source: h.Addr, Port: h.Port, Time: h.Since})
			}
			det.Inherit(g.det)
			g.det, r.Anew = det, true
			_, _ = g.resume("the policy was changed", time.Now())
		}
		if capacity { // the policy is taken from here on
			g.setCapacity(p.Capacity, "the policy")
		}
		g.policy, g.gate.block = &merged, merged.Block
		g.syncNames(time.Now())
		for _, n := range g.names {
			n.due = time.Now() // the person who reloads wants to know now
		}
		g.relist(time.Now())
		g.freshSelf(ctx, 0, time.Now())
		g.rebuildAllow()
		g.dropAllowed()
		_, liftErr := g.liftAllowed(ctx)
		var modeErr error
		if old.Commit != p.Commit && old.Mode == p.Mode {
			modeErr = g.beginTrial(ctx, time.Now()) // none, but it says so
		}
		if old.Mode != p.Mode {
			modeErr = g.setMode(ctx, time.Now())
			if modeErr != nil && p.Mode == policy.Enforce {
				merged.Mode = old.Mode
				modeErr = fmt.Errorf("mode stays %s until the next reload: %w", old.Mode, modeErr)
			}
		}
		r.Mode, r.Undone = merged.Mode, errors.Join(modeErr, liftErr, g.renewFilter(ctx))
	})
	if err = errors.Join(doErr, err); err != nil {
		return Reloaded{}, err
	}
	return r, nil
}
