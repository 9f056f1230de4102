package abuse

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"net/textproto"
	"regexp"
	"strings"
	"time"
)

// Received is what one mail to the reports' mailbox was.
type Received struct {
	// Report is the case that it belongs to; empty: none was found.
	Report string `json:"report,omitempty"`
	// What became of it: a State, or "" if nothing changed.
	What   State  `json:"what,omitempty"`
	Ticket string `json:"ticket,omitempty"`
	// Next is the contact proposed after a bounce.
	Next    string `json:"next,omitempty"`
	Subject string `json:"subject,omitempty"`
	Why     string `json:"why,omitempty"`
}

// Bounds of what is read of a mailbox.
const (
	maxReceived = 2 << 20 // of one mail; the rest is not looked at
	maxMails    = 10_000
	maxParts    = 50
	badFor      = 30 * 24 * time.Hour
)

// Receive reads one mail, or a mailbox in mbox form, and notes what it says
// about reports: bounced, delayed, delivered, acknowledged, answered. Nothing
// is ever sent in return. A mail that belongs to no report, or that cannot be
// read, is in the result and no error.
func (d *Desk) Receive(r io.Reader, by string) ([]Received, error) {
	var all []Received
	err := SplitMbox(r, func(msg []byte) error {
		got, err := d.receive(msg, by)
		all = append(all, got)
		return err
	})
	return all, err
}

// SplitMbox hands out the mails of a mailbox in mbox form, or the one mail,
// each valid until fn returns and cut at 2 MiB.
func SplitMbox(r io.Reader, fn func([]byte) error) error {
	br := bufio.NewReaderSize(r, 64<<10)
	var msg bytes.Buffer
	n := 0
	flush := func() error {
		if len(bytes.TrimSpace(msg.Bytes())) == 0 {
			return nil
		}
		defer msg.Reset()
		if n++; n > maxMails {
			return fmt.Errorf("the mailbox has more than %d mails; the rest was not read", maxMails)
		}
		return fn(msg.Bytes())
	}
	first, blank := true, true
	mbox := false
	for {
		line, err := br.ReadSlice('\n')
		begin := blank && bytes.HasPrefix(line, []byte("From "))
		if first {
			mbox, first = begin, false
		}
		if mbox && begin {
			if err := flush(); err != nil {
				return err
			}
		} else if msg.Len() < maxReceived {
			msg.Write(line)
		}
		blank = len(bytes.TrimRight(line, "\r\n")) == 0 && len(line) > 0
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			blank = false
		case err == io.EOF:
			return flush()
		case err != nil:
			return err
		}
	}
}

// notice is what a mail says, before it is known to which case.
type notice struct {
	subject   string
	automatic bool
	action    string // of a delivery notice: failed, delayed, delivered
	status    string // 5.1.1
	rcpt      string // whom it is about
	diag      string
	ids       []string // Message-IDs that it refers to
	to        []string // where it was sent to
	from      string
}

