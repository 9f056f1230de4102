package guard

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// crashEnv makes the test binary a daemon that TestCrash kills; its value is
// a crashLife.
const crashEnv = "SMTPGUARD_GUARD_TEST_CRASH"

func TestMain(m *testing.M) {
	if life := os.Getenv(crashEnv); life != "" {
		if err := crashDaemon(life); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// Tests that ask for it wait for packets and programs more than they work.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	os.Exit(m.Run())
}

// crashLife is what a daemon is started with.
type crashLife struct {
	Dir   string // of the store and the log
	Round int
	Seed  uint64
	Lines int // the sources that the log has told of so far
	// Commit is how long a trial of mode: enforce lasts; 0: there is none.
	Commit time.Duration
}

// The file descriptors that a daemon inherits.
const (
	crashNS   = 3 // the network namespace
	crashPipe = 4 // where it tells what it does
)

// crashWord is what a daemon tells of itself: first the state that it came to
// at its start, then each operation twice, before and after.
type crashWord struct {
	State *crashState `json:",omitempty"`

	Op       string `json:",omitempty"` // block, unblock, allow, disallow
	By       string `json:",omitempty"` // its number, as the store notes it
	Prefixes []netip.Prefix
	Done     bool          // it is acknowledged, with:
	At       time.Time     // when
	Made     []store.Block `json:",omitempty"`
	Lifted   []store.Block `json:",omitempty"`
	Refused  []netip.Prefix
	Err      string `json:",omitempty"`
}

// crashState is what store and packet filter have at one moment.
type crashState struct {
	Began    time.Time // the life
	From, To time.Time // the moment, as far as it took time to look
	InForce  []store.Block
	Allow    []netip.Prefix
	Kernel   []firewall.Installed
	// Stale: the rules in the kernel are not those of this allowlist.
	Stale   bool
	Enforce bool
	Trial   Trial
}

// slack is how far the kernel's ends may be from the store's: a second,
// because it is given no shorter one, and what the clock went on while they
// were set (they are told to the kernel as what is left) or read.
func (s *crashState) slack() time.Duration { return time.Second + s.To.Sub(s.Began) }

// Operators block in these nets, and the log tells of sources in the third.
var (
	crashManual4 = netip.MustParsePrefix("198.51.96.0/20")
	crashManual6 = netip.MustParsePrefix("2001:db8::/44")
	crashLogged  = netip.MustParsePrefix("10.66.0.0/16")
)

func crashLoggedAddr(n int) netip.Addr {
	return netip.AddrFrom4([4]byte{10, 66, byte(n >> 8), byte(n)})
}

// crashDaemon is the life of a daemon: it starts, tells what it came to, and
// does one operation after the other until it is killed.
func crashDaemon(how string) error {
	var life crashLife
	if err := json.Unmarshal([]byte(how), &life); err != nil {
		return err
	}
	began := time.Now()
	tell := json.NewEncoder(os.NewFile(crashPipe, "pipe")) // one write a word
	st, err := store.Open(filepath.Join(life.Dir, "s.db"), store.Options{Wait: 5 * time.Second})
	if err != nil {
		return err
	}
	p := policy.Default()
	p.Block.Overlap = policy.OverlapRefuse // the model below knows whole blocks only
	p.Mode, p.Confirm, p.Commit = policy.Enforce, policy.ConfirmOff, life.Commit
	p.Block.MaxNewPerMinute = 1 << 30
	p.Rules = []detector.Rule{{Name: "third", Metric: detector.Opens, Window: time.Minute, Threshold: 3, Prefixes4: []int{32}}}
	open := func(_ context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error) {
		return firewall.NewNFTables(firewall.Options{Ports: []uint16{25}, NetNS: crashNS, Allow: allow, MaxEntries: entries})
	}
	ready := make(chan struct{})
	g, err := New(context.Background(), Options{Policy: p, Store: st, Capacity: 100,
		Logs: []Log{{Path: filepath.Join(life.Dir, "mainlog"), Parser: exim.New(time.UTC)}}, OpenFirewall: open,
		Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		Notify: func(s string) {
			if s == "READY=1" {
				close(ready)
			}
		},
		Self: func(context.Context) ([]Exempt, error) { return neverBlocked, nil }})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	go func() { cancel(cmp.Or(g.Run(ctx), errors.New("the guard ended by itself"))) }()
	select {
	case <-ready:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	var state crashState
	// On the goroutine that decides: nothing changes meanwhile.
	if doErr := g.do(ctx, func(ctx context.Context) { state, err = crashLook(ctx, g, open) }); doErr != nil || err != nil {
		return errors.Join(doErr, err)
	}
	state.Began = began
	if err := tell.Encode(crashWord{State: &state}); err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(life.Seed, uint64(life.Round)))
	allowed := state.Allow
	for n := 0; ; n++ {
		w := crashOperation(r, life, &allowed)
		w.By = fmt.Sprintf("operation %d.%d", life.Round, n)
		if err := tell.Encode(w); err != nil {
			return err
		}
		if err := crashDo(ctx, g, r, &w); err != nil {
			return cmp.Or(context.Cause(ctx), fmt.Errorf("%s %s %v: %w", w.By, w.Op, w.Prefixes, err))
		}
		w.Done, w.At = true, time.Now()
		if err := tell.Encode(w); err != nil {
			return err
		}
	}
}

// crashLook reads store and kernel.
func crashLook(ctx context.Context, g *Guard, open func(context.Context, []netip.Prefix, int) (firewall.Firewall, error)) (s crashState, err error) {
	s.From, s.Enforce, s.Trial = time.Now(), g.enforce, g.trial
	if s.InForce, err = g.o.Store.InForce(s.From); err != nil {
		return s, err
	}
	for i := range s.InForce {
		s.InForce[i].Verdict = nil // long, and of no interest here
	}
	entries, err := g.o.Store.AllowList()
	if err != nil {
		return s, err
	}
	for _, e := range entries {
		s.Allow = append(s.Allow, e.Prefix)
	}
	look, err := open(ctx, s.Allow, g.fwEntries)
	if err != nil {
		return s, err
	}
	for in, err := range look.List(ctx) {
		if err != nil {
			return s, err
		}
		s.Kernel = append(s.Kernel, in)
	}
	s.To = time.Now()
	if s.Stale, err = look.Ensure(ctx); err != nil {
		return s, err
	}
	return s, look.Close(ctx, false)
}

// crashOperation draws the next operation. There are few prefixes, so that
// operations meet.
func crashOperation(r *rand.Rand, life crashLife, allowed *[]netip.Prefix) (w crashWord) {
	manual := func(v4, v6 int) netip.Prefix { // with at most so many random bits
		if r.IntN(4) == 0 {
			a := crashManual6.Addr().As16()
			a[5], a[7], a[15] = byte(r.IntN(4)), byte(r.IntN(4)), byte(r.IntN(4))
			p, _ := netip.AddrFrom16(a).Prefix(128 - r.IntN(v6+1))
			return p
		}
		a := crashManual4.Addr().As4()
		a[2], a[3] = a[2]+byte(r.IntN(4)), byte(r.IntN(64))
		p, _ := netip.AddrFrom4(a).Prefix(32 - r.IntN(v4+1))
		return p
	}
	logged := func(bits int) netip.Prefix {
		p, _ := crashLoggedAddr(max(0, life.Lines-40+r.IntN(50))).Prefix(bits)
		return p
	}
	const most = 5 // prefixes that are allowed
	switch k := r.IntN(20); {
	case k < 10:
		w.Op = "block"
		for range 1 + r.IntN(4) {
			if p := manual(8, 80); !slices.Contains(w.Prefixes, p) {
				w.Prefixes = append(w.Prefixes, p)
			}
		}
	case k < 13:
		w.Op, w.Prefixes = "unblock", []netip.Prefix{manual(10, 80)}
	case k < 16:
		w.Op, w.Prefixes = "unblock", []netip.Prefix{logged(30)}
	case len(*allowed) < most && (k < 18 || len(*allowed) == 0):
		w.Op, w.Prefixes = "allow", []netip.Prefix{manual(8, 80)}
		if r.IntN(3) == 0 {
			w.Prefixes = []netip.Prefix{logged(31)}
		}
		if !slices.Contains(*allowed, w.Prefixes[0]) {
			*allowed = append(*allowed, w.Prefixes[0])
		}
	default:
		i := r.IntN(len(*allowed))
		w.Op, w.Prefixes = "disallow", []netip.Prefix{(*allowed)[i]}
		*allowed = slices.Delete(*allowed, i, i+1)
	}
	return w
}

// crashDo does an operation. Whatever is not as it was asked is an error.
func crashDo(ctx context.Context, g *Guard, r *rand.Rand, w *crashWord) (err error) {
	p := w.Prefixes[0]
	switch w.Op {
	case "block":
		var reqs []BlockRequest
		for _, p := range w.Prefixes {
			long := time.Duration(1+r.IntN(60)) * time.Minute
			if r.IntN(3) == 0 {
				long = time.Duration(500+r.IntN(3000)) * time.Millisecond
			}
			reqs = append(reqs, BlockRequest{Prefix: p, For: long, By: w.By})
		}
		out, err := g.Block(ctx, reqs, false)
		if err != nil {
			return err
		}
		for _, o := range out {
			switch {
			case o.Error != "":
				return errors.New(o.Error)
			case o.Block != nil:
				w.Made = append(w.Made, *o.Block)
			default:
				w.Refused = append(w.Refused, o.Prefix)
			}
		}
		return nil
	case "unblock":
		w.Lifted, err = g.Unblock(ctx, p, w.By)
		if around := (*CoveredError)(nil); errors.As(err, &around) {
			err = nil
		}
	case "allow":
		w.Lifted, err = g.Allow(ctx, store.AllowEntry{Prefix: p, By: w.By, Added: time.Now()})
	case "disallow":
		var found bool
		if found, err = g.Disallow(ctx, p); err == nil && !found {
			err = errors.New("it was not allowed")
		}
	}
	for i := range w.Lifted {
		w.Lifted[i].Verdict = nil
	}
	return err
}

// TestCrash kills a daemon at random moments while operators block, unblock
// and allow, blocks run out and a log grows. After each kill the store has
// every operation that was acknowledged, the one under way wholly or not at
// all, and nothing else; after each restart the kernel holds what the store
// says.
func TestCrash(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("CI") != "true" {
		t.Skip("only root can give a network namespace to another process")
	}
	rounds := 200
	if info, ok := debug.ReadBuildInfo(); testing.Short() || ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		rounds = 40
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SMTPGUARD_TEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SMTPGUARD_TEST_SEED=%d draws the same operations and moments", seed)
	ns, dir := newNamespace(t), t.TempDir()
	lines, stop := crashLog(t, filepath.Join(dir, "mainlog"))
	defer stop()

	r := rand.New(rand.NewPCG(seed, 0))
	m := crashModel{t: t, path: filepath.Join(dir, "s.db"),
		made: make(map[uint64]store.Block), lifted: make(map[uint64]bool), unsure: make(map[uint64]bool), allow: make(map[netip.Prefix]bool),
		force: make(map[netip.Prefix]store.Block), sources: make(map[netip.Prefix]uint64)}
	for round := 0; round < rounds && !t.Failed(); round++ {
		m.round = round
		after := time.Duration(5_000+r.IntN(145_000)) * time.Microsecond
		early := r.IntN(5) == 0 && round > 0 // also while it is starting
		if round%25 == 0 {
			after += 300 * time.Millisecond // some live to see their timers
		}
		k := crashKill{early: early, after: after}
		if !early && r.IntN(3) == 0 { // at the beginning of an operation, where store and kernel differ
			k.op, k.then = []string{"allow", "block", "unblock"}[r.IntN(3)], time.Duration(r.IntN(4000))*time.Microsecond
		}
		words, ended := crashRun(t, ns, crashLife{Dir: dir, Round: round, Seed: seed, Lines: int(lines.Load())}, k)
		m.lived(words)
		m.killed()
		if m.last > 0 && r.IntN(5) == 0 {
			crashAlien(t, ns)
		}
		if t.Failed() {
			t.Logf("round %d, %+v; the daemon said:\n%s", round, k, ended)
		}
	}
	if t.Failed() {
		return
	}
	m.whole()
	t.Logf("%d kills, %d in an operation, %d of those operations done; %d states compared, %d operations acknowledged, %d blocks by hand, %d ran out, %d lifted, %d by the log of %d",
		rounds, m.cut, m.cutDone, m.states, m.acked, len(m.made), m.ranOut, len(m.lifted), len(m.sources), lines.Load())
	for what, n := range map[string]int{"comparison": m.states, "acknowledged operation": m.acked / 2, "block by the log": len(m.sources),
		"block that ran out": m.ranOut, "lifted block": len(m.lifted), "operation cut short": m.cut} {
		if n < rounds/8 {
			t.Errorf("only %d times a %s in %d rounds: that was no load", n, what, rounds)
		}
	}
}

// crashLog writes a log until stop: each source opens as many connections as
// the rule needs, and never comes back. It returns the number of sources.
func crashLog(t *testing.T, path string) (sources *atomic.Int64, stop func()) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	sources = new(atomic.Int64)
	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(25 * time.Millisecond)
		defer tick.Stop()
		for n := range 1 << 16 {
			for port := range 3 {
				if _, err := fmt.Fprintf(f, "%s SMTP connection from [%s]:%d (TCP/IP connection count = 1)\n",
					time.Now().UTC().Format(time.DateTime), crashLoggedAddr(n), 20000+port); err != nil {
					t.Error(err)
					return
				}
			}
			sources.Add(1)
			select {
			case <-tick.C:
			case <-quit:
				return
			}
		}
	}()
	return sources, func() {
		close(quit)
		<-done
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// crashAlien leaves in the kernel, while no daemon lives, a table with other
// rules and none of our blocks but one that nobody made.
func crashAlien(t *testing.T, ns int) {
	fw, err := firewall.NewNFTables(firewall.Options{Ports: []uint16{25}, NetNS: ns, Allow: []netip.Prefix{crashLogged}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(fw.Replace(t.Context(), []firewall.Entry{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Until: time.Now().Add(time.Hour)}}),
		fw.Close(t.Context(), false)); err != nil {
		t.Fatal(err)
	}
}

// crashKill is the moment of a kill: so long after the start (early) or after
// the daemon told its state; then, if op is set, so long after the next such
// operation begins.
type crashKill struct {
	early bool
	after time.Duration
	op    string
	then  time.Duration
}

// crashRun starts a daemon and kills it. It returns what it told and what it
// complained of.
func crashRun(t *testing.T, ns int, life crashLife, k crashKill) (words []crashWord, complaint string) {
	how, err := json.Marshal(life)
	if err != nil {
		t.Fatal(err)
	}
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	netns := os.NewFile(uintptr(dup(t, ns)), "netns")
	defer netns.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), crashEnv+"="+string(how))
	cmd.ExtraFiles = []*os.File{netns, out}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err = cmd.Start()
	if err := errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	began, told := make(chan struct{}), make(chan error, 1)
	begins := make(chan struct{})
	go func() {
		for d := json.NewDecoder(in); ; {
			var w crashWord
			// The kill can cut a word off: then it was not said.
			if err := d.Decode(&w); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				told <- nil
				return
			} else if err != nil {
				told <- err
				return
			}
			if words = append(words, w); w.State != nil {
				close(began)
			}
			if w.Op == k.op && !w.Done && k.op != "" {
				select {
				case begins <- struct{}{}:
				default: // not yet
				}
			}
		}
	}()
	if !k.early {
		select {
		case <-began:
		case err := <-told:
			told <- err
		case <-time.After(time.Minute):
			t.Error("the daemon is not ready after a minute")
		}
	}
	time.Sleep(k.after) // the random moment
	if k.op != "" {
		select {
		case <-begins:
			time.Sleep(k.then)
		case <-time.After(150 * time.Millisecond): // it does others; so be it
		}
	}
	killErr := cmd.Process.Kill()
	_ = cmd.Wait() // the state tells
	if s, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); killErr != nil || !ok || s.Signal() != syscall.SIGKILL {
		t.Errorf("the daemon ended by itself: %v", cmd.ProcessState)
	}
	if err := <-told; err != nil {
		t.Errorf("reading what the daemon tells: %v", err)
	}
	return words, stderr.String()
}

