package exim

import (
	"bytes"
	"encoding/binary"
	"math"
	"time"
)

const (
	day = 24 * 60 * 60

	// disorder is by how much a line may be earlier than the one before it
	// without being taken for the second pass of autumn's repeated hour, in
	// seconds. Exim's processes append to one log; they differ by
	// milliseconds, and a clock that is set back, by seconds.
	disorder = 60

	// minYear and maxYear bound the years that are believed. Within them a
	// time.Time also fits into nanoseconds since 1970.
	minYear = 1990
	maxYear = 2199
)

// clock reads the timestamps at the beginning of lines.
type clock struct {
	loc *time.Location

	// Wall times in [low, high) all have the one offset off, in seconds
	// east of UTC.
	low, high, off int64

	// The line before had stamp, which is the wall time stampWall; at
	// stampUnix in loc, if stampLocal.
	stamp      [19]byte
	stampWall  int64
	stampUnix  int64
	stampLocal bool

	// The same for the 15 bytes of a timestamp without a year.
	bsd     [15]byte
	bsdUnix int64

	// last is the time of the line before, if there was one.
	last    int64
	hasLast bool

	// ref is about when the next line without a year was written.
	ref int64

	// For join: whether a time was read in the light of last, and for times
	// without a year the reference that was begun with and the span.
	ordered          bool
	yearless         bool
	ref0             int64
	earliest, latest int64
}

// newClock returns a clock for timestamps in loc; ref is about the time of
// the first line.
func newClock(loc *time.Location, ref int64) clock {
	return clock{loc: loc, ref: ref}
}

// restart forgets the lines that were read.
func (c *clock) restart() {
	c.stampLocal = false
	c.bsd = [15]byte{}
	c.last, c.hasLast = 0, false
	c.ordered, c.yearless = false, false
}

// join makes c go on after what d has read, unless that depends on what c
// has read before.
func (c *clock) join(d *clock) bool {
	if d.ordered {
		return false
	}
	if d.yearless {
		// Both references choose the same years for times that are well
		// within half a year of both.
		const near = 180 * day
		for _, ref := range [...]int64{c.ref, d.ref0} {
			if ref-d.earliest > near || d.latest-ref > near {
				return false
			}
		}
		c.note(d.earliest)
		c.note(d.latest)
		c.ref = d.ref
	}
	if d.hasLast {
		c.last, c.hasLast = d.last, true
		c.stampLocal = false
		c.bsd = [15]byte{}
	}
	return true
}

// note remembers the time of a line without a year.
func (c *clock) note(t int64) {
	if !c.yearless {
		c.yearless, c.ref0, c.earliest, c.latest = true, c.ref, t, t
	}
	c.earliest, c.latest = min(c.earliest, t), max(c.latest, t)
}

// prefix is what stands before the text of a line.
type prefix struct {
	sec, nsec int64 // when
	n         int   // its length in bytes
	id        bool  // it has a message id
	cut       bool  // the text has lost its end in syslog
	syslog    bool
}

// prefix reads what stands before the text of line: "DATE TIME[.mmm]
// [+zzzz] [[pid]] [ID]" in a file, "STAMP HOST exim[pid]: " and perhaps all
// that again by way of syslog. False: it is neither.
func (c *clock) prefix(line []byte, pre *prefix) bool {
	if len(line) < 20 {
		return false
	}
	switch {
	case line[10] == ' ':
		wall, n := c.date(line, ' ')
		if n == 0 {
			return false
		}
		if pre.nsec, n = millis(line, n); n == 0 {
			return false
		}
		off, l := offset(line[n:], false)
		if l > 0 && n+l < len(line) && line[n+l] == ' ' {
			pre.sec = wall - off
			n += l + 1
		} else {
			pre.sec = c.local(wall)
		}
		pre.n = n
	case line[10] == 'T' || line[3] == ' ':
		if !c.syslog(line, pre) {
			return false
		}
	default:
		return false
	}
	c.last, c.hasLast = pre.sec, true

	b := line[pre.n:]
	if n := pidLen(b); n > 0 && n < len(b) && b[n] == ' ' { // +pid
		b = b[n+1:]
	}
	if n := idLen(b); n > 0 {
		pre.id = true
		b = b[n+1:]
	}
	pre.n = len(line) - len(b)
	return true
}

