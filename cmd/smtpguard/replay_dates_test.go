package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/smtpguard/smtpguard/detector"
)

// dated makes a block of events at these times, in seconds.
func dated(secs ...int64) *block {
	b := &block{}
	for _, s := range secs {
		b.events = append(b.events, detector.Event{Time: time.Unix(s, 0)})
	}
	return b
}

func seconds(b *block) (secs []int64) {
	for _, ev := range b.events {
		secs = append(secs, ev.Time.Unix())
	}
	return secs
}

func upTo(from, to, step int64) (secs []int64) {
	for ; from < to; from += step {
		secs = append(secs, from)
	}
	return secs
}

func TestDates(t *testing.T) {
	const day = 24 * 3600
	for _, c := range []struct {
		name       string
		secs, want []int64
		written    int64
		misdated   uint64
	}{
		{"in order", upTo(1000, 2000, 7), upTo(1000, 2000, 7), 2000, 0},
		{"a little out of order", []int64{100, 101, 99, 103, 95, 104}, []int64{100, 101, 99, 103, 95, 104}, 104, 0},
		{"rare lines", upTo(0, 100*day, 5*day), upTo(0, 100*day, 5*day), 100 * day, 0},
		{"a night without a line", append(upTo(0, 50, 1), upTo(40_000, 40_050, 1)...), append(upTo(0, 50, 1), upTo(40_000, 40_050, 1)...), 50_000, 0},
		{"one from the future", []int64{10, 11, 9e8, 12, 13}, []int64{10, 11, 11, 12, 13}, 13, 1},
		{"one of a later hour", []int64{10, 11, 4000, 12, 13}, []int64{10, 11, 11, 12, 13}, 9000, 1},
		{"one from the past", []int64{9e8, 9e8 + 1, 5, 9e8 + 2, 9e8 + 3}, []int64{9e8, 9e8 + 1, 9e8 + 1, 9e8 + 2, 9e8 + 3}, 1e9, 1},
		{"the first from the future", []int64{9e8, 10, 11, 12}, []int64{10, 10, 11, 12}, 1e9, 1},
		{"the first from the past", []int64{5, 9e8, 9e8 + 1, 9e8 + 2}, []int64{9e8, 9e8, 9e8 + 1, 9e8 + 2}, 1e9, 1},
		{"the last from the future", []int64{10, 11, 12, 9e8}, []int64{10, 11, 12, 12}, 13, 1},
		{"the last from the past", []int64{9e8, 9e8 + 1, 9e8 + 2, 5}, []int64{9e8, 9e8 + 1, 9e8 + 2, 9e8 + 2}, 1e9, 1},
		{"fifteen in a row", slices.Concat(upTo(1000, 1040, 1), slices.Repeat([]int64{5000}, 15), upTo(1040, 1080, 1)),
			slices.Concat(upTo(1000, 1040, 1), slices.Repeat([]int64{1039}, 15), upTo(1040, 1080, 1)), 9000, 15},
		{"very many of a day to come", slices.Concat(upTo(1000, 1040, 1), slices.Repeat([]int64{200_000}, 500), upTo(1040, 1080, 1)),
			slices.Concat(upTo(1000, 1040, 1), slices.Repeat([]int64{1039}, 500), upTo(1040, 1080, 1)), 1080, 500},
		{"summer time ends", slices.Concat(upTo(10_000, 10_100, 1), upTo(6_500, 6_600, 1)),
			slices.Concat(upTo(10_000, 10_100, 1), upTo(6_500, 6_600, 1)), 6_600 + 3600, 0},
		{"of another zone", upTo(50_000, 50_100, 1), upTo(50_000, 50_100, 1), 50_100 - 8*3600, 0},
		{"of a zone an hour off", upTo(1000, 9000, 10), upTo(1000, 9000, 10), 9000 - 3600, 0},
		{"alone", []int64{77}, []int64{77}, 5, 0},
	} {
		for _, blocks := range []int{1, 2, 7} { // however the log is cut
			if blocks > len(c.secs) {
				continue
			}
			var d dates
			var bs []*block
			size := (len(c.secs) + blocks - 1) / blocks
			if blocks > 1 && size < nearby { // as many as are asked
				continue
			}
			for part := range slices.Chunk(c.secs, size) {
				bs = append(bs, dated(part...))
			}
			var got []int64
			for i, b := range bs {
				var next *block
				if i+1 < len(bs) {
					next = bs[i+1]
				}
				d.correct(b, next, time.Unix(c.written, 0))
				got = append(got, seconds(b)...)
			}
			if !slices.Equal(got, c.want) || d.misdated != c.misdated {
				t.Errorf("%s, in %d: got %v, %d misdated; want %v, %d", c.name, blocks, got, d.misdated, c.want, c.misdated)
			}
		}
	}
}

