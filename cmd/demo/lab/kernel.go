package lab

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Held asks the kernel for the connections to the mail server that are open
// on the server's side and belong to a process, and counts them by the
// peer's address.
func (w *World) Held() (map[netip.Addr]int, error) {
	held := map[netip.Addr]int{}
	err := w.server.do(func() error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			all, err := netlink.SocketDiagTCP(family)
			if err != nil {
				return err
			}
			for _, s := range all {
				local, _ := netip.AddrFromSlice(s.ID.Source)
				peer, _ := netip.AddrFromSlice(s.ID.Destination)
				open := s.State == netlink.TCP_ESTABLISHED || s.State == netlink.TCP_CLOSE_WAIT
				if open && s.INode != 0 && s.ID.SourcePort == w.smtp(local.Unmap()).Port() {
					held[peer.Unmap()]++
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's socket table: %w", err)
	}
	return held, nil
}

// HeldBy counts the connections that these sources hold.
func (w *World) HeldBy(sources []netip.Addr) (int, error) {
	held, err := w.Held()
	n := 0
	for _, s := range sources {
		n += held[s]
	}
	return n, err
}

// Blocked is an element of one of smtpguard's sets in the kernel.
type Blocked struct {
	Prefix  netip.Prefix
	Expires time.Duration // until the kernel itself removes it
	Packets uint64        // dropped so far
}

// Blocked reads from the kernel what smtpguard's table in the server's
// network holds, in the order of the prefixes. It does not use the firewall
// package, which is what it checks.
func (w *World) Blocked() (list []Blocked, err error) {
	if w.loopback {
		return nil, nil
	}
	for range 5 {
		// A table that is replaced while it is read gives ENOENT.
		if list, err = w.blocked(); !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return list, err
}

func (w *World) blocked() ([]Blocked, error) {
	c, err := nftables.New(nftables.WithNetNSFd(w.server.fd))
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's nftables: %w", err)
	}
	tables, err := c.ListTablesOfFamily(nftables.TableFamilyINet)
	if err != nil {
		return nil, fmt.Errorf("reading the kernel's nftables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == "smtpguard" })
	if i < 0 {
		return nil, nil // nothing is blocked
	}
	table := tables[i]
	sets, err := c.GetSets(table)
	if err != nil {
		return nil, fmt.Errorf("reading the sets of table inet smtpguard: %w", err)
	}
	var list []Blocked
	for _, set := range sets {
		// b4_24 holds the masked addresses of IPv4 prefixes of 24 bits.
		bits, ok := strings.CutPrefix(set.Name, "b4_")
		if !ok {
			bits, ok = strings.CutPrefix(set.Name, "b6_")
		}
		n, err := strconv.Atoi(bits)
		if !ok || err != nil {
			continue
		}
		elements, err := c.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("reading set %s of table inet smtpguard: %w", set.Name, err)
		}
		for _, e := range elements {
			addr, ok := netip.AddrFromSlice(e.Key)
			if !ok {
				continue
			}
			b := Blocked{Prefix: netip.PrefixFrom(addr, n), Expires: e.Expires}
			if e.Counter != nil {
				b.Packets = e.Counter.Packets
			}
			list = append(list, b)
		}
	}
	slices.SortFunc(list, func(a, b Blocked) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()))
	})
	return list, nil
}
