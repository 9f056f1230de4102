package abuse

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/gaissmai/bart"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/detector"
)

// Logs reads the mail server's logs again, for evidence. It is asked off the
// path that blocks, when a draft is made.
type Logs interface {
	// Scan hands out the lines from one time to another, as far as the logs
	// reach, with what was parsed of each; both are valid until fn returns.
	// reach is the time of the oldest line that there is, zero if none.
	// The error is an *Unread where all was handed out but what could not be
	// read.
	Scan(ctx context.Context, from, to time.Time, fn func(ev *detector.Event, line []byte) error) (reach time.Time, err error)
}

// Unread is the error of logs of which a part could not be read.
type Unread struct{ Err error }

func (u *Unread) Error() string { return u.Err.Error() }
func (u *Unread) Unwrap() error { return u.Err }

// Facts are the numbers of a report. Text, CSV and XARF are all made from
// them.
type Facts struct {
	First time.Time `json:"first,omitzero"` // of the connections counted
	Last  time.Time `json:"last,omitzero"`
	// Began is when the flood did, where that is longer ago than the log is
	// read; else zero.
	Began time.Time `json:"began,omitzero"`
	// Connections is Taken, those that got a slot, plus Refused, those that
	// the mail server turned away after it had accepted them.
	Connections int `json:"connections"`
	Taken       int `json:"taken"`
	Refused     int `json:"refused"`
	// Messages were accepted from the sources counted.
	Messages int `json:"messages"`
	// Peak is the highest number of connections in PeakWindow, 0 if it is not known.
	Peak       int           `json:"peak,omitempty"`
	PeakWindow time.Duration `json:"peak_window_ns,omitempty"`
	// Sources are sorted by connections. More is how many further ones are
	// counted in Connections but not kept by themselves.
	Sources []Source `json:"sources"`
	More    Source   `json:"more,omitzero"`
	MoreOf  int      `json:"more_of,omitempty"`
	// Spared are sources inside the blocked networks that delivered mail or
	// logged in: they are not reported.
	Spared int `json:"spared,omitempty"`
	// Others is how many connections of others were refused because the
	// server was full, in how many different seconds, and from how many
	// different networks (/24, /48; at most maxSources are told apart).
	Others         int `json:"others_refused,omitempty"`
	OthersSeconds  int `json:"others_refused_seconds,omitempty"`
	OthersNetworks int `json:"others_refused_networks,omitempty"`
	// Lumped: there were more sources than are told apart. The others' connections
	// and messages are counted in More, whoever of them is a proper sender.
	Lumped bool `json:"lumped,omitempty"`
	// Private: the log names the server by an address of a private network,
	// as behind NAT; it is left out.
	Private bool `json:"private_target,omitempty"`
	// Baseline is how many connections the sources counted made in the
	// BaselineDays before the flood began, those of all others in the blocked
	// networks too if BaselineAll; -1: not known.
	Baseline     int     `json:"baseline"`
	BaselineAll  bool    `json:"baseline_all,omitempty"`
	BaselineDays float64 `json:"baseline_days,omitempty"`
	// FromLog: the numbers are from log lines; else from the detector alone.
	FromLog bool `json:"from_log"`
	// Unread says what of the log could not be read: then the numbers are
	// lower bounds. Empty: all of it was.
	Unread string `json:"unread,omitempty"`
	// Millis: the log's times have milliseconds.
	Millis bool `json:"millis,omitempty"`
	// Excerpt are lines made of parsed fields only.
	Excerpt []Excerpt `json:"excerpt,omitempty"`
	// Lines is how many log lines there are in all.
	Lines int `json:"lines,omitempty"`
}

// Excerpt is one line of evidence, made of parsed fields: Text is what stands
// behind the time.
type Excerpt struct {
	Time   time.Time  `json:"time"`
	Source netip.Addr `json:"source"`
	Text   string     `json:"text"`
}

const excerptTime = "2006-01-02 15:04:05.000 +0000"

// size is what the line takes at most.
func (e Excerpt) size() int { return len(excerptTime) + len(e.Text) + 2 }

// line is the excerpt as Exim writes it, in UTC: with milliseconds where the
// log has them.
func (f *Facts) line(e Excerpt) string {
	form := excerptTime
	if !f.Millis {
		form = strings.Replace(form, ".000", "", 1)
	}
	return e.Time.UTC().Format(form) + " " + e.Text
}

