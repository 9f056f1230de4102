package store

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"pgregory.net/rapid"
)

func TestAddRefuses(t *testing.T) {
	s := fresh(t)
	again := block("192.0.2.7/32", 0, 10)
	add(t, s, again)
	far := block("192.0.2.7/32", 0, 10)
	far.Until = time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC) // no JSON for that
	for name, bad := range map[string]*Block{
		"an ID":                 again,
		"no prefix":             {},
		"a prefix partly IPv4":  {Prefix: netip.MustParsePrefix("::ffff:0.0.0.0/90")},
		"a year of five digits": far,
	} {
		was := bad.ID
		first := block("192.0.2.8/32", 0, 10)
		if err := s.Add(first, bad); err == nil {
			t.Errorf("a block with %s was added", name)
		}
		if first.ID != 0 || bad.ID != was {
			t.Errorf("IDs after a failed Add: %d, %d", first.ID, bad.ID)
		}
	}
	blocks, err := s.History(netip.Prefix{}, time.Time{}, 0)
	if got := ids(t, blocks, err); got != "1" {
		t.Errorf("the store has %q, want 1", got)
	}
	if err := s.Save(Block{ID: 2, Prefix: netip.MustParsePrefix("192.0.2.7/32")}); !errors.Is(err, ErrUnknown) {
		t.Errorf("Save of an unknown ID: %v", err)
	}
	if err := s.End(t0, "x", 1, 2); !errors.Is(err, ErrUnknown) {
		t.Errorf("End of an unknown ID: %v", err)
	}
	if b, err := s.Block(1); err != nil || !b.Lifted.IsZero() {
		t.Errorf("End did half of it: %+v, %v", b, err)
	}
}

func TestLifeOfBlocks(t *testing.T) {
	s := fresh(t)
	seen := block("192.0.2.4/32", 0, 20)
	seen.Observed = true
	add(t, s, block("192.0.2.1/32", 0, 10), block("192.0.2.2/32", 0, 20), block("192.0.2.3/32", 0, 30), seen)
	want := func(minute int, inForce, active string) {
		t.Helper()
		blocks, err := s.InForce(at(minute))
		if got := ids(t, blocks, err); got != inForce {
			t.Errorf("in force at %d: %q, want %q", minute, got, inForce)
		}
		blocks, err = s.Active(at(minute))
		if got := ids(t, blocks, err); got != active {
			t.Errorf("active at %d: %q, want %q", minute, got, active)
		}
	}
	want(0, "1 2 3", "1 2 3 4")
	want(10, "2 3", "2 3 4")
	must(t, s.End(at(5), "root (uid 0)", 2))
	want(5, "1 3", "1 3 4")
	must(t, s.End(at(6), "again", 2)) // keeps who was first
	must(t, s.End(at(15), "late", 1)) // was over
	for id, lifted := range map[uint64]string{1: "", 2: "root (uid 0)"} {
		if b, err := s.Block(id); err != nil || b.LiftedBy != lifted {
			t.Errorf("block %d lifted by %q, %v; want %q", id, b.LiftedBy, err, lifted)
		}
	}
	if n, err := s.Sweep(at(20)); n != 2 || err != nil {
		t.Errorf("Sweep: %d, %v; want 1 and 4", n, err)
	}
	want(20, "3", "3")
	// Longer after all.
	b, err := s.Block(1)
	must(t, err)
	b.Until = at(40)
	must(t, s.Save(b))
	want(20, "1 3", "1 3")
	must(t, s.Check())

	if n, err := s.Prune(at(20)); n != 1 || err != nil { // 2 was lifted at 5; 4 ended just then
		t.Errorf("Prune: %d, %v; want 1", n, err)
	}
	if n, err := s.Prune(at(100)); n != 3 || err != nil {
		t.Errorf("Prune: %d, %v; want 3", n, err)
	}
	must(t, s.view(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketBlocks, bucketUnended, bucketEnded, bucketPrefixes} {
			if k, _ := tx.Bucket(name).Cursor().First(); k != nil {
				t.Errorf("%s still has the key %x", name, k)
			}
		}
		return nil
	}))
	next := block("192.0.2.1/32", 0, 10)
	add(t, s, next)
	if next.ID != 5 {
		t.Errorf("the next block has ID %d: an ID was given twice", next.ID)
	}
}

