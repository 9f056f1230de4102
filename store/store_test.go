package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/tail"
)

// roleEnv makes the test binary play another process: see the plays.
const roleEnv = "SMTPGUARD_STORE_TEST_ROLE"

var plays = map[string]func(path string) error{
	"hold":       playHold,
	"write":      playWrite,
	"small disk": playSmallDisk,
	"small file": playSmallFile,
}

func TestMain(m *testing.M) {
	if role := os.Getenv(roleEnv); role != "" {
		if err := plays[role](os.Getenv(roleEnv + "_PATH")); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func play(t *testing.T, role, path string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), roleEnv+"="+role, roleEnv+"_PATH="+path)
	cmd.Stderr = os.Stderr
	return cmd
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(path, Options{})
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func fresh(t testing.TB) *Store {
	t.Helper()
	return open(t, filepath.Join(t.TempDir(), "test.db"))
}

// t0 is when the tests' world begins.
var t0 = time.Date(2026, 11, 22, 19, 44, 12, 345678901, time.UTC)

func at(minutes int) time.Time { return t0.Add(time.Duration(minutes) * time.Minute) }

// block is a block of p from minute since to minute until.
func block(p string, since, until int) *Block {
	return &Block{Prefix: netip.MustParsePrefix(p), Since: at(since), Until: at(until), By: Self, Offence: 1, Reason: "test"}
}

func add(t testing.TB, s *Store, blocks ...*Block) {
	t.Helper()
	must(t, s.Add(blocks...))
}

// ids is the blocks' IDs as text.
func ids(t testing.TB, blocks []Block, err error) string {
	t.Helper()
	must(t, err)
	var w []string
	for _, b := range blocks {
		w = append(w, strconv.FormatUint(b.ID, 10))
	}
	return strings.Join(w, " ")
}

func TestRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "dir", "test.db")
	s := open(t, path)
	for name, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o750 | fs.ModeDir} {
		fi, err := os.Stat(name)
		must(t, err)
		if fi.Mode()&^umask() != want&^umask() {
			t.Errorf("%s has mode %v, want %v", name, fi.Mode(), want)
		}
	}
	want := Block{
		Prefix: netip.MustParsePrefix("192.0.2.7/24"),
		Verdict: &detector.Verdict{
			Time: t0, Source: netip.MustParsePrefix("192.0.2.0/24"), Rule: "hog", Metric: detector.Saturation,
			Window: 10 * time.Second, Score: 0.41, Threshold: 0.15, Held: 97, Sources: 1, Capacity: 100,
			Evidence: []detector.Evidence{{Time: t0, Source: netip.MustParseAddr("192.0.2.7"), Port: 38718, Count: 99}},
		},
		Reason: "kept 41 %", Offence: 2, Since: t0, Until: at(60), By: Self,
		Lifted: at(3), LiftedBy: "root (uid 0): customer", Ended: 97, Relief: 900 * time.Millisecond,
	}
	add(t, s, &want)
	if want.ID != 1 || want.Prefix != netip.MustParsePrefix("192.0.2.0/24") {
		t.Errorf("Add made it block %d of %v", want.ID, want.Prefix)
	}
	positions := map[string]tail.Position{
		"/var/log/exim_mainlog": {Dev: 1, Inode: 1<<64 - 1, Offset: 1 << 60, Head: 1<<64 - 1, HeadLen: 1024, ModTime: t0.UnixNano()},
		"/var/log/maillog":      {Dev: 2},
		"journald":              {Cursor: "s=1;i=2"},
	}
	must(t, s.SavePositions(positions))
	must(t, s.SetMeta("mode", []byte("enforce")))
	must(t, s.SetRecord("case", "7", []byte(`{"n":7}`)))
	entry := AllowEntry{Prefix: netip.MustParsePrefix("2001:db8::1/48"), Note: "us", By: "root (uid 0)", Added: t0, Until: at(1)}
	must(t, s.AllowAdd(entry))
	good := Good{Addr: netip.MustParseAddr("::ffff:198.51.100.1"), First: t0, Last: at(5), Messages: 12}
	must(t, s.SaveGood([]Good{good}))
	must(t, s.Check())
	must(t, s.Close())

	check := func(s *Store) {
		t.Helper()
		if got, err := s.Block(1); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("block 1: %v\n got %+v\nwant %+v", err, got, want)
		}
		for path, want := range positions {
			if got, ok, err := s.Position(path); got != want || !ok || err != nil {
				t.Errorf("position in %s: %+v, %v, %v; want %+v", path, got, ok, err, want)
			}
		}
		if _, ok, err := s.Position("/else"); ok || err != nil {
			t.Errorf("position in an unknown log: %v, %v", ok, err)
		}
		if v, err := s.Meta("mode"); string(v) != "enforce" || err != nil {
			t.Errorf("meta: %q, %v", v, err)
		}
		if v, err := s.Meta("none"); v != nil || err != nil {
			t.Errorf("unknown meta: %q, %v", v, err)
		}
		list, err := s.AllowList()
		must(t, err)
		entry.Prefix = netip.MustParsePrefix("2001:db8::/48")
		if !reflect.DeepEqual(list, []AllowEntry{entry}) {
			t.Errorf("allowlist %+v, want %+v", list, entry)
		}
		good.Addr = good.Addr.Unmap()
		var goods []Good
		must(t, s.Good(func(g Good) bool { goods = append(goods, g); return true }))
		if !reflect.DeepEqual(goods, []Good{good}) {
			t.Errorf("good %+v, want %+v", goods, good)
		}
	}
	check(open(t, path))
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Fatalf("opened twice: %v", err)
	}
}

