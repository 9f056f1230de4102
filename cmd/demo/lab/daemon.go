package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// DaemonOptions are flags of `smtpguard run`; what is empty is not given.
type DaemonOptions struct {
	Program  string // path of the smtpguard binary
	Mode     string
	Backend  string
	Confirm  string
	Capacity int
	// Policy is the text of the policy; "" means every setting at its
	// default.
	Policy string
}

// Daemon is smtpguard at work beside the mail server of a world, or the
// traces of one that has ended: its store and its log stay.
type Daemon struct {
	w       *World
	o       DaemonOptions
	mta     *MTA
	cmd     *exec.Cmd
	stderr  *os.File
	started time.Time

	stop  sync.Once
	ended chan struct{}
	err   error // of Wait; read it after ended
}

// StartDaemon starts the real smtpguard in the server's network and returns
// when it answers on its socket. A second call with the same world starts it
// again on the same store. The daemon's own words are in DaemonLog.
func (w *World) StartDaemon(ctx context.Context, m *MTA, o DaemonOptions) (*Daemon, error) {
	d := &Daemon{w: w, o: o, mta: m, ended: make(chan struct{})}
	text := o.Policy
	if text == "" {
		text = "mode: observe\n"
	}
	if err := os.WriteFile(w.Path("policy.yaml"), []byte(text), 0o644); err != nil {
		return nil, err
	}
	args := []string{"--policy", w.Path("policy.yaml"), "run", "--log", m.Log, "--store", w.Path("smtpguard.db"), "--socket", w.Path("smtpguard.sock")}
	for flag, value := range map[string]string{"--mode": o.Mode, "--backend": o.Backend, "--confirm": o.Confirm} {
		if value != "" {
			args = append(args, flag, value)
		}
	}
	if o.Capacity > 0 {
		args = append(args, "--capacity", fmt.Sprint(o.Capacity))
	}
	var err error
	if d.stderr, err = os.OpenFile(w.Path("daemon.log"), os.O_CREATE|os.O_APPEND|os.O_RDWR, 0o644); err != nil {
		return nil, err
	}
	d.cmd = exec.Command(o.Program, args...)
	d.cmd.Stdout, d.cmd.Stderr = d.stderr, d.stderr
	d.cmd.Env = quietEnv()
	// A group of its own: Ctrl-C on the terminal is for the laboratory,
	// which then stops the daemon in order.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	d.started = time.Now()
	if err := w.Start(d.cmd); err != nil {
		d.stderr.Close()
		return nil, fmt.Errorf("starting %s: %w", o.Program, err)
	}
	go func() {
		d.err = d.cmd.Wait()
		d.stderr.Close()
		close(d.ended)
	}()
	w.atClose(func() { d.Stop() })
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		if _, err = d.Command(ctx, "--json", "status"); err == nil {
			return d, nil
		}
		select {
		case <-d.ended:
			return nil, fmt.Errorf("smtpguard ended at once (%v): %s", d.err, w.lastWords())
		case <-ctx.Done():
			d.Stop()
			return nil, fmt.Errorf("smtpguard does not answer: %w; %s", err, w.lastWords())
		case <-time.After(30 * time.Millisecond):
		}
	}
}

// quietEnv is the environment without what would steer smtpguard.
func quietEnv() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "SMTPGUARD_") && !strings.HasPrefix(e, "NOTIFY_SOCKET=") && !strings.HasPrefix(e, "JOURNAL_STREAM=") {
			env = append(env, e)
		}
	}
	return env
}

// DaemonLog is what the daemons of this world have said so far.
func (w *World) DaemonLog() string {
	text, _ := os.ReadFile(w.Path("daemon.log"))
	return string(text)
}

// lastWords are the last lines of DaemonLog.
func (w *World) lastWords() string {
	lines := strings.Split(strings.TrimSpace(w.DaemonLog()), "\n")
	return strings.Join(lines[max(0, len(lines)-3):], "; ")
}

