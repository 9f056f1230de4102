package tail

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Start is where to begin in a log of which nothing is known.
type Start uint8

const (
	// Beginning of the file: history counts. Rotated files are not read.
	Beginning Start = iota
	// End of the file, after its last whole line: only what comes from now
	// on counts. A file that appears later is read from its beginning.
	End
)

// Options of Follow. The zero value is good.
type Options struct {
	// MaxLine is the most bytes of a line that are kept; the rest of it is
	// read and dropped. 0 means 64 KiB.
	MaxLine int
	// Poll is how often to look without having been told to. 0 means 1 s.
	Poll time.Duration
	// NoInotify leaves only the looking at intervals.
	NoInotify bool
	// Start is used if the position to resume at is zero.
	Start Start
	// Grace is how long a rotated file must be quiet before it counts as
	// finished, because its writers hold it open. 0 means 250 ms. After 20
	// times as long it is finished even if it is still being written to.
	Grace time.Duration
	// gone: Follow ends with errGone when there has been no file under the
	// log's name for so long and everything is read; 0: never.
	gone time.Duration
	// files is how many files of a pattern are followed at once; 0: maxFiles.
	files int
	// Log gets rotations as Info and what hinders reading as Warn, once each
	// time it begins. nil: nowhere.
	Log *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.MaxLine <= 0 {
		o.MaxLine = 64 << 10
	}
	if o.Poll <= 0 {
		o.Poll = time.Second
	}
	if o.Grace <= 0 {
		o.Grace = 250 * time.Millisecond
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o
}

const (
	// readSize is the most that is read, and emitted, at once.
	readSize = 128 << 10
	// maxQueue is how many newer files are held open while an older one is
	// read, so that they can be deleted without loss.
	maxQueue = 32
	// maxDone is how many finished files are remembered, so that one which
	// comes back under the log's name is not read twice.
	maxDone = 32
	// graceMax is how many grace times a rotated file that goes on being
	// written to may hold up the new one.
	graceMax = 20
)

// Follow delivers the lines of the log at path, a File or a Dated one, from a
// position on, and goes on until ctx ends, when it returns nil, or emit fails, when it returns that
// error. Everything else that can go wrong (no such file, no permission, an
// error of the disk) is told to Options.Log and tried again.
//
// emit is called from one goroutine, with the lines of one read, in order.
// While it blocks nothing is read, so nothing is lost or piled up: the file is
// the queue. When Follow has returned, all it had started has ended.
func Follow(ctx context.Context, path string, from Position, o Options, emit func(Batch) error) error {
	o = o.withDefaults()
	names, err := namesOf(path)
	if err != nil {
		return err
	}
	t := &follower{
		path:  filepath.Clean(path),
		names: names,
		from:  from,
		o:     o,
		emit:  emit,
		split: splitter{max: o.MaxLine},
		buf:   make([]byte, readSize),
		watch: newWatcher(o.Log, o.NoInotify),
	}
	defer t.watch.close()
	defer t.close()
	return t.run(ctx)
}

// follower is the state of one Follow.
type follower struct {
	path  string // the log's name, for people
	names names
	now   string   // the path of the file written to, at the last look
	from  Position // to resume at; used until cur is set for the first time
	o     Options
	emit  func(Batch) error
	split splitter
	buf   []byte
	lines []Line
	watch *watcher

	cur *file // being read; nil until there is one
	// queue holds newer files, seen under the log's name and opened at once,
	// oldest first.
	queue []*file
	done  []Position // where finished files ended, newest last
	// late is the file finished last, still open for lines of writers that
	// change over very late; lateSplit has its half line, lateSeen is when it
	// last grew.
	late      *file
	lateSplit splitter
	lateSeen  time.Time
	// older are the files before the one that reading began with, and their
	// sizes then: a clock that is set back makes a Dated log go on in one.
	older map[id]int64
	// top is the file under the log's name; zero if there is none.
	top id
	// stay: cur is rotated, but the new log is empty, so nobody has changed
	// over to it yet.
	stay bool
	// quiet is when cur, rotated, was last seen to have grown; ended when it
	// was first read to its end.
	quiet, ended time.Time

	dry  bool      // at the last look there was nothing to read and no next file
	lost time.Time // since when there is no file under the log's name

	told     bool // something has been emitted
	caughtUp bool // at the last look
	toldTop  id   // and what was under the log's name
	absent   bool // there was no log when we first looked

	// moved: a file of a list was not there any more, or another one, when it
	// was opened; so what was not found may be there.
	moved bool

	// What was told to the log of each hindrance, so as to tell it once:
	// finding and opening, reading, rotated files.
	finding, reading, aside nag
}

func (t *follower) close() {
	if t.cur != nil {
		t.cur.close()
	}
	for _, f := range t.queue {
		f.close()
	}
	t.dropLate()
}

func (t *follower) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for ctx.Err() == nil {
		more, wait, err := t.step()
		if err != nil {
			return err
		}
		if more {
			continue
		}
		if t.letGo() {
			return t.last()
		}
		timer.Reset(min(wait, t.o.Poll))
		select {
		case <-ctx.Done():
		case <-t.watch.wake:
		case <-timer.C:
		}
	}
	return nil
}

