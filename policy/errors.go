package policy

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// maxErrors bounds what one broken file can say about itself.
const maxErrors = 50

// Error is one fault of a file.
type Error struct {
	File         string // as named by the caller; the setting's name for Set
	Line, Column int    // from 1, in characters; 0: the fault has no place
	Msg          string // what is wrong
	Hint         string // what to do about it; may be empty
	Err          error  // the cause, if it is not the text of the file
}

// Error gives "policy.yaml:12:5: unknown key "treshold" (did you mean
// threshold?)".
func (e Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			fmt.Fprintf(&b, ":%d:%d", e.Line, e.Column)
		}
		b.WriteString(": ")
	}
	b.WriteString(e.Msg)
	if e.Hint != "" {
		b.WriteString(" (" + e.Hint + ")")
	}
	return b.String()
}

func (e Error) Unwrap() error { return e.Err }

// Errors are all faults of a policy, in the order of the file.
type Errors []Error

// Error gives one fault a line.
func (e Errors) Error() string {
	lines := make([]string, len(e))
	for i := range e {
		lines[i] = e[i].Error()
	}
	return strings.Join(lines, "\n")
}

func (e Errors) Unwrap() []error {
	errs := make([]error, len(e))
	for i := range e {
		errs[i] = e[i]
	}
	return errs
}

// sorted orders by place, those of the file main first, and cuts off what is
// too much.
func (e Errors) sorted(main string) Errors {
	slices.SortStableFunc(e, func(a, b Error) int {
		return cmp.Or(
			compareBool(a.File != main, b.File != main), cmp.Compare(a.File, b.File),
			cmp.Compare(a.Line, b.Line), cmp.Compare(a.Column, b.Column))
	})
	if len(e) > maxErrors {
		e = append(e[:maxErrors:maxErrors], Error{File: main,
			Msg: fmt.Sprintf("more than %d faults, the rest are not shown", maxErrors)})
	}
	return e
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// fault is an Error before its place is known.
type fault struct{ msg, hint string }

func faultf(hint, format string, args ...any) *fault {
	return &fault{fmt.Sprintf(format, args...), hint}
}

// quote shows a stranger's text on one line of bounded length.
func quote(s string) string { return quoteTo(s, 60) }

func quoteTo(s string, most int) string {
	if r := []rune(s[:min(len(s), 4*most)]); len(r) > most || len(s) > 4*most {
		return strconv.Quote(string(r[:min(len(r), most)]) + "...")
	}
	return strconv.Quote(s)
}
