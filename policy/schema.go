package policy

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard/detector"
)

// schema binds every setting to its place in p. Reading, `policy show` and
// JSON all come from it, so they cannot disagree. The order is the order of
// the shipped policy.yaml.
func schema(p *Policy) mapping {
	return mapping{
		{name: "mode", codec: word(&p.Mode, Observe, Enforce)},
		{name: "commit", codec: span(&p.Commit, 0, 24*time.Hour)},
		{name: "logs", codec: flow{list[string]{p: &p.Logs, what: "a list of files, as in [/var/log/exim_mainlog], or [auto]",
			least: 1, most: 16, elem: logFile, check: noneTwice[string]}}},
		{name: "zone", codec: text(&p.Zone, "auto, UTC or a zone name such as Europe/Berlin", checkZone)},
		{name: "capacity", codec: wholeOrAuto(&p.Capacity, 1_000_000)},
		{name: "confirm", codec: word(&p.Confirm, ConfirmSockets, ConfirmOff)},
		{name: "ports", codec: flow{list[uint16]{p: &p.Ports, what: "a list of TCP ports, as in [25, 465, 587]",
			least: 1, most: 16, elem: func(p *uint16) codec { return whole(p, 1, 65535) }, check: noneTwice[uint16]}}},
		{name: "saturation", codec: mapping{
			{name: "pressure_from", codec: number(&p.Saturation.PressureFrom, 0.01, 1)},
			{name: "saturated_at", codec: number(&p.Saturation.SaturatedAt, 0.01, 1)},
		}},
		{name: "rules", codec: rules(&p.Rules)},
		{name: "block", codec: mapping{
			{name: "for", codec: flow{list[time.Duration]{p: &p.Block.For, what: "a list of durations, as in [10m, 1h, 24h]",
				least: 1, most: 20, elem: func(p *time.Duration) codec { return span(p, time.Second, 365*day) }, check: checkLadder}}},
			{name: "forget", codec: span(&p.Block.Forget, time.Second, 3650*day)},
			{name: "max_prefix", codec: flow{mapping{
				{name: "ipv4", codec: lengthPrefix(&p.Block.MaxPrefix4, 8, 32)},
				{name: "ipv6", codec: lengthPrefix(&p.Block.MaxPrefix6, 16, 128)},
			}}},
			{name: "max_blocks", codec: whole(&p.Block.MaxBlocks, 1, 1_000_000)},
			{name: "max_new_per_minute", codec: whole(&p.Block.MaxNewPerMinute, 1, 1_000_000)},
			{name: "max_good_share", codec: number(&p.Block.MaxGoodShare, 0, 1)},
			{name: "overlap", codec: word(&p.Block.Overlap, OverlapSplit, OverlapRefuse)},
			{name: "ports", codec: word(&p.Block.Ports, BlockSMTP, BlockAll)},
		}},
		{name: "known_good", codec: mapping{
			{name: "factor", codec: number(&p.KnownGood.Factor, 1, 1000)},
			{name: "max_age", codec: span(&p.KnownGood.MaxAge, time.Minute, 3650*day)},
			{name: "max", codec: whole(&p.KnownGood.Max, 1, 10_000_000)},
		}},
		{name: "memory", codec: size(&p.Memory, 4<<20, 64<<30)},
		{name: "allow", codec: allowCodec{p}},
		{name: "firewall", codec: mapping{
			{name: "backend", codec: word(&p.Firewall.Backend, BackendAuto, BackendNftables, BackendIptables, BackendCSF, BackendMemory)},
			{name: "hook", codec: word(&p.Firewall.Hook, HookPrerouting, HookInput)},
			{name: "on_stop", codec: word(&p.Firewall.OnStop, Keep, Remove)},
			{name: "csf", codec: word(&p.Firewall.CSF, CSFCooperate, CSFIgnore)},
		}},
		{name: "store", codec: mapping{
			{name: "path", codec: text(&p.Store.Path, "the path of a file", checkPath)},
		}},
		{name: "control", codec: mapping{
			{name: "socket", codec: text(&p.Control.Socket, "the path of a socket", checkSocket)},
			{name: "group", codec: text(&p.Control.Group, `the name of a group, or ""`, checkGroup)},
		}},
		{name: "reports", codec: reportsSchema(&p.Reports)},
		{name: "metrics", codec: metricsSchema(&p.Metrics)},
		{name: "hooks", codec: hooksSchema(&p.Hooks)},
	}
}

