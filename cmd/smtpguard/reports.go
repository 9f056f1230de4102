package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net/mail"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) reportsCommand() *cli.Command {
	note := &cli.StringFlag{Name: "note", Usage: "note `TEXT` with it"}
	return &cli.Command{
		Name: "reports", Usage: "abuse reports to the networks that floods come from",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "every report, and where it stands", Action: e.reportsList,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "also what is below the threshold, joined or closed"}}},
			{Name: "show", Usage: "one report: recipients, where they come from, warnings, and the mail", ArgsUsage: "ID", Action: e.reportsShow,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "raw", Usage: "the mail as it is sent, and nothing else"}}},
			{Name: "edit", Usage: "change a draft; without flags its text, in $EDITOR", ArgsUsage: "ID", Action: e.reportsEdit,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "to", Usage: "write to `ADDRESS`"},
					&cli.StringFlag{Name: "cc", Usage: `copy to ADDRESS; "" to nobody`},
					&cli.StringFlag{Name: "format", Usage: "`FORMAT` is mixed, xarf, x-arf-0.2 or text"},
					&cli.StringFlag{Name: "text", Usage: "the text is in `FILE` (-: standard input)"},
				}},
			{Name: "approve", Usage: "let a draft go out, as it is", ArgsUsage: "ID", Action: e.reportsApprove,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "guess", Usage: "yes, write to `ADDRESS`, although it is only a guess"},
					&cli.BoolFlag{Name: "blocked-desk", Usage: "yes, although the desk's own mail server is blocked here"},
				}},
			{Name: "send", Usage: "send an approved one now", ArgsUsage: "ID", Action: e.reportsSend,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "to", Usage: "a trial: only to `ADDRESS`, the report stays as it is"},
					&cli.BoolFlag{Name: "again", Usage: "a doubtful one: the mail server's log says that it did not leave"},
				}},
			{Name: "close", Usage: "nothing more is expected", ArgsUsage: "ID", Flags: []cli.Flag{note}, Action: e.reportsEnd(control.Reports.CloseReport)},
			{Name: "withdraw", Usage: "it should not be reported", ArgsUsage: "ID", Flags: []cli.Flag{note}, Action: e.reportsEnd(control.Reports.WithdrawReport)},
			{Name: "export", Usage: "write all of a report into a new directory in DIR", ArgsUsage: "ID DIR", Action: e.reportsExport},
			{Name: "receive", Usage: "read bounces and answers: a mail or a mailbox (-: standard input)", ArgsUsage: "FILE", Action: e.reportsReceive},
		},
	}
}

// reports is the daemon's desk if one runs, else one on the store.
func (e *env) reports(c *cli.Context) (r control.Reports, p *policy.Policy, done func(), err error) {
	if p, err = e.policy(c); err != nil {
		return nil, nil, nil, err
	}
	cl, err := control.Dial(c.Context, p.Control.Socket)
	if err == nil {
		return cl, p, func() { cl.Close() }, nil
	}
	if !errors.Is(err, control.ErrNoDaemon) {
		return nil, nil, nil, err
	}
	if _, err := os.Stat(p.Store.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, nil, nil, withHint(fmt.Errorf("no daemon answers on %s, and there is no state in %s", p.Control.Socket, p.Store.Path),
			"start it with `smtpguard run`, or name its --policy, --socket or --store")
	}
	st, err := store.Open(p.Store.Path, store.Options{Wait: 2 * time.Second})
	if err != nil {
		return nil, nil, nil, err
	}
	d, err := openDesk(p, st, nil, nil, nil, nil)
	if err != nil {
		st.Close()
		return nil, nil, nil, err
	}
	return control.Desk(d), p, func() { d.Close(); st.Close() }, nil
}

// oneReport reads the only argument of a command.
func oneReport(c *cli.Context) (string, error) {
	if c.NArg() != 1 {
		return "", &usageError{fmt.Sprintf("%s takes the ID of one report, but got %d", c.Command.HelpName, c.NArg())}
	}
	return c.Args().First(), nil
}

