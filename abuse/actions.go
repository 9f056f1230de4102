package abuse

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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
	// Base is the digest, or its first 12 digits or more, of the draft that the
	// person had in hand: of another one nothing is changed. Empty: whichever.
	Base string `json:"base,omitempty"`
}

// Edit changes a draft, also an approved one, which must be approved again,
// and a bounced one, of which a new mail is made (to the next contact, if
// none is named). Where the recipients change, their mail servers are looked
// up before it returns.
func (d *Desk) Edit(ctx context.Context, id, by string, e Edit) (Case, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil {
		return Case{}, err
	}
	c := now.clone()
	changed, err := d.edited(c, by, e)
	if err != nil {
		return Case{}, err
	}
	if to, cc := c.mail().To.Address, c.mail().Cc.Address; len(c.Mails) != len(now.Mails) || to != now.mail().To.Address || cc != now.mail().Cc.Address {
		d.mu.Unlock() // strangers' name servers are waited for
		servers, faults := d.deskServers(ctx, to, cc)
		d.mu.Lock()
		if now, err = d.get(id); err != nil {
			return Case{}, err
		}
		c = now.clone()
		if changed, err = d.edited(c, by, e); err != nil {
			return Case{}, err
		}
		m := c.mail()
		if m.To.Address != to || m.Cc.Address != cc {
			return Case{}, fmt.Errorf("%w: somebody else changes %s too", ErrState, c.ID)
		}
		m.Servers, m.Warnings = servers, append(m.Warnings, faults...)
	}
	m := c.mail()
	// Who has seen the draft sees what is changed of it; who writes the text
	// has seen that.
	saw := e.Text != nil || now.mail().Seen[by] != "" && now.mail().Seen[by] == now.mail().Digest
	m.Approved, m.Seen, m.Hand = "", nil, by
	d.complete(c, m)
	d.warnDesk(c, m)
	msg, err := d.finishMail(c, m, "", false)
	if err != nil {
		return Case{}, err
	}
	if saw {
		m.see(by)
	}
	c.Why = ""
	if m.To.Address == "" {
		c.Why = missing
	}
	c.move(Drafted, by, "edited: "+strings.Join(changed, ", "), d.now())
	if err := d.commit(now, c, len(c.Mails)-1, *m, msg); err != nil {
		return Case{}, err
	}
	return *c.clone(), nil
}

