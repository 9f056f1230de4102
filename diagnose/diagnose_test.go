package diagnose

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

func newDiagnosis(t testing.TB, capacity int) *Diagnosis {
	t.Helper()
	det, err := detector.New(detector.Config{Rules: detector.DefaultRules(), Capacity: capacity})
	if err != nil {
		t.Fatal(err)
	}
	return New(Options{Detector: det, Zone: time.UTC})
}

// diagnosed reads files below testdata.
func diagnosed(t *testing.T, capacity int, files ...string) Report {
	t.Helper()
	d := newDiagnosis(t, capacity)
	for _, name := range files {
		b, err := os.ReadFile(filepath.Join("../testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		if err := d.Read(t.Context(), bytes.NewReader(b), time.Date(2026, 11, 22, 20, 0, 0, 0, time.UTC)); err != nil {
			t.Fatal(err)
		}
	}
	return d.Report()
}

// summary is a report as one line: "kind confidence times/explained; ...".
func summary(r Report) string {
	var s []string
	for _, f := range r.Findings {
		s = append(s, fmt.Sprintf("%s %s %d/%d", f.Kind, f.Confidence, f.Times, f.Explains))
	}
	return strings.Join(s, "; ")
}

func TestKinds(t *testing.T) {
	d := func(names ...string) []string {
		for i := range names {
			names[i] = "diagnose/" + names[i]
		}
		return names
	}
	for _, c := range []struct {
		files    []string
		capacity int
		want     string
	}{
		{d("healthy.log"), 100, ""},
		{d("healthy.log", "healthy.chkservd.log"), 100, ""},
		{d("hostile.log"), 100, ""},
		{d("login.log"), 100, "check-login-broken certain 20/0"},
		{d("login.log", "login.chkservd.log"), 100, "check-login-broken certain 20/20"},
		{d("login.chkservd.log"), 0, "check-login-broken certain 20/20"},
		{d("login.log", "old.mbox"), 100, "check-login-broken certain 20/1"},
		{d("old.mbox"), 0, "check-login-broken likely 1/1"},
		{d("new.mbox"), 0, "slots-full-unknown-holders likely 1/1"},
		{d("flood.chkservd.log"), 0, "slots-full-unknown-holders likely 1/1"},
		{d("down.chkservd.log"), 0, "daemon-down certain 3/3"},
		{d("load.log"), 100, "load certain 60/0; mail-only-queued certain 12/0"},
		{d("disk.log"), 100, "disk certain 10/0"},
		{d("port.log"), 100, "port-taken certain 10/0"},
		{d("restarts.log"), 100, "restarts possible 8/0"},
		// Two at once: what explains the mails comes first.
		{append(d("login.log", "login.chkservd.log"), "corpus/h-one-ip-hold.log"), 0,
			"check-login-broken certain 20/20; slots-full-few-sources certain 1/0"},
		{append(d("flood.chkservd.log", "new.mbox"), "corpus/h-one-ip-hold.log"), 0, "slots-full-few-sources certain 1/2"},
		// The checks of another day are not explained by this flood.
		{append(d("down.chkservd.log"), "corpus/h-one-ip-hold.log"), 0, "daemon-down certain 3/3; slots-full-few-sources certain 1/0"},

		{[]string{"corpus/a-default-debian.log"}, 0, "slots-full-unknown-holders certain 1/0"},
		{[]string{"corpus/b-all.log"}, 0, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/c-cpanel.log"}, 0, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/d-pid-millisec.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/e-timezone.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/f-syslog.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/g1-ipv6-one-64.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/i-slash24-botnet.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/m2-reserve-only.log"}, 100, "slots-full-few-sources certain 1/0"},
		{[]string{"corpus/j-rapid-churn.log"}, 100, "storm certain 16/0"},
		{[]string{"corpus/k-legit-busy.log"}, 100, "slots-nearly-full likely 1/0"},
		{[]string{"corpus/k-legit-busy.log"}, 200, ""},
		{[]string{"corpus/l-injection.log"}, 100, ""},
	} {
		if got := summary(diagnosed(t, c.capacity, c.files...)); got != c.want {
			t.Errorf("%v of %d slots:\n got %q\nwant %q", c.files, c.capacity, got, c.want)
		}
	}
}

