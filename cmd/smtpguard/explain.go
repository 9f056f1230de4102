package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) explainCommand() *cli.Command {
	return &cli.Command{
		Name: "explain", Usage: "why a source is blocked, or why not", ArgsUsage: "ADDRESS|PREFIX",
		Description: "Now, by the daemon; or with --log and --at, at a time in the past, by the log alone.",
		Flags: []cli.Flag{
			&cli.StringSliceFlag{Name: "log", Usage: "look into `FILE` instead (may be given more than once)"},
			&cli.StringFlag{Name: "at", Usage: "at `TIME` in the log (default: its end)"},
			&cli.IntFlag{Name: "capacity", Usage: "with --log: the server had `N` slots", DefaultText: "as the policy or the log says"},
		},
		Action: e.explain,
	}
}

func (e *env) explain(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	if c.IsSet("log") {
		return e.explainLog(c, p)
	}
	if c.IsSet("at") || c.IsSet("capacity") {
		return &usageError{"--at and --capacity go with --log"}
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	x, err := g.Explain(c.Context, p)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(x)
	}
	showExplanation(e.stdout, x)
	return nil
}

// showExplanation prints what the daemon says of a source.
func showExplanation(out io.Writer, x guard.Explanation) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	switch b := x.Blocked; {
	case b != nil:
		with := ""
		if b.Prefix != x.Prefix {
			with = " with " + b.Prefix.String()
		}
		row(x.Prefix.String(), "%s%s until %s", b.State, with, clock(b.Until))
		row("  why", "%s", b.Reason)
		if b.Error != "" {
			row("  not applied", "%s", b.Error)
		}
	case x.Waiting:
		row(x.Prefix.String(), "a verdict waits for the socket table to confirm it")
	default:
		row(x.Prefix.String(), "not blocked")
	}
	if x.Allowed != nil {
		row("  allowed", "%s is never blocked: %s", x.Allowed.Prefix, x.Allowed.Why)
	}
	w.Flush()
	if x.Stopped != nil {
		fmt.Fprintf(out, "  no rule blocks anybody until %s: %s; `smtpguard resume` ends that\n", clock(x.Stopped.Until), x.Stopped.Why)
	}
	showScores(out, x.Now)
	if x.Held >= 0 {
		fmt.Fprintf(out, "  the kernel's socket table shows %s\n", count(x.Held, "connection that holds a slot", "connections that hold slots"))
	}
	for _, b := range x.Inside {
		fmt.Fprintf(out, "  overlaps: %s, %s until %s: %s\n", b.Prefix, b.State, clock(b.Until), b.Reason)
	}
	for _, b := range x.History {
		end := b.Until
		if !b.Lifted.IsZero() {
			end = b.Lifted
		}
		fmt.Fprintf(out, "  earlier: %s to %s %s, %s, offence %d: %s\n", clock(b.Since), clock(end), b.Prefix, past(b), b.Offence, b.Reason)
	}
	for _, d := range x.Recent {
		fmt.Fprintf(out, "  decision: %s %s %s: %s\n", clock(d.Time), d.Prefix, d.What, d.Why)
	}
}

// showScores prints what the detector knows of a source.
func showScores(out io.Writer, n detector.Explanation) {
	if n.Known {
		fmt.Fprintf(out, "  holds %d slots by the log; opened %d connections, refused %d, messages accepted %d, since %s\n",
			n.Held, n.Opens, n.Refused, n.Accepted, clock(n.First))
	}
	if n.KnownGoodCount > 0 {
		fmt.Fprintf(out, "  known good: %s inside, the latest %s (last message %s)\n",
			count(n.KnownGoodCount, "sender", "senders"), n.KnownGood[0].Addr, clock(n.KnownGood[0].Last))
	}
	for _, r := range n.Rules {
		fmt.Fprintf(out, "  rule %s on %s: %s\n", r.Rule, r.Source, r.Need)
	}
}

// explainLog replays logs up to a time and explains the source as it stood
// then. Blocks that the policy would have made took effect, as in replay.
func (e *env) explainLog(c *cli.Context, p netip.Prefix) error {
	var until time.Time
	if at := c.String("at"); at != "" {
		var err error
		if until, err = parseTime(at); err != nil {
			return &usageError{"--at " + err.Error()}
		}
	}
	r, files, parser, err := e.openReplay(c, c.StringSlice("log"))
	defer closeLogs(files)
	if err != nil {
		return err
	}
	var blocked []store.Block
	r.OnBlock = func(b store.Block) {
		if b.Prefix.Overlaps(p) {
			blocked = append(blocked, b)
		}
	}
	errEnough := errors.New("the time is reached")
	var d dates
	for _, f := range files {
		ctx, cancel := context.WithCancelCause(c.Context)
		err := readLog(ctx, f, parser, &d, func(b *block) {
			for i := range b.events {
				if !until.IsZero() && b.events[i].Time.After(until) {
					cancel(errEnough)
					return
				}
				r.Observe(&b.events[i])
			}
		})
		enough := context.Cause(ctx) == errEnough
		cancel(nil)
		if enough {
			break
		}
		if err != nil {
			return fmt.Errorf("reading %s: %w", f.name, err)
		}
	}
	x := r.Detector.Explain(p)
	if c.Bool("json") {
		return e.json(map[string]any{"prefix": p, "now": x, "blocks": blocked})
	}
	fmt.Fprintf(e.stdout, "%s at %s, by the log: %d of %d slots taken\n", p, clock(x.Time), x.Count, x.Capacity)
	for _, b := range blocked {
		fmt.Fprintf(e.stdout, "  would be blocked from %s until %s: %s\n", clock(b.Since), clock(b.Until), b.Reason)
	}
	showScores(e.stdout, x)
	return nil
}
