package abuse

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// rdapOf is an answer on a range with one abuse contact.
func rdapOf(first, last, mail string) string {
	return fmt.Sprintf(`{"objectClassName":"ip network","startAddress":"%s","endAddress":"%s","entities":[%s]}`, first, last, entity(`"abuse"`, `["email",{},"text","`+mail+`"]`))
}

// TestContactOfAPart: three customers of one /24 flood. Whoever is the contact
// of one of them gets no report on the others, wherever we know him from.
func TestContactOfAPart(t *testing.T) {
	const customer = "abuse@small-customer.example"
	for _, k := range []struct {
		name      string
		overrides string
		answers   map[string]string
		txt       string
		blocks    string
		to, cc    string
		shown     bool // among the others
	}{
		{name: "an override of the part", overrides: "198.51.100.16/28 " + customer, to: "abuse@op2.example", shown: true},
		{name: "an override of the part, which alone floods", overrides: "198.51.100.16/28 " + customer, blocks: "198.51.100.17/32", to: customer},
		{name: "an override of all", overrides: "198.51.100.0/24 " + customer, to: customer},
		{name: "an override of all, of which the AS announces a part", overrides: "198.51.100.0/24 " + customer, answers: map[string]string{"net": "198.51.100.0/25"}, blocks: "198.51.100.0/24", to: customer},
		{name: "an override of the AS", overrides: "AS64500 " + customer, to: customer},
		{name: "RDAP on the whole", answers: map[string]string{
			"/rdap/ip/198.51.100.17":   rdapOf("198.51.100.16", "198.51.100.31", customer),
			"/rdap/ip/198.51.100.0/24": rdapOf("198.51.100.0", "198.51.100.255", "abuse@holder.example")}, to: "abuse@op2.example", cc: "abuse@holder.example"},
		{name: "RDAP on a part, which alone floods", answers: map[string]string{
			"/rdap/ip/198.51.100.17": rdapOf("198.51.100.16", "198.51.100.31", customer)}, blocks: "198.51.100.17/32", to: "abuse@op2.example", cc: customer},
		{name: "RDAP answers with a part all the same", answers: map[string]string{
			"/rdap/ip/198.51.100.0/24": rdapOf("198.51.100.16", "198.51.100.31", customer)}, to: "abuse@op2.example"},
		{name: "RDAP on a range that is no prefix", answers: map[string]string{
			"/rdap/ip/198.51.100.0/24": rdapOf("198.51.99.0", "198.51.101.255", "abuse@holder.example")}, to: "abuse@op2.example", cc: "abuse@holder.example"},
		{name: "RIPEstat is asked about all", answers: map[string]string{
			"/stat/abuse-contact-finder/data.json?198.51.100.17":   `{"data":{"abuse_contacts":["` + customer + `"]}}`,
			"/stat/abuse-contact-finder/data.json?198.51.100.0/24": `{"data":{"abuse_contacts":["abuse@holder.example"]}}`}, to: "abuse@op2.example", cc: "abuse@holder.example"},
		{name: "Abusix knows an address", txt: customer, to: "abuse@op2.example", shown: true},
		{name: "Abusix knows the address, which alone floods", txt: customer, blocks: "198.51.100.17/32", to: "abuse@op2.example", cc: customer},
		{name: "nobody knows the AS's, and RDAP the part", answers: map[string]string{"/rdap/autnum/64500": "!404",
			"/rdap/ip/198.51.100.0/24": rdapOf("198.51.100.16", "198.51.100.31", customer)}},
		{name: "the AS announces a part", answers: map[string]string{"net": "198.51.100.0/25"}, blocks: "198.51.100.0/24"},
	} {
		t.Run(k.name, func(t *testing.T) {
			w := newWorld(t)
			w.plain()
			w.unset("/rdap/ip/198.51.100.7")
			for p, ans := range k.answers {
				w.set(p, ans)
			}
			network := "198.51.100.0/24"
			if n := k.answers["net"]; n != "" {
				network = n
			}
			for _, a := range []string{"0", "17", "130", "200"} {
				w.set("/stat/network-info/data.json?198.51.100."+a, `{"data":{"asns":["64500"],"prefix":"`+network+`"}}`)
				if k.txt != "" {
					w.setTXT(a+".100.51.198.abusix.test", k.txt)
				}
			}
			c := testConfig(t)
			w.online(&c)
			if k.overrides != "" {
				c.Overrides = filepath.Join(t.TempDir(), "overrides")
				must(0, os.WriteFile(c.Overrides, []byte(k.overrides+"\n"), 0o600))
			}
			b := newBench(t, c, Options{})
			w.connect(b.lookups)
			if k.blocks == "" {
				k.blocks = "198.51.100.17/32 198.51.100.200/32 198.51.100.130/32"
			}
			for i, p := range strings.Fields(k.blocks) {
				b.Take(blockOf(uint64(i+1), p, testStart, 300-i, 0))
			}
			d, _ := b.drafted()
			m := d.Mails[0]
			if m.To.Address != k.to || m.Cc.Address != k.cc {
				t.Errorf("to %q, cc %q; want %q, %q", m.To.Address, m.Cc.Address, k.to, k.cc)
			}
			if k.to == "" && d.Why != "contact missing" {
				t.Errorf("why %q, warnings %q", d.Why, m.Warnings)
			}
			i := slices.IndexFunc(m.Others, func(o Contact) bool { return o.Address == customer })
			if k.shown && (i < 0 || !strings.Contains(m.Others[i].Note, "of a part only")) {
				t.Errorf("the customer's is not shown: %+v", m.Others)
			}
		})
	}
}

