package firewall

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The kernel's ip_set is spoken to by netlink and not through the ipset
// command, which then need not be installed: one block takes tens of
// microseconds instead of a millisecond for the command alone. The calls of
// vishvananda/netlink are not used either: they make a message of each entry,
// and panic on an error that is not an errno. Formats:
// linux/netfilter/ipset/ip_set.h.

const (
	// ipsetProtocol is the version that every kernel since 2.6.39 speaks.
	ipsetProtocol = 6
	// ipsetType holds prefixes of any length, each with its own timeout;
	// nested ones do not get in each other's way.
	ipsetType = "hash:net"
	// ipsetRevision is the least revision of the type that has counters. The
	// least, because an ipset command cannot list what is newer than itself.
	ipsetRevision = 3
	// ipsetMaxTimeout is IPSET_MAX_TIMEOUT in seconds, 24.8 days.
	ipsetMaxTimeout = 2147483
	// ipsetChunk is how many entries go into one message: an attribute's
	// length has 16 bits, and an entry has up to 76 bytes.
	ipsetChunk = 800
	// ipsetListHeader is IPSET_FLAG_LIST_HEADER: no entries.
	ipsetListHeader = 1 << 2

	// Errors that the kernel tells by numbers of its own, IPSET_ERR_* above
	// 4096; those above 4352 are the set type's.
	ipsetErrBusy     = syscall.Errno(nl.IPSET_ERR_BUSY)
	ipsetErrHashFull = syscall.Errno(4352)

	// ipsetBusy is how long a set that somebody is listing is waited for.
	ipsetBusy = time.Second
)

// ipset is a connection to the kernel's ip_set; the zero value with a netNS
// and a timeout is ready to use.
type ipset struct {
	netNS   int
	timeout time.Duration
	conn    *netlink.Conn // nil when not open
	// counts are what new entries begin to count with; usually nil.
	counts map[netip.Prefix]Installed
}

// ipsetHeader is what a set is, without its entries.
type ipsetHeader struct {
	typeName string
	family   byte
	timeouts bool
	flags    uint32
	max      uint32
	// count is the number of entries that have not run out; -1 if the kernel
	// does not tell (before Linux 4.10).
	count int
	refs  uint32
}

// sameKind tells whether the kernel swaps a set of h for one that create made.
func (h ipsetHeader) sameKind(v6 bool) bool {
	return h.typeName == ipsetType && h.family == familyOf(v6)
}

func familyOf(v6 bool) byte {
	if v6 {
		return unix.NFPROTO_IPV6
	}
	return unix.NFPROTO_IPV4
}

// call sends a command about the set, or about none if name is empty, and
// gives each answer to each. Changes want the Acknowledge flag; questions must
// not have it, as the kernel would answer twice.
func (s *ipset) call(ctx context.Context, cmd int, flags netlink.HeaderFlags, name string, attrs []byte, each func([]byte) error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.conn == nil {
		c, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: s.netNS, MessageBufferSize: nftReadSize})
		if err != nil {
			return err
		}
		s.conn = c
	}
	defer func() {
		// As with nftables: an answer that says no is one; after anything
		// else more answers may be on their way.
		var op *netlink.OpError
		if err != nil && (!errors.As(err, &op) || op.Sequence == 0) {
			s.close()
			err = errors.Join(context.Cause(ctx), err)
		}
	}()
	defer deadline(ctx, s.conn, s.timeout)()

	data := nfgenmsg(unix.NFPROTO_IPV4)
	data = appendAttr(data, nl.IPSET_ATTR_PROTOCOL, ipsetProtocol)
	if name != "" {
		data = appendAttr(data, nl.IPSET_ATTR_SETNAME, append([]byte(name), 0)...)
	}
	req, err := s.conn.Send(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(unix.NFNL_SUBSYS_IPSET<<8 | cmd),
			Flags: netlink.Request | flags,
		},
		Data: append(data, attrs...),
	})
	if err != nil {
		return err
	}
	for m, err := range s.conn.ReceiveIter() {
		if err != nil {
			return err
		}
		if m.Header.Sequence != req.Header.Sequence {
			return errors.New("an answer to another question came from the kernel")
		}
		if m.Header.Type == netlink.HeaderType(unix.NFNL_SUBSYS_IPSET<<8|cmd) && len(m.Data) >= 4 && each != nil {
			if err := each(m.Data[4:]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *ipset) close() {
	if s.conn != nil {
		_ = s.conn.Close() // nothing is buffered in it
		s.conn = nil
	}
}

// revision asks which revision of the set type the kernel has for a family,
// which loads its module, and gives the one to use.
func (s *ipset) revision(ctx context.Context, v6 bool) (byte, error) {
	var most, least byte
	b := appendAttr(nil, nl.IPSET_ATTR_TYPENAME, append([]byte(ipsetType), 0)...)
	b = appendAttr(b, nl.IPSET_ATTR_FAMILY, familyOf(v6))
	err := s.call(ctx, nl.IPSET_CMD_TYPE, 0, "", b, func(data []byte) error {
		return attributes(data, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case nl.IPSET_ATTR_REVISION:
				most = ad.Uint8()
			case nl.IPSET_ATTR_REVISION_MIN:
				least = ad.Uint8()
			}
		})
	})
	if err == nil && most < ipsetRevision {
		err = fmt.Errorf("the kernel's %s has revision %d, without counters", ipsetType, most)
	}
	return max(least, ipsetRevision), err
}

