package guard

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/policy"
)

// Refusal is why the gate did not let a block pass. It is an error, so that
// an operator's command can return it.
type Refusal struct {
	Prefix netip.Prefix
	// Why completes "PREFIX is not blocked: ...".
	Why string
	// Hint says what the operator can do; may be empty.
	Hint string
	// Reason is Why in one word, or "".
	Reason string
}

func (r *Refusal) Error() string { return fmt.Sprintf("%s is not blocked: %s", r.Prefix, r.Why) }

// gate answers the one question "may this be blocked, and for how long?". A
// verdict, an operator's command, the restore at start and the reconcile all
// come through it.
type gate struct {
	allow     *policy.Allowlist // the policy's, the operator's and this machine's own
	own       *policy.Allowlist // of those, this machine's own
	block     policy.Block
	only4     bool        // the packet filter cannot block IPv6
	room      int         // entries that the packet filter takes at most; 0: no limit
	perMinute []time.Time // when the last blocks were made by verdicts, oldest first
	standing  standing    // what verdicts did to senders in good standing
}

// maxParts is how many prefixes one block may become that has allowed ones in
// it: a /24 without one address makes 8, a /16 without one 16, an IPv6 /32
// without one /64 makes 32. The packet filter has one more lookup per length.
const maxParts = 32

// parts returns what of p may be blocked: p itself or, with block.overlap:
// split, what is left of it without those who are allowed inside.
//
// A net that this machine itself is in (its gateway, a resolver, the peer of
// an SSH session) is never blocked in part: its neighbours there are as likely
// its own as strangers.
func (g *gate) parts(p netip.Prefix) ([]netip.Prefix, *Refusal) {
	r := g.passes(p)
	if r == nil {
		return []netip.Prefix{p}, nil
	}
	if _, overlaps := g.allow.Overlaps(p); !overlaps || g.block.Overlap != policy.OverlapSplit {
		return nil, r
	}
	if g.fits(p) != nil {
		return nil, r
	}
	if e, own := g.own.Overlaps(p); own {
		if p.IsSingleIP() {
			return nil, r // nothing is narrower
		}
		return nil, &Refusal{Prefix: p, Reason: reasonAllowed, Why: fmt.Sprintf("it overlaps %s, which is allowed (%s), and a net that this machine is in is not blocked in part", e.Prefix, e.Why),
			Hint: "name narrower prefixes"}
	}
	rest, ok := g.allow.Without(p, maxParts)
	if !ok {
		return nil, r
	}
	return rest, nil
}

// passes refuses what overlaps the allowlist and what is wider than
// max_prefix. It holds for every block, however it came about.
func (g *gate) passes(p netip.Prefix) *Refusal {
	e, ok := g.allow.Overlaps(p)
	if !ok {
		e, ok = g.allow.Overlaps(translated(p))
	}
	if ok {
		return &Refusal{Prefix: p, Reason: reasonAllowed, Why: fmt.Sprintf("it overlaps %s, which is allowed (%s)", e.Prefix, e.Why),
			Hint: "`smtpguard allow list` shows what is never blocked, and why"}
	}
	return g.fits(p)
}

// nat64 is where a translator shows clients of IPv4 to a server of IPv6: a /64
// or /48 there is no network of one operator, but everybody (RFC 6052).
var nat64 = netip.MustParsePrefix("64:ff9b::/96")

// translated is the prefix of IPv4 that p stands for behind a translator, or p.
func translated(p netip.Prefix) netip.Prefix {
	if a := p.Addr(); p.Bits() > nat64.Bits() && nat64.Contains(a) {
		b := a.As16()
		return netip.PrefixFrom(netip.AddrFrom4([4]byte(b[12:])), p.Bits()-nat64.Bits())
	}
	return p
}

