package policy

import (
	"bytes"
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/smtpguard/smtpguard"
)

var update = flag.Bool("update", false, "write testdata/policy/*.err anew")

// Each file of testdata/policy has one mistake, or one kind of it; beside it
// stands what the administrator is told.
func TestFaults(t *testing.T) {
	files, err := filepath.Glob("../testdata/policy/*.yaml")
	if err != nil || len(files) < 50 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		t.Run(strings.TrimSuffix(name, ".yaml"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			_, err = Parse(name, data)
			if err == nil {
				t.Fatal("no fault found")
			}
			var list Errors
			if !errors.As(err, &list) {
				t.Fatalf("error is a %T: %v", err, err)
			}
			for _, e := range list {
				if e.File != name || e.Msg == "" || strings.Contains(e.Error(), "\n") {
					t.Errorf("badly formed: %#v", e)
				}
			}
			got := err.Error() + "\n"
			golden := strings.TrimSuffix(file, ".yaml") + ".err"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.yaml")

	_, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "smtpguard policy init") {
		t.Errorf("missing file: %v", err)
	}
	if _, err := Load(dir); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("directory: %v", err)
	}
	write(t, path, smtpguard.PolicyYAML)
	p, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	sameFields(t, p, Default())

	write(t, path, "mode: bloc\n")
	var e Error
	if _, err = Load(path); !errors.As(err, &e) || e.File != path || e.Line != 1 || e.Column != 7 {
		t.Errorf("place is missing: %v", err)
	}
	write(t, path, "# "+strings.Repeat("x", maxFile)+"\n")
	if _, err := Load(path); err == nil || !strings.Contains(err.Error(), "larger than 1 MiB") {
		t.Errorf("large file: %v", err)
	}
}

func TestWindowsLineEnds(t *testing.T) {
	p, err := Parse("policy.yaml", []byte("\ufeff"+strings.ReplaceAll(smtpguard.PolicyYAML, "\n", "\r\n")))
	if err != nil {
		t.Fatal(err)
	}
	sameFields(t, p, Default())
}

func TestManyFaultsAreBounded(t *testing.T) {
	var b bytes.Buffer
	for range 20_000 {
		b.WriteString("key: 1\n")
	}
	_, err := Parse("policy.yaml", b.Bytes())
	var list Errors
	if !errors.As(err, &list) || len(list) != maxErrors+1 {
		t.Fatalf("%d errors", len(list))
	}
	if last := list[maxErrors].Error(); last != "policy.yaml: more than 50 faults, the rest are not shown" {
		t.Error(last)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
