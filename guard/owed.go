package guard

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/smtpguard/smtpguard/store"
)

// owed is what memory and packet filter have and the store has not, because it
// could not be written when that could not wait: the end of blocks of somebody
// who must not be blocked, and the beginning of blocks of a flood. It is
// written, all of it or nothing, as soon as the disk takes it, and before
// anything that comes later: see write. A crash before that takes back what is
// owed: whoever must not be blocked is freed anew by the next start.
type owed struct {
	ended []store.Block  // Lifted is set
	began []*store.Block // they have no ID
}

// written are the blocks that the store has.
func written(blocks []store.Block) []store.Block {
	return slices.DeleteFunc(slices.Clone(blocks), func(b store.Block) bool { return b.ID == 0 })
}

// owe notes what could not be written.
func (g *Guard) owe(ended []store.Block, began []*store.Block) {
	g.owed.ended = append(g.owed.ended, written(ended)...)
	anew := make(map[netip.Prefix]bool, len(began))
	for _, b := range began {
		anew[b.Prefix] = true
	}
	g.owed.began = append(slices.DeleteFunc(g.owed.began, func(b *store.Block) bool { return anew[b.Prefix] }), began...)
}

// asIs puts what memory knows better into blocks that the store told of.
func (o *owed) asIs(blocks []store.Block) {
	for i, b := range blocks {
		if n := slices.IndexFunc(o.ended, func(e store.Block) bool { return e.ID == b.ID }); n >= 0 {
			blocks[i] = o.ended[n]
		}
	}
}

// write is Store.Replace, in its order: first what is owed. Where there is
// nothing to write it needs no disk.
func (g *Guard) write(ended []store.Block, began []*store.Block) error {
	if len(ended)+len(began) == 0 {
		return nil
	}
	if err := g.settle(); err != nil {
		return err
	}
	return g.o.Store.Replace(ended, began)
}

// settle writes down what is owed to the store.
func (g *Guard) settle() error {
	g.owed.began = slices.DeleteFunc(g.owed.began, func(b *store.Block) bool {
		now, ok := g.blocks.get(b.Prefix)
		return !ok || now.ID != 0 || !now.Since.Equal(b.Since)
	})
	o := g.owed
	if len(o.ended)+len(o.began) == 0 {
		return nil
	}
	err := g.o.Store.Replace(o.ended, o.began)
	if errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrBadValue) {
		// Nothing is left there to be ended; the others do not wait for it.
		g.fault("ending blocks in the store", err)
		o.ended = slices.DeleteFunc(o.ended, func(b store.Block) bool {
			_, err := g.o.Store.Block(b.ID)
			return errors.Is(err, store.ErrUnknown) || errors.Is(err, store.ErrBadValue)
		})
		err = g.o.Store.Replace(o.ended, o.began)
	}
	if err != nil {
		return fmt.Errorf("writing down %d blocks that ended and %d that began: %w", len(o.ended), len(o.began), err)
	}
	for _, b := range o.began {
		g.blocks.put(*b)
	}
	g.owed = owed{}
	g.log.Info("what could not be written down about blocks now is", "ended", len(o.ended), "began", len(o.began))
	return nil
}

// OwedError says that blocks are lifted, and that the store does not know it.
type OwedError struct {
	// Alone: no daemon runs, and nobody tries again by himself.
	Alone bool
	// Asked: a person lifted them, and no allowlist would do so again.
	Asked bool
	Err   error
}

func (e *OwedError) Error() string {
	next := "it is tried again each second, and a restart before that brings them back for as long as it takes to lift them anew"
	if e.Asked {
		next = "it is tried again each second, and a restart before that brings them back"
	}
	if e.Alone {
		next = "the next start of the daemon lifts them anew"
	}
	return fmt.Sprintf("the blocks are lifted, but that could not be written down; %s: %v", next, e.Err)
}

func (e *OwedError) Unwrap() error { return e.Err }

// owedWarnings are the sentences about what is owed.
func (g *Guard) owedWarnings() (w []string) {
	if n := len(g.owed.ended); n > 0 {
		w = append(w, fmt.Sprintf("the end of %d blocks could not be written down (is the disk full?); they are lifted, but a restart finds them in force", n))
	}
	if n := len(g.owed.began); n > 0 {
		w = append(w, fmt.Sprintf("%d blocks could not be written down (is the disk full?); until they are, what a rule blocks lasts for %s at most, and a restart forgets it", n, unsavedFor))
	}
	return w
}
