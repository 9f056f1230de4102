package firewall

import (
	"context"
	"encoding/binary"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftCountMax is up to how many entries what they have stopped is carried over
// to a table that is made anew: reading 100,000 takes a second.
const nftCountMax = 20_000

// counted reads what the entries have stopped so far, as far as it is worth it.
func (n *nft) counted(ctx context.Context, entries []Entry) map[netip.Prefix]Installed {
	if len(entries) == 0 || len(entries) > nftCountMax || len(n.book.until) > nftCountMax {
		return nil
	}
	counts := make(map[netip.Prefix]Installed)
	for in, err := range n.List(ctx) {
		if err != nil {
			return nil // usually there is no table yet
		}
		if in.Packets > 0 {
			counts[in.Prefix] = in
		}
	}
	return counts
}

// carry has the entries go on counting where they were, in a transaction of its
// own: the library cannot say what a counter begins with. What fails is the
// counters alone, and nobody is told.
func (n *nft) carry(ctx context.Context, entries []Entry, counts map[netip.Prefix]Installed) {
	now := time.Now() // the ends are told again
	entries = slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return counts[e.Prefix].Packets == 0 })
	const bytes = 240 // what an entry has at most in the three messages below
	entries, _ = cut(entries, n.budget/bytes)
	if len(entries) == 0 {
		return
	}
	var msgs []netlink.Message
	add := func(typ int, flags netlink.HeaderFlags, l length, es []Entry, with map[netip.Prefix]Installed) {
		b := nfgenmsg(unix.NFPROTO_INET)
		b = appendAttr(b, unix.NFTA_SET_ELEM_LIST_TABLE, []byte(nftTable+"\x00")...)
		b = appendAttr(b, unix.NFTA_SET_ELEM_LIST_SET, []byte(l.set()+"\x00")...)
		b = appendNested(b, unix.NFTA_SET_ELEM_LIST_ELEMENTS, func(b []byte) []byte {
			for _, e := range es {
				b = appendNested(b, unix.NFTA_LIST_ELEM, func(b []byte) []byte { return appendElement(b, e, with[e.Prefix], now) })
			}
			return b
		})
		msgs = append(msgs, netlink.Message{
			Header: netlink.Header{Type: nftMsg(typ), Flags: netlink.Request | netlink.Acknowledge | flags}, Data: b,
		})
	}
	byLength := make(map[length][]Entry)
	for _, e := range entries {
		byLength[lengthOf(e.Prefix)] = append(byLength[lengthOf(e.Prefix)], e)
	}
	for l, es := range byLength {
		for chunk := range slices.Chunk(es, nftChunk/2) {
			add(unix.NFT_MSG_NEWSETELEM, netlink.Create, l, chunk, nil) // one may have run out
			add(unix.NFT_MSG_DELSETELEM, 0, l, chunk, nil)
			add(unix.NFT_MSG_NEWSETELEM, netlink.Create, l, chunk, counts)
		}
	}
	if err := n.send(ctx, msgs); err != nil {
		n.closeWrite()
	}
	n.gen = 0 // Ensure looks once more
}

// send makes a transaction of messages and waits until it is done.
func (n *nft) send(ctx context.Context, msgs []netlink.Message) error {
	if err := n.open(); err != nil {
		return err
	}
	frame := func(typ netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: typ, Flags: netlink.Request},
			Data: binary.BigEndian.AppendUint16([]byte{unix.NFPROTO_UNSPEC, unix.NFNETLINK_V0}, unix.NFNL_SUBSYS_NFTABLES)}
	}
	defer deadline(ctx, n.writeNL, n.o.Timeout)()
	batch := append([]netlink.Message{frame(unix.NFNL_MSG_BATCH_BEGIN)}, msgs...)
	if _, err := n.writeNL.SendMessages(append(batch, frame(unix.NFNL_MSG_BATCH_END))); err != nil {
		return err
	}
	for range msgs {
		if _, err := n.writeNL.Receive(); err != nil {
			return err
		}
	}
	return n.drain()
}

// appendElement appends an entry as an element, with a counter if it has one.
func appendElement(b []byte, e Entry, in Installed, now time.Time) []byte {
	b = appendNested(b, unix.NFTA_SET_ELEM_KEY, func(b []byte) []byte {
		return appendAttr(b, unix.NFTA_DATA_VALUE, e.Prefix.Addr().AsSlice()...)
	})
	b = appendAttr(b, unix.NFTA_SET_ELEM_TIMEOUT, binary.BigEndian.AppendUint64(nil, uint64(element(e, now).Timeout.Milliseconds()))...)
	if in.Packets == 0 {
		return b
	}
	return appendNested(b, unix.NFTA_SET_ELEM_EXPR, func(b []byte) []byte {
		b = appendAttr(b, unix.NFTA_EXPR_NAME, []byte("counter\x00")...)
		return appendNested(b, unix.NFTA_EXPR_DATA, func(b []byte) []byte {
			b = appendAttr(b, unix.NFTA_COUNTER_BYTES, binary.BigEndian.AppendUint64(nil, in.Bytes)...)
			return appendAttr(b, unix.NFTA_COUNTER_PACKETS, binary.BigEndian.AppendUint64(nil, in.Packets)...)
		})
	})
}
