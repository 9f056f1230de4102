package abuse

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// world stands in for the Internet: RDAP, RIPEstat and ipinfo by HTTP, and a
// name service, all on loopback.
type world struct {
	t    *testing.T
	http *httptest.Server
	dns  string
	mu   sync.Mutex
	// answers by path; one that begins with "!" is a status and headers.
	answers map[string]string
	txt     map[string][]string
	mx      map[string][]string
	a       map[string][]string
	asked   []string
	slow    time.Duration // every answer takes that long, or until the client leaves
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, answers: map[string]string{}, txt: map[string][]string{}, mx: map[string][]string{}, a: map[string][]string{}}
	w.http = httptest.NewServer(http.HandlerFunc(w.serve))
	t.Cleanup(w.http.Close)
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { pc.Close() })
	w.dns = pc.LocalAddr().String()
	go w.serveDNS(pc)
	return w
}

func (w *world) serve(rw http.ResponseWriter, r *http.Request) {
	w.mu.Lock()
	w.asked = append(w.asked, r.URL.Path)
	path := r.URL.Path
	if res := r.URL.Query().Get("resource"); res != "" {
		path += "?" + res
	}
	ans, ok := w.answers[path]
	if net, bits, is := strings.Cut(strings.TrimPrefix(path, "/rdap/ip/"), "/"); !ok && is && bits != "" {
		ans, ok = w.answers["/rdap/ip/"+net] // the network that holds the one asked about
	}
	slow := w.slow
	w.mu.Unlock()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-r.Context().Done():
			return
		}
	}
	switch {
	case !ok:
		http.NotFound(rw, r)
	case ans == "huge":
		for range 64 {
			if _, err := rw.Write([]byte(strings.Repeat("x", 64<<10))); err != nil {
				return
			}
		}
	case ans == "hang up":
		panic(http.ErrAbortHandler)
	case strings.HasPrefix(ans, "!"):
		var code int
		var header, value string
		fmt.Sscanf(ans, "!%d %s %s", &code, &header, &value)
		if header != "" {
			rw.Header().Set(header, value)
		}
		rw.WriteHeader(code)
	default:
		rw.Write([]byte(ans))
	}
}

func (w *world) serveDNS(pc net.PacketConn) {
	buf := make([]byte, 4096)
	for {
		n, from, err := pc.ReadFrom(buf)
		if err != nil {
			return
		}
		var m dnsmessage.Message
		if m.Unpack(buf[:n]) != nil || len(m.Questions) != 1 {
			continue
		}
		q := m.Questions[0]
		name := strings.TrimSuffix(q.Name.String(), ".")
		m.Header.Response, m.Header.RecursionAvailable = true, true
		m.Additionals = nil
		head := dnsmessage.ResourceHeader{Name: q.Name, Class: q.Class, TTL: 60}
		add := func(b dnsmessage.ResourceBody) {
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: head, Body: b})
		}
		w.mu.Lock()
		w.asked = append(w.asked, q.Type.String()+" "+name)
		known := w.txt[name] != nil || w.mx[name] != nil || w.a[name] != nil
		switch q.Type {
		case dnsmessage.TypeTXT:
			for _, s := range w.txt[name] {
				add(&dnsmessage.TXTResource{TXT: []string{s}})
			}
		case dnsmessage.TypeMX:
			for _, s := range w.mx[name] {
				add(&dnsmessage.MXResource{Pref: 10, MX: dnsmessage.MustNewName(s + ".")})
			}
		case dnsmessage.TypeA:
			for _, s := range w.a[name] {
				add(&dnsmessage.AResource{A: netip.MustParseAddr(s).As4()})
			}
		}
		slow := w.slow
		w.mu.Unlock()
		if slow > 0 {
			continue // no answer at all
		}
		if !known {
			m.Header.RCode = dnsmessage.RCodeNameError
		}
		b, err := m.Pack()
		if err == nil {
			pc.WriteTo(b, from)
		}
	}
}

func (w *world) set(path, ans string) {
	w.mu.Lock()
	w.answers[path] = ans
	w.mu.Unlock()
}

func (w *world) unset(path string) {
	w.mu.Lock()
	delete(w.answers, path)
	w.mu.Unlock()
}

// paths are those that have an answer.
func (w *world) paths() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.answers))
}

