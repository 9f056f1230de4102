package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/incident"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

const (
	// tableWidth is that of a terminal which nobody made wider.
	tableWidth = 80
	// tableRows is how many sources the closing table names.
	tableRows = 20
)

// tellIncident has the replay tell c what happens.
func tellIncident(r *guard.Replay, c *incident.Collector) {
	moment := func() incident.Moment {
		capacity, _ := r.Detector.Capacity()
		return incident.Moment{Time: r.Detector.Now(), Capacity: capacity, Held: r.Detector.Held()}
	}
	r.OnEvent = func(ev *detector.Event, by *store.Block) { c.Event(moment, ev, by) }
	block, spare := r.OnBlock, r.OnSpare
	r.OnBlock = func(b store.Block) {
		c.Block(moment(), &b)
		block(b)
	}
	r.OnSpare = func(v detector.Verdict, reason string) {
		c.Spare(&v, reason)
		spare(v, reason)
	}
}

// newCollector is what replay tells an incident to.
func newCollector(p *policy.Policy, capacity int, pictures bool) (*incident.Collector, error) {
	if capacity == 0 {
		capacity = p.Capacity
	}
	return incident.New(incident.Options{SaturatedAt: p.Saturation.SaturatedAt, Pictures: pictures, Capacity: capacity, Memory: p.Memory})
}

// showRows prints the closing table: who held the slots, and what the policy
// would have done about it.
func showRows(w io.Writer, c *incident.Collector, first, last time.Time) {
	rows := c.Rows()
	if len(rows) == 0 {
		return
	}
	clock := time.TimeOnly
	if last.Sub(first) > 24*time.Hour || first.Local().Day() != last.Local().Day() {
		clock = "01-02 15:04"
	}
	table := [][]string{{"WHO", "RULE", "SLOTS", "SINCE", "BLOCKED", "KEPT AWAY", "REFUSED"}}
	for i, r := range rows {
		if i == tableRows {
			table = append(table, []string{fmt.Sprintf("and %d more", len(rows)-i)})
			break
		}
		table = append(table, []string{r.Who(), shorten(r.Rule, 12), share(r), r.Since.Local().Format(clock), blockedFor(r), tally(r.Opened), tally(r.Refused)})
	}
	if len(rows) > 1 {
		t := c.Total()
		table = append(table, []string{"together, at worst", "", share(&t), "", "", tally(t.Opened), tally(t.Refused)})
	}
	printTable(w, table, "llrlrrr")
}

func share(r *incident.Row) string { return fmt.Sprintf("%.0f %%", 100*r.Share()) }

// blockedFor is how long a source would have been blocked, and in how many
// blocks.
func blockedFor(r *incident.Row) string {
	s := span(r.For)
	if r.Blocks > 1 {
		s = fmt.Sprintf("%dx %s", r.Blocks, s)
	}
	return s
}

// tally is a number in at most five digits: 12345, 123k, 12M.
func tally(n uint64) string {
	switch {
	case n < 100_000:
		return strconv.FormatUint(n, 10)
	case n < 100_000_000:
		return strconv.FormatUint(n/1000, 10) + "k"
	default:
		return strconv.FormatUint(n/1_000_000, 10) + "M"
	}
}

func shorten(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "~"
	}
	return s
}

// printTable aligns the columns, to the left or the right, within tableWidth.
// A first cell that would push the others out of it gets a line of its own.
func printTable(w io.Writer, table [][]string, align string) {
	width := make([]int, len(align))
	for _, row := range table {
		for i, cell := range row {
			if len(row) > 1 {
				width[i] = max(width[i], len(cell))
			}
		}
	}
	rest := 0
	for _, n := range width[1:] {
		rest += 2 + n
	}
	width[0] = min(width[0], max(0, tableWidth-rest))
	for _, row := range table {
		var line strings.Builder
		for i, cell := range row {
			if i == 0 && len(cell) > width[0] && len(row) > 1 {
				fmt.Fprintln(w, cell)
				cell = ""
			}
			if i > 0 {
				line.WriteString("  ")
			}
			pad := strings.Repeat(" ", max(0, width[i]-len(cell)))
			if align[i] == 'r' {
				cell, pad = pad, cell
			}
			line.WriteString(cell + pad)
		}
		fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
	}
}
