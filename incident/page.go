package incident

import (
	"crypto/sha256"
	_ "embed" // the page's template and style
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"net/netip"
	"strings"
	"time"
	"unicode"
)

// Generator stands in the page's <meta name="generator">: a file that has it
// in its first bytes was written by WritePage.
const Generator = "smtpguard replay"

const (
	pageRows   = 100 // sources in the page's closing table
	maxText    = 200 // of what others named: files, rules, networks
	numberRows = 48  // of the pictures as numbers
)

// PageOptions is what the page says beside the incident.
type PageOptions struct {
	Zone    *time.Location // of the times that are shown; nil: local
	Made    time.Time
	Version string
	Logs    []string // names
	// Settings that the incident was computed with, in this order.
	Settings []Setting
	// AS names the network operator of an address, "" if it is not known;
	// nil: nothing is known of any.
	AS func(netip.Addr) string
}

// Setting is one setting, and its value in words.
type Setting struct{ Name, Value string }

var (
	//go:embed page.gohtml
	pageText string
	//go:embed page.css
	pageStyle string

	pageTemplate = template.Must(template.New("page").Parse(pageText))
)

// WritePage writes the incident as one HTML page that needs nothing else: no
// script, no network. It holds addresses, which are personal data in many
// countries; whoever keeps it should let nobody else read it. Its size is
// bounded, a megabyte or two at most, whatever the log.
func (c *Collector) WritePage(w io.Writer, o PageOptions) error {
	if c.series == nil {
		return errors.New("writing the page: the incident was collected without pictures")
	}
	if o.Zone == nil {
		o.Zone = time.Local
	}
	if err := pageTemplate.Execute(w, c.view(o)); err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	return nil
}

// view is what the template shows.
type view struct {
	Generator, Policy string
	Style             template.CSS
	Title, Sentence   string
	Period, Zone      string
	Made, Version     string
	Logs              []string
	MoreLogs          int
	Cards             []card
	Pictures          []*pictures
	Rows              []tableRow
	RowsMore          int
	Verdicts          []verdictView
	Unsaid            int
	Spared            int
	AS                bool
	Settings          []Setting
}

type card struct{ Name, Value, Note string }

type tableRow struct {
	Who, AS, Rule, Share, Slots, Since, Blocked, For string
	Opened, Refused                                  uint64
}

type verdictView struct {
	N                              int
	Time, Who, AS, Rule, Text, Act string
	Spared                         bool
}

