package policy

import (
	"net/netip"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// drawPrefix draws prefixes that are often related: few distinct bits, any
// length, sometimes with host bits set, sometimes IPv4-mapped.
func drawPrefix(t *rapid.T) netip.Prefix {
	high := rapid.SampledFrom([]byte{0, 10, 192, 255}).Draw(t, "high")
	low := rapid.SampledFrom([]byte{0, 1, 128, 255}).Draw(t, "low")
	switch rapid.SampledFrom([]string{"4", "6", "mapped"}).Draw(t, "family") {
	case "4":
		return netip.PrefixFrom(netip.AddrFrom4([4]byte{high, 0, low, low}), rapid.IntRange(0, 32).Draw(t, "bits"))
	case "6":
		a := [16]byte{0: 0x20, 1: high, 7: low, 15: low}
		if high == 0 {
			a[0] = 0 // near ::ffff:0:0/96
			a[10], a[11] = low, low
		}
		return netip.PrefixFrom(netip.AddrFrom16(a), rapid.IntRange(0, 128).Draw(t, "bits"))
	}
	a := netip.AddrFrom4([4]byte{high, 0, low, low})
	return netip.PrefixFrom(netip.AddrFrom16(a.As16()), rapid.IntRange(0, 128).Draw(t, "bits"))
}

// naiveOverlap compares bit by bit.
func naiveOverlap(a, b netip.Prefix) bool {
	bits := func(p netip.Prefix) (bool, []byte, int) {
		addr, n := p.Addr(), p.Bits()
		if addr.Is4In6() && n >= 96 {
			addr, n = addr.Unmap(), n-96
		}
		return addr.Is4(), addr.AsSlice(), n
	}
	four1, x, n1 := bits(a)
	four2, y, n2 := bits(b)
	if four1 != four2 {
		return false
	}
	for i := range min(n1, n2) {
		mask := byte(0x80) >> (i % 8)
		if x[i/8]&mask != y[i/8]&mask {
			return false
		}
	}
	return true
}

func TestAllowlistAgainstModel(t *testing.T) {
	hits := 0
	rapid.Check(t, func(t *rapid.T) {
		var entries []AllowEntry
		for range rapid.IntRange(0, 12).Draw(t, "entries") {
			entries = append(entries, AllowEntry{Prefix: drawPrefix(t), Why: "test"})
		}
		list := NewAllowlist(entries)
		for range 20 {
			probe := drawPrefix(t)
			want := slices.ContainsFunc(entries, func(e AllowEntry) bool { return naiveOverlap(e.Prefix, probe) })
			e, got := list.Overlaps(probe)
			if got != want {
				t.Fatalf("Overlaps(%s) = %v, want %v", probe, got, want)
			}
			if !got {
				continue
			}
			hits++
			if !naiveOverlap(e.Prefix, probe) || !slices.ContainsFunc(entries, func(o AllowEntry) bool { return Canonical(o.Prefix) == e.Prefix }) {
				t.Fatalf("Overlaps(%s) names %s", probe, e.Prefix)
			}
		}
		if list.Len() != len(entries) || len(slices.Collect(list.All())) != len(entries) {
			t.Fatalf("%d entries, want %d", list.Len(), len(entries))
		}
	})
	if hits == 0 {
		t.Error("nothing ever overlapped")
	}
}

func TestAllowlist(t *testing.T) {
	list := NewAllowlist([]AllowEntry{
		{Prefix: netip.MustParsePrefix("2001:db8::/32"), Why: "six"},
		{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Why: "net"},
		{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Why: "one"},
		{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Why: "again"},
		{Prefix: netip.MustParsePrefix("::ffff:198.51.100.9/128"), Why: "mapped"},
		{Prefix: netip.MustParsePrefix("203.0.113.77/24"), Why: "host bits"},
		{Why: "invalid"},
	})
	for _, c := range []struct{ probe, why string }{
		{"192.0.2.7/32", "one"},
		{"192.0.2.8/32", "net"},
		{"192.0.2.0/28", "net"}, // covered, though it contains one
		{"::ffff:192.0.2.8/128", "net"},
		{"198.51.100.9/32", "mapped"},
		{"198.51.100.0/24", "mapped"}, // contains it
		{"203.0.113.1/32", "host bits"},
		{"2001:db8:1::/48", "six"},
		{"2001::/16", "six"},
		{"192.0.3.0/24", ""},
		{"2001:db9::/32", ""},
		{"::c000:207/128", ""}, // IPv4-compatible is not IPv4-mapped
	} {
		e, ok := list.Overlaps(netip.MustParsePrefix(c.probe))
		if e.Why != c.why || ok != (c.why != "") {
			t.Errorf("Overlaps(%s) = %q, %v; want %q", c.probe, e.Why, ok, c.why)
		}
	}
	if e, ok := list.Contains(netip.MustParseAddr("::ffff:192.0.2.7")); !ok || e.Why != "one" {
		t.Errorf("Contains: %v %v", e, ok)
	}
	if _, ok := list.Contains(netip.MustParseAddr("2001:db8::1%eth0")); !ok {
		t.Error("a zone hides an address")
	}
	if _, ok := list.Contains(netip.Addr{}); ok {
		t.Error("the invalid address is contained")
	}
	var order []string
	for e := range list.All() {
		order = append(order, e.Why)
	}
	if want := []string{"net", "one", "again", "mapped", "host bits", "six"}; !slices.Equal(order, want) {
		t.Errorf("All: %q, want %q", order, want)
	}
	var none *Allowlist
	if _, ok := none.Overlaps(netip.MustParsePrefix("0.0.0.0/0")); ok || none.Len() != 0 || len(slices.Collect(none.All())) != 0 {
		t.Error("the nil list is not empty")
	}
	if _, ok := new(Allowlist).Overlaps(netip.MustParsePrefix("::/0")); ok {
		t.Error("the zero list is not empty")
	}
}

func BenchmarkOverlaps(b *testing.B) {
	var entries []AllowEntry
	for i := range 100_000 {
		a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
		entries = append(entries, AllowEntry{Prefix: netip.PrefixFrom(a, 32)})
	}
	list := NewAllowlist(entries)
	wide := netip.MustParsePrefix("0.0.0.0/1")
	b.ResetTimer()
	for b.Loop() {
		list.Overlaps(wide)
	}
}
