package guard

import (
	"context"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

const around7 = "203.0.113.0/30 203.0.113.4/31 203.0.113.6/32 203.0.113.8/29 203.0.113.16/28 203.0.113.32/27 203.0.113.64/26 203.0.113.128/25"

// A flood from a net with somebody allowed in it: the rest of the net is
// blocked, as one block as far as people are concerned.
func TestSplit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
		})
		stop := w.run()
		defer func() { stop() }()
		ctx := t.Context()
		for _, a := range []string{"203.0.113.2", "203.0.113.7", "203.0.113.9", "203.0.113.77", "203.0.113.78", "203.0.113.200", "203.0.113.201"} {
			w.k.open(a, 13) // of 100: each is below what is a hog
		}
		time.Sleep(40 * time.Second)
		w.want(around7)
		if n := w.k.left(); n != 13 {
			t.Errorf("%d connections are left, want those of the allowed one", n)
		}
		list, err := w.g.Blocks(ctx)
		if err != nil || len(list) != 8 {
			t.Fatalf("%d blocks, %v", len(list), err)
		}
		whole := netip.MustParsePrefix("203.0.113.0/24")
		for i, b := range list {
			if b.PartOf != whole || b.Part != i+1 || b.Whole() != whole || b.Offence != 1 || b.Verdict == nil || b.Until != list[0].Until || b.State != InForce {
				t.Errorf("part %d: %+v", i, b)
			}
		}
		s, _ := w.g.Status(ctx)
		if s.Counters.Leaks != 0 || s.Counters.Blocked != 8 {
			t.Errorf("%+v", s.Counters)
		}

		// What is left of a net that is blocked in parts already is nothing new.
		time.Sleep(time.Minute)
		w.want(around7)
		if again, _ := w.g.Status(ctx); again.Counters.Blocked != 8 || again.Counters.Refused != s.Counters.Refused {
			t.Errorf("%+v", again.Counters)
		}

		// It stays so through a restart, and is lifted by its name.
		stop()
		w.start()
		stop = w.run()
		w.want(around7)
		if _, err := w.g.Unblock(ctx, netip.MustParsePrefix("203.0.113.9/32"), "root"); err == nil || err.(*CoveredError).By != whole {
			t.Errorf("unblock of a member: %v", err)
		}
		if lifted, err := w.g.Unblock(ctx, whole, "root"); err != nil || len(lifted) != 8 {
			t.Errorf("%d lifted, %v", len(lifted), err)
		}
		w.want("")
	})
}

// The neighbours of somebody who is allowed are not blocked for what he does.
func TestSplitSparesNeighbours(t *testing.T) {
	for name, c := range map[string]struct {
		allowed, each int // slots
		want          string
	}{
		"his slots":   {9, 2, ""},
		"their slots": {4, 5, around7},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) {
					p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
				})
				defer w.run()()
				w.k.open("203.0.113.7", c.allowed)
				left := 100 - c.allowed
				for _, a := range []string{"203.0.113.2", "203.0.113.9", "203.0.113.77", "203.0.113.200"} {
					w.k.open(a, c.each)
					left -= c.each
				}
				for i := range left {
					w.k.open(netip.AddrFrom4([4]byte{198, 51, byte(i), 1}).String(), 1)
				}
				time.Sleep(45 * time.Second)
				w.want(c.want)
				if s, err := w.g.Status(t.Context()); err != nil || s.Counters.Refused == 0 {
					t.Errorf("%+v, %v", s.Counters, err) // at the threshold, with his slots
				}
			})
		})
	}
}

func TestSplitByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(p *policy.Policy) {
			p.Block.MaxBlocks = 20
			p.Allow = []policy.AllowEntry{
				{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"},
				{Prefix: netip.MustParsePrefix("2001:db8:0:5::9/128"), Why: "policy.yaml:4:4"},
			}
			for i := range 40 { // every fourth address of a net
				p.Allow = append(p.Allow, policy.AllowEntry{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(4 * i)}), 32)})
			}
		})
		defer w.run()()
		ctx := t.Context()
		ask := func(p string) ([]BlockOutcome, error) {
			return w.g.Block(ctx, []BlockRequest{{Prefix: netip.MustParsePrefix(p), For: time.Hour, By: "root"}}, false)
		}
		for p, why := range map[string]string{
			"203.0.113.7/32":      "all of it is allowed",
			"192.0.2.0/24":        "this machine is in it",
			"198.51.100.0/24":     "too many parts",
			"2001:db8:0:5::/64":   "IPv6 has no smaller net",
			"203.0.0.0/8":         "too wide",
			"2001:db8:0:5::9/128": "allowed",
		} {
			if out, err := ask(p); err != nil || len(out) != 1 || out[0].Refused == "" {
				t.Errorf("%s (%s): %+v, %v", p, why, out, err)
			}
		}
		w.want("")
		if out, err := ask("2001:db8::/61"); err != nil || len(out) != 3 {
			t.Errorf("%+v, %v", out, err)
		}
		w.want("2001:db8::/62 2001:db8:0:4::/64 2001:db8:0:6::/63")
		if out, err := ask("203.0.113.0/24"); err != nil || len(out) != 8 || out[7].Block == nil || out[7].Block.Part != 8 {
			t.Errorf("%+v, %v", out, err)
		}
		if out, err := ask("203.0.113.0/24"); err != nil || len(out) != 8 { // again: replaced
			t.Errorf("%+v, %v", out, err)
		}
		in, err := w.st.InForce(time.Now())
		if err != nil || len(in) != 11 {
			t.Errorf("%d in force, %v", len(in), err)
		}
		for _, p := range []string{"198.18.0.1/32", "198.18.0.2/32", "198.18.0.3/32", "198.18.0.4/32", "198.18.0.5/32", "198.18.0.6/32", "198.18.0.7/32", "198.18.0.8/32", "198.18.0.9/32"} {
			if out, err := ask(p); err != nil || len(out) != 1 || out[0].Block == nil {
				t.Errorf("%+v, %v", out, err)
			}
		}
		// All is full by now: a net that is blocked in parts already
		// takes no more room.
		if out, err := ask("203.0.113.0/24"); err != nil || len(out) != 8 || out[7].Block == nil {
			t.Errorf("again, near max_blocks: %+v, %v", out, err)
		}
		if out, err := ask("203.0.112.0/23"); err != nil || len(out) != 1 || out[0].Refused == "" {
			t.Errorf("one new part and eight old, where one is too much: %+v, %v", out, err)
		}
		// Somebody else inside is allowed, and there is no room for seven parts
		// more: his part goes.
		changed, err := w.g.Allow(ctx, store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.130/32"), By: "root"})
		if err != nil || len(changed) != 1 || changed[0].Prefix.String() != "203.0.113.128/25" || changed[0].Lifted.IsZero() {
			t.Errorf("%+v, %v", changed, err)
		}
	})
}

// recorder notes what a packet filter is told, batch by batch.
type recorder struct {
	firewall.Firewall
	batches []firewall.Batch
}

func (r *recorder) Apply(ctx context.Context, b firewall.Batch) (firewall.Result, error) {
	r.batches = append(r.batches, b)
	return r.Firewall.Apply(ctx, b)
}

