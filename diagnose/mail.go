package diagnose

import (
	"bytes"
	"encoding/base64"
	"html"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"regexp"
	"strings"
	"time"
)

const (
	maxMail  = 1 << 20 // bytes of a mail that are looked at
	maxParts = 20
	maxDepth = 4
)

// mails reads one mail or many (mbox), or the text of one that somebody has
// pasted, and takes those of cPanel's monitor that are about Exim:
//
//	Subject: exim on HOST status: failed       (old; the body has the time)
//	exim failed @ Tue Mar 13 13:21:32 2012. A restart was attempted automagically.
//
//	The service “exim-26,465,587” appears to be down.   (new)
type mails struct {
	zone *time.Location
	done func(check)

	buf  []byte
	over bool
}

func (m *mails) line(line []byte) {
	if bytes.HasPrefix(line, []byte("From ")) && (len(m.buf) == 0 || bytes.HasSuffix(m.buf, []byte("\n\n"))) {
		m.end()
		return
	}
	if len(m.buf)+len(line) >= maxMail {
		m.over = true
		return
	}
	m.buf = append(append(m.buf, bytes.TrimRight(line, "\r")...), '\n')
}

// end takes the mail that was gathered.
func (m *mails) end() {
	raw := m.buf
	m.buf, m.over = m.buf[:0], false
	if len(raw) == 0 {
		return
	}
	c := check{why: unsaid}
	body := raw
	if msg, err := mail.ReadMessage(bytes.NewReader(raw)); err == nil && len(msg.Header) > 0 {
		c.at, _ = msg.Header.Date()
		subject := msg.Header.Get("Subject")
		if s, err := new(mime.WordDecoder).DecodeHeader(subject); err == nil {
			subject = s
		}
		words := words{}
		words.add(msg.Header.Get("Content-Type"), msg.Header.Get("Content-Transfer-Encoding"), msg.Body, 0)
		body = append([]byte(subject+"\n"), words.text...)
	}
	found := false
	for line := range bytes.SplitSeq(body, []byte("\n")) {
		line = bytes.TrimRight(line, "\r")
		if name, ok := failedService(line); ok {
			if !found {
				c.service = name
				c.lines = append(c.lines, show(line))
			}
			found = true
		}
		if at, ok := failedAt(line, m.zone); ok {
			c.at, found = at, true
			c.restart = c.restart || bytes.Contains(line, []byte("A restart was attempted"))
		}
		c.add(line)
	}
	if found {
		m.done(c)
	}
}

var (
	// The quotation marks are “ and ”, or what some mailer made of them.
	downSentence = regexp.MustCompile(`The service \W{0,8}(exim(?:-[0-9]+(?:,[0-9]+)*)?)\W{0,8} appears to be down`)
	oldSubject   = regexp.MustCompile(`^(?:\[?[\w.-]+\]? )?(exim(?:-[0-9]+(?:,[0-9]+)*)?) on [\w.-]+ status: failed`)
	oldBody      = regexp.MustCompile(`^\s*exim failed @ [A-Z][a-z]{2} ([A-Z][a-z]{2}) +([0-9]{1,2}) ([0-9:]{8}) ([0-9]{4})`)
)

// failedService returns which service a sentence or subject says is down.
func failedService(line []byte) (string, bool) {
	if !bytes.Contains(line, []byte("exim")) || len(line) > 2000 {
		return "", false
	}
	for _, re := range []*regexp.Regexp{downSentence, oldSubject} {
		if g := re.FindSubmatch(line); g != nil {
			return string(g[1]), true
		}
	}
	return "", false
}

// failedAt reads the time in the old body, which has no zone.
func failedAt(line []byte, zone *time.Location) (time.Time, bool) {
	g := oldBody.FindSubmatch(line[:min(len(line), 200)])
	if g == nil {
		return time.Time{}, false
	}
	at, err := time.ParseInLocation("Jan 2 15:04:05 2006", string(g[1])+" "+string(g[2])+" "+string(g[3])+" "+string(g[4]), zone)
	return at, err == nil
}

// words gathers the text of a mail's parts.
type words struct {
	text  []byte
	parts int
}

var tag = regexp.MustCompile(`<[^<>]{0,1000}>`)

func (w *words) add(contentType, encoding string, body io.Reader, depth int) {
	if w.parts++; w.parts > maxParts || depth > maxDepth {
		return
	}
	kind, params, err := mime.ParseMediaType(contentType)
	if err != nil {
		kind = "text/plain"
	}
	if strings.HasPrefix(kind, "multipart/") && params["boundary"] != "" {
		mr := multipart.NewReader(body, params["boundary"])
		for {
			p, err := mr.NextRawPart()
			if err != nil || w.parts > maxParts {
				return
			}
			w.add(p.Header.Get("Content-Type"), p.Header.Get("Content-Transfer-Encoding"), p, depth+1)
		}
	}
	if !strings.HasPrefix(kind, "text/") {
		return
	}
	switch strings.ToLower(strings.TrimSpace(encoding)) {
	case "quoted-printable":
		body = quotedprintable.NewReader(body)
	case "base64":
		body = base64.NewDecoder(base64.StdEncoding, body)
	}
	b, _ := io.ReadAll(io.LimitReader(body, maxMail)) // what came before a fault counts
	if kind == "text/html" {
		b = []byte(html.UnescapeString(string(tag.ReplaceAll(b, []byte(" ")))))
	}
	if len(w.text)+len(b) < 2*maxMail {
		w.text = append(append(w.text, '\n'), b...)
	}
}