func (d *Desk) receive(msg []byte, by string) (Received, error) {
	n, err := readNotice(msg)
	if err != nil {
		return Received{Why: "it is no mail: " + clean(err.Error(), 100)}, nil
	}
	got := Received{Subject: clean(n.subject, 120)}
	d.mu.Lock()
	defer d.mu.Unlock()
	now, m := d.match(n)
	if now == nil {
		got.Why = "it refers to no report"
		return got, nil
	}
	got.Report = now.ID
	if now.State == Queued || m == nil || m.SentAt.IsZero() && now.State != Doubtful {
		got.Why = "that report was not sent"
		return got, nil
	}
	c := now.clone()
	newest := m.MessageID == now.mail().MessageID
	ticket := n.ticketIn(c.ID)
	switch {
	case n.action == "failed" && strings.HasPrefix(n.status, "5"):
		if n.rcpt != "" && strings.EqualFold(n.rcpt, m.Cc.Address) {
			c.note(fmt.Sprintf("the copy to %s bounced: %s", n.rcpt, n.diag))
			break
		}
		if err := d.o.Store.SetRecord(kindBad, m.To.Address, []byte(d.now().Add(badFor).UTC().Format(time.RFC3339))); err != nil {
			return got, err
		}
		c.note(fmt.Sprintf("%s bounced (%s): %s", m.To.Address, n.status, n.diag))
		if newest && !c.State.over() {
			c.Why = "bounced: " + n.diag
			got.Next = d.next(c).Address
			if got.Next != "" {
				c.Why += "; next contact: " + got.Next
			}
			got.What = Bounced
		}
	case n.action == "failed" || n.action == "delayed":
		c.note(fmt.Sprintf("delayed (%s): %s", n.status, n.diag))
		if newest && (c.State == Sent || c.State == Doubtful) {
			got.What = Deferred
		}
	case n.action == "delivered" || n.action == "relayed" || n.action == "expanded":
		c.note("delivered, says " + n.from)
		if newest && (c.State == Sent || c.State == Deferred || c.State == Doubtful) {
			got.What = Delivered
		}
	case n.action != "":
		got.Why = "a notice of an unknown kind"
		return got, nil
	default:
		if ticket != "" && c.Ticket == "" {
			c.Ticket = ticket
			got.Ticket = ticket
		}
		c.note("mail from " + n.from + ": " + n.subject)
		switch {
		case c.State.over() || c.State == Answered:
		case n.automatic || ticket != "":
			if c.State != Acknowledged {
				got.What = Acknowledged
			}
		default:
			got.What = Answered
		}
	}
	if got.What != "" && !c.State.out() { // another mail of the case is in preparation
		got.What = ""
	}
	if got.What != "" {
		c.move(got.What, by, strings.TrimSpace(n.subject+" "+n.diag), d.now())
	}
	if err := d.save(c); err != nil {
		return got, err
	}
	*now = *c
	return got, nil
}

// match finds the case of a mail by its token, by the Message-IDs it refers
// to, or by the number in its subject, in this order. d.mu is held.
func (d *Desk) match(n notice) (*Case, *Mail) {
	lower := strings.ToLower(strings.Join(n.to, " "))
	for _, c := range d.cases {
		if strings.Contains(lower, c.Token) {
			for i := range c.Mails {
				for _, id := range n.ids {
					if c.Mails[i].MessageID == id {
						return c, &c.Mails[i]
					}
				}
			}
			return c, c.mail()
		}
	}
	for _, c := range d.cases {
		for i := range c.Mails {
			for _, id := range n.ids {
				if c.Mails[i].MessageID == id {
					return c, &c.Mails[i]
				}
			}
		}
	}
	if n.action == "" { // the number is known to many; it can make nothing bounce
		for _, c := range d.cases {
			if strings.Contains(n.subject, "["+c.ID+"]") {
				return c, c.mail()
			}
		}
	}
	return nil, nil
}

// readNotice reads a mail as far as it matters: headers, and of a delivery
// notice (RFC 3464) its machine-readable part and the returned headers.
func readNotice(msg []byte) (n notice, err error) {
	m, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		return n, err
	}
	h := m.Header
	dec := mime.WordDecoder{CharsetReader: func(string, io.Reader) (io.Reader, error) { return nil, errors.New("unknown charset") }}
	if n.subject, err = dec.DecodeHeader(h.Get("Subject")); err != nil {
		n.subject = h.Get("Subject")
	}
	n.subject = clean(n.subject, 200)
	n.from = clean(h.Get("From"), 100)
	if auto := strings.ToLower(h.Get("Auto-Submitted")); auto != "" && auto != "no" || h.Get("X-Autoreply") != "" || strings.EqualFold(h.Get("Precedence"), "auto_reply") {
		n.automatic = true
	}
	for _, name := range []string{"To", "Cc", "Delivered-To", "Envelope-To", "X-Original-To"} {
		n.to = append(n.to, h[textproto.CanonicalMIMEHeaderKey(name)]...)
	}
	n.refer(h.Get("In-Reply-To"))
	n.refer(h.Get("References"))

	ctype, params, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err == nil && ctype == "multipart/report" && strings.EqualFold(params["report-type"], "delivery-status") {
		n.report(multipart.NewReader(m.Body, params["boundary"]))
	} else if failed := h.Get("X-Failed-Recipients"); failed != "" { // Exim's own form
		n.action, n.status, n.diag = "failed", "5.0.0", "X-Failed-Recipients"
		n.rcpt, _ = CheckAddress(strings.Split(failed, ",")[0])
		body, _ := io.ReadAll(io.LimitReader(m.Body, maxReceived))
		for _, id := range messageID.FindAllSubmatch(body, 20) {
			n.refer(string(id[1]))
		}
	}
	return n, nil
}

