package guard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
)

// kernel is a socket table that a test fills.
type kernel struct {
	mu    sync.Mutex
	socks map[netip.AddrPort]sockets.State
	stuck bool // connections do not end
	ended []netip.Prefix
	lists int
}

func (k *kernel) looks() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.lists
}

func (k *kernel) open(addr string, n int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.socks == nil {
		k.socks = make(map[netip.AddrPort]sockets.State)
	}
	for i := range n {
		k.socks[netip.AddrPortFrom(netip.MustParseAddr(addr), uint16(20000+i))] = sockets.Established
	}
}

func (k *kernel) List(context.Context, []uint16) ([]sockets.Socket, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.lists++
	var out []sockets.Socket
	for peer, st := range k.socks {
		out = append(out, sockets.Socket{Local: netip.MustParseAddrPort("192.0.2.1:25"), Remote: peer, State: st, Inode: 1})
	}
	return out, nil
}

func (k *kernel) End(_ context.Context, prefixes []netip.Prefix, _ []uint16) (e sockets.Ended, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.ended = append(k.ended, prefixes...)
	for peer := range k.socks {
		if slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(peer.Addr()) }) {
			if k.stuck {
				e.Left++
				continue
			}
			delete(k.socks, peer)
			e.Destroyed++
		}
	}
	return e, nil
}

// left is how many connections there are.
func (k *kernel) left() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.socks)
}

func (k *kernel) CanDestroy(context.Context) (bool, error) { return true, nil }

// world is a guard with real store, memory firewall and a kernel of the test's.
type world struct {
	t      *testing.T
	g      *Guard
	fw     firewall.Firewall
	k      *kernel
	st     *store.Store
	policy *policy.Policy
	path   string
	passes [][]netip.Prefix // what the packet filter was opened with
	shut   error            // why the packet filter cannot be opened anew

	ownMu sync.Mutex
	own   []Exempt // this machine's addresses
	zone  *zone    // the DNS; nil: an empty one
	news  chan struct{}
}

// takeOn makes these this machine's addresses beside 192.0.2.1.
func (w *world) takeOn(own ...Exempt) {
	w.ownMu.Lock()
	w.own = own
	w.ownMu.Unlock()
	select {
	case w.news <- struct{}{}:
	default:
	}
}

func newWorld(t *testing.T, change func(*policy.Policy)) *world {
	t.Helper()
	w := &world{t: t, news: make(chan struct{}, 1), k: &kernel{}, policy: policy.Default(), path: filepath.Join(t.TempDir(), "s.db")}
	w.policy.Mode = policy.Enforce
	if change != nil {
		change(w.policy)
	}
	w.start()
	return w
}

func (w *world) start() {
	w.t.Helper()
	var err error
	if w.st, err = store.Open(w.path, store.Options{}); err != nil {
		w.t.Fatal(err)
	}
	if w.fw == nil {
		w.fw = firewall.NewMemory(firewall.Options{})
	}
	o := Options{Policy: w.policy, Store: w.st, Capacity: 100,
		OpenFirewall: func(_ context.Context, allow []netip.Prefix, _ int) (firewall.Firewall, error) {
			w.passes = append(w.passes, allow)
			if w.shut != nil {
				return nil, w.shut
			}
			return w.fw, nil
		},
		Self: func(context.Context) ([]Exempt, error) {
			w.ownMu.Lock()
			defer w.ownMu.Unlock()
			return append([]Exempt{{netip.MustParsePrefix("192.0.2.1/32"), "an address of this machine"}}, w.own...), nil
		},
		WatchSelf: func(ctx context.Context, changed func()) error {
			for {
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-w.news:
					changed()
				}
			}
		}}
	if w.zone == nil {
		w.zone = &zone{}
	}
	o.DNS = w.zone
	if w.policy.Confirm == policy.ConfirmSockets {
		o.Sockets = w.k
	}
	if w.g, err = New(w.t.Context(), o); err != nil {
		w.t.Fatal(err)
	}
}

