package incident

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The pictures are drawn without a fixed width: what has a shape is in an
// inner <svg> whose viewBox is one unit a bucket wide and stretched to the
// width there is, texts and marks are placed in per cent beside it, in the
// size of the page's own text. So a picture can be read on a telephone, too.

const (
	slotsHeight = 260 // CSS pixels, of the stack
	barsHeight  = 70
	maxBars     = 120
	colored     = 6  // sources with a colour and a letter
	maxBarRows  = 12 // sources in the list of holders
	labelHeight = 17 // what a letter needs
)

// axis is that of time.
type axis struct {
	Ticks []tick
	Step  string
}

// tick is a place on an axis: X in per cent of the width, Y in pixels.
type tick struct {
	X      string
	Y      int
	Text   string
	Anchor string
	Small  bool // left out where there is little room
}

// slotsChart is the picture of who held the slots when.
type slotsChart struct {
	N, Height  int // of the inner viewBox
	Full       []span
	Areas      []area
	Plan, Low  string // paths; "" if there is nothing to show
	Capacity   int    // y
	Slots      int
	Ticks      []tick // on the left
	Marks      []blockMark
	Legend     []legend
	Alt        string
	UnknownWho bool
	Fine       bool // areas are wide enough for an edge
	Crowd      bool // so many marks that their lines would hide the areas
}

type span struct{ X, W string }

type area struct{ Class, Path string }

type blockMark struct {
	X, Text, Title string
	Verdict        int
}

type legend struct {
	Class, Letter, Who, AS string
	Blocked                bool
	At                     *tick // of the letter in the picture
}

// barChart is a small picture of one number over time.
type barChart struct {
	Title, Class, Alt string
	N, Height, Max    int
	Path              string
}

// holder is a line of the list of who held slots.
type holder struct {
	Class, Letter, Who, AS string
	Held                   int
	Share                  string // per cent, as a width
	Average                string
	Blocked                bool
}

// numbers is a line of the pictures as numbers.
type numbers struct {
	Time, Slots       string
	Plan              int
	Who               string
	Refused, Accepted uint32
	Kept              uint32
}

// source is what one source held over time.
type source struct {
	who     netip.Prefix
	row     *Row // nil: it would not have been blocked
	held    []int
	peak    int
	average float64 // while the server was full
	weight  float64
}

// sources sums up the holders of each bucket: those inside a blocked prefix
// under that prefix.
func (c *Collector) sources(s *timeline) (list []*source, full time.Duration) {
	by := make(map[netip.Prefix]*source)
	alias := make(map[netip.Prefix]*source)
	of := func(p netip.Prefix) *source {
		if x, ok := alias[p]; ok {
			return x
		}
		to, row := p, (*Row)(nil)
		for q, r := range c.byPrefix.Supernets(p) {
			to, row = q, r // the widest comes last
		}
		x := by[to]
		if x == nil {
			x = &source{who: to, row: row}
			by[to] = x
			list = append(list, x)
		}
		alias[p] = x
		return x
	}
	sum := make(map[*source]int)
	for i := range s.buckets {
		b := &s.buckets[i]
		full += b.full
		clear(sum)
		for _, h := range b.shares {
			sum[of(h.who)] += h.held
		}
		for x, n := range sum {
			x.peak = max(x.peak, n)
			x.average += float64(n) * b.full.Seconds()
			x.weight += float64(n) * (b.full.Seconds() + 1e-3*s.width.Seconds())
		}
	}
	for _, x := range list {
		if full > 0 {
			x.average /= full.Seconds()
		}
		if x.row != nil {
			x.peak = max(x.peak, x.row.Held)
		}
	}
	slices.SortFunc(list, func(a, b *source) int {
		return cmp.Or(cmp.Compare(b.weight, a.weight), a.who.Compare(b.who))
	})
	return list, full
}

