package hook

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/mail"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// block is the n-th block of a flood.
func block(n int) Event {
	return Event{On: Block, Time: time.Now(), Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, byte(n >> 8), byte(n)}), 32),
		Rule: "hog", Score: 0.31, Until: time.Now().Add(time.Hour), Why: "it kept 31 % of the slots"}
}

// listener is a hook's other end.
type listener struct {
	mu    sync.Mutex
	start time.Time
	got   []Message
	err   error
	stuck bool
}

func (l *listener) send(ctx context.Context, m *Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.stuck {
		l.mu.Unlock()
		<-ctx.Done()
		l.mu.Lock()
		return ctx.Err()
	}
	l.got = append(l.got, *m)
	return l.err
}

func (l *listener) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

// messages are what came, as "TIME TOTAL subject".
func (l *listener) messages() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var s []string
	for _, m := range l.got {
		s = append(s, fmt.Sprintf("%s %d %s", m.Time.Sub(l.start), m.Total, m.Subject))
	}
	return s
}

func (l *listener) want(t *testing.T, want ...string) {
	t.Helper()
	if got := l.messages(); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("told:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// hooked runs one hook in the time of the test.
func hooked(t *testing.T, c Config, o Options) (h *Hooks, l *listener, stop func()) {
	t.Helper()
	l = &listener{start: time.Now().UTC()}
	c.Mail = "root"
	h = New([]Config{c}, o)
	h.hooks[0].send = l.send
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); h.Run(ctx) }()
	synctest.Wait()
	return h, l, func() { cancel(); <-done }
}

var everyMinute = Config{On: []string{Block, Saturated, Relieved, Fault}, Every: time.Minute, Timeout: 10 * time.Second}

// The first is told at once, the rest of the flood once a minute.
func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l, stop := hooked(t, everyMinute, Options{})
		h.Tell(block(1))
		h.Tell(Event{On: Unblock, Time: time.Now()}) // not for this hook
		time.Sleep(time.Second)
		for i := range 10_000 {
			h.Tell(block(i))
		}
		h.hooks[0].mu.Lock()
		if n := len(h.hooks[0].pending.events); n != eventsMost {
			t.Errorf("%d events are kept", n)
		}
		h.hooks[0].mu.Unlock()
		time.Sleep(4 * time.Minute)
		h.Tell(block(2))
		time.Sleep(time.Second)
		until := l.start.Add(time.Hour).Local().Format("2006-01-02 15:04 MST")
		later := l.start.Add(4*time.Minute + time.Second + time.Hour).Local().Format("2006-01-02 15:04 MST")
		l.want(t, "500ms 1 198.51.0.1 is blocked until "+until,
			"1m0.5s 10000 10000 sources blocked",
			"4m1.5s 1 198.51.0.2 is blocked until "+later)
		m := l.got[1]
		if len(m.Events) != eventsMost || m.LeftOut != 10_000-eventsMost || m.Counts[Block] != 10_000 || !strings.Contains(m.body(), "and 9980 more: 10000 block in all") {
			t.Errorf("%d events, %d left out\n%s", len(m.Events), m.LeftOut, m.body())
		}
		if s := h.Status()[0]; s.Events != 10_002 || s.Told != 10_002 || s.Waiting != 0 || s.Sent != 3 || s.Failed != 0 {
			t.Errorf("%+v", s)
		}
		stop()
	})
}

// No hook without a name gets another's: metrics and status go by names.
func TestNames(t *testing.T) {
	var got []string
	for _, s := range New([]Config{{Mail: "a"}, {Mail: "b"}, {Name: "hook2", Mail: "c"}, {Name: "hook2-2", Mail: "d"}, {Mail: "e"}}, Options{}).Status() {
		got = append(got, s.Name)
	}
	if got := strings.Join(got, " "); got != "hook1 hook2-3 hook2 hook2-2 hook5" {
		t.Errorf("the names are %s", got)
	}
}

