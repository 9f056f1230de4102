package abuse

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/store"
)

// killer is a Store that ends the process, as kill -9 does, before or after
// one of its writes.
type killer struct {
	Store
	n, at int
	after bool
}

func (k *killer) SetRecord(kind, key string, value []byte) error {
	k.n++
	if k.n == k.at && !k.after {
		die()
	}
	err := k.Store.SetRecord(kind, key, value)
	if k.n == k.at && k.after {
		die()
	}
	return err
}

func die() {
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {}
}

// sendConfig is what the processes of TestR26_State have in common.
func sendConfig(dir string) Config {
	c := DefaultConfig()
	c.From, c.Dir = "abuse@example.net", filepath.Join(dir, "reports")
	c.Lookup.Online = false
	c.Delivery.Program = filepath.Join(dir, "sendmail")
	return c
}

// TestMain: a process that TestR26_State starts approves and sends one report
// and is killed on the way.
func TestMain(m *testing.M) {
	dir := os.Getenv("SMTPGUARD_ABUSE_SEND")
	if dir == "" {
		os.Exit(m.Run())
	}
	step := os.Getenv("SMTPGUARD_ABUSE_STEP")
	st, err := store.Open(filepath.Join(dir, "db"), store.Options{})
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	k := &killer{Store: st, at: -1}
	if s, ok := strings.CutPrefix(step, "before write "); ok {
		k.at, _ = strconv.Atoi(s)
	} else if s, ok := strings.CutPrefix(step, "after write "); ok {
		k.at, _ = strconv.Atoi(s)
		k.after = true
	}
	d, err := newDesk(Options{Config: sendConfig(dir), Store: k}, time.Now, true)
	if err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	k.n = 0
	d.step = func(s string) {
		if s == step {
			die()
		}
	}
	id := d.Cases()[0].ID
	if _, err := d.showAndApprove(id, "root", Approval{}); err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	if _, err := d.Send(context.Background(), id, "root", SendOptions{}); err != nil {
		fmt.Println(err)
		os.Exit(2)
	}
	os.Exit(0)
}

// TestR26_State kills the process between every two steps of sending, at
// every write to the store, and while the mail program runs. Whatever comes,
// the report is sent once, or not and doubtful, and never twice, however
// often smtpguard starts again.
func TestR26_State(t *testing.T) {
	steps := []string{"none", "approved", "queued", "handed", "noted", "in the mail program, before", "in the mail program, after"}
	for n := range 4 { // the mail and the case approved, queued, and how it ended
		steps = append(steps, fmt.Sprintf("before write %d", n+1), fmt.Sprintf("after write %d", n+1))
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			before, after := "", ""
			switch step {
			case "in the mail program, before":
				before = "kill -9 $PPID\n"
			case "in the mail program, after":
				after = "kill -9 $PPID\n"
			}
			script := "#!/bin/sh\n" + before + "cat >" + dir + "/mail.$$ && mv " + dir + "/mail.$$ " + dir + "/sent.$$\n" + after
			must(0, os.WriteFile(filepath.Join(dir, "sendmail"), []byte(script), 0o755))
			open := func() (*store.Store, *Desk) {
				st, err := store.Open(filepath.Join(dir, "db"), store.Options{Wait: 5 * time.Second})
				if err != nil {
					t.Fatal(err)
				}
				d, err := newDesk(Options{Config: sendConfig(dir), Store: st}, time.Now, true)
				if err != nil {
					t.Fatal(err)
				}
				return st, d
			}
			st, d := open()
			if err := d.Take(blockOf(1, "8.8.8.8/32", time.Now().Add(-time.Hour), 200, 0)); err != nil {
				t.Fatal(err)
			}
			d.Work(t.Context())
			id := d.Cases()[0].ID
			to := "abuse@op.example"
			if _, err := d.Edit(t.Context(), id, "root", Edit{To: &to}); err != nil {
				t.Fatal(err)
			}
			st.Close()

			cmd := exec.Command("/proc/self/exe", "-test.run=^$")
			cmd.Env = append(os.Environ(), "SMTPGUARD_ABUSE_SEND="+dir, "SMTPGUARD_ABUSE_STEP="+step)
			out, err := cmd.CombinedOutput()
			killed := cmd.ProcessState.Sys().(syscall.WaitStatus).Signaled()
			if !killed && err != nil {
				t.Fatalf("%v: %s", err, out)
			}

			sent := func() int { return len(must(filepath.Glob(filepath.Join(dir, "sent.*")))) }
			// The mail program may outlive us.
			for end := time.Now().Add(10 * time.Second); len(must(filepath.Glob(filepath.Join(dir, "mail.*")))) > 0 && time.Now().Before(end); {
				time.Sleep(5 * time.Millisecond)
			}
			var c Case
			for range 3 {
				st, d = open()
				if d.only(t).State == Drafted { // the approval did not reach the disk: a person does it again
					if _, err := d.showAndApprove(id, "root", Approval{}); err != nil {
						t.Fatal(err)
					}
				}
				d.Work(t.Context())
				d.Work(t.Context())
				c = d.only(t)
				st.Close()
			}
			n := sent()
			switch c.State {
			case Sent:
				if n != 1 {
					t.Errorf("it says sent, and %d were", n)
				}
			case Doubtful:
				if n > 1 || !strings.Contains(c.Why, c.Mails[0].MessageID) {
					t.Errorf("doubtful (%s), %d sent", c.Why, n)
				}
			default:
				t.Errorf("%s (%s), %d sent", c.State, c.Why, n)
			}
			if step == "queued" && (c.State != Doubtful || n != 0) || step == "handed" && (c.State != Doubtful || n != 1) ||
				(step == "approved" || step == "noted" || step == "none") && c.State != Sent {
				t.Errorf("%s, %d sent", c.State, n)
			}
			if killed == (step == "none") {
				t.Errorf("killed: %v", killed)
			}
			// A doubtful one goes out again by a person's word only.
			if c.State == Doubtful {
				st, d = open()
				defer st.Close()
				if _, err := d.Send(t.Context(), id, "root", SendOptions{}); !errors.Is(err, ErrDoubtful) {
					t.Errorf("sent without a word: %v", err)
				}
			}
		})
	}
}

