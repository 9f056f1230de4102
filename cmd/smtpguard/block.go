package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) blockCommand() *cli.Command {
	return &cli.Command{
		Name: "block", Usage: "block an address or prefix by hand", ArgsUsage: "ADDRESS|PREFIX",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "for", Usage: "for `DURATION` (30m, 12h, 7d; default: as its next offence)"},
			&cli.StringFlag{Name: "reason", Usage: "note `TEXT` with the block"},
		},
		Action: e.block,
	}
}

func (e *env) block(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	r := guard.BlockRequest{Prefix: p, Reason: c.String("reason"), By: control.Operator(os.Getuid())}
	if s := c.String("for"); s != "" {
		if r.For, err = policy.ParseDuration(s); err != nil || r.For < time.Second {
			return &usageError{fmt.Sprintf("--for %s: want a duration such as 30m, 12h or 7d", s)}
		}
	}
	if me, ok := guard.SSHPeer(os.Getenv("SSH_CONNECTION")); ok && p.Contains(me) {
		return &guard.Refusal{Prefix: p, Why: fmt.Sprintf("your own SSH session comes from %s", me)}
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	b, err := g.Block(c.Context, r)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(b)
	}
	if b.Observed {
		fmt.Fprintf(e.stdout, "%s is noted until %s, but nothing is dropped: mode is observe\n", b.Prefix, clock(b.Until))
		return nil
	}
	fmt.Fprintf(e.stdout, "%s is blocked until %s; %s\n", b.Prefix, clock(b.Until), count(b.Ended, "connection was ended", "connections were ended"))
	return nil
}

func (e *env) unblockCommand() *cli.Command {
	return &cli.Command{
		Name: "unblock", Usage: "lift a block, and those inside it", ArgsUsage: "ADDRESS|PREFIX",
		Flags:  []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "lift every block"}},
		Action: e.unblock,
	}
}

func (e *env) unblock(c *cli.Context) error {
	var p netip.Prefix
	if c.Bool("all") {
		if c.Args().Present() {
			return &usageError{"name a prefix or --all, not both"}
		}
	} else {
		var err error
		if p, err = oneSource(c); err != nil {
			return err
		}
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	lifted, err := g.Unblock(c.Context, p, control.Operator(os.Getuid()))
	if err := e.lifted(c, lifted); err != nil {
		return err
	}
	if err != nil {
		return err
	}
	if len(lifted) == 0 {
		if p.IsValid() {
			return &answerNo{p.String() + " is not blocked"}
		}
		return &answerNo{"nothing is blocked"}
	}
	return nil
}

// lifted prints blocks that were lifted.
func (e *env) lifted(c *cli.Context, list []store.Block) error {
	for _, b := range list {
		if c.Bool("json") {
			if err := e.json(b); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(e.stdout, "%s is free again (it was blocked %s ago: %s)\n", b.Prefix, span(time.Since(b.Since)), b.Reason)
	}
	return nil
}

func (e *env) blocksCommand() *cli.Command {
	return &cli.Command{
		Name: "blocks", Usage: "what is blocked now",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "every block that is in force or observed", Action: e.blocksList},
			{Name: "show", Usage: "everything about the blocks of a source, now and earlier", ArgsUsage: "ADDRESS|PREFIX", Action: e.blocksShow},
		},
	}
}

func (e *env) blocksList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	list, err := g.Blocks(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		for _, b := range list {
			if err := e.json(b); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list) == 0 {
		fmt.Fprintln(e.stdout, "nothing is blocked")
		return nil
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PREFIX\tSTATE\tLEFT\tOFFENCE\tSTOPPED\tWHY")
	for _, b := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\n", b.Prefix, b.State, span(time.Until(b.Until)), b.Offence, b.Packets, why(b.Block))
	}
	return w.Flush()
}

// why is a block's reason in a few words.
func why(b store.Block) string {
	if v := b.Verdict; v != nil {
		return fmt.Sprintf("%s: %s in %s", v.Rule, score(v.Metric, v.Score), policy.FormatDuration(v.Window))
	}
	return b.By + ": " + b.Reason
}

