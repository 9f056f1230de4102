package abuse

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/smtpguard/smtpguard/detector"
)

func TestR21_Dedupe(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	if err := b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0)); err != nil {
		t.Fatal(err)
	}
	c, _ := b.drafted()
	id := c.Mails[0].MessageID
	var blocks []Block
	for i := range 1000 {
		blocks = append(blocks, blockOf(uint64(2+i), fmt.Sprintf("198.51.100.%d/32", i%250+2), testStart.Add(time.Duration(i)*time.Second), 10, 0))
	}
	if err := b.Take(blocks...); err != nil {
		t.Fatal(err)
	}
	if err := b.Take(blocks...); err != nil { // the same again counts nothing
		t.Fatal(err)
	}
	b.pass(time.Hour)
	b.Work(t.Context())
	c = b.only()
	if c.BlockCount != 1001 || c.Connections != 200+1000*10 || len(c.Mails) != 1 || c.Mails[0].MessageID != id {
		t.Errorf("%d blocks, %d connections, %d mails", c.BlockCount, c.Connections, len(c.Mails))
	}
	if c.Mails[0].LastID != 1001 {
		t.Error("the draft was not brought up to date")
	}

	// Another network with the same contact within a day is held.
	b.contact(c.ID, "abuse@op.example")
	must(b.Approve(c.ID, "root", Approval{}))
	must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
	if err := b.Take(blockOf(2000, "192.0.2.1/32", b.time(), 500, 0)); err != nil {
		t.Fatal(err)
	}
	b.pass(time.Hour)
	b.Work(t.Context())
	second := b.Cases()[0]
	b.contact(second.ID, "abuse@op.example")
	must(b.Approve(second.ID, "root", Approval{}))
	if _, err := b.Send(t.Context(), second.ID, "root", SendOptions{}); !errors.Is(err, ErrHeld) {
		t.Errorf("the second mail within a day: %v", err)
	}
	b.Work(t.Context())
	if len(b.sent()) != 1 {
		t.Errorf("%d mails went out", len(b.sent()))
	}
	b.pass(24 * time.Hour)
	b.Work(t.Context())
	if c, _, _ := b.Case(second.ID); c.State != Sent || len(b.sent()) != 2 {
		t.Errorf("a day later it is %s (%s), %d sent", c.State, c.Why, len(b.sent()))
	}
}

func TestR22_Caps(t *testing.T) {
	c := testConfig(t)
	l := &logText{}
	b := newBench(t, c, Options{Logs: l})
	var blocks []Block
	for i := range 5000 {
		blocks = append(blocks, blockOf(uint64(i+1), fmt.Sprintf("%d.%d.%d.0/24", 20+i/2500, i/250%10, i%250), testStart, 200+i, 0))
	}
	if err := b.Take(blocks...); err != nil {
		t.Fatal(err)
	}
	b.Work(t.Context())
	count := func() map[State]int {
		n := map[State]int{}
		for _, c := range b.Cases() {
			n[c.State]++
			if c.State == Held && !strings.Contains(c.Why, "reports.caps.drafts") {
				t.Fatalf("held because %q", c.Why)
			}
			if c.State == Drafted && c.Connections < 200+5000-20 {
				t.Errorf("a draft of a small one: %d connections", c.Connections)
			}
		}
		return n
	}
	if n := count(); n[Drafted] != 20 || n[Held] != 4980 {
		t.Errorf("%v", n)
	}
	if l.n != 1 {
		t.Errorf("the logs were read %d times", l.n)
	}
	// Mails have caps of their own: 5 an hour, 20 a day.
	i := 0
	for _, c := range b.cases {
		if c.State == Drafted {
			b.contact(c.ID, fmt.Sprintf("abuse%d@op.example", i))
			must(b.Approve(c.ID, "root", Approval{}))
			i++
		}
	}
	b.Work(t.Context())
	if n := len(b.sent()); n != 5 {
		t.Errorf("%d mails within an hour", n)
	}
	held := 0
	for _, c := range b.cases {
		if strings.Contains(c.Why, "reports.caps.hour") {
			held++
		}
	}
	if held != 15 || l.n != 1 {
		t.Errorf("%d cases say that they are held by the hour's cap; the logs were read %d times", held, l.n)
	}
}

