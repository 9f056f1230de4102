package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/cmd/demo/lab"
	"github.com/smtpguard/smtpguard/sockets"
)

// The size of the flood: a little more than the server has slots, or now and
// then one would stay free, because proper mail had it when the flood came.
const (
	slots = 100
	each  = 22 // connections of each attacker
)

// patience is how long the demo waits for a step that should take moments,
// on a machine that is slow or busy.
const patience = 30 * time.Second

// attacker is one address and what it does.
type attacker struct {
	addr netip.Addr
	kind lab.Kind
}

// told is what a kind of attacker is called in the story.
var told = map[lab.Kind]string{
	lab.Silent:    "says nothing",
	lab.Slow:      "says one byte each 5 s",
	lab.Reconnect: "says nothing, and comes back at once",
	lab.NonReader: "sends 40,000 recipients and never reads an answer",
}

// story is the state of the telling.
type story struct {
	*printer
	w         *lab.World
	m         *lab.MTA
	d         *lab.Daemon
	sender    *lab.Sender
	attackers []attacker
	addrs     []netip.Addr
	attacks   []*lab.Attackers
	condemned []netip.Addr // those that smtpguard has blocked
	enforce   bool
	full      time.Time // when the first mail was refused
}

// tell makes the world and tells the story, with blocking if this machine
// lets us, else without.
func tell(ctx context.Context, p *printer, program, mta string, noNamespaces error) (err error) {
	s := &story{printer: p, enforce: noNamespaces == nil}
	p.title("smtpguard: a flood on a mail server, and its end")
	if noNamespaces != nil {
		p.more("%v:", noNamespaces)
		p.more("nothing can be blocked, so smtpguard observes here and says what it would do.")
		p.more("As root, or where user namespaces are allowed, the demo shows the real thing.")
	}
	if s.w, err = lab.New(ctx, lab.Options{Loopback: noNamespaces != nil}); err != nil {
		return err
	}
	defer func() {
		if words := s.w.DaemonLog(); err != nil && ctx.Err() != context.Canceled && words != "" {
			lines := strings.Split(strings.TrimSpace(words), "\n")
			p.more("what smtpguard said last:")
			for _, line := range lines[max(0, len(lines)-20):] {
				p.more("%s", line)
			}
		}
		if e := s.w.Close(); err == nil {
			err = e
		}
	}()
	destroy, why := s.canDestroy(ctx)
	s.cast(destroy)
	o := lab.MTAOptions{Kind: mta, Slots: slots, Selector: lab.CPanelSelector}
	if s.enforce && !destroy {
		p.more("This kernel cannot end connections from outside (%s): relief takes", why)
		p.more("until the mail server's own timeout, which is 15 s here instead of 5 minutes.")
		o.ReceiveTimeout = 15 * time.Second
	}
	if s.m, err = s.w.StartMTA(ctx, o); err != nil {
		return err
	}
	run := lab.DaemonOptions{Program: program, Mode: "enforce", Backend: "nftables", Confirm: "sockets", Capacity: slots}
	if !s.enforce {
		run.Mode, run.Backend, run.Confirm = "observe", "memory", "off"
	}
	s.d, err = s.w.StartDaemon(ctx, s.m, run)
	if err != nil && s.enforce && strings.Contains(s.w.DaemonLog(), "packet filter not available") {
		p.more("No nftables in this kernel: smtpguard observes and says what it would do.")
		s.enforce = false
		run.Mode, run.Backend = "observe", "memory"
		s.d, err = s.w.StartDaemon(ctx, s.m, run)
	}
	if err != nil {
		return err
	}
	s.start = time.Now()
	what := "two private networks on one cable"
	if s.w.Loopback() {
		what = "on this machine's loopback"
	}
	p.more("%s; %s with %d slots; smtpguard run --mode %s", what, s.m.About, slots, run.Mode)
	fmt.Fprintln(p.w)

	for _, chapter := range []func(context.Context) error{s.mailFlows, s.flood, s.rescue, s.operator} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

// canDestroy reports whether the kernel ends connections on demand in the
// server's network.
func (s *story) canDestroy(ctx context.Context) (ok bool, why string) {
	if !s.enforce {
		return false, ""
	}
	t, err := sockets.Open(sockets.Options{NetNS: s.w.NetNS()})
	if err == nil {
		defer t.Close()
		if ok, err = t.CanDestroy(ctx); ok {
			return true, ""
		}
	}
	if err == nil {
		err = errors.New("no SOCK_DESTROY")
	}
	return false, err.Error()
}

// cast chooses the attackers. Peers that never read are left out where
// nothing could ever end them.
func (s *story) cast(destroy bool) {
	kinds := []lab.Kind{lab.Silent, lab.Silent, lab.Slow, lab.Reconnect, lab.NonReader}
	if !destroy {
		kinds = []lab.Kind{lab.Silent, lab.Silent, lab.Silent, lab.Slow, lab.Reconnect}
	}
	var addrs []netip.Addr
	switch {
	case s.w.Loopback():
		addrs = lab.Addresses(netip.MustParsePrefix("127.66.0.0/16"), 24, len(kinds))
	default:
		addrs = append(lab.Addresses(lab.AttackersV4, 24, 3), lab.Addresses(lab.AttackersV6, 64, 2)...)
	}
	for i, k := range kinds {
		s.attackers = append(s.attackers, attacker{addrs[i], k})
	}
	s.addrs = addrs
}

// named is an attacker's address as smtpguard knows it.
func (s *story) named(a netip.Addr) netip.Addr {
	if s.w.Loopback() {
		return lab.LogName(a)
	}
	return a
}

// from is the sender's address.
func (s *story) from() netip.Addr {
	if s.w.Loopback() {
		return netip.MustParseAddr("127.67.0.10")
	}
	return lab.SendersV4.Addr().Next()
}

func (s *story) mailFlows(ctx context.Context) error {
	s.sender = s.w.Send(ctx, s.from(), 200*time.Millisecond, 3*time.Second)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := s.sender.Steady(ctx, 8, time.Time{}); err != nil {
		return fmt.Errorf("mail does not even flow before the flood: %w", err)
	}
	s.now(good, "mail flows: %s delivers five mails a second", s.named(s.from()))
	return nil
}

func (s *story) flood(ctx context.Context) error {
	s.now(plain, "five addresses connect %d times each:", each)
	start := time.Now()
	for _, a := range s.attackers {
		s.more("%-16s %s", s.named(a.addr), told[a.kind])
	}
	for _, a := range s.attackers {
		s.attacks = append(s.attacks, s.w.Attack(ctx, lab.Attack{Kind: a.kind, Sources: []netip.Addr{a.addr}, Each: each}))
	}
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	refused, err := s.sender.First(wait, lab.Refused, start)
	if err != nil {
		return fmt.Errorf("the slots do not fill up: %w", err)
	}
	held, err := s.w.HeldBy(s.addrs)
	if err != nil {
		return err
	}
	s.full = refused.End()
	s.at(s.full, plain, "the slots are full: %d of %d are held by the five", held, slots)
	s.at(s.full, bad, "mail is refused: %v", refused.Err)
	return nil
}

// event is something that happened while the story waited for all of it.
type event struct {
	at   time.Time
	tone tone
	text string
	more []string
}

// rescue waits until smtpguard has decided, the kernel drops and mail flows
// again, and tells it in the order in which it happened.
//
// The decision need not be on all five: when most of them are gone and slots
// are free, what the last one holds harms nobody, and it is left alone until
// it does.
func (s *story) rescue(ctx context.Context) error {
	s.more("(smtpguard wants to be sure: a source must hold its slots for some seconds)")
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var mine []lab.Block
	var kernel []lab.Blocked
	var inKernel, gone time.Time
	for quiet := time.Now(); gone.IsZero() || time.Since(quiet) < 700*time.Millisecond; sleep(ctx, 30*time.Millisecond) {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("smtpguard has decided on %d of the five, and they still hold slots: %w", len(mine), err)
		}
		all, err := s.d.Blocks(ctx)
		if err != nil {
			return err
		}
		all = slices.DeleteFunc(all, func(b lab.Block) bool { return !s.ours(b.Prefix) })
		if len(all) != len(mine) {
			mine, gone, quiet = all, time.Time{}, time.Now()
			s.condemned = slices.DeleteFunc(slices.Clone(s.addrs), func(a netip.Addr) bool {
				return !slices.ContainsFunc(mine, func(b lab.Block) bool { return b.Prefix.Contains(s.named(a)) })
			})
			if kernel, err = s.w.Blocked(); err != nil {
				return err
			}
			inKernel = time.Now()
		}
		if len(mine) == 0 || !gone.IsZero() {
			continue
		}
		held, err := s.w.HeldBy(s.condemned)
		if err != nil {
			return err
		}
		if held == 0 || !s.enforce {
			gone = time.Now()
		}
	}
	slices.SortFunc(mine, func(a, b lab.Block) int { return a.Since.Compare(b.Since) })
	events := []event{{at: mine[0].Since, tone: key, text: "verdict: " + mine[0].Reason}}
	rest := event{at: mine[len(mine)-1].Since, text: fmt.Sprintf("and the same of %d more", len(mine)-1)}
	for _, a := range s.addrs {
		if !slices.Contains(s.condemned, a) {
			rest.more = append(rest.more, fmt.Sprintf("(%s is left alone as long as there are free slots beside it)", s.named(a)))
		}
	}
	if len(mine) > 1 {
		events = append(events, rest)
	}
	if !s.enforce {
		s.tell(events)
		s.more("smtpguard observes: with `mode: enforce` all of this would end here")
		return s.giveUp(ctx)
	}
	drops := event{at: inKernel, tone: good, text: "the kernel drops their packets; read back from nftables, table inet smtpguard:"}
	for _, b := range mine {
		i := slices.IndexFunc(kernel, func(k lab.Blocked) bool { return k.Prefix == b.Prefix })
		if i < 0 {
			return fmt.Errorf("%s is blocked, says smtpguard, but the kernel's nftables do not have it: %v", b.Prefix, kernel)
		}
		drops.more = append(drops.more, fmt.Sprintf("%-22s for %s", b.Prefix, kernel[i].Expires.Truncate(time.Second)))
	}
	again, err := s.sender.Steady(ctx, 5, mine[0].Since)
	if err != nil {
		return fmt.Errorf("mail does not flow again: %w", err)
	}
	flows := event{at: again.End(), tone: good, text: fmt.Sprintf("mail flows again, %.1f s after the server was full, %.1f s after the verdict",
		again.End().Sub(s.full).Seconds(), again.End().Sub(mine[0].Since).Seconds())}
	s.tell(append(events, drops, event{at: gone, tone: good, text: "their connections are gone from the kernel's socket table"}, flows))
	s.more("(Exim alone, with its timeout of 5 minutes: after 289 s from silent peers, from slow talkers")
	s.more(" and from peers that never read: never. A firewall rule alone changes little of that.)")
	return nil
}

