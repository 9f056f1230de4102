package allow

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"dns:mail.example.org":      "dns:mail.example.org",
		"DNS:Mail.Example.ORG.":     "dns:mail.example.org",
		"spf:_spf.example.org":      "spf:_spf.example.org",
		"spf:xn--bcher-kva.example": "spf:xn--bcher-kva.example",
	} {
		if n, err := Parse(in); err != nil || string(n) != want {
			t.Errorf("Parse(%q) = %q, %v", in, n, err)
		}
	}
	for _, in := range []string{"", "dns:", "dns:.", "dns:localhost", "dns:192.0.2.1", "dns:2001:db8::1", "dns:a..b", "dns:-a.b", "dns:a b.c",
		"dns:\x1b[31m.org", "dns:1.2", "spf:" + strings.Repeat("a.", 127) + "bc", "spf:" + strings.Repeat("a", 64) + ".org", "mx:example.org", "bücher.example", "dns:%{i}.org"} {
		if n, err := Parse(in); err == nil {
			t.Errorf("Parse(%q) = %q", in, n)
		} else if strings.ContainsAny(err.Error(), "\x1b\n") {
			t.Errorf("%q is not printable", err)
		}
	}
}

// resolve gives an answer as text: prefixes, then notes, then the error.
func resolve(t *testing.T, r Resolver, name string) string {
	t.Helper()
	n, err := Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	a, err := Resolve(ctx, r, n)
	var lines []string
	for _, p := range a.Prefixes {
		lines = append(lines, p.String())
	}
	for _, n := range a.Notes {
		lines = append(lines, "note: "+n)
	}
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			lines = append(lines, "error: "+line)
		}
	}
	return strings.Join(lines, "\n")
}

const zone = `
mail.example.org. A 192.0.2.1
mail.example.org. A 192.0.2.2
mail.example.org. AAAA 2001:db8::1
alias.example.org. CNAME mail.example.org.
four.example.org. A 192.0.2.4
broken.example.org. SERVFAIL
none.example.org. TXT nothing
example.org. TXT google-site-verification=x
example.org. TXT v=spf1 ip4:198.51.100.0/24 ip6:2001:db8:1::/48 a:mail.example.org/28//64 mx include:_spf.example.net -ip4:203.0.113.1 ?ip4:203.0.113.2 ~all ip4:203.0.113.3
example.org. MX mx1.example.org.
mx1.example.org. A 192.0.2.25
_spf.example.net. TXT V=SPF1 IP4:198.51.100.77 include:deeper.example.net exists:%{i}.x.example.net ptr a:%{d}.example.net +all
deeper.example.net. TXT v=spf1 redirect=last.example.net
last.example.net. TXT v=spf1 ip4:203.0.113.64/26 -all
everybody.example. TXT v=spf1 +all
wide.example. TXT v=spf1 ip4:0.0.0.0/0 ip4:10.0.0.0/7 ip6:::/0 ip6:2000::/3 ip6:::ffff:0:0/95 ip4:192.0.2.9 a:mail.example.org/0 -all
halves.example. TXT v=spf1 ip4:11.0.0.0/9 ip4:12.0.0.0/8 ip4:13.0.0.0/10 ip6:2001::/17 ip6:2002::/16 -all
loop.example. TXT v=spf1 ip4:192.0.2.10 include:loop2.example -all
loop2.example. TXT v=spf1 include:loop.example ip4:192.0.2.11 redirect=loop.example
two.example. TXT v=spf1 ip4:192.0.2.12 -all
two.example. TXT v=spf1 ip4:192.0.2.13 -all
voids.example. TXT v=spf1 ip4:192.0.2.14 a:no1.example a:no2.example a:no3.example ip4:192.0.2.15 -all
partly.example. TXT v=spf1 ip4:192.0.2.16 include:broken.example.org ip4:192.0.2.17 -all
junk.example. TXT v=spf1 ip4 ip4:x ip4:1.2.3.4/33 ip6:1.2.3.4 include include:. a:/ mx//129 a/-1 foo:bar + = ip4:192.0.2.18 exp=x y=%{i}
junk2.example. TXT v=spf1x ip4:192.0.2.1
`

