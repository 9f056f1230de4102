package control

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Connections beyond the limit are told so, and root's are not taken by others.
func TestConnectionsMost(t *testing.T) {
	if os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root, to be somebody else")
	}
	cl, path := start(t, &fake{})
	status := func() error { _, err := cl.Status(t.Context()); return err }
	for _, p := range []string{filepath.Dir(filepath.Dir(filepath.Dir(path))), filepath.Dir(filepath.Dir(path)), filepath.Dir(path)} {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	dial := func(n int) (conns []net.Conn) {
		for range n {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Error(err)
				return conns
			}
			t.Cleanup(func() { c.Close() })
			conns = append(conns, c)
		}
		return conns
	}
	refused := func(c net.Conn) bool {
		_ = c.SetReadDeadline(time.Now().Add(time.Minute))
		b, _ := io.ReadAll(c)
		return strings.Contains(string(b), "503 ") && strings.Contains(string(b), "too many connections")
	}

	done := make(chan []net.Conn)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its user
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, 65534, 65534, 65534); errno != 0 {
			t.Error(errno)
		}
		done <- dial(othersMost + 10)
	}()
	others := <-done
	if len(others) != othersMost+10 {
		t.FailNow()
	}
	for i, c := range others[othersMost:] {
		if !refused(c) {
			t.Errorf("connection %d of another user is not refused", othersMost+i)
		}
	}
	if err := status(); err != nil {
		t.Errorf("root is kept away by another user: %v", err)
	}
	mine := dial(connectionsMost)
	if !refused(mine[len(mine)-1]) {
		t.Error("there is no limit for root")
	}
	for _, c := range append(others, mine...) {
		c.Close()
	}
	for end := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		err := status()
		if err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("closed connections still count: %v", err)
		}
	}
}
