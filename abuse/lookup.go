package abuse

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Origin is who announces a network, as far as anybody could be asked.
type Origin struct {
	// AS is the origin that the report goes to, 0 if it is not known; ASes
	// are all of them where there are several.
	AS     uint32       `json:"as,omitempty"`
	ASes   []uint32     `json:"ases,omitempty"`
	Prefix netip.Prefix `json:"prefix,omitzero"`
	// Claims are what each source said, the most trusted first.
	Claims []Claim `json:"claims,omitempty"`
	// Disputed: several origins, or sources that do not agree.
	Disputed bool `json:"disputed,omitempty"`
	// NotAsked says why nothing is known.
	NotAsked string `json:"not_asked,omitempty"`
}

// finding is what a lookup for a draft gave.
type finding struct {
	asked    netip.Addr // the address whose origin it is
	origin   Origin
	to, cc   Contact
	others   []Contact
	override *Override
	warnings []string
	// unanswered names who could not be asked now and whose word is missing:
	// it is worth asking again. Empty: there is an answer, be it that nobody
	// knows.
	unanswered string
	raw        map[string][]byte // answers as they came, by source
}

// How long answers are believed.
const (
	originFresh    = 6 * time.Hour
	originNegative = 30 * time.Minute
	contactFresh   = 7 * 24 * time.Hour
	contactNone    = 24 * time.Hour
	staleMax       = 30 * 24 * time.Hour
	maxCached      = 2000
)

const (
	kindLookup = "report-lookup"
)

// lookups asks, remembers, and never asks the same thing twice at a time.
type lookups struct {
	config  Config
	fetch   *fetcher
	dns     *net.Resolver
	boot    *bootstrap
	db      *database // nil: none
	servers serverURLs
	store   Store
	log     *slog.Logger
	now     func() time.Time

	mu       sync.Mutex
	cache    map[string]*remembered
	inFlight map[string]chan struct{}

	counts lookupCounts
}

// remembered is a cached answer.
type remembered struct {
	At       time.Time `json:"at"`
	Claim    *Claim    `json:"claim,omitempty"`
	Contacts []Contact `json:"contacts,omitempty"`
	None     string    `json:"none,omitempty"` // the answer was that there is nothing
	Raw      []byte    `json:"raw,omitempty"`
}

func newLookups(c Config, store Store, log *slog.Logger, now func() time.Time, private bool) (*lookups, error) {
	agent := "smtpguard (mail server flood reports)"
	if a, err := c.sender(); err == nil && c.From != "" {
		agent = "smtpguard (mail server flood reports; " + a.Address + ")"
	}
	dir := ""
	if c.Dir != "" {
		dir = c.Dir + "/rdap"
	}
	boot, err := newBootstrap(dir)
	if err != nil {
		return nil, err
	}
	l := &lookups{config: c, fetch: newFetcher(agent, private), boot: boot, servers: realServers, store: store, log: log, now: now,
		cache: map[string]*remembered{}, inFlight: map[string]chan struct{}{}}
	if c.ASNDatabase != "" {
		l.db = &database{path: c.ASNDatabase}
	}
	l.dns = &net.Resolver{PreferGo: true}
	var d net.Dialer
	l.dns.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := d.DialContext(ctx, network, cmp.Or(c.Lookup.DNS, address))
		if err == nil { // the resolver itself waits on when ctx ends early
			context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
		}
		return conn, err
	}
	err = store.Records(kindLookup, func(key string, value []byte) bool {
		var r remembered
		if json.Unmarshal(value, &r) == nil && now().Sub(r.At) < staleMax {
			l.cache[key] = &r
		}
		return len(l.cache) < maxCached
	})
	if err != nil {
		return nil, fmt.Errorf("reading earlier lookups: %w", err)
	}
	return l, nil
}

func (l *lookups) uses(source string) bool {
	return l.config.Lookup.Online && slices.Contains(l.config.Lookup.Sources, source)
}

// silent says why nobody is asked, "" if somebody is.
func (l *lookups) silent() string {
	switch {
	case l.config.From == "":
		return "reports.from is not set, so nothing could be sent"
	case !l.config.Lookup.Online:
		return "reports.lookup.online is off"
	}
	return ""
}

// offline is what the database on this machine says of an address.
func (l *lookups) offline(a netip.Addr) (Claim, error) {
	if l.db == nil {
		return Claim{}, errNone
	}
	return l.db.lookup(a, l.now())
}

