package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coreos/go-systemd/v22/journal"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/hook"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// waitMetric reads the metrics on a Unix socket until a line is matched.
func waitMetric(socket, want string) error {
	re, err := regexp.Compile("(?m)^" + want + "$")
	if err != nil {
		return err
	}
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		}}}
	var last string
	for range 300 {
		res, err := c.Get("http://localhost/metrics")
		if err == nil {
			var b []byte
			b, err = io.ReadAll(res.Body)
			res.Body.Close()
			last = string(b)
		}
		if err == nil && re.MatchString(last) {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("%s is never in the metrics:\n%s", want, last)
}

// Ten thousand blocks are made while the hook's command is stuck: each is
// decided all the same, and in the end somebody was told of ten thousand.
func TestStuckHook(t *testing.T) {
	dir := t.TempDir()
	told, open := filepath.Join(dir, "told"), filepath.Join(dir, "open")
	script := filepath.Join(dir, "stuck")
	if err := os.WriteFile(script, []byte("#!/bin/sh\ncat >>"+told+"\nwhile [ ! -e "+open+" ]; do sleep 0.05; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	p.Hooks = []policy.EventHook{{Name: "stuck", On: []string{"block"}, Command: []string{script}, Every: time.Second, Timeout: time.Minute}}
	log := slog.New(slog.DiscardHandler)
	st, err := store.Open(filepath.Join(dir, "s.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	w, err := newWatch(p, st, log)
	if err != nil {
		t.Fatal(err)
	}
	o := guard.Options{Policy: p, Store: st, Capacity: 100,
		OpenFirewall: func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
			return firewall.NewMemory(firewall.Options{}), nil
		},
		Self: func(context.Context) ([]guard.Exempt, error) { return nil, nil }}
	w.attach(&o)
	g, err := guard.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stop := w.start(ctx, g, nil)
	ran := make(chan error, 1)
	go func() { ran <- g.Run(ctx) }()

	const blocks = 10_000
	req := func(i int) guard.BlockRequest {
		return guard.BlockRequest{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{203, 0, byte(i >> 8), byte(i)}), 32), For: time.Hour, By: "root"}
	}
	block := func(reqs ...guard.BlockRequest) {
		t.Helper()
		if _, err := g.Block(t.Context(), reqs, false); err != nil {
			t.Fatal(err)
		}
	}
	block(req(0))
	for range 1000 {
		if fi, err := os.Stat(told); err == nil && fi.Size() > 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	var many []guard.BlockRequest
	for i := 1; i < blocks; i++ {
		many = append(many, req(i))
	}
	block(many...)
	s, err := g.Status(t.Context())
	if err != nil || s.Blocks != blocks {
		t.Errorf("%d blocks, %v", s.Blocks, err)
	}
	if h := w.hooks.Status()[0]; h.Sent != 0 || h.Waiting != blocks {
		t.Errorf("the command is not stuck: %+v", h)
	}
	if err := os.WriteFile(open, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3000 {
		if w.hooks.Status()[0].Waiting == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	stop()
	data, err := os.ReadFile(told)
	if err != nil {
		t.Fatal(err)
	}
	total, dec := 0, json.NewDecoder(bytes.NewReader(data))
	var subjects []string
	for {
		var m hook.Message
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		total += m.Total
		subjects = append(subjects, m.Subject)
	}
	if total != blocks || len(subjects) != 2 || subjects[1] != "9999 sources blocked" || len(data) > 20_000 {
		t.Errorf("told of %d in %d bytes: %q", total, len(data), subjects)
	}
}

// Reports are told of when they move on, once: not as they stood when hooks
// were first there, but what changed just before a stop, or during it.
func TestFollowReports(t *testing.T) {
	st, err := store.Open(filepath.Join(t.TempDir(), "s.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	synctest.Test(t, func(t *testing.T) {
		network := netip.MustParsePrefix("198.51.100.0/24")
		list := []abuse.Brief{{ID: "SG-1", State: abuse.Drafted, Network: network}, {ID: "SG-2", State: abuse.Gathering, AS: 64500, Network: network}}
		var got []string
		var mu sync.Mutex
		start := func() (stop func()) {
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				followReports(ctx, func() []abuse.Brief { mu.Lock(); defer mu.Unlock(); return list }, storedReports{st}, func(e hook.Event) {
					got = append(got, e.On+" "+e.Report+" "+e.State+" "+e.Why)
				}, slog.New(slog.DiscardHandler))
			}()
			synctest.Wait()
			return func() { cancel(); <-done }
		}
		set := func(state abuse.State, why string) {
			mu.Lock()
			defer mu.Unlock()
			list = slices.Clone(list)
			list[1].State, list[1].Why = state, why
		}
		step := func(state abuse.State, why string) {
			time.Sleep(6 * time.Second)
			synctest.Wait()
			set(state, why)
		}
		want := func(want ...string) {
			t.Helper()
			if !slices.Equal(got, want) {
				t.Errorf("got %q, want %q", got, want)
			}
			got = nil
		}
		stop := start()
		step(abuse.Held, "a cap")
		step(abuse.Held, "another cap")
		step(abuse.Drafted, "")
		step(abuse.Closed, "")
		mu.Lock()
		list = append(list, abuse.Brief{ID: "SG-3", State: abuse.Drafted, Network: network})
		mu.Unlock()
		step(abuse.Closed, "")
		want("report SG-2 held AS64500, 198.51.100.0/24, a cap", "report SG-2 draft AS64500, 198.51.100.0/24", "report SG-3 draft 198.51.100.0/24")
		set(abuse.Held, "the last second")
		stop()
		want()

		start()()
		want("report SG-2 held AS64500, 198.51.100.0/24, the last second")
		start()()
		want()
		set(abuse.Sent, "")
		stop = start()
		want("report SG-2 sent AS64500, 198.51.100.0/24")
		stop()
	})
}

// fieldsOf reads a datagram of the journal's native protocol.
func fieldsOf(t *testing.T, data []byte) map[string]string {
	t.Helper()
	m := map[string]string{}
	for len(data) > 0 {
		line, rest, ok := bytes.Cut(data, []byte("\n"))
		if !ok {
			t.Fatalf("no end of line: %q", data)
		}
		name, value, simple := strings.Cut(string(line), "=")
		if !simple {
			n := binary.LittleEndian.Uint64(rest)
			value, rest = string(rest[8:8+n]), rest[8+n+1:]
		}
		m[name], data = value, rest
	}
	return m
}

// The real command with a journal of its own: priorities, and a field for
// each attribute.
func TestJournal(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, errors.New("needs root"))
	}
	dir := t.TempDir()
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	r, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fi, err := stderr.Stat()
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"main.log": "", "policy.yaml": "mode: observe\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	// A journal beside the machine's own, in a mount namespace.
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--net", "sh", "-c",
		`mount -t tmpfs none /run && mkdir -p /run/systemd/journal && mount --bind "$0" /run/systemd/journal && cd "$0" &&
		 exec smtpguard run --policy policy.yaml --log main.log --store s.db --socket c.sock --capacity 100 --confirm off --mode observe`, dir)
	cmd.Env = append(os.Environ(), "SMTPGUARD_POLICY=", "JOURNAL_STREAM="+streamOf(fi))
	cmd.Stderr = stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Start(); err != nil {
		skip(t, err)
	}
	stderr.Close()
	said := make(chan []byte, 1)
	go func() { b, _ := io.ReadAll(r); said <- b }()
	var got []map[string]string
	buf := make([]byte, 64<<10)
	blocked := false
	_ = l.SetReadDeadline(time.Now().Add(30 * time.Second))
	for {
		n, err := l.Read(buf)
		if err != nil {
			break
		}
		f := fieldsOf(t, buf[:n])
		got = append(got, f)
		if strings.HasPrefix(f["MESSAGE"], "smtpguard starts") && !blocked {
			blocked = true
			go func() {
				for range 200 {
					c := exec.CommandContext(ctx, "smtpguard", "--socket", filepath.Join(dir, "c.sock"), "--store", filepath.Join(dir, "s.db"),
						"--policy", filepath.Join(dir, "policy.yaml"), "block", "203.0.113.7", "--reason", `a "test"`)
					if c.Run() == nil {
						return
					}
					time.Sleep(50 * time.Millisecond)
				}
			}()
		}
		if strings.HasPrefix(f["MESSAGE"], "observed") {
			break
		}
	}
	_ = cmd.Process.Signal(os.Interrupt)
	err = cmd.Wait()
	text := <-said
	if err != nil || len(got) < 3 {
		t.Fatalf("%v; %d records\n%s", err, len(got), text)
	}
	want := func(message string, fields map[string]string) {
		t.Helper()
		for _, f := range got {
			if !strings.HasPrefix(f["MESSAGE"], message) {
				continue
			}
			for k, v := range fields {
				if !strings.Contains(f[k], v) {
					t.Errorf("%s: %s is %q, want %q", message, k, f[k], v)
				}
			}
			return
		}
		t.Errorf("no record %q: %v\n%s", message, got, text)
	}
	want("smtpguard starts", map[string]string{"PRIORITY": "6", "SYSLOG_IDENTIFIER": "smtpguard", "SMTPGUARD_MODE": "observe", "SMTPGUARD_CAPACITY": "100"})
	want("mode is observe", map[string]string{"PRIORITY": "4"})
	want("observed prefix=203.0.113.7/32 ", map[string]string{"PRIORITY": "6", "SMTPGUARD_PREFIX": "203.0.113.7/32", "SMTPGUARD_WHY": `a "test"`})
}

// A hostile record is bounded, printable, and has only names that the journal
// takes; where the journal is not to be had the stream has the priority.
func TestJournalHandler(t *testing.T) {
	var stream strings.Builder
	h := newJournalHandler(&stream)
	var message string
	var fields map[string]string
	var prio journal.Priority
	var fail error
	h.send = func(m string, p journal.Priority, f map[string]string) error {
		message, prio, fields = m, p, f
		return fail
	}
	log := slog.New(h)
	log.With("a", 1).WithGroup("g").Error("it\nfailed", "err", errors.New("\x1b[2J\nPRIORITY=0"), "Ü-x", "y", slog.Group("in", "k", "v"))
	if prio != journal.PriErr || strings.ContainsAny(message, "\n\x1b") {
		t.Errorf("%d %q", prio, message)
	}
	for k, v := range map[string]string{"SMTPGUARD_A": "1", "SMTPGUARD_G_ERR": `\x1b[2J\nPRIORITY=0`, "SMTPGUARD_G___X": "y", "SMTPGUARD_G_IN_K": "v"} {
		if fields[k] != v {
			t.Errorf("%s is %q, want %q", k, fields[k], v)
		}
	}
	args := []any{"long", strings.Repeat("é\x00", 100_000), strings.Repeat("n", 1000), "v"}
	for i := range 1000 {
		args = append(args, fmt.Sprint("k", i), i)
	}
	log.Warn(strings.Repeat("x", 100_000), args...)
	size := len(message)
	name := regexp.MustCompile(`^[A-Z][A-Z0-9_]{0,63}$`)
	for k, v := range fields {
		size += len(k) + len(v)
		if !name.MatchString(k) {
			t.Errorf("name %q", k)
		}
	}
	if len(message) > messageMost || len(fields) > fieldsMost || size > 100_000 || prio != journal.PriWarning {
		t.Errorf("%d bytes of message, %d fields, %d bytes", len(message), len(fields), size)
	}
	fail = errors.New("no journal")
	log.Info("hello", "k", "v")
	if got := stream.String(); got != "<6>hello k=v\n" {
		t.Errorf("%q", got)
	}
	if inJournal(&stream) {
		t.Error("a buffer is the journal")
	}
}

// streamOf is what systemd sets JOURNAL_STREAM to for a file.
func streamOf(fi os.FileInfo) string {
	st := fi.Sys().(*syscall.Stat_t)
	return fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}
