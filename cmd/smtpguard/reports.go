package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) reportsCommand() *cli.Command {
	note := &cli.StringFlag{Name: "note", Usage: "note `TEXT` with it"}
	return &cli.Command{
		Name: "reports", Usage: "abuse reports to the networks that floods come from",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "every report, and where it stands", Action: e.reportsList,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "all", Usage: "also what is below the threshold, joined or closed, and everything that is held"}}},
			{Name: "show", Usage: "one report: recipients, where they come from, warnings, and the mail", ArgsUsage: "ID", Action: e.reportsShow,
				Flags: []cli.Flag{&cli.BoolFlag{Name: "raw", Usage: "the mail as it is sent, and nothing else"}}},
			{Name: "edit", Usage: "change a draft; without flags its text, in $EDITOR", ArgsUsage: "ID", Action: e.reportsEdit,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "to", Usage: "write to `ADDRESS`"},
					&cli.StringFlag{Name: "cc", Usage: `copy to ADDRESS; "" to nobody`},
					&cli.StringFlag{Name: "format", Usage: "`FORMAT` is mixed, xarf, x-arf-0.2 or text"},
					&cli.StringFlag{Name: "text", Usage: "the text is in `FILE` (-: standard input)"},
					&cli.StringFlag{Name: "digest", Usage: "for scripts: only if the draft still has this `DIGEST`, as show prints it"},
				}},
			{Name: "approve", Usage: "let a draft go out as you have seen it with show", ArgsUsage: "ID", Action: e.reportsApprove,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "digest", Usage: "for scripts: the draft with this `DIGEST`, as show prints it"},
					&cli.StringFlag{Name: "guess", Usage: "yes, write to `ADDRESS`, although it is only a guess"},
					&cli.BoolFlag{Name: "blocked-desk", Usage: "yes, although the desk's own mail server is blocked here"},
				}},
			{Name: "send", Usage: "send an approved one now", ArgsUsage: "ID", Action: e.reportsSend,
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "to", Usage: "a trial: only to `ADDRESS`, the report stays as it is"},
					&cli.BoolFlag{Name: "again", Usage: "a doubtful one: the mail server's log says that it did not leave"},
				}},
			{Name: "close", Usage: "nothing more is expected", ArgsUsage: "ID", Flags: []cli.Flag{note}, Action: e.reportsEnd(control.Reports.CloseReport)},
			{Name: "withdraw", Usage: "it should not be reported, nor what comes from its network for reports.withdrawn", ArgsUsage: "ID", Flags: []cli.Flag{note}, Action: e.reportsEnd(control.Reports.WithdrawReport)},
			{Name: "reopen", Usage: "take back withdraw or close: the network is reported again", ArgsUsage: "ID", Action: e.reportsReopen},
			{Name: "export", Usage: "write all of a report into a new directory in DIR", ArgsUsage: "ID DIR", Action: e.reportsExport},
			{Name: "receive", Usage: "read bounces and answers: a mail or a mailbox (-: standard input)", ArgsUsage: "FILE", Action: e.reportsReceive},
		},
	}
}

// openReports is the daemon's desk if one runs, else one on the store.
type openReports struct {
	control.Reports
	*policy.Policy
	daemon bool
	// blind says what of the allowlist is not known; nil: nothing.
	blind error
}

// seeing refuses to let a report go to somebody who may be allowed.
func (r openReports) seeing() error {
	if r.blind == nil {
		return nil
	}
	return withHint(fmt.Errorf("what is allowed is never reported, but the allowlist is not known in full: %w", r.blind), "start the daemon, which looks it up, and try again")
}

// onReports opens the reports for as long as do takes, and turns its error
// into an answer or one with a hint.
func (e *env) onReports(c *cli.Context, do func(openReports) error) error {
	p, err := e.policy(c)
	if err != nil {
		return err
	}
	cl, err := control.Dial(c.Context, p.Control.Socket)
	if err == nil {
		defer cl.Close()
		return reportError(do(openReports{cl, p, true, nil}))
	}
	if !errors.Is(err, control.ErrNoDaemon) {
		return err
	}
	if _, err := os.Stat(p.Store.Path); errors.Is(err, fs.ErrNotExist) {
		return withHint(fmt.Errorf("no daemon answers on %s, and there is no state in %s", p.Control.Socket, p.Store.Path),
			"start it with `smtpguard run`, or name its --policy, --socket or --store")
	}
	st, err := store.Open(p.Store.Path, store.Options{Wait: 2 * time.Second})
	if err != nil {
		return err
	}
	defer st.Close()
	allowed, blind := guard.AllowedAlone(c.Context, st, p, time.Now())
	d, err := openDesk(p, st, func() []netip.Prefix { return allowed }, nil, nil, nil)
	if err != nil {
		return withHint(fmt.Errorf("the `reports:` section of the policy has faults: %w", err), "`smtpguard policy check` names them")
	}
	defer d.Close()
	return reportError(do(openReports{control.Desk(d), p, false, blind}))
}

