package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	goiptables "github.com/coreos/go-iptables/iptables"
	"golang.org/x/sys/unix"
)

// The two implementations of the iptables commands, which keep their rules in
// different places of the kernel and know nothing of each other's.
const (
	xtNFT    = "nft"
	xtLegacy = "legacy"
)

// xtOutputMax bounds what of a command's complaint goes into an error.
const xtOutputMax = 400

// xtables are the commands of one family: reading through go-iptables,
// changing through the restore command, as only that changes chain and jump at
// once. Either waits for the lock of the legacy commands.
type xtables struct {
	v6      bool
	path    string // of iptables or ip6tables
	variant string // xtNFT or xtLegacy
	version string // as in 1.8.9
	netNS   int
	timeout time.Duration
	ipt     *goiptables.IPTables
}

var xtVersion = regexp.MustCompile(`v(\d+\.\d+\.\d+)(?: \((\w+)\))?`)

// notInstalledError says that there is no such command.
type notInstalledError struct{ command string }

func (e *notInstalledError) Error() string {
	return fmt.Sprintf("the command %s is not installed", e.command)
}

// findXtables finds a command, by its name or path, and asks what it is.
func findXtables(ctx context.Context, command string, v6 bool, netNS int, timeout time.Duration) (*xtables, error) {
	path, err := lookSbin(command)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, &notInstalledError{command})
	}
	x := &xtables{v6: v6, path: path, netNS: netNS, timeout: timeout}
	out, err := x.run(ctx, "", path, "--version")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	m := xtVersion.FindStringSubmatch(out)
	if m == nil {
		return nil, fmt.Errorf("%w: %s --version says %.80q", ErrUnavailable, path, out)
	}
	x.version, x.variant = m[1], xtLegacy
	if m[2] == "nf_tables" {
		x.variant = xtNFT
	}
	proto := goiptables.ProtocolIPv4
	if v6 {
		proto = goiptables.ProtocolIPv6
	}
	x.ipt, err = goiptables.New(goiptables.Path(path), goiptables.IPFamily(proto), goiptables.Timeout(x.waitSeconds()))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return x, nil
}

// lookSbin finds a command also where a daemon's PATH may not lead.
func lookSbin(command string) (string, error) {
	path, err := exec.LookPath(command)
	if err != nil && !strings.Contains(command, "/") {
		for _, dir := range []string{"/usr/sbin/", "/sbin/", "/usr/local/sbin/"} {
			if p, e := exec.LookPath(dir + command); e == nil {
				return p, nil
			}
		}
	}
	return path, err
}

// String names the command for people: "iptables 1.8.9 (nft)".
func (x *xtables) String() string {
	name := "iptables"
	if x.v6 {
		name = "ip6tables"
	}
	return name + " " + x.version + " (" + x.variant + ")"
}

func (x *xtables) waitSeconds() int { return max(1, int(x.timeout/time.Second)) }

// list gives the rules of a chain as iptables -S writes them, counters as
// "-c PACKETS BYTES"; none and no error if there is no such chain, or one that
// holds what iptables cannot show.
func (x *xtables) list(ctx context.Context, table, chain string, counters bool) ([]string, error) {
	lines, err := inNetNS(ctx, x.netNS, x.timeout+time.Second, func() ([]string, error) {
		if counters {
			return x.ipt.ListWithCounters(table, chain)
		}
		return x.ipt.List(table, chain)
	})
	var e *goiptables.Error
	if errors.As(err, &e) && e.ExitStatus() == 1 { // the texts differ, the status does not
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(lines, func(line string) bool { return !strings.HasPrefix(line, "-") }), nil // warnings
}

// restore changes a table in one transaction, leaving alone what script does
// not name. Counters in it ("[1:2] -A ...") are kept. If test is set it is
// only checked.
func (x *xtables) restore(ctx context.Context, table, script string, test bool) error {
	args := []string{"--noflush", "--counters", "--wait", strconv.Itoa(x.waitSeconds())}
	if test {
		args = append(args, "--test")
	}
	_, err := x.run(ctx, "*"+table+"\n"+script+"COMMIT\n", x.path+"-restore", args...)
	return err
}

// run runs a command in the network namespace and gives its standard output.
func (x *xtables) run(ctx context.Context, stdin, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, x.timeout+2*time.Second) // it waits for the lock by itself
	defer cancel()
	return inNetNS(ctx, x.netNS, x.timeout+4*time.Second, func() (string, error) {
		var out, complaint bytes.Buffer
		cmd := exec.CommandContext(ctx, path, args...)
		cmd.WaitDelay = time.Second
		cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &complaint
		if err := cmd.Run(); err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return "", fmt.Errorf("%s: %w%s", path, err, complaintText(complaint.String()))
		}
		return out.String(), nil
	})
}

