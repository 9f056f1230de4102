package tail

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"time"
)

// JournalOptions of FollowJournal.
type JournalOptions struct {
	Options
	// Identifiers are the names (SYSLOG_IDENTIFIER) whose messages are
	// wanted; at least one.
	Identifiers []string
	// Program is journalctl; empty: found in PATH.
	Program string
	// Directory holds the journal's files; empty: this machine's.
	Directory string
}

const (
	// journalMin and journalMax are how long to wait before journalctl is
	// started again after it failed; each time twice as long.
	journalMin = 500 * time.Millisecond
	journalMax = 30 * time.Second
	// journalSteady is how long it must have run to count as working.
	journalSteady = time.Minute
)

// FollowJournal delivers the messages of some programs in the systemd journal,
// as the lines that a syslog daemon would have written of them
// ("2026-11-22T19:44:12.123456Z HOST NAME[PID]: MESSAGE"), from a position on,
// and goes on until ctx ends, when it returns nil, or emit fails, when it
// returns that error. A journalctl that ends is started again, where it was.
//
// Two runs of journalctl take turns, for "journalctl -f" shows the present
// boot only: one that reads up to the end, whatever boot, then one that
// follows. Messages that journald itself dropped (RateLimitBurst=) are not
// there; those longer than 4096 bytes journalctl does not show: Exim's are cut
// at 870.
func FollowJournal(ctx context.Context, from Position, o JournalOptions, emit func(Batch) error) error {
	o.Options = o.withDefaults()
	if len(o.Identifiers) == 0 {
		return errors.New("following the journal: no program is named")
	}
	j := &journal{o: o, emit: emit, cursor: from.Cursor, atEnd: from.IsZero() && o.Start == End, wait: journalMin}
	if j.cursor != "" && !cursorForm.MatchString(j.cursor) {
		j.cursor, j.atEnd = "", o.Start == End
		o.Log.Warn("the position in the journal is damaged; lines may be missing")
	}
	for ctx.Err() == nil {
		started := time.Now()
		err := j.once(ctx)
		if j.failed != nil {
			return ended(ctx, j.failed)
		}
		if ctx.Err() != nil {
			break
		}
		if err == nil {
			err = errors.New("journalctl ended")
		}
		if j.trouble.news(err.Error()) {
			o.Log.Warn("cannot read the journal; trying again", "err", err)
		}
		if err := j.tellCaughtUp(); err != nil {
			return ended(ctx, err)
		}
		if time.Since(started) > journalSteady {
			j.wait = journalMin
		}
		select {
		case <-ctx.Done():
		case <-time.After(j.wait):
		}
		j.wait = min(2*j.wait, journalMax)
	}
	return nil
}

// ReadJournal delivers the messages of some programs between two times, as
// FollowJournal does, and returns.
func ReadJournal(ctx context.Context, from, to time.Time, o JournalOptions, emit func(Batch) error) error {
	o.Options = o.withDefaults()
	j := &journal{o: o, emit: emit}
	var b Batch
	err := j.run(ctx, j.wanted(fmt.Sprintf("--since=@%d", from.Unix()), fmt.Sprintf("--until=@%d", to.Unix()+1)),
		func(e *entry) {
			if e.message != nil {
				b.Lines = append(b.Lines, j.lineOf(e))
			}
		},
		func(bool) error {
			defer func() { b.Lines = b.Lines[:0] }()
			return emit(b)
		})
	return errors.Join(j.failed, err)
}

// cursorForm is what a cursor looks like: sd_journal_get_cursor(3) calls it
// opaque, but it is letters, digits, = and ;.
var cursorForm = regexp.MustCompile(`^[0-9A-Za-z=;_.:-]{1,512}$`)

// journal is the state of one FollowJournal.
type journal struct {
	o        JournalOptions
	emit     func(Batch) error
	cursor   string
	atEnd    bool   // begin at the end
	caughtUp bool   // was told last
	told     string // and this cursor
	failed   error  // emit's
	wait     time.Duration
	trouble  nag
	strange  nag
}

func (j *journal) args(more ...string) []string {
	args := []string{"-o", "json", "--no-pager", "-q"}
	if j.o.Directory != "" {
		args = append(args, "-D", j.o.Directory)
	}
	return append(args, more...)
}

// wanted are the arguments that choose the messages, and from where on.
func (j *journal) wanted(more ...string) []string {
	// Not --after-cursor: where the entry itself is gone, or is none of the
	// wanted ones, that leaves out the first one after it (systemd 252).
	if j.cursor != "" {
		more = append(more, "--cursor="+j.cursor)
	}
	for _, id := range j.o.Identifiers {
		more = append(more, "SYSLOG_IDENTIFIER="+id) // of one field: any of them
	}
	return j.args(more...)
}