func TestR23_OwnSpace(t *testing.T) {
	c := testConfig(t)
	b := newBench(t, c, Options{Spare: func() []netip.Prefix { return []netip.Prefix{pfx("8.8.8.0/24"), pfx("9.9.9.9/32")} }})
	reserved = prefixList("10.0.0.0/8 192.0.2.0/24 198.51.100.0/24 127.0.0.0/8 2001:db8::/32 fc00::/7 ::/8")
	for i, p := range []string{"10.1.2.3/32", "192.0.2.0/24", "198.51.100.9/32", "127.0.0.1/32", "2001:db8::/64", "fd00::1/128", "::1/128",
		"8.8.8.8/32", "8.8.0.0/16", "9.9.9.0/24"} {
		if err := b.Take(blockOf(uint64(i+1), p, testStart, 5000, 0)); err != nil {
			t.Fatal(err)
		}
	}
	b.Work(t.Context())
	if cs := b.Cases(); len(cs) != 0 {
		t.Errorf("%+v", cs)
	}
	if b.Taken() != 10 {
		t.Errorf("taken %d", b.Taken())
	}
	// What became our own after the draft was made is not approved.
	own := []netip.Prefix{}
	b = newBench(t, c, Options{Spare: func() []netip.Prefix { return own }})
	b.Take(blockOf(1, "8.8.8.8/32", testStart, 5000, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	own = append(own, pfx("8.8.0.0/16"))
	var r *Refusal
	if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "our own") {
		t.Errorf("approved: %v", err)
	}
	// The real list has what nobody is responsible for, and nothing else.
	for s, want := range map[string]bool{"10.0.0.0/8": true, "100.64.0.1/32": true, "172.31.0.1/32": true, "192.168.1.0/24": true, "169.254.1.1/32": true,
		"203.0.113.7/32": true, "224.0.0.1/32": true, "255.255.255.255/32": true, "::1/128": true, "fe80::1/128": true, "fd00::/8": true, "ff02::1/128": true, "64:ff9b::1/128": true,
		"8.8.8.8/32": false, "172.32.0.1/32": false, "192.0.1.1/32": false, "2001:470::1/128": false, "2a00::/12": false, "223.255.255.255/32": false} {
		reserved := realReserved
		got := slices.ContainsFunc(reserved, func(r netip.Prefix) bool { return r.Overlaps(pfx(s)) })
		if got != want {
			t.Errorf("%s: reserved %v", s, got)
		}
	}
}

var realReserved = slices.Clone(reserved)

func TestR24_ContactFails(t *testing.T) {
	for _, c := range []struct{ name, answer string }{
		{"gone", ""}, {"429", "!429"}, {"web page", "<html>"}, {"empty", " "},
		{"redacted", string(answer(entity(`"abuse"`, `["email",{},"text","DATA REDACTED"]`)))},
		{"no abuse role", string(answer(entity(`"technical"`, `["email",{},"text","noc@op.example"]`)))},
		{"a guess", string(answer(entity(`"technical"`, `["email",{},"text","abuse@op.example"]`)))},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := flooded(t, nil)
			w := worldOf[b.Desk]
			for _, p := range w.paths() {
				if strings.HasPrefix(p, "/rdap/") {
					w.unset(p)
					if c.answer != "" {
						w.set(p, strings.Replace(c.answer, `"startAddress":"198.51.100.0","endAddress":"198.51.100.255"`, `"startAddress":"198.51.100.0","endAddress":"198.51.100.255","startAutnum":64500,"endAutnum":64500`, 1))
					}
				}
			}
			d, msg := b.drafted()
			if d.Why != "contact missing" || d.Mails[0].To.Address != "" || bytes.Contains(msg, []byte("\r\nTo:")) {
				t.Errorf("%q, to %+v", d.Why, d.Mails[0].To)
			}
			var r *Refusal
			if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "no recipient") {
				t.Errorf("approved: %v", err)
			}
			if c.name == "a guess" {
				if o := d.Mails[0].Others; len(o) != 1 || !o[0].Guess || o[0].Address != "abuse@op.example" {
					t.Errorf("the guess is not shown: %+v", o)
				}
			}
		})
	}
	t.Run("a guess must be typed", func(t *testing.T) {
		b := flooded(t, nil)
		d, _ := b.drafted()
		b.cases[d.ID].Mails[0].To.Guess = true
		var r *Refusal
		if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) {
			t.Errorf("approved: %v", err)
		}
		if _, err := b.Approve(d.ID, "root", Approval{Guess: d.Mails[0].To.Address}); err != nil {
			t.Error(err)
		}
	})
}

func TestR25_BlockedDesk(t *testing.T) {
	allowed := false
	b := flooded(t, func(_ *Config, o *Options, _ *floodLog) {
		o.Blocked = func(a netip.Addr) (netip.Prefix, bool) {
			return pfx("192.0.2.0/24"), !allowed && pfx("192.0.2.0/24").Contains(a)
		}
	})
	d, _ := b.drafted()
	if !strings.Contains(strings.Join(d.Mails[0].Warnings, "\n"), "smtpguard allow add 192.0.2.26") {
		t.Errorf("warnings %q", d.Mails[0].Warnings)
	}
	var r *Refusal
	if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "192.0.2.2") || r.Hint == "" {
		t.Errorf("approved: %v", err)
	}
	if _, err := b.Approve(d.ID, "root", Approval{BlockedDesk: true}); err != nil {
		t.Error(err)
	}
	// Exempted meanwhile: nothing stands against it.
	e := ""
	if _, err := b.Edit(t.Context(), d.ID, "root", Edit{Cc: &e}); err != nil {
		t.Fatal(err)
	}
	b.cases[d.ID].Mails[0].Desk = []netip.Addr{netip.MustParseAddr("192.0.2.26")}
	allowed = true
	if _, err := b.Approve(d.ID, "root", Approval{}); err != nil {
		t.Error(err)
	}
}

