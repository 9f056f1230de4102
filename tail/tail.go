// Package tail follows a log and delivers its lines in order, each once,
// whatever logrotate does to its files. A log is a file (Follow), one with the
// date in its name (Follow), all files that match a pattern (FollowPattern),
// the systemd journal (FollowJournal) or a stream (FollowReader).
//
// What a log file suffers, and what Follow makes of it:
//
//   - Renamed, and a new file made (logrotate, exicyclog): the old file is
//     read to its end, then watched for a short grace time because writers
//     still hold it open, then the new one is read. While the new file is
//     empty nobody has changed over yet, and the old one stays the one to read.
//   - Rotated several times while we were slow or not running: the file that
//     Position names is found among the rotated files beside the log, by its
//     inode or, once compressed or copied, by its first bytes; it is read to
//     its end, then each later one in order, then the log.
//   - Deleted and made anew, or a symbolic link switched: like a rename.
//   - Copied and truncated (copytruncate): noticed by the size, and by the
//     first bytes if the file has already grown past our place again. What we
//     had not read yet is read from the copy.
//   - Cut at the end: we go on at the new end; nothing is delivered twice.
//   - A file with a later date in its name appears (Dated): like a rename.
//     The clock is set back, and an older one is written to again: that is
//     the log again, and its new lines are read.
//   - Missing, in a missing directory, or not readable: tried again until it
//     is there.
//
// What can be lost, and no reader can help it: lines that copytruncate itself
// loses (written after the copy, before the truncation, and not yet read);
// lines of a file that was made and deleted again before we opened it; lines
// written to a rotated file after its grace time, by a writer that holds it
// open although others have long changed over, if we are stopped before we
// see them (else they come late); rotated files in another
// directory (logrotate's olddir), if they were rotated there while we did not
// run.
package tail

// Position says where to resume in a log file. The zero Position means that
// nothing is known about the file yet. Positions are comparable.
type Position struct {
	// Dev and Inode name the file that Offset belongs to.
	Dev   uint64 `json:"dev"`
	Inode uint64 `json:"inode"`
	// Offset is the number of bytes, from the start of that file, of the
	// lines delivered so far. In a compressed file the bytes are counted
	// uncompressed.
	Offset int64 `json:"offset"`
	// Head is a checksum (FNV-1a, 64 bit) of the first HeadLen bytes of the
	// file, to tell a reused inode from a file that only grew, and to know
	// the file again once it was compressed. HeadLen 0: not known.
	Head    uint64 `json:"head,omitempty"`
	HeadLen int    `json:"head_len,omitempty"`
	// ModTime is when the file was last written as far as was known when the
	// line was read, in nanoseconds since 1970; 0 if not known. If the file
	// is gone when we resume, rotated files written later are unread ones.
	ModTime int64 `json:"mtime,omitempty"`
	// Cursor is a place in the journal, where that is the log; all else is
	// zero then.
	Cursor string `json:"cursor,omitempty"`
}

// IsZero reports whether nothing is known: where to begin is Options.Start's
// choice.
func (p Position) IsZero() bool { return p == Position{} }

// Line is one line of the log.
type Line struct {
	// Text is the line without its LF. It is valid until the function that
	// it was handed to returns. Only LF ends a line: CR, NUL and invalid
	// UTF-8 are ordinary bytes, except that NULs at the beginning of a line
	// are left out. They are the hole that a crash leaves in a file, or a
	// truncation under a writer that does not append; the line that follows
	// the hole is whole.
	Text []byte
	// Next is where to resume after this line: it never delivers this line
	// again and skips none that follow.
	Next Position
	// Truncated says that the line was longer than the limit and that Text
	// is only its beginning.
	Truncated bool
}

// Batch is what one read of the file gave.
type Batch struct {
	// Lines may be empty in the batch that only tells of CaughtUp.
	Lines []Line
	// Next is where to resume after this batch; zero if that is not known
	// (no file yet, a stream).
	Next Position
	// Late says that the lines may be older than others before them: from a
	// writer that changed over late, or of a stream.
	Late bool
	// CaughtUp says that everything written so far has been delivered, a
	// half line at the very end excepted. False while old files or the rest
	// of this one are still to be read.
	CaughtUp bool
	// Behind is the number of bytes known to be waiting after this batch:
	// the rest of this file and what is in the log itself, if this is a
	// rotated one. Rotated files between the two are not counted.
	Behind int64
	// top is the file that stood under the log's name; zero: none.
	top id
}
