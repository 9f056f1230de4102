package doctor

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
)

func (x *exam) policyFileName() string {
	if x.PolicyPath == "" {
		return "/etc/smtpguard/policy.yaml"
	}
	return x.PolicyPath
}

func (x *exam) policyFile() {
	const name = "policy"
	switch {
	case x.PolicyErr != nil:
		x.fail(name, "the policy has faults: "+strings.ReplaceAll(bounded(x.PolicyErr.Error(), 2000), "\n", "; "), "The daemon does not start with it, and a reload keeps the one before.", "smtpguard policy check")
	case x.PolicyPath == "":
		x.warn(name, "there is no policy file; the shipped one is used", "It only observes, and nobody is on its allowlist.", "smtpguard policy init")
	case len(x.Policy.Rules) == 0:
		x.warn(name, x.PolicyPath+" has no rules", "Only an operator blocks then.", "Take back the `rules:` of the shipped policy (`smtpguard policy init` prints it).")
	default:
		x.ok(name, fmt.Sprintf("%s has no faults, %d rules", x.PolicyPath, len(x.Policy.Rules)))
	}
}

func (x *exam) mode() {
	const name = "mode"
	mode := string(x.Policy.Mode)
	if x.Daemon != nil {
		if x.Daemon.Mode != mode && x.PolicyErr == nil {
			says := fmt.Sprintf("the policy says mode: %s, and the daemon runs in %s", mode, x.Daemon.Mode)
			if t := x.Daemon.Trial; t != nil && t.State == guard.TrialOver {
				x.warn(name, says, "The trial of mode: enforce ended without the operator's word, and no restart begins it again.", "smtpguard commit")
			} else {
				x.warn(name, says, "It was changed since, or is overridden by a flag (then a restart without it helps).", "systemctl reload smtpguard")
			}
			return
		}
		mode = x.Daemon.Mode
	} else if x.PolicyErr != nil {
		x.skip(name, "no daemon runs, and the policy cannot be read")
		return
	}
	if mode != string(policy.Enforce) {
		log := "LOG"
		if l, ok := x.log(); ok {
			log = l.Path
		}
		x.warn(name, "mode is observe: everything is decided and recorded, nothing is blocked", "A flood is not stopped.",
			"See what would have been blocked: `smtpguard replay "+log+"`. If it is right, in "+x.policyFileName()+":", "mode: enforce", "systemctl reload smtpguard")
		return
	}
	x.ok(name, "mode is enforce")
}

func (x *exam) daemon() {
	const name = "daemon"
	d := x.Daemon
	switch {
	case d == nil && !x.Root && !errors.Is(x.DaemonUp, control.ErrNoDaemon):
		x.skip(name, "the daemon's socket is not open to you: "+oneLine(x.DaemonUp))
		return
	case d == nil && errors.Is(x.DaemonUp, control.ErrNoDaemon):
		x.fail(name, "no daemon runs ("+oneLine(x.DaemonUp)+")", "Nothing is watched.", "systemctl enable --now smtpguard", "journalctl -u smtpguard -n 50")
		return
	case d == nil:
		x.fail(name, "the daemon does not answer: "+oneLine(x.DaemonUp), "It hangs, or its socket belongs to something else.", "systemctl status smtpguard", "journalctl -u smtpguard -n 50")
		return
	}
	x.ok(name, fmt.Sprintf("smtpguard %s runs, pid %d, for %s", d.Version, d.PID, hours(x.Now.Sub(d.Started))))
	for _, l := range d.Logs {
		switch {
		case l.Behind > 16<<20:
			x.warn("lag", fmt.Sprintf("the daemon is %d MiB behind in %s", l.Behind>>20, l.Path), "It decides late.", "`top`: does it get processor time? `iostat`: is the disk busy?")
		case l.Misdated > 0 && l.Misdated*10 > l.Lines:
			x.fail("lag", fmt.Sprintf("%d of %d lines of %s have a time that cannot be", l.Misdated, l.Lines, l.Path), "Their times are in another zone than is assumed.", "State the zone in "+x.policyFileName()+":", "zone: Europe/Berlin")
		default:
			x.ok("lag", fmt.Sprintf("the daemon has read %s to %s", l.Path, map[bool]string{true: "its end", false: fmt.Sprintf("%d bytes before its end", l.Behind)}[l.CaughtUp || l.Behind == 0]))
		}
	}
	f := d.Firewall
	switch {
	case !f.Agrees:
		x.fail("agreement", "the packet filter does not hold what the store says: "+bounded(f.Error, 500), "Blocks are written down and not in force.", "smtpguard firewall sync")
	case f.Repairs > 3:
		x.warn("agreement", fmt.Sprintf("our rules were put back %d times, the last time after %s", f.Repairs, orElse(f.By, "somebody unknown")), "Somebody takes them away again and again.", "Let that program leave the table inet smtpguard alone.")
	default:
		x.ok("agreement", "packet filter and store hold the same blocks")
	}
	for _, fault := range d.Faults[:min(len(d.Faults), 3)] {
		if x.Now.Sub(fault.Time) < 24*time.Hour {
			x.warn("faults", "the daemon could not do something: "+bounded(fault.What+": "+fault.Err, 500), "It goes on without.", "journalctl -u smtpguard --since '1 day ago' -p err")
		}
	}
}

