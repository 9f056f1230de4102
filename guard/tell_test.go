package guard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// heard is a Teller that remembers.
type heard struct {
	mu      sync.Mutex
	last    string
	tells   int
	settled int
	running bool
}

func (h *heard) Tell(es []firewall.Entry) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var texts []string
	for _, e := range es {
		texts = append(texts, e.Prefix.String())
	}
	h.last = strings.Join(texts, " ")
	h.tells++
}

func (h *heard) Run(ctx context.Context, changed func(error)) {
	h.running = true
	changed(errors.New("csf is gone"))
	<-ctx.Done()
	h.running = false
}

func (h *heard) Settle(context.Context) error { h.settled++; return nil }
func (h *heard) Status() firewall.CSFStatus   { return firewall.CSFStatus{Of: 3, Error: "csf is gone"} }
func (h *heard) was(t *testing.T, what, want string) {
	t.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.last != want {
		t.Errorf("%s: told of %q, want %q", what, h.last, want)
	}
}

// TestTell: who is told what, in which order, and how seldom.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.st.Close()
		w.fw = &broken{Firewall: firewall.NewMemory(firewall.Options{})}
		w.start()
		h := new(heard)
		w.g.o.Teller = h
		stop := w.run()
		w.block("198.51.100.7/32", time.Hour)
		w.block("203.0.113.0/24", time.Hour)
		w.block("2001:db8::/48", 2*time.Second)
		time.Sleep(1500 * time.Millisecond)
		h.was(t, "blocks", "2001:db8::/48 203.0.113.0/24 198.51.100.7/32")
		time.Sleep(3 * time.Second)
		h.was(t, "one ran out", "203.0.113.0/24 198.51.100.7/32")
		if _, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.0/24"), "root"); err != nil {
			t.Error(err)
		}
		time.Sleep(1500 * time.Millisecond)
		h.was(t, "lifted", "198.51.100.7/32")
		n := h.tells
		time.Sleep(time.Hour / 2)
		if h.tells != n {
			t.Errorf("told %d times of nothing new", h.tells-n)
		}
		s, err := w.g.Status(t.Context())
		if err != nil || s.Firewall.CSF == nil || s.Firewall.CSF.Of != 3 || !strings.Contains(strings.Join(s.Warnings, "\n"), "in force all the same: csf is gone") {
			t.Errorf("%+v, %v, %v", s.Firewall.CSF, s.Warnings, err)
		}
		n = h.tells
		for i := range 20 {
			w.block(fmt.Sprintf("192.0.2.%d/32", 100+i), time.Minute)
			time.Sleep(100 * time.Millisecond)
		}
		if got := h.tells - n; got < 2 || got > 4 {
			t.Errorf("told %d times in two seconds", got)
		}
		p := *w.policy
		p.Firewall.CSF = policy.CSFIgnore
		use := func(p *policy.Policy) {
			if err := w.g.do(t.Context(), func(context.Context) { w.g.policy = p }); err != nil {
				t.Error(err)
			}
		}
		use(&p)
		w.block("198.51.100.8/32", time.Hour)
		time.Sleep(1500 * time.Millisecond)
		h.was(t, "csf: ignore", "")
		use(w.policy)
		stop()
		if h.running {
			t.Error("it is still running")
		}
		h.settled = 0
		if err := w.g.Close(t.Context(), true); err != nil || h.settled != 1 {
			t.Errorf("settled %d times, %v", h.settled, err)
		}
		h.was(t, "on_stop: remove", "")
	})
}

// TestTellWithoutDaemon: a command that lifts a block has CSF let go of it.
func TestTellWithoutDaemon(t *testing.T) {
	w := newWorld(t, nil)
	w.block("198.51.100.7/32", time.Hour)
	w.block("198.51.100.8/32", time.Hour)
	w.st.Close()
	w.fw = &broken{Firewall: firewall.NewMemory(firewall.Options{})}
	w.start()
	h := new(heard)
	w.g.o.Teller = h
	if _, err := w.g.Blocks(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := w.g.Close(t.Context(), false); err != nil || h.settled != 0 {
		t.Errorf("a look: settled %d times, %v", h.settled, err)
	}
	if _, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("198.51.100.7/32"), "root"); err != nil {
		t.Fatal(err)
	}
	if err := w.g.Close(t.Context(), false); err != nil || h.settled != 1 {
		t.Errorf("settled %d times, %v", h.settled, err)
	}
	h.was(t, "lifted", "198.51.100.8/32")
	w.st.Close()
}

