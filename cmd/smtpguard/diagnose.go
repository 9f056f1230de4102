package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/diagnose"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
)

// monitorLog is what cPanel's service monitor writes (ChkServd.pm).
const monitorLog = "/var/log/chkservd.log"

func (e *env) diagnoseCommand() *cli.Command {
	return &cli.Command{
		Name: "diagnose", Usage: "why does Exim seem to go up and down?", ArgsUsage: "[FILE...]",
		Description: "Reads Exim's log, cPanel's /var/log/chkservd.log (if no FILE is named: those of this machine, with what was rotated within a day), and mails of cPanel's monitor, in any order, plain or compressed, and says what it was: a flood, too few slots, load, a health check whose own login is wrong, ... Exit status 3: nothing is found.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "since", Usage: "look at what came after `TIME`: \"2006-01-02 15:04\", RFC 3339, or how long ago, as 6h"},
			&cli.StringFlag{Name: "until", Usage: "look at what came before `TIME`"},
			&cli.IntFlag{Name: "capacity", Usage: "the server had `N` slots (smtp_accept_max)", DefaultText: "as the policy or the log says"},
			&cli.StringFlag{Name: "zone", Usage: "time zone `NAME` of lines that state none (default: as the policy says)"},
		},
		Action: e.diagnose,
	}
}

func (e *env) diagnose(c *cli.Context) error {
	p, err := e.policy(c)
	if err != nil {
		p = e.standIn(c, err)
	}
	if z := c.String("zone"); z != "" {
		if err := p.Set("zone", z); err != nil {
			return &usageError{fmt.Sprintf("--zone: %v", err)}
		}
	}
	capacity := c.Int("capacity")
	if c.IsSet("capacity") && capacity < 1 {
		return &usageError{"--capacity: want 1 or more"}
	}
	since, err := moment(c, "since")
	if err != nil {
		return err
	}
	until, err := moment(c, "until")
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && !since.Before(until) {
		return &usageError{"--since: is not before --until"}
	}
	loc, names := p.Location(), c.Args().Slice()
	var machine *diagnose.Machine
	if len(names) == 0 {
		mta, mtaErr := exim.ReadConfig(c.Context)
		logs, err := findLogs(p, mta, mtaErr)
		if err != nil {
			return err
		}
		from := since // a rotation an hour ago must not hide the night
		if from.IsZero() {
			from = time.Now().Add(-24 * time.Hour)
		}
		for _, l := range logs {
			names = append(names, lately(l, from)...)
		}
		machine = lookMachine(c.Context, p, mta, mtaErr, logs, names)
		if len(names) == 0 && !machine.Wrong() {
			return withHint(fmt.Errorf("the log %s is not there", strings.Join(logs, ", ")), "name it: `smtpguard diagnose FILE...`")
		}
		for _, m := range generations(monitorLog, from) {
			f, err := os.Open(m)
			if err != nil {
				fmt.Fprintf(e.stderr, "smtpguard: what the panel wrote is left out: %v\n", err)
				continue
			}
			f.Close()
			names = append(names, m)
		}
		if loc == nil {
			loc = zoneOf(mta, mtaErr)
		}
		if mtaErr == nil && p.Capacity == 0 && capacity == 0 {
			capacity = mta.AcceptMax
		}
	}
	if loc == nil {
		loc = time.Local
	}
	replay, err := guard.NewReplay(p, capacity) // for its detector: the policy's rules
	if err != nil {
		return err
	}
	files, err := e.openLogs(names, loc)
	defer closeLogs(files)
	if err != nil {
		return err
	}
	d := diagnose.New(diagnose.Options{Detector: replay.Detector, Zone: loc, Since: since, Until: until,
		Machine: machine, Guarding: guarding(c, p)})
	for _, f := range files {
		if err := d.Read(c.Context, f, f.modified); err != nil {
			return fmt.Errorf("reading %s: %w", f.name, err)
		}
	}
	r := d.Report()
	if c.Bool("json") {
		err = e.json(r)
	} else {
		out := bufio.NewWriter(e.stdout)
		showDiagnosis(out, r, fitting(e.stdout, 96))
		err = out.Flush()
	}
	if err == nil && len(r.Findings) == 0 {
		return &answerNo{}
	}
	return err
}

// moment reads a time, or how long ago it was.
func moment(c *cli.Context, flag string) (time.Time, error) {
	s := c.String(flag)
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := policy.ParseDuration(s); err == nil {
		return time.Now().Add(-d), nil
	}
	if t, err := parseTime(s); err == nil {
		return t, nil
	}
	return time.Time{}, &usageError{fmt.Sprintf("--%s: %q is neither a time such as \"2026-11-22 19:45\" nor a duration such as 6h", flag, s)}
}

func showDiagnosis(out io.Writer, r diagnose.Report, width int) {
	for i, f := range r.Findings {
		hang(out, fmt.Sprintf("%d. ", i+1), f.Title+".", max(width, 80))
		when := "time not known"
		if !f.First.IsZero() {
			when = clock(f.First)
			if f.Last.After(f.First) {
				when += " to " + clock(f.Last)
			}
		}
		fmt.Fprintf(out, "   %s, %s\n", f.Confidence, when)
		if f.Explains > 0 {
			hang(out, "   ", fmt.Sprintf("This is what the panel's mails were about: it explains %s.", count(f.Explains, "failed check", "failed checks")), width)
		}
		for _, w := range f.Why {
			hang(out, "   - ", w+".", width)
		}
		if len(f.Spans) > 1 {
			fmt.Fprintln(out, "   when:")
			for _, s := range f.Spans {
				fmt.Fprintf(out, "     %s, for %s\n", clock(s.First), span(s.Last.Sub(s.First)))
			}
		}
		if len(f.Lines) > 0 {
			fmt.Fprintln(out, "   lines:")
			for _, l := range f.Lines {
				fmt.Fprintln(out, "     "+l)
			}
		}
		fmt.Fprintln(out, "   do:")
		for _, w := range f.Do {
			hang(out, "   * ", w, width)
		}
		fmt.Fprintln(out)
	}
	if len(r.Findings) == 0 {
		fmt.Fprintln(out, "Nothing in these files explains an Exim that goes up and down.")
	}
	if !r.First.IsZero() {
		fmt.Fprintf(out, "read %s of Exim, %s to %s: %s, %s accepted, at most %d of %d slots taken (%s)\n",
			count(int(r.Lines), "line", "lines"), clock(r.First), clock(r.Last), count(int(r.Opened), "connection", "connections"),
			count(int(r.Accepted), "message", "messages"), r.PeakCount, r.Capacity, r.From)
	} else if !r.Latest.IsZero() {
		fmt.Fprintf(out, "read %s of Exim, and none is of the time in question: the last one is of %s\n", count(int(r.Lines), "line", "lines"), clock(r.Latest))
	} else if r.Lines > 0 {
		fmt.Fprintf(out, "read %s; none of them is one of Exim's log\n", count(int(r.Lines), "line", "lines"))
	}
	if r.Checks > 0 {
		fmt.Fprintf(out, "the panel checked Exim %d times; %d failed\n", r.Checks, r.Failed)
	}
	if r.Opened == 0 && r.Lines > 100 {
		fmt.Fprintln(out, "The log has no connection lines: `smtpguard doctor` says how to turn them on.")
	}
}