func (c *Collector) view(o PageOptions) *view {
	s := c.series
	style := "\n" + pageStyle
	sum := sha256.Sum256([]byte(style))
	v := &view{
		Generator: Generator,
		Policy: "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
			"'; base-uri 'none'; form-action 'none'",
		Style: template.CSS(style), Sentence: c.Sentence(), //nolint // our own text
		Version: plain(o.Version), Made: o.Made.In(o.Zone).Format("2 January 2006, 15:04"),
		AS: o.AS != nil,
	}
	as := func(p netip.Prefix) string {
		if o.AS == nil {
			return ""
		}
		return plain(o.AS(p.Addr()))
	}
	for i, l := range o.Logs {
		if i == 10 {
			v.MoreLogs = len(o.Logs) - i
			break
		}
		v.Logs = append(v.Logs, plain(l))
	}
	for _, x := range o.Settings {
		v.Settings = append(v.Settings, Setting{plain(x.Name), plain(x.Value)})
	}
	v.Title = "The server was never full"
	if c.fullFor > 0 {
		v.Title = "Mail server full for " + Span(c.fullFor)
		if c.peak < c.capacity {
			v.Title = "Mail server nearly full for " + Span(c.fullFor)
		}
	}
	if !c.started {
		v.Title, v.Period = "Nothing happened", "no line with a time was found"
		return v
	}
	v.Zone = zone(c.first, c.now, o.Zone)
	v.Period = period(c.first.In(o.Zone), c.now.In(o.Zone))

	t := c.Total()
	served, senders := c.Served()
	v.Cards = []card{
		{"full for", Span(c.fullFor), fmt.Sprintf("%d of %d slots or more taken", c.FullFrom(), c.capacity)},
		{"at worst", fmt.Sprintf("%d of %d", min(c.peak, max(c.capacity, t.Capacity)), c.capacity), "slots taken"},
		{"would be blocked", number(len(c.rows), "source", "sources"), "in " + number(c.blocks, "block", "blocks")},
		{"kept away", fmt.Sprint(t.Opened + t.Refused), "connections and attempts"},
		{"others refused", fmt.Sprint(served), "of " + number(senders, "sender", "senders") + ", that would have found a slot"},
		{"accepted", fmt.Sprint(c.accepted), "messages"},
	}
	stamp := clockFormat(c.first.In(o.Zone), c.now.In(o.Zone))
	c.draw(v, o, as)
	for i, r := range c.Rows() {
		if i == pageRows {
			v.RowsMore = len(c.rows) - i
			break
		}
		row := tableRow{Who: r.Who(), AS: as(r.Prefix), Rule: plain(r.Rule), Share: fmt.Sprintf("%.0f %%", 100*r.Share()),
			Slots: fmt.Sprintf("%d of %d", r.Held, r.Capacity), Since: r.Since.In(o.Zone).Format(stamp),
			Blocked: r.Blocked.In(o.Zone).Format(stamp), For: Span(r.For), Opened: r.Opened, Refused: r.Refused}
		if r.Blocks > 1 {
			row.For += fmt.Sprintf(" in %d blocks", r.Blocks)
		}
		v.Rows = append(v.Rows, row)
	}
	for i, x := range s.verdicts {
		y := verdictView{N: i + 1, Time: x.at.In(o.Zone).Format(stamp), Who: who(x.who), AS: as(x.who), Rule: plain(x.rule), Text: x.text}
		switch {
		case x.spared == "":
			y.Act = "blocked for " + Span(x.until.Sub(x.at))
			if x.again > 1 {
				y.Act += fmt.Sprintf(", offence %d", x.again)
			}
		case x.spared == "known-good":
			y.Spared, y.Act = true, "spared as a whole: there are senders in it whose mail was accepted"
		default:
			y.Spared, y.Act = true, "spared: "+plain(x.spared)
		}
		if y.Spared {
			v.Spared++
		}
		v.Verdicts = append(v.Verdicts, y)
	}
	v.Unsaid = s.unsaid
	return v
}

// plain is text of others in one short line of printable characters.
func plain(s string) string {
	var b strings.Builder
	n := 0
	for _, r := range s {
		if n++; n > maxText {
			b.WriteString("…")
			break
		}
		switch {
		case unicode.IsPrint(r) && r != unicode.ReplacementChar:
			b.WriteRune(r)
		case unicode.IsSpace(r):
			b.WriteByte(' ')
		default:
			b.WriteByte('?')
		}
	}
	return b.String()
}

// period says from when to when, the day once if it is one.
func period(a, b time.Time) string {
	if a.Format(time.DateOnly) == b.Format(time.DateOnly) {
		return a.Format("2 January 2006, 15:04:05") + " to " + b.Format("15:04:05")
	}
	return a.Format("2 January 2006, 15:04") + " to " + b.Format("2 January 2006, 15:04")
}

// clockFormat is how times between a and b are shown.
func clockFormat(a, b time.Time) string {
	if a.Format(time.DateOnly) == b.Format(time.DateOnly) {
		return "15:04:05"
	}
	return "2 Jan 15:04:05"
}

// zone names the zone of the times between a and b: "CET, UTC+01:00".
func zone(a, b time.Time, l *time.Location) string {
	one := func(t time.Time) string {
		name := t.In(l).Format("MST")
		off := t.In(l).Format("UTC-07:00")
		if name == "UTC" {
			return "UTC"
		}
		if strings.ContainsAny(name, "+-0123456789") {
			return off
		}
		return plain(name) + ", " + off
	}
	x, y := one(a), one(b)
	if x != y {
		return x + ", later " + y
	}
	return x
}