// TestFloodSources: the sources that are named are those that did it.
func TestFloodSources(t *testing.T) {
	for file, want := range map[string]string{
		"b-all":            "10.66.1.0/24 10.66.2.7/32 fd00:0:0:1::/64",
		"h-one-ip-hold":    "10.66.9.9/32",
		"g1-ipv6-one-64":   "fd00:0:0:1::/64",
		"i-slash24-botnet": "10.66.20.0/24",
	} {
		r := diagnosed(t, 0, "corpus/"+file+".log")
		var named []string
		for _, s := range r.Findings[0].Sources {
			if s.Why != "" {
				named = append(named, s.Prefix.String())
			}
		}
		if got := strings.Join(named, " "); got != want {
			t.Errorf("%s: named %s, want %s", file, got, want)
		}
	}
}

// fewerSlots rewrites a log as an Exim with fewer slots would have written it:
// who comes when all are taken is refused, and has no other line.
func fewerSlots(log []byte, slots int) []byte {
	opened := regexp.MustCompile(`^(\S+ \S+) SMTP connection from (\[\S+\]:\d+) \(TCP/IP connection count = \d+\)$`)
	peer := regexp.MustCompile(`\[[0-9a-f.:]+\]:\d+`)
	closed := regexp.MustCompile(`^\S+ \S+ SMTP connection from .*(\[[0-9a-f.:]+\]:\d+) (closed by|lost)`)
	held, gone := make(map[string]bool), make(map[string]bool)
	var out bytes.Buffer
	for line := range bytes.SplitSeq(bytes.TrimSpace(log), []byte("\n")) {
		if g := opened.FindSubmatch(line); g != nil {
			if len(held) >= slots {
				gone[string(g[2])] = true
				fmt.Fprintf(&out, "%s Connection from %s refused: too many connections\n", g[1], g[2])
				continue
			}
			held[string(g[2])] = true
			delete(gone, string(g[2]))
			fmt.Fprintf(&out, "%s SMTP connection from %s (TCP/IP connection count = %d)\n", g[1], g[2], len(held))
			continue
		}
		if p := peer.Find(line); p != nil && gone[string(p)] {
			continue
		}
		if g := closed.FindSubmatch(line); g != nil {
			delete(held, string(g[1]))
		}
		out.Write(append(line, '\n'))
	}
	return out.Bytes()
}

// TestProperSenders: a busy hour of proper mail, for which 97 slots sufficed,
// on servers with fewer. The answer is the number that would have sufficed,
// and nobody is blamed.
func TestProperSenders(t *testing.T) {
	log, err := os.ReadFile("../testdata/corpus/k-legit-busy.log")
	if err != nil {
		t.Fatal(err)
	}
	const truth = 97
	for _, slots := range []int{40, 60, 75, 90} {
		for _, capacity := range []int{0, slots} {
			d := newDiagnosis(t, capacity)
			if err := d.Read(t.Context(), bytes.NewReader(fewerSlots(log, slots)), time.Now()); err != nil {
				t.Fatal(err)
			}
			r := d.Report()
			if len(r.Findings) != 1 || r.Findings[0].Kind != FullMany {
				t.Errorf("%d slots, %d known: %s", slots, capacity, summary(r))
				continue
			}
			f := r.Findings[0]
			if f.AcceptMax < truth*85/100 || f.AcceptMax > truth*125/100 {
				t.Errorf("%d slots: %d would have sufficed, it says; it were %d", slots, f.AcceptMax, truth)
			}
			t.Logf("%d slots: %s", slots, f.Title)
		}
	}
}

