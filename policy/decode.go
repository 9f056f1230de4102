package policy

import (
	"fmt"
	"slices"

	"go.yaml.in/yaml/v4"
)

// decoder walks the nodes of one file and collects its faults. Settings are
// named by path: "block.for", "rules[2].window".
type decoder struct {
	file     string
	errs     Errors                // the first ones, in walking order
	faults   int                   // all that were found
	nodes    map[string]*yaml.Node // settings that are in the file
	bad      map[string]bool       // settings with a fault
	readFile func(path string) ([]byte, error)
}

// codec reads one setting from YAML into a Policy and writes it back.
type codec interface {
	// read reports its faults to d and leaves the setting alone then.
	read(d *decoder, path string, n *yaml.Node)
	node() *yaml.Node
}

// field is a key of a mapping.
type field struct {
	name     string
	required bool
	codec
}

func (d *decoder) fail(path string, n *yaml.Node, f *fault) {
	d.bad[path] = true
	e := Error{File: d.file, Msg: f.msg, Hint: f.hint}
	if n != nil {
		e.Line, e.Column = n.Line, n.Column
	}
	d.add(e)
}

// add counts a fault, and keeps it unless there are already too many.
func (d *decoder) add(e Error) {
	d.faults++
	if len(d.errs) < 10*maxErrors {
		d.errs = append(d.errs, e)
	}
}

// contradiction reports a fault that shows only when settings are seen
// together, at the first of paths that the file has. It says nothing if one
// of them is faulty by itself.
func (d *decoder) contradiction(f *fault, paths ...string) {
	for _, p := range paths {
		if d.bad[p] {
			return
		}
	}
	e := Error{File: d.file, Msg: f.msg, Hint: f.hint}
	for _, p := range paths {
		if n := d.nodes[p]; n != nil {
			e.Line, e.Column = n.Line, n.Column
			break
		}
	}
	d.add(e)
}

// accept notes that path is in the file and reports whether its node is of
// the kind that is wanted; want is used in the fault: "a list of ports".
func (d *decoder) accept(path string, n *yaml.Node, kind yaml.Kind, want string) bool {
	d.nodes[path] = n
	switch {
	case n.Kind == yaml.AliasNode:
		d.fail(path, n, faultf("write the value out", "aliases (*%s) are not allowed here", clip(n.Value)))
	case n.Anchor != "":
		d.fail(path, n, faultf("write the value out where it is needed", "anchors (&%s) are not allowed here", clip(n.Anchor)))
	case n.Style&yaml.TaggedStyle != 0:
		d.fail(path, n, faultf("remove the tag", "tags (%s) are not allowed here", clip(n.Tag)))
	case isNull(n):
		d.fail(path, n, faultf("want "+want+"; without the line the default is used", "%s has no value", title(path)))
	case n.Kind != kind:
		d.fail(path, n, faultf("want "+want, "%s is %s", title(path), describe(n)))
	default:
		return true
	}
	return false
}

// title names a setting in a sentence.
func title(path string) string {
	if path == "" {
		return "the policy"
	}
	return path
}

func isNull(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) == 0 &&
		slices.Contains([]string{"", "~", "null", "Null", "NULL"}, n.Value)
}

// describe names what somebody wrote.
func describe(n *yaml.Node) string {
	switch n.Kind {
	case yaml.SequenceNode:
		return "a list"
	case yaml.MappingNode:
		return "a mapping"
	}
	return "the single value " + quote(n.Value)
}

func clip(s string) string {
	s = quote(s)
	return s[1 : len(s)-1]
}

// mapping is a mapping with known keys.
type mapping []field

func (m mapping) read(d *decoder, path string, n *yaml.Node) {
	names := make([]string, len(m))
	for i, f := range m {
		names[i] = f.name
	}
	if !d.accept(path, n, yaml.MappingNode, "a mapping with the keys "+enumerate(names, "and")) {
		return
	}
	m.readKeys(d, path, n, names)
	for _, f := range m {
		if child := join(path, f.name); f.required && d.nodes[child] == nil {
			d.fail(child, n, faultf("", "%s has no %s", path, f.name))
		}
	}
}

