package firewall

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// What our part of the ruleset looks like, as nft list table inet smtpguard
// shows it:
//
//	table inet smtpguard {
//		set ports  { type inet_service; flags constant; elements = { 25, 465, 587 } }
//		set allow4 { type ipv4_addr; flags constant,interval; … }
//		set b4_24  { type ipv4_addr; size …; flags timeout; counter; … }   one per prefix length in use
//		chain prerouting {
//			type filter hook prerouting priority raw; policy accept;
//			tcp dport @ports jump block
//		}
//		chain block {
//			ip saddr @allow4 return
//			ip saddr & 255.255.255.0 @b4_24 drop                       one per prefix length in use
//		}
//	}
//
// A hash set per length instead of one interval set: nested prefixes keep
// their own ends, nothing ever overlaps, and an insert costs the same with
// 100,000 entries as with none.
const (
	nftTable      = "smtpguard" // at most 15 characters, for old tools
	nftProbeTable = "smtpguardprobe"
	nftBlockChain = "block"

	// nftVersion counts the layouts: a table with another one is replaced.
	nftVersion = 1

	// nftChunk is how many elements go into one message: more than about
	// 2,300 overflow the 16 bits of an attribute's length, silently.
	nftChunk = 1000
)

// length is a prefix length of one family: what a set is made for.
type length struct {
	v6   bool
	bits int
}

func lengthOf(p netip.Prefix) length { return length{p.Addr().Is6(), p.Bits()} }

func (l length) set() string {
	if l.v6 {
		return "b6_" + strconv.Itoa(l.bits)
	}
	return "b4_" + strconv.Itoa(l.bits)
}

// lengthFromSet is the reverse of set.
func lengthFromSet(name string) (length, bool) {
	family, digits, ok := strings.Cut(name, "_")
	bits, err := strconv.Atoi(digits)
	l := length{family == "b6", bits}
	limit := 32
	if l.v6 {
		limit = 128
	}
	return l, ok && err == nil && bits > 0 && bits <= limit && l.set() == name
}

// commonLengths have their sets from the start, so that the usual block needs
// no new set.
var commonLengths = []length{{false, 32}, {false, 24}, {true, 128}, {true, 64}}

// lengthsOf gives the lengths in use by entries and the common ones.
func lengthsOf(entries []Entry) []length {
	seen := make(map[length]bool)
	out := slices.Clone(commonLengths)
	for _, l := range out {
		seen[l] = true
	}
	for _, e := range entries {
		if l := lengthOf(e.Prefix); !seen[l] {
			seen[l] = true
			out = append(out, l)
		}
	}
	return out
}

// layout is the constant part of our table.
type layout struct {
	table   *nftables.Table
	chain   string // name of the base chain
	hook    nftables.ChainHook
	prio    nftables.ChainPriority
	ports   []uint16
	allow   [2][]addrRange // IPv4, IPv6
	setSize uint32
	digest  string // of all the above; part of every rule's tag
}

func newLayout(o Options, maxEntries int) (*layout, error) {
	l := &layout{
		table: &nftables.Table{Name: nftTable, Family: nftables.TableFamilyINet},
		ports: slices.Clone(o.Ports),
		allow: [2][]addrRange{mergeRanges(o.Allow, false), mergeRanges(o.Allow, true)},
		// Entries that are set anew count twice until the transaction ends,
		// and those that ran out count until the kernel collects them.
		setSize: uint32(min(2*int64(maxEntries)+4096, 1<<31)),
	}
	slices.Sort(l.ports)
	l.ports = slices.Compact(l.ports)
	switch o.Hook {
	case "", "prerouting":
		l.chain, l.hook, l.prio = "prerouting", *nftables.ChainHookPrerouting, *nftables.ChainPriorityRaw
	case "input":
		// A little ahead of everybody's filter rules at priority 0.
		l.chain, l.hook, l.prio = "input", *nftables.ChainHookInput, *nftables.ChainPriorityFilter-10
	default:
		return nil, fmt.Errorf("hook %q is not known; it is one of prerouting, input", o.Hook)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %d %v %v %d", nftVersion, l.chain, l.prio, l.ports, l.allow, l.setSize))
	l.digest = hex.EncodeToString(sum[:6])
	return l, nil
}

// tag names a rule of ours; nft lists it as the rule's comment. A rule whose
// tag has another version or digest belongs to another layout.
func (l *layout) tag(rule string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, fmt.Sprintf("smtpguard/%d %s %s", nftVersion, l.digest, rule))
}

// fixedRules says which rules, by their tags, the two chains begin with; those
// of the prefix lengths follow in any order.
func (l *layout) fixedRules() (base, block []string) {
	base = []string{"jump"}
	for i, ranges := range l.allow {
		if len(ranges) > 0 {
			block = append(block, allowSet(i))
		}
	}
	return base, block
}

func allowSet(i int) string { return [2]string{"allow4", "allow6"}[i] }

