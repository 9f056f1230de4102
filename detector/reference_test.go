package detector

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// reference is what Detector must compute, said in the plainest way: it keeps
// every connection, every stretch of pressure and every verdict for ever, and
// works each score out of them anew. It has no rings, no trees, no eviction
// and no lists of who is active. It leaves out what the streams of the test
// do not contain: missing counts, time that goes wrong.
type reference struct {
	cfg      Config
	now      int64
	next     int64
	lastReal int64
	memory   int64 // the longest saturation window and a tenth
	n        int
	gen      int
	p        float64
	stretch  []stretch
	conns    []conn
	accepts  []accept
	told     map[netip.Prefix]int64 // silent until
	scars    map[netip.Prefix]int64
	stormy   map[netip.Prefix]bool
	hots     []refHot
	opens    []conn // ever
	early    []conn // closing lines without an opening one
	out      []Verdict
}

type stretch struct {
	from, to int64
	p        float64
}

type conn struct {
	addr     netip.Addr
	port     uint16
	from, to int64 // to: MaxInt64 while open
	gen      int
}

type accept struct {
	addr netip.Addr
	at   int64
}

type refHot struct {
	prefix    netip.Prefix
	rule      int
	until     int64
	threshold float64
	suspects  int
	customary float64
	before    float64
	stale     bool
}

func newReference(cfg Config, start int64) *reference {
	r := &reference{cfg: cfg, now: start, gen: 1, told: map[netip.Prefix]int64{}, scars: map[netip.Prefix]int64{}, stormy: map[netip.Prefix]bool{}}
	r.next = (start/evalStep + 1) * evalStep
	for _, rule := range cfg.Rules {
		if rule.Metric == Saturation {
			r.memory = max(r.memory, int64(rule.Window)/10*11)
		}
	}
	return r
}

func (r *reference) observe(ev *Event) []Verdict {
	r.out = nil
	r.advance(ev.Time.UnixNano())
	if ev.Kind == Tick {
		return r.out
	}
	r.lastReal = r.now
	open := func(c conn) bool {
		return c.to == math.MaxInt64 && c.addr == ev.Source && c.port == ev.Port
	}
	recently := func(c conn) bool {
		return c.addr == ev.Source && c.port == ev.Port && r.now-c.from <= 2*disorder
	}
	switch ev.Kind {
	case Opened:
		if i := slices.IndexFunc(r.conns, open); i >= 0 {
			r.conns[i].to = r.now
		}
		r.conns = append(r.conns, conn{ev.Source, ev.Port, r.now, math.MaxInt64, r.gen})
		r.n = ev.Count
		r.p = r.weight()
		r.storm(ev.Source)
		r.opens = append(r.opens, conn{addr: ev.Source, port: ev.Port, from: r.now})
		if i := slices.IndexFunc(r.early, func(c conn) bool { return recently(c) && r.now <= c.from }); i >= 0 {
			r.early = slices.Delete(r.early, i, i+1)
			r.conns[len(r.conns)-1].to = r.now
			r.n = max(0, r.n-1)
		}
	case Closed:
		if i := slices.IndexFunc(r.conns, open); i >= 0 {
			r.conns[i].to = r.now
			if r.conns[i].gen == r.gen {
				r.n = max(0, r.n-1)
			}
		} else if !slices.ContainsFunc(r.opens, recently) {
			r.early = append(r.early, conn{addr: ev.Source, port: ev.Port, from: r.now})
		}
	case Refused:
		r.n = r.cfg.Capacity
	case Accepted:
		r.accepts = append(r.accepts, accept{ev.Source, r.now})
	case DaemonStarted:
		r.n = 0
		r.gen++
	case Sampled:
		r.n = ev.Count
	}
	r.p = r.weight()
	return r.out
}

func (r *reference) weight() float64 {
	x := float64(r.n) / float64(r.cfg.Capacity)
	return min(1, max(0, (x-r.cfg.PressureFrom)/(r.cfg.SaturatedAt-r.cfg.PressureFrom)))
}

