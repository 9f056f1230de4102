package policy

import (
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
Include `+more+`
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
198.51.100.0/24 more.allow:1 `
	if text := strings.Join(lines, "\n"); text != want {
		t.Errorf("got\n%s\nwant\n%s", text, want)
	}
	if _, err := CSFAllowed([]string{dir}); err == nil {
		t.Error("a directory is read")
	}
}
