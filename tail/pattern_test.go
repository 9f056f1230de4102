package tail

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// many gathers what a FollowPattern delivers, by file.
type many struct {
	*got
	mu    sync.Mutex
	lines map[string][]string
	at    map[string]Position
	began bool
	gone  []string
}

// followMany follows from where an earlier one was left; nil: none was.
func followMany(t *testing.T, pattern string, o Options, earlier *many) *many {
	t.Helper()
	m := &many{got: &got{t: t}, lines: map[string][]string{}, at: map[string]Position{}}
	var since time.Time
	if earlier != nil {
		earlier.mu.Lock()
		m.at = maps.Clone(earlier.at)
		earlier.mu.Unlock()
		since = time.Now()
	}
	return m.start(pattern, o, since)
}

func (m *many) start(pattern string, o Options, since time.Time) *many {
	from := maps.Clone(m.at)
	m.run(func() {
		m.err = FollowPattern(m.ctx, pattern, o, Each{
			Since: since,
			From:  func(path string) Position { return from[filepath.Base(path)] },
			Emit: func(path string, b Batch) error {
				m.mu.Lock()
				defer m.mu.Unlock()
				if path == pattern {
					m.began = true
					return nil
				}
				name := filepath.Base(path)
				for _, l := range b.Lines {
					m.lines[name] = append(m.lines[name], string(l.Text))
				}
				if !b.Next.IsZero() {
					m.at[name] = b.Next
				}
				return nil
			},
			Gone: func(path string) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.gone = append(m.gone, filepath.Base(path))
			},
		})
	})
	until(m.t, "the beginning", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.began })
	return m
}

// wantIn waits for exactly these lines of a file.
func (m *many) wantIn(name string, want ...string) {
	m.t.Helper()
	var lines []string
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
		m.mu.Lock()
		lines = slices.Clone(m.lines[name])
		m.mu.Unlock()
		if len(lines) >= len(want) {
			break
		}
	}
	if !slices.Equal(lines, want) {
		m.t.Fatalf("%s: lines\n got %s\nwant %s", name, show(lines), show(want))
	}
}

// wantNone asserts that nothing was delivered of a file, now that what was
// written after it was.
func (m *many) wantNone(name string) {
	m.t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if lines := m.lines[name]; len(lines) > 0 {
		m.t.Fatalf("%s is read, although it should not be: %s", name, show(lines))
	}
}

func TestPattern(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	appendTo(t, in("a.log"), numbered(0)+"\n")
	appendTo(t, in("a.log.1"), numbered(900)+"\n") // rotated
	appendTo(t, in("a-20261121.log"), numbered(901)+"\n")
	appendTo(t, in("b.log.gz"), "no log\n")
	must(t, os.Mkdir(in("dir.log"), 0o755))
	must(t, os.Symlink(in("a.log"), in("also.log")))
	o := fast
	o.Start = End
	o.gone = 30 * time.Millisecond
	m := followMany(t, in("*.log*"), o, nil)
	until(t, "its end", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return !m.at["a.log"].IsZero() })
	appendTo(t, in("a.log"), numbered(1)+"\n")
	m.wantIn("a.log", numbered(1))
	appendTo(t, in("new.log"), numbered(2)+"\n") // all of it is new
	m.wantIn("new.log", numbered(2))

	// Rotated: with the new file absent for long, so that it is let go.
	must(t, os.Rename(in("a.log"), in("a.log.1")))
	appendTo(t, in("a.log.1"), numbered(3)+"\n")
	m.wantIn("a.log", numbered(1), numbered(3))
	until(t, "the file to be let go", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.gone) == 1 })
	appendTo(t, in("a.log.1"), numbered(4)+"\n") // nobody is there to read it
	appendTo(t, in("a.log"), numbered(5)+"\n")
	m.wantIn("a.log", numbered(1), numbered(3), numbered(4), numbered(5))

	// Under a new name that matches too, and as a copy: known.
	must(t, os.Rename(in("new.log"), in("renamed.log")))
	long := ""
	for i := range 100 {
		long += numbered(10+i) + "\n"
	}
	appendTo(t, in("c.log"), long)
	until(t, "c.log", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.lines["c.log"]) == 100 })
	must(t, os.WriteFile(in("copy.log"), []byte(long), 0o600))
	appendTo(t, in("z.log"), numbered(6)+"\n")
	m.wantIn("z.log", numbered(6))
	for _, name := range []string{"also.log", "a.log.1", "a-20261121.log", "b.log.gz", "renamed.log", "copy.log"} {
		m.wantNone(name)
	}
	m.stop()
	if m.err != nil {
		t.Error(m.err)
	}

	// Again: the known ones are resumed, one that came meanwhile is new, one
	// that has been there unread all the time is not.
	must(t, os.Chtimes(in("renamed.log"), time.Now(), time.Now().Add(-time.Hour)))
	must(t, os.Chtimes(in("copy.log"), time.Now(), time.Now().Add(-time.Hour)))
	again := followMany(t, in("*.log*"), o, m)
	appendTo(t, in("a.log"), numbered(7)+"\n")
	again.wantIn("a.log", numbered(7))
	again.stop()
	again.wantNone("c.log")

	last := &many{got: &got{t: t}, lines: map[string][]string{}, at: again.at}
	appendTo(t, in("meanwhile.log"), numbered(8)+"\n")
	last.start(in("*.log*"), o, time.Now().Add(-time.Minute))
	last.wantIn("meanwhile.log", numbered(8))
	last.wantNone("copy.log")
	last.stop()
}

