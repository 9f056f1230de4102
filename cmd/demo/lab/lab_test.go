package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

var entered error

func TestMain(m *testing.M) {
	entered = Enter()
	os.Exit(m.Run())
}

// newWorld makes a world for a test, or skips the test where none can be.
func newWorld(t *testing.T, o Options) *World {
	t.Helper()
	if entered != nil && !o.Loopback {
		skip(t, entered)
	}
	w, err := New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(w.Dir()); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left behind (%v)", w.Dir(), err)
		}
	})
	return w
}

func skip(t *testing.T, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func startMTA(t *testing.T, w *World, o MTAOptions) *MTA {
	t.Helper()
	m, err := w.StartMTA(t.Context(), o)
	if errors.Is(err, ErrNoExim) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// eventually polls until f is true.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// Five silent addresses of each family with 22 connections each fill the
// server; proper mail is refused; when they are gone it is accepted again.
func TestFull(t *testing.T) {
	for _, kind := range []string{"exim", "standin"} {
		for _, family := range []struct {
			name              string
			attackers, sender netip.Prefix
		}{{"IPv4", AttackersV4, SendersV4}, {"IPv6", AttackersV6, SendersV6}} {
			t.Run(kind+"/"+family.name, func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, Options{})
				m := startMTA(t, w, MTAOptions{Kind: kind, Selector: CPanelSelector})
				from := Addresses(family.sender, family.sender.Addr().BitLen(), 1)[0]
				s := w.Send(t.Context(), from, 200*time.Millisecond, 5*time.Second)
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				if _, err := s.Steady(ctx, 3, time.Time{}); err != nil {
					t.Fatal(err)
				}
				sources := Addresses(family.attackers, family.attackers.Addr().BitLen(), 5)
				start := time.Now()
				at := w.Attack(t.Context(), Attack{Kind: Silent, Sources: sources, Each: 22})
				if _, err := s.First(ctx, Refused, start); err != nil {
					t.Fatalf("%v; attackers: %+v", err, at.Stats())
				}
				eventually(t, "the slots held", func() bool {
					n, err := w.HeldBy(sources)
					if err != nil {
						t.Fatal(err)
					}
					return n >= 95
				})
				if got := at.Stats(); got.Open < 95 || got.Lost != 0 {
					t.Errorf("attackers: %+v", got)
				}
				log, err := os.ReadFile(m.Log)
				if err != nil {
					t.Fatal(err)
				}
				for _, want := range []string{
					"[" + sources[0].String() + "]:",
					"(TCP/IP connection count = 100)\n",
					"[" + from.String() + "]:",
					" refused: too many connections\n",
				} {
					if !strings.Contains(string(log), want) {
						t.Errorf("the log has no %q", want)
					}
				}
				stop := time.Now()
				at.Stop()
				if _, err := s.Steady(ctx, 3, stop); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// The stand-in answers and logs as Exim does.
func TestStandInIsLikeExim(t *testing.T) {
	type step struct{ say, answer string } // answer: the first three digits, "" to read nothing
	hello := step{"EHLO bot.example", "250"}
	mail := step{"MAIL FROM:<a@b.example>", "250"}
	rcpt := step{"RCPT TO:<u@lab.example>", "250"}
	dialogues := []struct {
		name  string
		steps []step
	}{
		{"a mail", []step{hello, mail, rcpt, {"DATA", "354"}, {"From: a@b.example\r\nSubject: hi \"there\"\r\n\r\nx\r\n.", "250"}, {"QUIT", "221"}}},
		{"a mail by HELO", []step{{"HELO bot.example", "250"}, mail, rcpt, {"DATA", "354"}, {"\r\nx\r\n.", "250"}, {"QUIT", "221"}}},
		{"a bounce to two", []step{hello, {"MAIL FROM:<>", "250"}, rcpt, {"RCPT TO:<v@lab.example>", "250"}, {"DATA", "354"}, {"From: <>\r\n\r\nx\r\n.", "250"}, {"QUIT", "221"}}},
		{"nothing", nil},
		{"only QUIT", []step{{"QUIT", "221"}}},
		{"lost after EHLO", []step{hello}},
		{"lost in a transaction", []step{hello, mail, rcpt}},
		{"lost in the header", []step{hello, mail, rcpt, {"DATA", "354"}, {"Subject: x", ""}}},
		{"lost in the body", []step{hello, mail, rcpt, {"DATA", "354"}, {"Subject: x\r\n\r\nabc", ""}}},
		{"lost before the header", []step{hello, mail, rcpt, {"DATA", "354"}}},
		{"wrong order", []step{{"RCPT TO:<u@lab.example>", "503"}, {"DATA", "503"}, {"QUIT", "221"}}},
		{"another's domain", []step{hello, mail, {"RCPT TO:<u@other.example>", "550"}, {"RSET", "250"}, {"NOOP", "250"}, {"QUIT", "221"}}},
		{"a literal", []step{{"EHLO [10.67.0.10]", "250"}, {"QUIT", "221"}}},
		{"a bad name", []step{{"EHLO a_b (c)", "501"}, {"QUIT", "221"}}},
		{"nonsense", []step{{"BLAH x", "500"}, {"X", "500"}, {"Host: a", "500"}, {"GET /", "500"}}},
	}
	transcript := func(t *testing.T, kind, selector string) string {
		w := newWorld(t, Options{})
		m := startMTA(t, w, MTAOptions{Kind: kind, Selector: selector, Slots: 2})
		var b strings.Builder
		for i, d := range dialogues {
			p := []netip.Prefix{AttackersV4, AttackersV6}[i%2]
			fmt.Fprintf(&b, "# %s\n", d.name)
			before := size(t, m.Log)
			c, err := w.dial(t.Context(), Addresses(p, p.Addr().BitLen(), i+1)[i], w.smtp(p.Addr()), 0, 5*time.Second)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintf(&b, "< %s\n", answer(t, c))
			for _, s := range d.steps {
				fmt.Fprintf(c, "%s\r\n", s.say)
				if s.answer == "" {
					continue
				}
				got := answer(t, c)
				fmt.Fprintf(&b, "< %s\n", got)
				if !strings.HasPrefix(got, s.answer) {
					t.Errorf("%s: %s: %q was answered with %q, want %s", kind, d.name, s.say, got, s.answer)
				}
			}
			c.Close()
			// Both write their last line when they have seen the end.
			eventually(t, "no connection open", func() bool {
				held, err := w.Held()
				if err != nil {
					t.Fatal(err)
				}
				return len(held) == 0 && settled(t, m.Log, before, selector)
			})
		}
		// And full, once Exim has seen the last of its children off.
		time.Sleep(200 * time.Millisecond)
		before := lost(t, m.Log)
		at := w.Attack(t.Context(), Attack{Kind: Silent, Sources: Addresses(AttackersV4, 32, 1), Each: 2})
		eventually(t, "two open", func() bool { return at.Stats().Open == 2 })
		a := w.Deliver(t.Context(), Addresses(SendersV4, 32, 1)[0], 5*time.Second)
		fmt.Fprintf(&b, "# full\n< %s %v\n", a.Outcome, a.Err)
		at.Stop()
		eventually(t, "both free, and said so", func() bool {
			held, err := w.Held()
			return err == nil && len(held) == 0 && (selector == "" || lost(t, m.Log) == before+2)
		})
		m.Stop()
		log, err := os.ReadFile(m.Log)
		if err != nil {
			t.Fatal(err)
		}
		return b.String() + normal(string(log))
	}
	for _, selector := range []string{CPanelSelector, ""} {
		t.Run("selector "+selector, func(t *testing.T) {
			t.Parallel()
			exim := transcript(t, "exim", selector)
			ours := transcript(t, "standin", selector)
			if exim != ours {
				t.Errorf("Exim and the stand-in differ:\n%s", diff(exim, ours))
			}
		})
	}
}

// settled reports whether the log has grown since before and has stopped
// growing; with the default selector some dialogues add nothing.
func settled(t *testing.T, log string, before int64, selector string) bool {
	a := size(t, log)
	time.Sleep(30 * time.Millisecond)
	return a == size(t, log) && (a > before || selector == "")
}

// lost counts the connections that the log says were lost.
func lost(t *testing.T, log string) int {
	t.Helper()
	b, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), " lost")
}

func size(t *testing.T, path string) int64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Size()
}

// answer reads one answer and returns its last line.
func answer(t *testing.T, c conn) string {
	t.Helper()
	var line []byte
	one := make([]byte, 1)
	for {
		if _, err := c.Read(one); err != nil {
			t.Fatalf("reading an answer: %v", err)
		}
		line = append(line, one[0])
		if one[0] != '\n' {
			continue
		}
		if len(line) > 3 && line[3] != '-' && line[0] != ' ' {
			return normal(strings.TrimRight(string(line), "\r\n"))
		}
		line = line[:0]
	}
}

// normal takes out of log lines and answers what differs from run to run,
// and the lines of Exim that tell of the program's own start. The order of
// lines is kept, but for Exim's delivery, which is another process.
func normal(log string) string {
	for _, r := range []struct{ from, to string }{
		{`(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d `, ""},
		{`(?m)^cwd=.*\n`, ""},
		{`(?m)^.* (=> :blackhole:|Completed).*\n`, ""},
		{`pid=\d+`, "pid=N"},
		{`for SMTP on .*`, "for SMTP on ..."},
		{`\]:\d+`, "]:PORT"},
		{`\w{6}-\w{6}-\w{2}`, "MSGID"},
		{` S=\d+`, " S=N"},
		{`D=\d+s`, "D=Ns"},
		{`count = \d+`, "count = N"},
		// Whether the end comes as FIN or RST depends on what was read by then.
		{`lost \(error: Connection reset by peer\)`, "lost"},
		{`Exim 4\.\S+ .*`, "Exim VERSION"},
		{`exim 4\.\S+ `, "exim VERSION "},
		{`(?m)^(214|220) .*`, "$1"},
	} {
		log = regexp.MustCompile(r.from).ReplaceAllString(log, r.to)
	}
	return log
}

// diff shows the lines that differ, with nothing clever about it.
func diff(a, b string) string {
	la, lb := strings.Split(a, "\n"), strings.Split(b, "\n")
	var out strings.Builder
	for i := range max(len(la), len(lb)) {
		x, y := "", ""
		if i < len(la) {
			x = la[i]
		}
		if i < len(lb) {
			y = lb[i]
		}
		if x != y {
			fmt.Fprintf(&out, "line %d\n  exim     %q\n  stand-in %q\n", i+1, x, y)
		}
		if out.Len() > 3000 {
			break
		}
	}
	return out.String()
}

// Each kind of attacker holds what it takes against Exim's timeout or comes
// back, as it is said to.
func TestKinds(t *testing.T) {
	for _, mta := range []string{"exim", "standin"} {
		for _, tt := range []struct {
			kind Kind
			// what holds once the timeout of 1 s has struck
			want func(s AttackStats) bool
		}{
			{Silent, func(s AttackStats) bool { return s.Connected == 4 && s.Lost == 4 && s.Open == 0 }},
			{Reconnect, func(s AttackStats) bool { return s.Connected > 8 && s.Lost >= 4 }},
			{NonReader, nil},
		} {
			t.Run(mta+"/"+string(tt.kind), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t, Options{})
				startMTA(t, w, MTAOptions{Kind: mta, ReceiveTimeout: time.Second})
				at := w.Attack(t.Context(), Attack{Kind: tt.kind, Sources: Addresses(AttackersV4, 32, 2), Each: 2})
				eventually(t, "all connected", func() bool { return at.Stats().Connected >= 4 })
				if tt.want != nil {
					eventually(t, "as expected of "+string(tt.kind), func() bool { return tt.want(at.Stats()) })
					return
				}
				// Nothing ends a peer that does not read: not in twice the timeout.
				time.Sleep(2500 * time.Millisecond)
				if s := at.Stats(); s.Open != 4 || s.Lost != 0 {
					t.Errorf("after twice the server's timeout: %+v", s)
				}
			})
		}
	}
}

