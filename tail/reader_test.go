package tail

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"
)

func TestReader(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	g := &got{t: t}
	g.run(func() { g.err = FollowReader(g.ctx, r, fast, g.emit) })
	g.wantCaughtUp()
	_, err = io.WriteString(w, "one\ntw")
	must(t, err)
	g.want("one")
	_, err = io.WriteString(w, "o\n\x00\x00three\nhalf")
	must(t, err)
	g.want("one", "two", "three")
	must(t, w.Close())
	g.want("one", "two", "three", "half")
	g.wantCaughtUp()
	g.stop()
	if g.err != nil {
		t.Error(g.err)
	}
	must(t, r.Close())
}

// Nobody writes and nobody closes: it ends all the same.
func TestReaderStopped(t *testing.T) {
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	g := &got{t: t}
	g.run(func() { g.err = FollowReader(g.ctx, r, fast, g.emit) })
	g.wantCaughtUp()
	g.stop()
	if g.err != nil {
		t.Error(g.err)
	}
}

func TestReaderLong(t *testing.T) {
	var got []string
	in := strings.Repeat("x", 1<<20) + "\nshort\n"
	o := fast
	o.MaxLine = 10
	must(t, FollowReader(context.Background(), strings.NewReader(in), o, func(b Batch) error {
		for _, l := range b.Lines {
			got = append(got, string(l.Text))
		}
		return nil
	}))
	if len(got) != 2 || got[0] != "xxxxxxxxxx" || got[1] != "short" {
		t.Errorf("%q", got)
	}
}
