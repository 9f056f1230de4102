package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

var (
	// ErrLocked: another process, or another Store in this one, has the file
	// open. The error says which.
	ErrLocked = errors.New("the store is in use")
	// ErrDamaged: the file is not a store, or not a whole one. It is left as
	// it is: restore a copy, or move it away to begin anew.
	ErrDamaged = errors.New("the store is damaged")
	// ErrNewer: the file was written by a later version of this program.
	ErrNewer = errors.New("the store was written by a newer version of smtpguard")
	// ErrBadValue: single values in the store do not decode. What was
	// returned beside the error is good, and everything that is.
	ErrBadValue = errors.New("unreadable value in the store")
	// ErrUnknown: there is no block of that ID.
	ErrUnknown = errors.New("no such block")
)

// The buckets. Times in keys are 12 bytes, IDs 8, big endian, so that the
// order of the keys is the order of the things.
var (
	bucketMeta      = []byte("meta")      // schema: uint32
	bucketBlocks    = []byte("blocks")    // ID -> Block as JSON
	bucketUnended   = []byte("unended")   // ID -> Until, 1 if observed: blocks not lifted, not yet swept
	bucketEnded     = []byte("ended")     // End, ID -> nothing: all others
	bucketPrefixes  = []byte("prefixes")  // family, address, bits, ID -> nothing
	bucketPositions = []byte("positions") // path of a log -> tail.Position as JSON
	bucketGood      = []byte("good")      // family, address -> Good as JSON
	bucketAllow     = []byte("allow")     // family, address, bits -> AllowEntry as JSON
	bucketRecords   = []byte("records")   // kind -> bucket of key -> value

	keySchema = []byte("schema")
)

// migrations[i] turns schema i into schema i+1. Schema 0 is an empty file.
// Each runs in the transaction that also notes the new version.
var migrations = []func(*bbolt.Tx) error{
	func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{
			bucketBlocks, bucketUnended, bucketEnded, bucketPrefixes,
			bucketPositions, bucketGood, bucketAllow, bucketRecords,
		} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	},
}

// Options of Open. The zero value opens for reading and writing, at once or
// not at all.
type Options struct {
	// ReadOnly never changes the file, not even to migrate it. Several
	// readers may have it open, but none together with a writer.
	ReadOnly bool
	// Wait is how long to wait for the other process that has the file open
	// before giving up with ErrLocked. 0 means not at all.
	Wait time.Duration
}

// Store is an open store. Its methods may be called from several goroutines;
// each is one transaction, done and on the disk when it returns, or not done
// at all if it returns an error (ErrBadValue excepted, see there).
//
// Nothing is ever deleted but by the methods that say so.
type Store struct {
	db       *bbolt.DB
	path     string
	restored Restored
}

// Open opens the store at path. Without ReadOnly it is created if it is
// missing (or has no byte), with what AllowCopy has, readable for its owner only, its directory for
// owner and group.
//
// Errors to tell apart: ErrLocked, ErrDamaged, ErrNewer, and with ReadOnly
// fs.ErrNotExist.
func Open(path string, o Options) (*Store, error) {
	if !o.ReadOnly {
		if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
			return nil, fmt.Errorf("opening the store: %w", err)
		}
	}
	s := &Store{path: path}
	if !o.ReadOnly {
		if err := removeEmpty(path); err != nil {
			return nil, fmt.Errorf("opening the store %s: %w", path, err)
		}
	}
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) && !o.ReadOnly {
		if s.restored, err = create(path); err != nil {
			return nil, fmt.Errorf("creating the store %s: %w", path, err)
		}
	}
	if err := s.open(o); err != nil {
		return nil, fmt.Errorf("opening the store %s: %w", path, err)
	}
	if err := s.migrate(o.ReadOnly); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("opening the store %s: %w", path, err)
	}
	return s, nil
}

// removeEmpty takes a file without a byte away, as a lost disk or a full one
// leaves it: it is no store, and the copy of the allowlist beside it counts.
func removeEmpty(path string) error {
	if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() || fi.Size() > 0 {
		return nil
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil // somebody is at work on it
	}
	mine, err := f.Stat()
	if now, nowErr := os.Lstat(path); err != nil || nowErr != nil || !os.SameFile(mine, now) || now.Size() > 0 {
		return nil // somebody was faster
	}
	return os.Remove(path)
}

