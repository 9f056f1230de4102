package guard

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/policy"
)

func TestGroups(t *testing.T) {
	for _, tt := range []struct{ held, want string }{
		{"", ""},
		{"192.0.2.1=3 192.0.2.2=4", "192.0.2.2/32=4/1 192.0.2.1/32=3/1"},
		{"192.0.2.1=3 192.0.2.2=4 192.0.2.3=1 198.51.100.1=5", "192.0.2.0/24=8/3 198.51.100.1/32=5/1"},
		{"2001:db8::1=1 2001:db8::2=1 2001:db8::3=1", "2001:db8::/64=3/3"},
		// Three networks of a /48, of which one is a network of three.
		{"2001:db8:0:1::1=1 2001:db8:0:1::2=1 2001:db8:0:1::3=1 2001:db8:0:2::1=2 2001:db8:0:3::1=2 2001:db8:1::1=9",
			"2001:db8:1::1/128=9/1 2001:db8::/48=7/5"},
	} {
		held := make(map[netip.Addr]int)
		for _, f := range strings.Fields(tt.held) {
			a, n, _ := strings.Cut(f, "=")
			var count int
			fmt.Sscan(n, &count)
			held[netip.MustParseAddr(a)] = count
		}
		var got []string
		for _, s := range groups(held) {
			got = append(got, fmt.Sprintf("%s=%d/%d", s.Prefix, s.Held, s.Addresses))
		}
		if g := strings.Join(got, " "); g != tt.want {
			t.Errorf("%s:\n got %s\nwant %s", tt.held, g, tt.want)
		}
	}
	many := make(map[netip.Addr]int)
	for i := range 100 {
		many[netip.AddrFrom4([4]byte{10, byte(i), 0, 1})] = i
	}
	if n := len(groups(many)); n != viewSources {
		t.Errorf("%d sources", n)
	}
}

// Five addresses of one network with 20 slots each are five rows, with what
// each has done: to block the network would hit its other customers too.
func TestViewNamesTheHolders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Mode = policy.Observe })
		defer w.run()()
		w.k.flood()
		time.Sleep(20 * time.Second)
		v := must(w.g.View(t.Context()))
		if len(v.Sources) != 5 {
			t.Errorf("%d rows, want 5: %+v", len(v.Sources), v.Sources)
		}
		for _, s := range v.Sources {
			if s.Addresses != 1 || s.Held != 20 || s.Near() < 1 {
				t.Errorf("%+v", s)
			}
		}
		// With many more the network stands for them, and names who is worst.
		for i := range 20 {
			w.k.open(fmt.Sprintf("203.0.113.%d", 100+i), 1)
		}
		time.Sleep(time.Second)
		v = must(w.g.View(t.Context()))
		if len(v.Sources) != 1 || v.Sources[0].Addresses != 25 || len(v.Sources[0].Members) != viewMembers {
			t.Fatalf("%+v", v.Sources)
		}
		if n := v.Sources[0].Nearest(); n.Held != 20 || n.Near() < 1 {
			t.Errorf("nearest: %+v", n)
		}
	})
}

// A view has the newest blocks, what they are and how many there are besides.
func TestView(t *testing.T) {
	w := newWorld(t, nil)
	ctx := context.Background()
	w.k.open("203.0.113.7", 30)
	var reqs []BlockRequest
	for i := range viewBlocks + 20 {
		reqs = append(reqs, BlockRequest{Prefix: policy.Canonical(netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 32)), For: time.Hour})
	}
	if _, err := w.g.Block(ctx, reqs, false); err != nil {
		t.Fatal(err)
	}
	last := netip.MustParsePrefix("203.0.113.7/32")
	if _, err := w.g.Block(ctx, []BlockRequest{{Prefix: last, For: time.Hour}}, false); err != nil {
		t.Fatal(err)
	}
	v, err := w.g.View(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if len(v.Blocks) != viewBlocks || v.MoreBlocks != 21 || !v.Counted {
		t.Errorf("%d blocks and %d more, counted %v", len(v.Blocks), v.MoreBlocks, v.Counted)
	}
	if v.Blocks[0].Prefix != last || v.Blocks[0].State != InForce {
		t.Errorf("the newest is %s, %s", v.Blocks[0].Prefix, v.Blocks[0].State)
	}
	if v.Status.Blocks != viewBlocks+21 {
		t.Errorf("status has %d blocks", v.Status.Blocks)
	}
}
