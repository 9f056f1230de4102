package guard

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// gathered gathers the lines that any of a guard's logs gave.
type gathered struct {
	mu    sync.Mutex
	lines []string
}

// Parse takes a line, of which no event is made.
func (h *gathered) Parse(line []byte, _ *detector.Event) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, string(line))
	return false
}

func (h *gathered) sorted() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	lines := slices.Clone(h.lines)
	slices.Sort(lines)
	return strings.Join(lines, " ")
}

// want waits for these lines, in any order, and none twice.
func (h *gathered) want(t *testing.T, want string) {
	t.Helper()
	n := len(strings.Fields(want))
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if len(strings.Fields(h.sorted())) >= n {
			break
		}
	}
	if got := h.sorted(); got != want {
		t.Fatalf("heard %q, want %q", got, want)
	}
}

// following runs a guard, with a store of its own at path, that follows logs.
func following(t *testing.T, path string, h *gathered, logs ...string) (g *Guard, stop func()) {
	t.Helper()
	st, err := store.Open(path, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := policy.Default()
	p.Confirm = policy.ConfirmOff
	o := Options{Policy: p, Store: st, Capacity: 100,
		OpenFirewall: func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
			return firewall.NewMemory(firewall.Options{}), nil
		},
		Self: func(context.Context) ([]Exempt, error) { return nil, nil },
	}
	for _, l := range logs {
		o.Logs = append(o.Logs, Log{Path: l, Parser: h, Fork: func() Parser { return h }})
	}
	if g, err = New(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return g, stop
}

// caughtUpWith waits until n logs are shown and all of them are read.
func caughtUpWith(t *testing.T, g *Guard, n int) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		s, err := g.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if len(s.Logs) == n && !slices.ContainsFunc(s.Logs, func(l LogStatus) bool { return !l.CaughtUp }) {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the logs are %+v, want %d, all read", s.Logs, n)
		}
	}
}

func write(t *testing.T, name, text string) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		_, err = f.WriteString(text)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The files of a pattern: what is there at the first start is followed from
// its end, what comes later from its beginning, whether we run or not, and
// also what comes in the moment before a stop.
func TestPatternAcrossStarts(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	path := filepath.Join(t.TempDir(), "s.db")
	var h gathered
	write(t, in("a.log"), "old\n")
	g, stop := following(t, path, &h, in("*.log"))
	caughtUpWith(t, g, 2)
	write(t, in("a.log"), "a1\n")
	h.want(t, "a1")
	write(t, in("b.log"), "b1\n")
	stop() // most likely before b.log was seen

	write(t, in("a.log"), "a2\n")
	write(t, in("c.log"), "c1\n")
	g, stop = following(t, path, &h, in("*.log"))
	h.want(t, "a1 a2 b1 c1")
	caughtUpWith(t, g, 4)
	stop()

	_, stop = following(t, path, &h, in("*.log"))
	write(t, in("c.log"), "c2\n")
	h.want(t, "a1 a2 b1 c1 c2")
	stop()
}

// A line counts once, whether its file is named beside a pattern that matches
// it too, linked to, matched by two patterns, or rotated.
func TestOverlappingLogs(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	path := filepath.Join(t.TempDir(), "s.db")
	var h gathered
	write(t, in("main"), "old\n")
	if err := os.Symlink("main", in("main-link")); err != nil {
		t.Fatal(err)
	}
	g, stop := following(t, path, &h, in("*"), in("m*"), in("main"))
	caughtUpWith(t, g, 3)
	write(t, in("main"), "m1\n")
	write(t, in("more"), "x1\n")
	h.want(t, "m1 x1")
	if err := os.Rename(in("main"), in("main.1")); err != nil {
		t.Fatal(err)
	}
	write(t, in("main"), "m2\n")
	h.want(t, "m1 m2 x1")
	caughtUpWith(t, g, 4)
	stop()
	write(t, in("main"), "m3\n")
	write(t, in("more"), "x2\n")
	g, stop = following(t, path, &h, in("*"), in("m*"), in("main"))
	h.want(t, "m1 m2 m3 x1 x2")
	caughtUpWith(t, g, 4)
	stop()
	h.want(t, "m1 m2 m3 x1 x2")
}
