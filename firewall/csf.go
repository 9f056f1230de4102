package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"net/netip"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// csfComment marks our bans in csf.tempban, in csf -t and in csf -g. CSF
// searches the comment for options (-p, -d) and splits its files at |: only
// letters, digits, blanks and .:=_/ are safe.
const csfComment = "smtpguard: connection flood"

const (
	// csfInterval is the least time between two calls: each is half a second
	// of Perl, and holds up whoever else wants to change the firewall.
	csfInterval = time.Second / 3
	// csfBudget is how long one Apply or Replace goes on making calls. The
	// rest is failed, for the caller to try again: nothing else is decided
	// meanwhile.
	csfBudget = 3 * time.Second
	// csfForever is a budget without an end.
	csfForever = 1000 * time.Hour
	// csfTimeout bounds a call. Longer than that of other backends: a call
	// that is killed half-way may leave a rule without a line in csf.tempban.
	csfTimeout = 10 * time.Second
	// csfCall is how long a call takes on a busy machine: it is not begun later
	// than that before a deadline.
	csfCall = 2 * time.Second
	// csfSlack is by how much an end may differ from what was asked for: CSF
	// counts whole seconds from when it gets to write its file.
	csfSlack = 5 * time.Second
	// csfMinTTL in seconds: CSF takes less than 2 for an hour.
	csfMinTTL = 2
	// csfOutputMax bounds what of a call's output is looked at, in bytes.
	csfOutputMax = 64 << 10
)

// csf has CSF block, through temporary bans of its own command. CSF tells
// success and failure only in prose, with exit status 0: what is in its files
// afterwards decides, the prose explains.
type csf struct {
	o        Options
	paths    csfPaths
	ports    string // as csf -p takes them; empty: all
	interval time.Duration
	budget   time.Duration
	book     book
	// held are entries that are in force without a ban of ours: csf.deny has
	// them, or a ban of somebody else that lasts as long.
	held map[netip.Prefix]time.Time
	// debts are bans of others that csf -trd took along.
	debts csfDebts
	// kernel is set where CSF's rules in the kernel are looked at as well; nil
	// in tests of its files alone.
	kernel *csfKernel

	comment string // of our bans; csfComment is how it begins
	command string // full path; empty: not probed
	conf    csfConf
	lfd     bool      // ends temporary bans
	last    time.Time // of the last call
}

// csfTurn is held while CSF's bans are changed: csf -trd takes along more than
// it should, and nobody else of ours may look in between.
var csfTurn sync.Mutex

// NewCSF returns the backend that blocks through CSF's own command, as
// temporary denies. Nothing is called until the first change. What CSF has in
// its files counts as in force when its rules are in the kernel too (csf -f
// leaves the files as they are).
// The error is about o; o.Hook has no effect, as CSF has its place in INPUT,
// and entries that overlap o.Allow are refused.
//
// CSF's DENY_TEMP_IP_LIMIT (100 as shipped) is respected: beyond it CSF drops
// the oldest bans without a word, so the backend is full then. Lines of
// csf.deny are never written nor removed, so DENY_IP_LIMIT does not matter.
//
// csf -trd removes all bans of an address, also those of others. They are
// banned again at once, or, where CSF takes ours for the same, when ours has
// ended (until then a ban of theirs that also stops outgoing packets does not),
// and written down in o.State before, so that a kill in between loses none.
func NewCSF(o Options) (Firewall, error) {
	c, err := newCSF(o, csfAt("/"), csfInterval)
	if err != nil {
		return nil, err
	}
	c.kernel = &csfKernel{netNS: o.NetNS, usual: csfConfDefault.commands}
	return c, nil
}

func newCSF(o Options, paths csfPaths, interval time.Duration) (*csf, error) {
	switch o.Hook {
	case "", "prerouting", "input":
	default:
		return nil, fmt.Errorf("hook %q is not known; it is one of prerouting, input", o.Hook)
	}
	ports := slices.Clone(o.Ports)
	slices.Sort(ports)
	var texts []string
	for _, p := range slices.Compact(ports) {
		texts = append(texts, strconv.Itoa(int(p)))
	}
	budget := csfBudget
	if o.Progress != nil {
		budget = csfForever
	}
	return &csf{
		o: o, paths: paths, comment: csfComment, ports: strings.Join(texts, ","), interval: interval, budget: budget,
		book: newBook(o), held: make(map[netip.Prefix]time.Time), debts: debtsIn(o.State),
	}, nil
}

