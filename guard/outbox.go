package guard

import (
	"errors"
	"net/netip"
	"time"

	"github.com/smtpguard/smtpguard/store"
)

// outboxReach is how many blocks back Outbox looks at most: of a flood that
// was longer ago nobody wants to be told.
const outboxReach = 100_000

// Outbox returns the blocks that were made after the one of the ID after,
// oldest first and at most limit of them, for those who tell others of them
// later. It reads the store, where every block is before it is in force, so
// nothing is lost when the program ends; and it never touches the goroutine
// that decides.
func (g *Guard) Outbox(after uint64, limit int) ([]store.Block, error) {
	return Outbox(g.o.Store, after, limit)
}

// Outbox is Guard.Outbox for a store without a guard.
func Outbox(s *store.Store, after uint64, limit int) (list []store.Block, err error) {
	last, err := s.History(netip.Prefix{}, time.Time{}, 1)
	if len(last) == 0 {
		return nil, err
	}
	newest := last[0].ID
	if newest > outboxReach {
		after = max(after, newest-outboxReach)
	}
	for id := after + 1; id <= newest && len(list) < limit; id++ {
		b, err := s.Block(id)
		switch {
		case errors.Is(err, store.ErrUnknown), errors.Is(err, store.ErrBadValue):
			continue // forgotten, or damaged: the others count
		case err != nil:
			return list, err
		}
		list = append(list, b)
	}
	return list, nil
}
