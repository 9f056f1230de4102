package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"golang.org/x/sys/unix"
)

// ErrNoNamespaces: this process may not make network namespaces.
var ErrNoNamespaces = errors.New("no network namespaces to be had here")

// errClosed: the world is gone.
var errClosed = errors.New("the lab is closed")

// space is a network namespace with a thread of its own that lives in it.
// The thread is what binds it: sockets, programs and netlink requests belong
// to the namespace of the thread that makes them.
type space struct {
	fd   int // the namespace; -1 if it is the process's own
	jobs chan job
	quit chan struct{}
	done chan struct{}
}

type job struct {
	f   func() error
	err chan<- error
}

// newSpace makes a namespace, or with fresh unset a thread in the one that
// the process is in.
func newSpace(fresh bool) (*space, error) {
	s := &space{fd: -1, jobs: make(chan job), quit: make(chan struct{}), done: make(chan struct{})}
	ready := make(chan error)
	go s.run(fresh, ready)
	if err := <-ready; err != nil {
		return nil, err
	}
	return s, nil
}

func (s *space) run(fresh bool, ready chan<- error) {
	defer close(s.done)
	// Never unlocked: the thread ends with this goroutine, and nobody else
	// ever runs in the wrong network.
	runtime.LockOSThread()
	if fresh {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			ready <- fmt.Errorf("%w: unshare: %w", ErrNoNamespaces, err)
			return
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			ready <- fmt.Errorf("opening the new network namespace: %w", err)
			return
		}
		s.fd = fd
	}
	ready <- nil
	for {
		select {
		case j := <-s.jobs:
			j.err <- j.f()
		case <-s.quit:
			if s.fd >= 0 {
				unix.Close(s.fd)
			}
			return
		}
	}
}

// do calls f on the space's thread and waits for it.
func (s *space) do(f func() error) error {
	err := make(chan error, 1)
	select {
	case s.jobs <- job{f, err}:
		return <-err
	case <-s.done:
		return errClosed
	}
}

// close ends the thread and lets go of the namespace. It is called once.
func (s *space) close() {
	close(s.quit)
	<-s.done
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
