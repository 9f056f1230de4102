package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
	"github.com/smtpguard/smtpguard/tail"
)

// reportsConfig is the policy's section as package abuse has it.
func reportsConfig(p *policy.Policy) (abuse.Config, error) {
	r := p.Reports
	c := abuse.Config{
		Mode: abuse.Mode(r.Mode), From: r.From, Org: r.Org, Phone: r.Phone, Host: r.Host, ReturnPath: r.ReturnPath,
		CopyNetwork: r.CopyNetwork == policy.Yes, Format: abuse.Format(r.Format), Overrides: r.Overrides, ASNDatabase: r.ASNDatabase, Dir: r.Dir,
		Lookup:    abuse.Lookup{Online: r.Lookup.Online == policy.Yes, Sources: r.Lookup.Sources, Each: r.Lookup.Each, Total: r.Lookup.Total, DNS: r.Lookup.DNS},
		Threshold: abuse.Threshold{Connections: r.Threshold.Connections, Held: r.Threshold.Held, Settle: r.Threshold.Settle},
		Caps:      abuse.Caps{Recipient: r.Caps.Recipient, Hour: r.Caps.Hour, Day: r.Caps.Day, Drafts: r.Caps.Drafts},
		Auto:      abuse.AutoSend{Connections: r.Auto.Connections, Blocks: r.Auto.Blocks},
		Delivery: abuse.Transport{By: abuse.Delivery(r.Delivery.By), Program: r.Delivery.Program, Before: outside(), Server: r.Delivery.Server, User: r.Delivery.User,
			PasswordFile: r.Delivery.PasswordFile, Timeout: r.Delivery.Timeout},
		Quiet: r.Quiet, FollowUp: r.FollowUp, MaxFollowUps: r.MaxFollowUps, Baseline: r.Baseline, Withdrawn: r.Withdrawn, Keep: r.Keep, Redirect: r.Redirect,
	}
	if path := r.Lookup.IPinfoTokenFile; path != "" {
		f, err := os.Open(path)
		if err != nil {
			return c, fmt.Errorf("reports.lookup.ipinfo_token_file: %w", err)
		}
		defer f.Close()
		line, err := bufio.NewReader(io.LimitReader(f, 4096)).ReadString('\n')
		if err != nil && err != io.EOF {
			return c, fmt.Errorf("reports.lookup.ipinfo_token_file: %w", err)
		}
		c.Lookup.IPinfoToken = strings.TrimSpace(line)
	}
	return c, nil
}

// reportsFaults are the faults of the policy's section that its form does not
// show: addresses that nobody can write from, files that are not there.
func reportsFaults(p *policy.Policy) error {
	c, err := reportsConfig(p)
	if err != nil {
		return err
	}
	return errors.Join(c.Check(), c.CheckFiles())
}

// openDesk makes the desk of the policy on a store. allowed lists what is
// never reported. logs may be empty: commands
// without a daemon make no drafts.
func openDesk(p *policy.Policy, st *store.Store, allowed func() []netip.Prefix, logs []string, zone *time.Location, log *slog.Logger) (*abuse.Desk, error) {
	c, err := reportsConfig(p)
	if err != nil {
		return nil, err
	}
	o := abuse.Options{Config: c, Store: st, Log: log, Version: programVersion(), Spare: allowed}
	o.Blocked = func(a netip.Addr) (netip.Prefix, bool) {
		blocks, _ := st.InForce(time.Now()) // damaged ones are not in it; the others count
		for _, b := range blocks {
			if b.Prefix.Contains(a) {
				return b.Prefix, true
			}
		}
		return netip.Prefix{}, false
	}
	o.Refresh = func(id uint64) (abuse.Block, bool) {
		b, err := st.Block(id)
		return reportBlock(b), err == nil
	}
	if len(logs) > 0 {
		o.Logs = &evidenceLogs{paths: logs, zone: zone}
	}
	return abuse.New(o)
}

// reportBlock is a block as far as reports are concerned.
func reportBlock(b store.Block) abuse.Block {
	if b.Part > 1 && b.Verdict != nil { // the first part has told the numbers of the whole
		v := *b.Verdict
		v.Opens, v.Refused, v.Accepted = 0, 0, 0
		b.Verdict = &v
	}
	return abuse.Block{ID: b.ID, Prefix: b.Prefix, Verdict: b.Verdict, Since: b.Since, Until: b.Until, Lifted: b.Lifted,
		Pardoned: b.Pardoned(), Observed: b.Observed, PartOf: b.PartOf}
}

// startDesk lets the desk work from when the guard is ready until ctx ends;
// stop waits for its end.
func startDesk(ctx context.Context, g *guard.Guard, d *abuse.Desk, log *slog.Logger, ready <-chan struct{}) (stop func()) {
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-ctx.Done():
			return
		case <-ready:
		}
		wg.Go(func() { tellDesk(ctx, g, d, log) })
		if err := d.Run(ctx); err != nil {
			log.Error("abuse reports", "err", err)
		}
	})
	return wg.Wait
}

