package guard

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/store"
)

// Bounds of a View, so that it stays cheap under any flood.
const (
	viewSources = 20
	viewBlocks  = 100
	// viewCounted: with more blocks than this their counters are not read from
	// the packet filter for each View.
	viewCounted = 2000
	trendEvery  = 5 * time.Second
	trendMost   = 120
	// groupOf: so many holders of one network can be shown as the network, with
	// viewMembers of them.
	groupOf     = 3
	viewMembers = 8
	// groupNear: a network this near to a verdict of its own, and nearer than
	// any address in it, is shown as such though there is room for all.
	groupNear = 0.5
)

// View is what a live display of the daemon shows.
type View struct {
	Status Status `json:"status"`
	// Sources hold slots now, those with most first, at most 20: addresses;
	// and in place of several of one network the network, where there are more
	// than 20 or where it is itself nearer to a verdict than they are.
	Sources []Source `json:"sources"`
	// Blocks are the newest ones, at most 100, with MoreBlocks besides.
	Blocks     []BlockInfo `json:"blocks"`
	MoreBlocks int         `json:"more_blocks"`
	// Counted is false if the packet filter was not asked what the blocks
	// stopped, because there are too many.
	Counted bool `json:"counted"`
	// Trend has the slots taken at the end of each TrendEvery, newest last.
	Trend      []int         `json:"trend"`
	TrendEvery time.Duration `json:"trend_every_ns"`
}

// Source is who holds slots now, and how near it is to a verdict.
type Source struct {
	Prefix    netip.Prefix `json:"prefix"`
	Held      int          `json:"held"`
	Addresses int          `json:"addresses"` // that hold them
	// Rule is the one whose threshold it is nearest to; "" if nothing is known
	// of the source. Score and Threshold are in the units of Metric.
	Rule      string          `json:"rule,omitempty"`
	Metric    detector.Metric `json:"metric,omitempty"`
	Score     float64         `json:"score"`
	Threshold float64         `json:"threshold"`
	KnownGood int             `json:"known_good"` // such senders inside
	Allowed   bool            `json:"allowed"`
	Waiting   bool            `json:"waiting"`           // a verdict waits for confirmation
	Blocked   State           `json:"blocked,omitempty"` // the state of the block that covers it
	// Members are the addresses of a network that hold most, at most 8.
	Members []Source `json:"members,omitempty"`
}

// Near is how near it is to a verdict: 1 is over the threshold.
func (s Source) Near() float64 {
	if s.Threshold <= 0 {
		return 0
	}
	return s.Score / s.Threshold
}

// Nearest is the one of s and its members that is nearest to a verdict.
func (s Source) Nearest() Source {
	best := s
	for _, m := range s.Members {
		if m.Near() > best.Near() {
			best = m
		}
	}
	return best
}

// View describes the daemon for a live display.
func (g *Guard) View(ctx context.Context) (v View, err error) {
	err = g.do(ctx, func(ctx context.Context) {
		now := time.Now()
		v = View{Status: g.status(ctx), Trend: slices.Clone(g.trend), TrendEvery: trendEvery}
		v.Sources = g.sources(now)
		v.Blocks, v.MoreBlocks, v.Counted = g.newest(ctx, now)
	})
	return v, err
}

// sources are who holds slots now, as a View has them.
func (g *Guard) sources(now time.Time) (list []Source) {
	held := g.held()
	few := len(held) <= viewSources
	for _, s := range groups(held) {
		if s = g.standing(s, now); s.Addresses == 1 {
			list = append(list, s)
			continue
		}
		all := members(held, s.Prefix)
		for i := range all[:min(len(all), viewMembers)] {
			all[i] = g.standing(all[i], now)
		}
		s.Members = all[:min(len(all), viewMembers)]
		if !few || s.Near() >= groupNear && s.Nearest().Prefix == s.Prefix {
			list = append(list, s)
			continue
		}
		for i := len(s.Members); i < len(all); i++ {
			all[i] = g.standing(all[i], now)
		}
		list = append(list, all...)
	}
	slices.SortFunc(list, mostFirst)
	return list[:min(len(list), viewSources)]
}