// setTXT gives a name its TXT records; none: it does not exist.
func (w *world) setTXT(name string, txt ...string) {
	w.mu.Lock()
	w.txt[name] = txt
	w.mu.Unlock()
}

// setMX gives a domain its one mail server.
func (w *world) setMX(domain, addr string) {
	w.mu.Lock()
	w.mx[domain], w.a["mx."+domain] = []string{"mx." + domain}, []string{addr}
	w.mu.Unlock()
}

func (w *world) count(prefix string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, a := range w.asked {
		if strings.HasPrefix(a, prefix) {
			n++
		}
	}
	return n
}

// online is a configuration that asks this world.
func (w *world) online(c *Config) {
	c.Lookup.Online, c.Lookup.DNS = true, w.dns
	c.Lookup.Each, c.Lookup.Total = 2*time.Second, 10*time.Second
}

func (w *world) connect(l *lookups) {
	u := w.http.URL + "/"
	// Another name: one server's wish to be left alone is not the other's.
	stat := strings.Replace(u, "127.0.0.1", "localhost", 1)
	l.servers = serverURLs{ripestat: stat + "stat/", ipinfo: u + "ipinfo/", ipinfoLite: u + "lite/", bootstrap: u + "boot/",
		cymru4: "origin.test", cymru6: "origin6.test", abusix: "abusix.test"}
	l.boot.nets = []bootNet{{pfx("0.0.0.0/0"), u + "rdap/"}, {pfx("::/0"), u + "rdap/"}}
	l.boot.as = []bootAS{{0, math.MaxUint32, u + "rdap/"}}
	l.boot.tried = l.now() // not now
}

// plain fills the world with the right answers about 198.51.100.0/24.
func (w *world) plain() {
	w.set("/stat/network-info/data.json?198.51.100.7", `{"status":"ok","data":{"asns":["64500"],"prefix":"198.51.100.0/24"}}`)
	w.setTXT("7.100.51.198.origin.test", "64500 | 198.51.100.0/24 | ZZ | ripencc | 2020-01-01")
	w.set("/rdap/autnum/64500", string(must(os.ReadFile("../testdata/abuse/rdap/ripe-autnum.json"))))
	w.set("/rdap/ip/198.51.100.7", string(must(os.ReadFile("../testdata/abuse/rdap/arin-ip-nested-abuse.json"))))
	w.mu.Lock()
	defer w.mu.Unlock()
	w.mx["op1.example"], w.mx["op2.example"] = []string{"mx.op1.example"}, []string{"mx.op2.example"}
	w.a["mx.op1.example"], w.a["mx.op2.example"] = []string{"192.0.2.25"}, []string{"192.0.2.26"}
}

// newLookupsIn is a lookup in a world.
func newLookupsIn(t *testing.T, w *world, change func(*Config)) (*lookups, *memStore) {
	t.Helper()
	c := DefaultConfig()
	c.From, c.Dir = "abuse@example.net", t.TempDir()
	w.online(&c)
	if change != nil {
		change(&c)
	}
	s := newMemStore()
	b := newBench(t, c, Options{Store: s})
	w.connect(b.lookups)
	return b.lookups, s
}

// find is the whole chain.
func (l *lookups) find(ctx context.Context, a netip.Addr, overrides []Override) (f finding) {
	ctx, cancel := context.WithTimeout(ctx, l.config.Lookup.Total)
	defer cancel()
	l.findOrigin(ctx, a, &f)
	l.findContacts(ctx, []netip.Prefix{single(a)}, overrides, &f)
	return f
}

var asked7 = netip.MustParseAddr("198.51.100.7")

func (l *lookups) find7(t *testing.T) finding {
	return l.find(t.Context(), asked7, nil)
}

func TestLookup(t *testing.T) {
	w := newWorld(t)
	w.plain()
	l, _ := newLookupsIn(t, w, nil)
	f := l.find7(t)
	if f.origin.AS != 64500 || f.origin.Prefix != pfx("198.51.100.0/24") || f.origin.Disputed || len(f.origin.Claims) != 2 {
		t.Errorf("origin %+v", f.origin)
	}
	if f.to.Address != "abuse@op2.example" || f.to.Scope != "AS64500" || f.to.Source != "RDAP autnum/64500" || f.to.URL == "" || f.to.At.IsZero() {
		t.Errorf("to %+v", f.to)
	}
	if f.cc.Address != "abuse@op1.example" || f.cc.Source != "RDAP ip/198.51.100.7" {
		t.Errorf("cc %+v", f.cc)
	}
	// The same network again is not asked about again.
	asked := w.count("/rdap")
	if f := l.find7(t); f.to.Address != "abuse@op2.example" || w.count("/rdap") != asked {
		t.Errorf("asked %d times, then %d", asked, w.count("/rdap"))
	}
}

