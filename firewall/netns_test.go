package firewall

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// TestMain runs the tests of somebody who is not root once more in a user
// namespace of their own, where they may make network namespaces. Where that
// is forbidden the tests that need it say so.
//
// The test binary is also the stand-in for csf.
func TestMain(m *testing.M) {
	if root := os.Getenv(fakeCSFRoot); root != "" {
		os.Exit(fakeCSF(root, os.Args[1:]))
	}
	if root := os.Getenv(killMe); root != "" {
		toBeKilled(root)
	}
	// They wait for packets that do not come more than they work.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	const again = "SMTPGUARD_TEST_IN_USERNS"
	if os.Geteuid() == 0 || os.Getenv(again) != "" {
		// The usual lock is one for all namespaces, and for whoever else runs
		// iptables on this machine.
		lock := filepath.Join(os.TempDir(), fmt.Sprintf("smtpguard-xtables-%d.lock", os.Getpid()))
		if err := os.Setenv("XTABLES_LOCKFILE", lock); err != nil {
			panic(err)
		}
		code := m.Run()
		_ = os.Remove(lock) // not there if no test needed it
		os.Exit(code)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), again+"=1", "XTABLES_LOCKFILE="+os.TempDir()+"/xtables.lock")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		os.Exit(m.Run())
	}
	_ = cmd.Wait() // the state tells
	os.Exit(cmd.ProcessState.ExitCode())
}

// cannot skips a test that this machine cannot run; in CI it has to.
func cannot(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// netNS is a network namespace of a test.
type netNS struct {
	t  testing.TB
	fd int
}

func newNetNS(t testing.TB) netNS {
	t.Helper()
	type made struct {
		fd  int
		err error
	}
	ch := make(chan made)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ch <- made{err: err}
			return
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		ch <- made{fd, err}
	}()
	m := <-ch
	if m.err != nil {
		cannot(t, "no network namespace can be made here: %v", m.err)
	}
	t.Cleanup(func() { unix.Close(m.fd) })
	ns := netNS{t, m.fd}
	ns.handle(func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return err
		}
		return h.LinkSetUp(lo)
	})
	return ns
}

// do runs f on a thread inside the namespace.
func (ns netNS) do(f func() error) error {
	ch := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := unix.Setns(ns.fd, unix.CLONE_NEWNET); err != nil {
			ch <- err
			return
		}
		ch <- f()
	}()
	return <-ch
}

func (ns netNS) handle(f func(*netlink.Handle) error) {
	ns.t.Helper()
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.fd))
	if err != nil {
		ns.t.Fatal(err)
	}
	defer h.Close()
	if err := f(h); err != nil {
		ns.t.Fatal(err)
	}
}

// run runs a command inside and gives its output.
func (ns netNS) run(command string, args ...string) string {
	ns.t.Helper()
	return ns.pipe("", command, args...)
}

func (ns netNS) pipe(stdin, command string, args ...string) string {
	ns.t.Helper()
	path, err := exec.LookPath(command)
	if err != nil {
		cannot(ns.t, "%s is not installed", command)
	}
	var out bytes.Buffer
	err = ns.do(func() error {
		cmd := exec.Command(path, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &out
		return cmd.Run()
	})
	if err != nil {
		ns.t.Fatalf("%s %s: %v\n%s", command, strings.Join(args, " "), err, &out)
	}
	return out.String()
}

func (ns netNS) nft(script string) string {
	ns.t.Helper()
	return ns.pipe(script, "nft", "-f", "-")
}

// wire joins the namespaces by a veth pair, with addresses at each end.
func wire(t testing.TB, a, b netNS, addrsA, addrsB []string) {
	t.Helper()
	wireAs(t, "veth", a, b, addrsA, addrsB)
}

// wireAs is wire with another name for both ends.
func wireAs(t testing.TB, name string, a, b netNS, addrsA, addrsB []string) {
	t.Helper()
	a.handle(func(h *netlink.Handle) error {
		return h.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name, PeerNamespace: netlink.NsFd(b.fd),
		})
	})
	up := func(ns netNS, addrs []string) {
		ns.handle(func(h *netlink.Handle) error {
			link, err := h.LinkByName(name)
			if err != nil {
				return err
			}
			for _, text := range addrs {
				addr, err := netlink.ParseAddr(text)
				if err != nil {
					return err
				}
				if addr.IP.To4() == nil {
					addr.Flags = unix.IFA_F_NODAD
				}
				if err := h.AddrAdd(link, addr); err != nil {
					return fmt.Errorf("%s: %w", text, err)
				}
			}
			return h.LinkSetUp(link)
		})
	}
	up(a, addrsA)
	up(b, addrsB)
}

