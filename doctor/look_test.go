package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// cannot skips a test that this machine cannot run; in CI it has to.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
		t.Fatal(err)
	}
}

func TestSystem(t *testing.T) {
	for want, files := range map[System]map[string]string{
		CPanel:      {"/usr/local/cpanel/version": "11.110", "/etc/exim4/update-exim4.conf.conf": ""},
		DirectAdmin: {"/usr/local/directadmin/conf/directadmin.conf": ""},
		Debian:      {"/etc/exim4/update-exim4.conf.conf": "dc_use_split_config='false'\n", "/etc/exim4/exim4.conf.localmacros": "X = 1\n MAIN_LOG_SELECTOR = +all\n"},
		DebianSplit: {"/etc/exim4/update-exim4.conf.conf": "dc_use_split_config='true'\n"},
		Other:       {"/etc/exim4/update-exim4.conf.conf": "", "/etc/exim4/exim4.conf": ""},
	} {
		root := t.TempDir()
		for name, text := range files {
			write(t, filepath.Join(root, name), text)
		}
		if got := system(root); got != want {
			t.Errorf("%v: %q, want %q", files, got, want)
		}
		set, err := setIn(root, configFiles(root, want, ""))
		if macro := set["MAIN_LOG_SELECTOR"]; err != nil || (len(macro) == 1 && macro[0].Line == 2) != (want == Debian) {
			t.Errorf("%q: the macro is in %v, %v", want, macro, err)
		}
	}
}

// TestLookLog: the end of a log, who connects at even intervals, and what is
// no file.
func TestLookLog(t *testing.T) {
	at := time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC)
	var b bytes.Buffer
	for i := range 40 {
		say := func(ip string, off int, mail bool) {
			when := at.Add(time.Duration(i)*time.Minute + time.Duration(off)*time.Second).Format(time.DateTime)
			fmt.Fprintf(&b, "%s +0000 SMTP connection from [%s]:%d (TCP/IP connection count = 1)\n", when, ip, 2000+i)
			if mail {
				fmt.Fprintf(&b, "%s +0000 1xVDR5-0003Hr-1R <= a@b.example H=x.example [%s]:%d P=esmtp S=311\n", when, ip, 2000+i)
			}
		}
		say("127.0.0.1", 0, false)
		say("198.51.100.1", 1, false)       // every minute: a monitor
		say("198.51.100.2", 2, i == 20)     // sends mail
		say("198.51.100.3", i*i%50, false)  // as it likes
		say("203.0.113.0", 55, false)       // a second monitor
		say("203.0.113.9", 55+i%2*2, false) // nearly even
	}
	path := filepath.Join(t.TempDir(), "mainlog")
	write(t, path, b.String())
	l := lookLog(path, time.UTC)
	if l.Err != nil || l.Size != int64(b.Len()) || !l.Offset || l.Stats.Opened != 240 || l.Mode != "-rw-r-----" || !strings.HasPrefix(l.Owner, "root:") && os.Geteuid() == 0 {
		t.Errorf("%+v", l)
	}
	if want := at.Add(39*time.Minute + 57*time.Second); !l.LastLine.Equal(want) {
		t.Errorf("the last line is of %s, want %s", l.LastLine, want)
	}
	var got []string
	for _, r := range l.Regulars {
		got = append(got, r.Addr.String()+" "+r.Every.String())
	}
	if want := []string{"198.51.100.1 1m0s", "203.0.113.0 1m0s", "203.0.113.9 1m0s"}; !slices.Equal(got, want) {
		t.Errorf("regular are %v, want %v", got, want)
	}
	if l := lookLog(filepath.Dir(path), time.UTC); l.Err == nil {
		t.Error("a directory is read as a log")
	}
	if l := lookLog(path+".missing", time.UTC); !errors.Is(l.Err, fs.ErrNotExist) {
		t.Errorf("a missing log: %v", l.Err)
	}
}

// TestLongLog: only the end is read, from a whole line on.
func TestLongLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mainlog")
	line := "2026-11-22 10:00:00 SMTP connection from [192.0.2.1]:2000 (TCP/IP connection count = 1)\n"
	write(t, path, strings.Repeat(line, 2*sampleSize/len(line)))
	l := lookLog(path, time.UTC)
	if most := sampleSize / len(line); l.Err != nil || l.Stats.Lines > most || l.Stats.Lines < most-2 || l.Stats.Unparsed != 0 {
		t.Errorf("%d lines, %d not parsed, %v", l.Stats.Lines, l.Stats.Unparsed, l.Err)
	}
}

