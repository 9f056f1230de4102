package abuse

import (
	"slices"
	"time"
)

// Again is a lookup of a case that failed and is repeated. The zero value:
// nothing is missing.
type Again struct {
	// Missing is whose answer is missing, and why.
	Missing string    `json:"missing,omitempty"`
	Tries   int       `json:"tries,omitempty"`
	Next    time.Time `json:"next,omitzero"`
}

// How lookups are repeated: after 5, 15, 45 minutes and so on, a day at most.
const (
	againFirst = 5 * time.Minute
	againMost  = 24 * time.Hour
	// againHeld is how many of them a draft waits for while nobody says who
	// announces the network; then it is made of what is known: for about an
	// hour. againTries is when nobody is asked any more by itself.
	againHeld  = 4
	againTries = 10
)

// askAgain notes what a lookup gave: if an answer is missing, it is asked for
// again later. d.mu is held; the caller saves.
func (d *Desk) askAgain(c *Case, f finding) {
	if f.unanswered == "" {
		c.Again = Again{}
		return
	}
	wait := againFirst
	for range min(c.Again.Tries, againTries) {
		wait = min(3*wait, againMost)
	}
	c.Again = Again{Missing: f.unanswered, Tries: c.Again.Tries + 1, Next: d.now().Add(wait)}
}

// waitsForOrigin holds a case without a draft as long as a lookup of its origin
// is worth repeating. It reports whether it does.
func (d *Desk) waitsForOrigin(id string, f finding) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cases[id]
	if c == nil || f.unanswered == "" || len(c.Mails) > 0 || c.Again.Tries+1 >= againHeld {
		return false
	}
	d.askAgain(c, f)
	d.hold(id, "it is not known yet who announces "+shown(reported(c))+" ("+f.unanswered+"); asked again at "+c.Again.Next.UTC().Format("15:04 UTC"))
	return true
}

// again reports whether the recipients of a draft that a lookup left incomplete
// are to be asked for once more; d.mu is held.
func (c *Case) again(now time.Time) bool {
	return c.Again.Missing != "" && c.Again.Tries < againTries && !now.Before(c.Again.Next)
}

// asks reports whether a draft that is made anew needs a lookup: not if its
// recipients are certain, of late, and still those of all that is reported.
func (c *Case) asks(now time.Time) bool {
	m := c.mail()
	switch {
	case m.Chosen != "": // whom a lookup would name does not matter
		return false
	case c.Again.Missing != "", m.Origin.AS == 0, m.To.Address == "", m.To.Stale:
		return true
	}
	return !m.To.covers(c.next().prefixes()) || now.Sub(m.To.At) >= contactFresh
}

// joins reports whether the case can become part of another one of the same
// network: nobody has put a hand on it, and nothing of it may have left.
func (c *Case) joins() bool {
	switch c.State {
	case Gathering, Held:
		return len(c.Mails) == 0
	case Drafted:
		m := c.mail()
		return len(c.Mails) == 1 && m.Hand == "" && !slices.ContainsFunc(m.Attempts, func(a Attempt) bool { return !a.Trial })
	}
	return false
}
