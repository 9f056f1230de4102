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
type csfDebts struct {
	path string // empty: in memory only
	bans []csfBan
	read bool
}

func debtsIn(dir string) csfDebts {
	if dir == "" {
		return csfDebts{}
	}
	return csfDebts{path: filepath.Join(dir, "csf.owed")}
}

// load reads what an earlier process owes.
func (d *csfDebts) load() error {
	if d.path == "" || d.read {
		return nil
	}
	info, err := os.Stat(d.path)
	if err == nil && time.Since(info.ModTime()) < csfDebtAge {
		err = eachLine(d.path, func(line string) error {
			if b, ok := parseCSFBan(line); ok && b.prefix.IsValid() {
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

// owe writes bans down that the next csf -trd takes along.
func (c *csf) owe(bans []csfBan) error {
	if len(bans) == 0 {
		return nil
	}
	c.debts.bans = append(c.debts.bans, bans...)
	if err := c.debts.save(); err != nil {
		return fmt.Errorf("writing down which bans of others CSF is about to drop: %w", err)
	}
	return nil
}

// settle pays what is owed.
func (c *csf) settle(ctx context.Context) error {
	err := c.debts.load()
	owed := c.debts.bans
	if err == nil && len(owed) > 0 {
		c.debts.bans, err = c.putBack(ctx, owed)
		err = errors.Join(err, c.debts.save())
	}
	if err != nil {
		return fmt.Errorf("having CSF take back bans that are not ours: %w", err)
	}
	return nil
}

// csfUnsafe is what a comment of others must not have when it goes back.
var csfUnsafe = regexp.MustCompile(`[^A-Za-z0-9 .:=_/()]+`)

var csfPorts = regexp.MustCompile(`^[\w,;]*$`)

// putBack bans again what csf -trd took along, and gives those that it could
// not. What ours stands for is left out by CSF itself.
func (c *csf) putBack(ctx context.Context, others []csfBan) (left []csfBan, err error) {
	there, err := c.bans(ctx)
	if err != nil {
		return others, err
	}
	var errs []error
	var paid []csfBan
	for _, b := range others {
		ttl := int64(time.Until(b.until()) / time.Second)
		if ttl < csfMinTTL || !csfPorts.MatchString(b.ports) || !slices.Contains([]string{"in", "out", "inout"}, b.dir) ||
			slices.ContainsFunc(there, func(t csfBan) bool { return t.prefix == b.prefix && t.ports == b.ports && !t.ours() }) {
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
	// csf exits with 0 whatever came of it: its file has the truth. A ban of
	// ours with the same ports stands for theirs.
	if there, err = c.bans(ctx); err != nil {
		return others, errors.Join(append(errs, err)...)
	}
	for _, b := range paid {
		if !slices.ContainsFunc(there, func(t csfBan) bool { return t.prefix == b.prefix && t.ports == b.ports }) {
			left = append(left, b)
			errs = append(errs, fmt.Errorf("csf -td %s: it did not ban it", csfText(b.prefix)))
		}
	}
	return left, errors.Join(errs...)
}
