package guard

import (
	"fmt"
	"net/netip"
	"time"

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
	block     policy.Block
	only4     bool        // the packet filter cannot block IPv6
	room      int         // entries that the packet filter takes at most; 0: no limit
	perMinute []time.Time // when the last blocks were made by verdicts, oldest first
}

// passes refuses what overlaps the allowlist and what is wider than
// max_prefix. It holds for every block, however it came about.
func (g *gate) passes(p netip.Prefix) *Refusal {
	if e, ok := g.allow.Overlaps(p); ok {
		return &Refusal{Prefix: p, Reason: reasonAllowed, Why: fmt.Sprintf("it overlaps %s, which is allowed (%s)", e.Prefix, e.Why),
			Hint: "`smtpguard allow list` shows what is never blocked, and why"}
	}
	if g.only4 && p.Addr().Is6() {
		return &Refusal{Prefix: p, Reason: reasonNoIPv6, Why: "the packet filter in use cannot block IPv6", Hint: "`smtpguard firewall status` names it; with CSF, IPV6 in csf.conf is off"}
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

// admits is passes plus the budgets, for a block that would be new. inForce
// is the number of blocks now.
func (g *gate) admits(p netip.Prefix, now time.Time, inForce int, byHand bool) *Refusal {
	if r := g.passes(p); r != nil {
		return r
	}
	if inForce >= g.block.MaxBlocks {
		return &Refusal{Prefix: p, Reason: reasonMaxBlocks, Why: fmt.Sprintf("%d blocks are in force, as many as block.max_blocks allows", inForce),
			Hint: "`smtpguard blocks list` shows them; block a wider prefix, or raise block.max_blocks"}
	}
	if g.room > 0 && inForce >= g.room {
		return &Refusal{Prefix: p, Reason: reasonRoom, Why: fmt.Sprintf("%d blocks are in force, as many as the packet filter takes", inForce),
			Hint: "block a wider prefix, or use the backend nftables"}
	}
	if byHand || g.block.MaxNewPerMinute == 0 {
		return nil
	}
	old := 0
	for old < len(g.perMinute) && now.Sub(g.perMinute[old]) >= time.Minute {
		old++
	}
	g.perMinute = g.perMinute[old:]
	if len(g.perMinute) >= g.block.MaxNewPerMinute {
		return &Refusal{Prefix: p, Reason: reasonPerMinute, Why: fmt.Sprintf("%d sources were blocked within a minute, as many as block.max_new_per_minute allows", len(g.perMinute)),
			Hint: "look at `smtpguard status`: is this a flood, or a rule that is too strict?"}
	}
	g.perMinute = append(g.perMinute, now)
	return nil
}
