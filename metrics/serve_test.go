package metrics

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func serve(t *testing.T) (addr string, stop func()) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- full().Serve(ctx, l) }()
	return l.Addr().String(), func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func get(addr, path string) (int, string, error) {
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}
	res, err := c.Get("http://" + addr + path)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

func TestServe(t *testing.T) {
	addr, stop := serve(t)
	defer stop()
	code, body, err := get(addr, "/metrics")
	if err != nil || code != 200 || !strings.Contains(body, "smtpguard_pressure_ratio 0.97") || !strings.Contains(body, "process_resident_memory_bytes") {
		t.Errorf("%d %v %.200s", code, err, body)
	}
	for path, want := range map[string]int{"/": 404, "/debug/pprof/": 404, "/metrics/..": 404} {
		if code, _, err := get(addr, path); code != want || err != nil {
			t.Errorf("%s: %d, want %d: %v", path, code, want, err)
		}
	}
	res, err := http.Post("http://"+addr+"/metrics", "text/plain", strings.NewReader("x"))
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 405 {
		t.Errorf("POST: %d", res.StatusCode)
	}
	http.DefaultClient.CloseIdleConnections()
	// A header without end.
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = fmt.Fprintf(c, "GET /metrics HTTP/1.1\r\nHost: x\r\nX: %s", strings.Repeat("x", 1<<20))
	b, _ := io.ReadAll(c)
	if len(b) > 0 && !strings.HasPrefix(string(b), "HTTP/1.1 431") {
		t.Errorf("%.100s", b)
	}
}

// Clients that say nothing are let go, and then others are served.
func TestSlowClients(t *testing.T) {
	addr, stop := serve(t)
	defer stop()
	for range connectionsMost {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, _ = io.WriteString(c, "GET /met")
	}
	code, body, err := get(addr, "/metrics")
	if err != nil || code != 200 || len(body) < 1000 {
		t.Errorf("%d %v", code, err)
	}
}