// errGone is Follow's end where Options.gone is set.
var errGone = errors.New("the log is gone")

// letGo reports whether the log is gone for good.
func (t *follower) letGo() bool {
	if t.top != (id{}) {
		t.lost = time.Time{}
		return false
	}
	if t.lost.IsZero() {
		t.lost = time.Now()
	}
	return t.o.gone > 0 && t.dry && time.Since(t.lost) >= t.o.gone
}

// last delivers the half line at the end of a log that is gone, and what came
// late.
func (t *follower) last() error {
	if t.cur != nil {
		if t.flush(); len(t.lines) > 0 {
			if err := t.tell(t.cur.at, true); err != nil {
				return err
			}
		}
		if err := t.endLate(); err != nil {
			return err
		}
	}
	return errGone
}

// step reads once, or looks once whether there is another file to read. more
// says that there may be more to do at once; otherwise wait is the longest
// that is worth waiting. An error is emit's.
func (t *follower) step() (more bool, wait time.Duration, err error) {
	t.notice()
	t.dry = false
	if t.cur == nil && !t.resume() {
		t.dry = true
		return false, t.o.Poll, t.tellCaughtUp()
	}
	cur := t.cur
	n, err := cur.read(t.buf)
	if err != nil && cur.plain != nil {
		t.o.Log.Warn("a compressed log file is damaged; lines may be missing", "log", t.path, "file", cur.name, "at", cur.at, "err", err)
		cur.plain = strings.NewReader("")
		return true, 0, nil
	}
	if err != nil {
		return t.failed(err)
	}
	st, err := cur.look()
	if err != nil {
		return t.failed(err)
	}
	t.cleared(&t.reading)
	if st.size < cur.at || !st.same {
		// Truncated, or cut. Bytes read from behind the present end were
		// read before that; others may be of what was written since.
		if n == 0 || st.size >= cur.at+int64(n) {
			return true, 0, t.truncated(st)
		}
	}
	if n == 0 {
		return t.atEnd(st)
	}
	t.quiet = time.Time{}
	if err := t.deliver(t.buf[:n], st); err != nil {
		return false, 0, err
	}
	return true, 0, nil
}

