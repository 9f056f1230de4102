package abuse

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// retryAfter is when a draft that could not be made is tried again: each time
// the logs are read.
const retryAfter = 15 * time.Minute

func mailKey(c *Case, i int) string { return c.ID + "/" + strconv.Itoa(i) }

func (d *Desk) path(name string) string { return filepath.Join(d.config.Dir, filepath.Base(name)) }

func (d *Desk) emlPath(c *Case, i int) string {
	return d.path(c.ID + "-" + strconv.Itoa(i+1) + ".eml")
}

func (d *Desk) rawPath(c *Case, i int) string {
	return d.path(c.ID + "-" + strconv.Itoa(i+1) + "-lookup.json")
}

// stored is the message of the newest mail.
func (d *Desk) stored(c *Case) ([]byte, error) {
	if c.mail() == nil {
		return nil, nil
	}
	return d.o.Store.Record(kindMail, mailKey(c, len(c.Mails)-1))
}

// prepare makes drafts of cases: lookups first, for they may join cases; then
// one reading of the logs for all; then the texts.
func (d *Desk) prepare(ctx context.Context, due []string) {
	if len(due) == 0 {
		return
	}
	d.preparing.Lock()
	defer d.preparing.Unlock()
	overrides := d.overrides()
	found := map[string]finding{}
	var ready []*Case
	d.mu.Lock()
	made := d.draftsToday()
	d.mu.Unlock()
	for _, id := range due {
		if ctx.Err() != nil {
			return
		}
		d.mu.Lock()
		now := d.cases[id]
		if now == nil || now.MergedInto != "" || len(now.live()) == 0 {
			d.mu.Unlock()
			continue
		}
		fresh := now.State != Drafted // a new mail, not one made anew
		if fresh {
			if made >= d.config.Caps.Drafts {
				d.hold(id, fmt.Sprintf("%d drafts were made within a day, as many as reports.caps.drafts allows", d.config.Caps.Drafts))
				d.mu.Unlock()
				continue
			}
			made++
		}
		c := now.clone()
		d.mu.Unlock()
		f := d.lookups.find(ctx, busiest(c), c.Network, overrides)
		if c = d.settle(id, f); c != nil {
			found[id] = f
			ready = append(ready, c)
		} else if fresh {
			made--
		}
	}
	if len(ready) == 0 {
		return
	}
	// Joined cases have grown since they were copied.
	d.mu.Lock()
	for i, c := range ready {
		if now := d.cases[c.ID]; now != nil {
			ready[i] = now.clone()
		}
	}
	d.mu.Unlock()
	facts, archives := d.gather(ctx, ready)
	if ctx.Err() != nil {
		return
	}
	for i, c := range ready {
		if err := d.draft(ctx, c, found[c.ID], facts[i], archives[i]); err != nil {
			d.log.Error("a report could not be drafted", "report", c.ID, "err", err)
			d.mu.Lock()
			d.retry[c.ID] = d.now().Add(retryAfter)
			d.hold(c.ID, "the draft could not be made: "+err.Error())
			d.mu.Unlock()
		}
	}
}

// hold notes why a draft that is due is not made; d.mu is held.
func (d *Desk) hold(id, why string) {
	c := d.cases[id]
	if c == nil || c.State == Held && c.Why == why || c.State != Gathering && c.State != Held {
		return
	}
	c.Why = clean(why, 300)
	c.move(Held, Self, why, d.now())
	if err := d.save(c); err != nil {
		d.log.Error("a report is not written down", "err", err)
	}
}

func (d *Desk) overrides() []Override {
	if d.config.Overrides == "" {
		return nil
	}
	text, err := readBounded(d.config.Overrides, maxBody)
	if err == nil {
		var all []Override
		if all, err = ParseOverrides(text); err == nil {
			return all
		}
		d.log.Error("the overrides file has faults; its other lines are used", "file", d.config.Overrides, "err", err)
		return all
	}
	d.log.Error("the overrides file is not used", "err", err)
	return nil
}

// busiest is an address of the case to ask about: the source that weighs most.
func busiest(c *Case) netip.Addr {
	best := netip.Addr{}
	most := -1
	for _, r := range c.live() {
		if v := r.Verdict; v != nil && v.Opens+v.Refused > most {
			best, most = r.Prefix.Addr(), v.Opens+v.Refused
			if len(v.Evidence) > 0 && r.Prefix.Contains(v.Evidence[0].Source) {
				best = v.Evidence[0].Source
			}
		}
	}
	return best
}

