// Package abuse tells the network that a flood comes from: it gathers blocks
// into cases, finds out who is responsible, writes the report, and sends it
// once a person has approved it.
package abuse

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// Store keeps records by kind and key; *store.Store is one. Each call is one
// transaction that has reached the disk when it returns.
type Store interface {
	SetRecord(kind, key string, value []byte) error
	Record(kind, key string) ([]byte, error)
	Records(kind string, fn func(key string, value []byte) bool) error
	DropRecord(kind, key string) (found bool, err error)
}

// Kinds of records.
const (
	kindCase  = "report-case"  // Case by ID
	kindMail  = "report-mail"  // the message as it is sent, by ID and number
	kindState = "report-state" // keyTaken: the last block taken
	kindBad   = "report-bad"   // addresses that bounced, until when
	keyTaken  = "taken"
)

// Options are the parts that a Desk works with.
type Options struct {
	Config Config
	Store  Store
	// Logs gives evidence; nil: reports have the detector's numbers only.
	Logs Logs
	// Spare lists what is never reported: own and allowed networks. nil: none.
	Spare func() []netip.Prefix
	// Blocked says whether an address is blocked now, and by which block; nil: no.
	Blocked func(netip.Addr) (netip.Prefix, bool)
	// Refresh returns a block as it stands now: was it lifted, or pardoned?
	// nil: blocks stay as they were taken.
	Refresh func(id uint64) (Block, bool)
	// Clock says how far the clock can be believed; nil is the function Clock.
	Clock func() string
	// Now is the time; nil is time.Now. A replay of old logs has another.
	Now     func() time.Time
	Log     *slog.Logger
	Version string
}

// Desk keeps the cases. Its methods may be called by any goroutine.
type Desk struct {
	config  Config
	o       Options
	log     *slog.Logger
	version string
	lookups *lookups
	now     func() time.Time
	step    func(string) // tests end the process here; does nothing else
	// Drafting waits for strangers' servers, sending does not wait for it: each
	// is woken by itself.
	wakeDraft, wakeSend chan struct{}

	overrides overridesFile
	preparing sync.Mutex // one round of drafts at a time

	telling sync.Mutex
	told    map[string]string // what was logged last of a thing that is looked at again and again

	mu    sync.Mutex
	cases map[string]*Case
	retry map[string]time.Time // cases whose draft failed, until when
	// assumed finds cases by what was assumed of them before a lookup; it may
	// hold some of which more is known since. known are the Certain ones.
	assumed map[origin][]*Case
	known   map[string]*Case
	taken   uint64
	unsaved map[string]bool // cases with blocks that could not be written down yet
	// learned is when the blocks of all cases were last looked at again.
	learned   time.Time
	ended     map[uint64]bool // blocks that are over and were looked at since
	withdrawn []Withdrawal    // by persons, the oldest first
	asked     []time.Time     // when networks were looked up, within a day
	lost      int             // blocks that found no room
}

// origin is an AS and a prefix of it.
type origin struct {
	as  uint32
	net netip.Prefix
}

// index makes a case findable by its network; d.mu is held.
func (d *Desk) index(c *Case) {
	if c.Certain {
		d.known[c.ID] = c
		return
	}
	k := origin{c.AS, c.Network}
	if !slices.Contains(d.assumed[k], c) {
		d.assumed[k] = append(d.assumed[k], c)
	}
}

// Self is who acts where no person does.
const Self = "smtpguard"

var (
	// ErrUnknown: there is no such case.
	ErrUnknown = errors.New("there is no such report")
	// ErrState: the case is not in a state in which that can be done.
	ErrState = errors.New("the report is not at that point")
	// ErrHeld: a cap stands against sending now; it goes out later.
	ErrHeld = errors.New("held")
	// ErrDoubtful: it may have been sent, or not.
	ErrDoubtful = errors.New("it is doubtful whether it was sent")
)

// Refusal says why a report is not approved or not sent, and what can be done
// about it.
type Refusal struct{ Why, Hint string }

func (r *Refusal) Error() string { return "refused: " + r.Why }

// New makes a Desk and reads the cases. A mail that was being handed over when
// the program ended is Doubtful from then on: it is never sent again by itself.
func New(o Options) (*Desk, error) {
	now := o.Now
	if now == nil {
		now = time.Now
	}
	return newDesk(o, now, false)
}