func operator() string { return control.Operator(os.Getuid()) }

// reportError turns an error of the desk into an answer or one with a hint.
func reportError(err error) error {
	var r *abuse.Refusal
	switch {
	case errors.Is(err, abuse.ErrUnknown):
		return &answerNo{err.Error()}
	case errors.As(err, &r) && r.Hint != "":
		return withHint(err, r.Hint)
	case errors.Is(err, abuse.ErrDoubtful):
		return withHint(err, "if it did not leave, `smtpguard reports send ID --again`; if it did, `smtpguard reports close ID`")
	}
	return err
}

func (e *env) reportsList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	r, p, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	list, err := r.Reports(c.Context)
	if err != nil {
		return err
	}
	if !c.Bool("all") {
		list = slices.DeleteFunc(list, func(k abuse.Case) bool {
			return k.State == abuse.Gathering || k.State == abuse.Closed || k.State == abuse.Withdrawn
		})
	}
	if c.Bool("json") {
		for _, k := range list {
			if err := e.json(k); err != nil {
				return err
			}
		}
		return nil
	}
	if len(list) == 0 {
		fmt.Fprintln(e.stdout, "there are no reports")
		if p.Reports.Mode != policy.ReportsOff && p.Reports.From == "" {
			fmt.Fprintln(e.stdout, "reports.from is not set: drafts are made, but nothing can be sent")
		}
		return nil
	}
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATE\tNETWORK\tAS\tBLOCKS\tCONNECTIONS\tLAST\tTO")
	for _, k := range list {
		as, to := "-", ""
		if k.AS != 0 {
			as = fmt.Sprintf("AS%d", k.AS)
		}
		if n := len(k.Mails); n > 0 {
			to = k.Mails[n-1].To.Address
		}
		if k.Why != "" {
			to = strings.TrimSpace(to + " (" + k.Why + ")")
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%d\t%s\t%s\n", k.ID, k.State, k.Network, as, k.BlockCount, k.Connections, clock(k.LastBlock), to)
	}
	return w.Flush()
}

func (e *env) reportsShow(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	r, _, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	k, msg, err := r.Report(c.Context, id)
	if err != nil {
		return reportError(err)
	}
	switch {
	case c.Bool("json"):
		return e.json(struct {
			Case    abuse.Case `json:"case"`
			Message string     `json:"message,omitempty"`
		}{k, string(msg)})
	case c.Bool("raw"):
		if msg == nil {
			return &answerNo{k.ID + " has no draft yet"}
		}
		_, err := e.stdout.Write(msg)
		return err
	}
	showReport(e.stdout, k)
	if msg != nil {
		fmt.Fprintf(e.stdout, "\n%s", messageText(msg))
	}
	return nil
}

func showReport(out io.Writer, k abuse.Case) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	row(k.ID, "%s", k.State)
	if k.Why != "" {
		row("  why", "%s", k.Why)
	}
	if k.AS != 0 {
		row("  network", "%s, AS%d", k.Network, k.AS)
	} else {
		row("  network", "%s", k.Network)
	}
	row("  blocks", "%d, from %s to %s", k.BlockCount, clock(k.FirstBlock), clock(k.LastBlock))
	if k.Ticket != "" {
		row("  ticket", "%s", k.Ticket)
	}
	if n := len(k.Mails); n > 0 {
		m := k.Mails[n-1]
		for _, x := range []struct {
			name string
			c    abuse.Contact
		}{{"  to", m.To}, {"  cc", m.Cc}} {
			if x.c.Address != "" {
				row(x.name, "%s: %s, %s, %s%s", x.c.Address, x.c.Scope, x.c.Source, clock(x.c.At), guessed(x.c))
			}
		}
		for _, o := range m.Others {
			row("  also", "%s: %s, %s%s", o.Address, o.Scope, o.Source, guessed(o))
		}
		row("  subject", "%s", m.Subject)
		row("  message-id", "<%s>", m.MessageID)
		row("  size", "%d bytes, %d connections of %d sources; without XARF: %s", m.Size, m.Facts.Connections, len(m.Facts.Sources)+m.Facts.MoreOf, orNo(m.Without))
		for _, s := range m.Warnings {
			row("  warning", "%s", s)
		}
		for _, a := range m.Attempts {
			row("  attempt", "%s to %s: %s", clock(a.Begun), strings.Join(a.Rcpt, ", "), a.Result)
		}
	}
	for _, s := range k.Notes {
		row("  note", "%s", s)
	}
	for _, h := range k.History {
		row("  history", "%s %s by %s %s", clock(h.Time), h.To, h.By, h.Note)
	}
	w.Flush()
}

