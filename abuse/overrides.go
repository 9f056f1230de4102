package abuse

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Override is what a person knows better of an AS or a network.
type Override struct {
	AS     uint32       // 0: Prefix counts
	Prefix netip.Prefix // the narrowest that contains the source wins, and any of these before AS
	// Address is whom to write to; empty: as looked up.
	Address string
	// Never: nothing is ever sent there.
	Never  bool
	Format Format // empty: as configured
	Form   string // a web form that the desk prefers
	Note   string
}

// ParseOverrides reads an overrides file: one AS or prefix a line and what is
// known of it, # begins a comment.
//
//	AS64500          abuse@as64500.example  format=text
//	198.51.100.0/24  never                  note=ours
//	AS64501          form=https://abuse.as64501.example/
//
// Every line that is wrong is in the error; the others are returned.
func ParseOverrides(text []byte) ([]Override, error) {
	var all []Override
	var faults []error
	sc := bufio.NewScanner(bytes.NewReader(text))
	for n := 1; sc.Scan(); n++ {
		line, _, _ := strings.Cut(sc.Text(), "#")
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		o, err := parseOverride(f)
		if err != nil {
			faults = append(faults, fmt.Errorf("line %d: %w", n, err))
			continue
		}
		all = append(all, o)
	}
	if err := sc.Err(); err != nil {
		faults = append(faults, err)
	}
	return all, errors.Join(faults...)
}

func parseOverride(f []string) (o Override, err error) {
	if n, ok := asNumber(f[0]); ok && len(f[0]) > 2 && (f[0][0] == 'A' || f[0][0] == 'a') {
		o.AS = n
	} else if o.Prefix, err = netip.ParsePrefix(f[0]); err != nil {
		return o, fmt.Errorf("%s is neither an AS number (AS64500) nor a prefix", quoted(f[0]))
	}
	o.Prefix = o.Prefix.Masked()
	for i, w := range f[1:] {
		key, value, isPair := strings.Cut(w, "=")
		switch {
		case w == "never":
			o.Never = true
		case isPair && key == "format":
			switch o.Format = Format(value); o.Format {
			case Mixed, XARF, XARF02, Text:
			default:
				return o, fmt.Errorf("unknown format %s", quoted(value))
			}
		case isPair && key == "form":
			u, err := url.Parse(value)
			if err != nil || u.Scheme != "https" || u.Host == "" {
				return o, fmt.Errorf("%s is not an https address", quoted(value))
			}
			o.Form = clean(value, 300)
		case isPair && key == "note": // the rest of the line
			o.Note = clean(strings.Join(append([]string{value}, f[i+2:]...), " "), 200)
			return o, nil
		default:
			if o.Address, err = CheckAddress(w); err != nil {
				return o, err
			}
		}
	}
	return o, nil
}

// desks are forms that large networks ask reporters to use; shown beside
// the contact, never used by the program.
var desks = map[uint32]string{
	16509:  "https://support.aws.amazon.com/#/contacts/report-abuse",
	14618:  "https://support.aws.amazon.com/#/contacts/report-abuse",
	15169:  "https://support.google.com/code/contact/cloud_platform_report",
	396982: "https://support.google.com/code/contact/cloud_platform_report",
	8075:   "https://msrc.microsoft.com/report/abuse",
	16276:  "https://www.ovhcloud.com/en/abuse/",
	24940:  "https://abuse.hetzner.com/",
	13335:  "https://abuse.cloudflare.com/",
}

// of is what the override is about, as it stands in the file.
func (o *Override) of() string {
	if o.Prefix.IsValid() {
		return o.Prefix.String()
	}
	return "AS" + strconv.FormatUint(uint64(o.AS), 10)
}

// contact is the address of the override, which a person named; as one of an
// AS it counts for what the AS announces.
func (o *Override) contact(announced netip.Prefix, now time.Time) Contact {
	c := Contact{Address: o.Address, Scope: o.of(), Source: overridesSource, At: now, Role: "abuse", Note: o.Note}
	if o.Prefix.IsValid() {
		announced = o.Prefix
	}
	return c.ofNet(announced)
}

// overridesSource is the source of contacts that stand in the overrides file.
const overridesSource = "overrides file"

// findOverride is the override of a network whose origin is as: the one of the
// narrowest network around it, then the one of the AS; nil if there is none.
func findOverride(all []Override, as uint32, p netip.Prefix) *Override {
	var best *Override
	for i := range all {
		o := &all[i]
		if o.Prefix.IsValid() && o.Prefix.Contains(p.Addr()) && o.Prefix.Bits() <= p.Bits() && (best == nil || o.Prefix.Bits() >= best.Prefix.Bits()) {
			best = o
		}
	}
	if best != nil {
		return best
	}
	for i := range all {
		if o := &all[i]; o.AS != 0 && o.AS == as {
			best = o // the last one counts
		}
	}
	return best
}

// findNever is the override by which a network is never reported: its own, as
// findOverride has it for any of its origins, or that of a part of it.
func findNever(all []Override, ases []uint32, p netip.Prefix) *Override {
	for i := range all {
		if o := &all[i]; o.Never && o.Prefix.IsValid() && p.Contains(o.Prefix.Addr()) && o.Prefix.Bits() >= p.Bits() {
			return o
		}
	}
	for _, as := range append([]uint32{0}, ases...) {
		if o := findOverride(all, as, p); o != nil && o.Never {
			return o
		}
	}
	return nil
}