func (x *exam) store() {
	const name = "store"
	s := x.Store
	const least = 100 << 20
	switch {
	case s.Missing && x.Daemon == nil:
		x.warn(name, s.Path+" is not there yet", "It is made when the daemon is started first.")
	case s.Err != nil && !x.Root:
		x.skip(name, "the store cannot be read by you: "+oneLine(s.Err))
	case s.Err != nil:
		x.fail(name, "the store cannot be used: "+oneLine(s.Err), "Blocks and offences are not remembered, and the daemon does not start.", "Move it away, then start the daemon: blocks that are in the packet filter are taken over.", "mv "+s.Path+" "+s.Path+".damaged")
	case s.Size > 4<<30:
		x.warn(name, fmt.Sprintf("%s has %d GiB", s.Path, s.Size>>30), "Reading it takes long.", "Lower block.forget and known_good.max in "+x.policyFileName()+".")
	default:
		state := "and can be read"
		if s.InUse {
			state = "and is in use by the daemon"
		}
		x.ok(name, fmt.Sprintf("%s has %d KiB %s", s.Path, s.Size>>10, state))
	}
	switch {
	case s.Free == 0:
	case s.Free < least:
		x.fail("disk", fmt.Sprintf("the disk of %s has %d MiB left", s.Path, s.Free>>20), "Blocks cannot be written down, and are forgotten with a restart.", "df -h "+s.Path)
	default:
		x.ok("disk", fmt.Sprintf("the disk of the store has %d MiB left", s.Free>>20))
	}
}

func (x *exam) sockets() {
	const name = "sockets"
	s := x.Sockets
	wait := "smtp_receive_timeout"
	if x.EximErr == nil && x.Exim.ReceiveTimeout > 0 {
		wait += " (" + hours(x.Exim.ReceiveTimeout) + ")"
	}
	switch {
	case x.Policy.Confirm == policy.ConfirmOff:
		x.warn(name, "confirm is off: the log alone decides", "A local user can write lines into it that get anybody blocked.", "If Exim runs in this network namespace, in "+x.policyFileName()+":", "confirm: sockets")
	case s.Err != nil:
		x.fail(name, "the kernel's socket table cannot be read: "+oneLine(s.Err), "No verdict can be confirmed: nothing is blocked by itself.", "modprobe inet_diag tcp_diag")
	case !s.CanDestroy && !x.Root:
		x.skip(name, "whether connections can be ended only root can try: "+oneLine(s.Why))
	case !s.CanDestroy:
		x.warn(name, "this kernel cannot end connections: "+oneLine(s.Why), "After a block Exim's processes get SIGTERM instead, which does not help against clients that never read: those keep their slot until "+wait+", and longer.",
			"grep CONFIG_INET_DIAG_DESTROY /boot/config-$(uname -r)", "A kernel with CONFIG_INET_DIAG_DESTROY=y gives relief within a second.")
	default:
		x.ok(name, "the kernel ends connections of blocked sources at once")
	}
}

func (x *exam) capabilities() {
	const name = "capabilities"
	who := "the daemon"
	if x.Daemon == nil {
		who = "this process"
	}
	switch {
	case x.LacksErr != nil:
		x.skip(name, "the capabilities of "+who+" cannot be read: "+oneLine(x.LacksErr))
	case len(x.Lacks) == 0:
		x.ok(name, who+" has the capabilities that it needs")
	case x.Daemon == nil && !x.Root:
		x.skip(name, "you lack "+strings.Join(x.Lacks, ", ")+": run doctor as root to see all")
	case slices.Contains(x.Lacks, "CAP_NET_ADMIN") && x.Daemon != nil && x.Daemon.Mode != string(policy.Enforce):
		x.warn(name, who+" lacks "+strings.Join(x.Lacks, ", "), "It cannot block when it shall enforce.", "Use the unit that comes with smtpguard, or give the container --cap-add NET_ADMIN.")
	case slices.Contains(x.Lacks, "CAP_NET_ADMIN"):
		x.fail(name, who+" lacks "+strings.Join(x.Lacks, ", "), "It can neither block nor end connections.", "Use the unit that comes with smtpguard, or give the container --cap-add NET_ADMIN.")
	default:
		x.warn(name, who+" lacks "+strings.Join(x.Lacks, ", "), "It may be unable to read the log.", "Use the unit that comes with smtpguard.")
	}
}

