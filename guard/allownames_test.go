package guard

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// zone is a DNS that a test fills: addresses and texts by name. A name that
// is not in it does not exist.
type zone struct {
	mu    sync.Mutex
	addrs map[string]string // "192.0.2.1 2001:db8::1"
	texts map[string]string
	fails bool
	slow  bool // no answer before the context ends
	late  time.Duration
	asked int
}

func (z *zone) set(name, addrs string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.addrs == nil {
		z.addrs = make(map[string]string)
	}
	z.addrs[name+"."] = addrs
}

func (z *zone) break_(fails, slow bool) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.fails, z.slow = fails, slow
}

func (z *zone) LookupNetIP(ctx context.Context, network, host string) (list []netip.Addr, err error) {
	z.mu.Lock()
	fails, slow, late, addrs := z.fails, z.slow, z.late, z.addrs[host]
	z.asked++
	z.mu.Unlock()
	if slow {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if network == "ip4" {
		time.Sleep(late)
	}
	if fails {
		return nil, &net.DNSError{Err: "server misbehaving", IsTemporary: true}
	}
	for a := range strings.FieldsSeq(addrs) {
		if addr := netip.MustParseAddr(a); addr.Is4() == (network == "ip4") {
			list = append(list, addr)
		}
	}
	if len(list) == 0 {
		return nil, &net.DNSError{Err: "no such host", IsNotFound: true}
	}
	return list, nil
}

func (z *zone) LookupTXT(_ context.Context, name string) ([]string, error) {
	z.mu.Lock()
	defer z.mu.Unlock()
	if z.fails {
		return nil, &net.DNSError{Err: "server misbehaving", IsTemporary: true}
	}
	if t, ok := z.texts[name]; ok {
		return []string{t}, nil
	}
	return nil, &net.DNSError{Err: "no such host", IsNotFound: true}
}

func (z *zone) LookupMX(context.Context, string) ([]*net.MX, error) {
	return nil, errors.New("not asked for")
}

// named returns the one name of the allowlist.
func (w *world) named() *AllowName {
	w.t.Helper()
	list, err := w.g.Allowed(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	var found *AllowName
	for _, a := range list {
		if a.Named != nil {
			found = a.Named
		}
	}
	if found == nil {
		w.t.Fatal("no name is on the allowlist")
	}
	return found
}

func (w *world) warned(text string) bool {
	s, err := w.g.Status(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return slices.ContainsFunc(s.Warnings, func(l string) bool { return strings.Contains(l, text) })
}

// A name of the policy: it frees what it stands for, stays known through a
// restart and a DNS that fails for long.
func TestAllowedName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{}
		z.set("mx.example.org", "203.0.113.7 2001:db8::7")
		w := newWorld(t, func(p *policy.Policy) {
			p.Block.Overlap = policy.OverlapRefuse
			p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "policy.yaml:3:5"}}
		})
		w.dns(z)
		stop := w.run()
		defer func() { stop() }()
		time.Sleep(time.Second)
		if o := w.block("203.0.113.0/24", time.Hour); !strings.Contains(o.Refused, "dns:mx.example.org, policy.yaml:3:5") {
			t.Errorf("%+v", o)
		}
		if last := w.passes[len(w.passes)-1]; join(last) != "203.0.113.7/32 2001:db8::7/128" {
			t.Errorf("the packet filter lets pass %v", last)
		}

		// Another address: the blocks of it go within one look.
		w.block("203.0.113.9/32", 24*time.Hour)
		w.want("203.0.113.9/32")
		z.set("mx.example.org", "203.0.113.9")
		time.Sleep(lookEvery + time.Second)
		w.want("")
		if n := w.named(); len(n.Prefixes) != 3 || n.Prefixes[0].Left.IsZero() || !n.Prefixes[1].Left.IsZero() || n.Error != "" {
			t.Errorf("%+v", n)
		}

		// The DNS is gone, and the daemon starts anew: all is as before.
		z.break_(true, false)
		stop()
		w.start()
		w.dns(z)
		if o := w.block("203.0.113.9/32", time.Hour); o.Refused == "" {
			t.Errorf("before the first look: %+v", o)
		}
		stop = w.run()
		time.Sleep(30 * time.Hour)
		for _, p := range []string{"203.0.113.7/32", "203.0.113.9/32", "2001:db8::7/128"} {
			if o := w.block(p, time.Hour); o.Refused == "" {
				t.Errorf("after thirty hours without DNS: %+v", o)
			}
		}
		if n := w.named(); n.Error == "" || time.Since(n.Answered) < 30*time.Hour || !w.warned("could not be looked up in full since") {
			t.Errorf("%+v", n)
		}

		// It comes back with another answer: nothing goes at once.
		z.break_(false, false)
		z.set("mx.example.org", "203.0.113.11")
		time.Sleep(lookEvery + time.Second)
		if n := w.named(); len(n.Prefixes) != 4 || n.Error != "" || n.Prefixes[1].Left.IsZero() || !n.Prefixes[2].Left.IsZero() {
			t.Errorf("%+v", n)
		}
	})
}

