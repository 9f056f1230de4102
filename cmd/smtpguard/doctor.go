package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/doctor"
	"github.com/smtpguard/smtpguard/policy"
)

func (e *env) doctorCommand() *cli.Command {
	return &cli.Command{
		Name: "doctor", Usage: "is this server ready to be protected, and what is to be done if not?",
		Description: "Looks at Exim, its log, the kernel, the packet filter, the policy and the daemon, and changes nothing. Run it as root to see all. Exit status 1: something fails; a warning is none.",
		Action:      e.doctor,
	}
}

func (e *env) doctor(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	o := doctor.Options{
		FindLogs: func(p *policy.Policy, mta exim.Config, mtaErr error) ([]string, error) {
			logs, err := findLogs(p, mta, mtaErr)
			if err != nil && len(p.Logs) > 0 && p.Logs[0] != policy.Auto {
				return p.Logs, nil // what is wrong with each is said of each
			}
			return logs, err
		},
		SSHConnection: os.Getenv("SSH_CONNECTION"),
		PolicyPath:    c.String("policy"),
	}
	if o.PolicyPath == "" {
		if _, err := os.Stat(defaultPolicy); err == nil {
			o.PolicyPath = defaultPolicy
		}
	}
	o.Policy, o.PolicyErr = e.policy(c)
	if o.PolicyErr != nil { // the rest is still worth a look
		o.Policy = policy.Default()
		if s := c.String("socket"); s != "" {
			o.Policy.Control.Socket = s
		}
		if s := c.String("store"); s != "" {
			o.Policy.Store.Path = s
		}
	} else if rc, err := reportsConfig(o.Policy); err != nil {
		o.Advice = func(exim.Config, error) []string { return []string{err.Error()} }
	} else {
		o.Advice = func(mta exim.Config, mtaErr error) []string {
			if mtaErr == nil {
				rc.Log = &abuse.LogHolds{Ports: mta.IncomingPort, Zone: mta.LogTimezone}
			}
			return rc.Advice()
		}
	}
	r := doctor.Examine(doctor.Look(c.Context, o))
	if c.Bool("json") {
		if err := e.json(r); err != nil {
			return err
		}
	} else {
		out := bufio.NewWriter(e.stdout)
		showDoctor(out, r, fitting(e.stdout, 110))
		if err := out.Flush(); err != nil {
			return err
		}
	}
	if r.Fail > 0 {
		return fmt.Errorf("%s", count(r.Fail, "check fails", "checks fail"))
	}
	return nil
}

// fitting is how wide text is shown: at most so wide, and not wider than a
// terminal is.
func fitting(w io.Writer, most int) int {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return min(columns(w), most)
	}
	return most
}

func showDoctor(out io.Writer, r doctor.Report, width int) {
	for _, c := range r.Checks {
		status := string(c.Status)
		if c.Status == doctor.Fail {
			status = "FAIL"
		}
		hang(out, fmt.Sprintf("%-4s  %-15s  ", status, c.Name), c.Says, width)
		if c.Means != "" {
			hang(out, "        ", c.Means, width)
		}
		for i, m := range c.Mend {
			mark := "              "
			if i == 0 {
				mark = "        mend: "
			}
			if strings.HasSuffix(m, ":") || strings.HasSuffix(m, ".") { // for a person to read
				hang(out, mark, m, width)
				continue
			}
			// As it is: what is to be pasted must not be broken.
			for line := range strings.Lines(m) {
				fmt.Fprintln(out, mark+strings.TrimSuffix(line, "\n"))
				mark = "              "
			}
		}
	}
	fmt.Fprintf(out, "\n%d ok, %s, %d failed", r.OK, count(r.Warn, "warning", "warnings"), r.Fail)
	if r.Notes > 0 {
		fmt.Fprintf(out, ", %s", count(r.Notes, "note", "notes"))
	}
	if r.Skipped > 0 {
		fmt.Fprintf(out, ", %d could not be looked at", r.Skipped)
	}
	fmt.Fprintln(out)
}
