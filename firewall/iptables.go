package firewall

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// xt holds its entries in two sets of the kernel's ip_set, one per family, and
// a chain of our own in iptables and ip6tables that drops what matches them;
// without ip_set in the chain alone.
type xt struct {
	o    Options
	book book

	// commands are what iptables and ip6tables are called, for tests.
	commands [2]string
	noSets   bool // do without ip_set even where the kernel has it

	families []*xtFamily        // nil: not probed
	layout   *xtLayout          // nil: not probed
	no6      *notInstalledError // why IPv6 cannot be blocked, though the kernel has it; nil: it can
	set      ipset
	revision byte
	why      string // how it works, for people
	warnings []string
	few      string // why there is room for few blocks only; empty: there is for many
}

// xtFamily is one of iptables and ip6tables.
type xtFamily struct {
	*xtables
	// chain is the content of our chain as it was read after we built it; nil:
	// not built by us.
	chain []string
}

// NewIPTables returns the backend that works through the iptables commands
// and, where the kernel has ip_set, sets of type hash:net with a timeout for
// each entry: smtpguard4 and smtpguard6. Nothing is opened or changed until
// the first call. The error is about o.
//
// Without ip_set each entry is a rule: at most 500 of them, and the filter
// ends none by itself (Capabilities.Timeouts is false).
//
// Whatever variant (nft or legacy) iptables on PATH is, is used, from version
// 1.6.2 on; Close with remove also clears what an earlier run left in the
// other.
//
// Capabilities.Atomic is false, as a change is several messages. But Replace
// swaps each family's entries at once and leaves no gap, and so it does with
// rules.
func NewIPTables(o Options) (Firewall, error) { return newXt(o, "iptables", "ip6tables", false) }

func newXt(o Options, ip4, ip6 string, noSets bool) (*xt, error) {
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	b := newBook(o)
	if _, err := newXtLayout(o, b.max, true); err != nil {
		return nil, err
	}
	return &xt{
		o: o, book: b, commands: [2]string{ip4, ip6}, noSets: noSets,
		set: ipset{netNS: o.NetNS, timeout: o.Timeout},
	}, nil
}

func (x *xt) Name() string { return IPTables }

// reason is how it works here, for Open.
func (x *xt) reason() string {
	why := x.why
	for _, w := range x.warnings {
		why += "; warning: " + w
	}
	return why
}

// Warnings has the limit of a backend without sets too, which whoever reads the
// log's first lines only would not know of.
func (x *xt) Warnings() []string {
	if x.few == "" {
		return x.warnings
	}
	return append(slices.Clone(x.warnings), x.few)
}

