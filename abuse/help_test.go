package abuse

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// memStore is a Store in memory. fail, if set, is asked before each write.
type memStore struct {
	mu   sync.Mutex
	m    map[string][]byte
	fail func(kind, key string) error
}

func newMemStore() *memStore { return &memStore{m: map[string][]byte{}} }

func (s *memStore) SetRecord(kind, key string, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		if err := s.fail(kind, key); err != nil {
			return err
		}
	}
	s.m[kind+"\x00"+key] = bytes.Clone(value)
	return nil
}

func (s *memStore) Record(kind, key string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return bytes.Clone(s.m[kind+"\x00"+key]), nil
}

func (s *memStore) Records(kind string, fn func(string, []byte) bool) error {
	s.mu.Lock()
	keys := slices.Sorted(maps.Keys(s.m))
	s.mu.Unlock()
	for _, k := range keys {
		if key, ok := strings.CutPrefix(k, kind+"\x00"); ok {
			v, _ := s.Record(kind, key)
			if !fn(key, v) {
				return nil
			}
		}
	}
	return nil
}

// keys are the keys of all records of a kind.
func (s *memStore) keys(kind string) (keys []string) {
	s.Records(kind, func(key string, _ []byte) bool { keys = append(keys, key); return true })
	return keys
}

func (s *memStore) DropRecord(kind, key string) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.m[kind+"\x00"+key]
	delete(s.m, kind+"\x00"+key)
	return ok, nil
}

// logText is Logs of a text.
type logText struct {
	text string
	zone *time.Location
	err  error
	n    int // scans
}

func (l *logText) Scan(ctx context.Context, from, to time.Time, fn func(*detector.Event, []byte) error) (reach time.Time, err error) {
	l.n++
	if l.err != nil {
		return reach, l.err
	}
	p := exim.New(l.zone)
	sc := bufio.NewScanner(strings.NewReader(l.text))
	sc.Buffer(nil, 1<<20)
	var ev detector.Event
	for sc.Scan() {
		if !p.Parse(sc.Bytes(), &ev) {
			continue
		}
		if reach.IsZero() {
			reach = ev.Time
		}
		if ev.Time.Before(from) || ev.Time.After(to) {
			continue
		}
		if err := fn(&ev, sc.Bytes()); err != nil {
			return reach, err
		}
	}
	return reach, sc.Err()
}

// bench is a desk with everything around it under the test's hand.
type bench struct {
	*Desk
	t     *testing.T
	store *memStore
	mu    sync.Mutex
	clock time.Time
}

func (b *bench) time() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.clock
}

func (b *bench) pass(d time.Duration) {
	b.mu.Lock()
	b.clock = b.clock.Add(d)
	b.mu.Unlock()
}

var testStart = time.Date(2026, 11, 22, 18, 41, 7, 0, time.UTC)

// testConfig sends through a program that keeps what it gets, asks nobody,
// and takes reserved networks, of which all test data is made.
func testConfig(t *testing.T) Config {
	c := DefaultConfig()
	c.From = "Example Mail abuse desk <abuse@example.net>"
	c.Org, c.Phone, c.Host = "Example Mail Ltd", "+1-555-0100", "mx1.example.net"
	c.ReturnPath = "abuse+{token}@example.net"
	c.Dir = filepath.Join(t.TempDir(), "reports")
	c.Lookup.Online = false
	c.Delivery.Program = fakeSendmail(t, "")
	return c
}

// fakeSendmail is a program that keeps its arguments and its input, each run
// in a file of its own, and does what extra says.
func fakeSendmail(t *testing.T, extra string) string {
	dir := t.TempDir()
	path := filepath.Join(dir, "sendmail")
	script := "#!/bin/sh\nn=$(mktemp " + dir + "/got.XXXXXX)\n{ for a in \"$@\"; do printf '%s\\n' \"$a\"; done; echo; cat; } >$n\n" + extra + "\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

type sentMail struct {
	args []string
	msg  string
}

// sent are the runs of the fake sendmail.
func (b *bench) sent() []sentMail {
	b.t.Helper()
	files, _ := filepath.Glob(filepath.Join(filepath.Dir(b.config.Delivery.Program), "got.*"))
	var all []sentMail
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			b.t.Fatal(err)
		}
		head, msg, _ := strings.Cut(string(text), "\n\n")
		all = append(all, sentMail{strings.Split(head, "\n"), msg})
	}
	return all
}

// own takes trial's place: reserved networks are all that tests may use, so
// the check for them is turned off, not redirected.
func newBench(t *testing.T, c Config, o Options) *bench {
	t.Helper()
	b := &bench{t: t, clock: testStart.Add(time.Hour)}
	if o.Store == nil {
		b.store = newMemStore()
		o.Store = b.store
	} else {
		b.store, _ = o.Store.(*memStore)
	}
	o.Config = c
	if o.Clock == nil {
		o.Clock = func() string { return "synchronised (kernel), error below 5 ms" }
	}
	if testing.Verbose() {
		o.Log = slog.New(slog.NewTextHandler(&testWriter{t: t}, nil))
	}
	was := reserved
	reserved = prefixList("127.0.0.0/8 192.168.0.0/16 fe80::/10")
	t.Cleanup(func() { reserved = was })
	d, err := newDesk(o, b.time, true)
	if err != nil {
		t.Fatal(err)
	}
	b.Desk = d
	t.Cleanup(d.Close)
	return b
}

