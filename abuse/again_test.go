package abuse

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// down makes every server of the world hang up, until up is called.
func (w *world) down() (up func()) {
	saved := map[string]string{}
	for _, p := range w.paths() {
		w.mu.Lock()
		saved[p] = w.answers[p]
		w.mu.Unlock()
		w.set(p, "hang up")
	}
	return func() {
		for p, a := range saved {
			w.set(p, a)
		}
	}
}

// forgive makes the desk ask servers again that were down.
func (b *bench) forgive() {
	f := b.lookups.fetch
	f.mu.Lock()
	f.servers = map[string]*server{}
	f.mu.Unlock()
}

// hours lets the desk work every ten minutes.
func (b *bench) hours(n int) {
	for range 6 * n {
		b.pass(10 * time.Minute)
		b.forgive()
		b.Work(b.t.Context())
	}
}

// TestLookupRepeated: an answer that is missing is asked for again, ever more
// rarely, and the draft made anew when it has come.
func TestLookupRepeated(t *testing.T) {
	for _, mode := range []Mode{Draft, Auto} {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Mode, c.Auto = mode, AutoSend{Connections: 1, Blocks: 1} })
		w := worldOf[b.Desk]
		w.setTXT("0.100.51.198.origin.test")
		up := w.down()
		b.Work(t.Context())
		c := b.only()
		if c.State != Held || len(c.Mails) != 0 || !strings.Contains(c.Why, "asked again at") || c.Again.Tries != 1 {
			t.Fatalf("%s (%s), %+v", c.State, c.Why, c.Again)
		}
		asked := w.count("/stat/network-info")
		for range 20 { // not every time that somebody looks
			b.Work(t.Context())
		}
		if n := w.count("/stat/network-info"); n != asked {
			t.Errorf("asked %d times more at once", n-asked)
		}
		b.hours(3) // then it is made of what is known
		if c = b.only(); c.State != Drafted || c.Why != "contact missing" || c.Mails[0].To.Address != "" || len(b.sent()) != 0 {
			t.Fatalf("%s (%s), to %+v, %d sent", c.State, c.Why, c.Mails[0].To, len(b.sent()))
		}
		id, changes := c.Mails[0].MessageID, len(c.History)
		b.hours(3)
		if n := len(b.only().History); n != changes {
			t.Errorf("%d steps more although nothing is known", n-changes)
		}
		up()
		b.hours(48)
		c = b.only()
		if m := c.Mails[0]; m.To.Address != "abuse@op2.example" || m.Cc.Address != "abuse@op1.example" || m.MessageID != id || c.Again != (Again{}) {
			t.Errorf("%s (%s): to %q, cc %q, again %+v", c.State, c.Why, m.To.Address, m.Cc.Address, c.Again)
		}
		if n := len(b.sent()); (mode == Auto) != (n == 1) {
			t.Errorf("%s: %d sent", mode, n)
		}
	}
}

// TestLookupGivesUp: nobody is asked for ever.
func TestLookupGivesUp(t *testing.T) {
	b := flooded(t, nil)
	w := worldOf[b.Desk]
	w.down()
	b.hours(20 * 24)
	if c := b.only(); c.Again.Tries != againTries || c.State != Drafted {
		t.Errorf("%s, %+v", c.State, c.Again)
	}
	n := w.count("")
	b.hours(5 * 24)
	if more := w.count("") - n; more != 0 {
		t.Errorf("asked %d times more", more)
	}
}

// TestContactNotAsked: where the AS's contact could not be asked for, the
// block's is no reason to send anything by itself.
func TestContactNotAsked(t *testing.T) {
	b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Mode, c.Auto = Auto, AutoSend{Connections: 1, Blocks: 1} })
	w := worldOf[b.Desk]
	w.mu.Lock()
	good := w.answers["/rdap/autnum/64500"]
	w.mu.Unlock()
	w.set("/rdap/autnum/64500", "hang up")
	d, _ := b.drafted()
	b.Work(t.Context())
	if d.Mails[0].To.Address != "abuse@op1.example" || !strings.Contains(d.Again.Missing, "RDAP autnum/64500") || len(b.sent()) != 0 {
		t.Errorf("to %s, %+v, %d sent", d.Mails[0].To.Address, d.Again, len(b.sent()))
	}
	w.set("/rdap/autnum/64500", good)
	b.hours(2)
	if c := b.only(); c.State != Sent || c.Mails[0].To.Address != "abuse@op2.example" {
		t.Errorf("%s (%s), to %s", c.State, c.Why, c.Mails[0].To.Address)
	}
}

