package packaging

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// machine is this machine once more, in namespaces of its own: the same files
// below an overlay that forgets, a network with nothing in it, and systemd as
// process 1.
type machine struct {
	t   *testing.T
	pid string // of its process 1, as seen from outside
	out string // what it said before systemd had a journal
}

// The new machine's first steps. Arguments: a directory for the overlay, and
// one that it finds as /mnt. Of this machine's units only the journal is
// started, and what belongs to the kernel alone, its parameters and devices,
// cannot be changed from there.
const first = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
cd "$1/root"
mount -t proc proc proc
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for d in run tmp dev; do mount -t tmpfs -o mode=755 tmpfs $d; done
chmod 1777 tmp
mkdir dev/pts dev/shm
for n in null zero full random urandom tty; do
	: >dev/$n
	mount --bind /dev/$n dev/$n
done
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount --bind "$2" mnt
ip link set lo up
: >run/test-machine
rm -rf usr/lib/systemd/system/*.wants lib/systemd/system/*.wants etc/systemd/system
rm -rf etc/smtpguard var/lib/smtpguard usr/local/sbin/smtpguard
mkdir -p etc/systemd/system
printf '[Unit]\nDefaultDependencies=no\nRequires=systemd-journald.service\n' >etc/systemd/system/test.target
for t in sysinit basic sockets local-fs network multi-user; do
	printf '[Unit]\nDefaultDependencies=no\n' >etc/systemd/system/$t.target
done
export container=test
exec chroot . /lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=no
`

// boot starts a machine that sees dir as /mnt. It ends with the test.
func boot(t *testing.T, dir string) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		skip(t, errors.New("needs root"))
	}
	for _, need := range []string{"/lib/systemd/systemd", "unshare", "nsenter", "ip", "nft", "exim4"} {
		if _, err := exec.LookPath(need); err != nil {
			skip(t, err)
		}
	}
	if fs, err := os.ReadFile("/proc/filesystems"); err != nil || !strings.Contains(string(fs), "\toverlay\n") {
		skip(t, errors.New("the kernel has no overlayfs"))
	}
	group, err := newCgroup(t)
	if err != nil {
		skip(t, fmt.Errorf("no cgroup for systemd: %w", err))
	}
	at, err := os.MkdirTemp("", "smtpguard-machine") // not below dir: it would be mounted over
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(at) })
	m := &machine{t: t, out: filepath.Join(t.TempDir(), "boot")}
	out, err := os.Create(m.out)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.Command("unshare", "--fork", "--kill-child", "--pid", "--mount", "--net", "--uts", "--ipc", "--cgroup",
		"sh", "-c", first, "first", at, dir)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	children := fmt.Sprintf("/proc/%d/task/%[1]d/children", cmd.Process.Pid)
	for range 2400 { // two minutes
		if b, err := os.ReadFile(children); err == nil {
			m.pid = strings.TrimSpace(string(b))
		}
		if m.pid != "" {
			if out, err := m.try("systemctl is-active test.target"); err == nil && out == "active" {
				return m
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	said, _ := os.ReadFile(m.out)
	t.Fatalf("systemd does not come up in its namespaces:\n%s", said)
	return nil
}

// newCgroup makes a cgroup of its own for a machine, and removes it with all
// below it when the machine has ended.
func newCgroup(t *testing.T) (*os.File, error) {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	at := ""
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.Contains(line, " - cgroup2 ") {
			at = f[4]
			break
		}
	}
	if at == "" {
		return nil, errors.New("no cgroup2 is mounted")
	}
	for line := range strings.Lines(string(own)) {
		if p, ok := strings.CutPrefix(line, "0::"); ok {
			at = filepath.Join(at, strings.TrimSpace(p))
		}
	}
	dir, err := os.MkdirTemp(at, "smtpguard-test")
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		for range 200 { // its processes end one after the other
			var below []string
			_ = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					below = append(below, p)
				}
				return nil
			})
			for i := range below {
				_ = os.Remove(below[len(below)-1-i])
			}
			if _, err := os.Stat(dir); err != nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("%s is left behind", dir)
	})
	f, err := os.Open(dir)
	if err == nil {
		t.Cleanup(func() { f.Close() })
	}
	return f, err
}

// try runs a shell script in the machine and returns what it printed, without
// space around it.
func (m *machine) try(script string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", m.pid, "--all", "--root", "--wd", "--", "/bin/bash", "-c",
		"[ -e /run/test-machine ] || exit 99\n"+script) // never on the machine around it
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C", "DEBIAN_FRONTEND=noninteractive", "SYSTEMD_PAGER="}
	cmd.Dir = "/"
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// run is try for what must succeed.
func (m *machine) run(script string) string {
	m.t.Helper()
	out, err := m.try(script)
	if err != nil {
		journal, _ := m.try("journalctl --no-pager -o cat -n 30")
		m.t.Fatalf("%s\n%v\n%s\nthe journal:\n%s", script, err, out, journal)
	}
	return out
}

// want is run for what must print that text and no other.
func (m *machine) want(script, text string) {
	m.t.Helper()
	if out := m.run(script); out != text {
		m.t.Fatalf("%s\nprinted %q, want %q", script, out, text)
	}
}

func skip(t *testing.T, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}
