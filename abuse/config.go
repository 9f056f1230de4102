package abuse

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Mode says how far a report goes by itself.
type Mode string

const (
	Off   Mode = "off"   // no cases, no drafts
	Draft Mode = "draft" // drafts are made; a person approves each
	Auto  Mode = "auto"  // drafts that pass Config.Auto are approved by the program
)

// Format is the container of a report.
type Format string

const (
	// Mixed is multipart/mixed: the text, evidence.txt, sources.csv and, if it
	// can be truthful and valid, xarf.json.
	Mixed Format = "mixed"
	// XARF is multipart/report with Feedback-Type xarf, as
	// https://xarf.org/docs/email-transport/ has it; it becomes Mixed where
	// there is no valid XARF.
	XARF Format = "xarf"
	// XARF02 is X-ARF 0.2, multipart/mixed with a YAML report.txt.
	XARF02 Format = "x-arf-0.2"
	// Text is one text/plain part.
	Text Format = "text"
)

// Delivery says how mail leaves.
type Delivery string

const (
	Sendmail Delivery = "sendmail" // the local sendmail program
	SMTP     Delivery = "smtp"     // submission to a server
)

// Names of lookup sources, in the order in which they are believed.
const (
	RIPEstat = "ripestat" // origin, prefix, contacts
	Cymru    = "cymru"    // origin and prefix by DNS
	IPinfo   = "ipinfo"   // origin, and more by plan
	RDAP     = "rdap"     // contacts
	Abusix   = "abusix"   // contacts by DNS
)

// Config is every setting of the reports. Start from DefaultConfig; the zero
// Config has Mode "" and is refused by Check.
type Config struct {
	Mode Mode
	// From is the mailbox that reports come from, "NAME <local@domain>"; a
	// real one that a person reads. Empty: drafts are made, nothing is sent.
	From string
	// Org, Phone and Host are named in the mail: who we are, how we can be
	// called, and the name of the mail server that was hit. Org is From's
	// name if empty; the others are left out.
	Org, Phone, Host string
	// ReturnPath is where bounces and answers go. "{token}" in it becomes a
	// secret of the case, as in "abuse+{token}@example.net"; empty is From.
	ReturnPath string
	// CopyNetwork also writes to the contact of the address block if that is
	// another one than that of the AS.
	CopyNetwork bool
	Format      Format
	// Overrides is a file of contacts that a person knows better; see
	// ParseOverrides. Empty: none.
	Overrides string
	// ASNDatabase is a file in MaxMind DB format: GeoLite2-ASN, IPinfo Lite,
	// DB-IP ASN Lite. Empty: none.
	ASNDatabase string
	// Dir is where drafts and evidence are written as files, absolute.
	Dir string

	Lookup    Lookup
	Threshold Threshold
	Caps      Caps
	Auto      AutoSend
	Delivery  Transport

	// Quiet is how long no block must have come before a case takes no more.
	Quiet time.Duration
	// FollowUp is how long after a mail a flood must still go on before
	// another one is drafted; MaxFollowUps is how many of those there can be.
	FollowUp     time.Duration
	MaxFollowUps int
	// Baseline is how far back the log is read for the normal level; 0: not.
	Baseline time.Duration
	// Withdrawn is how long a person's withdrawal keeps the network of a report
	// from being reported by itself.
	Withdrawn time.Duration
	// Keep is how long closed cases and their evidence are kept.
	Keep time.Duration
	// Redirect sends every mail to this address instead, for a trial. Only
	// then are reserved and private sources reported too.
	Redirect string

	// Log is what the mail server's log holds, for Advice only; nil: not known.
	Log *LogHolds
}

// LogHolds says what every line of a log has.
type LogHolds struct {
	Ports bool // of the sources
	Zone  bool // of the times
}

// Lookup says who is asked for origin, prefix and contact. Nothing is looked
// up before a draft is made.
type Lookup struct {
	// Online false asks nobody: the draft says "not looked up". Nor is anybody
	// asked as long as From is not set, for nothing could be sent.
	Online bool
	// Sources that may be asked: RIPEstat, Cymru, IPinfo, RDAP, Abusix.
	Sources []string
	// Each bounds one question, Total all of one draft.
	Each, Total time.Duration
	// IPinfoToken is optional.
	IPinfoToken string
	// DNS is a resolver "address:port" to ask instead of the system's.
	DNS string
}

// Threshold says what is worth a report: a case has to reach Connections or
// Held.
type Threshold struct {
	// Connections is how many the sources of the case opened in all.
	Connections int
	// Held is how many slots they held at the time of a verdict.
	Held int
	// Settle is how long after its last block a case waits for more before
	// its draft is made; after four times that it is made in any case.
	Settle time.Duration
}

