package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) blockCommand() *cli.Command {
	return &cli.Command{
		Name: "block", Usage: "block sources by hand", ArgsUsage: "ADDRESS|PREFIX|FROM-TO...",
		Description: "A range FROM-TO becomes the prefixes that cover it. A file has one source a line (# begins a comment), or is what `smtpguard blocks export` wrote.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "for", Usage: "for `DURATION` (30m, 12h, 7d; default: as its next offence)"},
			&cli.StringFlag{Name: "until", Usage: "until `TIME` (2026-11-23T08:00:00+01:00, or \"2026-11-23 08:00\" in local time)"},
			&cli.StringFlag{Name: "reason", Usage: "note `TEXT` with the block"},
			&cli.StringFlag{Name: "file", Usage: "read sources from `FILE`, - for standard input"},
			&cli.BoolFlag{Name: "dry-run", Usage: "say what would be done, and do nothing"},
		},
		Action: e.block,
	}
}

func (e *env) block(c *cli.Context) error {
	base := guard.BlockRequest{Reason: c.String("reason"), By: control.Operator(os.Getuid())}
	err := control.Printable(base.Reason)
	if err != nil {
		return &usageError{"--reason: " + err.Error()}
	}
	if s := c.String("for"); s != "" {
		if base.For, err = duration(s); err != nil {
			return err
		}
	}
	if s := c.String("until"); s != "" {
		if base.For != 0 {
			return &usageError{"--for or --until, not both"}
		}
		if base.Until, err = parseTime(s); err != nil {
			return &usageError{"--until " + err.Error()}
		}
	}
	reqs, err := e.named(c, base)
	if err != nil {
		return err
	}
	if me, ok := guard.SSHPeer(os.Getenv("SSH_CONNECTION")); ok {
		for _, r := range reqs {
			if r.Prefix.Contains(me) {
				return &guard.Refusal{Prefix: r.Prefix, Why: fmt.Sprintf("your own SSH session comes from %s", me)}
			}
		}
	}
	if err := e.soundPolicy(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	out, err := g.Block(c.Context, reqs, c.Bool("dry-run"))
	return errors.Join(e.showOutcomes(c, out), err)
}

// named reads the sources that a command names, as arguments and in --file:
// each is base with its prefix.
func (e *env) named(c *cli.Context, base guard.BlockRequest) ([]guard.BlockRequest, error) {
	var reqs []guard.BlockRequest
	for _, a := range c.Args().Slice() {
		if a == "-" {
			return nil, &usageError{"a list on standard input is read with --file -"}
		}
		prefixes, err := sources(a)
		if err != nil {
			return nil, err
		}
		for _, p := range prefixes {
			r := base
			r.Prefix = p
			reqs = append(reqs, r)
		}
	}
	if name := c.String("file"); name != "" {
		more, err := e.readSources(name, base)
		if err != nil {
			return nil, err
		}
		reqs = append(reqs, more...)
	}
	if len(reqs) == 0 {
		return nil, &usageError{fmt.Sprintf("no source is named: it takes addresses, prefixes or ranges, or --file; usage: %s %s", c.Command.HelpName, c.Command.ArgsUsage)}
	}
	return reqs, nil
}

// showOutcomes prints what became of a block command; what was refused or
// failed makes it an error.
func (e *env) showOutcomes(c *cli.Context, out []guard.BlockOutcome) error {
	var first error
	bad, noted, notedHint := 0, 0, ""
	for _, o := range out {
		var err error
		switch {
		case o.Refused != "":
			err = &guard.Refusal{Prefix: o.Prefix, Why: o.Refused, Hint: o.Hint}
		case o.Error != "":
			err = fmt.Errorf("%s: %s", o.Prefix, o.Error)
		}
		if err != nil {
			if bad++; first == nil {
				first = err
			}
		}
		b := o.Block
		if c.Bool("json") {
			if err := e.json(o); err != nil {
				return err
			}
			if b != nil && b.Observed && !c.Bool("dry-run") {
				noted++
			}
			continue
		}
		switch {
		case err != nil && len(out) > 1:
			fmt.Fprintln(e.stderr, err)
		case err != nil:
		case c.Bool("dry-run"):
			fmt.Fprintf(e.stdout, "%s would be blocked until %s%s%s\n", b.Prefix, clock(b.Until), part(*b), onTrial(o))
		case b.Observed:
			fmt.Fprintf(e.stdout, "%s is noted until %s%s, but nothing is dropped: mode is observe\n", b.Prefix, clock(b.Until), part(*b))
			if noted++; notedHint == "" {
				notedHint = cmp.Or(o.Hint, fmt.Sprintf("set mode: enforce in %s, then `systemctl reload smtpguard`: what is noted is in force then", cmp.Or(c.String("policy"), defaultPolicy)))
			}
		default:
			fmt.Fprintf(e.stdout, "%s is blocked until %s%s; %s%s\n", b.Prefix, clock(b.Until), part(*b), count(b.Ended, "connection was ended", "connections were ended"), onTrial(o))
		}
		if err == nil && o.Note != "" {
			fmt.Fprintln(e.stderr, "note:", clean(o.Note))
		}
	}
	if bad > 0 && len(out) > 1 {
		return withHint(fmt.Errorf("%d of %d were not blocked; the first: %w", bad, len(out), first), hint(first))
	}
	if first == nil && noted > 0 {
		return withHint(fmt.Errorf("%s: nothing is blocked while mode is observe", count(noted, "source is only noted", "sources are only noted")), notedHint)
	}
	return first
}

// onTrial says that a trial lifts a new block before its own end.
func onTrial(o guard.BlockOutcome) string {
	if o.Ends.IsZero() {
		return ""
	}
	return "; on trial, it is lifted at " + clock(o.Ends) + " already, unless you say `smtpguard commit`"
}

// readSources reads a file of sources: one address, prefix or range a line,
// or the JSON lines of blocks export, whose ends and reasons are kept.
func (e *env) readSources(name string, base guard.BlockRequest) ([]guard.BlockRequest, error) {
	in := e.stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	} else {
		name = "standard input"
	}
	var reqs []guard.BlockRequest
	sc := bufio.NewScanner(io.LimitReader(in, maxSourceFile))
	for n := 1; sc.Scan(); n++ {
		fail := func(err error) error { return fmt.Errorf("%s:%d: %v", name, n, err) } // not a wrong call
		line := strings.TrimSpace(sc.Text())
		r := base
		if strings.HasPrefix(line, "{") {
			var b store.Block
			if err := json.Unmarshal([]byte(line), &b); err != nil {
				return nil, fail(err)
			}
			if !b.Prefix.IsValid() || b.Prefix != policy.Canonical(b.Prefix) {
				return nil, fail(errors.New("no prefix in it"))
			}
			r.Prefix = b.Prefix
			if base.For == 0 && base.Until.IsZero() {
				r.Until = b.Until
			}
			if r.Reason == "" {
				r.Reason = b.Reason
			}
			if err := control.Printable(r.Reason); err != nil {
				return nil, fail(err)
			}
			reqs = append(reqs, r)
			continue
		}
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		prefixes, err := sources(line)
		if err != nil {
			return nil, fail(err)
		}
		for _, p := range prefixes {
			r.Prefix = p
			reqs = append(reqs, r)
		}
		if len(reqs) > maxSources {
			return nil, fail(fmt.Errorf("more than %d sources", maxSources))
		}
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("reading %s: %w", name, err)
	}
	return reqs, nil
}