// Probe lets the commands check our rules, against sets that are made for it
// and taken away again. (The legacy commands make their table, if it is not
// there, by looking at it; that is all that may stay.)
func (x *xt) Probe(ctx context.Context) (Capabilities, error) {
	fail := func(doing string, err error) (Capabilities, error) {
		hint := ""
		if errors.Is(err, unix.EPERM) {
			hint = "; run smtpguard as root or give it CAP_NET_ADMIN and CAP_NET_RAW"
		}
		if !errors.Is(err, ErrUnavailable) {
			err = fmt.Errorf("%w: %w", ErrUnavailable, err)
		}
		return Capabilities{}, fmt.Errorf("%s: %w%s", doing, err, hint)
	}
	if !mayUseXtables() {
		return fail("looking for iptables", unix.EPERM)
	}
	var families []*xtFamily
	x.no6 = nil
	for _, v6 := range []bool{false, true} {
		if v6 && !kernelHasIPv6() {
			continue
		}
		t, err := findXtables(ctx, x.commands[familyIndex(v6)], v6, x.o.NetNS, x.o.Timeout)
		if v6 && errors.As(err, &x.no6) {
			continue // IPv4 is blocked all the same
		}
		if err != nil {
			return fail("looking for iptables", err)
		}
		families = append(families, &xtFamily{xtables: t})
	}
	sets, noSets := !x.noSets, error(nil)
	var revision byte
	if sets {
		if revision, noSets = x.probeSets(ctx, families); noSets != nil {
			if errors.Is(noSets, unix.EPERM) || ctx.Err() != nil {
				return fail("asking the kernel for ipset", noSets)
			}
			sets = false
		}
	}
	layout, err := newXtLayout(x.o, x.book.max, sets)
	if err != nil {
		return Capabilities{}, err
	}
	caps := Capabilities{
		IPv6: x.no6 == nil && (sets || len(families) == 2), Prefixes: true, Timeouts: sets, Readback: true, Expiry: true, Counters: true, Real: true,
		MaxTimeout: ipsetMaxTimeout * time.Second,
	}
	x.why, x.few = families[0].String()+" with ipset", ""
	if !sets {
		caps.MaxTimeout, caps.MaxEntries = 0, xtRulesMax/len(layout.portMatches())
		x.book.max = min(x.book.max, caps.MaxEntries)
		x.why = fmt.Sprintf("%s without ipset: each block is a rule, %d at most, and stays when smtpguard is dead", families[0], x.book.max)
		x.few = fmt.Sprintf("without ipset each block is a rule that every packet to our ports is compared with: %d blocks at most, the widest and longest; backend: nftables, or the kernel module ip_set, lift that", x.book.max)
		if noSets != nil {
			x.why += " (" + noSets.Error() + ")"
		}
		for _, f := range families {
			// With no set to match the rules can be checked as they are.
			example := map[netip.Prefix]xtEntry{netip.PrefixFrom(netip.IPv4Unspecified(), 32): {until: 1}}
			if f.v6 {
				example = map[netip.Prefix]xtEntry{netip.PrefixFrom(netip.IPv6Unspecified(), 128): {until: 1}}
			}
			if err := f.restore(ctx, layout.table, layout.script(nil, layout.entryRules(f.v6, example)), true); err != nil {
				return fail("checking our rules", err)
			}
		}
	}
	x.warnings = nil
	if x.no6 != nil {
		x.warnings = append(x.warnings, fmt.Sprintf("%v: sources of IPv6 are not blocked; install it (on Debian and Red Hat it comes with iptables), then restart smtpguard", x.no6))
	}
	for _, f := range families {
		if o := f.other(ctx); o != nil {
			if n := o.rules(ctx); n != 0 {
				count := fmt.Sprint(n)
				if n < 0 {
					count = "some"
				}
				x.warnings = append(x.warnings, fmt.Sprintf("%s holds %s rules too, which iptables here does not show; what both hold is in force, and whoever flushes one leaves the other", o, count))
			}
		}
	}
	x.families, x.layout, x.revision = families, layout, revision
	return caps, nil
}

// probeSets tries sets of our kind and a rule that matches them.
func (x *xt) probeSets(ctx context.Context, families []*xtFamily) (revision byte, err error) {
	defer func() {
		for _, v6 := range []bool{false, true} {
			err = errors.Join(err, ipsetError("removing a set of the probe", x.set.destroy(context.WithoutCancel(ctx), probeSetName(v6))))
		}
		if err != nil {
			err = fmt.Errorf("ipset cannot be used: %w", err)
		}
	}()
	for _, v6 := range []bool{false, true} {
		r, err := x.set.revision(ctx, v6)
		if err == nil {
			revision = max(revision, r)
			err = x.set.destroy(ctx, probeSetName(v6)) // of a probe that was killed
		}
		if err == nil {
			err = x.set.create(ctx, probeSetName(v6), v6, true, r, 64, 64)
		}
		if err != nil {
			return 0, ipsetError("making a set", err)
		}
	}
	layout, err := newXtLayout(x.o, x.book.max, true)
	if err != nil {
		return 0, err
	}
	for _, f := range families {
		var rules []xtRule
		for _, r := range layout.setRules(f.v6) {
			for _, name := range []string{setName(f.v6), allowSetName(f.v6)} {
				r.spec = strings.Replace(r.spec, " "+name+" ", " "+probeSetName(f.v6)+" ", 1)
			}
			rules = append(rules, r)
		}
		if err := f.restore(ctx, layout.table, layout.script(nil, rules), true); err != nil {
			return 0, err
		}
	}
	return revision, nil
}

func probeSetName(v6 bool) string { return "smtpguard-probe" + familyDigit(v6) }

// probed makes sure that Probe was called.
func (x *xt) probed(ctx context.Context) error {
	if x.layout != nil {
		return ctx.Err()
	}
	_, err := x.Probe(ctx)
	return err
}

