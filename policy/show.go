package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v4"
)

// WriteYAML writes the policy as a complete policy file: every setting, also
// where it is the default. Parse gives an equal policy again, provided that
// the files of the allowlist still say the same.
func (p *Policy) WriteYAML(w io.Writer) error {
	d, err := yaml.NewDumper(w, yaml.WithIndent(2), yaml.WithLineWidth(-1), yaml.WithCompactSeqIndent(false))
	if err != nil {
		return fmt.Errorf("writing the policy: %w", err)
	}
	if err := d.Dump(schema(p).node()); err != nil {
		return fmt.Errorf("writing the policy: %w", err)
	}
	if err := d.Close(); err != nil {
		return fmt.Errorf("writing the policy: %w", err)
	}
	return nil
}

// MarshalJSON gives the policy with the names and values of the file, which
// Parse reads too.
func (p *Policy) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	if err := writeJSON(&b, schema(p).node()); err != nil {
		return nil, fmt.Errorf("writing the policy: %w", err)
	}
	return b.Bytes(), nil
}

func writeJSON(b *bytes.Buffer, n *yaml.Node) error {
	switch {
	case n.Kind == yaml.MappingNode:
		b.WriteByte('{')
		for i := 0; i < len(n.Content); i += 2 {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := writeJSON(b, n.Content[i]); err != nil {
				return err
			}
			b.WriteByte(':')
			if err := writeJSON(b, n.Content[i+1]); err != nil {
				return err
			}
		}
		b.WriteByte('}')
	case n.Kind == yaml.SequenceNode:
		b.WriteByte('[')
		for i, c := range n.Content {
			if i > 0 {
				b.WriteByte(',')
			}
			if err := writeJSON(b, c); err != nil {
				return err
			}
		}
		b.WriteByte(']')
	case n.Tag == "!!str":
		s, err := json.Marshal(n.Value)
		if err != nil {
			return err
		}
		b.Write(s)
	default:
		b.WriteString(n.Value)
	}
	return nil
}

// Set changes one setting as a command-line flag does: key is its path
// ("firewall.backend"), values its value or, for a list, its elements. The
// value is checked as in a file; whether it fits the other settings is not,
// so that a trial may do what a file may not. The error is Errors.
func (p *Policy) Set(key string, values ...string) error {
	m := schema(p)
	var c codec = m
	for name := range strings.SplitSeq(key, ".") {
		if f, ok := c.(flow); ok {
			c = f.codec
		}
		section, ok := c.(mapping)
		c = nil
		for _, f := range section {
			if ok && f.name == name {
				c = f.codec
			}
		}
		if c == nil {
			return Errors{{Msg: "no setting is called " + quote(key)}}
		}
	}
	d := &decoder{nodes: map[string]*yaml.Node{}, bad: map[string]bool{}, readFile: readFile}
	n := textNode("")
	if want := c.node(); want.Kind == yaml.SequenceNode {
		n = &yaml.Node{Kind: yaml.SequenceNode}
		for _, v := range values {
			n.Content = append(n.Content, textNode(v))
		}
	} else if len(values) == 1 && want.Kind == yaml.ScalarNode {
		n.Value = values[0]
	} else {
		return Errors{{Msg: key + " wants one value"}}
	}
	if isNull(n) {
		n.Style = yaml.DoubleQuotedStyle // an empty text, not a missing value
	}
	c.read(d, key, n)
	if len(d.errs) > 0 {
		return d.errs
	}
	return nil
}
