package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/tail"
)

// eximIdentifiers are the names that Exim has in syslog and the journal:
// syslog_processname is "exim" by default, the journal may know the program by
// its own name, which is exim4 in Debian.
var eximIdentifiers = []string{"exim", "exim4"}

// syslogFiles are where syslog daemons write mail's messages, by their own
// defaults: Debian, Red Hat, and all of them in one file.
var syslogFiles = []string{"/var/log/mail.log", "/var/log/maillog", "/var/log/mail.info", "/var/log/mail", "/var/log/syslog", "/var/log/messages"}

// journalSocket is there where journald takes messages.
const journalSocket = "/run/systemd/journal/socket"

// findLogs resolves "auto", and refuses logs that cannot be followed.
func findLogs(p *policy.Policy, mta exim.Config, mtaErr error) ([]string, error) {
	var logs []string
	for _, l := range p.Logs {
		if l == policy.Auto {
			var err error
			if l, err = findLog(mta, mtaErr); err != nil {
				return nil, err
			}
		}
		if err := checkLog(l); err != nil {
			return nil, err
		}
		logs = append(logs, l)
	}
	logs, _ = onceEach(logs)
	slices.Sort(logs)
	return logs, nil
}

// onceEach leaves out the logs that are another one of the list under a
// second name (a link, another spelling, the file of today of a log with the
// date in its name), so that no line counts twice. twice has those, each with
// the name that stays. Files that a pattern matches beside are the guard's
// to tell apart.
func onceEach(logs []string) (once []string, twice map[string]string) {
	twice = make(map[string]string)
	first := make(map[string]string) // by cleaned name
	for _, l := range logs {
		if k := tail.KindOf(l); k == tail.Dated { // one that lasts goes before the file of a day
			first[filepath.Clean(l)] = l
		}
	}
	for _, l := range logs {
		kind, clean := tail.KindOf(l), filepath.Clean(l)
		by, ok := first[clean]
		ok = ok && by != l || slices.Contains(once, l)
		for _, other := range logs {
			if ok || kind != tail.File || other == l {
				continue
			}
			switch tail.KindOf(other) {
			case tail.Dated:
				by, ok = other, slices.ContainsFunc(tail.Find(other), func(f string) bool { return sameFile(f, l) })
			case tail.File:
				by, ok = other, slices.Contains(once, other) && sameFile(other, l)
			}
		}
		if ok {
			twice[l] = cmp.Or(by, l)
			continue
		}
		if _, ok := first[clean]; !ok {
			first[clean] = l
		}
		once = append(once, l)
	}
	return once, twice
}

