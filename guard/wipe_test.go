package guard

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// host is a machine of its own for what administrators and their programs do:
// a shell in namespaces (network, mounts, processes) with copies of the files
// below /etc and /var that such programs write. It dies with the test.
type host struct {
	t     *testing.T
	netNS int
	in    io.WriteCloser
	out   *bufio.Reader
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		cannot(t, "private copies of /etc need root")
	}
	h := &host{t: t, netNS: newNamespace(t)}
	cmd := exec.Command("nsenter", "--net=/proc/self/fd/3", "unshare", "--mount", "--pid", "--fork", "--kill-child", "sh")
	cmd.ExtraFiles = []*os.File{os.NewFile(uintptr(dup(t, h.netNS)), "netns")}
	defer cmd.ExtraFiles[0].Close()
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, w := io.Pipe()
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = w, w, 5*time.Second
	h.in, h.out = in, bufio.NewReader(out)
	if err := cmd.Start(); err != nil {
		cannot(t, "%v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // and with it, by --kill-child, all the others
		_ = out.Close()
		_ = cmd.Wait() // it was killed
	})
	if err := h.try(`mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs none /run && mkdir -p /run/lock /run/dbus
		for d in /etc/ufw /etc/default /etc/firewalld /etc/fail2ban /var/log /var/lib/fail2ban; do
			[ -d $d ] || continue
			c=` + t.TempDir() + `$d; mkdir -p $c; cp -a $d/. $c/; mount --bind $c $d
		done
		ip link set lo up`); err != nil {
		cannot(t, "no private mounts can be made here: %v", err)
	}
	return h
}

// sh runs commands in the host, and fails the test if one fails.
func (h *host) sh(script string) {
	h.t.Helper()
	if err := h.try(script); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) try(script string) error {
	// -e in a shell of its own; daemons that it starts stay.
	const end = "--the end--"
	fmt.Fprintf(h.in, "sh -ec '%s' </dev/null; echo; echo %s $?\n", strings.ReplaceAll(script, "'", `'\''`), end)
	type answer struct{ said, status string }
	done := make(chan answer, 1)
	go func() {
		var said strings.Builder
		for {
			line, err := h.out.ReadString('\n')
			if status, ok := strings.CutPrefix(line, end); ok || err != nil {
				done <- answer{said.String(), strings.TrimSpace(status)}
				return
			}
			said.WriteString(line)
		}
	}()
	select {
	case a := <-done:
		if a.status != "0" {
			return fmt.Errorf("status %s of: %s\n%s", a.status, script, a.said)
		}
		return nil
	case <-time.After(60 * time.Second):
		return fmt.Errorf("does not end: %s", script)
	}
}

// cannot skips a test that this machine cannot run; in CI it has to.
func cannot(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func needs(t *testing.T, commands ...string) {
	t.Helper()
	for _, c := range commands {
		if _, err := exec.LookPath(c); err != nil {
			cannot(t, "%s is not installed", c)
		}
	}
}

// guarded is a guard that blocks 10.9.2.0/24 on the host; refused tells whether
// port 25 of the host cannot be reached from there, and from elsewhere it can.
func (h *host) guarded(open func(firewall.Options) (firewall.Firewall, error)) (g *Guard, refused func() (bool, error)) {
	t := h.t
	client := newNamespace(t)
	inside := func(ns int, f func(*netlink.Handle) error) {
		t.Helper()
		nh, err := netlink.NewHandleAt(netns.NsHandle(ns))
		if err != nil {
			t.Fatal(err)
		}
		defer nh.Close()
		if err := f(nh); err != nil {
			t.Fatal(err)
		}
	}
	inside(h.netNS, func(nh *netlink.Handle) error {
		return nh.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(client)})
	})
	up := func(ns int, addrs ...string) {
		inside(ns, func(nh *netlink.Handle) error {
			link, err := nh.LinkByName("eth0")
			for _, a := range addrs {
				if err == nil {
					var addr *netlink.Addr
					if addr, err = netlink.ParseAddr(a); err == nil {
						err = nh.AddrAdd(link, addr)
					}
				}
			}
			if err == nil {
				err = nh.LinkSetUp(link)
			}
			return err
		})
	}
	up(h.netNS, "10.9.0.1/16")
	up(client, "10.9.2.2/16", "10.9.3.3/16")
	var l net.Listener
	if err := inNamespace(h.netNS, func() (err error) { l, err = net.Listen("tcp", "10.9.0.1:25"); return err }); err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()

	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	st, err := store.Open(filepath.Join(t.TempDir(), "s.db"), store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{})
	g, err = New(t.Context(), Options{Policy: p, Store: st, Capacity: 100,
		OpenFirewall: func(_ context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error) {
			return open(firewall.Options{Ports: []uint16{25}, NetNS: h.netNS, Allow: allow, MaxEntries: entries})
		},
		Notify: func(s string) {
			if s == "READY=1" {
				close(ready)
			}
		},
		Self: func(context.Context) ([]Exempt, error) { return neverBlocked, nil }})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := g.Close(context.Background(), false); err != nil {
			t.Error(err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
		l.Close()
	})
	<-ready
	if _, err := g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix("10.9.2.0/24"), For: time.Hour, By: "root"}}, false); err != nil {
		t.Fatal(err)
	}
	return g, func() (refused bool, err error) { return refusedIn(client, "10.9.2.2", "10.9.3.3", "10.9.0.1:25") }
}

