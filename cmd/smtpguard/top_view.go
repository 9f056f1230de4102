package main

import (
	"fmt"
	"net/netip"
	"strings"

	"charm.land/lipgloss/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/smtpguard/smtpguard/guard"
)

// Colours say nothing that the words do not say as well.
var (
	styleBad    = lipgloss.NewStyle().Bold(true).Foreground(lipgloss.Red)
	styleWarn   = lipgloss.NewStyle().Foreground(lipgloss.Yellow)
	styleGood   = lipgloss.NewStyle().Foreground(lipgloss.Green)
	styleTitle  = lipgloss.NewStyle().Bold(true)
	styleFaint  = lipgloss.NewStyle().Faint(true)
	styleChosen = lipgloss.NewStyle().Reverse(true)
)

var topHelp = []string{
	"The bar shows how many of the mail server's slots are taken; the line",
	"below it the last ten minutes.",
	"",
	"HOLDING    who holds slots now. Where there are too many, a network stands",
	"           for its addresses, with the nearest of them; f unfolds it.",
	"           Trend: against ten seconds ago. Nearest rule: how near to a",
	"           verdict, of the rule whose threshold is nearest.",
	"BLOCKS     the newest blocks, and what they have stopped so far.",
	"DECISIONS  the newest verdicts and what the gate made of them.",
	"",
	"arrows, j k   choose           Tab   the next list",
	"b   block                      u   unblock",
	"a   allow: never block         e, Enter   explain",
	"f   fold, unfold a network     r   ask the daemon now",
	"q   quit",
	"",
	"b, u and a say what will happen and do it only after a y.",
}

// picture draws the whole screen. With keys it is as high as the screen and
// ends with what the keys do.
func (m *top) picture(keys bool) string {
	w, h := max(m.width, 40), max(m.height, 12)
	if m.title != "" {
		return strings.Join(m.page(w, h), "\n")
	}
	lines := m.header(w)
	foot := m.foot(w)
	if most := h / 2; len(foot) > most { // the last line says what the keys do
		foot = append(foot[:most-1:most-1], foot[len(foot)-1])
	}
	if !keys {
		foot = nil
	}
	room := h - len(lines) - len(foot)
	shares := m.shares(room)
	airy := shares[0]+shares[1]+shares[2]+panes <= room
	for pane, n := range shares {
		if airy {
			lines = append(lines, "")
		}
		if n > 0 {
			lines = append(lines, m.list(pane, w, n, keys)...)
		}
	}
	if keys {
		for len(lines) < h-len(foot) {
			lines = append(lines, "")
		}
		lines = append(lines[:max(0, h-len(foot))], foot...)
	}
	for i := range lines {
		lines[i] = ansi.Truncate(lines[i], w, m.sign("…", "~"))
	}
	return strings.Join(lines, "\n")
}

// sign chooses between a sign and what a terminal without UTF-8 shows.
func (m *top) sign(utf8, ascii string) string {
	if m.utf8 {
		return utf8
	}
	return ascii
}

func (m *top) header(w int) []string {
	s := m.view.Status
	left := "smtpguard"
	if m.host != "" {
		left += " on " + clean(m.host)
	}
	if m.at.IsZero() {
		say := "asking the daemon"
		if m.failed != nil {
			say = styleBad.Render(clean(m.failed.Error()))
		}
		return []string{styleTitle.Render(left), say, ""}
	}
	mode := "mode " + s.Mode
	if s.Mode != "enforce" {
		mode = styleWarn.Render(mode + ": nothing is dropped")
	}
	lines := []string{ends(styleTitle.Render(left)+"   "+mode, s.Time.Local().Format("15:04:05")+"  up "+span(s.Time.Sub(s.Started)), w)}

	state := styleGood.Render("room")
	switch {
	case s.Saturated:
		state = styleBad.Render("FULL")
	case s.Pressure >= 0.5:
		state = styleWarn.Render("busy")
	}
	label := fmt.Sprintf("slots %d of %d ", s.Count, s.Capacity)
	lines = append(lines, label+m.bar(w-len(label)-6, s.Pressure)+" "+state)
	if trend := m.sparkline(w - len(label)); trend != "" {
		lines = append(lines, strings.Repeat(" ", len(label))+styleFaint.Render(trend))
	}
	switch {
	case m.failed != nil:
		lines = append(lines, styleBad.Render(fmt.Sprintf("no answer since %s: %s", m.at.Local().Format("15:04:05"), clean(m.failed.Error()))))
	case !s.Firewall.Agrees:
		lines = append(lines, styleBad.Render("firewall "+s.Firewall.Backend+" DIFFERS from the store: "+clean(s.Firewall.Error)))
	default:
		more := ""
		if n := len(s.Warnings); n > 0 {
			more = fmt.Sprintf("; %s, see `smtpguard status`", count(n, "warning", "warnings"))
		}
		lines = append(lines, fmt.Sprintf("firewall %s holds %s%s", s.Firewall.Backend, count(s.Blocks, "block", "blocks"), more))
	}
	return lines
}