// TestLookupFaults: whatever one source does, the others decide, and what is
// missing is said.
func TestLookupFaults(t *testing.T) {
	for _, c := range []struct {
		name       string
		change     func(*world)
		to, cc     string
		as         uint32
		warn, none string
	}{
		{name: "RDAP says 429", change: func(w *world) { w.set("/rdap/autnum/64500", "!429 Retry-After 7200") }, to: "", as: 64500, warn: "not looked up yet"},
		{name: "RDAP is a web page", change: func(w *world) { w.set("/rdap/autnum/64500", "<html>hello") }, to: "abuse@op1.example", as: 64500, warn: "web page"},
		{name: "RDAP is endless", change: func(w *world) { w.set("/rdap/autnum/64500", "huge") }, to: "abuse@op1.example", as: 64500, warn: "longer than"},
		{name: "RDAP hangs up", change: func(w *world) { w.set("/rdap/autnum/64500", "hang up") }, to: "abuse@op1.example", as: 64500, warn: "RDAP autnum/64500"},
		{name: "RDAP is empty", change: func(w *world) { w.set("/rdap/autnum/64500", "") }, to: "abuse@op1.example", as: 64500, warn: "empty"},
		{name: "RDAP has no abuse role", change: func(w *world) {
			w.set("/rdap/autnum/64500", string(must(os.ReadFile("../testdata/abuse/rdap/afrinic-autnum-no-abuse-role.json"))))
		}, to: "abuse@op1.example", as: 64500},
		{name: "RDAP speaks of another AS", change: func(w *world) { w.set("/rdap/autnum/64500", `{"startAutnum":1,"endAutnum":1}`) }, to: "abuse@op1.example", as: 64500, warn: "not for AS64500"},
		{name: "RDAP redirects in a circle", change: func(w *world) { w.set("/rdap/autnum/64500", "!302 Location /rdap/autnum/64500") }, to: "abuse@op1.example", as: 64500, warn: "redirects"},
		{name: "no AS contact but RIPEstat's", change: func(w *world) {
			w.unset("/rdap/autnum/64500")
			w.set("/stat/abuse-contact-finder/data.json?AS64500", `{"data":{"abuse_contacts":["removed@lacnic.net","abuse@stat.example"]}}`)
		}, to: "abuse@stat.example", cc: "abuse@op1.example", as: 64500},
		{name: "no contact at all", change: func(w *world) {
			w.unset("/rdap/autnum/64500")
			w.unset("/rdap/ip/198.51.100.7")
		}, as: 64500, warn: "nothing is known"},
		{name: "Abusix has the block's", change: func(w *world) {
			w.unset("/rdap/ip/198.51.100.7")
			w.setTXT("7.100.51.198.abusix.test", "removed@lacnic.net,net@abusix.example")
		}, to: "abuse@op2.example", cc: "net@abusix.example", as: 64500},
		{name: "RIPEstat is down", change: func(w *world) { w.set("/stat/network-info/data.json?198.51.100.7", "!503") }, to: "abuse@op2.example", cc: "abuse@op1.example", as: 64500, warn: "not looked up yet"},
		{name: "RIPEstat lies about the prefix", change: func(w *world) {
			w.set("/stat/network-info/data.json?198.51.100.7", `{"data":{"asns":["1"],"prefix":"192.0.2.0/24"}}`)
		}, to: "abuse@op2.example", cc: "abuse@op1.example", as: 64500, warn: "cannot be the prefix"},
		{name: "RIPEstat claims the Internet", change: func(w *world) {
			w.set("/stat/network-info/data.json?198.51.100.7", `{"data":{"asns":["1"],"prefix":"0.0.0.0/0"}}`)
		}, to: "abuse@op2.example", cc: "abuse@op1.example", as: 64500, warn: "cannot be the prefix"},
		{name: "RIPEstat has other types", change: func(w *world) {
			w.set("/stat/network-info/data.json?198.51.100.7", `{"data":{"asns":{"x":[1]},"prefix":7}}`)
		}, to: "abuse@op2.example", cc: "abuse@op1.example", as: 64500, warn: "not what RIPEstat"},
		{name: "Cymru writes nonsense", change: func(w *world) {
			w.setTXT("7.100.51.198.origin.test", "", "|||", "x | y", "0 | 198.51.100.0/24", "64500 | 10.0.0.0/8", strings.Repeat("9", 200))
		}, to: "abuse@op2.example", cc: "abuse@op1.example", as: 64500, warn: "no usable record"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.plain()
			c.change(w)
			l, _ := newLookupsIn(t, w, nil)
			f := l.find7(t)
			// After 429 the RDAP server is left alone, so the block is not
			// asked about there either.
			if f.to.Address != c.to || f.cc.Address != c.cc || f.origin.AS != c.as {
				t.Errorf("to %q, cc %q, AS%d; want %q, %q, AS%d", f.to.Address, f.cc.Address, f.origin.AS, c.to, c.cc, c.as)
			}
			if c.warn != "" && !strings.Contains(strings.Join(f.warnings, "\n"), c.warn) {
				t.Errorf("warnings %q, want %q in them", f.warnings, c.warn)
			}
			for _, o := range f.others {
				if o.Address == f.to.Address || isRegistry(o.Address) {
					t.Errorf("further contact %+v", o)
				}
			}
		})
	}
}