// pictures are those of one stretch of time.
type pictures struct {
	Title   string
	Period  string
	Slots   *slotsChart
	Bars    []barChart
	Axis    axis
	Bucket  string
	Zone    string
	Holders []holder
	Average bool
	Numbers []numbers
}

// draw makes the pictures: of the worst occasion, if it is too small in the
// whole, and of the whole.
func (c *Collector) draw(v *view, o PageOptions, as func(netip.Prefix) string) {
	s := c.series
	worst := s.worst
	if s.now.hot && s.now.worse(worst) {
		worst = s.now // it lasts until the end of the log
	}
	if worst != nil && len(worst.buckets) > 0 && 2*worst.end().Sub(worst.start) < s.whole.end().Sub(s.whole.start) && worst.width < s.whole.width {
		p := c.picture(worst, o, as)
		p.Title = "The worst occasion"
		v.Pictures = append(v.Pictures, p)
	}
	if len(s.whole.buckets) > 0 {
		p := c.picture(s.whole, o, as)
		if len(v.Pictures) > 0 {
			p.Title = "The whole log"
		}
		v.Pictures = append(v.Pictures, p)
	}
}

func (c *Collector) picture(l *timeline, o PageOptions, as func(netip.Prefix) string) *pictures {
	n := len(l.buckets)
	v := &pictures{Bucket: Span(l.width), Axis: timeAxis(l.start.In(o.Zone), l.end().In(o.Zone)),
		Zone: zone(l.start, l.end(), o.Zone), Period: period(l.start.In(o.Zone), l.end().In(o.Zone))}
	list, full := c.sources(l)
	v.Average = full > 0

	// Colours go to those that would have been blocked, then to the largest.
	top := slices.Clone(list)
	slices.SortStableFunc(top, func(a, b *source) int { return btoi(b.row != nil) - btoi(a.row != nil) })
	few := max(2, c.capacity/33) // fewer slots than that cannot be seen
	top = slices.DeleteFunc(top, func(x *source) bool { return x.row == nil && x.peak < few })
	top = top[:min(len(top), colored)]
	class := make(map[*source]int)
	named := make(map[netip.Prefix]*source)
	for i, x := range top {
		class[x], named[x.who] = i, x
		x.held = make([]int, n)
	}
	for i := range l.buckets {
		for _, h := range l.buckets[i].shares {
			p := h.who
			for q := range c.byPrefix.Supernets(p) {
				p = q
			}
			if x := named[p]; x != nil {
				x.held[i] += h.held
			}
		}
	}
	v.Slots = c.drawSlots(l, top, as, o)
	v.Bars = l.drawBars()

	slices.SortStableFunc(list, func(a, b *source) int { return cmp.Compare(b.peak, a.peak) })
	for _, x := range list[:min(len(list), maxBarRows)] {
		h := holder{Class: "others", Who: who(x.who), AS: as(x.who), Held: x.peak, Blocked: x.row != nil,
			Share: percentage(float64(min(x.peak, c.capacity)), float64(c.capacity))}
		if k, ok := class[x]; ok {
			h.Class, h.Letter = "s"+strconv.Itoa(k), letter(k)
		}
		if full > 0 {
			h.Average = strconv.FormatFloat(math.Round(10*x.average)/10, 'f', -1, 64)
		}
		v.Holders = append(v.Holders, h)
	}
	v.Numbers = l.table(top, o.Zone)
	return v
}

func letter(i int) string { return string(rune('A' + i)) }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// percentage is x of whole in per cent, as an SVG length without its unit.
func percentage(x, whole float64) string {
	if whole <= 0 {
		return "0"
	}
	return strconv.FormatFloat(math.Round(1e4*x/whole)/100, 'f', -1, 64)
}

