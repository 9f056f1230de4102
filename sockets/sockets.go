// Package sockets shows who holds the server's SMTP ports now, as the
// kernel sees it, and ends the connections of a prefix.
package sockets

import "net/netip"

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

// Socket is one TCP connection to a local port.
type Socket struct {
	// Local and Remote are unmapped and without zone.
	Local, Remote netip.AddrPort
	State         State
	// Inode is the inode of the socket, 0 if no process has it: it is still
	// in the listen queue, or its process is gone.
	Inode uint32
	// cookie and family of the kernel's answer, to name exactly this socket
	// when it is to be destroyed.
	cookie [2]uint32
	family uint8
	mapped bool
}

// Holds reports whether the connection takes a slot of the server: it is
// open on the server's side and some process has it.
func (s Socket) Holds() bool {
	return s.Inode != 0 && (s.State == Established || s.State == CloseWait)
}
