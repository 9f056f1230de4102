package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
)

// The tests of this file run the real smtpguard beside a real Exim with 100
// slots, in network namespaces of their own, against real attackers.

func init() { lab.Serve() }

// What is promised: mail is accepted again within 10 s of the server being
// full, and within 2 s of the verdict. The daemon's own measure of the second
// is taken as it is; what the sender sees has some slack for a busy machine.
const (
	promisedFromFull    = 10 * time.Second
	promisedFromVerdict = 2 * time.Second
	slack               = 4 * time.Second
)

// scene is a world with Exim and a sender of proper mail.
type scene struct {
	*testing.T
	w      *lab.World
	m      *lab.MTA
	d      *lab.Daemon
	sender *lab.Sender
	from   netip.Addr
}

// newScene makes a world with Exim, and mail that flows.
func newScene(t *testing.T, o lab.MTAOptions) *scene {
	t.Helper()
	if testing.Short() {
		skip(t, errors.New("-short"))
	}
	o.Kind = "exim"
	w, err := lab.New(t.Context(), lab.Options{})
	if errors.Is(err, lab.ErrNoNamespaces) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s := &scene{T: t, w: w, from: lab.SendersV4.Addr().Next()}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the daemon said:\n%s", tailOf(w.DaemonLog(), 40))
		}
		if err := w.Close(); err != nil {
			t.Error(err)
		}
	})
	s.m, err = w.StartMTA(t.Context(), o)
	if errors.Is(err, lab.ErrNoExim) {
		skip(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.sender = w.Send(t.Context(), s.from, 200*time.Millisecond, 3*time.Second)
	if _, err := s.sender.Steady(s.within(30*time.Second), 3, time.Time{}); err != nil {
		t.Fatal("before the flood: ", err)
	}
	return s
}

// skip skips a test that this machine cannot run; on a machine that must be
// able to, that is a failure.
func skip(t *testing.T, why error) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(why)
	}
	t.Skip(why)
}

func tailOf(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// within is the test's context, for d at most.
func (s *scene) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(s.Context(), d)
	s.Cleanup(cancel)
	return ctx
}

// startDaemon starts smtpguard; empty options are those of a server in
// earnest.
func (s *scene) startDaemon(o lab.DaemonOptions) {
	s.Helper()
	o.Program, o.Capacity = s.program(), s.m.Slots
	o.Mode, o.Backend = cmp.Or(o.Mode, "enforce"), cmp.Or(o.Backend, "nftables")
	var err error
	if s.d, err = s.w.StartDaemon(s.Context(), s.m, o); err != nil {
		s.Fatal(err)
	}
}

// program is the path of smtpguard. TestMain has put this program there under
// its own name: the daemon is built as the tests are, with the race detector
// if they are.
func (s *scene) program() string {
	s.Helper()
	program, err := exec.LookPath("smtpguard")
	if err != nil {
		s.Fatal(err)
	}
	return program
}

// fill starts attackers and waits until mail is refused. It returns when that
// was.
func (s *scene) fill(a lab.Attack) (*lab.Attackers, time.Time) {
	s.Helper()
	start := time.Now()
	at := s.w.Attack(s.Context(), a)
	refused, err := s.sender.First(s.within(30*time.Second), lab.Refused, start)
	if err != nil {
		s.Fatalf("the slots do not fill up: %v; attackers: %+v", err, at.Stats())
	}
	return at, refused.End()
}

// poll asks until the answer is yes.
func (s *scene) poll(what string, d time.Duration, yes func() (bool, error)) {
	s.Helper()
	for end := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		ok, err := yes()
		if err != nil {
			s.Fatalf("%s: %v", what, err)
		}
		if ok {
			return
		}
		if time.Now().After(end) {
			s.Fatalf("not within %s: %s", d, what)
		}
	}
}

// free waits until these sources hold nothing.
func (s *scene) free(sources []netip.Addr, d time.Duration) {
	s.Helper()
	s.poll("no connection of the attackers is left", d, func() (bool, error) {
		n, err := s.w.HeldBy(sources)
		return n == 0, err
	})
}

// inKernel are the prefixes that the kernel drops.
func (s *scene) inKernel() map[netip.Prefix]lab.Blocked {
	s.Helper()
	list, err := s.w.Blocked()
	if err != nil {
		s.Fatal(err)
	}
	m := make(map[netip.Prefix]lab.Blocked)
	for _, b := range list {
		if _, twice := m[b.Prefix]; twice {
			s.Errorf("%s is in the kernel twice", b.Prefix)
		}
		m[b.Prefix] = b
	}
	return m
}

