package guard

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// fullQuiet is how long the server may be full without a block before status
// says why there is none.
const fullQuiet = 30 * time.Second

// unrelieved says why nobody was blocked although the server has been full for
// a while, and who is kept from being blocked by the allowlist meanwhile.
func (g *Guard) unrelieved(now time.Time) (w []string) {
	since := g.full.since
	if since.IsZero() || now.Sub(g.full.last) > lookedLate {
		return nil
	}
	allowed, other := g.notBlocked(since)
	if allowed != nil {
		w = append(w, fmt.Sprintf("while the server is full, %s is not blocked, because it is allowed: %s (`smtpguard allow list`)", allowed.Prefix, allowed.Why))
	}
	if took := now.Sub(since); took >= fullQuiet && !g.blockedSince(since, now) {
		if why := g.nearestReason(now, other); why != "" {
			w = append(w, fmt.Sprintf("the server has been full for %s and nobody was blocked: %s", took.Round(time.Second), why))
		}
	}
	return w
}

// notBlocked returns the last verdicts since a time that came to nothing: by
// the allowlist, and for another reason.
func (g *Guard) notBlocked(since time.Time) (allowed, other *Decision) {
	for i := range g.recent {
		switch d := &g.recent[i]; {
		case d.Time.Before(since) || d.Rule == "":
		case d.What == Refused && d.Reason == reasonAllowed:
			allowed = d
		case d.What == Refused, d.What == Spared, d.What == Unconfirmed, d.What == Failed:
			other = d
		}
	}
	return allowed, other
}

// blockedSince reports whether there is a block, or one that was observed, that
// was made after a time.
func (g *Guard) blockedSince(since, now time.Time) bool {
	for _, b := range g.blocks.table.All() {
		if !b.Since.Before(since) && now.Before(b.Until) {
			return true
		}
	}
	return false
}

// nearestReason says what is nearest to a block, and what keeps it from one.
func (g *Guard) nearestReason(now time.Time, last *Decision) string {
	if len(g.pending) > 0 {
		return fmt.Sprintf("the verdict on %s waits for the socket table to confirm it", g.pending[0].verdict.Source)
	}
	if last != nil {
		return fmt.Sprintf("the last verdict, on %s, was %s: %s", last.Prefix, last.What, last.Why)
	}
	var near Source
	for _, s := range g.holders(10) {
		p := netip.PrefixFrom(s.Source, s.Source.BitLen())
		for _, r := range g.det.Explain(p).Rules { // those on the nets around it too
			if near.Threshold == 0 || r.Score*near.Threshold > near.Score*r.Threshold {
				near = Source{Prefix: r.Source, Rule: r.Rule, Metric: r.Metric, Score: r.Score, Threshold: r.Threshold}
			}
		}
	}
	if near.Threshold == 0 {
		return "no rule applies to those who hold the slots"
	}
	by := fmt.Sprintf("%.0f %% of the slots on average, threshold %.0f %%", 100*near.Score, 100*near.Threshold)
	if near.Metric == detector.Opens {
		by = fmt.Sprintf("%.0f connections, threshold %.0f", near.Score, near.Threshold)
	}
	near = g.standing(near, now)
	why := fmt.Sprintf("nearest to a verdict is %s by rule %s with %s", near.Prefix, near.Rule, by)
	switch {
	case near.Allowed:
		why += "; it is allowed, or somebody in it is"
	case near.KnownGood > 0:
		why += "; there is a known good sender in it"
	}
	return why + fmt.Sprintf(" (`smtpguard explain %s`, `smtpguard diagnose`)", near.Prefix)
}

// nobodyListens reports whether the kernel says that no program takes
// connections on the SMTP ports; where it cannot be asked, false.
func (g *Guard) nobodyListens(ctx context.Context) bool {
	l, ok := g.o.Sockets.(interface {
		Listens(ctx context.Context, ports []uint16) (bool, error)
	})
	if !ok {
		return false
	}
	yes, err := l.Listens(ctx, g.policy.Ports)
	return err == nil && !yes
}
