package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Outcome is what became of an attempt to deliver a mail.
type Outcome string

const (
	Delivered Outcome = "ok"      // the server took responsibility for it
	Refused   Outcome = "421"     // the server is full
	TimedOut  Outcome = "timeout" // no answer within the sender's patience
	Failed    Outcome = "failed"  // anything else; Attempt.Err says what
)

// Attempt is one try of a sender to deliver one mail.
type Attempt struct {
	Start   time.Time
	Took    time.Duration
	Outcome Outcome
	Err     error // nil if delivered
}

// End is when the attempt was over.
func (a Attempt) End() time.Time { return a.Start.Add(a.Took) }

// Sender delivers mail as a proper mail server does, one a time slice, and
// keeps a record.
type Sender struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex
	attempts []Attempt // in the order of their end
	changed  chan struct{}
}

// Send starts a sender that tries one mail every interval, whatever became
// of the ones before, and gives each the time patience. It goes on until
// Stop, or until the world ends.
func (w *World) Send(ctx context.Context, from netip.Addr, interval, patience time.Duration) *Sender {
	ctx, cancel := context.WithCancel(ctx)
	s := &Sender{cancel: cancel, changed: make(chan struct{})}
	s.wg.Go(func() {
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			s.wg.Go(func() {
				a := w.Deliver(ctx, from, patience)
				if ctx.Err() == nil {
					s.record(a)
				}
			})
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	w.atClose(s.Stop)
	return s
}

// Stop ends the sender. It may be called more than once.
func (s *Sender) Stop() {
	s.cancel()
	s.wg.Wait()
}

func (s *Sender) record(a Attempt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.attempts = append(s.attempts, a)
	close(s.changed)
	s.changed = make(chan struct{})
}

// Attempts are all attempts so far, in the order of their end.
func (s *Sender) Attempts() []Attempt {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.attempts)
}

// First waits for an attempt with this outcome that was started after since,
// and returns the one that ended first.
func (s *Sender) First(ctx context.Context, o Outcome, since time.Time) (Attempt, error) {
	var found Attempt
	err := s.wait(ctx, func(all []Attempt) bool {
		for _, a := range all {
			if a.Outcome == o && a.Start.After(since) {
				found = a
				return true
			}
		}
		return false
	})
	if err != nil {
		return Attempt{}, fmt.Errorf("waiting for a mail with outcome %q: %w (%s)", o, err, s.Summary(since))
	}
	return found, nil
}

// Steady waits until n attempts in a row that were started after since have
// been delivered, and returns the first of them.
func (s *Sender) Steady(ctx context.Context, n int, since time.Time) (Attempt, error) {
	var found Attempt
	err := s.wait(ctx, func(all []Attempt) bool {
		row := 0
		for i, a := range all {
			switch {
			case a.Start.Before(since):
			case a.Outcome != Delivered:
				row = 0
			default:
				if row++; row == 1 {
					found = all[i]
				}
				if row == n {
					return true
				}
			}
		}
		return false
	})
	if err != nil {
		return Attempt{}, fmt.Errorf("waiting for %d delivered mails in a row: %w (%s)", n, err, s.Summary(since))
	}
	return found, nil
}

// Summary says in words what became of the attempts started after since.
func (s *Sender) Summary(since time.Time) string {
	count := map[Outcome]int{}
	var last error
	for _, a := range s.Attempts() {
		if a.Start.After(since) {
			count[a.Outcome]++
			if a.Outcome == Failed {
				last = a.Err
			}
		}
	}
	text := fmt.Sprintf("%d delivered, %d refused, %d timed out, %d failed", count[Delivered], count[Refused], count[TimedOut], count[Failed])
	if last != nil {
		text += fmt.Sprintf(", the last one by: %v", last)
	}
	return text
}

func (s *Sender) wait(ctx context.Context, found func([]Attempt) bool) error {
	for {
		s.mu.Lock()
		ok, changed := found(s.attempts), s.changed
		s.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Deliver tries to deliver one mail from an address, within patience.
func (w *World) Deliver(ctx context.Context, from netip.Addr, patience time.Duration) Attempt {
	a := Attempt{Start: time.Now()}
	a.Err = w.transaction(ctx, from, a.Start.Add(patience))
	a.Took = time.Since(a.Start)
	var reply *replyError
	switch {
	case a.Err == nil:
		a.Outcome = Delivered
	case errors.As(a.Err, &reply) && strings.HasPrefix(reply.line, "421"):
		a.Outcome = Refused
	case errors.Is(a.Err, os.ErrDeadlineExceeded), errors.Is(a.Err, context.DeadlineExceeded):
		a.Outcome = TimedOut
	default:
		a.Outcome = Failed
	}
	return a
}

// replyError is an answer of the server that is not the wanted one.
type replyError struct{ command, line string }

func (e *replyError) Error() string {
	return fmt.Sprintf("%s was answered with %q", e.command, e.line)
}

// transaction is a complete delivery, from the greeting to QUIT.
func (w *World) transaction(ctx context.Context, from netip.Addr, deadline time.Time) error {
	c, err := w.dial(ctx, from, w.smtp(from), 0, time.Until(deadline))
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	in := bufio.NewReaderSize(c, 1024)
	for _, step := range []struct{ command, want string }{
		{"", "220"},
		{"EHLO legit.example\r\n", "250"},
		{"MAIL FROM:<a@legit.example>\r\n", "250"},
		{"RCPT TO:<u@" + mailDomain + ">\r\n", "250"},
		{"DATA\r\n", "354"},
		{"From: a@legit.example\r\nTo: u@" + mailDomain + "\r\nSubject: hello\r\n\r\nhello\r\n.\r\n", "250"},
	} {
		if _, err := io.WriteString(c, step.command); err != nil {
			return err
		}
		if err := reply(in, step.command, step.want); err != nil {
			return err
		}
	}
	// The mail is delivered; what becomes of the farewell does not matter.
	if _, err := io.WriteString(c, "QUIT\r\n"); err == nil {
		reply(in, "QUIT", "221")
	}
	return nil
}

// reply reads one answer of one or more lines.
func reply(in *bufio.Reader, command, want string) error {
	for range 64 {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		if len(line) > 3 && line[3] == '-' {
			continue
		}
		if !strings.HasPrefix(string(line), want) {
			command, _, _ = strings.Cut(command, "\r")
			if command == "" {
				command = "the connection"
			}
			return &replyError{command, strings.TrimSpace(string(line))}
		}
		return nil
	}
	return errors.New("the server's answer does not end")
}