func TestR29_LogInjection(t *testing.T) {
	for _, name := range []string{"l-injection", "l3-local-user-injection"} {
		log := string(must(os.ReadFile("../testdata/corpus/" + name + ".log")))
		// The real source of the lines is blocked; whoever is imitated in HELO
		// and commands is not in what is reported.
		c := testConfig(t)
		b := newBench(t, c, Options{Logs: &logText{text: log, zone: time.UTC}})
		var at time.Time
		(&logText{text: log, zone: time.UTC}).Scan(t.Context(), time.Time{}, testStart.Add(1e5*time.Hour), func(ev *detector.Event, _ []byte) error {
			if at.IsZero() && ev.Kind == detector.Opened {
				at = ev.Time
			}
			return nil
		})
		if at.IsZero() {
			continue // a log without one real connection
		}
		b.clock = at.Add(time.Hour)
		blk := blockOf(1, "10.66.0.0/16", at.Add(30*time.Second), 500, 0)
		if err := b.Take(blk); err != nil {
			t.Fatal(err)
		}
		d, msg := b.drafted()
		if d.Mails[0].Facts.FromLog != (name == "l-injection") { // the other log has no line from there
			t.Errorf("%s: lines used: %v", name, d.Mails[0].Facts.FromLog)
		}
		for _, s := range d.Mails[0].Facts.Sources {
			if !pfx("10.66.0.0/16").Contains(s.Prefix.Addr()) {
				t.Errorf("%s: %s is reported", name, s.Prefix)
			}
		}
		for _, victim := range []string{"192.0.2.", "198.51.100.", "203.0.113.", "[127.0.0.1]", "10.67."} {
			if mentions(t, msg, victim) {
				t.Errorf("%s: the mail names %s", name, victim)
			}
		}
	}

	// A HELO that is a log line with the blocked source's address, sent by
	// somebody else, and the other way round.
	l := newFloodLog()
	for i := range 120 {
		l.open("198.51.100.23", 1000+i)
		l.line("SMTP connection from (SMTP connection from [198.51.100.99]:%d I=[203.0.113.25]:25 (TCP/IP connection count = 3)) [198.51.100.23]:%d I=[203.0.113.25]:25 lost", i+1, 1000+i)
		l.line("SMTP connection from (x [198.51.100.98]:9 closed by QUIT) [192.0.2.1]:%d I=[203.0.113.25]:25 closed by QUIT", 1000+i)
		l.line("H=([198.51.100.97]) [192.0.2.1]:7 rejected RCPT <[198.51.100.96]:7>: SMTP connection from [198.51.100.95]:7 (TCP/IP connection count = 1)")
	}
	b := newBench(t, testConfig(t), Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
	b.Take(blockOf(1, "198.51.100.0/24", testStart.Add(time.Second), 120, 0))
	d, msg := b.drafted()
	if f := d.Mails[0].Facts; len(f.Sources) != 1 || f.Sources[0].Prefix != pfx("198.51.100.23/32") || f.Connections != 120 {
		t.Errorf("%d sources, %d connections", len(f.Sources), f.Connections)
	}
	for _, a := range []string{"99", "98", "97", "96", "95"} {
		if mentions(t, msg, "198.51.100."+a) {
			t.Errorf("198.51.100.%s is in the mail", a)
		}
	}
}

// TestStates walks a case through its life; each step is in its history with
// time and actor, and survives a restart.
func TestStates(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	id := d.ID
	if _, err := b.Send(t.Context(), id, "root", SendOptions{}); !errors.Is(err, ErrState) {
		t.Errorf("a draft is sent: %v", err)
	}
	b.contact(strings.ToLower(id), "abuse@op.example")
	text := "A text of my own.\n\nWith a second paragraph.\n"
	if _, err := b.Edit(t.Context(), id, "alice (uid 1000)", Edit{Text: &text}); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"", "\x1b[2J", strings.Repeat("x", 79), "\u00fc", strings.Repeat("x\n", maxText)} {
		if _, err := b.Edit(t.Context(), id, "alice", Edit{Text: &bad}); err == nil {
			t.Errorf("text %.20q is taken", bad)
		}
	}
	for _, bad := range []string{"abuse@ripe net", "a;b@op.example", "-f@op.example"} {
		if _, err := b.Edit(t.Context(), id, "alice", Edit{To: &bad}); err == nil {
			t.Errorf("recipient %q is taken", bad)
		}
	}
	must(b.Approve(id, "alice (uid 1000)", Approval{}))
	if _, err := b.Approve(id, "alice", Approval{}); !errors.Is(err, ErrState) {
		t.Errorf("approved twice: %v", err)
	}
	// An edit after the approval asks for another one.
	to := "desk@op.example"
	if c, err := b.Edit(t.Context(), id, "bob", Edit{To: &to}); err != nil || c.State != Drafted || c.Mails[0].Approved != "" {
		t.Errorf("%s, %v", c.State, err)
	}
	must(b.Approve(id, "bob", Approval{}))
	must(b.Send(t.Context(), id, "bob", SendOptions{}))
	s := b.sent()
	if len(s) != 1 || !strings.Contains(s[0].msg, text) || s[0].args[len(s[0].args)-1] != "desk@op.example" {
		t.Fatalf("%+v", s)
	}
	if _, err := b.Send(t.Context(), id, "bob", SendOptions{}); !errors.Is(err, ErrState) {
		t.Errorf("sent twice: %v", err)
	}
	if _, err := b.Send(t.Context(), id, "bob", SendOptions{Again: true}); !errors.Is(err, ErrState) {
		t.Errorf("sent twice: %v", err)
	}
	must(b.CloseCase(id, "alice", "they fixed it"))
	again, err := newDesk(Options{Config: b.config, Store: b.store}, b.time, true)
	if err != nil {
		t.Fatal(err)
	}
	c, _, err := again.Case(id)
	if err != nil {
		t.Fatal(err)
	}
	var steps []string
	for _, h := range c.History {
		if h.Time.IsZero() || h.By == "" {
			t.Errorf("%+v has no time or actor", h)
		}
		steps = append(steps, string(h.To))
	}
	if got := strings.Join(steps, " "); got != "gathering draft draft draft approved draft approved queued sent closed" {
		t.Errorf("history: %s", got)
	}
	if again.Taken() != 1 {
		t.Errorf("taken %d", again.Taken())
	}
	if _, err := b.Withdraw(id, "x", ""); !errors.Is(err, ErrState) {
		t.Errorf("a closed case is withdrawn: %v", err)
	}
	if _, _, err := b.Case("SG-0"); !errors.Is(err, ErrUnknown) {
		t.Errorf("an unknown case: %v", err)
	}
}

// TestThresholds: small things are no report, and are forgotten.
func TestThresholds(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	small := blockOf(1, "198.51.100.23/32", testStart, 20, 0)
	small.Verdict.Held = 5
	byHand := Block{ID: 2, Prefix: pfx("192.0.2.0/24"), Since: testStart, Until: testStart.Add(time.Hour)}
	b.Take(small, byHand)
	b.Work(t.Context())
	if c := b.only(); c.State != Gathering {
		t.Errorf("%s", c.State)
	}
	b.pass(30 * time.Hour)
	b.Work(t.Context())
	if cs := b.Cases(); len(cs) != 0 {
		t.Errorf("%+v", cs)
	}
	// Before it has settled there is no draft, unless it never settles.
	b = newBench(t, testConfig(t), Options{})
	b.clock = testStart
	for i := range 40 {
		b.pass(time.Minute)
		b.Take(blockOf(uint64(i+1), fmt.Sprintf("198.51.100.%d/32", i+1), b.time(), 200, 0))
		b.Work(t.Context())
		if c := b.only(); i < 38 && c.State != Gathering {
			t.Fatalf("after %d minutes it is %s", i, c.State)
		}
	}
	b.pass(2 * time.Minute)
	b.Work(t.Context())
	if c := b.only(); c.State != Drafted {
		t.Errorf("after 42 minutes it is %s", c.State)
	}
}

// TestPardon: what an operator takes back is not reported.
func TestPardon(t *testing.T) {
	pardoned := map[uint64]bool{}
	blocks := map[uint64]Block{1: blockOf(1, "198.51.100.1/32", testStart, 200, 0), 2: blockOf(2, "198.51.100.2/32", testStart, 200, 0)}
	b := newBench(t, testConfig(t), Options{Refresh: func(id uint64) (Block, bool) {
		x, ok := blocks[id]
		x.Pardoned = pardoned[id]
		if x.Pardoned {
			x.Lifted = testStart.Add(time.Hour)
		}
		return x, ok
	}})
	b.Take(blocks[1], blocks[2])
	b.drafted()
	pardoned[1] = true
	b.pass(time.Hour)
	b.Work(t.Context())
	c := b.only()
	if c.State != Drafted || len(c.prefixes()) != 1 {
		t.Errorf("%s, %v", c.State, c.prefixes())
	}
	pardoned[2] = true
	b.contact(c.ID, "abuse@op.example")
	if _, err := b.Approve(c.ID, "root", Approval{}); !errors.Is(err, ErrState) {
		t.Errorf("approved: %v", err)
	}
	if c := b.only(); c.State != Withdrawn {
		t.Errorf("%s", c.State)
	}
}

