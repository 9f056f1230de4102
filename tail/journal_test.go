package tail

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// journald is a real one, with a journal of its own.
type journald struct {
	t    *testing.T
	cmd  *exec.Cmd
	dir  string // the journal's files
	sock string
	ctl  string // a journalctl that writes down its process id
	pid  string
}

// startJournald runs journald in a mount namespace in which /run and /var/log
// are directories of this test: as a journal namespace, that is without the
// kernel's messages and without the audit socket.
func startJournald(t *testing.T) *journald {
	t.Helper()
	const daemon = "/lib/systemd/systemd-journald"
	ctl, err := exec.LookPath("journalctl")
	if err != nil {
		skip(t, "no journalctl: %v", err)
	}
	if _, err := os.Stat(daemon); err != nil {
		skip(t, "no journald: %v", err)
	}
	if os.Geteuid() != 0 {
		skip(t, "a journald needs root")
	}
	dir, err := os.MkdirTemp("", "jd") // short: the path of a socket
	must(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	must(t, os.MkdirAll(filepath.Join(dir, "run", "systemd", "journal"), 0o755))
	must(t, os.MkdirAll(filepath.Join(dir, "log", "journal"), 0o755))
	j := &journald{t: t, sock: filepath.Join(dir, "run/systemd/journal.lab/dev-log"),
		ctl: filepath.Join(dir, "ctl"), pid: filepath.Join(dir, "pid")}
	must(t, os.WriteFile(j.ctl, fmt.Appendf(nil, "#!/bin/sh\necho $$ >%[1]s.new && mv %[1]s.new %[1]s\nexec %[2]s \"$@\"\n", j.pid, ctl), 0o755))
	var said bytes.Buffer
	j.cmd = exec.Command("/bin/sh", "-c", `mount --bind "$0/run" /run && mount --bind "$0/log" /var/log && exec `+daemon+` lab`, dir)
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS} // made private by the runtime
	j.cmd.Stderr = &said
	if err := j.cmd.Start(); err != nil {
		skip(t, "no mount namespace: %v", err)
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = j.cmd.Wait() }()
	t.Cleanup(func() {
		_ = j.cmd.Process.Signal(syscall.SIGTERM)
		<-done
	})
	until(t, "journald's socket", func() bool {
		select {
		case <-done:
			t.Fatalf("journald ended: %s", said.String())
		default:
		}
		_, err := os.Stat(j.sock)
		return err == nil
	})
	j.log("smtpguard", "the first message of all")
	until(t, "the journal", func() bool {
		found, _ := filepath.Glob(filepath.Join(dir, "log/journal/*.lab/system.journal"))
		if len(found) == 1 {
			j.dir = filepath.Dir(found[0])
		}
		return len(found) == 1
	})
	return j
}

// log sends messages as syslog(3) does.
func (j *journald) log(tag string, messages ...string) {
	j.t.Helper()
	c, err := net.Dial("unixgram", j.sock)
	must(j.t, err)
	defer c.Close()
	for _, m := range messages {
		_, err := c.Write([]byte("<22>Nov 22 19:45:54 " + tag + "[77]: " + m))
		must(j.t, err)
	}
}

func (j *journald) follow(from Position, start Start) *got {
	g := &got{t: j.t}
	var told told
	j.t.Cleanup(func() {
		if j.t.Failed() {
			j.t.Logf("from %q: %s", from.Cursor, told.String())
		}
	})
	g.run(func() {
		g.err = FollowJournal(g.ctx, from, JournalOptions{
			Options: Options{Start: start, Log: told.logger()}, Identifiers: []string{"exim", "exim4"}, Program: j.ctl, Directory: j.dir}, g.emit)
	})
	return g
}

// messages are the lines without their heads.
func (g *got) messages() []string {
	lines, _ := g.snapshot()
	for i, l := range lines {
		_, lines[i], _ = strings.Cut(l, ": ")
	}
	return lines
}

func (g *got) wantMessages(want []string) {
	g.t.Helper()
	for end := time.Now().Add(deadline); g.count() < len(want) && time.Now().Before(end); time.Sleep(time.Millisecond) {
	}
	if got := g.messages(); !slices.Equal(got, want) {
		g.t.Fatalf("%d messages, want %d\n got %s\nwant %s", len(got), len(want), show(got), show(want))
	}
}

