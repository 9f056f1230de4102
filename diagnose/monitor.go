package diagnose

import (
	"bytes"
	"time"
)

// reason says why a check of the monitor failed.
type reason uint8

const (
	unsaid      reason = iota
	checkOK            // it did not fail
	checkFull          // 421 Too many concurrent SMTP connections
	checkLoad          // 421 Too much load
	checkLogin         // 535: its own login
	checkRefuse        // nobody listens
	checkSilent        // no banner or answer in time
	checkGone          // the process is not there
	checkOther         // another answer than it wants
)

var reasonWords = [...]string{
	unsaid: "for a reason that it does not tell", checkOK: "",
	checkFull:   "because Exim answered 421 Too many concurrent SMTP connections",
	checkLoad:   "because Exim answered 421 Too much load",
	checkLogin:  "because its own login was answered 535 Incorrect authentication data",
	checkRefuse: "because nothing listened on the port",
	checkSilent: "because no answer came in time",
	checkGone:   "because Exim's process was not there",
	checkOther:  "because of another answer than it wants",
}

func (r reason) String() string {
	if int(r) < len(reasonWords) {
		return reasonWords[r]
	}
	return reasonWords[unsaid]
}

// check is a result of the monitor.
type check struct {
	at      time.Time // zero: not told
	service string    // exim, or exim-26,465,587
	why     reason
	restart bool // Exim was restarted, or that was tried
	lines   []string
}

// classify finds the reason in a line of the transcript, or elsewhere in what
// the monitor says. The words are those of ChkServd.pm (_service_socket_check)
// and, behind "<< ", of Exim.
func classify(line []byte) reason {
	said, server := bytes.CutPrefix(bytes.TrimLeft(line, " \t"), []byte("<< "))
	has := func(s string) bool { return bytes.Contains(line, []byte(s)) }
	switch {
	case server && bytes.HasPrefix(said, []byte("421")) && has("oo many concurrent SMTP connections"):
		return checkFull
	case server && bytes.HasPrefix(said, []byte("421")) && has("oo much load"):
		return checkLoad
	case server && bytes.HasPrefix(said, []byte("535")), has("** [535 "):
		return checkLogin
	case has("** [421 ") && has("oo many concurrent SMTP connections"):
		return checkFull
	case has("Unable to connect to port "), has("Connection refused"):
		return checkRefuse
	case has("Timeout while trying to "), has("Failed to read from socket"):
		return checkSilent
	case has("exim: ** ["), has("exim: ["):
		return checkOther
	}
	return unsaid
}

// add takes a line of the record of a failed check.
func (c *check) add(line []byte) {
	r := classify(line)
	if r != unsaid && (c.why == unsaid || c.why == checkOK || c.why == checkOther || c.why == checkGone) {
		c.why = r
	}
	if r != unsaid && len(c.lines) < maxLines {
		c.lines = append(c.lines, show(line))
	}
}

// monitor reads chkservd.log, as ChkServd.pm writes it: a record for each round
// of checks, in it a paragraph for each service,
//
//	[2026-11-22 19:45:50 +0000] Service check ....
//	exim-26,465,587 [[socket_service_auth:1]TCP Transaction Log:
//	<< 220-mx.example ESMTP Exim 4.96
//	...
//	[check command:+][socket connect:-][socket failure threshold:3/3][fail count:1]Restarting exim-26,465,587....
//	[notify:failed service:exim-26,465,587]]...
type monitor struct {
	zone *time.Location
	done func(check)

	at   time.Time
	open bool // in the paragraph of an Exim
	c    check
}

func (m *monitor) line(line []byte) {
	line = bytes.TrimRight(line, "\r")
	if at, rest, ok := monitorTime(line, m.zone); ok {
		m.end()
		m.at = at
		_ = rest
		return
	}
	if name, ok := paragraph(line); ok {
		m.end()
		if !bytes.Equal(name, []byte("exim")) && !bytes.HasPrefix(name, []byte("exim-")) {
			return
		}
		m.open, m.c = true, check{at: m.at, service: show(name)}
	} else if bytes.HasPrefix(line, []byte("Service Check ")) || bytes.Equal(line, []byte("Done")) {
		m.end()
		return
	}
	if !m.open {
		return
	}
	has := func(s string) bool { return bytes.Contains(line, []byte(s)) }
	m.c.add(line)
	if has("Restarting exim") {
		m.c.restart = true
	}
	failed := has("[socket connect:-]") || has("[check command:-]")
	switch {
	case has("[check command:-]") && m.c.why <= checkOK:
		m.c.why = checkGone
	case m.c.why == unsaid && !failed && (has("[socket connect:+]") || has("[socket connect:N/A]") || has("too soon after restart")):
		m.c.why = checkOK
	}
	if failed && len(m.c.lines) < maxLines {
		m.c.lines = append(m.c.lines, show(line))
	}
}

// end closes a paragraph.
func (m *monitor) end() {
	if m.open {
		m.done(m.c)
	}
	m.open = false
}

// paragraph returns the service whose paragraph begins with this line.
func paragraph(line []byte) (name []byte, ok bool) {
	name, _, ok = bytes.Cut(line, []byte(" ["))
	if !ok || len(name) == 0 || len(name) > 64 {
		return nil, false
	}
	for _, c := range name {
		if !(c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '-' || c == '_' || c == ',') {
			return nil, false
		}
	}
	return name, true
}

// monitorTime reads "[2026-11-22 19:45:50 +0000] "; older ones have no zone.
func monitorTime(line []byte, zone *time.Location) (at time.Time, rest []byte, ok bool) {
	if len(line) < 22 || line[0] != '[' || !isStamp(line[1:]) {
		return at, nil, false
	}
	stamp, rest, found := bytes.Cut(line[1:], []byte("]"))
	if !found || len(stamp) > 25 {
		return at, nil, false
	}
	at, err := time.Parse("2006-01-02 15:04:05 -0700", string(stamp))
	if err != nil {
		at, err = time.ParseInLocation("2006-01-02 15:04:05", string(stamp), zone)
	}
	return at, rest, err == nil
}
