package abuse

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// wide makes all of 198.51.0.0/16 one announced network, as a lookup would.
func (b *bench) wide() {
	for i := range 256 {
		b.lookups.remember(netKey(RIPEstat, pfx(fmt.Sprintf("198.51.%d.0/24", i))),
			&remembered{Claim: &Claim{Origins: []uint32{64500}, Prefix: pfx("198.51.0.0/16"), Source: "RIPEstat", Announced: true}})
	}
}

// swarm is n addresses of one network, each blocked by itself, and the log of
// what they did: three connections each, then one refused.
func swarm(n int) (blocks []Block, log string) {
	l := newFloodLog()
	for i := range n {
		a := fmt.Sprintf("198.51.%d.%d", i/200, i%200+1)
		for k := range 3 {
			l.open(a, 2000+k)
		}
		l.line("Connection from [%s]:%d I=[203.0.113.25]:25 refused: too many connections", a, 9000)
		l.at = l.at.Add(10 * time.Millisecond)
		blocks = append(blocks, blockOf(uint64(i+1), a+"/32", l.at, 3, 1))
	}
	return blocks, l.b.String()
}

// fewRefs lets a case keep n blocks.
func fewRefs(t *testing.T, n int) {
	was := maxRefs
	maxRefs = n
	t.Cleanup(func() { maxRefs = was })
}

// TestManyBlocks: a case of thousands of blocks counts each of its sources, and
// none of them as a victim.
func TestManyBlocks(t *testing.T) {
	for _, fromLog := range []bool{true, false} {
		blocks, log := swarm(1200)
		o := Options{}
		if fromLog {
			o.Logs = &logText{text: log, zone: time.UTC}
		}
		b := newBench(t, testConfig(t), o)
		b.wide()
		for i := 0; i < len(blocks); i += 400 {
			if err := b.Take(blocks[i : i+400]...); err != nil {
				t.Fatal(err)
			}
		}
		d, msg := b.drafted()
		f := d.Mails[0].Facts
		if n, exact := f.addresses(); n != 1200 || !exact || f.Connections != 4800 || f.Refused != 1200 || f.Others != 0 {
			t.Errorf("from the log: %v: %d sources (%v), %d connections, %d refused, %d of others", fromLog, n, exact, f.Connections, f.Refused, f.Others)
		}
		_, ps := parts(t, msg)
		if rows := strings.Count(named(t, ps, "sources.csv"), "\n"); rows != 1201 {
			t.Errorf("from the log: %v: sources.csv has %d lines", fromLog, rows)
		}
		if text := flat(ps[0].text); !strings.Contains(text, "1200 addresses in 198.51.0.0/21 opened 4800 TCP connections") || strings.Contains(text, "other networks") {
			t.Errorf("from the log: %v:\n%s", fromLog, ps[0].text)
		}
		v := must(json.Marshal(d))
		t.Logf("the case takes %d KiB", len(v)>>10)
		if len(v) > 4<<20 {
			t.Errorf("the case takes %d bytes", len(v))
		}
	}
}

// TestMoreBlocksThanACaseHolds: what finds no room is counted and told as such,
// and is no victim.
func TestMoreBlocksThanACaseHolds(t *testing.T) {
	fewRefs(t, 400)
	blocks, log := swarm(maxRefs + 300)
	b := newBench(t, testConfig(t), Options{Logs: &logText{text: log, zone: time.UTC}})
	b.wide()
	if err := b.Take(blocks...); err != nil {
		t.Fatal(err)
	}
	d, msg := b.drafted()
	f := d.Mails[0].Facts
	if d.BlockCount != maxRefs+300 || len(d.Blocks) != maxRefs || d.Connections != 4*(maxRefs+300) {
		t.Errorf("%d blocks, of which %d are kept, %d connections", d.BlockCount, len(d.Blocks), d.Connections)
	}
	if n, _ := f.addresses(); n != maxRefs || f.Others != 0 {
		t.Errorf("%d sources, %d connections of others", n, f.Others)
	}
	_, ps := parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "300 more blocks") {
		t.Errorf("the draft says nothing of those that it leaves out:\n%s", ps[0].text)
	}

	// They are not forgotten when networks are joined.
	o := Case{Kind: Flood}
	o.absorb(&d)
	if o.BlockCount != d.BlockCount || o.Connections != d.Connections || len(o.Blocks) != maxRefs {
		t.Errorf("joined: %d blocks, %d connections", o.BlockCount, o.Connections)
	}
	// A block that was told of, in a mail that has left, makes room.
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "root", Approval{}))
	must(b.Send(t.Context(), d.ID, "root", SendOptions{}))
	late := blockOf(uint64(maxRefs+1000), "198.51.255.9/32", b.time(), 500, 0)
	if err := b.Take(late); err != nil {
		t.Fatal(err)
	}
	c := b.only()
	if last := c.Blocks[len(c.Blocks)-1]; last.ID != late.ID || len(c.Blocks) > maxRefs {
		t.Errorf("the new block is not kept: %d, %+v", len(c.Blocks), last)
	}
	if !b.hostile().Contains(netip.MustParseAddr("198.51.0.1")) {
		t.Error("an attacker that was told of is a victim now")
	}
}

