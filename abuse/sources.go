package abuse

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/ipinfo/go/v2/ipinfo"
)

// Contact is a mail address and how we came to it.
type Contact struct {
	Address string `json:"address,omitempty"`
	// Scope is what it is the contact of: "AS64500" or a prefix.
	Scope string `json:"scope,omitempty"`
	// First and Last bound the addresses that it is the contact of, zero: of
	// none for certain. See Contact.covers.
	First  netip.Addr `json:"first,omitzero"`
	Last   netip.Addr `json:"last,omitzero"`
	Source string     `json:"source,omitempty"` // "RDAP autnum/64500"
	URL    string     `json:"url,omitempty"`
	At     time.Time  `json:"at,omitzero"`
	Role   string     `json:"role,omitempty"`
	Handle string     `json:"handle,omitempty"`
	// Guess: nobody says that this is the abuse contact. It is never written
	// to unless a person types the address.
	Guess bool `json:"guess,omitempty"`
	// Stale: the lookup failed now; this is what an earlier one gave.
	Stale  bool   `json:"stale,omitempty"`
	Note   string `json:"note,omitempty"`
	Format Format `json:"format,omitempty"` // what it wants, by the overrides
	Form   string `json:"form,omitempty"`   // a web form that the desk prefers
}

// Claim is one source's word on who announces an address.
type Claim struct {
	Origins []uint32     `json:"origins,omitempty"`
	Prefix  netip.Prefix `json:"prefix,omitzero"` // zero: it does not say
	Name    string       `json:"name,omitempty"`
	Domain  string       `json:"domain,omitempty"`
	Source  string       `json:"source"` // "RIPEstat network-info"
	At      time.Time    `json:"at"`
	// Built is the date of a database file; zero for an answer of now.
	Built time.Time `json:"built,omitzero"`
	Stale bool      `json:"stale,omitempty"`
	// Announced: Prefix is one seen in BGP, not a range of a database.
	Announced bool `json:"announced,omitempty"`
}

// servers are the addresses of those that are asked; tests have their own.
type serverURLs struct {
	ripestat, ipinfo, ipinfoLite, bootstrap string
	cymru4, cymru6, abusix                  string // DNS zones
}

var realServers = serverURLs{
	ripestat: "https://stat.ripe.net/data/", ipinfo: "https://ipinfo.io/", ipinfoLite: "https://api.ipinfo.io/lite/", bootstrap: bootstrapURL,
	cymru4: "origin.asn.cymru.com", cymru6: "origin6.asn.cymru.com", abusix: "abuse-contacts.abusix.zone",
}

// sane reports whether a prefix can be the announcement of an address: lying
// and broken answers are not believed.
func sane(p netip.Prefix, a netip.Addr) bool {
	if !p.IsValid() || !p.Contains(a) || p.Addr().Is4() != a.Is4() {
		return false
	}
	if a.Is4() {
		return p.Bits() >= 8
	}
	return p.Bits() >= 16
}

// ripestatOrigin asks RIPEstat's network-info
// (https://stat.ripe.net/docs/02.data-api/network-info.html).
func (l *lookups) ripestatOrigin(ctx context.Context, a netip.Addr) (Claim, error) {
	c := Claim{Source: "RIPEstat network-info", At: l.now(), Announced: true}
	body, _, err := l.fetch.get(ctx, l.servers.ripestat+"network-info/data.json?sourceapp=smtpguard&resource="+url.QueryEscape(a.String()), "application/json")
	if err != nil {
		return c, err
	}
	var ans struct {
		Status string `json:"status"`
		Data   struct {
			ASNs   []any  `json:"asns"`
			Prefix string `json:"prefix"`
		} `json:"data"`
	}
	dec := json.NewDecoder(strings.NewReader(string(body)))
	dec.UseNumber()
	if err := dec.Decode(&ans); err != nil {
		return c, errors.New("the answer is not what RIPEstat's interface says")
	}
	if ans.Status != "" && ans.Status != "ok" {
		return c, fmt.Errorf("%w: RIPEstat's status is %s", errLater, quoted(ans.Status))
	}
	for _, v := range ans.Data.ASNs {
		if n, ok := asNumber(v); ok && len(c.Origins) < 20 && !slices.Contains(c.Origins, n) {
			c.Origins = append(c.Origins, n)
		}
	}
	p, err := netip.ParsePrefix(ans.Data.Prefix)
	if err != nil || len(c.Origins) == 0 {
		return c, fmt.Errorf("%w: RIPEstat sees nobody announce %s", errNone, a)
	}
	if !sane(p, a) {
		return c, fmt.Errorf("the answer names %s, which cannot be the prefix of %s", p, a)
	}
	c.Prefix = p.Masked()
	return c, nil
}

