package exim

import (
	"encoding/binary"
	"hash/maphash"
)

// twice knows the few last lines that may be told once more. By way of syslog
// Exim writes what goes to both main log and reject log two times over
// (syslog_duplication), one right after the other. And a "drop" in the
// connect ACL gives a "rejected connection" line and then "closed by DROP".
type twice struct {
	seed maphash.Seed
	keys [8]uint64 // 0: none
	next int
}

func (t *twice) clear() { t.keys, t.next = [8]uint64{}, 0 }

// first reports whether key is new, and remembers it; seen for the second
// time it is forgotten, as nothing is told three times.
func (t *twice) first(key uint64) bool {
	if t.take(key) {
		return false
	}
	t.put(key)
	return true
}

func (t *twice) put(key uint64) {
	t.keys[t.next] = key
	t.next = (t.next + 1) % len(t.keys)
}

// take reports whether key is known, and forgets it.
func (t *twice) take(key uint64) bool {
	for i, k := range t.keys {
		if k == key {
			t.keys[i] = 0
			return true
		}
	}
	return false
}

// text is the key of a line's text; random seed, so that nobody can write a
// line that has the key of another.
func (t *twice) text(b []byte) uint64 { return maphash.Bytes(t.seed, b) | 1 }

// dropped is the key of the "closed by DROP" line that may follow for p in
// second sec.
func (t *twice) dropped(p peer, sec int64) uint64 {
	var b [26]byte
	a := p.addr.As16()
	copy(b[:], a[:])
	binary.BigEndian.PutUint16(b[16:], p.port)
	binary.BigEndian.PutUint64(b[18:], uint64(sec))
	return maphash.Bytes(t.seed, b[:]) &^ 1
}
