package firewall

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	defaultTimeout = 5 * time.Second

	// Buffers of the netlink sockets, in bytes. A transaction is one message
	// to the kernel and has to fit into the send buffer as a whole: 128 MiB
	// are a million entries. What an unprivileged user namespace refuses is
	// split instead.
	nftSendBuffer    = 128 << 20
	nftReceiveBuffer = 16 << 20

	// Upper bounds of what an entry adds to a message, with IPv6: its
	// attributes (40 bytes), and three times that to set anew what may be
	// there already.
	nftEntryBytes  = 40
	nftUpsertBytes = 3 * nftEntryBytes
	// nftLayoutBytes bounds the constant part of the layout without its
	// allow sets: chains, rules and sets for all 160 prefix lengths.
	nftLayoutBytes = 160 << 10

	// nftEntryTime is what an entry of a transaction may add to the
	// exchange's deadline; ten times what was measured.
	nftEntryTime = 50 * time.Microsecond
)

// nft holds its entries in a table of its own, through netlink. Its methods
// other than Watch are called by one goroutine, which owns both connections:
// a transaction half-built by one caller must not be sent by another.
type nft struct {
	o      Options
	layout *layout
	book   book

	write   *nftables.Conn // nil when not open
	writeNL *netlink.Conn  // write's socket, for deadlines
	budget  int            // bytes in one transaction
	read    *netlink.Conn  // nil when not open

	lengths map[length]bool // prefix lengths that have a set; nil: not known
	rules   []nftRule       // as the kernel gave them back after we built them; nil: not built by us
	// gen is the ruleset generation for which all of the above holds; it
	// steps with each transaction of anybody in this namespace. 0: none.
	gen uint32

	events nftEvents
}

// nftEvents is what Watch tells the owner.
type nftEvents struct {
	tampered atomic.Bool // somebody else changed elements of our sets
	lost     atomic.Bool // events were lost: that may have happened

	mu      sync.Mutex
	ours    []uint32      // ports of the latest write connections, the present one last
	monitor *netlink.Conn // nil when nobody watches
}

// NewNFTables returns the backend that keeps entries in the nftables table
// "inet smtpguard", which belongs to it alone. Nothing is opened or changed
// until the first call. The error is about o.
//
// Another set of Options (ports, allowed prefixes, hook) is another backend:
// make a new one and call Replace, which swaps the old table for the new one
// in a single transaction.
func NewNFTables(o Options) (Firewall, error) {
	b := newBook(o)
	l, err := newLayout(o, b.max)
	if err != nil {
		return nil, err
	}
	if o.Timeout <= 0 {
		o.Timeout = defaultTimeout
	}
	return &nft{o: o, layout: l, book: b}, nil
}

func (n *nft) Name() string { return NFTables }

// Probe lets the kernel check our whole layout in a transaction that cannot
// succeed, because it ends with the deletion of a table that is not there.
func (n *nft) Probe(ctx context.Context) (Capabilities, error) {
	defer n.closeWrite() // a kernel that loads modules meanwhile may answer too often
	l := *n.layout
	l.table = &nftables.Table{Name: nftProbeTable, Family: nftables.TableFamilyINet}
	l.allow = [2][]addrRange{}
	if err := n.open(); err != nil {
		return Capabilities{}, probeError(err)
	}
	if err := l.add(n.write, commonLengths); err != nil {
		return Capabilities{}, probeError(err)
	}
	n.write.DelTable(&nftables.Table{Name: nftProbeTable + "x", Family: nftables.TableFamilyINet})
	stop := deadline(ctx, n.writeNL, n.o.Timeout)
	err := n.write.Flush()
	stop()
	if errs := leaves(err); len(errs) != 1 || !errors.Is(errs[0], unix.ENOENT) {
		if err == nil {
			err = errors.New("the kernel did a transaction that cannot be done")
		}
		return Capabilities{}, probeError(errors.Join(ctx.Err(), err))
	}
	return Capabilities{
		IPv6: true, Prefixes: true, Timeouts: true,
		Atomic:   n.budget >= n.layoutBytes()+n.book.max*nftUpsertBytes,
		Readback: true, Expiry: true, Counters: true, Real: true,
		MaxTimeout: longestEntry,
	}, nil
}