// dns lets z answer for the names of the allowlist; before run.
func (w *world) dns(z *zone) { w.zone, w.g.o.DNS = z, z }

// run starts the guard and returns what stops it.
func (w *world) run() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error, 1)
	go func() { done <- w.g.Run(ctx) }()
	synctest.Wait()
	return func() {
		w.t.Helper()
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
		if err := w.st.Close(); err != nil {
			w.t.Error(err)
		}
	}
}

// block blocks by hand.
func (w *world) block(p string, d time.Duration) BlockOutcome {
	w.t.Helper()
	o, err := w.g.Block(w.t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix(p), For: d, By: "root"}}, false)
	if err != nil || len(o) != 1 {
		w.t.Fatal(o, err)
	}
	return o[0]
}

// inFilter is what the packet filter holds, sorted.
func (w *world) inFilter() string {
	w.t.Helper()
	var got []netip.Prefix
	if err := w.g.do(w.t.Context(), func(ctx context.Context) {
		for in, err := range w.fw.List(ctx) {
			if err != nil {
				w.t.Error(err)
			}
			got = append(got, in.Prefix)
		}
	}); err != nil {
		w.t.Fatal(err)
	}
	slices.SortFunc(got, netip.Prefix.Compare)
	return join(got)
}

func join(ps []netip.Prefix) string {
	var s []string
	for _, p := range ps {
		s = append(s, p.String())
	}
	return strings.Join(s, " ")
}

func (w *world) want(filter string) {
	w.t.Helper()
	if got := w.inFilter(); got != filter {
		w.t.Errorf("the filter holds %q, want %q", got, filter)
	}
}

const five = "203.0.113.1/32 203.0.113.2/32 203.0.113.3/32 203.0.113.4/32 203.0.113.5/32"

func (k *kernel) flood() {
	for i := 1; i <= 5; i++ {
		k.open(fmt.Sprintf("203.0.113.%d", i), 20)
	}
}

// A log without connection lines: the socket table alone finds the holders,
// and relief comes.
func TestReliefThroughSocketTable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want(five)
		if n := w.k.left(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		list, err := w.g.Blocks(t.Context())
		if err != nil || len(list) != 5 {
			t.Fatalf("%d blocks, %v", len(list), err)
		}
		for _, b := range list {
			if b.State != InForce || b.Ended != 20 || b.Relief == 0 || b.Verdict == nil || b.Offence != 1 {
				t.Errorf("block %+v", b)
			}
		}
		lifted, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.0/24"), "root")
		if err != nil || len(lifted) != 5 {
			t.Fatalf("lifted %d, %v", len(lifted), err)
		}
		w.want("")
		time.Sleep(5 * time.Second)
		w.want("")
	})
}

func TestObserveTouchesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Mode = policy.Observe })
		defer w.run()()
		w.k.flood()
		time.Sleep(20 * time.Second)
		w.want("")
		if n := w.k.left(); n != 100 {
			t.Errorf("%d connections are left", n)
		}
		list, _ := w.g.Blocks(t.Context())
		if len(list) != 5 {
			t.Fatalf("%d blocks observed, want 5", len(list))
		}
		for _, b := range list {
			if b.State != OnlySeen {
				t.Errorf("%s is %s", b.Prefix, b.State)
			}
		}
	})
}

// lines hands the guard the events of log lines, as a follower would.
func (w *world) lines(evs ...detector.Event) {
	l := &logState{path: "test", caughtUp: true}
	w.g.in <- input{log: l, events: evs, lines: len(evs), caughtUp: true}
}

