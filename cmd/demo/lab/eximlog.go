package lab

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// eximLog writes a main log as Exim does.
type eximLog struct {
	connections bool // +smtp_connection: lines for the beginning and end of connections
	ports       bool // +incoming_port
	subject     bool // +subject
	recipients  bool // +received_recipients

	mu  sync.Mutex
	f   *os.File
	ids uint64
}

func openEximLog(path, selector string) (*eximLog, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	if err != nil {
		return nil, err
	}
	on := func(name string) bool {
		for s := range strings.FieldsSeq(selector) {
			if s == "+"+name || s == "+all" {
				return true
			}
		}
		return false
	}
	return &eximLog{
		f: f, connections: on("smtp_connection"), ports: on("incoming_port"),
		subject: on("subject"), recipients: on("received_recipients"),
	}, nil
}

func (l *eximLog) printf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.f == nil {
		return
	}
	// One write a line: readers never see a part of one.
	fmt.Fprintf(l.f, "%s %s\n", time.Now().Format(time.DateTime), fmt.Sprintf(format, args...))
}

func (l *eximLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.f.Close()
	l.f = nil
}

// host is a peer without a name.
func (l *eximLog) host(a netip.AddrPort) string {
	if !l.ports {
		return "[" + a.Addr().String() + "]"
	}
	return fmt.Sprintf("[%s]:%d", a.Addr(), a.Port())
}

// messageID makes an id in the form of Exim up to 4.96: time, process and
// fraction, each in base 62.
func (l *eximLog) messageID(t time.Time) string {
	l.mu.Lock()
	l.ids++
	n := l.ids
	l.mu.Unlock()
	return base62(uint64(t.Unix()), 6) + "-" + base62(n, 6) + "-" + base62(uint64(t.Nanosecond()/int(time.Millisecond)), 2)
}

func base62(n uint64, width int) string {
	const digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	b := make([]byte, width)
	for i := width - 1; i >= 0; i-- {
		b[i] = digits[n%62]
		n /= 62
	}
	return string(b)
}

// eximDuration is a time as in D=: 5s, 1m5s, 1h; parts that are 0 are left
// out.
func eximDuration(d time.Duration) string {
	sec := int(d.Seconds())
	if sec == 0 {
		return "0s"
	}
	var b strings.Builder
	for _, u := range []struct {
		sec  int
		name string
	}{{7 * 86400, "w"}, {86400, "d"}, {3600, "h"}, {60, "m"}, {1, "s"}} {
		if n := sec / u.sec; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			sec %= u.sec
		}
	}
	return b.String()
}

// printable escapes what is not printable as Exim's string_printing does.
func printable(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		switch {
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\t':
			b.WriteString(`\t`)
		case c == '\\':
			b.WriteString(`\\`)
		case c < ' ' || c > '~':
			fmt.Fprintf(&b, `\%03o`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// quoted is the text of a subject in T="...": cut at 100 characters, with
// quotes and backslashes escaped.
func quoted(s string) string {
	if len(s) > 100 {
		s = s[:100]
	}
	return strings.ReplaceAll(printable(s), `"`, `\"`)
}
