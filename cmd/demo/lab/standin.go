package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Where the stand-in listens in a world without namespaces.
var loopbackServer = netip.MustParseAddr("127.0.0.1")

// standIn is a small mail server that has slots, refuses when they are
// taken, waits for its peers and logs as Exim does, for machines without
// Exim. What it takes it throws away. Its answers and log lines are those of
// Exim 4.96.
type standIn struct {
	slots   int
	timeout time.Duration
	log     *eximLog
	// rename gives the address by which a peer is known in the log.
	rename func(netip.AddrPort) netip.AddrPort

	wg        sync.WaitGroup
	listeners []net.Listener

	mu     sync.Mutex
	taken  int
	conns  map[net.Conn]bool
	closed bool
}

func (w *World) startStandIn(o MTAOptions) (*MTA, error) {
	path := w.Path("mainlog")
	log, err := openEximLog(path, o.Selector)
	if err != nil {
		return nil, err
	}
	s := &standIn{slots: o.Slots, timeout: o.ReceiveTimeout, log: log, conns: map[net.Conn]bool{}}
	s.rename = func(a netip.AddrPort) netip.AddrPort { return a }
	places := []string{fmt.Sprintf("%s:%d", ServerV4, SMTPPort), fmt.Sprintf("[%s]:%d", ServerV6, SMTPPort)}
	if w.loopback {
		s.rename = func(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(LogName(a.Addr()), a.Port()) }
		places = []string{fmt.Sprintf("%s:0", loopbackServer)}
	}
	err = w.server.do(func() error {
		for _, place := range places {
			l, err := new(net.ListenConfig).Listen(context.Background(), "tcp", place)
			if err != nil {
				return err
			}
			s.listeners = append(s.listeners, l)
			w.port.Store(uint32(l.Addr().(*net.TCPAddr).Port))
		}
		return nil
	})
	if err != nil {
		s.stop()
		return nil, err
	}
	log.printf("exim 4.96 daemon started: pid=%d, no queue runs, listening for SMTP on port %d (IPv6 and IPv4)", os.Getpid(), SMTPPort)
	for _, l := range s.listeners {
		s.wg.Go(func() { s.accept(l) })
	}
	return &MTA{
		Kind: "standin", About: "a stand-in for Exim", Log: path, Slots: o.Slots,
		stop: sync.OnceFunc(s.stop),
	}, nil
}

func (s *standIn) stop() {
	for _, l := range s.listeners {
		l.Close()
	}
	s.mu.Lock()
	s.closed = true
	for c := range s.conns {
		conn{c}.abort()
	}
	s.mu.Unlock()
	s.wg.Wait()
	s.log.close()
}

// accept is the part of Exim's daemon: a slot, or a refusal.
func (s *standIn) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors, or the peer is gone already.
			time.Sleep(10 * time.Millisecond)
			continue
		}
		peer := s.rename(unmap(c.RemoteAddr().(*net.TCPAddr).AddrPort()))
		n, ok := s.take(c)
		if !ok {
			s.log.printf("Connection from %s refused: too many connections", s.log.host(peer))
			io.WriteString(c, "421 Too many concurrent SMTP connections; please try again later.\r\n")
			c.Close()
			continue
		}
		if s.log.connections {
			s.log.printf("SMTP connection from %s (TCP/IP connection count = %d)", s.log.host(peer), n)
		}
		s.wg.Go(func() {
			defer s.give(c)
			serve(c, peer, s.timeout, s.log)
		})
	}
}

// take takes a slot for c and returns how many are taken then.
func (s *standIn) take(c net.Conn) (int, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken >= s.slots || s.closed {
		return 0, false
	}
	s.taken++
	s.conns[c] = true
	return s.taken, true
}

func (s *standIn) give(c net.Conn) {
	c.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	delete(s.conns, c)
}

// session is one connection: what Exim's child does.
type session struct {
	c        net.Conn
	in       *bufio.Reader
	out      *bufio.Writer
	peer     netip.AddrPort
	log      *eximLog
	start    time.Time
	helo     string // as in the log: "" or "(NAME) "
	esmtp    bool
	mailFrom string
	inMail   bool // MAIL has been accepted
	rcpt     []string
	unknown  int
}

// Bounds on what a stranger can make the stand-in keep.
const (
	maxLine = 4096    // bytes of a command or of a line of a message
	maxMail = 1 << 20 // bytes of a message
	maxRcpt = 100     // recipients that are remembered; more are counted as taken
)

