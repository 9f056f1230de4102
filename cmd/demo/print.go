package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// printer writes the story: one line for each thing that happens, with the
// seconds since the beginning.
type printer struct {
	w      io.Writer
	start  time.Time
	colour bool
}

// The meanings that a line can have.
type tone string

const (
	plain tone = ""
	good  tone = "32" // green
	bad   tone = "31" // red
	key   tone = "1"  // bold
	faint tone = "2"
)

func (p *printer) paint(t tone, text string) string {
	if !p.colour || t == plain {
		return text
	}
	return "\x1b[" + string(t) + "m" + text + "\x1b[0m"
}

// at tells what happened at a time.
func (p *printer) at(when time.Time, t tone, format string, args ...any) {
	seconds := fmt.Sprintf("%5.1f s  ", max(when.Sub(p.start).Seconds(), 0))
	fmt.Fprintln(p.w, p.paint(faint, seconds)+p.paint(t, fmt.Sprintf(format, args...)))
}

// now tells what happens now.
func (p *printer) now(t tone, format string, args ...any) { p.at(time.Now(), t, format, args...) }

// more adds to the line before.
func (p *printer) more(format string, args ...any) {
	fmt.Fprintln(p.w, p.paint(faint, strings.Repeat(" ", 9)+fmt.Sprintf(format, args...)))
}

// shell shows a command and what it printed.
func (p *printer) shell(command, output string) {
	fmt.Fprintln(p.w, strings.Repeat(" ", 9)+p.paint(key, "$ "+command))
	for line := range strings.Lines(output) {
		fmt.Fprintln(p.w, strings.Repeat(" ", 9)+strings.TrimRight(line, "\n"))
	}
}

// title begins a part of the story.
func (p *printer) title(format string, args ...any) {
	fmt.Fprintln(p.w, p.paint(key, fmt.Sprintf(format, args...)))
}