// recall returns what is known by a key, and whether it is fresh enough.
func (l *lookups) recall(key string, fresh, none time.Duration) (*remembered, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	r := l.cache[key]
	if r == nil {
		return nil, false
	}
	age := l.now().Sub(r.At)
	if r.None != "" {
		return r, age < none
	}
	return r, age < fresh
}

// recallNet is recall for the narrowest network around an address that was
// asked of a source, at most a /24 or /48.
func (l *lookups) recallNet(source string, a netip.Addr, fresh, none time.Duration) (*remembered, bool) {
	for bits := a.BitLen(); bits >= provisionalBits(a); bits-- {
		if r, ok := l.recall(netKey(source, netip.PrefixFrom(a, bits)), fresh, none); r != nil {
			return r, ok
		}
	}
	return nil, false
}

func netKey(source string, p netip.Prefix) string { return source + "/" + p.Masked().String() }

// spokenFor is the network that an answer about an address is remembered for:
// what it names, but no more than the /24 or /48 around the address, for
// inside a wider announcement somebody else may announce a part of it.
func spokenFor(a netip.Addr, answered netip.Prefix) netip.Prefix {
	if !answered.IsValid() || !answered.Contains(a) {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return netip.PrefixFrom(a, max(answered.Bits(), provisionalBits(a)))
}

// known is what is known of the origin of an address without asking anybody
// now: by earlier answers about its own /24 or /48, else by the database. Its
// AS is 0 if nothing is.
func (l *lookups) known(a netip.Addr) (o Origin) {
	for _, source := range []string{RIPEstat, Cymru, IPinfo} {
		if r, ok := l.recallNet(source, a, contactFresh, contactFresh); ok && r.Claim != nil && len(r.Claim.Origins) > 0 {
			o.Claims = append(o.Claims, *r.Claim)
		}
	}
	if len(o.Claims) == 0 {
		c, err := l.offline(a)
		switch {
		case err == nil:
			o.Claims = append(o.Claims, c)
		case !errors.Is(err, errNone):
			l.log.Debug("the ASN database was not used", "err", err)
		}
	}
	o.decide()
	return o
}

// remember keeps an answer, here and in the store.
func (l *lookups) remember(key string, r *remembered) {
	r.At = l.now()
	if len(r.Raw) > 256<<10 {
		r.Raw = nil
	}
	l.mu.Lock()
	l.cache[key] = r
	var drop string
	if len(l.cache) > maxCached {
		for k, c := range l.cache {
			if drop == "" || c.At.Before(l.cache[drop].At) {
				drop = k
			}
		}
		delete(l.cache, drop)
	}
	l.mu.Unlock()
	v, err := json.Marshal(r)
	if err == nil {
		err = l.store.SetRecord(kindLookup, key, v)
	}
	if err == nil && drop != "" {
		_, err = l.store.DropRecord(kindLookup, drop)
	}
	if err != nil {
		l.log.Warn("a lookup could not be remembered", "key", key, "err", err)
	}
}

// once lets one caller ask for a key at a time; the others then find the
// answer in the cache.
func (l *lookups) once(ctx context.Context, key string, ask func()) error {
	for {
		l.mu.Lock()
		ch, busy := l.inFlight[key]
		if !busy {
			ch = make(chan struct{})
			l.inFlight[key] = ch
			l.mu.Unlock()
			defer func() {
				l.mu.Lock()
				delete(l.inFlight, key)
				l.mu.Unlock()
				close(ch)
			}()
			ask()
			return nil
		}
		l.mu.Unlock()
		select {
		case <-ch:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// ask is a question to one source about an address, a network or an AS: from
// the cache if it is fresh, else from the source; else stale, said so. What is
// said of a network counts for that one, not for the parts of it.
func (l *lookups) ask(ctx context.Context, source string, p netip.Prefix, as uint32, fresh, none time.Duration,
	question func(context.Context) (r *remembered, answered netip.Prefix, err error)) (*remembered, error) {
	key := source + "/" + p.Addr().String()
	find := func() (*remembered, bool) { return l.recallNet(source, p.Addr(), fresh, none) }
	net := p.IsValid() && !p.IsSingleIP()
	if net {
		key = netKey(source+"-net", p)
		find = func() (*remembered, bool) { return l.recall(key, fresh, none) }
	}
	if as != 0 {
		key = source + "/AS" + strconv.FormatUint(uint64(as), 10)
		find = func() (*remembered, bool) { return l.recall(key, fresh, none) }
	}
	var got *remembered
	var err error
	onceErr := l.once(ctx, key, func() {
		old, ok := find()
		if !ok {
			ctx, cancel := context.WithTimeout(ctx, l.config.Lookup.Each)
			defer cancel()
			var answered netip.Prefix
			var r *remembered
			r, answered, err = question(ctx)
			l.counts.add(source, err)
			if err == nil || errors.Is(err, errNone) {
				if r == nil {
					r = &remembered{}
				}
				if err != nil {
					r.None = clean(strings.TrimPrefix(err.Error(), errNone.Error()+": "), 200)
				}
				k := key
				if as == 0 && !net {
					k = netKey(source, spokenFor(p.Addr(), answered))
				}
				l.remember(k, r)
				old = r
			} else if old != nil && old.None == "" && l.now().Sub(old.At) < staleMax {
				s := *old
				s.Contacts = slices.Clone(old.Contacts)
				for i := range s.Contacts {
					s.Contacts[i].Stale = true
				}
				if s.Claim != nil {
					c := *s.Claim
					c.Stale = true
					s.Claim = &c
				}
				got, err = &s, nil
				return
			} else {
				return
			}
		}
		if old.None != "" {
			err = fmt.Errorf("%w: %s", errNone, old.None)
			return
		}
		got, err = old, nil
	})
	if onceErr != nil {
		return nil, onceErr
	}
	return got, err
}

// findOrigin asks every source at the same time who announces an address;
// the answer is the most trusted one's, and disagreement is shown.
func (l *lookups) findOrigin(ctx context.Context, a netip.Addr, f *finding) {
	f.asked = a
	type source struct {
		name string
		ask  func(context.Context) (*remembered, netip.Prefix, error)
	}
	claimed := func(c Claim, err error) (*remembered, netip.Prefix, error) {
		return &remembered{Claim: &c}, c.Prefix, err
	}
	var sources []source
	if l.uses(RIPEstat) {
		sources = append(sources, source{RIPEstat, func(ctx context.Context) (*remembered, netip.Prefix, error) { return claimed(l.ripestatOrigin(ctx, a)) }})
	}
	if l.uses(Cymru) {
		sources = append(sources, source{Cymru, func(ctx context.Context) (*remembered, netip.Prefix, error) { return claimed(l.cymruOrigin(ctx, a)) }})
	}
	if l.uses(IPinfo) {
		sources = append(sources, source{IPinfo, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			ans, err := l.ipinfoLookup(ctx, a)
			r, p, err := claimed(ans.claim, err)
			if ans.contact.Address != "" {
				r.Contacts = []Contact{ans.contact}
			}
			return r, p, err
		}})
	}
	got := make([]*remembered, len(sources))
	faults := make([]error, len(sources))
	var wg sync.WaitGroup
	for i, s := range sources {
		wg.Go(func() { got[i], faults[i] = l.ask(ctx, s.name, single(a), 0, originFresh, originNegative, s.ask) })
	}
	wg.Wait()
	failed := ""
	for i, r := range got {
		if faults[i] != nil {
			what := fmt.Sprintf("%s: %s", sources[i].name, clean(faults[i].Error(), 200))
			f.warnings = append(f.warnings, what)
			if failed == "" && !errors.Is(faults[i], errNone) {
				failed = what
			}
			continue
		}
		if r.Claim != nil && len(r.Claim.Origins) > 0 {
			c := *r.Claim
			if c.Prefix.IsValid() && !c.Prefix.Contains(a) {
				c.Prefix = netip.Prefix{}
			}
			f.origin.Claims = append(f.origin.Claims, c)
		}
		if sources[i].name == IPinfo {
			f.others = append(f.others, r.Contacts...)
		}
	}
	c, err := l.offline(a)
	switch {
	case err == nil:
		f.origin.Claims = append(f.origin.Claims, c)
	case !errors.Is(err, errNone):
		f.warnings = append(f.warnings, clean(err.Error(), 200))
	}
	f.origin.decide()
	if !announced(f.origin) {
		f.unanswered = failed
	}
	if f.origin.AS == 0 {
		f.origin.NotAsked = "nobody who was asked knows"
		if why := l.silent(); why != "" {
			f.origin.NotAsked = "not looked up: " + why
		}
	}
}

// decide takes the origin from the claims: AS and prefix from the same one,
// which then stands first. That is the most trusted one that saw the prefix in
// BGP, else one with the range of a database, else one that names only an AS.
func (o *Origin) decide() {
	rank := func(c Claim) int {
		switch {
		case c.Announced && c.Prefix.IsValid():
			return 0
		case c.Prefix.IsValid():
			return 1
		}
		return 2
	}
	for i, c := range o.Claims {
		o.Claims[i].Origins = slices.DeleteFunc(slices.Clone(c.Origins), reservedAS)
	}
	o.Claims = slices.DeleteFunc(o.Claims, func(c Claim) bool { return len(c.Origins) == 0 })
	slices.SortStableFunc(o.Claims, func(a, b Claim) int { return rank(a) - rank(b) })
	for _, c := range o.Claims {
		for _, as := range c.Origins {
			if !slices.Contains(o.ASes, as) {
				o.ASes = append(o.ASes, as)
			}
		}
	}
	if len(o.ASes) > 0 {
		o.AS, o.Prefix = o.ASes[0], o.Claims[0].Prefix
	}
	o.Disputed = len(o.ASes) > 1
	if len(o.ASes) == 1 {
		o.ASes = nil
	}
}

// contactsAS and contactsNet ask in their order until there is an answer.
// failed is what could not be asked now and may have had one.
func (l *lookups) contactsAS(ctx context.Context, as uint32, f *finding) (cs []Contact, failed string) {
	scope := "AS" + strconv.FormatUint(uint64(as), 10)
	if l.uses(RDAP) {
		r, err := l.ask(ctx, RDAP, netip.Prefix{}, as, contactFresh, contactNone, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			ans, body, from, err := l.rdapAS(ctx, as)
			return l.rdapFound(ans, body, from, "RDAP autnum/"+scope[2:], scope, err), netip.Prefix{}, rdapNone(ans, err)
		})
		cs = l.gather(cs, r, err, "RDAP autnum/"+scope[2:], f, &failed)
	}
	if !certain(cs) && l.uses(RIPEstat) {
		r, err := l.ask(ctx, RIPEstat+"-contact", netip.Prefix{}, as, contactFresh, contactNone, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			found, err := l.ripestatContacts(ctx, scope, scope)
			return &remembered{Contacts: found}, netip.Prefix{}, err
		})
		cs = l.gather(cs, r, err, "RIPEstat abuse-contact-finder", f, &failed)
	}
	return cs, failed
}

// contactsNet asks about p, all that is reported, and not about an address in
// it: a registry then answers with the smallest network that holds all of p
// (RFC 9082, section 3.1.1), not with a customer's part of it.
func (l *lookups) contactsNet(ctx context.Context, p netip.Prefix, f *finding) (cs []Contact, failed string) {
	scope := shown(p)
	if l.uses(RDAP) {
		r, err := l.ask(ctx, RDAP, p, 0, contactFresh, contactNone, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			ans, body, from, err := l.rdapIP(ctx, p)
			net := netip.Prefix{}
			for _, n := range ans.Prefixes {
				if n.Contains(p.Addr()) {
					net = n
				}
			}
			in := scope
			if net.IsValid() {
				in = net.String()
			}
			if ans.First.IsValid() {
				if ps := rangePrefixes(ans.First, ans.Last); len(ps) == 1 {
					in = ps[0].String()
				} else {
					in = ans.First.String() + "-" + ans.Last.String()
				}
			}
			for i, c := range ans.Contacts {
				if ans.First.IsValid() {
					ans.Contacts[i] = c.of(ans.First, ans.Last)
				} else {
					ans.Contacts[i] = c.ofNet(net)
				}
			}
			return l.rdapFound(ans, body, from, "RDAP ip/"+scope, in, err), net, rdapNone(ans, err)
		})
		cs = l.gather(cs, r, err, "RDAP ip/"+scope, f, &failed)
	}
	// Two that do not say of what network they have a contact: it is one of
	// what they were asked about.
	known := func(found []Contact, p netip.Prefix) *remembered {
		for i, c := range found {
			found[i] = c.ofNet(p)
		}
		return &remembered{Contacts: found}
	}
	if !certain(cs) && l.uses(RIPEstat) {
		r, err := l.ask(ctx, RIPEstat+"-contact", p, 0, contactFresh, contactNone, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			found, err := l.ripestatContacts(ctx, scope, scope)
			return known(found, p), netip.Prefix{}, err
		})
		cs = l.gather(cs, r, err, "RIPEstat abuse-contact-finder", f, &failed)
	}
	if one := single(p.Addr()); !certain(cs) && l.uses(Abusix) {
		r, err := l.ask(ctx, Abusix, one, 0, contactFresh, contactNone, func(ctx context.Context) (*remembered, netip.Prefix, error) {
			found, err := l.abusixContacts(ctx, p.Addr(), shown(one))
			return known(found, one), netip.Prefix{}, err
		})
		cs = l.gather(cs, r, err, "Abusix", f, &failed)
	}
	return cs, failed
}

