package abuse

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/base64"
	"encoding/csv"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/mail"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// flooded is a desk with one drafted case: three addresses of a /24 that
// opened 267 connections and were refused 99 times, with a log of it, an AS
// database and contacts from a world of servers.
func flooded(t *testing.T, change func(*Config, *Options, *floodLog)) *bench {
	t.Helper()
	w := newWorld(t)
	w.plain()
	for _, a := range []string{"23", "41", "77"} { // whichever is asked about
		w.set("/stat/network-info/data.json?198.51.100."+a, `{"data":{"asns":["64500"],"prefix":"198.51.100.0/24"}}`)
		w.set("/rdap/ip/198.51.100."+a, string(must(os.ReadFile("../testdata/abuse/rdap/arin-ip-nested-abuse.json"))))
	}
	w.set("/stat/network-info/data.json?198.51.100.0", `{"data":{"asns":["64500"],"prefix":"198.51.100.0/24"}}`)
	w.set("/rdap/ip/198.51.100.0", string(must(os.ReadFile("../testdata/abuse/rdap/arin-ip-nested-abuse.json"))))
	c := testConfig(t)
	w.online(&c)
	c.ASNDatabase = "../testdata/abuse/asn/doc-asn.mmdb"
	l := newFloodLog()
	l.at = testStart.Add(-3 * 24 * time.Hour)
	for i := range 3 { // the normal level
		l.open("198.51.100.41", 5000+i)
		l.at = l.at.Add(time.Hour)
	}
	l.at = testStart
	for i := range 200 {
		l.at = l.at.Add(100 * time.Millisecond)
		l.open("198.51.100.23", 20000+i)
		if i%3 == 0 {
			l.open("198.51.100.41", 30000+i)
		}
		if i > 100 {
			l.line("Connection from [198.51.100.77]:%d I=[203.0.113.25]:25 refused: too many connections", 1000+i)
			l.line("Connection from [192.0.2.7]:%d I=[203.0.113.25]:25 refused: too many connections", 1000+i)
		}
	}
	o := Options{}
	if change != nil {
		change(&c, &o, l)
	}
	if o.Logs == nil {
		o.Logs = &logText{text: l.b.String(), zone: l.zone}
	}
	b := newBench(t, c, o)
	w.connect(b.lookups)
	worldOf[b.Desk] = w
	t.Cleanup(func() { delete(worldOf, b.Desk) })
	if err := b.Take(blockOf(1, "198.51.100.0/24", testStart.Add(15*time.Second), 200, 12)); err != nil {
		t.Fatal(err)
	}
	return b
}

// worldOf finds the world of a flooded desk.
var worldOf = map[*Desk]*world{}

// approved is the draft, approved by a person.
func (b *bench) approved() (Case, []byte) {
	b.t.Helper()
	c, _ := b.drafted()
	if _, err := b.Approve(c.ID, "root (uid 0)", Approval{}); err != nil {
		b.t.Fatal(err)
	}
	c, msg, err := b.Case(c.ID)
	if err != nil {
		b.t.Fatal(err)
	}
	return c, msg
}

func TestR01_Container(t *testing.T) {
	for _, format := range []Format{Mixed, XARF, XARF02, Text} {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Format = format })
		_, msg := b.approved()
		_, ps := parts(t, msg)
		if ps[0].ctype != "text/plain" || ps[0].name != "" || len(ps) > 4 {
			t.Errorf("%s: %d parts, the first is %s %q", format, len(ps), ps[0].ctype, ps[0].name)
		}
		for _, p := range ps[1:] {
			if ext := filepath.Ext(p.name); p.name != "" && ext != ".txt" && ext != ".csv" && ext != ".json" {
				t.Errorf("%s: attachment %q", format, p.name)
			}
		}
		want := map[Format]string{Mixed: "text/plain text/plain text/csv application/json", XARF: "text/plain message/feedback-report application/json",
			XARF02: "text/plain text/plain text/plain text/csv", Text: "text/plain"}[format]
		var got []string
		for _, p := range ps {
			got = append(got, p.ctype)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", format, got, want)
		}
		if format == XARF && (!bytes.Contains(msg, []byte("report-type=feedback-report")) || !strings.HasPrefix(ps[1].text, "Feedback-Type: xarf\r\n")) {
			t.Errorf("the XARF container is not one:\n%s", ps[1].text)
		}
		if format == XARF02 && !strings.Contains(ps[1].text, "Source: 198.51.100.23\r\n") {
			t.Errorf("report.txt:\n%s", ps[1].text)
		}
	}
}

func TestR02_Bytes(t *testing.T) {
	for _, format := range []Format{Mixed, XARF, XARF02, Text} {
		b := flooded(t, func(c *Config, _ *Options, l *floodLog) {
			c.Format = format
			c.Org = "B\u00fccher \x1b[31m GmbH\r\nBcc: all@example.org"
			l.line("SMTP connection from (evil\x1b]0;\x07\x00helo) [198.51.100.23]:20000 I=[203.0.113.25]:25 lost")
		})
		_, msg := b.approved()
		head, _, _ := bytes.Cut(msg, []byte("\r\n\r\n"))
		if bytes.Contains(head, []byte("\nBcc:")) {
			t.Error("a header was injected")
		}
		for i, line := range bytes.Split(bytes.TrimSuffix(msg, []byte("\r\n")), []byte("\r\n")) {
			if len(line) > 78 {
				t.Errorf("%s: line %d has %d bytes: %s", format, i, len(line), line)
			}
			for _, c := range line {
				if c < ' ' || c > '~' {
					t.Errorf("%s: line %d has byte %#x: %q", format, i, c, line)
					break
				}
			}
		}
		_, ps := parts(t, msg)
		for _, p := range ps {
			if i := strings.IndexFunc(p.text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' || r > '~' }); i >= 0 {
				t.Errorf("%s: %q holds %q", format, p.name, p.text[i])
			}
		}
	}
}