// TestSubjectStays: blocks that come between show and approve change nothing
// of the mail.
func TestSubjectStays(t *testing.T) {
	fewRefs(t, 600)
	b := newBench(t, testConfig(t), Options{})
	b.wide()
	var blocks []Block
	for i := range 500 {
		blocks = append(blocks, blockOf(uint64(i+1), fmt.Sprintf("198.51.%d.%d/32", 100+i/250*5, i%250+1), testStart, 10, 0))
	}
	if err := b.Take(blocks...); err != nil {
		t.Fatal(err)
	}
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	seen, m1, _ := b.Show(d.ID, "root")
	blocks = nil
	for i := range maxRefs {
		blocks = append(blocks, blockOf(uint64(i+501), fmt.Sprintf("198.51.%d.%d/32", i/250, i%250+1), testStart.Add(time.Minute), 10, 0))
	}
	if err := b.Take(blocks...); err != nil {
		t.Fatal(err)
	}
	c, err := b.Desk.Approve(d.ID, "root", Approval{})
	if err != nil {
		t.Fatal(err)
	}
	_, m2, _ := b.Case(d.ID)
	_, p1 := parts(t, m1)
	_, p2 := parts(t, m2)
	if c.mail().Subject != seen.mail().Subject {
		t.Errorf("seen     %s\napproved %s", seen.mail().Subject, c.mail().Subject)
	}
	for i := range p1[1:] {
		if p1[i+1] != p2[i+1] {
			t.Errorf("%s has changed:\n%s\n%s", p1[i+1].name, p1[i+1].text, p2[i+1].text)
		}
	}
}

// TestNumbersAgree: what the parts of one mail say of a number is the same.
func TestNumbersAgree(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	_, ps := parts(t, msg)
	text := flat(ps[0].text)
	var x struct {
		Connections int `json:"connection_count"`
		Sources     int `json:"source_count"`
		Seconds     int `json:"duration_seconds"`
		Description string
	}
	if err := json.Unmarshal([]byte(named(t, ps, "xarf.json")), &x); err != nil {
		t.Fatal(err)
	}
	rows, sum, refused := -1, 0, 0
	for line := range strings.Lines(named(t, ps, "sources.csv")) {
		if rows++; rows == 0 {
			continue
		}
		f := strings.Split(strings.TrimSpace(line), ",")
		var n, r int
		fmt.Sscan(f[6], &n)
		fmt.Sscan(f[7], &r)
		sum, refused = sum+n, refused+r
	}
	if rows != x.Sources || sum != x.Connections {
		t.Errorf("sources.csv has %d sources and %d connections, the XARF %d and %d", rows, sum, x.Sources, x.Connections)
	}
	for _, s := range []string{
		fmt.Sprintf("%d addresses in 198.51.100.0/24 opened %d TCP connections to our mail server within %d seconds", rows, sum, x.Seconds),
		fmt.Sprintf("%d took a place in the mail server, %d were accepted and turned away", sum-refused, refused),
		fmt.Sprintf("%d of %d lines, all in our archive", strings.Count(named(t, ps, "evidence.txt"), "\n"), sum),
	} {
		if !strings.Contains(text, s) {
			t.Errorf("the text does not say %q:\n%s", s, ps[0].text)
		}
	}
	for _, c := range []struct {
		n    int
		d    time.Duration
		want string
	}{{366, 20 * time.Second, "18.3 per second"}, {3000, 40 * time.Hour, "1.2 per minute"}, {5, 10 * time.Hour, "0.5 per hour"}} {
		if got := rate(c.n, c.d); got != c.want {
			t.Errorf("%d in %s is %q, want %q", c.n, c.d, got, c.want)
		}
	}
}
