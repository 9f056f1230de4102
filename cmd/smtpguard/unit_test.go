package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// With no more capabilities than the unit gives, and no new privileges, the
// daemon still asks Exim for its configuration, reads the socket table and can
// end connections.
func TestUnitCapabilities(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, errors.New("needs root"))
	}
	if _, err := exec.LookPath("setpriv"); err != nil {
		skip(t, err)
	}
	mta, err := exim.ReadConfig(t.Context())
	if err != nil {
		skip(t, err)
	}
	unit, err := os.ReadFile("../../smtpguard.service")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.*)$`).FindSubmatch(unit)
	if m == nil {
		t.Fatal("the unit has no CapabilityBoundingSet")
	}
	set := "-all"
	for c := range strings.FieldsSeq(string(m[1])) {
		set += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	dir := t.TempDir()
	sock := filepath.Join(dir, "c.sock")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	log := filepath.Join(dir, "log")
	cmd := exec.CommandContext(ctx, "unshare", "--net", "setpriv", "--bounding-set", set, "--no-new-privs", "--",
		"smtpguard", "run", "--mode", "enforce", "--store", filepath.Join(dir, "s.db"), "--socket", sock)
	cmd.Env = append(os.Environ(), "SMTPGUARD_POLICY=")
	out, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd.Stderr = out
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cancel()
	for {
		cl, err := control.Dial(ctx, sock)
		if err == nil {
			s, err := cl.Status(ctx)
			cl.Close()
			if err != nil {
				t.Fatal(err)
			}
			b, _ := json.Marshal(s)
			if mta.AcceptMax > 0 && (s.Capacity != mta.AcceptMax || s.CapacityFrom != "Exim's smtp_accept_max") ||
				!s.Sockets.Usable || !s.Sockets.CanDestroy || s.Firewall.Backend != "nftables" || !s.Firewall.Agrees {
				t.Errorf("status: %s", b)
			}
			return
		}
		if ctx.Err() != nil {
			said, _ := os.ReadFile(log)
			t.Fatalf("%v; the daemon said:\n%s", err, said)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