func TestR03_From(t *testing.T) {
	for _, from := range []string{"noreply@example.net", "No Reply <no-reply@example.net>", "do.not_reply@example.net", "abuse", "abuse@localhost", "a@b@c.example"} {
		c := testConfig(t)
		c.From = from
		if err := c.Check(); err == nil || !strings.Contains(err.Error(), "reports.from") {
			t.Errorf("%s: %v", from, err)
		}
	}
	b := flooded(t, nil)
	_, msg := b.approved()
	h, ps := parts(t, msg)
	a, err := mail.ParseAddress(h.Get("From"))
	if err != nil || a.Address != "abuse@example.net" {
		t.Errorf("From %q", h.Get("From"))
	}
	var x xarfReport
	if err := json.Unmarshal([]byte(named(t, ps, "xarf.json")), &x); err != nil || x.Reporter.Domain != domainOf(a.Address) {
		t.Errorf("reporter %+v, %v", x.Reporter, err)
	}
	// Without it a draft is made, and nothing is sent.
	b = flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.From, c.ReturnPath = "", "" })
	c, _ := b.drafted()
	var r *Refusal
	if _, err := b.Approve(c.ID, "root", Approval{}); !asRefusal(err, &r) || !strings.Contains(r.Why, "reports.from") {
		t.Errorf("approved without From: %v", err)
	}
}

func TestR04_To(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	h, _ := parts(t, msg)
	to, err := h.AddressList("To")
	if err != nil || len(to) != 1 || to[0].Address != "abuse@op2.example" {
		t.Errorf("To %v, %v", to, err)
	}
	m := c.Mails[0].To
	if m.Source != "RDAP autnum/64500" || m.URL == "" || m.At.IsZero() || !strings.Contains(m.Role, "abuse") {
		t.Errorf("provenance %+v", m)
	}
	if raw, err := os.ReadFile(b.rawPath(&c, 0)); err != nil || !bytes.Contains(raw, []byte("EX3-RIPE")) {
		t.Errorf("the answer is not kept: %v", err)
	}
}

func TestR05_Cc(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	h, _ := parts(t, msg)
	if cc, err := h.AddressList("Cc"); err != nil || len(cc) != 1 || cc[0].Address != "abuse@op1.example" {
		t.Errorf("Cc %v, %v", cc, err)
	}
	if _, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); err != nil {
		t.Fatal(err)
	}
	s := b.sent()
	if len(s) != 1 || !slices.Equal(s[0].args[4:], []string{"abuse@op2.example", "abuse@op1.example"}) {
		t.Errorf("sent %+v", s)
	}
	// The same address is not copied to, and by choice nobody is.
	f := finding{}
	f.choose([]Contact{{Address: "a@x.example", Scope: "AS1"}}, []Contact{{Address: "a@x.example", Scope: "p"}}, true, nil, b.lookups.bad)
	if f.cc.Address != "" {
		t.Errorf("cc %+v", f.cc)
	}
	b = flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.CopyNetwork = false })
	if c, _ := b.drafted(); c.Mails[0].Cc.Address != "" {
		t.Errorf("cc %+v", c.Mails[0].Cc)
	}
}

func TestR06_Subject(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	h, _ := parts(t, msg)
	want := "Abuse report: SMTP connection flood from 198.51.100.0/24 (AS64500), 2026-11-22 18:41 UTC [" + c.ID + "]"
	if s := h.Get("Subject"); s != want || len(s) >= 120 {
		t.Errorf("subject %q (%d), want %q", s, len(s), want)
	}
	long := Case{ID: "SG-20261122-ABCDEF", Blocks: []Ref{{Prefix: pfx("2001:db8:ffff:ffff:ffff:ffff:ffff:ffff/128")}}}
	m := Mail{Origin: Origin{AS: math.MaxUint32}, Facts: Facts{First: testStart, Last: testStart.Add(30 * time.Hour)}}
	for _, f := range []Format{Mixed, XARF02} {
		m.Format = f
		if s := subject(&long, &m); len(s) >= 120 || !strings.Contains(s, "[SG-20261122-ABCDEF]") || !strings.Contains(s, "AS4294967295") {
			t.Errorf("%s: %q (%d)", f, s, len(s))
		}
	}
}

