package firewall

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Reading is done here instead of in the library: it asks for bigger answers
// (the kernel walks a hash set from the start for each of them, so 100,000
// elements take seconds in small ones), and it parses no more than it needs,
// since rules in our table may be anybody's. Formats: linux/netfilter/nf_tables.h
// and linux/netlink.h.

// nftReadSize is the size of the buffer for one answer; the kernel fills at
// most 32 KiB of it.
const nftReadSize = 64 << 10

// nftDumpTries is how often a reading that met a change of the ruleset is
// repeated before the last one is taken as it is.
const nftDumpTries = 3

// nftReadTries is how often a set's elements are read until they are complete,
// with pauses between; elements that somebody deleted cost all of them.
const (
	nftReadTries = 4
	nftReadPause = 10 * time.Millisecond
)

// nftMsg is a message type of the nf_tables subsystem.
func nftMsg(t int) netlink.HeaderType {
	return netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | t)
}

// nfgenmsg is the header of all nf_tables messages: family, version, resource.
func nfgenmsg(family byte) []byte { return []byte{family, unix.NFNETLINK_V0, 0, 0} }

// ask sends a request to the kernel and gives each answer to each. With the
// Dump flag answers come until the kernel has no more; consistent is false if
// the ruleset changed meanwhile.
func (n *nft) ask(ctx context.Context, msg int, flags netlink.HeaderFlags, attrs []netlink.Attribute, each func(data []byte) error) (consistent bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if n.read == nil {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: n.o.NetNS, MessageBufferSize: nftReadSize})
		if err != nil {
			return false, err
		}
		n.read = c
	}
	defer func() {
		// An answer that says no is one; after anything else more answers may
		// be on their way.
		var op *netlink.OpError
		if err != nil && (!errors.As(err, &op) || op.Sequence == 0) {
			n.closeRead()
			err = errors.Join(context.Cause(ctx), err)
		}
	}()
	defer deadline(ctx, n.read, n.o.Timeout)()

	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return false, err
	}
	req, err := n.read.Send(netlink.Message{
		Header: netlink.Header{Type: nftMsg(msg), Flags: netlink.Request | flags},
		Data:   append(nfgenmsg(unix.NFPROTO_INET), data...),
	})
	if err != nil {
		return false, err
	}
	consistent = true
	for m, err := range n.read.ReceiveIter() {
		if err != nil {
			return false, err
		}
		if m.Header.Sequence != req.Header.Sequence || len(m.Data) < 4 {
			return false, errors.New("an answer to another question came from the kernel")
		}
		if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
			consistent = false
		}
		// Data is used after the buffer was: the iterator copies it.
		if err := each(m.Data[4:]); err != nil {
			return false, err
		}
	}
	return consistent, nil
}

// dump asks for all there is, again if it changed meanwhile. reset forgets
// what each was given.
func (n *nft) dump(ctx context.Context, msg int, attrs []netlink.Attribute, reset func(), each func(data []byte) error) error {
	for try := 1; ; try++ {
		reset()
		consistent, err := n.ask(ctx, msg, netlink.Dump, attrs, each)
		if err != nil || consistent || try == nftDumpTries {
			return err
		}
	}
}

func (n *nft) closeRead() {
	if n.read != nil {
		_ = n.read.Close() // nothing is buffered in it
		n.read = nil
	}
}

// generation reads the number of the ruleset's generation.
func (n *nft) generation(ctx context.Context) (uint32, error) {
	var gen uint32
	_, err := n.ask(ctx, unix.NFT_MSG_GETGEN, 0, nil, func(data []byte) error {
		return attributes(data, func(ad *netlink.AttributeDecoder) {
			if ad.Type() == unix.NFTA_GEN_ID {
				gen = ad.Uint32()
			}
		})
	})
	return gen, err
}

// nftTableState is what inspect compares.
type nftTableState struct {
	found  bool
	flags  uint32 // dormant, owned
	chains []nftChain
	rules  []nftRule
	sets   []nftSet
}

type nftChain struct {
	name   string
	base   bool
	typ    string
	hook   uint32
	prio   int32
	policy uint32
}

// nftRule is a rule by its tag and, as the kernel writes it, by what it does.
type nftRule struct {
	chain string
	tag   string
	exprs string
}

type nftSet struct {
	name   string
	flags  uint32
	keyLen uint32
}

