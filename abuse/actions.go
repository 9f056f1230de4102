package abuse

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Edit is what a person changes of a draft; nil stays as it is.
type Edit struct {
	Text   *string `json:"text,omitempty"`
	To     *string `json:"to,omitempty"`
	Cc     *string `json:"cc,omitempty"` // "" takes it out
	Format *Format `json:"format,omitempty"`
}

// Edit changes a draft, also an approved one, which must be approved again,
// and a bounced one, of which a new mail is made (to the next contact, if
// none is named).
func (d *Desk) Edit(id, by string, e Edit) (Case, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil {
		return Case{}, err
	}
	c := now.clone()
	switch c.State {
	case Drafted, Approved:
	case Bounced:
		next, err := d.again(c)
		if err != nil {
			return Case{}, err
		}
		c.Mails = append(c.Mails, next)
	default:
		return Case{}, fmt.Errorf("%w: %s is %s; only drafts are edited", ErrState, c.ID, c.State)
	}
	m := c.mail()
	var changed []string
	if e.Format != nil {
		switch *e.Format {
		case Mixed, XARF, XARF02, Text:
			m.Format = *e.Format
		default:
			return Case{}, fmt.Errorf("unknown format %s", quoted(string(*e.Format)))
		}
		changed = append(changed, "format")
	}
	for _, r := range []struct {
		name string
		v    *string
		to   *Contact
	}{{"to", e.To, &m.To}, {"cc", e.Cc, &m.Cc}} {
		if r.v == nil {
			continue
		}
		changed = append(changed, r.name)
		if *r.v == "" {
			*r.to = Contact{}
			continue
		}
		addr, err := CheckAddress(*r.v)
		if err != nil {
			return Case{}, err
		}
		*r.to = Contact{Address: addr, Scope: shown(reported(c)), Source: "named by a person", At: d.now(), Role: "abuse", Note: by}
	}
	if m.Cc.Address == m.To.Address {
		m.Cc = Contact{}
	}
	if e.Text != nil {
		t := strings.ReplaceAll(*e.Text, "\r\n", "\n")
		if err := checkText(t); err != nil {
			return Case{}, err
		}
		if strings.TrimSpace(t) == "" {
			return Case{}, errors.New("the text is empty")
		}
		m.Text, m.Edited = strings.TrimRight(t, "\n")+"\n", by
		changed = append(changed, "text")
	}
	m.Approved = ""
	m.Desk = nil
	if e.To != nil || e.Cc != nil {
		m.Warnings = slices.DeleteFunc(m.Warnings, func(w string) bool {
			return strings.HasPrefix(w, "contact missing") || strings.Contains(w, "is inside what we block")
		})
	}
	d.complete2(c, m)
	msg, err := d.finishMail(c, m, "", false)
	if err != nil {
		return Case{}, err
	}
	if err := d.put(c, len(c.Mails)-1, *m, msg); err != nil {
		return Case{}, err
	}
	c.Why = ""
	if m.To.Address == "" {
		c.Why = "contact missing"
	}
	c.move(Drafted, by, "edited: "+strings.Join(changed, ", "), d.now())
	if err := d.save(c); err != nil {
		return Case{}, err
	}
	*now = *c
	return *c.clone(), nil
}

// complete2 renews what depends on From, which a person may have set since.
func (d *Desk) complete2(c *Case, m *Mail) {
	w := m.Warnings
	d.complete(c, m, finding{})
	m.Warnings = w
	if m.To.Address == "" && !slices.ContainsFunc(w, func(s string) bool { return strings.HasPrefix(s, "contact missing") }) {
		m.Warnings = append(m.Warnings, "contact missing: name one with `reports edit --to`, or fill the overrides file")
	}
}

// again is a new mail in place of one that bounced, to the next contact.
func (d *Desk) again(c *Case) (Mail, error) {
	m := *c.mail()
	m.ReportID = newUUID()
	m.MessageID, m.Approved, m.Digest, m.SentAt, m.Attempts = "", "", "", time.Time{}, nil
	m.Made = d.now()
	m.To = Contact{}
	if next := d.next(c); next.Address != "" {
		m.To = next
		m.Others = slices.DeleteFunc(slices.Clone(m.Others), func(o Contact) bool { return o.Address == next.Address })
	}
	if m.Cc.Address == m.To.Address {
		m.Cc = Contact{}
	}
	return m, nil
}

