package firewall

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func (r csfRoot) teller(t testing.TB, o Options) *CSFTeller {
	t.Helper()
	tell := newCSFTeller(r.open(t, o))
	tell.every = time.Millisecond
	return tell
}

// tells is what CSF is told, in the order of importance: "192.0.2.7/32 10m".
func tells(t *CSFTeller, script string) {
	var es []Entry
	for part := range strings.SplitSeq(script, ",") {
		if f := strings.Fields(part); len(f) == 2 {
			d, err := time.ParseDuration(f[1])
			if err != nil {
				panic(err)
			}
			es = append(es, Entry{netip.MustParsePrefix(f[0]), time.Now().Add(d)})
		}
	}
	t.Tell(es)
}

// passes goes on until there is nothing more to do.
func passes(t testing.TB, tell *CSFTeller) {
	t.Helper()
	for range 200 {
		more, err := tell.pass(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if !more {
			return
		}
		time.Sleep(time.Until(tell.next))
	}
	t.Fatal("it does not come to an end")
}

// TestCSFTell: what CSF has before, what it is told, and what it then has.
func TestCSFTell(t *testing.T) {
	const c = csfComment + csfTold
	const told = "|25,465,587|in|600|" + c + "\n"
	lfd := func(n int) string {
		var s strings.Builder
		for i := range n {
			s.WriteString(ban(0, "198.51.100."+string(rune('1'+i))+"||in|3600|lfd"))
		}
		return s.String()
	}
	theirs := func(n int) string { return strings.ReplaceAll(near(csfNow(lfd(n))), "AGO", "NOW") }
	for _, tc := range []struct {
		name, conf, tempban, deny, tell string
		dead                            bool // lfd
		want                            string
		status                          CSFStatus
		err                             string
	}{
		{name: "nothing", status: CSFStatus{}},
		{name: "told", tell: "192.0.2.0/24 10m, 192.0.2.7/32 10m", want: "NOW|192.0.2.0/24" + told + "NOW|192.0.2.7" + told,
			status: CSFStatus{Told: 2, Of: 2, Most: 80}},
		{name: "told already, by an earlier process", tempban: ban(0, "192.0.2.7|25,465,587|in|600|"+c), tell: "192.0.2.7/32 10m",
			want: "NOW|192.0.2.7" + told, status: CSFStatus{Told: 1, Of: 1, Most: 80}},
		{name: "over", tempban: ban(0, "192.0.2.7|25,465,587|in|600|"+c) + ban(0, "192.0.2.8||in|600|theirs"), tell: "",
			want: "NOW|192.0.2.8||in|600|theirs\n", status: CSFStatus{Most: 79}},
		{name: "what the backend csf left is ours", tempban: ban(0, "192.0.2.7|25,465,587|in|600|"+csfComment), tell: "", status: CSFStatus{Most: 80}},
		{name: "longer", tempban: ban(0, "192.0.2.7|25,465,587|in|600|"+c), tell: "192.0.2.7/32 20m",
			want: "NOW|192.0.2.7|25,465,587|in|1200|" + c + "\n", status: CSFStatus{Told: 1, Of: 1, Most: 80}},
		{name: "not beyond its room", conf: "DENY_TEMP_IP_LIMIT = \"10\"\n", tempban: lfd(6), tell: "192.0.2.0/24 10m, 192.0.2.1/32 10m, 192.0.2.2/32 10m",
			want: theirs(6) + "NOW|192.0.2.0/24" + told + "NOW|192.0.2.1" + told, status: CSFStatus{Told: 2, Of: 3, Most: 2}},
		{name: "it makes room when others come", conf: "DENY_TEMP_IP_LIMIT = \"10\"\n",
			tempban: lfd(7) + ban(0, "192.0.2.1|25,465,587|in|600|"+c) + ban(0, "192.0.2.0/24|25,465,587|in|600|"+c), tell: "192.0.2.0/24 10m, 192.0.2.1/32 10m",
			want: theirs(7) + "NOW|192.0.2.0/24" + told, status: CSFStatus{Told: 1, Of: 2, Most: 1}},
		{name: "no room at all", conf: "DENY_TEMP_IP_LIMIT = \"4\"\n", tempban: lfd(6), tell: "192.0.2.0/24 10m", want: theirs(6), status: CSFStatus{Of: 1}},
		{name: "no limit", conf: "DENY_TEMP_IP_LIMIT = \"0\"\n", tell: "192.0.2.7/32 10m", want: "NOW|192.0.2.7" + told, status: CSFStatus{Told: 1, Of: 1, Most: csfTellMost}},
		{name: "bans of others stay as they are", tempban: ban(0, "192.0.2.7|25,465,587|in|60|lfd"), tell: "192.0.2.7/32 10m",
			want: "NOW|192.0.2.7|25,465,587|in|60|lfd\n", status: CSFStatus{Of: 1, Most: 79}},
		{name: "in csf.deny", deny: "192.0.2.7 # by hand\n", tell: "192.0.2.7/32 10m", status: CSFStatus{Told: 1, Of: 1, Most: 80}},
		{name: "about to end", tell: "192.0.2.7/32 20s", status: CSFStatus{Of: 1, Most: 80}},
		{name: "IPv6 is off", conf: "IPV6 = \"0\"\n", tell: "2001:db8::/64 10m, 192.0.2.7/32 10m", want: "NOW|192.0.2.7" + told, status: CSFStatus{Told: 1, Of: 2, Most: 80}},
		{name: "lfd is dead: nothing is told, and what was is taken back", dead: true, tempban: ban(0, "192.0.2.8|25,465,587|in|600|"+c) + ban(time.Hour, "192.0.2.9|25,465,587|in|600|"+c),
			tell: "192.0.2.7/32 10m", status: CSFStatus{Of: 1, Most: 80}, err: "lfd does not run"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			r := newFakeCSF(t, tc.conf)
			if tc.conf == "" || !strings.Contains(tc.conf, "IPV6") {
				r.write(t, "etc/csf/csf.conf", "IPV6 = \"1\"\n"+tc.conf)
			}
			if !tc.dead {
				r.write(t, "var/run/lfd.pid", "1\n")
			}
			r.write(t, "var/lib/csf/csf.tempban", tc.tempban)
			r.write(t, "etc/csf/csf.deny", tc.deny)
			tell := r.teller(t, Options{Ports: []uint16{25, 465, 587}})
			tells(tell, tc.tell)
			if tc.err == "" {
				passes(t, tell)
			} else if _, err := tell.pass(t.Context()); err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%v", err)
			}
			if got := sortedLines(near(r.read(t, "var/lib/csf/csf.tempban"))); got != sortedLines(tc.want) {
				t.Errorf("csf.tempban:\n%swant\n%s", got, tc.want)
			}
			got := tell.Status()
			if tc.err != "" && !strings.Contains(got.Error, tc.err) {
				t.Errorf("status: %+v", got)
			}
			if got.Error = ""; got != tc.status {
				t.Errorf("status: %+v, want %+v", got, tc.status)
			}
			// And again, by the next process: nothing is left to do.
			before := r.read(t, "calls")
			next := r.teller(t, Options{Ports: []uint16{25, 465, 587}})
			tells(next, tc.tell)
			_, _ = next.pass(t.Context())
			if after := r.read(t, "calls"); after != before && tc.deny == "" {
				t.Errorf("calls of the next process: %q", strings.TrimPrefix(after, before))
			}
		})
	}
}

