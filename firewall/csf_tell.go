package firewall

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"
)

const (
	// csfTold ends the comment of the bans that only tell: what shows them is
	// not what drops the packets.
	csfTold = ": lift it with smtpguard unblock"
	// csfTellMost bounds the blocks that CSF is told of. Each is a call of half
	// a second and a rule for each port, and more than that nobody reads.
	csfTellMost = 100
	// csfMargin is the part of DENY_TEMP_IP_LIMIT that is left free for lfd:
	// beyond the limit it drops the oldest bans, whosever they are.
	csfMargin = 5 // a fifth
	// csfTellEvery is the least time between two blocks that CSF is told of: in
	// a flood its Perl may have a tenth of a processor. Removals do not wait.
	csfTellEvery = 5 * time.Second
	// csfTellLook is how often CSF's bans are looked at when nothing is to be
	// done: those of others may have become more.
	csfTellLook = 30 * time.Second
	// csfTellRefused is how long a block that CSF refused is not tried again.
	csfTellRefused = 10 * time.Minute
	// csfTellWorth is how long a block must last to be worth telling.
	csfTellWorth = 30 * time.Second
)

// CSFTeller tells CSF whom another backend blocks, so that its panel shows them
// and lfd knows: as temporary bans with our comment, of as many as CSF has room
// for. They are a copy, never the truth: what is missing among them or too many
// is put right. It does nothing while CSF is not installed.
type CSFTeller struct {
	c     *csf
	every time.Duration
	wake  chan struct{}

	next    time.Time // when a block may be told
	refused map[netip.Prefix]time.Time
	over    []netip.Prefix // bans of blocks that have ended

	mu     sync.Mutex
	wanted []Entry
	told   bool // Tell was called
	status CSFStatus
}

// CSFStatus is what CSF has been told.
type CSFStatus struct {
	// Told are the blocks that CSF shows, of Of; Most are those that it has room
	// for. Over are blocks that have ended and that it shows still.
	Told int `json:"told"`
	Of   int `json:"of"`
	Most int `json:"most"`
	Over int `json:"over"`
	// Error says why CSF could not be told.
	Error string `json:"error,omitempty"`
}

// NewCSFTeller returns a teller for this machine's CSF. Of o it takes the
// ports, the network namespace and the state directory. The error is about o.
func NewCSFTeller(o Options) (*CSFTeller, error) {
	fw, err := NewCSF(o)
	if err != nil {
		return nil, err
	}
	return newCSFTeller(fw.(*csf)), nil
}

func newCSFTeller(c *csf) *CSFTeller {
	c.comment = csfComment + csfTold
	return &CSFTeller{c: c, every: csfTellEvery, wake: make(chan struct{}, 1), refused: make(map[netip.Prefix]time.Time)}
}

