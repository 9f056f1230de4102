package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/policy"
)

// otherWords are what other programs of this kind call our commands.
var otherWords = map[string]string{
	"ban": "block", "deny": "block", "drop": "block", "blacklist": "block", "unban": "unblock", "pardon": "unblock", "release": "unblock",
	"whitelist": "allow", "permit": "allow", "ignore": "allow", "stats": "status", "info": "status", "start": "run", "daemon": "run",
	"why": "explain", "ls": "list", "rm": "remove", "delete": "remove", "del": "remove",
}

// noCommand says that there is no such command, and which was meant; before is
// the command that it was a part of, or "".
func noCommand(before, word string, commands []*cli.Command) error {
	var names []string
	for _, c := range commands {
		if !c.Hidden {
			names = append(names, c.Name)
		}
	}
	if before != "" {
		before += " "
	}
	guess := ""
	if find(commands, otherWords[word]) != nil {
		guess = otherWords[word]
	} else {
		guess = policy.Nearest(word, names)
	}
	if guess != "" {
		guess = fmt.Sprintf(" (did you mean %s?)", before+guess)
	}
	return withHint(&usageError{fmt.Sprintf("there is no command %q%s", before+word, guess)}, fmt.Sprintf("`smtpguard help%s` lists them", strings.TrimRight(" "+before, " ")))
}

// badFlags puts the flag package's words about a wrong call into ours. It has
// no error values to tell them apart by.
func badFlags(c *cli.Context, own []cli.Flag, err error) error {
	name, unknown := strings.CutPrefix(err.Error(), "flag provided but not defined: -")
	if !unknown {
		return &usageError{err.Error()}
	}
	var names []string
	for _, f := range append(append([]cli.Flag(nil), own...), c.App.Flags...) {
		names = append(names, f.Names()[0])
	}
	guess := ""
	if near := policy.Nearest(name, names); near != "" {
		guess = fmt.Sprintf(" (did you mean --%s?)", near)
	}
	return &usageError{fmt.Sprintf("unknown flag --%s%s", name, guess)}
}
