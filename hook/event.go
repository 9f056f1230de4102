// Package hook tells people and programs what happens: by mail, by an HTTP
// request, or by running a command. The first event is told at once, what
// follows is summed up, so that a flood of events is a few messages.
package hook

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// Kinds of events, in the order in which a summary names them.
const (
	Saturated = "saturated" // the server is full
	Relieved  = "relieved"  // mail flows again
	Fault     = "fault"     // something of smtpguard's own went wrong
	Tamper    = "tamper"    // somebody changed our rules in the packet filter
	Block     = "block"
	Refuse    = "refuse" // the gate did not let a block pass
	Spare     = "spare"  // known good senders are in a network that floods
	Unblock   = "unblock"
	Expire    = "expire"
	Report    = "report" // an abuse report needs a person, or left
)

var kinds = []string{Saturated, Relieved, Fault, Tamper, Block, Refuse, Spare, Unblock, Expire, Report}

// Event is one thing that happened. Its JSON is documented in docs/hooks.md
// and stable.
type Event struct {
	On   string    `json:"on"`
	Time time.Time `json:"time"`
	// Count is how many of the same this stands for, at least 1.
	Count int `json:"count"`
	// Text is one sentence for a person. It is made by Tell.
	Text string `json:"text"`
	// Why is what is known of the reason. Strangers may have written parts
	// of it: it is bounded, and what does not print is escaped.
	Why string `json:"why,omitempty"`

	Prefix   netip.Prefix `json:"prefix,omitzero"`    // of the source
	Observed bool         `json:"observed,omitempty"` // block: mode observe, nothing is dropped
	Rule     string       `json:"rule,omitempty"`     // block, spare, refuse
	Score    float64      `json:"score,omitempty"`
	Until    time.Time    `json:"until,omitzero"`     // block
	By       string       `json:"by,omitempty"`       // unblock, tamper: who
	Taken    int          `json:"taken,omitempty"`    // saturated, relieved: slots taken
	Capacity int          `json:"capacity,omitempty"` // saturated, relieved: slots
	Seconds  float64      `json:"seconds,omitempty"`  // saturated, relieved: how long the server is or was full
	Report   string       `json:"report,omitempty"`   // report: its ID
	State    string       `json:"state,omitempty"`    // report: as `smtpguard reports list` has it
}

// Bounds of what is kept and told.
const (
	whyMost    = 600 // bytes of a sentence
	wordMost   = 100 // bytes of a name
	eventsMost = 20  // events of one message that are told in full
)

// Version is that of the form of Message.
const Version = 1

// Message is what a hook is told at a time. Its JSON is stable: fields may be
// added, and Version rises if one changes.
type Message struct {
	Version int `json:"version"`
	// ID is the same when the same message is sent again after a failure.
	ID      string    `json:"id"`
	Hook    string    `json:"hook"`
	Host    string    `json:"host"`
	Program string    `json:"program"` // "smtpguard 1.2.3"
	Time    time.Time `json:"time"`    // when the message was made
	// Subject says it all in one line, without anything that a stranger wrote.
	Subject string         `json:"subject"`
	Total   int            `json:"total"`  // events told of, in Events or not
	Counts  map[string]int `json:"counts"` // Total by kind
	First   time.Time      `json:"first"`  // time of the first event
	Last    time.Time      `json:"last"`
	// Events are the first ones. LeftOut are not among them.
	Events  []Event `json:"events"`
	LeftOut int     `json:"left_out"`
}

// batch is what waits to be told: bounded, whatever comes.
type batch struct {
	events      []Event
	counts      map[string]int
	total, left int
	first, last time.Time
	saturated   *Event // the newest, which may not be among events
	relieved    *Event
}

func (b *batch) add(e Event) {
	if b.counts == nil {
		b.counts = make(map[string]int)
	}
	if b.total == 0 || e.Time.Before(b.first) {
		b.first = e.Time
	}
	if e.Time.After(b.last) {
		b.last = e.Time
	}
	b.total += e.Count
	b.counts[e.On] += e.Count
	switch e.On {
	case Saturated:
		b.saturated, b.relieved = &e, nil
	case Relieved:
		b.relieved = &e
	}
	if len(b.events) < eventsMost {
		b.events = append(b.events, e)
		b.left += e.Count - 1
		return
	}
	// Whether the server is full now is not to be left out: it takes the place
	// of the last that can be spared.
	b.left += e.Count
	if e.On == Saturated || e.On == Relieved {
		for i, old := range slices.Backward(b.events) {
			if old.On != Saturated && old.On != Relieved || i == 0 {
				b.events = append(slices.Delete(b.events, i, i+1), e)
				break
			}
		}
	}
}

// wash makes an event safe to keep and to show.
func (e *Event) wash() {
	e.Count = max(e.Count, 1)
	e.Why = printable(e.Why, whyMost)
	e.By, e.Rule = printable(e.By, wordMost), printable(e.Rule, wordMost)
	e.Report, e.State = printable(e.Report, wordMost), printable(e.State, wordMost)
	e.Text = e.short()
	if e.Why != "" {
		e.Text += ": " + e.Why
	}
}

