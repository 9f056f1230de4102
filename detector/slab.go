package detector

// slab hands out numbered Ts, without a pointer for each: the garbage
// collector sees a handful of large blocks. Number 0 is never handed out and
// means none. It grows by blocks up to max and never copies.
type slab[T any] struct {
	blocks [][]T
	free   []uint32
	used   uint32 // numbers handed out at least once
	max    uint32
}

const (
	slabBits = 10
	slabSize = 1 << slabBits
)

func (s *slab[T]) at(i uint32) *T { return &s.blocks[i>>slabBits][i&(slabSize-1)] }

// alloc returns the number of a zeroed T, or 0 if max are in use.
func (s *slab[T]) alloc() uint32 {
	if n := len(s.free); n > 0 {
		i := s.free[n-1]
		s.free = s.free[:n-1]
		var zero T
		*s.at(i) = zero
		return i
	}
	if s.used >= s.max {
		return 0
	}
	s.used++
	if int(s.used>>slabBits) >= len(s.blocks) {
		s.blocks = append(s.blocks, make([]T, slabSize))
	}
	return s.used
}

func (s *slab[T]) release(i uint32) { s.free = append(s.free, i) }

// len is how many are in use.
func (s *slab[T]) len() int { return int(s.used) - len(s.free) }