// probeError says what to do about the two usual causes.
func probeError(err error) error {
	hint := ""
	switch {
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		hint = "; run smtpguard as root or give it CAP_NET_ADMIN"
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT),
		errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
		hint = "; the kernel has no nf_tables, or not all that is needed of it"
	}
	return fmt.Errorf("asking the kernel to check our nftables rules: %w: %w%s", ErrUnavailable, plainErrno(err), hint)
}

// Ensure costs one short question while nobody changed anything since it last
// looked, and a reading of our table's chains, rules and sets (not of their
// elements) when somebody did.
func (n *nft) Ensure(ctx context.Context) (bool, error) {
	gen, err := n.generation(ctx)
	if err != nil {
		return false, nftError("reading the nftables generation", err)
	}
	intact := n.gen != 0 && gen == n.gen
	if !intact {
		if intact, err = n.inspect(ctx); err != nil {
			return false, nftError("reading our nftables table", err)
		}
	}
	tampered, lost := n.events.tampered.Swap(false), n.events.lost.Swap(false)
	if intact {
		if lost && !tampered {
			tampered, err = n.missing(ctx)
			if err != nil {
				n.events.lost.Store(true)
				return false, err
			}
		}
		return tampered, nil
	}
	// What can be saved of an older layout of ours is: the caller's Replace
	// comes a moment later.
	entries := n.book.entries(time.Now())
	if len(entries) == 0 {
		entries = n.adopt(ctx)
	}
	return true, n.rebuild(ctx, entries)
}

func (n *nft) Apply(ctx context.Context, b Batch) (Result, error) {
	now := time.Now()
	p, res, err := planBatch(b, now)
	if err != nil {
		return res, err
	}
	if err := ctx.Err(); err != nil {
		return failAll(p.prefixes(), err), err
	}
	all := p
	p, res, full := n.book.fit(p, now)
	if n.lengths == nil {
		if ok, err := n.inspect(ctx); err != nil || !ok {
			err = nftError("reading our nftables table", cmpErr(err, unix.ENOENT))
			return failAll(all.prefixes(), err), err
		}
	}
	// One transaction, unless the socket is too small for it.
	for len(p.set)+len(p.unset) > 0 {
		var part plan
		room := max(1, (n.sendBudget()-nftLayoutBytes)/nftUpsertBytes)
		part.set, p.set = cut(p.set, room)
		part.unset, p.unset = cut(p.unset, room-len(part.set))
		if err := n.change(ctx, part); err != nil {
			rest := failAll(append(part.prefixes(), p.prefixes()...), err)
			return Result{append(rest.Failed, res.Failed...)}, err
		}
	}
	return res, full
}

// change makes the changes in one transaction.
func (n *nft) change(ctx context.Context, p plan) error {
	doing := fmt.Sprintf("setting %d and removing %d entries in nftables", len(p.set), len(p.unset))
	if err := n.open(); err != nil {
		return nftError(doing, err)
	}
	// As late as can be: from the transaction on, the kernel counts down what is
	// left by this clock.
	now := time.Now()
	type group struct{ set, unset []nftables.SetElement }
	groups := make(map[length]*group)
	var created []length
	at := func(l length) *group {
		if groups[l] == nil {
			groups[l] = new(group)
		}
		return groups[l]
	}
	for _, e := range p.set {
		l := lengthOf(e.Prefix)
		if g := at(l); len(g.set) == 0 && !n.lengths[l] {
			created = append(created, l)
		}
		at(l).set = append(at(l).set, element(e, now))
	}
	for _, pfx := range p.unset {
		// No set, no element; a set is not made to take one out of it.
		if l := lengthOf(pfx); n.lengths[l] {
			at(l).unset = append(at(l).unset, nftables.SetElement{Key: pfx.Addr().AsSlice(), Timeout: time.Second})
		}
	}
	if len(groups) == 0 {
		return nil
	}
	for _, l := range created {
		if err := n.layout.addLength(n.write, l); err != nil {
			return n.abandon(doing, err)
		}
	}
	for l, g := range groups {
		set := n.layout.lengthSet(l)
		// Adding what is there changes nothing before Linux 6.12, deleting
		// what is not there fails: add, delete, add always does it.
		for chunk := range slices.Chunk(append(g.unset, g.set...), nftChunk) {
			if err := errors.Join(n.write.SetAddElements(set, chunk), n.write.SetDeleteElements(set, chunk)); err != nil {
				return n.abandon(doing, err)
			}
		}
		for chunk := range slices.Chunk(g.set, nftChunk) {
			if err := n.write.SetAddElements(set, chunk); err != nil {
				return n.abandon(doing, err)
			}
		}
	}
	if err := n.commit(ctx, len(p.set)+len(p.unset)); err != nil {
		return nftError(doing, err)
	}
	for _, l := range created {
		n.lengths[l] = true
	}
	if len(created) > 0 {
		n.gen, n.rules = 0, nil // let Ensure look at the new rules once
	}
	n.book.apply(p)
	return nil
}

