package tail

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

const (
	// maxFiles is how many files of a pattern are followed at once. The others
	// rest: they are looked at, and followed when they were written to.
	maxFiles = 64
	// maxMatches is how many files that match a pattern are looked at, those
	// written to last.
	maxMatches = 4096
	// maxKnown is how many beginnings of files are remembered, so as to know
	// the files again under another name.
	maxKnown = 2 * maxMatches
	// goneAfter is how long a name may be missing before its file is let go.
	// A rotation leaves it missing for less than a second, or until the next
	// line is written.
	goneAfter = time.Minute
	// halfAfter is how long a half line keeps its file from resting.
	halfAfter = 10 * time.Minute
	// tick is more than the kernel's clock for the times of files lags behind.
	tick = 50 * time.Millisecond
)

// Each is what FollowPattern needs to know about, and tells of, each file.
type Each struct {
	// From returns where to resume in a file, the zero Position if nothing is
	// known about it.
	From func(path string) Position
	// Since is when files of the pattern were last looked for by an earlier
	// run, as Emit was told. Files of which nothing is known are read from
	// their beginning if they were written after that. Zero: Options.Start
	// decides.
	Since time.Time
	// Others returns the names of files that somebody else follows. They and
	// their rotated files are left to him. nil: there are none.
	Others func() []string
	// Emit takes the lines of a file; see Follow. It is called from a
	// goroutine for each file. With the pattern itself it is called after each
	// look for files: CaughtUp, and with the time of that look as
	// Next.ModTime once something has been emitted of every file that the
	// look found. That is the Since of a later run that knows the positions
	// emitted before.
	Emit func(path string, b Batch) error
	// Rest is called when a file is quiet and not followed for now, because
	// too many match. Its position is to be kept: when it is written to, Emit
	// goes on after it. nil: nobody is told.
	Rest func(path string)
	// Gone is called when a file that vanished was read to its end and is
	// not followed any more. No Emit for it follows unless it appears again,
	// and then it is resumed where it was left. nil: nobody is told.
	Gone func(path string)
}

