package diagnose

import (
	"bytes"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// show makes a line fit to be printed: bounded, and without what a terminal
// obeys or what can hide behind other text.
func show(line []byte) string {
	var b strings.Builder
	n := 0
	for len(line) > 0 {
		if n++; n > maxShown {
			b.WriteString("...")
			break
		}
		r, size := utf8.DecodeRune(line)
		switch {
		case r == utf8.RuneError && size == 1:
			b.WriteString(`\x` + strconv.FormatUint(uint64(line[0])|0x100, 16)[1:])
		case r == '\t':
			b.WriteByte(' ')
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			b.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
		line = line[size:]
	}
	return b.String()
}

// text is what Exim said in a line of its log: what follows syslog's words, the
// time, the zone, the process and the message id. Nil: the line does not begin
// as one of Exim's. The places are those of log.c (write_syslog and
// log_write); package exim has read the time by then.
func text(line []byte) []byte {
	if !isStamp(line) { // syslog: "... host exim[123]: "
		i := bytes.Index(line[:min(len(line), 200)], []byte("exim"))
		if i <= 0 || line[i-1] != ' ' {
			return nil
		}
		j := bytes.Index(line[i:min(len(line), i+40)], []byte(": "))
		if j < 0 || bytes.IndexByte(line[i:i+j], ' ') >= 0 {
			return nil
		}
		line = line[i+j+2:]
	}
	if isStamp(line) {
		line = line[len("2006-01-02 15:04:05"):]
		if len(line) > 4 && line[0] == '.' {
			line = line[4:] // +millisec
		}
		line = bytes.TrimPrefix(line, []byte(" "))
		if len(line) > 6 && (line[0] == '+' || line[0] == '-') && digits(line[1:5]) && line[5] == ' ' {
			line = line[6:] // log_timezone
		}
	}
	if len(line) > 2 && line[0] == '[' { // +pid
		if i := bytes.Index(line[:min(len(line), 14)], []byte("] ")); i > 1 && digits(line[1:i]) {
			line = line[i+2:]
		}
	}
	// 6-6-2, since 4.97 6-11-4
	for _, form := range [][2]int{{13, 16}, {18, 23}} {
		if end := form[1]; len(line) > end && line[6] == '-' && line[form[0]] == '-' && line[end] == ' ' && !bytes.ContainsAny(line[:end], " [(<") {
			return line[end+1:]
		}
	}
	return line
}

// isStamp reports whether b begins with "2026-11-22 19:45:50".
func isStamp(b []byte) bool {
	return len(b) > 19 && b[4] == '-' && b[7] == '-' && b[10] == ' ' && b[13] == ':' && b[16] == ':' &&
		digits(b[:4]) && digits(b[5:7]) && digits(b[8:10]) && digits(b[11:13])
}

func digits(b []byte) bool {
	for _, c := range b {
		if c < '0' || c > '9' {
			return false
		}
	}
	return len(b) > 0
}

// loadIn reads the number that ends "... load average = 12.34" or follows
// "(load ".
func loadIn(text []byte, before string) float64 {
	i := bytes.LastIndex(text, []byte(before))
	if i < 0 {
		return 0
	}
	rest := text[i+len(before):]
	n := 0
	for n < len(rest) && n < 10 && (rest[n] >= '0' && rest[n] <= '9' || rest[n] == '.') {
		n++
	}
	f, err := strconv.ParseFloat(string(rest[:n]), 64)
	if err != nil {
		return 0
	}
	return f
}