// duration reads how long --for says.
func duration(s string) (time.Duration, error) {
	d, err := policy.ParseDuration(s)
	var fault policy.Error
	switch {
	case errors.As(err, &fault) && strings.Contains(fault.Hint, "longest"):
		return 0, &usageError{fmt.Sprintf("--for %s is too long: %s", s, fault.Hint)}
	case err != nil || d < time.Second:
		return 0, &usageError{fmt.Sprintf("--for %s: want a duration such as 30m, 12h or 7d", s)}
	}
	return d, nil
}

// Bounds of what a block command reads.
const (
	maxSourceFile = 256 << 20
	maxSources    = 1_000_000
)

// parseTime reads a time as people write it.
func parseTime(s string) (time.Time, error) {
	if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	for _, layout := range []string{time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q: want a time such as 2026-11-23T08:00:00+01:00 or \"2026-11-23 08:00\"", s)
}

func (e *env) unblockCommand() *cli.Command {
	return &cli.Command{
		Name: "unblock", Usage: "lift blocks, and those inside them", ArgsUsage: "ADDRESS|PREFIX|FROM-TO...",
		Description: "A range FROM-TO becomes the prefixes that cover it. A file has one source a line (# begins a comment), or is what `smtpguard blocks export` wrote.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "all", Usage: "lift every block"},
			&cli.StringFlag{Name: "file", Usage: "read sources from `FILE`, - for standard input"},
		},
		Action: e.unblock,
	}
}