// TestPartIsRememberedApart: what is remembered of a part is no answer on the
// whole, nor the other way round; each is asked for once.
func TestPartIsRememberedApart(t *testing.T) {
	w := newWorld(t)
	w.plain()
	w.set("/rdap/ip/198.51.100.7", rdapOf("198.51.100.0", "198.51.100.15", "abuse@small-customer.example"))
	w.set("/rdap/ip/198.51.100.0/24", rdapOf("198.51.100.0", "198.51.100.255", "abuse@holder.example"))
	l, _ := newLookupsIn(t, w, nil)
	for range 3 {
		for _, k := range []struct{ net, cc string }{{"198.51.100.7/32", "abuse@small-customer.example"}, {"198.51.100.0/24", "abuse@holder.example"}} {
			var f finding
			l.findOrigin(t.Context(), asked7, &f)
			l.findContacts(t.Context(), []netip.Prefix{pfx(k.net)}, nil, &f)
			if f.cc.Address != k.cc {
				t.Errorf("%s: cc %+v, want %s", k.net, f.cc, k.cc)
			}
		}
	}
	if n := w.count("/rdap/ip/"); n != 2 {
		t.Errorf("asked %d times", n)
	}
}

// TestGrownBeyondContact: a draft whose case grows has recipients of what it
// tells then, not of what it told first.
func TestGrownBeyondContact(t *testing.T) {
	w := newWorld(t)
	w.plain()
	w.set("/rdap/autnum/64500", "!404")
	for _, a := range []string{"17", "200"} {
		w.set("/stat/network-info/data.json?198.51.100."+a, `{"data":{"asns":["64500"],"prefix":"198.51.100.0/24"}}`)
	}
	w.set("/rdap/ip/198.51.100.17", rdapOf("198.51.100.16", "198.51.100.31", "abuse@small-customer.example"))
	w.set("/rdap/ip/198.51.100.0/24", rdapOf("198.51.100.0", "198.51.100.255", "abuse@holder.example"))
	for _, spent := range []bool{false, true} {
		c := testConfig(t)
		w.online(&c)
		b := newBench(t, c, Options{})
		w.connect(b.lookups)
		b.Take(blockOf(1, "198.51.100.17/32", testStart, 300, 0))
		if d, _ := b.drafted(); d.Mails[0].To.Address != "abuse@small-customer.example" {
			t.Fatalf("to %+v", d.Mails[0].To)
		}
		b.Take(blockOf(2, "198.51.100.200/32", b.time(), 900, 0))
		want := "abuse@holder.example"
		if spent {
			b.spend()
			want = "" // rather to nobody
		}
		b.pass(2 * time.Hour)
		if d, _ := b.drafted(); d.Mails[0].To.Address != want || d.Mails[0].Facts.Connections != 1200 {
			t.Errorf("lookups spent: %v: to %q of %d connections, want %q", spent, d.Mails[0].To.Address, d.Mails[0].Facts.Connections, want)
		}
	}
}

