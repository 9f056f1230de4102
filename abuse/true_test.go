package abuse

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// said is the text of a message, unfolded.
func said(t *testing.T, msg []byte) string {
	t.Helper()
	_, ps := parts(t, msg)
	return flat(ps[0].text)
}

func wants(t *testing.T, text string, yes []string, no ...string) {
	t.Helper()
	for _, s := range yes {
		if !strings.Contains(text, s) {
			t.Errorf("%q is not in\n%s", s, text)
		}
	}
	for _, s := range no {
		if strings.Contains(text, s) {
			t.Errorf("%q is in\n%s", s, text)
		}
	}
}

// TestStaysTrue: what a draft says of a block's end is still true when it is
// sent days later.
func TestStaysTrue(t *testing.T) {
	b := flooded(t, nil)
	c, _ := b.drafted()
	b.pass(3 * 24 * time.Hour)
	b.Work(t.Context())
	must(b.Approve(c.ID, "root", Approval{}))
	must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	wants(t, said(t, []byte(b.sent()[0].msg)), []string{"until 2026-11-23 18:41:22 UTC (+00:00) (planned when this was drafted)",
		"if a block is still in force then, we lift it early"}, "the block ends at", "we then lift")
}

// TestProlonged: a block with another end makes a draft anew; what a person
// wrote stays, and what was approved stays approved.
func TestProlonged(t *testing.T) {
	for _, hand := range []string{"", "edited", "approved"} {
		bl := blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12)
		p := newPardons(bl)
		b := flooded(t, func(c *Config, o *Options, l *floodLog) { o.Refresh = p.refresh })
		c, _ := b.drafted()
		switch hand {
		case "edited":
			text := "We blocked you. [" + c.ID + "]\n"
			must(b.Edit(t.Context(), c.ID, "root", Edit{Text: &text}))
		case "approved":
			must(b.Approve(c.ID, "root", Approval{}))
			b.config.Caps.Hour = 0 // a cap holds it back
		}
		bl.Until = bl.Until.Add(30 * 24 * time.Hour)
		p.blocks[1] = bl
		b.pass(10 * time.Minute)
		b.Work(t.Context())
		c = b.only()
		switch hand {
		case "":
			_, msg, _ := b.Case(c.ID)
			wants(t, said(t, msg), []string{"until 2026-12-23 18:41:22 UTC"}, "2026-11-23 18:41")
		case "edited":
			if m := c.mail(); m.Edited == "" || m.Outdated || !strings.Contains(strings.Join(m.Warnings, "\n"), "a block has another end") {
				t.Errorf("edited %q, outdated %v, warnings %q", m.Edited, m.Outdated, m.Warnings)
			}
		case "approved":
			if c.State != Approved {
				t.Errorf("a prolonged block has undone the approval: %s, %s", c.State, c.Why)
			}
		}
	}
}

// TestGap: the time between two blocks is not told as blocked.
func TestGap(t *testing.T) {
	b := flooded(t, nil)
	b.cases[b.only().ID].Blocks[0].Until = testStart.Add(10 * time.Minute)
	x := blockOf(2, "198.51.100.0/24", testStart.Add(20*time.Hour), 200, 12)
	x.Until = x.Since.Add(10 * time.Minute)
	b.pass(19 * time.Hour)
	if err := b.Take(x); err != nil {
		t.Fatal(err)
	}
	b.pass(2 * time.Hour)
	_, msg := b.drafted()
	wants(t, said(t, msg), []string{"from 2026-11-22 18:41:22 UTC (+00:00) until 2026-11-22 18:51:07 UTC",
		"from 2026-11-23 14:41:07 UTC (+00:00) until 2026-11-23 14:51:07 UTC"}, "the block ended")

	c := Case{}
	for i := range 300 {
		x := blockOf(uint64(i+1), fmt.Sprintf("198.51.100.%d/32", i%250+1), testStart.Add(time.Duration(i)*15*time.Minute), 4, 0)
		x.Until = x.Since.Add(10 * time.Minute)
		c.Blocks = append(c.Blocks, Ref{ID: x.ID, Prefix: x.Prefix, Verdict: x.Verdict, Since: x.Since, Until: x.Until})
	}
	wants(t, strings.Join(effect(&c, &Facts{}, testStart), " "),
		[]string{"in 300 blocks of 10 minutes each, the first from 2026-11-22 18:41:07"}, "the block ended")
}

