package firewall

import (
	"context"
	"errors"
	"iter"
	"time"
)

// memory is the backend of observe mode and of tests: it agrees to everything
// and stops nothing.
type memory struct {
	book
}

// NewMemory returns a backend that keeps entries in a map until their time and
// drops no packets (Capabilities.Real is false). Of o only MaxEntries counts.
// What it holds is gone with Close(ctx, true) or with the process.
func NewMemory(o Options) Firewall {
	return &memory{book: newBook(o)}
}

func (m *memory) Name() string { return "memory" }

func (m *memory) Probe(context.Context) (Capabilities, error) {
	return Capabilities{
		IPv6: true, Prefixes: true, Timeouts: true, Atomic: true,
		Readback: true, Expiry: true, MaxEntries: m.max,
	}, nil
}

func (m *memory) Ensure(ctx context.Context) (bool, error) { return false, ctx.Err() }

func (m *memory) Intact(ctx context.Context) (bool, error) { return true, ctx.Err() }

func (m *memory) Apply(ctx context.Context, b Batch) (Result, error) {
	now := time.Now()
	p, res, err := planBatch(b, now)
	if err != nil {
		return res, err
	}
	if err := ctx.Err(); err != nil {
		return failAll(p.prefixes(), err), err
	}
	p, res, err = m.fit(p, now)
	m.apply(p)
	return res, err
}

func (m *memory) List(ctx context.Context) iter.Seq2[Installed, error] {
	return func(yield func(Installed, error) bool) {
		if err := ctx.Err(); err != nil {
			yield(Installed{}, err)
			return
		}
		for _, e := range m.entries(time.Now()) {
			if !yield(Installed{Prefix: e.Prefix, Until: e.Until}, nil) {
				return
			}
		}
	}
}

func (m *memory) Replace(ctx context.Context, entries []Entry) error {
	now := time.Now()
	p, _, err := planBatch(Batch{Set: entries}, now)
	if err = cmpErr(err, ctx.Err()); err != nil {
		return err
	}
	p, res, err := m.fitAll(p, now)
	m.replace(p.set)
	return partial(res, err)
}

func (m *memory) Watch(context.Context, func(string)) error { return errors.ErrUnsupported }

func (m *memory) Close(_ context.Context, remove bool) error {
	if remove {
		m.replace(nil)
	}
	return nil
}
