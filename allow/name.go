// Package allow finds out which addresses the allowlist means by a name: the
// hosts of "dns:mail.example.org", and the networks that "spf:example.org"
// says its mail comes from. It only asks and computes; when, and what becomes
// of the answer, is its caller's business.
package allow

import (
	"fmt"
	"net/netip"
	"strings"
)

// Name is an entry of the allowlist that stands for addresses: "dns:" and a
// host, or "spf:" and a domain, in lower case and without the final dot. The
// zero Name is none; see Parse.
type Name string

// The kinds of names.
const (
	DNS = "dns" // its A and AAAA records
	SPF = "spf" // the networks that its SPF record passes (RFC 7208)
)

// Kind is DNS or SPF.
func (n Name) Kind() string {
	kind, _, _ := strings.Cut(string(n), ":")
	return kind
}

// Domain is the name without its kind.
func (n Name) Domain() string {
	_, domain, _ := strings.Cut(string(n), ":")
	return domain
}

// IsName reports whether s is meant to be a Name: Parse says whether it is
// one.
func IsName(s string) bool {
	kind, _, ok := strings.Cut(s, ":")
	kind = strings.ToLower(kind)
	return ok && (kind == DNS || kind == SPF)
}

// Parse reads a Name as people write it. It asks nobody.
func Parse(s string) (Name, error) {
	kind, domain, _ := strings.Cut(s, ":")
	if !IsName(s) {
		return "", fmt.Errorf("%s is not dns:NAME or spf:DOMAIN", show(s))
	}
	domain, err := hostname(domain)
	if err != nil {
		return "", err
	}
	return Name(strings.ToLower(kind) + ":" + domain), nil
}

// hostname checks a domain name: two labels or more of letters, digits, - and
// _ (RFC 1035 2.3.4 has the lengths), and returns it in lower case.
func hostname(s string) (string, error) {
	bare := strings.ToLower(strings.TrimSuffix(s, "."))
	if bare == "" || len(bare) > 253 {
		return "", fmt.Errorf("%s is not a domain name", show(s))
	}
	if _, err := netip.ParseAddr(bare); err == nil {
		return "", fmt.Errorf("%s is an address, not a domain name", show(s))
	}
	labels := strings.Split(bare, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" || l[0] == '-' || l[len(l)-1] == '-' {
			return "", fmt.Errorf("%s is not a domain name", show(s))
		}
	}
	if len(labels) < 2 {
		return "", fmt.Errorf("%s has no dot: the full name is wanted", show(s))
	}
	if strings.Trim(labels[len(labels)-1], "0123456789") == "" {
		return "", fmt.Errorf("%s is not a domain name", show(s))
	}
	return bare, nil
}