func TestHistory(t *testing.T) {
	s := fresh(t)
	add(t, s,
		block("192.0.2.7/32", 0, 10), // 1
		block("192.0.2.0/24", 0, 20), // 2
		block("192.0.0.0/16", 0, 30), // 3
		block("192.0.3.0/24", 0, 40), // 4
		block("0.0.0.0/0", 0, 50),    // 5
		block("255.255.255.255/32", 0, 60),
		block("2001:db8::/48", 0, 70),         // 7
		block("2001:db8::1/128", 0, 80),       // 8
		block("::/0", 0, 90),                  // 9
		block("::ffff:192.0.2.7/128", 0, 100), // 10, is 192.0.2.7
		block("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128", 0, 110),
	)
	for _, c := range []struct {
		prefix string
		since  int
		limit  int
		want   string
	}{
		{"192.0.2.7/32", -1, 0, "10 5 3 2 1"},
		{"192.0.2.8/32", -1, 0, "5 3 2"},
		{"192.0.2.0/24", -1, 0, "10 5 3 2 1"},
		{"192.0.2.0/25", -1, 0, "10 5 3 2 1"},
		{"192.0.2.128/25", -1, 0, "5 3 2"},
		{"192.0.2.0/23", -1, 0, "10 5 4 3 2 1"},
		{"255.0.0.0/8", -1, 0, "6 5"},
		{"0.0.0.0/0", -1, 0, "10 6 5 4 3 2 1"},
		{"0.0.0.0/0", 30, 0, "10 6 5 4"},
		{"0.0.0.0/0", 30, 2, "10 6"},
		{"::/0", -1, 0, "11 9 8 7"},
		{"2001:db8::/64", -1, 0, "9 8 7"},
		{"2001:db8:0:1::/64", -1, 0, "9 7"},
		{"fe00::/7", -1, 0, "11 9"},
		{"", -1, 0, "11 10 9 8 7 6 5 4 3 2 1"},
		{"", 80, 2, "11 10"},
	} {
		var p netip.Prefix
		if c.prefix != "" {
			p = netip.MustParsePrefix(c.prefix)
		}
		blocks, err := s.History(p, at(c.since), c.limit)
		if got := ids(t, blocks, err); got != c.want {
			t.Errorf("History(%q, %d, %d) = %s, want %s", c.prefix, c.since, c.limit, got, c.want)
		}
	}
}

func TestOffences(t *testing.T) {
	lifted := func(b *Block, minute int, by string) *Block {
		b.Lifted, b.LiftedBy = at(minute), by
		return b
	}
	observed := block("192.0.2.7/32", 0, 10)
	observed.Observed = true
	replaced := lifted(block("192.0.2.7/32", 0, 10), 5, "root (uid 0): replaced by a new block")
	replaced.Replaced = true
	for _, c := range []struct {
		name   string
		blocks []*Block
		since  int
		want   int // at the 100th minute
	}{
		{"none", nil, -1, 1},
		{"one of another", []*Block{block("192.0.2.8/32", 0, 10)}, -1, 1},
		{"two after one another", []*Block{block("192.0.2.7/32", 0, 10), block("192.0.2.7/32", 10, 20)}, -1, 3},
		{"two at once", []*Block{block("192.0.2.7/32", 0, 10), block("192.0.2.0/24", 5, 20)}, -1, 2},
		{"short inside long, one later", []*Block{block("192.0.2.0/24", 0, 90), block("192.0.2.7/32", 5, 20), block("192.0.2.7/32", 30, 40), block("192.0.0.0/16", 95, 100)}, -1, 3},
		{"the net around it", []*Block{block("192.0.2.0/24", 0, 10)}, -1, 2},
		{"forgotten", []*Block{block("192.0.2.7/32", 0, 10), block("192.0.2.7/32", 20, 30)}, 10, 2},
		{"observed", []*Block{observed}, -1, 1},
		{"pardoned", []*Block{lifted(block("192.0.2.7/32", 0, 10), 5, "root (uid 0)")}, -1, 1},
		{"pardoned by a namesake", []*Block{lifted(block("192.0.2.7/32", 0, 10), 5, "smtpguard (uid 998)")}, -1, 1},
		{"lifted because it became allowed", []*Block{lifted(block("192.0.2.7/32", 0, 10), 5, "smtpguard: it overlaps 192.0.2.0/24, which is allowed")}, -1, 1},
		{"replaced", []*Block{replaced, block("192.0.2.7/32", 5, 60)}, -1, 2},
		{"still in force", []*Block{block("192.0.2.7/32", 0, 10), block("192.0.2.7/32", 90, 110)}, -1, 2},
		{"the net around it still in force", []*Block{block("192.0.2.0/24", 90, 110)}, -1, 1},
		{"ends now", []*Block{block("192.0.2.7/32", 90, 100)}, -1, 2},
	} {
		s := fresh(t)
		add(t, s, c.blocks...)
		if got, err := s.Offences(netip.MustParsePrefix("192.0.2.7/32"), at(c.since), at(100)); got != c.want || err != nil {
			t.Errorf("%s: %d, %v; want %d", c.name, got, err, c.want)
		}
	}
	s := fresh(t)
	add(t, s, block("192.0.2.7/32", 0, 10))
	if got, err := s.Offences(netip.MustParsePrefix("192.0.2.0/24"), at(-1), at(100)); got != 1 || err != nil {
		t.Errorf("a host's offence counts for its net: %d, %v", got, err)
	}
}

