package firewall

import (
	"errors"
	"testing"
)

// xtBackends are the variants of iptables, with ipset and without.
var xtBackends = []backend{
	{"iptables-nft", true, xtOpener(xtNFT, false)},
	{"iptables-legacy", true, xtOpener(xtLegacy, false)},
	{"iptables-nft without ipset", true, xtOpener(xtNFT, true)},
	{"iptables-legacy without ipset", true, xtOpener(xtLegacy, true)},
}

func xtOpener(variant string, noSets bool) func(testing.TB, netNS, Options) Firewall {
	return func(t testing.TB, ns netNS, o Options) Firewall { return newXtIn(t, ns, variant, noSets, o) }
}

func newXtIn(t testing.TB, ns netNS, variant string, noSets bool, o Options) *xt {
	t.Helper()
	o.NetNS = ns.fd
	fw, err := newXt(o, "iptables-"+variant, "ip6tables-"+variant, noSets)
	if err != nil {
		t.Fatal(err)
	}
	ended(t, fw)
	caps, err := fw.Probe(t.Context())
	if errors.Is(err, ErrUnavailable) {
		cannot(t, "%v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	if caps.Timeouts == noSets {
		cannot(t, "this kernel has no ipset: %s", fw.why)
	}
	return fw
}
