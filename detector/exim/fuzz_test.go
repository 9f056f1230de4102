package exim

import (
	"errors"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"testing"

	"github.com/smtpguard/smtpguard/detector"
)

// oracle is the open line, written down a second time as a pattern: nothing
// may stand between a prefix of Exim's or syslog's and "SMTP connection".
var oracle = regexp.MustCompile(`^(?s:` +
	`(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{3})? ([+-]\d{4} )?` +
	`|([A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d(\.\d*)?|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d*)?(Z|[+-]\d\d:?\d\d)) [^ ]+ exim4?(\[\d+\])?: ` +
	`(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(\.\d{3})? ([+-]\d{4} )?)?)` +
	`(\[\d+\] )?` +
	`SMTP connection from \[([0-9a-f:.]+)\](:\d+)?( I=\[[0-9a-f:.]+\](:\d+)?)?( Ci=\S+)? \(TCP/IP connection count = (\d+)\))$`)

func FuzzParse(f *testing.F) {
	for _, x := range examples(f) {
		f.Add(x.line)
	}
	p := newParser(f, "Europe/Berlin")
	f.Fuzz(func(t *testing.T, line []byte) {
		check(t, p, line)
	})
}

// check parses line and holds the event against what must be true of any.
func check(t *testing.T, p *Parser, line []byte) {
	var ev detector.Event
	ok := p.Parse(line, &ev)
	if ok == ev.Time.IsZero() || ok == (ev.Kind == detector.None) {
		t.Fatalf("%q: Parse says %v for %+v", line, ok, ev)
	}
	hasSource, hasReason, hasCount := false, false, false
	switch ev.Kind {
	case detector.None, detector.Tick, detector.DaemonStarted:
	case detector.Opened:
		hasSource, hasCount = true, true
		if !oracle.Match(line) {
			t.Fatalf("%q is no open line, but gives %+v", line, ev)
		}
	case detector.Closed, detector.Refused:
		hasSource, hasReason = true, true
	case detector.Accepted, detector.Authenticated, detector.AuthFailed:
		hasSource = true
	default:
		t.Fatalf("%q gives %+v", line, ev)
	}
	if ev.Source.IsValid() != hasSource || ev.Source.Is4In6() || ev.Source.Zone() != "" || ev.Local.Addr().Is4In6() ||
		!hasSource && (ev.Port != 0 || ev.Local.IsValid()) || (ev.Reason != 0) != hasReason || (ev.Count > 0) != hasCount || ev.Count < 0 {
		t.Fatalf("%q gives %+v", line, ev)
	}
	if ok && (ev.Time.Year() < minYear-1 || ev.Time.Year() > maxYear+1) {
		t.Fatalf("%q is of %s", line, ev.Time)
	}
}

// Lines of the table with pieces of others put in: nearer to an attacker's
// work than random bytes.
func TestSpliced(t *testing.T) {
	all := examples(t)
	r := rand.New(rand.NewPCG(1, 2))
	p := newParser(t, "Europe/Berlin")
	opened := 0
	var kept [][]byte
	for range 200_000 {
		a, b := all[r.IntN(len(all))].line, all[r.IntN(len(all))].line
		if len(a) == 0 || len(b) == 0 {
			continue
		}
		i, j := r.IntN(len(a)+1), r.IntN(len(a)+1)
		k, l := r.IntN(len(b)+1), r.IntN(len(b)+1)
		line := append(append(append([]byte{}, a[:min(i, j)]...), b[min(k, l):max(k, l)]...), a[max(i, j):]...)
		check(t, p, line)
		if oracle.Match(line) {
			opened++
		}
		if len(kept) < 20_000 {
			kept = append(kept, line)
		}
	}
	if opened == 0 {
		t.Error("no open line came out")
	}
	var ev detector.Event
	if n := testing.AllocsPerRun(3, func() {
		for _, line := range kept {
			p.Parse(line, &ev)
		}
	}); n != 0 {
		t.Errorf("%v allocations for %d lines", n, len(kept))
	}
}

// parseAddr agrees with netip.ParseAddr, but for upper case and zones.
func TestParseAddr(t *testing.T) {
	const alphabet = "0123459af:::..."
	r := rand.New(rand.NewPCG(3, 4))
	bad := []string{"", ":", "::", ":::", "1", "1.2.3.4", "1.2.3.4.", ".1.2.3.4", "1.2.3.256", "01.2.3.4", "1::2::3", "::1:", ":1::", "1:2:3:4:5:6:7:8",
		"1:2:3:4:5:6:7::", "::2:3:4:5:6:7:8", "1:2:3:4:5:6:7:8::", "1:2:3:4::5:6:7:8", "1:2:3:4:5:6:7:8:9", "12345::", "::ffff:1.2.3.4", "::1.2.3", "1:2:3:4:5:6:1.2.3.4",
		"1:2:3:4:5:6:7:1.2.3.4", "1.2.3.4::", "::1.2.3.4:5", "fe80::1%eth0", "FE80::1", "g::", "0:0:0:0:0:0:0:0", "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255"}
	for i := range 300_000 {
		var s string
		if i < len(bad) {
			s = bad[i]
		} else {
			b := make([]byte, r.IntN(24))
			for i := range b {
				b[i] = alphabet[r.IntN(len(alphabet))]
			}
			s = string(b)
			if i%2 == 0 { // a real one, sometimes with a byte changed
				var ip [16]byte
				for i := range ip {
					if r.IntN(3) == 0 {
						ip[i] = byte(r.Uint32())
					}
				}
				b := []byte(netip.AddrFrom16(ip).String())
				if r.IntN(2) == 0 {
					b[r.IntN(len(b))] = alphabet[r.IntN(len(alphabet))]
				}
				s = string(b)
			}
		}
		want, err := netip.ParseAddr(s)
		want = want.Unmap()
		if s == "FE80::1" || s == "fe80::1%eth0" {
			want, err = netip.Addr{}, errors.ErrUnsupported
		}
		got, ok := parseAddr([]byte(s))
		if ok != (err == nil) || ok && got != want {
			t.Fatalf("%q: %v %v, want %v %v", s, got, ok, want, err)
		}
	}
}
