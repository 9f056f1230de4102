package abuse

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/textproto"
	"strings"
	"time"
)

// message puts a mail together. approved says by whom: "" for a draft,
// automatic for the program itself.
func (d *Desk) message(c *Case, m *Mail, text string, approvedBy string, automatic bool, now time.Time) ([]byte, error) {
	sentence := signedMark
	if approvedBy != "" {
		sentence = signed(!automatic)
	}
	text = rewrap(text, sentence)
	if err := checkText(text); err != nil {
		return nil, err
	}
	x, xerr := d.xarf(c, m)
	format := m.container()

	var h, body bytes.Buffer
	head := func(name, value string) { h.WriteString(name + ": " + fold(len(name)+2, value) + "\r\n") }
	head("From", d.fromHeader())
	if m.Return != "" {
		head("Reply-To", m.Return)
	}
	if m.To.Address != "" {
		head("To", m.To.Address)
	}
	if m.Cc.Address != "" {
		head("Cc", m.Cc.Address)
	}
	head("Subject", clean(m.Subject, 119))
	head("Date", now.UTC().Format("Mon, 02 Jan 2006 15:04:05 +0000"))
	head("Message-ID", "<"+m.MessageID+">")
	if m.InReplyTo != "" {
		head("In-Reply-To", "<"+m.InReplyTo+">")
		head("References", "<"+strings.Join(m.References, "> <")+">")
	}
	if automatic {
		head("Auto-Submitted", "auto-generated")
	}
	if format == XARF02 {
		head("X-XARF", "PLAIN")
	}
	head("MIME-Version", "1.0")

	if format == Text {
		head("Content-Type", "text/plain; charset=us-ascii")
		head("Content-Transfer-Encoding", "7bit")
		body.WriteString(crlf(text))
		return append(append(h.Bytes(), "\r\n"...), body.Bytes()...), nil
	}

	w := multipart.NewWriter(&body)
	if err := w.SetBoundary("=_smtpguard_" + strings.ReplaceAll(m.ReportID, "-", "")); err != nil {
		return nil, err
	}
	part := func(ctype, name, encoding string, content []byte) error {
		ph := textproto.MIMEHeader{}
		if name != "" {
			ctype += `; name="` + name + `"`
			ph.Set("Content-Disposition", `attachment; filename="`+name+`"`)
		}
		ph.Set("Content-Type", ctype)
		if encoding != "" {
			ph.Set("Content-Transfer-Encoding", encoding)
		}
		pw, err := w.CreatePart(ph)
		if err != nil {
			return err
		}
		switch encoding {
		case "quoted-printable":
			q := quotedprintable.NewWriter(pw)
			if _, err = q.Write([]byte(crlf(string(content)))); err == nil {
				err = q.Close()
			}
		case "base64":
			err = base64Lines(pw, content)
		default:
			_, err = io.WriteString(pw, crlf(string(content)))
		}
		return err
	}
	parts := []func() error{func() error { return part("text/plain; charset=us-ascii", "", "7bit", []byte(text)) }}
	evidencePart := func() error {
		if len(m.Facts.Excerpt) == 0 {
			return nil
		}
		return part("text/plain; charset=us-ascii", "evidence.txt", "quoted-printable", []byte(evidenceText(&m.Facts)))
	}
	csvPart := func() error {
		return part("text/csv; charset=us-ascii; header=present", "sources.csv", "quoted-printable", []byte(csvText(c, &m.Facts)))
	}
	xarfPart := func() error {
		if xerr != nil {
			return nil
		}
		return part("application/json", "xarf.json", "base64", x)
	}
	switch format {
	case XARF:
		head("Content-Type", `multipart/report; report-type=feedback-report; boundary="`+w.Boundary()+`"`)
		feedback := "Feedback-Type: xarf\nUser-Agent: smtpguard/" + clean(d.version, 40) + "\nVersion: 1\n"
		parts = append(parts, func() error { return part("message/feedback-report", "", "7bit", []byte(feedback)) }, xarfPart)
	case XARF02:
		head("Content-Type", `multipart/mixed; boundary="`+w.Boundary()+`"`)
		parts = append(parts, func() error {
			return part("text/plain; charset=utf-8", "report.txt", "7bit", []byte(d.xarf02(c, m, now)))
		}, evidencePart, csvPart)
	default:
		head("Content-Type", `multipart/mixed; boundary="`+w.Boundary()+`"`)
		parts = append(parts, evidencePart, csvPart, xarfPart)
	}
	for _, p := range parts {
		if err := p(); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	h.WriteString("\r\n")
	return append(h.Bytes(), body.Bytes()...), nil
}

// xarf02 is the YAML of X-ARF 0.2 (https://github.com/xarf/xarf-specification).
// It has no schema for a flood of connections, and says so.
func (d *Desk) xarf02(c *Case, m *Mail, now time.Time) string {
	a, _ := d.config.sender()
	from := "unknown"
	if a != nil {
		from = a.Address
	}
	p := reported(c)
	kind := "ipv4"
	if p.Addr().Is6() {
		kind = "ipv6"
	}
	source := p.Addr().String()
	if len(m.Facts.Sources) > 0 && m.Facts.Sources[0].Prefix.IsSingleIP() {
		source = m.Facts.Sources[0].Prefix.Addr().String()
	}
	date := m.Facts.First
	if date.IsZero() {
		date = now
	}
	var b strings.Builder
	line := func(k, v string) { fmt.Fprintf(&b, "%s: %s\n", k, v) }
	b.WriteString("---\n")
	line("Reported-From", from)
	line("Category", "abuse")
	line("Report-Type", "connection-flood")
	line("User-Agent", "smtpguard/"+clean(d.version, 40))
	line("Report-ID", m.MessageID)
	line("Date", rfc3339(date))
	line("Source", source)
	line("Source-Type", kind)
	line("Attachment", "text/plain")
	line("Schema-URL", "none")
	line("Version", "0.2")
	line("Occurrences", fmt.Sprint(m.Facts.Connections))
	return b.String()
}

func (d *Desk) fromHeader() string {
	a, err := d.config.sender()
	if err != nil {
		return "smtpguard <not-set@invalid.example>"
	}
	return a.String()
}

// fold breaks a header value at blanks, so that lines stay short. at is where
// the value begins on its line.
func fold(at int, s string) string {
	var b strings.Builder
	n := at
	for i, w := range strings.Split(mime.QEncoding.Encode("us-ascii", clean(s, 2000)), " ") {
		if i > 0 {
			if n+1+len(w) > width {
				b.WriteString("\r\n ")
				n = 1
			} else {
				b.WriteByte(' ')
				n++
			}
		}
		b.WriteString(w)
		n += len(w)
	}
	return b.String()
}

func crlf(s string) string {
	s = strings.ReplaceAll(s, "\r\n", "\n")
	if s != "" && !strings.HasSuffix(s, "\n") {
		s += "\n"
	}
	return strings.ReplaceAll(s, "\n", "\r\n")
}

func base64Lines(w io.Writer, content []byte) error {
	s := base64.StdEncoding.EncodeToString(content)
	for len(s) > 0 {
		n := min(len(s), width)
		if _, err := io.WriteString(w, s[:n]+"\r\n"); err != nil {
			return err
		}
		s = s[n:]
	}
	return nil
}

// rewrap puts the sentence that says who checked the report into the text.
// Its paragraph is folded anew; it is only looked for in the last one.
func rewrap(text, sentence string) string {
	i := strings.LastIndex(text, "\n\n")
	if i < 0 || !strings.Contains(strings.Join(strings.Fields(text[i:]), " "), signedMark) {
		return text
	}
	last := strings.Join(strings.Fields(text[i:]), " ")
	return text[:i+2] + wrap(strings.Replace(last, signedMark, sentence, 1), "", "")
}

// Bounds of a text that a person edited.
const (
	maxText     = 64 << 10
	maxTextLine = 78
)

// checkText refuses what a text part must not hold.
func checkText(text string) error {
	if len(text) > maxText {
		return fmt.Errorf("the text has %d bytes; at most %d are sent", len(text), maxText)
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimRight(line, "\r\n")
		if len(line) > maxTextLine {
			return fmt.Errorf("line %d of the text has %d characters; at most %d are readable everywhere", n, len(line), maxTextLine)
		}
		for i := range len(line) {
			if line[i] < ' ' || line[i] > '~' {
				return fmt.Errorf("line %d of the text has a character that is not plain ASCII", n)
			}
		}
	}
	return nil
}

// newUUID is a random UUID of version 4.
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
