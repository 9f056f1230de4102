package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
	"github.com/smtpguard/smtpguard/tail"
)

func (e *env) runCommand() *cli.Command {
	return &cli.Command{
		Name: "run", Usage: "the daemon: follow the log and keep the server reachable",
		Description: "Settings come from the policy; the flags override it, for trials and containers. SIGHUP reads the policy again.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "log", Usage: "follow `FILE`, a pattern, journald, or - for standard input (may be given more than once)"},
			&cli.StringFlag{Name: "mode", Usage: "`MODE` is observe or enforce"},
			&cli.StringFlag{Name: "backend", Usage: "packet filter `NAME`"},
			&cli.StringFlag{Name: "capacity", Usage: "the server has `N` slots (smtp_accept_max)"},
			&cli.StringFlag{Name: "commit", Usage: "lift every block again unless \"smtpguard commit\" is said within `DURATION` of the first enforce"},
			&cli.StringFlag{Name: "confirm", Usage: "`HOW` verdicts are confirmed: sockets, or off"},
		},
		Action: e.run,
	}
}

// runPolicy is the policy with the flags of run. Without a file it takes the
// shipped one only where the flags say observe.
func (e *env) runPolicy(c *cli.Context) (*policy.Policy, error) {
	p, err := e.policy(c)
	if err != nil {
		return nil, err
	}
	for flag, key := range map[string]string{"mode": "mode", "commit": "commit", "confirm": "confirm", "backend": "firewall.backend", "capacity": "capacity"} {
		if c.IsSet(flag) {
			if err := p.Set(key, c.String(flag)); err != nil {
				return nil, &usageError{fmt.Sprintf("--%s: %v", flag, err)}
			}
		}
	}
	if logs := c.StringSlice("log"); len(logs) > 0 {
		for i, l := range logs {
			if k := tail.KindOf(l); k == tail.Journal || k == tail.Input {
				continue
			}
			if logs[i], err = filepath.Abs(l); err != nil {
				return nil, err
			}
		}
		if err := p.Set("logs", logs...); err != nil {
			return nil, &usageError{fmt.Sprintf("--log: %v", err)}
		}
	}
	if e.shipped && c.String("mode") != string(policy.Observe) {
		return nil, withHint(fmt.Errorf("there is no %s, which says whom never to block", defaultPolicy),
			"`smtpguard policy init` writes the shipped one, --policy names another; `run --mode observe` needs none")
	}
	return p, nil
}