// single is the prefix of one address.
func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

// rdapFound makes an answer one to be remembered.
func (l *lookups) rdapFound(ans RDAPAnswer, body []byte, from, source, scope string, err error) *remembered {
	if err != nil {
		return nil
	}
	for i := range ans.Contacts {
		c := &ans.Contacts[i]
		c.Scope, c.Source, c.URL, c.At = scope, source, from, l.now()
	}
	return &remembered{Contacts: ans.Contacts, Raw: body}
}

// rdapNone makes an answer without a contact an errNone that says why.
func rdapNone(ans RDAPAnswer, err error) error {
	if err == nil && len(ans.Contacts) == 0 {
		return fmt.Errorf("%w: %s", errNone, ans.Note)
	}
	return err
}

func (l *lookups) gather(cs []Contact, r *remembered, err error, source string, f *finding, failed *string) []Contact {
	if err != nil {
		f.warnings = append(f.warnings, source+": "+clean(err.Error(), 200))
		if *failed == "" && !errors.Is(err, errNone) {
			*failed = source + ": " + clean(err.Error(), 200)
		}
		return cs
	}
	if len(r.Raw) > 0 {
		if f.raw == nil {
			f.raw = map[string][]byte{}
		}
		f.raw[source] = r.Raw
	}
	return append(cs, r.Contacts...)
}

