package abuse

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// whenAsked runs f once, when RIPEstat is asked about anything that begins with about.
func whenAsked(t *testing.T, b *bench, about string, f func()) {
	was := b.lookups.servers.ripestat
	var once sync.Once
	s := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Query().Get("resource"), about) {
			once.Do(f)
			rw.Write([]byte(`{"data":{"asns":[],"prefix":""}}`))
			return
		}
		http.Redirect(rw, r, was+strings.TrimPrefix(r.URL.RequestURI(), "/"), http.StatusFound)
	}))
	t.Cleanup(s.Close)
	b.lookups.servers.ripestat = strings.Replace(s.URL, "127.0.0.1", "localhost", 1) + "/"
}

// Approved while other cases are looked up in the same round.
func TestApprovedDuringRound(t *testing.T) {
	for _, held := range []bool{false, true} {
		t.Run(fmt.Sprint("held by a cap ", held), func(t *testing.T) {
			b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
				if held {
					c.Caps.Hour = 1
				}
			})
			d, _ := b.drafted()
			b.Take(blockOf(2, "198.51.100.77/32", b.time(), 500, 0)) // it grows
			b.Take(blockOf(3, "203.0.99.5/32", b.time(), 200, 0))    // another network
			if held {
				b.config.Caps.Hour = 0
			}
			b.pass(2 * time.Hour)
			whenAsked(t, b, "203.0.99.", func() {
				must(b.Approve(d.ID, "alice", Approval{}))
				if !held { // Run's other loop does so at once
					b.workSend(t.Context())
				}
			})
			b.Work(t.Context())
			c, _, _ := b.Case(d.ID)
			if held && c.State != Approved {
				t.Errorf("alice approved it, and it is %s", c.State)
			}
			if !held && c.State != Sent {
				t.Errorf("it was sent, and is %s with %d mails", c.State, len(c.Mails))
			}
			b.config.Caps.Hour = 5
			for range 5 {
				b.pass(time.Hour)
				b.Work(t.Context())
			}
			if n := len(b.sent()); n != 1 || len(b.cases[d.ID].Mails) != 1 {
				t.Errorf("%d were sent, there are %d mails", n, len(b.cases[d.ID].Mails))
			}
		})
	}
}

// Closed while other cases are looked up in the same round, mode auto.
func TestClosedDuringRound(t *testing.T) {
	for _, how := range []string{"close", "withdraw"} {
		t.Run(how, func(t *testing.T) {
			b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Mode, c.Auto = Auto, AutoSend{Connections: 1, Blocks: 1} })
			id := b.only().ID
			b.Take(blockOf(3, "203.0.99.5/32", testStart, 150, 0))
			whenAsked(t, b, "203.0.99.", func() {
				var err error
				if how == "close" {
					_, err = b.CloseCase(id, "alice", "our own test")
				} else {
					_, err = b.Withdraw(id, "alice", "our own test")
				}
				if err != nil {
					t.Error(err)
				}
			})
			b.Work(t.Context())
			if c, _, _ := b.Case(id); !c.State.over() || len(b.sent()) > 0 {
				t.Errorf("alice said %s, and it is %s, %d sent", how, c.State, len(b.sent()))
			}
		})
	}
}