// Caps bound how much is sent. What is over a cap is held, not dropped.
type Caps struct {
	// Recipient is how long no second mail goes to a recipient.
	Recipient time.Duration
	// Hour and Day bound all mails.
	Hour, Day int
	// Drafts bounds the drafts (and with them the lookups) of a day.
	Drafts int
}

// AutoSend is what a draft must have in Mode Auto beside an undisputed
// contact of abuse role.
type AutoSend struct {
	Connections int // at least this many
	Blocks      int // in at least this many blocks
}

// Transport is how mail is handed over.
type Transport struct {
	By Delivery
	// Program is the sendmail program, absolute. Before is what its command
	// line begins with, absolute; empty: nothing.
	Program string
	Before  []string
	// Server is "host:port" for SMTP; TLS is required of it (STARTTLS, or from
	// the beginning on port 465) unless it is a loopback address, whose
	// certificate is not looked at. User may be empty; the password is the
	// first line of PasswordFile.
	Server, User, PasswordFile string
	// Timeout bounds one handover. One that takes longer is doubtful.
	Timeout time.Duration
}

// DefaultConfig is what an empty `reports:` section gives.
func DefaultConfig() Config {
	return Config{
		Mode:        Draft,
		CopyNetwork: true,
		Format:      Mixed,
		Dir:         "/var/lib/smtpguard/reports",
		Lookup: Lookup{Online: true, Sources: []string{RIPEstat, Cymru, IPinfo, RDAP, Abusix},
			Each: 5 * time.Second, Total: 25 * time.Second},
		Threshold:    Threshold{Connections: 100, Held: 10, Settle: 10 * time.Minute},
		Caps:         Caps{Recipient: 24 * time.Hour, Hour: 5, Day: 20, Drafts: 20},
		Auto:         AutoSend{Connections: 1000, Blocks: 2},
		Delivery:     Transport{By: Sendmail, Program: "/usr/sbin/sendmail", Timeout: time.Minute},
		Quiet:        24 * time.Hour,
		FollowUp:     24 * time.Hour,
		MaxFollowUps: 2,
		Baseline:     7 * 24 * time.Hour,
		Withdrawn:    30 * 24 * time.Hour,
		Keep:         90 * 24 * time.Hour,
	}
}