// No decision waits for the DNS, and no name is looked up twice at a time.
func TestSlowDNS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{slow: true}
		w := newWorld(t, func(p *policy.Policy) {
			for _, n := range []allow.Name{"dns:a.example", "dns:b.example", "dns:c.example", "dns:d.example", "dns:e.example", "dns:f.example"} {
				p.AllowNames = append(p.AllowNames, policy.AllowName{Name: n})
			}
		})
		w.dns(z)
		stop := w.run()
		time.Sleep(nameGrace + time.Second)
		before := time.Now()
		w.block("203.0.113.9/32", time.Hour)
		if d := time.Since(before); d != 0 {
			t.Errorf("a block took %v", d)
		}
		z.mu.Lock()
		asked := z.asked
		z.mu.Unlock()
		if asked != 6 {
			t.Errorf("%d were asked at once, want all that are new", asked)
		}
		time.Sleep(lookFor)
		if !w.warned("allow: dns:a.example protects nobody: asking for a.example") && !w.warned("protects nobody") {
			t.Error("nobody is warned")
		}
		z.mu.Lock()
		asked = z.asked
		z.mu.Unlock()
		time.Sleep(lookRetry)
		z.mu.Lock()
		asked = z.asked - asked
		z.mu.Unlock()
		if asked != lookAtOnce {
			t.Errorf("%d were asked again at once, want %d", asked, lookAtOnce)
		}
		stop() // in the middle of the next ones
	})
}

// The operator's names: looked up at once, kept in the store, taken off.
func TestAllowName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		z := &zone{texts: map[string]string{"example.org.": "v=spf1 ip4:203.0.113.0/28 ip4:0.0.0.0/1 ptr -all"}}
		w := newWorld(t, nil)
		w.dns(z)
		stop := w.run()
		defer func() { stop() }()
		ctx := t.Context()
		for _, bad := range []string{"dns:", "dns:localhost", "spf:192.0.2.1", "x:example.org"} {
			if _, err := w.g.Allow(ctx, store.AllowEntry{Name: bad}); err == nil {
				t.Errorf("%q is taken", bad)
			}
		}
		w.block("203.0.113.3/32", time.Hour)
		w.block("203.0.113.32/27", time.Hour)
		if _, err := w.g.Allow(ctx, store.AllowEntry{Name: "spf:example.org", By: "root", Note: "partner"}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		w.want("203.0.113.32/27")
		n := w.named()
		if len(n.Prefixes) != 1 || len(n.Notes) != 2 || n.Why != "allowed by root: partner" {
			t.Errorf("%+v", n)
		}
		time.Sleep(time.Second) // the filter has heard of it
		if last := w.passes[len(w.passes)-1]; join(last) != "203.0.113.0/28" {
			t.Errorf("the packet filter lets pass %v", last)
		}
		stop()
		w.start()
		w.dns(z)
		stop = w.run()
		if o := w.block("203.0.113.3/32", time.Hour); o.Refused == "" {
			t.Errorf("after a restart: %+v", o)
		}
		if found, err := w.g.DisallowName(ctx, "SPF:example.org."); err != nil || !found {
			t.Errorf("%v, %v", found, err)
		}
		if found, err := w.g.DisallowName(ctx, "spf:example.org"); err != nil || found {
			t.Errorf("%v, %v", found, err)
		}
		if o := w.block("203.0.113.3/32", time.Hour); o.Refused != "" {
			t.Errorf("after it was taken off: %+v", o)
		}
		if v, err := w.st.Record(kindAllowAnswer, "spf:example.org"); v != nil || err != nil {
			t.Errorf("its answer is still kept: %s, %v", v, err)
		}
	})
}

// everHeld notes what a packet filter was ever told to hold.
type everHeld struct {
	firewall.Firewall
	ever []netip.Prefix
}

func (f *everHeld) Apply(ctx context.Context, b firewall.Batch) (firewall.Result, error) {
	for _, e := range b.Set {
		f.ever = append(f.ever, e.Prefix)
	}
	return f.Firewall.Apply(ctx, b)
}

func (f *everHeld) Replace(ctx context.Context, entries []firewall.Entry) error {
	for _, e := range entries {
		f.ever = append(f.ever, e.Prefix)
	}
	return f.Firewall.Replace(ctx, entries)
}