// Left out while the draft is being made anew.
func TestLeftOutDuringDraft(t *testing.T) {
	var spare []netip.Prefix
	l := newFloodLog()
	for i := range 9 {
		for k := range 100 {
			l.open(fmt.Sprintf("198.51.100.%d", i+1), 2000+k)
		}
	}
	h := &hookLogs{Logs: &logText{text: l.b.String(), zone: time.UTC}}
	b := newBench(t, testConfig(t), Options{Spare: func() []netip.Prefix { return spare }, Logs: h})
	for i := range 8 {
		b.Take(blockOf(uint64(i+1), fmt.Sprintf("198.51.100.%d/32", i+1), testStart.Add(time.Second), 100, 0))
	}
	d, _ := b.drafted()
	b.cases[d.ID].Mails[0].To = Contact{Address: "abuse@op.example", Scope: "AS64500", Source: "RDAP", Role: "abuse"}
	b.Desk.mu.Lock()
	c := b.cases[d.ID].clone()
	msg := must(b.finishMail(c, c.mail(), "", false))
	must(0, b.commit(b.cases[d.ID], c, 0, *c.mail(), msg))
	b.Desk.mu.Unlock()
	b.Take(blockOf(9, "198.51.100.9/32", testStart.Add(2*time.Second), 100, 0))
	b.pass(2 * time.Hour)
	var once sync.Once
	h.hook = func() {
		once.Do(func() {
			spare = []netip.Prefix{pfx("198.51.100.5/32")}
			_, err := b.Approve(d.ID, "alice", Approval{})
			var r *Refusal
			if !asRefusal(err, &r) {
				t.Errorf("approved, though 198.51.100.5 is allowed: %v", err)
			}
		})
	}
	b.Work(t.Context())
	for range 5 { // it is made anew "within a minute"
		b.pass(time.Minute)
		b.Work(t.Context())
	}
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "alice", Approval{}))
	b.Work(t.Context())
	for _, s := range b.sent() {
		if strings.Contains(s.msg, "198.51.100.5,") || strings.Contains(s.msg, "198.51.100.5 ") {
			t.Errorf("the report that was sent to %q accuses 198.51.100.5, which is allowed and was left out", s.args)
		}
	}
}

// A follow-up draft that is withdrawn and reopened.
func TestReopenFollowUp(t *testing.T) {
	b := flooded(t, nil)
	d, _ := b.drafted()
	must(b.Approve(d.ID, "alice", Approval{}))
	must(b.Send(t.Context(), d.ID, "alice", SendOptions{}))
	c := b.goesOn(2)
	must(b.Withdraw(c.ID, "alice", "not now"))
	must(b.Reopen(c.ID, "alice"))
	b.Work(t.Context())
	c, _, _ = b.Case(c.ID)
	_, aerr := b.Approve(c.ID, "alice", Approval{})
	if c.State != Drafted || aerr != nil {
		t.Errorf("the follow-up was never sent (%d mails left), and is %s; approve: %v", len(b.sent()), c.State, aerr)
	}
	b.pass(30 * time.Hour)
	b.Take(blockOf(50, "198.51.100.23/32", b.time(), 900, 0))
	b.pass(time.Hour)
	b.forgive()
	b.Work(t.Context())
}

// Reopened after some days, and a cap or a lookup stands against the draft.
func TestReopenOld(t *testing.T) {
	b := flooded(t, nil)
	id := b.only().ID
	must(b.Withdraw(id, "alice", "wait"))
	b.pass(10 * 24 * time.Hour)
	w := worldOf[b.Desk]
	w.setTXT("0.100.51.198.origin.test")
	w.down()
	must(b.Reopen(id, "alice"))
	b.Work(t.Context())
	if _, _, err := b.Case(id); err != nil {
		t.Errorf("reopened and gone: %v", err)
	}
}

// Every block of a follow-up is lifted by the operator.
func TestFollowUpLifted(t *testing.T) {
	p := newPardons(blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12))
	b := flooded(t, func(_ *Config, o *Options, _ *floodLog) { o.Refresh = p.refresh })
	d, _ := b.drafted()
	must(b.Approve(d.ID, "alice", Approval{}))
	must(b.Send(t.Context(), d.ID, "alice", SendOptions{}))
	for i := range uint64(2) {
		b.pass(20 * time.Hour)
		x := blockOf(2+i, "198.51.100.23/32", b.time(), 500, 0)
		p.blocks[2+i] = x
		b.Take(x)
	}
	b.pass(time.Hour)
	b.forgive()
	b.Work(t.Context())
	p.lifted[2], p.lifted[3] = true, true
	for range 3 {
		b.pass(2 * time.Hour)
		b.Work(t.Context())
	}
	c, msg, _ := b.Case(d.ID)
	if c.State == Drafted {
		t.Errorf("nothing is left to report, and it is %s (%s)\n%s", c.State, c.Why, msg)
	}
}

