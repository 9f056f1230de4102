package diagnose

import (
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// words fills in what a person reads.
func (d *Diagnosis) words(f *Finding, failed []check) {
	why := func(format string, args ...any) { f.Why = append(f.Why, fmt.Sprintf(format, args...)) }
	do := func(lines ...string) { f.Do = append(f.Do, lines...) }
	switch f.Kind {
	case FullFew, FullMany, FullSpread, FullUnknown, NearFull:
		d.slotWords(f, why, do)
	case NotRunning:
		d.machineWords(f, why, do)
	case CheckLogin:
		f.Title = "The panel's health check cannot log in: its own password is wrong; Exim itself answers"
		f.Confidence = Certain
		if f.Times < 3 {
			f.Confidence = Likely
		}
		why("the check connects from this server itself, says EHLO localhost and is answered 535 Incorrect authentication data, %s", times(f.Times))
		if t := &d.trouble[tLogin]; t.n > 2 {
			if every := rhythm(t.times); every > 0 {
				why("it comes every %s, as a monitor does", short(every))
			}
		}
		if !slices.ContainsFunc(d.slots.past, func(e episode) bool {
			return e.kind != NearFull && overlaps(Span{e.first, e.last}, Span{f.First, f.Last})
		}) {
			why("the slots were not full then: this has nothing to do with connections")
		}
		do("Block nobody: it is the server's own check.",
			"Set the check's login anew: `/scripts/upcp --force` (so did cPanel's support), then `/scripts/restartsrv_exim`.",
			"Look whether it is gone: `grep __cpanel__service__auth /var/log/exim_mainlog | tail -3` shows no new line after five minutes.",
			"Until then: WHM » Service Configuration » Service Manager, take away the monitor of exim, so that a healthy Exim is not restarted every five minutes.")
	case Load:
		f.Title = "Exim refuses connections because the machine is too busy (smtp_load_reserve)"
		f.Confidence = Certain
		if t := &d.trouble[tLoad]; t.n > 0 {
			why("%s refused for the load average, which was %.1f at most", count(t.n, "connection was", "connections were"), t.most)
		} else {
			why("the check was answered 421 Too much load, %s", times(f.Times))
		}
		do("See what runs then: `sar -q -f`, `atop -r`, or now `top`; backups and spam scanners are the usual ones.",
			"`exim -bP smtp_load_reserve queue_only_load deliver_queue_load_max` shows the limits; a load of 1 for each core is a full machine (`nproc`).",
			"Let the check in all the same: 127.0.0.1 and ::1 belong into smtp_reserve_hosts, beside what is there (`exim -bP smtp_reserve_hosts`); `smtpguard doctor` has the line for your system.")
	case Queued:
		f.Title = "Mail is taken but not delivered at once"
		f.Confidence = Certain
		why("%s that it is only queued, for the load (%.1f at most) or the number of connections", count(f.Times, "line says", "lines say"), d.trouble[tQueued].most)
		do("`exim -bpc` counts the queue; it empties by itself when the load is below deliver_queue_load_max.",
			"`exim -bP smtp_accept_queue queue_only_load deliver_queue_load_max` shows the limits.")
	case Disk:
		f.Title = "Exim has no room: the disk of its spool or its log is full, or out of inodes"
		f.Confidence = Certain
		why("Exim says so, %s; it then refuses mail with 452 Space shortage", times(f.Times))
		do("`df -h /var/spool/exim* /var/log` and the same with -i.",
			"`exim -bP check_spool_space check_log_space` shows how much room it wants.",
			"Block nobody for it.")
	case Port:
		f.Title = "Exim cannot start: its port is taken, or its address is not there"
		f.Confidence = Certain
		why("Exim says so, %s", times(f.Times))
		do("`ss -ltnp 'sport = :25'` shows who has the port: an old Exim that was not ended, or another mail server.",
			"If it is an old Exim: `/scripts/restartsrv_exim --stop`, or end that process by its number, then start it.")
	case Fork:
		f.Title = "Exim cannot start processes for connections: memory or a limit on processes is used up"
		f.Confidence = Certain
		why("Exim says so, %s", times(f.Times))
		do("`free -m`, `systemctl show exim exim4 -p TasksMax,TasksCurrent`, `dmesg -T | grep -i -e 'out of memory' -e 'fork rejected'`.",
			"A higher smtp_accept_max makes it worse.")
	case Config:
		f.Title = "Exim's configuration has a fault"
		f.Confidence = Certain
		why("Exim says so, %s", times(f.Times))
		do("`exim -bV` names file and line.", "On cPanel: WHM » Exim Configuration Manager » Reset or undo the last change; on Debian: `update-exim4.conf` and `systemctl restart exim4`.")
	case Cert:
		f.Title = "TLS fails for everybody: Exim cannot use its certificate or key"
		f.Confidence = Likely
		why("%s so", count(f.Times, "line says", "lines say"))
		do("WHM » Service Configuration » Manage Service SSL Certificates: reset the certificate of Exim.",
			"`exim -bP tls_certificate tls_privatekey`: the files must be there, be readable for Exim's user, and belong together.")
	case Down:
		f.Title = "Exim was not there when it was checked"
		f.Confidence = Certain
		why("nothing listened on the port, or the process was gone, %s", times(f.Times))
		do("`journalctl -u exim -u exim4` around that time, and the last lines of /var/log/exim_paniclog (Debian: /var/log/exim4/paniclog).",
			"`dmesg -T | grep -i 'killed process'`: did the kernel end it for want of memory?")
	case Restarts:
		f.Title = fmt.Sprintf("Exim was started %s, and the log does not say why", times(f.Times))
		f.Confidence = Possible
		why("neither full slots, nor load, nor a failing login were near those starts")
		do("`journalctl -u exim -u exim4` and `dmesg -T` around that time, and Exim's paniclog, which is beside its main log.",
			"If a panel watches Exim, name what it wrote too: cPanel's is /var/log/chkservd.log.")
	case Storm:
		f.Title = "Somebody opened very many connections; the server bore it"
		f.Confidence = Certain
		why("%s crossed the rules for connections in a time; the slots were not full by it", count(f.Times, "source", "sources"))
		do("Nothing has to be done. `smtpguard replay LOG` shows whom the policy would have blocked.")
	case Unexplained:
		f.Title = "The panel's checks failed, and the logs do not show why"
		f.Confidence = Possible
		said := make(map[reason]int)
		for _, c := range failed {
			said[c.why]++
		}
		for _, r := range []reason{checkSilent, checkOther, unsaid} {
			if n := said[r]; n > 0 {
				why("%s failed %s", count(n, "check", "checks"), r)
			}
		}
		do("Read Exim's log of the same time too: name it, or its rotated copy (`/var/log/exim_mainlog*`).",
			"`grep -A30 '^exim' /var/log/chkservd.log | less`: what did Exim answer?")
	}
	if n := restarted(failed); n > 0 && f.Explains > 0 && f.Kind != Down {
		why("the panel restarted Exim %s", times(n))
	}
}

// slotWords are those of full slots.
func (d *Diagnosis) slotWords(f *Finding, why func(string, ...any), do func(...string)) {
	var sum episode
	long := time.Duration(0)
	for i := range d.slots.past {
		e := &d.slots.past[i]
		if e.kind != f.Kind {
			continue
		}
		sum.refused += e.refused
		sum.check += e.check
		sum.turned = max(sum.turned, e.turned)
		sum.sources = max(sum.sources, e.sources)
		sum.peak, sum.capacity = max(sum.peak, e.peak), max(sum.capacity, e.capacity)
		sum.blame, sum.good = max(sum.blame, e.blame), max(sum.good, e.good)
		sum.full += e.full
		sum.ruled = sum.ruled || e.ruled
		long = max(long, e.last.Sub(e.first))
	}
	const notMore = "Do not raise smtp_accept_max for it, and do not restart Exim: who took all slots takes the new ones too."
	f.Confidence = Certain
	switch f.Kind {
	case FullFew:
		if !sum.ruled || sum.blame < manyShare { // with most slots elsewhere it may be that the server hangs
			f.Confidence = Likely
		}
		names := ""
		var prefixes []string // without this machine itself, which is not to be blocked
		own, sends := "", false
		share := 0.0
		for _, s := range f.Sources {
			switch {
			case s.Why == "":
				continue
			case s.Prefix.Addr().IsLoopback():
				own = bare(s.Prefix)
			default:
				prefixes = append(prefixes, bare(s.Prefix))
			}
			share += s.Share
		}
		for i, p := range prefixes {
			if i == 3 {
				names += fmt.Sprintf(" and %d more", len(prefixes)-3)
				break
			}
			if i > 0 {
				names += ", "
			}
			names += p
		}
		percent := 100 * min(1, max(share, sum.blame))
		f.Title = fmt.Sprintf("A flood: the slots were full, and few sources held %.0f %% of them: %s", percent, names)
		if len(prefixes) == 0 {
			f.Title = fmt.Sprintf("The slots were full, and this machine itself (%s) held %.0f %% of them", own, percent)
		}
		for i, s := range f.Sources {
			if s.Why == "" || i == 4 {
				break
			}
			why("%s", s.Why)
			if s.Messages > 0 && !s.Prefix.Addr().IsLoopback() {
				f.Confidence, sends = Likely, true
				why("but %s accepted from %s in these logs", count(s.Messages, "message was", "messages were"), bare(s.Prefix))
			}
		}
		if own != "" {
			do(fmt.Sprintf("A program on this machine opens connections to %s and does not end them: `ss -tnp 'dport = :25'` shows which. Mend or end it; nobody is to be blocked for it.", own))
		}
		if sends {
			do("Look first who sends mail from there: a customer or a partner is not to be blocked, but asked why his connections hang (`smtpguard allow add ADDRESS` keeps him from being blocked).")
		}
		if len(prefixes) > 0 {
			do(d.o.Guarding.block(prefixes[:min(len(prefixes), 10)])...)
		}
		do(notMore)
	case FullMany:
		want := roundUp(f.AcceptMax)
		f.Title = fmt.Sprintf("Too few slots for proper mail: %d would have sufficed", f.AcceptMax)
		if sum.capacity > 0 {
			f.Title += fmt.Sprintf(", there are %d", sum.capacity)
		}
		f.Confidence = Likely
		if sum.good >= 0.75 {
			f.Confidence = Certain
		}
		why("senders of accepted mail held %.0f %% of the slots (%s), and no rule finds a flood among them", 100*sum.good, count(sum.sources, "address", "addresses"))
		why("%d connections at a time were wanted: those that were let in, and those that were turned away, for as long as proper ones last (%s)", f.AcceptMax, short(d.slots.typical()))
		do(fmt.Sprintf("Set `smtp_accept_max = %d` (WHM » Exim Configuration Manager » Advanced Editor; Debian: /etc/exim4/exim4.conf.localmacros, then update-exim4.conf) and restart Exim.", want),
			"Each connection is a process of Exim: look at `free -m` first.",
			"Block nobody. If you run smtpguard: `smtpguard replay --learn LOG`, so that these senders are known good.")
	case FullSpread:
		f.Title = "The slots were full, held by many sources of which few sent mail"
		f.Confidence = Likely
		why("%s held slots, none of them so many that a rule names it; senders of accepted mail held %.0f %%", count(sum.sources, "address", "addresses"), 100*sum.good)
		for i, s := range f.Sources {
			if i == 4 {
				break
			}
			why("%s held %.0f %%", bare(s.Prefix), 100*s.Share)
		}
		do("Proper senders of one provider look the same before they are known: `smtpguard replay --learn` over older logs, then diagnose again.",
			"Cheap limits in Exim: `smtp_accept_max_per_host = 10`, and `smtp_receive_timeout = 1m` so that silent clients go sooner.",
			"If these are customers and partners, raise smtp_accept_max; if not, let the daemon block: it judges networks too.")
		do(d.o.Guarding.block(nil)...)
	case FullUnknown:
		f.Title = "The slots were full; the log does not say who held them"
		if sum.capacity == 0 { // only the monitor tells
			f.Confidence = Likely
			why("the panel's check was answered 421 Too many concurrent SMTP connections, %s", times(f.Times))
			do("Name Exim's log of that time too: `smtpguard diagnose /var/log/exim_mainlog* /var/log/chkservd.log`.")
		} else {
			why("the addresses in lines with \"refused\" are mostly victims: they came when there was no room")
		}
		do("Let Exim log connections: `log_selector = +smtp_connection +incoming_port` (`smtpguard doctor` has the line for your system).",
			"If it goes on now: `smtpguard status` and `smtpguard top` show who holds the slots, from the kernel's socket table, without that.",
			notMore)
	case NearFull:
		f.Confidence = Likely
		f.Title = fmt.Sprintf("The slots were nearly all taken (%d of %d), but nobody was turned away", sum.peak, sum.capacity)
		why("at least nine of ten slots were taken %s, for %s in all", times(f.Times), short(sum.full))
		do(fmt.Sprintf("Not the reason of a failing check, but of the next: consider `smtp_accept_max = %d`.", roundUp(max(sum.peak, sum.capacity))))
		return
	}
	if sum.refused > 0 {
		why("%s away with 421 Too many concurrent SMTP connections, from %s", count(sum.refused, "connection was turned", "connections were turned"),
			count(sum.turned, "address", "addresses"))
		// One goes on over pauses: see quiet.
		stretch := fmt.Sprintf("that was one stretch of %s", short(long))
		if f.Times > 1 {
			stretch = fmt.Sprintf("those were %d stretches of %s at most", f.Times, short(long))
		}
		if sum.full > 0 {
			stretch += fmt.Sprintf(", in which the slots were full for %s", short(min(sum.full, time.Duration(f.Times)*long)))
		}
		why("%s", stretch)
	}
	if sum.check > 0 {
		why("%d of them came from this server itself: the panel's check was turned away, so it said that Exim is down, though Exim ran", sum.check)
	}
	n := 0
	for _, s := range d.starts {
		if slices.ContainsFunc(f.all, func(p Span) bool { return !s.at.Before(p.First) && !s.at.After(p.Last.Add(quiet)) }) {
			n++
		}
	}
	if n > 0 {
		why("Exim was restarted %s meanwhile, which frees no slot: the old connections live on, and it counts from 1 again", times(n))
	}
	if d.slots.more > 0 {
		why("%d further stretches are not looked at", d.slots.more)
	}
}

func restarted(failed []check) (n int) {
	for _, c := range failed {
		if c.restart {
			n++
		}
	}
	return n
}

func overlaps(a, b Span) bool { return !a.First.After(b.Last) && !b.First.After(a.Last) }

// rhythm is the usual time between events, 0 if there is none: half of the
// gaps must be within a tenth of it.
func rhythm(times []time.Time) time.Duration {
	if len(times) < 3 {
		return 0
	}
	var gaps []time.Duration
	for i := range times[1:] {
		gaps = append(gaps, times[i+1].Sub(times[i]))
	}
	slices.Sort(gaps)
	mid := gaps[len(gaps)/2]
	near := 0
	for _, g := range gaps {
		if (g - mid).Abs() <= mid/10 {
			near++
		}
	}
	if mid < time.Second || 2*near < len(gaps) {
		return 0
	}
	return mid.Round(time.Second)
}

// roundUp is a fifth more, in tens: a number to write into a configuration.
func roundUp(n int) int { return int(math.Ceil(float64(n)*1.2/10)) * 10 }

func bare(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func times(n int) string {
	switch n {
	case 1:
		return "once"
	case 2:
		return "twice"
	}
	return fmt.Sprintf("%d times", n)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// short is a duration to the second, without zero units.
func short(d time.Duration) string {
	s := d.Round(time.Second).String()
	for _, zero := range []string{"m0s", "h0m"} {
		if strings.HasSuffix(s, zero) {
			s = s[:len(s)-2]
		}
	}
	return s
}
