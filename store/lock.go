package store

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// holder says who holds the lock on path: "held by smtpguard (pid 123)".
func holder(path string) string {
	pid := holderPID(path)
	if pid <= 0 {
		return "held by another process"
	}
	name := "a process"
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
		name = strings.TrimSpace(string(b))
	}
	if pid == os.Getpid() {
		return fmt.Sprintf("held by this process (%s, pid %d)", name, pid)
	}
	return fmt.Sprintf("held by %s (pid %d)", name, pid)
}

// holderPID looks for path in /proc/locks, see proc_locks(5):
//
//	1: FLOCK  ADVISORY  WRITE 4711 fe:00:131090 0 EOF
//
// 0: not found, or in another pid namespace.
func holderPID(path string) int {
	var st syscall.Stat_t
	if syscall.Stat(path, &st) != nil {
		return 0
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return 0
	}
	defer f.Close()
	dev := fmt.Sprintf("%02x:%02x", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
	ino := strconv.FormatUint(st.Ino, 10)
	byInode := 0
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// A waiting lock has "->" in its second field and is no holder.
		w := strings.Fields(sc.Text())
		if len(w) < 6 || w[1] != "FLOCK" {
			continue
		}
		pid, err := strconv.Atoi(w[4])
		i := strings.LastIndexByte(w[5], ':')
		if err != nil || i < 0 || w[5][i+1:] != ino {
			continue
		}
		if w[5][:i] == dev {
			return max(pid, 0)
		}
		// btrfs and overlay show another device number here than stat does.
		byInode = max(pid, 0)
	}
	return byInode
}
