package abuse

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// Block is a block that came into force, or would have in observe mode, as
// far as a report is concerned.
type Block struct {
	// ID rises with every block; Take ignores those it has seen.
	ID      uint64
	Prefix  netip.Prefix
	Verdict *detector.Verdict // nil: by hand; such a block makes no case
	Since   time.Time
	Until   time.Time
	// Lifted is when it ended before its time, zero if it did not. Pardoned:
	// an operator lifted it, so it should not have been, and is not reported.
	Lifted   time.Time
	Pardoned bool
	// Observed: nothing was dropped.
	Observed bool
	// PartOf is the prefix of the block of which this one is a part, invalid:
	// it is none. A part has the Since of the whole; where that was lifted for
	// somebody inside it who is allowed now, the parts go on.
	PartOf netip.Prefix
	// As is the ID of the whole in the same case, 0: there is none. Take
	// fills it in.
	As uint64
}

// Kind is the kind of attack of a case.
type Kind string

// Flood is a flood of connections, be it many in a short time or a few that
// are never given back.
const Flood Kind = "flood"

// State is where a case stands.
type State string

const (
	Gathering    State = "gathering"    // below the threshold, or still settling
	Held         State = "held"         // a draft is due, but a cap or a fault stands against it: see Case.Why
	Drafted      State = "draft"        // a person may read, edit and approve it
	Approved     State = "approved"     // it goes out as soon as the caps let it
	Queued       State = "queued"       // it is being handed to the mail server right now
	Sent         State = "sent"         // the mail server has taken it
	Doubtful     State = "doubtful"     // smtpguard was interrupted while handing it over: it may have been sent, or not
	Delivered    State = "delivered"    // a delivery notice came
	Deferred     State = "deferred"     // a notice of delay came
	Bounced      State = "bounced"      // it could not be delivered
	Acknowledged State = "acknowledged" // the desk gave a ticket
	Answered     State = "answered"     // somebody replied
	Closed       State = "closed"       // done
	Withdrawn    State = "withdrawn"    // not to be sent
)

// out reports whether the last mail of a case in this state has left, or may
// have.
func (s State) out() bool {
	switch s {
	case Queued, Sent, Doubtful, Delivered, Deferred, Bounced, Acknowledged, Answered:
		return true
	}
	return false
}

// over reports whether nothing more happens by itself.
func (s State) over() bool { return s == Closed || s == Withdrawn }

// Transition is one step of a case.
type Transition struct {
	Time time.Time `json:"time"`
	From State     `json:"from,omitempty"`
	To   State     `json:"to"`
	By   string    `json:"by"`
	Note string    `json:"note,omitempty"`
}

// Ref is what a case remembers of a block: a Block, as JSON.
type Ref struct {
	ID       uint64            `json:"id"`
	Prefix   netip.Prefix      `json:"prefix"`
	Verdict  *detector.Verdict `json:"verdict,omitempty"`
	Since    time.Time         `json:"since"`
	Until    time.Time         `json:"until"`
	Lifted   time.Time         `json:"lifted,omitzero"`
	Pardoned bool              `json:"pardoned,omitempty"`
	Observed bool              `json:"observed,omitempty"`
	PartOf   netip.Prefix      `json:"part_of,omitzero"`
	As       uint64            `json:"as,omitempty"`
}

// order is the place of a block among those that a mail tells of: a part is
// told with its whole.
func (r Ref) order() uint64 { return cmp.Or(r.As, r.ID) }

// connections are what the verdict says, of a block that was not taken back.
func (r Ref) connections() int {
	if r.Verdict == nil || r.Pardoned {
		return 0
	}
	return r.Verdict.Opens + r.Verdict.Refused
}

// end is when the block ended or will end.
func (r Ref) end() time.Time {
	if !r.Lifted.IsZero() {
		return r.Lifted
	}
	return r.Until
}

