package policy

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
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
	var entries []AllowEntry
	var errs []error
	seen := make(map[string]bool)
	for len(paths) > 0 && len(seen) < csfIncludes {
		path := paths[0]
		paths = paths[1:]
		if seen[path] {
			continue
		}
		seen[path] = true
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
			value = strings.TrimSpace(value)
			if more, ok := strings.CutPrefix(value, "Include "); ok {
				if more = strings.TrimSpace(more); filepath.IsAbs(more) {
					paths = append(paths, filepath.Clean(more))
				}
				continue
			}
			if strings.Contains(value, "|") {
				value = filterSource(value)
			}
			if value == "" || !utf8.ValidString(value) || len(entries) >= maxAllowed {
				continue
			}
			if p, f := parseAllowed(value); f == nil {
				entries = append(entries, AllowEntry{Prefix: p, Note: noteOf(comment), Why: fmt.Sprintf("%s:%d", path, number)})
			}
		}
	}
	return entries, errors.Join(errs...)
}

// filterSource is the source address of a line such as tcp|in|d=22|s=192.0.2.7
// (CSF's readme.txt, "Advanced Allow/Deny Filters"), empty if it has none.
func filterSource(line string) string {
	fields := strings.Split(line, "|")
	for _, f := range fields {
		if f == "out" {
			return ""
		}
	}
	for _, f := range fields {
		if a, ok := strings.CutPrefix(f, "s="); ok {
			return strings.TrimSpace(a)
		}
	}
	return ""
}
