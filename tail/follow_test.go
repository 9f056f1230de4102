package tail

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	flag.Parse()
	// The parallel tests wait far more than they work.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// deadline is how long a test waits for what must happen; a slow machine is
// no failure.
const deadline = 30 * time.Second

// got gathers what a Follow delivers.
type got struct {
	t     *testing.T
	ctx   context.Context
	stop  func() // ends the Follow and waits for it
	mu    sync.Mutex
	lines []string
	next  []Position
	last  Batch
	hold  chan struct{} // if not nil: each emit first waits for this
	err   error
}

// fast is Options for tests in which files are rotated by the second.
var fast = Options{Poll: 5 * time.Millisecond, Grace: 5 * time.Millisecond}

// follow starts a Follow that ends with the test at the latest.
func follow(t *testing.T, path string, from Position, o Options) *got {
	t.Helper()
	g := &got{t: t}
	g.run(func() { g.err = Follow(g.ctx, path, from, o, g.emit) })
	return g
}

// followSlow is follow from the beginning with an emit that waits for hold.
func followSlow(t *testing.T, path string, o Options, hold chan struct{}) *got {
	t.Helper()
	g := &got{t: t, hold: hold}
	g.run(func() { g.err = Follow(g.ctx, path, Position{}, o, g.emit) })
	return g
}

// run runs fn, which is to end with g.ctx, in a goroutine.
func (g *got) run(fn func()) {
	var cancel func()
	g.ctx, cancel = context.WithCancel(context.Background())
	done := make(chan struct{})
	g.stop = sync.OnceFunc(func() { cancel(); <-done })
	g.t.Cleanup(g.stop)
	go func() {
		defer close(done)
		fn()
	}()
}

func (g *got) emit(b Batch) error {
	if g.hold != nil {
		select {
		case <-g.hold:
		case <-g.ctx.Done():
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, l := range b.Lines {
		g.lines = append(g.lines, string(l.Text))
		g.next = append(g.next, l.Next)
	}
	b.Lines = nil
	g.last = b
	return nil
}

// until polls for what must become true.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", deadline, what)
		}
	}
}

func (g *got) snapshot() ([]string, []Position) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.lines), slices.Clone(g.next)
}

func (g *got) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.lines)
}

// want waits for exactly these lines.
func (g *got) want(want ...string) {
	g.t.Helper()
	var lines []string
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if lines, _ = g.snapshot(); len(lines) >= len(want) {
			break
		}
	}
	if !slices.Equal(lines, want) {
		g.t.Fatalf("lines\n got %s\nwant %s", show(lines), show(want))
	}
}

// wantAll waits for the lines numbered 0 to n-1, each once and in order.
func (g *got) wantAll(n int) {
	g.t.Helper()
	until(g.t, fmt.Sprintf("%d lines", n), func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.lines) >= n || len(g.lines) > 0 && g.lines[len(g.lines)-1] == numbered(n-1)
	})
	lines, _ := g.snapshot()
	count := map[string]int{}
	for _, l := range lines {
		count[l]++
	}
	var bad []string
	for i := range n {
		if c := count[numbered(i)]; c != 1 {
			bad = append(bad, fmt.Sprintf("%q %d times", numbered(i), c))
		}
		delete(count, numbered(i))
	}
	for l, c := range count {
		bad = append(bad, fmt.Sprintf("strange %q %d times", l, c))
	}
	if len(bad) > 0 {
		g.t.Fatalf("%d of %d lines are wrong: %s", len(bad), n, show(bad))
	}
	for i, l := range lines {
		if l != numbered(i) {
			g.t.Fatalf("line %d is %q: out of order", i, l)
		}
	}
}

// wantCaughtUp waits until everything is read.
func (g *got) wantCaughtUp() {
	g.t.Helper()
	until(g.t, "being caught up", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.last.CaughtUp
	})
}

func show(lines []string) string {
	const most = 12
	more := ""
	if len(lines) > most {
		more = fmt.Sprintf(" and %d more", len(lines)-most)
		lines = lines[:most]
	}
	return fmt.Sprintf("%.2000q%s", lines, more)
}

func numbered(i int) string {
	return fmt.Sprintf("2026-11-22 19:44:12 line %07d of the log", i)
}

