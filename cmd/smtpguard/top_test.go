package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// fakeDaemon answers the live view and notes what it is asked to do.
type fakeDaemon struct {
	view guard.View
	err  error
	did  []string
}

func (d *fakeDaemon) View(context.Context) (guard.View, error) { return d.view, d.err }
func (d *fakeDaemon) Explain(_ context.Context, p netip.Prefix) (guard.Explanation, error) {
	return guard.Explanation{Prefix: p, Held: 3}, nil
}
func (d *fakeDaemon) Block(_ context.Context, reqs []guard.BlockRequest, dry bool) ([]guard.BlockOutcome, error) {
	p := reqs[0].Prefix
	d.did = append(d.did, fmt.Sprintf("block %s dry=%v", p, dry))
	if p.Addr().Is6() {
		return []guard.BlockOutcome{{Prefix: p, Refused: "it overlaps 2001:db8::/32, which is allowed", Hint: "look"}}, nil
	}
	now := d.view.Status.Time
	return []guard.BlockOutcome{{Prefix: p, Block: &store.Block{Prefix: p, Since: now, Until: now.Add(time.Hour)}}}, nil
}
func (d *fakeDaemon) Unblock(_ context.Context, p netip.Prefix, _ string) ([]store.Block, error) {
	d.did = append(d.did, "unblock "+p.String())
	return []store.Block{{Prefix: p}, {Prefix: p}}, nil
}
func (d *fakeDaemon) Allow(_ context.Context, e store.AllowEntry) ([]store.Block, error) {
	d.did = append(d.did, "allow "+e.Prefix.String())
	return nil, errors.New("the store is full")
}

// aView is a flood under way, told with strangers' text in it.
func aView() guard.View {
	at := time.Date(2026, 11, 22, 3, 4, 5, 0, time.Local)
	pfx := netip.MustParsePrefix
	v := guard.View{TrendEvery: 5 * time.Second, Counted: true}
	v.Status = guard.Status{Version: "1.0", Time: at, Started: at.Add(-26 * time.Hour), Mode: "enforce", Capacity: 100, Count: 97,
		Pressure: 0.97, Saturated: true, Blocks: 2, Watched: 1,
		Sockets:  guard.SocketStatus{Confirm: true, Usable: true, Holding: 97},
		Firewall: guard.FirewallStatus{Backend: "nftables", Real: true, Agrees: true}, Warnings: []string{"one", "two"}}
	v.Sources = []guard.Source{
		{Prefix: pfx("10.66.9.0/24"), Held: 61, Addresses: 5, Rule: "net", Metric: detector.Saturation, Score: 0, Threshold: 0.15, Members: []guard.Source{
			{Prefix: pfx("10.66.9.8/32"), Held: 40, Addresses: 1, Rule: "hog", Metric: detector.Saturation, Score: 0.12, Threshold: 0.15},
			{Prefix: pfx("10.66.9.9/32"), Held: 21, Addresses: 1, Rule: "hog", Metric: detector.Saturation, Score: 0.06, Threshold: 0.15, KnownGood: 1}}},
		{Prefix: pfx("2001:db8:1234:5678:9abc:def0:1234:5678/128"), Held: 21, Addresses: 1, Rule: "hog", Metric: detector.Saturation, Score: 0.03, Threshold: 0.15, KnownGood: 1, Allowed: true},
		{Prefix: pfx("10.66.7.7/32"), Held: 15, Addresses: 1, Rule: "hog", Score: 0.16, Threshold: 0.15, Waiting: true},
	}
	for i := range 30 {
		v.Trend = append(v.Trend, i*100/29)
	}
	for i, why := range []string{"10.66.1.1 kept 15 % of the server's slots on average over 10 s while it was full", "by hand \x1b[2J\x07evil", "seen only"} {
		b := guard.BlockInfo{State: guard.InForce, Packets: 123456789 >> (8 * i)}
		b.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, 1, byte(i + 1)}), 32)
		b.Since, b.Until, b.Reason = at.Add(-time.Minute), at.Add(time.Duration(9+60*i)*time.Minute), why
		v.Blocks = append(v.Blocks, b)
	}
	v.Blocks[2].State = guard.OnlySeen
	for i, what := range []guard.Outcome{guard.Blocked, guard.Spared, guard.Refused, guard.Expired} {
		v.Status.Decisions = append(v.Status.Decisions, guard.Decision{Time: at.Add(-time.Duration(i) * time.Minute), What: what,
			Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 66, 1, byte(i + 1)}), 32), Why: "its score was what it was; but there was a reason"})
	}
	return v
}

func newTestTop(v guard.View) (*top, *fakeDaemon) {
	d := &fakeDaemon{view: v}
	m := newTop(context.Background(), d, "mx1", time.Second, true)
	m.Update(viewMsg{view: v, at: v.Status.Time})
	return m, d
}