// TestJoin: cases that a lookup shows to be of one network become one. Lying
// inside an announcement is not enough: a part of it may be announced by
// somebody else, who then gets a report of his own.
func TestJoin(t *testing.T) {
	w := newWorld(t)
	w.plain()
	c := testConfig(t)
	w.online(&c)
	b := newBench(t, c, Options{})
	w.connect(b.lookups)
	announce := func(third int, as, prefix string) {
		w.set(fmt.Sprintf("/stat/network-info/data.json?198.51.%d.7", third), `{"data":{"asns":["`+as+`"],"prefix":"`+prefix+`"}}`)
	}
	var blocks []Block
	for i := range 4 {
		announce(100+i, "64500", "198.51.0.0/16")
		blocks = append(blocks, blockOf(uint64(i+1), fmt.Sprintf("198.51.%d.7/32", 100+i), testStart, 200+i, 0))
	}
	announce(102, "64511", "198.51.102.0/24") // the more specific one
	w.set("/rdap/autnum/64511", string(answerAS(64511, entity(`"abuse"`, `["email",{},"text","abuse@other.example"]`))))
	blocks[3].Verdict.Opens = 3 // too small by itself, but of the same network
	blocks[3].Verdict.Held = 0
	w.setTXT("7.100.51.198.origin.test")
	b.Take(blocks...)
	b.Work(t.Context())
	find := func(a string) Case {
		t.Helper()
		for _, c := range b.Cases() {
			if c.MergedInto == "" && slices.ContainsFunc(c.Blocks, func(r Ref) bool { return r.Prefix == pfx(a) }) {
				return c
			}
		}
		t.Fatalf("%s is in no case", a)
		return Case{}
	}
	one, other := find("198.51.100.7/32"), find("198.51.102.7/32")
	if one.State != Drafted || one.AS != 64500 || one.Network != pfx("198.51.0.0/16") || one.BlockCount != 3 || one.Connections != 404 || one.Mails[0].Facts.Connections != 404 || find("198.51.103.7/32").ID != one.ID {
		t.Errorf("%+v", one)
	}
	// Only what was blocked is accused, not the whole announcement.
	if p := reported(&one); p != pfx("198.51.100.0/22") {
		t.Errorf("reported %s", p)
	}
	if other.State != Drafted || other.AS != 64511 || other.Network != pfx("198.51.102.0/24") || other.BlockCount != 1 || other.ID == one.ID || other.Mails[0].Origin.AS != 64511 {
		t.Errorf("%+v", other)
	}
	if n := w.count("/stat/network-info"); n != 4 {
		t.Errorf("asked %d times", n)
	}
	// What comes later joins where its own origin is known by now: another
	// address of a /24 that was asked about, but not one that nobody asked about.
	b.Take(blockOf(50, "198.51.101.99/32", b.time(), 10, 0), blockOf(51, "198.51.102.99/32", b.time(), 10, 0), blockOf(52, "198.51.3.3/32", b.time(), 10, 0))
	if id := find("198.51.101.99/32").ID; id != one.ID {
		t.Errorf("the same /24 is in %s, not in %s", id, one.ID)
	}
	if id := find("198.51.102.99/32").ID; id != other.ID {
		t.Errorf("the other's /24 is in %s, not in %s", id, other.ID)
	}
	if c := find("198.51.3.3/32"); c.ID == one.ID || c.AS != 0 {
		t.Errorf("what nobody asked about is counted to AS%d", c.AS)
	}
}

// TestSplit: what a database takes for one network, and the lookup does not,
// does not stay together.
func TestSplit(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.7/32", testStart, 300, 0), blockOf(2, "198.51.100.200/32", testStart, 200, 0), blockOf(3, "198.51.100.8/32", testStart, 1, 0))
	id := b.only().ID
	c := b.settle(id, finding{origin: Origin{AS: 64500, Prefix: pfx("198.51.100.0/25"), Claims: []Claim{{Origins: []uint32{64500}, Prefix: pfx("198.51.100.0/25"), Announced: true}}}}, nil)
	if c == nil || c.ID != id || c.BlockCount != 2 || c.Connections != 301 || len(c.prefixes()) != 2 || !c.Certain {
		t.Fatalf("%+v", c)
	}
	cs := b.Cases()
	i := slices.IndexFunc(cs, func(c Case) bool { return c.ID != id })
	if len(cs) != 2 || cs[i].BlockCount != 1 || cs[i].Connections != 200 || cs[i].Certain || cs[i].Blocks[0].ID != 2 {
		t.Errorf("%+v", cs)
	}
	// A block that holds more than the announcement cannot be taken apart.
	b = newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.0/24", testStart, 300, 0))
	if c := b.settle(b.only().ID, finding{origin: Origin{AS: 64500, Prefix: pfx("198.51.100.0/25")}}, nil); c == nil || c.Certain || c.BlockCount != 1 {
		t.Errorf("%+v", c)
	}
}

