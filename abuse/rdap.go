package abuse

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// RDAPAnswer is what an RDAP server says of a network or an AS (RFC 9083,
// jCard RFC 7095), as far as a report needs it. Registries differ; what is not
// as it should be is left out, never an error.
type RDAPAnswer struct {
	Handle string
	Name   string
	Type   string
	// First and Last are the range of a network, Prefixes the same as
	// prefixes; all zero for an AS.
	First, Last netip.Addr
	Prefixes    []netip.Prefix
	// Origins are the AS numbers that some registries name for a network.
	Origins []uint32
	// Contacts are the usable abuse addresses, best first, none twice.
	Contacts []Contact
	// Note says why there is no contact, if it does.
	Note string
}

// Bounds of what is read of an answer.
const (
	maxDepth    = 8
	maxEntities = 2000
	maxContacts = 10
)

// ParseRDAP reads the answer on an address or a network. An answer on a network
// that does not hold all of it is an error: a redirect to the wrong registry.
func ParseRDAP(body []byte, asked netip.Prefix) (RDAPAnswer, error) {
	m, a, err := parseRDAP(body, "ip network")
	if err != nil {
		return a, err
	}
	asked = asked.Masked()
	a.First, a.Last = rdapAddr(m["startAddress"]), rdapAddr(m["endAddress"])
	ranged := a.First.IsValid() && a.Last.IsValid() && a.First.BitLen() == a.Last.BitLen() && !a.Last.Less(a.First)
	if !ranged {
		a.First, a.Last = netip.Addr{}, netip.Addr{}
	} else if whole := (Contact{}).of(a.First, a.Last); !whole.covers([]netip.Prefix{asked}) {
		return RDAPAnswer{}, fmt.Errorf("the answer is for %s to %s, not for %s", a.First, a.Last, shown(asked))
	}
	for _, c := range list(m["cidr0_cidrs"]) {
		c, _ := c.(map[string]any)
		p := rdapAddr(c["v4prefix"])
		if !p.IsValid() {
			p = rdapAddr(c["v6prefix"])
		}
		n, ok := number(c["length"])
		if !p.IsValid() || !ok || n > uint64(p.BitLen()) || len(a.Prefixes) >= 1000 {
			continue
		}
		net := netip.PrefixFrom(p, int(n)).Masked()
		if whole := (Contact{}).of(a.First, a.Last); !ranged || whole.covers([]netip.Prefix{net}) {
			a.Prefixes = append(a.Prefixes, net)
		}
	}
	switch {
	case ranged && len(a.Prefixes) == 0:
		a.Prefixes = rangePrefixes(a.First, a.Last)
	case !ranged && !slices.ContainsFunc(a.Prefixes, func(p netip.Prefix) bool { return p.Contains(asked.Addr()) && p.Bits() <= asked.Bits() }):
		return RDAPAnswer{}, errors.New("the answer does not say for which range it is")
	}
	for _, key := range []string{"arin_originas0_originautnums", "lacnic_originAutnum", "nicbr_autnum"} {
		vs := list(m[key])
		if vs == nil && m[key] != nil {
			vs = []any{m[key]}
		}
		for _, v := range vs {
			if as, ok := asNumber(v); ok && !slices.Contains(a.Origins, as) && len(a.Origins) < 100 {
				a.Origins = append(a.Origins, as)
			}
		}
	}
	if a.placeholder() {
		a.Contacts, a.Note = nil, "the registry has only a placeholder for this range"
	}
	return a, nil
}

// ParseRDAPAS reads the answer on an AS. One that does not say that it is about
// that AS is an error.
func ParseRDAPAS(body []byte, asked uint32) (RDAPAnswer, error) {
	m, a, err := parseRDAP(body, "autnum")
	if err != nil {
		return a, err
	}
	first, ok1 := number(m["startAutnum"])
	last, ok2 := number(m["endAutnum"])
	if ok1 && !ok2 {
		last = first
	}
	if !ok1 {
		n, ok := asNumber(m["handle"])
		if !ok {
			return RDAPAnswer{}, errors.New("the answer does not say for which AS it is")
		}
		first, last = uint64(n), uint64(n)
	}
	if uint64(asked) < first || uint64(asked) > last {
		return RDAPAnswer{}, fmt.Errorf("the answer is for AS%d to AS%d, not for AS%d", first, last, asked)
	}
	if last-first > 1 {
		a.Contacts, a.Note = nil, "the registry has only a placeholder for this AS"
	}
	return a, nil
}

// placeholder reports whether the range belongs to a registry as a whole.
func (a *RDAPAnswer) placeholder() bool {
	if strings.EqualFold(a.Type, "IANA-BLOCK") {
		return true
	}
	return slices.ContainsFunc(a.Prefixes, func(p netip.Prefix) bool {
		return p.Bits() <= 8 && p.Addr().Is4() || p.Bits() <= 12 && p.Addr().Is6()
	})
}

