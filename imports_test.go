package smtpguard

import (
	"os/exec"
	"strings"
	"testing"
)

const module = "github.com/smtpguard/smtpguard/"

// TestImports holds the one direction in which the packages depend on each
// other. A new arrow belongs here with its reason, or not in the code.
func TestImports(t *testing.T) {
	ours := map[string]string{
		"tail":          "",                                                                   // a follower of files; knows no Exim
		"sockets":       "",                                                                   // the kernel's table; knows no verdict
		"firewall":      "",                                                                   // prefixes and times; knows no reason for them
		"detector":      "",                                                                   // arithmetic on events: no clock, no file
		"detector/exim": "detector",                                                           // Exim is known here and in cmd only
		"allow":         "",                                                                   // asks the DNS about names; knows nobody
		"policy":        "allow detector .",                                                   // YAML is known here only; . embeds the shipped file
		"store":         "detector tail",                                                      // what it keeps
		"guard":         "allow detector firewall policy sockets store tail",                  // decides; never parses a log line itself
		"abuse":         "detector",                                                           // tells of verdicts; knows no store, no policy, no guard
		"incident":      "detector store",                                                     // what a replay tells: no clock, no file, no policy
		"control":       "abuse guard store",                                                  // the answers are guard's and abuse's own types
		"metrics":       "abuse guard hook",                                                   // the numbers are theirs; asks the guard nothing
		"hook":          "",                                                                   // tells of events; knows not who makes them
		"diagnose":      "detector detector/exim",                                             // reads logs like a person; asks no running part
		"doctor":        "control detector detector/exim firewall guard policy sockets store", // asks every part how it is; nobody imports it
	}
	foreign := map[string]string{ // import path -> the one package that may
		"github.com/google/nftables":    "firewall",
		"github.com/coreos/go-iptables": "firewall",
		"go.yaml.in/yaml":               "policy",
		"go.etcd.io/bbolt":              "store",
		"github.com/fsnotify/fsnotify":  "tail",
		"github.com/ipinfo/go":          "abuse",
		"github.com/oschwald/maxminddb": "abuse",
		"github.com/urfave/cli":         "cmd/smtpguard",
		"github.com/coreos/go-systemd":  "cmd/smtpguard",
		"github.com/prometheus":         "metrics",
	}
	for pkg, may := range ours {
		out, err := exec.Command("go", "list", "-f", `{{join .Imports "\n"}}`, "./"+pkg).CombinedOutput()
		if err != nil {
			t.Fatalf("go list %s: %v\n%s", pkg, err, out)
		}
		for _, imp := range strings.Fields(string(out)) {
			if imp == strings.TrimSuffix(module, "/") {
				imp = module + "."
			}
			if own, ok := strings.CutPrefix(imp, module); ok && !strings.Contains(" "+may+" ", " "+own+" ") {
				t.Errorf("%s imports %s; it may import: %s", pkg, own, may)
			}
			for f, only := range foreign {
				if strings.HasPrefix(imp, f) && pkg != only {
					t.Errorf("%s imports %s, which only %s may know", pkg, imp, only)
				}
			}
			if pkg == "detector" && (imp == "os" || imp == "net" || imp == "sync" || imp == "context") {
				t.Errorf("detector imports %s: it has no file, no network and no goroutine", imp)
			}
		}
	}
}
