package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Watch reads the kernel's notices of ruleset changes. Each transaction ends
// with a notice of who did it; it is ours if it came through our connection.
// The process id in it cannot tell: it is that of a thread, and in a container
// not the one that we know.
//
// When notices were lost, because somebody changed tens of thousands of
// elements at once, changed is called with "somebody" and Ensure then compares the
// entries one by one.
func (n *nft) Watch(ctx context.Context, changed func(by string)) error {
	const doing = "watching for changes of the nftables ruleset"
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.o.NetNS})
	if err != nil {
		return nftError(doing, err)
	}
	defer c.Close()
	if err := errors.Join(c.SetReadBuffer(nftReceiveBuffer), n.events.setMonitor(c)); err != nil {
		return nftError(doing, err)
	}
	defer n.events.setMonitor(nil)
	if err := c.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return nftError(doing, err)
	}
	defer context.AfterFunc(ctx, func() { _ = c.SetReadDeadline(time.Unix(1, 0)) })()

	var touched, elements bool // by the transaction that is being read
	for {
		msgs, err := c.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			touched, elements = false, false
			n.events.lost.Store(true)
			changed("somebody")
			continue
		case err != nil:
			return nftError(doing, err)
		}
		for _, m := range msgs {
			if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < 4 {
				continue
			}
			if m.Header.Type != nftMsg(unix.NFT_MSG_NEWGEN) {
				if noticeTable(m.Data[4:]) == nftTable && m.Data[0] == unix.NFPROTO_INET {
					touched = true
					t := m.Header.Type
					elements = elements || t == nftMsg(unix.NFT_MSG_NEWSETELEM) || t == nftMsg(unix.NFT_MSG_DELSETELEM)
				}
				continue
			}
			if touched && !n.events.isOurs(m.Header.PID) {
				if elements {
					n.events.tampered.Store(true)
				}
				changed(culprit(m.Data[4:]))
			}
			touched, elements = false, false
		}
	}
}

// noticeTable is the table that a notice is about: the first attribute of all
// of them.
func noticeTable(data []byte) string {
	ad, err := netlink.NewAttributeDecoder(data)
	if err == nil && ad.Next() && ad.Type() == unix.NFTA_TABLE_NAME {
		return cString(ad.Bytes())
	}
	return ""
}

// culprit reads the name and the process (thread) id of who made a
// transaction. Any process may have any name: it is quoted if it is unusual.
func culprit(data []byte) string {
	var pid uint32
	var name string
	err := attributes(data, func(ad *netlink.AttributeDecoder) {
		switch ad.Type() {
		case unix.NFTA_GEN_PROC_PID:
			pid = ad.Uint32()
		case unix.NFTA_GEN_PROC_NAME:
			name = cString(ad.Bytes())
		}
	})
	if err != nil || name == "" {
		return "somebody"
	}
	if q := strconv.QuoteToASCII(name); q[1:len(q)-1] != name {
		name = q
	}
	return fmt.Sprintf("%s (pid %d)", name, pid)
}

// setMonitor says which connection Watch reads, nil for none.
func (e *nftEvents) setMonitor(c *netlink.Conn) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.monitor = c
	return e.filter()
}

// setOurs says through which port we change the ruleset from now on.
func (e *nftEvents) setOurs(port uint32) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	// Notices of the connection before may still wait to be read.
	e.ours = append(e.ours, port)
	if len(e.ours) > 4 {
		e.ours = slices.Delete(e.ours, 0, 1)
	}
	return e.filter()
}

func (e *nftEvents) isOurs(port uint32) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Contains(e.ours, port)
}

// filter keeps the notices of our own transactions, one for each element,
// from filling the monitor's buffer: 100,000 at a Replace. All messages that
// arrive in one piece are of one transaction, so the first one tells.
func (e *nftEvents) filter() error {
	if e.monitor == nil || len(e.ours) == 0 {
		return nil
	}
	const portOffset = 12 // nlmsg_pid in struct nlmsghdr, in the machine's byte order
	port := binary.BigEndian.Uint32(binary.NativeEndian.AppendUint32(nil, e.ours[len(e.ours)-1]))
	prog, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: portOffset, Size: 4},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: port, SkipTrue: 1},
		bpf.RetConstant{Val: 1 << 30},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return err
	}
	return e.monitor.SetBPF(prog)
}
