package guard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/policy"
)

// selfLeast is how long after one look at this machine's own addresses the
// next one comes at the earliest.
const selfLeast = 500 * time.Millisecond

// WatchSelf calls changed when this machine gets or loses an address or a
// default route, until ctx ends: the next answer of Self may be another one.
// It is also called when news were lost.
func WatchSelf(ctx context.Context, changed func()) error { return selfConfig{}.watch(ctx, changed) }

// rtmGroups are the rtnetlink groups as bits of the old bind address, which has
// those that are used here (rtnetlink(7)).
const rtmGroups = 1<<(unix.RTNLGRP_IPV4_IFADDR-1) | 1<<(unix.RTNLGRP_IPV6_IFADDR-1) |
	1<<(unix.RTNLGRP_IPV4_ROUTE-1) | 1<<(unix.RTNLGRP_IPV6_ROUTE-1)

func (c selfConfig) watch(ctx context.Context, changed func()) error {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{Groups: rtmGroups, NetNS: c.netNS})
	if err != nil {
		return fmt.Errorf("subscribing to news of addresses and routes: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if stop() {
			conn.Close()
		}
	}()
	changed() // what came before the subscription
	for {
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			changed()
		case err != nil:
			return fmt.Errorf("reading news of addresses and routes: %w", err)
		}
		for _, m := range msgs {
			if concernsSelf(m) {
				changed()
				break
			}
		}
	}
}

// concernsSelf leaves out all routes but the default ones: a machine with the
// Internet's routes has news of others all the time.
func concernsSelf(m netlink.Message) bool {
	switch m.Header.Type {
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		return true
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(m.Data) >= unix.SizeofRtMsg && m.Data[1] == 0 // rtm_dst_len
	}
	return false
}

// watchSelf passes the news on. Where there are none, or none any more, the
// look of each minute remains.
func (g *Guard) watchSelf(ctx context.Context, watch func(context.Context, func()) error) {
	told := false
	for ctx.Err() == nil {
		err := watch(ctx, func() {
			select {
			case g.selfNews <- struct{}{}:
			default: // one is waiting already
			}
		})
		if ctx.Err() != nil {
			return
		}
		if !told {
			told = true
			g.log.Warn("this machine's own addresses are looked at each minute only", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(30 * time.Second):
		}
	}
}

// selfFresh is how old the last look at this machine's own addresses may be
// when a rule blocks somebody. Of an SSH session that begins there is no news,
// and a look takes some 20 µs for each process of the machine.
const selfFresh = time.Second

// freshSelf looks again at what must never be blocked on this machine before
// something is, unless that was done less than age ago.
func (g *Guard) freshSelf(ctx context.Context, age time.Duration, now time.Time) {
	if now.Sub(g.selfPast.looked).Abs() < age {
		return
	}
	g.refreshListed(now)
	if err := g.refreshSelf(ctx); err != nil {
		g.fault("looking at this machine's own addresses", err)
	}
}

// selfPast is what earlier looks at this machine's own addresses said.
type selfPast struct {
	looked time.Time
	seen   map[netip.Prefix]time.Time // when each of Guard.self was last found
	err    string                     // of the last look
	told   time.Time                  // when err was told
}

// selfKept is how long what was found stays allowed after it was found last: a
// resolv.conf is away while it is written anew, an address while its interface
// is set up again, an SSH session while its owner logs in once more.
const selfKept = 10 * time.Minute

// rememberSelf takes the outcome of a look. Where it was not whole, what it
// says nothing at all about, such as the resolvers, stays as it was, however
// long.
func (g *Guard) rememberSelf(found []Exempt, err error, now time.Time) {
	past := &g.selfPast
	past.looked = now
	seen, kinds := make(map[netip.Prefix]time.Time), make(map[string]bool)
	var self []Exempt
	add := func(e Exempt, at time.Time) {
		if _, twice := seen[e.Prefix]; !twice {
			seen[e.Prefix] = at
			self = append(self, e)
		}
	}
	for _, e := range found {
		kinds[e.Why] = true
		add(e, now)
	}
	for _, e := range g.self {
		if err != nil && !kinds[e.Why] {
			add(e, now)
		} else if at := past.seen[e.Prefix]; now.Sub(at) < selfKept {
			add(e, at)
		}
	}
	g.self, past.seen = self, seen
	switch {
	case err == nil:
		past.err = ""
	case past.err != err.Error() || now.Sub(past.told) >= time.Hour:
		past.err, past.told = err.Error(), now
		g.fault("this machine's own addresses, gateways and resolvers are known in part only", err)
	}
}

// ownList is the part of the allowlist that is this machine's own.
func ownList(self []Exempt) *policy.Allowlist {
	entries := make([]policy.AllowEntry, len(self))
	for i, s := range self {
		entries[i] = policy.AllowEntry{Prefix: s.Prefix, Why: s.Why}
	}
	return policy.NewAllowlist(entries)
}

func minTime(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
