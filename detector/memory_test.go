package detector

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"testing"
	"time"
)

// addressFlood opens n connections, each from another address, within the
// longest window of the default rules, on a full server of 100 slots. Three of
// ten come from one /48, another three from one /24, in turn, as far as it has
// addresses; the others from anywhere. Who delivers mail is as many. Memory
// stays within the budget, in the books and in the heap, and both networks are
// found, and nobody else.
func addressFlood(t testing.TB, n int) Stats {
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	var (
		v6 = netip.MustParsePrefix("2001:db8:7::/48")
		v4 = netip.MustParsePrefix("203.0.113.0/24")
	)
	before := heap()
	d, err := New(Config{Capacity: 100, Rules: DefaultRules()})
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	step := 290 * time.Second / time.Duration(n)
	now := t0
	var held [100]Event // the oldest is at i%100
	found := make(map[netip.Prefix]time.Duration)
	observe := func(ev *Event) {
		for _, v := range d.Observe(ev) {
			if _, ok := found[v.Source]; !ok {
				found[v.Source] = v.Time.Sub(t0)
			}
		}
	}
	peak := int64(0)
	for i := range n {
		now = now.Add(step)
		if old := &held[i%len(held)]; old.Kind != None {
			old.Kind, old.Time = Closed, now
			observe(old)
		}
		var b [16]byte
		a := netip.Addr{}
		switch i % 10 {
		case 0, 3, 6: // the counter makes each another
			b = v6.Addr().As16()
			binary.BigEndian.PutUint64(b[6:], rnd.Uint64())
			binary.BigEndian.PutUint32(b[12:], uint32(i))
			a = netip.AddrFrom16(b)
		case 1, 4, 7:
			b4 := v4.Addr().As4()
			b4[3] = byte(i / 3)
			a = netip.AddrFrom4(b4)
		case 2, 5: // multiplying by an odd number makes each another, all over
			a = netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, uint32(i)*2654435761|1)))
		default:
			b[0], b[1] = 0x2a, byte(rnd.Uint32())
			binary.BigEndian.PutUint64(b[2:], rnd.Uint64())
			binary.BigEndian.PutUint32(b[12:], uint32(i))
			a = netip.AddrFrom16(b)
		}
		ev := &held[i%len(held)]
		*ev = Event{Time: now, Kind: Opened, Source: a, Port: uint16(1024 + i%60000), Count: 100}
		observe(ev)
		if i%5 == 0 {
			var b [16]byte
			b[0] = 0x2b
			binary.BigEndian.PutUint64(b[8:], rnd.Uint64())
			observe(&Event{Time: now, Kind: Accepted, Source: netip.AddrFrom16(b)})
		}
		if i%(n/16+1) == 0 {
			peak = max(peak, heap()-before)
		}
	}
	grown := max(peak, heap()-before)
	s := d.Stats()
	if s.Memory > defaultMemory {
		t.Errorf("by the books %d bytes, of %d", s.Memory, defaultMemory)
	}
	if grown > defaultMemory {
		t.Errorf("the heap grew by %d bytes, more than %d", grown, defaultMemory)
	}
	if grown > s.Memory+s.Memory/10+1<<20 {
		t.Errorf("the heap grew by %d bytes, by the books it is %d", grown, s.Memory)
	}
	if s.Evicted == 0 {
		t.Error("nothing was evicted: too few to prove anything")
	}
	for _, p := range []netip.Prefix{v6, v4} {
		if at, ok := found[p]; !ok || at > 30*time.Second {
			t.Errorf("%s: found %t, after %v", p, ok, at)
		}
	}
	for p := range found {
		if !p.Overlaps(v6) && !p.Overlaps(v4) {
			t.Errorf("%s was found", p)
		}
	}
	if !t.Failed() {
		t.Logf("%d addresses: books %d KiB, heap %d KiB, %d evicted, %d kept, %d prefixes found", n, s.Memory>>10, grown>>10, s.Evicted, s.Sources, len(found))
	}
	runtime.KeepAlive(d)
	return s
}

func TestMillionAddresses(t *testing.T) {
	n := 1_000_000
	if raceDetector {
		n = 150_000
	}
	addressFlood(t, n)
}

// BenchmarkAddresses is the same with ten times as many.
func BenchmarkAddresses(b *testing.B) {
	for _, n := range []int{1_000_000, 10_000_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				s := addressFlood(b, n)
				b.ReportMetric(float64(s.Memory)/(1<<20), "MiB")
				b.ReportMetric(float64(s.Evicted), "evicted")
			}
		})
	}
}