var (
	messageID = regexp.MustCompile(`(?mi)^Message-ID:\s*(<[^<>\s]{3,300}>)`)
	angle     = regexp.MustCompile(`<([^<>\s]{3,300})>`)
)

// refer notes the Message-IDs in a header value.
func (n *notice) refer(s string) {
	for _, m := range angle.FindAllStringSubmatch(s, 50) {
		if len(n.ids) < 100 {
			n.ids = append(n.ids, m[1])
		}
	}
}

// report reads the parts of a delivery notice.
func (n *notice) report(mr *multipart.Reader) {
	n.action = "unknown"
	for range maxParts {
		p, err := mr.NextPart()
		if err != nil {
			return
		}
		body, err := io.ReadAll(io.LimitReader(p, maxReceived))
		if err != nil {
			return
		}
		ctype, _, _ := mime.ParseMediaType(p.Header.Get("Content-Type"))
		switch ctype {
		case "message/delivery-status", "message/global-delivery-status":
			n.deliveryStatus(body)
		case "message/rfc822", "text/rfc822-headers", "message/global", "message/rfc822-headers":
			for _, id := range messageID.FindAllSubmatch(body[:min(len(body), 64<<10)], 20) {
				n.refer(string(id[1]))
			}
		}
	}
}

// deliveryStatus reads the groups of fields of RFC 3464. Where they are on
// several recipients, a failure counts before a delay, and that before the
// rest.
func (n *notice) deliveryStatus(body []byte) {
	weight := map[string]int{"failed": 4, "delayed": 3, "delivered": 2, "relayed": 2, "expanded": 2}
	r := textproto.NewReader(bufio.NewReader(bytes.NewReader(body)))
	for range 100 {
		h, err := r.ReadMIMEHeader()
		action := strings.ToLower(clean(h.Get("Action"), 20))
		if weight[action] > weight[n.action] {
			n.action = action
			n.status = clean(h.Get("Status"), 20)
			_, diag, ok := strings.Cut(h.Get("Diagnostic-Code"), ";")
			if !ok {
				diag = h.Get("Diagnostic-Code")
			}
			n.diag = clean(diag, 200)
			_, rcpt, _ := strings.Cut(h.Get("Original-Recipient"), ";")
			if rcpt == "" {
				_, rcpt, _ = strings.Cut(h.Get("Final-Recipient"), ";")
			}
			n.rcpt, _ = CheckAddress(rcpt)
		}
		if err != nil {
			return
		}
	}
}

var (
	ticketWord = regexp.MustCompile(`(?i)\b(?:ticket|case|reference|ref|abuse[ -]?id|incident|request)\b[ #:.\-]*([A-Z0-9][A-Z0-9:\-]{2,30})`)
	ticketMark = regexp.MustCompile(`[\[#]#?([A-Z]{0,6}[-#:]?[0-9][0-9A-Z\-]{3,29})\]?`)
)

// ticketIn finds the desk's number in the subject, which is not ours.
func (n *notice) ticketIn(own string) string {
	s := strings.ReplaceAll(n.subject, "["+own+"]", " ")
	s = strings.ReplaceAll(s, own, " ")
	for _, m := range ticketWord.FindAllStringSubmatch(s, 5) {
		if t := strings.TrimRight(m[1], ":-"); strings.ContainsAny(t, "0123456789") {
			return t
		}
	}
	if m := ticketMark.FindStringSubmatch(s); m != nil {
		return m[1]
	}
	return ""
}
