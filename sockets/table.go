package sockets

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Options say whose sockets to look at, and how. The zero value is right for
// an Exim in our own network namespace.
type Options struct {
	// NetNS is a file descriptor of the network namespace to look into; 0
	// means the caller's own. It must stay open as long as the Table.
	NetNS int
	// ProcRoot is where procfs is mounted; empty means /proc.
	ProcRoot string
	// Programs are the names of the executables that may be sent SIGTERM
	// where the kernel cannot destroy sockets; nil means exim and exim4.
	Programs []string
	// Timeout bounds each exchange with the kernel; 0 means 5 s.
	Timeout time.Duration
	// Patience is how long End waits for processes to end that it has sent
	// SIGTERM; 0 means 3 s. (Exim's children were gone within 0.8 s.)
	Patience time.Duration
	// MaxSockets bounds how many sockets one List returns; 0 means 1,000,000
	// (about 120 MB).
	MaxSockets int
}

// Table is the kernel's table of TCP sockets. Its methods may be called by
// several goroutines; they take turns.
type Table struct {
	o Options

	// turn holds a token while nobody uses the fields below.
	turn   chan struct{}
	closed bool
	conn   *netlink.Conn // nil until first used, and after an error
	raw    syscall.RawConn
	seq    uint32
	in     []byte // for one datagram
	out    []byte // for one request

	// kernelCannot makes the kernel look like one without SOCK_DESTROY.
	kernelCannot bool
}

// datagram is the size of the receive buffer in bytes. The kernel fills it in
// dumps up to 32 KiB (max_recvmsg_len in net/netlink/af_netlink.c), and goes by
// the size of the buffer that it was given last.
const datagram = 64 << 10

// Open returns the socket table. An error says that sock_diag cannot be used
// here at all.
func Open(o Options) (*Table, error) {
	if o.NetNS < 0 {
		return nil, fmt.Errorf("opening the socket table: %d is no file descriptor of a network namespace", o.NetNS)
	}
	o.ProcRoot = cmp.Or(o.ProcRoot, "/proc")
	if o.Programs == nil {
		o.Programs = []string{"exim", "exim4"}
	}
	o.Programs = slices.Clone(o.Programs)
	o.Timeout = cmp.Or(o.Timeout, 5*time.Second)
	o.Patience = cmp.Or(o.Patience, 3*time.Second)
	o.MaxSockets = cmp.Or(o.MaxSockets, 1_000_000)

	t := &Table{o: o, turn: make(chan struct{}, 1), in: make([]byte, datagram)}
	t.turn <- struct{}{}
	if err := t.dial(); err != nil {
		return nil, err
	}
	return t, nil
}

// Close lets go of the netlink socket. Later calls of other methods fail with
// os.ErrClosed; a second Close does nothing.
func (t *Table) Close() error {
	<-t.turn
	defer func() { t.turn <- struct{}{} }()
	t.closed = true
	return t.hangUp()
}

func (t *Table) dial() error {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: t.o.NetNS})
	if err != nil {
		return fmt.Errorf("opening the kernel's socket table: %w", err)
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		conn.Close()
		return fmt.Errorf("opening the kernel's socket table: %w", err)
	}
	// Acknowledgements without a copy of the request: four times smaller.
	// Only Linux before 4.3 refuses, and it has no SOCK_DESTROY.
	_ = conn.SetOption(netlink.CapAcknowledge, true)
	t.conn, t.raw = conn, raw
	return nil
}

func (t *Table) hangUp() error {
	if t.conn == nil {
		return nil
	}
	err := t.conn.Close()
	t.conn, t.raw = nil, nil
	return err
}

// List returns the TCP connections whose local port is one of ports, or all
// if there are none, in no order, of IPv4 and IPv6 and in every state but
// LISTEN; see Socket.Holds for which of them take slots. The kernel walks its
// table while connections come and go: one that exists throughout is seen, one
// that comes or goes meanwhile may be, in rare cases twice.
//
// With an error wrapping ErrTooMany the sockets are some of them.
func (t *Table) List(ctx context.Context, ports []uint16) ([]Socket, error) {
	return t.Append(ctx, nil, ports)
}

// Append is List into a slice that the caller uses again: it appends to dst
// and returns the extended slice, which after an error holds what was read.
func (t *Table) Append(ctx context.Context, dst []Socket, ports []uint16) ([]Socket, error) {
	dst, err := t.dump(ctx, dst, liveStates, ports)
	if err != nil {
		return dst, fmt.Errorf("listing TCP connections: %w", err)
	}
	return dst, nil
}

// Listens reports whether a program listens on one of the ports. Unlike
// Listening it does not ask which, and costs no look at the processes.
func (t *Table) Listens(ctx context.Context, ports []uint16) (bool, error) {
	found, err := t.dump(ctx, nil, 1<<Listen, ports)
	if err != nil {
		return false, fmt.Errorf("listing listening sockets: %w", err)
	}
	return len(found) > 0, nil
}

