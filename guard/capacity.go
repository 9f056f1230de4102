package guard

import (
	"context"
	"fmt"

	"github.com/smtpguard/smtpguard/detector"
)

// unproven refuses a verdict on slots while nobody has said how many there
// are, and the server has not shown that it is full: what looks like all of
// its slots may be a fifth of them.
func unproven(v *detector.Verdict) *Refusal {
	if !v.Unproven {
		return nil
	}
	return &Refusal{Prefix: v.Source, Reason: reasonCapacity,
		Why:  fmt.Sprintf("how many slots the server has is not known, and it refused nobody for want of one in the last %s", v.Window),
		Hint: "state capacity: in the policy (Exim's smtp_accept_max)"}
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