// press sends keys and does what they lead to, but waits for no timer.
func press(t *testing.T, m *top, keys ...string) {
	t.Helper()
	for _, k := range keys {
		msg := tea.KeyPressMsg{Code: []rune(k)[0], Text: k}
		for name, code := range map[string]rune{"tab": tea.KeyTab, "down": tea.KeyDown, "enter": tea.KeyEnter, "esc": tea.KeyEscape} {
			if k == name {
				msg = tea.KeyPressMsg{Code: code}
			}
		}
		_, cmd := m.Update(msg)
		for cmd != nil {
			out := cmd()
			if _, ok := out.(viewMsg); ok {
				m.Update(out)
				break
			}
			if _, ok := out.(tea.QuitMsg); ok {
				t.Fatalf("%q ended the view", k)
			}
			_, cmd = m.Update(out)
		}
	}
}

// The picture at several sizes, as it is kept in testdata/top: look at it when
// it changes, and set UPDATE=1 to keep the new one.
func TestTopPicture(t *testing.T) {
	quiet := aView()
	quiet.Sources, quiet.Blocks, quiet.Status.Decisions, quiet.Trend = nil, nil, nil, nil
	quiet.Status.Count, quiet.Status.Pressure, quiet.Status.Saturated, quiet.Status.Blocks, quiet.Status.Watched = 3, 0.03, false, 0, 0
	quiet.Status.Mode, quiet.Status.Firewall.Agrees, quiet.Status.Firewall.Error = "observe", false, "someone flushed it"
	for _, tt := range []struct {
		name          string
		view          guard.View
		width, height int
		keys          []string
		utf8          bool
	}{
		{"80x24", aView(), 80, 24, nil, true},
		{"60x15", aView(), 60, 15, []string{"tab"}, true},
		{"120x40-ascii", aView(), 120, 40, []string{"down"}, false},
		{"quiet", quiet, 80, 24, nil, true},
		{"question", aView(), 80, 24, []string{"b"}, true},
		{"explain", aView(), 60, 15, []string{"e"}, true},
		{"help", aView(), 80, 24, []string{"?"}, true},
		{"unfolded", aView(), 80, 24, []string{"f", "down"}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m, _ := newTestTop(tt.view)
			m.utf8 = tt.utf8
			m.Update(tea.WindowSizeMsg{Width: tt.width, Height: tt.height})
			press(t, m, tt.keys...)
			got := ansi.Strip(m.picture(true)) + "\n"
			lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
			if len(lines) != tt.height {
				t.Errorf("%d lines on a screen of %d", len(lines), tt.height)
			}
			for _, l := range lines {
				if ansi.StringWidth(l) > tt.width {
					t.Errorf("wider than the screen: %q", l)
				}
				if strings.ContainsAny(l, "\x1b\x07") {
					t.Errorf("a control character reached the screen: %q", l)
				}
			}
			path := filepath.Join("testdata", "top", tt.name+".txt")
			if os.Getenv("UPDATE") != "" {
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the picture is another one:\n%s\nwant:\n%s", got, want)
			}
		})
	}
}

// Every size of screen is drawn, whatever there is to show.
func TestTopSizes(t *testing.T) {
	m, _ := newTestTop(aView())
	for w := 40; w < 200; w += 19 {
		for h := 12; h < 60; h += 5 {
			m.Update(tea.WindowSizeMsg{Width: w, Height: h})
			for pane := range panes {
				m.pane = pane
				lines := strings.Split(m.picture(true), "\n")
				if len(lines) != h {
					t.Fatalf("%dx%d: %d lines", w, h, len(lines))
				}
				if shown := ansi.Strip(m.picture(true)); !strings.Contains(shown, "▸") {
					t.Fatalf("%dx%d, list %d: the chosen row is not shown:\n%s", w, h, pane, shown)
				}
				for _, l := range lines {
					if ansi.StringWidth(l) > w {
						t.Fatalf("%dx%d: wider than the screen: %q", w, h, l)
					}
				}
			}
		}
	}
}

