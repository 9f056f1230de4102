package tail

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// many gathers what a FollowPattern delivers, by file.
type many struct {
	*got
	mu     sync.Mutex
	lines  map[string][]string
	at     map[string]Position
	began  bool
	looked Position // of the pattern itself
	gone   []string
	rested []string
	others func() []string
}

// followMany follows from where an earlier one was left; nil: none was.
func followMany(t *testing.T, pattern string, o Options, earlier *many) *many {
	t.Helper()
	m := &many{got: &got{t: t}, lines: map[string][]string{}, at: map[string]Position{}}
	if earlier != nil {
		earlier.mu.Lock()
		m.at, m.looked = maps.Clone(earlier.at), earlier.looked
		earlier.mu.Unlock()
	}
	return m.start(pattern, o, since(m.looked))
}

// since is the time of the last look that was told.
func since(p Position) time.Time {
	if p.IsZero() {
		return time.Time{}
	}
	return time.Unix(0, p.ModTime)
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
					m.looked, m.began = b.Next, true
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
			Others: m.others,
			Rest: func(path string) {
				m.mu.Lock()
				defer m.mu.Unlock()
				m.rested = append(m.rested, filepath.Base(path))
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

// A directory with more files than are followed at once: all of them are read,
// whether written to at once or one by one, over a restart too.
func TestPatternBound(t *testing.T) {
	dir := t.TempDir()
	name := func(i int) string { return fmt.Sprintf("log.%c-%d", 'a'+i, 20260101+i) }
	in := func(i int) string { return filepath.Join(dir, name(i)) }
	const n = 20
	for i := range n {
		appendTo(t, in(i), fmt.Sprintf("%03d %s\n", i, numbered(i)))
	}
	o := fast
	o.Start = End
	o.files = 4
	o.gone = 30 * time.Millisecond
	m := followMany(t, filepath.Join(dir, "*"), o, nil)
	want := map[string][]string{}
	write := func(i int, line string) {
		appendTo(t, in(i), line+"\n")
		want[name(i)] = append(want[name(i)], line)
	}
	check := func() {
		t.Helper()
		for i := range n {
			m.wantIn(name(i), want[name(i)]...)
		}
	}
	write(n-1, "today's") // the last by name
	check()
	for i := range n { // one by one: each after the others have been let go
		write(i, "one")
		check()
	}
	for i := range n { // all at once
		write(i, "all")
	}
	check()
	m.stop()
	if len(m.at) != n {
		t.Errorf("the places of %d files are known, want %d", len(m.at), n)
	}

	for i := range n {
		write(i, "while it was stopped")
	}
	m2 := followMany(t, filepath.Join(dir, "*"), o, m)
	for i := range n {
		m2.wantIn(name(i), "while it was stopped")
	}
	must(t, os.Remove(in(3)))
	until(t, "the file that is gone", func() bool {
		m2.mu.Lock()
		defer m2.mu.Unlock()
		return slices.Contains(m2.gone, name(3))
	})
	m2.stop()
	for i := range n {
		m2.wantIn(name(i), "while it was stopped")
	}
}

// Whatever happens to the files of a pattern, more of them than are followed
// at once: each line comes once.
func TestPatternAnySequence(t *testing.T) {
	t.Parallel()
	checks := 0
	rapid.Check(t, func(rt *rapid.T) {
		// They are slow; -rapid.checks with another number than 100 has all.
		if checks++; checks > 40 && flag.Lookup("rapid.checks").Value.String() == "100" {
			return
		}
		dir, err := os.MkdirTemp("", "pattern")
		must(t, err)
		defer os.RemoveAll(dir)
		o := fast
		o.Start = End
		o.files = rapid.IntRange(1, 4).Draw(rt, "files")
		o.gone = 10 * time.Millisecond
		var told told
		o.Log = told.logger()
		pattern := filepath.Join(dir, "*")
		name := func(i int) string { return filepath.Join(dir, fmt.Sprintf("f%d", i)) }
		count := map[string]int{}
		written := 0
		m := followMany(t, pattern, o, nil)
		var running = true
		stop := func() {
			m.stop()
			for _, lines := range m.lines {
				for _, l := range lines {
					count[l]++
				}
			}
			running = false
		}
		seen := func(i int) bool {
			if count[numbered(i)] > 0 {
				return true
			}
			m.mu.Lock()
			defer m.mu.Unlock()
			for _, lines := range m.lines {
				if slices.Contains(lines, numbered(i)) {
					return true
				}
			}
			return false
		}
		defer func() { m.stop() }()
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				for range rapid.IntRange(1, 10).Draw(rt, "lines") {
					appendTo(t, name(rapid.IntRange(0, 9).Draw(rt, "file")), numbered(written)+"\n")
					written++
				}
			},
			"rotate": func(rt *rapid.T) {
				f := name(rapid.IntRange(0, 9).Draw(rt, "file"))
				if _, err := os.Stat(f); err != nil {
					rt.Skip("no such file")
				}
				for i := 50; i > 0; i-- {
					for _, ext := range []string{"", ".gz"} {
						_ = os.Rename(fmt.Sprintf("%s.%d%s", f, i, ext), fmt.Sprintf("%s.%d%s", f, i+1, ext))
					}
				}
				must(t, os.Rename(f, f+".1"))
				appendTo(t, f, "")
				if _, err := os.Stat(f + ".2"); err == nil && rapid.Bool().Draw(rt, "compress") {
					gzipFile(t, f+".2")
				}
			},
			"restart": func(*rapid.T) {
				if running {
					stop()
				} else {
					m = followMany(t, pattern, o, m)
					running = true
				}
			},
			"wait": func(rt *rapid.T) {
				if !running || written == 0 {
					rt.Skip("nobody reads")
				}
				last := written - 1
				until(t, fmt.Sprintf("line %d of %s", last, dir), func() bool { return seen(last) })
			},
		})
		if !running {
			m = followMany(t, pattern, o, m)
		}
		for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
			missing := false
			for i := range written {
				missing = missing || !seen(i)
			}
			if !missing {
				break
			}
		}
		stop()
		for i := range written {
			if c := count[numbered(i)]; c != 1 {
				rt.Errorf("line %d: %d times", i, c)
			}
		}
		if rt.Failed() {
			files, _ := exec.Command("sh", "-c", "cd "+dir+" && for f in $(ls -v); do echo $f $(stat -c '%i %s %y' $f); zcat -f $f; done").CombinedOutput()
			rt.Logf("%s\n%s\n%v", files, told.String(), m.rested)
		}
	})
}

// What somebody else follows is left to him, under whatever name it stands:
// a link, a rotated file, a copy of it.
func TestPatternOthers(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	var text []string
	for i := range 20 {
		text = append(text, numbered(i))
	}
	appendTo(t, in("main"), strings.Join(text, "\n")+"\n")
	appendTo(t, in("main.1"), "rotated\n")
	must(t, os.Link(in("main"), in("hard")))
	must(t, os.Symlink("main", in("soft")))
	m := &many{got: &got{t: t}, lines: map[string][]string{}, at: map[string]Position{}}
	m.others = func() []string { return []string{in("main")} }
	m.start(in("*"), fast, time.Time{})
	must(t, os.Rename(in("main"), in("elsewhere")))
	appendTo(t, in("main"), "new\n")
	appendTo(t, in("own"), "own\n")
	m.wantIn("own", "own")
	m.stop()
	if len(m.lines) != 1 {
		t.Errorf("read: %v", m.lines)
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