// serve speaks SMTP with a peer until the end, and logs it.
func serve(c net.Conn, peer netip.AddrPort, timeout time.Duration, log *eximLog) {
	s := &session{
		c: c, peer: peer, log: log, start: time.Now(),
		in:  bufio.NewReaderSize(patient{c, timeout}, maxLine),
		out: bufio.NewWriterSize(c, 4096),
	}
	s.say("220 %s ESMTP Exim 4.96 %s", hostName, s.start.Format("Mon, 02 Jan 2006 15:04:05 -0700"))
	for {
		line, err := s.readLine()
		if err != nil {
			s.lost(err)
			return
		}
		if !s.command(line) {
			s.out.Flush()
			return
		}
	}
}

// patient waits for each read, not for each line, as Exim does; it never
// gives up writing.
type patient struct {
	net.Conn
	timeout time.Duration
}

func (p patient) Read(b []byte) (int, error) {
	p.SetReadDeadline(time.Now().Add(p.timeout))
	return p.Conn.Read(b)
}

// say queues an answer.
func (s *session) say(format string, args ...any) {
	fmt.Fprintf(s.out, format+"\r\n", args...)
}

// readLine sends what is queued when the peer waits for it, and reads a
// line. A line that is too long comes cut.
func (s *session) readLine() (string, error) {
	if s.in.Buffered() == 0 {
		if err := s.out.Flush(); err != nil {
			return "", err
		}
	}
	line, err := s.in.ReadSlice('\n')
	text := strings.TrimRight(string(line), "\r\n")
	for errors.Is(err, bufio.ErrBufferFull) {
		_, err = s.in.ReadSlice('\n')
	}
	return text, err
}

// command obeys one command; it reports false when the connection is over.
func (s *session) command(line string) bool {
	verb, rest, _ := strings.Cut(line, " ")
	rest = strings.TrimSpace(rest)
	switch strings.ToUpper(verb) {
	case "EHLO", "HELO":
		s.hello(strings.ToUpper(verb), rest)
	case "MAIL":
		address, ok := path(rest, "FROM:")
		switch {
		case !ok:
			s.say("501 syntax error in MAIL command")
		case s.inMail:
			s.say("503 sender already given")
		default:
			s.inMail, s.mailFrom, s.rcpt = true, address, nil
			s.say("250 OK")
		}
	case "RCPT":
		s.recipient(rest)
	case "DATA":
		return s.data()
	case "RSET":
		s.reset()
		s.say("250 Reset OK")
	case "NOOP":
		s.say("250 OK")
	case "HELP":
		s.say("214-Commands supported:\r\n214 AUTH HELO EHLO MAIL RCPT DATA BDAT NOOP QUIT RSET HELP")
	case "VRFY":
		s.say("252 Administrative prohibition")
	case "QUIT":
		s.say("221 %s closing connection", hostName)
		s.out.Flush()
		s.end("closed by QUIT")
		return false
	default:
		if s.unknown++; s.unknown > 3 {
			s.say("500 Too many unrecognized commands")
			s.log.printf("SMTP call from %s dropped: too many unrecognized commands (last was \"%s\")", s.host(), printable(line))
			return false
		}
		s.say("500 unrecognized command")
	}
	return true
}

func (s *session) hello(verb, name string) {
	if !validHelo(name) {
		s.log.printf("rejected %s from %s: syntactically invalid argument(s): %s", verb, s.host(), printable(name))
		s.say("501 Syntactically invalid %s argument(s)", verb)
		return
	}
	s.reset()
	s.helo, s.esmtp = "("+name+") ", verb == "EHLO"
	ip := s.peer.Addr()
	if !s.esmtp {
		s.say("250 %s Hello %s [%s]", hostName, name, ip)
		return
	}
	s.say("250-%s Hello %s [%s]\r\n250-SIZE %d\r\n250-8BITMIME\r\n250-PIPELINING\r\n250 HELP", hostName, name, ip, maxMail)
}

func (s *session) recipient(rest string) {
	address, ok := path(rest, "TO:")
	switch {
	case !ok:
		s.say("501 syntax error in RCPT command")
	case !s.inMail:
		s.say("503 sender not yet given")
	case !strings.HasSuffix(strings.ToLower(address), "@"+mailDomain):
		s.log.printf("H=%s F=<%s> rejected RCPT <%s>: relay not permitted", s.host(), printable(s.mailFrom), printable(address))
		s.say("550 relay not permitted")
	default:
		if len(s.rcpt) < maxRcpt {
			s.rcpt = append(s.rcpt, printable(address))
		}
		s.say("250 Accepted")
	}
}

