package detector

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

var t0 = time.Date(2026, 11, 22, 19, 43, 0, 0, time.UTC)

// sim is a mail server of 100 slots, which tells a detector what happens.
type sim struct {
	t       *testing.T
	d       *Detector
	now     time.Time
	slots   int
	held    []conn // gen is not used
	port    uint16
	block   bool // verdicts work at once
	blocked []netip.Prefix
	told    []Verdict
}

func newSim(t *testing.T, cfg Config) *sim {
	if cfg.Rules == nil {
		cfg.Rules = DefaultRules()
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return &sim{t: t, d: d, now: t0, slots: 100, port: 1024, block: true}
}

func (s *sim) event(ev Event) {
	ev.Time = s.now
	for _, v := range slices.Clone(s.d.Observe(&ev)) {
		s.told = append(s.told, v)
		if len(v.Spared) == 0 && s.block {
			s.blocked = append(s.blocked, v.Source)
			s.held = slices.DeleteFunc(s.held, func(c conn) bool { return v.Source.Contains(c.addr) })
			s.d.Forget(v.Source)
		}
	}
}

func (s *sim) isBlocked(a netip.Addr) bool {
	return slices.ContainsFunc(s.blocked, func(p netip.Prefix) bool { return p.Contains(a) })
}

// open connects a; it is refused if all slots are taken, and does not get
// through if it is blocked.
func (s *sim) open(a netip.Addr) {
	switch {
	case s.isBlocked(a):
	case len(s.held) >= s.slots:
		s.event(Event{Kind: Refused, Reason: RefusedFull, Source: a})
	default:
		s.port++
		s.held = append(s.held, conn{addr: a, port: s.port, from: s.now.UnixNano()})
		s.event(Event{Kind: Opened, Source: a, Port: s.port, Count: len(s.held)})
	}
}

// close ends the oldest connection of a.
func (s *sim) close(a netip.Addr) {
	if i := slices.IndexFunc(s.held, func(c conn) bool { return c.addr == a }); i >= 0 {
		c := s.held[i]
		s.held = slices.Delete(s.held, i, i+1)
		s.event(Event{Kind: Closed, Source: a, Port: c.port, Reason: ClosedQuit})
	}
}

func (s *sim) deliver(a netip.Addr) { s.event(Event{Kind: Accepted, Source: a}) }

func (s *sim) holds(a netip.Addr) (n int) {
	for _, c := range s.held {
		if c.addr == a {
			n++
		}
	}
	return n
}

// pass lets time go by in steps, with f called at each.
func (s *sim) pass(total, step time.Duration, f func()) {
	for end := s.now.Add(total); s.now.Before(end); {
		s.now = s.now.Add(step)
		s.event(Event{Kind: Tick})
		if f != nil {
			f()
		}
	}
}

func (s *sim) sentences() string {
	var b strings.Builder
	for i := range s.told {
		fmt.Fprintf(&b, "\n\t%6.1f s %s: %s", s.told[i].Time.Sub(t0).Seconds(), s.told[i].Rule, s.told[i].Sentence())
	}
	return b.String()
}

// want checks which addresses are blocked and which are not.
func (s *sim) want(bad, good []netip.Addr) {
	s.t.Helper()
	for _, a := range bad {
		if !s.isBlocked(a) {
			s.t.Errorf("%s is not blocked", a)
		}
	}
	for _, a := range good {
		if s.isBlocked(a) {
			s.t.Errorf("%s is blocked", a)
		}
	}
	if s.t.Failed() {
		s.t.Logf("verdicts:%s", s.sentences())
	}
}

// addrs makes n addresses from a format with one number.
func addrs(format string, from, n int) (l []netip.Addr) {
	for i := range n {
		l = append(l, netip.MustParseAddr(fmt.Sprintf(format, from+i)))
	}
	return l
}

// keep opens connections until each of l holds n.
func (s *sim) keep(l []netip.Addr, n int) {
	for _, a := range l {
		for i := s.holds(a); i < n; i++ {
			s.open(a)
		}
	}
}

func TestFiveSilentAddresses(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	five := addrs("10.66.%d.9", 1, 5)
	s.keep(five, 20)
	s.pass(10*time.Second, 10*time.Second, nil) // and nothing is logged
	s.want(five, nil)
	if len(s.blocked) != 5 {
		t.Errorf("blocked %v", s.blocked)
	}
	if s.d.Held() != 0 || s.d.Count() != 0 {
		t.Errorf("%d held, count %d, though all are blocked", s.d.Held(), s.d.Count())
	}
	for _, v := range s.told {
		if v.Time.Sub(t0) > 8*time.Second || v.Held != 20 || v.Capacity != 100 || len(v.Evidence) != maxEvidence {
			t.Errorf("%+v", v)
		}
	}
}

// The whole flood is over when the log speaks again.
func TestLongSilence(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	s.block = false
	hog := addrs("10.66.9.%d", 9, 1)
	s.keep(hog, 97)
	s.now = s.now.Add(30 * 24 * time.Hour)
	s.event(Event{Kind: Tick}) // a jump: waits for the next
	s.event(Event{Kind: Tick})
	if len(s.told) == 0 || s.told[0].Time.Sub(t0) > 2*time.Second {
		t.Errorf("verdicts:%s", s.sentences())
	}
	if len(s.told) > 100 {
		t.Errorf("%d verdicts for one silence", len(s.told))
	}
}

func TestManyNetworksOfOnePrefix(t *testing.T) {
	for _, format := range []string{"2001:db8:7:%x::1", "2001:db8:7:%x00::1"} {
		t.Run(format, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			n := 300
			if strings.Contains(format, "00::") {
				n = 250
			}
			bots := addrs(format, 1, n)
			proper := addrs("198.51.100.%d", 1, 3)
			s.pass(2*time.Minute, time.Second, func() {
				for _, a := range proper {
					s.open(a)
					s.deliver(a)
					s.close(a)
				}
				if s.now.Sub(t0) > 10*time.Second {
					for range 20 {
						a := bots[rand.N(len(bots))]
						if s.holds(a) == 0 {
							s.open(a)
						}
					}
				}
			})
			s.want(nil, proper)
			if len(s.blocked) == 0 || len(s.blocked) > 3 || s.blocked[0].Bits() > 56 {
				t.Errorf("blocked %v", s.blocked)
			}
			if len(s.held) > 90 {
				t.Errorf("%d slots are held still", len(s.held))
			}
		})
	}
}