// Ensure reads two chains of each family (some milliseconds each) and what
// the sets are, not their entries. A set that holds fewer entries than it
// should is taken for emptied.
func (x *xt) Ensure(ctx context.Context) (bool, error) {
	if err := x.probed(ctx); err != nil {
		return false, err
	}
	ok, err := x.intact(ctx)
	if err != nil || ok {
		return false, err
	}
	entries := x.book.entries(time.Now())
	if len(entries) == 0 {
		entries = x.adopt(ctx)
	}
	return true, x.rebuild(ctx, entries)
}

// Intact reads what Ensure reads, but for how many entries the sets hold.
func (x *xt) Intact(ctx context.Context) (bool, error) {
	if err := x.probed(ctx); err != nil {
		return false, err
	}
	for _, f := range x.families {
		parent, chain, err := x.chains(ctx, f)
		if err != nil {
			return false, xtError("reading the rules of "+f.String(), err)
		}
		if !x.layout.made(parent, chain) {
			return false, nil
		}
		if !x.layout.sets {
			continue
		}
		h, err := x.set.header(ctx, setName(f.v6))
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return false, ipsetError("asking for set "+setName(f.v6), err)
		}
		if err != nil || !h.sameKind(f.v6) || !h.timeouts {
			return false, nil
		}
	}
	return true, nil
}

// intact tells whether rules and sets are ours and untouched.
func (x *xt) intact(ctx context.Context) (bool, error) {
	for _, f := range x.families {
		parent, chain, err := x.chains(ctx, f)
		if err != nil {
			return false, xtError("reading the rules of "+f.String(), err)
		}
		if !x.layout.intact(f.v6, parent, chain) || f.chain != nil && !slices.Equal(chain, f.chain) {
			return false, nil
		}
		if f.chain == nil {
			f.chain = chain
		}
	}
	if !x.layout.sets {
		return true, nil
	}
	var want [2]int
	for try := range 2 { // what ran out is taken off the book only if it has to be
		want = [2]int{}
		for p := range x.book.until {
			want[familyIndex(p.Addr().Is6())]++
		}
		enough := true
		for _, v6 := range []bool{false, true} {
			h, err := x.set.header(ctx, setName(v6))
			if errors.Is(err, unix.ENOENT) {
				return false, nil
			}
			if err != nil {
				return false, ipsetError("asking for set "+setName(v6), err)
			}
			if !h.sameKind(v6) || !h.timeouts || h.max != x.layout.maxElem {
				return false, nil
			}
			enough = enough && (h.count < 0 || h.count >= want[familyIndex(v6)])
		}
		if enough {
			break
		}
		if try == 1 {
			return false, nil
		}
		// A second's grace: the kernel's clock is not ours.
		x.book.sweep(time.Now().Add(time.Second))
	}
	for _, v6 := range []bool{false, true} {
		allow := x.layout.allow[familyIndex(v6)]
		if len(allow) == 0 {
			continue
		}
		h, err := x.set.header(ctx, allowSetName(v6))
		if errors.Is(err, unix.ENOENT) {
			return false, nil
		}
		if err != nil {
			return false, ipsetError("asking for set "+allowSetName(v6), err)
		}
		if !h.sameKind(v6) || h.count >= 0 && h.count != len(allow) {
			return false, nil
		}
	}
	return true, nil
}

// chains reads the chain that is jumped from and ours.
func (x *xt) chains(ctx context.Context, f *xtFamily) (parent, chain []string, err error) {
	if ok, err := f.has(ctx, x.layout.table); !ok || err != nil {
		return nil, nil, err
	}
	parent, err = f.list(ctx, x.layout.table, x.layout.hook, false)
	if err == nil {
		chain, err = f.list(ctx, x.layout.table, xtChain, false)
	}
	return parent, chain, err
}

func (x *xt) Apply(ctx context.Context, b Batch) (Result, error) {
	now := time.Now()
	p, res, err := planBatch(b, now)
	if err != nil {
		return res, err
	}
	if err := x.probed(ctx); err != nil {
		return failAll(p.prefixes(), err), err
	}
	p, failed := x.without6(p)
	res, err = x.apply(ctx, p, now)
	return also(res, err, failed)
}

