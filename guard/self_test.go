package guard

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/sockets"
)

// init lets a copy of the test binary be an sshd that has a connection as
// descriptor 3 and keeps it.
func init() {
	if os.Getenv("SELF_TEST_SSHD") != "" {
		io.Copy(io.Discard, os.NewFile(3, "connection"))
		os.Exit(0)
	}
}

// selfNamespace makes a network namespace with its loopback interface up.
func selfNamespace(t *testing.T) (fd int) {
	t.Helper()
	errc := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
		errc <- err
	}()
	err := <-errc
	if errors.Is(err, unix.EPERM) {
		if os.Getenv("CI") == "true" {
			t.Fatal("a network namespace of its own needs root")
		}
		t.Skip("a network namespace of its own needs root")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// inNamespace calls f on a thread that is in the namespace.
func inNamespace(fd int, f func() error) error {
	errc := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := unix.Setns(fd, unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		errc <- err
	}()
	return <-errc
}

func exemptText(in []Exempt) []string {
	var out []string
	for _, e := range in {
		out = append(out, fmt.Sprintf("%v %s", e.Prefix, e.Why))
	}
	slices.Sort(out)
	return out
}

func TestSelfNetwork(t *testing.T) {
	ns := selfNamespace(t)
	h, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	lo, err := h.LinkByName("lo")
	must(err)
	must(h.LinkSetUp(lo))
	must(h.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "up0"}, PeerName: "up1"}))
	up0, err := h.LinkByName("up0")
	must(err)
	up1, err := h.LinkByName("up1")
	must(err)
	must(h.LinkSetUp(up0))
	must(h.LinkSetUp(up1))
	for _, s := range []string{"192.0.2.10/24", "198.51.100.10/32", "2001:db8::10/64"} {
		a, err := netlink.ParseAddr(s)
		must(err)
		if a.IP.To4() == nil {
			a.Flags = unix.IFA_F_NODAD
		}
		must(h.AddrAdd(up0, a))
	}
	link := up0.Attrs().Index
	_, v4, _ := net.ParseCIDR("0.0.0.0/0")
	_, v6, _ := net.ParseCIDR("::/0")
	_, other, _ := net.ParseCIDR("203.0.113.0/24")
	ip := net.ParseIP
	for _, r := range []netlink.Route{
		{LinkIndex: link, Dst: v4, Gw: ip("192.0.2.1")},
		{LinkIndex: link, Dst: v4, Gw: ip("192.0.2.2"), Table: 100},
		{LinkIndex: link, Dst: v4, Priority: 500, Via: &netlink.Via{AddrFamily: unix.AF_INET6, Addr: ip("2001:db8::3")}},
		{LinkIndex: link, Dst: other, Gw: ip("192.0.2.77")}, // no default route
		{Dst: v4, Priority: 600, MultiPath: []*netlink.NexthopInfo{
			{LinkIndex: link, Gw: ip("192.0.2.5")},
			{LinkIndex: link, Via: &netlink.Via{AddrFamily: unix.AF_INET6, Addr: ip("2001:db8::5")}}}},
		{Dst: v6, MultiPath: []*netlink.NexthopInfo{
			{LinkIndex: link, Gw: ip("2001:db8::1")}, {LinkIndex: link, Gw: ip("2001:db8::2")}}},
		{LinkIndex: link, Dst: v6, Priority: 4096, Gw: ip("fe80::1")}, // in the fixed ranges
	} {
		if err := h.RouteAdd(&r); err != nil {
			t.Fatalf("adding %v: %v", r, err)
		}
	}
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	must(os.WriteFile(resolv, []byte("nameserver 192.0.2.53\nnameserver 192.0.2.1\nnameserver 127.0.0.53\n"), 0o600))

	got, err := selfConfig{netNS: ns, resolvConf: []string{resolv, resolv + ".none"}}.exempt(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	want := exemptText(neverBlocked)
	want = append(want,
		"192.0.2.10/32 an address of this machine",
		"198.51.100.10/32 an address of this machine",
		"2001:db8::10/128 an address of this machine",
		"192.0.2.1/32 a default gateway",
		"192.0.2.2/32 a default gateway",
		"192.0.2.5/32 a default gateway",
		"2001:db8::1/128 a default gateway",
		"2001:db8::2/128 a default gateway",
		"2001:db8::3/128 a default gateway",
		"2001:db8::5/128 a default gateway",
		"192.0.2.53/32 a resolver of this machine",
	)
	slices.Sort(want)
	if g := exemptText(got); !slices.Equal(g, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(g, "\n"), strings.Join(want, "\n"))
	}
}

