package diagnose

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Machine is what can be seen, now, of the machine whose logs are read. Files
// alone do not tell that Exim is down at this moment: a process that was ended
// writes no line.
type Machine struct {
	Now time.Time
	// Ports are Exim's, as the policy has them. Listen are those on which
	// something listens, Programs what does ("": not known).
	Ports, Listen []uint16
	Programs      []string
	// Daemons are the process ids of Exim's daemons in this network namespace,
	// and of children that outlived theirs; Elsewhere those of other ones.
	Daemons, Elsewhere []int
	// ConfigErr: Exim could not tell its configuration, hence may not start.
	ConfigErr error
	// Start is the command that starts Exim here, and says what went wrong.
	Start []string
	// Last are the last lines of its logs, Written when they were.
	Last    []string
	Written time.Time
}

// down reports whether nothing serves Exim's ports.
func (m *Machine) down() bool { return m != nil && len(m.Listen) == 0 }

// taken reports whether something that is not Exim serves its ports.
func (m *Machine) taken() bool {
	if m == nil || len(m.Listen) == 0 || len(m.Daemons) > 0 || len(m.Programs) == 0 {
		return false
	}
	for _, p := range m.Programs {
		if p == "" || strings.HasPrefix(p, "exim") || p == "systemd" || p == "init" || strings.HasSuffix(p, "inetd") {
			return false // those that start an Exim for each connection
		}
	}
	return true
}

// Wrong reports whether Exim serves nobody on this machine.
func (m *Machine) Wrong() bool { return m.down() || m.taken() }

// saysConfig reports whether Exim's last lines tell of its configuration: it
// writes them when it starts, and a fault there ends it (readconf.c).
func (m *Machine) saysConfig() bool {
	return slices.ContainsFunc(m.Last, func(l string) bool {
		return strings.Contains(l, "Exim configuration error") || strings.Contains(l, "configuration file")
	})
}

// machineFindings say what is wrong at this moment.
func (d *Diagnosis) machineFindings() []Finding {
	m := d.o.Machine
	if !m.Wrong() {
		return nil
	}
	f := Finding{Kind: NotRunning, weight: weights[NotRunning], Times: 1, Confidence: Certain, First: m.Written, Last: m.Now}
	for _, l := range m.Last[:min(len(m.Last), maxLines+2)] {
		f.Lines = append(f.Lines, show([]byte(l)))
	}
	return []Finding{f}
}

// machineWords are those of an Exim that is not there.
func (d *Diagnosis) machineWords(f *Finding, why func(string, ...any), do func(...string)) {
	m := d.o.Machine
	ports := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(m.Ports)), ", "), "[]")
	switch {
	case m.taken():
		f.Title = fmt.Sprintf("Exim is not running: its ports are served by %s", show([]byte(strings.Join(m.Programs, ", "))))
		why("no process of Exim's daemon is there")
		do(fmt.Sprintf("`ss -ltnp 'sport = :%d'` shows who it is; end it, or move it to another port, then start Exim:", m.Listen[0]))
	case len(m.Daemons) > 0:
		f.Title = fmt.Sprintf("Exim does not listen, though a process of it is there (%d)", m.Daemons[0])
		f.Confidence = Likely
		why("nothing listens on the ports %s", ports)
		do("Either it was ended, and what is left serves its last connections; or it hangs while it starts; or it listens on other ports (`ss -ltnp | grep exim`: then name them in `ports:` of the policy).",
			"If it does not listen, start it anew:")
	default:
		f.Title = "Exim is not running"
		why("nothing listens on the ports %s, and no process of Exim's daemon is there", ports)
		if len(m.Elsewhere) > 0 {
			f.Confidence = Likely
			why("an Exim runs in another network namespace (process %d): if it is in a container and the one that is meant, run smtpguard there", m.Elsewhere[0])
		}
		do("Start it:")
	}
	if m.ConfigErr != nil {
		why("%s", show([]byte(m.ConfigErr.Error())))
	} else if m.saysConfig() {
		why("its last lines are of a fault in its configuration")
	}
	if m.ConfigErr != nil || m.saysConfig() {
		f.Do = append([]string{"`exim -bV` (Debian: `exim4 -bV`, after `update-exim4.conf`) names file and line of what it does not take in its configuration: mend that first."}, f.Do...)
	}
	if !m.Written.IsZero() {
		why("its log was last written %s ago", short(max(0, m.Now.Sub(m.Written))))
	}
	if n := len(f.Do); n > 0 && len(m.Start) > 0 { // "start it:", and how
		f.Do[n-1] += " " + m.Start[0]
		do(m.Start[1:]...)
	}
	if m.saysConfig() {
		return
	}
	do("Did the kernel end it for want of memory? `dmesg -T | grep -i 'killed process'`. Is a disk full? `df -h /var/spool /var/log`.",
		"Senders try again for days: no mail is lost yet.")
}

// Guarding is what smtpguard does about a flood on this machine now.
type Guarding struct {
	// Mode of the daemon, "observe" or "enforce"; "": none runs, or it is not
	// known.
	Mode string
	// PolicyMode is what the policy says, PolicyFile where.
	PolicyMode, PolicyFile string
}

// block says how sources are blocked, from how things stand.
func (g Guarding) block(prefixes []string) []string {
	file := g.PolicyFile
	if file == "" {
		file = "/etc/smtpguard/policy.yaml"
	}
	byHand := "`smtpguard block " + strings.Join(prefixes, " ") + " --for 1h`"
	const see = "`smtpguard replay LOG` shows whom it would block, and when it would have"
	set := "set `mode: enforce` in " + file
	// To be pasted, in this order.
	now := func(then string) []string {
		if len(prefixes) == 0 {
			return nil
		}
		return []string{"By hand, at once: `sed -i 's/^mode: .*/mode: enforce/' " + file + "`, `" + then + "`, " + byHand + "."}
	}
	switch {
	case g.Mode == "enforce":
		lines := []string{"The daemon runs and enforces: `smtpguard blocks list` shows whom it has blocked."}
		if len(prefixes) > 0 {
			lines = append(lines, "If it goes on and these are not among them, `smtpguard explain "+prefixes[0]+"` says why, and this ends it within seconds: "+byHand+".")
		}
		return lines
	case g.Mode != "" && g.PolicyMode == "enforce":
		return []string{"The daemon still observes, though the policy says enforce: `systemctl reload smtpguard`, or restart it if it was started with --mode. Then it blocks."}
	case g.Mode != "":
		return append([]string{"The daemon only observes, and blocks nobody, by hand neither: " + see + ".",
			"To let it block: " + set + ", then `systemctl reload smtpguard`."}, now("systemctl reload smtpguard")...)
	case g.PolicyMode == "enforce":
		lines := []string{"No daemon answers: `systemctl enable --now smtpguard` (the policy says enforce); " + see + "."}
		if len(prefixes) > 0 {
			lines = append(lines, "By hand, when that is done: "+byHand+".")
		}
		return lines
	}
	return append([]string{"No daemon answers. To let it block: " + set + ", then `systemctl enable --now smtpguard`; " + see + "."},
		now("systemctl enable --now smtpguard")...)
}
