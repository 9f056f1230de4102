package guard

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/store"
)

func TestOutbox(t *testing.T) {
	s, err := store.Open(filepath.Join(t.TempDir(), "db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if list, err := Outbox(s, 0, 10); err != nil || len(list) != 0 {
		t.Fatalf("an empty store: %v, %v", list, err)
	}
	long := time.Now().Add(-100 * 24 * time.Hour)
	for i := range 30 {
		since := time.Now()
		if i < 10 {
			since = long
		}
		b := &store.Block{Prefix: netip.MustParsePrefix(fmt.Sprintf("198.51.100.%d/32", i)), Since: since, Until: since.Add(time.Hour)}
		if err := s.Add(b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Prune(time.Now().Add(-24 * time.Hour)); err != nil { // IDs 1 to 10 are gone
		t.Fatal(err)
	}
	var got []uint64
	after := uint64(0)
	for {
		list, err := Outbox(s, after, 7)
		if err != nil {
			t.Fatal(err)
		}
		if len(list) == 0 {
			break
		}
		for _, b := range list {
			got = append(got, b.ID)
		}
		after = list[len(list)-1].ID
	}
	if len(got) != 20 || got[0] != 11 || got[19] != 30 {
		t.Errorf("%v", got)
	}
}
