package doctor

import (
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Bounds of what is read of Exim's configuration: cPanel's has 100 KiB in one
// file, Debian's 80 KiB in 60.
const (
	maxConfigFile  = 4 << 20 // bytes
	maxConfigFiles = 200
	maxSettings    = 10_000
)

// Setting is a place in Exim's configuration where an option or a macro of the
// main section is set.
type Setting struct {
	File      string
	Line, End int // counted from 1; End is larger where the value goes on
	// Text is the first line, without blanks around it. If is the condition
	// (.ifdef NAME) under which Exim reads it; "": always.
	Text, If string
}

func (s Setting) String() string { return fmt.Sprintf("%s:%d", s.File, s.Line) }

// definition is what a line must be to set something: an option, possibly
// hidden, possibly a boolean without a value, or a macro.
var definition = regexp.MustCompile(`^(?:hide\s+)?([A-Za-z]\w*)\s*(==?|$)\s*(.*)$`)

// value is what follows the sign.
func (s Setting) value() string {
	if m := definition.FindStringSubmatch(s.Text); m != nil {
		return m[3]
	}
	return ""
}

// macro is the name of the macro that is all of the value; "": there is none.
func (s Setting) macro() string {
	if v := s.value(); s.Line == s.End && isMacro(v) {
		return v
	}
	return ""
}

func isMacro(name string) bool {
	return len(name) > 1 && name[0] >= 'A' && name[0] <= 'Z' && strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_") == ""
}

// configFiles are the files that an administrator writes: those that Debian's
// update-exim4.conf makes Exim's own of, in its order, or Exim's own.
func configFiles(root string, s System, configureFile string) []string {
	switch s {
	case Debian:
		return []string{"/etc/exim4/exim4.conf.localmacros", "/etc/exim4/exim4.conf.template"}
	case DebianSplit:
		const dir = "/etc/exim4/conf.d/main"
		var names []string
		entries, _ := os.ReadDir(filepath.Join("/", root, dir))
		for _, e := range entries {
			if partName.MatchString(e.Name()) {
				names = append(names, filepath.Join(dir, e.Name()))
			}
		}
		return names
	}
	if configureFile == "" {
		return nil
	}
	return []string{configureFile}
}

// partName is what update-exim4.conf takes (its run_parts).
var partName = regexp.MustCompile(`^[[:alnum:]_-]+$`)

// setIn finds where the main section sets what, by names. The error names the
// files that could not be read; what was found in the others is returned.
func setIn(root string, files []string) (map[string][]Setting, error) {
	r := configReader{root: root, set: make(map[string][]Setting)}
	for _, f := range files {
		r.ended = false
		r.file(f, true)
	}
	return r.set, r.err
}

type configReader struct {
	root     string
	set      map[string][]Setting
	files, n int
	ifs      []string
	ended    bool // by "begin NAME"
	err      error
}

func (r *configReader) fault(err error) {
	if r.err == nil {
		r.err = err
	}
}

// file reads one file and those that it includes.
func (r *configReader) file(name string, optional bool) {
	if r.files++; r.files > maxConfigFiles {
		r.fault(fmt.Errorf("more than %d files in Exim's configuration", maxConfigFiles))
		return
	}
	path := filepath.Join("/", r.root, name)
	if real, err := filepath.EvalSymlinks(path); err == nil && r.root == "" {
		path, name = real, real // an editor in place would put a file where the link is
	}
	fi, err := os.Stat(path)
	if err != nil {
		if !optional || !os.IsNotExist(err) {
			r.fault(err)
		}
		return
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxConfigFile {
		r.fault(&fs.PathError{Op: "reading", Path: name, Err: fmt.Errorf("it is not a file, or has more than %d MiB", maxConfigFile>>20)})
		return
	}
	f, err := os.Open(path)
	if err != nil {
		r.fault(err)
		return
	}
	text, err := io.ReadAll(io.LimitReader(f, maxConfigFile))
	f.Close()
	if err != nil {
		r.fault(err)
		return
	}
	r.text(name, string(text))
}

// text reads lines as readconf.c does: one that ends in a backslash goes on,
// comments between its parts are left out.
func (r *configReader) text(name, text string) {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines) && !r.ended; i++ {
		first, line := i, strings.TrimSpace(lines[i])
		if line == "" || line[0] == '#' {
			continue
		}
		for goesOn := strings.HasSuffix(line, `\`); goesOn && i+1 < len(lines); {
			i++
			next := strings.TrimSpace(lines[i])
			goesOn = strings.HasSuffix(next, `\`) || strings.HasPrefix(next, "#")
		}
		word, rest, _ := strings.Cut(line, " ")
		switch rest = strings.TrimSpace(rest); {
		case word == ".include", word == ".include_if_exists":
			r.include(name, rest, word != ".include")
		case word == ".ifdef", word == ".ifndef":
			if len(r.ifs) < 100 {
				r.ifs = append(r.ifs, line)
			}
		case word == ".else", word == ".elifdef", word == ".elifndef":
			if n := len(r.ifs); n > 0 {
				r.ifs[n-1] = line
			}
		case word == ".endif":
			r.ifs = r.ifs[:max(0, len(r.ifs)-1)]
		case word == "begin":
			r.ended = true
		default:
			r.add(line, Setting{File: name, Line: first + 1, End: i + 1, Text: line})
		}
	}
}

func (r *configReader) add(line string, s Setting) {
	m := definition.FindStringSubmatch(line)
	if m == nil || m[2] == "" && isMacro(m[1]) || r.n >= maxSettings {
		return
	}
	r.n++
	if n := len(r.ifs); n > 0 {
		s.If = r.ifs[n-1]
	}
	name := m[1]
	if m[2] == "" { // a boolean: no_NAME and not_NAME turn it off
		name = strings.TrimPrefix(strings.TrimPrefix(name, "no_"), "not_")
	}
	r.set[name] = append(r.set[name], s)
}

// include reads an included file; macros in its name are replaced, the longest
// first.
func (r *configReader) include(from, name string, optional bool) {
	name = strings.Trim(name, `"`)
	macros := slices.SortedFunc(maps.Keys(r.set), func(a, b string) int { return len(b) - len(a) })
	for _, m := range macros {
		if isMacro(m) && strings.Contains(name, m) {
			name = strings.ReplaceAll(name, m, r.set[m][len(r.set[m])-1].value())
		}
	}
	if !filepath.IsAbs(name) { // relative since 4.83
		name = filepath.Join(filepath.Dir(from), name)
	}
	if fi, err := os.Stat(filepath.Join("/", r.root, name)); err == nil && fi.IsDir() {
		return
	}
	r.file(name, optional)
}