// TestNever: what the overrides file says never to report is not gathered, not
// asked about, not approved and not sent, wherever in a case it is.
func TestNever(t *testing.T) {
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	bench := func(t *testing.T, text string) (*bench, *world, string) {
		path := filepath.Join(t.TempDir(), "overrides")
		write(t, path, text)
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Overrides = path })
		return b, worldOf[b.Desk], path
	}
	t.Run("network", func(t *testing.T) {
		b, w, _ := bench(t, "198.51.100.128/25 never\n")
		if cs := b.Cases(); len(cs) != 0 { // the /24 that holds it
			t.Errorf("%+v", cs)
		}
		b.Take(blockOf(2, "198.51.100.200/32", testStart, 500, 0))
		b.Work(t.Context())
		if cs := b.Cases(); len(cs) != 0 || w.count("") != 0 {
			t.Errorf("%+v, asked %d times", cs, w.count(""))
		}
		b.Take(blockOf(3, "198.51.100.7/32", testStart, 500, 0))
		if c := b.only(); c.BlockCount != 1 {
			t.Errorf("%+v", c)
		}
	})
	t.Run("AS by the database", func(t *testing.T) {
		b, w, _ := bench(t, "AS64500 never\n")
		b.Work(t.Context())
		if cs := b.Cases(); len(cs) != 0 || w.count("") != 0 {
			t.Errorf("%+v, asked %d times", cs, w.count(""))
		}
	})
	t.Run("AS by a lookup", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "overrides")
		write(t, path, "AS64500 never\n")
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Overrides, c.ASNDatabase = path, "" })
		b.Work(t.Context())
		if c := b.only(); c.State != Withdrawn || !strings.Contains(c.Why, "never to report AS64500") || len(c.Mails) != 0 || worldOf[b.Desk].count("/rdap") != 0 {
			t.Errorf("%s (%s), RDAP asked %d times", c.State, c.Why, worldOf[b.Desk].count("/rdap"))
		}
	})
	t.Run("a contact for a part of it", func(t *testing.T) {
		b, _, _ := bench(t, "AS64500 never\n198.51.100.0/24 customer@op.example\n")
		if c, _ := b.drafted(); c.Mails[0].To.Address != "customer@op.example" {
			t.Errorf("%+v", c.Mails[0].To)
		}
	})
	for _, when := range []string{"before the approval", "before it is sent"} {
		t.Run(when, func(t *testing.T) {
			b, _, path := bench(t, "# nothing yet\n")
			b.Take(blockOf(2, "198.51.100.7/32", testStart, 10, 0)) // not the busiest
			c, _ := b.drafted()
			if when == "before it is sent" {
				must(b.Approve(c.ID, "root", Approval{}))
			}
			write(t, path, "198.51.100.7/32 never   # from now on\n")
			var r *Refusal
			if when == "before it is sent" {
				_, err := b.Send(t.Context(), c.ID, "root", SendOptions{})
				if !asRefusal(err, &r) || !strings.Contains(r.Why, "never to report 198.51.100.7/32") {
					t.Errorf("sent: %v", err)
				}
				if c := b.only(); c.State != Drafted || !strings.Contains(c.Why, "never") {
					t.Errorf("%s (%s)", c.State, c.Why)
				}
			} else if _, err := b.Approve(c.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "never to report 198.51.100.7/32") {
				t.Errorf("approved: %v", err)
			}
			if len(b.sent()) != 0 {
				t.Error("it is sent")
			}
		})
	}
	t.Run("a file with faults", func(t *testing.T) {
		b, _, path := bench(t, "# nothing yet\n")
		c, _ := b.drafted()
		must(b.Approve(c.ID, "root", Approval{}))
		write(t, path, "198.51.100.0/24 nevr\n")
		if _, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); !errors.Is(err, ErrHeld) || !strings.Contains(err.Error(), "line 1") {
			t.Errorf("sent although nobody knows whom never to report: %v", err)
		}
		os.Remove(path)
		if _, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); !errors.Is(err, ErrHeld) {
			t.Errorf("sent although nobody knows whom never to report: %v", err)
		}
		write(t, path, "198.51.100.0/24 abuse@op.example\n")
		if c, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); err != nil || c.State != Sent {
			t.Errorf("%s, %v", c.State, err)
		}
	})
}

// TestSendChecksAgain: what became ours, or was redirected, between the
// approval and the sending is not sent.
func TestSendChecksAgain(t *testing.T) {
	own := []netip.Prefix{}
	b := newBench(t, testConfig(t), Options{Spare: func() []netip.Prefix { return own }})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "root", Approval{}))
	own = append(own, pfx("198.51.100.0/24"))
	var r *Refusal
	if _, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "our own") {
		t.Errorf("sent: %v", err)
	}
	b.Work(t.Context())
	if c := b.only(); c.State != Drafted || len(b.sent()) != 0 {
		t.Errorf("%s, %d sent", c.State, len(b.sent()))
	}
	own = nil
	must(b.Approve(d.ID, "root", Approval{}))
	// Approved as a trial of a reserved network; the redirection is gone now.
	reserved = append(reserved, pfx("198.51.100.0/24"))
	b.Work(t.Context())
	if c := b.only(); c.State != Drafted || len(b.sent()) != 0 || !strings.Contains(c.Why, "reserved") {
		t.Errorf("%s (%s), %d sent", c.State, c.Why, len(b.sent()))
	}
}

// TestApproveWhatWasSeen: nobody approves a text that he has not seen.
func TestApproveWhatWasSeen(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	var r *Refusal
	approve := func(by string, a Approval) error { _, err := b.Desk.Approve(d.ID, by, a); return err }
	if err := approve("alice", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "alice has not seen it") || !strings.Contains(r.Hint, "reports show") {
		t.Errorf("approved unseen: %v", err)
	}
	_, shownMail, _ := b.Show(d.ID, "alice")
	if err := approve("bob", Approval{}); !asRefusal(err, &r) {
		t.Errorf("what alice has seen is approved by bob: %v", err)
	}
	// More blocks come, and the draft is made anew (by hand: a person's mark
	// keeps that from happening by itself).
	b.cases[d.ID].mail().Outdated = true
	b.pass(2 * time.Hour)
	b.Take(blockOf(2, "198.51.100.24/32", b.time(), 777, 0))
	b.pass(time.Hour)
	b.Work(t.Context())
	if c := b.only(); c.State != Drafted || c.Mails[0].To.Address != "abuse@op.example" || c.Mails[0].Facts.Connections != 977 {
		t.Fatalf("%s, %+v", c.State, c.Mails[0].Facts.Connections)
	}
	if err := approve("alice", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "has changed since alice saw it") {
		t.Errorf("approved, although it was made anew: %v", err)
	}
	c, msg, _ := b.Show(d.ID, "alice")
	if bytes.Equal(msg, shownMail) {
		t.Fatal("nothing was changed")
	}
	digest := c.Mails[0].Digest
	for _, bad := range []string{digest[:8], strings.Repeat("0", 64), digest + "0"} {
		if err := approve("alice", Approval{Digest: bad}); !asRefusal(err, &r) {
			t.Errorf("approved with digest %s: %v", bad, err)
		}
	}
	// The recipient is changed by who has seen the rest: no need to look again.
	to := "desk@op.example"
	if _, err := b.Edit(t.Context(), d.ID, "alice", Edit{To: &to}); err != nil {
		t.Fatal(err)
	}
	_, msg, _ = b.Case(d.ID)
	if err := approve("alice", Approval{}); err != nil {
		t.Fatal(err)
	}
	// What goes out is what was shown, with the date and who checked it.
	_, out, _ := b.Case(d.ID)
	_, ps := parts(t, out)
	_, was := parts(t, msg)
	if want := strings.Replace(flat(was[0].text), signedMark, signed(true), 1); flat(ps[0].text) != want {
		t.Errorf("approved:\n%s\nshown:\n%s", ps[0].text, was[0].text)
	}
	for i := 1; i < len(ps); i++ {
		if ps[i] != was[i] {
			t.Errorf("part %d differs", i)
		}
	}
	// A script names the digest.
	c, _ = must(b.Edit(t.Context(), d.ID, "bob", Edit{To: &to})), 0
	if err := approve("script", Approval{Digest: strings.ToUpper(c.Mails[0].Digest[:12])}); err != nil {
		t.Error(err)
	}
}