// ours reports whether a prefix is one of the attackers'.
func (s *story) ours(p netip.Prefix) bool {
	return slices.ContainsFunc(s.addrs, func(a netip.Addr) bool { return p.Contains(s.named(a)) })
}

// tell tells events in the order in which they happened.
func (s *story) tell(events []event) {
	slices.SortStableFunc(events, func(a, b event) int { return a.at.Compare(b.at) })
	for _, e := range events {
		s.at(e.at, e.tone, "%s", e.text)
		for _, line := range e.more {
			s.more("%s", line)
		}
	}
}

// giveUp is how a flood ends where nothing can be blocked.
func (s *story) giveUp(ctx context.Context) error {
	stop := time.Now()
	s.stopAttacks()
	s.now(plain, "the attackers give up by themselves")
	again, err := s.sender.Steady(ctx, 5, stop)
	if err != nil {
		return fmt.Errorf("mail does not flow when the attackers are gone: %w", err)
	}
	s.at(again.End(), good, "mail flows again")
	return nil
}

// operator shows what a person does with it.
func (s *story) operator(ctx context.Context) error {
	list, err := s.d.Command(ctx, "blocks", "list")
	if err != nil {
		return err
	}
	s.shell("smtpguard blocks list", list)
	if !s.enforce {
		return nil
	}
	s.stopAttacks()
	victim := s.condemned[0]
	if a := s.w.Deliver(ctx, victim, 1500*time.Millisecond); a.Outcome != lab.TimedOut {
		return fmt.Errorf("%s is blocked, but its attempt to connect ended otherwise than by silence: %s (%v)", victim, a.Outcome, a.Err)
	}
	s.now(plain, "%s knocks: no answer", victim)
	out, err := s.d.Command(ctx, "unblock", victim.String())
	if err != nil {
		return err
	}
	s.shell("smtpguard unblock "+victim.String(), out)
	if a := s.w.Deliver(ctx, victim, 5*time.Second); a.Outcome != lab.Delivered {
		return fmt.Errorf("%s is free again, but cannot connect: %s (%v)", victim, a.Outcome, a.Err)
	}
	s.now(good, "%s connects again, and delivers a mail", victim)
	return nil
}

func (s *story) stopAttacks() {
	for _, a := range s.attacks {
		a.Stop()
	}
}

// sleep waits; it reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}
