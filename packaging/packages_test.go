// Package packaging has the tests of the packages and of the systemd unit:
// built as `make packages` builds them, installed by the real dpkg and rpm on
// a machine of namespaces, run by the real systemd.
package packaging

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// versions are what is built, oldest first.
var versions = []string{"1.0.0~rc1", "1.0.0"}

// built is a directory with the packages of these for amd64, made once.
var built = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "smtpguard-packages")
	if err != nil {
		return "", err
	}
	builtIn = dir
	for _, v := range versions {
		if err := makePackages(dir, v); err != nil {
			return dir, err
		}
	}
	return dir, nil
})

// builtIn is what is to be removed at the end; empty: nothing was built.
var builtIn string

func makePackages(dir, version string) error {
	cmd := exec.Command("make", "-s", "-C", "..", "packages", "ARCHES=amd64", "DIST="+dir, "BUILD="+filepath.Join(dir, ".bin"), "VERSION="+version)
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH=1800000000", "MAKEFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make packages: %w\n%s", err, out)
	}
	return nil
}

func TestMain(m *testing.M) {
	status := m.Run()
	if builtIn != "" {
		os.RemoveAll(builtIn)
	}
	os.Exit(status)
}

// packages returns the directory with the packages.
func packages(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		skip(t, errors.New("-short"))
	}
	if _, err := exec.LookPath("make"); err != nil {
		skip(t, err)
	}
	// go test does not see what make reads: looked at here, each file counts
	// when it decides whether an earlier result still holds.
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if n := d.Name(); d.IsDir() && (n == ".git" || n == "bin" || n == "dist") {
			return filepath.SkipDir
		}
		_, err = os.Stat(path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestReproducible(t *testing.T) {
	t.Parallel()
	dir, again := packages(t), t.TempDir()
	if err := makePackages(again, "1.0.0"); err != nil {
		t.Fatal(err)
	}
	list, err := filepath.Glob(filepath.Join(again, "*1.0.0-1*"))
	if err != nil || len(list) != 2 {
		t.Fatal(list, err)
	}
	for _, p := range list {
		a, errA := os.ReadFile(p)
		b, errB := os.ReadFile(filepath.Join(dir, filepath.Base(p)))
		if err := errors.Join(errA, errB); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s: built twice, other bytes", filepath.Base(p))
		}
	}
}

// TestStatic: what is packaged needs no other file, for either processor.
func TestStatic(t *testing.T) {
	t.Parallel()
	packages(t) // skips where nothing can be built
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		dir := t.TempDir()
		cmd := exec.Command("make", "-s", "-C", "..", "build", "BUILD="+dir, "VERSION=1.0.0")
		cmd.Env = append(os.Environ(), "GOARCH="+arch, "MAKEFLAGS=")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", arch, err, out)
		}
		f, err := elf.Open(filepath.Join(dir, "smtpguard"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if f.Machine != machine {
			t.Errorf("%s: it is for %s", arch, f.Machine)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%s: it is linked dynamically (%s)", arch, p.Type)
			}
		}
	}
}

// exim gives the machine an Exim of our own, which delivers to its users.
func (m *machine) exim() {
	m.t.Helper()
	m.run(`cat >/etc/exim4/exim4.conf <<'END'
primary_hostname = mx.example.net
smtp_accept_max = 77
smtp_receive_timeout = 5m
log_selector = +smtp_connection +incoming_port
log_file_path = /var/log/exim4/%slog
host_lookup =
rfc1413_query_timeout = 0s
begin routers
local:
  driver = accept
  domains = mx.example.net
  check_local_user
  transport = mailbox
begin transports
mailbox:
  driver = appendfile
  file = /var/mail/$local_part_data
  user = $local_part_data
  group = mail
  mode = 0660
END
		chmod 644 /etc/exim4/exim4.conf
		rm -rf /var/spool/exim4/input /var/log/exim4/mainlog
		install -o Debian-exim -g adm -m 640 /dev/null /var/log/exim4/mainlog`)
}

const table = "nft list table inet smtpguard"

