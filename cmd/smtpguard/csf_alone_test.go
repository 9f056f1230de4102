package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// TestCSFAlone: with backend csf and without a daemon a command goes on until
// CSF has made every change, far beyond what one batch of a daemon is given;
// stopped by a signal it exits with 1 and names what is left, and the next goes
// on. CSF is a stand-in, in a mount namespace, with its rules in a network
// namespace.
func TestCSFAlone(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, errors.New("a private /etc needs root"))
	}
	for _, c := range []string{"unshare", "iptables", "ip6tables"} {
		if _, err := exec.LookPath(c); err != nil {
			skip(t, err)
		}
	}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"policy.yaml": "mode: enforce\nconfirm: off\nlogs: [" + dir + "/main.log]\nfirewall: {backend: csf}\nstore: {path: " + dir + "/s.db}\ncontrol: {socket: " + dir + "/s.sock}\n",
		// As CSF 15.10: a line in csf.tempban, a rule in DENYIN.
		"csf": `#!/bin/sh
f=/var/lib/csf/csf.tempban
case $1 in
-td) iptables -w -A DENYIN -s "$2" -j DROP && echo "$(date +%s)|$2|$5|$7|$3|smtpguard: connection flood" >>$f ;;
-trd) iptables -w -D DENYIN -s "$2" -j DROP; grep -vF "|$2|" $f >$f.new; mv $f.new $f ;;
esac
`,
		"story": `set -eu
dir=$1
cp -a /etc "$dir/etc"
mount --bind "$dir/etc" /etc
mount -t tmpfs none /run
mount -t tmpfs none /var/lib
mkdir -p /etc/csf /var/lib/csf
printf 'IPV6 = "1"\nDENY_TEMP_IP_LIMIT = "100"\n' >/etc/csf/csf.conf
: >/var/lib/csf/csf.tempban
iptables -N DENYIN
ip6tables -N DENYIN
left() { echo "$1 $(wc -l </var/lib/csf/csf.tempban) bans, $(iptables -S DENYIN | grep -c DROP || :) rules"; }
: >"$dir/main.log"
smtpguard run 2>"$dir/run.log" & # it makes the store
p=$!
for i in $(seq 1000); do [ ! -S "$dir/s.sock" ] || break; sleep 0.02; done
kill -TERM $p
wait $p || : # it may have been about to start
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14; do echo 192.0.2.$i; done >"$dir/list"
smtpguard block --for 1h --file "$dir/list" >/dev/null
left blocked:
smtpguard unblock --all >"$dir/out" 2>"$dir/err" &
p=$!
for i in $(seq 1000); do [ "$(wc -l </var/lib/csf/csf.tempban)" = 14 ] || break; sleep 0.02; done
kill -TERM $p
status=0
wait $p || status=$?
echo "unblock: exit $status"
n=$(wc -l </var/lib/csf/csf.tempban)
echo "lifted and left: $(($(wc -l <"$dir/out") + n))"
[ "$n" -gt 9 ] || echo "it was not stopped"
sed 's/192[0-9./, ]*and/THESE and/; s/192[0-9./, ]*;/THESE;/; s/unblock [0-9./]*/unblock ONE/' "$dir/err"
smtpguard firewall sync 2>/dev/null
left synced:
`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "sh", filepath.Join(dir, "story"), dir)
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "SMTPGUARD_POLICY="+dir+"/policy.yaml", "XTABLES_LOCKFILE="+dir+"/xtables.lock")
	out, err := cmd.CombinedOutput()
	if err != nil && strings.Contains(string(out), "mount:") {
		skip(t, errors.New("no private mounts can be made here: "+string(out)))
	}
	want := regexp.MustCompile(`^(CSF makes a few changes a second: \d+ of 14 are made .*\n)+blocked: 14 bans, 14 rules
unblock: exit 1
lifted and left: 14
(CSF makes .*\n)*smtpguard: lifted, but the packet filter still drops THESE; no daemon runs that would try again: having CSF unblock ONE: context canceled
hint: ` + "`smtpguard firewall sync` goes on, and so does the next start of the daemon" + `
the packet filter holds 0 blocks
synced: 0 bans, 0 rules
$`)
	if err != nil || !want.Match(out) {
		t.Errorf("%v\n%s", err, out)
	}
}
