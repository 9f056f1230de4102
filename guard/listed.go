package guard

import (
	"errors"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/policy"
)

// listedEvery is how often the lists of other programs (CSF's) are looked at:
// whom their administrator lets in there waits for us no longer than that.
const listedEvery = 2 * time.Second

// listedKept is how long whom such a list named stays allowed after it named
// him last: programs write their lists anew, and are interrupted.
const listedKept = selfKept

// listed is whom other programs' lists allow.
type listed struct {
	entries []listedEntry
	err     string    // of the last look
	told    time.Time // when err was told
}

type listedEntry struct {
	Listed
	seen time.Time
}

// Listed is an entry of another program's list.
type Listed struct {
	policy.AllowEntry
	// Passing: the list itself ends it, and may have none of its kind.
	Passing bool
}

// relist forgets whom the lists do not name now: the operator has reloaded.
func (g *Guard) relist(now time.Time) {
	if g.o.Listed == nil {
		return
	}
	if _, err := g.o.Listed(now); err == nil {
		g.listed.entries = nil
	}
}

// refreshListed looks at the lists, and reports whether they now name others.
// While they cannot be read, or are empty all at once, nobody is forgotten. Whom
// the policy names, as it was read with the lists of that time, is left to it.
func (g *Guard) refreshListed(now time.Time) (changed bool) {
	if g.o.Listed == nil {
		return false
	}
	found, err := g.o.Listed(now)
	l := &g.listed
	lasting := func(e Listed) bool { return !e.Passing }
	if err == nil && !slices.ContainsFunc(found, lasting) && slices.ContainsFunc(l.entries, func(e listedEntry) bool { return lasting(e.Listed) }) {
		err = errors.New("they name nobody any more: are they gone, or cut off? `systemctl reload smtpguard` if it is meant")
	}
	have := make(map[netip.Prefix]bool, len(g.policy.Allow)+len(found))
	for _, e := range g.policy.Allow {
		have[e.Prefix] = true
	}
	old := make(map[netip.Prefix]bool, len(l.entries))
	for _, e := range l.entries {
		old[e.Prefix] = true
	}
	var next []listedEntry
	for _, e := range found {
		if have[e.Prefix] {
			continue
		}
		have[e.Prefix] = true
		next = append(next, listedEntry{e, now})
		changed = changed || !old[e.Prefix]
	}
	for _, e := range l.entries {
		switch {
		case have[e.Prefix]:
		case err != nil:
			e.seen = now
			next = append(next, e)
		case now.Sub(e.seen) < listedKept:
			next = append(next, e)
		default:
			changed = true
		}
	}
	l.entries = slices.Clip(next)
	switch {
	case err == nil:
		l.err = ""
	case l.err != err.Error() || now.Sub(l.told) >= time.Hour:
		l.err, l.told = err.Error(), now
		g.fault("reading whom other programs' lists allow; who was allowed stays so", err)
	}
	return changed
}
