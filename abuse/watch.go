package abuse

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"sync"
)

// Brief is a case in a few words, for those who watch.
type Brief struct {
	ID      string
	State   State
	AS      uint32
	Network netip.Prefix
	Why     string // why it is Held or Doubtful
}

// Briefs returns every case in a few words, the oldest first. Unlike Cases it
// copies no evidence.
func (d *Desk) Briefs() []Brief {
	d.mu.Lock()
	defer d.mu.Unlock()
	all := make([]Brief, 0, len(d.cases))
	for _, c := range d.cases {
		all = append(all, Brief{c.ID, c.State, c.AS, c.Network, c.Why})
	}
	slices.SortFunc(all, func(a, b Brief) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// LookupCount is how often a source was asked, from the cache or not at all
// left aside, with one result: "found", "none" or "failed".
type LookupCount struct {
	Source, Result string
	Count          uint64
}

// lookupCounts counts questions. Sources and results are our own words, so
// there are few.
type lookupCounts struct {
	mu sync.Mutex
	n  map[[2]string]uint64
}

func (l *lookupCounts) add(source string, err error) {
	result := "found"
	if errors.Is(err, errNone) {
		result = "none"
	} else if err != nil {
		result = "failed"
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.n == nil {
		l.n = make(map[[2]string]uint64)
	}
	l.n[[2]string{source, result}]++
}

// Lookups says how often each source was asked since the start.
func (d *Desk) Lookups() (list []LookupCount) {
	c := &d.lookups.counts
	c.mu.Lock()
	defer c.mu.Unlock()
	for k, n := range c.n {
		list = append(list, LookupCount{k[0], k[1], n})
	}
	slices.SortFunc(list, func(a, b LookupCount) int {
		return cmp.Or(strings.Compare(a.Source, b.Source), strings.Compare(a.Result, b.Result))
	})
	return list
}
