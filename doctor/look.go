package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
)

// Options of Look.
type Options struct {
	Policy     *policy.Policy // nil if PolicyErr
	PolicyPath string
	PolicyErr  error
	// FindLogs finds the logs of a policy as the daemon does.
	FindLogs func(*policy.Policy, exim.Config, error) ([]string, error)
	// Advice is what keeps abuse reports from being good, with the mail server
	// set so, or with one that could not be asked; nil: nothing does.
	Advice func(exim.Config, error) []string
	// SSHConnection is the value of $SSH_CONNECTION.
	SSHConnection string
	// Root is where the file system begins: "" is /. Other firewalls and
	// panels are looked for below it.
	Root string
}

const (
	statusTimeout = 10 * time.Second // for the daemon's answer
	maxCheckStore = 256 << 20        // bytes of a store that is read as a whole
	maxSmallFile  = 64 << 10
)

// eximSettings are the options of Exim that only doctor asks for.
var eximSettings = []string{"smtp_accept_reserve", "smtp_reserve_hosts", "smtp_load_reserve", "configure_file"}

// Look gathers what can be found out on this machine. It changes nothing and
// fails at nothing: what could not be looked at is in the facts.
func Look(ctx context.Context, o Options) *Facts {
	f := &Facts{Now: time.Now(), Root: os.Geteuid() == 0, Policy: o.Policy, PolicyPath: o.PolicyPath, PolicyErr: o.PolicyErr}
	if f.Policy == nil {
		f.Policy = policy.Default()
	}
	f.System = system(o.Root)
	f.Hostname, _ = os.Hostname()
	f.Exim, f.EximErr = exim.ReadConfig(ctx)
	if f.EximErr == nil {
		f.Settings, _ = exim.Settings(ctx, f.Exim.Path, eximSettings...)
		f.ReserveLocal, f.ReserveErr = exim.InHostList(ctx, f.Exim.Path, f.Settings["smtp_reserve_hosts"], netip.MustParseAddr("127.0.0.1"))
	}
	f.Set, f.SetErr = setIn(o.Root, configFiles(o.Root, f.System, f.Settings["configure_file"]))
	if o.Advice != nil {
		f.Advice = o.Advice(f.Exim, f.EximErr)
	}
	f.lookDaemon(ctx)
	f.lookStore()
	f.lookLogs(o)
	f.lookSockets(ctx)
	f.lookFilter(ctx, o.Root)
	f.lookAllowed(ctx, o.SSHConnection)
	pid := "self"
	if f.Daemon != nil {
		pid = strconv.Itoa(f.Daemon.PID)
	}
	f.Lacks, f.LacksErr = lacks(filepath.Join("/proc", pid, "status"))
	f.Clock = clock()
	f.lookGrowth(ctx)
	f.Now = time.Now() // what was written meanwhile is not from the future
	return f
}

// system tells how Exim is configured, by the files that are there.
func system(root string) System {
	has := func(path string) bool {
		_, err := os.Stat(filepath.Join("/", root, path))
		return err == nil
	}
	switch {
	case has("/usr/local/cpanel/version"):
		return CPanel
	case has("/usr/local/directadmin/conf/directadmin.conf"):
		return DirectAdmin
	case has("/etc/exim4/exim4.conf"):
		return Other // it replaces what Debian makes
	case has("/etc/exim4/update-exim4.conf.conf"):
		text, _ := small(filepath.Join("/", root, "/etc/exim4/update-exim4.conf.conf"))
		if strings.Contains(text, "dc_use_split_config='true'") {
			return DebianSplit
		}
		return Debian
	}
	return Other
}

// small reads a file that must be small.
func small(path string) (string, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxSmallFile {
		return "", fmt.Errorf("%s is not a small file", path)
	}
	b, err := os.ReadFile(path)
	return string(b), err
}

func (f *Facts) lookDaemon(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	cl, err := control.Dial(ctx, f.Policy.Control.Socket)
	if err != nil {
		f.DaemonUp = err
		return
	}
	defer cl.Close()
	s, err := cl.Status(ctx)
	if err != nil {
		f.DaemonUp = err
		return
	}
	f.Daemon = &s
	list, err := cl.Allowed(ctx)
	if err == nil {
		for _, a := range list {
			if !strings.Contains(a.Why, "SSH") {
				f.Allowed = append(f.Allowed, a.Prefix)
			}
		}
	}
}

