package guard

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// fillDisk lets every write to the store fail until room is called.
func (w *world) fillDisk() (room func()) {
	w.t.Helper()
	full := must(store.Open(w.t.TempDir()+"/full.db", store.Options{}))
	if err := full.Close(); err != nil {
		w.t.Fatal(err)
	}
	use := func(s *store.Store) {
		w.t.Helper()
		if err := w.g.do(w.t.Context(), func(context.Context) { w.g.o.Store = s }); err != nil {
			w.t.Fatal(err)
		}
	}
	use(full)
	return func() { use(w.st) }
}

func (w *world) wantInStore(prefixes string) {
	w.t.Helper()
	var got []netip.Prefix
	for _, b := range must(w.st.InForce(time.Now())) {
		got = append(got, b.Prefix)
	}
	if !sameWords(join(got), prefixes) {
		w.t.Errorf("in force by the store is %q, want %q", join(got), prefixes)
	}
}

func sameWords(a, b string) bool {
	count := make(map[string]int)
	for _, s := range strings.Fields(a) {
		count[s]++
	}
	for _, s := range strings.Fields(b) {
		count[s]--
	}
	for _, n := range count {
		if n != 0 {
			return false
		}
	}
	return true
}

// What a trial's end lifts while the disk is full stays lifted: neither the
// operator's word later, nor a restart, brings it back. Until it is written
// down status says so, and no word is taken.
func TestTrialLiftsWithFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, time.Minute)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		room := w.fillDisk()
		time.Sleep(2 * time.Minute)
		w.want("")
		w.wantInStore("198.51.100.0/24")
		if !w.warned("the end of 1 blocks could not be written down") {
			t.Errorf("warnings: %q", w.status().Warnings)
		}
		if _, err := w.g.Commit(t.Context(), "root", 0); err == nil {
			t.Error("the operator's word is taken, and a restart would bring back what was lifted")
		}
		w.want("")
		room()
		time.Sleep(2 * sweepEvery)
		w.wantInStore("")
		if w.warned("could not be written down") {
			t.Errorf("warnings: %q", w.status().Warnings)
		}
		if _, err := w.g.Commit(t.Context(), "root", 0); err != nil {
			t.Fatal(err)
		}
		w.want("")
		stop()
		w.start()
		stop = w.run()
		w.want("")
		for _, b := range must(w.g.Blocks(t.Context())) {
			t.Errorf("it came back: %+v", b)
		}
		h := must(w.g.History(t.Context(), netip.MustParsePrefix("198.51.100.0/24")))
		if len(h) != 1 || h[0].State != IsLifted || !strings.Contains(h[0].LiftedBy, "nobody gave the word") {
			t.Errorf("%+v", h)
		}
	})
}

// The operator's word comes when the disk has just got room: what is owed is
// written before it.
func TestCommitAfterOwed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, time.Minute)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		room := w.fillDisk()
		time.Sleep(2 * time.Minute)
		room()
		if _, err := w.g.Commit(t.Context(), "root", 0); err != nil {
			t.Fatal(err)
		}
		w.wantInStore("")
		w.want("")
	})
}

// mode: observe lifts the blocks of a trial; with a full disk too, and the
// trial is not forgotten before that is written down.
func TestObserveLiftsWithFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, time.Hour)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		room := w.fillDisk()
		p := *w.policy
		p.Mode = policy.Observe
		r, err := w.g.Reload(t.Context(), &p)
		if err != nil || r.Undone == nil {
			t.Errorf("%+v, %v", r, err)
		}
		w.want("")
		room()
		time.Sleep(2 * sweepEvery)
		w.wantInStore("")
		w.want("")
	})
}

// A name of the allowlist comes to stand for somebody in a blocked net while the
// disk is full: he is free at once, the rest of the net stays blocked for as
// long as it was, and both is so in the store as soon as it can be written, and
// after a restart before or after that.
func TestSplitWithFullDisk(t *testing.T) {
	for _, early := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted before there is room %v", early), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) {
					p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "policy.yaml:3:4"}}
				})
				z := &zone{}
				z.set("mx.example.org", "198.51.100.1")
				w.dns(z)
				stop := w.run()
				defer func() { stop() }()
				w.block("203.0.113.0/24", 24*time.Hour)
				room := w.fillDisk()
				z.set("mx.example.org", "203.0.113.7")
				time.Sleep(lookEvery + time.Minute)
				w.want(around7)
				w.wantInStore("203.0.113.0/24")
				for _, b := range must(w.g.Blocks(t.Context())) {
					if b.State != InForce {
						t.Errorf("%+v", b)
					}
				}
				time.Sleep(2 * unsavedFor) // they are not forgotten meanwhile
				w.want(around7)
				if early {
					stop() // with the disk still full
					w.start()
					stop = w.run()
					time.Sleep(time.Second)
					w.want(around7)
					w.wantInStore(around7)
					return
				}
				room()
				time.Sleep(2 * sweepEvery)
				w.wantInStore(around7)
				stop()
				w.start()
				stop = w.run()
				w.want(around7)
			})
		})
	}
}

// This machine takes on an address that is blocked while the disk is full: what
// is lifted for that stays lifted when the address is gone again.
func TestOwnWithFullDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		defer func() { stop() }()
		w.block("203.0.113.7/32", 24*time.Hour)
		room := w.fillDisk()
		w.takeOn(Exempt{netip.MustParsePrefix("203.0.113.7/32"), "an address of this machine"})
		time.Sleep(2 * selfEvery)
		w.want("")
		if h := must(w.g.Blocks(t.Context())); len(h) != 0 {
			t.Errorf("%+v", h)
		}
		room()
		time.Sleep(2 * sweepEvery)
		w.takeOn()
		stop()
		w.start()
		stop = w.run()
		w.want("")
	})
}

