package detector_test

import (
	"bytes"
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	_ "time/tzdata"

	"github.com/smtpguard/smtpguard/detector"
)

// logLine is a line of a log, whatever form it was written in.
type logLine struct {
	at   time.Time
	pid  string
	text string
	raw  string // not empty: no line of Exim's; written as it is
}

var (
	anyForm  = regexp.MustCompile(`^(?:\w{3} [ \d]\d [\d:]{8} \S+ exim\[(\d+)\]: )?(\d{4}-\d\d-\d\d [\d:]{8}(?:\.\d{3})?)( [+-]\d{4})?(?: \[(\d+)\])? (.*)$`)
	withPort = regexp.MustCompile(`(\[[0-9a-f.:]+\]):\d+`)
	oldID    = regexp.MustCompile(`^(\w{6})-(\w{6})-(\w\w) `)
	duration = regexp.MustCompile(` D=[0-9a-z.]+$`)
	endsWith = regexp.MustCompile(`^SMTP connection from (.*?)( closed by [A-Z]+(?: in ACL)?| closed after SIG[A-Z]+| lost while reading message data(?: \(header\))?)$`)
	aLoss    = regexp.MustCompile(`^SMTP connection from (.* lost(?: \(error: [^)]*\))? D=[0-9a-z.]+)$`)
	anOpen   = regexp.MustCompile(`^SMTP connection from (\[[0-9a-f.:]+\]:\d+)(.*) \(TCP/IP connection count = (\d+)\)$`)
	peerOf   = regexp.MustCompile(`\[[0-9a-f.:]+\]:\d+`)
)

// readForm reads a log of the corpus. Lines of one whole second are spread
// over it, in order.
func readForm(t *testing.T, text []byte) []logLine {
	var all []logLine
	for raw := range strings.Lines(string(text)) {
		raw = strings.TrimSuffix(raw, "\n")
		m := anyForm.FindStringSubmatch(raw)
		if m == nil {
			all = append(all, logLine{raw: raw})
			continue
		}
		layout := "2006-01-02 15:04:05"
		if m[3] != "" {
			layout += " -0700"
		}
		at, err := time.Parse(layout, m[2]+m[3])
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, logLine{at: at.UTC(), pid: cmp.Or(m[1], m[4], "4711"), text: m[5]})
	}
	return all
}

// form is another way to write the same log, or what is left of it.
type form struct {
	name string
	// edit changes the lines, nil: not.
	edit func(rnd *rand.Rand, all []logLine) []logLine
	// write writes a line; nil: as Exim does by default.
	write func(l *logLine) string
	zone  string // of times without offset, "": UTC
	// same: the blocks are the same, within two seconds. If not, all the
	// attackers are found at some time, but for few: of logs that are named
	// there, not everything is left to be seen, and so many are found.
	same bool
	few  map[string]int
}

// The logs of one scenario: a hog, a /24 and a /64 whose addresses hold two
// slots each and never let go, and hosts that come and go without end.
func mixed(n int) map[string]int {
	return map[string]int{"b-all": n, "c-cpanel": n, "d-pid-millisec": n, "e-timezone": n, "f-syslog": n, "m2-reserve-only": n}
}

func with(few map[string]int, log string, n int) map[string]int {
	few[log] = n
	return few
}

func plainForm(l *logLine) string { return l.at.Format("2006-01-02 15:04:05 ") + l.text }

func each(f func(text string) string) func(*rand.Rand, []logLine) []logLine {
	return func(_ *rand.Rand, all []logLine) []logLine {
		for i := range all {
			all[i].text = f(all[i].text)
		}
		return all
	}
}

func only(keep func(text string) bool) func(*rand.Rand, []logLine) []logLine {
	return func(_ *rand.Rand, all []logLine) []logLine {
		return slices.DeleteFunc(all, func(l logLine) bool { return !keep(l.text + l.raw) })
	}
}

var nobody = map[string]int{"g1-ipv6-one-64": 0, "h-one-ip-hold": 0, "i-slash24-botnet": 0, "j-rapid-churn": 0,
	"b-all": 0, "c-cpanel": 0, "d-pid-millisec": 0, "e-timezone": 0, "f-syslog": 0, "m2-reserve-only": 0}

