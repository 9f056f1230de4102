package main

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
)

func (e *env) statusCommand() *cli.Command {
	return &cli.Command{Name: "status", Usage: "pressure, holders, blocks, and whether all is well", Action: e.status}
}

func (e *env) status(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	cl, p, err := e.daemon(c)
	if silent := (*control.SilentError)(nil); err != nil && p == nil && !errors.As(err, &silent) {
		err = withHint(fmt.Errorf("no smtpguard is running, and it will not start: %w", err), "mend the policy (`smtpguard policy check`), then `systemctl start smtpguard`; blocks stay until their time, and `smtpguard blocks list`, `explain`, `unblock` and `allow add` work meanwhile")
	}
	if err != nil {
		return err
	}
	s, err := cl.Status(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(s)
	}
	e.showStatus(s)
	return nil
}

func (e *env) showStatus(s guard.Status) {
	w := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	row("smtpguard", "%s, pid %d, up %s, mode %s", s.Version, s.PID, span(s.Time.Sub(s.Started)), s.Mode)
	if t := s.Trial; t != nil && t.State == guard.OnTrial {
		row("on trial", "every block is lifted in %s, at %s, without `smtpguard commit`", span(t.Until.Sub(s.Time)), clock(t.Until))
	}
	if s.Stopped != nil {
		row("RULES STOPPED", "until %s (`smtpguard resume`)", clock(s.Stopped.Until))
	}
	full := ""
	if s.Saturated {
		full = ", SATURATED"
	}
	row("slots", "%d of %d taken (%.0f %%%s); capacity %s", s.Count, s.Capacity, 100*s.Pressure, full, knownBy(s.CapacityFrom))
	for i, line := range heldBy(s) {
		name := ""
		if i == 0 {
			name = "held by"
		}
		row(name, "%s", line)
	}
	row("blocks", "%d in force, %d observed, %d waiting for confirmation", s.Blocks, s.Watched, s.Pending)
	row("so far", "%d blocked, %d observed, %d spared, %d refused by the gate, %d not confirmed, %d lifted, %d expired",
		s.Counters.Blocked, s.Counters.Observed, s.Counters.Spared, s.Counters.Refused, s.Counters.Unconfirmed, s.Counters.Lifted, s.Counters.Expired)
	if s.Counters.LastRelief > 0 {
		row("last relief", "%s after the verdict, at %s", s.Counters.LastRelief.Round(time.Millisecond), clock(s.Counters.LastReliefAt))
	}
	for _, l := range s.Logs {
		state := "read to the end"
		if !l.CaughtUp {
			state = fmt.Sprintf("%d bytes behind", l.Behind)
		}
		row("log", "%s: %d lines, %s", l.Path, l.Lines, state)
	}
	fw := s.Firewall.Backend
	switch {
	case !s.Firewall.Real:
		fw += " (drops nothing)"
	case s.Firewall.Agrees:
		fw += ": holds what the store says (repaired " + count(int(s.Firewall.Repairs), "time", "times") + ")"
	default:
		fw += ": DIFFERS from the store: " + s.Firewall.Error
	}
	row("firewall", "%s", fw)
	if s.Sockets.Confirm {
		able := "connections can be ended"
		if !s.Sockets.CanDestroy {
			able = "connections cannot be ended"
		}
		row("sockets", "%d hold a slot; %s", s.Sockets.Holding, able)
	}
	w.Flush()
	for _, t := range s.Warnings {
		fmt.Fprintln(e.stdout, "warning:", t)
	}
	for _, f := range s.Faults {
		fmt.Fprintf(e.stdout, "error at %s: %s: %s\n", clock(f.Time), f.What, f.Err)
	}
}

// heldBy are the lines that say who holds slots: networks of which several
// addresses do, and other addresses. There are few while there is room.
func heldBy(s guard.Status) (lines []string) {
	most := 3
	if s.Saturated {
		most = 10
	}
	type holder struct {
		text      string
		held      int
		addresses int
	}
	var all []holder
	for _, n := range s.Networks {
		all = append(all, holder{fmt.Sprintf("%s  %d, of %d addresses", n.Prefix, n.Held, n.Addresses), n.Held, n.Addresses})
	}
	for _, h := range s.Holders {
		if !slices.ContainsFunc(s.Networks, func(n guard.Network) bool { return n.Prefix.Contains(h.Source) }) {
			all = append(all, holder{fmt.Sprintf("%s  %d", h.Source, h.Held), h.Held, 1})
		}
	}
	slices.SortStableFunc(all, func(a, b holder) int { return cmp.Compare(b.held, a.held) })
	left := max(s.Holding, len(s.Holders))
	for _, h := range all {
		if len(lines) >= most && left > h.addresses { // the last one takes no more than the line that counts it
			return append(lines, fmt.Sprintf("and %s more", count(left, "address", "addresses")))
		}
		lines = append(lines, h.text)
		left -= h.addresses
	}
	if left > 0 {
		lines = append(lines, fmt.Sprintf("and %s more", count(left, "address", "addresses")))
	}
	return lines
}

// knownBy says after "capacity" how it is known: by the detector's own words,
// or by the name of what states it.
func knownBy(how string) string {
	switch how {
	case detector.CapacityConfigured, detector.CapacityAssumed, detector.CapacityFromRefusals, detector.CapacityStated, detector.CapacityFromCount:
		return how
	}
	return "from " + how
}