func (e *env) run(c *cli.Context) (err error) {
	if err := noArgs(c); err != nil {
		return err
	}
	p, err := e.runPolicy(c)
	if err != nil {
		return err
	}
	filed := !e.shipped
	e.taken = p
	log := e.logger()
	hup := make(chan os.Signal, 1) // early: unhandled, the signal would end us
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	// Nothing is changed before everything that can be refused was tried: the
	// logs that are named, the store (in use, damaged?), which is also the lock
	// between two daemons, then the socket, then the filter.
	for _, l := range p.Logs {
		if l == policy.Auto {
			continue // what Exim says, and the store remembers
		}
		if err := checkLog(l); err != nil {
			return err
		}
	}
	st, err := store.Open(p.Store.Path, store.Options{Wait: 2 * time.Second})
	if err != nil {
		return err
	}
	defer func() {
		if c.Context.Err() != nil && errors.Is(err, context.Canceled) {
			log.Info("smtpguard was stopped before it had started; blocks are as they were")
			err = nil
		}
		err = errors.Join(err, st.Close())
	}()
	tellRestored(st, log)
	mta, mtaSince, mtaErr := askExim(c.Context, st, log)
	ask := asker{store: st, log: log, now: make(chan struct{}, 1), n: mta.AcceptMax, knows: mtaErr == nil && mtaSince.IsZero()}
	askable := !errors.Is(mtaErr, exim.ErrNoExim)
	logs, err := findLogs(p, mta, mtaErr)
	if err != nil {
		return err
	}
	_, twice := onceEach(p.Logs)
	for l, by := range twice {
		log.Warn("a log is named twice; it is followed once", "log", l, "as", by, "hint", "take it out of logs: in the policy")
	}
	if mtaErr == nil && !slices.ContainsFunc(logs, func(l string) bool { return isLogOf(l, mta) }) {
		log.Info("this machine's Exim writes another log than the one that is followed; its configuration is left aside", "writes", mta.LogFilePath)
		mtaErr, askable = errors.New("of another log"), false
	}

	l, err := control.Listen(p.Control.Socket, p.Control.Group)
	if err != nil {
		return err
	}
	defer l.Close()
	var why string
	var enforce atomic.Bool
	enforce.Store(p.Mode == policy.Enforce)
	ready := make(chan struct{})
	o := guard.Options{
		Policy: p, Store: st, Log: log, Version: programVersion(), Listed: csfListed(),
		OpenFirewall: openFirewall(p, &enforce, st, func(w string) { why = w }, nil),
		Notify: func(state string) {
			_, _ = daemon.SdNotify(false, state)
			if state == daemon.SdNotifyReady {
				close(ready)
			}
		},
	}
	watch, err := newWatch(p, st, log)
	if err != nil {
		return err
	}
	watch.attach(&o)
	o.AskCapacity = ask.soon
	if o.Teller, err = csfTeller(p, nil); err != nil {
		return err
	}
	switch {
	case p.Capacity > 0:
		o.Capacity, o.CapacityFrom = p.Capacity, "the policy"
	case mtaErr == nil && mta.AcceptMax > 0:
		o.Capacity, o.CapacityFrom = mta.AcceptMax, capacityFrom(mtaSince)
	}
	if p.Confirm == policy.ConfirmSockets {
		t, err := sockets.Open(sockets.Options{})
		if err != nil {
			return withHint(fmt.Errorf("opening the kernel's socket table: %w", err), "`confirm: off` works without it, and then believes the log alone")
		}
		defer t.Close()
		o.Sockets = t
	}
	zone := p.Location()
	if zone == nil {
		zone = zoneOf(mta, mtaErr)
	}
	for _, path := range logs {
		o.Logs = append(o.Logs, guard.Log{Path: path, Parser: exim.New(zone), Fork: func() guard.Parser { return exim.New(zone) },
			Identifiers: eximIdentifiers, Input: e.stdin})
	}
	g, err := guard.New(c.Context, o)
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), stopFor)
		defer cancel()
		closeErr := g.Close(ctx, p.Firewall.OnStop == policy.Remove && enforce.Load())
		var left *firewall.RemainError
		if errors.As(closeErr, &left) {
			closeErr = withHint(fmt.Errorf("on_stop: remove was not done within %s: %w", stopFor, closeErr), "`smtpguard firewall flush` goes on until nothing is left; so does the next start, with what is not blocked by then")
		}
		err = errors.Join(err, closeErr)
	}()
	log.Info("smtpguard starts", "version", programVersion(), "mode", string(p.Mode), "backend", g.Backend(), "because", why,
		"logs", logs, "capacity", o.Capacity, "capacity_from", o.CapacityFrom, "zone", zone.String())
	if p.Mode != policy.Enforce {
		log.Warn("mode is observe: everything is decided and recorded, nothing is blocked")
	}
	if mtaErr == nil && !mta.SmtpConnection {
		what := "Exim's log_selector lacks smtp_connection: the socket table alone shows who holds slots"
		if o.Sockets == nil {
			what = "Exim's log_selector lacks smtp_connection and confirm is off: nothing shows who holds slots"
		}
		log.Warn(what, "hint", "add +smtp_connection +incoming_port to log_selector")
	}

	ctx, cancel := context.WithCancel(c.Context)
	defer cancel()
	var asking sync.WaitGroup
	if ask.guard, ask.logs = g, logs; askable {
		asking.Go(func() { ask.run(ctx) })
	}
	served := make(chan error, 1)
	var with []func(*http.ServeMux)
	stopDesk := func() {}
	var desk *abuse.Desk
	if p.Reports.Mode != policy.ReportsOff {
		if desk, err = openDesk(p, st, allowedNow(ctx, g), logs, zone, log); err != nil { // protecting the server does not wait for telling others
			log.Error("there will be no abuse reports", "err", err)
			with = append(with, control.WithoutReports(err))
		} else {
			with = append(with, control.WithReports(control.Desk(desk)))
			stopDesk = startDesk(ctx, g, desk, log, ready)
		}
	}
	stopWatch := watch.start(ctx, g, desk)
	go func() { served <- control.Serve(ctx, l, g, log, with...); cancel() }()
	go func() {
		select {
		case <-ctx.Done():
			return
		case <-ready:
		}
		const soon, late = 5 * time.Second, 5 * time.Minute
		pause, again := soon, time.NewTimer(0)
		defer again.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-again.C:
				if !leaveOldBackends(ctx, p, st, g.Backend(), log) {
					again.Reset(pause)
					pause = min(2*pause, late)
				}
			case <-hup:
				filed = e.reload(ctx, c, g, &enforce, filed, log) || filed
				ask.soon()
			}
		}
	}()
	err = g.Run(ctx)
	cancel()
	asking.Wait()
	stopDesk()
	stopWatch()
	log.Info("smtpguard stops", "blocks_in_the_packet_filter", string(p.Firewall.OnStop))
	return errors.Join(err, <-served)
}