func TestJournal(t *testing.T) {
	t.Parallel()
	j := startJournald(t)
	var all []string
	write := func(n int) {
		for range n {
			m := numbered(len(all))
			j.log("exim", m)
			all = append(all, m)
		}
	}
	j.log("exim", "before we came")
	until(t, "the journal to have it", func() bool {
		out, _ := exec.Command("journalctl", "-D", j.dir, "-o", "cat", "SYSLOG_IDENTIFIER=exim").Output()
		return string(out) == "before we came\n"
	})
	j.log("sshd", "the last one before")
	until(t, "the journal to have that", func() bool {
		out, _ := exec.Command("journalctl", "-D", j.dir, "-o", "cat", "-n", "1").Output()
		return string(out) == "the last one before\n"
	})
	g := j.follow(Position{}, End)
	g.wantCaughtUp()
	g.mu.Lock()
	atStart := g.last.Next
	g.mu.Unlock()
	if atStart.Cursor == "" {
		t.Fatal("where to resume is not told before the first line")
	}
	write(200)
	j.log("sshd", "not wanted")
	j.log("exim4", "by Debian's name")
	all = append(all, "by Debian's name")
	j.log("exim", "raw \xff\r\x1b bytes")
	all = append(all, "raw \xff\r\x1b bytes")
	j.log("exim", strings.Repeat("x", 5000)) // journalctl does not show it
	g.wantMessages(all)
	lines, _ := g.snapshot()
	if l := lines[0]; !strings.HasPrefix(l[19:], ".") || !strings.Contains(l, "Z ") || !strings.Contains(l, " exim[77]: ") {
		t.Errorf("not the form of a syslog line: %q", l)
	}

	// The journal is rotated.
	must(t, j.cmd.Process.Signal(syscall.SIGUSR2))
	until(t, "the rotation", func() bool {
		found, _ := filepath.Glob(j.dir + "/system@*.journal")
		return len(found) > 0
	})
	write(200)
	g.wantMessages(all)

	// journalctl is killed, and what comes meanwhile is read afterwards.
	for range 2 {
		b, err := os.ReadFile(j.pid)
		must(t, err)
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		must(t, err)
		if comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); string(comm) == "journalctl\n" {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		write(100)
		g.wantMessages(all)
	}
	g.stop()
	if g.err != nil {
		t.Error(g.err)
	}

	// While we do not run; from any place on.
	_, next := g.snapshot()
	write(50)
	for _, i := range []int{-1, 0, 150, 201, 202, 300, len(next) - 1} {
		from := atStart
		if i >= 0 {
			from = next[i]
		}
		rest := j.follow(from, End)
		rest.wantMessages(all[i+1:])
		rest.wantCaughtUp()
		rest.stop()
		rest.wantMessages(all[i+1:])
	}

	// The files with our place are gone: on with what is there.
	found, err := filepath.Glob(j.dir + "/system@*.journal")
	must(t, err)
	for _, f := range found {
		must(t, os.Remove(f))
	}
	rest := j.follow(next[10], End)
	rest.wantMessages(all[202:])
	rest.stop()

	// A damaged place is told; nothing is read twice.
	rest = j.follow(Position{Cursor: "s=rubbish"}, End)
	until(t, "a new place", func() bool {
		rest.mu.Lock()
		defer rest.mu.Unlock()
		return len(rest.last.Next.Cursor) > 20
	})
	write(1)
	rest.wantMessages(all[len(all)-1:])
	rest.stop()

	// All between two times.
	var read []string
	must(t, ReadJournal(t.Context(), time.Now().Add(-time.Hour), time.Now(),
		JournalOptions{Identifiers: []string{"exim"}, Directory: j.dir}, func(b Batch) error {
			for _, l := range b.Lines {
				_, m, _ := strings.Cut(string(l.Text), ": ")
				read = append(read, m)
			}
			return nil
		}))
	if !slices.Equal(read, all[202:]) {
		t.Errorf("read %s", show(read))
	}
}

// A journalctl that is not there, or fails, is tried again.
func TestJournalFails(t *testing.T) {
	dir := t.TempDir()
	ctl := filepath.Join(dir, "journalctl")
	var told told
	g := &got{t: t}
	g.run(func() {
		g.err = FollowJournal(g.ctx, Position{}, JournalOptions{
			Options: Options{Log: told.logger()}, Identifiers: []string{"exim"}, Program: ctl}, g.emit)
	})
	g.wantCaughtUp()
	until(t, "a warning", func() bool { return told.count("cannot read the journal") == 1 })
	long := strings.Repeat("y", maxEntry)
	must(t, os.WriteFile(filepath.Join(dir, "out"), []byte(
		`not json`+"\n"+
			`{"__CURSOR":"s=1","__REALTIME_TIMESTAMP":"1795391899887453","MESSAGE":"`+long+`"}`+"\n"+
			`{"__CURSOR":"s=2","__REALTIME_TIMESTAMP":"1795391899887453","_HOSTNAME":"mx","SYSLOG_IDENTIFIER":"exim","_PID":"5","MESSAGE":"one"}`+"\n"), 0o600))
	// Following, it stays until it is told to end.
	must(t, os.WriteFile(ctl+".new", fmt.Appendf(nil, "#!/bin/sh\ncase \"$*\" in *-f*) exec sleep 60;; *--cursor*) exit 0;; esac\ncat %s/out\n", dir), 0o755))
	must(t, os.Rename(ctl+".new", ctl))
	g.want("2026-11-22T23:58:19.887453Z mx exim[5]: one")
	g.stop()
	if g.err != nil {
		t.Error(g.err)
	}
	if n := told.count("level=WARN"); n > 4 {
		t.Errorf("%d warnings:\n%s", n, told.String())
	}
}

