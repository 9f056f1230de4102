package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// defaultMaxEntries is what Options.MaxEntries = 0 means.
const defaultMaxEntries = 100_000

// plan is a Batch in the form in which a backend can send it: each prefix
// once, entries whose time is past turned into removals.
type plan struct {
	set   []Entry
	unset []netip.Prefix
}

// prefixes yields everything that the plan touches.
func (p plan) prefixes() []netip.Prefix {
	all := make([]netip.Prefix, 0, len(p.set)+len(p.unset))
	for _, e := range p.set {
		all = append(all, e.Prefix)
	}
	return append(all, p.unset...)
}

// planBatch checks b and puts it in order. Of several entries for one prefix
// the last counts. Nothing of a batch with an unusable prefix is planned: the
// caller has a bug, and half a batch would hide it.
func planBatch(b Batch, now time.Time) (plan, Result, error) {
	var (
		p    plan
		res  Result
		errs []error
	)
	refuse := func(pfx netip.Prefix, err error) {
		res.Failed = append(res.Failed, Failure{Prefix: pfx, Err: err})
		if len(errs) < 5 { // enough to find the bug, bounded for the log
			errs = append(errs, err)
		}
	}
	last := make(map[netip.Prefix]int, len(b.Set)) // index into b.Set
	for i, e := range b.Set {
		if err := checkPrefix(e.Prefix); err != nil {
			refuse(e.Prefix, err)
			continue
		}
		last[e.Prefix] = i
	}
	gone := make(map[netip.Prefix]bool, len(b.Unset))
	for _, pfx := range b.Unset {
		switch _, both := last[pfx]; {
		case both:
			refuse(pfx, fmt.Errorf("%v is to be set and unset at once", pfx))
		case checkPrefix(pfx) != nil:
			refuse(pfx, checkPrefix(pfx))
		case !gone[pfx]:
			gone[pfx] = true
			p.unset = append(p.unset, pfx)
		}
	}
	if errs != nil {
		return plan{}, res, errors.Join(errs...)
	}
	for i, e := range b.Set {
		switch {
		case last[e.Prefix] != i:
		case e.Until.After(now):
			p.set = append(p.set, e)
		default:
			p.unset = append(p.unset, e.Prefix)
		}
	}
	return p, res, nil
}

// checkPrefix refuses what no backend may be given. A /0 is refused here as
// the last line of defence: it would take the server off the network.
func checkPrefix(p netip.Prefix) error {
	switch {
	case !p.IsValid():
		return errors.New("an invalid prefix cannot be blocked")
	case p.Addr().Is4In6():
		return fmt.Errorf("%v is IPv4-mapped; it has to be given as IPv4", p)
	case p != p.Masked():
		return fmt.Errorf("%v has bits set behind its length", p)
	case p.Bits() == 0:
		return fmt.Errorf("%v would block every address", p)
	}
	return nil
}

// failAll is the Result of a batch of which nothing was applied.
func failAll(prefixes []netip.Prefix, err error) Result {
	failed := make([]Failure, len(prefixes))
	for i, p := range prefixes {
		failed[i] = Failure{Prefix: p, Err: err}
	}
	return Result{Failed: failed}
}

// book is what a backend was told and has not run out, to know when the
// filter is full without asking it. It is not the truth: that is in the
// filter.
type book struct {
	max   int
	until map[netip.Prefix]int64 // UnixNano: a third of the size of time.Time
}

func newBook(o Options) book {
	n := o.MaxEntries
	if n <= 0 {
		n = defaultMaxEntries
	}
	return book{max: n, until: make(map[netip.Prefix]int64)}
}

// fit takes out of p what there is no room for, which it gives as an ErrFull.
func (b *book) fit(p plan, now time.Time) (plan, Result, error) {
	room := func() int {
		n := b.max - len(b.until)
		for _, pfx := range p.unset {
			if b.has(pfx) {
				n++
			}
		}
		return n
	}
	if room() < len(p.set) {
		b.sweep(now)
	}
	return p.fit(room(), b.has, func(over int) error {
		return fmt.Errorf("%d entries would be in force, %d are allowed: %w", b.max+over, b.max, ErrFull)
	})
}

func (b *book) has(p netip.Prefix) bool { _, ok := b.until[p]; return ok }

// fitAll is fit for all that is to be in force.
func (b *book) fitAll(p plan, now time.Time) (plan, Result, error) {
	empty := book{max: b.max}
	return empty.fit(p, now)
}

// fit leaves room for so many entries that are not present yet: the widest,
// and of those the ones that last longest. The others are failed with what
// full says, given their number.
func (p plan) fit(room int, present func(netip.Prefix) bool, full func(over int) error) (plan, Result, error) {
	var fresh []Entry
	for _, e := range p.set {
		if !present(e.Prefix) {
			fresh = append(fresh, e)
		}
	}
	room = max(0, room)
	if len(fresh) <= room {
		return p, Result{}, nil
	}
	slices.SortStableFunc(fresh, byWeight)
	err := full(len(fresh) - room)
	var res Result
	out := make(map[netip.Prefix]bool)
	for _, e := range fresh[room:] {
		out[e.Prefix] = true
		res.Failed = append(res.Failed, Failure{e.Prefix, err})
	}
	p.set = slices.DeleteFunc(slices.Clone(p.set), func(e Entry) bool { return out[e.Prefix] })
	return p, res, err
}

// byWeight puts the widest entries first, and of those the ones that last
// longest.
func byWeight(a, b Entry) int {
	return cmp.Or(cmp.Compare(width(b.Prefix), width(a.Prefix)), cmp.Compare(b.Until.Unix(), a.Until.Unix()))
}

// width is how much of the net a prefix takes: an IPv6 /64 as much as an IPv4
// address.
func width(p netip.Prefix) int {
	if p.Addr().Is6() {
		return 64 - p.Bits()
	}
	return 32 - p.Bits()
}

// sweep drops what has run out.
func (b *book) sweep(now time.Time) {
	t := now.UnixNano()
	for pfx, until := range b.until {
		if until <= t {
			delete(b.until, pfx)
		}
	}
}

func (b *book) apply(p plan) {
	for _, e := range p.set {
		b.until[e.Prefix] = unixNano(e.Until)
	}
	for _, pfx := range p.unset {
		delete(b.until, pfx)
	}
}

func (b *book) replace(set []Entry) {
	b.until = make(map[netip.Prefix]int64, len(set))
	b.apply(plan{set: set})
}

// entries lists what has not run out.
func (b *book) entries(now time.Time) []Entry {
	b.sweep(now)
	es := make([]Entry, 0, len(b.until))
	for pfx, until := range b.until {
		es = append(es, Entry{Prefix: pfx, Until: time.Unix(0, until)})
	}
	return es
}

// unixNano is t.UnixNano, which is undefined beyond the year 2262, with an
// end: a block "for ever" must not come out in the past.
func unixNano(t time.Time) int64 {
	const end = 1<<63 - 1
	if t.Unix() >= end/int64(time.Second) {
		return end
	}
	return t.UnixNano()
}
