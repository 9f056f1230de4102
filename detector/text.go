package detector

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

var (
	kindNames = [...]string{"none", "tick", "opened", "closed", "refused", "accepted", "authenticated",
		"auth-failed", "daemon-started", "sampled"}
	reasonNames = [...]string{"unknown", "full", "per-host", "load", "policy",
		"quit", "lost", "timeout", "dropped", "rejected", "killed", "vanished"}
	metricNames = [...]string{"none", "saturation", "opens"}
)

func name(names []string, n uint8, what string) string {
	if int(n) < len(names) {
		return names[n]
	}
	return what + "(" + strconv.Itoa(int(n)) + ")"
}

func number(names []string, text []byte, what string) (uint8, error) {
	for i, s := range names {
		if s == string(text) {
			return uint8(i), nil
		}
	}
	return 0, fmt.Errorf("%s %.40q: want one of %s", what, text, strings.Join(names, ", "))
}

// String is the kind in lower case: "opened", "auth-failed".
func (k Kind) String() string { return name(kindNames[:], uint8(k), "kind") }

// MarshalText is String.
func (k Kind) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (k *Kind) UnmarshalText(text []byte) error {
	n, err := number(kindNames[:], text, "kind")
	*k = Kind(n)
	return err
}

// String is the reason in lower case: "full", "per-host", "quit".
func (r Reason) String() string { return name(reasonNames[:], uint8(r), "reason") }

// MarshalText is String.
func (r Reason) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText reads what MarshalText writes.
func (r *Reason) UnmarshalText(text []byte) error {
	n, err := number(reasonNames[:], text, "reason")
	*r = Reason(n)
	return err
}

// String is "saturation" or "opens".
func (m Metric) String() string { return name(metricNames[:], uint8(m), "metric") }

// MarshalText is String.
func (m Metric) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads what MarshalText writes. There is no metric "none".
func (m *Metric) UnmarshalText(text []byte) error {
	n, err := number(metricNames[1:], text, "metric")
	if err != nil {
		return err
	}
	*m = Metric(n + 1)
	return nil
}

// Sentence says the verdict in words, for explanations, notifications and
// reports. It holds numbers and addresses only, nothing a stranger wrote.
func (v *Verdict) Sentence() string {
	var b strings.Builder
	src := v.Source.String()
	if v.Source.IsSingleIP() {
		src = v.Source.Addr().String()
	}
	b.WriteString(src)
	if v.Sources > 1 {
		fmt.Fprintf(&b, " (%d addresses)", v.Sources)
	}
	switch v.Metric {
	case Opens:
		fmt.Fprintf(&b, " opened %.0f connections in %s (limit %.0f, %s held now)",
			math.Floor(v.Score+epsilon), span(v.Window), v.Threshold, slots(v.Held))
	default:
		when := "while it was full"
		if v.Unproven {
			when = fmt.Sprintf("if it has no more than %d", v.Capacity)
		}
		fmt.Fprintf(&b, " kept %s of the server's slots on average over %s %s (%s of %d held now, %d taken)",
			percent(v.Score), span(v.Window), when, slots(v.Held), v.Capacity, v.Count)
	}
	if len(v.Spared) > 0 {
		fmt.Fprintf(&b, "; not to be blocked as a whole, because %s good from there: ", quantity(v.KnownGood, "sender is known", "senders are known"))
		for i, a := range v.Spared {
			if i > 0 {
				b.WriteString(", ")
			}
			b.WriteString(a.String())
		}
		if more := v.KnownGood - len(v.Spared); more > 0 {
			fmt.Fprintf(&b, " and %d more", more)
		}
	}
	return b.String()
}

func quantity(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return strconv.Itoa(n) + " " + many
}

func slots(n int) string { return quantity(n, "slot", "slots") }

// percent is a share as "41 %", with a decimal below 10 %.
func percent(x float64) string {
	if x < 0.0995 {
		return strconv.FormatFloat(100*x, 'f', 1, 64) + " %"
	}
	return strconv.FormatFloat(100*x, 'f', 0, 64) + " %"
}

// span is a length of time as a person says it: "10 s", "5 min", "90 s".
func span(t time.Duration) string {
	switch {
	case t >= time.Hour && t%time.Hour == 0:
		return fmt.Sprintf("%d h", t/time.Hour)
	case t >= 2*time.Minute && t%time.Minute == 0:
		return fmt.Sprintf("%d min", t/time.Minute)
	default:
		return fmt.Sprintf("%d s", t/time.Second)
	}
}
