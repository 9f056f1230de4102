package lab

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// conn is a TCP connection from an address of our choice.
type conn struct {
	net.Conn
}

// abort ends the connection at once and leaves no socket behind, not even
// in TIME-WAIT.
func (c conn) abort() {
	if t, ok := c.Conn.(*net.TCPConn); ok {
		t.SetLinger(0)
	}
	c.Close()
}

// dial connects from src (any port) to dst, in the attackers' network. A
// receive buffer of rcvbuf bytes is asked for if it is not 0. It gives up
// after timeout, or when ctx ends.
func (w *World) dial(ctx context.Context, src netip.Addr, dst netip.AddrPort, rcvbuf int, timeout time.Duration) (conn, error) {
	family := unix.AF_INET
	if dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	var fd int
	err := w.attackers.do(func() (err error) {
		fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		return err
	})
	if err != nil {
		return conn{}, fmt.Errorf("socket for %s: %w", src, err)
	}
	if rcvbuf > 0 {
		// Before connect, so that it bounds the window from the start.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, rcvbuf)
	}
	// A whole network is routed here, its addresses are on no interface.
	if family == unix.AF_INET6 {
		err = unix.SetsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
	} else {
		err = unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_FREEBIND, 1)
	}
	if err != nil {
		unix.Close(fd)
		return conn{}, fmt.Errorf("socket for %s: %w", src, err)
	}
	if err = unix.Bind(fd, sockaddr(netip.AddrPortFrom(src, 0))); err == nil {
		err = unix.Connect(fd, sockaddr(dst))
	}
	if err != nil && err != unix.EINPROGRESS {
		unix.Close(fd)
		return conn{}, fmt.Errorf("connecting from %s to %s: %w", src, dst, err)
	}
	f := os.NewFile(uintptr(fd), "tcp") // non-blocking: known to the poller
	defer f.Close()                     // FileConn has a copy
	if err != nil {
		if err = connected(ctx, f, timeout); err != nil {
			return conn{}, fmt.Errorf("connecting from %s to %s: %w", src, dst, err)
		}
	}
	c, err := net.FileConn(f)
	if err != nil {
		return conn{}, fmt.Errorf("connecting from %s to %s: %w", src, dst, err)
	}
	return conn{c}, nil
}

// connected waits until the connect under way on f has an outcome.
func connected(ctx context.Context, f *os.File, timeout time.Duration) error {
	if err := f.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { f.SetDeadline(time.Unix(1, 0)) })()
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// The poller may wake us without need; only a peer or an error counts.
	var outcome error
	err = raw.Write(func(fd uintptr) bool {
		if e, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR); err != nil || e != 0 {
			outcome = syscall.Errno(e)
			if err != nil {
				outcome = err
			}
			return true
		}
		_, err := unix.Getpeername(int(fd))
		return err == nil
	})
	if err == nil {
		err = outcome
	}
	if err != nil && ctx.Err() != nil {
		err = ctx.Err()
	}
	return err
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// socketError reports whether the connection is over, without reading what
// has arrived.
func socketError(c conn) bool {
	t, ok := c.Conn.(*net.TCPConn)
	if !ok {
		return true
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return true
	}
	over := false
	err = raw.Control(func(fd uintptr) {
		p := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(p, 0)
		over = err == nil && n > 0 && p[0].Revents&(unix.POLLERR|unix.POLLHUP) != 0
	})
	return err != nil || over
}
