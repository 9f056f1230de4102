package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"
)

// manualWorld is the machine on which the manual's commands run: mounts and a
// network of its own, with the files of a mail server on cPanel. sudo,
// systemctl and exim are stand-ins, for there is none of them in a namespace:
// the second starts the program as the unit would, the third tells settings.
// "flood ADDRESS" writes to the log what a flood by it looks like, and waits
// for the block. What is in /root/.env is set for every command.
const manualWorld = `set -eu
world=${1:?} docs=${2:?}
mount --make-rprivate /
mkdir "$world/etc" "$world/bin"
cp -a /etc/. "$world/etc"
rm -rf "$world/etc/csf" "$world/etc/smtpguard"
mount --bind "$world/etc" /etc
for d in /var/log /var/lib /var/spool /run /root; do mount -t tmpfs tmpfs $d; done
ip link set lo up
cat >"$world/bin/sudo" <<'EOF'
#!/bin/sh
exec "$@"
EOF
cat >"$world/bin/systemctl" <<'EOF'
#!/bin/sh
pid=/run/daemon.pid
stop() { [ -e $pid ] || return 0; kill "$(cat $pid)"; while kill -0 "$(cat $pid)" 2>/dev/null; do sleep 0.05; done; rm -f $pid; }
start() {
	[ ! -e $pid ] || return 0
	smtpguard run </dev/null >/dev/null 2>>/var/log/smtpguard.log & echo $! >$pid
	n=0; until smtpguard status >/dev/null 2>&1; do n=$((n+1)); [ $n -lt 200 ] || { cat /var/log/smtpguard.log; exit 1; }; sleep 0.05; done
}
case "$*" in
*reload*) kill -HUP "$(cat $pid)"; sleep 0.5 ;;
*restart*) stop; start ;;
*stop*|*disable*) stop ;;
*start*|*enable*) start ;;
*) exit 2 ;;
esac
EOF
cat >"$world/bin/exim4" <<'EOF'
#!/bin/sh
cat <<'END'
smtp_accept_max = 100
smtp_receive_timeout = 2m45s
log_selector = +incoming_port +smtp_connection +all_parents +retry_defer +subject +arguments +received_recipients
log_file_path = /var/log/exim_%slog
spool_directory = /var/spool/exim
timezone =
no_log_timezone
END
EOF
cat >"$world/bin/flood" <<'EOF'
#!/bin/sh
awk -v a="$1" -v now="$(date "+%F %T")" 'BEGIN { for (i = 1; i <= 150; i++)
	printf "%s SMTP connection from [%s]:%d (TCP/IP connection count = %d)\n", now, a, 20000+i, i < 100 ? i : 100 }' >>/var/log/exim_mainlog
n=0; until smtpguard blocks list | grep -q "^$1"; do n=$((n+1)); [ $n -lt 200 ] || exit 1; sleep 0.05; done
EOF
chmod 755 "$world/bin/"*
PATH="$world/bin:$PATH"
# An Exim that listens: diagnose looks whether there is one.
cp "$(command -v perl)" "$world/bin/eximd"
eximd -MIO::Socket::INET -e 'my $s = IO::Socket::INET->new(Listen => 5, LocalPort => 25) or die $!;
	exit if fork; close $s->accept while 1' </dev/null >/dev/null 2>&1
mkdir -p /etc/smtpguard
cp "$docs/policy.yaml" /etc/smtpguard/policy.yaml
sed -i 's/max_age: 30d/max_age: 3650d/' /etc/smtpguard/policy.yaml # the log grows old
cp "$docs/flood.log" /var/log/exim_mainlog
touch -d "2026-11-22 19:45:07 UTC" /var/log/exim_mainlog
cd /root
touch .env
n=0
while [ -e "$world/$n.sh" ]; do
	rc=0
	timeout 60 sh -euc '. /root/.env; . "$1"' sh "$world/$n.sh" >"$world/$n.out" 2>&1 </dev/null || rc=$?
	echo $rc >"$world/$n.rc"
	n=$((n+1))
done
systemctl stop
`

// manualCommand is one command of the manual.
type manualCommand struct {
	place   string // "install.md:12"
	command string
	output  []string // what it prints, with … for anything
	status  int
}

var (
	notRun = regexp.MustCompile(`^<!-- not run: .+ -->$`)
	exits  = regexp.MustCompile(`^<!-- exits ([0-9]+) -->$`)
	before = regexp.MustCompile(`^<!-- before: (.+) -->$`)
	spoken = regexp.MustCompile(`^<!-- *(not run|exits|before)`)
)

