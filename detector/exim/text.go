package exim

import (
	"bytes"

	"github.com/smtpguard/smtpguard/detector"
)

// text matches what stands after the prefix of a line with the templates
// that matter, and fills in ev if one fits.
func (p *Parser) text(b []byte, pre *prefix, ev *detector.Event) {
	if len(b) < 8 {
		return
	}
	switch b[0] {
	case '<':
		if pre.id && b[1] == '=' && b[2] == ' ' {
			p.arrived(b[3:], ev)
		}
		return
	case '=', '-', '*': // deliveries
		return
	case 'S':
		switch {
		case bytes.HasPrefix(b, smtpConnection):
			p.connection(b[len(smtpConnection):], pre, ev)
			return
		case bytes.HasPrefix(b, smtpCall):
			if h, ok := hostAndIdentBefore(b[len(smtpCall):], dropped); ok {
				p.closedOnce(b, pre, ev, h, detector.ClosedDropped)
			}
			return
		case bytes.HasPrefix(b, smtpCommand):
			p.commandTimeout(b[len(smtpCommand):], ev)
			return
		case bytes.HasPrefix(b, smtpData):
			if h, ok := hostAndIdentBefore(b[len(smtpData):], forSender); ok {
				closed(ev, h, detector.ClosedTimeout)
			}
			return
		case bytes.HasPrefix(b, smtpSync):
			p.outOfSync(b, pre, ev)
			return
		}
	case 'C':
		if bytes.HasPrefix(b, connectionFrom) && !pre.id {
			refused(b[len(connectionFrom):], ev)
			return
		}
	case 'H':
		if b[1] == '=' {
			p.rejected(b, pre, ev)
			return
		}
	case 'u':
		if rest, ok := bytes.CutPrefix(b, unexpected); ok {
			disconnected(rest, ev)
			return
		}
	case 'r', 't', 'c':
		if p.turnedAway(b, pre, ev) {
			return
		}
	case 'T':
		if rest, ok := bytes.CutPrefix(b, tlsError); ok {
			tlsFailed(rest, ev)
			return
		}
	case 'g':
		if rest, ok := bytes.CutPrefix(b, getsockopt); ok {
			if i := bytes.LastIndex(rest, colon); i >= 0 {
				if h, ok := hostAndIdent(rest[:i]); ok {
					closed(ev, h, detector.ClosedLost)
				}
			}
			return
		}
	case 'e', 'p':
		if daemonStarted(b) {
			ev.Kind = detector.DaemonStarted
			return
		}
	case 'n':
		if rest, ok := bytes.CutPrefix(b, noMail); ok {
			noMailButLogin(rest, ev)
			return
		}
	}
	p.authFailed(b, pre, ev)
}

func closed(ev *detector.Event, h peer, why detector.Reason) {
	ev.Kind, ev.Reason = detector.Closed, why
	ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
}

// closedOnce is closed for a line that goes to the reject log as well.
func (p *Parser) closedOnce(b []byte, pre *prefix, ev *detector.Event, h peer, why detector.Reason) {
	if !pre.syslog || p.twice.first(p.twice.text(b)) {
		closed(ev, h, why)
	}
}

// connection reads what follows "SMTP connection". The daemon:
//
//	from [IP]:PORT I=[IP]:PORT Ci=ID (TCP/IP connection count = N)
//
// A child, at the end (D= where it stands up to 4.96, and since):
//
//	Ci=ID from HOST closed by QUIT
//	Ci=ID from HOST D=1m5s closed by QUIT
//	Ci=ID from HOST TFO lost (error: Connection reset by peer) D=5s
//	Ci=ID from HOST lost while reading message data (header)
func (p *Parser) connection(b []byte, pre *prefix, ev *detector.Event) {
	if rest, ok := bytes.CutPrefix(b, from); ok && !pre.id && opened(rest, ev) {
		return
	}
	b, ok := bytes.CutPrefix(afterID(b), from)
	if !ok {
		return
	}
	b, why := ending(b)
	if why == detector.ReasonUnknown {
		if bytes.HasSuffix(b, viaInetd) {
			p.stats.Inetd++
		}
		return
	}
	h, ok := peerAtEnd(b)
	if !ok {
		return
	}
	if why == detector.ClosedDropped {
		sec := ev.Time.Unix()
		if p.twice.take(p.twice.dropped(h, sec)) || p.twice.take(p.twice.dropped(h, sec-1)) {
			return
		}
	}
	closed(ev, h, why)
}

