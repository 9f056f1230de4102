package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/incident"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) replayCommand() *cli.Command {
	return &cli.Command{
		Name: "replay", Usage: "what would this policy have done?", ArgsUsage: "FILE...",
		Description: "Reads Exim main logs, plain or compressed (.gz .bz2 .xz .zst), - for standard input, in the order of their first lines. Blocks nothing.",
		Flags: []cli.Flag{
			&cli.IntFlag{Name: "capacity", Usage: "the server had `N` slots (smtp_accept_max)", DefaultText: "as the policy or the log says"},
			&cli.BoolFlag{Name: "learn", Usage: "remember the senders of accepted mail as known good, in the daemon or its store"},
			&cli.StringFlag{Name: "zone", Usage: "time zone `NAME` of lines that state none (default: as the policy says)"},
			&cli.StringFlag{Name: "reports", Usage: "draft the abuse reports as files in `DIR`; nothing is sent, nobody is asked"},
			&cli.StringFlag{Name: "html", Usage: "write the incident as one page with pictures to `FILE`, for you alone to read"},
		},
		Action: e.replay,
	}
}

// replayBlock, replaySpare and replaySummary are the lines of replay --json.
type replayBlock struct {
	Type    string    `json:"type"` // "block"
	Time    time.Time `json:"time"`
	Prefix  string    `json:"prefix"`
	Rule    string    `json:"rule"`
	Score   float64   `json:"score"`
	Window  string    `json:"window"`
	Held    int       `json:"held"`
	Sources int       `json:"sources"`
	Opens   int       `json:"opens"`
	Refused int       `json:"refused"`
	Offence int       `json:"offence"`
	Until   time.Time `json:"until"`
	Why     string    `json:"why"`
}

type replaySpare struct {
	Type      string    `json:"type"` // "spare"
	Time      time.Time `json:"time"`
	Prefix    string    `json:"prefix"`
	Rule      string    `json:"rule"`
	Score     float64   `json:"score"`
	Reason    string    `json:"reason"` // "known-good", or what the gate said
	KnownGood int       `json:"known_good"`
}

type replaySummary struct {
	Type             string    `json:"type"` // "summary"
	Lines            uint64    `json:"lines"`
	Events           uint64    `json:"events"`
	Opened           uint64    `json:"opened"`
	Closed           uint64    `json:"closed"`
	Refused          uint64    `json:"refused"`
	Accepted         uint64    `json:"accepted"`
	Sources          int       `json:"sources"`
	Unparsed         uint64    `json:"unparsed"`
	Misdated         uint64    `json:"misdated"` // events with a time that cannot be true; they count at that of their neighbours
	PeakCount        int       `json:"peak_count"`
	Capacity         int       `json:"capacity"`
	CapacityFrom     string    `json:"capacity_from"`
	SaturatedSeconds float64   `json:"saturated_seconds"`
	Blocks           int       `json:"blocks"`
	Spared           int       `json:"spared"`
	Prevented        uint64    `json:"prevented"`
	First            time.Time `json:"first,omitzero"`
	Last             time.Time `json:"last,omitzero"`
}