func umask() os.FileMode {
	m := syscall.Umask(0)
	syscall.Umask(m)
	return os.FileMode(m)
}

func TestReadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	if _, err := Open(path, Options{ReadOnly: true}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing store opened read-only: %v", err)
	}
	s := open(t, path)
	add(t, s, block("192.0.2.7/32", 0, 10))
	if _, err := Open(path, Options{ReadOnly: true}); !errors.Is(err, ErrLocked) {
		t.Errorf("read-only beside a writer: %v", err)
	}
	must(t, s.Close())
	for range 2 { // together
		r, err := Open(path, Options{ReadOnly: true})
		must(t, err)
		defer r.Close()
		blocks, err := r.InForce(t0)
		if got := ids(t, blocks, err); got != "1" {
			t.Errorf("in force: %q", got)
		}
		if err := r.Add(block("192.0.2.8/32", 0, 10)); err == nil {
			t.Error("a read-only store was written to")
		}
	}
}

// Wait is long enough for a holder that goes away.
func TestWait(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	s := open(t, path)
	type result struct {
		s   *Store
		err error
	}
	opened := make(chan result)
	go func() {
		s, err := Open(path, Options{Wait: time.Minute})
		opened <- result{s, err}
	}()
	must(t, s.Close())
	r := <-opened
	must(t, r.err)
	must(t, r.s.Close())
}

func TestLockedSaysWho(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	s := open(t, path)
	_, err := Open(path, Options{})
	if want := fmt.Sprintf("pid %d)", os.Getpid()); !errors.Is(err, ErrLocked) || !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("held by this process: %v, want ErrLocked with %q", err, want)
	}
	must(t, s.Close())

	cmd := play(t, "hold", path)
	in, err := cmd.StdinPipe()
	must(t, err)
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	defer func() { _ = in.Close(); _ = cmd.Wait() }()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("the holder said %q, %v", line, err)
	}
	_, err = Open(path, Options{})
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", cmd.Process.Pid))
	if want := fmt.Sprintf("held by %s (pid %d)", strings.TrimSpace(string(comm)), cmd.Process.Pid); !errors.Is(err, ErrLocked) || !strings.Contains(fmt.Sprint(err), want) {
		t.Errorf("held by another process: %v, want ErrLocked with %q", err, want)
	}
}

// playHold holds the store until stdin ends.
func playHold(path string) error {
	if _, err := Open(path, Options{}); err != nil {
		return err
	}
	fmt.Println("held")
	_, _ = os.Stdin.Read(make([]byte, 1))
	return nil
}

// Killed at any moment, the store has every block that was acknowledged, and
// whole batches only.
func TestKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	acked := 0
	for range 6 {
		cmd := play(t, "write", path)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		sc := bufio.NewScanner(out)
		for left := 1 + rand.IntN(40); left > 0 && sc.Scan(); left-- {
			if acked, err = strconv.Atoi(sc.Text()); err != nil {
				t.Fatalf("the writer said %q", sc.Text())
			}
		}
		must(t, cmd.Process.Kill())
		for sc.Scan() { // said before it died
			if n, err := strconv.Atoi(sc.Text()); err == nil {
				acked = n
			}
		}
		_ = cmd.Wait()
		s := open(t, path)
		must(t, s.Check())
		blocks, err := s.InForce(t0)
		must(t, err)
		if len(blocks) < acked || len(blocks)%3 != 0 {
			t.Fatalf("%d blocks after %d were acknowledged in threes", len(blocks), acked)
		}
		for i, b := range blocks {
			if b.ID != uint64(i+1) {
				t.Fatalf("block %d is missing", i+1)
			}
		}
		acked = len(blocks)
		must(t, s.Close())
	}
	if acked == 0 {
		t.Fatal("nothing was written")
	}
}