// stopFor is how long a stop takes to let go of the packet filter at most:
// whoever stops us (Docker) may kill us soon after.
const stopFor = 10 * time.Second

// reload reads the policy again. A policy with faults changes nothing, nor
// does one that is gone, or whose allowlist is; filed: there was a file before. It reports whether
// the policy that was taken is of a file.
func (e *env) reload(ctx context.Context, c *cli.Context, g *guard.Guard, enforce *atomic.Bool, filed bool, log *slog.Logger) bool {
	p, err := e.runPolicy(c)
	if err == nil && e.shipped && filed {
		err = fmt.Errorf("%s is gone", defaultPolicy)
	}
	if n := entries(e.taken); err == nil && n > 0 && entries(p) == 0 {
		err = withHint(fmt.Errorf("nobody is on its allowlist any more, and %s before", count(n, "entry was", "entries were")),
			"was the file cut off? If it is meant: `systemctl restart smtpguard`")
	}
	if err != nil {
		log.Error("the policy was not taken, the one before stays", "err", err)
		return false
	}
	before := enforce.Swap(p.Mode == policy.Enforce)
	done, err := g.Reload(ctx, p)
	switch {
	case err != nil:
		enforce.Store(before)
		log.Error("the policy was not taken, the one before stays", "err", err)
		return false
	case done.Undone != nil:
		log.Error("the policy was taken, but not all that it says is so yet", "mode", string(done.Mode), "err", done.Undone)
	default:
		log.Info("the policy is read again", "needs_restart", done.Restart)
	}
	if done.Anew {
		log.Info("the rules count from now on: of what sources did before, only the slots that they hold count, and who is known good")
	}
	enforce.Store(done.Mode == policy.Enforce)
	e.taken = p
	return !e.shipped
}

// entries is how many entries a policy's allowlist has.
func entries(p *policy.Policy) int {
	if p == nil {
		return 0
	}
	return len(p.Allow) + len(p.AllowNames) + len(p.AllowFiles)
}

// logger writes to the terminal or the journal, which has its own times.
func (e *env) logger() *slog.Logger {
	if inJournal(e.stderr) {
		return slog.New(newJournalHandler(e.stderr))
	}
	o := &slog.HandlerOptions{}
	if os.Getenv("JOURNAL_STREAM") != "" {
		o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		}
	}
	return slog.New(slog.NewTextHandler(e.stderr, o))
}

// zoneOf is the zone of timestamps that state none: Exim's own setting, else
// this machine's.
func zoneOf(mta exim.Config, err error) *time.Location {
	if err == nil {
		if loc, err := mta.Location(); err == nil {
			return loc
		}
	}
	return time.Local
}