// FollowPattern follows all files that match a pattern of filepath.Match,
// each as Follow does, until ctx ends. Files that appear are read from their
// beginning. Rotated files of one that matches (log.1, log-20261122) and
// compressed ones are part of that one's history; the same file under a
// second name (a link, or a new name that matches too) is followed once.
//
// However many files match, no line is lost and none comes twice: those that
// are quiet make room for those that are written to.
func FollowPattern(ctx context.Context, pattern string, o Options, e Each) error {
	o = o.withDefaults()
	if o.gone == 0 {
		o.gone = goneAfter
	}
	if o.files == 0 {
		o.files = maxFiles
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &patternFollower{
		pattern: pattern, o: o, e: e, cancel: cancel,
		before:  e.Since,
		members: map[string]*member{},
		resting: map[string]*rest{},
		left:    map[string]Position{},
		skip:    map[string]id{},
		others:  map[string]*member{},
		ended:   make(chan *member),
		first:   make(chan struct{}, 1),
	}
	defer p.wg.Wait()
	defer cancel()
	return p.run(ctx)
}

type patternFollower struct {
	pattern string
	o       Options
	e       Each
	wg      sync.WaitGroup
	cancel  context.CancelFunc
	scans   int
	before  time.Time // of the look before the present one

	members map[string]*member // followed now
	resting map[string]*rest   // not followed for now
	ended   chan *member
	first   chan struct{}       // a member has emitted something for the first time
	left    map[string]Position // where files that are gone were left, at most maxKnown
	known   []beginning         // of files that were followed, newest last
	skip    map[string]id       // names of files that are followed under another
	others  map[string]*member  // what somebody else follows
	many    nag
}

// beginning is that of a file, and where the file is.
type beginning struct {
	Position
	dir string
}

// sight is how a file looked; nothing was written to it while that stays.
type sight struct {
	id           id
	size         int64
	mtime, ctime int64 // ns since 1970
}

func sightOf(fi os.FileInfo) sight {
	s := sight{id: idOf(fi), size: fi.Size(), mtime: fi.ModTime().UnixNano()}
	s.ctime = changed(fi)
	return s
}

// rest is a file that is not followed for now.
type rest struct {
	*member
	at    Position // where to go on; zero: start decides
	from  Position // the same for Follow, if at is zero
	seen  sight    // as it was read to its end
	start Start
	// hungry is the scan at which there was first something to read, 0: there
	// is nothing. mtime is when it was last written to.
	hungry int
	mtime  int64
	gone   bool // there is no such file
}

// member is one file of the pattern.
type member struct {
	path string
	id   id
	mark Position // its beginning

	start  Start
	cancel context.CancelFunc
	yield  *sight    // how it looked when it was told to rest
	yields bool      // it vanished, and is told to make room
	lost   time.Time // since when it is missing
	err    error     // why it ended
	emit   error     // of the one who takes the lines, which ends all

	mu       sync.Mutex
	at       Position
	told     bool // something was emitted
	caughtUp bool // and nothing is being emitted
	top      id   // what stood under its name then
}

func (m *member) place() (at Position, told bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at, m.told
}

func (p *patternFollower) run(ctx context.Context) error {
	timer := time.NewTicker(p.o.Poll)
	defer timer.Stop()
	var look time.Time // the first look that is not told yet
	for scan := true; ; {
		if scan {
			now := time.Now().Add(-tick)
			if look.IsZero() {
				look = now
			}
			p.scan(ctx)
			p.before = now
		}
		if !look.IsZero() && p.told() {
			if err := p.e.Emit(p.pattern, Batch{CaughtUp: true, Next: Position{ModTime: look.UnixNano()}}); err != nil {
				return p.end(ctx, err)
			}
			look = time.Time{}
		}
		scan = true
		select {
		case <-ctx.Done():
			return p.end(ctx, nil)
		case m := <-p.ended:
			if over, err := p.over(ctx, m); over {
				return p.end(ctx, err)
			}
		case <-p.first:
			scan = false
		case <-timer.C:
		}
	}
}

// told reports whether something has been emitted of all files that are there.
func (p *patternFollower) told() bool {
	for _, m := range p.members {
		if _, told := m.place(); !told {
			return false
		}
	}
	for _, r := range p.resting {
		if r.hungry > 0 && r.at.IsZero() {
			return false
		}
	}
	return true
}

// over is where a member has ended. all: so must the others.
func (p *patternFollower) over(ctx context.Context, m *member) (all bool, err error) {
	delete(p.members, m.path)
	at, _ := m.place()
	switch {
	case errors.Is(m.err, errGone) || m.yields && m.err == nil && ctx.Err() == nil:
		p.o.Log.Info("a log is gone", "log", m.path)
	case m.yield != nil && m.err == nil && ctx.Err() == nil:
		if at.Inode == m.yield.id.ino {
			m.yield.size = max(m.yield.size, at.Offset)
		}
		p.resting[m.path] = &rest{member: m, at: at, seen: *m.yield, start: m.start}
		if p.e.Rest != nil {
			p.e.Rest(m.path)
		}
		return false, nil
	case m.emit != nil || m.err == nil || ctx.Err() != nil:
		return true, m.err
	default:
		// One file must not end the others, as with a name that is
		// itself a pattern. It is tried again when it is another file.
		p.o.Log.Error("a log cannot be followed; the others are", "log", m.path, "err", m.err)
		p.skip[m.path] = m.id
		return false, nil
	}
	if !at.IsZero() && len(p.left) < maxKnown {
		p.left[m.path] = at
	}
	if p.e.Gone != nil {
		p.e.Gone(m.path)
	}
	return false, nil
}

// end stops all members and waits for them. An error of emit that is only
// the end of ctx is none.
func (p *patternFollower) end(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		err = nil
	}
	p.cancel()
	for range p.members {
		m := <-p.ended
		_ = m
	}
	return err
}