func (c *Collector) drawSlots(s *timeline, top []*source, as func(netip.Prefix) string, o PageOptions) *slotsChart {
	n := len(s.buckets)
	ch := &slotsChart{N: n, Height: slotsHeight, Slots: c.capacity, UnknownWho: s.who.Stats().Opened == 0}
	highest := c.capacity
	for i := range s.buckets {
		b := &s.buckets[i]
		highest = max(highest, b.max, b.held)
	}
	scale := float64(slotsHeight) / (1.06 * float64(max(1, highest)))
	y := func(v int) int { return slotsHeight - int(math.Round(scale*float64(v))) }
	ch.Capacity = y(c.capacity)
	step := niceStep(highest, 5)
	for v := 0; v <= highest; v += step {
		ch.Ticks = append(ch.Ticks, tick{Y: y(v), Text: strconv.Itoa(v)})
	}

	// Stretches in which it was full, wide enough to be seen.
	for i := 0; i < n; i++ {
		if s.buckets[i].full <= 0 {
			continue
		}
		j := i
		for j < n && s.buckets[j].full > 0 {
			j++
		}
		x, w := float64(i), float64(j-i)
		if j == i+1 && s.width < time.Minute {
			w = s.buckets[i].full.Seconds() / s.width.Seconds()
		}
		ch.Full = append(ch.Full, span{trim(x), trim(max(w, float64(n)/500))})
		i = j
	}

	// Each area is drawn down to the base line, the highest first; what lies
	// on it covers the rest.
	level := make([]int, n)
	for i := range s.buckets {
		b := &s.buckets[i]
		sum := 0
		for _, x := range top {
			sum += x.held[i]
		}
		level[i] = max(b.max, sum)
	}
	rest := slices.Clone(level)
	for k := range top {
		x := top[k]
		l := legend{Class: "s" + strconv.Itoa(k), Letter: letter(k), Who: who(x.who), AS: as(x.who), Blocked: x.row != nil}
		l.At = room(rest, x.held, y, n)
		ch.Areas = append(ch.Areas, area{l.Class, stepPath(rest, y)})
		for i := range rest {
			rest[i] -= x.held[i]
		}
		ch.Legend = append(ch.Legend, l)
	}
	ch.Areas = append(ch.Areas, area{"others", stepPath(rest, y)})
	others := "all others"
	if ch.UnknownWho {
		others = "taken"
	}
	ch.Legend = append(ch.Legend, legend{Class: "others", Who: others})

	ch.Fine = n <= 240
	// Within a wide bucket the flood and its end are one, and nothing is to be
	// seen of the difference.
	if c.blocks > 0 && len(top) > 0 && s.width <= 8*time.Second {
		from := slices.IndexFunc(s.buckets, func(b bucket) bool { return b.blocks > 0 })
		if from >= 0 {
			ch.Plan = linePath(s.buckets, from, y, func(b *bucket) int { return b.plan })
		}
	}
	if s.width > 8*time.Second {
		ch.Low = linePath(s.buckets, 0, y, func(b *bucket) int { return b.min })
	}
	ch.Marks = s.marks(o.Zone)
	ch.Crowd = len(ch.Marks) > 12 || s.width > 8*time.Second
	worst := 0
	for i := range s.buckets {
		if s.buckets[i].max > s.buckets[worst].max {
			worst = i
		}
	}
	at := s.start.Add(time.Duration(worst) * s.width).In(o.Zone).Format(clockFormat(s.start.In(o.Zone), s.end().In(o.Zone)))
	if s.width > time.Minute {
		at = "within " + Span(s.width) + " from " + at
	} else {
		at = "at " + at
	}
	ch.Alt = fmt.Sprintf("At worst, %s, %d of %d slots were taken.", at, s.buckets[worst].max, c.capacity)
	for k, x := range top[:min(len(top), 3)] {
		ch.Alt += fmt.Sprintf(" %s, %s, held at most %d.", letter(k), who(x.who), x.peak)
	}
	return ch
}