func (x *exam) firewall() {
	const name = "firewall"
	f := x.Filter
	switch {
	case f.Err != nil && !x.Root:
		x.skip(name, "only root can try the packet filters: "+oneLine(f.Err))
	case f.Err != nil:
		x.fail(name, "no packet filter can be used: "+oneLine(f.Err), "Nothing can be blocked.", "modprobe nf_tables", "or `apt-get install iptables ipset`, and doctor again")
	case f.Backend == "memory":
		x.warn(name, "backend memory drops no packet", "It is for trials.", "In "+x.policyFileName()+":", "firewall: {backend: auto}")
	case f.Backend == "iptables", f.Backend == "csf":
		x.warn(name, f.Why, "nftables is faster, and survives what other firewalls do.", "modprobe nf_tables")
	default:
		x.ok(name, f.Why)
	}
}

// rules: do ours stand before every established-accept?
func (x *exam) rules() {
	const name = "rules"
	if x.Daemon == nil || x.Daemon.Mode != string(policy.Enforce) {
		return // there are none to be looked for
	}
	switch b := x.Daemon.Firewall.Backend; {
	case b != "nftables":
		if x.Daemon.Firewall.Agrees {
			x.ok(name, "the daemon sees our rules in place ("+b+")")
		}
	case x.Filter.ChainsErr != nil && !x.Root:
		x.skip(name, "only root can look at the packet filter: "+oneLine(x.Filter.ChainsErr))
	case x.Filter.ChainsErr != nil:
		x.warn(name, "the chains of nftables cannot be read: "+oneLine(x.Filter.ChainsErr), "Whether our rules are in place is not known.", "nft list table inet smtpguard")
	default:
		for _, c := range x.Filter.Chains {
			if c.Ours && c.Hook != "" {
				// What one chain accepts the next still judges; a drop is
				// final. So it need not be the very first.
				x.ok(name, fmt.Sprintf("our rules are called at %s, priority %d: no rule that accepts established connections overrules them", c.Hook, c.Priority))
				return
			}
		}
		x.fail(name, "our table is not in nftables, though the daemon enforces", "Somebody has just taken it away, or the daemon works in another network namespace.", "smtpguard firewall sync")
	}
}

func (x *exam) neighbours() {
	if len(x.Others) == 0 {
		x.ok("neighbours", "no other firewall is known here")
		return
	}
	says := "beside us: " + strings.Join(x.Others, ", ")
	if x.Filter.Backend == "nftables" {
		says += "; our own table of nftables lives beside them"
	}
	if slices.Contains(x.Others, "nftables.service") {
		says += ", and is put back within seconds when nftables.service flushes all"
	}
	x.ok("neighbours", says)
}

func (x *exam) csf() {
	const name = "csf"
	c := x.CSF
	uses := x.Filter.Backend == "csf"
	switch {
	case c == nil && x.CSFErr == nil:
		return
	case x.CSFErr != nil && !x.Root:
		x.skip(name, "csf.conf cannot be read by you")
	case x.CSFErr != nil:
		x.warn(name, "csf.conf cannot be read: "+oneLine(x.CSFErr), "What CSF allows and limits is not known.")
	case c.Broken:
		x.warn(name, "CSF has an error that is not resolved (/etc/csf/csf.error)", "csf does nothing until it is restarted.", "cat /etc/csf/csf.error", "csf -r")
	case c.Testing && uses:
		x.fail(name, "CSF is in TESTING mode", "A cron job clears the firewall every five minutes, our blocks too.", "In /etc/csf/csf.conf, then csf -r:", `TESTING = "0"`)
	case c.Testing:
		x.warn(name, "CSF is in TESTING mode", "A cron job clears CSF's own rules every five minutes; our table stays.", "In /etc/csf/csf.conf, then csf -r:", `TESTING = "0"`)
	case uses && !c.LFD:
		x.fail(name, "lfd does not run", "Nobody ends the temporary bans of CSF.", "systemctl start lfd")
	case uses && c.TempLimit > 0 && c.TempLimit < 1000:
		x.warn(name, fmt.Sprintf("CSF takes %d temporary bans (DENY_TEMP_IP_LIMIT)", c.TempLimit), "A flood of more sources cannot be held through CSF.", "Use nftables beside it (`firewall: {backend: auto}`), or in /etc/csf/csf.conf:", `DENY_TEMP_IP_LIMIT = "1000"`)
	case uses && c.Disabled:
		x.fail(name, "CSF is disabled", "It blocks nobody.", "csf -e")
	default:
		x.ok(name, "CSF is installed; whom csf.allow and csf.ignore name is never blocked")
	}
}