// scan finds files that are new, and files at rest that were written to.
func (p *patternFollower) scan(ctx context.Context) {
	p.scans++
	found := p.find()
	names := map[string]bool{}
	for _, f := range found {
		names[f.name] = true
	}
	ids := map[id]bool{} // of the files that are followed
	p.lookAtOthers(names, ids)
	for path, m := range p.members {
		names[path] = true
		ids[m.id] = true
		p.look(m)
		ids[m.id] = true
	}
	for path, r := range p.resting {
		names[path] = true
		p.check(r)
		ids[r.id] = true
	}
	of := p.withLeft(names)
	for _, f := range found {
		name := f.name
		if p.members[name] != nil || p.resting[name] != nil || p.others[name] != nil || compressed(name) || rotatedFrom(name, of) {
			continue
		}
		if p.skip[name] == f.seen.id {
			continue
		}
		delete(p.skip, name)
		if _, again := p.left[name]; ids[f.seen.id] || !again && p.isKnown(name) {
			p.skip[name] = f.seen.id
			continue
		}
		ids[f.seen.id] = true
		p.meet(f)
	}
	if len(p.skip) > maxMatches {
		clear(p.skip)
	}
	p.seat(ctx)
}

// match is a file that matches.
type match struct {
	name string
	seen sight
}

// find lists the files that match.
func (p *patternFollower) find() []match {
	names, _ := filepath.Glob(p.pattern)
	found := make([]match, 0, len(names))
	for _, name := range names {
		fi, err := os.Stat(name)
		if err != nil || !fi.Mode().IsRegular() {
			delete(p.skip, name)
			continue
		}
		found = append(found, match{name, sightOf(fi)})
	}
	if len(found) <= maxMatches {
		p.many.news("")
		return found
	}
	if p.many.news("matches") {
		p.o.Log.Warn("too many files match; only those written to last are looked at", "log", p.pattern, "files", len(found), "most", maxMatches)
	}
	slices.SortStableFunc(found, func(a, b match) int { return cmp.Compare(b.seen.mtime, a.seen.mtime) })
	found = found[:maxMatches]
	slices.SortFunc(found, func(a, b match) int { return strings.Compare(a.name, b.name) })
	return found
}

// lookAtOthers notes what somebody else follows, so that it is left to him
// under any name that it gets.
func (p *patternFollower) lookAtOthers(names map[string]bool, ids map[id]bool) {
	if p.e.Others == nil {
		return
	}
	list := p.e.Others()
	is := make(map[string]bool, len(list))
	for _, name := range list {
		name = filepath.Clean(name)
		is[name] = true
		m := p.others[name]
		if m == nil {
			if len(p.others) >= maxMatches {
				break
			}
			m = &member{path: name}
			p.others[name] = m
		}
		p.look(m)
		names[name] = true
		ids[m.id] = true
	}
	for name := range p.others {
		if !is[name] {
			delete(p.others, name)
		}
	}
}

func (p *patternFollower) withLeft(names map[string]bool) map[string]bool {
	of := make(map[string]bool, len(names)+len(p.left))
	for name := range names {
		of[name] = true
	}
	for name := range p.left {
		of[name] = true
	}
	return of
}

// meet takes in a file that is new, at rest.
func (p *patternFollower) meet(f match) {
	r := &rest{member: &member{path: f.name}, start: p.o.Start, hungry: p.scans, mtime: f.seen.mtime}
	p.look(r.member)
	r.at = p.left[f.name]
	delete(p.left, f.name)
	if r.at.IsZero() {
		r.at = p.e.From(f.name)
	}
	if p.scans > 1 || p.since(f.seen) {
		r.start = Beginning
		if r.at.IsZero() && !p.before.IsZero() { // it may have been rotated already
			r.from = Position{ModTime: p.before.UnixNano()}
		}
	}
	if r.at.Inode == f.seen.id.ino && r.at.Offset == f.seen.size && begins(f.name, r.at) {
		r.seen, r.hungry = f.seen, 0
	}
	p.resting[f.name] = r
}

// begins reports whether a file is the one that p is a place in; its inode may
// have been another's.
func begins(name string, p Position) bool {
	f, err := openFile(name)
	if err != nil {
		return false
	}
	defer f.close()
	return f.is(p)
}

// since reports whether a file was written to after the look of an earlier
// run. Some file systems keep whole seconds only.
func (p *patternFollower) since(s sight) bool {
	from := p.e.Since
	if s.mtime%int64(time.Second) == 0 {
		from = from.Truncate(time.Second)
	}
	return !p.e.Since.IsZero() && s.mtime >= from.UnixNano()
}

