package main

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// replayReports gathers the blocks of a replay into cases and drafts them as
// files, as the daemon would have: --reports DIR. Nothing is sent and nobody
// is asked; reserved networks, of which trials are made, are drafted too.
type replayReports struct {
	desk *abuse.Desk
	dir  string
	now  time.Time
	id   uint64
	err  error
}

func (e *env) newReplayReports(c *cli.Context, names []string) (*replayReports, error) {
	if slices.Contains(names, "-") {
		return nil, &usageError{"--reports reads the logs twice; standard input can be read once"}
	}
	p, err := e.policy(c)
	if err != nil {
		return nil, err
	}
	if z := c.String("zone"); z != "" {
		if err := p.Set("zone", z); err != nil {
			return nil, &usageError{fmt.Sprintf("--zone: %v", err)}
		}
	}
	conf, err := reportsConfig(p)
	if err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(c.String("reports"))
	if err != nil {
		return nil, err
	}
	conf.Dir, conf.Mode, conf.Lookup.Online, conf.Redirect = dir, abuse.Draft, false, "replay@example.invalid"
	zone := p.Location()
	if zone == nil {
		zone = time.Local
	}
	r := &replayReports{dir: dir}
	r.desk, err = abuse.New(abuse.Options{
		Config: conf, Store: records{}, Logs: &evidenceLogs{paths: names, zone: zone, only: true},
		Spare: func() []netip.Prefix { return allowedBy(p) },
		Now:   func() time.Time { return r.now }, Version: programVersion(),
	})
	return r, err
}

// allowedBy are the prefixes that a policy allows.
func allowedBy(p *policy.Policy) (ps []netip.Prefix) {
	for _, e := range p.Allow {
		ps = append(ps, e.Prefix)
	}
	return ps
}

// take notes a block, at its own time.
func (r *replayReports) take(b store.Block) {
	r.id++
	b.ID, r.now = r.id, b.Since
	b.Observed = true // nothing was blocked: the log says how it went on
	if r.err == nil {
		r.err = r.desk.Take(reportBlock(b))
	}
}

// finish makes the drafts and says what they are.
func (r *replayReports) finish(c *cli.Context, last time.Time) (string, error) {
	defer r.desk.Close()
	if r.err != nil {
		return "", r.err
	}
	r.now = last.Add(time.Hour)
	r.desk.Work(c.Context)
	states := map[abuse.State]int{}
	for _, k := range r.desk.Cases() {
		states[k.State]++
	}
	var words []string
	for _, s := range slices.Sorted(maps.Keys(states)) {
		words = append(words, fmt.Sprintf("%d %s", states[s], s))
	}
	if len(words) == 0 {
		words = []string{"none"}
	}
	return fmt.Sprintf("reports: %s; the drafts are in %s", strings.Join(words, ", "), r.dir), c.Context.Err()
}

// records is a store of records in memory.
type records map[string]map[string][]byte

var errNoKind = errors.New("a record without a kind")

func (m records) SetRecord(kind, key string, value []byte) error {
	if kind == "" {
		return errNoKind
	}
	if m[kind] == nil {
		m[kind] = map[string][]byte{}
	}
	m[kind][key] = slices.Clone(value)
	return nil
}

func (m records) Record(kind, key string) ([]byte, error) { return m[kind][key], nil }

func (m records) Records(kind string, fn func(string, []byte) bool) error {
	for _, key := range slices.Sorted(maps.Keys(m[kind])) {
		if !fn(key, m[kind][key]) {
			break
		}
	}
	return nil
}

func (m records) DropRecord(kind, key string) (bool, error) {
	_, ok := m[kind][key]
	delete(m[kind], key)
	return ok, nil
}