func TestAllow(t *testing.T) {
	s := fresh(t)
	for _, p := range []string{"192.0.2.0/24", "192.0.2.0/25", "2001:db8::/32", "10.0.0.0/8", "192.0.2.0/24"} {
		must(t, s.AllowAdd(AllowEntry{Prefix: netip.MustParsePrefix(p), Added: t0}))
	}
	list := func() (out []string) {
		l, err := s.AllowList()
		must(t, err)
		for _, e := range l {
			out = append(out, e.Prefix.String())
		}
		return out
	}
	if got, want := strings.Join(list(), " "), "10.0.0.0/8 192.0.2.0/24 192.0.2.0/25 2001:db8::/32"; got != want {
		t.Errorf("allowlist %s, want %s", got, want)
	}
	for _, want := range []bool{true, false} {
		if found, err := s.AllowRemove(netip.MustParsePrefix("192.0.2.99/24")); found != want || err != nil {
			t.Errorf("AllowRemove: %v, %v; want %v", found, err, want)
		}
	}
	if got, want := strings.Join(list(), " "), "10.0.0.0/8 192.0.2.0/25 2001:db8::/32"; got != want {
		t.Errorf("allowlist %s, want %s", got, want)
	}
	if err := s.AllowAdd(AllowEntry{}); err == nil {
		t.Error("an entry without a prefix was added")
	}
	e := AllowEntry{Until: at(1)}
	if !e.In(t0) || e.In(at(1)) || !(AllowEntry{}).In(t0) {
		t.Error("In does not go by Until")
	}
}

func TestGood(t *testing.T) {
	s := fresh(t)
	var goods []Good
	for i := range 1200 {
		goods = append(goods, Good{Addr: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), First: t0, Last: at(i), Messages: 1})
	}
	must(t, s.SaveGood(goods))
	goods[7].Messages = 2
	must(t, s.SaveGood(goods[7:8]))
	var got []Good
	must(t, s.Good(func(g Good) bool { got = append(got, g); return true }))
	if !slices.Equal(got, goods) {
		t.Errorf("%d known good senders, not the %d that were saved", len(got), len(goods))
	}
	n := 0
	must(t, s.Good(func(Good) bool { n++; return n < 700 }))
	if n != 700 {
		t.Errorf("fn was called %d times after it said no at 700", n)
	}
	if n, err := s.DropGood(at(200), 900); n != 300 || err != nil {
		t.Errorf("DropGood: %d, %v; want 200 too old and 100 too many", n, err)
	}
	// fn may write.
	must(t, s.Good(func(g Good) bool { g.Messages++; return s.SaveGood([]Good{g}) == nil && g.Addr != goods[310].Addr }))
	got = nil
	must(t, s.Good(func(g Good) bool { got = append(got, g); return true }))
	if len(got) != 900 || got[0].Addr != goods[300].Addr || got[0].Messages != 2 || got[11].Messages != 1 {
		t.Errorf("%d left, from %+v on", len(got), got[0])
	}
	if err := s.SaveGood([]Good{{}}); err == nil {
		t.Error("a known good sender without an address was saved")
	}
}

