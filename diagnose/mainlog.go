package diagnose

import (
	"bytes"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// The kinds of lines that are counted, beside connections.
const (
	tLogin  = iota // the monitor's own login fails
	tLoad          // connections refused for the load average
	tQueued        // mail is only queued, for load or for connections
	tDisk          // no room in the spool or for the log
	tPort          // the port is taken by another program
	tFork          // no process can be started
	tConfig        // the configuration has a fault
	tCert          // the certificate or its key cannot be used
	tStorm         // sources that open too many connections
	kinds
)

// start is a line "daemon started", or of a SIGHUP, after which Exim counts
// from 1.
type start struct {
	at   time.Time
	hup  bool
	line string // as shown
}

// serviceAuth is how the user begins that cPanel makes for its check
// (ChkServd.pm: '__cpanel__service__auth__' . $service . '__' . key).
const serviceAuth = "(set_id=__cpanel__service__auth__"

// matcher recognises a line by how Exim's text begins, and by what it has
// further on. All texts are those of Exim 4.96's source and program; none
// begins with anything that a stranger chooses.
type matcher struct {
	prefix, has string
	kind        int
}

var matchers = []matcher{
	// receive.c, receive_check_fs()
	{"spool directory space check failed: space=", "", tDisk},
	{"log directory space check failed: space=", "", tDisk},
	// receive.c, spool_out.c
	{"spool file ", " error while ", tDisk},
	{"Spool write error: ", "", tDisk},
	{"spoolfile error on close: ", "", tDisk},
	// log.c; in the panic log and in syslog
	{"Cannot open ", " log file \"", tDisk},
	{"failed to write to ", ": length=", tDisk},
	// exim.c: smtp_accept_queue, queue_only_load
	{"no immediate delivery: load average ", "", tQueued},
	{"no immediate delivery: too many connections (", "", tQueued},
	// queue.c: deliver_queue_load_max
	{"Abandon queue run: ", "(load ", tQueued},
	// daemon.c
	{"socket bind() to port ", " failed: ", tPort},
	{"daemon: accept process fork failed", "", tFork},
	{"daemon: delivery process fork failed", "", tFork},
	{"daemon: fork of queue-runner process failed", "", tFork},
	// readconf.c
	{"Exim configuration error", "", tConfig},
	// tls-gnu.c, tls-openssl.c
	{"TLS error on connection from ", "(cert/key setup: ", tCert},
	{"TLS error on connection from ", "(SSL_CTX_use_certificate_chain_file", tCert},
	{"TLS error on connection from ", "(SSL_CTX_use_PrivateKey_file", tCert},
}

// mainLog takes a line of an Exim log.
func (d *Diagnosis) mainLog(line []byte) {
	d.lines++
	var ev detector.Event
	if !d.parser.Parse(line, &ev) {
		d.unparsed++
		return
	}
	if ev.Time.After(d.latest) {
		d.latest = ev.Time
	}
	in := d.in(ev.Time)
	if in {
		if d.first.IsZero() {
			d.first = ev.Time
		}
		if ev.Time.After(d.last) {
			d.last = ev.Time
		}
	}
	reserved := false
	switch ev.Kind {
	case detector.Tick:
		if in {
			d.other(ev.Time, line)
		}
	case detector.Opened:
		d.opened++
	case detector.Accepted:
		d.accepted++
	case detector.AuthFailed:
		if in && ev.Source.IsLoopback() {
			if i := bytes.LastIndex(line, []byte("(set_id=")); i >= 0 && bytes.HasPrefix(line[i:], []byte(serviceAuth)) {
				d.trouble[tLogin].add(ev.Time, line)
			}
		}
	case detector.Refused:
		if !in {
			break
		}
		if ev.Source.IsLoopback() {
			d.refusedCheck++
		}
		if ev.Reason == detector.RefusedLoad {
			t := &d.trouble[tLoad]
			t.add(ev.Time, line)
			t.most = max(t.most, loadIn(line, "load average = "))
		}
	case detector.Closed:
		if ev.Reason != detector.ClosedRejected {
			break
		}
		// smtp_accept_reserve: for all others the server is full.
		said := text(line)
		if !bytes.HasPrefix(said, []byte("temporarily refused connection from ")) {
			break
		}
		switch {
		case bytes.Contains(said, []byte(": not in reserve list: connected=")):
			reserved = true
		case in && bytes.Contains(said, []byte(": not in reserve list and load average = ")):
			t := &d.trouble[tLoad]
			t.add(ev.Time, line)
			t.most = max(t.most, loadIn(said, "load average = "))
		}
		if in && ev.Source.IsLoopback() {
			d.refusedCheck++
		}
	case detector.DaemonStarted:
		if in && len(d.starts) < maxStarts {
			d.starts = append(d.starts, start{ev.Time, bytes.HasSuffix(line, []byte(" SIGHUP received: re-exec daemon")), show(line)})
		}
	}
	for _, v := range d.slots.observe(&ev, line, reserved, in) {
		if in && v.Metric == detector.Opens {
			d.trouble[tStorm].add(v.Time, []byte(v.Source.String()+": "+v.Sentence()))
		}
	}
}

// other takes a line that is no event.
func (d *Diagnosis) other(at time.Time, line []byte) {
	said := text(line)
	if said == nil {
		return
	}
	for i := range matchers {
		m := &matchers[i]
		if len(said) < len(m.prefix) || said[0] != m.prefix[0] || string(said[:len(m.prefix)]) != m.prefix {
			continue
		}
		if m.has != "" && !bytes.Contains(said, []byte(m.has)) {
			continue
		}
		t := &d.trouble[m.kind]
		t.add(at, line)
		if m.kind == tQueued {
			t.most = max(t.most, loadIn(said, "load average "), loadIn(said, "(load "))
		}
		return
	}
}
