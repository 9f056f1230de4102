package abuse

import (
	"fmt"
	"net/mail"
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
	// The next contact is none that has the report already, as the copy's has.
	b.cases[c.ID].mail().Others = []Contact{{Address: "guess@op3.example", Guess: true}, {Address: "Abuse@Op1.example"}, {Address: "abuse@op3.example"}}
	got, err := b.Receive(strings.NewReader(dsn("abuse+"+c.Token+"@example.net", "failed", "5.1.1", "abuse@op2.example", m.MessageID)), "root")
	if err != nil || len(got) != 1 || got[0].Report != c.ID || got[0].What != Bounced || got[0].Next != "abuse@op3.example" {
		t.Fatalf("%+v, %v", got, err)
	}
	c, _, _ = b.Case(c.ID)
	if c.State != Bounced || !strings.Contains(c.Why, "next contact: abuse@op3.example") || strings.Contains(c.Why, "\x1b") {
		t.Errorf("%s %q", c.State, c.Why)
	}
	if bad, _ := b.bad("ABUSE@op2.example"); !bad {
		t.Error("the address is not marked")
	}
	if next, err := b.Next(c.ID); err != nil || next.Address != "abuse@op3.example" {
		t.Errorf("%+v, %v", next, err)
	}
	// A person goes on with the next contact: a new mail, of the same case,
	// that tells the same.
	c, err = b.Edit(t.Context(), c.ID, "root", Edit{})
	if err != nil || c.State != Drafted || len(c.Mails) != 2 || c.Mails[1].To.Address != "abuse@op3.example" || c.Mails[1].Cc.Address != "" {
		t.Fatalf("%+v, %v", c, err)
	}
	if c.Mails[1].MessageID == m.MessageID || c.Mails[1].MessageID == "" || len(c.Mails[1].Attempts) != 0 || c.Mails[1].Facts.Connections != m.Facts.Connections {
		t.Errorf("%+v", c.Mails[1])
	}
	must(b.Approve(c.ID, "root", Approval{}))
	if c, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); err != nil || c.State != Sent {
		t.Errorf("%s, %v", c.State, err)
	}
	// A late bounce of the first mail does not touch the second.
	if _, err := b.Receive(strings.NewReader(dsn("abuse@example.net", "failed", "5.1.2", "abuse@op2.example", m.MessageID)), "root"); err != nil {
		t.Fatal(err)
	}
	if c, _, _ := b.Case(c.ID); c.State != Sent {
		t.Errorf("%s", c.State)
	}
	// Where everybody has it or cannot be reached there is no next.
	if next, _ := b.Next(c.ID); next.Address != "" {
		t.Errorf("next %+v", next)
	}
}

// TestBounceOfSeveral: a notice speaks of each recipient by itself.
func TestBounceOfSeveral(t *testing.T) {
	const to, cc, alone = "abuse@op2.example", "abuse@op1.example", "without a copy, "
	for _, k := range []struct {
		name   string
		groups string // "ACTION STATUS RCPT" each
		state  State
		bad    string
		note   string
	}{
		{"the copy bounces after the recipient's is delivered", "delivered 2.0.0 " + to + ";failed 5.1.1 " + cc, Delivered, cc, "the copy to " + cc + " bounced"},
		{"the copy bounces before", "failed 5.1.1 " + cc + ";delivered 2.0.0 " + to, Delivered, cc, "the copy to " + cc + " bounced"},
		{"the recipient's bounces, the copy is delivered", "delivered 2.0.0 " + cc + ";failed 5.1.1 " + to, Bounced, to, "the copy to " + cc + " is delivered"},
		{"both bounce", "failed 5.1.1 Abuse@OP2.example;failed 5.1.1 " + cc, Bounced, to + " " + cc, "the copy to " + cc + " bounced"},
		{"the copy alone is delayed", "delayed 4.4.1 " + cc, Sent, "", "the copy to " + cc + " is delayed"},
		{"passed on by one of two", "failed 5.1.1 x@inside.example", Sent, "", "for x@inside.example, to whom it was passed on"},
		{alone + "passed on to several, one of them is gone", "failed 5.1.1 x@inside.example;delivered 2.0.0 y@inside.example", Delivered, "", "delivered"},
		{alone + "passed on to several, all are gone", "failed 5.1.1 x@inside.example;failed 5.1.1 y@inside.example", Bounced, to, "bounced"},
	} {
		t.Run(k.name, func(t *testing.T) {
			b, c := sentReport(t)
			if strings.HasPrefix(k.name, alone) {
				b.cases[c.ID].mail().Cc = Contact{}
			}
			msg := dsn("abuse+"+c.Token+"@example.net", "X", "X", "X", c.Mails[0].MessageID)
			head, rest, _ := strings.Cut(msg, "Action:")
			_, rest, _ = strings.Cut(rest, "--b1")
			for g := range strings.SplitSeq(k.groups, ";") {
				f := strings.Fields(g)
				head += fmt.Sprintf("Action: %s\nStatus: %s\nFinal-Recipient: rfc822;%s\nDiagnostic-Code: smtp; said so\n\n", f[0], f[1], f[2])
			}
			got, err := b.Receive(strings.NewReader(head+"--b1"+rest), "root")
			if err != nil || len(got) != 1 || got[0].Report == "" {
				t.Fatalf("%+v, %v", got, err)
			}
			c = b.only()
			if c.State != k.state || !strings.Contains(strings.Join(c.Notes, "\n"), k.note) {
				t.Errorf("%s, notes %q; want %s, %q", c.State, c.Notes, k.state, k.note)
			}
			for _, a := range []string{to, cc} {
				if bad, _ := b.bad(a); bad != strings.Contains(k.bad, a) {
					t.Errorf("%s is marked: %v", a, bad)
				}
			}
		})
	}
}

