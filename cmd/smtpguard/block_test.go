package main

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// A share below the rule's threshold says which limit it crossed, and that it
// is an average.
func TestBlockWords(t *testing.T) {
	for _, c := range []struct {
		v    detector.Verdict
		want string
	}{
		{detector.Verdict{Rule: "hog", Metric: detector.Saturation, Window: 10 * time.Second, Score: 0.1123, Threshold: 0.075, Held: 20},
			"hog: 11.2 % of the slots over 10s while full, limit 7.5 %"},
		{detector.Verdict{Rule: "patient", Metric: detector.Saturation, Window: 5 * time.Minute, Score: 0.2, Threshold: 0.2},
			"patient: 20 % of the slots over 5m while full, limit 20 %"},
		{detector.Verdict{Rule: "burst", Metric: detector.Opens, Window: 10 * time.Second, Score: 120.4, Threshold: 120},
			"burst: 120 connections in 10s"},
	} {
		b := store.Block{Prefix: netip.MustParsePrefix("192.0.2.7/32"), Verdict: &c.v}
		if got := why(b); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
		var out bytes.Buffer
		showBlock(&out, guard.BlockInfo{Block: b})
		if !strings.Contains(out.String(), c.want) {
			t.Errorf("blocks show:\n%s\nwant %s", out.String(), c.want)
		}
	}
}