// notice looks at what stands under the log's name and opens it if it is new,
// before it can be deleted.
func (t *follower) notice() {
	t.watch.look(t.names.watch()...)
	t.now = t.names.current()
	fi, err := os.Stat(t.now)
	if err != nil {
		t.top = id{}
		if errors.Is(err, fs.ErrNotExist) && t.cur == nil {
			t.absent = true
		}
		// While a rotation is at work there may be no log for a moment.
		if t.cur == nil || !errors.Is(err, fs.ErrNotExist) {
			t.hindered(&t.finding, err)
		}
		return
	}
	t.top = idOf(fi)
	if t.cur == nil { // resume decides which file is first
		return
	}
	if t.cur.id == t.top || len(t.queue) >= maxQueue ||
		slices.ContainsFunc(t.queue, func(f *file) bool { return f.id == t.top }) {
		t.cleared(&t.finding)
		return
	}
	f, err := openFile(t.now)
	if err != nil {
		t.hindered(&t.finding, err)
		return
	}
	t.cleared(&t.finding)
	if f.id == t.cur.id || slices.ContainsFunc(t.queue, func(q *file) bool { return q.id == f.id }) {
		f.close() // renamed again between the two looks
		return
	}
	t.top = f.id
	t.returned(f)
	t.queue = append(t.queue, f)
}

// returned sets a file that was read before at the place where we left it.
func (t *follower) returned(f *file) {
	if t.late != nil && t.late.id == f.id {
		t.dropLate()
	}
	for _, p := range slices.Backward(t.done) {
		if p.Dev == f.id.dev && p.Inode == f.id.ino {
			if !f.is(p) {
				f.begin() // the inode is another file's now
			}
			return
		}
	}
	if end, ok := t.older[f.id]; ok && f.plain == nil && f.seek(end) != nil {
		f.begin()
	}
}

// resume finds the file to begin with and makes it cur. false: not yet.
func (t *follower) resume() bool {
	var top *file
	if t.top != (id{}) {
		f, err := openFile(t.now)
		if err != nil {
			t.hindered(&t.finding, err)
			return false
		}
		t.cleared(&t.finding)
		top = f
	}
	if t.from.IsZero() {
		if top == nil {
			return false
		}
		if t.o.Start == End && !t.absent {
			if err := top.seekLastLine(); err != nil {
				top.close()
				t.hindered(&t.finding, err)
				return false
			}
		}
		t.cur = top
		t.noteOlder()
		return true
	}
	f := t.find(top)
	if top != nil && f != top {
		top.close() // notice opens it again and queues it
	}
	if f == nil {
		return false
	}
	t.cur = f
	t.noteOlder()
	return true
}

// noteOlder notes how long the files before cur are. Where a log keeps its
// name, no file of its past becomes the log again unseen.
func (t *follower) noteOlder() {
	n, ok := t.names.(*datedNames)
	if !ok || t.older != nil {
		return
	}
	t.older = map[id]int64{}
	for _, g := range n.matches() {
		if g.id == t.cur.id {
			break
		}
		t.older[g.id] = g.size
	}
}

// find returns the file that t.from is a place in, at that place; or else,
// with a warning, the oldest of which nothing was read; or nil. A place in no
// file, with a time, is before all that was written since.
func (t *follower) find(top *file) *file {
	from := t.from
	t.moved = false
	if top != nil && top.id.ino == from.Inode {
		if top.is(from) || top.isCut(from) {
			return top
		}
	}
	gs, _, settled := t.history(true)
	if !settled {
		return nil // tried again
	}
	// Our inode first. The numbers of devices may change when a machine is
	// started again, the head may not.
	for _, g := range gs {
		if g.id.ino != from.Inode || compressed(g.name) && from.HeadLen < headMin {
			continue
		}
		if f := t.openIf(g, from); f != nil {
			return f
		}
	}
	if f := t.byHead(gs, from, id{}); f != nil {
		return f
	}
	if t.moved {
		return nil
	}
	if from.ModTime != 0 {
		for _, g := range gs {
			if g.mtime.UnixNano() > from.ModTime {
				if f, _ := t.open(g); f != nil {
					t.returned(f) // a late writer made it newer than the log that is gone
					if from.Inode == 0 {
						return f
					}
					t.o.Log.Warn("the log file read last is gone; going on with the oldest one written later, lines may be missing",
						"log", t.path, "file", g.name)
					return f
				}
			}
		}
	}
	if t.moved {
		return nil
	}
	if top != nil && from.Inode == 0 {
		top.restart()
	} else if top != nil {
		t.o.Log.Warn("the log file read last is gone; going on at the beginning of the present one, lines may be missing", "log", t.path)
		top.restart()
	}
	return top
}

