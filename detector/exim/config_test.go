package exim

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestParseConfig(t *testing.T) {
	good := func(name, out string, want Config) {
		t.Helper()
		got, err := ParseConfig([]byte(out))
		if err != nil || got != want {
			t.Errorf("%s: %v\n got %+v\nwant %+v", name, err, got, want)
		}
	}
	bad := func(name, out string, want ...string) {
		t.Helper()
		_, err := ParseConfig([]byte(out))
		if err == nil {
			t.Errorf("%s: no error", name)
			return
		}
		for _, w := range want {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q does not tell of %q", name, err, w)
			}
		}
	}
	good("Debian 12 as shipped", `smtp_accept_max = 20
smtp_receive_timeout = 5m
log_selector = +smtp_protocol_error +smtp_syntax_error +tls_certificate_verified +tls_peerdn
log_file_path = /var/log/exim4/%slog
no_log_timezone
timezone =
syslog_timestamp
smtp_accept_max_per_host =
`, Config{
		AcceptMax: 20, AcceptMaxSet: true, ReceiveTimeout: 5 * time.Minute,
		LogSelector: "+smtp_protocol_error +smtp_syntax_error +tls_certificate_verified +tls_peerdn",
		LogFilePath: "/var/log/exim4/%slog", MainLog: "/var/log/exim4/mainlog", SyslogTimestamp: true,
	})
	good("cPanel's selector, datestamps, syslog, a zone", `smtp_accept_max = 0
smtp_receive_timeout = 2m45s
log_selector = +incoming_port +smtp_connection +all_parents +retry_defer +subject +arguments +received_recipients
log_file_path = /var/log/exim_%slog-%D : syslog
log_timezone
timezone = Europe/Berlin
no_syslog_timestamp
smtp_accept_max_per_host = ${if eq{a}{b}{1}{5}}
`, Config{
		AcceptMaxSet: true, ReceiveTimeout: 165 * time.Second, AcceptMaxPerHost: "${if eq{a}{b}{1}{5}}",
		LogSelector:    "+incoming_port +smtp_connection +all_parents +retry_defer +subject +arguments +received_recipients",
		SmtpConnection: true, IncomingPort: true,
		LogFilePath: "/var/log/exim_%slog-%D : syslog", MainLog: "/var/log/exim_mainlog-%D", Syslog: true,
		LogTimezone: true, Timezone: "Europe/Berlin",
	})
	good("a timeout that is expanded", "smtp_receive_timeout = ${if eq{a}{a}{2m}}\n", Config{SyslogTimestamp: true})
	good("an option that is not known, one that is", "x is not a known option\nsmtp_accept_max = 5\nspool_directory = /s\n",
		Config{AcceptMax: 5, AcceptMaxSet: true, SyslogTimestamp: true})
	good("nothing but the spool", "log_file_path =\nspool_directory = /s\n", Config{MainLog: "/s/log/mainlog", SyslogTimestamp: true})

	bad("several at once", "smtp_accept_max = many\nsmtp_receive_timeout = soon\nlog_selector = all\n", `"many"`, `"soon"`, `"all"`)
	bad("negative", "smtp_accept_max = -1\n", `"-1"`)
	for _, s := range []string{"", "\n", "hello\n", "x = 1\n", "<html>", "log_timezone = x", strings.Repeat("\x00=", 1000)} {
		if _, err := ParseConfig([]byte(s)); !errors.Is(err, ErrNotConfig) {
			t.Errorf("%.20q: %v", s, err)
		}
	}
	bad("a long value is cut", "smtp_accept_max = "+strings.Repeat("x", 10000), "xxx...")
}

func TestSelectors(t *testing.T) {
	for s, want := range map[string][2]bool{
		"":                                  {false, false},
		"+smtp_connection":                  {true, false},
		"+incoming_port":                    {false, true},
		"+incoming_port+smtp_connection":    {true, true},
		"+all":                              {true, true},
		"+all -smtp_connection":             {false, true},
		"-all +incoming_port":               {false, true},
		"+smtp_connection -all":             {false, false},
		"-smtp_connection +smtp_connection": {true, false},
		"+smtp_connections +all_parents":    {false, false},
	} {
		a, b, err := selectors(s)
		if err != nil || a != want[0] || b != want[1] {
			t.Errorf("%q: %v %v %v, want %v", s, a, b, err, want)
		}
	}
}

func TestLogPath(t *testing.T) {
	for s, want := range map[string]struct {
		path   string
		syslog bool
	}{
		"/var/log/exim/%s.log":         {"/var/log/exim/main.log", false},
		"/var/log/exim_%slog":          {"/var/log/exim_mainlog", false},
		"/var/log/exim.log":            {"/var/log/exim.log", false},
		"syslog":                       {"", true},
		"syslog : /var/log/%slog":      {"/var/log/mainlog", true},
		"/var/log/%slog-%M":            {"/var/log/mainlog-%M", false},
		"":                             {"/spool/log/mainlog", false},
		":syslog":                      {"/spool/log/mainlog", true},
		"<; syslog ; /a/%slog":         {"/a/mainlog", true},
		"/a/%slog : /b/%slog : syslog": {"/a/mainlog", true},
		"relative/%slog":               {"", false},
	} {
		path, syslog := logPath(s, "/spool")
		if path != want.path || syslog != want.syslog {
			t.Errorf("%q: %q %v, want %v", s, path, syslog, want)
		}
	}
	if path, _ := logPath("", ""); path != "" {
		t.Errorf("without a spool: %q", path)
	}
}

