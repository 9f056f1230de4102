package control

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// fake is a guard that knows one block, 203.0.113.0/24, and allows 192.0.2.1.
type fake struct {
	block   []guard.BlockRequest
	dry     bool
	by      string
	allow   store.AllowEntry
	learned []store.Good
}

var theBlock = store.Block{ID: 7, Prefix: netip.MustParsePrefix("203.0.113.0/24"), Reason: "test", Offence: 1}

func (f *fake) Status(context.Context) (guard.Status, error) {
	return guard.Status{Mode: "enforce", Capacity: 100, Count: 42}, nil
}
func (f *fake) View(context.Context) (guard.View, error) {
	return guard.View{Sources: []guard.Source{{Prefix: theBlock.Prefix, Held: 7}}}, nil
}
func (f *fake) Blocks(context.Context) ([]guard.BlockInfo, error) {
	return []guard.BlockInfo{{Block: theBlock, State: guard.InForce, Packets: 3}}, nil
}
func (f *fake) History(_ context.Context, p netip.Prefix) ([]guard.BlockInfo, error) {
	if p.Overlaps(theBlock.Prefix) {
		return []guard.BlockInfo{{Block: theBlock, State: guard.IsLifted}}, nil
	}
	return nil, nil
}
func (f *fake) Explain(_ context.Context, p netip.Prefix) (guard.Explanation, error) {
	return guard.Explanation{Prefix: p, Held: 9}, nil
}
func (f *fake) Block(_ context.Context, reqs []guard.BlockRequest, dry bool) (out []guard.BlockOutcome, err error) {
	f.block, f.dry = append(f.block, reqs...), dry
	for _, r := range reqs {
		o := guard.BlockOutcome{Prefix: r.Prefix, Block: &theBlock}
		if r.Prefix.Contains(netip.MustParseAddr("192.0.2.1")) {
			o = guard.BlockOutcome{Prefix: r.Prefix, Refused: "it is allowed", Hint: "look"}
		}
		out = append(out, o)
	}
	return out, nil
}
func (f *fake) Sync(context.Context) (int, error) { return 17, nil }
func (f *fake) Unblock(_ context.Context, p netip.Prefix, by string) ([]store.Block, error) {
	f.by = by
	switch {
	case !p.IsValid():
		return []store.Block{theBlock}, errors.New("the filter is stuck")
	case p.IsSingleIP():
		return nil, &guard.CoveredError{Asked: p, By: theBlock.Prefix}
	}
	return []store.Block{theBlock}, nil
}
func (f *fake) Allow(_ context.Context, e store.AllowEntry) ([]store.Block, error) {
	f.allow = e
	return nil, nil
}
func (f *fake) Disallow(_ context.Context, p netip.Prefix) (bool, error) { return p.IsSingleIP(), nil }
func (f *fake) Allowed(context.Context) ([]guard.AllowInfo, error) {
	return []guard.AllowInfo{{Prefix: theBlock.Prefix, Why: "why"}}, nil
}

func (f *fake) DisallowName(_ context.Context, name string) (bool, error) {
	return name == "dns:mail.example.org", nil
}
func (f *fake) Commit(_ context.Context, by string, again time.Duration) (guard.Trial, error) {
	if again == 0 {
		return guard.Trial{}, guard.ErrNoTrial
	}
	return guard.Trial{State: guard.OnTrial, Until: time.Unix(0, 0).Add(again), By: by}, nil
}
func (f *fake) Resume(_ context.Context, by string) (bool, error) {
	f.by = by
	return true, nil
}

func (f *fake) Learn(_ context.Context, goods []store.Good) error {
	f.learned = append(f.learned, goods...)
	return nil
}

// start serves f on a socket and returns a client.
func start(t *testing.T, f *fake) (*Client, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "run", "c.sock")
	l, err := Listen(path, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, f, slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the socket is still there: %v", err)
		}
	})
	c, err := Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c, path
}