func TestTwoNetworksAndASlash64(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	bots := slices.Concat(addrs("10.66.1.%d", 1, 20), addrs("10.66.2.%d", 1, 20), addrs("2001:db8:0:1::%x", 1, 20))
	proper := slices.Concat(addrs("10.66.3.%d", 1, 20), addrs("2001:db8:0:2::%x", 1, 20))
	s.block = false
	s.pass(30*time.Second, time.Second, func() {
		s.keep(proper[:1+rand.N(3)], 1)
		s.keep(bots, 2)
		for _, a := range proper {
			s.close(a)
		}
	})
	for _, v := range s.told {
		s.blocked = append(s.blocked, v.Source)
		if !slices.Contains([]string{"10.66.1.0/24", "10.66.2.0/24", "2001:db8:0:1::/64"}, v.Source.String()) {
			t.Errorf("told %s", v.Sentence())
		}
	}
	s.want(bots, proper)
}

func TestKnownGoodInTheSameNetwork(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	bots, proper := addrs("192.0.2.%d", 1, 50), addrs("192.0.2.%d", 101, 36)
	for _, a := range proper {
		s.open(a)
		s.deliver(a)
		s.close(a)
	}
	s.pass(90*time.Second, 500*time.Millisecond, func() {
		s.keep(bots, 2)
		for range 5 {
			a := proper[rand.N(len(proper))]
			s.open(a)
			s.deliver(a)
			s.close(a)
		}
	})
	s.want(bots, proper)
	if i := slices.IndexFunc(s.told, func(v Verdict) bool { return len(v.Spared) > 0 }); i < 0 {
		t.Error("nothing is said of those who were spared")
	} else if v := s.told[i]; v.Source != netip.MustParsePrefix("192.0.2.0/24") || v.KnownGood != 36 || len(v.Spared) != maxSpared {
		t.Errorf("spared: %+v", v)
	}
}

func TestKnownGoodSlash64(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	bots := addrs("2001:db8:7:%x::1", 1, 200)
	proper := netip.MustParseAddr("2001:db8:7:fff::25")
	s.d.LearnGood(proper, t0.Add(-time.Hour), t0.Add(-time.Hour), 3)
	s.pass(60*time.Second, 500*time.Millisecond, func() { s.keep(bots, 1) })
	for _, p := range s.blocked {
		if p.Contains(proper) {
			t.Errorf("blocked %s", p)
		}
	}
	if len(s.held) > 90 {
		t.Errorf("%d slots are held still; blocked %v", len(s.held), s.blocked)
	}
}

// One mail buys no place for ever: not for an address, not in a network.
func TestBoughtGood(t *testing.T) {
	t.Run("address", func(t *testing.T) {
		s := newSim(t, Config{Capacity: 100})
		a := addrs("192.0.2.%d", 1, 1)
		s.deliver(a[0])
		s.keep(a, 40)
		s.keep(addrs("10.%d.0.1", 1, 60), 1)
		s.pass(10*time.Second, time.Second, nil)
		s.want(a, addrs("10.%d.0.1", 1, 60))
	})
	t.Run("network", func(t *testing.T) {
		s := newSim(t, Config{Capacity: 100})
		bots := addrs("192.0.2.%d", 1, 100)
		for _, a := range bots {
			s.deliver(a)
		}
		s.pass(8*time.Minute, time.Second, func() { s.keep(bots, 1) })
		if len(s.held) > 90 {
			t.Errorf("%d slots are held still by %d blocked", len(s.held), len(s.blocked))
		}
	})
}

