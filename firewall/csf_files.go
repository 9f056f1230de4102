package firewall

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The files of ConfigServer Security & Firewall (CSF) and its forks, as 14.x
// to 15.10 write them.

// csfFileMax bounds what is read of one of them, in bytes. A csf.deny of a
// million lines is 60 MB.
const csfFileMax = 64 << 20

// csfPaths are where CSF is.
type csfPaths struct {
	command string // looked for on PATH if it has no slash
	etc     string // csf.conf, csf.deny, csf.allow, csf.disable, csf.error
	lib     string // csf.tempban
	pid     string // of lfd, the daemon that ends temporary bans
}

func csfAt(root string) csfPaths {
	return csfPaths{
		command: "csf",
		etc:     filepath.Join(root, "/etc/csf"),
		lib:     filepath.Join(root, "/var/lib/csf"),
		pid:     filepath.Join(root, "/var/run/lfd.pid"),
	}
}

func (p csfPaths) file(name string) string { return filepath.Join(p.etc, name) }

// CSFAllowFiles gives the paths of csf.allow and csf.ignore, as far as they
// are there, if CSF is installed below root ("" or "/": this machine): what
// its administrator never wants blocked. Their plain lines are an address or a
// prefix, then a comment after #.
func CSFAllowFiles(root string) []string {
	p := csfAt(root)
	if !fileExists(p.file("csf.conf")) {
		return nil
	}
	return slices.DeleteFunc([]string{p.file("csf.allow"), p.file("csf.ignore")}, func(f string) bool { return !fileExists(f) })
}

