package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode"

	"github.com/coreos/go-systemd/v22/journal"
)

// inJournal reports whether what is written to w ends in systemd's journal.
func inJournal(w io.Writer) bool {
	if w != os.Stderr {
		return false
	}
	yes, err := journal.StderrIsJournalStream()
	return err == nil && yes
}

// journalHandler writes records to systemd's journal with a priority, and each
// attribute as a field of its own: `journalctl SMTPGUARD_PREFIX=192.0.2.7/32`.
type journalHandler struct {
	send     func(message string, p journal.Priority, fields map[string]string) error
	fallback io.Writer // the journal's stream, if it cannot be reached otherwise

	text   slog.Handler // writes the attributes to buf
	mu     *sync.Mutex  // of buf
	buf    *bytes.Buffer
	group  string // "A_B_", of the attributes that follow
	fields []field
}

type field struct{ name, value string }

const (
	fieldMost   = 4 << 10 // bytes of a value
	messageMost = 8 << 10
	fieldsMost  = 64
)

func newJournalHandler(fallback io.Writer) *journalHandler {
	h := &journalHandler{send: journal.Send, fallback: fallback, mu: new(sync.Mutex), buf: new(bytes.Buffer)}
	h.text = slog.NewTextHandler(h.buf, &slog.HandlerOptions{ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == slog.MessageKey) {
			return slog.Attr{}
		}
		return a
	}})
	return h
}

func (h *journalHandler) Enabled(ctx context.Context, l slog.Level) bool {
	return h.text.Enabled(ctx, l)
}

func (h *journalHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.text = h.text.WithAttrs(attrs)
	c.fields = slices.Clip(h.fields)
	for _, a := range attrs {
		c.fields = appendFields(c.fields, h.group, a)
	}
	return &c
}

func (h *journalHandler) WithGroup(name string) slog.Handler {
	c := *h
	c.text = h.text.WithGroup(name)
	if name != "" {
		c.group = h.group + name + "_"
	}
	return &c
}

func (h *journalHandler) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	h.buf.Reset()
	err := h.text.Handle(ctx, r)
	message := strings.TrimSpace(r.Message + " " + strings.TrimSpace(h.buf.String()))
	h.mu.Unlock()
	if err != nil {
		return err
	}
	message = cutTo(plain(message), messageMost)
	fields := map[string]string{"SYSLOG_IDENTIFIER": "smtpguard"}
	put := func(f field) {
		if len(fields) < fieldsMost {
			fields[f.name] = f.value
		}
	}
	for _, f := range h.fields {
		put(f)
	}
	r.Attrs(func(a slog.Attr) bool {
		for _, f := range appendFields(nil, h.group, a) {
			put(f)
		}
		return true
	})
	p := priority(r.Level)
	if h.send(message, p, fields) == nil {
		return nil
	}
	// The stream takes a priority too: sd-daemon(3).
	_, err = fmt.Fprintf(h.fallback, "<%d>%s\n", p, message)
	return err
}

func priority(l slog.Level) journal.Priority {
	switch {
	case l >= slog.LevelError:
		return journal.PriErr
	case l >= slog.LevelWarn:
		return journal.PriWarning
	case l >= slog.LevelInfo:
		return journal.PriInfo
	}
	return journal.PriDebug
}

// appendFields makes fields of an attribute. Names follow the journal's rules:
// capitals, digits and underscores, at most 64.
func appendFields(fs []field, group string, a slog.Attr) []field {
	v := a.Value.Resolve()
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "_"
		}
		for _, b := range v.Group() {
			fs = appendFields(fs, group, b)
		}
		return fs
	}
	if a.Key == "" || len(fs) >= fieldsMost {
		return fs
	}
	name := strings.Map(func(r rune) rune {
		switch {
		case 'a' <= r && r <= 'z':
			return r - 'a' + 'A'
		case 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '_':
			return r
		}
		return '_'
	}, "SMTPGUARD_"+group+a.Key)
	return append(fs, field{name[:min(len(name), 64)], cutTo(plain(v.String()), fieldMost)})
}

// plain escapes what the journal would not show as text.
func plain(s string) string {
	if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		s = strconv.Quote(s)
		return s[1 : len(s)-1]
	}
	return s
}

func cutTo(s string, most int) string {
	if len(s) > most {
		return strings.ToValidUTF8(s[:most-3], "") + "..."
	}
	return s
}