// playWrite adds blocks, three at a time, and says how many there are.
func playWrite(path string) error {
	s, err := Open(path, Options{})
	if err != nil {
		return err
	}
	for {
		b := []*Block{block("192.0.2.7/32", 0, 10), block("192.0.2.0/24", 0, 10), block("2001:db8::/64", 0, 10)}
		if err := s.Add(b...); err != nil {
			return err
		}
		fmt.Println(b[2].ID)
	}
}

// With no room left nothing is half done, and with room again all goes on.
func TestDiskFull(t *testing.T) {
	for _, c := range []struct {
		name, role string
		namespace  uintptr
	}{
		{"the disk", "small disk", syscall.CLONE_NEWNS},
		{"the limit of file sizes", "small file", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmd := play(t, c.role, filepath.Join(t.TempDir(), "test.db"))
			cmd.Stderr = nil
			cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: c.namespace}
			out, err := cmd.CombinedOutput()
			if errors.Is(err, syscall.EPERM) {
				skip(t, "no mount namespaces here: %v", err)
			} else if err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// skip is t.Skip where people develop, and a failure where all must run.
func skip(t *testing.T, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// playSmallDisk fills a tmpfs of 8 MiB, in a mount namespace of its own.
func playSmallDisk(path string) error {
	dir := filepath.Dir(path)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=8m"); err != nil {
		return err
	}
	ballast := filepath.Join(dir, "ballast")
	if err := os.WriteFile(ballast, make([]byte, 4<<20), 0o600); err != nil {
		return err
	}
	return fill(path, func(err error) bool { return errors.Is(err, syscall.ENOSPC) }, func() error { return os.Remove(ballast) })
}

// playSmallFile lets the file grow to 4 MiB. bbolt gives the error of a file
// that cannot grow as text only.
func playSmallFile(path string) error {
	signal.Ignore(syscall.SIGXFSZ)
	var was syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &was); err != nil {
		return err
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &syscall.Rlimit{Cur: 4 << 20, Max: was.Max}); err != nil {
		return err
	}
	return fill(path, func(err error) bool { return strings.Contains(err.Error(), syscall.EFBIG.Error()) },
		func() error { return syscall.Setrlimit(syscall.RLIMIT_FSIZE, &was) })
}

// fill adds blocks until there is no room, makes room, and goes on.
func fill(path string, full func(error) bool, makeRoom func() error) error {
	s, err := Open(path, Options{})
	if err != nil {
		return err
	}
	batch := func() (blocks []*Block) {
		for range 500 {
			b := block("192.0.2.7/32", 0, 10)
			b.Reason = strings.Repeat("x", 500)
			blocks = append(blocks, b)
		}
		return blocks
	}
	written := 0
	for {
		if written > 100_000 {
			return errors.New("there was always room")
		}
		b := batch()
		if err := s.Add(b...); err == nil {
			written += len(b)
			continue
		} else if !full(err) {
			return fmt.Errorf("the error does not say that there is no room: %w", err)
		}
		if b[0].ID != 0 {
			return errors.New("a block that was not written has an ID")
		}
		break
	}
	check := func(want int) error {
		if blocks, err := s.InForce(t0); err != nil || len(blocks) != want {
			return fmt.Errorf("%d blocks, %v; want %d", len(blocks), err, want)
		}
		return s.Check()
	}
	if err := check(written); err != nil {
		return err
	}
	if err := makeRoom(); err != nil {
		return err
	}
	if err := s.Add(batch()...); err != nil {
		return fmt.Errorf("with room again: %w", err)
	}
	if err := s.Close(); err != nil {
		return err
	}
	if s, err = Open(path, Options{}); err != nil {
		return err
	}
	return errors.Join(check(written+500), s.Close())
}

// Files that are not whole stores are told as such, and left as they are.
func TestDamaged(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "whole.db")
	s := open(t, whole)
	for range 40 {
		var blocks []*Block
		for i := range 100 {
			b := block(fmt.Sprintf("192.0.2.%d/32", i), 0, 10)
			b.Reason = strings.Repeat("why ", 100)
			blocks = append(blocks, b)
		}
		add(t, s, blocks...)
	}
	must(t, s.Close())
	good, err := os.ReadFile(whole)
	must(t, err)
	page := os.Getpagesize()
	garbage := make([]byte, 64<<10)
	for i := range garbage {
		garbage[i] = byte(rand.Uint32())
	}
	other := filepath.Join(t.TempDir(), "other.db")
	db, err := bbolt.Open(other, 0o600, nil)
	must(t, err)
	must(t, db.Update(func(tx *bbolt.Tx) error { _, err := tx.CreateBucket([]byte("theirs")); return err }))
	must(t, db.Close())
	theirs, err := os.ReadFile(other)
	must(t, err)

	// bothMetas changes a byte of both meta pages behind their headers.
	bothMetas := func(off int) []byte {
		b := bytes.Clone(good)
		b[16+off] ^= 0xff
		b[page+16+off] ^= 0xff
		return b
	}
	for _, c := range []struct {
		name    string
		content []byte
	}{
		{"one byte", good[:1]},
		{"one line of text", []byte("not a store\n")},
		{"one page", good[:page]},
		{"one page and a half", good[:page+page/2]},
		{"two pages", good[:2*page]},
		{"four pages of many", good[:4*page]},
		{"half of it", good[:len(good)/2]},
		{"garbage", garbage},
		{"zeros", make([]byte, 64<<10)},
		{"magic", bothMetas(0)},
		{"version", bothMetas(4)},
		{"page size", bothMetas(8)},
		{"root", bothMetas(16)},
		{"checksum", bothMetas(56)},
		{"another program's", theirs},
	} {
		for _, readOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s ReadOnly=%v", c.name, readOnly), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "test.db")
				must(t, os.WriteFile(path, c.content, 0o600))
				for range 2 { // the first attempt must leave no lock
					s, err := Open(path, Options{ReadOnly: readOnly})
					if err == nil {
						_ = s.Close()
					}
					if !errors.Is(err, ErrDamaged) {
						t.Fatalf("Open: %v, want ErrDamaged", err)
					}
				}
				if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, c.content) {
					t.Errorf("the file was changed: %d bytes, were %d, %v", len(now), len(c.content), err)
				}
			})
		}
	}
	t.Run("a directory", func(t *testing.T) {
		if _, err := Open(t.TempDir(), Options{}); !errors.Is(err, ErrDamaged) {
			t.Errorf("Open: %v, want ErrDamaged", err)
		}
	})
	t.Run("no byte", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "test.db")
		must(t, os.WriteFile(path, nil, 0o600))
		if _, err := Open(path, Options{ReadOnly: true}); !errors.Is(err, ErrDamaged) {
			t.Errorf("read-only: %v, want ErrDamaged", err)
		}
		must(t, os.WriteFile(AllowCopy(path), []byte(allowCopyHead+`{"prefix":"198.51.100.1/32","by":"root"}`+"\n"), 0o600))
		s := open(t, path)
		add(t, s, block("192.0.2.7/32", 0, 10))
		if list, err := s.AllowList(); err != nil || len(list) != 1 || s.Restored().Entries != 1 {
			t.Errorf("the copy of the allowlist is not taken: %v, %v", list, err)
		}
	})
	// Damage inside shows when it is met, as an error, not as a crash.
	t.Run("pages inside", func(t *testing.T) {
		met := 0
		for i := range 24 {
			b := bytes.Clone(good)
			// Pages 0 and 1 have checksums; others are overwritten.
			for range 1 + i/4 {
				p := 2 + rand.IntN(len(b)/page-2)
				copy(b[p*page:(p+1)*page], garbage[rand.IntN(len(garbage)-page):])
			}
			path := filepath.Join(t.TempDir(), "test.db")
			must(t, os.WriteFile(path, b, 0o600))
			s, err := Open(path, Options{})
			if err != nil {
				met++
				continue
			}
			_, err1 := s.InForce(t0)
			_, err2 := s.History(netip.Prefix{}, time.Time{}, 0)
			_, err3 := s.Offences(netip.MustParsePrefix("192.0.2.7/32"), time.Time{}, time.Now())
			if errors.Join(err1, err2, err3) != nil {
				met++
			}
			_ = s.Add(block("192.0.2.7/32", 0, 10))
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
		if met == 0 {
			t.Error("no damage was met")
		}
	})
}

