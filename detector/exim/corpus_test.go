package exim

import (
	"bytes"
	"cmp"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smtpguard/smtpguard/detector"
)

const corpus = "../../testdata/corpus"

// corpusLogs calls f with each log of the corpus and its truth.
func corpusLogs(t *testing.T, f func(t *testing.T, lines [][]byte, truth *truth)) {
	names, err := filepath.Glob(corpus + "/*.log")
	if err != nil || len(names) == 0 {
		t.Fatalf("no logs in %s (%v)", corpus, err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".log"), func(t *testing.T) {
			text, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			var tr truth
			j, err := os.ReadFile(strings.TrimSuffix(name, ".log") + ".truth.json")
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Unmarshal(j, &tr); err != nil {
				t.Fatal(err)
			}
			f(t, bytes.Split(bytes.TrimSuffix(text, []byte("\n")), []byte("\n")), &tr)
		})
	}
}

type truth struct {
	Scenario string  `json:"scenario"`
	TZ       string  `json:"tz"`
	Start    float64 `json:"start_epoch"`
	End      float64 `json:"end_epoch"`
	Measured struct {
		Opens    int `json:"open_lines"`
		MaxCount int `json:"max_logged_count"`
		Refused  int `json:"refused_lines"`
	} `json:"measured"`
}

// Every opened connection has exactly one end, and never more connections are
// open than Exim counts, but for the few that are about to exit.
func TestCorpusAccounting(t *testing.T) {
	corpusLogs(t, func(t *testing.T, lines [][]byte, tr *truth) {
		forged := strings.HasPrefix(tr.Scenario, "l3")
		p := newParser(t, cmp.Or(tr.TZ, "UTC"))
		open := map[netip.AddrPort]bool{}
		ended := map[netip.AddrPort]bool{}
		var ev detector.Event
		peak, unparsed := 0, 0
		for i, line := range lines {
			if !p.Parse(line, &ev) {
				unparsed++
				continue
			}
			if at := float64(ev.Time.Unix()); !forged && (at < tr.Start-2 || at > tr.End+2) {
				t.Errorf("line %d: %s is not within the run", i+1, ev.Time)
			}
			peak = max(peak, ev.Count)
			key := netip.AddrPortFrom(ev.Source, ev.Port)
			switch ev.Kind {
			case detector.Opened:
				if open[key] && !forged {
					t.Errorf("line %d: %s opened twice", i+1, key)
				}
				open[key] = true
				delete(ended, key)
			case detector.Closed:
				switch {
				case tr.Measured.Opens == 0: // no +smtp_connection
				case open[key]:
					delete(open, key)
					ended[key] = true
				case ended[key]:
					t.Errorf("line %d: %s ended twice: %s", i+1, key, line)
				default:
					t.Errorf("line %d: %s ended and never began: %s", i+1, key, line)
				}
			}
		}
		s := p.Stats()
		if forged {
			// A local user's complete lines: nobody can tell them.
			if s.Opened != 3 || unparsed != 3 {
				t.Errorf("%d opened and %d lines without a stamp, want 3 and 3", s.Opened, unparsed)
			}
			return
		}
		for key := range open {
			t.Errorf("%s has no end", key)
		}
		if unparsed != 0 {
			t.Errorf("%d lines without a stamp", unparsed)
		}
		if s.Refused != tr.Measured.Refused {
			t.Errorf("%d refused, want %d", s.Refused, tr.Measured.Refused)
		}
		// The truth's own numbers come from a loose pattern; in the log of
		// hostile lines they count what is forged.
		wantOpened := 0
		for _, line := range lines {
			if oracle.Match(line) {
				wantOpened++
			}
		}
		if s.Opened != wantOpened {
			t.Errorf("%d opened, want %d", s.Opened, wantOpened)
		}
		if !strings.HasPrefix(tr.Scenario, "l") && (s.Opened != tr.Measured.Opens || peak != tr.Measured.MaxCount) {
			t.Errorf("%d opened with a count of up to %d, want %d and %d", s.Opened, peak, tr.Measured.Opens, tr.Measured.MaxCount)
		}
		if s.Opened > 0 && s.WithoutPort > 0 {
			t.Errorf("%d events without a port", s.WithoutPort)
		}
		if s.Opened == 0 && s.WithPort > 0 {
			t.Errorf("%d events with a port", s.WithPort)
		}
	})
}

// The log of hostile lines names its victim 24 times over; only what the
// victim really did may be told of it.
func TestCorpusInjection(t *testing.T) {
	text, err := os.ReadFile(corpus + "/l-injection.log")
	if err != nil {
		t.Fatal(err)
	}
	victim := netip.MustParseAddr("10.67.0.10")
	got := map[detector.Kind]int{}
	p := newParser(t, "UTC")
	var ev detector.Event
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		if p.Parse(line, &ev) && ev.Source == victim {
			got[ev.Kind]++
		}
	}
	if len(got) != 3 || got[detector.Opened] != 5 || got[detector.Accepted] != 5 || got[detector.Closed] != 5 {
		t.Errorf("events of the victim: %v", got)
	}
}

// Read in blocks by forks of one Parser, the corpus gives the same events.
func TestForkJoin(t *testing.T) {
	corpusLogs(t, func(t *testing.T, lines [][]byte, tr *truth) {
		const block = 100
		whole := newParser(t, cmp.Or(tr.TZ, "UTC"))
		p := newParser(t, cmp.Or(tr.TZ, "UTC"))
		root := p.Fork()
		border := false
		for from := 0; from < len(lines); from += block {
			part := lines[from:min(len(lines), from+block)]
			var got []string
			read := func(p *Parser) {
				got = got[:0]
				for _, line := range part {
					var ev detector.Event
					p.Parse(line, &ev)
					got = append(got, notation(&ev, true))
				}
			}
			q := root.Fork()
			read(q)
			if !p.Join(q) {
				read(p)
			}
			for i, line := range part {
				var ev detector.Event
				whole.Parse(line, &ev)
				want := notation(&ev, true)
				if got[i] != want && i < 2 && ev.Kind == detector.Tick {
					border = true // the line before told it already
				} else if got[i] != want {
					t.Fatalf("line %d: %s\n got %s\nwant %s", from+i+1, line, got[i], want)
				}
			}
		}
		if got, want := p.Stats(), whole.Stats(); !border && got != want {
			t.Errorf("stats %+v, want %+v", got, want)
		}
	})
}