// TestStrangersWords: what strangers get written into a log makes it no mail.
func TestStrangersWords(t *testing.T) {
	for name, line := range map[string]string{
		"recipient": `2026-11-22 09:59:59 H=(evil) [203.0.113.5]:3333 F=<x@evil.example> rejected RCPT <"appears to be down"@example.com>: Unrouteable address`,
		"syslog":    `Nov 22 09:59:59 mx exim[77]: 2026-11-22 09:59:59 1vM001-000000001yZ-0abc <= a@b.example T="your invoice appears to be down"`,
	} {
		if got := sniff([]byte(line + "\n")); got != isLog {
			t.Errorf("%s: %d", name, got)
		}
	}
	if got := sniff([]byte("The service exim appears to be down.\n")); got != isMail {
		t.Errorf("a pasted notice: %d", got)
	}
}

// TestProviderHangs: where everybody's connections hang, a network that sends
// mail is not named as a whole, and nobody is for certain.
func TestProviderHangs(t *testing.T) {
	at := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	var b strings.Builder
	say := func(format string, args ...any) {
		fmt.Fprintf(&b, at.Format(time.DateTime)+" "+format+"\n", args...)
		at = at.Add(time.Second)
	}
	for i := range 300 {
		from := fmt.Sprintf("[209.85.220.%d]:%d", 1+i%20, 10000+i)
		say("SMTP connection from %s (TCP/IP connection count = 1)", from)
		say("1vM%03d-000000001yZ-0abc <= x@good.example H=mail.good.example %s P=esmtps S=9000", i, from)
		say("SMTP connection from mail.good.example %s closed by QUIT", from)
	}
	for i := range 40 {
		from := fmt.Sprintf("[209.85.220.%d]:%d", 101+i, 20000+i)
		if i >= 12 {
			from = fmt.Sprintf("[198.51.%d.7]:%d", i, 20000+i)
		}
		say("SMTP connection from %s (TCP/IP connection count = %d)", from, 1+i)
	}
	for i := range 100 {
		say("Connection from [192.0.%d.7]:%d refused: too many connections", i, 30000+i)
	}
	d := newDiagnosis(t, 40)
	if err := d.Read(t.Context(), strings.NewReader(b.String()), at); err != nil {
		t.Fatal(err)
	}
	for _, f := range d.Report().Findings {
		if f.Kind == FullFew && f.Confidence == Certain || strings.Contains(strings.Join(f.Do, " "), "209.85.220.0/24") {
			t.Errorf("%s, %s: %q", f.Title, f.Confidence, f.Do)
		}
	}
}

// TestOneRefused: one client that is refused again and again does not make
// thousands of slots needed.
func TestOneRefused(t *testing.T) {
	at := time.Date(2026, 11, 22, 8, 0, 0, 0, time.UTC)
	var b strings.Builder
	for i := range 40 {
		from := fmt.Sprintf("[198.51.%d.7]:%d", i, 10000+i)
		fmt.Fprintf(&b, "%s SMTP connection from %s (TCP/IP connection count = %d)\n", at.Format(time.DateTime), from, 1+i)
		fmt.Fprintf(&b, "%s 1vM%03d-000000001yZ-0abc <= x@g%d.example H=mail %s P=esmtps S=9000\n", at.Format(time.DateTime), i, i, from)
	}
	for i := range 6000 {
		fmt.Fprintf(&b, "%s Connection from [203.0.113.66]:%d refused: too many connections\n", at.Add(time.Duration(i)*20*time.Millisecond).Format(time.DateTime), 10000+i)
	}
	d := newDiagnosis(t, 40)
	if err := d.Read(t.Context(), strings.NewReader(b.String()), at); err != nil {
		t.Fatal(err)
	}
	r := d.Report()
	if len(r.Findings) == 0 || r.Findings[0].AcceptMax > 40+maxGhosts {
		t.Errorf("%s: %+v", summary(r), r.Findings)
	}
}

