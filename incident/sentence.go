package incident

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Sentence is the incident in one or two sentences that can be repeated to
// somebody who has never seen a log. It holds numbers and addresses only.
func (c *Collector) Sentence() string {
	if !c.started || c.peak == 0 && c.blocks == 0 {
		return "Nothing in the log says that the server was full, and nobody would have been blocked."
	}
	var s strings.Builder
	switch {
	case c.fullFor <= 0:
		fmt.Fprintf(&s, "The server was never full (at most %d of its %d slots taken)", min(c.peak, c.capacity), c.capacity)
	case c.incidents == 1:
		fmt.Fprintf(&s, "The server was %s for %s", c.howFull(), Span(c.fullFor))
	default:
		fmt.Fprintf(&s, "The server was %s for %s, on %d occasions (the longest %s)", c.howFull(), Span(c.fullFor), c.incidents, Span(c.longest))
	}
	var slots, storms []*Row
	for _, r := range c.rows {
		if r.Storm {
			storms = append(storms, r)
		} else {
			slots = append(slots, r)
		}
	}
	if len(slots) == 0 && len(storms) == 0 {
		if c.fullFor > 0 {
			s.WriteString("; no source crossed a rule,")
		}
		s.WriteString(" and nobody would have been blocked.")
		return s.String()
	}
	if len(slots) > 0 {
		t := c.Total()
		fmt.Fprintf(&s, "; %s held %d of its %d slots", group(slots), t.Held, t.Capacity)
		if t.Sources > 1 {
			s.WriteString(" at worst")
		}
	}
	if len(storms) > 0 {
		fmt.Fprintf(&s, "; %s opened connections faster than the rules allow", group(storms))
	}
	them := "them"
	if len(c.rows) == 1 && c.rows[0].Prefix.IsSingleIP() {
		them = "it"
	}
	fmt.Fprintf(&s, "; smtpguard would have blocked %s%s.", them, c.when())
	if n, m := c.Served(); n > 0 {
		who := "another sender"
		if m > 1 {
			who = number(m, "other sender", "other senders")
		}
		fmt.Fprintf(&s, " %s of %s that %s refused after that would have found a free slot.", number(n, "connection", "connections"), who, wasWere(n))
	}
	return s.String()
}

// howFull is "full", or less than that if slots were left.
func (c *Collector) howFull() string {
	if c.peak < c.capacity {
		return fmt.Sprintf("nearly full (%d of its %d slots taken at worst)", c.peak, c.capacity)
	}
	return "full"
}

// when says how long after the server was full the blocks came.
func (c *Collector) when() string {
	unmet := c.unmet
	if c.incidents > 0 && !c.met {
		unmet++
	}
	switch {
	case c.incidents == 0:
		return ""
	case unmet == c.incidents:
		return ", but at other times"
	case c.incidents > 1 && unmet > 0:
		return fmt.Sprintf(", the first at most %s after it began, but nobody on %d of these occasions", Span(c.firstIn), unmet)
	case c.incidents > 1:
		return fmt.Sprintf(", the first at most %s after it began", Span(c.firstIn))
	case c.early:
		return " before it was full"
	case c.lastIn > c.firstIn && c.blocks > 1:
		return fmt.Sprintf(", the first %s and the last %s after it began", Span(c.firstIn), Span(c.lastIn))
	default:
		return fmt.Sprintf(" %s after it began", Span(c.firstIn))
	}
}

// group says who they are.
func group(rows []*Row) string {
	n := 0
	single := true
	for _, r := range rows {
		n += r.Sources
		single = single && r.Prefix.IsSingleIP()
	}
	if len(rows) == 1 {
		if single {
			return rows[0].Who()
		}
		return fmt.Sprintf("%s of %s", number(n, "address", "addresses"), rows[0].Prefix)
	}
	if !single {
		return fmt.Sprintf("%s of %d networks", number(n, "address", "addresses"), networks(rows))
	}
	if k := networks(rows); k > 1 {
		return fmt.Sprintf("%s of %d networks", number(n, "address", "addresses"), k)
	}
	return fmt.Sprintf("%s of one network", number(n, "address", "addresses"))
}

// networks counts the /24 and /64, or the wider prefixes, that rows are of.
func networks(rows []*Row) int {
	nets := make(map[netip.Prefix]bool)
	for _, r := range rows {
		nets[network(r.Prefix)] = true
	}
	return len(nets)
}

// network is the /24 or /64 around p, or p itself if it is wider.
func network(p netip.Prefix) netip.Prefix {
	bits := 24
	if p.Addr().Is6() {
		bits = 64
	}
	if p.Bits() <= bits {
		return p
	}
	q, _ := p.Addr().Prefix(bits)
	return q
}

// Span is a length of time as a person says it, in two units at most:
// "1.9 s", "43 s", "12 min 30 s", "2 h 5 min", "3 d 4 h".
func Span(d time.Duration) string {
	two := func(n time.Duration, unit string, m time.Duration, small string) string {
		if m == 0 {
			return fmt.Sprintf("%d %s", n, unit)
		}
		return fmt.Sprintf("%d %s %d %s", n, unit, m, small)
	}
	const day = 24 * time.Hour
	switch {
	case d < 9950*time.Millisecond:
		return strings.TrimSuffix(strconv.FormatFloat(max(0, d.Seconds()), 'f', 1, 64), ".0") + " s"
	case d < time.Minute-time.Second/2:
		return fmt.Sprintf("%.0f s", d.Seconds())
	case d < time.Hour-time.Second/2:
		d = d.Round(time.Second)
		return two(d/time.Minute, "min", d%time.Minute/time.Second, "s")
	case d < day-time.Minute/2:
		d = d.Round(time.Minute)
		return two(d/time.Hour, "h", d%time.Hour/time.Minute, "min")
	default:
		d = d.Round(time.Hour)
		return two(d/day, "d", d%day/time.Hour, "h")
	}
}

func number(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

func wasWere(n int) string {
	if n == 1 {
		return "was"
	}
	return "were"
}
