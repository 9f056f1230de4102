package firewall

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"time"
)

// Without ip_set each entry is a rule of our chain, with its end in the
// comment. A change reads the chain, counters too, and writes it anew in one
// transaction: with at most xtRulesMax rules that costs some milliseconds.

// errNoIPv6 is what becomes of an IPv6 entry on a kernel without IPv6.
var errNoIPv6 = errors.New("the kernel has no IPv6")

// readRules gives the entries of one family, or ErrGone if chain or jump are
// not what we made.
func (x *xt) readRules(ctx context.Context, f *xtFamily) (map[netip.Prefix]xtEntry, error) {
	doing := "reading the rules of " + f.String()
	parent, chain, err := x.chains(ctx, f)
	if err != nil {
		return nil, xtError(doing, err)
	}
	if !x.layout.intact(f.v6, parent, chain) {
		return nil, fmt.Errorf("%s: %w", doing, ErrGone)
	}
	lines, err := f.list(ctx, x.layout.table, xtChain, true)
	if err != nil {
		return nil, xtError(doing, err)
	}
	return readEntryRules(lines), nil
}

// anyRules gives the entries of one family in rules of whatever settings, hook
// or version; what cannot be read is left.
func (x *xt) anyRules(ctx context.Context, f *xtFamily) map[netip.Prefix]xtEntry {
	all := make(map[netip.Prefix]xtEntry)
	for _, table := range []string{otherTable(x.layout.table), x.layout.table} {
		if ok, err := f.has(ctx, table); !ok || err != nil {
			continue
		}
		if lines, err := f.list(ctx, table, xtChain, true); err == nil {
			maps.Copy(all, readEntryRules(lines))
		}
	}
	return all
}

func (x *xt) family(v6 bool) *xtFamily {
	for _, f := range x.families {
		if f.v6 == v6 {
			return f
		}
	}
	return nil
}

func (x *xt) applyRules(ctx context.Context, p plan, now time.Time) (Result, error) {
	all := p.prefixes()
	var have [2]map[netip.Prefix]xtEntry
	for _, f := range x.families {
		entries, err := x.readRules(ctx, f)
		if err != nil {
			return failAll(all, err), err
		}
		have[familyIndex(f.v6)] = entries
	}
	var touched [2][]netip.Prefix
	for _, pfx := range all {
		i := familyIndex(pfx.Addr().Is6())
		touched[i] = append(touched[i], pfx)
	}
	for _, entries := range have {
		maps.DeleteFunc(entries, func(_ netip.Prefix, e xtEntry) bool { return e.until <= now.Unix() })
	}
	for _, pfx := range p.unset {
		delete(have[familyIndex(pfx.Addr().Is6())], pfx)
	}
	p, res, full := p.fit(x.book.max-len(have[0])-len(have[1]), func(pfx netip.Prefix) bool {
		_, ok := have[familyIndex(pfx.Addr().Is6())][pfx]
		return ok
	}, func(over int) error {
		return fmt.Errorf("%d entries would be in force, %d are allowed: %w", x.book.max+over, x.book.max, ErrFull)
	})
	for _, e := range p.set {
		i := familyIndex(e.Prefix.Addr().Is6())
		if have[i] == nil {
			err := fmt.Errorf("%v: %w", e.Prefix, errNoIPv6)
			return failAll(all, err), err
		}
		was := have[i][e.Prefix]
		have[i][e.Prefix] = xtEntry{untilSeconds(e.Until), was.packets, was.bytes}
	}
	for i, v6 := range []bool{false, true} {
		f := x.family(v6)
		if f == nil || len(touched[i]) == 0 {
			continue
		}
		if err := x.writeRules(ctx, f, have[i]); err != nil {
			failed := touched[i]
			if !v6 {
				failed = append(failed, touched[1]...)
			}
			return failAll(failed, err), err
		}
		x.noteRules(v6, have[i])
	}
	return res, full
}

// writeRules replaces the content of our chain and reads what became of it.
func (x *xt) writeRules(ctx context.Context, f *xtFamily, entries map[netip.Prefix]xtEntry) error {
	doing := fmt.Sprintf("writing %d entries into %s", len(entries), f)
	f.chain = nil
	if err := f.restore(ctx, x.layout.table, x.layout.refill(x.layout.entryRules(f.v6, entries)), false); err != nil {
		return xtError(doing, err)
	}
	chain, err := f.list(ctx, x.layout.table, xtChain, false)
	if err != nil {
		return xtError(doing, err)
	}
	f.chain = chain
	return nil
}

// noteRules writes down what a family holds, for a repair.
func (x *xt) noteRules(v6 bool, entries map[netip.Prefix]xtEntry) {
	maps.DeleteFunc(x.book.until, func(p netip.Prefix, _ int64) bool { return p.Addr().Is6() == v6 })
	for p, e := range entries {
		x.book.until[p] = unixNano(time.Unix(e.until, 0))
	}
}

func (x *xt) rebuildRules(ctx context.Context, entries []Entry) error {
	var want [2]map[netip.Prefix]xtEntry
	for _, f := range x.families {
		want[familyIndex(f.v6)] = make(map[netip.Prefix]xtEntry)
	}
	var refused error
	for _, e := range entries {
		if m := want[familyIndex(e.Prefix.Addr().Is6())]; m != nil {
			m[e.Prefix] = xtEntry{until: untilSeconds(e.Until)}
		} else if refused == nil {
			refused = fmt.Errorf("%v: %w", e.Prefix, errNoIPv6)
		}
	}
	for _, f := range x.families {
		m := want[familyIndex(f.v6)]
		have := x.anyRules(ctx, f) // what stays keeps its counters
		for p, e := range m {
			m[p] = xtEntry{e.until, have[p].packets, have[p].bytes}
		}
		if err := x.rebuildChain(ctx, f, x.layout.entryRules(f.v6, m)); err != nil {
			return err
		}
		x.noteRules(f.v6, m)
	}
	return refused
}

func (x *xt) listRules(ctx context.Context) iter.Seq2[Installed, error] {
	return func(yield func(Installed, error) bool) {
		for _, f := range x.families {
			entries, err := x.readRules(ctx, f)
			if err != nil {
				yield(Installed{}, err)
				return
			}
			for p, e := range entries {
				if !yield(Installed{Prefix: p, Until: time.Unix(e.until, 0), Packets: e.packets, Bytes: e.bytes}, nil) {
					return
				}
			}
		}
	}
}
