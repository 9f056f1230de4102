package policy

import (
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard/allow"
)

// Bounds of the allowlist with all its files.
const (
	maxAllowed    = 200_000 // entries
	maxAllowFiles = 50
	// MaxAllowNames bounds the names: each is looked up every few minutes.
	MaxAllowNames = 100
)

// allowCodec is the setting allow: addresses, prefixes, names and
// "file:/path".
type allowCodec struct{ p *Policy }

const allowWant = "a list of addresses, prefixes, dns:NAME, spf:DOMAIN and file:/path, as in [192.0.2.7, 2001:db8::/32]"

func (c allowCodec) read(d *decoder, path string, n *yaml.Node) {
	if !d.accept(path, n, yaml.SequenceNode, allowWant) {
		return
	}
	var entries []AllowEntry
	var names []AllowName
	var files []AllowFile
	for i, child := range n.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		if !d.accept(at, child, yaml.ScalarNode, "an address, a prefix, a name or file:/path") {
			continue
		}
		note := noteOf(child.LineComment)
		if file, ok := strings.CutPrefix(child.Value, "file:"); ok {
			if f := checkPath(file); f != nil {
				d.fail(at, child, f)
				continue
			}
			if len(files) == maxAllowFiles {
				d.fail(at, child, faultf(fmt.Sprintf("at most %d", maxAllowFiles), "too many files"))
				break
			}
			files = append(files, AllowFile{Path: file, Note: note})
			more, moreNames, errs := readAllowFile(file, d.readFile, maxAllowed-len(entries))
			names = append(names, moreNames...)
			if len(errs) > 0 {
				if errs[0].Line == 0 { // the file as a whole
					d.fail(at, child, faultf(errs[0].Hint, "%s: %s", clip(file), errs[0].Msg))
				} else {
					d.bad[at] = true
					for _, e := range errs {
						d.add(e)
					}
				}
			}
			entries = append(entries, more...)
			if len(errs) > 0 && len(entries) >= maxAllowed {
				break
			}
			continue
		}
		why := "command line" // by Set
		if child.Line > 0 {
			why = fmt.Sprintf("%s:%d:%d", d.file, child.Line, child.Column)
		}
		if allow.IsName(child.Value) {
			name, f := parseName(child.Value)
			if f != nil {
				d.fail(at, child, f)
				continue
			}
			names = append(names, AllowName{Name: name, Why: why, Note: note})
			continue
		}
		prefix, f := parseAllowed(child.Value)
		if f != nil {
			d.fail(at, child, f)
			continue
		}
		entries = append(entries, AllowEntry{Prefix: prefix, Why: why, Note: note})
	}
	if len(entries) > maxAllowed {
		d.fail(path, n, faultf(fmt.Sprintf("at most %d", maxAllowed), "allow has too many entries"))
	}
	if len(names) > MaxAllowNames {
		d.fail(path, n, faultf(fmt.Sprintf("at most %d; a name may have many addresses", MaxAllowNames), "allow has too many names"))
	}
	c.p.Allow, c.p.AllowNames, c.p.AllowFiles = entries, names, files
}

func (c allowCodec) node() *yaml.Node {
	n := &yaml.Node{Kind: yaml.SequenceNode}
	add := func(value, note string) {
		e := textNode(value)
		if note != "" {
			e.LineComment = "# " + note
		}
		n.Content = append(n.Content, e)
	}
	for _, e := range c.p.Allow {
		if !e.fromFile {
			add(showPrefix(e.Prefix), e.Note)
		}
	}
	for _, e := range c.p.AllowNames {
		if !e.fromFile {
			add(string(e.Name), e.Note)
		}
	}
	for _, f := range c.p.AllowFiles {
		add("file:"+f.Path, f.Note)
	}
	if len(n.Content) == 0 {
		n.Style = yaml.FlowStyle
	}
	return n
}