var forms = []form{
	{name: "default", same: true},
	{name: "syslog without inner time and pid", same: true, write: func(l *logLine) string {
		return l.at.Format("Jan _2 15:04:05 mx exim: ") + l.text
	}},
	{name: "local time", same: true, zone: "America/New_York", write: func(l *logLine) string {
		loc, _ := time.LoadLocation("America/New_York")
		return l.at.In(loc).Format("2006-01-02 15:04:05 ") + l.text
	}},
	{name: "+millisec +pid and offset", same: true, write: func(l *logLine) string {
		return l.at.In(time.FixedZone("", -12600)).Format("2006-01-02 15:04:05.000 -0700 [") + l.pid + "] " + l.text
	}},
	{name: "4.97", same: true, edit: each(as497)},
	{name: "4.86", same: true, edit: each(func(s string) string { return duration.ReplaceAllString(s, "") })},
	{name: "no ports", same: true, edit: each(func(s string) string { return withPort.ReplaceAllString(s, "$1") })},
	// With so many refused for another reason it is not known all the time
	// that the server is full, and it takes some seconds longer.
	{name: "refused per host", edit: each(func(s string) string {
		if strings.HasSuffix(s, "refused: too many connections") {
			s += " from that IP address"
		}
		return s
	})},
	{name: "shuffled by 2 s", same: true, edit: shuffle},
	// Who came last is thought to hold; those who sit still are pushed out by
	// those who come and go. In m2 the count never shows that it is full.
	{name: "only count lines", few: with(mixed(9), "m2-reserve-only", 1), edit: only(func(s string) bool { return strings.Contains(s, "count =") })},
	{name: "only opens and refusals", few: with(mixed(9), "m2-reserve-only", 1), edit: only(func(s string) bool {
		return strings.Contains(s, "count =") || strings.Contains(s, "refused: too many")
	})},
	// The /64 opened before the log begins, and never again.
	{name: "begins in the middle", few: mixed(9), edit: fromTheMiddle},
	// In m2 fewer than 90 are counted after the second.
	{name: "two restarts", few: map[string]int{"m2-reserve-only": 1}, edit: restarts},
	{name: "default selector", few: nobody, edit: only(func(s string) bool { return !strings.HasPrefix(s, "SMTP connection ") })},
}

// as497 is a line as Exim 4.97 writes it, with +connection_id.
func as497(s string) string {
	const id = "Ci=1763840750"
	if m := anOpen.FindStringSubmatch(s); m != nil {
		return fmt.Sprintf("SMTP connection from %s%s %s (TCP/IP connection count = %s)", m[1], m[2], id, m[3])
	}
	if m := endsWith.FindStringSubmatch(s); m != nil {
		return fmt.Sprintf("SMTP connection %s from %s D=1m5s%s", id, m[1], m[2])
	}
	if m := aLoss.FindStringSubmatch(s); m != nil {
		return fmt.Sprintf("SMTP connection %s from %s", id, m[1])
	}
	if strings.HasPrefix(s, "SMTP command timeout on ") {
		return s + " D=12s"
	}
	return oldID.ReplaceAllString(s, "$1-00000$2-00$3 ")
}

// shuffle moves lines by up to two seconds.
func shuffle(rnd *rand.Rand, all []logLine) []logLine {
	late := make([]time.Time, len(all))
	order := make([]int, len(all))
	var last time.Time
	for i := range all {
		if !all[i].at.IsZero() {
			last = all[i].at
		}
		late[i], order[i] = last.Add(time.Duration(rnd.Int64N(int64(2*time.Second)))), i
	}
	slices.SortStableFunc(order, func(a, b int) int { return late[a].Compare(late[b]) })
	out := make([]logLine, len(all))
	for i, j := range order {
		out[i] = all[j]
	}
	return out
}

// fullAt is the first line that says that the server is full, -1 if none.
func fullAt(all []logLine) int {
	return slices.IndexFunc(all, func(l logLine) bool {
		m := anOpen.FindStringSubmatch(l.text)
		return strings.HasSuffix(l.text, "refused: too many connections") || m != nil && len(m[3]) >= 2 && m[3] >= "90" || m != nil && len(m[3]) == 3
	})
}

// fromTheMiddle leaves out all until three seconds after the server was full.
func fromTheMiddle(_ *rand.Rand, all []logLine) []logLine {
	i := fullAt(all)
	if i < 0 {
		return all
	}
	from := all[i].at.Add(3 * time.Second)
	return slices.DeleteFunc(all, func(l logLine) bool { return l.at.Before(from) })
}

