package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

const (
	topEvery   = 2 * time.Second
	topTimeout = 10 * time.Second
	// topTrend: so long ago is what a source's trend is compared with.
	topTrend = 10 * time.Second
)

func (e *env) topCommand() *cli.Command {
	return &cli.Command{
		Name: "top", Usage: "live view: who holds the slots, what is blocked, what was decided",
		Description: "Keys: arrows choose, Tab changes the list; b block, u unblock, a allow, e explain\n" +
			"(each change asks first); ? help, q quit. The daemon must be running.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "once", Usage: "print one picture and end"},
			&cli.DurationFlag{Name: "every", Value: topEvery, Usage: "look each `TIME`; longer is easier on a slow line"},
		},
		Action: e.top,
	}
}

func (e *env) top(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	if c.Duration("every") < 200*time.Millisecond {
		return &usageError{"--every must be 200ms or more"}
	}
	cl, _, err := e.daemon(c)
	if err != nil {
		return err
	}
	host, _ := os.Hostname()
	m := newTop(c.Context, cl, host, c.Duration("every"), unicodeTerminal(os.Getenv))
	if c.Bool("json") || c.Bool("once") {
		v, err := cl.View(c.Context)
		if err != nil {
			return err
		}
		if c.Bool("json") {
			return e.json(v)
		}
		m.width, m.height = 80, 40
		if f, ok := e.stdout.(*os.File); ok {
			if w, _, err := term.GetSize(int(f.Fd())); err == nil {
				m.width = w
			}
		}
		m.take(v, v.Status.Time)
		_, err = lipgloss.Fprintln(e.stdout, m.picture(false))
		return err
	}
	in, inOK := e.stdin.(*os.File)
	out, outOK := e.stdout.(*os.File)
	if !inOK || !outOK || !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) || os.Getenv("TERM") == "dumb" {
		return withHint(errors.New("top needs a terminal"), "`smtpguard top --once` or `smtpguard status` print and end")
	}
	_, err = tea.NewProgram(m, tea.WithContext(c.Context), tea.WithInput(in), tea.WithOutput(out), tea.WithFPS(10)).Run()
	if errors.Is(err, tea.ErrInterrupted) || c.Context.Err() != nil {
		return nil // Ctrl-C, SIGTERM: the ways to leave it
	}
	return err
}

// unicodeTerminal reports whether the locale says that the terminal takes
// UTF-8 (locale(7): LC_ALL before LC_CTYPE before LANG).
func unicodeTerminal(getenv func(string) string) bool {
	for _, name := range []string{"LC_ALL", "LC_CTYPE", "LANG"} {
		if v := strings.ToLower(getenv(name)); v != "" {
			return strings.Contains(v, "utf-8") || strings.Contains(v, "utf8")
		}
	}
	return false
}

// topDaemon is what the live view asks of the daemon; control.Client has it.
type topDaemon interface {
	View(ctx context.Context) (guard.View, error)
	Explain(ctx context.Context, p netip.Prefix) (guard.Explanation, error)
	Block(ctx context.Context, reqs []guard.BlockRequest, dry bool) ([]guard.BlockOutcome, error)
	Unblock(ctx context.Context, p netip.Prefix, by string) ([]store.Block, error)
	Allow(ctx context.Context, e store.AllowEntry) ([]store.Block, error)
}

// The lists of the live view, and the row that is chosen in each.
const (
	paneSources = iota
	paneBlocks
	paneDecisions
	panes
)

// top is the state of the live view. All of it is changed by Update alone.
type top struct {
	ctx    context.Context
	daemon topDaemon
	host   string
	every  time.Duration
	utf8   bool

	width, height int
	view          guard.View
	at            time.Time // when view came; zero: not yet
	failed        error     // of the last try
	past          []heldThen
	unfolded      map[netip.Prefix]bool // networks whose members are shown
	pane          int
	chosen        [panes]netip.Prefix
	row           [panes]int

	ask     *question
	pressed int    // keys so far
	note    string // of the last change, until the next key
	text    []string
	scroll  int
	title   string // of text; "" when the lists are shown
}

// heldThen is what sources held at a time, for their trend.
type heldThen struct {
	at   time.Time
	held map[netip.Prefix]int
}

// question is a change that waits for the operator's yes.
type question struct {
	text string
	do   tea.Cmd
}

func newTop(ctx context.Context, d topDaemon, host string, every time.Duration, utf8 bool) *top {
	return &top{ctx: ctx, daemon: d, host: host, every: every, utf8: utf8, width: 80, height: 24, unfolded: make(map[netip.Prefix]bool)}
}

// What Update is told.
type (
	viewMsg struct {
		view guard.View
		at   time.Time
		err  error
		once bool // asked by a key, between two regular looks
	}
	lookMsg struct{}
	doneMsg struct{ note string }
	askMsg  struct {
		question
		pressed int // the keys pressed until it was asked
	}
	explainMsg struct {
		prefix netip.Prefix
		text   string
	}
)

func (m *top) Init() tea.Cmd { return m.look(false) }