// settle gives a case the network that was found, and joins cases that turn
// out to be of the same one. It returns a copy, nil if the case was joined to
// another or has gone.
func (d *Desk) settle(id string, f finding) *Case {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cases[id]
	if c == nil || c.MergedInto != "" {
		return nil
	}
	if f.origin.AS == 0 || !f.origin.Prefix.IsValid() {
		return c.clone()
	}
	outside := slices.ContainsFunc(c.prefixes(), func(p netip.Prefix) bool {
		return !f.origin.Prefix.Contains(p.Addr()) || p.Bits() < f.origin.Prefix.Bits()
	})
	if outside { // a /24 case of several announcements: it stays what it is
		return c.clone()
	}
	if was := (origin{c.AS, c.Network}); !c.Certain {
		d.assumed[was] = slices.DeleteFunc(d.assumed[was], func(o *Case) bool { return o == c })
	}
	c.AS, c.Network, c.Certain = f.origin.AS, f.origin.Prefix, true
	d.index(c)
	for _, o := range d.cases {
		if o == c || o.Kind != c.Kind || !o.open(d.now(), d.config.Quiet) || o.Certain && (o.AS != c.AS || o.Network != c.Network) {
			continue
		}
		if !o.Certain && (o.State != Gathering && o.State != Held || slices.ContainsFunc(o.prefixes(), func(p netip.Prefix) bool {
			return !c.Network.Contains(p.Addr()) || p.Bits() < c.Network.Bits()
		})) {
			continue
		}
		// The one that has a draft already takes the other.
		into, from := c, o
		if o.Certain && len(o.Mails) > 0 && len(c.Mails) == 0 {
			into, from = o, c
		} else if len(o.Mails) > 0 {
			continue
		}
		if err := d.join(into, from); err != nil {
			d.log.Error("two reports of one network stay apart", "err", err)
			continue
		}
		if from == c {
			return nil
		}
	}
	if err := d.save(c); err != nil {
		d.log.Error("a report is not written down", "err", err)
	}
	return c.clone()
}

// join moves the blocks of one case into another; d.mu is held. The target is
// written first: a block in both is known by its ID.
func (d *Desk) join(into, from *Case) error {
	for _, r := range from.Blocks {
		if slices.ContainsFunc(into.Blocks, func(o Ref) bool { return o.ID == r.ID }) {
			continue
		}
		last := into.LastID
		into.LastID = 0
		into.take(Block(r))
		into.LastID = max(last, r.ID)
	}
	if err := d.save(into); err != nil {
		return err
	}
	from.MergedInto = into.ID
	from.Why = "it has the same network as " + into.ID
	from.move(Withdrawn, Self, from.Why, d.now())
	return d.save(from)
}

// gather reads the logs once for all cases.
func (d *Desk) gather(ctx context.Context, cases []*Case) ([]Facts, []Archive) {
	facts := make([]Facts, len(cases))
	archives := make([]Archive, len(cases))
	for i, c := range cases {
		facts[i] = fromVerdicts(c)
	}
	if d.o.Logs == nil || len(cases) == 0 {
		return facts, archives
	}
	ctx, cancel := context.WithTimeout(ctx, scanTimeout)
	defer cancel()
	ks := make([]*collector, len(cases))
	var from, to time.Time
	for i, c := range cases {
		k := newCollector(c)
		a, err := newArchiver(d.config.Dir, fmt.Sprintf("%s-%d-evidence.log.gz", c.ID, draftNumber(c)+1))
		if err != nil {
			d.log.Error("the evidence is not kept", "report", c.ID, "err", err)
		} else {
			k.archive = a
		}
		ks[i] = k
		if begin := k.from.Add(-d.config.Baseline); from.IsZero() || begin.Before(from) {
			from = begin
		}
		if k.to.After(to) {
			to = k.to
		}
	}
	reach, err := d.o.Logs.Scan(ctx, from, to, func(ev *detector.Event, line []byte) error {
		for _, k := range ks {
			k.observe(ev, line)
		}
		return ctx.Err()
	})
	if err != nil {
		d.log.Error("the log could not be read for evidence; the detector's numbers are used", "err", err)
	}
	for i, k := range ks {
		if k.archive != nil {
			a, aerr := k.archive.close()
			if aerr != nil {
				d.log.Error("the evidence is not kept", "report", cases[i].ID, "err", aerr)
			} else if err == nil {
				archives[i] = a
			}
		}
		if err != nil {
			continue
		}
		if f := k.facts(reach, d.config.Baseline); f.Connections > 0 {
			facts[i] = f
		}
	}
	return facts, archives
}

