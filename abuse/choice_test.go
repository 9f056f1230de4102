package abuse

import (
	"strings"
	"testing"
	"time"
)

// pardons is what the store says of blocks, some of which an operator lifts.
type pardons struct {
	blocks map[uint64]Block
	lifted map[uint64]bool
}

func newPardons(bs ...Block) *pardons {
	p := &pardons{map[uint64]Block{}, map[uint64]bool{}}
	for _, b := range bs {
		p.blocks[b.ID] = b
	}
	return p
}

func (p *pardons) refresh(id uint64) (Block, bool) {
	b, ok := p.blocks[id]
	b.Pardoned = p.lifted[id]
	return b, ok
}

// TestChosenStays: whom a person wrote in gets the report and nobody else,
// whatever happens to the draft, in every mode.
func TestChosenStays(t *testing.T) {
	const desk = "right@desk.example"
	for _, mode := range []Mode{Draft, Auto} {
		for _, after := range []string{"before the approval", "after the approval", "after a restart"} {
			t.Run(string(mode)+" "+after, func(t *testing.T) {
				p := newPardons(blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12), blockOf(2, "198.51.100.77/32", testStart.Add(16*time.Second), 200, 12))
				b := flooded(t, func(c *Config, o *Options, _ *floodLog) {
					c.Mode, c.Auto = mode, AutoSend{Connections: 1, Blocks: 99}
					o.Refresh = p.refresh
				})
				b.Take(p.blocks[2])
				d, _ := b.drafted()
				b.config.Auto.Blocks = 1
				to, cc := desk, ""
				d = must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to, Cc: &cc}))
				if after != "before the approval" {
					must(b.Approve(d.ID, "root", Approval{}))
				}
				if after == "after a restart" {
					b.config.Mode = mode
					b2 := newBench(t, b.config, Options{Store: b.store, Logs: b.o.Logs, Refresh: p.refresh})
					worldOf[b.Desk].connect(b2.lookups)
					b = b2
				}
				p.lifted[2] = true
				for range 5 {
					b.pass(2 * time.Hour)
					b.Work(t.Context())
				}
				c := b.only()
				if m := c.Mails[0]; c.State != Drafted || m.To.Address != desk || m.Cc.Address != "" || m.Chosen != "root" || len(b.sent()) != 0 {
					t.Fatalf("%s, to %s, cc %q, chosen by %q, %d sent", c.State, m.To.Address, m.Cc.Address, m.Chosen, len(b.sent()))
				}
				if w := strings.Join(c.Mails[0].Warnings, "\n"); !strings.Contains(w, "root chose the recipients; a lookup names abuse@op2.example (of AS64500") {
					t.Errorf("the difference is not shown: %q", c.Mails[0].Warnings)
				}
				must(b.Approve(d.ID, "root", Approval{}))
				b.Work(t.Context())
				if s := b.sent(); len(s) != 1 || strings.Join(s[0].args[4:], " ") != desk {
					t.Errorf("sent %+v", s)
				}
			})
		}
	}
}

// TestApprovedByHand: what a person approved, and what then changed under it,
// goes back to that person, in every mode, with the recipients that he saw.
func TestApprovedByHand(t *testing.T) {
	p := newPardons(blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12), blockOf(2, "198.51.100.77/32", testStart.Add(16*time.Second), 200, 12))
	b := flooded(t, func(c *Config, o *Options, _ *floodLog) {
		c.Mode, c.Auto = Auto, AutoSend{Connections: 1, Blocks: 99}
		o.Refresh = p.refresh
	})
	b.Take(p.blocks[2])
	d, _ := b.drafted()
	b.config.Auto.Blocks = 1
	must(b.Approve(d.ID, "root", Approval{}))
	p.lifted[2] = true
	w := worldOf[b.Desk]
	w.set("/rdap/autnum/64500", string(answerAS(64500, entity(`"abuse"`, `["email",{},"text","abuse@op3.example"]`))))
	b.lookups.cache = map[string]*remembered{}
	for range 5 {
		b.pass(2 * time.Hour)
		b.Work(t.Context())
	}
	if c := b.only(); c.State != Drafted || c.Mails[0].To.Address != "abuse@op2.example" || len(b.sent()) != 0 {
		t.Errorf("%s (%s), to %s, %d sent", c.State, c.Why, c.Mails[0].To.Address, len(b.sent()))
	}
}