func (d *Desk) only(t *testing.T) Case {
	cs := d.Cases()
	if len(cs) != 1 {
		t.Fatalf("%d cases", len(cs))
	}
	return cs[0]
}

// ready is a desk with one approved report.
func ready(t *testing.T, change func(*Config)) (*bench, string) {
	t.Helper()
	c := testConfig(t)
	if change != nil {
		change(&c)
	}
	b := newBench(t, c, Options{})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "root", Approval{}))
	return b, d.ID
}

func TestR28_ShellSafety(t *testing.T) {
	marker := filepath.Join(t.TempDir(), "ran")
	hostile := []string{"a;touch " + marker + "@op.example", "`touch " + marker + "`@op.example", "$(touch " + marker + ")@op.example", "-oQ/tmp@op.example",
		"-C/etc/passwd", "|touch@op.example", "a@op.example -bp", "a@op.example\n-bp", "../../etc@op.example", ":fail:@op.example"}
	b, id := ready(t, nil)
	for _, h := range hostile {
		if _, err := b.Edit(t.Context(), id, "root", Edit{To: &h}); err == nil {
			t.Errorf("%q is taken as a recipient", h)
		}
		if what, err := b.handover(t.Context(), "abuse@example.net", []string{h}, []byte("x")); what != refused || err == nil {
			t.Errorf("%q: %s, %v", h, what, err)
		}
		if what, err := b.handover(t.Context(), h, []string{"a@op.example"}, []byte("x")); what != refused || err == nil {
			t.Errorf("from %q: %s, %v", h, what, err)
		}
	}
	if len(b.sent()) != 0 {
		t.Error("the mail program was run")
	}
	// The text may say anything; it arrives as it is.
	short := "/tmp/smtpguard-ran"
	text := "~! touch " + short + "\n.\n..\nFrom nobody\n-oQ /tmp\n$(touch " + short + ") `touch " + short + "`; x\n"
	if _, err := b.Edit(t.Context(), id, "root", Edit{Text: &text}); err != nil {
		t.Fatal(err)
	}
	must(b.Approve(id, "root", Approval{}))
	must(b.Send(t.Context(), id, "root", SendOptions{}))
	s := b.sent()
	c, _, _ := b.Case(id)
	if want := []string{"-i", "-f", "abuse+" + c.Token + "@example.net", "--", "abuse@op.example"}; len(s) != 1 || !slices.Equal(s[0].args, want) {
		t.Errorf("%+v, want %q", s, want)
	}
	if !strings.Contains(s[0].msg, text) {
		t.Errorf("the text was changed:\n%s", s[0].msg)
	}
	for _, m := range []string{marker, short} {
		if _, err := os.Stat(m); err == nil {
			t.Error("a command was run")
		}
	}
}

