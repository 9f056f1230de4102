package abuse

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// shapes are the answers of testdata/abuse/rdap and the contacts that they
// must give, best first; a guess has a ? behind it.
var shapes = map[string]struct {
	contacts string
	origin   uint32
	note     string // in the first contact's note
	prefix   string
}{
	"arin-ip-nested-abuse":                 {contacts: "abuse@op1.example", prefix: "198.51.100.0/25"},
	"arin-ip6-two-abuse-unvalidated-poc":   {contacts: "network-abuse@op1.example arin-contact@op1.example", origin: 64500, note: "unvalidated", prefix: "2001:db8::/32"},
	"arin-ip-zero-padded-2015":             {contacts: "arin-contact@op1.example", prefix: "198.51.100.0/24"},
	"arin-autnum":                          {contacts: "abuse@op1.example"},
	"ripe-autnum":                          {contacts: "abuse@op2.example"},
	"ripe-ip-filtered-entities":            {contacts: "abuse@op1.example", prefix: "198.51.100.0/24"},
	"ripe-ip-slash32-addresses-2015":       {contacts: "zzdnsr@op1.example", prefix: "198.51.100.0/24"},
	"apnic-ip-irt-pref":                    {contacts: "helpdesk@op1.example", prefix: "198.51.100.0/24"},
	"apnic-ip-2026-pref1-second":           {contacts: "abuse@op1.example", prefix: "198.51.100.0/24"},
	"apnic-krnic-ip-registry-as-abuse":     {contacts: "abuse@op2.example?", prefix: "198.51.100.0/24"},
	"apnic-jpnic-ip6-no-abuse":             {prefix: "2001:db8::/32"},
	"apnic-jpnic-autnum-empty-entities":    {},
	"lacnic-ip-2015-handle-is-query":       {contacts: "operacion.redes@op1.example", prefix: "198.51.100.0/32"},
	"lacnic-ip-2026":                       {contacts: "ipadmin@op1.example", origin: 64500, prefix: "198.51.100.0/24"},
	"nicbr-ip-2026-no-email-string-length": {origin: 64500, prefix: "198.51.100.0/24"},
	"nicbr-autnum-no-email":                {},
	"afrinic-ip-no-roles-2015":             {prefix: "198.51.100.0/24"},
	"afrinic-autnum-no-abuse-role":         {contacts: "abuse@op1.example?"},
}

// TestR24_Shapes: each recorded answer gives the contact that a person would
// have taken from it.
func TestR24_Shapes(t *testing.T) {
	files, err := filepath.Glob("../testdata/abuse/rdap/*.json")
	if err != nil || len(files) != len(shapes) {
		t.Fatalf("%d files, %d expected: %v", len(files), len(shapes), err)
	}
	for _, f := range files {
		name := strings.TrimSuffix(filepath.Base(f), ".json")
		t.Run(name, func(t *testing.T) {
			want, ok := shapes[name]
			if !ok {
				t.Fatal("no result is expected of it")
			}
			body := must(os.ReadFile(f))
			var got RDAPAnswer
			if strings.Contains(name, "autnum") {
				got, err = ParseRDAPAS(body, 64500)
			} else {
				asked := netip.MustParseAddr("198.51.100.0")
				if strings.Contains(name, "ip6") {
					asked = netip.MustParseAddr("2001:db8::7")
				}
				got, err = ParseRDAP(body, single(asked))
			}
			if err != nil {
				t.Fatal(err)
			}
			var cs []string
			for _, c := range got.Contacts {
				s := c.Address
				if c.Guess {
					s += "?"
				}
				cs = append(cs, s)
			}
			if s := strings.Join(cs, " "); s != want.contacts {
				t.Errorf("contacts %q, want %q", s, want.contacts)
			}
			if len(cs) == 0 && got.Note == "" {
				t.Error("no contact, and it does not say why")
			}
			if want.note != "" && !strings.Contains(got.Contacts[0].Note, want.note) {
				t.Errorf("note %q, want %q in it", got.Contacts[0].Note, want.note)
			}
			if want.origin != 0 && !slices.Equal(got.Origins, []uint32{want.origin}) {
				t.Errorf("origins %v, want %d", got.Origins, want.origin)
			}
			if want.prefix != "" && (len(got.Prefixes) == 0 || got.Prefixes[0] != pfx(want.prefix)) {
				t.Errorf("prefixes %v, want %s first", got.Prefixes, want.prefix)
			}
		})
	}
}

// entity and answer make small answers for the parser's rules.
func entity(roles, emails string) string {
	return `{"roles":[` + roles + `],"vcardArray":["vcard",[` + emails + `]]}`
}

