package policy

import (
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"
)

// Metrics says where the numbers for Prometheus can be read.
type Metrics struct {
	// Listen is "" (nowhere), "unix:PATH", a loopback "ADDRESS:PORT", or
	// "public:ADDRESS:PORT" for any other address. See Split.
	Listen string
	// Group may use a Unix socket beside root; "": nobody else.
	Group string
}

// Split returns Listen as package net wants it; network is "" if nothing is
// to be served.
func (m Metrics) Split() (network, address string) {
	if m.Listen == "" {
		return "", ""
	}
	if path, ok := strings.CutPrefix(m.Listen, "unix:"); ok {
		return "unix", path
	}
	return "tcp", strings.TrimPrefix(m.Listen, "public:")
}

// HookEvents are the events that a hook can be told of.
var HookEvents = []string{"block", "unblock", "expire", "spare", "refuse", "saturated", "relieved", "fault", "tamper", "report"}

// EventHook is who is told of events, and how. Exactly one of Mail, URL and
// Command is set.
type EventHook struct {
	Name string   // "": it has none
	On   []string // of HookEvents; at least one
	Mail string   // a recipient
	From string   // of the mail; "": the mail program chooses
	URL  string
	// Command is a program's absolute path and its arguments.
	Command []string
	// Every is the least time between two messages.
	Every time.Duration
	// Timeout is how long telling may take.
	Timeout time.Duration
	// HeaderFile and SecretFile are for a URL; absolute, or "".
	HeaderFile, SecretFile string
}

func metricsSchema(m *Metrics) mapping {
	return mapping{
		{name: "listen", codec: text(&m.Listen, `"", unix:/path, or an address with a port`, checkListen)},
		{name: "group", codec: text(&m.Group, `the name of a group, or ""`, checkGroup)},
	}
}

// checkListen wants an address that cannot be reached from elsewhere, unless
// it says that it can.
func checkListen(s string) *fault {
	const want = "want 127.0.0.1:9924, [::1]:9924 or unix:/run/smtpguard/metrics.sock"
	if s == "" {
		return nil
	}
	if path, ok := strings.CutPrefix(s, "unix:"); ok {
		return checkSocket(path)
	}
	rest, public := strings.CutPrefix(s, "public:")
	ap, err := netip.ParseAddrPort(rest)
	switch {
	case err != nil && strings.HasPrefix(rest, "localhost:"):
		return faultf("want 127.0.0.1:"+clip(rest[len("localhost:"):]), "%s is a name, not an address", quote(s))
	case err != nil || ap.Port() == 0 || ap.Addr().Zone() != "":
		return faultf(want, "%s is not an address with a port", quote(s))
	case !public && !ap.Addr().Unmap().IsLoopback():
		return faultf(want+"; if everybody who reaches it may read who holds slots: public:"+rest,
			"%s can be reached from other machines", quote(s))
	}
	return nil
}

func hooksSchema(p *[]EventHook) codec {
	seen := map[string]bool{}
	return list[EventHook]{p: p, what: "a list of hooks", most: 20,
		elem: func(h *EventHook) codec {
			if h.Every == 0 { // it is about to be read
				h.Every, h.Timeout = time.Minute, 10*time.Second
			}
			return hookCodec{h, seen}
		}}
}

// hookCodec is one hook. What it does not have is not written.
type hookCodec struct {
	h    *EventHook
	seen map[string]bool // names of the hooks before
}

func (c hookCodec) mapping() mapping {
	h := c.h
	return mapping{
		{name: "name", codec: text(&h.Name, "a name", func(s string) *fault {
			if !nameForm.MatchString(s) {
				return faultf("want at most 32 of a to z, 0 to 9, - and _", "%s cannot be a name", quote(s))
			}
			if c.seen[s] {
				return faultf("metrics and log tell hooks by their names", "%s is the name of a hook above", quote(s))
			}
			c.seen[s] = true
			return nil
		})},
		{name: "on", required: true, codec: flow{list[string]{p: &h.On, what: "a list of events, as in [saturated, relieved]", least: 1, most: len(HookEvents),
			elem: func(p *string) codec { return word(p, HookEvents...) }, check: noneTwice[string]}}},
		{name: "mail", codec: text(&h.Mail, "a mail address", needs(checkAddress))},
		{name: "from", codec: text(&h.From, "a mail address", checkAddress)},
		{name: "url", codec: text(&h.URL, "an https:// URL", checkHookURL)},
		{name: "command", codec: flow{list[string]{p: &h.Command, what: "a program and its arguments, as in [/usr/local/bin/tell, --loud]", least: 1, most: 32,
			elem: func(p *string) codec { return text(p, "a word", checkArgument) }, check: func(argv []string) *fault {
				if !filepath.IsAbs(argv[0]) {
					return faultf("a path starts with /; no shell is in between", "%s is not the absolute path of a program", quote(argv[0]))
				}
				return nil
			}}}},
		{name: "every", codec: span(&h.Every, time.Second, day)},
		{name: "timeout", codec: span(&h.Timeout, time.Second, 5*time.Minute)},
		{name: "header_file", codec: text(&h.HeaderFile, "the path of a file", orEmpty(checkPath))},
		{name: "secret_file", codec: text(&h.SecretFile, "the path of a file", orEmpty(checkPath))},
	}
}