func (c *csf) Name() string { return CSF }

// reason is how it works here, for Open.
func (c *csf) reason() string {
	why := "by temporary denies"
	if c.conf.tempLimit > 0 {
		why += fmt.Sprintf(", %d at most with those of others (DENY_TEMP_IP_LIMIT)", c.conf.tempLimit)
	}
	for _, w := range c.Warnings() {
		why += "; warning: " + w
	}
	return why
}

// Warnings is about settings of CSF as they were when it was last looked at.
func (c *csf) Warnings() []string {
	var w []string
	if c.command == "" {
		return nil
	}
	if !c.conf.ipv6 {
		w = append(w, `IPv6 is off in csf.conf, so IPv6 sources cannot be blocked; IPV6 = "1" and csf -r turn it on`)
	}
	if !c.lfd {
		w = append(w, "lfd does not run, so blocks do not end when smtpguard is dead; systemctl start lfd")
	}
	if c.conf.testing {
		w = append(w, `CSF is in TESTING mode: its cron job takes every rule away each five minutes; TESTING = "0" in csf.conf and csf -r end that`)
	}
	if c.debts.err != nil {
		w = append(w, c.debts.err.Error())
	}
	if c.kernel != nil && c.kernel.blind != nil {
		w = append(w, "whether CSF's rules are in the kernel cannot be seen: "+c.kernel.blind.Error())
	}
	return w
}

// Probe reads CSF's settings and state; it calls nothing.
func (c *csf) Probe(ctx context.Context) (Capabilities, error) {
	if err := ctx.Err(); err != nil {
		return Capabilities{}, err
	}
	const doing = "looking for CSF"
	command, err := lookSbin(c.paths.command)
	if err != nil {
		return Capabilities{}, fmt.Errorf("%s: %w: the command csf is not installed", doing, ErrUnavailable)
	}
	conf, err := readCSFConf(c.paths.file("csf.conf"))
	if err != nil {
		return Capabilities{}, fmt.Errorf("%s: %w: %w", doing, ErrUnavailable, err)
	}
	if err := c.working(); err != nil {
		return Capabilities{}, fmt.Errorf("%s: %w", doing, err)
	}
	c.command, c.conf, c.lfd = command, conf, lfdRuns(c.paths.pid)
	return Capabilities{
		IPv6: conf.ipv6, Prefixes: true, Timeouts: c.lfd, Readback: true, Expiry: true, Real: true,
		MaxEntries: conf.tempLimit, MaxTimeout: longestEntry,
	}, nil
}

// working tells why CSF would refuse everything.
func (c *csf) working() error {
	switch {
	case fileExists(c.paths.file("csf.disable")):
		return fmt.Errorf("%w: CSF is disabled; csf -e enables it", ErrUnavailable)
	case fileExists(c.paths.file("csf.error")):
		return fmt.Errorf("%w: CSF did not start and says why in %s; csf -r starts it again", ErrUnavailable, c.paths.file("csf.error"))
	}
	return nil
}

// ready makes sure that CSF is known and works. It reads csf.conf again, as
// that may have changed.
func (c *csf) ready(ctx context.Context) error {
	if c.command == "" {
		_, err := c.Probe(ctx)
		return err
	}
	if err := errors.Join(ctx.Err(), c.working()); err != nil {
		return err
	}
	conf, err := readCSFConf(c.paths.file("csf.conf"))
	if err != nil {
		return fmt.Errorf("reading CSF's settings: %w: %w", ErrUnavailable, err)
	}
	c.conf, c.lfd = conf, lfdRuns(c.paths.pid)
	return nil
}

// present reads which sources CSF's rules drop in the kernel; nil if that is
// not looked at. Without CSF's chain nothing is dropped, and a csf -td would be
// worse than none: CSF takes the failure of a rule for a fatal one, and opens
// the whole firewall.
func (c *csf) present(ctx context.Context) (map[netip.Prefix]bool, error) {
	if c.kernel == nil {
		return nil, nil
	}
	in, err := c.kernel.sources(ctx, c.conf, c.timeout())
	if errors.Is(err, ErrGone) && c.conf.testing {
		err = fmt.Errorf(`%w; CSF is in TESTING mode, whose cron job takes them away: TESTING = "0" in csf.conf ends that`, err)
	}
	return in, err
}