// TestOneNetworkOneDraft: what was drafted apart while nobody could be asked
// becomes one when it turns out to be one network, but nothing that a person
// has put a hand on goes away.
func TestOneNetworkOneDraft(t *testing.T) {
	for _, hand := range []bool{false, true} {
		w := newWorld(t)
		w.plain()
		for i := range 3 {
			w.set(fmt.Sprintf("/stat/network-info/data.json?198.51.%d.1", 100+i), `{"data":{"asns":["64500"],"prefix":"198.51.0.0/16"}}`)
		}
		up := w.down()
		c := testConfig(t)
		w.online(&c)
		c.Lookup.Sources = []string{RIPEstat, RDAP}
		b := newBench(t, c, Options{})
		w.connect(b.lookups)
		for i := range 3 {
			b.Take(blockOf(uint64(i+1), fmt.Sprintf("198.51.%d.1/32", 100+i), testStart, 300+i, 0))
		}
		b.hours(4)
		drafts := func() (ds []Case) {
			for _, c := range b.Cases() {
				if c.State == Drafted {
					ds = append(ds, c)
				}
			}
			return ds
		}
		if n := len(drafts()); n != 3 {
			t.Fatalf("%d drafts while nobody could be asked, want 3", n)
		}
		mine := drafts()[1].ID
		if hand {
			b.contact(mine, "right@desk.example")
		}
		up()
		b.hours(12)
		ds := drafts()
		want := 1
		if hand {
			want = 2 // nobody knows yet that the person's is of the same network
		}
		if len(ds) != want {
			for _, c := range b.Cases() {
				t.Log(c.ID, c.State, c.Network, c.Why, c.MergedInto)
			}
			t.Fatalf("%d drafts, want %d", len(ds), want)
		}
		for _, c := range ds {
			if c.ID == mine && hand {
				if c.Mails[0].To.Address != "right@desk.example" {
					t.Errorf("to %+v", c.Mails[0].To)
				}
				continue
			}
			if c.BlockCount != 3-(want-1) || c.Mails[0].To.Address != "abuse@op2.example" || c.Network != pfx("198.51.0.0/16") || c.Mails[0].Outdated {
				t.Errorf("%s: %d blocks, to %q", c.Network, c.BlockCount, c.Mails[0].To.Address)
			}
		}
	}
}

// TestOutdatedNeedsNoLookup: a draft that tells what is no longer true is made
// anew, however many lookups there were that day, and spends none.
func TestOutdatedNeedsNoLookup(t *testing.T) {
	for _, spent := range []bool{false, true} {
		p := newPardons(blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12), blockOf(2, "198.51.100.77/32", testStart.Add(16*time.Second), 200, 12))
		b := flooded(t, func(_ *Config, o *Options, _ *floodLog) { o.Refresh = p.refresh })
		b.Take(p.blocks[2])
		d, _ := b.drafted()
		if spent {
			b.spend()
		}
		asked := len(b.asked)
		p.lifted[2] = true
		b.pass(2 * time.Minute)
		c, _ := b.drafted()
		if c.Mails[0].Outdated || c.Mails[0].To.Address != d.Mails[0].To.Address || len(b.asked) != asked {
			t.Errorf("outdated %v, to %q, %d lookups", c.Mails[0].Outdated, c.Mails[0].To.Address, len(b.asked)-asked)
		}
		if _, err := b.Approve(d.ID, "root", Approval{}); err != nil {
			t.Error(err)
		}
	}
	// One that has no recipient yet is not made anew for ever while nobody may
	// be asked.
	b := flooded(t, nil)
	w := worldOf[b.Desk]
	w.set("/rdap/autnum/64500", "!404")
	w.unset("/rdap/ip/198.51.100.0")
	d, _ := b.drafted()
	b.spend()
	b.cases[d.ID].mail().Outdated = true
	b.Work(t.Context())
	if c := b.only(); c.Mails[0].Outdated || c.Why != "contact missing" || strings.Count(strings.Join(c.Mails[0].Warnings, "|"), missing) != 1 {
		t.Errorf("%s (%s), warnings %q", c.State, c.Why, c.Mails[0].Warnings)
	}
}

// TestLookupTotal: the time for one draft bounds its neighbours too.
func TestLookupTotal(t *testing.T) {
	w := newWorld(t)
	c := testConfig(t)
	w.online(&c)
	c.Lookup.Each, c.Lookup.Total = 250*time.Millisecond, 700*time.Millisecond
	b := newBench(t, c, Options{})
	w.connect(b.lookups)
	b.lookups.remember(netKey(RIPEstat, pfx("198.51.100.1/32")), &remembered{Claim: &Claim{Origins: []uint32{64500}, Prefix: pfx("198.51.0.0/16"), Source: "RIPEstat", Announced: true}})
	w.mu.Lock()
	w.slow = time.Hour
	w.mu.Unlock()
	b.Take(blockOf(1, "198.51.100.1/32", testStart, 9999, 0))
	for i := range 60 {
		b.Take(blockOf(uint64(i+2), fmt.Sprintf("198.51.%d.1/32", 101+i), b.time(), 5, 0))
	}
	b.Work(t.Context())
	// Each neighbour costs 250 ms: 60 of them were asked where only one or two
	// have the time.
	if n := w.count("/stat/network-info"); n > 10 {
		t.Errorf("%d neighbours were asked about in %s", n, c.Lookup.Total)
	}
}
