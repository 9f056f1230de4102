package tail

import (
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// lateIn begins to follow a log that was rotated once: numbered(0) stands in
// the finished file, numbered(1) in the new one. held is the finished file,
// open to a writer that does not change over.
func lateIn(t *testing.T) (log string, held *os.File, g *got) {
	t.Helper()
	log = logIn(t)
	appendTo(t, log, numbered(0)+"\n")
	held, err := os.OpenFile(log, os.O_WRONLY|os.O_APPEND, 0)
	must(t, err)
	t.Cleanup(func() { held.Close() })
	g = follow(t, log, Position{}, Options{NoInotify: true})
	synctest.Wait()
	must(t, os.Rename(log, log+".1"))
	appendTo(t, log, numbered(1)+"\n")
	time.Sleep(10 * time.Second)
	synctest.Wait()
	g.want(numbered(0), numbered(1))
	return log, held, g
}

func put(t *testing.T, f *os.File, s string) {
	t.Helper()
	_, err := f.WriteString(s)
	must(t, err)
}

// A late line is not lost if the next file is finished before we look, nor is
// the half one that it ended with; and none is delivered twice, also not to
// whoever goes on from any of these lines.
func TestLateAtNextRotation(t *testing.T) {
	for _, c := range []struct{ name, late string }{
		{"whole", numbered(2) + "\n" + numbered(3) + "\n"},
		{"half", numbered(2) + "\n" + numbered(3)},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, held, g := lateIn(t)
				put(t, held, c.late)
				must(t, os.Rename(log+".1", log+".2"))
				must(t, os.Rename(log, log+".1"))
				appendTo(t, log, numbered(4)+"\n")
				time.Sleep(10 * time.Second)
				synctest.Wait()
				g.want(numbered(0), numbered(1), numbered(2), numbered(3), numbered(4))
				g.stop()
				_, next := g.snapshot()
				for i, p := range next[2:] {
					rest := follow(t, log, p, Options{NoInotify: true})
					time.Sleep(10 * time.Second)
					synctest.Wait()
					if i < 2 {
						rest.want(numbered(4))
					} else {
						rest.want()
					}
					rest.stop()
				}
			})
		})
	}
}

// The half line that was read before the next rotation is a line as well.
func TestLateHalfReadBefore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, held, g := lateIn(t)
		put(t, held, numbered(2)+"\n"+numbered(3))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.want(numbered(0), numbered(1), numbered(2))
		must(t, os.Rename(log+".1", log+".2"))
		must(t, os.Rename(log, log+".1"))
		appendTo(t, log, numbered(4)+"\n")
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.want(numbered(0), numbered(1), numbered(2), numbered(3), numbered(4))
	})
}

// So it is where the file is let go because it was quiet for long, was deleted
// or was emptied, or because the log itself is truncated.
func TestLateHalfLetGo(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(t *testing.T, log string)
	}{
		{"quiet", func(t *testing.T, log string) { time.Sleep(lateMax) }},
		{"deleted", func(t *testing.T, log string) { must(t, os.Remove(log+".1")) }},
		{"emptied", func(t *testing.T, log string) { must(t, os.Truncate(log+".1", 0)) }},
		{"log truncated", func(t *testing.T, log string) { must(t, os.Truncate(log, 0)) }},
		{"log deleted", func(t *testing.T, log string) { must(t, os.Remove(log)) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				log, held, g := lateIn(t)
				put(t, held, numbered(2)+"\n"+numbered(3))
				time.Sleep(5 * time.Second)
				c.do(t, log)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				g.want(numbered(0), numbered(1), numbered(2), numbered(3))
			})
		})
	}
}

// What a late writer wrote just before its file was deleted is still read.
func TestLateBeforeDeletion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, held, g := lateIn(t)
		put(t, held, numbered(2)+"\n"+numbered(3))
		must(t, os.Remove(log+".1"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.want(numbered(0), numbered(1), numbered(2), numbered(3))
	})
}