// onReport is onReports for the commands that take one ID: they do something
// with the report, and say what.
func (e *env) onReport(c *cli.Context, do func(r openReports, id string) (k abuse.Case, what string, err error)) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	return e.onReports(c, func(r openReports) error {
		k, what, err := do(r, id)
		switch {
		case err != nil:
			return err
		case c.Bool("json"):
			return e.json(k)
		}
		_, err = fmt.Fprintln(e.stdout, k.ID, what)
		return err
	})
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
	return e.onReports(c, func(r openReports) error {
		list, err := r.Reports.Reports(c.Context)
		if err != nil {
			return err
		}
		total := len(list)
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
		switch {
		case total == 0:
			fmt.Fprintln(e.stdout, "there are no reports")
		case len(list) == 0:
			fmt.Fprintf(e.stdout, "nothing waits or is under way; `smtpguard reports list --all` shows %s that %s closed, withdrawn or below the threshold\n",
				count(total, "report", "reports"), map[bool]string{true: "is", false: "are"}[total == 1])
		}
		listReports(e.stdout, list, c.Bool("all"))
		if p := r.Policy.Reports; p.Mode != policy.ReportsOff && p.From == "" {
			fmt.Fprintln(e.stdout, "reports.from is not set: drafts are made, but nothing can be sent")
		}
		return nil
	})
}

func (e *env) reportsShow(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	return e.onReports(c, func(r openReports) error {
		k, msg, err := r.ShowReport(c.Context, id, operator())
		if err != nil {
			return err
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
		showReport(e.stdout, k, messageText(msg))
		return nil
	})
}

func (e *env) reportsEdit(c *cli.Context) error {
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
		in := e.stdin
		if name != "-" {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			in = f
		}
		b, err := io.ReadAll(io.LimitReader(in, 1<<20))
		if err != nil {
			return err
		}
		s := string(b)
		ed.Text = &s
	case ed == (abuse.Edit{}):
		return e.editText(c)
	}
	ed.Base = c.String("digest")
	return e.applyEdit(c, ed)
}

func (e *env) applyEdit(c *cli.Context, ed abuse.Edit) error {
	return e.onReport(c, func(r openReports, id string) (abuse.Case, string, error) {
		k, err := r.EditReport(c.Context, id, operator(), ed)
		return k, "is changed; `smtpguard reports show " + k.ID + "` shows it, approve lets it go", err
	})
}

// editText lets a person change the text of a draft. The store is let go of
// while that person thinks. A text that is not taken stays where it was written.
func (e *env) editText(c *cli.Context) error {
	id, err := oneReport(c)
	if err != nil {
		return err
	}
	var k abuse.Case
	var was string
	err = e.onReports(c, func(r openReports) (err error) {
		var msg []byte
		k, msg, err = r.Report(c.Context, id)
		was = messageText(msg)
		return err
	})
	if err != nil {
		return err
	}
	if k.State == abuse.Bounced { // of which a new mail is made
		return e.applyEdit(c, abuse.Edit{})
	}
	switch {
	case was == "":
		return &answerNo{k.ID + " has no draft yet"}
	case k.State != abuse.Drafted && k.State != abuse.Approved:
		return &answerNo{fmt.Sprintf("%s is %s; only drafts are edited", k.ID, k.State)}
	}
	file, s, err := e.editor(c.Context, was)
	if err == nil && s == was {
		os.Remove(file)
		return &answerNo{"nothing was changed"}
	}
	if err == nil {
		err = e.applyEdit(c, abuse.Edit{Text: &s, Base: k.Mails[len(k.Mails)-1].Digest})
	}
	switch {
	case file == "":
		return err
	case err == nil:
		os.Remove(file)
		return nil
	}
	fmt.Fprintf(e.stderr, "your text is kept in %s; `smtpguard reports edit %s --text %[1]s` takes it\n", file, k.ID)
	return err
}

// editor lets a person change a text, in a file that the caller removes; "" if
// there is none.
func (e *env) editor(ctx context.Context, text string) (file, changed string, err error) {
	program := os.Getenv("VISUAL")
	if program == "" {
		program = os.Getenv("EDITOR")
	}
	if program == "" {
		return "", "", withHint(errors.New("no editor is named"), "set EDITOR, or use --text FILE")
	}
	f, err := os.CreateTemp("", "smtpguard-report-*.txt")
	if err != nil {
		return "", "", err
	}
	_, err = f.WriteString(text)
	if err := errors.Join(err, f.Close()); err != nil {
		os.Remove(f.Name())
		return "", "", err
	}
	args := append(strings.Fields(program), f.Name())
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.stdin, e.stdout, e.stderr
	if err := cmd.Run(); err != nil {
		err = fmt.Errorf("the editor %s: %w", program, err)
		if b, rerr := os.ReadFile(f.Name()); rerr != nil || string(b) == text { // nothing is lost
			os.Remove(f.Name())
			return "", "", err
		}
		return f.Name(), "", err
	}
	b, err := os.ReadFile(f.Name())
	return f.Name(), string(b), err
}