// Source is one source of a flood.
type Source struct {
	// Prefix is one address, except where the detector alone knows the flood.
	Prefix netip.Prefix   `json:"prefix,omitzero"`
	Port   uint16         `json:"port,omitempty"` // of its first connection; 0: the log does not say
	Local  netip.AddrPort `json:"local,omitzero"` // where it was connected to; zero: the log does not say
	First  time.Time      `json:"first,omitzero"`
	Last   time.Time      `json:"last,omitzero"`
	// Connections contains Refused.
	Connections int `json:"connections"`
	Refused     int `json:"refused,omitempty"`
}

func (s *Source) add(o Source) {
	s.Connections += o.Connections
	s.Refused += o.Refused
	if s.First.IsZero() || !o.First.IsZero() && o.First.Before(s.First) {
		s.First = o.First
	}
	if o.Last.After(s.Last) {
		s.Last = o.Last
	}
}

// Bounds of the evidence.
const (
	maxSources    = 20_000   // known by themselves while reading
	maxListed     = 5_000    // rows of sources.csv
	maxExcerpt    = 50       // lines of evidence.txt
	excerptBytes  = 16 << 10 // and their size
	maxArchive    = 64 << 20 // of one archive, before compression
	peakWindow    = 10 * time.Second
	maxSpan       = 48 * time.Hour // of one case that is read
	tailAfter     = 2 * time.Minute
	scanTimeout   = 5 * time.Minute
	perSourceKeep = 3  // lines remembered of a source for the excerpt: its first and its last
	keepSeconds   = 64 // connections of a source that can be taken out of the peak again
)

// collector gathers the evidence of one case while a log is read.
type collector struct {
	prefixes []netip.Prefix
	single   map[netip.Addr]bool // blocked by itself: reported whatever mail it sent
	// hostile are all blocked networks, also of other cases; nil: not known.
	hostile *bart.Lite
	// from and to bound what is counted. began is when the flood did: what came
	// before is the normal level. They differ in a follow-up.
	began, from, to time.Time
	cut             bool // began is longer ago than a case is read

	sources map[netip.Addr]*tally
	proper  map[netip.Addr]bool      // delivered mail or logged in before; at most maxSources
	more    map[netip.Prefix]*Source // what is over maxSources
	seconds map[int64]int32
	others  map[int64]struct{}
	// networks are those of others; before and beforeAll are the connections
	// before the flood, by source while they are at most maxSources, and all.
	networks  map[netip.Prefix]struct{}
	nOthers   int
	before    map[netip.Addr]int
	beforeAll int
	overflown int // lines of more
	messages  int // accepted from sources in more
	millis    bool
	private   bool

	archive *archiver
}

// tally is what is known of one source while reading.
type tally struct {
	Source
	messages int
	good     bool // delivered mail or logged in
	lines    []Excerpt
	n        int // lines in all
	// seconds in which it connected, as long as they are few: they are taken
	// out of the peak again if it turns out to be a proper sender.
	seconds []int64
}

// newCollector collects for the next draft of a case.
func newCollector(c *Case) *collector {
	m := Mail{LastID: c.LastID}
	m.follow(c)
	all := c
	c = c.of(&m)
	k := &collector{prefixes: c.prefixes(), single: map[netip.Addr]bool{}, sources: map[netip.Addr]*tally{}, proper: map[netip.Addr]bool{},
		more: map[netip.Prefix]*Source{}, seconds: map[int64]int32{}, others: map[int64]struct{}{},
		networks: map[netip.Prefix]struct{}{}, before: map[netip.Addr]int{}}
	for _, r := range c.live() {
		if r.Prefix.IsSingleIP() {
			k.single[r.Prefix.Addr()] = true
		}
		from, to := r.Since, r.Since
		if v := r.Verdict; v != nil {
			from, to = v.Time.Add(-v.Window), v.Time
			if !v.First.IsZero() && v.First.Before(from) {
				from = v.First
			}
			if r.Since.After(to) {
				to = r.Since
			}
		}
		to = to.Add(tailAfter)
		if r.Observed { // it goes on, nobody stops it
			to = r.end()
		}
		if k.from.IsZero() || from.Before(k.from) {
			k.from = from
		}
		if to.After(k.to) {
			k.to = to
		}
	}
	k.began = k.from
	if k.to.Sub(k.from) > maxSpan {
		k.from = k.to.Add(-maxSpan)
		k.cut = true
	}
	if !m.After.IsZero() {
		for _, o := range all.Mails {
			if f := o.Facts.First; !f.IsZero() && f.Before(k.began) {
				k.began = f
			}
		}
		if all.FirstBlock.Before(k.began) {
			k.began = all.FirstBlock
		}
		if !k.from.After(m.After) {
			k.from = m.After.Add(1)
		}
	}
	return k
}

