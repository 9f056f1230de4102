package control

import (
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How many connections the daemon answers at a time: each costs a goroutine
// and its buffers. Those of the socket's group cannot take root's.
const (
	connectionsMost = 64
	othersMost      = 32
)

// full is what one more is told.
var full = func() []byte {
	const body = `{"error":"too many connections to the daemon's socket are open"}`
	return fmt.Appendf(nil, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
}()

// limited turns away the connections beyond connectionsMost.
type limited struct {
	net.Listener
	all, others atomic.Int32
}

func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			return c, nil
		}
		others := new(atomic.Int32)
		if cred, err := credentials(u); err != nil || cred.Uid != 0 {
			others = &l.others
		}
		counts := &counted{UnixConn: u, free: sync.OnceFunc(func() { l.all.Add(-1); others.Add(-1) })}
		if all, o := l.all.Add(1), others.Add(1); all > connectionsMost || o > othersMost {
			_ = u.SetWriteDeadline(time.Now().Add(time.Second)) // it fits into an empty buffer
			_, _ = u.Write(full)
			_ = counts.Close()
			continue
		}
		return counts, nil
	}
}

// counted is a connection that counts until it is closed.
type counted struct {
	*net.UnixConn
	free func()
}

func (c *counted) Close() error {
	defer c.free()
	return c.UnixConn.Close()
}

// credentials names the user at the other end, by the kernel's word.
func credentials(c syscall.Conn) (cred *unix.Ucred, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	if ctlErr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); ctlErr != nil {
		return nil, ctlErr
	}
	return cred, err
}