// syslog reads the prefix of a line that a syslog daemon wrote.
func (c *clock) syslog(line []byte, pre *prefix) bool {
	var sec, nsec int64
	var n int
	zoned := line[10] == 'T'
	if zoned { // rsyslog's file format, RFC 3339; journalctl -o short-iso
		wall, l := c.date(line, 'T')
		if l == 0 {
			return false
		}
		nsec, n = fraction(line, l)
		off, l := offset(line[n:], true)
		if l == 0 {
			return false
		}
		sec, n = wall-off, n+l
	} else { // RFC 3164
		if sec, n = c.yearlessDate(line); n == 0 {
			return false
		}
		nsec, n = fraction(line, n)
	}
	b := line[n:]
	if len(b) == 0 || b[0] != ' ' {
		return false
	}
	b = b[1:]
	host := bytes.IndexByte(b[:min(len(b), 256)], ' ')
	if host < 1 {
		return false
	}
	b = b[host+1:]
	if !bytes.HasPrefix(b, tagExim) {
		return false
	}
	b = b[len(tagExim):]
	if len(b) > 0 && b[0] == '4' { // Debian's name for the program
		b = b[1:]
	}
	b = b[pidLen(b):]
	if len(b) < 2 || b[0] != ':' || b[1] != ' ' {
		return false
	}
	b = b[2:]
	pre.syslog = true

	// Exim cuts a line after 870 bytes ("[1\3] ") and at line ends ("[1/3] ").
	if part, l := partOf(b); l > 0 {
		if part != 1 {
			return false
		}
		pre.cut = true
		b = b[l:]
	}

	// Exim's own timestamp (syslog_timestamp) has a year, perhaps
	// milliseconds, and its zone is known to us; but one with an offset is
	// never ambiguous.
	pre.sec, pre.nsec = sec, nsec
	if len(b) > 19 && b[10] == ' ' && b[4] == '-' {
		if wall, l := c.date(b, ' '); l > 0 {
			if ms, l := millis(b, l); l > 0 {
				off, z := offset(b[l:], false)
				switch {
				case z > 0 && l+z < len(b) && b[l+z] == ' ':
					pre.sec, pre.nsec = wall-off, ms
					l += z + 1
				case !zoned:
					pre.sec, pre.nsec = c.local(wall), ms
				}
				pre.n = len(line) - len(b) + l
				return true
			}
		}
	}
	if !zoned {
		// Only now, when it is the time of the line.
		c.note(sec)
		c.ref = sec
	}
	pre.n = len(line) - len(b)
	return true
}

// date reads "YYYY-MM-DD HH:MM:SS" with sep in its middle and returns it as
// seconds since 1970 as if it were UTC. n is its length, 0 if it is none.
func (c *clock) date(b []byte, sep byte) (wall int64, n int) {
	if len(b) < 19 {
		return 0, 0
	}
	if same19((*[19]byte)(b), &c.stamp) {
		return c.stampWall, 19
	}
	if b[4] != '-' || b[7] != '-' || b[10] != sep {
		return 0, 0
	}
	century, ok1 := two(b[0:])
	year, ok2 := two(b[2:])
	month, ok3 := two(b[5:])
	mday, ok4 := two(b[8:])
	secs, ok5 := timeOfDay(b[11:])
	year += 100 * century
	if !ok1 || !ok2 || !ok3 || !ok4 || !ok5 || year < minYear || year > maxYear {
		return 0, 0
	}
	if month < 1 || month > 12 || mday < 1 || mday > daysIn(year, month) {
		return 0, 0
	}
	c.stamp = [19]byte(b)
	c.stampWall = days(year, month, mday)*day + secs
	c.stampLocal = false
	return c.stampWall, 19
}

// same19 is *a == *b. Most lines have the second of the line before, and the
// compiler's comparison of 19 bytes is a call.
func same19(a, b *[19]byte) bool {
	le := binary.LittleEndian
	return le.Uint64(a[0:]) == le.Uint64(b[0:]) && le.Uint64(a[8:]) == le.Uint64(b[8:]) && le.Uint32(a[15:]) == le.Uint32(b[15:])
}

