package abuse

import (
	"cmp"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// width is the longest line of the text.
const width = 76

// subject names kind, source, AS, times and case (at most 119 characters).
func subject(c *Case, m *Mail) string {
	when := "time unknown"
	if f := m.Facts.First; !f.IsZero() {
		when = f.UTC().Format("2006-01-02 15:04")
		if l := m.Facts.Last.UTC(); l.Format("2006-01-02") != f.UTC().Format("2006-01-02") {
			when += l.Format(" - 2006-01-02 15:04")
		} else if l.Format("15:04") != f.UTC().Format("15:04") {
			when += l.Format("-15:04")
		}
		when += " UTC"
	}
	what := "Abuse report: SMTP connection flood"
	if m.Format == XARF02 {
		what = "abuse report about"
	}
	from := " from "
	if m.Format == XARF02 {
		from = " "
	}
	s := what + from + shown(reported(c)) + asWord(m.Origin.AS, " (AS%d)") + ", " + when + " [" + c.ID + "]"
	if len(s) >= 120 {
		s = what + from + shown(reported(c)) + asWord(m.Origin.AS, " (AS%d)") + " [" + c.ID + "]"
	}
	if m.InReplyTo != "" && len(s) < 110 {
		s = "Follow-up: " + s
	}
	return s
}

func asWord(as uint32, format string) string {
	if as == 0 {
		return ""
	}
	return fmt.Sprintf(format, as)
}

// reported is what a case accuses: the narrowest prefix around what was
// blocked, and no neighbours beyond that.
func reported(c *Case) netip.Prefix { return common(c.prefixes()) }

// shown is a prefix, or the address if it is one.
func shown(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

func utc(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") + " UTC (+00:00)" }

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

// duration of the connections counted, at least a second.
func (f *Facts) duration() time.Duration {
	return max(f.Last.Sub(f.First), time.Second)
}

// addresses is how many sources are counted.
func (f *Facts) addresses() (n int, exact bool) {
	n, exact = len(f.Sources)+f.MoreOf, !f.Lumped && (f.More.Connections == 0 || f.MoreOf > 0)
	for _, s := range f.Sources {
		if !s.Prefix.IsSingleIP() {
			exact = false
		}
	}
	return n, exact
}

// text is the report in words: the whole story, in plain ASCII, readable
// without any other part.
func (d *Desk) text(c *Case, m *Mail) string {
	var b strings.Builder
	f := &m.Facts
	p := reported(c)
	para := func(indent, s string) { b.WriteString(wrap(s, indent, indent)) }
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	row := func(name, s string) {
		b.WriteString(wrap(s, "  "+name+strings.Repeat(" ", max(1, 14-len(name))), strings.Repeat(" ", 16)))
	}

	line("Abuse report %s: SMTP connection flood", c.ID)
	if m.InReplyTo != "" {
		if i := slices.IndexFunc(c.Mails, func(o Mail) bool { return o.MessageID == m.InReplyTo }); i >= 0 {
			para("", fmt.Sprintf("Follow-up to our report of %s: the flood goes on. The numbers are of what came since.", utc(c.Mails[i].SentAt)))
		}
	}
	line("")
	if m.Origin.AS != 0 {
		by := ""
		if m.Origin.Prefix.IsValid() {
			by = " (you originate " + m.Origin.Prefix.String() + " in BGP)"
			if !announced(m.Origin) {
				by = " (origin of " + m.Origin.Prefix.String() + " by an ASN database)"
			}
		}
		para("", fmt.Sprintf("To the abuse desk of AS%d%s.", m.Origin.AS, by))
	} else {
		para("", "To the abuse desk responsible for "+shown(p)+".")
	}
	if m.Cc.Address != "" {
		para("", "Cc: the registered abuse contact of "+m.Cc.Scope+".")
	}

	line("\nWhat happened")
	para("  ", d.what(c, m))
	for _, s := range sentences(c) {
		para("  ", s)
	}
	line("")
	row("Type", "SMTP connection flood (application-layer denial of service)")
	n, exact := f.addresses()
	switch {
	case n == 1 && exact:
		row("Source", shown(f.Sources[0].Prefix))
	case exact:
		row("Sources", fmt.Sprintf("%d addresses in %s%s", n, p, listed(m)))
	default:
		row("Sources", fmt.Sprintf("%s%s", prefixWords(c.prefixes()), listed(m)))
	}
	row("Target", d.target(f))
	if !f.First.IsZero() {
		row("First seen", utc(f.First))
		row("Last seen", utc(f.Last))
	}
	conns := fmt.Sprintf("%d (%s mean over %s", f.Connections, rate(f.Connections, f.duration()), span(f.duration()))
	if f.Peak > 0 && f.duration() >= f.PeakWindow { // else the mean says more
		conns += fmt.Sprintf(", %.1f per second peak over %s", float64(f.Peak)/f.PeakWindow.Seconds(), span(f.PeakWindow))
	} else {
		conns += ", peak not known"
	}
	row("Connections", conns+")")
	if f.Refused > 0 {
		row("Of these", fmt.Sprintf("%d took a place in the mail server, %d were accepted and turned away because it was full or by its limits", f.Taken, f.Refused))
	}
	if f.Baseline >= 0 {
		row("Normal level", fmt.Sprintf("%s in the %s before%s, from %s", plural(f.Baseline, "connection", "connections"), days(f.BaselineDays),
			map[bool]string{true: " it began"}[!f.Began.IsZero()],
			map[bool]string{true: "all addresses of the blocked networks", false: "the same sources"}[f.BaselineAll]))
	} else {
		row("Normal level", map[bool]string{true: "not known (a part of our log could not be read)", false: "not known (our log does not reach back far enough)"}[f.Unread != ""])
	}
	row("Our limit", limits(c))
	row("Clock", clean(d.clock(), 60)+"; all times are UTC (+00:00)")

	if len(f.Sources) > 0 {
		line("\nMost active sources (UTC, %s)", dateOf(f))
		// Over midnight each time has its day, and the wide addresses then have
		// a line of their own.
		form, widest := "15:04:05", 39
		if strings.Contains(dateOf(f), "to") {
			form, widest = "2006-01-02 15:04:05", 15
		}
		w := 15
		for _, s := range f.Sources[:min(len(f.Sources), 10)] {
			w = min(widest, max(w, len(shown(s.Prefix))))
		}
		line("  %-*s %5s  %-*s  %-*s  %s", w, "source IP", "port", len(form), "first", len(form), "last", "conns")
		for _, s := range f.Sources[:min(len(f.Sources), 10)] {
			port := "-"
			if s.Port != 0 {
				port = strconv.Itoa(int(s.Port))
			}
			name := shown(s.Prefix)
			if len(name) > w { // the widest prefixes have a line of their own
				line("  %s", name)
				name = ""
			}
			line("  %-*s %5s  %s  %s  %d", w, name, port, s.First.UTC().Format(form), s.Last.UTC().Format(form), s.Connections)
		}
		rest := ""
		if n > 10 {
			rest = fmt.Sprintf("%d more%s; ", n-10, map[bool]string{true: " in sources.csv", false: ""}[m.attaches()])
			if f.More.Connections > 0 {
				rest = fmt.Sprintf("the %d next ones%s, the others together in one row; ", len(f.Sources)-10, map[bool]string{true: " in sources.csv", false: ""}[m.attaches()])
			}
		}
		if f.Sources[0].Port != 0 {
			rest += `"port" is the source port of the first connection, for carrier-grade NAT`
		} else {
			rest += "our log does not hold source ports"
		}
		para("  ", "("+rest+")")
	}

	if f.FromLog && f.Taken+f.Refused > 0 || handshake(c) {
		line("\nWhy these are the real sources")
		para("  ", "Every counted connection completed the TCP handshake and was accepted by the mail server before it was logged, so the addresses are not spoofed.")
	}

	if len(f.Excerpt) > 0 {
		how := fmt.Sprintf("%d of %s", len(f.Excerpt), plural(f.Lines, "line", "lines"))
		if m.Archive.SHA256 != "" && m.Archive.Lines >= f.Lines {
			how += ", all in our archive"
		}
		if !f.FromLog {
			how = "written by the flood detector, one line a connection"
		}
		line("")
		para("", "Log excerpt (UTC; "+how+"). The lines are made anew from time, addresses, ports, count and reason; all other fields are left out.")
		shownLines := f.Excerpt
		if m.attaches() {
			shownLines = f.few(8)
		}
		for _, l := range shownLines {
			b.WriteString(wrap(f.line(l), "  ", "    "))
		}
		if more := len(f.Excerpt) - len(shownLines); more > 0 {
			line("  (%d more in evidence.txt)", more)
		}
		if m.Archive.SHA256 != "" {
			cut := ""
			if m.Archive.Cut {
				cut = "first "
			}
			para("  ", fmt.Sprintf("Archive, kept here and sent on request: the %s%d lines as logged, SHA-256", cut, m.Archive.Lines))
			line("    %s", m.Archive.SHA256)
		}
	}

	line("\nEffect and what we did")
	for _, s := range effect(c, f, d.now()) {
		para("  ", s)
	}

	line("\nWhat we ask")
	line("  1. Find the hosts behind these addresses and stop the traffic.")
	if over(c, d.now()) {
		line("  2. Tell us when done.")
	} else {
		line("  2. Tell us when done; if a block is still in force then, we lift it early.")
	}
	para("  ", "Reply to this mail and keep ["+c.ID+"] in the subject. Replies are read by people.")

	line("\nHow we found you")
	switch {
	case len(m.Origin.Claims) > 0:
		for _, cl := range m.Origin.Claims {
			row("Origin AS", cl.String())
		}
		if len(m.Origin.ASes) > 1 {
			row("", fmt.Sprintf("Several origins are named: %s. This report goes to AS%d.", asList(m.Origin.ASes), m.Origin.AS))
		}
	default:
		row("Origin AS", "not looked up")
	}
	for _, to := range []struct {
		name string
		c    Contact
	}{{"To", m.To}, {"Cc", m.Cc}} {
		if to.c.Address == "" {
			continue
		}
		s := "abuse contact of " + to.c.Scope + ", " + to.c.Source
		if to.c.Guess {
			s = "a guess: " + to.c.Source
		}
		if host := hostOf(to.c.URL); host != "" {
			s += " at " + host
		}
		if !to.c.At.IsZero() && to.c.Source != byPerson {
			s += ", queried " + to.c.At.UTC().Format("2006-01-02 15:04") + " UTC"
		}
		row(to.name, s)
	}

	line("")
	who := clean(d.org(), 100)
	if a, err := d.config.sender(); err == nil {
		who += ", " + a.Address
	}
	if d.config.Phone != "" {
		who += ", " + clean(d.config.Phone, 40)
	}
	closing := "Sender: " + strings.TrimPrefix(who, ", ") + ". " + signedMark + " We send one report per incident; a follow-up only if the flood goes on after " +
		span(d.config.FollowUp) + ". Senders and recipients of mail are not part of this report."
	if m.Without == "" && (m.container() == Mixed || m.Format == XARF) {
		closing += " Machine-readable copy: xarf.json (XARF 4.2.0, connection/ddos), report id " + m.ReportID + "."
	}
	para("", closing)
	return b.String()
}

// signedMark stands in a draft for the sentence that says who checked it.
const signedMark = "(draft, not approved)"

// signed is that sentence.
func signed(byPerson bool) string {
	if byPerson {
		return "A person checked this report before it was sent."
	}
	return "This report was made and sent by a program; replies are read by people."
}

// what says what was seen, in a sentence or two.
func (d *Desk) what(c *Case, m *Mail) string {
	f := &m.Facts
	p := reported(c)
	var b strings.Builder
	n, exact := f.addresses()
	switch {
	case f.Connections == 0:
		fmt.Fprintf(&b, "%s flooded our mail server with connections.", shown(p))
		return b.String()
	case n == 1 && exact:
		b.WriteString(shown(f.Sources[0].Prefix))
	case exact:
		fmt.Fprintf(&b, "%d addresses in %s", n, p)
	case f.Lumped:
		fmt.Fprintf(&b, "More than %d addresses in %s", n, prefixWords(c.prefixes()))
	default:
		fmt.Fprintf(&b, "Addresses in %s", prefixWords(c.prefixes()))
	}
	fmt.Fprintf(&b, " opened %s to our mail server within %s.", plural(f.Connections, "TCP connection", "TCP connections"), span(f.duration()))
	if !f.Began.IsZero() {
		fmt.Fprintf(&b, " The flood began before, at %s; the numbers are of the last %s of it.", utc(f.Began), span(maxSpan))
	}
	if f.Unread != "" {
		b.WriteString(" A part of our log could not be read, so there may have been more.")
	}
	if f.Lumped {
		fmt.Fprintf(&b, " Of the sources, %d were told apart; the others are counted together, and proper senders among them are not told apart.", maxSources)
	}
	if f.Messages == 0 {
		b.WriteString(" No message was delivered.")
	} else {
		fmt.Fprintf(&b, " %s accepted.", plural(f.Messages, "message was", "messages were"))
	}
	return b.String()
}

// sentences are the detector's, of the blocks that weigh most.
func sentences(c *Case) []string {
	live := slices.DeleteFunc(c.live(), func(r Ref) bool { return r.Verdict == nil })
	slices.SortStableFunc(live, func(a, b Ref) int {
		x, y := a.Verdict, b.Verdict
		if a, b := x.Score/math.Max(x.Threshold, 1e-9), y.Score/math.Max(y.Threshold, 1e-9); a != b {
			if a > b {
				return -1
			}
			return 1
		}
		return a.Since.Compare(b.Since)
	})
	var out []string
	for _, r := range live[:min(len(live), 3)] {
		v := *r.Verdict
		v.Spared = nil
		if v.Metric == detector.Saturation && !v.Unproven && v.Capacity > 0 {
			out = append(out, fmt.Sprintf("At %s %s held %d of the server's %d slots; averaged over the %s before that, weighted by how full the server was, it is %s of them. Our limit is %s.",
				utc(v.Time), shown(v.Source), v.Held, v.Capacity, span(v.Window), share(v.Score), share(v.Threshold)))
			continue
		}
		out = append(out, fmt.Sprintf("At %s %s.", utc(v.Time), strings.Replace(v.Sentence(), " held now", " held then", 1)))
	}
	return out
}

// share is a part of the slots, with a decimal where it is small.
func share(x float64) string {
	if x < 0.0995 {
		return fmt.Sprintf("%.1f %%", 100*x)
	}
	return fmt.Sprintf("%.0f %%", 100*x)
}

// handshake reports whether a verdict counted connections that the mail
// server had taken.
func handshake(c *Case) bool {
	return slices.ContainsFunc(c.live(), func(r Ref) bool { return r.Verdict != nil && r.Verdict.Opens > 0 })
}

func observed(c *Case) bool {
	return !slices.ContainsFunc(c.live(), func(r Ref) bool { return !r.Observed })
}

// over reports whether there is no block to be lifted early.
func over(c *Case, now time.Time) bool {
	return !slices.ContainsFunc(c.live(), func(r Ref) bool { return !r.Observed && now.Before(r.end()) })
}

// target is what was connected to, as the log says it.
func (d *Desk) target(f *Facts) string {
	var to []netip.AddrPort
	for _, s := range f.Sources {
		if s.Local.IsValid() && !slices.Contains(to, s.Local) && len(to) < 4 {
			to = append(to, s.Local)
		}
	}
	name := ""
	if d.config.Host != "" {
		name = " (" + clean(d.config.Host, 60) + ")"
	}
	if len(to) == 0 && f.Private {
		return "our mail server" + name + "; its public address is not in our log"
	}
	if len(to) == 0 {
		return "our mail server" + name + "; its address and port are not in our log"
	}
	var words []string
	for _, t := range to {
		words = append(words, fmt.Sprintf("%s port %d/tcp", t.Addr(), t.Port()))
	}
	return strings.Join(words, ", ") + name
}

// limits are the rules that were crossed.
func limits(c *Case) string {
	var words []string
	for _, r := range c.live() {
		v := r.Verdict
		if v == nil {
			continue
		}
		w := map[bool]string{true: "an address: ", false: "a network: "}[v.Source.IsSingleIP()]
		if v.Metric == detector.Saturation {
			w += fmt.Sprintf("%.0f %% of all places, on average over %s, while the server is full", v.Threshold*100, span(v.Window))
		} else {
			w += fmt.Sprintf("%.0f connections in %s", v.Threshold, span(v.Window))
		}
		if !slices.Contains(words, w) && len(words) < 4 {
			words = append(words, w)
		}
	}
	if len(words) == 0 {
		return "set by hand"
	}
	return strings.Join(words, "; ")
}

// effect says what the flood did and what was done, as far as it is known.
func effect(c *Case, f *Facts, now time.Time) []string {
	var out []string
	if f.Others > 0 {
		networks := "other networks"
		switch n := f.OthersNetworks; {
		case n >= maxSources:
			networks = fmt.Sprintf("at least %d other networks", n)
		case n > 0:
			networks = plural(n, "other network", "other networks")
		}
		out = append(out, fmt.Sprintf("While the server was full it refused %s from %s, in %s.",
			plural(f.Others, "connection", "connections"), networks, plural(f.OthersSeconds, "second", "different seconds")))
	}
	if n := c.Rest.Blocks; n > 0 {
		out = append(out, fmt.Sprintf("This report is of the first %d; %s in the same network, and the connections of their sources, are not in its numbers.",
			len(c.live()), plural(n, "more block", "more blocks")))
	}
	return append(out, blocked(c, now)...)
}

// blocked says from when until when what was blocked, in words that stay true
// when the mail leaves later: a block may end, or be lifted or prolonged, after
// now.
func blocked(c *Case, now time.Time) []string {
	type stretch struct{ since, until time.Time }
	until := func(t time.Time) string {
		if now.Before(t) {
			return utc(t) + " (planned when this was drafted)"
		}
		return utc(t)
	}
	live := slices.DeleteFunc(c.live(), func(r Ref) bool { return r.Observed })
	if len(live) == 0 {
		return []string{"We have not blocked the sources."}
	}
	slices.SortStableFunc(live, func(a, b Ref) int {
		return cmp.Or(a.Prefix.Compare(b.Prefix), a.Since.Compare(b.Since))
	})
	spans := map[netip.Prefix][]stretch{}
	var prefixes []netip.Prefix
	total := 0
	first, last := live[0].Since, live[0].end()
	shortest, longest := last.Sub(first), last.Sub(first)
	for _, r := range live {
		if r.Since.Before(first) {
			first = r.Since
		}
		if r.end().After(last) {
			last = r.end()
		}
		long := r.end().Sub(r.Since)
		shortest, longest = min(shortest, long), max(longest, long)
		of := spans[r.Prefix]
		if n := len(of); n > 0 && !r.Since.After(of[n-1].until) {
			if r.end().After(of[n-1].until) {
				of[n-1].until = r.end()
			}
			continue
		}
		if len(of) == 0 {
			prefixes = append(prefixes, r.Prefix)
		}
		spans[r.Prefix] = append(of, stretch{r.Since, r.end()})
		total++
	}
	if total > 4 {
		long := span(shortest) + " each"
		if span(shortest) != span(longest) {
			long = span(shortest) + " to " + span(longest)
		}
		return []string{fmt.Sprintf("We blocked %s on our mail ports, in %d blocks of %s, the first from %s, the last of them until %s.",
			prefixWords(prefixes), len(live), long, utc(first), until(last))}
	}
	var out []string
	for _, p := range prefixes {
		var words []string
		for _, s := range spans[p] {
			words = append(words, "from "+utc(s.since)+" until "+until(s.until))
		}
		out = append(out, fmt.Sprintf("We blocked %s on our mail ports %s.", shown(p), strings.Join(words, ", and ")))
	}
	return out
}

// prefixWords names a few prefixes.
func prefixWords(ps []netip.Prefix) string {
	var words []string
	for _, p := range ps[:min(len(ps), 4)] {
		words = append(words, shown(p))
	}
	s := strings.Join(words, ", ")
	if more := len(ps) - len(words); more > 0 {
		s += fmt.Sprintf(" and %d more", more)
	}
	return s
}

// container is the format that the mail has: XARF without a valid XARF in it
// is Mixed.
func (m *Mail) container() Format {
	if m.Format == XARF && m.Without != "" {
		return Mixed
	}
	return m.Format
}

// attaches reports whether evidence and sources are files of their own.
func (m *Mail) attaches() bool { return m.container() == Mixed || m.container() == XARF02 }

func listed(m *Mail) string {
	if m.attaches() {
		return ", list in sources.csv"
	}
	return ""
}

func announced(o Origin) bool {
	return slices.ContainsFunc(o.Claims, func(c Claim) bool { return c.Announced && c.Prefix == o.Prefix })
}

// String is the claim in words: the AS, of what network, who says so, and when.
func (c Claim) String() string {
	s := asList(c.Origins)
	if c.Prefix.IsValid() {
		s += " for " + c.Prefix.String()
	}
	if !c.Built.IsZero() {
		return s + ", by database " + strings.TrimPrefix(c.Source, "ASN database ") + " of " + c.Built.Format("2006-01-02")
	}
	s += ", " + c.Source + ", queried " + c.At.UTC().Format("2006-01-02 15:04") + " UTC"
	if c.Stale {
		s += " (not confirmed today)"
	}
	return s
}

func asList(as []uint32) string {
	var words []string
	for _, n := range as {
		words = append(words, "AS"+strconv.FormatUint(uint64(n), 10))
	}
	return strings.Join(words, ", ")
}

func hostOf(url string) string {
	_, rest, ok := strings.Cut(url, "://")
	if !ok {
		return ""
	}
	host, _, _ := strings.Cut(rest, "/")
	return clean(host, 60)
}

func dateOf(f *Facts) string {
	a, b := f.First.UTC().Format("2006-01-02"), f.Last.UTC().Format("2006-01-02")
	if a == b {
		return a
	}
	return a + " to " + b
}

func days(d float64) string {
	if d >= 1 {
		return plural(int(d+0.5), "day", "days")
	}
	return plural(int(d*24+0.5), "hour", "hours")
}

// rate is so many connections in a time, in a unit that does not make it 0.
func rate(n int, d time.Duration) string {
	for _, u := range []struct {
		of   time.Duration
		name string
	}{{time.Second, "second"}, {time.Minute, "minute"}} {
		if r := float64(n) / (float64(d) / float64(u.of)); r >= 0.5 {
			return fmt.Sprintf("%.1f per %s", r, u.name)
		}
	}
	return fmt.Sprintf("%.1f per hour", float64(n)/d.Hours())
}

// span is a duration in words of at most two units.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < 10*time.Minute:
		return plural(int(d/time.Second), "second", "seconds")
	case d < 3*time.Hour:
		return plural(int(d/time.Minute), "minute", "minutes")
	case d < 72*time.Hour:
		return plural(int(d/time.Hour), "hour", "hours")
	}
	return plural(int(d/(24*time.Hour)), "day", "days")
}

// wrap folds a paragraph at width, with what the first and the other lines
// begin with. Words that are longer stay whole.
func wrap(s, first, rest string) string {
	var b strings.Builder
	line := first
	empty := true
	for w := range strings.FieldsSeq(clean(s, 20_000)) {
		if !empty && len(line)+1+len(w) > width {
			b.WriteString(strings.TrimRight(line, " ") + "\n")
			line, empty = rest, true
		}
		if !empty {
			line += " "
		}
		line += w
		empty = false
	}
	b.WriteString(strings.TrimRight(line, " ") + "\n")
	return b.String()
}

// csvText is sources.csv.
func csvText(c *Case, f *Facts) string {
	var b strings.Builder
	b.WriteString("source_ip,source_port_sample,destination_ip,destination_port,first_seen_utc,last_seen_utc,connections,refused\n")
	one := func(s Source) {
		port, ip, dport := "", "", ""
		if s.Port != 0 {
			port = strconv.Itoa(int(s.Port))
		}
		if s.Local.IsValid() {
			ip, dport = s.Local.Addr().String(), strconv.Itoa(int(s.Local.Port()))
		}
		fmt.Fprintf(&b, "%s,%s,%s,%s,%s,%s,%d,%d\n", shown(s.Prefix), port, ip, dport, stamp(s.First, f.Millis), stamp(s.Last, f.Millis), s.Connections, s.Refused)
	}
	for _, s := range f.Sources {
		one(s)
	}
	if f.More.Connections > 0 { // the rest of the network, in one row
		more := f.More
		more.Prefix = reported(c)
		one(more)
	}
	return b.String()
}

func stamp(t time.Time, millis bool) string {
	if t.IsZero() {
		return ""
	}
	if !millis {
		return rfc3339(t)
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z")
}

func (d *Desk) org() string {
	if d.config.Org != "" {
		return d.config.Org
	}
	if a, err := d.config.sender(); err == nil && a.Name != "" {
		return a.Name
	}
	if a, err := d.config.sender(); err == nil {
		return domainOf(a.Address)
	}
	return "(reports.from is not set)"
}
