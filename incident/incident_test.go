package incident

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/store"
)

var t0 = time.Date(2026, 11, 22, 19, 44, 0, 0, time.UTC)

// world plays a log to a Collector. The server has 100 slots.
type world struct {
	t    *testing.T
	c    *Collector
	now  time.Time
	held int // with the blocks in force
	by   map[netip.Prefix]*store.Block
	port uint16
}

func newWorld(t *testing.T, pictures bool) *world {
	t.Helper()
	c, err := New(Options{SaturatedAt: 0.9, Pictures: pictures, Capacity: 100})
	if err != nil {
		t.Fatal(err)
	}
	return &world{t: t, c: c, now: t0, by: make(map[netip.Prefix]*store.Block)}
}

func (w *world) moment() Moment { return Moment{Time: w.now, Capacity: 100, Held: w.held} }

func (w *world) event(kind detector.Kind, from string, count int, reason detector.Reason) {
	ev := &detector.Event{Time: w.now, Kind: kind, Count: count, Reason: reason}
	var by *store.Block
	if from != "" {
		ev.Source = netip.MustParseAddr(from)
		for p, b := range w.by {
			if p.Contains(ev.Source) {
				by = b
			}
		}
		w.port++
		ev.Port = w.port
	}
	w.c.Event(w.moment, ev, by)
}

// fill has n connections of from open, the server counting on from count.
func (w *world) fill(from string, n, count int) {
	for i := range n {
		w.event(detector.Opened, from, count+i+1, 0)
	}
}

func (w *world) refuse(from string, n int) {
	for range n {
		w.event(detector.Refused, from, 0, detector.RefusedFull)
	}
}

func (w *world) block(prefix, rule string, held, sources int, metric detector.Metric) {
	p := netip.MustParsePrefix(prefix)
	v := &detector.Verdict{Time: w.now, Source: p, Rule: rule, Metric: metric, Window: 10 * time.Second, Score: 0.2, Threshold: 0.15,
		Held: held, Sources: sources, Capacity: 100, Count: 100, First: w.now.Add(-3 * time.Second)}
	b := &store.Block{Prefix: p, Verdict: v, Reason: v.Sentence(), Offence: 1, Since: w.now, Until: w.now.Add(10 * time.Minute)}
	w.by[p] = b
	w.c.Block(w.moment(), b)
}

func (w *world) after(d time.Duration) { w.now = w.now.Add(d) }

func (w *world) says(want string) {
	w.t.Helper()
	if got := w.c.Sentence(); got != want {
		w.t.Errorf("sentence:\n%s\nwant\n%s", got, want)
	}
}

