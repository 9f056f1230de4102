package guard

import (
	"context"
	"errors"
	"iter"
	"net/netip"
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
// putting them back, but no more than once a second; and when he stops all is
// well again.
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
				if n < 40 || n > 10*60+fightsMost {
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
// is set anew in time, and rests otherwise. Nobody is told that somebody changed
// something.
func TestRearm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.st.Close()
		w.fw = &shortlived{broken{Firewall: firewall.NewMemory(firewall.Options{})}}
		w.start()
		var tampers atomic.Int64
		w.g.o.OnEvent = func(e Event) {
			if e.On == OnTamper {
				tampers.Add(1)
			}
		}
		defer w.run()()
		w.block("198.51.100.0/24", 5*24*time.Hour)
		for range 5*24 - 1 {
			time.Sleep(time.Hour)
			w.want("198.51.100.0/24")
		}
		if n := must(w.g.Status(t.Context())).Firewall.Repairs; n < 5 || n > 20 {
			t.Errorf("set anew %d times", n)
		}
		if n := tampers.Load(); n != 0 {
			t.Errorf("told of %d changes by somebody", n)
		}
		time.Sleep(2 * time.Hour)
		w.want("")
	})
}

// wiped is a firewall from which somebody takes everything n times, each time
// that it is looked at.
type wiped struct {
	broken
	n atomic.Int64
}

func (m *wiped) Ensure(ctx context.Context) (bool, error) {
	if m.n.Add(-1) < 0 {
		return false, nil
	}
	return true, m.Firewall.Replace(ctx, nil)
}

func (m *wiped) Watch(ctx context.Context, changed func(string)) error {
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(50 * time.Millisecond):
			if m.n.Load() > 0 {
				changed("evil-script (pid 7)")
			}
		}
	}
	return nil
}

// TestBlockInAFight: while we shout that somebody undoes our repairs, a new
// block goes in at once, an unblock comes out, and what he took away is back
// within seconds; all of it is told as it is.
func TestBlockInAFight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		m := &wiped{broken: broken{Firewall: firewall.NewMemory(firewall.Options{})}}
		w.st.Close()
		w.fw = m
		w.start()
		defer w.run()()
		w.block("198.51.100.0/24", 24*time.Hour)
		w.block("203.0.113.9/32", 24*time.Hour)
		m.n.Store(fightsMost + 1)
		for m.n.Load() > 0 {
			time.Sleep(50 * time.Millisecond)
		}
		s := must(w.g.Status(t.Context()))
		if s.Firewall.Agrees || !strings.Contains(s.Firewall.Error, "evil-script (pid 7) has changed our rules") {
			t.Errorf("nobody shouts: %+v", s.Firewall)
		}
		if o := w.block("192.0.2.7/32", 24*time.Hour); o.Error != "" {
			t.Errorf("a block in an intact filter: %s", o.Error)
		}
		if _, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.9/32"), "root"); err != nil {
			t.Errorf("an unblock in an intact filter: %v", err)
		}
		if got := w.inFilter(); !strings.Contains(got, "192.0.2.7/32") || strings.Contains(got, "203.0.113.9/32") {
			t.Errorf("in the filter: %s", got)
		}
		for _, b := range must(w.g.Blocks(t.Context())) {
			if in := strings.Contains(w.inFilter(), b.Prefix.String()); (b.State == InForce) != in {
				t.Errorf("%s is said to be %s, and is in the filter: %v", b.Prefix, b.State, in)
			}
		}
		time.Sleep(3 * time.Second)
		w.want("192.0.2.7/32 198.51.100.0/24")
		time.Sleep(2 * time.Minute)
		if s := must(w.g.Status(t.Context())); !s.Firewall.Agrees || s.Firewall.Error != "" {
			t.Errorf("after the fight: %+v", s.Firewall)
		}
	})
}

// clinging is a firewall that lets go of nothing while at is set.
type clinging struct {
	broken
	at atomic.Bool
}

var errClings = errors.New("it clings")

func (c *clinging) Apply(ctx context.Context, b firewall.Batch) (firewall.Result, error) {
	if !c.at.Load() || len(b.Unset) == 0 {
		return c.broken.Apply(ctx, b)
	}
	var res firewall.Result
	for _, p := range b.Unset {
		res.Failed = append(res.Failed, firewall.Failure{Prefix: p, Err: errClings})
	}
	b.Unset = nil
	_, err := c.broken.Apply(ctx, b)
	return res, errors.Join(err, errClings)
}

func (c *clinging) Replace(ctx context.Context, es []firewall.Entry) error {
	if !c.at.Load() {
		return c.broken.Replace(ctx, es)
	}
	want := make(map[netip.Prefix]bool)
	for _, e := range es {
		want[e.Prefix] = true
	}
	var part firewall.PartialError
	for in := range c.List(ctx) {
		if !want[in.Prefix] {
			part.Failed = append(part.Failed, firewall.Failure{Prefix: in.Prefix, Err: errClings})
		}
	}
	if _, err := c.broken.Apply(ctx, firewall.Batch{Set: es}); err != nil || len(part.Failed) == 0 {
		return err
	}
	part.Err = errClings
	return &part
}

// TestLingering: what the filter did not let go of is not a missing block: it
// drops somebody who is not blocked any more, and is told as that.
func TestLingering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		c := &clinging{broken: broken{Firewall: firewall.NewMemory(firewall.Options{})}}
		w.st.Close()
		w.fw = c
		w.start()
		defer w.run()()
		w.block("198.51.100.0/24", time.Hour)
		w.block("203.0.113.9/32", time.Hour)
		c.at.Store(true)
		p := netip.MustParsePrefix("203.0.113.9/32")
		if _, err := w.g.Unblock(t.Context(), p, "root"); !errors.Is(err, errClings) {
			t.Error(err)
		}
		check := func(missing, lingering int) {
			t.Helper()
			s := must(w.g.Status(t.Context()))
			var pulse Pulse
			if err := w.g.do(t.Context(), func(context.Context) { pulse = w.g.pulse(time.Now()) }); err != nil {
				t.Fatal(err)
			}
			if len(s.Firewall.Missing) != missing || len(s.Firewall.Lingering) != lingering || pulse.Missing != missing || pulse.Lingering != lingering {
				t.Errorf("missing %v (%d), lingering %v (%d); want %d and %d", s.Firewall.Missing, pulse.Missing, s.Firewall.Lingering, pulse.Lingering, missing, lingering)
			}
			if agrees := missing+lingering == 0; s.Firewall.Agrees != agrees || pulse.Agrees != agrees || (s.Firewall.Error == "") != agrees {
				t.Errorf("%+v, %+v", s.Firewall, pulse.Agrees)
			}
		}
		check(0, 1)
		time.Sleep(time.Minute) // and what the repairs say
		check(0, 1)
		for _, b := range must(w.g.Blocks(t.Context())) {
			if b.State != InForce {
				t.Errorf("%+v", b)
			}
		}
		if o := w.block("203.0.113.9/32", time.Hour); o.Error != "" {
			t.Error(o.Error)
		}
		check(0, 0)
		if _, err := w.g.Unblock(t.Context(), p, "root"); !errors.Is(err, errClings) {
			t.Error(err)
		}
		c.at.Store(false)
		time.Sleep(time.Minute)
		check(0, 0)
		w.want("198.51.100.0/24")
	})
}