// findLog is the log that Exim writes, else the first of the usual places that
// exists.
func findLog(mta exim.Config, mtaErr error) (string, error) {
	switch {
	case mtaErr == nil && mta.MainLog != "":
		if tail.KindOf(mta.MainLog) == tail.Pattern { // its name has such characters
			return strings.NewReplacer(`*`, `\*`, `?`, `\?`, `[`, `\[`, `\`, `\\`).Replace(mta.MainLog), nil
		}
		return mta.MainLog, nil
	case mtaErr == nil && mta.Syslog:
		if found := findSyslog(syslogFiles, journalSocket); found != "" {
			return found, nil
		}
		return "", withHint(errors.New("the log goes to syslog, and neither a file with lines of Exim nor the journal was found"),
			fmt.Sprintf("name it: `logs: [/path/to/file]` in the policy, or --log; looked at the ends of %v", syslogFiles))
	}
	for _, cand := range policy.LogCandidates {
		if _, err := os.Stat(cand); err == nil {
			return cand, nil
		}
	}
	return "", withHint(errors.New("no Exim main log was found"),
		fmt.Sprintf("name it: `logs: [/path/to/mainlog]` in the policy, or --log; looked for what `exim -bP log_file_path` says, and %v", policy.LogCandidates))
}

// findSyslog is the first of the files with a line of Exim's near its end,
// else the journal if journald runs. Files go first: journald drops messages
// that come too fast (RateLimitBurst=), and passes them on to the syslog
// daemon before that.
func findSyslog(files []string, socket string) string {
	for _, name := range files {
		if hasExim(name) {
			return name
		}
	}
	if _, err := os.Stat(socket); err == nil {
		if _, err := exec.LookPath("journalctl"); err == nil {
			return tail.JournalName
		}
	}
	return ""
}

var eximTag = regexp.MustCompile(`(?m)^\S.{5,300}? exim4?(\[\d+\])?: `)

// hasExim reports whether there is a line of Exim's in the last MiB of a file.
func hasExim(name string) bool {
	f, err := os.Open(name)
	if err != nil {
		return false
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return false
	}
	const most = 1 << 20
	b, err := io.ReadAll(io.NewSectionReader(f, max(0, fi.Size()-most), most))
	return err == nil && eximTag.Match(b)
}

// checkLog refuses what cannot be followed. What is not there yet may come.
func checkLog(l string) error {
	switch tail.KindOf(l) {
	case tail.Input:
		return nil
	case tail.Journal:
		if _, err := exec.LookPath("journalctl"); err != nil {
			return withHint(fmt.Errorf("the journal cannot be followed: %w", err), "name the file that Exim or the syslog daemon writes: `logs: [/var/log/mail.log]`")
		}
		return nil
	}
	for _, name := range tail.Find(l) {
		if err := checkFile(name, tail.KindOf(l) == tail.File); err != nil {
			return err
		}
	}
	return nil
}

// checkFile refuses a file that cannot be read; only: a wildcard may match what
// is no file, and that is left aside.
func checkFile(l string, only bool) error {
	fi, err := os.Stat(l)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil // it may be made later; following waits for it
	case err == nil && !fi.Mode().IsRegular() && !only:
		return nil
	case err == nil && fi.IsDir():
		return withHint(fmt.Errorf("the log %s is a directory", l), "name the main log in it, or all logs: "+filepath.Join(l, "*"))
	case err == nil && !fi.Mode().IsRegular():
		return withHint(fmt.Errorf("the log %s is not a file", l), "let Exim write to a file (log_file_path); `--log -` reads standard input")
	}
	if err == nil {
		var f *os.File
		if f, err = os.Open(l); err == nil {
			_ = f.Close()
		}
	}
	if err != nil {
		return withHint(fmt.Errorf("the log cannot be read: %w", err), "run as root, or as a user in the log's group (adm, mail or Debian-exim)")
	}
	return nil
}

// isLogOf reports whether this machine's Exim writes the log. Of standard
// input nobody knows.
func isLogOf(l string, mta exim.Config) bool {
	switch tail.KindOf(l) {
	case tail.Journal:
		return mta.Syslog
	case tail.Pattern:
		ok, _ := filepath.Match(l, mta.MainLog)
		return ok
	case tail.Dated:
		return filepath.Clean(l) == mta.MainLog
	case tail.File:
		return sameFile(l, mta.MainLog) || mta.Syslog && slices.Contains(syslogFiles, l)
	}
	return false
}

// isOldLogOf reports whether l is, or by its name was, a log of this machine's
// Exim.
func isOldLogOf(l string, mta exim.Config) bool {
	if isLogOf(l, mta) {
		return true
	}
	abs, err := filepath.Abs(l)
	return err == nil && mta.MainLog != "" && filepath.Dir(abs) == filepath.Dir(mta.MainLog) && strings.HasPrefix(filepath.Base(abs), filepath.Base(mta.MainLog))
}

func sameFile(a, b string) bool {
	if filepath.Clean(a) == filepath.Clean(b) {
		return true
	}
	fa, errA := os.Stat(a)
	fb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(fa, fb)
}

// filesSince are the files of a log, rotated ones too, that may hold lines from
// a time on, oldest first. The journal and standard input have none.
func filesSince(log string, from time.Time) []string {
	type file struct {
		name string
		mod  time.Time
	}
	var files []file
	seen := map[string]bool{}
	for _, base := range tail.Find(log) {
		names := []string{base}
		if tail.KindOf(log) != tail.Dated {
			names = generations(base, from)
		}
		for _, name := range names {
			fi, err := os.Stat(name)
			if err == nil && fi.Mode().IsRegular() && !fi.ModTime().Before(from) && !seen[name] {
				seen[name] = true
				files = append(files, file{name, fi.ModTime()})
			}
		}
	}
	slices.SortStableFunc(files, func(a, b file) int { return a.mod.Compare(b.mod) })
	names := make([]string, len(files))
	for i, f := range files {
		names[i] = f.name
	}
	return names
}

// scanJournal hands out the events of the journal between two times, and
// returns the time of its first line.
func scanJournal(ctx context.Context, p *exim.Parser, from, to time.Time, fn func(*detector.Event, []byte) error) (first time.Time, err error) {
	err = tail.ReadJournal(ctx, from, to, tail.JournalOptions{Identifiers: eximIdentifiers}, func(b tail.Batch) error {
		for _, l := range b.Lines {
			reach, err := scanLog(ctx, bytes.NewReader(l.Text), p, from, to, fn)
			if first = cmp.Or(first, reach); err != nil {
				return err
			}
		}
		return nil
	})
	return first, err
}