func (c *csf) bans(ctx context.Context) ([]csfBan, error) {
	bans, err := readCSFBans(ctx, c.paths.lib+"/csf.tempban", c.timeout())
	if err != nil {
		return nil, fmt.Errorf("reading CSF's temporary bans: %w: %w", ErrUnknown, err)
	}
	return bans, nil
}

func (c *csf) timeout() time.Duration { return max(c.o.Timeout, csfTimeout) }

// Ensure looks whether the bans that were made are still in csf.tempban. There
// is nothing of ours to build: changed means that some are missing.
func (c *csf) Ensure(ctx context.Context) (bool, error) {
	if err := c.ready(ctx); err != nil {
		return false, err
	}
	c.settleDue(ctx)
	found := make(map[netip.Prefix]bool)
	for in, err := range c.List(ctx) {
		if err != nil {
			return false, err
		}
		found[in.Prefix] = true
	}
	for _, e := range c.book.entries(time.Now().Add(csfSlack)) {
		if !found[e.Prefix] {
			return true, nil
		}
	}
	return false, nil
}

func (c *csf) Apply(ctx context.Context, b Batch) (Result, error) {
	p, res, err := planBatch(b, time.Now())
	if err != nil {
		return res, err
	}
	return c.change(ctx, p)
}

// Replace takes away and adds what differs: a ban that stays is not touched.
func (c *csf) Replace(ctx context.Context, entries []Entry) error {
	p, _, err := planBatch(Batch{Set: entries}, time.Now())
	if err != nil {
		return err
	}
	if err := c.ready(ctx); err != nil {
		return err
	}
	bans, err := c.bans(ctx)
	if err != nil {
		return err
	}
	wanted := make(map[netip.Prefix]bool)
	for _, e := range p.set {
		wanted[e.Prefix] = true
	}
	p.unset = nil
	for _, b := range bans {
		if b.ours() && b.prefix.IsValid() && !wanted[b.prefix] {
			wanted[b.prefix] = true // once
			p.unset = append(p.unset, b.prefix)
		}
	}
	for pfx := range c.held {
		if !wanted[pfx] {
			delete(c.held, pfx)
		}
	}
	res, err := c.change(ctx, p)
	if errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnknown) || errors.Is(err, ErrGone) || ctx.Err() != nil {
		return err
	}
	c.book.replace(slices.DeleteFunc(p.set, func(e Entry) bool { return !c.book.has(e.Prefix) }))
	return partial(res, err)
}

// change makes the changes one by one: removals first, they make room, then
// the widest prefixes.
func (c *csf) change(ctx context.Context, p plan) (Result, error) {
	fail := func(err error) (Result, error) { return failAll(p.prefixes(), err), err }
	csfTurn.Lock()
	defer csfTurn.Unlock()
	if err := c.ready(ctx); err != nil {
		return fail(err)
	}
	c.settle(ctx)
	bans, err := c.bans(ctx)
	if err != nil {
		return fail(err)
	}
	if _, err := c.present(ctx); err != nil && len(p.set) > 0 {
		return fail(err)
	}
	p, res, full := c.fit(bans, p, time.Now())
	slices.SortStableFunc(p.set, byWeight)
	var errs []error
	if full != nil {
		errs = append(errs, full)
	}
	stop := error(nil) // why nothing more is tried
	end := time.Now().Add(c.budget)
	left := len(p.set) + len(p.unset)
	of := left
	each := func(pfx netip.Prefix, f func() error) {
		err := stop
		if err == nil && time.Now().After(end) {
			err = fmt.Errorf("CSF takes about %d changes a second; %d are left for later", time.Second/csfInterval, left)
			stop = err
		}
		if err == nil {
			err = f()
		}
		left--
		if c.o.Progress != nil && stop == nil {
			c.o.Progress(of-left, of)
		}
		if err == nil {
			return
		}
		res.Failed = append(res.Failed, Failure{pfx, err})
		if len(errs) < 5 && (len(errs) == 0 || err != stop) {
			errs = append(errs, err)
		}
		if errors.Is(err, context.DeadlineExceeded) || ctx.Err() != nil || errors.Is(err, ErrUnavailable) || errors.Is(err, ErrUnknown) || errors.Is(err, ErrGone) {
			stop = err
		}
	}
	for _, pfx := range p.unset {
		each(pfx, func() error { return c.unset(ctx, pfx) })
	}
	for _, e := range p.set {
		each(e.Prefix, func() error { return c.set(ctx, e) })
	}
	return res, errors.Join(errs...)
}