func TestLookupDisputed(t *testing.T) {
	w := newWorld(t)
	w.plain()
	w.setTXT("7.100.51.198.origin.test", "64500 64511 | 198.51.100.0/24 | ZZ | x | x", "64512 | 198.51.0.0/16 | ZZ | x | x")
	l, _ := newLookupsIn(t, w, nil)
	f := l.find7(t)
	if !f.origin.Disputed || f.origin.AS != 64500 || !slices.Equal(f.origin.ASes, []uint32{64500, 64511}) {
		t.Errorf("origin %+v", f.origin)
	}
}

// TestLookupDeadline: servers that never answer cost no more than the time
// that is set.
func TestLookupDeadline(t *testing.T) {
	w := newWorld(t)
	w.plain()
	w.mu.Lock()
	w.slow = time.Minute
	w.mu.Unlock()
	l, _ := newLookupsIn(t, w, func(c *Config) { c.Lookup.Each, c.Lookup.Total = 200*time.Millisecond, 600*time.Millisecond })
	done := make(chan finding, 1)
	go func() { done <- l.find(context.Background(), asked7, nil) }()
	select {
	case f := <-done:
		if f.to.Address != "" || f.origin.AS != 0 || f.origin.NotAsked == "" {
			t.Errorf("%+v", f)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the lookup does not end")
	}
}

// TestLookupOffline asks nobody and says so.
func TestLookupOffline(t *testing.T) {
	w := newWorld(t)
	w.plain()
	l, _ := newLookupsIn(t, w, func(c *Config) {
		c.Lookup.Online, c.ASNDatabase = false, "../testdata/abuse/asn/doc-asn.mmdb"
	})
	f := l.find7(t)
	if w.count("") != 0 {
		t.Error("somebody was asked")
	}
	if f.origin.AS != 64500 || !strings.Contains(strings.Join(f.warnings, "\n"), "not looked up") {
		t.Errorf("%+v", f)
	}
	if c := f.origin.Claims[0]; c.Built.IsZero() || c.Announced || !strings.Contains(c.String(), "by database GeoLite2-ASN of 20") {
		t.Errorf("%+v: %s", c, c.String())
	}
}

func TestLookupStale(t *testing.T) {
	w := newWorld(t)
	w.plain()
	l, s := newLookupsIn(t, w, nil)
	now := testStart
	l.now = func() time.Time { return now }
	l.find7(t)
	now = now.Add(8 * 24 * time.Hour)
	for _, p := range w.paths() {
		w.set(p, "!503")
	}
	l.fetch.servers = map[string]*server{}
	f := l.find7(t)
	if f.to.Address != "abuse@op2.example" || !f.to.Stale {
		t.Errorf("to %+v", f.to)
	}
	// Another process finds what this one remembered.
	l2, err := newLookups(l.config, s, l.log, l.now, true)
	if err != nil {
		t.Fatal(err)
	}
	w.connect(l2)
	l2.fetch.servers = map[string]*server{}
	if f := l2.find7(t); f.to.Address != "abuse@op2.example" || !f.to.Stale {
		t.Errorf("to %+v", f.to)
	}
	now = now.Add(60 * 24 * time.Hour)
	l.fetch.servers = map[string]*server{}
	if f := l.find7(t); f.to.Address != "" {
		t.Errorf("an answer of 68 days ago is believed: %+v", f.to)
	}
}

// TestLookupOnce: many callers, one question.
func TestLookupOnce(t *testing.T) {
	w := newWorld(t)
	w.plain()
	l, _ := newLookupsIn(t, w, nil)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			if f := l.find7(t); f.to.Address != "abuse@op2.example" {
				t.Errorf("to %+v", f.to)
			}
		})
	}
	wg.Wait()
	if n := w.count("/rdap/autnum"); n != 1 {
		t.Errorf("asked %d times", n)
	}
}

