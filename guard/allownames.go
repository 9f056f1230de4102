package guard

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// How the allowlist's names are looked up, beside the decisions.
const (
	lookEvery  = 10 * time.Minute
	lookRetry  = time.Minute // after a failure, then twice as long, up to lookEvery
	lookFor    = 20 * time.Second
	lookAtOnce = 4
	// nameGrace is how long restored blocks and verdicts wait for a name that
	// nothing is known of; it is looked up at once, and again every lookSoon.
	nameGrace  = 5 * time.Second
	lookSoon   = time.Second
	newAtOnce  = 32
	lookNews   = 2 * time.Second // how long the packet filter waits for more news
	staleNames = 24 * time.Hour  // an answer that is older is warned of

	// kindAllowAnswer is the kind of the records of what names stood for last.
	kindAllowAnswer = "allow-answer"
)

// named is an entry of the allowlist that is a name.
type named struct {
	name allow.Name
	// why says where the entry comes from, and what is noted with it.
	why     string
	kept    allow.Kept
	notes   []string
	err     string // of the last look; "": there was none, or it was whole
	checked time.Time
	saved   time.Time // when kept was written down
	due     time.Time
	pause   time.Duration
	busy    bool
	// since is when it came onto the list, zero once the DNS said whom it
	// stands for, or that there is nobody.
	since time.Time
	told  bool // that it stayed unknown
}

// awaited reports whether somebody could be blocked whom the name would have
// protected, had it been looked up.
func (n *named) awaited(now time.Time) bool { return !n.since.IsZero() && now.Sub(n.since) < nameGrace }

// namesAwaited reports whether rules block nobody yet, because a name is new.
func (g *Guard) namesAwaited(now time.Time) bool {
	for _, n := range g.names {
		if n.awaited(now) {
			return true
		}
	}
	return false
}

// awaitNames looks up the names that nothing is known of, before blocks are
// put back and rules make new ones. It takes nameGrace at most.
func (g *Guard) awaitNames(ctx context.Context, wg *sync.WaitGroup) {
	for _, n := range g.names {
		if !n.since.IsZero() {
			n.since = time.Now()
		}
	}
	tick := time.NewTicker(tickEvery)
	defer tick.Stop()
	for now := time.Now(); ctx.Err() == nil && g.namesAwaited(now); now = time.Now() {
		g.lookUp(ctx, wg, now)
		select {
		case <-ctx.Done():
		case l := <-g.answers:
			if g.heard(l, time.Now()) {
				g.filterNews = time.Now()
			}
		case <-tick.C:
		}
	}
	g.tellUnknown(time.Now())
	g.rebuildAllow()
}

// tellUnknown tells once of each name that nothing became known of in time.
func (g *Guard) tellUnknown(now time.Time) {
	var names []string
	for _, n := range g.namesSorted() {
		if !n.since.IsZero() && !n.told && !n.awaited(now) {
			n.told = true
			names = append(names, string(n.name))
		}
	}
	if len(names) > 0 {
		g.log.Warn("names of the allowlist are not known: whom they stand for can be blocked until the DNS answers", "names", names)
	}
}

// lookedUp is what came of a look at a name.
type lookedUp struct {
	name   allow.Name
	answer allow.Answer
	err    error
}

// resolver asks the DNS as the machine is set up to, without the C library,
// whose calls cannot be given up.
func (g *Guard) resolver() allow.Resolver {
	if g.o.DNS != nil {
		return g.o.DNS
	}
	return &net.Resolver{PreferGo: true}
}

// syncNames makes g.names what policy and operator have on the list. What a
// new one stood for before is in the store.
func (g *Guard) syncNames(now time.Time) {
	want := make(map[allow.Name]string)
	for _, a := range g.allowed {
		if a.Name == "" || !a.In(now) {
			continue
		}
		if n, err := allow.Parse(a.Name); err == nil {
			want[n] = operatorsWhy(a)
		}
	}
	for _, e := range g.policy.AllowNames {
		want[e.Name] = e.Why
		if e.Note != "" {
			want[e.Name] += ": " + e.Note
		}
	}
	maps.DeleteFunc(g.names, func(n allow.Name, _ *named) bool { _, ok := want[n]; return !ok })
	for name, why := range want {
		n := g.names[name]
		if n == nil {
			if g.names == nil {
				g.names = make(map[allow.Name]*named)
			}
			n = &named{name: name, due: now, kept: g.keptOf(name)}
			if n.kept.Answered.IsZero() && len(n.kept.Prefixes) == 0 {
				n.since = now
			}
			g.names[name] = n
		}
		n.why = why
	}
}

func operatorsWhy(a store.AllowEntry) string {
	why := "allowed by " + a.By
	if !a.Until.IsZero() {
		why += " until " + a.Until.Format("2006-01-02 15:04:05 -0700")
	}
	if a.Note != "" {
		why += ": " + a.Note
	}
	return why
}