// create makes an empty set. With timeouts its entries have their own, and
// counters.
func (s *ipset) create(ctx context.Context, name string, v6, timeouts bool, revision byte, size, maxElem uint32) error {
	b := appendAttr(nil, nl.IPSET_ATTR_TYPENAME, append([]byte(ipsetType), 0)...)
	b = appendAttr(b, nl.IPSET_ATTR_REVISION, revision)
	b = appendAttr(b, nl.IPSET_ATTR_FAMILY, familyOf(v6))
	b = appendNested(b, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
		b = appendBE32(b, nl.IPSET_ATTR_HASHSIZE, size)
		b = appendBE32(b, nl.IPSET_ATTR_MAXELEM, maxElem)
		if timeouts {
			b = appendBE32(b, nl.IPSET_ATTR_TIMEOUT, 0)
			b = appendBE32(b, nl.IPSET_ATTR_CADT_FLAGS, nl.IPSET_FLAG_WITH_COUNTERS)
		}
		return b
	})
	return s.call(ctx, nl.IPSET_CMD_CREATE, netlink.Acknowledge|netlink.Excl, name, b, nil)
}

// hashSize is the kernel's number of buckets for n entries, so that it need
// not grow the table while they come in.
func hashSize(n int) uint32 { return 1 << max(10, bits.Len(uint(n/4))) }