// Whatever single lines say among those of an honest log, the others keep
// their times and those get one between their neighbours'.
func TestDatesProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := int64(1e9)
		var secs, honest []int64
		var forged []bool
		gap := rapid.SampledFrom([]int64{1, 30, 3000}).Draw(t, "gap")
		for range rapid.IntRange(10, 200).Draw(t, "lines") {
			now += rapid.Int64Range(0, gap).Draw(t, "pause")
			if n := len(forged); n > 2 && !forged[n-1] && !forged[n-2] && rapid.IntRange(0, 5).Draw(t, "forged") == 0 {
				secs = append(secs, rapid.Int64Range(0, 4e9).Draw(t, "time"))
				forged = append(forged, true)
				continue
			}
			secs, forged, honest = append(secs, now), append(forged, false), append(honest, now)
		}
		b := dated(secs...)
		(&dates{}).correct(b, nil, time.Unix(now, 0))
		at := 0
		for i, got := range seconds(b) {
			if !forged[i] {
				if got != honest[at] {
					t.Fatalf("line %d of %d is of %d, not %d", i, len(secs), got, honest[at])
				}
				at++
			} else if lo, hi := honest[at-1], honest[min(at, len(honest)-1)]; got < lo-nearby*gap-15 || got > hi+nearby*gap+15 {
				t.Fatalf("forged line %d is taken as of %d, between %d and %d", i, got, lo, hi)
			}
		}
	})
}

// Lines that a local user forged, before, within and after a flood, change
// nothing of what a replay tells but the number of lines.
func TestReplayForgedDates(t *testing.T) {
	log, err := os.ReadFile("../../testdata/corpus/h-one-ip-hold.log")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(strings.TrimSuffix(string(log), "\n"), "\n")
	mod := time.Date(2026, 11, 22, 21, 0, 0, 0, time.UTC)
	tell := func(lines []string) (summary map[string]any, blocks, text string) {
		t.Helper()
		name := filepath.Join(t.TempDir(), "mainlog")
		if err := os.WriteFile(name, []byte(strings.Join(lines, "")), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, mod, mod); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		if status := run(t.Context(), []string{"smtpguard", "replay", "--zone", "UTC", "--json", name}, nil, &out, &errs); status != 0 {
			t.Fatal(status, errs.String())
		}
		for line := range strings.Lines(out.String()) {
			if strings.Contains(line, `"summary"`) {
				if err := json.Unmarshal([]byte(line), &summary); err != nil {
					t.Fatal(err)
				}
				continue
			}
			blocks += line
		}
		out.Reset()
		if status := run(t.Context(), []string{"smtpguard", "replay", "--zone", "UTC", name}, nil, &out, &errs); status != 0 {
			t.Fatal(status, errs.String())
		}
		for line := range strings.Lines(out.String()) {
			if !strings.HasPrefix(line, "lines ") && !strings.Contains(line, "cannot be true") && !strings.Contains(line, "the lines around") {
				text += line
			}
		}
		return summary, blocks, text
	}
	want, blocks, text := tell(lines)
	if blocks == "" || want["misdated"] != 0.0 {
		t.Fatalf("%v\n%s", want, blocks)
	}
	forged := func(at string) string { return at + " cwd=/tmp 3 args: exim -bp x\n" }
	for _, at := range []string{"2033-01-01 00:00:00", "1999-01-01 00:00:00", "2026-11-22 20:59:00", "2026-11-22 01:00:00"} {
		for _, place := range []int{1, len(lines) / 3, len(lines) / 2, len(lines) - 1} {
			got, gotBlocks, gotText := tell(slices.Insert(slices.Clone(lines), place, forged(at)))
			if gotBlocks != blocks {
				t.Errorf("%s at line %d: blocks\n%swant\n%s", at, place, gotBlocks, blocks)
			}
			if gotText != text {
				t.Errorf("%s at line %d: told\n%swant\n%s", at, place, gotText, text)
			}
			for _, k := range []string{"lines", "misdated", "events"} {
				delete(got, k)
			}
			for k := range got {
				if got[k] != want[k] {
					t.Errorf("%s at line %d: %s is %v, want %v", at, place, k, got[k], want[k])
				}
			}
		}
	}
}
