package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard"
	"github.com/smtpguard/smtpguard/policy"
)

// manCommand prints the manual pages. They are made from the command table
// and from the shipped policy, so they cannot say what is no longer so.
func (e *env) manCommand() *cli.Command {
	return &cli.Command{
		Name: "man", Usage: "print a manual page", Hidden: true,
		Subcommands: []*cli.Command{
			{Name: "smtpguard.8", Action: func(c *cli.Context) error {
				manProgram(e.stdout, places(c.App))
				return nil
			}},
			{Name: "smtpguard-policy.5", Action: func(*cli.Context) error {
				manPolicy(e.stdout, smtpguard.PolicyYAML)
				return nil
			}},
		},
	}
}

// roff is text that man(7) shows as it is. What stands between backquotes is
// set in bold.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`).Replace(s)
	parts := strings.Split(s, "`")
	for i := 1; i < len(parts)-1; i += 2 {
		parts[i] = `\fB` + parts[i] + `\fR`
	}
	s = strings.Join(parts, "")
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}

func bold(s string) string   { return `\fB` + roff(s) + `\fR` }
func italic(s string) string { return `\fI` + roff(s) + `\fR` }

func manHead(w io.Writer, name, section string) {
	fmt.Fprintf(w, ".\\\" made by: smtpguard man %s.%s\n", name, section)
	fmt.Fprintf(w, ".TH %s %s \"\" \"smtpguard %s\" \"System administration\"\n", strings.ToUpper(roff(name)), section, roff(programVersion()))
}

func manProgram(w io.Writer, all []place) {
	top := all[0]
	manHead(w, "smtpguard", "8")
	fmt.Fprintf(w, ".SH NAME\nsmtpguard \\- %s\n", roff(top.usage))
	fmt.Fprintf(w, ".SH SYNOPSIS\n.B smtpguard\n[%s] %s [%s] [%s]\n", italic("global options"), italic("command"), italic("options"), italic("arguments"))
	fmt.Fprint(w, ".SH DESCRIPTION\n", roff("`smtpguard run` follows Exim's main log and the kernel's socket table, sees who holds the server's slots during a flood, "+
		"drops their packets in the packet filter and ends their connections. The other commands ask it, or its store where no daemon runs. "+
		"In `mode: observe`, as shipped, everything is decided and recorded and nothing is blocked."), "\n.PP\n",
		roff("Options may stand before or after the arguments. See `smtpguard-policy`(5) for the settings."), "\n")
	fmt.Fprint(w, ".SH GLOBAL OPTIONS\n")
	manFlags(w, append(top.flags, flag{name: "help", usage: "show help, also for a command"}))
	fmt.Fprint(w, ".SH COMMANDS\n")
	for _, p := range all[1:] {
		if len(p.commands) > 0 {
			continue // those below it say everything
		}
		fmt.Fprint(w, ".SS ", roff("smtpguard "+p.path))
		if len(p.flags) > 0 {
			fmt.Fprint(w, " [options]")
		}
		if p.args != "" {
			fmt.Fprint(w, " ", roff(p.args))
		}
		fmt.Fprintf(w, "\n%s\n", roff(sentence(p.usage)))
		if p.about != "" {
			fmt.Fprintf(w, ".PP\n%s\n", roff(strings.Join(strings.Fields(p.about), " ")))
		}
		manFlags(w, p.flags)
	}
	fmt.Fprint(w, ".SH EXIT STATUS\n")
	for _, s := range []struct {
		status int
		means  string
	}{
		{exitDone, "done"}, {exitFailed, "failed"}, {exitUsage, "wrong call"},
		{exitNo, "\"no\" as an answer: nothing found, nothing to lift"},
	} {
		fmt.Fprintf(w, ".TP\n%s\n%s\n", bold(fmt.Sprint(s.status)), roff(s.means))
	}
	fmt.Fprint(w, ".SH SIGNALS\n.TP\n.B SIGHUP\nthe daemon reads the policy again; one with faults changes nothing\n",
		".TP\n.BR SIGTERM , \" SIGINT\"\nthe daemon ends; blocks stay in the packet filter until their time, unless the policy says\n", bold("on_stop: remove"), "\n")
	fmt.Fprint(w, ".SH FILES\n")
	d := policy.Default()
	for _, f := range []struct{ path, is string }{
		{defaultPolicy, "the policy"},
		{d.Store.Path, "blocks, offences, known good senders, cases: what survives a restart"},
		{d.Reports.Dir, "drafts of abuse reports, with their evidence"},
		{d.Control.Socket, "where the commands reach the daemon"},
	} {
		fmt.Fprintf(w, ".TP\n%s\n%s\n", italic(f.path), roff(f.is))
	}
	fmt.Fprint(w, ".SH SEE ALSO\n.BR smtpguard\\-policy (5),\n.BR exim (8),\n.BR nft (8)\n")
}

