package tail

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Any sequence of writing, rotating in any manner, stopping and starting:
// each line once. A copytruncate comes only after a line of the present file
// was read, for a copy of which nothing is known is like any other file, and
// between two lines, for what is written between copy and truncation is lost
// to every reader.
func TestAnySequence(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp("", "model")
		must(t, err)
		defer os.RemoveAll(dir)
		log := filepath.Join(dir, "mainlog")
		written, first := 0, 0 // lines; the first one of the present file
		half := false
		count := map[string]int{}
		var at Position
		var g *got
		opts := fast
		var told told
		opts.Log = told.logger()
		opts.NoInotify = rapid.Bool().Draw(rt, "no inotify")
		collect := func() {
			g.stop()
			lines, _ := g.snapshot()
			for _, l := range lines {
				count[l]++
			}
			if !g.last.Next.IsZero() {
				at = g.last.Next
			}
			g = nil
		}
		seen := func(i int) bool {
			if count[numbered(i)] > 0 {
				return true
			}
			if g == nil {
				return false
			}
			lines, _ := g.snapshot()
			for _, l := range lines {
				if l == numbered(i) {
					return true
				}
			}
			return false
		}
		whole := func() {
			if half {
				appendTo(t, log, numbered(written)[10:]+"\n")
				written++
				half = false
			}
		}
		shiftBoth := func() { // the oldest first, as logrotate does
			for i := 200; i > 0; i-- {
				for _, ext := range []string{"", ".gz"} {
					err := os.Rename(fmt.Sprintf("%s.%d%s", log, i, ext), fmt.Sprintf("%s.%d%s", log, i+1, ext))
					if err != nil && !os.IsNotExist(err) {
						t.Fatal(err)
					}
				}
			}
		}
		start := func() {
			g = &got{t: t}
			from := at
			me := g
			g.run(func() { me.err = Follow(me.ctx, log, from, opts, me.emit) })
		}
		compress := func(names ...string) {
			for _, n := range names {
				if _, err := os.Stat(n); err == nil {
					gzipFile(t, n)
				}
			}
		}
		start()
		appendTo(t, log, numbered(0)+"\n") // of a log that was never read, the past is not wanted
		written++
		until(t, "the first line", func() bool { return seen(0) })
		rt.Repeat(map[string]func(*rapid.T){
			"write": func(rt *rapid.T) {
				whole()
				var b strings.Builder
				for range rapid.IntRange(1, 30).Draw(rt, "lines") {
					b.WriteString(numbered(written) + "\n")
					written++
				}
				appendTo(t, log, b.String())
			},
			"write half a line": func(rt *rapid.T) {
				if !half {
					appendTo(t, log, numbered(written)[:10])
					half = true
				}
			},
			"rename": func(rt *rapid.T) {
				if _, err := os.Stat(log); err != nil {
					rt.Skip("no log")
				}
				whole()
				shiftBoth()
				must(t, os.Rename(log, log+".1"))
				first = written
				if rapid.Bool().Draw(rt, "create") {
					appendTo(t, log, "")
				}
				switch rapid.IntRange(0, 2).Draw(rt, "compress") {
				case 1:
					compress(log + ".1")
				case 2:
					compress(log + ".2") // delaycompress
				}
			},
			"copy and truncate": func(rt *rapid.T) {
				if first == written || !seen(first) {
					rt.Skip("nothing of it is read")
				}
				whole()
				shiftBoth()
				b, err := os.ReadFile(log)
				must(t, err)
				must(t, os.WriteFile(log+".1", b, 0o640))
				must(t, os.Truncate(log, 0))
				first = written
			},
			"stop": func(rt *rapid.T) {
				if g == nil {
					rt.Skip("stopped")
				}
				collect()
			},
			"start": func(rt *rapid.T) {
				if g != nil {
					rt.Skip("running")
				}
				start()
			},
			"wait": func(rt *rapid.T) {
				if g == nil || written == 0 {
					rt.Skip("nobody reads")
				}
				last := written - 1
				until(t, fmt.Sprintf("line %d of %s", last, dir), func() bool { return seen(last) })
			},
		})
		if g == nil {
			start()
		}
		whole()
		appendTo(t, log, numbered(written)+"\n")
		written++
		for end := time.Now().Add(deadline); !seen(written-1) && time.Now().Before(end); time.Sleep(time.Millisecond) {
		}
		collect()
		var bad []string
		for i := range written {
			if c := count[numbered(i)]; c != 1 {
				bad = append(bad, fmt.Sprintf("%d: %d times", i, c))
			}
			delete(count, numbered(i))
		}
		for l := range count {
			bad = append(bad, fmt.Sprintf("strange %q", l))
		}
		if len(bad) > 0 {
			files, _ := exec.Command("sh", "-c", "cd "+dir+" && for f in $(ls -v); do echo $f $(stat -c '%i %s %y' $f) $(zcat -f $f | sed -n '1s/.*line//p;$s/.*line//p'); done").CombinedOutput()
			rt.Fatalf("of %d lines: %s\n%s\n%s", written, show(bad), told.String(), files)
		}
	})
}

