package firewall

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestOpen(t *testing.T) {
	ns := newNetNS(t)
	for _, tc := range []struct{ name, backend, why string }{
		{Auto, NFTables, "nftables: chosen because"},
		{NFTables, NFTables, "nftables: as configured"},
		{IPTables, IPTables, "iptables: as configured; iptables 1."},
		{Memory, Memory, "memory: as configured; nothing is blocked"},
	} {
		fw, why, err := Open(t.Context(), tc.name, Options{NetNS: ns.fd})
		if errors.Is(err, ErrUnavailable) {
			cannot(t, "%v", err)
		}
		if err != nil || fw.Name() != tc.backend || !strings.HasPrefix(why, tc.why) {
			t.Fatalf("%s: %v, %q, %v", tc.name, fw, why, err)
		}
		if err := fw.Close(t.Context(), false); err != nil {
			t.Error(err)
		}
	}
	if got := ns.run("nft", "list", "ruleset"); got != "" {
		t.Errorf("Open changed something:\n%s", got)
	}
	for _, bad := range []struct {
		name string
		o    Options
	}{{"pf", Options{}}, {NFTables, Options{Hook: "output"}}, {Auto, Options{Hook: "output"}}} {
		if fw, _, err := Open(t.Context(), bad.name, bad.o); err == nil || fw != nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("%+v: %v, %v", bad, fw, err)
		}
	}
}

// absent is a backend that cannot work here.
type absent struct{ Firewall }

func (absent) Probe(context.Context) (Capabilities, error) {
	return Capabilities{}, fmt.Errorf("looking for it: %w: not in this kernel", ErrUnavailable)
}

// TestOpenOrder takes the backends away one by one.
func TestOpenOrder(t *testing.T) {
	ns := newNetNS(t)
	r := newFakeCSF(t, "")
	here := csfAt(string(r))
	here.command = r.path("csf")
	fake := func(o Options) (Firewall, error) { return newCSF(o, here, 0) }
	xt := func(noSets bool) func(o Options) (Firewall, error) {
		return func(o Options) (Firewall, error) { return newXt(o, "iptables-nft", "ip6tables-nft", noSets) }
	}
	without := func(f func(Options) (Firewall, error)) func(Options) (Firewall, error) {
		return func(o Options) (Firewall, error) {
			fw, err := f(o)
			return absent{fw}, err
		}
	}
	const no = " cannot be used: looking for it: packet filter not available: not in this kernel"
	for _, tc := range []struct {
		name string
		all  []opener
		csf  bool // on a host that has it
		want string
		why  []string
	}{
		{Auto, []opener{{NFTables, NewNFTables}, {IPTables, xt(false)}, {CSF, fake}}, true, NFTables,
			[]string{"nftables: chosen because the kernel takes our table", "; CSF is installed too, and its restarts leave our table alone"}},
		{"", []opener{{NFTables, without(NewNFTables)}, {IPTables, xt(false)}, {CSF, fake}}, true, IPTables,
			[]string{"iptables: chosen because the firewall backend nftables" + no + "; iptables 1.", " (nft) with ipset", "csf -r removes our rules"}},
		{Auto, []opener{{NFTables, without(NewNFTables)}, {IPTables, xt(true)}, {CSF, fake}}, false, IPTables,
			[]string{" (nft) without ipset: each block is a rule, 500 at most, and stays when smtpguard is dead"}},
		{Auto, []opener{{NFTables, without(NewNFTables)}, {IPTables, without(xt(false))}, {CSF, fake}}, true, CSF,
			[]string{"csf: chosen because the firewall backend nftables" + no + ", and the firewall backend iptables" + no + "; by temporary denies, 100 at most"}},
		{CSF, []opener{{NFTables, NewNFTables}, {CSF, fake}}, true, CSF, []string{"csf: as configured; by temporary denies"}},
		{Auto, []opener{{NFTables, without(NewNFTables)}, {IPTables, without(xt(false))}, {CSF, without(fake)}}, false, "", nil},
		{IPTables, []opener{{NFTables, NewNFTables}, {IPTables, without(xt(false))}}, false, "", nil},
	} {
		paths := here
		if !tc.csf {
			paths = csfAt(t.TempDir())
		}
		fw, why, err := open(t.Context(), tc.name, Options{NetNS: ns.fd}, tc.all, paths)
		if tc.want == "" {
			if !errors.Is(err, ErrUnavailable) || fw != nil || strings.Count(err.Error(), "cannot be used") != map[bool]int{true: 3, false: 1}[tc.name == Auto] {
				t.Errorf("%+v, %v", fw, err)
			}
			continue
		}
		if err != nil {
			cannot(t, "%v", err)
		}
		if fw.Name() != tc.want {
			t.Errorf("%s instead of %s", fw.Name(), tc.want)
		}
		for _, want := range tc.why {
			if !strings.Contains(why, want) {
				t.Errorf("%q is not in: %s", want, why)
			}
		}
		if !tc.csf && strings.Contains(why, "CSF") {
			t.Error(why)
		}
		if err := fw.Close(t.Context(), false); err != nil {
			t.Error(err)
		}
	}
}

// TestOpenWithoutRights: the reason is told, and what to do about it.
func TestOpenWithoutRights(t *testing.T) {
	ns := newNetNS(t)
	var err error
	dropErr := ns.do(func() error {
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var none [2]unix.CapUserData
		if err := unix.Capset(&hdr, &none[0]); err != nil {
			return err
		}
		_, _, err = Open(context.Background(), Auto, Options{})
		return nil
	})
	if dropErr != nil {
		t.Fatal(dropErr)
	}
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("%v", err)
	}
}
