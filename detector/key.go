package detector

import (
	"encoding/binary"
	"net/netip"
)

// key names a source: the first bits of a 128 bit address, the rest 0. IPv4
// addresses are kept as IPv4-mapped ones, so that a /24 is 120 bits here. It
// holds no pointer (netip.Addr does).
type key struct {
	hi, lo uint64
	bits   uint8
}

func keyOf(a netip.Addr) key {
	b := a.As16()
	return key{binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(b[8:]), 128}
}

func (k key) is4() bool { return k.hi == 0 && k.lo>>32 == 0xffff }

// to is the prefix of k with the first n bits.
func (k key) to(n uint8) key {
	switch {
	case n >= 128:
	case n > 64:
		k.lo &= ^uint64(0) << (128 - n)
	case n == 64:
		k.lo = 0
	default:
		k.lo = 0
		k.hi &= ^uint64(0) << (64 - n) // n == 0: shifts everything out
	}
	k.bits = n
	return k
}

// contains says whether o lies in k.
func (k key) contains(o key) bool {
	if o.bits < k.bits {
		return false
	}
	o = o.to(k.bits)
	return o.hi == k.hi && o.lo == k.lo
}

func (k key) addr() netip.Addr {
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.AddrFrom16(b).Unmap()
}

func (k key) prefix() netip.Prefix {
	if k.bits >= 96 && k.is4() {
		return netip.PrefixFrom(k.addr(), int(k.bits)-96)
	}
	var b [16]byte
	binary.BigEndian.PutUint64(b[:8], k.hi)
	binary.BigEndian.PutUint64(b[8:], k.lo)
	return netip.PrefixFrom(netip.AddrFrom16(b), int(k.bits))
}

// keyOfPrefix is the key of p; false if p is not valid. An IPv4-mapped IPv6
// prefix is the IPv4 prefix that it stands for.
func keyOfPrefix(p netip.Prefix) (key, bool) {
	if !p.IsValid() {
		return key{}, false
	}
	n := p.Bits()
	if p.Addr().Is4() {
		n += 96
	}
	return keyOf(p.Addr().WithZone("")).to(uint8(n)), true
}