func opens(addr string, n, from int) (evs []detector.Event) {
	for i := range n {
		evs = append(evs, detector.Event{Time: time.Now(), Kind: detector.Opened, Source: netip.MustParseAddr(addr), Port: uint16(40000 + i), Count: from + i})
	}
	return evs
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Byte-exact lines naming a victim that holds nothing, or next to nothing,
// block nobody.
func TestForgedLines(t *testing.T) {
	for _, holds := range []int{0, 2, 20} {
		t.Run(fmt.Sprint(holds), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				defer w.run()()
				w.k.open("198.51.100.9", holds)
				for range 30 {
					w.lines(opens("198.51.100.9", 99, 1)...)
					time.Sleep(time.Second)
				}
				w.want("")
				s, err := w.g.Status(t.Context())
				if err != nil || s.Counters.Blocked != 0 {
					t.Errorf("%d blocks, %v: %+v", s.Counters.Blocked, err, s.Decisions)
				}
				if s.Counters.Unconfirmed == 0 {
					t.Error("no verdict was made at all: the test shows nothing")
				}
			})
		})
	}
}

// Forged lines beside those of a sender that opens five connections a second
// itself, each gone soon and in TIME-WAIT for a while: they do not make a storm
// of it. A storm of the same kind that is real is confirmed.
func TestForgedBesideBusy(t *testing.T) {
	for _, c := range []struct {
		rate              int
		delivers, blocked bool
	}{{5, true, false}, {5, false, false}, {25, true, false}, {25, false, true}} {
		rate, blocked := c.rate, c.blocked
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				defer w.run()()
				busy := netip.MustParseAddr("198.51.100.9")
				port := uint16(1000)
				for range 30 * 10 {
					for range rate / 5 {
						port++
						w.k.mu.Lock()
						if w.k.socks == nil {
							w.k.socks = make(map[netip.AddrPort]sockets.State)
						}
						w.k.socks[netip.AddrPortFrom(busy, port)] = sockets.TimeWait
						w.k.mu.Unlock()
						w.lines(detector.Event{Time: time.Now(), Kind: detector.Opened, Source: busy, Port: port, Count: 1},
							detector.Event{Time: time.Now(), Kind: detector.Closed, Source: busy, Port: port})
						if c.delivers {
							w.lines(detector.Event{Time: time.Now(), Kind: detector.Accepted, Source: busy})
						}
					}
					w.lines(opens(busy.String(), 10, 90)...) // forged
					time.Sleep(200 * time.Millisecond)
				}
				if got := w.inFilter() != ""; got != blocked {
					s, _ := w.g.Status(t.Context())
					t.Errorf("blocked: %v, want %v: %+v", got, blocked, s.Decisions)
				}
			})
		})
	}
}

// With confirm: off the log is believed.
func TestLogAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Confirm = policy.ConfirmOff })
		defer w.run()()
		w.lines(opens("198.51.100.9", 97, 1)...)
		time.Sleep(12 * time.Second)
		w.want("198.51.100.9/32")
	})
}

// Blocks outlive a kill: the next start puts them back with their own ends.
func TestRestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want(five)
		before, _ := w.g.Blocks(t.Context())
		stop()
		w.fw = firewall.NewMemory(firewall.Options{}) // a reboot
		time.Sleep(time.Minute)
		w.start()
		defer w.run()()
		w.want(five)
		after, _ := w.g.Blocks(t.Context())
		if len(after) != len(before) {
			t.Fatalf("%d blocks before, %d after", len(before), len(after))
		}
		for i := range after {
			if !after[i].Until.Equal(before[i].Until) || after[i].ID != before[i].ID {
				t.Errorf("before %v until %v, after %v until %v", before[i].ID, before[i].Until, after[i].ID, after[i].Until)
			}
		}
		time.Sleep(10 * time.Minute)
		w.want("")
		list, _ := w.g.Blocks(t.Context())
		if len(list) != 0 {
			t.Errorf("%d blocks after their time", len(list))
		}
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want(five)
		list, _ = w.g.Blocks(t.Context())
		for _, b := range list {
			if b.Offence != 2 || b.Until.Sub(b.Since) < 59*time.Minute {
				t.Errorf("second offence: %d, until %s after it began", b.Offence, b.Until.Sub(b.Since))
			}
		}
	})
}

