package abuse

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"
)

// Withdrawal is a person's word that a network is not to be reported. It
// outlives the case that it was said of: until Until, new blocks of the network
// are gathered, but nothing is drafted or sent of them.
type Withdrawal struct {
	Network netip.Prefix `json:"network"`
	AS      uint32       `json:"as,omitempty"` // 0: whoever announces it
	Case    string       `json:"case"`
	By      string       `json:"by"`
	Note    string       `json:"note,omitempty"`
	At      time.Time    `json:"at"`
	Until   time.Time    `json:"until"`
}

// withdrewWarning is in what is said of a withdrawal.
const withdrewWarning = " withdrew the report on "

// String says it to a person.
func (w *Withdrawal) String() string {
	s := fmt.Sprintf("%s"+withdrewWarning+"%s (%s) on %s", clean(w.By, 40), w.Network, w.Case, w.At.UTC().Format("2006-01-02"))
	if w.Note != "" {
		s += ": " + clean(w.Note, 60)
	}
	return s + fmt.Sprintf("; nothing is sent by itself before %s", w.Until.UTC().Format("2006-01-02 15:04 UTC"))
}

// keyWithdrawn is the record with all withdrawals.
const keyWithdrawn = "withdrawn"

// maxWithdrawn bounds them; the oldest goes first.
const maxWithdrawn = 1000

// readWithdrawn reads them at the start.
func (d *Desk) readWithdrawn() error {
	v, err := d.o.Store.Record(kindState, keyWithdrawn)
	if err == nil && len(v) > 0 {
		err = json.Unmarshal(v, &d.withdrawn)
	}
	if err != nil {
		return fmt.Errorf("reading which reports were withdrawn: %w", err)
	}
	return nil
}

// setWithdrawn writes them down; d.mu is held.
func (d *Desk) setWithdrawn(all []Withdrawal) error {
	now := d.now()
	all = slices.DeleteFunc(all, func(w Withdrawal) bool { return !now.Before(w.Until) })
	all = all[max(0, len(all)-maxWithdrawn):]
	v, err := json.Marshal(all)
	if err == nil {
		err = d.o.Store.SetRecord(kindState, keyWithdrawn, v)
	}
	if err != nil {
		return fmt.Errorf("noting what was withdrawn: %w", err)
	}
	d.withdrawn = all
	return nil
}

// about reports whether a case tells of the withdrawn network: of the same AS,
// as far as both are known.
func (w *Withdrawal) about(c *Case) bool {
	if w.AS != 0 && c.Certain && w.AS != c.AS {
		return false
	}
	return slices.ContainsFunc(c.prefixes(), w.Network.Overlaps)
}

// withdrawal is the newest one that is in force for a case, nil: none. d.mu is
// held.
func (d *Desk) withdrawal(c *Case) *Withdrawal {
	now := d.now()
	for i := range slices.Backward(d.withdrawn) {
		if w := &d.withdrawn[i]; now.Before(w.Until) && w.about(c) {
			return w
		}
	}
	return nil
}

// withdrawnLook is how often a withdrawn network whose origin is not known is
// looked up, for it may be somebody else's part.
const withdrawnLook = 6 * time.Hour

// waitsForPerson holds a case without a draft whose network a person withdrew.
// It reports whether it does; d.mu is held.
func (d *Desk) waitsForPerson(c *Case) bool {
	w := d.withdrawal(c)
	if w == nil || len(c.Mails) > 0 {
		return false
	}
	d.retry[c.ID] = d.now().Add(withdrawnLook)
	d.hold(c.ID, w.String()+", or `smtpguard reports reopen "+c.ID+"`")
	return true
}

// heldBack is waitsForPerson for a case that was looked up.
func (d *Desk) heldBack(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.cases[id]
	return c == nil || d.waitsForPerson(c)
}

// Reopen takes back what Withdraw or CloseCase said: reports on the network are
// drafted again. The case is as before, unless another one has gathered its
// network since; that one is returned then.
func (d *Desk) Reopen(id, by string) (Case, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, err := d.get(id)
	if err != nil {
		return Case{}, err
	}
	mine := func(w Withdrawal) bool { return w.Case == now.ID || w.about(now) }
	if !now.State.over() && !slices.ContainsFunc(d.withdrawn, mine) || now.State.over() && (now.MergedInto != "" || len(now.live()) == 0) {
		return Case{}, fmt.Errorf("%w: %s is %s, and no person's word stands against it", ErrState, now.ID, now.State)
	}
	if err := d.setWithdrawn(slices.DeleteFunc(slices.Clone(d.withdrawn), mine)); err != nil {
		return Case{}, err
	}
	c := now.clone()
	if now.State.over() {
		for _, o := range d.cases {
			if o.open(d.now(), d.config.Quiet) && slices.ContainsFunc(o.prefixes(), now.Network.Overlaps) {
				delete(d.retry, o.ID)
				d.poke()
				return *o.clone(), nil
			}
		}
		back := Gathering
		if m := c.mail(); m != nil {
			back = Drafted
			m.Outdated, m.Hand = true, by
			if slices.ContainsFunc(m.Attempts, Attempt.mayHaveLeft) {
				back, m.Outdated = Sent, false
			}
		}
		c.Why = ""
		c.move(back, by, "reopened", d.now())
		if err := d.save(c); err != nil {
			return Case{}, err
		}
		*now = *c
	}
	delete(d.retry, c.ID)
	d.poke()
	return *c.clone(), nil
}
