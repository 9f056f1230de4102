package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A log is followed once, however often and under whatever names it is named.
func TestOnceEach(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"main", "other", "day-20261122"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("main", filepath.Join(dir, "soft")); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "main"), filepath.Join(dir, "hard")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ logs, once, twice string }{
		{"main other", "main other", "map[]"},
		{"main main", "main", "map[main:main]"},
		{"soft main other hard", "soft other", "map[hard:soft main:soft]"},
		{"./main main", "./main", "map[main:./main]"},
		{"day-20261122 day-%D", "day-%D", "map[day-20261122:day-%D]"},
		{"day-%D day-%D", "day-%D", "map[day-%D:day-%D]"},
		{"absent main absent", "absent main", "map[absent:absent]"},
		{"main * *", "main *", "map[*:*]"},
	} {
		var logs []string
		for name := range strings.FieldsSeq(c.logs) {
			logs = append(logs, dir+"/"+name)
		}
		once, twice := onceEach(logs)
		short := func(s string) string { return strings.ReplaceAll(s, dir+"/", "") }
		if got := short(strings.Join(once, " ")); got != c.once {
			t.Errorf("%s: followed %s, want %s", c.logs, got, c.once)
		}
		if got := short(fmt.Sprint(twice)); got != c.twice {
			t.Errorf("%s: twice %s, want %s", c.logs, got, c.twice)
		}
	}
}