// opened reads the daemon's line after " from ". It is the only line that
// gives a slot, so it has to match as a whole.
func opened(b []byte, ev *detector.Event) bool {
	if len(b) == 0 || b[0] != '[' || b[len(b)-1] != ')' {
		return false
	}
	h, _, n := host(b)
	if n == 0 {
		return false
	}
	b, ok := bytes.CutPrefix(afterID(b[n:]), count)
	if !ok {
		return false
	}
	v, n := number(b, 9)
	if n == 0 || v == 0 || n != len(b)-1 {
		return false
	}
	ev.Kind, ev.Count = detector.Opened, v
	ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
	return true
}

// afterID returns b without the " Ci=ID" that it may begin with
// (+connection_id, from Exim 4.97 on).
func afterID(b []byte) []byte {
	rest, ok := bytes.CutPrefix(b, connectionID)
	if !ok {
		return b
	}
	n := 0
	for n < len(rest) && n < 64 && rest[n] > ' ' && rest[n] != '[' && rest[n] != '(' {
		n++
	}
	if n == 0 {
		return b
	}
	return rest[n:]
}

// ending takes from b what says how the connection ended.
func ending(b []byte) (host []byte, why detector.Reason) {
	rest, _ := duration(b)
	rest, why = readError(rest)
	if rest, ok := bytes.CutSuffix(rest, lost); ok {
		rest, _ = bytes.CutSuffix(rest, tfo)
		return rest, why
	}
	for _, e := range endings {
		if rest, ok := bytes.CutSuffix(b, e.text); ok {
			rest, _ = duration(rest)
			return rest, e.why
		}
	}
	return b, detector.ReasonUnknown
}

// duration takes " D=1m5s" from the end of b, and reports whether it was
// there (string_timesince of Exim; "0.019s" with +millisec).
func duration(b []byte) ([]byte, bool) {
	i := len(b)
	for i > 0 && len(b)-i < 32 && (b[i-1] >= '0' && b[i-1] <= '9' || b[i-1] >= 'a' && b[i-1] <= 'z' || b[i-1] == '.') {
		i--
	}
	if i < 3 || i == len(b) || b[i] < '0' || b[i] > '9' || string(b[i-3:i]) != " D=" {
		return b, false
	}
	return b[:i-3], true
}

// readError takes " (error: TEXT)" from the end of b. The text is the
// system's word for the error of a read. That for ECONNABORTED comes when the
// socket was destroyed on this machine.
func readError(b []byte) ([]byte, detector.Reason) {
	if len(b) == 0 || b[len(b)-1] != ')' {
		return b, detector.ClosedLost
	}
	i := bytes.LastIndex(b, errorText)
	if i < 0 {
		return b, detector.ClosedLost
	}
	text := b[i+len(errorText) : len(b)-1]
	if bytes.ContainsAny(text, "()[]") { // a stranger's, and the host text is in it
		return b, detector.ClosedLost
	}
	why := detector.ClosedLost
	if bytes.Equal(text, aborted) {
		why = detector.ClosedKilled
	}
	return b[:i], why
}

// commandTimeout reads what follows "SMTP command timeout on ":
//
//	[TLS ]connection from HOST[ U=IDENT][ D=5m]
func (p *Parser) commandTimeout(b []byte, ev *detector.Event) {
	b, _ = bytes.CutPrefix(b, onTLS)
	b, ok := bytes.CutPrefix(b, lowConnectionFrom)
	if !ok {
		return
	}
	b, _ = duration(b)
	if h, ok := hostAndIdent(b); ok {
		closed(ev, h, detector.ClosedTimeout)
	}
}

