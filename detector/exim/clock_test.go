package exim

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// zones have odd offsets, changes by less than an hour, changes at midnight,
// changes of the standard offset (Apia left out a day), and none.
var zones = []string{
	"UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "America/St_Johns",
	"Africa/Casablanca", "Pacific/Apia", "Asia/Pyongyang", "America/Sao_Paulo", "Antarctica/Troll", "Europe/Dublin",
}

// A log written in any zone, with a line at least every 28 minutes (Lord Howe
// repeats half an hour) where the clock changes, is read back right.
func TestZonesRoundTrip(t *testing.T) {
	for _, name := range zones {
		t.Run(name, func(t *testing.T) {
			p := newParser(t, name)
			loc := p.clock.loc
			r := rand.New(rand.NewPCG(5, 6))
			at := time.Date(2010, 1, 1, 0, 0, 0, 0, time.UTC)
			end := time.Date(2028, 1, 1, 0, 0, 0, 0, time.UTC)
			for at.Before(end) {
				line := at.In(loc).AppendFormat(nil, "2006-01-02 15:04:05.000 x")
				var ev detector.Event
				if !p.Parse(line, &ev) || !ev.Time.Equal(at) {
					t.Fatalf("%s of %s is read as %s", line, at, ev.Time)
				}
				step := time.Duration(r.IntN(28*60*1000)) * time.Millisecond
				if start, next := at.In(loc).ZoneBounds(); !near(at, start) && !near(at, next) {
					step += 20 * time.Hour * time.Duration(r.IntN(2))
				}
				at = at.Add(step)
			}
		})
	}
}

func near(a, b time.Time) bool { return !b.IsZero() && a.Sub(b).Abs() < 50*time.Hour }

// Without a change nearby any order of lines is read right.
func TestZoneUnordered(t *testing.T) {
	for _, name := range zones {
		p := newParser(t, name)
		loc := p.clock.loc
		r := rand.New(rand.NewPCG(7, 8))
		for range 5000 {
			at := time.Unix(1262304000+r.Int64N(18*365*day), 0)
			if start, next := at.In(loc).ZoneBounds(); near(at, start) || near(at, next) {
				continue
			}
			var ev detector.Event
			line := at.In(loc).AppendFormat(nil, "2006-01-02 15:04:05 x")
			if !p.Parse(line, &ev) || !ev.Time.Equal(at) {
				t.Fatalf("%s: %s of %s is read as %s", name, line, at, ev.Time)
			}
			line = at.In(loc).AppendFormat(nil, "2006-01-02T15:04:05-07:00 vm exim[1]: x")
			if !p.Parse(line, &ev) || !ev.Time.Equal(at) {
				t.Fatalf("%s: %s of %s is read as %s", name, line, at, ev.Time)
			}
		}
	}
}

// Every second of some days, against the library.
func TestDate(t *testing.T) {
	p := newParser(t, "UTC")
	var ev detector.Event
	for year := minYear; year <= maxYear; year++ {
		for at := time.Date(year, 1, 1, 23, 59, 59, 0, time.UTC); at.Year() == year; at = at.Add(7*time.Hour + 24*time.Hour) {
			if !p.Parse(at.AppendFormat(nil, "2006-01-02 15:04:05 x"), &ev) || !ev.Time.Equal(at) {
				t.Fatalf("%s is read as %s", at, ev.Time)
			}
		}
	}
	for _, s := range []string{"1989-12-31", "2200-01-01", "2100-02-29", "2026-00-01", "2026-01-00", "2026-04-31"} {
		if p.Parse([]byte(s+" 00:00:00 x"), &ev) {
			t.Errorf("%s is taken for a date: %s", s, ev.Time)
		}
	}
}

// Lines without a year keep theirs over years of log.
func TestYearless(t *testing.T) {
	p := newParser(t, "Europe/Berlin")
	at := time.Date(2019, 8, 1, 0, 0, 0, 0, time.UTC)
	p.SetReference(at)
	var ev detector.Event
	for at.Year() < 2032 {
		line := at.In(p.clock.loc).AppendFormat(nil, "Jan _2 15:04:05 vm exim[1]: x")
		if !p.Parse(line, &ev) || !ev.Time.Equal(at) {
			t.Fatalf("%s of %s is read as %s", line, at, ev.Time)
		}
		at = at.Add(61 * time.Hour)
	}
}

// Join refuses a block whose times depend on the lines before it.
func TestJoinDependent(t *testing.T) {
	bad := func(name string, before, block []string) { joined(t, name, before, block, false) }
	good := func(name string, before, block []string) { joined(t, name, before, block, true) }
	good("plain", []string{"2026-10-20 02:59:00 x"}, []string{"2026-10-20 03:00:00 x"})
	bad("the repeated hour", []string{"2026-10-25 02:59:00 x"}, []string{"2026-10-25 02:10:00 x"})
	good("the repeated hour, with offset", []string{"2026-10-25 02:59:00 x"}, []string{"2026-10-25 02:10:00 +0100 x"})
	good("the spring gap", nil, []string{"2026-03-29 02:10:00 x"})
	good("no year", []string{"Nov 22 19:45:54 vm exim[1]: x"}, []string{"Nov 23 19:45:54 vm exim[1]: x"})
	bad("no year, far from the reference", []string{"Nov 22 19:45:54 vm exim[1]: x"}, []string{"May 25 19:45:54 vm exim[1]: x"})
}

func joined(t *testing.T, name string, before, block []string, want bool) {
	t.Helper()
	p := newParser(t, "Europe/Berlin")
	q := p.Fork()
	var ev detector.Event
	for _, s := range before {
		p.Parse([]byte(s), &ev)
	}
	for _, s := range block {
		q.Parse([]byte(s), &ev)
	}
	was := *p
	if got := p.Join(q); got != want {
		t.Errorf("%s: Join says %v", name, got)
	} else if !got && *p != was {
		t.Errorf("%s: Join changed p", name)
	} else if got && (p.clock.last != ev.Time.Unix() || p.Stats().Lines != len(before)+len(block)) {
		t.Errorf("%s: Join did not take over", name)
	}
}
