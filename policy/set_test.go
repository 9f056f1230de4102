package policy

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestSet(t *testing.T) {
	p := Default()
	for _, s := range [][]string{
		{"mode", "enforce"}, {"firewall.backend", "memory"}, {"capacity", "50"}, {"confirm", "off"},
		{"logs", "/tmp/a: b # c", "auto"}, {"store.path", "/tmp/x"}, {"control.group", ""},
		{"block.max_prefix.ipv4", "/20"}, {"block.for", "1m", "2m"}, {"allow", "192.0.2.0/24"}, {"rules"},
	} {
		if err := p.Set(s[0], s[1:]...); err != nil {
			t.Error(err)
		}
	}
	want := Default()
	want.Mode, want.Firewall.Backend, want.Capacity, want.Confirm = Enforce, BackendMemory, 50, ConfirmOff
	want.Logs, want.Store.Path = []string{"/tmp/a: b # c", "auto"}, "/tmp/x"
	want.Block.MaxPrefix4, want.Block.For = 20, []time.Duration{time.Minute, 2 * time.Minute}
	want.Allow = []AllowEntry{{Prefix: netip.MustParsePrefix("192.0.2.0/24"), Why: "command line"}}
	want.Rules = want.Rules[:0]
	sameFields(t, p, want)

	before := *p
	for _, c := range [][]string{
		{"mode: unknown value", "mode", "enforced"},
		{"capacity: -1 is out of range", "capacity", "-1"},
		{"no setting is called", "smurf", "1"},
		{"no setting is called", "mode.x", "1"},
		{"no setting is called", "", "1"},
		{"wants one value", "mode"},
		{"wants one value", "mode", "observe", "enforce"},
		{"wants one value", "block", "1"},
		{"logs is empty", "logs"},
		{"logs[1]: ", "logs", "auto", "relative"},
		{"rules[0] is the single value", "rules", "hog"},
	} {
		err := p.Set(c[1], c[2:]...)
		if err == nil || !strings.Contains(err.Error(), c[0]) || strings.Contains(err.Error(), "0:0") {
			t.Errorf("Set(%q): %v, want %q", c[1:], err, c[0])
		}
	}
	sameFields(t, p, &before)
}

// TestBackends: every packet filter that firewall.Open knows can be asked for.
func TestBackends(t *testing.T) {
	for _, b := range []Backend{BackendAuto, BackendNftables, BackendIptables, BackendCSF, BackendMemory} {
		p, err := Parse("policy.yaml", []byte("firewall: {backend: "+string(b)+"}\n"))
		if err != nil || p.Firewall.Backend != b {
			t.Errorf("%s: %v", b, err)
		}
	}
}

func TestAccessors(t *testing.T) {
	p := Default()
	if p.Location() != nil {
		t.Error("zone auto has a location")
	}
	p.Zone = "Europe/Berlin"
	if loc := p.Location(); loc == nil || loc.String() != "Europe/Berlin" {
		t.Errorf("Location: %v", loc)
	}
	if got := p.BlockedPorts(); !slices.Equal(got, []uint16{25, 465, 587}) {
		t.Errorf("BlockedPorts: %v", got)
	}
	p.Block.Ports = BlockAll
	if got := p.BlockedPorts(); len(got) != 0 {
		t.Errorf("BlockedPorts: %v", got)
	}
	for offence, want := range map[int]time.Duration{-1: 10 * time.Minute, 0: 10 * time.Minute, 1: 10 * time.Minute, 2: time.Hour,
		4: week, 5: week, 1 << 40: week} {
		if got := p.Block.Duration(offence); got != want {
			t.Errorf("Duration(%d) = %v, want %v", offence, got, want)
		}
	}
	for prefix, want := range map[string]bool{"10.0.0.0/15": true, "10.0.0.0/16": false, "2001::/31": true, "2001::/32": false,
		"::ffff:10.0.0.0/111": true, "::ffff:10.0.0.0/112": false, "::/0": true} {
		if got := p.Block.TooWide(netip.MustParsePrefix(prefix)); got != want {
			t.Errorf("TooWide(%s) = %v", prefix, got)
		}
	}
}