// Of too many files the first are followed, and it is told once.
// Servers that were started in the same second begin their logs alike, and a
// file whose name is a pattern cannot be followed: neither keeps another from
// being read.
func TestPatternStrangers(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	must(t, os.Mkdir(in("x"), 0o755))
	must(t, os.Mkdir(in("y"), 0o755))
	var same []string
	for i := range 20 {
		same = append(same, numbered(i))
	}
	appendTo(t, in("x/a.log"), strings.Join(same, "\n")+"\n")
	o := fast
	o.Start = Beginning
	m := followMany(t, in("*/*.log"), o, nil)
	m.wantIn("a.log", same...)
	appendTo(t, in("x/odd[1].log"), numbered(99)+"\n")
	appendTo(t, in("y/b.log"), strings.Join(same, "\n")+"\n")
	m.wantIn("b.log", same...)
	appendTo(t, in("x/a.log"), numbered(50)+"\n")
	m.wantIn("a.log", append(same, numbered(50))...)
	m.wantNone("odd[1].log")
}

func TestPatternBound(t *testing.T) {
	dir := t.TempDir()
	for i := range maxFiles + 5 {
		appendTo(t, filepath.Join(dir, fmt.Sprintf("x%c%c", 'a'+i/26, 'a'+i%26)), fmt.Sprintf("%03d %s\n", i, numbered(i)))
	}
	var told told
	o := fast
	o.Log = told.logger()
	m := followMany(t, filepath.Join(dir, "*"), o, nil)
	until(t, "the files", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return len(m.lines) >= maxFiles })
	m.stop()
	if n := len(m.lines); n != maxFiles {
		t.Errorf("%d files are followed, want %d", n, maxFiles)
	}
	if n := told.count("too many files"); n != 1 {
		t.Errorf("told %d times:\n%s", n, told.String())
	}
}

func TestPatternEmitFails(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "one\n")
	want := fmt.Errorf("no room")
	err := FollowPattern(t.Context(), log+"*", fast, Each{
		From: func(string) Position { return Position{} },
		Emit: func(path string, b Batch) error {
			if len(b.Lines) > 0 {
				return want
			}
			return nil
		},
	})
	if err != want {
		t.Errorf("FollowPattern returned %v, want emit's %v", err, want)
	}
}

func TestRotatedFrom(t *testing.T) {
	of := map[string]bool{"/l/mainlog": true, "/l/exim.log": true, "/l/mainlog-20261122": true}
	for name, want := range map[string]bool{
		"/l/mainlog": false, "/l/mainlog.1": true, "/l/mainlog-20261121": true, "/l/mainlog-20261121-1795376652": true,
		"/l/mainlog-20261122.1": true, "/m/mainlog.1": false, "/l/exim.log.2": true, "/l/exim-20261121.log": true,
		"/l/exim.log": false, "/l/mainlog-587": false, "/l/mainlog-587.1": false, "/l/rejectlog.1": false, "/l/1": false, "/l/.1": false, "/l/": false,
	} {
		if got := rotatedFrom(name, of); got != want {
			t.Errorf("rotatedFrom(%q) = %v", name, got)
		}
	}
}
