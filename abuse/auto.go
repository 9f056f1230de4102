package abuse

import (
	"fmt"
	"slices"
	"strings"
)

// waits says why a draft is not approved by the program but waits for a person,
// "" if it does not. It is asked under the same lock as the approval; what bars
// every approval (see barred, blockedDesk) is not repeated here. d.mu is held.
func (d *Desk) waits(c *Case) string {
	m := c.mail()
	if m == nil || c.State != Drafted {
		return "there is no draft"
	}
	to, human := m.To, m.To.Source == overridesSource
	for _, r := range []Contact{m.To, m.Cc} {
		if d.config.isOwn(r.Address) {
			return r.Address + ownWarning
		}
	}
	switch {
	case m.Hand != "":
		return m.Hand + " has changed or approved it before"
	case m.Tried != "":
		return "reports.redirect sent it to " + m.Tried + ", and no desk has it"
	case m.Chosen != "":
		return m.Chosen + " chose whom to write to"
	case slices.ContainsFunc(m.Attempts, func(a Attempt) bool { return !a.Trial }):
		return "it was handed over before"
	case to.Address == "":
		return "there is no recipient"
	case to.Guess, !strings.Contains(to.Role, "abuse"):
		return to.Address + " is not known to be an abuse contact"
	case to.Stale:
		return to.Address + " could not be confirmed"
	case !to.covers(c.of(m).prefixes()):
		return to.Address + " is the contact of a part only"
	case to.Form != "" && !human:
		return "the desk prefers its form: " + to.Form
	case c.Again.Missing != "":
		return "an answer is missing: " + c.Again.Missing
	case m.Origin.Disputed:
		return "the origin is disputed"
	case !c.Certain, m.Origin.AS != c.AS || m.Origin.Prefix != c.Network, !human && !confirmed(m.Origin):
		return "it is not certain who announces the network"
	case d.config.Lookup.Online && len(m.Servers) == 0:
		return "the mail servers of " + domainOf(to.Address) + " are not known"
	case m.Facts.Connections < d.config.Auto.Connections || c.BlockCount < d.config.Auto.Blocks:
		return "it is below reports.auto"
	case observed(c):
		return "nothing was blocked"
	}
	return d.outside(c)
}

// waitsStill says what has come up since the program approved a mail that a cap
// has held back, nil: nothing. d.mu is held.
func (d *Desk) waitsStill(c *Case) *Refusal {
	m := c.mail()
	if d.blockedDesk(c, m); len(m.Desk) > 0 {
		return &Refusal{fmt.Sprintf("the desk's own mail server %s"+deskWarning, m.Desk[0]), m.letIn(m.Desk[0])}
	}
	if why := d.outside(c); why != "" {
		return &Refusal{why, "read it, and approve it yourself if it should go"}
	}
	return nil
}

// outside says what beside the draft itself stands against its being sent
// unread, "" if nothing does. d.mu is held.
func (d *Desk) outside(c *Case) string {
	m := c.mail()
	if bounced, until := d.bad(m.To.Address); bounced {
		return fmt.Sprintf("%s bounced; it is left alone until %s", m.To.Address, until.UTC().Format("2006-01-02"))
	}
	for _, p := range c.of(m).prefixes() {
		if s := d.spared(p); s.IsValid() {
			return s.String() + " inside it is allowed"
		}
	}
	if w := d.withdrawal(c); w != nil {
		return w.String()
	}
	for _, o := range d.cases {
		if o.ID != c.ID && o.open(d.now(), d.config.Quiet) && o.mail() != nil && o.mail().Hand != "" && o.Network.Overlaps(c.Network) {
			return o.ID + " is of the same network, and a person has a hand on it"
		}
	}
	return ""
}

// confirmed reports whether the origin is an announcement that a source saw
// today, not only a range of a database.
func confirmed(o Origin) bool {
	return slices.ContainsFunc(o.Claims, func(c Claim) bool {
		return c.Announced && !c.Stale && c.Prefix == o.Prefix && len(c.Origins) > 0 && c.Origins[0] == o.AS
	})
}

// waitsMark begins Case.Why of a draft that the program does not approve.
const waitsMark = "waits for a person: "

// sayWaits shows why a draft is not approved by the program, where nothing else
// is said of it; d.mu is held.
func (d *Desk) sayWaits(c *Case, why string) {
	if c.Why != "" && !strings.HasPrefix(c.Why, waitsMark) || c.Why == waitsMark+clean(why, 250) {
		return
	}
	c.Why = waitsMark + clean(why, 250)
	if err := d.save(c); err != nil {
		d.log.Error("a report is not written down", "err", err)
		return
	}
	d.log.Info("a report waits for a person", "report", c.ID, "why", why)
}
