package detector

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// Detector turns events into verdicts. It is not safe for concurrent use, and
// its result depends on nothing but its Config, the events, and the calls of
// Forget and LearnGood between them.
//
// Verdicts on saturation are made on a grid of half seconds of the log's time
// (rules with windows above a minute: of a fiftieth of the window), whenever
// time passes over it, and only while there is pressure, on sources that hold
// a slot at that moment. Verdicts on opens of an address are made with the
// connection that reaches the threshold, those of prefixes at the next half
// second. See window for what exactly is summed, and judge.go for what is
// left out of a prefix.
type Detector struct {
	cfg    Config
	levels []level // by bits, addresses first, wide prefixes last
	chain4 []uint8 // levels of IPv4 prefixes, from narrow to wide
	chain6 []uint8

	window      []int // rule -> number in satWindows or opnWindows
	step        []int64
	satWindows  []window
	opnWindows  []window
	satShortest int64 // the shortest saturation window
	satMemory   int64 // nothing older is in any saturation window
	opnMemory   int64

	clock
	now      int64   // nanoseconds
	p        float64 // weight of a held slot now
	integral float64 // of p over all time, in seconds
	nextEval int64
	lastReal int64 // last event other than Tick

	nodes slab[node]
	index table
	hand  uint32 // evict
	sat   rings[float64]
	opn   rings[uint32]

	holders    slab[holder]
	byPort     table // address and port -> holder
	young, old byAge // of the server's present run; from before its restart
	gen        uint32

	capacity   int
	how        string
	maxCount   int // since the server's start
	proof      proof
	taken      int
	anchored   bool  // taken is from the server's own count
	anchor     int64 // when it was
	excess     int   // more are thought open than counted, at least, since
	excessFrom int64
	ones       int  // open lines in a row that said 1 when it was more
	limitless  bool // the server does not count

	goods   goods
	stormy  []uint32 // prefixes over an opens threshold, to be judged
	hots    []hot
	kept    []float64 // customary
	recent  [1024]recentOpen
	recentN uint32
	early   [1024]earlyClose
	earlyN  uint32

	stats Stats
	out   []Verdict
	cands []candidate
}

// recentOpen is kept for evidence.
type recentOpen struct {
	key   key
	t     int64
	count int32
	port  uint16
}

// evalStep is the grid of evaluations.
const evalStep = int64(500 * time.Millisecond)

// New returns a detector that knows nothing. An error tells everything that is
// wrong with cfg.
func New(cfg Config) (*Detector, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("detector: %w", err)
	}
	d := &Detector{
		cfg:      cfg,
		index:    newTable(),
		byPort:   newTable(),
		gen:      1,
		capacity: cfg.Capacity,
		how:      CapacityConfigured,
		now:      int64(time.Hour) * 24 * 365, // any time from which the windows can look back
	}
	if d.capacity == 0 {
		d.capacity, d.how = defaultCapacity, CapacityAssumed
	}
	d.goods.init(cfg.KnownGood)

	d.levels = []level{{bits: 128}}
	at := make(map[[2]uint8]uint8)
	lengths := make(map[[2]uint8]bool)
	for _, r := range cfg.Rules {
		for _, b := range r.Prefixes4 {
			if b < 32 {
				lengths[[2]uint8{uint8(b + 96), 4}] = true
			}
		}
		for _, b := range r.Prefixes6 {
			if b < 128 {
				lengths[[2]uint8{uint8(b), 6}] = true
			}
		}
	}
	sorted := slices.SortedFunc(maps.Keys(lengths), func(a, b [2]uint8) int {
		if a[0] != b[0] {
			return int(b[0]) - int(a[0])
		}
		return int(a[1]) - int(b[1])
	})
	for _, l := range sorted {
		n := uint8(len(d.levels))
		at[l] = n
		d.levels = append(d.levels, level{bits: l[0], v4: l[1] == 4})
		if l[1] == 4 {
			d.chain4 = append(d.chain4, n)
		} else {
			d.chain6 = append(d.chain6, n)
		}
	}

	d.window = make([]int, len(cfg.Rules))
	d.step = make([]int64, len(cfg.Rules))
	for i, r := range cfg.Rules {
		list := &d.satWindows
		memory := &d.satMemory
		if r.Metric == Opens {
			list, memory = &d.opnWindows, &d.opnMemory
		}
		*memory = max(*memory, int64(r.Window)/subWindows*ringLen)
		d.window[i] = slices.IndexFunc(*list, func(w window) bool { return w.length == int64(r.Window) })
		if d.window[i] < 0 {
			d.window[i] = len(*list)
			*list = append(*list, newWindow(r.Window, d.now))
		}
		d.step[i] = max(evalStep, int64(r.Window)/50/evalStep*evalStep)
		for _, lv := range d.ruleLevels(r, at) {
			if r.Metric == Opens {
				d.levels[lv].opn = append(d.levels[lv].opn, i)
			} else {
				d.levels[lv].sat = append(d.levels[lv].sat, i)
			}
		}
	}
	d.levels[0].opens = len(d.opnWindows) > 0
	for _, chain := range [...][]uint8{d.chain4, d.chain6} {
		for j, opens := len(chain)-1, false; j >= 0; j-- {
			lv := &d.levels[chain[j]]
			opens = opens || len(lv.opn) > 0
			lv.opens = opens
		}
	}
	for i := range d.levels {
		d.levels[i].slack, d.levels[i].calm = d.ease(i)
	}
	for i := range d.satWindows {
		if l := d.satWindows[i].length; i == 0 || l < d.satShortest {
			d.satShortest = l
		}
	}
	d.sat.stride = ringLen * len(d.satWindows)
	d.opn.stride = ringLen * len(d.opnWindows)
	d.nextEval = (d.now/evalStep + 1) * evalStep
	d.budget()
	return d, nil
}