// draftNumber is the index of the mail that a draft of c is: the one there is,
// or the next one.
func draftNumber(c *Case) int {
	if c.State == Drafted {
		return len(c.Mails) - 1
	}
	return len(c.Mails)
}

// draft writes the mail of a case and puts it down, unless the case has moved
// on meanwhile.
func (d *Desk) draft(ctx context.Context, was *Case, f finding, facts Facts, archive Archive) error {
	c := was
	m := Mail{ReportID: newUUID(), Made: d.now(), LastID: c.LastID, Facts: facts, Archive: archive,
		To: f.to, Cc: f.cc, Others: f.others, Origin: f.origin, Warnings: f.warnings, Format: d.config.Format}
	i := draftNumber(c)
	if i < len(c.Mails) { // made anew: the same mail for all who know its ID
		old := c.Mails[i]
		m.ReportID, m.MessageID, m.InReplyTo, m.References, m.Made = old.ReportID, old.MessageID, old.InReplyTo, old.References, old.Made
		c.Mails = c.Mails[:i]
	} else if i > 0 {
		prev := c.Mails[i-1]
		m.InReplyTo = prev.MessageID
		m.References = append(slices.Clone(prev.References), prev.MessageID)
	}
	d.complete(c, &m, f)
	d.checkDesk(ctx, c, &m)
	c.Mails = append(c.Mails, m)
	msg, err := d.finishMail(c, c.mail(), "", false)
	if err != nil {
		return err
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.cases[c.ID]
	if now == nil || now.State != was.State || now.mail() != nil && was.State == Drafted && (now.mail().Edited != "" || now.lastBy() != Self) || now.MergedInto != "" {
		return nil // a person, or a joining, came first
	}
	if err := d.put(now, i, *c.mail(), msg); err != nil {
		return err
	}
	if len(f.raw) > 0 { // where the contacts come from, as it came
		raw := map[string]json.RawMessage{}
		for source, body := range f.raw {
			if json.Valid(body) {
				raw[source] = body
			}
		}
		text, err := json.MarshalIndent(raw, "", " ")
		if err == nil {
			err = writeFile(d.rawPath(c, i), text)
		}
		if err != nil {
			d.log.Error("the answers of the lookup are not kept", "report", c.ID, "err", err)
		}
	}
	now.Why = ""
	note := "drafted"
	switch {
	case m.To.Address == "":
		now.Why = "contact missing"
		note = "drafted; contact missing"
	case was.State == Drafted:
		note = "drafted anew: more blocks came"
	}
	now.move(Drafted, Self, note, d.now())
	if err := d.save(now); err != nil {
		return err
	}
	d.log.Info("a report is drafted", "report", now.ID, "network", now.Network.String(), "to", m.To.Address, "why", now.Why)
	return nil
}

// put writes a mail's message down and the mail into the case, which the
// caller saves; d.mu is held.
func (d *Desk) put(c *Case, i int, m Mail, msg []byte) error {
	if err := d.o.Store.SetRecord(kindMail, mailKey(c, i), msg); err != nil {
		return fmt.Errorf("writing the mail of %s down: %w", c.ID, err)
	}
	if i < len(c.Mails) {
		c.Mails[i] = m
	} else {
		c.Mails = append(c.Mails, m)
	}
	// The file is a copy for people; the store has the one that is sent.
	if err := writeFile(d.emlPath(c, i), msg); err != nil {
		d.log.Error("the draft is not written as a file", "report", c.ID, "err", err)
	}
	return nil
}

// complete fills in what follows from the rest.
func (d *Desk) complete(c *Case, m *Mail, f finding) {
	domain := "localhost.invalid"
	m.From, m.Return = "", ""
	if a, err := d.config.sender(); err == nil && d.config.From != "" {
		m.From = a.Address
		domain = domainOf(a.Address)
	}
	if m.MessageID == "" || strings.HasSuffix(m.MessageID, "@localhost.invalid") {
		m.MessageID = m.ReportID + "@" + domain
	}
	m.Return = m.From
	if d.config.ReturnPath != "" {
		m.Return = strings.Replace(d.config.ReturnPath, tokenMark, c.Token, 1)
	}
	if m.To.Format != "" {
		m.Format = m.To.Format
	}
	warn := func(format string, args ...any) { m.Warnings = append(m.Warnings, fmt.Sprintf(format, args...)) }
	if m.To.Address == "" {
		warn("contact missing: name one with `reports edit --to`, or fill the overrides file")
	}
	if bad, until := d.bad(m.To.Address); bad {
		warn("%s bounced lately and is not written to before %s", m.To.Address, until.UTC().Format("2006-01-02"))
	}
	if m.To.Form != "" {
		warn("this desk prefers its form: %s", m.To.Form)
	}
	if m.Origin.Disputed {
		warn("the origin is disputed: %s", asList(append([]uint32{}, m.Origin.ASes...)))
	}
	if m.Origin.NotAsked != "" {
		warn("origin: %s", m.Origin.NotAsked)
	}
	if f.override != nil && f.override.Never {
		warn("the overrides file says never to report this network")
		m.To, m.Cc = Contact{Note: "never, by the overrides file"}, Contact{}
	}
	if m.Facts.Spared > 0 {
		warn("%s inside the blocked networks delivered mail or logged in and are not reported", plural(m.Facts.Spared, "source", "sources"))
	}
	if !m.Facts.FromLog {
		warn("no log line was found: the numbers are the detector's")
	}
	if m.Archive.Lines > 0 || m.Facts.FromLog {
		warn("left out of every line: host names, HELO, ident, users, senders, recipients, subjects, message and process ids")
	}
	m.Subject = subject(c, m)
}

// finishMail makes the message and notes its digest.
func (d *Desk) finishMail(c *Case, m *Mail, by string, auto bool) ([]byte, error) {
	m.Without = ""
	if _, err := d.xarf(c, m); err != nil {
		m.Without = err.Error()
	}
	text := m.Text
	if m.Edited == "" {
		text = d.text(c, m)
	}
	msg, err := d.message(c, m, text, by, auto, d.now())
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(msg)
	m.Digest, m.Size = hex.EncodeToString(sum[:]), len(msg)
	return msg, nil
}

// checkDesk looks whether the recipients' own mail servers are blocked here:
// then their answers and bounces cannot reach us.
func (d *Desk) checkDesk(ctx context.Context, c *Case, m *Mail) {
	if !d.config.Lookup.Online {
		return
	}
	domains := map[string]bool{}
	for _, a := range []string{m.To.Address, m.Cc.Address} {
		if a != "" {
			domains[domainOf(a)] = true
		}
	}
	for _, domain := range slices.Sorted(maps.Keys(domains)) {
		addrs, err := d.lookups.mailServers(ctx, domain)
		if err != nil {
			m.Warnings = append(m.Warnings, clean(err.Error(), 200))
			continue
		}
		for _, a := range addrs {
			in := slices.ContainsFunc(c.prefixes(), func(p netip.Prefix) bool { return p.Contains(a) })
			if d.o.Blocked != nil {
				_, b := d.o.Blocked(a)
				in = in || b
			}
			if in && !slices.Contains(m.Desk, a) {
				m.Desk = append(m.Desk, a)
				m.Warnings = append(m.Warnings, fmt.Sprintf("the mail server of %s (%s) is inside what we block: its answers cannot reach us; `smtpguard allow add %s` exempts it", domain, a, a))
			}
		}
	}
}

// bad reports whether an address bounced for good lately.
func (d *Desk) bad(addr string) (bool, time.Time) {
	if addr == "" {
		return false, time.Time{}
	}
	v, err := d.o.Store.Record(kindBad, addr)
	if err != nil || len(v) == 0 {
		return false, time.Time{}
	}
	until, err := time.Parse(time.RFC3339, string(v))
	return err == nil && d.now().Before(until), until
}