// TestShortFlood: a flood that was ended within a second, too short for
// the rules on a log with times of whole seconds; and the same by senders whose
// mail was accepted before.
func TestShortFlood(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		known bool
		addr  func(i int) string
		want  string
	}{
		{false, func(int) string { return "198.51.100.7" }, "slots-full-few-sources likely 1/0 198.51.100.7/32"},
		{false, func(i int) string { return fmt.Sprintf("198.51.100.%d", 1+i%20) }, "slots-full-few-sources likely 1/0 198.51.100.0/24"},
		{true, func(i int) string { return fmt.Sprintf("198.51.100.%d", 1+i%20) }, "slots-full-proper-senders certain 1/0"},
		{false, func(i int) string { return fmt.Sprintf("198.51.%d.7", i%50) }, "slots-full-many-strangers likely 1/0"},
	} {
		var b bytes.Buffer
		say := func(sec int, format string, args ...any) {
			fmt.Fprintf(&b, at.Add(time.Duration(sec)*time.Second).Format(time.DateTime)+" "+format+"\n", args...)
		}
		if c.known {
			for i := range 20 {
				say(i-600, "1xVDR5-0003Hr-1R <= a@b.example H=x.example [%s]:%d P=esmtp S=311", c.addr(i), 900+i)
			}
		}
		for i := range 50 {
			say(0, "SMTP connection from [%s]:%d (TCP/IP connection count = %d)", c.addr(i), 2000+i, i+1)
		}
		for sec := range 2 {
			say(sec, "Connection from [192.0.2.%d]:3000 refused: too many connections", sec)
		}
		d := newDiagnosis(t, 50)
		if err := d.Read(t.Context(), &b, at); err != nil {
			t.Fatal(err)
		}
		r := d.Report()
		got := summary(r)
		if len(r.Findings) > 0 && len(r.Findings[0].Sources) > 0 && r.Findings[0].Sources[0].Why != "" {
			got += " " + r.Findings[0].Sources[0].Prefix.String()
		}
		if got != c.want {
			t.Errorf("got %q, want %q", got, c.want)
		}
	}
}