func TestSendmailFails(t *testing.T) {
	for _, c := range []struct {
		name, extra string
		change      func(*Config)
		state       State
		why         string
	}{
		{name: "there is none", change: func(c *Config) { c.Delivery.Program = "/nonexistent/sendmail" }, state: Approved, why: "not sent: starting"},
		{name: "it fails", extra: "echo no such configuration >&2; exit 1", state: Doubtful, why: "no such configuration"},
		{name: "it was called wrongly", extra: "echo unknown option >&2; exit 64", state: Approved, why: "did not take it: exit status 64: unknown option"},
		{name: "it hangs", extra: "exec sleep 600", change: func(c *Config) { c.Delivery.Timeout = 300 * time.Millisecond }, state: Doubtful, why: "did not end"},
		{name: "a child holds the pipe", extra: "sleep 30 & exit 0", state: Sent},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, id := ready(t, func(cf *Config) {
				cf.Delivery.Program = fakeSendmail(t, c.extra)
				if c.change != nil {
					c.change(cf)
				}
			})
			_, err := b.Send(t.Context(), id, "root", SendOptions{})
			d, _, _ := b.Case(id)
			if d.State != c.state || !strings.Contains(d.Why, c.why) || (err == nil) != (c.state == Sent) {
				t.Errorf("%s (%s): %v", d.State, d.Why, err)
			}
			if n := len(d.Mails[0].Attempts); n != 1 || d.Mails[0].Attempts[0].Result == "" {
				t.Errorf("attempts %+v", d.Mails[0].Attempts)
			}
			b.Work(t.Context())
			if n := len(b.sent()); n > 1 {
				t.Errorf("%d mails", n)
			}
			// What certainly did not leave is tried again in a while.
			if c.state == Approved {
				b.config.Delivery.Program = fakeSendmail(t, "")
				b.Work(t.Context())
				if len(b.sent()) != 0 {
					t.Error("tried again at once")
				}
				b.pass(time.Hour)
				b.Work(t.Context())
				if c := b.only(); c.State != Sent || len(b.sent()) != 1 {
					t.Errorf("%s, %d sent", c.State, len(b.sent()))
				}
			}
			// A person's word sends a doubtful one again.
			if c.state == Doubtful {
				b.config.Delivery.Program = fakeSendmail(t, "")
				b.pass(25 * time.Hour)
				if d, err := b.Send(t.Context(), id, "root", SendOptions{Again: true}); err != nil || d.State != Sent {
					t.Errorf("%s, %v", d.State, err)
				}
			}
		})
	}
}

func TestTrial(t *testing.T) {
	b, id := ready(t, nil)
	if _, err := b.Send(t.Context(), id, "root", SendOptions{To: "me@example.net"}); err != nil {
		t.Fatal(err)
	}
	c, _, _ := b.Case(id)
	s := b.sent()
	if c.State != Approved || len(s) != 1 || s[0].args[4] != "me@example.net" || len(s[0].args) != 5 || s[0].args[2] != "abuse@example.net" {
		t.Errorf("%s %+v", c.State, s)
	}
	if !strings.Contains(s[0].msg, "\nTo: me@example.net\n") || !strings.Contains(s[0].msg, "X-Smtpguard-Would-To: abuse@op.example\n") || strings.Contains(s[0].msg, "\nTo: abuse@op.example") {
		t.Errorf("header:\n%.500s", s[0].msg)
	}
	if !c.Mails[0].Attempts[0].Trial {
		t.Error("the trial is not noted as one")
	}
	// The real one still goes out by itself, and a trial counts against no cap.
	b.Work(t.Context())
	if c := b.only(); c.State != Sent || len(b.sent()) != 2 {
		t.Errorf("%s, %d sent", c.State, len(b.sent()))
	}

	b, id = ready(t, func(c *Config) { c.Redirect = "lab@example.net" })
	if c, err := b.Send(t.Context(), id, "root", SendOptions{}); err != nil || c.State != Drafted || !strings.Contains(c.Why, "no desk has it") {
		t.Errorf("%s (%s), %v", c.State, c.Why, err)
	}
	b.hours(30)
	if s := b.sent(); len(s) != 1 || !slices.Equal(s[0].args[4:], []string{"lab@example.net"}) {
		t.Errorf("%+v", s)
	}
	// The trial is over: the desk gets what it has not got, and no follow-up.
	b.config.Redirect = ""
	b.hours(2)
	if c := b.only(); c.State != Drafted || len(c.Mails) != 1 || len(b.sent()) != 1 {
		t.Errorf("%s, %d mails, %d sent", c.State, len(c.Mails), len(b.sent()))
	}
	must(b.Approve(id, "root", Approval{}))
	if c, err := b.Send(t.Context(), id, "root", SendOptions{}); err != nil || c.State != Sent {
		t.Errorf("%s, %v", c.State, err)
	}
	if s := b.sent(); len(s) != 2 || !slices.ContainsFunc(s, func(m sentMail) bool {
		return slices.Equal(m.args[4:], []string{"abuse@op.example"}) && !strings.Contains(m.msg, "Follow-up")
	}) {
		t.Errorf("%+v", s)
	}
}

