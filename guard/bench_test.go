package guard

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

// BenchmarkLineToKernel measures the time from the write of the log line that
// crosses a threshold to the element in the kernel: the file, inotify, the
// parser, the detector, the gate, the store's fsync and nftables. The look
// into the kernel that ends it is part of it (check-ns, measured alone).
func BenchmarkLineToKernel(b *testing.B) {
	ns := newNamespace(b)
	dir := b.TempDir()
	log := filepath.Join(dir, "mainlog")
	f, err := os.Create(log)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	p := policy.Default()
	p.Mode, p.Confirm = policy.Enforce, policy.ConfirmOff
	p.Block.MaxNewPerMinute = 1 << 30
	p.Rules = []detector.Rule{{Name: "third", Metric: detector.Opens, Window: time.Minute, Threshold: 3, Prefixes4: []int{32}}}
	st, err := store.Open(filepath.Join(dir, "s.db"), store.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	fo := firewall.Options{Ports: []uint16{25}, NetNS: ns}
	g, err := New(b.Context(), Options{Policy: p, Store: st, Capacity: 100, Logs: []Log{{Path: log, Parser: exim.New(time.UTC)}},
		OpenFirewall: func(ctx context.Context, _ []netip.Prefix, _ int) (firewall.Firewall, error) {
			return firewall.NewNFTables(fo)
		},
		Self: func(context.Context) ([]Exempt, error) { return nil, nil }})
	if err != nil {
		b.Fatal(err)
	}
	ready := make(chan struct{})
	g.o.Notify = func(s string) {
		if s == "READY=1" {
			close(ready)
		}
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	<-ready
	look, err := firewall.NewNFTables(fo)
	if err != nil {
		b.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond)
	n := 0
	line := func(a netip.Addr, port int) {
		fmt.Fprintf(f, "%s SMTP connection from [%s]:%d (TCP/IP connection count = 1)\n", time.Now().UTC().Format(time.DateTime), a, port)
	}
	inKernel := func(a netip.Addr) bool {
		for e, err := range look.List(ctx) {
			if err != nil {
				b.Fatal(err)
			}
			if e.Prefix.Addr() == a {
				return true
			}
		}
		return false
	}
	var took, check []time.Duration
	for b.Loop() {
		n++
		a := netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)})
		line(a, 1000)
		line(a, 1001)
		time.Sleep(5 * time.Millisecond) // the two are read
		start := time.Now()
		line(a, 1002)
		for !inKernel(a) {
			if time.Since(start) > 10*time.Second {
				b.Fatalf("%s is never in the kernel", a)
			}
		}
		took = append(took, time.Since(start))
		start = time.Now()
		inKernel(a)
		check = append(check, time.Since(start))
	}
	slices.Sort(took)
	slices.Sort(check)
	b.ReportMetric(float64(took[len(took)/2]), "p50-ns")
	b.ReportMetric(float64(took[len(took)*99/100]), "p99-ns")
	b.ReportMetric(float64(check[len(check)/2]), "check-ns")
	cancel()
	if err := <-done; err != nil {
		b.Error(err)
	}
}

// newNamespace makes a network namespace that lives as long as the test, and
// returns its file descriptor.
func newNamespace(tb testing.TB) int {
	tb.Helper()
	type result struct {
		fd  int
		err error
	}
	c := make(chan result)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with this goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			c <- result{0, err}
			return
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		c <- result{fd, err}
	}()
	r := <-c
	if r.err != nil {
		if os.Getenv("CI") == "true" {
			tb.Fatal(r.err)
		}
		tb.Skipf("no network namespace can be made here: %v", r.err)
	}
	tb.Cleanup(func() { unix.Close(r.fd) })
	return r.fd
}

// dup duplicates a file descriptor, to be closed by whoever gets it.
func dup(tb testing.TB, fd int) int {
	tb.Helper()
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		tb.Fatal(err)
	}
	return n
}