// broken is a firewall that fails on command.
type broken struct {
	firewall.Firewall
	err error
}

func (b *broken) Apply(ctx context.Context, batch firewall.Batch) (r firewall.Result, err error) {
	if b.err != nil {
		for _, e := range batch.Set {
			r.Failed = append(r.Failed, firewall.Failure{Prefix: e.Prefix, Err: b.err})
		}
		return r, b.err
	}
	return b.Firewall.Apply(ctx, batch)
}

func (b *broken) Replace(ctx context.Context, e []firewall.Entry) error {
	if b.err != nil {
		return b.err
	}
	return b.Firewall.Replace(ctx, e)
}

func (b *broken) Probe(ctx context.Context) (firewall.Capabilities, error) {
	c, err := b.Firewall.Probe(ctx)
	c.Real = true
	return c, err
}

// A block that cannot be applied is never shown as in force, and is applied
// as soon as it can be.
func TestFirewallFails(t *testing.T) {
	for _, err := range []error{errors.New("no buffer space available"), firewall.ErrUnknown, firewall.ErrGone, firewall.ErrFull,
		fmt.Errorf("%w: the command ipset is not installed", firewall.ErrUnavailable), fmt.Errorf("adding: %w", syscall.EPERM), context.DeadlineExceeded} {
		t.Run(err.Error(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, nil)
				b := &broken{Firewall: firewall.NewMemory(firewall.Options{})}
				w.st.Close()
				w.fw = b
				w.start()
				defer w.run()()
				set := func(err error) {
					if e := w.g.do(t.Context(), func(context.Context) { b.err = err }); e != nil {
						t.Fatal(e)
					}
				}
				set(err)
				got := w.block("198.51.100.0/24", time.Hour)
				if got.Block == nil || got.Block.ID == 0 || got.Error == "" {
					t.Errorf("Block reports %+v", got)
				}
				list, _ := w.g.Blocks(t.Context())
				if len(list) != 1 || list[0].State != NotApplied || list[0].Error == "" {
					t.Errorf("blocks %+v", list)
				}
				s, _ := w.g.Status(t.Context())
				if s.Firewall.Agrees || s.Firewall.Error == "" {
					t.Errorf("status %+v", s.Firewall)
				}
				set(nil)
				time.Sleep(time.Minute)
				w.want("198.51.100.0/24")
				list, _ = w.g.Blocks(t.Context())
				if len(list) != 1 || list[0].State != InForce {
					t.Errorf("blocks %+v", list)
				}
			})
		})
	}
}

func TestByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Block.Overlap = policy.OverlapRefuse
			p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("198.51.100.64/26"), Why: "policy.yaml:3:4"}}
		})
		defer w.run()()
		ctx := t.Context()
		for _, p := range []string{"198.51.100.0/24", "198.51.100.65/32", "192.0.2.0/24", "10.0.0.0/8", "192.0.2.1/32", "2001::/16"} {
			if o := w.block(p, time.Hour); o.Refused == "" || o.Block != nil {
				t.Errorf("block %s: %+v, want a refusal", p, o)
			}
		}
		w.want("")
		for _, p := range []string{"203.0.113.0/24", "203.0.113.7/32", "203.0.113.128/25", "2001:db8::/48"} {
			if o := w.block(p, time.Hour); o.Block == nil || o.Error != "" {
				t.Errorf("%+v", o)
			}
		}
		if o := w.block("203.0.113.7/32", 5*time.Hour); o.Block == nil || time.Until(o.Block.Until) < 4*time.Hour {
			t.Errorf("%+v", o)
		}
		dry, err := w.g.Block(ctx, []BlockRequest{
			{Prefix: netip.MustParsePrefix("198.51.100.0/25"), Until: time.Now().Add(-time.Hour)},
			{Prefix: netip.MustParsePrefix("198.51.100.0/26"), Until: time.Now().Add(time.Hour)},
			{Prefix: netip.MustParsePrefix("198.51.100.0/26")}}, true)
		if err != nil || len(dry) != 3 || dry[0].Refused == "" || dry[1].Block == nil || dry[1].Block.ID != 0 || dry[2].Refused == "" {
			t.Errorf("dry run: %+v, %v", dry, err)
		}
		if _, err := w.g.Block(ctx, []BlockRequest{{Prefix: netip.MustParsePrefix("198.51.100.1/26")}}, false); err == nil {
			t.Error("a prefix with host bits is taken")
		}
		w.want("203.0.113.0/24 203.0.113.7/32 203.0.113.128/25 2001:db8::/48")
		var cov *CoveredError
		if _, err := w.g.Unblock(ctx, netip.MustParsePrefix("203.0.113.9/32"), "root"); !errors.As(err, &cov) || cov.By.String() != "203.0.113.0/24" {
			t.Errorf("unblock inside a block: %v", err)
		}
		if got, err := w.g.Unblock(ctx, netip.MustParsePrefix("198.51.100.9/32"), "root"); err != nil || len(got) != 0 {
			t.Errorf("unblock of what is not blocked: %v, %v", got, err)
		}
		// Allowing one address lifts every block that overlaps it.
		lifted, err := w.g.Allow(ctx, store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.130/32"), By: "root"})
		if err != nil || len(lifted) != 2 {
			t.Errorf("allow lifted %d, %v", len(lifted), err)
		}
		w.want("203.0.113.7/32 2001:db8::/48")
		if got, err := w.g.Unblock(ctx, netip.Prefix{}, "root"); err != nil || len(got) != 2 {
			t.Errorf("unblock all: %d, %v", len(got), err)
		}
		w.want("")
	})
}

// What is allowed is never in the filter, whatever the log and the operator do.
func TestNeverBlocksAllowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Confirm = policy.ConfirmOff
			p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.3/32"), Why: "policy.yaml:3:4"}}
		})
		defer w.run()()
		for i := 1; i <= 5; i++ {
			w.lines(opens(fmt.Sprintf("203.0.113.%d", i), 20, 20*(i-1)+1)...)
		}
		time.Sleep(15 * time.Second)
		w.want("203.0.113.1/32 203.0.113.2/32 203.0.113.4/32 203.0.113.5/32")
		x, err := w.g.Explain(t.Context(), netip.MustParsePrefix("203.0.113.3/32"))
		if err != nil || x.Allowed == nil || x.Blocked != nil || len(x.Recent) == 0 || x.Recent[0].What != Refused {
			t.Errorf("explain: %+v, %v", x, err)
		}
	})
}

// A connection of a blocked source that shows up later is ended too.
func TestLateConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.k.stuck = true
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want(five)
		w.k.mu.Lock()
		w.k.stuck = false
		w.k.mu.Unlock()
		time.Sleep(2 * time.Second)
		if n := w.k.left(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		for _, b := range must(w.g.Blocks(t.Context())) {
			if b.Relief < 4*time.Second || b.Relief > 10*time.Second {
				t.Errorf("relief took %s, it says", b.Relief)
			}
		}
	})
}

// A policy that is read again counts at once: what it allows is free, in the
// gate and in the packet filter, and its rules judge what is held already.
func TestReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Confirm = policy.ConfirmOff
			p.Rules = nil
		})
		defer w.run()()
		ctx := t.Context()
		w.lines(opens("198.51.100.9", 97, 1)...)
		w.block("203.0.113.0/24", time.Hour)
		time.Sleep(20 * time.Second)
		w.want("203.0.113.0/24")
		p := policy.Default()
		p.Mode, p.Confirm, p.Logs = policy.Enforce, policy.ConfirmOff, []string{"/other"}
		p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
		done, err := w.g.Reload(ctx, p)
		if err != nil || done.Undone != nil || !slices.Equal(done.Restart, []string{"logs"}) {
			t.Errorf("%+v, %v", done, err)
		}
		w.want(around7)
		if last := w.passes[len(w.passes)-1]; join(last) != "203.0.113.7/32" {
			t.Errorf("the packet filter lets pass %v", last)
		}
		time.Sleep(12 * time.Second)
		w.want("198.51.100.9/32 " + around7)
	})
}

