package doctor

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/smtpguard/smtpguard/policy"
)

// shipped is what `systemctl show` (252) prints of the unit as it is shipped.
const shipped = `StateDirectory=smtpguard
RuntimeDirectory=smtpguard
CacheDirectory=
LogsDirectory=
ReadWritePaths=-/var/spool/exim4 -/var/spool/exim -/var/log -/etc/csf -/var/lib/csf
PrivateTmp=yes
ProtectHome=yes
ProtectSystem=strict
LoadState=loaded
`

func TestUnitPaths(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*policy.Policy)
		unit   string
		says   string // of the checks that are not OK
		mend   string
	}{
		{"shipped", func(*policy.Policy) {}, shipped, "", ""},
		{"elsewhere", func(p *policy.Policy) { p.Store.Path, p.Metrics.Listen = "/srv/a b/x.db", "unix:/run/prom/s" }, shipped,
			"fail unit: under systemd the daemon cannot write store.path (/srv/a b), metrics.listen (/run/prom)\n",
			"mkdir -p '/srv/a b' '/run/prom' /etc/systemd/system/smtpguard.service.d\ncat >/etc/systemd/system/smtpguard.service.d/paths.conf <<'END'\n[Service]\nReadWritePaths=\"/srv/a b\" \"/run/prom\"\nEND"},
		{"opened", func(p *policy.Policy) { p.Store.Path = "/srv/x/y.db" }, strings.Replace(shipped, "/var/log", "/srv/x /var/log", 1), "", ""},
		{"beside", func(p *policy.Policy) { p.Reports.Dir = "/var/lib/smtpguard-reports" }, shipped,
			"fail unit: under systemd the daemon cannot write reports.dir (/var/lib/smtpguard-reports)\n", ""},
		{"home", func(p *policy.Policy) { p.Hooks = []policy.EventHook{{Command: []string{"/root/tell.sh"}}} }, shipped,
			"fail unit: under systemd the daemon sees nothing of hooks: command (/root/tell.sh)\n", "Move it"},
		{"tmp", func(p *policy.Policy) { p.Control.Socket = "/tmp/s" }, shipped,
			"fail unit: under systemd the daemon sees nothing of control.socket (/tmp)\n", ""},
		{"no unit", func(p *policy.Policy) { p.Store.Path = "/srv/x" }, strings.Replace(shipped, "loaded", "not-found", 1), "", ""},
		{"no systemd", func(p *policy.Policy) { p.Store.Path = "/srv/x" }, "", "", ""},
	} {
		f := well()
		c.change(f.Policy)
		f.Unit = parseUnit(c.unit)
		r := Examine(f)
		if got := worse(r); got != c.says {
			t.Errorf("%s: %q, want %q", c.name, got, c.says)
		}
		for _, k := range r.Checks {
			if k.Status != OK && !strings.HasPrefix(strings.Join(k.Mend, "\n"), c.mend) {
				t.Errorf("%s: mend %q", c.name, k.Mend)
			}
		}
	}
}

// TestUnitFile: what is shipped says what the test above takes for it.
func TestUnitFile(t *testing.T) {
	b, err := os.ReadFile("../smtpguard.service")
	if err != nil {
		t.Fatal(err)
	}
	got, want := parseUnit(string(b)+"\nLoadState=loaded\n"), parseUnit(shipped)
	slices.Sort(got.Writable)
	slices.Sort(want.Writable)
	if !slices.Equal(got.Writable, want.Writable) || got.Strict != want.Strict || got.NoHome != want.NoHome || got.OwnTmp != want.OwnTmp {
		t.Errorf("the unit is %+v, want %+v", got, want)
	}
}

// TestDropIn: the shell and systemd read what is to be pasted.
func TestDropIn(t *testing.T) {
	dir := t.TempDir()
	odd := dir + `/it's 50% "a b"\`
	script := strings.Join(dropIn([]string{odd})[:2], "\n")
	script = strings.ReplaceAll(script, "/etc/systemd/system", dir)
	if out, err := exec.Command("sh", "-ec", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s\n%s", err, out, script)
	}
	b, err := os.ReadFile(dir + "/smtpguard.service.d/paths.conf")
	if _, serr := os.Stat(odd); serr != nil || err != nil || !strings.Contains(string(b), `50%% \"a b\"\\"`) {
		t.Errorf("%v, %v: %s", err, serr, b)
	}
}