func (c hookCodec) node() *yaml.Node {
	h := c.h
	set := map[string]bool{"name": h.Name != "", "mail": h.Mail != "", "from": h.From != "", "url": h.URL != "", "command": len(h.Command) > 0,
		"header_file": h.HeaderFile != "", "secret_file": h.SecretFile != ""}
	m := slices.DeleteFunc(c.mapping(), func(f field) bool {
		is, optional := set[f.name]
		return optional && !is
	})
	n := m.node()
	n.Style = yaml.FlowStyle
	return n
}

func (c hookCodec) read(d *decoder, path string, n *yaml.Node) {
	c.mapping().read(d, path, n)
	has := func(key string) bool { return d.nodes[path+"."+key] != nil }
	var ways []string
	for _, way := range []string{"mail", "url", "command"} {
		if has(way) {
			ways = append(ways, way)
		}
	}
	switch {
	case n.Kind != yaml.MappingNode:
	case len(ways) == 0:
		d.fail(path, n, faultf("mail: root, url: https://..., or command: [/path]", "%s tells nobody", path))
	case len(ways) > 1:
		d.fail(path, d.nodes[path+"."+ways[1]], faultf("make a hook of each", "%s has %s", path, enumerate(ways, "and")))
	}
	for key, way := range map[string]string{"from": "mail", "header_file": "url", "secret_file": "url"} {
		if len(ways) == 1 && has(key) && ways[0] != way {
			d.fail(path+"."+key, d.nodes[path+"."+key], faultf("remove it", "%s is for a hook with %s", key, way))
		}
	}
}

// needs is check for what cannot be empty.
func needs(check func(string) *fault) func(string) *fault {
	return func(s string) *fault {
		if s == "" {
			return faultf("remove the line", "it is empty")
		}
		if !strings.Contains(s, "@") && groupForm.MatchString(s) {
			return nil // a local user: root
		}
		return check(s)
	}
}

func checkArgument(s string) *fault {
	if len(s) > 4096 || strings.Contains(s, "\x00") {
		return faultf("want at most 4096 bytes", "%s cannot be an argument", quote(s))
	}
	return nil
}

// checkHookURL wants TLS, except to this machine itself.
func checkHookURL(s string) *fault {
	u, err := url.Parse(s)
	if err != nil || len(s) > 2000 || u.Hostname() == "" || u.Opaque != "" || u.Scheme != "https" && u.Scheme != "http" {
		return faultf("want https://host/path", "%s is not a URL", quote(s))
	}
	if p := u.Port(); p != "" {
		if n, err := strconv.Atoi(p); err != nil || n < 1 || n > 65535 {
			return faultf("", "%s has no valid port", quote(s))
		}
	}
	if u.User != nil {
		return faultf("put the line `Authorization: Basic ...` in a file, and name it in header_file", "the URL has a password in it")
	}
	if a, err := netip.ParseAddr(u.Hostname()); u.Scheme == "http" && u.Hostname() != "localhost" && (err != nil || !a.IsLoopback()) {
		return faultf("want https://", "%s would be told in the clear", quote(u.Hostname()))
	}
	return nil
}

// checkWatch finds what is wrong between metrics and the rest.
func (d *decoder) checkWatch(p *Policy) {
	network, path := p.Metrics.Split()
	if network == "unix" && (path == p.Control.Socket || path == p.Store.Path) {
		d.contradiction(faultf("give the metrics a socket of their own", "metrics.listen is the path of another file of smtpguard"), "metrics.listen")
	}
	if network != "unix" && p.Metrics.Group != "" {
		d.contradiction(faultf("metrics.listen: unix:/run/smtpguard/metrics.sock", "metrics.group is for a Unix socket"), "metrics.group")
	}
}
