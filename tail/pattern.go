package tail

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	// maxFiles is how many files of a pattern are followed at once.
	maxFiles = 64
	// maxMatches is how many names that match a pattern are looked at.
	maxMatches = 4096
	// maxKnown is how many files that were followed are remembered, so as to
	// know them again under another name.
	maxKnown = 4 * maxFiles
	// goneAfter is how long a name may be missing before its file is let go.
	// A rotation leaves it missing for less than a second, or until the next
	// line is written.
	goneAfter = time.Minute
)

// Each is what FollowPattern needs to know about, and tells of, each file.
type Each struct {
	// From returns where to resume in a file, the zero Position if nothing is
	// known about it.
	From func(path string) Position
	// Since is when files of the pattern were last looked for, by an earlier
	// run. Files of which nothing is known are read from their beginning if
	// they were written after that. Zero: Options.Start decides.
	Since time.Time
	// Emit takes the lines of a file; see Follow. It is called from a
	// goroutine for each file. Once, when the files that were there at the
	// start are known, it is called with the pattern itself and a batch that
	// has caught up.
	Emit func(path string, b Batch) error
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
func FollowPattern(ctx context.Context, pattern string, o Options, e Each) error {
	o = o.withDefaults()
	if o.gone == 0 {
		o.gone = goneAfter
	}
	ctx, cancel := context.WithCancel(ctx)
	p := &patternFollower{
		pattern: pattern, o: o, e: e, cancel: cancel,
		members: map[string]*member{},
		left:    map[string]Position{},
		skip:    map[string]id{},
		ended:   make(chan *member),
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
	began   bool

	members map[string]*member // followed now
	ended   chan *member
	left    map[string]Position // where files that are gone were left, at most maxKnown
	known   []beginning         // of files that were followed, newest last
	skip    map[string]id       // names of files that are followed under another
	many    nag
}

// beginning is that of a file, and where the file is.
type beginning struct {
	Position
	dir string
}

// member is one file of the pattern.
type member struct {
	path string
	id   id
	mark Position // its beginning
	err  error    // why it ended
	emit error    // of the one who takes the lines, which ends all

	mu sync.Mutex
	at Position
}

func (m *member) place() Position {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at
}

func (p *patternFollower) run(ctx context.Context) error {
	timer := time.NewTicker(p.o.Poll)
	defer timer.Stop()
	for {
		p.scan(ctx)
		if !p.began {
			p.began = true
			if err := p.e.Emit(p.pattern, Batch{CaughtUp: true}); err != nil {
				return p.end(ctx, err)
			}
		}
		select {
		case <-ctx.Done():
			return p.end(ctx, nil)
		case m := <-p.ended:
			delete(p.members, m.path)
			switch {
			case errors.Is(m.err, errGone):
				p.o.Log.Info("a log is gone", "log", m.path)
			case m.emit != nil || m.err == nil || ctx.Err() != nil:
				return p.end(ctx, m.err)
			default:
				// One file must not end the others, as with a name that is
				// itself a pattern. It is tried again when it is another file.
				p.o.Log.Error("a log cannot be followed; the others are", "log", m.path, "err", m.err)
				p.skip[m.path] = m.id
				continue
			}
			if at := m.place(); !at.IsZero() && len(p.left) < maxKnown {
				p.left[m.path] = at
			}
			if p.e.Gone != nil {
				p.e.Gone(m.path)
			}
		case <-timer.C:
		}
	}
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

// scan finds files that are new.
func (p *patternFollower) scan(ctx context.Context) {
	found, _ := filepath.Glob(p.pattern)
	if len(found) > maxMatches {
		if p.many.news("matches") {
			p.o.Log.Warn("too many files match; only the first are looked at", "log", p.pattern, "files", len(found), "most", maxMatches)
		}
		found = found[:maxMatches]
	}
	names := map[string]bool{}
	for _, name := range found {
		names[name] = true
	}
	ids := map[id]bool{} // of the files that are followed
	for path, m := range p.members {
		names[path] = true
		ids[m.id] = true
		p.look(m)
		ids[m.id] = true
	}
	for _, name := range found {
		if p.members[name] != nil || compressed(name) || rotatedFrom(name, names) || rotatedFrom(name, p.leftNames()) {
			continue
		}
		fi, err := os.Stat(name)
		if err != nil || !fi.Mode().IsRegular() {
			delete(p.skip, name)
			continue
		}
		if p.skip[name] == idOf(fi) {
			continue
		}
		delete(p.skip, name)
		if ids[idOf(fi)] || p.isKnown(name) {
			p.skip[name] = idOf(fi)
			continue
		}
		if len(p.members) >= maxFiles {
			if p.many.news("files") {
				p.o.Log.Warn("too many files match; this one and others are not followed", "log", p.pattern, "file", name, "most", maxFiles)
			}
			return
		}
		ids[idOf(fi)] = true
		p.start(ctx, name, fi)
	}
	if len(found) <= maxMatches && len(p.members) < maxFiles {
		p.many.news("")
	}
	if len(p.skip) > maxMatches {
		clear(p.skip)
	}
}

func (p *patternFollower) leftNames() map[string]bool {
	names := make(map[string]bool, len(p.left))
	for name := range p.left {
		names[name] = true
	}
	return names
}

// start follows one more file.
func (p *patternFollower) start(ctx context.Context, name string, fi os.FileInfo) {
	m := &member{path: name}
	p.members[name] = m
	p.look(m)
	m.at = p.left[name]
	delete(p.left, name)
	if m.at.IsZero() {
		m.at = p.e.From(name)
	}
	o := p.o
	if p.began || !p.e.Since.IsZero() && fi.ModTime().After(p.e.Since) {
		o.Start = Beginning
	}
	from := m.at
	p.wg.Go(func() {
		m.err = Follow(ctx, name, from, o, func(b Batch) error {
			if m.emit = p.e.Emit(name, b); m.emit != nil {
				return m.emit
			}
			if !b.Next.IsZero() {
				m.mu.Lock()
				m.at = b.Next
				m.mu.Unlock()
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
	for _, k := range p.known {
		same := k.Dev == f.id.dev && k.Inode == f.id.ino
		if (same || k.HeadLen >= cutMin && k.dir == filepath.Dir(name)) && f.is(k.Position) {
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
