package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os/user"
	"strings"
	"sync"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/hook"
	"github.com/smtpguard/smtpguard/metrics"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// watch is who is told by the guard what happens: numbers for Prometheus, and
// the hooks of the policy.
type watch struct {
	p       *policy.Policy
	log     *slog.Logger
	metrics *metrics.Metrics // nil: none
	hooks   *hook.Hooks      // nil: none
	store   *store.Store
	guard   *guard.Guard
	desk    *abuse.Desk // nil: no reports
}

func newWatch(p *policy.Policy, st *store.Store, log *slog.Logger) (*watch, error) {
	w := &watch{p: p, store: st, log: log}
	if p.Metrics.Group != "" {
		if _, err := user.LookupGroup(p.Metrics.Group); err != nil {
			return nil, fmt.Errorf("metrics.group: %w", err)
		}
	}
	if len(p.Hooks) > 0 {
		var configs []hook.Config
		for _, h := range p.Hooks {
			configs = append(configs, hook.Config(h))
		}
		w.hooks = hook.New(configs, hook.Options{Sendmail: p.Reports.Delivery.Program, Before: outside(), Version: programVersion(), Log: log, Fault: w.fault})
	}
	if p.Metrics.Listen != "" {
		s := metrics.Sources{Version: programVersion(), Reports: w.reports, Lookups: w.lookups}
		if w.hooks != nil {
			s.Hooks = w.hooks.Status
		}
		w.metrics = metrics.New(s)
	}
	return w, nil
}

// attach lets a guard that is to be made tell its events.
func (w *watch) attach(o *guard.Options) {
	if w.metrics != nil {
		o.OnPulse = w.metrics.Pulse
	}
	if w.metrics != nil || w.hooks != nil {
		o.OnEvent = func(e guard.Event) {
			if w.metrics != nil {
				w.metrics.Event(e)
			}
			if w.hooks != nil {
				w.hooks.Tell(hookEvent(e))
			}
		}
	}
}

// hookEvent is a guard's event as hooks tell it. Kinds that no hook can have
// are told by none.
func hookEvent(e guard.Event) hook.Event {
	h := hook.Event{On: string(e.On), Time: e.Time, Count: e.Count, Prefix: e.Prefix, Observed: e.Outcome == guard.Observed, Rule: e.Rule, Score: e.Score,
		Why: e.Why, Until: e.Until, By: e.By, Taken: e.Taken, Capacity: e.Capacity}
	if e.On == guard.OnSaturated || e.On == guard.OnRelieved {
		h.Seconds = e.Took.Seconds()
	}
	return h
}

// start serves and tells until ctx ends; stop waits for the end, which takes a
// few seconds if hooks have something to tell. d may be nil.
func (w *watch) start(ctx context.Context, g *guard.Guard, d *abuse.Desk) (stop func()) {
	var wg sync.WaitGroup
	w.guard, w.desk = g, d
	if w.metrics != nil {
		wg.Go(func() { w.serve(ctx) })
	}
	if w.hooks != nil {
		wg.Go(func() { w.hooks.Run(ctx) })
		if d != nil {
			wg.Go(func() { followReports(ctx, d.Briefs, storedReports{w.store}, w.hooks.Tell, w.log) })
		}
	}
	return wg.Wait
}

// fault shows in `smtpguard status` that a hook fails.
func (w *watch) fault(ctx context.Context, what string, err error) {
	short, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if w.guard.NoteFault(short, what, err) != nil { // it stops, or is very busy
		w.log.Error(what, "err", err)
	}
}

// serve makes the listener and, where it cannot be made, tries again: the
// address may come later, and the server is protected without it.
func (w *watch) serve(ctx context.Context) {
	network, address := w.p.Metrics.Split()
	for told := false; ctx.Err() == nil; {
		l, err := w.listen(ctx, network, address)
		if err == nil {
			w.log.Info("metrics can be read", "listen", w.p.Metrics.Listen)
			told = false
			err = w.metrics.Serve(ctx, l)
		}
		if err != nil && !told {
			w.log.Error("metrics cannot be read; trying again", "listen", w.p.Metrics.Listen, "err", err)
			told = true
		}
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
	}
}

func (w *watch) listen(ctx context.Context, network, address string) (net.Listener, error) {
	if network == "unix" {
		return control.Listen(address, w.p.Metrics.Group)
	}
	var c net.ListenConfig
	return c.Listen(ctx, network, address)
}

func (w *watch) reports() []abuse.Brief {
	if w.desk == nil {
		return nil
	}
	return w.desk.Briefs()
}

func (w *watch) lookups() []abuse.LookupCount {
	if w.desk == nil {
		return nil
	}
	return w.desk.Lookups()
}

// toldStates are the states of a report that somebody should hear of.
var toldStates = map[abuse.State]bool{abuse.Held: true, abuse.Drafted: true, abuse.Sent: true, abuse.Doubtful: true, abuse.Bounced: true,
	abuse.Deferred: true, abuse.Acknowledged: true, abuse.Answered: true}

// toldReports are the states of reports that hooks were told of, by ID, over
// restarts.
type toldReports interface {
	load() (map[string]abuse.State, error) // nil: nobody was ever told
	save(map[string]abuse.State) error
}

// storedReports keeps them in the store.
type storedReports struct{ st *store.Store }

const keyToldReports = "reports told to hooks"

func (s storedReports) load() (m map[string]abuse.State, err error) {
	b, err := s.st.Meta(keyToldReports)
	if err != nil || b == nil {
		return nil, err
	}
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("reading which reports were told of: %w", err)
	}
	if m == nil {
		m = map[string]abuse.State{}
	}
	return m, nil
}

func (s storedReports) save(m map[string]abuse.State) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return s.st.SetMeta(keyToldReports, b)
}

// followReports tells how reports move on, also what changed since an earlier
// run: a draft made in the last seconds before a stop, or a report that was
// approved or sent while no daemon ran. Where nobody was ever told, it begins
// with how they stand now.
func followReports(ctx context.Context, list func() []abuse.Brief, told toldReports, tell func(hook.Event), log *slog.Logger) {
	t := time.NewTicker(5 * time.Second)
	defer t.Stop()
	before, err := told.load()
	if err != nil {
		log.Error("what changed with reports before this start is not told", "err", err)
	}
	unsaved, failed := false, false
	for {
		now := make(map[string]abuse.State)
		for _, b := range list() {
			now[b.ID] = b.State
			if before != nil && before[b.ID] != b.State && toldStates[b.State] {
				var why []string
				if b.AS != 0 {
					why = append(why, fmt.Sprintf("AS%d", b.AS))
				}
				why = append(why, b.Network.String())
				if b.Why != "" {
					why = append(why, b.Why)
				}
				tell(hook.Event{On: hook.Report, Time: time.Now(), Report: b.ID, State: string(b.State), Why: strings.Join(why, ", ")})
			}
		}
		if unsaved = unsaved || before == nil || !maps.Equal(before, now); unsaved {
			err := told.save(now)
			if err != nil && !failed {
				log.Error("which reports were told of cannot be saved; trying again", "err", err)
			}
			unsaved, failed = err != nil, err != nil
		}
		before = now
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if ctx.Err() != nil { // nobody would be told any more
			return
		}
	}
}