// open opens a file of a list; moved tells if it is there no more.
func (t *follower) open(g generation) (*file, error) {
	f, err := openFile(g.name)
	if err == nil && f.id != g.id {
		f.close()
		f, err = nil, fs.ErrNotExist
	}
	if errors.Is(err, fs.ErrNotExist) {
		t.moved = true
	}
	return f, err
}

// openIf opens g at p, or returns nil if p is not a place in g.
func (t *follower) openIf(g generation, p Position) *file {
	f, err := t.open(g)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		if t.aside.news(err.Error()) {
			t.o.Log.Warn("cannot read a rotated log file", "log", t.path, "file", g.name, "err", err)
		}
		return nil
	}
	if !f.is(p) {
		f.close()
		return nil
	}
	return f
}

// byHead finds the file that p is a place in by its beginning alone, newest
// first: it was compressed or copied. not is left out.
func (t *follower) byHead(gs []generation, p Position, not id) *file {
	if p.HeadLen < headMin {
		return nil
	}
	for _, g := range slices.Backward(gs) {
		if g.id == not || !compressed(g.name) && g.size < p.Offset {
			continue
		}
		if f := t.openIf(g, p); f != nil {
			f.final = true
			return f
		}
	}
	return nil
}

// history lists the log's files that are not the current one, top, oldest
// first. With all it has also those that are not of the past.
func (t *follower) history(all bool) (gs []generation, top id, settled bool) {
	now := t.names.current()
	top = idAt(now)
	gs, settled = t.names.history(all)
	// What is under the log's name may have a rotated file's name as well (a
	// link to log-20261122). If it was exchanged while we looked, the list is
	// of two times.
	settled = settled && t.names.current() == now && idAt(now) == top
	return slices.DeleteFunc(gs, func(g generation) bool { return g.id == top }), top, settled
}

// idAt is the identity of the file at path, the zero id if there is none.
func idAt(path string) id {
	fi, err := os.Stat(path)
	if err != nil {
		return id{}
	}
	return idOf(fi)
}

// deliver emits the lines that end in b, which was read at cur's place.
func (t *follower) deliver(b []byte, st state) error {
	cur := t.cur
	cur.advance(b)
	t.lines = t.lines[:0]
	t.split.split(b, t.add)
	if len(b) == len(t.buf) && len(trimHole(b)) == 0 {
		n := cur.hole(st.size)
		t.split.skip(n)
		cur.at += n
	}
	return t.tell(st.size, cur.id == t.top || t.stay)
}

// add appends a line to the batch.
func (t *follower) add(text []byte, size int64, truncated bool) {
	t.cur.off += size
	t.lines = append(t.lines, Line{Text: text, Next: t.cur.place(t.cur.off), Truncated: truncated})
}

// tell emits the batch, if there is something to tell. size is cur's; last
// says that no file is known to come after cur, except an empty one.
func (t *follower) tell(size int64, last bool) error {
	b := Batch{Lines: t.lines, Next: t.here(), Behind: max(0, size-t.cur.at), top: t.top}
	t.lines = t.lines[:0]
	for _, f := range t.queue {
		if fi, err := f.f.Stat(); err == nil {
			b.Behind += max(0, fi.Size()-f.off)
		}
	}
	b.CaughtUp = last && b.Behind == 0
	was := t.caughtUp && t.toldTop == t.top
	t.caughtUp, t.toldTop = b.CaughtUp, t.top
	if len(b.Lines) == 0 && (was || !b.CaughtUp) {
		return nil
	}
	t.told = true
	return t.emit(b)
}