// PID is the daemon's process.
func (d *Daemon) PID() int { return d.cmd.Process.Pid }

// Stop ends the daemon in order. It may be called more than once, and after
// Kill.
func (d *Daemon) Stop() error {
	d.stop.Do(func() {
		d.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.ended:
		case <-time.After(15 * time.Second):
			d.cmd.Process.Kill()
			<-d.ended
			d.err = errors.New("it did not end within 15 s of SIGTERM")
		}
	})
	<-d.ended
	return d.err
}

// Kill ends the daemon as a power cut would.
func (d *Daemon) Kill() {
	d.cmd.Process.Kill()
	<-d.ended
}

// Command runs a command of smtpguard against the daemon, as an operator
// does, and returns what it printed. The error has what it said on stderr.
func (d *Daemon) Command(ctx context.Context, args ...string) (string, error) {
	var out, errs bytes.Buffer
	global := []string{"--policy", d.w.Path("policy.yaml"), "--socket", d.w.Path("smtpguard.sock"), "--store", d.w.Path("smtpguard.db")}
	cmd := exec.CommandContext(ctx, d.o.Program, append(global, args...)...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.Env = quietEnv()
	if err := d.w.Run(cmd); err != nil {
		return out.String(), fmt.Errorf("smtpguard %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

// Block is a block as `smtpguard --json blocks list` shows it, as far as the
// laboratory looks at it.
type Block struct {
	ID      uint64        `json:"id"`
	Prefix  netip.Prefix  `json:"prefix"`
	Reason  string        `json:"reason"`
	Offence int           `json:"offence"`
	Since   time.Time     `json:"since"`
	Until   time.Time     `json:"until"`
	State   string        `json:"state"`
	Ended   int           `json:"ended"`
	Relief  time.Duration `json:"relief_ns"`
}

// Blocks asks the daemon what is blocked.
func (d *Daemon) Blocks(ctx context.Context) ([]Block, error) {
	out, err := d.Command(ctx, "--json", "blocks", "list")
	if err != nil {
		return nil, err
	}
	var list []Block
	for line := range strings.Lines(out) {
		var b Block
		if err := json.Unmarshal([]byte(line), &b); err != nil {
			return nil, fmt.Errorf("smtpguard --json blocks list printed %q: %w", line, err)
		}
		list = append(list, b)
	}
	return list, nil
}

// Status is `smtpguard --json status`, as far as the laboratory looks at it.
type Status struct {
	Mode     string `json:"mode"`
	Capacity int    `json:"capacity"`
	Count    int    `json:"count"`
	Blocks   int    `json:"blocks"`
	Logs     []struct {
		Path     string `json:"path"`
		Lines    uint64 `json:"lines"`
		Opens    uint64 `json:"opens"`
		Behind   int64  `json:"bytes_behind"`
		CaughtUp bool   `json:"caught_up"`
	} `json:"logs"`
	Sockets struct {
		Confirm    bool   `json:"confirm"`
		CanDestroy bool   `json:"can_destroy"`
		Why        string `json:"why"`
		Holding    int    `json:"holding"`
	} `json:"sockets"`
	Firewall struct {
		Backend string `json:"backend"`
		Real    bool   `json:"real"`
		Agrees  bool   `json:"agrees"`
		Error   string `json:"error"`
	} `json:"firewall"`
	Counters struct {
		Verdicts    uint64 `json:"verdicts"`
		Blocked     uint64 `json:"blocked"`
		Unconfirmed uint64 `json:"unconfirmed"`
		Refused     uint64 `json:"refused"`
		Failed      uint64 `json:"failed"`
		Ended       uint64 `json:"connections_ended"`
	} `json:"counters"`
	Warnings []string `json:"warnings"`
}

// Status asks the daemon how it is.
func (d *Daemon) Status(ctx context.Context) (Status, error) {
	var s Status
	out, err := d.Command(ctx, "--json", "status")
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("smtpguard --json status printed something else: %w", err)
	}
	return s, nil
}
