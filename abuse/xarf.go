package abuse

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/mail"
	"regexp"
	"strings"
	"time"
)

// xarfReport is XARF 4.2.0 connection/ddos
// (https://github.com/xarf/xarf-spec, schemas v4), with the extension fields
// source_prefix and later that its core schema allows. peak_pps and peak_bps
// are left out: connections are counted here, not packets.
type xarfReport struct {
	Version          string         `json:"xarf_version"`
	ReportID         string         `json:"report_id"`
	Timestamp        string         `json:"timestamp"`
	Reporter         xarfParty      `json:"reporter"`
	Sender           xarfParty      `json:"sender"`
	SourceIdentifier string         `json:"source_identifier"`
	SourcePort       uint16         `json:"source_port"`
	Category         string         `json:"category"`
	Type             string         `json:"type"`
	EvidenceSource   string         `json:"evidence_source"`
	DestinationIP    string         `json:"destination_ip,omitempty"`
	DestinationPort  uint16         `json:"destination_port,omitempty"`
	Protocol         string         `json:"protocol"`
	AttackVector     string         `json:"attack_vector"`
	FirstSeen        string         `json:"first_seen"`
	LastSeen         string         `json:"last_seen"`
	DurationSeconds  int            `json:"duration_seconds"`
	Threshold        string         `json:"threshold_exceeded,omitempty"`
	Mitigated        bool           `json:"mitigation_applied"`
	Impact           string         `json:"service_impact,omitempty"`
	Confidence       float64        `json:"confidence"`
	Description      string         `json:"description"`
	Evidence         []xarfEvidence `json:"evidence"`
	Tags             []string       `json:"tags"`
	SourceASN        uint32         `json:"source_asn,omitempty"`
	SourcePrefix     string         `json:"source_prefix"`
	SourceCount      int            `json:"source_count"`
	ConnectionCount  int            `json:"connection_count"`
	PeakPerSecond    float64        `json:"peak_connections_per_second,omitempty"`
	IncidentID       string         `json:"incident_id"`
}

type xarfParty struct {
	Org     string `json:"org"`
	Contact string `json:"contact"`
	Domain  string `json:"domain"`
}

type xarfEvidence struct {
	ContentType string `json:"content_type"`
	Description string `json:"description"`
	Payload     string `json:"payload"`
	Hash        string `json:"hash"`
	Size        int    `json:"size"`
}

// xarf makes the XARF report of a mail, or says why there can be none that is
// true and valid.
func (d *Desk) xarf(c *Case, m *Mail) ([]byte, error) {
	f := &m.Facts
	a, err := d.config.sender()
	switch {
	case err != nil:
		return nil, errors.New("reports.from is not set")
	case len(f.Sources) == 0 || f.First.IsZero():
		return nil, errors.New("no connection is known one by one")
	case !f.Sources[0].Prefix.IsSingleIP():
		return nil, errors.New("the sources are not known one by one")
	}
	top := f.Sources[0]
	for _, s := range f.Sources {
		if s.Port != 0 { // the most active one whose port is known
			top = s
			break
		}
	}
	if top.Port == 0 {
		return nil, errors.New("the log holds no source ports; add +incoming_port to Exim's log_selector")
	}
	org := xarfParty{Org: clean(d.org(), 200), Contact: a.Address, Domain: domainOf(a.Address)}
	n, _ := f.addresses()
	p := reported(c)
	x := xarfReport{
		Version: "4.2.0", ReportID: m.ReportID, Timestamp: rfc3339(f.First), Reporter: org, Sender: org,
		SourceIdentifier: top.Prefix.Addr().String(), SourcePort: top.Port, Category: "connection", Type: "ddos",
		EvidenceSource: "traffic_monitoring", Protocol: "tcp", AttackVector: "smtp_connection_flood",
		FirstSeen: rfc3339(f.First), LastSeen: rfc3339(f.Last), DurationSeconds: max(1, int(f.duration().Round(time.Second)/time.Second)),
		Mitigated: !observed(c), Confidence: 0.95,
		SourceASN: m.Origin.AS, SourcePrefix: p.String(), SourceCount: n, ConnectionCount: f.Connections,
		IncidentID: c.ID, Tags: []string{"attack:connection_flood", "service:smtp"},
	}
	if m.Origin.Prefix.IsValid() {
		x.SourcePrefix = m.Origin.Prefix.String()
	}
	if top.Local.IsValid() {
		x.DestinationIP, x.DestinationPort = top.Local.Addr().String(), top.Local.Port()
	}
	if f.Peak > 0 && f.duration() >= f.PeakWindow {
		x.PeakPerSecond = float64(f.Peak) / f.PeakWindow.Seconds()
	}
	if f.Others > 0 {
		x.Impact = "degraded"
	}
	for _, r := range c.live() {
		if r.Verdict != nil {
			x.Threshold = rfc3339(r.Verdict.Time)
			break
		}
	}
	all := "all are in the CSV evidence."
	if f.More.Connections > 0 {
		all = fmt.Sprintf("the most active %d are in the CSV evidence, the others together in one row.", len(f.Sources))
	}
	x.Description = clean(fmt.Sprintf("%s source_identifier is an active address among them; %s", d.what(c, m), all), 1000)
	if len(f.Excerpt) > 0 {
		x.Evidence = append(x.Evidence, evidence("text/plain", fmt.Sprintf("mail server log excerpt, UTC, %d lines made of parsed fields", len(f.Excerpt)), evidenceText(f)))
	}
	x.Evidence = append(x.Evidence, evidence("text/csv", "per-source summary, UTC", csvText(c, f)))
	if err := x.check(); err != nil {
		return nil, fmt.Errorf("it would not be valid: %w", err)
	}
	return json.MarshalIndent(x, "", "  ")
}

func rfc3339(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05Z") }

func evidence(ctype, description, text string) xarfEvidence {
	sum := sha256.Sum256([]byte(text))
	return xarfEvidence{ctype, description, base64.StdEncoding.EncodeToString([]byte(text)), "sha256:" + hex.EncodeToString(sum[:]), len(text)}
}

func evidenceText(f *Facts) string {
	var b strings.Builder
	for _, e := range f.Excerpt {
		b.WriteString(f.line(e) + "\n")
	}
	return b.String()
}

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`)

// check is what the schemas of core and type ask of these fields.
func (x *xarfReport) check() error {
	const item, all = 5 << 20, 15 << 20
	total := 0
	for _, e := range x.Evidence {
		if total += e.Size; e.Size > item || len(e.Description) > 500 {
			return fmt.Errorf("an evidence item of %d bytes", e.Size)
		}
	}
	_, mailErr := mail.ParseAddress(x.Reporter.Contact)
	switch {
	case !uuidForm.MatchString(x.ReportID):
		return errors.New("report_id is no UUID of version 4")
	case x.Reporter.Org == "" || len(x.Reporter.Org) > 200 || mailErr != nil || checkDomain(x.Reporter.Domain) != nil:
		return errors.New("reporter is not complete")
	case x.SourcePort == 0 || x.DurationSeconds < 1 || len(x.Description) > 1000:
		return errors.New("a number is out of its range")
	case len(x.Evidence) > 50 || total > all:
		return errors.New("too much evidence")
	}
	return nil
}
