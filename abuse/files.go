package abuse

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"
)

// readBounded reads a file of at most n bytes.
func readBounded(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, n+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > n {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, n)
	}
	return b, nil
}

// writeFile puts a file in place as a whole, readable by its owner only: a
// reader finds the old one or the new one.
func writeFile(path string, text []byte) error {
	f, err := createTemp(filepath.Dir(path))
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return finish(f, path, err)
}

// tempName is what a file is called before it is whole.
const tempName = ".smtpguard-new-*"

// createTemp makes a file in dir, which it makes too, for its owner only.
func createTemp(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return os.CreateTemp(dir, tempName) // mode 0600
}

// sweep removes what a program that was killed left half-written in a
// directory, once nobody can be writing it any more.
func sweep(dir string, now time.Time) {
	left, _ := filepath.Glob(filepath.Join(dir, tempName))
	for _, name := range left {
		if fi, err := os.Lstat(name); err == nil && fi.Mode().IsRegular() && now.Sub(fi.ModTime()) > time.Hour {
			os.Remove(name)
		}
	}
}

// finish puts a temporary file in place, or removes it after an error.
func finish(f *os.File, path string, err error) error {
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}
