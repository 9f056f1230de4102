package guard

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/allow"
	"github.com/smtpguard/smtpguard/policy"
)

// A policy that begins to enforce and names somebody new on its allowlist: what
// was asked for by hand becomes real when it is known whom that name stands
// for, or that nobody says so in time; not a moment earlier.
func TestByHandWaitsForNewNames(t *testing.T) {
	const name = "dns:mx.example.org"
	for _, how := range []string{"reload", "restart", "reload, and back again"} {
		for _, dns := range []struct {
			late time.Duration
			knew string // what the filter holds in the end
		}{{3 * time.Second, around7}, {time.Hour, "203.0.113.0/24"}} {
			t.Run(how+" "+dns.late.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t, func(p *policy.Policy) { p.Mode = policy.Observe })
					z := &zone{late: dns.late}
					z.set("mx.example.org", "203.0.113.7")
					w.dns(z)
					stop := w.run()
					defer func() { stop() }()
					w.k.open("203.0.113.7", 3)
					w.block("203.0.113.0/24", 24*time.Hour)

					observe, p := w.policy, *w.policy
					p.Mode = policy.Enforce
					p.AllowNames = []policy.AllowName{{Name: allow.Name(name), Why: "policy.yaml:3:4"}}
					w.policy = &p
					if how == "restart" {
						stop()
						w.start()
						stop = w.run() // waits itself
					} else if _, err := w.g.Reload(t.Context(), &p); err != nil {
						t.Fatal(err)
					} else {
						w.want("")
						time.Sleep(dns.late/2 + time.Second)
						if dns.late < nameGrace {
							w.want("")
						}
					}
					if how == "reload, and back again" {
						if _, err := w.g.Reload(t.Context(), observe); err != nil {
							t.Fatal(err)
						}
						dns.knew = ""
						if dns.late > nameGrace {
							return // it was taken up before
						}
					}
					time.Sleep(2 * nameGrace)
					w.want(dns.knew)
					if left := w.k.left(); dns.knew != "203.0.113.0/24" && left != 3 {
						t.Errorf("%d of 3 connections of an allowed source are left", left)
					}
				})
			})
		}
	}
}
