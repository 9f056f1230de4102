package policy

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"
)

const (
	maxFile  = 1 << 20 // bytes of a policy or of a file of its allowlist
	maxDepth = 12      // a rule's prefixes are at depth 5
)

// Load reads and checks a policy file. The error is Errors; a file that does
// not exist is also fs.ErrNotExist, one that sets nothing ErrEmpty.
func Load(path string) (*Policy, error) {
	data, err := readFile(path)
	if err != nil {
		e := Error{File: path, Msg: err.Error(), Err: err}
		if errors.Is(err, fs.ErrNotExist) {
			e.Hint = "`smtpguard policy init` writes one"
		}
		return nil, Errors{e}
	}
	p, err := Parse(path, data)
	if err == nil && empty(data) {
		return nil, Errors{{File: path, Msg: "nothing is set in it", Err: ErrEmpty,
			Hint: "if it was cut off, as by a full disk, take the copy that you have; `smtpguard policy init` prints the shipped one"}}
	}
	return p, err
}

// ErrEmpty: a policy file sets nothing: it was cut off. Nobody asks by that
// for a policy without an allowlist.
var ErrEmpty = errors.New("the policy file is empty")

// empty reports whether there is nothing in a policy but comments.
func empty(data []byte) bool {
	for line := range strings.Lines(strings.TrimPrefix(string(data), "\ufeff")) {
		if line = strings.TrimSpace(line); line != "" && line[0] != '#' && line != "---" && line != "..." && line != "{}" {
			return false
		}
	}
	return true
}

// Parse checks the text of a policy, which errors call name, and reads the
// files that its allowlist names. What the text does not set has its
// default. The error is Errors and tells all faults.
func Parse(name string, data []byte) (*Policy, error) {
	return parse(name, data, readFile)
}

func parse(name string, data []byte, readFile func(string) ([]byte, error)) (*Policy, error) {
	d := &decoder{file: name, nodes: map[string]*yaml.Node{}, bad: map[string]bool{}, readFile: readFile}
	p := Default()
	if root := d.tree(data); root != nil {
		schema(p).read(d, "", root)
		d.check(p)
	}
	if len(d.errs) > 0 {
		return nil, d.errs.sorted(name)
	}
	return p, nil
}

// tree returns the root of the only document, or nil for an empty file or
// after a fault.
func (d *decoder) tree(data []byte) *yaml.Node {
	text := strings.TrimPrefix(string(data), "\ufeff")
	if !d.readable(text) {
		return nil
	}
	var docs []yaml.Node
	err := yaml.Load([]byte(text), &docs, yaml.WithAllDocuments(), yaml.WithPlugin(loaderlimits.New(
		loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		d.syntax(err)
		return nil
	}
	if len(docs) > 1 {
		n := &docs[1]
		if len(n.Content) > 0 {
			n = n.Content[0]
		}
		d.fail("", n, faultf("remove the line with --- and what follows", "a second document begins here"))
	}
	if len(docs) == 0 || len(docs[0].Content) == 0 {
		return nil
	}
	root := docs[0].Content[0]
	if root.Kind == yaml.ScalarNode && isNull(root) && root.Anchor == "" {
		return nil // "---" and nothing else
	}
	return root
}

// readable refuses what the parser would refuse without a place, or would
// read as something that no editor shows.
func (d *decoder) readable(text string) bool {
	if len(text) > maxFile {
		d.fail("", nil, faultf("put a long allowlist in files of its own, as file:/path", "the file is larger than 1 MiB"))
		return false
	}
	line, column, indent := 1, 0, true
	for i, r := range text {
		column++
		at := &yaml.Node{Line: line, Column: column}
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], "\ufffd"):
			d.fail("", at, faultf("save the file as UTF-8", "the byte 0x%02x is not UTF-8", text[i]))
			return false
		case r == '\t' && indent:
			d.fail("", at, faultf("use spaces", "a tab in the indentation"))
			return false
		case r == '\n':
			line, column, indent = line+1, 0, true
			continue
		case r != '\t' && r != '\r' && (r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0xfeff):
			d.fail("", at, faultf("remove it", "the invisible character %U", r))
			return false
		}
		if r != ' ' {
			indent = false
		}
	}
	return true
}

func (d *decoder) syntax(err error) {
	n := &yaml.Node{}
	msg := err.Error()
	var one *yaml.LoadError
	var many *yaml.LoadErrors
	if errors.As(err, &many) && len(many.Errors) > 0 {
		one = many.Errors[0]
	} else {
		errors.As(err, &one)
	}
	hint := ""
	if one != nil {
		msg = one.Message
		n.Line, n.Column = one.Mark.Line, one.Mark.Column
		if one.ContextMsg != "" {
			msg = one.ContextMsg + ": " + msg
			if one.ContextMark.Line > 0 && one.ContextMark.Line != one.Mark.Line {
				hint = fmt.Sprintf("it began in line %d", one.ContextMark.Line)
			}
		}
	}
	if strings.Contains(msg, "mapping values are not allowed") {
		hint = "wrong indentation, or a value with \": \" in it that needs quotation marks"
	}
	msg = quoteTo(msg, 200) // it may hold text of the file
	d.fail("", n, faultf(hint, "not YAML: %s", strings.ReplaceAll(msg[1:len(msg)-1], `\"`, `"`)))
}

// readFile reads a regular file of at most maxFile bytes; one byte more is
// returned of a longer one. It does not wait for the writer of a pipe.
func readFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, reason(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, reason(err)
	} else if !fi.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, reason(err)
	}
	return data, nil
}

// reason is the cause without "open PATH:", which the place says already.
func reason(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}