func newDesk(o Options, now func() time.Time, private bool) (*Desk, error) {
	if err := o.Config.Check(); err != nil {
		return nil, err
	}
	if o.Config.From == "" { // nobody is asked as long as nothing could be sent
		o.Config.Lookup.Online = false
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Clock == nil {
		o.Clock = Clock
	}
	d := &Desk{config: o.Config, o: o, log: o.Log, version: cmp.Or(o.Version, "0"), now: now, step: func(string) {},
		wakeDraft: make(chan struct{}, 1), wakeSend: make(chan struct{}, 1), overrides: overridesFile{path: o.Config.Overrides}, told: map[string]string{},
		cases: map[string]*Case{}, retry: map[string]time.Time{}, assumed: map[origin][]*Case{}, known: map[string]*Case{}, ended: map[uint64]bool{}}
	var err error
	if d.lookups, err = newLookups(o.Config, o.Store, o.Log, now, private); err != nil {
		return nil, err
	}
	for _, dir := range []string{o.Config.Dir, filepath.Join(o.Config.Dir, "rdap")} {
		sweep(dir, time.Now())
	}
	var bad []error
	err = o.Store.Records(kindCase, func(key string, value []byte) bool {
		var c Case
		if err := json.Unmarshal(value, &c); err != nil || c.ID != key {
			bad = append(bad, fmt.Errorf("report %q is damaged and left out", clean(key, 40)))
			return true
		}
		d.cases[c.ID] = &c
		d.index(&c)
		return true
	})
	if err != nil {
		return nil, fmt.Errorf("reading the reports: %w", err)
	}
	for _, e := range bad {
		d.log.Error(e.Error())
	}
	v, err := o.Store.Record(kindState, keyTaken)
	if err != nil {
		return nil, fmt.Errorf("reading which blocks were taken: %w", err)
	}
	if len(v) > 0 {
		if err := json.Unmarshal(v, &d.taken); err != nil {
			return nil, fmt.Errorf("reading which blocks were taken: %w", err)
		}
	}
	if err := d.readWithdrawn(); err != nil {
		return nil, err
	}
	for _, c := range d.cases {
		if m := c.mail(); c.State == Drafted && d.changed(m) != "" {
			m.Outdated = true
		}
		if c.State != Queued {
			continue
		}
		c.Why = "smtpguard was ended while it handed the mail over; look for Message-ID <" + c.mail().MessageID + "> in the mail server's log"
		c.move(Doubtful, Self, c.Why, now())
		c.arrived(now())
		if err := d.save(c); err != nil {
			return nil, err
		}
	}
	return d, nil
}

// Close lets go of idle connections and of the ASN database.
func (d *Desk) Close() { d.lookups.fetch.close() }

func (d *Desk) clock() string { return d.o.Clock() }

// save writes a case down. d.mu is held, or nobody else knows the desk.
func (d *Desk) save(c *Case) error {
	v, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("report %s: %w", c.ID, err)
	}
	if err := d.o.Store.SetRecord(kindCase, c.ID, v); err != nil {
		return fmt.Errorf("writing report %s down: %w", c.ID, err)
	}
	return nil
}

// Taken is the ID of the newest block that Take has seen.
func (d *Desk) Taken() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.taken
}

