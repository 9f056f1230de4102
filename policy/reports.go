package policy

import (
	"net/mail"
	"slices"
	"strings"
	"time"
)

// YesNo is a switch.
type YesNo string

const (
	Yes YesNo = "yes"
	No  YesNo = "no"
)

// ReportsMode says how far an abuse report goes by itself.
type ReportsMode string

const (
	ReportsOff   ReportsMode = "off"   // no cases, no drafts
	ReportsDraft ReportsMode = "draft" // drafts; a person approves each
	ReportsAuto  ReportsMode = "auto"  // those that pass reports.auto go out by themselves
)

// Reports says what becomes of abuse reports. The names are those of package
// abuse, which has the meaning of each.
type Reports struct {
	Mode ReportsMode
	// From is a mailbox, "" if none is named: then nothing is sent and nobody
	// is asked.
	From             string
	Org, Phone, Host string
	ReturnPath       string
	CopyNetwork      YesNo
	Format           string // mixed, xarf, x-arf-0.2 or text
	Overrides        string // absolute, or ""
	ASNDatabase      string // absolute, or ""
	Dir              string // absolute
	Lookup           ReportsLookup
	Threshold        ReportsThreshold
	Caps             ReportsCaps
	Auto             ReportsAutoSend
	Delivery         ReportsDelivery
	Quiet            time.Duration
	FollowUp         time.Duration
	MaxFollowUps     int
	Baseline         time.Duration
	Withdrawn        time.Duration
	Keep             time.Duration
	Redirect         string
}

// ReportsLookup says who is asked for the contact of a network.
type ReportsLookup struct {
	Online          YesNo
	Sources         []string
	Each, Total     time.Duration
	IPinfoTokenFile string // absolute, or ""
	DNS             string // "address:port", or ""
}

// ReportsThreshold says what is worth a report.
type ReportsThreshold struct {
	Connections, Held int
	Settle            time.Duration
}

// ReportsCaps bound how much is sent.
type ReportsCaps struct {
	Recipient         time.Duration
	Hour, Day, Drafts int
}

// ReportsAutoSend is what a report must have to go out by itself.
type ReportsAutoSend struct{ Connections, Blocks int }

// ReportsDelivery says how mail leaves.
type ReportsDelivery struct {
	By                         string // sendmail or smtp
	Program                    string // absolute
	Server, User, PasswordFile string
	Timeout                    time.Duration
}

func defaultReports() Reports {
	return Reports{
		Mode: ReportsDraft, CopyNetwork: Yes, Format: "mixed", Dir: "/var/lib/smtpguard/reports",
		Lookup: ReportsLookup{Online: Yes, Sources: slices.Clone(reportSources),
			Each: 5 * time.Second, Total: 25 * time.Second},
		Threshold: ReportsThreshold{Connections: 100, Held: 10, Settle: 10 * time.Minute},
		Caps:      ReportsCaps{Recipient: day, Hour: 5, Day: 20, Drafts: 20},
		Auto:      ReportsAutoSend{Connections: 1000, Blocks: 2},
		Delivery:  ReportsDelivery{By: "sendmail", Program: "/usr/sbin/sendmail", Timeout: time.Minute},
		Quiet:     day, FollowUp: day, MaxFollowUps: 2, Baseline: week, Withdrawn: 30 * day, Keep: 90 * day,
	}
}

var reportSources = []string{"ripestat", "cymru", "ipinfo", "rdap", "abusix"}

