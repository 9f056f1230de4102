package guard

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// An address that this machine takes on, and a gateway, are free at once: the
// real kernel tells, nobody waits for the look of each minute.
func TestOwnAddressesByNews(t *testing.T) {
	fd := selfNamespace(t)
	h, err := vnetlink.NewHandleAt(netns.NsHandle(fd), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := h.LinkAdd(&vnetlink.Veth{LinkAttrs: vnetlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}); err != nil {
		t.Fatal(err)
	}
	var link vnetlink.Link
	for _, name := range []string{"up1", "up0"} {
		if link, err = h.LinkByName(name); err != nil {
			t.Fatal(err)
		}
		if err := h.LinkSetUp(link); err != nil {
			t.Fatal(err)
		}
	}
	add := func(addr string) {
		t.Helper()
		ip, n, err := net.ParseCIDR(addr)
		if err == nil {
			err = h.AddrAdd(link, &vnetlink.Addr{IPNet: &net.IPNet{IP: ip, Mask: n.Mask}, Flags: unix.IFA_F_NODAD})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	add("192.0.2.2/24")

	st, err := store.Open(filepath.Join(t.TempDir(), "s.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	c := selfConfig{netNS: fd}
	looks := make(chan struct{}, 1000)
	fw := firewall.NewMemory(firewall.Options{})
	watching := make(chan struct{}, 10)
	g, err := New(t.Context(), Options{Policy: p, Store: st, Capacity: 100,
		OpenFirewall: func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) { return fw, nil },
		Self: func(ctx context.Context) ([]Exempt, error) {
			looks <- struct{}{}
			return c.exempt(ctx)
		},
		WatchSelf: func(ctx context.Context, changed func()) error {
			return c.watch(ctx, func() { changed(); watching <- struct{}{} })
		}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	<-watching

	block := func(prefix string) BlockOutcome {
		t.Helper()
		out, err := g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix(prefix), For: time.Hour, By: "test"}}, false)
		if err != nil || len(out) != 1 {
			t.Fatal(out, err)
		}
		return out[0]
	}
	gone := func(prefix string) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			list, err := g.Blocks(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(list) == 0 {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%s is still blocked", prefix)
			}
		}
	}
	for _, take := range []struct {
		block string
		take  func()
	}{
		{"198.51.100.0/24", func() { add("198.51.100.7/24") }},
		{"2001:db8:5::/48", func() { add("2001:db8:5::7/64") }},
		{"192.0.2.128/25", func() {
			if err := h.RouteAdd(&vnetlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP("192.0.2.129")}); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		if o := block(take.block); o.Block == nil {
			t.Fatalf("%+v", o)
		}
		take.take()
		gone(take.block)
		if o := block(take.block); o.Refused == "" {
			t.Errorf("%s may be blocked again: %+v", take.block, o)
		}
	}
	// It was the news, and not the clock, and not one look for each of them.
	if n := len(looks); n > 12 {
		t.Errorf("%d looks", n)
	}
}

// Of routes only the default ones count, and what is cut short counts for
// nothing.
func TestConcernsSelf(t *testing.T) {
	route := func(dstLen byte) []byte { return append([]byte{unix.AF_INET, dstLen}, make([]byte, 10)...) }
	for _, c := range []struct {
		typ  uint16
		data []byte
		want bool
	}{
		{unix.RTM_NEWADDR, nil, true}, {unix.RTM_DELADDR, nil, true},
		{unix.RTM_NEWROUTE, route(0), true}, {unix.RTM_DELROUTE, route(0), true},
		{unix.RTM_NEWROUTE, route(24), false}, {unix.RTM_NEWROUTE, []byte{2, 0}, false}, {unix.RTM_NEWLINK, route(0), false},
	} {
		if got := concernsSelf(netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(c.typ)}, Data: c.data}); got != c.want {
			t.Errorf("type %d, %v: %v", c.typ, c.data, got)
		}
	}
}

// The watch ends with its context, and says when it cannot begin.
func TestWatchEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	err := selfConfig{netNS: selfNamespace(t)}.watch(ctx, cancel)
	if !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if err := (selfConfig{netNS: -1}).watch(t.Context(), func() {}); err == nil || errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// The store cannot be written when this machine takes an address on: the block
// is out of the packet filter all the same.
func TestOwnAddressWithoutStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.g.Run(ctx) }()
		synctest.Wait()
		w.block("198.51.100.0/24", time.Hour)
		w.block("203.0.113.0/24", time.Hour)
		if err := w.st.Close(); err != nil {
			t.Fatal(err)
		}
		w.takeOn(Exempt{netip.MustParsePrefix("203.0.113.7/32"), "an address of this machine"})
		time.Sleep(time.Second)
		w.want("198.51.100.0/24")
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.start()
		defer w.run()()
		w.want("198.51.100.0/24")
	})
}
