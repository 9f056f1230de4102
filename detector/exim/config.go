package exim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Config is what Exim's configuration says about slots and logs. It is that
// of the file as it is now: command line overrides (-oX, -os), and a daemon
// that was started with an older file, are not seen.
type Config struct {
	// Path is the program that was asked; empty after ParseConfig.
	Path string

	// AcceptMax is smtp_accept_max, the number of slots; 0: no limit, and
	// then every open line says count = 1. AcceptMaxSet: Exim has told it.
	AcceptMax    int
	AcceptMaxSet bool
	// AcceptMaxPerHost is smtp_accept_max_per_host: a number or an expansion
	// string; empty: no limit.
	AcceptMaxPerHost string
	// ReceiveTimeout is smtp_receive_timeout, how long a silent peer keeps
	// its slot; 0 if not told, or if it is an expansion string.
	ReceiveTimeout time.Duration

	// LogSelector is the text of log_selector. SmtpConnection and
	// IncomingPort say whether these two are on after all of it; both are
	// off by default.
	LogSelector    string
	SmtpConnection bool
	IncomingPort   bool

	// LogFilePath is the text of log_file_path.
	LogFilePath string
	// MainLog is the path of the main log that follows from it; empty if
	// there is none, or none that can be known. It may hold %D or %M, for
	// the date of each file.
	MainLog string
	// Syslog: the log goes to syslog, instead or as well.
	Syslog bool
	// SyslogTimestamp: lines have Exim's own timestamp there too (default).
	SyslogTimestamp bool

	// Timezone is the zone of timestamps, as TZ has it; empty: the system's.
	Timezone string
	// LogTimezone: timestamps have their offset.
	LogTimezone bool
}

// options are what ReadConfig asks for.
var options = []string{
	"smtp_accept_max", "smtp_receive_timeout", "log_selector", "spool_directory", "log_file_path", "log_timezone",
	"timezone", "syslog_timestamp", "smtp_accept_max_per_host",
}

var (
	// ErrNoExim means that no Exim program was found on this machine.
	ErrNoExim = errors.New("no exim4 or exim in PATH or /usr/sbin")
	// ErrSlow means that Exim did not answer in time. It looks up this
	// machine's own name when it starts, unless primary_hostname is set.
	ErrSlow = errors.New("no answer from Exim")
	// ErrNotConfig means that a text has none of the options in it.
	ErrNotConfig = errors.New("not the output of exim -bP")
)

const (
	configTimeout = 10 * time.Second
	configMax     = 64 << 10 // bytes that exim -bP may print; it prints about 500
)

// ParseConfig reads the output of
//
//	exim -bP smtp_accept_max smtp_receive_timeout log_selector log_file_path log_timezone timezone syslog_timestamp smtp_accept_max_per_host
//
// of which each option may be missing: "name = value" a line, "name" or
// "no_name" for a boolean. With spool_directory too, an empty log_file_path
// gives a MainLog. The error tells of every value that could not be read.
func ParseConfig(out []byte) (Config, error) {
	c := Config{SyslogTimestamp: true}
	var errs []error
	known, spool, hasPath := 0, "", false
	for line := range strings.SplitSeq(string(out), "\n") {
		name, value, hasValue := strings.Cut(strings.TrimSuffix(line, "\r"), "=")
		name, value = strings.TrimSpace(name), strings.TrimSpace(value)
		known++
		switch {
		case name == "log_timezone" && !hasValue:
			c.LogTimezone = true
		case name == "no_log_timezone" && !hasValue:
			c.LogTimezone = false
		case name == "syslog_timestamp" && !hasValue:
			c.SyslogTimestamp = true
		case name == "no_syslog_timestamp" && !hasValue:
			c.SyslogTimestamp = false
		case !hasValue:
			known--
		case name == "smtp_accept_max":
			n, err := strconv.Atoi(value)
			if err != nil || n < 0 {
				errs = append(errs, fmt.Errorf("smtp_accept_max: %q is not a number of connections", clip(value)))
				break
			}
			c.AcceptMax, c.AcceptMaxSet = n, true
		case name == "smtp_accept_max_per_host":
			c.AcceptMaxPerHost = value
		case name == "smtp_receive_timeout":
			if strings.Contains(value, "$") {
				break
			}
			d, ok := parseTime(value)
			if !ok {
				errs = append(errs, fmt.Errorf("smtp_receive_timeout: %q is not a time like 5m or 2m45s", clip(value)))
				break
			}
			c.ReceiveTimeout = d
		case name == "log_selector":
			c.LogSelector = value
			var err error
			if c.SmtpConnection, c.IncomingPort, err = selectors(value); err != nil {
				errs = append(errs, err)
			}
		case name == "log_file_path":
			c.LogFilePath, hasPath = value, true
		case name == "spool_directory":
			spool = value
		case name == "timezone":
			c.Timezone = value
		default:
			known--
		}
	}
	if known == 0 {
		return Config{}, ErrNotConfig
	}
	if hasPath {
		c.MainLog, c.Syslog = logPath(c.LogFilePath, spool)
	}
	return c, errors.Join(errs...)
}

// ReadConfig finds exim4 or exim and asks it. It takes 10 s at most,
// or until the deadline of ctx: without a resolver Exim looks for its own name
// for a little longer.
func ReadConfig(ctx context.Context) (Config, error) {
	path, err := find()
	if err != nil {
		return Config{}, err
	}
	return ask(ctx, path)
}

func find() (string, error) {
	for _, name := range []string{"exim4", "exim"} {
		for _, file := range []string{name, "/usr/sbin/" + name} {
			if path, err := exec.LookPath(file); err == nil {
				return path, nil
			}
		}
	}
	return "", ErrNoExim
}

