package abuse

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// sentReport is a desk whose one report went to abuse@op2.example, with a
// copy to abuse@op1.example.
func sentReport(t *testing.T) (*bench, Case) {
	t.Helper()
	b := flooded(t, nil)
	c, _ := b.approved()
	c = must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	return b, c
}

// dsn is a delivery notice of RFC 3464.
func dsn(to, action, status, rcpt, messageID string) string {
	return fmt.Sprintf(`Return-Path: <>
From: Mail Delivery System <Mailer-Daemon@mx.example>
To: %s
Subject: Mail delivery failed: returning message to sender
Auto-Submitted: auto-replied
MIME-Version: 1.0
Content-Type: multipart/report; report-type=delivery-status; boundary="b1"

--b1
Content-Type: text/plain

This message was created automatically.

--b1
Content-Type: message/delivery-status

Reporting-MTA: dns; mx.example

Action: %s
Final-Recipient: rfc822;%s
Status: %s
Diagnostic-Code: smtp; 550-5.1.1 user %s
 unknown

--b1
Content-Type: message/rfc822

Return-path: <abuse@example.net>
Message-ID: <%s>
Subject: Abuse report

text
--b1--
`, to, action, rcpt, status, "\x1b[31mx", messageID)
}

func TestR27_Bounce(t *testing.T) {
	b, c := sentReport(t)
	m := c.Mails[0]
	got, err := b.Receive(strings.NewReader(dsn("abuse+"+c.Token+"@example.net", "failed", "5.1.1", "abuse@op2.example", m.MessageID)), "root")
	if err != nil || len(got) != 1 || got[0].Report != c.ID || got[0].What != Bounced || got[0].Next != "abuse@op1.example" {
		t.Fatalf("%+v, %v", got, err)
	}
	c, _, _ = b.Case(c.ID)
	if c.State != Bounced || !strings.Contains(c.Why, "next contact: abuse@op1.example") || strings.Contains(c.Why, "\x1b") {
		t.Errorf("%s %q", c.State, c.Why)
	}
	if bad, _ := b.bad("abuse@op2.example"); !bad {
		t.Error("the address is not marked")
	}
	if next, err := b.Next(c.ID); err != nil || next.Address != "abuse@op1.example" {
		t.Errorf("%+v, %v", next, err)
	}
	// A person goes on with the next contact: a new mail, of the same case.
	c, err = b.Edit(c.ID, "root", Edit{})
	if err != nil || c.State != Drafted || len(c.Mails) != 2 || c.Mails[1].To.Address != "abuse@op1.example" || c.Mails[1].Cc.Address != "" {
		t.Fatalf("%+v, %v", c, err)
	}
	if c.Mails[1].MessageID == m.MessageID || c.Mails[1].MessageID == "" || len(c.Mails[1].Attempts) != 0 {
		t.Errorf("%+v", c.Mails[1])
	}
	must(b.Approve(c.ID, "root", Approval{}))
	b.pass(25 * time.Hour) // it got a copy of the first one
	if c, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); err != nil || c.State != Sent {
		t.Errorf("%s, %v", c.State, err)
	}
	// A late bounce of the first mail does not touch the second.
	if _, err := b.Receive(strings.NewReader(dsn("abuse@example.net", "failed", "5.1.1", "abuse@op2.example", m.MessageID)), "root"); err != nil {
		t.Fatal(err)
	}
	if c, _, _ := b.Case(c.ID); c.State != Sent {
		t.Errorf("%s", c.State)
	}
}

