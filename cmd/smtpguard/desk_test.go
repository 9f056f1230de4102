package main

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
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

// TestEvidenceLogs: each line is read once, whatever lies beside the log, and
// what cannot be read costs nothing but itself.
func TestEvidenceLogs(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 11, 22, 18, 0, 0, 0, time.UTC)
	lines := func(n int, source string) []byte {
		var b bytes.Buffer
		for i := range n {
			fmt.Fprintf(&b, "%s SMTP connection from [%s]:%d (TCP/IP connection count = %d)\n", at.Format("2006-01-02 15:04:05"), source, 1000+i, i+1)
		}
		return b.Bytes()
	}
	packed := func(b []byte) []byte {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		w.Write(b)
		w.Close()
		return z.Bytes()
	}
	write := func(name string, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("mainlog", lines(3, "192.0.2.1"))
	write("mainlog.1", lines(5, "192.0.2.2"))
	write("mainlog.1.bak", lines(5, "192.0.2.2"))
	write("mainlog.1.gz", packed(lines(5, "192.0.2.2"))[:20]) // gzip is at work
	write("mainlog.2.gz", packed(lines(7, "192.0.2.3")))
	write("mainlog.2.gz.old", packed(lines(7, "192.0.2.3")))
	write("mainlog-saved", lines(9, "192.0.2.4"))
	count := func() (map[string]int, error) {
		n := map[string]int{}
		l := &evidenceLogs{paths: []string{filepath.Join(dir, "mainlog")}, zone: time.UTC}
		_, err := l.Scan(t.Context(), at.Add(-time.Hour), at.Add(time.Hour), func(ev *detector.Event, _ []byte) error {
			n[ev.Source.String()]++
			return nil
		})
		return n, err
	}
	old := at.Add(-30 * time.Minute)
	for _, f := range []string{"mainlog", "mainlog.1", "mainlog.1.bak", "mainlog.1.gz", "mainlog.2.gz", "mainlog.2.gz.old", "mainlog-saved"} {
		os.Chtimes(filepath.Join(dir, f), old, old)
	}
	if n, err := count(); err != nil || n["192.0.2.1"] != 3 || n["192.0.2.2"] != 5 || n["192.0.2.3"] != 7 || n["192.0.2.4"] != 0 {
		t.Errorf("%v, %v", n, err)
	}
	// One that was cut off, and one that is no archive at all.
	var many []byte
	for i := range 4000 {
		many = append(many, lines(1, fmt.Sprintf("192.0.2.%d", 10+i*i%200))...)
	}
	z := packed(many)
	write("mainlog.3.gz", z[:len(z)*2/3])
	write("mainlog.4.gz", []byte{0x1f, 0x8b, 8, 0})
	n, err := count()
	var part *abuse.Unread
	if !errors.As(err, &part) || !strings.Contains(err.Error(), "mainlog.3.gz") || !strings.Contains(err.Error(), "mainlog.4.gz") {
		t.Errorf("%v", err)
	}
	if n["192.0.2.1"] != 3 || n["192.0.2.2"] != 5 || n["192.0.2.3"] != 7 || n["192.0.2.10"] == 0 {
		t.Errorf("what could be read is lost: %v", n)
	}
	// An error of the reader's is no fault of a file.
	stop := errors.New("stop")
	l := &evidenceLogs{paths: []string{filepath.Join(dir, "mainlog")}, zone: time.UTC}
	if _, err := l.Scan(t.Context(), at.Add(-time.Hour), at.Add(time.Hour), func(*detector.Event, []byte) error { return stop }); !errors.Is(err, stop) || errors.As(err, &part) {
		t.Errorf("%v", err)
	}
}

// TestListedConnections: the list has the number that the mail tells.
func TestListedConnections(t *testing.T) {
	k := abuse.Case{Connections: 35}
	if n := connections(&k); n != 35 {
		t.Errorf("%d connections without a draft, want 35", n)
	}
	k.Mails = []abuse.Mail{{Facts: abuse.Facts{Connections: 46}}}
	if n := connections(&k); n != 46 {
		t.Errorf("%d connections with a draft, want 46", n)
	}
}