// Somebody in a blocked net becomes allowed: the others there stay blocked, as
// the same block, in one step of the packet filter.
func TestAllowSplits(t *testing.T) {
	whole := netip.MustParsePrefix("203.0.113.0/24")
	for name, c := range map[string]struct {
		overlap policy.Overlap
		happens func(w *world, z *zone) ([]store.Block, error)
		want    string
	}{
		"by hand": {policy.OverlapSplit, func(w *world, _ *zone) ([]store.Block, error) {
			return w.g.Allow(w.t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.7/32"), By: "root"})
		}, around7},
		"a name": {policy.OverlapSplit, func(w *world, z *zone) ([]store.Block, error) {
			z.set("mx.example.org", "203.0.113.7")
			p := *w.policy
			_, err := w.g.Reload(w.t.Context(), &p)
			time.Sleep(time.Second)
			return nil, err
		}, around7},
		"a reload": {policy.OverlapSplit, func(w *world, _ *zone) ([]store.Block, error) {
			p := *w.policy
			p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "policy.yaml:3:4"}}
			_, err := w.g.Reload(w.t.Context(), &p)
			return nil, err
		}, around7},
		"this machine itself": {policy.OverlapSplit, func(w *world, _ *zone) ([]store.Block, error) {
			w.takeOn(Exempt{netip.MustParsePrefix("203.0.113.7/32"), "a default gateway"})
			time.Sleep(2 * time.Second)
			return nil, nil
		}, ""},
		"refuse": {policy.OverlapRefuse, func(w *world, _ *zone) ([]store.Block, error) {
			return w.g.Allow(w.t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.7/32"), By: "root"})
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) {
					p.Block.Overlap = c.overlap
					p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "test"}}
				})
				z := &zone{}
				w.dns(z)
				rec := &recorder{Firewall: w.fw}
				w.g.fw, w.fw = rec, rec
				stop := w.run()
				defer func() { stop() }()
				ctx := t.Context()
				made := w.block(whole.String(), time.Hour).Block
				time.Sleep(10 * time.Second)
				rec.batches = nil
				changed, err := c.happens(w, z)
				if err != nil {
					t.Fatal(err)
				}
				w.want(c.want)
				if len(rec.batches) != 1 || len(rec.batches[0].Unset) != 1 || rec.batches[0].Unset[0] != whole || (len(rec.batches[0].Set) > 0) != (c.want != "") {
					t.Errorf("the packet filter was told %+v", rec.batches)
				}
				if s := w.status(); !s.Firewall.Agrees || s.Firewall.Repairs > 0 || s.Blocks != len(strings.Fields(c.want)) {
					t.Errorf("%+v", s.Firewall)
				}
				if name == "by hand" && (len(changed) != 9 || changed[0].Prefix != whole || changed[0].Lifted.IsZero() || !changed[0].Pardoned() || !changed[1].Lifted.IsZero() || changed[1].ID == 0) {
					t.Errorf("%+v", changed)
				}
				list, err := w.g.Blocks(ctx)
				for i, b := range list {
					if err != nil || b.State != InForce || b.PartOf != whole || b.Part != i+1 || !b.Until.Equal(made.Until) || !b.Since.Equal(made.Since) || b.By != "root" || b.Offence != 1 {
						t.Errorf("%+v, %v", b, err)
					}
				}
				if c.want == "" {
					return
				}
				if n, err := w.st.Offences(netip.MustParsePrefix("203.0.113.9/32"), time.Time{}, made.Until.Add(time.Hour)); n != 2 || err != nil {
					t.Errorf("%d offences, %v: it is one block", n, err)
				}
				// Once more, inside a part; its parts are counted on.
				if _, err := w.g.Allow(ctx, store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.129/32"), By: "root"}); err != nil {
					t.Error(err)
				}
				part := map[int]bool{}
				list, err = w.g.Blocks(ctx)
				for _, b := range list {
					if part[b.Part] || b.PartOf != whole {
						t.Errorf("%+v", b)
					}
					part[b.Part] = true
				}
				if err != nil || len(list) != 14 {
					t.Errorf("%d blocks, %v", len(list), err)
				}
				stop()
				w.start()
				stop = w.run()
				if s := w.status(); s.Blocks != 14 {
					t.Errorf("%d blocks after a restart", s.Blocks)
				}
				if lifted, err := w.g.Unblock(ctx, whole, "root"); err != nil || len(lifted) != 14 {
					t.Errorf("%d lifted, %v", len(lifted), err)
				}
				w.want("")
			})
		})
	}
}

// Of blocks inside each other, each part stays blocked as long as the one that
// lasts longest.
func TestAllowSplitsNested(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		w.block("203.0.113.0/30", 2*time.Hour)
		w.block("203.0.113.0/29", time.Hour)
		w.block("203.0.113.4/30", 3*time.Hour)
		changed, err := w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.1/32"), By: "root"})
		if err != nil || len(changed) != 4 {
			t.Errorf("%d changed, %v: %+v", len(changed), err, changed)
		}
		w.want("203.0.113.0/32 203.0.113.2/31 203.0.113.4/30")
		list, err := w.g.Blocks(t.Context())
		for i, h := range []time.Duration{2, 2, 3} {
			if err != nil || len(list) != 3 || list[i].Until.Sub(list[i].Since) != h*time.Hour {
				t.Errorf("%+v, %v", list, err)
			}
		}
	})
}

