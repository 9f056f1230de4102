package abuse

import (
	"fmt"
	"slices"
	"strings"
)

// A mail's recipients are chosen by a lookup or by a person, and Mail.Chosen
// says by whom: no lookup replaces what a person chose. Mail.Hand is wider: who
// last changed the mail or approved it. Such a mail is never approved by the
// program, and never made anew except where what it tells is no longer true.

// choose notes that a person named recipients, and keeps those that a lookup
// had found, for the person who looks at it next.
func (m *Mail) choose(by string) {
	if m.Chosen == "" {
		m.Found = found(m.To, m.Cc)
	}
	m.Chosen = by
}

// found are the recipients that a lookup names.
func found(to, cc Contact) (cs []Contact) {
	for _, c := range []Contact{to, cc} {
		if c.Address != "" && c.Source != byPerson {
			cs = append(cs, c)
		}
	}
	return cs
}

// keepChoice gives a follow-up, or a draft made anew, the recipients that a
// person chose for the mail before it. What the lookup found now is kept beside
// them.
func (m *Mail) keepChoice(prev *Mail) {
	if prev.Chosen == "" {
		return
	}
	m.Found = found(m.To, m.Cc)
	m.To, m.Cc, m.Chosen = prev.To, prev.Cc, prev.Chosen
}

// chosenWarning is in what is said of recipients that a lookup would not name.
const chosenWarning = " chose the recipients; a lookup names "

// warnChosen says where a person's choice differs from what a lookup found.
func (m *Mail) warnChosen() {
	m.Warnings = slices.DeleteFunc(m.Warnings, func(s string) bool { return strings.Contains(s, chosenWarning) })
	if m.Chosen == "" {
		return
	}
	var other []string
	for _, c := range m.Found {
		if !sameAddr(c.Address, m.To.Address) && !sameAddr(c.Address, m.Cc.Address) {
			other = append(other, fmt.Sprintf("%s (of %s, %s)", c.Address, c.Scope, c.Source))
		}
	}
	if len(other) > 0 {
		m.Warnings = append(m.Warnings, clean(m.Chosen, 60)+chosenWarning+strings.Join(other, " and "))
	}
}