// restarts puts in two SIGHUPs, at a third and two thirds of the time from
// the first line to when the server was full, and counts anew after each.
func restarts(_ *rand.Rand, all []logLine) []logLine {
	i := fullAt(all)
	if i < 0 {
		i = len(all) / 2
	}
	open := make(map[string]int) // peer -> generation
	gen, n := 0, 0
	var out []logLine
	for j, l := range all {
		if j == i/3 || j == 2*i/3 {
			gen, n = gen+1, 0
			out = append(out, logLine{at: l.at, pid: l.pid, text: "pid " + l.pid + ": SIGHUP received: re-exec daemon"},
				logLine{at: l.at, pid: l.pid, text: "exim 4.96 daemon started: pid=" + l.pid + ", no queue runs, listening for SMTP on port 25 (IPv6 and IPv4)"})
		}
		if m := anOpen.FindStringSubmatch(l.text); m != nil {
			if _, ok := open[m[1]]; !ok {
				open[m[1]] = gen
				n++
			}
			if gen > 0 {
				l.text = fmt.Sprintf("SMTP connection from %s%s (TCP/IP connection count = %d)", m[1], m[2], n)
			}
		} else if strings.Contains(l.text, " closed by ") || strings.Contains(l.text, " lost") || strings.Contains(l.text, "timeout on") ||
			strings.Contains(l.text, "unexpected disc") || strings.Contains(l.text, "dropped: too many") || strings.HasPrefix(l.text, "refused connection") ||
			strings.Contains(l.text, "synchronization error") {
			for _, p := range peerOf.FindAllString(l.text, -1) {
				if g, ok := open[p]; ok {
					delete(open, p)
					if g == gen {
						n--
					}
				}
			}
		}
		out = append(out, l)
	}
	return out
}

func writeForm(f *form, all []logLine) []byte {
	write := f.write
	if write == nil {
		write = plainForm
	}
	var b bytes.Buffer
	for i := range all {
		if all[i].raw != "" {
			b.WriteString(all[i].raw)
		} else {
			b.WriteString(write(&all[i]))
		}
		b.WriteByte('\n')
	}
	return b.Bytes()
}

// The same floods written in other forms give the same verdicts; and where
// part of a log is missing, nobody is blocked who should not be.
func TestForms(t *testing.T) {
	everything := func(*detector.Event) bool { return true }
	cfg := detector.Config{Rules: detector.DefaultRules()}
	var table strings.Builder
	corpus(t, func(t *testing.T, name string, text []byte, tr *truth) {
		want := replay(t, text, cfg, true, everything)
		must := tr.must(t)
		for i := range forms {
			f := &forms[i]
			lines := readForm(t, text)
			if f.edit != nil {
				lines = f.edit(rand.New(rand.NewPCG(1, uint64(i))), lines)
			}
			loc, err := time.LoadLocation(cmp.Or(f.zone, "UTC"))
			if err != nil {
				t.Fatal(err)
			}
			got := replayIn(t, loc, writeForm(f, lines), cfg, true, everything)
			found := 0
			for _, a := range must {
				if got.blocked(a) {
					found++
				}
			}
			fmt.Fprintf(&table, "%-24s %-34s %4d/%-4d", name, f.name, found, len(must))
			for _, b := range got.blocks[:min(6, len(got.blocks))] {
				fmt.Fprintf(&table, " %s %s %.1f", b.prefix, b.rule, b.at.Sub(tr.attackStart(b.prefix)).Seconds())
			}
			table.WriteByte('\n')
			for _, b := range got.blocks {
				if j := slices.IndexFunc(tr.MustNotBlock, func(m string) bool { return b.prefix.Overlaps(prefix(t, m)) }); j >= 0 {
					t.Errorf("%s, %s: blocked %s, which covers %s:\n\t%s", name, f.name, b.prefix, tr.MustNotBlock[j], strings.Join(got.verdict, "\n\t"))
				}
			}
			least, some := f.few[name]
			switch {
			case f.same:
				sameBlocks(t, name+", "+f.name, got.blocks, want.blocks)
			case name == "a-default-debian": // nothing to be seen
			case !some && found < len(must) || found < least:
				t.Errorf("%s, %s: %d of %d attackers are found:\n\t%s", name, f.name, found, len(must), strings.Join(got.verdict, "\n\t"))
			case some && least == 0 && len(got.blocks) > 0:
				t.Errorf("%s, %s: blocks out of nothing: %v", name, f.name, got.blocks)
			}
		}
	})
	t.Log("\n" + table.String())
}

// sameBlocks checks that the prefixes are the same, and the times within 2 s.
func sameBlocks(t *testing.T, what string, got, want []block) {
	t.Helper()
	at := func(l []block, p netip.Prefix) (time.Time, bool) {
		i := slices.IndexFunc(l, func(b block) bool { return b.prefix == p })
		if i < 0 {
			return time.Time{}, false
		}
		return l[i].at, true
	}
	for _, b := range want {
		if g, ok := at(got, b.prefix); !ok {
			t.Errorf("%s: %s is not blocked: %v", what, b.prefix, got)
		} else if g.Sub(b.at).Abs() > 2*time.Second {
			t.Errorf("%s: %s is blocked %v later", what, b.prefix, g.Sub(b.at))
		}
	}
	for _, b := range got {
		if _, ok := at(want, b.prefix); !ok {
			t.Errorf("%s: %s is blocked, and was not", what, b.prefix)
		}
	}
}
