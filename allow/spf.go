package allow

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Limits of an SPF record: RFC 7208, section 4.6.4, and our own.
const (
	maxTerms = 10 // terms that ask the DNS, in all records together
	maxVoids = 2  // of them, those without an answer
	maxMX    = 10 // hosts of one mx

	maxRecordTerms = 500 // what 8 KiB hold
	maxRecord      = 8 << 10
)

// term is one word of an SPF record that passes mail: a mechanism with the
// qualifier +, or the modifier redirect.
type term struct {
	kind   string       // "all", "include", "a", "mx", "ip", "redirect"
	domain string       // of include and redirect; of a and mx, "" is the record's own
	prefix netip.Prefix // of ip
	bits4  int          // of a and mx
	bits6  int
}

// parseSPF reads the words of a record that pass mail, up to all, which ends
// it (RFC 7208, 4.6.1 and 5.1). What cannot be turned into addresses, or is
// not understood, is left out and noted.
func parseSPF(record string, note func(format string, args ...any)) []term {
	var terms []term
	var redirect *term
	words := strings.FieldsFunc(record, func(r rune) bool { return r == ' ' || r == '\t' })
	if len(words) > maxRecordTerms {
		note("the record has more than %d words: the rest is left out", maxRecordTerms)
		words = words[:maxRecordTerms]
	}
	for i, w := range words {
		if i == 0 {
			continue // v=spf1
		}
		lower := strings.ToLower(w)
		if at := strings.IndexAny(lower, "=:/"); at > 0 && lower[at] == '=' {
			if to, ok := strings.CutPrefix(lower, "redirect="); ok && redirect == nil {
				domain, err := spfDomain(to)
				if err != nil {
					note("%s: %v", show(w), err)
					continue
				}
				redirect = &term{kind: "redirect", domain: domain}
			}
			continue // others say nothing about who may send
		}
		pass := true
		if strings.ContainsRune("+-?~", rune(lower[0])) {
			pass = lower[0] == '+'
			lower = lower[1:]
		}
		if lower == "all" {
			if pass {
				note("+all would allow everybody and is left out")
			}
			return terms
		}
		if !pass {
			continue
		}
		t, err := parseMechanism(lower)
		if err != nil {
			note("%s: %v", show(w), err)
			continue
		}
		terms = append(terms, t)
	}
	if redirect != nil { // only without all
		terms = append(terms, *redirect)
	}
	return terms
}

func parseMechanism(s string) (t term, err error) {
	end := strings.IndexAny(s, ":/")
	if end < 0 {
		end = len(s)
	}
	name, arg := s[:end], s[end:]
	switch name {
	case "ip4", "ip6":
		text, ok := strings.CutPrefix(arg, ":")
		if !ok {
			return t, errors.New("it has no address and is left out")
		}
		if !strings.Contains(text, "/") {
			text += map[string]string{"ip4": "/32", "ip6": "/128"}[name]
		}
		p, err := netip.ParsePrefix(text)
		if err != nil || p.Addr().Is4() != (name == "ip4") {
			return t, errors.New("it is not an address or network and is left out")
		}
		return term{kind: "ip", prefix: p}, nil
	case "include":
		text, ok := strings.CutPrefix(arg, ":")
		if !ok {
			return t, errors.New("it has no domain and is left out")
		}
		t.kind = name
		t.domain, err = spfDomain(text)
		return t, err
	case "a", "mx":
		t = term{kind: name, bits4: 32, bits6: 128}
		domain, lengths := arg, ""
		if i := strings.IndexByte(arg, '/'); i >= 0 {
			domain, lengths = arg[:i], arg[i:]
		}
		if domain != "" {
			if t.domain, err = spfDomain(strings.TrimPrefix(domain, ":")); err != nil {
				return t, err
			}
		}
		if lengths != "" {
			four, six, both := strings.Cut(lengths, "//")
			if four != "" {
				if t.bits4, err = spfLength(strings.TrimPrefix(four, "/"), 32); err != nil {
					return t, err
				}
			}
			if both {
				if t.bits6, err = spfLength(six, 128); err != nil {
					return t, err
				}
			}
		}
		return t, nil
	case "ptr", "exists":
		return t, errors.New("it depends on each connection and is left out: list those addresses")
	}
	return t, errors.New("it is not understood and is left out")
}

