package tail

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/fsnotify/fsnotify"
)

// watcher says "look now" when something happens to the log or to a file
// whose name begins like its. It is a help, never a promise: network file
// systems, single files mounted into a container, an exhausted
// fs.inotify.max_user_watches and a full event queue are why Follow also
// looks at intervals.
type watcher struct {
	wake chan struct{} // one slot: looking once is enough for any number of events
	log  *slog.Logger
	w    *fsnotify.Watcher // nil: no inotify
	dirs map[string]id     // watched, and which directory stood there then
	done chan struct{}

	mu    sync.Mutex
	stems map[string]bool // base names that a file of interest begins with
}

// newWatcher never fails: without inotify there is a warning and no wake.
func newWatcher(log *slog.Logger, off bool) *watcher {
	w := &watcher{
		wake:  make(chan struct{}, 1),
		log:   log,
		dirs:  map[string]id{},
		stems: map[string]bool{},
		done:  make(chan struct{}),
	}
	if off {
		close(w.done)
		return w
	}
	n, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("no inotify: looking at the log at intervals only", "err", err)
		close(w.done)
		return w
	}
	w.w = n
	go w.run()
	return w
}

func (w *watcher) run() {
	defer close(w.done)
	events, errs := w.w.Events, w.w.Errors
	for events != nil || errs != nil {
		select {
		case ev, ok := <-events:
			if !ok {
				events = nil
			} else if w.concerns(ev.Name) {
				w.poke()
			}
		case _, ok := <-errs:
			// An overflow of the queue, most likely: events were lost.
			if !ok {
				errs = nil
			} else {
				w.poke()
			}
		}
	}
}

func (w *watcher) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *watcher) concerns(name string) bool {
	base := filepath.Base(name)
	w.mu.Lock()
	defer w.mu.Unlock()
	if _, ok := w.dirs[name]; ok {
		return true
	}
	for s := range w.stems {
		if strings.HasPrefix(base, s) {
			return true
		}
	}
	return false
}

// look sees to it that the directories of the files are watched, as they
// stand now: a directory that was replaced is watched anew.
func (w *watcher) look(paths ...string) {
	if w.w == nil {
		return
	}
	wanted := map[string]bool{}
	w.mu.Lock()
	clear(w.stems)
	for _, p := range paths {
		dir, stem := filepath.Split(p)
		w.stems[stem] = true
		wanted[filepath.Clean(dir)] = true
	}
	for dir := range w.dirs {
		if !wanted[dir] { // a symbolic link leads elsewhere now
			delete(w.dirs, dir)
			_ = w.w.Remove(dir)
		}
	}
	w.mu.Unlock()
	for dir := range wanted {
		fi, err := os.Stat(dir)
		w.mu.Lock()
		was, watched := w.dirs[dir]
		gone := watched && (err != nil || idOf(fi) != was)
		if gone {
			delete(w.dirs, dir)
		}
		w.mu.Unlock()
		if gone {
			_ = w.w.Remove(dir) // fails if the kernel has already forgotten it
		}
		if err != nil || watched && !gone {
			continue
		}
		if err := w.w.Add(dir); err != nil {
			w.log.Warn("cannot watch a directory: looking at intervals only", "dir", dir, "err", err)
		}
		// Noted in both cases, so that the warning comes once.
		w.mu.Lock()
		w.dirs[dir] = idOf(fi)
		w.mu.Unlock()
		w.poke() // what happened before the watch began left no event
	}
}

// close ends the watch and waits for its goroutine.
func (w *watcher) close() {
	if w.w != nil {
		_ = w.w.Close()
	}
	<-w.done
}