func TestWindow(t *testing.T) {
	b, err := os.ReadFile("../testdata/corpus/h-one-ip-hold.log")
	if err != nil {
		t.Fatal(err)
	}
	at := func(s string) time.Time {
		v, err := time.Parse(time.DateTime, "2026-11-22 "+s)
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
	for _, c := range []struct {
		since, until time.Time
		want         string
	}{
		{at("19:43:50"), at("19:44:00"), ""},
		{at("19:44:20"), at("19:44:40"), "slots-full-few-sources certain 1/0"}, // the holders came before
		{at("20:00:00"), time.Time{}, ""},
	} {
		d := newDiagnosis(t, 100)
		d.o.Since, d.o.Until = c.since, c.until
		if err := d.Read(t.Context(), bytes.NewReader(b), at("20:00:00")); err != nil {
			t.Fatal(err)
		}
		if got := summary(d.Report()); got != c.want {
			t.Errorf("%s to %s: %q, want %q", c.since, c.until, got, c.want)
		}
	}
}

// TestShown: what strangers write is shown escaped and bounded.
func TestShown(t *testing.T) {
	for in, want := range map[string]string{
		"a\x1b[2Kb\rc\xffd\u202ee\tf": `a\x1b[2Kb\rc\xffd\u202ee f`,
		strings.Repeat("x", 300):      strings.Repeat("x", maxShown) + "...",
		"“exim” ok":                   "“exim” ok",
	} {
		if got := show([]byte(in)); got != want {
			t.Errorf("show(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestText(t *testing.T) {
	for _, line := range []string{
		"2026-11-22 19:45:50 Abandon queue run",
		"2026-11-22 19:45:50.963 Abandon queue run",
		"2026-11-22 20:48:43 +0100 Abandon queue run",
		"2026-11-22 16:18:44.613 -0330 [3915] Abandon queue run",
		"2026-11-22 19:45:50 [3915] 1xVDR5-0003Hr-1R Abandon queue run",
		"2026-11-22 19:45:50 1xVDR5-0000000003H-1Rab Abandon queue run",
		"Nov 22 19:45:50 mx exim[3915]: 2026-11-22 19:45:50 Abandon queue run",
		"2026-11-22T19:45:50.123+00:00 mx exim4[3915]: Abandon queue run",
	} {
		if got := string(text([]byte(line))); got != "Abandon queue run" {
			t.Errorf("%q: %q", line, got)
		}
	}
}

// TestMemory: what a stranger writes does not grow what is kept: a long
// attack from ever new addresses, with pauses.
func TestMemory(t *testing.T) {
	d := newDiagnosis(t, 100)
	var b bytes.Buffer
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range 3000 {
		at = at.Add(11 * time.Minute)
		for j := range 5 {
			fmt.Fprintf(&b, "%s Connection from [203.0.%d.%d]:%d refused: too many connections\n", at.Format(time.DateTime), i%256, j, i)
		}
		fmt.Fprintf(&b, "%s exim 4.96 daemon started: pid=%d, no queue runs, listening for SMTP on port 25 (IPv6 and IPv4)\n", at.Format(time.DateTime), i+1)
	}
	if err := d.Read(t.Context(), &b, at); err != nil {
		t.Fatal(err)
	}
	r := d.Report()
	if len(d.slots.past) != maxEpisodes || d.slots.more == 0 || len(r.Findings) != 1 || len(r.Findings[0].Spans) > maxSpans || len(r.Findings[0].Lines) > maxLines {
		t.Errorf("%d episodes, %d more, %s", len(d.slots.past), d.slots.more, summary(r))
	}
}

// FuzzRead: any bytes are read to their end and give a report that is bounded
// and can be printed.
func FuzzRead(f *testing.F) {
	files, err := filepath.Glob("../testdata/diagnose/*")
	if err != nil || len(files) == 0 {
		f.Fatal("no seeds: ", err)
	}
	for _, name := range append(files, "../testdata/corpus/l-injection.log") {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:min(len(b), 20<<10)])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		det, err := detector.New(detector.Config{Rules: detector.DefaultRules(), Memory: 4 << 20})
		if err != nil {
			t.Fatal(err)
		}
		d := New(Options{Detector: det, Zone: time.UTC})
		if err := d.Read(t.Context(), bytes.NewReader(data), time.Unix(1795376711, 0)); err != nil {
			t.Fatal(err)
		}
		for _, fi := range d.Report().Findings {
			if fi.Title == "" || len(fi.Do) == 0 || len(fi.Lines) > maxLines {
				t.Errorf("%+v", fi)
			}
			for _, s := range append(append([]string{fi.Title}, fi.Why...), fi.Lines...) {
				if strings.ContainsAny(s, "\x1b\r\n\x00") || len(s) > 8*maxShown {
					t.Errorf("not fit to be printed: %q", s)
				}
			}
		}
	})
}

func BenchmarkRead(b *testing.B) {
	log, err := os.ReadFile("../testdata/corpus/k-legit-busy.log")
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		d := newDiagnosis(b, 100)
		if err := d.Read(b.Context(), bytes.NewReader(log), time.Now()); err != nil {
			b.Fatal(err)
		}
	}
}

// TestAnyOrderOfChecks: the monitor's files may come before or after the log.
func TestAnyOrderOfChecks(t *testing.T) {
	files := []string{"diagnose/login.log", "diagnose/login.chkservd.log", "diagnose/old.mbox"}
	want := summary(diagnosed(t, 100, files...))
	for range 5 {
		rand.Shuffle(len(files), func(i, j int) { files[i], files[j] = files[j], files[i] })
		if got := summary(diagnosed(t, 100, files...)); got != want {
			t.Errorf("%v: %q, want %q", files, got, want)
		}
	}
}

