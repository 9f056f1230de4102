package abuse

import (
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/oschwald/maxminddb-golang/v2"
)

// maxDatabase bounds the ASN database, which is read into memory: mapped into
// it, a file that is cut short while it is used would end the program.
const maxDatabase = 256 << 20

// databaseIdle is how long the database stays in memory after its last use.
const databaseIdle = 5 * time.Minute

// database is a file in MaxMind DB format that knows the AS of an address.
// It is read when it is needed, and again when the file has changed.
type database struct {
	path string

	mu   sync.Mutex
	r    *maxminddb.Reader
	mod  time.Time
	size int64
	used time.Time
}

// lookup returns what the database says. errNone if it has no such address.
func (d *database) lookup(a netip.Addr, now time.Time) (c Claim, err error) {
	defer func() {
		if r := recover(); r != nil { // a damaged file; the library promises errors
			err = fmt.Errorf("the ASN database %s is damaged: %v", d.path, r)
		}
	}()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.open(); err != nil {
		return c, err
	}
	d.used = now
	c = Claim{Source: "ASN database " + clean(d.r.Metadata.DatabaseType, 60), At: now, Built: d.r.Metadata.BuildTime().UTC()}
	res := d.r.Lookup(a)
	if err := res.Err(); err != nil {
		return c, fmt.Errorf("the ASN database %s: %w", d.path, err)
	}
	if !res.Found() {
		return c, fmt.Errorf("%w: the ASN database has no %s", errNone, a)
	}
	var rec struct {
		Number uint32 `maxminddb:"autonomous_system_number"`
		Org    string `maxminddb:"autonomous_system_organization"`
		ASN    string `maxminddb:"asn"` // IPinfo's: "AS174"
		Name   string `maxminddb:"as_name"`
		Domain string `maxminddb:"as_domain"`
	}
	if err := res.Decode(&rec); err != nil {
		return c, fmt.Errorf("the ASN database %s: %w", d.path, err)
	}
	as := rec.Number
	if n, ok := asNumber(rec.ASN); ok && as == 0 {
		as = n
	}
	if as == 0 {
		return c, fmt.Errorf("%w: the ASN database names no AS for %s", errNone, a)
	}
	c.Origins = []uint32{as}
	c.Name, c.Domain = clean(rec.Org+rec.Name, 100), clean(rec.Domain, 100)
	if p := res.Prefix(); sane(p, a) {
		c.Prefix = p.Masked()
	}
	return c, nil
}

// open reads the file if it is not the one that is in memory.
func (d *database) open() error {
	fi, err := os.Stat(d.path)
	if err != nil {
		return fmt.Errorf("opening the ASN database: %w", err)
	}
	if d.r != nil && fi.ModTime().Equal(d.mod) && fi.Size() == d.size {
		return nil
	}
	b, err := readBounded(d.path, maxDatabase)
	if err != nil {
		return fmt.Errorf("reading the ASN database: %w", err)
	}
	r, err := maxminddb.OpenBytes(b)
	if err != nil {
		return fmt.Errorf("the ASN database %s: %w", d.path, err)
	}
	d.r, d.mod, d.size = r, fi.ModTime(), fi.Size()
	return nil
}

// rest lets go of the memory when nobody asked for a while.
func (d *database) rest(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.r != nil && now.Sub(d.used) > databaseIdle {
		_ = d.r.Close()
		d.r = nil
	}
}