// blocks are the blocks that smtpguard lists, by prefix.
func (s *scene) blocks() map[netip.Prefix]lab.Block {
	s.Helper()
	list, err := s.d.Blocks(s.Context())
	if err != nil {
		s.Fatal(err)
	}
	m := make(map[netip.Prefix]lab.Block)
	for _, b := range list {
		if _, twice := m[b.Prefix]; twice {
			s.Errorf("%s is listed twice", b.Prefix)
		}
		m[b.Prefix] = b
	}
	return m
}

// agree checks that store and kernel hold the same blocks, with the same end.
func (s *scene) agree(blocks map[netip.Prefix]lab.Block, kernel map[netip.Prefix]lab.Blocked) {
	s.Helper()
	for p, b := range blocks {
		k, ok := kernel[p]
		if !ok {
			s.Errorf("%s is blocked, says smtpguard, and the kernel does not have it", p)
			continue
		}
		if off := time.Until(b.Until) - k.Expires; off.Abs() > 5*time.Second {
			s.Errorf("%s: smtpguard blocks it for %s more, the kernel for %s", p, time.Until(b.Until), k.Expires)
		}
	}
	for p := range kernel {
		if _, ok := blocks[p]; !ok {
			s.Errorf("the kernel drops %s, and smtpguard knows nothing of it", p)
		}
	}
}

// relieved follows a flood to its end: the verdicts, the blocks in the
// kernel, the sockets gone, mail accepted; and checks how long it took.
// It returns the attackers that were blocked.
func (s *scene) relieved(sources []netip.Addr, full time.Time) (condemned []netip.Addr) {
	s.Helper()
	if _, err := s.sender.Steady(s.within(60*time.Second), 5, full); err != nil {
		s.Fatal("after the flood: ", err)
	}
	blocks, kernel := s.blocks(), s.inKernel()
	var verdict time.Time
	var worst time.Duration
	var spared []netip.Addr
	for _, a := range sources {
		b, ok := blocks[netip.PrefixFrom(a, a.BitLen())]
		if !ok {
			spared = append(spared, a)
			continue
		}
		condemned = append(condemned, a)
		if verdict.IsZero() || b.Since.Before(verdict) {
			verdict = b.Since
		}
		worst = max(worst, b.Relief)
		if b.Relief == 0 {
			s.Errorf("the daemon has not measured how long relief from %s took", a)
		}
		if b.Offence != 1 {
			s.Errorf("%s: offence %d, want the first", a, b.Offence)
		}
	}
	if len(condemned) == 0 {
		s.Fatalf("no attacker is blocked, and yet there is mail: %v", blocks)
	}
	s.free(condemned, 10*time.Second)
	// What counts is mail after the verdict: before it somebody's slot may be
	// free now and then.
	again, err := s.sender.Steady(s.within(60*time.Second), 5, verdict)
	if err != nil {
		s.Fatal("after the verdict: ", err)
	}
	// When most are gone and slots are free, the last ones may be left alone
	// until they do harm again.
	if held, err := s.w.HeldBy(spared); err != nil || held > s.m.Slots/2 {
		s.Errorf("attackers that are not blocked hold %d of %d slots (%v)", held, s.m.Slots, err)
	}
	if n := len(blocks) - len(condemned); n != 0 {
		s.Errorf("%d blocks of others than the attackers: %v", n, blocks)
	}
	s.agree(blocks, kernel)
	fromFull, fromVerdict := again.End().Sub(full), again.End().Sub(verdict)
	s.Logf("%d of %d blocked; mail again %.1f s after the server was full, %.1f s after the first verdict; the daemon's own measure: sockets gone %s after the verdict at worst",
		len(condemned), len(sources), fromFull.Seconds(), fromVerdict.Seconds(), worst.Round(time.Millisecond))
	if fromFull > promisedFromFull+slack {
		s.Errorf("mail was accepted again %s after the server was full, want %s", fromFull, promisedFromFull)
	}
	if fromVerdict > promisedFromVerdict+slack {
		s.Errorf("mail was accepted again %s after the verdict, want %s", fromVerdict, promisedFromVerdict)
	}
	if worst > promisedFromVerdict {
		s.Errorf("by the daemon's own measure it took %s from the verdict until the sockets were gone, want %s", worst, promisedFromVerdict)
	}
	return condemned
}

// five are five attackers, of both families.
func five() []netip.Addr {
	return append(lab.Addresses(lab.AttackersV4, 24, 3), lab.Addresses(lab.AttackersV6, 64, 2)...)
}