func (m mapping) readKeys(d *decoder, path string, n *yaml.Node, names []string) {
	seen := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch at := seen[key.Value]; {
		case key.Kind != yaml.ScalarNode || key.Anchor != "" || key.Style&yaml.TaggedStyle != 0:
			d.fail(path, key, faultf("the keys here are "+enumerate(names, "and"), "a key must be a plain word"))
		case key.Value == "<<":
			d.fail(path, key, faultf("write the settings out", "merge keys (<<) are not allowed here"))
		case at > 0:
			d.fail(path, key, faultf("change that one, and remove this", "%s is set twice, first in line %d", quote(key.Value), at))
		default:
			seen[key.Value] = key.Line
			j := slices.Index(names, key.Value)
			if j < 0 {
				guess := nearest(key.Value, names)
				d.fail(path, key, unknownKey(path, key.Value, guess, names))
				if guess != "" && d.nodes[join(path, guess)] == nil { // then it is not missing
					d.nodes[join(path, guess)], d.bad[join(path, guess)] = key, true
				}
				continue
			}
			m[j].read(d, join(path, key.Value), value)
		}
	}
}

func (m mapping) node() *yaml.Node {
	n := &yaml.Node{Kind: yaml.MappingNode}
	for _, f := range m {
		n.Content = append(n.Content, textNode(f.name), f.node())
	}
	return n
}

func unknownKey(path, key, guess string, names []string) *fault {
	hint := "the keys here are " + enumerate(names, "and")
	if guess != "" {
		hint = "did you mean " + guess + "?"
	} else if at := home(key); path == "" && at != "" {
		hint = "did you mean " + at + "?"
	} else if wholeForm.MatchString(key) {
		hint = "numbers are written without commas"
	}
	return faultf(hint, "unknown key %s", quote(key))
}

// home finds the section that has a key which stands at the top, as with a
// lost indentation.
func home(key string) string {
	for _, f := range schema(Default()) {
		if section, ok := f.codec.(mapping); ok {
			for _, g := range section {
				if g.name == key {
					return f.name + "." + key
				}
			}
		}
	}
	return ""
}

// flow is a codec that is written on one line.
type flow struct{ codec }

func (f flow) node() *yaml.Node {
	n := f.codec.node()
	n.Style |= yaml.FlowStyle
	return n
}

// list is a list of at most most elements, each read by the codec that elem
// makes for it.
type list[T any] struct {
	p           *[]T
	what        string // "a list of ports, as in [25, 465]"
	least, most int
	elem        func(*T) codec
	check       func(values []T) *fault // may be nil
}

func (l list[T]) read(d *decoder, path string, n *yaml.Node) {
	if !d.accept(path, n, yaml.SequenceNode, l.what) {
		return
	}
	if len(n.Content) > l.most {
		d.fail(path, n, faultf(fmt.Sprintf("at most %d", l.most), "%s has %d elements", path, len(n.Content)))
		return
	}
	if len(n.Content) < l.least {
		d.fail(path, n, faultf("want "+l.what, "%s is empty", path))
		return
	}
	before := d.faults
	values := make([]T, len(n.Content))
	for i, child := range n.Content {
		l.elem(&values[i]).read(d, fmt.Sprintf("%s[%d]", path, i), child)
	}
	if d.faults > before {
		d.bad[path] = true
		return
	}
	if l.check != nil {
		if f := l.check(values); f != nil {
			d.fail(path, n, &fault{path + ": " + f.msg, f.hint})
			return
		}
	}
	*l.p = values
}

func (l list[T]) node() *yaml.Node {
	n := &yaml.Node{Kind: yaml.SequenceNode}
	for i := range *l.p {
		n.Content = append(n.Content, l.elem(&(*l.p)[i]).node())
	}
	if len(n.Content) == 0 {
		n.Style = yaml.FlowStyle
	}
	return n
}

func join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}