func TestBothEnds(t *testing.T) {
	f := &fake{}
	c, path := start(t, f)
	ctx := t.Context()
	one := netip.MustParsePrefix("203.0.113.9/32")

	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("the socket has mode %v, %v", fi.Mode(), err)
	}
	if s, err := c.Status(ctx); err != nil || s.Count != 42 || s.Mode != "enforce" {
		t.Errorf("Status: %+v, %v", s, err)
	}
	if b, err := c.Blocks(ctx); err != nil || len(b) != 1 || b[0].Packets != 3 || b[0].State != guard.InForce || b[0].Prefix != theBlock.Prefix {
		t.Errorf("Blocks: %+v, %v", b, err)
	}
	if b, err := c.History(ctx, one); err != nil || len(b) != 1 || b[0].State != guard.IsLifted {
		t.Errorf("History: %+v, %v", b, err)
	}
	if b, err := c.History(ctx, netip.MustParsePrefix("2001:db8::/64")); err != nil || len(b) != 0 {
		t.Errorf("History of nothing: %+v, %v", b, err)
	}
	if x, err := c.Explain(ctx, one); err != nil || x.Held != 9 || x.Prefix != one {
		t.Errorf("Explain: %+v, %v", x, err)
	}
	if a, err := c.Allowed(ctx); err != nil || len(a) != 1 || a[0].Why != "why" {
		t.Errorf("Allowed: %+v, %v", a, err)
	}
	reqs := []guard.BlockRequest{{Prefix: theBlock.Prefix, For: time.Hour, Reason: "why not", By: "nobody"}}
	for range 2 * blockChunk {
		reqs = append(reqs, guard.BlockRequest{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Reason: strings.Repeat("\u00e4", 250)})
	}
	b, err := c.Block(ctx, reqs, true)
	if err != nil || len(b) != len(reqs) || b[0].Block == nil || b[0].Block.ID != 7 || b[1].Hint != "look" {
		t.Errorf("Block: %d, %v", len(b), err)
	}
	me := Operator(os.Getuid())
	if first := f.block[0]; first.By != me || first.For != time.Hour || first.Reason != "why not" || !f.dry {
		t.Errorf("the guard was asked %+v; the name must be %s, whatever the client says", first, me)
	}
	if n, err := c.Sync(ctx); err != nil || n != 17 {
		t.Errorf("Sync: %d, %v", n, err)
	}
	if l, err := c.Unblock(ctx, theBlock.Prefix, "nobody"); err != nil || len(l) != 1 || f.by != me {
		t.Errorf("Unblock: %+v by %q, %v", l, f.by, err)
	}
	var cov *guard.CoveredError
	if _, err := c.Unblock(ctx, one, ""); !errors.As(err, &cov) || cov.By != theBlock.Prefix {
		t.Errorf("a covered address arrives as %v", err)
	}
	if l, err := c.Unblock(ctx, netip.Prefix{}, ""); err == nil || err.Error() != "the filter is stuck" || len(l) != 1 {
		t.Errorf("half done arrives as %v, %v", l, err)
	}
	until := time.Now().Add(time.Hour).Round(time.Second)
	if _, err := c.Allow(ctx, store.AllowEntry{Prefix: one, Note: "office", Until: until}); err != nil || f.allow.By != me || !f.allow.Until.Equal(until) || f.allow.Note != "office" {
		t.Errorf("Allow: %+v, %v", f.allow, err)
	}
	goods := make([]store.Good, 2*learnChunk+1)
	for i := range goods {
		goods[i] = store.Good{Addr: netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: byte(i >> 8), 15: byte(i)}), First: until, Last: until, Messages: 1<<31 - 1}
	}
	if err := c.Learn(ctx, goods); err != nil || len(f.learned) != len(goods) || f.learned[2*learnChunk].Addr != goods[2*learnChunk].Addr {
		t.Errorf("Learn: %d, %v", len(f.learned), err)
	}
	if ok, err := c.Disallow(ctx, one); err != nil || !ok {
		t.Errorf("Disallow: %v, %v", ok, err)
	}
	if _, err := c.Allow(ctx, store.AllowEntry{Name: "dns:mail.example.org", Note: "x"}); err != nil || f.allow.Name != "dns:mail.example.org" || f.allow.Prefix.IsValid() || f.allow.By != me {
		t.Errorf("Allow by name: %+v, %v", f.allow, err)
	}
	if ok, err := c.DisallowName(ctx, "dns:mail.example.org"); err != nil || !ok {
		t.Errorf("DisallowName: %v, %v", ok, err)
	}
	if tr, err := c.Commit(ctx, "nobody", time.Minute); err != nil || tr.State != guard.OnTrial || tr.Until.Unix() != 60 || tr.By != me {
		t.Errorf("Commit: %+v, %v", tr, err)
	}
	if _, err := c.Commit(ctx, "nobody", 0); !errors.Is(err, guard.ErrNoTrial) {
		t.Errorf("Commit without a trial: %v", err)
	}
	f.by = ""
	if ok, err := c.Resume(ctx, "nobody"); err != nil || !ok || f.by != me {
		t.Errorf("Resume: %v by %q, %v", ok, f.by, err)
	}
}

