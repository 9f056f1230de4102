package tail

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// names says which files are a log's.
type names interface {
	// current is the path of the file that is written to now, whether or not
	// there is one.
	current() string
	// history lists the log's files, oldest first; the current one may be
	// among them. With all false those that cannot be of the past are left
	// out. settled is as in rotated.
	history(all bool) (gs []generation, settled bool)
	// watch lists paths; what happens to a file whose path begins with one of
	// them concerns the log.
	watch() []string
}

// oneName is a log that keeps its name and is rotated away under others.
type oneName string

func (n oneName) current() string { return string(n) }

// history looks beside the log and, if that is a symbolic link, beside the
// file it leads to.
func (n oneName) history(bool) (gs []generation, settled bool) { return rotated(n.watch()...) }

func (n oneName) watch() []string {
	paths := []string{string(n)}
	if real, err := filepath.EvalSymlinks(string(n)); err == nil && real != string(n) {
		paths = append(paths, real)
	}
	return paths
}

// datedNames is a log with the date in the name of each file, as Exim writes
// it where log_file_path has %D or %M (log.c, tod.c): %D is YYYYMMDD, %M is
// YYYYMM, in Exim's own time zone. The name with the latest date is the
// current file.
type datedNames struct {
	pattern string
	now     func() time.Time // nil: time.Now
}

// dated reports whether a name has the date in it.
func dated(name string) bool { return strings.Contains(name, "%D") || strings.Contains(name, "%M") }

// ahead is how far in front of UTC a clock on the wall may be. A date later
// than that is of a time when this machine's clock was wrong.
const ahead = 14 * time.Hour

func (n *datedNames) current() string {
	gs := n.past(n.matches())
	for _, g := range slices.Backward(gs) {
		if !compressed(g.name) {
			return g.name
		}
	}
	return n.pattern // there is no such file, and this will be said
}

func (n *datedNames) history(all bool) (gs []generation, settled bool) {
	gs, settled = twice(n.matches)
	if all {
		return gs, settled
	}
	// Files of the time after the current one are left over from when the
	// clock was ahead; only those that were read may matter, and they are
	// known.
	gs = n.past(gs)
	return gs, settled
}

func (n *datedNames) watch() []string {
	return []string{n.pattern[:strings.Index(n.pattern, "%")]}
}

// past leaves out the files of days to come.
func (n *datedNames) past(gs []generation) []generation {
	now := time.Now
	if n.now != nil {
		now = n.now
	}
	day := now().UTC().Add(ahead).Format("20060102")
	return slices.DeleteFunc(slices.Clone(gs), func(g generation) bool {
		return g.date > day[:min(len(day), len(g.date))]
	})
}

// matches lists the log's files, oldest first.
func (n *datedNames) matches() []generation {
	var gs []generation
	seen := map[string]bool{}
	for _, ext := range []string{"", ".gz", ".zst", ".xz", ".bz2"} {
		found, _ := filepath.Glob(n.glob() + ext)
		for _, name := range found {
			date, ok := n.date(trimCompressed(name))
			if !ok {
				continue
			}
			// While gzip is at work both the file and an unfinished
			// compressed one are there.
			if ext != "" && seen[trimCompressed(name)] {
				continue
			}
			fi, err := os.Stat(name)
			if err != nil || !fi.Mode().IsRegular() {
				continue
			}
			seen[name] = true
			gs = append(gs, generation{name: name, id: idOf(fi), size: fi.Size(), mtime: fi.ModTime(), date: date})
		}
	}
	slices.SortStableFunc(gs, func(a, b generation) int {
		return cmp.Or(cmp.Compare(a.date, b.date), a.mtime.Compare(b.mtime))
	})
	return gs
}

// glob is the pattern for filepath.Glob.
func (n *datedNames) glob() string {
	const digit = "[0-9]"
	return strings.NewReplacer(
		"%D", strings.Repeat(digit, 8), "%M", strings.Repeat(digit, 6),
		`*`, `\*`, `?`, `\?`, `[`, `\[`, `\`, `\\`,
	).Replace(n.pattern)
}

// date reads the date in a name that matches: the digits of its longest date,
// so that a directory of the month before it changes nothing.
func (n *datedNames) date(name string) (date string, ok bool) {
	for p := n.pattern; ; {
		i := strings.IndexByte(p, '%')
		if i < 0 || i+1 == len(p) {
			return date, date != ""
		}
		if i >= len(name) || name[:i] != p[:i] {
			return "", false
		}
		width := map[byte]int{'D': 8, 'M': 6}[p[i+1]]
		if width == 0 { // an ordinary percent sign
			i++
			p, name = p[i:], name[i:]
			continue
		}
		name, p = name[i:], p[i+2:]
		if len(name) < width {
			return "", false
		}
		if width >= len(date) {
			date = name[:width]
		}
		name = name[width:]
	}
}

// twice lists until two listings agree: one alone is not a snapshot, for
// somebody may be renaming the files one by one just now.
func twice(list func() []generation) (was []generation, settled bool) {
	for try := range 10 {
		is := list()
		if try > 0 && slices.EqualFunc(is, was, func(a, b generation) bool {
			return a.name == b.name && a.id == b.id
		}) {
			return is, true
		}
		was = is
		if try > 1 {
			time.Sleep(time.Millisecond)
		}
	}
	return was, false
}

// namesOf is how the files of a log that Follow takes are found.
func namesOf(path string) (names, error) {
	switch KindOf(path) {
	case File:
		return oneName(filepath.Clean(path)), nil
	case Dated:
		return &datedNames{pattern: filepath.Clean(path)}, nil
	}
	return nil, fmt.Errorf("%q is not the name of one log file", path)
}
