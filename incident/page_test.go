package incident

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"math"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/html"

	"github.com/smtpguard/smtpguard/detector"
)

func page(t testing.TB, c *Collector, o PageOptions) string {
	t.Helper()
	var b bytes.Buffer
	if o.Zone == nil {
		o.Zone = time.UTC
	}
	if err := c.WritePage(&b, o); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// flood is an incident with everything in it that a page can show.
func flood(t *testing.T) *Collector {
	w := newWorld(t, true)
	for range 20 {
		w.after(time.Second)
		w.event(detector.Accepted, "192.0.2.1", 0, 0)
	}
	w.fill("203.0.113.1", 40, 0)
	w.fill("2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", 60, 40)
	w.after(3 * time.Second)
	w.refuse("192.0.2.1", 4)
	w.block("203.0.113.1/32", "hog", 40, 1, detector.Saturation)
	w.block("2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff/128", "hog", 60, 1, detector.Saturation)
	v := &detector.Verdict{Time: w.now, Source: netip.MustParsePrefix("192.0.2.0/24"), Rule: "net", Metric: detector.Saturation, Window: time.Minute,
		Score: 0.2, Held: 30, Sources: 7, Capacity: 100, Count: 100, Spared: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, KnownGood: 1}
	w.c.Spare(v, "known-good")
	w.c.Spare(v, "<b>the gate</b>")
	w.after(10 * time.Second)
	w.refuse("192.0.2.1", 4)
	w.refuse("203.0.113.1", 9)
	w.event(detector.Opened, "192.0.2.1", 2, 0)
	w.after(20 * time.Second)
	w.event(detector.Accepted, "192.0.2.1", 0, 0)
	return w.c
}

const hostile = "<script>alert(1)</script>\"'><svg onload=x>\x00\x1b[31m\u202e\xff`{{.}}"

func hostileOptions() PageOptions {
	return PageOptions{Version: hostile, Logs: []string{hostile, "b.log"}, Settings: []Setting{{hostile, strings.Repeat(hostile, 1000)}},
		AS: func(netip.Addr) string { return hostile }}
}

// walk calls f with each element.
func walk(n *html.Node, f func(*html.Node)) {
	if n.Type == html.ElementNode {
		f(n)
	}
	for c := n.FirstChild; c != nil; c = c.NextSibling {
		walk(c, f)
	}
}

func attr(n *html.Node, name string) string {
	for _, a := range n.Attr {
		if a.Key == name {
			return a.Val
		}
	}
	return ""
}

func text(n *html.Node) string {
	if n.Type == html.TextNode {
		return n.Data
	}
	var b strings.Builder
	for c := n.FirstChild; c != nil; c = c.NextSibling {
		b.WriteString(text(c))
	}
	return b.String()
}

var (
	// elements that the page is made of; a hostile name must add none.
	allowed  = regexp.MustCompile(`^(html|head|meta|title|style|body|header|footer|main|section|h[123]|p|dl|div|dt|dd|figure|figcaption|ul|ol|li|span|b|small|strong|time|code|a|details|summary|table|caption|thead|tbody|tr|th|td|svg|g|rect|line|path|circle|text)$`)
	pathData = regexp.MustCompile(`^M-?[0-9.]+ -?[0-9.]+([HVhvlMLZz] ?-?[0-9. -]*)*$`)
	length   = regexp.MustCompile(`^-?[0-9]+(\.[0-9]+)?%?$`)
	lengths  = map[string]bool{"x": true, "y": true, "x1": true, "x2": true, "y1": true, "y2": true, "cx": true, "cy": true, "r": true, "rx": true, "dx": true, "dy": true, "width": true, "height": true}
)

// checkPage checks what must be so of every page.
func checkPage(t *testing.T, source string) *html.Node {
	t.Helper()
	doc, err := html.Parse(strings.NewReader(source))
	if err != nil {
		t.Fatal(err)
	}
	ids, wanted := map[string]bool{}, map[string]bool{}
	csp, style := "", ""
	figures, captions, pictures := 0, 0, 0
	walk(doc, func(n *html.Node) {
		if !allowed.MatchString(n.Data) {
			t.Errorf("the page has a <%s>", n.Data)
		}
		if id := attr(n, "id"); id != "" {
			if ids[id] {
				t.Errorf("two elements are %q", id)
			}
			ids[id] = true
		}
		for _, a := range n.Attr {
			switch {
			case strings.HasPrefix(a.Key, "on") || a.Key == "style" || a.Key == "src" || a.Key == "srcset" || a.Key == "data":
				t.Errorf("<%s> has %s=%q", n.Data, a.Key, a.Val)
			case a.Key == "href":
				if !strings.HasPrefix(a.Val, "#") {
					t.Errorf("<%s> leads to %q", n.Data, a.Val)
				}
				wanted[strings.TrimPrefix(a.Val, "#")] = true
			case n.Namespace == "svg" && a.Key == "d":
				if !pathData.MatchString(a.Val) {
					t.Errorf("not a path: %.60q", a.Val)
				}
			case n.Namespace == "svg" && lengths[a.Key]:
				if !length.MatchString(a.Val) {
					t.Errorf("<%s %s=%q>", n.Data, a.Key, a.Val)
				}
			}
		}
		switch {
		case n.Data == "meta" && attr(n, "http-equiv") == "Content-Security-Policy":
			csp = attr(n, "content")
		case n.Data == "style":
			style = text(n)
		case n.Data == "figure":
			figures++
		case n.Data == "figcaption":
			if captions++; strings.TrimSpace(text(n)) == "" {
				t.Error("an empty figcaption")
			}
		case n.Data == "svg" && attr(n, "role") == "img":
			if pictures++; attr(n, "aria-label") == "" {
				t.Error("a picture without a text")
			}
		}
	})
	for id := range wanted {
		if !ids[id] {
			t.Errorf("a link leads to %q, which is not there", id)
		}
	}
	sum := sha256.Sum256([]byte(style))
	if want := "default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'; base-uri 'none'; form-action 'none'"; csp != want {
		t.Errorf("Content-Security-Policy: %s\nwant %s", csp, want)
	}
	if figures != captions || pictures == 0 && figures > 0 {
		t.Errorf("%d figures, %d captions, %d pictures", figures, captions, pictures)
	}
	if !strings.HasPrefix(source, "<!doctype html>") || !strings.Contains(source[:512], `content="`+Generator+`"`) {
		t.Error("a page is not known as one by its first bytes")
	}
	return doc
}

func TestPage(t *testing.T) {
	c := flood(t)
	whole := page(t, c, PageOptions{Version: "1", Logs: []string{"mainlog"}, Settings: []Setting{{"capacity", "100 slots"}}})
	doc := checkPage(t, whole)
	for _, no := range []string{"NaN", "Inf", "ZgotmplZ", "%!"} {
		if strings.Contains(whole, no) {
			t.Errorf("%q is in the page", no)
		}
	}
	all := text(doc)
	for _, want := range []string{c.Sentence(), "2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff", "203.0.113.1 kept 20 % of the server's slots",
		"spared as a whole: there are senders in it whose mail was accepted", "spared: <b>the gate</b>", "1 sender is known good from there: 192.0.2.1",
		"100 slots", "mainlog", "22 November 2026, 19:44:01 to 19:44:53", "(UTC)"} {
		if !strings.Contains(all, want) {
			t.Errorf("the page does not say %q", want)
		}
	}
	// The bands of the two sources are as high as what they held: 40 and 60
	// of 100 slots.
	var height []float64
	walk(doc, func(n *html.Node) {
		if n.Data == "path" && strings.HasPrefix(attr(n, "class"), "area") {
			top := math.Inf(1)
			for _, v := range regexp.MustCompile(`V(\d+)`).FindAllStringSubmatch(attr(n, "d"), -1) {
				y, _ := strconv.ParseFloat(v[1], 64)
				top = min(top, y)
			}
			height = append(height, (slotsHeight-top)*1.06/slotsHeight*100)
		}
	})
	if len(height) != 3 || math.Abs(height[0]-100) > 1 || math.Abs(height[0]-height[1]-60) > 1 || height[2] > 3 {
		t.Errorf("the areas reach up to %.0f slots; want 100, 40 and 2", height)
	}
}

func TestPageOfHostileNames(t *testing.T) {
	c := flood(t)
	plainPage := page(t, c, PageOptions{AS: func(netip.Addr) string { return "x" }, Version: "x", Logs: []string{"x", "b.log"}, Settings: []Setting{{"x", "x"}}})
	elements := func(s string) (n int) {
		walk(checkPage(t, s), func(*html.Node) { n++ })
		return n
	}
	bad := page(t, c, hostileOptions())
	if a, b := elements(bad), elements(plainPage); a != b {
		t.Errorf("%d elements, %d with plain names", a, b)
	}
	for _, r := range []string{"\x00", "\x1b", "\u202e", "\xff"} {
		if strings.Contains(bad, r) {
			t.Errorf("%q is in the page", r)
		}
	}
	if len(bad) > len(plainPage)+20*6*maxText {
		t.Errorf("long names make %d bytes of %d", len(bad), len(plainPage))
	}
}

func TestPageOfNothing(t *testing.T) {
	checkPage(t, page(t, newWorld(t, true).c, PageOptions{}))
	w := newWorld(t, true)
	w.refuse("192.0.2.1", 3) // a log without connection lines
	checkPage(t, page(t, w.c, PageOptions{}))
	if err := newWorld(t, false).c.WritePage(&bytes.Buffer{}, PageOptions{}); err == nil {
		t.Error("a page without pictures is written")
	}
}

// FuzzPage: whatever others name, it is text.
func FuzzPage(f *testing.F) {
	f.Add(hostile)
	f.Add("mainlog")
	f.Add("</style></title><!--")
	c := flood(&testing.T{})
	want := 0
	doc, err := html.Parse(strings.NewReader(page(f, c, PageOptions{AS: func(netip.Addr) string { return "x" }, Version: "x", Logs: []string{"x"}, Settings: []Setting{{"x", "x"}}})))
	if err != nil {
		f.Fatal(err)
	}
	walk(doc, func(*html.Node) { want++ })
	f.Fuzz(func(t *testing.T, name string) {
		if plain(name) == "" {
			return
		}
		doc := checkPage(t, page(t, c, PageOptions{AS: func(netip.Addr) string { return name }, Version: name, Logs: []string{name}, Settings: []Setting{{name, name}}}))
		n := 0
		walk(doc, func(*html.Node) { n++ })
		if n != want {
			t.Errorf("%d elements, want %d", n, want)
		}
	})
}

// Texts have a contrast of 4.5 with what is behind them and shapes one of 3,
// by day and by night (WCAG 2.1, 1.4.3 and 1.4.11).
func TestContrast(t *testing.T) {
	css, err := os.ReadFile("page.css")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile(`:root\{([^}]*)\}`).FindAllSubmatch(css, -1)
	if len(blocks) != 3 {
		t.Fatalf("%d sets of colours, want light, dark and print", len(blocks))
	}
	for i, b := range blocks {
		colour := map[string]float64{}
		for _, m := range regexp.MustCompile(`--(\w+):#([0-9a-f]{3,6})\b`).FindAllStringSubmatch(string(b[1]), -1) {
			colour[m[1]] = luminance(m[2])
		}
		check := func(front, back string, want float64) {
			t.Helper()
			a, b := colour[front], colour[back]
			if a < b {
				a, b = b, a
			}
			if got := (a + 0.05) / (b + 0.05); got < want {
				t.Errorf("set %d: %s on %s has a contrast of %.2f, want %.1f", i, front, back, got, want)
			}
		}
		for _, back := range []string{"bg", "panel"} {
			check("text", back, 4.5)
			check("soft", back, 4.5)
		}
		check("fullline", "bg", 4.5)
		check("good", "bg", 4.5)
		for _, s := range []string{"s0", "s1", "s2", "s3", "s4", "s5"} {
			check(s, "bg", 4.5) // a letter in the background's colour is on it
			check(s, "full", 3)
		}
		for _, s := range []string{"others", "bad", "kept", "plan"} {
			check(s, "bg", 3)
		}
	}
}

func luminance(hex string) float64 {
	if len(hex) == 3 {
		hex = string([]byte{hex[0], hex[0], hex[1], hex[1], hex[2], hex[2]})
	}
	lin := func(s string) float64 {
		n, _ := strconv.ParseUint(s, 16, 8)
		c := float64(n) / 255
		if c <= 0.04045 {
			return c / 12.92
		}
		return math.Pow((c+0.055)/1.055, 2.4)
	}
	return 0.2126*lin(hex[:2]) + 0.7152*lin(hex[2:4]) + 0.0722*lin(hex[4:6])
}

func TestTimeAxis(t *testing.T) {
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Skip("no time zones on this machine")
	}
	for d := time.Second; d < 20*365*24*time.Hour; d += d/3 + time.Second {
		x := timeAxis(t0.In(berlin), t0.In(berlin).Add(d))
		large := 0
		for _, k := range x.Ticks {
			if !k.Small {
				large++
			}
		}
		if len(x.Ticks) == 0 || len(x.Ticks) > 10 || large == 0 || large > 4 {
			t.Errorf("%s: %d ticks, %d for small screens", d, len(x.Ticks), large)
		}
	}
	x := timeAxis(t0.In(berlin), t0.In(berlin).Add(4*time.Hour))
	if x.Ticks[0].Text != "21:00" {
		t.Errorf("the first tick is %q; 20:44 in Berlin is followed by 21:00", x.Ticks[0].Text)
	}
	if got := zone(t0, t0, berlin); got != "CET, UTC+01:00" {
		t.Errorf("zone %q", got)
	}
}
