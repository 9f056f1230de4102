package main

import (
	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/abuse"
)

// reportsReopen takes back a withdrawal. Another report may have gathered what
// came from the network since: that one goes on.
func (e *env) reportsReopen(c *cli.Context) error {
	return e.onReport(c, func(r openReports, id string) (abuse.Case, string, error) {
		k, err := r.ReopenReport(c.Context, id, operator())
		what := "is " + string(k.State) + " again"
		if k.State == abuse.Held {
			what = "has gathered since, and is drafted now"
		}
		return k, what, err
	})
}
