package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// Add writes new blocks, all or none, and gives each its ID. However many
// they are, the disk is waited for once. The prefixes are masked.
func (s *Store) Add(blocks ...*Block) error { return s.Replace(nil, blocks) }

// Replace is Save of the blocks that end and Add of those that come in their
// place, both or neither.
func (s *Store) Replace(end []Block, blocks []*Block) error {
	given := 0
	err := s.update(func(tx *bbolt.Tx) error {
		if err := save(tx, end); err != nil {
			return err
		}
		for _, b := range blocks {
			if b.ID != 0 {
				return fmt.Errorf("block %d has been added before", b.ID)
			}
			p, err := normal(b.Prefix)
			if err != nil {
				return err
			}
			id, err := tx.Bucket(bucketBlocks).NextSequence()
			if err != nil {
				return err
			}
			b.ID, b.Prefix = id, p
			given++
			if err := put(tx, *b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		for _, b := range blocks[:given] {
			b.ID = 0 // an ID stands for something that is on the disk
		}
		return fmt.Errorf("adding %d blocks to the store: %w", len(blocks), err)
	}
	return nil
}

// Save writes blocks that have been added before, all or none, by their IDs.
// An unknown ID is ErrUnknown.
func (s *Store) Save(blocks ...Block) error {
	if err := s.update(func(tx *bbolt.Tx) error { return save(tx, blocks) }); err != nil {
		return fmt.Errorf("saving %d blocks: %w", len(blocks), err)
	}
	return nil
}

func save(tx *bbolt.Tx, blocks []Block) error {
	for _, b := range blocks {
		p, err := normal(b.Prefix)
		if err != nil {
			return fmt.Errorf("block %d: %w", b.ID, err)
		}
		b.Prefix = p
		if err := drop(tx, b.ID); err != nil {
			return err
		}
		if err := put(tx, b); err != nil {
			return err
		}
	}
	return nil
}

// End lifts the blocks of these IDs at a time, all or none, and notes who did
// it. Blocks that were lifted before, or whose time was over then, stay as
// they are.
func (s *Store) End(at time.Time, by string, ids ...uint64) error {
	err := s.update(func(tx *bbolt.Tx) error {
		for _, id := range ids {
			b, err := get(tx, id)
			if err != nil {
				return err
			}
			if !b.Lifted.IsZero() || !at.Before(b.Until) {
				continue
			}
			if err := drop(tx, id); err != nil {
				return err
			}
			b.Lifted, b.LiftedBy = at, by
			if err := put(tx, b); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("lifting %d blocks in the store: %w", len(ids), err)
	}
	return nil
}

// Block returns the block of that ID, or ErrUnknown.
func (s *Store) Block(id uint64) (b Block, err error) {
	err = s.view(func(tx *bbolt.Tx) error {
		b, err = get(tx, id)
		return err
	})
	return b, err
}

// InForce returns the blocks that should hold at t, oldest first: see
// Block.InForce. t must not be earlier than that of the last Sweep. With
// ErrBadValue all others are returned.
func (s *Store) InForce(t time.Time) ([]Block, error) { return s.unended(t, false) }

// Active is InForce and the blocks that would hold if they had not only been
// observed.
func (s *Store) Active(t time.Time) ([]Block, error) { return s.unended(t, true) }

func (s *Store) unended(t time.Time, observed bool) (blocks []Block, err error) {
	now := appendTime(nil, t)
	var bad faults
	err = s.view(func(tx *bbolt.Tx) error {
		c := tx.Bucket(bucketUnended).Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			// A value that is not as it should be does not decide: the
			// block does.
			if len(v) == timeLen+1 && (bytes.Compare(v[:timeLen], now) <= 0 || v[timeLen] != 0 && !observed) {
				continue
			}
			id, err := idIn(k)
			if err != nil {
				bad.bad("unended", err)
				continue
			}
			b, err := get(tx, id)
			if err != nil {
				bad.add(err)
				continue
			}
			if b.Lifted.IsZero() && t.Before(b.Until) && (observed || !b.Observed) {
				blocks = append(blocks, b)
			}
		}
		return nil
	})
	bad.add(err)
	return blocks, bad.join()
}

// Sweep takes blocks whose time is over by t out of the way of InForce, and
// returns how many; on an error too, for it works in steps. Nothing is
// forgotten.
func (s *Store) Sweep(t time.Time) (n int, err error) {
	now := appendTime(nil, t)
	var over [][]byte
	err = s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketUnended).ForEach(func(k, v []byte) error {
			if len(k) == 8 && len(v) == timeLen+1 && bytes.Compare(v[:timeLen], now) <= 0 {
				over = append(over, bytes.Clone(k))
			}
			return nil
		})
	})
	if err != nil || len(over) == 0 {
		return 0, err
	}
	for keys := range slices.Chunk(over, sweepStep) {
		step := 0
		err := s.update(func(tx *bbolt.Tx) error {
			unended, ended := tx.Bucket(bucketUnended), tx.Bucket(bucketEnded)
			for _, k := range keys {
				v := unended.Get(k)
				if len(v) != timeLen+1 || bytes.Compare(v[:timeLen], now) > 0 {
					continue // changed since
				}
				if err := ended.Put(slices.Concat(v[:timeLen], k), nil); err != nil {
					return err
				}
				if err := unended.Delete(k); err != nil {
					return err
				}
				step++
			}
			return nil
		})
		if err != nil {
			return n, fmt.Errorf("sweeping the store: %w", err)
		}
		n += step
	}
	return n, nil
}

// How many blocks Sweep and Prune work on in one transaction, so that a block
// to be added never waits for long.
const (
	sweepStep = 10_000
	pruneStep = 2000
)

// Prune forgets the blocks that ended before a time, and with them the
// offences that they were. It returns how many; on an error too, for it works
// in steps.
func (s *Store) Prune(before time.Time) (n int, err error) {
	if _, err := s.Sweep(before); err != nil {
		return 0, err
	}
	end := appendTime(nil, before)
	for {
		step := 0
		err := s.update(func(tx *bbolt.Tx) error {
			step = 0
			var keys [][]byte
			c := tx.Bucket(bucketEnded).Cursor()
			for k, _ := c.First(); k != nil && bytes.Compare(k, end) < 0 && len(keys) < pruneStep; k, _ = c.Next() {
				keys = append(keys, bytes.Clone(k))
			}
			for _, k := range keys {
				if err := tx.Bucket(bucketEnded).Delete(k); err != nil {
					return err
				}
				id, err := idIn(k)
				if err != nil {
					continue
				}
				switch err := drop(tx, id); {
				case errors.Is(err, ErrUnknown):
					continue
				case err != nil:
					return err
				}
				if err := tx.Bucket(bucketBlocks).Delete(keyOf(id)); err != nil {
					return err
				}
				step++
			}
			if len(keys) < pruneStep {
				step = -step - 1 // the last one
			}
			return nil
		})
		switch {
		case err != nil:
			return n, fmt.Errorf("pruning the store: %w", err)
		case step < 0:
			return n - step - 1, nil
		}
		n += step
	}
}

// History returns the blocks whose prefix overlaps p, in force or ended,
// newest first: at most limit (0: all), and only those that ended, or will
// end, after since. The zero Prefix means all blocks. It reads no more than
// the blocks that overlap. With ErrBadValue all others are returned.
func (s *Store) History(p netip.Prefix, since time.Time, limit int) (blocks []Block, err error) {
	var bad faults
	add := func(b Block, err error) bool {
		if err != nil {
			bad.add(err)
		} else if b.End().After(since) {
			blocks = append(blocks, b)
		}
		return limit <= 0 || len(blocks) < limit
	}
	err = s.view(func(tx *bbolt.Tx) error {
		if p == (netip.Prefix{}) {
			c := tx.Bucket(bucketBlocks).Cursor()
			for k, v := c.Last(); k != nil && add(decode(k, v)); k, v = c.Prev() {
			}
			return nil
		}
		p, err := normal(p)
		if err != nil {
			return err
		}
		ids := append(inside(tx, p, &bad), containing(tx, p, &bad)...)
		slices.Sort(ids)
		for _, id := range slices.Backward(ids) {
			if !add(get(tx, id)) {
				break
			}
		}
		return nil
	})
	bad.add(err)
	return blocks, bad.join()
}

// Offences returns which offence a block of p is that begins at now: 1 for the
// first. It counts the occasions on which p was blocked before, by blocks that
// ended, or will end, after since. Where one of them still lasts, the new block
// belongs to it: who is blocked and is blocked again has done nothing new.
//
// Blocks of p itself count, and blocks of prefixes that contain it: who
// misbehaves again after the net around him was blocked has been warned.
// Blocks inside p do not: one bad host in a /24 is no offence of its
// neighbours, and a botnet's twenty addresses that were blocked one by one
// this minute would otherwise send the /24 up the ladder at its first block.
// Blocks that overlap in time are one occasion. What was only observed or was
// pardoned never counts, and for a block that was replaced the other one does.
func (s *Store) Offences(p netip.Prefix, since, now time.Time) (n int, err error) {
	var bad faults
	var blocks []Block
	err = s.view(func(tx *bbolt.Tx) error {
		p, err := normal(p)
		if err != nil {
			return err
		}
		for _, id := range append(of(tx, p, &bad), containing(tx, p, &bad)...) {
			b, err := get(tx, id)
			if err != nil {
				bad.add(err)
			} else if b.End().After(since) && !b.Observed && b.Lifted.IsZero() {
				blocks = append(blocks, b)
			}
		}
		return nil
	})
	bad.add(err)
	slices.SortFunc(blocks, func(a, b Block) int { return a.Since.Compare(b.Since) })
	var end time.Time
	for _, b := range blocks {
		if n == 0 || !b.Since.Before(end) {
			n++
		}
		if b.End().After(end) {
			end = b.End()
		}
	}
	if n == 0 || !now.Before(end) {
		n++
	}
	return n, bad.join()
}

// inside returns the IDs of the blocks of p and of prefixes inside it.
func inside(tx *bbolt.Tx, p netip.Prefix, bad *faults) (ids []uint64) {
	end := behind(p)
	c := tx.Bucket(bucketPrefixes).Cursor()
	for k, _ := c.Seek(appendAddr(nil, p.Addr())); k != nil && bytes.Compare(k, end) < 0; k, _ = c.Next() {
		_, rest, err := addrIn(k)
		if err != nil || len(rest) != 9 {
			bad.bad("prefixes", fmt.Errorf("key %x", k))
			continue
		}
		if int(rest[0]) >= p.Bits() {
			ids = append(ids, binary.BigEndian.Uint64(rest[1:]))
		}
	}
	return ids
}

// containing returns the IDs of the blocks of prefixes wider than p that
// contain it.
func containing(tx *bbolt.Tx, p netip.Prefix, bad *faults) (ids []uint64) {
	for bits := range p.Bits() {
		ids = append(ids, of(tx, netip.PrefixFrom(p.Addr(), bits).Masked(), bad)...)
	}
	return ids
}

// of returns the IDs of the blocks of exactly p.
func of(tx *bbolt.Tx, p netip.Prefix, bad *faults) (ids []uint64) {
	prefix := prefixKey(p)
	c := tx.Bucket(bucketPrefixes).Cursor()
	for k, _ := c.Seek(prefix); bytes.HasPrefix(k, prefix); k, _ = c.Next() {
		if len(k) != len(prefix)+8 {
			bad.bad("prefixes", fmt.Errorf("key %x", k))
			continue
		}
		ids = append(ids, binary.BigEndian.Uint64(k[len(prefix):]))
	}
	return ids
}

// get reads a block.
func get(tx *bbolt.Tx, id uint64) (Block, error) {
	v := tx.Bucket(bucketBlocks).Get(keyOf(id))
	if v == nil {
		return Block{}, fmt.Errorf("%w: %d", ErrUnknown, id)
	}
	return decode(keyOf(id), v)
}

// decode reads a block's value and sees that it is the block of that key.
func decode(k, v []byte) (b Block, err error) {
	if err = json.Unmarshal(v, &b); err == nil && (len(k) != 8 || !bytes.Equal(k, keyOf(b.ID))) {
		err = fmt.Errorf("it says that it is block %d", b.ID)
	}
	if err != nil {
		return Block{}, fmt.Errorf("%w: block %x: %w", ErrBadValue, k, err)
	}
	return b, nil
}

// put writes a block and what the indexes say of it.
func put(tx *bbolt.Tx, b Block) error {
	v, err := json.Marshal(b)
	if err != nil {
		return fmt.Errorf("block of %v: %w", b.Prefix, err)
	}
	k := keyOf(b.ID)
	if err := tx.Bucket(bucketBlocks).Put(k, v); err != nil {
		return err
	}
	if err := tx.Bucket(bucketPrefixes).Put(append(prefixKey(b.Prefix), k...), nil); err != nil {
		return err
	}
	if !b.Lifted.IsZero() {
		return tx.Bucket(bucketEnded).Put(append(appendTime(nil, b.Lifted), k...), nil)
	}
	var observed byte
	if b.Observed {
		observed = 1
	}
	return tx.Bucket(bucketUnended).Put(k, append(appendTime(nil, b.Until), observed))
}

// drop removes what the indexes say of a block; its value stays. A block
// whose value does not decode cannot be found in the indexes by it and is
// only taken out of those that go by ID.
func drop(tx *bbolt.Tx, id uint64) error {
	k := keyOf(id)
	if err := tx.Bucket(bucketUnended).Delete(k); err != nil {
		return err
	}
	b, err := get(tx, id)
	if errors.Is(err, ErrBadValue) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := tx.Bucket(bucketEnded).Delete(append(appendTime(nil, b.End()), k...)); err != nil {
		return err
	}
	return tx.Bucket(bucketPrefixes).Delete(append(prefixKey(b.Prefix), k...))
}

// checkValues reads every block and sees that the indexes know it.
func (s *Store) checkValues() error {
	var bad faults
	err := s.view(func(tx *bbolt.Tx) error {
		unended, ended, prefixes := tx.Bucket(bucketUnended), tx.Bucket(bucketEnded), tx.Bucket(bucketPrefixes)
		return tx.Bucket(bucketBlocks).ForEach(func(k, v []byte) error {
			b, err := decode(k, v)
			if err != nil {
				bad.add(err)
				return nil
			}
			if unended.Get(k) == nil && ended.Get(append(appendTime(nil, b.End()), k...)) == nil {
				bad.bad(fmt.Sprintf("block %d", b.ID), errors.New("in no index of ends"))
			}
			if p, err := normal(b.Prefix); err != nil || prefixes.Get(append(prefixKey(p), k...)) == nil {
				bad.bad(fmt.Sprintf("block %d", b.ID), errors.New("not in the index of prefixes"))
			}
			return nil
		})
	})
	bad.add(err)
	return bad.join()
}
