package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
)

func (e *env) completionCommand() *cli.Command {
	shell := func(name string, write func(io.Writer, []place)) *cli.Command {
		return &cli.Command{Name: name, Usage: "for " + name, Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			write(e.stdout, places(c.App))
			return nil
		}}
	}
	return &cli.Command{
		Name: "completion", Usage: "print what a shell needs to complete commands, flags and blocked sources",
		Description: "For this session: `source <(smtpguard completion bash)`, or `smtpguard completion fish | source`. Packages and `make install` put them where the shells look.",
		Subcommands: []*cli.Command{
			shell("bash", bashCompletion), shell("zsh", zshCompletion), shell("fish", fishCompletion),
			{Name: "blocked", Hidden: true, Usage: "what is blocked, for the shells", Action: e.completionBlocked},
		},
	}
}

// completionBlocked prints what is blocked, a line each, if a daemon says so
// at once. A key in a shell opens no store and prints no error.
func (e *env) completionBlocked(c *cli.Context) error {
	p, err := e.policy(c)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(c.Context, time.Second)
	defer cancel()
	cl, err := control.Dial(ctx, p.Control.Socket)
	if err != nil {
		return nil
	}
	defer cl.Close()
	list, err := cl.Blocks(ctx)
	if err != nil {
		return nil
	}
	for _, b := range list[:min(len(list), 1000)] {
		fmt.Fprintln(e.stdout, b.Prefix)
	}
	return nil
}

// place is a command with what may follow it.
type place struct {
	path     string // "blocks list"; empty: the program itself
	usage    string
	about    string // the longer description, may be empty
	args     string // as in the usage line, may be empty
	flags    []flag // its own
	commands []*cli.Command
}

// flag is one flag of a command, without the dashes.
type flag struct {
	name  string
	value string // what stands for its value: FILE; empty: it takes none
	usage string // without backquotes
	env   []string
}

// file reports whether the value is the name of a file.
func (f flag) file() bool { return f.value == "FILE" || f.value == "DIR" || f.value == "PATH" }

// places lists the program and its commands, each before those below it.
// Hidden ones are left out, and so is --help.
func places(app *cli.App) []place {
	out := []place{{usage: app.Usage, flags: flagsOf(app.Flags), commands: shown(app.Commands)}}
	var walk func(above string, list []*cli.Command)
	walk = func(above string, list []*cli.Command) {
		for _, c := range list {
			p := place{
				path: strings.TrimSpace(above + " " + c.Name), usage: c.Usage, about: c.Description, args: c.ArgsUsage,
				flags: flagsOf(c.Flags), commands: shown(c.Subcommands),
			}
			out = append(out, p)
			walk(p.path, p.commands)
		}
	}
	walk("", out[0].commands)
	return out
}

func shown(list []*cli.Command) []*cli.Command {
	return slices.DeleteFunc(slices.Clone(list), func(c *cli.Command) bool { return c.Hidden || c.Name == "help" })
}

func flagsOf(list []cli.Flag) []flag {
	var out []flag
	for _, f := range list {
		d, ok := f.(cli.DocGenerationFlag)
		if v, hides := f.(cli.VisibleFlag); !ok || hides && !v.IsVisible() || slices.Contains(f.Names(), "help") {
			continue
		}
		n := flag{name: f.Names()[0], usage: strings.ReplaceAll(d.GetUsage(), "`", ""), env: d.GetEnvVars()}
		if d.TakesValue() {
			n.value = "VALUE"
			if parts := strings.SplitN(d.GetUsage(), "`", 3); len(parts) == 3 {
				n.value = strings.ToUpper(parts[1])
			}
		}
		out = append(out, n)
	}
	return out
}

// takes says what a command's arguments are to a shell: "blocked" sources,
// "files", or nothing that it could know.
func (p place) takes() string {
	switch {
	case p.path == "unblock", p.path == "explain", p.path == "blocks show":
		return "blocked"
	case strings.Contains(p.args, "FILE"), strings.Contains(p.args, "DIR"):
		return "files"
	}
	return ""
}

// below are the words of the commands that may follow.
func (p place) below() []string {
	var out []string
	for _, c := range p.commands {
		out = append(out, c.Name)
	}
	return out
}

// steps are "BLOCKS LIST"-like pairs for a shell that reads a line from its
// beginning: the place where it is, a space, and the word that leads on.
func steps(all []place) []string {
	var out []string
	for _, p := range all {
		for _, w := range p.below() {
			out = append(out, p.path+" "+w)
		}
	}
	return out
}

// valued lists, as shell patterns on "PLACE --FLAG", the flags whose value
// comes next: names of files, or anything.
func valued(all []place) (files, other []string) {
	for _, p := range all {
		for _, f := range p.flags {
			pattern := shellQuote(p.path + " --" + f.name)
			if p.path == "" {
				pattern = "*" + shellQuote(" --"+f.name)
			}
			switch {
			case f.file():
				files = append(files, pattern)
			case f.value != "":
				other = append(other, pattern)
			}
		}
	}
	return files, other
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func quoteAll(list []string) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = shellQuote(s)
	}
	return out
}

// dashed are the flags that may stand at a place: its own and the global ones.
func (p place) dashed(all []place) []flag {
	out := slices.Clone(p.flags)
	if p.path != "" {
		out = append(out, all[0].flags...)
	}
	return append(out, flag{name: "help", usage: "show help"})
}

