package abuse

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net/mail"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A mail is in two records: its case, which has its digest, and its message.
// A message is never overwritten while the case in the store refers to it:
// each new one goes to the other of two places, and counts once the case that
// names that place is written down too.

// mailKey is where the message of a mail is.
func mailKey(c *Case, i int) string {
	key := c.ID + "/" + strconv.Itoa(i)
	if i < len(c.Mails) && c.Mails[i].Second {
		key += "/b"
	}
	return key
}

// stored is the message of the newest mail, nil if there is none: the one
// whose digest the case has, or an error.
func (d *Desk) stored(c *Case) ([]byte, error) {
	m := c.mail()
	if m == nil {
		return nil, nil
	}
	msg, err := d.o.Store.Record(kindMail, mailKey(c, len(c.Mails)-1))
	if err == nil && digest(msg) != m.Digest {
		err = &Refusal{"the mail of " + c.ID + " in the store is not the one that its report tells of", "`smtpguard reports edit " + c.ID + " --format " + string(m.Format) + "` makes a draft of it anew"}
	}
	if err != nil {
		return nil, err
	}
	return msg, nil
}

func digest(msg []byte) string {
	sum := sha256.Sum256(msg)
	return hex.EncodeToString(sum[:])
}

// commit writes a message and its mail, number i of c, down and puts c in
// place of now; after an error all is as it was. d.mu is held.
func (d *Desk) commit(now, c *Case, i int, m Mail, msg []byte) error {
	was := Archive{}
	if i < len(now.Mails) {
		m.Second = !now.Mails[i].Second
		was = now.Mails[i].Archive
	}
	if i < len(c.Mails) {
		c.Mails[i] = m
	} else {
		c.Mails = append(c.Mails, m)
	}
	if err := d.o.Store.SetRecord(kindMail, mailKey(c, i), msg); err != nil {
		return fmt.Errorf("writing the mail of %s down: %w", c.ID, err)
	}
	if err := d.save(c); err != nil {
		return err
	}
	other := *c
	other.Mails = slices.Clone(c.Mails)
	other.Mails[i].Second = !m.Second
	_, _ = d.o.Store.DropRecord(kindMail, mailKey(&other, i)) // or the next one overwrites it
	*now = *c
	d.dropArchive(c, was)
	// The file is a copy for people; the store has the one that is sent.
	if err := writeFile(d.emlPath(c, i), msg); err != nil {
		d.log.Error("the draft is not written as a file", "report", c.ID, "err", err)
	}
	return nil
}

// settings are those that a mail shows to its reader.
func (d *Desk) settings() map[string]string {
	c := &d.config
	return map[string]string{"reports.from": c.From, "reports.return_path": c.ReturnPath, "reports.org": c.Org,
		"reports.phone": c.Phone, "reports.host": c.Host, "reports.follow_up": c.FollowUp.String()}
}

// changed says which settings were others when a draft was made, "" if none.
func (d *Desk) changed(m *Mail) string {
	now := d.settings()
	var words []string
	for _, name := range slices.Sorted(maps.Keys(now)) {
		if was := m.Settings[name]; was != now[name] {
			words = append(words, fmt.Sprintf("%s is %s now and was %s", name, quoted(now[name]), quoted(was)))
		}
	}
	return strings.Join(words, "; ")
}

// remade compares the message of a draft with the one that would be made of it
// now, and says what is different, "" if nothing.
func (d *Desk) remade(c *Case, m Mail, msg []byte) (string, error) {
	was, err := mail.ReadMessage(bytes.NewReader(msg))
	if err != nil {
		return "", err
	}
	date, err := was.Header.Date()
	if err != nil {
		return "", err
	}
	m.Warnings = slices.Clone(m.Warnings)
	d.complete(c, &m)
	// Once it was approved it has another closing sentence, also if it has
	// become a draft again since.
	var again []byte
	for _, auto := range []bool{true, false} {
		for _, by := range []string{Self, ""} {
			if again, err = d.compose(c, &m, by, auto && by != "", date); err != nil || bytes.Equal(again, msg) {
				return "", err
			}
		}
	}
	is, err := mail.ReadMessage(bytes.NewReader(again))
	if err != nil {
		return "", err
	}
	var words []string
	for _, name := range []string{"From", "Reply-To", "To", "Cc", "Subject", "Message-Id", "In-Reply-To"} {
		if a, b := was.Header.Get(name), is.Header.Get(name); a != b {
			words = append(words, fmt.Sprintf("%s would be %s and was %s", name, quoted(b), quoted(a)))
		}
	}
	if len(words) == 0 {
		return "its attachments would be others (another version of smtpguard has made it)", nil
	}
	return strings.Join(words, "; "), nil
}

// asSeen refuses a draft that would not go out as its reader has seen it, and
// has it made anew; d.mu is held.
func (d *Desk) asSeen(now *Case) error {
	m := now.mail()
	again := func(why string) error {
		c := now.clone()
		c.mail().Outdated = true
		if err := d.save(c); err != nil {
			return err
		}
		*now = *c
		d.poke()
		return &Refusal{"what would go out has changed since it was drafted: " + why,
			"it is made anew within a minute; look at it again with `smtpguard reports show " + c.ID + "`"}
	}
	if why := d.changed(m); why != "" {
		return again(why)
	}
	msg, err := d.stored(now)
	if err != nil {
		return err
	}
	why, err := d.remade(now, *m, msg)
	if err != nil {
		return fmt.Errorf("comparing the draft of %s: %w", now.ID, err)
	}
	if why != "" {
		return again(why)
	}
	return nil
}

// compose makes the message of a mail with the text that it has.
func (d *Desk) compose(c *Case, m *Mail, by string, auto bool, at time.Time) ([]byte, error) {
	v := c.of(m)
	m.Without = ""
	if _, err := d.xarf(v, m); err != nil {
		m.Without = err.Error()
	}
	return d.message(v, m, m.Text, by, auto, at)
}