func TestAutoWaits(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*bench)
	}{
		{"disputed", func(b *bench) {
			b.lookups.cache[netKey(RIPEstat, pfx("198.51.100.0/24"))] = &remembered{At: b.time(), Claim: &Claim{Origins: []uint32{64511}, Prefix: pfx("198.51.100.0/24"), Announced: true, Source: "x", At: b.time()}}
		}},
		{"too small", func(b *bench) { b.config.Auto.Connections = 10_000 }},
		{"one block", func(b *bench) { b.config.Auto.Blocks = 2 }},
		{"no contact", func(b *bench) { b.config.Lookup.Sources, b.lookups.config.Lookup.Sources = nil, nil }},
		{"blocked desk", func(b *bench) {
			b.o.Blocked = func(netip.Addr) (netip.Prefix, bool) { return pfx("192.0.2.0/24"), true }
		}},
		{"a person's hand", func(b *bench) {
			b.config.Mode = Draft
			d, _ := b.drafted()
			b.contact(d.ID, "abuse@op.example")
			b.config.Mode = Auto
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := flooded(t, func(c *Config, _ *Options, _ *floodLog) {
				c.Mode, c.Auto = Auto, AutoSend{Connections: 100, Blocks: 1}
			})
			c.change(b)
			b.Work(t.Context())
			b.Work(t.Context())
			if c := b.only(); c.State != Drafted || len(b.sent()) != 0 {
				t.Errorf("%s, %d sent", c.State, len(b.sent()))
			}
		})
	}
}

// TestStoreFails: what cannot be written down is not sent.
func TestStoreFails(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "root", Approval{}))
	broken := errors.New("disk full")
	b.store.fail = func(kind, key string) error { return broken }
	if _, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	if c := b.only(); c.State != Approved || len(b.sent()) != 0 {
		t.Errorf("%s, %d sent", c.State, len(b.sent()))
	}
	if err := b.Take(blockOf(2, "192.0.2.1/32", testStart, 200, 0)); !errors.Is(err, broken) || b.Taken() != 1 {
		t.Errorf("%v, taken %d", err, b.Taken())
	}
	b.store.fail = nil
	if err := b.Take(blockOf(2, "192.0.2.1/32", testStart, 200, 0)); err != nil || b.Taken() != 2 {
		t.Errorf("%v, taken %d", err, b.Taken())
	}
	if c := b.Cases(); len(c) != 2 || c[0].BlockCount != 1 || c[1].BlockCount != 1 {
		t.Errorf("%+v", c)
	}
	// And it is in the store too, for the next start.
	inStore := 0
	b.store.Records(kindCase, func(string, []byte) bool { inStore++; return true })
	if inStore != 2 {
		t.Errorf("%d cases are in the store", inStore)
	}
	// A message that was changed in the store is not sent.
	b.store.SetRecord(kindMail, mailKey(&d, 0), []byte("Subject: other\r\n\r\n"))
	if _, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); err == nil || len(b.sent()) != 0 {
		t.Errorf("a changed message is sent: %v", err)
	}
}

// TestLogFails: without a log the detector's numbers serve.
func TestLogFails(t *testing.T) {
	b := newBench(t, testConfig(t), Options{Logs: &logText{err: errors.New("gone")}})
	b.Take(blockOf(1, "198.51.100.0/24", testStart, 200, 30), blockOf(2, "198.51.100.7/32", testStart, 50, 0))
	d, msg := b.drafted()
	f := d.Mails[0].Facts
	if f.FromLog || f.Connections != 230 || f.Refused != 30 {
		t.Errorf("%+v", f)
	}
	if _, ps := parts(t, msg); !strings.Contains(flat(ps[0].text), "opened 230 TCP connections") {
		t.Errorf("%s", ps[0].text)
	}
	if len(must(filepath.Glob(filepath.Join(b.config.Dir, tempName)))) != 0 {
		t.Error("temporary files stay")
	}
}

func TestForget(t *testing.T) {
	b := flooded(t, nil)
	d, msg := b.drafted()
	for _, path := range []string{b.emlPath(&d, 0), b.rawPath(&d, 0), b.path(d.Mails[0].Archive.File)} {
		if fi, err := os.Stat(path); err != nil || fi.Size() == 0 || fi.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v", path, err)
		}
	}
	if !bytes.Equal(must(os.ReadFile(b.emlPath(&d, 0))), msg) {
		t.Error("the mail is another one")
	}
	// After its time everything of it goes.
	must(b.CloseCase(d.ID, "root", ""))
	b.pass(200 * 24 * time.Hour)
	b.Work(t.Context())
	if len(b.Cases()) != 0 {
		t.Error("an old case stays")
	}
	for _, f := range must(filepath.Glob(filepath.Join(b.config.Dir, "SG-*"))) {
		t.Errorf("%s stays", f)
	}
	if v, _ := b.store.Record(kindMail, mailKey(&d, 0)); v != nil {
		t.Error("the mail stays in the store")
	}
}