// A replay splits as the daemon does.
func TestSplitReplay(t *testing.T) {
	p := policy.Default()
	p.Allow = []policy.AllowEntry{{Prefix: netip.MustParsePrefix("203.0.113.7/32"), Why: "test"}}
	r, err := NewReplay(p, 100)
	if err != nil {
		t.Fatal(err)
	}
	var got []netip.Prefix
	r.OnBlock = func(b store.Block) {
		got = append(got, b.Prefix)
		if b.Whole().String() != "203.0.113.0/24" {
			t.Errorf("%+v", b)
		}
	}
	at := time.Date(2026, 11, 23, 3, 0, 0, 0, time.UTC)
	n := 0
	for _, last := range []byte{2, 7, 9, 77, 78, 200, 201} {
		for i := range 13 {
			n++
			r.Observe(&detector.Event{Time: at, Kind: detector.Opened, Source: netip.AddrFrom4([4]byte{203, 0, 113, last}), Port: uint16(2000 + i), Count: n})
		}
	}
	for i := range 30 {
		r.Observe(&detector.Event{Time: at.Add(time.Duration(i) * time.Second), Kind: detector.Tick})
	}
	if join(got) != around7 {
		t.Errorf("blocked %s, want %s", join(got), around7)
	}
}

// A block lasts a second at least, and what has run out but was not swept yet
// is not lifted any more.
func TestShortBlocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		time.Sleep(600 * time.Millisecond)
		for _, d := range []time.Duration{1, time.Millisecond, 999 * time.Millisecond, time.Second} {
			if o := w.block("203.0.113.1/32", d); o.Block == nil || time.Until(o.Block.Until) < time.Second || time.Until(o.Block.Until) >= 2*time.Second {
				t.Errorf("%v: %+v", d, o.Block)
			}
		}
	})
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil) // does not run, hence does not sweep
		defer func() { w.st.Close() }()
		ctx := t.Context()
		o := w.block("203.0.113.9/32", 5*time.Second)
		time.Sleep(time.Until(o.Block.Until))
		if lifted, err := w.g.Unblock(ctx, o.Prefix, "root"); err != nil || len(lifted) != 0 {
			t.Errorf("lifted %+v, %v", lifted, err)
		}
		if _, err := w.g.Allow(ctx, store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.0/24"), By: "root"}); err != nil {
			t.Error(err)
		}
		b, err := w.st.Block(o.Block.ID)
		if err != nil || !b.Lifted.IsZero() {
			t.Errorf("%+v, %v", b, err)
		}
	})
}

// TestPartNumbers: the parts of one block have each a number, from 1.
func TestPartNumbers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		check := func(least int) {
			t.Helper()
			n := map[int]int{}
			for _, b := range must(w.g.Blocks(t.Context())) {
				if b.PartOf == netip.MustParsePrefix("203.0.113.0/24") {
					n[b.Part]++
				}
			}
			for i := range len(n) {
				if n[i+1] != 1 {
					t.Errorf("parts by number: %v", n)
					return
				}
			}
			if len(n) < least {
				t.Errorf("%d parts", len(n))
			}
		}
		w.block("203.0.113.0/32", 48*time.Hour) // stays what it is
		w.block("203.0.113.0/24", 24*time.Hour)
		must(w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("203.0.113.1/32"), By: "root"}))
		check(7)
		p := *w.policy
		for _, a := range []string{"203.0.113.70/32", "203.0.113.200/32"} {
			p.Allow = append(p.Allow, policy.AllowEntry{Prefix: netip.MustParsePrefix(a)})
		}
		must(w.g.Reload(t.Context(), &p))
		check(16)
	})
}

// TestTranslated: a network behind a translator, in which all of IPv4 is, is
// nobody's to be blocked for; an address is.
func TestTranslated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		defer w.run()()
		for _, p := range []string{"64:ff9b::/96", "64:ff9b::/64", "64:ff9b::/48"} {
			o := must(w.g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix(p), For: time.Hour, By: "root"}}, false))
			if len(o) != 1 || !strings.Contains(o[0].Refused, "all of IPv4 is in it") {
				t.Errorf("%s: %+v", p, o)
			}
		}
		w.block("64:ff9b::c000:207/128", time.Hour)
		w.block("64:ff9c::/64", time.Hour)
		w.want("64:ff9b::c000:207/128 64:ff9c::/64")
		// Who is allowed is so in either form.
		must(w.g.Allow(t.Context(), store.AllowEntry{Prefix: netip.MustParsePrefix("192.0.2.0/24"), By: "root"}))
		time.Sleep(2 * time.Second)
		w.want("64:ff9c::/64")
		o := must(w.g.Block(t.Context(), []BlockRequest{{Prefix: netip.MustParsePrefix("64:ff9b::c000:207/128"), For: time.Hour, By: "root"}}, false))
		if len(o) != 1 || !strings.Contains(o[0].Refused, "192.0.2.0/24, which is allowed") {
			t.Errorf("%+v", o)
		}
	})
}