// Case is what a report is about: origin AS, announced prefix and kind, over
// all blocks that belong to it.
type Case struct {
	ID string `json:"id"` // SG-20261122-7F3A9C
	// Token is a secret in the return path, by which bounces are known.
	Token string `json:"token"`
	Kind  Kind   `json:"kind"`
	// AS is the origin, 0 if it is not known. Network is the announced prefix
	// or, before a lookup, what the database says, else a /24 or /48.
	AS      uint32       `json:"as,omitempty"`
	Network netip.Prefix `json:"network"`
	// Certain: Network and AS were looked up, not assumed.
	Certain bool `json:"certain,omitempty"`

	Opened     time.Time `json:"opened"`
	FirstBlock time.Time `json:"first_block"`
	LastBlock  time.Time `json:"last_block"`
	// LastID is the highest Block.ID taken. Blocks are at most maxRefs, Rest is
	// what is over that; all are counted in BlockCount.
	LastID     uint64 `json:"last_id"`
	Blocks     []Ref  `json:"blocks"`
	BlockCount int    `json:"block_count"`
	Rest       Rest   `json:"rest,omitzero"`
	// Connections and Held are what the verdicts say, for the threshold.
	Connections int `json:"connections"`
	Held        int `json:"held"`

	State State `json:"state"`
	// Why explains Held and Doubtful, and what last went wrong.
	Why     string       `json:"why,omitempty"`
	History []Transition `json:"history"`
	// Mails are the report and its follow-ups, oldest first.
	Mails []Mail `json:"mails,omitempty"`
	// Ticket is the desk's number, or those of the recipient's and the copy's
	// desks with ", " between them; Notes are what replies and bounces said.
	Ticket string   `json:"ticket,omitempty"`
	Notes  []string `json:"notes,omitempty"`
	// Heard are hashes of the mails that were read about it, so that a mailbox
	// may be read again; at most maxHeard.
	Heard []string `json:"heard,omitempty"`
	// Early is what a notice said of the newest mail while it was still being
	// handed over: it had arrived somewhere.
	Early     State  `json:"early,omitempty"`
	EarlyNote string `json:"early_note,omitempty"`
	// Again is a lookup that failed and is repeated.
	Again Again `json:"lookup_again,omitzero"`
	// MergedInto is set where a lookup showed that another case has the same
	// network.
	MergedInto string `json:"merged_into,omitempty"`
}

// Mail is one report.
type Mail struct {
	// MessageID is fixed when the draft is first made, without < and >.
	MessageID string `json:"message_id"`
	ReportID  string `json:"report_id"` // UUID version 4
	// InReplyTo and References thread a follow-up.
	InReplyTo  string   `json:"in_reply_to,omitempty"`
	References []string `json:"references,omitempty"`

	From   string    `json:"from"`
	To     Contact   `json:"to,omitzero"`
	Cc     Contact   `json:"cc,omitzero"`
	Others []Contact `json:"others,omitempty"` // further contacts, best first
	// Chosen is the person who chose To and Cc, empty: a lookup did. Found are
	// the recipients that a lookup names beside that person's.
	Chosen string    `json:"chosen_by,omitempty"`
	Found  []Contact `json:"found,omitempty"`
	// Hand is the person who last changed or approved it: from then on nobody
	// but a person approves it.
	Hand string `json:"hand,omitempty"`
	// Tried is the address that reports.redirect sent it to in place of the
	// recipients, who have not got it.
	Tried   string `json:"redirected_to,omitempty"`
	Subject string `json:"subject"`
	Format  Format `json:"format"`
	Return  string `json:"return_path"`
	// Origin says who announces the network, and from where we know.
	Origin Origin `json:"origin"`
	// Facts are the numbers that the text, the CSV and the XARF share.
	Facts Facts `json:"facts"`
	// Warnings are for the person who approves; they are not in the mail.
	Warnings []string `json:"warnings,omitempty"`
	// Servers are addresses of the recipients' own mail servers; Desk are those
	// of them that we block.
	Servers []netip.Addr `json:"desk_servers,omitempty"`
	Desk    []netip.Addr `json:"desk_blocked,omitempty"`
	// Without says why there is no XARF part; empty if there is one.
	Without string `json:"without_xarf,omitempty"`
	// Text is the text for people. Edited is who wrote it in place of the
	// program's.
	Edited string    `json:"edited_by,omitempty"`
	Text   string    `json:"text,omitempty"`
	Made   time.Time `json:"made"`
	LastID uint64    `json:"last_id"` // the newest block that it tells of
	// AfterID is the newest block of the report that this one follows up, and
	// After the time of its last connection: neither is told of again.
	AfterID uint64    `json:"after_id,omitempty"`
	After   time.Time `json:"after,omitzero"`
	// Replaces is the Message-ID of a mail that bounced, in whose place this
	// one goes to somebody else.
	Replaces string `json:"replaces,omitempty"`
	// Outdated: an operator has taken a block back since, or another case has
	// joined. It is made anew before it can be approved.
	Outdated bool   `json:"outdated,omitempty"`
	Digest   string `json:"digest"` // sha256 of the message, hex
	// Second says which of two places of the store has the message: see commit.
	Second bool `json:"second,omitempty"`
	// Settings are the values that the draft was made with: see Desk.changed.
	Settings map[string]string `json:"settings,omitempty"`
	// Seen is the digest that each person was shown last.
	Seen     map[string]string `json:"seen,omitempty"`
	Size     int               `json:"size"`
	Archive  Archive           `json:"archive,omitzero"`
	Approved string            `json:"approved_by,omitempty"`
	SentAt   time.Time         `json:"sent_at,omitzero"`
	// Attempts are the handovers, each written down before it begins.
	Attempts []Attempt `json:"attempts,omitempty"`
}