func (x *exam) self() {
	const name = "own-addresses"
	by := make(map[string][]string)
	var order []string
	for _, e := range x.Exempt {
		if e.Prefix.IsSingleIP() && (strings.HasPrefix(e.Why, "a") || strings.HasPrefix(e.Why, "the")) {
			if by[e.Why] == nil {
				order = append(order, e.Why)
			}
			by[e.Why] = append(by[e.Why], e.Prefix.Addr().String())
		}
	}
	var parts []string
	for _, why := range order {
		list := by[why]
		more := ""
		if len(list) > 4 {
			more = fmt.Sprintf(" and %d more", len(list)-4)
			list = list[:4]
		}
		parts = append(parts, why+": "+strings.Join(list, ", ")+more)
	}
	if x.ExemptErr != nil {
		x.warn(name, "not all of this machine's own addresses, gateways, resolvers and SSH sessions could be found: "+oneLine(x.ExemptErr), "What is not found is not protected by itself.", "Add it by hand, as in:", "smtpguard allow add 192.0.2.1 --note 'gateway'")
		return
	}
	x.ok(name, "never blocked: "+orElse(strings.Join(parts, "; "), "loopback and link-local"))
}

func (x *exam) operator() {
	const name = "operator"
	switch {
	case !x.Peer.IsValid():
	case x.allowed(x.Peer):
		x.ok(name, fmt.Sprintf("you are logged in from %s, which is never blocked", x.Peer))
	default:
		x.warn(name, fmt.Sprintf("you are logged in from %s, which could be blocked when you are not", x.Peer), "Only while a session is open is its address safe. SSH itself is not blocked unless `block: {ports: all}`.",
			fmt.Sprintf("smtpguard allow add %s --note 'administrator'", x.Peer))
	}
}

// regulars are likely monitors.
func (x *exam) regulars() {
	const name = "monitoring"
	n := 0
	for _, l := range x.Logs {
		for _, r := range l.Regulars {
			if x.allowed(r.Addr) || n == 5 {
				continue
			}
			n++
			x.warn(name, fmt.Sprintf("%s connects every %s and sends no mail (%d times lately)", r.Addr, hours(r.Every), r.Times), "If it is your monitoring, it should never be blocked.",
				fmt.Sprintf("smtpguard allow add %s --note monitoring", r.Addr))
		}
	}
	if n == 0 {
		x.ok(name, "nobody who could be blocked connects at even intervals without sending mail")
	}
}

func (x *exam) knownGood() {
	const name = "known-good"
	n := x.Store.Good
	if x.Daemon != nil {
		n = x.Daemon.Detector.KnownGood
	}
	switch {
	case n > 0:
		x.ok(name, fmt.Sprintf("%d senders of accepted mail are known good", n))
	case n == 0:
		log := "/var/log/exim_mainlog"
		if l, ok := x.log(); ok {
			log = l.Path
		}
		x.warn(name, "no sender is known good yet", "A provider's network that sends much at once looks like a flood.", "smtpguard replay --learn "+log+"*")
	default:
		x.skip(name, "how many senders are known good is in the store, which could not be read")
	}
}

func (x *exam) clock() {
	const name = "clock"
	switch {
	case x.Clock.Err != nil:
		x.skip(name, "the state of the clock could not be read: "+oneLine(x.Clock.Err))
	case !x.Clock.Synced:
		x.warn(name, "the clock is not kept right by NTP", "Reports to other networks are worthless with wrong times, and blocks end at wrong ones.", "timedatectl set-ntp true")
	default:
		x.ok(name, "the clock is kept right")
	}
}

func (x *exam) reports() {
	const name = "reports"
	if len(x.Advice) == 0 {
		x.ok(name, "abuse reports are off, or have all they need")
		return
	}
	for _, a := range x.Advice {
		key, _, _ := strings.Cut(a, " ")
		if key == "reports.from" {
			x.warn(name, a, "Drafts are made, but cannot be sent.", "In the section `reports:` of "+x.policyFileName()+", a mailbox that a person reads:", `from: "Abuse desk <abuse@example.net>"`)
			continue
		}
		var mend []string
		if x.EximErr == nil && (strings.Contains(a, "log_selector") || strings.Contains(a, "log_timezone")) {
			mend = x.setting(name, x.logging()...)
		}
		x.note(name, a, mend...)
	}
}
