package doctor

import (
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
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
	case x.blind():
		x.skip(name, "Exim's log cannot be read by you: run doctor as root")
	case !x.writes():
		x.skip(name, "this machine's Exim writes another log than the one that is followed; its configuration is left aside")
	default:
		return true
	}
	return false
}

// blind reports whether the log was not found only because this user may not
// look: then nothing is concluded from that.
func (x *exam) blind() bool {
	return !x.Root && len(x.Logs) == 0 && errors.Is(x.LogErr, fs.ErrPermission)
}

// eximAnswers: a configuration that cannot be read is more than its values.
func (x *exam) eximAnswers() {
	const name = "exim"
	switch {
	case errors.Is(x.EximErr, exim.ErrSlow):
		x.warn(name, oneLine(x.EximErr), "Most likely it waits for DNS: Exim looks up this machine's own name whenever it starts. Each delivery and each restart then waits as long.",
			append([]string{"See how long it takes, and which resolver does not answer:", "time exim -bV >/dev/null; cat /etc/resolv.conf", "Put this machine's full name into /etc/hosts, or state it to Exim:"},
				x.setting(name, "primary_hostname = "+orElse(x.Hostname, "mx.example.net"))...)...)
	case x.EximErr != nil && !errors.Is(x.EximErr, exim.ErrNoExim):
		x.warn(name, "Exim does not tell its configuration: "+oneLine(x.EximErr), "With a fault in its configuration it does not start again after the next restart.",
			"See what Exim says of it:", "exim -bV")
	}
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
			x.ok(name, fmt.Sprintf("%s (%s %s) was written %s ago", l.Path, l.Mode, l.Owner, hours(max(0, x.Now.Sub(l.Written)))))
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
	switch {
	case !conns:
		means := "The socket table alone shows who holds slots; nothing tells what happened before the daemon was started, or why."
		if x.Policy.Confirm == policy.ConfirmOff {
			x.fail(name, from+" has no connections (+smtp_connection), and confirm is off", "Nothing shows who holds slots.", x.setting(name, x.logging()...)...)
			return
		}
		x.warn(name, from+" has no connections (+smtp_connection)", means, x.setting(name, x.logging()...)...)
	case !ports:
		x.warn(name, from+" has no ports (+incoming_port)", "Which connection has ended is then a guess, and abuse reports lack what desks ask for.", x.setting(name, x.logging()...)...)
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
	// As zones differ, within the two minutes that a line may be old.
	zones := quarter != 0 && quarter.Abs() <= 14*time.Hour && (off-quarter).Abs() < 2*time.Minute
	ahead := l.LastLine.Sub(x.Now) > 2*time.Minute // which no time of a file explains
	switch {
	case zones && (l.Grew || ahead):
		x.fail(name, fmt.Sprintf("the log's times are %s off: its last line says %s, and was written at %s", hours(off.Abs()), l.LastLine.Format("15:04:05 MST"), l.Written.UTC().Format("15:04:05 MST")),
			"Lines look old or come from the future: verdicts and reports have wrong times.",
			append([]string{"Let Exim write the offset, or state the zone of the log in " + x.policyFileName() + ", as in `zone: Europe/Berlin`:"}, x.setting(name, "log_timezone = true")...)...)
	case ahead:
		x.fail(name, "the log's last line comes from the future: "+l.LastLine.Format(time.RFC3339), "The clock was set back, or the zone is another.", "`timedatectl` and `exim -bP timezone` should agree.")
	case zones:
		// The time of a file is changed by touch, by a copy, by a backup too.
		x.skip(name, fmt.Sprintf("the log's last line is of %s, its file of %s: either its times are %s off, or the file was touched; a new line would tell", l.LastLine.Format("15:04:05 MST"), l.Written.UTC().Format("15:04:05 MST"), hours(off.Abs())))
	case !l.Offset && changes(l.LastLine, x.location()):
		x.warn(name, "the log's times have no offset, in a zone with summer time", "Once a year an hour comes twice; reports to others must guess.", x.setting(name, "log_timezone = true")...)
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
		if !x.blind() && x.Policy.Capacity == 0 && (x.Daemon == nil || x.Daemon.CapacityFrom == detector.CapacityAssumed) {
			x.warn("capacity", "the number of slots (smtp_accept_max) is not known; 100 are assumed", "Pressure is wrong if there are more or fewer.", "State it in "+x.policyFileName()+", then `systemctl restart smtpguard`:", "capacity: 100")
		}
		return
	}
	n := x.Exim.AcceptMax
	switch {
	case !x.Exim.AcceptMaxSet:
		x.skip(name, "Exim does not tell smtp_accept_max")
	case n == 0:
		x.fail(name, "smtp_accept_max is 0: there is no limit", "A flood takes all memory instead of all slots, and Exim counts nothing.", x.setting(name, "smtp_accept_max = 100")...)
	case x.Policy.Capacity > 0 && x.Policy.Capacity != n:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d, and the policy says capacity: %d", n, x.Policy.Capacity), "When the server is full is judged by the policy.",
			"In "+x.policyFileName()+", unless Exim is started with another number:", "capacity: auto")
	case x.Daemon != nil && x.Daemon.CapacityFrom == detector.CapacityAssumed:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d, and the daemon does not know it and assumes %d", n, x.Daemon.Capacity), "When the server is full is a guess until then.", "systemctl reload smtpguard")
	case x.Daemon != nil && x.Daemon.Capacity != n:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d, and the daemon counts on %d (from %s)", n, x.Daemon.Capacity, x.Daemon.CapacityFrom), "It was changed, and the daemon asks only now and then.", "systemctl reload smtpguard")
	case n <= 20:
		x.warn(name, fmt.Sprintf("smtp_accept_max is %d", n), "So few are full with proper mail alone.", x.setting(name, "smtp_accept_max = 100")...)
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
		x.warn(name, fmt.Sprintf("a silent client keeps its slot for %s (smtp_receive_timeout)", hours(d)), "Five minutes are Exim's own default and RFC 5321's least for a command.", x.setting(name, "smtp_receive_timeout = 5m")...)
	default:
		x.ok(name, fmt.Sprintf("a silent client that nobody ends keeps its slot for %s (smtp_receive_timeout)", hours(d)))
	}
}