func (f *Facts) lookStore() {
	s := &f.Store
	s.Path, s.Good = f.Policy.Store.Path, -1
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(s.Path), &st); err == nil && st.Bsize > 0 {
		s.Free = max(1, st.Bavail*uint64(st.Bsize))
	}
	fi, err := os.Stat(s.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		s.Missing, s.Good = true, 0
		return
	case err != nil:
		s.Err = err
		return
	}
	s.Size = fi.Size()
	if f.Daemon != nil {
		s.InUse = true
		return
	}
	db, err := store.Open(s.Path, store.Options{ReadOnly: true})
	if errors.Is(err, store.ErrLocked) {
		s.InUse = true
		return
	}
	if err != nil {
		s.Err = err
		return
	}
	defer db.Close()
	if s.Size <= maxCheckStore {
		if s.Err = db.Check(); s.Err != nil {
			return
		}
	}
	n := 0
	if err := db.Good(func(store.Good) bool { n++; return true }); err == nil {
		s.Good = n
	}
	if list, err := db.AllowList(); err == nil {
		for _, e := range list {
			if e.In(f.Now) {
				f.Allowed = append(f.Allowed, e.Prefix)
			}
		}
	}
}

func (f *Facts) lookLogs(o Options) {
	paths, err := o.FindLogs(f.Policy, f.Exim, f.EximErr)
	if err != nil {
		f.LogErr = err
		return
	}
	for _, path := range paths {
		f.Logs = append(f.Logs, lookLog(path, (&exam{Facts: f}).location()))
	}
}

func (f *Facts) lookSockets(ctx context.Context) {
	s := &f.Sockets
	t, err := sockets.Open(sockets.Options{})
	if err != nil {
		s.Err, s.ListenErr = err, err
		return
	}
	defer t.Close()
	s.CanDestroy, s.Why = t.CanDestroy(ctx)
	list, err := t.Listening(ctx, f.Policy.Ports)
	s.ListenErr = err
	for _, l := range list {
		if p := l.Addr.Port(); !slices.Contains(s.Listen, p) {
			s.Listen = append(s.Listen, p)
		}
		for _, p := range l.Processes {
			if name := bounded(p.Name, 30); !slices.Contains(s.Programs, name) && len(s.Programs) < 3 {
				s.Programs = append(s.Programs, name)
			}
		}
	}
	if len(s.Programs) == 0 {
		s.Programs = []string{"a program"}
	}
	slices.Sort(s.Listen)
}

func (f *Facts) lookFilter(ctx context.Context, root string) {
	w := &f.Filter
	fw, why, err := firewall.Open(ctx, string(f.Policy.Firewall.Backend), firewall.Options{Ports: f.Policy.BlockedPorts(), Hook: string(f.Policy.Firewall.Hook)})
	w.Err, w.Why = err, why
	if err == nil {
		w.Backend = fw.Name()
		_ = fw.Close(ctx, false)
	}
	w.Chains, w.ChainsErr = firewall.Chains(ctx, firewall.Options{})
	f.Others = firewall.Neighbours(root, w.Chains)
	f.CSF, f.CSFErr = firewall.LookCSF(root)
}

func (f *Facts) lookAllowed(ctx context.Context, ssh string) {
	f.Exempt, f.ExemptErr = guard.Self(ctx)
	for _, e := range f.Policy.Allow {
		f.Allowed = append(f.Allowed, e.Prefix)
	}
	if a, ok := guard.SSHPeer(ssh); ok && !a.IsLoopback() {
		f.Peer = a
	}
}

// needed are the capabilities of the daemon, by their numbers
// (linux/capability.h).
var needed = []struct {
	bit  uint
	name string
}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"}}

// lacks reads which of the needed capabilities a process does not have, from
// its status in procfs.
func lacks(path string) ([]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		v, ok := strings.CutPrefix(line, "CapEff:")
		if !ok {
			continue
		}
		caps, err := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		var l []string
		for _, n := range needed {
			if caps&(1<<n.bit) == 0 {
				l = append(l, n.name)
			}
		}
		return l, nil
	}
	return nil, fmt.Errorf("%s has no line CapEff", path)
}

// clock asks the kernel, which NTP programs tell (adjtimex(2)); nothing is
// set.
func clock() Clock {
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return Clock{Err: err}
	}
	return Clock{Synced: state != unix.TIME_ERROR && t.Status&unix.STA_UNSYNC == 0}
}
