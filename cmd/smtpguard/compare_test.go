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
// arguments: two in five are connection lines, half of them opens; the others
// are deliveries and what else Exim writes. One source in eight is IPv6. With
// sources 0 each open has a source of its own, so that there are as many
// sources as opens: about n/5, which is what it returns.
func writeLog(path string, n, sources int) (distinct int, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	r := rand.New(rand.NewPCG(1, uint64(sources)))
	type conn struct {
		addr string
		port int
	}
	var open []conn
	opened, seen := 0, make([]bool, sources)
	t := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	stamp := ""
	for i := range n {
		if i%40 == 0 {
			t = t.Add(time.Second)
			stamp = t.Format(time.DateTime)
		}
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
		// Neighbours in number are far apart in address, as strangers are.
		k := opened * 7919 % (1 << 24)
		if sources > 0 {
			if k = r.IntN(sources); !seen[k] {
				seen[k] = true
				distinct++
			}
		} else {
			distinct++
		}
		opened++
		c := conn{fmt.Sprintf("%d.%d.%d.%d", 11+k>>24, k>>16&255, k>>8&255, k&255), 1024 + r.IntN(60000)}
		if k%8 == 0 {
			c.addr = fmt.Sprintf("2001:db8:%x:%x::%x", k>>16, k&0xffff, 1+k%7)
		}
		open = append(open, c)
		fmt.Fprintf(w, "%s SMTP connection from [%s]:%d (TCP/IP connection count = %d)\n", stamp, c.addr, c.port, len(open))
	}
	return distinct, w.Flush()
}

// counts is the one-liner that administrators use: connections per address.
const counts = `/TCP\/IP connection count/ { match($0, /\[[^\]]*\]/); n[substr($0, RSTART+1, RLENGTH-2)]++ } END { for (a in n) print n[a], a }`

// failregex finds the connection lines for fail2ban-regex.
const failregex = `^ SMTP connection from \[<ADDR>\]:\d+ \(TCP/IP connection count = \d+\)$`

// BenchmarkCompare times whole processes on the same log: what people use
// today, and replay. easy has 50,000 sources in a million lines. hard has a
// new source with each open: about 200,000, which is as many as a million
// lines of this making can have; so there is harder, five million lines with
// a million sources. Compare within one run. peak-MB is the largest resident
// set of the process, cpu-s what it took of all cores.
func BenchmarkCompare(b *testing.B) {
	dir := b.TempDir()
	bin := filepath.Join(dir, "smtpguard")
	if out, err := exec.Command("go", "build", "-o", bin, ".").CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	for _, c := range []struct {
		name           string
		lines, sources int
	}{
		{"easy", 1_000_000, 50_000},
		{"hard", 1_000_000, 0},
		{"harder", 5_000_000, 0},
	} {
		log := filepath.Join(dir, c.name)
		distinct, err := writeLog(log, c.lines, c.sources)
		if err != nil {
			b.Fatal(err)
		}
		for _, tool := range [][]string{
			{"grep", "-c", "connection count", log},
			{"mawk", counts, log},
			{"fail2ban-regex", log, failregex},
			{bin, "--json", "replay", log},
		} {
			b.Run(c.name+"/"+filepath.Base(tool[0]), func(b *testing.B) {
				if _, err := exec.LookPath(tool[0]); err != nil {
					b.Skipf("%s is not installed", tool[0])
				}
				var peak int64
				var cpu time.Duration
				for b.Loop() {
					cmd := exec.Command(tool[0], tool[1:]...)
					cmd.Stderr = os.Stderr
					if _, err := cmd.Output(); err != nil {
						b.Fatal(err)
					}
					cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
					peak = max(peak, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)
				}
				b.ReportMetric(float64(peak)/1024, "peak-MB")
				b.ReportMetric(cpu.Seconds()/float64(b.N), "cpu-s")
				b.ReportMetric(float64(distinct), "sources")
				b.ReportMetric(float64(c.lines)*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
			})
		}
	}
}
