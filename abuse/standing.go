package abuse

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"
)

// overridesFile is the overrides, read again when the file has changed.
type overridesFile struct {
	path string // empty: there is none

	mu   sync.Mutex
	mod  time.Time
	size int64
	all  []Override
	err  error
}

// read returns the overrides. After an error they are those of the lines that
// could be read, or of the last time when the file could be.
func (f *overridesFile) read() ([]Override, error) {
	if f.path == "" {
		return nil, nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	fi, err := os.Stat(f.path)
	if err != nil {
		f.err, f.mod = fmt.Errorf("the overrides file: %w", err), time.Time{}
		return f.all, f.err
	}
	if fi.ModTime().Equal(f.mod) && fi.Size() == f.size {
		return f.all, f.err
	}
	text, err := readBounded(f.path, maxBody)
	if err == nil {
		f.all, err = ParseOverrides(text)
	}
	f.mod, f.size, f.err = fi.ModTime(), fi.Size(), nil
	if err != nil {
		f.err = fmt.Errorf("the overrides file %s: %w", f.path, err)
	}
	return f.all, f.err
}

// overridden are the overrides as far as they can be read; what is wrong with
// them is logged once.
func (d *Desk) overridden() ([]Override, error) {
	all, err := d.overrides.read()
	if err != nil {
		d.tell("overrides", err.Error(), func() { d.log.Error("the overrides file has faults; nothing is sent until it has none", "err", err) })
	} else {
		d.tell("overrides", "", nil)
	}
	return all, err
}

// unreportable says why a network is not reported, "" if it is. ases are the
// origins as far as they are known. m is its mail, nil: none yet. A single
// address that is allowed because it is a mail server of the recipients is
// theirs: it makes nothing around it ours.
func (d *Desk) unreportable(p netip.Prefix, ases []uint32, overrides []Override, m *Mail) string {
	if d.config.Redirect == "" && isReserved(p) {
		return p.String() + " is reserved: nobody is responsible for it"
	}
	if s := d.spared(p, m.exempts); s.IsValid() {
		return fmt.Sprintf("%s is our own or allowed (%s)", p, s)
	}
	if o := findNever(overrides, ases, p); o != nil {
		return fmt.Sprintf("the overrides file says never to report %s", o.of())
	}
	return ""
}

// spared is a network of our own or an allowed one that overlaps p, other than
// those that an exception is made for; the zero Prefix: none.
func (d *Desk) spared(p netip.Prefix, except ...func(allowed, p netip.Prefix) bool) netip.Prefix {
	if d.o.Spare == nil {
		return netip.Prefix{}
	}
	for _, s := range d.o.Spare() {
		if s.Overlaps(p) && !slices.ContainsFunc(except, func(f func(allowed, p netip.Prefix) bool) bool { return f(s, p) }) {
			return s
		}
	}
	return netip.Prefix{}
}

// exempts reports whether an allowed prefix inside p is no more than a mail
// server of the mail's recipients, which the mail does not accuse itself.
func (m *Mail) exempts(allowed, p netip.Prefix) bool {
	return m != nil && allowed.IsSingleIP() && allowed.Bits() > p.Bits() && slices.Contains(m.Servers, allowed.Addr()) && !m.accuses(allowed.Addr())
}

// accuses reports whether an address is named as a source.
func (m *Mail) accuses(a netip.Addr) bool {
	return slices.ContainsFunc(m.Facts.Sources, func(s Source) bool { return s.Prefix == single(a) })
}

// letIn says how the answers of a desk whose mail server we block can reach us.
func (m *Mail) letIn(a netip.Addr) string {
	if m.accuses(a) {
		return "it is itself one of the sources; name another recipient, or approve with --blocked-desk and look for their answer elsewhere"
	}
	return fmt.Sprintf("`smtpguard allow add %s` lets it in, and the report stays as it is; or approve with --blocked-desk", a)
}

// ases are all origins that a case may have.
func (c *Case) ases(o Origin) []uint32 {
	all := append([]uint32{c.AS, o.AS}, o.ASes...)
	return slices.DeleteFunc(all, func(n uint32) bool { return n == 0 })
}

// barred says what stands against a mail being sent, whoever approved it: it
// is asked when a mail is approved and again just before it is handed over.
// nil: nothing. d.mu is held.
func (d *Desk) barred(c *Case, m *Mail) *Refusal {
	live := c.of(m).prefixes()
	switch {
	case len(live) == 0:
		return &Refusal{"every block of it was lifted by an operator", "withdraw it; if somebody inside a block was allowed just now, the rest of it is here in some seconds"}
	case m.Outdated:
		return &Refusal{"what it tells has changed since it was drafted (a block was taken back, or more joined)",
			"it is made anew within a minute; look at it again with `smtpguard reports show " + c.ID + "`"}
	case m.To.Address == "":
		return &Refusal{"there is no recipient", "`smtpguard reports edit " + c.ID + " --to ADDRESS` names one"}
	}
	for _, r := range []Contact{m.To, m.Cc} {
		if r.Address == "" {
			continue
		}
		if _, err := CheckAddress(r.Address); err != nil || isRegistry(r.Address) {
			return &Refusal{r.Address + " is not an address that reports go to", "`smtpguard reports edit` names another"}
		}
	}
	overrides, err := d.overridden()
	if err != nil {
		return &Refusal{err.Error(), "mend it: it may say never to report this network"}
	}
	for _, p := range live { // not what lies between them
		if why := d.unreportable(p, c.ases(m.Origin), overrides, m); why != "" {
			return &Refusal{why, "withdraw it"}
		}
	}
	return nil
}

// blockedDesk sets which of the recipients' own mail servers we block now.
func (d *Desk) blockedDesk(c *Case, m *Mail) {
	m.Desk = nil
	for _, a := range m.Servers {
		in := d.o.Blocked == nil && slices.ContainsFunc(c.prefixes(), func(p netip.Prefix) bool { return p.Contains(a) })
		if d.o.Blocked != nil {
			_, in = d.o.Blocked(a)
		}
		if in {
			m.Desk = append(m.Desk, a)
		}
	}
}

// tell logs something once: again only when what is said of key has changed.
// Empty text forgets.
func (d *Desk) tell(key, text string, log func()) {
	d.telling.Lock()
	same := d.told[key] == text
	if text == "" {
		delete(d.told, key)
	} else {
		if len(d.told) >= maxCases { // of cases that are long gone
			clear(d.told)
		}
		d.told[key] = text
	}
	d.telling.Unlock()
	if !same && text != "" {
		log()
	}
}
