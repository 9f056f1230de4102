package guard

import (
	"maps"
	"net/netip"
	"time"

	"github.com/gaissmai/bart"

	"github.com/smtpguard/smtpguard/store"
)

// blocks are the blocks that are in force or observed now, for fast answers
// to "is this covered?". The store has the truth; this mirrors it.
type blocks struct {
	table bart.Table[*store.Block]
	class map[BlockClass]int // how many there are of each
	edits uint64             // steps with every change
}

func (b *blocks) put(blk store.Block) {
	b.remove(blk.Prefix)
	b.edits++
	b.table.Insert(blk.Prefix, &blk)
	if b.class == nil {
		b.class = make(map[BlockClass]int)
	}
	b.class[classOf(&blk)]++
}

func (b *blocks) remove(p netip.Prefix) {
	old, ok := b.table.Get(p)
	if !ok {
		return
	}
	b.edits++
	b.table.Delete(p)
	c := classOf(old)
	if b.class[c]--; b.class[c] == 0 {
		delete(b.class, c)
	}
}

func (b *blocks) classes() map[BlockClass]int                { return maps.Clone(b.class) }
func (b *blocks) get(p netip.Prefix) (*store.Block, bool)    { return b.table.Get(p) }
func (b *blocks) covers(p netip.Prefix) (*store.Block, bool) { return b.table.LookupPrefix(p) }

// lacking returns the parts that no block covers. What is only observed does
// not count where blocks are real.
func (b *blocks) lacking(parts []netip.Prefix, enforce bool) []netip.Prefix {
	var open []netip.Prefix
	for _, p := range parts {
		if blk, ok := b.covers(p); !ok || blk.Observed && enforce {
			open = append(open, p)
		}
	}
	return open
}

// without is how many of the parts have no block of their own.
func (b *blocks) without(parts []netip.Prefix) (n int) {
	for _, p := range parts {
		if _, ok := b.get(p); !ok {
			n++
		}
	}
	return n
}

// partOf fills in which part of whole a block is.
func partOf(b *store.Block, whole netip.Prefix, part int) {
	if b.Prefix != whole {
		b.PartOf, b.Part = whole, part+1
	}
}

// real returns a block that is more than observed and covers p, the widest.
func (b *blocks) real(p netip.Prefix) (*store.Block, bool) {
	var found *store.Block
	for _, blk := range b.table.Supernets(p) {
		if !blk.Observed {
			found = blk
		}
	}
	return found, found != nil
}

// realAddr is real for one address.
func (b *blocks) realAddr(a netip.Addr) (*store.Block, bool) {
	if blk, ok := b.table.Lookup(a); !ok || !blk.Observed {
		return blk, ok
	}
	return b.real(netip.PrefixFrom(a, a.BitLen()))
}

func (b *blocks) len() int { return b.table.Size() }

// inside returns the blocks of p and of the prefixes inside p.
func (b *blocks) inside(p netip.Prefix) []store.Block {
	var in []store.Block
	for _, blk := range b.table.Subnets(p) {
		in = append(in, *blk)
	}
	return in
}

// all returns every block, sorted by prefix.
func (b *blocks) all() []store.Block {
	in := make([]store.Block, 0, b.table.Size())
	for _, blk := range b.table.AllSorted() {
		in = append(in, *blk)
	}
	return in
}

// expire removes and returns the blocks that have run out at t.
func (b *blocks) expire(t time.Time) []store.Block {
	var out []store.Block
	for _, blk := range b.table.All() {
		if !t.Before(blk.Until) {
			out = append(out, *blk)
		}
	}
	for _, blk := range out {
		b.remove(blk.Prefix)
	}
	return out
}
