// Package exim reads lines of Exim's main log as detector events: Parse is
// to detector what image/png is to image.
//
// Templates and fields are those of Exim's source, versions 4.77 to 4.99
// (daemon.c, smtp_in.c, receive.c, host.c, tls-gnu.c, tls-openssl.c, log.c);
// testdata/exim/lines.txt has an example of each with the event it gives.
//
// Most of a log line can be chosen by a stranger: HELO names, user names,
// senders and subjects may look like log lines. So nothing is searched for.
// A line is matched from its first byte to its last, and:
//
//   - an Opened event comes only from the daemon's own line, which holds no
//     text from outside, and only when all of it matches;
//   - where a line has text from outside, the peer's address is taken from
//     the place where Exim puts it; when that text makes two places possible,
//     the line is a Tick. So strangers can at most hide events of their own.
//
// A local user who runs Exim from a directory with newlines in its name can
// write complete lines where the selector has +arguments. No reader of the
// log can tell those; confirm what holds slots with the kernel.
package exim

import (
	"hash/maphash"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// Parser reads the lines of one log in order. It remembers the time of the
// line before, for timestamps that are ambiguous alone (see New and
// SetReference), and the last few lines that syslog doubles. It is not for
// concurrent use; make one with New.
type Parser struct {
	clock clock
	twice twice
	stats Stats
}

// Stats counts what a Parser has read.
type Stats struct {
	Lines    int // all lines
	Unparsed int // lines without a timestamp or not of Exim

	Opened        int
	Closed        int
	Refused       int
	Accepted      int
	Authenticated int
	AuthFailed    int
	DaemonStarted int

	// WithPort and WithoutPort count Opened, Closed and Refused events that
	// do or do not have the peer's port. Only WithoutPort: the log selector
	// lacks +incoming_port, and Closed can't be joined to Opened. Closed or
	// Refused but no Opened: it lacks +smtp_connection.
	WithPort    int
	WithoutPort int

	// Proxied counts messages that came through a PROXY protocol front end
	// (PRX=, shown with +proxy). Opened then has the address of the front
	// end and Closed that of the client: held slots can't be known from such
	// a log, and a firewall here never sees the client.
	Proxied int
	// Inetd counts connections that inetd or xinetd accepted. They take none
	// of the daemon's slots and give Tick.
	Inetd int
}

// Add adds the counts of t to s.
func (s *Stats) Add(t Stats) {
	s.Lines += t.Lines
	s.Unparsed += t.Unparsed
	s.Opened += t.Opened
	s.Closed += t.Closed
	s.Refused += t.Refused
	s.Accepted += t.Accepted
	s.Authenticated += t.Authenticated
	s.AuthFailed += t.AuthFailed
	s.DaemonStarted += t.DaemonStarted
	s.WithPort += t.WithPort
	s.WithoutPort += t.WithoutPort
	s.Proxied += t.Proxied
	s.Inetd += t.Inetd
}

// New returns a Parser for a log whose timestamps are in loc where they have
// no offset of their own; nil means time.Local. Exim writes them in the zone
// of its option timezone.
//
// In autumn one hour of local time comes twice. A line in it belongs to the
// first pass unless that would be more than a minute before the line before:
// so the second pass begins where the log steps back, and a log that begins
// inside the hour begins in the first pass. In spring one hour is missing; a
// line in it is read with the offset from before the change, 02:30 is 03:30.
func New(loc *time.Location) *Parser {
	if loc == nil {
		loc = time.Local
	}
	return &Parser{
		clock: newClock(loc, time.Now().Unix()),
		twice: twice{seed: maphash.MakeSeed()},
	}
}

// SetReference says when about the next line was written. Syslog lines
// without Exim's own timestamp have no year: each gets the year that brings
// it nearest to the one before, the first the one that is nearest to t. The
// default is the time when New was called. When an old log is read, its first
// line's time or the file's modification time gives the same years each time.
func (p *Parser) SetReference(t time.Time) { p.clock.ref = t.Unix() }

// Stats returns what was counted since New or Fork.
func (p *Parser) Stats() Stats { return p.stats }

// Fork returns a Parser like p that has read nothing, to parse a later block
// of the same log, perhaps on another core. See Join.
func (p *Parser) Fork() *Parser {
	q := *p
	q.stats = Stats{}
	q.twice.clear()
	q.clock.restart()
	return &q
}

// Join makes p go on as if it had read what q, forked from it or from one
// that it was forked from, has read. False: p is as before, because q read a
// time that depends on lines before its first (the repeated hour, a year);
// parse that block again with p. What is told once although Exim writes it twice (a
// doubled syslog line, "closed by DROP in ACL") is told twice at the border of
// two blocks; so cut blocks at the same places whatever the number of cores.
func (p *Parser) Join(q *Parser) bool {
	if !p.clock.join(&q.clock) {
		return false
	}
	p.twice = q.twice
	p.stats.Add(q.stats)
	return true
}

// Parse reads one line, without its line end, into *ev, which it overwrites.
// True: ev has a Time and a Kind, Tick if the line is of no interest. False:
// the line has no timestamp, is another program's or the continuation of a
// long line (ev.Kind is None). The line is not kept. Parse does not allocate.
//
// Each message with an address is Accepted, be its sender empty or its
// client logged in: what came is what counts, and a bounce from elsewhere is
// a message like others. Authenticated is a session that logged in and sent
// no message (with +smtp_no_mail).
//
// Whom a child of the daemon turns away (host_reject_connection, the connect
// ACL, the reserve list) had a slot for a moment: that is Closed, with
// ClosedRejected. Refused is what the daemon itself refuses.
//
// Closed may be told twice for one connection, by a line that syslog doubles
// after others came between; with a port the second frees nothing.
func (p *Parser) Parse(line []byte, ev *detector.Event) bool {
	*ev = detector.Event{}
	p.stats.Lines++
	var pre prefix
	if !p.clock.prefix(line, &pre) {
		p.stats.Unparsed++
		return false
	}
	ev.Kind = detector.Tick
	ev.Time = time.Unix(pre.sec, pre.nsec).UTC()
	if pre.cut {
		// The end is missing, and whoever chose the text in the middle chose
		// where: such a line can't be believed.
		return true
	}
	p.text(line[pre.n:], &pre, ev)
	switch ev.Kind {
	case detector.Opened:
		p.stats.Opened++
	case detector.Closed:
		p.stats.Closed++
	case detector.Refused:
		p.stats.Refused++
	case detector.Accepted:
		p.stats.Accepted++
		return true
	case detector.Authenticated:
		p.stats.Authenticated++
		return true
	case detector.AuthFailed:
		p.stats.AuthFailed++
		return true
	case detector.DaemonStarted:
		p.stats.DaemonStarted++
		return true
	default:
		return true
	}
	if ev.Port != 0 {
		p.stats.WithPort++
	} else {
		p.stats.WithoutPort++
	}
	return true
}