type testWriter struct{ t *testing.T }

func (w *testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimSpace(string(p)))
	return len(p), nil
}

// contact gives the draft of a case a recipient.
func (b *bench) contact(id, to string) {
	b.t.Helper()
	if _, err := b.Edit(b.t.Context(), id, "root (uid 0)", Edit{To: &to}); err != nil {
		b.t.Fatal(err)
	}
}

// Approve is what a person does who looks at the draft first.
func (b *bench) Approve(id, by string, a Approval) (Case, error) { return b.showAndApprove(id, by, a) }

func (d *Desk) showAndApprove(id, by string, a Approval) (Case, error) {
	if _, _, err := d.Show(id, by); err != nil {
		return Case{}, err
	}
	return d.Approve(id, by, a)
}

// only is the one case there is.
func (b *bench) only() Case {
	b.t.Helper()
	cs := b.Cases()
	if len(cs) != 1 {
		b.t.Fatalf("%d cases, want 1: %+v", len(cs), cs)
	}
	return cs[0]
}

// draft is the one case, drafted, with its message.
func (b *bench) drafted() (Case, []byte) {
	b.t.Helper()
	b.Work(b.t.Context())
	c := b.only()
	if c.State != Drafted {
		b.t.Fatalf("the case is %s (%s), want a draft", c.State, c.Why)
	}
	_, msg, err := b.Case(c.ID)
	if err != nil || msg == nil {
		b.t.Fatal("no message", err)
	}
	return c, msg
}

// part is a decoded part of a mail.
type part struct {
	ctype, name, text string
}

// parts reads a mail as a receiver does.
func parts(t *testing.T, msg []byte) (mail.Header, []part) {
	t.Helper()
	m, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		t.Fatal(err)
	}
	ctype, params, err := mime.ParseMediaType(m.Header.Get("Content-Type"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(ctype, "multipart/") {
		b, _ := io.ReadAll(m.Body)
		return m.Header, []part{{ctype, "", string(b)}}
	}
	var all []part
	mr := multipart.NewReader(m.Body, params["boundary"])
	for {
		p, err := mr.NextRawPart()
		if errors.Is(err, io.EOF) {
			return m.Header, all
		}
		if err != nil {
			t.Fatal(err)
		}
		var r io.Reader = p
		switch p.Header.Get("Content-Transfer-Encoding") {
		case "quoted-printable":
			r = quotedprintable.NewReader(p)
		case "base64":
			r = base64.NewDecoder(base64.StdEncoding, p)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		ct, _, _ := mime.ParseMediaType(p.Header.Get("Content-Type"))
		all = append(all, part{ct, p.FileName(), string(b)})
	}
}

func named(t *testing.T, ps []part, name string) string {
	t.Helper()
	for _, p := range ps {
		if p.name == name {
			return p.text
		}
	}
	t.Fatalf("there is no part %q", name)
	return ""
}

// flat is text with every run of blanks made one, to look for sentences.
func flat(s string) string { return strings.Join(strings.Fields(s), " ") }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func pfx(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// floodLog writes a main log in which sources open connections: each n of
// them, one a second each, with the extras that a selector adds.
type floodLog struct {
	b    strings.Builder
	at   time.Time
	zone *time.Location
	n    int
}

func newFloodLog() *floodLog { return &floodLog{at: testStart, zone: time.UTC} }

func (l *floodLog) line(format string, args ...any) {
	fmt.Fprintf(&l.b, "%s %s\n", l.at.In(l.zone).Format("2006-01-02 15:04:05.000"), fmt.Sprintf(format, args...))
}

func (l *floodLog) open(src string, port int) {
	l.n++
	l.line("SMTP connection from [%s]:%d I=[203.0.113.25]:25 (TCP/IP connection count = %d)", src, port, min(l.n, 100))
}

// blockOf makes a block as the guard would, of a verdict on a prefix.
func blockOf(id uint64, p string, at time.Time, opens, refused int) Block {
	v := &detector.Verdict{
		Time: at, Source: pfx(p), Rule: "hog", Metric: detector.Saturation, Window: 10 * time.Second,
		Score: 0.43, Threshold: 0.15, Held: 43, Sources: 1, Opens: opens, Refused: refused, Capacity: 100, Count: 100,
		First: at.Add(-20 * time.Second),
	}
	if a := v.Source.Addr(); v.Source.IsSingleIP() {
		v.Evidence = []detector.Evidence{{Time: at.Add(-10 * time.Second), Source: a, Port: 40000, Count: 57}}
	}
	return Block{ID: id, Prefix: pfx(p), Verdict: v, Since: at, Until: at.Add(24 * time.Hour)}
}

func asRefusal(err error, r **Refusal) bool { return errors.As(err, r) }