// Commands that come before the daemon has put its blocks back wait for that.
func TestCommandsWaitForRestore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		w.block("203.0.113.0/24", time.Hour)
		stop()
		slow := &slowReplace{Firewall: w.fw, for_: 3 * time.Second}
		w.fw = slow
		w.start()
		stop = w.run() // in the middle of restore
		start := time.Now()
		lifted, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.0/24"), "root")
		if err != nil || len(lifted) != 1 || time.Since(start) < 3*time.Second {
			t.Errorf("lifted %v after %s, %v", lifted, time.Since(start), err)
		}
		w.want("")
		stop()
	})
}

type slowReplace struct {
	firewall.Firewall
	for_ time.Duration
}

func (s *slowReplace) Replace(ctx context.Context, e []firewall.Entry) error {
	time.Sleep(s.for_)
	return s.Firewall.Replace(ctx, e)
}

// Where the store cannot be written, a flood is ended all the same, for a
// short time, and it is said; an operator is told no.
func TestStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		st := w.st
		full, err := store.Open(filepath.Join(t.TempDir(), "full.db"), store.Options{})
		if err != nil {
			t.Fatal(err)
		}
		full.Close() // every write fails
		use := func(s *store.Store) {
			if err := w.g.do(t.Context(), func(context.Context) { w.g.o.Store = s }); err != nil {
				t.Fatal(err)
			}
		}
		use(full)
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want(five)
		if n := w.k.left(); n != 0 {
			t.Errorf("%d connections are left", n)
		}
		s := must(w.g.Status(t.Context()))
		if !strings.Contains(strings.Join(s.Warnings, "\n"), "could not be written down") {
			t.Errorf("warnings: %q", s.Warnings)
		}
		if _, err := w.g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix("198.51.100.0/24"), By: "root"}}, false); err == nil {
			t.Error("an operator is not told")
		}
		w.want(five)
		use(st)
		time.Sleep(5 * time.Second)
		in, err := st.InForce(time.Now())
		if err != nil || len(in) != 5 {
			t.Errorf("%d blocks are written down, %v", len(in), err)
		}
		time.Sleep(unsavedFor)
		w.want("")
		stop()
	})
}

// The machine's own addresses stay allowed when they cannot all be found.
func TestSelfInPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		if err := w.g.do(t.Context(), func(context.Context) {
			w.g.o.Self = func(context.Context) ([]Exempt, error) { return neverBlocked, errors.New("no netlink") }
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * selfEvery)
		if o := w.block("192.0.2.1/32", time.Hour); o.Refused == "" {
			t.Errorf("%+v", o)
		}
	})
}