// outOfSync reads
//
//	SMTP protocol synchronization error (input sent without waiting for greeting): rejected connection from H=HOST[ U=IDENT] input="TEXT"
//	SMTP protocol synchronization error (next input sent too soon: pipelining was[ not] advertised): rejected "TEXT" H=HOST[ U=IDENT] next input="TEXT"
func (p *Parser) outOfSync(b []byte, pre *prefix, ev *detector.Event) {
	sep := nextInput
	if bytes.HasPrefix(b, syncGreeting) {
		sep = input
	} else if !bytes.HasPrefix(b, syncNext) {
		return
	}
	if h, ok := hostAndIdentBefore(b, sep); ok {
		p.closedOnce(b, pre, ev, h, detector.ClosedDropped)
	}
}

// refused reads the daemon's line after "Connection from ":
//
//	[IP]:PORT I=[IP]:PORT refused: WHY
func refused(b []byte, ev *detector.Event) {
	if len(b) == 0 || b[0] != '[' {
		return
	}
	h, _, n := host(b)
	if n == 0 {
		return
	}
	why, ok := bytes.CutPrefix(afterID(b[n:]), isRefused)
	if !ok {
		return
	}
	switch {
	case string(why) == "too many connections":
		ev.Reason = detector.RefusedFull
	case string(why) == "too many connections from that IP address":
		ev.Reason = detector.RefusedPerHost
	case load(why):
		ev.Reason = detector.RefusedLoad
	default:
		return
	}
	ev.Kind = detector.Refused
	ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
}

// load reads "load average = 12.34".
func load(b []byte) bool {
	b, ok := bytes.CutPrefix(b, loadAverage)
	if !ok {
		return false
	}
	_, n := number(b, 6)
	return n > 0 && len(b) == n+3 && b[n] == '.' && isDigit(b[n+1]) && isDigit(b[n+2])
}

func isDigit(c byte) bool { return '0' <= c && c <= '9' }

// turnedAway reads the lines of a child that ends before the banner; the
// address is before a fixed end, and no HELO name has been given yet:
//
//	refused connection from HOST (host_reject_connection)
//	refused connection from HOST (tcp wrappers)
//	temporarily refused connection from HOST (tcp wrappers errno=N)
//	temporarily refused connection from HOST: not in reserve list: connected=90 max=100 reserve=10[ (lookup deferred)]
//	temporarily refused connection from HOST: not in reserve list and load average = 12.34[ (lookup deferred)]
//	connection from HOST refused (IP options)
func (p *Parser) turnedAway(b []byte, pre *prefix, ev *detector.Event) bool {
	text := b
	var end, slots int
	switch {
	case bytes.HasPrefix(b, refusedFrom):
		b = b[len(refusedFrom):]
		if end = len(b) - len(hostReject); end < 0 || !bytes.HasSuffix(b, hostReject) {
			if end = len(b) - len(wrappers); end < 0 || !bytes.HasSuffix(b, wrappers) {
				return true
			}
		}
	case bytes.HasPrefix(b, temporarilyRefusedFrom):
		b = b[len(temporarilyRefusedFrom):]
		if end = bytes.LastIndex(b, notReserved); end >= 0 {
			rest, _ := bytes.CutSuffix(b[end+len(notReserved):], lookupDeferred)
			var ok bool
			if slots, ok = reserve(rest); !ok {
				return true
			}
		} else {
			rest, ok := bytes.CutSuffix(b, parenthesis)
			end = bytes.LastIndex(rest, wrappersErrno)
			if !ok || end < 0 {
				return true
			}
			if _, n := number(rest[end+len(wrappersErrno):], 6); end+len(wrappersErrno)+n != len(rest) {
				return true
			}
		}
	case bytes.HasPrefix(b, lowConnectionFrom):
		b = b[len(lowConnectionFrom):]
		if end = len(b) - len(ipOptions); end < 0 || !bytes.HasSuffix(b, ipOptions) {
			return true
		}
	default:
		return false
	}
	if h, ok := hostAndIdent(b[:end]); ok {
		ev.Capacity = slots
		p.closedOnce(text, pre, ev, h, detector.ClosedRejected)
	}
	return true
}