// appendTo writes as Exim does: O_APPEND, one write.
func appendTo(t *testing.T, path, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func logIn(t *testing.T) string { return filepath.Join(t.TempDir(), "mainlog") }

func TestFollow(t *testing.T) {
	for _, o := range []Options{{}, {NoInotify: true, Poll: 10 * time.Millisecond}} {
		t.Run(fmt.Sprintf("NoInotify=%v", o.NoInotify), func(t *testing.T) {
			log := logIn(t)
			appendTo(t, log, "one\ntwo\n")
			g := follow(t, log, Position{}, o)
			g.want("one", "two")
			g.wantCaughtUp()
			appendTo(t, log, "three\nfo")
			g.want("one", "two", "three")
			appendTo(t, log, "ur\n\nsix\n")
			g.want("one", "two", "three", "four", "", "six")
			g.stop()
			if g.err != nil {
				t.Errorf("Follow returned %v after its context ended, want nil", g.err)
			}
		})
	}
}

// Only LF ends a line, and NULs before a line are not part of it.
func TestFollowBytes(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "a\rb\x00c\xff\u2028d\v\f\u0085e\n\x00\x00after a hole\n\x00\n")
	g := follow(t, log, Position{}, Options{})
	g.want("a\rb\x00c\xff\u2028d\v\f\u0085e", "after a hole", "")
}

func TestFollowLongLines(t *testing.T) {
	log := logIn(t)
	long := strings.Repeat("x", 1<<20)
	appendTo(t, log, "short\n"+long+"\nnext\n"+long)
	g := follow(t, log, Position{}, Options{MaxLine: 100})
	g.want("short", long[:100], "next")
	appendTo(t, log, long+"\nlast\n")
	g.want("short", long[:100], "next", long[:100], "last")
	_, next := g.snapshot()
	if want := int64(6 + 1<<20 + 1 + 5 + 2<<20 + 1 + 5); next[4].Offset != want {
		t.Errorf("offset after the last line: %d, want %d", next[4].Offset, want)
	}
}

func TestFollowTruncatedFlag(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "12345\n123456\n\x00\x0012345\n")
	var flags []bool
	ctx, cancel := context.WithCancel(context.Background())
	must(t, Follow(ctx, log, Position{}, Options{MaxLine: 5}, func(b Batch) error {
		for _, l := range b.Lines {
			flags = append(flags, l.Truncated)
		}
		cancel()
		return nil
	}))
	if want := []bool{false, true, false}; !slices.Equal(flags, want) {
		t.Errorf("Truncated: %v, want %v", flags, want)
	}
}

func TestFollowStartAtEnd(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "old\nhalf")
	g := follow(t, log, Position{}, Options{Start: End})
	g.wantCaughtUp()
	appendTo(t, log, " of it\nnew\n")
	g.want("half of it", "new")
}

// A file that appears later is all news, wherever we were told to start.
func TestFollowLateCreation(t *testing.T) {
	for _, start := range []Start{Beginning, End} {
		dir := filepath.Join(t.TempDir(), "not", "yet")
		log := filepath.Join(dir, "mainlog")
		g := follow(t, log, Position{}, Options{Start: start, Poll: 20 * time.Millisecond})
		g.wantCaughtUp()
		must(t, os.MkdirAll(dir, 0o755))
		appendTo(t, log, "first\n")
		g.want("first")
		g.stop()
	}
}

func TestFollowEmitFails(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, "one\n")
	want := fmt.Errorf("no room")
	if err := Follow(t.Context(), log, Position{}, Options{}, func(Batch) error { return want }); err != want {
		t.Errorf("Follow returned %v, want emit's %v", err, want)
	}
}

// Something else in the log's place is told, and the log that replaces it is
// read.
func TestFollowNotRegular(t *testing.T) {
	log := logIn(t)
	must(t, syscall.Mkfifo(log, 0o600)) // opening it must not wait for a writer
	var told told
	o := fast
	o.Log = told.logger()
	g := follow(t, log, Position{}, o)
	until(t, "a warning", func() bool { return told.count("not a regular file") > 0 })
	must(t, os.Remove(log))
	appendTo(t, log, "one\n")
	g.want("one")
}

// Resuming at any line's Next gives exactly the rest.
func TestResumeAtEveryLine(t *testing.T) {
	log := logIn(t)
	var all []string
	for i := range 60 {
		all = append(all, strings.Repeat(numbered(i)+"\x00", i%4+1))
	}
	appendTo(t, log, strings.Join(all, "\n")+"\n")
	g := follow(t, log, Position{}, Options{})
	g.want(all...)
	g.stop()
	_, next := g.snapshot()
	for _, change := range []struct {
		name string
		do   func()
	}{
		{"unchanged", func() {}},
		{"renamed", func() { must(t, os.Rename(log, log+".1")) }},
		{"renamed, new log", func() { appendTo(t, log, "fresh\n"); all = append(all, "fresh") }},
		{"compressed", func() { gzipFile(t, log+".1") }},
	} {
		change.do()
		for i, p := range next {
			rest := follow(t, log, p, fast)
			rest.want(all[i+1:]...)
			rest.wantCaughtUp()
			rest.stop()
		}
		if t.Failed() {
			t.Fatalf("after the log was %s", change.name)
		}
	}
}