// certain reports whether one of the contacts is no guess.
func certain(cs []Contact) bool {
	return slices.ContainsFunc(cs, func(c Contact) bool { return !c.Guess })
}

// findContacts asks for the contact of the AS and that of the network that is
// reported, once the origin is found. Recipients are those that are the
// contacts of all of it. It never fails: what could not be found is a warning.
func (l *lookups) findContacts(ctx context.Context, reported []netip.Prefix, overrides []Override, f *finding) {
	if l.uses(RDAP) {
		short, cancel := context.WithTimeout(ctx, l.config.Lookup.Each)
		if err := l.boot.refresh(short, l.fetch, l.servers.bootstrap, l.now()); err != nil {
			l.log.Debug("the registry of RDAP servers is not renewed", "err", err)
		}
		cancel()
	}
	paid := f.others // what ipinfo's plan gave
	f.others = nil
	all := common(reported)
	// Of an AS whose announcement nobody names, the address that was asked
	// about says no more than its /24 or /48.
	announcement := f.origin.Prefix
	if !announcement.IsValid() && f.asked.IsValid() {
		announcement = provisional(single(f.asked))
	}
	var forAS, forNet []Contact
	var failedAS, failedNet string
	if f.override = findOverride(overrides, f.origin.AS, all); f.override != nil && f.override.Address != "" {
		forAS = append(forAS, f.override.contact(announcement, l.now()))
	}
	if f.origin.AS != 0 && len(forAS) == 0 {
		cs, failed := l.contactsAS(ctx, f.origin.AS, f)
		for _, c := range cs {
			forAS = append(forAS, c.ofNet(announcement))
		}
		failedAS = failed
	}
	if f.override == nil || f.override.Address == "" {
		forNet, failedNet = l.contactsNet(ctx, all, f)
		forNet = append(forNet, paid...)
	}
	for i := range overrides { // what a person knows of a part of it
		if o := &overrides[i]; o.Address != "" && o.Prefix.IsValid() && all.Contains(o.Prefix.Addr()) && o.Prefix.Bits() > all.Bits() {
			forNet = append(forNet, o.contact(o.Prefix, l.now()))
		}
	}
	f.choose(forAS, forNet, l.config.CopyNetwork, reported, l.bad)
	switch {
	case f.unanswered != "":
	case failedAS != "" && !certain(forAS):
		f.unanswered = failedAS
	case f.to.Address == "":
		f.unanswered = failedNet
	}
	// A guess after RFC 2142, of which a person may make something.
	if f.to.Address == "" {
		for _, c := range f.origin.Claims {
			if addr, err := CheckAddress("abuse@" + c.Domain); err == nil && c.Domain != "" {
				f.others = append(f.others, Contact{Address: addr, Source: "a guess after RFC 2142, from the domain that " + c.Source + " names", At: c.At, Guess: true})
				break
			}
		}
	}
	form := desks[f.origin.AS]
	if f.override != nil && f.override.Form != "" {
		form = f.override.Form
	}
	f.to.Form = form
	if f.override != nil {
		f.to.Format = f.override.Format
	}
	if why := l.silent(); why != "" {
		f.warnings = append(f.warnings, "contact: not looked up ("+why+")")
	}
}

