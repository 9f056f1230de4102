package detector_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// truth is what NAME.truth.json says about NAME.log.
type truth struct {
	Scenario     string   `json:"scenario"`
	Attackers    []string `json:"attackers"`
	MustBlock    []string `json:"must_block"`
	MustNotBlock []string `json:"must_not_block"`
	Start        float64  `json:"start_epoch"`
	Attacks      []struct {
		Start time.Time `json:"start"`
		First string    `json:"first"`
	} `json:"attacks"`
}

// must lists the addresses that have to be covered.
func (tr *truth) must(t *testing.T) []netip.Addr {
	var all []netip.Addr
	for _, m := range tr.MustBlock {
		p := prefix(t, m)
		if p.IsSingleIP() {
			all = append(all, p.Addr())
			continue
		}
		for _, a := range tr.Attackers {
			if a, err := netip.ParseAddr(a); err == nil && p.Contains(a) {
				all = append(all, a)
			}
		}
	}
	return all
}

func prefix(t *testing.T, s string) netip.Prefix {
	if !strings.Contains(s, "/") {
		a := netip.MustParseAddr(s)
		return netip.PrefixFrom(a, a.BitLen())
	}
	p, err := netip.ParsePrefix(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// attackStart is when the attack of which a is part began; the log's times are
// whole seconds rounded down.
func (tr *truth) attackStart(p netip.Prefix) time.Time {
	for _, a := range tr.Attacks {
		if f, err := netip.ParseAddr(a.First); err == nil {
			if p.Contains(f) || netip.PrefixFrom(f, p.Bits()).Masked().Overlaps(p) {
				return a.Start
			}
			if g, err := f.Prefix(map[bool]int{true: 24, false: 48}[f.Is4()]); err == nil && g.Overlaps(p) {
				return a.Start
			}
		}
	}
	return time.Time{}
}

// degrade spoils an event as a poorer log would; false: the line is missing.
type degrade func(ev *detector.Event) bool

var degrades = []struct {
	name string
	f    degrade
	// all: every attacker must be found all the same; else some.
	all bool
}{
	{"complete", func(*detector.Event) bool { return true }, true},
	{"no ports", func(ev *detector.Event) bool { ev.Port = 0; return true }, true},
	{"no accepted mail", func(ev *detector.Event) bool {
		return ev.Kind != detector.Accepted && ev.Kind != detector.Authenticated
	}, true},
	// Who reconnects often pushes out of the books who sits still.
	{"no closing lines", func(ev *detector.Event) bool { return ev.Kind != detector.Closed }, false},
	// Held is all that is known: two blocks relieve the server, and a third
	// is not needed.
	{"no counts", func(ev *detector.Event) bool { ev.Count = 0; return true }, false},
	{"smtp_accept_max = 0", func(ev *detector.Event) bool { ev.Count = min(ev.Count, 1); return ev.Kind != detector.Refused }, false},
}

type block struct {
	prefix netip.Prefix
	at     time.Time
	rule   string
}

// replayed is what a log gave.
type replayed struct {
	d       *detector.Detector
	blocks  []block
	spared  int
	lines   int
	events  int
	verdict []string
}

// blocked says whether a is covered by a block.
func (r *replayed) blocked(a netip.Addr) bool {
	for _, b := range r.blocks {
		if b.prefix.Contains(a) {
			return true
		}
	}
	return false
}

// replay runs text through the detector. With enforce a block works at once:
// it frees what the source holds, and later lines of the source never were.
func replay(t *testing.T, text []byte, cfg detector.Config, enforce bool, spoil degrade) *replayed {
	t.Helper()
	return replayIn(t, time.UTC, text, cfg, enforce, spoil)
}

// replayIn is replay of a log whose times are in loc where they say no offset.
func replayIn(t *testing.T, loc *time.Location, text []byte, cfg detector.Config, enforce bool, spoil degrade) *replayed {
	t.Helper()
	d, err := detector.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r := &replayed{d: d}
	p := exim.New(loc)
	p.SetReference(time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC))
	for line := range bytes.Lines(text) {
		r.lines++
		var ev detector.Event
		if !p.Parse(bytes.TrimSuffix(line, []byte("\n")), &ev) || !spoil(&ev) {
			continue
		}
		r.events++
		if ev.Source.IsValid() && enforce && r.blocked(ev.Source) {
			ev = detector.Event{Time: ev.Time, Kind: detector.Tick}
		}
		for _, v := range d.Observe(&ev) {
			r.verdict = append(r.verdict, v.Time.Format("15:04:05.0 ")+v.Rule+" "+v.Sentence())
			if len(v.Spared) > 0 {
				r.spared++
				continue
			}
			r.blocks = append(r.blocks, block{v.Source, v.Time, v.Rule})
			if enforce {
				d.Forget(v.Source)
				if e := d.Explain(v.Source); e.Held != 0 || e.Known {
					t.Errorf("%s: after Forget %d slots are held still", v.Source, e.Held)
				}
			}
		}
	}
	return r
}

func corpus(t *testing.T, f func(t *testing.T, name string, text []byte, tr *truth)) {
	logs, err := filepath.Glob("../testdata/corpus/*.log")
	if err != nil || len(logs) < 10 {
		t.Fatalf("only %d logs in ../testdata/corpus (%v)", len(logs), err)
	}
	for _, path := range logs {
		name := strings.TrimSuffix(filepath.Base(path), ".log")
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		j, err := os.ReadFile(strings.TrimSuffix(path, ".log") + ".truth.json")
		if err != nil {
			t.Fatal(err)
		}
		var tr truth
		if err := json.Unmarshal(j, &tr); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		f(t, name, text, &tr)
	}
}

// Every attacker is found and no proper sender, in each log as it is and
// spoiled in each way, when blocks work and when they are only written down.
func TestCorpus(t *testing.T) {
	var table strings.Builder
	fmt.Fprintf(&table, "%-24s %-20s %-8s %8s %8s %6s %s\n", "log", "spoiled", "mode", "must", "innocent", "spared", "blocks (seconds from the start of the attack)")
	corpus(t, func(t *testing.T, name string, text []byte, tr *truth) {
		for _, s := range degrades {
			for _, enforce := range []bool{true, false} {
				r := replay(t, text, detector.Config{Rules: detector.DefaultRules()}, enforce, s.f)
				must := tr.must(t)
				got, bad := 0, 0
				for _, a := range must {
					if r.blocked(a) {
						got++
					}
				}
				for _, m := range tr.MustNotBlock {
					for _, b := range r.blocks {
						if b.prefix.Overlaps(prefix(t, m)) {
							bad++
							if name == "k-legit-busy" && s.name == "no accepted mail" {
								continue // nothing tells them from a flood then
							}
							t.Errorf("%s, %s: blocked %s, which covers %s: %s", name, s.name, b.prefix, m, strings.Join(r.verdict, "\n\t"))
						}
					}
				}
				mode := map[bool]string{true: "enforce", false: "observe"}[enforce]
				if enforce || s.name == "complete" {
					var list []string
					seen := map[netip.Prefix]bool{}
					for _, b := range r.blocks {
						if !seen[b.prefix] {
							seen[b.prefix] = true
							list = append(list, fmt.Sprintf("%s %s %.1f", b.prefix, b.rule, b.at.Sub(tr.attackStart(b.prefix)).Seconds()))
						}
					}
					more := ""
					if len(list) > 8 {
						more = fmt.Sprintf(" and %d more", len(list)-8)
						list = list[:8]
					}
					fmt.Fprintf(&table, "%-24s %-20s %-8s %4d/%-3d %8d %6d %s%s\n", name, s.name, mode, got, len(must), bad, r.spared, strings.Join(list, ", "), more)
				}
				// A log in Exim's default form has no line for an open
				// connection: who holds cannot be seen from it at all, only
				// from the socket table.
				if name == "a-default-debian" {
					if len(r.blocks) > 0 {
						t.Errorf("%s: blocks out of nothing: %v", name, r.blocks)
					}
					continue
				}
				if a := r.d.Stats().Assumed; a > 0 && s.name == "complete" && !enforce {
					t.Errorf("%s: %d connections taken as closed, though each has its closing line", name, a)
				}
				if got != len(must) && s.all || got == 0 && len(must) > 0 {
					t.Errorf("%s, %s, %s: %d of %d attackers covered: %v", name, s.name, mode, got, len(must), r.blocks)
				}
			}
		}
	})
	t.Log("\n" + table.String())
}

// The flood from one /64, as if each address had a /64 of its own in one /48,
// in two ways to spread them: all are covered, and nobody outside of the /48.
func TestCorpusOver48(t *testing.T) {
	text, err := os.ReadFile("../testdata/corpus/g1-ipv6-one-64.log")
	if err != nil {
		t.Fatal(err)
	}
	bots := netip.MustParsePrefix("fd00:0:0:1::/64")
	for _, factor := range []int{1, 7, 200} {
		spread := func(a netip.Addr) netip.Addr {
			b := a.As16()
			n := (int(b[12])<<8 | int(b[13])) * factor
			return netip.AddrFrom16([16]byte{0xfd, 6: byte(n >> 8), 7: byte(n), 15: 1})
		}
		for _, enforce := range []bool{true, false} {
			all := map[netip.Addr]bool{}
			r := replay(t, text, detector.Config{Rules: detector.DefaultRules()}, enforce, func(ev *detector.Event) bool {
				if bots.Contains(ev.Source) {
					ev.Source = spread(ev.Source)
					all[ev.Source] = true
				}
				return true
			})
			missed := 0
			for a := range all {
				if !r.blocked(a) {
					missed++
				}
			}
			if missed > 0 || len(all) < 250 {
				t.Errorf("spread by %d, enforce %t: %d of %d are missed: %s", factor, enforce, missed, len(all), strings.Join(r.verdict, "\n\t"))
			}
			if len(r.blocks) > 10 && enforce {
				t.Errorf("spread by %d, enforce %t: %d blocks", factor, enforce, len(r.blocks))
			}
			for _, b := range r.blocks {
				if !netip.MustParsePrefix("fd00::/48").Overlaps(b.prefix) || b.prefix.Bits() < 48 {
					t.Errorf("blocked %s", b.prefix)
				}
			}
		}
	}
}