// look asks the daemon for a view. One is asked at a time: the next is asked
// some time after the answer.
func (m *top) look(once bool) tea.Cmd {
	return func() tea.Msg {
		ctx, cancel := context.WithTimeout(m.ctx, topTimeout)
		defer cancel()
		v, err := m.daemon.View(ctx)
		return viewMsg{v, time.Now(), err, once}
	}
}

func (m *top) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case lookMsg:
		return m, m.look(false)
	case viewMsg:
		if m.failed = msg.err; msg.err == nil {
			m.take(msg.view, msg.at)
		}
		if msg.once {
			return m, nil
		}
		return m, tea.Tick(m.every, func(time.Time) tea.Msg { return lookMsg{} })
	case doneMsg:
		m.note = msg.note
		return m, m.look(true)
	case askMsg:
		// The answer may be late: a key pressed since means something else.
		if msg.pressed == m.pressed {
			m.ask = &question{msg.text, msg.do}
		}
	case explainMsg:
		m.title, m.text, m.scroll = "explain "+msg.prefix.String(), strings.Split(strings.TrimRight(msg.text, "\n"), "\n"), 0
	case tea.KeyPressMsg:
		return m, m.key(msg.String())
	}
	return m, nil
}

// take takes a new view over. What was chosen stays chosen while it is there.
func (m *top) take(v guard.View, at time.Time) {
	m.view, m.at = v, at
	now := heldThen{at, make(map[netip.Prefix]int, len(v.Sources))}
	for _, s := range v.Sources {
		now.held[s.Prefix] = s.Held
		for _, one := range s.Members {
			now.held[one.Prefix] = one.Held
		}
	}
	m.past = append(m.past, now)
	for len(m.past) > 1 && at.Sub(m.past[1].at) >= topTrend {
		m.past = m.past[1:]
	}
	for pane := range panes {
		if i := m.find(pane, m.chosen[pane]); i >= 0 {
			m.row[pane] = i
		}
		m.choose(pane, m.row[pane])
	}
}

// sources are the rows of HOLDING: a network that is unfolded is followed by
// its members.
func (m *top) sources() (list []guard.Source) {
	for _, s := range m.view.Sources {
		if list = append(list, s); m.unfolded[s.Prefix] {
			list = append(list, s.Members...)
		}
	}
	return list
}

// fold shows or hides the members of the chosen network, or of that which the
// chosen address is shown with.
func (m *top) fold() {
	if m.pane != paneSources {
		m.note = "only networks in HOLDING unfold"
		return
	}
	for _, s := range m.view.Sources {
		if len(s.Members) == 0 || !s.Prefix.Contains(m.chosen[paneSources].Addr()) {
			continue
		}
		if m.unfolded[s.Prefix] {
			delete(m.unfolded, s.Prefix)
		} else {
			m.unfolded[s.Prefix] = true
		}
		m.choose(paneSources, max(0, m.find(paneSources, s.Prefix)))
		return
	}
	m.note = "that is one address; networks unfold"
}

// prefixes are the sources of a list's rows.
func (m *top) prefixes(pane int) (list []netip.Prefix) {
	switch pane {
	case paneSources:
		for _, s := range m.sources() {
			list = append(list, s.Prefix)
		}
	case paneBlocks:
		for _, b := range m.view.Blocks {
			list = append(list, b.Prefix)
		}
	case paneDecisions:
		for _, d := range m.view.Status.Decisions {
			list = append(list, d.Prefix)
		}
	}
	return list
}

func (m *top) find(pane int, p netip.Prefix) int {
	for i, q := range m.prefixes(pane) {
		if p == q {
			return i
		}
	}
	return -1
}

func (m *top) choose(pane, row int) {
	list := m.prefixes(pane)
	m.row[pane] = max(0, min(row, len(list)-1))
	m.chosen[pane] = netip.Prefix{}
	if len(list) > 0 {
		m.chosen[pane] = list[m.row[pane]]
	}
}

// key does what a key says.
func (m *top) key(k string) tea.Cmd {
	if k == "ctrl+c" {
		return tea.Quit
	}
	m.note = ""
	m.pressed++
	if q := m.ask; q != nil {
		m.ask = nil
		if k == "y" || k == "Y" {
			return q.do
		}
		m.note = "nothing was changed"
		return nil
	}
	if m.title != "" {
		switch k {
		case "up", "k":
			m.scroll--
		case "down", "j":
			m.scroll++
		case "pgdown", "space", "f":
			m.scroll += m.height - 3
		case "pgup":
			m.scroll -= m.height - 3
		default:
			m.title, m.text = "", nil
		}
		return nil
	}
	p := m.chosen[m.pane]
	switch k {
	case "q", "esc":
		return tea.Quit
	case "?", "h":
		m.title, m.text, m.scroll = "help", topHelp, 0
	case "r":
		return m.look(true)
	case "f", "space", "+", "-":
		m.fold()
	case "tab", "right", "l":
		m.pane = (m.pane + 1) % panes
	case "shift+tab", "left":
		m.pane = (m.pane + panes - 1) % panes
	case "up", "k":
		m.choose(m.pane, m.row[m.pane]-1)
	case "down", "j":
		m.choose(m.pane, m.row[m.pane]+1)
	case "pgup":
		m.choose(m.pane, m.row[m.pane]-10)
	case "pgdown":
		m.choose(m.pane, m.row[m.pane]+10)
	case "home", "g":
		m.choose(m.pane, 0)
	case "end", "G":
		m.choose(m.pane, len(m.prefixes(m.pane))-1)
	case "b", "u", "a", "e", "enter":
		if !p.IsValid() {
			m.note = "there is nothing in this list to choose; Tab changes to another"
			return nil
		}
		return m.act(k, p)
	}
	return nil
}

