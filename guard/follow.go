package guard

import (
	"context"
	"log/slog"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/tail"
)

// logState is what is known of one log. next, caughtUp and the counters
// belong to the deciding goroutine; the parser to the following one.
type logState struct {
	path   string
	parser Parser

	next     tail.Position
	moved    bool // next is not in the store yet
	caughtUp bool
	behind   int64
	lastLine time.Time

	lines, events             uint64
	opens, portless, misdated uint64
}

// follow reads the log and hands the events of each read to the deciding
// goroutine. It waits until they are taken: when decisions are slow, the log
// is read slower, and nothing is lost.
func (l *logState) follow(ctx context.Context, out chan<- input, log *slog.Logger) error {
	return tail.Follow(ctx, l.path, l.next, tail.Options{Start: tail.End, Log: log}, func(b tail.Batch) error {
		in := input{log: l, lines: len(b.Lines), caughtUp: b.CaughtUp, behind: b.Behind}
		var tick detector.Event
		for _, line := range b.Lines {
			var ev detector.Event
			if !l.parser.Parse(line.Text, &ev) {
				continue
			}
			if ev.Time.After(in.last) {
				in.last = ev.Time
			}
			if ev.Kind == detector.Tick {
				tick = ev // only the last of a run of them says anything
				continue
			}
			if tick.Kind != detector.None {
				in.events = append(in.events, tick)
				tick.Kind = detector.None
			}
			in.events = append(in.events, ev)
		}
		if tick.Kind != detector.None {
			in.events = append(in.events, tick)
		}
		if n := len(b.Lines); n > 0 {
			in.next, in.moved = b.Lines[n-1].Next, true
		}
		select {
		case out <- in:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
}

func (l *logState) status() LogStatus {
	return LogStatus{Path: l.path, Lines: l.lines, Opens: l.opens, Portless: l.portless,
		Misdated: l.misdated, Behind: l.behind, CaughtUp: l.caughtUp, LastLine: l.lastLine}
}

// took notes where the log was read to.
func (l *logState) took(in input) {
	l.lines += uint64(in.lines)
	l.events += uint64(len(in.events))
	l.caughtUp, l.behind = in.caughtUp, in.behind
	if in.moved {
		l.next, l.moved = in.next, true
	}
}

// savePositions writes how far the logs were read. A crash in between makes
// the next start read some lines again, which costs nothing: what they led
// to is in the store already.
func (g *Guard) savePositions() {
	m := make(map[string]tail.Position)
	for _, l := range g.logs {
		if l.moved {
			m[l.path] = l.next
		}
	}
	if len(m) == 0 {
		return
	}
	if err := g.o.Store.SavePositions(m); err != nil {
		g.fault("saving how far the log was read", err)
		return
	}
	for _, l := range g.logs {
		l.moved = false
	}
}