// Attempt is one handover of a mail to the mail server.
type Attempt struct {
	Begun time.Time `json:"begun"`
	Ended time.Time `json:"ended,omitzero"`
	Rcpt  []string  `json:"rcpt"`
	// Result is empty while it is under way, and after a crash.
	Result string `json:"result,omitempty"`
	Trial  bool   `json:"trial,omitempty"` // redirected by a person; not the real one
	// Denied is who said that a doubtful one did not leave.
	Denied string `json:"denied_by,omitempty"`
}

// Archive is the full evidence, kept as a file.
type Archive struct {
	File   string `json:"file"` // gzip; name inside Config.Dir
	Lines  int    `json:"lines"`
	Bytes  int64  `json:"bytes"`         // before compression
	SHA256 string `json:"sha256"`        // of the lines before compression, hex
	Cut    bool   `json:"cut,omitempty"` // there was more than an archive may hold
}

// Bounds of what a case remembers, against floods that never end.
const (
	maxHistory = 200
	maxNotes   = 50
	maxCases   = 10_000
)

// mail returns the newest mail, nil if there is none.
func (c *Case) mail() *Mail {
	if len(c.Mails) == 0 {
		return nil
	}
	return &c.Mails[len(c.Mails)-1]
}

// move notes a transition.
func (c *Case) move(to State, by, note string, now time.Time) {
	t := Transition{Time: now, From: c.State, To: to, By: by, Note: clean(note, 500)}
	c.State = to
	c.History = append(c.History, t)
	if len(c.History) > maxHistory { // the beginning is kept
		c.History = slices.Delete(c.History, maxHistory/2, maxHistory/2+1)
	}
}

func (c *Case) note(s string) {
	c.Notes = append(c.Notes, clean(s, 500))
	if len(c.Notes) > maxNotes {
		c.Notes = slices.Delete(c.Notes, 0, 1)
	}
}

// take adds a block. It reports whether it was new.
func (c *Case) take(b Block) bool {
	if b.ID <= c.LastID && b.ID != 0 {
		return false
	}
	c.LastID = max(c.LastID, b.ID)
	if b.As == 0 { // else its whole is counted
		c.BlockCount++
	}
	if c.FirstBlock.IsZero() || b.Since.Before(c.FirstBlock) {
		c.FirstBlock = b.Since
	}
	if b.Since.After(c.LastBlock) {
		c.LastBlock = b.Since
	}
	if n := Ref(b).connections(); n > 0 {
		c.Connections += n
		c.Held = max(c.Held, b.Verdict.Held)
	}
	c.keep(Ref(b))
	return true
}