func TestLocation(t *testing.T) {
	for tz, want := range map[string]string{"": "Local", "utc": "UTC", "UTC": "UTC", "Europe/Berlin": "Europe/Berlin", ":Asia/Tokyo": "Asia/Tokyo", "/usr/share/zoneinfo/Asia/Tokyo": "Asia/Tokyo"} {
		loc, err := Config{Timezone: tz}.Location()
		if err != nil || loc.String() != want {
			t.Errorf("%q: %v %v", tz, loc, err)
		}
	}
	for _, tz := range []string{"CET-1CEST", "../../etc/passwd", "Nowhere/Else"} {
		if loc, err := (Config{Timezone: tz}).Location(); err == nil {
			t.Errorf("%q: %v", tz, loc)
		}
	}
}

// fake is a program that answers as an Exim may.
func fake(t *testing.T, script string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "exim")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestAsk(t *testing.T) {
	ctx := context.Background()
	path := fake(t, `echo "smtp_accept_max = 7"; echo "log_selector = $1 +incoming_port"`)
	c, err := ask(ctx, path)
	if err != nil || c.Path != path || c.AcceptMax != 7 || c.LogSelector != "-bP +incoming_port" || !c.IncomingPort {
		t.Errorf("%+v %v", c, err)
	}
	c, err = ask(ctx, fake(t, `echo "smtp_accept_max = 7"; echo "log_timezone is not a known option"; exit 1`))
	if err != nil || c.AcceptMax != 7 {
		t.Errorf("an old Exim: %+v %v", c, err)
	}
	var exit *exec.ExitError
	_, err = ask(ctx, fake(t, `echo "Exim configuration error:" >&2; echo "  line 7" >&2; exit 3`))
	if !errors.As(err, &exit) || !strings.Contains(err.Error(), "Exim configuration error: line 7") {
		t.Errorf("a broken configuration: %v", err)
	}
	if _, err = ask(ctx, fake(t, `exit 0`)); !errors.Is(err, ErrNotConfig) {
		t.Errorf("silence: %v", err)
	}
	if _, err = ask(ctx, fake(t, `while :; do echo 'smtp_accept_max = 7'; done`)); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a flood: %v", err)
	}
	if _, err = ask(ctx, filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no program: %v", err)
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if _, err = ask(short, fake(t, `exec sleep 60`)); !errors.Is(err, ErrSlow) {
		t.Errorf("a program that hangs: %v", err)
	}
}

func TestFind(t *testing.T) {
	path := fake(t, "exit 0")
	t.Setenv("PATH", filepath.Dir(path))
	got, err := find()
	if err != nil {
		t.Fatal(err)
	}
	if _, here := os.Stat("/usr/sbin/exim4"); here != nil && got != path {
		t.Errorf("found %s", got)
	}
}

// The real program, with the configuration of this machine.
func TestReadConfig(t *testing.T) {
	path, err := find()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	c, err := ReadConfig(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	if c.Path != path || !c.AcceptMaxSet || c.MainLog == "" && !c.Syslog {
		t.Errorf("%+v", c)
	}
	if _, err := c.Location(); err != nil {
		t.Error(err)
	}
	out, err := exec.Command(path, "-bP", "smtp_accept_max").Output()
	if want, err2 := ParseConfig(out); err != nil || err2 != nil || c.AcceptMax != want.AcceptMax {
		t.Errorf("smtp_accept_max is %d, but %q (%v, %v)", c.AcceptMax, out, err, err2)
	}
}

// The real program, with a configuration of ours (-C, as root only).
func TestRealConfig(t *testing.T) {
	path, err := find()
	if err != nil || os.Getuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root and an Exim", err)
		}
		t.Skip("needs root and an Exim")
	}
	conf := filepath.Join(t.TempDir(), "exim.conf")
	if err := os.WriteFile(conf, []byte(`smtp_accept_max = 100
smtp_receive_timeout = 165s
log_selector = +all \
  -incoming_port
log_file_path = syslog : /var/log/%slog-%D
log_timezone
timezone = Europe/Berlin
no_syslog_timestamp
`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, append([]string{"-C", conf, "-bP"}, options...)...).CombinedOutput()
	if err != nil {
		t.Skipf("%s refuses -C: %v: %s", path, err, out)
	}
	c, err := ParseConfig(out)
	want := Config{
		AcceptMax: 100, AcceptMaxSet: true, ReceiveTimeout: 165 * time.Second,
		LogSelector: "+all -incoming_port", SmtpConnection: true,
		LogFilePath: "syslog : /var/log/%slog-%D", MainLog: "/var/log/mainlog-%D", Syslog: true,
		LogTimezone: true, Timezone: "Europe/Berlin",
	}
	if err != nil || c != want {
		t.Errorf("%v\n got %+v\nwant %+v\nfrom %s", err, c, want, out)
	}
}

func FuzzParseConfig(f *testing.F) {
	f.Add([]byte("smtp_accept_max = 20\nlog_selector = +all -x\nlog_file_path = <; /%slog;syslog\nsmtp_receive_timeout = 1w2d3h4m5s\n"))
	f.Add([]byte("no_log_timezone\ntimezone =\n"))
	f.Fuzz(func(t *testing.T, out []byte) {
		c, err := ParseConfig(out)
		if err == nil && (c.AcceptMax < 0 || c.ReceiveTimeout < 0 || c.MainLog != "" && c.MainLog[0] != '/') {
			t.Errorf("%q gives %+v", out, c)
		}
	})
}