// create makes an empty store at path, whole from the first moment: a disk
// that is full, or a crash, leaves no file that is damaged. Somebody else may
// be faster.
func create(path string) (r Restored, err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, filepath.Base(path)+".new-*") // 0600
	if err != nil {
		return r, err
	}
	defer os.Remove(f.Name())
	if err := f.Close(); err != nil {
		return r, err
	}
	s := &Store{path: f.Name()}
	if err := s.open(Options{}); err != nil {
		return r, err
	}
	if err = s.migrate(false); err == nil {
		s.db.NoSync = true // once at the end will do
		r = s.restoreAllow(AllowCopy(path))
		s.db.NoSync = false
		err = s.db.Sync()
	}
	if err := errors.Join(err, s.Close()); err != nil {
		return r, err
	}
	if err := os.Link(f.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return r, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return r, err
	}
	return r, errors.Join(d.Sync(), d.Close())
}

// open is bbolt's Open with its errors, and the ends it comes to on files
// that are not whole, turned into ours.
func (s *Store) open(o Options) (err error) {
	if fi, err := os.Stat(s.path); err == nil {
		if !fi.Mode().IsRegular() {
			return fmt.Errorf("%w: not a regular file", ErrDamaged)
		}
		if fi.Size() == 0 && o.ReadOnly {
			return fmt.Errorf("%w: nothing was ever stored in it", ErrDamaged)
		}
	}
	var f *os.File
	defer func() {
		if err == nil {
			return
		}
		if s.db != nil {
			_ = s.Close()
		} else if f != nil {
			// bbolt panics on some damage and leaves its file open. What it
			// has mapped of it would keep the lock even after a close.
			_ = unix.Flock(int(f.Fd()), unix.LOCK_UN)
			_ = f.Close()
		}
	}()
	defer recovered(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	s.db, err = bbolt.Open(s.path, 0o600, &bbolt.Options{
		ReadOnly:     o.ReadOnly,
		Timeout:      max(o.Wait, 1), // bbolt: 0 is for ever
		FreelistType: bbolt.FreelistMapType,
		OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
			var err error
			f, err = os.OpenFile(name, flag, perm)
			return f, err
		},
	})
	switch {
	case errors.Is(err, bolterrors.ErrTimeout):
		return fmt.Errorf("%w: %s", ErrLocked, holder(s.path))
	case errors.Is(err, bolterrors.ErrInvalid), errors.Is(err, bolterrors.ErrChecksum), errors.Is(err, bolterrors.ErrVersionMismatch):
		return fmt.Errorf("%w: %w", ErrDamaged, err)
	case err != nil:
		if fi, statErr := os.Stat(s.path); statErr == nil && fi.Size() > 0 && fi.Size() < 4*int64(os.Getpagesize()) {
			return fmt.Errorf("%w: %d bytes are too few: %w", ErrDamaged, fi.Size(), err)
		}
		return err
	}
	// A file that lost its end still has its first pages in order; reading
	// the others would be a fault in memory.
	return s.db.View(func(tx *bbolt.Tx) error {
		fi, err := f.Stat()
		if err != nil {
			return err
		}
		if fi.Size() < tx.Size() {
			return fmt.Errorf("%w: it has %d bytes of at least %d", ErrDamaged, fi.Size(), tx.Size())
		}
		return nil
	})
}

// recovered turns a panic of bbolt, or a fault in the mapped file, into
// ErrDamaged. To be deferred.
func recovered(err *error) {
	if r := recover(); r != nil {
		*err = fmt.Errorf("%w: %v", ErrDamaged, r)
	}
}

