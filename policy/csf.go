package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// csfIncludes bounds how many files one csf.allow may lead to.
const csfIncludes = 20

// CSFAllowed reads CSF's own lists of whom its administrator never wants
// blocked (csf.allow, csf.ignore, and what they Include) as entries of the
// allowlist. CSF knows more kinds of lines: of a filter such as
// tcp|in|d=25|s=192.0.2.7 the source counts, other lines are CSF's alone and
// are left out. A file that is missing is empty; what cannot be read is told
// in the error, beside the entries that were found.
func CSFAllowed(paths []string) ([]AllowEntry, error) {
	entries, _, err := csfAllowed(paths)
	return entries, err
}

// CSFLists reads CSF's lists again when they have changed. The zero value, with
// Paths, is ready.
type CSFLists struct {
	// Paths gives the files; they may come and go.
	Paths func() []string

	entries []AllowEntry
	read    map[string]fs.FileInfo // nil where there was none
	paths   []string
}

// Look returns what CSFAllowed would. After an error it looks anew.
func (l *CSFLists) Look() ([]AllowEntry, error) {
	paths := l.Paths()
	if l.read != nil && slices.Equal(paths, l.paths) && l.same() {
		return l.entries, nil
	}
	entries, files, err := csfAllowed(paths)
	l.entries, l.paths, l.read = entries, paths, files
	if err != nil {
		l.read = nil
	}
	return entries, err
}

// same tells whether no file has changed.
func (l *CSFLists) same() bool {
	for path, was := range l.read {
		is, err := os.Stat(path)
		switch {
		case err != nil && was == nil:
		case err != nil, was == nil, !os.SameFile(is, was), is.Size() != was.Size(), !is.ModTime().Equal(was.ModTime()):
			return false
		}
	}
	return true
}

// csfAllowed also returns which files were read.
func csfAllowed(paths []string) ([]AllowEntry, map[string]fs.FileInfo, error) {
	var entries []AllowEntry
	var errs []error
	seen := make(map[string]fs.FileInfo)
	for len(paths) > 0 && len(seen) < csfIncludes {
		path := paths[0]
		paths = paths[1:]
		if _, twice := seen[path]; twice {
			continue
		}
		seen[path], _ = os.Stat(path) // before it is read: what changes meanwhile is seen the next time
		data, err := readFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil && len(data) > maxFile {
			err = errors.New("the file is larger than 1 MiB")
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", path, err))
			continue
		}
		number := 0
		for line := range strings.Lines(string(data)) {
			number++
			value, comment, _ := strings.Cut(line, "#")
			if more, ok := strings.CutPrefix(strings.TrimSpace(value), "Include"); ok {
				if more = strings.TrimSpace(more); filepath.IsAbs(more) {
					paths = append(paths, filepath.Clean(more))
				}
				continue
			}
			if fields := strings.Fields(value); len(fields) > 0 { // what follows is a comment, # or not
				value, comment = fields[0], strings.Join(fields[1:], " ")+comment
			} else {
				continue
			}
			if f, ok := csfFilter(value); ok {
				value = filterSource(f)
			}
			if value == "" || !utf8.ValidString(value) || len(entries) >= maxAllowed {
				continue
			}
			if p, ok := csfSource(value); ok {
				entries = append(entries, AllowEntry{Prefix: p, Note: noteOf(comment), Why: fmt.Sprintf("%s:%d", path, number)})
			}
		}
	}
	return entries, seen, errors.Join(errs...)
}

// csfFilter splits a line such as tcp|in|d=22|s=192.0.2.7, or in the older form
// tcp:in:d=22:s=192.0.2.7; CSF does not look at the case.
func csfFilter(line string) (fields []string, ok bool) {
	line = strings.ToLower(line)
	if fields = strings.Split(line, "|"); len(fields) > 1 {
		return fields, true
	}
	protocol, _, ok := strings.Cut(line, ":")
	return strings.Split(line, ":"), ok && (protocol == "tcp" || protocol == "udp" || protocol == "icmp")
}

// filterSource is the source address of a filter (CSF's readme.txt, "Advanced
// Allow/Deny Filters"), empty if it has none.
func filterSource(fields []string) (source string) {
	for _, f := range fields {
		if f == "out" {
			return ""
		}
		if a, ok := strings.CutPrefix(f, "s="); ok { // the first one may be a port
			source = strings.TrimSpace(a)
		}
	}
	return source
}

// csfSource reads an address or prefix as CSF does, which hands it to iptables:
// bits beyond the length do not matter.
func csfSource(s string) (netip.Prefix, bool) {
	if p, err := netip.ParsePrefix(s); err == nil {
		p = Canonical(p)
		return p, p.Bits() > 0
	}
	p, f := parseAllowed(s)
	return p, f == nil
}
