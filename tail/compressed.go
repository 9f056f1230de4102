package tail

import (
	"compress/bzip2"
	"io"
	"path/filepath"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxWindow is the most memory, in bytes, that a .zst file may ask for; zstd
// itself advises readers to accept 8 MiB, and --long=27 makes 128.
const maxWindow = 128 << 20

// compressed reports whether name says that the file is compressed in a way
// that plain can undo.
func compressed(name string) bool {
	switch filepath.Ext(name) {
	case ".gz", ".zst", ".xz", ".bz2":
		return true
	}
	return false
}

// trimCompressed is name without the ending that compressed knows.
func trimCompressed(name string) string {
	if compressed(name) {
		return strings.TrimSuffix(name, filepath.Ext(name))
	}
	return name
}

// plain undoes the compression that name tells of. close frees what the
// reader needed, not r.
func plain(name string, r io.Reader) (_ io.Reader, close func(), err error) {
	none := func() {}
	switch filepath.Ext(name) {
	case ".gz":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, none, err
		}
		return z, none, nil
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, none, err
		}
		return z, z.Close, nil
	case ".xz":
		z, err := xz.NewReader(r)
		if err != nil {
			return nil, none, err
		}
		return z, none, nil
	default:
		return bzip2.NewReader(r), none, nil
	}
}
