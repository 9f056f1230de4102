package policy

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

func TestAllowFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "allow.txt")
	write(t, file, "\ufeff# CSF writes such a head\n"+
		"192.0.2.7 # csf SSH installation/upgrade IP address - Mon Nov 23\r\n"+
		"\n  198.51.100.0/24\t#\x1b[31mred\n2001:db8::/32#x\nDNS:Mail.example.org. # dynamic\nspf:example.com\n")
	p, err := Parse("policy.yaml", []byte("allow:\n  - 203.0.113.1 # first\n  - file:"+file+" # office\n"))
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, e := range p.Allow {
		fmt.Fprintf(&got, "%s|%s|%s\n", e.Prefix, strings.ReplaceAll(e.Why, file, "FILE"), e.Note)
	}
	for _, e := range p.AllowNames {
		fmt.Fprintf(&got, "%s|%s|%s\n", e.Name, strings.ReplaceAll(e.Why, file, "FILE"), e.Note)
	}
	want := `203.0.113.1/32|policy.yaml:2:5|first
192.0.2.7/32|FILE:2|csf SSH installation/upgrade IP address - Mon Nov 23
198.51.100.0/24|FILE:4|[31mred
2001:db8::/32|FILE:5|x
dns:mail.example.org|FILE:6|dynamic
spf:example.com|FILE:7|
`
	if got.String() != want {
		t.Errorf("got:\n%swant:\n%s", got.String(), want)
	}

	// Shown again, the file is named and its content is not repeated.
	var shown strings.Builder
	if err := p.WriteYAML(&shown); err != nil {
		t.Fatal(err)
	}
	if _, section, _ := strings.Cut(shown.String(), "allow:"); !strings.HasPrefix(section, "\n  - 203.0.113.1 # first\n  - file:"+file+" # office\nfirewall:") {
		t.Errorf("shown as %s", section)
	}
}

func TestAllowFileFaults(t *testing.T) {
	file := filepath.Join(t.TempDir(), "allow.txt")
	write(t, file, "192.0.2.7\n  192.0.2.7/24\nInclude /etc/csf/cpanel.allow\ntcp|in|d=22|s=192.0.2.1\nexample.org # x\n\xff\xfe\n0.0.0.0/0\n")
	_, err := Parse("policy.yaml", []byte("mode: off\nallow: ['file:"+file+"']\n"))
	if err == nil {
		t.Fatal("no fault found")
	}
	want := `policy.yaml:1:7: mode: unknown value "off" (want observe or enforce)
FILE:2:3: "192.0.2.7/24" has bits set beyond its length (did you mean 192.0.2.0/24, or 192.0.2.7 alone?)
FILE:3:1: Include is not followed (name that file in the policy, as file:/path)
FILE:4:1: filters with ports are not understood (name a file without them)
FILE:5:1: "example.org" is not an address or prefix (want an address such as 192.0.2.7 or a prefix such as 192.0.2.0/24)
FILE:6:1: "�" is not an address or prefix (want an address such as 192.0.2.7 or a prefix such as 192.0.2.0/24)
FILE:7:1: 0.0.0.0/0 allows every address (to block nobody, set mode: observe)`
	if got := strings.ReplaceAll(err.Error(), file, "FILE"); got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}

	for name, c := range map[string]struct{ content, want string }{
		"too large":   {strings.Repeat("#\n", maxFile), "larger than 1 MiB"},
		"only faults": {strings.Repeat("x\n", 10_000), "more than 50 faults"},
	} {
		write(t, file, c.content)
		if _, err := Parse("policy.yaml", []byte("allow: ['file:"+file+"']\n")); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}

	for _, special := range []string{"/dev/zero", t.TempDir()} {
		if _, err := Parse("policy.yaml", []byte("allow: ['file:"+special+"']\n")); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("%s: %v", special, err)
		}
	}
}

// Many files with many entries each meet one bound together.
func TestAllowIsBounded(t *testing.T) {
	var text strings.Builder
	text.WriteString("allow:\n")
	for i := range maxAllowFiles {
		fmt.Fprintf(&text, "  - file:/%d\n", i)
	}
	page := []byte(strings.Repeat("1.1.1.1\n", maxFile/8))
	reads := 0
	read := func(string) ([]byte, error) { reads++; return page, nil }
	if _, err := parse("policy.yaml", []byte(text.String()), read); err == nil || !strings.Contains(err.Error(), "too many entries") {
		t.Errorf("too many entries: %v", err)
	}
	if reads > 3 {
		t.Errorf("%d files were read after the limit", reads)
	}
	reads = 0
	page = []byte(strings.Repeat("dns:a.example\n", maxFile/16))
	if _, err := parse("policy.yaml", []byte(text.String()), read); err == nil || !strings.Contains(err.Error(), "too many names") {
		t.Errorf("too many names: %v", err)
	}
	text.WriteString("  - file:/more\n")
	read = func(string) ([]byte, error) { return nil, nil }
	if _, err := parse("policy.yaml", []byte(text.String()), read); err == nil || !strings.Contains(err.Error(), "too many files") {
		t.Errorf("too many files: %v", err)
	}
}

func TestParsePrefix(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7":           "192.0.2.7/32",
		"192.0.2.0/24":        "192.0.2.0/24",
		"2001:DB8::":          "2001:db8::/128",
		"2001:db8:0:0::/64":   "2001:db8::/64",
		"0.0.0.0/0":           "0.0.0.0/0",
		"":                    "!want an address",
		"/24":                 "!want an address",
		"192.0.2.0/":          "!want /0 to /32",
		"192.0.2.0/24/24":     "!want /0 to /32",
		"192.0.2.0/-1":        "!want /0 to /32",
		"192.0.2.1/31":        "!did you mean 192.0.2.0/31",
		" 192.0.2.1":          "!want an address",
		"::ffff:10.0.0.1/104": "!did you mean 10.0.0.0/8?",
		"fe80::1%lo/64":       "!did you mean fe80::1?",
	} {
		p, err := ParsePrefix(in)
		if hint, bad := strings.CutPrefix(want, "!"); bad {
			var e Error
			if !errors.As(err, &e) || !strings.HasPrefix(e.Hint, hint) {
				t.Errorf("ParsePrefix(%q): %v, want hint %q", in, err, hint)
			}
		} else if err != nil || p.String() != want {
			t.Errorf("ParsePrefix(%q) = %s, %v; want %s", in, p, err, want)
		}
	}
}