// next is the contact to write to when the first one bounced: no guess, and
// none that bounced itself.
func (d *Desk) next(c *Case) Contact {
	m := c.mail()
	for _, o := range append([]Contact{m.Cc}, m.Others...) {
		if bad, _ := d.bad(o.Address); o.Address != "" && !o.Guess && !bad && o.Address != m.To.Address {
			return o
		}
	}
	return Contact{}
}

// Next is the contact that is proposed after a bounce; zero if there is none.
func (d *Desk) Next(id string) (Contact, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, err := d.get(id)
	if err != nil || c.mail() == nil {
		return Contact{}, err
	}
	return d.next(c), nil
}

// Approval is what a person confirms beyond approving.
type Approval struct {
	// Guess is the recipient's address, typed, where it is only a guess.
	Guess string `json:"guess,omitempty"`
	// BlockedDesk: send although the desk's answers cannot reach us.
	BlockedDesk bool `json:"blocked_desk,omitempty"`
}

// Approve freezes a draft: exactly this mail goes out, by Run or by Send. The
// error is a *Refusal where something stands against it.
func (d *Desk) Approve(id, by string, a Approval) (Case, error) {
	return d.approve(id, by, a, false)
}

// handoverGrace is how long a mail that is being handed over has when the
// program is told to stop.
const handoverGrace = 5 * time.Second

func (d *Desk) approve(id, by string, a Approval, auto bool) (Case, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil {
		return Case{}, err
	}
	d.learn(now)
	if now.State != Drafted {
		return Case{}, fmt.Errorf("%w: %s is %s; drafts are approved", ErrState, now.ID, now.State)
	}
	c := now.clone()
	m := c.mail()
	if _, err := d.config.sender(); err != nil || d.config.From == "" {
		return Case{}, &Refusal{"reports.from is not set", "name a mailbox that a person reads, as in \"Example Mail abuse desk <abuse@example.net>\""}
	}
	switch {
	case m.To.Address == "":
		return Case{}, &Refusal{"there is no recipient", "`smtpguard reports edit " + c.ID + " --to ADDRESS` names one"}
	case m.To.Guess && a.Guess != m.To.Address:
		return Case{}, &Refusal{m.To.Address + " is only a guess", "approve with --guess " + m.To.Address + " if you are sure"}
	case len(c.live()) == 0:
		return Case{}, &Refusal{"every block of it was lifted by an operator", "withdraw it"}
	}
	for _, r := range []Contact{m.To, m.Cc} {
		if r.Address == "" {
			continue
		}
		if _, err := CheckAddress(r.Address); err != nil || isRegistry(r.Address) {
			return Case{}, &Refusal{r.Address + " is not an address that reports go to", "`smtpguard reports edit` names another"}
		}
		if bad, until := d.bad(r.Address); bad && auto {
			return Case{}, &Refusal{fmt.Sprintf("%s bounced; it is left alone until %s", r.Address, until.UTC().Format("2006-01-02")), ""}
		}
	}
	for _, p := range c.prefixes() { // not what lies between them
		if !d.reportable(p) {
			return Case{}, &Refusal{p.String() + " is our own, allowed or reserved", "withdraw it"}
		}
	}
	if d.o.Blocked != nil { // the blocks of now, not of when it was drafted
		m.Desk = slices.DeleteFunc(m.Desk, func(a netip.Addr) bool {
			_, b := d.o.Blocked(a)
			return !b
		})
	}
	if len(m.Desk) > 0 && !a.BlockedDesk {
		return Case{}, &Refusal{fmt.Sprintf("the desk's own mail server %s is inside what we block, so its answers cannot reach us", m.Desk[0]),
			fmt.Sprintf("`smtpguard allow add %s` exempts it; or approve with --blocked-desk", m.Desk[0])}
	}
	d.complete2(c, m)
	msg, err := d.finishMail(c, m, by, auto)
	if err != nil {
		return Case{}, err
	}
	m.Approved = by
	if err := d.put(c, len(c.Mails)-1, *m, msg); err != nil {
		return Case{}, err
	}
	c.Why = ""
	c.move(Approved, by, "to "+m.To.Address, d.now())
	if err := d.save(c); err != nil {
		return Case{}, err
	}
	*now = *c
	d.step("approved")
	d.poke()
	return *c.clone(), nil
}