func TestFetchBounds(t *testing.T) {
	w := newWorld(t)
	w.set("/a", "yes")
	u := w.http.URL
	strict := newFetcher("test", false)
	if _, _, err := strict.get(t.Context(), u+"/a", ""); err == nil || !strings.Contains(err.Error(), "HTTPS") {
		t.Errorf("plain HTTP: %v", err)
	}
	if _, _, err := strict.get(t.Context(), strings.Replace(u, "http:", "https:", 1)+"/a", ""); err == nil || !strings.Contains(err.Error(), "not an address on the Internet") {
		t.Errorf("loopback: %v", err)
	}
	if _, _, err := strict.get(t.Context(), "https://user:secret@example.net/", ""); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a password: %v", err)
	}
	f := newFetcher("test", true)
	now := time.Now()
	waited := 0
	for range bucketSize + 1 {
		if d, err := f.turn("h", now); err != nil {
			t.Fatal(err)
		} else if d > 0 {
			waited++
		}
	}
	if waited != 1 {
		t.Errorf("%d of %d questions wait, want the last one", waited, bucketSize+1)
	}
	for _, c := range []struct {
		after string
		most  time.Duration
		least time.Duration
	}{{"", minBackoff, minBackoff}, {"10", 10 * time.Second, 10 * time.Second}, {"999999999", maxBackoff, maxBackoff}, {"-5", minBackoff, minBackoff}, {"soon", minBackoff, minBackoff}} {
		f.servers = map[string]*server{}
		resp := &http.Response{StatusCode: 429, Header: http.Header{"Retry-After": {c.after}}}
		before := time.Now()
		f.heed("h", resp)
		got := f.servers["h"].backoff
		if got.Before(before.Add(c.least)) || got.After(time.Now().Add(c.most)) {
			t.Errorf("Retry-After %q: %s", c.after, got.Sub(before))
		}
		if _, err := f.turn("h", before); !errors.Is(err, errLater) {
			t.Errorf("Retry-After %q: asked again: %v", c.after, err)
		}
	}
}