// Nobody here is a flood.
func TestInnocent(t *testing.T) {
	for _, c := range []struct {
		name string
		run  func(s *sim)
	}{
		{"a big sender's busy hour", func(s *sim) {
			big, others := addrs("192.0.2.%d", 1, 1), addrs("10.%d.0.1", 1, 77)
			s.deliver(big[0])
			s.pass(20*time.Minute, time.Second, func() {
				for range 10 {
					s.close(big[0])
				}
				s.keep(big, 20)
				for range 8 {
					s.deliver(big[0])
				}
				for i := range others {
					if rand.N(4) == 0 {
						s.close(others[i])
					}
				}
				s.keep(others, 1)
			})
		}},
		{"a mailing list's fan-in", func(s *sim) {
			s.pass(3*time.Minute, 100*time.Millisecond, func() {
				if len(s.held) > 95 || len(s.held) > 0 && rand.N(2) == 0 {
					a := s.held[0].addr
					s.deliver(a)
					s.close(a)
					return
				}
				for range 3 {
					s.open(netip.AddrFrom4([4]byte{byte(11 + rand.N(200)), byte(rand.N(256)), byte(rand.N(256)), 1}))
				}
			})
		}},
		{"monitoring each second", func(s *sim) {
			m := netip.MustParseAddr("192.0.2.1")
			s.pass(20*time.Minute, time.Second, func() { s.open(m); s.close(m) })
		}},
		{"greylisting retries", func(s *sim) {
			s.pass(10*time.Minute, 2*time.Second, func() {
				for _, a := range addrs("192.0.2.%d", 1, 12) {
					s.open(a)
					s.close(a)
				}
			})
		}},
		{"one host of a network, while others fill the server", func(s *sim) {
			s.keep(addrs("192.0.2.%d", 1, 2), 7)
			s.keep(addrs("10.%d.0.1", 1, 80), 1)
			s.pass(8*time.Second, time.Second, nil)
		}},
		{"a hog without any pressure", func(s *sim) {
			s.keep(addrs("192.0.2.%d", 1, 1), 45)
			s.pass(time.Hour, time.Second, nil)
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			c.run(s)
			if len(s.told) > 0 {
				t.Errorf("verdicts:%s", s.sentences())
			}
		})
	}
}

func TestPatient(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	a := addrs("192.0.2.%d", 1, 1)
	s.pass(7*time.Minute, time.Second, func() {
		s.keep(a, 14)
		for i, o := range addrs("10.%d.0.1", 1, 86) {
			if (int(s.now.Unix())+i)%5 == 0 {
				s.deliver(o)
				s.close(o)
			}
		}
		s.keep(addrs("10.%d.0.1", 1, 86), 1)
	})
	s.want(a, addrs("10.%d.0.1", 1, 86))
}

// Bursts that stay just under the short window add up in the long one.
func TestBursts(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	a := addrs("192.0.2.%d", 1, 1)
	s.keep(addrs("10.%d.0.1", 1, 60), 1)
	s.pass(9*time.Minute, time.Second, func() {
		if s.now.Unix()%10 == 0 {
			s.keep(a, 38)
		} else if s.now.Unix()%10 == 3 {
			for s.holds(a[0]) > 0 {
				s.close(a[0])
			}
		}
	})
	s.want(a, addrs("10.%d.0.1", 1, 60))
}

// After a restart the old connections hold slots of nobody, and are held on.
func TestRestart(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	s.keep(addrs("192.0.2.%d", 1, 1), 50)
	s.event(Event{Kind: DaemonStarted})
	if s.d.Count() != 0 || s.d.Held() != 50 {
		t.Fatalf("count %d, held %d after a restart", s.d.Count(), s.d.Held())
	}
	s.event(Event{Kind: Closed, Source: s.held[0].addr, Port: s.held[0].port})
	s.event(Event{Kind: Opened, Source: netip.MustParseAddr("10.0.0.1"), Port: 9, Count: 1})
	if s.d.Count() != 1 || s.d.Held() != 50 {
		t.Errorf("count %d, held %d after a restart, a close and an open", s.d.Count(), s.d.Held())
	}
}

func TestCapacity(t *testing.T) {
	a := netip.MustParseAddr("192.0.2.1")
	opened := func(n int) Event { return Event{Kind: Opened, Source: a, Port: uint16(n), Count: n} }
	full := Event{Kind: Refused, Reason: RefusedFull, Source: a}
	stated := func(n int) Event { return Event{Kind: Closed, Reason: ClosedRejected, Source: a, Capacity: n} }
	for _, c := range []struct {
		name   string
		cfg    int
		events []Event
		n      int
		how    string
	}{
		{"nothing known", 0, nil, 100, CapacityAssumed},
		{"configured", 40, []Event{opened(90)}, 40, CapacityConfigured},
		{"refused at 20", 0, []Event{opened(19), opened(20), full}, 20, CapacityFromRefusals},
		{"refused too low to be true", 0, []Event{opened(3), full}, 100, CapacityAssumed},
		{"refused for another reason", 0, []Event{opened(20), {Kind: Refused, Reason: RefusedPerHost, Source: a}}, 100, CapacityAssumed},
		{"counted higher", 0, []Event{opened(150)}, 150, CapacityFromCount},
		{"refused, and then counted higher", 0, []Event{opened(20), full, opened(50)}, 50, CapacityFromRefusals},
		{"stated", 0, []Event{opened(45), stated(50)}, 50, CapacityStated},
		{"stated, and refused when fewer were counted", 0, []Event{opened(45), stated(50), full}, 50, CapacityStated},
		{"stated, and then counted higher", 0, []Event{stated(50), opened(60)}, 60, CapacityStated},
		{"stated, and another after the restart", 0, []Event{stated(50), {Kind: DaemonStarted}, stated(40)}, 40, CapacityStated},
		{"stated lower than counted", 0, []Event{opened(60), stated(50)}, 100, CapacityAssumed},
		{"stated too low to be believed", 0, []Event{stated(9)}, 100, CapacityAssumed},
		{"stated too high to be believed", 0, []Event{stated(1<<20 + 1)}, 100, CapacityAssumed},
		{"configured, and stated", 40, []Event{stated(50)}, 40, CapacityConfigured},
		{"stated, with a tick", 0, []Event{{Kind: Tick, Capacity: 50}}, 50, CapacityStated},
		{"smaller since the restart", 0, []Event{opened(200), full, {Kind: DaemonStarted}, opened(50), full}, 50, CapacityFromRefusals},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: c.cfg})
			for _, ev := range c.events {
				s.event(ev)
			}
			if n, how := s.d.Capacity(); n != c.n || how != c.how {
				t.Errorf("%d, %s; want %d, %s", n, how, c.n, c.how)
			}
		})
	}
}

