package store

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"go.etcd.io/bbolt"
)

// AllowEntry is a source that an operator wants never to be blocked, beside
// those that the policy names: a Prefix, or a Name such as
// "dns:mail.example.org", which the store does not look into.
type AllowEntry struct {
	Prefix netip.Prefix `json:"prefix,omitzero"`
	Name   string       `json:"name,omitempty"`
	Note   string       `json:"note,omitempty"`
	By     string       `json:"by,omitempty"` // "NAME (uid N)"
	Added  time.Time    `json:"added"`
	// Until is when the entry ends by itself; zero: never.
	Until time.Time `json:"until,omitzero"`
}

// In reports whether the entry holds at t.
func (e AllowEntry) In(t time.Time) bool { return e.Until.IsZero() || t.Before(e.Until) }

// kindAllowName is the kind of the records of entries that are names.
const kindAllowName = "allow-name"

// AllowAdd writes an entry in place of the one of exactly that prefix or name.
func (s *Store) AllowAdd(e AllowEntry) error {
	if e.Name != "" {
		v, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return s.SetRecord(kindAllowName, e.Name, v)
	}
	err := s.update(func(tx *bbolt.Tx) (err error) {
		if e.Prefix, err = normal(e.Prefix); err != nil {
			return err
		}
		v, err := json.Marshal(e)
		if err != nil {
			return err
		}
		return tx.Bucket(bucketAllow).Put(prefixKey(e.Prefix), v)
	})
	if err != nil {
		return fmt.Errorf("adding %v to the allowlist in the store: %w", e.Prefix, err)
	}
	return nil
}

// AllowRemove removes the entry of exactly that prefix, and reports whether
// there was one.
func (s *Store) AllowRemove(p netip.Prefix) (found bool, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		p, err := normal(p)
		if err != nil {
			return err
		}
		b := tx.Bucket(bucketAllow)
		found = b.Get(prefixKey(p)) != nil
		return b.Delete(prefixKey(p))
	})
	if err != nil {
		return false, fmt.Errorf("removing %v from the allowlist in the store: %w", p, err)
	}
	return found, nil
}

// AllowRemoveName removes the entry of exactly that name, and reports whether
// there was one.
func (s *Store) AllowRemoveName(name string) (found bool, err error) {
	return s.DropRecord(kindAllowName, name)
}

// AllowList returns all entries, those that have ended too, in the order of
// their addresses, then of their names. With ErrBadValue it has all others, and, where only the
// text is unreadable, the prefix from the key: an entry that protects somebody
// is not lost for a broken note.
func (s *Store) AllowList() (list []AllowEntry, err error) {
	var bad faults
	bad.add(s.view(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketAllow).ForEach(func(k, v []byte) error {
			a, rest, err := addrIn(k)
			if err != nil || len(rest) != 1 || int(rest[0]) > a.BitLen() {
				bad.bad("allowlist", fmt.Errorf("key %x", k))
				return nil
			}
			p := netip.PrefixFrom(a, int(rest[0]))
			var e AllowEntry
			if err := json.Unmarshal(v, &e); err != nil {
				bad.bad("allowlist: "+p.String(), err)
				e = AllowEntry{}
			}
			e.Prefix = p
			list = append(list, e)
			return nil
		})
	}))
	bad.add(s.Records(kindAllowName, func(name string, v []byte) bool {
		var e AllowEntry
		if err := json.Unmarshal(v, &e); err != nil {
			bad.bad(fmt.Sprintf("allowlist: %q", name), err)
			e = AllowEntry{}
		}
		e.Prefix, e.Name = netip.Prefix{}, name
		list = append(list, e)
		return true
	}))
	return list, bad.join()
}
