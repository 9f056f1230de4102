package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard"
)

// shipped parses policy.yaml.
func shipped(t *testing.T) *Policy {
	t.Helper()
	p, err := Parse("policy.yaml", []byte(smtpguard.PolicyYAML))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sameFields compares field by field, so that a failure names the setting.
func sameFields(t *testing.T, got, want *Policy) {
	t.Helper()
	g, w := reflect.ValueOf(*got), reflect.ValueOf(*want)
	for i := range g.NumField() {
		if !reflect.DeepEqual(g.Field(i).Interface(), w.Field(i).Interface()) {
			t.Errorf("%s: %+v, want %+v", g.Type().Field(i).Name, g.Field(i), w.Field(i))
		}
	}
}

func TestShippedPolicyIsTheDefault(t *testing.T) {
	sameFields(t, shipped(t), Default())
}

func TestShippedPolicyHasEverySetting(t *testing.T) {
	// Parsing it already says that it has no others.
	d := &decoder{file: "policy.yaml", nodes: map[string]*yaml.Node{}, bad: map[string]bool{}}
	p := Default()
	schema(p).read(d, "", d.tree([]byte(smtpguard.PolicyYAML)))
	all := keys(schema(p), "")
	if len(all) < 30 {
		t.Fatalf("the schema has only %d settings: %v", len(all), all)
	}
	for _, key := range all {
		found := d.nodes[key] != nil
		if rest, ok := strings.CutPrefix(key, "rules."); ok {
			for i := range p.Rules {
				found = found || d.nodes[fmt.Sprintf("rules[%d].%s", i, rest)] != nil
			}
		}
		if !found {
			t.Errorf("policy.yaml does not state %s", key)
		}
	}
}

func TestShippedPolicyIsReadable(t *testing.T) {
	for i, line := range strings.Split(smtpguard.PolicyYAML, "\n") {
		if n := len([]rune(line)); n > 120 {
			t.Errorf("policy.yaml:%d has %d characters", i+1, n)
		}
	}
}

func TestEmptyFileIsTheDefault(t *testing.T) {
	for _, text := range []string{"", "\n", "# only a comment\n", "---\n", "\ufeff", "---\n...\n", "{}\n"} {
		p, err := Parse("policy.yaml", []byte(text))
		if err != nil {
			t.Errorf("%q: %v", text, err)
			continue
		}
		sameFields(t, p, Default())
	}
}

// another is a policy that has no setting at its default.
const another = `
mode: enforce
commit: 5m
logs: [/var/log/one, auto, "/var/log/with space: and # more"]
zone: Europe/Berlin
capacity: 250
confirm: off
ports: [2525]
saturation: {pressure_from: 0.01, saturated_at: 0.975}
rules:
  - name: "123"
    metric: opens
    window: 1h30m
    threshold: 12345678
    prefixes: {ipv4: [/32, /17], ipv6: [/128, /32, /24]}
    min_sources: 3
  - {name: off, metric: saturation, window: 1s, threshold: 1, prefixes: {ipv6: [/64]}}
  - {name: "null", metric: saturation, window: 2s, threshold: 0.001, prefixes: {ipv4: [/24], ipv6: []}}
block:
  for: [1s, 1m30s, 2w]
  forget: 52w
  max_prefix: {ipv4: /17, ipv6: /24}
  max_blocks: 5
  max_new_per_minute: 7
  max_good_share: 0.25
  overlap: refuse
  ports: all
known_good: {factor: 1.5, max_age: 1h, max: 1}
memory: 1GiB
allow:
  - dns:mail.example.org # a name
  - 192.0.2.7        # monitoring: "the old one"
  - 198.51.100.0/24
  - 2001:db8::/32  # office
firewall: {backend: iptables, hook: input, on_stop: remove, csf: ignore}
store: {path: /srv/state}
control: {socket: /srv/socket, group: "007"}
reports:
  mode: auto
  from: "Desk <abuse@example.net>"
  org: Example
  phone: "1"
  host: mx.example.net
  return_path: "abuse+{token}@example.net"
  copy_network: no
  format: x-arf-0.2
  overrides: /srv/contacts
  asn_database: /srv/asn.mmdb
  dir: /srv/reports
  lookup: {online: no, sources: [rdap], each: 1s, total: 2s, ipinfo_token_file: /srv/token, dns: "127.0.0.1:53"}
  threshold: {connections: 7, held: 8, settle: 9s}
  caps: {recipient: 1h, hour: 1, day: 2, drafts: 3}
  auto: {connections: 4, blocks: 5}
  delivery: {by: smtp, program: /srv/sendmail, server: "mail.example.net:587", user: u, password_file: /srv/pw, timeout: 3s}
  quiet: 1h
  follow_up: 2h
  max_follow_ups: 0
  baseline: 0s
  withdrawn: 2h
  keep: 1d
  redirect: me@example.net
metrics: {listen: "unix:/srv/metrics", group: "monitor"}
hooks:
  - {name: "off", on: [block, report], mail: me@example.net, from: smtpguard@example.net, every: 1d, timeout: 1s}
  - on: [saturated]
    url: "https://example.net/hook?a=b"
    header_file: /srv/header
    secret_file: /srv/secret
  - {on: [fault], command: [/srv/tell, "", "a b", "null"]}
  - {on: [relieved], mail: root}
`

func TestRoundTrip(t *testing.T) {
	for name, text := range map[string]string{"empty": "", "shipped": smtpguard.PolicyYAML, "another": another} {
		t.Run(name, func(t *testing.T) {
			p, err := Parse("policy.yaml", []byte(text))
			if err != nil {
				t.Fatal(err)
			}
			var shown bytes.Buffer
			if err := p.WriteYAML(&shown); err != nil {
				t.Fatal(err)
			}
			asJSON, err := json.Marshal(p)
			if err != nil {
				t.Fatal(err)
			}
			for form, data := range map[string][]byte{"YAML": shown.Bytes(), "JSON": asJSON} {
				again, err := Parse("policy.yaml", data)
				if err != nil {
					t.Fatalf("%s: %v\n%s", form, err, data)
				}
				want := *p
				want.Allow = slices.Clone(p.Allow)
				want.AllowNames = slices.Clone(p.AllowNames)
				for i := range want.AllowNames {
					want.AllowNames[i].Why = again.AllowNames[i].Why
					if form == "JSON" {
						want.AllowNames[i].Note = ""
					}
				}
				for i := range want.Allow { // the place is another one
					want.Allow[i].Why = again.Allow[i].Why
					if form == "JSON" {
						want.Allow[i].Note = ""
					}
				}
				sameFields(t, again, &want)
				if t.Failed() {
					t.Fatalf("%s:\n%s", form, data)
				}
			}
			t.Logf("%s", shown.Bytes())
			t.Logf("%s", asJSON)
		})
	}
}

// Every setting of another differs from the default, so that the round trip
// cannot pass by forgetting one.
func TestAnotherDiffers(t *testing.T) {
	p, err := Parse("policy.yaml", []byte(another))
	if err != nil {
		t.Fatal(err)
	}
	a, b := map[string]string{}, map[string]string{}
	flatten(a, "", schema(p).node())
	flatten(b, "", schema(Default()).node())
	for key, v := range b {
		if a[key] == v {
			t.Errorf("%s is %s in both", key, v)
		}
	}
}

func flatten(m map[string]string, path string, n *yaml.Node) {
	if n.Kind != yaml.MappingNode {
		var b bytes.Buffer
		_ = writeJSON(&b, n)
		m[path] = b.String()
		return
	}
	for i := 0; i < len(n.Content); i += 2 {
		flatten(m, join(path, n.Content[i].Value), n.Content[i+1])
	}
}