// keptOf reads what a name stood for from the store.
func (g *Guard) keptOf(name allow.Name) (k allow.Kept) {
	v, err := g.o.Store.Record(kindAllowAnswer, string(name))
	if err == nil && v != nil {
		err = json.Unmarshal(v, &k)
	}
	if err != nil {
		g.fault("reading what "+string(name)+" stood for; it is looked up anew", err)
		return allow.Kept{}
	}
	k.Prefixes = slices.DeleteFunc(k.Prefixes, func(e allow.KeptPrefix) bool {
		return !e.Prefix.IsValid() || e.Prefix != policy.Canonical(e.Prefix) || e.Prefix.Bits() == 0
	})
	return k
}

// lookUp starts to look up the names that are due, beside the decisions.
func (g *Guard) lookUp(ctx context.Context, wg *sync.WaitGroup, now time.Time) {
	for _, n := range g.names {
		most := lookAtOnce
		if n.awaited(now) {
			most = newAtOnce
		}
		if n.busy || now.Before(n.due) || g.looking >= most {
			continue
		}
		n.busy = true
		g.looking++
		name, dns := n.name, g.resolver()
		wg.Go(func() {
			short, cancel := context.WithTimeout(ctx, lookFor)
			defer cancel()
			a, err := allow.Resolve(short, dns, name)
			select {
			case g.answers <- lookedUp{name, a, err}:
			case <-ctx.Done():
			}
		})
	}
}

// answered takes the outcome of a look at a name. What is allowed from now on
// is free at once; the packet filter learns of it with other news.
func (g *Guard) answered(ctx context.Context, l lookedUp, now time.Time) {
	if !g.heard(l, now) {
		return
	}
	g.rebuildAllow()
	g.dropAllowed()
	_, _ = g.liftAllowed(ctx)
	if g.filterNews.IsZero() {
		g.filterNews = now
	}
}

// heard notes the outcome of a look at a name, and reports whether it stands
// for others than before.
func (g *Guard) heard(l lookedUp, now time.Time) (changed bool) {
	g.looking--
	n := g.names[l.name]
	if n == nil {
		return false // taken off the list meanwhile
	}
	n.busy, n.checked = false, now
	before := n.kept.Answered
	changed = n.kept.Merge(l.answer, l.err, now)
	notes := slices.Equal(n.notes, l.answer.Notes)
	n.notes = l.answer.Notes
	was := n.err
	if l.err == nil || errors.Is(l.err, allow.ErrNothing) {
		n.since = time.Time{}
	}
	if n.err = ""; l.err != nil {
		n.err = l.err.Error()
		n.pause = min(max(2*n.pause, lookRetry), lookEvery)
		n.due = now.Add(n.pause)
		if n.awaited(now) {
			n.pause, n.due = 0, now.Add(lookSoon)
		}
	} else {
		n.pause, n.due = 0, now.Add(lookEvery)
	}
	switch {
	case n.err != "" && n.err != was:
		g.log.Warn("a name of the allowlist could not be looked up; what it stood for stays allowed", "name", string(n.name),
			"err", n.err, "prefixes", len(n.kept.Prefixes), "last_whole_answer", before.Format(time.RFC3339))
	case n.err == "" && was != "":
		g.log.Info("a name of the allowlist is looked up again", "name", string(n.name), "prefixes", len(n.kept.Prefixes))
	}
	if !notes && len(n.notes) > 0 {
		g.log.Warn("not all of what a name of the allowlist says can be allowed", "name", string(n.name), "left_out", n.notes)
	}
	if changed || l.err == nil && now.Sub(n.saved) >= time.Hour {
		n.saved = now
		v, err := json.Marshal(n.kept)
		if err == nil {
			err = g.o.Store.SetRecord(kindAllowAnswer, string(n.name), v)
		}
		if err != nil {
			n.saved = time.Time{} // with the next answer again
			g.fault("noting what "+string(n.name)+" stands for", err)
		}
	}
	if changed {
		g.log.Info("a name of the allowlist stands for other addresses than before", "name", string(n.name), "prefixes", len(n.kept.Prefixes))
	}
	return changed
}

// tellFilter passes names' news on to the packet filter, many at a time: each
// change makes its table anew.
func (g *Guard) tellFilter(ctx context.Context, now time.Time) {
	if g.filterNews.IsZero() || g.looking > 0 && now.Sub(g.filterNews) < lookNews {
		return
	}
	g.filterNews = time.Time{}
	_ = g.renewFilter(ctx)
}

// dropAllowed forgets the verdicts that wait for confirmation and that the
// gate would not let pass any more.
func (g *Guard) dropAllowed() {
	g.pending = slices.DeleteFunc(g.pending, func(w pending) bool {
		_, ref := g.gate.parts(w.verdict.Source)
		return ref != nil
	})
}

// named yields the names in order.
func (g *Guard) namesSorted() []*named {
	return slices.SortedFunc(maps.Values(g.names), func(a, b *named) int {
		if a.name < b.name {
			return -1
		}
		return 1
	})
}

// namedEntries are the prefixes that names stand for.
func (g *Guard) namedEntries() (entries []policy.AllowEntry) {
	for _, n := range g.namesSorted() {
		for _, k := range n.kept.Prefixes {
			entries = append(entries, policy.AllowEntry{Prefix: k.Prefix, Why: string(n.name) + ", " + n.why})
		}
	}
	return entries
}

