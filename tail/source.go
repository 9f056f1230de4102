package tail

import (
	"path/filepath"
	"strings"
)

// Kind is what the name of a log stands for.
type Kind uint8

const (
	File    Kind = iota // a path: Follow
	Dated               // a path with the date in it, %D or %M: Follow
	Pattern             // a path with *, ? or [...]: FollowPattern
	Journal             // "journald": FollowJournal
	Input               // "-", standard input: FollowReader
)

// Names of the logs that are no files.
const (
	JournalName = "journald"
	InputName   = "-"
)

// KindOf tells what a name stands for.
func KindOf(name string) Kind {
	switch {
	case name == InputName:
		return Input
	case name == JournalName:
		return Journal
	case strings.ContainsAny(name, "*?["):
		return Pattern
	case dated(name):
		return Dated
	}
	return File
}

// Find lists the files that hold what is left of a log's history and are
// there now, in no order; none for the journal and standard input.
// The rotated files of a File are not among them.
func Find(name string) []string {
	switch KindOf(name) {
	case File:
		return []string{name}
	case Dated:
		var names []string
		for _, g := range (&datedNames{pattern: name}).matches() {
			names = append(names, g.name)
		}
		return names
	case Pattern:
		names, _ := filepath.Glob(name)
		return names
	}
	return nil
}

// Rotated lists the rotated files of a File that are there now, compressed ones
// too, oldest first: by the rules by which Follow finds what it has not read
// yet. A copy under another name is none of them, nor is an unfinished
// compressed file beside the one that it is made of.
func Rotated(log string) []string {
	gs, _ := oneName(filepath.Clean(log)).history(true)
	names := make([]string, len(gs))
	for i, g := range gs {
		names[i] = g.name
	}
	return names
}