// smtpServer answers one connection by a script: what it says to each
// command, "" for the usual, "close" and "hang" for what they say.
func smtpServer(t *testing.T, script map[string]string) (addr string, got func() string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(10 * time.Second))
		r := bufio.NewReader(c)
		usual := map[string]string{"greeting": "220 mx ESMTP", "EHLO": "250 mx", "MAIL": "250 ok", "RCPT": "250 ok", "DATA": "354 go on", ".": "250 taken", "QUIT": "221 bye"}
		say := func(cmd string) bool {
			s := script[cmd]
			if s == "" {
				s = usual[cmd]
			}
			switch s {
			case "":
				s = "500 what?"
			case "close":
				return false
			case "hang":
				r.ReadByte() // until the other end has enough
				return false
			case "endless":
				for {
					if _, err := c.Write([]byte(strings.Repeat("250-x", 1000) + "\r\n")); err != nil {
						return false
					}
				}
			}
			fmt.Fprintf(c, "%s\r\n", s)
			return true
		}
		if !say("greeting") {
			return
		}
		data := false
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			log.WriteString(line)
			cmd := strings.ToUpper(strings.Fields(line + " x")[0])
			if whole := strings.ToUpper(strings.TrimSpace(line)); script[whole] != "" && !data {
				cmd = whole
			}
			switch {
			case data && line == ".\r\n":
				data, cmd = false, "."
			case data:
				continue
			case cmd == "DATA":
				data = script["DATA"] == ""
			}
			if !say(cmd) {
				return
			}
		}
	}()
	return l.Addr().String(), func() string { <-done; return log.String() }
}

// TestCopyNotTaken: whose copy was not taken has not been told.
func TestCopyNotTaken(t *testing.T) {
	addr, got := smtpServer(t, map[string]string{"RCPT TO:<ABUSE@OP1.EXAMPLE>": "451 greylisted"})
	b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Delivery.By, c.Delivery.Server = SMTP, addr })
	c, _ := b.approved()
	c = must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	if c.State != Sent || !c.told("abuse@op2.example") || c.told("abuse@op1.example") || !strings.Contains(strings.Join(c.Notes, " "), "the copy was not taken") {
		t.Errorf("%s, %+v, %q\n%s", c.State, c.Mails[0].Attempts, c.Notes, got())
	}
	// So it is the next to be written to.
	b.Receive(strings.NewReader(dsn(c.Mails[0].Return, "failed", "5.1.1", "abuse@op2.example", c.Mails[0].MessageID)), "root")
	if next, err := b.Next(c.ID); err != nil || next.Address != "abuse@op1.example" {
		t.Errorf("%+v, %v", next, err)
	}
}