// TestAloneStillDropped: a command that works without a daemon never says that
// something is tried again; it names what is left.
func TestAloneStillDropped(t *testing.T) {
	w := newWorld(t, nil)
	c := &clinging{broken: broken{Firewall: firewall.NewMemory(firewall.Options{})}}
	w.st.Close()
	w.fw = c
	w.start()
	defer w.st.Close()
	w.block("198.51.100.7/32", time.Hour)
	w.block("203.0.113.0/24", time.Hour)
	c.at.Store(true)
	lifted, err := w.g.Unblock(t.Context(), netip.Prefix{}, "root")
	var still *StillDroppedError
	if !errors.As(err, &still) || !still.Alone || len(still.Prefixes) != 2 || len(lifted) != 0 {
		t.Errorf("%v, %v", lifted, err)
	}
	if err == nil || strings.Contains(err.Error(), "tried again;") || !strings.Contains(err.Error(), "still drops 198.51.100.7/32, 203.0.113.0/24; no daemon runs") {
		t.Error(err)
	}
}

// TestWorst: of many the widest and worst are told, whatever the order.
func TestWorst(t *testing.T) {
	w := newWorld(t, nil)
	defer w.st.Close()
	w.g.caps.Real = true
	now := time.Now()
	for i := range 2000 {
		b := store.Block{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), 32), Offence: 1 + i*7%2000, Since: now, Until: now.Add(time.Hour)}
		w.g.blocks.put(b)
	}
	wide := netip.MustParsePrefix("192.0.2.0/24")
	held := store.Block{Prefix: netip.MustParsePrefix("2001:db8::/64"), Offence: 2000, Since: now, Until: now.Add(time.Hour), Verdict: &detector.Verdict{Held: 50}}
	seen := store.Block{Prefix: netip.MustParsePrefix("192.0.0.0/16"), Since: now, Until: now.Add(time.Hour), Observed: true}
	for _, b := range []store.Block{{Prefix: wide, Offence: 1, Since: now, Until: now.Add(time.Hour)}, held, seen} {
		w.g.blocks.put(b)
	}
	got := w.g.worst(now)
	if len(got) != tellMost || got[0].Prefix != wide || got[1].Prefix != held.Prefix {
		t.Fatalf("%d, first %v", len(got), got[:3])
	}
	if !slices.IsSortedFunc(got[2:], func(a, b firewall.Entry) int {
		x, _ := w.g.blocks.get(a.Prefix)
		y, _ := w.g.blocks.get(b.Prefix)
		return y.Offence - x.Offence
	}) {
		t.Error("not in order")
	}
	if last, _ := w.g.blocks.get(got[tellMost-1].Prefix); last.Offence != 2000-(tellMost-3) {
		t.Errorf("the last has offence %d", last.Offence)
	}
}

func TestFilterFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		for i := range 5 {
			w.block(fmt.Sprintf("198.51.100.%d/32", i), time.Duration(i+1)*time.Hour)
		}
		w.block("203.0.113.0/24", time.Hour)
		w.st.Close()
		w.fw = &broken{Firewall: firewall.NewMemory(firewall.Options{MaxEntries: 3})}
		w.start() // with a filter that takes less than the store has
		defer w.run()()
		const fits = "198.51.100.3/32 198.51.100.4/32 203.0.113.0/24"
		w.want(fits)
		check := func(notApplied int) {
			t.Helper()
			n := 0
			for _, b := range must(w.g.Blocks(t.Context())) {
				if b.State == NotApplied {
					n++
				}
			}
			s := must(w.g.Status(t.Context())).Firewall
			if n != notApplied || s.Agrees != (n == 0) || n > 0 && (len(s.Missing) != n || !strings.Contains(s.Error, "packet filter is full")) {
				t.Errorf("%d not applied, want %d; %+v", n, notApplied, s)
			}
		}
		check(3)
		time.Sleep(5 * time.Minute)
		w.want(fits)
		check(3)
		if n := must(w.g.Status(t.Context())).Counters.Faults; n > 3 {
			t.Errorf("told %d times", n)
		}
		if _, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("203.0.113.0/24"), "root"); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Minute)
		w.want("198.51.100.2/32 198.51.100.3/32 198.51.100.4/32")
		check(2)
	})
}
