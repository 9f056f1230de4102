package detector

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// Floods and busy hours that administrators tell of.

func TestKeepsHalfForMinutes(t *testing.T) {
	for _, c := range []struct {
		name   string
		others int // slots that proper senders fill
		within time.Duration
	}{
		{"the server is full", 55, 12 * time.Second},
		{"70 of 100 are taken", 25, 15 * time.Second},
		{"60 of 100 are taken", 15, 5 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			proper, bad := addrs("10.%d.0.1", 1, c.others), addrs("192.0.2.%d", 1, 1)
			s.keep(bad, 45)
			s.pass(6*time.Minute, time.Second, func() {
				for i, a := range proper {
					if (int(s.now.Unix())+i)%4 == 0 { // comes, delivers, goes
						s.deliver(a)
						s.close(a)
					}
				}
				s.keep(proper, 1)
			})
			s.want(bad, proper)
			if at := s.told[0].Time.Sub(t0); at > c.within {
				t.Errorf("found after %v, want %v", at, c.within)
			}
		})
	}
}

// Bursts that stay under the short windows are seen by the long ones.
func TestJustUnderTheWindow(t *testing.T) {
	others := addrs("10.%d.0.1", 1, 62)
	for _, c := range []struct {
		name string
		bad  []netip.Addr
		each int // slots of each, or opens
		on   int // seconds of ten
		open bool
		rule string
	}{
		{"29 slots for 5 s of 10", addrs("192.0.2.%d", 1, 1), 29, 5, false, "patient"},
		{"38 slots for 3 s of 10", addrs("192.0.2.%d", 1, 1), 38, 3, false, "patient"},
		{"a network with 28 slots for 4 s of 10", addrs("192.0.2.%d", 1, 28), 1, 4, false, "patient-net"},
		{"55 opens at once, each 10 s", addrs("192.0.2.%d", 1, 1), 55, 1, true, "storm"},
		{"50 hosts of a /48, 4 opens each, each 10 s", addrs("2001:db8:7:%x::1", 1, 50), 4, 1, true, "storm-net"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			s.block = false
			s.keep(others, 1)
			s.pass(9*time.Minute, time.Second, func() {
				switch phase := int(s.now.Unix() % 10); {
				case phase == 0 && c.open:
					for range c.each {
						for _, a := range c.bad {
							s.open(a)
							s.close(a)
						}
					}
				case phase == 0:
					s.keep(c.bad, c.each)
				case phase == c.on:
					for _, a := range c.bad {
						for s.holds(a) > 0 {
							s.close(a)
						}
					}
				}
			})
			if len(s.told) == 0 || s.told[0].Rule != c.rule {
				t.Errorf("want %s first; verdicts:%s", c.rule, s.sentences())
			}
			for _, v := range s.told {
				if slices.ContainsFunc(others, v.Source.Contains) || v.Rule != c.rule {
					t.Errorf("told %s: %s", v.Rule, v.Sentence())
				}
			}
		})
	}
}

// A monitoring host connects each second all day, and the server is full for
// half of it.
func TestMonitoringAllDay(t *testing.T) {
	s := newSim(t, Config{Capacity: 100})
	m := netip.MustParseAddr("192.0.2.1")
	others := addrs("10.%d.0.1", 1, 97)
	s.keep(others, 1)
	i := 0
	s.pass(24*time.Hour, time.Second, func() {
		s.open(m)
		i++
		a := others[i%len(others)]
		s.deliver(a)
		s.close(a)
		if i%7200 < 3600 {
			s.open(a)
		}
		s.close(m)
	})
	if len(s.told) > 0 {
		t.Errorf("verdicts:%s", s.sentences())
	}
}

// After a delay of five minutes 200 hosts come again in the same second, more
// than there are slots; who is refused comes a minute later.
func TestGreylistingRetries(t *testing.T) {
	for _, format := range []string{"10.%d.7.1", "192.0.%d.9", "2001:db8:%x::25"} {
		t.Run(format, func(t *testing.T) {
			s := newSim(t, Config{Capacity: 100})
			waiting := addrs(format, 20, 200)
			for range 5 {
				var refused []netip.Addr
				for _, a := range waiting {
					if s.open(a); s.holds(a) == 0 {
						refused = append(refused, a)
					}
				}
				s.pass(3*time.Second, time.Second, nil) // a slow session
				for _, a := range waiting {
					if s.holds(a) > 0 {
						s.deliver(a)
						s.close(a)
					}
				}
				s.pass(time.Minute, time.Second, nil)
				for _, a := range refused {
					s.open(a)
					s.deliver(a)
					s.close(a)
				}
				s.pass(4*time.Minute, time.Second, nil)
			}
			if len(s.told) > 0 {
				t.Errorf("verdicts:%s", s.sentences())
			}
		})
	}
}