// refused tells whether connects from an address are dropped, and proves it:
// one is begun, then another address, which is not blocked, makes the same way
// and arrives. What was sent before has then arrived too, or never will. An
// error means that nothing is proved.
func refusedIn(ns int, from, neighbour, addr string) (refused bool, err error) {
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		return false, err
	}
	sockaddr := func(a netip.AddrPort) unix.Sockaddr {
		if a.Addr().Is4() {
			return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
		}
		return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
	}
	family := unix.AF_INET
	if to.Addr().Is6() {
		family = unix.AF_INET6
	}
	err = inNamespace(ns, func() error {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, sockaddr(netip.AddrPortFrom(netip.MustParseAddr(from), 0))); err != nil {
			return err
		}
		if err := unix.Connect(fd, sockaddr(to)); err != nil && !errors.Is(err, unix.EINPROGRESS) {
			return err
		}
		d := net.Dialer{Timeout: 10 * time.Second, LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(neighbour), 0))}
		c, err := d.Dial("tcp", addr)
		if err != nil {
			return fmt.Errorf("the neighbour, whom nobody blocks, does not get through either: %w", err)
		}
		c.Close()
		_, err = unix.Getpeername(fd)
		refused = errors.Is(err, unix.ENOTCONN)
		return nil
	})
	return refused, err
}

