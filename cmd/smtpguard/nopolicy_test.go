package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// text is output that is read while it is written.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(p)
}

func (t *text) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.String()
}

func (t *text) wait(tb testing.TB, want string) {
	tb.Helper()
	for end := time.Now().Add(time.Minute); !strings.Contains(t.String(), want); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("%q is never written, but\n%s", want, t)
		}
	}
}

// A policy that is gone, or cut off, is not taken for the shipped one, which allows nobody.
func TestNoPolicy(t *testing.T) {
	dir := t.TempDir()
	was := defaultPolicy
	defaultPolicy = filepath.Join(dir, "policy.yaml")
	defer func() { defaultPolicy = was }()
	t.Setenv("SMTPGUARD_POLICY", "")
	log := filepath.Join(dir, "main.log")
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	flags := []string{"smtpguard", "--store", filepath.Join(dir, "s.db"), "--socket", filepath.Join(dir, "c.sock"),
		"run", "--log", log, "--confirm", "off", "--backend", "memory", "--capacity", "100"}
	with := func(more ...string) []string { return append(flags[:len(flags):len(flags)], more...) }

	for _, args := range [][]string{with(), with("--mode", "enforce")} {
		var out text
		if code := run(t.Context(), args, strings.NewReader(""), &out, &out); code != 1 || !strings.Contains(out.String(), "policy init") {
			t.Errorf("%v: exit status %d, %s; want 1 and a hint", args, code, &out)
		}
	}

	// start runs a daemon and returns what it says and what ends it.
	start := func(args []string) (*text, func()) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		var out text
		code := make(chan int, 1)
		go func() { code <- run(ctx, args, strings.NewReader(""), &out, &out) }()
		out.wait(t, "smtpguard starts")
		return &out, func() {
			t.Helper()
			cancel()
			if c := <-code; c != 0 {
				t.Errorf("exit status %d: %s", c, &out)
			}
		}
	}
	hup := func() {
		t.Helper()
		if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
			t.Fatal(err)
		}
	}
	out, stop := start(with("--mode", "observe"))
	hup()
	out.wait(t, "the policy is read again") // still none
	stop()

	// Nor one of which nothing is left, or not the allowlist: it was cut off.
	for i, left := range []string{"", "", "", "# smtpguard\n\n", "mode: enforce\n"} {
		more := []string{"--mode", "observe"}[:2*min(i, 1)]
		if err := os.WriteFile(defaultPolicy, []byte("mode: enforce\nallow: [192.0.2.25]\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		out, stop = start(with(more...))
		var err error
		if i < 2 {
			err = os.Remove(defaultPolicy)
		} else {
			err = os.WriteFile(defaultPolicy, []byte(left), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		hup()
		out.wait(t, "the policy was not taken, the one before stays")
		var list text
		if err := os.WriteFile(defaultPolicy, []byte("mode: enforce\nallow: [192.0.2.25]\n"), 0o600); err != nil { // for the command
			t.Fatal(err)
		}
		args := append(flags[:5:5], "allow", "list")
		if code := run(t.Context(), args, strings.NewReader(""), &list, &list); code != 0 || !strings.Contains(list.String(), "192.0.2.25") {
			t.Errorf("exit status %d: %s; want 192.0.2.25 still allowed", code, &list)
		}
		stop()
	}
}
