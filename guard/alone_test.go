package guard

import (
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// TestAllowedAlone: what is allowed is known without a daemon, and what is not
// known is said.
func TestAllowedAlone(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	now := time.Date(2026, 11, 22, 18, 0, 0, 0, time.UTC)
	p := policy.Default()
	p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("192.0.2.0/24")}}
	p.AllowNames = []policy.AllowName{{Name: allow.Name("dns:known.example")}, {Name: allow.Name("spf:unknown.example")}}
	for _, e := range []store.AllowEntry{
		{Prefix: netip.MustParsePrefix("198.51.100.7/32"), Added: now},
		{Prefix: netip.MustParsePrefix("198.51.100.8/32"), Added: now, Until: now.Add(-time.Hour)},
	} {
		if err := st.AllowAdd(e); err != nil {
			t.Fatal(err)
		}
	}
	if err := st.SetRecord(kindAllowAnswer, "dns:known.example", []byte(`{"answered":"2026-11-22T17:00:00Z","prefixes":[{"prefix":"203.0.113.9/32","seen":"2026-11-22T17:00:00Z"}]}`)); err != nil {
		t.Fatal(err)
	}
	list, err := AllowedAlone(t.Context(), st, p, now)
	for s, want := range map[string]bool{"192.0.2.0/24": true, "198.51.100.7/32": true, "198.51.100.8/32": false, "203.0.113.9/32": true} {
		if got := slices.Contains(list, netip.MustParsePrefix(s)); got != want {
			t.Errorf("%s is allowed: %v", s, got)
		}
	}
	if err == nil || !strings.Contains(err.Error(), "spf:unknown.example") || strings.Contains(err.Error(), "dns:known.example") {
		t.Errorf("what is not known: %v", err)
	}
}
