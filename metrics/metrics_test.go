package metrics

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"github.com/prometheus/common/expfmt"
	"go.yaml.in/yaml/v4"

	"github.com/smtpguard/smtpguard/abuse"
	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/hook"
)

var update = flag.Bool("update", false, "write the table of docs/metrics.md anew")

// full are metrics with something in each.
func full() *Metrics {
	m := New(Sources{Version: "1.2",
		Reports: func() []abuse.Brief {
			return []abuse.Brief{{State: abuse.Held}, {State: abuse.Held}, {State: abuse.Sent}}
		},
		Lookups: func() []abuse.LookupCount { return []abuse.LookupCount{{Source: "rdap", Result: "found", Count: 3}} },
		Hooks: func() []hook.Status {
			return []hook.Status{{Name: "ops", Told: 12, Waiting: 3, Sent: 2, Failed: 1, Error: "no"}}
		},
	})
	m.Pulse(guard.Pulse{Time: time.Unix(1_800_000_000, 0), Enforce: true, Capacity: 100, Count: 97, Pressure: 0.97, Saturated: true,
		Holders: []guard.Holder{{Source: netip.MustParseAddr("198.51.100.9"), Held: 60}, {Source: netip.MustParseAddr("2001:db8::1"), Held: 7}},
		Blocks:  map[guard.BlockClass]int{{Bits: 32}: 5, {IPv6: true, Bits: 64, Observed: true}: 1},
		Logs:    []guard.LogStatus{{Path: `/var/log/"exim"` + "\n", Lines: 10, Behind: 4096, LastLine: time.Unix(1_799_999_999, 0)}},
		Usable:  true, Backend: "nftables", Real: true, Agrees: true, Dropped: guard.Dropped{Packets: 17, Bytes: 680},
		Detector: detector.Stats{Opened: 5, Saturated: 90 * time.Second}})
	m.Event(guard.Event{On: guard.OnBlock, Count: 1, Outcome: guard.Blocked, Reason: "hog"})
	m.Event(guard.Event{On: guard.OnUnblock, Count: 700, Outcome: guard.Lifted, Reason: "operator"})
	m.Event(guard.Event{On: guard.OnRefuse, Count: 1, Outcome: guard.Refused, Reason: "per-minute"})
	m.Event(guard.Event{On: guard.OnEnded, Count: 1, Took: 400 * time.Millisecond})
	m.Event(guard.Event{On: guard.OnTamper, Count: 1})
	m.Event(guard.Event{On: guard.OnSaturated, Count: 1})
	return m
}

// text are the numbers as Prometheus reads them, without go_ and process_.
func text(t *testing.T, m *Metrics) string {
	t.Helper()
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "smtpguard_") {
			if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
				t.Fatal(err)
			}
		}
	}
	return b.String()
}