func TestJournalEmitFails(t *testing.T) {
	ctl := filepath.Join(t.TempDir(), "journalctl")
	must(t, os.WriteFile(ctl, []byte("#!/bin/sh\necho '{\"__CURSOR\":\"s=2\",\"__REALTIME_TIMESTAMP\":\"1\",\"MESSAGE\":\"one\"}'\nexec sleep 60\n"), 0o755))
	want := fmt.Errorf("no room")
	if err := FollowJournal(context.Background(), Position{}, JournalOptions{Identifiers: []string{"exim"}, Program: ctl},
		func(Batch) error { return want }); err != want {
		t.Errorf("FollowJournal returned %v, want emit's %v", err, want)
	}
}

func TestEntry(t *testing.T) {
	const head = `{"__CURSOR":"s=1;i=2","__REALTIME_TIMESTAMP":"1795391899887453",`
	for in, want := range map[string]string{
		head + `"_HOSTNAME":"mx","SYSLOG_IDENTIFIER":"exim","SYSLOG_PID":"77","MESSAGE":"one"}`:   "2026-11-22T23:58:19.887453Z mx exim[77]: one",
		head + `"_HOSTNAME":"mx","SYSLOG_IDENTIFIER":"exim","_PID":"78","MESSAGE":[111,255,110]}`: "2026-11-22T23:58:19.887453Z mx exim[78]: o\xffn",
		head + `"MESSAGE":["first",[50]],"SYSLOG_IDENTIFIER":["exim","x"],"SYSLOG_PID":"x"}`:      "2026-11-22T23:58:19.887453Z localhost exim: first",
		head + `"MESSAGE":[[111,110],"x"],"_HOSTNAME":"a b","SYSLOG_IDENTIFIER":"e[1]: x"}`:       "2026-11-22T23:58:19.887453Z localhost -: on",
		head + `"_SOURCE_REALTIME_TIMESTAMP":"1795391899000001","MESSAGE":"x\ny"}`:                "2026-11-22T23:58:19.000001Z localhost -: x y",
		head + `"_SOURCE_REALTIME_TIMESTAMP":"1","MESSAGE":""}`:                                   "2026-11-22T23:58:19.887453Z localhost -: ",
		head + `"MESSAGE":null}`:                         "",
		head + `"MESSAGE":[1,256]}`:                      "",
		head + `"MESSAGE":[[[1]]]}`:                      "",
		head + `"MESSAGE":{"a":1}}`:                      "",
		`{"__REALTIME_TIMESTAMP":"1","MESSAGE":"x"}`:     "error",
		`{"__CURSOR":"a b","__REALTIME_TIMESTAMP":"1"}`:  "error",
		`{"__CURSOR":"s=1","__REALTIME_TIMESTAMP":"-1"}`: "error",
		`{"__CURSOR":"s=1"}`:                             "error",
		`[]`:                                             "error",
		``:                                               "error",
	} {
		e, err := parseEntry([]byte(in))
		got := ""
		if err != nil {
			got = "error"
		} else if e.message != nil {
			got = string(e.line())
		}
		if got != want {
			t.Errorf("%s\n got %q\nwant %q", in, got, want)
		}
	}
}

func FuzzEntry(f *testing.F) {
	f.Add([]byte(`{"__CURSOR":"s=1;i=2","__REALTIME_TIMESTAMP":"1795391899887453","_HOSTNAME":"mx","SYSLOG_IDENTIFIER":"exim","SYSLOG_PID":"77","MESSAGE":"one"}`))
	f.Add([]byte(`{"__CURSOR":"s=1","__REALTIME_TIMESTAMP":"1","MESSAGE":[[1,2],null]}`))
	f.Add([]byte(`{"__CURSOR":"s=1","__REALTIME_TIMESTAMP":"999999999999999999","MESSAGE":[ [ [1]]]}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := parseEntry(in)
		if err != nil || e.message == nil {
			return
		}
		line := e.line()
		if bytes.ContainsRune(line, '\n') || !cursorForm.MatchString(e.cursor) {
			t.Fatalf("%q: line %q, cursor %q", in, line, e.cursor)
		}
		// The head cannot be forged: what the message is begins after the
		// first ": ".
		head, rest, ok := bytes.Cut(line, []byte(": "))
		if !ok || len(bytes.Fields(head)) != 3 || !bytes.Equal(rest, bytes.ReplaceAll(e.message, []byte("\n"), []byte(" "))) {
			t.Fatalf("%q: line %q", in, line)
		}
		var any map[string]any
		if json.Unmarshal(in, &any) != nil {
			t.Fatalf("%q is no object, and was taken", in)
		}
	})
}