// destroy takes a set away. One that is not there is no error.
func (s *ipset) destroy(ctx context.Context, name string) error {
	err := s.patiently(ctx, func() error { return s.call(ctx, nl.IPSET_CMD_DESTROY, netlink.Acknowledge, name, nil, nil) })
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// swap exchanges the contents of two sets at once for all packets.
func (s *ipset) swap(ctx context.Context, a, b string) error {
	other := appendAttr(nil, nl.IPSET_ATTR_SETNAME2, append([]byte(b), 0)...)
	return s.patiently(ctx, func() error { return s.call(ctx, nl.IPSET_CMD_SWAP, netlink.Acknowledge, a, other, nil) })
}

// patiently repeats f while the set is busy: a set that is being listed can
// neither be swapped nor destroyed.
func (s *ipset) patiently(ctx context.Context, f func() error) error {
	for end := time.Now().Add(min(ipsetBusy, s.timeout)); ; {
		err := f()
		if !errors.Is(err, ipsetErrBusy) && !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// header reads what the set is; unix.ENOENT if there is none.
func (s *ipset) header(ctx context.Context, name string) (ipsetHeader, error) {
	h := ipsetHeader{count: -1}
	flags := appendBE32(nil, nl.IPSET_ATTR_FLAGS, ipsetListHeader)
	err := s.call(ctx, nl.IPSET_CMD_LIST, netlink.Dump, name, flags, func(data []byte) error {
		return attributes(data, func(ad *netlink.AttributeDecoder) {
			switch ad.Type() {
			case nl.IPSET_ATTR_TYPENAME:
				h.typeName = ad.String()
			case nl.IPSET_ATTR_FAMILY:
				h.family = ad.Uint8()
			case nl.IPSET_ATTR_DATA:
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					ad.ByteOrder = binary.BigEndian
					for ad.Next() {
						switch ad.Type() {
						case nl.IPSET_ATTR_MAXELEM:
							h.max = ad.Uint32()
						case nl.IPSET_ATTR_TIMEOUT:
							h.timeouts = true
						case nl.IPSET_ATTR_CADT_FLAGS:
							h.flags = ad.Uint32()
						case nl.IPSET_ATTR_REFERENCES:
							h.refs = ad.Uint32()
						case nl.IPSET_ATTR_ELEMENTS:
							h.count = int(ad.Uint32())
						}
					}
					return nil
				})
			}
		})
	})
	if err == nil && h.typeName == "" { // how some kernels say it
		err = unix.ENOENT
	}
	return h, err
}

// add puts entries into the set, giving those that are there a new timeout and
// new counters; entries without Until have no end. A chunk of which the kernel
// refuses one entry is tried entry by entry: refused gets what stays out.
func (s *ipset) add(ctx context.Context, name string, entries []Entry, now time.Time, refused func(netip.Prefix, error)) error {
	var failed error
	for chunk := range slices.Chunk(entries, ipsetChunk) {
		err := s.batch(ctx, nl.IPSET_CMD_ADD, name, chunk, now)
		if err == nil {
			continue
		}
		if !ipsetRefused(err) {
			return err
		}
		for i := range chunk {
			err := s.batch(ctx, nl.IPSET_CMD_ADD, name, chunk[i:i+1], now)
			if err != nil && !ipsetRefused(err) {
				return err
			}
			if err != nil {
				failed = err
				refused(chunk[i].Prefix, err)
			}
		}
	}
	return failed
}

// ipsetRefused tells whether err is about an entry and not about the set.
func ipsetRefused(err error) bool {
	var errno syscall.Errno
	return errors.As(err, &errno) && (errno >= nl.IPSET_ERR_PRIVATE || errno == unix.ENOMEM)
}

// remove takes prefixes out of the set; those that are not there are no error.
func (s *ipset) remove(ctx context.Context, name string, prefixes []netip.Prefix) error {
	for chunk := range slices.Chunk(prefixes, ipsetChunk) {
		entries := make([]Entry, len(chunk))
		for i, p := range chunk {
			entries[i].Prefix = p
		}
		if err := s.batch(ctx, nl.IPSET_CMD_DEL, name, entries, time.Time{}); err != nil {
			return err
		}
	}
	return nil
}

// batch sends at most ipsetChunk entries in one message. Without the Excl flag
// the kernel takes it for no error if an entry is there already, or, at a
// removal, is not.
func (s *ipset) batch(ctx context.Context, cmd int, name string, entries []Entry, now time.Time) error {
	b := make([]byte, 0, 64+80*len(entries))
	b = appendNested(b, nl.IPSET_ATTR_ADT, func(b []byte) []byte {
		for _, e := range entries {
			b = appendNested(b, nl.IPSET_ATTR_DATA, func(b []byte) []byte {
				b = appendEntry(b, e, now)
				if in := s.counts[e.Prefix]; in.Packets > 0 && cmd == nl.IPSET_CMD_ADD {
					b = appendAttr(b, nl.IPSET_ATTR_BYTES|netlink.NetByteOrder, binary.BigEndian.AppendUint64(nil, in.Bytes)...)
					b = appendAttr(b, nl.IPSET_ATTR_PACKETS|netlink.NetByteOrder, binary.BigEndian.AppendUint64(nil, in.Packets)...)
				}
				return b
			})
		}
		return b
	})
	b = appendAttr(b, nl.IPSET_ATTR_LINENO, 0, 0, 0, 0) // wanted by the kernel, but nothing here reads files
	return s.call(ctx, cmd, netlink.Acknowledge, name, b, nil)
}

func appendEntry(b []byte, e Entry, now time.Time) []byte {
	typ := uint16(nl.IPSET_ATTR_IPADDR_IPV4)
	if e.Prefix.Addr().Is6() {
		typ = nl.IPSET_ATTR_IPADDR_IPV6
	}
	b = appendNested(b, nl.IPSET_ATTR_IP, func(b []byte) []byte {
		return appendAttr(b, typ|netlink.NetByteOrder, e.Prefix.Addr().AsSlice()...)
	})
	b = appendAttr(b, nl.IPSET_ATTR_CIDR, byte(e.Prefix.Bits()))
	if !e.Until.IsZero() {
		b = appendBE32(b, nl.IPSET_ATTR_TIMEOUT, ipsetTimeout(e.Until.Sub(now)))
	}
	return b
}

// ipsetTimeout is d in whole seconds, rounded up: 0 would be for ever.
func ipsetTimeout(d time.Duration) uint32 {
	secs := int64(d / time.Second)
	if d%time.Second > 0 {
		secs++
	}
	return uint32(min(max(secs, 1), ipsetMaxTimeout))
}

// list reads the entries of the set; unix.ENOENT if there is none.
func (s *ipset) list(ctx context.Context, name string) ([]Installed, error) {
	var all []Installed
	now := time.Now()
	err := s.call(ctx, nl.IPSET_CMD_LIST, netlink.Dump, name, nil, func(data []byte) error {
		return attributes(data, func(ad *netlink.AttributeDecoder) {
			if ad.Type() != nl.IPSET_ATTR_ADT {
				return
			}
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() != nl.IPSET_ATTR_DATA {
						continue
					}
					ad.Nested(func(ad *netlink.AttributeDecoder) error {
						if in, ok := readEntry(ad, now); ok {
							all = append(all, in)
						}
						return nil
					})
				}
				return nil
			})
		})
	})
	return all, err
}

