package abuse

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestAuto walks mode auto through everything that may stand against a report
// that nobody read. Each case is a flood that goes out by itself but for one
// thing; want is in what is said of it, and a person can still approve it where
// then says so.
func TestAuto(t *testing.T) {
	const a1, a2 = "abuse@op1.example", "abuse@op2.example"
	inside := func(p string) func(netip.Addr) (netip.Prefix, bool) {
		return func(a netip.Addr) (netip.Prefix, bool) { return pfx(p), pfx(p).Contains(a) }
	}
	overrides := func(text string) func(*Config, *Options, *world) {
		return func(c *Config, _ *Options, w *world) {
			c.Overrides = filepath.Join(w.t.TempDir(), "overrides")
			must(0, os.WriteFile(c.Overrides, []byte(text+"\n"), 0o600))
		}
	}
	for _, k := range []struct {
		name   string
		before func(*Config, *Options, *world) // the desk is opened
		drafts func(*bench, Case)              // between the draft and the approval
		want   string                          // "": it goes out
		to     string                          // whom it goes to, or would
		state  State                           // where it stays; "": Drafted
	}{
		{name: "nothing", to: a2 + " " + a1},
		{name: "no copies", before: func(c *Config, _ *Options, _ *world) { c.CopyNetwork = false }, to: a2},
		{name: "trial for all", before: func(c *Config, _ *Options, _ *world) { c.Redirect = "me@example.net" }, to: "abuse@op2.example", want: "reports.redirect sent it to me@example.net"},
		{name: "an override", before: overrides("198.51.100.0/24 known@desk.example"), to: "known@desk.example"},
		{name: "the AS's desk has a form, the override is its address", before: overrides("AS64500 known@desk.example form=https://desk.example/"), to: "known@desk.example"},
		{name: "the desk prefers a form", before: overrides("AS64500 form=https://desk.example/"), want: "prefers its form", to: a2},
		{name: "never", before: overrides("AS64500 never"), want: "gathered nothing"},
		{name: "an overrides file with a fault", drafts: func(b *bench, _ Case) {
			b.Desk.overrides.path = filepath.Join(b.config.Dir, "gone")
		}, want: "overrides file", to: a2},
		{name: "too few connections", before: func(c *Config, _ *Options, _ *world) { c.Auto.Connections = 10_000 }, want: "below reports.auto", to: a2},
		{name: "too few blocks", before: func(c *Config, _ *Options, _ *world) { c.Auto.Blocks = 2 }, want: "below reports.auto", to: a2},
		{name: "a guess", before: func(_ *Config, _ *Options, w *world) {
			w.set("/rdap/autnum/64500", string(answerAS(64500, entity(`"technical"`, `["email",{},"text","abuse@op3.example"]`))))
			w.unset("/rdap/ip/198.51.100.0")
		}, want: "contact missing"},
		{name: "the contact of a part", before: func(_ *Config, _ *Options, w *world) {
			w.set("/rdap/autnum/64500", "!404")
			w.set("/rdap/ip/198.51.100.0", rdapOf("198.51.100.16", "198.51.100.31", "abuse@small-customer.example"))
		}, want: "contact missing"},
		{name: "the AS's contact is not answered for", before: func(_ *Config, _ *Options, w *world) { w.set("/rdap/autnum/64500", "<html>") }, want: "an answer is missing: RDAP autnum/64500", to: a1},
		{name: "the origin is disputed", before: func(_ *Config, _ *Options, w *world) {
			w.setTXT("0.100.51.198.origin.test", "64511 | 198.51.100.0/24 | ZZ | x | x")
		}, want: "disputed", to: a2},
		{name: "only a database knows the origin", before: func(_ *Config, _ *Options, w *world) {
			w.set("/stat/network-info/data.json?198.51.100.0", "!404")
		}, want: "not certain who announces", to: a2},
		{name: "the announcement is narrower than the block", before: func(_ *Config, _ *Options, w *world) {
			w.set("/stat/network-info/data.json?198.51.100.0", `{"data":{"asns":["64500"],"prefix":"198.51.100.0/25"}}`)
		}, want: "not certain who announces", to: a1}, // of whom the whole is
		{name: "the recipient bounced", before: func(_ *Config, o *Options, _ *world) {
			o.Store = newMemStore()
			o.Store.SetRecord(kindBad, a2, []byte(testStart.Add(badFor).Format(time.RFC3339)))
		}, to: a1},
		{name: "the recipient bounces after the draft", drafts: func(b *bench, _ Case) {
			b.o.Store.SetRecord(kindBad, a2, []byte(testStart.Add(badFor).Format(time.RFC3339)))
		}, want: "bounced; it is left alone", to: a2},
		{name: "the copy bounces after the draft", drafts: func(b *bench, _ Case) {
			b.o.Store.SetRecord(kindBad, a1, []byte(testStart.Add(badFor).Format(time.RFC3339)))
		}, to: a2},
		{name: "the desk's mail server is blocked", before: func(_ *Config, o *Options, _ *world) { o.Blocked = inside("192.0.2.0/24") }, want: "own mail server 192.0.2.2", to: a2},
		{name: "nobody knows the desk's mail servers", before: func(_ *Config, _ *Options, w *world) {
			w.mu.Lock()
			defer w.mu.Unlock()
			clear(w.mx)
			clear(w.a)
		}, want: "mail servers of op2.example are not known", to: a2},
		{name: "it was allowed meanwhile", drafts: func(b *bench, _ Case) {
			b.o.Spare = func() []netip.Prefix { return []netip.Prefix{pfx("198.51.0.0/16")} }
		}, want: "our own or allowed", to: a2},
		{name: "the desk's mail server in it was allowed", drafts: func(b *bench, c Case) {
			b.cases[c.ID].mail().Servers = []netip.Addr{netip.MustParseAddr("198.51.100.25")}
			b.o.Spare = func() []netip.Prefix { return []netip.Prefix{pfx("198.51.100.25/32")} }
		}, want: "198.51.100.25/32 inside it is allowed", to: a2},
		{name: "it was lifted meanwhile", drafts: func(b *bench, c Case) {
			b.o.Refresh = func(id uint64) (Block, bool) {
				return Block{ID: id, Pardoned: true, Until: testStart.Add(24 * time.Hour)}, true
			}
		}, want: "every block of it was lifted", to: a2, state: Withdrawn},
		{name: "a person edited the text", drafts: func(b *bench, c Case) {
			s := "My own words.\n"
			must(b.Edit(context.Background(), c.ID, "root", Edit{Text: &s}))
		}, want: "root has changed or approved it", to: a2},
		{name: "a person chose another", drafts: func(b *bench, c Case) {
			s := "right@desk.example"
			must(b.Edit(context.Background(), c.ID, "root", Edit{To: &s}))
		}, want: "root has changed or approved it", to: "right@desk.example"},
		{name: "a person chose the recipients of the report that it follows up", drafts: func(b *bench, c Case) { b.cases[c.ID].mail().Chosen = "root" }, want: "root chose whom to write to", to: a2},
		{name: "the contact could not be confirmed today", drafts: func(b *bench, c Case) { b.cases[c.ID].mail().To.Stale = true }, want: "could not be confirmed", to: a2},
		{name: "the case has grown beyond the contact", drafts: func(b *bench, c Case) {
			m := b.cases[c.ID].mail()
			m.To = m.To.ofNet(pfx("198.51.100.0/25"))
		}, want: "of a part only", to: a2},
		{name: "the case has another network than the mail", drafts: func(b *bench, c Case) { b.cases[c.ID].Network = pfx("198.51.0.0/16") }, want: "not certain who announces", to: a2},
		{name: "nothing was blocked", drafts: func(b *bench, c Case) { b.cases[c.ID].Blocks[0].Observed = true }, want: "nothing was blocked", to: a2},
		{name: "it is outdated", drafts: func(b *bench, c Case) {
			b.cases[c.ID].mail().Outdated = true
			b.Desk.retry[c.ID] = b.time().Add(time.Hour) // it cannot be made anew now
		}, want: "has changed since it was drafted", to: a2},
		{name: "a person withdrew it", drafts: func(b *bench, c Case) { must(b.Withdraw(c.ID, "root", "")) }, want: "root withdrew the report on 198.51.100.0/24", to: a2, state: Withdrawn},
		{name: "a trial to a person is not it", drafts: func(b *bench, c Case) {
			must(b.Send(context.Background(), c.ID, "root", SendOptions{To: "me@example.net"}))
		}, to: a2 + " " + a1},
		{name: "it was handed over before", drafts: func(b *bench, c Case) {
			b.cases[c.ID].mail().attempt(Attempt{Begun: testStart, Result: string(rejected)})
		}, want: "handed over before", to: a2},
		{name: "another report of the network is in a person's hands", drafts: func(b *bench, c Case) {
			o := b.cases[c.ID].clone()
			o.ID, o.Network, o.Mails[0].Hand = "SG-0", pfx("198.51.0.0/16"), "root"
			b.cases[o.ID] = o
		}, want: "SG-0 is of the same network", to: a2},
		{name: "the contact is ourselves", before: func(_ *Config, _ *Options, w *world) {
			w.set("/rdap/autnum/64500", strings.ReplaceAll(string(must(os.ReadFile("../testdata/abuse/rdap/ripe-autnum.json"))), a2, "abuse@example.net"))
			w.setMX("example.net", "203.0.113.9")
		}, want: "abuse@example.net is an address of our own domain", to: "abuse@example.net"},
		{name: "the recipient got a mail today", drafts: func(b *bench, c Case) {
			o := b.cases[c.ID].clone()
			o.ID, o.Network, o.State = "SG-0", pfx("192.0.2.0/24"), Closed
			o.Mails[0].attempt(Attempt{Begun: b.time().Add(-time.Hour), Rcpt: []string{a2}, Result: string(taken)})
			b.cases[o.ID] = o
		}, want: "the next one may go at", to: a2, state: Approved},
	} {
		t.Run(k.name, func(t *testing.T) {
			var w *world
			want := AutoSend{Connections: 1, Blocks: 1}
			b := flooded(t, func(c *Config, o *Options, _ *floodLog) {
				// Without the database's word beside RIPEstat's, and DNS answers.
				w = newWorld(t)
				w.plain()
				w.set("/stat/network-info/data.json?198.51.100.0", `{"data":{"asns":["64500"],"prefix":"198.51.100.0/24"}}`)
				w.set("/rdap/ip/198.51.100.0", rdapOf("198.51.100.0", "198.51.100.255", a1))
				w.setMX("desk.example", "192.0.2.99")
				w.online(c)
				c.Mode, c.Auto = Auto, want
				if k.before != nil {
					k.before(c, o, w)
				}
			})
			w.connect(b.lookups)
			worldOf[b.Desk] = w
			if k.drafts != nil { // a draft first
				auto := b.config.Auto
				b.config.Auto.Connections = 1 << 30
				d, _ := b.drafted()
				b.config.Auto = auto
				k.drafts(b, d)
			}
			for range 3 {
				b.Work(t.Context())
				b.pass(5 * time.Minute)
			}
			var c Case
			for _, o := range b.Cases() {
				if o.ID != "SG-0" {
					c = o
				}
			}
			var sent []string
			for _, s := range b.sent() {
				if to := strings.Join(s.args[4:], " "); to != "me@example.net" {
					sent = append(sent, to)
				}
			}
			if k.want == "" {
				if c.State != Sent || !slices.Equal(sent, []string{k.to}) || c.Mails[0].Approved != Self {
					t.Errorf("%s (%s), sent to %q, want %q", c.State, c.Why, sent, k.to)
				}
				b.hours(30) // and never again
				if n := len(b.sent()); n != len(sent) && k.name != "a trial to a person is not it" {
					t.Errorf("%d mails", n)
				}
				return
			}
			if len(sent) != 0 {
				t.Fatalf("sent to %q", sent)
			}
			if k.want == "gathered nothing" {
				if c.ID != "" {
					t.Errorf("%+v", c)
				}
				return
			}
			state := k.state
			if state == "" {
				state = Drafted
			}
			why := c.Why
			if state == Drafted && !strings.Contains(why, k.want) { // what bars everybody is said when somebody approves
				_, err := b.approve(c.ID, Self, Approval{}, true)
				var r *Refusal
				if !asRefusal(err, &r) {
					t.Fatalf("%v", err)
				}
				why += "; " + r.Why
			}
			if c.State != state || !strings.Contains(why, k.want) || c.Mails[0].To.Address != k.to {
				t.Errorf("%s, to %s, because %q; want %s, %s, %q", c.State, c.Mails[0].To.Address, why, state, k.to, k.want)
			}
		})
	}
}

