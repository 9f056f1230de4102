package exim

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
	_ "time/tzdata" // the table names zones

	"github.com/smtpguard/smtpguard/detector"
)

// example is one line of testdata/exim/lines.txt and what it must give.
type example struct {
	no        int // line number in the file
	zone      string
	reference time.Time
	first     bool // begins a new log
	line      []byte
	want      string
}

const linesFile = "../../testdata/exim/lines.txt"

func examples(t testing.TB) []example {
	t.Helper()
	text, err := os.ReadFile(linesFile)
	if err != nil {
		t.Fatal(err)
	}
	var all []example
	next := example{zone: "UTC"}
	var line string
	have := false
	for i, s := range strings.Split(strings.TrimSuffix(string(text), "\n"), "\n") {
		no := i + 1
		if v, ok := strings.CutPrefix(s, "=> "); ok {
			if !have {
				t.Fatalf("lines.txt:%d: no line before %q", no, s)
			}
			next.no, next.line, next.want = no, unescape(t, no, line), v
			all = append(all, next)
			next.first, next.reference = false, time.Time{}
			have = false
			continue
		}
		if have && line != "" {
			t.Fatalf("lines.txt:%d: no event given for the line before", no)
		}
		have = false
		switch {
		case strings.HasPrefix(s, "#"):
		case strings.HasPrefix(s, "zone: "):
			next.zone, next.first = s[len("zone: "):], true
		case strings.HasPrefix(s, "reference: "):
			if next.reference, err = time.Parse(time.RFC3339, s[len("reference: "):]); err != nil {
				t.Fatalf("lines.txt:%d: %v", no, err)
			}
		default:
			line, have = s, true
		}
	}
	if len(all) < 100 {
		t.Fatalf("%s has %d examples", linesFile, len(all))
	}
	return all
}

var escaped = regexp.MustCompile(`\\x[0-9a-f]{2}`)

func unescape(t testing.TB, no int, s string) []byte {
	return escaped.ReplaceAllFunc([]byte(s), func(m []byte) []byte {
		v, err := strconv.ParseUint(string(m[2:]), 16, 8)
		if err != nil {
			t.Fatalf("lines.txt:%d: %v", no, err)
		}
		return []byte{byte(v)}
	})
}

var kindNames = map[detector.Kind]string{
	detector.None: "none", detector.Tick: "tick", detector.Opened: "opened", detector.Closed: "closed",
	detector.Refused: "refused", detector.Accepted: "accepted", detector.Authenticated: "authenticated",
	detector.AuthFailed: "authfailed", detector.DaemonStarted: "started",
}

var reasonNames = map[detector.Reason]string{
	detector.RefusedFull: "full", detector.RefusedPerHost: "per-host", detector.RefusedLoad: "load", detector.RefusedPolicy: "policy",
	detector.ClosedQuit: "quit", detector.ClosedLost: "lost", detector.ClosedTimeout: "timeout", detector.ClosedDropped: "dropped",
	detector.ClosedRejected: "rejected", detector.ClosedKilled: "killed",
}

// notation writes an event as lines.txt does.
func notation(ev *detector.Event, withTime bool) string {
	var b strings.Builder
	name, ok := kindNames[ev.Kind]
	if !ok {
		name = fmt.Sprintf("kind(%d)", ev.Kind)
	}
	b.WriteString(name)
	switch {
	case ev.Port != 0:
		fmt.Fprintf(&b, " %s", netip.AddrPortFrom(ev.Source, ev.Port))
	case ev.Source.IsValid():
		fmt.Fprintf(&b, " %s", ev.Source)
	}
	if ev.Local.IsValid() {
		fmt.Fprintf(&b, " local=%s", ev.Local)
	}
	if ev.Count != 0 {
		fmt.Fprintf(&b, " count=%d", ev.Count)
	}
	if ev.Capacity != 0 {
		fmt.Fprintf(&b, " max=%d", ev.Capacity)
	}
	if ev.Reason != 0 {
		name, ok := reasonNames[ev.Reason]
		if !ok {
			name = fmt.Sprintf("reason(%d)", ev.Reason)
		}
		b.WriteString(" " + name)
	}
	if withTime && !ev.Time.IsZero() {
		b.WriteString(" at " + ev.Time.Format(time.RFC3339Nano))
	}
	return b.String()
}

