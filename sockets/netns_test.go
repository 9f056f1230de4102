package sockets

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// namespace is a network namespace of the test's own, with addresses on its
// loopback interface: every one in 10.66.0.0/16 and some of IPv6.
type namespace struct{ fd int }

var ownV6 = []string{"2001:db8:1::1", "2001:db8:1::2", "2001:db8:2::1"}

// unable ends a test that this machine cannot run: quietly, but not in CI.
func unable(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func newNamespace(t testing.TB) namespace {
	t.Helper()
	type result struct {
		fd  int
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			c <- result{0, err}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		c <- result{fd, err}
	}()
	r := <-c
	if errors.Is(r.err, unix.EPERM) {
		unable(t, "a network namespace of its own needs root")
	}
	if r.err != nil {
		t.Fatal(r.err)
	}
	t.Cleanup(func() { unix.Close(r.fd) })

	h, err := netlink.NewHandleAt(netns.NsHandle(r.fd), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	addrs := []string{"10.66.0.1/16"}
	for _, a := range ownV6 {
		addrs = append(addrs, a+"/128")
	}
	for _, s := range addrs {
		a, err := netlink.ParseAddr(s)
		if err != nil {
			t.Fatal(err)
		}
		a.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(lo, a); err != nil {
			t.Fatalf("adding %s: %v", s, err)
		}
	}
	n := namespace{r.fd}
	// The kernel adds the routes of IPv6 addresses a little later.
	eventually(t, func() string {
		err := n.do(func() error {
			for _, a := range ownV6 {
				c, err := net.DialUDP("udp6", &net.UDPAddr{IP: net.ParseIP(a)}, &net.UDPAddr{IP: net.ParseIP(ownV6[0]), Port: 9})
				if err != nil {
					return err
				}
				c.Close()
			}
			return nil
		})
		if err != nil {
			return err.Error()
		}
		return ""
	})
	return n
}

// do calls f on a thread that is in the namespace. Sockets that it makes stay
// there.
func (n namespace) do(f func() error) error {
	c := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(n.fd, unix.CLONE_NEWNET); err != nil {
			c <- err
			return
		}
		c <- f()
	}()
	return <-c
}

func (n namespace) table(t testing.TB, o Options) *Table {
	t.Helper()
	o.NetNS = n.fd
	tab, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tab.Close() })
	return tab
}

// listen listens as network ("tcp4", "tcp6", or "tcp" with "[::]" for both).
func (n namespace) listen(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	err := n.do(func() (err error) {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false) // Exim's is plain TCP
		l, err = lc.Listen(context.Background(), network, addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// dial connects from an address, any port, to a server.
func (n namespace) dial(t testing.TB, from, to string) *net.TCPConn {
	t.Helper()
	var c net.Conn
	err := n.do(func() (err error) {
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
		c, err = d.Dial("tcp", to)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.TCPConn)
}

// pair is both ends of a connection.
type pair struct{ server, client *net.TCPConn }

func (p pair) remote() netip.AddrPort {
	a := p.client.LocalAddr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

func (n namespace) connect(t testing.TB, l net.Listener, from, to string) pair {
	t.Helper()
	client := n.dial(t, from, to)
	server, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	return pair{server.(*net.TCPConn), client}
}

// connectMany makes n connections in one go, from addresses 10.66.net.1 on.
func (n namespace) connectMany(t testing.TB, l net.Listener, to string, third byte, count int) []pair {
	t.Helper()
	pairs := make([]pair, 0, count)
	err := n.do(func() error {
		for i := range count {
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 66, third, byte(1+i%250))}, Timeout: 10 * time.Second}
			c, err := d.Dial("tcp", to)
			if err != nil {
				return err
			}
			s, err := l.Accept()
			if err != nil {
				return err
			}
			pairs = append(pairs, pair{s.(*net.TCPConn), c.(*net.TCPConn)})
		}
		return nil
	})
	t.Cleanup(func() {
		for _, p := range pairs {
			// A reset, so that nothing lingers.
			p.client.SetLinger(0)
			p.client.Close()
			p.server.Close()
		}
	})
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		unable(t, "too few file descriptors for %d connections", count)
	}
	if err != nil {
		t.Fatal(err)
	}
	return pairs
}

// eventually waits until ok returns "", and fails with what it says otherwise.
func eventually(t testing.TB, ok func() string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		why := ok()
		if why == "" {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(why)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// text renders what matters of the sockets, for comparison.
func text(s Socket) string {
	return fmt.Sprintf("%v <- %v %v holds=%t", s.Local, s.Remote, s.State, s.Holds())
}