// Slow peers outlive the server's timeout, since each byte starts it anew.
func TestSlow(t *testing.T) {
	t.Parallel()
	w := newWorld(t, Options{})
	startMTA(t, w, MTAOptions{Kind: "standin", ReceiveTimeout: time.Second})
	at := w.Attack(t.Context(), Attack{Kind: Slow, Sources: Addresses(AttackersV6, 64, 3), Each: 1, Pause: 200 * time.Millisecond})
	eventually(t, "all connected", func() bool { return at.Stats().Connected == 3 })
	time.Sleep(2500 * time.Millisecond)
	if s := at.Stats(); s.Open != 3 {
		t.Errorf("after more than the server's timeout: %+v", s)
	}
}

// The world without namespaces fills up as well, and its log names addresses
// that smtpguard can suspect.
func TestLoopback(t *testing.T) {
	w := newWorld(t, Options{Loopback: true})
	m := startMTA(t, w, MTAOptions{Selector: CPanelSelector, Slots: 10})
	if m.Kind != "standin" {
		t.Fatalf("the mail server is %s", m.Kind)
	}
	at := w.Attack(t.Context(), Attack{Kind: Silent, Sources: Addresses(netip.MustParsePrefix("127.66.0.0/16"), 32, 5), Each: 2})
	eventually(t, "all connected", func() bool { return at.Stats().Open == 10 })
	a := w.Deliver(t.Context(), netip.MustParseAddr("127.67.0.10"), 5*time.Second)
	if a.Outcome != Refused {
		t.Errorf("a mail to the full server: %s (%v)", a.Outcome, a.Err)
	}
	log, err := os.ReadFile(m.Log)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"SMTP connection from [10.66.0.1]:", "Connection from [10.67.0.10]:"} {
		if !strings.Contains(string(log), want) {
			t.Errorf("the log has no %q:\n%s", want, log)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, tt := range []struct {
		prefix string
		sub, n int
		want   string
	}{
		{"10.66.0.0/16", 32, 3, "10.66.0.1 10.66.0.2 10.66.0.3"},
		{"10.66.7.0/24", 32, 1, "10.66.7.1"},
		{"10.66.0.0/16", 24, 2, "10.66.1.1 10.66.2.1"},
		{"10.66.0.0/16", 30, 2, "10.66.0.5 10.66.0.9"},
		{"fd00::/48", 128, 2, "fd00::1 fd00::2"},
		{"fd00::/48", 64, 2, "fd00:0:0:1::1 fd00:0:0:2::1"},
	} {
		got := strings.Trim(fmt.Sprint(Addresses(netip.MustParsePrefix(tt.prefix), tt.sub, tt.n)), "[]")
		if got != tt.want {
			t.Errorf("Addresses(%s, %d, %d) = %s, want %s", tt.prefix, tt.sub, tt.n, got, tt.want)
		}
	}
	many := Addresses(AttackersV4, 32, 1000)
	if last := many[999]; last != netip.MustParseAddr("10.66.3.232") {
		t.Errorf("the 1000th address is %s", last)
	}
}

// A world whose process is killed leaves neither Exim nor files behind.
func TestNothingLeft(t *testing.T) {
	if os.Getenv("SMTPGUARD_LAB_VICTIM") == "1" {
		w := newWorld(t, Options{})
		m := startMTA(t, w, MTAOptions{})
		at := w.Attack(t.Context(), Attack{Kind: Silent, Sources: Addresses(AttackersV4, 32, 5), Each: 2})
		eventually(t, "connected", func() bool { return at.Stats().Open == 10 })
		pid, _ := os.ReadFile(filepath.Join(filepath.Dir(m.Log), "exim.pid"))
		fmt.Printf("victim %s %s\n", w.Dir(), strings.TrimSpace(string(pid)))
		select {}
	}
	if entered != nil {
		skip(t, entered)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestNothingLeft$", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), "SMTPGUARD_LAB_VICTIM=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var dir string
	var pid int
	n, err := fmt.Fscanf(out, "victim %s %d\n", &dir, &pid)
	cmd.Process.Kill()
	cmd.Wait()
	if n < 1 {
		t.Fatalf("the victim says nothing: %v", err)
	}
	eventually(t, dir+" removed", func() bool {
		_, err := os.Stat(dir)
		return errors.Is(err, os.ErrNotExist)
	})
	if pid > 0 { // not with the stand-in
		eventually(t, "Exim gone", func() bool { return syscall.Kill(-pid, 0) == syscall.ESRCH })
	}
}