// reports says whether a source is reported: not if it delivered mail or
// logged in, unless it was blocked by itself.
func (k *collector) reports(a netip.Addr) bool {
	t := k.sources[a]
	return t == nil || !t.good || k.single[a]
}

func (k *collector) covers(a netip.Addr) bool { return within(k.prefixes, a) >= 0 }

// observe takes one event. The line is chosen by what was parsed of it, never
// by searching its text.
func (k *collector) observe(ev *detector.Event, line []byte) {
	if !ev.Source.IsValid() {
		return
	}
	mine := k.covers(ev.Source)
	if ev.Time.Before(k.from) {
		switch {
		case !mine:
		case (ev.Kind == detector.Opened || ev.Kind == detector.Refused) && ev.Time.Before(k.began):
			k.beforeAll++
			if _, ok := k.before[ev.Source]; ok || len(k.before) < maxSources {
				k.before[ev.Source]++
			}
		case (ev.Kind == detector.Accepted || ev.Kind == detector.Authenticated) && len(k.proper) < maxSources:
			k.proper[ev.Source] = true
		}
		return
	}
	if ev.Time.After(k.to) {
		return
	}
	if !mine {
		if ev.Kind == detector.Refused && ev.Reason == detector.RefusedFull && (k.hostile == nil || !k.hostile.Contains(ev.Source)) {
			k.nOthers++
			k.others[ev.Time.Unix()] = struct{}{}
			if len(k.networks) < maxSources {
				k.networks[provisional(single(ev.Source))] = struct{}{}
			}
		}
		return
	}
	switch ev.Kind {
	case detector.Opened, detector.Refused, detector.Closed, detector.Accepted, detector.Authenticated, detector.AuthFailed:
	default:
		return
	}
	if privateAddr(ev.Local.Addr()) {
		k.private = true
		public := *ev
		public.Local = netip.AddrPort{}
		ev = &public
	}
	t := k.sources[ev.Source]
	if t == nil {
		if len(k.sources) >= maxSources {
			k.overflow(ev)
			return
		}
		t = &tally{Source: Source{Prefix: netip.PrefixFrom(ev.Source, ev.Source.BitLen())}, good: k.proper[ev.Source]}
		k.sources[ev.Source] = t
	}
	switch ev.Kind {
	case detector.Accepted:
		t.messages++
		t.good = true
		return
	case detector.Authenticated:
		t.good = true
		return
	case detector.AuthFailed:
		return
	case detector.Opened, detector.Refused:
		t.count(ev)
		s := ev.Time.Unix()
		k.seconds[s]++
		if len(t.seconds) < keepSeconds {
			t.seconds = append(t.seconds, s)
		}
	}
	t.n++
	if k.archive != nil {
		k.archive.line(ev.Source, line)
	}
	k.millis = k.millis || ev.Time.Nanosecond() != 0
	l := Excerpt{ev.Time.UTC(), ev.Source, rendered(ev)}
	if len(t.lines) < perSourceKeep {
		t.lines = append(t.lines, l)
	} else {
		t.lines[perSourceKeep-1] = l
	}
}

func (s *Source) count(ev *detector.Event) {
	s.Connections++
	if ev.Kind == detector.Refused {
		s.Refused++
	}
	if s.First.IsZero() || ev.Time.Before(s.First) {
		s.First = ev.Time
	}
	if ev.Time.After(s.Last) {
		s.Last = ev.Time
	}
	if s.Port == 0 {
		s.Port = ev.Port
	}
	if !s.Local.IsValid() {
		s.Local = ev.Local
	}
}

// shared is the network behind a carrier's or a cloud's NAT, RFC 6598.
var shared = netip.MustParsePrefix("100.64.0.0/10")

// privateAddr reports whether an address of ours is one that nobody else can
// find: private, shared, link-local or loopback.
func privateAddr(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || shared.Contains(a)
}