// AllowName is a name of the allowlist with what it stands for.
type AllowName struct {
	Name allow.Name `json:"name"`
	Why  string     `json:"why"`
	// Checked is when it was last looked up, Answered when that gave a whole
	// answer; zero: never. Error says what is wrong since.
	Checked  time.Time `json:"checked,omitzero"`
	Answered time.Time `json:"answered,omitzero"`
	Error    string    `json:"error,omitempty"`
	// Notes say what of the answer allows nobody.
	Notes []string `json:"notes,omitempty"`
	// Prefixes are what it stands for, also those that left the answer less
	// than allow.Grace ago.
	Prefixes []allow.KeptPrefix `json:"prefixes"`
}

func (n *named) info() *AllowName {
	return &AllowName{Name: n.name, Why: n.why, Checked: n.checked, Answered: n.kept.Answered, Error: n.err,
		Notes: slices.Clone(n.notes), Prefixes: slices.Clone(n.kept.Prefixes)}
}

// nameWarnings are the sentences about names that protect nobody, or that
// nobody could look up for long.
func (g *Guard) nameWarnings(now time.Time) (w []string) {
	for _, n := range g.namesSorted() {
		switch {
		case n.awaited(now):
			w = append(w, fmt.Sprintf("allow: %s is not known yet: no rule blocks anybody until it is, or for %s", n.name, nameGrace))
		case len(n.kept.Prefixes) == 0 && n.err == "" && n.checked.IsZero():
			w = append(w, fmt.Sprintf("allow: %s protects nobody: it was never looked up", n.name))
		case len(n.kept.Prefixes) == 0 && n.err != "":
			w = append(w, fmt.Sprintf("allow: %s protects nobody: %s", n.name, n.err))
		case n.err != "" && now.Sub(n.kept.Answered) > staleNames:
			w = append(w, fmt.Sprintf("allow: %s could not be looked up in full since %s; what it stood for stays allowed: %s",
				n.name, n.kept.Answered.Format(time.RFC3339), n.err))
		}
	}
	return w[:min(len(w), 10)]
}

// errTooManyNames: each name is looked up every few minutes.
var errTooManyNames = fmt.Errorf("the allowlist has %d names, and takes no more", policy.MaxAllowNames)

// allowName puts a name on the operator's allowlist.
func (g *Guard) allowName(ctx context.Context, e store.AllowEntry) error {
	name, err := allow.Parse(e.Name)
	if err != nil {
		return err
	}
	if e.Prefix.IsValid() {
		return errors.New("a name or a prefix, not both")
	}
	e.Name = string(name)
	var inErr error
	err = g.do(ctx, func(ctx context.Context) {
		if g.names[name] == nil && len(g.names) >= policy.MaxAllowNames {
			inErr = errTooManyNames
			return
		}
		if inErr = g.o.Store.AllowAdd(e); inErr != nil {
			return
		}
		if inErr = g.reloadAllow(); inErr != nil {
			return
		}
		if n := g.names[name]; n != nil {
			n.due = time.Now()
		}
		_, liftErr := g.liftAllowed(ctx) // of what it stood for before
		inErr = errors.Join(liftErr, g.renewFilter(ctx))
	})
	return errors.Join(err, inErr)
}

// DisallowName takes a name off the operator's allowlist and reports whether
// it was on it. What it stood for may be blocked again, unless the policy has
// the name too.
func (g *Guard) DisallowName(ctx context.Context, s string) (found bool, err error) {
	name, err := allow.Parse(s)
	if err != nil {
		return false, err
	}
	doErr := g.do(ctx, func(ctx context.Context) {
		if found, err = g.o.Store.AllowRemoveName(string(name)); err != nil || !found {
			return
		}
		if err = g.reloadAllow(); err == nil {
			err = g.renewFilter(ctx)
		}
		if g.names[name] == nil {
			_, dropErr := g.o.Store.DropRecord(kindAllowAnswer, string(name))
			err = errors.Join(err, dropErr)
		}
	})
	if doErr != nil {
		return false, doErr
	}
	return found, err
}

// AllowInfo is an entry of the allowlist: a prefix, or a name.
type AllowInfo struct {
	Prefix netip.Prefix `json:"prefix,omitzero"`
	Why    string       `json:"why"`
	// Named is the entry where it is a name; Prefix is then the zero value,
	// and what it stands for has no entries of its own.
	Named *AllowName `json:"named,omitempty"`
}

// Allowed returns everything that is never blocked, with the reason: prefixes
// in their order, then names in theirs.
func (g *Guard) Allowed(ctx context.Context) (list []AllowInfo, err error) {
	err = g.do(ctx, func(context.Context) {
		for e := range policy.NewAllowlist(g.plainEntries(time.Now())).All() {
			list = append(list, AllowInfo{Prefix: e.Prefix, Why: e.Why})
		}
		for _, n := range g.namesSorted() {
			list = append(list, AllowInfo{Why: n.why, Named: n.info()})
		}
	})
	return list, err
}