func TestResolve(t *testing.T) {
	_, r := newServer(t, zone)
	for name, want := range map[string]string{
		"dns:mail.example.org":   "192.0.2.1/32\n192.0.2.2/32\n2001:db8::1/128",
		"dns:alias.example.org":  "192.0.2.1/32\n192.0.2.2/32\n2001:db8::1/128",
		"dns:four.example.org":   "192.0.2.4/32",
		"dns:none.example.org":   "error: no address came of it",
		"dns:gone.example.org":   "error: no address came of it",
		"dns:broken.example.org": "error: asking for broken.example.org: \"server misbehaving\"\nerror: asking for broken.example.org: \"server misbehaving\"",
		"spf:example.org": `192.0.2.0/28
192.0.2.25/32
198.51.100.0/24
198.51.100.77/32
203.0.113.64/26
2001:db8::/64
2001:db8:1::/48
note: _spf.example.net: "exists:%{i}.x.example.net": it depends on each connection and is left out: list those addresses
note: _spf.example.net: ptr: it depends on each connection and is left out: list those addresses
note: _spf.example.net: "a:%{d}.example.net": a macro depends on each message and is left out: list those addresses
note: _spf.example.net: +all would allow everybody and is left out`,
		"spf:everybody.example": "note: everybody.example: +all would allow everybody and is left out\nerror: no address came of it",
		"spf:wide.example": `192.0.2.9/32
2001:db8::1/128
note: wide.example: 0.0.0.0/0 is wider than /8 and is left out
note: wide.example: 10.0.0.0/7 is wider than /8 and is left out
note: wide.example: ::/0 is wider than /16 and is left out
note: wide.example: 2000::/3 is wider than /16 and is left out
note: wide.example: ::ffff:0.0.0.0/95 holds all of IPv4 and is left out
note: mail.example.org: 0.0.0.0/0 is wider than /8 and is left out`,
		"spf:halves.example": `11.0.0.0/9
13.0.0.0/10
2001::/17
note: halves.example: with 12.0.0.0/8 it would be more than a /8 in all: left out
note: halves.example: with 2002::/16 it would be more than a /16 in all: left out`,
		"spf:loop.example": "192.0.2.10/32\n192.0.2.11/32\nnote: loop.example is included again: once is enough",
		"spf:two.example":  "error: two.example has 2 SPF records, and must have one",
		"spf:voids.example": `192.0.2.14/32
error: the SPF record breaks a limit of RFC 7208, section 4.6.4: more than 2 names in it do not exist`,
		"spf:partly.example": `192.0.2.16/32
192.0.2.17/32
error: asking for broken.example.org: "server misbehaving"`,
		"spf:junk2.example": "error: junk2.example has no SPF record",
		"spf:gone.example":  "error: gone.example has no SPF record",
	} {
		got := resolve(t, r, name)
		if got != want {
			t.Errorf("%s:\n%s\nwant\n%s", name, got, want)
		}
	}
	if got := resolve(t, r, "spf:junk.example"); !strings.HasPrefix(got, "192.0.2.18/32\nnote: ") || strings.Contains(got, "error") {
		t.Errorf("spf:junk.example:\n%s", got)
	}
}

