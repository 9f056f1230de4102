package abuse

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"net/textproto"
	"regexp"
	"slices"
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
	maxGroups   = 50      // recipients in one delivery notice
	maxHeard    = 300     // mails that a case remembers to have read
	maxParts    = 50
	maxTickets  = 4 // numbers of desks that a case remembers
	ticketSep   = ", "
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
	flush := func() error {
		if len(bytes.TrimSpace(msg.Bytes())) == 0 {
			return nil
		}
		defer msg.Reset()
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
	report    bool     // it is a delivery notice
	groups    []group  // what it says of each recipient
	ids       []string // Message-IDs that it refers to
	to        []string // where it was sent to
	from      string
	sender    string    // its address; empty: it is none that we write to
	trial     bool      // a copy that a person made us send
	date      time.Time // zero: it has none
	hash      string    // the same for the same mail, however a mailbox keeps it
}

// group is what a delivery notice says of one recipient.
type group struct {
	action string // failed, delayed, delivered
	status string // 5.1.1
	rcpt   string // whom it is about; empty: not said
	diag   string
}

// outcome is what it comes to: Bounced, Deferred, Delivered, or "" if it is
// none of these.
func (g group) outcome() State {
	switch {
	case g.action == "failed" && strings.HasPrefix(g.status, "5"):
		return Bounced
	case g.action == "failed" || g.action == "delayed":
		return Deferred
	case g.action == "delivered" || g.action == "relayed" || g.action == "expanded":
		return Delivered
	}
	return ""
}

// about picks what a delivery notice says of the recipient of a mail, and of
// who got the copy. What it says of others, to whom a mail was passed on, counts
// for the recipient where nothing is said of that one, and where no copy was
// sent whose it could be: it has bounced only if it did for all of them.
func (n *notice) about(m *Mail) (to, cc, passedOn group) {
	rank := map[State]int{Bounced: 1, Deferred: 2, Delivered: 3}
	named := false
	for _, g := range n.groups {
		switch {
		case sameAddr(g.rcpt, m.To.Address):
			to, named = g, true
		case sameAddr(g.rcpt, m.Cc.Address):
			cc = g
		case rank[g.outcome()] > rank[passedOn.outcome()]:
			passedOn = g
		}
	}
	if !named && m.Cc.Address == "" {
		to, passedOn = passedOn, group{}
	}
	return to, cc, passedOn
}