func TestSMTP(t *testing.T) {
	for _, c := range []struct {
		name   string
		script map[string]string
		state  State
	}{
		{"taken", nil, Sent},
		{"no greeting", map[string]string{"greeting": "close"}, Approved},
		{"busy", map[string]string{"greeting": "421 later"}, Approved},
		{"sender refused", map[string]string{"MAIL": "550 no"}, Drafted},
		{"recipient refused", map[string]string{"RCPT": "550 no such user"}, Drafted},
		{"data refused", map[string]string{"DATA": "554 no"}, Drafted},
		{"message refused", map[string]string{".": "550 spam"}, Drafted},
		{"message deferred", map[string]string{".": "451 later"}, Approved},
		{"hangs up after the dot", map[string]string{".": "close"}, Doubtful},
		{"says nothing after the dot", map[string]string{".": "hang"}, Doubtful},
		{"says nonsense after the dot", map[string]string{".": "maybe"}, Doubtful},
		{"hangs up at QUIT", map[string]string{"QUIT": "close"}, Sent},
		{"talks without end", map[string]string{"EHLO": "endless"}, Approved},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			addr, got := smtpServer(t, c.script)
			dir := t.TempDir()
			conf := DefaultConfig()
			conf.From, conf.Dir, conf.Lookup.Online = "abuse@example.net", dir, false
			conf.Delivery = Transport{By: SMTP, Server: addr, Timeout: 5 * time.Second}
			if c.script["."] == "hang" {
				conf.Delivery.Timeout = 300 * time.Millisecond
			}
			d, err := newDesk(Options{Config: conf, Store: newMemStore()}, time.Now, true)
			if err != nil {
				t.Fatal(err)
			}
			if err := d.Take(blockOf(1, "8.8.8.8/32", time.Now().Add(-time.Hour), 200, 0)); err != nil {
				t.Fatal(err)
			}
			d.Work(t.Context())
			id := d.only(t).ID
			to, text := "abuse@op.example", "one\n.\n..two\n"
			must(d.Edit(t.Context(), id, "root", Edit{To: &to, Text: &text}))
			must(d.showAndApprove(id, "root", Approval{}))
			_, err = d.Send(t.Context(), id, "root", SendOptions{})
			if s := d.only(t); s.State != c.state || (err == nil) != (c.state == Sent) {
				t.Errorf("%s (%s): %v", s.State, s.Why, err)
			}
			if c.state == Sent {
				if s := got(); !strings.Contains(s, "RCPT TO:<abuse@op.example>\r\n") || !strings.Contains(s, "one\r\n..\r\n...two\r\n") {
					t.Errorf("the server got\n%s", s)
				}
			}
		})
	}
	// A server elsewhere without TLS gets nothing.
	t.Run("no TLS", func(t *testing.T) {
		addr, _ := smtpServer(t, nil)
		_, port, _ := net.SplitHostPort(addr)
		d := &Desk{config: Config{Delivery: Transport{By: SMTP, Server: "localhost.localdomain:" + port, Timeout: 5 * time.Second}}}
		if what, err := d.handover(t.Context(), "a@example.net", []string{"b@op.example"}, []byte("x")); what != refused || err == nil {
			t.Errorf("%s, %v", what, err)
		}
		if c, err := net.Dial("tcp", addr); err == nil { // end the server where the name did not lead to it
			c.Close()
		}
	})
}

const eximConf = `primary_hostname = mx1.example.net
keep_environment =
spool_directory = %[1]s/spool
log_file_path = %[1]s/%%slog
deliver_drop_privilege = true
qualify_domain = example.net
host_lookup =
begin routers
all:
  driver = accept
  transport = mailbox
begin transports
mailbox:
  driver = appendfile
  file = %[1]s/mailbox
  user = %[2]s
  batch_max = 100
  return_path_add
  envelope_to_add
  delivery_date_add
  no_check_owner
`

