package abuse

import (
	"fmt"
	"net/netip"
)

// leaveOut takes the blocks that are never reported (allowed since, ours, or of
// a network that the overrides file names) out of a case, as long as others
// stay, and notes it. It returns why: "" if there are none. d.mu is held, and
// the caller saves c.
func (d *Desk) leaveOut(c *Case, o Origin, overrides []Override) (why string) {
	out := map[netip.Prefix]bool{}
	ases := c.ases(o)
	var words []string
	live := c.prefixes()
	for _, p := range live {
		if w := d.unreportable(p, ases, overrides, c.mail()); w != "" {
			out[p] = true
			if why == "" {
				why = w
			}
			words = append(words, shown(p))
		}
	}
	if len(out) == 0 || len(out) == len(live) {
		return why
	}
	c.give(func(r Ref) bool {
		i := within(live, r.Prefix.Masked().Addr())
		return !r.Pardoned && i >= 0 && out[live[i]]
	})
	c.note(fmt.Sprintf("left out: %s (%s)", someOf(words), why))
	if m := c.mail(); m != nil && (c.State == Drafted || c.State == Approved) {
		m.Outdated = true
	}
	return why
}

// someOf names the first of many.
func someOf(words []string) string {
	const most = 4
	s := ""
	for i, w := range words[:min(len(words), most)] {
		if i > 0 {
			s += ", "
		}
		s += w
	}
	if more := len(words) - most; more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// without makes what a mail is refused for no obstacle any more, if it is only
// some of its blocks that are not reported: the draft is made anew of the
// others. d.mu is held.
func (d *Desk) without(now *Case, r *Refusal) (*Refusal, error) {
	overrides, err := d.overridden()
	if err != nil {
		return r, nil
	}
	c := now.clone()
	n := len(c.Blocks)
	d.leaveOut(c, c.mail().Origin, overrides)
	if len(c.Blocks) == n {
		return r, nil
	}
	if c.State == Approved {
		c.mail().Approved, c.Why = "", r.Why
		c.move(Drafted, Self, "not sent: "+r.Why, d.now())
	}
	if err := d.save(c); err != nil {
		return r, err
	}
	*now = *c
	delete(d.retry, c.ID)
	d.poke()
	return &Refusal{r.Why, "it is left out, and the draft made anew within a minute; look at it again with `smtpguard reports show " + c.ID + "`"}, nil
}