func TestNumbers(t *testing.T) {
	got := text(t, full())
	for _, want := range []string{
		`smtpguard_blocks{family="ipv4",prefix_length="32",state="in_force"} 5`,
		`smtpguard_blocks{family="ipv6",prefix_length="64",state="observed"} 1`,
		`smtpguard_build_info{go="`,
		`smtpguard_decisions_total{outcome="blocked",reason="hog"} 1`,
		`smtpguard_decisions_total{outcome="lifted",reason="operator"} 700`,
		`smtpguard_decisions_total{outcome="refused",reason="max-blocks"} 0`,
		`smtpguard_decisions_total{outcome="refused",reason="per-minute"} 1`,
		`smtpguard_dropped_packets_total 17`,
		`smtpguard_enforcing 1`,
		`smtpguard_events_total{kind="opened"} 5`,
		`smtpguard_hook_messages_total{hook="ops",result="failed"} 1`,
		`smtpguard_log_behind_bytes{log="/var/log/\"exim\"\n"} 4096`,
		`smtpguard_lookups_total{result="found",source="rdap"} 3`,
		`smtpguard_pressure_ratio 0.97`,
		`smtpguard_relief_seconds_bucket{le="0.5"} 1`,
		`smtpguard_reports{state="draft"} 0`,
		`smtpguard_reports{state="held"} 2`,
		`smtpguard_saturated_seconds_total 90`,
		`smtpguard_snapshot_timestamp_seconds 1.8e+09`,
		`smtpguard_source_held_slots{source="198.51.100.9"} 60`,
		`smtpguard_tampers_total 1`,
	} {
		if !strings.Contains(got, "\n"+want) {
			t.Errorf("missing: %s", want)
		}
	}
	if t.Failed() {
		t.Log(got)
	}
	problems, err := promlint.New(strings.NewReader(got)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// Who holds no slots any more has no series, and there are never more than a
// scrape of the last pulse has, whatever came before.
func TestHoldersDisappear(t *testing.T) {
	m := full()
	m.Pulse(guard.Pulse{Holders: []guard.Holder{{Source: netip.MustParseAddr("192.0.2.1"), Held: 1}}})
	got := text(t, m)
	if strings.Contains(got, "198.51.100.9") || strings.Count(got, "source_held_slots{") != 1 {
		t.Error(got)
	}
	for i := range 10_000 {
		m.Event(guard.Event{On: guard.OnBlock, Count: 1, Outcome: guard.Blocked, Reason: fmt.Sprint("rule", i)})
	}
	if n := strings.Count(text(t, m), "decisions_total{"); n > reasonsMost+50 {
		t.Errorf("%d series", n)
	}
	if !strings.Contains(text(t, m), `outcome="blocked",reason="other"} 98`) {
		t.Error("what has no label of its own is not counted")
	}
}

func TestBeforeTheFirstPulse(t *testing.T) {
	got := text(t, New(Sources{}))
	if !strings.Contains(got, "smtpguard_build_info") || strings.Contains(got, "pressure") || strings.Contains(got, "smtpguard_reports") {
		t.Error(got)
	}
}

// known are the numbers with their types, and the series of a histogram.
func known(t *testing.T) map[string]string {
	t.Helper()
	families, err := full().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, f := range families {
		kind := strings.ToLower(f.GetType().String())
		m[f.GetName()] = kind
		if kind == "histogram" {
			for _, s := range []string{"_bucket", "_sum", "_count"} {
				m[f.GetName()+s] = "counter"
			}
		}
	}
	return m
}

var descForm = regexp.MustCompile(`fqName: "([^"]*)", help: "((?:[^"\\]|\\.)*)".*variableLabels: \{([^}]*)\}`)

// The table in docs/metrics.md is what the registry describes.
func TestTable(t *testing.T) {
	types := known(t)
	ch := make(chan *prometheus.Desc, 500)
	m := full()
	m.Describe(ch)
	m.decisions.Describe(ch)
	m.tampers.Describe(ch)
	m.saturated.Describe(ch)
	m.relief.Describe(ch)
	close(ch)
	var b strings.Builder
	b.WriteString("\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n")
	described := map[string]bool{}
	for d := range ch {
		f := descForm.FindStringSubmatch(d.String())
		if f == nil {
			t.Fatalf("not understood: %s", d)
		}
		if types[f[1]] == "" {
			t.Errorf("%s is described and never shown", f[1])
		}
		described[f[1]] = true
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", f[1], types[f[1]], strings.ReplaceAll(f[3], ",", ", "), f[2])
	}
	for name, kind := range types {
		if base, _, _ := strings.Cut(name, "_"); base == "smtpguard" && kind != "" && !described[name] && !strings.HasPrefix(name, "smtpguard_relief_seconds_") {
			t.Errorf("%s is shown and not described", name)
		}
	}
	const file, marker = "../docs/metrics.md", "-update -->\n"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, table, ok := strings.Cut(string(data), marker)
	if !ok {
		t.Fatalf("%s has no line with %q", file, marker)
	}
	if *update {
		if err := os.WriteFile(file, []byte(head+marker+b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if table != b.String() {
		t.Errorf("%s is stale: go test ./metrics -update", file)
	}
}

var nameForm = regexp.MustCompile(`\b(?:smtpguard|process|go)_[a-z0-9_]+`)

// expressions are the PromQL texts of a file, by where they are.
func expressions(v any, at string, found map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if s, ok := e.(string); ok && (k == "expr" || k == "query" || k == "definition") {
				found[at+"."+k] = s
			}
			expressions(e, at+"."+k, found)
		}
	case []any:
		for i, e := range v {
			expressions(e, fmt.Sprintf("%s[%d]", at, i), found)
		}
	}
}

// Every number that the dashboard and the alerts name exists, and counters
// are never shown as they are.
func TestContrib(t *testing.T) {
	types := known(t)
	for file, least := range map[string]int{"../contrib/grafana-dashboard.json": 15, "../contrib/alerts.yml": 10} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var v any
		if strings.HasSuffix(file, ".json") {
			err = json.Unmarshal(data, &v)
		} else {
			err = yaml.Unmarshal(data, &v)
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		found := map[string]string{}
		expressions(v, "", found)
		if len(found) < least {
			t.Errorf("%s has only %d expressions", file, len(found))
		}
		for at, expr := range found {
			names := nameForm.FindAllString(expr, -1)
			if len(names) == 0 && expr != `up{job="smtpguard"} == 0` && expr != "prometheus" {
				t.Errorf("%s: %s: no metric in %q", file, at, expr)
			}
			for _, n := range names {
				switch {
				case types[n] == "":
					t.Errorf("%s: %s: there is no %s", file, at, n)
				case strings.HasSuffix(n, "_total") && !strings.Contains(expr, "rate(") && !strings.Contains(expr, "increase("):
					t.Errorf("%s: %s: the counter %s is shown as it is: %s", file, at, n, expr)
				}
			}
		}
		// What is in the table and in nobody's sight is perhaps not needed.
		if strings.HasSuffix(file, ".json") {
			for _, must := range []string{"smtpguard_pressure_ratio", "smtpguard_slots_capacity", "smtpguard_source_held_slots", "smtpguard_verdicts_total",
				"smtpguard_blocks", "smtpguard_log_behind_bytes", "smtpguard_relief_seconds_bucket", "smtpguard_decisions_total"} {
				if !slices.ContainsFunc(slices.Collect(func(yield func(string) bool) {
					for _, e := range found {
						if !yield(e) {
							return
						}
					}
				}), func(e string) bool { return strings.Contains(e, must) }) {
					t.Errorf("%s shows no %s", file, must)
				}
			}
		}
	}
}
