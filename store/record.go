package store

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"

	"go.etcd.io/bbolt"

	"github.com/smtpguard/smtpguard/tail"
)

// Position returns where to resume in the log at path; false if nothing is
// known of it.
func (s *Store) Position(path string) (p tail.Position, ok bool, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		v := tx.Bucket(bucketPositions).Get([]byte(path))
		if v == nil {
			return nil
		}
		if err := json.Unmarshal(v, &p); err != nil {
			p = tail.Position{}
			return fmt.Errorf("%w: position in %q: %w", ErrBadValue, path, err)
		}
		ok = true
		return nil
	})
	return p, ok, err
}

// SavePositions writes positions by the names of their logs, all or none. The
// zero Position forgets a log. Those of other logs stay.
func (s *Store) SavePositions(positions map[string]tail.Position) error {
	if len(positions) == 0 {
		return nil
	}
	err := s.update(func(tx *bbolt.Tx) error {
		for _, path := range slices.Sorted(maps.Keys(positions)) {
			if positions[path].IsZero() {
				if err := tx.Bucket(bucketPositions).Delete([]byte(path)); err != nil {
					return fmt.Errorf("%q: %w", path, err)
				}
				continue
			}
			v, err := json.Marshal(positions[path])
			if err != nil {
				return err
			}
			if err := tx.Bucket(bucketPositions).Put([]byte(path), v); err != nil {
				return fmt.Errorf("%q: %w", path, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("saving the positions in the logs: %w", err)
	}
	return nil
}

// The kind of record that Meta keeps.
const kindMeta = "meta"

// SetMeta keeps a small fact of the daemon under a key.
func (s *Store) SetMeta(key string, value []byte) error { return s.SetRecord(kindMeta, key, value) }

// Meta returns what SetMeta kept; nil if there is nothing.
func (s *Store) Meta(key string) ([]byte, error) { return s.Record(kindMeta, key) }

// Records are values that the store keeps without knowing them: a kind ("case",
// "report") has keys, and a key a value, by convention JSON.

// errEmpty: bbolt has no empty names.
var errEmpty = errors.New("a record needs a kind and a key")

// SetRecord writes a record in place of the one of that kind and key.
func (s *Store) SetRecord(kind, key string, value []byte) error {
	err := s.update(func(tx *bbolt.Tx) error {
		if kind == "" || key == "" {
			return errEmpty
		}
		b, err := tx.Bucket(bucketRecords).CreateBucketIfNotExists([]byte(kind))
		if err != nil {
			return err
		}
		return b.Put([]byte(key), value)
	})
	if err != nil {
		return fmt.Errorf("storing %s %q: %w", kind, key, err)
	}
	return nil
}

// Record returns a record's value; nil without an error if there is none.
func (s *Store) Record(kind, key string) (value []byte, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		if b := tx.Bucket(bucketRecords).Bucket([]byte(kind)); b != nil && key != "" {
			value = bytes.Clone(b.Get([]byte(key)))
		}
		return nil
	})
	return value, err
}

// Records hands out the records of a kind, in the order of their keys, until
// fn returns false.
func (s *Store) Records(kind string, fn func(key string, value []byte) bool) error {
	return s.each(func(tx *bbolt.Tx) *bbolt.Bucket {
		return tx.Bucket(bucketRecords).Bucket([]byte(kind))
	}, func(k, v []byte) bool { return fn(string(k), v) })
}

// DropRecord deletes a record, and reports whether there was one.
func (s *Store) DropRecord(kind, key string) (found bool, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketRecords).Bucket([]byte(kind))
		if b == nil || key == "" {
			return nil
		}
		found = b.Get([]byte(key)) != nil
		return b.Delete([]byte(key))
	})
	if err != nil {
		return false, fmt.Errorf("deleting %s %q: %w", kind, key, err)
	}
	return found, nil
}