// keys lists every setting by its path; those of a rule as "rules.window".
func keys(m mapping, path string) []string {
	var all []string
	for _, f := range m {
		at := join(path, f.name)
		c := f.codec
		if w, ok := c.(flow); ok {
			c = w.codec
		}
		switch c := c.(type) {
		case mapping:
			all = append(all, keys(c, at)...)
		case list[detector.Rule]:
			all = append(all, keys(c.elem(new(detector.Rule)).(ruleCodec).mapping(), at)...)
		default:
			all = append(all, at)
		}
	}
	return all
}

func noneTwice[T comparable](values []T) *fault {
	for i, v := range values {
		if slices.Contains(values[:i], v) {
			return faultf("remove one of them", "%s is in the list twice", clip(fmt.Sprint(v)))
		}
	}
	return nil
}

func checkLadder(steps []time.Duration) *fault {
	if !slices.IsSorted(steps) {
		sorted := slices.Clone(steps)
		slices.Sort(sorted)
		var words []string
		for _, d := range sorted {
			words = append(words, FormatDuration(d))
		}
		return faultf("did you mean ["+strings.Join(words, ", ")+"]?", "a later block would be shorter than an earlier one")
	}
	return nil
}

func logFile(p *string) codec {
	return text(p, "the path of a file, a pattern, journald, - or auto", func(s string) *fault {
		switch s {
		case Auto, Journald, Stdin:
			return nil
		case "syslog":
			return faultf("journald, or the file that the syslog daemon writes, as in /var/log/mail.log", "syslog is not followed by that name")
		}
		if f := checkPath(s); f != nil {
			return f
		}
		if strings.ContainsAny(s, "*?[") {
			if strings.Contains(s, "%D") || strings.Contains(s, "%M") {
				return faultf("%D and %M find all files by themselves", "%s has both a date and a wildcard", quote(s))
			}
			for part := range strings.SplitSeq(strings.ReplaceAll(s, "*", "?"), "/") {
				if _, err := filepath.Match(part, ""); err != nil {
					return faultf(`a [ that is meant literally is written \[`, "%s is not a pattern", quote(s))
				}
			}
		}
		return nil
	})
}

// checkPath wants an absolute path: the daemon's working directory is
// nobody's business.
func checkPath(s string) *fault {
	switch {
	case s == "" || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return faultf("", "%s is not a path", quote(s))
	case !filepath.IsAbs(s):
		return faultf("a path starts with /", "%s is not an absolute path", quote(s))
	case len(s) > 4095 || strings.HasSuffix(s, "/"):
		return faultf("", "%s is not the path of a file", quote(s))
	}
	return nil
}

func checkSocket(s string) *fault {
	if len(s) > 99 { // sun_path, unix(7), has 107, of which 8 are for the name that it has until it is ready
		return faultf("a socket's path has at most 99 bytes", "%s is too long", quote(s))
	}
	return checkPath(s)
}

