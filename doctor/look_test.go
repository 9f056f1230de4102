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
		if macro := macroIn(root, want); (macro != "") != (want == Debian) {
			t.Errorf("%q: the macro is in %q", want, macro)
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
// a real Debian in a mount namespace of its own, and asks Exim.
func TestDebianMends(t *testing.T) {
	if _, err := os.Stat("/usr/sbin/update-exim4.conf"); err != nil || os.Geteuid() != 0 {
		cannot(t, "needs root and Debian's Exim: %v", err)
	}
	if out, err := exec.Command("unshare", "-m", "true").CombinedOutput(); err != nil {
		cannot(t, "no mount namespace can be made here: %v: %s", err, out)
	}
	for system, split := range map[System]string{Debian: "false", DebianSplit: "true"} {
		x := &exam{Facts: &Facts{System: system, Exim: exim.Config{LogSelector: "+tls_peerdn"}}}
		script := `set -e
mount -t tmpfs none /mnt
cp -a /etc/exim4 /mnt/etc; mkdir /mnt/var; mount --bind /mnt/etc /etc/exim4; mount --bind /mnt/var /var/lib/exim4
rm -f /etc/exim4/exim4.conf.localmacros /etc/exim4/conf.d/main/*localmacros
sed -i "s/^dc_use_split_config=.*/dc_use_split_config='` + split + `'/" /etc/exim4/update-exim4.conf.conf
systemctl() { :; } # nothing is restarted here
`
		for _, m := range append(x.selectorSetting("+smtp_connection +incoming_port"),
			x.setting("smtp_accept_max = 77", "log_timezone = true", "smtp_accept_reserve = 5", "smtp_reserve_hosts = <; 127.0.0.1 ; ::1")...) {
			script += m + "\n"
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		out, err := exec.CommandContext(ctx, "unshare", "-m", "bash", "-c", script+"exim4 -bP log_selector smtp_accept_max log_timezone smtp_accept_reserve smtp_reserve_hosts").CombinedOutput()
		cancel()
		const want = "log_selector = +tls_peerdn +smtp_connection +incoming_port\nsmtp_accept_max = 77\nlog_timezone\nsmtp_accept_reserve = 5\nsmtp_reserve_hosts = <; 127.0.0.1 ; ::1\n"
		if err != nil || string(out) != want {
			t.Errorf("%s: %v\n%s", system, err, out)
		}
	}
}