func TestR07_MessageID(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	h, _ := parts(t, msg)
	id := h.Get("Message-ID")
	if id != "<"+c.Mails[0].ReportID+"@example.net>" || !uuidForm.MatchString(c.Mails[0].ReportID) {
		t.Errorf("Message-ID %s", id)
	}
	again, err := newDesk(Options{Config: b.config, Store: b.store}, b.time, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, msg2, err := again.Case(c.ID); err != nil || !bytes.Equal(msg, msg2) {
		t.Error("after a restart it is another mail", err)
	}
	if _, err := b.Send(t.Context(), c.ID, "root", SendOptions{}); err != nil {
		t.Fatal(err)
	}
	// A flood that goes on for more than a day is followed up, in the thread.
	for i, h := range []int{20, 40, 60, 80, 100} {
		b.pass(20 * time.Hour)
		if err := b.Take(blockOf(uint64(10+i), "198.51.100.0/24", testStart.Add(time.Hour+time.Duration(h)*time.Hour), 300, 0)); err != nil {
			t.Fatal(err)
		}
		b.pass(time.Hour)
		b.Work(t.Context())
		if c := b.only(); c.State == Drafted {
			if _, err := b.Approve(c.ID, "root", Approval{}); err != nil {
				t.Fatal(err)
			}
			b.Work(t.Context())
		}
	}
	c = b.only()
	if len(c.Mails) != 3 {
		t.Fatalf("%d mails, want the report and two follow-ups: %+v", len(c.Mails), c.History)
	}
	for i, m := range c.Mails[1:] {
		msg, _ := b.store.Record(kindMail, mailKey(&c, i+1))
		h, ps := parts(t, msg)
		var refs []string
		for _, o := range c.Mails[:i+1] {
			refs = append(refs, "<"+o.MessageID+">")
		}
		if h.Get("In-Reply-To") != refs[i] || h.Get("References") != strings.Join(refs, " ") || m.MessageID == c.Mails[0].MessageID {
			t.Errorf("follow-up %d: In-Reply-To %s, References %s", i, h.Get("In-Reply-To"), h.Get("References"))
		}
		if !strings.HasPrefix(h.Get("Subject"), "Follow-up: ") || !strings.Contains(ps[0].text, "the flood goes on") {
			t.Errorf("follow-up %d: subject %s", i, h.Get("Subject"))
		}
	}
}

func TestR08_AutoSubmitted(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	h, ps := parts(t, msg)
	if h.Get("Auto-Submitted") != "" || h.Get("Precedence") != "" || !strings.Contains(flat(ps[0].text), signed(true)) {
		t.Errorf("headers %v", h)
	}
	b = flooded(t, func(c *Config, _ *Options, _ *floodLog) {
		c.Mode, c.Auto = Auto, AutoSend{Connections: 100, Blocks: 1}
	})
	b.Work(t.Context())
	if c := b.only(); c.State != Sent || c.Mails[0].Approved != Self {
		t.Fatalf("%s %s", c.State, c.Why)
	}
	_, msg, _ = b.Case(b.only().ID)
	h, ps = parts(t, msg)
	if h.Get("Auto-Submitted") != "auto-generated" || h.Get("Precedence") != "" || strings.Contains(flat(ps[0].text), signed(true)) || !strings.Contains(flat(ps[0].text), signed(false)) {
		t.Errorf("headers %v", h)
	}
}

var evidenceTime = regexp.MustCompile(`^\d{4}-\d{2}-\d{2} \d{2}:\d{2}:\d{2}(\.\d{3})? \+0000 `)

var timeForm = regexp.MustCompile(`\d{4}-\d{2}-\d{2}[ T]\d{2}:\d{2}`)

func TestR09_Times(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	_, ps := parts(t, msg)
	text := flat(ps[0].text)
	for _, m := range timeForm.FindAllStringIndex(text, -1) {
		rest := text[m[0]:min(len(text), m[1]+24)]
		if !strings.Contains(rest, "UTC") && !strings.Contains(rest, "+0000") {
			t.Errorf("a time without its zone: %s", rest)
		}
	}
	if !strings.Contains(text, "First seen 2026-11-22 18:41:07 UTC (+00:00)") {
		t.Error("first seen is not there, or not in UTC")
	}
	for line := range strings.Lines(named(t, ps, "evidence.txt")) {
		if !evidenceTime.MatchString(line) {
			t.Errorf("evidence line %q", line)
		}
	}

	// A log without a zone is in the configured one, also in the hour that
	// comes twice.
	berlin := must(time.LoadLocation("Europe/Berlin"))
	l := newFloodLog()
	l.zone = berlin
	l.at = time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC) // 02:30 summer time; the clocks go back at 01:00 UTC
	for i := range 120 {
		l.open("198.51.100.23", 20000+i)
		l.at = l.at.Add(30 * time.Second)
	}
	k := newCollector(&Case{Blocks: []Ref{{Prefix: pfx("198.51.100.23/32"), Since: time.Date(2026, 10, 25, 1, 30, 0, 0, time.UTC),
		Verdict: &detector.Verdict{Time: time.Date(2026, 10, 25, 1, 30, 0, 0, time.UTC), First: time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC)}}}})
	src := &logText{text: l.b.String(), zone: berlin}
	reach, err := src.Scan(t.Context(), time.Time{}, time.Now().Add(1e6*time.Hour), func(ev *detector.Event, line []byte) error { k.observe(ev, line); return nil })
	if err != nil {
		t.Fatal(err)
	}
	f := k.facts(reach, 0)
	if !f.First.Equal(time.Date(2026, 10, 25, 0, 30, 0, 0, time.UTC)) || f.Last.Sub(f.First) != 119*30*time.Second || f.Connections != 120 {
		t.Errorf("first %s, last %s, %d connections", f.First, f.Last, f.Connections)
	}
}

func TestR10_Source(t *testing.T) {
	b := flooded(t, func(_ *Config, _ *Options, l *floodLog) {
		for i := range 5 {
			l.open("198.51.101.9", 1+i)    // a neighbour
			l.open("2001:db8:bad::7", 1+i) // another family
		}
	})
	c, msg := b.approved()
	_, ps := parts(t, msg)
	rows := must(csv.NewReader(strings.NewReader(named(t, ps, "sources.csv"))).ReadAll())[1:]
	if len(rows) != 3 {
		t.Errorf("%d sources", len(rows))
	}
	for _, r := range rows {
		a, err := netip.ParseAddr(r[0])
		if port, _ := strconv.Atoi(r[1]); err != nil || !reported(&c).Contains(a) || port == 0 {
			t.Errorf("row %v", r)
		}
	}
	six := Source{Prefix: netip.MustParsePrefix("2001:0db8:0000:0000:0000:0000:0000:0001/128"), Port: 1, Connections: 1}
	if s := csvText(&c, &Facts{Sources: []Source{six}}); !strings.Contains(s, "\n2001:db8::1,1,") {
		t.Errorf("IPv6 is not in the form of RFC 5952: %s", s)
	}
	// A source that delivered mail is nobody's to accuse, unless it was
	// blocked by itself.
	b = flooded(t, func(_ *Config, _ *Options, l *floodLog) {
		l.open("198.51.100.200", 7)
		l.line("1xVDVV-0002uK-37 <= a@legit.example H=(legit.example) [198.51.100.200]:7 I=[203.0.113.25]:25 P=esmtp S=697")
	})
	c, msg = b.approved()
	if bytes.Contains(msg, []byte("198.51.100.200")) || c.Mails[0].Facts.Spared != 1 || c.Mails[0].Facts.Messages != 0 {
		t.Errorf("a proper sender is in the report: %+v", c.Mails[0].Facts.Spared)
	}
}

func TestR11_Destination(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	_, ps := parts(t, msg)
	if !strings.Contains(ps[0].text, "Target        203.0.113.25 port 25/tcp") {
		t.Error("the target is not there")
	}
	// A log without it: nothing is guessed.
	b = flooded(t, func(_ *Config, o *Options, l *floodLog) {
		o.Logs = &logText{text: strings.ReplaceAll(l.b.String(), " I=[203.0.113.25]:25", ""), zone: time.UTC}
	})
	_, msg = b.approved()
	_, ps = parts(t, msg)
	if !strings.Contains(flat(ps[0].text), "its address and port are not in our log") || strings.Contains(named(t, ps, "xarf.json"), "destination") {
		t.Error("the target is guessed")
	}
}