func (r *reference) advance(t int64) {
	for r.now < t {
		to := min(t, r.next)
		if r.p > 0 {
			r.stretch = append(r.stretch, stretch{r.now, to, r.p})
		}
		r.now = to
		if to == r.next {
			r.next += evalStep
			if len(r.stormy) > 0 || r.p > 0 && r.now-r.lastReal <= r.memory {
				r.evaluate()
			}
		}
	}
}

// forget removes all that p ever did.
func (r *reference) forget(p netip.Prefix) {
	for _, c := range r.conns {
		if p.Contains(c.addr) && c.to == math.MaxInt64 && c.gen == r.gen {
			r.n = max(0, r.n-1)
		}
	}
	r.conns = slices.DeleteFunc(r.conns, func(c conn) bool { return p.Contains(c.addr) })
	inside := func(q netip.Prefix) bool { return p.Bits() <= q.Bits() && p.Contains(q.Addr()) }
	for q := range r.told {
		if inside(q) {
			delete(r.told, q)
		}
	}
	for q := range r.scars {
		if inside(q) {
			delete(r.scars, q)
		}
	}
	for q := range r.stormy {
		if inside(q) {
			delete(r.stormy, q)
		}
	}
	r.hots = slices.DeleteFunc(r.hots, func(h refHot) bool { return inside(h.prefix) })
	r.p = r.weight()
}

// sub is the integral of held × p of p's members (or the number of their
// opens) from a to b, as far as it is not in the future.
func (r *reference) sub(p netip.Prefix, m Metric, a, b int64) float64 {
	var s float64
	for _, c := range r.conns {
		if !p.Contains(c.addr) {
			continue
		}
		if m == Opens {
			if c.from >= a && c.from < b {
				s++
			}
			continue
		}
		for _, g := range r.stretch {
			if from, to := max(a, c.from, g.from), min(b, c.to, g.to); from < to {
				s += g.p * seconds(to-from)
			}
		}
	}
	return s
}

func (r *reference) score(p netip.Prefix, rule int) float64 {
	ru := &r.cfg.Rules[rule]
	sub := int64(ru.Window) / 10
	k := r.now / sub
	s := r.sub(p, ru.Metric, (k-9)*sub, (k+1)*sub)
	s += r.sub(p, ru.Metric, (k-10)*sub, (k-9)*sub) * (1 - float64(r.now-k*sub)/float64(sub))
	if ru.Metric == Saturation {
		s /= float64(r.cfg.Capacity) * ru.Window.Seconds()
	}
	return s
}

func (r *reference) held(p netip.Prefix) (n int) {
	for _, c := range r.conns {
		if c.to == math.MaxInt64 && p.Contains(c.addr) {
			n++
		}
	}
	return n
}

// lengths of the prefixes of a's family, from narrow to wide, addresses first.
func (r *reference) lengths(a netip.Addr) []int {
	l := []int{a.BitLen()}
	for _, ru := range r.cfg.Rules {
		if a.Is4() {
			l = append(l, ru.Prefixes4...)
		} else {
			l = append(l, ru.Prefixes6...)
		}
	}
	slices.Sort(l)
	slices.Reverse(l)
	return slices.Compact(l)
}

func (r *reference) addrs(in netip.Prefix) []netip.Addr {
	seen := map[netip.Addr]bool{}
	for _, c := range r.conns {
		if in.Contains(c.addr) {
			seen[c.addr] = true
		}
	}
	var l []netip.Addr
	for a := range seen {
		l = append(l, a)
	}
	slices.SortFunc(l, netip.Addr.Compare)
	return l
}

func (r *reference) looksAt(rule int, p netip.Prefix) bool {
	if p.Addr().Is4() {
		return slices.Contains(r.cfg.Rules[rule].Prefixes4, p.Bits())
	}
	return slices.Contains(r.cfg.Rules[rule].Prefixes6, p.Bits())
}

func (r *reference) silent(p netip.Prefix) bool { return r.told[p] > r.now }

