package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// eximConfig is all that Exim needs to take mail for one domain and throw it
// away. Written for 4.96; nothing in it is newer than 4.80.
const eximConfig = `# Made for one run of the laboratory.
primary_hostname = %[1]s
keep_environment =
spool_directory = %[2]s/spool
log_file_path = %[2]s/%%slog
pid_file_path = %[2]s/exim.pid
daemon_smtp_ports = %[3]d
smtp_accept_max = %[4]d
smtp_receive_timeout = %[5]ds
smtp_connect_backlog = %[6]d
%[7]shost_lookup =
rfc1413_query_timeout = 0s
tls_advertise_hosts =
# Deliveries stay in the process that has the mail, as its own user: Exim
# need not run itself again, for which it would refuse this file.
deliver_drop_privilege = true
acl_smtp_rcpt = rcpt

begin acl

rcpt:
  accept domains = %[8]s
  deny message = relay not permitted

begin routers

discard:
  driver = redirect
  data = :blackhole:
`

// startExim starts the Exim that is installed, with a configuration of our
// own. Nothing outside the world's directory is touched: started by root with
// -C, and with deliver_drop_privilege, Exim needs no trusted file.
func (w *World) startExim(ctx context.Context, o MTAOptions) (*MTA, error) {
	program, err := eximProgram()
	if err != nil {
		return nil, err
	}
	if w.loopback {
		return nil, fmt.Errorf("%w: it would need a namespace", ErrNoExim)
	}
	dir := w.Path("exim")
	uid, gid, err := eximUser(ctx, program)
	if err != nil {
		return nil, err
	}
	if !mapped(uid) {
		return nil, fmt.Errorf("%w: it changes to the user with uid %d, who does not exist in this user namespace", ErrNoExim, uid)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chown(dir, uid, gid); err != nil {
		return nil, err
	}
	selector := ""
	if o.Selector != "" {
		selector = "log_selector = " + o.Selector + "\n"
	}
	config := w.Path("exim.conf")
	text := fmt.Sprintf(eximConfig, hostName, dir, SMTPPort, o.Slots, int(o.ReceiveTimeout.Seconds()), backlog, selector, mailDomain)
	if err := os.WriteFile(config, []byte(text), 0o644); err != nil {
		return nil, err
	}

	var said output
	cmd := exec.Command(program, "-C", config, "-bdf")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TZ=" + os.Getenv("TZ")}
	if os.Getenv("TZ") == "" {
		cmd.Env = cmd.Env[:1]
	}
	cmd.Stdout, cmd.Stderr = &said, &said
	// A group of its own: all children of Exim can be named by it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := w.Start(cmd); err != nil {
		return nil, fmt.Errorf("starting Exim: %w", err)
	}
	pid := cmd.Process.Pid
	w.keeper.watch(pid)
	ended := make(chan struct{})
	go func() {
		cmd.Wait()
		close(ended)
	}()
	m := &MTA{Kind: "exim", Log: dir + "/mainlog", Slots: o.Slots}
	m.stop = sync.OnceFunc(func() {
		syscall.Kill(-pid, syscall.SIGKILL)
		<-ended
		waitGroupGone(pid)
		w.keeper.forget(pid)
	})
	version, err := eximListens(ctx, m.Log, ended)
	if err != nil {
		m.stop()
		return nil, fmt.Errorf("starting Exim: %w%s", err, said.suffix())
	}
	m.About = "Exim " + version
	return m, nil
}

// eximProgram finds Exim, by Debian's name or by its own.
func eximProgram() (string, error) {
	for _, name := range []string{"exim4", "exim", "/usr/sbin/exim4", "/usr/sbin/exim"} {
		if p, err := exec.LookPath(name); err == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: neither exim4 nor exim is installed", ErrNoExim)
}

// eximUser asks Exim as whom it runs.
func eximUser(ctx context.Context, program string) (uid, gid int, err error) {
	// With a configuration of no lines: Debian's package is not always set
	// up, and a broken one is none of our business.
	out, err := exec.CommandContext(ctx, program, "-C", "/dev/null", "-bP", "exim_user", "exim_group").Output()
	if err != nil {
		return 0, 0, fmt.Errorf("%w: asking %s for its user: %w", ErrNoExim, program, err)
	}
	uid, gid = -1, -1
	for line := range strings.Lines(string(out)) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " = ")
		switch name {
		case "exim_user":
			if u, err := user.Lookup(value); err == nil {
				value = u.Uid
			}
			uid, err = strconv.Atoi(value)
		case "exim_group":
			if g, err := user.LookupGroup(value); err == nil {
				value = g.Gid
			}
			gid, err = strconv.Atoi(value)
		}
		if err != nil {
			return 0, 0, fmt.Errorf("%w: it runs as %q, who is unknown", ErrNoExim, value)
		}
	}
	if uid < 0 || gid < 0 {
		return 0, 0, fmt.Errorf("%w: it does not tell its user and group", ErrNoExim)
	}
	return uid, gid, nil
}

// mapped reports whether a uid exists in this process's user namespace.
func mapped(uid int) bool {
	table, err := os.ReadFile("/proc/self/uid_map")
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(table)) {
		var first, outside, n int
		if _, err := fmt.Sscan(line, &first, &outside, &n); err == nil && first <= uid && uid-first < n {
			return true
		}
	}
	return false
}

// eximListens waits until Exim has logged that it listens, and returns its
// version.
func eximListens(ctx context.Context, log string, ended <-chan struct{}) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	for {
		text, err := os.ReadFile(log)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		for line := range bytes.Lines(text) {
			// 2026-11-22 19:45:50 exim 4.96 daemon started: pid=11193, ...
			if f := bytes.Fields(line); len(f) > 5 && string(f[2]) == "exim" && string(f[4]) == "daemon" && string(f[5]) == "started:" {
				return string(f[3]), nil
			}
		}
		select {
		case <-ended:
			return "", errors.New("it ended at once")
		case <-ctx.Done():
			return "", fmt.Errorf("it does not come up: %w", ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// waitGroupGone waits a little until no process of the group is left.
func waitGroupGone(pgid int) {
	for range 200 {
		if syscall.Kill(-pgid, 0) == syscall.ESRCH {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// output keeps the first 2 KB of what a program says.
type output struct {
	mu   sync.Mutex
	text []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p[:min(len(p), 2048-len(o.text))]...)
	return len(p), nil
}

func (o *output) suffix() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.text) == 0 {
		return ""
	}
	return ": it said: " + strings.TrimSpace(string(o.text))
}
