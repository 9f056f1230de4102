package exim

import (
	"bytes"
	"os"
	"testing"

	"github.com/smtpguard/smtpguard/detector"
)

func BenchmarkParse(b *testing.B) {
	bench := func(name string, lines [][]byte, zone string) {
		b.Run(name, func(b *testing.B) {
			p := newParser(b, zone)
			var ev detector.Event
			size := 0
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				line := lines[i%len(lines)]
				size += len(line) + 1
				p.Parse(line, &ev)
			}
			b.SetBytes(int64(size / b.N))
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "lines/s")
		})
	}
	one := func(name, line string) { bench(name, [][]byte{[]byte(line)}, "UTC") }
	one("opened", "2026-11-22 19:45:50 SMTP connection from [192.0.2.7]:38718 (TCP/IP connection count = 99)")
	one("opened6", "2026-11-22 19:45:50 SMTP connection from [2001:db8:1:2:3:4:5:6]:38718 (TCP/IP connection count = 99)")
	one("closed", "2026-11-22 19:45:50 SMTP connection from mx.example (helo.example) [192.0.2.7]:38718 closed by QUIT")
	one("lost", "2026-11-22 19:45:50 SMTP connection from (ylmf-pc) [192.0.2.7]:38718 lost D=5s")
	one("refused", "2026-11-22 19:45:50 Connection from [192.0.2.7]:38718 refused: too many connections")
	one("accepted", "2026-11-22 19:45:50 1xVDR5-0003Hr-1R <= a@b.example H=(helo.example) [192.0.2.7]:38718 P=esmtp S=686 T=\"hello\" for u@lab.example")
	one("delivered", "2026-11-22 19:45:50 1xVDR5-0003Hr-1R => u@lab.example R=local T=local")
	one("completed", "2026-11-22 19:45:50 1xVDR5-0003Hr-1R Completed")
	one("cwd", "2026-11-22 19:45:50 cwd=/var/spool/exim4 3 args: /usr/sbin/exim4 -Mc 1xVDTo-0007N6-1q")
	for _, name := range []string{"c-cpanel", "e-timezone", "f-syslog", "g1-ipv6-one-64", "k-legit-busy"} {
		text, err := os.ReadFile(corpus + "/" + name + ".log")
		if err != nil {
			b.Fatal(err)
		}
		bench(name, bytes.Split(bytes.TrimSpace(text), []byte("\n")), "Europe/Berlin")
	}
}
