package tail

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// writer numbers lines into a log from a goroutine, as Exim does: it opens
// the path again whenever another file stands there, or none, and writes each
// line with one write.
type writer struct {
	t     *testing.T
	path  string
	n     atomic.Int64
	mu    sync.Mutex    // held from the look at the path to the write
	done  chan struct{} // closed to end it
	ended chan struct{}
}

// write writes lines until stop, about one every interval.
func write(t *testing.T, path string, interval time.Duration) *writer {
	w := &writer{t: t, path: path, done: make(chan struct{}), ended: make(chan struct{})}
	go func() {
		defer close(w.ended)
		var f *os.File
		for {
			select {
			case <-w.done:
				if f != nil {
					_ = f.Close()
				}
				return
			case <-time.After(interval):
			}
			var err error
			if f, err = w.line(f); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	return w
}

func (w *writer) line(f *os.File) (*os.File, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if f != nil {
		now, err := os.Stat(w.path)
		if mine, _ := f.Stat(); err != nil || !os.SameFile(now, mine) {
			_ = f.Close()
			f = nil
		}
	}
	if f == nil {
		var err error
		if f, err = os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640); err != nil {
			return nil, err
		}
	}
	if _, err := f.WriteString(numbered(int(w.n.Load())) + "\n"); err != nil {
		return f, err
	}
	w.n.Add(1)
	return f, nil
}

// rotate runs fn between two lines. That a writer may come with a line for
// the old file later is TestLateWriters' matter: it would depend on how long
// this machine keeps it waiting.
func (w *writer) rotate(fn func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	fn()
}

// wrote waits until k more lines were written.
func (w *writer) wrote(k int64) {
	w.t.Helper()
	from := w.n.Load()
	until(w.t, "the writer", func() bool { return w.n.Load() >= from+k })
}

// stop ends the writer and returns the number of lines it wrote.
func (w *writer) stop() int {
	close(w.done)
	<-w.ended
	return int(w.n.Load())
}

// shift renames log.1 to log.2 and so on, as logrotate and exicyclog do.
func shift(t *testing.T, log, ext string) {
	t.Helper()
	for i := 60; i > 0; i-- {
		err := os.Rename(fmt.Sprintf("%s.%d%s", log, i, ext), fmt.Sprintf("%s.%d%s", log, i+1, ext))
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
}

// Whatever is done to the log while it is written to: each line once, in
// order.
func TestRotationWhileWriting(t *testing.T) {
	manners := []struct {
		name string
		// seen: a file that we have never opened, or a place where we have
		// never been, is lost to every reader. So we have been there.
		seen   bool
		rotate func(t *testing.T, log string, i int)
	}{
		{"rename", false, func(t *testing.T, log string, i int) {
			shift(t, log, "")
			must(t, os.Rename(log, log+".1"))
		}},
		{"rename and create", false, func(t *testing.T, log string, i int) {
			shift(t, log, "")
			must(t, os.Rename(log, log+".1"))
			f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o640)
			must(t, err)
			must(t, f.Close())
		}},
		{"rename to a dated name", false, func(t *testing.T, log string, i int) {
			must(t, os.Rename(log, fmt.Sprintf("%s-20261122-%d", log, 1795376652+i)))
		}},
		{"rename and compress", false, func(t *testing.T, log string, i int) {
			shift(t, log, ".gz")
			if _, err := os.Stat(log + ".1"); err == nil { // delaycompress
				gzipFile(t, log+".1")
				must(t, os.Rename(log+".1.gz", log+".2.gz"))
			}
			must(t, os.Rename(log, log+".1"))
		}},
		{"rename into another directory", true, func(t *testing.T, log string, i int) {
			old := filepath.Join(filepath.Dir(log), "old")
			must(t, os.MkdirAll(old, 0o755))
			must(t, os.Rename(log, filepath.Join(old, fmt.Sprint(i))))
		}},
		{"symbolic link switched", true, func(t *testing.T, log string, i int) {
			target := filepath.Join(filepath.Dir(log), "real", fmt.Sprintf("log%03d", i))
			must(t, os.MkdirAll(filepath.Dir(target), 0o755))
			appendTo(t, target, "")
			must(t, os.Symlink(target, log+".new"))
			must(t, os.Rename(log+".new", log))
		}},
		{"delete and recreate", true, func(t *testing.T, log string, i int) {
			must(t, os.Remove(log))
		}},
		{"copy and truncate", true, func(t *testing.T, log string, i int) {
			shift(t, log, "")
			b, err := os.ReadFile(log)
			must(t, err)
			must(t, os.WriteFile(log+".1", b, 0o640))
			must(t, os.Truncate(log, 0))
		}},
	}
	for _, m := range manners {
		for _, noInotify := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s NoInotify=%v", m.name, noInotify), func(t *testing.T) {
				t.Parallel()
				log := logIn(t)
				o := fast
				o.NoInotify = noInotify
				g := follow(t, log, Position{}, o)
				w := write(t, log, 200*time.Microsecond)
				w.wrote(1)
				for i := range 50 {
					if new := int(w.n.Load()); m.seen || i == 0 {
						until(t, "the file to be read", func() bool { return g.count() > new })
					}
					w.wrote(int64(1 + i*7%40))
					w.rotate(func() { m.rotate(t, log, i) })
				}
				w.wrote(100)
				g.wantAll(w.stop())
				g.wantCaughtUp()
			})
		}
	}
}