func answer(entities string) []byte {
	return []byte(`{"startAddress":"198.51.100.0","endAddress":"198.51.100.255","entities":[` + entities + `]}`)
}

// answerAS is answer for an AS.
func answerAS(as int, entities string) []byte {
	return fmt.Appendf(nil, `{"objectClassName":"autnum","startAutnum":%d,"endAutnum":%[1]d,"entities":[%s]}`, as, entities)
}

func TestRDAPRules(t *testing.T) {
	asked := netip.MustParseAddr("198.51.100.7")
	email := func(a string) string { return `["email",{},"text","` + a + `"]` }
	deep := func(n int) string {
		s := entity(`"abuse"`, email("abuse@deep.example"))
		for range n {
			s = `{"roles":["registrant"],"entities":[` + s + `]}`
		}
		return s
	}
	for _, c := range []struct {
		name, body, want, fault string
	}{
		{name: "upper case", body: string(answer(entity(`"ABUSE"`, `["EMAIL",{},"text","Abuse@OP1.Example"]`))), want: "Abuse@op1.example"},
		{name: "redacted", body: string(answer(entity(`"abuse"`, email("DATA REDACTED"))))},
		{name: "empty", body: string(answer(entity(`"abuse"`, email(""))))},
		{name: "several addresses in one", body: string(answer(entity(`"abuse"`, email("a@op1.example, b@op1.example"))))},
		{name: "an option", body: string(answer(entity(`"abuse"`, email("-oQ/tmp@op1.example"))))},
		{name: "a list as value", body: string(answer(entity(`"abuse"`, `["email",{},"text",["abuse@op1.example"]]`))), want: "abuse@op1.example"},
		{name: "type in a list", body: string(answer(entity(`"abuse"`, email("x@op1.example")+`,["email",{"type":["work","abuse"]},"text","y@op1.example"]`))), want: "y@op1.example"},
		{name: "pref as number", body: string(answer(entity(`"abuse"`, `["email",{"pref":2},"text","x@op1.example"],["email",{"pref":1},"text","y@op1.example"]`))), want: "y@op1.example"},
		{name: "mailto", body: string(answer(entity(`"abuse"`, `["email",{},"uri","mailto:abuse@op1.example"]`))), want: "abuse@op1.example"},
		{name: "no text record", body: string(answer(entity(`"abuse"`, `["contact-uri",{},"uri","https://op1.example/"]`)))},
		{name: "persons are not written to", body: string(answer(entity(`"administrative","technical"`, email("john@op1.example"))))},
		{name: "in depth", body: string(answer(deep(7))), want: "abuse@deep.example"},
		{name: "too deep", body: string(answer(deep(8)))},
		{name: "odd shapes", body: `{"startAddress":"198.51.100.0","endAddress":"198.51.100.255","entities":[1,null,"x",{"roles":"abuse","vcardArray":{}},{"roles":["abuse"],"vcardArray":["vcard",[1,["email"],["email",1,2,3],["email",{},"text",{}]]]}],"cidr0_cidrs":[7,{"length":{}},{"v4prefix":"198.51.100.0","length":99}]}`},
		{name: "the registry itself", body: string(answer(entity(`"abuse"`, email("abuse@LACNIC.net"))))},
		{name: "whole /8", body: `{"startAddress":"198.0.0.0","endAddress":"198.255.255.255","entities":[` + entity(`"abuse"`, email("abuse@op1.example")) + `]}`},
		{name: "IANA block", body: `{"type":"IANA-BLOCK","startAddress":"198.51.0.0","endAddress":"198.51.255.255","entities":[` + entity(`"abuse"`, email("abuse@op1.example")) + `]}`},
		{name: "another network", body: `{"startAddress":"192.0.2.0","endAddress":"192.0.2.255"}`, fault: "not for 198.51.100.7"},
		{name: "another family", body: `{"startAddress":"2001:db8::","endAddress":"2001:db8::ffff"}`, fault: "not for 198.51.100.7"},
		{name: "the wrong way round", body: `{"startAddress":"198.51.100.255","endAddress":"198.51.100.0"}`, fault: "which range"},
		{name: "no range", body: `{"entities":[]}`, fault: "which range"},
		{name: "web page", body: "\n<!DOCTYPE html><title>Sorry</title>", fault: "web page"},
		{name: "nothing", body: "  ", fault: "empty"},
		{name: "an array", body: "[1]", fault: "not JSON"},
		{name: "error in 200", body: `{"errorCode":429,"title":"slow down"}`, fault: "not looked up yet"},
		{name: "not found in 200", body: `{"errorCode":404}`, fault: "nothing is known"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := ParseRDAP([]byte(c.body), single(asked))
			if c.fault != "" {
				if err == nil || !strings.Contains(err.Error(), c.fault) {
					t.Fatalf("error %v, want %q in it", err, c.fault)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			first := ""
			if len(got.Contacts) > 0 {
				first = got.Contacts[0].Address
			}
			if first != c.want {
				t.Errorf("%q, want %q", first, c.want)
			}
		})
	}
	if _, err := ParseRDAPAS([]byte(`{"startAutnum":64496,"endAutnum":64496}`), 64500); err == nil {
		t.Error("an answer on another AS is taken")
	}
}

func TestRangePrefixes(t *testing.T) {
	for _, c := range []struct{ first, last, want string }{
		{"198.51.100.0", "198.51.100.255", "198.51.100.0/24"},
		{"198.51.100.1", "198.51.100.6", "198.51.100.1/32 198.51.100.2/31 198.51.100.4/31 198.51.100.6/32"},
		{"0.0.0.0", "255.255.255.255", "0.0.0.0/0"},
		{"255.255.255.255", "255.255.255.255", "255.255.255.255/32"},
		{"2001:db8::", "2001:db8:0:2:ffff:ffff:ffff:ffff", "2001:db8::/63 2001:db8:0:2::/64"},
	} {
		var got []string
		for _, p := range rangePrefixes(netip.MustParseAddr(c.first), netip.MustParseAddr(c.last)) {
			got = append(got, p.String())
		}
		if s := strings.Join(got, " "); s != c.want {
			t.Errorf("%s to %s: %s, want %s", c.first, c.last, s, c.want)
		}
	}
}

// FuzzRDAP: whatever a registry answers, contacts are usable addresses and
// the range contains what was asked.
func FuzzRDAP(f *testing.F) {
	files, _ := filepath.Glob("../testdata/abuse/rdap/*.json")
	for _, name := range files {
		f.Add(must(os.ReadFile(name)))
	}
	f.Add([]byte(`{"errorCode":"429"}`))
	asked := netip.MustParseAddr("198.51.100.0")
	f.Fuzz(func(t *testing.T, body []byte) {
		if len(body) > maxBody {
			return
		}
		net := pfx("198.51.100.0/24")
		if got, err := ParseRDAP(body, net); err == nil && !(Contact{}).of(got.First, got.Last).covers([]netip.Prefix{net}) &&
			!slices.ContainsFunc(got.Prefixes, func(p netip.Prefix) bool { return p.Contains(net.Addr()) && p.Bits() <= net.Bits() }) {
			t.Errorf("%s to %s, %s is an answer on %s", got.First, got.Last, got.Prefixes, net)
		}
		for _, ans := range []func() (RDAPAnswer, error){
			func() (RDAPAnswer, error) { return ParseRDAP(body, single(asked)) },
			func() (RDAPAnswer, error) { return ParseRDAPAS(body, 64500) },
		} {
			got, err := ans()
			if err != nil {
				continue
			}
			for _, c := range got.Contacts {
				if a, err := CheckAddress(c.Address); err != nil || a != c.Address || isRegistry(a) {
					t.Errorf("contact %q: %v", c.Address, err)
				}
			}
			if len(got.Contacts) > maxContacts || len(got.Prefixes) > 1000 {
				t.Error("too much is kept")
			}
			if _, err := json.Marshal(got); err != nil {
				t.Error(err)
			}
		}
	})
}

func TestCheckAddress(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"abuse@op1.example", "abuse@op1.example"},
		{" Abuse@OP1.EXAMPLE. ", "Abuse@op1.example"},
		{"abuse+x=y@xn--bcher-kva.example", "abuse+x=y@xn--bcher-kva.example"},
		{"", ""}, {"abuse", ""}, {"abuse@localhost", ""}, {"a@b@c.example", ""}, {"-f@op1.example", ""}, {".a@op1.example", ""},
		{"a..b@op1.example", ""}, {"a b@op1.example", ""}, {"a;id@op1.example", ""}, {"a`id`@op1.example", ""}, {"$(id)@op1.example", ""},
		{"|id@op1.example", ""}, {"/etc/passwd@op1.example", ""}, {":include:@op1.example", ""}, {`"a b"@op1.example`, ""},
		{"a@[192.0.2.1]", ""}, {"a@192.0.2.1", ""}, {"a@op1.example\r\nBcc: x@y.example", ""}, {"a@-op1.example", ""}, {"a@op1..example", ""},
		{"a%b@op1.example", ""}, {"a!b@op1.example", ""}, {"b\xc3\xbccher@op1.example", ""}, {strings.Repeat("a", 65) + "@op1.example", ""},
	} {
		got, err := CheckAddress(c.in)
		if got != c.want || (err == nil) != (c.want != "") {
			t.Errorf("%q: %q, %v; want %q", c.in, got, err, c.want)
		}
	}
}