// readManual finds the commands in the indented blocks of a page: lines that
// begin with "$ ", each followed by what it prints; blocks without such a line
// are something else. A comment before a block
// says that its commands are not run and why, with which status they exit, or
// what must have happened before, which a reader need not see.
func readManual(path string) (list []manualCommand, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	last := "" // the last line that is no code
	output := false
	for i, line := range strings.Split(string(data), "\n") {
		code, indented := strings.CutPrefix(line, "    ")
		if strings.TrimSpace(line) == "" {
			continue
		}
		if !indented {
			last, output = line, false
			if m := before.FindStringSubmatch(line); m != nil {
				list = append(list, manualCommand{place: fmt.Sprintf("%s:%d", filepath.Base(path), i+1), command: m[1]})
			} else if spoken.MatchString(line) && !notRun.MatchString(line) && !exits.MatchString(line) {
				return nil, fmt.Errorf("%s:%d: what does this comment mean?", path, i+1)
			}
			continue
		}
		if notRun.MatchString(last) {
			continue
		}
		if command, ok := strings.CutPrefix(code, "$ "); ok {
			c := manualCommand{place: fmt.Sprintf("%s:%d", filepath.Base(path), i+1), command: command}
			if m := exits.FindStringSubmatch(last); m != nil {
				c.status, _ = strconv.Atoi(m[1])
			}
			list, output = append(list, c), true
		} else if output {
			c := &list[len(list)-1]
			if more, ok := strings.CutSuffix(c.command, "\\"); ok && len(c.output) == 0 {
				c.command = more + strings.TrimSpace(code)
			} else {
				c.output = append(c.output, code)
			}
		}
	}
	return list, nil
}

// prints reports the first line of the manual that is not in the output, after
// those before it.
func prints(output string, want []string) (missing string) {
	for _, line := range want {
		if strings.TrimSpace(line) == "" || strings.TrimSpace(line) == "..." {
			continue
		}
		var parts []string
		for _, part := range strings.Split(strings.TrimSpace(line), "…") {
			parts = append(parts, strings.ReplaceAll(regexp.QuoteMeta(strings.Join(strings.Fields(part), " ")), " ", `\s+`))
		}
		at := regexp.MustCompile(`(?m)` + strings.Join(parts, `.*`)).FindStringIndex(output)
		if at == nil {
			return line
		}
		output = output[at[1]:]
	}
	return ""
}

// Every command that the manual shows does what the manual says.
func TestManualCommands(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal("no manual: ", err)
	}
	pages = append(pages, "../../README.md")
	if os.Getuid() != 0 {
		skip(t, errors.New("mounts of its own need root"))
	}
	smtpguard, err := exec.LookPath("smtpguard") // see TestMain
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range pages {
		t.Run(filepath.Base(page), func(t *testing.T) {
			t.Parallel()
			commands, err := readManual(page)
			if err != nil {
				t.Fatal(err)
			}
			if len(commands) == 0 {
				return
			}
			world, data := t.TempDir(), t.TempDir()
			for name, from := range map[string]string{"policy.yaml": "../../policy.yaml", "flood.log": "../../testdata/corpus/h-one-ip-hold.log"} {
				b, err := os.ReadFile(from)
				if err == nil {
					err = os.WriteFile(filepath.Join(data, name), b, 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			for i, c := range commands {
				if err := os.WriteFile(filepath.Join(world, fmt.Sprint(i, ".sh")), []byte(c.command+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", manualWorld, "sh", world, data)
			cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(smtpguard)+":"+os.Getenv("PATH")+":/usr/sbin:/sbin", "TZ=UTC")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			for i, c := range commands {
				out, _ := os.ReadFile(filepath.Join(world, fmt.Sprint(i, ".out")))
				rc, _ := os.ReadFile(filepath.Join(world, fmt.Sprint(i, ".rc")))
				if got := strings.TrimSpace(string(rc)); got != strconv.Itoa(c.status) {
					t.Errorf("%s: %s\nexit status %s, want %d:\n%s", c.place, c.command, got, c.status, out)
				} else if missing := prints(string(out), c.output); missing != "" {
					t.Errorf("%s: %s\ndoes not print\n%s\nbut:\n%s", c.place, c.command, missing, out)
				}
			}
		})
	}
}

// Links between the pages lead somewhere, and the index has every page.
func TestManualLinks(t *testing.T) {
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatal("no manual: ", err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(#[^)]*)?\)`)
	indexed := make(map[string]bool)
	for _, page := range append(pages, "../../README.md") {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(data), -1) {
			to := filepath.Join(filepath.Dir(page), m[1])
			if _, err := os.Stat(to); err != nil {
				t.Errorf("%s: %v", page, err)
			}
			if page == "../../docs/README.md" {
				indexed[to] = true
			}
		}
	}
	for _, page := range pages {
		if !indexed[page] && filepath.Base(page) != "README.md" {
			t.Errorf("docs/README.md does not name %s", page)
		}
	}
}