func (n *nft) readTable(ctx context.Context) (nftTableState, error) {
	var s nftTableState
	mine := []netlink.Attribute{{Type: unix.NFTA_TABLE_NAME, Data: []byte(nftTable + "\x00")}}

	_, err := n.ask(ctx, unix.NFT_MSG_GETTABLE, 0, mine, func(data []byte) error {
		s.found = true
		return attributes(data, func(ad *netlink.AttributeDecoder) {
			if ad.Type() == unix.NFTA_TABLE_FLAGS {
				s.flags = ad.Uint32()
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return nftTableState{}, nil
	}
	if err != nil {
		return nftTableState{}, err
	}
	err = n.dump(ctx, unix.NFT_MSG_GETCHAIN, nil, func() { s.chains = nil }, func(data []byte) error {
		var c nftChain
		var table string
		err := attributes(data, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_CHAIN_TABLE:
				table = ad.String()
			case unix.NFTA_CHAIN_NAME:
				c.name = ad.String()
			case unix.NFTA_CHAIN_TYPE:
				c.typ = ad.String()
			case unix.NFTA_CHAIN_POLICY:
				c.policy = ad.Uint32()
			case unix.NFTA_CHAIN_HOOK:
				c.base = true
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						switch ad.Type() {
						case unix.NFTA_HOOK_HOOKNUM:
							c.hook = ad.Uint32()
						case unix.NFTA_HOOK_PRIORITY:
							c.prio = int32(ad.Uint32())
						}
					}
					return nil
				})
			}
		})
		if table == nftTable {
			s.chains = append(s.chains, c)
		}
		return err
	})
	if err != nil {
		return nftTableState{}, err
	}
	err = n.dump(ctx, unix.NFT_MSG_GETRULE, mine, func() { s.rules = nil }, func(data []byte) error {
		var r nftRule
		var table string
		err := attributes(data, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_RULE_TABLE:
				table = ad.String()
			case unix.NFTA_RULE_CHAIN:
				r.chain = ad.String()
			case unix.NFTA_RULE_EXPRESSIONS:
				r.exprs = string(ad.Bytes())
			case unix.NFTA_RULE_USERDATA:
				r.tag = string(ad.Bytes())
			}
		})
		if table == nftTable {
			s.rules = append(s.rules, r)
		}
		return err
	})
	if err != nil {
		return nftTableState{}, err
	}
	s.sets, err = n.sets(ctx)
	return s, err
}

// sets lists the sets of our table; none if it is not there.
func (n *nft) sets(ctx context.Context) ([]nftSet, error) {
	var sets []nftSet
	mine := []netlink.Attribute{{Type: unix.NFTA_SET_TABLE, Data: []byte(nftTable + "\x00")}}
	err := n.dump(ctx, unix.NFT_MSG_GETSET, mine, func() { sets = nil }, func(data []byte) error {
		var s nftSet
		var table string
		err := attributes(data, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case unix.NFTA_SET_TABLE:
				table = ad.String()
			case unix.NFTA_SET_NAME:
				s.name = ad.String()
			case unix.NFTA_SET_FLAGS:
				s.flags = ad.Uint32()
			case unix.NFTA_SET_KEY_LEN:
				s.keyLen = ad.Uint32()
			}
		})
		if table == nftTable {
			sets = append(sets, s)
		}
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	return sets, err
}

// madeAs is the layout that s says it is: ours, of whatever policy.
func madeAs(s nftTableState) *layout {
	l := &layout{chain: "?"} // no chain has that name
	for _, c := range s.chains {
		for _, o := range []string{"prerouting", "input"} {
			if usual, err := newLayout(Options{Hook: o}, 0); err == nil && c.base && c.name == usual.chain {
				l.chain, l.hook, l.prio = usual.chain, usual.hook, usual.prio
			}
		}
	}
	for _, set := range s.sets {
		switch set.name {
		case "ports":
			l.ports = []uint16{0}
		case allowSet(0):
			l.allow[0] = []addrRange{{}}
		case allowSet(1):
			l.allow[1] = []addrRange{{}}
		}
	}
	for _, r := range s.rules {
		if r.chain == l.chain {
			l.digest = digestIn(r.tag, nftVersion)
			break
		}
	}
	return l
}

// digestIn reads the digest of a layout out of a rule's tag.
func digestIn(tag string, version int) string {
	_, rest, _ := strings.Cut(tag, fmt.Sprintf("smtpguard/%d ", version))
	digest, _, _ := strings.Cut(rest, " ")
	return digest
}

// recognise says whether s is our layout, and which prefix lengths it has.
func (l *layout) recognise(s nftTableState) (map[length]bool, bool) {
	if !s.found || s.flags != 0 || len(s.chains) != 2 {
		return nil, false
	}
	for _, c := range s.chains {
		want := nftChain{name: nftBlockChain}
		if c.base {
			want = nftChain{name: l.chain, base: true, typ: "filter", hook: uint32(l.hook), prio: int32(l.prio), policy: uint32(nftables.ChainPolicyAccept)}
		}
		if c != want {
			return nil, false
		}
	}
	lengths := make(map[length]bool)
	fixed := make(map[string]nftSet)
	if len(l.ports) > 0 {
		fixed["ports"] = nftSet{"ports", unix.NFT_SET_CONSTANT, 2}
	}
	for i, ranges := range l.allow {
		if len(ranges) > 0 {
			fixed[allowSet(i)] = nftSet{allowSet(i), unix.NFT_SET_CONSTANT | unix.NFT_SET_INTERVAL, keyLen(i == 1)}
		}
	}
	for _, set := range s.sets {
		if n, ok := lengthFromSet(set.name); ok && set == (nftSet{set.name, unix.NFT_SET_TIMEOUT, keyLen(n.v6)}) {
			lengths[n] = true
		} else if fixed[set.name] == set {
			delete(fixed, set.name)
		} else {
			return nil, false
		}
	}
	base, block := l.fixedRules()
	wantRules := len(base) + len(block) + len(lengths)
	if len(fixed) > 0 || len(s.rules) != wantRules {
		return nil, false
	}
	rest := make(map[string]bool) // tags of the lengths' rules, which come in any order
	for n := range lengths {
		rest[string(l.tag(n.set()))] = true
	}
	for _, r := range s.rules {
		next := &block
		if r.chain == l.chain {
			next = &base
		}
		switch {
		case len(*next) > 0 && r.tag == string(l.tag((*next)[0])):
			*next = (*next)[1:]
		case len(*next) == 0 && r.chain == nftBlockChain && rest[r.tag]:
			delete(rest, r.tag)
		default:
			return nil, false
		}
	}
	return lengths, len(base)+len(block)+len(rest) == 0
}