// overflow counts what cannot be remembered by itself, in the blocked prefix.
func (k *collector) overflow(ev *detector.Event) {
	if ev.Kind == detector.Accepted {
		k.messages++
	}
	if ev.Kind != detector.Opened && ev.Kind != detector.Refused {
		return
	}
	k.overflown++
	k.seconds[ev.Time.Unix()]++
	p := k.prefixes[within(k.prefixes, ev.Source)]
	s := k.more[p]
	if s == nil {
		s = &Source{Prefix: p}
		k.more[p] = s
	}
	s.count(ev)
}

// rendered is what was parsed of a log line, behind its time: both ends, the
// count and the reason. All else that a line can hold (host names, HELO, users,
// senders, recipients, subjects, ids) is left out by construction.
func rendered(ev *detector.Event) string {
	var b strings.Builder
	if ev.Kind == detector.Refused {
		b.WriteString("Connection from ")
	} else {
		b.WriteString("SMTP connection from ")
	}
	fmt.Fprintf(&b, "[%s]", ev.Source)
	if ev.Port != 0 {
		fmt.Fprintf(&b, ":%d", ev.Port)
	}
	if ev.Local.IsValid() {
		fmt.Fprintf(&b, " I=[%s]:%d", ev.Local.Addr(), ev.Local.Port())
	}
	switch ev.Kind {
	case detector.Opened:
		if ev.Count > 0 {
			fmt.Fprintf(&b, " (TCP/IP connection count = %d)", ev.Count)
		}
	case detector.Refused:
		b.WriteString(" refused")
		switch ev.Reason {
		case detector.RefusedFull:
			b.WriteString(": too many connections")
		case detector.RefusedPerHost:
			b.WriteString(": too many connections from that IP address")
		case detector.RefusedLoad:
			b.WriteString(": load average")
		}
	case detector.Closed:
		switch ev.Reason {
		case detector.ClosedQuit:
			b.WriteString(" closed by QUIT")
		case detector.ClosedTimeout:
			b.WriteString(" closed after timeout")
		case detector.ClosedDropped, detector.ClosedRejected:
			b.WriteString(" closed by us")
		case detector.ClosedKilled:
			b.WriteString(" ended by us")
		default:
			b.WriteString(" lost")
		}
	}
	return b.String()
}

// facts are the numbers when everything was read. reach is how far back the
// logs go.
func (k *collector) facts(reach time.Time, base time.Duration) Facts {
	f := Facts{FromLog: true, Lines: k.overflown, Baseline: -1, PeakWindow: peakWindow}
	var kept []*tally
	for a, t := range k.sources {
		if !k.reports(a) {
			f.Spared++
			for _, s := range t.seconds {
				k.seconds[s]--
			}
			continue
		}
		f.Lines += t.n
		if t.Connections == 0 {
			continue
		}
		kept = append(kept, t)
		f.Messages += t.messages
	}
	slices.SortFunc(kept, func(a, b *tally) int {
		if a.Connections != b.Connections {
			return b.Connections - a.Connections
		}
		return a.Prefix.Compare(b.Prefix)
	})
	sum := Source{}
	for i, t := range kept {
		sum.add(t.Source)
		if i < maxListed {
			f.Sources = append(f.Sources, t.Source)
		} else {
			f.More.add(t.Source)
			f.MoreOf++
		}
	}
	for _, s := range k.more {
		sum.add(*s)
		f.More.add(*s)
	}
	f.First, f.Last, f.Connections, f.Refused = sum.First, sum.Last, sum.Connections, sum.Refused
	f.Taken = f.Connections - f.Refused
	f.Others, f.OthersSeconds, f.OthersNetworks = k.nOthers, len(k.others), len(k.networks)
	f.Lumped, f.Private = len(k.more) > 0, k.private
	if f.Lumped {
		f.Messages += k.messages
	}
	if k.cut {
		f.Began = k.began
	}
	f.Peak = min(k.peak(), f.Connections)
	f.Millis = k.millis
	f.Excerpt = excerpt(kept)
	if base > 0 && !reach.IsZero() {
		begin := k.began.Add(-base)
		if reach.After(begin) {
			begin = reach
		}
		if d := k.began.Sub(begin); d >= time.Hour {
			f.Baseline, f.BaselineDays = 0, d.Hours()/24
			for _, t := range kept {
				f.Baseline += k.before[t.Prefix.Addr()]
			}
			if counted := len(k.before) < maxSources && !f.Lumped; !counted {
				f.Baseline, f.BaselineAll = k.beforeAll, true
			}
		}
	}
	return f
}

