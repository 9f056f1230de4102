package guard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/sockets"
)

// Exempt is a prefix that must never be blocked on this machine.
type Exempt struct {
	// Prefix is masked and not IPv4-mapped.
	Prefix netip.Prefix
	// Why completes the sentence "it is never blocked: it is ...".
	Why string
}

// neverBlocked are the ranges that no peer of a mail server can be in, or that
// would cut the machine off from itself (RFC 6890, RFC 4291, RFC 5771).
var neverBlocked = []Exempt{
	{netip.MustParsePrefix("0.0.0.0/8"), "unspecified"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
	{netip.MustParsePrefix("::/128"), "unspecified"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

const (
	// maxExempt bounds what each source of Self yields.
	maxExempt = 4096
	// maxResolvConf bounds resolv.conf, in bytes; resolv.conf(5) takes three
	// nameservers.
	maxResolvConf = 64 << 10
	sshPort       = 22
)

// Self returns what must never be blocked on this machine as it is now:
// loopback, link-local and the like, its own addresses, its default gateways,
// its resolvers, and the peers of SSH sessions that are logged in. Addresses
// and sessions come and go: ask again now and then.
//
// What was found is returned also with an error, which joins what could not be
// looked up; the fixed ranges are always there.
func Self(ctx context.Context) ([]Exempt, error) {
	return selfConfig{resolvConf: []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"}}.exempt(ctx)
}

// selfConfig is where Self looks.
type selfConfig struct {
	netNS int // file descriptor of the network namespace; 0: our own
	// resolvConf are the files to read, as far as they exist: a machine without
	// one has no resolver, or a local one that resolv.conf(5) need not name.
	// The others are where a local one (systemd-resolved) notes its upstreams.
	resolvConf []string
	procRoot   string
}

func (c selfConfig) exempt(ctx context.Context) ([]Exempt, error) {
	found := slices.Clone(neverBlocked)
	var errs []error
	for _, part := range []struct {
		what string
		look func(context.Context) ([]Exempt, error)
	}{
		{"this machine's addresses", c.addresses},
		{"the default gateways", c.gateways},
		{"the resolvers", c.resolvers},
		{"the peers of SSH sessions", c.sshPeers},
	} {
		if err := ctx.Err(); err != nil {
			errs = append(errs, fmt.Errorf("finding %s: %w", part.what, err))
			continue
		}
		more, err := part.look(ctx)
		found = append(found, more...)
		if err != nil {
			errs = append(errs, fmt.Errorf("finding %s: %w", part.what, err))
		}
	}
	// The same address may be found twice; the first reason will do.
	seen := make(map[netip.Prefix]bool, len(found))
	found = slices.DeleteFunc(found, func(e Exempt) bool {
		dup := seen[e.Prefix]
		seen[e.Prefix] = true
		return dup
	})
	return found, errors.Join(errs...)
}

// exemptAddr returns the one address as a prefix; ok is false for none, or for
// one that the fixed ranges have anyway.
func exemptAddr(addr netip.Addr, why string) (Exempt, bool) {
	addr = addr.Unmap().WithZone("")
	if !addr.IsValid() || slices.ContainsFunc(neverBlocked, func(e Exempt) bool { return e.Prefix.Contains(addr) }) {
		return Exempt{}, false
	}
	return Exempt{netip.PrefixFrom(addr, addr.BitLen()), why}, true
}

func exemptIP(ip net.IP, why string) (Exempt, bool) {
	addr, _ := netip.AddrFromSlice(ip)
	return exemptAddr(addr, why)
}

// handle opens rtnetlink in the namespace.
func (c selfConfig) handle() (*netlink.Handle, error) {
	if c.netNS == 0 {
		return netlink.NewHandle(unix.NETLINK_ROUTE)
	}
	return netlink.NewHandleAt(netns.NsHandle(c.netNS), unix.NETLINK_ROUTE)
}

func (c selfConfig) addresses(context.Context) ([]Exempt, error) {
	h, err := c.handle()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	addrs, err := h.AddrList(nil, netlink.FAMILY_ALL)
	var found []Exempt
	for _, a := range addrs {
		if a.IPNet == nil {
			continue
		}
		if e, ok := exemptIP(a.IP, "an address of this machine"); ok {
			if len(found) == maxExempt {
				return found, fmt.Errorf("more than %d, the others are left out", maxExempt)
			}
			found = append(found, e)
		}
	}
	return found, err
}

// gateways returns the next hops of the default routes of all routing tables.
// A machine with a full table of the Internet's routes has a million others.
func (c selfConfig) gateways(ctx context.Context) ([]Exempt, error) {
	h, err := c.handle()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var (
		found []Exempt
		full  error
	)
	add := func(ip net.IP) {
		e, ok := exemptIP(ip, "a default gateway")
		switch {
		case !ok || slices.Contains(found, e):
		case len(found) == maxExempt:
			full = fmt.Errorf("more than %d, the others are left out", maxExempt)
		default:
			found = append(found, e)
		}
	}
	err = nil
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		all := &netlink.Route{Table: unix.RT_TABLE_UNSPEC}
		ferr := h.RouteListFilteredIter(family, all, netlink.RT_FILTER_TABLE, func(r netlink.Route) bool {
			if isDefault(r.Dst) {
				add(r.Gw)
				add(viaIP(r.Via))
				for _, hop := range r.MultiPath {
					add(hop.Gw)
					add(viaIP(hop.Via))
				}
			}
			return full == nil && ctx.Err() == nil
		})
		err = errors.Join(err, ferr)
	}
	return found, errors.Join(err, full, ctx.Err())
}

// isDefault reports whether dst is everything. Releases of the library differ
// in whether they say so by nil or by a prefix of length 0.
func isDefault(dst *net.IPNet) bool {
	if dst == nil {
		return true
	}
	ones, bits := dst.Mask.Size()
	return ones == 0 && bits > 0
}

// viaIP is the next hop of an IPv4 route that is reached by IPv6 (RFC 8950).
func viaIP(d netlink.Destination) net.IP {
	if via, ok := d.(*netlink.Via); ok && via != nil {
		return via.Addr
	}
	return nil
}

func (c selfConfig) resolvers(context.Context) ([]Exempt, error) {
	var (
		found []Exempt
		errs  []error
	)
	for _, path := range c.resolvConf {
		f, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		more, err := parseResolvConf(f)
		f.Close()
		found = append(found, more...)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading %s: %w", path, err))
		}
	}
	return found, errors.Join(errs...)
}

// parseResolvConf returns the nameservers of a resolv.conf(5). Lines that it
// does not understand are passed over, as the C library does.
func parseResolvConf(r io.Reader) ([]Exempt, error) {
	var found []Exempt
	sc := bufio.NewScanner(io.LimitReader(r, maxResolvConf))
	sc.Buffer(nil, maxResolvConf+1)
	for sc.Scan() {
		fields := strings.Fields(sc.Text())
		if len(fields) < 2 || fields[0] != "nameserver" {
			continue
		}
		addr, err := netip.ParseAddr(fields[1])
		if err != nil {
			continue
		}
		if e, ok := exemptAddr(addr, "a resolver of this machine"); ok && len(found) < maxExempt {
			found = append(found, e)
		}
	}
	return found, sc.Err()
}

// sshPeers returns the peers of SSH sessions that are logged in. A connection
// alone does not count: whoever floods the server could hold one open to
// the SSH port and be safe.
func (c selfConfig) sshPeers(ctx context.Context) ([]Exempt, error) {
	t, err := sockets.Open(sockets.Options{NetNS: c.netNS, ProcRoot: c.procRoot})
	if err != nil {
		return nil, err
	}
	defer t.Close()

	ports := []uint16{sshPort}
	listeners, lerr := t.Listening(ctx, nil)
	for _, l := range listeners {
		sshd := slices.ContainsFunc(l.Processes, func(p sockets.Process) bool { return p.Name == "sshd" })
		if sshd && !slices.Contains(ports, l.Addr.Port()) {
			ports = append(ports, l.Addr.Port())
		}
	}
	conns, err := t.List(ctx, ports)
	if err != nil {
		return nil, errors.Join(lerr, err)
	}
	var inodes []uint32
	for _, s := range conns {
		if s.State == sockets.Established && s.Inode != 0 {
			inodes = append(inodes, s.Inode)
		}
	}
	owners, err := t.Owners(ctx, inodes)
	var found []Exempt
	for _, s := range conns {
		if s.State != sockets.Established || !slices.ContainsFunc(owners[s.Inode], loggedIn) {
			continue
		}
		e, ok := exemptAddr(s.Remote.Addr(), "the peer of an SSH session")
		if ok && len(found) < maxExempt && !slices.Contains(found, e) {
			found = append(found, e)
		}
	}
	return found, errors.Join(lerr, err)
}

// loggedIn reports whether the process is OpenSSH's for a session that is past
// authentication. It then calls itself "sshd: USER@TTY", since 9.8
// "sshd-session: USER@TTY", with TTY "notty" or like "pts/0", or without a
// session (ssh -N, a tunnel) "sshd: USER"; before that its title ends in
// [accepted], [net] or, also later in the process that keeps root's rights,
// [priv] (session.c and sshd-session.c; 9.2 was looked at). Without separation
// of privileges, which ended with 7.5, whoever is not known is "unknown" before.
func loggedIn(p sockets.Process) bool {
	if p.Name != "sshd" && p.Name != "sshd-session" {
		return false
	}
	who, ok := strings.CutPrefix(p.Title, "sshd: ")
	if !ok {
		who, ok = strings.CutPrefix(p.Title, "sshd-session: ")
	}
	at := strings.LastIndexByte(who, '@')
	return ok && who != "" && who != "unknown" && at != 0 && at != len(who)-1 && !strings.ContainsAny(who, " ]")
}

// SSHPeer returns the address of the client in the value of SSH_CONNECTION
// ("203.0.113.7 50022 192.0.2.1 22", see ssh(1)), and whether there is one.
func SSHPeer(env string) (netip.Addr, bool) {
	fields := strings.Fields(env)
	if len(fields) != 4 {
		return netip.Addr{}, false
	}
	addr, err := netip.ParseAddr(fields[0])
	if err != nil || addr.IsUnspecified() {
		return netip.Addr{}, false
	}
	return addr.Unmap().WithZone(""), true
}