// TestExplain: a failed check belongs to a finding that is near in time and
// fits what the check was answered.
func TestExplain(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		check check
		want  int
	}{
		{check{at: at.Add(5 * time.Minute), why: checkFull}, 1},
		{check{at: at.Add(-5 * time.Minute), why: checkSilent}, 1},
		{check{at: at.Add(5 * time.Minute)}, 1}, // a mail without a transcript
		{check{why: checkFull}, 1},              // without a time
		{check{at: at.Add(20 * time.Minute), why: checkFull}, 0},
		{check{at: at, why: checkLogin}, 0},
	} {
		found := []Finding{{Kind: FullFew, weight: 100, reasons: []reason{checkFull, checkSilent}, all: []Span{{at, at}}}}
		if rest := explain(found, []check{c.check}); found[0].Explains != c.want || len(rest) != 1-c.want {
			t.Errorf("%+v: explained %d times, %d left", c.check, found[0].Explains, len(rest))
		}
	}
}

// TestReloads: reading the configuration again is no restart.
func TestReloads(t *testing.T) {
	var b bytes.Buffer
	for i := range 20 {
		fmt.Fprintf(&b, "2026-11-22 10:%02d:00 pid 812: SIGHUP received: re-exec daemon\n", i)
	}
	d := newDiagnosis(t, 100)
	if err := d.Read(t.Context(), &b, time.Now()); err != nil {
		t.Fatal(err)
	}
	if r := d.Report(); len(r.Findings) != 0 || r.Starts != 20 {
		t.Errorf("%d starts: %s", r.Starts, summary(r))
	}
}

// TestLines: whatever is found shows lines of the files that it is read from.
func TestLines(t *testing.T) {
	for _, c := range []struct {
		files    []string
		capacity int
	}{
		{[]string{"diagnose/login.log", "diagnose/login.chkservd.log"}, 100}, {[]string{"diagnose/old.mbox"}, 0},
		{[]string{"diagnose/new.mbox"}, 0}, {[]string{"diagnose/flood.chkservd.log"}, 0}, {[]string{"diagnose/down.chkservd.log"}, 0},
		{[]string{"diagnose/load.log"}, 100}, {[]string{"diagnose/disk.log"}, 100}, {[]string{"diagnose/port.log"}, 100},
		{[]string{"diagnose/restarts.log"}, 100}, {[]string{"corpus/a-default-debian.log"}, 0}, {[]string{"corpus/h-one-ip-hold.log"}, 0},
		{[]string{"corpus/j-rapid-churn.log"}, 100}, {[]string{"corpus/k-legit-busy.log"}, 100},
	} {
		r := diagnosed(t, c.capacity, c.files...)
		if len(r.Findings) == 0 {
			t.Errorf("%v: nothing is found", c.files)
		}
		for _, f := range r.Findings {
			if len(f.Lines) == 0 || len(f.Lines) > maxLines {
				t.Errorf("%v: %s shows %d lines", c.files, f.Kind, len(f.Lines))
			}
		}
	}
	for _, line := range diagnosed(t, 100, "diagnose/restarts.log").Findings[0].Lines {
		if !strings.Contains(line, "daemon started") {
			t.Errorf("of restarts it shows %q", line)
		}
	}
}

// TestStuckScanner: where everybody's connections hang, no host of a provider
// is named that sends here for the first time.
func TestStuckScanner(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	var b strings.Builder
	say := func(sec int, format string, args ...any) {
		fmt.Fprintf(&b, at.Add(time.Duration(sec)*time.Second).Format(time.DateTime)+" "+format+"\n", args...)
	}
	host := func(i int) string { // 30 hosts of each of three
		return fmt.Sprintf("%s.%d", []string{"198.51.100", "203.0.113", "192.0.2"}[i%3], 1+i/3)
	}
	for i := 0; i < 90; i += 4 { // some have sent before
		say(i-600, "1xVDR5-0003Hr-1R <= a@b.example H=x.example [%s]:%d P=esmtps S=311", host(i), 900+i)
	}
	n := 0
	for i := range 90 {
		for range 1 + i/3%2 {
			n++
			say(n/15, "SMTP connection from [%s]:%d (TCP/IP connection count = %d)", host(i), 2000+n, n)
		}
	}
	for sec := 10; sec < 120; sec++ {
		say(sec, "Connection from [192.0.2.%d]:3000 refused: too many connections", 100+sec)
	}
	d := newDiagnosis(t, n)
	if err := d.Read(t.Context(), strings.NewReader(b.String()), at); err != nil {
		t.Fatal(err)
	}
	r := d.Report()
	if len(r.Findings) == 0 {
		t.Fatal("nothing was found")
	}
	for _, s := range r.Findings[0].Sources {
		if s.Why != "" {
			t.Errorf("%s: %s is named: %s", summary(r), s.Prefix, s.Why)
		}
	}
}

