package firewall

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
//
// Auto, or an empty name, takes the first that works of nftables, iptables
// with ipset, iptables with rules alone, and CSF. It is nftables also on hosts
// that use iptables, ufw, firewalld, Docker or CSF: a table of our own lives
// beside everybody's rules and survives all that rebuilds theirs, except nft
// flush ruleset. Memory is never chosen by Auto, as it protects nothing.
//
// The error wraps ErrUnavailable if the backend cannot work here; other errors
// are about name and o.
func Open(ctx context.Context, name string, o Options) (fw Firewall, why string, err error) {
	return open(ctx, name, o, []opener{{NFTables, NewNFTables}, {IPTables, NewIPTables}, {CSF, NewCSF}}, csfAt("/"))
}

// opener makes a backend; nothing is probed yet.
type opener struct {
	name string
	open func(Options) (Firewall, error)
}

// open is Open among these backends, in the order of Auto's choice.
func open(ctx context.Context, name string, o Options, all []opener, csfHere csfPaths) (Firewall, string, error) {
	if name == Memory {
		return NewMemory(o), name + ": as configured; nothing is blocked", nil
	}
	var failed []error
	for _, b := range all {
		if name != b.name && name != Auto && name != "" {
			continue
		}
		fw, err := b.open(o)
		if err != nil {
			return nil, "", err
		}
		_, err = fw.Probe(ctx)
		if err == nil {
			return fw, chosen(fw, name, failed, csfHere), nil
		}
		err = fmt.Errorf("the firewall backend %s cannot be used: %w", b.name, err)
		failed = append(failed, errors.Join(err, fw.Close(context.WithoutCancel(ctx), false)))
		if ctx.Err() != nil {
			break
		}
	}
	if failed == nil {
		return nil, "", fmt.Errorf("the firewall backend %q is not known; it is one of %s",
			name, strings.Join([]string{Auto, NFTables, IPTables, CSF, Memory}, ", "))
	}
	return nil, "", errors.Join(failed...)
}

// chosen says why it is fw, how it works, and what to know about it.
func chosen(fw Firewall, asked string, failed []error, csfHere csfPaths) string {
	why := fw.Name() + ": as configured"
	if asked == Auto || asked == "" {
		why = fw.Name() + ": chosen because "
		if len(failed) == 0 {
			why += "the kernel takes our table, sets and rules"
		}
		for i, err := range failed {
			if i > 0 {
				why += ", and "
			}
			why += strings.ReplaceAll(err.Error(), "\n", ": ")
		}
	}
	if r, ok := fw.(interface{ reason() string }); ok && r.reason() != "" {
		why += "; " + r.reason()
	}
	if fw.Name() != CSF && fileExists(csfHere.file("csf.conf")) {
		if fw.Name() == NFTables {
			why += "; CSF is installed too, and its restarts leave our table alone"
		} else {
			why += "; CSF is installed too: csf -r removes our rules until they are put back"
		}
	}
	return why
}
