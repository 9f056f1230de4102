package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// A rule that has gone mad is told from a flood by whom it hits. A flood of
// five on a quiet server is all of its sources, and still five that never
// delivered a mail. A rule that is too strict hits those who do, sooner or
// later many of them. So only blocks of senders in good standing count: more
// than one message, the first more than an hour ago, so that a flooder cannot
// get there by one mail in passing, and the last within a day.
const (
	standingAfter  = time.Hour
	standingFor    = 24 * time.Hour
	standingMails  = 2
	standingWindow = 10 * time.Minute
	standingLeast  = 3 // so many must be hit, whatever their share
	standingCount  = time.Minute
	lightShare     = 0.05 // of the slots, on average over the rule's window
	lightOpens     = 60   // connections a minute

	stopFor  = 30 * time.Minute
	stopMost = 8 * time.Hour
	stopMind = 24 * time.Hour // a stop this soon after another one lasts twice as long
)

// standing watches what blocks by rules do to senders in good standing, and
// stops rules altogether when they do too much.
type standing struct {
	hits    []hit // of the window, oldest first
	all     int   // senders in good standing
	counted time.Time
	stop    Stop
	changed bool // stop is not written down yet
}

// hit is a sender in good standing that a rule blocked.
type hit struct {
	at   time.Time
	addr netip.Addr
}

// Stop says that rules block nothing for a time, because they blocked too many
// senders in good standing. The zero Stop never was.
type Stop struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"`
	Why   string    `json:"why"`
	// Pardoned is who ended it before its time, "" if nobody did.
	Pardoned string `json:"pardoned,omitempty"`
}

// In reports whether rules are stopped at t.
func (s Stop) In(t time.Time) bool { return t.Before(s.Until) && !wentBack(s.Since, t) }

func (s *standing) stoppedAt(p netip.Prefix, now time.Time) *Refusal {
	if !s.stop.In(now) {
		return nil
	}
	return &Refusal{Reason: reasonStopped, Prefix: p, Why: "rules block nothing until " + s.stop.Until.Format(time.RFC3339) + ": " + s.stop.Why,
		Hint: "put the rule right and `smtpguard resume`"}
}

// inStanding reports whether a sender is in good standing at t, a time of the
// log.
func inStanding(g detector.GoodSender, t time.Time) bool {
	return g.Messages >= standingMails && t.Sub(g.First) >= standingAfter && t.Sub(g.Last) < standingFor
}

// light reports whether a source did so little that its verdict says more of
// the rule than of it. Where more slots are taken than there are said to be,
// the capacity is wrong, and so would be a share of it.
func light(v *detector.Verdict) bool {
	if v.Metric == detector.Opens {
		return v.Score < lightOpens*v.Window.Minutes()
	}
	return v.Score*float64(v.Capacity) < lightShare*float64(max(v.Capacity, v.Count))
}

// admits refuses the block that would hit too many, and stops all others.
func (s *standing) admits(v *detector.Verdict, det *detector.Detector, share float64, now time.Time) *Refusal {
	if share >= 1 || !light(v) {
		return nil
	}
	s.hits = slices.DeleteFunc(s.hits, func(h hit) bool { return now.Sub(h.at) >= standingWindow })
	var fresh []hit
	for _, good := range det.Explain(v.Source).KnownGood { // sixteen at most: enough to stop
		known := func(h hit) bool { return h.addr == good.Addr }
		if inStanding(good, v.Time) && !slices.ContainsFunc(s.hits, known) {
			fresh = append(fresh, hit{now, good.Addr})
		}
	}
	if len(fresh) == 0 {
		return nil
	}
	if s.counted.IsZero() || now.Sub(s.counted).Abs() >= standingCount {
		s.all, s.counted = 0, now
		for g := range det.KnownGood() {
			if inStanding(g, v.Time) {
				s.all++
			}
		}
	}
	n := len(s.hits) + len(fresh)
	all := max(s.all, n)
	if n < standingLeast || float64(n) <= share*float64(all) {
		s.hits = append(s.hits, fresh...)
		return nil
	}
	length := stopFor
	if !s.stop.Since.IsZero() && s.stop.Pardoned == "" && now.Sub(s.stop.Until) < stopMind {
		length = min(2*s.stop.Until.Sub(s.stop.Since), stopMost)
	}
	s.stop = Stop{Since: now, Until: now.Add(length).Truncate(time.Second), Why: fmt.Sprintf(
		"with %s they would have blocked %d of %d senders in good standing within ten minutes, more than block.max_good_share (%.3g)",
		v.Source, n, all, share)}
	s.hits, s.changed = nil, true
	return s.stoppedAt(v.Source, now)
}

// keyStop is the key under which a Stop survives a restart: whoever lets the
// service be restarted after every crash would otherwise undo it.
const keyStop = "stop"

// loadStop reads what a Guard before this one decided.
func (g *Guard) loadStop() {
	v, err := g.o.Store.Meta(keyStop)
	if err == nil && v != nil {
		err = json.Unmarshal(v, &g.gate.standing.stop)
	}
	if err != nil {
		g.fault("reading whether rules are stopped", err)
	}
}

func (g *Guard) saveStop() error {
	v, err := json.Marshal(g.gate.standing.stop)
	if err == nil {
		err = g.o.Store.SetMeta(keyStop, v)
	}
	return err
}

// shout tells, once, that rules are stopped.
func (g *Guard) shout() {
	s := &g.gate.standing
	if !s.changed {
		return
	}
	s.changed = false
	if err := g.saveStop(); err != nil {
		g.fault("writing down that rules are stopped", err)
	}
	g.fault("rules are stopped until "+s.stop.Until.Format(time.RFC3339)+"; `smtpguard resume` ends that", errors.New(s.stop.Why))
	g.tellSystemd()
}

// Resume lets rules block again after they were stopped, and reports whether
// they were.
func (g *Guard) Resume(ctx context.Context, by string) (stopped bool, err error) {
	doErr := g.do(ctx, func(context.Context) { stopped, err = g.resume(by, time.Now()) })
	return stopped, errors.Join(doErr, err)
}

func (g *Guard) resume(by string, now time.Time) (bool, error) {
	s := &g.gate.standing
	if !s.stop.In(now) {
		return false, nil
	}
	before := s.stop
	s.stop.Until, s.stop.Pardoned = now, by
	if err := g.saveStop(); err != nil {
		s.stop = before
		return true, fmt.Errorf("that rules may block again could not be written down, and they stay stopped: %w", err)
	}
	s.hits = nil
	g.log.Info("rules block again", "by", by)
	g.tellSystemd()
	return true, nil
}