func (n *nft) Replace(ctx context.Context, entries []Entry) error {
	now := time.Now()
	p, _, err := planBatch(Batch{Set: entries}, now)
	if err = cmpErr(err, ctx.Err()); err != nil {
		return err
	}
	p, res, full := n.book.fitAll(p, now)
	n.events.tampered.Store(false)
	n.events.lost.Store(false)
	return cmpErr(n.rebuild(ctx, p.set), partial(res, full))
}

// rebuild makes our table anew with exactly these entries, in one transaction
// and hence without a gap, whatever stood there (but for a packet that is
// between the old chain and the new one at that instant).
func (n *nft) rebuild(ctx context.Context, entries []Entry) error {
	doing := fmt.Sprintf("building our nftables table with %d entries", len(entries))
	counts := n.counted(ctx, entries)
	if err := n.open(); err != nil {
		return nftError(doing, err)
	}
	now, rest := time.Now(), []Entry(nil)
	if n.layoutBytes()+len(entries)*nftEntryBytes > n.budget {
		// Too small a socket for one transaction. The old table stays until
		// the new one holds the first part, the rest follows at once.
		entries, rest = cut(entries, max(0, (n.budget-n.layoutBytes())/nftEntryBytes))
	}
	lengths := lengthsOf(entries)
	if err := n.layout.add(n.write, lengths); err != nil {
		return n.abandon(doing, err)
	}
	elems := make(map[length][]nftables.SetElement)
	for _, e := range entries {
		l := lengthOf(e.Prefix)
		elems[l] = append(elems[l], element(e, now))
	}
	for l, es := range elems {
		set := n.layout.lengthSet(l)
		for chunk := range slices.Chunk(es, nftChunk) {
			if err := n.write.SetAddElements(set, chunk); err != nil {
				return n.abandon(doing, err)
			}
		}
	}
	n.lengths, n.rules, n.gen = nil, nil, 0
	if err := n.commit(ctx, len(entries)); err != nil {
		return nftError(doing, err)
	}
	n.book.replace(entries)
	n.carry(ctx, entries, counts)
	// Read back what the kernel made of it, and recognise it from now on.
	if ok, err := n.inspect(ctx); err != nil || !ok {
		return nftError(doing, cmpErr(err, errChanging))
	}
	if len(rest) > 0 {
		_, err := n.Apply(ctx, Batch{Set: rest})
		return err
	}
	return nil
}

// Intact reads our table's chains, rules and sets.
func (n *nft) Intact(ctx context.Context) (bool, error) {
	seen, err := n.readTable(ctx)
	if err != nil {
		return false, nftError("reading our nftables table", err)
	}
	_, intact := madeAs(seen).recognise(seen)
	return intact, nil
}

// errChanging: somebody changes our table as fast as we do.
var errChanging = errors.New("somebody else changes it at the same time")