// yearlessDate reads "Mmm dd HH:MM:SS", dd with a space or a zero before one
// digit, in the year that brings it nearest to c.ref.
func (c *clock) yearlessDate(b []byte) (unix int64, n int) {
	if len(b) < 15 || b[6] != ' ' {
		return 0, 0
	}
	if [15]byte(b) == c.bsd {
		return c.bsdUnix, 15
	}
	month := bytes.Index(monthNames, b[:3])
	if month < 0 || month%3 != 0 {
		return 0, 0
	}
	month = month/3 + 1
	digits := [2]byte{b[4], b[5]}
	if digits[0] == ' ' {
		digits[0] = '0'
	}
	mday, ok1 := two(digits[:])
	secs, ok2 := timeOfDay(b[7:])
	if !ok1 || !ok2 || mday < 1 {
		return 0, 0
	}
	now := time.Unix(c.ref, 0).UTC().Year()
	var best int64
	found := false
	for year := now - 4; year <= now+4; year++ { // a leap year is among them, but for 1897 to 1903 and 2097 to 2103
		if year < minYear || year > maxYear || mday > daysIn(year, month) {
			continue
		}
		wall := days(year, month, mday)*day + secs
		if !found || abs(wall-c.ref) < abs(best-c.ref) {
			best, found = wall, true
		}
	}
	if !found {
		return 0, 0
	}
	c.bsd, c.bsdUnix = [15]byte(b), c.local(best)
	return c.bsdUnix, 15
}

// local returns the time that shows as wall on clocks in c.loc.
func (c *clock) local(wall int64) int64 {
	if c.stampLocal && wall == c.stampWall {
		return c.stampUnix
	}
	unix := wall - c.off
	if wall < c.low || wall >= c.high {
		unix = c.search(wall)
	}
	if wall == c.stampWall {
		c.stampUnix, c.stampLocal = unix, true
	}
	return unix
}

// search is local for a wall time that may be near a change of the offset.
func (c *clock) search(wall int64) int64 {
	// No zone was ever further than 16 hours from UTC.
	const reach = 16 * 60 * 60
	var found [2]int64
	n := 0
	before := wall // if the hour is missing
	t := time.Unix(wall-reach, 0).In(c.loc)
	for {
		start, end := t.ZoneBounds()
		_, off := t.Zone()
		unix := wall - int64(off)
		low, high := int64(math.MinInt64), int64(math.MaxInt64)
		if !start.IsZero() {
			low = start.Unix()
		}
		if !end.IsZero() {
			high = end.Unix()
		}
		switch {
		case unix >= high:
			before = unix
		case unix >= low && n < len(found):
			found[n] = unix
			n++
			// A day from the change on either side nothing is ambiguous.
			c.low, c.high, c.off = math.MinInt64, math.MaxInt64, int64(off)
			if !start.IsZero() {
				c.low = low + int64(off) + day
			}
			if !end.IsZero() {
				c.high = high + int64(off) - day
			}
		}
		if end.IsZero() || high > wall+reach {
			break
		}
		t = end
	}
	switch n {
	case 0:
		return before
	case 1:
		return found[0]
	}
	c.ordered = true
	first, second := found[0], found[1]
	if c.hasLast && first < c.last-disorder && c.last <= second+disorder {
		return second
	}
	return first
}

// millis reads "[.mmm] " at b[n:], as the log selector +millisec writes it,
// and returns the index after the space, 0 if it is not that.
func millis(b []byte, n int) (nsec int64, end int) {
	if n < len(b) && b[n] == '.' {
		if n+4 >= len(b) {
			return 0, 0
		}
		for _, d := range b[n+1 : n+4] {
			if d < '0' || d > '9' {
				return 0, 0
			}
			nsec = nsec*10 + int64(d-'0')
		}
		nsec *= 1e6
		n += 4
	}
	if n >= len(b) || b[n] != ' ' {
		return 0, 0
	}
	return nsec, n + 1
}

// fraction reads ".ffffff", up to nine digits, at b[n:] if it is there, and
// returns the index after it.
func fraction(b []byte, n int) (nsec int64, end int) {
	if n >= len(b) || b[n] != '.' {
		return 0, n
	}
	end = n + 1
	unit := int64(1e9)
	for end < len(b) && '0' <= b[end] && b[end] <= '9' && unit > 1 {
		nsec = nsec*10 + int64(b[end]-'0')
		unit /= 10
		end++
	}
	return nsec * unit, end
}