func (e *env) replay(c *cli.Context) error {
	if !c.Args().Present() {
		return &usageError{"name one or more logs, or - for standard input"}
	}
	r, files, parser, err := e.openReplay(c, c.Args().Slice())
	defer closeLogs(files)
	if err != nil {
		return err
	}

	out := bufio.NewWriter(e.stdout)
	defer out.Flush()
	asJSON := c.Bool("json")
	var said []string // what was decided, in the order of the log
	line := &env{stdout: out}
	r.OnBlock = func(b store.Block) {
		if !asJSON {
			said = append(said, decision(b.Since, b.Reason))
			return
		}
		v := b.Verdict
		_ = line.json(replayBlock{"block", v.Time.UTC(), b.Prefix.String(), v.Rule, round(v.Score), policy.FormatDuration(v.Window),
			v.Held, v.Sources, v.Opens, v.Refused, b.Offence, b.Until.UTC(), b.Reason})
	}
	r.OnSpare = func(v detector.Verdict, reason string) {
		s := replaySpare{"spare", v.Time.UTC(), v.Source.String(), v.Rule, round(v.Score), reason, v.KnownGood}
		if !asJSON {
			said = append(said, decision(v.Time, fmt.Sprintf("spared (%s): %s", reason, v.Sentence())))
			return
		}
		_ = line.json(s)
	}
	var reports *replayReports
	if c.String("reports") != "" {
		if reports, err = e.newReplayReports(c, c.Args().Slice()); err != nil {
			return err
		}
		told := r.OnBlock
		r.OnBlock = func(b store.Block) {
			told(b)
			reports.take(b)
		}
	}
	page, err := e.newPage(c, r, asJSON)
	if err != nil {
		return err
	}
	sum := replaySummary{Type: "summary"}
	bar := newProgress(e.stderr, files)
	defer func() { bar.show(sum.Lines, true) }()
	var d dates
	for _, f := range files {
		if err := replayLog(c.Context, f, parser, &d, r, &sum, func() { bar.show(sum.Lines, false) }); err != nil {
			return fmt.Errorf("reading %s: %w", f.name, err)
		}
	}
	st := r.Detector.Stats()
	sum.Opened, sum.Closed, sum.Refused, sum.Accepted = st.Opened, st.Closed, st.Refused, st.Accepted
	sum.Sources, sum.PeakCount, sum.SaturatedSeconds = r.Sources(), st.PeakCount, round(st.Saturated.Seconds())
	sum.Capacity, sum.CapacityFrom = r.Detector.Capacity()
	switch {
	case c.IsSet("capacity"):
		sum.CapacityFrom = "--capacity"
	case e.eximSays:
		sum.CapacityFrom = fromExim
	}
	sum.Blocks, sum.Spared, sum.Prevented = r.Blocks(), r.Spared(), r.Prevented()
	sum.First, sum.Last = sum.First.UTC(), sum.Last.UTC()
	if sum.Events == 0 { // nothing can be concluded from it
		what := fmt.Sprintf("none of %s is one of Exim's main log that tells of a connection or a message", count(int(sum.Lines), "line", "lines"))
		if sum.Lines == 0 {
			what = "there is no line"
		}
		err = withHint(fmt.Errorf("%s: %s", strings.Join(c.Args().Slice(), ", "), what), "`exim -bP log_file_path` says where the log is")
	}
	if asJSON {
		err = errors.Join(line.json(sum), err)
	} else if err == nil {
		showReplay(out, said, page.incident, sum)
	}
	if page.path != "" {
		werr := page.write(sum)
		err = errors.Join(err, werr)
		if page.nameless != nil {
			fmt.Fprintln(e.stderr, "the page names no networks:", page.nameless)
		}
		if werr == nil && !asJSON {
			fmt.Fprintln(out, "\n"+wrap("page: "+page.path+" (only you can read it: addresses are personal data)", 0, tableWidth))
		}
	}
	if reports != nil {
		said, rerr := reports.finish(c, sum.Last)
		err = errors.Join(err, rerr)
		if rerr == nil && !asJSON {
			fmt.Fprintln(out, said)
		}
	}
	if err = errors.Join(err, out.Flush()); err != nil || !c.Bool("learn") {
		return err
	}
	return e.learn(c, r)
}

// openReplay makes a replay of the policy and opens the logs, which closeLogs
// must close, also after an error.
func (e *env) openReplay(c *cli.Context, names []string) (*guard.Replay, []*logFile, *exim.Parser, error) {
	p, err := e.policy(c)
	if err != nil {
		return nil, nil, nil, err
	}
	if z := c.String("zone"); z != "" {
		if err := p.Set("zone", z); err != nil {
			return nil, nil, nil, &usageError{fmt.Sprintf("--zone: %v", err)}
		}
	}
	capacity := c.Int("capacity")
	if c.IsSet("capacity") && capacity < 1 {
		return nil, nil, nil, &usageError{"--capacity: want 1 or more"}
	}
	if capacity == 0 && p.Capacity == 0 {
		if mta, err := exim.ReadConfig(c.Context); err == nil && slices.ContainsFunc(names, func(l string) bool { return isOldLogOf(l, mta) }) {
			capacity, e.eximSays = mta.AcceptMax, mta.AcceptMax > 0
		}
	}
	loc := p.Location()
	if loc == nil {
		loc = time.Local
	}
	r, err := guard.NewReplay(p, capacity)
	if err != nil {
		return nil, nil, nil, err
	}
	files, err := e.openLogs(names, loc)
	return r, files, exim.New(loc), err
}

func closeLogs(files []*logFile) {
	for _, f := range files {
		f.close()
	}
}