// peak is the highest number of connections in peakWindow, after facts has
// taken the proper senders out: all of theirs up to keepSeconds connections.
func (k *collector) peak() int {
	n := int64(peakWindow / time.Second)
	best := 0
	for s := range k.seconds {
		sum := 0
		for i := range n {
			sum += int(k.seconds[s+i])
		}
		best = max(best, sum)
	}
	return best
}

// excerpt picks lines: of each of the busiest sources its first and its last,
// then second ones, in the order of time.
func excerpt(kept []*tally) []Excerpt {
	var lines []Excerpt
	size := 0
	for round := range perSourceKeep {
		for _, t := range kept[:min(len(kept), maxExcerpt)] {
			// First, last, then the one between.
			i := []int{0, len(t.lines) - 1, 1}[round]
			if i >= len(t.lines) || round == 1 && i == 0 || round == 2 && i >= len(t.lines)-1 {
				continue
			}
			l := t.lines[i]
			if len(lines) >= maxExcerpt || size+l.size() > excerptBytes {
				continue
			}
			lines = append(lines, l)
			size += l.size()
		}
	}
	slices.SortStableFunc(lines, func(a, b Excerpt) int { return a.Time.Compare(b.Time) })
	return lines
}

// few picks n lines of an excerpt: one of each source, the most active ones
// first, then second ones.
func (f *Facts) few(n int) []Excerpt {
	if len(f.Excerpt) <= n {
		return f.Excerpt
	}
	took := make([]bool, len(f.Excerpt))
	left := n
	for left > 0 {
		before := left
		for _, s := range f.Sources {
			i := slices.IndexFunc(f.Excerpt, func(e Excerpt) bool { return s.Prefix.Contains(e.Source) })
			for i >= 0 && i < len(took) && (took[i] || !s.Prefix.Contains(f.Excerpt[i].Source)) {
				i++
			}
			if i >= 0 && i < len(took) && left > 0 {
				took[i] = true
				left--
			}
			if left == 0 {
				break
			}
		}
		if left == before {
			break
		}
	}
	var out []Excerpt
	for i, e := range f.Excerpt {
		if took[i] {
			out = append(out, e)
		}
	}
	return out
}

// fromVerdicts are the facts where no log line could be read: what the
// detector counted, by blocked prefix.
func fromVerdicts(c *Case) Facts {
	f := Facts{Baseline: -1}
	byPrefix := map[netip.Prefix]*Source{}
	outer := c.prefixes()
	var lines []Excerpt
	for _, p := range outer {
		byPrefix[p] = &Source{Prefix: p}
	}
	// Inside a wider block the narrower ones are counted already; where they
	// add up to more than the wider one's, theirs counts.
	inner := map[netip.Prefix]*Source{}
	for _, r := range c.live() {
		v := r.Verdict
		if v == nil {
			continue
		}
		one := Source{Prefix: r.Prefix, Connections: v.Opens + v.Refused, Refused: v.Refused, First: v.First, Last: v.Time}
		if one.First.IsZero() {
			one.First = v.Time.Add(-v.Window)
		}
		f.Messages += v.Accepted
		p := outer[within(outer, r.Prefix.Masked().Addr())]
		if p == r.Prefix {
			byPrefix[p].add(one)
		} else {
			if inner[p] == nil {
				inner[p] = &Source{}
			}
			inner[p].add(one)
		}
		for _, e := range v.Evidence {
			if byPrefix[p].Port == 0 && p.Contains(e.Source) {
				byPrefix[p].Port = e.Port
			}
			lines = append(lines, Excerpt{e.Time.UTC(), e.Source, rendered(&detector.Event{Time: e.Time, Kind: detector.Opened, Source: e.Source, Port: e.Port, Count: e.Count})})
		}
	}
	sum := Source{}
	for _, p := range outer {
		s := byPrefix[p]
		if i := inner[p]; i != nil && i.Connections > s.Connections {
			i.Prefix, i.Port = s.Prefix, s.Port
			s = i
		}
		if s.Connections == 0 {
			continue
		}
		sum.add(*s)
		f.Sources = append(f.Sources, *s)
	}
	slices.SortStableFunc(f.Sources, func(a, b Source) int { return b.Connections - a.Connections })
	if len(f.Sources) > maxListed {
		for _, s := range f.Sources[maxListed:] {
			f.More.add(s)
			f.MoreOf++
		}
		f.Sources = f.Sources[:maxListed]
	}
	f.First, f.Last, f.Connections, f.Refused = sum.First, sum.Last, sum.Connections, sum.Refused
	f.Taken = f.Connections - f.Refused
	slices.SortStableFunc(lines, func(a, b Excerpt) int { return a.Time.Compare(b.Time) })
	size := 0
	for _, l := range lines {
		if len(f.Excerpt) < maxExcerpt && size+l.size() <= excerptBytes {
			f.Excerpt = append(f.Excerpt, l)
			size += l.size()
		}
	}
	return f
}

