package abuse

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"net/mail"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// errKilled ends the process, as kill -9 does, in the midst of a step.
var errKilled = errors.New("killed")

// life is a desk under a random sequence of floods, persons, mails, kills and
// restarts, and what must be so whatever the order.
type life struct {
	*bench
	t              *testing.T
	r              *rand.Rand
	o              Options
	p              *pardons
	spare          []netip.Prefix
	world          *world // nil: nobody is asked
	nextID         uint64
	writes         int               // before it is killed; 0: it is not
	again          map[string]int    // by Message-ID: how often a person said that it did not leave
	edited         map[string]string // by Message-ID: the person's words
	seen           map[string]bool   // runs of the mail program
	left           map[string]int    // by Message-ID and recipient: how often it may have left
	ops            []string
	mailing, alone int // sent, and of these by itself: that something is proven
}

func writeText(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

const lifeTrial = "me@example.net"

func newLife(t *testing.T, seed int64, auto bool) *life {
	l := &life{t: t, r: rand.New(rand.NewSource(seed)), p: newPardons(), nextID: 1,
		again: map[string]int{}, edited: map[string]string{}, seen: map[string]bool{}, left: map[string]int{}}
	c := testConfig(t)
	c.Delivery.Program = fakeSendmail(t, `code=$(cat "$(dirname "$0")/code" 2>/dev/null || echo 0); echo $code >$n.code; exit $code`)
	if auto { // slower, for strangers are asked
		c.Mode = Auto
	}
	c.Auto = AutoSend{Connections: 1, Blocks: 1}
	c.Caps = Caps{Recipient: time.Hour, Hour: 5, Day: 20, Drafts: 20}
	c.Overrides = filepath.Join(t.TempDir(), "overrides")
	writeText(t, c.Overrides, "203.0.113.0/24 abuse@op.example\nAS64500 abuse@op2.example\n")
	if c.Mode == Auto { // who announces it is asked
		l.world = newWorld(t)
		l.world.plain()
		for i := range 90 {
			l.world.set(fmt.Sprintf("/stat/network-info/data.json?198.51.%d.%d", i/30, i%30), `{"data":{"asns":["64500"],"prefix":"198.51.0.0/16"}}`)
		}
		l.world.online(&c)
	}
	l.bench = newBench(t, c, Options{Refresh: l.p.refresh, Spare: func() []netip.Prefix { return l.spare }})
	l.o = Options{Config: c, Store: l.store, Refresh: l.p.refresh, Spare: func() []netip.Prefix { return l.spare }, Clock: l.Desk.o.Clock, Log: l.Desk.o.Log}
	l.store.fail = func(kind, _ string) error {
		if l.writes > 0 && (kind == kindCase || kind == kindMail || kind == kindState) {
			if l.writes--; l.writes == 0 {
				panic(errKilled)
			}
		}
		return nil
	}
	l.connect()
	return l
}

func (l *life) connect() {
	if l.world != nil {
		l.world.connect(l.lookups)
		l.forgive()
	}
}

// do runs a step that may be killed, and starts anew if it was.
func (l *life) do(what string, f func() error) {
	l.ops = append(l.ops, fmt.Sprintf("%s %s", l.time().Format("02 15:04"), what))
	killed := func() (killed bool) {
		defer func() {
			if e := recover(); e == errKilled {
				killed = true
			} else if e != nil {
				panic(e)
			}
		}()
		if err := f(); err != nil {
			l.ops = append(l.ops, "    "+err.Error())
		}
		return false
	}()
	l.writes = 0
	if killed {
		l.ops = append(l.ops, "    killed")
		l.restart()
	}
}

func (l *life) restart() {
	l.writes = 0
	d, err := newDesk(l.o, l.time, true)
	if err != nil {
		l.t.Fatal(err)
	}
	l.Desk = d
	l.connect()
}

// state is all cases as JSON.
func (l *life) state() string {
	s := ""
	for _, c := range l.Cases() {
		for i := range c.Mails {
			c.Mails[i].Outdated = false // also where settings have changed
		}
		s += string(must(json.Marshal(c))) + "\n"
	}
	return s
}

func (l *life) pick(states ...State) (c Case, ok bool) {
	all := slices.DeleteFunc(l.Cases(), func(c Case) bool { return !slices.Contains(states, c.State) })
	if len(all) == 0 {
		return c, false
	}
	return all[l.r.Intn(len(all))], true
}

func (l *life) step() {
	ctx := l.t.Context()
	if l.r.Intn(5) == 0 {
		l.writes = 1 + l.r.Intn(4)
	}
	code := []string{"0", "0", "0", "0", "1", "64"}[l.r.Intn(6)]
	writeText(l.t, filepath.Join(filepath.Dir(l.config.Delivery.Program), "code"), code)
	if l.r.Intn(20) == 0 {
		l.Desk.step = func(s string) {
			if l.r.Intn(2) == 0 {
				panic(errKilled)
			}
		}
	}
	every := []State{Gathering, Held, Drafted, Approved, Queued, Sent, Doubtful, Delivered, Deferred, Bounced, Acknowledged, Answered, Closed, Withdrawn}
	switch []int{0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 9, 9, 10, 10, 10, 10, 10, 11, 11, 11, 12, 13, 14, 14, 15}[l.r.Intn(28)] {
	case 0, 1, 2:
		p := fmt.Sprintf([]string{"198.51.%d.%d/32", "203.0.113.%[2]d/32", "192.0.2.%[2]d/32"}[l.r.Intn(3)], l.r.Intn(3), l.r.Intn(30))
		b := blockOf(l.nextID, p, l.time(), 100+l.r.Intn(200), l.r.Intn(20))
		b.Until = b.Since.Add(time.Duration(1+l.r.Intn(48)) * time.Hour)
		l.nextID++
		l.p.blocks[b.ID] = b
		l.do("block "+p, func() error { return l.Take(b) })
		if err := l.Take(b); err != nil { // given again, as after an error
			l.t.Fatal(err)
		}
	case 3:
		if l.nextID > 1 {
			id := 1 + uint64(l.r.Intn(int(l.nextID-1)))
			if !l.time().Before(l.p.blocks[id].Until) {
				return // it is over, and nobody can lift it
			}
			l.p.lifted[id] = true
			l.ops = append(l.ops, fmt.Sprintf("pardon %d %s", id, l.p.blocks[id].Prefix))
		}
	case 4:
		if len(l.spare) > 0 && l.r.Intn(3) > 0 {
			l.spare = nil
		} else {
			l.spare = append(l.spare, pfx(fmt.Sprintf("198.51.%d.%d/32", l.r.Intn(3), l.r.Intn(30))))
		}
		l.ops = append(l.ops, fmt.Sprint("allowed are ", l.spare))
	case 5:
		l.pass(time.Duration(1+l.r.Intn(150)) * time.Minute)
		l.do("work", func() error { l.Work(ctx); return nil })
	case 9:
		c, ok := l.pick(Drafted, Approved, Bounced)
		if !ok {
			return
		}
		words := fmt.Sprintf("Words of a person, number %d.", l.r.Int63())
		to := fmt.Sprintf("chosen%d@desk.example", l.r.Intn(4))
		e := Edit{Text: &words}
		if l.r.Intn(2) == 0 {
			e = Edit{To: &to}
		}
		l.do("edit "+c.ID, func() error {
			got, err := l.Edit(ctx, c.ID, "root", e)
			if err == nil && e.Text != nil {
				l.edited[got.mail().MessageID] = words
			}
			return err
		})
	case 10:
		if c, ok := l.pick(Drafted); ok {
			l.do("approve "+c.ID, func() error { _, err := l.showAndApprove(c.ID, "root", Approval{}); return err })
		}
	case 11:
		if c, ok := l.pick(Approved, Doubtful); ok {
			o := []SendOptions{{}, {To: lifeTrial}, {Again: true}}[l.r.Intn(3)]
			if o.Again && c.State == Doubtful {
				l.again[c.mail().MessageID]++
			}
			l.do(fmt.Sprintf("send %s %+v", c.ID, o), func() error { _, err := l.Send(ctx, c.ID, "root", o); return err })
		}
	case 12:
		if c, ok := l.pick(every...); ok && l.r.Intn(3) == 0 {
			l.do("withdraw "+c.ID, func() error { _, err := l.Withdraw(c.ID, "root", ""); return err })
		}
	case 13:
		if c, ok := l.pick(Closed, Withdrawn); ok {
			l.do("reopen "+c.ID, func() error { _, err := l.Reopen(c.ID, "root"); return err })
		} else if c, ok := l.pick(Sent, Drafted); ok {
			l.do("close "+c.ID, func() error { _, err := l.CloseCase(c.ID, "root", ""); return err })
		}
	case 14:
		if c, ok := l.pick(Sent, Doubtful, Deferred); ok {
			m := c.mail()
			msg := dsn(m.Return, []string{"failed", "delivered", "delayed"}[l.r.Intn(3)], "5.1.1", m.To.Address, m.MessageID)
			l.do("notice for "+c.ID, func() error { _, err := l.Receive(strings.NewReader(msg), "root"); return err })
		}
	case 15:
		was := l.state()
		l.ops = append(l.ops, "restart")
		l.restart()
		if now := l.state(); now != was && !strings.Contains(was, `"state":"queued"`) {
			l.t.Errorf("a restart changed\n%s\ninto\n%s", was, now)
		}
	}
	l.Desk.step, l.writes = func(string) {}, 0
	l.check()
}

var caseInSubject = regexp.MustCompile(`\[(SG-[0-9]{8}-[0-9A-F]{6})\]`)

// check looks at the mails that have left since, and at the cases.
func (l *life) check() {
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(l.config.Delivery.Program), "got.*.code"))
	for _, f := range files {
		if l.seen[f] {
			continue
		}
		l.seen[f] = true
		code := strings.TrimSpace(string(must(os.ReadFile(f))))
		head, msg, _ := strings.Cut(string(must(os.ReadFile(strings.TrimSuffix(f, ".code")))), "\n\n")
		m, err := mail.ReadMessage(strings.NewReader(msg))
		if err != nil {
			l.t.Fatal(err)
		}
		rcpt := strings.Split(head, "\n")[4:]
		if m.Header.Get(trialHeader) != "" {
			if !slices.Equal(rcpt, []string{lifeTrial}) {
				l.t.Errorf("a trial went to %q", rcpt)
			}
			continue
		}
		l.mailing++
		id := strings.Trim(m.Header.Get("Message-Id"), "<>")
		if code != "64" {
			for _, r := range rcpt {
				if l.left[id+r]++; l.left[id+r] > 1+l.again[id] {
					l.t.Errorf("%s went to %s %d times; a person said %d times that it did not leave", id, r, l.left[id+r], l.again[id])
				}
			}
		}
		found := caseInSubject.FindStringSubmatch(strings.Join(strings.Fields(m.Header.Get("Subject")), " "))
		if found == nil {
			l.t.Errorf("no case in %q", m.Header.Get("Subject"))
			continue
		}
		c, _, err := l.Case(found[1])
		if err != nil {
			l.t.Fatal(err)
		}
		i := slices.IndexFunc(c.Mails, func(m Mail) bool { return m.MessageID == id })
		if i < 0 {
			l.t.Errorf("%s is of no mail of %s", id, c.ID)
			continue
		}
		mm := &c.Mails[i]
		auto := m.Header.Get("Auto-Submitted") != ""
		if auto {
			l.alone++
		}
		if auto && (mm.Hand != "" || l.config.Mode != Auto) {
			l.t.Errorf("%s was sent by itself, though it is in the hand of %q", c.ID, mm.Hand)
		}
		if words := l.edited[id]; words != "" && !strings.Contains(msg, words) {
			l.t.Errorf("%s was sent without the words of a person", c.ID)
		}
		told := c.of(mm)
		for _, p := range told.prefixes() {
			for _, s := range l.spare {
				if s.Overlaps(p) {
					l.t.Errorf("%s was sent though %s is allowed", c.ID, s)
				}
			}
		}
		if w := l.withdrawal(&c); auto && w != nil {
			l.t.Errorf("%s was sent by itself: %s", c.ID, w)
		}
		n := 0
		for _, r := range told.live() {
			n += r.Verdict.Opens + r.Verdict.Refused
			if l.p.lifted[r.ID] {
				l.t.Errorf("%s tells of block %d, which was lifted by an operator", c.ID, r.ID)
			}
		}
		if mm.Facts.Connections != n {
			l.t.Errorf("%s says %d connections, its blocks %d", c.ID, mm.Facts.Connections, n)
		}
	}
	for _, c := range l.Cases() {
		if c.State == Queued {
			l.t.Errorf("%s is under way, and nobody sends it", c.ID)
		}
		if c.State == Held && c.Why == "" {
			l.t.Errorf("%s is held, and nobody knows why", c.ID)
		}
		ids := map[uint64]bool{}
		for _, r := range c.Blocks {
			if ids[r.ID] {
				l.t.Errorf("%s has block %d twice", c.ID, r.ID)
			}
			ids[r.ID] = true
		}
	}
	if !l.t.Failed() {
		return
	}
	for _, o := range l.ops {
		l.t.Log(o)
	}
	for _, c := range l.Cases() {
		l.t.Logf("%s %s %s, %d mails: %s", c.ID, c.Network, c.State, len(c.Mails), c.Why)
		for _, h := range c.History {
			l.t.Logf("    %s %s -> %s by %s: %s", h.Time.Format("02 15:04"), h.From, h.To, h.By, h.Note)
		}
	}
	l.t.FailNow()
}