// readEntry reads an entry; not ok is what is none of ours and drops nothing.
func readEntry(ad *netlink.AttributeDecoder, now time.Time) (in Installed, ok bool) {
	var addr netip.Addr
	length := -1
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case nl.IPSET_ATTR_IP:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					addr, _ = netip.AddrFromSlice(ad.Bytes())
				}
				return nil
			})
		case nl.IPSET_ATTR_CIDR:
			length = int(ad.Uint8())
		case nl.IPSET_ATTR_TIMEOUT:
			if secs := ad.Uint32(); secs > 0 {
				in.Until = now.Add(time.Duration(secs) * time.Second)
			}
		case nl.IPSET_ATTR_PACKETS:
			in.Packets = ad.Uint64()
		case nl.IPSET_ATTR_BYTES:
			in.Bytes = ad.Uint64()
		}
	}
	if length < 0 { // not told for a single address
		length = addr.BitLen()
	}
	in.Prefix = netip.PrefixFrom(addr, length)
	return in, in.Prefix.IsValid()
}

// appendAttr appends a netlink attribute: length, type, value, padding to 4.
func appendAttr(b []byte, typ uint16, value ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

func appendBE32(b []byte, typ uint16, v uint32) []byte {
	return appendAttr(b, typ|netlink.NetByteOrder, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
}

// appendNested appends an attribute whose value is what f appends: less than
// 64 KiB.
func appendNested(b []byte, typ uint16, f func([]byte) []byte) []byte {
	start := len(b)
	b = f(append(b, 0, 0, 0, 0))
	binary.NativeEndian.PutUint16(b[start:], uint16(len(b)-start))
	binary.NativeEndian.PutUint16(b[start+2:], typ|netlink.Nested)
	return b
}

// ipsetError puts an error of an exchange into words and into one of the
// sentinels.
func ipsetError(doing string, err error) error {
	var errno syscall.Errno
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrGone), errors.Is(err, ErrUnknown), errors.Is(err, ErrFull), errors.Is(err, ErrUnavailable):
		return fmt.Errorf("%s: %w", doing, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%s: %w: %w", doing, ErrUnavailable, plainErrno(err))
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%s: %w: the set is not there", doing, ErrGone)
	case errors.Is(err, ipsetErrHashFull), errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("%s: %w: the kernel takes no more into the set", doing, ErrFull)
	case errors.As(err, &errno) && errno >= nl.IPSET_ERR_PRIVATE:
		// The set is another than the one that we made.
		return fmt.Errorf("%s: %w: %s", doing, ErrGone, ipsetErrText(errno))
	}
	return fmt.Errorf("%s: %w: %w", doing, ErrUnknown, err)
}

// ipsetErrText is what an error number of ip_set means.
func ipsetErrText(errno syscall.Errno) string {
	text := map[syscall.Errno]string{
		nl.IPSET_ERR_PROTOCOL:      "the kernel does not understand the request",
		nl.IPSET_ERR_FIND_TYPE:     "the kernel has no set of type " + ipsetType,
		nl.IPSET_ERR_MAX_SETS:      "the kernel takes no more sets",
		nl.IPSET_ERR_BUSY:          "the set is in use",
		nl.IPSET_ERR_TYPE_MISMATCH: "the set has another type",
		nl.IPSET_ERR_EXIST:         "there is a set of that name already",
		nl.IPSET_ERR_INVALID_CIDR:  "the set does not take such a prefix length",
		nl.IPSET_ERR_TIMEOUT:       "the set has no timeouts",
	}[errno]
	if text == "" {
		text = fmt.Sprintf("ip_set error %d", int(errno))
	}
	return text
}
