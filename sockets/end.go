package sockets

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// How the connections of a prefix were ended: Ended.Method.
const (
	MethodNone    = ""        // there were none, or nothing could be done
	MethodDestroy = "destroy" // SOCK_DESTROY
	MethodSignal  = "signal"  // SIGTERM to the processes that own them
)

// Ended tells what End has done.
type Ended struct {
	// Destroyed connections are gone (some of them perhaps by themselves).
	Destroyed int
	// Signalled processes were sent SIGTERM.
	Signalled int
	// Left are the connections that are still there.
	Left int
	// Method is one of the Method constants.
	Method string
}

const (
	// endRounds is how often End looks and destroys. A connection that was
	// between two states when it was listed goes in the second round; after
	// that only what still gets through the packet filter is left.
	endRounds = 4
	// lookAgain is the pause between two rounds.
	lookAgain = 10 * time.Millisecond
	// signalPoll is the pause between two looks whether processes have ended.
	signalPoll = 50 * time.Millisecond
)

// End ends the connections that come from the prefixes to the local ports,
// those in the listen queue included, and looks again until none is left or a
// few rounds have not helped; Ended.Left says how many there are then. The
// prefixes must be blocked in the packet filter already: otherwise their peers
// take the slots again at once. Many prefixes cost hardly more than one.
//
// Where sockets cannot be destroyed, SIGTERM goes to the processes that own
// them, if they are among Options.Programs and do not listen on one of the
// ports themselves. That does not help against a peer that never reads: Exim
// then hangs in a write and only notes the signal. If so some are left, the
// error wraps ErrCannotDestroy or ErrNotPermitted.
func (t *Table) End(ctx context.Context, prefixes []netip.Prefix, ports []uint16) (Ended, error) {
	var ended Ended
	if len(prefixes) == 0 {
		return ended, nil
	}
	fail := func(err error) (Ended, error) {
		of := prefixes[0].String()
		if len(prefixes) > 1 {
			of = fmt.Sprintf("%d prefixes", len(prefixes))
		}
		return ended, fmt.Errorf("ending the connections of %s: %w", of, err)
	}
	sources, err := newPrefixSet(prefixes)
	if err != nil {
		return fail(err)
	}
	if len(ports) == 0 {
		// Every port would mean our own connections to there, too.
		return fail(errors.New("no local ports given"))
	}
	var socks []Socket
	for round := range endRounds {
		if round > 0 {
			if err := sleep(ctx, lookAgain); err != nil {
				return fail(err)
			}
		}
		if socks, err = t.held(ctx, socks[:0], sources, ports); err != nil {
			return fail(err)
		}
		ended.Left = len(socks)
		if len(socks) == 0 {
			return ended, nil
		}
		n, err := t.Destroy(ctx, socks)
		ended.Destroyed += n
		ended.Left -= n
		if n > 0 {
			ended.Method = MethodDestroy
		}
		if errors.Is(err, ErrCannotDestroy) || errors.Is(err, ErrNotPermitted) {
			if serr := t.endBySignal(ctx, sources, ports, &ended); serr != nil {
				return fail(errors.Join(err, serr))
			}
			if ended.Left > 0 {
				return fail(fmt.Errorf("%d are left: %w", ended.Left, err))
			}
			return ended, nil
		}
		if err != nil {
			return fail(err)
		}
	}
	if socks, err = t.held(ctx, socks[:0], sources, ports); err != nil {
		return fail(err)
	}
	ended.Left = len(socks)
	return ended, nil
}

// held appends the connections from the sources to the ports that hold a slot
// or are about to. If there are too many sockets to look at, those that were
// looked at must do: the next round sees others.
func (t *Table) held(ctx context.Context, dst []Socket, sources *prefixSet, ports []uint16) ([]Socket, error) {
	dst, err := t.Append(ctx, dst, ports)
	if err != nil && !errors.Is(err, ErrTooMany) {
		return dst, err
	}
	return slices.DeleteFunc(dst, func(s Socket) bool {
		return !s.endable() || !sources.contains(s.Remote.Addr())
	}), nil
}

// endBySignal sends SIGTERM to the processes that hold connections of the
// sources, each once, until no connection is left or the patience is at its
// end. It keeps ended.Signalled, Left and Method.
func (t *Table) endBySignal(ctx context.Context, sources *prefixSet, ports []uint16, ended *Ended) error {
	// With the procfs of another PID namespace the numbers in it are other
	// processes here.
	if self, err := os.Readlink(filepath.Join(t.o.ProcRoot, "self")); err != nil {
		return fmt.Errorf("looking for the processes that own them: %w", err)
	} else if self != strconv.Itoa(os.Getpid()) {
		return fmt.Errorf("looking for the processes that own them: %s shows another PID namespace", t.o.ProcRoot)
	}
	var (
		deadline  time.Time // from the first signals on
		signalled = make(map[int]bool)
		socks     []Socket
		refused   error
	)
	for {
		var err error
		if socks, err = t.held(ctx, socks[:0], sources, ports); err != nil {
			return err
		}
		if ended.Left = len(socks); ended.Left == 0 {
			return nil
		}
		if !deadline.IsZero() && !time.Now().Before(deadline) {
			return refused
		}
		if refused, err = t.signalOwners(ctx, socks, ports, signalled); err != nil {
			return err
		}
		if ended.Signalled = len(signalled); ended.Signalled > 0 {
			ended.Method = MethodSignal
		}
		if deadline.IsZero() {
			deadline = time.Now().Add(t.o.Patience)
		}
		if err := sleep(ctx, min(signalPoll, max(time.Until(deadline), 0))); err != nil {
			return err
		}
	}
}

