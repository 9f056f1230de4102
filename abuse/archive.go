package abuse

import (
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"slices"
)

// check reads an archive and says what is wrong with it, nil if it is the one
// that a mail tells of, or there is none.
func (d *Desk) checkArchive(a Archive) error {
	if a.File == "" {
		return nil
	}
	f, err := os.Open(d.path(a.File))
	if err != nil {
		return err
	}
	defer f.Close()
	zr, err := gzip.NewReader(f)
	if err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	sum := sha256.New()
	if _, err := io.Copy(sum, io.LimitReader(zr, a.Bytes+1)); err != nil {
		return fmt.Errorf("%s: %w", f.Name(), err)
	}
	if hex.EncodeToString(sum.Sum(nil)) != a.SHA256 {
		return fmt.Errorf("%s is not the one that the mail tells of", f.Name())
	}
	return nil
}

// dropArchive removes an archive that no mail of a case has any more.
func (d *Desk) dropArchive(c *Case, a Archive) {
	if a.File != "" && !slices.ContainsFunc(c.Mails, func(m Mail) bool { return m.Archive.File == a.File }) {
		os.Remove(d.path(a.File))
	}
}