// The real logrotate, in each of its manners, while lines are written. The
// writer waits for it where it copies and truncates, and where it creates the
// log: it fails if the writer was faster.
func TestLogrotate(t *testing.T) {
	program, err := exec.LookPath("logrotate")
	if err != nil {
		if program, err = exec.LookPath("/usr/sbin/logrotate"); err != nil {
			skip(t, "no logrotate is installed")
		}
	}
	for _, m := range []struct {
		name, conf string
		seconds    bool // at most one rotation a second, for the name's sake
	}{
		{"create", "create 0640", false},
		{"nocreate", "nocreate", false},
		{"compress", "nocreate\ncompress", false},
		{"delaycompress", "create 0640\ncompress\ndelaycompress", false},
		{"copytruncate", "copytruncate", false},
		{"copytruncate compress", "copytruncate\ncompress", false},
		{"dateext", "nocreate\ndateext\ndateformat -%Y%m%d-%s", true},
		{"dateext compress", "create 0640\ndateext\ndateformat -%Y%m%d-%s\ncompress", true},
		{"extension", "create 0640\nextension .log\ncompress\ndelaycompress", false},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			log := filepath.Join(dir, "main.log")
			conf := filepath.Join(dir, "conf")
			must(t, os.WriteFile(conf, fmt.Appendf(nil, "%s {\nrotate 50\nmissingok\n%s\n}\n", log, m.conf), 0o600))
			must(t, os.Chmod(dir, 0o700))
			g := follow(t, log, Position{}, Options{Poll: 5 * time.Millisecond, Grace: 20 * time.Millisecond})
			w := write(t, log, 300*time.Microsecond)
			var lines []string
			resume := func() {
				g.stop()
				more, _ := g.snapshot()
				lines = append(lines, more...)
				at := g.last.Next
				g = follow(t, log, at, Options{Poll: 5 * time.Millisecond, Grace: 20 * time.Millisecond})
			}
			rounds := 10
			if m.seconds {
				rounds = 3
			}
			for i := range rounds {
				w.wrote(30)
				copies := strings.Contains(m.conf, "copytruncate")
				if copies { // there must be a line that was read
					n := int(w.n.Load())
					until(t, "the file to be read", func() bool { return len(lines)+g.count() > n })
				}
				again := i%3 == 2
				if again { // rotated while we do not run
					g.stop()
				}
				run := func() {
					if out, err := exec.Command(program, "-f", "-s", filepath.Join(dir, "state"), conf).CombinedOutput(); err != nil {
						t.Errorf("logrotate: %v\n%s", err, out)
					}
				}
				if !strings.Contains(m.conf, "nocreate") || again {
					w.rotate(run)
				} else {
					run()
				}
				if again {
					resume()
				}
				if m.seconds {
					now := time.Now().Unix()
					until(t, "the next second", func() bool { return time.Now().Unix() > now })
				}
			}
			w.wrote(50)
			n := w.stop()
			until(t, fmt.Sprintf("%d lines", n), func() bool { return len(lines)+g.count() >= n })
			g.wantCaughtUp()
			g.stop()
			more, _ := g.snapshot()
			count := map[string]int{}
			for _, l := range append(lines, more...) {
				count[l]++
			}
			var bad []string
			for i := range n {
				if c := count[numbered(i)]; c != 1 {
					bad = append(bad, fmt.Sprintf("%d: %d times", i, c))
				}
			}
			if len(bad) > 0 || len(count) != n {
				t.Errorf("%d lines written, %d read; wrong are: %s", n, len(count), show(bad))
			}
		})
	}
}

