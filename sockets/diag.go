package sockets

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// The wire format: struct nlmsghdr of linux/netlink.h, then struct
// inet_diag_req_v2 or inet_diag_msg of linux/inet_diag.h. Numbers are in the
// machine's byte order except ports and addresses, which are in the network's.
const (
	headerLen  = 16
	requestLen = 56 // struct inet_diag_req_v2
	answerLen  = 72 // struct inet_diag_msg; attributes that follow are not read
	idLen      = 48 // struct inet_diag_sockid

	sockDiagByFamily = 20 // SOCK_DIAG_BY_FAMILY, linux/sock_diag.h
	sockDestroy      = 21 // SOCK_DESTROY
	reqBytecode      = 1  // INET_DIAG_REQ_BYTECODE

	bcJump = 1 // INET_DIAG_BC_JMP
	bcGE   = 2 // INET_DIAG_BC_S_GE
	bcLE   = 3 // INET_DIAG_BC_S_LE
)

// maxFilterPorts bounds the program that the kernel runs for each socket. With
// more ports than that all sockets are fetched and the ports compared here.
const maxFilterPorts = 32

// liveStates is the mask of states of connections: all but LISTEN, SYN-SENT
// (never on a port that we serve) and CLOSE.
const liveStates = 1<<Established | 1<<SynRecv | 1<<FinWait1 | 1<<FinWait2 |
	1<<TimeWait | 1<<CloseWait | 1<<LastAck | 1<<Closing

var order = binary.NativeEndian

// appendHeader appends a netlink header for a message with n bytes of payload.
func appendHeader(b []byte, typ, flags uint16, seq uint32, n int) []byte {
	b = order.AppendUint32(b, uint32(headerLen+n))
	b = order.AppendUint16(b, typ)
	b = order.AppendUint16(b, flags|unix.NLM_F_REQUEST)
	b = order.AppendUint32(b, seq)
	return order.AppendUint32(b, 0) // the port number of the sender: the kernel knows
}

// appendDump appends the request for all TCP sockets of a family that are in
// one of the states and, if there are few enough, on one of the ports.
func appendDump(b []byte, seq uint32, family uint8, states uint32, ports []uint16) []byte {
	var program []byte
	if len(ports) <= maxFilterPorts {
		program = portProgram(ports)
	}
	n := requestLen
	if len(program) > 0 {
		n += 4 + len(program)
	}
	b = appendHeader(b, sockDiagByFamily, unix.NLM_F_DUMP, seq, n)
	b = append(b, family, unix.IPPROTO_TCP, 0, 0)
	b = order.AppendUint32(b, states)
	b = append(b, make([]byte, idLen)...)
	if len(program) > 0 {
		b = order.AppendUint16(b, uint16(4+len(program)))
		b = order.AppendUint16(b, reqBytecode)
		b = append(b, program...)
	}
	return b
}

// portProgram returns the filter "local port is one of these" for
// INET_DIAG_REQ_BYTECODE. Each operation says how far to go on yes and on no;
// arriving exactly at the end accepts the socket, four bytes behind it
// rejects. Only GE and LE are used: EQ is younger.
//
//	     S_GE p1  no: next
//	     S_LE p1  no: next
//	     JMP end
//	next: ...
//	     S_GE pn  no: reject
//	     S_LE pn  no: reject
//	end:
func portProgram(ports []uint16) []byte {
	if len(ports) == 0 {
		return nil
	}
	const compare, jump = 8, 4
	size := len(ports)*(2*compare+jump) - jump
	p := make([]byte, 0, size)
	op := func(code uint8, yes int, no int) {
		p = append(p, code, uint8(yes))
		p = order.AppendUint16(p, uint16(no))
	}
	port := func(n uint16) { // the port is in the "no" of a following empty operation
		p = append(p, 0, 0)
		p = order.AppendUint16(p, n)
	}
	for i, n := range ports {
		next := 2*compare + jump // from this S_GE to the next
		if i == len(ports)-1 {
			next = 2*compare + 4 // behind the end: reject
		}
		op(bcGE, compare, next)
		port(n)
		op(bcLE, compare, next-compare)
		port(n)
		if i < len(ports)-1 {
			op(bcJump, jump, size-len(p))
		}
	}
	return p
}