// csfNow is csfRoot.read for a text.
func csfNow(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		_, rest, _ := strings.Cut(line, "|")
		b.WriteString("NOW|" + rest)
	}
	return b.String()
}

// TestCSFTellerRun: blocks come and end, CSF breaks and is repaired; each
// change of its state is told once.
func TestCSFTellerRun(t *testing.T) {
	r := newFakeCSF(t, "")
	r.write(t, "var/run/lfd.pid", "1\n")
	tell := r.teller(t, Options{})
	ctx, cancel := context.WithCancel(t.Context())
	news, done := make(chan error, 100), make(chan struct{})
	go func() { defer close(done); tell.Run(ctx, func(err error) { news <- err }) }()
	defer func() { cancel(); <-done }()
	until := func(what string, f func() bool) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); !f(); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("not %s; status %+v, csf.tempban:\n%s", what, tell.Status(), r.read(t, "var/lib/csf/csf.tempban"))
			}
		}
	}
	bans := func() int { return strings.Count(r.read(t, "var/lib/csf/csf.tempban"), csfTold) }
	tells(tell, "192.0.2.0/24 10m, 192.0.2.7/32 10m, 2001:db8::/64 10m")
	until("told", func() bool { return bans() == 3 && tell.Status().Told == 3 })
	tells(tell, "192.0.2.7/32 10m")
	until("taken back", func() bool { return bans() == 1 && tell.Status().Over == 0 })
	if len(news) > 0 {
		t.Error(<-news)
	}
	r.write(t, "etc/csf/csf.disable", "")
	tells(tell, "")
	if err := <-news; err == nil || !strings.Contains(err.Error(), "csf -e enables it") {
		t.Error(err)
	}
	tells(tell, "") // once is enough
	if err := os.Remove(r.path("etc/csf/csf.disable")); err != nil {
		t.Fatal(err)
	}
	if err := <-news; err != nil {
		t.Error(err)
	}
	until("empty", func() bool { return bans() == 0 })
	if len(news) > 0 {
		t.Errorf("told again: %v", <-news)
	}
}

