package hook

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// message is a real one, with two events.
func message(t *testing.T) *Message {
	t.Helper()
	h := New([]Config{{Name: "ops", Mail: "root", On: kinds}}, Options{Version: "1.2"})
	h.host = "mx1.example.net"
	h.Tell(Event{On: Saturated, Time: time.Unix(1_800_000_000, 0), Taken: 100, Capacity: 100, Seconds: 10, Why: "100 of 100 slots have been taken for 10s; 198.51.100.9 holds 97"})
	h.Tell(Event{On: Fault, Time: time.Unix(1_800_000_003, 0), Why: "reading \x1b[31m a line\nBcc: all@example.net"})
	m := h.take(h.hooks[0])
	m.ID, m.Time = "ABC", time.Unix(1_800_000_004, 0).UTC()
	return m
}

// script writes a shell script.
func script(t *testing.T, dir, body string) string {
	t.Helper()
	path := filepath.Join(dir, "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestMail(t *testing.T) {
	dir := t.TempDir()
	sendmail := script(t, dir, `printf '<%s>' "$@" > `+dir+`/argv; cat > `+dir+`/mail; env | sort > `+dir+`/env`)
	t.Setenv("SECRET", "of the daemon")
	k := &mailer{Config{Mail: "root", From: "smtpguard@example.net"}, []string{sendmail}}
	if err := k.send(t.Context(), message(t)); err != nil {
		t.Fatal(err)
	}
	if got, want := read(t, dir+"/argv"), "<-i><-f><smtpguard@example.net><--><root>"; got != want {
		t.Errorf("argv %s, want %s", got, want)
	}
	clock := func(sec int64) string { return time.Unix(1_800_000_000+sec, 0).Format("15:04:05") }
	want := `From: smtpguard on mx1.example.net <smtpguard@example.net>
To: root
Subject: [mx1.example.net] the mail server is full, 100 of 100 slots taken, 1 problem of smtpguard's own
Date: Fri, 15 Jan 2027 08:00:04 +0000
Message-ID: <ABC@mx1.example.net>
Auto-Submitted: auto-generated
MIME-Version: 1.0
Content-Type: text/plain; charset=utf-8
Content-Transfer-Encoding: 8bit

The mail server is full, 100 of 100 slots taken, 1 problem of smtpguard's own.

` + clock(0) + ` the mail server is full, 100 of 100 slots taken: 100 of 100 slots have been taken for 10s; 198.51.100.9 holds 97
` + clock(3) + ` smtpguard has a problem: reading \u{1b}[31m a line\u{a}Bcc: all@example.net

` + "`smtpguard status` and `smtpguard blocks list` on mx1.example.net say more.\n"
	if got := read(t, dir+"/mail"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	if env := read(t, dir+"/env"); strings.Contains(env, "SECRET") {
		t.Errorf("the daemon's environment is passed on:\n%s", env)
	}
	// No setting can add a header either.
	hostile := &mailer{Config{Mail: "root\nBcc: all", From: "a@b\r\nX: y"}, []string{sendmail}}
	if head, _, _ := strings.Cut(string(hostile.mail(message(t))), "\n\n"); strings.Contains(head, "\nBcc:") || strings.ContainsAny(head, "\r") {
		t.Errorf("%s", head)
	}
	k.sendmail = []string{script(t, dir, "echo 'no route\x1b[2J' >&2; exit 69")}
	if err := k.send(t.Context(), message(t)); err == nil || !strings.Contains(err.Error(), `exit status 69: no route\u{1b}[2J`) {
		t.Errorf("%v", err)
	}
}

func TestCommand(t *testing.T) {
	dir := t.TempDir()
	s := schema(t)
	argv := []string{script(t, dir, `printf '<%s>' "$@" > `+dir+`/argv; cat > `+dir+`/json; pwd; echo done`), "a b", "$(id)", ""}
	m := message(t)
	said, err := execute(t.Context(), argv, nil, false)
	if err != nil || said != `/\u{a}done` {
		t.Errorf("%q, %v", said, err)
	}
	var log strings.Builder
	c := &command{Config{Name: "ops", Command: argv}, newTestLog(&log)}
	if err := c.send(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir+"/argv"); got != "<a b><$(id)><>" {
		t.Errorf("argv %s", got)
	}
	if !strings.Contains(log.String(), "done") {
		t.Errorf("the output is not in the log: %s", log.String())
	}
	var got Message
	if err := json.Unmarshal([]byte(read(t, dir+"/json")), &got); err != nil || got.Total != 2 {
		t.Errorf("%+v, %v", got, err)
	}
	valid(t, s, &got)
}

func TestCommandFails(t *testing.T) {
	for _, c := range []struct{ name, body, want string }{
		{"status", "exit 3", "exit status 3"},
		{"deaf", "exec 0<&-; exit 0", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := execute(t.Context(), []string{script(t, t.TempDir(), c.body)}, []byte(strings.Repeat("x", 1<<20)), false)
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
	if _, err := execute(t.Context(), []string{"/nonexistent"}, nil, false); err == nil || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// One that talks without end is killed when its time is up, and little of
// what it said is kept.
func TestEndlessCommand(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(dir + "/began"); err == nil {
				cancel()
			}
			time.Sleep(time.Millisecond)
		}
	}()
	said, err := execute(ctx, []string{script(t, dir, "yes | head -n 10000; touch "+dir+"/began; exec yes")}, nil, false)
	if err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("%v, want that it was killed", err)
	}
	if said == "" || len(said) > whyMost+10 {
		t.Errorf("%d bytes of output are kept", len(said))
	}
}

// What a command leaves behind ends with it, whether it holds the output or
// not; the command has done its work.
func TestCommandLeavesChildren(t *testing.T) {
	for name, body := range map[string]string{
		"holding": "sleep 1000 & echo $!",
		"silent":  "sleep 1000 >/dev/null 2>&1 & echo $!",
		"deaf":    "(trap '' TERM HUP INT; sleep 1000) & echo $!",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			said, err := execute(t.Context(), []string{script(t, t.TempDir(), body)}, nil, false)
			if err != nil {
				t.Fatal(err)
			}
			pid, err := strconv.Atoi(said)
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "the child ends", func() bool { return gone(pid) })
		})
	}
}