func TestSentence(t *testing.T) {
	full := func(w *world) { // five addresses of one network, and one mail server that is turned away
		for i := range 5 {
			w.fill(fmt.Sprintf("203.0.113.%d", i+1), 20, 20*i)
		}
		w.refuse("192.0.2.1", 1)
		w.after(1900 * time.Millisecond)
	}
	for name, c := range map[string]struct {
		play func(*world)
		want string
	}{
		"nothing": {func(w *world) {}, "Nothing in the log says that the server was full, and nobody would have been blocked."},
		"calm": {func(w *world) { w.fill("192.0.2.1", 7, 0) },
			"The server was never full (at most 7 of its 100 slots taken) and nobody would have been blocked."},
		"busy": {func(w *world) {
			w.fill("192.0.2.1", 97, 0)
			w.after(9 * time.Second)
			w.event(detector.Closed, "192.0.2.1", 0, detector.ClosedQuit)
			w.event(detector.Opened, "192.0.2.1", 50, 0)
		}, "The server was nearly full (97 of its 100 slots taken at worst) for 9 s; no source crossed a rule, and nobody would have been blocked."},
		"five of one network": {func(w *world) {
			full(w)
			for i := range 5 {
				w.block(fmt.Sprintf("203.0.113.%d/32", i+1), "hog", 20, 1, detector.Saturation)
			}
			for range 125 {
				w.after(time.Second)
				w.refuse("192.0.2.1", 1)
				w.refuse("203.0.113.1", 1)
				w.refuse("203.0.113.6", 3) // never gets a slot, never sends: one more of them
				w.refuse("203.0.113.7", 3) // sent a mail once, and is one of them too
			}
			w.refuse("192.0.2.9", 2)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
			for range 12 {
				w.event(detector.Accepted, "192.0.2.1", 0, 0)
			}
			w.event(detector.Accepted, "203.0.113.7", 0, 0)
		}, "The server was full for 2 min 7 s; 5 addresses of one network held 100 of its 100 slots at worst; smtpguard would have blocked them 1.9 s after it began. " +
			"127 connections of 2 other senders that were refused after that would have found a free slot."},
		"those blocked later are not victims": {func(w *world) {
			full(w)
			w.block("203.0.113.1/32", "hog", 20, 1, detector.Saturation)
			w.refuse("203.0.113.2", 50)
			w.after(2 * time.Second)
			w.block("203.0.113.2/32", "hog", 20, 1, detector.Saturation)
			w.refuse("192.0.2.1", 1)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
		}, "The server was full for 3.9 s; 2 addresses of one network held 40 of its 100 slots at worst; smtpguard would have blocked them, " +
			"the first 1.9 s and the last 3.9 s after it began. 1 connection of another sender that was refused after that would have found a free slot."},
		"no slot would have been free": {func(w *world) {
			full(w)
			w.block("203.0.113.1/32", "hog", 20, 1, detector.Saturation)
			w.held = 100
			w.refuse("192.0.2.1", 50)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
		}, "The server was full for 1.9 s; 203.0.113.1 held 20 of its 100 slots; smtpguard would have blocked it 1.9 s after it began."},
		"a network": {func(w *world) {
			full(w)
			w.block("203.0.113.0/24", "net", 97, 80, detector.Saturation)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
		}, "The server was full for 1.9 s; 80 addresses of 203.0.113.0/24 held 97 of its 100 slots at worst; smtpguard would have blocked them 1.9 s after it began."},
		"a storm": {func(w *world) {
			w.fill("203.0.113.1", 5, 0)
			w.block("203.0.113.1/32", "burst", 1, 1, detector.Opens)
		}, "The server was never full (at most 5 of its 100 slots taken); 203.0.113.1 opened connections faster than the rules allow; smtpguard would have blocked it."},
		"twice, blocked once": {func(w *world) {
			full(w)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
			w.after(time.Hour)
			full(w)
			w.block("203.0.113.0/24", "net", 97, 80, detector.Saturation)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
		}, "The server was full for 3.8 s, on 2 occasions (the longest 1.9 s); 80 addresses of 203.0.113.0/24 held 97 of its 100 slots at worst; " +
			"smtpguard would have blocked them, the first at most 1.9 s after it began, but nobody on 1 of these occasions."},
		"before it was full": {func(w *world) {
			w.fill("203.0.113.1", 60, 0)
			w.block("203.0.113.1/32", "hog", 60, 1, detector.Saturation)
			full(w)
			w.event(detector.Opened, "192.0.2.1", 3, 0)
		}, "The server was full for 1.9 s; 203.0.113.1 held 60 of its 100 slots; smtpguard would have blocked it before it was full. " +
			"1 connection of another sender that was refused after that would have found a free slot."},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, false)
			c.play(w)
			w.t = t
			w.says(c.want)
		})
	}
}

// A count is not believed for ever: where lines of refusals are all there is,
// the server was full while they came.
func TestSilence(t *testing.T) {
	w := newWorld(t, false)
	w.refuse("192.0.2.1", 1)
	w.after(3 * time.Second)
	w.refuse("192.0.2.1", 1)
	w.after(24 * time.Hour)
	w.event(detector.Closed, "192.0.2.1", 0, 0)
	if got, want := w.c.Full(), 3*time.Second+believedUncounted; got != want {
		t.Errorf("refusals only: full for %s, want %s", got, want)
	}
	w = newWorld(t, false)
	w.fill("192.0.2.1", 95, 0)
	w.after(24 * time.Hour)
	w.event(detector.Opened, "192.0.2.1", 1, 0)
	if got := w.c.Full(); got != believed {
		t.Errorf("silence: full for %s, want %s", got, believed)
	}
}

// A clock that is set back stretches nothing and undoes nothing.
func TestClockSetBack(t *testing.T) {
	w := newWorld(t, true)
	w.fill("192.0.2.1", 95, 0)
	w.after(2 * time.Second)
	w.refuse("192.0.2.2", 1)
	w.after(-time.Hour)
	w.refuse("192.0.2.2", 1)
	w.after(3 * time.Second)
	w.event(detector.Opened, "192.0.2.1", 1, 0)
	if got := w.c.Full(); got != 5*time.Second {
		t.Errorf("full for %s, want 5s", got)
	}
	if got := len(w.c.series.whole.buckets); got != 11 {
		t.Errorf("%d buckets, want 11 for 5 s", got)
	}
}

// What blocked sources hold is followed in the log as it is, and never more
// than there is.
func TestHeld(t *testing.T) {
	w := newWorld(t, false)
	w.fill("203.0.113.1", 20, 0)
	w.block("203.0.113.1/32", "hog", 20, 1, detector.Saturation)
	w.event(detector.Closed, "203.0.113.1", 0, 0)
	w.fill("203.0.113.1", 30, 19)
	for range 60 {
		w.event(detector.Closed, "203.0.113.1", 0, 0)
	}
	w.fill("203.0.113.1", 3, 0)
	r := w.c.Rows()[0]
	if r.Held != 49 || r.Opened != 33 || r.held != 3 || w.c.heldNow != 3 {
		t.Errorf("held %d at worst, %d now (%d of all), %d opened; want 49, 3, 3, 33", r.Held, r.held, w.c.heldNow, r.Opened)
	}
	w.fill("203.0.113.1", 500, 3)
	if r.Held != 100 || w.c.Total().Held != 100 {
		t.Errorf("held %d, together %d of 100", r.Held, w.c.Total().Held)
	}
}