func (x *xt) apply(ctx context.Context, p plan, now time.Time) (Result, error) {
	if !x.layout.sets {
		return x.applyRules(ctx, p, now)
	}
	x.clamp(p.set, now)
	p, res, full := x.book.fit(p, now)
	var set [2][]Entry
	var unset [2][]netip.Prefix
	for _, e := range p.set {
		i := familyIndex(e.Prefix.Addr().Is6())
		set[i] = append(set[i], e)
	}
	for _, pfx := range p.unset {
		i := familyIndex(pfx.Addr().Is6())
		unset[i] = append(unset[i], pfx)
	}
	for i, v6 := range []bool{false, true} {
		name := setName(v6)
		refused := make(map[netip.Prefix]bool)
		doing := fmt.Sprintf("setting %d and removing %d entries in set %s", len(set[i]), len(unset[i]), name)
		// First what goes on in place of what goes: the set has room for both.
		var rest plan
		err := x.set.add(ctx, name, set[i], now, func(pfx netip.Prefix, err error) {
			refused[pfx] = true
			res.Failed = append(res.Failed, Failure{pfx, ipsetError(fmt.Sprintf("adding %v to set %s", pfx, name), err)})
		})
		if err == nil || len(refused) > 0 && ipsetRefused(err) {
			err = nil
			x.book.apply(plan{set: slices.DeleteFunc(set[i], func(e Entry) bool { return refused[e.Prefix] })})
		} else {
			rest.set = set[i]
		}
		// Also after an error: what must go goes all the same.
		if removeErr := x.set.remove(ctx, name, unset[i]); removeErr == nil {
			x.book.apply(plan{unset: unset[i]})
		} else {
			rest.unset = unset[i]
			err = errors.Join(err, removeErr)
		}
		if err != nil {
			err = ipsetError(doing, err)
			if i == 0 {
				rest.set, rest.unset = append(rest.set, set[1]...), append(rest.unset, unset[1]...)
			}
			res.Failed = append(res.Failed, failAll(rest.prefixes(), err).Failed...)
			return res, err
		}
	}
	if full == nil && len(res.Failed) > 0 {
		full = res.Failed[0].Err
	}
	return res, full
}

// without6 leaves out what only ip6tables could block, where it is missing.
func (x *xt) without6(p plan) (plan, []Failure) {
	if x.no6 == nil {
		return p, nil
	}
	var failed []Failure
	p.set = slices.DeleteFunc(p.set, func(e Entry) bool {
		if e.Prefix.Addr().Is4() {
			return false
		}
		failed = append(failed, Failure{e.Prefix, x.no6})
		return true
	})
	return p, failed
}

// also adds what failed before to the outcome of the rest.
func also(res Result, err error, failed []Failure) (Result, error) {
	if len(failed) > 0 {
		res.Failed = append(res.Failed, failed...)
		err = cmpErr(err, failed[0].Err)
	}
	return res, err
}

// clamp shortens what is longer than the kernel takes.
func (x *xt) clamp(entries []Entry, now time.Time) {
	end := now.Add(ipsetMaxTimeout * time.Second)
	for i := range entries {
		if entries[i].Until.After(end) {
			entries[i].Until = end
		}
	}
}

func (x *xt) Replace(ctx context.Context, entries []Entry) error {
	now := time.Now()
	p, _, err := planBatch(Batch{Set: entries}, now)
	if err != nil {
		return err
	}
	if err := x.probed(ctx); err != nil {
		return err
	}
	p, failed := x.without6(p)
	p, res, full := x.book.fitAll(p, now)
	err = x.rebuild(ctx, p.set)
	return cmpErr(err, partial(also(res, full, failed)))
}