// enforce makes the installed one block, and waits until it does.
func (m *machine) enforce() {
	m.t.Helper()
	m.run("sed -i 's/^mode: observe/mode: enforce/' /etc/smtpguard/policy.yaml && systemctl enable --now smtpguard 2>&1")
	m.want("systemctl is-active smtpguard", "active")
	m.run("smtpguard block 192.0.2.7 --for 1h && " + table + " | grep 192.0.2.7")
}

// ours lists what of ours is on the machine.
const ours = `{ find /etc /usr /var -xdev -name '*smtpguard*' ! -path '/var/lib/dpkg/*' ! -path '/var/lib/rpm/*' ! -path '/var/log/*'; find /run -name '*smtpguard*'; } | sort -u`

func TestDeb(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("dpkg"); err != nil {
		skip(t, err)
	}
	m := boot(t, packages(t))
	m.exim()
	before := m.run(ours)

	// A first installation starts nothing and blocks nothing.
	if said := m.run("dpkg -i /mnt/smtpguard_1.0.0~rc1-1_amd64.deb 2>&1"); !strings.Contains(said, "installed and not started") {
		t.Errorf("dpkg said:\n%s", said)
	}
	m.want("systemctl is-enabled smtpguard; systemctl is-active smtpguard; true", "disabled\ninactive")
	m.run("grep '^mode: observe' /etc/smtpguard/policy.yaml && smtpguard policy check && ! " + table)
	m.want("smtpguard version", "smtpguard 1.0.0~rc1")
	m.want("systemd-analyze verify --man=no smtpguard.service 2>&1", "")
	m.run("ls /usr/share/man/man8/smtpguard.8.gz /usr/share/man/man5/smtpguard-policy.5.gz /usr/share/doc/smtpguard/{README.md,CHANGELOG.md,copyright}")

	// An upgrade restarts it, keeps what the administrator wrote, and no
	// block is away for a moment.
	m.enforce()
	m.run(`(while [ ! -e /tmp/done ]; do ` + table + ` 2>&1 | grep -q 192.0.2.7 || echo gap >>/tmp/gaps; echo look >>/tmp/looks; done; touch /tmp/ended) >/dev/null 2>&1 &
		until [ -s /tmp/looks ]; do sleep 0.01; done`)
	pid := m.run("systemctl show -P MainPID smtpguard")
	m.run("dpkg -i /mnt/smtpguard_1.0.0-1_amd64.deb")
	m.want("systemctl is-active smtpguard; systemctl is-enabled smtpguard; smtpguard version", "active\nenabled\nsmtpguard 1.0.0")
	if m.run("systemctl show -P MainPID smtpguard") == pid {
		t.Error("the upgrade left the old one running")
	}
	m.run("grep '^mode: enforce' /etc/smtpguard/policy.yaml && smtpguard firewall status && smtpguard blocks show 192.0.2.7")
	m.run("touch /tmp/done; until [ -e /tmp/ended ]; do sleep 0.01; done")
	m.want("cat /tmp/gaps 2>/dev/null; true", "")
	m.run("dpkg --compare-versions 1.0.0~rc1-1 lt 1.0.0-1 && dpkg --compare-versions 1.0.0-1 lt 1.0.0+3.gabcdef0-1")

	// What runs on the machine around is not touched from within a chroot.
	m.run(`systemctl stop smtpguard && ` + table + ` && mkdir /tmp/c && mount -t tmpfs tmpfs /tmp/c && cd /tmp/c && for d in usr etc var proc dev; do mkdir $d && mount --rbind /$d $d; done && ln -s usr/bin usr/sbin usr/lib usr/lib64 . &&
		mkdir tmp && chroot . /var/lib/dpkg/info/smtpguard.prerm remove && cd / && umount -R /tmp/c`)
	m.run(table + " | grep 192.0.2.7")
	m.run("systemctl enable --now smtpguard")

	// A removal leaves no rule behind, but settings and state.
	m.run("dpkg -r smtpguard")
	m.run("! " + table + " && ! pgrep -x smtpguard && test -s /etc/smtpguard/policy.yaml && test -s /var/lib/smtpguard/smtpguard.db")
	m.want("systemctl is-enabled smtpguard 2>/dev/null; ls /etc/systemd/system/multi-user.target.wants 2>/dev/null; true", "")

	// Also with a policy that has faults, and after a kill. Each script may
	// run twice.
	m.run("dpkg -i /mnt/smtpguard_1.0.0-1_amd64.deb")
	m.enforce()
	m.run("echo 'mode: perhaps' >/etc/smtpguard/policy.yaml && systemctl kill -s KILL smtpguard && " + table)
	m.run("for i in 1 2; do /var/lib/dpkg/info/smtpguard.prerm remove 2>&1 || exit 1; done; ! " + table)
	m.run("for i in 1 2; do /var/lib/dpkg/info/smtpguard.postinst configure '' && /var/lib/dpkg/info/smtpguard.postinst configure 1.0.0-1 || exit 1; done")

	// A daemon that systemd does not know of ends too.
	m.run(`rm /etc/smtpguard/policy.yaml && smtpguard policy init /etc/smtpguard/policy.yaml && sed -i 's/^mode: observe/mode: enforce/' /etc/smtpguard/policy.yaml
		mkdir -p /run/smtpguard && setsid smtpguard run >/tmp/ran 2>&1 & until smtpguard status >/dev/null 2>&1; do sleep 0.05; done
		smtpguard block 192.0.2.7 --for 1h && ` + table + ` && /var/lib/dpkg/info/smtpguard.prerm remove && ! pgrep -x smtpguard && ! ` + table + ` && rm -r /run/smtpguard`)

	// A purge leaves nothing.
	m.run("dpkg --purge smtpguard")
	m.want(ours, before)
}