// What happens together is told together; the newest word on whether the
// server is full is never left out.
func TestSubject(t *testing.T) {
	full := Event{On: Saturated, Taken: 100, Capacity: 100, Seconds: 10}
	free := Event{On: Relieved, Taken: 40, Capacity: 100, Seconds: 23.4}
	observed := block(9)
	observed.Observed = true
	one := block(9)
	one.Until = time.Time{}
	many := []Event{full}
	for i := range 30 {
		many = append(many, block(i))
	}
	for _, c := range []struct {
		name   string
		events []Event
		want   string
	}{
		{"full", []Event{full}, "the mail server is full, 100 of 100 slots taken"},
		{"free", []Event{free}, "mail flows again after 23s"},
		{"one", []Event{one}, "198.51.0.9 is blocked"},
		{"flood", []Event{full, block(1), block(2), free}, "the mail server was full for 23s, mail flows again, 2 sources blocked"},
		{"again", []Event{full, free, full}, "the mail server is full, 100 of 100 slots taken"},
		{"twice", []Event{full, free, full, free}, "the mail server was full 2 times, mail flows again"},
		{"observed", []Event{observed, observed}, "2 sources would be blocked (mode observe)"},
		{"late", append(many, free), "the mail server was full for 23s, mail flows again, 30 sources blocked"},
		{"all", []Event{{On: Fault}, {On: Tamper, Count: 2}, {On: Refuse}, {On: Spare}, {On: Unblock, Count: 700}, {On: Expire}, {On: Report, Report: "R1", State: "draft"}},
			"1 problem of smtpguard's own, our firewall rules changed 2 times, 1 block refused by the gate, 1 network spared, 700 blocks lifted, 1 block run out, 1 report moved on"},
		{"report", []Event{{On: Report, Report: "R1", State: "draft"}}, "abuse report R1 waits for approval"},
		{"report held", []Event{{On: Report, Report: "R1", State: "held"}}, "abuse report R1 is held"},
		{"fault", []Event{{On: Fault, Why: "the disk: \n\nno space"}}, "smtpguard has a problem"},
		{"hostile", []Event{{On: Report, Report: "R1\nBcc: all", State: "sent"}}, "abuse report R1uaBccall was sent"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b batch
			for _, e := range c.events {
				e.wash()
				b.add(e)
			}
			if s := b.subject(); s != c.want {
				t.Errorf("got %q, want %q", s, c.want)
			}
			if b.total != len(b.events)+b.left {
				t.Errorf("%d in all, %d kept, %d left out", b.total, len(b.events), b.left)
			}
			if c.name == "late" && b.events[len(b.events)-1].On != Relieved {
				t.Errorf("the relief is left out")
			}
		})
	}
}

// A hook that fails is tried less and less often with the same message; one
// fault is told; nothing is lost.
func TestFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var faults []string
		o := Options{Fault: func(_ context.Context, what string, err error) { faults = append(faults, what+": "+err.Error()) }}
		c := everyMinute
		c.Name = "ops"
		h, l, stop := hooked(t, c, o)
		l.fail(errors.New("no\x1b[2J route"))
		h.Tell(Event{On: Fault, Why: "a"})
		time.Sleep(10 * time.Minute)
		h.Tell(Event{On: Fault, Why: "b"})
		if s := h.Status()[0]; s.Error != `no\u{1b}[2J route` || s.Failed != 4 || s.Waiting != 2 || s.Since.IsZero() {
			t.Errorf("%+v", s)
		}
		l.fail(nil)
		time.Sleep(10 * time.Minute)
		l.want(t, "500ms 1 smtpguard has a problem", "500ms 1 smtpguard has a problem", "500ms 1 smtpguard has a problem", "500ms 1 smtpguard has a problem",
			"500ms 1 smtpguard has a problem", "16m0.5s 1 smtpguard has a problem")
		for i, m := range l.got[:5] {
			if m.ID != l.got[0].ID {
				t.Errorf("try %d has another ID", i)
			}
		}
		if l.got[5].ID == l.got[0].ID || l.got[5].Events[0].Why != "b" {
			t.Errorf("%+v", l.got[5])
		}
		if want := `the hook ops fails, and is tried again: no\u{1b}[2J route`; len(faults) != 1 || faults[0] != want {
			t.Errorf("%q", faults)
		}
		if s := h.Status()[0]; s.Error != "" || s.Waiting != 0 || !s.Since.IsZero() {
			t.Errorf("%+v", s)
		}
		stop()
	})
}

