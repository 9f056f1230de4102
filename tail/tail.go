// Package tail follows a log file and delivers its lines in order, each
// once, whatever logrotate does to the file.
package tail

// Position says where to resume in a log file. The zero Position means that
// nothing is known about the file yet.
type Position struct {
	// Dev and Inode name the file that Offset belongs to.
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
	// Offset is the number of bytes, from the start of that file, of the
	// lines delivered so far.
	Offset int64 `json:"offset"`
	// Head is a checksum of the first HeadLen bytes of the file, to tell a
	// reused inode from a file that only grew. HeadLen 0: not known.
	Head    uint64 `json:"head,omitempty"`
	HeadLen int    `json:"head_len,omitempty"`
}

// Line is one line of the log.
type Line struct {
	// Text is the line without its LF. It is valid until the function that
	// it was handed to returns. Only LF ends a line: CR, NUL and invalid
	// UTF-8 are ordinary bytes.
	Text []byte
	// Next is where to resume after this line.
	Next Position
	// Truncated says that the line was longer than the limit and that Text
	// is only its beginning.
	Truncated bool
}
