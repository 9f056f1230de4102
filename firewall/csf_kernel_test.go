package firewall

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// openKernel opens the stand-in with its rules in the kernel of ns.
func (r csfRoot) openKernel(t testing.TB, ns netNS, o Options) *csf {
	t.Helper()
	if _, err := exec.LookPath("iptables"); err != nil {
		cannot(t, "iptables is not installed")
	}
	r.write(t, "rules", "")
	o.NetNS = ns.fd
	fw := r.open(t, o)
	fw.kernel = &csfKernel{netNS: ns.fd, usual: csfConfDefault.commands}
	return fw
}

// TestCSFKernel is what administrators do to CSF beside us: what is told to be
// in force drops packets, and the reason why it does not is told in words.
func TestCSFKernel(t *testing.T) {
	ns, client := newNetNS(t), newNetNS(t)
	wire(t, ns, client, []string{"10.9.0.1/16"}, []string{"10.9.2.2/16", "10.9.3.3/16"})
	ns.echo("10.9.0.1:25")
	r := newFakeCSF(t, "")
	fw := r.openKernel(t, ns, Options{Ports: []uint16{25}})
	dropped := func(want bool) {
		t.Helper()
		if got, err := client.refused("10.9.2.2", "10.9.3.3", "10.9.0.1:25"); err != nil || got != want {
			t.Errorf("dropped: %v, want %v; %v", got, want, err)
		}
	}
	csf := func(args ...string) { t.Helper(); ns.run(r.path("csf"), args...) }
	gone := func(want string) {
		t.Helper()
		for what, err := range map[string]error{
			"Ensure":  second(fw.Ensure(t.Context())),
			"Replace": fw.Replace(t.Context(), []Entry{{many(1)[0].Prefix, time.Now().Add(time.Hour)}}),
		} {
			if !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v", what, err)
			}
		}
		for in, err := range fw.List(t.Context()) {
			if err == nil {
				t.Errorf("%v is listed", in.Prefix)
			}
		}
	}

	do(t, fw, "replace")
	gone("csf -r puts it back") // not started yet: no call, which CSF would take for fatal
	csf("-r")
	do(t, fw, "replace 10.9.2.0/24 10m, 2001:db8::/64 10m")
	expect(t, fw, "10.9.2.0/24 10m\n2001:db8::/64 10m")
	dropped(true)

	csf("-f")
	dropped(false)
	gone("as after csf -f")
	r.write(t, "etc/csf/csf.conf", strings.Replace(usualCSFConf, `TESTING = "0"`, `TESTING = "1"`, 1))
	gone(`TESTING = "0" in csf.conf`)
	if got := strings.Join(fw.Warnings(), "\n"); !strings.Contains(got, "CSF is in TESTING mode") || !strings.Contains(got, "lfd does not run") {
		t.Error(got)
	}
	r.write(t, "etc/csf/csf.conf", usualCSFConf)
	csf("-r")
	if changed, err := fw.Ensure(t.Context()); err != nil || changed {
		t.Errorf("after csf -r: changed %v, %v", changed, err)
	}
	expect(t, fw, "10.9.2.0/24 10m\n2001:db8::/64 10m")
	dropped(true)

	// A rule without its ban's knowledge.
	ns.run("iptables", "-F", csfChain)
	dropped(false)
	expect(t, fw, "2001:db8::/64 10m")
	if changed, err := fw.Ensure(t.Context()); err != nil || !changed {
		t.Errorf("a rule is gone: changed %v, %v", changed, err)
	}
	do(t, fw, "replace 10.9.2.0/24 10m, 2001:db8::/64 10m")
	dropped(true)

	// CSF that breaks, is started again, and is turned off.
	ns.run("iptables", "-F")
	r.write(t, "etc/csf/csf.error", "x")
	if _, err := fw.Ensure(t.Context()); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "csf -r starts it again") {
		t.Error(err)
	}
	csf("-r")
	expect(t, fw, "10.9.2.0/24 10m\n2001:db8::/64 10m")
	csf("-x")
	if _, err := fw.Ensure(t.Context()); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "csf -e enables it") {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestCSFBlind: where rules cannot be read, the files alone are believed, and
// that is told.
func TestCSFBlind(t *testing.T) {
	r := newFakeCSF(t, "")
	fw := r.openKernel(t, newNetNS(t), Options{})
	fw.kernel.usual = [2]string{r.path("no-iptables"), r.path("no-ip6tables")}
	r.write(t, "etc/csf/csf.conf", "IPTABLES = \""+r.path("no-iptables")+"\"\n")
	if err := os.Remove(r.path("rules")); err != nil {
		t.Fatal(err)
	}
	do(t, fw, "set 192.0.2.7/32 10m")
	expect(t, fw, "192.0.2.7/32 10m")
	if got := strings.Join(fw.Warnings(), "\n"); !strings.Contains(got, "cannot be seen") {
		t.Error(got)
	}
}

// killMe in the environment makes the test binary a daemon that is about to be
// killed: it has the stand-in in the directory block what is in killSet.
const killMe = "SMTPGUARD_TEST_KILL_ME"

func toBeKilled(root string) {
	p := csfAt(root)
	p.command = root + "/csf"
	fw, err := newCSF(Options{Ports: []uint16{25}, State: root}, p, 0)
	if err != nil {
		panic(err)
	}
	ctx := context.Background()
	b := Batch{Set: []Entry{{netip.MustParsePrefix("192.0.2.7/32"), time.Now().Add(20 * time.Minute)}}}
	if os.Getenv(killMe+"_UNSET") != "" {
		b = Batch{Unset: []netip.Prefix{netip.MustParsePrefix("192.0.2.7/32")}}
	}
	_, err = fw.Apply(ctx, b)
	panic(err) // not reached: the kill comes first
}

// TestCSFKill: a kill between csf -trd and csf -td loses no ban, neither ours
// nor that of somebody else; nor does one at any other call.
func TestCSFKill(t *testing.T) {
	const c = csfComment
	others := "NOW|192.0.2.7|22|in|3600|lfd (sshd) x\n"
	for _, tc := range []struct {
		name, at string
		unset    bool
		after    string // what the next start makes of it
	}{
		{"extending: before it is removed", "-trd", false, others + "NOW|192.0.2.7|25|in|1200|" + c + "\n"},
		{"extending: before ours", "-td 192.0.2.7 1200 -p 25", false, others + "NOW|192.0.2.7|25|in|1200|" + c + "\n"},
		{"extending: before theirs", "-td 192.0.2.7 3", false, others + "NOW|192.0.2.7|25|in|1200|" + c + "\n"},
		{"lifting: before it is removed", "-trd", true, others},
		{"lifting: before theirs", "-td", true, others},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newFakeCSF(t, "")
			r.write(t, "var/lib/csf/csf.tempban", ban(0, "192.0.2.7|22|in|3600|lfd (sshd) x")+ban(0, "192.0.2.7|25|in|600|"+c))
			r.write(t, "killer", tc.at)
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), killMe+"="+string(r))
			if tc.unset {
				cmd.Env = append(cmd.Env, killMe+"_UNSET=1")
			}
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
				t.Fatalf("%v\n%s", err, out)
			}
			if err := os.Remove(r.path("killer")); err != nil {
				t.Fatal(err)
			}
			// What the store says is what Replace gets at a start.
			fw := r.open(t, Options{Ports: []uint16{25}, State: string(r)})
			if tc.unset {
				do(t, fw, "replace")
			} else {
				do(t, fw, "replace 192.0.2.7/32 20m")
			}
			got := sortedLines(near(r.read(t, "var/lib/csf/csf.tempban")))
			if got != sortedLines(tc.after) {
				t.Errorf("csf.tempban:\n%swant\n%s", got, tc.after)
			}
			if _, err := os.Stat(r.path("csf.owed")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the debt is paid and still written down: %v", err)
			}
		})
	}
}

// TestCSFOldDebt: what was lost long ago is not banned again.
func TestCSFOldDebt(t *testing.T) {
	r := newFakeCSF(t, "")
	r.write(t, "csf.owed", ban(0, "192.0.2.7|22|in|36000|lfd")+"rubbish\n")
	old := time.Now().Add(-2 * csfDebtAge)
	if err := os.Chtimes(r.path("csf.owed"), old, old); err != nil {
		t.Fatal(err)
	}
	do(t, r.open(t, Options{State: string(r)}), "replace")
	if got := r.read(t, "calls"); got != "" {
		t.Error(got)
	}
	now := time.Now()
	if err := os.Chtimes(r.path("csf.owed"), now, now); err != nil {
		t.Fatal(err)
	}
	do(t, r.open(t, Options{State: string(r)}), "replace")
	if got := near(r.read(t, "var/lib/csf/csf.tempban")); got != "NOW|192.0.2.7|22|in|36000|lfd\n" {
		t.Error(got)
	}
}

func sortedLines(s string) string {
	return strings.Join(slices.Sorted(strings.Lines(s)), "")
}