// reserve reads ": connected=90 max=100 reserve=10", and returns max, or " and
// load average = 12.34". Whoever is turned away has no say in it: a name and an
// ident that he chose stand before.
func reserve(b []byte) (slots int, ok bool) {
	if rest, ok := bytes.CutPrefix(b, andSpace); ok {
		return 0, load(rest)
	}
	var counts [len(reserveCounts)]int
	for i, name := range reserveCounts {
		rest, ok := bytes.CutPrefix(b, name)
		v, n := number(rest, 9)
		if !ok || n == 0 {
			return 0, false
		}
		counts[i], b = v, rest[n:]
	}
	return counts[1], len(b) == 0
}

// rejected reads, of the lines that begin with "H=", the one that ends a
// session:
//
//	H=HOST[ U=IDENT][ X=CIPHER][ CV=yes] [temporarily ]rejected connection in "connect" ACL: TEXT
//
// There is no HELO name yet; a line that has one is of another kind, and may
// hold this text in a recipient's address.
func (p *Parser) rejected(b []byte, pre *prefix, ev *detector.Event) {
	h, helo, n := host(b[2:])
	if n == 0 || helo {
		return
	}
	rest := b[2+n:]
	for {
		if bytes.HasPrefix(rest, rejectedConnect) || bytes.HasPrefix(rest, temporarilyRejectedConnect) {
			break
		}
		// A word more: U=, X= or CV=.
		if len(rest) < 4 || rest[0] != ' ' ||
			!bytes.HasPrefix(rest[1:], ident) && !bytes.HasPrefix(rest[1:], cipher) && !bytes.HasPrefix(rest[1:], verified) {
			return
		}
		i := bytes.IndexByte(rest[1:], ' ')
		if i < 0 {
			return
		}
		rest = rest[1+i:]
	}
	p.closedOnce(b, pre, ev, h, detector.ClosedRejected)
	if ev.Kind == detector.Closed {
		p.twice.put(p.twice.dropped(h, ev.Time.Unix()))
	}
}

// disconnected reads what follows "unexpected ":
//
//	[TFO ]disconnection while reading SMTP command from HOST[ U=IDENT][ (error: TEXT)][ D=5s]
func disconnected(b []byte, ev *detector.Event) {
	b, _ = bytes.CutPrefix(b, tfoSpace)
	b, ok := bytes.CutPrefix(b, disconnection)
	if !ok {
		return
	}
	b, _ = duration(b)
	b, why := readError(b)
	if h, ok := hostAndIdent(b); ok {
		closed(ev, h, why)
	}
}

// tlsFailed reads what follows "TLS error on connection":
//
//	[Ci=ID ]from HOST (gnutls_handshake): TEXT
//
// On a tls-on-connect port this is the last line of a connection. After
// STARTTLS it is not: the client may go on holding the slot, and there will
// be a line for its end. STARTTLS needs a HELO; so the line is an end if it
// shows none, unless it shows a port of ours that is not tls-on-connect.
// (A client whose HELO is its own address is shown without one.)
func tlsFailed(b []byte, ev *detector.Event) {
	b, ok := bytes.CutPrefix(afterID(b), from)
	if !ok {
		return
	}
	h, helo, n := host(b)
	if n == 0 || helo || h.local.Port() == 25 || h.local.Port() == 587 {
		return
	}
	if bytes.HasPrefix(b[n:], gnutlsHandshake) || bytes.HasPrefix(b[n:], sslAccept) {
		closed(ev, h, detector.ClosedDropped)
	}
}

// daemonStarted reads
//
//	exim VERSION daemon started: pid=N, ..., listening for SMTP on ...
//	pid N: SIGHUP received: re-exec daemon
//
// A daemon that only runs the queue says "not listening for SMTP".
func daemonStarted(b []byte) bool {
	if rest, ok := bytes.CutPrefix(b, eximSpace); ok {
		i := bytes.IndexByte(rest, ' ')
		return i > 0 && bytes.HasPrefix(rest[i:], isStarted) && !bytes.Contains(rest[i:], notListening)
	}
	rest, ok := bytes.CutPrefix(b, pidSpace)
	if !ok {
		return false
	}
	_, n := number(rest, 10)
	return n > 0 && string(rest[n:]) == ": SIGHUP received: re-exec daemon"
}