// act begins a change of a source or its explanation. Of a change it returns
// the question.
func (m *top) act(k string, p netip.Prefix) tea.Cmd {
	within := func(f func(ctx context.Context) tea.Msg) tea.Cmd {
		return func() tea.Msg {
			ctx, cancel := context.WithTimeout(m.ctx, topTimeout)
			defer cancel()
			return f(ctx)
		}
	}
	said := func(err error) tea.Msg {
		note := err.Error()
		if h := hint(err); h != "" {
			note += " (" + h + ")"
		}
		return doneMsg{note}
	}
	switch k {
	case "b":
		req := []guard.BlockRequest{{Prefix: p, Reason: "by hand, in top"}}
		make := within(func(ctx context.Context) tea.Msg {
			out, err := m.daemon.Block(ctx, req, false)
			if err != nil {
				return said(err)
			}
			return doneMsg{blockNote(out, "is blocked")}
		})
		// What would happen is asked of the daemon: it may be refused.
		pressed := m.pressed
		return within(func(ctx context.Context) tea.Msg {
			out, err := m.daemon.Block(ctx, req, true)
			if err != nil {
				return said(err)
			}
			if len(out) != 1 || out[0].Block == nil {
				return doneMsg{blockNote(out, "")}
			}
			b := out[0].Block
			lasts := span(b.Until.Sub(b.Since) + time.Second - 1) // the end has no fraction, the beginning has
			text := fmt.Sprintf("Block %s for %s, until %s?", p, lasts, b.Until.Local().Format("15:04:05"))
			if b.Observed {
				text = fmt.Sprintf("Note a block of %s for %s? In mode: observe nothing is dropped.", p, lasts)
			}
			if note := out[0].Note; note != "" {
				text += " Note: " + clean(note) + "."
			}
			return askMsg{question{text, make}, pressed}
		})
	case "u":
		m.ask = &question{fmt.Sprintf("Lift the block of %s and every block inside it?", p), within(func(ctx context.Context) tea.Msg {
			lifted, err := m.daemon.Unblock(ctx, p, "")
			if err != nil {
				return said(err)
			}
			return doneMsg{liftedNote(lifted, p.String()+" is not blocked")}
		})}
	case "a":
		m.ask = &question{fmt.Sprintf("Never block %s again, and free it now?", p), within(func(ctx context.Context) tea.Msg {
			lifted, err := m.daemon.Allow(ctx, store.AllowEntry{Prefix: p, Note: "in top"})
			if err != nil {
				return said(err)
			}
			return doneMsg{p.String() + " is allowed; " + liftedNote(lifted, "no block had to be lifted")}
		})}
	case "e", "enter":
		return within(func(ctx context.Context) tea.Msg {
			x, err := m.daemon.Explain(ctx, p)
			if err != nil {
				return said(err)
			}
			var b strings.Builder
			showExplanation(&b, x)
			return explainMsg{p, b.String()}
		})
	}
	return nil
}

func blockNote(out []guard.BlockOutcome, done string) string {
	if len(out) != 1 {
		return "the daemon did not say what became of it"
	}
	o := out[0]
	switch {
	case o.Refused != "" && o.Hint != "":
		return fmt.Sprintf("%s is not blocked: %s (%s)", o.Prefix, o.Refused, o.Hint)
	case o.Refused != "":
		return fmt.Sprintf("%s is not blocked: %s", o.Prefix, o.Refused)
	case o.Error != "":
		return fmt.Sprintf("%s: %s", o.Prefix, o.Error)
	case o.Block != nil && o.Block.Observed:
		return o.Prefix.String() + " is noted; mode: observe drops nothing"
	}
	return o.Prefix.String() + " " + done
}

func liftedNote(lifted []store.Block, none string) string {
	if len(lifted) > 0 && partsOf(lifted[0], lifted) > 0 {
		return "the rest of " + lifted[0].Whole().String() + " stays blocked"
	}
	switch len(lifted) {
	case 0:
		return none
	case 1:
		return "lifted " + lifted[0].Prefix.String()
	}
	return fmt.Sprintf("lifted %s and %d more", lifted[0].Prefix, len(lifted)-1)
}

func (m *top) View() tea.View {
	v := tea.NewView(m.picture(true))
	v.AltScreen = true
	v.WindowTitle = "smtpguard top"
	return v
}
