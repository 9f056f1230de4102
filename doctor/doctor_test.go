package doctor

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
)

var now = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// well is a world in which nothing is to be said.
func well() *Facts {
	p := policy.Default()
	p.Mode, p.Zone = policy.Enforce, "UTC"
	const log = "/var/log/exim_mainlog"
	return &Facts{
		Now: now, Root: true, System: CPanel, Policy: p, PolicyPath: "/etc/smtpguard/policy.yaml",
		Exim: exim.Config{AcceptMax: 100, AcceptMaxSet: true, ReceiveTimeout: 5 * time.Minute, LogSelector: "+incoming_port +smtp_connection",
			SmtpConnection: true, IncomingPort: true, MainLog: log},
		ReserveLocal: true, Settings: map[string]string{"smtp_accept_reserve": "5", "smtp_reserve_hosts": "<; 127.0.0.1 ; ::1", "smtp_load_reserve": ""},
		Logs: []Log{{Path: log, Mode: "-rw-r-----", Owner: "mailnull:mail", Size: 4096, Written: now.Add(-time.Second), LastLine: now.Add(-time.Second),
			Stats: exim.Stats{Lines: 5000, Opened: 900, WithPort: 900}}},
		Sockets: Sockets{CanDestroy: true, Listen: []uint16{25, 465, 587}, Programs: []string{"exim"}},
		Filter: Filter{Backend: "nftables", Why: "nftables: chosen because the kernel takes our table, sets and rules",
			Chains: []firewall.Chain{{Table: "smtpguard", Name: "prerouting", Hook: "prerouting", Priority: -300, Ours: true}}},
		Daemon: &guard.Status{Version: "1", PID: 7, Started: now.Add(-time.Hour), Mode: "enforce", Capacity: 100, CapacityFrom: "Exim's smtp_accept_max",
			Logs:     []guard.LogStatus{{Path: log, Lines: 5000, CaughtUp: true}},
			Firewall: guard.FirewallStatus{Backend: "nftables", Real: true, Agrees: true},
			Detector: detector.Stats{KnownGood: 12}},
		Store:  Store{Path: "/var/lib/smtpguard/smtpguard.db", InUse: true, Size: 1 << 20, Free: 10 << 30, Good: -1},
		Clock:  Clock{Synced: true},
		Exempt: []guard.Exempt{{Prefix: netip.MustParsePrefix("192.0.2.1/32"), Why: "an address of this machine"}},
	}
}

// debianSelector is how Debian's own files set log_selector.
var debianSelector = map[string][]Setting{"log_selector": {{File: "/etc/exim4/conf.d/main/90_exim4-config_log_selector", Line: 8, End: 8, Text: "log_selector = MAIN_LOG_SELECTOR", If: ".ifdef MAIN_LOG_SELECTOR"}}}

// TestOnce: what one mend says the next does not say again, for Exim refuses
// an option that is set twice.
func TestOnce(t *testing.T) {
	f := well()
	f.System, f.ReserveLocal, f.Exim.SmtpConnection = DebianSplit, false, false
	f.Settings = map[string]string{"smtp_accept_reserve": "3", "smtp_load_reserve": "8"}
	f.Policy.Zone = "Europe/Berlin"
	f.Advice = []string{"the log holds no source ports: add +incoming_port to Exim's log_selector"}
	text := "\n"
	for _, c := range Examine(f).Checks {
		for _, m := range c.Mend {
			if !strings.HasSuffix(m, ".") { // for a person to read
				text += m + "\n"
			}
		}
	}
	for _, option := range []string{"\nsmtp_reserve_hosts = ", "\nlog_selector = ", "\nlog_timezone = "} {
		if n := strings.Count(text, option); n != 1 {
			t.Errorf("%q is %d times in what is to be pasted:%s", option, n, text)
		}
	}
}

// worse are the checks that are not OK, one a line: "status name: says".
func worse(r Report) string {
	var b strings.Builder
	for _, c := range r.Checks {
		if c.Status != OK {
			fmt.Fprintf(&b, "%s %s: %s\n", c.Status, c.Name, c.Says)
		}
	}
	return b.String()
}

func TestWell(t *testing.T) {
	r := Examine(well())
	if got := worse(r); got != "" || r.Fail+r.Warn+r.Skipped != 0 || r.OK != len(r.Checks) || r.OK < 20 {
		t.Errorf("%d ok, of a world where nothing is wrong:\n%s", r.OK, got)
	}
}

