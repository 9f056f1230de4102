package allow

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Grace is how long a prefix stays allowed after it left the answers: a
// server that moves sends from its old address for a while, and a zone that
// lost a record by mistake gets it back.
const Grace = 7 * 24 * time.Hour

// Kept is what a name has stood for, as far as it still counts. The zero Kept
// is of a name that was never looked up.
type Kept struct {
	// Answered is when the last whole answer came; zero: never.
	Answered time.Time `json:"answered,omitzero"`
	// Prefixes are sorted and distinct.
	Prefixes []KeptPrefix `json:"prefixes"`
}

// KeptPrefix is one prefix of a Kept.
type KeptPrefix struct {
	Prefix netip.Prefix `json:"prefix"`
	// Seen is when an answer had it last.
	Seen time.Time `json:"seen"`
	// Left is when a whole answer had it no more, zero if the last one did.
	Left time.Time `json:"left,omitzero"`
}

// Merge takes the outcome of Resolve at a time, and reports whether the
// prefixes are others now.
//
// Only a whole answer with addresses can make a prefix leave, and it goes
// Grace later. A failure, in part or in whole, and a name that is gone, change
// nothing of what is known, however old that is.
func (k *Kept) Merge(a Answer, err error, now time.Time) (changed bool) {
	for _, p := range a.Prefixes {
		i, ok := slices.BinarySearchFunc(k.Prefixes, p, func(e KeptPrefix, p netip.Prefix) int { return e.Prefix.Compare(p) })
		if !ok {
			k.Prefixes, changed = slices.Insert(k.Prefixes, i, KeptPrefix{Prefix: p}), true
		}
		k.Prefixes[i].Seen, k.Prefixes[i].Left = now, time.Time{}
	}
	if err == nil {
		k.Answered = now
		for i := range k.Prefixes {
			if e := &k.Prefixes[i]; e.Left.IsZero() && e.Seen.Before(now) {
				e.Left = now
			}
		}
	}
	n := len(k.Prefixes)
	if err == nil {
		k.Prefixes = slices.DeleteFunc(k.Prefixes, func(e KeptPrefix) bool { return !e.Left.IsZero() && now.Sub(e.Left) >= Grace })
	}
	k.bound()
	return changed || len(k.Prefixes) != n
}

// bound holds all that is kept to twice what one answer may have: a zone that
// says something else every hour would otherwise allow everybody in the end.
// What left first goes first, then what was seen least lately.
func (k *Kept) bound() {
	var sum4, sum6 uint64
	for _, e := range k.Prefixes {
		four, six := weight(e.Prefix)
		sum4, sum6 = sum4+four, sum6+six
	}
	if len(k.Prefixes) <= 2*MaxPrefixes && sum4 <= 2*most4 && sum6 <= 2*most6 {
		return
	}
	order := slices.Clone(k.Prefixes)
	slices.SortStableFunc(order, func(a, b KeptPrefix) int {
		switch {
		case a.Left.IsZero() && b.Left.IsZero():
			return a.Seen.Compare(b.Seen)
		case a.Left.IsZero() != b.Left.IsZero():
			return map[bool]int{true: 1, false: -1}[a.Left.IsZero()]
		}
		return cmp.Or(a.Left.Compare(b.Left), a.Seen.Compare(b.Seen))
	})
	n := len(order)
	for _, e := range order {
		four, six := weight(e.Prefix)
		if n <= 2*MaxPrefixes && (sum4 <= 2*most4 || four == 0) && (sum6 <= 2*most6 || six == 0) {
			continue
		}
		n, sum4, sum6 = n-1, sum4-four, sum6-six
		k.Prefixes = slices.DeleteFunc(k.Prefixes, func(o KeptPrefix) bool { return o.Prefix == e.Prefix })
	}
}

// weight is what a prefix counts towards most4 or most6.
func weight(p netip.Prefix) (four, six uint64) {
	switch {
	case p.Addr().Is4():
		return 1 << (32 - p.Bits()), 0
	case p.Bits() < 64:
		return 0, 1 << (64 - p.Bits())
	}
	return 0, 1
}
