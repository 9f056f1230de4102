package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/policy"
)

// asked reports whether Exim's configuration is known and of this log; if not
// it says so under that name.
func (x *exam) asked(name string) bool {
	switch {
	case errors.Is(x.EximErr, exim.ErrNoExim):
		x.skip(name, "there is no Exim on this machine to be asked")
	case x.EximErr != nil:
		x.skip(name, "Exim's configuration could not be read: "+oneLine(x.EximErr))
	case !x.writes():
		x.skip(name, "this machine's Exim writes another log than the one that is followed; its configuration is left aside")
	default:
		return true
	}
	return false
}

// logs: found, readable, written lately.
func (x *exam) logs() {
	const name = "log"
	switch {
	case x.LogErr == nil:
	case errors.Is(x.LogErr, fs.ErrPermission) && !x.Root:
		x.skip(name, oneLine(x.LogErr)+"; run doctor as root")
		return
	default:
		x.fail(name, oneLine(x.LogErr), "Without a log nothing is noticed but what the socket table shows.",
			"Name it in "+x.policyFileName()+":", "logs: [/var/log/exim_mainlog]")
		return
	}
	for _, l := range x.Logs {
		switch {
		case l.Err != nil && !x.Root:
			x.skip(name, fmt.Sprintf("%s cannot be read by you (%s %s); run doctor as root", l.Path, l.Mode, l.Owner))
		case l.Err != nil:
			x.fail(name, fmt.Sprintf("%s: %s", l.Path, oneLine(l.Err)), "A flood is noticed by the log.", "Look whether Exim runs and writes there: `exim -bP log_file_path`.")
		case l.Size == 0:
			x.warn(name, l.Path+" is empty", "Either Exim has written nothing since it was rotated, or it writes elsewhere.", "`exim -bP log_file_path` says where.")
		case x.Now.Sub(l.Written) > 24*time.Hour:
			x.warn(name, fmt.Sprintf("%s was last written %s ago", l.Path, hours(x.Now.Sub(l.Written))), "Exim may write to another one.", "`exim -bP log_file_path` says where.")
		default:
			x.ok(name, fmt.Sprintf("%s (%s %s) was written %s ago", l.Path, l.Mode, l.Owner, hours(x.Now.Sub(l.Written))))
		}
	}
}

// selector: does Exim log connections, with their ports?
func (x *exam) selector() {
	const name = "log-selector"
	l, ok := x.log()
	known := x.EximErr == nil && x.writes()
	conns, ports := x.Exim.SmtpConnection, x.Exim.IncomingPort
	from := "log_selector"
	if !known { // by its lines
		from = "the log"
		if !ok || l.Stats.Lines < 100 {
			x.skip(name, "too few lines in the log to say whether connections are in it, and Exim cannot be asked")
			return
		}
		conns, ports = l.Stats.Opened > 0, l.Stats.WithPort > 0 || l.Stats.WithoutPort == 0
	}
	const add = "+smtp_connection +incoming_port"
	switch {
	case !conns:
		means := "The socket table alone shows who holds slots; nothing tells what happened before the daemon was started, or why."
		if x.Policy.Confirm == policy.ConfirmOff {
			x.fail(name, from+" has no connections (+smtp_connection), and confirm is off", "Nothing shows who holds slots.", x.selectorSetting(add)...)
			return
		}
		x.warn(name, from+" has no connections (+smtp_connection)", means, x.selectorSetting(add)...)
	case !ports:
		x.warn(name, from+" has no ports (+incoming_port)", "Which connection has ended is then a guess, and abuse reports lack what desks ask for.", x.selectorSetting(add)...)
	case known && ok && l.Stats.Lines > 1000 && l.Stats.Opened == 0:
		x.warn(name, "log_selector has connections, but the log's last lines have none", "Exim was started before the configuration was changed, or with another one.", "Restart Exim: `systemctl restart exim4` (cPanel: `/scripts/restartsrv_exim`).")
	default:
		x.ok(name, "connections are logged, with their ports")
	}
	if ok && l.Stats.Proxied > 0 {
		x.warn("proxy", "mail comes through a PROXY protocol front end", "The packet filter here never sees the client; blocking must happen in front.")
	}
	if ok && l.Stats.Inetd > 0 && l.Stats.Opened == 0 {
		x.warn("inetd", "connections are taken by inetd, not by Exim's daemon", "There are no slots then: smtp_accept_max has no effect.", "Run Exim as a daemon (exim -bd).")
	}
}

