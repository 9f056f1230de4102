package guard

import (
	"context"
	"fmt"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// unproven refuses a verdict on slots while nobody has said how many there
// are, or the server itself has counted more, and it has not shown that it is
// full: what looks like all of its slots may be a fifth of them.
func unproven(v *detector.Verdict, det *detector.Detector) *Refusal {
	r := Refusal{Prefix: v.Source, Reason: reasonCapacity, Hint: "state capacity: in the policy (Exim's smtp_accept_max)"}
	nobody := fmt.Sprintf("it refused nobody for want of one in the last %s", v.Window)
	switch {
	case v.Metric != detector.Saturation:
		return nil
	case v.Unproven:
		r.Why = "how many slots the server has is not known, and " + nobody
	case det.Disproved(v.Window):
		r.Why = fmt.Sprintf("the server has more than %d slots, as it has counted %d connections at once, and %s", v.Capacity, det.Stats().Counted, nobody)
	default:
		return nil
	}
	return &r
}

// SetCapacity says that the server has n slots, and who says so. The policy's
// word stays above it; 0 takes back what was said.
func (g *Guard) SetCapacity(ctx context.Context, n int, from string) error {
	return g.do(ctx, func(context.Context) {
		if g.policy.Capacity == 0 {
			g.setCapacity(n, from)
		}
	})
}

func (g *Guard) setCapacity(n int, from string) {
	if n <= 0 {
		n, from = 0, ""
	}
	g.o.Capacity, g.o.CapacityFrom = n, from
	g.det.SetCapacity(n)
}

// asking is when the MTA is asked for its number of slots.
type asking struct {
	wanted bool
	last   time.Time
}

// The MTA is asked again this long after it was, at the earliest: when it was
// started anew, and when it goes on to count more than it said.
const (
	askedLeast = 5 * time.Second
	askedAgain = time.Minute
)

// askCapacity has the MTA asked where its number of slots may be another one
// than it said. Its settings change with its start, and a number that is too
// low takes it for full.
func (g *Guard) askCapacity(now time.Time) {
	a := &g.asking
	n, _ := g.det.Capacity()
	more := max(g.det.Stats().Counted, g.det.Count()) > n
	switch since := now.Sub(a.last); {
	case a.wanted && since >= askedLeast:
	case more && since >= askedAgain:
	default:
		return
	}
	a.wanted, a.last = false, now
	if g.o.AskCapacity != nil {
		g.o.AskCapacity()
	}
}