// ripestatContacts asks RIPEstat's abuse-contact-finder for an address or AS.
func (l *lookups) ripestatContacts(ctx context.Context, resource, scope string) ([]Contact, error) {
	body, from, err := l.fetch.get(ctx, l.servers.ripestat+"abuse-contact-finder/data.json?sourceapp=smtpguard&resource="+url.QueryEscape(resource), "application/json")
	if err != nil {
		return nil, err
	}
	var ans struct {
		Data struct {
			Contacts []any `json:"abuse_contacts"`
		} `json:"data"`
	}
	if err := json.Unmarshal(body, &ans); err != nil {
		return nil, errors.New("the answer is not what RIPEstat's interface says")
	}
	var cs []Contact
	for _, v := range ans.Data.Contacts {
		s, _ := v.(string)
		if addr, err := CheckAddress(s); err == nil && !isRegistry(addr) && len(cs) < maxContacts {
			cs = append(cs, Contact{Address: addr, Scope: scope, Source: "RIPEstat abuse-contact-finder " + clean(resource, 60), URL: from, At: l.now(), Role: "abuse"})
		}
	}
	if len(cs) == 0 {
		return nil, fmt.Errorf("%w: RIPEstat finds no abuse contact of %s", errNone, clean(resource, 60))
	}
	return cs, nil
}

// reverse is an address as the labels of a DNS zone of addresses.
func reverse(a netip.Addr) string {
	var b strings.Builder
	raw := a.AsSlice()
	for _, c := range slices.Backward(raw) {
		if len(raw) == 4 {
			fmt.Fprintf(&b, "%d.", c)
		} else {
			fmt.Fprintf(&b, "%x.%x.", c&15, c>>4)
		}
	}
	return b.String()
}

func (l *lookups) txt(ctx context.Context, name string) ([]string, error) {
	ts, err := l.dns.LookupTXT(ctx, name+".")
	var de *net.DNSError
	if errors.As(err, &de) {
		if de.IsNotFound {
			return nil, fmt.Errorf("%w: DNS has no such name", errNone)
		}
		if de.IsTimeout {
			return nil, errors.New("the name service does not answer in time")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the name service does not answer: %w", err)
	}
	if len(ts) > 50 {
		ts = ts[:50]
	}
	return ts, nil
}

// cymruOrigin asks Team Cymru's mapping by DNS
// (https://team-cymru.com/community-services/ip-asn-mapping): TXT records of
// five fields, "64500 64501 | 198.51.100.0/24 | ZZ | ripencc | 2020-01-01".
func (l *lookups) cymruOrigin(ctx context.Context, a netip.Addr) (Claim, error) {
	c := Claim{Source: "Team Cymru DNS", At: l.now(), Announced: true}
	zone := l.servers.cymru4
	if a.Is6() {
		zone = l.servers.cymru6
	}
	ts, err := l.txt(ctx, reverse(a)+zone)
	if err != nil {
		return c, err
	}
	for _, t := range ts {
		f := strings.Split(t, "|")
		if len(f) < 2 {
			continue
		}
		p, err := netip.ParsePrefix(strings.TrimSpace(f[1]))
		if err != nil || !sane(p, a) || c.Prefix.IsValid() && p.Bits() < c.Prefix.Bits() {
			continue
		}
		if !c.Prefix.IsValid() || p.Bits() > c.Prefix.Bits() {
			c.Prefix, c.Origins = p.Masked(), nil
		}
		for s := range strings.FieldsSeq(f[0]) {
			if n, ok := asNumber(s); ok && len(c.Origins) < 20 && !slices.Contains(c.Origins, n) {
				c.Origins = append(c.Origins, n)
			}
		}
	}
	if len(c.Origins) == 0 {
		return c, fmt.Errorf("%w: Team Cymru has no usable record of %s", errNone, a)
	}
	return c, nil
}

// abusixContacts asks Abusix' contact database by DNS.
func (l *lookups) abusixContacts(ctx context.Context, a netip.Addr, scope string) ([]Contact, error) {
	ts, err := l.txt(ctx, reverse(a)+l.servers.abusix)
	if err != nil {
		return nil, err
	}
	var cs []Contact
	for _, t := range ts {
		for s := range strings.SplitSeq(t, ",") {
			addr, err := CheckAddress(s)
			if err != nil || isRegistry(addr) || len(cs) >= maxContacts || slices.ContainsFunc(cs, func(c Contact) bool { return c.Address == addr }) {
				continue
			}
			cs = append(cs, Contact{Address: addr, Scope: scope, Source: "Abusix contact database, DNS", At: l.now(), Role: "abuse"})
		}
	}
	if len(cs) == 0 {
		return nil, fmt.Errorf("%w: Abusix has no usable contact of %s", errNone, a)
	}
	return cs, nil
}

// ipinfoAnswer is what ipinfo.io knows, by the plan of the token.
type ipinfoAnswer struct {
	claim   Claim
	contact Contact // zero: the plan has none
}

// ipinfoLookup asks ipinfo.io through its library, which takes no context,
// reads without bound and panics on answers it did not expect: it gets a
// client of ours, and what it panics with becomes an error.
func (l *lookups) ipinfoLookup(ctx context.Context, a netip.Addr) (ans ipinfoAnswer, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the ipinfo library cannot read the answer: %s", clean(fmt.Sprint(r), 200))
		}
	}()
	if !a.IsValid() {
		return ans, errors.New("no address")
	}
	timeout := l.config.Lookup.Each
	if t, ok := ctx.Deadline(); ok {
		timeout = min(timeout, time.Until(t))
	}
	if timeout <= 0 {
		return ans, context.DeadlineExceeded
	}
	hc := &http.Client{Transport: withContext{ctx, l.fetch}, Timeout: timeout, CheckRedirect: l.fetch.client.CheckRedirect}
	ans.claim = Claim{Source: "ipinfo.io", At: l.now()}
	cl := ipinfo.NewClient(hc, nil, l.config.Lookup.IPinfoToken)
	if cl.BaseURL, err = url.Parse(l.servers.ipinfo); err != nil {
		return ans, err
	}
	core, err := cl.GetIPInfo(net.IP(a.AsSlice()))
	if err != nil {
		if l.config.Lookup.IPinfoToken == "" {
			return ans, ipinfoError(err)
		}
		if lerr := l.ipinfoLite(hc, a, &ans.claim); lerr != nil {
			return ans, errors.Join(ipinfoError(err), lerr)
		}
		return ans, nil
	}
	if core.Bogon {
		return ans, fmt.Errorf("%w: ipinfo.io does not answer for reserved addresses", errNone)
	}
	if core.ASN != nil {
		if n, ok := asNumber(core.ASN.ASN); ok {
			ans.claim.Origins = []uint32{n}
		}
		ans.claim.Name, ans.claim.Domain = clean(core.ASN.Name, 100), clean(core.ASN.Domain, 100)
		if p, err := netip.ParsePrefix(core.ASN.Route); err == nil && sane(p, a) {
			ans.claim.Prefix, ans.claim.Announced = p.Masked(), true
		}
	} else if as, name, _ := strings.Cut(core.Org, " "); as != "" {
		if n, ok := asNumber(as); ok {
			ans.claim.Origins, ans.claim.Name = []uint32{n}, clean(name, 100)
		}
	}
	if core.Abuse != nil {
		if addr, err := CheckAddress(core.Abuse.Email); err == nil && !isRegistry(addr) {
			ans.contact = Contact{Address: addr, Scope: clean(core.Abuse.Network, 60), Source: "ipinfo.io abuse", At: l.now(), Role: "abuse"}.ofNet(single(a))
			if p, err := netip.ParsePrefix(core.Abuse.Network); err == nil && p.Contains(a) {
				ans.contact = ans.contact.ofNet(p)
			}
		}
	}
	if len(ans.claim.Origins) == 0 && l.config.Lookup.IPinfoToken != "" {
		if err := l.ipinfoLite(hc, a, &ans.claim); err != nil && ans.contact.Address == "" {
			return ans, err
		}
	}
	if len(ans.claim.Origins) == 0 && ans.contact.Address == "" {
		return ans, fmt.Errorf("%w: ipinfo.io names no AS for %s", errNone, a)
	}
	return ans, nil
}