// What a closing line frees, and what it does not.
func TestHeld(t *testing.T) {
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	o := func(a netip.Addr, port, count int) Event {
		return Event{Kind: Opened, Source: a, Port: uint16(port), Count: count}
	}
	c := func(a netip.Addr, port int) Event { return Event{Kind: Closed, Source: a, Port: uint16(port)} }
	many := func(n int, ev func(i int) Event) (l []Event) {
		for i := range n {
			l = append(l, ev(i))
		}
		return l
	}
	for _, x := range []struct {
		name        string
		events      []Event
		held, count int
	}{
		{"open and close", []Event{o(a, 1, 1), o(a, 2, 2), c(a, 1)}, 1, 1},
		{"closed twice", []Event{o(a, 1, 1), o(a, 2, 2), c(a, 1), c(a, 1)}, 1, 1},
		{"closed, never opened", []Event{o(a, 1, 1), c(b, 1), c(a, 9)}, 1, 1},
		{"closing line first", []Event{c(a, 1), o(a, 1, 1)}, 0, 0},
		{"closing line of another first", []Event{c(a, 2), c(b, 1), o(a, 1, 1)}, 1, 1},
		{"closed twice, and opened again", []Event{o(a, 1, 1), c(a, 1), c(a, 1), o(a, 1, 1)}, 1, 1},
		{"opened twice", []Event{o(a, 1, 1), o(a, 1, 1)}, 1, 1},
		{"without ports", []Event{o(a, 0, 1), o(a, 0, 2), o(b, 0, 3), c(a, 0)}, 2, 2},
		{"without ports, closing lines lost", []Event{o(a, 0, 1), o(a, 0, 2), o(a, 0, 3), o(b, 0, 2)}, 2, 2},
		{"without counts", []Event{o(a, 1, 0), o(a, 2, 0), o(b, 3, 0), c(b, 3)}, 2, 2},
		{"not counted by the server", many(30, func(i int) Event { return o(a, i+1, 1) }), 30, 30},
		{"closing lines lost for ever", append(many(60, func(i int) Event { return o(a, i+1, i+1) }), o(b, 1, 4)), 4, 4},
		{"full", []Event{o(a, 1, 20), {Kind: Refused, Reason: RefusedFull, Source: b}}, 1, 20},
		{"sampled", []Event{o(a, 1, 20), {Kind: Sampled, Count: 7}}, 1, 7},
		{"restarted", []Event{o(a, 1, 20), {Kind: DaemonStarted}, {Kind: DaemonStarted}, o(b, 1, 1), c(a, 1)}, 1, 1},
	} {
		t.Run(x.name, func(t *testing.T) {
			s := newSim(t, Config{})
			for _, ev := range x.events {
				s.event(ev)
			}
			n := 0
			for h := range s.d.Holders() {
				n++
				if !h.Since.Equal(t0) {
					t.Errorf("%v: since %v", h, h.Since)
				}
			}
			if s.d.Held() != x.held || n != x.held || s.d.Count() != x.count {
				t.Errorf("held %d (%d listed), count %d; want %d, %d", s.d.Held(), n, s.d.Count(), x.held, x.count)
			}
		})
	}
}

// A closing line that comes first ends only what was opened before it, by the
// lines' own times, and not long ago.
func TestClosedEarly(t *testing.T) {
	for _, c := range []struct {
		name            string
		opened, arrives time.Duration // after the closing line: by its time, and in the log
		held            int
	}{
		{"a second before", -time.Second, time.Second, 0},
		{"in the same second", 0, 0, 0},
		{"after it", time.Second, time.Second, 1},
		{"too long ago", -time.Second, 5 * time.Second, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			a := netip.MustParseAddr("192.0.2.1")
			s.event(Event{Kind: Closed, Source: a, Port: 7})
			s.now = t0.Add(c.arrives)
			s.event(Event{Kind: Tick})
			s.now = t0.Add(c.opened)
			s.event(Event{Kind: Opened, Source: a, Port: 7, Count: 1})
			if s.d.Held() != c.held || s.d.Count() != c.held {
				t.Errorf("held %d, count %d, want %d", s.d.Held(), s.d.Count(), c.held)
			}
			s.d.check(t)
		})
	}
}