// here is where to resume. Of a file of which nothing is read yet, the end of
// the one before says more: it finds what comes after it even if that was
// copied and truncated.
func (t *follower) here() Position {
	if t.cur.off == 0 && len(t.done) > 0 {
		return t.done[len(t.done)-1]
	}
	return t.cur.place(t.cur.off)
}

// tellCaughtUp tells once that there is nothing to read because there is no
// log.
func (t *follower) tellCaughtUp() error {
	if t.told {
		return nil
	}
	t.told, t.caughtUp = true, true
	return t.emit(Batch{CaughtUp: true})
}

// flush adds the half line at the end of a finished file to the batch.
func (t *follower) flush() {
	t.lines = t.lines[:0]
	if t.split.halfLen == 0 {
		return
	}
	text, size, truncated := t.split.take()
	if len(text) == 0 { // only a hole
		t.cur.off += size
		return
	}
	t.add(text, size, truncated)
}

// atEnd is where cur has no more bytes for now: it may be rotated, and
// finished, and then the next file's turn comes.
func (t *follower) atEnd(st state) (more bool, wait time.Duration, err error) {
	cur := t.cur
	if cur.id == t.top {
		t.stay, t.quiet, t.ended = false, time.Time{}, time.Time{}
		if err := t.tell(st.size, true); err != nil {
			return false, 0, err
		}
		return false, t.o.Poll, t.readLate()
	}
	if t.stay {
		if t.onlyEmptyTop() && !deleted(cur.f) {
			return false, t.o.Poll, t.tell(st.size, true)
		}
		t.stay = false
	}
	if wait := t.grace(st); wait > 0 {
		return false, wait, t.tell(st.size, false)
	}
	next := t.next()
	if next == nil {
		if t.moved || len(t.queue) > 0 {
			return false, time.Millisecond, nil // there may be one
		}
		t.dry = true
		if deleted(cur.f) {
			return false, t.o.Poll, t.release()
		}
		return false, t.o.Poll, t.tell(st.size, true)
	}
	if next.id == t.top && !cur.final && next.isEmpty() && !deleted(cur.f) {
		t.stay = true
		t.queue = append([]*file{next}, t.queue...)
		return false, t.o.Poll, t.tell(st.size, true)
	}
	t.flush()
	if len(t.lines) > 0 {
		if err := t.tell(st.size, false); err != nil {
			next.close()
			return false, 0, err
		}
	}
	if err := t.become(next); err != nil {
		next.close()
		return false, 0, err
	}
	return true, 0, nil
}

// release closes a file that was deleted, before there is another: while it is
// open it takes room on the disk, and that may be full.
func (t *follower) release() error {
	cur := t.cur
	t.flush()
	if err := t.tell(cur.at, true); err != nil {
		return err
	}
	t.o.Log.Info("the log was deleted", "log", t.path, "bytes", cur.off)
	if err := t.finished(cur); err != nil {
		return err
	}
	t.from = t.here()
	cur.close()
	t.cur, t.quiet, t.ended = nil, time.Time{}, time.Time{}
	return nil
}

// onlyEmptyTop reports whether the one newer file is the log, still empty.
func (t *follower) onlyEmptyTop() bool {
	return len(t.queue) == 1 && t.queue[0].id == t.top && t.queue[0].isEmpty()
}

func (t *file) isEmpty() bool {
	fi, err := t.f.Stat()
	return err == nil && fi.Size() == 0
}

// become goes on with the next file. An error is emit's.
func (t *follower) become(next *file) error {
	cur := t.cur
	t.o.Log.Info("the log was rotated", "log", t.path, "finished", cur.name, "bytes", cur.off, "next", next.name)
	if err := t.finished(cur); err != nil {
		return err
	}
	if cur.plain == nil && !cur.final {
		t.late, t.lateSeen = cur, time.Now()
		t.lateSplit = splitter{max: t.o.MaxLine}
	} else {
		cur.close()
	}
	t.cur = next
	t.stay, t.quiet, t.ended = false, time.Time{}, time.Time{}
	return nil
}

