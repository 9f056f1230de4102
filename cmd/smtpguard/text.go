package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/urfave/cli/v2"
)

// wrap breaks text between words so that no line is longer than width bytes;
// further lines begin with as many spaces as indent says.
func wrap(text string, indent, width int) string {
	var b strings.Builder
	at := 0
	for i, word := range strings.Fields(text) {
		switch {
		case i == 0:
		case at+1+len(word) > width:
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at = indent
		default:
			b.WriteByte(' ')
			at++
		}
		if i == 0 {
			at = indent // what stands before the text
		}
		b.WriteString(word)
		at += len(word)
	}
	return b.String()
}

// hang prints a text behind a mark, its further lines below the first.
func hang(out io.Writer, mark, text string, width int) {
	fmt.Fprintln(out, mark+wrap(text, len(mark), width))
}

// clean takes control characters out of a text: names and reasons are other
// people's words.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 {
			return ' '
		}
		return r
	}, s)
}

// Help is wrapped: a terminal of a rescue console is 80 wide.
func init() {
	cli.HelpPrinter = func(w io.Writer, text string, data any) {
		cli.HelpPrinterCustom(w, text, data, map[string]any{"wrapAt": func() int { return 80 }})
	}
}
