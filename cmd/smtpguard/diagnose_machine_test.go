package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
	"github.com/smtpguard/smtpguard/diagnose"
)

// TestDiagnoseDown: of a real Exim that was ended, whose log is older than what
// is asked for, diagnose says first that it is not running.
func TestDiagnoseDown(t *testing.T) {
	s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
	s.asked()
	s.startDaemon(lab.DaemonOptions{Mode: "observe"})
	diagnosis := func(args ...string) (r diagnose.Report) {
		t.Helper()
		out, err := s.d.Command(t.Context(), append([]string{"--json", "diagnose"}, args...)...)
		if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
			t.Fatalf("%v; %v: %s", err, jerr, out)
		}
		return r
	}
	if r := diagnosis(); len(r.Findings) > 0 {
		t.Errorf("of an Exim that runs: %+v", r.Findings)
	}
	s.m.Stop()
	old := time.Now().Add(-5 * time.Minute)
	if err := os.Chtimes(s.m.Log, old, old); err != nil {
		t.Fatal(err)
	}
	s.poll("Exim is gone", 10*time.Second, func() (bool, error) { return len(diagnosis().Findings) > 0, nil })
	for _, args := range [][]string{nil, {"--since", "3m"}} {
		r := diagnosis(args...)
		if len(r.Findings) == 0 || r.Findings[0].Kind != diagnose.NotRunning {
			t.Fatalf("%v: %+v", args, r)
		}
		f := r.Findings[0]
		if text := strings.Join(append(f.Do, f.Why...), "\n"); !strings.HasPrefix(f.Title, "Exim") || !strings.Contains(text, "restart") || !strings.Contains(text, "last written 5m") || len(f.Lines) == 0 {
			t.Errorf("%v: %+v", args, f)
		}
	}
}

func TestLately(t *testing.T) {
	log := filepath.Join(t.TempDir(), "mainlog")
	now := time.Now()
	for name, age := range map[string]time.Duration{log + ".1": 30 * time.Hour, log: 5 * time.Minute} {
		if err := os.WriteFile(name, []byte("x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, now.Add(-age), now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	for from, want := range map[time.Duration]int{3 * time.Minute: 1, time.Hour: 1, 48 * time.Hour: 2} {
		if got := lately(log, now.Add(-from)); len(got) != want || got[len(got)-1] != log {
			t.Errorf("of the last %s: %v", from, got)
		}
	}
	if got := lately(log+".none", now); len(got) != 0 {
		t.Error(got)
	}
}

func TestLastOf(t *testing.T) {
	path := filepath.Join(t.TempDir(), "exim_paniclog")
	for text, want := range map[string]string{"": "", "a\nb\nc\n": "b|c", "\n\n": "", "x\x00y\n": "", strings.Repeat("long ", 9000) + "\nend\n": "end"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(lastOf(path, 2), "|"); got != want {
			t.Errorf("%.20q: %q, want %q", text, got, want)
		}
	}
	if lastOf(filepath.Dir(path), 2) != nil {
		t.Error("a directory has lines")
	}
	for main, want := range map[string]string{"/var/log/exim_mainlog": "/var/log/exim_paniclog", "/var/log/exim4/mainlog": "/var/log/exim4/paniclog", "/var/log/exim/main.log": "/var/log/exim/panic.log"} {
		if got := panicLog(main); got != want {
			t.Errorf("%s: %s", main, got)
		}
	}
}