// Where closing lines come, a count that is too low for a moment is the order
// of the lines; one that stays too low shows that some were lost.
func TestCountTooLow(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	s.block = false
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for range 100 {
		s.open(a)
		s.close(a)
	}
	s.keep([]netip.Addr{a}, 60)
	low := func(count int) {
		s.port++
		s.event(Event{Kind: Opened, Source: b, Port: s.port, Count: count})
	}
	low(20)
	if s.d.Held() != 61 {
		t.Errorf("one line out of order: %d held, want 61", s.d.Held())
	}
	low(62)
	for range 4 {
		s.now = s.now.Add(time.Second)
		low(20)
	}
	// 63 less 20 and the 8 that are let pass was the least that was too many.
	if s.d.Held() != 66-35 {
		t.Errorf("after 3 s of lower counts %d are held, want 31", s.d.Held())
	}
}

// The log's time may do what it likes.
func TestClock(t *testing.T) {
	hog := addrs("192.0.2.%d", 1, 1)
	for _, c := range []struct {
		name string
		run  func(s *sim)
	}{
		{"one line from the future", func(s *sim) {
			s.pass(3*time.Second, time.Second, nil)
			s.d.Observe(&Event{Kind: Opened, Time: t0.AddDate(4, 0, 0), Source: netip.MustParseAddr("10.0.0.1"), Port: 7, Count: 100})
			s.pass(7*time.Second, time.Second, nil)
		}},
		{"one line from the past", func(s *sim) {
			s.pass(3*time.Second, time.Second, nil)
			s.d.Observe(&Event{Kind: Tick, Time: t0.AddDate(-4, 0, 0)})
			s.pass(7*time.Second, time.Second, nil)
		}},
		{"two lines from the future, then the clock again", func(s *sim) {
			s.now = t0.AddDate(4, 0, 0)
			s.event(Event{Kind: Tick})
			s.event(Event{Kind: Tick})
			s.want(hog, nil)
			s.told, s.blocked = nil, nil
			s.now = t0
			s.keep(hog, 20)
			s.pass(60*time.Second, 100*time.Millisecond, nil)
		}},
		{"the clock set back by an hour", func(s *sim) {
			s.pass(2*time.Second, time.Second, nil)
			s.now = s.now.Add(-time.Hour)
			s.pass(20*time.Second, 100*time.Millisecond, nil)
		}},
		{"out of order", func(s *sim) {
			for range 1000 {
				s.now = s.now.Add(10 * time.Millisecond)
				s.d.Observe(&Event{Kind: Tick, Time: s.now.Add(-time.Duration(rand.N(2000)) * time.Millisecond)})
				s.event(Event{Kind: Tick})
			}
		}},
		{"years that are none", func(s *sim) {
			s.pass(10*time.Second, time.Second, func() {
				s.d.Observe(&Event{Kind: Tick, Time: time.Date(1, 1, 1, 0, 0, 1, 0, time.UTC)})
				s.d.Observe(&Event{Kind: Tick, Time: time.Date(290000, 1, 1, 0, 0, 1, 0, time.UTC)})
			})
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			s.keep(hog, 20)
			s.keep(addrs("10.%d.0.1", 1, 80), 1)
			c.run(s)
			s.want(hog, addrs("10.%d.0.1", 1, 80))
			if len(s.told) == 0 {
				return
			}
			if v := s.told[0]; v.Time.Sub(s.now).Abs() > time.Minute {
				t.Errorf("at %v by the log, the verdict says %v", s.now, v.Time)
			}
		})
	}
}

// Time that passes by the clock or with lines gives the same verdicts.
func TestAdvance(t *testing.T) {
	run := func(tick time.Duration) string {
		s := newSim(t, Config{Capacity: 100})
		s.block = false
		s.keep(addrs("192.0.2.%d", 1, 3), 33)
		s.pass(time.Minute, tick, nil)
		return s.sentences()
	}
	want := run(10 * time.Millisecond)
	for _, tick := range []time.Duration{100 * time.Millisecond, 1500 * time.Millisecond, time.Minute} {
		if got := run(tick); got != want || got == "" {
			t.Errorf("every %v:%s\nwant%s", tick, got, want)
		}
	}
}

// Addresses used once each, ten times more than fit, still show their network,
// within the budget.
func TestMemory(t *testing.T) {
	cfg := Config{Capacity: 100, Memory: 4 << 20, Rules: DefaultRules()}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	spread := func() netip.Addr { // anywhere
		var b [16]byte
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		b[0] = 0x2a
		return netip.AddrFrom16(b)
	}
	now := t0
	var found []netip.Prefix
	for i := range 200_000 {
		now = now.Add(time.Millisecond)
		a := spread()
		if i%5 == 0 {
			a = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 0, 7, byte(rnd.Uint32()), byte(rnd.Uint32()), byte(rnd.Uint32()), 15: byte(i)})
		}
		ev := Event{Time: now, Kind: Opened, Source: a, Port: uint16(1 + i%60000), Count: 100}
		for _, v := range d.Observe(&ev) {
			found = append(found, v.Source)
		}
		if i%3 == 0 {
			d.Observe(&Event{Kind: Accepted, Source: spread()})
		}
		if i%5 != 0 {
			d.Observe(&Event{Kind: Closed, Source: a, Port: ev.Port})
		}
	}
	s := d.Stats()
	if s.Memory > cfg.Memory {
		t.Errorf("%d bytes of %d", s.Memory, cfg.Memory)
	}
	if s.Evicted == 0 {
		t.Error("nothing was evicted: the test is too small")
	}
	if !slices.Contains(found, netip.MustParsePrefix("2001:db8:7::/48")) {
		t.Errorf("the network was not found: %v, %+v", found, s)
	}
	for _, p := range found {
		if !p.Overlaps(netip.MustParsePrefix("2001:db8:7::/48")) {
			t.Errorf("found %s", p)
		}
	}
	d.check(t)
}