// approveAuto approves what Config.Auto lets pass.
func (d *Desk) approveAuto(ctx context.Context) {
	if d.config.Mode != Auto {
		return
	}
	var ids []string
	d.mu.Lock()
	for _, c := range d.cases {
		m := c.mail()
		if c.State != Drafted || m.Edited != "" || m.To.Address == "" || m.To.Guess || m.To.Stale || m.Origin.Disputed || !c.Certain || m.To.Form != "" && m.To.Source != "overrides file" ||
			len(m.Desk) > 0 || !strings.Contains(m.To.Role, "abuse") || m.Facts.Connections < d.config.Auto.Connections || c.BlockCount < d.config.Auto.Blocks || observed(c) {
			continue
		}
		if c.lastBy() != Self { // a person had a hand on it
			continue
		}
		ids = append(ids, c.ID)
	}
	d.mu.Unlock()
	for _, id := range ids {
		if ctx.Err() != nil {
			return
		}
		if _, err := d.approve(id, Self, Approval{}, true); err != nil {
			d.log.Info("a report waits for a person", "report", id, "why", err)
		}
	}
}

func (c *Case) lastBy() string {
	if len(c.History) == 0 {
		return Self
	}
	return c.History[len(c.History)-1].By
}

// SendOptions says how a mail is sent.
type SendOptions struct {
	// To redirects it for a trial: only this address gets it, and the case
	// stays where it is.
	To string `json:"to,omitempty"`
	// Again sends a doubtful one once more, on a person's word that it did
	// not leave.
	Again bool `json:"again,omitempty"`
}

// Send sends an approved mail now. ErrHeld: a cap stands against it, and it
// goes out by itself when the cap allows. ErrDoubtful: it may have been sent
// or not; a person must look, and it is never sent again by itself.
func (d *Desk) Send(ctx context.Context, id, by string, o SendOptions) (Case, error) {
	if o.To != "" {
		return d.trial(ctx, id, by, o.To)
	}
	d.mu.Lock()
	now, err := d.get(id)
	if err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	d.learn(now)
	if now.State != Approved && !(now.State == Doubtful && o.Again) {
		state := now.State
		d.mu.Unlock()
		if state == Doubtful {
			return Case{}, fmt.Errorf("%w: %s", ErrDoubtful, now.Why)
		}
		return Case{}, fmt.Errorf("%w: %s is %s; approved ones are sent", ErrState, id, state)
	}
	c := now.clone()
	m := c.mail()
	rcpt := []string{m.To.Address}
	if m.Cc.Address != "" {
		rcpt = append(rcpt, m.Cc.Address)
	}
	if why := d.capped(c, rcpt); why != "" {
		if now.Why != "held: "+why {
			now.Why = "held: " + why
			err = d.save(now)
		}
		d.mu.Unlock()
		return *c, errors.Join(fmt.Errorf("%w: %s", ErrHeld, why), err)
	}
	msg, err := d.stored(c)
	if err == nil {
		if sum := sha256.Sum256(msg); hex.EncodeToString(sum[:]) != m.Digest {
			err = fmt.Errorf("the mail of %s in the store is not the one that was approved", c.ID)
		}
	}
	if err == nil && d.config.Redirect != "" {
		rcpt = []string{d.config.Redirect}
		msg = redirected(msg, d.config.Redirect)
	}
	if err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	// Written down before it is handed over: whatever happens from here on,
	// it is known that it may have been sent.
	m.Attempts = append(m.Attempts, Attempt{Begun: d.now(), Rcpt: rcpt})
	c.Why = ""
	c.move(Queued, by, "to "+strings.Join(rcpt, ", "), d.now())
	if err := d.save(c); err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	*now = *c
	from := m.Return
	d.mu.Unlock()
	d.step("queued")

	// What is under way is not broken off by a stop, but does not hold it up
	// for long either: a person looks at what stays doubtful.
	hctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(handoverGrace, cancel) })
	what, herr := d.handover(hctx, from, rcpt, msg)
	stop()
	cancel()
	d.step("handed")

	d.mu.Lock()
	defer d.mu.Unlock()
	c = now.clone()
	m = c.mail()
	at := &m.Attempts[len(m.Attempts)-1]
	at.Ended, at.Result = d.now(), string(what)
	if herr != nil {
		at.Result += ": " + clean(herr.Error(), 300)
	}
	var result error
	switch what {
	case taken:
		m.SentAt = d.now()
		c.Why = ""
		c.move(Sent, by, "the mail server has taken it", d.now())
	case refused:
		c.Why = "not sent: " + clean(herr.Error(), 300)
		c.move(Approved, by, c.Why, d.now())
		result = fmt.Errorf("%s was not sent: %w", c.ID, herr)
	default:
		c.Why = "it may have been sent or not (" + clean(herr.Error(), 200) + "); look for Message-ID <" + m.MessageID + "> in the mail server's log"
		c.move(Doubtful, by, c.Why, d.now())
		result = fmt.Errorf("%w: %s", ErrDoubtful, c.Why)
	}
	*now = *c
	if err := d.save(c); err != nil {
		// In memory it is right; on the disk it says that it was under way,
		// which a restart reads as doubtful: never sent twice either way.
		return *c.clone(), errors.Join(result, err)
	}
	d.step("noted")
	return *c.clone(), result
}

