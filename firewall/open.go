package firewall

import (
	"context"
	"errors"
	"fmt"
)

// Names of the backends, as in policy.yaml. Auto is not a backend but the
// choice among them.
const (
	Auto     = "auto"
	NFTables = "nftables"
	IPTables = "iptables"
	CSF      = "csf"
	Memory   = "memory"
)

// Open returns the backend called name, probed but with nothing changed yet,
// and a sentence that says why it is this one, for the log and for doctor.
// Auto, or an empty name, is nftables, also on hosts that use iptables, ufw,
// firewalld, Docker or CSF: a table of our own lives beside everybody's rules
// and survives all that rebuilds theirs, except nft flush ruleset. Memory is
// never chosen by Auto, as it protects nothing. The error wraps ErrUnavailable
// if the backend cannot work here; other errors are about name and o.
func Open(ctx context.Context, name string, o Options) (fw Firewall, why string, err error) {
	why = name + ": as configured"
	switch name {
	case Auto, "":
		why = NFTables + ": chosen because the kernel takes our table, sets and rules"
		fw, err = NewNFTables(o)
	case NFTables:
		fw, err = NewNFTables(o)
	case Memory:
		return NewMemory(o), why + "; nothing is blocked", nil
	default:
		err = fmt.Errorf("the firewall backend %q is not known; it is one of %s, %s, %s", name, Auto, NFTables, Memory)
	}
	if err != nil {
		return nil, "", err
	}
	if _, err := fw.Probe(ctx); err != nil {
		err = fmt.Errorf("the firewall backend %s cannot be used: %w", fw.Name(), err)
		return nil, "", errors.Join(err, fw.Close(context.WithoutCancel(ctx), false))
	}
	return fw, why, nil
}
