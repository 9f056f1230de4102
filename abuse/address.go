package abuse

import (
	"errors"
	"fmt"
	"net/mail"
	"net/netip"
	"strings"
	"unicode"
	"unicode/utf8"
)

// errAddress: not a mail address that a report may go to.
var errAddress = errors.New("not a usable mail address")

// CheckAddress returns a mail address in the form in which it may be handed
// to a mail server: what registries publish is written by strangers. It takes
// local@domain with the characters that addresses of role accounts have (no
// quotes, blanks, shell or routing characters), a domain of at least two
// labels in ASCII, and lower-cases the domain.
func CheckAddress(s string) (string, error) {
	bad := func(why string) (string, error) { return "", fmt.Errorf("%w: %s: %s", errAddress, quoted(s), why) }
	local, domain, ok := strings.Cut(strings.TrimSpace(s), "@")
	switch {
	case !ok || strings.Contains(domain, "@"):
		return bad("it has not one @")
	case local == "" || len(local) > 64 || len(domain) > 253:
		return bad("it is too short or too long")
	case local[0] == '-' || local[0] == '.' || local[len(local)-1] == '.' || strings.Contains(local, ".."):
		return bad("its local part begins or ends with a character that is not allowed there")
	}
	for i := range len(local) {
		if c := local[i]; !alnum(c) && strings.IndexByte("._+=-~", c) < 0 {
			return bad("its local part has a character that role addresses do not have")
		}
	}
	domain = strings.ToLower(strings.TrimSuffix(domain, "."))
	if err := checkDomain(domain); err != nil {
		return bad(err.Error())
	}
	return local + "@" + domain, nil
}

func checkDomain(domain string) error {
	labels := strings.Split(domain, ".")
	if len(labels) < 2 {
		return errors.New("its domain has no dot")
	}
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || l[len(l)-1] == '-' {
			return errors.New("its domain has a label that is none")
		}
		for i := range len(l) {
			if !alnum(l[i]) && l[i] != '-' {
				return errors.New("its domain has a character that domains do not have")
			}
		}
	}
	if last := labels[len(labels)-1]; last[0] >= '0' && last[0] <= '9' {
		return errors.New("its domain is an address")
	}
	return nil
}

func alnum(c byte) bool {
	return c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
}

// addrKey is an address for comparing: domains know no case, and the local
// parts of role accounts none either.
func addrKey(addr string) string { return strings.ToLower(addr) }

// sameAddr reports whether two addresses are one mailbox. Empty is none.
func sameAddr(a, b string) bool { return a != "" && addrKey(a) == addrKey(b) }

// domainOf is the part behind the @.
func domainOf(addr string) string {
	_, d, _ := strings.Cut(addr, "@")
	return d
}

// registries' own addresses: whoever is responsible for the network, it is
// not them. The first form is a whole address, the second a domain.
var (
	registryAddresses = map[string]bool{
		"removed@lacnic.net": true, "abuse@lacnic.net": true, "hostmaster@nic.or.kr": true, "hostmaster@nic.ad.jp": true,
		"abuse@ripe.net": true, "helpdesk@apnic.net": true, "abuse@apnic.net": true, "abuse@arin.net": true,
		"search-apnic-not-arin@apnic.net": true, "nicbr@registro.br": true, "mail-abuse@cert.br": true,
	}
	registryDomains = map[string]bool{"afrinic.net": true, "iana.org": true, "icann.org": true}
)

func isRegistry(addr string) bool {
	addr = strings.ToLower(addr)
	return registryAddresses[addr] || registryDomains[domainOf(addr)]
}

// sender is Config.From in parts.
func (c Config) sender() (*mail.Address, error) {
	a, err := mail.ParseAddress(c.From)
	if err != nil {
		return nil, fmt.Errorf("%s is not a mailbox: %w", quoted(c.From), err)
	}
	if a.Address, err = CheckAddress(a.Address); err != nil {
		return nil, err
	}
	local, _, _ := strings.Cut(strings.ToLower(a.Address), "@")
	switch strings.NewReplacer("-", "", "_", "", ".", "").Replace(local) {
	case "noreply", "donotreply", "nobody", "mailerdaemon":
		return nil, fmt.Errorf("%s is not a mailbox that a person reads; desks drop such mail", a.Address)
	}
	a.Name = cleanName(a.Name)
	return a, nil
}

// isOwn reports whether an address is of the domain that reports come from.
func (c Config) isOwn(addr string) bool {
	a, err := c.sender()
	return err == nil && addr != "" && strings.EqualFold(domainOf(addr), domainOf(a.Address))
}

// ownWarning is in what is said of such a recipient.
const ownWarning = " is an address of our own domain"

// clean makes text of strangers fit for a mail, a terminal and a log line:
// printable ASCII, at most n bytes.
func clean(s string, n int) string {
	var b strings.Builder
	for _, r := range s {
		if b.Len() >= n {
			break
		}
		switch {
		case r >= ' ' && r < 0x7f:
			b.WriteByte(byte(r))
		case r == '\n' || r == '\t' || r == '\r':
			b.WriteByte(' ')
		default:
			b.WriteByte('?')
		}
	}
	return strings.TrimSpace(b.String())
}

// cleanName makes a name fit for a header, which encodes what is not ASCII:
// printable, at most 100 bytes.
func cleanName(s string) string {
	s = strings.ToValidUTF8(s, "?")
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	for len(s) > 100 {
		_, n := utf8.DecodeLastRuneInString(s)
		s = s[:len(s)-n]
	}
	return strings.TrimSpace(s)
}

func quoted(s string) string { return `"` + clean(s, 100) + `"` }

// reserved are the networks that nobody on the Internet is responsible for
// (IANA special-purpose registries, RFC 6890 and later): private, loopback,
// link-local, shared, documentation, benchmarking, multicast, reserved.
var reserved = prefixList("0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 " +
	"192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/3 " +
	"::/3 4000::/2 8000::/1 2001::/23 2001:db8::/32 2002::/16 3fff::/20")

func prefixList(s string) []netip.Prefix {
	var ps []netip.Prefix
	for f := range strings.FieldsSeq(s) {
		ps = append(ps, netip.MustParsePrefix(f))
	}
	return ps
}

// isReserved reports whether p overlaps a network that cannot be reported.
func isReserved(p netip.Prefix) bool {
	for _, r := range reserved {
		if r.Overlaps(p) {
			return true
		}
	}
	return false
}
