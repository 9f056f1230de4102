package abuse

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

func hexsum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

// TestOneMail: whatever write fails, before and after a restart, what is shown
// is what is approved.
func TestOneMail(t *testing.T) {
	for n := range 4 {
		t.Run(fmt.Sprintf("write %d fails", n), func(t *testing.T) {
			b := newBench(t, testConfig(t), Options{})
			b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0))
			d, _ := b.drafted()
			b.contact(d.ID, "abuse@op.example")
			writes := 0
			b.store.fail = func(kind, key string) error {
				if writes++; writes == n+1 {
					return errors.New("disk full")
				}
				return nil
			}
			text := "Please ignore our first report, it was a mistake.\n"
			_, eerr := b.Edit(t.Context(), d.ID, "root", Edit{Text: &text})
			b.store.fail = nil
			for _, desk := range []*Desk{b.Desk, newBench(t, b.config, Options{Store: b.store}).Desk} {
				c, msg, err := desk.Show(d.ID, "root")
				if err != nil {
					t.Fatal(err)
				}
				if hexsum(msg) != c.mail().Digest {
					t.Error("what is shown is another mail than the case's")
				}
				if got := strings.Contains(string(msg), "ignore our first"); got != (eerr == nil) {
					t.Errorf("edit: %v; the new text is shown: %v", eerr, got)
				}
			}
			c, shown, _ := b.Show(d.ID, "root")
			if _, err := b.Desk.Approve(d.ID, "root", Approval{Digest: c.mail().Digest}); err != nil {
				t.Fatal(err)
			}
			_, msg, _ := b.Case(d.ID)
			_, p1 := parts(t, shown)
			_, p2 := parts(t, msg)
			if strings.Contains(p1[0].text, "ignore") != strings.Contains(p2[0].text, "ignore") {
				t.Errorf("approved is another text:\n%s", p2[0].text)
			}
			if n := len(b.store.keys(kindMail)); n != 1 {
				t.Errorf("%d messages are kept of one mail", n)
			}
		})
	}
}

// TestDamagedMail: a message in the store that is not the one that the case
// tells of is neither shown nor approved.
func TestDamagedMail(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	c, _, _ := b.Show(d.ID, "root")
	for _, key := range b.store.keys(kindMail) {
		b.store.SetRecord(kindMail, key, []byte("Subject: other\r\n\r\n"))
	}
	if _, _, err := b.Show(d.ID, "root"); err == nil {
		t.Error("another mail is shown")
	}
	if _, err := b.Desk.Approve(d.ID, "root", Approval{Digest: c.mail().Digest}); err == nil {
		t.Error("another mail is approved")
	}
}

// TestSettingsChange: a draft that was seen with other settings than those of
// now is not approved, and the refusal names them.
func TestSettingsChange(t *testing.T) {
	for name, set := range map[string]func(*Config){
		"reports.from":        func(c *Config) { c.From = "Other Person <abuse@example.net>" },
		"reports.return_path": func(c *Config) { c.ReturnPath = "elsewhere@other.example" },
		"reports.org":         func(c *Config) { c.Org = "Other Org" },
		"reports.phone":       func(c *Config) { c.Phone = "+1-555-0199" },
		"reports.host":        func(c *Config) { c.Host = "mx9.example.net" },
		"":                    func(*Config) {},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t, testConfig(t), Options{})
			b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
			d, _ := b.drafted()
			b.contact(d.ID, "abuse@op.example")
			b.Show(d.ID, "root")
			conf := b.config
			set(&conf)
			b2 := newBench(t, conf, Options{Store: b.store})
			b2.clock = b.clock.Add(time.Hour)
			_, err := b2.Desk.Approve(d.ID, "root", Approval{})
			var r *Refusal
			switch {
			case name == "" && err != nil:
				t.Fatal(err)
			case name == "":
				return
			case !asRefusal(err, &r) || !strings.Contains(r.Why, name):
				t.Fatalf("approved with other settings: %v", err)
			}
			// It is made anew with what is set now, for a person to see.
			b2.pass(time.Minute)
			b2.Work(t.Context())
			_, msg, _ := b2.Show(d.ID, "root")
			if _, err := b2.Desk.Approve(d.ID, "root", Approval{}); err != nil {
				t.Fatal(err)
			}
			_, approved, _ := b2.Case(d.ID)
			h1, p1 := parts(t, msg)
			h2, p2 := parts(t, approved)
			for _, h := range []string{"From", "Reply-To", "Subject", "Message-Id"} {
				if h1.Get(h) != h2.Get(h) {
					t.Errorf("%s: seen %q, approved %q", h, h1.Get(h), h2.Get(h))
				}
			}
			if strings.Contains(p1[0].text, "Other Org") != strings.Contains(p2[0].text, "Other Org") || name == "reports.org" && !strings.Contains(p2[0].text, "Other Org") {
				t.Errorf("%s\n%s", p1[0].text, p2[0].text)
			}
		})
	}
}

// TestUpgrade: where another version would write something else, it is seen
// before it is approved.
func TestUpgrade(t *testing.T) {
	c := testConfig(t)
	c.Format = XARF
	b := newBench(t, c, Options{Version: "1"})
	b.Take(blockOf(1, "198.51.100.23/32", testStart, 200, 0))
	d, _ := b.drafted()
	b.contact(d.ID, "abuse@op.example")
	b.Show(d.ID, "root")
	b2 := newBench(t, c, Options{Store: b.store, Version: "2"})
	var r *Refusal
	if _, err := b2.Desk.Approve(d.ID, "root", Approval{}); !asRefusal(err, &r) {
		t.Fatalf("approved: %v", err)
	}
	b2.Work(t.Context())
	if _, err := b2.Approve(d.ID, "root", Approval{}); err != nil {
		t.Fatal(err)
	}
}
