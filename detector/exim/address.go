package exim

import (
	"bytes"
	"net/netip"
)

// maxAddr is the length of the longest IPv6 address in text
// (INET6_ADDRSTRLEN less its NUL).
const maxAddr = 45

// parseAddr reads an address as inet_ntop writes it, which is how Exim shows
// it: lower case, no zone. netip.ParseAddr takes a string and allocates its
// errors; here most calls may fail.
func parseAddr(b []byte) (netip.Addr, bool) {
	if len(b) < 2 || len(b) > maxAddr {
		return netip.Addr{}, false
	}
	if bytes.IndexByte(b[:min(5, len(b))], ':') < 0 {
		ip, ok := parse4(b)
		return netip.AddrFrom4(ip), ok
	}
	ip, ok := parse6(b)
	if !ok {
		return netip.Addr{}, false
	}
	return netip.AddrFrom16(ip).Unmap(), true
}

func parse4(b []byte) (ip [4]byte, ok bool) {
	field, digits, v := 0, 0, 0
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9':
			if digits > 0 && v == 0 { // leading zero
				return ip, false
			}
			v = v*10 + int(c-'0')
			digits++
			if v > 255 {
				return ip, false
			}
		case c == '.':
			if digits == 0 || field == 3 {
				return ip, false
			}
			ip[field] = byte(v)
			field, digits, v = field+1, 0, 0
		default:
			return ip, false
		}
	}
	if digits == 0 || field != 3 {
		return ip, false
	}
	ip[3] = byte(v)
	return ip, true
}

func parse6(b []byte) (ip [16]byte, ok bool) {
	gap := -1 // where "::" stands for zeros
	i := 0
	if len(b) >= 2 && b[0] == ':' && b[1] == ':' {
		gap = 0
		b = b[2:]
	}
	for len(b) > 0 && i < 16 {
		n, v := 0, 0
		for n < len(b) && n < 5 {
			d := hexDigit(b[n])
			if d < 0 {
				break
			}
			v = v<<4 | d
			n++
		}
		if n == 0 || n > 4 {
			return ip, false
		}
		if n < len(b) && b[n] == '.' {
			v4, ok := parse4(b)
			if !ok || i > 12 {
				return ip, false
			}
			copy(ip[i:], v4[:])
			i += 4
			b = nil
			break
		}
		ip[i], ip[i+1] = byte(v>>8), byte(v)
		i += 2
		b = b[n:]
		if len(b) == 0 {
			break
		}
		if b[0] != ':' || len(b) == 1 {
			return ip, false
		}
		b = b[1:]
		if b[0] == ':' {
			if gap >= 0 {
				return ip, false
			}
			gap = i
			b = b[1:]
		}
	}
	if len(b) != 0 {
		return ip, false
	}
	if gap < 0 {
		return ip, i == 16
	}
	if i > 14 { // "::" stands for at least one group
		return ip, false
	}
	n := copy(ip[16-(i-gap):], ip[gap:i])
	clear(ip[gap : 16-n])
	return ip, true
}

func hexDigit(c byte) int {
	switch {
	case '0' <= c && c <= '9':
		return int(c - '0')
	case 'a' <= c && c <= 'f':
		return int(c-'a') + 10
	}
	return -1
}

// number reads the decimal digits that b begins with, at most max of them,
// without a leading zero. n is how many; 0: none, or too many.
func number(b []byte, max int) (v, n int) {
	for n < len(b) && '0' <= b[n] && b[n] <= '9' {
		if n == max || n > 0 && v == 0 {
			return 0, 0
		}
		v = v*10 + int(b[n]-'0')
		n++
	}
	return v, n
}

// bracket reads "[IP]" or "[IP]:PORT" at the beginning of b; n is its length,
// 0 if there is none.
func bracket(b []byte) (addr netip.Addr, port uint16, n int) {
	if len(b) < 4 || b[0] != '[' {
		return addr, 0, 0
	}
	end := bytes.IndexByte(b[:min(len(b), maxAddr+2)], ']')
	if end < 0 {
		return addr, 0, 0
	}
	addr, ok := parseAddr(b[1:end])
	if !ok {
		return addr, 0, 0
	}
	n = end + 1
	if n == len(b) || b[n] != ':' {
		return addr, 0, n
	}
	v, d := number(b[n+1:], 5)
	if d == 0 || v == 0 || v > 65535 {
		// "[IP]: text" is an address without a port.
		return addr, 0, n
	}
	return addr, uint16(v), n + 1 + d
}

// lastBracket reads "[IP]" or "[IP]:PORT" at the end of b; start is where it
// begins, -1 if there is none.
func lastBracket(b []byte) (addr netip.Addr, port uint16, start int) {
	end := len(b)
	for end > 0 && len(b)-end < 5 && '0' <= b[end-1] && b[end-1] <= '9' {
		end--
	}
	if end < len(b) {
		v, n := number(b[end:], 5)
		if n != len(b)-end || v == 0 || v > 65535 || end == 0 || b[end-1] != ':' {
			return addr, 0, -1
		}
		port = uint16(v)
		end--
	}
	if end < 4 || b[end-1] != ']' {
		return addr, 0, -1
	}
	low := max(0, end-maxAddr-2)
	start = bytes.LastIndexByte(b[low:end], '[')
	if start < 0 {
		return addr, 0, -1
	}
	start += low
	addr, ok := parseAddr(b[start+1 : end-1])
	if !ok {
		return addr, 0, -1
	}
	return addr, port, start
}

