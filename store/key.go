package store

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"time"
)

// keyOf is a block's ID as a key.
func keyOf(id uint64) []byte { return binary.BigEndian.AppendUint64(nil, id) }

// idIn is the ID that a key ends with.
func idIn(key []byte) (uint64, error) {
	if len(key) < 8 {
		return 0, fmt.Errorf("key %x is too short", key)
	}
	return binary.BigEndian.Uint64(key[len(key)-8:]), nil
}

// timeLen is the length of what appendTime appends.
const timeLen = 12

// appendTime appends t so that earlier times sort first; any year will do.
func appendTime(b []byte, t time.Time) []byte {
	b = binary.BigEndian.AppendUint64(b, uint64(t.Unix())^1<<63)
	return binary.BigEndian.AppendUint32(b, uint32(t.Nanosecond()))
}

// timeIn reads what appendTime appended.
func timeIn(b []byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(b)^1<<63), int64(binary.BigEndian.Uint32(b[8:])))
}

// normal is p masked, unmapped and without a zone, or an error.
func normal(p netip.Prefix) (netip.Prefix, error) {
	if !p.IsValid() {
		return p, fmt.Errorf("the prefix %v is not valid", p)
	}
	if a := p.Addr(); a.Is4In6() {
		if p.Bits() < 96 {
			return p, fmt.Errorf("the prefix %v is partly IPv4", p)
		}
		p = netip.PrefixFrom(a.Unmap(), p.Bits()-96)
	}
	return p.Masked(), nil
}

// appendAddr appends the family and the address.
func appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() {
		b = append(b, 4)
	} else {
		b = append(b, 6)
	}
	return append(b, a.AsSlice()...)
}

// prefixKey is family, address and bits: narrower prefixes of one address
// sort after wider ones, and all that lie inside a prefix sort between its
// first address and its last.
func prefixKey(p netip.Prefix) []byte {
	return append(appendAddr(nil, p.Addr()), byte(p.Bits()))
}

// addrIn reads what appendAddr appended, and the rest of the key.
func addrIn(key []byte) (a netip.Addr, rest []byte, err error) {
	switch {
	case len(key) >= 5 && key[0] == 4:
		return netip.AddrFrom4([4]byte(key[1:5])), key[5:], nil
	case len(key) >= 17 && key[0] == 6:
		return netip.AddrFrom16([16]byte(key[1:17])), key[17:], nil
	}
	return a, nil, fmt.Errorf("key %x has no address", key)
}

// behind is the first key behind all those that begin with an address of p,
// as they stand after the family: nil if there is none.
func behind(p netip.Prefix) []byte {
	last := p.Addr().AsSlice()
	for i := range last {
		switch bits := p.Bits() - 8*i; {
		case bits <= 0:
			last[i] = 0xff
		case bits < 8:
			last[i] |= 0xff >> bits
		}
	}
	end, _ := netip.AddrFromSlice(last)
	if next := end.Next(); next.IsValid() {
		return appendAddr(nil, next)
	}
	return []byte{appendAddr(nil, end)[0] + 1}
}
