package detector

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// slowMix is a server that is full of proper senders whom it has never seen:
// big ones with many slots each, and many small ones. It takes some seconds
// for a message.
type slowMix struct {
	slots  int
	takes  int           // seconds that a message takes, about
	jitter float64       // share of that by which it differs
	most   int           // messages on one connection
	big    []int         // slots of each big sender
	total  time.Duration // how long it lasts
}

func (m slowMix) String() string {
	return fmt.Sprintf("%d slots, %d s ± %.0f %% a message, %d a connection, big %v", m.slots, m.takes, 100*m.jitter, m.most, m.big)
}

// run gives the verdicts on it.
func (m slowMix) run(t *testing.T, rnd *rand.Rand) *sim {
	s := newSim(t, Config{Capacity: m.slots})
	s.slots, s.block = m.slots, false
	type state struct {
		next time.Time
		left int
	}
	conns := make(map[uint16]*state)
	takes := func() time.Duration {
		return time.Duration(float64(m.takes) * (1 + m.jitter*(2*rnd.Float64()-1)) * float64(time.Second))
	}
	big := addrs("192.0.%d.2", 1, len(m.big))
	var small []netip.Addr
	for i := range 4 {
		small = append(small, addrs(fmt.Sprintf("10.%%d.%d.1", i), 1, 250)...)
	}
	// It fills within two minutes, after three with less than half of that.
	fill := func() {
		part := min(1, 0.4+0.6*max(0, s.now.Sub(t0).Seconds()-180)/120)
		for i, a := range big {
			s.keep([]netip.Addr{a}, int(part*float64(m.big[i])))
		}
		for range 2 * m.slots {
			if len(s.held) >= int(part*float64(m.slots)) {
				break
			}
			if a := small[rnd.IntN(len(small))]; s.holds(a) == 0 {
				s.open(a)
			}
		}
		for _, h := range s.held {
			if conns[h.port] == nil {
				conns[h.port] = &state{s.now.Add(takes()), 1 + rnd.IntN(m.most)}
			}
		}
	}
	s.pass(m.total, time.Second, func() {
		fill()
		for _, h := range slices.Clone(s.held) {
			c := conns[h.port]
			if s.now.Before(c.next) {
				continue
			}
			s.deliver(h.addr)
			if c.left--; c.left > 0 {
				c.next = s.now.Add(takes())
				continue
			}
			delete(conns, h.port)
			i := slices.IndexFunc(s.held, func(x conn) bool { return x.port == h.port })
			s.held = slices.Delete(s.held, i, i+1)
			s.event(Event{Kind: Closed, Source: h.addr, Port: h.port, Reason: ClosedQuit})
		}
	})
	if len(s.held) < m.slots*9/10 {
		t.Errorf("%s: %d slots are held at the end: nothing is proven", m, len(s.held))
	}
	return s
}

func randomMix(rnd *rand.Rand) slowMix {
	m := slowMix{
		slots:  []int{20, 100, 100, 100, 500}[rnd.IntN(5)],
		takes:  5 + rnd.IntN(56),
		jitter: 0.5 * rnd.Float64(),
		most:   1 + rnd.IntN(10),
		total:  13 * time.Minute,
	}
	left := m.slots
	for range 1 + rnd.IntN(4) {
		n := max(1, m.slots*(10+rnd.IntN(31))/100)
		if n <= left {
			m.big, left = append(m.big, n), left-n
		}
	}
	return m
}

// No proper sender is told for being new, big and slow: what the server takes
// a minute for can not be told from a trickle by how much is delivered.
func TestSlowServers(t *testing.T) {
	for seed := range 40 {
		rnd := rand.New(rand.NewPCG(7, uint64(seed)))
		m := randomMix(rnd)
		if s := m.run(t, rnd); len(s.told) > 0 {
			t.Errorf("seed %d, %s:%s", seed, m, s.sentences())
		}
	}
}

// A sender that holds a slot or two of a small server and delivers slowly.
func TestSlowWorker(t *testing.T) {
	for _, pause := range []int{60, 75, 110, 170} {
		t.Run(fmt.Sprintf("a mail a slot in %d s", pause), func(t *testing.T) {
			s := newSim(t, Config{Capacity: 20})
			s.slots = 20
			a, others := addrs("192.0.2.%d", 1, 1), addrs("10.%d.0.1", 1, 18)
			s.keep(a, 2)
			s.keep(others, 1)
			at := 0
			s.pass(40*time.Minute, time.Second, func() {
				if at++; at%pause == 20 { // both at the same time
					s.deliver(a[0])
					s.deliver(a[0])
				}
				for i, o := range others {
					if (at+i)%5 == 0 {
						s.deliver(o)
						s.close(o)
					}
				}
				s.keep(others, 1)
			})
			s.want(nil, slices.Concat(a, others))
		})
	}
}

// BenchmarkSpared is a minute of a flood from a network that is spared, where
// as many senders are known good as are kept.
func BenchmarkSpared(b *testing.B) {
	for b.Loop() {
		b.StopTimer()
		d, err := New(Config{Capacity: 100, Rules: DefaultRules()})
		if err != nil {
			b.Fatal(err)
		}
		for i := range 100_000 {
			d.LearnGood(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), t0, t0, 1)
		}
		d.LearnGood(netip.MustParseAddr("192.0.2.250"), t0, t0, 1)
		b.StartTimer()
		for i := range 600 {
			now := t0.Add(time.Duration(i) * 100 * time.Millisecond)
			if i < 100 {
				a := netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i/2)})
				d.Observe(&Event{Time: now, Kind: Opened, Source: a, Port: uint16(1024 + i), Count: i + 1})
			}
			d.Observe(&Event{Time: now, Kind: Tick})
		}
	}
}