func TestR12_Counts(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	_, ps := parts(t, msg)
	const want = 200 + 67 + 99
	if !strings.Contains(flat(ps[0].text), fmt.Sprintf("opened %d TCP connections", want)) {
		t.Errorf("the text has another number:\n%s", ps[0].text)
	}
	sum, refused := 0, 0
	for _, r := range must(csv.NewReader(strings.NewReader(named(t, ps, "sources.csv"))).ReadAll())[1:] {
		sum += must(strconv.Atoi(r[6]))
		refused += must(strconv.Atoi(r[7]))
	}
	var x xarfReport
	if err := json.Unmarshal([]byte(named(t, ps, "xarf.json")), &x); err != nil {
		t.Fatal(err)
	}
	if sum != want || refused != 99 || x.ConnectionCount != want || x.SourceCount != 3 {
		t.Errorf("CSV %d and %d, XARF %d of %d", sum, refused, x.ConnectionCount, x.SourceCount)
	}
	// The archive holds just these lines.
	if n := countArchive(t, b, c); n != want {
		t.Errorf("archive %d", n)
	}
}

// countArchive counts the connections in the archive and compares its digest.
func countArchive(t *testing.T, b *bench, c Case) int {
	t.Helper()
	a := c.Mails[0].Archive
	z, err := gzip.NewReader(bytes.NewReader(must(os.ReadFile(filepath.Join(b.config.Dir, a.File)))))
	if err != nil {
		t.Fatal(err)
	}
	raw := must(io.ReadAll(z))
	sum := sha256.Sum256(raw)
	if hex.EncodeToString(sum[:]) != a.SHA256 || bytes.Count(raw, []byte("\n")) != a.Lines || int64(len(raw)) != a.Bytes {
		t.Errorf("the archive is not what is said of it: %+v", a)
	}
	n := 0
	p := exim.New(time.UTC)
	var ev detector.Event
	for sc := bufio.NewScanner(bytes.NewReader(raw)); sc.Scan(); {
		if p.Parse(sc.Bytes(), &ev) && (ev.Kind == detector.Opened || ev.Kind == detector.Refused) {
			n++
		}
	}
	return n
}

// corpus are recorded floods: the log, and the sources that a report must
// name and must not name.
var corpus = []struct {
	name     string
	capacity int
	nets     int // reports
}{
	{"h-one-ip-hold", 100, 1},
	{"i-slash24-botnet", 100, 0},
	{"b-all", 100, 0},
	{"g1-ipv6-one-64", 100, 0},
	{"j-rapid-churn", 100, 0},
}

// TestR12_Corpus: on logs of a real Exim, the report's numbers are those of
// the detector, and its sources are the attackers.
func TestR12_Corpus(t *testing.T) {
	for _, k := range corpus {
		t.Run(k.name, func(t *testing.T) {
			log := string(must(os.ReadFile("../testdata/corpus/" + k.name + ".log")))
			var truth struct {
				Attackers        []string `json:"attackers"`
				AttackerPrefixes []string `json:"attacker_prefixes"`
				Legit            []string `json:"legit"`
			}
			if err := json.Unmarshal(must(os.ReadFile("../testdata/corpus/"+k.name+".truth.json")), &truth); err != nil {
				t.Fatal(err)
			}
			det, err := detector.New(detector.Config{Capacity: k.capacity, Rules: detector.DefaultRules()})
			if err != nil {
				t.Fatal(err)
			}
			p := exim.New(time.UTC)
			var ev detector.Event
			var blocks []Block
			var blocked []netip.Prefix
			opened := map[netip.Prefix]int{} // by the time of the verdict, from the log alone
			var events []detector.Event
			for sc := bufio.NewScanner(strings.NewReader(log)); sc.Scan(); {
				if !p.Parse(sc.Bytes(), &ev) {
					continue
				}
				events = append(events, ev)
				for _, v := range det.Observe(&ev) {
					if slices.ContainsFunc(blocked, func(p netip.Prefix) bool { return p.Overlaps(v.Source) }) || len(v.Spared) > 0 {
						continue
					}
					n := 0
					for _, e := range events {
						if v.Source.Contains(e.Source) && e.Kind == detector.Opened {
							n++
						}
					}
					opened[v.Source] = n
					blocked = append(blocked, v.Source)
					v.Evidence = slices.Clone(v.Evidence)
					blocks = append(blocks, Block{ID: uint64(len(blocks) + 1), Prefix: v.Source, Verdict: &v, Since: v.Time, Until: v.Time.Add(time.Hour)})
				}
			}
			if len(blocks) == 0 {
				t.Fatal("the detector sees no flood")
			}
			for _, b := range blocks {
				if b.Verdict.Opens != opened[b.Prefix] {
					t.Errorf("%s: the verdict says %d connections, the log until then %d", b.Prefix, b.Verdict.Opens, opened[b.Prefix])
				}
			}
			c := testConfig(t)
			c.Threshold.Connections, c.Threshold.Held = 1, 1
			b := newBench(t, c, Options{Logs: &logText{text: log, zone: time.UTC}})
			b.clock = blocks[len(blocks)-1].Since.Add(time.Hour)
			if err := b.Take(blocks...); err != nil {
				t.Fatal(err)
			}
			b.Work(t.Context())
			cs := b.Cases()
			networks := map[netip.Prefix]bool{}
			for _, b := range blocks {
				networks[provisional(b.Prefix)] = true
			}
			if len(cs) != len(networks) || k.nets != 0 && len(cs) != k.nets {
				t.Errorf("%d cases of %d networks", len(cs), len(networks))
			}
			for _, c := range cs {
				if c.State != Drafted {
					t.Errorf("%s is %s: %s", c.Network, c.State, c.Why)
					continue
				}
				f := &c.Mails[0].Facts
				if !f.FromLog {
					t.Error("no log line was found")
				}
				// The same count, by other means.
				want := 0
				kk := newCollector(&c)
				for _, e := range events {
					if (e.Kind == detector.Opened || e.Kind == detector.Refused) && kk.covers(e.Source) && !e.Time.Before(kk.from) && !e.Time.After(kk.to) {
						want++
					}
				}
				sum := 0
				for _, s := range f.Sources {
					sum += s.Connections
					if !slices.ContainsFunc(truth.Attackers, func(a string) bool { return netip.MustParseAddr(a) == s.Prefix.Addr() }) && !inAny(truth.AttackerPrefixes, s.Prefix.Addr()) {
						t.Errorf("%s is reported and is no attacker", s.Prefix)
					}
				}
				if f.Spared == 0 && (f.Connections != want || sum+f.More.Connections != want) {
					t.Errorf("%s: %d connections, the sources' sum is %d, the log has %d", c.Network, f.Connections, sum, want)
				}
				least := 0
				for _, r := range c.Blocks {
					least += r.Verdict.Opens
				}
				if f.Taken < least {
					t.Errorf("%s: %d took a place, fewer than the verdicts say (%d)", c.Network, f.Taken, least)
				}
				if n := countArchive(t, b, c); n < f.Connections {
					t.Errorf("%s: the archive has %d connections, the report %d", c.Network, n, f.Connections)
				}
				_, msg, err := b.Case(c.ID)
				if err != nil {
					t.Fatal(err)
				}
				for _, l := range truth.Legit {
					if mentions(t, msg, l) {
						t.Errorf("%s names the proper sender %s", c.Network, l)
					}
				}
			}
		})
	}
}

