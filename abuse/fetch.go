package abuse

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// What is read of a stranger's answer, and how often a server is asked.
const (
	maxBody      = 1 << 20
	maxRedirects = 5
	bucketSize   = 5           // questions at once
	bucketEvery  = time.Second // and one more each
	maxBackoff   = time.Hour
	minBackoff   = time.Minute
)

var (
	// errLater: the server asked not to be asked now.
	errLater = errors.New("not looked up yet")
	// errNone: an answer that there is nothing; worth remembering.
	errNone = errors.New("nothing is known there")
)

// fetcher asks HTTP servers, within bounds: HTTPS, a few redirects, never a
// private address, a bounded body, and as often as a server likes.
type fetcher struct {
	client *http.Client
	agent  string
	// private lets tests talk to local servers, by plain HTTP too.
	private bool

	mu      sync.Mutex
	servers map[string]*server
}

// server is what is remembered of one that is asked.
type server struct {
	tokens  float64
	at      time.Time
	backoff time.Time // not before this
}

func newFetcher(agent string, private bool) *fetcher {
	f := &fetcher{agent: clean(agent, 200), private: private, servers: map[string]*server{}}
	dialer := &net.Dialer{Timeout: 5 * time.Second, Control: func(_, address string, _ syscall.RawConn) error {
		// Here, behind the name service: a name may lead anywhere.
		ap, err := netip.ParseAddrPort(address)
		if err != nil {
			return err
		}
		if a := ap.Addr().Unmap(); !private && isReserved(netip.PrefixFrom(a, a.BitLen())) {
			return fmt.Errorf("%s is not an address on the Internet", a)
		}
		return nil
	}}
	f.client = &http.Client{
		Transport: &http.Transport{
			DialContext: dialer.DialContext, TLSHandshakeTimeout: 5 * time.Second, ResponseHeaderTimeout: 10 * time.Second,
			MaxResponseHeaderBytes: 64 << 10, MaxIdleConns: 4, IdleConnTimeout: 10 * time.Second, ForceAttemptHTTP2: true,
		},
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return errors.New("too many redirects")
			}
			return f.allowed(req.URL)
		},
	}
	return f
}

func (f *fetcher) close() { f.client.CloseIdleConnections() }

func (f *fetcher) allowed(u *url.URL) error {
	if u.Scheme != "https" && !f.private {
		return fmt.Errorf("%s is not HTTPS", clean(u.Redacted(), 200))
	}
	if u.User != nil {
		return errors.New("an address with a password in it")
	}
	return nil
}

// RoundTrip makes the bounds hold for libraries that bring their own client.
func (f *fetcher) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := f.allowed(req.URL); err != nil {
		return nil, err
	}
	if err := f.admit(req.Context(), req.URL.Host); err != nil {
		return nil, err
	}
	resp, err := f.client.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	f.heed(req.URL.Host, resp)
	resp.Body = &boundedBody{ReadCloser: resp.Body, left: maxBody}
	return resp, nil
}

// boundedBody ends with an error where there is too much.
type boundedBody struct {
	io.ReadCloser
	left int64
}

var errTooLong = fmt.Errorf("the answer is longer than %d bytes", maxBody)

func (b *boundedBody) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// get asks for a URL and returns the body of a 200 answer and the URL that it
// came from in the end. errNone for 404; errLater for 429, 5xx and while the
// server is to be left alone.
func (f *fetcher) get(ctx context.Context, rawURL, accept string) (body []byte, from string, err error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, "", err
	}
	if err := f.allowed(u); err != nil {
		return nil, "", err
	}
	if err := f.admit(ctx, u.Host); err != nil {
		return nil, "", err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, rawURL, nil)
	if err != nil {
		return nil, "", err
	}
	req.Header.Set("User-Agent", f.agent)
	req.Header.Set("Accept", accept)
	resp, err := f.client.Do(req)
	if err != nil {
		return nil, "", shortError(err)
	}
	defer resp.Body.Close()
	from = clean(resp.Request.URL.Redacted(), 300)
	f.heed(resp.Request.URL.Host, resp)
	switch {
	case resp.StatusCode == http.StatusOK:
	case resp.StatusCode == http.StatusNotFound:
		return nil, from, fmt.Errorf("%w (%s)", errNone, from)
	case resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500:
		return nil, from, fmt.Errorf("%w: %s answered %d", errLater, clean(resp.Request.URL.Host, 100), resp.StatusCode)
	default:
		return nil, from, fmt.Errorf("%s answered %d", clean(resp.Request.URL.Host, 100), resp.StatusCode)
	}
	body, err = io.ReadAll(&boundedBody{ReadCloser: resp.Body, left: maxBody})
	if err != nil {
		return nil, from, shortError(err)
	}
	return body, from, nil
}

// shortError leaves the URL out of what net/http says; the caller names it.
func shortError(err error) error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("no answer in time: %w", context.DeadlineExceeded)
	}
	return err
}

// admit waits for the turn of a server.
func (f *fetcher) admit(ctx context.Context, host string) error {
	for {
		wait, err := f.turn(host, time.Now())
		if err != nil || wait <= 0 {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return fmt.Errorf("%w: %s is asked once a second", errLater, clean(host, 100))
		}
	}
}

func (f *fetcher) turn(host string, now time.Time) (time.Duration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	s := f.servers[host]
	if s == nil {
		if len(f.servers) >= 1000 { // redirects name hosts too
			clear(f.servers)
		}
		s = &server{tokens: bucketSize, at: now}
		f.servers[host] = s
	}
	if now.Before(s.backoff) {
		return 0, fmt.Errorf("%w: %s wants to be left alone until %s UTC", errLater, clean(host, 100), s.backoff.UTC().Format("15:04"))
	}
	s.tokens = min(bucketSize, s.tokens+float64(now.Sub(s.at))/float64(bucketEvery))
	s.at = now
	if s.tokens >= 1 {
		s.tokens--
		return 0, nil
	}
	return time.Duration((1 - s.tokens) * float64(bucketEvery)), nil
}

// heed remembers that a server wants to be left alone.
func (f *fetcher) heed(host string, resp *http.Response) {
	if resp.StatusCode != http.StatusTooManyRequests && resp.StatusCode < 500 {
		return
	}
	d := minBackoff
	if s := strings.TrimSpace(resp.Header.Get("Retry-After")); s != "" {
		if n, err := strconv.ParseUint(s, 10, 31); err == nil {
			d = time.Duration(n) * time.Second
		} else if t, err := http.ParseTime(s); err == nil {
			d = time.Until(t)
		}
	}
	d = min(max(d, time.Second), maxBackoff)
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := f.servers[host]; s != nil {
		s.backoff = time.Now().Add(d)
	} else if len(f.servers) < 1000 {
		f.servers[host] = &server{tokens: bucketSize, at: time.Now(), backoff: time.Now().Add(d)}
	}
}