// crashModel is what store and kernel must have by the daemons' own words.
type crashModel struct {
	t     *testing.T
	round int
	path  string // of the store

	made    map[uint64]store.Block       // all that operators made
	lifted  map[uint64]bool              // all whose end was acknowledged
	unsure  map[uint64]bool              // all that may have run out before the start that had to lift them
	allow   map[netip.Prefix]bool        // the allowlist
	force   map[netip.Prefix]store.Block // what operators made and nobody ended
	sources map[netip.Prefix]uint64      // blocks by the log
	last    uint64                       // the newest block seen
	disk    map[netip.Prefix]store.Block // in force when the store was last read
	pending *crashWord                   // the operation in which the daemon was killed
	acks    []crashWord                  // of the last life

	states, acked, cut, cutDone, ranOut int
}

func (m *crashModel) errorf(format string, args ...any) {
	m.t.Helper()
	m.t.Errorf("round %d: "+format, append([]any{m.round}, args...)...)
}

func (m *crashModel) allowed(p netip.Prefix) bool {
	return slices.ContainsFunc(slices.Collect(maps.Keys(m.allow)), p.Overlaps)
}

// ends takes the blocks of m.force that an operation ends.
func (m *crashModel) ends(w crashWord) (ended []store.Block) {
	for p, b := range m.force {
		q := w.Prefixes[0]
		if w.Op == "unblock" && q.Bits() <= p.Bits() && q.Overlaps(p) || w.Op == "allow" && q.Overlaps(p) {
			ended = append(ended, b)
			delete(m.force, p)
		}
	}
	return ended
}

