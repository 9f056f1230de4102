package abuse

import (
	"errors"
	"fmt"
	"net/netip"
	"time"
)

// ASNames names the operators of networks from an ASN database file; nobody is
// asked. It is safe for concurrent use.
type ASNames struct{ db database }

// OpenASNames returns the names in the file at path, which is read with the
// first question.
func OpenASNames(path string) *ASNames { return &ASNames{database{path: path}} }

// Name is the AS that announces a, as "AS64500 Example Networks": printable
// ASCII, 120 bytes at most. "" without an error if the database has none.
func (n *ASNames) Name(a netip.Addr) (string, error) {
	c, err := n.db.lookup(a, time.Now())
	if errors.Is(err, errNone) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	name := fmt.Sprintf("AS%d", c.Origins[0])
	if c.Name != "" {
		name += " " + c.Name
	}
	return name, nil
}