// bar is w columns wide, of which the share p is full.
func (m *top) bar(w int, p float64) string {
	w = max(w-2, 5)
	n := max(0, min(w, int(p*float64(w)+0.5)))
	return "[" + strings.Repeat(m.sign("█", "#"), n) + strings.Repeat(m.sign("░", "."), w-n) + "]"
}

// sparkline draws the slots taken of the last minutes against the capacity.
func (m *top) sparkline(w int) string {
	marks := []rune(m.sign("▁▂▃▄▅▆▇█", "_.-=+*%#"))
	t := m.view.Trend
	if len(t) > w {
		t = t[len(t)-w:]
	}
	var b strings.Builder
	for _, n := range t {
		i := n * len(marks) / max(m.view.Status.Capacity, 1)
		b.WriteRune(marks[max(0, min(i, len(marks)-1))])
	}
	return b.String()
}

// shares divides the room among the lists: first three rows each, the list
// that is looked at and long ones get what is left.
func (m *top) shares(room int) (n [panes]int) {
	const least = 3 // the title, the head of the columns and one row
	order := []int{m.pane, paneSources, paneBlocks, paneDecisions}
	give := func(pane, upTo int) {
		want := min(len(m.prefixes(pane)), upTo) + 2
		if want == 2 {
			want = 1 // only the title, which says that there is none
		}
		if more := want - n[pane]; more > 0 && room > 0 {
			more = min(more, room)
			n[pane] += more
			room -= more
		}
	}
	for _, upTo := range []int{1, 3, 5, 1 << 20} {
		for _, pane := range order {
			if n[pane] > 0 || room >= least {
				give(pane, upTo)
			}
		}
	}
	return n
}

// list draws a list in n lines, the chosen row among them.
func (m *top) list(pane, w, n int, keys bool) []string {
	var head string
	var rows []string
	title := ""
	width := 18
	for _, p := range m.prefixes(pane) {
		width = max(width, len(p.String()))
	}
	if pane == paneSources && len(m.unfolded) > 0 {
		width++ // members stand a little to the right
	}
	switch pane {
	case paneSources:
		title = fmt.Sprintf("HOLDING  %s", count(m.view.Status.Sockets.Holding, "connection", "connections"))
		if !m.view.Status.Sockets.Usable {
			title = fmt.Sprintf("HOLDING  %s by the log", count(m.view.Status.Count, "connection", "connections"))
		}
		near := len("nearest rule")
		for _, s := range m.sources() {
			near = max(near, ansi.StringWidth(nearest(s)))
		}
		head = fmt.Sprintf("%-*s %5s %-5s %-*s  %s", width, "source", "held", "trend", near, "nearest rule", "state")
		shown := make(map[netip.Prefix]bool) // as members of the network above
		for _, s := range m.sources() {
			name := s.Prefix.String()
			if shown[s.Prefix] {
				name = " " + name
			}
			if m.unfolded[s.Prefix] {
				for _, one := range s.Members {
					shown[one.Prefix] = true
				}
			}
			rows = append(rows, fmt.Sprintf("%-*s %5d %-5s %-*s  %s", width, name, s.Held, m.trend(s), near, nearest(s), standing(s)))
		}
	case paneBlocks:
		title = fmt.Sprintf("BLOCKS  %d in force", m.view.Status.Blocks)
		if n := m.view.Status.Watched; n > 0 {
			title += fmt.Sprintf(", %d observed", n)
		}
		if m.view.MoreBlocks > 0 {
			title += fmt.Sprintf("; the newest %d", len(m.view.Blocks))
		}
		head = fmt.Sprintf("%-*s %9s %9s  %s", width, "source", "left", "stopped", "why")
		for _, b := range m.view.Blocks {
			stopped := "?"
			if m.view.Counted {
				stopped = shortCount(b.Packets)
			}
			reason := clean(b.Reason)
			if b.State != guard.InForce {
				reason = string(b.State) + ": " + reason
			}
			rows = append(rows, fmt.Sprintf("%-*s %9s %9s  %s", width, b.Prefix, span(b.Until.Sub(m.view.Status.Time)), stopped, strings.TrimPrefix(reason, b.Prefix.Addr().String()+" ")))
		}
	case paneDecisions:
		title = "DECISIONS"
		head = fmt.Sprintf("%-8s %-11s %-*s %s", "time", "what", width, "source", "why")
		for _, d := range m.view.Status.Decisions {
			rows = append(rows, fmt.Sprintf("%-8s %-11s %-*s %s", d.Time.Local().Format("15:04:05"), d.What, width, d.Prefix, strings.TrimPrefix(clean(d.Why), d.Prefix.Addr().String()+" ")))
		}
	}
	chosen := -1
	if keys && pane == m.pane {
		chosen = m.row[pane]
	}
	if len(rows) == 0 {
		return []string{styleTitle.Render(title) + styleFaint.Render("  none")}
	}
	lines := []string{styleTitle.Render(title), styleFaint.Render("  " + head)}
	show := min(max(n-len(lines), 0), len(rows))
	first := max(0, min(chosen-show/2, len(rows)-show))
	for i, row := range rows[first : first+show] {
		mark := "  "
		if first+i == chosen {
			mark = m.sign("▸ ", "> ")
		}
		row = ansi.Truncate(mark+row, w, m.sign("…", "~"))
		if first+i == chosen {
			row = styleChosen.Render(row + strings.Repeat(" ", max(0, w-ansi.StringWidth(row))))
		}
		lines = append(lines, row)
	}
	if left := len(rows) - show; left > 0 && len(lines) > 0 {
		lines[0] += styleFaint.Render(fmt.Sprintf("  (%d more)", left))
	}
	return lines
}

