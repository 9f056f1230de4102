package abuse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/gaissmai/bart"

	"github.com/smtpguard/smtpguard/detector"
)

// retryAfter is when a draft that could not be made is tried again: each time
// the logs are read.
const retryAfter = 15 * time.Minute

func (d *Desk) path(name string) string { return filepath.Join(d.config.Dir, filepath.Base(name)) }

func (d *Desk) emlPath(c *Case, i int) string {
	return d.path(c.ID + "-" + strconv.Itoa(i+1) + ".eml")
}

func (d *Desk) rawPath(c *Case, i int) string {
	return d.path(c.ID + "-" + strconv.Itoa(i+1) + "-lookup.json")
}

// Bounds of what is looked up, whatever a flood looks like.
const (
	roundLookups = 60 // networks in one round of drafts; the others in the next
	perDraft     = 25 // networks in a day, for each of Caps.Drafts
)

// prepare makes drafts of cases: who announces them first, for that may join
// cases, then whom to write to, then one reading of the logs for all, then the
// texts.
func (d *Desk) prepare(ctx context.Context, due []string) {
	if len(due) == 0 {
		return
	}
	d.preparing.Lock()
	defer d.preparing.Unlock()
	overrides, _ := d.overridden()
	found := map[string]finding{}
	var ready []*Case
	d.mu.Lock()
	made := d.draftsToday()
	d.mu.Unlock()
	for n, id := range due {
		if ctx.Err() != nil {
			return
		}
		d.mu.Lock()
		now := d.cases[id]
		if now == nil || now.MergedInto != "" || !now.alive() {
			d.mu.Unlock()
			continue
		}
		if now.State == Drafted && (now.mail().Hand != "" || !now.asks(d.now())) { // a person has put a hand on it, or nothing is missing
			ready = append(ready, now.clone())
			d.mu.Unlock()
			continue
		}
		if now.Certain && d.waitsForPerson(now) {
			d.mu.Unlock()
			continue
		}
		fresh := now.State != Drafted // a new mail, not one made anew
		why := ""
		switch {
		case fresh && made >= d.config.Caps.Drafts:
			why = fmt.Sprintf("%d drafts were made within a day, as many as reports.caps.drafts allows", d.config.Caps.Drafts)
		case d.config.Lookup.Online && !d.mayAsk():
			why = fmt.Sprintf("%d networks were looked up within a day, %d for each of reports.caps.drafts", d.config.Caps.Drafts*perDraft, perDraft)
		}
		if why != "" {
			if fresh {
				d.hold(id, why)
			} else { // with the recipients that it has
				ready = append(ready, now.clone())
			}
			d.mu.Unlock()
			continue
		}
		c := now.clone() // not before: thousands may be held
		d.mu.Unlock()
		if n >= roundLookups && d.config.Lookup.Online {
			d.poke()
			break
		}
		lctx, cancel := context.WithTimeout(ctx, d.config.Lookup.Total)
		a := busiest(c)
		var f finding
		d.lookups.findOrigin(lctx, a, &f)
		if d.waitsForOrigin(id, f) {
			cancel()
			continue
		}
		nctx, ncancel := context.WithTimeout(lctx, d.config.Lookup.Total/3) // the contacts need some of the time
		d.findNeighbours(nctx, c, f.origin)
		ncancel()
		if c = d.settle(id, f, overrides); c != nil && !d.heldBack(id) {
			d.lookups.findContacts(lctx, c.next().prefixes(), overrides, &f)
			if d.found(id, f) {
				found[id] = f
				ready = append(ready, c)
				if fresh {
					made++
				}
			}
		}
		cancel()
	}
	if len(ready) == 0 {
		return
	}
	// Joined cases have grown since they were copied.
	d.mu.Lock()
	still := ready[:0]
	for _, c := range ready { // without those that a person has moved on
		if now := d.cases[c.ID]; now != nil && now.State == c.State && now.MergedInto == "" {
			still = append(still, now.clone())
		}
	}
	ready = still
	d.mu.Unlock()
	if len(ready) == 0 {
		return
	}
	facts, archives := d.gather(ctx, ready)
	if ctx.Err() != nil {
		return
	}
	for i, c := range ready {
		var f *finding
		if got, ok := found[c.ID]; ok {
			f = &got
		}
		if err := d.draft(ctx, c, f, facts[i], archives[i]); err != nil {
			d.log.Error("a report could not be drafted", "report", c.ID, "err", err)
			d.mu.Lock()
			d.retry[c.ID] = d.now().Add(retryAfter)
			d.hold(c.ID, "the draft could not be made: "+err.Error())
			d.mu.Unlock()
		}
	}
}

