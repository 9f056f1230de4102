package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/allow"
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