// adopt adds blocks of another case. Those that are there already are known by
// their ID.
func (c *Case) adopt(refs []Ref) {
	there := map[uint64]bool{}
	for _, r := range c.Blocks {
		there[r.ID] = true
	}
	for _, r := range refs {
		if there[r.ID] {
			continue
		}
		there[r.ID] = true
		last := c.LastID
		c.LastID = 0
		c.take(Block(r))
		c.LastID = max(last, r.ID)
	}
	if c.State == Drafted {
		c.mail().Outdated = true
	}
}

// absorb takes over all of another case.
func (c *Case) absorb(o *Case) {
	c.adopt(o.Blocks)
	r := o.Rest
	o.Rest = Rest{}
	for _, p := range r.Networks {
		c.Rest.cover(p)
	}
	c.Rest.Blocks += r.Blocks
	c.Rest.Connections += r.Connections
	c.Connections += r.Connections
	c.Rest.LastID = max(c.Rest.LastID, r.LastID)
	c.BlockCount += r.Blocks
}

// give takes the blocks that move says out of the case.
func (c *Case) give(move func(Ref) bool) (gone []Ref) {
	c.Blocks = slices.DeleteFunc(c.Blocks, func(r Ref) bool {
		if move(r) {
			gone = append(gone, r)
			return true
		}
		return false
	})
	c.Held, c.FirstBlock, c.LastBlock = 0, time.Time{}, time.Time{}
	for _, r := range gone {
		c.Connections -= r.connections()
		if r.As == 0 {
			c.BlockCount--
		}
	}
	for _, r := range c.Blocks {
		if r.Verdict != nil {
			c.Held = max(c.Held, r.Verdict.Held)
		}
		if c.FirstBlock.IsZero() || r.Since.Before(c.FirstBlock) {
			c.FirstBlock = r.Since
		}
		if r.Since.After(c.LastBlock) {
			c.LastBlock = r.Since
		}
	}
	return gone
}

// of is the case as far as a mail tells of it: without the blocks of the
// report that it follows up, and without those that came after it was drafted.
func (c *Case) of(m *Mail) *Case {
	v := *c
	v.Blocks = slices.DeleteFunc(slices.Clone(c.Blocks), func(r Ref) bool {
		return r.ID != 0 && (r.order() <= m.AfterID || r.order() > m.LastID)
	})
	if v.Rest.LastID <= m.AfterID {
		v.Rest.Blocks = 0
	}
	return &v
}

// live are the blocks that an operator did not take back.
func (c *Case) live() []Ref {
	return slices.DeleteFunc(slices.Clone(c.Blocks), func(r Ref) bool { return r.Pardoned })
}

// alive reports whether there are any of those.
func (c *Case) alive() bool {
	return slices.ContainsFunc(c.Blocks, func(r Ref) bool { return !r.Pardoned })
}

// prefixes are the blocked prefixes without those inside others, sorted.
func (c *Case) prefixes() []netip.Prefix {
	var all []netip.Prefix
	for _, r := range c.live() {
		all = append(all, r.Prefix.Masked())
	}
	return outermost(all)
}

// clone is a deep copy.
func (c *Case) clone() *Case {
	b, err := json.Marshal(c)
	if err != nil {
		panic(fmt.Sprintf("abuse: a case that is no JSON: %v", err)) // not reached: it was written as JSON before
	}
	var d Case
	if err := json.Unmarshal(b, &d); err != nil {
		panic(fmt.Sprintf("abuse: a case that is no JSON: %v", err))
	}
	return &d
}

// provisional is the network that a source is counted to before anybody was
// asked.
func provisional(p netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(p.Addr(), min(p.Bits(), provisionalBits(p.Addr()))).Masked()
}

// provisionalBits is the narrowest network that is announced everywhere.
func provisionalBits(a netip.Addr) int {
	if a.Is6() {
		return 48
	}
	return 24
}

// common is the narrowest prefix around all of ps, which are of one family.
func common(ps []netip.Prefix) netip.Prefix {
	if len(ps) == 0 {
		return netip.Prefix{}
	}
	c := ps[0].Masked()
	for _, p := range ps[1:] {
		for c.Bits() > 0 && (!c.Contains(p.Addr()) || p.Bits() < c.Bits()) {
			c = netip.PrefixFrom(c.Addr(), c.Bits()-1).Masked()
		}
	}
	return c
}