func (e *env) blocksShow(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	list, err := g.History(c.Context, p)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return &answerNo{p.String() + " is not blocked, and was not lately"}
	}
	for i, b := range list {
		if c.Bool("json") {
			if err := e.json(b); err != nil {
				return err
			}
			continue
		}
		if i > 0 {
			fmt.Fprintln(e.stdout)
		}
		showBlock(e.stdout, b)
	}
	return nil
}

func showBlock(out io.Writer, b guard.BlockInfo) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	state := string(b.State)
	if b.Error != "" {
		state += ": " + b.Error
	}
	row(b.Prefix.String(), "%s", state)
	row("  why", "%s", b.Reason)
	row("  by", "%s", b.By)
	row("  since", "%s", clock(b.Since))
	if b.State == guard.IsLifted {
		row("  lifted", "%s by %s", clock(b.Lifted), b.LiftedBy)
	} else {
		row("  until", "%s (offence %d)", clock(b.Until), b.Offence)
	}
	if b.Ended > 0 {
		row("  connections ended", "%d", b.Ended)
	}
	if b.Relief > 0 {
		row("  relief", "%s after the verdict", b.Relief.Round(time.Millisecond))
	}
	if b.State == guard.InForce {
		row("  stopped so far", "%d packets, %d bytes", b.Packets, b.Bytes)
	}
	if v := b.Verdict; v != nil {
		row("  rule", "%s: %s in %s, threshold %s", v.Rule, score(v.Metric, v.Score), policy.FormatDuration(v.Window), score(v.Metric, v.Threshold))
		for i, ev := range v.Evidence {
			name := "  evidence"
			if i > 0 {
				name = ""
			}
			row(name, "%s opened%s%s", clock(ev.Time), portOf(ev.Source, ev.Port), countOf(ev.Count))
		}
	}
	w.Flush()
}

func portOf(a netip.Addr, port uint16) string {
	if port == 0 {
		return " " + a.String()
	}
	return " " + netip.AddrPortFrom(a, port).String()
}

func countOf(n int) string {
	if n == 0 {
		return ""
	}
	return " (slot " + strconv.Itoa(n) + ")"
}

func (e *env) allowCommand() *cli.Command {
	return &cli.Command{
		Name: "allow", Usage: "what must never be blocked",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "everything that is never blocked, and why", Action: e.allowList},
			{Name: "add", Usage: "never block a source, and lift blocks that overlap it", ArgsUsage: "ADDRESS|PREFIX", Action: e.allowAdd,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "note", Usage: "note `TEXT` with it"},
					&cli.StringFlag{Name: "for", Usage: "for `DURATION` only"},
				}},
			{Name: "remove", Usage: "take back what `allow add` did", ArgsUsage: "ADDRESS|PREFIX", Action: e.allowRemove},
		},
	}
}

func (e *env) allowList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	list, err := g.Allowed(c.Context)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	for _, a := range list {
		if c.Bool("json") {
			if err := e.json(a); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(w, "%s\t%s\n", a.Prefix, a.Why)
	}
	return w.Flush()
}

func (e *env) allowAdd(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	entry := store.AllowEntry{Prefix: p, Note: c.String("note"), By: control.Operator(os.Getuid()), Added: time.Now()}
	if s := c.String("for"); s != "" {
		d, err := policy.ParseDuration(s)
		if err != nil || d < time.Second {
			return &usageError{fmt.Sprintf("--for %s: want a duration such as 30m, 12h or 7d", s)}
		}
		entry.Until = time.Now().Add(d)
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	lifted, err := g.Allow(c.Context, entry)
	if err := errors.Join(e.lifted(c, lifted), err); err != nil {
		return err
	}
	if !c.Bool("json") {
		fmt.Fprintf(e.stdout, "%s is never blocked\n", p)
	}
	return nil
}

func (e *env) allowRemove(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	g, done, err := e.guard(c)
	if err != nil {
		return err
	}
	defer done()
	found, err := g.Disallow(c.Context, p)
	if err != nil {
		return err
	}
	if !found {
		return &answerNo{p.String() + " was not added by `smtpguard allow add`"}
	}
	if !c.Bool("json") {
		fmt.Fprintf(e.stdout, "%s may be blocked again\n", p)
	}
	return nil
}

// clock shows a time in the local zone, with the offset: logs and people
// elsewhere use other zones.
func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 -0700") }

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", n, many))
}