// A server whose slots are all held, by each kind of attacker, takes mail
// again; unblocked, an attacker can connect again.
func TestRelief(t *testing.T) {
	for _, kind := range lab.Kinds {
		t.Run(string(kind), func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
			s.startDaemon(lab.DaemonOptions{})
			at, full := s.fill(lab.Attack{Kind: kind, Sources: five(), Each: 22})
			condemned := s.relieved(five(), full)
			if stats := at.Stats(); stats.Lost == 0 {
				t.Errorf("the attackers have not noticed: %+v", stats)
			}
			at.Stop()

			before := len(s.blocks())
			one := condemned[0]
			if a := s.w.Deliver(t.Context(), one, 1500*time.Millisecond); a.Outcome != lab.TimedOut {
				t.Errorf("%s is blocked, but its connection ended by %s (%v)", one, a.Outcome, a.Err)
			}
			if _, err := s.d.Command(t.Context(), "unblock", one.String()); err != nil {
				t.Error(err)
			}
			if _, ok := s.inKernel()[netip.PrefixFrom(one, one.BitLen())]; ok {
				t.Errorf("%s is unblocked, but still in the kernel", one)
			}
			if a := s.w.Deliver(t.Context(), one, 10*time.Second); a.Outcome != lab.Delivered {
				t.Errorf("%s is unblocked, but its mail is not taken: %s (%v)", one, a.Outcome, a.Err)
			}
			// Nobody else was hit on the way.
			if a := s.w.Deliver(t.Context(), lab.SendersV6.Addr().Next(), 10*time.Second); a.Outcome != lab.Delivered {
				t.Errorf("an innocent sender: %s (%v)", a.Outcome, a.Err)
			}
			status, err := s.d.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !status.Firewall.Agrees || status.Blocks != before-1 {
				t.Errorf("after one unblock: %+v", status)
			}
		})
	}
}

// With Exim's default log_selector no line says who connects; the socket
// table does.
func TestReliefDefaultSelector(t *testing.T) {
	t.Parallel()
	s := newScene(t, lab.MTAOptions{})
	s.startDaemon(lab.DaemonOptions{})
	_, full := s.fill(lab.Attack{Kind: lab.Reconnect, Sources: five(), Each: 22})
	s.relieved(five(), full)
	log, err := os.ReadFile(s.m.Log)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(log), "connection count") {
		t.Error("the log has lines for new connections: this was not the default selector")
	}
}

// unread is how many connections of the mail server have answers that their
// peer does not read, and how many bytes these are (proc_net_tcp(5), tx_queue).
func (s *scene) unread() (n int, queued uint64, err error) {
	err = s.w.InServer(func() error {
		for _, name := range []string{"tcp", "tcp6"} {
			data, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(data)) {
				f := strings.Fields(line)
				if len(f) < 5 || !strings.HasSuffix(f[1], fmt.Sprintf(":%04X", lab.SMTPPort)) || f[3] != "01" {
					continue
				}
				tx, _, _ := strings.Cut(f[4], ":")
				if q, err := strconv.ParseUint(tx, 16, 64); err == nil && q > 0 {
					n++
					queued += q
				}
			}
		}
		return nil
	})
	return n, queued, err
}