// arrived reads what follows "ID <= ":
//
//	SENDER[ R=ID][ DS] H=HOST[ TFO][ U=IDENT] P=PROTOCOL ... S=SIZE ...
//
// A message from this machine has no H=. What follows P= may hold anything
// (T= has the subject), and so may U= and a HELO name with
// helo_accept_junk_hosts; a line where that could be told for the host text
// is left out.
func (p *Parser) arrived(b []byte, ev *detector.Event) {
	n := sender(b)
	if n < 0 {
		return
	}
	b = b[n:]
	if rest, ok := bytes.CutPrefix(b, reference); ok {
		n := bytes.IndexByte(rest, ' ')
		if n < 0 {
			return
		}
		b = rest[n:]
	}
	b, _ = bytes.CutPrefix(b, dnssec)
	b, ok := bytes.CutPrefix(b, isHost)
	if !ok {
		return
	}
	h, _, n := host(b)
	if n == 0 {
		return
	}
	b = b[n:]
	b, _ = bytes.CutPrefix(b, tfo)
	if bytes.HasPrefix(b, sepIdent) {
		i := bytes.Index(b, protocol)
		if i < 0 || bytes.IndexByte(b[:i], '[') >= 0 {
			return
		}
		b = b[i:]
	}
	b, ok = bytes.CutPrefix(b, protocol)
	if !ok || bytes.Contains(b, protocol) {
		return
	}
	if i := bytes.Index(b, size); i >= 0 && bytes.Contains(b[:i], proxied) {
		p.stats.Proxied++
	}
	ev.Kind = detector.Accepted
	ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
}

// sender returns the length of the address that b begins with, -1 if it does
// not end. A quoted local part may have spaces.
func sender(b []byte) int {
	quoted := false
	for i := 0; i < len(b); i++ {
		switch c := b[i]; {
		case c == '"':
			quoted = !quoted
		case c == '\\' && quoted:
			i++
		case c == ' ' && !quoted:
			return i
		}
	}
	return -1
}

// noMailButLogin reads what follows "no MAIL in ", for a session that logged
// in but sent nothing:
//
//	[TFO ]SMTP connection [Ci=ID ]from HOST D=5s A=AUTHENTICATOR[:ID] ...
func noMailButLogin(b []byte, ev *detector.Event) {
	b, _ = bytes.CutPrefix(b, tfoSpace)
	b, ok := bytes.CutPrefix(b, smtpConnection)
	if !ok {
		return
	}
	b, ok = bytes.CutPrefix(afterID(b), from)
	if !ok {
		return
	}
	h, _, n := host(b)
	if n == 0 || bytes.IndexByte(b[n:], '[') >= 0 {
		return
	}
	i := bytes.Index(b[n:], auth)
	if i < 0 {
		return
	}
	if rest, ok := duration(b[n : n+i]); ok && len(rest) == 0 {
		ev.Kind = detector.Authenticated
		ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
	}
}

// authFailed reads
//
//	NAME authenticator failed for HOST[ U=IDENT]: 535 Incorrect authentication data[ (set_id=TEXT)]
//
// Other codes (435, 501) are not about the password.
func (p *Parser) authFailed(b []byte, pre *prefix, ev *detector.Event) {
	i := bytes.IndexByte(b[:min(len(b), 64)], ' ')
	if i < 1 || !bytes.HasPrefix(b[i:], authenticatorFailed) {
		return
	}
	h, ok := hostAndIdentBefore(b[i+len(authenticatorFailed):], incorrect)
	if !ok || pre.syslog && !p.twice.first(p.twice.text(b)) {
		return
	}
	ev.Kind = detector.AuthFailed
	ev.Source, ev.Port, ev.Local = h.addr, h.port, h.local
}