// choose makes the best contact of the AS the recipient and that of the block
// a copy. Where the AS has none, the block's is the recipient. Neither is a
// guess, nor one that bounced lately, nor the contact of a part only of what is
// reported: these are shown among the others.
func (f *finding) choose(forAS, forNet []Contact, copyNet bool, reported []netip.Prefix, bad func(string) (bool, time.Time)) {
	var rest []Contact
	part := ""
	usable := func(c Contact) bool {
		say := func(s string) {
			if c.Note != "" {
				s = c.Note + "; " + s
			}
			c.Note = s
		}
		bounced, until := bad(c.Address)
		switch {
		case c.Guess:
		case bounced:
			say("it bounced; nothing is sent there by itself before " + until.UTC().Format("2006-01-02"))
		case !c.covers(reported):
			say("of a part only of what is reported")
			if part == "" {
				part = fmt.Sprintf("%s is that of %s only", c.Address, c.Scope)
			}
		default:
			return true
		}
		rest = append(rest, c)
		return false
	}
	for _, c := range forAS {
		switch {
		case !usable(c):
		case f.to.Address == "":
			f.to = c
		default:
			rest = append(rest, c)
		}
	}
	for _, c := range forNet {
		switch {
		case !usable(c):
		case f.to.Address == "":
			f.to = c
			if f.origin.AS != 0 {
				why := fmt.Sprintf("AS%d has no usable abuse contact", f.origin.AS)
				if part != "" {
					why = part
				}
				f.warnings = append(f.warnings, why+"; the report goes to that of the address block")
			}
		case copyNet && f.cc.Address == "" && !sameAddr(c.Address, f.to.Address) && f.to.Scope != c.Scope:
			f.cc = c
		default:
			rest = append(rest, c)
		}
	}
	if f.to.Address == "" && part != "" {
		f.warnings = append(f.warnings, partWarning+part)
	}
	for _, c := range rest {
		same := func(o Contact) bool { return sameAddr(o.Address, c.Address) }
		if !same(f.to) && !same(f.cc) && !slices.ContainsFunc(f.others, same) && len(f.others) < maxContacts {
			f.others = append(f.others, c)
		}
	}
	slices.SortStableFunc(f.others, func(a, b Contact) int {
		switch {
		case a.Guess == b.Guess:
			return 0
		case a.Guess:
			return 1
		}
		return -1
	})
}