// A name that was never looked up protects from the start on, as far as the
// DNS answers within seconds: no block is put back and no rule blocks before.
func TestNewNameAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// In force from a time when the name was not on the list.
		w := newWorld(t, nil)
		stop := w.run()
		w.block("203.0.113.7/32", time.Hour)
		stop()

		z := &zone{late: 3 * time.Second}
		z.set("mx.example.org", "203.0.113.7")
		fw := &everHeld{Firewall: firewall.NewMemory(firewall.Options{})} // a reboot
		w.fw = fw
		w.policy.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "policy.yaml:3:5"}}
		w.start()
		w.dns(z)
		stop = w.run()
		defer func() { stop() }()
		time.Sleep(10 * time.Second)
		w.want("")
		if len(fw.ever) > 0 {
			t.Errorf("%s was put back", join(fw.ever))
		}
		if n := w.named(); len(n.Prefixes) != 1 || w.warned("mx.example.org") {
			t.Errorf("%+v", n)
		}
	})
}

// A DNS that does not answer delays a start by seconds, and no more.
func TestNoDNSAtStart(t *testing.T) {
	for name, z := range map[string]*zone{"silent": {slow: true}, "failing": {fails: true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) {
					p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "policy.yaml:3:5"}}
				})
				w.dns(z)
				start := time.Now()
				defer w.run()()
				s, err := w.g.Status(t.Context()) // is answered when Run has begun
				if d := time.Since(start); err != nil || d != nameGrace {
					t.Errorf("it began after %s, %v", d, err)
				}
				if !slices.ContainsFunc(s.Warnings, func(l string) bool { return strings.Contains(l, "dns:mx.example.org protects nobody") }) {
					t.Errorf("nobody is warned: %q", s.Warnings)
				}
				w.k.flood()
				time.Sleep(12 * time.Second)
				w.want(five)
			})
		})
	}
}

// A name that comes onto the list while sources are over the threshold: no
// rule blocks before it was looked up, for some seconds at most; a person
// does.
func TestNewName(t *testing.T) {
	for name, c := range map[string]struct {
		zone    *zone
		confirm policy.Confirm
		early   string // what is blocked 4.5 s after the name came
		late    string // and 7 s
	}{
		"answers late":       {&zone{late: 3 * time.Second}, policy.ConfirmSockets, "203.0.113.2/32 203.0.113.3/32 203.0.113.4/32 203.0.113.5/32", "203.0.113.2/32 203.0.113.3/32 203.0.113.4/32 203.0.113.5/32"},
		"answers after that": {&zone{late: 6 * time.Second}, policy.ConfirmSockets, "", "203.0.113.2/32 203.0.113.3/32 203.0.113.4/32 203.0.113.5/32"},
		"no answer":          {&zone{slow: true}, policy.ConfirmSockets, "", five},
		"fails":              {&zone{fails: true}, policy.ConfirmSockets, "", five},
		"stands for nobody":  {&zone{late: time.Millisecond, addrs: map[string]string{}}, policy.ConfirmSockets, five, five},
		"the log alone":      {&zone{slow: true}, policy.ConfirmOff, "", five},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t, func(p *policy.Policy) { p.Confirm = c.confirm })
				z := c.zone
				if z.addrs == nil {
					z.set("mx.example.org", "203.0.113.1")
				}
				w.dns(z)
				defer w.run()()
				w.k.flood()
				if c.confirm == policy.ConfirmOff {
					for i := 1; i <= 5; i++ {
						w.lines(opens(fmt.Sprintf("203.0.113.%d", i), 20, 20*i-19)...)
					}
				}
				time.Sleep(7 * time.Second) // 20 slots of 100 are over the threshold after 7.5 s
				w.want("")
				p := *w.policy
				p.AllowNames = []policy.AllowName{{Name: "dns:mx.example.org", Why: "policy.yaml:3:5"}}
				if done, err := w.g.Reload(t.Context(), &p); err != nil || done.Undone != nil {
					t.Fatalf("%+v, %v", done, err)
				}
				time.Sleep(2 * time.Second)
				if c.early == "" {
					w.want("")
					if s, _ := w.g.Status(t.Context()); s.Pending == 0 {
						t.Error("no verdict was made yet: the test shows nothing")
					}
				}
				time.Sleep(2500 * time.Millisecond)
				w.want(c.early)
				if o := w.block("198.51.100.1/32", time.Hour); o.Refused != "" {
					t.Errorf("by hand: %+v", o)
				}
				if _, err := w.g.Unblock(t.Context(), netip.MustParsePrefix("198.51.100.1/32"), "root"); err != nil {
					t.Error(err)
				}
				time.Sleep(2500 * time.Millisecond)
				w.want(c.late)
			})
		})
	}
}
