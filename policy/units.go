package policy

import (
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

const (
	day  = 24 * time.Hour
	week = 7 * day

	// Longest is the longest duration, a hundred years: also that of a block.
	Longest = 36500 * day
)

// durationUnits are the units of a duration, largest first.
var durationUnits = []struct {
	name string
	unit time.Duration
}{
	{"w", week}, {"d", day}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second},
	{"ms", time.Millisecond}, {"µs", time.Microsecond}, {"ns", time.Nanosecond},
}

var durationPart = regexp.MustCompile(`^([0-9]+(?:\.[0-9]+)?)(ms|us|µs|ns|w|d|h|m|s)`)

// ParseDuration reads a duration such as "10s", "1h30m", "7d" or "2w": Go's
// notation with d for 24 hours and w for 7 days, without a sign. The error
// is an Error with a hint.
func ParseDuration(s string) (time.Duration, error) {
	d, f := parseDuration(s)
	if f != nil {
		return 0, Error{Msg: f.msg, Hint: f.hint}
	}
	return d, nil
}

func parseDuration(s string) (time.Duration, *fault) {
	if s == "0" {
		return 0, nil
	}
	if len(s) > 64 {
		return 0, faultf(durationHint(""), "%s is not a duration", quote(s))
	}
	var total time.Duration
	for rest := s; ; {
		m := durationPart.FindStringSubmatch(rest)
		if m == nil {
			return 0, faultf(durationHint(s), "%s is not a duration", quote(s))
		}
		unit := unitOf(m[2])
		n, err := strconv.ParseFloat(m[1], 64)
		if err != nil || n*float64(unit) > float64(Longest) {
			return 0, faultf("the longest is 36500d", "%s is too long", quote(s))
		}
		if whole, err := strconv.ParseInt(m[1], 10, 64); err == nil {
			total += time.Duration(whole) * unit
		} else {
			total += time.Duration(math.Round(n * float64(unit)))
		}
		if total > Longest {
			return 0, faultf("the longest is 36500d", "%s is too long", quote(s))
		}
		if rest = rest[len(m[0]):]; rest == "" {
			return total, nil
		}
	}
}

func unitOf(name string) time.Duration {
	if name == "us" {
		name = "µs"
	}
	for _, u := range durationUnits {
		if u.name == name {
			return u.unit
		}
	}
	return 0
}

var wordyDuration = regexp.MustCompile(`^\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)\.?\s*$`)

// durationHint guesses what somebody meant who wrote "10 mins".
func durationHint(s string) string {
	const units = "units are s, m, h, d and w, as in 90s, 10m or 1h30m"
	if wholeForm.MatchString(s) && s[0] != '-' {
		return "a unit is missing: did you mean " + s + "s or " + s + "m? " + units
	}
	m := wordyDuration.FindStringSubmatch(s)
	if m == nil {
		return units
	}
	word := strings.ToLower(m[2])
	if word == "mo" || strings.HasPrefix(word, "month") || strings.HasPrefix(word, "year") || word == "y" {
		return units + "; a month is about 30d"
	}
	for _, u := range []struct{ name, words string }{
		{"s", "s sec secs second seconds"}, {"m", "m min mins minute minutes"},
		{"h", "h hr hrs hour hours"}, {"d", "d day days"}, {"w", "w week weeks wk wks"},
		{"ms", "ms msec millis millisecond milliseconds"},
	} {
		for w := range strings.FieldsSeq(u.words) {
			if w == word {
				return "did you mean " + m[1] + u.name + "?"
			}
		}
	}
	return units
}

// FormatDuration writes a duration in the form that ParseDuration reads, in
// days and smaller units: "10m", "7d", "1h30m", "0s". A negative one, which
// no setting can be, is written as Go does.
func FormatDuration(d time.Duration) string {
	if d == 0 {
		return "0s"
	}
	if d < 0 {
		return d.String()
	}
	var b strings.Builder
	for _, u := range durationUnits[1:] { // "14d" says as much as "2w"
		if n := d / u.unit; n > 0 {
			b.WriteString(strconv.FormatInt(int64(n), 10) + u.name)
			d -= n * u.unit
		}
	}
	return b.String()
}

// sizeUnits are the units of a size, largest first.
var sizeUnits = []struct {
	name string
	unit int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}}

var sizeForm = regexp.MustCompile(`^([0-9]{1,18})\s*([A-Za-z]*)$`)

func parseSize(s string) (int64, *fault) {
	m := sizeForm.FindStringSubmatch(s)
	if m == nil {
		return 0, faultf("write it as 64MiB; units are KiB, MiB and GiB", "%s is not a size", quote(s))
	}
	n, _ := strconv.ParseInt(m[1], 10, 64) // 18 digits always fit
	for _, u := range sizeUnits {
		if s != m[1]+u.name {
			continue
		}
		if n > math.MaxInt64/u.unit {
			return 0, faultf("", "%s is too large", quote(s))
		}
		return n * u.unit, nil
	}
	hint := "units are KiB, MiB and GiB, as in 64MiB"
	if m[2] == "" {
		hint = "a unit is missing: " + hint
	} else {
		for _, u := range sizeUnits {
			if strings.EqualFold(m[2][:1], u.name[:1]) {
				hint = "did you mean " + m[1] + u.name + "?"
			}
		}
	}
	return 0, faultf(hint, "%s is not a size", quote(s))
}

// formatSize writes a size with the largest unit that divides it.
func formatSize(n int64) string {
	for _, u := range sizeUnits {
		if n >= u.unit && n%u.unit == 0 {
			return strconv.FormatInt(n/u.unit, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}