// room is where a letter fits into a band that reaches from level down by
// held: in the middle of its longest stretch that is high enough.
func room(level, held []int, y func(int) int, n int) *tick {
	best, from, length := -1, 0, 0
	for i := 0; i <= n; i++ {
		if i < n && y(level[i]-held[i])-y(level[i]) >= labelHeight {
			continue
		}
		if i-from > length {
			best, length = from, i-from
		}
		from = i + 1
	}
	if best < 0 || length*60 < n {
		return nil
	}
	mid := best + length/2
	return &tick{X: percentage(float64(best)+float64(length)/2, float64(n)), Y: (y(level[mid]) + y(level[mid]-held[mid])) / 2}
}

// stepPath is the area under values, which stay the same within each unit.
func stepPath(values []int, y func(int) int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "M0 %d", y(0))
	for i, v := range values {
		if i == 0 || v != values[i-1] {
			if i > 0 {
				fmt.Fprintf(&b, "H%d", i)
			}
			fmt.Fprintf(&b, "V%d", y(v))
		}
	}
	fmt.Fprintf(&b, "H%dV%dZ", len(values), y(0))
	return b.String()
}

// linePath is a line of steps from bucket number from on.
func linePath(buckets []bucket, from int, y func(int) int, value func(*bucket) int) string {
	at := func(i int) int { return min(y(value(&buckets[i])), slotsHeight-1) } // the whole line, also at 0
	var b strings.Builder
	fmt.Fprintf(&b, "M%d %d", from, at(from))
	for i := from + 1; i < len(buckets); i++ {
		if v := at(i); v != at(i-1) {
			fmt.Fprintf(&b, "H%dV%d", i, v)
		}
	}
	fmt.Fprintf(&b, "H%d", len(buckets))
	return b.String()
}

// marks are the blocks, those close to each other as one.
func (s *timeline) marks(l *time.Location) (list []blockMark) {
	n := len(s.buckets)
	last, group := -n, 0
	for i := range s.buckets {
		b := &s.buckets[i]
		if b.blocks == 0 {
			continue
		}
		if near := max(1, n/50); i-last < near && len(list) > 0 {
			group += int(b.blocks)
		} else {
			last, group = i, int(b.blocks)
			at := s.start.Add(time.Duration(i) * s.width)
			list = append(list, blockMark{X: percentage(float64(i), float64(n)), Verdict: b.verdict, Title: at.In(l).Format("2 Jan 15:04:05")})
		}
		m := &list[len(list)-1]
		m.Text = strconv.Itoa(group)
	}
	for i := range list {
		m := &list[i]
		m.Title = fmt.Sprintf("%s: %s", m.Title, quantity(m.Text, "block", "blocks"))
	}
	return list
}

func quantity(n, one, many string) string {
	if n == "1" {
		return "1 " + one
	}
	return n + " " + many
}

// drawBars makes the small pictures below.
func (s *timeline) drawBars() []barChart {
	n := len(s.buckets)
	each := max((n+maxBars-1)/maxBars, int((time.Second+s.width-1)/s.width))
	var width = time.Duration(each) * s.width
	one := func(title, class string, value func(*bucket) uint32) barChart {
		var bars []int
		highest, total := 0, 0
		for i := 0; i < n; i += each {
			sum := 0
			for j := i; j < min(n, i+each); j++ {
				sum += int(value(&s.buckets[j]))
			}
			bars = append(bars, sum)
			highest, total = max(highest, sum), total+sum
		}
		c := barChart{Title: title, Class: class, N: n, Height: barsHeight, Max: highest}
		c.Alt = fmt.Sprintf("%d in all, at most %d in %s.", total, highest, Span(width))
		if highest == 0 {
			c.Alt = "None."
			return c
		}
		var b strings.Builder
		for i, v := range bars {
			if v == 0 {
				continue
			}
			h := max(2, int(math.Round(float64(v)/float64(highest)*barsHeight)))
			x := i * each
			w := min(float64(each)*0.86, float64(n-x))
			fmt.Fprintf(&b, "M%d %dh%sv%dH%dz", x, barsHeight-h, trim(w), h, x)
		}
		c.Path = b.String()
		return c
	}
	return []barChart{
		one("Mail accepted", "good", func(b *bucket) uint32 { return b.accepted }),
		one("Refused, because the server was full", "bad", func(b *bucket) uint32 { return b.refused }),
		one("What the blocks would have kept away", "kept", func(b *bucket) uint32 { return b.kept }),
	}
}