// However long the log, a timeline keeps its sums, its lowest and highest
// counts and its full time, in a bounded number of buckets.
func TestTimeline(t *testing.T) {
	r := rand.New(rand.NewPCG(7, 7))
	for range 20 {
		w := newWorld(t, true)
		var accepted, opened uint32
		highest := 0
		for range 3000 {
			w.after(time.Duration(r.ExpFloat64() * float64(time.Duration(1+r.IntN(60))*time.Second)))
			switch r.IntN(3) {
			case 0:
				w.event(detector.Accepted, "192.0.2.1", 0, 0)
				accepted++
			case 1:
				n := 1 + r.IntN(100)
				highest = max(highest, n)
				w.event(detector.Opened, fmt.Sprintf("192.0.2.%d", r.IntN(256)), n, 0)
				opened++
			default:
				w.event(detector.Closed, "192.0.2.1", 0, 0)
			}
		}
		l := w.c.series.whole
		if len(l.buckets) > maxBuckets || len(l.buckets) < maxBuckets/2 {
			t.Fatalf("%d buckets", len(l.buckets))
		}
		var sum bucket
		for i := range l.buckets {
			b := &l.buckets[i]
			if b.min > b.max || b.held < 0 || b.full > l.width {
				t.Fatalf("bucket %d: %+v", i, b)
			}
			sum.merge(b)
		}
		if sum.accepted != accepted || sum.opened != opened || sum.max != highest {
			t.Errorf("%d accepted, %d opened, at most %d; want %d, %d, %d", sum.accepted, sum.opened, sum.max, accepted, opened, highest)
		}
		if d := sum.full - w.c.Full(); d.Abs() > time.Millisecond || sum.full == 0 {
			t.Errorf("full for %s in the buckets, %s in all", sum.full, w.c.Full())
		}
		if end := l.end(); end.Before(w.c.now) || end.Sub(w.c.now) > l.width {
			t.Errorf("the last bucket ends at %s, the log at %s", end, w.c.now)
		}
	}
}

// Twelve seconds of a year are still to be seen, closely.
func TestWorst(t *testing.T) {
	w := newWorld(t, true)
	calm := func(days int) {
		for range days * 24 {
			w.after(time.Hour)
			w.event(detector.Opened, "192.0.2.1", 1, 0)
		}
	}
	calm(100)
	w.fill("203.0.113.9", 100, 0)
	at := w.now
	w.after(12 * time.Second)
	w.event(detector.Opened, "192.0.2.1", 5, 0)
	calm(100)
	w.fill("203.0.113.8", 100, 0)
	w.after(5 * time.Second)
	w.event(detector.Opened, "192.0.2.1", 5, 0)
	calm(165)
	worst := w.c.series.worst
	if worst == nil || worst.full != 12*time.Second || worst.width > time.Second || at.Before(worst.start) || !at.Before(worst.end()) {
		t.Fatalf("the worst occasion: %+v", worst)
	}
	if !strings.Contains(page(t, w.c, PageOptions{}), "The worst occasion") {
		t.Error("the page does not show it")
	}
}

// Memory does not grow with the number of sources.
func TestBounded(t *testing.T) {
	w := newWorld(t, true)
	for i := range 20_000 {
		a := netip.AddrFrom4([4]byte{100, byte(i >> 16), byte(i >> 8), byte(i)})
		if i%10 == 0 {
			w.after(time.Second)
		}
		w.event(detector.Opened, a.String(), 1+i%100, 0)
		w.event(detector.Refused, a.String(), 0, detector.RefusedFull)
		if i%3 == 0 {
			w.by = map[netip.Prefix]*store.Block{}
			w.block(a.String()+"/32", "hog", 20, 1, detector.Saturation)
		}
	}
	c := w.c
	if len(c.rows) > maxRows || c.left == 0 || len(c.served) > maxServed || len(c.series.verdicts) > maxVerdicts {
		t.Errorf("%d rows (%d left), %d served, %d verdicts", len(c.rows), c.left, len(c.served), len(c.series.verdicts))
	}
	if n := len(page(t, c, PageOptions{})); n > 1<<20 {
		t.Errorf("the page has %d bytes", n)
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0 s", 0: "0 s", 1900 * time.Millisecond: "1.9 s", 2 * time.Second: "2 s", 9960 * time.Millisecond: "10 s",
		43400 * time.Millisecond: "43 s", 59600 * time.Millisecond: "1 min", 750 * time.Second: "12 min 30 s",
		time.Hour: "1 h", 125 * time.Minute: "2 h 5 min", 24*time.Hour - time.Second: "1 d", 76 * time.Hour: "3 d 4 h",
	} {
		if got := Span(d); got != want {
			t.Errorf("Span(%s) = %q, want %q", d, got, want)
		}
	}
}