func guessed(c abuse.Contact) string {
	s := ""
	if c.Guess {
		s += "; only a guess"
	}
	if c.Stale {
		s += "; not confirmed today"
	}
	if c.Note != "" {
		s += "; " + c.Note
	}
	return s
}

func orNo(s string) string {
	if s == "" {
		return "no"
	}
	return s
}

// messageText is the first part of a mail, the one for people.
func messageText(msg []byte) string {
	m, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		return ""
	}
	var r io.Reader = m.Body
	if _, params, err := mime.ParseMediaType(m.Header.Get("Content-Type")); err == nil && params["boundary"] != "" {
		p, err := multipart.NewReader(m.Body, params["boundary"]).NextPart()
		if err != nil {
			return ""
		}
		r = p
	}
	b, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n")
}

func (e *env) reportsEdit(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	r, _, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer func() { done() }()
	var ed abuse.Edit
	for flag, to := range map[string]**string{"to": &ed.To, "cc": &ed.Cc} {
		if c.IsSet(flag) {
			s := c.String(flag)
			*to = &s
		}
	}
	if c.IsSet("format") {
		f := abuse.Format(c.String("format"))
		ed.Format = &f
	}
	switch name := c.String("text"); {
	case name != "":
		var b []byte
		if name == "-" {
			b, err = io.ReadAll(io.LimitReader(e.stdin, 1<<20))
		} else {
			b, err = os.ReadFile(name)
		}
		if err != nil {
			return err
		}
		s := string(b)
		ed.Text = &s
	case ed == (abuse.Edit{}):
		k, msg, err := r.Report(c.Context, id)
		if err != nil {
			return reportError(err)
		}
		if k.State != abuse.Bounced || msg != nil {
			// The store is let go of while a person thinks.
			done()
			done = func() {}
			s, err := e.editor(c.Context, messageText(msg))
			if err != nil {
				return err
			}
			if r, _, done, err = e.reports(c); err != nil {
				done = func() {}
				return err
			}
			if s == messageText(msg) && k.State != abuse.Bounced {
				return &answerNo{"nothing was changed"}
			}
			if s != messageText(msg) {
				ed.Text = &s
			}
		}
	}
	k, err := r.EditReport(c.Context, id, operator(), ed)
	if err != nil {
		return reportError(err)
	}
	return e.reportDone(c, k, "is changed; approve it with `smtpguard reports approve "+k.ID+"`")
}

// editor lets a person change a text.
func (e *env) editor(ctx context.Context, text string) (string, error) {
	program := os.Getenv("VISUAL")
	if program == "" {
		program = os.Getenv("EDITOR")
	}
	if program == "" {
		return "", withHint(errors.New("no editor is named"), "set EDITOR, or use --text FILE")
	}
	f, err := os.CreateTemp("", "smtpguard-report-*.txt")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		return "", err
	}
	args := append(strings.Fields(program), f.Name())
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.stdin, e.stdout, e.stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("the editor %s: %w", program, err)
	}
	b, err := os.ReadFile(f.Name())
	return string(b), err
}

func (e *env) reportsApprove(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	r, _, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	k, err := r.ApproveReport(c.Context, id, operator(), abuse.Approval{Guess: c.String("guess"), BlockedDesk: c.Bool("blocked-desk")})
	if err != nil {
		return reportError(err)
	}
	return e.reportDone(c, k, "is approved and goes out by itself; `smtpguard reports send "+k.ID+"` sends it now")
}