// reserve: does the panel's own check, and local mail, get a slot when all are
// taken, or the load is too high?
func (x *exam) reserve() {
	const name = "reserve"
	if x.Settings == nil || !x.writes() {
		return // told with the others
	}
	n, _ := strconv.Atoi(x.Settings["smtp_accept_reserve"])
	hosts := x.Settings["smtp_reserve_hosts"]
	list := bounded(hosts, 200)
	mend := func() []string {
		var options []string
		if hosts == "" || !x.ReserveLocal {
			options = append(options, "smtp_reserve_hosts = "+withLocal(hosts))
		}
		if n == 0 {
			options = append(options, "smtp_accept_reserve = 5")
		}
		return x.setting(name, options...)
	}
	const panel = "When all slots are taken cPanel's check is refused as well, and it restarts a healthy Exim every five minutes."
	switch {
	case n > 0 && hosts == "":
		x.warn(name, fmt.Sprintf("smtp_accept_reserve is %d, but smtp_reserve_hosts is empty", n), "These slots are for nobody.", mend()...)
	case n > 0 && x.ReserveErr != nil:
		x.skip(name, fmt.Sprintf("%d slots are kept for %s; whether this machine itself (127.0.0.1) is among them cannot be told: %s", n, list, oneLine(x.ReserveErr)))
	case n > 0 && x.ReserveLocal:
		x.ok(name, fmt.Sprintf("%d slots are kept for %s, this machine itself among them", n, list))
	case n > 0:
		x.warn(name, fmt.Sprintf("%d slots are kept for %s, and this machine itself (127.0.0.1) is not among them", n, list), panel, mend()...)
	case x.System == CPanel:
		x.warn(name, "no slot is kept for the panel's health check", panel, mend()...)
	default:
		x.ok(name, "no slots are kept in reserve (smtp_accept_reserve)")
	}
}

// withLocal is a host list with this machine itself before all that is in it,
// in the form that the list has: one that begins with "<;" is parted by
// semicolons, else by colons, which are doubled inside an item (Exim's
// specification, "Changing list separators").
func withLocal(list string) string {
	sep, rest := ";", strings.TrimSpace(list)
	if rest == "" {
		return "<; 127.0.0.1 ; ::1"
	}
	local6 := "::1"
	if strings.HasPrefix(rest, "<") && len(rest) > 1 && rest[1] > ' ' && rest[1] < 0x7f {
		sep, rest = rest[1:2], strings.TrimSpace(rest[2:])
	} else {
		sep = ":"
	}
	if sep == ":" {
		local6 = "::::1"
	}
	mark := ""
	if sep != ":" {
		mark = "<" + sep + " "
	}
	return mark + strings.Join([]string{"127.0.0.1", local6, rest}, " "+sep+" ")
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
			"It looks like a flood in the mailbox.", x.setting(name, "smtp_reserve_hosts = <; 127.0.0.1 ; ::1")...)
	case x.ReserveErr == nil && !x.ReserveLocal:
		x.warn(name, "above a load average of "+limit+" only smtp_reserve_hosts are let in, and this machine itself (127.0.0.1) is not among them",
			"The panel's health check is refused then, and it restarts a healthy Exim.", x.setting(name, "smtp_reserve_hosts = "+withLocal(x.Settings["smtp_reserve_hosts"]))...)
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