// zone: are the log's times understood?
func (x *exam) zone() {
	const name = "time-zone"
	l, ok := x.log()
	if !ok || l.LastLine.IsZero() {
		x.skip(name, "no line with a time in the log")
		return
	}
	off := l.Written.Sub(l.LastLine)
	quarter := off.Round(15 * time.Minute)
	switch {
	case quarter != 0 && quarter.Abs() <= 14*time.Hour && (off-quarter).Abs() < 2*time.Minute:
		x.fail(name, fmt.Sprintf("the log's times are %s off: its last line says %s, and was written at %s", hours(off.Abs()), l.LastLine.Format("15:04:05 MST"), l.Written.UTC().Format("15:04:05 MST")),
			"Lines look old or come from the future: verdicts and reports have wrong times.",
			"State the zone of the log in "+x.policyFileName()+", as in:", "zone: Europe/Berlin", "or let Exim write the offset:", "log_timezone = true")
	case l.LastLine.Sub(x.Now) > 2*time.Minute:
		x.fail(name, "the log's last line comes from the future: "+l.LastLine.Format(time.RFC3339), "The clock was set back, or the zone is another.", "`timedatectl` and `exim -bP timezone` should agree.")
	case !l.Offset && changes(l.LastLine, x.location()):
		x.warn(name, "the log's times have no offset, in a zone with summer time", "Once a year an hour comes twice; reports to others must guess.", x.setting("log_timezone = true")...)
	case l.Offset:
		x.ok(name, "the log's times have their offset")
	default:
		x.ok(name, "the log's times fit the clock")
	}
}

// location is the zone that is used for the log.
func (x *exam) location() *time.Location {
	if loc := x.Policy.Location(); loc != nil {
		return loc
	}
	if x.EximErr == nil {
		if loc, err := x.Exim.Location(); err == nil {
			return loc
		}
	}
	return time.Local
}

// changes reports whether the zone's offset changes within a year.
func changes(t time.Time, loc *time.Location) bool {
	_, first := t.In(loc).Zone()
	for m := 1; m < 12; m++ {
		if _, o := t.AddDate(0, m, 0).In(loc).Zone(); o != first {
			return true
		}
	}
	return false
}

func (x *exam) eximListens() {
	const name = "listening"
	s := x.Sockets
	switch {
	case s.Err != nil || s.ListenErr != nil && len(s.Listen) == 0:
		x.skip(name, "the socket table could not be read: "+oneLine(errors.Join(s.Err, s.ListenErr)))
	case len(s.Listen) == 0:
		x.warn(name, fmt.Sprintf("nothing listens on the ports %v in this network namespace", x.Policy.Ports),
			"Either Exim is down, or it runs in a container or namespace of its own, where its sockets cannot be seen or ended from here.",
			"`smtpguard diagnose` if it should run; else run smtpguard there, or set `confirm: off`.")
	default:
		x.ok(name, fmt.Sprintf("%s listens on %v", strings.Join(s.Programs, ", "), s.Listen))
	}
}

// slots: how many are there?
func (x *exam) slots() {
	const name = "slots"
	if !x.asked(name) {
		if x.Policy.Capacity == 0 && x.Daemon == nil {
			x.warn("capacity", "the number of slots is not known; 100 are assumed", "Pressure is wrong if there are more or fewer.", "State it in "+x.policyFileName()+":", "capacity: 100")
		}
		return
	}
	n := x.Exim.AcceptMax
	switch {
	case !x.Exim.AcceptMaxSet:
		x.skip(name, "Exim does not tell smtp_accept_max")
	case n == 0:
		x.fail(name, "smtp_accept_max is 0: there is no limit", "A flood takes all memory instead of all slots, and Exim counts nothing.", x.setting("smtp_accept_max = 100")...)
	case x.Policy.Capacity > 0 && x.Policy.Capacity != n:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d, and the policy says capacity: %d", n, x.Policy.Capacity), "When the server is full is judged by the policy.",
			"In "+x.policyFileName()+", unless Exim is started with another number:", "capacity: auto")
	case x.Daemon != nil && x.Daemon.Capacity != n:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d, and the daemon counts on %d (from %s)", n, x.Daemon.Capacity, x.Daemon.CapacityFrom), "It was changed since the daemon was started.", "systemctl restart smtpguard")
	case n <= 20:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d", n), "So few are full with proper mail alone.", x.setting("smtp_accept_max = 100")...)
	default:
		x.ok(name, fmt.Sprintf("%d slots (smtp_accept_max)", n))
	}
}