// TestExim: the mail that a real Exim takes by its sendmail interface and
// puts into a mailbox is the one that was approved, once, for its recipients.
func TestExim(t *testing.T) {
	skip := t.Skip
	if os.Getenv("CI") == "true" {
		skip = t.Fatal
	}
	program, err := exec.LookPath("exim4")
	if err != nil {
		if program, err = exec.LookPath("exim"); err != nil {
			skip("Exim is not installed")
		}
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil || os.Geteuid() != 0 {
		skip("needs root and unshare")
	}
	name := "Debian-exim"
	u, err := user.Lookup(name)
	if err != nil {
		name = "exim"
		if u, err = user.Lookup(name); err != nil {
			skip("the user that Exim runs as is not known")
		}
	}
	uid, gid := must(strconv.Atoi(u.Uid)), must(strconv.Atoi(u.Gid))
	dir, err := os.MkdirTemp("", "smtpguard-exim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	must(0, os.Chmod(dir, 0o755))
	must(0, os.Chown(dir, uid, gid))
	conf := filepath.Join(dir, "exim.conf")
	must(0, os.WriteFile(conf, fmt.Appendf(nil, eximConf, dir, name), 0o644))
	wrapper := filepath.Join(dir, "sendmail")
	must(0, os.WriteFile(wrapper, fmt.Appendf(nil, "#!/bin/sh\nexec %s -n %s -C %s \"$@\"\n", unshare, program, conf), 0o755))

	b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Delivery.Program = wrapper })
	d, _ := b.drafted()
	text := "Dear desk,\n.\n..\nFrom here on\n~! touch x\n"
	if _, err := b.Edit(t.Context(), d.ID, "root", Edit{Text: &text}); err != nil {
		t.Fatal(err)
	}
	must(b.Approve(d.ID, "root", Approval{}))
	_, approved, _ := b.Case(d.ID)
	if c, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); err != nil || c.State != Sent {
		t.Fatalf("%s (%s): %v\n%s", c.State, c.Why, err, readLogs(dir))
	}
	var got []byte
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		log, _ := os.ReadFile(filepath.Join(dir, "mainlog"))
		if bytes.Contains(log, []byte(" Completed")) {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("it is not delivered:\n%s", readLogs(dir))
		}
	}
	b.Work(t.Context())
	got = must(os.ReadFile(filepath.Join(dir, "mailbox")))
	// mbox: "From " at the beginning, and in the text as ">From ".
	if n := strings.Count("\n"+string(got), "\nFrom "); n != 1 {
		t.Errorf("%d copies:\n%s", n, got)
	}
	_, msg, _ := bytes.Cut(got, []byte("\n"))
	h, ps := parts(t, msg)
	wantH, wantP := parts(t, approved)
	for _, k := range []string{"From", "To", "Cc", "Reply-To", "Subject", "Date", "Message-Id", "Mime-Version", "Content-Type"} {
		if len(h[k]) != 1 || h.Get(k) != wantH.Get(k) {
			t.Errorf("%s: %q, want %q", k, h[k], wantH.Get(k))
		}
	}
	if s := h.Get("Return-Path"); s != "<abuse+"+d.Token+"@example.net>" {
		t.Errorf("envelope from %s", s)
	}
	to := strings.FieldsFunc(h.Get("Envelope-To"), func(r rune) bool { return r == ',' || r == ' ' || r == '\n' })
	slices.Sort(to)
	if !slices.Equal(to, []string{"abuse@op1.example", "abuse@op2.example"}) {
		t.Errorf("envelope to %q", to)
	}
	if h.Get("Sender") != "" || h.Get("Auto-Submitted") != "" || h.Get("Bcc") != "" {
		t.Errorf("headers that nobody approved: %v", h)
	}
	if len(ps) != len(wantP) {
		t.Fatalf("%d parts, want %d", len(ps), len(wantP))
	}
	for i := range ps {
		a := strings.ReplaceAll(strings.ReplaceAll(ps[i].text, "\r\n", "\n"), "\n>From ", "\nFrom ")
		if w := strings.ReplaceAll(wantP[i].text, "\r\n", "\n"); strings.TrimRight(a, "\n") != strings.TrimRight(w, "\n") {
			t.Errorf("part %d (%s) was changed:\n%s\nwant\n%s", i, ps[i].name, a, w)
		}
	}
}

func readLogs(dir string) string {
	var s string
	for _, n := range []string{"mainlog", "paniclog", "rejectlog"} {
		b, _ := os.ReadFile(filepath.Join(dir, n))
		s += n + ":\n" + string(b)
	}
	return s
}

// smtpDesk is a desk that submits to a server, with an approved report.
func smtpDesk(t *testing.T, addr string, cc string) *bench {
	t.Helper()
	c := testConfig(t)
	c.Delivery = Transport{By: SMTP, Server: addr, Timeout: 5 * time.Second}
	b := newBench(t, c, Options{})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	to := "abuse@op.example"
	must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to, Cc: &cc}))
	must(b.Approve(d.ID, "root", Approval{}))
	return b
}