// TestForgedBounce: who was shown a report can write a notice about it.
func TestForgedBounce(t *testing.T) {
	const desk = "abuse@op2.example"
	answer := func(c Case) string {
		return "From: " + desk + "\nTo: abuse+" + c.Token + "@example.net\nSubject: Re: yours\n\nWe have shut the customer down.\n"
	}
	forged := func(c Case) string { return dsn("abuse@example.net", "failed", "5.1.1", desk, c.Mails[0].MessageID) }
	token := func(c Case) string {
		return dsn("abuse+"+c.Token+"@example.net", "failed", "5.1.1", desk, c.Mails[0].MessageID)
	}
	for _, k := range []struct {
		name  string
		plain bool // the return path has no token
		mails []func(Case) string
		state State
	}{
		{"not to the return path", false, []func(Case) string{forged}, Sent},
		{"to the return path, after an answer", false, []func(Case) string{answer, token}, Answered},
		{"without a token in the return path", true, []func(Case) string{forged}, Bounced},
		{"without a token in the return path, after an answer", true, []func(Case) string{answer, forged}, Answered},
	} {
		t.Run(k.name, func(t *testing.T) {
			b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
				if k.plain {
					c.ReturnPath = ""
				}
			})
			c, _ := b.approved()
			must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
			for _, mail := range k.mails {
				c = b.only()
				if k.plain { // the answer quotes the number
					c.Token = "x"
				}
				if _, err := b.Receive(strings.NewReader(strings.Replace(mail(c), "Re: yours", "Re: ["+c.ID+"]", 1)), "root"); err != nil {
					t.Fatal(err)
				}
			}
			if bad, _ := b.bad(desk); b.only().State != k.state || bad != (k.state == Bounced) {
				t.Errorf("%s, %s is marked: %v; want %s", b.only().State, desk, bad, k.state)
			}
		})
	}
}

// TestTrialReadBack: what comes of a trial is not said of the report.
func TestTrialReadBack(t *testing.T) {
	b := flooded(t, nil)
	c, _ := b.approved()
	must(b.Send(t.Context(), c.ID, "root", SendOptions{To: "yuo@example.net"}))
	trial := b.sent()[0].msg
	must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	h, err := mail.ReadMessage(strings.NewReader(trial))
	if err != nil || strings.Contains(trial, "\nMessage-ID: <"+c.Mails[0].MessageID) {
		t.Fatalf("it has the Message-ID of the report, %v:\n%.400s", err, trial)
	}
	id := strings.Trim(h.Header.Get("Message-Id"), "<>")
	for _, msg := range []string{trial, strings.Replace(trial, "\nFrom:", "\nX-From:", 1), dsn("abuse@example.net", "failed", "5.1.1", "yuo@example.net", id)} {
		got, err := b.Receive(strings.NewReader(msg), "root")
		if bad, _ := b.bad("abuse@op2.example"); err != nil || len(got) != 1 || got[0].Report != "" || b.only().State != Sent || bad {
			t.Errorf("%+v, %s, the desk is marked: %v, %v", got, b.only().State, bad, err)
		}
	}
}