// TestAutoApprovedThen: what comes up while a cap holds back what the program
// has approved stops it.
func TestAutoApprovedThen(t *testing.T) {
	for want, change := range map[string]func(*bench, Case){
		"": func(*bench, Case) {},
		"abuse@op2.example bounced": func(b *bench, _ Case) {
			b.store.SetRecord(kindBad, "abuse@op2.example", []byte(b.time().Add(badFor).Format(time.RFC3339)))
		},
		"root withdrew the report on 198.51.100.0/25": func(b *bench, c Case) {
			o := b.cases[c.ID].clone()
			o.ID, o.State, o.Network = "SG-0", Drafted, pfx("198.51.100.0/25")
			b.cases[o.ID] = o
			must(b.Withdraw(o.ID, "root", ""))
		},
		"own mail server 192.0.2.26 is inside": func(b *bench, _ Case) {
			b.o.Blocked = func(a netip.Addr) (netip.Prefix, bool) {
				return pfx("192.0.2.26/32"), a == netip.MustParseAddr("192.0.2.26")
			}
		},
		"198.51.0.0/16": func(b *bench, _ Case) {
			b.o.Spare = func() []netip.Prefix { return []netip.Prefix{pfx("198.51.0.0/16")} }
		},
	} {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Mode, c.Auto = Auto, AutoSend{Connections: 1, Blocks: 1} })
		b.config.Caps.Hour = 0 // as if others had gone
		b.Work(t.Context())
		c := b.only()
		if c.State != Approved || !strings.Contains(c.Why, "caps.hour") {
			t.Fatalf("%s (%s)", c.State, c.Why)
		}
		change(b, c)
		b.config.Caps.Hour = 5
		for range 3 {
			b.Work(t.Context())
		}
		c, _, _ = b.Case(c.ID)
		if want == "" {
			if c.State != Sent || len(b.sent()) != 1 {
				t.Errorf("%s (%s)", c.State, c.Why)
			}
			continue
		}
		if c.State != Drafted || !strings.Contains(c.Why, want) || len(b.sent()) != 0 {
			t.Errorf("%s (%s), %d sent; want %q", c.State, c.Why, len(b.sent()), want)
		}
	}
}

