package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// roleEnv tells a process that the lab started from its own program file
// what it is there for: "keeper", "inner" or "probe".
const roleEnv = "SMTPGUARD_LAB_ROLE"

// Serve does the work of the processes that the lab starts from the program
// file it is part of, and does not return in them; in all others it returns
// at once. It is for programs that need a World only as root: called in an
// init function, it does for them instead of Enter.
func Serve() {
	switch os.Getenv(roleEnv) {
	case "keeper":
		keep()
	case "probe":
		if canUnshare() != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// Enter gets this process what a World needs. It must be called first in
// main or TestMain, before flags are looked at and before any thread matters:
//
//   - as root it only looks whether namespaces can be made;
//   - as anybody else it runs the same program again, with the same
//     arguments, as root of a new user namespace, waits, and exits with its
//     status;
//   - it calls Serve.
//
// The error says why namespaces cannot be had and wraps ErrNoNamespaces; the
// program may then use Options.Loopback.
func Enter() error {
	Serve()
	if os.Getenv(roleEnv) == "inner" {
		os.Unsetenv(roleEnv)
		return errors.Join(loopbackUp(), canUnshare())
	}
	if os.Geteuid() == 0 {
		return canUnshare()
	}
	return enterUserNamespace()
}

// loopbackUp makes 127.0.0.1 work in a new network namespace.
func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("bringing up the loopback: %w", err)
	}
	return nil
}

// canUnshare tries on a thread of its own, which ends with it.
func canUnshare() error {
	err := make(chan error)
	go func() {
		runtime.LockOSThread()
		if e := unix.Unshare(unix.CLONE_NEWNET); e != nil {
			err <- fmt.Errorf("%w: unshare: %w", ErrNoNamespaces, e)
			return
		}
		err <- nil
	}()
	return <-err
}

// enterUserNamespace runs this program again where it is root, and exits. It
// returns only if that is not allowed here.
func enterUserNamespace() error {
	if err := probeUserNamespace(); err != nil {
		return err
	}
	cmd := self("inner", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = userNamespace()
	// Ctrl-C reaches the inner process by itself; what is sent to this one
	// alone is passed on, so that it can clean up.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
	runtime.LockOSThread() // Pdeathsig is about the thread that started it
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%w: user namespace: %w", ErrNoNamespaces, err)
	}
	go func() {
		for s := range signals {
			if s != syscall.SIGINT {
				cmd.Process.Signal(s)
			}
		}
	}()
	err := cmd.Wait()
	var exit *exec.ExitError
	switch {
	case err == nil:
		os.Exit(0)
	case errors.As(err, &exit) && exit.ExitCode() >= 0:
		os.Exit(exit.ExitCode())
	}
	fmt.Fprintln(os.Stderr, "lab:", err)
	os.Exit(1)
	return nil
}

// probeUserNamespace finds out whether a user namespace and network
// namespaces inside can be made: some systems allow the first and not the
// second, so both are tried in a process that does only that.
func probeUserNamespace() error {
	probe := self("probe")
	probe.SysProcAttr = userNamespace()
	if err := probe.Run(); err != nil {
		return fmt.Errorf("%w: not root, and a user namespace is refused: %w", ErrNoNamespaces, err)
	}
	return nil
}

// userNamespace has a network namespace with it: a thread that has looked
// into another one must be allowed back into the process's own.
func userNamespace() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
}

// self is a command that runs this program again in a role.
func self(role string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), roleEnv+"="+role)
	return cmd
}