// learn hands the senders of accepted mail to the daemon.
func (e *env) learn(c *cli.Context, r *guard.Replay) error {
	var goods []store.Good
	for s := range r.Detector.KnownGood() {
		goods = append(goods, store.Good{Addr: s.Addr, First: s.First, Last: s.Last, Messages: s.Messages})
	}
	if len(goods) == 0 {
		return &answerNo{"no accepted mail was found; nothing is learned"}
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	if err := g.Learn(c.Context, goods); err != nil {
		return err
	}
	if !c.Bool("json") {
		fmt.Fprintf(e.stdout, "learned %s of accepted mail\n", count(len(goods), "sender", "senders"))
	}
	return nil
}

func round(f float64) float64 { return math.Round(f*1e4) / 1e4 }

// replayLog feeds one log to the replay.
func replayLog(ctx context.Context, f *logFile, parser *exim.Parser, d *dates, r *guard.Replay, sum *replaySummary, show func()) error {
	return readLog(ctx, f, parser, d, func(b *block) {
		sum.Lines += b.lines
		sum.Unparsed += b.unparsed
		sum.Events += b.count
		sum.Misdated = d.misdated
		if sum.First.IsZero() && len(b.events) > 0 {
			sum.First = b.events[0].Time
		}
		for i := range b.events {
			if b.events[i].Time.After(sum.Last) {
				sum.Last = b.events[i].Time
			}
			r.Observe(&b.events[i])
		}
		show()
	})
}

// readLog hands out a log in blocks, at times that can be true.
func readLog(ctx context.Context, f *logFile, parser *exim.Parser, d *dates, take func(*block)) error {
	parser.SetReference(f.modified)
	written := f.modified
	return readBlocks(ctx, f, parser, func(b, next *block) {
		if time.Since(written) < time.Minute { // it is being written to
			written = time.Now()
		}
		d.correct(b, next, written)
		take(b)
	})
}

// logFile is an opened log.
type logFile struct {
	io.Reader
	name     string
	size     int64 // bytes on disk, 0 if not known
	read     atomic.Int64
	modified time.Time // of standard input: now
	first    int64     // the time of its first lines, in ns since 1970; 0 if not known
	close    func()
}

// openLogs opens logs and sorts them by their first lines.
func (e *env) openLogs(names []string, loc *time.Location) ([]*logFile, error) {
	var files []*logFile
	for _, n := range names {
		f, err := e.openLog(n)
		if err != nil {
			return files, err
		}
		files = append(files, f)
		if len(names) > 1 {
			br := bufio.NewReaderSize(f.Reader, maxLine)
			head, _ := br.Peek(maxLine)
			f.Reader = br
			p := exim.New(loc)
			p.SetReference(f.modified)
			var times []int64
			for line := range bytes.SplitSeq(head, []byte("\n")) {
				var ev detector.Event
				if p.Parse(line, &ev) && !ev.Time.IsZero() {
					if times = append(times, ev.Time.UnixNano()); len(times) == nearby {
						break
					}
				}
			}
			f.first = typical(times)
		}
	}
	slices.SortStableFunc(files, func(a, b *logFile) int { return cmp.Compare(a.first, b.first) })
	return files, nil
}

// openLog opens a log and undoes its compression, which is recognised by its
// first bytes, not by its name.
func (e *env) openLog(name string) (*logFile, error) {
	f := &logFile{name: name, close: func() {}}
	var raw io.Reader
	if name == "-" {
		f.name, raw = "standard input", e.stdin
		f.modified = time.Now()
	} else {
		file, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		f.close = func() { file.Close() }
		fi, err := file.Stat()
		if err == nil && fi.IsDir() {
			err = fmt.Errorf("%s is a directory", name)
		}
		if err != nil {
			f.close()
			return nil, err
		}
		f.modified, raw = fi.ModTime(), file
		if fi.Mode().IsRegular() {
			f.size = fi.Size()
		}
	}
	br := bufio.NewReaderSize(counted{raw, &f.read}, 256<<10)
	magic, _ := br.Peek(6)
	var err error
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		f.Reader, err = gzip.NewReader(br)
	case bytes.HasPrefix(magic, []byte("BZh")):
		f.Reader = bzip2.NewReader(br)
	case bytes.HasPrefix(magic, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		f.Reader, err = xz.ReaderConfig{DictCap: 64 << 20}.NewReader(br)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(br, zstd.WithDecoderMaxMemory(256<<20), zstd.WithDecoderConcurrency(1)); err == nil {
			f.Reader = z
			under := f.close
			f.close = func() { z.Close(); under() }
		}
	default:
		f.Reader = br
	}
	if err != nil {
		f.close()
		return nil, fmt.Errorf("reading %s: %w", f.name, err)
	}
	return f, nil
}

// counted counts the bytes that are read.
type counted struct {
	io.Reader
	n *atomic.Int64
}

func (c counted) Read(b []byte) (int, error) {
	n, err := c.Reader.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// progress tells a person at a terminal how far a replay is.
type progress struct {
	out         io.Writer // nil: nobody looks
	files       []*logFile
	size        int64
	start, last time.Time
}

func newProgress(w io.Writer, files []*logFile) *progress {
	p := &progress{files: files, start: time.Now()}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.out = w
	}
	for _, f := range files {
		p.size += f.size
	}
	return p
}

// show rewrites the line that tells it, or wipes it at the end. Nothing is
// shown of what is over within half a second.
func (p *progress) show(lines uint64, end bool) {
	now := time.Now()
	took := now.Sub(p.start)
	if p.out == nil || took < 500*time.Millisecond || !end && now.Sub(p.last) < 200*time.Millisecond {
		return
	}
	p.last = now
	if end {
		fmt.Fprint(p.out, "\r\x1b[K")
		return
	}
	var read int64
	for _, f := range p.files {
		read += f.read.Load()
	}
	text := fmt.Sprintf("%d lines, %.1f million a second", lines, float64(lines)/1e6/took.Seconds())
	if p.size > 0 && read > 0 {
		share := min(1, float64(read)/float64(p.size))
		text += fmt.Sprintf(", %.0f %%, %s left", 100*share, span(time.Duration(float64(took)*(1-share)/share).Round(time.Second)))
	}
	fmt.Fprint(p.out, "\r\x1b[K"+text)
}

// decision is the line that tells one.
func decision(t time.Time, text string) string {
	at := clock(t) + "  "
	return at + wrap(text, len(at), tableWidth)
}

func showReplay(out io.Writer, said []string, c *incident.Collector, s replaySummary) {
	for _, line := range said {
		fmt.Fprintln(out, line)
	}
	if len(said) > 0 {
		fmt.Fprintln(out)
	}
	const indent = len("connections  ")
	row := func(name, format string, args ...any) {
		fmt.Fprintf(out, "%-*s%s\n", indent, name, wrap(fmt.Sprintf(format, args...), indent, tableWidth))
	}
	if s.First.IsZero() {
		row("time", "no line with a time was found")
	} else {
		row("time", "%s to %s", clock(s.First), clock(s.Last))
	}
	row("lines", "%d, %d of them events, %d not Exim's", s.Lines, s.Events, s.Unparsed)
	if s.Misdated > 0 {
		row("", "%s with a time that cannot be true (forged, or garbled): taken as of the lines around", count(int(s.Misdated), "event", "events"))
	}
	opened, refused, accepted := c.Seen()
	row("connections", "%d opened, %d refused, of %s; %s accepted", opened, refused,
		count(s.Sources, "source", "sources"), count(int(accepted), "message", "messages"))
	row("slots", "%d (%s); full from %d taken on", s.Capacity, s.CapacityFrom, c.FullFrom())
	fmt.Fprintln(out)
	showRows(out, c, s.First, s.Last)
	if len(c.Rows()) > 0 {
		fmt.Fprintln(out)
	}
	fmt.Fprintln(out, wrap(c.Sentence(), 0, tableWidth))
	if s.CapacityFrom == detector.CapacityAssumed && s.Lines > 0 {
		fmt.Fprintln(out, "\n"+wrap("How many slots the server has is not known, and 100 are assumed: say --capacity with Exim's smtp_accept_max.", 0, tableWidth))
	}
	if s.PeakCount > s.Capacity {
		fmt.Fprintln(out, "\n"+wrap(fmt.Sprintf("The log shows %d connections at once: %d is not the number of slots, and all of the above is said too early. Say --capacity with Exim's smtp_accept_max, or leave it out.", s.PeakCount, s.Capacity), 0, tableWidth))
	}
	if s.Opened == 0 && s.Lines > 0 {
		fmt.Fprintln(out, "\n"+wrap("The log has no connection lines: add +smtp_connection +incoming_port to Exim's log_selector. The daemon sees connections in the kernel all the same.", 0, tableWidth))
	}
}
