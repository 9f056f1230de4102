package control

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/store"
)

// TestReports takes a report through its life over the socket.
func TestReports(t *testing.T) {
	dir := t.TempDir()
	st, err := store.Open(filepath.Join(dir, "db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	program := filepath.Join(dir, "sendmail")
	if err := os.WriteFile(program, []byte("#!/bin/sh\ncat >>"+dir+"/out\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	c := abuse.DefaultConfig()
	c.From, c.Dir, c.Delivery.Program, c.Lookup.Online = "abuse@example.net", filepath.Join(dir, "reports"), program, false
	d, err := abuse.New(abuse.Options{Config: c, Store: st})
	if err != nil {
		t.Fatal(err)
	}
	at := time.Now().Add(-time.Hour)
	p := netip.MustParsePrefix("8.8.8.8/32")
	err = d.Take(abuse.Block{ID: 1, Prefix: p, Since: at, Until: at.Add(24 * time.Hour),
		Verdict: &detector.Verdict{Time: at, Source: p, Metric: detector.Opens, Window: time.Minute, Score: 500, Threshold: 300, Opens: 500, Sources: 1}})
	if err != nil {
		t.Fatal(err)
	}
	d.Work(t.Context())

	sock := filepath.Join(dir, "sock")
	l, err := Listen(sock, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, nil, slog.New(slog.DiscardHandler), WithReports(Desk(d))) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	var r Reports
	cl, err := Dial(ctx, sock)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	r = cl

	list, err := r.Reports(ctx)
	if err != nil || len(list) != 1 || list[0].State != abuse.Drafted {
		t.Fatalf("%+v, %v", list, err)
	}
	id := list[0].ID
	if _, _, err := r.Report(ctx, "SG-nonsense"); !errors.Is(err, abuse.ErrUnknown) {
		t.Errorf("an unknown report: %v", err)
	}
	var refused *abuse.Refusal
	if _, err := r.ApproveReport(ctx, id, "", abuse.Approval{}); !errors.As(err, &refused) || refused.Hint == "" {
		t.Errorf("approved without a recipient: %v", err)
	}
	if _, err := r.SendReport(ctx, id, "", abuse.SendOptions{}); !errors.Is(err, abuse.ErrState) {
		t.Errorf("a draft is sent: %v", err)
	}
	to := "abuse@op.example"
	if c, err := r.EditReport(ctx, id, "somebody else", abuse.Edit{To: &to}); err != nil || c.Mails[0].To.Address != to || !strings.Contains(c.Mails[0].To.Note, "(uid ") {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := r.ApproveReport(ctx, id, "somebody else", abuse.Approval{}); !errors.As(err, &refused) || !strings.Contains(refused.Why, "has not seen it") {
		t.Errorf("approved unseen: %v", err)
	}
	if _, msg, err := r.Report(ctx, id); err != nil || len(msg) == 0 { // for a program, not a person
		t.Error(err)
	}
	if _, err := r.ApproveReport(ctx, id, "", abuse.Approval{}); !errors.As(err, &refused) {
		t.Errorf("approved unseen: %v", err)
	}
	if c, msg, err := r.ShowReport(ctx, id, "somebody else"); err != nil || len(msg) == 0 || c.Mails[0].Seen[Operator(os.Getuid())] == "" {
		t.Fatalf("%+v, %v", c, err)
	}
	if _, err := r.ApproveReport(ctx, id, "somebody else", abuse.Approval{}); err != nil {
		t.Fatal(err)
	}
	sent, err := r.SendReport(ctx, id, "", abuse.SendOptions{})
	if err != nil || sent.State != abuse.Sent || sent.Mails[0].Approved != Operator(os.Getuid()) {
		t.Fatalf("%+v, %v", sent, err)
	}
	if b, err := os.ReadFile(dir + "/out"); err != nil || strings.Count(string(b), "Message-ID:") != 1 {
		t.Errorf("%s, %v", b, err)
	}
	if _, msg, err := r.Report(ctx, strings.ToLower(id)); err != nil || !strings.Contains(string(msg), sent.Mails[0].MessageID) {
		t.Errorf("%v", err)
	}
	got, err := r.ReceiveReport(ctx, []byte("From: x@op.example\nIn-Reply-To: <"+sent.Mails[0].MessageID+">\nSubject: Re\n\n"+strings.Repeat("x", 2*MaxMail)), "")
	if err != nil || len(got) != 1 || got[0].What != abuse.Answered {
		t.Errorf("%+v, %v", got, err)
	}
	if c, err := r.CloseReport(ctx, id, "", "done"); err != nil || c.State != abuse.Closed {
		t.Errorf("%+v, %v", c, err)
	}
	if _, err := r.WithdrawReport(ctx, id, "", "done"); !errors.Is(err, abuse.ErrState) {
		t.Errorf("a closed one is withdrawn: %v", err)
	}
	if c, err := r.ReopenReport(ctx, id, ""); err != nil || c.State != abuse.Sent {
		t.Errorf("a closed one is reopened: %+v, %v", c, err)
	}
	if _, err := r.ReopenReport(ctx, id, ""); !errors.Is(err, abuse.ErrState) {
		t.Errorf("one that is not closed is reopened: %v", err)
	}
	if _, err := r.CloseReport(ctx, id, "", "\x1b[2J"); err == nil {
		t.Error("control characters are taken")
	}
}

// slowReports hands over when the test lets it.
type slowReports struct {
	others
	let chan struct{}
}

// others has a name that is no method's.
type others Reports

func (s slowReports) SendReport(context.Context, string, string, abuse.SendOptions) (abuse.Case, error) {
	<-s.let
	return abuse.Case{ID: "SG-1", State: abuse.Drafted}, nil
}

func (s slowReports) Report(context.Context, string) (abuse.Case, []byte, error) {
	return abuse.Case{ID: "SG-1", State: abuse.Drafted}, nil, nil
}

// TestSlowSend: a handover, also one for a trial, is not told as done before
// it is.
func TestSlowSend(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := slowReports{let: make(chan struct{})}
		c, err := sendPatiently(t.Context(), s, "SG-1", "root", abuse.SendOptions{To: "me@example.net"})
		if !errors.Is(err, ErrUnderWay) || c.ID != "SG-1" {
			t.Errorf("%+v, %v", c, err)
		}
		close(s.let)
		if _, err := sendPatiently(t.Context(), s, "SG-1", "root", abuse.SendOptions{}); err != nil {
			t.Error(err)
		}
	})
}

// TestWithoutReports: a faulty section is not taken for one that is off.
func TestWithoutReports(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "sock")
	l, err := Listen(sock, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, nil, slog.New(slog.DiscardHandler), WithoutReports(errors.New("reports.from: nonsense")))
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	cl, err := Dial(ctx, sock)
	if err != nil {
		t.Fatal(err)
	}
	defer cl.Close()
	var refused *abuse.Refusal
	if _, err := cl.Reports(ctx); !errors.As(err, &refused) || !strings.Contains(refused.Why, "reports.from: nonsense") || !strings.Contains(refused.Hint, "policy check") {
		t.Errorf("list: %v", err)
	}
	if _, err := cl.ApproveReport(ctx, "SG-1", "", abuse.Approval{}); !errors.As(err, &refused) {
		t.Errorf("approve: %v", err)
	}
}