// rebuild makes the filter hold exactly these entries, in rules of our layout.
// The entries of a family are replaced at once, and so are its rules if they
// have to be made anew; in between there is no moment without a block.
func (x *xt) rebuild(ctx context.Context, entries []Entry) error {
	if !x.layout.sets {
		return x.rebuildRules(ctx, entries)
	}
	now := time.Now()
	x.clamp(entries, now)
	for _, v6 := range []bool{false, true} {
		mine := slices.DeleteFunc(slices.Clone(entries), func(e Entry) bool { return e.Prefix.Addr().Is6() != v6 })
		if err := x.refillSet(ctx, setName(v6), v6, true, mine, now); err != nil {
			return err
		}
		if allow := x.layout.allow[familyIndex(v6)]; len(allow) > 0 {
			es := make([]Entry, len(allow))
			for i, p := range allow {
				es[i].Prefix = p
			}
			if err := x.refillSet(ctx, allowSetName(v6), v6, false, es, now); err != nil {
				return err
			}
		}
	}
	for _, f := range x.families {
		if err := x.rebuildChain(ctx, f, x.layout.setRules(f.v6)); err != nil {
			return err
		}
	}
	for _, v6 := range []bool{false, true} {
		if len(x.layout.allow[familyIndex(v6)]) == 0 {
			if err := x.set.destroy(ctx, allowSetName(v6)); err != nil && !errors.Is(err, ipsetErrBusy) {
				return ipsetError("removing set "+allowSetName(v6), err)
			}
		}
	}
	x.book.replace(entries)
	return nil
}

// refillSet makes the set hold exactly these entries, at once.
func (x *xt) refillSet(ctx context.Context, name string, v6, timeouts bool, entries []Entry, now time.Time) error {
	doing := fmt.Sprintf("filling set %s with %d entries", name, len(entries))
	maxElem := x.layout.maxElem
	if !timeouts {
		maxElem = max(maxElem, uint32(len(entries)))
	}
	h, err := x.set.header(ctx, name)
	switch {
	case errors.Is(err, unix.ENOENT):
		err = x.set.create(ctx, name, v6, timeouts, x.revision, hashSize(0), maxElem)
	case err == nil && !h.sameKind(v6):
		// Not one that we made. It goes, and so do rules of ours that use it.
		if err = x.removeRules(ctx); err == nil {
			if err = x.set.destroy(ctx, name); err == nil {
				err = x.set.create(ctx, name, v6, timeouts, x.revision, hashSize(0), maxElem)
			}
		}
	}
	if err == nil {
		err = x.set.destroy(ctx, name+xtNew) // of a start that did not get to its end
	}
	if err == nil {
		err = x.set.create(ctx, name+xtNew, v6, timeouts, x.revision, hashSize(len(entries)), maxElem)
	}
	if err != nil {
		return ipsetError(doing, err)
	}
	if timeouts && len(entries) > 0 {
		// What stays goes on counting where it was.
		if old, err := x.set.list(ctx, name); err == nil {
			x.set.counts = make(map[netip.Prefix]Installed, len(old))
			for _, in := range old {
				x.set.counts[in.Prefix] = in
			}
		}
	}
	err = x.set.add(ctx, name+xtNew, entries, now, func(netip.Prefix, error) {})
	x.set.counts = nil
	if err == nil {
		err = x.set.swap(ctx, name+xtNew, name)
	}
	return ipsetError(doing, errors.Join(err, x.set.destroy(context.WithoutCancel(ctx), name+xtNew)))
}

// rebuildChain puts chain and jump in place unless they are.
func (x *xt) rebuildChain(ctx context.Context, f *xtFamily, rules []xtRule) error {
	if err := x.putChain(ctx, f, rules); err != nil {
		return err
	}
	// The other table may have what was built with another hook.
	return x.removeFrom(ctx, f.xtables, otherTable(x.layout.table))
}

func (x *xt) putChain(ctx context.Context, f *xtFamily, rules []xtRule) error {
	doing := "putting our rules into " + f.String()
	for try := 1; ; try++ {
		parent, chain, err := x.chains(ctx, f)
		if err != nil {
			return xtError(doing, err)
		}
		if x.layout.sets && x.layout.intact(f.v6, parent, chain) && slices.Equal(chain, f.chain) {
			return nil
		}
		f.chain = nil
		err = f.restore(ctx, x.layout.table, x.layout.script(parent, rules), false)
		if err == nil {
			if parent, chain, err = x.chains(ctx, f); err == nil {
				if x.layout.intact(f.v6, parent, chain) {
					f.chain = chain
					return nil
				}
				err = errChanging
			}
		}
		if try == 3 || ctx.Err() != nil {
			return xtError(doing, err)
		}
	}
}