// TestRun: everything that Run starts has ended when it returns, and its
// methods may be called meanwhile.
func TestRun(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	c := testConfig(t)
	c.Threshold.Settle = time.Nanosecond
	b := newBench(t, c, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := b.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	for i := range 3 {
		wg.Go(func() {
			for j := range 6 {
				b.Take(blockOf(0, fmt.Sprintf("198.51.%d.%d/32", i, j), testStart, 200, 0))
				for _, c := range b.Cases() {
					b.Case(c.ID)
					to := "abuse@op.example"
					if _, err := b.Edit(t.Context(), c.ID, "root", Edit{To: &to}); err == nil {
						b.Approve(c.ID, "root", Approval{})
					}
				}
			}
		})
	}
	end := time.Now().Add(20 * time.Second)
	for {
		if slices.ContainsFunc(b.Cases(), func(c Case) bool { return c.State == Sent }) {
			break
		}
		if time.Now().After(end) {
			t.Error("nothing is sent")
			break
		}
		for _, c := range b.Cases() {
			to := "abuse@op.example"
			if c.State == Drafted {
				b.Edit(t.Context(), c.ID, "root", Edit{To: &to})
				b.Approve(c.ID, "root", Approval{})
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	cancel()
	wg.Wait()
	if n := len(b.sent()); n != 1 {
		t.Errorf("%d mails to one recipient within a day", n)
	}
}

// TestMax: more cases than there is room for push out the least interesting,
// never one that is under way.
func TestMax(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	for i := range maxCases {
		c := &Case{ID: fmt.Sprint("X", i), State: Gathering, Connections: 5, Network: pfx("192.0.2.0/24"), LastBlock: testStart}
		if i == 7 {
			c.Connections, c.State = 1, Approved
		}
		if i == 9 {
			c.Connections = 2
		}
		b.cases[c.ID] = c
	}
	b.Take(blockOf(1, "198.51.100.1/32", testStart.Add(48*time.Hour), 200, 0))
	if len(b.cases) != maxCases || b.cases["X9"] != nil || b.cases["X7"] == nil {
		t.Errorf("%d cases", len(b.cases))
	}
}

func TestConfigCheck(t *testing.T) {
	if err := DefaultConfig().Check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config){
		"mode": func(c *Config) { c.Mode = "x" }, "format": func(c *Config) { c.Format = "html" }, "dir": func(c *Config) { c.Dir = "x" },
		"return_path": func(c *Config) { c.ReturnPath = "a b@c.example" }, "redirect": func(c *Config) { c.Redirect = "x" },
		"sources": func(c *Config) { c.Lookup.Sources = []string{"x"} }, "quiet": func(c *Config) { c.Quiet = 0 },
		"caps.day": func(c *Config) { c.Caps.Day = 0 }, "delivery.by": func(c *Config) { c.Delivery.By = "pigeon" },
		"delivery.program": func(c *Config) { c.Delivery.Program = "sendmail" }, "from": func(c *Config) { c.Mode = Auto },
		"baseline": func(c *Config) { c.Baseline = -1 }, "dns": func(c *Config) { c.Lookup.DNS = "x" },
	} {
		c := DefaultConfig()
		change(&c)
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), "reports.") || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAdvice(t *testing.T) {
	const db = "../testdata/abuse/asn/doc-asn.mmdb"
	good := DefaultConfig()
	good.From, good.ReturnPath, good.Log = "abuse@mail.op.net", "abuse+{token}@mail.op.net", &LogHolds{Ports: true, Zone: true}
	fresh := must(os.ReadFile(db))
	i := bytes.Index(fresh, []byte("build_epoch")) + len("build_epoch")
	if fresh[i] != 4 || fresh[i+1] != 2 { // an unsigned 64-bit number of four bytes, as its format has it
		t.Fatalf("the database has another form: %x", fresh[i:i+6])
	}
	binary.BigEndian.PutUint32(fresh[i+2:], uint32(time.Now().Unix()))
	good.ASNDatabase = filepath.Join(t.TempDir(), "fresh.mmdb")
	must(0, os.WriteFile(good.ASNDatabase, fresh, 0o600))
	if a := good.Advice(); len(a) != 0 {
		t.Errorf("nothing is wrong, and %q", a)
	}
	for want, change := range map[string]func(*Config){
		"+incoming_port":           func(c *Config) { c.Log = &LogHolds{Zone: true} },
		"log_timezone = true":      func(c *Config) { c.Log = &LogHolds{Ports: true} },
		"it is not known whether":  func(c *Config) { c.Log = nil },
		"reports.from is not set":  func(c *Config) { c.From = "" },
		"is for documentation":     func(c *Config) { c.From = "Abuse <abuse@mx.example.net>" },
		"ends in .local":           func(c *Config) { c.From = "abuse@mail.local" },
		"asn_database is not set":  func(c *Config) { c.ASNDatabase = "" },
		"fetch a newer one":        func(c *Config) { c.ASNDatabase = db },
		"no such file":             func(c *Config) { c.ASNDatabase = "/nonexistent/x.mmdb" },
		"until it is mended":       func(c *Config) { c.Overrides = "/nonexistent/overrides" },
		"has no {token}":           func(c *Config) { c.ReturnPath = "" },
		"lookup.online is off":     func(c *Config) { c.Lookup.Online = false },
		"every report goes to a@b": func(c *Config) { c.Redirect = "a@b.op.net" },
	} {
		c := good
		change(&c)
		if a := c.Advice(); len(a) != 1 || !strings.Contains(a[0], want) {
			t.Errorf("want %q, got %q", want, a)
		}
	}
	c := good
	c.Mode = Off
	if c.From, c.Log = "", nil; c.Advice() != nil {
		t.Error("advice on what is off")
	}
	// The files, for `policy check`.
	good.Delivery.Program = "/bin/true"
	if err := good.CheckFiles(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*Config){
		"reports.asn_database:":           func(c *Config) { c.ASNDatabase = good.Delivery.Program + ".none" },
		"reports.asn_database: the ASN":   func(c *Config) { c.ASNDatabase = "desk_test.go" },
		"reports.overrides:":              func(c *Config) { c.Overrides = "desk_test.go" },
		"reports.delivery.program:":       func(c *Config) { c.Delivery.Program = "/nonexistent/sendmail" },
		"reports.delivery.password_file:": func(c *Config) { c.Delivery = Transport{By: SMTP, User: "u", PasswordFile: "/nonexistent/pw"} },
	} {
		c := good
		c.Delivery.Program = "/bin/true"
		change(&c)
		if err := c.CheckFiles(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
}

// TestSweep: what a killed program left half-written goes, what somebody may
// be writing stays.
func TestSweep(t *testing.T) {
	c := testConfig(t)
	must(0, os.MkdirAll(filepath.Join(c.Dir, "rdap"), 0o700))
	for name, age := range map[string]time.Duration{".smtpguard-new-1": 2 * time.Hour, "rdap/.smtpguard-new-2": 48 * time.Hour, ".smtpguard-new-3": time.Minute, "mine.eml": 48 * time.Hour} {
		path := filepath.Join(c.Dir, name)
		must(0, os.WriteFile(path, nil, 0o600))
		must(0, os.Chtimes(path, time.Time{}, time.Now().Add(-age)))
	}
	newBench(t, c, Options{})
	for name, stays := range map[string]bool{".smtpguard-new-1": false, "rdap/.smtpguard-new-2": false, ".smtpguard-new-3": true, "mine.eml": true} {
		if _, err := os.Stat(filepath.Join(c.Dir, name)); (err == nil) != stays {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The name is the one that is written under.
	f := must(createTemp(c.Dir))
	f.Close()
	if ok, _ := filepath.Match(tempName, filepath.Base(f.Name())); !ok {
		t.Errorf("written as %s", f.Name())
	}
}

// TestRefreshEnds: a block that is over is looked at once more, and then not
// again every minute.
func TestRefreshEnds(t *testing.T) {
	asked := 0
	blk := blockOf(1, "198.51.100.1/32", testStart, 20, 0)
	blk.Verdict.Held = 1 // it stays below the threshold
	blk.Until = testStart.Add(3 * time.Hour)
	b := newBench(t, testConfig(t), Options{Refresh: func(uint64) (Block, bool) { asked++; return blk, true }})
	b.Take(blk)
	b.Work(t.Context())
	blk.Until = blk.Until.Add(time.Hour) // it was made longer
	b.pass(90 * time.Minute)
	b.Work(t.Context())
	if c := b.only(); asked != 2 || !c.Blocks[0].Until.Equal(blk.Until) {
		t.Errorf("asked %d times, until %s", asked, c.Blocks[0].Until)
	}
	before := asked
	b.clock = blk.Until.Add(time.Minute)
	for range 10 {
		b.pass(time.Minute)
		b.refresh()
	}
	if asked != before+1 {
		t.Errorf("asked %d times of a block that is over", asked-before)
	}
}

// TestDeskOfTheEdited: whoever a person names, their mail server is looked for
// too.
func TestDeskOfTheEdited(t *testing.T) {
	b := flooded(t, func(_ *Config, o *Options, _ *floodLog) {
		o.Blocked = func(a netip.Addr) (netip.Prefix, bool) {
			return pfx("198.51.100.0/24"), pfx("198.51.100.0/24").Contains(a)
		}
	})
	w := worldOf[b.Desk]
	w.mu.Lock()
	w.mx["op3.example"], w.a["mx.op3.example"] = []string{"mx.op3.example"}, []string{"198.51.100.99"}
	w.mu.Unlock()
	d, _ := b.drafted()
	to := "abuse@op3.example"
	c := must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to}))
	if !strings.Contains(strings.Join(c.Mails[0].Warnings, "\n"), "smtpguard allow add 198.51.100.99") {
		t.Errorf("warnings %q", c.Mails[0].Warnings)
	}
	var r *Refusal
	if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "198.51.100.99") {
		t.Errorf("approved: %v", err)
	}
	to = "abuse@op2.example"
	c = must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to}))
	if len(c.Mails[0].Desk) != 0 || strings.Contains(strings.Join(c.Mails[0].Warnings, "\n"), "198.51.100.99") {
		t.Errorf("%v, warnings %q", c.Mails[0].Desk, c.Mails[0].Warnings)
	}
}