// redirected puts another recipient into the header of a message, and the
// real ones into one of their own.
func redirected(msg []byte, to string) []byte {
	head, body, _ := bytes.Cut(msg, []byte("\r\n\r\n"))
	var out bytes.Buffer
	for line := range bytes.SplitSeq(head, []byte("\r\n")) {
		name, value, _ := bytes.Cut(line, []byte(": "))
		switch string(name) {
		case "To", "Cc":
			fmt.Fprintf(&out, "X-Smtpguard-Would-%s: %s\r\n", name, value)
		default:
			out.Write(line)
			out.WriteString("\r\n")
		}
	}
	out.WriteString("To: " + to + "\r\nX-Smtpguard-Trial: yes\r\n\r\n")
	out.Write(body)
	return out.Bytes()
}

// trial sends the mail as it stands to a person's own address.
func (d *Desk) trial(ctx context.Context, id, by, to string) (Case, error) {
	to, err := CheckAddress(to)
	if err != nil {
		return Case{}, err
	}
	d.mu.Lock()
	c, err := d.get(id)
	var msg []byte
	if err == nil {
		msg, err = d.stored(c)
	}
	if err == nil && msg == nil {
		err = fmt.Errorf("%w: %s has no draft yet", ErrState, id)
	}
	if err == nil && d.config.From == "" {
		err = &Refusal{"reports.from is not set", "name a mailbox that a person reads"}
	}
	if err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	from := d.config.From
	if a, err := d.config.sender(); err == nil {
		from = a.Address // answers to a trial are nobody's case
	}
	attempt := Attempt{Begun: d.now(), Rcpt: []string{to}, Trial: true}
	d.mu.Unlock()
	what, herr := d.handover(ctx, from, []string{to}, redirected(msg, to))
	d.mu.Lock()
	defer d.mu.Unlock()
	attempt.Ended, attempt.Result = d.now(), string(what)
	if m := c.mail(); m != nil && len(m.Attempts) < 50 && c.State != Queued {
		m.Attempts = append(m.Attempts, attempt)
		err = d.save(c)
	}
	if herr != nil {
		herr = fmt.Errorf("the trial to %s: %w", to, herr)
	}
	return *c.clone(), errors.Join(herr, err)
}

// capped says which cap stands against a mail, "" if none. d.mu is held.
func (d *Desk) capped(c *Case, rcpt []string) string {
	now := d.now()
	hour, day := 0, 0
	for _, o := range d.cases {
		for _, m := range o.Mails {
			for _, a := range m.Attempts {
				// What may have been sent counts.
				if a.Trial || strings.HasPrefix(a.Result, string(refused)) {
					continue
				}
				age := now.Sub(a.Begun)
				if age < time.Hour {
					hour++
				}
				if age < 24*time.Hour {
					day++
				}
				if age < d.config.Caps.Recipient && (m.To.Address != "" || m.Cc.Address != "") {
					for _, r := range rcpt {
						if r == m.To.Address || r == m.Cc.Address {
							return fmt.Sprintf("%s got a report at %s; the next one may go at %s", r, a.Begun.UTC().Format("15:04 UTC"), a.Begun.Add(d.config.Caps.Recipient).UTC().Format("2006-01-02 15:04 UTC"))
						}
					}
				}
			}
		}
	}
	switch {
	case day >= d.config.Caps.Day:
		return fmt.Sprintf("%d mails went out within a day, as many as reports.caps.day allows", day)
	case hour >= d.config.Caps.Hour:
		return fmt.Sprintf("%d mails went out within an hour, as many as reports.caps.hour allows", hour)
	}
	return ""
}