// TestBeyondTheTable: what is known of the sources over maxSources is not told
// as if it were all known.
func TestBeyondTheTable(t *testing.T) {
	l := newFloodLog()
	l.at = testStart.Add(11 * time.Second)
	for i := range 23000 {
		l.at = l.at.Add(time.Millisecond)
		l.line("SMTP connection from [198.51.%d.%d]:%d I=[203.0.113.25]:25 (TCP/IP connection count = 9)", 101+i/250, 1+i%250, 1024+i)
		if i > 22000 {
			l.line("1xVOgw-0003DU-%02d <= a@b.example H=x [198.51.%d.%d]:%d I=[203.0.113.25]:25 P=esmtp S=1", i%90+10, 101+i/250, 1+i%250, 1024+i)
		}
	}
	b := newBench(t, testConfig(t), Options{Logs: &logText{text: l.b.String(), zone: l.zone}})
	if err := b.Take(blockOf(2, "198.51.0.0/16", testStart.Add(30*time.Second), 20000, 0)); err != nil {
		t.Fatal(err)
	}
	c, _ := b.drafted()
	b.contact(c.ID, "x@op2.example")
	_, msg, _ := b.Case(c.ID)
	_, ps := parts(t, msg)
	wants(t, flat(ps[0].text), []string{"More than 20000 addresses", "999 messages were accepted", "not told apart", "the 4990 next ones in sources.csv"},
		"No message", "19990 more", "Sources 20000 addresses")
	for _, p := range ps {
		if strings.Contains(p.name, "xarf") {
			wants(t, p.text, []string{"the most active 5000 are in the CSV evidence"}, "No message", "all are in")
		}
	}
}

// TestBaselineOfTheReported: the normal level is of those who are reported,
// not of a mail server that is spared.
func TestBaselineOfTheReported(t *testing.T) {
	b := flooded(t, func(c *Config, o *Options, l *floodLog) {
		s := l.b.String()
		l.b.Reset()
		l.at = testStart.Add(-3 * 24 * time.Hour)
		for i := range 700 {
			l.at = l.at.Add(time.Minute)
			l.open("198.51.100.200", 2000+i)
			l.line("1xVOgw-0003DU-%02d <= a@b.example H=good.example [198.51.100.200]:%d I=[203.0.113.25]:25 P=esmtp S=1", i%90+10, 2000+i)
		}
		l.b.WriteString(s)
	})
	_, msg := b.drafted()
	wants(t, said(t, msg), []string{"Normal level 3 connections in the 3 days before"})
}

// TestOthersAreCounted: how many networks were turned away is said.
func TestOthersAreCounted(t *testing.T) {
	_, msg := flooded(t, nil).drafted()
	wants(t, said(t, msg), []string{"from 1 other network,"}, "other networks")
}

// TestPrivateTarget: an address behind NAT is in no part of a report, and a
// person is told.
func TestPrivateTarget(t *testing.T) {
	b := flooded(t, func(c *Config, o *Options, l *floodLog) {
		s := strings.ReplaceAll(l.b.String(), "203.0.113.25", "10.0.3.17")
		l.b.Reset()
		l.b.WriteString(s)
	})
	c, msg := b.approved()
	_, ps := parts(t, msg)
	for _, p := range ps {
		wants(t, p.text, nil, "10.0.3.17")
	}
	wants(t, flat(ps[0].text), []string{"its public address is not in our log"})
	if w := strings.Join(c.mail().Warnings, "\n"); !strings.Contains(w, "private address") {
		t.Errorf("warnings %q", w)
	}
}

// TestHeldAndAverage: what was held at a moment is told apart from the mean
// over the rule's window.
func TestHeldAndAverage(t *testing.T) {
	b := blockOf(1, "198.51.100.9/32", testStart, 46, 0)
	b.Verdict.Score, b.Verdict.Held, b.Verdict.Count, b.Verdict.Capacity = 0.16, 20, 20, 20
	c := Case{Blocks: []Ref{{ID: 1, Prefix: b.Prefix, Verdict: b.Verdict, Since: b.Since, Until: b.Until}}}
	wants(t, strings.Join(sentences(&c), " "), []string{
		"At 2026-11-22 18:41:07 UTC (+00:00) 198.51.100.9 held 20 of the server's 20 slots; averaged over the 10 seconds before that, weighted by how full the server was, it is 16 % of them. Our limit is 15 %."}, " kept ")
}