// Check returns every fault of the configuration, joined.
func (c Config) Check() error {
	var faults []error
	bad := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if c.Mode != Off && c.Mode != Draft && c.Mode != Auto {
		bad("reports.mode: unknown value %q", c.Mode)
	}
	if c.From != "" {
		if _, err := c.sender(); err != nil {
			bad("reports.from: %w", err)
		}
	} else if c.Mode == Auto {
		bad("reports.from: nothing can be sent by itself without it")
	}
	if c.ReturnPath != "" {
		if _, err := CheckAddress(strings.Replace(c.ReturnPath, tokenMark, "token", 1)); err != nil {
			bad("reports.return_path: %w", err)
		}
	}
	if c.Redirect != "" {
		if _, err := CheckAddress(c.Redirect); err != nil {
			bad("reports.redirect: %w", err)
		}
	}
	switch c.Format {
	case Mixed, XARF, XARF02, Text:
	default:
		bad("reports.format: unknown value %q", c.Format)
	}
	if !filepath.IsAbs(c.Dir) {
		bad("reports.dir: %q is not an absolute path", c.Dir)
	}
	for _, s := range c.Lookup.Sources {
		if !slices.Contains([]string{RIPEstat, Cymru, IPinfo, RDAP, Abusix}, s) {
			bad("reports.lookup.sources: unknown source %q", s)
		}
	}
	if c.Lookup.DNS != "" {
		if _, _, err := net.SplitHostPort(c.Lookup.DNS); err != nil {
			bad("reports.lookup.dns: %w", err)
		}
	}
	for name, d := range map[string]time.Duration{"lookup.each": c.Lookup.Each, "lookup.total": c.Lookup.Total,
		"threshold.settle": c.Threshold.Settle, "caps.recipient": c.Caps.Recipient, "delivery.timeout": c.Delivery.Timeout,
		"quiet": c.Quiet, "follow_up": c.FollowUp, "withdrawn": c.Withdrawn, "keep": c.Keep} {
		if d <= 0 {
			bad("reports.%s: must be more than 0", name)
		}
	}
	if c.Baseline < 0 || c.Baseline > 31*24*time.Hour {
		bad("reports.baseline: must be 0 to 31 days")
	}
	for name, n := range map[string]int{"caps.hour": c.Caps.Hour, "caps.day": c.Caps.Day, "caps.drafts": c.Caps.Drafts,
		"threshold.connections": c.Threshold.Connections, "threshold.held": c.Threshold.Held} {
		if n < 1 {
			bad("reports.%s: must be 1 or more", name)
		}
	}
	if c.MaxFollowUps < 0 || c.MaxFollowUps > 5 {
		bad("reports.max_follow_ups: must be 0 to 5")
	}
	switch c.Delivery.By {
	case Sendmail:
		if !filepath.IsAbs(c.Delivery.Program) {
			bad("reports.delivery.program: %q is not an absolute path", c.Delivery.Program)
		}
	case SMTP:
		if _, _, err := net.SplitHostPort(c.Delivery.Server); err != nil {
			bad("reports.delivery.server: %w", err)
		}
	default:
		bad("reports.delivery.by: unknown value %q", c.Delivery.By)
	}
	slices.SortFunc(faults, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(faults...)
}

// tokenMark in ReturnPath becomes the token of a case.
const tokenMark = "{token}"

// CheckFiles returns every fault of the files that the configuration names,
// joined: those that are not there, cannot be read, or hold something else.
func (c Config) CheckFiles() error {
	if c.Mode == Off {
		return nil
	}
	var faults []error
	bad := func(name string, err error) {
		if err != nil {
			faults = append(faults, fmt.Errorf("reports.%s: %w", name, err))
		}
	}
	if c.ASNDatabase != "" {
		bad("asn_database", (&database{path: c.ASNDatabase}).open())
	}
	_, err := (&overridesFile{path: c.Overrides}).read()
	bad("overrides", err)
	if c.From != "" && c.Delivery.By == Sendmail {
		_, err := exec.LookPath(c.Delivery.Program)
		bad("delivery.program", err)
	}
	if c.From != "" && c.Delivery.By == SMTP && c.Delivery.User != "" {
		_, err := readBounded(c.Delivery.PasswordFile, 4096)
		bad("delivery.password_file", err)
	}
	return errors.Join(faults...)
}

// oldDatabase is when an ASN database no longer says who announces what.
const oldDatabase = 90 * 24 * time.Hour

// Advice names what keeps reports from being as good as they could be, worst
// first, a sentence each, for `doctor`. Nothing is said where reports are off.
func (c Config) Advice() []string {
	if c.Mode == Off {
		return nil
	}
	var a []string
	say := func(format string, args ...any) { a = append(a, fmt.Sprintf(format, args...)) }
	if c.From == "" {
		say("reports.from is not set: drafts are made, but nobody is asked for contacts and nothing can be sent")
	} else if s, err := c.sender(); err != nil {
		say("reports.from: %v", err)
	} else if why := unreal(domainOf(s.Address)); why != "" {
		say("reports.from is %s, and %s: answers of abuse desks will not arrive", s.Address, why)
	}
	switch {
	case c.Log == nil:
		say("it is not known whether the mail server logs source ports and time zones: reports need log_selector = +incoming_port +incoming_interface and log_timezone = true in Exim")
	default:
		if !c.Log.Ports {
			say("the log holds no source ports: add +incoming_port (and +incoming_interface) to Exim's log_selector; without them there is no XARF part, and networks behind NAT cannot find the customer")
		}
		if !c.Log.Zone {
			say("the log's times have no zone: set log_timezone = true in Exim; until then they are read in the zone of the policy, and the hour that comes twice in autumn is a guess")
		}
	}
	var db *database
	if c.ASNDatabase != "" {
		db = &database{path: c.ASNDatabase}
	}
	switch {
	case db == nil:
		say("reports.asn_database is not set: cases are gathered by /24 and /48 until their network is looked up, and nobody knows an AS while lookups fail")
	default:
		if err := db.open(); err != nil {
			say("reports.asn_database: %v", err)
		} else if built := db.r.Metadata.BuildTime(); time.Since(built) > oldDatabase {
			say("reports.asn_database is of %s: networks change hands, fetch a newer one", built.UTC().Format("2006-01-02"))
		}
	}
	if _, err := (&overridesFile{path: c.Overrides}).read(); err != nil {
		say("%v: nothing is sent until it is mended", err)
	}
	if !c.Lookup.Online {
		say("reports.lookup.online is off: contacts come from the overrides file only")
	}
	if !strings.Contains(c.ReturnPath, tokenMark) {
		say("reports.return_path has no {token}: bounces are told apart by their Message-ID only")
	}
	if c.Redirect != "" {
		say("reports.redirect is set: every report goes to %s and none to a desk", c.Redirect)
	}
	return a
}

// unreal says why mail to a domain arrives nowhere: the names that RFC 2606 and
// RFC 6762 keep free, and what hosts are called that nobody named.
func unreal(domain string) string {
	top := domain[strings.LastIndexByte(domain, '.')+1:]
	second := domain[strings.LastIndexByte(strings.TrimSuffix(domain, "."+top), '.')+1:]
	switch {
	case slices.Contains([]string{"example", "invalid", "test", "localhost", "local", "localdomain", "internal", "lan", "home"}, top):
		return "no name on the Internet ends in ." + top
	case second == "example.com" || second == "example.net" || second == "example.org":
		return second + " is for documentation"
	}
	return ""
}
