package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// ErrNoDaemon: nobody answers on the socket.
var ErrNoDaemon = errors.New("no smtpguard is running")

// SilentError: a daemon runs, and does not answer: it was stopped, waits for a
// disk, or the machine has no time for it.
type SilentError struct {
	PID    int // 0: not known
	Waited time.Duration
}

func (e *SilentError) Error() string {
	if e.Waited == 0 {
		return e.Daemon() + " runs, and does not answer"
	}
	return fmt.Sprintf("%s runs, and has not answered for %s", e.Daemon(), e.Waited)
}

// Daemon names it in a sentence.
func (e *SilentError) Daemon() string {
	if e.PID == 0 {
		return "the daemon"
	}
	return fmt.Sprintf("the daemon (process %d)", e.PID)
}

// AliveWithin is how long the daemon may take to say anything at all.
const AliveWithin = 5 * time.Second

// Client speaks to the daemon. It is a Guard; the names of operators that are
// passed to it are not sent, since the daemon asks the kernel.
type Client struct {
	http *http.Client
	path string
	pid  int // of the daemon
}

// Dial makes a Client for the socket at path. The error wraps ErrNoDaemon if
// there is no socket or nobody listens on it, and is a *SilentError if somebody
// does and says nothing; it is another one if the socket may not be opened.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return nil, fmt.Errorf("%w (nobody answers on %s)", ErrNoDaemon, path)
	case errors.Is(err, unix.EAGAIN): // nobody takes those that wait
		return nil, &SilentError{}
	case err != nil:
		return nil, fmt.Errorf("opening the daemon's socket: %w", err)
	}
	c := &Client{path: path, http: &http.Client{
		Timeout: deadline,
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return d.DialContext(ctx, "unix", path)
		}},
	}}
	if cred, err := credentials(conn.(*net.UnixConn)); err == nil {
		c.pid = int(cred.Pid)
	}
	conn.Close()
	alive, cancel := context.WithTimeout(ctx, AliveWithin)
	defer cancel()
	req, err := http.NewRequestWithContext(alive, http.MethodHead, "http://smtpguard/", nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req) // whatever it answers
	if err != nil {
		return nil, c.failed(ctx, err, AliveWithin)
	}
	resp.Body.Close()
	return c, nil
}

// failed is what err, of a request that had so long, means.
func (c *Client) failed(ctx context.Context, err error, had time.Duration) error {
	var late interface{ Timeout() bool }
	if ctx.Err() == nil && errors.As(err, &late) && late.Timeout() || errors.Is(err, unix.EAGAIN) {
		return &SilentError{PID: c.pid, Waited: had}
	}
	return fmt.Errorf("asking the daemon: %w", err)
}

// Close lets go of idle connections.
func (c *Client) Close() error { c.http.CloseIdleConnections(); return nil }

func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://smtpguard"+path, body)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.failed(ctx, err, deadline)
	}
	defer resp.Body.Close()
	dec := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))
	if resp.StatusCode != http.StatusOK {
		var f failure
		if err := dec.Decode(&f); err != nil || f.Error == "" {
			return fmt.Errorf("the daemon answered %s", resp.Status)
		}
		if len(f.Blocks) > 0 {
			if list, ok := out.(*[]store.Block); ok {
				*list = f.Blocks
			}
		}
		if f.Covered != nil {
			return f.Covered
		}
		if f.NoTrial {
			return guard.ErrNoTrial
		}
		return errors.New(f.Error)
	}
	if err := dec.Decode(out); err != nil {
		if late := (*SilentError)(nil); errors.As(c.failed(ctx, err, deadline), &late) {
			return late
		}
		return fmt.Errorf("reading the daemon's answer: %w", err)
	}
	return nil
}

func (c *Client) get(ctx context.Context, path string, p netip.Prefix, out any) error {
	if p.IsValid() {
		path += "?prefix=" + url.QueryEscape(p.String())
	}
	return c.call(ctx, http.MethodGet, path, nil, out)
}

func (c *Client) Status(ctx context.Context) (v guard.Status, err error) {
	err = c.get(ctx, pathStatus, netip.Prefix{}, &v)
	return v, err
}

func (c *Client) View(ctx context.Context) (v guard.View, err error) {
	err = c.get(ctx, pathView, netip.Prefix{}, &v)
	return v, err
}

func (c *Client) Blocks(ctx context.Context) (v []guard.BlockInfo, err error) {
	err = c.get(ctx, pathBlocks, netip.Prefix{}, &v)
	return v, err
}

func (c *Client) History(ctx context.Context, p netip.Prefix) (v []guard.BlockInfo, err error) {
	err = c.get(ctx, pathHistory, p, &v)
	return v, err
}

func (c *Client) Explain(ctx context.Context, p netip.Prefix) (v guard.Explanation, err error) {
	err = c.get(ctx, pathExplain, p, &v)
	return v, err
}

func (c *Client) Allowed(ctx context.Context) (v []guard.AllowInfo, err error) {
	err = c.get(ctx, pathAllowed, netip.Prefix{}, &v)
	return v, err
}

func (c *Client) Block(ctx context.Context, reqs []guard.BlockRequest, dry bool) (out []guard.BlockOutcome, err error) {
	for chunk := range slices.Chunk(reqs, blockChunk) {
		var part []guard.BlockOutcome
		if err := c.call(ctx, http.MethodPost, pathBlock, change{Block: chunk, Dry: dry}, &part); err != nil {
			return out, err
		}
		out = append(out, part...)
	}
	return out, nil
}

func (c *Client) Sync(ctx context.Context) (n int, err error) {
	err = c.call(ctx, http.MethodPost, pathSync, change{}, &n)
	return n, err
}

func (c *Client) Unblock(ctx context.Context, p netip.Prefix, _ string) (v []store.Block, err error) {
	err = c.call(ctx, http.MethodPost, pathUnblock, change{Prefix: p, All: !p.IsValid()}, &v)
	return v, err
}

func (c *Client) Allow(ctx context.Context, e store.AllowEntry) (v []store.Block, err error) {
	err = c.call(ctx, http.MethodPost, pathAllow, change{Prefix: e.Prefix, Name: e.Name, Text: e.Note, Until: e.Until}, &v)
	return v, err
}

func (c *Client) Disallow(ctx context.Context, p netip.Prefix) (v bool, err error) {
	err = c.call(ctx, http.MethodPost, pathForget, change{Prefix: p}, &v)
	return v, err
}

func (c *Client) DisallowName(ctx context.Context, name string) (v bool, err error) {
	err = c.call(ctx, http.MethodPost, pathForget, change{Name: name}, &v)
	return v, err
}

func (c *Client) Commit(ctx context.Context, _ string, again time.Duration) (v guard.Trial, err error) {
	err = c.call(ctx, http.MethodPost, pathCommit, change{Again: again}, &v)
	return v, err
}

func (c *Client) Resume(ctx context.Context, _ string) (v bool, err error) {
	err = c.call(ctx, http.MethodPost, pathResume, change{}, &v)
	return v, err
}

func (c *Client) Learn(ctx context.Context, goods []store.Good) error {
	for chunk := range slices.Chunk(goods, learnChunk) {
		var n int
		if err := c.call(ctx, http.MethodPost, pathLearn, change{Good: chunk}, &n); err != nil {
			return err
		}
	}
	return nil
}
