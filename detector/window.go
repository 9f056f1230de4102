package detector

import "time"

// A sliding window of length W is kept as a ring of sub-windows of length
// W/10, on a grid of multiples of W/10 since 1970. The window that ends at t,
// in sub-window k = floor(t/(W/10)), is the sum of
//
//	sub-window k, as far as it has gone,
//	sub-windows k-1 to k-9 in full,
//	sub-window k-10, times the share of it that t-W..t still covers,
//
// so that exactly W is covered, and what lies in the oldest sub-window is
// taken as spread evenly over it. That is the whole approximation: a source
// that holds steadily is measured exactly, and no other is off by more than
// what it held in one tenth of the window.
const (
	subWindows = 10
	ringLen    = subWindows + 1
)

// window is the grid of one window length, the same for all sources.
type window struct {
	length int64 // W in nanoseconds
	sub    int64 // W/10
	k      int64 // the sub-window of now
	end    int64 // where it ends
	// bounds[j%16] is the integral of the pressure over all time, at the
	// start of sub-window j, for j from k-11 to k.
	bounds [16]float64
}

// newWindow is a window whose now is t.
func newWindow(length time.Duration, t int64) window {
	w := window{length: int64(length), sub: int64(length) / subWindows}
	w.k = t / w.sub
	w.end = (w.k + 1) * w.sub
	return w
}

// to moves w's now from a to b, while the integral of the pressure goes from
// pa on at rate p per second. It costs the same however far b is.
func (w *window) to(a, b int64, pa, p float64) {
	if b < w.end {
		return
	}
	kb := b / w.sub
	for j := max(w.k+1, kb-ringLen); j <= kb; j++ {
		w.bounds[j&15] = pa + p*seconds(j*w.sub-a)
	}
	w.k, w.end = kb, (kb+1)*w.sub
}

// frac is how far t, which lies in sub-window k, has gone in it.
func (w *window) frac(t int64) float64 {
	return float64(t-w.k*w.sub) / float64(w.sub)
}

// sum is the content of ring in the window that ends at t (w's now). last is
// the sub-window in which ring was last written to.
func sum[T float64 | uint32](w *window, ring []T, last, t int64) float64 {
	var s float64
	for j := w.k - subWindows; j <= last; j++ {
		v := float64(ring[j%ringLen])
		if j == w.k-subWindows {
			v *= 1 - w.frac(t)
		}
		s += v
	}
	return s
}

// turn empties the sub-windows of ring after last, up to w's now.
func turn[T float64 | uint32](w *window, ring []T, last int64) {
	if w.k-last >= ringLen {
		clear(ring)
		return
	}
	for j := last + 1; j <= w.k; j++ {
		ring[j%ringLen] = 0
	}
}

// rings hands out numbered records of equal length, for the rings of one
// source; like slab, without a pointer for each.
type rings[T float64 | uint32] struct {
	blocks [][]T
	owner  []uint32 // number of the record -> node; 0: free
	free   []uint32
	stride int
	max    int
	hand   uint32
}

const ringsPerBlock = 256

func (r *rings[T]) at(i uint32) []T {
	o := int(i%ringsPerBlock) * r.stride
	return r.blocks[i/ringsPerBlock][o : o+r.stride : o+r.stride]
}

// alloc returns the number of an empty record for a node, or 0 if max are in use.
func (r *rings[T]) alloc(node uint32) uint32 {
	if n := len(r.free); n > 0 {
		i := r.free[n-1]
		r.free = r.free[:n-1]
		clear(r.at(i))
		r.owner[i] = node
		return i
	}
	if len(r.owner) == 0 {
		r.owner = append(r.owner, 0) // number 0 means none
	}
	if len(r.owner) > r.max {
		return 0
	}
	i := uint32(len(r.owner))
	r.owner = append(r.owner, node)
	if int(i/ringsPerBlock) >= len(r.blocks) {
		r.blocks = append(r.blocks, make([]T, ringsPerBlock*r.stride))
	}
	return i
}

func (r *rings[T]) release(i uint32) {
	r.owner[i] = 0
	r.free = append(r.free, i)
}

// seconds converts from nanoseconds.
func seconds(ns int64) float64 { return float64(ns) / 1e9 }