// check looks whether a file at rest was written to.
func (p *patternFollower) check(r *rest) {
	fi, err := os.Stat(r.path)
	r.gone = err != nil
	switch {
	case err != nil:
		// It may be rotated, with lines that nobody has read.
	case sightOf(fi) == r.seen:
		r.hungry = 0
		return
	default:
		r.mtime = fi.ModTime().UnixNano()
	}
	p.look(r.member)
	if r.hungry == 0 {
		r.hungry = p.scans
	}
}

// seat lets those be followed that have something to read, and as many of the
// others as there is room for.
func (p *patternFollower) seat(ctx context.Context) {
	if len(p.resting) == 0 {
		return
	}
	var queue []*rest
	room := p.o.files - len(p.members)
	for _, r := range p.resting {
		if r.at.IsZero() && r.start == End && r.hungry == p.scans && len(p.resting) > room {
			p.passOver(r)
		}
		queue = append(queue, r)
	}
	late := func(r *rest) int { // the longer it waits the sooner; what is not there, and what is quiet, last
		switch {
		case r.hungry == 0:
			return p.scans + 2
		case r.gone:
			return p.scans + 1
		}
		return r.hungry
	}
	slices.SortFunc(queue, func(a, b *rest) int {
		return cmp.Or(cmp.Compare(late(a), late(b)), cmp.Compare(b.mtime, a.mtime), cmp.Compare(a.path, b.path))
	})
	hungry := 0
	for _, r := range queue {
		switch {
		case room > 0:
			room--
			delete(p.resting, r.path)
			p.start(ctx, r)
		case r.hungry > 0:
			hungry++
		}
	}
	p.makeRoom(hungry)
}

// passOver puts a file that is to be read from its end at its end, without
// following it.
func (p *patternFollower) passOver(r *rest) {
	f, err := openFile(r.path)
	if err != nil {
		return
	}
	defer f.close()
	fi, err := f.f.Stat()
	if err != nil || f.seekLastLine() != nil {
		return
	}
	r.at, r.seen, r.hungry = f.place(f.off), sightOf(fi), 0
	if p.e.Emit(r.path, Batch{Next: r.at, CaughtUp: true}) == nil && p.e.Rest != nil {
		p.e.Rest(r.path)
	}
}