// check compares all that is kept twice.
func (d *Detector) check(t rapid.TB) {
	t.Helper()
	held := make(map[uint32]int32)
	for _, l := range []*byAge{&d.old, &d.young} {
		n := 0
		for h := l.head; h != 0; h = d.holders.at(h).next {
			n++
			for i := d.holders.at(h).node; i != 0; i = d.nodes.at(i).parent {
				held[i]++
			}
		}
		if n != l.n {
			t.Errorf("%d holders in a list of %d", n, l.n)
		}
	}
	for _, s := range d.index.slots {
		i := uint32(s)
		if i == 0 {
			continue
		}
		n := d.nodes.at(i)
		k := n.key
		if d.find(k) != i || n.held != held[i] || n.held < 0 {
			t.Errorf("%s: held %d, want %d", k.prefix(), n.held, held[i])
		}
		if n.held > 0 && d.levels[n.level].active[n.pos] != i {
			t.Errorf("%s holds and is not among the active", k.prefix())
		}
		if n.sat != 0 && d.sat.owner[n.sat] != i || n.opn != 0 && d.opn.owner[n.opn] != i {
			t.Errorf("%s: its rings are another's", k.prefix())
		}
		if n.parent != 0 && !d.nodes.at(n.parent).key.contains(k) {
			t.Errorf("%s is not inside %s", k.prefix(), d.nodes.at(n.parent).key.prefix())
		}
	}
	if d.nodes.len() != d.index.n {
		t.Errorf("%d nodes, %d in the index", d.nodes.len(), d.index.n)
	}
}

func TestTable(t *testing.T) {
	var keys [5000]key // by number
	tab := newTable()
	rnd := rand.New(rand.NewPCG(1, 2))
	in := make(map[uint32]bool)
	get := func(k key) uint32 {
		n, at := tab.next(tab.hash(k), tab.hash(k))
		for n != 0 && keys[n] != k {
			n, at = tab.next(tab.hash(k), at+1)
		}
		return n
	}
	for range 200_000 {
		i := uint32(1 + rnd.IntN(len(keys)-1))
		keys[i] = key{hi: uint64(i % 7), lo: uint64(i), bits: 128}
		if got := get(keys[i]); (got == i) != in[i] || got != 0 && got != i {
			t.Fatalf("number %d: got %d, in %t", i, got, in[i])
		}
		if in[i] {
			tab.delete(tab.hash(keys[i]), i)
		} else {
			tab.put(tab.hash(keys[i]), i)
		}
		in[i] = !in[i]
	}
}

func TestForgetAnyLength(t *testing.T) {
	for _, p := range []string{"192.0.2.7/32", "192.0.2.0/28", "192.0.2.0/24", "192.0.0.0/16", "0.0.0.0/0", "::ffff:192.0.2.0/120", "2001:db8::/32", "2001:db8:0:1::/64", "::/0"} {
		s := newSim(t, Config{Capacity: 100})
		all := slices.Concat(addrs("192.0.2.%d", 1, 20), addrs("192.0.3.%d", 1, 20), addrs("2001:db8:0:%d::1", 1, 20))
		s.keep(all, 1)
		s.pass(2*time.Second, time.Second, nil)
		pf := netip.MustParsePrefix(p)
		s.d.Forget(pf)
		k, _ := keyOfPrefix(pf)
		want := 0
		for _, a := range all {
			in := k.contains(keyOf(a))
			if !in {
				want++
			}
			e := s.d.Explain(single(a))
			if in == e.Known {
				t.Errorf("%s: %s known: %t", p, a, e.Known)
			}
		}
		if s.d.Held() != want || s.d.Count() != want {
			t.Errorf("%s: held %d, count %d, want %d", p, s.d.Held(), s.d.Count(), want)
		}
		s.d.check(t)
	}
}

func TestKnownGoodBounded(t *testing.T) {
	s := newSim(t, Config{KnownGood: KnownGood{Max: 50, MaxAge: time.Hour}})
	for i := range 1000 {
		s.d.LearnGood(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), t0, t0.Add(time.Duration(i)*time.Second), i)
	}
	s.event(Event{Kind: Tick})
	n := 0
	for g := range s.d.KnownGood() {
		n++
		if g.Messages < 800 {
			t.Errorf("%+v is kept, later ones went", g)
		}
	}
	if n != 50 || s.d.Stats().KnownGood != 50 {
		t.Errorf("%d known", n)
	}
	s.pass(3*time.Hour, time.Minute, nil)
	for g := range s.d.KnownGood() {
		t.Errorf("%+v is known after three hours", g)
	}
	a := netip.MustParseAddr("192.0.2.1")
	s.deliver(a)
	s.d.ForgetGood(a)
	if e := s.d.Explain(single(a)); e.KnownGoodCount != 0 {
		t.Errorf("%+v", e)
	}
}