func spfDomain(s string) (string, error) {
	if strings.Contains(s, "%") {
		return "", errors.New("a macro depends on each message and is left out: list those addresses")
	}
	d, err := hostname(s)
	if err != nil {
		return "", errors.New("it has no valid domain and is left out")
	}
	return d, nil
}

func spfLength(s string, most int) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 || n > most || len(s) > 3 || s[0] == '+' || s[0] == '-' {
		return 0, errors.New("it has no valid prefix length and is left out")
	}
	return n, nil
}

// errLimit ends the evaluation of an SPF record, as RFC 7208 wants it.
var errLimit = errors.New("the SPF record breaks a limit of RFC 7208, section 4.6.4")

// flatten adds the networks that the SPF record of domain passes mail of.
func (c *collector) flatten(ctx context.Context, domain string) {
	c.seen = make(map[string]bool)
	if err := c.record(ctx, domain); err != nil {
		c.fail(err)
	}
}

// record adds what the record of one domain passes. An error ends the
// evaluation as a whole; other failures are noted in c.
func (c *collector) record(ctx context.Context, domain string) error {
	if c.seen[domain] {
		c.note("%s is included again: once is enough", show(domain))
		return nil
	}
	c.seen[domain] = true
	texts, err := c.dns.LookupTXT(ctx, domain+".")
	if err != nil && !notFound(err) {
		c.fail(asking(domain, err))
		return ctx.Err()
	}
	var records []string
	for _, t := range texts {
		if len(t) >= 6 && strings.EqualFold(t[:6], "v=spf1") && (len(t) == 6 || t[6] == ' ') {
			records = append(records, t)
		}
	}
	switch {
	case len(texts) == 0:
		c.fail(fmt.Errorf("%s has no SPF record", show(domain)))
		return c.void()
	case len(records) == 0:
		c.fail(fmt.Errorf("%s has no SPF record", show(domain)))
		return nil
	case len(records) > 1:
		c.fail(fmt.Errorf("%s has %d SPF records, and must have one", show(domain), len(records)))
		return nil
	case len(records[0]) > maxRecord:
		c.fail(fmt.Errorf("the SPF record of %s is longer than 8 KiB", show(domain)))
		return nil
	}
	from := show(domain)
	for _, t := range parseSPF(records[0], func(f string, a ...any) { c.note(from+": "+f, a...) }) {
		if t.kind == "ip" {
			c.add(t.prefix, from)
			continue
		}
		if c.terms++; c.terms > maxTerms {
			return fmt.Errorf("%w: more than %d terms that ask the DNS", errLimit, maxTerms)
		}
		if t.domain == "" {
			t.domain = domain
		}
		switch t.kind {
		case "include", "redirect":
			err = c.record(ctx, t.domain)
		case "a":
			if err = nil; !c.addresses(ctx, t.domain, t.bits4, t.bits6) {
				err = c.void()
			}
		case "mx":
			err = c.mx(ctx, t)
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *collector) void() error {
	if c.voids++; c.voids > maxVoids {
		return fmt.Errorf("%w: more than %d names in it do not exist", errLimit, maxVoids)
	}
	return nil
}

func (c *collector) mx(ctx context.Context, t term) error {
	list, err := c.dns.LookupMX(ctx, t.domain+".")
	if err != nil && len(list) == 0 {
		if notFound(err) {
			return c.void()
		}
		c.fail(asking(t.domain, err))
		return nil
	}
	if len(list) > maxMX {
		c.note("%s has more than %d mail servers: the rest is left out", show(t.domain), maxMX)
		list = list[:maxMX]
	}
	var hosts []string
	for _, m := range list {
		if h, err := hostname(m.Host); err == nil && !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	for _, h := range hosts {
		c.addresses(ctx, h, t.bits4, t.bits6)
	}
	return nil
}