func bashCompletion(w io.Writer, all []place) {
	files, other := valued(all)
	fmt.Fprintf(w, `# bash completion for smtpguard; made by: smtpguard completion bash
_smtpguard() {
	local cur=${COMP_WORDS[COMP_CWORD]} at='' words='' flags='' args='' whole i
	for ((i = 1; i < COMP_CWORD; i++)); do
		case "$at ${COMP_WORDS[i]}" in
		%s) at=${at:+$at }${COMP_WORDS[i]} ;;
		esac
	done
	COMPREPLY=()
	case "$at ${COMP_WORDS[COMP_CWORD-1]}" in
	%s) compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); return ;;
	%s) return ;;
	esac
	case $at in
`, strings.Join(quoteAll(steps(all)), " | "), strings.Join(files, " | "), strings.Join(other, " | "))
	for _, p := range all {
		var flags []string
		for _, f := range p.dashed(all) {
			flags = append(flags, "--"+f.name)
		}
		fmt.Fprintf(w, "\t%s) words=%s flags=%s args=%s ;;\n", shellQuote(p.path),
			shellQuote(strings.Join(p.below(), " ")), shellQuote(strings.Join(flags, " ")), shellQuote(p.takes()))
	}
	fmt.Fprint(w, `	esac
	if [[ $cur == -* ]]; then
		mapfile -t COMPREPLY < <(compgen -W "$flags" -- "$cur")
	elif [[ $args == files ]]; then
		compopt -o filenames 2>/dev/null
		mapfile -t COMPREPLY < <(compgen -f -- "$cur")
	elif [[ $args == blocked ]]; then
		# The colons of an IPv6 address divide it into words for bash.
		whole=${COMP_LINE:0:COMP_POINT} whole=${whole##* }
		mapfile -t COMPREPLY < <(compgen -W "$(smtpguard completion blocked 2>/dev/null)" -- "$whole")
		if [[ $whole == *:* && $COMP_WORDBREAKS == *:* ]]; then
			COMPREPLY=("${COMPREPLY[@]#"${whole%"${whole##*:}"}"}")
		fi
	else
		mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur")
	fi
}
complete -F _smtpguard smtpguard
`)
}

func zshCompletion(w io.Writer, all []place) {
	files, other := valued(all)
	fmt.Fprintf(w, `#compdef smtpguard
# made by: smtpguard completion zsh
_smtpguard() {
	local at='' args='' i
	local -a commands options blocked
	for ((i = 2; i < CURRENT; i++)); do
		case "$at $words[i]" in
		(%s) at="${at:+$at }$words[i]" ;;
		esac
	done
	case "$at $words[CURRENT-1]" in
	(%s) _files; return ;;
	(%s) _message value; return ;;
	esac
	case $at in
`, strings.Join(quoteAll(steps(all)), " | "), strings.Join(files, " | "), strings.Join(other, " | "))
	described := func(name, usage string) string { return shellQuote(name + ":" + strings.ReplaceAll(usage, ":", `\:`)) }
	for _, p := range all {
		fmt.Fprintf(w, "\t(%s) args=%s\n\t\tcommands=(", shellQuote(p.path), shellQuote(p.takes()))
		for _, c := range p.commands {
			fmt.Fprintf(w, "\n\t\t\t%s", described(c.Name, strings.ReplaceAll(c.Usage, "`", "")))
		}
		fmt.Fprint(w, ")\n\t\toptions=(")
		for _, f := range p.dashed(all) {
			fmt.Fprintf(w, "\n\t\t\t%s", described("--"+f.name, f.usage))
		}
		fmt.Fprint(w, ") ;;\n")
	}
	fmt.Fprint(w, `	esac
	if [[ $words[CURRENT] == -* ]]; then
		_describe -o option options
	elif [[ $args == files ]]; then
		_files
	elif [[ $args == blocked ]]; then
		blocked=(${(f)"$(smtpguard completion blocked 2>/dev/null)"})
		compadd -- $blocked
	else
		_describe command commands
	fi
}
if [[ $funcstack[1] == _smtpguard ]]; then
	_smtpguard "$@"
else
	compdef _smtpguard smtpguard
fi
`)
}

func fishCompletion(w io.Writer, all []place) {
	// In fish's quotes only \ and ' are special.
	quote := func(s string) string {
		return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`, "`", "").Replace(s) + "'"
	}
	var cases []string
	for _, s := range steps(all) {
		cases = append(cases, quote(s))
	}
	fmt.Fprintf(w, `# fish completion for smtpguard; made by: smtpguard completion fish
function __smtpguard_at
    set -l at ''
    for w in (commandline -opc)[2..-1]
        switch "$at $w"
            case %s
                set at (string trim -- "$at $w")
        end
    end
    test "$at" = "$argv[1]"
end
complete -c smtpguard -f
`, strings.Join(cases, " "))
	for _, p := range all {
		at := quote("__smtpguard_at " + quote(p.path))
		if p.path == "" { // its flags may stand anywhere
			fmt.Fprintln(w, "complete -c smtpguard -l help -d 'show help'")
		}
		for _, f := range p.flags {
			fmt.Fprint(w, "complete -c smtpguard")
			if p.path != "" {
				fmt.Fprint(w, " -n ", at)
			}
			fmt.Fprint(w, " -l ", f.name)
			switch {
			case f.file():
				fmt.Fprint(w, " -r -F")
			case f.value != "":
				fmt.Fprint(w, " -x")
			}
			fmt.Fprintln(w, " -d", quote(f.usage))
		}
		for _, c := range p.commands {
			fmt.Fprintln(w, "complete -c smtpguard -n", at, "-a", c.Name, "-d", quote(c.Usage))
		}
		switch p.takes() {
		case "files":
			fmt.Fprintln(w, "complete -c smtpguard -n", at, "-F")
		case "blocked":
			fmt.Fprintln(w, "complete -c smtpguard -n", at, "-a '(smtpguard completion blocked 2>/dev/null)'")
		}
	}
}