// Only a session that is logged in counts: anybody can open a connection.
func TestSelfSSHPeers(t *testing.T) {
	ns := selfNamespace(t)
	h, err := netlink.NewHandleAt(netns.NsHandle(ns), unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		t.Fatal(err)
	}
	a, _ := netlink.ParseAddr("203.0.113.1/24") // on loopback, every address of it is ours
	if err := h.AddrAdd(lo, a); err != nil {
		t.Fatal(err)
	}
	bin, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, name := range []string{"sshd", "sshd-session", "telnetd"} {
		if err := os.WriteFile(filepath.Join(dir, name), bin, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range []struct {
		port           int
		program, title string
		state          string // "closing" for a session whose client has hung up
	}{
		{22, "sshd", "sshd: root@pts/0", ""},
		{22, "sshd-session", "sshd-session: alice@notty", ""},
		{22, "sshd", "sshd: unknown [net]", ""},
		{22, "telnetd", "sshd: mallory@pts/1", ""},
		{25, "sshd", "sshd: root@pts/0", ""},
		{22, "sshd", "sshd: root@pts/2", "closing"},
	} {
		var server, client net.Conn
		err := inNamespace(ns, func() error {
			var lc net.ListenConfig
			lc.SetMultipathTCP(false)
			l, err := lc.Listen(context.Background(), "tcp4", fmt.Sprintf("203.0.113.%d:%d", 100+i, p.port))
			if err != nil {
				return err
			}
			defer l.Close()
			d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(203, 0, 113, byte(10+i))}}
			if client, err = d.Dial("tcp4", l.Addr().String()); err != nil {
				return err
			}
			server, err = l.Accept()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		f, err := server.(*net.TCPConn).File()
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(dir, p.program))
		cmd.Args = []string{p.title}
		cmd.Env = []string{"SELF_TEST_SSHD=1"}
		cmd.ExtraFiles = []*os.File{f}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { cmd.Process.Kill(); cmd.Wait() }()
		f.Close()
		server.Close()
		if p.state == "closing" {
			client.Close()
		}
	}
	// Their addresses are also ours, but this part does not know.
	want := []string{"203.0.113.10/32 the peer of an SSH session", "203.0.113.11/32 the peer of an SSH session"}
	// Start may return a moment before procfs has the new title.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		got, err := selfConfig{netNS: ns}.sshPeers(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		if g := exemptText(got); slices.Equal(g, want) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("got %v, want %v", g, want)
		}
	}
}

