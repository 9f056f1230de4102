package tail

import (
	"bytes"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// headMax is how many bytes of the beginning of a file tell it from
	// others: some ten log lines, each with its time.
	headMax = 1024
	// headMin is the fewest that are trusted to do so without the inode: a
	// line's time to the second.
	headMin = 20
	// cutMin is the fewest that show that a file which became shorter was
	// cut at its end, not truncated and written anew: more than two lines'
	// common beginning (a date and the first words).
	cutMin = 64
)

// errShort: a file does not reach as far as the place that was asked for.
var errShort = errors.New("the file is shorter than the position in it")

// errNotRegular: a directory, pipe or device stands where the log should be.
var errNotRegular = errors.New("not a regular file")

// id tells the files of one machine apart while they exist.
type id struct{ dev, ino uint64 }

func idOf(fi os.FileInfo) id {
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return id{}
	}
	return id{uint64(st.Dev), st.Ino}
}

// deleted reports whether an open file has no name any more.
func deleted(f *os.File) bool {
	fi, err := f.Stat()
	if err != nil {
		return true
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Nlink == 0
}

// file is one generation of the log, open.
type file struct {
	name string
	f    *os.File
	id   id
	// plain is the uncompressed stream of a compressed file; nil: f itself.
	plain   io.Reader
	release func()
	// final: nobody writes to it any more, so it needs no grace time.
	final bool
	// head is its beginning, at most headMax bytes, as far as it was read.
	head []byte
	// sum is the checksum of a full head, once it was needed.
	sum uint64
	off int64 // bytes of the lines delivered
	at  int64 // bytes read: off and the half line
	// mtime is when it was last written, as known, in ns since 1970.
	mtime int64
}

// openFile opens a generation of the log and stands at its beginning.
func openFile(name string) (*file, error) {
	// O_NONBLOCK: a pipe put in the log's place must not hang us.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w", name, errNotRegular)
	}
	t := &file{name: name, f: f, id: idOf(fi), release: func() {}, mtime: fi.ModTime().UnixNano()}
	if compressed(name) {
		t.final = true
		t.plain, t.release, err = plain(name, f)
		if err != nil {
			_ = f.Close()
			return nil, fmt.Errorf("uncompressing %s: %w", name, err)
		}
	}
	return t, nil
}

func (t *file) close() {
	t.release()
	_ = t.f.Close()
}

// read reads on. n == 0 without an error is the end for now.
func (t *file) read(b []byte) (n int, err error) {
	if t.plain != nil {
		for n == 0 && err == nil {
			n, err = t.plain.Read(b)
		}
	} else {
		n, err = t.f.ReadAt(b, t.at)
	}
	if err == io.EOF || n > 0 {
		err = nil // an error after some bytes comes again
	}
	return n, err
}

// advance notes that b was read.
func (t *file) advance(b []byte) {
	if t.at == int64(len(t.head)) && len(t.head) < headMax {
		t.head = append(t.head, b[:min(len(b), headMax-len(t.head))]...)
	}
	t.at += int64(len(b))
}

// seek goes to off, from a place not behind it.
func (t *file) seek(off int64) error {
	if t.plain != nil {
		b := make([]byte, 32<<10)
		for t.at < off {
			n, err := t.read(b[:min(int64(len(b)), off-t.at)])
			if err != nil {
				return err
			}
			if n == 0 {
				return errShort
			}
			t.advance(b[:n])
		}
		t.off = off
		return nil
	}
	fi, err := t.f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() < off {
		return errShort
	}
	b := make([]byte, min(off, headMax))
	if n, err := t.f.ReadAt(b, 0); n < len(b) {
		return errors.Join(errShort, err)
	}
	t.head, t.sum, t.off, t.at = b, 0, off, off
	return nil
}

// restart goes back to the beginning of a file that is not compressed.
func (t *file) restart() { t.head, t.sum, t.off, t.at = nil, 0, 0, 0 }

// begin goes back to the beginning of any file.
func (t *file) begin() {
	if t.plain != nil {
		if _, err := t.f.Seek(0, io.SeekStart); err != nil {
			return // what was read of it is lost
		}
		t.release()
		var err error
		if t.plain, t.release, err = plain(t.name, t.f); err != nil {
			t.plain = broken{err}
		}
	}
	t.restart()
}

