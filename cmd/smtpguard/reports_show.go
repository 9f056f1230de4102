package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/mail"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"golang.org/x/term"

	"github.com/smtpguard/smtpguard/abuse"
)

// columns is how wide a report is shown: as the terminal is, within reason.
func columns(w io.Writer) int {
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		if n, _, err := term.GetSize(int(f.Fd())); err == nil {
			return min(max(n, 40), 120)
		}
	}
	return 80
}

// maxHeld is how many reports that are held by a cap are listed by themselves.
const maxHeld = 10

// urgency is what a person should look at first.
func urgency(k abuse.Case) int {
	i := slices.Index([]abuse.State{abuse.Doubtful, abuse.Bounced, abuse.Drafted, abuse.Approved, abuse.Queued}, k.State)
	switch {
	case i >= 0:
		return i
	case k.State == abuse.Held:
		return 200
	}
	return 100
}

// listReports prints the reports, those that wait for a person first.
func listReports(out io.Writer, list []abuse.Case, all bool) {
	if len(list) == 0 {
		return
	}
	slices.SortStableFunc(list, func(a, b abuse.Case) int { return cmp.Compare(urgency(a), urgency(b)) })
	held, more := 0, map[string]int{}
	var rows []string
	var notes [][]string
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ID\tSTATE\tNETWORK\tAS\tCONNS\tLAST BLOCK")
	for _, k := range list {
		if k.State == abuse.Held && len(k.Mails) == 0 && !all {
			if held++; held > maxHeld {
				more[k.Why]++
				continue
			}
		}
		as := "-"
		if k.AS != 0 {
			as = fmt.Sprintf("AS%d", k.AS)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%d\t%s\n", k.ID, k.State, k.Network, as, connections(&k), short(k.LastBlock))
		var said []string
		if n := len(k.Mails); n > 0 && k.Mails[n-1].To.Address != "" {
			to := "to " + k.Mails[n-1].To.Address
			if cc := k.Mails[n-1].Cc.Address; cc != "" {
				to += ", copy to " + cc
			}
			said = append(said, to)
		}
		if k.Why != "" {
			said = append(said, k.Why)
		}
		notes = append(notes, said)
	}
	w.Flush()
	rows = strings.Split(strings.TrimRight(b.String(), "\n"), "\n")
	width := columns(out)
	fmt.Fprintln(out, rows[0])
	for i, row := range rows[1:] {
		fmt.Fprintln(out, strings.TrimRight(row, " "))
		for _, s := range notes[i] {
			hang(out, "    ", s, width)
		}
	}
	for why, n := range more {
		hang(out, "", fmt.Sprintf("and %d more are held: %s (--all lists them)", n, why), width)
	}
	if n := len(slices.DeleteFunc(slices.Clone(list), func(k abuse.Case) bool { return k.State != abuse.Drafted })); n > 0 {
		hang(out, "", count(n, "draft waits", "drafts wait")+" for a person: `reports show ID`, then `reports approve ID`", width)
	}
}

func short(t time.Time) string { return t.Local().Format("01-02 15:04") }

// showReport prints a report for the person who decides on it: what is known
// of it, the text of its newest mail, and what can be done next.
func showReport(out io.Writer, k abuse.Case, text string) {
	width := columns(out)
	row := func(name, format string, args ...any) {
		hang(out, fmt.Sprintf("%-14s", "  "+name), fmt.Sprintf(format, args...), width)
	}
	fmt.Fprintf(out, "%s  %s\n", k.ID, k.State)
	if k.Why != "" {
		row("why", "%s", k.Why)
	}
	network := k.Network.String()
	if k.AS != 0 {
		network += fmt.Sprintf(", AS%d", k.AS)
	}
	row("network", "%s", network)
	row("blocks", "%d, from %s to %s", k.BlockCount, clock(k.FirstBlock), clock(k.LastBlock))
	if k.Ticket != "" {
		row("ticket", "%s", k.Ticket)
	}
	var m abuse.Mail
	if n := len(k.Mails); n > 0 {
		m = k.Mails[n-1]
		if m.Origin.Disputed || len(m.Origin.Claims) > 1 {
			for _, cl := range m.Origin.Claims {
				row("origin", "%s", cl)
			}
		}
		for _, x := range []struct {
			name string
			c    abuse.Contact
		}{{"to", m.To}, {"cc", m.Cc}} {
			if x.c.Address != "" {
				row(x.name, "%s: of %s, %s, %s%s", x.c.Address, x.c.Scope, x.c.Source, clock(x.c.At), guessed(x.c))
			}
		}
		for _, o := range m.Others {
			row("also", "%s: of %s, %s%s", o.Address, cmp.Or(o.Scope, "nobody says what"), o.Source, guessed(o))
		}
		row("subject", "%s", m.Subject)
		row("message-id", "<%s>", m.MessageID)
		row("digest", "%.16s", m.Digest)
		row("mail", "%d bytes, format %s; %s of %s", m.Size, m.Format, count(m.Facts.Connections, "connection", "connections"), count(len(m.Facts.Sources)+m.Facts.MoreOf, "source", "sources"))
		if m.Without != "" {
			row("no XARF", "%s", m.Without)
		}
		for _, s := range m.Warnings {
			row("warning", "%s", s)
		}
		for _, a := range m.Attempts {
			trial := ""
			if a.Trial {
				trial = "trial "
			}
			row("attempt", "%s %sto %s: %s", clock(a.Begun), trial, strings.Join(a.Rcpt, ", "), a.Result)
		}
	}
	for _, s := range k.Notes {
		row("note", "%s", s)
	}
	for _, h := range k.History {
		row("history", "%s", strings.TrimSuffix(fmt.Sprintf("%s %s by %s: %s", clock(h.Time), h.To, h.By, h.Note), ": "))
	}
	if rule := strings.Repeat("-", min(width, 76)); text != "" {
		fmt.Fprintf(out, "\n%s\n%s%s\n", rule, text, rule)
	}
	switch {
	case k.State == abuse.Drafted && m.To.Address == "":
		fmt.Fprintf(out, "next: smtpguard reports edit %s --to ADDRESS\n", k.ID)
	case k.State == abuse.Drafted:
		fmt.Fprintf(out, "next: smtpguard reports approve %s; or edit, withdraw\n", k.ID)
	case k.State == abuse.Bounced:
		fmt.Fprintf(out, "next: smtpguard reports edit %s   (drafts it for the next contact)\n", k.ID)
	case k.State == abuse.Doubtful:
		fmt.Fprintf(out, "next: look for the Message-ID in the mail server's log; then\n  smtpguard reports send %[1]s --again   if it did not leave\n  smtpguard reports close %[1]s          if it did\n", k.ID)
	}
}

func guessed(c abuse.Contact) string {
	s := ""
	if c.Guess {
		s += "; only a guess"
	}
	if c.Stale {
		s += "; not confirmed today"
	}
	if c.Note != "" {
		s += "; " + c.Note
	}
	return s
}

// messageText is the first part of a mail, the one for people.
func messageText(msg []byte) string {
	m, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		return ""
	}
	var r io.Reader = m.Body
	if _, params, err := mime.ParseMediaType(m.Header.Get("Content-Type")); err == nil && params["boundary"] != "" {
		p, err := multipart.NewReader(m.Body, params["boundary"]).NextPart()
		if err != nil {
			return ""
		}
		r = p
	}
	b, err := io.ReadAll(io.LimitReader(r, 1<<20))
	if err != nil {
		return ""
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n")
}

// receivedWords say what became of one mail.
func receivedWords(g abuse.Received) string {
	if g.Why != "" {
		return g.Why
	}
	what := cmp.Or(string(g.What), "noted")
	if g.Ticket != "" {
		what += ", ticket " + g.Ticket
	}
	if g.Next != "" {
		what += "; next contact: " + g.Next + " (`smtpguard reports edit " + g.Report + "` drafts it)"
	}
	return what
}

// connections are those of a case's newest mail, as its text says; before there
// is one, those that the detector counted.
func connections(k *abuse.Case) int {
	if n := len(k.Mails); n > 0 {
		return k.Mails[n-1].Facts.Connections
	}
	return k.Connections
}
