package exim

import (
	"net/netip"
	"os"
	"testing"
)

// TestInHostList asks the real program.
func TestInHostList(t *testing.T) {
	path, err := find()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	for list, want := range map[string]string{
		"":                               "no",
		"127.0.0.1":                      "yes",
		"<; 127.0.0.1 ; ::1":             "yes",
		"127.0.0.1 : ::::1 : !*":         "yes",
		"<, 127.0.0.1 , ::1 , !*":        "yes",
		"192.0.2.1 : 127.0.0.0/8":        "yes",
		"*":                              "yes",
		"!127.0.0.1 : *":                 "no", // has the address in its text
		"192.0.2.127":                    "no",
		"<; 2001:db8::1 ; 10.0.0.0/8":    "no",
		"<, 10.0.0.0/8, 127.0.0.1":       "yes",
		"2001::db8::::1 : 10.127.0.0":    "no",
		"*.example.com : 127.0.0.1":      "cannot tell", // Exim looks up the name first
		"localhost":                      "cannot tell",
		"+smtpguard_has_no_such_list":    "cannot tell",
		"/etc/smtpguard/no/such/file":    "cannot tell",
		"${lookup{x}lsearch{/etc/none}}": "cannot tell",
		"}{yes}{yes}}${run{/bin/true}}":  "cannot tell",
	} {
		in, err := InHostList(t.Context(), path, list, netip.MustParseAddr("127.0.0.1"))
		got := map[bool]string{true: "yes", false: "no"}[in]
		if err != nil { // ErrCannotTell, or that Exim says so
			got = "cannot tell"
		}
		if got != want {
			t.Errorf("%q: %s, want %s", list, got, want)
		}
	}
}
