package guard

import (
	"context"
	"log/slog"
	"maps"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/store"
	"github.com/smtpguard/smtpguard/tail"
)

// logState is what is known of one log. next, caughtUp and the counters
// belong to the deciding goroutine; the parser to the following one.
type logState struct {
	Log
	path   string
	others func() []string // files that other logs have, for a pattern

	next     tail.Position
	saved    tail.Position
	moved    bool // next is to be put into the store
	listed   bool // in Guard.logs
	caughtUp bool
	behind   int64
	lastLine time.Time

	lines, events             uint64
	opens, portless, misdated uint64
}

// newLog is a log and where it was read to.
func (g *Guard) newLog(l Log) *logState {
	st := &logState{Log: l, path: l.Path, listed: true}
	pos, ok, err := g.o.Store.Position(l.Path)
	if err != nil {
		g.fault("finding where "+l.Path+" was read to; it is followed from its end", err)
	} else if ok {
		st.next, st.saved = pos, pos
	}
	return st
}

// listLog adds a log to those that are shown: a file of a pattern that has
// appeared.
func (g *Guard) listLog(l *logState) {
	if !l.listed {
		l.listed = true
		g.logs = append(g.logs, l)
	}
}

// dropLog takes a file of a pattern off the list: one that is gone, whose
// place is forgotten, or one that rests. Should a file that is gone appear
// again before the next start, the one who follows the pattern knows it.
func (g *Guard) dropLog(l *logState, gone bool) {
	g.logs = slices.DeleteFunc(g.logs, func(o *logState) bool { return o == l })
	l.listed = false
	if g.unlisted == nil {
		g.unlisted = make(map[string]tail.Position)
	}
	if gone {
		g.unlisted[l.path] = tail.Position{}
	} else if l.moved {
		g.unlisted[l.path] = l.next
	}
}

// follow reads the log and hands the events of each read to the deciding
// goroutine. It waits until they are taken: when decisions are slow, the log
// is read slower, and nothing is lost.
func (l *logState) follow(ctx context.Context, out chan<- input, st *store.Store, log *slog.Logger) error {
	o := tail.Options{Start: tail.End, Log: log}
	emit := func(b tail.Batch) error { return l.hand(ctx, out, b) }
	switch tail.KindOf(l.path) {
	case tail.Pattern:
		return l.followPattern(ctx, out, st, o)
	case tail.Journal:
		return tail.FollowJournal(ctx, l.next, tail.JournalOptions{Options: o, Identifiers: l.Identifiers}, emit)
	case tail.Input:
		in := l.Input
		if in == nil {
			in = os.Stdin
		}
		err := tail.FollowReader(ctx, in, o, emit)
		if ctx.Err() == nil && err == nil {
			log.Warn("standard input has ended: there is no more log; the socket table is still watched")
		}
		return err
	}
	return tail.Follow(ctx, l.path, l.next, o, emit)
}

// followPattern follows each file of a pattern with a state of its own.
func (l *logState) followPattern(ctx context.Context, out chan<- input, st *store.Store, o tail.Options) error {
	var mu sync.Mutex
	files := map[string]*logState{l.path: l}
	file := func(path string) *logState {
		mu.Lock()
		defer mu.Unlock()
		f := files[path]
		if f == nil {
			f = &logState{Log: Log{Path: path, Parser: l.Fork()}, path: path}
			files[path] = f
		}
		return f
	}
	drop := func(path string, gone bool) {
		f := file(path)
		mu.Lock()
		delete(files, path)
		mu.Unlock()
		select {
		case out <- input{log: f, gone: gone, rests: !gone}:
		case <-ctx.Done():
		}
	}
	return tail.FollowPattern(ctx, l.path, o, tail.Each{
		Since: since(l.next),
		From: func(path string) tail.Position {
			at, _, err := st.Position(path)
			if err != nil {
				o.Log.Error("finding where a log was read to; it is followed from its end", "log", path, "err", err)
			}
			return at
		},
		Emit:   func(path string, b tail.Batch) error { return file(path).hand(ctx, out, b) },
		Others: l.others,
		Rest:   func(path string) { drop(path, false) },
		Gone:   func(path string) { drop(path, true) },
	})
}

// othersThan returns what lists the files that are not for the pattern logs[i]:
// those that are named one by one, and those of patterns before it.
func othersThan(logs []Log, i int) func() []string {
	return func() (names []string) {
		for k, l := range logs {
			if k != i && (k < i || tail.KindOf(l.Path) != tail.Pattern) {
				names = append(names, tail.Find(l.Path)...)
			}
		}
		return names
	}
}

// since is when a pattern was last looked at.
func since(p tail.Position) time.Time {
	if p.ModTime == 0 {
		return time.Time{}
	}
	return time.Unix(0, p.ModTime)
}

// hand parses the lines and hands their events over.
func (l *logState) hand(ctx context.Context, out chan<- input, b tail.Batch) error {
	in := input{log: l, lines: len(b.Lines), caughtUp: b.CaughtUp, behind: b.Behind, late: b.Late, next: b.Next}
	var tick detector.Event
	for _, line := range b.Lines {
		var ev detector.Event
		if !l.Parser.Parse(line.Text, &ev) {
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
	select {
	case out <- in:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
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
	if in.next.IsZero() || in.next == l.next {
		return
	}
	// When a pattern was last looked for is saved with what its files gave,
	// and else now and then.
	if tail.KindOf(l.path) != tail.Pattern || in.next.ModTime-l.saved.ModTime >= int64(time.Minute) {
		l.moved = true
	}
	l.next = in.next
}

// savePositions writes how far the logs were read. A crash in between makes
// the next start read some lines again, which costs nothing: what they led
// to is in the store already.
func (g *Guard) savePositions() {
	m := maps.Clone(g.unlisted)
	if m == nil {
		m = make(map[string]tail.Position)
	}
	for _, l := range g.logs {
		if l.moved {
			m[l.path] = l.next
		}
	}
	if len(m) == 0 {
		return
	}
	for _, l := range g.logs {
		if tail.KindOf(l.path) == tail.Pattern && l.next != l.saved {
			m[l.path] = l.next
		}
	}
	if err := g.o.Store.SavePositions(m); err != nil {
		g.fault("saving how far the log was read", err)
		return
	}
	clear(g.unlisted)
	for _, l := range g.logs {
		if _, ok := m[l.path]; ok {
			l.saved, l.moved = l.next, false
		}
	}
}
