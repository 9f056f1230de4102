package sockets

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"
)

// inFlight is how many sockets are destroyed with one system call. The
// kernel's answers (about 1 KB of buffer each) must fit into the default
// receive buffer of 208 KiB all at once.
const inFlight = 64

// Destroy ends exactly these connections, as if their peers had reset them:
// the process that has one gets ECONNABORTED from its next or present read or
// write, at once, and the peer gets a reset, if it can be reached. It returns
// how many are gone; one that was gone already counts, one that holds no slot
// and never will (TIME-WAIT, or its process has closed it) is left alone and
// does not. Whoever may reconnect must have been blocked before.
//
// The error wraps ErrCannotDestroy or ErrNotPermitted where no later try can
// do better.
func (t *Table) Destroy(ctx context.Context, socks []Socket) (n int, err error) {
	var (
		batch  = make([]Socket, 0, min(inFlight, len(socks)))
		errs   []error // of different kinds, hence few
		refuse bool    // some were answered with "not supported"
	)
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		answers, err := t.destroy(ctx, batch)
		if err != nil {
			return err
		}
		for i, errno := range answers {
			switch errno {
			case 0, unix.ENOENT:
				n++
			case unix.EPERM, unix.EACCES:
				return ErrNotPermitted
			case unix.EOPNOTSUPP, unix.EINVAL:
				refuse = true
			default:
				if len(errs) < 8 {
					errs = append(errs, fmt.Errorf("connection from %v: %w", batch[i].Remote, errno))
				}
			}
		}
		batch = batch[:0]
		if refuse {
			// Either the kernel cannot at all, or it cannot because this
			// socket has reached TIME-WAIT since it was listed.
			refuse = false
			return t.kernelCan(ctx)
		}
		return nil
	}
	for _, s := range socks {
		if !s.endable() || !s.named() {
			continue
		}
		if batch = append(batch, s); len(batch) == inFlight {
			if err := flush(); err != nil {
				return n, fmt.Errorf("destroying connections: %w", err)
			}
		}
	}
	if err := flush(); err != nil {
		return n, fmt.Errorf("destroying connections: %w", err)
	}
	if err := errors.Join(errs...); err != nil {
		return n, fmt.Errorf("destroying connections: %w", err)
	}
	return n, nil
}

// destroy sends the requests for at most inFlight sockets in one go and
// returns the kernel's answer to each.
func (t *Table) destroy(ctx context.Context, socks []Socket) ([]syscall.Errno, error) {
	answers := make([]syscall.Errno, len(socks))
	if t.kernelCannot {
		for i := range answers {
			answers[i] = unix.EOPNOTSUPP
		}
		return answers, nil
	}
	var (
		first   uint32
		seen    = make([]bool, len(socks))
		waiting = len(socks)
	)
	build := func(b []byte) []byte {
		first = t.seq + 1
		for _, s := range socks {
			t.seq++
			b = appendDestroy(b, t.seq, s)
		}
		return b
	}
	read := func(m message) (bool, error) {
		i := m.seq - first // wraps around as seq does
		if m.typ != unix.NLMSG_ERROR || uint64(i) >= uint64(len(socks)) || seen[i] {
			return false, nil
		}
		seen[i], answers[i] = true, m.status()
		waiting--
		return waiting == 0, nil
	}
	err := t.exchange(ctx, build, read)
	if errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) {
		// SELinux refuses the message, not the socket.
		return nil, fmt.Errorf("%w (%w)", ErrNotPermitted, err)
	}
	return answers, err
}

// kernelCan asks for a socket to be destroyed that does not exist. A kernel
// that knows the request finds none; one that does not says so first. Whether
// we may is only asked for a socket that was found.
func (t *Table) kernelCan(ctx context.Context) error {
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 0)
	answers, err := t.destroy(ctx, []Socket{{Local: nobody, Remote: nobody, State: Established, family: unix.AF_INET}})
	if err != nil {
		return err
	}
	switch answers[0] {
	case unix.ENOENT, 0:
		return nil
	case unix.EOPNOTSUPP, unix.EINVAL:
		return fmt.Errorf("%w (%w)", ErrCannotDestroy, answers[0])
	case unix.EPERM, unix.EACCES:
		return ErrNotPermitted
	}
	return answers[0]
}

// CanDestroy reports whether Destroy will work here. If not, the error says
// why: it wraps ErrCannotDestroy or ErrNotPermitted, or tells why it could not
// be found out. It is tried, on a socket that we listen with for that moment
// on a free port of the loopback interface.
func (t *Table) CanDestroy(ctx context.Context) (bool, error) {
	if err := t.kernelCan(ctx); err != nil {
		return false, fmt.Errorf("trying to destroy a socket: %w", err)
	}
	own, done, err := t.listen(ctx)
	if err != nil {
		// No loopback to try on. Then the capability must do.
		if !hasNetAdmin() {
			return false, fmt.Errorf("trying to destroy a socket: %w", ErrNotPermitted)
		}
		return true, nil
	}
	defer done()
	answers, err := t.destroy(ctx, []Socket{own})
	if err != nil {
		return false, fmt.Errorf("trying to destroy a socket: %w", err)
	}
	switch answers[0] {
	case 0:
		return true, nil
	case unix.EPERM, unix.EACCES:
		return false, fmt.Errorf("trying to destroy a socket: %w", ErrNotPermitted)
	case unix.EOPNOTSUPP, unix.EINVAL:
		return false, fmt.Errorf("trying to destroy a socket: %w (%w)", ErrCannotDestroy, answers[0])
	}
	return false, fmt.Errorf("trying to destroy a socket: %w", answers[0])
}

// listen listens on the loopback interface of the namespace and returns the
// socket as the kernel's table has it.
func (t *Table) listen(ctx context.Context) (s Socket, done func(), err error) {
	for _, lo := range []struct {
		family int
		addr   unix.Sockaddr
	}{
		{unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}},
		{unix.AF_INET6, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}},
	} {
		var c *socket.Conn
		c, err = socket.Socket(lo.family, unix.SOCK_STREAM, unix.IPPROTO_TCP, "probe", &socket.Config{NetNS: t.o.NetNS})
		if err != nil {
			continue
		}
		if s, err = t.listenOn(ctx, c, lo.addr); err == nil {
			return s, func() { c.Close() }, nil
		}
		c.Close()
	}
	return Socket{}, nil, err
}

func (t *Table) listenOn(ctx context.Context, c *socket.Conn, addr unix.Sockaddr) (Socket, error) {
	if err := c.Bind(addr); err != nil {
		return Socket{}, err
	}
	if err := c.Listen(1); err != nil {
		return Socket{}, err
	}
	sa, err := c.Getsockname()
	if err != nil {
		return Socket{}, err
	}
	var local netip.AddrPort
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		local = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
	case *unix.SockaddrInet6:
		local = netip.AddrPortFrom(netip.AddrFrom16(sa.Addr), uint16(sa.Port))
	}
	socks, err := t.dump(ctx, nil, 1<<Listen, []uint16{local.Port()})
	if err != nil {
		return Socket{}, err
	}
	for _, s := range socks {
		if s.Local == local && s.named() {
			return s, nil
		}
	}
	return Socket{}, fmt.Errorf("the kernel does not list our own socket %v", local)
}

// hasNetAdmin reports whether CAP_NET_ADMIN is in our effective set.
func hasNetAdmin() bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	return unix.Capget(&h, &d[0]) == nil && d[0].Effective&(1<<unix.CAP_NET_ADMIN) != 0
}