// table is the pictures as numbers, in a few dozen lines.
func (s *timeline) table(top []*source, l *time.Location) (list []numbers) {
	n := len(s.buckets)
	each := max(1, (n+numberRows-1)/numberRows)
	for i := 0; i < n; i += each {
		var b bucket
		held := make([]int, len(top))
		for j := i; j < min(n, i+each); j++ {
			if j == i {
				b = s.buckets[j]
			} else {
				b.merge(&s.buckets[j])
			}
			for k, x := range top {
				held[k] = max(held[k], x.held[j])
			}
		}
		at := s.start.Add(time.Duration(i) * s.width).In(l)
		row := numbers{Time: at.Format("15:04:05"), Plan: b.plan, Refused: b.refused, Accepted: b.accepted, Kept: b.kept}
		if s.end().Sub(s.start) > 24*time.Hour {
			row.Time = at.Format("2 Jan 15:04")
		}
		row.Slots = strconv.Itoa(b.max)
		if b.min != b.max {
			row.Slots = fmt.Sprintf("%d to %d", b.min, b.max)
		}
		var words []string
		for k, h := range held {
			if h > 0 {
				words = append(words, fmt.Sprintf("%s %d", letter(k), h))
			}
		}
		row.Who = strings.Join(words, ", ")
		list = append(list, row)
	}
	return list
}

// trim is a number with two decimals at most.
func trim(f float64) string { return strconv.FormatFloat(math.Round(100*f)/100, 'f', -1, 64) }

// niceStep divides 0 to highest into at most about n steps of 1, 2 or 5 times
// a power of ten.
func niceStep(highest, n int) int {
	for step := 1; ; step *= 10 {
		for _, k := range []int{1, 2, 5} {
			if highest <= k*step*n {
				return k * step
			}
		}
	}
}

var timeSteps = []time.Duration{time.Second, 2 * time.Second, 5 * time.Second, 10 * time.Second, 15 * time.Second, 30 * time.Second,
	time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute,
	time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour, 12 * time.Hour,
	24 * time.Hour, 2 * 24 * time.Hour, 7 * 24 * time.Hour, 14 * 24 * time.Hour, 28 * 24 * time.Hour, 91 * 24 * time.Hour}

// timeAxis places round times between a and b.
func timeAxis(a, b time.Time) (x axis) {
	const most = 8
	step := timeSteps[0]
	for _, step = range timeSteps {
		if b.Sub(a) <= most*step {
			break
		}
	}
	for b.Sub(a) > most*step {
		step *= 2
	}
	format := "15:04"
	switch {
	case step >= 24*time.Hour:
		format = "2 Jan"
		if b.Sub(a) > 300*24*time.Hour {
			format = "Jan 2006"
		}
	case step < time.Minute:
		format = "15:04:05"
	case b.Sub(a) > 20*time.Hour:
		format = "2 Jan 15:04"
	}
	_, offset := a.Zone()
	first := a.Add(time.Duration(offset) * time.Second).Truncate(step).Add(-time.Duration(offset) * time.Second)
	var ticks []tick
	for t := first; !t.After(b); t = t.Add(step) {
		if t.Before(a) {
			continue
		}
		at := t.Sub(a).Seconds() / b.Sub(a).Seconds()
		k := tick{X: percentage(at, 1), Text: t.In(a.Location()).Format(format), Anchor: "middle"}
		switch {
		case at < 0.06:
			k.Anchor = "start"
		case at > 0.94:
			k.Anchor = "end"
		}
		ticks = append(ticks, k)
	}
	keep := (len(ticks) + 2) / 3
	for i := range ticks {
		ticks[i].Small = i%max(1, keep) != 0
	}
	x.Ticks, x.Step = ticks, Span(step)
	return x
}
