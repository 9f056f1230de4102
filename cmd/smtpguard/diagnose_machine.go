package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/diagnose"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
)

const (
	machineTimeout = 5 * time.Second // for the daemon, and for the socket table
	lastLines      = 3               // of each log that are shown of an Exim that is down
	maxProcesses   = 100_000
)

// lately are the files of a log that may hold lines from a time on, the oldest
// first, and always the newest, or the log itself: an Exim that is down writes
// nothing.
func lately(log string, from time.Time) []string {
	names := filesSince(log, from)
	if fi, err := os.Stat(log); err == nil && fi.Mode().IsRegular() && !slices.Contains(names, log) {
		names = append(names, log)
	}
	if len(names) == 0 {
		all := filesSince(log, time.Time{})
		names = all[max(0, len(all)-1):]
	}
	return names
}

// lookMachine looks what serves Exim's ports now; nil: the logs are not those
// of this machine's Exim, or it cannot be told. names are the files of them
// that are read.
func lookMachine(ctx context.Context, p *policy.Policy, mta exim.Config, mtaErr error, logs, names []string) *diagnose.Machine {
	if errors.Is(mtaErr, exim.ErrNoExim) || p.Confirm == policy.ConfirmOff {
		return nil // Exim is elsewhere
	}
	if mtaErr == nil && !slices.Contains(logs, mta.MainLog) && !slices.Contains(p.Logs, policy.Auto) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, machineTimeout)
	defer cancel()
	t, err := sockets.Open(sockets.Options{})
	if err != nil {
		return nil
	}
	defer t.Close()
	list, err := t.Listening(ctx, p.Ports)
	if err != nil && len(list) == 0 {
		return nil
	}
	m := &diagnose.Machine{Now: time.Now(), Ports: p.Ports, Start: startCommands()}
	m.Daemons, m.Elsewhere = eximDaemons("/proc")
	if !errors.Is(mtaErr, exim.ErrSlow) { // slow is not wrong
		m.ConfigErr = mtaErr
	}
	for _, l := range list {
		if port := l.Addr.Port(); !slices.Contains(m.Listen, port) {
			m.Listen = append(m.Listen, port)
		}
		if len(l.Processes) == 0 {
			m.Programs = append(m.Programs, "") // not shown to us
		}
		for _, q := range l.Processes {
			if !slices.Contains(m.Programs, q.Name) {
				m.Programs = append(m.Programs, q.Name)
			}
		}
	}
	if len(names) == 0 {
		return m
	}
	newest := names[len(names)-1]
	if fi, err := os.Stat(newest); err == nil {
		m.Written = fi.ModTime()
	}
	for _, log := range []string{newest, panicLog(newest)} {
		for _, line := range lastOf(log, lastLines) {
			m.Last = append(m.Last, filepath.Base(log)+": "+line)
		}
	}
	return m
}

// panicLog is the panic log beside a main log (log_file_path has one pattern
// for all): exim_mainlog and exim_paniclog, mainlog and paniclog, main.log and
// panic.log.
func panicLog(mainLog string) string {
	dir, name := filepath.Split(strings.TrimSuffix(mainLog, ".1"))
	return dir + strings.Replace(name, "main", "panic", 1)
}

// lastOf are the last lines of a file of text; none if it cannot be read, or
// is compressed.
func lastOf(path string, n int) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return nil
	}
	const tail = 16 << 10
	text, err := io.ReadAll(io.NewSectionReader(f, max(0, fi.Size()-tail), tail))
	if err != nil || bytes.IndexByte(text, 0) >= 0 {
		return nil
	}
	lines := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
	if fi.Size() > tail {
		lines = lines[1:] // half a line
	}
	lines = lines[max(0, len(lines)-n):]
	return slices.DeleteFunc(lines, func(l string) bool { return l == "" })
}

// eximDaemons are the processes of an Exim that was started to listen (its
// command line has -bd, as have its children), in our network namespace and in
// others.
func eximDaemons(proc string) (here, elsewhere []int) {
	d, err := os.Open(proc)
	if err != nil {
		return nil, nil
	}
	ours, _ := os.Readlink(filepath.Join(proc, "self", "ns", "net"))
	defer d.Close()
	names, _ := d.Readdirnames(maxProcesses)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		comm, err := os.ReadFile(filepath.Join(proc, name, "comm"))
		if err != nil || !bytes.HasPrefix(comm, []byte("exim")) {
			continue
		}
		args, _ := os.ReadFile(filepath.Join(proc, name, "cmdline"))
		for arg := range strings.SplitSeq(string(args), "\x00") {
			if !strings.HasPrefix(arg, "-bd") {
				continue
			}
			if ns, err := os.Readlink(filepath.Join(proc, name, "ns", "net")); err == nil && ns != ours {
				elsewhere = append(elsewhere, pid)
			} else {
				here = append(here, pid)
			}
			break
		}
	}
	slices.Sort(here)
	slices.Sort(elsewhere)
	return here, elsewhere
}

// startCommands start Exim as this system does.
func startCommands() []string {
	if _, err := os.Stat("/scripts/restartsrv_exim"); err == nil {
		return []string{"`/scripts/restartsrv_exim`, and if it does not stay: `tail -50 /var/log/exim_paniclog`, `journalctl -u exim -n 50`."}
	}
	unit := "exim"
	if _, err := exec.LookPath("exim4"); err == nil {
		unit = "exim4"
	}
	return []string{"`systemctl restart " + unit + "`, and if it does not stay: `journalctl -u " + unit + " -n 50`."}
}

// guarding is what smtpguard does here now: advice to block depends on it.
func guarding(c *cli.Context, p *policy.Policy) diagnose.Guarding {
	g := diagnose.Guarding{PolicyMode: string(p.Mode), PolicyFile: c.String("policy")}
	ctx, cancel := context.WithTimeout(c.Context, machineTimeout)
	defer cancel()
	cl, err := control.Dial(ctx, p.Control.Socket)
	if err != nil {
		return g
	}
	defer cl.Close()
	if s, err := cl.Status(ctx); err == nil {
		g.Mode = s.Mode
	}
	return g
}