func TestExplain(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	s.keep(addrs("192.0.2.%d", 1, 1), 12)
	s.keep(addrs("10.%d.0.1", 1, 88), 1)
	s.pass(5*time.Second, time.Second, nil)
	e := s.d.Explain(netip.MustParsePrefix("192.0.2.1/32"))
	if !e.Known || e.Held != 12 || e.Sources != 1 || e.Opens != 12 || e.Count != 100 || len(e.Rules) != 8 {
		t.Fatalf("%+v", e)
	}
	want := "would have to keep 15 % of the slots (15 of 100) for 10 s while the server is full; kept 6.0 %"
	if r := e.Rules[0]; r.Rule != "hog" || r.Need != want {
		t.Errorf("%+v\nwant %s", r, want)
	}
	if e := s.d.Explain(netip.MustParsePrefix("203.0.113.0/24")); e.Known || len(e.Rules) > 0 {
		t.Errorf("%+v", e)
	}
	if e := s.d.Explain(netip.Prefix{}); e.Known {
		t.Errorf("%+v", e)
	}
}

func TestSentence(t *testing.T) {
	p := netip.MustParsePrefix
	for _, c := range []struct {
		v    Verdict
		want string
	}{
		{Verdict{Source: p("10.66.9.9/32"), Metric: Saturation, Score: 0.41, Window: 10 * time.Second, Held: 97, Sources: 1, Capacity: 100, Count: 98},
			"10.66.9.9 kept 41 % of the server's slots on average over 10 s while it was full (97 slots of 100 held now, 98 taken)"},
		{Verdict{Source: p("2001:db8::/64"), Metric: Saturation, Score: 0.054, Window: 5 * time.Minute, Held: 1, Sources: 12, Capacity: 100, Count: 98},
			"2001:db8::/64 (12 addresses) kept 5.4 % of the server's slots on average over 5 min while it was full (1 slot of 100 held now, 98 taken)"},
		{Verdict{Source: p("10.66.9.9/32"), Metric: Opens, Score: 300, Window: time.Minute, Held: 2, Sources: 1, Threshold: 300},
			"10.66.9.9 opened 300 connections in 60 s (limit 300, 2 slots held now)"},
		{Verdict{Source: p("10.0.0.0/24"), Metric: Opens, Score: 1000, Window: time.Minute, Threshold: 1000, Sources: 9, KnownGood: 3, Spared: addrs("10.0.0.%d", 1, 2)},
			"10.0.0.0/24 (9 addresses) opened 1000 connections in 60 s (limit 1000, 0 slots held now); not to be blocked as a whole, because 3 senders are known good from there: 10.0.0.1, 10.0.0.2 and 1 more"},
	} {
		if got := c.v.Sentence(); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
	}
}

func TestText(t *testing.T) {
	for m := Saturation; m <= Opens; m++ {
		var back Metric
		if text, _ := m.MarshalText(); back.UnmarshalText(text) != nil || back != m {
			t.Errorf("%s became %s", m, back)
		}
	}
	for k := None; k <= Sampled; k++ {
		var back Kind
		if text, _ := k.MarshalText(); back.UnmarshalText(text) != nil || back != k {
			t.Errorf("%s became %s", k, back)
		}
	}
	for r := ReasonUnknown; r <= ClosedVanished; r++ {
		var back Reason
		if text, _ := r.MarshalText(); back.UnmarshalText(text) != nil || back != r {
			t.Errorf("%s became %s", r, back)
		}
	}
	var m Metric
	if m.UnmarshalText([]byte("none")) == nil || m.UnmarshalText([]byte("speed")) == nil {
		t.Error("an unknown metric was read")
	}
	if s := Kind(99).String(); s != "kind(99)" {
		t.Error(s)
	}
}

func TestConfig(t *testing.T) {
	rule := DefaultRules()[0]
	for _, c := range []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"pressure", func(c *Config) { c.PressureFrom, c.SaturatedAt = 0.9, 0.5 }, "pressure_from"},
		{"capacity", func(c *Config) { c.Capacity = -1 }, "capacity -1"},
		{"memory", func(c *Config) { c.Memory = 1000 }, "memory 1000"},
		{"twice", func(c *Config) { c.Rules = []Rule{rule, rule} }, "taken twice"},
		{"window", func(c *Config) { r := rule; r.Window = 1500 * time.Millisecond; c.Rules = []Rule{r} }, "whole seconds"},
		{"threshold", func(c *Config) { r := rule; r.Threshold = 1.5; c.Rules = []Rule{r} }, "threshold 1.5"},
		{"prefix", func(c *Config) { r := rule; r.Prefixes4 = []int{33}; c.Rules = []Rule{r} }, "/33"},
		{"no prefix", func(c *Config) { r := rule; r.Prefixes4, r.Prefixes6 = nil, nil; c.Rules = []Rule{r} }, "no prefix length"},
		{"no metric", func(c *Config) { r := rule; r.Metric = 0; c.Rules = []Rule{r} }, "no metric"},
		{"factor", func(c *Config) { c.KnownGood.Factor = 0.5 }, "factor"},
	} {
		cfg := Config{Rules: DefaultRules()}
		c.edit(&cfg)
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	if _, err := New(Config{}); err != nil {
		t.Error(err)
	}
}