func newParser(t testing.TB, zone string) *Parser {
	t.Helper()
	loc, err := time.LoadLocation(zone)
	if err != nil {
		t.Fatal(err)
	}
	p := New(loc)
	p.SetReference(time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC))
	return p
}

func TestLines(t *testing.T) {
	var p *Parser
	for _, x := range examples(t) {
		if x.first || p == nil {
			p = newParser(t, x.zone)
		}
		if !x.reference.IsZero() {
			p.SetReference(x.reference)
		}
		ev := detector.Event{Kind: 99, Count: 7, Port: 3} // must be overwritten
		ok := p.Parse(x.line, &ev)
		if ok != (ev.Kind != detector.None) {
			t.Errorf("lines.txt:%d: Parse says %v for %v", x.no, ok, ev)
		}
		if !ok && ev != (detector.Event{}) {
			t.Errorf("lines.txt:%d: no event, but %v", x.no, ev)
		}
		if got := notation(&ev, strings.Contains(x.want, " at ")); got != x.want {
			t.Errorf("lines.txt:%d: %q\n got %s\nwant %s", x.no, x.line, got, x.want)
		}
	}
}

// No line allocates, be it of interest or not, in any zone.
func TestNoAllocs(t *testing.T) {
	all := examples(t)
	for _, zone := range []string{"UTC", "Europe/Berlin"} {
		p := newParser(t, zone)
		var ev detector.Event
		if n := testing.AllocsPerRun(5, func() {
			for _, x := range all {
				p.Parse(x.line, &ev)
			}
		}); n != 0 {
			for _, x := range all {
				if n := testing.AllocsPerRun(10, func() { p.Parse(x.line, &ev) }); n != 0 {
					t.Errorf("lines.txt:%d: %v allocations", x.no, n)
				}
			}
			t.Errorf("%s: %v allocations for all lines", zone, n)
		}
	}
}

// Each template must also be read in every form of prefix.
func TestPrefixes(t *testing.T) {
	want := time.Date(2026, 11, 22, 19, 45, 50, 0, time.UTC)
	forms := []struct{ before, after string }{
		{"2026-11-22 19:45:50 ", ""},
		{"2026-11-22 19:45:50.000 ", ""},
		{"2026-11-22 19:45:50 [12] ", ""},
		{"2026-11-22 21:45:50 +0200 ", ""},
		{"2026-11-22 16:15:50.000 -0330 [12] ", ""},
		{"Nov 22 19:45:50 vm exim[12]: ", ""},
		{"Nov 22 19:45:50 vm exim: ", ""},
		{"Nov 22 19:45:51 vm exim[12]: 2026-11-22 19:45:50 ", ""},
		{"Nov 22 19:45:51 vm exim[12]: 2026-11-22 19:45:50.000 +0000 ", ""},
		{"2026-11-22T20:45:50.000000+01:00 vm exim[12]: ", ""},
		{"2026-11-22T20:45:50.000000+01:00 vm exim[12]: 2026-11-22 20:45:50 ", ""},
	}
	const filePrefix = "2026-11-22 19:45:50 "
	n := 0
	for _, x := range examples(t) {
		text, ok := bytes.CutPrefix(x.line, []byte(filePrefix))
		if x.zone != "UTC" || !ok || len(text) > 0 && (text[0] == '+' || text[0] == '[') {
			continue
		}
		n++
		for _, f := range forms {
			p := newParser(t, "UTC")
			var ev detector.Event
			line := append([]byte(f.before), text...)
			if !p.Parse(line, &ev) || !ev.Time.Equal(want) {
				t.Errorf("%q: %s", line, notation(&ev, true))
				continue
			}
			kind, _, _ := strings.Cut(x.want, " at ")
			if got := notation(&ev, false); got != kind && x.want[:4] != "tick" { // ticks may depend on lines before
				t.Errorf("lines.txt:%d: %q\n got %s\nwant %s", x.no, line, got, kind)
			}
		}
	}
	if n < 100 {
		t.Errorf("only %d lines with the prefix %q", n, filePrefix)
	}
}
