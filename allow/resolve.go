package allow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Resolver asks the DNS; *net.Resolver is one.
type Resolver interface {
	LookupNetIP(ctx context.Context, network, host string) ([]netip.Addr, error)
	LookupTXT(ctx context.Context, name string) ([]string, error)
	LookupMX(ctx context.Context, name string) ([]*net.MX, error)
}

// What one name may allow at most. A record that is broken, or its owner's
// enemy's, must not switch smtpguard off: the widest prefixes of real senders
// are /14 and /29, and all of one sender's together are below a /11.
const (
	// MaxPrefixes is how many prefixes one name gives.
	MaxPrefixes = 1000
	widest4     = 8  // bits
	widest6     = 16 // bits
	// most4 and most6 bound all prefixes of one name together: a /8, in
	// addresses, and a /16, in networks of /64.
	most4 = 1 << 24
	most6 = 1 << 48

	maxNotes = 20
)

// ErrNothing: the DNS answered, and no address came of it.
var ErrNothing = errors.New("no address came of it")

// Answer is what a name stands for.
type Answer struct {
	// Prefixes are masked, sorted, distinct and not IPv4-mapped.
	Prefixes []netip.Prefix
	// Notes say what of the answer allows nobody, and why: a sentence each,
	// printable, bounded.
	Notes []string
}

// Resolve asks for the addresses of a name. An error says that the answer is
// not whole, or empty: what was found is returned beside it, and what is
// missing from it may still be right. The error wraps ErrNothing where the DNS
// answered, and no address came of it. The context bounds the time.
func Resolve(ctx context.Context, dns Resolver, n Name) (Answer, error) {
	c := &collector{dns: dns}
	switch n.Kind() {
	case DNS:
		c.addresses(ctx, n.Domain(), 32, 128)
	case SPF:
		c.flatten(ctx, n.Domain())
	default:
		return Answer{}, fmt.Errorf("%s is not dns:NAME or spf:DOMAIN", show(string(n)))
	}
	err := errors.Join(c.errs...)
	if err == nil && len(c.found) == 0 {
		err = ErrNothing
	}
	slices.SortFunc(c.found, netip.Prefix.Compare)
	return Answer{Prefixes: c.found, Notes: c.notes}, err
}

// collector gathers the prefixes of one name.
type collector struct {
	dns          Resolver
	found        []netip.Prefix
	sum4, sum6   uint64 // see most4
	notes        []string
	errs         []error
	terms, voids int             // see flatten
	seen         map[string]bool // SPF records by domain
}

func (c *collector) note(format string, args ...any) {
	n := fmt.Sprintf(format, args...)
	switch {
	case len(c.notes) < maxNotes && !slices.Contains(c.notes, n):
		c.notes = append(c.notes, n)
	case len(c.notes) == maxNotes && !slices.Contains(c.notes, n):
		c.notes = append(c.notes, "more of that kind is not shown")
	}
}

// fail notes that the answer is not whole.
func (c *collector) fail(err error) {
	if len(c.errs) < 5 {
		c.errs = append(c.errs, err)
	}
}

// add takes a prefix, unless it or all together would allow too much.
func (c *collector) add(p netip.Prefix, from string) {
	if p.Addr().Is4In6() {
		if p.Bits() < 96 {
			c.note("%s: %s holds all of IPv4 and is left out", from, p)
			return
		}
		p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
	}
	p = p.Masked()
	if !p.IsValid() || slices.Contains(c.found, p) {
		return
	}
	if len(c.found) == MaxPrefixes {
		c.note("more than %d prefixes: the rest is left out", MaxPrefixes)
		return
	}
	four, six := weight(p)
	limit, all := widest6, c.sum6+six > most6
	if p.Addr().Is4() {
		limit, all = widest4, c.sum4+four > most4
	}
	switch {
	case p.Bits() < limit:
		c.note("%s: %s is wider than /%d and is left out", from, p, limit)
		return
	case all:
		c.note("%s: with %s it would be more than a /%d in all: left out", from, p, limit)
		return
	}
	c.sum4, c.sum6 = c.sum4+four, c.sum6+six
	c.found = append(c.found, p)
}

// addresses adds what host resolves to, each widened to so many bits, and
// reports whether there was anything, or an error.
func (c *collector) addresses(ctx context.Context, host string, bits4, bits6 int) (any bool) {
	for _, family := range []string{"ip4", "ip6"} {
		list, err := c.dns.LookupNetIP(ctx, family, host+".")
		if err != nil && !notFound(err) {
			c.fail(asking(host, err))
			any = true // not known to be void
		}
		for _, a := range list[:min(len(list), MaxPrefixes)] {
			a = a.Unmap().WithZone("")
			bits := bits6
			if a.Is4() {
				bits = bits4
			}
			if p, err := a.Prefix(bits); err == nil {
				any = true
				c.add(p, show(host))
			}
		}
	}
	return any
}

// asking says what went wrong without the text of the other side.
func asking(host string, err error) error {
	var d *net.DNSError
	if errors.As(err, &d) {
		switch {
		case d.IsTimeout:
			return fmt.Errorf("asking for %s: no answer in time", show(host))
		case d.IsNotFound:
			return fmt.Errorf("asking for %s: it does not exist", show(host))
		}
		if verb, _, _ := strings.Cut(d.Err, " "); verb == "read" || verb == "write" || verb == "dial" { // of its socket: nobody is there
			server := d.Server
			if a, err := netip.ParseAddrPort(server); err == nil {
				server = a.Addr().String()
			}
			return fmt.Errorf("asking for %s: the resolver %s does not answer (%s)", show(host), server, d.Err[strings.LastIndex(d.Err, ": ")+len(": "):])
		}
		return fmt.Errorf("asking for %s: %s", show(host), show(d.Err))
	}
	return fmt.Errorf("asking for %s: %w", show(host), err)
}

func notFound(err error) bool {
	var d *net.DNSError
	return errors.As(err, &d) && d.IsNotFound
}

// show makes a stranger's text printable and short.
func show(s string) string {
	cut := ""
	if len(s) > 80 {
		s, cut = s[:80], "..."
	}
	if s != "" && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.:/=+") == "" {
		return s + cut
	}
	return strconv.QuoteToASCII(s + cut)
}
