package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
	"github.com/smtpguard/smtpguard/diagnose"
	"github.com/smtpguard/smtpguard/doctor"
)

// asked makes Exim answer for the configuration that it runs with in the
// world: doctor finds the first exim4 in PATH.
func (s *scene) asked() {
	s.Helper()
	real, err := exec.LookPath("exim4")
	if err != nil {
		real, err = exec.LookPath("exim")
	}
	if err != nil {
		real = "/usr/sbin/exim4"
	}
	dir := s.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nexec %s -C %s \"$@\"\n", real, s.w.Path("exim.conf"))
	if err := os.WriteFile(filepath.Join(dir, "exim4"), []byte(script), 0o755); err != nil {
		s.Fatal(err)
	}
	s.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// doctor runs the command beside the daemon and returns its checks by name.
func (s *scene) doctor() map[string]doctor.Check {
	s.Helper()
	out, err := s.d.Command(s.Context(), "--json", "doctor")
	var r doctor.Report
	if jerr := json.Unmarshal([]byte(out), &r); jerr != nil {
		s.Fatalf("%v; %v: %s", err, jerr, out)
	}
	if (err != nil) != (r.Fail > 0) {
		s.Errorf("%d checks fail, and the exit is %v", r.Fail, err)
	}
	m := make(map[string]doctor.Check)
	for _, c := range r.Checks {
		m[c.Name] = c
	}
	return m
}

// TestDoctorAndDiagnose: beside a real Exim with a real daemon that enforces,
// every part is found well; somebody who takes our rules away is found; and of
// a real flood diagnose says afterwards who it was.
func TestDoctorAndDiagnose(t *testing.T) {
	s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
	s.asked()
	s.startDaemon(lab.DaemonOptions{Policy: "mode: enforce\n"})
	var last map[string]doctor.Check
	s.poll("the daemon has read the log and agrees with the kernel", 20*time.Second, func() (bool, error) {
		last = s.doctor()
		return last["lag"].Status == doctor.OK && last["agreement"].Status == doctor.OK, nil
	})
	for name, says := range map[string]string{
		"daemon": "runs, pid", "mode": "enforce", "log": s.m.Log, "log-selector": "with their ports", "slots": "100 slots",
		"receive-timeout": "for 5m", "listening": "listens on [25]", "sockets": "ends connections", "firewall": "nftables",
		"rules": "called at prerouting, priority -300", "store": "in use by the daemon", "capabilities": "has the capabilities",
		"time-zone": "fit the clock", "own-addresses": "10.65.0.1",
	} {
		if c := last[name]; c.Status != doctor.OK || !strings.Contains(c.Says, says) {
			// In a zone with summer time, this log has one thing to be said of.
			if name == "time-zone" && c.Status == doctor.Warn && strings.Contains(c.Says, "summer time") {
				continue
			}
			t.Errorf("%s: %s %q, want ok and %q", name, c.Status, c.Says, says)
		}
	}
	for name, c := range last {
		if c.Status == doctor.Fail {
			t.Errorf("%s fails: %s", name, c.Says)
		}
	}

	s.fill(lab.Attack{Kind: lab.Reconnect, Sources: []netip.Addr{lab.AttackersV4.Addr().Next()}, Each: 110})
	s.poll("the attacker is blocked", 40*time.Second, func() (bool, error) { return len(s.blocks()) > 0, nil })
	out, err := s.d.Command(t.Context(), "--json", "diagnose", s.m.Log)
	if err != nil {
		t.Fatal(err)
	}
	var r diagnose.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if len(r.Findings) == 0 || r.Findings[0].Kind != diagnose.FullFew || r.Findings[0].Sources[0].Prefix.Addr() != lab.AttackersV4.Addr().Next() {
		t.Errorf("of the flood it says: %s", out)
	}
}

// TestDoctorDefaultSelector: Exim as it comes logs no connections, and doctor
// says so.
func TestDoctorDefaultSelector(t *testing.T) {
	s := newScene(t, lab.MTAOptions{})
	s.asked()
	s.startDaemon(lab.DaemonOptions{Mode: "observe"})
	c := s.doctor()
	if got := c["log-selector"]; got.Status != doctor.Warn || !strings.Contains(strings.Join(got.Mend, "\n"), "+smtp_connection +incoming_port") {
		t.Errorf("%+v", got)
	}
	if got := c["mode"]; got.Status != doctor.Warn {
		t.Errorf("%+v", got)
	}
}
