package guard

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// Teller is told of the blocks in force, to show them where people look for
// them; *firewall.CSFTeller is one. What it does is never waited for and never
// believed.
type Teller interface {
	// Tell says what is in force now, the most important first. It returns at
	// once.
	Tell([]firewall.Entry)
	// Run does what was told until ctx ends. changed gets an error when that
	// cannot be done any more, nil when it can again.
	Run(ctx context.Context, changed func(error))
	// Settle takes away what is over, where Run is not running, until it is
	// done or ctx ends.
	Settle(ctx context.Context) error
	Status() firewall.CSFStatus
}

// telling is what the Teller was told.
type telling struct {
	edits uint64    // of the blocks when it was told last
	due   time.Time // when it is told again at the earliest
	stop  context.CancelFunc
}

// tellMost is how many blocks a Teller is told of.
const tellMost = 300

// startTelling starts the Teller where it is not CSF itself that blocks.
func (g *Guard) startTelling(ctx context.Context, wg *sync.WaitGroup) {
	if g.o.Teller == nil || g.fw.Name() == firewall.CSF {
		return
	}
	ctx, g.telling.stop = context.WithCancel(ctx)
	g.telling.edits = g.blocks.edits - 1 // what is in force is news
	wg.Go(func() {
		g.o.Teller.Run(ctx, func(err error) {
			if err != nil {
				g.log.Warn("CSF is not told of the blocks; they are in force all the same", "err", err)
			} else {
				g.log.Info("CSF is told of the blocks again")
			}
		})
	})
}

// tellCSF tells the Teller what is in force if that has changed. It takes no more
// than a fiftieth of the deciding goroutine's time, however many there are.
func (g *Guard) tellCSF(now time.Time) {
	if g.telling.stop == nil || g.telling.edits == g.blocks.edits || now.Before(g.telling.due) {
		return
	}
	if g.fw.Name() == firewall.CSF { // since a moment ago: these are its own bans now
		g.telling.stop()
		g.telling.stop = nil
		return
	}
	start := time.Now()
	g.o.Teller.Tell(g.worst(now))
	g.telling.edits = g.blocks.edits
	g.telling.due = now.Add(max(time.Second, 50*time.Since(start)))
}

// worst are the blocks to tell of: the widest, of these those of the worst
// offenders.
func (g *Guard) worst(now time.Time) []firewall.Entry {
	if !g.caps.Real || g.policy.Firewall.CSF != policy.CSFCooperate {
		return nil
	}
	worse := func(a, b *store.Block) int {
		return cmp.Or(cmp.Compare(breadth(b), breadth(a)), cmp.Compare(b.Offence, a.Offence),
			cmp.Compare(heldBy(b), heldBy(a)), a.Since.Compare(b.Since), a.Prefix.Compare(b.Prefix))
	}
	var top []*store.Block
	for _, b := range g.blocks.table.All() {
		if !g.holds(b, now) || len(top) == tellMost && worse(b, top[tellMost-1]) >= 0 {
			continue
		}
		i, _ := slices.BinarySearchFunc(top, b, worse)
		top = slices.Insert(top[:min(len(top), tellMost-1)], i, b)
	}
	out := make([]firewall.Entry, len(top))
	for i, b := range top {
		out[i] = g.entry(b)
	}
	return out
}

// breadth is how much of the net a block takes: an IPv6 /64 as much as an IPv4
// address.
func breadth(b *store.Block) int {
	if b.Prefix.Addr().Is6() {
		return 64 - b.Prefix.Bits()
	}
	return 32 - b.Prefix.Bits()
}

// heldBy is how many slots a block's source held.
func heldBy(b *store.Block) int {
	if b.Verdict == nil {
		return 0
	}
	return b.Verdict.Held
}

// lastWord tells what a command changed that works without a daemon, and with
// remove that nothing is in force any more.
func (g *Guard) lastWord(ctx context.Context, remove bool) error {
	ran := g.telling.stop != nil
	if g.o.Teller == nil || g.fw.Name() == firewall.CSF || !remove && (ran || g.telling.edits == g.blocks.edits) {
		return nil
	}
	var left []firewall.Entry
	if !remove {
		left = g.worst(time.Now())
	}
	g.o.Teller.Tell(left)
	if err := g.o.Teller.Settle(ctx); err != nil {
		return fmt.Errorf("CSF still shows blocks that have ended: %w", err)
	}
	return nil
}

func (g *Guard) csfStatus() *firewall.CSFStatus {
	if g.telling.stop == nil {
		return nil
	}
	s := g.o.Teller.Status()
	if s == (firewall.CSFStatus{}) {
		return nil
	}
	return &s
}
