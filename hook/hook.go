package hook

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"
)

// Config says who is told of what. Exactly one of Mail, URL and Command is set.
type Config struct {
	Name    string // for log and metrics
	On      []string
	Mail    string // a recipient
	From    string // of the mail; "": the mail program's choice
	URL     string
	Command []string // absolute path and arguments; no shell
	// Every is the least time between two messages.
	Every time.Duration
	// Timeout ends telling that takes too long.
	Timeout time.Duration
	// HeaderFile has one more header line for URL, SecretFile the key that
	// signs what is sent there; read each time. "": none.
	HeaderFile, SecretFile string
}

// Options are what all hooks share.
type Options struct {
	// Sendmail is the program that takes mail. Before is what its command line
	// begins with, absolute; empty: nothing.
	Sendmail string
	Before   []string
	Version  string
	Log      *slog.Logger
	// Fault is told once when a hook begins to fail; nil: the log is. It may
	// take its time.
	Fault func(ctx context.Context, what string, err error)
}

// Hooks are told of events, and tell others.
type Hooks struct {
	o     Options
	host  string
	hooks []*hook
}

// Status is how a hook fares. Counters count since the start.
type Status struct {
	Name    string    `json:"name"`
	Events  uint64    `json:"events"`          // taken
	Told    uint64    `json:"told"`            // of them, events that somebody was told of
	Waiting int       `json:"waiting"`         // of them, events that wait to be told
	Sent    uint64    `json:"sent"`            // messages
	Failed  uint64    `json:"failed"`          // tries that failed
	Error   string    `json:"error,omitempty"` // of the last try, if it failed
	Since   time.Time `json:"since,omitzero"`  // it fails since
}

// hook is one of them. The fields below mu are shared with Tell.
type hook struct {
	c    Config
	send func(ctx context.Context, m *Message) error

	wake    chan struct{}
	mu      sync.Mutex
	pending batch
	status  Status
}

// New makes the hooks; Run lets them work.
func New(configs []Config, o Options) *Hooks {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	host, _ := os.Hostname()
	if host = word(host); host == "" {
		host = "localhost"
	}
	h := &Hooks{o: o, host: host}
	taken := make(map[string]bool)
	for _, c := range configs {
		taken[c.Name] = true
	}
	for i, c := range configs {
		if c.Name == "" {
			c.Name = fmt.Sprintf("hook%d", i+1)
			for n := 2; taken[c.Name]; n++ { // somebody else's, as he was named
				c.Name = fmt.Sprintf("hook%d-%d", i+1, n)
			}
			taken[c.Name] = true
		}
		k := &hook{c: c, wake: make(chan struct{}, 1), status: Status{Name: c.Name}}
		switch {
		case c.URL != "":
			k.send = newWeb(c, o.Version).send
		case len(c.Command) > 0:
			k.send = (&command{c, o.Log}).send
		default:
			k.send = (&mailer{c, slices.Concat(o.Before, []string{o.Sendmail})}).send
		}
		h.hooks = append(h.hooks, k)
	}
	return h
}

// Tell takes an event for every hook that wants it. It waits for nothing and
// keeps no more than a summary; any goroutine may call it, before, while and
// after Run.
func (h *Hooks) Tell(e Event) {
	washed := false
	for _, k := range h.hooks {
		if !slices.Contains(k.c.On, e.On) {
			continue
		}
		if !washed {
			e.wash()
			washed = true
		}
		k.mu.Lock()
		k.pending.add(e)
		k.status.Events += uint64(e.Count)
		k.mu.Unlock()
		select {
		case k.wake <- struct{}{}:
		default:
		}
	}
}

// Status says how each hook fares.
func (h *Hooks) Status() []Status {
	var list []Status
	for _, k := range h.hooks {
		k.mu.Lock()
		s := k.status
		k.mu.Unlock()
		s.Waiting = int(s.Events - s.Told)
		list = append(list, s)
	}
	return list
}

// grace is how long hooks may still tell what waits when Run is to end.
const grace = 5 * time.Second

