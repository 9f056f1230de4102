package abuse

import (
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// hookLogs calls a function before the logs are read.
type hookLogs struct {
	Logs
	hook func()
}

func (h *hookLogs) Scan(ctx context.Context, from, to time.Time, fn func(*detector.Event, []byte) error) (time.Time, error) {
	if h.hook != nil {
		h.hook()
	}
	return h.Logs.Scan(ctx, from, to, fn)
}

// archived is a bench with a draft whose case has grown since, and the hook
// before the next reading of its log.
func archived(t *testing.T) (b *bench, id string, h *hookLogs) {
	l := newFloodLog()
	for i := range 200 {
		l.open("198.51.100.1", 2000+i)
	}
	lt := &logText{text: l.b.String(), zone: time.UTC}
	h = &hookLogs{Logs: lt}
	b = newBench(t, testConfig(t), Options{Logs: h})
	b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0))
	d, _ := b.drafted()
	// A recipient that no person has named, as a lookup would have found it.
	b.cases[d.ID].Mails[0].To = Contact{Address: "abuse@op.example", Scope: "AS64500", Source: "RDAP", Role: "abuse"}
	b.Desk.mu.Lock()
	c := b.cases[d.ID].clone()
	msg := must(b.finishMail(c, c.mail(), "", false))
	err := b.commit(b.cases[d.ID], c, 0, *c.mail(), msg)
	b.Desk.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		l.open("198.51.100.2", 2000+i)
	}
	lt.text = l.b.String()
	b.Take(blockOf(2, "198.51.100.2/32", testStart.Add(time.Second), 20, 0))
	b.pass(2 * time.Hour)
	return b, d.ID, h
}

// TestArchiveStays: a draft made anew while a person approves the one before
// changes nothing of that one's evidence, and leaves none behind.
func TestArchiveStays(t *testing.T) {
	b, id, h := archived(t)
	h.hook = func() {
		h.hook = nil
		if _, err := b.Approve(id, "root", Approval{}); err != nil {
			t.Error(err)
		}
	}
	b.Work(t.Context())
	c := b.only()
	a := c.Mails[0].Archive
	f := must(os.Open(b.path(a.File)))
	defer f.Close()
	raw := must(io.ReadAll(must(gzip.NewReader(f))))
	_, msg, _ := b.Case(id)
	if hexsum(raw) != a.SHA256 || strings.Count(string(raw), "\n") != a.Lines || !strings.Contains(string(msg), a.SHA256) {
		t.Errorf("the archive has %d lines and the hash %s; the mail says %d and %s", strings.Count(string(raw), "\n"), hexsum(raw), a.Lines, a.SHA256)
	}
	if files := must(filepath.Glob(filepath.Join(b.config.Dir, "*.log.gz"))); len(files) != 1 {
		t.Errorf("archives: %v", files)
	}
	if c.State != Sent {
		t.Errorf("it is %s (%s)", c.State, c.Why)
	}
}

// TestArchiveReplaced: of a draft made anew one archive is kept, the new one.
func TestArchiveReplaced(t *testing.T) {
	b, _, _ := archived(t)
	b.Work(t.Context())
	a := b.only().Mails[0].Archive
	if files := must(filepath.Glob(filepath.Join(b.config.Dir, "*.log.gz"))); len(files) != 1 || filepath.Base(files[0]) != a.File || a.Lines != 220 {
		t.Errorf("archives %v, the mail has %+v", files, a)
	}
}

// TestArchiveSpoilt: a report whose evidence is no longer what it says is not
// sent, but made anew.
func TestArchiveSpoilt(t *testing.T) {
	for name, spoil := range map[string]func(string) error{
		"gone":    os.Remove,
		"cut":     func(p string) error { return os.Truncate(p, 40) },
		"another": func(p string) error { return os.WriteFile(p, nil, 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			b, id, _ := archived(t)
			must(b.Approve(id, "root", Approval{}))
			a := b.only().Mails[0].Archive
			if err := spoil(b.path(a.File)); err != nil {
				t.Fatal(err)
			}
			var r *Refusal
			if _, err := b.Send(t.Context(), id, "root", SendOptions{}); !asRefusal(err, &r) || len(b.sent()) != 0 {
				t.Fatalf("sent: %v", err)
			}
			b.Work(t.Context())
			b.contact(id, "abuse@op.example")
			must(b.Approve(id, "root", Approval{}))
			if _, err := b.Send(t.Context(), id, "root", SendOptions{}); err != nil || len(b.sent()) != 1 {
				t.Error(err)
			}
		})
	}
}

// partLogs are logs of which a file could not be read.
type partLogs struct{ Logs }

func (p partLogs) Scan(ctx context.Context, from, to time.Time, fn func(*detector.Event, []byte) error) (time.Time, error) {
	reach, err := p.Logs.Scan(ctx, from, to, fn)
	return reach, &Unread{errors.Join(err, errors.New("reading mainlog.3.gz: unexpected EOF"))}
}

// TestPartOfTheLog: what could be read is evidence, and the draft says that it
// is not all.
func TestPartOfTheLog(t *testing.T) {
	b := flooded(t, func(_ *Config, o *Options, l *floodLog) {
		o.Logs = partLogs{&logText{text: l.b.String(), zone: l.zone}}
	})
	d, msg := b.drafted()
	f := d.Mails[0].Facts
	if !f.FromLog || f.Connections < 267 || f.Baseline != -1 || d.Mails[0].Archive.Lines == 0 {
		t.Errorf("%+v", f)
	}
	if !strings.Contains(strings.Join(d.Mails[0].Warnings, "\n"), "mainlog.3.gz") {
		t.Errorf("warnings: %q", d.Mails[0].Warnings)
	}
	_, ps := parts(t, msg)
	if text := flat(ps[0].text); !strings.Contains(text, "A part of our log could not be read, so there may have been more.") || strings.Contains(text, "mainlog.3.gz") {
		t.Errorf("%s", ps[0].text)
	}
}