// What a mail program leaves behind delivers the mail, as Exim's child does: it
// has closed the output, and goes on.
func TestMailLeavesChildren(t *testing.T) {
	dir := t.TempDir()
	argv := []string{script(t, dir, "(exec >/dev/null 2>&1; sleep 0.3; cat "+dir+"/in >"+dir+"/delivered.new; mv "+dir+"/delivered.new "+dir+"/delivered) & cat >"+dir+"/in")}
	if _, err := execute(t.Context(), argv, []byte("a mail"), true); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the mail is delivered", func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "delivered"))
		return err == nil && string(b) == "a mail"
	})
}

// A stuck command is killed with all that it started, and ten thousand events
// meanwhile cost nobody time or memory.
func TestStuckCommand(t *testing.T) {
	dir := t.TempDir()
	pids := filepath.Join(dir, "pids")
	c := Config{Name: "stuck", On: []string{Block}, Every: time.Second, Timeout: 3 * time.Second,
		Command: []string{script(t, dir, `trap '' TERM INT HUP; sleep 1000 & echo $$ $! > `+pids+`.new; mv `+pids+`.new `+pids+`; wait; sleep 1000`)}}
	h := New([]Config{c}, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	h.Tell(block(0))
	eventually(t, "the command starts", func() bool { _, err := os.Stat(pids); return err == nil })
	for i := range 10_000 {
		h.Tell(block(i))
	}
	h.hooks[0].mu.Lock()
	if h.hooks[0].pending.total != 10_000 || len(h.hooks[0].pending.events) > eventsMost || len(h.hooks[0].pending.counts) != 1 {
		t.Errorf("%d events are counted, %d kept", h.hooks[0].pending.total, len(h.hooks[0].pending.events))
	}
	h.hooks[0].mu.Unlock()
	for pid := range strings.FieldsSeq(read(t, pids)) {
		n, err := strconv.Atoi(pid)
		if err != nil {
			t.Fatal(err)
		}
		eventually(t, "process "+pid+" ends", func() bool { return gone(n) })
	}
	eventually(t, "the failure is noted", func() bool { return h.Status()[0].Failed == 1 })
	if s := h.Status()[0]; s.Waiting != 10_001 || !strings.Contains(s.Error, "it took longer than 3s") {
		t.Errorf("%+v", s)
	}
	cancel()
	<-done
}

// gone reports whether a process has ended; a zombie, which nobody may be
// there to reap, has.
func gone(pid int) bool {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	return strings.HasPrefix(rest, "Z")
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 2000 {
		if f() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%s: not within 20 s", what)
}

// toServer is a hook that trusts a test's server.
func toServer(t *testing.T, srv *httptest.Server, c Config) *web {
	t.Helper()
	c.URL = srv.URL + "/hook/secret-path"
	w := newWeb(c, "1.2")
	pool := x509.NewCertPool()
	if srv.Certificate() != nil {
		pool.AddCert(srv.Certificate())
	}
	w.client.Transport.(*http.Transport).TLSClientConfig.RootCAs = pool
	return w
}

func TestWeb(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"header": "Authorization: Bearer xyz\n", "secret": "key\r\nmore\n", "empty": "\n", "bad": "no header\n", "split": "X: a\rb\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var got *http.Request
	var body []byte
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body)
		w.WriteHeader(http.StatusNoContent)
	}))
	defer srv.Close()
	w := toServer(t, srv, Config{HeaderFile: dir + "/header", SecretFile: dir + "/secret"})
	if err := w.send(t.Context(), message(t)); err != nil {
		t.Fatal(err)
	}
	var m Message
	if err := json.Unmarshal(body, &m); err != nil {
		t.Fatal(err)
	}
	valid(t, schema(t), &m)
	h := got.Header
	if got.Method != "POST" || h.Get("Content-Type") != "application/json" || h.Get("Authorization") != "Bearer xyz" || h.Get("User-Agent") != "smtpguard/1.2" {
		t.Errorf("%s %v", got.Method, h)
	}
	if want := Sign([]byte("key"), h.Get(HeaderTime), body); h.Get(HeaderSignature) != want {
		t.Errorf("signature %s, want %s", h.Get(HeaderSignature), want)
	}
	// printf '1800000000.{}' | openssl dgst -sha256 -hmac key
	if s := Sign([]byte("key"), "1800000000", []byte("{}")); s != "sha256=7321475872b03ff21bdc2dfd86ea2d99ec29c479fbe4a77aa6acf4509505493f" {
		t.Errorf("signature %s", s)
	}
	for file, want := range map[string]string{"empty": "is empty", "bad": "is not a header", "split": "is not a header", "missing": "no such file"} {
		w := toServer(t, srv, Config{HeaderFile: filepath.Join(dir, file)})
		if err := w.send(t.Context(), message(t)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", file, err)
		}
	}
	// A server that nobody has certified.
	if err := newWeb(Config{URL: srv.URL}, "").send(t.Context(), message(t)); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("%v", err)
	}
}