func (e *env) reportsSend(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	r, _, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	o := abuse.SendOptions{To: c.String("to"), Again: c.Bool("again")}
	k, err := r.SendReport(c.Context, id, operator(), o)
	if err != nil {
		return reportError(err)
	}
	switch {
	case o.To != "":
		return e.reportDone(c, k, "went to "+o.To+" as a trial, and stays "+string(k.State))
	case k.State == abuse.Queued:
		return e.reportDone(c, k, "is still being handed over; `smtpguard reports list` tells how it ends")
	}
	return e.reportDone(c, k, "is sent to "+k.Mails[len(k.Mails)-1].To.Address)
}

func (e *env) reportsEnd(end func(r control.Reports, ctx context.Context, id, by, note string) (abuse.Case, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		id, err := oneReport(c)
		if err != nil {
			return err
		}
		r, _, done, err := e.reports(c)
		if err != nil {
			return err
		}
		defer done()
		k, err := end(r, c.Context, id, operator(), c.String("note"))
		if err != nil {
			return reportError(err)
		}
		return e.reportDone(c, k, "is "+string(k.State))
	}
}

// reportDone says what was done.
func (e *env) reportDone(c *cli.Context, k abuse.Case, what string) error {
	if c.Bool("json") {
		return e.json(k)
	}
	fmt.Fprintln(e.stdout, k.ID, what)
	return nil
}

// reportsExport writes the case, its mail, and what is kept of it as files.
func (e *env) reportsExport(c *cli.Context) error {
	if c.NArg() != 2 {
		return &usageError{fmt.Sprintf("%s takes the ID of a report and a directory", c.Command.HelpName)}
	}
	r, p, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	k, msg, err := r.Report(c.Context, c.Args().First())
	if err != nil {
		return reportError(err)
	}
	to := filepath.Join(c.Args().Get(1), k.ID)
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	text, err := json.MarshalIndent(k, "", "  ")
	if err == nil {
		err = os.WriteFile(filepath.Join(to, "case.json"), append(text, '\n'), 0o600)
	}
	if err == nil && msg != nil {
		err = os.WriteFile(filepath.Join(to, "mail.eml"), msg, 0o600)
	}
	files, globErr := filepath.Glob(filepath.Join(p.Reports.Dir, k.ID+"-*"))
	err = errors.Join(err, globErr)
	for _, f := range files {
		b, rerr := os.ReadFile(f)
		if rerr == nil {
			rerr = os.WriteFile(filepath.Join(to, strings.TrimPrefix(filepath.Base(f), k.ID+"-")), b, 0o600)
		}
		err = errors.Join(err, rerr)
	}
	if err != nil {
		return err
	}
	return e.reportDone(c, k, "is in "+to)
}

func (e *env) reportsReceive(c *cli.Context) error {
	if c.NArg() != 1 {
		return &usageError{fmt.Sprintf("%s takes one file, or - for standard input", c.Command.HelpName)}
	}
	in := e.stdin
	if name := c.Args().First(); name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		in = f
	}
	r, _, done, err := e.reports(c)
	if err != nil {
		return err
	}
	defer done()
	found := false
	err = abuse.SplitMbox(in, func(msg []byte) error {
		got, err := r.ReceiveReport(c.Context, msg[:min(len(msg), control.MaxMail)], operator())
		for _, g := range got {
			found = found || g.Report != ""
			if c.Bool("json") {
				err = errors.Join(err, e.json(g))
				continue
			}
			what := string(g.What)
			if g.Ticket != "" {
				what += ", ticket " + g.Ticket
			}
			if g.Next != "" {
				what += "; next contact: " + g.Next + " (`smtpguard reports edit " + g.Report + "` drafts it)"
			}
			if g.Why != "" {
				what = g.Why
			}
			fmt.Fprintf(e.stdout, "%s: %s (%s)\n", orDash(g.Report), orDash(what), g.Subject)
		}
		return err
	})
	if err == nil && !found {
		return &answerNo{""}
	}
	return err
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
