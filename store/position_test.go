package store

import (
	"path/filepath"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/smtpguard/smtpguard/tail"
)

// Positions as the first version wrote them are read; a zero one forgets.
func TestPositionForms(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "s.db"), Options{})
	must(t, err)
	defer s.Close()
	must(t, s.update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketPositions).Put([]byte("/old"), []byte(`{"dev":1,"inode":2,"offset":3,"head":4,"head_len":5,"mtime":6}`))
	}))
	want := tail.Position{Dev: 1, Inode: 2, Offset: 3, Head: 4, HeadLen: 5, ModTime: 6}
	if got, ok, err := s.Position("/old"); got != want || !ok || err != nil {
		t.Errorf("%+v, %v, %v; want %+v", got, ok, err, want)
	}
	must(t, s.SavePositions(map[string]tail.Position{"/old": {}, "/new": want}))
	if got, ok, err := s.Position("/old"); ok || err != nil {
		t.Errorf("still known: %+v, %v", got, err)
	}
	if got, _, err := s.Position("/new"); got != want || err != nil {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}