// grace returns how much longer to wait for late lines in a rotated file that
// was read to its end; 0: it is finished.
func (t *follower) grace(st state) time.Duration {
	now := time.Now()
	if t.ended.IsZero() {
		t.ended = now
	}
	if t.quiet.IsZero() {
		t.quiet = now
	}
	// Renaming sets ctime: a file of which neither the content nor the name
	// has changed for so long was rotated before we looked.
	touched := st.mtime
	if st.ctime.After(touched) {
		touched = st.ctime
	}
	if t.cur.final || now.Sub(touched) >= t.o.Grace {
		return 0
	}
	if now.Sub(t.ended) >= graceMax*t.o.Grace {
		t.o.Log.Info("a rotated log file is still written to; no longer waiting for that writer, its lines will come late",
			"log", t.path, "file", t.cur.name)
		return 0
	}
	return max(0, t.o.Grace-now.Sub(t.quiet))
}

// next returns the generation after cur, open and taken out of the queue; nil
// if there is none yet.
func (t *follower) next() *file {
	gs, top, settled := t.history(false)
	t.moved = !settled
	if !settled {
		return nil // tried again
	}
	i := t.index(gs, t.cur)
	if i < 0 {
		i = t.lastDone(gs)
	}
	if i >= 0 {
		gs = gs[i+1:]
	} else {
		// Deleted. Of the files that are there, those written later came
		// after it.
		last := t.cur.mtime
		gs = slices.DeleteFunc(gs, func(g generation) bool { return g.mtime.UnixNano() <= last })
	}
	// An empty one that was compressed or deleted cannot be found, and tells
	// nothing.
	t.queue = slices.DeleteFunc(t.queue, func(f *file) bool {
		gone := f.id != top && f.isEmpty() && deleted(f.f)
		if gone {
			f.close()
		}
		return gone
	})
	if len(t.queue) > 0 {
		// What stands before the first of the queue was rotated so fast that
		// we never saw it under the log's name.
		j := t.index(gs, t.queue[0])
		if t.moved {
			return nil // tried again
		}
		if j < 0 && t.queue[0].id != top {
			j = 0 // deleted already
		}
		if j >= 0 {
			gs = gs[:j]
		}
	}
	if t.moved {
		return nil // tried again
	}
	for _, g := range gs {
		f, err := t.open(g)
		if t.moved {
			return nil
		}
		if err != nil {
			if t.aside.news(err.Error()) {
				t.o.Log.Warn("cannot read a rotated log file; its lines will be missing", "log", t.path, "file", g.name, "err", err)
			}
			continue
		}
		t.returned(f)
		return f
	}
	if len(t.queue) == 0 {
		return nil
	}
	f := t.queue[0]
	t.queue = slices.Delete(t.queue, 0, 1)
	return f
}

// lastDone finds the newest of gs that was finished, although it may have been
// compressed since; -1: none.
func (t *follower) lastDone(gs []generation) int {
	const most = 4 // what was finished longer ago stands before those
	done := t.done[max(0, len(t.done)-most):]
	for i, g := range slices.Backward(gs) {
		f, err := t.open(g)
		if err != nil {
			continue
		}
		// By the beginning, not the inode: that of a file that is gone may be
		// another's by now.
		known := slices.ContainsFunc(done, func(p Position) bool { return p.HeadLen >= headMin && f.is(p) })
		f.close()
		if known {
			return i
		}
	}
	return -1
}

// index finds f among gs, also if it was compressed; -1: it is not there.
func (t *follower) index(gs []generation, f *file) int {
	for i, g := range gs {
		if g.id == f.id {
			return i
		}
	}
	p := f.mark()
	if p.HeadLen < headMin {
		return -1
	}
	for i, g := range slices.Backward(gs) {
		if !compressed(g.name) {
			continue
		}
		if c, err := t.open(g); err == nil {
			same := c.is(p)
			c.close()
			if same {
				return i
			}
		}
	}
	return -1
}

