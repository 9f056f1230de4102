package abuse

import (
	"testing"
	"time"
)

func TestLookupCounts(t *testing.T) {
	w := newWorld(t)
	w.plain()
	w.set("/rdap/ip/198.51.100.7", "hang up")
	l, _ := newLookupsIn(t, w, func(c *Config) { c.Lookup.Sources = []string{RIPEstat, RDAP, Abusix} })
	for range 2 { // the second time only what failed is asked again
		l.find7(t)
	}
	got := map[string]uint64{}
	for _, c := range (&Desk{lookups: l}).Lookups() {
		got[c.Source+" "+c.Result] = c.Count
	}
	for what, n := range map[string]uint64{"ripestat found": 1, "rdap found": 1, "rdap failed": 2, "abusix none": 1} {
		if got[what] != n {
			t.Errorf("%s: %d, want %d: %v", what, got[what], n, got)
		}
	}
}

func TestBriefs(t *testing.T) {
	b := newBench(t, testConfig(t), Options{})
	if err := b.Take(blockOf(1, "198.51.100.1/32", testStart, 200, 0)); err != nil {
		t.Fatal(err)
	}
	got := b.Briefs()
	if len(got) != 1 || got[0].State != Gathering || got[0].ID == "" || !got[0].Network.Contains(pfx("198.51.100.1/32").Addr()) {
		t.Errorf("%+v", got)
	}
	b.pass(time.Hour)
	b.Work(t.Context())
	if got := b.Briefs(); len(got) != 1 || got[0].State != Drafted {
		t.Errorf("%+v", got)
	}
}