// add puts the whole table with sets for the lengths into c's transaction.
// What stood under our name before goes in the same transaction.
func (l *layout) add(c *nftables.Conn, lengths []length) error {
	c.AddTable(l.table) // so that there is one to delete
	c.DelTable(l.table)
	c.AddTable(l.table)

	policy := nftables.ChainPolicyAccept
	base := c.AddChain(&nftables.Chain{
		Name: l.chain, Table: l.table, Type: nftables.ChainTypeFilter,
		Hooknum: &l.hook, Priority: &l.prio, Policy: &policy,
	})
	block := c.AddChain(&nftables.Chain{Name: nftBlockChain, Table: l.table})

	var exprs []expr.Any
	if len(l.ports) > 0 {
		ports := &nftables.Set{
			Table: l.table, ID: 1, Name: "ports", Constant: true,
			KeyType: nftables.TypeInetService, KeyByteOrder: binaryutil.BigEndian,
		}
		elems := make([]nftables.SetElement, len(l.ports))
		for i, p := range l.ports {
			elems[i].Key = binaryutil.BigEndian.PutUint16(p)
		}
		if err := addSet(c, ports, elems); err != nil {
			return err
		}
		exprs = []expr.Any{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
			&expr.Lookup{SourceRegister: 1, SetName: ports.Name, SetID: ports.ID},
		}
	}
	exprs = append(exprs, &expr.Verdict{Kind: expr.VerdictJump, Chain: nftBlockChain})
	c.AddRule(&nftables.Rule{Table: l.table, Chain: base, Exprs: exprs, UserData: l.tag("jump")})

	for i, ranges := range l.allow {
		if len(ranges) == 0 {
			continue
		}
		set := &nftables.Set{
			Table: l.table, ID: uint32(2 + i), Name: allowSet(i), Constant: true, Interval: true,
			KeyType: addrType(i == 1), KeyByteOrder: binaryutil.BigEndian,
		}
		if err := addSet(c, set, intervals(ranges)); err != nil {
			return err
		}
		exprs := append(sourceAddr(length{i == 1, 0}),
			&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID},
			&expr.Verdict{Kind: expr.VerdictReturn})
		c.AddRule(&nftables.Rule{Table: l.table, Chain: block, Exprs: exprs, UserData: l.tag(set.Name)})
	}
	for _, n := range lengths {
		if err := l.addLength(c, n); err != nil {
			return err
		}
	}
	return nil
}

// addLength puts the set for a prefix length and its rule into c's
// transaction. Rules for lengths all drop, so their order makes no difference.
func (l *layout) addLength(c *nftables.Conn, n length) error {
	set := l.lengthSet(n)
	set.ID = uint32(n.bits)<<3 | 4 // unique in a transaction, apart from 1, 2 and 3
	if n.v6 {
		set.ID |= 1
	}
	set.Size = l.setSize
	if err := c.AddSet(set, nil); err != nil {
		return err
	}
	exprs := append(sourceAddr(n),
		&expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID},
		&expr.Verdict{Kind: expr.VerdictDrop})
	c.AddRule(&nftables.Rule{
		Table: l.table, Chain: &nftables.Chain{Name: nftBlockChain, Table: l.table},
		Exprs: exprs, UserData: l.tag(set.Name),
	})
	return nil
}

// lengthSet names the set of a prefix length.
func (l *layout) lengthSet(n length) *nftables.Set {
	return &nftables.Set{
		Table: l.table, Name: n.set(), HasTimeout: true, Counter: true,
		KeyType: addrType(n.v6), KeyByteOrder: binaryutil.BigEndian,
	}
}

// addSet adds a set of constant content, in messages of nftChunk elements.
func addSet(c *nftables.Conn, s *nftables.Set, elems []nftables.SetElement) error {
	if err := c.AddSet(s, nil); err != nil {
		return err
	}
	for chunk := range slices.Chunk(elems, nftChunk) {
		if err := c.SetAddElements(s, chunk); err != nil {
			return err
		}
	}
	return nil
}

func addrType(v6 bool) nftables.SetDatatype {
	if v6 {
		return nftables.TypeIP6Addr
	}
	return nftables.TypeIPAddr
}

// intervals is ranges as elements of an interval set: a start, and an end
// that does not belong to it. A range up to the last address there is has no
// end; mergeRanges made sure that it comes last.
func intervals(ranges []addrRange) []nftables.SetElement {
	elems := make([]nftables.SetElement, 0, 2*len(ranges))
	for _, r := range ranges {
		elems = append(elems, nftables.SetElement{Key: r.first.AsSlice()})
		if end := r.last.Next(); end.IsValid() {
			elems = append(elems, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return elems
}

// sourceAddr loads a packet's source address, cut to n.bits unless that is 0
// or everything, into register 1; the rule ends if the family is another.
func sourceAddr(n length) []expr.Any {
	family, offset, size := byte(unix.NFPROTO_IPV4), uint32(12), 4 // RFC 791
	if n.v6 {
		family, offset, size = unix.NFPROTO_IPV6, 8, 16 // RFC 8200
	}
	exprs := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size)},
	}
	if n.bits > 0 && n.bits < size*8 {
		exprs = append(exprs, &expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: uint32(size),
			Mask: net.CIDRMask(n.bits, size*8), Xor: make([]byte, size),
		})
	}
	return exprs
}

// element is an entry as an element of its set. The kernel takes a timeout of
// less than a millisecond for none at all, so the least is a second.
func element(e Entry, now time.Time) nftables.SetElement {
	return nftables.SetElement{
		Key:     e.Prefix.Addr().AsSlice(),
		Timeout: min(max(e.Until.Sub(now), time.Second), longestEntry),
	}
}