func (n *nft) List(ctx context.Context) iter.Seq2[Installed, error] {
	return func(yield func(Installed, error) bool) {
		sets, err := n.sets(ctx)
		if err == nil && len(sets) == 0 {
			err = unix.ENOENT
		}
		if err != nil {
			yield(Installed{}, nftError("listing our nftables sets", err))
			return
		}
		want := make(map[length][]netip.Prefix)
		for _, e := range n.book.entries(time.Now()) {
			if time.Until(e.Until) > n.o.Timeout { // what may run out meanwhile is not waited for
				want[lengthOf(e.Prefix)] = append(want[lengthOf(e.Prefix)], e.Prefix)
			}
		}
		for _, s := range sets {
			l, ok := lengthFromSet(s.name)
			if !ok {
				continue
			}
			elems, err := n.elements(ctx, s.name, l, want[l])
			if err != nil {
				yield(Installed{}, nftError("listing nftables set "+s.name, err))
				return
			}
			for _, e := range elems {
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

// adopt reads the entries of whatever layout of ours is there; what cannot be
// read is left.
func (n *nft) adopt(ctx context.Context) []Entry {
	var entries []Entry
	for e, err := range n.List(ctx) {
		if err != nil || len(entries) >= n.book.max {
			break
		}
		if !e.Until.IsZero() && checkPrefix(e.Prefix) == nil {
			entries = append(entries, Entry{Prefix: e.Prefix, Until: e.Until})
		}
	}
	return entries
}

// missing tells whether an entry that should be in force is not in the filter.
func (n *nft) missing(ctx context.Context) (bool, error) {
	want := make(map[netip.Prefix]bool)
	for _, e := range n.book.entries(time.Now().Add(time.Second)) {
		want[e.Prefix] = true
	}
	for e, err := range n.List(ctx) {
		if err != nil {
			return false, err
		}
		delete(want, e.Prefix)
	}
	return len(want) > 0, nil
}

func (n *nft) Close(ctx context.Context, remove bool) error {
	defer n.closeRead()
	defer n.closeWrite()
	if !remove {
		return nil
	}
	const doing = "removing our nftables table"
	if err := n.open(); err != nil {
		return nftError(doing, err)
	}
	n.lengths, n.rules, n.gen = nil, nil, 0
	n.write.AddTable(n.layout.table) // deleting what is not there would fail
	n.write.DelTable(n.layout.table)
	if err := n.commit(ctx, n.book.max); err != nil {
		return nftError(doing, err)
	}
	n.book.replace(nil)
	return nil
}

// open makes sure that there is a connection to write to.
func (n *nft) open() error {
	if n.write != nil {
		return nil
	}
	var sock *netlink.Conn
	c, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(n.o.NetNS),
		nftables.WithSockOptions(func(nl *netlink.Conn) error {
			sock = nl
			return errors.Join(nl.SetWriteBuffer(nftSendBuffer), nl.SetReadBuffer(nftReceiveBuffer))
		}))
	if err != nil {
		if sock != nil {
			err = errors.Join(err, sock.Close())
		}
		return err
	}
	size, err := sock.WriteBuffer()
	if err != nil {
		return errors.Join(err, c.CloseLasting())
	}
	n.write, n.writeNL = c, sock
	// The kernel doubles what is asked for and takes messages of up to the
	// doubled size; the factor is left as a reserve for what it adds.
	n.budget = size / 2
	return n.events.setOurs(sock.PID())
}

// closeWrite closes the connection; open makes a new one. It follows every
// error, as answers to the failed exchange may still be on their way.
func (n *nft) closeWrite() {
	if n.write == nil {
		return
	}
	_ = n.write.CloseLasting() // nothing is buffered in it
	n.write, n.writeNL = nil, nil
}

// abandon drops a transaction that could not be built: its beginning is still
// in the connection.
func (n *nft) abandon(doing string, err error) error {
	n.closeWrite()
	return fmt.Errorf("%s: %w", doing, err)
}

// sendBudget is how many bytes one transaction may have.
func (n *nft) sendBudget() int {
	if n.write == nil && n.open() != nil {
		return 0 // the caller's own open tells why
	}
	return n.budget
}

// layoutBytes bounds the size of the layout in a transaction.
func (n *nft) layoutBytes() int {
	return nftLayoutBytes + 2*nftEntryBytes*(len(n.layout.allow[0])+len(n.layout.allow[1])) + 16*len(n.layout.ports)
}

// commit sends the transaction of some entries and waits for the answer.
func (n *nft) commit(ctx context.Context, entries int) error {
	stop := deadline(ctx, n.writeNL, n.o.Timeout+time.Duration(entries)*nftEntryTime)
	err := n.write.Flush()
	stop()
	if err == nil {
		err = n.drain()
	}
	if err != nil {
		n.gen = 0
		n.closeWrite()
		return errors.Join(context.Cause(ctx), err)
	}
	if n.gen++; n.gen == 1 {
		n.gen = 0 // was not known, and is not now
	}
	return nil
}

// drain takes answers off the socket that nobody asked for: a kernel that
// loads a module in the middle of a transaction starts it over and may
// acknowledge a message twice, so that the last answer, perhaps an error, is
// left over.
func (n *nft) drain() error {
	rc, err := n.writeNL.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 4096)
	left := 0
	err = rc.Read(func(fd uintptr) bool {
		for left < 10_000 {
			if size, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT); size <= 0 || err != nil {
				break
			}
			left++
		}
		return true
	})
	if err == nil && left > 0 {
		err = fmt.Errorf("%d answers too many from the kernel: %w", left, os.ErrDeadlineExceeded)
	}
	return err
}

// deadline bounds the next exchange on c by d and by ctx. The caller calls
// stop when it is over.
func deadline(ctx context.Context, c *netlink.Conn, d time.Duration) (stop func()) {
	_ = c.SetDeadline(time.Now().Add(d)) // fails on a closed socket only, which the exchange then tells
	cancel := context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })
	return func() { cancel() }
}

