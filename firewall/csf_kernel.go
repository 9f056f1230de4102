package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// csfChain is where CSF's rules for bans of incoming packets are, in the table
// filter.
const csfChain = "DENYIN"

// csfKernel looks at the rules that CSF made.
type csfKernel struct {
	netNS int
	usual [2]string // commands to take where those of csf.conf are not there
	// commands are those of csf.conf when they were found, for IPv4 and IPv6.
	commands [2]*xtables
	asked    [2]string
	blind    error // why the rules could not be read; nil: they could
}

// sources gives what CSF's rules drop. Where its chain is not there the error
// is ErrGone; where the rules cannot be read it is nil, and nothing is known.
func (k *csfKernel) sources(ctx context.Context, conf csfConf, timeout time.Duration) (map[netip.Prefix]bool, error) {
	in := make(map[netip.Prefix]bool)
	for i, v6 := range []bool{false, true} {
		if v6 && !conf.ipv6 {
			continue
		}
		lines, err := k.list(ctx, i, conf, timeout)
		if k.blind = err; err != nil {
			return nil, ctx.Err()
		}
		if len(lines) == 0 {
			return nil, fmt.Errorf("%w: CSF's chain %s is not in the kernel, as after csf -f or while CSF starts; csf -r puts it back, with every ban", ErrGone, csfChain)
		}
		for _, line := range lines {
			if _, rest, ok := strings.Cut(line, " -s "); ok {
				text, _, _ := strings.Cut(rest, " ")
				if p, ok := csfPrefix(text); ok {
					in[p] = true
				}
			}
		}
	}
	return in, nil
}

func (k *csfKernel) list(ctx context.Context, i int, conf csfConf, timeout time.Duration) ([]string, error) {
	command := conf.commands[i]
	if k.commands[i] == nil || k.asked[i] != command {
		x, err := findXtables(ctx, command, i == 1, k.netNS, timeout)
		if errors.Is(err, ErrUnavailable) && strings.Contains(command, "/") { // the usual one, then
			x, err = findXtables(ctx, k.usual[i], i == 1, k.netNS, timeout)
		}
		if err != nil {
			return nil, err
		}
		k.commands[i], k.asked[i] = x, command
	}
	return k.commands[i].list(ctx, "filter", csfChain, false)
}