// A reader that is stopped and started all the time, from the last position
// it had, while the log is rotated and compressed.
func TestRotationWhileRestarting(t *testing.T) {
	log := logIn(t)
	w := write(t, log, 100*time.Microsecond)
	w.wrote(5)
	g := follow(t, log, Position{}, fast)
	var lines []string
	var at Position
	turn := func() {
		g.stop()
		more, next := g.snapshot()
		lines = append(lines, more...)
		if len(next) > 0 {
			at = next[len(next)-1]
		}
	}
	for i := range 50 {
		w.wrote(20)
		if i%3 == 0 {
			w.rotate(func() {
				shift(t, log, ".gz")
				if _, err := os.Stat(log + ".1"); err == nil {
					gzipFile(t, log+".1")
					must(t, os.Rename(log+".1.gz", log+".2.gz"))
				}
				must(t, os.Rename(log, log+".1"))
			})
			w.wrote(3)
		}
		turn()
		g = follow(t, log, at, fast)
	}
	n := w.stop()
	until(t, "the last line", func() bool {
		more, _ := g.snapshot()
		return len(lines)+len(more) >= n
	})
	turn()
	g.lines = lines
	g.wantAll(n)
}

// Rotated any number of times while we did not run.
func TestResumeAfterRotations(t *testing.T) {
	part := func(from, to int) string {
		var b strings.Builder
		for i := from; i < to; i++ {
			b.WriteString(numbered(i) + "\n")
		}
		return b.String()
	}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, log string) // log has lines 0 to 9, of which 5 were read
		want []int                          // first and one behind the last line wanted
	}{
		{"once", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".1"))
			appendTo(t, log, part(10, 20))
		}, []int{5, 20}},
		{"once, no new log yet", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".1"))
		}, []int{5, 10}},
		{"once, the new log is empty", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".1"))
			appendTo(t, log, "")
		}, []int{5, 10}},
		{"three times by number", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".3"))
			appendTo(t, log+".2", part(10, 20))
			appendTo(t, log+".1", part(20, 30))
			appendTo(t, log, part(30, 40))
		}, []int{5, 40}},
		{"three times by number with zeros and gzip, as exicyclog", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".03"))
			appendTo(t, log+".02", part(10, 20))
			gzipFile(t, log+".03")
			gzipFile(t, log+".02")
			appendTo(t, log+".01", part(20, 30))
			appendTo(t, log, part(30, 40))
		}, []int{5, 40}},
		{"three times by date", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+"-20261122.gz.tmp"))
			must(t, os.Rename(log+"-20261122.gz.tmp", log+"-20261122"))
			appendTo(t, log+"-20261123", part(10, 20))
			gzipFile(t, log+"-20261123")
			appendTo(t, log+"-20261124", part(20, 30))
			appendTo(t, log, part(30, 40))
		}, []int{5, 40}},
		{"numbers and dates together, told by time", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+"-20261122"))
			appendTo(t, log+".1", part(10, 20))
			appendTo(t, log, part(20, 30))
			setTimes(t, log+"-20261122", log+".1", log)
		}, []int{5, 30}},
		{"older files beside it stay unread", func(t *testing.T, log string) {
			appendTo(t, log+".3", "old\n")
			appendTo(t, log+".2", "older than what we read\n")
			must(t, os.Rename(log, log+".1"))
			appendTo(t, log, part(10, 20))
		}, []int{5, 20}},
		{"other files beside it stay unread", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".2"))
			appendTo(t, log+".1.bak", "not a log\n")
			appendTo(t, log+"2", "another log\n")
			appendTo(t, log+"-x20261122", "another log\n")
			must(t, os.Mkdir(log+".1", 0o755))
			appendTo(t, log, part(10, 20))
		}, []int{5, 20}},
		{"an unfinished compressed copy beside the file", func(t *testing.T, log string) {
			must(t, os.Rename(log, log+".1"))
			appendTo(t, log+".1.gz", "\x1f\x8b\x08")
			appendTo(t, log, part(10, 20))
		}, []int{5, 20}},
		{"copied and truncated", func(t *testing.T, log string) {
			b, err := os.ReadFile(log)
			must(t, err)
			appendTo(t, log+".1", string(b))
			must(t, os.Truncate(log, 0))
			appendTo(t, log, part(10, 20))
		}, []int{5, 20}},
		{"copied and truncated, grown past the place, compressed", func(t *testing.T, log string) {
			b, err := os.ReadFile(log)
			must(t, err)
			appendTo(t, log+".1", string(b))
			gzipFile(t, log+".1")
			must(t, os.Truncate(log, 0))
			appendTo(t, log, part(10, 40))
		}, []int{5, 40}},
		{"deleted with all that followed but two", func(t *testing.T, log string) {
			// Made first, so that the deleted file's inode is not taken.
			appendTo(t, log+".2", part(10, 20))
			appendTo(t, log+".1", part(20, 30))
			appendTo(t, log+".new", part(30, 40))
			must(t, os.Rename(log+".new", log))
			setTimes(t, log+".2", log+".1", log)
		}, []int{10, 40}},
		{"deleted and made anew", func(t *testing.T, log string) {
			must(t, os.Remove(log))
			appendTo(t, log, part(10, 20)) // most often with the same inode
		}, []int{10, 20}},
		{"made anew with the same inode, longer than before", func(t *testing.T, log string) {
			must(t, os.Truncate(log, 0))
			appendTo(t, log, part(10, 40))
		}, []int{10, 40}},
		{"half a line at the end of the old file", func(t *testing.T, log string) {
			appendTo(t, log, strings.TrimSuffix(part(10, 11), "\n"))
			must(t, os.Rename(log, log+".1"))
			appendTo(t, log, part(11, 20))
		}, []int{5, 20}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			log := logIn(t)
			appendTo(t, log, part(0, 5))
			first := follow(t, log, Position{}, fast)
			first.want(strings.Split(strings.TrimSuffix(part(0, 5), "\n"), "\n")...)
			first.stop()
			_, next := first.snapshot()
			appendTo(t, log, part(5, 10))
			c.do(t, log)

			want := strings.Split(strings.TrimSuffix(part(c.want[0], c.want[1]), "\n"), "\n")
			g := follow(t, log, next[4], fast)
			g.want(want...)
			g.wantCaughtUp()
			g.stop()
			g.want(want...)

			// And from each line on, through all the files, the rest.
			_, next = g.snapshot()
			for i, p := range next {
				rest := follow(t, log, p, fast)
				rest.want(want[i+1:]...)
				rest.wantCaughtUp()
				rest.stop()
				rest.want(want[i+1:]...)
			}
		})
	}
}