// TestPardonAfterEdit: a person's text and recipient stay, but what an operator
// took back goes out of the facts, and is approved anew.
func TestPardonAfterEdit(t *testing.T) {
	pardoned := map[uint64]bool{}
	blocks := map[uint64]Block{1: blockOf(1, "198.51.100.1/32", testStart, 200, 0), 2: blockOf(2, "198.51.100.2/32", testStart, 300, 0)}
	b := newBench(t, testConfig(t), Options{Refresh: func(id uint64) (Block, bool) {
		x, ok := blocks[id]
		x.Pardoned = pardoned[id]
		return x, ok
	}})
	b.Take(blocks[1], blocks[2])
	d, _ := b.drafted()
	text := "My own words.\n"
	to := "abuse@op.example"
	must(b.Edit(t.Context(), d.ID, "root", Edit{To: &to, Text: &text}))
	if _, err := b.Desk.Approve(d.ID, "root", Approval{}); err != nil { // who writes the text has seen it
		t.Fatal(err)
	}
	pardoned[2] = true
	if _, err := b.Send(t.Context(), d.ID, "root", SendOptions{}); err == nil || len(b.sent()) != 0 {
		t.Errorf("sent: %v", err)
	}
	var r *Refusal
	if _, err := b.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) {
		t.Errorf("approved with the block that was taken back: %v", err)
	}
	b.Work(t.Context())
	c, msg, _ := b.Case(d.ID)
	_, ps := parts(t, msg)
	if c.State != Drafted || c.Mails[0].Outdated || c.Mails[0].To.Address != to || ps[0].text != strings.ReplaceAll(text, "\n", "\r\n") || strings.Contains(named(t, ps, "sources.csv"), "198.51.100.2,") {
		t.Errorf("%s, to %s:\n%s", c.State, c.Mails[0].To.Address, msg)
	}
	if _, err := b.Desk.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "has changed") {
		t.Errorf("approved unseen: %v", err)
	}
	must(b.Approve(d.ID, "root", Approval{}))
	b.Work(t.Context())
	if c := b.only(); c.State != Sent {
		t.Errorf("%s", c.State)
	}
}

// TestFromIsSetLater: a draft names who writes, so it is made anew when that
// has changed, and not approved before.
func TestFromIsSetLater(t *testing.T) {
	c := testConfig(t)
	from := c.From
	c.From, c.ReturnPath = "", ""
	b := newBench(t, c, Options{})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	c.From = from
	later := newBench(t, c, Options{Store: b.store})
	var r *Refusal
	if _, err := later.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "has changed") {
		t.Errorf("approved with another sender: %v", err)
	}
	later.Work(t.Context())
	must(later.Approve(d.ID, "root", Approval{}))
	_, msg, _ := later.Case(d.ID)
	if h, ps := parts(t, msg); h.Get("From") != `"Example Mail abuse desk" <abuse@example.net>` || !strings.Contains(flat(ps[0].text), "Sender: Example Mail Ltd, abuse@example.net") || h.Get("Message-Id") == "<"+d.Mails[0].MessageID+">" {
		t.Errorf("%s", msg)
	}
}
