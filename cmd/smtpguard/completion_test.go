package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard"
)

// said is what the program prints.
func said(t *testing.T, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	if status := run(t.Context(), append([]string{"smtpguard"}, args...), nil, &out, &errs); status != exitDone {
		t.Fatalf("smtpguard %v: status %d: %s", args, status, errs.String())
	}
	return out.String()
}

// offered asks each shell what it would offer for the last word, the list
// sorted, without descriptions. A zsh without a terminal does not complete: its
// builtins are stood in for, so that what our function gives them is seen.
var offered = map[string]string{
	"bash": `source "$SCRIPT"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
		COMP_WORDBREAKS=$' \t\n"\'><=;|&(:'; compopt() { :; }; _smtpguard; printf '%s\n' "${COMPREPLY[@]}"`,
	"zsh": `compdef() { :; }; _files() { print -l -- *(N); }; _message() { :; }
		compadd() { shift; print -l -- "$@"; }; _describe() { local -a l; l=("${(@P)@[-1]}"); print -l -- "${(@)l%%:*}"; }
		source "$SCRIPT"; words=("$@"); CURRENT=$#; last=$words[-1]; _smtpguard | while read -r w; do [[ $w == $last* ]] && print -r -- $w; done; true`,
	"fish": `source "$SCRIPT"; complete -C "$argv" | string replace -r '\t.*' ''; true`,
}

func TestCompletion(t *testing.T) {
	dir := t.TempDir()
	// What the shells call for blocked sources, in their PATH.
	stub := "#!/bin/sh\n[ \"$*\" = 'completion blocked' ] && printf '%s\\n' 192.0.2.7/32 192.0.2.0/24 2001:db8::/64\n"
	here := filepath.Join(dir, "here")
	for path, text := range map[string]string{"bin/smtpguard": stub, "here/policy.txt": "", "here/other.log": ""} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		t.Run(shell, func(t *testing.T) {
			path, err := exec.LookPath(shell)
			if err != nil {
				skip(t, err)
			}
			script := filepath.Join(dir, "completion."+shell)
			if err := os.WriteFile(script, []byte(said(t, "completion", shell)), 0o644); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.Command(path, "-n", script).CombinedOutput(); err != nil {
				t.Fatalf("%s -n: %s", shell, out)
			}
			for _, c := range []struct{ line, want string }{
				{"smtpguard blo", "block blocks"},
				{"smtpguard blocks ", "export list show"},
				{"smtpguard --json blocks sh", "show"},
				{"smtpguard block --re", "--reason"},
				{"smtpguard --policy po", "policy.txt"},
				{"smtpguard replay oth", "other.log"},
				{"smtpguard unblock 192", "192.0.2.0/24 192.0.2.7/32"},
				{"smtpguard blocks show 192.0.2.7", "192.0.2.7/32"},
				{"smtpguard completion ", "bash fish zsh"},
				{"smtpguard nothing-like-", ""},
			} {
				words := strings.Split(c.line, " ")
				args := append([]string{"-c", offered[shell], shell}, words...)
				switch shell {
				case "zsh":
					args = append([]string{"-f"}, args...)
				case "fish":
					args = []string{"--no-config", "-c", offered[shell], c.line}
				}
				cmd := exec.Command(path, args...)
				cmd.Dir = here
				cmd.Env = []string{"PATH=" + filepath.Join(dir, "bin") + ":/usr/bin:/bin", "SCRIPT=" + script, "HOME=" + dir, "LANG=C.UTF-8"}
				out, err := cmd.CombinedOutput()
				if err != nil {
					t.Fatalf("%s: %v\n%s", c.line, err, out)
				}
				got := strings.Fields(string(out))
				slices.Sort(got)
				if g := strings.Join(got, " "); g != c.want {
					t.Errorf("%q offers %q, want %q", c.line, g, c.want)
				}
			}
		})
	}
}