// setTimes gives the files times of their last write in this order, to come.
func setTimes(t *testing.T, names ...string) {
	t.Helper()
	at := time.Now().Add(time.Minute)
	for i, n := range names {
		must(t, os.Chtimes(n, at, at.Add(time.Duration(i)*time.Minute)))
	}
}

// Writers that hold the old file open still write to it after the new one is
// there; so do those that were told to change over late.
func TestLateWriters(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "one\n")
	held, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	defer held.Close()
	g := follow(t, log, Position{}, Options{Grace: 2 * time.Second, Poll: 10 * time.Millisecond})
	g.want("one")
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, "")
	g.wantCaughtUp()
	// The new file is empty: nobody has changed over, and it may take long.
	time.Sleep(50 * time.Millisecond)
	_, err = held.WriteString("two\nthr")
	must(t, err)
	g.want("one", "two")
	appendTo(t, log, "four\n")
	_, err = held.WriteString("ee\n")
	must(t, err)
	g.want("one", "two", "three", "four")
}

// A half line at the end of a file that is finished is a line.
func TestHalfLineAtRotation(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "one\nhalf")
	g := follow(t, log, Position{}, fast)
	g.want("one")
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, "two\n")
	g.want("one", "half", "two")
	g.stop()
	_, next := g.snapshot()
	rest := follow(t, log, next[1], fast)
	rest.want("two")
}

// A writer that never changes over does not hold up the new log for ever.
func TestStubbornWriter(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "one\n")
	g := follow(t, log, Position{}, Options{Grace: 20 * time.Millisecond, Poll: 5 * time.Millisecond})
	g.want("one")
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, "new\n")
	until(t, "the new log's line", func() bool {
		appendTo(t, log+".1", "late\n")
		lines, _ := g.snapshot()
		return slices.Contains(lines, "new")
	})
}