// truncated is where cur no longer holds what was read of it.
func (t *follower) truncated(st state) error {
	cur := t.cur
	t.quiet, t.ended, t.stay = time.Time{}, time.Time{}, false
	if cur.final && cur.plain != nil {
		return nil
	}
	if st.same && st.size > 0 {
		t.o.Log.Info("the log was cut at its end", "log", t.path, "from", cur.at, "to", st.size)
		t.split.take()
		if err := cur.seek(min(st.size, cur.off)); err != nil {
			cur.restart()
		}
		return nil
	}
	gs, _, settled := t.history(false)
	t.moved = false
	f := t.byHead(gs, cur.place(cur.off), cur.id)
	if f == nil && (!settled || t.moved) {
		return nil // looked at again
	}
	if f != nil {
		if st, err := f.look(); err == nil && (f.plain != nil || st.size > cur.off) {
			t.o.Log.Info("the log was copied and truncated", "log", t.path, "at", cur.off, "copy", f.name)
			t.split.take() // in the copy once more
			cur.close()
			t.cur = f
			return nil
		}
		f.close()
	}
	t.o.Log.Info("the log was truncated", "log", t.path, "at", cur.off)
	t.flush()
	if len(t.lines) > 0 {
		if err := t.tell(0, false); err != nil {
			return err
		}
	}
	if err := t.finished(cur); err != nil {
		return err
	}
	cur.restart()
	return nil
}

// finished remembers where cur ended. The one finished before it is read once
// more, and not waited for any longer. An error is emit's.
func (t *follower) finished(cur *file) error {
	if err := t.endLate(); err != nil {
		return err
	}
	if cur.off == 0 {
		return nil
	}
	t.done = append(t.done, cur.place(cur.off))
	if len(t.done) > maxDone {
		t.done = slices.Delete(t.done, 0, len(t.done)-maxDone)
	}
	return nil
}

// failed is where cur could not be read: it is opened again, by its position.
func (t *follower) failed(err error) (bool, time.Duration, error) {
	t.hindered(&t.reading, fmt.Errorf("reading %s: %w", t.cur.name, err))
	if err := t.endLate(); err != nil {
		return false, 0, err
	}
	t.from = t.cur.place(t.cur.off)
	if t.from.Offset == 0 && t.cur.id == t.top {
		t.from, t.absent = Position{}, true // nothing read: from the beginning
	}
	t.close()
	t.cur, t.queue, t.stay = nil, nil, false
	t.quiet, t.ended = time.Time{}, time.Time{}
	t.split.take()
	return false, t.o.Poll, nil
}

// hindered tells the log what keeps us from reading, once.
func (t *follower) hindered(n *nag, err error) {
	if n.news(err.Error()) {
		t.o.Log.Warn("cannot read the log; trying again", "log", t.path, "err", err)
	}
}

// cleared takes that back.
func (t *follower) cleared(n *nag) {
	if n.news("") {
		t.o.Log.Info("the log can be read again", "log", t.path)
	}
}

// seekLastLine goes behind the last LF of the file: a half line at its end
// will be delivered once it is whole.
func (t *file) seekLastLine() error {
	fi, err := t.f.Stat()
	if err != nil {
		return err
	}
	end := fi.Size()
	b := make([]byte, 64<<10)
	for pos := end; pos > 0; {
		n := min(pos, int64(len(b)))
		if _, err := t.f.ReadAt(b[:n], pos-n); err != nil {
			return err
		}
		if i := bytes.LastIndexByte(b[:n], '\n'); i >= 0 {
			return t.seek(pos - n + int64(i) + 1)
		}
		if pos -= n; end-pos >= 1<<20 {
			return t.seek(end) // no log line is as long as that
		}
	}
	return t.seek(0)
}

// nag is a message that is worth telling only when it changes.
type nag string

func (n *nag) news(s string) bool {
	changed := string(*n) != s
	*n = nag(s)
	return changed
}