// migrate brings the file to the present schema.
func (s *Store) migrate(readOnly bool) error {
	var have uint32
	version := func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketMeta)
		if b == nil {
			if k, _ := tx.Cursor().First(); k != nil {
				return fmt.Errorf("%w: it is another program's bbolt file", ErrDamaged)
			}
			return nil
		}
		v := b.Get(keySchema)
		if len(v) != 4 {
			return fmt.Errorf("%w: no schema version", ErrDamaged)
		}
		have = binary.BigEndian.Uint32(v)
		return nil
	}
	if err := s.view(version); err != nil {
		return err
	}
	want := uint32(len(migrations))
	switch {
	case have == want:
		return nil
	case have > want:
		return fmt.Errorf("%w: its schema is %d, this program knows %d", ErrNewer, have, want)
	case readOnly && have == 0:
		return fmt.Errorf("%w: nothing was ever stored in it", ErrDamaged)
	case readOnly:
		return fmt.Errorf("its schema is %d, not %d: open it for writing once", have, want)
	}
	return s.update(func(tx *bbolt.Tx) error {
		for i, m := range migrations[have:] {
			if err := m(tx); err != nil {
				return fmt.Errorf("migrating from schema %d: %w", int(have)+i, err)
			}
		}
		b, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		return b.Put(keySchema, binary.BigEndian.AppendUint32(nil, want))
	})
}

// view runs fn in a transaction that only reads.
func (s *Store) view(fn func(*bbolt.Tx) error) (err error) {
	defer recovered(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	return s.db.View(fn)
}

// update runs fn in a transaction that writes; on an error nothing is done.
func (s *Store) update(fn func(*bbolt.Tx) error) (err error) {
	defer recovered(&err)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	return s.db.Update(fn)
}

// each hands out copies of a bucket's keys and values, in order, until fn
// returns false. It reads some at a time, so that fn runs outside of any
// transaction and may call the store; what fn adds or deletes behind the
// present key is seen. A bucket that is nil has nothing.
func (s *Store) each(bucket func(*bbolt.Tx) *bbolt.Bucket, fn func(k, v []byte) bool) error {
	type pair struct{ k, v []byte }
	var last []byte
	for {
		const most = 500
		var some []pair
		err := s.view(func(tx *bbolt.Tx) error {
			b := bucket(tx)
			if b == nil {
				return nil
			}
			c := b.Cursor()
			k, v := c.Seek(last)
			if last != nil && bytes.Equal(k, last) {
				k, v = c.Next()
			}
			for ; k != nil && len(some) < most; k, v = c.Next() {
				some = append(some, pair{bytes.Clone(k), bytes.Clone(v)})
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, p := range some {
			if !fn(p.k, p.v) {
				return nil
			}
		}
		if len(some) < most {
			return nil
		}
		last = some[most-1].k
	}
}

// Path is the file's path as given to Open.
func (s *Store) Path() string { return s.path }

// Size is the file's size in bytes. It grows, and never shrinks: what was
// pruned is used again.
func (s *Store) Size() (int64, error) {
	var n int64
	err := s.view(func(tx *bbolt.Tx) error { n = tx.Size(); return nil })
	return n, err
}

// WriteTo writes a copy of the store as it is now, which Open opens. Writers
// go on meanwhile, but the file grows with what they change until the copy is
// done.
func (s *Store) WriteTo(w io.Writer) (n int64, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		n, err = tx.WriteTo(w)
		return err
	})
	if err != nil {
		return n, fmt.Errorf("copying the store: %w", err)
	}
	return n, nil
}

// Check reads the whole file and reports what is wrong with its structure,
// as ErrDamaged, or with its values, as ErrBadValue. It takes seconds for a
// gigabyte, and writers go on.
func (s *Store) Check() error {
	err := s.view(func(tx *bbolt.Tx) error {
		var bad faults
		for err := range tx.Check() {
			bad.add(err)
		}
		if err := bad.join(); err != nil {
			return fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.checkValues()
}

// Close waits for the transactions under way and closes the file. Closing a
// second time does nothing.
func (s *Store) Close() (err error) {
	defer recovered(&err)
	return s.db.Close()
}

// faults gathers errors, the first few in full.
type faults struct {
	errs []error
	more int
}

func (f *faults) add(err error) {
	if err == nil {
		return
	}
	if len(f.errs) < 10 {
		f.errs = append(f.errs, err)
	} else {
		f.more++
	}
}

func (f *faults) join() error {
	if f.more > 0 {
		return errors.Join(append(f.errs, fmt.Errorf("and %d more", f.more))...)
	}
	return errors.Join(f.errs...)
}

// bad adds a value that does not decode.
func (f *faults) bad(what string, err error) {
	f.add(fmt.Errorf("%w: %s: %w", ErrBadValue, what, err))
}