// CSFTempAllowed gives whom the CSF that is installed below root lets in for a
// time (csf -ta), as far as that is not over at now; none where there is no CSF.
// csf.tempallow has lines like those of csf.tempban.
func CSFTempAllowed(root string, now time.Time) ([]netip.Prefix, error) {
	p := csfAt(root)
	if !fileExists(p.file("csf.conf")) {
		return nil, nil
	}
	path := p.lib + "/csf.tempallow"
	lines, err := readCSFBans(context.Background(), path, 100*time.Millisecond)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	var allowed []netip.Prefix
	for _, a := range lines {
		if a.dir != "out" && a.until().After(now) && a.prefix.IsValid() {
			allowed = append(allowed, a.prefix)
		}
	}
	return allowed, nil
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// csfConf is what matters of csf.conf. Missing settings have CSF's defaults.
type csfConf struct {
	ipv6    bool
	testing bool // a cron job clears the firewall every five minutes
	// tempLimit is DENY_TEMP_IP_LIMIT: beyond it lfd drops the oldest bans.
	// 0: no limit.
	tempLimit int
	// commands are iptables and ip6tables.
	commands [2]string
}

// csfConfDefault is what a csf.conf that states nothing means.
var csfConfDefault = csfConf{tempLimit: 100, commands: [2]string{"iptables", "ip6tables"}}

var csfSetting = regexp.MustCompile(`^\s*([A-Z0-9_]+)\s*=\s*"([^"]*)"`)

func readCSFConf(path string) (csfConf, error) {
	c := csfConfDefault
	err := eachLine(path, func(line string) error {
		m := csfSetting.FindStringSubmatch(line)
		if m == nil {
			return nil
		}
		switch m[1] {
		case "IPV6":
			c.ipv6 = csfTrue(m[2])
		case "TESTING":
			c.testing = csfTrue(m[2])
		case "DENY_TEMP_IP_LIMIT":
			n, err := strconv.Atoi(strings.TrimSpace(m[2]))
			if m[2] != "" && (err != nil || n < 0) {
				return fmt.Errorf("%s: DENY_TEMP_IP_LIMIT is %q, not a number", path, m[2])
			}
			c.tempLimit = n
		case "IPTABLES", "IP6TABLES":
			if filepath.IsAbs(m[2]) {
				c.commands[familyIndex(m[1] == "IP6TABLES")] = m[2]
			}
		}
		return nil
	})
	return c, err
}

// csfTrue is Perl's notion of true.
func csfTrue(s string) bool { return s != "" && s != "0" }

// csfBan is a line of csf.tempban: "epoch|ip|ports|dir|ttl|comment".
type csfBan struct {
	prefix  netip.Prefix // zero if it is none
	ports   string       // "25,465,587"; empty: all
	dir     string       // in, out, inout
	since   time.Time
	ttl     time.Duration
	comment string
}

func (b csfBan) until() time.Time { return b.since.Add(b.ttl) }

// ours tells whether the ban was made by us.
func (b csfBan) ours() bool { return strings.HasPrefix(b.comment, csfComment) }

// drops tells whether the ban stops incoming packets to the ports.
func (b csfBan) drops(ports string) bool {
	return strings.Contains(b.dir, "in") && (b.ports == ports || b.ports == "")
}

func parseCSFBan(line string) (csfBan, bool) {
	f := strings.SplitN(line, "|", 6)
	if len(f) < 6 {
		return csfBan{}, false
	}
	since, err1 := strconv.ParseInt(f[0], 10, 48)
	ttl, err2 := strconv.ParseInt(f[4], 10, 64) // CSF takes any number; too large is for ever
	if err1 != nil || err2 != nil && !errors.Is(err2, strconv.ErrRange) || since < 0 || ttl < 0 {
		return csfBan{}, false
	}
	ttl = min(ttl, int64(longestEntry/time.Second))
	b := csfBan{ports: f[2], dir: f[3], since: time.Unix(since, 0), ttl: time.Duration(ttl) * time.Second, comment: f[5]}
	if b.ports == "*" {
		b.ports = ""
	}
	b.prefix, _ = csfPrefix(f[1])
	return b, true
}

// csfPrefix reads an address or a prefix as CSF writes them.
func csfPrefix(s string) (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(s)
	return p.Masked(), err == nil
}

// readCSFBans reads csf.tempban, waiting for who is just writing it. A file
// that is not there has no bans.
func readCSFBans(ctx context.Context, path string, wait time.Duration) ([]csfBan, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	for end := time.Now().Add(wait); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			return nil, fmt.Errorf("%s is locked: %w", path, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	var bans []csfBan
	err = scanLines(f, path, func(line string) error {
		if b, ok := parseCSFBan(line); ok {
			bans = append(bans, b)
		}
		return nil
	})
	return bans, err
}

// csfDenies tells whether csf.deny, or a file that it includes, has a plain
// line that covers p.
func csfDenies(path string, p netip.Prefix) (bool, error) {
	found := false
	files := []string{path}
	for i := 0; i < len(files) && i < 20; i++ {
		err := eachLine(files[i], func(line string) error {
			if file, ok := strings.CutPrefix(line, "Include"); ok {
				if file = strings.TrimSpace(file); filepath.IsAbs(file) && !slices.Contains(files, file) {
					files = append(files, file)
				}
				return nil
			}
			value, _, _ := strings.Cut(line, "#")
			if fields := strings.Fields(value); len(fields) > 0 {
				d, ok := csfPrefix(fields[0])
				found = found || ok && d.Bits() <= p.Bits() && d.Contains(p.Addr())
			}
			return nil
		})
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
	}
	return found, nil
}

// eachLine gives the lines of a file, bounded in number and length.
func eachLine(path string, each func(string) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return scanLines(f, path, each)
}

func scanLines(f io.Reader, path string, each func(string) error) error {
	s := bufio.NewScanner(io.LimitReader(f, csfFileMax))
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		if err := each(s.Text()); err != nil {
			return err
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// lfdRuns tells whether the daemon that ends temporary bans is alive.
func lfdRuns(pidFile string) bool {
	data, err := os.ReadFile(pidFile)
	if err != nil {
		return false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data[:min(len(data), 20)])))
	if err != nil || pid <= 0 {
		return false
	}
	err = unix.Kill(pid, 0)
	return err == nil || errors.Is(err, unix.EPERM)
}