func inAny(ps []string, a netip.Addr) bool {
	return slices.ContainsFunc(ps, func(s string) bool { return pfx(s).Contains(a) })
}

func TestR13_Rates(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	_, ps := parts(t, msg)
	f := &c.Mails[0].Facts
	mean := fmt.Sprintf("%.1f per second mean over 20 seconds", float64(f.Connections)/f.Last.Sub(f.First).Seconds())
	// 100 ms apart: 10 a second of .23, every third of .41, and from the
	// 101st on one of .77 each.
	if text := flat(ps[0].text); !strings.Contains(text, mean) || !strings.Contains(text, "23.2 per second peak over 10 seconds") {
		t.Errorf("want %q and a peak with its window:\n%s", mean, ps[0].text)
	}
}

func TestR14_BaselineLimitClock(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	_, ps := parts(t, msg)
	for _, want := range []string{
		"Normal level 3 connections in the 3 days before, from the same sources",
		"Our limit a network: 15 % of all places, on average over 10 seconds, while the server is full",
		"Clock synchronised (kernel), error below 5 ms; all times are UTC",
	} {
		if !strings.Contains(flat(ps[0].text), want) {
			t.Errorf("%q is not in\n%s", want, ps[0].text)
		}
	}
	b = flooded(t, func(c *Config, o *Options, l *floodLog) {
		c.Baseline = 0
		o.Clock = func() string { return "unknown (the kernel does not say)" }
	})
	_, msg = b.approved()
	_, ps = parts(t, msg)
	for _, want := range []string{"Normal level not known", "Clock unknown"} {
		if !strings.Contains(flat(ps[0].text), want) {
			t.Errorf("%q is not in\n%s", want, ps[0].text)
		}
	}
	if Clock() == "" {
		t.Error("this machine's clock says nothing")
	}
}

func TestR15_Evidence(t *testing.T) {
	b := flooded(t, func(_ *Config, _ *Options, l *floodLog) {
		for i := range 250 {
			for range 3 {
				l.open(fmt.Sprintf("198.51.100.%d", i), 1000+i)
			}
		}
	})
	c, msg := b.approved()
	_, ps := parts(t, msg)
	ev := named(t, ps, "evidence.txt")
	if n := strings.Count(ev, "\n"); n == 0 || n > 50 || len(ev) > 16<<10 {
		t.Errorf("%d lines, %d bytes", n, len(ev))
	}
	f := &c.Mails[0].Facts
	for _, s := range f.Sources[:3] {
		for name, text := range map[string]string{"evidence.txt": ev, "the text": ps[0].text} {
			if !strings.Contains(text, "["+s.Prefix.Addr().String()+"]:") {
				t.Errorf("%s has no line of %s", name, s.Prefix.Addr())
			}
		}
	}
	if !strings.Contains(flat(ps[0].text), fmt.Sprintf("of %d lines, all in our archive", f.Lines)) || !strings.Contains(ps[0].text, c.Mails[0].Archive.SHA256) {
		t.Error("the archive is not named")
	}
}

// mentions looks for a word in every part of a mail, also in what is encoded
// inside the XARF.
func mentions(t *testing.T, msg []byte, word string) bool {
	h, ps := parts(t, msg)
	for _, vs := range h {
		for _, v := range vs {
			if strings.Contains(v, word) {
				return true
			}
		}
	}
	for _, p := range ps {
		if strings.Contains(p.text, word) {
			return true
		}
		if p.ctype == "application/json" {
			var x xarfReport
			if err := json.Unmarshal([]byte(p.text), &x); err != nil {
				t.Fatal(err)
			}
			for _, e := range x.Evidence {
				if strings.Contains(string(must(base64.StdEncoding.DecodeString(e.Payload))), word) {
					return true
				}
			}
		}
	}
	return false
}

func TestR16_Minimised(t *testing.T) {
	planted := []string{"planted-helo", "planted-ident", "planted-sender", "planted-rcpt", "planted-subject", "planted-user", "planted-host", "192.0.2.99", "1xVDVV-0002uK-37", "99887"}
	for _, format := range []Format{Mixed, XARF, XARF02, Text} {
		b := flooded(t, func(c *Config, _ *Options, l *floodLog) {
			c.Format = format
			for _, s := range []string{
				"[99887] SMTP connection from planted-host.example (planted-helo) [198.51.100.23]:20000 I=[203.0.113.25]:25 U=planted-ident lost D=3s",
				"SMTP connection from (planted-helo) [198.51.100.23]:20001 I=[203.0.113.25]:25 closed by QUIT",
				"SMTP connection from (planted-helo [192.0.2.99]) [198.51.100.41]:30000 I=[203.0.113.25]:25 lost",
				"H=(planted-helo) [198.51.100.23]:20000 F=<planted-sender@x.example> rejected RCPT <planted-rcpt@y.example>: relay not permitted",
				"plain authenticator failed for (planted-helo) [198.51.100.23]:20000: 535 Incorrect authentication data (set_id=planted-user)",
				`1xVDVV-0002uK-37 <= planted-sender@x.example H=planted-host [192.0.2.99]:5 P=esmtp S=1 T="planted-subject" for planted-rcpt@y.example`,
				"SMTP syntax error in \"planted-subject\" H=[198.51.100.23]:20000 NULL character(s) present (shown as '?')",
				"unexpected disconnection while reading SMTP command from planted-host (planted-helo) [198.51.100.23]:20003 I=[203.0.113.25]:25 D=1s",
			} {
				l.line("%s", s)
			}
		})
		c, msg := b.approved()
		for _, w := range planted {
			if mentions(t, msg, w) {
				t.Errorf("%s: %q is in the mail", format, w)
			}
		}
		if !strings.Contains(strings.Join(c.Mails[0].Warnings, "\n"), "left out of every line") {
			t.Error("the draft does not say what was left out")
		}
	}
}