// Whom a person frees while the disk is full is free, whether his block was ever
// written down or not; that a restart would bring it back is said, until there
// is room.
func TestUnblockUnwritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.block("198.51.100.0/24", time.Hour)
		room := w.fillDisk()
		w.k.flood()
		time.Sleep(12 * time.Second)
		w.want("198.51.100.0/24 " + five)
		first := netip.MustParsePrefix(strings.Fields(five)[0])
		if lifted, err := w.g.Unblock(t.Context(), first, "root"); err != nil || len(lifted) != 1 {
			t.Errorf("%+v, %v", lifted, err)
		}
		var late *OwedError
		if lifted, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("198.51.100.0/24"), "root"); len(lifted) != 1 || !errors.As(err, &late) || !strings.Contains(err.Error(), "brings them back") {
			t.Errorf("the operator is not told: %+v, %v", lifted, err)
		}
		rest := strings.Join(strings.Fields(five)[1:], " ")
		w.want(rest)
		w.wantInStore("198.51.100.0/24")
		room()
		time.Sleep(2 * sweepEvery)
		w.wantInStore(rest)
	})
}

// The packet filter fails once while somebody is freed inside of a block: the
// rest of it goes on, one that was blocked by itself too.
func TestSplitWhileFilterFails(t *testing.T) {
	for _, fails := range []error{errors.New("no buffer space available"), firewall.ErrUnknown, firewall.ErrFull} {
		for _, first := range []string{"", "203.0.113.6/32"} {
			t.Run(fmt.Sprint(fails, first), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, nil)
					b := &broken{Firewall: firewall.NewMemory(firewall.Options{})}
					w.st.Close()
					w.fw = b
					w.start()
					stop := w.run()
					defer func() { stop() }()
					if first != "" {
						w.block(first, 2*time.Hour)
					}
					w.block("203.0.113.0/24", 24*time.Hour)
					filter := func(err error) {
						if err := w.g.do(t.Context(), func(context.Context) { b.err = err }); err != nil {
							t.Fatal(err)
						}
					}
					filter(fails)
					changed, err := w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.7/32"), By: "root"})
					if err == nil || strings.Contains(err.Error(), "still drops ;") {
						t.Errorf("the operator is told %v", err)
					}
					if len(changed) < 9 {
						t.Errorf("of those that changed he is told %d", len(changed))
					}
					filter(nil)
					time.Sleep(10 * time.Minute)
					w.want(around7)
					w.wantInStore(around7)
					if f := w.status().Firewall; !f.Agrees {
						t.Errorf("%+v", f)
					}
					stop()
					w.start()
					stop = w.run()
					w.want(around7)
				})
			})
		}
	}
}

// asked tells, of each change of the packet filter, what the store had of it
// then.
type asked struct {
	firewall.Firewall
	st    *store.Store
	known map[netip.Prefix]bool
}

func (a *asked) Apply(ctx context.Context, b firewall.Batch) (firewall.Result, error) {
	for _, e := range b.Set {
		for _, in := range must(a.st.InForce(time.Now())) {
			if in.Prefix == e.Prefix {
				a.known[e.Prefix] = true
			}
		}
		if _, ok := a.known[e.Prefix]; !ok {
			a.known[e.Prefix] = false
		}
	}
	return a.Firewall.Apply(ctx, b)
}

// TestVerdictBeforeDisk: what a rule blocks does not wait for a disk that is
// slow, as while a flood is on; what a person blocks is written
// down first.
func TestVerdictBeforeDisk(t *testing.T) {
	was := diskPatience
	diskPatience = -1
	defer func() { diskPatience = was }()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		w.st.Close()
		a := &asked{Firewall: firewall.NewMemory(firewall.Options{}), known: map[netip.Prefix]bool{}}
		w.fw = a
		w.start()
		a.st = w.st
		stop := w.run()
		defer stop()
		w.block("203.0.113.200/32", time.Hour)
		w.k.open("198.51.100.9", 4)
		w.k.busy()
		time.Sleep(time.Minute)
		byHand := netip.MustParsePrefix("203.0.113.200/32")
		before := 0 // in force before the disk had it: nearly all, it is a race
		err := w.g.do(t.Context(), func(context.Context) {
			if len(a.known) < 2 || !a.known[byHand] {
				t.Errorf("%v", a.known)
			}
			for p, known := range a.known {
				before += map[bool]int{true: 0, false: 1}[known]
				if b, ok := w.g.blocks.get(p); !ok || b.ID == 0 {
					t.Errorf("%s: %+v", p, b)
				}
			}
		})
		if err != nil || before == 0 {
			t.Errorf("%d were in force before they were in the store, %v", before, err)
		}
		w.wantInStore(w.inFilter())
	})
}

// TestAllowCopyTriedAgain: the copy of the allowlist that could not be made is
// made when there is room.
func TestAllowCopyTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		copied := store.AllowCopy(w.st.Path())
		if err := os.MkdirAll(copied+"/in the way", 0o700); err != nil {
			t.Fatal(err)
		}
		must(w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.7/32"), By: "root"}))
		time.Sleep(10 * time.Second)
		if err := os.RemoveAll(copied); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		if b, err := os.ReadFile(copied); err != nil || !strings.Contains(string(b), "203.0.113.7") {
			t.Errorf("%s, %v", b, err)
		}
	})
}
