package guard

import (
	"context"
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/policy"
)

// busy opens 24 connections of each of four senders: 96 in all.
func (k *kernel) busy() {
	for i := 1; i <= 4; i++ {
		k.open(fmt.Sprintf("203.0.113.%d", i), 24)
	}
}

// Nobody said how many slots the server has: 96 connections are not all of
// them before it refuses somebody.
func TestCapacityUnknown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.g.o.Capacity = 0
		det, err := newDetector(w.g.o)
		if err != nil {
			t.Fatal(err)
		}
		w.g.det = det
		stop := w.run()
		defer stop()
		w.k.busy()
		time.Sleep(30 * time.Second)
		w.want("")
		s, err := w.g.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Decisions) == 0 || s.Decisions[0].What != Refused || s.Decisions[0].Reason != reasonCapacity {
			t.Errorf("decided %+v; want a refusal for %s", s.Decisions, reasonCapacity)
		}
		full := detector.Event{Kind: detector.Refused, Reason: detector.RefusedFull, Time: time.Now()}
		if err := w.g.do(t.Context(), func(ctx context.Context) { w.g.decide(ctx, w.g.det.Observe(&full), time.Now()) }); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		w.want("203.0.113.1/32 203.0.113.2/32 203.0.113.3/32 203.0.113.4/32")
	})
}

// A server that keeps slots in reserve refuses nobody for want of one: what it
// says when none but those are left tells that it is full; without a port in the
// line too.
func TestReserveStatesCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.g.o.Capacity = 0
		w.g.det = must(newDetector(w.g.o))
		defer w.run()()
		w.k.busy()
		time.Sleep(30 * time.Second)
		w.want("")
		w.lines(detector.Event{Time: time.Now(), Kind: detector.Closed, Reason: detector.ClosedRejected, Source: netip.MustParseAddr("192.0.2.9"), Capacity: 104})
		time.Sleep(15 * time.Second)
		w.want("203.0.113.1/32 203.0.113.2/32 203.0.113.3/32 203.0.113.4/32")
	})
}

// A local user who makes Exim log that it has 15 slots gets nobody blocked who
// holds a few of the 14 that are taken.
func TestForgedCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.g.o.Capacity = 0
		w.g.det = must(newDetector(w.g.o))
		defer w.run()()
		for a, n := range map[string]int{"198.51.100.9": 4, "203.0.113.1": 3, "192.0.2.1": 3, "100.64.0.1": 2, "10.9.9.9": 2} {
			w.k.open(a, n)
		}
		time.Sleep(10 * time.Second)
		for range 10 {
			w.lines(detector.Event{Time: time.Now(), Kind: detector.Closed, Reason: detector.ClosedRejected, Source: netip.MustParseAddr("192.0.2.77"), Port: 6, Capacity: 15})
			time.Sleep(5 * time.Second)
		}
		w.want("")
		if s := w.status(); s.Capacity != 100 {
			t.Errorf("%d slots, %s", s.Capacity, s.CapacityFrom)
		}
	})
}

// What is said later counts at once, in both directions; the policy is above it.
func TestSetCapacity(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		defer stop()
		if err := w.g.SetCapacity(t.Context(), 500, "Exim"); err != nil {
			t.Fatal(err)
		}
		w.k.busy()
		time.Sleep(30 * time.Second)
		w.want("")
		if err := w.g.SetCapacity(t.Context(), 100, "Exim"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second)
		w.want("203.0.113.1/32 203.0.113.2/32 203.0.113.3/32 203.0.113.4/32")
		p := policy.Default()
		p.Mode, p.Capacity = policy.Enforce, 300
		if later, err := w.g.Reload(t.Context(), p); err != nil || len(later.Restart) != 0 {
			t.Errorf("reload: %v, %v", later, err)
		}
		if err := w.g.SetCapacity(t.Context(), 20, "Exim"); err != nil {
			t.Fatal(err)
		}
		s, err := w.g.Status(t.Context())
		if err != nil || s.Capacity != 300 || s.CapacityFrom != "the policy" {
			t.Errorf("%d from %s, %v; want 300 from the policy", s.Capacity, s.CapacityFrom, err)
		}
	})
}

// The server got more slots than it stated to us: it was started anew, and is
// asked again at once; until it answers, its own count says that the number is
// wrong, and nobody is blocked for it.
func TestCapacityOutdated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Confirm = policy.ConfirmOff })
		w.g.o.Capacity = 20
		det, err := newDetector(w.g.o)
		if err != nil {
			t.Fatal(err)
		}
		w.g.det = det
		var asked atomic.Int64
		w.g.o.AskCapacity = func() { asked.Add(1) }
		defer w.run()()
		w.lines(detector.Event{Kind: detector.DaemonStarted, Time: time.Now()})
		time.Sleep(time.Second)
		if n := asked.Load(); n != 1 {
			t.Errorf("asked %d times after a start", n)
		}
		w.lines(opens("203.0.113.1", 22, 1)...)
		time.Sleep(30 * time.Second)
		w.want("")
		if d := w.status().Decisions; len(d) == 0 || d[0].What != Refused || d[0].Reason != reasonCapacity {
			t.Errorf("decided %+v; want a refusal for %s", d, reasonCapacity)
		}
		time.Sleep(5 * time.Minute)
		if n := asked.Load(); n < 3 || n > 8 {
			t.Errorf("asked %d times within five minutes of a count that is higher", n)
		}
		if err := w.g.SetCapacity(t.Context(), 25, "the test"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Second)
		w.want("203.0.113.1/32")
	})
}
