package firewall

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

// csfDebtAge is how old a debt may be. What was lost longer ago is left so: by
// now somebody may have lifted it, and would find it back without knowing why.
const csfDebtAge = time.Hour

// csfDebts are bans of others that csf -trd takes along, because it removes
// all bans of an address. They are written down before it is called, in a file
// in the form of csf.tempban, so that they are banned again also by the next
// process.
//
// CSF has one ban of the same address and ports. Where that is ours, theirs
// stays owed until ours has ended.
type csfDebts struct {
	path  string // empty: in memory only
	bans  []csfBan
	read  bool
	err   error     // why they could not be paid lately
	again time.Time // when that is tried again
}

// csfDebtPause is how long a debt rests that CSF did not take back.
const csfDebtPause = 30 * time.Second

func debtsIn(dir string) csfDebts {
	if dir == "" {
		return csfDebts{}
	}
	return csfDebts{path: filepath.Join(dir, "csf.owed")}
}

// load reads what an earlier process owes. there are CSF's bans now.
func (d *csfDebts) load(there []csfBan) error {
	if d.path == "" || d.read {
		return nil
	}
	info, err := os.Stat(d.path)
	if err == nil {
		old := time.Since(info.ModTime()) >= csfDebtAge
		err = eachLine(d.path, func(line string) error {
			if b, ok := parseCSFBan(line); ok && b.prefix.IsValid() && (!old || b.standsFor(there, true)) && len(d.bans) < csfDebtsMost {
				d.bans = append(d.bans, b)
			}
			return nil
		})
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	d.read = true
	return nil
}

// save writes down what is owed now.
func (d *csfDebts) save() error {
	if d.path == "" {
		return nil
	}
	if len(d.bans) == 0 {
		if err := os.Remove(d.path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}
	var text bytes.Buffer
	for _, b := range d.bans {
		fmt.Fprintf(&text, "%d|%s|%s|%s|%d|%s\n", b.since.Unix(), csfText(b.prefix), b.ports, b.dir, b.ttl/time.Second, b.comment)
	}
	f, err := os.CreateTemp(filepath.Dir(d.path), "csf.owed-*")
	if err != nil {
		return err
	}
	_, err = f.Write(text.Bytes())
	if err = errors.Join(err, f.Sync(), f.Close()); err == nil {
		err = os.Rename(f.Name(), d.path)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // err is told
	}
	return err
}

// standsFor tells whether one of the bans, of ours or of others, is of the
// address and the ports of b.
func (b csfBan) standsFor(bans []csfBan, ours bool) bool {
	return slices.ContainsFunc(bans, func(t csfBan) bool { return t.prefix == b.prefix && t.ports == b.ports && t.ours() == ours })
}

// csfDebtsMost bounds what is owed. DENY_TEMP_IP_LIMIT is 100 as shipped.
const csfDebtsMost = 10_000

// owe writes bans down that the next csf -trd takes along.
func (c *csf) owe(bans []csfBan) error {
	if len(bans) == 0 {
		return nil
	}
	if len(c.debts.bans)+len(bans) > csfDebtsMost {
		return fmt.Errorf("CSF is about to drop bans of others, and %d of those are owed already", len(c.debts.bans))
	}
	c.debts.again = time.Time{}
	c.debts.bans = append(c.debts.bans, bans...)
	if err := c.debts.save(); err != nil {
		return fmt.Errorf("writing down which bans of others CSF is about to drop: %w", err)
	}
	return nil
}

// settle pays what is owed, as far as it can be. What cannot is kept, told by
// Warnings and tried again: our own changes do not wait for it. csfTurn is held.
func (c *csf) settle(ctx context.Context) {
	d := &c.debts
	if d.read && len(d.bans) == 0 || time.Now().Before(d.again) {
		return
	}
	there, err := c.bans(ctx)
	if err == nil {
		err = d.load(there)
	}
	if err == nil && len(d.bans) > 0 {
		err = c.ready(ctx)
	}
	if err == nil && len(d.bans) > 0 {
		before := len(d.bans)
		d.bans, err = c.putBack(ctx, d.bans, there)
		if len(d.bans) != before {
			err = errors.Join(err, d.save())
		}
	}
	if d.err = nil; err != nil {
		d.err = fmt.Errorf("bans of others that CSF dropped together with ours are not back yet: %w", err)
		d.again = time.Now().Add(csfDebtPause)
	}
}

// settleDue is settle where nothing else is to be done.
func (c *csf) settleDue(ctx context.Context) {
	csfTurn.Lock()
	defer csfTurn.Unlock()
	c.settle(ctx)
}

// csfUnsafe is what a comment of others must not have when it goes back.
var csfUnsafe = regexp.MustCompile(`[^A-Za-z0-9 .:=_/()]+`)

var csfPorts = regexp.MustCompile(`^[\w,;]*$`)

// putBack bans again what csf -trd took along, and gives what it could not or
// what must wait for the end of ours. there are CSF's bans now.
func (c *csf) putBack(ctx context.Context, owed, there []csfBan) (left []csfBan, err error) {
	var errs []error
	var paid []csfBan
	now := time.Now()
	end := now.Add(c.budget)
	for _, b := range owed {
		ttl := int64(time.Until(b.until()) / time.Second)
		switch {
		case ttl < csfMinTTL || !csfPorts.MatchString(b.ports) || !slices.Contains([]string{"in", "out", "inout"}, b.dir):
			continue // it has run out, or is none
		case b.standsFor(there, false):
			continue
		case b.standsFor(there, true):
			left = append(left, b)
			continue
		case c.book.until[b.prefix] > now.Add(csfSlack).UnixNano() && b.ports == c.ports:
			continue // ours should be there: somebody has lifted all bans of the address
		case ctx.Err() != nil || time.Now().After(end): // our own changes wait
			left = append(left, b)
			continue
		}
		err := c.pace(ctx)
		if err == nil {
			comment := cmp.Or(strings.Join(strings.Fields(csfUnsafe.ReplaceAllString(b.comment, " ")), " "), "temporary ban")
			_, err = c.deny(ctx, b.prefix, ttl, b.ports, b.dir, comment)
		}
		if err != nil {
			left = append(left, b)
			errs = append(errs, err)
			continue
		}
		paid = append(paid, b)
	}
	if len(paid) == 0 {
		return left, errors.Join(errs...)
	}
	// csf exits with 0 whatever came of it: its files have the truth.
	if there, err = c.bans(ctx); err != nil {
		return append(left, paid...), errors.Join(append(errs, err)...)
	}
	for _, b := range paid {
		if b.standsFor(there, false) {
			continue
		}
		if denied, err := csfDenies(c.paths.file("csf.deny"), b.prefix); err != nil || denied {
			errs = append(errs, err)
			continue // CSF blocks it for good by now, and takes no temporary ban
		}
		left = append(left, b)
		errs = append(errs, fmt.Errorf("csf -td %s: it did not ban it", csfText(b.prefix)))
	}
	return left, errors.Join(errs...)
}
