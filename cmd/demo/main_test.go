package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
)

var noNamespaces error

func TestMain(m *testing.M) {
	noNamespaces = lab.Enter()
	os.Exit(m.Run())
}

// build makes both programs in a directory that everybody may read.
func build(t *testing.T) (demo, smtpguard string) {
	t.Helper()
	// The go command does not know that the result depends on these; it
	// remembers what a test has looked at.
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			_, err = os.Stat(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for d := dir; len(d) > len(os.TempDir()); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("go", "build", "-o", dir+"/", "github.com/smtpguard/smtpguard/cmd/demo", "github.com/smtpguard/smtpguard/cmd/smtpguard").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return dir + "/demo", dir + "/smtpguard"
}

// The story comes true with what a newcomer's machine may have: Exim and
// root, no Exim, no root, not even namespaces.
func TestDemo(t *testing.T) {
	demo, smtpguard := build(t)
	for _, tt := range []struct {
		name string
		mta  string
		cmd  func(args ...string) *exec.Cmd
		need func() error
		want []string
	}{
		{"Exim", "exim", plainly, needExim, []string{"Exim 4.", "read back from nftables", "connects again"}},
		{"stand-in", "standin", plainly, needNamespaces, []string{"a stand-in for Exim", "read back from nftables", "connects again"}},
		{"not root", "", asNobody, needNamespaces, []string{"a stand-in for Exim", "read back from nftables", "connects again"}},
		{"no namespaces", "", withoutNamespaces, needNamespaces, []string{"no network namespaces to be had here", "smtpguard observes", "observed"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if err := tt.need(); err != nil {
				if os.Getenv("CI") == "true" {
					t.Fatal(err)
				}
				t.Skip(err)
			}
			args := []string{demo, "-bin", smtpguard}
			if tt.mta != "" {
				args = append(args, "-mta", tt.mta)
			}
			cmd := tt.cmd(args...)
			// Exim's user must get in, and paths of sockets are short.
			tmp, err := os.MkdirTemp("/tmp", "demo")
			if err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(tmp)
			if err := os.Chmod(tmp, 0o777); err != nil {
				t.Fatal(err)
			}
			cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Run(); err != nil {
				t.Fatalf("%v\n%s", err, out.String())
			}
			told := out.String()
			common := []string{"mail flows:", "the slots are full:", "mail is refused:", "verdict:", "mail flows again", "$ smtpguard blocks list", "everything is taken away again"}
			for _, want := range append(common, tt.want...) {
				if !strings.Contains(told, want) {
					t.Errorf("no %q in what it tells:\n%s", want, told)
				}
			}
			if strings.Contains(told, "\x1b") {
				t.Error("colours, but it is no terminal")
			}
			if left, err := os.ReadDir(tmp); err != nil || len(left) > 0 {
				t.Errorf("left behind in %s: %v (%v)", tmp, left, err)
			}
			t.Log("\n" + told)
		})
	}
}

// withoutNamespaces runs a command where no network namespace can be made.
// The limit is one of a user namespace, not of the machine.
func withoutNamespaces(args ...string) *exec.Cmd {
	const forbid = `echo 0 > /proc/sys/user/max_net_namespaces && exec "$@"`
	cmd := exec.Command("/bin/sh", append([]string{"-c", forbid, "sh"}, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}},
	}
	return cmd
}

func plainly(args ...string) *exec.Cmd { return exec.Command(args[0], args[1:]...) }

// asNobody runs a command as an ordinary user, if this is root.
func asNobody(args ...string) *exec.Cmd {
	cmd := plainly(args...)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	return cmd
}

func needNamespaces() error { return noNamespaces }

func needExim() error {
	if noNamespaces != nil {
		return noNamespaces
	}
	for _, name := range []string{"exim4", "exim"} {
		if _, err := exec.LookPath(name); err == nil {
			return nil
		}
	}
	return errors.New("Exim is not installed")
}

func TestWrongUse(t *testing.T) {
	demo, smtpguard := build(t)
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"-mta", "sendmail", "-bin", smtpguard}, 2, "Exim if it is installed"},
		{[]string{"surplus"}, 2, "-bin"},
		{[]string{"-bin", "/nowhere/smtpguard"}, 1, "hint: `make demo` builds it"},
	} {
		out, err := exec.Command(demo, tt.args...).CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != tt.code {
			t.Errorf("demo %v: %v, want exit status %d", tt.args, err, tt.code)
		}
		if !strings.Contains(string(out), tt.want) {
			t.Errorf("demo %v says %q, want %q in it", tt.args, out, tt.want)
		}
	}
}
