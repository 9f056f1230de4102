package main

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// writeLog writes a main log of n lines, always the same for the same
// arguments: 40 % of them are connection lines, by so many sources, one in
// eight of them IPv6; the others are deliveries and what else Exim writes.
func writeLog(path string, n, sources int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	r := rand.New(rand.NewPCG(1, uint64(sources)))
	type conn struct {
		addr string
		port int
	}
	var open []conn
	t := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	for i := range n {
		if i%40 == 0 {
			t = t.Add(time.Second)
		}
		stamp := t.Format(time.DateTime)
		if r.IntN(10) >= 4 {
			switch i % 4 {
			case 0:
				fmt.Fprintf(w, "%s 1xVDTf-%06d-0s => user%d <user%d@lab.example> R=local_user T=local_delivery\n", stamp, i%1e6, i%977, i%977)
			case 1:
				fmt.Fprintf(w, "%s 1xVDTf-%06d-0s Completed\n", stamp, i%1e6)
			case 2:
				fmt.Fprintf(w, "%s cwd=/var/spool/exim4 3 args: /usr/sbin/exim4 -Mc 1xVDTf-%06d-0s\n", stamp, i%1e6)
			default:
				fmt.Fprintf(w, "%s no host name found for IP address 198.51.100.%d\n", stamp, i%256)
			}
			continue
		}
		if len(open) > 60 || len(open) > 0 && r.IntN(2) == 0 {
			j := r.IntN(len(open))
			fmt.Fprintf(w, "%s SMTP connection from (mail.example) [%s]:%d closed by QUIT\n", stamp, open[j].addr, open[j].port)
			open[j] = open[len(open)-1]
			open = open[:len(open)-1]
			continue
		}
		k := r.IntN(sources)
		c := conn{fmt.Sprintf("%d.%d.%d.%d", 11+k>>24, k>>16&255, k>>8&255, k&255), 1024 + r.IntN(60000)}
		if k%8 == 0 {
			c.addr = fmt.Sprintf("2001:db8:%x:%x::%x", k>>16, k&0xffff, 1+k%7)
		}
		open = append(open, c)
		fmt.Fprintf(w, "%s SMTP connection from [%s]:%d (TCP/IP connection count = %d)\n", stamp, c.addr, c.port, len(open))
	}
	return w.Flush()
}

// counts is the one-liner that administrators use: connections per address.
const counts = `/TCP\/IP connection count/ { match($0, /\[[^\]]*\]/); n[substr($0, RSTART+1, RLENGTH-2)]++ } END { for (a in n) print n[a], a }`

// failregex finds the connection lines for fail2ban-regex.
const failregex = `^ SMTP connection from \[<ADDR>\]:\d+ \(TCP/IP connection count = \d+\)$`

// BenchmarkCompare times whole processes on the same log of a million lines:
// what people use today, and replay. Compare within one run. peak-MB is the
// largest resident set of the process.
func BenchmarkCompare(b *testing.B) {
	dir := b.TempDir()
	bin := filepath.Join(dir, "smtpguard")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	for _, sources := range []int{50_000, 1_000_000} {
		log := filepath.Join(dir, fmt.Sprint(sources))
		if err := writeLog(log, 1_000_000, sources); err != nil {
			b.Fatal(err)
		}
		for _, tool := range [][]string{
			{"grep", "-c", "connection count", log},
			{"mawk", counts, log},
			{"fail2ban-regex", log, failregex},
			{bin, "--json", "replay", log},
		} {
			b.Run(fmt.Sprintf("%d/%s", sources, filepath.Base(tool[0])), func(b *testing.B) {
				if _, err := exec.LookPath(tool[0]); err != nil {
					b.Skipf("%s is not installed", tool[0])
				}
				var peak int64
				for b.Loop() {
					cmd := exec.Command(tool[0], tool[1:]...)
					cmd.Stderr = os.Stderr
					if _, err := cmd.Output(); err != nil {
						b.Fatal(err)
					}
					peak = max(peak, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
				}
				b.ReportMetric(float64(peak)/1024, "peak-MB")
				b.ReportMetric(1e6*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
			})
		}
	}
}