// fits refuses what is wider than max_prefix, and what the packet filter
// cannot block.
func (g *gate) fits(p netip.Prefix) *Refusal {
	if g.only4 && p.Addr().Is6() {
		return &Refusal{Prefix: p, Reason: reasonNoIPv6, Why: "the packet filter in use cannot block IPv6", Hint: "`smtpguard firewall status` names it; with CSF, IPV6 in csf.conf is off"}
	}
	if p.Bits() <= nat64.Bits() && p.Overlaps(nat64) {
		return &Refusal{Prefix: p, Reason: reasonTooWide, Why: "all of IPv4 is in it, behind a translator (" + nat64.String() + ", RFC 6052)", Hint: "name the single addresses in it"}
	}
	if g.block.TooWide(p) {
		limit := g.block.MaxPrefix4
		if p.Addr().Is6() {
			limit = g.block.MaxPrefix6
		}
		return &Refusal{Prefix: p, Reason: reasonTooWide, Why: fmt.Sprintf("it is wider than block.max_prefix (/%d)", limit),
			Hint: "name narrower prefixes, or change block.max_prefix in the policy"}
	}
	return nil
}

// admits is parts plus the budgets, for a block that would be new beside those
// in have and others that are about to be made. A part that has a block
// already takes no more room.
func (g *gate) admits(p netip.Prefix, have *blocks, others int) ([]netip.Prefix, *Refusal) {
	parts, r := g.parts(p)
	if r != nil {
		return nil, r
	}
	inForce := have.len() + others
	fresh := have.without(parts)
	if inForce+fresh > g.block.MaxBlocks {
		return nil, &Refusal{Prefix: p, Reason: reasonMaxBlocks, Why: fmt.Sprintf("%d blocks are in force, as many as block.max_blocks allows", inForce),
			Hint: "`smtpguard blocks list` shows them; block a wider prefix, or raise block.max_blocks"}
	}
	if g.room > 0 && inForce+fresh > g.room {
		return nil, &Refusal{Prefix: p, Reason: reasonRoom, Why: fmt.Sprintf("%d blocks are in force, as many as the packet filter takes", inForce),
			Hint: "block a wider prefix, or use the backend nftables"}
	}
	return parts, nil
}

// admitsVerdict is admits for a block that a rule wants, and counts it.
func (g *gate) admitsVerdict(v *detector.Verdict, det *detector.Detector, now time.Time, have *blocks, others int) ([]netip.Prefix, *Refusal) {
	parts, r := g.admits(v.Source, have, others)
	if r != nil {
		return nil, r
	}
	if r := unproven(v, det); r != nil {
		return nil, r
	}
	if r := g.withoutAllowed(v, det, parts); r != nil {
		return nil, r
	}
	if r := g.standing.stoppedAt(v.Source, now); r != nil {
		return nil, r
	}
	old := 0
	for old < len(g.perMinute) && now.Sub(g.perMinute[old]) >= time.Minute {
		old++
	}
	g.perMinute = g.perMinute[old:]
	if g.block.MaxNewPerMinute > 0 && len(g.perMinute) >= g.block.MaxNewPerMinute {
		return nil, &Refusal{Prefix: v.Source, Reason: reasonPerMinute, Why: fmt.Sprintf("%d sources were blocked within a minute, as many as block.max_new_per_minute allows", len(g.perMinute)),
			Hint: "look at `smtpguard status`: is this a flood, or a rule that is too strict?"}
	}
	if r := g.standing.admits(v, det, g.block.MaxGoodShare, now); r != nil {
		return nil, r
	}
	g.perMinute = append(g.perMinute, now)
	return parts, nil
}

// withoutAllowed refuses to block the rest of a net for what those did who are
// allowed in it: their share of its slots, or of the connections it opened,
// is taken off the score, and what is left must be over the threshold too.
func (g *gate) withoutAllowed(v *detector.Verdict, det *detector.Detector, parts []netip.Prefix) *Refusal {
	if len(parts) == 1 && parts[0] == v.Source {
		return nil
	}
	of := func(x detector.Explanation) int {
		if v.Metric == detector.Opens {
			return x.Opens
		}
		return x.Held
	}
	rest := 0
	for _, p := range parts {
		rest += of(det.Explain(p))
	}
	if all := of(det.Explain(v.Source)); all > 0 && v.Score*float64(rest)/float64(all) >= v.Threshold {
		return nil
	}
	r := g.passes(v.Source)
	if r == nil {
		return nil
	}
	r.Why += "; what the others in it do is below the threshold"
	return r
}
