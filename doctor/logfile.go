package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"os/user"
	"slices"
	"strconv"
	"syscall"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

const (
	sampleSize = 8 << 20 // bytes of a log's end that are looked at
	maxLine    = 64 << 10
	maxSources = 20_000

	// A regular client has connected so often, at intervals that differ by so
	// much of their mean (standard deviation), and are of this length.
	regularTimes  = 12
	regularSpread = 0.1
	regularMin    = 20 * time.Second
	regularMax    = time.Hour
)

// lookLog looks at a log and at its end.
func lookLog(path string, loc *time.Location) Log {
	l := Log{Path: path}
	fi, err := os.Stat(path)
	if err != nil {
		l.Err = err
		return l
	}
	l.Mode, l.Size, l.Written = fi.Mode().Perm().String(), fi.Size(), fi.ModTime()
	if st, ok := fi.Sys().(*syscall.Stat_t); ok {
		l.Owner = owner(st.Uid, st.Gid)
	}
	if !fi.Mode().IsRegular() {
		l.Err = errors.New("it is not a file")
		return l
	}
	file, err := os.Open(path)
	if err != nil {
		l.Err = err
		return l
	}
	defer file.Close()
	from := max(0, fi.Size()-sampleSize)
	r := bufio.NewReaderSize(io.NewSectionReader(file, from, sampleSize), maxLine)
	if from > 0 {
		for { // to the next whole line
			_, err := r.ReadSlice('\n')
			if !errors.Is(err, bufio.ErrBufferFull) {
				break
			}
		}
	}
	p := exim.New(loc)
	p.SetReference(l.Written)
	l.Err = l.sample(r, p)
	return l
}

// growthWait is how long a log is watched whose times seem to be off.
const growthWait = 3 * time.Second

// lookGrowth looks whether logs have grown since they were looked at: only of a
// line that was written just now is it known when it was written.
func (f *Facts) lookGrowth(ctx context.Context) {
	loc := (&exam{Facts: f}).location()
	for i := range f.Logs {
		l := &f.Logs[i]
		if l.Err != nil || l.LastLine.IsZero() {
			continue
		}
		until := time.Now()
		if l.Written.Sub(l.LastLine).Abs() > 2*time.Minute {
			until = until.Add(growthWait)
		}
		for !l.grown(loc) && time.Now().Before(until) && ctx.Err() == nil {
			time.Sleep(100 * time.Millisecond)
		}
	}
}

// grown takes the lines that were written since, and reports whether there is
// one with a time.
func (l *Log) grown(loc *time.Location) bool {
	fi, err := os.Stat(l.Path)
	if err != nil || fi.Size() <= l.Size {
		return false
	}
	file, err := os.Open(l.Path)
	if err != nil {
		return false
	}
	defer file.Close()
	p := exim.New(loc)
	p.SetReference(fi.ModTime())
	var ev detector.Event
	r := bufio.NewReaderSize(io.NewSectionReader(file, l.Size, min(fi.Size()-l.Size, sampleSize)), maxLine)
	for {
		line, err := r.ReadSlice('\n')
		if err != nil { // half a line, or one that is none of Exim's
			return l.Grew
		}
		if p.Parse(bytes.TrimSuffix(line, []byte("\n")), &ev) && !ev.Time.IsZero() {
			l.LastLine, l.Offset, l.Written, l.Grew = ev.Time, hasOffset(line), fi.ModTime(), true
		}
	}
}

func owner(uid, gid uint32) string {
	name, group := strconv.Itoa(int(uid)), strconv.Itoa(int(gid))
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	if g, err := user.LookupGroupId(group); err == nil {
		group = g.Name
	}
	return name + ":" + group
}

// pace is how evenly an address connects.
type pace struct {
	last    time.Time
	n       int
	sum, sq float64 // of the intervals, in seconds
	hasMail bool
	tooFast bool // faster than a monitor
}

// sample reads lines to the end of r.
func (l *Log) sample(r *bufio.Reader, p *exim.Parser) error {
	paces := make(map[netip.Addr]*pace)
	var ev detector.Event
	for {
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
		case len(line) > 0 && p.Parse(bytes.TrimSuffix(line, []byte("\n")), &ev):
			l.LastLine = ev.Time
			l.Offset = hasOffset(line)
			paced(paces, &ev)
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading it: %w", err)
		}
	}
	l.Stats = p.Stats()
	for a, q := range paces {
		if q.hasMail || q.tooFast || q.n < regularTimes {
			continue
		}
		mean := q.sum / float64(q.n)
		every := time.Duration(mean * float64(time.Second))
		if every < regularMin || every > regularMax || math.Sqrt(max(0, q.sq/float64(q.n)-mean*mean)) > regularSpread*mean {
			continue
		}
		l.Regulars = append(l.Regulars, Regular{Addr: a, Every: every.Round(time.Second), Times: q.n + 1})
	}
	slices.SortFunc(l.Regulars, func(a, b Regular) int { return a.Addr.Compare(b.Addr) })
	l.Regulars = l.Regulars[:min(len(l.Regulars), 20)]
	return nil
}

// paced takes an event.
func paced(paces map[netip.Addr]*pace, ev *detector.Event) {
	switch ev.Kind {
	case detector.Opened, detector.Accepted, detector.Authenticated:
	default:
		return
	}
	if ev.Source.IsLoopback() {
		return
	}
	q := paces[ev.Source]
	if q == nil {
		if len(paces) == maxSources {
			return
		}
		q = &pace{}
		paces[ev.Source] = q
	}
	if ev.Kind != detector.Opened {
		q.hasMail = true
		return
	}
	if !q.last.IsZero() {
		d := ev.Time.Sub(q.last).Seconds()
		q.n++
		q.sum += d
		q.sq += d * d
		q.tooFast = q.tooFast || d < 1
	}
	q.last = ev.Time
}

// hasOffset reports whether a line has log_timezone's offset, which follows
// the time: "2026-11-22 20:48:43 +0100 ", also with milliseconds.
func hasOffset(line []byte) bool {
	const n = len("2026-11-22 20:48:43")
	if i := bytes.Index(line[:min(len(line), 120)], []byte("]: ")); i > 0 {
		line = line[i+3:] // syslog
	}
	if len(line) < n+7 {
		return false
	}
	rest := line[n:]
	if rest[0] == '.' && len(rest) > 11 {
		rest = rest[4:]
	}
	return rest[0] == ' ' && (rest[1] == '+' || rest[1] == '-') && rest[2] >= '0' && rest[2] <= '1' && rest[6] == ' '
}