func TestTopKeys(t *testing.T) {
	t.Run("a change is made only after a yes", func(t *testing.T) {
		m, d := newTestTop(aView())
		press(t, m, "u", "n", "a", "x", "u", "enter")
		if len(d.did) != 0 {
			t.Errorf("did %q without a yes", d.did)
		}
		press(t, m, "u", "y")
		if fmt.Sprint(d.did) != "[unblock 10.66.9.0/24]" {
			t.Errorf("did %q", d.did)
		}
		if m.note != "lifted 10.66.9.0/24 and 1 more" {
			t.Errorf("said %q", m.note)
		}
	})
	t.Run("a network unfolds, and its member is blocked", func(t *testing.T) {
		m, d := newTestTop(aView())
		press(t, m, "f", "down", "b", "y")
		if want := "[block 10.66.9.8/32 dry=true block 10.66.9.8/32 dry=false]"; fmt.Sprint(d.did) != want {
			t.Errorf("did %q", d.did)
		}
		press(t, m, "f") // folds the network again, which is chosen then
		if got := m.chosen[paneSources].String(); got != "10.66.9.0/24" || len(m.prefixes(paneSources)) != 3 {
			t.Errorf("%s is chosen of %v", got, m.prefixes(paneSources))
		}
		press(t, m, "down", "f")
		if m.note == "" {
			t.Error("one address unfolds")
		}
	})
	t.Run("block asks the daemon first", func(t *testing.T) {
		m, d := newTestTop(aView())
		press(t, m, "b")
		if m.ask == nil || !strings.Contains(m.ask.text, "10.66.9.0/24 for 1h") {
			t.Fatalf("asks %+v", m.ask)
		}
		press(t, m, "y")
		if want := "[block 10.66.9.0/24 dry=true block 10.66.9.0/24 dry=false]"; fmt.Sprint(d.did) != want {
			t.Errorf("did %q", d.did)
		}
		press(t, m, "down", "b")
		if m.ask != nil || !strings.Contains(m.note, "which is allowed (look)") {
			t.Errorf("a refused block: asks %+v, says %q", m.ask, m.note)
		}
	})
	t.Run("a late question is not asked", func(t *testing.T) {
		m, d := newTestTop(aView())
		_, slow := m.Update(tea.KeyPressMsg{Code: 'b', Text: "b"})
		press(t, m, "tab", "u")
		m.Update(slow())
		if m.ask == nil || !strings.Contains(m.ask.text, "Lift") {
			t.Fatalf("asks %+v", m.ask)
		}
		press(t, m, "y")
		if want := "[block 10.66.9.0/24 dry=true unblock 10.66.1.1/32]"; fmt.Sprint(d.did) != want {
			t.Errorf("did %q", d.did)
		}
	})
	t.Run("a long note on a low screen", func(t *testing.T) {
		m, _ := newTestTop(aView())
		m.Update(tea.WindowSizeMsg{Width: 40, Height: 12})
		m.Update(doneMsg{strings.Repeat("word ", 500)})
		if n := strings.Count(m.picture(true), "\n"); n != 11 {
			t.Errorf("%d lines", n+1)
		}
	})
	t.Run("an error is said", func(t *testing.T) {
		m, _ := newTestTop(aView())
		press(t, m, "a", "y")
		if m.note != "the store is full" {
			t.Errorf("said %q", m.note)
		}
	})
	t.Run("what is chosen stays chosen", func(t *testing.T) {
		m, d := newTestTop(aView())
		press(t, m, "down")
		v := aView()
		v.Sources = append([]guard.Source{{Prefix: netip.MustParsePrefix("192.0.2.1/32"), Held: 90}}, v.Sources...)
		d.view = v
		m.Update(viewMsg{view: v, at: v.Status.Time.Add(time.Second)})
		if got := m.chosen[paneSources]; got != v.Sources[2].Prefix {
			t.Errorf("chosen: %s", got)
		}
		v.Sources = nil
		m.Update(viewMsg{view: v, at: v.Status.Time.Add(2 * time.Second)})
		press(t, m, "b")
		if len(d.did) != 0 {
			t.Errorf("did %q with nothing chosen", d.did)
		}
	})
	t.Run("each list", func(t *testing.T) {
		m, d := newTestTop(aView())
		press(t, m, "tab", "down", "u", "y", "tab", "G", "u", "y")
		if want := "[unblock 10.66.1.2/32 unblock 10.66.1.4/32]"; fmt.Sprint(d.did) != want {
			t.Errorf("did %q", d.did)
		}
	})
	t.Run("a daemon that is gone", func(t *testing.T) {
		m, _ := newTestTop(aView())
		_, cmd := m.Update(viewMsg{err: errors.New("connection refused")})
		if shown := m.picture(true); !strings.Contains(shown, "no answer since 03:04:05: connection refused") {
			t.Errorf("not said:\n%s", shown)
		}
		if cmd == nil {
			t.Error("it is not asked again")
		}
		v := aView()
		m.Update(viewMsg{view: v, at: v.Status.Time})
		if shown := m.picture(true); strings.Contains(shown, "no answer") {
			t.Errorf("still said:\n%s", shown)
		}
	})
	t.Run("trend", func(t *testing.T) {
		m, _ := newTestTop(aView())
		v := aView()
		v.Sources[0].Held += 12
		v.Sources[2].Held -= 5
		m.Update(viewMsg{view: v, at: v.Status.Time.Add(9 * time.Second)})
		for i, want := range []string{"+12", "=", "-5"} {
			if got := m.trend(v.Sources[i]); got != want {
				t.Errorf("trend %q, want %q", got, want)
			}
		}
	})
}