// TestWipes is what other people's programs do to the packet filter, each the
// real program where there is one: soon after, the blocks are in force again,
// as packets see it.
func TestWipes(t *testing.T) {
	const (
		nftConf = `flush ruleset
table inet filter { chain input { type filter hook input priority filter; policy accept; ct state established,related accept; tcp dport 25 accept; } }`
		rulesV4 = `*filter
:INPUT ACCEPT [0:0]
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p tcp --dport 25 -j ACCEPT
COMMIT
*raw
:PREROUTING ACCEPT [0:0]
COMMIT`
		flushAll  = `for t in filter raw mangle nat; do for c in iptables ip6tables; do $c -t $t -F; $c -t $t -X; done; done`
		firewalld = `firewalld --nofork --nopid >/dev/null 2>&1 & echo $! >/run/firewalld.test
			for i in $(seq 300); do firewall-cmd --state >/dev/null 2>&1 && break; sleep 0.1; done
			firewall-cmd -q --zone=public --add-port=25/tcp --permanent; firewall-cmd -q --zone=public --add-port=25/tcp`
		dockerd = `dockerd --data-root /run/docker-data --exec-root /run/docker-exec --pidfile /run/dockerd.pid -H unix:///run/docker.sock --storage-driver vfs >/run/dockerd.log 2>&1 & p=$!
			for i in $(seq 300); do docker -H unix:///run/docker.sock version >/dev/null 2>&1 && exit 0; kill -0 $p || break; sleep 0.1; done
			tail -n 5 /run/dockerd.log; exit 1`
		dockerStop = `p=$(cat /run/dockerd.pid); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.05; done`
	)
	type event struct{ name, script string }
	for _, group := range []struct {
		name   string
		needs  []string
		setup  string // before our blocks
		events []event
	}{
		{"by hand", []string{"nft", "iptables", "ip6tables", "ipset"}, ``, []event{
			{"nft flush ruleset", `nft flush ruleset`},
			{"systemctl restart nftables", `printf '%s\n' '` + nftConf + `' >/run/nftables.conf; nft -f /run/nftables.conf`},
			{"nft delete table", `! nft list table inet smtpguard >/dev/null 2>&1 || nft delete table inet smtpguard`},
			{"iptables -F", `iptables -F; iptables -t raw -F`},
			{"iptables -F and -X everywhere", flushAll},
			{"netfilter-persistent reload", `printf '%s\n' '` + rulesV4 + `' | iptables-restore`},
			{"ipset flush", `ipset flush`},
			{"csf -r with LF_IPSET", flushAll + `; ipset flush; ipset destroy`},
			{"csf -f, then csf -r", flushAll + `; iptables -P INPUT ACCEPT; iptables -N DENYIN; iptables -I INPUT -j DENYIN`},
		}},
		{"ufw", []string{"ufw", "iptables"}, `ufw allow 25/tcp; ufw --force enable`, []event{
			{"reload", `ufw reload`},
			{"disable and enable", `ufw disable; ufw --force enable`},
			{"another rule", `ufw insert 1 deny from 203.0.113.0/24`},
			{"flush-all", `/lib/ufw/ufw-init flush-all`},
			{"force-reload", `/lib/ufw/ufw-init force-reload`},
			{"reset", `ufw --force reset`},
		}},
		{"firewalld", []string{"firewalld", "firewall-cmd", "dbus-daemon"}, `dbus-daemon --system --nopidfile --fork
			for i in $(seq 100); do [ -S /run/dbus/system_bus_socket ] && break; sleep 0.1; done`, []event{
			{"start", firewalld},
			{"reload", `firewall-cmd --reload`},
			{"complete reload", `firewall-cmd --complete-reload`},
			{"direct rule and reload", `firewall-cmd --direct --add-rule ipv4 filter INPUT 0 -p tcp --dport 9 -j ACCEPT; firewall-cmd --reload`},
			{"stop", `p=$(cat /run/firewalld.test); kill $p; while kill -0 $p 2>/dev/null; do sleep 0.05; done`},
			{"start with its iptables backend", `sed -i "s/^FirewallBackend=.*/FirewallBackend=iptables/" /etc/firewalld/firewalld.conf; ` + firewalld},
			{"reload of that", `firewall-cmd --reload`},
		}},
		// Docker writes to /etc/docker and /opt/containerd, wherever its data are.
		{"docker", []string{"dockerd", "containerd", "docker", "iptables"}, `cp -a /etc /run/etc; mount --bind /run/etc /etc; mount -t tmpfs none /opt
			` + "(" + dockerd + "); " + dockerStop, []event{
			{"start", dockerd},
			{"network create", `docker -H unix:///run/docker.sock network create x`},
			{"network remove", `docker -H unix:///run/docker.sock network rm x`},
			{"restart", dockerStop + "\n" + dockerd},
			{"restart after iptables -F", flushAll + "\n" + dockerStop + "\n" + dockerd},
			{"stop", dockerStop},
		}},
		{"fail2ban", []string{"fail2ban-client", "fail2ban-server", "iptables"}, `mkdir -p /run/fail2ban; rm -f /etc/fail2ban/jail.d/*; : >/run/auth.log
			printf "%s\n" "[x]" "enabled = true" "backend = polling" "filter = sshd" "logpath = /run/auth.log" "banaction = iptables-multiport" "port = 25" >/etc/fail2ban/jail.d/x.conf`, []event{
			{"start", `fail2ban-client start; for i in $(seq 100); do fail2ban-client ping >/dev/null 2>&1 && break; sleep 0.1; done`},
			{"ban", `fail2ban-client set x banip 203.0.113.77`},
			{"reload", `fail2ban-client reload`},
			{"unban and stop", `fail2ban-client unban --all; fail2ban-client stop`},
		}},
	} {
		for name, open := range map[string]func(firewall.Options) (firewall.Firewall, error){
			"nftables": firewall.NewNFTables, "iptables": firewall.NewIPTables,
		} {
			t.Run(group.name+" and "+name, func(t *testing.T) {
				t.Parallel()
				needs(t, group.needs...)
				h := newHost(t)
				if err := h.try(group.setup); err != nil {
					cannot(t, "%s does not work here: %v", group.name, err)
				}
				g, refused := h.guarded(open)
				if ok, err := refused(); err != nil || !ok {
					t.Fatalf("before anything happens: refused is %v, %v", ok, err)
				}
				for _, e := range group.events {
					h.sh(e.script)
					start, open := time.Now(), time.Duration(0)
					for n := 0; n < 2; { // twice in a row
						ok, err := refused()
						if ok && err == nil {
							n++
							continue
						}
						open, n = time.Since(start), 0
						if open > 20*time.Second {
							t.Fatalf("%s: not blocked any more: %v", e.name, err)
						}
						time.Sleep(20 * time.Millisecond)
					}
					t.Logf("%-35s open for %v", e.name, open.Round(time.Millisecond))
				}
				for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
					s, b := must(g.Status(t.Context())).Firewall, must(g.Blocks(t.Context()))
					if s.Agrees && len(b) == 1 && b[0].State == InForce {
						break
					}
					if time.Now().After(end) {
						t.Fatalf("%+v\n%+v", s, b)
					}
				}
			})
		}
	}
}