// Why sockets are destroyed: a packet filter alone leaves the slots taken
// until Exim's own timeout, and for ever by peers that never read.
func TestDropAlone(t *testing.T) {
	const timeout = 30 * time.Second // smtp_receive_timeout; 5 minutes in earnest
	drop := func(s *scene, sources []netip.Addr) time.Time {
		fw, _, err := firewall.Open(s.Context(), "nftables", firewall.Options{Ports: []uint16{lab.SMTPPort}, NetNS: s.w.NetNS()})
		if err != nil {
			s.Fatal(err)
		}
		s.Cleanup(func() { fw.Close(context.WithoutCancel(s.Context()), false) })
		if _, err := fw.Ensure(s.Context()); err != nil {
			s.Fatal(err)
		}
		var b firewall.Batch
		for _, a := range sources {
			b.Set = append(b.Set, firewall.Entry{Prefix: netip.PrefixFrom(a, a.BitLen()), Until: time.Now().Add(10 * time.Minute)})
		}
		if _, err := fw.Apply(s.Context(), b); err != nil {
			s.Fatal(err)
		}
		return time.Now()
	}
	destroy := func(s *scene, sources []netip.Addr) {
		table, err := sockets.Open(sockets.Options{NetNS: s.w.NetNS()})
		if err != nil {
			s.Fatal(err)
		}
		defer table.Close()
		for _, a := range sources {
			if _, err := table.End(s.Context(), []netip.Prefix{netip.PrefixFrom(a, a.BitLen())}, []uint16{lab.SMTPPort}); err != nil {
				s.Fatal(err)
			}
		}
	}

	t.Run("silent", func(t *testing.T) {
		t.Parallel()
		s := newScene(t, lab.MTAOptions{ReceiveTimeout: timeout})
		_, full := s.fill(lab.Attack{Kind: lab.Silent, Sources: five(), Each: 22})
		// A slot that is the sender's own when the rule comes would be free
		// again at once, and nobody could take it.
		s.poll("every slot is held by the attackers", 20*time.Second, func() (bool, error) {
			n, err := s.w.HeldBy(five())
			return n >= 100, err
		})
		dropped := drop(s, five())
		again, err := s.sender.Steady(s.within(timeout+30*time.Second), 5, dropped)
		if err != nil {
			t.Fatal(err)
		}
		took := again.End().Sub(dropped)
		t.Logf("DROP alone: mail again after %.1f s, with a timeout of %s (289 s with Exim's 5 minutes)", took.Seconds(), timeout)
		// From the first connection it is the timeout, by Exim's own clock.
		if sinceFull := again.End().Sub(full); sinceFull < timeout/2 {
			t.Errorf("mail was accepted %s after the server was full: the rule alone has freed slots, which changes what we know", sinceFull)
		}
	})
	t.Run("nonreader", func(t *testing.T) {
		t.Parallel()
		// Few slots, and a timeout that is long for them: each child answers
		// thousands of recipients before its write blocks, and a busy machine
		// must not make it wait for the next ones until it gives up.
		const timeout, slots = 10 * time.Second, 20
		s := newScene(t, lab.MTAOptions{ReceiveTimeout: timeout, Slots: slots})
		s.fill(lab.Attack{Kind: lab.NonReader, Sources: five(), Each: 5})
		// The timeout is for reads, and each child is to be in its write.
		before := uint64(0)
		s.poll("every child is in its write", 60*time.Second, func() (bool, error) {
			time.Sleep(time.Second)
			n, queued, err := s.unread()
			still := queued == before
			before = queued
			return n >= slots-1 && still, err
		})
		dropped := drop(s, five())
		time.Sleep(timeout + 5*time.Second)
		held, err := s.w.HeldBy(five())
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("DROP alone: %d slots are still held after %.0f s, with a timeout of %s", held, time.Since(dropped).Seconds(), timeout)
		if held < slots*9/10 {
			t.Errorf("only %d slots are still held by peers that never read", held)
		}
		ended := time.Now()
		destroy(s, five())
		s.free(five(), 10*time.Second)
		again, err := s.sender.Steady(s.within(30*time.Second), 5, ended)
		if err != nil {
			t.Fatal(err)
		}
		took := again.End().Sub(ended)
		t.Logf("sockets destroyed: mail again after %.1f s", took.Seconds())
		if took > promisedFromVerdict+slack {
			t.Errorf("mail was accepted %s after the sockets were destroyed, want %s", took, promisedFromVerdict)
		}
	})
}

// forge writes lines into the log that are byte for byte those of Exim, as a
// local user can, 50 a second, and returns when it is told to stop.
func (s *scene) forge(victim netip.Addr) (stop func()) {
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for port := 1024; ; port++ {
			select {
			case <-quit:
				return
			case <-time.After(20 * time.Millisecond):
			}
			line := fmt.Sprintf("%s SMTP connection from [%s]:%d (TCP/IP connection count = %d)\n",
				time.Now().Format(time.DateTime), victim, port, min(100, 40+port%64))
			if err := s.m.AppendLog(line); err != nil {
				s.Errorf("forging a line: %v", err)
				return
			}
		}
	}()
	return sync.OnceFunc(func() { close(quit); <-done })
}

// innocent checks that the victim of forged lines is blocked nowhere.
func (s *scene) innocent(victim netip.Addr) {
	s.Helper()
	for p := range s.inKernel() {
		if p.Contains(victim) {
			s.Errorf("the kernel drops %s, the victim of forged lines", p)
		}
	}
	for p, b := range s.blocks() {
		if p.Contains(victim) {
			s.Errorf("the victim of forged lines is blocked: %+v", b)
		}
	}
}