// lived takes in what a daemon told.
func (m *crashModel) lived(words []crashWord) {
	m.pending, m.acks = nil, nil
	for _, w := range words {
		switch {
		case w.State != nil:
			m.started(*w.State)
		case !w.Done:
			m.pending = &w
		default:
			m.pending = nil
			m.acks = append(m.acks, w)
			m.did(w)
		}
	}
}

// started compares what a daemon came to at its start with what the store had
// before, and the kernel with the store.
func (m *crashModel) started(s crashState) {
	m.states++
	for p, b := range m.force {
		if m.allowed(p) {
			delete(m.force, p) // the allow was under way at the kill, and has won
			if b.Until.After(s.From) {
				m.lifted[b.ID] = true
			} else {
				m.ranOut++
				m.unsure[b.ID] = true
			}
		}
	}
	allow := slices.SortedFunc(maps.Keys(m.allow), netip.Prefix.Compare)
	slices.SortFunc(s.Allow, netip.Prefix.Compare)
	if !slices.Equal(s.Allow, allow) {
		m.errorf("the allowlist is %v after the start, and was %v", s.Allow, allow)
	}
	if s.Stale {
		m.errorf("the rules in the kernel are not those of the allowlist %v", s.Allow)
	}
	in := make(map[netip.Prefix]store.Block)
	for _, b := range s.InForce {
		if old, ok := in[b.Prefix]; ok {
			m.errorf("%s is blocked twice: %+v, %+v", b.Prefix, old, b)
		}
		in[b.Prefix] = b
		if m.allowed(b.Prefix) {
			m.errorf("%s is allowed, and blocked after the start: %+v", b.Prefix, b)
		}
		if was, ok := m.disk[b.Prefix]; (!ok || was.ID != b.ID) && (b.By != store.Self || b.ID <= m.last) {
			m.errorf("after the start a block is in force that was not: %+v", b)
		}
	}
	for p, was := range m.disk {
		if b := in[p]; b.ID != was.ID && !m.allowed(p) && was.Until.After(s.From) {
			m.errorf("a block is not in force after the start: %+v", was)
		}
	}
	slack := s.slack()
	kernel := make(map[netip.Prefix]time.Time)
	for _, e := range s.Kernel {
		kernel[e.Prefix] = e.Until
		if _, ok := in[e.Prefix]; !ok && e.Until.Sub(s.To) > slack {
			m.errorf("the kernel blocks %s until %s, the store does not", e.Prefix, e.Until)
		}
	}
	for p, b := range in {
		switch until, ok := kernel[p]; {
		case !ok && b.Until.Sub(s.To) > time.Second/2:
			m.errorf("the kernel does not block: %+v", b)
		case ok && until.Sub(b.Until).Abs() > slack:
			m.errorf("the kernel blocks %s until %s, the store until %s", p, until, b.Until)
		}
	}
}

