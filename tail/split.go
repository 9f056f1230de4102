package tail

import "bytes"

// splitter cuts a stream of bytes at LF and keeps the half line at the end.
// However long a line is, it keeps no more than max bytes of it.
type splitter struct {
	max int
	// half is the beginning of the unfinished line, without the NULs that it
	// began with; halfLen is its full length, NULs and all that was not kept.
	half    []byte
	halfLen int64
	// text is the number of bytes of the unfinished line after those NULs.
	text int64
	// spare takes turns with half, so that a line handed out stays valid
	// while the next half line is gathered.
	spare []byte
}

// split calls line for each line that ends in chunk. size is the full length
// of the line with its LF. text is valid until the next call of split.
func (s *splitter) split(chunk []byte, line func(text []byte, size int64, truncated bool)) {
	for len(chunk) > 0 {
		i := bytes.IndexByte(chunk, '\n')
		if i < 0 {
			s.keep(chunk)
			return
		}
		if s.halfLen == 0 {
			text := trimHole(chunk[:i])
			truncated := len(text) > s.max
			if truncated {
				text = text[:s.max]
			}
			line(text, int64(i)+1, truncated)
		} else {
			s.keep(chunk[:i])
			text, size, truncated := s.take()
			line(text, size+1, truncated)
		}
		chunk = chunk[i+1:]
	}
}

// keep adds to the half line.
func (s *splitter) keep(b []byte) {
	s.halfLen += int64(len(b))
	if s.text == 0 {
		b = trimHole(b)
	}
	s.text += int64(len(b))
	if room := s.max - len(s.half); len(b) > room {
		b = b[:room]
	}
	s.half = append(s.half, b...)
}

// skip adds n NUL bytes to the half line: a hole in the file that there is no
// need to read.
func (s *splitter) skip(n int64) {
	s.halfLen += n
	if s.text == 0 {
		return
	}
	s.text += n
	if room := s.max - len(s.half); room > 0 {
		s.half = append(s.half, make([]byte, min(int64(room), n))...)
	}
}

// take returns the half line and its full length, and begins a new one.
func (s *splitter) take() (text []byte, size int64, truncated bool) {
	text, size, truncated = s.half, s.halfLen, s.text > int64(len(s.half))
	s.half, s.spare = s.spare[:0], text
	s.halfLen, s.text = 0, 0
	return text, size, truncated
}

// trimHole removes the NULs that b begins with.
func trimHole(b []byte) []byte {
	if len(b) == 0 || b[0] != 0 {
		return b
	}
	return bytes.TrimLeft(b, "\x00")
}