// data takes a message; it reports false when the connection is over.
func (s *session) data() bool {
	if !s.inMail || len(s.rcpt) == 0 {
		s.say("503 valid RCPT command must precede DATA")
		return true
	}
	s.say("354 Enter message, ending with \".\" on a line by itself")
	size, subject, header := 0, "", true
	for {
		line, err := s.readLine()
		if err != nil {
			if isTimeout(err) {
				s.log.printf("SMTP data timeout (message abandoned) on connection from %s F=<%s>", s.host(), printable(s.mailFrom))
				return false
			}
			where := ""
			switch {
			case header && size > 0:
				where = " (after header)"
			case header:
				where = " (header)"
			}
			s.log.printf("SMTP connection from %s lost while reading message data%s", s.host(), where)
			return false
		}
		if line == "." {
			break
		}
		size += len(line) + 2
		if line == "" {
			header = false
		}
		if name, value, ok := strings.Cut(line, ":"); header && ok && strings.EqualFold(name, "Subject") {
			subject = strings.TrimSpace(value)
		}
	}
	if size > maxMail {
		s.reset()
		s.say("552 message too big")
		return true
	}
	protocol := "smtp"
	if s.esmtp {
		protocol = "esmtp"
	}
	id := s.log.messageID(s.start)
	line := fmt.Sprintf("%s <= %s H=%s P=%s S=%d", id, orNull(s.mailFrom), s.host(), protocol, size)
	if s.log.subject && subject != "" {
		line += fmt.Sprintf(" T=\"%s\"", quoted(subject))
	}
	if s.log.recipients {
		line += " for " + strings.Join(s.rcpt, " ")
	}
	s.log.printf("%s", line)
	s.say("250 OK id=%s", id)
	for _, r := range s.rcpt {
		s.log.printf("%s => :blackhole: <%s> R=discard", id, r)
	}
	s.log.printf("%s Completed", id)
	s.reset()
	return true
}

func (s *session) reset() { s.inMail, s.mailFrom, s.rcpt = false, "", nil }

// lost logs the end of a connection that the peer did not end properly.
func (s *session) lost(err error) {
	cause := errorText(err)
	switch {
	case isTimeout(err):
		s.say("421 %s: SMTP command timeout - closing connection", hostName)
		s.out.Flush()
		s.log.printf("SMTP command timeout on connection from %s", s.host())
	case s.inMail:
		s.log.printf("unexpected disconnection while reading SMTP command from %s%s D=%s", s.host(), cause, eximDuration(time.Since(s.start)))
	default:
		s.end(fmt.Sprintf("lost%s D=%s", cause, eximDuration(time.Since(s.start))))
	}
}

// end logs what only +smtp_connection shows.
func (s *session) end(how string) {
	if s.log.connections {
		s.log.printf("SMTP connection from %s %s", s.host(), how)
	}
}

// host is the peer in a line of Exim's child.
func (s *session) host() string { return s.helo + s.log.host(s.peer) }

// path takes the address out of "FROM:<address> PARAMETERS".
func path(rest, keyword string) (string, bool) {
	if len(rest) < len(keyword) || !strings.EqualFold(rest[:len(keyword)], keyword) {
		return "", false
	}
	address, ok := strings.CutPrefix(strings.TrimSpace(rest[len(keyword):]), "<")
	if !ok {
		return "", false
	}
	address, _, ok = strings.Cut(address, ">")
	return address, ok && len(address) <= 320
}

// validHelo is Exim's default: a domain's characters, or a literal.
func validHelo(name string) bool {
	if name == "" || len(name) > 255 {
		return false
	}
	if inner, ok := strings.CutPrefix(name, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		_, err := netip.ParseAddr(strings.TrimPrefix(inner, "IPv6:"))
		return ok && err == nil
	}
	for _, b := range []byte(name) {
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '.' || b == '-') {
			return false
		}
	}
	return true
}

func isTimeout(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) }

// errorText is how Exim logs an error of read(2): with the C library's text.
func errorText(err error) string {
	for errno, text := range map[syscall.Errno]string{
		syscall.ECONNRESET:   "Connection reset by peer",
		syscall.ECONNABORTED: "Software caused connection abort",
		syscall.ETIMEDOUT:    "Connection timed out",
		syscall.EPIPE:        "Broken pipe",
	} {
		if errors.Is(err, errno) {
			return " (error: " + text + ")"
		}
	}
	return ""
}

func orNull(address string) string {
	if address == "" {
		return "<>"
	}
	return printable(address)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}

// LogName is the address by which the stand-in logs a peer in a world without
// namespaces: 10.66.1.2 for 127.66.1.2, since smtpguard never suspects
// loopback.
func LogName(a netip.Addr) netip.Addr {
	b := a.As4()
	if b[0] == 127 {
		b[0] = 10
	}
	return netip.AddrFrom4(b)
}