// nftError puts an error of an exchange into words and into one of the
// sentinels.
func nftError(doing string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, ErrGone), errors.Is(err, ErrUnknown), errors.Is(err, ErrFull), errors.Is(err, ErrUnavailable):
		return fmt.Errorf("%s: %w", doing, err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES),
		errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%s: %w: %w", doing, ErrUnavailable, plainErrno(err))
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY):
		// ENOENT: table, chain or set; EEXIST, EBUSY: a set of our name that
		// is not ours. Both times what we built is not there.
		return fmt.Errorf("%s: %w: %w", doing, ErrGone, plainErrno(err))
	case errors.Is(err, unix.ENFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMSGSIZE):
		return fmt.Errorf("%s: %w: %w", doing, ErrFull, plainErrno(err))
	}
	return fmt.Errorf("%s: %w: %w", doing, ErrUnknown, err)
}

// plainErrno is the first errno in err, for a message without the netlink
// layers' prefixes and a hundred repetitions; err itself if it has none.
func plainErrno(err error) error {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return errno
	}
	return err
}

// leaves are the errors joined in err.
func leaves(err error) []error {
	switch e := err.(type) {
	case nil:
		return nil
	case interface{ Unwrap() []error }:
		var out []error
		for _, err := range e.Unwrap() {
			out = append(out, leaves(err)...)
		}
		return out
	case *netlink.OpError:
		return []error{err}
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil {
			return leaves(inner)
		}
	}
	return []error{err}
}

// cmpErr is the first of err and other that is not nil.
func cmpErr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// cut splits s behind its first n elements.
func cut[T any](s []T, n int) (head, tail []T) {
	n = max(0, min(n, len(s)))
	return s[:n:n], s[n:]
}

// inspect reads chains, rules and sets of our table and says whether they are
// our layout, untouched; then n.lengths, n.rules and n.gen are as read.
func (n *nft) inspect(ctx context.Context) (intact bool, err error) {
	// The generation first: a change in the middle makes the next Ensure look
	// again.
	gen, err := n.generation(ctx)
	if err != nil {
		return false, err
	}
	seen, err := n.readTable(ctx)
	if err != nil {
		return false, err
	}
	lengths, ok := n.layout.recognise(seen)
	if ok && n.rules != nil {
		// Ours by name; but does it still do what it did?
		ok = slices.Equal(seen.rules, n.rules)
	}
	if !ok {
		n.lengths, n.rules, n.gen = nil, nil, 0
		return false, nil
	}
	n.lengths, n.rules, n.gen = maps.Clone(lengths), seen.rules, gen
	return true, nil
}
