// Package sockets shows who holds the server's SMTP ports now, as the
// kernel sees it, and ends the connections of a prefix.
//
// It speaks sock_diag (see sock_diag(7)) over one netlink socket. Showing
// needs no privilege; ending needs CAP_NET_ADMIN and a kernel with
// CONFIG_INET_DIAG_DESTROY, and where either is missing the processes that own
// the connections are asked to end instead.
package sockets

import (
	"errors"
	"net/netip"
	"strconv"
)

// State is the state of a TCP socket as the kernel numbers it
// (include/net/tcp_states.h).
type State uint8

// The states that matter here.
const (
	Established State = 1
	SynRecv     State = 3
	FinWait1    State = 4
	FinWait2    State = 5
	TimeWait    State = 6
	CloseWait   State = 8
	LastAck     State = 9
	Listen      State = 10
	Closing     State = 11
)

var stateNames = [...]string{
	Established: "established", SynRecv: "syn-recv",
	FinWait1: "fin-wait-1", FinWait2: "fin-wait-2", TimeWait: "time-wait",
	CloseWait: "close-wait", LastAck: "last-ack", Listen: "listen", Closing: "closing",
}

// String returns the name of the state as ss(8) takes it, or its number.
func (s State) String() string {
	if int(s) < len(stateNames) && stateNames[s] != "" {
		return stateNames[s]
	}
	return strconv.Itoa(int(s))
}

// Errors that a caller decides on. They are wrapped: use errors.Is.
var (
	// ErrCannotDestroy: this kernel does not know SOCK_DESTROY (it came with
	// Linux 4.5 and is a build option, CONFIG_INET_DIAG_DESTROY).
	ErrCannotDestroy = errors.New("this kernel cannot destroy sockets")
	// ErrNotPermitted: the kernel could, but not for us.
	ErrNotPermitted = errors.New("destroying sockets needs CAP_NET_ADMIN in their network namespace")
	// ErrTooMany: there are more sockets or processes than are looked at.
	// What was returned with it is true, but not all.
	ErrTooMany = errors.New("too many to look at")
)

// Socket is one TCP connection to a local port.
type Socket struct {
	// Local and Remote are unmapped and without zone.
	Local, Remote netip.AddrPort
	State         State
	// Inode is the inode of the socket, 0 if no process has it: it is still
	// in the listen queue, or its process is gone.
	Inode uint32
	// RecvQueue and SendQueue are the bytes that the local process has not
	// read, and those that the peer has not acknowledged. A peer that never
	// reads shows as a SendQueue that stays large.
	RecvQueue, SendQueue uint32

	// What names exactly this socket to the kernel: its cookie, unique for
	// the time that the machine is up, and the other fields of its answer.
	cookie  [2]uint32
	ifindex uint32
	family  uint8
	mapped  bool
}

// Holds reports whether the connection takes a slot of the server: some
// process has it. A half-closed connection does (Exim waits for the client's
// FIN after QUIT); one in the listen queue does not yet, and one whose process
// is gone no longer does.
func (s Socket) Holds() bool {
	if s.Inode == 0 {
		return false
	}
	switch s.State {
	case Established, CloseWait, FinWait1, FinWait2, Closing, LastAck:
		return true
	}
	return false
}

// endable reports whether there is anything to gain from destroying the
// socket: it holds a slot, or it stands in the listen queue and is about to.
//
// What no process has any more (TIME-WAIT, and the FIN states without inode)
// must stay with the kernel: older kernels refuse TIME-WAIT with
// EOPNOTSUPP, and before 6.11 destroying an orphan in FIN-WAIT-1 takes away
// its queue but not the socket, which then has no timer and stays for ever
// (fixed by commit bac76cf89816, "tcp: fix forever orphan socket caused by
// tcp_abort").
func (s Socket) endable() bool {
	switch s.State {
	case Established, CloseWait, SynRecv:
		return true
	}
	return s.Holds()
}
