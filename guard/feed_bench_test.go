package guard

import (
	"context"
	"net/netip"
	"path/filepath"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// A snapshot costs the goroutine that decides the same at 100,000 blocks as
// at none.
func BenchmarkPulse(b *testing.B) {
	for name, n := range map[string]int{"none": 0, "100k": 100_000} {
		b.Run(name, func(b *testing.B) {
			st, err := store.Open(filepath.Join(b.TempDir(), "s.db"), store.Options{})
			if err != nil {
				b.Fatal(err)
			}
			defer st.Close()
			g, err := New(b.Context(), Options{Policy: policy.Default(), Store: st, Capacity: 100,
				OpenFirewall: func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
					return firewall.NewMemory(firewall.Options{}), nil
				},
				Self: func(context.Context) ([]Exempt, error) { return nil, nil }})
			if err != nil {
				b.Fatal(err)
			}
			for i := range n {
				a := netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})
				g.blocks.put(store.Block{Prefix: netip.PrefixFrom(a, 32), Until: time.Now().Add(time.Hour)})
			}
			for b.Loop() {
				g.pulse(time.Now())
			}
		})
	}
}
