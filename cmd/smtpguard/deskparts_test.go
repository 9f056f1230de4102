package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"mime/quotedprintable"
	"net/mail"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// TestReportOfParts: a block that was split, and whose parts were split again,
// is reported with the number of its connections, once, and in every part of
// the mail with the same.
func TestReportOfParts(t *testing.T) {
	for _, x := range []struct{ early, log bool }{{}, {early: true}, {log: true}, {true, true}} {
		// early: the desk had the block before it was split; log: there is one to count in.
		now := time.Now()
		st, err := store.Open(filepath.Join(t.TempDir(), "db"), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer st.Close()
		net24 := netip.MustParsePrefix("1.2.3.0/24") // of documentation ranges nobody is told
		v := &detector.Verdict{Time: now, Source: net24, Rule: "net", Metric: detector.Saturation, Window: 10 * time.Second,
			Opens: 211, Refused: 6, Accepted: 0, Held: 40, Capacity: 100, Count: 99, First: now.Add(-time.Minute)}
		flood := &store.Block{Prefix: net24, Verdict: v, Reason: v.Sentence(), Offence: 1, Since: now, Until: now.Add(24 * time.Hour), By: store.Self}
		// A longer one takes the place of what would be the first part.
		long := &store.Block{Prefix: netip.MustParsePrefix("1.2.3.0/32"), Since: now, Until: now.Add(48 * time.Hour), By: "root"}
		if err := st.Add(flood, long); err != nil {
			t.Fatal(err)
		}
		p := policy.Default()
		p.Mode = policy.Enforce
		g, err := guard.New(t.Context(), guard.Options{Policy: p, Store: st, Capacity: 100,
			OpenFirewall: func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
				return firewall.NewMemory(firewall.Options{}), nil
			},
			Self: func(context.Context) ([]guard.Exempt, error) {
				return []guard.Exempt{{Prefix: netip.MustParsePrefix("192.0.2.1/32"), Why: "an address of this machine"}}, nil
			}})
		if err != nil {
			t.Fatal(err)
		}
		c := abuse.DefaultConfig()
		c.From, c.Org, c.Host, c.Dir = "Example <abuse@example.net>", "Example", "mx.example.net", filepath.Join(t.TempDir(), "reports")
		c.Lookup.Online, c.Threshold.Settle = false, time.Minute
		clock := now
		o := abuse.Options{Config: c, Store: st, Now: func() time.Time { return clock },
			Refresh: func(id uint64) (abuse.Block, bool) {
				b, err := st.Block(id)
				return reportBlock(b), err == nil
			}}
		if x.log {
			path := filepath.Join(t.TempDir(), "mainlog")
			if err := os.WriteFile(path, floodLog(now.Add(-20*time.Second).UTC()), 0o600); err != nil {
				t.Fatal(err)
			}
			o.Logs = &evidenceLogs{paths: []string{path}, zone: time.UTC}
		}
		d, err := abuse.New(o)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		take := func() {
			list, err := g.Outbox(d.Taken(), 500)
			if err != nil {
				t.Fatal(err)
			}
			for _, b := range list {
				if b.Verdict == nil {
					continue
				}
				if err := d.Take(reportBlock(b)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if x.early {
			take()
		}
		for _, a := range []string{"1.2.3.1/32", "1.2.3.70/32", "1.2.3.3/32"} {
			if _, err := g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix(a), By: "root"}); err != nil {
				t.Fatal(err)
			}
			if x.early {
				take()
			}
		}
		take()
		clock = now.Add(10 * time.Minute)
		d.Work(t.Context())
		cases := d.Cases()
		if len(cases) != 1 {
			t.Fatalf("%d cases", len(cases))
		}
		k, msg, err := d.Case(cases[0].ID)
		if err != nil || msg == nil {
			t.Fatal(k.State, k.Why, err)
		}
		text, csv, xarf := reportParts(t, msg)
		if m := regexp.MustCompile(`(\d+) TCP connections`).FindStringSubmatch(text); m == nil || m[1] != "217" {
			t.Errorf("%+v: the text says %q", x, m)
		}
		sum, refused := 0, 0
		for _, l := range strings.Split(strings.TrimSpace(csv), "\n")[1:] {
			f := strings.Split(strings.TrimSpace(l), ",")
			n, _ := strconv.Atoi(f[len(f)-2])
			r, _ := strconv.Atoi(f[len(f)-1])
			sum, refused = sum+n, refused+r
		}
		if sum != 217 || refused != 6 {
			t.Errorf("%+v: the CSV adds up to %d, %d refused\n%s", x, sum, refused, csv)
		}
		if !x.log { // who it was one by one is not known
			if xarf != "" {
				t.Errorf("%+v: XARF\n%s", x, xarf)
			}
			continue
		}
		if n := regexp.MustCompile(`"connection_count": ?(\d+)`).FindStringSubmatch(xarf); n == nil || n[1] != "217" || !json.Valid([]byte(xarf)) {
			t.Errorf("%+v: XARF says %q\n%s", x, n, xarf)
		}
	}
}

// floodLog has 211 connections taken and 6 refused, of 1.2.3.0/24.
func floodLog(at time.Time) []byte {
	var b bytes.Buffer
	for i := range 217 {
		what := fmt.Sprintf("(TCP/IP connection count = %d)", 60+i%30)
		head := "SMTP connection"
		if i >= 211 {
			head, what = "Connection", "refused: too many connections"
		}
		fmt.Fprintf(&b, "%s %s from [1.2.3.%d]:%d %s\n", at.Add(time.Duration(i)*50*time.Millisecond).Format("2006-01-02 15:04:05"), head, 128+i%20, 2000+i, what)
	}
	return b.Bytes()
}

// reportParts are the parts of a report that state numbers.
func reportParts(t *testing.T, msg []byte) (text, csv, xarf string) {
	t.Helper()
	m, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		t.Fatal(err)
	}
	_, params, _ := mime.ParseMediaType(m.Header.Get("Content-Type"))
	for r := multipart.NewReader(m.Body, params["boundary"]); ; {
		p, err := r.NextRawPart()
		if err == io.EOF {
			return text, csv, xarf
		}
		if err != nil {
			t.Fatal(err)
		}
		var body io.Reader = p
		switch p.Header.Get("Content-Transfer-Encoding") {
		case "quoted-printable":
			body = quotedprintable.NewReader(p)
		case "base64":
			body = base64.NewDecoder(base64.StdEncoding, p)
		}
		b, err := io.ReadAll(body)
		if err != nil {
			t.Fatal(err)
		}
		switch name := p.FileName(); {
		case name == "sources.csv":
			csv = string(b)
		case name == "xarf.json":
			xarf = string(b)
		case text == "":
			text = strings.Join(strings.Fields(string(b)), " ")
		}
	}
}