// spend uses up the lookups of the day.
func (b *bench) spend() {
	b.Desk.mu.Lock()
	defer b.Desk.mu.Unlock()
	for len(b.asked) < b.config.Caps.Drafts*perDraft {
		b.asked = append(b.asked, b.now().Add(23*time.Hour))
	}
}

func TestCovers(t *testing.T) {
	of := func(s string) Contact {
		if first, last, ok := strings.Cut(s, "-"); ok {
			return Contact{}.of(netip.MustParseAddr(first), netip.MustParseAddr(last))
		}
		return Contact{}.ofNet(pfx(s))
	}
	for _, k := range []struct {
		contact, reported string
		want              bool
	}{
		{"198.51.100.0/24", "198.51.100.0/24", true},
		{"198.51.100.0/24", "198.51.100.7/32 198.51.100.255/32", true},
		{"198.51.100.0/24", "198.51.100.7/32 198.51.101.0/32", false},
		{"198.51.100.0/25", "198.51.100.0/24", false},
		{"198.51.99.0-198.51.101.9", "198.51.100.0/24 198.51.101.9/32", true},
		{"198.51.99.0-198.51.101.9", "198.51.101.8/31 198.51.101.10/32", false},
		{"2001:db8::/32", "2001:db8:ffff::/48", true},
		{"2001:db8::/32", "2001:db9::/48", false},
		{"0.0.0.0/0", "2001:db8::/48", false},
		{"::/0", "198.51.100.0/24", false},
	} {
		var ps []netip.Prefix
		for s := range strings.FieldsSeq(k.reported) {
			ps = append(ps, pfx(s))
		}
		if got := of(k.contact).covers(ps); got != k.want {
			t.Errorf("%s covers %s: %v", k.contact, k.reported, got)
		}
	}
	if (Contact{}).covers([]netip.Prefix{pfx("198.51.100.7/32")}) || (Contact{}).ofNet(netip.Prefix{}).covers([]netip.Prefix{pfx("198.51.100.7/32")}) {
		t.Error("a contact of nothing covers something")
	}
}

// TestDecide: AS and prefix are of one claim.
func TestDecide(t *testing.T) {
	claim := func(as uint32, p string, announced bool) Claim {
		c := Claim{Origins: []uint32{as}, Announced: announced}
		if p != "" {
			c.Prefix = pfx(p)
		}
		return c
	}
	for _, k := range []struct {
		name   string
		claims []Claim
		want   string
	}{
		{"a database's range before none", []Claim{claim(64501, "", false), claim(64500, "198.51.100.0/24", false)}, "AS64500 198.51.100.0/24 disputed"},
		{"BGP before a database", []Claim{claim(64501, "198.51.100.0/25", false), claim(64500, "198.51.100.0/24", true)}, "AS64500 198.51.100.0/24 disputed"},
		{"the most trusted of two", []Claim{claim(64501, "198.51.0.0/16", true), claim(64500, "198.51.100.0/24", true)}, "AS64501 198.51.0.0/16 disputed"},
		{"one without a prefix", []Claim{claim(64501, "", false)}, "AS64501 invalid Prefix"},
		{"they agree", []Claim{claim(64500, "", false), claim(64500, "198.51.100.0/24", true)}, "AS64500 198.51.100.0/24"},
		{"nobody", nil, "AS0 invalid Prefix"},
		{"a claim without an AS", []Claim{{Prefix: pfx("198.51.100.0/24")}}, "AS0 invalid Prefix"},
	} {
		o := Origin{Claims: k.claims}
		o.decide()
		got := fmt.Sprintf("AS%d %s", o.AS, o.Prefix)
		if o.Disputed {
			got += " disputed"
		}
		if got != k.want {
			t.Errorf("%s: %s, want %s", k.name, got, k.want)
		}
	}
}