// edited makes the changes that a person asks for in c, and names them.
func (d *Desk) edited(c *Case, by string, e Edit) (changed []string, err error) {
	if m := c.mail(); e.Base != "" && m != nil && !isDigest(e.Base, m.Digest) {
		return nil, &Refusal{fmt.Sprintf("the draft was made anew or edited since you began (%s, by %s)", utc(c.lastMove()), c.lastBy()),
			"look at it again with `smtpguard reports show " + c.ID + "`, and put your text into the new one"}
	}
	switch c.State {
	case Drafted, Approved:
	case Bounced:
		c.Mails = append(c.Mails, d.again(c))
	default:
		return nil, fmt.Errorf("%w: %s is %s; only drafts are edited", ErrState, c.ID, c.State)
	}
	m := c.mail()
	if e.Format != nil {
		switch *e.Format {
		case Mixed, XARF, XARF02, Text:
			m.Format = *e.Format
			m.To.Format = ""
		default:
			return nil, fmt.Errorf("unknown format %s", quoted(string(*e.Format)))
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
		m.choose(by)
		if *r.v == "" {
			*r.to = Contact{}
			continue
		}
		addr, err := CheckAddress(*r.v)
		if err != nil {
			return nil, err
		}
		*r.to = Contact{Address: addr, Scope: shown(reported(c)), Source: byPerson, At: d.now(), Role: "abuse", Note: by}
	}
	if sameAddr(m.Cc.Address, m.To.Address) {
		m.Cc = Contact{}
	}
	if e.Text != nil {
		t := strings.ReplaceAll(*e.Text, "\r\n", "\n")
		if err := checkText(t); err != nil {
			return nil, err
		}
		if strings.TrimSpace(t) == "" {
			return nil, errors.New("the text is empty")
		}
		m.Text, m.Edited = strings.TrimRight(t, "\n")+"\n", by
		changed = append(changed, "text")
	}
	return changed, nil
}

// byPerson is the source of a contact that a person named.
const byPerson = "named by a person"

// see notes that a person was shown the mail as it is. It reports whether that
// is new.
func (m *Mail) see(by string) bool {
	if m.Seen[by] == m.Digest {
		return false
	}
	if m.Seen == nil || len(m.Seen) >= 20 { // more persons than a report has
		m.Seen = map[string]string{}
	}
	m.Seen[by] = m.Digest
	return true
}

// Show is Case for a person, who may approve what is shown.
func (d *Desk) Show(id, by string) (Case, []byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, err := d.get(id)
	if err != nil {
		return Case{}, nil, err
	}
	msg, err := d.stored(c)
	if err == nil && c.State == Drafted && c.mail().see(by) {
		err = d.save(c)
	}
	return *c.clone(), msg, err
}

// again is a new mail in place of one that bounced, to the next contact.
func (d *Desk) again(c *Case) Mail {
	m := *c.mail()
	m.Replaces, m.ReportID = m.MessageID, newUUID()
	m.MessageID, m.Approved, m.Digest, m.SentAt, m.Attempts, m.Seen = "", "", "", time.Time{}, nil, nil
	m.Made = d.now()
	m.To, m.Cc = d.next(c), Contact{} // the copy has arrived, or bounced too
	m.Chosen, m.Found = "", nil
	m.Others = slices.DeleteFunc(slices.Clone(m.Others), func(o Contact) bool { return sameAddr(o.Address, m.To.Address) })
	return m
}

// next is the contact to write to when the first one bounced: no guess, none
// that bounced itself, and none that has the report already.
func (d *Desk) next(c *Case) Contact {
	m := c.mail()
	for _, o := range slices.Concat([]Contact{m.Cc}, m.Found, m.Others) {
		if bad, _ := d.bad(o.Address); o.Address != "" && !o.Guess && !bad && !c.told(o.Address) {
			return o
		}
	}
	return Contact{}
}

// told reports whether a mail of the case went to an address, or may have.
func (c *Case) told(addr string) bool {
	for _, m := range c.Mails {
		for _, a := range m.Attempts {
			if a.mayHaveLeft() && a.to(addr) {
				return true
			}
		}
	}
	return false
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
	// Digest is that of the draft which is approved, or its first 12 digits or
	// more. Empty: the one that Show has shown to this person last.
	Digest string `json:"digest,omitempty"`
}

// Approve freezes a draft: exactly this mail goes out, by Run or by Send, with
// the date and who approved it filled in. Only what the person has seen is
// approved. The error is a *Refusal where something stands against it.
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
		return Case{}, fmt.Errorf("%w: %s; drafts are approved", ErrState, now.where())
	}
	c := now.clone()
	m := c.mail()
	if _, err := d.config.sender(); err != nil || d.config.From == "" {
		return Case{}, &Refusal{"reports.from is not set", "name a mailbox that a person reads, as in \"Example Mail abuse desk <abuse@example.net>\""}
	}
	if d.changed(m) != "" { // which barred would call outdated
		return Case{}, d.asSeen(now)
	}
	if r := d.barred(c, m); r != nil {
		r, err := d.without(now, r)
		return Case{}, errors.Join(r, err)
	}
	if m.To.Guess && !sameAddr(a.Guess, m.To.Address) {
		return Case{}, &Refusal{m.To.Address + " is only a guess", "approve with --guess " + m.To.Address + " if you are sure"}
	}
	if auto {
		if why := d.waits(c); why != "" {
			return Case{}, &Refusal{why, ""}
		}
		if bad, _ := d.bad(m.Cc.Address); bad {
			m.Cc = Contact{}
			m.Text = d.text(c.of(m), m)
		}
	} else if r := m.seenBy(c, by, a.Digest); r != nil {
		return Case{}, r
	}
	if err := d.asSeen(now); err != nil {
		return Case{}, err
	}
	d.blockedDesk(c, m) // the blocks of now, not of when it was drafted
	if len(m.Desk) > 0 && !a.BlockedDesk {
		return Case{}, &Refusal{fmt.Sprintf("the desk's own mail server %s is inside what we block, so its answers cannot reach us", m.Desk[0]),
			m.letIn(m.Desk[0])}
	}
	d.complete(c, m)
	msg, err := d.finishMail(c, m, by, auto)
	if err != nil {
		return Case{}, err
	}
	m.Approved, m.Seen = by, nil
	if !auto {
		m.Hand = by
	}
	c.Why = ""
	c.move(Approved, by, "to "+m.To.Address, d.now())
	if err := d.commit(now, c, len(c.Mails)-1, *m, msg); err != nil {
		return Case{}, err
	}
	d.step("approved")
	d.poke()
	return *c.clone(), nil
}