func manFlags(w io.Writer, flags []flag) {
	for _, f := range flags {
		fmt.Fprint(w, ".TP\n", bold("--"+f.name))
		if f.value != "" {
			fmt.Fprint(w, " ", italic(f.value))
		}
		fmt.Fprintf(w, "\n%s\n", roff(f.usage))
		if len(f.env) > 0 {
			fmt.Fprintf(w, "(environment: %s)\n", bold(strings.Join(f.env, ", ")))
		}
	}
}

// manPolicy turns the shipped policy into a page: a heading for each setting
// at the left margin, comments as text, and settings as they stand in the
// file. An indented comment is an example.
func manPolicy(w io.Writer, text string) {
	manHead(w, "smtpguard-policy", "5")
	fmt.Fprint(w, ".SH NAME\nsmtpguard\\-policy \\- the settings of smtpguard\n.SH SYNOPSIS\n", italic(defaultPolicy), "\n.SH DESCRIPTION\n")
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	literal, began, told := false, false, false
	as := func(example bool) { // an example, or text
		if example != literal {
			fmt.Fprint(w, map[bool]string{true: ".PP\n.nf\n.RS 4\n", false: ".RE\n.fi\n.PP\n"}[example])
			literal = example
		}
	}
	for i, line := range lines {
		rest := strings.TrimLeft(line, " ")
		comment, isComment := strings.CutPrefix(rest, "#")
		switch {
		case rest == "" || rest == "#":
			as(false)
			if told {
				fmt.Fprint(w, ".PP\n")
				told = false
			}
			continue
		case isComment:
			if !began && i > 0 && strings.TrimSpace(lines[i-1]) == "" {
				fmt.Fprint(w, ".SH SETTINGS\n")
				began = true
			}
			if rest == line && strings.TrimSpace(lines[max(0, i-1)]) == "" && began {
				as(false)
				fmt.Fprintf(w, ".SS %s\n", roff(headOf(lines[i:])))
				told = false
			}
			comment = strings.TrimPrefix(comment, " ")
			as(strings.HasPrefix(comment, " "))
			fmt.Fprintln(w, roff(strings.TrimRight(comment, " ")))
		default:
			if rest == line && !began {
				fmt.Fprint(w, ".SH SETTINGS\n")
				began = true
			}
			if rest == line && i > 0 && strings.TrimSpace(lines[i-1]) == "" {
				as(false)
				fmt.Fprintf(w, ".SS %s\n", roff(headOf(lines[i:])))
			}
			as(true)
			fmt.Fprintln(w, bold(line))
		}
		told = true
	}
	as(false)
	fmt.Fprint(w, ".SH SEE ALSO\n.BR smtpguard (8)\n")
}

// headOf is the name of the next setting at the left margin.
func headOf(lines []string) string {
	for _, l := range lines {
		if name, _, ok := strings.Cut(l, ":"); ok && name != "" && !strings.ContainsAny(name[:1], " #") {
			return name
		}
	}
	return ""
}

// sentence begins with a capital letter.
func sentence(s string) string {
	if s == "" {
		return ""
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