// tellDesk hands new blocks to the desk until ctx ends. What was not handed
// over when the program ends is found in the store when it starts again.
func tellDesk(ctx context.Context, g *guard.Guard, d *abuse.Desk, log *slog.Logger) {
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	told := false
	for {
		for ctx.Err() == nil {
			list, err := g.Outbox(d.Taken(), 500)
			var blocks []abuse.Block
			for _, b := range list {
				blocks = append(blocks, reportBlock(b))
			}
			if err == nil && len(blocks) > 0 {
				err = d.Take(blocks...)
			}
			if err != nil && !told { // once: the disk may be full for hours
				log.Error("blocks are not gathered for reports; tried again", "err", err)
			}
			told = err != nil
			if err != nil || len(list) == 0 {
				break
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// allowedNow returns what the guard never blocks, not older than a minute.
func allowedNow(ctx context.Context, g *guard.Guard) func() []netip.Prefix {
	return remembered(time.Now, func() (list []netip.Prefix, err error) {
		short, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		infos, err := g.Allowed(short)
		for _, i := range infos {
			if i.Named == nil {
				list = append(list, i.Prefix)
				continue
			}
			for _, k := range i.Named.Prefixes {
				list = append(list, k.Prefix)
			}
		}
		return list, err
	})
}

// remembered asks for a list at most once a minute, and where that failed, which
// may have taken long, after ten seconds: until then it is as it was.
func remembered(now func() time.Time, ask func() ([]netip.Prefix, error)) func() []netip.Prefix {
	var mu sync.Mutex
	var list []netip.Prefix
	var next time.Time
	return func() []netip.Prefix {
		mu.Lock()
		defer mu.Unlock()
		if now().Before(next) {
			return list
		}
		if l, err := ask(); err == nil {
			list, next = l, now().Add(time.Minute)
		} else {
			next = now().Add(10 * time.Second) // the gate has refused them before
		}
		return list
	}
}

// evidenceLogs reads the followed logs again, with those that were rotated.
type evidenceLogs struct {
	paths []string
	zone  *time.Location
	only  bool // these files and no others
}

func (l *evidenceLogs) Scan(ctx context.Context, from, to time.Time, fn func(*detector.Event, []byte) error) (reach time.Time, err error) {
	e := &env{}
	var stopped error
	hand := func(ev *detector.Event, line []byte) error {
		stopped = fn(ev, line)
		return stopped
	}
	var faults []error // of a file or two; the others are read
	for _, path := range l.paths {
		p := exim.New(l.zone)
		names := []string{path}
		if !l.only {
			names = filesSince(path, from)
		}
		if !l.only && tail.KindOf(path) == tail.Journal {
			first, err := scanJournal(ctx, p, from, to, hand)
			if !first.IsZero() && (reach.IsZero() || first.Before(reach)) {
				reach = first
			}
			if err != nil {
				err = fmt.Errorf("reading the journal: %w", err)
				if stopped != nil || ctx.Err() != nil {
					return reach, err
				}
				faults = append(faults, err)
			}
		}
		for _, name := range names {
			f, err := e.openLog(name)
			if errors.Is(err, os.ErrNotExist) {
				continue // rotated away just now
			}
			if err != nil {
				faults = append(faults, fmt.Errorf("reading %s: %w", name, err))
				continue
			}
			p.SetReference(f.modified)
			first, err := scanLog(ctx, f, p, from, to, hand)
			f.close()
			if !first.IsZero() && (reach.IsZero() || first.Before(reach)) {
				reach = first
			}
			if err != nil {
				err = fmt.Errorf("reading %s: %w", name, err)
				if stopped != nil || ctx.Err() != nil {
					return reach, err
				}
				faults = append(faults, err)
			}
		}
	}
	if err := errors.Join(faults...); err != nil {
		return reach, &abuse.Unread{Err: err}
	}
	return reach, nil
}

// generations are the files of a log that may hold lines from a time on, the
// oldest first: those that it was rotated to, and the log itself.
func generations(path string, from time.Time) (names []string) {
	for _, name := range append(tail.Rotated(path), path) {
		fi, err := os.Stat(name)
		if err == nil && fi.Mode().IsRegular() && !fi.ModTime().Before(from) {
			names = append(names, name)
		}
	}
	return names
}

// scanLog hands out the events of one file between two times, and returns the
// time of its first line.
func scanLog(ctx context.Context, r io.Reader, p *exim.Parser, from, to time.Time, fn func(*detector.Event, []byte) error) (first time.Time, err error) {
	br := bufio.NewReaderSize(r, maxLine)
	var ev detector.Event
	for n := 0; ; n++ {
		if n%4096 == 0 && ctx.Err() != nil {
			return first, ctx.Err()
		}
		line, err := br.ReadSlice('\n')
		long := false
		for errors.Is(err, bufio.ErrBufferFull) { // longer than any of Exim's: nothing of it is believed
			long = true
			_, err = br.ReadSlice('\n')
		}
		if line = bytes.TrimSuffix(line, []byte("\n")); len(line) > 0 && !long && p.Parse(line, &ev) && !ev.Time.IsZero() {
			if first.IsZero() {
				first = ev.Time
			}
			if !ev.Time.Before(from) && !ev.Time.After(to) && ev.Kind != detector.Tick {
				if err := fn(&ev, line); err != nil {
					return first, err
				}
			}
		}
		if err == io.EOF {
			return first, nil
		}
		if err != nil {
			return first, err
		}
	}
}
