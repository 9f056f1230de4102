package hook

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
)

// mailer hands mail to the local sendmail program.
type mailer struct {
	c        Config
	sendmail []string
}

func (k *mailer) send(ctx context.Context, m *Message) error {
	argv := append(slices.Clip(k.sendmail), "-i") // a line with a dot is no end
	if k.c.From != "" {
		argv = append(argv, "-f", k.c.From)
	}
	_, err := execute(ctx, append(argv, "--", k.c.Mail), k.mail(m), true)
	return err
}

// subjectMost is about what a telephone shows of a subject, and far below
// what a line of a mail may have (RFC 5322: 998).
const subjectMost = 150

// mail is the message in plain text. Its header has words of our own,
// addresses of sources, and settings of the policy, and nothing else.
func (k *mailer) mail(m *Message) []byte {
	subject := "[" + m.Host + "] " + m.Subject
	if len(subject) > subjectMost {
		subject = subject[:subjectMost-3] + "..."
	}
	var b bytes.Buffer
	line := func(name, value string) {
		fmt.Fprintf(&b, "%s: %s\n", name, strings.Map(func(r rune) rune {
			if r < ' ' || r > '~' {
				return '?'
			}
			return r
		}, value))
	}
	if k.c.From != "" {
		line("From", "smtpguard on "+m.Host+" <"+k.c.From+">")
	}
	line("To", k.c.Mail)
	line("Subject", subject)
	line("Date", m.Time.Format("Mon, 02 Jan 2006 15:04:05 -0700"))
	line("Message-ID", "<"+m.ID+"@"+m.Host+">")
	line("Auto-Submitted", "auto-generated") // RFC 3834: nobody answers by itself
	line("MIME-Version", "1.0")
	line("Content-Type", "text/plain; charset=utf-8")
	line("Content-Transfer-Encoding", "8bit")
	b.WriteString("\n" + m.body())
	return b.Bytes()
}
