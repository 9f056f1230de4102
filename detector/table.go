package detector

import (
	"math/bits"
	"math/rand/v2"
)

// table finds numbers by key. It is open-addressed with linear probing, and
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

// get is the number of k, 0 if it has none. at gives the key of a number.
func (t *table) get(k key, at func(uint32) *key) uint32 {
	h := t.hash(k)
	mask := uint32(len(t.slots) - 1)
	for i := h & mask; ; i = (i + 1) & mask {
		s := t.slots[i]
		if s == 0 {
			return 0
		}
		if uint32(s>>32) == h && *at(uint32(s)) == k {
			return uint32(s)
		}
	}
}

// put gives k, which has none, the number n, which is not 0.
func (t *table) put(k key, n uint32) {
	if t.n++; t.n > len(t.slots)/4*3 {
		old := t.slots
		t.slots = make([]uint64, 2*len(old))
		for _, s := range old {
			if s != 0 {
				t.place(s)
			}
		}
	}
	t.place(uint64(t.hash(k))<<32 | uint64(n))
}

func (t *table) place(s uint64) {
	mask := uint32(len(t.slots) - 1)
	i := uint32(s>>32) & mask
	for t.slots[i] != 0 {
		i = (i + 1) & mask
	}
	t.slots[i] = s
}

// delete takes the number n from k, which has it.
func (t *table) delete(k key, n uint32) {
	h := t.hash(k)
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