func (e *env) reportsApprove(c *cli.Context) error {
	return e.onReport(c, func(r openReports, id string) (abuse.Case, string, error) {
		if err := r.seeing(); err != nil {
			return abuse.Case{}, "", err
		}
		k, err := r.ApproveReport(c.Context, id, operator(), abuse.Approval{Guess: c.String("guess"), BlockedDesk: c.Bool("blocked-desk"), Digest: c.String("digest")})
		if err != nil {
			return k, "", err
		}
		m := k.Mails[len(k.Mails)-1]
		what := "is approved for " + m.To.Address
		if m.Cc.Address != "" {
			what += " (copy to " + m.Cc.Address + ")"
		}
		if r.daemon {
			return k, what + " and goes out by itself; `smtpguard reports send " + k.ID + "` sends it now", nil
		}
		return k, what + "; no daemon runs, so `smtpguard reports send " + k.ID + "` sends it, or the daemon does when it starts", nil
	})
}

func (e *env) reportsSend(c *cli.Context) error {
	return e.onReport(c, func(r openReports, id string) (abuse.Case, string, error) {
		o := abuse.SendOptions{To: c.String("to"), Again: c.Bool("again")}
		if err := r.seeing(); err != nil && o.To == "" {
			return abuse.Case{}, "", err
		}
		k, err := r.SendReport(c.Context, id, operator(), o)
		switch {
		case errors.Is(err, control.ErrUnderWay) && o.To != "":
			return k, "is still being handed over to " + o.To + " as a trial; `smtpguard reports show " + k.ID + "` tells how it ends", nil
		case errors.Is(err, control.ErrUnderWay):
			return k, "is still being handed over; `smtpguard reports list` tells how it ends", nil
		case err != nil:
			return k, "", err
		case o.To != "":
			return k, "went to " + o.To + " as a trial, and stays " + string(k.State), nil
		}
		return k, "is sent to " + k.Mails[len(k.Mails)-1].To.Address, nil
	})
}

func (e *env) reportsEnd(end func(r control.Reports, ctx context.Context, id, by, note string) (abuse.Case, error)) cli.ActionFunc {
	return func(c *cli.Context) error {
		return e.onReport(c, func(r openReports, id string) (abuse.Case, string, error) {
			k, err := end(r.Reports, c.Context, id, operator(), c.String("note"))
			return k, "is " + string(k.State), err
		})
	}
}

// reportsExport writes the case, its mail, and what is kept of it as files.
func (e *env) reportsExport(c *cli.Context) error {
	if c.NArg() != 2 {
		return &usageError{fmt.Sprintf("%s takes the ID of a report and a directory", c.Command.HelpName)}
	}
	return e.onReports(c, func(r openReports) error {
		k, msg, err := r.Report(c.Context, c.Args().First())
		if err != nil {
			return err
		}
		to := filepath.Join(c.Args().Get(1), k.ID)
		if err := os.Mkdir(to, 0o700); err != nil {
			return err
		}
		text, err := json.MarshalIndent(k, "", "  ")
		if err != nil {
			return err
		}
		faults := []error{os.WriteFile(filepath.Join(to, "case.json"), append(text, '\n'), 0o600)}
		if msg != nil {
			faults = append(faults, os.WriteFile(filepath.Join(to, "mail.eml"), msg, 0o600))
		}
		files, err := filepath.Glob(filepath.Join(r.Policy.Reports.Dir, k.ID+"-*"))
		faults = append(faults, err)
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err == nil {
				err = os.WriteFile(filepath.Join(to, strings.TrimPrefix(filepath.Base(f), k.ID+"-")), b, 0o600)
			}
			faults = append(faults, err)
		}
		if err := errors.Join(faults...); err != nil {
			return err
		}
		if c.Bool("json") {
			return e.json(k)
		}
		fmt.Fprintln(e.stdout, k.ID, "is in "+to)
		return nil
	})
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
	return e.onReports(c, func(r openReports) error {
		found, other := false, 0
		err := abuse.SplitMbox(in, func(msg []byte) error {
			got, err := r.ReceiveReport(c.Context, msg[:min(len(msg), control.MaxMail)], operator())
			for _, g := range got {
				found = found || g.Report != ""
				switch {
				case c.Bool("json"):
					err = errors.Join(err, e.json(g))
				case g.Report == "":
					other++
				default:
					fmt.Fprintf(e.stdout, "%s: %s (%s)\n", g.Report, receivedWords(g), g.Subject)
				}
			}
			return err
		})
		if other > 0 {
			fmt.Fprintf(e.stdout, "%s to no report\n", count(other, "mail belongs", "mails belong"))
		}
		if err == nil && !found {
			return &answerNo{""}
		}
		return err
	})
}