// TestRDAPIsAboutWhatWasAsked: an answer on something else is none.
func TestRDAPIsAboutWhatWasAsked(t *testing.T) {
	const e = `"entities":[{"roles":["abuse"],"vcardArray":["vcard",[["email",{},"text","abuse@other.example"]]]}]`
	for body, fault := range map[string]string{
		`{"objectClassName":"autnum","startAutnum":64500,"endAutnum":64500,` + e + `}`:    "",
		`{"objectClassName":"autnum","handle":"AS64500",` + e + `}`:                       "",
		`{"startAutnum":"64500",` + e + `}`:                                               "",
		`{"handle":"AS64999","startAutnum":64999,` + e + `}`:                              "not for AS64500",
		`{"handle":"AS64500","startAutnum":64999,"endAutnum":64999,` + e + `}`:            "not for AS64500",
		`{"handle":"AS64999",` + e + `}`:                                                  "not for AS64500",
		`{"startAutnum":64501,"endAutnum":64499,` + e + `}`:                               "not for AS64500",
		`{"objectClassName":"domain","ldhName":"x.example","handle":"AS64500",` + e + `}`: "about a",
		`{"objectClassName":"ip network","startAutnum":64500,` + e + `}`:                  "about a",
		`{` + e + `}`:                    "for which AS",
		`{"handle":"EXAMPLE",` + e + `}`: "for which AS",
	} {
		a, err := ParseRDAPAS([]byte(body), 64500)
		if fault == "" && (err != nil || len(a.Contacts) != 1) || fault != "" && (err == nil || !strings.Contains(err.Error(), fault) || len(a.Contacts) != 0) {
			t.Errorf("%s: %+v, %v; want %q", body, a.Contacts, err, fault)
		}
	}
	for body, fault := range map[string]string{
		`{"objectClassName":"ip network","startAddress":"198.51.0.0","endAddress":"198.51.255.255",` + e + `}`:                              "",
		`{"cidr0_cidrs":[{"v4prefix":"198.51.100.0","length":24}],` + e + `}`:                                                               "",
		`{"startAddress":"198.51.100.0","endAddress":"198.51.100.127",` + e + `}`:                                                           "not for 198.51.100.0/24",
		`{"cidr0_cidrs":[{"v4prefix":"198.51.100.0","length":25}],` + e + `}`:                                                               "which range",
		`{"objectClassName":"domain","startAddress":"198.51.0.0","endAddress":"198.51.255.255",` + e + `}`:                                  "about a",
		`{"objectClassName":"entity",` + e + `}`:                                                                                            "about a",
		`{"startAddress":"198.51.100.128","endAddress":"198.51.100.255","cidr0_cidrs":[{"v4prefix":"198.51.100.0","length":24}],` + e + `}`: "not for 198.51.100.0/24",
		`{"objectClassName":7,"startAddress":"198.51.0.0","endAddress":"198.51.255.255",` + e + `}`:                                         "about a",
	} {
		a, err := ParseRDAP([]byte(body), pfx("198.51.100.0/24"))
		if fault == "" && (err != nil || len(a.Contacts) != 1) || fault != "" && (err == nil || !strings.Contains(err.Error(), fault) || len(a.Contacts) != 0) {
			t.Errorf("%s: %+v, %v; want %q", body, a.Contacts, err, fault)
		}
	}
	// What the answer lists beyond its own range is not believed.
	a, err := ParseRDAP([]byte(`{"startAddress":"198.51.100.0","endAddress":"198.51.100.255","cidr0_cidrs":[{"v4prefix":"198.51.0.0","length":16}]}`), pfx("198.51.100.7/32"))
	if err != nil || !slices.Equal(a.Prefixes, []netip.Prefix{pfx("198.51.100.0/24")}) {
		t.Errorf("%v, %v", a.Prefixes, err)
	}
}
