package allow

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func prefixes(s ...string) (a Answer) {
	for _, p := range s {
		a.Prefixes = append(a.Prefixes, netip.MustParsePrefix(p))
	}
	return a
}

func (k *Kept) text(start time.Time) string {
	var s []string
	for _, e := range k.Prefixes {
		t := e.Prefix.String()
		if !e.Left.IsZero() {
			t += fmt.Sprintf(" left at %v", e.Left.Sub(start))
		}
		s = append(s, t)
	}
	return strings.Join(s, ", ")
}

func TestMerge(t *testing.T) {
	start := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	const a, b, c = "192.0.2.1/32", "192.0.2.2/32", "2001:db8::1/128"
	var k Kept
	for _, step := range []struct {
		at      time.Duration
		answer  Answer
		err     error
		changed bool
		want    string
	}{
		{0, Answer{}, ErrNothing, false, ""},
		{time.Minute, prefixes(a, b), nil, true, a + ", " + b},
		{2 * time.Minute, prefixes(a, b), nil, false, a + ", " + b},
		// The DNS fails for a month.
		{720 * time.Hour, Answer{}, errors.New("no answer"), false, a + ", " + b},
		{721 * time.Hour, Answer{}, ErrNothing, false, a + ", " + b},
		// A part of the answer adds, and takes nothing away.
		{722 * time.Hour, prefixes(c), errors.New("in part"), true, a + ", " + b + ", " + c},
		// A whole one has b no more: it stays for seven days.
		{723 * time.Hour, prefixes(a, c), nil, false, a + ", " + b + " left at 723h0m0s, " + c},
		{890 * time.Hour, prefixes(a, c), nil, false, a + ", " + b + " left at 723h0m0s, " + c},
		{891 * time.Hour, Answer{}, ErrNothing, false, a + ", " + b + " left at 723h0m0s, " + c},
		{891 * time.Hour, prefixes(a, c), nil, true, a + ", " + c},
		{892 * time.Hour, prefixes(c), nil, false, a + " left at 892h0m0s, " + c},
		{893 * time.Hour, prefixes(a, c), nil, false, a + ", " + c},
	} {
		changed := k.Merge(step.answer, step.err, start.Add(step.at))
		if got := k.text(start); got != step.want || changed != step.changed {
			t.Fatalf("at %v: %s (changed %v), want %s (%v)", step.at, got, changed, step.want, step.changed)
		}
	}
	if want := start.Add(893 * time.Hour); !k.Answered.Equal(want) {
		t.Errorf("answered at %v, want %v", k.Answered, want)
	}
}

// A zone that says something else at every look, in whole or in part, does
// not allow more than two answers may have, and the newest is in it.
func TestKeptIsBounded(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	var k Kept
	now := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	for i := range 300 {
		now = now.Add(10 * time.Minute)
		var a Answer
		if i%3 == 0 {
			for j := range MaxPrefixes {
				a.Prefixes = append(a.Prefixes, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, byte(i), byte(j >> 8), byte(j)}), 32))
			}
		} else {
			a = prefixes(fmt.Sprintf("%d.0.0.0/8", 1+r.IntN(200)), fmt.Sprintf("%x::/16", 0x2000+r.IntN(1000)))
		}
		var err error
		if r.IntN(2) == 0 {
			err = errors.New("in part")
		}
		k.Merge(a, err, now)
		var sum4, sum6 uint64
		for _, e := range k.Prefixes {
			four, six := weight(e.Prefix)
			sum4, sum6 = sum4+four, sum6+six
		}
		if len(k.Prefixes) > 2*MaxPrefixes || sum4 > 2*most4 || sum6 > 2*most6 {
			t.Fatalf("step %d: %d prefixes, %d addresses, %d networks", i, len(k.Prefixes), sum4, sum6)
		}
		for _, p := range a.Prefixes {
			if !slices.ContainsFunc(k.Prefixes, func(e KeptPrefix) bool { return e.Prefix == p }) {
				t.Fatalf("step %d: %s of the newest answer is gone", i, p)
			}
		}
	}
}