// fit leaves out what CSF would drop other bans for.
func (c *csf) fit(bans []csfBan, p plan, now time.Time) (plan, Result, error) {
	all, mine, lasting := 0, make(map[netip.Prefix]bool), make(map[netip.Prefix]time.Time)
	for _, b := range bans {
		if !b.until().After(now) {
			continue // lfd is about to take it away
		}
		all++
		if b.ours() {
			mine[b.prefix] = true
		} else if b.drops(c.ports) && b.until().After(lasting[b.prefix]) {
			lasting[b.prefix] = b.until()
		}
	}
	others := all - len(mine)
	for _, pfx := range p.unset {
		delete(mine, pfx)
	}
	wanted := make(map[netip.Prefix]time.Time, len(p.set))
	for _, e := range p.set {
		wanted[e.Prefix] = e.Until
	}
	most := c.book.max
	if limit := c.conf.tempLimit; limit > 0 {
		most = min(most, limit-others)
	}
	return p.fit(most-len(mine), func(pfx netip.Prefix) bool {
		_, held := c.held[pfx]
		return mine[pfx] || held || lasting[pfx].After(wanted[pfx].Add(-csfSlack))
	}, func(over int) error {
		if most == c.book.max {
			return fmt.Errorf("%d entries would be in force, %d are allowed: %w", most+over, most, ErrFull)
		}
		return fmt.Errorf("CSF would have %d temporary bans and drops the oldest beyond %d; raise DENY_TEMP_IP_LIMIT in csf.conf: %w",
			max(most, len(mine))+others+over, c.conf.tempLimit, ErrFull)
	})
}

// set bans a prefix until its time. CSF does not extend a ban: an older one is
// removed first, which opens a gap of half a second.
func (c *csf) set(ctx context.Context, e Entry) error {
	doing := fmt.Sprintf("having CSF block %v", e.Prefix)
	if end := time.Now().Add(longestEntry); e.Until.After(end) {
		e.Until = end
	}
	if e.Prefix.Addr().Is6() && !c.conf.ipv6 {
		return fmt.Errorf("%s: IPV6 is off in csf.conf", doing)
	}
	for _, a := range c.o.Allow {
		if unmapPrefix(a).Overlaps(e.Prefix) {
			return fmt.Errorf("%s: it overlaps %v, which is allowed", doing, a)
		}
	}
	ours, others, err := c.bansOf(ctx, e.Prefix)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	dropped, err := c.present(ctx)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if len(ours) == 1 && c.fits(ours[0], e) && (dropped == nil || dropped[e.Prefix]) {
		c.note(e, false)
		return nil
	}
	inTheWay := len(ours) > 0
	for _, b := range others {
		if b.drops(c.ports) && b.until().After(e.Until.Add(-csfSlack)) && len(ours) == 0 {
			c.note(e, true)
			return nil
		}
		inTheWay = inTheWay || b.ports == c.ports // CSF would take it for the same
	}
	if inTheWay {
		if err := c.owe(others); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		// What is taken away here is put back below, though we be stopped.
		var end context.CancelFunc
		ctx, end = uncancelled(ctx)
		defer end()
		c.book.apply(plan{unset: []netip.Prefix{e.Prefix}})
		if err := c.call(ctx, "-trd", csfText(e.Prefix)); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
	}
	// What was asked for counts from now; waiting for CSF is over.
	if err := c.pace(ctx); err != nil {
		return err
	}
	ttl := max(csfMinTTL, int64((time.Until(e.Until)+time.Second-1)/time.Second))
	said, callErr := c.deny(ctx, e.Prefix, ttl, c.ports, "in", c.comment)
	if inTheWay {
		c.settle(ctx)
	}
	ours, _, err = c.bansOf(ctx, e.Prefix)
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	if slices.ContainsFunc(ours, func(b csfBan) bool { return c.fits(b, e) }) {
		if dropped, err = c.present(ctx); err != nil {
			return fmt.Errorf("%s: %w", doing, err)
		}
		if dropped != nil && !dropped[e.Prefix] {
			return fmt.Errorf("%s: it wrote the ban down but no rule for it is in the kernel; it says %q", doing, said)
		}
		c.note(e, false)
		if callErr != nil {
			return fmt.Errorf("%s: %w", doing, callErr)
		}
		return nil
	}
	if callErr == nil {
		// "is already permanently blocked", if csf.deny agrees.
		denied, err := csfDenies(c.paths.file("csf.deny"), e.Prefix)
		if err == nil && denied {
			c.note(e, true)
			return nil
		}
		callErr = errors.Join(fmt.Errorf("it did not, and says %q", said), err)
	}
	return fmt.Errorf("%s: %w", doing, callErr)
}

