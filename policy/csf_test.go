package policy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCSFAllowed(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	more := write("more.allow", "198.51.100.0/24\nInclude "+filepath.Join(dir, "csf.allow")+"\n")
	allow := write("csf.allow", `# CSF's own comment
192.0.2.7 # Manually allowed - Sun Nov 22
2001:db8::/32
tcp|in|d=25|s=203.0.113.9
tcp|out|d=25|s=203.0.113.10
udp|in|d=53
192.0.2.300
example.org
0.0.0.0/0
198.18.0.5/24
tcp|in|s=25|s=203.0.113.11
TCP|IN|D=25|S=203.0.113.12
TCP|OUT|d=25|s=203.0.113.13
tcp:in:d=25:s=203.0.113.14
192.0.2.101 words without a sign
 192.0.2.102	#	a tab
Include`+more+`
Include relative.allow
`)
	got, err := CSFAllowed([]string{allow, filepath.Join(dir, "csf.ignore")})
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for _, e := range got {
		lines = append(lines, fmt.Sprintf("%s %s %s", e.Prefix, strings.TrimPrefix(e.Why, dir+"/"), e.Note))
	}
	want := `192.0.2.7/32 csf.allow:2 Manually allowed - Sun Nov 22
2001:db8::/32 csf.allow:3 
203.0.113.9/32 csf.allow:4 
198.18.0.0/24 csf.allow:10 
203.0.113.11/32 csf.allow:11 
203.0.113.12/32 csf.allow:12 
203.0.113.14/32 csf.allow:14 
192.0.2.101/32 csf.allow:15 words without a sign
192.0.2.102/32 csf.allow:16 a tab
198.51.100.0/24 more.allow:1 `
	if text := strings.Join(lines, "\n"); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
	if _, err := CSFAllowed([]string{dir}); err == nil {
		t.Error("a directory is read")
	}
}

// What csf -a adds is seen at the next look, and a file that cannot be read is
// an error at each, until it can.
func TestCSFLists(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	allow, more := filepath.Join(dir, "csf.allow"), filepath.Join(dir, "more")
	l := CSFLists{Paths: func() []string { return []string{allow} }}
	look := func(want int) {
		t.Helper()
		for range 2 { // the second time from memory
			if got, err := l.Look(); err != nil || len(got) != want {
				t.Errorf("%v, %v; want %d", got, err, want)
			}
		}
	}
	look(0)
	write("csf.allow", "192.0.2.7\nInclude\t"+more+"\n")
	look(1)
	write("more", "192.0.2.8\n192.0.2.9\n")
	look(3)
	write("more", "192.0.2.8\n")
	look(2)
	if err := errors.Join(os.Remove(more), os.Mkdir(more, 0o700)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got, err := l.Look(); err == nil || len(got) != 1 {
			t.Errorf("%v, %v; a directory is read", got, err)
		}
	}
	if err := os.Remove(more); err != nil {
		t.Fatal(err)
	}
	look(1)
}
