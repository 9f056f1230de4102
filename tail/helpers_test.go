package tail

import (
	"compress/gzip"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
)

// gzipFile does as gzip(1): the new file has the old one's times, then the
// old one goes.
func gzipFile(t *testing.T, name string) {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	fi, err := os.Stat(name)
	must(t, err)
	f, err := os.Create(name + ".gz")
	must(t, err)
	z := gzip.NewWriter(f)
	_, err = z.Write(b)
	must(t, err)
	must(t, z.Close())
	must(t, f.Close())
	must(t, os.Chtimes(name+".gz", fi.ModTime(), fi.ModTime()))
	must(t, os.Remove(name))
}

// told is what was told to Options.Log.
type told struct {
	mu  sync.Mutex
	out strings.Builder
}

func (l *told) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.Write(b)
}

func (l *told) logger() *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

func (l *told) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.out.String()
}

func (l *told) count(s string) int { return strings.Count(l.String(), s) }

// skip is t.Skip where people develop, and a failure where all must run.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
