package firewall

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestChains: ours is there after Ensure, where it belongs, and what others
// have is seen.
func TestChains(t *testing.T) {
	ns := newNetNS(t)
	o := Options{NetNS: ns.fd, Ports: []uint16{25}}
	if c, err := Chains(t.Context(), o); err != nil || len(c) != 0 {
		t.Fatalf("in a new namespace: %v, %v", c, err)
	}
	fw, err := NewNFTables(o)
	if err != nil {
		t.Fatal(err)
	}
	defer fw.Close(t.Context(), true)
	if _, err := fw.Ensure(t.Context()); err != nil {
		cannot(t, "nftables cannot be used here: %v", err)
	}
	chains, err := Chains(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(chains, func(c Chain) bool { return c.Ours && c.Hook == "prerouting" && c.Priority == -300 }) {
		t.Errorf("our chain is not seen: %+v", chains)
	}
}

func TestNeighbours(t *testing.T) {
	root := t.TempDir()
	put := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := LookCSF(root); s != nil || err != nil {
		t.Errorf("no CSF: %+v, %v", s, err)
	}
	if got := Neighbours(root, nil); got != nil {
		t.Errorf("nobody: %v", got)
	}
	put("/etc/csf/csf.conf", "TESTING = \"1\"\nDENY_TEMP_IP_LIMIT = \"40\"\n")
	put("/etc/ufw/ufw.conf", "# ufw\nENABLED=yes\n")
	put("/run/firewalld.pid", "1")
	chains := []Chain{{Table: "filter", Name: "DOCKER"}, {Table: "f2b-table", Name: "f2b-chain"}, {Table: "crowdsec", Name: "x"}}
	if got := strings.Join(Neighbours(root, chains), " "); got != "CSF ufw firewalld Docker fail2ban CrowdSec" {
		t.Error(got)
	}
	s, err := LookCSF(root)
	if err != nil || *s != (CSFState{Testing: true, TempLimit: 40}) {
		t.Errorf("%+v, %v", s, err)
	}
	put("/etc/ufw/ufw.conf", "ENABLED=no\n")
	if slices.Contains(Neighbours(root, nil), "ufw") {
		t.Error("a ufw that is off")
	}
}
