package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// AllowedAlone is what Guard.Allowed would list, for those who have no Guard:
// from the policy, the store, and this machine. Names stand for what they stood
// for when a daemon looked them up last. The error tells of what is not known;
// the rest is in the list.
func AllowedAlone(ctx context.Context, st *store.Store, p *policy.Policy, now time.Time) (list []netip.Prefix, err error) {
	var faults []error
	for _, e := range p.Allow {
		list = append(list, e.Prefix)
	}
	var names []allow.Name
	for _, e := range p.AllowNames {
		names = append(names, e.Name)
	}
	added, err := st.AllowList()
	if err != nil {
		faults = append(faults, fmt.Errorf("reading the allowlist: %w", err))
	}
	for _, a := range added {
		switch {
		case !a.In(now):
		case a.Name == "":
			list = append(list, a.Prefix)
		default:
			if n, err := allow.Parse(a.Name); err == nil {
				names = append(names, n)
			}
		}
	}
	for _, n := range names {
		var k allow.Kept
		v, err := st.Record(kindAllowAnswer, string(n))
		if err == nil && v != nil {
			err = json.Unmarshal(v, &k)
		}
		if err != nil || k.Answered.IsZero() {
			faults = append(faults, errors.Join(fmt.Errorf("nobody has found out yet which addresses %s allows", n), err))
		}
		for _, e := range k.Prefixes {
			if e.Prefix.IsValid() {
				list = append(list, e.Prefix)
			}
		}
	}
	own, err := Self(ctx)
	if err != nil {
		faults = append(faults, fmt.Errorf("this machine's own addresses: %w", err))
	}
	for _, e := range own {
		list = append(list, e.Prefix)
	}
	return list, errors.Join(faults...)
}

// standsAlone looks, where no daemon does, whether our rules are in the packet
// filter, and changes nothing. Where they should be and are not, drift says so.
func (g *Guard) standsAlone(ctx context.Context) bool {
	intact, err := g.fw.Intact(ctx)
	switch {
	case err != nil:
		g.drift.broken = fmt.Errorf("whether our rules are in the packet filter cannot be read: %w", err)
	case intact:
		return true
	case len(g.wanted(time.Now())) > 0:
		g.drift.broken = errors.New("no daemon runs, and our rules are gone from the packet filter, or were changed by somebody; `smtpguard firewall sync` puts them in place, and so does the daemon's start")
	}
	return false
}

// noteDiffers notes which blocks the packet filter does not hold, and what it
// holds and no block stands for.
func (g *Guard) noteDiffers(installed map[netip.Prefix]firewall.Installed, now time.Time) {
	for _, e := range g.wanted(now) {
		if _, ok := installed[e.Prefix]; !ok && e.Until.Sub(now) > time.Second {
			g.drift.fail(e.Prefix, false, errors.New("the packet filter does not hold it, and no daemon runs that would put it back; `smtpguard firewall sync` does"))
		}
	}
	for p, in := range installed {
		ends := !in.Until.IsZero() && in.Until.Sub(now) <= time.Second // the two clocks are not one
		if b, ok := g.blocks.get(p); (!ok || !g.holds(b, now)) && !ends {
			g.drift.fail(p, true, errors.New("no daemon runs that would take it out; `smtpguard firewall sync` does"))
		}
	}
}