// minDigest is how many digits of a digest stand for all of it.
const minDigest = 12

// isDigest reports whether given, which a person has typed, stands for a
// digest.
func isDigest(given, digest string) bool {
	return len(given) >= minDigest && strings.HasPrefix(digest, strings.ToLower(given))
}

// seenBy says what stands against a person approving the mail as it is: nil if
// it is the one that this person names or was shown.
func (m *Mail) seenBy(c *Case, by, digest string) *Refusal {
	again := "look at it with `smtpguard reports show " + c.ID + "` first; a script passes --digest, which is there"
	switch digest = strings.ToLower(digest); {
	case digest != "" && !isDigest(digest, m.Digest):
		return &Refusal{"the draft is not the one with that digest (any more)", again}
	case digest != "" || m.Seen[by] == m.Digest:
		return nil
	case m.Seen[by] == "":
		return &Refusal{by + " has not seen it", again}
	}
	return &Refusal{fmt.Sprintf("it has changed since %s saw it (%s, by %s)", by, utc(c.lastMove()), c.lastBy()), again}
}

// approveAuto approves what Config.Auto lets pass.
func (d *Desk) approveAuto(ctx context.Context) {
	if d.config.Mode != Auto {
		return
	}
	var ids []string
	d.mu.Lock()
	for _, c := range d.cases {
		if c.State != Drafted {
			continue
		}
		if why := d.waits(c); why != "" {
			d.sayWaits(c, why)
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
			d.tell(id, err.Error(), func() { d.log.Info("a report waits for a person", "report", id, "why", err) })
		}
	}
}