func TestR17_Proof(t *testing.T) {
	const proof = "completed the TCP handshake"
	b := flooded(t, nil)
	_, msg := b.approved()
	if _, ps := parts(t, msg); !strings.Contains(flat(ps[0].text), proof) {
		t.Error("the proof is not there")
	}
	// Nothing that the mail server took, as when only the filter counted.
	b = flooded(t, func(c *Config, o *Options, _ *floodLog) { o.Logs = &logText{zone: time.UTC} })
	for _, c := range b.cases {
		c.Blocks[0].Verdict.Opens, c.Blocks[0].Verdict.Refused = 0, 0
	}
	_, msg = b.approved()
	if _, ps := parts(t, msg); strings.Contains(flat(ps[0].text), proof) {
		t.Error("a proof without a handshake")
	}
}

func TestR18_ASClaim(t *testing.T) {
	b := flooded(t, nil)
	_, msg := b.approved()
	_, ps := parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "Origin AS AS64500 for 198.51.100.0/24, RIPEstat network-info, queried 2026-11-22 19:41 UTC") || !strings.Contains(text, "you originate 198.51.100.0/24 in BGP") {
		t.Errorf("the claim is not there:\n%s", ps[0].text)
	}
	b = flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Lookup.Online = false })
	_, msg = b.drafted()
	_, ps = parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "by database GeoLite2-ASN of 20") || strings.Contains(text, "in BGP") {
		t.Errorf("a database is no announcement:\n%s", ps[0].text)
	}
	b = flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Lookup.Online, c.ASNDatabase = false, "" })
	_, msg = b.drafted()
	if _, ps = parts(t, msg); !strings.Contains(flat(ps[0].text), "Origin AS not looked up") {
		t.Errorf("it does not say that nobody was asked:\n%s", ps[0].text)
	}
	b = flooded(t, nil)
	b.lookups.fetch.close()
	moas := b
	moas.lookups.cache[netKey(RIPEstat, pfx("198.51.100.0/24"))] = &remembered{At: moas.time(), Claim: &Claim{Origins: []uint32{64500, 64511}, Prefix: pfx("198.51.100.0/24"), Announced: true, Source: "RIPEstat network-info", At: moas.time()}}
	c, msg := moas.drafted()
	if _, ps = parts(t, msg); !strings.Contains(flat(ps[0].text), "Several origins are named: AS64500, AS64511") || !c.Mails[0].Origin.Disputed {
		t.Errorf("several origins are not shown:\n%s", ps[0].text)
	}
}

func TestR19_Request(t *testing.T) {
	b := flooded(t, nil)
	c, msg := b.approved()
	_, ps := parts(t, msg)
	for _, want := range []string{"What we ask 1. Find the hosts behind these addresses and stop the traffic.", "Reply to this mail and keep [" + c.ID + "] in the subject.",
		"We blocked 198.51.100.0/24 on our mail ports from 2026-11-22 18:41:22 UTC (+00:00) until 2026-11-23 18:41:22 UTC (+00:00) (planned when this was drafted)."} {
		if !strings.Contains(flat(ps[0].text), want) {
			t.Errorf("%q is not in\n%s", want, ps[0].text)
		}
	}
	h, _ := parts(t, msg)
	if a, err := mail.ParseAddress(h.Get("Reply-To")); err != nil || a.Address != "abuse+"+c.Token+"@example.net" {
		t.Errorf("Reply-To %s", h.Get("Reply-To"))
	}
	// A block that is over is not offered to be lifted.
	b = flooded(t, nil)
	b.pass(30 * time.Hour)
	_, msg = b.drafted()
	_, ps = parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "until 2026-11-23 18:41:22 UTC (+00:00).") || strings.Contains(text, "lift it early") {
		t.Errorf("over:\n%s", ps[0].text)
	}
	// In observe mode nothing was blocked, and nothing else is said.
	b = newBench(t, testConfig(t), Options{})
	blk := blockOf(1, "198.51.100.0/24", testStart, 500, 0)
	blk.Observed = true
	if err := b.Take(blk); err != nil {
		t.Fatal(err)
	}
	_, msg = b.drafted()
	_, ps = parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "We have not blocked the sources.") || strings.Contains(text, "lift the block") {
		t.Errorf("observed:\n%s", ps[0].text)
	}
}