// archiver keeps the raw lines of a case: for ourselves, never in a mail. They
// go into a draft of the archive first, each behind its source, for only when
// all were read is it known who is a proper sender.
type archiver struct {
	path  string // of the archive, without the beginning of its hash and the ending
	f     *os.File
	gz    *gzip.Writer
	bytes int64
	cut   bool
	err   error
}

func newArchiver(dir, name string) (*archiver, error) {
	f, err := createTemp(dir)
	if err != nil {
		return nil, err
	}
	a := &archiver{path: filepath.Join(dir, name), f: f}
	a.gz, a.err = gzip.NewWriterLevel(f, gzip.BestSpeed)
	return a, a.err
}

func (a *archiver) line(source netip.Addr, line []byte) {
	if a.err != nil || a.cut {
		return
	}
	if a.bytes += int64(len(line)) + 1; a.bytes > maxArchive {
		a.cut = true
		return
	}
	_, a.err = fmt.Fprintf(a.gz, "%s %s\n", source, line)
}

// close puts the archive in place with the lines of those that are reported;
// with nothing in it there is none.
func (a *archiver) close(reports func(netip.Addr) bool) (Archive, error) {
	err := errors.Join(a.err, a.gz.Close())
	if err == nil {
		_, err = a.f.Seek(0, io.SeekStart)
	}
	out := Archive{Cut: a.cut}
	if err == nil {
		err = out.write(a.f, a.path, reports)
	}
	a.f.Close()
	os.Remove(a.f.Name())
	if err != nil {
		return Archive{}, fmt.Errorf("keeping the evidence: %w", err)
	}
	if out.Lines == 0 {
		return Archive{}, nil
	}
	return out, nil
}

// write makes the archive of its draft. Its name has the beginning of its hash,
// so that one which a mail tells of is never overwritten by another.
func (a *Archive) write(draft io.Reader, path string, reports func(netip.Addr) bool) error {
	zr, err := gzip.NewReader(draft)
	if err != nil {
		return err
	}
	f, err := createTemp(filepath.Dir(path))
	if err != nil {
		return err
	}
	sum := sha256.New()
	gz := gzip.NewWriter(f)
	w := io.MultiWriter(gz, sum)
	br := bufio.NewReaderSize(zr, 64<<10)
	for err == nil {
		var line []byte
		line, err = br.ReadBytes('\n') // as long as a line that was read
		source, rest, ok := bytes.Cut(line, []byte(" "))
		if addr, perr := netip.ParseAddr(string(source)); !ok || perr != nil || !reports(addr) {
			continue
		}
		a.Lines++
		a.Bytes += int64(len(rest))
		if _, werr := w.Write(rest); werr != nil {
			err = werr
		}
	}
	if err == io.EOF {
		err = nil
	}
	err = errors.Join(err, gz.Close())
	a.SHA256 = hex.EncodeToString(sum.Sum(nil))
	if a.Lines == 0 && err == nil {
		f.Close()
		return os.Remove(f.Name())
	}
	path += "-" + a.SHA256[:12] + ".log.gz"
	a.File = filepath.Base(path)
	return finish(f, path, err)
}

// Clock says how far this machine's clock can be believed, in a few words for
// the report.
func Clock() string {
	// Under a filter of system calls (systemd's SystemCallFilter) adjtimex may
	// be answered with the end of the process, though it only reads here.
	if status, err := os.ReadFile("/proc/self/status"); err != nil || !strings.Contains(string(status), "\nSeccomp:\t0\n") {
		if _, err := os.Stat("/run/systemd/timesync/synchronized"); err == nil {
			return "synchronised (systemd-timesyncd)"
		}
		return "unknown (not visible to this program)"
	}
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	switch {
	case err != nil:
		return "unknown (the kernel does not say)"
	case state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0:
		return "not known to be synchronised"
	}
	return fmt.Sprintf("synchronised (kernel), error below %d ms", max(1, (t.Maxerror+999)/1000))
}
