package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/incident"
	"github.com/smtpguard/smtpguard/policy"
)

// page is what replay tells people: the closing table and, with --html, the
// page.
type page struct {
	incident *incident.Collector // nil: nobody is told
	path     string              // of the page, "" if none is wanted
	policy   *policy.Policy
	names    []string // of the logs
	nameless error    // why networks have no names in the page
}

// newPage makes r tell an incident, unless only a program listens.
func (e *env) newPage(c *cli.Context, r *guard.Replay, asJSON bool) (*page, error) {
	pg := &page{path: c.String("html"), names: c.Args().Slice()}
	if asJSON && pg.path == "" {
		return pg, nil
	}
	var err error
	if pg.policy, err = e.policy(c); err != nil {
		return nil, err
	}
	if pg.path != "" {
		if err := replaceable(pg.path); err != nil {
			return nil, err
		}
	}
	if pg.incident, err = newCollector(pg.policy, c.Int("capacity"), pg.path != ""); err == nil {
		tellIncident(r, pg.incident)
	}
	return pg, err
}

// write puts the page in place.
func (p *page) write(sum replaySummary) error {
	o := incident.PageOptions{Zone: time.Local, Made: time.Now(), Version: programVersion(), Settings: pageSettings(p.policy, sum)}
	for _, n := range p.names {
		if n == "-" {
			n = "standard input"
		}
		o.Logs = append(o.Logs, filepath.Base(n))
	}
	if path := p.policy.Reports.ASNDatabase; path != "" {
		names := abuse.OpenASNames(path)
		o.AS = func(a netip.Addr) string {
			name, err := names.Name(a)
			if err != nil {
				p.nameless = err
			}
			return name
		}
	}
	var b bytes.Buffer
	if err := p.incident.WritePage(&b, o); err != nil {
		return err
	}
	if err := replaceable(p.path); err != nil {
		return err
	}
	if err := writeAtomic(p.path, b.Bytes()); err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	return nil
}

// pageSettings are those that the incident depends on, in words.
func pageSettings(p *policy.Policy, sum replaySummary) []incident.Setting {
	list := []incident.Setting{
		{Name: "capacity", Value: fmt.Sprintf("%d slots (%s)", sum.Capacity, sum.CapacityFrom)},
		{Name: "full", Value: fmt.Sprintf("from %s of the slots on; pressure counts from %s", percent(p.Saturation.SaturatedAt), percent(p.Saturation.PressureFrom))},
	}
	if sum.Misdated > 0 {
		list = append(list, incident.Setting{Name: "times", Value: count(int(sum.Misdated), "event", "events") + " with a time that cannot be true, taken as of the lines around"})
	}
	for _, r := range p.Rules {
		var lengths []string
		for _, bits := range append(append([]int(nil), r.Prefixes4...), r.Prefixes6...) {
			lengths = append(lengths, "/"+strconv.Itoa(bits))
		}
		what := percent(r.Threshold) + " of the slots"
		if r.Metric == detector.Opens {
			what = fmt.Sprintf("%.0f connections", r.Threshold)
		}
		value := fmt.Sprintf("%s in %s, of one %s", what, incident.Span(r.Window), strings.Join(lengths, ", "))
		if r.MinSources > 1 {
			value += fmt.Sprintf(", %d addresses or more", r.MinSources)
		}
		list = append(list, incident.Setting{Name: "rule " + r.Name, Value: value})
	}
	var steps []string
	for _, d := range p.Block.For {
		steps = append(steps, policy.FormatDuration(d))
	}
	return append(list,
		incident.Setting{Name: "blocks", Value: strings.Join(steps, ", ") + "; no wider than /" + strconv.Itoa(p.Block.MaxPrefix4) + " and /" + strconv.Itoa(p.Block.MaxPrefix6)},
		incident.Setting{Name: "known good", Value: fmt.Sprintf("thresholds %g times as high for %s", p.KnownGood.Factor, policy.FormatDuration(p.KnownGood.MaxAge))},
		incident.Setting{Name: "never blocked", Value: count(len(p.Allow), "entry", "entries") + " in the allowlist"},
		incident.Setting{Name: "log", Value: fmt.Sprintf("%d lines, %d of them events, %d not Exim's", sum.Lines, sum.Events, sum.Unparsed)},
	)
}

func percent(x float64) string { return strconv.FormatFloat(100*x, 'f', -1, 64) + " %" }

// replaceable says why path cannot become a page: it is a page already, or
// there is nothing. Anything else, the log above all, is nobody's to overwrite,
// nor is an empty file: it may be the log that was begun a moment ago.
func replaceable(path string) error {
	fi, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		dir, err := os.Stat(filepath.Dir(path))
		if err == nil && !dir.IsDir() {
			err = fmt.Errorf("%s is not a directory", filepath.Dir(path))
		}
		if err != nil {
			return fmt.Errorf("writing the page: %w", err)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	refuse := func(what string) error {
		return withHint(fmt.Errorf("writing the page: %s %s; it is left as it is", path, what), "name a new file: --html incident.html")
	}
	if !fi.Mode().IsRegular() {
		return refuse("is not a file")
	}
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	defer f.Close()
	head, err := io.ReadAll(io.LimitReader(f, 512))
	if err != nil {
		return fmt.Errorf("writing the page: %w", err)
	}
	if !bytes.HasPrefix(head, []byte("<!doctype html>")) || !bytes.Contains(head, []byte(`content="`+incident.Generator+`"`)) {
		return refuse("is there already and no page of smtpguard's")
	}
	return nil
}

// writeAtomic puts a file in place as a whole, readable by its owner only.
func writeAtomic(path string, text []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".smtpguard-page-*") // mode 0600
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		err = errors.Join(err, os.Remove(f.Name()))
	}
	return err
}