// ruleLevels lists the levels that r looks at. Level 0 is shared by /32 and
// /128; applies tells them apart.
func (d *Detector) ruleLevels(r Rule, at map[[2]uint8]uint8) []uint8 {
	set := make(map[uint8]bool)
	for _, b := range r.Prefixes4 {
		set[at[[2]uint8{uint8(b + 96), 4}]] = true // missing: level 0
	}
	for _, b := range r.Prefixes6 {
		set[at[[2]uint8{uint8(b), 6}]] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// applies says whether rule r looks at single addresses of k's family, or, for
// a prefix, true: its level says so.
func (d *Detector) applies(r int, k key) bool {
	if k.bits < 128 {
		return true
	}
	if k.is4() {
		return slices.Contains(d.cfg.Rules[r].Prefixes4, 32)
	}
	return slices.Contains(d.cfg.Rules[r].Prefixes6, 128)
}

// Observe takes the next event and returns the verdicts that it, or the time
// that passed until it, gave rise to, in order; nil almost always. The slice
// is valid until the next call.
func (d *Detector) Observe(ev *Event) []Verdict {
	clear(d.out)
	d.out = d.out[:0]
	if ev.Kind != None {
		d.tell(ev)
	}
	if len(d.out) == 0 {
		return nil
	}
	return d.out
}

// Advance lets time pass until t. It is what Observe does with a Tick.
func (d *Detector) Advance(t time.Time) []Verdict {
	return d.Observe(&Event{Kind: Tick, Time: t})
}

// apply takes ev as what happened at t, not before now.
func (d *Detector) apply(ev *Event, t int64) {
	d.advance(t)
	if ev.Capacity > 0 {
		d.stated(ev.Capacity)
	}
	if ev.Kind == Tick {
		return
	}
	d.lastReal = d.now
	switch ev.Kind {
	case Opened:
		if ev.Source.IsValid() {
			d.opened(ev)
		}
	case Closed:
		if ev.Source.IsValid() {
			d.closed(ev)
		}
	case Refused:
		d.refused(ev)
	case Accepted, Authenticated:
		if ev.Source.IsValid() {
			d.accepted(ev)
		}
	case DaemonStarted:
		d.restarted()
	case Sampled:
		d.sampled(ev.Count)
	}
	d.p = d.weight()
}

// advance lets time pass until t, with an evaluation at each step of the grid
// where anything can have changed for the worse.
func (d *Detector) advance(t int64) {
	for d.now < t {
		if t < d.nextEval {
			d.move(t)
			return
		}
		// Without pressure no saturation grows; and when nothing happened for
		// longer than the longest window, all has been said.
		if len(d.stormy) == 0 && (d.p == 0 || d.nextEval-d.lastReal > d.satMemory) {
			d.move(t)
			d.nextEval = (t/evalStep + 1) * evalStep
			return
		}
		at := d.nextEval
		d.move(at)
		d.nextEval = at + evalStep
		d.evaluate()
	}
}

// move sets now, at the present pressure.
func (d *Detector) move(t int64) {
	for i := range d.satWindows {
		d.satWindows[i].to(d.now, t, d.integral, d.p)
	}
	for i := range d.opnWindows {
		d.opnWindows[i].to(d.now, t, 0, 0)
	}
	if d.p > 0 {
		d.integral += d.p * seconds(t-d.now)
		if d.p >= 1 {
			d.stats.Saturated += time.Duration(t - d.now)
		}
	}
	d.now = t
}

// Forget makes as if p had never connected: what its members hold is free, and
// prefixes around it are scored without them. Call it when p was blocked (its
// slots are given back) and when a block was lifted. Known good senders stay
// known.
func (d *Detector) Forget(p netip.Prefix) {
	k, ok := keyOfPrefix(p)
	if !ok {
		return
	}
	for _, i := range d.tops(k) {
		d.forget(i)
	}
	d.p = d.weight()
}

// tops lists the widest nodes inside k.
func (d *Detector) tops(k key) []uint32 {
	if i := d.find(k); i != 0 {
		return []uint32{i}
	}
	if k.bits == 128 {
		return nil
	}
	chain := d.chain6
	if k.is4() && k.bits >= 96 {
		chain = d.chain4
	}
	for _, lv := range chain {
		if d.levels[lv].bits == k.bits {
			return nil // all members would hang below it
		}
	}
	var tops []uint32
	for i := uint32(1); i <= d.nodes.used; i++ {
		n := d.nodes.at(i)
		if n.key.bits == 0 || !k.contains(n.key) {
			continue
		}
		if n.parent == 0 || !k.contains(d.nodes.at(n.parent).key) {
			tops = append(tops, i)
		}
	}
	return tops
}

// forget takes node i and all below it out of everything.
func (d *Detector) forget(i uint32) {
	d.freeAll(i)
	d.accrue(i)
	n := d.nodes.at(i)
	for pi := n.parent; pi != 0; {
		d.accrue(pi)
		p := d.nodes.at(pi)
		if n.sat != 0 && p.sat != 0 {
			from, to := d.sat.at(n.sat), d.sat.at(p.sat)
			for j := range to {
				to[j] = max(0, to[j]-from[j])
			}
		}
		d.subtractOpens(n, p)
		pi = p.parent
	}
	d.dropAll(i)
}

// subtractOpens takes the opens of n out of p, a prefix around it.
func (d *Detector) subtractOpens(n, p *node) {
	if n.lastOpen == 0 || p.lastOpen == 0 {
		return
	}
	if p.opn == 0 {
		if p.lastOpen == n.lastOpen {
			p.lastOpen = 0
		}
		return
	}
	to := d.opn.at(p.opn)
	for j := range d.opnWindows {
		w := &d.opnWindows[j]
		kp, kn := p.lastOpen/w.sub, n.lastOpen/w.sub
		ring := to[j*ringLen : (j+1)*ringLen]
		for k := max(kn, kp) - subWindows; k <= kn; k++ {
			v := uint32(0)
			switch {
			case n.opn != 0:
				v = d.opn.at(n.opn)[j*ringLen+int(k%ringLen)]
			case k == kn:
				v = 1
			}
			ring[k%ringLen] -= min(v, ring[k%ringLen])
		}
	}
}

func (d *Detector) freeAll(i uint32) {
	n := d.nodes.at(i)
	for n.head != 0 {
		d.free(n.head)
	}
	for c := n.child; c != 0; c = d.nodes.at(c).next {
		d.freeAll(c)
	}
}

func (d *Detector) dropAll(i uint32) {
	n := d.nodes.at(i)
	for n.child != 0 {
		d.dropAll(n.child)
	}
	d.drop(i)
}