// The hint "allow add" is followed, and approve comes at once.
func TestAllowThenApprove(t *testing.T) {
	whole := blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12)
	p := newPardons(whole)
	var spare []netip.Prefix
	b := flooded(t, func(_ *Config, o *Options, _ *floodLog) {
		o.Refresh = p.refresh
		o.Spare = func() []netip.Prefix { return spare }
	})
	d, _ := b.drafted()
	to, text := "right@desk.example", "My own words.\n"
	must(b.Edit(t.Context(), d.ID, "alice", Edit{To: &to, Text: &text}))
	// `smtpguard allow add 198.51.100.200`: the guard lifts the block and makes parts.
	p.lifted[1] = true
	whole.Lifted = b.time()
	p.blocks[1] = whole
	spare = []netip.Prefix{pfx("198.51.100.200/32")}
	if _, err := b.Approve(d.ID, "alice", Approval{}); err == nil {
		t.Error("approved, with nothing in it")
	}
	for i, s := range []string{"198.51.100.0/25", "198.51.100.128/26", "198.51.100.192/29", "198.51.100.201/32", "198.51.100.202/31", "198.51.100.204/30", "198.51.100.208/28", "198.51.100.224/27"} {
		x := blockOf(uint64(i+2), s, whole.Since, 200, 12)
		x.PartOf = whole.Prefix
		if i > 0 {
			x.Verdict.Opens, x.Verdict.Refused = 0, 0
		}
		p.blocks[x.ID] = x
		b.Take(x)
	}
	b.pass(time.Hour)
	b.Work(t.Context())
	for _, c := range b.Cases() {
		if m := c.mail(); c.State == Drafted && m.Chosen == "" {
			t.Errorf("%s is a new draft of the same flood to %s; alice's text and recipient are gone with %s", c.ID, m.To.Address, d.ID)
		}
	}
}

// Sent, closed, then an allow inside the block splits it: a second report.
func TestSplitAfterClose(t *testing.T) {
	for _, mode := range []Mode{Draft, Auto} {
		t.Run(string(mode), func(t *testing.T) {
			whole := blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12)
			p := newPardons(whole)
			b := flooded(t, func(c *Config, o *Options, _ *floodLog) {
				c.Mode, c.Auto = mode, AutoSend{Connections: 100, Blocks: 2}
				o.Refresh = p.refresh
			})
			d, _ := b.drafted()
			must(b.Approve(d.ID, "alice", Approval{}))
			must(b.Send(t.Context(), d.ID, "alice", SendOptions{}))
			must(b.CloseCase(d.ID, "alice", "they cleaned it"))
			p.lifted[1] = true
			for i, s := range []string{"198.51.100.0/25", "198.51.100.128/26", "198.51.100.192/29", "198.51.100.201/32"} {
				x := blockOf(uint64(i+2), s, whole.Since, 200, 12)
				x.PartOf = whole.Prefix
				if i > 0 {
					x.Verdict.Opens, x.Verdict.Refused = 0, 0
				}
				p.blocks[x.ID] = x
				b.Take(x)
			}
			for range 30 {
				b.pass(time.Hour)
				b.forgive()
				b.Work(t.Context())
			}
			if n := len(b.sent()); n > 1 {
				t.Errorf("%d mails about one flood", n)
			}
			if n := len(b.Cases()); n > 1 {
				t.Errorf("%d cases of one flood", n)
			}
		})
	}
}

// A split block counts as many blocks for reports.auto, and twice in connections.
func TestSplitCounts(t *testing.T) {
	whole := blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 60, 0)
	whole.Verdict.Held = 1
	p := newPardons(whole)
	b := newBench(t, testConfig(t), Options{Refresh: p.refresh})
	b.Take(whole)
	p.lifted[1] = true
	for i, s := range []string{"198.51.100.0/25", "198.51.100.128/26", "198.51.100.192/29"} {
		x := blockOf(uint64(i+2), s, whole.Since, 60, 0)
		x.PartOf = whole.Prefix
		x.Verdict.Held = 1
		if i > 0 {
			x.Verdict.Opens, x.Verdict.Refused = 0, 0
		}
		p.blocks[x.ID] = x
		b.Take(x)
	}
	b.Work(t.Context())
	c := b.only()
	if c.Connections != 60 || c.BlockCount != 1 || c.State != Gathering {
		t.Errorf("one block of 60 connections counts %d connections in %d blocks (auto needs 2 blocks, a draft 100 connections), and is %s", c.Connections, c.BlockCount, c.State)
	}
}