func FuzzSample(f *testing.F) {
	log, err := os.ReadFile("../testdata/corpus/l-injection.log")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(log[:8<<10])
	f.Add([]byte("2026-11-22 20:48:43.1 +0100\n\n]: 2026-11-22 20:48:43"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var l Log
		if err := l.sample(bufio.NewReaderSize(bytes.NewReader(data), maxLine), exim.New(time.UTC)); err != nil {
			t.Fatal(err)
		}
		if len(l.Regulars) > 20 {
			t.Error(len(l.Regulars))
		}
	})
}

func TestLacks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "status")
	for text, want := range map[string]string{
		"Name:\tx\nCapEff:\t000001ffffffffff\n": "",
		"CapEff:\t0000000000001000\n":           "CAP_DAC_READ_SEARCH",
		"CapEff:\t0000000000000000\n":           "CAP_NET_ADMIN CAP_DAC_READ_SEARCH",
	} {
		write(t, path, text)
		if l, err := lacks(path); err != nil || strings.Join(l, " ") != want {
			t.Errorf("%q: %v, %v", text, l, err)
		}
	}
	for _, text := range []string{"", "CapEff:\tx\n"} {
		write(t, path, text)
		if _, err := lacks(path); err == nil {
			t.Errorf("%q is taken", text)
		}
	}
}

// TestLookStore: a store that no daemon has is looked at and stays byte for
// byte as it was.
func TestLookStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	look := func() Store {
		p := policy.Default()
		p.Store.Path = path
		f := &Facts{Now: time.Now(), Policy: p}
		f.lookStore()
		return f.Store
	}
	if s := look(); !s.Missing || s.Good != 0 || s.Free == 0 {
		t.Errorf("none: %+v", s)
	}
	if _, err := os.Stat(path); err == nil {
		t.Fatal("it was made by looking")
	}
	db, err := store.Open(path, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if s := look(); !s.InUse || s.Err != nil || s.Good != -1 {
		t.Errorf("in use: %+v", s)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(path)
	if s := look(); s.InUse || s.Err != nil || s.Good != 0 || s.Size != int64(len(before)) {
		t.Errorf("whole: %+v", s)
	}
	if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
		t.Error("it was changed by looking")
	}
	write(t, path, strings.Repeat("x", 9000))
	if s := look(); !errors.Is(s.Err, store.ErrDamaged) {
		t.Errorf("damaged: %+v", s)
	}
}

