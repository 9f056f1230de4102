package policy

import (
	"fmt"
	"slices"

	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard/detector"
)

// prefixes are the prefix lengths of a rule, in one of two forms:
//
//	[/32, /24, /128, /64]              up to /32 is IPv4, above is IPv6
//	{ipv4: [/32, /24], ipv6: [/32]}    any length of either family
type prefixes struct{ r *detector.Rule }

const (
	prefixesWant   = "prefix lengths, as in [/24, /64] or {ipv4: [/24], ipv6: [/48, /32]}"
	maxLengths     = 16 // of one family in one rule: each costs the detector memory for every address
	shortFormLimit = 32
)

func (c prefixes) read(d *decoder, path string, n *yaml.Node) {
	if n.Kind == yaml.MappingNode {
		var four, six []int
		before := d.faults
		lengths(&four, &six).read(d, path, n)
		if d.faults > before {
			d.bad[path] = true
			return
		}
		if len(four)+len(six) == 0 {
			d.fail(path, n, faultf("want "+prefixesWant, "%s is empty", path))
			return
		}
		c.r.Prefixes4, c.r.Prefixes6 = slices.Concat(four), slices.Concat(six) // nil where empty, as in the short form
		return
	}
	var both []int
	before := d.faults
	list[int]{p: &both, what: prefixesWant, least: 1, most: 2 * maxLengths,
		elem: func(p *int) codec { return lengthPrefix(p, 1, 128) }, check: noneTwiceLength}.read(d, path, n)
	if d.faults > before {
		return
	}
	for _, l := range both {
		if l <= shortFormLimit {
			c.r.Prefixes4 = append(c.r.Prefixes4, l)
		} else {
			c.r.Prefixes6 = append(c.r.Prefixes6, l)
		}
	}
}

func noneTwiceLength(values []int) *fault {
	for i, v := range values {
		if slices.Contains(values[:i], v) {
			hint := "remove one of them"
			if v <= shortFormLimit {
				hint = fmt.Sprintf("for IPv6 /%d write {ipv4: [/%d], ipv6: [/%d]}", v, v, v)
			}
			return faultf(hint, "/%d is in the list twice", v)
		}
	}
	return nil
}

func lengths(four, six *[]int) mapping {
	family := func(p *[]int, hi int) codec {
		return flow{list[int]{p: p, what: fmt.Sprintf("a list of prefix lengths, as in [/%d]", hi), most: maxLengths,
			elem: func(p *int) codec { return lengthPrefix(p, 1, hi) }, check: noneTwice[int]}}
	}
	return mapping{{name: "ipv4", codec: family(four, 32)}, {name: "ipv6", codec: family(six, 128)}}
}

func (c prefixes) node() *yaml.Node {
	four, six := c.r.Prefixes4, c.r.Prefixes6
	if slices.ContainsFunc(six, func(l int) bool { return l <= shortFormLimit }) {
		return flow{lengths(&four, &six)}.node()
	}
	both := slices.Concat(four, six)
	return flow{list[int]{p: &both, elem: func(p *int) codec { return lengthPrefix(p, 1, 128) }}}.node()
}