// once reads up to the end and then follows, until something fails.
func (j *journal) once(ctx context.Context) error {
	if j.atEnd {
		// The place of the last message of all, so that nothing that comes
		// while we start is missed.
		err := j.run(ctx, j.args("-n", "1"), func(e *entry) { j.cursor = e.cursor }, nil)
		if err != nil {
			return err
		}
		j.atEnd = false
	}
	batch := Batch{}
	add := func(e *entry) {
		if e.cursor == j.cursor {
			return // where we have been
		}
		j.cursor = e.cursor
		if e.message == nil {
			return // too long for journalctl, or none
		}
		batch.Lines = append(batch.Lines, j.lineOf(e))
	}
	send := func(caughtUp bool) error {
		if len(batch.Lines) == 0 {
			if caughtUp {
				return j.tellCaughtUp()
			}
			return nil
		}
		b := batch
		b.CaughtUp, b.Next = caughtUp, Position{Cursor: j.cursor}
		batch.Lines = nil
		j.caughtUp, j.told = caughtUp, j.cursor
		return j.emit(b)
	}
	if err := j.run(ctx, j.wanted(), add, func(bool) error { return send(false) }); err != nil {
		return err
	}
	if j.failed = send(true); j.failed != nil {
		return j.failed
	}
	if j.trouble.news("") {
		j.o.Log.Info("the journal can be read again")
	}
	return j.run(ctx, j.wanted("-f", "--no-tail"), add, send)
}

// lineOf is the line of an entry that has a message.
func (j *journal) lineOf(e *entry) Line {
	text := e.line()
	truncated := len(text) > j.o.MaxLine
	if truncated {
		text = text[:j.o.MaxLine]
	}
	return Line{Text: text, Truncated: truncated, Next: Position{Cursor: e.cursor}}
}

// tellCaughtUp tells that there is nothing to read and where we are, unless
// that is known.
func (j *journal) tellCaughtUp() error {
	if j.caughtUp && j.told == j.cursor {
		return nil
	}
	j.caughtUp, j.told = true, j.cursor
	return j.emit(Batch{CaughtUp: true, Next: Position{Cursor: j.cursor}})
}

// run runs journalctl until it ends. took is called for each entry, sent after
// each read, with whether that read all there was.
func (j *journal) run(ctx context.Context, args []string, took func(*entry), sent func(caughtUp bool) error) (err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	program := j.o.Program
	if program == "" {
		program = "journalctl"
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C", "PATH=" + os.Getenv("PATH"), "SYSTEMD_COLORS=0"}
	cmd.WaitDelay = time.Second
	said := &clipped{max: 512}
	cmd.Stderr = said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	ending := false // by itself
	defer func() {
		if !ending {
			cancel()
		}
		werr := cmd.Wait()
		if j.failed == nil && err == nil && werr != nil {
			err = fmt.Errorf("journalctl: %w%s", werr, said)
			if strings.Contains(said.text.String(), "seek to cursor") && j.cursor != "" {
				// No cursor at all: one whose entry is gone leads to the next.
				j.o.Log.Warn("the position in the journal is damaged; lines may be missing", "cursor", j.cursor)
				j.cursor, j.atEnd = "", j.o.Start == End
			}
		}
	}()

	split := splitter{max: maxEntry}
	buf := make([]byte, 64<<10)
	for {
		n, rerr := out.Read(buf)
		split.split(buf[:n], func(text []byte, _ int64, truncated bool) {
			if truncated {
				if j.strange.news("long") {
					j.o.Log.Warn("an entry of the journal is too long and is left out", "bytes", maxEntry)
				}
				return
			}
			e, perr := parseEntry(text)
			if perr != nil {
				if j.strange.news("form") {
					j.o.Log.Warn("journalctl prints something else than entries; it is left out", "err", perr)
				}
				return
			}
			took(&e)
		})
		if sent != nil && n > 0 {
			if j.failed = sent(n < len(buf)); j.failed != nil {
				return j.failed
			}
		}
		if errors.Is(rerr, io.EOF) || errors.Is(rerr, os.ErrClosed) {
			ending = true
			return nil
		}
		if rerr != nil {
			return rerr
		}
	}
}

// clipped keeps the beginning of what a program says.
type clipped struct {
	text strings.Builder
	max  int
}

func (c *clipped) Write(b []byte) (int, error) {
	if room := c.max - c.text.Len(); room > 0 {
		c.text.Write(b[:min(room, len(b))])
	}
	return len(b), nil
}

// String is it as the end of a sentence.
func (c *clipped) String() string {
	s := strings.Join(strings.Fields(strings.ToValidUTF8(c.text.String(), "?")), " ")
	if s == "" {
		return ""
	}
	return ": " + s
}