func TestIPinfo(t *testing.T) {
	a := netip.MustParseAddr("8.8.8.8") // the library does not ask about reserved ones
	for _, c := range []struct {
		name, core, lite, token string
		as                      uint32
		prefix, contact, fault  string
	}{
		{name: "paid", core: `{"ip":"8.8.8.8","asn":{"asn":"AS64500","route":"8.8.8.0/24","name":"Op","domain":"op1.example"},"abuse":{"email":"abuse@op1.example","network":"8.8.8.0/24"}}`, as: 64500, prefix: "8.8.8.0/24", contact: "abuse@op1.example"},
		{name: "free", core: `{"ip":"8.8.8.8","org":"AS64500 Operator One"}`, as: 64500},
		{name: "lite", core: "!403", lite: `{"asn":"AS64500","as_name":"Op","as_domain":"op1.example"}`, token: "t0k3n", as: 64500},
		{name: "empty", core: "", fault: "names no AS"},
		{name: "429", core: "!429", fault: "not looked up yet"},
		{name: "403", core: "!403", fault: "answered 403"},
		{name: "not an address", core: `{"ip":"nonsense"}`, fault: ""},
		{name: "array", core: `[1,2]`, fault: "cannot unmarshal"},
		{name: "huge", core: "huge", fault: ""},
		{name: "lying prefix", core: `{"asn":{"asn":"AS64500","route":"10.0.0.0/8"}}`, as: 64500},
		{name: "registry as contact", core: `{"org":"AS64500 x","abuse":{"email":"abuse@ripe.net"}}`, as: 64500},
		{name: "hang up", core: "hang up", fault: ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t)
			w.set("/ipinfo/8.8.8.8", c.core)
			if c.lite != "" {
				w.set("/lite/8.8.8.8", c.lite)
			}
			l, _ := newLookupsIn(t, w, func(cf *Config) { cf.Lookup.IPinfoToken = c.token })
			ans, err := l.ipinfoLookup(t.Context(), a)
			if c.as == 0 {
				if err == nil || !strings.Contains(err.Error(), c.fault) {
					t.Fatalf("%+v, error %v, want %q in it", ans, err, c.fault)
				}
				if strings.Contains(err.Error(), "signup") {
					t.Errorf("the library's text is shown: %v", err)
				}
				return
			}
			if err != nil || len(ans.claim.Origins) != 1 || ans.claim.Origins[0] != c.as || ans.contact.Address != c.contact {
				t.Errorf("%+v, %v", ans, err)
			}
			if c.prefix != "" && ans.claim.Prefix != pfx(c.prefix) || c.prefix == "" && ans.claim.Prefix.IsValid() {
				t.Errorf("prefix %s", ans.claim.Prefix)
			}
		})
	}
	w := newWorld(t)
	l, _ := newLookupsIn(t, w, nil)
	if _, err := l.ipinfoLookup(t.Context(), asked7); !errors.Is(err, errNone) {
		t.Errorf("a reserved address: %v", err)
	}
	if _, err := l.ipinfoLookup(t.Context(), netip.Addr{}); err == nil {
		t.Error("no address is no error")
	}
	w.mu.Lock()
	w.slow = time.Minute
	w.mu.Unlock()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := l.ipinfoLookup(ctx, a); err == nil {
		t.Error("a server that never answers is no error")
	}
}