// readAllowFile reads one address, prefix or name a line; # begins a comment.
// The simple lines of csf.allow are such lines, its filters with ports are not.
// It stops at most entries.
func readAllowFile(path string, readFile func(string) ([]byte, error), most int) ([]AllowEntry, []AllowName, Errors) {
	data, err := readFile(path)
	if err != nil {
		return nil, nil, Errors{{File: path, Msg: err.Error(), Err: err}}
	}
	if len(data) > maxFile {
		return nil, nil, Errors{{File: path, Msg: "the file is larger than 1 MiB"}}
	}
	if !utf8.Valid(data) {
		data = []byte(strings.ToValidUTF8(string(data), "\ufffd"))
	}
	var entries []AllowEntry
	var names []AllowName
	var errs Errors
	number := 0
	for line := range strings.Lines(strings.TrimPrefix(string(data), "\ufeff")) {
		number++
		value, comment, _ := strings.Cut(line, "#")
		value = strings.TrimSpace(value)
		if value == "" {
			continue
		}
		var f *fault
		var prefix netip.Prefix
		var name allow.Name
		if allow.IsName(value) {
			name, f = parseName(value)
		} else {
			prefix, f = parseAllowed(value)
		}
		switch {
		case f == nil && name != "":
			if len(names) <= MaxAllowNames { // one more is told by the reader of the list
				names = append(names, AllowName{Name: name, Note: noteOf(comment), fromFile: true, Why: fmt.Sprintf("%s:%d", path, number)})
			}
			continue
		case f == nil && len(entries) >= most:
			return entries, names, append(errs, Error{File: path, Line: number, Column: 1,
				Msg: "too many entries", Hint: fmt.Sprintf("the allowlist takes %d", maxAllowed)})
		case f == nil:
			entries = append(entries, AllowEntry{Prefix: prefix, Note: noteOf(comment), fromFile: true,
				Why: fmt.Sprintf("%s:%d", path, number)})
			continue
		case strings.HasPrefix(value, "Include "):
			f = faultf("name that file in the policy, as file:/path", "Include is not followed")
		case strings.Contains(value, "|"):
			f = faultf("name a file without them", "filters with ports are not understood")
		}
		column := 1 + utf8.RuneCountInString(line[:strings.Index(line, value)])
		if errs = append(errs, Error{File: path, Line: number, Column: column, Msg: f.msg, Hint: f.hint}); len(errs) > maxErrors {
			return nil, nil, errs
		}
	}
	return entries, names, errs
}

// noteOf makes a comment presentable: one line, printable, bounded.
func noteOf(comment string) string {
	comment = strings.TrimSpace(strings.TrimLeft(strings.TrimSpace(comment), "#"))
	comment, _, _ = strings.Cut(comment, "\n")
	comment = strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, comment)
	if r := []rune(comment); len(r) > 200 {
		comment = string(r[:200])
	}
	return strings.TrimSpace(comment)
}

func parseName(s string) (allow.Name, *fault) {
	name, err := allow.Parse(s)
	if err != nil {
		return "", faultf("want a full name, as in dns:mail.example.org or spf:example.org", "%s", err.Error())
	}
	return name, nil
}

func parseAllowed(s string) (netip.Prefix, *fault) {
	prefix, f := parsePrefix(s)
	if f == nil && prefix.Bits() == 0 {
		f = faultf("to block nobody, set mode: observe", "%s allows every address", prefix)
	}
	return prefix, f
}

// ParsePrefix reads an address or a prefix as people write them, "192.0.2.7"
// or "2001:db8::/32", and refuses what is likely a mistake: host bits, zones,
// IPv4 in IPv6. The error is an Error with a hint.
func ParsePrefix(s string) (netip.Prefix, error) {
	p, f := parsePrefix(s)
	if f != nil {
		return netip.Prefix{}, Error{Msg: f.msg, Hint: f.hint}
	}
	return p, nil
}

func parsePrefix(s string) (netip.Prefix, *fault) {
	if len(s) > 128 {
		return netip.Prefix{}, faultf("", "%s is not an address or prefix", quote(s))
	}
	address, bits, slash := strings.Cut(s, "/")
	addr, err := netip.ParseAddr(address)
	if err != nil {
		hint := "want an address such as 192.0.2.7 or a prefix such as 192.0.2.0/24"
		if strings.HasPrefix(address, "[") && strings.HasSuffix(address, "]") {
			hint = "remove the brackets"
		}
		return netip.Prefix{}, faultf(hint, "%s is not an address or prefix", quote(s))
	}
	if addr.Zone() != "" {
		return netip.Prefix{}, faultf("did you mean "+addr.WithZone("").String()+"?", "%s has a zone", quote(s))
	}
	if !slash {
		bits = fmt.Sprint(addr.BitLen())
	}
	prefix, err := netip.ParsePrefix(addr.String() + "/" + bits)
	if err != nil {
		return netip.Prefix{}, faultf(fmt.Sprintf("want /0 to /%d", addr.BitLen()), "%s has no valid prefix length", quote(s))
	}
	if c := Canonical(prefix); c.Addr().BitLen() != addr.BitLen() {
		return netip.Prefix{}, faultf("did you mean "+showPrefix(c)+"?", "%s is an IPv4 address in IPv6 notation", quote(s))
	} else if c != prefix {
		return netip.Prefix{}, faultf("did you mean "+showPrefix(c)+", or "+addr.String()+" alone?", "%s has bits set beyond its length", quote(s))
	}
	return prefix, nil
}

// showPrefix writes a single address without its length.
func showPrefix(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
