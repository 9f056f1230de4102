package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
)

func (e *env) commitCommand() *cli.Command {
	return &cli.Command{
		Name: "commit", Usage: "give the word that a first enforce waits for (run --commit)",
		Description: "Without it every block is lifted when the time is up, and smtpguard only observes. After that, commit takes up enforcing again.",
		Flags:       []cli.Flag{&cli.StringFlag{Name: "for", Usage: "not for good: begin the trial anew, for `DURATION`"}},
		Action:      e.commit,
	}
}

func (e *env) commit(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	var again time.Duration
	if s := c.String("for"); s != "" {
		var err error
		if again, err = policy.ParseDuration(s); err != nil || again < time.Second || again > 24*time.Hour {
			return &usageError{fmt.Sprintf("--for %s: want a duration up to 24h, such as 10m", s)}
		}
	}
	if err := e.soundPolicy(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	t, err := g.Commit(c.Context, control.Operator(os.Getuid()), again)
	if errors.Is(err, guard.ErrNoTrial) {
		return &answerNo{err.Error()}
	}
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(t)
	}
	if t.State == guard.OnTrial {
		fmt.Fprintf(e.stdout, "enforcing on trial until %s; then every block is lifted without `smtpguard commit`\n", clock(t.Until))
		return nil
	}
	fmt.Fprintln(e.stdout, "enforcing for good")
	return nil
}

func (e *env) resumeCommand() *cli.Command {
	return &cli.Command{
		Name: "resume", Usage: "let rules block again after they blocked too many good senders (block.max_good_share)",
		Action: e.resume,
	}
}

func (e *env) resume(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	if err := e.soundPolicy(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	stopped, err := g.Resume(c.Context, control.Operator(os.Getuid()))
	if err != nil {
		return err
	}
	if !stopped {
		return &answerNo{"rules were not stopped"}
	}
	if c.Bool("json") {
		return e.json(map[string]bool{"resumed": true})
	}
	fmt.Fprintln(e.stdout, "rules block again")
	return nil
}

// oneLine joins the lines of an error.
func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }
