package tail

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// maxEntry is the most bytes of an entry that journalctl may print. Each byte
// of a message that is not UTF-8 takes four.
const maxEntry = 1 << 20

// entry is what is wanted of a journal entry.
type entry struct {
	cursor     string
	at         time.Time
	host       string
	identifier string
	pid        string // digits, perhaps none
	message    []byte // nil: none, or too long for journalctl
}

// parseEntry reads what "journalctl -o json" prints on a line: an object of
// strings, of null for a value of more than 4096 bytes, of arrays of numbers
// for bytes that are not UTF-8, and of arrays of those for a field that an
// entry has more than once (systemd, JOURNAL_EXPORT_FORMATS). Every local
// user can write entries: of the fields that begin with _ journald vouches for
// the contents, of the others nobody does.
func parseEntry(b []byte) (entry, error) {
	var raw struct {
		Cursor     string          `json:"__CURSOR"`
		Realtime   json.RawMessage `json:"__REALTIME_TIMESTAMP"`
		Source     json.RawMessage `json:"_SOURCE_REALTIME_TIMESTAMP"`
		Host       json.RawMessage `json:"_HOSTNAME"`
		Identifier json.RawMessage `json:"SYSLOG_IDENTIFIER"`
		SyslogPID  json.RawMessage `json:"SYSLOG_PID"`
		PID        json.RawMessage `json:"_PID"`
		Message    json.RawMessage `json:"MESSAGE"`
	}
	if err := json.Unmarshal(b, &raw); err != nil {
		return entry{}, fmt.Errorf("an entry of the journal: %w", err)
	}
	if !cursorForm.MatchString(raw.Cursor) {
		return entry{}, errors.New("an entry of the journal without a cursor")
	}
	e := entry{cursor: raw.Cursor, message: value(raw.Message)}
	us, ok := number(value(raw.Realtime))
	if !ok {
		return entry{}, errors.New("an entry of the journal without a time")
	}
	// When the message was sent is a little before it was received, but a
	// sender could not be trusted with more.
	if src, ok := number(value(raw.Source)); ok && src <= us && us-src < int64(time.Minute/time.Microsecond) {
		us = src
	}
	e.at = time.UnixMicro(us).UTC()
	e.host = word(value(raw.Host), "localhost")
	e.identifier = word(value(raw.Identifier), "-")
	for _, v := range []json.RawMessage{raw.SyslogPID, raw.PID} {
		if n, ok := number(value(v)); ok && e.pid == "" {
			e.pid = strconv.FormatInt(n, 10)
		}
	}
	return e, nil
}

// line is the entry as a syslog daemon writes it.
func (e *entry) line() []byte {
	b := make([]byte, 0, 64+len(e.message))
	b = e.at.AppendFormat(b, "2006-01-02T15:04:05.000000Z07:00")
	b = append(b, ' ')
	b = append(b, e.host...)
	b = append(b, ' ')
	b = append(b, e.identifier...)
	if e.pid != "" {
		b = append(b, '[')
		b = append(b, e.pid...)
		b = append(b, ']')
	}
	b = append(b, ": "...)
	for _, c := range e.message {
		if c == '\n' { // one message is one line
			c = ' '
		}
		b = append(b, c)
	}
	return b
}

// value is the first value of a field, nil if it has none.
func value(raw json.RawMessage) []byte {
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 || raw[0] == 'n' {
		return nil
	}
	if raw[0] == '"' {
		var s string
		if json.Unmarshal(raw, &s) != nil {
			return nil
		}
		return append([]byte{}, s...)
	}
	if raw[0] != '[' {
		return nil
	}
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil || len(list) == 0 {
		return nil
	}
	if c := list[0][0]; c == '"' || c == '[' {
		if c == '[' && bytes.HasPrefix(bytes.TrimSpace(list[0][1:]), []byte("[")) {
			return nil // deeper than any field
		}
		return value(list[0])
	}
	out := make([]byte, 0, len(list))
	for _, n := range list {
		v, err := strconv.ParseUint(string(n), 10, 8)
		if err != nil {
			return nil
		}
		out = append(out, byte(v))
	}
	return out
}

// number reads a number of at most 18 digits.
func number(b []byte) (int64, bool) {
	if len(b) == 0 || len(b) > 18 {
		return 0, false
	}
	n, err := strconv.ParseInt(string(b), 10, 64)
	return n, err == nil && n >= 0
}

// word is b if it can stand in the head of a syslog line, else other.
func word(b []byte, other string) string {
	if len(b) == 0 || len(b) > 255 {
		return other
	}
	for _, c := range b {
		if c <= ' ' || c > '~' || c == '[' || c == ':' {
			return other
		}
	}
	return string(b)
}
