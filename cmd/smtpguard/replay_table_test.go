package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/incident"
	"github.com/smtpguard/smtpguard/store"
)

// What replay prints for people fits a terminal, and its numbers are those of
// the log as it is.
func TestReplayCorpus(t *testing.T) {
	logs, err := filepath.Glob("../../testdata/corpus/*.log")
	if err != nil || len(logs) == 0 {
		t.Fatal("no corpus", err)
	}
	for _, log := range logs {
		var truth struct {
			Measured struct {
				Opens   *int `json:"open_lines"`
				Refused int  `json:"refused_lines"`
			}
		}
		b, err := os.ReadFile(strings.TrimSuffix(log, ".log") + ".truth.json")
		if err == nil {
			err = json.Unmarshal(b, &truth)
		}
		if err != nil {
			t.Fatal(err)
		}
		var out, fault bytes.Buffer
		if code := run(t.Context(), []string{"smtpguard", "replay", "--zone", "UTC", log}, strings.NewReader(""), &out, &fault); code != exitDone {
			t.Fatalf("%s: exit status %d: %s", log, code, fault.String())
		}
		narrow(t, log, out.String())
		// In the logs of injections the truth counts forged lines, too; m2
		// has refusals of another kind.
		if m := truth.Measured; m.Opens != nil && !strings.Contains(log, "injection") && !strings.Contains(log, "m2-") {
			if want := fmt.Sprintf("%d opened, %d refused", *m.Opens, m.Refused); !strings.Contains(out.String(), want) {
				t.Errorf("%s: not %s:\n%s", log, want, out.String())
			}
		}
	}
}

func narrow(t *testing.T, name, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		if n := utf8.RuneCountInString(strings.TrimRight(line, "\n")); n > tableWidth {
			t.Errorf("%s: a line of %d characters: %s", name, n, line)
		}
	}
}

// The widest that there can be: whole IPv6 addresses, long names of rules,
// large numbers, two days.
func TestTableWidth(t *testing.T) {
	c, err := incident.New(incident.Options{SaturatedAt: 0.9})
	if err != nil {
		t.Fatal(err)
	}
	first := time.Date(2026, 11, 22, 23, 59, 59, 0, time.UTC)
	m := incident.Moment{Time: first, Capacity: 100}
	for i := range 30 {
		a := netip.MustParseAddr("2001:db8:aaaa:bbbb:cccc:dddd:eeee:0").As16()
		a[15] = 200 + byte(i)
		v := &detector.Verdict{Time: first, Rule: "a-rule-with-a-very-long-name", Metric: detector.Saturation, Window: 10 * time.Second, Held: 100, Capacity: 100, Sources: 1}
		v.Source = netip.PrefixFrom(netip.AddrFrom16(a), 128)
		for range 999 {
			c.Block(m, &store.Block{Prefix: v.Source, Verdict: v, Reason: v.Sentence(), Since: first, Until: first.Add(7 * 24 * time.Hour)})
		}
		b := &store.Block{Prefix: v.Source}
		for range 123_456 / (1 + 100*min(i, 1)) { // the first one has a large number
			c.Event(func() incident.Moment { return m }, &detector.Event{Kind: detector.Opened, Source: v.Source.Addr()}, b)
		}
	}
	var out bytes.Buffer
	showRows(&out, c, first, first.Add(48*time.Hour))
	narrow(t, "table", out.String())
	for _, want := range []string{"2001:db8:aaaa:bbbb:cccc:dddd:eeee:c8\n", "999x 6993d0h", "123k", "and 10 more\n", "100 %"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func TestWrap(t *testing.T) {
	word := strings.Repeat("x", 30)
	for in, want := range map[string]string{
		"":                                "",
		"a  b":                            "a b",
		word + " " + word + " " + word:    word + " " + word + "\n" + "     " + word,
		strings.Repeat("y", 100) + " z z": strings.Repeat("y", 100) + "\n     z z",
	} {
		if got := wrap(in, 5, tableWidth); got != want {
			t.Errorf("wrap(%q) = %q, want %q", in, got, want)
		}
	}
}

// BenchmarkReplayTable is BenchmarkReplay for people: what the closing table
// costs is the difference.
func BenchmarkReplayTable(b *testing.B) {
	one, err := os.ReadFile("../../testdata/corpus/k-legit-busy.log")
	if err != nil {
		b.Fatal(err)
	}
	log := bytes.Repeat(one, 100)
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if code := run(b.Context(), []string{"smtpguard", "replay", "-"}, bytes.NewReader(log), io.Discard, os.Stderr); code != 0 {
			b.Fatal(code)
		}
	}
}