// What can be found is returned beside the error.
func TestSelfPartial(t *testing.T) {
	ns := selfNamespace(t)
	dir := t.TempDir()
	got, err := selfConfig{netNS: ns, resolvConf: []string{dir}}.exempt(context.Background())
	if !errors.Is(err, unix.EISDIR) || !strings.Contains(err.Error(), "finding the resolvers") {
		t.Errorf("got the error %v", err)
	}
	if !slices.Equal(exemptText(got), exemptText(neverBlocked)) {
		t.Errorf("got %v, want the fixed ranges", exemptText(got))
	}
	// A machine without the file has no resolver, and nothing is wrong.
	if got, err = (selfConfig{netNS: ns, resolvConf: []string{filepath.Join(dir, "none")}}).exempt(context.Background()); err != nil || len(got) != len(neverBlocked) {
		t.Errorf("without resolv.conf: %v, %v", exemptText(got), err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	got, err = selfConfig{netNS: ns}.exempt(ctx)
	if !errors.Is(err, context.Canceled) || len(got) != len(neverBlocked) {
		t.Errorf("cancelled: got %d prefixes, %v; want the fixed ranges", len(got), err)
	}
}

// Self itself, on whatever machine this is.
func TestSelf(t *testing.T) {
	got, err := Self(context.Background())
	if err != nil {
		t.Logf("not all was found: %v", err)
	}
	has := func(a string) bool {
		return slices.ContainsFunc(got, func(e Exempt) bool { return e.Prefix.Contains(netip.MustParseAddr(a)) })
	}
	for _, a := range []string{"127.0.0.1", "::1", "fe80::1", "169.254.1.1", "0.0.0.0", "::", "224.0.0.1", "ff02::1", "255.255.255.255"} {
		if !has(a) {
			t.Errorf("%s may be blocked", a)
		}
	}
	for _, e := range got {
		if e.Why == "" || e.Prefix != e.Prefix.Masked() || e.Prefix.Addr().Is4In6() || e.Prefix.Addr().Zone() != "" {
			t.Errorf("%+v is not in its normal form", e)
		}
	}
	if addrs, err := net.InterfaceAddrs(); err == nil {
		for _, a := range addrs {
			if n, ok := a.(*net.IPNet); ok && !has(n.IP.String()) {
				t.Errorf("our own address %v may be blocked", n.IP)
			}
		}
	}
}

func TestParseResolvConf(t *testing.T) {
	for _, c := range []struct{ name, in, want string }{
		{"empty", "", ""},
		{"usual", "# made by dhclient\nsearch example.org\nnameserver 192.0.2.53\nnameserver\t2001:db8::53\noptions ndots:1\n", "192.0.2.53/32 2001:db8::53/128"},
		{"no newline at the end", "nameserver 192.0.2.53", "192.0.2.53/32"},
		{"CRLF, indented, a comment behind", "  nameserver 192.0.2.53 # ours\r\n", "192.0.2.53/32"},
		{"local and link-local", "nameserver 127.0.0.53\nnameserver ::1\nnameserver fe80::1%eth0\n", ""},
		{"with a zone", "nameserver 2001:db8::53%eth0\n", "2001:db8::53/128"},
		{"mapped", "nameserver ::ffff:192.0.2.53\n", "192.0.2.53/32"},
		{"no addresses", "nameserver\nnameserver dns.example\nnameserver 192.0.2.0/24\nnameservers 192.0.2.1\n#nameserver 192.0.2.1\n", ""},
		{"too long a file", strings.Repeat("#", maxResolvConf) + "\nnameserver 192.0.2.53\n", ""},
	} {
		var got []string
		found, err := parseResolvConf(strings.NewReader(c.in))
		for _, e := range found {
			got = append(got, e.Prefix.String())
		}
		if err != nil || strings.Join(got, " ") != c.want {
			t.Errorf("%s: got %v, %v; want %s", c.name, got, err, c.want)
		}
	}
	many, err := parseResolvConf(strings.NewReader(strings.Repeat("nameserver 1.1.1.1\n", 100_000)))
	if err != nil || len(many) > maxExempt {
		t.Errorf("a long file: got %d, %v", len(many), err)
	}
}

func TestLoggedIn(t *testing.T) {
	for _, c := range []struct {
		name, title string
		want        bool
	}{
		{"sshd", "sshd: root@pts/0", true},
		{"sshd", "sshd: alice@notty", true},
		{"sshd", "sshd: alice@pts/0,pts/1", true},
		{"sshd-session", "sshd-session: alice@internal-sftp", true},
		{"sshd", "sshd: bob@corp.example@pts/3", true},
		{"sshd", "sshd: root", true}, // ssh -N
		{"sshd-session", "sshd-session: bob@corp.example", true},
		{"sshd", "sshd: unknown", false},
		{"sshd", "sshd: ", false},
		{"sshd", "sshd: alice [priv]", false},
		{"sshd", "sshd: bob@corp.example [priv]", false},
		{"sshd", "sshd: bob@corp.example [net]", false},
		{"sshd", "sshd: [accepted]", false},
		{"sshd", "sshd: unknown [priv]", false},
		{"sshd", "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups", false},
		{"sshd", "sshd: @pts/0", false},
		{"sshd", "sshd: root@", false},
		{"sshd", "/usr/sbin/sshd -D", false},
		{"sshd", "", false},
		{"bash", "sshd: root@pts/0", false},
	} {
		if got := loggedIn(sockets.Process{Name: c.name, Title: c.title}); got != c.want {
			t.Errorf("%s %q: got %t", c.name, c.title, got)
		}
	}
}

func TestSSHPeer(t *testing.T) {
	for _, c := range []struct{ env, want string }{
		{"203.0.113.7 50022 192.0.2.1 22", "203.0.113.7"},
		{"2001:db8::7 50022 2001:db8::1 22", "2001:db8::7"},
		{"fe80::7%eth0 50022 fe80::1%eth0 22", "fe80::7"},
		{"::ffff:203.0.113.7 50022 ::ffff:192.0.2.1 22", "203.0.113.7"},
		{"", ""},
		{"203.0.113.7", ""},
		{"203.0.113.7 50022 192.0.2.1", ""},
		{"203.0.113.7 50022 192.0.2.1 22 extra", ""},
		{"UNKNOWN 65535 UNKNOWN 65535", ""}, // sshd behind a pipe
		{"0.0.0.0 0 0.0.0.0 0", ""},
		{"203.0.113.0/24 50022 192.0.2.1 22", ""},
	} {
		got, ok := SSHPeer(c.env)
		if ok != (c.want != "") || ok && got.String() != c.want {
			t.Errorf("%q: got %v, %t; want %q", c.env, got, ok, c.want)
		}
	}
}