func (e *env) unblock(c *cli.Context) error {
	var list []netip.Prefix
	switch {
	case c.Bool("all") && (c.Args().Present() || c.IsSet("file")):
		return &usageError{"name sources or --all, not both"}
	case c.Bool("all"):
		list = []netip.Prefix{{}}
	default:
		reqs, err := e.named(c, guard.BlockRequest{})
		if err != nil {
			return err
		}
		for _, r := range reqs {
			list = append(list, r.Prefix)
		}
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	some := false
	var errs []error
	for _, p := range list {
		lifted, err := g.Unblock(c.Context, p, control.Operator(os.Getuid()))
		some = some || len(lifted) > 0
		if err := e.lifted(c, lifted); err != nil {
			return err
		}
		var covered *guard.CoveredError
		switch {
		case errors.As(err, &covered):
			errs = append(errs, err) // the others may be lifted all the same
		case err != nil:
			return errors.Join(append(errs, err)...)
		case len(lifted) == 0 && len(list) > 1:
			fmt.Fprintln(e.stderr, p, "is not blocked")
		}
	}
	switch {
	case len(errs) > 0:
		return errors.Join(errs...)
	case some:
		return nil
	case c.Bool("all"):
		return &answerNo{"nothing is blocked"}
	case len(list) == 1:
		return &answerNo{list[0].String() + " is not blocked"}
	}
	return &answerNo{"none of them is blocked"}
}

// lifted prints blocks that were lifted, and where those of an allowed source
// go on without it, in how many parts.
func (e *env) lifted(c *cli.Context, list []store.Block) error {
	for _, b := range list {
		if c.Bool("json") {
			if err := e.json(b); err != nil {
				return err
			}
			continue
		}
		if b.Lifted.IsZero() && slices.ContainsFunc(list, func(o store.Block) bool { return !o.Lifted.IsZero() && o.Prefix.Overlaps(b.Prefix) }) {
			continue // a part, told with its whole
		}
		if n := partsOf(b, list); n > 0 {
			fmt.Fprintf(e.stdout, "the block of %s is lifted there only: the rest stays until %s, in %s (`smtpguard unblock %s` lifts it as well)\n",
				b.Prefix, clock(b.Until), count(n, "part", "parts"), b.Whole())
			continue
		}
		seen := ""
		if b.Observed {
			seen = ", which was only observed"
		}
		fmt.Fprintf(e.stdout, "the block of %s is lifted%s (made %s ago: %s)\n", b.Prefix, seen, span(time.Since(b.Since)), clean(b.Reason))
	}
	return nil
}

// partsOf is how many blocks of list go on in the place of b, which was lifted.
func partsOf(b store.Block, list []store.Block) (n int) {
	for _, p := range list {
		if !b.Lifted.IsZero() && p.Lifted.IsZero() && p.Prefix.Overlaps(b.Prefix) {
			n++
		}
	}
	return n
}

func (e *env) blocksCommand() *cli.Command {
	return &cli.Command{
		Name: "blocks", Usage: "what is blocked now",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "every block that is in force or observed", Action: e.blocksList},
			{Name: "export", Usage: "every block in force, to be read by `smtpguard block --file`", Action: e.blocksExport,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "plain", Usage: "prefixes only, one a line"}}},
			{Name: "show", Usage: "everything about the blocks of a source, now and earlier", ArgsUsage: "ADDRESS|PREFIX", Action: e.blocksShow},
		},
	}
}

func (e *env) blocksList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	list, err := g.Blocks(c.Context)
	if err != nil {
		return err
	}
	out := bufio.NewWriter(e.stdout) // a line is several writes, and there may be 100,000
	if c.Bool("json") {
		line := &env{stdout: out}
		for _, b := range list {
			if err := line.json(b); err != nil {
				return err
			}
		}
		return out.Flush()
	}
	if len(list) == 0 {
		fmt.Fprintln(e.stdout, "nothing is blocked")
		return nil
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "PREFIX\tSTATE\tLEFT\tOFFENCE\tSTOPPED\tWHY")
	var trial time.Time
	for _, b := range list {
		left := b.Until
		if !b.Ends.IsZero() {
			left, trial = b.Ends, b.Ends
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\n", b.Prefix, b.State, span(time.Until(left)), b.Offence, b.Packets, why(b.Block))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if !trial.IsZero() {
		fmt.Fprintf(out, "on trial: without `smtpguard commit` every block is lifted at %s\n", clock(trial))
	}
	for _, b := range list {
		if b.State == guard.NotApplied {
			fmt.Fprintf(out, "%s is written down, but nothing is dropped: %s\n", b.Prefix, b.Error)
			break // the others for the same reason, most likely: `blocks show` tells
		}
	}
	return out.Flush()
}