func TestNewer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	s := open(t, path)
	must(t, s.update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keySchema, binary.BigEndian.AppendUint32(nil, uint32(len(migrations))+1))
	}))
	must(t, s.Close())
	for _, readOnly := range []bool{false, true} {
		if _, err := Open(path, Options{ReadOnly: readOnly}); !errors.Is(err, ErrNewer) {
			t.Errorf("ReadOnly=%v: %v, want ErrNewer", readOnly, err)
		}
	}
}

func TestCopy(t *testing.T) {
	s := fresh(t)
	add(t, s, block("192.0.2.7/32", 0, 10))
	path := filepath.Join(t.TempDir(), "copy.db")
	f, err := os.Create(path)
	must(t, err)
	n, err := s.WriteTo(f)
	must(t, err)
	must(t, f.Close())
	if size, err := s.Size(); err != nil || n != size {
		t.Errorf("copied %d bytes of %d, %v", n, size, err)
	}
	c := open(t, path)
	must(t, c.Check())
	blocks, err := c.InForce(t0)
	if got := ids(t, blocks, err); got != "1" {
		t.Errorf("in force in the copy: %q", got)
	}
}

// A value that does not decode is told with its key and hides no other.
func TestBadValues(t *testing.T) {
	s := fresh(t)
	add(t, s, block("192.0.2.1/32", 0, 10), block("192.0.2.2/32", 0, 10), block("192.0.2.3/32", 0, 10))
	must(t, s.SaveGood([]Good{{Addr: netip.MustParseAddr("192.0.2.1")}, {Addr: netip.MustParseAddr("192.0.2.2"), Last: t0}}))
	must(t, s.AllowAdd(AllowEntry{Prefix: netip.MustParsePrefix("192.0.2.1/32")}))
	must(t, s.SavePositions(map[string]tail.Position{"/log": {Inode: 1}}))
	swapped, err := json.Marshal(block("192.0.2.9/32", 0, 10)) // ID 0
	must(t, err)
	for _, bad := range []string{"", "{", `{"id":2,"prefix":"x"}`, "\x00", string(swapped)} {
		must(t, s.update(func(tx *bbolt.Tx) error {
			return errors.Join(
				tx.Bucket(bucketBlocks).Put(keyOf(2), []byte(bad)),
				tx.Bucket(bucketGood).Put(appendAddr(nil, netip.MustParseAddr("192.0.2.1")), []byte(bad)),
				tx.Bucket(bucketAllow).Put(prefixKey(netip.MustParsePrefix("192.0.2.1/32")), []byte("{")),
				tx.Bucket(bucketPositions).Put([]byte("/log"), []byte("{")),
			)
		}))
		for name, read := range map[string]func() ([]Block, error){
			"InForce":     func() ([]Block, error) { return s.InForce(t0) },
			"History":     func() ([]Block, error) { return s.History(netip.MustParsePrefix("192.0.2.0/24"), time.Time{}, 0) },
			"all History": func() ([]Block, error) { return s.History(netip.Prefix{}, time.Time{}, 0) },
		} {
			blocks, err := read()
			if len(blocks) != 2 || !errors.Is(err, ErrBadValue) || !strings.Contains(err.Error(), "0000000000000002") {
				t.Errorf("%s with %q: %d blocks, %v; want 2 and the key", name, bad, len(blocks), err)
			}
		}
		goods := 0
		if err := s.Good(func(Good) bool { goods++; return true }); goods != 1 || !errors.Is(err, ErrBadValue) {
			t.Errorf("Good with %q: %d, %v; want 1", bad, goods, err)
		}
		if _, err := s.Block(2); !errors.Is(err, ErrBadValue) {
			t.Errorf("Block(2) with %q: %v", bad, err)
		}
		if err := s.Check(); !errors.Is(err, ErrBadValue) {
			t.Errorf("Check with %q: %v", bad, err)
		}
	}
	if list, err := s.AllowList(); len(list) != 1 || list[0].Prefix != netip.MustParsePrefix("192.0.2.1/32") || !errors.Is(err, ErrBadValue) {
		t.Errorf("AllowList: %v, %v; want the prefix of the key", list, err)
	}
	if p, ok, err := s.Position("/log"); ok || !p.IsZero() || !errors.Is(err, ErrBadValue) {
		t.Errorf("Position: %v, %v, %v", p, ok, err)
	}
	// It can be mended, and forgotten.
	b := *block("192.0.2.2/32", 0, 10)
	b.ID = 2
	must(t, s.Save(b))
	blocks, err := s.InForce(t0)
	if got := ids(t, blocks, err); got != "1 2 3" {
		t.Errorf("in force after mending: %q", got)
	}
	if n, err := s.DropGood(time.Time{}, 0); n != 1 || err != nil {
		t.Errorf("DropGood: %d, %v; want the one that does not decode", n, err)
	}
}