// parseRDAP reads what answers on networks and on AS have in common. class is
// the objectClassName that it must have; old servers leave it out.
func parseRDAP(body []byte, class string) (map[string]any, RDAPAnswer, error) {
	var a RDAPAnswer
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	var m map[string]any
	if err := dec.Decode(&m); err != nil {
		if b := bytes.TrimSpace(body); len(b) == 0 {
			return nil, a, errors.New("the answer is empty")
		} else if b[0] == '<' {
			return nil, a, errors.New("the answer is a web page")
		}
		return nil, a, errors.New("the answer is not JSON")
	}
	if code, ok := number(m["errorCode"]); ok {
		err := fmt.Errorf("the answer is error %d", code)
		switch {
		case code == 404:
			err = fmt.Errorf("%w: %w", errNone, err)
		case code == 429 || code >= 500:
			err = fmt.Errorf("%w: %w", errLater, err)
		}
		return nil, a, err
	}
	if is := str(m["objectClassName"]); m["objectClassName"] != nil && !strings.EqualFold(is, class) {
		return nil, a, fmt.Errorf("the answer is about a %s, not an %s", quoted(is), class)
	}
	a.Handle, a.Name, a.Type = str(m["handle"]), str(m["name"]), str(m["type"])
	w := rdapWalk{}
	w.entities(m["entities"], "", 0)
	slices.SortStableFunc(w.found, func(x, y rdapFound) int { return x.rank - y.rank })
	for _, f := range w.found {
		if len(a.Contacts) < maxContacts && !slices.ContainsFunc(a.Contacts, func(c Contact) bool { return strings.EqualFold(c.Address, f.Address) }) {
			a.Contacts = append(a.Contacts, f.Contact)
		}
	}
	if len(a.Contacts) == 0 {
		a.Note = w.note
		if a.Note == "" {
			a.Note = "no abuse contact is registered"
		}
	}
	return m, a, nil
}

// rdapFound is a contact and its place in the order.
type rdapFound struct {
	Contact
	rank int // 0 abuse role alone, 1 abuse among other roles, 2 a guess
}

type rdapWalk struct {
	n     int
	found []rdapFound
	note  string
}

// entities looks for contacts at any depth.
func (w *rdapWalk) entities(v any, path string, depth int) {
	if depth >= maxDepth {
		return
	}
	for _, e := range list(v) {
		e, ok := e.(map[string]any)
		if !ok {
			continue
		}
		if w.n++; w.n > maxEntities {
			return
		}
		handle := str(e["handle"])
		at := strings.TrimPrefix(path+"/"+handle, "/")
		var roles []string
		for _, r := range list(e["roles"]) {
			if s, ok := r.(string); ok && len(roles) < 20 {
				roles = append(roles, strings.ToLower(clean(s, 40)))
			}
		}
		w.entity(e, at, roles)
		w.entities(e["entities"], at, depth+1)
	}
}

func (w *rdapWalk) entity(e map[string]any, at string, roles []string) {
	abuse := slices.Contains(roles, "abuse")
	var note string
	for _, r := range list(e["remarks"]) {
		if r, ok := r.(map[string]any); ok && strings.Contains(strings.ToLower(str(r["title"])), "unvalidated") {
			note = "unvalidated: the registry got no answer from it"
		}
	}
	var best string
	for _, m := range vcardMails(e["vcardArray"]) {
		addr, err := CheckAddress(m)
		switch {
		case err != nil:
			if abuse && w.note == "" {
				w.note = "the abuse address in the registry is not usable: " + quoted(m)
			}
			continue
		case isRegistry(addr):
			if abuse {
				w.note = "the registry names only itself: " + addr
			}
			continue
		}
		local, _, _ := strings.Cut(addr, "@")
		if !abuse && !strings.EqualFold(local, "abuse") {
			continue
		}
		best = addr
		break
	}
	if best == "" {
		return
	}
	f := rdapFound{Contact: Contact{Address: best, Role: strings.Join(roles, ", "), Handle: at, Note: note}}
	switch {
	case abuse && len(roles) > 1:
		f.rank = 1
	case !abuse:
		f.rank, f.Guess = 2, true
		f.Note = "no abuse role is registered; the address only looks like it"
	}
	w.found = append(w.found, f)
}