// A record of a real size comes by TCP; hundreds of prefixes are bounded, and
// so are the terms that ask.
func TestBounds(t *testing.T) {
	var many, deep strings.Builder
	many.WriteString("many.example. TXT v=spf1")
	for i := range 400 {
		fmt.Fprintf(&many, " ip4:10.%d.%d.0/24", i/200, i%200)
	}
	many.WriteString(" -all\n")
	for i := range 20 {
		fmt.Fprintf(&deep, "d%d.example. TXT v=spf1 ip4:192.0.2.%d include:d%d.example -all\n", i, i, i+1)
	}
	s, r := newServer(t, many.String()+deep.String())
	if got := resolve(t, r, "spf:many.example"); strings.Count(got, "/24") != 400 || strings.Contains(got, "error") {
		t.Errorf("%d of 400:\n%s", strings.Count(got, "/24"), got)
	}
	got := resolve(t, r, "spf:d0.example")
	if strings.Count(got, "/32") != 11 || !strings.Contains(got, "error: the SPF record breaks a limit") {
		t.Errorf("a chain of includes:\n%s", got)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.asked["d11.example."] != 0 || s.asked["d10.example."] == 0 {
		t.Errorf("asked: %v", s.asked)
	}
}

func TestNoAnswerInTime(t *testing.T) {
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	a, err := Resolve(ctx, r, "dns:mail.example.org")
	if err == nil || errors.Is(err, ErrNothing) || len(a.Prefixes) > 0 {
		t.Errorf("%v, %v", a, err)
	}
}

// hostile answers whatever a fuzzer says.
type hostile struct {
	text  string
	asked int
}

func (h *hostile) LookupNetIP(context.Context, string, string) ([]netip.Addr, error) {
	h.asked++
	return []netip.Addr{netip.MustParseAddr("::ffff:192.0.2.1"), netip.MustParseAddr("fe80::1%x"), {}}, nil
}

func (h *hostile) LookupTXT(context.Context, string) ([]string, error) {
	h.asked++
	return []string{h.text}, nil
}

func (h *hostile) LookupMX(context.Context, string) ([]*net.MX, error) {
	h.asked++
	return []*net.MX{{Host: h.text}, {Host: "."}, {Host: "mx.example.org."}}, nil
}

// Whatever a record says, it asks little, allows no more than a /8 and a /16,
// and what is said of it is printable.
func FuzzSPF(f *testing.F) {
	for line := range strings.Lines(zone) {
		if _, text, ok := strings.Cut(strings.TrimSpace(line), " TXT "); ok {
			f.Add(text)
		}
	}
	f.Add("v=spf1 a:a.b/0//0 mx/8 ip4:0.0.0.0/8 ip6:::ffff:1.2.3.4/96 +a +all")
	f.Add("v=spf1 include:\x1b[31m redirect=\n")
	f.Fuzz(func(t *testing.T, text string) {
		h := &hostile{text: text}
		a, err := Resolve(t.Context(), h, "spf:example.org")
		if h.asked > 1+maxTerms*(1+2*maxMX) || len(a.Prefixes) > MaxPrefixes || len(a.Notes) > maxNotes+1 {
			t.Fatalf("%d asked, %d prefixes, %d notes", h.asked, len(a.Prefixes), len(a.Notes))
		}
		var sum4, sum6 float64
		for _, p := range a.Prefixes {
			switch {
			case !p.IsValid() || p != p.Masked() || p.Addr().Is4In6() || p.Addr().Zone() != "":
				t.Fatalf("%v is not in its usual form", p)
			case p.Addr().Is4():
				sum4 += 1 / float64(uint64(1)<<p.Bits())
			case p.Bits() < 64:
				sum6 += 1 / float64(uint64(1)<<p.Bits())
			}
		}
		if sum4 > 1./(1<<widest4) || sum6 > 1./(1<<widest6) {
			t.Fatalf("too much is allowed: %v", a.Prefixes)
		}
		said := strings.Join(a.Notes, " ")
		if err != nil {
			said += strings.ReplaceAll(err.Error(), "\n", " ") // of errors.Join
		}
		for _, r := range said {
			if r < ' ' || r > '~' {
				t.Fatalf("%q is not printable", said)
			}
		}
		if len(said) > 8000 {
			t.Fatalf("%d bytes are said", len(said))
		}
	})
}

// What Parse takes is a name in the one form that it has.
func FuzzParse(f *testing.F) {
	for _, s := range []string{"dns:mail.example.org", "SPF:Example.Org.", "dns:a..b", "spf:%{i}.x", "dns:1.2.3.4", "dns:\u212a.org"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := Parse(s)
		if err != nil {
			if len(err.Error()) > 500 || strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Fatalf("%q", err)
			}
			return
		}
		if again, err := Parse(string(n)); err != nil || again != n || n.Kind() != DNS && n.Kind() != SPF || len(n) > 260 {
			t.Fatalf("%q becomes %q, then %q, %v", s, n, again, err)
		}
	})
}
