package guard

import (
	"context"
	"iter"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
)

// meddled is a firewall whose rules somebody takes away as long as at is set.
type meddled struct {
	broken
	at       atomic.Bool
	by       string // told by Watch, if not empty
	replaced atomic.Int64
}

func (m *meddled) Ensure(context.Context) (bool, error) { return m.at.Load(), nil }

func (m *meddled) Replace(ctx context.Context, e []firewall.Entry) error {
	m.replaced.Add(1)
	return m.broken.Replace(ctx, e)
}

func (m *meddled) Watch(ctx context.Context, changed func(string)) error {
	if m.by == "" {
		return m.broken.Watch(ctx, changed)
	}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
			if m.at.Load() {
				changed(m.by)
			}
		}
	}
	return nil
}

// TestFlushLoop: who takes our rules away in a loop is named, loudly; we go on
// putting them back, but not as fast as he takes them away; and when he stops
// all is well again.
func TestFlushLoop(t *testing.T) {
	for _, by := range []string{"evil-script (pid 7)", ""} {
		t.Run(by, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				m := &meddled{broken: broken{Firewall: firewall.NewMemory(firewall.Options{})}, by: by}
				w.st.Close()
				w.fw = m
				w.start()
				defer w.run()()
				w.block("198.51.100.0/24", 24*time.Hour)
				before := m.replaced.Load()
				m.at.Store(true)
				time.Sleep(10 * time.Minute)
				n := m.replaced.Load() - before
				if n < 40 || n > 10*(fightsMost+10) {
					t.Errorf("put back %d times in ten minutes", n)
				}
				s := must(w.g.Status(t.Context()))
				name := by
				if by == "" {
					name = "somebody"
				}
				if want := name + " has changed our rules"; s.Firewall.Agrees || !strings.Contains(s.Firewall.Error, want) || !strings.Contains(strings.Join(s.Warnings, "\n"), want) {
					t.Errorf("%+v\n%s", s.Firewall, strings.Join(s.Warnings, "\n"))
				}
				if b := must(w.g.Blocks(t.Context())); len(b) != 1 || b[0].State != NotApplied {
					t.Errorf("%+v", b)
				}
				m.at.Store(false)
				time.Sleep(2 * time.Minute)
				s = must(w.g.Status(t.Context()))
				if b := must(w.g.Blocks(t.Context())); !s.Firewall.Agrees || b[0].State != InForce {
					t.Errorf("%+v\n%+v", s.Firewall, b)
				}
			})
		})
	}
}

// shortlived is a firewall that ends entries after a day, whatever it is told.
type shortlived struct{ broken }

const shortMax = 24 * time.Hour

func (s *shortlived) cut(es []firewall.Entry) []firewall.Entry {
	out := make([]firewall.Entry, len(es))
	for i, e := range es {
		if end := time.Now().Add(shortMax); e.Until.After(end) {
			e.Until = end
		}
		out[i] = e
	}
	return out
}

func (s *shortlived) Apply(ctx context.Context, b firewall.Batch) (firewall.Result, error) {
	b.Set = s.cut(b.Set)
	return s.broken.Apply(ctx, b)
}

func (s *shortlived) Replace(ctx context.Context, es []firewall.Entry) error {
	return s.broken.Replace(ctx, s.cut(es))
}

func (s *shortlived) Probe(ctx context.Context) (firewall.Capabilities, error) {
	c, err := s.broken.Probe(ctx)
	c.MaxTimeout = shortMax
	return c, err
}

func (s *shortlived) List(ctx context.Context) iter.Seq2[firewall.Installed, error] {
	return s.broken.List(ctx)
}

// TestRearm: a block longer than the filter can count (24.8 days with ipset)
// is set anew in time, and rests otherwise.
func TestRearm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.st.Close()
		w.fw = &shortlived{broken{Firewall: firewall.NewMemory(firewall.Options{})}}
		w.start()
		defer w.run()()
		w.block("198.51.100.0/24", 5*24*time.Hour)
		for range 5*24 - 1 {
			time.Sleep(time.Hour)
			w.want("198.51.100.0/24")
		}
		if n := must(w.g.Status(t.Context())).Firewall.Repairs; n < 5 || n > 20 {
			t.Errorf("set anew %d times", n)
		}
		time.Sleep(2 * time.Hour)
		w.want("")
	})
}
