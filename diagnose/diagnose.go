// Package diagnose says why a mail server seems to go up and down: from Exim's
// log, and from what cPanel's monitor wrote and mailed about its own checks.
//
// A monitor tests the server as a client would. When the test fails it restarts
// Exim and mails "appears to be down", whatever the cause: slots that a flood
// has taken, slots that proper mail has taken, a load limit, a full disk, or a
// test whose own password is wrong. Each leaves other lines in the log, and
// each wants something else done. Several can be true at once.
//
// Like the detector it has no clock: the same files give the same answer.
package diagnose

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// Options of New.
type Options struct {
	// Detector judges the connections. It must be new.
	Detector *detector.Detector
	// Zone is that of times which state none; nil means time.Local.
	Zone *time.Location
	// Since and Until bound what is looked at; zero: no bound. What is
	// before Since is still read, to know who held slots then.
	Since, Until time.Time
	// Machine is what is seen of the machine that the logs are of; nil: they
	// may be of another one.
	Machine  *Machine
	Guarding Guarding
}

// Bounds of what is kept, whatever the files hold.
const (
	maxLine     = 64 << 10 // bytes of a line; of a longer one nothing is believed
	maxShown    = 240      // characters of a line as shown
	maxLines    = 4        // lines that a finding shows
	maxEpisodes = 2000     // the rest is added to the last
	maxSources  = 4096     // addresses that are told apart in an episode
	maxChecks   = 20_000   // results of the monitor
	maxStarts   = 20_000   // starts of Exim
)

// Diagnosis reads files and says what they show. It is not for concurrent use.
type Diagnosis struct {
	o      Options
	zone   *time.Location
	parser *exim.Parser

	lines, unparsed uint64
	first, last     time.Time
	latest          time.Time // of all lines, also of those out of bounds

	slots   slots
	trouble [kinds]trouble
	starts  []start
	checks  []check
	// refusedCheck counts refused connections from this machine itself: the
	// monitor's.
	refusedCheck int
	// accepted counts messages; opened, connections.
	accepted, opened uint64
}

// trouble is what was counted of one kind of line.
type trouble struct {
	n           int
	first, last time.Time
	lines       []string
	most        float64     // the highest load average
	times       []time.Time // the first ones, for their rhythm
}

func (t *trouble) add(at time.Time, line []byte) {
	t.n++
	if t.first.IsZero() || at.Before(t.first) {
		t.first = at
	}
	if at.After(t.last) {
		t.last = at
	}
	if len(t.lines) < maxLines {
		t.lines = append(t.lines, show(line))
	}
	if len(t.times) < 100 {
		t.times = append(t.times, at)
	}
}

// New returns a Diagnosis that has read nothing.
func New(o Options) *Diagnosis {
	d := &Diagnosis{o: o, zone: o.Zone, parser: exim.New(o.Zone)}
	if d.zone == nil {
		d.zone = time.Local
	}
	d.slots = newSlots(o.Detector)
	return d
}

// Read reads a file: an Exim log, chkservd.log, or mails of the monitor; which
// is seen from its beginning. Exim logs must come in the order of their lines.
// modified is about when the file was written, for lines that state no year.
// The error is that of r or of ctx.
func (d *Diagnosis) Read(ctx context.Context, r io.Reader, modified time.Time) error {
	br := bufio.NewReaderSize(r, maxLine)
	head, err := br.Peek(maxLine)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	take, end := d.mainLog, func() {}
	switch sniff(head) {
	case isMonitor:
		m := monitor{zone: d.zone, done: d.check}
		take, end = m.line, m.end
	case isMail:
		m := mails{zone: d.zone, done: d.check}
		take, end = m.line, m.end
	default:
		d.parser.SetReference(modified)
	}
	for n := 0; ; n++ {
		line, err := br.ReadSlice('\n')
		if n%4096 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = br.ReadSlice('\n')
			}
			d.lines++
			d.unparsed++
		case len(line) > 0:
			take(bytes.TrimSuffix(line, []byte("\n")))
		}
		if errors.Is(err, io.EOF) {
			end()
			return nil
		}
		if err != nil {
			return fmt.Errorf("after %d lines: %w", n, err)
		}
	}
}

// in reports whether a time is to be looked at.
func (d *Diagnosis) in(t time.Time) bool {
	return (d.o.Since.IsZero() || !t.Before(d.o.Since)) && (d.o.Until.IsZero() || t.Before(d.o.Until))
}

// check takes a result of the monitor.
func (d *Diagnosis) check(c check) {
	if !c.at.IsZero() && !d.in(c.at) || len(d.checks) >= maxChecks {
		return
	}
	d.checks = append(d.checks, c)
}

// What a file is.
const (
	isLog = iota
	isMonitor
	isMail
)

// sniff says what a file is by its beginning.
func sniff(head []byte) int {
	n := 0
	for line := range bytes.SplitSeq(head, []byte("\n")) {
		line = bytes.TrimRight(line, "\r")
		switch {
		case bytes.HasPrefix(line, []byte("Service Check ")), bytes.HasPrefix(line, []byte("Loading services ")),
			bytes.HasPrefix(line, []byte("exim")) && bytes.Contains(line, []byte(" [[")),
			len(line) > 27 && line[0] == '[' && bytes.Contains(line[:min(len(line), 60)], []byte("] Service check ....")):
			return isMonitor
		case n == 0 && bytes.HasPrefix(line, []byte("From ")):
			return isMail
		case n < 200 && (hasFold(line, "subject:") || hasFold(line, "date: ") || hasFold(line, "return-path:") || hasFold(line, "delivered-to:")):
			return isMail
		case isStamp(line), bytes.Contains(line[:min(len(line), 200)], []byte(" exim[")):
			return isLog // whatever strangers wrote into its lines
		case bytes.Contains(line, []byte("appears to be down")), bytes.HasPrefix(line, []byte("exim failed @ ")):
			return isMail // the text of one, pasted
		}
		if n++; n > 2000 {
			break
		}
	}
	return isLog
}

func hasFold(line []byte, prefix string) bool {
	return len(line) >= len(prefix) && bytes.EqualFold(line[:len(prefix)], []byte(prefix))
}