// mailServers are the addresses that receive mail of a domain: those of its
// MX hosts, or its own where it has none. At most 32.
func (l *lookups) mailServers(ctx context.Context, domain string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, l.config.Lookup.Each)
	defer cancel()
	mxs, err := l.dns.LookupMX(ctx, domain+".")
	var de *net.DNSError
	if err != nil && len(mxs) == 0 && !(errors.As(err, &de) && de.IsNotFound) {
		return nil, fmt.Errorf("looking for the mail servers of %s: %w", domain, err)
	}
	hosts := []string{domain + "."}
	if len(mxs) > 0 {
		hosts = nil
		for _, mx := range mxs[:min(len(mxs), 8)] {
			hosts = append(hosts, mx.Host)
		}
	}
	var addrs []netip.Addr
	for _, h := range hosts {
		as, err := l.dns.LookupNetIP(ctx, "ip", h)
		if err != nil {
			continue
		}
		for _, a := range as {
			if a = a.Unmap(); len(addrs) < 32 && !slices.Contains(addrs, a) {
				addrs = append(addrs, a)
			}
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("the mail servers of %s have no address", domain)
	}
	return addrs, nil
}

// bad reports whether an address bounced for good lately, and until when it is
// left alone.
func (l *lookups) bad(addr string) (bool, time.Time) {
	if addr == "" {
		return false, time.Time{}
	}
	v, err := l.store.Record(kindBad, addrKey(addr))
	if err != nil || len(v) == 0 {
		return false, time.Time{}
	}
	until, err := time.Parse(time.RFC3339, string(v))
	return err == nil && l.now().Before(until), until
}

func (d *Desk) bad(addr string) (bool, time.Time) { return d.lookups.bad(addr) }