func TestRecords(t *testing.T) {
	s := fresh(t)
	for _, k := range []string{"b", "a", "c"} {
		must(t, s.SetRecord("case", k, []byte("v"+k)))
	}
	must(t, s.SetRecord("report", "a", []byte("r")))
	var got []string
	must(t, s.Records("case", func(k string, v []byte) bool { got = append(got, k+string(v)); return k != "b" }))
	if !slices.Equal(got, []string{"ava", "bvb"}) {
		t.Errorf("records %q", got)
	}
	must(t, s.Records("none", func(string, []byte) bool { t.Error("a record of no kind"); return false }))
	for _, want := range []bool{true, false} {
		if found, err := s.DropRecord("case", "a"); found != want || err != nil {
			t.Errorf("DropRecord: %v, %v; want %v", found, err, want)
		}
	}
	if found, err := s.DropRecord("none", "a"); found || err != nil {
		t.Errorf("DropRecord of no kind: %v, %v", found, err)
	}
	if v, err := s.Record("report", "a"); string(v) != "r" || err != nil {
		t.Errorf("record %q, %v", v, err)
	}
	for _, kk := range [][2]string{{"", "a"}, {"case", ""}} {
		if err := s.SetRecord(kk[0], kk[1], nil); err == nil {
			t.Errorf("a record of kind %q with key %q", kk[0], kk[1])
		}
		if v, err := s.Record(kk[0], kk[1]); v != nil || err != nil {
			t.Errorf("a record of kind %q with key %q: %q, %v", kk[0], kk[1], v, err)
		}
	}
}

// The order of keys is the order of times, whatever the year.
func TestTimeKeys(t *testing.T) {
	times := []time.Time{
		{}, time.Unix(math.MinInt32, 0), time.Unix(-1, 999999999), time.Unix(0, 0), time.Unix(0, 1), t0, t0.Add(1),
		time.Date(2262, 4, 12, 0, 0, 0, 0, time.UTC), time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC),
	}
	for i, a := range times {
		ka := appendTime(nil, a)
		if got := timeIn(ka); !got.Equal(a) {
			t.Errorf("%v came back as %v", a, got)
		}
		for j, b := range times {
			if got, want := strings.Compare(string(ka), string(appendTime(nil, b))), cmp.Compare(i, j); got != want {
				t.Errorf("keys of %v and %v compare as %d, want %d", a, b, got, want)
			}
		}
	}
}

// A hundred thousand blocks in force, and some ended; -short a tenth of it.
func TestManyBlocks(t *testing.T) {
	n := 100_000
	if testing.Short() {
		n /= 10
	}
	over := n / 10
	s := fresh(t)
	var blocks []*Block
	for i := range over + n {
		b := block("192.0.2.7/32", 0, 60)
		b.Prefix = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), 32)
		if i < over {
			b.Until = at(10)
		}
		blocks = append(blocks, b)
	}
	start := time.Now()
	for part := range slices.Chunk(blocks, 10_000) {
		add(t, s, part...)
	}
	t.Logf("Add: %v", time.Since(start))
	start = time.Now()
	if swept, err := s.Sweep(at(10)); swept != over || err != nil {
		t.Errorf("Sweep: %d, %v", swept, err)
	}
	t.Logf("Sweep: %v", time.Since(start))
	start = time.Now()
	inForce, err := s.InForce(at(10))
	must(t, err)
	t.Logf("InForce: %v", time.Since(start))
	if len(inForce) != n {
		t.Errorf("%d blocks in force, want %d", len(inForce), n)
	}
	start = time.Now()
	history, err := s.History(netip.MustParsePrefix("10.0.2.0/24"), time.Time{}, 10)
	must(t, err)
	t.Logf("History: %v", time.Since(start))
	if len(history) != 10 || history[0].Prefix != netip.MustParsePrefix("10.0.2.255/32") {
		t.Errorf("%d blocks, first %v", len(history), history[0].Prefix)
	}
	start = time.Now()
	if pruned, err := s.Prune(at(11)); pruned != over || err != nil {
		t.Errorf("Prune: %d, %v", pruned, err)
	}
	t.Logf("Prune: %v", time.Since(start))
}