// fits tells whether a ban of ours is what e asks for.
func (c *csf) fits(b csfBan, e Entry) bool {
	return b.ports == c.ports && b.drops(c.ports) && b.until().Sub(e.Until).Abs() <= csfSlack
}

// note writes down that e is in force; held: not by a ban of ours.
func (c *csf) note(e Entry, held bool) {
	c.book.apply(plan{set: []Entry{e}})
	if held {
		c.held[e.Prefix] = e.Until
	} else {
		delete(c.held, e.Prefix)
	}
}

func (c *csf) unset(ctx context.Context, p netip.Prefix) error {
	doing := fmt.Sprintf("having CSF unblock %v", p)
	ours, others, err := c.bansOf(ctx, p)
	if err == nil && len(ours) > 0 {
		// Lifting a block does not wait for a full disk; the debt is in memory.
		_ = c.owe(others)
		c.book.apply(plan{unset: []netip.Prefix{p}})
		if err = c.pace(ctx); err == nil { // if we are stopped then nothing is begun
			ctx, end := uncancelled(ctx)
			defer end()
			if _, err = c.run(ctx, "-trd", csfText(p)); err == nil {
				c.settle(ctx)
			}
		}
		if err == nil {
			if ours, _, err = c.bansOf(ctx, p); err == nil && len(ours) > 0 {
				err = errors.New("it is still in csf.tempban")
			}
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", doing, err)
	}
	delete(c.held, p)
	c.book.apply(plan{unset: []netip.Prefix{p}})
	return nil
}

// bansOf gives the bans of exactly p.
func (c *csf) bansOf(ctx context.Context, p netip.Prefix) (ours, others []csfBan, err error) {
	bans, err := c.bans(ctx)
	for _, b := range bans {
		switch {
		case b.prefix != p:
		case b.ours():
			ours = append(ours, b)
		default:
			others = append(others, b)
		}
	}
	return ours, others, err
}

// deny calls csf -td.
func (c *csf) deny(ctx context.Context, p netip.Prefix, ttl int64, ports, dir, comment string) (said string, err error) {
	args := []string{"-td", csfText(p), strconv.FormatInt(ttl, 10)}
	if ports != "" {
		args = append(args, "-p", ports)
	}
	return c.run(ctx, append(args, "-d", dir, comment)...)
}

// call paces and runs csf.
func (c *csf) call(ctx context.Context, args ...string) error {
	if err := c.pace(ctx); err != nil {
		return err
	}
	_, err := c.run(ctx, args...)
	return err
}

// pace waits until CSF may be called again. A call for which there is no time
// left is not begun: it would be killed half-way.
func (c *csf) pace(ctx context.Context) error {
	if end, ok := ctx.Deadline(); ok && time.Until(end)-max(0, time.Until(c.last.Add(c.interval))) < csfCall {
		return fmt.Errorf("no time is left for another call of csf: %w", context.DeadlineExceeded)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(time.Until(c.last.Add(c.interval))):
		return nil
	}
}

var ansiColour = regexp.MustCompile(`\x1b\[[0-9;]*m`)

// run calls csf and gives what it says, in one line without colours. An exit
// status other than 0 means that it did not try.
func (c *csf) run(ctx context.Context, args ...string) (said string, err error) {
	c.last = time.Now()
	ctx, end := uncancelled(ctx)
	defer end()
	ctx, cancel := context.WithTimeout(ctx, c.timeout())
	defer cancel()
	out, err := inNetNS(ctx, c.o.NetNS, c.timeout()+5*time.Second, func() (string, error) {
		var out bytes.Buffer
		cmd := exec.CommandContext(ctx, c.command, args...)
		cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
		cmd.WaitDelay = 2 * time.Second
		w := &limitedWriter{&out, csfOutputMax}
		cmd.Stdout, cmd.Stderr = w, w
		cmd.Env = append(os.Environ(), "LC_ALL=C")
		err := cmd.Run()
		return out.String(), err
	})
	said = strings.TrimPrefix(complaintText(ansiColour.ReplaceAllString(out, "")), ": ")
	switch {
	case err == nil:
		return said, nil
	case ctx.Err() != nil:
		return said, fmt.Errorf("csf %s: %w: %w", args[0], ErrUnknown, ctx.Err())
	}
	if broken := c.working(); broken != nil {
		return said, broken
	}
	return said, fmt.Errorf("csf %s: %w, saying %q", args[0], err, said)
}

// uncancelled is ctx with its deadline, but without its cancellation: csf makes
// its rules before it writes them down, and one that is ended in between, as
// by a daemon that stops, leaves rules that nobody knows of.
func uncancelled(ctx context.Context) (context.Context, context.CancelFunc) {
	until, ok := ctx.Deadline()
	ctx = context.WithoutCancel(ctx)
	if !ok {
		return ctx, func() {}
	}
	return context.WithDeadline(ctx, until)
}

// csfText is p as CSF writes it.
func csfText(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// limitedWriter drops what is beyond n bytes.
type limitedWriter struct {
	b *bytes.Buffer
	n int
}

func (w *limitedWriter) Write(p []byte) (int, error) {
	w.b.Write(p[:max(0, min(len(p), w.n-w.b.Len()))])
	return len(p), nil
}

// Intact has nothing to look at but whether CSF works: its rules are its own,
// and List says which bans they make.
func (c *csf) Intact(ctx context.Context) (bool, error) {
	if err := c.ready(ctx); err != nil {
		return false, err
	}
	return true, nil
}

// List reads csf.tempban: bans of ours, and those of others and lines of
// csf.deny that stand for an entry.
func (c *csf) List(ctx context.Context) iter.Seq2[Installed, error] {
	return func(yield func(Installed, error) bool) {
		if err := c.ready(ctx); err != nil {
			yield(Installed{}, err)
			return
		}
		dropped, err := c.present(ctx)
		if err != nil {
			yield(Installed{}, err)
			return
		}
		bans, err := c.bans(ctx)
		if err != nil {
			yield(Installed{}, err)
			return
		}
		until := make(map[netip.Prefix]time.Time)
		for _, b := range bans {
			if b.ours() && checkPrefix(b.prefix) == nil && b.until().After(until[b.prefix]) && (dropped == nil || dropped[b.prefix]) {
				until[b.prefix] = b.until()
			}
		}
		for p, t := range c.held {
			if _, ok := until[p]; ok {
				continue
			}
			stands := slices.ContainsFunc(bans, func(b csfBan) bool {
				return b.prefix == p && b.drops(c.ports) && b.until().After(t.Add(-csfSlack))
			})
			if !stands {
				if stands, err = csfDenies(c.paths.file("csf.deny"), p); err != nil {
					yield(Installed{}, fmt.Errorf("reading csf.deny: %w: %w", ErrUnknown, err))
					return
				}
			}
			if stands {
				until[p] = t
			}
		}
		for p, t := range until {
			if !yield(Installed{Prefix: p, Until: t}, nil) {
				return
			}
		}
	}
}

// Watch is not supported: CSF tells nobody of changes.
func (c *csf) Watch(context.Context, func(string)) error { return errors.ErrUnsupported }

// Close with remove ends the bans of ours, however long that takes. What is
// left when ctx ends is in csf.tempban with our comment: the next process finds
// it there.
func (c *csf) Close(ctx context.Context, remove bool) error {
	if !remove {
		return nil
	}
	budget := c.budget
	c.budget = csfForever
	defer func() { c.budget = budget }()
	return c.remaining(ctx, c.Replace(ctx, nil))
}

// remaining says what of ours is still banned after err.
func (c *csf) remaining(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	bans, readErr := c.bans(context.WithoutCancel(ctx))
	var left []netip.Prefix
	for _, b := range bans {
		if b.ours() && b.prefix.IsValid() {
			left = append(left, b.prefix)
		}
	}
	if readErr != nil || len(left) == 0 {
		return errors.Join(err, readErr)
	}
	slices.SortFunc(left, netip.Prefix.Compare)
	var part *PartialError
	if errors.As(err, &part) {
		err = part.Err
	}
	return &RemainError{Prefixes: slices.Compact(left), Err: err}
}