// Forged lines name a victim that holds nothing: nobody is blocked.
func TestForgedLines(t *testing.T) {
	t.Parallel()
	s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
	s.startDaemon(lab.DaemonOptions{})
	victim := s.from // it even has connections now and then
	start := time.Now()
	stop := s.forge(victim)
	defer stop()
	// Longer than the shortest window of the rules, and the time that a
	// verdict waits for the socket table.
	time.Sleep(16 * time.Second)
	if k := s.inKernel(); len(k) != 0 {
		t.Errorf("forged lines have blocked %v", k)
	}
	s.innocent(victim)
	stop()
	for _, a := range s.sender.Attempts() {
		if a.Start.After(start) && a.Outcome != lab.Delivered {
			t.Errorf("a mail of the victim was not taken: %+v", a)
		}
	}
	// The lines were read, and would have been believed without the table:
	// replay, which has none, blocks the victim.
	status, err := s.d.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(status.Logs) != 1 || status.Logs[0].Opens < 300 {
		t.Errorf("the forged lines were not taken for lines of Exim: %+v", status.Logs)
	}
	out, err := s.d.Command(t.Context(), "replay", "--json", "--capacity", "100", s.m.Log)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, `"prefix":"`+victim.String()+`/32"`) {
		t.Errorf("replay, which believes the log, does not block the victim: the forgery proves nothing\n%s", out)
	}
}

// Nor do forged lines hide those who really hold the slots.
func TestForgedLinesHideNobody(t *testing.T) {
	t.Parallel()
	s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
	s.startDaemon(lab.DaemonOptions{})
	victim := s.from
	stop := s.forge(victim)
	defer stop()
	_, full := s.fill(lab.Attack{Kind: lab.Silent, Sources: five(), Each: 22})
	s.relieved(five(), full)
	s.innocent(victim)
}

// Killed at any moment during a flood and started again, smtpguard has every
// block once, in the store and in the kernel, with the time that is left of
// it; and ends the flood.
func TestKilledDuringFlood(t *testing.T) {
	t.Parallel()
	s := newScene(t, lab.MTAOptions{Selector: lab.CPanelSelector})
	s.startDaemon(lab.DaemonOptions{})
	sources := five()
	_, full := s.fill(lab.Attack{Kind: lab.Reconnect, Sources: sources, Each: 22})
	kernel := s.inKernel()
	s.poll("a block in the kernel", 60*time.Second, func() (bool, error) {
		kernel = s.inKernel()
		return len(kernel) > 0, nil
	})
	killed := time.Now()
	s.d.Kill()
	before := s.inKernel()
	if len(before) == 0 {
		t.Fatal("the blocks went with the daemon")
	}
	for i := range 2 {
		s.startDaemon(lab.DaemonOptions{})
		blocks, now := s.blocks(), s.inKernel()
		s.agree(blocks, now)
		for p, k := range before {
			b, ok := blocks[p]
			if !ok {
				t.Errorf("start %d: the kernel had %s when the daemon died, and now it is not known", i+1, p)
				continue
			}
			if !b.Since.Before(killed) || b.Offence != 1 {
				t.Errorf("start %d: %s was blocked anew: since %s, offence %d", i+1, p, b.Since, b.Offence)
			}
			if now[p].Expires > k.Expires {
				t.Errorf("start %d: %s has %s left, and had %s before", i+1, p, now[p].Expires, k.Expires)
			}
		}
		if i == 0 {
			s.d.Kill()
		}
	}
	if _, err := s.sender.Steady(s.within(60*time.Second), 5, full); err != nil {
		t.Error(err)
	}
	for p := range before {
		s.free([]netip.Addr{p.Addr()}, 20*time.Second)
	}
	blocks := s.blocks()
	s.agree(blocks, s.inKernel())
	ids := map[uint64]bool{}
	for p, b := range blocks {
		if ids[b.ID] || !slices.Contains(sources, p.Addr()) || !p.IsSingleIP() || b.Offence != 1 {
			t.Errorf("a block that should not be: %+v", b)
		}
		ids[b.ID] = true
		out, err := s.d.Command(t.Context(), "--json", "blocks", "show", p.String())
		if err != nil || strings.Count(out, "\n") != 1 {
			t.Errorf("%s has more than one block in its history (%v):\n%s", p, err, out)
		}
	}
	// The shipped ladder gives every first offence the same time.
	want := policy.Default().Block.Duration(1)
	for p, b := range blocks {
		if d := b.Until.Sub(b.Since); (d - want).Abs() > 2*time.Second {
			t.Errorf("%s is blocked for %s, want %s", p, d, want)
		}
	}
}