// The log is cut at its end, where we have been: on from there.
func TestCutAtTheEnd(t *testing.T) {
	log := logIn(t)
	var all []string
	for i := range 60 {
		all = append(all, numbered(i))
	}
	appendTo(t, log, strings.Join(all, "\n")+"\n")
	var told told
	o := fast
	o.Log = told.logger()
	g := follow(t, log, Position{}, o)
	g.want(all...)
	must(t, os.Truncate(log, int64(40*(len(all[0])+1))))
	until(t, "the cut to be seen", func() bool { return told.count("cut at its end") == 1 })
	appendTo(t, log, "after the cut\n")
	g.want(append(all, "after the cut")...)
	g.stop()

	// The same while nobody looks.
	_, next := g.snapshot()
	must(t, os.Truncate(log, int64(40*(len(all[0])+1))))
	rest := follow(t, log, next[60], fast)
	rest.wantCaughtUp()
	appendTo(t, log, "once more\n")
	rest.want("once more")
}

// Truncated, and grown beyond our place again before we look.
func TestTruncatedAndGrown(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, numbered(0)+"\n"+numbered(1)+"\n")
	hold := make(chan struct{})
	o := fast
	g := followSlow(t, log, o, hold)
	hold <- struct{}{}
	g.want(numbered(0), numbered(1))
	// While emit holds us up, 2 is written, copied and truncated away.
	appendTo(t, log, numbered(2)+"\n")
	hold <- struct{}{}
	must(t, os.Truncate(log, 0))
	var want []string
	for i := range 200 {
		want = append(want, numbered(1000+i))
	}
	appendTo(t, log, strings.Join(want, "\n")+"\n")
	close(hold)
	until(t, "the new lines", func() bool {
		lines, _ := g.snapshot()
		return len(lines) > 0 && lines[len(lines)-1] == want[199]
	})
	lines, _ := g.snapshot()
	if got := lines[len(lines)-200:]; !slices.Equal(got, want) {
		t.Errorf("after the truncation: %s", show(got))
	}
}

// A writer that does not append leaves a hole of NULs before its next line.
func TestHoles(t *testing.T) {
	log := logIn(t)
	f, err := os.Create(log)
	must(t, err)
	defer f.Close()
	_, err = f.WriteString(numbered(0) + "\n")
	must(t, err)
	g := follow(t, log, Position{}, fast)
	g.want(numbered(0))
	_, err = f.Seek(1<<40, 0) // a terabyte that nobody wants to read
	must(t, err)
	must(t, os.Truncate(log, 0))
	if _, err = f.WriteString(numbered(1) + "\n"); err != nil {
		skip(t, "this file system has no large sparse files: %v", err)
	}
	g.want(numbered(0), numbered(1))
	_, next := g.snapshot()
	if want := int64(1<<40 + len(numbered(1)) + 1); next[1].Offset != want {
		t.Errorf("offset %d, want %d", next[1].Offset, want)
	}
}

// Permission lost, for the file that a rotation makes, and regained.
func TestPermission(t *testing.T) {
	log := logIn(t)
	dir := filepath.Dir(log)
	must(t, os.Chmod(dir, 0o777))
	must(t, os.Chmod(filepath.Dir(dir), 0o755))
	appendTo(t, log, "one\n")
	must(t, os.Chmod(log, 0o644))
	var told told
	o := fast
	o.Log = told.logger()
	o.NoInotify = true // the watching goroutine would run with root's rights
	g := &got{t: t}
	asNobody(t, g, log, o)
	g.want("one")
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, "")
	must(t, os.Chmod(log, 0))
	appendTo(t, log, "two\n")
	until(t, "a warning", func() bool { return told.count("permission denied") > 0 })
	appendTo(t, log+".1", "late\n")
	must(t, os.Chmod(log, 0o644))
	g.want("one", "late", "two")
	until(t, "the all-clear", func() bool { return told.count("can be read again") > 0 })
	if n := told.count("level=WARN"); n != 1 {
		t.Errorf("%d warnings, want one:\n%s", n, told.String())
	}
}

// asNobody follows with the rights of an ordinary user. On Linux the user for
// file access is a thread's own, and the thread ends with the goroutine that
// never unlocks it.
func asNobody(t *testing.T, g *got, log string, o Options) {
	t.Helper()
	started := make(chan bool)
	g.run(func() {
		if os.Geteuid() == 0 {
			runtime.LockOSThread()
			_ = unix.Setfsuid(65534)
			id, _ := unix.SetfsuidRetUid(-1)
			ok := id == 65534
			started <- ok
			if !ok {
				return
			}
		} else {
			started <- true
		}
		g.err = Follow(g.ctx, log, Position{}, o, g.emit)
	})
	if !<-started {
		skip(t, "cannot give up root's rights in one thread")
	}
}