// Run tells until ctx ends, then what waits, once, within a few seconds. What
// it started has ended when it returns.
func (h *Hooks) Run(ctx context.Context) {
	hard, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var late *time.Timer
	var mu sync.Mutex
	stop := context.AfterFunc(ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		late = time.AfterFunc(grace, cut)
	})
	var wg sync.WaitGroup
	for _, k := range h.hooks {
		wg.Go(func() { h.run(ctx, hard, k) })
	}
	wg.Wait()
	stop()
	mu.Lock()
	defer mu.Unlock()
	if late != nil {
		late.Stop()
	}
}

const (
	// settle is how long the first event waits for those of the same act: the
	// hogs of one flood are blocked together.
	settle     = 500 * time.Millisecond
	retryLeast = 10 * time.Second
	retryMost  = time.Hour
)

// run works for one hook. hard ends later than ctx.
func (h *Hooks) run(ctx, hard context.Context, k *hook) {
	var m *Message // being told; the same one again after a failure
	var next time.Time
	var pause time.Duration
	for ctx.Err() == nil {
		if wait := time.Until(next); wait > 0 {
			t := time.NewTimer(wait)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
			}
			continue
		}
		if m == nil {
			m = h.take(k)
		}
		if m == nil {
			select {
			case <-k.wake:
				next = time.Now().Add(settle)
			case <-ctx.Done():
			}
			continue
		}
		start := time.Now()
		err := h.tell(hard, k, m)
		if err == nil {
			if pause > 0 {
				h.o.Log.Info("the hook works again", "hook", k.c.Name)
			}
			m, next, pause = nil, start.Add(k.c.Every), 0
			continue
		}
		if pause == 0 && ctx.Err() == nil {
			h.fault(ctx, k, err)
		}
		pause = min(max(2*pause, k.c.Every, retryLeast), retryMost)
		next = time.Now().Add(pause)
	}
	// The end: each message once, unless nobody has listened lately.
	for pause == 0 && hard.Err() == nil {
		if m == nil {
			m = h.take(k)
		}
		if m == nil || h.tell(hard, k, m) != nil {
			break
		}
		m = nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if n := k.status.Events - k.status.Told; n > 0 {
		h.o.Log.Warn("smtpguard stops before a hook was told of all events", "hook", k.c.Name, "events", n)
	}
}

func (h *Hooks) fault(ctx context.Context, k *hook, err error) {
	what := "the hook " + k.c.Name + " fails, and is tried again"
	if h.o.Fault == nil {
		h.o.Log.Error(what, "err", err)
		return
	}
	h.o.Fault(ctx, what, err)
}

// take makes a message of what waits; nil if nothing does.
func (h *Hooks) take(k *hook) *Message {
	k.mu.Lock()
	b := k.pending
	k.pending = batch{}
	k.mu.Unlock()
	if b.total == 0 {
		return nil
	}
	return &Message{Version: Version, ID: rand.Text(), Hook: k.c.Name, Host: h.host, Program: "smtpguard " + h.o.Version, Time: time.Now().UTC(),
		Subject: b.subject(), Total: b.total, Counts: maps.Clone(b.counts), First: b.first, Last: b.last, Events: b.events, LeftOut: b.left}
}

// tell sends a message and notes what became of it.
func (h *Hooks) tell(ctx context.Context, k *hook, m *Message) error {
	ctx, cancel := context.WithTimeoutCause(ctx, k.c.Timeout, errLate)
	defer cancel()
	err := k.send(ctx, m)
	if err != nil && errors.Is(context.Cause(ctx), errLate) {
		err = fmt.Errorf("it took longer than %s: %w", k.c.Timeout, err)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	s := &k.status
	if err == nil {
		s.Sent++
		s.Told += uint64(m.Total)
		s.Error, s.Since = "", time.Time{}
		return nil
	}
	s.Failed++
	s.Error = printable(err.Error(), whyMost)
	if s.Since.IsZero() {
		s.Since = time.Now()
	}
	return errors.New(s.Error)
}

var errLate = errors.New("too late")
