package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// TestLeftInKernel: what a killed daemon left in the kernel and the store calls
// lifted is dropped no longer in mode: observe either, whether a daemon starts,
// or reloads, or a command without one makes the packet filter what it should
// be. The kernel is one of a network namespace; that blocks are lifted without
// it is done by a command in another.
func TestLeftInKernel(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, errors.New("network namespaces need root"))
	}
	for _, c := range []string{"unshare", "nft", "iptables", "ipset"} {
		if _, err := exec.LookPath(c); err != nil {
			skip(t, err)
		}
	}
	const begin = `set -eu
dir=$1
left() { echo "$1: $(nft list ruleset | grep -c 198.51.100.7 || :) in the kernel"; }
policy() { sed "s/MODE/$1/" "$dir/policy.in" >"$dir/policy.yaml"; }
ready() { for i in $(seq 1500); do smtpguard status >/dev/null 2>&1 && return; sleep 0.02; done; echo "no daemon"; }
: >"$dir/main.log"
policy enforce
smtpguard run 2>>"$dir/run.log" &
p=$!
ready
smtpguard block 198.51.100.7 --for 1h >/dev/null
left blocked
`
	const lifted = `kill -KILL $p
{ wait $p || :; } 2>/dev/null
rm -f "$dir/s.sock"
unshare --net smtpguard unblock 198.51.100.7 >/dev/null
left lifted
policy observe
`
	for name, c := range map[string]struct{ story, want string }{
		"start": {begin + lifted + `smtpguard run 2>>"$dir/run.log" &
p=$!
ready
for i in $(seq 500); do nft list ruleset | grep -q 198.51.100.7 || break; sleep 0.02; done
left observed
kill -TERM $p
wait $p || :
`, "blocked: 1 in the kernel\nlifted: 1 in the kernel\nobserved: 0 in the kernel\n"},
		"alone": {begin + lifted + `smtpguard firewall sync
left synced
`, "blocked: 1 in the kernel\nlifted: 1 in the kernel\nthe packet filter holds 0 blocks\nsynced: 0 in the kernel\n"},
		// The emergency exit looks into the kernel, whatever the policy names.
		"flush with backend memory": {begin + `kill -KILL $p
{ wait $p || :; } 2>/dev/null
sed -i 's/enforce/observe/; s/nftables/memory/' "$dir/policy.yaml"
smtpguard firewall status
smtpguard firewall flush | sed 's/ (made.*//'
left flushed
`, `blocked: 1 in the kernel
nftables: 1 block in force
the block of 198.51.100.7/32 is lifted
nothing of ours is in the packet filter any more
flushed: 0 in the kernel
`},
		// It does not wait for a daemon that hangs, and says what that one will
		// do. No command waits half a minute.
		"flush beside a daemon that hangs": {begin + `kill -STOP $p
smtpguard unblock 198.51.100.7 2>&1 | sed "s/$p/PID/" || :
smtpguard reports list 2>&1 | grep -c 'has not answered for 5s'
smtpguard firewall flush 2>&1 | sed "s/$p/PID/"
left flushed
kill -CONT $p
for i in $(seq 500); do nft list ruleset | grep -q 198.51.100.7 && break; sleep 0.02; done
left woken
kill -KILL $p
{ wait $p || :; } 2>/dev/null
smtpguard firewall flush | sed 's/ (made.*//'
left 'flushed again'
`, `blocked: 1 in the kernel
smtpguard: the daemon (process PID) runs, and has not answered for 5s
hint: ` + "`kill -KILL PID` ends it, and `systemctl start smtpguard` starts it again; blocks stay in force meanwhile, and `smtpguard firewall flush` takes them out without it" + `
1
nothing of ours is in the packet filter any more
smtpguard: the daemon (process PID) runs, and has not answered for 5s: it still has every block, and puts them back when it goes on
hint: ` + "`kill -KILL PID` ends it; then `smtpguard firewall flush` once more lifts the blocks for good" + `
flushed: 0 in the kernel
woken: 1 in the kernel
the block of 198.51.100.7/32 is lifted
nothing of ours is in the packet filter any more
flushed again: 0 in the kernel
`},
		// A daemon that is killed while it moves from one packet filter to another
		// has blocks in both. A command without a daemon lifts them in both, and
		// so it does in the old one where only the policy has changed so far.
		"killed while it moved": {`set -eu
dir=$1
mkdir "$dir/bin"
for c in iptables iptables-save iptables-restore ip6tables ip6tables-save ip6tables-restore; do
	printf '#!/bin/sh\nwhile [ -e %s/slow ]; do sleep 0.02; done\nexec %s "$@"\n' "$dir" "$(command -v $c)" >"$dir/bin/$c"
	chmod +x "$dir/bin/$c"
done
PATH=$dir/bin:$PATH
left() { echo "$1: $(nft list table inet smtpguard 2>/dev/null | grep -c "elements.*$2" || :) in nftables, $(ipset list smtpguard4 2>/dev/null | grep -c "^$2" || :) in the ipset"; }
ready() { for i in $(seq 1500); do smtpguard status >/dev/null 2>&1 && return; sleep 0.02; done; echo "no daemon"; }
: >"$dir/main.log"
sed 's/MODE/enforce/; s/nftables/iptables/' "$dir/policy.in" >"$dir/policy.yaml"
smtpguard run 2>>"$dir/run.log" &
p=$!
ready
smtpguard block 198.51.100.7 --for 1h >/dev/null
smtpguard block 198.51.100.8 --for 1h >/dev/null
kill -TERM $p
wait $p
sed 's/MODE/enforce/' "$dir/policy.in" >"$dir/policy.yaml"
smtpguard unblock 198.51.100.8 >/dev/null
left 'policy edited' 198.51.100.8
touch "$dir/slow"
smtpguard run 2>>"$dir/run.log" &
p=$!
ready
left moving 198.51.100.7
kill -KILL $p
{ wait $p || :; } 2>/dev/null
rm "$dir/slow" "$dir/s.sock"
smtpguard unblock 198.51.100.7 >/dev/null
left lifted 198.51.100.7
`, `policy edited: 0 in nftables, 0 in the ipset
moving: 1 in nftables, 1 in the ipset
lifted: 0 in nftables, 0 in the ipset
`},
		// A fault in the policy, and no daemon: who is locked out is let in all the
		// same; who would have to be looked up in the policy is not blocked.
		"faulty policy": {begin + `kill -TERM $p
wait $p
echo 'mode: enforec' >"$dir/policy.yaml"
sg() { smtpguard --store "$dir/s.db" --socket "$dir/s.sock" "$@" 2>"$dir/err" && s=0 || s=$?; echo "$s $(grep -c 'the policy cannot be used' "$dir/err" || :)"; }
sg status
grep -o 'no smtpguard is running.*yaml:1:7' "$dir/err" | sed 's/:.*//'
sg explain 198.51.100.7 | sed 's/until.*//'
sg block 198.51.100.8
left 'not blocked'
sg allow add 198.51.100.9
sg unblock 198.51.100.7 | sed 's/ (made.*//'
left unblocked
sg firewall status
`, `blocked: 1 in the kernel
1 0
no smtpguard is running, and it will not start
198.51.100.7/32  in force 
  why            by hand
0 1
1 0
not blocked: 1 in the kernel
198.51.100.9/32 is never blocked
0 1
the block of 198.51.100.7/32 is lifted
0 1
unblocked: 0 in the kernel
nftables: 0 blocks in force
0 1
`},
		// Where enforcing began with a reload, what observed before must not have
		// been taken for all there ever was.
		"after a reload": {`set -eu
dir=$1
sed "s/MODE/observe/" "$dir/policy.in" >"$dir/policy.yaml"
: >"$dir/main.log"
smtpguard run 2>>"$dir/run.log" &
first=$!
for i in $(seq 1500); do smtpguard status >/dev/null 2>&1 && break; sleep 0.02; done
sed "s/MODE/enforce/" "$dir/policy.in" >"$dir/policy.yaml"
kill -HUP $first
for i in $(seq 1500); do smtpguard status | grep -qi enforce && break; sleep 0.02; done
left() { echo "$1: $(nft list ruleset | grep -c 198.51.100.7 || :) in the kernel"; }
policy() { sed "s/MODE/$1/" "$dir/policy.in" >"$dir/policy.yaml"; }
ready() { for i in $(seq 1500); do smtpguard status >/dev/null 2>&1 && return; sleep 0.02; done; echo "no daemon"; }
smtpguard block 198.51.100.7 --for 1h >/dev/null
left blocked
p=$first
` + lifted + `smtpguard run 2>>"$dir/run.log" &
p=$!
ready
for i in $(seq 500); do nft list ruleset | grep -q 198.51.100.7 || break; sleep 0.02; done
left observed
kill -TERM $p
wait $p || :
`, "blocked: 1 in the kernel\nlifted: 1 in the kernel\nobserved: 0 in the kernel\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range map[string]string{
				"policy.in": "mode: MODE\nconfirm: off\nlogs: [" + dir + "/main.log]\nfirewall: {backend: nftables}\nstore: {path: " + dir + "/s.db}\ncontrol: {socket: " + dir + "/s.sock}\n",
				"story":     c.story,
			} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, "unshare", "--net", "--pid", "--fork", "--kill-child", "sh", filepath.Join(dir, "story"), dir)
			cmd.Env = append(os.Environ(), "SMTPGUARD_POLICY="+dir+"/policy.yaml")
			out, err := cmd.CombinedOutput()
			if err != nil || string(out) != c.want {
				log, _ := os.ReadFile(filepath.Join(dir, "run.log"))
				t.Errorf("%v\n%swant\n%s\nthe daemons said:\n%s", err, out, c.want, log)
			}
		})
	}
}
