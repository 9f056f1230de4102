package doctor

import (
	"fmt"
	"strings"
)

// setting says how options of Exim's main section are set on this system, to
// be pasted. Each option is "name = value". Exim refuses a file that sets an
// option twice: so one that is set is changed where it stands, only one that
// is set nowhere is added, and one that the mend of another check has already
// is not told again.
func (x *exam) setting(check string, options ...string) []string {
	var changes, add, addMacros, before []string
	for _, o := range options {
		name, value, _ := strings.Cut(o, " = ")
		if by, ok := x.told[name]; ok && by.option == o {
			before = append(before, fmt.Sprintf("%s: as said under %s.", name, by.check))
			continue
		}
		if x.told == nil {
			x.told = make(map[string]told)
		}
		x.told[name] = told{check, o}
		places := x.Set[name]
		if m := macroOf(places); m != "" && x.debian() {
			if name, places = m, definedBy(x.Set[m], m); len(places) == 0 {
				addMacros = append(addMacros, m+" = "+value)
				continue
			}
		}
		if len(places) == 0 {
			add = append(add, o)
			continue
		}
		for _, p := range places {
			changes = append(changes, change(p, name, value)...)
		}
	}
	if len(changes)+len(add)+len(addMacros) == 0 {
		return before
	}
	if x.SetErr != nil && x.System != CPanel && x.System != DirectAdmin {
		before = append(before, "Not all of Exim's configuration could be read ("+oneLine(x.SetErr)+"): look first whether these are set there already, and change them there.")
	}
	return append(before, x.paste(changes, add, addMacros)...)
}

// told is which check has an option in its mend.
type told struct{ check, option string }

func (x *exam) debian() bool { return x.System == Debian || x.System == DebianSplit }

// macroOf is the macro that gives an option its value, wherever it is set.
func macroOf(places []Setting) string {
	for _, p := range places {
		if m := p.macro(); m != "" {
			return m
		}
	}
	return ""
}

// definedBy are the places of a macro without those that stand back for
// another: a default of Debian's stays as it came.
func definedBy(places []Setting, macro string) []Setting {
	var list []Setting
	for _, p := range places {
		if strings.Join(strings.Fields(p.If), " ") != ".ifndef "+macro {
			list = append(list, p)
		}
	}
	return list
}

// paste are the lines for this system.
func (x *exam) paste(changes, add, addMacros []string) []string {
	var lines []string
	doc := func(file string, options []string) {
		if len(options) > 0 {
			lines = append(lines, "cat >>"+file+" <<'END'\n"+strings.Join(options, "\n")+"\nEND")
		}
	}
	switch x.System {
	case CPanel:
		// Its file is made anew by WHM; only what WHM holds lasts.
		options := append(add, changed(changes)...)
		return append([]string{"WHM » Service Configuration » Exim Configuration Manager » Advanced Editor: change the setting where it is listed, else Add additional configuration setting; then Save:"}, options...)
	case DirectAdmin:
		options := append(add, changed(changes)...)
		return append([]string{"Put into /etc/exim.conf.custom or /etc/exim.variables.conf.custom (change what is there already), build with `da build exim_conf`, and `systemctl restart exim`:"}, options...)
	case DebianSplit:
		lines = append(lines, commands(changes)...)
		doc("/etc/exim4/conf.d/main/000_localmacros", addMacros) // before their use
		doc("/etc/exim4/conf.d/main/95_smtpguard", add)
		return append(lines, "update-exim4.conf && systemctl restart exim4")
	case Debian:
		lines = append(lines, commands(changes)...)
		doc("/etc/exim4/exim4.conf.localmacros", append(addMacros, add...))
		return append(lines, "update-exim4.conf && systemctl restart exim4")
	}
	lines = append(lines, commands(changes)...)
	if len(add) > 0 {
		file := x.Settings["configure_file"]
		if file == "" {
			file = "Exim's configuration file (`exim -bV` names it)"
		}
		lines = append(append(lines, "In "+file+", above its first line that starts with \"begin\", add:"), add...)
	}
	return append(lines, "Then look whether Exim takes it (`exim -bV`), and restart Exim.")
}

// edit marks, in the lines of change, what comes after it as the option for
// panels, which are not to be edited by file.
const edit = "\x00"

// change says where a line is changed, and how: a command that does nothing if
// the line is another one by then.
func change(p Setting, name, value string) []string {
	text := name + " = " + value
	if m := definition.FindStringSubmatch(p.Text); m != nil && m[2] == "==" {
		text = name + " == " + value // a macro that was defined before
	}
	if p.Text == text && p.Line == p.End {
		return []string{fmt.Sprintf("%s says so already%s: restart Exim.", p, under(p))}
	}
	more := ""
	if p.End > p.Line {
		more = fmt.Sprintf(" -e '%d,%dd'", p.Line+1, p.End)
	}
	word := strings.Fields(strings.NewReplacer("=", " ").Replace(p.Text))[0]
	return []string{
		fmt.Sprintf("Change %s%s: `%s` -> `%s`:", p, under(p), bounded(p.Text, 200), text),
		fmt.Sprintf("sed -i -e '%d{/^[[:space:]]*%s/s|.*|%s|}'%s %s", p.Line, word, sedText(text), more, p.File) + edit + text,
	}
}

func under(p Setting) string {
	if p.If == "" {
		return ""
	}
	return " (under " + bounded(p.If, 60) + ")"
}

// sedText is the right side of s|||, in a shell's single quotes.
func sedText(s string) string {
	return strings.NewReplacer(`\`, `\\`, `|`, `\|`, `&`, `\&`, `'`, `'\''`).Replace(s)
}

// commands are the lines of change for files that are edited.
func commands(changes []string) []string {
	var lines []string
	for _, c := range changes {
		command, _, _ := strings.Cut(c, edit)
		lines = append(lines, command)
	}
	return lines
}

// changed are the options of the lines of change.
func changed(changes []string) []string {
	var lines []string
	for _, c := range changes {
		if _, option, ok := strings.Cut(c, edit); ok {
			lines = append(lines, option)
		}
	}
	return lines
}

// logging are the options that let Exim log what smtpguard and reports need,
// with what is on already left on.
func (x *exam) logging() []string {
	value := x.Exim.LogSelector
	for _, s := range []string{"smtp_connection", "incoming_port", "incoming_interface"} {
		if !selected(value, s) {
			value = strings.TrimSpace(value + " +" + s)
		}
	}
	options := []string{"log_selector = " + value}
	if !x.Exim.LogTimezone {
		options = append(options, "log_timezone = true")
	}
	return options
}

// selected reports whether a log_selector has turned something on and not off
// again.
func selected(text, name string) (on bool) {
	for _, w := range strings.Fields(text) {
		switch strings.TrimLeft(w, "+-") {
		case name, "all":
			on = w[0] == '+'
		}
	}
	return on
}