// After any sequence of calls the indexes say what a plain list says.
func TestIndexes(t *testing.T) {
	dir := t.TempDir()
	run := 0
	rapid.Check(t, func(rt *rapid.T) {
		run++
		path := filepath.Join(dir, fmt.Sprintf("%d.db", run))
		s, err := Open(path, Options{})
		if err != nil {
			rt.Fatal(err)
		}
		s.db.NoSync = true // many runs; what a crash leaves is TestKill's matter
		defer func() { _ = s.Close() }()

		prefix := rapid.Custom(func(rt *rapid.T) netip.Prefix {
			b := rapid.SliceOfN(rapid.SampledFrom([]byte{0, 1, 127, 128, 255}), 4, 4).Draw(rt, "address")
			a := netip.AddrFrom4([4]byte(b))
			if rapid.Bool().Draw(rt, "v6") {
				var w [16]byte
				copy(w[:], b)
				copy(w[12:], b)
				a = netip.AddrFrom16(w)
			}
			return netip.PrefixFrom(a, rapid.IntRange(0, a.BitLen()).Draw(rt, "bits")).Masked()
		})
		minute := rapid.IntRange(0, 100)
		model := map[uint64]Block{}
		someID := func(rt *rapid.T) uint64 {
			if len(model) == 0 {
				rt.Skip("no block")
			}
			var all []uint64
			for id := range model {
				all = append(all, id)
			}
			slices.Sort(all)
			return rapid.SampledFrom(all).Draw(rt, "id")
		}
		now := 0
		later := func(rt *rapid.T) time.Time {
			now += rapid.IntRange(0, 30).Draw(rt, "later")
			return at(now)
		}
		ok := func(err error) {
			if err != nil {
				rt.Fatal(err)
			}
		}
		filter := func(keep func(Block) bool) (want []uint64) {
			for id, b := range model {
				if keep(b) {
					want = append(want, id)
				}
			}
			slices.Sort(want)
			return want
		}
		same := func(what string, blocks []Block, err error, want []uint64) {
			ok(err)
			got := []uint64{}
			for _, b := range blocks {
				got = append(got, b.ID)
			}
			slices.Sort(got)
			if !slices.Equal(got, want) {
				rt.Fatalf("%s: %v, want %v", what, got, want)
			}
		}
		rt.Repeat(map[string]func(*rapid.T){
			"add": func(rt *rapid.T) {
				var blocks []*Block
				for range rapid.IntRange(1, 3).Draw(rt, "blocks") {
					since := now + minute.Draw(rt, "since")
					blocks = append(blocks, &Block{Prefix: prefix.Draw(rt, "prefix"), Since: at(since), Until: at(since + minute.Draw(rt, "for")), Observed: rapid.Bool().Draw(rt, "observed")})
				}
				ok(s.Add(blocks...))
				for _, b := range blocks {
					model[b.ID] = *b
				}
			},
			"save": func(rt *rapid.T) {
				b := model[someID(rt)]
				switch rapid.IntRange(0, 3).Draw(rt, "what") {
				case 0:
					b.Prefix = prefix.Draw(rt, "prefix")
				case 1:
					b.Until = at(now + minute.Draw(rt, "until"))
				case 2:
					b.Observed = !b.Observed
				case 3:
					b.Lifted, b.LiftedBy = at(now), "save"
				}
				ok(s.Save(b))
				model[b.ID] = b
			},
			"end": func(rt *rapid.T) {
				id, t := someID(rt), later(rt)
				ok(s.End(t, "end", id))
				if b := model[id]; b.Lifted.IsZero() && t.Before(b.Until) {
					b.Lifted, b.LiftedBy = t, "end"
					model[id] = b
				}
			},
			"sweep": func(rt *rapid.T) {
				_, err := s.Sweep(later(rt))
				ok(err)
			},
			"prune": func(rt *rapid.T) {
				before := later(rt)
				want := filter(func(b Block) bool { return b.End().Before(before) })
				if n, err := s.Prune(before); err != nil || n != len(want) {
					rt.Fatalf("Prune: %d, %v; want %v", n, err, want)
				}
				for _, id := range want {
					delete(model, id)
				}
			},
			"reopen": func(rt *rapid.T) {
				ok(s.Close())
				s, err = Open(path, Options{})
				ok(err)
				s.db.NoSync = true
			},
			"": func(rt *rapid.T) {
				t := at(now)
				blocks, err := s.InForce(t)
				same("InForce", blocks, err, filter(func(b Block) bool { return b.InForce(t) }))
				blocks, err = s.Active(t)
				same("Active", blocks, err, filter(func(b Block) bool { b.Observed = false; return b.InForce(t) }))
				p := prefix.Draw(rt, "asked")
				blocks, err = s.History(p, t, 0)
				same(fmt.Sprintf("History of %v", p), blocks, err, filter(func(b Block) bool { return b.Prefix.Overlaps(p) && b.End().After(t) }))
				if !slices.IsSortedFunc(blocks, func(a, b Block) int { return cmp.Compare(b.ID, a.ID) }) {
					rt.Fatal("History is not newest first")
				}
				ok(s.checkValues())
			},
		})
	})
}