// settle lets time pass in peace: what is approved has gone then, and what
// waits says for what.
func (l *life) settled() {
	l.spare, l.writes = nil, 0
	writeText(l.t, filepath.Join(filepath.Dir(l.config.Delivery.Program), "code"), "0")
	for range 40 {
		l.pass(3 * time.Hour)
		l.do("work", func() error { l.Work(l.t.Context()); return nil })
		l.check()
	}
	for _, c := range l.Cases() {
		over := c.Connections >= l.config.Threshold.Connections || c.Held >= l.config.Threshold.Held
		switch {
		case c.State == Approved:
			l.t.Errorf("%s is approved and does not leave: %s", c.ID, c.Why)
		case c.State == Gathering && over && c.alive() && c.MergedInto == "":
			l.t.Errorf("%s is over the threshold and gets no draft: %s", c.ID, c.Why)
		case c.State == Drafted && l.config.Mode == Auto && c.Why == "":
			l.t.Errorf("%s is a draft in mode auto, and nobody knows why", c.ID)
		}
	}
	l.check()
}

// TestLife: no mail twice, none that a person does not want, no person's words
// lost, no case stuck, whatever happens in whatever order.
func TestLife(t *testing.T) {
	lives, steps := 10, 150
	if testing.Short() {
		lives = 4
	}
	sent, alone := 0, 0
	for i := range lives {
		seed := time.Now().UnixNano() + int64(i)
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			l := newLife(t, seed, i == 0)
			for range steps / map[bool]int{true: 3, false: 1}[i == 0] {
				l.step()
			}
			l.settled()
			sent, alone = sent+l.mailing, alone+l.alone
		})
	}
	if sent < 2*lives {
		t.Errorf("%d mails were sent in %d lives: they prove little", sent, lives)
	}
	t.Logf("%d mails in %d lives, %d by itself", sent, lives, alone)
}
