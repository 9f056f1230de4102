package tail

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// day is the name of a dated log's file so many days from today.
func day(pattern string, days int) string {
	at := time.Now().UTC().AddDate(0, 0, days)
	return strings.NewReplacer("%D", at.Format("20060102"), "%M", at.Format("200601")).Replace(pattern)
}

func TestDatedNames(t *testing.T) {
	dir := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(dir, "202611"), 0o755))
	for _, name := range []string{
		"main-20261120", "main-20261121.gz", "main-20261122", "main-20261122.gz", "main-2026112", "main-202611222", "main-20261123.bak",
		"main-20271122", "202611/100%-20261122.log", "m-202610", "m-202611", "[x]20261122",
	} {
		appendTo(t, filepath.Join(dir, name), "")
	}
	must(t, os.Mkdir(filepath.Join(dir, "main-20261119"), 0o755))
	now := func() time.Time { return time.Date(2026, 11, 22, 23, 0, 0, 0, time.UTC) }
	for _, c := range []struct {
		pattern, current string
		history          []string
	}{
		// A day that is not yet anywhere on earth is not today.
		{"main-%D", "main-20261122", []string{"main-20261120", "main-20261121.gz", "main-20261122"}},
		{"%M/100%-%D.log", "202611/100%-20261122.log", []string{"202611/100%-20261122.log"}},
		{"m-%M", "m-202611", []string{"m-202610", "m-202611"}},
		{"[x]%D", "[x]20261122", []string{"[x]20261122"}},
		{"none-%D", "none-%D", nil},
	} {
		n := &datedNames{pattern: filepath.Join(dir, c.pattern), now: now}
		if got := n.current(); got != filepath.Join(dir, c.current) {
			t.Errorf("%s: the current file is %s, want %s", c.pattern, got, c.current)
		}
		gs, settled := n.history(false)
		var got []string
		for _, g := range gs {
			rel, _ := filepath.Rel(dir, g.name)
			got = append(got, rel)
		}
		if !settled || !slices.Equal(got, c.history) {
			t.Errorf("%s: the files are %q, want %q", c.pattern, got, c.history)
		}
	}
}

// Over midnight; then several days while we did not run, two of them
// compressed meanwhile.
func TestDated(t *testing.T) {
	log := logIn(t) + "-%D"
	line := func(days, i int) { appendTo(t, day(log, days), numbered(i)+"\n") }
	line(-5, 100)
	line(-4, 101)
	g := follow(t, log, Position{}, Options{Start: End, Poll: 5 * time.Millisecond, Grace: 20 * time.Millisecond})
	g.wantCaughtUp()
	line(-4, 0)
	g.want(numbered(0))
	line(-3, 2)
	line(-4, 1) // by one who was still writing
	g.want(numbered(0), numbered(1), numbered(2))
	g.stop()
	_, next := g.snapshot()

	line(-3, 3)
	line(-2, 4)
	line(-1, 5)
	gzipFile(t, day(log, -3))
	gzipFile(t, day(log, -2))
	line(0, 6)
	var all []string
	for i := range 7 {
		all = append(all, numbered(i))
	}
	for i, p := range next {
		rest := follow(t, log, p, fast)
		rest.want(all[i+1:]...)
		rest.wantCaughtUp()
		rest.stop()
		rest.want(all[i+1:]...)
	}
}

// The clock is set back: an older day's file is written to again, and one of
// a day to come is left over.
func TestDatedClockSetBack(t *testing.T) {
	log := logIn(t) + "-%D"
	appendTo(t, day(log, -3), "long ago\n")
	appendTo(t, day(log, -2), numbered(0)+"\n")
	g := follow(t, log, Position{}, fast) // from the beginning of the latest
	g.want(numbered(0))
	appendTo(t, day(log, 0), numbered(1)+"\n")
	g.want(numbered(0), numbered(1))
	must(t, os.Rename(day(log, 0), day(log, 400))) // what was today is far ahead now
	appendTo(t, day(log, -2), numbered(2)+"\n")
	g.want(numbered(0), numbered(1), numbered(2))
	// And on from there, through files that were there before we began.
	must(t, os.Rename(day(log, -3), day(log, -1)))
	g.wantCaughtUp()
	appendTo(t, day(log, -1), numbered(3)+"\n")
	g.want(numbered(0), numbered(1), numbered(2), numbered(3))
}

// A writer of the old file that comes after its grace time is still heard,
// out of order, and once.
func TestVeryLateWriter(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, numbered(0)+"\n")
	g := follow(t, log, Position{}, fast)
	g.want(numbered(0))
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, numbered(1)+"\n")
	g.want(numbered(0), numbered(1)) // so the old file is finished
	appendTo(t, log+".1", numbered(2)+"\n")
	g.want(numbered(0), numbered(1), numbered(2))
	if !func() bool { g.mu.Lock(); defer g.mu.Unlock(); return g.last.Late }() {
		t.Error("the late line is not told to be late")
	}
	appendTo(t, log, numbered(3)+"\n")
	g.want(numbered(0), numbered(1), numbered(2), numbered(3))
	g.stop()
	_, next := g.snapshot()
	for i, want := range [][]string{1: {numbered(3)}, 2: {numbered(3)}, 3: nil} {
		if i == 0 {
			continue
		}
		rest := follow(t, log, next[i], fast)
		rest.want(want...)
		rest.wantCaughtUp()
		rest.stop()
	}

	// Moved back under its name, it goes on where the late line ended.
	g = follow(t, log, next[0], fast)
	g.want(numbered(2), numbered(1), numbered(3))
	appendTo(t, log+".1", numbered(4)+"\n")
	g.want(numbered(2), numbered(1), numbered(3), numbered(4))
	must(t, os.Rename(log, log+".keep"))
	must(t, os.Rename(log+".1", log))
	appendTo(t, log, numbered(5)+"\n")
	g.want(numbered(2), numbered(1), numbered(3), numbered(4), numbered(5))
}

// Exim itself names the files as we expect them.
func TestDatedByExim(t *testing.T) {
	exim, err := exec.LookPath("exim4")
	if err != nil {
		if exim, err = exec.LookPath("/usr/sbin/exim4"); err != nil {
			skip(t, "no Exim is installed")
		}
	}
	if os.Geteuid() != 0 {
		skip(t, "Exim writes logs as root only")
	}
	for _, form := range []string{"%D", "%M"} {
		dir := t.TempDir()
		for d := dir; d != "/"; d = filepath.Dir(d) { // Exim writes as its own user
			_ = os.Chmod(d, 0o777|os.ModeSticky)
			if d == os.TempDir() || filepath.Dir(d) == os.TempDir() {
				break
			}
		}
		conf := filepath.Join(dir, "exim.conf")
		must(t, os.WriteFile(conf, fmt.Appendf(nil, "spool_directory = %s/spool\nlog_file_path = %s/%%slog-%s\nlog_selector = +arguments\nexim_user = nobody\nexim_group = nogroup\nprimary_hostname = mx.example\nkeep_environment =\n", dir, dir, form), 0o644))
		log := filepath.Join(dir, "mainlog-"+form)
		g := follow(t, log, Position{}, fast)
		out, err := exec.Command(exim, "-C", conf, "-bp").CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		until(t, "Exim's line in "+log, func() bool { return g.count() > 0 })
		lines, _ := g.snapshot()
		if !strings.Contains(lines[0], "-bp") {
			t.Errorf("Exim's line: %q", lines[0])
		}
		g.stop()
	}
}