// complaintText is what a command had to say about its failure, in one line.
func complaintText(s string) string {
	var lines []string
	for line := range strings.Lines(s) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "#") && !strings.HasPrefix(line, "Try `") {
			lines = append(lines, line)
		}
	}
	if s = strings.Join(lines, "; "); len(s) > xtOutputMax {
		s = strings.ToValidUTF8(s[:xtOutputMax], "") + "..."
	}
	if s != "" {
		s = ": " + s
	}
	return s
}

// legacyTables are the tables that exist in the legacy variant, by the
// kernel's list of one family; asking the commands would make them.
func (x *xtables) legacyTables(ctx context.Context) ([]string, error) {
	file := "/proc/thread-self/net/ip_tables_names"
	if x.v6 {
		file = "/proc/thread-self/net/ip6_tables_names"
	}
	data, err := inNetNS(ctx, x.netNS, x.timeout, func() ([]byte, error) { return os.ReadFile(file) })
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return strings.Fields(string(data)), err
}

// has tells whether a table is there without making it.
func (x *xtables) has(ctx context.Context, table string) (bool, error) {
	if x.variant != xtLegacy {
		return true, nil // listing a table makes none
	}
	tables, err := x.legacyTables(ctx)
	return slices.Contains(tables, table), err
}

// other gives the commands of the other variant if they are installed, and nil
// if not.
func (x *xtables) other(ctx context.Context) *xtables {
	name := "iptables-"
	if x.v6 {
		name = "ip6tables-"
	}
	if x.variant == xtLegacy {
		name += xtNFT
	} else {
		name += xtLegacy
	}
	o, err := findXtables(ctx, name, x.v6, x.netNS, x.timeout)
	if err != nil || o.variant == x.variant {
		return nil
	}
	return o
}

// rules counts the rules that the variant of x holds in all its tables; -1
// for some, of which the number is not known.
func (x *xtables) rules(ctx context.Context) int {
	if x.variant == xtLegacy {
		if tables, err := x.legacyTables(ctx); err != nil || len(tables) == 0 {
			return 0
		}
	}
	out, err := x.run(ctx, "", x.path+"-save")
	if err != nil {
		return -1
	}
	n := 0
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "-A ") {
			n++
		}
	}
	return n
}

// inNetNS runs f on a thread inside the network namespace, from where it
// starts commands, or anywhere if netNS is 0. If f is not done within d, or ctx
// ends, it is left behind.
func inNetNS[T any](ctx context.Context, netNS int, d time.Duration, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	if err := ctx.Err(); err != nil {
		return result{}.value, err
	}
	done := make(chan result, 1)
	go func() {
		var r result
		if netNS != 0 {
			// Never unlocked: the thread ends with the goroutine.
			runtime.LockOSThread()
			if r.err = unix.Setns(netNS, unix.CLONE_NEWNET); r.err != nil {
				done <- r
				return
			}
		}
		r.value, r.err = f()
		done <- r
	}()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case r := <-done:
		return r.value, r.err
	case <-timer.C:
		return result{}.value, fmt.Errorf("no answer within %v: %w", d, os.ErrDeadlineExceeded)
	case <-ctx.Done():
	}
	timer.Reset(2 * time.Second) // a command that is killed takes a moment
	select {
	case r := <-done:
		return r.value, errors.Join(ctx.Err(), r.err)
	case <-timer.C:
		return result{}.value, ctx.Err()
	}
}

// mayUseXtables tells whether commands that are started from here can do their
// work: without CAP_NET_RAW they cannot ask the kernel which matches and sets
// it has, and those of the legacy variant cannot do anything.
func mayUseXtables() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return true // the commands will tell
	}
	const want = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW
	return data[0].Effective&want == want
}

// kernelHasIPv6 tells whether there can be IPv6 packets.
func kernelHasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return !errors.Is(err, os.ErrNotExist)
}