// flooded is a log of one sender that takes all of 100 slots, after sent
// messages of it.
func flooded(t *testing.T, ip string, sent int) Finding {
	t.Helper()
	at := time.Date(2026, 11, 22, 3, 0, 0, 0, time.UTC)
	var b strings.Builder
	line := func(when time.Time, format string, args ...any) {
		fmt.Fprintf(&b, when.Format(time.DateTime)+" "+format+"\n", args...)
	}
	for i := range sent {
		when := at.Add(-time.Hour + time.Duration(i)*5*time.Second)
		line(when, "SMTP connection from [%s]:%d (TCP/IP connection count = 1)", ip, 1000+i)
		line(when, "1vM%03d-000000001yZ-0abc <= x@good.example H=mail.good.example [%s]:%d P=esmtps S=9000", i, ip, 1000+i)
		line(when, "SMTP connection from mail.good.example [%s]:%d closed by QUIT", ip, 1000+i)
	}
	for i := range 100 {
		line(at.Add(time.Duration(50*i)*time.Millisecond), "SMTP connection from [%s]:%d (TCP/IP connection count = %d)", ip, 20000+i, i+1)
	}
	for i := range 300 {
		line(at.Add(6*time.Second+time.Duration(200*i)*time.Millisecond), "Connection from [209.85.1.%d]:%d refused: too many connections", i%50, 30000+i)
	}
	d := newDiagnosis(t, 100)
	d.o.Guarding = Guarding{Mode: "enforce"}
	if err := d.Read(t.Context(), strings.NewReader(b.String()), at); err != nil {
		t.Fatal(err)
	}
	f := d.Report().Findings
	if len(f) == 0 || f[0].Kind != FullFew {
		t.Fatalf("%+v", f)
	}
	return f[0]
}

// TestFloodOfWhom: nobody is told to block his own machine, or, without a word,
// somebody who sends mail.
func TestFloodOfWhom(t *testing.T) {
	for _, c := range []struct {
		ip         string
		sent       int
		confidence Confidence
		title      string
		has, lacks []string
	}{
		{"10.66.9.9", 0, Certain, "A flood: ", []string{"smtpguard block 10.66.9.9"}, []string{"accepted", "a partner"}},
		{"10.66.9.9", 400, Likely, "A flood: ", []string{"400 messages were accepted from 10.66.9.9", "Look first who sends mail from there"}, nil},
		{"127.0.0.1", 0, Certain, "The slots were full, and this machine itself (127.0.0.1) held ", []string{"ss -tnp 'dport = :25'"}, []string{"smtpguard block "}},
		{"::1", 5, Certain, "The slots were full, and this machine itself (::1) held ", []string{"ss -tnp"}, []string{"smtpguard block ", "a partner"}},
	} {
		f := flooded(t, c.ip, c.sent)
		all := strings.Join(append(f.Why, f.Do...), "\n")
		if f.Confidence != c.confidence || !strings.HasPrefix(f.Title, c.title) {
			t.Errorf("%s, %d messages: %s, %s", c.ip, c.sent, f.Title, f.Confidence)
		}
		for _, s := range c.has {
			if !strings.Contains(all, s) {
				t.Errorf("%s, %d messages: want %q in\n%s", c.ip, c.sent, s, all)
			}
		}
		for _, s := range c.lacks {
			if strings.Contains(all, s) {
				t.Errorf("%s, %d messages: %q is in\n%s", c.ip, c.sent, s, all)
			}
		}
	}
}