// peer is who is at the other end of a connection, and on which of our
// addresses (+incoming_interface).
type peer struct {
	addr  netip.Addr
	port  uint16
	local netip.AddrPort
}

// peerAtEnd reads the host text that b ends with: "[IP]:PORT", and perhaps
// " I=[IP]:PORT" after it. Whatever stands before it is not looked at: with
// smtp_get_connection_info and host_and_ident of Exim, a HELO name or a host
// name is always before the address.
func peerAtEnd(b []byte) (p peer, ok bool) {
	addr, port, at := lastBracket(b)
	if at < 0 {
		return p, false
	}
	if at >= 3 && string(b[at-3:at]) == " I=" {
		p.local = netip.AddrPortFrom(addr, port)
		b = b[:at-3]
		if addr, port, at = lastBracket(b); at < 0 {
			return p, false
		}
	}
	switch {
	case at == 0 || b[at-1] == ' ':
	case at >= 2 && string(b[at-2:at]) == "H=" && (at == 2 || b[at-3] == ' '):
	default:
		return p, false
	}
	p.addr, p.port = addr, port
	return p, true
}

// host reads the host text that b begins with, in the form that it has when
// the HELO name is one that Exim accepts by default: "NAME (HELO) [IP]:PORT
// I=[IP]:PORT", all but [IP] optional. A HELO name with a space in it
// (helo_accept_junk_hosts) could feign the rest, so it is not taken. n is the
// length of the text, 0 if it has another form.
func host(b []byte) (p peer, helo bool, n int) {
	if len(b) > 0 && b[0] != '[' && b[0] != '(' { // NAME
		l := plain(b)
		if l == 0 || l+1 >= len(b) || b[l] != ' ' {
			return p, false, 0
		}
		n = l + 1
	}
	if n < len(b) && b[n] == '(' { // HELO
		helo = true
		n++
		for n < len(b) && b[n] > ' ' && b[n] != '(' && b[n] != ')' && b[n] != '"' {
			n++
		}
		if n+1 >= len(b) || b[n] != ')' || b[n+1] != ' ' {
			return p, false, 0
		}
		n += 2
	}
	addr, port, l := bracket(b[n:])
	if l == 0 {
		return p, false, 0
	}
	p.addr, p.port = addr, port
	n += l
	if rest, ok := bytes.CutPrefix(b[n:], sepInterface); ok {
		addr, port, l := bracket(rest)
		if l == 0 {
			return p, false, 0
		}
		p.local = netip.AddrPortFrom(addr, port)
		n += 3 + l
	}
	return p, helo, n
}

// plain returns the length of the host name that b begins with: anything up
// to a space but brackets, quotes and control characters.
func plain(b []byte) int {
	for i, c := range b {
		if c <= ' ' || c == '(' || c == ')' || c == '[' || c == ']' || c == '"' || c == '=' || c == 0x7f {
			return i
		}
	}
	return len(b)
}

// candidates gathers the places in a line where the peer's address may
// stand. One is always the right one; more than one that differ are a
// stranger's work, and then none is believed.
type candidates struct {
	p peer
	n int // 0 none, 1 one, 2 more
}

// at considers the host text that b ends with.
func (c *candidates) at(b []byte) {
	p, ok := peerAtEnd(b)
	switch {
	case !ok:
	case c.n == 0:
		c.p, c.n = p, 1
	case p.addr != c.p.addr || p.port != c.p.port:
		c.n = 2
	}
}

// atEach considers each host text in b that sep follows, and returns the
// index of the last sep, -1 if b has none.
func (c *candidates) atEach(b, sep []byte) int {
	last, from := -1, 0
	for c.n < 2 {
		i := bytes.Index(b[from:], sep)
		if i < 0 {
			break
		}
		last = from + i
		c.at(b[:last])
		from = last + 1
	}
	return last
}

// hostAndIdent finds the peer in b, which ends with Exim's host_and_ident
// text: the host text, and then " U=" with whatever the peer's ident service
// said (rfc1413_query_timeout, off by default).
func hostAndIdent(b []byte) (peer, bool) {
	var c candidates
	c.at(b)
	c.atEach(b, sepIdent)
	return c.p, c.n == 1
}

// hostAndIdentBefore finds the peer in b where the host_and_ident text is
// followed by sep and then by text that may be a stranger's.
func hostAndIdentBefore(b, sep []byte) (peer, bool) {
	var c candidates
	if last := c.atEach(b, sep); last >= 0 {
		c.atEach(b[:last], sepIdent)
	}
	return c.p, c.n == 1
}