// appendDestroy appends the request to destroy exactly this socket.
//
// The cookie is what makes it exact. Without one (INET_DIAG_NOCOOKIE) the
// kernel looks the addresses up like a packet's: had the connection just
// ended, it would find, and close, the listening socket of the server.
func appendDestroy(b []byte, seq uint32, s Socket) []byte {
	b = appendHeader(b, sockDestroy, unix.NLM_F_ACK, seq, requestLen)
	b = append(b, s.family, unix.IPPROTO_TCP, 0, 0)
	b = order.AppendUint32(b, 1<<s.State)
	b = binary.BigEndian.AppendUint16(b, s.Local.Port())
	b = binary.BigEndian.AppendUint16(b, s.Remote.Port())
	b = s.appendAddr(b, s.Local.Addr())
	b = s.appendAddr(b, s.Remote.Addr())
	b = order.AppendUint32(b, s.ifindex)
	b = order.AppendUint32(b, s.cookie[0])
	return order.AppendUint32(b, s.cookie[1])
}

// appendAddr appends a as the kernel gave it for s, in 16 bytes.
func (s Socket) appendAddr(b []byte, a netip.Addr) []byte {
	if a.Is4() && !s.mapped {
		v4 := a.As4()
		b = append(b, v4[:]...)
		return append(b, make([]byte, 12)...)
	}
	v6 := a.As16() // maps an IPv4 address
	return append(b, v6[:]...)
}

// named reports whether the kernel told us the socket's cookie; the values 0
// and "none" (all ones) name no socket, and "none" names any.
func (s Socket) named() bool {
	const none = ^uint32(0)
	return s.cookie != [2]uint32{} && s.cookie != [2]uint32{none, none}
}

// parseSocket reads a struct inet_diag_msg. The second result is false for
// what is no TCP socket of IPv4 or IPv6.
func parseSocket(b []byte) (Socket, bool) {
	if len(b) < answerLen {
		return Socket{}, false
	}
	s := Socket{
		State:     State(b[1]),
		RecvQueue: order.Uint32(b[56:]),
		SendQueue: order.Uint32(b[60:]),
		Inode:     order.Uint32(b[68:]),
		cookie:    [2]uint32{order.Uint32(b[44:]), order.Uint32(b[48:])},
		ifindex:   order.Uint32(b[40:]),
		family:    b[0],
	}
	var local, remote netip.Addr
	switch s.family {
	case unix.AF_INET:
		local = netip.AddrFrom4([4]byte(b[8:12]))
		remote = netip.AddrFrom4([4]byte(b[24:28]))
	case unix.AF_INET6:
		local = netip.AddrFrom16([16]byte(b[8:24]))
		remote = netip.AddrFrom16([16]byte(b[24:40]))
		s.mapped = local.Is4In6() && remote.Is4In6()
		if s.mapped {
			local, remote = local.Unmap(), remote.Unmap()
		}
	default:
		return Socket{}, false
	}
	s.Local = netip.AddrPortFrom(local, binary.BigEndian.Uint16(b[4:]))
	s.Remote = netip.AddrPortFrom(remote, binary.BigEndian.Uint16(b[6:]))
	return s, true
}

// errMalformed says that an answer is not netlink. It cannot come from a
// kernel that keeps its promises.
var errMalformed = errors.New("malformed netlink answer")

// message is one netlink message of an answer.
type message struct {
	typ  uint16
	seq  uint32
	data []byte // the bytes of the datagram: valid until the next is read
}

// nextMessage splits the first message off a datagram. At the end of it, rest
// is empty.
func nextMessage(b []byte) (m message, rest []byte, err error) {
	if len(b) < headerLen {
		return message{}, nil, fmt.Errorf("%w: %d bytes where a header should be", errMalformed, len(b))
	}
	n := uint64(order.Uint32(b))
	if n < headerLen || n > uint64(len(b)) {
		return message{}, nil, fmt.Errorf("%w: message of %d bytes in %d", errMalformed, n, len(b))
	}
	m = message{typ: order.Uint16(b[4:]), seq: order.Uint32(b[8:]), data: b[headerLen:n]}
	aligned := min((n+3)&^3, uint64(len(b)))
	return m, b[aligned:], nil
}

// status returns the error number that the data of an NLMSG_ERROR or
// NLMSG_DONE begins with: 0 for success, also where there is none (older
// kernels end a dump so).
func (m message) status() syscall.Errno {
	if len(m.data) < 4 {
		return 0
	}
	if n := int32(order.Uint32(m.data)); n < 0 {
		return syscall.Errno(-int64(n))
	}
	return 0
}