// sendApproved sends what is approved, the longest waiting first.
func (d *Desk) sendApproved(ctx context.Context) {
	d.mu.Lock()
	var wait []*Case
	for _, c := range d.cases {
		m := c.mail()
		if c.State != Approved || m == nil {
			continue
		}
		// After a refusal it is tried again in a while, not at once.
		n, last := 0, time.Time{}
		for _, a := range m.Attempts {
			if !a.Trial {
				n, last = n+1, a.Ended
			}
		}
		if n > 0 && d.now().Sub(last) < time.Duration(min(n, 12))*10*time.Minute {
			continue
		}
		wait = append(wait, c.clone())
	}
	d.mu.Unlock()
	slices.SortFunc(wait, func(a, b *Case) int { return a.lastMove().Compare(b.lastMove()) })
	for _, c := range wait {
		if ctx.Err() != nil {
			return
		}
		_, err := d.Send(ctx, c.ID, c.mail().Approved, SendOptions{})
		switch {
		case err == nil:
			d.log.Info("a report is sent", "report", c.ID, "to", c.mail().To.Address)
		case errors.Is(err, ErrHeld):
		default:
			d.log.Error("a report was not sent", "report", c.ID, "err", err)
		}
	}
}

// CloseCase ends a case: nothing more is expected of it.
func (d *Desk) CloseCase(id, by, note string) (Case, error) { return d.end(id, by, note, Closed) }

// Withdraw ends a case that should not be reported.
func (d *Desk) Withdraw(id, by, note string) (Case, error) { return d.end(id, by, note, Withdrawn) }

func (d *Desk) end(id, by, note string, to State) (Case, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil {
		return Case{}, err
	}
	if now.State == Queued || now.State.over() {
		return Case{}, fmt.Errorf("%w: %s is %s", ErrState, now.ID, now.State)
	}
	c := now.clone()
	c.Why = clean(note, 300)
	c.move(to, by, note, d.now())
	if err := d.save(c); err != nil {
		return Case{}, err
	}
	*now = *c
	return *c.clone(), nil
}

// Export writes everything about a case into a new directory inside dir:
// case.json, and of each mail the message, sources.csv, xarf.json and the
// evidence. It returns the directory.
func (d *Desk) Export(id, dir string) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, err := d.get(id)
	if err != nil {
		return "", err
	}
	to := filepath.Join(dir, c.ID)
	if err := os.Mkdir(to, 0o700); err != nil {
		return "", fmt.Errorf("exporting %s: %w", c.ID, err)
	}
	text, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return "", err
	}
	faults := []error{writeFile(filepath.Join(to, "case.json"), append(text, '\n'))}
	for i := range c.Mails {
		m := &c.Mails[i]
		name := func(s string) string { return filepath.Join(to, fmt.Sprintf("%d-%s", i+1, s)) }
		msg, err := d.o.Store.Record(kindMail, mailKey(c, i))
		faults = append(faults, err, writeFile(name("mail.eml"), msg), writeFile(name("sources.csv"), []byte(csvText(c, &m.Facts))))
		if x, err := d.xarf(c, m); err == nil {
			faults = append(faults, writeFile(name("xarf.json"), append(x, '\n')))
		}
		if b, err := readBounded(d.rawPath(c, i), 16*maxBody); err == nil {
			faults = append(faults, writeFile(name("lookup.json"), b))
		}
		if m.Archive.File != "" {
			b, err := readBounded(d.path(m.Archive.File), maxArchive)
			if err == nil {
				err = writeFile(name("evidence.log.gz"), b)
			}
			faults = append(faults, err)
		}
	}
	return to, errors.Join(faults...)
}