func TestRPM(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("rpm"); err != nil {
		skip(t, err)
	}
	m := boot(t, packages(t))
	m.exim()
	// The system's own packages are not in rpm's database here.
	const rpm = "rpm --force-debian --nodeps "
	m.run("rpm --initdb")
	before := m.run(ours)
	m.run(rpm + "-i /mnt/smtpguard-1.0.0~rc1-1.x86_64.rpm")
	m.want("systemctl is-enabled smtpguard; systemctl is-active smtpguard; true", "disabled\ninactive")
	m.want("rpm -qc smtpguard", "/etc/smtpguard/policy.yaml")
	m.enforce()
	pid := m.run("systemctl show -P MainPID smtpguard")
	m.run(rpm + "-U /mnt/smtpguard-1.0.0-1.x86_64.rpm")
	m.want("systemctl is-active smtpguard; systemctl is-enabled smtpguard; rpm -q --qf '%{VERSION}' smtpguard", "active\nenabled\n1.0.0")
	if m.run("systemctl show -P MainPID smtpguard") == pid {
		t.Error("the upgrade left the old one running")
	}
	m.run("grep '^mode: enforce' /etc/smtpguard/policy.yaml && " + table + " | grep 192.0.2.7")
	m.run(rpm + "-e smtpguard")
	m.run("! " + table + " && ! pgrep -x smtpguard && test -s /var/lib/smtpguard/smtpguard.db && test -s /etc/smtpguard/policy.yaml.rpmsave")
	m.run("rm -r /var/lib/smtpguard /etc/smtpguard")
	m.want(ours, before)
}

// as makes a unit of one command out of ours, with everything that ours keeps
// from its processes, and runs it. extra are more lines for [Service].
func (m *machine) as(name, command, extra string) {
	m.t.Helper()
	unit := m.run("cat /usr/lib/systemd/system/smtpguard.service")
	var out []string
	for line := range strings.Lines(unit) {
		key, _, _ := strings.Cut(line, "=")
		switch key {
		case "Type":
			line = "Type=oneshot\n" + extra
		case "ExecStart":
			line = "ExecStart=" + command + "\n"
		case "Restart", "RestartSec", "WatchdogSec", "ExecReload", "RuntimeDirectory", "StateDirectory":
			continue // its own, and those of the daemon stay the daemon's
		}
		out = append(out, line)
	}
	m.run("cat >/etc/systemd/system/" + name + ".service <<'END'\n" + strings.Join(out, "") + "\nEND\nsystemctl daemon-reload && systemctl start " + name)
}

