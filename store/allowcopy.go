package store

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// The operator's allowlist is what nobody can work out again when a store is
// damaged, and without it the wrong ones are blocked. So there is a copy of it
// beside the store, as text: an AllowEntry as JSON a line, and lines with # are
// comments. A store that is made anew begins with it.

const (
	allowCopyMax  = 64 << 20 // bytes that are read of a copy
	allowCopyHead = "# What `smtpguard allow add` was told: the copy of the store's list, for the case that the store is damaged.\n"
)

// AllowCopy is where the copy of the allowlist of the store at path is.
func AllowCopy(path string) string { return path + ".allow.txt" }

// Restored is what a new store took from the copy of an earlier one.
type Restored struct {
	// Entries is how many entries of the allowlist there were.
	Entries int
	// Err says what of the copy could not be read, nil if it was whole. The
	// copy is kept as Unread then.
	Err    error
	Unread string
}

// Restored is not zero if Open has made the store anew, and there was a copy.
func (s *Store) Restored() Restored { return s.restored }

// CopyAllow writes the allowlist to AllowCopy, whole or not at all, if it
// differs. A list that cannot be read as a whole leaves the copy as it is.
func (s *Store) CopyAllow() error {
	list, err := s.AllowList()
	if err != nil {
		return fmt.Errorf("copying the allowlist: %w", err)
	}
	text := []byte(allowCopyHead)
	for _, e := range list {
		line, err := json.Marshal(e)
		if err != nil {
			return fmt.Errorf("copying the allowlist: %w", err)
		}
		text = append(append(text, line...), '\n')
	}
	path := AllowCopy(s.path)
	old, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && len(list) == 0 || err == nil && bytes.Equal(old, text) {
		return nil
	}
	if err := replaceFile(path, text); err != nil {
		return fmt.Errorf("copying the allowlist: %w", err)
	}
	return nil
}

// replaceFile writes text to path, readable for its owner only.
func replaceFile(path string, text []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".new-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(text)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// restoreAllow takes what the copy at path has into s, a store that is new.
func (s *Store) restoreAllow(path string) (r Restored) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r
	}
	var bad faults
	bad.add(err)
	if err == nil {
		defer f.Close()
		lines := bufio.NewScanner(io.LimitReader(f, allowCopyMax))
		lines.Buffer(nil, 1<<20)
		for n := 1; lines.Scan(); n++ {
			line := bytes.TrimSpace(lines.Bytes())
			if len(line) == 0 || line[0] == '#' {
				continue
			}
			var e AllowEntry
			err := json.Unmarshal(line, &e)
			if err == nil {
				err = s.AllowAdd(e)
			}
			if err != nil {
				bad.add(fmt.Errorf("%s:%d: %w", path, n, err))
				continue
			}
			r.Entries++
		}
		bad.add(lines.Err())
	}
	if r.Err = bad.join(); r.Err != nil {
		r.Unread = path + ".unread"
		if err := os.Rename(path, r.Unread); err != nil {
			r.Unread, r.Err = path, errors.Join(r.Err, err)
		}
	}
	return r
}