// The colons of IPv6 addresses divide words for bash.
func TestCompletionIPv6(t *testing.T) {
	bash, err := exec.LookPath("bash")
	if err != nil {
		skip(t, err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "c"), []byte(said(t, "completion", "bash")), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(bash, "-c", `smtpguard() { echo 2001:db8::/64; }; source "$1/c"
		COMP_WORDS=(smtpguard unblock 2001 : d) COMP_CWORD=4 COMP_LINE="smtpguard unblock 2001:d" COMP_POINT=24
		COMP_WORDBREAKS=$' \t\n:'; _smtpguard; echo "${COMPREPLY[@]}"`, "bash", dir).CombinedOutput()
	if got := strings.TrimSpace(string(out)); err != nil || got != "db8::/64" {
		t.Errorf("%q, %v", got, err)
	}
}

// Every command and every flag that --help shows is in the manual page, and
// groff has nothing to say against it.
func TestManual(t *testing.T) {
	page := said(t, "man", "smtpguard.8")
	plain := strings.NewReplacer(`\-`, "-", `\fB`, "", `\fI`, "", `\fR`, "").Replace(page)
	plain = regexp.MustCompile(`(?m)^(\.SS [a-z -]*[a-z]).*$`).ReplaceAllString(plain, "$1") // without options and arguments
	var walk func(path []string)
	heading := regexp.MustCompile(`(?m)^   ([a-z]+) {2,}`)
	flags := regexp.MustCompile(`(?m)^   (--[a-z-]+)`)
	commands := 0
	walk = func(path []string) {
		help := said(t, append(slices.Clone(path), "--help")...)
		section := plain
		if len(path) > 0 {
			_, section, _ = strings.Cut(plain, ".SS smtpguard "+strings.Join(path, " ")+"\n")
			section, _, _ = strings.Cut(section, ".S")
		}
		for _, m := range flags.FindAllStringSubmatch(help, -1) {
			if m[1] != "--help" && !strings.Contains(section, m[1]) {
				t.Errorf("smtpguard %s: %s is not in the manual", strings.Join(path, " "), m[1])
			}
		}
		_, list, ok := strings.Cut(help, "COMMANDS:\n")
		if !ok {
			commands++
			if !strings.Contains(plain, ".SS smtpguard "+strings.Join(path, " ")+"\n") {
				t.Errorf("smtpguard %s is not in the manual", strings.Join(path, " "))
			}
			return
		}
		list, _, _ = strings.Cut(list, "\n\n")
		for _, m := range heading.FindAllStringSubmatch(list, -1) {
			walk(append(slices.Clone(path), m[1]))
		}
	}
	walk(nil)
	if commands < 20 {
		t.Errorf("only %d commands were found in the help", commands)
	}

	groff, err := exec.LookPath("groff")
	if err != nil {
		skip(t, err)
	}
	for _, name := range []string{"smtpguard.8", "smtpguard-policy.5"} {
		cmd := exec.Command(groff, "-Kutf8", "-Tutf8", "-man", "-ww", "-z", "-rLL=100n")
		cmd.Stdin = strings.NewReader(said(t, "man", name))
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}

// Every line of the shipped policy is in its page, and every setting at the
// left margin has a heading.
func TestManualPolicy(t *testing.T) {
	page := said(t, "man", "smtpguard-policy.5")
	plain := strings.NewReplacer(`\-`, "-", `\fB`, "", `\fI`, "", `\fR`, "", `\e`, `\`, `\&`, "").Replace(page)
	for line := range strings.Lines(smtpguard.PolicyYAML) {
		text := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(line), "#"))
		if !strings.Contains(plain, strings.ReplaceAll(text, "`", "")) {
			t.Errorf("not in the page: %q", text)
		}
	}
	var keys map[string]any
	if err := yaml.Unmarshal([]byte(smtpguard.PolicyYAML), &keys); err != nil {
		t.Fatal(err)
	}
	for k := range keys {
		if !strings.Contains(plain, "\n.SS "+k+"\n") {
			t.Errorf("%s has no heading", k)
		}
	}
}