// ipinfoLite asks the free plan's own interface.
func (l *lookups) ipinfoLite(hc *http.Client, a netip.Addr, c *Claim) error {
	cl := ipinfo.NewLiteClient(hc, nil, l.config.Lookup.IPinfoToken)
	var err error
	if cl.BaseURL, err = url.Parse(l.servers.ipinfoLite); err != nil {
		return err
	}
	lite, err := cl.GetIPInfo(net.IP(a.AsSlice()))
	if err != nil {
		return ipinfoError(err)
	}
	n, ok := asNumber(lite.ASN)
	if !ok {
		return fmt.Errorf("%w: ipinfo.io names no AS for %s", errNone, a)
	}
	c.Source = "ipinfo.io lite"
	c.Origins, c.Name, c.Domain = []uint32{n}, clean(lite.ASName, 100), clean(lite.ASDomain, 100)
	return nil
}

// ipinfoError says what ipinfo answered; the library's own text speaks of the
// limit of the free plan whatever the plan.
func ipinfoError(err error) error {
	var e *ipinfo.ErrorResponse
	if errors.As(err, &e) {
		// Its Error method panics where the body of the answer, which is
		// decoded over the whole struct, took the response away.
		if e.Response == nil {
			return errors.New("ipinfo.io answered with an error")
		}
		if code := e.Response.StatusCode; code == http.StatusTooManyRequests || code >= 500 {
			return fmt.Errorf("%w: ipinfo.io answered %s", errLater, strconv.Itoa(code))
		}
		return fmt.Errorf("ipinfo.io answered %d", e.Response.StatusCode)
	}
	return shortError(err)
}

// withContext gives each request the context that the library has no place for.
type withContext struct {
	ctx context.Context
	rt  http.RoundTripper
}

func (w withContext) RoundTrip(req *http.Request) (*http.Response, error) {
	return w.rt.RoundTrip(req.WithContext(w.ctx))
}