// TestDebianMends runs what doctor tells administrators of Debian to paste, on
// a real Debian in a mount namespace of its own, with its files as they come
// and with every option set before, and asks Exim.
func TestDebianMends(t *testing.T) {
	if _, err := os.Stat("/usr/sbin/update-exim4.conf"); err != nil || os.Geteuid() != 0 {
		cannot(t, "needs root and Debian's Exim: %v", err)
	}
	if out, err := exec.Command("unshare", "-m", "true").CombinedOutput(); err != nil {
		cannot(t, "no mount namespace can be made here: %v: %s", err, out)
	}
	const set = "smtp_accept_max = 20\nno_log_timezone\nsmtp_accept_reserve=2\n smtp_reserve_hosts = 10.0.0.1 : \\\n  # a comment\n  10.0.0.2 : \\\n 10.0.0.3\n"
	const include = ".include_if_exists /etc/exim4/extra\n"
	cases := []struct {
		name  string
		split bool
		files map[string]string // below /etc/exim4; "+" before a text: in front of what is there
	}{
		{"as it comes", false, nil},
		{"as it comes, split", true, nil},
		{"set before", false, map[string]string{"exim4.conf.template": "+" + set, "exim4.conf.localmacros": "MY_OWN = 1\nMAIN_LOG_SELECTOR = +tls_peerdn\n"}},
		{"set before, split", true, map[string]string{"conf.d/main/02_mine": set, "conf.d/main/000_localmacros": "MAIN_LOG_SELECTOR = +pid\nMAIN_LOG_SELECTOR == MAIN_LOG_SELECTOR \\\n  +tls_peerdn\n"}},
		{"set in an included file", true, map[string]string{"conf.d/main/02_mine": include, "extra": set}},
		{"no macro", true, map[string]string{"conf.d/main/90_exim4-config_log_selector": "log_selector = \\\n +tls_peerdn\n"}},
		{"mended before, and changed since", true, map[string]string{"conf.d/main/95_smtpguard": set}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			etc := filepath.Join(root, "etc", "exim4")
			system := Debian
			if c.split {
				system = DebianSplit
			}
			if out, err := exec.Command("sh", "-c", `set -eu
mkdir -p "$1/etc" "$1/var"
cp -a /etc/exim4 "$1/etc/"
rm -f "$1"/etc/exim4/exim4.conf.localmacros "$1"/etc/exim4/conf.d/main/*localmacros
sed -i "s/^dc_use_split_config=.*/dc_use_split_config='$2'/" "$1/etc/exim4/update-exim4.conf.conf"`, "sh", root, fmt.Sprint(c.split)).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			for name, text := range c.files {
				path := filepath.Join(etc, name)
				if rest, ok := strings.CutPrefix(text, "+"); ok {
					old, err := os.ReadFile(path)
					if err != nil {
						t.Fatal(err)
					}
					text = rest + string(old)
				}
				write(t, path, text)
				_ = os.Chmod(path, 0o644)
			}
			x := &exam{Facts: &Facts{System: system, Exim: exim.Config{LogSelector: "+tls_peerdn"}}}
			if x.Set, x.SetErr = setIn(root, configFiles(root, system, "")); x.SetErr != nil {
				t.Fatal(x.SetErr)
			}
			script := `set -eu
mount --bind "$1/etc/exim4" /etc/exim4; mount --bind "$1/var" /var/lib/exim4
systemctl() { :; } # nothing is restarted here
update-exim4.conf; exim4 -bV >/dev/null # it is whole before
`
			for _, m := range append(x.setting("a", x.logging()...),
				x.setting("b", "smtp_accept_max = 77", "smtp_accept_reserve = 5", "smtp_reserve_hosts = <; 127.0.0.1 ; ::1")...) {
				if strings.HasSuffix(m, ":") || strings.HasSuffix(m, ".") { // for a person to read
					continue
				}
				script += m + "\n"
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			out, err := exec.CommandContext(ctx, "unshare", "-m", "bash", "-c", script+"exim4 -bP log_selector smtp_accept_max log_timezone smtp_accept_reserve smtp_reserve_hosts", "bash", root).CombinedOutput()
			const want = "log_selector = +tls_peerdn +smtp_connection +incoming_port +incoming_interface\nsmtp_accept_max = 77\nlog_timezone\nsmtp_accept_reserve = 5\nsmtp_reserve_hosts = <; 127.0.0.1 ; ::1\n"
			if err != nil || string(out) != want {
				t.Errorf("%v\n%s\nof:\n%s", err, out, script)
			}
		})
	}
}

func FuzzConfigText(f *testing.F) {
	f.Add("smtp_accept_max = 20\nX == \\\n# c\n y\n.ifdef X\nno_log_timezone\n.else\nhide a = b\n.endif\nbegin acl\nb = c\n")
	f.Add(".include /dev/null\n.include X\n.endif\n.else\n.ifdef\n\\\n")
	f.Fuzz(func(t *testing.T, text string) {
		r := configReader{root: "/nonexistent", set: make(map[string][]Setting)}
		r.text("/etc/exim.conf", text)
		for name, list := range r.set {
			for _, s := range list {
				if name == "" || s.Line < 1 || s.End < s.Line || s.End > strings.Count(text, "\n")+1 {
					t.Errorf("%q: %+v", name, s)
				}
				change(s, name, "x")
			}
		}
	})
}

// TestGrowth: a log that was only touched does not grow; one that does gives
// its new line.
func TestGrowth(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mainlog")
	old := "2026-11-22 10:00:00 SMTP connection from [192.0.2.1]:2000 (TCP/IP connection count = 1)\n"
	write(t, path, old)
	l := lookLog(path, time.UTC)
	if err := os.Chtimes(path, time.Time{}, time.Date(2026, 11, 22, 11, 0, 1, 0, time.UTC)); err != nil {
		t.Fatal(err)
	}
	if l.grown(time.UTC) || l.Grew {
		t.Error("it grew by a touch")
	}
	write(t, path, old+strings.Replace(old, "10:00:00", "10:00:05", 1))
	if !l.grown(time.UTC) || l.LastLine.Format(time.TimeOnly) != "10:00:05" {
		t.Errorf("%+v", l)
	}
}