// TestCSFTellRefused: one block that CSF does not want stops no other, and is
// not tried again and again.
func TestCSFTellRefused(t *testing.T) {
	r := newFakeCSF(t, "")
	r.write(t, "var/run/lfd.pid", "1\n")
	real := r.read(t, "csf")
	r.write(t, "csf", strings.Replace(real, "#!/bin/sh\n", "#!/bin/sh\ncase \"$2\" in 192.0.2.7) echo \"deny failed: [$2] is one of this servers addresses!\"; echo \"$@\" >>"+r.path("calls")+"; exit 0;; esac\n", 1))
	tell := r.teller(t, Options{})
	tells(tell, "192.0.2.7/32 10m, 192.0.2.8/32 10m")
	for range 5 {
		if _, err := tell.pass(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Until(tell.next))
	}
	calls := slices.Collect(strings.Lines(r.read(t, "calls")))
	if len(calls) != 2 || tell.Status().Told != 1 {
		t.Errorf("%+v, calls %q", tell.Status(), calls)
	}
}

// TestCSFTellerOwes: bans of others that a killed process took along are back
// with the first look, though nothing is to be told.
func TestCSFTellerOwes(t *testing.T) {
	for _, tell := range []string{"", "192.0.2.7/32 10m"} {
		r := newFakeCSF(t, "")
		r.write(t, "var/run/lfd.pid", "1\n")
		r.write(t, "csf.owed", ban(0, "192.0.2.9|22|in|3600|lfd"))
		have := ""
		if tell != "" { // and is told already
			have = ban(0, "192.0.2.7||in|600|"+csfComment+csfTold)
		}
		r.write(t, "var/lib/csf/csf.tempban", have)
		teller := r.teller(t, Options{State: string(r)})
		tells(teller, tell)
		passes(t, teller)
		if got := near(r.read(t, "var/lib/csf/csf.tempban")); !strings.Contains(got, "NOW|192.0.2.9|22|in|3600|lfd\n") {
			t.Errorf("told %q; csf.tempban:\n%s", tell, got)
		}
	}
}

// TestCSFTellerOwesRefused: what CSF does not take back is in the status.
func TestCSFTellerOwesRefused(t *testing.T) {
	r := newFakeCSF(t, "")
	r.write(t, "var/run/lfd.pid", "1\n")
	r.write(t, "csf.owed", ban(0, "192.0.2.9|22|in|3600|lfd"))
	r.write(t, "csf", "#!/bin/sh\necho no\n")
	teller := r.teller(t, Options{State: string(r)})
	tells(teller, "")
	passes(t, teller)
	if got := teller.Status().Error; !strings.Contains(got, "csf -td 192.0.2.9: it did not ban it") {
		t.Errorf("status: %q", got)
	}
}

// TestCSFTellerSettle: a command without a daemon takes back what is over.
func TestCSFTellerSettle(t *testing.T) {
	r := newFakeCSF(t, "")
	r.write(t, "var/run/lfd.pid", "1\n")
	for _, a := range []string{"1", "2", "3"} {
		f := r.read(t, "var/lib/csf/csf.tempban")
		r.write(t, "var/lib/csf/csf.tempban", strings.ReplaceAll(f, "NOW", "1")+ban(0, "192.0.2."+a+"||in|600|"+csfComment+csfTold))
	}
	tell := r.teller(t, Options{})
	tells(tell, "")
	if err := tell.Settle(t.Context()); err != nil {
		t.Error(err)
	}
	if got := r.read(t, "var/lib/csf/csf.tempban"); strings.Contains(got, "NOW") {
		t.Error(got)
	}
	r.write(t, "var/lib/csf/csf.tempban", ban(0, "192.0.2.9||in|600|"+csfComment+csfTold))
	r.write(t, "restarting", "")
	var left *RemainError
	if err := tell.Settle(t.Context()); !errors.As(err, &left) || !strings.Contains(err.Error(), "1 of our bans are left (192.0.2.9/32): ") || !strings.Contains(err.Error(), "csf is being restarted") {
		t.Error(err)
	}
}