// TestUnit runs the daemon under the real unit, with everything that it keeps
// from it, and has it do all that needs a right.
func TestUnit(t *testing.T) {
	t.Parallel()
	m := boot(t, packages(t))
	m.exim()
	m.run("dpkg -i /mnt/smtpguard_1.0.0-1_amd64.deb")
	m.run(`ip netns add peer && ip link add v0 type veth peer name v1 netns peer && ip addr add 198.51.100.1/24 dev v0 && ip link set v0 up &&
		ip -n peer addr add 198.51.100.9/24 dev v1 && ip -n peer addr add 198.51.100.22/24 dev v1 && ip -n peer link set v1 up && exim4 -bd`)
	m.enforce()

	// Exim is asked, the log is read, the socket table seen, the packet
	// filter set.
	status := m.run("smtpguard --json status")
	for _, want := range []string{`"capacity":77`, `"capacity_from":"Exim's smtp_accept_max"`, `"usable":true`, `"can_destroy":true`, `"backend":"nftables"`, `"agrees":true`} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %s: %s", want, status)
		}
	}

	// A block ends a connection.
	m.run(`ip netns exec peer bash -c 'exec 3<>/dev/tcp/198.51.100.1/25 && head -n 1 <&3 >/tmp/greeted && cat <&3 >/dev/null; touch /tmp/ended' >/dev/null 2>&1 &
		until [ -s /tmp/greeted ]; do sleep 0.05; done; smtpguard block 198.51.100.9 --for 1h; until [ -e /tmp/ended ]; do sleep 0.05; done`)

	// Whose process a connection is can be seen, also another user's: nobody
	// blocks the peer of an SSH session.
	m.run(`cat >/tmp/sshd.pl <<'END'
use IO::Socket::INET;
my $l = IO::Socket::INET->new(LocalAddr => "198.51.100.1", LocalPort => 22, Listen => 1, ReuseAddr => 1) or die;
sub say_so { open(my $r, ">", $_[0]); print $r "x"; close $r }
say_so("/tmp/listens");
my $c = $l->accept; close $l;
$0 = "sshd: admin\@pts/0";
say_so("/tmp/loggedin"); $> = 65534; sleep 600;
END
		cp /usr/bin/perl /tmp/sshd; /tmp/sshd /tmp/sshd.pl >/dev/null 2>&1 & until [ -s /tmp/listens ]; do sleep 0.05; done
		ip netns exec peer perl -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(PeerAddr => "198.51.100.1:22", LocalAddr => "198.51.100.22") or die; sleep 600' >/dev/null 2>&1 &
		until [ -s /tmp/loggedin ]; do sleep 0.05; done`)
	m.run("systemctl restart smtpguard") // it looks again at times
	if out, err := m.try("smtpguard block 198.51.100.22 --for 1h"); err == nil || !strings.Contains(out, "SSH") {
		t.Errorf("the peer of an SSH session can be blocked: %s", out)
	}

	// Reload and restart.
	m.run("systemctl reload smtpguard && systemctl restart smtpguard && smtpguard firewall status && " + table + " | grep 192.0.2.7")
	m.want("stat -c '%a %U' /var/lib/smtpguard/smtpguard.db /run/smtpguard/smtpguard.sock", "600 root\n600 root")

	// The other packet filter, in both of its forms: the old one needs a lock.
	for _, form := range []string{"nft", "legacy"} {
		m.run("systemctl stop smtpguard && smtpguard firewall flush && for v in iptables ip6tables; do update-alternatives --set $v /usr/sbin/$v-" + form + ` || exit 1; done
			sed -i 's/^  backend: .*/  backend: iptables/' /etc/smtpguard/policy.yaml && rm -f /run/xtables.lock && systemctl start smtpguard && smtpguard block 192.0.2.7 --for 1h && smtpguard firewall status`)
		out := m.run("smtpguard --json firewall status; iptables-" + form + "-save; ipset list")
		for _, want := range []string{`"backend":"iptables"`, "-A SMTPGUARD", "192.0.2.7 timeout"} {
			if !strings.Contains(out, want) {
				t.Errorf("iptables-%s lacks %s: %s", form, want, out)
			}
		}
	}

	// A mail from within is delivered by the local mail server as that user,
	// into a file that the unit itself must not write.
	m.run(`systemctl start dbus && useradd --create-home reader && sed -i 's/^hooks: .*/hooks: [{on: [block], mail: reader@mx.example.net, from: guard@mx.example.net}]/' /etc/smtpguard/policy.yaml &&
		systemctl restart smtpguard && smtpguard block 192.0.2.99 --for 1h
		for i in $(seq 600); do grep -q '192.0.2.99.* is blocked' /var/mail/reader 2>/dev/null && break; sleep 0.05; done`)
	if got := m.run("grep -c '^Message-ID: ' /var/mail/reader; stat -c %U /var/mail/reader; exim4 -bpc; systemctl list-units --all --plain --no-legend 'run-*.service'"); got != "1\nreader\n0" {
		t.Errorf("a mail from within: %s\n%s", got, m.run("tail -n 20 /var/log/exim4/mainlog /var/log/exim4/paniclog; journalctl --no-pager -o cat -n 20; true"))
	}

	// What the policy names and the unit does not allow: doctor says so, and
	// what it says helps.
	m.run("systemctl stop smtpguard && sed -i 's#/var/lib/smtpguard/smtpguard.db#/srv/guard/smtpguard.db#' /etc/smtpguard/policy.yaml")
	report, _ := m.try("smtpguard --json doctor 2>/dev/null")
	var checks struct {
		Checks []struct {
			Name, Status string
			Mend         []string
		}
	}
	if err := json.Unmarshal([]byte(report), &checks); err != nil {
		t.Fatalf("%v: %s", err, report)
	}
	mended := false
	for _, c := range checks.Checks {
		if c.Name == "unit" && c.Status == "fail" {
			m.run(strings.Join(c.Mend, "\n"))
			mended = true
		}
	}
	if !mended {
		t.Errorf("doctor sees no fault in a store that the unit cannot write: %s", report)
	}
	m.run("systemctl is-active smtpguard && test -s /srv/guard/smtpguard.db")

	// And what must not be possible.
	m.run(`cat >/mnt/no.sh <<'END'
for d in /etc /etc/smtpguard /etc/systemd/system /usr /root /home /var/lib /var/spool /run /run/systemd/system; do
	touch $d/x 2>/dev/null && echo "can write to $d"
done
mount -t tmpfs t /var/lib/smtpguard 2>/dev/null && echo "can mount"
unshare --uts true 2>/dev/null && echo "can make a namespace"
echo tried
END`)
	m.as("no", "/bin/sh /mnt/no.sh", "")
	m.want("journalctl -o cat -t sh -u no", "tried")
	// That says something only if all of it can be done outside.
	if all := m.run("sh /mnt/no.sh"); strings.Count(all, "can ") != 12 {
		t.Errorf("outside of the unit:\n%s", all)
	}
}

// exposure is what `systemd-analyze security` gave when the unit was last
// looked through, on a scale from 0 (kept from everything) to 10.
const exposure = 3.3

func TestUnitExposure(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		skip(t, err)
	}
	cmd := exec.Command("systemd-analyze", "security", "--offline=true", fmt.Sprintf("--threshold=%.0f", exposure*10), "../smtpguard.service")
	if out, err := cmd.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		t.Errorf("%v: %s; want %v at most", err, lines[len(lines)-1], exposure)
	}
}

func TestScripts(t *testing.T) {
	scripts := []string{"postinst", "prerm", "postrm", "version"}
	for _, s := range scripts {
		if out, err := exec.Command("sh", "-n", s).CombinedOutput(); err != nil {
			t.Errorf("%s: %s", s, out)
		}
	}
	if _, err := exec.LookPath("shellcheck"); err != nil {
		skip(t, err)
	}
	if out, err := exec.Command("shellcheck", scripts...).CombinedOutput(); err != nil {
		t.Errorf("%s", out)
	}
}