var groupForm = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\$?$`)

func checkGroup(s string) *fault {
	if s != "" && !groupForm.MatchString(s) {
		return faultf("", "%s is not the name of a group", quote(s))
	}
	return nil
}

func checkZone(s string) *fault {
	const want = "want auto, UTC or a name such as Europe/Berlin"
	if s == Auto {
		return nil
	}
	if s == "" || s == "Local" || len(s) > 64 {
		return faultf(want, "%s is not a time zone", quote(s))
	}
	if _, err := time.LoadLocation(s); err != nil {
		hint := want
		if guess := nearest(s, []string{Auto, "utc"}); guess != "" {
			hint = "did you mean " + strings.Replace(guess, "utc", "UTC", 1) + "? " + want
		}
		return faultf(hint, "%s is not a time zone", quote(s))
	}
	return nil
}

func rules(p *[]detector.Rule) codec {
	seen := map[string]bool{}
	return list[detector.Rule]{p: p, what: "a list of rules", most: 50,
		elem: func(r *detector.Rule) codec { return ruleCodec{r, seen} }}
}

// ruleCodec is one rule, written on one line.
type ruleCodec struct {
	r    *detector.Rule
	seen map[string]bool // names of the rules before
}

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

func (c ruleCodec) mapping() mapping {
	return mapping{
		{name: "name", required: true, codec: text(&c.r.Name, "a name", func(s string) *fault {
			if !nameForm.MatchString(s) {
				return faultf("want at most 32 of a to z, 0 to 9, - and _", "%s cannot be a name", quote(s))
			}
			if c.seen[s] {
				return faultf("verdicts tell rules by their names", "%s is the name of a rule above", quote(s))
			}
			c.seen[s] = true
			return nil
		})},
		{name: "metric", required: true, codec: metric(&c.r.Metric)},
		{name: "window", required: true, codec: span(&c.r.Window, time.Second, 24*time.Hour)},
		{name: "threshold", required: true, codec: number(&c.r.Threshold, 0, 1e9)},
		{name: "prefixes", required: true, codec: prefixes{c.r}},
		{name: "min_sources", codec: whole(&c.r.MinSources, 0, 1_000_000)},
	}
}

func (c ruleCodec) node() *yaml.Node {
	m := c.mapping()
	if c.r.MinSources == 0 {
		m = m[:len(m)-1]
	}
	n := m.node()
	n.Style = yaml.FlowStyle
	return n
}

func (c ruleCodec) read(d *decoder, path string, n *yaml.Node) {
	c.mapping().read(d, path, n)
	at := func(key string) string { return path + "." + key }
	ok := func(names ...string) bool {
		return !slices.ContainsFunc(names, func(key string) bool { return d.bad[at(key)] || d.nodes[at(key)] == nil })
	}
	r := c.r
	if ok("metric", "threshold") {
		switch {
		case r.Metric == detector.Saturation && (r.Threshold <= 0 || r.Threshold > 1):
			d.fail(at("threshold"), d.nodes[at("threshold")], faultf("want a share of the slots: more than 0, at most 1",
				"threshold %s cannot be a saturation score", formatNumber(r.Threshold)))
		case r.Metric == detector.Opens && (r.Threshold < 1 || r.Threshold != float64(int64(r.Threshold))):
			d.fail(at("threshold"), d.nodes[at("threshold")], faultf("want a whole number, 1 or more",
				"threshold %s cannot be a number of connections", formatNumber(r.Threshold)))
		}
	}
	if ok("prefixes", "min_sources") && r.MinSources > 1 {
		most := 0 // addresses in the widest prefix, as a power of two
		for _, l := range r.Prefixes4 {
			most = max(most, 32-l)
		}
		for _, l := range r.Prefixes6 {
			most = max(most, 128-l)
		}
		if most < 20 && r.MinSources > 1<<most {
			d.fail(at("min_sources"), d.nodes[at("min_sources")], faultf("lower min_sources, or name wider prefixes",
				"none of the rule's prefixes has %d addresses", r.MinSources))
		}
	}
}

func metric(p *detector.Metric) codec {
	type named string
	names := map[detector.Metric]named{detector.Saturation: "saturation", detector.Opens: "opens"}
	var w named
	inner := word(&w, "saturation", "opens").(scalar[named])
	return scalar[detector.Metric]{p, inner.what,
		func(s string, quoted bool) (detector.Metric, *fault) {
			w, f := inner.parse(s, quoted)
			for m, name := range names {
				if name == w {
					return m, nil
				}
			}
			return 0, f
		},
		func(m detector.Metric) *yaml.Node { return textNode(string(names[m])) },
	}
}