// TestRefused: what is refused for good goes back to a person; what is refused
// for now is tried again, but not for ever; a refused copy keeps nobody else
// from getting the report.
func TestRefused(t *testing.T) {
	t.Run("for good", func(t *testing.T) {
		addr, got := smtpServer(t, map[string]string{"RCPT": "550 5.7.1 relaying denied"})
		b := smtpDesk(t, addr, "")
		b.Work(t.Context())
		c := b.only()
		if c.State != Drafted || !strings.Contains(c.Why, "relaying denied") || c.Mails[0].Approved != "" {
			t.Errorf("%s (%s)", c.State, c.Why)
		}
		if bad, _ := b.bad("abuse@op.example"); bad {
			t.Error("our own server's word marks the desk")
		}
		got()
		for range 50 { // nobody is there any more: it would be seen
			b.pass(time.Hour)
			b.Work(t.Context())
		}
		if n := len(b.only().Mails[0].Attempts); n != 1 {
			t.Errorf("%d attempts", n)
		}
	})
	t.Run("in mode auto", func(t *testing.T) {
		addr, _ := smtpServer(t, map[string]string{"MAIL": "554 no"})
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
			c.Mode, c.Auto = Auto, AutoSend{Connections: 100, Blocks: 1}
			c.Delivery = Transport{By: SMTP, Server: addr, Timeout: 5 * time.Second}
		})
		for range 5 {
			b.Work(t.Context())
			b.pass(time.Hour)
		}
		if c := b.only(); c.State != Drafted || len(c.Mails[0].Attempts) != 1 {
			t.Errorf("%s, %d attempts", c.State, len(c.Mails[0].Attempts))
		}
	})
	t.Run("for now", func(t *testing.T) {
		b, id := ready(t, func(c *Config) { c.Delivery.Program = "/nonexistent/sendmail" })
		began := b.time()
		for range 24 * 7 * 6 { // a week
			b.Work(t.Context())
			b.pass(10 * time.Minute)
			if b.only().State != Approved {
				break
			}
		}
		c, _, _ := b.Case(id)
		if c.State != Drafted || !strings.Contains(c.Why, "not sent in 20 attempts") || len(c.Mails[0].Attempts) != maxTries {
			t.Errorf("%s (%s), %d attempts", c.State, c.Why, len(c.Mails[0].Attempts))
		}
		if d := b.time().Sub(began); d < 24*time.Hour || d > 36*time.Hour {
			t.Errorf("tried for %s", d)
		}
	})
	t.Run("the copy", func(t *testing.T) {
		addr, got := smtpServer(t, map[string]string{"RCPT TO:<NOC@OP.EXAMPLE>": "550 no such user"})
		b := smtpDesk(t, addr, "noc@op.example")
		b.Work(t.Context())
		c := b.only()
		if c.State != Sent || !strings.Contains(strings.Join(c.Notes, "\n"), "noc@op.example") || !strings.Contains(c.History[len(c.History)-1].Note, "not the copy") {
			t.Errorf("%s (%s), notes %q", c.State, c.Why, c.Notes)
		}
		if s := got(); !strings.Contains(s, "RCPT TO:<abuse@op.example>\r\nRCPT TO:<noc@op.example>\r\nDATA\r\n") {
			t.Errorf("the server got\n%s", s)
		}
	})
	t.Run("bounded", func(t *testing.T) {
		var m Mail
		for range 6 {
			m.attempt(Attempt{Result: string(taken)})
			for range 50 {
				m.attempt(Attempt{Result: string(refused) + ": later"})
				m.attempt(Attempt{Trial: true})
			}
		}
		left := slices.DeleteFunc(slices.Clone(m.Attempts), func(a Attempt) bool { return !a.mayHaveLeft() })
		if len(m.Attempts) != maxAttempts || len(left) != 6 {
			t.Errorf("%d attempts, %d that may have left", len(m.Attempts), len(left))
		}
	})
}

// TestSameAddress: addresses that differ in case alone are one.
func TestSameAddress(t *testing.T) {
	b, id := ready(t, nil)
	to, cc := "Abuse@Op.Example", "ABUSE@op.example"
	if c := must(b.Edit(t.Context(), id, "root", Edit{To: &to, Cc: &cc})); c.Mails[0].Cc.Address != "" {
		t.Errorf("a copy to the recipient: %+v", c.Mails[0].Cc)
	}
	must(b.Approve(id, "root", Approval{}))
	must(b.Send(t.Context(), id, "root", SendOptions{}))
	b.Take(blockOf(2, "192.0.2.1/32", b.time(), 500, 0))
	b.pass(time.Hour)
	b.Work(t.Context())
	second := b.Cases()[0]
	b.contact(second.ID, "abuse@OP.example")
	must(b.Approve(second.ID, "root", Approval{}))
	if _, err := b.Send(t.Context(), second.ID, "root", SendOptions{}); !errors.Is(err, ErrHeld) {
		t.Errorf("the second mail within a day: %v", err)
	}
	f := finding{}
	f.choose([]Contact{{Address: "Abuse@x.example", Scope: "AS1"}}, []Contact{{Address: "abuse@x.example", Scope: "p"}}, true, nil, b.lookups.bad)
	if f.cc.Address != "" || len(f.others) != 0 {
		t.Errorf("cc %+v, others %+v", f.cc, f.others)
	}
}

// TestTellOnce: what waits is not told again every few seconds.
func TestTellOnce(t *testing.T) {
	for name, change := range map[string]func(*bench){
		"auto": func(b *bench) {
			b.config.Mode, b.config.Auto = Auto, AutoSend{Connections: 1, Blocks: 1}
			b.o.Spare = func() []netip.Prefix { return []netip.Prefix{pfx("198.51.100.0/24")} }
		},
		"sending": func(b *bench) {
			c, _ := b.approved()
			b.store.SetRecord(kindMail, mailKey(&c, 0), []byte("Subject: another\r\n\r\n"))
		},
		"overrides": func(b *bench) {
			b.approved()
			b.overrides.path = "/nonexistent/overrides"
		},
	} {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			b := flooded(t, nil)
			b.drafted()
			b.log = slog.New(slog.NewTextHandler(&log, nil))
			change(b)
			for range 20 {
				b.Work(t.Context())
				b.pass(time.Second)
			}
			if n := strings.Count(log.String(), "\n"); n != 1 {
				t.Errorf("told %d times:\n%s", n, log.String())
			}
		})
	}
}

