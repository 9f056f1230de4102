// Package lab builds a small private world in which a mail server can be
// flooded for real: a server's network and an attackers' network joined by
// one cable, a mail server with few slots, attackers over TCP from as many
// addresses as one likes, and a sender of proper mail that notes when its
// mail is refused and when it is accepted again.
//
// The networks are Linux network namespaces without a name, the files are in
// one temporary directory, and the programs are watched over by a keeper
// process that ends them and removes the directory when the program that made
// the world ends, however it ends. Nothing is left behind and nothing ever
// leaves the two namespaces. All addresses are private ones.
//
// A program that uses the lab calls Enter (or Serve) first.
package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
)

// SMTPPort is where the mail server of a world with namespaces listens.
const SMTPPort = 25

// The addresses of the world. Every address in the attackers' and in the
// senders' networks exists: connections can be made from any of them.
var (
	ServerV4 = netip.MustParseAddr("10.65.0.1")
	ServerV6 = netip.MustParseAddr("fd65::1")

	AttackersV4 = netip.MustParsePrefix("10.66.0.0/16")
	AttackersV6 = netip.MustParsePrefix("fd00::/48")
	SendersV4   = netip.MustParsePrefix("10.67.0.0/16")
	SendersV6   = netip.MustParsePrefix("fd67::/48")
)

// Options describe the world to be made.
type Options struct {
	// Loopback makes a world without namespaces, for machines that allow
	// none: everything is on 127.0.0.0/8, only the stand-in can be the
	// mail server, and nothing can be blocked in it.
	Loopback bool
}

// World is a server's network and an attackers' network, with a directory
// for the files of both. Close takes it down.
type World struct {
	server, attackers *space // one and the same with Options.Loopback
	loopback          bool
	dir               string
	keeper            *keeper
	port              atomic.Uint32 // where the mail server listens, with Options.Loopback

	mu     sync.Mutex
	closed bool
	onStop []func() // in reverse order, before the namespaces go
}

// New makes a world. It needs the capabilities CAP_SYS_ADMIN and
// CAP_NET_ADMIN, which Enter gets where that is possible; without them the
// error wraps ErrNoNamespaces. The context bounds the making only.
func New(ctx context.Context, o Options) (_ *World, err error) {
	w := &World{loopback: o.Loopback}
	defer func() {
		if err != nil {
			w.Close()
		}
	}()
	if w.dir, err = os.MkdirTemp("", "smtpguard-lab-"); err != nil {
		return nil, fmt.Errorf("making the lab's directory: %w", err)
	}
	// The mail server runs as its own user and must get in.
	if err := os.Chmod(w.dir, 0o755); err != nil {
		return nil, err
	}
	if w.keeper, err = startKeeper(w.dir); err != nil {
		return nil, err
	}
	if o.Loopback {
		w.server, err = newSpace(false)
		w.attackers = w.server
		return w, err
	}
	if w.server, err = newSpace(true); err != nil {
		return nil, err
	}
	if w.attackers, err = newSpace(true); err != nil {
		return nil, err
	}
	if err := join(w.server, w.attackers); err != nil {
		return nil, err
	}
	return w, ctx.Err()
}

// Dir is the directory of the world's files. It is readable by everyone on
// the machine and is removed by Close.
func (w *World) Dir() string { return w.dir }

// Path is the path of a file in Dir.
func (w *World) Path(name string) string { return filepath.Join(w.dir, name) }

// Loopback reports whether the world has no namespaces.
func (w *World) Loopback() bool { return w.loopback }

// NetNS is the file descriptor of the server's network namespace, 0 if the
// world has none. It is good until Close.
func (w *World) NetNS() int {
	if w.loopback {
		return 0
	}
	return w.server.fd
}

// Start starts cmd in the server's network. The program is killed when this
// process dies; it is the caller's to wait for.
func (w *World) Start(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	return w.server.do(cmd.Start)
}