// A full disk leaves a half line, and the rest of it never comes: the next
// line is joined to it, the ones after that are whole.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		skip(t, "mounting needs root")
	}
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size=64k", "none", dir).CombinedOutput(); err != nil {
		skip(t, "no tmpfs can be mounted: %v: %s", err, out)
	}
	t.Cleanup(func() { _ = exec.Command("umount", dir).Run() })
	log := filepath.Join(dir, "mainlog")
	g := follow(t, log, Position{}, fast)
	t.Cleanup(g.stop)
	var want []string
	f, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	must(t, err)
	rest := ""
	for i := 0; rest == ""; i++ {
		line := numbered(i) + "\n"
		n, err := f.WriteString(line)
		switch {
		case err == nil:
			want = append(want, numbered(i))
		case n > 0:
			rest = line[:n]
		default:
			rest = "\n"
		}
	}
	must(t, f.Close())
	g.want(want...)
	g.wantCaughtUp()
	// Room is made by rotating away and deleting.
	must(t, os.Rename(log, log+".1"))
	until(t, "room", func() bool {
		_ = os.Remove(log + ".1")
		f, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
		if err != nil {
			return false
		}
		defer f.Close()
		n, err := f.WriteString("a\n")
		return err == nil && n == 2
	})
	lines := func() []string { l, _ := g.snapshot(); return l[len(want):] }
	until(t, "the lines after it", func() bool { l := lines(); return len(l) > 0 && l[len(l)-1] == "a" })
	for _, l := range lines() {
		if l != "a" && l != strings.TrimSuffix(rest, "\n") {
			t.Errorf("strange line %q; the half one was %q", l, rest)
		}
	}
}

// A new file that happens to get the old one's inode, and is as long.
func TestInodeReused(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, numbered(0)+"\n"+numbered(1)+"\n")
	g := follow(t, log, Position{}, fast)
	g.want(numbered(0), numbered(1))
	g.stop()
	_, next := g.snapshot()
	must(t, os.Remove(log))
	appendTo(t, log, numbered(2)+"\n"+numbered(3)+"\n"+numbered(4)+"\n")
	at := next[1]
	at.Inode = idAt(log).ino // as most file systems do by themselves
	rest := follow(t, log, at, fast)
	rest.want(numbered(2), numbered(3), numbered(4))
}

// A compressed file with the inode of one that was read before is read from
// its first line.
func TestInodeReusedCompressed(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, numbered(0)+"\n"+numbered(1)+"\n")
	gzipFile(t, log)
	f, err := openFile(log + ".gz")
	must(t, err)
	defer f.close()
	tf := &follower{done: []Position{{Dev: f.id.dev, Inode: f.id.ino, Offset: 20, HeadLen: 20, Head: 1}}}
	tf.returned(f)
	b := make([]byte, 100)
	n, err := f.read(b)
	must(t, err)
	if got := string(b[:n]); got != numbered(0)+"\n"+numbered(1)+"\n" {
		t.Errorf("read %q", got)
	}
}
