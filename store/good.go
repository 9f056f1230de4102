package store

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// Good is an address that has sent accepted mail, or logged in.
type Good struct {
	Addr     netip.Addr `json:"addr"`
	First    time.Time  `json:"first"`
	Last     time.Time  `json:"last"`
	Messages int        `json:"messages"`
}

// SaveGood writes these, all or none, in place of what was known of their
// addresses.
func (s *Store) SaveGood(goods []Good) error {
	if len(goods) == 0 {
		return nil
	}
	err := s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketGood)
		for _, g := range goods {
			if !g.Addr.IsValid() {
				return fmt.Errorf("no valid address")
			}
			g.Addr = g.Addr.Unmap().WithZone("")
			v, err := json.Marshal(g)
			if err != nil {
				return fmt.Errorf("%v: %w", g.Addr, err)
			}
			if err := b.Put(appendAddr(nil, g.Addr), v); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("saving %d known good senders: %w", len(goods), err)
	}
	return nil
}

// Good hands out all known good senders, in the order of their addresses,
// until fn returns false. With ErrBadValue all others were handed out.
func (s *Store) Good(fn func(Good) bool) error {
	var bad faults
	bad.add(s.each(func(tx *bbolt.Tx) *bbolt.Bucket { return tx.Bucket(bucketGood) }, func(k, v []byte) bool {
		g, err := decodeGood(k, v)
		if err != nil {
			bad.bad("known good sender", err)
			return true
		}
		return fn(g)
	}))
	return bad.join()
}

// DropGood forgets known good senders of which nothing was seen since before,
// then, of those that remain, the ones not seen for longest until no more than
// most are left (0: no limit); and values that do not decode. It returns how
// many it forgot.
func (s *Store) DropGood(before time.Time, most int) (n int, err error) {
	type seen struct {
		key  []byte
		last time.Time
	}
	err = s.update(func(tx *bbolt.Tx) error {
		var old [][]byte
		var keep []seen
		b := tx.Bucket(bucketGood)
		err := b.ForEach(func(k, v []byte) error {
			g, err := decodeGood(k, v)
			switch {
			case err != nil || g.Last.Before(before):
				old = append(old, bytes.Clone(k))
			case most > 0:
				keep = append(keep, seen{bytes.Clone(k), g.Last})
			}
			return nil
		})
		if err != nil {
			return err
		}
		if most > 0 && len(keep) > most {
			slices.SortFunc(keep, func(a, b seen) int { return a.last.Compare(b.last) })
			for _, s := range keep[:len(keep)-most] {
				old = append(old, s.key)
			}
		}
		for _, k := range old {
			if err := b.Delete(k); err != nil {
				return err
			}
		}
		n = len(old)
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("forgetting known good senders: %w", err)
	}
	return n, nil
}

func decodeGood(k, v []byte) (g Good, err error) {
	a, rest, err := addrIn(k)
	if err == nil && len(rest) != 0 {
		err = fmt.Errorf("key %x is too long", k)
	}
	if err == nil {
		if err = json.Unmarshal(v, &g); err == nil && g.Addr != a {
			err = fmt.Errorf("it says that it is %v", g.Addr)
		}
	}
	if err != nil {
		return Good{}, fmt.Errorf("%x: %w", k, err)
	}
	return g, nil
}