// An ordinary event costs no allocation.
func TestNoAllocs(t *testing.T) {
	d, _ := New(Config{Capacity: 100, Rules: DefaultRules()})
	a := netip.MustParseAddr("2001:db8::1")
	now := t0
	i := 0
	round := func() {
		now = now.Add(50 * time.Millisecond)
		i++
		port := uint16(i%1000 + 1)
		d.Observe(&Event{Time: now, Kind: Opened, Source: a, Port: port, Count: 95})
		d.Observe(&Event{Time: now, Kind: Accepted, Source: a, Port: port})
		d.Observe(&Event{Time: now, Kind: Closed, Source: a, Port: port})
		d.Observe(&Event{Time: now, Kind: Tick})
	}
	for range 100 {
		round()
	}
	d.Forget(single(a))
	round()
	if n := testing.AllocsPerRun(50, round); n != 0 {
		t.Errorf("%v allocations for four events", n)
	}
}

// BenchmarkObserve is a quiet busy server: opens, mails and closes of 50,000
// sources, and as many lines of no interest.
func BenchmarkObserve(b *testing.B) {
	for _, c := range []struct {
		name    string
		sources int
	}{{"50k", 50_000}, {"1M", 1_000_000}} {
		b.Run(c.name, func(b *testing.B) {
			d, _ := New(Config{Capacity: 100, Rules: DefaultRules()})
			rnd := rand.New(rand.NewPCG(1, 2))
			events := make([]Event, 1<<20)
			for i := 0; i < len(events); i += 4 {
				n := rnd.IntN(c.sources)
				a := netip.AddrFrom4([4]byte{byte(11 + n>>16), byte(n >> 8), byte(n), byte(n >> 4)})
				if n%4 == 0 {
					a = netip.AddrFrom16([16]byte{0x20, 1, 2: byte(n >> 16), 3: byte(n >> 8), 6: byte(n), 15: 1})
				}
				at := t0.Add(time.Duration(i) * 250 * time.Microsecond)
				events[i] = Event{Time: at, Kind: Opened, Source: a, Port: uint16(i%60000 + 1), Count: 5}
				events[i+1] = Event{Time: at, Kind: Accepted, Source: a, Port: uint16(i%60000 + 1)}
				events[i+2] = Event{Time: at, Kind: Tick}
				events[i+3] = Event{Time: at, Kind: Closed, Source: a, Port: uint16(i%60000 + 1)}
			}
			i, day := 0, time.Duration(0)
			b.ReportAllocs()
			for b.Loop() {
				ev := events[i]
				ev.Time = ev.Time.Add(day)
				d.Observe(&ev)
				if i++; i == len(events) {
					i, day = 0, day+time.Duration(len(events))*250*time.Microsecond
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds()/1e6, "Mevents/s")
		})
	}
}

// Five that fill the server within two seconds of each other go together,
// whether or not they are neighbours: blocking the first takes the pressure
// off the others, and must not save them. Nor does their network go for them.
func TestFiveOneAfterTheOther(t *testing.T) {
	for _, pattern := range []string{"10.66.%d.1", "10.66.1.%d", "fd00:0:0:%d::1"} {
		t.Run(pattern, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			for i := 1; i <= 5; i++ {
				for range 20 {
					s.open(netip.MustParseAddr(fmt.Sprintf(pattern, i)))
				}
				s.pass(400*time.Millisecond, 100*time.Millisecond, nil)
			}
			s.pass(10*time.Second, 100*time.Millisecond, nil)
			if len(s.told) != 5 {
				t.Fatalf("%d verdicts, want one on each of five:%s", len(s.told), s.sentences())
			}
			for _, v := range s.told {
				if !v.Source.IsSingleIP() || v.Time.Sub(t0) > 11*time.Second {
					t.Errorf("%s %s after the start", v.Source, v.Time.Sub(t0))
				}
			}
		})
	}
}

// TestEndedByRestart: who held slots when the server was ended and started
// again, hours ago and without a line, holds none in a busy hour.
func TestEndedByRestart(t *testing.T) {
	for _, c := range []struct {
		after time.Duration
		bad   bool // the old connections live on, as after a restart of the daemon alone
	}{{time.Minute, true}, {3 * time.Hour, false}} {
		s := newSim(t, Config{Capacity: 100})
		s.block = false
		one, many := addrs("198.51.100.%d", 7, 1), addrs("10.%d.0.1", 1, 95)
		s.keep(one, 20)
		s.pass(2*time.Minute, time.Second, nil)
		s.event(Event{Kind: DaemonStarted})
		s.now = s.now.Add(c.after)
		for _, a := range many {
			s.open(a)
		}
		s.pass(30*time.Second, time.Second, nil)
		told := slices.ContainsFunc(s.told, func(v Verdict) bool { return v.Source == single(one[0]) })
		if told != c.bad {
			t.Errorf("%s after the restart: %s", c.after, s.sentences())
		}
	}
}
