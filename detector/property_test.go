package detector

import (
	"math"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// anyEvent draws an event of any kind at now, sensible or not.
func anyEvent(t *rapid.T, now time.Time) Event {
	ev := Event{Time: now, Source: rapid.SampledFrom(population).Draw(t, "source")}
	// Opens are most of it, or nothing would ever be full.
	ev.Kind = rapid.SampledFrom([]Kind{Opened, Opened, Opened, Opened, Opened, Opened, Closed, Closed, Refused, Accepted, Authenticated,
		AuthFailed, DaemonStarted, Sampled, Tick}).Draw(t, "kind")
	switch ev.Kind {
	case Opened:
		ev.Port = uint16(rapid.IntRange(0, 20).Draw(t, "port"))
		ev.Count = rapid.SampledFrom([]int{0, 1, 2, 10, 18, 19, 20, 25, 1 << 40}).Draw(t, "count")
	case Closed:
		ev.Port = uint16(rapid.IntRange(0, 20).Draw(t, "port"))
	case Refused:
		ev.Reason = rapid.SampledFrom([]Reason{RefusedFull, RefusedPerHost, RefusedPolicy}).Draw(t, "reason")
	case DaemonStarted, Tick:
		ev.Source = netip.Addr{}
	case Sampled:
		ev.Source = netip.Addr{}
		ev.Count = rapid.IntRange(-1, 30).Draw(t, "sample")
	}
	return ev
}

// anyStream draws events whose times go forward by less than a jump, and are
// out of order by less than what is taken for a clock that was set back.
func anyStream(t *rapid.T) []Event {
	latest := t0
	all := make([]Event, rapid.IntRange(20, 200).Draw(t, "events"))
	for i := range all {
		gap := rapid.SampledFrom([]int{0, 0, 0, 1, 40, 100, 250, 500, 1000, 3000, 20_000, 200_000, -300, -1900}).Draw(t, "gap ms")
		if gap > 1000 && rapid.IntRange(0, 7).Draw(t, "rarely") > 0 {
			gap = 13
		}
		now := latest.Add(time.Duration(gap) * time.Millisecond)
		all[i] = anyEvent(t, now)
		latest = later(latest, now)
	}
	return all
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func smallDetector(t rapid.TB, capacity int) *Detector {
	d, err := New(Config{Capacity: capacity, Rules: randomRules})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// What is held is never negative and never more than was opened, whatever is
// closed twice, counted wrongly, restarted, forgotten.
func TestHeldWithinOpens(t *testing.T) {
	most := 0
	rapid.Check(t, func(t *rapid.T) {
		d := smallDetector(t, rapid.SampledFrom([]int{0, 20}).Draw(t, "capacity"))
		for _, ev := range anyStream(t) {
			d.Observe(&ev)
			if ev.Source.IsValid() && rapid.IntRange(0, 30).Draw(t, "forget") == 0 {
				p, _ := ev.Source.Prefix(rapid.SampledFrom([]int{16, 24, 32}).Draw(t, "bits"))
				d.Forget(p)
			}
			if h := d.Held(); h < 0 || uint64(h) > d.stats.Opened-d.stats.Closed-d.stats.Assumed {
				t.Fatalf("%d held, of %d opened, %d closed, %d taken as closed", h, d.stats.Opened, d.stats.Closed, d.stats.Assumed)
			}
			if c := d.Count(); c < 0 {
				t.Fatalf("count %d", c)
			}
			for i := uint32(1); i <= d.nodes.used; i++ {
				if n := d.nodes.at(i); n.held < 0 || uint32(n.held) > n.opens {
					t.Fatalf("%s holds %d of %d opens", n.key.prefix(), n.held, n.opens)
				}
			}
			most = max(most, d.Held())
		}
		d.check(t)
	})
	if most < 5 {
		t.Errorf("at most %d were held: the streams prove little", most)
	}
}

// Time may pass in one step or in many: with lines of no interest between the
// events, at their times or between them, the verdicts are the same.
func TestTicksChangeNothing(t *testing.T) {
	verdicts := 0
	rapid.Check(t, func(t *rapid.T) {
		one, many := smallDetector(t, 20), smallDetector(t, 20)
		var want, got []Verdict
		for _, ev := range anyStream(t) {
			want = append(want, one.Observe(&ev)...)
			for range rapid.IntRange(0, 2).Draw(t, "ticks before") {
				// Between now and the event, in the log's time.
				if now := many.logTime(many.now); many.started && ev.Time.After(now) {
					share := rapid.IntRange(0, 1000).Draw(t, "share")
					got = append(got, many.Advance(now.Add(ev.Time.Sub(now)/1000*time.Duration(share)))...)
				}
			}
			got = append(got, many.Observe(&ev)...)
			for range rapid.IntRange(0, 2).Draw(t, "ticks after") {
				got = append(got, many.Advance(ev.Time)...)
			}
		}
		verdicts += len(want)
		byLine(want)
		byLine(got)
		same := func(a, b Verdict) bool { return line(&a) == line(&b) && math.Abs(a.Score-b.Score) < 1e-9 }
		if !slices.EqualFunc(want, got, same) {
			t.Fatalf("at once\n%s\nin pieces\n%s", lines(want), lines(got))
		}
		if one.p != many.p || one.Count() != many.Count() || math.Abs(one.integral-many.integral) > 1e-6 {
			t.Fatalf("pressure %v and %v, count %d and %d", one.p, many.p, one.Count(), many.Count())
		}
	})
	if verdicts < 50 {
		t.Errorf("%d verdicts: the streams prove little", verdicts)
	}
}

// Who does nothing any more has no score in the end, though the server stays
// full; who holds on keeps it.
func TestDecay(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		d := smallDetector(t, 20)
		for _, ev := range anyStream(t) {
			d.Observe(&ev)
		}
		for h := range d.Holders() {
			if h.Port == 0 {
				t.SkipNow() // which of them a closing line means is not said
			}
		}
		now := d.logTime(d.now)
		for _, h := range slices.Collect(d.Holders()) {
			d.Observe(&Event{Time: now, Kind: Closed, Source: h.Addr, Port: h.Port})
		}
		if d.Held() != 0 {
			t.Fatalf("%d are held after all were closed", d.Held())
		}
		hog := netip.MustParseAddr("203.0.113.9")
		d.Observe(&Event{Time: now, Kind: Opened, Source: hog, Port: 7, Count: 20})
		for range 70 { // a window of a minute, and its oldest tenth
			now = now.Add(time.Second)
			d.Observe(&Event{Time: now, Kind: Refused, Reason: RefusedFull, Source: hog})
		}
		for i := uint32(1); i <= d.nodes.used; i++ {
			n := d.nodes.at(i)
			if n.key.bits == 0 || n.key.contains(keyOf(hog)) {
				continue
			}
			for r := range d.cfg.Rules {
				if s := d.score(i, r); s > nothing {
					t.Fatalf("%s: %s is %v after 70 s of nothing", n.key.prefix(), d.cfg.Rules[r].Name, s)
				}
			}
		}
		if s := d.satScore(d.find(keyOf(hog)), d.window[1]); math.Abs(s-1.0/20) > 1e-9 {
			t.Fatalf("one slot of 20 held through the window scores %v", s)
		}
	})
}