// makeRoom ends the following of n files, those that have been quiet longest.
func (p *patternFollower) makeRoom(n int) {
	if n == 0 {
		return
	}
	type quiet struct {
		m    *member
		seen *sight
	}
	var list []quiet
	for _, m := range p.members {
		if m.yield != nil || m.yields {
			n--
			continue
		}
		m.mu.Lock()
		at, caughtUp, top := m.at, m.caughtUp, m.top
		m.mu.Unlock()
		fi, err := os.Stat(m.path)
		if err == nil {
			m.lost = time.Time{}
		} else if m.lost.IsZero() {
			m.lost = time.Now()
		}
		if !caughtUp {
			continue
		}
		if err != nil {
			if time.Since(m.lost) > min(p.o.gone, 20*p.o.Grace) {
				list = append(list, quiet{m, nil})
			}
			continue
		}
		s := sightOf(fi)
		switch {
		case at.IsZero(): // it cannot be read
		case s.id != top: // rotated just now
			continue
		case s.size == 0: // nobody has a place in it; the one before is read
		case s.id.ino == at.Inode && (s.size == at.Offset || time.Since(fi.ModTime()) >= halfAfter):
		default:
			continue
		}
		list = append(list, quiet{m, &s})
	}
	slices.SortFunc(list, func(a, b quiet) int {
		switch {
		case a.seen == nil || b.seen == nil:
			return cmp.Or(b2i(a.seen != nil)-b2i(b.seen != nil), strings.Compare(a.m.path, b.m.path))
		}
		return cmp.Or(cmp.Compare(a.seen.mtime, b.seen.mtime), strings.Compare(a.m.path, b.m.path))
	})
	for _, q := range list[:min(max(n, 0), len(list))] {
		q.m.yield, q.m.yields = q.seen, q.seen == nil
		q.m.cancel()
	}
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// start follows one more file.
func (p *patternFollower) start(ctx context.Context, r *rest) {
	m := &member{path: r.path, id: r.id, mark: r.mark, at: r.at, start: r.start}
	p.members[r.path] = m
	o := p.o
	o.Start = r.start
	from := r.at
	if from.IsZero() {
		from = r.from
	}
	ctx, m.cancel = context.WithCancel(ctx)
	p.wg.Go(func() {
		defer m.cancel()
		m.err = Follow(ctx, r.path, from, o, func(b Batch) error {
			m.mu.Lock()
			m.caughtUp = false
			m.mu.Unlock()
			if m.emit = p.e.Emit(r.path, b); m.emit != nil {
				return m.emit
			}
			m.mu.Lock()
			first := !m.told
			m.told, m.caughtUp, m.top = true, b.CaughtUp, b.top
			if !b.Next.IsZero() {
				m.at = b.Next
			}
			m.mu.Unlock()
			if first {
				select {
				case p.first <- struct{}{}:
				default:
				}
			}
			return nil
		})
		p.ended <- m
	})
}

// look notes which file stands under a member's name, so that it is known
// under another one.
func (p *patternFollower) look(m *member) {
	fi, err := os.Stat(m.path)
	if err != nil {
		return
	}
	if idOf(fi) == m.id && (m.mark.HeadLen >= cutMin || fi.Size() == int64(m.mark.HeadLen)) {
		return
	}
	f, err := openFile(m.path)
	if err != nil {
		return
	}
	defer f.close()
	mark := f.mark()
	mark.Dev, mark.Inode = f.id.dev, f.id.ino
	if f.id == m.id && len(p.known) > 0 {
		for i := range p.known { // it has grown
			if p.known[i].Position == m.mark {
				p.known[i].Position = mark
			}
		}
	} else {
		p.known = append(p.known, beginning{mark, filepath.Dir(m.path)})
		if len(p.known) > maxKnown {
			p.known = p.known[1:]
		}
	}
	m.id, m.mark = f.id, mark
}

// isKnown reports whether a file was followed under another name, or is a
// copy beside one that was. Elsewhere the same beginning says nothing: servers
// that are started in the same second begin their logs alike.
func (p *patternFollower) isKnown(name string) bool {
	f, err := openFile(name)
	if err != nil {
		return false
	}
	defer f.close()
	var b [headMax]byte
	n, _ := f.f.ReadAt(b[:], 0)
	sums := map[int]uint64{}
	dir := filepath.Dir(name)
	for _, k := range p.known {
		same := k.Dev == f.id.dev && k.Inode == f.id.ino
		if k.HeadLen == 0 && !(same && p.reads(f.id)) {
			continue // it was empty: another file may have its inode now
		}
		if !same && (k.HeadLen < cutMin || k.dir != dir) || k.HeadLen > n {
			continue
		}
		if _, ok := sums[k.HeadLen]; !ok {
			sums[k.HeadLen] = checksum(b[:k.HeadLen])
		}
		if sums[k.HeadLen] == k.Head {
			return true
		}
	}
	return false
}

// reads reports whether a file is being read, under whatever name.
func (p *patternFollower) reads(i id) bool {
	for _, m := range p.members {
		if at, _ := m.place(); at.Dev == i.dev && at.Inode == i.ino {
			return true
		}
	}
	return false
}

// rotatedFrom reports whether a file is a rotated one of another.
func rotatedFrom(name string, of map[string]bool) bool {
	dir, file := filepath.Split(trimCompressed(name))
	is := func(base string) bool {
		if base == file || base == "" || !of[dir+base] {
			return false
		}
		_, _, ok := suffix(base, file)
		return ok
	}
	if before(file, is) {
		return true
	}
	ext := filepath.Ext(file)
	return before(strings.TrimSuffix(file, ext), func(base string) bool { return is(base + ext) })
}

// before calls is for what stands before each separator in the digits at the
// end of a name.
func before(name string, is func(base string) bool) bool {
	for i := len(name) - 1; i > 0; i-- {
		switch c := name[i]; {
		case '0' <= c && c <= '9' || c == ':' || c == 'T':
		case c == '.' || c == '-' || c == '_':
			if is(name[:i]) {
				return true
			}
		default:
			return false
		}
	}
	return false
}