func keyLen(v6 bool) uint32 {
	if v6 {
		return 16
	}
	return 4
}

// elements reads what a set holds. What has run out is not among it. For a
// while after many were added the kernel moves elements to a bigger hash
// table, and a reading meanwhile gives some twice and others not at all; want
// are those that should be there, and while one is missing or there are
// doubles the reading is repeated and added to.
func (n *nft) elements(ctx context.Context, set string, l length, want []netip.Prefix) ([]Installed, error) {
	attrs := []netlink.Attribute{
		{Type: unix.NFTA_SET_ELEM_LIST_TABLE, Data: []byte(nftTable + "\x00")},
		{Type: unix.NFTA_SET_ELEM_LIST_SET, Data: []byte(set + "\x00")},
	}
	found := make(map[netip.Prefix]Installed, len(want))
	for try := 1; ; try++ {
		now := time.Now()
		doubles := 0
		var seen map[netip.Prefix]bool
		reset := func() { doubles, seen = 0, make(map[netip.Prefix]bool, len(want)) }
		err := n.dump(ctx, unix.NFT_MSG_GETSETELEM, attrs, reset, func(data []byte) error {
			return attributes(data, func(ad *netlink.AttributeDecoder) {
				if ad.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
					return
				}
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					for ad.Next() {
						ad.Nested(func(ad *netlink.AttributeDecoder) error {
							e, err := decodeElement(ad, l, now)
							if seen[e.Prefix] {
								doubles++
							}
							seen[e.Prefix] = true
							found[e.Prefix] = e
							return err
						})
					}
					return nil
				})
			})
		})
		if err != nil {
			return nil, err
		}
		complete := doubles == 0 && !slices.ContainsFunc(want, func(p netip.Prefix) bool { _, ok := found[p]; return !ok })
		if complete || try == nftReadTries {
			break
		}
		time.Sleep(nftReadPause)
	}
	// Readings add up, so some may have run out by now.
	now := time.Now()
	maps.DeleteFunc(found, func(_ netip.Prefix, e Installed) bool { return !e.Until.IsZero() && e.Until.Before(now) })
	return slices.Collect(maps.Values(found)), nil
}

func decodeElement(ad *netlink.AttributeDecoder, l length, now time.Time) (Installed, error) {
	var e Installed
	var addr netip.Addr
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.NFTA_DATA_VALUE {
						addr, _ = netip.AddrFromSlice(ad.Bytes())
					}
				}
				return nil
			})
		case unix.NFTA_SET_ELEM_EXPIRATION:
			// Milliseconds; rounded up as it was rounded down.
			ms := min(ad.Uint64()+1, uint64(1<<63-1)/uint64(time.Millisecond))
			e.Until = now.Add(time.Duration(ms) * time.Millisecond)
		case unix.NFTA_SET_ELEM_EXPR:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				counter := false
				for ad.Next() {
					switch ad.Type() {
					case unix.NFTA_EXPR_NAME:
						counter = ad.String() == "counter"
					case unix.NFTA_EXPR_DATA:
						if counter {
							ad.Nested(e.decodeCounter)
						}
					}
				}
				return nil
			})
		}
	}
	if err := ad.Err(); err != nil {
		return Installed{}, err
	}
	p, err := addr.Prefix(l.bits)
	if err != nil || addr.Is6() != l.v6 {
		return Installed{}, fmt.Errorf("set %s holds %v, which is no key of it", l.set(), addr)
	}
	e.Prefix = p
	return e, nil
}

func (e *Installed) decodeCounter(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_COUNTER_BYTES:
			e.Bytes = ad.Uint64()
		case unix.NFTA_COUNTER_PACKETS:
			e.Packets = ad.Uint64()
		}
	}
	return nil
}

// attributes calls each for the attributes in data; numbers are big-endian.
func attributes(data []byte, each func(*netlink.AttributeDecoder)) error {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		each(ad)
	}
	return ad.Err()
}

// cString is the text in b up to its NUL.
func cString(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}
