package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/urfave/cli/v2"
)

func (e *env) explainCommand() *cli.Command {
	return &cli.Command{Name: "explain", Usage: "why a source is blocked, or why not", ArgsUsage: "ADDRESS|PREFIX", Action: e.explain}
}

func (e *env) explain(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	x, err := g.Explain(c.Context, p)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(x)
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	switch {
	case x.Blocked != nil && x.Blocked.Prefix == x.Prefix:
		row(x.Prefix.String(), "%s until %s", x.Blocked.State, clock(x.Blocked.Until))
		row("  why", "%s", x.Blocked.Reason)
	case x.Blocked != nil:
		row(x.Prefix.String(), "%s with %s until %s", x.Blocked.State, x.Blocked.Prefix, clock(x.Blocked.Until))
		row("  why", "%s", x.Blocked.Reason)
	case x.Waiting:
		row(x.Prefix.String(), "a verdict waits for the socket table to confirm it")
	default:
		row(x.Prefix.String(), "not blocked")
	}
	if x.Allowed != nil {
		row("  allowed", "%s is never blocked: %s", x.Allowed.Prefix, x.Allowed.Why)
	}
	w.Flush()
	n := x.Now
	if n.Known {
		fmt.Fprintf(e.stdout, "  holds %d slots by the log; opened %d connections, refused %d, messages accepted %d, since %s\n",
			n.Held, n.Opens, n.Refused, n.Accepted, clock(n.First))
	}
	if n.KnownGoodCount > 0 {
		fmt.Fprintf(e.stdout, "  known good: %s inside, the latest %s (last message %s)\n",
			count(n.KnownGoodCount, "sender", "senders"), n.KnownGood[0].Addr, clock(n.KnownGood[0].Last))
	}
	for _, r := range n.Rules {
		fmt.Fprintf(e.stdout, "  rule %s on %s: %s\n", r.Rule, r.Source, r.Need)
	}
	if x.Held >= 0 {
		fmt.Fprintf(e.stdout, "  the kernel's socket table shows %s\n", count(x.Held, "connection that holds a slot", "connections that hold slots"))
	}
	for _, b := range x.Inside {
		fmt.Fprintf(e.stdout, "  overlaps: %s, %s until %s: %s\n", b.Prefix, b.State, clock(b.Until), b.Reason)
	}
	for _, b := range x.History {
		fmt.Fprintf(e.stdout, "  earlier: %s %s, %s, offence %d: %s\n", clock(b.Since), b.Prefix, b.State, b.Offence, b.Reason)
	}
	for _, d := range x.Recent {
		fmt.Fprintf(e.stdout, "  decision: %s %s %s: %s\n", clock(d.Time), d.Prefix, d.What, d.Why)
	}
	return nil
}
