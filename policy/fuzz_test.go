package policy

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard"
)

// Whatever a file holds, Parse returns a policy that survives being shown
// and read again, or a bounded list of faults on one line each.
func FuzzParse(f *testing.F) {
	f.Add([]byte(smtpguard.PolicyYAML))
	f.Add([]byte(another))
	files, _ := filepath.Glob("../testdata/policy/*.yaml")
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		read := func(string) ([]byte, error) { return nil, fs.ErrNotExist }
		if bytes.Contains(data, []byte("file:/readable")) {
			read = func(string) ([]byte, error) { return data, nil }
		}
		p, err := parse("p", data, read)
		if err != nil {
			var list Errors
			if p != nil || !errors.As(err, &list) || len(list) == 0 || len(list) > maxErrors+1 {
				t.Fatalf("%v, %T", p, err)
			}
			for _, e := range list {
				if s := e.Error(); len(s) > 5000 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' }) {
					t.Fatalf("badly formed: %q", s)
				}
			}
			return
		}
		var shown bytes.Buffer
		if err := p.WriteYAML(&shown); err != nil {
			t.Fatal(err)
		}
		again, err := parse("p", shown.Bytes(), read)
		if err != nil {
			t.Fatalf("%v\n%s", err, shown.Bytes())
		}
		if len(again.Allow) != len(p.Allow) || len(again.AllowNames) != len(p.AllowNames) {
			t.Fatalf("%d allowed, then %d", len(p.Allow), len(again.Allow))
		}
		again.Allow, again.AllowFiles, p.Allow, p.AllowFiles = nil, nil, nil, nil
		again.AllowNames, p.AllowNames = nil, nil
		sameFields(t, again, p)
	})
}

// Large files cost little, whatever they are made of.
func TestHostileFiles(t *testing.T) {
	const large = maxFile / 8
	fill := func(s string) string { return strings.Repeat(s, large/len(s)) }
	for name, text := range map[string]string{
		"flow":       fill("["),
		"mappings":   fill("{"),
		"keys":       fill("? "),
		"dashes":     fill("- "),
		"words":      "allow: [" + fill("x,")[:large-9] + "]",
		"nulls":      "allow: [" + fill(",")[:large-9] + "]",
		"anchors":    fill("a: &a b\n"),
		"aliases":    "a: &a [b]\nallow: [" + fill("*a,")[:large-30] + "]",
		"documents":  fill("---\n"),
		"comments":   fill("#\n"),
		"long":       "mode: " + fill("x")[:large-8],
		"quotes":     "mode: \"" + fill("\\n")[:large-8],
		"block":      "mode: |\n" + fill(" x\n")[:large-8],
		"rules":      "rules:\n" + fill(" - {}\n")[:large-8],
		"lengths":    "rules: [{prefixes: [" + fill("/1,")[:large-40] + "]}]",
		"empty keys": fill(": \n"),
		"long key":   fill("x")[:1000] + ": 1\n",
		"spaces":     "a:\n" + fill(" ")[:large-8] + "b",
	} {
		start := time.Now()
		if _, err := Parse("policy.yaml", []byte(text)); err == nil && name != "comments" && name != "documents" {
			t.Errorf("%s: no fault found", name)
		} else if err != nil && len(err.Error()) > 100_000 {
			t.Errorf("%s: %d bytes of error", name, len(err.Error()))
		}
		t.Logf("%s: %v", name, time.Since(start).Round(time.Millisecond))
	}
}