// did takes in an operation that was acknowledged.
func (m *crashModel) did(w crashWord) {
	m.acked++
	p := w.Prefixes[0]
	switch w.Op {
	case "block":
		if len(w.Made)+len(w.Refused) != len(w.Prefixes) {
			m.errorf("not all was answered: %+v", w)
		}
		for _, p := range w.Refused {
			if !m.allowed(p) {
				m.errorf("%s was refused and is not allowed: %+v", p, w)
			}
		}
		for _, b := range w.Made {
			if m.allowed(b.Prefix) {
				m.errorf("%s was blocked and is allowed: %+v", b.Prefix, w)
			}
			m.make(b)
		}
	case "allow":
		m.allow[p] = true
	case "disallow":
		delete(m.allow, p)
	}
	for _, b := range w.Lifted {
		m.lifted[b.ID] = true
	}
	for _, b := range m.ends(w) {
		if !m.lifted[b.ID] && b.Until.After(w.At) {
			m.errorf("%s of %s did not lift %+v", w.Op, p, b)
		}
	}
}

func (m *crashModel) make(b store.Block) {
	if old, ok := m.force[b.Prefix]; ok && old.Until.After(b.Since) {
		m.lifted[old.ID] = true // replaced
	}
	m.made[b.ID], m.force[b.Prefix] = b, b
}