// vcardMails are the addresses of a jCard: by preference, those of type
// "abuse" first, then in the order of the document.
func vcardMails(v any) []string {
	card := list(v)
	if len(card) < 2 {
		return nil
	}
	type email struct {
		addr string
		rank int
	}
	var mails []email
	for _, p := range list(card[1]) {
		p := list(p)
		if len(p) < 4 || len(mails) >= 100 {
			continue
		}
		if name, _ := p[0].(string); !strings.EqualFold(name, "email") {
			continue
		}
		rank := 100 * 2
		if params, ok := p[1].(map[string]any); ok {
			if n, ok := number(params["pref"]); ok && n <= 100 {
				rank = int(n) * 2
			}
			types := list(params["type"])
			if t, ok := params["type"].(string); ok {
				types = []any{t}
			}
			if !slices.ContainsFunc(types, func(t any) bool { s, _ := t.(string); return strings.EqualFold(s, "abuse") }) {
				rank++
			}
		} else {
			rank++
		}
		for _, v := range p[3:] {
			vs := list(v)
			if s, ok := v.(string); ok {
				vs = []any{s}
			}
			for _, v := range vs {
				if s, ok := v.(string); ok && len(s) < 1000 {
					mails = append(mails, email{strings.TrimPrefix(strings.TrimSpace(s), "mailto:"), rank})
				}
			}
		}
	}
	slices.SortStableFunc(mails, func(a, b email) int { return a.rank - b.rank })
	out := make([]string, len(mails))
	for i, m := range mails {
		out[i] = m.addr
	}
	return out
}

func list(v any) []any { l, _ := v.([]any); return l }

func str(v any) string { s, _ := v.(string); return clean(s, 200) }

// number reads a whole number that may be written as text.
func number(v any) (uint64, bool) {
	var s string
	switch v := v.(type) {
	case json.Number:
		s = v.String()
	case string:
		s = strings.TrimSpace(v)
	default:
		return 0, false
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return n, err == nil
}

// asNumber reads 64500, "64500" or "AS64500".
func asNumber(v any) (uint32, bool) {
	if s, ok := v.(string); ok {
		s = strings.TrimSpace(s)
		if len(s) > 2 && strings.EqualFold(s[:2], "AS") {
			v = s[2:]
		}
	}
	n, ok := number(v)
	return uint32(n), ok && n != 0 && n != 1<<32-1
}

// rdapAddr reads an address as registries write it: also zero-padded
// ("198.051.100.000") and with a length behind it.
func rdapAddr(v any) netip.Addr {
	s, _ := v.(string)
	s, _, _ = strings.Cut(strings.TrimSpace(s), "/")
	if len(s) > 100 {
		return netip.Addr{}
	}
	if !strings.Contains(s, ":") {
		parts := strings.Split(s, ".")
		for i, p := range parts {
			if p = strings.TrimLeft(p, "0"); p == "" {
				p = "0"
			}
			parts[i] = p
		}
		s = strings.Join(parts, ".")
	}
	a, err := netip.ParseAddr(s)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}
	}
	return a.Unmap()
}

// rangePrefixes cuts a range into the fewest prefixes, at most 256 of them.
func rangePrefixes(first, last netip.Addr) (ps []netip.Prefix) {
	for len(ps) < 256 {
		// The widest prefix that begins at first and does not go past last.
		n := first.BitLen() - trailingZeros(first)
		for n < first.BitLen() && last.Less(lastOf(netip.PrefixFrom(first, n))) {
			n++
		}
		p := netip.PrefixFrom(first, n)
		ps = append(ps, p)
		end := lastOf(p)
		if !end.Less(last) {
			break
		}
		first = end.Next()
	}
	return ps
}

func trailingZeros(a netip.Addr) (n int) {
	b := a.AsSlice()
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] != 0 {
			return n + bits.TrailingZeros8(b[i])
		}
		n += 8
	}
	return n
}

// lastOf is the last address of p.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := range b {
		if left := p.Bits() - 8*i; left <= 0 {
			b[i] = 0xff
		} else if left < 8 {
			b[i] |= 0xff >> left
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

const rdapAccept = "application/rdap+json, application/json"

// rdapIP asks for the smallest registered network that holds all of p, rdapAS
// for an AS.
func (l *lookups) rdapIP(ctx context.Context, p netip.Prefix) (RDAPAnswer, []byte, string, error) {
	base, err := l.boot.forAddr(p.Addr())
	if err != nil {
		return RDAPAnswer{}, nil, "", err
	}
	body, from, err := l.fetch.get(ctx, base+"ip/"+shown(p), rdapAccept)
	if err != nil {
		return RDAPAnswer{}, nil, from, err
	}
	ans, err := ParseRDAP(body, p)
	return ans, body, from, err
}

func (l *lookups) rdapAS(ctx context.Context, as uint32) (RDAPAnswer, []byte, string, error) {
	base, err := l.boot.forAS(as)
	if err != nil {
		return RDAPAnswer{}, nil, "", err
	}
	body, from, err := l.fetch.get(ctx, base+"autnum/"+strconv.FormatUint(uint64(as), 10), rdapAccept)
	if err != nil {
		return RDAPAnswer{}, nil, from, err
	}
	ans, err := ParseRDAPAS(body, as)
	return ans, body, from, err
}

// reservedAS reports whether nobody can be written to as the holder of an AS:
// its number is private, reserved, or stands for one that did not fit (IANA's
// registry of AS numbers, RFC 4893, 6996, 7300). Those for documentation are
// in no route, and tests use them.
func reservedAS(as uint32) bool {
	return as == 0 || as == 23456 || as >= 64512 && as <= 65535 || as >= 65552 && as <= 131071 || as >= 4200000000
}