// Tell says what is in force now, the most important blocks first. It returns
// at once; what was said before is forgotten.
func (t *CSFTeller) Tell(wanted []Entry) {
	t.mu.Lock()
	t.wanted, t.told = wanted, true
	t.mu.Unlock()
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// Status may be called by any goroutine.
func (t *CSFTeller) Status() CSFStatus {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.status
}

// Run keeps CSF informed until ctx ends, at its own pace. It calls changed with
// an error when CSF cannot be told any more, and with nil when it can again.
func (t *CSFTeller) Run(ctx context.Context, changed func(error)) {
	pause, failing := time.Duration(0), false
	for {
		more, err := t.pass(ctx)
		if ctx.Err() != nil {
			return
		}
		if (err != nil) != failing {
			failing = err != nil
			changed(err)
		}
		wake, wait := t.wake, csfTellLook
		switch {
		case err != nil:
			pause = min(max(2*pause, 2*time.Second), time.Minute)
			wake, wait = nil, pause
		case more:
			wait = max(time.Until(t.next), t.every/10)
		}
		if err == nil {
			pause = 0
		}
		select {
		case <-ctx.Done():
			return
		case <-wake:
		case <-time.After(wait):
		}
	}
}

// Settle takes away what is over, until it is done or ctx ends, for a command
// that works without a daemon. Run must not be running. What is left is named by
// a *RemainError, and found by the next teller.
func (t *CSFTeller) Settle(ctx context.Context) error {
	for {
		_, err := t.pass(ctx)
		err = cmp.Or(err, ctx.Err())
		switch {
		case len(t.over) > 0 && err != nil:
			return &RemainError{Prefixes: t.over, Err: err}
		case len(t.over) == 0 || err != nil:
			return err
		}
	}
}

// pass compares what CSF has with what it should have, takes away what is over,
// and tells of one block if it is time. more: there is more to do.
func (t *CSFTeller) pass(ctx context.Context) (more bool, err error) {
	t.mu.Lock()
	wanted, told := t.wanted, t.told
	t.mu.Unlock()
	if !told {
		return false, nil
	}
	var s CSFStatus
	defer func() {
		if shown := cmp.Or(err, t.c.debts.err); shown != nil && (err != nil || s.Error == "") {
			s.Error = shown.Error()
		}
		t.mu.Lock()
		t.status = s
		t.mu.Unlock()
	}()
	c := t.c
	if !fileExists(c.paths.file("csf.conf")) {
		return false, nil
	}
	c.settleDue(ctx) // also when nothing changes: bans of others are owed
	s.Of = len(wanted)
	bans, err := c.bans(ctx)
	if err != nil {
		return false, err
	}
	if len(wanted) == 0 && !slices.ContainsFunc(bans, csfBan.ours) {
		return false, nil // CSF may be in what state it likes
	}
	if err := c.ready(ctx); err != nil {
		return false, err
	}
	var lfd error
	if !c.lfd {
		wanted, lfd = nil, errors.New("lfd does not run, and nobody would end what CSF is told; systemctl start lfd")
	}
	now := time.Now()
	want, missing := t.choose(wanted, bans, now, &s)
	over := make(map[netip.Prefix]bool)
	for _, b := range bans {
		if _, ok := want[b.prefix]; b.ours() && !ok && b.prefix.IsValid() && (b.until().After(now) || !c.lfd) {
			over[b.prefix] = true
		}
	}
	s.Told = len(want) - len(missing)
	s.Over = len(over)
	t.over = slices.SortedFunc(maps.Keys(over), netip.Prefix.Compare)
	if len(over) > 0 {
		res, err := c.change(ctx, plan{unset: t.over})
		s.Over = len(res.Failed)
		t.over = nil
		for _, f := range res.Failed {
			t.over = append(t.over, f.Prefix)
		}
		if err != nil && s.Over == len(over) {
			return true, err
		}
	}
	if len(missing) > 0 && !now.Before(t.next) {
		t.next = now.Add(t.every)
		e := missing[0]
		_, err := c.change(ctx, plan{set: []Entry{e}})
		switch {
		case err == nil:
			s.Told++
		case errors.Is(err, ErrUnavailable), errors.Is(err, ErrGone), errors.Is(err, ErrUnknown), ctx.Err() != nil:
			return true, err
		default:
			t.refused[e.Prefix] = now
			s.Error = err.Error()
		}
	}
	return s.Over > 0 || s.Told < len(want), lfd
}

// choose says which of the blocks CSF should have, and which of those it lacks.
func (t *CSFTeller) choose(wanted []Entry, bans []csfBan, now time.Time, s *CSFStatus) (want map[netip.Prefix]Entry, missing []Entry) {
	c := t.c
	others, mine := 0, make(map[netip.Prefix]csfBan)
	foreign := make(map[netip.Prefix]bool)
	for _, b := range bans {
		switch {
		case !b.until().After(now):
		case b.ours():
			mine[b.prefix] = b
		default:
			others++
			foreign[b.prefix] = true
		}
	}
	s.Most = csfTellMost
	if limit := c.conf.tempLimit; limit > 0 {
		s.Most = max(0, min(s.Most, limit-limit/csfMargin-others))
	}
	for p, at := range t.refused {
		if now.Sub(at) > csfTellRefused {
			delete(t.refused, p)
		}
	}
	want = make(map[netip.Prefix]Entry)
	for _, e := range wanted {
		if len(want) == s.Most {
			break
		}
		b, have := mine[e.Prefix]
		_, refused := t.refused[e.Prefix]
		switch {
		case !e.Until.After(now), checkPrefix(e.Prefix) != nil, e.Prefix.Addr().Is6() && !c.conf.ipv6:
		case have && c.fits(b, e), c.held[e.Prefix].After(now): // csf.deny has it
			want[e.Prefix] = e
		case foreign[e.Prefix], refused, e.Until.Sub(now) < csfTellWorth:
			// It is shown already, or would have to go to make place for ours.
			if have {
				want[e.Prefix] = e
			}
		default:
			want[e.Prefix] = e
			missing = append(missing, e)
		}
	}
	return want, missing
}