// where says in which state a case is, and why if that is known.
func (c *Case) where() string {
	s := fmt.Sprintf("%s is %s", c.ID, c.State)
	if c.Why != "" {
		s += " (" + c.Why + ")"
	}
	return s
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
	var evidence Archive
	if m := now.mail(); m != nil {
		evidence = m.Archive
	}
	d.mu.Unlock()
	spoilt := d.checkArchive(evidence) // which may be long

	d.mu.Lock()
	if now, err = d.get(id); err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	if now.State == Doubtful && o.Again {
		if err := d.deny(now, by); err != nil {
			d.mu.Unlock()
			return Case{}, err
		}
	}
	d.learn(now) // now that it is none that has left
	if now.State != Approved {
		state, where := now.State, now.where()
		d.mu.Unlock()
		if state == Doubtful {
			return Case{}, fmt.Errorf("%w: %s", ErrDoubtful, now.Why)
		}
		return Case{}, fmt.Errorf("%w: %s; approved ones are sent", ErrState, where)
	}
	c := now.clone()
	m := c.mail()
	// What was right when it was approved may not be so now.
	if _, err := d.overridden(); err != nil {
		d.mu.Unlock()
		return *c, fmt.Errorf("%w: %w", ErrHeld, err)
	}
	r := d.barred(c, m)
	if r == nil && m.Approved == Self {
		r = d.waitsStill(c)
	}
	if r == nil && spoilt != nil && m.Archive == evidence {
		r = &Refusal{"its evidence is not what it says: " + clean(spoilt.Error(), 200), "a draft is made anew of what the log holds; approve that one"}
		m.Outdated = true
	}
	if r != nil {
		if r, err = d.without(now, r); now.State == Drafted {
			d.mu.Unlock()
			return Case{}, errors.Join(r, err)
		}
		err = r
		m.Approved, c.Why = "", r.Why
		c.move(Drafted, Self, "not sent: "+r.Why, d.now())
		if serr := d.save(c); serr == nil {
			*now = *c
		} else {
			err = errors.Join(err, serr)
		}
		d.mu.Unlock()
		return Case{}, err
	}
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
	if to := d.config.Redirect; to != "" {
		d.mu.Unlock()
		return d.redirect(ctx, id, by, to)
	}
	msg, err := d.stored(c)
	if err != nil {
		d.mu.Unlock()
		return Case{}, err
	}
	// Written down before it is handed over: whatever happens from here on,
	// it is known that it may have been sent.
	m.attempt(Attempt{Begun: d.now(), Rcpt: rcpt})
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
	switch tries := m.tries(); {
	case what == taken:
		m.SentAt = d.now()
		c.Why = ""
		note := "the mail server has taken it"
		if herr != nil { // not for the copy
			at.Rcpt = at.Rcpt[:1]
			c.note("the copy was not taken: " + herr.Error())
			note += ", but not the copy"
		}
		c.move(Sent, by, note, d.now())
	case what == rejected, what == refused && tries >= maxTries:
		c.Why = "the mail server refused it for good: " + clean(herr.Error(), 300)
		if what == refused {
			c.Why = fmt.Sprintf("not sent in %d attempts: %s", tries, clean(herr.Error(), 300))
		}
		m.Approved = ""
		c.move(Drafted, by, c.Why, d.now())
		result = &Refusal{c.Why, "mend the cause, look at it and approve it again"}
	case what == refused:
		c.Why = "not sent: " + clean(herr.Error(), 300)
		c.move(Approved, by, c.Why, d.now())
		result = fmt.Errorf("%s was not sent: %w", c.ID, herr)
	default:
		c.Why = "it may have been sent or not (" + clean(herr.Error(), 200) + "); look for Message-ID <" + m.MessageID + "> in the mail server's log"
		c.move(Doubtful, by, c.Why, d.now())
		result = fmt.Errorf("%w: %s", ErrDoubtful, c.Why)
	}
	if c.arrived(d.now()); c.State != Doubtful && errors.Is(result, ErrDoubtful) {
		result = nil
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

// maxTries is how often a mail that is refused for now is handed over again,
// ever more rarely: for about 29 hours. Then a person looks.
const maxTries = 20

// maxAttempts is how many handovers are remembered; those that may have left
// always are.
const maxAttempts = 60

func (m *Mail) attempt(a Attempt) {
	if len(m.Attempts) >= maxAttempts {
		if i := slices.IndexFunc(m.Attempts, func(a Attempt) bool { return !a.mayHaveLeft() }); i >= 0 {
			m.Attempts = slices.Delete(m.Attempts, i, i+1)
		}
	}
	m.Attempts = append(m.Attempts, a)
}

// mayHaveLeft reports whether the recipients may have got it: also while it is
// under way, and after a crash.
func (a Attempt) mayHaveLeft() bool {
	return !a.Trial && a.Denied == "" && !strings.HasPrefix(a.Result, string(refused)) && !strings.HasPrefix(a.Result, string(rejected))
}

// to reports whether an address was one of its recipients.
func (a Attempt) to(addr string) bool {
	return slices.ContainsFunc(a.Rcpt, func(r string) bool { return sameAddr(r, addr) })
}

// tries is how often the mail was refused since something else came of it.
func (m *Mail) tries() (n int) {
	for _, a := range m.Attempts {
		switch {
		case a.Trial:
		case strings.HasPrefix(a.Result, string(refused)):
			n++
		default:
			n = 0
		}
	}
	return n
}

// deny notes a person's word that a doubtful mail did not leave: it is approved
// as before. d.mu is held.
func (d *Desk) deny(now *Case, by string) error {
	c := now.clone()
	m := c.mail()
	for i := range m.Attempts {
		if a := &m.Attempts[i]; a.mayHaveLeft() && !strings.HasPrefix(a.Result, string(taken)) {
			a.Denied = by
		}
	}
	c.Why = ""
	c.move(Approved, by, "it did not leave", d.now())
	if err := d.save(c); err != nil {
		return err
	}
	*now = *c
	return nil
}

// trialHeader marks a copy that went to somebody else than the recipients.
const trialHeader = "X-Smtpguard-Trial"

// redirected puts another recipient into the header of a message, and the
// real ones into one of their own. It is another mail: what is said of it, a
// bounce among that, is not said of the real one.
func redirected(msg []byte, to string) []byte {
	head, body, _ := bytes.Cut(msg, []byte("\r\n\r\n"))
	var out bytes.Buffer
	for line := range bytes.SplitSeq(head, []byte("\r\n")) {
		name, value, _ := bytes.Cut(line, []byte(": "))
		switch string(name) {
		case "To", "Cc":
			fmt.Fprintf(&out, "X-Smtpguard-Would-%s: %s\r\n", name, value)
		case "Message-ID":
			_, domain, _ := bytes.Cut(bytes.TrimSuffix(value, []byte(">")), []byte("@"))
			fmt.Fprintf(&out, "Message-ID: <%s@%s>\r\n", newUUID(), domain)
		default:
			out.Write(line)
			out.WriteString("\r\n")
		}
	}
	out.WriteString("To: " + to + "\r\n" + trialHeader + ": yes\r\n\r\n")
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
	if m := c.mail(); m != nil && c.State != Queued && d.cases[c.ID] == c {
		m.attempt(attempt)
		err = d.save(c)
	}
	if herr != nil {
		herr = fmt.Errorf("the trial to %s: %w", to, herr)
	}
	return *c.clone(), errors.Join(herr, err)
}

// redirect sends an approved mail to Config.Redirect in place of the desk, which
// has not got it then: the mail is a draft again, that a person may approve when
// the redirection is gone.
func (d *Desk) redirect(ctx context.Context, id, by, to string) (Case, error) {
	c, fault := d.trial(ctx, id, by, to)
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil || now.State != Approved {
		return c, errors.Join(fault, err)
	}
	next := now.clone()
	m := next.mail()
	m.Approved, m.Tried = "", to
	next.Why = fmt.Sprintf("reports.redirect sent it to %s; no desk has it: approve it again when reports.redirect is gone", to)
	if fault != nil {
		next.Why = clean("not sent by reports.redirect: "+fault.Error(), 300)
	}
	next.move(Drafted, by, next.Why, d.now())
	if err := d.save(next); err != nil {
		return c, errors.Join(fault, err)
	}
	*now = *next
	return *now.clone(), fault
}

// capped says which cap stands against a mail, "" if none. d.mu is held.
func (d *Desk) capped(c *Case, rcpt []string) string {
	now := d.now()
	hour, day := 0, 0
	for _, o := range d.cases {
		for _, m := range o.Mails {
			for _, a := range m.Attempts {
				if !a.mayHaveLeft() {
					continue
				}
				age := now.Sub(a.Begun)
				if age < time.Hour {
					hour++
				}
				if age < 24*time.Hour {
					day++
				}
				if age < d.config.Caps.Recipient {
					for _, r := range rcpt {
						if a.to(r) {
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
		n, last := m.tries(), time.Time{}
		for _, a := range m.Attempts {
			if !a.Trial {
				last = a.Ended
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
			d.tell(c.ID, "", nil)
			d.log.Info("a report is sent", "report", c.ID, "to", c.mail().To.Address)
		case errors.Is(err, ErrHeld):
		default:
			d.tell(c.ID, err.Error(), func() { d.log.Error("a report was not sent", "report", c.ID, "err", err) })
		}
	}
}

// CloseCase ends a case: nothing more is expected of it.
func (d *Desk) CloseCase(id, by, note string) (Case, error) { return d.end(id, by, note, Closed) }

// Withdraw ends a case that should not be reported, and keeps its network from
// being reported by itself for Config.Withdrawn; Reopen takes that back.
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
	if to == Withdrawn && by != Self { // first: it says what must not happen
		w := Withdrawal{Network: c.Network, Case: c.ID, By: clean(by, 100), Note: clean(note, 200), At: d.now(), Until: d.now().Add(d.config.Withdrawn)}
		if c.Certain {
			w.AS = c.AS
		}
		if err := d.setWithdrawn(append(slices.Clone(d.withdrawn), w)); err != nil {
			return Case{}, err
		}
		c.Why = w.String() + ", or `smtpguard reports reopen " + c.ID + "`"
	}
	c.move(to, by, note, d.now())
	if err := d.save(c); err != nil {
		return Case{}, err
	}
	*now = *c
	return *c.clone(), nil
}
