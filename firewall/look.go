package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
)

// What others have in the packet filter, to be looked at only.

// Chain is a chain of nftables, whoever made it. Those of iptables-nft are
// among them, those of iptables-legacy are not.
type Chain struct {
	Table string `json:"table"`
	Name  string `json:"name"`
	// Hook is where it is called: "prerouting", "input", ...; empty: by other
	// chains only.
	Hook     string `json:"hook,omitempty"`
	Priority int    `json:"priority"`
	Ours     bool   `json:"ours"`
}

// maxChains bounds what Chains returns.
const maxChains = 10_000

// Chains returns the chains of nftables in the network namespace of o, and
// changes nothing. It needs CAP_NET_ADMIN.
func Chains(ctx context.Context, o Options) ([]Chain, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	wait := o.Timeout
	if wait == 0 {
		wait = 5 * time.Second
	}
	c, err := nftables.New(nftables.WithNetNSFd(o.NetNS), nftables.WithSockOptions(func(nl *netlink.Conn) error {
		return errors.Join(nl.SetReadBuffer(nftReceiveBuffer), nl.SetDeadline(time.Now().Add(wait)))
	}))
	if err != nil {
		return nil, err
	}
	all, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("reading the chains of nftables: %w", err)
	}
	hooks := map[nftables.ChainHook]string{
		*nftables.ChainHookPrerouting: "prerouting", *nftables.ChainHookInput: "input", *nftables.ChainHookForward: "forward",
		*nftables.ChainHookOutput: "output", *nftables.ChainHookPostrouting: "postrouting",
	}
	var chains []Chain
	for _, ch := range all[:min(len(all), maxChains)] {
		if ch.Table == nil {
			continue
		}
		x := Chain{Table: ch.Table.Name, Name: ch.Name}
		x.Ours = ch.Table.Name == nftTable && ch.Table.Family == nftables.TableFamilyINet
		if ch.Hooknum != nil {
			x.Hook = "ingress"
			if ch.Table.Family != nftables.TableFamilyNetdev {
				x.Hook = hooks[*ch.Hooknum]
			}
		}
		if ch.Priority != nil {
			x.Priority = int(*ch.Priority)
		}
		chains = append(chains, x)
	}
	return chains, nil
}

// CSFState is what matters of an installed CSF.
type CSFState struct {
	// Testing: a cron job clears the firewall every five minutes.
	Testing bool
	// TempLimit is DENY_TEMP_IP_LIMIT; 0: no limit.
	TempLimit int
	IPv6      bool
	// Disabled by csf -x; Broken: csf.error is there, and csf does nothing
	// until it is restarted.
	Disabled, Broken bool
	// LFD runs: it ends temporary bans.
	LFD bool
}

// LookCSF reads the files of the CSF that is installed below root; nil if none
// is.
func LookCSF(root string) (*CSFState, error) {
	p := csfAt(root)
	if !fileExists(p.file("csf.conf")) {
		return nil, nil
	}
	c, err := readCSFConf(p.file("csf.conf"))
	return &CSFState{Testing: c.testing, TempLimit: c.tempLimit, IPv6: c.ipv6, Disabled: fileExists(p.file("csf.disable")),
		Broken: fileExists(p.file("csf.error")), LFD: lfdRuns(p.pid)}, err
}

// Neighbours names the other firewalls that are installed below root or have
// something in chains: CSF, ufw, firewalld, Docker, fail2ban and the like.
func Neighbours(root string, chains []Chain) []string {
	has := func(match func(Chain) bool) bool {
		for _, c := range chains {
			if match(c) {
				return true
			}
		}
		return false
	}
	file := func(paths ...string) bool {
		for _, p := range paths {
			if fileExists(filepath.Join(root, p)) {
				return true
			}
		}
		return false
	}
	ufw, _ := os.ReadFile(filepath.Join(root, "/etc/ufw/ufw.conf"))
	nft, _ := os.ReadFile(filepath.Join(root, "/etc/nftables.conf"))
	var names []string
	for _, n := range []struct {
		name  string
		there bool
	}{
		{"CSF", file("/etc/csf/csf.conf")},
		{"ufw", strings.Contains("\n"+string(ufw[:min(len(ufw), 64<<10)]), "\nENABLED=yes") || has(func(c Chain) bool { return strings.HasPrefix(c.Name, "ufw-") })},
		{"firewalld", file("/run/firewalld.pid", "/run/firewalld") || has(func(c Chain) bool { return c.Table == "firewalld" })},
		{"Docker", file("/run/docker.sock", "/var/run/docker.sock") || has(func(c Chain) bool { return c.Name == "DOCKER" })},
		{"fail2ban", file("/run/fail2ban/fail2ban.sock", "/var/run/fail2ban/fail2ban.sock") || has(func(c Chain) bool { return strings.HasPrefix(c.Name, "f2b-") || c.Table == "f2b-table" })},
		{"CrowdSec", has(func(c Chain) bool {
			return strings.HasPrefix(c.Table, "crowdsec") || strings.HasPrefix(c.Name, "CROWDSEC")
		})},
		{"Imunify360", file("/etc/sysconfig/imunify360")},
		{"nftables.service", !file("/etc/csf/csf.conf") && strings.Contains(string(nft[:min(len(nft), 1<<20)]), "flush ruleset") && file("/etc/systemd/system/sysinit.target.wants/nftables.service")},
	} {
		if n.there {
			names = append(names, n.name)
		}
	}
	return names
}
