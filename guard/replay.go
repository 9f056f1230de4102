package guard

import (
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// Replay answers what a policy would have done to past events. It has the
// gate, the ladder and the detector of the daemon; a block takes effect at
// once: what its source holds is freed, its later events are counted as
// prevented. It has no clock but the events'.
type Replay struct {
	Detector *detector.Detector
	// OnBlock and OnSpare are called in the order of the events; nil: not.
	OnBlock func(store.Block)
	OnSpare func(v detector.Verdict, reason string)
	// OnEvent is called with every event as it came, when it has been
	// observed, and with the block that is in force against its source, if it
	// is a connection opened, closed or refused; nil: not, and nothing is lost.
	OnEvent func(ev *detector.Event, by *store.Block)

	gate      gate
	forget    time.Duration
	blocks    blocks
	nextEnd   time.Time // when the first of blocks runs out, zero if none
	offences  map[netip.Prefix][]time.Time
	told      map[netip.Prefix]time.Time
	sources   distinct
	prevented uint64
	made      int
	spared    int
}

// NewReplay makes a Replay of policy p. capacity 0 means p's, or what the
// events show.
func NewReplay(p *policy.Policy, capacity int) (*Replay, error) {
	if capacity == 0 {
		capacity = p.Capacity
	}
	det, err := newDetector(Options{Policy: p, Capacity: capacity})
	if err != nil {
		return nil, err
	}
	b := p.Block
	return &Replay{
		Detector: det,
		gate:     gate{allow: policy.NewAllowlist(p.Allow), own: ownList(neverBlocked), block: b},
		forget:   b.Forget,
		offences: make(map[netip.Prefix][]time.Time),
		told:     make(map[netip.Prefix]time.Time),
	}, nil
}

// Prevented is the number of connections that blocks would have kept away,
// Blocks and Spared those of OnBlock and OnSpare.
func (r *Replay) Prevented() uint64 { return r.prevented }
func (r *Replay) Blocks() int       { return r.made }
func (r *Replay) Spared() int       { return r.spared }

// Sources is the number of distinct addresses that opened connections or were
// refused; within one per cent where there were more than ten thousand.
func (r *Replay) Sources() int { return r.sources.count() }

// Observe takes the next event. It may change ev.
func (r *Replay) Observe(ev *detector.Event) {
	if r.OnEvent == nil {
		r.observe(ev)
		return
	}
	kind := ev.Kind
	by := r.observe(ev)
	ev.Kind = kind
	if kind == detector.Closed && r.blocks.len() > 0 {
		by, _ = r.blocks.realAddr(ev.Source)
	}
	r.OnEvent(ev, by)
}

// observe takes the next event and returns the block that kept it away.
func (r *Replay) observe(ev *detector.Event) (by *store.Block) {
	if ev.Kind == detector.Opened || ev.Kind == detector.Refused {
		r.sources.add(ev.Source)
	}
	if r.blocks.len() > 0 {
		if !ev.Time.IsZero() && !ev.Time.Before(r.nextEnd) {
			r.blocks.expire(ev.Time)
			r.rearm()
		}
		switch ev.Kind {
		case detector.Opened, detector.Refused:
			if b, ok := r.blocks.realAddr(ev.Source); ok {
				by = b
				r.prevented++
				ev.Kind = detector.Tick
			}
		}
	}
	for _, v := range r.Detector.Observe(ev) {
		r.decide(v)
	}
	return by
}

func (r *Replay) rearm() {
	r.nextEnd = time.Time{}
	for _, b := range r.blocks.table.All() {
		if r.nextEnd.IsZero() || b.Until.Before(r.nextEnd) {
			r.nextEnd = b.Until
		}
	}
}

func (r *Replay) decide(v detector.Verdict) {
	reason := ""
	var parts []netip.Prefix
	if len(v.Spared) > 0 {
		reason = "known-good"
	} else if fit, ref := r.gate.parts(v.Source); ref != nil {
		reason = ref.Why
	} else if len(r.blocks.lacking(fit, true)) == 0 {
		return
	} else if fit, ref := r.gate.admitsVerdict(&v, r.Detector, v.Time, &r.blocks, 0); ref != nil {
		reason = ref.Why
	} else {
		parts = r.blocks.lacking(fit, true)
	}
	if reason != "" {
		if t, ok := r.told[v.Source]; ok && v.Time.Sub(t) < 10*time.Minute {
			return
		}
		if len(r.told) > 10_000 {
			clear(r.told)
		}
		r.told[v.Source] = v.Time
		r.spared++
		if r.OnSpare != nil {
			r.OnSpare(v, reason)
		}
		return
	}
	past := r.offences[v.Source]
	for len(past) > 0 && v.Time.Sub(past[0]) > r.forget {
		past = past[1:]
	}
	offence := len(past) + 1
	r.offences[v.Source] = append(past, v.Time)
	r.Detector.Forget(v.Source)
	for i, p := range parts {
		b := store.Block{Prefix: p, Verdict: &v, Reason: v.Sentence(), Offence: offence,
			Since: v.Time, Until: v.Time.Add(r.gate.block.Duration(offence)), By: store.Self}
		partOf(&b, v.Source, i)
		r.made++
		r.blocks.put(b)
		if r.nextEnd.IsZero() || b.Until.Before(r.nextEnd) {
			r.nextEnd = b.Until
		}
		if r.OnBlock != nil {
			r.OnBlock(b)
		}
	}
}