var endings = [...]struct {
	text []byte
	why  detector.Reason
}{
	{[]byte(" closed by QUIT"), detector.ClosedQuit},
	{[]byte(" closed by EOF"), detector.ClosedLost},
	{[]byte(" closed by DROP in ACL"), detector.ClosedDropped},
	{[]byte(" closed after SIGTERM"), detector.ClosedKilled},
	{[]byte(" closed after SIGINT"), detector.ClosedKilled},
	{[]byte(" lost while reading message data"), detector.ClosedLost},
	{[]byte(" lost while reading message data (header)"), detector.ClosedLost},
}

var reserveCounts = [...][]byte{
	[]byte(": connected="), []byte(" max="), []byte(" reserve="),
}

// The fixed parts of Exim's templates.
var (
	smtpConnection    = []byte("SMTP connection")
	smtpCall          = []byte("SMTP call from ")
	smtpCommand       = []byte("SMTP command timeout on ")
	smtpData          = []byte("SMTP data timeout (message abandoned) on connection from ")
	smtpSync          = []byte("SMTP protocol synchronization error (")
	syncGreeting      = []byte("SMTP protocol synchronization error (input sent without waiting for greeting): rejected connection from H=")
	syncNext          = []byte("SMTP protocol synchronization error (next input sent too soon: pipelining was")
	connectionFrom    = []byte("Connection from ")
	lowConnectionFrom = []byte("connection from ")
	from              = []byte(" from ")
	connectionID      = []byte(" Ci=")
	count             = []byte(" (TCP/IP connection count = ")
	viaInetd          = []byte(" (via inetd)")
	isRefused         = []byte(" refused: ")
	loadAverage       = []byte("load average = ")

	refusedFrom            = []byte("refused connection from ")
	temporarilyRefusedFrom = []byte("temporarily refused connection from ")
	hostReject             = []byte(" (host_reject_connection)")
	wrappers               = []byte(" (tcp wrappers)")
	wrappersErrno          = []byte(" (tcp wrappers errno=")
	parenthesis            = []byte(")")
	notReserved            = []byte(": not in reserve list")
	lookupDeferred         = []byte(" (lookup deferred)")
	andSpace               = []byte(" and ")
	ipOptions              = []byte(" refused (IP options)")

	rejectedConnect            = []byte(` rejected connection in "connect" ACL`)
	temporarilyRejectedConnect = []byte(` temporarily rejected connection in "connect" ACL`)

	unexpected    = []byte("unexpected ")
	disconnection = []byte("disconnection while reading SMTP command from ")
	lost          = []byte(" lost")
	tfo           = []byte(" TFO")
	tfoSpace      = []byte("TFO ")
	onTLS         = []byte("TLS ")
	errorText     = []byte(" (error: ")
	aborted       = []byte("Software caused connection abort") // strerror(ECONNABORTED)
	dropped       = []byte(" dropped: too many ")
	forSender     = []byte(" F=<")
	input         = []byte(` input="`)
	nextInput     = []byte(` next input="`)
	getsockopt    = []byte("getsockopt() failed from ")
	colon         = []byte(": ")

	tlsError        = []byte("TLS error on connection")
	gnutlsHandshake = []byte(" (gnutls_handshake)")
	sslAccept       = []byte(" (SSL_accept)")

	eximSpace    = []byte("exim ")
	pidSpace     = []byte("pid ")
	isStarted    = []byte(" daemon started: pid=")
	notListening = []byte("not listening for SMTP")

	authenticatorFailed = []byte(" authenticator failed for ")
	incorrect           = []byte(": 535 Incorrect authentication data")
	noMail              = []byte("no MAIL in ")
	auth                = []byte(" A=")

	sepInterface = []byte(" I=")
	sepIdent     = []byte(" U=")
	ident        = []byte("U=")
	cipher       = []byte("X=")
	verified     = []byte("CV=")
	reference    = []byte(" R=")
	dnssec       = []byte(" DS")
	isHost       = []byte(" H=")
	protocol     = []byte(" P=")
	size         = []byte(" S=")
	proxied      = []byte(" PRX=")
)