func mostFirst(a, b Source) int {
	return cmp.Or(cmp.Compare(b.Held, a.Held), a.Prefix.Compare(b.Prefix))
}

// members are the holders in a network, those with most first.
func members(held map[netip.Addr]int, p netip.Prefix) (list []Source) {
	for a, n := range held {
		if p.Contains(a) {
			list = append(list, Source{Prefix: netip.PrefixFrom(a, a.BitLen()), Held: n, Addresses: 1})
		}
	}
	slices.SortFunc(list, mostFirst)
	return list
}

// standing adds to a source what the detector and the gate think of it.
func (g *Guard) standing(s Source, now time.Time) Source {
	x := g.det.Explain(s.Prefix)
	s.KnownGood = x.KnownGoodCount
	for _, r := range x.Rules {
		if r.Source == s.Prefix && (s.Rule == "" || r.Score*s.Threshold > s.Score*r.Threshold) {
			s.Rule, s.Metric, s.Score, s.Threshold = r.Rule, r.Metric, r.Score, r.Threshold
		}
	}
	_, s.Allowed = g.gate.allow.Overlaps(s.Prefix)
	s.Waiting = g.waits(s.Prefix)
	if b, ok := g.blocks.covers(s.Prefix); ok && now.Before(b.Until) {
		s.Blocked = g.info(*b, nil, now).State
	}
	return s
}

// newest returns the newest blocks, how many there are besides, and whether
// they have their counters.
func (g *Guard) newest(ctx context.Context, now time.Time) (list []BlockInfo, more int, counted bool) {
	newer := func(a, b store.Block) int { return cmp.Or(b.Since.Compare(a.Since), a.Prefix.Compare(b.Prefix)) }
	var top []store.Block
	for _, b := range g.blocks.table.All() {
		if len(top) == viewBlocks {
			more++
			if newer(*b, top[viewBlocks-1]) > 0 {
				continue
			}
			top = top[:viewBlocks-1]
		}
		at, _ := slices.BinarySearchFunc(top, *b, newer)
		top = slices.Insert(top, at, *b)
	}
	var installed map[netip.Prefix]firewall.Installed
	if counted = g.blocks.len() <= viewCounted; counted {
		installed = g.installed(ctx)
	}
	for _, b := range top {
		list = append(list, g.info(b, installed, now))
	}
	return list, more, counted
}

// groups sorts the holders and puts those of one network together: three of a
// /24 or a /64, or three networks of a /48.
func groups(held map[netip.Addr]int) []Source {
	list := make([]Source, 0, len(held))
	for a, n := range held {
		list = append(list, Source{Prefix: netip.PrefixFrom(a, a.BitLen()), Held: n, Addresses: 1})
	}
	for _, bits := range []struct{ v4, v6 int }{{24, 64}, {24, 48}} {
		around := func(p netip.Prefix) netip.Prefix {
			n := bits.v4
			if p.Addr().Is6() {
				n = bits.v6
			}
			return netip.PrefixFrom(p.Addr(), min(n, p.Bits())).Masked()
		}
		members := make(map[netip.Prefix]int, len(list))
		for _, s := range list {
			members[around(s.Prefix)]++
		}
		sums := make(map[netip.Prefix]Source)
		list = slices.DeleteFunc(list, func(s Source) bool {
			net := around(s.Prefix)
			if members[net] < groupOf {
				return false
			}
			sum := sums[net]
			sums[net] = Source{Prefix: net, Held: sum.Held + s.Held, Addresses: sum.Addresses + s.Addresses}
			return true
		})
		for _, s := range sums {
			list = append(list, s)
		}
	}
	slices.SortFunc(list, mostFirst)
	return list[:min(len(list), viewSources)]
}
