package doctor

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// allowed reports whether an address can never be blocked, for good: an open
// SSH session is not for good.
func (x *exam) allowed(a netip.Addr) bool {
	for _, e := range x.Exempt {
		if e.Prefix.Contains(a) && !strings.Contains(e.Why, "SSH") {
			return true
		}
	}
	for _, p := range x.Allowed {
		if p.Contains(a) {
			return true
		}
	}
	return false
}

// oneLine is an error, fit to be a part of a sentence: errors hold what other
// programs said.
func oneLine(err error) string {
	if err == nil {
		return ""
	}
	return bounded(err.Error(), 500)
}

// bounded is a text without line ends and control characters, cut.
func bounded(s string, most int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case r == '\n', r == '\t':
			return ' '
		case r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 || r == 0x202e || r == '\ufffd':
			return '?'
		}
		return r
	}, strings.TrimSpace(s))
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// hours is a duration in its two largest units: 3d4h, 1h5m, 20s.
func hours(d time.Duration) string {
	if d >= 48*time.Hour {
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
	unit := time.Second
	if d >= time.Hour {
		unit = time.Minute
	}
	s := d.Truncate(unit).String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}