// trend says how a source's slots changed.
func (m *top) trend(s guard.Source) string {
	if len(m.past) < 2 {
		return ""
	}
	d := s.Held - m.past[0].held[s.Prefix]
	if d == 0 {
		return "="
	}
	return fmt.Sprintf("%+d", d)
}

// nearest says how near a source, or the nearest of its members, is to a
// verdict.
func nearest(s guard.Source) string {
	s = s.Nearest()
	if s.Rule == "" || s.Threshold <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %% of %s", 100*s.Score/s.Threshold, clean(s.Rule))
}

func standing(s guard.Source) string {
	var words []string
	if s.Addresses > 1 {
		if near := s.Nearest(); near.Prefix != s.Prefix {
			words = append(words, "by "+near.Prefix.Addr().String())
		}
		words = append(words, fmt.Sprintf("%d addresses", s.Addresses))
	}
	if s.Blocked != "" {
		words = append(words, string(s.Blocked))
	}
	if s.Waiting {
		words = append(words, "being confirmed")
	}
	if s.Allowed {
		words = append(words, "allowed")
	}
	switch {
	case s.KnownGood > 0 && s.Addresses > 1:
		words = append(words, fmt.Sprintf("%d known good", s.KnownGood))
	case s.KnownGood > 0:
		words = append(words, "known good")
	}
	return strings.Join(words, ", ")
}

func (m *top) foot(w int) []string {
	switch {
	case m.ask != nil:
		return append(screenLines(m.ask.text, w), styleTitle.Render("y: yes   any other key: no"))
	case m.note != "":
		return screenLines(clean(m.note), w)
	}
	keys := "b block  u unblock  a allow  e explain  f unfold  Tab list  ? help  q quit"
	if len(keys) > w { // help has them all
		keys = "b block  u unblock  a allow  e explain  ? help  q quit"
	}
	return []string{styleFaint.Render(keys)}
}

// page shows a text instead of the lists.
func (m *top) page(w, h int) []string {
	var all []string
	for _, l := range m.text {
		all = append(all, screenLines(clean(l), w)...)
	}
	show := h - 2
	m.scroll = max(0, min(m.scroll, len(all)-show))
	lines := []string{styleTitle.Render(m.title)}
	lines = append(lines, all[m.scroll:min(len(all), m.scroll+show)]...)
	for len(lines) < h-1 {
		lines = append(lines, "")
	}
	foot := "any key: back"
	if len(all) > show {
		foot = fmt.Sprintf("lines %d to %d of %d; arrows, space: scroll; any other key: back", m.scroll+1, min(len(all), m.scroll+show), len(all))
	}
	return append(lines, styleFaint.Render(foot))
}

// screenLines breaks a text into lines of at most w columns.
func screenLines(text string, w int) []string { return strings.Split(ansi.Wrap(text, w, ""), "\n") }

// ends puts left and right at the ends of a line.
func ends(left, right string, w int) string {
	gap := w - ansi.StringWidth(left) - ansi.StringWidth(right)
	if gap < 2 {
		return left
	}
	return left + strings.Repeat(" ", gap) + right
}

// shortCount shows a large number in few columns.
func shortCount(n uint64) string {
	for _, u := range []struct {
		of   uint64
		unit string
	}{{1e12, "T"}, {1e9, "G"}, {1e6, "M"}, {1e4, "k"}} {
		if n >= u.of {
			if u.unit == "k" {
				u.of = 1e3
			}
			return fmt.Sprintf("%d%s", n/u.of, u.unit)
		}
	}
	return fmt.Sprint(n)
}