// Run starts cmd in the server's network and waits for its end.
func (w *World) Run(cmd *exec.Cmd) error {
	if err := w.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

// InServer calls f on a thread whose network is the server's. Whatever f
// opens belongs there for ever. Programs that f starts are in that network
// too; f must not block, other users of the world wait for it.
func (w *World) InServer(f func() error) error { return w.server.do(f) }

// atClose registers what Close has to do before the networks go.
func (w *World) atClose(f func()) {
	w.mu.Lock()
	closed := w.closed
	if !closed {
		w.onStop = append(w.onStop, f)
	}
	w.mu.Unlock()
	if closed {
		f()
	}
}

// Close ends attackers, senders and mail server, removes the directory and
// gives the namespaces back. It may be called more than once.
func (w *World) Close() error {
	w.mu.Lock()
	stop := w.onStop
	w.onStop, w.closed = nil, true
	w.mu.Unlock()
	for i := len(stop) - 1; i >= 0; i-- {
		stop[i]()
	}
	var err error
	if w.keeper != nil {
		err = w.keeper.close()
	}
	if w.dir != "" {
		err = errors.Join(err, os.RemoveAll(w.dir))
	}
	if w.attackers != nil && w.attackers != w.server {
		w.attackers.close()
	}
	if w.server != nil {
		w.server.close()
	}
	return err
}

// join lays a cable between the two namespaces and gives both their
// addresses and routes.
func join(server, attackers *space) error {
	const plug = "lab0"
	err := server.do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = plug
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: attrs, PeerName: plug, PeerNamespace: netlink.NsFd(attackers.fd),
		})
	})
	if err != nil {
		return fmt.Errorf("joining the namespaces by a veth pair: %w", err)
	}
	gateway := map[bool]netip.Addr{true: netip.MustParseAddr("10.65.0.2"), false: netip.MustParseAddr("fd65::2")}
	// Each knows the other's hardware address from the start: asking for it
	// over a cable that is just up takes seconds with IPv6.
	macs := map[*space]net.HardwareAddr{}
	for _, s := range []*space{server, attackers} {
		err := s.do(func() error {
			link, err := netlink.LinkByName(plug)
			if err == nil {
				macs[s] = link.Attrs().HardwareAddr
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("looking at the veth pair: %w", err)
		}
	}
	far := []netip.Prefix{AttackersV4, AttackersV6, SendersV4, SendersV6}
	err = server.do(func() error {
		if err := addresses(plug, ServerV4, ServerV6); err != nil {
			return err
		}
		if err := neighbours(plug, macs[attackers], gateway[true], gateway[false]); err != nil {
			return err
		}
		for _, p := range far {
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(p), Gw: gateway[p.Addr().Is4()].AsSlice()}); err != nil {
				return fmt.Errorf("route to %s: %w", p, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("setting up the server's network: %w", err)
	}
	err = attackers.do(func() error {
		if err := addresses(plug, gateway[true], gateway[false]); err != nil {
			return err
		}
		if err := neighbours(plug, macs[server], ServerV4, ServerV6); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		for _, p := range far {
			r := &netlink.Route{Dst: ipNet(p), LinkIndex: lo.Attrs().Index, Type: syscall.RTN_LOCAL, Scope: netlink.SCOPE_HOST, Table: syscall.RT_TABLE_LOCAL}
			if err := netlink.RouteAdd(r); err != nil {
				return fmt.Errorf("local route for %s: %w", p, err)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("setting up the attackers' network: %w", err)
	}
	return nil
}

// addresses brings up the loopback and the cable's end with two addresses.
func addresses(plug string, v4, v6 netip.Addr) error {
	if err := loopbackUp(); err != nil {
		return err
	}
	link, err := netlink.LinkByName(plug)
	if err != nil {
		return err
	}
	for _, p := range []netip.Prefix{netip.PrefixFrom(v4, 24), netip.PrefixFrom(v6, 64)} {
		// Without duplicate detection: it takes seconds and there is
		// nobody else on this cable.
		a := &netlink.Addr{IPNet: ipNet(p), Flags: syscall.IFA_F_NODAD}
		if p.Addr().Is4() {
			a.Flags = 0
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("address %s: %w", p, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// neighbours says by which hardware address the other end is reached.
func neighbours(plug string, mac net.HardwareAddr, v4, v6 netip.Addr) error {
	link, err := netlink.LinkByName(plug)
	if err != nil {
		return err
	}
	for _, a := range []netip.Addr{v4, v6} {
		n := &netlink.Neigh{LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(n); err != nil {
			return fmt.Errorf("neighbour %s: %w", a, err)
		}
	}
	return nil
}