// signalOwners sends SIGTERM to the owners of the sockets that have not had
// it. refused is what the kernel said of a process that it did not let us
// signal.
func (t *Table) signalOwners(ctx context.Context, socks []Socket, ports []uint16, signalled map[int]bool) (refused, err error) {
	o := ownership{held: make(map[uint32]bool), listening: make(map[uint32]bool)}
	for _, s := range socks {
		if s.Inode != 0 {
			o.held[s.Inode] = true
		}
	}
	if len(o.held) == 0 {
		return nil, nil
	}
	listeners, err := t.dump(ctx, nil, 1<<Listen, ports)
	if err != nil {
		return nil, err
	}
	for _, l := range listeners {
		o.listening[l.Inode] = true
	}
	err = t.eachProcess(ctx, func(p proc) error {
		if signalled[p.pid] || !t.mayEnd(p, o) {
			return nil
		}
		switch err := t.terminate(p, o); {
		case err == nil:
			signalled[p.pid] = true
		case errors.Is(err, os.ErrProcessDone): // all the better
		default:
			refused = fmt.Errorf("sending SIGTERM to process %d: %w", p.pid, err)
		}
		return nil
	})
	return refused, err
}

// ownership is by which sockets a process is found to be in the way: it has
// one of held and none of listening. Keys are inodes.
type ownership struct{ held, listening map[uint32]bool }

// mayEnd reports whether the process is one of the programs that may be ended,
// has one of the held sockets, and is not the daemon: in the moment between
// accept and fork the daemon has the new connection, too.
func (t *Table) mayEnd(p proc, o ownership) bool {
	if p.pid == 1 || p.pid == os.Getpid() || !t.isProgram(p) {
		return false
	}
	var holds, listens bool
	err := p.eachSocket(func(inode uint32) bool {
		holds = holds || o.held[inode]
		listens = o.listening[inode]
		return !listens
	})
	return err == nil && holds && !listens
}

// isProgram reports whether the process runs one of Options.Programs, by the
// name of its executable, a version behind it left out (exim-4.98-1), or by
// what it was started as.
func (t *Table) isProgram(p proc) bool {
	exe := p.exe()
	if i := strings.Index(exe, "-"); i > 0 && i+1 < len(exe) && exe[i+1] >= '0' && exe[i+1] <= '9' {
		exe = exe[:i]
	}
	return exe != "" && slices.Contains(t.o.Programs, exe) || slices.Contains(t.o.Programs, p.comm())
}

// terminate sends SIGTERM to the process, which mayEnd has found. From when
// the pidfd is open the signal can reach no other process; that the process is
// still the one that was found is looked at once more after it. Before Linux
// 5.3 there is no pidfd, and the look is what stands closest before the
// signal.
func (t *Table) terminate(p proc, o ownership) error {
	fd, err := unix.PidfdOpen(p.pid, 0)
	if err == unix.ESRCH {
		return os.ErrProcessDone
	}
	noPidfd := err == unix.ENOSYS || err == unix.EPERM // a seccomp filter says EPERM
	if err != nil && !noPidfd {
		return os.NewSyscallError("pidfd_open", err)
	}
	if !noPidfd {
		defer unix.Close(fd)
	}
	if !t.mayEnd(p, o) {
		return os.ErrProcessDone
	}
	if noPidfd {
		err = syscall.Kill(p.pid, unix.SIGTERM)
	} else {
		err = unix.PidfdSendSignal(fd, unix.SIGTERM, nil, 0)
	}
	if err == unix.ESRCH {
		return os.ErrProcessDone
	}
	return err
}

// prefixSet is a set of prefixes. Looking up costs a map access for each length
// of prefix that is in it, of which there are few.
type prefixSet struct {
	prefixes map[netip.Prefix]bool
	lengths  [2][]int // of IPv4 and of IPv6
}

func newPrefixSet(prefixes []netip.Prefix) (*prefixSet, error) {
	s := prefixSet{prefixes: make(map[netip.Prefix]bool, len(prefixes))}
	for _, p := range prefixes {
		if !p.IsValid() || p.Addr().Is4In6() {
			return nil, fmt.Errorf("%v is not a prefix of IPv4 or IPv6", p)
		}
		s.prefixes[p.Masked()] = true
		of := &s.lengths[family(p.Addr())]
		if !slices.Contains(*of, p.Bits()) {
			*of = append(*of, p.Bits())
		}
	}
	return &s, nil
}

func (s *prefixSet) contains(a netip.Addr) bool {
	for _, n := range s.lengths[family(a)] {
		if p, err := a.Prefix(n); err == nil && s.prefixes[p] {
			return true
		}
	}
	return false
}

// family is 0 for an address of IPv4 and 1 for one of IPv6.
func family(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// sleep waits, or returns the error of ctx if that ends first.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