// offset reads "+hhmm", or with iso also "+hh:mm" and "Z", in seconds east of
// UTC. n is its length, 0 if it is none.
func offset(b []byte, iso bool) (off int64, n int) {
	if iso && len(b) > 0 && b[0] == 'Z' {
		return 0, 1
	}
	if len(b) < 5 || b[0] != '+' && b[0] != '-' {
		return 0, 0
	}
	h, ok1 := two(b[1:])
	n = 3
	if iso && b[3] == ':' {
		n = 4
	}
	if len(b) < n+2 {
		return 0, 0
	}
	m, ok2 := two(b[n:])
	if !ok1 || !ok2 || h > 15 || m > 59 {
		return 0, 0
	}
	off = int64(h*60+m) * 60
	if b[0] == '-' {
		off = -off
	}
	return off, n + 2
}

// timeOfDay reads "HH:MM:SS" as seconds since midnight. Second 60 is a leap
// second.
func timeOfDay(b []byte) (secs int64, ok bool) {
	if len(b) < 8 || b[2] != ':' || b[5] != ':' {
		return 0, false
	}
	h, ok1 := two(b[0:])
	m, ok2 := two(b[3:])
	s, ok3 := two(b[6:])
	return int64(h*60+m)*60 + int64(s), ok1 && ok2 && ok3 && h < 24 && m < 60 && s <= 60
}

// two reads two decimal digits.
func two(b []byte) (int, bool) {
	hi, lo := b[0]-'0', b[1]-'0'
	return int(hi)*10 + int(lo), hi <= 9 && lo <= 9
}

func daysIn(year, month int) int {
	switch month {
	case 2:
		if year%4 == 0 && (year%100 != 0 || year%400 == 0) {
			return 29
		}
		return 28
	case 4, 6, 9, 11:
		return 30
	}
	return 31
}

// days returns the number of days from 1970-01-01 to a date of the Gregorian
// calendar (the year is taken to begin in March, so that a leap day ends it).
func days(year, month, mday int) int64 {
	if month <= 2 {
		year--
		month += 12
	}
	return int64(365*year + year/4 - year/100 + year/400 + (153*(month-3)+2)/5 + mday - 1 - 719468)
}

func abs(n int64) int64 { return max(n, -n) }

// pidLen returns the length of the "[123]" that b begins with, 0 if none.
func pidLen(b []byte) int {
	if len(b) < 3 || b[0] != '[' {
		return 0
	}
	if _, n := number(b[1:], 10); n > 0 && n+1 < len(b) && b[n+1] == ']' {
		return n + 2
	}
	return 0
}

// idLen returns the length of the message id that b begins with, if a space
// follows: 6-6-2 base 62 digits, from Exim 4.97 on 6-11-4.
func idLen(b []byte) int {
	n := 0
	switch {
	case len(b) > 16 && b[6] == '-' && b[13] == '-' && b[16] == ' ':
		n = 16
	case len(b) > 23 && b[6] == '-' && b[18] == '-' && b[23] == ' ':
		n = 23
	default:
		return 0
	}
	for _, c := range b[:n] {
		if !('0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' || c == '-') {
			return 0
		}
	}
	return n
}

// partOf reads the "[1\3] " or "[1/3] " that b begins with; n is its length,
// 0 if it is not there.
func partOf(b []byte) (part, n int) {
	if len(b) < 6 || b[0] != '[' {
		return 0, 0
	}
	part, l := number(b[1:], 4)
	n = 1 + l
	if l == 0 || n >= len(b) || b[n] != '\\' && b[n] != '/' {
		return 0, 0
	}
	n++
	_, l = number(b[n:], 4)
	n += l
	if l == 0 || n+1 >= len(b) || b[n] != ']' || b[n+1] != ' ' {
		return 0, 0
	}
	return part, n + 2
}

var (
	tagExim    = []byte("exim")
	monthNames = []byte("JanFebMarAprMayJunJulAugSepOctNovDec")
)