func (x *exam) timeouts() {
	const name = "receive-timeout"
	if !x.asked(name) {
		return
	}
	d := x.Exim.ReceiveTimeout
	switch {
	case d == 0:
		x.skip(name, "smtp_receive_timeout is not a plain number")
	case d > 5*time.Minute:
		x.warn(name, fmt.Sprintf("a silent client keeps its slot for %s (smtp_receive_timeout)", hours(d)), "Five minutes are Exim's own default and RFC 5321's least for a command.", x.setting("smtp_receive_timeout = 5m")...)
	default:
		x.ok(name, fmt.Sprintf("a silent client that nobody ends keeps its slot for %s (smtp_receive_timeout)", hours(d)))
	}
}

// reserve: does the panel's own check, and local mail, get a slot when all are
// taken?
func (x *exam) reserve() {
	const name = "reserve"
	if x.Settings == nil || !x.writes() {
		return // told with the others
	}
	n, _ := strconv.Atoi(x.Settings["smtp_accept_reserve"])
	hosts := x.Settings["smtp_reserve_hosts"]
	// The separator: colons in IPv6 addresses would part them.
	mend := x.setting("smtp_accept_reserve = 5", "smtp_reserve_hosts = <; 127.0.0.1 ; ::1")
	switch {
	case n > 0 && strings.Contains(hosts, "127.0.0.1"):
		x.ok(name, fmt.Sprintf("%d slots are kept for %s", n, hosts))
	case n > 0 && hosts == "":
		x.warn(name, fmt.Sprintf("smtp_accept_reserve is %d, but smtp_reserve_hosts is empty", n), "These slots are for nobody.", mend...)
	case x.System == CPanel:
		x.warn(name, "no slot is kept for the panel's health check", "When all slots are taken cPanel's check is refused as well, and it restarts a healthy Exim every five minutes.", mend...)
	default:
		x.ok(name, "no slots are kept in reserve (smtp_accept_reserve)")
	}
}

func (x *exam) loadReserve() {
	const name = "load-reserve"
	if x.Settings == nil || !x.writes() {
		return
	}
	limit := x.Settings["smtp_load_reserve"]
	switch {
	case limit == "":
		x.ok(name, "connections are not refused for the load average (smtp_load_reserve)")
	case x.Settings["smtp_reserve_hosts"] == "":
		x.warn(name, "above a load average of "+limit+" everybody is refused (smtp_load_reserve), the panel's health check too",
			"It looks like a flood in the mailbox.", x.setting("smtp_reserve_hosts = <; 127.0.0.1 ; ::1")...)
	default:
		x.ok(name, "above a load average of "+limit+" only smtp_reserve_hosts are let in")
	}
}

func (x *exam) perHost() {
	const name = "per-host"
	if !x.writes() {
		return
	}
	if v := x.Exim.AcceptMaxPerHost; v != "" && v != "0" {
		x.ok(name, "one address may take "+v+" slots (smtp_accept_max_per_host)")
		return
	}
	x.ok(name, "one address may take all slots (smtp_accept_max_per_host is not set); the rules judge it")
}

// healthCheck: a check from this machine must never be blocked. The gate sees
// to it; here is only whether something stands in its way.
func (x *exam) healthCheck() {
	x.ok("health-check", "a check from this machine itself (127.0.0.1, ::1, cPanel's chkservd) can never be blocked")
}
