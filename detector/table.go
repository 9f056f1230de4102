package detector

import (
	"math/bits"
	"math/rand/v2"
)

// table finds numbers by the hash of what they stand for. It is open-addressed with linear probing, and
// holds 32 bits of the hash beside each number, so that a lookup costs one
// cache line here and one at the thing itself; a Go map with 24 byte keys
// took twice the time. The hash is seeded: nobody outside can choose
// addresses that collide. The seed has no influence on any result.
type table struct {
	slots []uint64 // hash<<32 | number; 0: free
	n     int
	seed  [3]uint64
}

func newTable() table {
	return table{slots: make([]uint64, 64), seed: [3]uint64{rand.Uint64(), rand.Uint64(), rand.Uint64() | 1}}
}

func (t *table) hash(k key) uint32 {
	hi, lo := bits.Mul64(k.hi^t.seed[0], k.lo^t.seed[1])
	hi, lo = bits.Mul64(hi^lo^uint64(k.bits), t.seed[2])
	return uint32((hi ^ lo) >> 16)
}

// hashPort is the hash of a port of address k.
func (t *table) hashPort(k key, port uint16) uint32 {
	k.hi ^= uint64(port) << 48 // of real addresses few differ there
	return t.hash(k)
}

// next is the next number with hash h, from place at on, and its place; 0 if
// there is none. The first place to look at is h, and after it the one that
// follows. Whether the number stands for what was looked for is for the
// caller to see.
func (t *table) next(h, at uint32) (n, place uint32) {
	mask := uint32(len(t.slots) - 1)
	for i := at & mask; ; i = (i + 1) & mask {
		s := t.slots[i]
		if s == 0 || uint32(s>>32) == h {
			return uint32(s), i
		}
	}
}

// put adds the number n, which is not 0, with hash h.
func (t *table) put(h, n uint32) {
	if t.n++; t.n > len(t.slots)/4*3 {
		old := t.slots
		t.slots = make([]uint64, 2*len(old))
		for _, s := range old {
			if s != 0 {
				t.place(s)
			}
		}
	}
	t.place(uint64(h)<<32 | uint64(n))
}

func (t *table) place(s uint64) {
	mask := uint32(len(t.slots) - 1)
	i := uint32(s>>32) & mask
	for t.slots[i] != 0 {
		i = (i + 1) & mask
	}
	t.slots[i] = s
}

// delete takes out the number n, which has hash h.
func (t *table) delete(h, n uint32) {
	mask := uint32(len(t.slots) - 1)
	i := h & mask
	for want := uint64(h)<<32 | uint64(n); t.slots[i] != want; i = (i + 1) & mask {
		if t.slots[i] == 0 {
			return
		}
	}
	t.n--
	// Close the gap with later ones that may stand there.
	for j := (i + 1) & mask; t.slots[j] != 0; j = (j + 1) & mask {
		home := uint32(t.slots[j]>>32) & mask
		if (j-home)&mask >= (j-i)&mask {
			t.slots[i] = t.slots[j]
			i = j
		}
	}
	t.slots[i] = 0
}

// bytes is what the table takes.
func (t *table) bytes() int64 { return int64(len(t.slots)) * 8 }
