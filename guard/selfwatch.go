package guard

import (
	"context"
	"errors"
	"fmt"
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