// goesOn lets the flood of a sent report go on until it is followed up.
func (b *bench) goesOn(id uint64) Case {
	b.t.Helper()
	for i := range uint64(2) {
		b.pass(20 * time.Hour)
		b.Take(blockOf(id+i, "198.51.100.23/32", b.time(), 500, 0))
	}
	b.pass(time.Hour)
	b.forgive()
	b.Work(b.t.Context())
	c := b.only()
	if c.State != Drafted || len(c.Mails) != 2 {
		b.t.Fatalf("no follow-up: %s (%s), %d mails", c.State, c.Why, len(c.Mails))
	}
	return c
}

// TestFollowUpRecipients: a follow-up goes to whom a person chose, and by a
// lookup to nobody who bounced.
func TestFollowUpRecipients(t *testing.T) {
	t.Run("chosen", func(t *testing.T) {
		for _, mode := range []Mode{Draft, Auto} {
			b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
				c.Mode, c.Auto = mode, AutoSend{Connections: 99_999, Blocks: 1}
			})
			d, _ := b.drafted()
			to, cc := "right@desk.example", ""
			must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to, Cc: &cc}))
			must(b.Approve(d.ID, "root", Approval{}))
			must(b.Send(t.Context(), d.ID, "root", SendOptions{}))
			b.config.Auto.Connections = 1
			c := b.goesOn(2)
			check := func() {
				t.Helper()
				if m := b.only().Mails[1]; m.To.Address != to || m.Cc.Address != "" || m.Chosen != "root" || len(b.sent()) != 1 {
					t.Errorf("%s: to %s, cc %q, %d sent", mode, m.To.Address, m.Cc.Address, len(b.sent()))
				}
			}
			check()
			// It grows, and is made anew.
			b.Take(blockOf(9, "198.51.100.41/32", b.time(), 500, 0))
			b.pass(2 * time.Hour)
			b.Work(t.Context())
			if m := b.only().Mails[1]; m.LastID != 9 || c.mail().LastID == 9 {
				t.Errorf("it is not made anew")
			}
			check()
			// Also where a lookup is due.
			b.cases[d.ID].Again.Missing = "somebody"
			b.cases[d.ID].mail().Outdated = true
			b.Work(t.Context())
			check()
		}
	})
	for _, k := range []struct{ bounced, to, cc string }{
		{"", "abuse@op2.example", "abuse@op1.example"},
		{"abuse@op1.example", "abuse@op2.example", ""},
		{"abuse@op2.example", "abuse@op1.example", ""},
	} {
		t.Run("bounced "+k.bounced, func(t *testing.T) {
			b, c := sentReport(t)
			if k.bounced != "" {
				b.store.SetRecord(kindBad, k.bounced, []byte(b.time().Add(badFor).Format(time.RFC3339)))
			}
			c = b.goesOn(2)
			m := c.mail()
			if m.To.Address != k.to || m.Cc.Address != k.cc {
				t.Errorf("to %q, cc %q; want %q, %q", m.To.Address, m.Cc.Address, k.to, k.cc)
			}
			shown := false
			for _, o := range m.Others {
				shown = shown || o.Address == k.bounced && strings.Contains(o.Note, "bounced")
			}
			if k.bounced != "" && !shown {
				t.Errorf("the one that bounced is not shown: %+v", m.Others)
			}
		})
	}
}

// TestReopenClosed: a draft that was closed by mistake is there again.
func TestReopenClosed(t *testing.T) {
	b := flooded(t, nil)
	c, _ := b.drafted()
	must(b.CloseCase(c.ID, "root", ""))
	if c, err := b.Reopen(c.ID, "root"); err != nil || c.State != Drafted {
		t.Fatalf("%s, %v", c.State, err)
	}
	b.hours(1)
	must(b.Approve(c.ID, "root", Approval{}))
	c = must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	must(b.CloseCase(c.ID, "root", "done"))
	if c, err := b.Reopen(c.ID, "root"); err != nil || c.State != Sent {
		t.Errorf("%s, %v", c.State, err)
	}
	b.hours(30)
	if n := len(b.sent()); n != 1 {
		t.Errorf("%d mails", n)
	}
}
