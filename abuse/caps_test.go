package abuse

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// TestAgainAtOnce: on a person's word that a doubtful mail did not leave it
// goes out again, and its own attempt holds nothing up.
func TestAgainAtOnce(t *testing.T) {
	b, id := ready(t, nil)
	works := must(os.ReadFile(b.config.Delivery.Program))
	os.WriteFile(b.config.Delivery.Program, []byte("#!/bin/sh\ncat >/dev/null; exit 75\n"), 0o755)
	if _, err := b.Send(t.Context(), id, "root", SendOptions{}); !errors.Is(err, ErrDoubtful) {
		t.Fatal(err)
	}
	os.WriteFile(b.config.Delivery.Program, works, 0o755)
	b.Work(t.Context())
	if len(b.sent()) != 0 {
		t.Fatal("a doubtful one goes out by itself")
	}
	c, err := b.Send(t.Context(), id, "alice", SendOptions{Again: true})
	if err != nil || c.State != Sent || len(b.sent()) != 1 {
		t.Fatalf("%s (%s): %v", c.State, c.Why, err)
	}
	if a := c.Mails[0].Attempts[0]; a.Denied != "alice" || c.mail().Approved != "root" {
		t.Errorf("who said so is not noted: %+v, approved by %q", a, c.mail().Approved)
	}
	// What was sent counts.
	b.Desk.mu.Lock()
	defer b.Desk.mu.Unlock()
	if why := b.capped(&Case{}, []string{"abuse@op.example"}); !strings.Contains(why, "got a report") {
		t.Errorf("capped: %q", why)
	}
}

// TestAgainHeld: other mails to the same recipient still hold it, and it waits.
func TestAgainHeld(t *testing.T) {
	b, id := ready(t, nil)
	works := must(os.ReadFile(b.config.Delivery.Program))
	os.WriteFile(b.config.Delivery.Program, []byte("#!/bin/sh\ncat >/dev/null; exit 75\n"), 0o755)
	b.Send(t.Context(), id, "root", SendOptions{})
	os.WriteFile(b.config.Delivery.Program, works, 0o755)
	b.pass(25 * time.Hour)
	b.Take(blockOf(2, "192.0.2.1/32", b.time().Add(-time.Hour), 200, 0))
	b.Work(t.Context())
	for _, c := range b.Cases() {
		if c.ID != id {
			b.contact(c.ID, "abuse@op.example")
			must(b.Approve(c.ID, "root", Approval{}))
			must(b.Send(t.Context(), c.ID, "root", SendOptions{}))
		}
	}
	if _, err := b.Send(t.Context(), id, "root", SendOptions{Again: true}); !errors.Is(err, ErrHeld) {
		t.Fatal(err)
	}
	if c, _, _ := b.Case(id); c.State != Approved {
		t.Errorf("%s (%s)", c.State, c.Why)
	}
	b.pass(25 * time.Hour)
	b.Work(t.Context())
	if c, _, _ := b.Case(id); c.State != Sent || len(b.sent()) != 2 {
		t.Errorf("a day later: %s (%s), %d sent", c.State, c.Why, len(b.sent()))
	}
}

// TestRoomKeepsWhatWasSent: however many cases come, and however soon they are
// forgotten, what was sent and what was drafted still counts.
func TestRoomKeepsWhatWasSent(t *testing.T) {
	b, id := ready(t, func(c *Config) { c.Keep = time.Minute })
	must(b.Send(t.Context(), id, "root", SendOptions{}))
	must(b.CloseCase(id, "root", "done"))
	b.Take(blockOf(2, "192.0.2.1/32", testStart, 200, 0))
	b.Work(t.Context())
	for _, c := range b.Cases() {
		if c.ID != id {
			must(b.Withdraw(c.ID, "root", "a partner"))
		}
	}
	var blocks []Block
	for i := range maxCases + 1 {
		blocks = append(blocks, blockOf(uint64(i+3), fmt.Sprintf("%d.%d.%d.0/24", 20+i/62500, i/250%250, i%250), testStart.Add(time.Hour), 20+i, 0))
	}
	b.Take(blocks...)
	b.pass(2 * time.Hour)
	b.forget()
	b.Desk.mu.Lock()
	if why := b.capped(&Case{}, []string{"abuse@op.example"}); !strings.Contains(why, "got a report") || b.draftsToday() != 2 {
		t.Errorf("capped %q, %d drafts today", why, b.draftsToday())
	}
	b.Desk.mu.Unlock()
	if _, _, err := b.Case(id); err != nil {
		t.Error(err)
	}
	// A day later they may go.
	b.pass(25 * time.Hour)
	b.forget()
	if _, _, err := b.Case(id); !errors.Is(err, ErrUnknown) {
		t.Errorf("it is never forgotten: %v", err)
	}
}

// TestEditOnOldDraft: an edit that was begun on another draft than the one of
// now is refused; nothing is changed.
func TestEditOnOldDraft(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0))
	d, _ := b.drafted()
	base := d.mail().Digest
	b.Take(blockOf(2, "198.51.100.2/32", testStart.Add(time.Second), 2000, 0))
	b.pass(2 * time.Hour)
	b.Work(t.Context())
	newer := b.only().Mails[0].Digest
	if newer == base {
		t.Fatal("the draft is the same")
	}
	text := "We ask for this.\n"
	var r *Refusal
	if _, err := b.Edit(t.Context(), d.ID, "root", Edit{Text: &text, Base: base}); !asRefusal(err, &r) || !strings.Contains(r.Why, "made anew") {
		t.Fatalf("%v", err)
	}
	if m := b.only().Mails[0]; m.Digest != newer || m.Edited != "" {
		t.Error("the newer draft is overwritten")
	}
	if _, err := b.Edit(t.Context(), d.ID, "root", Edit{Text: &text, Base: newer[:minDigest]}); err != nil {
		t.Error(err)
	}
}

// BenchmarkHeld is a look at 5000 cases that a cap holds: it is done every few
// seconds.
func BenchmarkHeld(b *testing.B) {
	d := heldDesk(b)
	for b.Loop() {
		d.Work(b.Context())
	}
}

func heldDesk(b *testing.B) *Desk {
	c := DefaultConfig()
	c.Dir, c.Lookup.Online = b.TempDir(), false
	d, err := newDesk(Options{Config: c, Store: newMemStore()}, func() time.Time { return testStart.Add(time.Hour) }, true)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(d.Close)
	var blocks []Block
	for i := range 5000 {
		x := blockOf(uint64(i+1), fmt.Sprintf("%d.%d.%d.0/24", 20+i/2500, i/250%10, i%250), testStart, 200+i, 0)
		blocks = append(blocks, x)
	}
	if err := d.Take(blocks...); err != nil {
		b.Fatal(err)
	}
	d.Work(b.Context())
	return d
}