func TestBadRequests(t *testing.T) {
	_, path := start(t, &fake{})
	hc := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	defer hc.CloseIdleConnections()
	for _, x := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/nosuch", "", 404},
		{"POST", "/v1/status", "", 405},
		{"GET", "/v1/history", "", 400},
		{"GET", "/v1/explain?prefix=x", "", 400},
		{"POST", "/v1/block", "", 400},
		{"POST", "/v1/block", "{", 400},
		{"POST", "/v1/block", `{"prefix":"192.0.2.0/24"}{}`, 400},
		{"POST", "/v1/block", `{"prefix":"192.0.2.0/24","by":"root"}`, 400},
		{"POST", "/v1/allow", `{"prefix":"192.0.2.0/24","text":"a\u001b[2J"}`, 400},
		{"POST", "/v1/block", `{"block":[{"prefix":"192.0.2.0/24","reason":"a\u001b[2J"}]}`, 400},
		{"POST", "/v1/block", `{"block":[{"prefix":"192.0.2.0/24","reason":"` + strings.Repeat("x", 501) + `"}]}`, 400},
		{"POST", "/v1/block", strings.Repeat(" ", maxRequest+1) + "{}", 400},
		{"POST", "/v1/unblock", `{}`, 400},
		{"POST", "/v1/unblock", `{"all":true,"prefix":"192.0.2.0/24"}`, 400},
	} {
		req, err := http.NewRequest(x.method, "http://x"+x.path, strings.NewReader(x.body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := hc.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != x.status {
			t.Errorf("%s %s %.40q: status %d, want %d", x.method, x.path, x.body, resp.StatusCode, x.status)
		}
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(file, ""); err == nil {
		t.Error("took the place of a file")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file is now %q, %v", b, err)
	}
	sock := filepath.Join(dir, "sock")
	l, err := Listen(sock, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(sock, ""); !errors.Is(err, ErrRunning) {
		t.Errorf("beside a daemon that answers: %v", err)
	}
	// A daemon that was killed leaves its socket.
	l.(*listener).UnixListener.Close()
	l2, err := Listen(sock, "")
	if err != nil {
		t.Fatalf("after a daemon that was killed: %v", err)
	}
	l2.Close()
	if _, err := os.Stat(sock); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("closed, but there: %v", err)
	}
	if _, err := Listen(sock, "no-such-group"); err == nil {
		t.Error("a group that does not exist is taken")
	}
	if _, err := Dial(t.Context(), sock); !errors.Is(err, ErrNoDaemon) {
		t.Errorf("no daemon: %v", err)
	}
}

// An answer that never ends, or is none, is an error and no more.
func TestBadAnswers(t *testing.T) {
	for _, answer := range []string{"", "{", "nonsense", `{"count":"x"}`, `[1,2`} {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, answer) }))
		srv.Listener.Close()
		srv.Listener = l
		srv.Start()
		c, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Status(t.Context()); err == nil {
			t.Errorf("answer %q is taken", answer)
		}
		c.Close()
		srv.Close()
	}
}

// What arrives at the socket is refused or understood; nothing else.
func FuzzRequest(f *testing.F) {
	f.Add("/v1/block", `{"block":[{"prefix":"192.0.2.0/24","for_ns":1,"reason":"x"}]}`)
	f.Add("/v1/unblock", `{"all":true}`)
	f.Add("/v1/explain?prefix=::%2F0", "")
	f.Fuzz(func(t *testing.T, path, body string) {
		for _, method := range []string{"GET", "POST"} {
			req, err := http.NewRequest(method, "http://x/", strings.NewReader(body))
			if err != nil {
				t.Skip()
			}
			u, err := req.URL.Parse(path)
			if err != nil {
				return
			}
			req.URL = u
			w := httptest.NewRecorder()
			handler(&fake{}).ServeHTTP(w, req)
			if w.Code >= 500 && !strings.Contains(w.Body.String(), "stuck") {
				t.Errorf("%s %q %q: status %d: %s", method, path, body, w.Code, w.Body)
			}
			_, _ = io.Copy(io.Discard, w.Body)
		}
	})
}
