package abuse

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The registries of RDAP servers (RFC 9224) that are built in; see
// bootstrap/ORIGIN.txt.
//
//go:embed bootstrap/asn.json bootstrap/ipv4.json bootstrap/ipv6.json
var builtin embed.FS

// Where newer ones are, and how often they are asked for.
const (
	bootstrapURL   = "https://data.iana.org/rdap/"
	bootstrapEvery = 30 * 24 * time.Hour
	bootstrapRetry = 24 * time.Hour
)

// bootstrap knows which RDAP server is responsible.
type bootstrap struct {
	dir string // where newer files are kept; "": nowhere

	mu    sync.Mutex
	nets  []bootNet
	as    []bootAS
	tried time.Time
}

type bootNet struct {
	p    netip.Prefix
	base string
}

type bootAS struct {
	first, last uint32
	base        string
}

var bootFiles = []string{"asn.json", "ipv4.json", "ipv6.json"}

// newBootstrap reads the newest files there are. One that is damaged gives
// way to the built-in one.
func newBootstrap(dir string) (*bootstrap, error) {
	b := &bootstrap{dir: dir}
	for _, name := range bootFiles {
		if dir != "" {
			if text, err := readBounded(filepath.Join(dir, name), maxBody); err == nil && b.add(name, text) == nil {
				continue
			}
		}
		text, err := builtin.ReadFile("bootstrap/" + name)
		if err == nil {
			err = b.add(name, text)
		}
		if err != nil {
			return nil, fmt.Errorf("reading the built-in registry of RDAP servers: %w", err)
		}
	}
	return b, nil
}

// add reads one file. Nothing is changed by one that is not whole.
func (b *bootstrap) add(name string, text []byte) error {
	var f struct {
		Services [][][]string `json:"services"`
	}
	if err := json.Unmarshal(text, &f); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var nets []bootNet
	var ases []bootAS
	for _, s := range f.Services {
		if len(s) != 2 {
			return fmt.Errorf("%s: a service without its two lists", name)
		}
		base := ""
		for _, u := range s[1] { // HTTPS where there is the choice
			if p, err := url.Parse(u); err == nil && (p.Scheme == "https" || base == "" && p.Scheme == "http") && p.Host != "" {
				base = strings.TrimSuffix(u, "/") + "/"
			}
		}
		if base == "" {
			continue
		}
		for _, key := range s[0] {
			if name != "asn.json" {
				p, err := netip.ParsePrefix(key)
				if err != nil {
					return fmt.Errorf("%s: %w", name, err)
				}
				nets = append(nets, bootNet{p.Masked(), base})
				continue
			}
			lo, hi, ok := strings.Cut(key, "-")
			if !ok {
				hi = lo
			}
			first, err1 := strconv.ParseUint(lo, 10, 32)
			last, err2 := strconv.ParseUint(hi, 10, 32)
			if err := errors.Join(err1, err2); err != nil || first > last {
				return fmt.Errorf("%s: %q is no range of AS numbers", name, clean(key, 40))
			}
			ases = append(ases, bootAS{uint32(first), uint32(last), base})
		}
	}
	if len(nets)+len(ases) == 0 {
		return fmt.Errorf("%s: it names no server", name)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if name == "asn.json" {
		b.as = ases
		return nil
	}
	kept := b.nets[:0:0]
	for _, n := range b.nets {
		if n.p.Addr().Is4() != (name == "ipv4.json") {
			kept = append(kept, n)
		}
	}
	b.nets = append(kept, nets...)
	return nil
}

// forAddr returns the base URL, with a / at its end, of the server that is
// responsible for an address.
func (b *bootstrap) forAddr(a netip.Addr) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	best := bootNet{}
	for _, n := range b.nets {
		if n.p.Contains(a) && (best.base == "" || n.p.Bits() > best.p.Bits()) {
			best = n
		}
	}
	if best.base == "" {
		return "", fmt.Errorf("%w: no registry is responsible for %s", errNone, a)
	}
	return best.base, nil
}

// forAS is forAddr for an AS.
func (b *bootstrap) forAS(as uint32) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.as {
		if r.first <= as && as <= r.last {
			return r.base, nil
		}
	}
	return "", fmt.Errorf("%w: no registry is responsible for AS%d", errNone, as)
}

// refresh fetches newer files when those that are there are old. Failing is
// no harm: the ones that are there go on to serve.
func (b *bootstrap) refresh(ctx context.Context, f *fetcher, from string, now time.Time) error {
	if b.dir == "" {
		return nil
	}
	b.mu.Lock()
	due := now.Sub(b.tried) >= bootstrapRetry
	if due {
		b.tried = now
	}
	b.mu.Unlock()
	if !due {
		return nil
	}
	var faults []error
	for _, name := range bootFiles {
		path := filepath.Join(b.dir, name)
		if fi, err := os.Stat(path); err == nil && now.Sub(fi.ModTime()) < bootstrapEvery {
			continue
		}
		text, _, err := f.get(ctx, from+name, "application/json")
		if err == nil {
			err = b.add(name, text)
		}
		if err == nil {
			err = writeFile(path, text)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("fetching the registry of RDAP servers: %w", err))
		}
	}
	return errors.Join(faults...)
}
