package policy

import (
	"fmt"
	"strings"
)

// check finds settings that are right by themselves and wrong together.
func (d *decoder) check(p *Policy) {
	if p.Saturation.PressureFrom >= p.Saturation.SaturatedAt {
		d.contradiction(faultf("pressure counts from the lower share to the higher one",
			"saturation.pressure_from (%s) is not below saturation.saturated_at (%s)",
			formatNumber(p.Saturation.PressureFrom), formatNumber(p.Saturation.SaturatedAt)),
			"saturation.pressure_from", "saturation.saturated_at")
	}
	if last := p.Block.For[len(p.Block.For)-1]; p.Block.Forget < last {
		d.contradiction(faultf("forget is the time for good behaviour after a block",
			"block.forget (%s) is shorter than the longest block (%s)", FormatDuration(p.Block.Forget), FormatDuration(last)),
			"block.forget", "block.for")
	}
	if p.Mode == Enforce && p.Firewall.Backend == BackendMemory {
		d.contradiction(faultf("want backend: auto, or mode: observe",
			"mode enforce with the memory backend would block nobody"), "firewall.backend", "mode")
	}
	if p.Store.Path == p.Control.Socket {
		d.contradiction(faultf("", "store.path and control.socket are the same file"), "store.path", "control.socket")
	}
	d.checkWatch(p)
	for i, r := range p.Rules {
		at := fmt.Sprintf("rules[%d].prefixes", i)
		for _, l := range r.Prefixes4 {
			d.tooWide(r.Name, l, p.Block.MaxPrefix4, at, "ipv4")
		}
		for _, l := range r.Prefixes6 {
			d.tooWide(r.Name, l, p.Block.MaxPrefix6, at, "ipv6")
		}
	}
}

func (d *decoder) tooWide(rule string, length, limit int, at, family string) {
	if length >= limit || d.bad["rules"] {
		return
	}
	setting := "block.max_prefix." + family
	d.contradiction(faultf(fmt.Sprintf("raise the rule's length, or widen %s", setting),
		"rule %s looks at %s /%d, which %s (/%d) does not let be blocked", rule, strings.Replace(family, "ip", "IP", 1), length, setting, limit),
		at, setting)
}