// source names the source as a person does: without /32.
func (e *Event) source() string {
	if !e.Prefix.IsValid() {
		return "a source"
	}
	if e.Prefix.IsSingleIP() {
		return e.Prefix.Addr().String()
	}
	return e.Prefix.String()
}

// short is the event in a few words, none of them a stranger's.
func (e *Event) short() string {
	s := e.source()
	switch e.On {
	case Saturated:
		return fmt.Sprintf("the mail server is full, %d of %d slots taken", e.Taken, e.Capacity)
	case Relieved:
		return fmt.Sprintf("mail flows again after %s", e.span())
	case Fault:
		return "smtpguard has a problem"
	case Tamper:
		return "our firewall rules were changed, and are put back"
	case Block:
		until := ""
		if !e.Until.IsZero() {
			until = " until " + e.Until.Local().Format("2006-01-02 15:04 MST")
		}
		if e.Observed {
			return s + " would be blocked" + until + ", but mode is observe"
		}
		return s + " is blocked" + until
	case Refuse:
		return s + " was not blocked, the gate refused"
	case Spare:
		return s + " is spared for its known good senders"
	case Unblock:
		return "the block of " + s + " is lifted"
	case Expire:
		return "the block of " + s + " has run out"
	case Report:
		switch e.State {
		case "draft":
			return "abuse report " + word(e.Report) + " waits for approval"
		case "sent":
			return "abuse report " + word(e.Report) + " was sent"
		}
		return "abuse report " + word(e.Report) + " is " + word(e.State)
	}
	return word(e.On)
}

func (e *Event) span() string {
	return (time.Duration(e.Seconds * float64(time.Second))).Round(time.Second).String()
}

// subject is the batch in one line.
func (b *batch) subject() string {
	if b.total == 1 {
		return b.events[0].short()
	}
	var parts []string
	for _, k := range kinds {
		n := b.counts[k]
		if n == 0 {
			continue
		}
		switch k {
		case Saturated:
			switch {
			case b.relieved != nil && n == 1:
				parts = append(parts, "the mail server was full for "+b.relieved.span()+", mail flows again")
			case b.relieved != nil:
				parts = append(parts, fmt.Sprintf("the mail server was full %d times, mail flows again", n))
			default:
				parts = append(parts, b.saturated.short())
			}
		case Relieved:
			if b.saturated == nil {
				parts = append(parts, b.relieved.short())
			}
		case Block:
			parts = append(parts, plural(n, "source")+" "+b.blocked())
		case Refuse:
			parts = append(parts, plural(n, "block")+" refused by the gate")
		case Spare:
			parts = append(parts, plural(n, "network")+" spared")
		case Unblock:
			parts = append(parts, plural(n, "block")+" lifted")
		case Expire:
			parts = append(parts, plural(n, "block")+" run out")
		case Fault:
			parts = append(parts, plural(n, "problem")+" of smtpguard's own")
		case Tamper:
			parts = append(parts, "our firewall rules changed "+plural(n, "time"))
		case Report:
			parts = append(parts, plural(n, "report")+" moved on")
		}
	}
	return strings.Join(parts, ", ")
}

// blocked says what became of the sources, by the first of them.
func (b *batch) blocked() string {
	for _, e := range b.events {
		if e.On == Block && e.Observed {
			return "would be blocked (mode observe)"
		}
	}
	return "blocked"
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// body is the message for a person who reads it on a telephone.
func (m *Message) body() string {
	var b strings.Builder
	b.WriteString(sentence(m.Subject) + "\n")
	if m.Total > 1 || len(m.Events) == 1 && m.Events[0].Why != "" {
		b.WriteString("\n")
		for _, e := range m.Events {
			b.WriteString(e.Time.Local().Format("15:04:05") + " " + e.Text + "\n")
		}
	}
	if m.LeftOut > 0 {
		fmt.Fprintf(&b, "... and %d more: %s in all, from %s to %s.\n", m.LeftOut, m.tally(),
			m.First.Local().Format("15:04:05"), m.Last.Local().Format("15:04:05"))
	}
	fmt.Fprintf(&b, "\n`smtpguard status` and `smtpguard blocks list` on %s say more.\n", m.Host)
	return b.String()
}

// tally is the counts by kind.
func (m *Message) tally() string {
	var parts []string
	for _, k := range kinds {
		if n := m.Counts[k]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, k))
		}
	}
	return strings.Join(parts, ", ")
}

// sentence makes the first letter large and ends with a full stop.
func sentence(s string) string {
	if s == "" {
		return s
	}
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:] + "."
}

// word keeps of a name what can stand in a header.
func word(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r) || strings.ContainsRune("-._", r)) {
			return r
		}
		return -1
	}, s)
	return s[:min(len(s), 64)]
}

// printable escapes what does not print, so that no text moves a terminal's
// cursor or breaks a line, and cuts at most bytes.
func printable(s string, most int) string {
	var b strings.Builder
	for i, r := range s {
		n := b.Len()
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(s[i:], "\ufffd"):
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case r == '\\':
			b.WriteString(`\\`)
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u{%x}`, r)
		}
		if b.Len() > most {
			return b.String()[:n] + "..."
		}
	}
	return b.String()
}