// TestSMTPOwnCertificate: the certificate of a server on loopback is not
// looked at, that of any other is.
func TestSMTPOwnCertificate(t *testing.T) {
	w := httptest.NewTLSServer(http.NotFoundHandler()) // for its certificate
	t.Cleanup(w.Close)
	serve := func(t *testing.T) string {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan struct{})
		t.Cleanup(func() { l.Close(); <-done })
		go func() {
			defer close(done)
			c, err := l.Accept()
			if err != nil {
				return
			}
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			r := bufio.NewReader(c)
			fmt.Fprint(c, "220 mx\r\n")
			r.ReadString('\n')
			fmt.Fprint(c, "250-mx\r\n250 STARTTLS\r\n")
			r.ReadString('\n')
			fmt.Fprint(c, "220 go\r\n")
			tc := tls.Server(c, &tls.Config{Certificates: w.TLS.Certificates})
			r = bufio.NewReader(tc)
			for data := false; ; {
				line, err := r.ReadString('\n')
				switch cmd := strings.ToUpper(line); {
				case err != nil:
					return
				case data && line != ".\r\n":
				case strings.HasPrefix(cmd, "DATA"):
					data = true
					fmt.Fprint(tc, "354 go\r\n")
				default:
					data = false
					fmt.Fprint(tc, "250 ok\r\n")
				}
			}
		}()
		return l.Addr().String()
	}
	for host, want := range map[string]outcome{"127.0.0.1": taken, "localhost": taken} {
		_, port, _ := net.SplitHostPort(serve(t))
		d := &Desk{config: Config{Delivery: Transport{By: SMTP, Server: net.JoinHostPort(host, port), Timeout: 5 * time.Second}}}
		if what, err := d.handover(t.Context(), "a@example.net", []string{"b@op.example"}, []byte("x\r\n")); what != want {
			t.Errorf("%s: %s, %v", host, what, err)
		}
	}
	// By its name alone a server is not this machine's.
	here := fakeConn{addr: "127.0.0.1:25"}
	for host, conn := range map[string]net.Conn{"mx.example.net": here, "localhost": fakeConn{addr: "192.0.2.1:25"}, "192.0.2.1": fakeConn{addr: "192.0.2.1:25"}} {
		if isLocal(host, conn) {
			t.Errorf("%s at %s is taken for this machine's", host, conn.RemoteAddr())
		}
	}
	if !isLocal("::1", fakeConn{addr: "[::1]:25"}) || !isLocal("localhost", here) {
		t.Error("this machine is not known")
	}
}

type fakeConn struct {
	net.Conn
	addr string
}

func (f fakeConn) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(f.addr))
}

// TestSendingDoesNotWait: while servers that never answer are asked about one
// report, another one is sent.
func TestSendingDoesNotWait(t *testing.T) {
	w := newWorld(t)
	w.plain()
	c := testConfig(t)
	w.online(&c)
	c.Lookup.Each, c.Lookup.Total = time.Minute, 5*time.Minute
	b := newBench(t, c, Options{})
	w.connect(b.lookups)
	b.Take(blockOf(1, "198.51.100.7/32", testStart, 200, 0))
	d, _ := b.drafted()
	must(b.Approve(d.ID, "root", Approval{}))
	w.mu.Lock()
	w.slow = time.Hour
	asked := len(w.asked)
	w.mu.Unlock()
	b.lookups.mu.Lock()
	clear(b.lookups.cache)
	b.lookups.mu.Unlock()
	b.Take(blockOf(2, "192.0.2.7/32", testStart, 200, 0))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { b.Run(ctx); close(done) }()
	defer func() { cancel(); <-done }()
	state := func(id string) State { c, _, _ := b.Case(id); return c.State }
	for end := time.Now().Add(20 * time.Second); state(d.ID) != Sent; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it is %s", state(d.ID))
		}
	}
	for end := time.Now().Add(20 * time.Second); w.count("") == asked; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("nobody was asked: the test shows nothing")
		}
	}
	if i := slices.IndexFunc(b.Cases(), func(c Case) bool { return c.ID != d.ID }); b.Cases()[i].State != Gathering {
		t.Errorf("the other is %s", b.Cases()[i].State)
	}
}