// otherTable is where the rules are with the other hook.
func otherTable(table string) string {
	if table == "raw" {
		return "filter"
	}
	return "raw"
}

// hookOf is the chain that is jumped from in a table.
func hookOf(table string) string {
	if table == "raw" {
		return "PREROUTING"
	}
	return "INPUT"
}

// removeFrom takes chain and jumps out of a table.
func (x *xt) removeFrom(ctx context.Context, t *xtables, table string) error {
	doing := "removing our rules from " + t.String()
	if ok, err := t.has(ctx, table); !ok || err != nil {
		return xtError(doing, err)
	}
	chain, err := t.list(ctx, table, xtChain, false)
	if err != nil {
		return xtError(doing, err)
	}
	parent, err := t.list(ctx, table, hookOf(table), false)
	if err != nil {
		return xtError(doing, err)
	}
	if script := removal(parent, chain); script != "" {
		return xtError(doing, t.restore(ctx, table, script, false))
	}
	return nil
}

// removeRules takes our rules out of both tables, in both variants.
func (x *xt) removeRules(ctx context.Context) error {
	var errs []error
	for _, f := range x.families {
		f.chain = nil
		for _, t := range []*xtables{f.xtables, f.other(ctx)} {
			if t == nil {
				continue
			}
			for _, table := range []string{"raw", "filter"} {
				errs = append(errs, x.removeFrom(ctx, t, table))
			}
		}
	}
	return errors.Join(errs...)
}

func (x *xt) List(ctx context.Context) iter.Seq2[Installed, error] {
	return func(yield func(Installed, error) bool) {
		if err := x.probed(ctx); err != nil {
			yield(Installed{}, err)
			return
		}
		if !x.layout.sets {
			x.listRules(ctx)(yield)
			return
		}
		for _, v6 := range []bool{false, true} {
			_, err := x.set.header(ctx, setName(v6)) // an empty answer would not tell
			var all []Installed
			if err == nil {
				all, err = x.set.list(ctx, setName(v6))
			}
			if err != nil {
				yield(Installed{}, ipsetError("listing set "+setName(v6), err))
				return
			}
			for _, in := range all {
				if !yield(in, nil) {
					return
				}
			}
		}
	}
}

// adopt reads the entries of whatever layout of ours is there; what cannot be
// read is left.
func (x *xt) adopt(ctx context.Context) []Entry {
	var entries []Entry
	now := time.Now()
	if !x.layout.sets {
		for _, f := range x.families {
			for p, e := range x.anyRules(ctx, f) {
				if e.until > now.Unix() && len(entries) < x.book.max {
					entries = append(entries, Entry{Prefix: p, Until: time.Unix(e.until, 0)})
				}
			}
		}
		return entries
	}
	for in, err := range x.List(ctx) {
		if err != nil || len(entries) >= x.book.max {
			break
		}
		if in.Until.After(now) && checkPrefix(in.Prefix) == nil {
			entries = append(entries, Entry{Prefix: in.Prefix, Until: in.Until})
		}
	}
	return entries
}

// Watch is not supported: neither ip_set nor the legacy variant tell of
// changes.
func (x *xt) Watch(context.Context, func(string)) error { return errors.ErrUnsupported }

func (x *xt) Close(ctx context.Context, remove bool) error {
	defer x.set.close()
	if !remove {
		return nil
	}
	if err := x.probed(ctx); err != nil {
		return err
	}
	errs := []error{x.removeRules(ctx)}
	if x.layout.sets {
		for _, v6 := range []bool{false, true} {
			for _, name := range []string{setName(v6), setName(v6) + xtNew, allowSetName(v6), allowSetName(v6) + xtNew} {
				errs = append(errs, ipsetError("removing set "+name, x.set.destroy(ctx, name)))
			}
		}
	}
	x.book.replace(nil)
	return errors.Join(errs...)
}

// xtError puts an error of a command into words and into a sentinel: whatever
// went wrong, what the filter holds is not known.
func xtError(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrGone), errors.Is(err, ErrUnknown), errors.Is(err, ErrFull), errors.Is(err, ErrUnavailable):
		return fmt.Errorf("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w: %w", doing, ErrUnknown, err)
}