func TestReverse(t *testing.T) {
	for in, want := range map[string]string{
		"198.51.100.23": "23.100.51.198.",
		"2001:db8::1":   "1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.",
	} {
		if got := reverse(netip.MustParseAddr(in)); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestDatabase(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		file, addr string
		as         uint32
		prefix     string
	}{
		{"GeoLite2-ASN-Test.mmdb", "1.128.0.1", 1221, "1.128.0.0/11"},
		{"doc-asn.mmdb", "198.51.100.9", 64500, "198.51.100.0/24"},
		{"doc-asn.mmdb", "192.0.2.9", 64502, "192.0.2.0/25"},
		{"doc-asn.mmdb", "2001:db8:bad::9", 64500, "2001:db8:bad::/48"},
		{"doc-asn.mmdb", "192.0.2.200", 0, ""},
	} {
		d := &database{path: "../testdata/abuse/asn/" + c.file}
		got, err := d.lookup(netip.MustParseAddr(c.addr), now)
		if c.as == 0 {
			if !errors.Is(err, errNone) {
				t.Errorf("%s: %+v, %v", c.addr, got, err)
			}
			continue
		}
		if err != nil || got.Origins[0] != c.as || got.Prefix != pfx(c.prefix) || got.Built.IsZero() {
			t.Errorf("%s: %+v, %v", c.addr, got, err)
		}
	}
	// A new file is read, a damaged one is an error and no end of the program.
	path := filepath.Join(t.TempDir(), "asn.mmdb")
	good := must(os.ReadFile("../testdata/abuse/asn/doc-asn.mmdb"))
	d := &database{path: path}
	if _, err := d.lookup(asked7, now); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	must(0, os.WriteFile(path, good, 0o600))
	if _, err := d.lookup(asked7, now); err != nil {
		t.Error(err)
	}
	for n := range 60 {
		b := slices.Clone(good)
		for i := range 20 {
			b[(n*7919+i*104729)%len(b)] ^= byte(n + 1)
		}
		must(0, os.WriteFile(path, b[:len(b)-n], 0o600))
		_, _ = d.lookup(asked7, now)
	}
	d.rest(now.Add(time.Hour))
	if d.r != nil {
		t.Error("the database stays in memory")
	}
}

func TestBootstrap(t *testing.T) {
	b, err := newBootstrap("")
	if err != nil {
		t.Fatal(err)
	}
	for addr, want := range map[string]string{"193.0.6.139": "ripe.net", "8.8.8.8": "arin.net", "2001:4200::1": "afrinic.net", "1.1.1.1": "apnic.net", "200.3.14.10": "lacnic.net"} {
		got, err := b.forAddr(netip.MustParseAddr(addr))
		if err != nil || !strings.Contains(got, want) || !strings.HasPrefix(got, "https://") || !strings.HasSuffix(got, "/") {
			t.Errorf("%s: %s, %v", addr, got, err)
		}
	}
	if got, err := b.forAS(3333); err != nil || !strings.Contains(got, "ripe") {
		t.Errorf("AS3333: %s, %v", got, err)
	}
	if _, err := b.forAddr(netip.MustParseAddr("127.0.0.1")); !errors.Is(err, errNone) {
		t.Errorf("loopback: %v", err)
	}
	// A newer file is fetched once, and a damaged one changes nothing.
	w := newWorld(t)
	w.set("/boot/asn.json", `{"services":[[["3333"],["https://new.example/rdap"]]]}`)
	w.set("/boot/ipv4.json", `{"services":[[["193.0.0.0/8","nonsense"],["https://bad.example/"]]]}`)
	dir := t.TempDir()
	if b, err = newBootstrap(dir); err != nil {
		t.Fatal(err)
	}
	f := newFetcher("test", true)
	now := time.Now()
	if err := b.refresh(t.Context(), f, w.http.URL+"/boot/", now); err == nil {
		t.Error("a damaged file is no error")
	}
	if got, _ := b.forAS(3333); got != "https://new.example/rdap/" {
		t.Errorf("AS3333: %s", got)
	}
	if got, _ := b.forAddr(netip.MustParseAddr("193.0.6.139")); !strings.Contains(got, "ripe.net") {
		t.Errorf("193.0.6.139: %s", got)
	}
	n := w.count("/boot")
	if err := b.refresh(t.Context(), f, w.http.URL+"/boot/", now.Add(time.Hour)); err != nil || w.count("/boot") != n {
		t.Errorf("asked again at once: %v", err)
	}
	if b, err = newBootstrap(dir); err != nil {
		t.Fatal(err)
	}
	if got, _ := b.forAS(3333); got != "https://new.example/rdap/" {
		t.Errorf("after a restart: %s", got)
	}
}

func TestOverrides(t *testing.T) {
	all, err := ParseOverrides([]byte(`
# desks that a person knows
AS64500 abuse@as64500.example format=text
198.51.100.0/24 never note=our own lab
198.51.0.0/16 wide@op.example
AS64501 form=https://abuse.example/form   # their form
nonsense x@y.example
AS64502 a;b@y.example
AS64503 format=html
`))
	if len(all) != 4 || err == nil || strings.Count(err.Error(), "line ") != 3 {
		t.Fatalf("%+v, %v", all, err)
	}
	if o := findOverride(all, 64500, pfx("198.51.100.7/32")); o == nil || !o.Never || o.Note != "our own lab" {
		t.Errorf("%+v", o)
	}
	if o := findOverride(all, 64500, pfx("198.51.9.9/32")); o == nil || o.Address != "wide@op.example" {
		t.Errorf("%+v", o)
	}
	if o := findOverride(all, 64500, pfx("192.0.2.1/32")); o == nil || o.Format != Text {
		t.Errorf("%+v", o)
	}
	if o := findOverride(all, 7, pfx("192.0.2.1/32")); o != nil {
		t.Errorf("%+v", o)
	}
}

// TestLookupOverride: what a person knows is not looked up.
func TestLookupOverride(t *testing.T) {
	w := newWorld(t)
	w.plain()
	l, _ := newLookupsIn(t, w, nil)
	o := must(ParseOverrides([]byte("AS64500 known@op.example format=text form=https://op.example/")))
	f := l.find(t.Context(), asked7, o)
	if f.to.Address != "known@op.example" || f.to.Format != Text || f.to.Form == "" || f.cc.Address != "" || w.count("/rdap") != 0 {
		t.Errorf("%+v %+v, RDAP asked %d times", f.to, f.cc, w.count("/rdap"))
	}
}

// FuzzAnswers: no answer of any source makes a contact that cannot be used,
// a prefix that does not contain the address, or a panic.
func FuzzAnswers(f *testing.F) {
	f.Add(`{"data":{"asns":["64500"],"prefix":"8.8.8.0/24","abuse_contacts":["a@b.example"]}}`)
	f.Add(`{"ip":"8.8.8.8","asn":{"asn":"AS1","route":"8.0.0.0/9"},"abuse":{"email":"a@b.example"},"Response":null}`)
	f.Add(`{"asn":"AS1","error":{"title":7}}`)
	var ans atomic.Value
	srv := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		s := ans.Load().(string)
		if len(s)%3 == 0 {
			rw.WriteHeader(400)
		}
		rw.Write([]byte(s))
	}))
	f.Cleanup(srv.Close)
	c := DefaultConfig()
	c.Dir, c.Lookup.IPinfoToken = f.TempDir(), "x"
	d, err := newDesk(Options{Config: c, Store: newMemStore()}, time.Now, true)
	if err != nil {
		f.Fatal(err)
	}
	u := srv.URL + "/"
	d.lookups.servers = serverURLs{ripestat: u, ipinfo: u, ipinfoLite: u}
	a := netip.MustParseAddr("8.8.8.8")
	f.Fuzz(func(t *testing.T, s string) {
		ans.Store(s)
		d.lookups.fetch.mu.Lock()
		d.lookups.fetch.servers = map[string]*server{}
		d.lookups.fetch.mu.Unlock()
		check := func(c Claim, cs []Contact, err error) {
			if err != nil {
				_ = err.Error()
				return
			}
			if c.Prefix.IsValid() && !sane(c.Prefix, a) {
				t.Errorf("prefix %s", c.Prefix)
			}
			for _, x := range cs {
				if got, err := CheckAddress(x.Address); x.Address != "" && (err != nil || got != x.Address) {
					t.Errorf("contact %q", x.Address)
				}
			}
		}
		cl, err := d.lookups.ripestatOrigin(t.Context(), a)
		check(cl, nil, err)
		cs, err := d.lookups.ripestatContacts(t.Context(), "AS1", "AS1")
		check(Claim{}, cs, err)
		ip, err := d.lookups.ipinfoLookup(t.Context(), a)
		check(ip.claim, []Contact{ip.contact}, err)
	})
}