// broken is a file that cannot be read.
type broken struct{ err error }

func (b broken) Read([]byte) (int, error) { return 0, b.err }

// is reports whether the file begins as the one that p is a place in, and
// reaches that far. It leaves the file at that place.
func (t *file) is(p Position) bool {
	if p.HeadLen < 0 || p.HeadLen > headMax || p.Offset < int64(p.HeadLen) {
		return false
	}
	if t.seek(int64(p.HeadLen)) != nil || checksum(t.head[:p.HeadLen]) != p.Head {
		return false
	}
	return t.seek(p.Offset) == nil
}

// isCut reports whether the file begins as the one that p is a place in,
// although it no longer reaches that far. It leaves the file at its end.
func (t *file) isCut(p Position) bool {
	fi, err := t.f.Stat()
	if err != nil || t.plain != nil || p.HeadLen < cutMin || p.HeadLen > headMax {
		return false
	}
	size := fi.Size()
	if size >= p.Offset || t.seek(int64(p.HeadLen)) != nil || checksum(t.head) != p.Head {
		return false
	}
	return t.seek(size) == nil
}

// place is the Position after the line that ends at off.
func (t *file) place(off int64) Position {
	p := Position{Dev: t.id.dev, Inode: t.id.ino, Offset: off, ModTime: t.mtime}
	p.HeadLen = int(min(off, int64(len(t.head))))
	if p.HeadLen < headMax {
		p.Head = checksum(t.head[:p.HeadLen])
		return p
	}
	if t.sum == 0 {
		t.sum = checksum(t.head)
	}
	p.Head = t.sum
	return p
}

// mark is the Position behind as much of the file's beginning as tells it
// from others, whether that has been read or not.
func (t *file) mark() Position {
	if len(t.head) == 0 && t.plain == nil {
		var b [headMax]byte
		n, _ := t.f.ReadAt(b[:], 0)
		return Position{Offset: int64(n), HeadLen: n, Head: checksum(b[:n])}
	}
	return t.place(int64(len(t.head)))
}

// state is what became of an open file since it was read.
type state struct {
	size  int64
	mtime time.Time
	ctime time.Time
	// same: it still begins as it did, as far as it reaches.
	same bool
}

// look finds out the file's state.
func (t *file) look() (state, error) {
	fi, err := t.f.Stat()
	if err != nil {
		return state{}, err
	}
	s := state{size: fi.Size(), mtime: fi.ModTime(), same: true}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		s.ctime = time.Unix(st.Ctim.Unix())
	}
	if t.plain != nil {
		s.size = t.at
		return s, nil
	}
	t.mtime = s.mtime.UnixNano()
	if len(t.head) > 0 {
		var b [headMax]byte
		n, err := t.f.ReadAt(b[:len(t.head)], 0)
		if err != nil && err != io.EOF {
			return s, err
		}
		s.same = bytes.Equal(b[:n], t.head[:n]) && (n == len(t.head) || n >= cutMin)
	}
	return s, nil
}

// hole returns how many bytes from the present place on are a hole in a
// sparse file, as a writer without O_APPEND makes of a truncation; 0 if that
// cannot be told.
func (t *file) hole(size int64) int64 {
	if t.plain != nil {
		return 0
	}
	data, err := unix.Seek(int(t.f.Fd()), t.at, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO: // nothing but a hole up to the end
		return max(0, size-t.at)
	case err != nil:
		return 0
	}
	return max(0, min(data, size)-t.at)
}

// checksum is the FNV-1a of b, 0 for nothing.
func checksum(b []byte) uint64 {
	if len(b) == 0 {
		return 0
	}
	h := fnv.New64a()
	_, _ = h.Write(b)
	return h.Sum64()
}

// changed is when a file's contents or its inode last changed, in ns since
// 1970; 0 if not known.
func changed(fi os.FileInfo) int64 {
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		return time.Unix(st.Ctim.Unix()).UnixNano()
	}
	return 0
}
