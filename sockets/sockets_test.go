package sockets

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary also be the MTA of TestEndBySignal.
func TestMain(m *testing.M) {
	if role := os.Getenv("SOCKETS_TEST_ROLE"); role != "" {
		os.Exit(playMTA(role))
	}
	os.Exit(m.Run())
}

var ctx = context.Background()

func prefixes(in ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range in {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}

func texts(socks []Socket) []string {
	var out []string
	for _, s := range socks {
		out = append(out, text(s))
	}
	slices.Sort(out)
	return out
}

func TestList(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	v4 := ns.listen(t, "tcp4", "10.66.0.1:25")
	v6 := ns.listen(t, "tcp6", "[2001:db8:1::1]:25")
	both := ns.listen(t, "tcp", "[::]:587")
	foreign := ns.listen(t, "tcp4", "10.66.0.1:2525")

	var want []string
	expect := func(local string, p pair, state string, holds bool) {
		t.Helper()
		h := map[bool]string{true: " holds=true", false: " holds=false"}[holds]
		want = append(want, local+" <- "+p.remote().String()+" "+state+h)
	}
	expect("10.66.0.1:25", ns.connect(t, v4, "10.66.1.7", "10.66.0.1:25"), "established", true)
	expect("[2001:db8:1::1]:25", ns.connect(t, v6, "2001:db8:2::1", "[2001:db8:1::1]:25"), "established", true)
	expect("[2001:db8:1::1]:587", ns.connect(t, both, "2001:db8:2::1", "[2001:db8:1::1]:587"), "established", true)
	expect("10.66.0.1:587", ns.connect(t, both, "10.66.2.7", "10.66.0.1:587"), "established", true)
	ns.connect(t, foreign, "10.66.1.7", "10.66.0.1:2525")

	closeWait := ns.connect(t, v4, "10.66.1.8", "10.66.0.1:25")
	closeWait.client.CloseWrite()
	expect("10.66.0.1:25", closeWait, "close-wait", true)

	halfClosed := ns.connect(t, v4, "10.66.1.9", "10.66.0.1:25") // Exim after QUIT
	halfClosed.server.CloseWrite()
	expect("10.66.0.1:25", halfClosed, "fin-wait-2", true)

	orphan := ns.connect(t, v4, "10.66.1.10", "10.66.0.1:25")
	orphan.server.Close()
	expect("10.66.0.1:25", orphan, "fin-wait-2", false)

	timeWait := ns.connect(t, v4, "10.66.1.11", "10.66.0.1:25")
	timeWait.server.Close()
	io.ReadAll(timeWait.client)
	timeWait.client.Close()
	expect("10.66.0.1:25", timeWait, "time-wait", false)

	expect("10.66.0.1:25", pair{client: ns.dial(t, "10.66.1.12", "10.66.0.1:25")}, "established", false) // in the listen queue
	slices.Sort(want)

	eventually(t, func() string {
		socks, err := tab.List(ctx, []uint16{25, 465, 587})
		if err != nil {
			t.Fatal(err)
		}
		if got := texts(socks); !slices.Equal(got, want) {
			return "got\n" + strings.Join(got, "\n") + "\nwant\n" + strings.Join(want, "\n")
		}
		return ""
	})

	all, err := tab.List(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(all, func(s Socket) bool { return s.Local.Port() == 2525 }) {
		t.Error("a list of all ports lacks port 2525")
	}
	if got, err := tab.List(ctx, []uint16{26}); len(got) != 0 || err != nil {
		t.Errorf("port 26: %v, %v; want nothing", got, err)
	}
}

// The third packet of the handshake has come, but the listener wants data
// first: for the kernel that is SYN-RECV.
func deferAccept(t *testing.T, l net.Listener) {
	t.Helper()
	raw, err := l.(*net.TCPListener).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	raw.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 60)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestSynRecv(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	deferAccept(t, l)
	ns.dial(t, "10.66.1.7", "10.66.0.1:25")
	socks, err := tab.List(ctx, []uint16{25})
	if err != nil || len(socks) != 1 || socks[0].State != SynRecv || socks[0].Holds() {
		t.Fatalf("got %v, %v; want one in SYN-RECV that holds nothing", socks, err)
	}
	ended, err := tab.End(ctx, prefixes("10.66.1.0/24"), []uint16{25})
	if want := (Ended{Destroyed: 1, Method: MethodDestroy}); ended != want || err != nil {
		t.Errorf("got %+v, %v; want %+v", ended, err, want)
	}
}

// The kernel, not only we, must compare the ports: what it does not send
// costs nothing.
func TestPortProgram(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	for _, port := range []string{"1", "25", "465", "587", "65535"} {
		l := ns.listen(t, "tcp4", "10.66.0.1:"+port)
		ns.connect(t, l, "10.66.1.7", "10.66.0.1:"+port)
	}
	many := func(n int, more ...uint16) []uint16 {
		for i := range n {
			more = append(more, uint16(20000+i))
		}
		return more
	}
	for _, c := range []struct {
		ports, want []uint16
	}{
		{[]uint16{25}, []uint16{25}},
		{[]uint16{24}, nil},
		{[]uint16{26}, nil},
		{[]uint16{587, 25}, []uint16{25, 587}},
		{[]uint16{25, 465, 587}, []uint16{25, 465, 587}},
		{[]uint16{0, 1, 65535}, []uint16{1, 65535}},
		{many(maxFilterPorts-1, 465), []uint16{465}},
		{append(many(maxFilterPorts-1), 465), []uint16{465}},
	} {
		var got []uint16
		err := tab.exchange(ctx,
			func(b []byte) []byte { return appendDump(b, 1, unix.AF_INET, liveStates, c.ports) },
			func(m message) (bool, error) {
				if m.typ == unix.NLMSG_DONE || m.typ == unix.NLMSG_ERROR {
					if e := m.status(); e != 0 {
						return true, e
					}
					return true, nil
				}
				s, ok := parseSocket(m.data)
				if !ok {
					t.Errorf("cannot parse %x", m.data)
				}
				got = append(got, s.Local.Port())
				return false, nil
			})
		slices.Sort(got)
		if err != nil || !slices.Equal(got, c.want) {
			t.Errorf("%v: got %v, %v; want %v", c.ports, got, err, c.want)
		}
	}
	// With more ports than go into a program the result is the same.
	got, err := tab.List(ctx, many(maxFilterPorts, 465))
	if err != nil || len(got) != 1 || got[0].Local.Port() != 465 {
		t.Errorf("with %d ports: got %v, %v; want the one on 465", maxFilterPorts+1, got, err)
	}
}

func TestMaxSockets(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{MaxSockets: 100})
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	ns.connectMany(t, l, "10.66.0.1:25", 1, 300)
	got, err := tab.List(ctx, []uint16{25})
	if !errors.Is(err, ErrTooMany) || len(got) != 100 {
		t.Errorf("got %d sockets, %v; want 100 and ErrTooMany", len(got), err)
	}
	// What is left of that answer must not be taken for the next one's.
	if got, err := tab.List(ctx, []uint16{26}); err != nil || len(got) != 0 {
		t.Errorf("afterwards: got %d sockets, %v; want none", len(got), err)
	}
	// Ending them all still works, some at a time.
	ended, err := tab.End(ctx, prefixes("10.66.1.0/24"), []uint16{25})
	if err != nil || ended.Destroyed < 300 || ended.Left != 0 {
		t.Errorf("got %+v, %v; want 300 destroyed", ended, err)
	}
}

// aborted reports whether the server's side of the connection has ended with
// ECONNABORTED.
func aborted(c *net.TCPConn) bool {
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, err := c.Read(make([]byte, 1))
	return errors.Is(err, unix.ECONNABORTED)
}

// alive reports whether a byte still gets through.
func alive(p pair) bool {
	p.server.SetDeadline(time.Now().Add(5 * time.Second))
	p.client.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := p.client.Write([]byte("x")); err != nil {
		return false
	}
	_, err := p.server.Read(make([]byte, 1))
	return err == nil
}

func TestEnd(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	smtp := ns.listen(t, "tcp4", "10.66.0.1:25")
	smtps := ns.listen(t, "tcp", "[::]:465")
	foreign := ns.listen(t, "tcp4", "10.66.0.1:2525")

	attackers := ns.connectMany(t, smtp, "10.66.0.1:25", 7, 900)
	attackers = append(attackers, ns.connectMany(t, smtps, "10.66.0.1:465", 7, 100)...) // mapped
	others := ns.connectMany(t, smtp, "10.66.0.1:25", 8, 50)
	others = append(others, ns.connectMany(t, foreign, "10.66.0.1:2525", 7, 50)...)

	ended, err := tab.End(ctx, prefixes("10.66.7.0/24"), []uint16{25, 465, 587})
	if want := (Ended{Destroyed: len(attackers), Method: MethodDestroy}); ended != want || err != nil {
		t.Fatalf("got %+v, %v; want %+v", ended, err, want)
	}
	for _, p := range attackers {
		if !aborted(p.server) {
			t.Fatalf("the connection of %v has not ended with ECONNABORTED", p.remote())
		}
	}
	for _, p := range others {
		if !alive(p) {
			t.Fatalf("the connection of %v to %v has ended, too", p.remote(), p.server.LocalAddr())
		}
	}
	// The listeners still serve.
	if !alive(ns.connect(t, smtp, "10.66.9.1", "10.66.0.1:25")) || !alive(ns.connect(t, smtps, "10.66.9.1", "10.66.0.1:465")) {
		t.Error("no new connection can be made")
	}

	ended, err = tab.End(ctx, prefixes("10.66.7.0/24"), []uint16{25, 465, 587})
	if ended != (Ended{}) || err != nil {
		t.Errorf("again: got %+v, %v; want nothing done", ended, err)
	}
}

func TestEndStates(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	v4 := ns.listen(t, "tcp4", "10.66.0.1:25")
	v6 := ns.listen(t, "tcp6", "[2001:db8:1::1]:25")

	for _, c := range []struct {
		name   string
		prefix string
		make   func(*testing.T) pair
		hurt   bool // the server's process learns of it
		want   Ended
	}{
		{"IPv6", "2001:db8:2::/48", func(t *testing.T) pair {
			return ns.connect(t, v6, "2001:db8:2::1", "[2001:db8:1::1]:25")
		}, true, Ended{Destroyed: 1, Method: MethodDestroy}},
		{"IPv6, another prefix", "2001:db8:2::/48", func(t *testing.T) pair {
			return ns.connect(t, v6, "2001:db8:1::2", "[2001:db8:1::1]:25")
		}, false, Ended{}},
		{"one address", "10.66.1.1/32", func(t *testing.T) pair {
			return ns.connect(t, v4, "10.66.1.1", "10.66.0.1:25")
		}, true, Ended{Destroyed: 1, Method: MethodDestroy}},
		{"the address beside it", "10.66.1.2/32", func(t *testing.T) pair {
			return ns.connect(t, v4, "10.66.1.3", "10.66.0.1:25")
		}, false, Ended{}},
		{"in the listen queue", "10.66.1.4/32", func(t *testing.T) pair {
			ns.listen(t, "tcp4", "10.66.0.2:25") // nobody accepts there
			return pair{client: ns.dial(t, "10.66.1.4", "10.66.0.2:25")}
		}, false, Ended{Destroyed: 1, Method: MethodDestroy}},
		{"half closed by the server", "10.66.1.6/32", func(t *testing.T) pair {
			p := ns.connect(t, v4, "10.66.1.6", "10.66.0.1:25")
			p.server.CloseWrite()
			return p
		}, true, Ended{Destroyed: 1, Method: MethodDestroy}},
		{"without process", "10.66.1.7/32", func(t *testing.T) pair {
			p := ns.connect(t, v4, "10.66.1.7", "10.66.0.1:25")
			p.server.Close()
			return p
		}, false, Ended{}},
		{"time-wait", "10.66.1.8/32", func(t *testing.T) pair {
			p := ns.connect(t, v4, "10.66.1.8", "10.66.0.1:25")
			p.server.Close()
			io.ReadAll(p.client)
			p.client.Close()
			return p
		}, false, Ended{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := c.make(t)
			ended, err := tab.End(ctx, prefixes(c.prefix), []uint16{25})
			if ended != c.want || err != nil {
				t.Errorf("got %+v, %v; want %+v", ended, err, c.want)
			}
			if c.hurt && !aborted(p.server) {
				t.Error("the server has not got ECONNABORTED")
			}
		})
	}
}

// A peer that never reads lets the server's write hang, for hours if need be;
// neither a timeout nor a packet filter frees that slot.
func TestEndNonReader(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	p := ns.connect(t, l, "10.66.1.7", "10.66.0.1:25")
	result := make(chan error, 1)
	go func() {
		chunk := make([]byte, 1<<16)
		for {
			if _, err := p.server.Write(chunk); err != nil {
				result <- err
				return
			}
		}
	}()
	var before uint32
	eventually(t, func() string {
		socks, err := tab.List(ctx, []uint16{25})
		if err != nil || len(socks) != 1 {
			t.Fatalf("got %v, %v; want one connection", socks, err)
		}
		full := socks[0].SendQueue > 0 && socks[0].SendQueue == before
		before = socks[0].SendQueue
		if full {
			return ""
		}
		return "the send queue does not fill"
	})
	ended, err := tab.End(ctx, prefixes("10.66.1.7/32"), []uint16{25})
	if want := (Ended{Destroyed: 1, Method: MethodDestroy}); ended != want || err != nil {
		t.Fatalf("got %+v, %v; want %+v", ended, err, want)
	}
	select {
	case err := <-result:
		if !errors.Is(err, unix.ECONNABORTED) {
			t.Errorf("the write ended with %v; want ECONNABORTED", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the write still hangs")
	}
}

func TestEndRefuses(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	for _, c := range []struct {
		prefixes []netip.Prefix
		ports    []uint16
	}{
		{[]netip.Prefix{{}}, []uint16{25}},
		{prefixes("10.0.0.0/8"), nil},
		{[]netip.Prefix{netip.PrefixFrom(netip.MustParseAddr("::ffff:10.66.7.0"), 120)}, []uint16{25}},
	} {
		if ended, err := tab.End(ctx, c.prefixes, c.ports); err == nil || ended != (Ended{}) {
			t.Errorf("%v, ports %v: got %+v, %v; want an error", c.prefixes, c.ports, ended, err)
		}
	}
	if ended, err := tab.End(ctx, nil, []uint16{25}); err != nil || ended != (Ended{}) {
		t.Errorf("no prefix: got %+v, %v; want nothing done", ended, err)
	}
}

func TestEndSeveral(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	l := ns.listen(t, "tcp", "[::]:25")
	gone := []pair{
		ns.connect(t, l, "10.66.1.7", "10.66.0.1:25"),
		ns.connect(t, l, "10.66.2.7", "10.66.0.1:25"),
		ns.connect(t, l, "2001:db8:2::1", "[2001:db8:1::1]:25"),
	}
	stays := ns.connect(t, l, "10.66.3.7", "10.66.0.1:25")
	// Not masked, nested, and twice: it is the same set.
	ended, err := tab.End(ctx, prefixes("10.66.1.99/24", "10.66.2.7/32", "10.66.2.0/24", "10.66.2.0/24", "2001:db8:2::/48"), []uint16{25})
	if want := (Ended{Destroyed: 3, Method: MethodDestroy}); ended != want || err != nil {
		t.Errorf("got %+v, %v; want %+v", ended, err, want)
	}
	for _, p := range gone {
		if !aborted(p.server) {
			t.Errorf("the connection of %v has not ended", p.remote())
		}
	}
	if !alive(stays) {
		t.Error("the other connection has ended, too")
	}
}

// A connection that went between list and destroy must not cost the listener,
// which the kernel finds for the same addresses.
func TestDestroyGone(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	p := ns.connect(t, l, "10.66.1.7", "10.66.0.1:25")
	socks, err := tab.List(ctx, []uint16{25})
	if err != nil || len(socks) != 1 {
		t.Fatalf("got %v, %v; want one connection", socks, err)
	}
	p.client.SetLinger(0)
	p.client.Close()
	eventually(t, func() string {
		if now, err := tab.List(ctx, []uint16{25}); err != nil || len(now) > 0 {
			return "the connection does not go"
		}
		return ""
	})
	n, err := tab.Destroy(ctx, socks)
	if n != 1 || err != nil {
		t.Errorf("got %d, %v; want 1: it is gone", n, err)
	}
	if !alive(ns.connect(t, l, "10.66.1.7", "10.66.0.1:25")) {
		t.Error("the listener is gone")
	}

	// Nor may a Socket that no kernel has named: a cookie of all ones names
	// any, and would find the listener.
	forged := socks[0]
	forged.cookie = [2]uint32{^uint32(0), ^uint32(0)}
	for _, s := range []Socket{forged, {Local: socks[0].Local, Remote: socks[0].Remote, State: Established, family: unix.AF_INET}} {
		if n, err := tab.Destroy(ctx, []Socket{s}); n != 0 || err != nil {
			t.Errorf("got %d, %v; want 0: it has no cookie", n, err)
		}
	}
	if !alive(ns.connect(t, l, "10.66.1.7", "10.66.0.1:25")) {
		t.Error("the listener is gone")
	}
}

func TestCanDestroy(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	if can, err := tab.CanDestroy(ctx); !can || err != nil {
		t.Errorf("got %t, %v; want true", can, err)
	}
	if socks, err := tab.dump(ctx, nil, liveStates|1<<Listen, nil); err != nil || len(socks) != 0 {
		t.Errorf("afterwards there are %v, %v; want no socket", socks, err)
	}
	tab.kernelCannot = true
	if can, err := tab.CanDestroy(ctx); can || !errors.Is(err, ErrCannotDestroy) {
		t.Errorf("old kernel: got %t, %v; want ErrCannotDestroy", can, err)
	}
}

func TestNotPermitted(t *testing.T) {
	ns := newNamespace(t)
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	p := ns.connect(t, l, "10.66.1.7", "10.66.0.1:25")
	err := ns.do(func() error { // on a thread of its own, which ends with this
		h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var d [2]unix.CapUserData
		if err := unix.Capget(&h, &d[0]); err != nil {
			return err
		}
		d[0].Effective &^= 1 << unix.CAP_NET_ADMIN
		if err := unix.Capset(&h, &d[0]); err != nil {
			return err
		}
		tab, err := Open(Options{Patience: time.Millisecond})
		if err != nil {
			return err
		}
		defer tab.Close()
		if can, err := tab.CanDestroy(ctx); can || !errors.Is(err, ErrNotPermitted) {
			t.Errorf("CanDestroy: got %t, %v; want ErrNotPermitted", can, err)
		}
		socks, err := tab.List(ctx, []uint16{25})
		if err != nil || len(socks) != 1 {
			t.Errorf("List: got %v, %v; want one connection", socks, err)
		}
		if n, err := tab.Destroy(ctx, socks); n != 0 || !errors.Is(err, ErrNotPermitted) {
			t.Errorf("Destroy: got %d, %v; want ErrNotPermitted", n, err)
		}
		ended, err := tab.End(ctx, prefixes("10.66.1.0/24"), []uint16{25})
		if want := (Ended{Left: 1}); ended != want || !errors.Is(err, ErrNotPermitted) {
			t.Errorf("End: got %+v, %v; want %+v, ErrNotPermitted", ended, err, want)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if !alive(p) {
		t.Error("the connection has ended all the same")
	}
}

func TestContext(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	ns.connectMany(t, l, "10.66.0.1:25", 1, 20)

	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := tab.List(gone, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
	late, cancel := context.WithDeadline(ctx, time.Unix(1, 0))
	defer cancel()
	if _, err := tab.List(late, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past its deadline: got %v", err)
	}

	// No answer comes to what is no request: only the deadline ends this.
	short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	mute := func(b []byte) []byte { return appendHeader(b, unix.NLMSG_NOOP, 0, 1, 0) }
	never := func(message) (bool, error) { return false, nil }
	if err := tab.exchange(short, mute, never); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("no answer: got %v", err)
	}
	tab.o.Timeout = 20 * time.Millisecond
	if err := tab.exchange(ctx, mute, never); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("no answer: got %v", err)
	}
	tab.o.Timeout = 5 * time.Second

	// Cancelling at any moment leaves a Table that works.
	for i := range 200 {
		c, cancel := context.WithCancel(ctx)
		go func() {
			for range i {
				runtime.Gosched()
			}
			cancel()
		}()
		if _, err := tab.List(c, nil); err != nil && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if got, err := tab.List(ctx, []uint16{25}); err != nil || len(got) != 20 {
			t.Fatalf("afterwards: got %d sockets, %v; want 20", len(got), err)
		}
		cancel()
	}

	tab.Close()
	if _, err := tab.List(ctx, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed: got %v", err)
	}
	if err := tab.Close(); err != nil {
		t.Errorf("closed again: got %v", err)
	}
}

func TestListening(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	ns.listen(t, "tcp4", "10.66.0.1:25")
	ns.listen(t, "tcp", "[::]:587")
	ns.listen(t, "tcp4", "10.66.0.1:2525")
	got, err := tab.Listening(ctx, []uint16{25, 465, 587})
	if err != nil {
		t.Fatal(err)
	}
	var addrs []string
	for _, l := range got {
		addrs = append(addrs, l.Addr.String())
		if len(l.Processes) != 1 || l.Processes[0].PID != os.Getpid() || l.Processes[0].Name != filepath.Base(os.Args[0]) {
			t.Errorf("%v is said to be of %v, not of this process", l.Addr, l.Processes)
		}
	}
	if want := []string{"10.66.0.1:25", "[::]:587"}; !slices.Equal(addrs, want) {
		t.Errorf("got %v, want %v", addrs, want)
	}
	if got, err := tab.Listening(ctx, []uint16{465}); len(got) != 0 || err != nil {
		t.Errorf("port 465: got %v, %v; want nothing", got, err)
	}
	for port, want := range map[uint16]bool{25: true, 465: false, 587: true} {
		if got, err := tab.Listens(ctx, []uint16{port}); got != want || err != nil {
			t.Errorf("port %d: got %v, %v; want %v", port, got, err, want)
		}
	}
}

// playMTA is the process of a small mail server:
//
//	fork   gives each connection to a child of its own, as Exim does
//	stay   keeps it in the daemon
//	child  waits with descriptor 3, for SIGTERM or the end of the connection
//	deaf   likewise, and does not heed SIGTERM
func playMTA(role string) int {
	switch role {
	case "deaf":
		signal.Ignore(unix.SIGTERM)
		fallthrough
	case "child":
		io.Copy(io.Discard, os.NewFile(3, "connection"))
		return 0
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp4", os.Getenv("SOCKETS_TEST_ADDR"))
	if err != nil {
		return 1
	}
	os.Stdout.WriteString("ready\n")
	keep := make(map[net.Conn]bool)
	for {
		c, err := l.Accept()
		if err != nil {
			return 1
		}
		if role == "stay" {
			keep[c] = true
			os.Stdout.WriteString("taken\n")
			continue
		}
		f, err := c.(*net.TCPConn).File()
		if err != nil {
			return 1
		}
		child := exec.Command(os.Args[0])
		child.Env = []string{"SOCKETS_TEST_ROLE=" + strings.TrimPrefix(role, "fork-")}
		child.ExtraFiles = []*os.File{f}
		if child.Start() != nil {
			return 1
		}
		go child.Wait()
		f.Close()
		c.Close()
		os.Stdout.WriteString("taken\n")
	}
}

// mta starts a mail server in the namespace. taken waits until it has given
// away one more connection.
func (n namespace) mta(t *testing.T, name, role, addr string) (pid int, taken func()) {
	t.Helper()
	bin := filepath.Join(t.TempDir(), name)
	self, err := os.ReadFile("/proc/self/exe")
	if err == nil {
		err = os.WriteFile(bin, self, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin)
	cmd.Env = []string{"SOCKETS_TEST_ROLE=" + role, "SOCKETS_TEST_ADDR=" + addr}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	taken = func() {
		t.Helper()
		if _, err := io.ReadFull(out, make([]byte, len("ready\n"))); err != nil {
			t.Fatalf("the mail server is gone: %v", err)
		}
	}
	taken()
	return cmd.Process.Pid, taken
}

func TestEndBySignal(t *testing.T) {
	prefix := prefixes("10.66.7.0/24")
	for _, c := range []struct {
		name     string
		program  string
		role     string
		programs []string
		patience time.Duration
		want     Ended
	}{
		{"Debian's Exim", "exim4", "fork-child", nil, 10 * time.Second, Ended{Signalled: 3, Method: MethodSignal}},
		{"Exim with its version", "exim-4.98-1", "fork-child", nil, 10 * time.Second, Ended{Signalled: 3, Method: MethodSignal}},
		{"another program", "postfix", "fork-child", nil, time.Millisecond, Ended{Left: 3}},
		{"another program, allowed", "postfix", "fork-child", []string{"postfix"}, 10 * time.Second, Ended{Signalled: 3, Method: MethodSignal}},
		{"the daemon itself", "exim", "stay", nil, time.Millisecond, Ended{Left: 3}},
		{"children that hang in a write", "exim", "fork-deaf", nil, time.Millisecond, Ended{Signalled: 3, Left: 3, Method: MethodSignal}},
	} {
		t.Run(c.name, func(t *testing.T) {
			ns := newNamespace(t)
			tab := ns.table(t, Options{Programs: c.programs, Patience: c.patience})
			tab.kernelCannot = true
			daemon, taken := ns.mta(t, c.program, c.role, "10.66.0.1:25")
			var clients []*net.TCPConn
			for range 3 {
				clients = append(clients, ns.dial(t, "10.66.7.1", "10.66.0.1:25"))
				taken()
			}
			other := ns.dial(t, "10.66.8.1", "10.66.0.1:25")
			taken()
			if c.role == "fork-deaf" {
				// Until it says so in procfs a child may still heed the signal.
				eventually(t, func() string { return allDeaf(t, tab) })
			}

			ended, err := tab.End(ctx, prefix, []uint16{25, 465, 587})
			if ended != c.want {
				t.Errorf("got %+v, want %+v", ended, c.want)
			}
			if (c.want.Left > 0) != errors.Is(err, ErrCannotDestroy) {
				t.Errorf("%d are left, and the error is: %v", c.want.Left, err)
			}
			for _, client := range clients {
				client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
				if c.want.Left == 0 {
					client.SetReadDeadline(time.Now().Add(10 * time.Second))
				}
				_, err := client.Read(make([]byte, 1))
				if gone := !errors.Is(err, os.ErrDeadlineExceeded); gone != (c.want.Left == 0) {
					t.Errorf("the client's read gave %v", err)
				}
			}
			other.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := other.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("the other prefix's connection gave %v", err)
			}
			if err := unix.Kill(daemon, 0); err != nil {
				t.Errorf("the daemon: %v", err)
			}
			ns.dial(t, "10.66.8.1", "10.66.0.1:25")
			taken() // it still serves
		})
	}
}

// allDeaf says whether the processes with a connection to port 25 all ignore
// SIGTERM.
func allDeaf(t *testing.T, tab *Table) string {
	socks, err := tab.List(ctx, []uint16{25})
	if err != nil {
		t.Fatal(err)
	}
	var inodes []uint32
	for _, s := range socks {
		inodes = append(inodes, s.Inode)
	}
	owners, err := tab.Owners(ctx, inodes)
	if err != nil {
		t.Fatal(err)
	}
	for _, inode := range inodes {
		for _, p := range owners[inode] {
			for line := range strings.Lines(tab.proc(p.PID).read("status", 1<<16)) {
				hex, ok := strings.CutPrefix(strings.TrimSpace(line), "SigIgn:\t")
				if mask, _ := strconv.ParseUint(hex, 16, 64); ok && mask&(1<<(unix.SIGTERM-1)) == 0 {
					return "a child does not ignore SIGTERM yet"
				}
			}
		}
	}
	return ""
}

// A procfs of another PID namespace shows numbers that are others' here.
func TestForeignProc(t *testing.T) {
	ns := newNamespace(t)
	root := t.TempDir()
	if err := os.Symlink("1", filepath.Join(root, "self")); err != nil {
		t.Fatal(err)
	}
	tab := ns.table(t, Options{ProcRoot: root})
	tab.kernelCannot = true
	l := ns.listen(t, "tcp4", "10.66.0.1:25")
	ns.connect(t, l, "10.66.7.1", "10.66.0.1:25")
	ended, err := tab.End(ctx, prefixes("10.66.7.0/24"), []uint16{25})
	if want := (Ended{Left: 1}); ended != want || !errors.Is(err, ErrCannotDestroy) || !strings.Contains(err.Error(), "PID namespace") {
		t.Errorf("got %+v, %v; want %+v and both reasons", ended, err, want)
	}
}

// A process that has become another since it was found gets no signal.
func TestTerminateLooksAgain(t *testing.T) {
	ns := newNamespace(t)
	tab := ns.table(t, Options{})
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		unable(t, "no sleep(1) here: %v", err)
	}
	defer func() { child.Process.Kill(); child.Wait() }()
	err := tab.terminate(tab.proc(child.Process.Pid), ownership{held: map[uint32]bool{1: true}})
	if !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("got %v, want os.ErrProcessDone", err)
	}
	if err := child.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the process: %v", err)
	}
	if state := tab.proc(child.Process.Pid).read("stat", 256); strings.Contains(state, ") Z ") {
		t.Error("the process has ended")
	}
}

func TestSocketInode(t *testing.T) {
	for in, want := range map[string]uint32{
		"socket:[1]": 1, "socket:[4294967295]": 1<<32 - 1,
		"socket:[4294967296]": 0, "socket:[]": 0, "socket:[1": 0, "pipe:[1]": 0, "/tmp/socket:[1]": 0, "socket:[-1]": 0, "": 0,
	} {
		if got, ok := socketInode(in); ok != (want != 0) || ok && got != want {
			t.Errorf("%q: got %d, %t; want %d", in, got, ok, want)
		}
	}
}

func TestStateString(t *testing.T) {
	for s, want := range map[State]string{Established: "established", TimeWait: "time-wait", Listen: "listen", 0: "0", 2: "2", 7: "7", 200: "200"} {
		if got := s.String(); got != want {
			t.Errorf("%d: got %q, want %q", s, got, want)
		}
	}
}

// What the kernel is asked for must be what it said, byte for byte.
func TestDestroyNamesTheSocket(t *testing.T) {
	for _, c := range []struct {
		name   string
		family uint8
		local  string // 16 bytes
		remote string
	}{
		{"IPv4", unix.AF_INET, "\x0a\x42\x00\x01" + strings.Repeat("\x00", 12), "\x0a\x42\x07\x01" + strings.Repeat("\x00", 12)},
		{"mapped", unix.AF_INET6, strings.Repeat("\x00", 10) + "\xff\xff\x0a\x42\x00\x01", strings.Repeat("\x00", 10) + "\xff\xff\x0a\x42\x07\x01"},
		{"IPv6", unix.AF_INET6, "\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x01", "\x20\x01\x0d\xb8" + strings.Repeat("\x00", 11) + "\x02"},
	} {
		id := "\x00\x19" + "\xc3\x50" + c.local + c.remote + "\x03\x00\x00\x00" + "\x01\x02\x03\x04\x05\x06\x07\x08"
		answer := string([]byte{c.family, byte(Established), 0, 0}) + id + strings.Repeat("\x00", 20)
		s, ok := parseSocket([]byte(answer))
		if !ok || s.Local.Port() != 25 || s.Remote.Port() != 50000 || s.Remote.Addr().Is4In6() {
			t.Errorf("%s: got %+v, %t", c.name, s, ok)
			continue
		}
		req := appendDestroy(nil, 1, s)
		if got := req[headerLen+8:]; !bytes.Equal(got, []byte(id)) || len(req) != headerLen+requestLen {
			t.Errorf("%s: asked for % x\nwant % x", c.name, got, id)
		}
	}
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte{})
	f.Add(appendHeader(nil, unix.NLMSG_DONE, 0, 1, 0))
	f.Add(append(appendHeader(nil, sockDiagByFamily, 0, 1, answerLen), make([]byte, answerLen)...)) // family 0
	f.Add(append(appendHeader(nil, sockDiagByFamily, 0, 1, answerLen), append([]byte{unix.AF_INET6, 1}, make([]byte, answerLen-2)...)...))
	f.Add(append(appendHeader(nil, unix.NLMSG_ERROR, 0, 1, 4), 0xfe, 0xff, 0xff, 0xff))
	f.Add(append(appendHeader(nil, unix.NLMSG_ERROR, 0, 1, 4), 0, 0, 0, 0x80)) // the least number
	f.Add(appendHeader(nil, sockDiagByFamily, 0, 1, 1<<31-17))                 // longer than it is
	f.Fuzz(func(t *testing.T, b []byte) {
		total := 0
		for len(b) > 0 {
			m, rest, err := nextMessage(b)
			if err != nil {
				if !errors.Is(err, errMalformed) {
					t.Errorf("got %v", err)
				}
				return
			}
			if len(rest) >= len(b) {
				t.Fatal("no progress")
			}
			total += len(m.data)
			m.status()
			if s, ok := parseSocket(m.data); ok {
				if s.Remote.Addr().Is4In6() && s.mapped {
					t.Errorf("%v is mapped", s.Remote)
				}
				if n := len(appendDestroy(nil, 1, s)); n != headerLen+requestLen {
					t.Errorf("a request of %d bytes", n)
				}
			}
			b = rest
		}
	})
}

func BenchmarkList(b *testing.B) {
	for _, n := range []int{1000, 10_000} {
		b.Run(map[int]string{1000: "1000", 10_000: "10000"}[n], func(b *testing.B) {
			ns := newNamespace(b)
			tab := ns.table(b, Options{})
			l := ns.listen(b, "tcp4", "10.66.0.1:25")
			for range n / 1000 {
				for _, p := range ns.connectMany(b, l, "10.66.0.1:25", 1, 1000) {
					p.client.Close() // saves a descriptor; the server's end is in CLOSE-WAIT
				}
			}
			var socks []Socket
			b.ReportAllocs()
			for b.Loop() {
				var err error
				if socks, err = tab.Append(ctx, socks[:0], []uint16{25, 465, 587}); err != nil || len(socks) != n {
					b.Fatalf("got %d sockets, %v", len(socks), err)
				}
			}
		})
	}
}

func BenchmarkDestroy250(b *testing.B) {
	ns := newNamespace(b)
	tab := ns.table(b, Options{})
	l := ns.listen(b, "tcp4", "10.66.0.1:25")
	for b.Loop() {
		b.StopTimer()
		pairs := ns.connectMany(b, l, "10.66.0.1:25", 1, 250)
		socks, err := tab.List(ctx, []uint16{25})
		if err != nil || len(socks) != 250 {
			b.Fatalf("got %d sockets, %v", len(socks), err)
		}
		b.StartTimer()
		if n, err := tab.Destroy(ctx, socks); n != 250 || err != nil {
			b.Fatalf("got %d, %v", n, err)
		}
		b.StopTimer()
		for _, p := range pairs {
			p.server.Close()
			p.client.Close()
		}
		b.StartTimer()
	}
}