// FuzzOverrides: whatever stands in the file, what it says of a network can be
// looked up, and every address in it can be written to.
func FuzzOverrides(f *testing.F) {
	f.Add([]byte("AS64500 abuse@as64500.example format=text\n198.51.100.0/24 never note=ours # x\nAS64501 form=https://x.example/"))
	f.Add([]byte("::/0 never\n0.0.0.0/0 a@b.example\nAS0 never"))
	f.Fuzz(func(t *testing.T, text []byte) {
		all, _ := ParseOverrides(text)
		for i := range all {
			o := &all[i]
			if got, err := CheckAddress(o.Address); o.Address != "" && (err != nil || got != o.Address) {
				t.Errorf("address %q", o.Address)
			}
			if o.Never && o.Prefix.IsValid() && findNever(all, nil, o.Prefix) == nil {
				t.Errorf("%s is not found", o.of())
			}
		}
		for _, p := range []netip.Prefix{pfx("198.51.100.0/24"), pfx("2001:db8::1/128"), pfx("0.0.0.0/0")} {
			findOverride(all, 64500, p)
			findNever(all, []uint32{64500, 64511}, p)
		}
	})
}

// TestReservedAS: nobody is written to as the holder of a number that is not
// one of an operator.
func TestReservedAS(t *testing.T) {
	for _, c := range []struct {
		claims [][]uint32
		as     uint32
	}{
		{[][]uint32{{64512, 3320}}, 3320},
		{[][]uint32{{4200000000}, {3320}}, 3320},
		{[][]uint32{{23456}}, 0},
		{[][]uint32{{65535}}, 0},
		{[][]uint32{{65552}}, 0},
		{[][]uint32{{131071}}, 0},
		{[][]uint32{{131072}}, 131072},
		{[][]uint32{{64511}}, 64511},
	} {
		var o Origin
		for _, as := range c.claims {
			o.Claims = append(o.Claims, Claim{Origins: as, Prefix: pfx("198.51.100.0/24"), Announced: true})
		}
		if o.decide(); o.AS != c.as || o.Disputed || (c.as == 0) != (len(o.Claims) == 0) {
			t.Errorf("%v: AS%d, disputed %v, %+v", c.claims, o.AS, o.Disputed, o.Claims)
		}
	}
}