// echo is a server that sends back what it gets, until the test ends.
func (ns netNS) echo(addr string) {
	ns.t.Helper()
	var l net.Listener
	err := ns.do(func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	})
	if err != nil {
		ns.t.Fatal(err)
	}
	ns.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
}

// dial connects from a source address, within a time.
func (ns netNS) dial(from, to string, within time.Duration) (net.Conn, error) {
	var c net.Conn
	err := ns.do(func() (err error) {
		d := net.Dialer{Timeout: within, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(from), 0))}
		c, err = d.DialContext(context.Background(), "tcp", to)
		return err
	})
	return c, err
}

// refused tells whether connects from an address are dropped, and proves it:
// one is begun, then another address, which is not blocked, makes the same way
// and arrives. What was sent before has then arrived too, or never will. An
// error means that nothing is proved.
func (ns netNS) refused(from, neighbour, addr string) (refused bool, err error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return false, err
	}
	sockaddr := func(a netip.AddrPort) unix.Sockaddr {
		if a.Addr().Is4() {
			return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
		}
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	err = ns.do(func() error {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(netip.MustParseAddr(from), 0))); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(neighbour), 0))}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			return fmt.Errorf("the neighbour, whom nobody blocks, does not get through either: %w", err)
		}
		c.Close()
		_, err = unix.Getpeername(fd)
		refused = errors.Is(err, unix.ENOTCONN)
		return nil
	})
	return refused, err
}

// echoes tells whether a connection is alive.
func echoes(c net.Conn, within time.Duration) bool {
	_ = c.SetDeadline(time.Now().Add(within))
	if _, err := c.Write([]byte("x")); err != nil {
		return false
	}
	_, err := c.Read(make([]byte, 1))
	return err == nil
}

// flooded has two clients send to a port of ns as fast as they can, until the
// test ends, and counts what arrives from each.
func (ns netNS) flooded(client netNS, to, a, b string) (fromA, fromB func() int64) {
	ns.t.Helper()
	var in net.PacketConn
	if err := ns.do(func() (err error) { in, err = net.ListenPacket("udp", to); return err }); err != nil {
		ns.t.Fatal(err)
	}
	var counts [2]atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for buf := make([]byte, 16); ; {
			_, from, err := in.ReadFrom(buf)
			if err != nil {
				return
			}
			for i, addr := range []string{a, b} {
				if from.(*net.UDPAddr).IP.String() == addr {
					counts[i].Add(1)
				}
			}
		}
	})
	for _, addr := range []string{a, b} {
		var c net.Conn
		err := client.do(func() (err error) {
			d := net.Dialer{LocalAddr: &net.UDPAddr{IP: net.ParseIP(addr)}}
			c, err = d.Dial("udp", to)
			return err
		})
		if err != nil {
			ns.t.Fatal(err)
		}
		wg.Go(func() {
			defer c.Close()
			for {
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Microsecond):
					_, _ = c.Write([]byte("x")) // refused, when the other end is gone
				}
			}
		})
	}
	ns.t.Cleanup(func() { close(stop); in.Close(); wg.Wait() })
	return counts[0].Load, counts[1].Load
}

// more waits until a count grows: something gets through, or nothing is proved.
func more(t testing.TB, count func() int64) {
	t.Helper()
	before := count()
	for end := time.Now().Add(20 * time.Second); count() == before; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody gets through")
		}
	}
}