// ask runs the Exim at path. An Exim that is older than one of the options
// says so and fails, but tells the others.
func ask(ctx context.Context, path string) (Config, error) {
	out, err := printed(ctx, path, options)
	if err != nil {
		return Config{}, err
	}
	c, err := ParseConfig(out)
	if err != nil {
		return c, fmt.Errorf("%s -bP: %w", path, err)
	}
	c.Path = path
	return c, nil
}

// printed is what the Exim at path prints of these options.
func printed(ctx context.Context, path string, options []string) ([]byte, error) {
	return said(ctx, path, append([]string{"-bP"}, options...)...)
}

// said is what the Exim at path prints for these arguments, in 10 s at most
// where ctx has no end of its own. That an option is not known is no error.
func said(ctx context.Context, path string, args ...string) ([]byte, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, configTimeout)
		defer cancel()
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = "/"
	cmd.Env = []string{"LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.WaitDelay = time.Second // a child of Exim's that keeps the pipe open
	stdout, stderr := bounded{max: configMax}, bounded{max: 4 << 10}
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	runErr := cmd.Run()
	if stdout.over {
		return nil, fmt.Errorf("%s %s printed more than %d bytes", path, args[0], configMax)
	}
	if err := ctx.Err(); runErr != nil && err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return nil, fmt.Errorf("%w in time: %s %s was ended", ErrSlow, path, args[0])
		}
		return nil, fmt.Errorf("%s %s did not end: %w", path, args[0], err)
	}
	old := strings.Contains(stdout.buf.String()+stderr.buf.String(), "is not a known option")
	if runErr != nil && !old {
		if said := oneLine(stderr.buf.Bytes()); said != "" {
			return nil, fmt.Errorf("%s %s: %w: %s", path, args[0], runErr, said)
		}
		return nil, fmt.Errorf("%s %s: %w", path, args[0], runErr)
	}
	return stdout.buf.Bytes(), nil
}

// Location returns the zone of timestamps without an offset.
func (c Config) Location() (*time.Location, error) {
	name := strings.TrimPrefix(strings.TrimPrefix(c.Timezone, ":"), "/usr/share/zoneinfo/")
	switch {
	case name == "":
		return time.Local, nil
	case strings.EqualFold(name, "utc"): // as Exim has it
		return time.UTC, nil
	}
	loc, err := time.LoadLocation(name)
	if err != nil {
		return nil, fmt.Errorf("timezone %q of Exim: %w", clip(c.Timezone), err)
	}
	return loc, nil
}

// selectors reads a log_selector: words with a sign, later ones win.
func selectors(s string) (smtpConnection, incomingPort bool, err error) {
	for _, word := range strings.Fields(strings.NewReplacer("+", " +", "-", " -").Replace(s)) {
		on := word[0] == '+'
		if !on && word[0] != '-' {
			return smtpConnection, incomingPort, fmt.Errorf("log_selector: %q has no + or - before it", clip(word))
		}
		switch word[1:] {
		case "all":
			smtpConnection, incomingPort = on, on
		case "smtp_connection":
			smtpConnection = on
		case "incoming_port":
			incomingPort = on
		}
	}
	return smtpConnection, incomingPort, nil
}

// logPath reads a log_file_path: a list of a path, with %s for the kind of
// log, and "syslog". An empty item, or an empty list, is the path that was
// built in; that is printed where the option is not set, and the usual one is
// in the spool directory.
func logPath(s, spool string) (mainLog string, syslog bool) {
	sep := ":"
	if len(s) > 1 && s[0] == '<' {
		sep, s = s[1:2], s[2:]
	}
	for item := range strings.SplitSeq(s, sep) {
		item = strings.TrimSpace(item)
		switch {
		case item == "syslog":
			syslog = true
		case mainLog != "":
		case item == "" && strings.HasPrefix(spool, "/"):
			mainLog = spool + "/log/mainlog"
		case strings.HasPrefix(item, "/"):
			mainLog = filepath.Clean(strings.ReplaceAll(item, "%s", "main"))
		}
	}
	return mainLog, syslog
}

// parseTime reads a time as Exim prints it: 5m, 2m45s, 1w2d, 0s.
func parseTime(s string) (time.Duration, bool) {
	units := map[byte]time.Duration{'w': 7 * 24 * time.Hour, 'd': 24 * time.Hour, 'h': time.Hour, 'm': time.Minute, 's': time.Second}
	var sum time.Duration
	if s == "" {
		return 0, false
	}
	for b := []byte(s); len(b) > 0; {
		v, n := number(b, 6)
		if n == 0 || n == len(b) || units[b[n]] == 0 {
			return 0, false
		}
		sum += time.Duration(v) * units[b[n]]
		b = b[n+1:]
	}
	return sum, sum >= 0 && sum < 100*365*24*time.Hour
}

// bounded keeps the first max bytes that are written to it. (It must not
// embed its buffer: io.Copy would find bytes.Buffer.ReadFrom, which has no
// limit.)
type bounded struct {
	buf  bytes.Buffer
	max  int
	over bool // there were more
}

// errOver closes the pipe of a program that prints more than is wanted.
var errOver = errors.New("too much output")

func (b *bounded) Write(p []byte) (int, error) {
	room := b.max - b.buf.Len()
	if len(p) > room {
		b.over = true
		b.buf.Write(p[:room])
		return room, errOver
	}
	return b.buf.Write(p)
}

// oneLine is what a program said, fit for an error message.
func oneLine(b []byte) string {
	return clip(strings.Join(strings.Fields(strings.ToValidUTF8(string(b), "?")), " "))
}

func clip(s string) string {
	const most = 200
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}