// At the end, what waits is told without waiting for its time.
func TestEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l, stop := hooked(t, everyMinute, Options{})
		h.Tell(Event{On: Fault})
		time.Sleep(time.Second)
		h.Tell(Event{On: Saturated})
		h.Tell(Event{On: Fault})
		stop()
		l.want(t, "500ms 1 smtpguard has a problem", "1s 2 the mail server is full, 0 of 0 slots taken, 1 problem of smtpguard's own")
	})
}

// One that is stuck is not waited for longer than the grace.
func TestEndOfStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := everyMinute
		c.Timeout = time.Hour
		h, l, stop := hooked(t, c, Options{})
		l.stuck = true
		h.Tell(Event{On: Fault})
		time.Sleep(time.Second)
		start := time.Now()
		stop()
		if d := time.Since(start); d != grace {
			t.Errorf("it took %s", d)
		}
		if s := h.Status()[0]; s.Waiting != 1 {
			t.Errorf("%+v", s)
		}
	})
}

func TestLateIsSaid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, l, stop := hooked(t, everyMinute, Options{})
		l.stuck = true
		h.Tell(Event{On: Fault})
		time.Sleep(30 * time.Second)
		if s := h.Status()[0]; !strings.HasPrefix(s.Error, "it took longer than 10s") {
			t.Errorf("%+v", s)
		}
		stop()
	})
}

func schema(t testing.TB) *jsonschema.Schema {
	t.Helper()
	s, err := jsonschema.NewCompiler().Compile("../docs/hook-message.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func valid(t testing.TB, s *jsonschema.Schema, m *Message) {
	t.Helper()
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Validate(v); err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
}

// Whatever strangers write into an event: the message has the documented
// form, the mail's header is ours alone, and nothing moves a cursor.
func FuzzMessage(f *testing.F) {
	s := schema(f)
	f.Add("HELO [127.0.0.1]\r\nBcc: all@example.net\r\n\r\n.\r\n", "root\x1b[2J", "R1", "draft", 7)
	f.Add(strings.Repeat("é\x00\xff\u202e\\", 1000), "", "", "", -1)
	f.Fuzz(func(t *testing.T, why, by, report, state string, n int) {
		n %= 1_000_000
		h := New([]Config{{Name: "h", Mail: "root", On: kinds}}, Options{Version: "1"})
		for i := range min(max(n, 1), 30) {
			h.Tell(Event{On: kinds[i%len(kinds)], Time: time.Unix(1, 0), Count: n, Why: why, By: by, Rule: by, Report: report, State: state})
		}
		m := h.take(h.hooks[0])
		valid(t, s, m)
		msg := (&mailer{c: h.hooks[0].c}).mail(m)
		parsed, err := mail.ReadMessage(bytes.NewReader(msg))
		if err != nil {
			t.Fatal(err)
		}
		if len(parsed.Header) != 8 || parsed.Header.Get("To") != "root" || len(parsed.Header.Get("Subject")) > subjectMost {
			t.Fatalf("header: %v", parsed.Header)
		}
		for line := range strings.SplitSeq(string(msg), "\n") {
			if strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) || len(line) > 990 {
				t.Fatalf("line: %q", line)
			}
		}
		if len(msg) > 40_000 {
			t.Fatalf("%d bytes", len(msg))
		}
	})
}