// found notes what a lookup gave. It reports whether there is a draft to make
// of it: not where one is there already and the answer is still missing.
func (d *Desk) found(id string, f finding) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cases[id]
	if c == nil {
		return false
	}
	d.askAgain(c, f)
	if err := d.save(c); err != nil {
		d.log.Error("a report is not written down", "err", err)
	}
	m := c.mail()
	return c.State != Drafted || m.Outdated || c.LastID > m.LastID || f.unanswered == ""
}

// mayAsk counts one more network that is looked up; d.mu is held.
func (d *Desk) mayAsk() bool {
	now := d.now()
	d.asked = slices.DeleteFunc(d.asked, func(t time.Time) bool { return now.Sub(t) >= 24*time.Hour })
	if len(d.asked) >= d.config.Caps.Drafts*perDraft {
		return false
	}
	d.asked = append(d.asked, now)
	return true
}

// findNeighbours asks for the origins of what else gathers inside a network
// that was found, the largest first, so that settle can join what belongs
// together: lying inside it is not enough.
func (d *Desk) findNeighbours(ctx context.Context, c *Case, o Origin) {
	if o.AS == 0 || !o.Prefix.IsValid() || !d.config.Lookup.Online {
		return
	}
	var near []*Case
	d.mu.Lock()
	for _, n := range d.cases {
		if n.ID != c.ID && !n.Certain && (n.State == Gathering || n.State == Held) && n.open(d.now(), d.config.Quiet) &&
			n.Network != c.Network && o.Prefix.Overlaps(n.Network) && d.lookups.known(n.Network.Addr()).AS == 0 {
			near = append(near, n.clone())
		}
	}
	slices.SortFunc(near, func(a, b *Case) int { return b.Connections - a.Connections })
	for i := range near {
		if i >= roundLookups || !d.mayAsk() {
			near = near[:i]
			break
		}
	}
	d.mu.Unlock()
	for _, n := range near {
		if ctx.Err() != nil {
			return
		}
		var f finding
		d.lookups.findOrigin(ctx, busiest(n), &f)
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

// settle gives a case the network that was found, joins cases that are known
// to be of the same one, and puts what lies outside it into cases of its own.
// It returns a copy, nil if there is nothing to draft: the case was joined to
// another, has gone, or is of those that are never reported.
func (d *Desk) settle(id string, f finding, overrides []Override) *Case {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cases[id]
	if c == nil || c.MergedInto != "" {
		return nil
	}
	n := len(c.Blocks)
	if why := d.leaveOut(c, f.origin, overrides); why != "" {
		if len(c.Blocks) == n { // nothing else is there
			c.Why = why
			c.move(Withdrawn, Self, why, d.now())
		}
		if err := d.save(c); err != nil {
			d.log.Error("a report is not written down", "err", err)
		}
		if c.State == Withdrawn {
			return nil
		}
	}
	if f.origin.AS == 0 || !f.origin.Prefix.IsValid() {
		return c.clone()
	}
	inside := func(p netip.Prefix) bool {
		return f.origin.Prefix.Contains(p.Addr()) && p.Bits() >= f.origin.Prefix.Bits()
	}
	if all := c.prefixes(); slices.ContainsFunc(all, func(p netip.Prefix) bool { return !inside(p) }) {
		// A block that is wider than the announcement, or a mail that tells of
		// all: it stays what it is.
		if len(c.Mails) > 0 || slices.ContainsFunc(all, func(p netip.Prefix) bool { return !inside(p) && f.origin.Prefix.Overlaps(p) }) || !slices.ContainsFunc(all, inside) {
			return c.clone()
		}
	}
	if was := (origin{c.AS, c.Network}); !c.Certain {
		d.assumed[was] = slices.DeleteFunc(d.assumed[was], func(o *Case) bool { return o == c })
	}
	c.AS, c.Network, c.Certain = f.origin.AS, f.origin.Prefix, true
	d.index(c)
	if err := d.split(c, inside); err != nil {
		d.log.Error("a report of several networks stays one", "report", c.ID, "err", err)
	}
	for _, o := range d.cases {
		if o == c || o.Kind != c.Kind || !o.open(d.now(), d.config.Quiet) || o.Certain && (o.AS != c.AS || o.Network != c.Network) {
			continue
		}
		if !o.Certain && (!o.joins() || slices.ContainsFunc(o.prefixes(), func(p netip.Prefix) bool {
			return !inside(p) || !c.has(p, d.lookups.known(p.Addr()))
		})) {
			continue
		}
		// The one that a person knows, or that has a draft already, takes the
		// other.
		into, from := c, o
		if o.Certain && c.joins() && (!o.joins() || len(o.Mails) > len(c.Mails)) {
			into, from = o, c
		}
		if into.State.out() && len(from.Mails) > 0 { // what has left does not tell of it
			continue
		}
		if !from.joins() {
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

// split moves the blocks of c that are not inside its network into cases of
// their own; d.mu is held. Those are written first: a block in both is known
// by its ID.
func (d *Desk) split(c *Case, inside func(netip.Prefix) bool) error {
	var faults []error
	moved := map[uint64]bool{}
	touched := map[*Case]bool{}
	for _, r := range c.Blocks {
		if inside(r.Prefix) {
			continue
		}
		o := d.caseFor(Block(r), d.lookups.known(r.Prefix.Addr()))
		if o == nil || o == c {
			continue
		}
		o.adopt([]Ref{r})
		touched[o], moved[r.ID] = true, true
	}
	for o := range touched {
		faults = append(faults, d.save(o))
	}
	if err := errors.Join(faults...); err != nil {
		return err
	}
	c.give(func(r Ref) bool { return moved[r.ID] && !inside(r.Prefix) })
	return nil
}

// join moves the blocks of one case into another; d.mu is held. The target is
// written first: a block in both is known by its ID.
func (d *Desk) join(into, from *Case) error {
	into.absorb(from)
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
		facts[i] = fromVerdicts(c.next())
	}
	if d.o.Logs == nil || len(cases) == 0 {
		return facts, archives
	}
	ctx, cancel := context.WithTimeout(ctx, scanTimeout)
	defer cancel()
	hostile := d.hostile()
	ks := make([]*collector, len(cases))
	var from, to time.Time
	for i, c := range cases {
		k := newCollector(c)
		k.hostile = hostile
		a, err := newArchiver(d.config.Dir, fmt.Sprintf("%s-%d-evidence", c.ID, draftNumber(c)+1))
		if err != nil {
			d.log.Error("the evidence is not kept", "report", c.ID, "err", err)
		} else {
			k.archive = a
		}
		ks[i] = k
		if begin := k.began.Add(-d.config.Baseline); from.IsZero() || begin.Before(from) {
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
	var part *Unread
	if errors.As(err, &part) && ctx.Err() == nil {
		d.log.Error("a part of the log could not be read for evidence", "err", err)
		err = nil
	} else if part = nil; err != nil {
		d.log.Error("the log could not be read for evidence; the detector's numbers are used", "err", err)
	}
	for i, k := range ks {
		if k.archive != nil {
			a, aerr := k.archive.close(k.reports)
			if aerr != nil {
				d.log.Error("the evidence is not kept", "report", cases[i].ID, "err", aerr)
			} else if err == nil {
				archives[i] = a
			}
		}
		if err != nil {
			continue
		}
		f := k.facts(reach, d.config.Baseline)
		if part != nil { // the normal level may be in what is missing
			f.Unread, f.Baseline, f.BaselineDays = clean(part.Error(), 300), -1, 0
		}
		if f.Connections > 0 {
			facts[i] = f
		}
	}
	return facts, archives
}

// hostile are all networks that are blocked for a flood, of whatever case:
// what the mail server refused them harmed nobody.
func (d *Desk) hostile() *bart.Lite {
	d.mu.Lock()
	defer d.mu.Unlock()
	t := new(bart.Lite)
	for _, c := range d.cases {
		for _, r := range c.Blocks {
			if !r.Pardoned {
				t.Insert(r.Prefix)
			}
		}
		for _, p := range c.Rest.Networks {
			t.Insert(p)
		}
	}
	return t
}

// next is the case as far as its next draft tells of it: see Case.of.
func (c *Case) next() *Case {
	m := Mail{LastID: c.LastID}
	m.follow(c)
	return c.of(&m)
}

// follow makes m, the next mail of c or its draft made anew, leave out what the
// report before it has told.
func (m *Mail) follow(c *Case) {
	i := draftNumber(c)
	if i > 0 && c.Mails[i-1].replacedBy(c, i) {
		m.AfterID, m.After = c.Mails[i-1].AfterID, c.Mails[i-1].After
	} else if i > 0 {
		m.AfterID, m.After = c.Mails[i-1].LastID, c.Mails[i-1].Facts.Last
	}
}

// replacedBy reports whether the mail with number i stands in place of m, which
// bounced, and so tells the same.
func (m *Mail) replacedBy(c *Case, i int) bool {
	return i < len(c.Mails) && c.Mails[i].Replaces == m.MessageID
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
// on meanwhile. What a person chose or wrote stays; the facts are new. f is what
// a lookup found, nil: nobody was asked, and the recipients stay.
func (d *Desk) draft(ctx context.Context, was *Case, f *finding, facts Facts, archive Archive) error {
	c := was
	m := Mail{ReportID: newUUID(), Made: d.now(), Format: d.config.Format}
	if f != nil {
		m.To, m.Cc, m.Others, m.Origin, m.Warnings = f.to, f.cc, f.others, f.origin, f.warnings
	}
	m.follow(c)
	i := draftNumber(c)
	touched, asked := false, f != nil
	if i < len(c.Mails) { // made anew: the same mail for all who know its ID
		old := c.Mails[i]
		if touched = old.Hand != ""; touched || !asked {
			m = old
			m.narrow(c.next().prefixes())
		} else {
			m.ReportID, m.MessageID, m.InReplyTo, m.References, m.Made, m.Replaces = old.ReportID, old.MessageID, old.InReplyTo, old.References, old.Made, old.Replaces
			m.Tried = old.Tried
			m.keepChoice(&old)
		}
		m.Outdated = false
		c.Mails = c.Mails[:i]
	} else if i > 0 {
		prev := c.Mails[i-1]
		m.InReplyTo = prev.MessageID
		m.References = append(slices.Clone(prev.References), prev.MessageID)
		m.keepChoice(&prev)
	}
	m.Facts, m.Archive, m.LastID = facts, archive, c.LastID
	c.Mails = append(c.Mails, m)
	d.mu.Lock()
	d.complete(c, c.mail())
	d.mu.Unlock()
	if asked && !touched {
		servers, faults := d.deskServers(ctx, m.To.Address, m.Cc.Address)
		c.mail().Servers, c.mail().Warnings = servers, append(c.mail().Warnings, faults...)
	}
	d.warnDesk(c, c.mail())
	msg, err := d.finishMail(c, c.mail(), "", false)
	if err != nil {
		return err
	}

	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.cases[c.ID]
	pardoned := func(c *Case) int { return len(c.Blocks) - len(c.live()) }
	if now == nil || now.State != was.State || now.MergedInto != "" || len(now.History) != len(was.History) || !now.lastMove().Equal(was.lastMove()) || pardoned(now) != pardoned(was) || was.lost(now) {
		if now == nil {
			now = &Case{}
		}
		d.dropArchive(now, archive)
		return nil // a person, or a joining, came first
	}
	next := now.clone()
	next.Why = ""
	note := "drafted"
	switch {
	case m.To.Address == "":
		next.Why = "contact missing"
		note = "drafted; contact missing"
	case touched:
		next.Why = "its numbers are new since a person saw it"
		note = "drafted anew: what it tells has changed"
	case was.State == Drafted:
		note = "drafted anew: more is known"
	}
	next.move(Drafted, Self, note, d.now())
	if err := d.commit(now, next, i, *c.mail(), msg); err != nil {
		return err
	}
	if asked && len(f.raw) > 0 { // where the contacts come from, as it came
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
	d.log.Info("a report is drafted", "report", now.ID, "network", now.Network.String(), "to", m.To.Address, "why", now.Why)
	return nil
}

// lost reports whether a block of the case is not in it any more now.
func (c *Case) lost(now *Case) bool {
	there := make(map[uint64]bool, len(now.Blocks))
	for _, r := range now.Blocks {
		there[r.ID] = true
	}
	return slices.ContainsFunc(c.Blocks, func(r Ref) bool { return !there[r.ID] })
}

// complete fills in what follows from the rest.
func (d *Desk) complete(c *Case, m *Mail) {
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
	for _, r := range []*Contact{&m.To, &m.Cc} {
		if r.Source == byPerson { // who was named for this mail, whatever it tells
			r.Scope = shown(reported(c.of(m)))
		}
	}
	warn := func(format string, args ...any) {
		if s := fmt.Sprintf(format, args...); !slices.Contains(m.Warnings, s) {
			m.Warnings = append(m.Warnings, s)
		}
	}
	m.Warnings = slices.DeleteFunc(m.Warnings, func(s string) bool {
		return strings.HasPrefix(s, missing) && m.To.Address != "" || strings.Contains(s, sparedWarning)
	})
	if m.To.Address == "" && !slices.ContainsFunc(m.Warnings, func(s string) bool { return strings.HasPrefix(s, missing) }) {
		warn(missing + ": name one with `reports edit --to`, or fill the overrides file")
	}
	for _, r := range []Contact{m.To, m.Cc} {
		if bad, until := d.bad(r.Address); bad {
			warn("%s bounced lately and is not written to by itself before %s", r.Address, until.UTC().Format("2006-01-02"))
		}
	}
	if m.Facts.Private {
		warn("the log names this server by a private address, which is left out: the desk cannot find the flow by its destination (is the server behind NAT?)")
	}
	m.warnChosen()
	m.Warnings = slices.DeleteFunc(m.Warnings, func(s string) bool { return strings.HasSuffix(s, ownWarning) })
	for _, r := range []Contact{m.To, m.Cc} {
		if d.config.isOwn(r.Address) {
			warn("%s"+ownWarning, r.Address)
		}
	}
	m.Warnings = slices.DeleteFunc(m.Warnings, func(s string) bool { return strings.Contains(s, withdrewWarning) })
	if w := d.withdrawal(c); w != nil {
		warn("%s", w)
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
	if m.Facts.Spared > 0 {
		warn("%s"+sparedWarning, plural(m.Facts.Spared, "source", "sources"))
	}
	if m.Facts.Unread != "" {
		warn("a part of the log could not be read, so the numbers are lower bounds: %s", m.Facts.Unread)
	}
	if !m.Facts.FromLog {
		warn("no log line was found: the numbers are the detector's")
	} else {
		warn("left out of every line: host names, HELO, ident, users, senders, recipients, subjects, message and process ids")
	}
	m.Subject = subject(c.of(m), m)
}

// sparedWarning is in what is said of proper senders.
const sparedWarning = " inside the blocked networks delivered mail or logged in, and no report names them"

// missing begins the warning that there is nobody to write to.
const missing = "contact missing"

// finishMail makes the message and notes its digest. A draft's text is made
// here; what was shown to a person is approved as it is.
func (d *Desk) finishMail(c *Case, m *Mail, by string, auto bool) ([]byte, error) {
	if by == "" {
		m.Settings = d.settings()
		if m.Edited == "" {
			v := c.of(m)
			m.Without = ""
			if _, err := d.xarf(v, m); err != nil { // of which the text tells
				m.Without = err.Error()
			}
			m.Text = d.text(v, m)
		}
	}
	msg, err := d.compose(c, m, by, auto, d.now())
	if err != nil {
		return nil, err
	}
	m.Digest, m.Size = digest(msg), len(msg)
	return msg, nil
}

// deskServers are the addresses of the mail servers of some recipients, and
// what went wrong with asking for them.
func (d *Desk) deskServers(ctx context.Context, to ...string) (servers []netip.Addr, faults []string) {
	if !d.config.Lookup.Online {
		return nil, nil
	}
	domains := map[string]bool{}
	for _, a := range to {
		if a != "" {
			domains[domainOf(a)] = true
		}
	}
	for _, domain := range slices.Sorted(maps.Keys(domains)) {
		addrs, err := d.lookups.mailServers(ctx, domain)
		if err != nil {
			faults = append(faults, clean(err.Error(), 200))
		}
		servers = append(servers, addrs...)
	}
	return servers, faults
}

// deskWarning is in what is said of a recipient's mail server that we block.
const deskWarning = " is inside what we block"

// warnDesk says which of the recipients' own mail servers are blocked here:
// then their answers and bounces cannot reach us.
func (d *Desk) warnDesk(c *Case, m *Mail) {
	d.blockedDesk(c, m)
	m.Warnings = slices.DeleteFunc(m.Warnings, func(s string) bool { return strings.Contains(s, deskWarning) })
	for _, a := range m.Desk {
		m.Warnings = append(m.Warnings, fmt.Sprintf("the desk's own mail server %s%s: its answers cannot reach us; %s", a, deskWarning, m.letIn(a)))
	}
}
