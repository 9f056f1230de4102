package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
)

// terminal is a tmux of its own, with one window.
type terminal struct {
	*testing.T
	env []string
}

func newTerminal(t *testing.T, width, height int, command ...string) *terminal {
	t.Helper()
	if _, err := exec.LookPath("tmux"); err != nil {
		skip(t, err)
	}
	// Socket paths are short things; the test's own directory may be too long.
	dir, err := os.MkdirTemp("", "tmux")
	if err != nil {
		t.Fatal(err)
	}
	tm := &terminal{t, append(os.Environ(), "TMUX=", "TMUX_TMPDIR="+dir, "LC_ALL=C.UTF-8", "TERM=xterm-256color")}
	t.Cleanup(func() {
		_ = tm.command("kill-server").Run()
		os.RemoveAll(dir)
	})
	args := append([]string{"-f", "/dev/null", "new-session", "-d", "-x", fmt.Sprint(width), "-y", fmt.Sprint(height)}, command...)
	if out, err := tm.command(args...).CombinedOutput(); err != nil {
		t.Fatalf("tmux: %v\n%s", err, out)
	}
	return tm
}

func (tm *terminal) command(args ...string) *exec.Cmd {
	cmd := exec.Command("tmux", append([]string{"-u"}, args...)...)
	cmd.Env = tm.env
	return cmd
}

func (tm *terminal) keys(keys ...string) {
	tm.Helper()
	if out, err := tm.command(append([]string{"send-keys"}, keys...)...).CombinedOutput(); err != nil {
		tm.Fatalf("tmux: %v\n%s", err, out)
	}
}

// shows waits until the screen has all of these texts.
func (tm *terminal) shows(texts ...string) (screen string) {
	tm.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, err := tm.command("capture-pane", "-p").CombinedOutput()
		screen = string(out)
		missing := ""
		for _, text := range texts {
			if !strings.Contains(screen, text) {
				missing = text
			}
		}
		if err == nil && missing == "" {
			return screen
		}
		if time.Now().After(deadline) {
			tm.Fatalf("%q is not on the screen (%v):\n%s", missing, err, screen)
		}
	}
}

// The live view of a real daemon under a real flood, on a real terminal: who
// holds the slots is seen, allowed, no more allowed to be blocked, and so on.
func TestTopOnTerminal(t *testing.T) {
	w, err := lab.New(t.Context(), lab.Options{})
	if errors.Is(err, lab.ErrNoNamespaces) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	m, err := w.StartMTA(t.Context(), lab.MTAOptions{Kind: "standin", Selector: lab.CPanelSelector})
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{T: t, w: w, m: m}
	// No rule blocks by itself here: the keys do.
	s.startDaemon(lab.DaemonOptions{Policy: "rules:\n  - {name: hog, metric: saturation, window: 1h, threshold: 0.9, prefixes: [/32, /128]}\n"})
	hog := lab.Addresses(lab.AttackersV4, 32, 1)[0]
	w.Attack(t.Context(), lab.Attack{Kind: lab.Reconnect, Sources: []netip.Addr{hog}, Each: 12})

	tm := newTerminal(t, 80, 24, s.program(), "--policy", w.Path("policy.yaml"), "--socket", w.Path("smtpguard.sock"), "top", "--every", "300ms")
	tm.shows("mode enforce", hog.String()+"/32", " 12 ", "% of hog", "q quit")
	tm.keys("b")
	tm.shows("Block "+hog.String()+"/32 for 10m", "y: yes")
	tm.keys("n")
	tm.shows("nothing was changed")
	tm.keys("b")
	tm.shows("y: yes")
	tm.keys("y")
	tm.shows(hog.String()+"/32 is blocked", "by hand, in top", "holds 1 block", "slots 0 of 100")
	if kernel := s.inKernel(); len(kernel) != 1 {
		t.Errorf("in the kernel: %v", kernel)
	}
	tm.keys("Tab")
	tm.keys("e")
	tm.shows("explain "+hog.String()+"/32", "in force until")
	tm.keys("x")
	tm.keys("a")
	tm.shows("Never block " + hog.String() + "/32 again")
	tm.keys("y")
	tm.shows("is allowed; lifted "+hog.String(), "holds 0 blocks")
	if kernel := s.inKernel(); len(kernel) != 0 {
		t.Errorf("in the kernel: %v", kernel)
	}
	tm.shows("slots 12 of 100") // it is back
	tm.command("resize-window", "-x", "60", "-y", "15").Run()
	tm.keys("BTab")
	tm.shows("▸ " + hog.String())
	s.d.Kill()
	tm.shows("no answer since")
	tm.keys("q")
	for deadline := time.Now().Add(20 * time.Second); tm.command("list-sessions").Run() == nil; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("q did not end it")
		}
	}
}