// TestWithdrawnStays: what a person withdrew comes back neither by the next
// block nor by a restart, until its time is over or he says so.
func TestWithdrawnStays(t *testing.T) {
	again := func(t *testing.T) (*bench, Case, Case) {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
			c.Mode, c.Auto = Auto, AutoSend{Connections: 1 << 30, Blocks: 1}
		})
		d, _ := b.drafted()
		d = must(b.Withdraw(d.ID, "root", "our partner, I have called them"))
		if !strings.Contains(d.Why, "our partner") || !strings.Contains(d.Why, "before 2026-12-22") || !strings.Contains(d.Why, "reports reopen "+d.ID) {
			t.Errorf("why %q", d.Why)
		}
		b.config.Auto.Connections = 1
		b.pass(time.Hour)
		b.Take(blockOf(2, "198.51.100.0/24", b.time(), 200, 12))
		b.hours(2)
		for _, c := range b.Cases() {
			if c.ID != d.ID {
				return b, d, c
			}
		}
		t.Fatal("the new block is not gathered")
		return nil, d, d
	}
	t.Run("held", func(t *testing.T) {
		b, d, c := again(t)
		if c.State != Held || len(c.Mails) != 0 || !strings.Contains(c.Why, "root withdrew the report on 198.51.100.0/24 ("+d.ID+")") || !strings.Contains(c.Why, "`smtpguard reports reopen "+c.ID+"`") || len(b.sent()) != 0 {
			t.Errorf("%s (%s), %d sent", c.State, c.Why, len(b.sent()))
		}
		asked := len(b.asked)
		b.hours(5)
		if n := len(b.asked); n != asked {
			t.Errorf("%d lookups for what nobody wants", n-asked)
		}
		// Another network with the same neighbour is not meant.
		b.lookups.remember(netKey(RIPEstat, pfx("198.51.101.0/24")), &remembered{Claim: &Claim{Origins: []uint32{64500}, Prefix: pfx("198.51.101.0/24"), Source: "RIPEstat", Announced: true}})
		b.Take(blockOf(3, "198.51.101.7/32", b.time(), 500, 0))
		b.hours(1)
		// Nor is a part of it that another AS announces, once that is known.
		b.lookups.remember(netKey(RIPEstat, pfx("198.51.100.128/25")), &remembered{Claim: &Claim{Origins: []uint32{64511}, Prefix: pfx("198.51.100.128/25"), Source: "RIPEstat", Announced: true}})
		b.Take(blockOf(4, "198.51.100.200/32", b.time(), 500, 0))
		b.hours(1)
		for _, n := range []string{"198.51.101.0/24", "198.51.100.128/25"} {
			if i := slices.IndexFunc(b.Cases(), func(c Case) bool { return c.Network == pfx(n) }); i < 0 || b.Cases()[i].mail() == nil {
				for _, c := range b.Cases() {
					t.Errorf("%s: %s %s AS%d %s (%s)", n, c.ID, c.Network, c.AS, c.State, c.Why)
				}
			}
		}
	})
	t.Run("restart", func(t *testing.T) {
		b, _, c := again(t)
		c2 := b.config
		b2 := newBench(t, c2, Options{Store: b.store, Logs: b.o.Logs})
		b2.clock = b.time()
		worldOf[b.Desk].connect(b2.lookups)
		b2.hours(2)
		if got, _, _ := b2.Case(c.ID); got.State != Held || len(b2.sent()) != 0 {
			t.Errorf("%s (%s)", got.State, got.Why)
		}
	})
	t.Run("its case is forgotten first", func(t *testing.T) {
		b, d, c := again(t)
		b.Desk.mu.Lock()
		must(0, b.drop(b.cases[d.ID]))
		b.Desk.mu.Unlock()
		b.hours(8)
		if got, _, _ := b.Case(c.ID); got.State != Held || len(b.sent()) != 0 {
			t.Errorf("%s (%s)", got.State, got.Why)
		}
	})
	t.Run("its time is over", func(t *testing.T) {
		b, _, _ := again(t)
		b.pass(31 * 24 * time.Hour)
		b.Take(blockOf(3, "198.51.100.0/24", b.time(), 200, 12))
		b.hours(2)
		if len(b.sent()) != 1 {
			t.Errorf("%d sent: %+v", len(b.sent()), b.Cases())
		}
	})
	t.Run("reopened by the new case", func(t *testing.T) {
		b, _, c := again(t)
		must(b.Reopen(c.ID, "root"))
		b.hours(1)
		if got, _, _ := b.Case(c.ID); got.State != Sent || len(b.sent()) != 1 {
			t.Errorf("%s (%s), %d sent", got.State, got.Why, len(b.sent()))
		}
		if _, err := b.Reopen(c.ID, "root"); !errors.Is(err, ErrState) {
			t.Errorf("reopened twice: %v", err)
		}
	})
	t.Run("reopened by the old case, the new one goes on", func(t *testing.T) {
		b, d, c := again(t)
		if got := must(b.Reopen(d.ID, "root")); got.ID != c.ID {
			t.Errorf("%s goes on, not %s", got.ID, c.ID)
		}
		b.hours(1)
		if len(b.sent()) != 1 {
			t.Errorf("%d sent", len(b.sent()))
		}
	})
	t.Run("reopened before anything came", func(t *testing.T) {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
			c.Mode, c.Auto = Auto, AutoSend{Connections: 1 << 30, Blocks: 1}
		})
		d, _ := b.drafted()
		must(b.Withdraw(d.ID, "root", ""))
		b.config.Auto.Connections = 1
		must(b.Reopen(d.ID, "root"))
		b.hours(1)
		if c := b.only(); c.State != Drafted || c.Mails[0].Outdated || len(b.sent()) != 0 {
			t.Errorf("%s (%s), %d sent", c.State, c.Why, len(b.sent()))
		}
		if _, err := b.Approve(d.ID, "root", Approval{}); err != nil {
			t.Error(err)
		}
	})
	t.Run("the disk is full", func(t *testing.T) {
		b := flooded(t, nil)
		d, _ := b.drafted()
		b.store.fail = func(string, string) error { return errors.New("disk full") }
		if _, err := b.Withdraw(d.ID, "root", ""); err == nil {
			t.Error("withdrawn only until the next start")
		}
		if c := b.only(); c.State != Drafted || len(b.withdrawn) != 0 {
			t.Errorf("%s, %+v", c.State, b.withdrawn)
		}
	})
}

