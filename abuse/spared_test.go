package abuse

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestOneAllowedOfMany: an address that is allowed after it was blocked is left
// out, wherever its case stands; the others are reported.
func TestOneAllowedOfMany(t *testing.T) {
	for _, when := range []string{"before the draft", "before it is approved", "before it is sent"} {
		t.Run(when, func(t *testing.T) {
			var spare []netip.Prefix
			b := newBench(t, testConfig(t), Options{Spare: func() []netip.Prefix { return spare }})
			b.wide()
			var blocks []Block
			for i := range 200 {
				blocks = append(blocks, blockOf(uint64(i+1), fmt.Sprintf("198.51.100.%d/32", i+1), testStart, 1000, 0))
			}
			b.Take(blocks...)
			allow := func() { spare = []netip.Prefix{pfx("198.51.100.7/32")} }
			if when == "before the draft" {
				allow()
			}
			d, _ := b.drafted()
			b.contact(d.ID, "abuse@op.example")
			var r *Refusal
			switch when {
			case "before it is approved":
				b.Show(d.ID, "root")
				allow()
				if _, err := b.Desk.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "198.51.100.7") || strings.Contains(r.Hint, "withdraw") {
					t.Fatalf("approved: %v", err)
				}
				b.Work(t.Context())
			case "before it is sent":
				must(b.Approve(d.ID, "root", Approval{}))
				allow()
				if _, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "198.51.100.7") || strings.Contains(r.Hint, "withdraw") {
					t.Fatalf("sent: %v", err)
				}
				b.Work(t.Context())
			}
			c := b.only()
			if c.State != Drafted || c.BlockCount != 199 || c.Connections != 199_000 || !strings.Contains(strings.Join(c.Notes, "\n"), "198.51.100.7") {
				t.Fatalf("%s (%s), %d blocks, %d connections, %q", c.State, c.Why, c.BlockCount, c.Connections, c.Notes)
			}
			_, msg, _ := b.Case(c.ID)
			_, ps := parts(t, msg)
			if csv := named(t, ps, "sources.csv"); strings.Contains(csv, "198.51.100.7,") || strings.Count(csv, "\n") != 200 {
				t.Errorf("sources.csv:\n%s", csv)
			}
			b.contact(c.ID, "abuse@op.example")
			must(b.Approve(c.ID, "root", Approval{}))
			must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
		})
	}
}

// TestFloodOfDays: what a flood did before the hours that are read is not its
// own normal level, and the report says when it began.
func TestFloodOfDays(t *testing.T) {
	l := newFloodLog()
	l.at = testStart.Add(-20 * 24 * time.Hour)
	l.line("SMTP connection from [203.0.113.99]:1 I=[203.0.113.25]:25 (TCP/IP connection count = 1)")
	l.at = testStart.Add(-2 * 24 * time.Hour)
	for i := range 5 {
		l.open("198.51.100.1", 1000+i)
	}
	var blocks []Block
	for day := range 5 {
		l.at = testStart.Add(time.Duration(day) * 20 * time.Hour)
		for i := range 1000 {
			l.open("198.51.100.1", 2000+i)
			l.at = l.at.Add(10 * time.Millisecond)
		}
		blocks = append(blocks, blockOf(uint64(day+1), "198.51.100.1/32", l.at, 1000, 0))
	}
	b := newBench(t, testConfig(t), Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
	b.Take(blocks[0])
	b.drafted() // nobody looks at it over a long weekend
	for i := 1; i < 5; i++ {
		b.pass(20 * time.Hour)
		b.Take(blocks[i])
		b.Work(t.Context())
	}
	b.pass(2 * time.Hour)
	b.Work(t.Context())
	c, msg, _ := b.Case(b.only().ID)
	if f := c.Mails[0].Facts; f.Baseline != 5 || f.Connections != 3000 {
		t.Errorf("normal level %d in %.1f days, %d connections", f.Baseline, f.BaselineDays, f.Connections)
	}
	_, ps := parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "The flood began before, at 2026-11-22 18:4") || !strings.Contains(text, "5 connections in the 7 days before it") {
		t.Errorf("%s", ps[0].text)
	}
}