// blocksExport writes JSON lines, or plain prefixes.
func (e *env) blocksExport(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	list, err := g.Blocks(c.Context)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(e.stdout)
	line := &env{stdout: w}
	for _, b := range list {
		if b.Observed {
			continue
		}
		if c.Bool("plain") {
			fmt.Fprintln(w, b.Prefix)
			continue
		}
		if err := line.json(b.Block); err != nil {
			return err
		}
	}
	return w.Flush()
}

// why is a block's reason in a few words.
func why(b store.Block) string {
	if v := b.Verdict; v != nil {
		return v.Rule + ": " + scored(v) + part(b)
	}
	return b.By + ": " + b.Reason + part(b)
}

// scored is what a verdict counted, as its metric is spoken of. A share of the
// slots is an average over the window, so that it is lower than what is held;
// and the limit is not the rule's for all, see docs/why.md.
func scored(v *detector.Verdict) string {
	if v.Metric == detector.Opens {
		return fmt.Sprintf("%.0f connections in %s", v.Score, policy.FormatDuration(v.Window))
	}
	share := func(x float64) string { return strings.TrimSuffix(fmt.Sprintf("%.1f", 100*x), ".0") + " %" }
	return fmt.Sprintf("%s of the slots over %s while full, limit %s", share(v.Score), policy.FormatDuration(v.Window), share(v.Threshold))
}

// part says of which block this one is a part.
func part(b store.Block) string {
	if b.Part == 0 {
		return ""
	}
	return fmt.Sprintf(" (part %d of %s)", b.Part, b.PartOf)
}

func (e *env) blocksShow(c *cli.Context) error {
	p, err := oneSource(c)
	if err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	list, err := g.History(c.Context, p)
	if err != nil {
		return err
	}
	if len(list) == 0 {
		return &answerNo{p.String() + " is not blocked, and was not lately"}
	}
	if !c.Bool("json") {
		slices.Reverse(list) // what is now stands last, above the prompt
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
	state := past(b)
	if b.Error != "" {
		state += ": " + b.Error
	}
	row(b.Prefix.String(), "%s", state)
	row("  why", "%s", b.Reason)
	if b.Part > 0 {
		row("  part", "%d of %s, in which somebody is allowed; `smtpguard unblock %s` lifts all parts", b.Part, b.PartOf, b.PartOf)
	}
	row("  by", "%s", b.By)
	row("  since", "%s", clock(b.Since))
	if b.State == guard.IsLifted {
		row("  lifted", "%s by %s", clock(b.Lifted), b.LiftedBy)
	} else {
		row("  until", "%s (offence %d)", clock(b.Until), b.Offence)
	}
	if !b.Ends.IsZero() {
		row("  on trial", "lifted at %s already, unless you say `smtpguard commit`", clock(b.Ends))
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
		if v.Metric == detector.Opens {
			row("  rule", "%s: %s, threshold %.0f connections", v.Rule, scored(v), v.Threshold)
		} else {
			row("  rule", "%s: %s", v.Rule, scored(v))
		}
		if b.State == guard.IsLifted || b.State == guard.IsExpired || b.Part > 1 {
			w.Flush()
			return // what is over, and the other parts, are told in short; --json has all
		}
		if b.Part > 0 && len(v.Evidence) > 0 {
			row("  evidence", "of all of %s:", b.PartOf)
		}
		for i, ev := range v.Evidence {
			name := "  evidence"
			if i > 0 || b.Part > 0 {
				name = ""
			}
			row(name, "%s opened%s%s", clock(ev.Time), portOf(ev.Source, ev.Port), countOf(ev.Count))
		}
	}
	w.Flush()
}

// past is the state of a block in a sentence: of one that is over, whether it
// ever dropped anything, and whether another one went on.
func past(b guard.BlockInfo) string {
	state := string(b.State)
	if b.State == guard.IsLifted && b.Replaced {
		state = "replaced"
	}
	if b.Observed && b.State != guard.OnlySeen {
		state += " (only observed)"
	}
	return state
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

// clock shows a time in the local zone, with the offset: logs and people
// elsewhere use other zones.
func clock(t time.Time) string { return t.Local().Format("2006-01-02 15:04:05 -0700") }

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strings.TrimSpace(fmt.Sprintf("%d %s", n, many))
}