// TestBlockedDeskHint: what is proposed where the desk's own mail server is
// blocked lets the report go.
func TestBlockedDeskHint(t *testing.T) {
	for _, k := range []struct {
		name, mx string
		hint     string
	}{
		{"a silent neighbour of the sources", "198.51.100.25", "`smtpguard allow add 198.51.100.25`"},
		{"one of the sources", "198.51.100.23", "approve with --blocked-desk"},
	} {
		t.Run(k.name, func(t *testing.T) {
			var spare []netip.Prefix
			lifted := blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12)
			b := flooded(t, func(_ *Config, o *Options, _ *floodLog) {
				o.Spare = func() []netip.Prefix { return spare }
				o.Blocked = func(a netip.Addr) (netip.Prefix, bool) {
					return pfx("198.51.100.0/24"), len(spare) == 0 && pfx("198.51.100.0/24").Contains(a)
				}
				o.Refresh = func(uint64) (Block, bool) { return lifted, true }
			})
			w := worldOf[b.Desk]
			w.setMX("op1.example", k.mx)
			w.setMX("op2.example", k.mx)
			d, _ := b.drafted()
			if !strings.Contains(strings.Join(d.Mails[0].Warnings, "\n"), k.hint) {
				t.Errorf("warnings %q", d.Mails[0].Warnings)
			}
			var r *Refusal
			if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Hint, k.hint) {
				t.Fatalf("%v, hint %q", err, r)
			}
			if _, text, _ := strings.Cut(r.Hint, "allow add"); text != "" {
				// What the guard does then: the address is allowed, and the block
				// lifted, by itself.
				spare = []netip.Prefix{pfx(k.mx + "/32")}
				lifted.Lifted = b.time()
				b.pass(2 * time.Minute)
				b.Work(t.Context())
				must(b.Approve(d.ID, "root", Approval{}))
			} else {
				must(b.Approve(d.ID, "root", Approval{BlockedDesk: true}))
			}
			must(b.Send(t.Context(), d.ID, "root", SendOptions{}))
			if n := len(b.sent()); n != 1 {
				t.Errorf("%d sent", n)
			}
		})
	}
	// Whoever else is allowed in it bars the report.
	b := flooded(t, nil)
	d, _ := b.drafted()
	m := b.cases[d.ID].mail()
	m.Servers = []netip.Addr{netip.MustParseAddr("198.51.100.25"), netip.MustParseAddr("198.51.100.24"), netip.MustParseAddr("198.51.100.23")}
	for _, s := range []string{"198.51.100.26/32", "198.51.100.23/32", "198.51.100.24/31", "198.51.100.0/24", "198.51.0.0/16"} {
		b.o.Spare = func() []netip.Prefix { return []netip.Prefix{pfx(s)} }
		var r *Refusal
		if _, err := b.Approve(d.ID, "root", Approval{BlockedDesk: true}); !asRefusal(err, &r) || !strings.Contains(r.Why, "our own or allowed") {
			t.Errorf("%s is allowed, and it is approved: %v", s, err)
		}
	}
}