// killed compares the store that a daemon left with what it told.
func (m *crashModel) killed() {
	st, err := store.Open(m.path, store.Options{ReadOnly: true, Wait: 10 * time.Second})
	if errors.Is(err, fs.ErrNotExist) && m.states == 0 {
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	defer st.Close()
	now := time.Now()

	newest, err := st.History(netip.Prefix{}, time.Time{}, 1)
	if err != nil {
		m.t.Fatal(err)
	}
	var fresh, under []store.Block
	for id := m.last + 1; len(newest) > 0 && id <= newest[0].ID; id++ {
		b, err := st.Block(id)
		if err != nil {
			m.t.Fatal(err)
		}
		fresh = append(fresh, b)
		_, acked := m.made[id]
		switch {
		case b.By == store.Self && b.Verdict != nil && crashLogged.Contains(b.Prefix.Addr()):
			if old, ok := m.sources[b.Prefix]; ok {
				was, err := st.Block(old)
				m.errorf("the same lines of the log made two blocks: %+v\n%+v %v", was, b, err)
			}
			m.sources[b.Prefix] = id
		case m.pending != nil && m.pending.Op == "block" && b.By == m.pending.By:
			under = append(under, b)
		case !acked:
			m.errorf("nobody made the block %+v", b)
		}
	}
	if n := len(fresh); n > 0 {
		m.last = fresh[n-1].ID
	}
	m.entries(st)
	if m.pending != nil {
		m.cut++
		m.half(st, under, now)
	}
	for id := range m.unsure {
		m.is(st, id)
	}
	for _, w := range m.acks {
		for _, b := range slices.Concat(w.Made, w.Lifted) {
			m.is(st, b.ID)
		}
	}

	// A kill in an allow leaves blocks that the next start lifts, and that one
	// may have been killed before it could tell.
	for p, b := range m.force {
		if !m.allowed(p) {
			continue
		}
		if is, err := st.Block(b.ID); err == nil && !is.Lifted.IsZero() {
			m.lifted[b.ID] = true
			delete(m.force, p)
		}
	}

	// What must be in force is, and nothing else of an operator.
	in, err := st.InForce(now)
	if err != nil {
		m.t.Fatal(err)
	}
	m.disk = make(map[netip.Prefix]store.Block)
	for _, b := range in {
		if old, ok := m.disk[b.Prefix]; ok {
			m.errorf("%s is in the store twice: %+v, %+v", b.Prefix, old, b)
		}
		m.disk[b.Prefix] = b
		if want := m.force[b.Prefix]; b.By != store.Self && want.ID != b.ID {
			m.errorf("a block is in force that was ended: %+v; %+v should be", b, want)
		}
	}
	for p, b := range m.force {
		if !b.Until.After(now) {
			m.ranOut++
			delete(m.force, p)
		} else if m.disk[p].ID != b.ID {
			m.errorf("lost: %+v", b)
		}
	}
	if m.round%10 == 0 {
		if err := st.Check(); err != nil {
			m.errorf("the store is damaged: %v", err)
		}
	}
}

// is sees that the store has a block as it was acknowledged.
func (m *crashModel) is(st *store.Store, id uint64) {
	b, err := st.Block(id)
	if err != nil {
		m.errorf("lost: %v", err)
		return
	}
	if want, ok := m.made[id]; ok && (b.Prefix != want.Prefix || b.By != want.By || !b.Since.Equal(want.Since) || !b.Until.Equal(want.Until)) {
		m.errorf("a block in the store is %+v, was acknowledged as %+v", b, want)
	}
	if m.unsure[id] { // as it was found, from now on
		m.lifted[id] = !b.Lifted.IsZero()
		delete(m.unsure, id)
	}
	// One that has run out, but was not swept yet, may be lifted all the same.
	if m.lifted[id] == b.Lifted.IsZero() && (m.lifted[id] || b.Lifted.Before(b.Until)) {
		m.errorf("its end was acknowledged: %v; in the store is %+v", m.lifted[id], b)
	}
}

// entries compares the allowlist; a change that was under way is in it or not.
func (m *crashModel) entries(st *store.Store) {
	list, err := st.AllowList()
	if err != nil {
		m.t.Fatal(err)
	}
	have := make(map[netip.Prefix]bool)
	for _, e := range list {
		have[e.Prefix] = true
	}
	if w := m.pending; w != nil && strings.HasSuffix(w.Op, "allow") {
		if p := w.Prefixes[0]; have[p] != m.allow[p] {
			m.cutDone++
			if m.allow[p] = have[p]; !have[p] {
				delete(m.allow, p)
			}
		}
	}
	if !maps.Equal(have, m.allow) {
		m.errorf("the allowlist is %v, should be %v", have, m.allow)
	}
}

// half takes in the operation in which the daemon was killed: it is in the
// store wholly or not at all. made are the blocks of it that are.
func (m *crashModel) half(st *store.Store, made []store.Block, now time.Time) {
	w := *m.pending
	if w.Op == "block" {
		admitted := slices.DeleteFunc(slices.Clone(w.Prefixes), m.allowed)
		if len(made) != 0 && len(made) != len(admitted) {
			m.errorf("%+v was done by half: %+v", w, made)
		}
		if len(made) > 0 {
			m.cutDone++
		}
		for _, b := range made {
			old, replaced := m.force[b.Prefix]
			m.make(b)
			if replaced {
				m.is(st, old.ID)
			}
		}
		return
	}
	ended := m.ends(w)
	if w.Op == "allow" && !m.allow[w.Prefixes[0]] {
		for _, b := range ended {
			m.force[b.Prefix] = b // not even begun
		}
		return
	}
	var done, not int
	for _, b := range ended {
		switch is, err := st.Block(b.ID); {
		case err != nil:
			m.errorf("lost: %v", err)
		case !is.Lifted.IsZero():
			m.lifted[b.ID] = true
			done++
		default:
			m.force[b.Prefix] = b
			if b.Until.After(now) {
				not++
			}
		}
	}
	if done > 0 && not > 0 {
		m.errorf("%+v was done by half: %d lifted, %d not", w, done, not)
	}
	if done > 0 && w.Op == "unblock" {
		m.cutDone++
	}
}

// whole looks at everything that the store has in the end.
func (m *crashModel) whole() {
	st, err := store.Open(m.path, store.Options{ReadOnly: true, Wait: 10 * time.Second})
	if err != nil {
		m.t.Fatal(err)
	}
	defer st.Close()
	if err := st.Check(); err != nil {
		m.t.Errorf("the store is damaged: %v", err)
	}
	for id := range m.made {
		m.is(st, id)
	}
	for id := range m.lifted {
		m.is(st, id)
	}
	all, err := st.History(netip.Prefix{}, time.Time{}, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	if len(all) != len(m.made)+len(m.sources) {
		m.t.Errorf("the store has %d blocks; %d were made by hand and %d by the log", len(all), len(m.made), len(m.sources))
	}
	before := make(map[netip.Prefix]store.Block)
	for _, b := range slices.Backward(all) { // oldest first
		if old, ok := before[b.Prefix]; ok && old.End().After(b.Since) {
			m.t.Errorf("two blocks of %s at the same time: %+v, %+v", b.Prefix, old, b)
		}
		before[b.Prefix] = b
	}
}
