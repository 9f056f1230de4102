package guard

import (
	"encoding/binary"
	"math"
	"math/bits"
	"net/netip"
)

// distinct counts different addresses in bounded memory: exactly up to
// exactMax, then by HyperLogLog (Flajolet et al. 2007) with 2^14 registers,
// whose standard error is 0.8 %. The zero value is ready, and the same
// addresses always give the same count.
type distinct struct {
	exact map[netip.Addr]struct{}
	many  bool
	reg   [1 << regBits]uint8
}

const (
	regBits  = 14
	exactMax = 10_000
)

func (d *distinct) add(a netip.Addr) {
	b := a.As16()
	h := mix(mix(binary.BigEndian.Uint64(b[:8])) ^ binary.BigEndian.Uint64(b[8:]))
	i := h >> (64 - regBits)
	if n := uint8(bits.LeadingZeros64(h<<regBits|1<<(regBits-1))) + 1; n > d.reg[i] {
		d.reg[i] = n
	}
	if d.many {
		return
	}
	if d.exact == nil {
		d.exact = make(map[netip.Addr]struct{})
	}
	d.exact[a] = struct{}{}
	if len(d.exact) > exactMax {
		d.exact, d.many = nil, true
	}
}

func (d *distinct) count() int {
	if !d.many {
		return len(d.exact)
	}
	const m = 1 << regBits
	sum, zero := 0.0, 0
	for _, r := range d.reg {
		sum += math.Ldexp(1, -int(r))
		if r == 0 {
			zero++
		}
	}
	e := 0.7213 / (1 + 1.079/m) * m * m / sum
	if e <= 2.5*m && zero > 0 {
		e = m * math.Log(float64(m)/float64(zero))
	}
	return int(math.Round(e))
}

// mix is the finalizer of SplitMix64: every bit of x bears on every other.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}