// schemas compiles the official schemas, core and connection/ddos.
func schemas(t *testing.T, assertFormat bool) (core, ddos *jsonschema.Schema) {
	t.Helper()
	c := jsonschema.NewCompiler()
	if assertFormat {
		c.AssertFormat()
	}
	for url, file := range map[string]string{
		"https://xarf.org/schemas/v4/xarf-core.json":             "xarf-core.json",
		"https://xarf.org/schemas/v4/types/connection-ddos.json": "types/connection-ddos.json",
	} {
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(must(os.ReadFile("../testdata/abuse/xarf/schemas/" + file))))
		if err == nil {
			err = c.AddResource(url, doc)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return must(c.Compile("https://xarf.org/schemas/v4/xarf-core.json")), must(c.Compile("https://xarf.org/schemas/v4/types/connection-ddos.json"))
}

func TestR20_XARF(t *testing.T) {
	valid := func(t *testing.T, text string) {
		t.Helper()
		for _, assert := range []bool{false, true} {
			core, ddos := schemas(t, assert)
			doc := must(jsonschema.UnmarshalJSON(strings.NewReader(text)))
			if err := core.Validate(doc); err != nil {
				t.Errorf("core (formats asserted: %v): %v", assert, err)
			}
			if err := ddos.Validate(doc); err != nil {
				t.Errorf("connection/ddos (formats asserted: %v): %v", assert, err)
			}
		}
		var x xarfReport
		var all map[string]any
		if err := json.Unmarshal([]byte(text), &x); err != nil {
			t.Fatal(err)
		}
		json.Unmarshal([]byte(text), &all)
		for _, k := range []string{"_internal", "peak_pps", "peak_bps"} {
			if _, ok := all[k]; ok {
				t.Errorf("%s is there", k)
			}
		}
		for _, e := range x.Evidence {
			raw := must(base64.StdEncoding.DecodeString(e.Payload))
			if sum := sha256.Sum256(raw); "sha256:"+hex.EncodeToString(sum[:]) != e.Hash || len(raw) != e.Size {
				t.Errorf("evidence %s: hash or size is wrong", e.ContentType)
			}
		}
	}
	// The schemas tell a bad one from a good one.
	_, ddos := schemas(t, true)
	if err := ddos.Validate(must(jsonschema.UnmarshalJSON(bytes.NewReader(must(os.ReadFile("../testdata/abuse/xarf/sample-connection-ddos.json")))))); err != nil {
		t.Fatalf("the official sample: %v", err)
	}
	if err := ddos.Validate(must(jsonschema.UnmarshalJSON(strings.NewReader(`{"xarf_version":"4.2.0"}`)))); err == nil {
		t.Fatal("the schema takes anything")
	}

	for _, format := range []Format{Mixed, XARF} {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.Format = format })
		_, msg := b.approved()
		_, ps := parts(t, msg)
		for _, p := range ps {
			if p.ctype == "application/json" {
				valid(t, p.text)
			}
		}
	}
	t.Run("IPv6", func(t *testing.T) {
		l := newFloodLog()
		for i := range 120 {
			l.line("SMTP connection from [2001:db8:bad::7]:%d I=[2001:db8::25]:25 (TCP/IP connection count = %d)", 1000+i, i)
		}
		b := newBench(t, testConfig(t), Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
		if err := b.Take(blockOf(1, "2001:db8:bad::7/128", testStart.Add(time.Second), 120, 0)); err != nil {
			t.Fatal(err)
		}
		_, msg := b.drafted()
		_, ps := parts(t, msg)
		valid(t, named(t, ps, "xarf.json"))
	})
	t.Run("detector alone", func(t *testing.T) {
		b := newBench(t, testConfig(t), Options{})
		if err := b.Take(blockOf(1, "198.51.100.23/32", testStart.Add(time.Second), 120, 7)); err != nil {
			t.Fatal(err)
		}
		_, msg := b.drafted()
		_, ps := parts(t, msg)
		valid(t, named(t, ps, "xarf.json"))
	})
	t.Run("no port", func(t *testing.T) {
		l := newFloodLog()
		for range 120 {
			l.line("SMTP connection from [198.51.100.23] (TCP/IP connection count = 1)")
		}
		for _, format := range []Format{Mixed, XARF} {
			c := testConfig(t)
			c.Format = format
			b := newBench(t, c, Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
			blk := blockOf(1, "198.51.100.23/32", testStart.Add(time.Second), 120, 0)
			blk.Verdict.Evidence = nil
			if err := b.Take(blk); err != nil {
				t.Fatal(err)
			}
			cs, msg := b.drafted()
			_, ps := parts(t, msg)
			for _, p := range ps {
				if p.ctype == "application/json" || p.ctype == "message/feedback-report" {
					t.Errorf("%s: a part %s without a port", format, p.ctype)
				}
			}
			if !strings.Contains(cs.Mails[0].Without, "incoming_port") || strings.Contains(ps[0].text, "xarf.json") {
				t.Errorf("it does not say why there is no XARF: %q", cs.Mails[0].Without)
			}
		}
	})
}

// TestOthers: what the full server refused to those who flood it too is no
// harm that the flood did.
func TestOthers(t *testing.T) {
	b := flooded(t, func(_ *Config, _ *Options, l *floodLog) {
		for i := range 7 {
			l.line("Connection from [203.0.113.%d]:99 I=[203.0.113.25]:25 refused: too many connections", i)
		}
	})
	b.Take(blockOf(2, "192.0.2.7/32", testStart, 5, 0)) // whose 99 were refused: another case, below the threshold
	b.Work(t.Context())
	cs := b.Cases()
	i := slices.IndexFunc(cs, func(c Case) bool { return c.State == Drafted })
	if f := cs[i].Mails[0].Facts; f.Others != 7 {
		t.Errorf("%d connections of others were refused, want 7", f.Others)
	}
}

// TestSparedLeaveNothing: of a proper sender in a blocked network there is
// nothing in counts, peak, and archive, whenever it turned out to be one.
func TestSparedLeaveNothing(t *testing.T) {
	const mail = "1xVDVV-0002uK-37 <= a@legit.example H=(legit.example) [198.51.100.200]:7 I=[203.0.113.25]:25 P=esmtp S=697"
	want := func() Facts {
		b := flooded(t, nil)
		c, _ := b.drafted()
		return c.Mails[0].Facts
	}()
	for name, when := range map[string]func(l *floodLog, before bool){
		"it delivers while it floods": func(l *floodLog, before bool) {
			if !before {
				l.line(mail)
			}
		},
		"it delivered days before": func(l *floodLog, before bool) {
			if before {
				l.line(mail)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := flooded(t, func(_ *Config, _ *Options, l *floodLog) {
				first := newFloodLog()
				first.at = testStart.Add(-2 * 24 * time.Hour)
				when(first, true)
				rest := l.b.String()
				l.b.Reset()
				l.b.WriteString(first.b.String() + rest)
				for i := range 40 {
					l.open("198.51.100.200", 7+i)
					l.line("SMTP connection from (planted) [198.51.100.200]:%d I=[203.0.113.25]:25 closed by QUIT", 7+i)
				}
				when(l, false)
			})
			c, _ := b.drafted()
			f := c.Mails[0].Facts
			if f.Spared != 1 || f.Lines != want.Lines || f.Peak != want.Peak || f.Connections != want.Connections {
				t.Errorf("spared %d, %d lines, peak %d, %d connections; want 1, %d, %d, %d", f.Spared, f.Lines, f.Peak, f.Connections, want.Lines, want.Peak, want.Connections)
			}
			if n := countArchive(t, b, c); n != want.Connections || c.Mails[0].Archive.Lines != want.Lines {
				t.Errorf("the archive has %d connections in %d lines, want %d in %d", n, c.Mails[0].Archive.Lines, want.Connections, want.Lines)
			}
			if left := must(filepath.Glob(filepath.Join(b.config.Dir, tempName))); len(left) != 0 {
				t.Errorf("%v stay", left)
			}
		})
	}
}

// TestMidnight: over midnight each time of the table has its day, and no line
// becomes too long for it.
func TestMidnight(t *testing.T) {
	night := time.Date(2026, 11, 22, 23, 59, 50, 0, time.UTC)
	for _, src := range []string{"198.51.100.23", "2001:db8:bad:1234:5678:9abc:def0:1234"} {
		l := newFloodLog()
		l.at = night
		for i := range 100 {
			l.open(src, 1000+i)
			l.at = l.at.Add(time.Second)
		}
		b := newBench(t, testConfig(t), Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
		b.clock = night.Add(time.Hour)
		a := netip.MustParseAddr(src)
		b.Take(blockOf(1, netip.PrefixFrom(a, a.BitLen()).String(), night.Add(15*time.Second), 150, 0))
		_, msg := b.drafted()
		_, ps := parts(t, msg)
		if !strings.Contains(flat(ps[0].text), src+" 1000 2026-11-22 23:59:50 2026-11-23 00:01:29 100") {
			t.Errorf("the days are not there:\n%s", ps[0].text)
		}
		// A log of whole seconds has no milliseconds to show.
		for _, part := range ps {
			if strings.Contains(part.text, ".000") {
				t.Errorf("%s has milliseconds that no log had:\n%s", part.name, part.text)
			}
		}
	}
	b := flooded(t, nil) // in this one they are
	_, msg := b.drafted()
	if _, ps := parts(t, msg); !strings.Contains(named(t, ps, "evidence.txt"), "18:41:07.100 +0000") || !strings.Contains(named(t, ps, "sources.csv"), "T18:41:07.100Z") {
		t.Error("the milliseconds are gone")
	}
}

// TestFollowUpCountsAnew: a follow-up tells of what came since the report, and
// its normal level is that before the flood.
func TestFollowUpCountsAnew(t *testing.T) {
	l := newFloodLog()
	l.at = testStart.Add(-3 * 24 * time.Hour)
	l.open("198.51.100.23", 1)
	l.at = testStart
	for i := range 300 {
		l.open("198.51.100.23", 1000+i)
	}
	src := &logText{text: l.b.String(), zone: time.UTC}
	b := newBench(t, testConfig(t), Options{Logs: src})
	b.Take(blockOf(1, "198.51.100.23/32", testStart.Add(time.Second), 300, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	must(b.Approve(d.ID, "root", Approval{}))
	must(b.Send(t.Context(), d.ID, "root", SendOptions{}))
	// It goes on for two days; no day is without a block.
	for range 2 {
		b.pass(20 * time.Hour)
		l.at = b.time()
		for i := range 70 {
			l.open("198.51.100.24", 5000+i)
		}
		b.Take(blockOf(b.Taken()+1, "198.51.100.24/32", l.at.Add(time.Second), 70, 0))
	}
	src.text = l.b.String()
	b.pass(time.Hour)
	c, msg := b.drafted()
	if len(c.Mails) != 2 {
		t.Fatalf("%d mails", len(c.Mails))
	}
	f := c.Mails[1].Facts
	if f.Connections != 140 || len(f.Sources) != 1 || f.Sources[0].Prefix != pfx("198.51.100.24/32") || f.First.Before(c.Mails[0].SentAt) {
		t.Errorf("%d connections of %d sources from %s", f.Connections, len(f.Sources), f.First)
	}
	if f.Baseline != 0 { // of .24; the first flood is not the normal level either
		t.Errorf("normal level %d", f.Baseline)
	}
	_, ps := parts(t, msg)
	for _, part := range ps {
		if strings.Contains(part.text, "198.51.100.23") {
			t.Errorf("%s tells of the first flood again:\n%s", part.name, part.text)
		}
	}
	if !strings.Contains(flat(ps[0].text), "The numbers are of what came since.") || !strings.Contains(flat(ps[0].text), "We blocked 198.51.100.24 on") {
		t.Errorf("%s", ps[0].text)
	}
	valid := named(t, ps, "xarf.json")
	if _, ddos := schemas(t, true); ddos.Validate(must(jsonschema.UnmarshalJSON(strings.NewReader(valid)))) != nil {
		t.Error("its XARF is not valid")
	}
}

// TestXARFFallback: without a valid XARF the mail is a mixed one, and its text
// speaks of what is in it.
func TestXARFFallback(t *testing.T) {
	l := newFloodLog()
	for i := range 120 {
		l.line("SMTP connection from [198.51.100.%d] (TCP/IP connection count = 1)", i%3)
	}
	c := testConfig(t)
	c.Format = XARF
	b := newBench(t, c, Options{Logs: &logText{text: l.b.String(), zone: time.UTC}})
	blk := blockOf(1, "198.51.100.0/24", testStart.Add(time.Second), 120, 0)
	b.Take(blk)
	_, msg := b.drafted()
	_, ps := parts(t, msg)
	if named(t, ps, "sources.csv") == "" || named(t, ps, "evidence.txt") == "" {
		t.Error("the files are not there")
	}
	if strings.Contains(ps[0].text, "xarf.json") || !strings.Contains(ps[0].text, "sources.csv") {
		t.Errorf("the text names other files than there are:\n%s", ps[0].text)
	}
}

// TestNames: names in other scripts are encoded as RFC 2047 says.
func TestNames(t *testing.T) {
	for _, name := range []string{"Müller Hosting GmbH", "示例邮件", "a\u202eb", strings.Repeat("ü", 200)} {
		b := flooded(t, func(c *Config, _ *Options, _ *floodLog) { c.From = `"` + name + `" <abuse@example.net>` })
		_, msg := b.approved()
		head, _, _ := strings.Cut(string(msg), "\r\n\r\n")
		h, _ := parts(t, msg)
		a, err := mail.ParseAddress(h.Get("From"))
		if err != nil {
			t.Fatalf("%q: %v", name, err)
		}
		if strings.ContainsFunc(head, func(r rune) bool { return r > '~' || r < ' ' && r != '\r' && r != '\n' }) || len(name) < 40 && !strings.HasPrefix(name, "a") && a.Name != name {
			t.Errorf("%q is %q in\n%s", name, a.Name, head)
		}
		if strings.Contains(a.Name, "\u202e") || len(a.Name) > 100 {
			t.Errorf("%q", a.Name)
		}
	}
}