func (d *Desk) receive(msg []byte, by string) (Received, error) {
	n, err := readNotice(msg)
	if err != nil {
		return Received{Why: "it is no mail: " + clean(err.Error(), 100)}, nil
	}
	got := Received{Subject: clean(n.subject, 120)}
	d.mu.Lock()
	defer d.mu.Unlock()
	if own, err := d.config.sender(); n.trial || err == nil && !n.report && sameAddr(n.sender, own.Address) {
		got.Why = "it is our own mail"
		return got, nil
	}
	now, m, token := d.match(n)
	if now == nil {
		got.Why = "it refers to no report"
		return got, nil
	}
	got.Report = now.ID
	under := now.State == Queued && m == now.mail() // it is being handed over, and has arrived somewhere already
	if m == nil || m.SentAt.IsZero() && now.State != Doubtful && !under {
		got.Why = "that report was not sent"
		return got, nil
	}
	if slices.Contains(now.Heard, n.hash) {
		got.Why = "it was read before"
		return got, nil
	}
	c := now.clone()
	if len(c.Heard) >= maxHeard {
		c.Heard = slices.Delete(c.Heard, 0, 1)
	}
	c.Heard = append(c.Heard, n.hash)
	newest := m.MessageID == now.mail().MessageID
	ticket := n.ticketIn(c.ID)
	why := ""
	if n.report {
		to, cc, passedOn := n.about(m)
		if to.outcome() == "" && cc.outcome() == "" && passedOn.outcome() == "" {
			got.Why = "a notice of an unknown kind"
			return got, nil
		}
		// Desks show a report to their customers, who can write a notice about
		// it. A true one comes to the return path, with the token, and not when
		// somebody has answered.
		believed := (token || !strings.Contains(m.Return, c.Token)) && !(newest && (c.State == Acknowledged || c.State == Answered))
		// A notice is as old as it is, whenever it is read.
		at := n.date
		if at.IsZero() || at.After(d.now()) || at.Before(m.SentAt) {
			at = d.now()
		}
		bounced := func(addr string) error {
			if !believed {
				c.note("the next notice is doubtful: it did not come to the return path, or after an answer")
				return nil
			}
			if until := at.Add(badFor); until.After(d.now()) {
				return d.o.Store.SetRecord(kindBad, addrKey(addr), []byte(until.UTC().Format(time.RFC3339)))
			}
			return nil
		}
		switch cc.outcome() {
		case Bounced:
			if err := bounced(m.Cc.Address); err != nil {
				return got, err
			}
			c.note(fmt.Sprintf("the copy to %s bounced: %s", m.Cc.Address, cc.diag))
		case Deferred:
			c.note(fmt.Sprintf("the copy to %s is delayed (%s): %s", m.Cc.Address, cc.status, cc.diag))
		case Delivered:
			c.note("the copy to " + m.Cc.Address + " is delivered, says " + n.from)
		}
		switch to.outcome() {
		case Bounced:
			if err := bounced(m.To.Address); err != nil {
				return got, err
			}
			c.note(fmt.Sprintf("%s bounced (%s): %s", m.To.Address, to.status, to.diag))
			if believed && newest && !c.State.over() {
				c.Why = "bounced: " + to.diag
				if got.Next = d.next(c).Address; got.Next != "" {
					c.Why += "; next contact: " + got.Next
				}
				got.What = Bounced
			}
		case Deferred:
			c.note(fmt.Sprintf("delayed (%s): %s", to.status, to.diag))
			if newest && (c.State == Sent || c.State == Doubtful || under) {
				got.What = Deferred
			}
		case Delivered:
			c.note("delivered, says " + n.from)
			if newest && (c.State == Sent || c.State == Deferred || c.State == Doubtful || under) {
				got.What = Delivered
			}
		}
		if passedOn.outcome() != "" {
			c.note(fmt.Sprintf("%s (%s) for %s, to whom it was passed on: %s", passedOn.action, passedOn.status, passedOn.rcpt, passedOn.diag))
		}
		why = to.diag
	} else {
		if known := strings.Split(c.Ticket, ticketSep); ticket != "" && !slices.Contains(known, ticket) && len(known) < maxTickets {
			if got.Ticket = ticket; c.Ticket != "" { // the copy's desk has a number of its own
				ticket = c.Ticket + ticketSep + ticket
			}
			c.Ticket = ticket
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
	switch note := strings.TrimSpace(n.subject + " " + why); {
	case got.What == "":
	case under: // see arrived
		if earlier(c.Early) < earlier(got.What) {
			c.Early, c.EarlyNote = got.What, clean(note, 300)
		}
	default:
		c.move(got.What, by, note, d.now())
	}
	if err := d.save(c); err != nil {
		return got, err
	}
	*now = *c
	return got, nil
}

// earlier orders what notices say of a mail while it is being handed over: a
// bounce counts more than a delay or a delivery.
func earlier(s State) int {
	return slices.Index([]State{Delivered, Deferred, Acknowledged, Answered, Bounced}, s)
}

// arrived moves a case on to what a notice said while its mail was being
// handed over: whatever the mail server answered, the mail has left.
func (c *Case) arrived(now time.Time) {
	to, note := c.Early, c.EarlyNote
	c.Early, c.EarlyNote = "", ""
	if to == "" || c.State != Sent && c.State != Doubtful {
		return
	}
	m := c.mail()
	if m.SentAt.IsZero() {
		m.SentAt = now
	}
	why := ""
	if to == Bounced {
		why = "bounced: " + note
	}
	c.Why = why
	c.move(to, Self, note, now)
}

// match finds the case of a mail by its token, by the Message-IDs it refers
// to, or by the number in its subject, in this order, and says whether it was
// the token. d.mu is held.
func (d *Desk) match(n notice) (c *Case, m *Mail, token bool) {
	lower := strings.ToLower(strings.Join(n.to, " "))
	for _, c := range d.cases {
		if strings.Contains(lower, c.Token) {
			for i := range c.Mails {
				for _, id := range n.ids {
					if c.Mails[i].MessageID == id {
						return c, &c.Mails[i], true
					}
				}
			}
			return c, c.mail(), true
		}
	}
	for _, c := range d.cases {
		for i := range c.Mails {
			for _, id := range n.ids {
				if c.Mails[i].MessageID == id {
					return c, &c.Mails[i], false
				}
			}
		}
	}
	if !n.report { // the number is known to many; it can make nothing bounce
		for _, c := range d.cases {
			if strings.Contains(n.subject, "["+c.ID+"]") {
				return c, c.mail(), false
			}
		}
	}
	return nil, nil, false
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
	if a, err := mail.ParseAddress(h.Get("From")); err == nil {
		n.sender = a.Address
	}
	n.trial = h.Get(trialHeader) != ""
	if auto := strings.ToLower(h.Get("Auto-Submitted")); auto != "" && auto != "no" || h.Get("X-Autoreply") != "" || strings.EqualFold(h.Get("Precedence"), "auto_reply") {
		n.automatic = true
	}
	for _, name := range []string{"To", "Cc", "Delivered-To", "Envelope-To", "X-Original-To"} {
		n.to = append(n.to, h[textproto.CanonicalMIMEHeaderKey(name)]...)
	}
	n.refer(h.Get("In-Reply-To"))
	n.refer(h.Get("References"))

	if n.date, err = h.Date(); err != nil {
		n.date = time.Time{}
	}
	body, _ := io.ReadAll(io.LimitReader(m.Body, maxReceived)) // a broken end is no matter
	n.hash = hashOf(h, body)
	ctype, params, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err == nil && ctype == "multipart/report" && strings.EqualFold(params["report-type"], "delivery-status") {
		n.readReport(multipart.NewReader(bytes.NewReader(body), params["boundary"]))
	} else if failed := h["X-Failed-Recipients"]; len(failed) > 0 { // Exim's own form
		n.report = true
		for addr := range strings.SplitSeq(strings.Join(failed, ","), ",") {
			rcpt, _ := CheckAddress(addr)
			if len(n.groups) < maxGroups {
				n.groups = append(n.groups, group{"failed", "5.0.0", rcpt, "X-Failed-Recipients"})
			}
		}
		for _, id := range messageID.FindAllSubmatch(body, 20) {
			n.refer(string(id[1]))
		}
	}
	return n, nil
}

// hashOf is the same for the same mail: programs add header lines to a mailbox
// that they have read (Status, X-UID) and change its line ends.
func hashOf(h mail.Header, body []byte) string {
	sum := sha256.New()
	for _, name := range []string{"Message-Id", "Date", "From", "Subject"} {
		fmt.Fprintf(sum, "%q\n", h[name])
	}
	body = bytes.ReplaceAll(body[:min(len(body), 64<<10)], []byte("\r"), nil)
	sum.Write(bytes.TrimSpace(body[:min(len(body), 32<<10)]))
	return hex.EncodeToString(sum.Sum(nil)[:8])
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

// readReport reads the parts of a delivery notice.
func (n *notice) readReport(mr *multipart.Reader) {
	n.report = true
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

// deliveryStatus reads the groups of fields of RFC 3464, one a recipient.
func (n *notice) deliveryStatus(body []byte) {
	r := textproto.NewReader(bufio.NewReader(bytes.NewReader(body)))
	for range 2 * maxGroups {
		h, err := r.ReadMIMEHeader()
		if action := strings.ToLower(clean(h.Get("Action"), 20)); action != "" && len(n.groups) < maxGroups {
			_, diag, ok := strings.Cut(h.Get("Diagnostic-Code"), ";")
			if !ok {
				diag = h.Get("Diagnostic-Code")
			}
			_, rcpt, _ := strings.Cut(h.Get("Original-Recipient"), ";")
			if rcpt == "" {
				_, rcpt, _ = strings.Cut(h.Get("Final-Recipient"), ";")
			}
			rcpt, _ = CheckAddress(rcpt)
			n.groups = append(n.groups, group{action, clean(h.Get("Status"), 20), rcpt, clean(diag, 200)})
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