// Take gathers blocks into cases. Blocks are known by their ID and may come
// twice. Nothing is looked up on the network. After an error the same blocks
// should be given again.
func (d *Desk) Take(blocks ...Block) error {
	if d.config.Mode == Off {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	overrides, _ := d.overridden() // told; nothing is sent while it has faults
	touched := map[*Case]bool{}
	highest := d.taken
	for _, b := range blocks {
		if b.ID != 0 && b.ID <= d.taken {
			continue
		}
		highest = max(highest, b.ID)
		if b.Verdict == nil || b.Pardoned || !b.Prefix.IsValid() || d.now().Sub(b.Since) > d.config.Quiet+24*time.Hour {
			continue // what was days ago, before a first start, is no news to anybody
		}
		o := d.lookups.known(b.Prefix.Addr())
		if d.unreportable(b.Prefix, append(o.ASes, o.AS), overrides, nil) != "" {
			continue
		}
		c := d.whole(&b)
		if c == nil {
			c = d.caseFor(b, o)
		}
		if c == nil {
			if d.lost++; d.lost%1000 == 1 {
				d.log.Error("there is no room for more reports; blocks are not gathered", "blocks", d.lost)
			}
			continue
		}
		if c.take(b) {
			touched[c] = true
		}
	}
	// What was not written down the last time is in memory already: the same
	// blocks, given again, are no news to their case.
	for id := range d.unsaved {
		if c := d.cases[id]; c != nil {
			touched[c] = true
		}
	}
	d.unsaved = make(map[string]bool)
	for c := range touched {
		d.unsaved[c.ID] = true
	}
	for c := range touched {
		if err := d.save(c); err != nil {
			return err
		}
		delete(d.unsaved, c.ID)
	}
	if highest > d.taken {
		v, err := json.Marshal(highest)
		if err == nil {
			err = d.o.Store.SetRecord(kindState, keyTaken, v)
		}
		if err != nil {
			return fmt.Errorf("noting which blocks were taken: %w", err)
		}
		d.taken = highest
	}
	if len(touched) > 0 {
		d.poke()
	}
	return nil
}

// whole finds the case that has the block of which b is a part, in whatever
// state it is, and notes the ID of that in b; nil: there is none. d.mu is held.
func (d *Desk) whole(b *Block) *Case {
	if !b.PartOf.IsValid() {
		return nil
	}
	for _, c := range d.cases {
		if c.State == Withdrawn && !c.left() && d.withdrawal(c) == nil {
			continue // for want of blocks: that is so no more
		}
		if c.MergedInto != "" || b.Since.Before(c.FirstBlock) || b.Since.After(c.LastBlock) {
			continue
		}
		for _, r := range c.Blocks {
			if r.Prefix == b.PartOf && r.Since.Equal(b.Since) && r.ID != b.ID {
				b.As = r.order()
				return c
			}
		}
	}
	return nil
}

// caseFor finds the open case that a block belongs to, or opens one; nil if
// there is no room. o is what is known of its origin: without that a block
// joins no network that was looked up, for a part of it may be somebody
// else's. d.mu is held.
func (d *Desk) caseFor(b Block, o Origin) *Case {
	network := provisional(b.Prefix)
	if p := o.Prefix; p.IsValid() && p.Bits() <= b.Prefix.Bits() {
		network = p
	}
	var best *Case
	better := func(c *Case) {
		if c.Kind == Flood && c.open(b.Since, d.config.Quiet) &&
			(best == nil || c.Certain && !best.Certain || c.Certain == best.Certain && c.Opened.Before(best.Opened)) {
			best = c
		}
	}
	for _, c := range d.known {
		if c.has(b.Prefix, o) {
			better(c)
		}
	}
	if best == nil {
		for _, c := range d.assumed[origin{o.AS, network}] {
			if !c.Certain && c.AS == o.AS && c.Network == network {
				better(c)
			}
		}
	}
	if best != nil {
		return best
	}
	if len(d.cases) >= maxCases && !d.makeRoom() {
		return nil
	}
	c := &Case{ID: d.newID(b.Since), Token: newToken(), Kind: Flood, AS: o.AS, Network: network, Opened: d.now()}
	c.move(Gathering, Self, "", d.now())
	d.cases[c.ID] = c
	d.index(c)
	return c
}

// has reports whether a network is one of the case's, of which origin and
// announcement were looked up: it lies in the announcement, and its own origin,
// as far as it is known, is the same one.
func (c *Case) has(p netip.Prefix, o Origin) bool {
	if !c.Network.Contains(p.Addr()) || c.Network.Bits() > p.Bits() || o.AS != c.AS {
		return false
	}
	return o.Prefix == c.Network || !announced(o) // a database's range may be another
}

// open reports whether the case still gathers at a time.
func (c *Case) open(at time.Time, quiet time.Duration) bool {
	return !c.State.over() && c.MergedInto == "" && at.Sub(c.LastBlock) < quiet
}

// makeRoom forgets the least interesting case; d.mu is held.
func (d *Desk) makeRoom() bool {
	var out *Case
	rank := func(c *Case) int {
		switch {
		case c.counts(d.now(), d.config.Caps.Recipient), c.left():
			return 3
		case c.State.over():
			return 0
		case c.State == Gathering:
			return 1
		case c.State == Held:
			return 2
		}
		return 3
	}
	for _, c := range d.cases {
		if rank(c) == 3 {
			continue
		}
		if out == nil || rank(c) < rank(out) || rank(c) == rank(out) && (c.Connections < out.Connections || c.Connections == out.Connections && c.LastBlock.Before(out.LastBlock)) {
			out = c
		}
	}
	if out == nil {
		return false
	}
	return d.drop(out) == nil
}

// left reports whether a mail of the case has left, or may have.
func (c *Case) left() bool {
	return slices.ContainsFunc(c.Mails, func(m Mail) bool { return slices.ContainsFunc(m.Attempts, Attempt.mayHaveLeft) })
}

// counts reports whether a cap needs to know of the case: it was drafted within
// a day, or sent within a day or the time of Caps.Recipient.
func (c *Case) counts(now time.Time, recipient time.Duration) bool {
	const day = 24 * time.Hour
	for _, m := range c.Mails {
		if now.Sub(m.Made) < day {
			return true
		}
		for _, a := range m.Attempts {
			if a.mayHaveLeft() && now.Sub(a.Begun) < max(day, recipient) {
				return true
			}
		}
	}
	return false
}

// drop forgets a case and what belongs to it; d.mu is held.
func (d *Desk) drop(c *Case) error {
	if _, err := d.o.Store.DropRecord(kindCase, c.ID); err != nil {
		return err
	}
	delete(d.cases, c.ID)
	delete(d.retry, c.ID)
	delete(d.known, c.ID)
	k := origin{c.AS, c.Network}
	d.assumed[k] = slices.DeleteFunc(d.assumed[k], func(o *Case) bool { return o == c })
	if len(d.assumed[k]) == 0 {
		delete(d.assumed, k)
	}
	for i := range c.Mails {
		for range 2 {
			if _, err := d.o.Store.DropRecord(kindMail, mailKey(c, i)); err != nil {
				return err
			}
			c.Mails[i].Second = !c.Mails[i].Second
		}
		os.Remove(d.emlPath(c, i))
		os.Remove(d.rawPath(c, i))
		if a := c.Mails[i].Archive; a.File != "" {
			os.Remove(d.path(a.File))
		}
	}
	return nil
}

// newID is SG-YYYYMMDD-XXXXXX, unique among the cases that are kept.
func (d *Desk) newID(t time.Time) string {
	for {
		var b [3]byte
		_, _ = rand.Read(b[:])
		id := fmt.Sprintf("SG-%s-%X", t.UTC().Format("20060102"), b)
		if d.cases[id] == nil {
			return id
		}
	}
}

// newToken is a secret of 80 bits in lower case, as fits a local part.
func newToken() string { return "sg-" + strings.ToLower(rand.Text()[:16]) }

// poke lets Run look at once.
func (d *Desk) poke() {
	for _, c := range []chan struct{}{d.wakeDraft, d.wakeSend} {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// redraftEvery is how often a draft is made anew for a case that grows: each
// time the logs are read.
const redraftEvery = time.Hour

// every is how often Run looks what is due.
const every = 5 * time.Second

// Run makes the drafts that are due, sends what is approved and forgets what
// is old, until ctx ends. What it started has ended when it returns.
func (d *Desk) Run(ctx context.Context) error {
	defer d.Close()
	if d.config.Mode == Off {
		<-ctx.Done()
		return nil
	}
	loop := func(wake <-chan struct{}, work func(context.Context)) {
		t := time.NewTicker(every)
		defer t.Stop()
		for ctx.Err() == nil {
			work(ctx)
			select {
			case <-ctx.Done():
			case <-t.C:
			case <-wake:
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { loop(d.wakeDraft, d.workDraft) })
	wg.Go(func() { loop(d.wakeSend, d.workSend) })
	wg.Wait()
	return nil
}

// Work does once what Run does all the time. Faults are logged and shown in
// the cases.
func (d *Desk) Work(ctx context.Context) {
	d.workDraft(ctx)
	d.workSend(ctx)
}

func (d *Desk) workDraft(ctx context.Context) {
	d.refresh()
	d.prepare(ctx, d.due())
	d.forget()
	d.approveAuto(ctx) // here: it stands behind a draft
}

func (d *Desk) workSend(ctx context.Context) { d.sendApproved(ctx) }

// refresh learns once a minute what became of the blocks of cases that are
// not sent yet. A case whose blocks were all taken back by an operator is
// withdrawn.
func (d *Desk) refresh() {
	if d.o.Refresh == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := d.now(); now.Sub(d.learned) >= time.Minute || now.Before(d.learned) {
		d.learned = now
		for _, c := range d.cases {
			d.learn(c)
		}
	}
}

// otherEnd warns the person who wrote a text.
const otherEnd = "a block has another end since the text was edited: look at what it says of it"

// learn is refresh for one case; d.mu is held.
func (d *Desk) learn(c *Case) {
	if d.o.Refresh == nil || c.State != Gathering && c.State != Held && c.State != Drafted && c.State != Approved {
		return
	}
	changed := false
	for i := range c.Blocks {
		r := &c.Blocks[i]
		if r.Pardoned || !r.Lifted.IsZero() || d.ended[r.ID] {
			continue
		}
		b, ok := d.o.Refresh(r.ID)
		if ok && (b.Pardoned || !b.Lifted.Equal(r.Lifted) || !b.Until.Equal(r.Until)) {
			c.Connections -= r.connections()
			r.Pardoned, r.Lifted, r.Until = b.Pardoned, b.Lifted, b.Until
			c.Connections += r.connections()
			changed = true
			// Of its end a draft says what was planned, so an approved one stays
			// true and approved; what nobody approved or wrote is made anew.
			switch m := c.mail(); {
			case m == nil:
			case r.Pardoned || c.State == Drafted && m.Edited == "":
				m.Outdated = true
			case m.Edited != "" && !slices.Contains(m.Warnings, otherEnd):
				m.Warnings = append(m.Warnings, otherEnd)
			}
		}
		if now := d.now(); !now.Before(r.Until) { // nothing more can become of it
			if len(d.ended) > 100_000 {
				clear(d.ended)
			}
			d.ended[r.ID] = true
		}
	}
	wholes := 0
	for _, r := range c.Blocks {
		if r.As == 0 {
			wholes++
		}
	}
	switch m := c.mail(); {
	case len(c.live()) == 0 && d.partsMayCome(c):
	case len(c.live()) == 0 && c.BlockCount <= wholes && len(c.Mails) > 1 && d.dropFollowUp(c):
		changed = true
	case len(c.live()) == 0 && c.BlockCount <= wholes:
		changed = true
		c.Why = "every block of it was lifted: by an operator, or because it became allowed"
		c.move(Withdrawn, Self, c.Why, d.now())
	case m != nil && len(c.of(m).live()) == 0 && d.dropFollowUp(c):
		changed = true
	case c.State == Approved && m.Outdated:
		changed = true
		m.Approved, c.Why = "", "an operator lifted a block of it; it is to be approved again"
		c.move(Drafted, Self, c.Why, d.now())
	}
	if !changed {
		return
	}
	if err := d.save(c); err != nil {
		d.log.Error("a report is not written down", "err", err)
	}
}

// partsWait is how long after a block was lifted its parts come at the latest,
// if it goes on in parts.
const partsWait = 10 * time.Second

// partsMayCome reports whether a block of the case was lifted just now.
func (d *Desk) partsMayCome(c *Case) bool {
	return slices.ContainsFunc(c.Blocks, func(r Ref) bool {
		return r.Pardoned && !r.Lifted.IsZero() && d.now().Sub(r.Lifted).Abs() < partsWait
	})
}

// dropFollowUp takes back a follow-up of which nothing is left to tell: the
// case is as it was before. It reports whether that was one, and has not left.
// d.mu is held, and the caller saves c.
func (d *Desk) dropFollowUp(c *Case) bool {
	i := len(c.Mails) - 1
	if c.State != Drafted && c.State != Approved || i < 1 || c.Mails[i].Replaces != "" || slices.ContainsFunc(c.Mails[i].Attempts, Attempt.mayHaveLeft) {
		return false
	}
	back := Sent
	for _, t := range slices.Backward(c.History) {
		if t.From.out() && !t.To.out() {
			back = t.From
			break
		}
	}
	c.Mails, c.Why = c.Mails[:i], ""
	c.move(back, Self, "every block of the follow-up was lifted; it is dropped", d.now())
	return true
}

// due are the IDs of the cases that need a draft, the largest first.
func (d *Desk) due() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	var due []*Case
	for _, c := range d.cases {
		if !c.alive() || c.MergedInto != "" || now.Before(d.retry[c.ID]) {
			continue
		}
		settled := now.Sub(c.LastBlock) >= d.config.Threshold.Settle
		m := c.mail()
		want := false
		switch {
		case (c.State == Gathering || c.State == Held && m == nil) && now.Before(c.Again.Next):
		case c.State == Gathering || c.State == Held && m == nil:
			want = (c.Connections >= d.config.Threshold.Connections || c.Held >= d.config.Threshold.Held) &&
				(settled || now.Sub(c.FirstBlock) >= 4*d.config.Threshold.Settle)
		case c.State == Drafted && (m.Outdated || m.Hand == "" && c.again(now)):
			want = true
		case c.State == Drafted: // it grew, and nobody has put a hand on it
			want = m.Hand == "" && c.LastID > m.LastID && settled && now.Sub(c.lastMove()) >= redraftEvery
		case c.State.out() && c.State != Queued && c.State != Doubtful && c.State != Bounced:
			want = len(c.Mails) <= d.config.MaxFollowUps && settled && !m.SentAt.IsZero() &&
				c.LastBlock.Sub(m.SentAt) >= d.config.FollowUp && c.next().alive()
		}
		if want {
			due = append(due, c)
		}
	}
	slices.SortFunc(due, func(a, b *Case) int {
		return cmp.Or(-cmp.Compare(a.Connections, b.Connections), -cmp.Compare(a.Held, b.Held), cmp.Compare(a.ID, b.ID))
	})
	ids := make([]string, len(due))
	for i, c := range due {
		ids[i] = c.ID
	}
	return ids
}

// draftsToday is how many first drafts and follow-ups were made in a day.
func (d *Desk) draftsToday() int {
	n := 0
	for _, c := range d.cases {
		for _, m := range c.Mails {
			if d.now().Sub(m.Made) < 24*time.Hour && m.Made.Before(d.now().Add(time.Minute)) {
				n++
			}
		}
	}
	return n
}

// forget drops what is old: cases that never came to anything after their
// quiet time, all others after Keep.
func (d *Desk) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	for _, c := range d.cases {
		quiet := now.Sub(c.LastBlock)
		if c.State == Gathering || c.State == Held { // also one that was reopened
			quiet = min(quiet, now.Sub(c.lastMove()))
		}
		switch {
		case c.counts(now, d.config.Caps.Recipient):
			continue
		case c.State == Gathering && quiet > d.config.Quiet+4*d.config.Threshold.Settle:
		case c.State == Held && c.mail() == nil && quiet > 7*24*time.Hour:
		case c.State != Approved && c.State != Queued && quiet > d.config.Keep && now.Sub(c.lastMove()) > d.config.Keep:
		default:
			continue
		}
		if err := d.drop(c); err != nil {
			d.log.Error("an old report is not forgotten", "report", c.ID, "err", err)
		}
	}
	if d.lookups.db != nil {
		d.lookups.db.rest(now)
	}
}

func (c *Case) lastMove() time.Time {
	if len(c.History) == 0 {
		return c.Opened
	}
	return c.History[len(c.History)-1].Time
}

// Cases returns every case, the newest first.
func (d *Desk) Cases() []Case {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Case, 0, len(d.cases))
	for _, c := range d.cases {
		all = append(all, *c.clone())
	}
	slices.SortFunc(all, func(a, b Case) int {
		return cmp.Or(b.LastBlock.Compare(a.LastBlock), strings.Compare(a.ID, b.ID))
	})
	return all
}

// Case returns one case, and the message of its newest mail as it would be
// sent or was; nil if there is none yet.
func (d *Desk) Case(id string) (Case, []byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c, err := d.get(id)
	if err != nil {
		return Case{}, nil, err
	}
	msg, err := d.stored(c)
	return *c.clone(), msg, err
}

// get finds a case by its ID; d.mu is held.
func (d *Desk) get(id string) (*Case, error) {
	c := d.cases[strings.ToUpper(strings.TrimSpace(id))]
	if c == nil {
		return nil, fmt.Errorf("%w: %s", ErrUnknown, quoted(id))
	}
	return c, nil
}