func reportsSchema(r *Reports) mapping {
	return mapping{
		{name: "mode", codec: word(&r.Mode, ReportsDraft, ReportsAuto, ReportsOff)},
		{name: "from", codec: text(&r.From, `a mailbox, as in "Example Mail abuse desk <abuse@example.net>"`, checkMailbox)},
		{name: "org", codec: text(&r.Org, "a name", checkWords)},
		{name: "phone", codec: text(&r.Phone, "a telephone number", checkWords)},
		{name: "host", codec: text(&r.Host, "a host name", checkWords)},
		{name: "return_path", codec: text(&r.ReturnPath, `an address, as in "abuse+{token}@example.net"`, func(s string) *fault {
			return checkAddress(strings.Replace(s, "{token}", "token", 1))
		})},
		{name: "copy_network", codec: word(&r.CopyNetwork, Yes, No)},
		{name: "format", codec: word(&r.Format, "mixed", "xarf", "x-arf-0.2", "text")},
		{name: "overrides", codec: text(&r.Overrides, "the path of a file", orEmpty(checkPath))},
		{name: "asn_database", codec: text(&r.ASNDatabase, "the path of a file", orEmpty(checkPath))},
		{name: "dir", codec: text(&r.Dir, "the path of a directory", checkPath)},
		{name: "lookup", codec: mapping{
			{name: "online", codec: word(&r.Lookup.Online, Yes, No)},
			{name: "sources", codec: flow{list[string]{p: &r.Lookup.Sources, what: "a list of sources, as in [ripestat, rdap]", most: 5,
				elem: func(p *string) codec { return word(p, reportSources...) }, check: noneTwice[string]}}},
			{name: "each", codec: span(&r.Lookup.Each, time.Second, time.Minute)},
			{name: "total", codec: span(&r.Lookup.Total, time.Second, 5*time.Minute)},
			{name: "ipinfo_token_file", codec: text(&r.Lookup.IPinfoTokenFile, "the path of a file", orEmpty(checkPath))},
			{name: "dns", codec: text(&r.Lookup.DNS, `an address with a port, or ""`, checkWords)},
		}},
		{name: "threshold", codec: mapping{
			{name: "connections", codec: whole(&r.Threshold.Connections, 1, 1_000_000_000)},
			{name: "held", codec: whole(&r.Threshold.Held, 1, 1_000_000)},
			{name: "settle", codec: span(&r.Threshold.Settle, time.Second, day)},
		}},
		{name: "caps", codec: mapping{
			{name: "recipient", codec: span(&r.Caps.Recipient, time.Minute, 30*day)},
			{name: "hour", codec: whole(&r.Caps.Hour, 1, 1000)},
			{name: "day", codec: whole(&r.Caps.Day, 1, 10_000)},
			{name: "drafts", codec: whole(&r.Caps.Drafts, 1, 10_000)},
		}},
		{name: "auto", codec: mapping{
			{name: "connections", codec: whole(&r.Auto.Connections, 1, 1_000_000_000)},
			{name: "blocks", codec: whole(&r.Auto.Blocks, 1, 1_000_000)},
		}},
		{name: "delivery", codec: mapping{
			{name: "by", codec: word(&r.Delivery.By, "sendmail", "smtp")},
			{name: "program", codec: text(&r.Delivery.Program, "the path of a program", checkPath)},
			{name: "server", codec: text(&r.Delivery.Server, "a server with a port, as in mail.example.net:587", checkWords)},
			{name: "user", codec: text(&r.Delivery.User, "a name", checkWords)},
			{name: "password_file", codec: text(&r.Delivery.PasswordFile, "the path of a file", orEmpty(checkPath))},
			{name: "timeout", codec: span(&r.Delivery.Timeout, time.Second, 10*time.Minute)},
		}},
		{name: "quiet", codec: span(&r.Quiet, time.Minute, 30*day)},
		{name: "follow_up", codec: span(&r.FollowUp, time.Hour, 30*day)},
		{name: "max_follow_ups", codec: whole(&r.MaxFollowUps, 0, 5)},
		{name: "baseline", codec: span(&r.Baseline, 0, 31*day)},
		{name: "withdrawn", codec: span(&r.Withdrawn, time.Hour, 3650*day)},
		{name: "keep", codec: span(&r.Keep, day, 3650*day)},
		{name: "redirect", codec: text(&r.Redirect, "a mail address", checkAddress)},
	}
}

func orEmpty(check func(string) *fault) func(string) *fault {
	return func(s string) *fault {
		if s == "" {
			return nil
		}
		return check(s)
	}
}

// checkWords wants what fits into one line of a mail.
func checkWords(s string) *fault {
	if len(s) > 200 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return faultf("want at most 200 printable characters", "%s cannot stand in a mail", quote(s))
	}
	return nil
}

func checkAddress(s string) *fault {
	if s == "" {
		return nil
	}
	if a, err := mail.ParseAddress(s); err != nil || a.Address != s {
		return faultf("want local@domain", "%s is not a mail address", quote(s))
	}
	return nil
}

func checkMailbox(s string) *fault {
	if s == "" {
		return nil
	}
	if f := checkWords(s); f != nil {
		return f
	}
	if _, err := mail.ParseAddress(s); err != nil {
		return faultf(`want "NAME <local@domain>"`, "%s is not a mailbox", quote(s))
	}
	return nil
}
