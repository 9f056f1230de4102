package control

import (
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// asOther is the socket that the test binary asks as another user.
const asOther = "SMTPGUARD_TEST_SOCKET"

// TestGroup: with control.group whoever is in it is answered, and nobody else.
func TestGroup(t *testing.T) {
	if sock := os.Getenv(asOther); sock != "" {
		c, err := Dial(t.Context(), sock)
		if err == nil {
			_, err = c.Status(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		return
	}
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root, to be somebody else")
		}
		t.Skip("needs root, to be somebody else")
	}
	const group = "mail"
	g, err := user.LookupGroup(group)
	if err != nil {
		t.Fatal(err)
	}
	gid, err := strconv.Atoi(g.Gid)
	if err != nil {
		t.Fatal(err)
	}
	// The test binary is in a directory of root's.
	dir := t.TempDir()
	for d := dir; d != os.TempDir() && d != "/"; d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	bin := filepath.Join(dir, "asks")
	f, err := os.OpenFile(bin, os.O_CREATE|os.O_WRONLY, 0o755)
	if err == nil {
		_, err = io.Copy(f, self)
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, group string
		uid, gid    int
		says        string // "": it is answered
	}{
		{"in the group", group, 65534, gid, ""},
		{"in another", group, 65534, 65534, "permission denied"},
		{"without a group", "", 65534, gid, "permission denied"},
	} {
		t.Run(c.name, func(t *testing.T) {
			sock := filepath.Join(dir, strconv.Itoa(c.gid)+c.group+".sock")
			l, err := Listen(sock, c.group)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- Serve(ctx, l, &fake{}, slog.New(slog.DiscardHandler)) }()
			defer func() { cancel(); <-done }()
			cmd := exec.CommandContext(t.Context(), bin, "-test.run=^TestGroup$")
			cmd.Env, cmd.Dir = append(os.Environ(), asOther+"="+sock), "/"
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.gid)}}
			out, err := cmd.CombinedOutput()
			if (err == nil) != (c.says == "") || !strings.Contains(string(out), c.says) {
				t.Errorf("%v: %s; want %q", err, out, c.says)
			}
		})
	}
}
