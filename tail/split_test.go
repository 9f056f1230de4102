package tail

import (
	"bytes"
	"testing"
)

// FuzzSplit compares with bytes.Split, whatever the stream and however it
// comes in pieces.
func FuzzSplit(f *testing.F) {
	for _, seed := range []struct {
		stream string
		size   byte
		max    byte
	}{
		{"", 1, 1},
		{"one\ntwo\n", 3, 80},
		{"\n\n\n", 1, 80},
		{"a\r\nb\x00c\xff\u2028d\n", 2, 80},
		{"\x00\x00hole\n\x00\n\x00\x00", 1, 80},
		{"longer than the limit\nshort\n\x00\x00longer than the limit", 4, 5},
	} {
		f.Add([]byte(seed.stream), seed.size, seed.max)
	}
	f.Fuzz(func(t *testing.T, stream []byte, size, most byte) {
		s := splitter{max: int(most) + 1}
		want := bytes.Split(stream, []byte("\n"))
		half := want[len(want)-1]
		i, pos := 0, int64(0)
		check := func(text []byte, size int64, truncated bool, full []byte) {
			t.Helper()
			whole := bytes.TrimLeft(full, "\x00")
			if !bytes.Equal(text, whole[:min(len(whole), s.max)]) || truncated != (len(whole) > s.max) || size != int64(len(full)) {
				t.Fatalf("line %d: %q, %d bytes, truncated %v; of %q with limit %d", i, text, size, truncated, full, s.max)
			}
		}
		for rest := stream; len(rest) > 0; {
			n := min(len(rest), int(size)+1)
			chunk := bytes.Clone(rest[:n])
			rest = rest[n:]
			type line struct {
				text      []byte
				size      int64
				truncated bool
			}
			var lines []line
			s.split(chunk, func(text []byte, size int64, truncated bool) {
				lines = append(lines, line{text, size, truncated})
			})
			// Looked at only now: all of a chunk's lines are valid together.
			for _, l := range lines {
				check(l.text, l.size-1, l.truncated, want[i])
				i++
				pos += l.size
			}
		}
		if i != len(want)-1 || pos+s.halfLen != int64(len(stream)) {
			t.Fatalf("%d lines, %d bytes and %d of half a line; want %d lines of %d bytes", i, pos, s.halfLen, len(want)-1, len(stream))
		}
		text, n, truncated := s.take()
		check(text, n, truncated, half)
	})
}

func TestSuffix(t *testing.T) {
	for _, c := range []struct {
		base, name string
		number     int
		date       string
		ok         bool
	}{
		{"mainlog", "mainlog.1", 1, "", true},
		{"mainlog", "mainlog.01", 1, "", true},
		{"mainlog", "mainlog.12.gz", 12, "", true},
		{"mainlog", "mainlog-20261122", 0, "20261122", true},
		{"mainlog", "mainlog-20261122.xz", 0, "20261122", true},
		{"mainlog", "mainlog.2026-11-22", 0, "20261122", true},
		{"mainlog", "mainlog-20261122-1795376652.zst", 0, "202611221795376652", true},
		{"exim.log", "exim.log.3.bz2", 3, "", true},
		{"exim.log", "exim-20261122.log", 0, "20261122", true},
		{"exim.log", "exim.1.log.gz", 1, "", true},
		{"mainlog", "mainlog-2026112219.backup", 0, "2026112219", true},
		{"mainlog", "mainlog-202611", 0, "202611", true},
		{"mainlog", "mainlog-1795376652.gz", 0, "1795376652", true},
		{"mainlog", "mainlog-20261122.1", 0, "202611221", true},
		{"mainlog", "mainlog-587", 0, "", false}, // the log of a port
		{"mainlog", "mainlog_25", 0, "", false},
		{"mainlog", "mainlog-587.1", 0, "", false}, // of that one
		{"mainlog", "mainlog-10025", 0, "", false},
		{"mainlog", "mainlog-99999999", 0, "", false}, // no date
		{"mainlog", "mainlog-20261322", 0, "", false},
		{"mainlog", "mainlog-20261131", 0, "", false},
		{"mainlog-587", "mainlog-587.1", 1, "", true},
		{"mainlog-587", "mainlog-587-20261122", 0, "20261122", true},
		{"mainlog", "mainlog.backup", 0, "", false},
		{"mainlog", "mainlog", 0, "", false},
		{"mainlog", "mainlog.gz", 0, "", false},
		{"mainlog", "mainlog2", 0, "", false},
		{"mainlog", "mainlog.", 0, "", false},
		{"mainlog", "mainlog.1.bak", 0, "", false},
		{"mainlog", "mainlog.1~", 0, "", false},
		{"mainlog", "rejectlog.1", 0, "", false},
		{"exim.log", "exim.log", 0, "", false},
		{"exim.log", "exim.pid", 0, "", false},
		{".log", "1.log", 0, "", false},
		{"mainlog", "mainlog.99999999999999999999999999999999999", 0, "", false},
	} {
		number, date, ok := suffix(c.base, c.name)
		if number != c.number || date != c.date || ok != c.ok {
			t.Errorf("suffix(%q, %q) = %d, %q, %v; want %d, %q, %v", c.base, c.name, number, date, ok, c.number, c.date, c.ok)
		}
	}
}