// TestTickets: the desks of the recipient and of the copy have each a number.
func TestTickets(t *testing.T) {
	b, c := sentReport(t)
	for _, n := range []string{"1001", "2002", "1001", "2002"} {
		if _, err := b.Receive(strings.NewReader("From: a@b.example\nSubject: [Ticket#"+n+"] Re: ["+c.ID+"]\n\nhi\n"), "root"); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 2 * maxTickets {
		b.Receive(strings.NewReader(fmt.Sprintf("From: a@b.example\nSubject: [Ticket#300%d] Re: [%s]\n\nhi\n", i, c.ID)), "root")
	}
	if got := b.only().Ticket; got != "1001, 2002, 3000, 3001" {
		t.Errorf("%s", got)
	}
}

// TestReceiveAgain: the same mailbox may be read as often as one likes, also
// after a mail program has written its marks into it.
func TestReceiveAgain(t *testing.T) {
	b, c := sentReport(t)
	b.pass(40 * 24 * time.Hour)
	to := "abuse+" + c.Token + "@example.net"
	late := strings.Replace(dsn(to, "failed", "5.1.1", "abuse@op2.example", c.Mails[0].MessageID), "Subject:", "Date: "+testStart.Add(2*time.Hour).Format(time.RFC1123Z)+"\nSubject:", 1)
	from := "From a@x.example Sun Nov 22 20:00:00 2026\n"
	answer := "From: p@op2.example\nTo: " + to + "\nSubject: Re: yours\n\nIt is fixed.\n"
	box := from + late + "\n" + from + answer + "\n"
	read := func(box string) []Received {
		t.Helper()
		got, err := b.Receive(strings.NewReader(box), "root")
		if err != nil || len(got) != 2 {
			t.Fatalf("%+v, %v", got, err)
		}
		return got
	}
	if got := read(box); got[0].What != Bounced || got[1].What != Answered {
		t.Errorf("%+v", got)
	}
	// The notice is of 40 days ago: nobody is marked for 30 days from now.
	if bad, until := b.bad("abuse@op2.example"); bad {
		t.Errorf("marked until %s", until)
	}
	want := b.only()
	marked := strings.NewReplacer("Subject: Mail", "Status: RO\r\nX-UID: 17\r\nSubject: Mail", "Subject: Re", "Status: O\r\nSubject: Re", "\n", "\r\n").Replace(box)
	for _, again := range []string{box, marked} {
		for _, g := range read(again) {
			if g.What != "" || !strings.Contains(g.Why, "read before") {
				t.Errorf("%+v", g)
			}
		}
	}
	if c := b.only(); len(c.History) != len(want.History) || len(c.Notes) != len(want.Notes) || c.State != want.State {
		t.Errorf("%+v", c)
	}
	// Another one of the same kind counts.
	if got := read(from + answer + "And more.\n\n" + from + answer); got[0].Why != "" || got[1].Why == "" {
		t.Errorf("%+v", got)
	}
	// As many as there are: nothing at the end is left out.
	n := 0
	err := SplitMbox(strings.NewReader(strings.Repeat(from+"Subject: x\n\ny\n\n", 20_000)+from+answer), func(msg []byte) error { n++; return nil })
	if err != nil || n != 20_001 {
		t.Errorf("%d mails, %v", n, err)
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
		{name: "bounce by Message-ID, not to the return path", mail: func(c Case) string {
			return dsn("abuse@example.net", "failed", "5.1.1", "abuse@op2.example", c.Mails[0].MessageID)
		}, state: Sent},
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
			return "From: Mailer-Daemon@x.example\nTo: abuse+" + c.Token + "@example.net\nX-Failed-Recipients: abuse@op2.example\nSubject: failed\n\nMessage-ID: <" + c.Mails[0].MessageID + ">\n"
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
		{name: "ourselves", mail: func(c Case) string {
			return "From: " + strings.ToUpper(c.Mails[0].From) + "\nTo: abuse+" + c.Token + "@example.net\nSubject: Re: [" + c.ID + "]\n\nWhat of this?\n"
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
			all := []string{n.subject, n.from, n.ticketIn("SG-1"), n.hash}
			for _, g := range n.groups {
				all = append(all, g.action, g.status, g.rcpt, g.diag)
			}
			if len(n.groups) > maxGroups {
				t.Error("too many recipients")
			}
			for _, s := range all {
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
