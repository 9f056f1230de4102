package tail

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// Without a look at intervals, inotify alone must wake us: through lines, a
// rotation, and a switched symbolic link.
func TestInotifyAlone(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "mainlog")
	appendTo(t, log, "one\n")
	g := follow(t, log, Position{}, Options{Poll: time.Hour, Grace: 5 * time.Millisecond})
	g.want("one")
	g.wantCaughtUp()
	appendTo(t, log, "two\n")
	g.want("one", "two")
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, "three\n")
	g.want("one", "two", "three")
	other := filepath.Join(t.TempDir(), "other")
	appendTo(t, other, "four\n")
	must(t, os.Symlink(other, log+".new"))
	must(t, os.Rename(log+".new", log))
	g.want("one", "two", "three", "four")
	appendTo(t, other, "five\n") // in a directory that was not watched at first
	g.want("one", "two", "three", "four", "five")
}

// The directory itself is moved away and made anew.
func TestDirectoryReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	log := filepath.Join(dir, "mainlog")
	must(t, os.Mkdir(dir, 0o755))
	appendTo(t, log, "one\n")
	g := follow(t, log, Position{}, fast)
	g.want("one")
	appendTo(t, log, "two\n")
	must(t, os.Rename(dir, dir+".old"))
	must(t, os.Mkdir(dir, 0o755))
	appendTo(t, log, "three\n")
	g.want("one", "two", "three")
}

// While emit blocks the file is the queue: what is written and rotated
// meanwhile is all there afterwards.
func TestBackpressure(t *testing.T) {
	log := logIn(t)
	hold := make(chan struct{})
	appendTo(t, log, numbered(0)+"\n")
	g := followSlow(t, log, fast, hold)
	hold <- struct{}{}
	g.want(numbered(0))
	n := 1
	for range 5 {
		var b strings.Builder
		for range 20_000 {
			b.WriteString(numbered(n) + "\n")
			n++
		}
		appendTo(t, log, b.String())
		shift(t, log, "")
		must(t, os.Rename(log, log+".1"))
	}
	appendTo(t, log, numbered(n)+"\n")
	close(hold)
	g.wantAll(n + 1)
	g.wantCaughtUp()
}

func TestBehind(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, strings.Repeat(strings.Repeat("x", 99)+"\n", 3*readSize/100)+"half")
	fi, err := os.Stat(log)
	must(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var behind []int64
	must(t, Follow(ctx, log, Position{}, Options{}, func(b Batch) error {
		behind = append(behind, b.Behind)
		if b.CaughtUp != (b.Behind == 0) {
			t.Errorf("CaughtUp is %v with %d bytes to come", b.CaughtUp, b.Behind)
		}
		if b.CaughtUp {
			cancel()
		}
		return nil
	}))
	if want := []int64{fi.Size() - readSize, fi.Size() - 2*readSize, 0}; !slices.Equal(behind, want) {
		t.Errorf("Behind: %v, want %v", behind, want)
	}
}

// A log that is moved back under its name is not read twice.
func TestMovedBack(t *testing.T) {
	log := logIn(t)
	appendTo(t, log, numbered(0)+"\n")
	g := follow(t, log, Position{}, fast)
	g.want(numbered(0))
	must(t, os.Rename(log, log+".keep"))
	appendTo(t, log, numbered(1)+"\n")
	g.want(numbered(0), numbered(1))
	must(t, os.Rename(log+".keep", log))
	appendTo(t, log, numbered(2)+"\n")
	g.want(numbered(0), numbered(1), numbered(2))
}

// Each kind of compression that a rotation may use.
func TestCompressions(t *testing.T) {
	for ext, compress := range map[string]func(t *testing.T, text string) string{
		".zst": func(t *testing.T, text string) string {
			z, err := zstd.NewWriter(nil)
			must(t, err)
			defer z.Close()
			return string(z.EncodeAll([]byte(text), nil))
		},
		".xz": func(t *testing.T, text string) string {
			var b strings.Builder
			z, err := xz.NewWriter(&b)
			must(t, err)
			_, err = z.Write([]byte(text))
			must(t, err)
			must(t, z.Close())
			return b.String()
		},
	} {
		t.Run(ext, func(t *testing.T) {
			log := logIn(t)
			text := numbered(0) + "\n" + numbered(1) + "\n"
			appendTo(t, log, text)
			g := follow(t, log, Position{}, fast)
			g.want(numbered(0), numbered(1))
			g.stop()
			_, next := g.snapshot()
			appendTo(t, log+".1"+ext, compress(t, text))
			must(t, os.Rename(log, filepath.Join(t.TempDir(), "elsewhere")))
			appendTo(t, log, numbered(2)+"\n")
			rest := follow(t, log, next[0], fast)
			rest.want(numbered(1), numbered(2))
		})
	}
}

// A compressed file that is not whole gives what it has, and is told of.
func TestDamagedCompressed(t *testing.T) {
	log := logIn(t)
	var want []string
	for i := range 2000 {
		want = append(want, numbered(i))
	}
	appendTo(t, log, strings.Join(want, "\n")+"\n")
	g := follow(t, log, Position{}, fast)
	g.wantAll(2000)
	g.stop()
	_, next := g.snapshot()
	must(t, os.Rename(log, log+".1"))
	gzipFile(t, log+".1")
	fi, err := os.Stat(log + ".1.gz")
	must(t, err)
	must(t, os.Truncate(log+".1.gz", fi.Size()/2))
	appendTo(t, log, "new\n")
	var told told
	o := fast
	o.Log = told.logger()
	rest := follow(t, log, next[20], o)
	until(t, "the new log's line", func() bool {
		lines, _ := rest.snapshot()
		return len(lines) > 0 && lines[len(lines)-1] == "new"
	})
	lines, _ := rest.snapshot()
	if len(lines) < 100 || lines[0] != want[21] {
		t.Errorf("%d lines from %.60q on, want some hundreds from %q on", len(lines), lines[0], want[21])
	}
	if n := told.count("damaged"); n != 1 {
		t.Errorf("told %d times of the damage:\n%s", n, told.String())
	}
}

// Positions from a store that somebody else wrote, or that was damaged.
func TestHostilePosition(t *testing.T) {
	for _, p := range []Position{
		{Offset: -1},
		{Offset: 1 << 62, HeadLen: 1 << 30, Head: 1},
		{Inode: 1, Offset: 5, HeadLen: -5},
		{Inode: 1, HeadLen: 5},
	} {
		log := logIn(t)
		appendTo(t, log, "one\n")
		fi, err := os.Stat(log)
		must(t, err)
		for _, ino := range []uint64{0, idOf(fi).ino} {
			p.Inode = ino
			g := follow(t, log, p, fast)
			g.want("one")
			g.stop()
		}
	}
}