// dump appends the sockets of both families that are in one of the states and
// on one of the ports.
func (t *Table) dump(ctx context.Context, dst []Socket, states uint32, ports []uint16) ([]Socket, error) {
	bound := len(dst) + t.o.MaxSockets
	var allowed *portSet
	if len(ports) > 0 {
		allowed = newPortSet(ports)
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		var seq uint32
		build := func(b []byte) []byte {
			t.seq++
			seq = t.seq
			return appendDump(b, seq, family, states, ports)
		}
		read := func(m message) (bool, error) {
			if m.seq != seq {
				return false, nil
			}
			switch m.typ {
			case unix.NLMSG_DONE, unix.NLMSG_ERROR:
				if errno := m.status(); errno != 0 {
					return true, errno
				}
				return true, nil
			case unix.NLMSG_OVERRUN:
				return true, unix.ENOBUFS
			case sockDiagByFamily:
				s, ok := parseSocket(m.data)
				if !ok || states&(1<<s.State) == 0 || allowed != nil && !allowed.has(s.Local.Port()) {
					return false, nil
				}
				if len(dst) >= bound {
					return true, fmt.Errorf("more than %d sockets: %w", t.o.MaxSockets, ErrTooMany)
				}
				dst = append(dst, s)
			}
			return false, nil
		}
		err := t.exchange(ctx, build, read)
		if family == unix.AF_INET6 && errors.Is(err, unix.ENOENT) {
			break // a kernel without IPv6
		}
		if err != nil {
			return dst, err
		}
	}
	return dst, nil
}

// exchange sends what build appends to an empty buffer, and hands the messages
// of the answer to read until it says that it has all of them. Both are called
// with the Table in hand. After an error the netlink socket is thrown away,
// with whatever is still on its way to it.
func (t *Table) exchange(ctx context.Context, build func([]byte) []byte, read func(message) (done bool, err error)) (err error) {
	select {
	case <-t.turn:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { t.turn <- struct{}{} }()
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.closed {
		return os.ErrClosed
	}
	if t.conn == nil {
		if err := t.dial(); err != nil {
			return err
		}
	}

	deadline := time.Now().Add(t.o.Timeout)
	callers, ok := ctx.Deadline()
	sooner := ok && callers.Before(deadline)
	if sooner {
		deadline = callers
	}
	conn := t.conn
	if err := conn.SetDeadline(deadline); err != nil {
		t.hangUp()
		return err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer func() {
		// If the function above has begun, its deadline may come at any
		// moment: not into the next exchange.
		if !stop() || err != nil {
			t.hangUp()
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			switch {
			case ctx.Err() != nil:
				err = ctx.Err()
			case sooner: // our timer was a moment ahead of the context's
				err = context.DeadlineExceeded
			default:
				err = fmt.Errorf("no answer from the kernel: %w", err)
			}
		}
	}()

	t.out = build(t.out[:0])
	if err := t.send(t.out); err != nil {
		return err
	}
	for {
		b, err := t.receive()
		if err != nil {
			return err
		}
		for len(b) > 0 {
			var m message
			if m, b, err = nextMessage(b); err != nil {
				return err
			}
			if done, err := read(m); done || err != nil {
				return err
			}
		}
	}
}

func (t *Table) send(b []byte) error {
	var err error
	werr := t.raw.Write(func(fd uintptr) bool {
		for {
			err = unix.Sendto(int(fd), b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
			if err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	})
	return os.NewSyscallError("sendto", cmp.Or(werr, err))
}

// receive returns one datagram from the kernel, valid until the next call.
func (t *Table) receive() ([]byte, error) {
	for {
		var (
			n    int
			from unix.Sockaddr
			err  error
		)
		rerr := t.raw.Read(func(fd uintptr) bool {
			for {
				n, from, err = unix.Recvfrom(int(fd), t.in, unix.MSG_TRUNC)
				if err != unix.EINTR {
					return err != unix.EAGAIN
				}
			}
		})
		if err := cmp.Or(rerr, err); err != nil {
			return nil, os.NewSyscallError("recvfrom", err)
		}
		if n > len(t.in) {
			return nil, fmt.Errorf("%w: datagram of %d bytes", errMalformed, n)
		}
		if sa, ok := from.(*unix.SockaddrNetlink); ok && sa.Pid == 0 {
			return t.in[:n], nil
		} // else some process speaks to us: not the kernel
	}
}

// portSet is a set of ports; every number has its bit.
type portSet [1 << 16 / 64]uint64

func newPortSet(ports []uint16) *portSet {
	var s portSet
	for _, p := range ports {
		s[p/64] |= 1 << (p % 64)
	}
	return &s
}

func (s *portSet) has(p uint16) bool { return s[p/64]&(1<<(p%64)) != 0 }

// Listener is a TCP socket that waits for connections.
type Listener struct {
	// Addr is where it listens, unmapped; the unspecified address is every
	// address ([::] usually also every IPv4 one).
	Addr  netip.AddrPort
	Inode uint32
	// Processes have the socket open, as far as procfs shows it to us.
	Processes []Process
}

// Listening returns what listens on the ports, or on any port if there are
// none, with the processes that do. No Listener and no error: nothing listens
// in this network namespace. The processes cost a walk through procfs: not
// for every second. If that walk fails the listeners are returned with its
// error.
func (t *Table) Listening(ctx context.Context, ports []uint16) ([]Listener, error) {
	socks, err := t.dump(ctx, nil, 1<<Listen, ports)
	if err != nil {
		return nil, fmt.Errorf("listing listening TCP sockets: %w", err)
	}
	var (
		inodes    []uint32
		listeners []Listener
	)
	for _, s := range socks {
		listeners = append(listeners, Listener{Addr: netip.AddrPortFrom(s.Local.Addr().Unmap(), s.Local.Port()), Inode: s.Inode})
		inodes = append(inodes, s.Inode)
	}
	owners, err := t.Owners(ctx, inodes)
	for i := range listeners {
		listeners[i].Processes = owners[listeners[i].Inode]
	}
	slices.SortFunc(listeners, func(a, b Listener) int { return a.Addr.Compare(b.Addr) })
	return listeners, err
}