func TestReceive(t *testing.T) {
	for _, k := range []struct {
		name   string
		mail   func(c Case) string
		state  State
		ticket string
		none   bool // it belongs to no report
	}{
		{name: "bounce by Message-ID", mail: func(c Case) string {
			return dsn("abuse@example.net", "failed", "5.1.1", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Bounced},
		{name: "bounce in lower and upper case", mail: func(c Case) string {
			return strings.ReplaceAll(dsn("Abuse+"+strings.ToUpper(c.Token)+"@Example.NET", "Failed", "5.1.1", "abuse@OP2.example", ""), "multipart/report", "Multipart/Report")
		}, state: Bounced},
		{name: "the copy bounces", mail: func(c Case) string {
			return dsn("abuse+"+c.Token+"@example.net", "failed", "5.1.1", "abuse@op1.example", c.Mails[0].MessageID)
		}, state: Sent},
		{name: "delayed", mail: func(c Case) string {
			return dsn("abuse+"+c.Token+"@example.net", "delayed", "4.4.1", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Deferred},
		{name: "given up for now", mail: func(c Case) string {
			return dsn("abuse+"+c.Token+"@example.net", "failed", "4.4.7", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Deferred},
		{name: "delivered", mail: func(c Case) string {
			return dsn("abuse+"+c.Token+"@example.net", "delivered", "2.0.0", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Delivered},
		{name: "unknown action", mail: func(c Case) string {
			return dsn("abuse+"+c.Token+"@example.net", "pondered", "5.0.0", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Sent},
		{name: "Exim's own form", mail: func(c Case) string {
			return "From: Mailer-Daemon@x.example\nTo: abuse@example.net\nX-Failed-Recipients: abuse@op2.example\nSubject: failed\n\nMessage-ID: <" + c.Mails[0].MessageID + ">\n"
		}, state: Bounced},
		{name: "automatic acknowledgment", mail: func(c Case) string {
			return "From: abuse@op2.example\nTo: abuse+" + c.Token + "@example.net\nAuto-Submitted: auto-replied\nSubject: [Ticket#2026112210000123] Re: [" + c.ID + "]\n\nThank you.\n"
		}, state: Acknowledged, ticket: "2026112210000123"},
		{name: "abuse id", mail: func(c Case) string {
			return "From: abuse@op2.example\nTo: abuse@example.net\nIn-Reply-To: <" + c.Mails[0].MessageID + ">\nSubject: AbuseID:F1A2B3:2C: report received\n\nThank you.\n"
		}, state: Acknowledged, ticket: "F1A2B3:2C"},
		{name: "number in brackets", mail: func(c Case) string {
			return "From: abuse@op2.example\nTo: x@example.net\nSubject: Re: Abuse report [" + c.ID + "] [#884213]\n\nThank you.\n"
		}, state: Acknowledged, ticket: "884213"},
		{name: "an answer", mail: func(c Case) string {
			return "From: Person <p@op2.example>\nTo: abuse+" + c.Token + "@example.net\nSubject: Re: Abuse report: SMTP connection flood from 198.51.100.0/24 (AS64500), 2026-11-22 18:41 UTC [" + c.ID + "]\n\nIt is fixed.\n"
		}, state: Answered},
		{name: "encoded subject", mail: func(c Case) string {
			return "From: p@op2.example\nTo: abuse+" + c.Token + "@example.net\nSubject: =?utf-8?B?R3LDvMOfZSDinIUKQmNjOiB4?=\n\nok\n"
		}, state: Answered},
		{name: "the number makes nothing bounce", mail: func(c Case) string {
			return strings.Replace(dsn("abuse@example.net", "failed", "5.1.1", "abuse@op2.example", "x@y.example"), "Subject: Mail", "Subject: ["+c.ID+"] Mail", 1)
		}, state: Sent, none: true},
		{name: "somebody else's bounce", mail: func(c Case) string {
			return dsn("abuse+sg-aaaaaaaaaaaaaaaa@example.net", "failed", "5.1.1", "abuse@op2.example", "x@y.example")
		}, state: Sent, none: true},
		{name: "spam", mail: func(c Case) string { return "From: x@y.example\nTo: abuse@example.net\nSubject: buy\n\nnow\n" }, state: Sent, none: true},
		{name: "no mail at all", mail: func(c Case) string { return "\x00\x01\x02 garbage" }, state: Sent, none: true},
		{name: "broken MIME", mail: func(c Case) string {
			return "To: abuse+" + c.Token + "@example.net\nContent-Type: multipart/report; report-type=delivery-status; boundary=\"\"\n\n--x\n"
		}, state: Sent},
	} {
		t.Run(k.name, func(t *testing.T) {
			b, c := sentReport(t)
			got, err := b.Receive(strings.NewReader(k.mail(c)), "root")
			if err != nil || len(got) != 1 || (got[0].Report == "") != k.none || got[0].Ticket != k.ticket {
				t.Errorf("%+v, %v", got, err)
			}
			c, _, _ = b.Case(c.ID)
			if c.State != k.state || c.Ticket != k.ticket {
				t.Errorf("%s, ticket %q; want %s, %q", c.State, c.Ticket, k.state, k.ticket)
			}
			if len(b.sent()) != 1 {
				t.Error("something was sent in return")
			}
		})
	}
}

func TestReceiveMbox(t *testing.T) {
	b, c := sentReport(t)
	to := "abuse+" + c.Token + "@example.net"
	box := "From a@x.example Sun Nov 22 20:00:00 2026\n" + "From: x@y.example\nSubject: hello\n\ntext\nFrom here on in the text\n\n" +
		"From a@x.example Sun Nov 22 20:00:00 2026\n" + dsn(to, "delayed", "4.4.1", "abuse@op2.example", c.Mails[0].MessageID) + "\n" +
		"From a@x.example Sun Nov 22 20:00:00 2026\nFrom: p@op2.example\nTo: " + to + "\nSubject: [Case 4711X]\n\n" + strings.Repeat("long ", 1<<20) + "\n\n"
	got, err := b.Receive(strings.NewReader(box), "root")
	if err != nil || len(got) != 3 || got[0].Report != "" || got[1].What != Deferred || got[2].What != Acknowledged || got[2].Ticket != "4711X" {
		t.Errorf("%+v, %v", got, err)
	}
	// A mail that is not sent yet is not touched by what claims to answer it.
	b = flooded(t, nil)
	d, _ := b.drafted()
	if got, err := b.Receive(strings.NewReader(dsn("abuse+"+d.Token+"@example.net", "failed", "5.1.1", "x@y.example", d.Mails[0].MessageID)), "root"); err != nil || got[0].What != "" {
		t.Errorf("%+v, %v", got, err)
	}
	if got, err := b.Receive(strings.NewReader(""), "root"); err != nil || len(got) != 0 {
		t.Errorf("nothing: %+v, %v", got, err)
	}
}

// FuzzNotice: what strangers mail to us is bounded and printable.
func FuzzNotice(f *testing.F) {
	f.Add([]byte(dsn("abuse+sg-x@example.net", "failed", "5.1.1", "a@b.example", "id@x.example")))
	f.Add([]byte("From: a\nX-Failed-Recipients: x@y.example\n\nMessage-ID: <a@b>\n"))
	f.Add([]byte("From x\n\nFrom y\n\nContent-Type: multipart/report; report-type=delivery-status; boundary=x\n\n--x\n\n--x--\n"))
	f.Fuzz(func(t *testing.T, msg []byte) {
		_ = SplitMbox(strings.NewReader(string(msg)), func(m []byte) error {
			n, err := readNotice(m)
			if err != nil {
				return nil
			}
			for _, s := range []string{n.subject, n.diag, n.status, n.rcpt, n.from, n.ticketIn("SG-1")} {
				if len(s) > 400 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
					t.Errorf("%q", s)
				}
			}
			if len(n.ids) > 100 {
				t.Error("too many ids")
			}
			return nil
		})
	})
}