// While something cannot be found out, what was known of it stays, and the rest
// follows what is; it is told once.
func TestSelfInPartForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		const own, resolver = "an address of this machine", "a resolver of this machine"
		w.takeOn(Exempt{netip.MustParsePrefix("198.51.100.53/32"), resolver})
		time.Sleep(time.Second)
		n := 0
		if err := w.g.do(t.Context(), func(context.Context) {
			w.g.o.Self = func(context.Context) ([]Exempt, error) { // the addresses come and go, the resolvers are not known
				n++
				return []Exempt{{netip.MustParsePrefix("192.0.2.1/32"), own}, {netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 9, byte(n >> 8), byte(n)}), 32), own}},
					errors.New("permission denied")
			}
		}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Hour)
		s, err := w.g.Status(t.Context())
		if err != nil || s.Counters.Faults == 0 || s.Counters.Faults > 6 {
			t.Errorf("%d faults in 5 h, %v", s.Counters.Faults, err)
		}
		if n < 200 {
			t.Fatalf("only %d looks", n)
		}
		of10 := 0
		for _, e := range w.g.self {
			if netip.MustParsePrefix("10.9.0.0/16").Overlaps(e.Prefix) {
				of10++
			}
		}
		if most := int(selfKept/selfEvery) + 1; of10 == 0 || of10 > most {
			t.Errorf("%d addresses are kept that left, want %d at most", of10, most)
		}
		for _, p := range []string{"192.0.2.1/32", "198.51.100.53/32"} {
			if o := w.block(p, time.Hour); o.Refused == "" {
				t.Errorf("%+v", o)
			}
		}
	})
}

// What is not found for a while, a resolver whose resolv.conf is written anew,
// stays allowed, and goes in the end.
func TestSelfForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.takeOn(Exempt{netip.MustParsePrefix("198.51.100.53/32"), "a resolver of this machine"})
		time.Sleep(time.Second)
		w.takeOn()
		time.Sleep(selfKept - 2*time.Second)
		if o := w.block("198.51.100.53/32", time.Hour); o.Refused == "" {
			t.Errorf("too early: %+v", o)
		}
		time.Sleep(selfEvery + 2*time.Second)
		if o := w.block("198.51.100.53/32", time.Hour); o.Refused != "" {
			t.Errorf("not forgotten: %+v", o)
		}
	})
}

// What was observed makes no difference once blocks are real.
func TestObserveThenEnforce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Mode, p.Block.MaxBlocks = policy.Observe, 5 })
		stop := w.run()
		w.k.flood()
		time.Sleep(12 * time.Second)
		if n := len(must(w.g.Blocks(t.Context()))); n != 5 {
			t.Fatalf("%d observed", n)
		}
		stop()
		w.policy.Mode = policy.Enforce
		w.start()
		stop = w.run()
		time.Sleep(12 * time.Second)
		w.want(five)
		stop()
		// And back: what is really blocked stays so, and is not replaced.
		w.policy.Mode = policy.Observe
		w.start()
		defer w.run()()
		w.want(five)
		if o := w.block("203.0.113.1/32", 24*time.Hour); o.Refused == "" {
			t.Errorf("%+v", o)
		}
		time.Sleep(2 * time.Minute)
		w.want(five)
		if l, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.1/32"), "root"); err != nil || len(l) != 1 {
			t.Error(l, err)
		}
		w.want(five[len("203.0.113.1/32 "):])
	})
}

// A verdict that waits is looked at often also while the log speaks.
func TestPendingUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.lines(opens("198.51.100.9", 120, 1)...) // a storm that the kernel has not shown yet
		w.k.open("192.0.2.77", 1)
		before := w.k.looks()
		for range 60 {
			w.lines(detector.Event{Time: time.Now(), Kind: detector.Tick})
			time.Sleep(50 * time.Millisecond)
		}
		if n := w.k.looks() - before; n < 20 {
			t.Errorf("%d looks at the socket table in 3 s", n)
		}
	})
}

// A number of slots below what Exim itself counts is wrong, and status says so:
// the server would be taken for full too early.
func TestCapacityDisproved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) { p.Confirm = policy.ConfirmOff }) // 100 slots
		defer w.run()()
		for _, c := range []struct {
			from int
			want bool
		}{{91, false}, {101, true}} {
			w.lines(opens("198.51.100.9", 10, c.from)...)
			synctest.Wait()
			s := must(w.g.Status(t.Context()))
			if got := strings.Contains(strings.Join(s.Warnings, "\n"), "Exim has counted 110 connections at once"); got != c.want {
				t.Errorf("%d counted: %q", s.Detector.Counted, s.Warnings)
			}
		}
	})
}