func (r *reference) lastAccepted(a netip.Addr) (int64, bool) {
	t, ok := int64(0), false
	for _, x := range r.accepts {
		if x.addr == a {
			t, ok = x.at, true
		}
	}
	return t, ok
}

func (r *reference) threshold(a netip.Addr, rule int) float64 {
	ru := &r.cfg.Rules[rule]
	t := ru.Threshold
	at, ok := r.lastAccepted(a)
	if !ok || ru.Metric == Saturation && int64(ru.Window) >= staleAfter && r.now-at > int64(ru.Window) {
		return t
	}
	t *= r.cfg.KnownGood.Factor
	minute := int64(time.Minute)
	rest := 1 - float64(r.now%minute)/float64(minute)
	var m, pause float64
	for _, x := range r.accepts {
		if x.addr != a {
			continue
		}
		switch age := r.now/minute - x.at/minute; {
		case age == 0:
			m, pause = m+1, pause+1
		case age == 1:
			m, pause = m+rest, pause+1
		case age < workPause:
			pause++
		case age == workPause:
			pause += rest
		}
	}
	held := float64(r.held(single(a)))
	if m >= 1 && workPause*m >= held || pause >= 1 && (held <= fewSlots || pause >= held) {
		t *= r.cfg.KnownGood.Factor
		if ru.Metric == Opens {
			t += m
		} else {
			t = max(t, workingSaturation)
		}
	}
	return raised(ru, t)
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

type refTally struct {
	bad, good, stale, told float64
	badN, staleN           int
	children               map[netip.Prefix]float64
}

// tally sorts p's members.
func (r *reference) tally(p netip.Prefix, rule int) refTally {
	t := refTally{children: map[netip.Prefix]float64{}}
	counted := map[netip.Prefix]bool{}
	for _, a := range r.addrs(p) {
		l := r.lengths(a)
		// The widest silent source that a belongs to, inside p.
		var silent, child netip.Prefix
		for _, bits := range l {
			if bits <= p.Bits() {
				break
			}
			q, _ := a.Prefix(bits)
			child = q
			if r.silent(q) {
				silent = q
			}
		}
		if silent.IsValid() {
			if !counted[silent] {
				counted[silent] = true
				t.told += r.score(silent, rule)
			}
			continue
		}
		s := r.score(single(a), rule)
		if s <= nothing {
			continue
		}
		last, good := r.lastAccepted(a)
		soon := false
		for q, ru := range r.cfg.Rules {
			soon = soon || ru.Metric == Saturation && r.cfg.Rules[rule].Metric == Saturation && ru.Window <= r.cfg.Rules[rule].Window &&
				r.looksAt(q, single(a)) && r.held(single(a)) > 0 &&
				float64(r.held(single(a)))*r.p/float64(r.cfg.Capacity) >= ru.Threshold-epsilon
		}
		switch {
		case !good && soon:
			t.told += s
		case !good:
			t.bad += s
			t.badN++
			t.children[child] += s
		default:
			t.good += s
			if r.stale(a, last, rule, s) {
				t.stale += s
				t.staleN++
				t.children[child] += s
			}
		}
	}
	return t
}

func (r *reference) stale(a netip.Addr, last int64, rule int, s float64) bool {
	ru := &r.cfg.Rules[rule]
	return ru.Metric == Saturation && ru.Window >= time.Minute && r.held(single(a)) > 0 &&
		r.now-last > int64(ru.Window) && s*float64(r.cfg.Capacity) >= 0.5
}

type refCandidate struct {
	prefix           netip.Prefix
	rule             int
	score, threshold float64
	t                refTally
	stale            bool
}

// judgePrefix is the rule for prefixes at the top of judge.go.
func (r *reference) judgePrefix(p netip.Prefix, rule int) (refCandidate, bool) {
	ru := &r.cfg.Rules[rule]
	th := ru.Threshold
	if ru.Metric == Saturation {
		for q, until := range r.scars {
			if until > r.now && q.Bits() <= p.Bits() && q.Contains(p.Addr()) {
				th = ru.Threshold / 2
			}
		}
	}
	all := r.score(p, rule)
	if all < th-epsilon {
		return refCandidate{}, false
	}
	t := r.tally(p, rule)
	crosses := func(s, th float64, n int) bool {
		if n < max(1, ru.MinSources) || s < th-epsilon {
			return false
		}
		var sizes []float64
		for _, v := range t.children {
			sizes = append(sizes, v)
		}
		slices.Sort(sizes)
		slices.Reverse(sizes)
		var part float64
		for i := 0; i < min(3, len(sizes)); i++ {
			if part += sizes[i]; part >= 0.8*s-epsilon {
				return s >= th*float64(i+1)/0.8-epsilon
			}
		}
		return true
	}
	s := all - t.told - t.good
	if crosses(s, th, t.badN) {
		return refCandidate{p, rule, s, th, t, false}, true
	}
	if t.staleN > 0 {
		s, th = s+t.stale, raised(ru, th*r.cfg.KnownGood.Factor)
		return refCandidate{p, rule, s, th, t, true}, crosses(s, th, t.badN+t.staleN)
	}
	return refCandidate{}, false
}

func (r *reference) storm(a netip.Addr) {
	p := single(a)
	if !r.silent(p) {
		for i, ru := range r.cfg.Rules {
			if ru.Metric != Opens || !r.looksAt(i, p) {
				continue
			}
			if s, t := r.score(p, i), r.threshold(a, i); s >= t-epsilon {
				r.pronounce(refCandidate{prefix: p, rule: i, score: s, threshold: t})
				break
			}
		}
	}
	for _, bits := range r.lengths(a)[1:] {
		q, _ := a.Prefix(bits)
		for i, ru := range r.cfg.Rules {
			if ru.Metric == Opens && r.looksAt(i, q) && !r.silent(q) && r.score(q, i) >= ru.Threshold-epsilon {
				r.stormy[q] = true
			}
		}
	}
}

func (r *reference) evaluate() {
	type levelOf struct {
		bits   int
		single bool
	}
	byLevel := map[levelOf][]netip.Prefix{}
	var order []levelOf
	seen := map[netip.Prefix]bool{}
	for _, a := range r.addrs(netip.PrefixFrom(netip.IPv4Unspecified(), 0)) {
		for _, bits := range r.lengths(a) {
			q, _ := a.Prefix(bits)
			if l := (levelOf{bits + 96, q.IsSingleIP()}); !seen[q] {
				seen[q] = true
				byLevel[l] = append(byLevel[l], q)
			}
		}
	}
	for _, a := range r.addrs(netip.PrefixFrom(netip.IPv6Unspecified(), 0)) {
		for _, bits := range r.lengths(a) {
			q, _ := a.Prefix(bits)
			if l := (levelOf{bits, q.IsSingleIP()}); !seen[q] {
				seen[q] = true
				byLevel[l] = append(byLevel[l], q)
			}
		}
	}
	for l := range byLevel {
		order = append(order, l)
	}
	slices.SortFunc(order, func(a, b levelOf) int { return cmp.Compare(b.bits, a.bits) })
	for _, l := range order {
		var cands []refCandidate
		for _, p := range byLevel[l] {
			if r.silent(p) {
				continue
			}
			for _, m := range []Metric{Saturation, Opens} {
				if m == Saturation && (r.p == 0 || r.held(p) == 0) || m == Opens && !r.stormy[p] {
					continue
				}
				for i, ru := range r.cfg.Rules {
					step := max(evalStep, int64(ru.Window)/50/evalStep*evalStep)
					if ru.Metric != m || !r.looksAt(i, p) || m == Saturation && r.now%step != 0 {
						continue
					}
					if p.IsSingleIP() {
						if s, t := r.score(p, i), r.threshold(p.Addr(), i); s >= t-epsilon {
							cands = append(cands, refCandidate{prefix: p, rule: i, score: s, threshold: t})
							break
						}
					} else if c, ok := r.judgePrefix(p, i); ok {
						cands = append(cands, c)
						break
					}
				}
			}
		}
		if l.single {
			inOrder := slices.Clone(cands)
			slices.SortStableFunc(inOrder, func(a, b refCandidate) int { return a.rule - b.rule })
			for _, c := range inOrder {
				for _, p := range byLevel[l] {
					if r.cfg.Rules[c.rule].Metric != Saturation || r.silent(p) || r.held(p) == 0 || !r.looksAt(c.rule, p) ||
						slices.ContainsFunc(cands, func(x refCandidate) bool { return x.prefix == p }) {
						continue
					}
					s, t := r.score(p, c.rule), r.threshold(p.Addr(), c.rule)
					if float64(r.held(p)) >= t*float64(r.cfg.Capacity)-epsilon && s >= t/2-epsilon {
						cands = append(cands, refCandidate{prefix: p, rule: c.rule, score: s, threshold: t / 2})
					}
				}
			}
		}
		slices.SortStableFunc(cands, func(a, b refCandidate) int { return cmp.Compare(b.score, a.score) })
		for _, c := range cands {
			if !r.silent(c.prefix) {
				r.pronounce(c)
			}
		}
	}
	clear(r.stormy)
	r.hots = slices.DeleteFunc(r.hots, func(h refHot) bool { return h.until+int64(r.cfg.Rules[h.rule].Window) <= r.now })
	for i := range r.hots {
		h := &r.hots[i]
		if h.until > r.now && (r.cfg.Rules[h.rule].Metric == Opens || r.p > 0) {
			h.customary = max(h.customary, r.customary(h))
			r.members(h.prefix, *h)
		}
	}
}

func (r *reference) goodIn(p netip.Prefix) bool {
	return slices.ContainsFunc(r.accepts, func(x accept) bool { return p.Contains(x.addr) })
}

func (r *reference) pronounce(c refCandidate) {
	ru := &r.cfg.Rules[c.rule]
	r.told[c.prefix] = r.now + int64(ru.Window)
	v := Verdict{Time: time.Unix(0, r.now).UTC(), Source: c.prefix, Rule: ru.Name, Score: c.score, Threshold: c.threshold, Held: r.held(c.prefix), Sources: 1}
	if c.prefix.IsSingleIP() {
		r.out = append(r.out, v)
		return
	}
	v.Sources = c.t.badN
	sum, n := c.t.bad, c.t.badN
	if c.stale {
		v.Sources += c.t.staleN
		sum, n = sum+c.t.stale, n+c.t.staleN
	}
	if !r.goodIn(c.prefix) {
		for _, bits := range r.lengths(c.prefix.Addr()) {
			if bits < c.prefix.Bits() {
				q, _ := c.prefix.Addr().Prefix(bits)
				r.scars[q] = r.now + scarFor
			}
		}
		r.out = append(r.out, v)
		return
	}
	v.KnownGood = 1
	r.out = append(r.out, v)
	h := refHot{prefix: c.prefix, rule: c.rule, until: r.told[c.prefix], threshold: sum / float64(max(1, n)) / 2, suspects: n, stale: c.stale}
	for _, o := range r.hots {
		h.before = max(h.before, o.customary)
	}
	r.hots = slices.DeleteFunc(r.hots, func(o refHot) bool { return o.prefix == h.prefix })
	h.customary = r.customary(&h)
	r.members(h.prefix, h)
	r.hots = append(r.hots, h)
}

// customary is what others keep who are known good, see members.go.
func (r *reference) customary(h *refHot) float64 {
	ru := &r.cfg.Rules[h.rule]
	if ru.Metric == Opens {
		return 0
	}
	var kept []float64
	voices, networks := 0, map[netip.Prefix]bool{}
	seen := map[netip.Addr]bool{}
	for _, x := range r.accepts {
		a := x.addr
		if seen[a] || h.prefix.Contains(a) {
			continue
		}
		seen[a] = true
		last, _ := r.lastAccepted(a)
		held := r.held(single(a))
		if r.now-last <= served {
			kept = append(kept, 0)
			continue
		}
		k := min(r.score(single(a), h.rule), float64(held)*seconds(r.now-last)/float64(r.cfg.Capacity)/ru.Window.Seconds())
		if held > 0 && k >= h.threshold-epsilon && !r.silent(single(a)) {
			kept = append(kept, k)
			voices++
			widest, _ := a.Prefix(slices.Min(r.lengths(a)))
			networks[widest] = true
		}
	}
	if voices < customVoices || voices*suspectsEach < h.suspects || len(networks) < 2 {
		return 0
	}
	slices.Sort(kept)
	return kept[(len(kept)-1)/2]
}

func (r *reference) opened(p netip.Prefix) (n int) {
	for _, c := range r.conns {
		if p.Contains(c.addr) {
			n++
		}
	}
	return n
}

func (r *reference) members(p netip.Prefix, h refHot) {
	ru := &r.cfg.Rules[h.rule]
	done := map[netip.Prefix]bool{}
	for _, a := range r.addrs(p) {
		var child netip.Prefix // of p, directly below it
		for _, bits := range r.lengths(a) {
			if bits > p.Bits() {
				child, _ = a.Prefix(bits)
			}
		}
		if done[child] || r.silent(child) || ru.Metric == Saturation && r.held(child) == 0 {
			continue
		}
		done[child] = true
		s, sources := r.score(child, h.rule), 1
		if s < h.threshold-epsilon || s <= nothing {
			continue
		}
		if child.IsSingleIP() {
			if last, good := r.lastAccepted(a); good && !(h.stale && max(h.customary, h.before)*float64(r.cfg.Capacity) < staleShare && r.stale(a, last, h.rule, s)) {
				continue
			}
		} else {
			t := r.tally(child, h.rule)
			sources = t.badN
			s -= t.told
		}
		each := customFactor * max(h.customary, h.before)
		if ru.Metric == Saturation && child.IsSingleIP() && r.held(child) == 1 && r.opened(child) == 1 {
			each = max(each, lonelyShare/float64(r.cfg.Capacity))
		}
		th := max(h.threshold, each*float64(sources))
		if !child.IsSingleIP() && (sources < 2 || s < th-epsilon || r.goodIn(child)) {
			r.members(child, h)
			continue
		}
		if s < th-epsilon {
			continue
		}
		r.told[child] = r.now + int64(ru.Window)
		r.out = append(r.out, Verdict{Time: time.Unix(0, r.now).UTC(), Source: child, Rule: ru.Name, Score: s, Threshold: th, Held: r.held(child), Sources: sources})
	}
}

// line is what two detectors must agree on, but for the score.
func line(v *Verdict) string {
	return fmt.Sprintf("%s %s %s held=%d sources=%d spared=%t", v.Time.Format("15:04:05.000"), v.Source, v.Rule, v.Held, v.Sources, v.KnownGood > 0)
}

func lines(vs []Verdict) string {
	var b strings.Builder
	for i := range vs {
		fmt.Fprintf(&b, "\t%s score=%v\n", line(&vs[i]), vs[i].Score)
	}
	return b.String()
}

func byLine(vs []Verdict) {
	slices.SortFunc(vs, func(a, b Verdict) int { return strings.Compare(line(&a), line(&b)) })
}

// rename is its own inverse, and keeps prefixes together.
func rename(a netip.Addr) netip.Addr {
	if !a.IsValid() {
		return a
	}
	b := a.AsSlice()
	for i := range b {
		b[i] ^= byte(0x35 + 0x11*i)
	}
	a, _ = netip.AddrFromSlice(b)
	return a
}

// Sources of the random streams: few enough to meet again.
var population = func() (l []netip.Addr) {
	for _, s := range strings.Fields(`192.0.2.1 192.0.2.2 192.0.2.3 192.0.2.4 192.0.2.5 198.51.100.1 198.51.100.2
		2001:db8:0:1::1 2001:db8:0:1::2 2001:db8:0:1::3 2001:db8:0:2::1 2001:db8:0:3::1 2001:db8:0:101::1 2001:db8:0:102::1 2001:db8:1::1`) {
		l = append(l, netip.MustParseAddr(s))
	}
	return l
}()

var randomRules = []Rule{
	{Name: "hog", Metric: Saturation, Window: 3 * time.Second, Threshold: 0.231, Prefixes4: []int{32}, Prefixes6: []int{128}},
	{Name: "patient", Metric: Saturation, Window: 60 * time.Second, Threshold: 0.117, Prefixes4: []int{32}, Prefixes6: []int{128}},
	{Name: "net", Metric: Saturation, Window: 4 * time.Second, Threshold: 0.273, Prefixes4: []int{24}, Prefixes6: []int{64, 56, 48}, MinSources: 2},
	{Name: "patient-net", Metric: Saturation, Window: 60 * time.Second, Threshold: 0.071, Prefixes4: []int{24}, Prefixes6: []int{64, 56, 48}, MinSources: 3},
	{Name: "storm", Metric: Opens, Window: 5 * time.Second, Threshold: 7.3, Prefixes4: []int{32}, Prefixes6: []int{128}},
	{Name: "storm-net", Metric: Opens, Window: 10 * time.Second, Threshold: 11.7, Prefixes4: []int{24}, Prefixes6: []int{64, 48}, MinSources: 2},
}

func TestAgainstReference(t *testing.T) {
	verdicts, spared, prefixes := 0, 0, 0
	rapid.Check(t, func(t *rapid.T) {
		cfg, err := Config{Capacity: 20, Rules: randomRules}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		d, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		now := time.Date(2026, 11, 22, 19, 43, 0, rapid.IntRange(0, 999).Draw(t, "ms")*1e6, time.UTC)
		// The same stream with all addresses renamed, so that those of one
		// prefix stay together: the same verdicts, in the same order.
		renamed, err := New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ref := newReference(cfg, now.UnixNano())
		enforce := rapid.Bool().Draw(t, "enforce")
		var open [][2]int // address, port
		for range rapid.IntRange(20, 150).Draw(t, "events") {
			gap := rapid.SampledFrom([]int{0, 0, 1, 40, 100, 500, 1000, 2500, 30_000}).Draw(t, "gap")
			if gap > 1000 && rapid.IntRange(0, 9).Draw(t, "rarely") > 0 {
				gap = 7
			}
			now = now.Add(time.Duration(gap) * time.Millisecond)
			ev := Event{Time: now}
			a := rapid.IntRange(0, len(population)-1).Draw(t, "address")
			ev.Source = population[a]
			switch x := rapid.IntRange(0, 99).Draw(t, "kind"); {
			case x < 60:
				ev.Kind = Opened
				port := rapid.IntRange(1, 12).Draw(t, "port")
				ev.Port = uint16(port)
				// Never fewer than are open, and never 1: what happens then
				// is for other tests.
				ev.Count = ref.held(netip.PrefixFrom(netip.IPv4Unspecified(), 0)) + ref.held(netip.PrefixFrom(netip.IPv6Unspecified(), 0)) +
					rapid.IntRange(2, 18).Draw(t, "others")
				open = append(open, [2]int{a, port})
			case x < 80:
				ev.Kind = Closed
				if len(open) > 0 {
					i := rapid.IntRange(0, len(open)-1).Draw(t, "which")
					ev.Source, ev.Port = population[open[i][0]], uint16(open[i][1])
					open = slices.Delete(open, i, i+1)
				} else {
					ev.Port = 9
				}
			case x < 84:
				ev.Kind, ev.Reason = Refused, RefusedFull
			case x < 88:
				ev.Kind = Accepted
			case x < 89:
				ev.Kind, ev.Source = DaemonStarted, netip.Addr{}
			case x < 93:
				ev.Kind, ev.Source, ev.Count = Sampled, netip.Addr{}, rapid.IntRange(0, 25).Draw(t, "sample")
			case x < 95:
				bits := rapid.SampledFrom(ref.lengths(ev.Source)).Draw(t, "bits")
				p, _ := ev.Source.Prefix(bits)
				d.Forget(p)
				renamed.Forget(netip.PrefixFrom(rename(p.Addr()), bits))
				ref.forget(p)
				continue
			default:
				ev.Kind, ev.Source = Tick, netip.Addr{}
			}
			got, want := slices.Clone(d.Observe(&ev)), ref.observe(&ev)
			other := ev
			other.Source = rename(ev.Source)
			again := slices.Clone(renamed.Observe(&other))
			for i := range again {
				again[i].Source = netip.PrefixFrom(rename(again[i].Source.Addr()), again[i].Source.Bits()).Masked()
			}
			if lines(got) != lines(again) {
				t.Fatalf("%s: got\n%s\nwith other names\n%s", now.Format("15:04:05.000"), lines(got), lines(again))
			}
			byLine(got)
			byLine(want)
			for i := range max(len(got), len(want)) {
				switch {
				case i >= len(got):
					t.Fatalf("%s: missing: %s score %v", now.Format("15:04:05.000"), line(&want[i]), want[i].Score)
				case i >= len(want):
					t.Fatalf("%s: too much: %s score %v", now.Format("15:04:05.000"), line(&got[i]), got[i].Score)
				case line(&got[i]) != line(&want[i]):
					t.Fatalf("%s: got\n%s\nwant\n%s", now.Format("15:04:05.000"), lines(got), lines(want))
				case math.Abs(got[i].Score-want[i].Score) > 1e-9 || math.Abs(got[i].Threshold-want[i].Threshold) > 1e-9:
					t.Fatalf("%s: score %v of %v, want %v of %v", line(&got[i]), got[i].Score, got[i].Threshold, want[i].Score, want[i].Threshold)
				}
			}
			for i := range got {
				verdicts++
				if got[i].KnownGood > 0 {
					spared++
				} else if !got[i].Source.IsSingleIP() {
					prefixes++
				}
				if enforce && got[i].KnownGood == 0 {
					d.Forget(got[i].Source)
					renamed.Forget(netip.PrefixFrom(rename(got[i].Source.Addr()), got[i].Source.Bits()))
					ref.forget(got[i].Source)
				}
			}
			if d.p != ref.p {
				t.Fatalf("%s: pressure counts %v, want %v (%d taken, want %d)", now.Format("15:04:05.000"), d.p, ref.p, d.Count(), ref.n)
			}
			if h := ref.held(netip.PrefixFrom(netip.IPv4Unspecified(), 0)) + ref.held(netip.PrefixFrom(netip.IPv6Unspecified(), 0)); d.Held() != h {
				t.Fatalf("%d held, want %d", d.Held(), h)
			}
		}
		d.check(t)
		for _, a := range population {
			for _, bits := range ref.lengths(a) {
				p, _ := a.Prefix(bits)
				k, _ := keyOfPrefix(p)
				for i := range cfg.Rules {
					got := 0.0
					if n := d.find(k); n != 0 && (cfg.Rules[i].Metric == Saturation || d.levels[d.nodes.at(n).level].opens) {
						got = d.score(n, i)
					} else if n != 0 {
						continue // opens are counted where a rule looks at them only
					}
					if want := ref.score(p, i); math.Abs(got-want) > 1e-9 {
						t.Fatalf("%s %s: score %v, want %v", p, cfg.Rules[i].Name, got, want)
					}
				}
			}
		}
	})
	if verdicts < 50 || spared == 0 || prefixes == 0 {
		t.Errorf("the streams gave %d verdicts, %d on prefixes, %d spared: they prove little", verdicts, prefixes, spared)
	}
	t.Logf("%d verdicts, %d on prefixes, %d spared", verdicts, prefixes, spared)
}
