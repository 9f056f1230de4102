package doctor

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Unit is what systemd lets the daemon see and write, as systemd.exec(5) has
// it. The zero value is a daemon that systemd does not start: all of it.
type Unit struct {
	Strict   bool     // ProtectSystem=strict: nothing can be written but Writable
	Writable []string // directories and files, with all below them
	NoHome   bool     // /home, /root and /run/user cannot be seen
	OwnTmp   bool     // its /tmp and /var/tmp are others than everybody's
}

const unitName = "smtpguard.service"

// lookUnit asks systemd about our unit. Without systemd, or with no such unit,
// the answer is the zero value.
func lookUnit(ctx context.Context) (u Unit, err error) {
	if _, err := os.Stat("/run/systemd/system"); err != nil { // sd_booted(3)
		return u, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", "show", unitName,
		"--property=LoadState,ProtectSystem,ProtectHome,PrivateTmp,ReadWritePaths,StateDirectory,RuntimeDirectory,LogsDirectory,CacheDirectory").Output()
	if err != nil {
		return u, fmt.Errorf("asking systemd about %s: %w", unitName, err)
	}
	return parseUnit(string(out)), nil
}

// parseUnit reads what `systemctl show` prints: NAME=VALUE, lists with blanks
// between. A path may begin with - (it need not be there) and + (below the
// unit's RootDirectory).
func parseUnit(shown string) (u Unit) {
	loaded := false
	for line := range strings.Lines(shown) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		base := map[string]string{"StateDirectory": "/var/lib", "RuntimeDirectory": "/run", "LogsDirectory": "/var/log", "CacheDirectory": "/var/cache"}[name]
		switch {
		case name == "LoadState":
			loaded = value == "loaded"
		case name == "ProtectSystem":
			u.Strict = value == "strict"
		case name == "ProtectHome":
			u.NoHome = value == "yes" || value == "tmpfs"
		case name == "PrivateTmp":
			u.OwnTmp = value == "yes"
		case name == "ReadWritePaths":
			for p := range strings.FieldsSeq(value) {
				u.Writable = append(u.Writable, filepath.Clean(strings.TrimLeft(p, "-+")))
			}
		case base != "":
			for p := range strings.FieldsSeq(value) {
				u.Writable = append(u.Writable, filepath.Join(base, p))
			}
		}
	}
	if !loaded {
		return Unit{}
	}
	return u
}

// below reports whether path is one of these or lies in one.
func below(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(d string) bool {
		return path == d || strings.HasPrefix(path, strings.TrimSuffix(d, "/")+"/")
	})
}

// unit compares what the policy names with what systemd's unit lets the daemon
// see and write: outside of systemd the same policy works.
func (x *exam) unit() {
	const name = "unit"
	if x.UnitErr != nil {
		x.skip(name, oneLine(x.UnitErr))
		return
	}
	p := x.Policy
	writes := [][2]string{{"store.path", filepath.Dir(p.Store.Path)}, {"control.socket", filepath.Dir(p.Control.Socket)}, {"reports.dir", p.Reports.Dir}}
	if network, path := p.Metrics.Split(); network == "unix" {
		writes = append(writes, [2]string{"metrics.listen", filepath.Dir(path)})
	}
	sees := [][2]string{{"reports.overrides", p.Reports.Overrides}, {"reports.asn_database", p.Reports.ASNDatabase},
		{"reports.lookup.ipinfo_token_file", p.Reports.Lookup.IPinfoTokenFile}, {"reports.delivery.password_file", p.Reports.Delivery.PasswordFile}}
	for _, l := range x.Logs {
		sees = append(sees, [2]string{"logs", l.Path})
	}
	for _, h := range p.Hooks {
		sees = append(sees, [2]string{"hooks: header_file", h.HeaderFile}, [2]string{"hooks: secret_file", h.SecretFile})
		if len(h.Command) > 0 {
			sees = append(sees, [2]string{"hooks: command", h.Command[0]})
		}
	}
	var hidden, closed, dirs []string
	hide := func(setting, path string) bool {
		if x.Unit.NoHome && below(path, "/home", "/root", "/run/user") || x.Unit.OwnTmp && below(path, "/tmp", "/var/tmp") {
			hidden = append(hidden, setting+" ("+bounded(path, 200)+")")
			return true
		}
		return false
	}
	for _, w := range writes {
		if path := filepath.Clean(w[1]); w[1] != "" && !hide(w[0], path) && x.Unit.Strict && !below(path, x.Unit.Writable...) {
			closed = append(closed, w[0]+" ("+bounded(path, 200)+")")
			if !slices.Contains(dirs, path) {
				dirs = append(dirs, path)
			}
		}
	}
	for _, s := range sees {
		if s[1] != "" {
			hide(s[0], filepath.Clean(s[1]))
		}
	}
	if len(hidden) > 0 {
		x.fail(name, "under systemd the daemon sees nothing of "+strings.Join(hidden, ", "),
			"Its unit hides /home, /root and the /tmp of others from it.", "Move it elsewhere, for example below /etc/smtpguard or /var/lib/smtpguard, and change the policy.")
	}
	if len(closed) > 0 {
		x.fail(name, "under systemd the daemon cannot write "+strings.Join(closed, ", "),
			"Its unit allows only "+strings.Join(x.Unit.Writable, " ")+".", dropIn(dirs)...)
	}
	if len(hidden)+len(closed) == 0 && x.Unit.Strict {
		x.ok(name, "systemd's unit lets the daemon see and write what the policy names")
	}
}

// dropIn are the commands that open directories to the unit.
func dropIn(dirs []string) []string {
	var quoted, shell []string
	for _, d := range dirs {
		// systemd.syntax(7): a word in double quotes, with % and \ doubled.
		quoted = append(quoted, `"`+strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`).Replace(d)+`"`)
		shell = append(shell, "'"+strings.ReplaceAll(d, "'", `'\''`)+"'")
	}
	return []string{"mkdir -p " + strings.Join(shell, " ") + " /etc/systemd/system/" + unitName + ".d",
		"cat >/etc/systemd/system/" + unitName + ".d/paths.conf <<'END'\n[Service]\nReadWritePaths=" + strings.Join(quoted, " ") + "\nEND",
		"systemctl daemon-reload && systemctl restart smtpguard"}
}