func TestWebAnswers(t *testing.T) {
	header := filepath.Join(t.TempDir(), "header")
	if err := os.WriteFile(header, []byte("X-Token: xyz"), 0o600); err != nil {
		t.Fatal(err)
	}
	var leaked bool
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { leaked = true }))
	defer other.Close()
	release := make(chan struct{})
	var n int
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		switch r.URL.Path {
		case "/error":
			w.WriteHeader(500)
			_, _ = io.WriteString(w, "went\x1b[2J wrong"+strings.Repeat("x", 1<<20))
		case "/elsewhere":
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		case "/here":
			http.Redirect(w, r, "/fine", http.StatusTemporaryRedirect)
		case "/other":
			http.Redirect(w, r, "/fine", http.StatusSeeOther)
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusPermanentRedirect)
		case "/long":
			for r.Context().Err() == nil {
				if _, err := w.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		case "/header":
			for r.Context().Err() == nil && n < 1000 {
				n++
				w.Header().Add("X", strings.Repeat("x", 1000))
			}
		case "/slow":
			<-release
		case "/fine":
			if r.Header.Get("X-Token") != "xyz" || len(b) == 0 {
				w.WriteHeader(400)
			}
		}
	}))
	defer srv.Close()
	defer close(release)
	for _, c := range []struct{ path, want string }{
		{"/fine", ""},
		{"/here", ""},
		{"/long", ""},
		{"/error", `answers 500: went\u{1b}[2J wrongxxx`},
		{"/elsewhere", "redirects to another server"},
		{"/other", "would lose the message"},
		{"/loop", "too many redirects"},
		{"/header", "server response headers exceeded"},
		{"/slow", "deadline exceeded"},
	} {
		t.Run(c.path[1:], func(t *testing.T) {
			w := newWeb(Config{URL: srv.URL + c.path, HeaderFile: header}, "1.2")
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			if c.path == "/slow" {
				ctx, cancel = context.WithTimeout(t.Context(), 100*time.Millisecond)
			}
			defer cancel()
			err := w.send(ctx, message(t))
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if err != nil && (strings.Contains(err.Error(), c.path) || len(err.Error()) > 1000) {
				t.Errorf("the URL is in the error, or it is long: %v", err)
			}
		})
	}
	if leaked {
		t.Error("another server was told")
	}
}

func newTestLog(w io.Writer) *slog.Logger { return slog.New(slog.NewTextHandler(w, nil)) }