// TestFaults: each fault alone is seen, with its severity, and what mends it.
func TestFaults(t *testing.T) {
	some := errors.New("it \x1b[31mbroke\nhere")
	for _, c := range []struct {
		name string
		do   func(*Facts)
		want string // the beginning of worse's lines, one after the other
		mend string // is somewhere in what mends it
	}{
		{"no policy", func(f *Facts) { f.PolicyPath = "" }, "warn policy: there is no policy file", "smtpguard policy init"},
		{"broken policy", func(f *Facts) { f.PolicyErr = errors.New("policy.yaml:1:1: unknown key") }, "fail policy: the policy has faults: policy.yaml:1:1", "policy check"},
		{"observe", func(f *Facts) { f.Policy.Mode = policy.Observe; f.Daemon.Mode = "observe" }, "warn mode: mode is observe", "mode: enforce"},
		{"mode changed", func(f *Facts) { f.Daemon.Mode = "observe" }, "warn mode: the policy says mode: enforce, and the daemon runs in observe", "reload smtpguard"},
		{"trial over", func(f *Facts) { f.Daemon.Mode, f.Daemon.Trial = "observe", &guard.Trial{State: guard.TrialOver} }, "warn mode: the policy says mode: enforce, and the daemon runs in observe", "smtpguard commit"},
		{"no daemon", func(f *Facts) { f.Daemon, f.DaemonUp, f.Store.Good = nil, control.ErrNoDaemon, 3 }, "fail daemon: no daemon runs", "systemctl enable --now smtpguard"},
		{"hung daemon", func(f *Facts) { f.Daemon, f.DaemonUp, f.Store.Good = nil, some, 3 }, "fail daemon: the daemon does not answer: it ?[31mbroke here", "journalctl"},
		{"lag", func(f *Facts) { f.Daemon.Logs[0].Behind = 64 << 20 }, "warn lag: the daemon is 64 MiB behind", ""},
		{"misdated", func(f *Facts) { f.Daemon.Logs[0].Misdated = 4000 }, "fail lag: 4000 of 5000 lines", "zone: "},
		{"drift", func(f *Facts) { f.Daemon.Firewall.Agrees = false }, "fail agreement: ", "firewall sync"},
		{"looted", func(f *Facts) { f.Daemon.Firewall.Repairs, f.Daemon.Firewall.By = 9, "firewalld" }, "warn agreement: our rules were put back 9 times, the last time after firewalld", ""},
		{"store damaged", func(f *Facts) { f.Store.Err = some }, "fail store: the store cannot be used", "mv /var/lib"},
		{"disk full", func(f *Facts) { f.Store.Free = 5 << 20 }, "fail disk: the disk of /var/lib/smtpguard/smtpguard.db has 5 MiB left", "df -h"},
		{"no log", func(f *Facts) { f.LogErr, f.Logs, f.EximErr = some, nil, exim.ErrNoExim },
			"fail log: it ?[31mbroke here\nskip log-selector: too few\nskip time-zone: \nskip slots: \nskip receive-timeout: ", "logs: ["},
		{"log unreadable", func(f *Facts) { f.Logs[0].Err = os.ErrPermission },
			"fail log: /var/log/exim_mainlog: permission denied\nskip time-zone", ""},
		{"log unreadable for you", func(f *Facts) { f.Root = false; f.Logs[0].Err = os.ErrPermission },
			"skip log: /var/log/exim_mainlog cannot be read by you (-rw-r----- mailnull:mail)\nskip time-zone", ""},
		{"log empty", func(f *Facts) { f.Logs[0].Size = 0 }, "warn log: /var/log/exim_mainlog is empty", "exim -bP log_file_path"},
		{"old log", func(f *Facts) { f.Logs[0].Written = now.AddDate(0, 0, -9); f.Logs[0].LastLine = f.Logs[0].Written }, "warn log: /var/log/exim_mainlog was last written 9d0h ago", ""},
		{"no connections", func(f *Facts) { f.Exim.SmtpConnection, f.Exim.LogSelector = false, "+incoming_port" },
			"warn log-selector: log_selector has no connections", "log_selector = +incoming_port +smtp_connection +incoming_interface\nlog_timezone = true"},
		{"no connections on Debian", func(f *Facts) {
			f.System, f.Exim.SmtpConnection, f.Exim.LogSelector, f.Set = Debian, false, "+tls_peerdn", debianSelector
		}, "warn log-selector: ", "cat >>/etc/exim4/exim4.conf.localmacros <<'END'\nMAIN_LOG_SELECTOR = +tls_peerdn +smtp_connection +incoming_port +incoming_interface\nlog_timezone = true\nEND"},
		{"no connections on Debian, split", func(f *Facts) { f.System, f.Exim.SmtpConnection, f.Set = DebianSplit, false, debianSelector },
			"warn log-selector: ", "/etc/exim4/conf.d/main/000_localmacros"},
		{"no connections on Debian, set before", func(f *Facts) {
			f.System, f.Exim.SmtpConnection, f.Exim.LogSelector = Debian, false, "+tls_peerdn"
			f.Set = map[string][]Setting{"log_selector": debianSelector["log_selector"], "MAIN_LOG_SELECTOR": {{File: "/etc/exim4/x", Line: 7, End: 7, Text: "MAIN_LOG_SELECTOR == +tls_peerdn"}}}
		}, "warn log-selector: ", "Change /etc/exim4/x:7: `MAIN_LOG_SELECTOR == +tls_peerdn` -> `MAIN_LOG_SELECTOR == +tls_peerdn +smtp_connection +incoming_port +incoming_interface`:"},
		{"no connections, set in a file", func(f *Facts) {
			f.System, f.Exim.SmtpConnection, f.Exim.LogTimezone = Other, false, true
			f.Set = map[string][]Setting{"log_selector": {{File: "/etc/exim.conf", Line: 7, End: 9, Text: `log_selector = +incoming_port \`, If: ".ifdef X"}}}
		}, "warn log-selector: ", "Change /etc/exim.conf:7 (under .ifdef X): `log_selector = +incoming_port \\`"},
		{"nothing shows", func(f *Facts) { f.Exim.SmtpConnection, f.Policy.Confirm = false, policy.ConfirmOff }, "fail log-selector: \nwarn sockets: confirm is off", ""},
		{"no ports", func(f *Facts) { f.Exim.IncomingPort = false }, "warn log-selector: log_selector has no ports", "+incoming_port"},
		{"old Exim process", func(f *Facts) { f.Logs[0].Stats = exim.Stats{Lines: 5000} }, "warn log-selector: log_selector has connections, but", "restartsrv_exim"},
		{"by the lines", func(f *Facts) {
			f.EximErr, f.Settings, f.Logs[0].Stats = exim.ErrNoExim, nil, exim.Stats{Lines: 5000, Refused: 3, WithPort: 3}
		}, "warn log-selector: the log has no connections\nskip slots: there is no Exim\nskip receive-timeout", ""},
		{"PROXY", func(f *Facts) { f.Logs[0].Stats.Proxied = 4 }, "warn proxy: ", ""},
		{"slow", func(f *Facts) { f.EximErr, f.Settings = fmt.Errorf("%w in time", exim.ErrSlow), nil },
			"warn exim: no answer from Exim in time\nskip slots\nskip receive-timeout", "primary_hostname = "},
		{"broken configuration", func(f *Facts) { f.EximErr, f.Settings = some, nil }, "warn exim: Exim does not tell\nskip slots\nskip receive-timeout", "exim -bV"},
		{"touched log", func(f *Facts) { f.Logs[0].LastLine = f.Logs[0].Written.Add(-time.Hour - time.Second) }, "skip time-zone: the log's last line is of", ""},
		{"wrong zone", func(f *Facts) {
			f.Logs[0].Grew = true
			f.Logs[0].LastLine = f.Logs[0].Written.Add(-time.Hour - time.Second)
		}, "fail time-zone: the log's times are 1h off", "zone: Europe/Berlin"},
		{"half past", func(f *Facts) { f.Logs[0].LastLine = f.Logs[0].Written.Add(5*time.Hour + 30*time.Minute) }, "fail time-zone: the log's times are 5h30m off", ""},
		{"quiet log", func(f *Facts) { f.Logs[0].LastLine = f.Logs[0].Written.Add(-7 * time.Minute) }, "", ""},
		{"summer time", func(f *Facts) { f.Policy.Zone = "Europe/Berlin" }, "warn time-zone: the log's times have no offset", "log_timezone = true"},
		{"summer time with offset", func(f *Facts) { f.Policy.Zone = "Europe/Berlin"; f.Logs[0].Offset = true }, "", ""},
		{"nobody listens", func(f *Facts) { f.Sockets.Listen = nil }, "warn listening: nothing listens on the ports [25 465 587]", "confirm: off"},
		{"no limit", func(f *Facts) { f.Exim.AcceptMax = 0 }, "fail slots: smtp_accept_max is 0", "smtp_accept_max = 100"},
		{"few slots", func(f *Facts) { f.Exim.AcceptMax, f.Daemon.Capacity = 20, 20 }, "warn slots: smtp_accept_max is 20", "smtp_accept_max = 100"},
		{"other slots", func(f *Facts) { f.Daemon.Capacity = 50 }, "warn slots: smtp_accept_max is 100, and the daemon counts on 50", "reload smtpguard"},
		{"policy's slots", func(f *Facts) { f.Policy.Capacity = 50; f.Daemon.Capacity = 50 }, "warn slots: smtp_accept_max is 100, and the policy says capacity: 50", "capacity: auto"},
		{"patient", func(f *Facts) { f.Exim.ReceiveTimeout = time.Hour }, "warn receive-timeout: a silent client keeps its slot for 1h", "smtp_receive_timeout = 5m"},
		{"no reserve on cPanel", func(f *Facts) { f.Settings["smtp_accept_reserve"] = "0" }, "warn reserve: no slot is kept for the panel", "smtp_accept_reserve = 5"},
		{"reserve for nobody", func(f *Facts) { f.Settings["smtp_reserve_hosts"] = "" }, "warn reserve: smtp_accept_reserve is 5, but", ""},
		{"reserve for others", func(f *Facts) { f.ReserveLocal = false; f.Settings["smtp_reserve_hosts"] = "!127.0.0.1 : *" }, "warn reserve: 5 slots are kept for !127.0.0.1 : *, and this machine itself", "smtp_reserve_hosts = 127.0.0.1 : ::::1 : !127.0.0.1 : *"},
		{"reserve by name", func(f *Facts) { f.ReserveLocal, f.ReserveErr = false, exim.ErrCannotTell }, "skip reserve: 5 slots are kept", ""},
		{"assumed", func(f *Facts) { f.Daemon.CapacityFrom = detector.CapacityAssumed }, "warn slots: smtp_accept_max is 100, and the daemon does not know it", "reload smtpguard"},
		{"assumed, no Exim", func(f *Facts) {
			f.EximErr, f.Settings, f.Daemon.CapacityFrom = exim.ErrNoExim, nil, detector.CapacityAssumed
		},
			"warn capacity: \nskip slots\nskip receive-timeout", "capacity: 100"},
		{"load", func(f *Facts) {
			f.Settings["smtp_load_reserve"] = "8.00"
			f.Settings["smtp_reserve_hosts"] = ""
			f.ReserveLocal = false
		}, "warn reserve: \nwarn load-reserve: above a load average of 8.00 everybody", "127.0.0.1"},
		{"load, others in the list", func(f *Facts) {
			f.System, f.ReserveLocal = Debian, false
			f.Settings["smtp_accept_reserve"], f.Settings["smtp_load_reserve"] = "0", "8.00"
			f.Settings["smtp_reserve_hosts"] = "<, 192.0.2.5, 192.0.2.6"
		}, "warn load-reserve: above a load average of 8.00 only smtp_reserve_hosts", "smtp_reserve_hosts = <, 127.0.0.1 , ::1 , 192.0.2.5, 192.0.2.6"},
		{"not root", func(f *Facts) {
			f.Root, f.Logs, f.LogErr, f.Daemon = false, nil, os.ErrPermission, nil
			f.Policy.Capacity = 0
		}, "skip daemon: \nskip log: permission denied; run doctor as root\nskip log-selector: too few\nskip time-zone: \nskip slots: Exim's log cannot be read by you: run doctor as root\nskip receive-timeout: Exim's log cannot be read by you\nskip known-good: ", ""},
		{"no table", func(f *Facts) { f.Sockets.Err = some }, "fail sockets: the kernel's socket table cannot be read\nskip listening", "modprobe"},
		{"cannot destroy", func(f *Facts) { f.Sockets.CanDestroy, f.Sockets.Why = false, some }, "warn sockets: this kernel cannot end connections", "CONFIG_INET_DIAG_DESTROY"},
		{"no capabilities", func(f *Facts) { f.Lacks = []string{"CAP_NET_ADMIN"} }, "fail capabilities: the daemon lacks CAP_NET_ADMIN", ""},
		{"no filter", func(f *Facts) { f.Filter.Err = some }, "fail firewall: no packet filter can be used", "nf_tables"},
		{"only iptables", func(f *Facts) { f.Filter.Backend, f.Filter.Why = "iptables", "iptables: chosen because" }, "warn firewall: iptables: chosen because", ""},
		{"table gone", func(f *Facts) { f.Filter.Chains = []firewall.Chain{{Table: "filter", Name: "INPUT", Hook: "input"}} }, "fail rules: our table is not in nftables", "firewall sync"},
		{"CSF testing", func(f *Facts) { f.CSF = &firewall.CSFState{Testing: true, LFD: true} }, "warn csf: CSF is in TESTING", `TESTING = "0"`},
		{"CSF testing, used", func(f *Facts) { f.CSF = &firewall.CSFState{Testing: true, LFD: true}; f.Filter.Backend = "csf" }, "fail csf: CSF is in TESTING\nwarn firewall", `TESTING = "0"`},
		{"CSF small", func(f *Facts) { f.CSF = &firewall.CSFState{LFD: true, TempLimit: 100}; f.Filter.Backend = "csf" }, "warn firewall: \nwarn csf: CSF takes 100 temporary bans", "DENY_TEMP_IP_LIMIT"},
		{"CSF without lfd", func(f *Facts) { f.CSF = &firewall.CSFState{}; f.Filter.Backend = "csf" }, "fail csf: lfd does not run\nwarn firewall", "lfd"},
		{"CSF broken", func(f *Facts) { f.CSF = &firewall.CSFState{Broken: true} }, "warn csf: CSF has an error", "csf -r"},
		{"self", func(f *Facts) { f.ExemptErr = some }, "warn own-addresses: ", "allow add"},
		{"operator", func(f *Facts) {
			f.Peer = netip.MustParseAddr("198.51.100.9")
			f.Exempt = append(f.Exempt, guard.Exempt{Prefix: netip.MustParsePrefix("198.51.100.9/32"), Why: "the peer of an SSH session"})
		}, "warn operator: you are logged in from 198.51.100.9", "smtpguard allow add 198.51.100.9"},
		{"operator allowed", func(f *Facts) {
			f.Peer, f.Allowed = netip.MustParseAddr("198.51.100.9"), []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}
		}, "", ""},
		{"monitor", func(f *Facts) {
			f.Logs[0].Regulars = []Regular{{netip.MustParseAddr("198.51.100.7"), time.Minute, 40}, {netip.MustParseAddr("192.0.2.1"), time.Minute, 40}}
		}, "warn monitoring: 198.51.100.7 connects every 1m and sends no mail", "allow add 198.51.100.7 --note monitoring"},
		{"nobody known", func(f *Facts) { f.Daemon.Detector.KnownGood = 0 }, "warn known-good: no sender", "smtpguard replay --learn /var/log/exim_mainlog*"},
		{"clock", func(f *Facts) { f.Clock.Synced = false }, "warn clock: ", "timedatectl"},
		{"reports", func(f *Facts) { f.Advice = []string{"reports.from is not set: nothing can be sent", "reports.x"} }, "warn reports: reports.from\nnote reports: reports.x", "In the section `reports:` of"},
		{"not root", func(f *Facts) {
			f.Root, f.Daemon, f.DaemonUp, f.Store.Err, f.Sockets.CanDestroy, f.Sockets.Why = false, nil, os.ErrPermission, os.ErrPermission, false, some
			f.Filter, f.Lacks = Filter{Err: some, ChainsErr: some}, []string{"CAP_NET_ADMIN"}
		}, "skip daemon\nskip store\nskip sockets\nskip capabilities\nskip firewall\nskip known-good", ""},
	} {
		f := well()
		c.do(f)
		r := Examine(f)
		got := worse(r)
		lines, want := strings.Split(strings.TrimSpace(got), "\n"), strings.Split(c.want, "\n")
		match := len(lines) == len(want)
		for i := range want {
			match = match && strings.HasPrefix(lines[i], want[i]) && (want[i] != "" || lines[i] == "")
		}
		if !match {
			t.Errorf("%s:\n%swant:\n%s", c.name, got, c.want)
		}
		if c.mend != "" && !slices.ContainsFunc(r.Checks, func(k Check) bool { return strings.Contains(strings.Join(k.Mend, "\n"), c.mend) }) {
			t.Errorf("%s: nothing says %q", c.name, c.mend)
		}
		for _, k := range r.Checks {
			if strings.ContainsAny(k.Says, "\x1b\n") {
				t.Errorf("%s: not fit to be printed: %q", c.name, k.Says)
			}
			if k.Status == Fail && (k.Means == "" || len(k.Mend) == 0) {
				t.Errorf("%s: %s fails, and does not say what it means and what to do", c.name, k.Name)
			}
			if k.Status == Warn && k.Means == "" {
				t.Errorf("%s: %s warns, and does not say what it means", c.name, k.Name)
			}
		}
	}
}

func TestHours(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 90 * time.Second: "1m30s", time.Hour + 5*time.Minute + 3*time.Second: "1h5m", 10 * time.Minute: "10m",
		30 * time.Hour: "30h", 53*time.Hour + 5*time.Minute: "2d5h", -time.Second: "-1s",
	} {
		if got := hours(d); got != want {
			t.Errorf("%s: %s, want %s", d, got, want)
		}
	}
}
