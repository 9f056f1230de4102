package policy

import (
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDuration(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "0s": 0, "90s": 90 * time.Second, "1h30m": 90 * time.Minute, "1.5h": 90 * time.Minute,
		"7d": 7 * 24 * time.Hour, "2w": 14 * 24 * time.Hour, "1w2d3h4m5s": 9*24*time.Hour + 3*time.Hour + 4*time.Minute + 5*time.Second,
		"250ms": 250 * time.Millisecond, "5us": 5 * time.Microsecond, "5µs": 5 * time.Microsecond, "7ns": 7,
		"36500d": 36500 * 24 * time.Hour,
	} {
		if got, err := ParseDuration(in); err != nil || got != want {
			t.Errorf("ParseDuration(%q) = %v, %v; want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "1", "-1s", "+1s", "1s ", " 1s", "s", ".5s", "1.s", "1e3s", "1 s", "1m-1s", "36501d",
		"36500d1s", "9999999999999999999999999d", strings.Repeat("1s", 100000) + "x", strings.Repeat("9", 100000) + "s"} {
		if got, err := ParseDuration(in); err == nil || len(err.Error()) > 250 {
			t.Errorf("ParseDuration(%.20q) = %v, %v", in, got, err)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0s", 10 * time.Minute: "10m", 24 * time.Hour: "1d", 30 * day: "30d", 90 * time.Minute: "1h30m", -time.Second: "-1s",
		day + time.Nanosecond: "1d1ns",
	} {
		if got := FormatDuration(d); got != want {
			t.Errorf("FormatDuration(%d) = %q, want %q", d, got, want)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		d := time.Duration(rapid.Int64Range(0, int64(Longest)).Draw(t, "ns"))
		if got, err := ParseDuration(FormatDuration(d)); err != nil || got != d {
			t.Fatalf("%s: %v, %v", FormatDuration(d), got, err)
		}
	})
}

func TestSize(t *testing.T) {
	for in, want := range map[string]int64{"64MiB": 64 << 20, "1GiB": 1 << 30, "512KiB": 512 << 10, "0KiB": 0} {
		if got, f := parseSize(in); f != nil || got != want {
			t.Errorf("%s: %d, %v", in, got, f)
		}
	}
	for in, hint := range map[string]string{
		"64MB": "did you mean 64MiB?", "64 MiB": "did you mean 64MiB?", "64m": "did you mean 64MiB?", "64": "a unit is missing",
		"64b": "units are", "1.5GiB": "write it as", "-1MiB": "write it as", "999999999999999999GiB": "", "9999999999999999999999MiB": "write it as",
	} {
		if got, f := parseSize(in); f == nil || !strings.HasPrefix(f.hint, hint) {
			t.Errorf("%s: %d, %v", in, got, f)
		}
	}
	for n, want := range map[int64]string{64 << 20: "64MiB", 1 << 30: "1GiB", 1536 << 10: "1536KiB", 1000: "1000"} {
		if got := formatSize(n); got != want {
			t.Errorf("formatSize(%d) = %s, want %s", n, got, want)
		}
	}
}

func TestNearest(t *testing.T) {
	words := []string{"threshold", "window", "max_blocks", "max_prefix", "name"}
	for in, want := range map[string]string{
		"treshold": "threshold", "Window": "window", "widnow": "window", "max-blocks": "max_blocks", "max_blocks_total": "max_blocks",
		"nmae": "name", "xyz": "", "": "", "n": "", "prefix": "", strings.Repeat("window", 10): "",
	} {
		if got := nearest(in, words); got != want {
			t.Errorf("nearest(%q) = %q, want %q", in, got, want)
		}
	}
}
