package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
)

// TestRemembered: a guard that does not answer is not asked for each block
// again.
func TestRemembered(t *testing.T) {
	now := time.Unix(1e9, 0)
	asked, fails := 0, error(nil)
	p := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	f := remembered(func() time.Time { return now }, func() ([]netip.Prefix, error) { asked++; return p, fails })
	for range 5 {
		if !slices.Equal(f(), p) {
			t.Error("the list is not there")
		}
	}
	fails = errors.New("busy")
	now = now.Add(2 * time.Minute)
	for range 5 {
		if !slices.Equal(f(), p) {
			t.Error("the list is forgotten")
		}
	}
	if asked != 2 {
		t.Errorf("asked %d times, want 2", asked)
	}
	now = now.Add(11 * time.Second)
	if f(); asked != 3 {
		t.Errorf("asked %d times, want 3", asked)
	}
}

// TestListReports: what waits for a person comes first, what a cap holds is
// counted, and no line is longer than a terminal.
func TestListReports(t *testing.T) {
	at := time.Date(2026, 11, 22, 18, 41, 7, 0, time.UTC)
	one := func(i int, s abuse.State, network, why, to string) abuse.Case {
		k := abuse.Case{ID: fmt.Sprintf("SG-20261122-%06X", i), State: s, Network: netip.MustParsePrefix(network), AS: 64500, Connections: 14212, LastBlock: at, Why: why}
		if to != "" {
			k.Mails = []abuse.Mail{{To: abuse.Contact{Address: to}, Cc: abuse.Contact{Address: "network-abuse@a-rather-long-name.hosting.example"}}}
		}
		return k
	}
	var list []abuse.Case
	for i := range 200 {
		list = append(list, one(i, abuse.Held, fmt.Sprintf("198.51.%d.0/24", i), "20 drafts were made within a day, as many as reports.caps.drafts allows", ""))
	}
	list = append(list, one(300, abuse.Sent, "198.51.100.0/24", "", "abuse@op.example"),
		one(301, abuse.Drafted, "2001:db8:bad::/48", "", "abuse@op.example"),
		one(302, abuse.Doubtful, "192.0.2.0/24", "smtpguard was ended while it handed the mail over; look for Message-ID <6f0c2b7e-52a4-4f3d-9d2b-0a7c1f6e4b91@example.net> in the mail server's log", "abuse@op.example"))
	var b bytes.Buffer
	listReports(&b, list, false)
	text := b.String()
	lines := strings.Split(text, "\n")
	for _, l := range lines {
		if len(l) > 80 {
			t.Errorf("%d characters: %s", len(l), l)
		}
	}
	doubtful, draft, sent, held := strings.Index(text, "00012E"), strings.Index(text, "00012D"), strings.Index(text, "00012C"), strings.Index(text, " held ")
	if doubtful < 0 || doubtful > draft || draft > sent || sent > held {
		t.Errorf("the order is another:\n%s", text)
	}
	if !strings.Contains(text, "and 190 more are held: 20 drafts") || strings.Count(text, " held ") != maxHeld || !strings.Contains(text, "1 draft waits for a person") {
		t.Errorf("%s", text)
	}
	b.Reset()
	listReports(&b, list, true)
	if n := strings.Count(b.String(), " held "); n != 200 {
		t.Errorf("--all lists %d", n)
	}
}