// TestNoticeWhileQueued: what comes back while the mail is still being handed
// over is not lost, be the end of it a word of the mail server or a crash.
func TestNoticeWhileQueued(t *testing.T) {
	for _, k := range []struct {
		name  string
		mail  func(c Case) string
		state State
	}{
		{"bounce", func(c Case) string {
			return dsn(c.Mails[0].Return, "failed", "5.1.1", "abuse@op.example", c.Mails[0].MessageID)
		}, Bounced},
		{"delay", func(c Case) string {
			return dsn("abuse@example.net", "delayed", "4.4.1", "abuse@op.example", c.Mails[0].MessageID)
		}, Deferred},
		{"delivery", func(c Case) string {
			return dsn("abuse@example.net", "delivered", "2.0.0", "abuse@op.example", c.Mails[0].MessageID)
		}, Delivered},
		{"ticket", func(c Case) string {
			return "From: desk@op.example\nAuto-Submitted: auto-replied\nSubject: [Ticket#4711] Re: x [" + c.ID + "]\nIn-Reply-To: <" + c.Mails[0].MessageID + ">\n\nGot it.\n"
		}, Acknowledged},
	} {
		for _, crash := range []bool{false, true} {
			b, id := ready(t, nil)
			c, _, _ := b.Case(id)
			c0, box := c, k.mail(c)
			b.step = func(s string) {
				if s != "handed" {
					return
				}
				for range 2 { // read twice counts once
					if got, err := b.Receive(strings.NewReader(box), "root"); err != nil || got[0].Report != id {
						t.Errorf("%s: %+v, %v", k.name, got, err)
					}
				}
				if k.state == Bounced { // a late notice of delay takes nothing back
					b.Receive(strings.NewReader(dsn("abuse@example.net", "delayed", "4.4.1", "abuse@op.example", c0.Mails[0].MessageID)), "root")
				}
				if crash {
					b.store.fail = func(string, string) error { return errors.New("dead") }
				}
			}
			_, err := b.Send(t.Context(), id, "root", SendOptions{})
			if !crash && err != nil {
				t.Errorf("%s: %v", k.name, err)
			}
			if crash {
				b.store.fail = nil
				b = newBench(t, b.config, Options{Store: b.store})
			}
			c, _, _ = b.Case(id)
			if c.State != k.state || c.Early != "" || c.Mails[0].SentAt.IsZero() {
				t.Errorf("%s, crash %v: %s (%s), early %q", k.name, crash, c.State, c.Why, c.Early)
			}
			if k.state == Bounced && !strings.HasPrefix(c.Why, "bounced") {
				t.Errorf("why %q", c.Why)
			}
			if bad, _ := b.bad("abuse@op.example"); bad != (k.state == Bounced) {
				t.Errorf("%s: marked %v", k.name, bad)
			}
		}
	}
}
