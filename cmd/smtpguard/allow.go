package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) allowCommand() *cli.Command {
	return &cli.Command{
		Name: "allow", Usage: "what must never be blocked",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "everything that is never blocked, and why", Action: e.allowList},
			{Name: "add", Usage: "never block a source, and free it where it is blocked", ArgsUsage: "ADDRESS|PREFIX|dns:NAME|spf:DOMAIN", Action: e.allowAdd,
				Description: "dns:NAME is what a host resolves to, spf:DOMAIN the networks that a domain says its mail comes from. The daemon looks names up now and every ten minutes.",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "note", Usage: "note `TEXT` with it"},
					&cli.StringFlag{Name: "for", Usage: "for `DURATION` only"},
					&cli.BoolFlag{Name: "force", Usage: fmt.Sprintf("also a network wider than /%d (IPv6: /%d)", widestAllowed4, widestAllowed6)},
				}},
			{Name: "remove", Usage: "take back what `allow add` did", ArgsUsage: "ADDRESS|PREFIX|dns:NAME|spf:DOMAIN", Action: e.allowRemove},
		},
	}
}

// allowed reads the only argument of an allow command: a prefix or a name.
func allowed(c *cli.Context) (p netip.Prefix, name allow.Name, err error) {
	if c.NArg() == 1 && allow.IsName(c.Args().First()) {
		if name, err = allow.Parse(c.Args().First()); err != nil {
			err = &usageError{err.Error()}
		}
		return p, name, err
	}
	p, err = oneSource(c)
	return p, "", err
}

func (e *env) allowList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
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
		if a.Named == nil {
			fmt.Fprintf(w, "%s\t%s\n", a.Prefix, a.Why)
		}
	}
	if err := w.Flush(); err != nil || c.Bool("json") {
		return err
	}
	for _, a := range list {
		if a.Named != nil {
			showName(e.stdout, a.Named, time.Now())
		}
	}
	return nil
}

// showName prints a name of the allowlist: how well it is known, and what it
// stands for.
func showName(out io.Writer, n *guard.AllowName, now time.Time) {
	state := "never looked up"
	switch {
	case !n.Answered.IsZero():
		state = "as answered " + span(now.Sub(n.Answered)) + " ago"
	case !n.Checked.IsZero():
		state = "no whole answer yet"
	}
	fmt.Fprintf(out, "%s  %s, %s; %s\n", n.Name, count(len(n.Prefixes), "prefix", "prefixes"), state, n.Why)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, k := range n.Prefixes {
		if k.Left.IsZero() {
			fmt.Fprintf(w, "  %s\n", k.Prefix)
		} else {
			fmt.Fprintf(w, "  %s\tleft the answer %s ago, stays allowed for %s\n", k.Prefix, span(now.Sub(k.Left)), span(allow.Grace-now.Sub(k.Left)))
		}
	}
	w.Flush()
	if n.Error != "" {
		fmt.Fprintf(out, "  error: %s\n", oneLine(n.Error))
	}
	for _, note := range n.Notes {
		fmt.Fprintf(out, "  note: %s\n", note)
	}
}

func (e *env) allowAdd(c *cli.Context) error {
	p, name, err := allowed(c)
	if err != nil {
		return err
	}
	if name == "" && !c.Bool("force") && tooWideToAllow(p) {
		return withHint(fmt.Errorf("%s is a large part of the Internet: what is in it would never be blocked, floods included", p),
			"name narrower prefixes, or say --force")
	}
	if err := control.Printable(c.String("note")); err != nil {
		return &usageError{"--note: " + err.Error()}
	}
	entry := store.AllowEntry{Prefix: p, Name: string(name), Note: c.String("note"), By: control.Operator(os.Getuid()), Added: time.Now()}
	if s := c.String("for"); s != "" {
		d, err := duration(s)
		if err != nil {
			return err
		}
		entry.Until = time.Now().Add(d)
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	lifted, err := g.Allow(c.Context, entry)
	if err := errors.Join(e.lifted(c, lifted), err); err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(map[string]any{"allowed": entry})
	}
	if name == "" {
		fmt.Fprintf(e.stdout, "%s is never blocked\n", p)
		return nil
	}
	if _, daemon := g.(*control.Client); !daemon {
		fmt.Fprintf(e.stdout, "%s is on the allowlist; the daemon looks it up when it runs\n", name)
		return nil
	}
	n, err := lookedUp(c.Context, g, name)
	switch {
	case err != nil:
		return err
	case n == nil || n.Checked.IsZero():
		fmt.Fprintf(e.stdout, "%s is on the allowlist, and is still being looked up: `smtpguard allow list` shows what came of it\n", name)
	default:
		showName(e.stdout, n, time.Now())
	}
	return nil
}

// Wider networks than these are nobody's own: a /8 is the widest that is used
// privately (RFC 1918), an IPv6 /16 what a name may stand for,
// too.
const widestAllowed4, widestAllowed6 = 8, 16

func tooWideToAllow(p netip.Prefix) bool {
	if p.Addr().Is4() {
		return p.Bits() < widestAllowed4
	}
	return p.Bits() < widestAllowed6 && p != netip.MustParsePrefix("fc00::/7") // unique local, RFC 4193
}

// lookedUp waits a little for what the daemon finds out about a name.
func lookedUp(ctx context.Context, g control.Guard, name allow.Name) (found *guard.AllowName, err error) {
	for range 25 {
		list, err := g.Allowed(ctx)
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			if a.Named != nil && a.Named.Name == name {
				found = a.Named
			}
		}
		if found == nil || !found.Checked.IsZero() {
			break
		}
		select {
		case <-ctx.Done():
			return found, ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
	return found, nil
}

func (e *env) allowRemove(c *cli.Context) error {
	p, name, err := allowed(c)
	if err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	what, found := p.String(), false
	if name != "" {
		what = string(name)
		found, err = g.DisallowName(c.Context, what)
	} else {
		found, err = g.Disallow(c.Context, p)
	}
	if err != nil {
		return err
	}
	if !found {
		return &answerNo{what + " was not added by `smtpguard allow add`"}
	}
	if c.Bool("json") {
		return e.json(map[string]any{"removed": what})
	}
	fmt.Fprintf(e.stdout, "%s may be blocked again\n", what)
	return nil
}
