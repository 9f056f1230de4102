package incident

import (
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
)

// What a source did long before is no part of what it is blocked for.
func TestBegan(t *testing.T) {
	at := time.Date(2026, 11, 22, 13, 37, 20, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return at.Add(-d) }
	for name, c := range map[string]struct {
		v    detector.Verdict
		want time.Duration // before the verdict
	}{
		"new":                       {detector.Verdict{First: ago(7 * time.Second)}, 7 * time.Second},
		"old, nothing known":        {detector.Verdict{First: ago(time.Hour)}, 10 * time.Second},
		"old, holds since 6 s":      {detector.Verdict{First: ago(time.Hour), Held: 30, Evidence: []detector.Evidence{{Time: ago(6 * time.Second)}, {Time: ago(4 * time.Second)}}}, 6 * time.Second},
		"old, holds few since 6 s":  {detector.Verdict{First: ago(time.Hour), Held: 3, Evidence: []detector.Evidence{{Time: ago(6 * time.Second)}}}, 10 * time.Second},
		"old, holds for long":       {detector.Verdict{First: ago(time.Hour), Held: 30, Evidence: []detector.Evidence{{Time: ago(time.Minute)}}}, 10 * time.Second},
		"a storm, by what it opens": {detector.Verdict{First: ago(time.Hour), Metric: detector.Opens, Held: 30, Evidence: []detector.Evidence{{Time: ago(time.Second)}}}, 10 * time.Second},
	} {
		c.v.Metric = max(c.v.Metric, detector.Saturation)
		c.v.Time, c.v.Window, c.v.Score, c.v.Capacity = at, 10*time.Second, 0.15, 100
		if got := at.Sub(began(&c.v)); got != c.want {
			t.Errorf("%s: %s before, want %s", name, got, c.want)
		}
	}
}
