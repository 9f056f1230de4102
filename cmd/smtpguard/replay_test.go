package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

// Blocks cut on all cores give the events that one line after the other
// gives, however the reader delivers, and however long the lines are.
func TestReadBlocks(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	r := rand.New(rand.NewPCG(1, 2))
	var log strings.Builder
	for i := range 40_000 {
		switch r.IntN(2000) {
		case 0:
			log.WriteString(long(maxLine - 10 + r.IntN(20)))
		case 1:
			log.WriteString(long(r.IntN(3 * blockSize)))
		case 2:
			log.WriteString("\n\n\x00\n")
		default:
			fmt.Fprintf(&log, "%s SMTP connection from [192.0.2.%d]:%d (TCP/IP connection count = 3)",
				time.Unix(1e9+int64(i), 0).UTC().Format(time.DateTime), r.IntN(256), 1+r.IntN(60000))
		}
		log.WriteByte('\n')
	}
	text := log.String() + "2033-01-01 00:00:00 last line without an end"

	p := exim.New(time.UTC)
	var want []detector.Event
	var lines, unparsed uint64
	for _, l := range strings.Split(text, "\n") {
		var ev detector.Event
		lines++
		if len(l) > maxLine || !p.Parse([]byte(l), &ev) {
			unparsed++
		} else {
			want = append(want, ev)
		}
	}
	for name, rd := range map[string]func(io.Reader) io.Reader{
		"plain":               func(r io.Reader) io.Reader { return r },
		"half":                iotest.HalfReader,
		"data with the error": iotest.DataErrReader,
	} {
		for _, procs := range []int{1, 4} {
			t.Run(fmt.Sprint(name, procs), func(t *testing.T) {
				defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(procs))
				var got []detector.Event
				var gotLines, gotUnparsed uint64
				err := readBlocks(t.Context(), rd(strings.NewReader(text)), exim.New(time.UTC), func(b, _ *block) {
					got = append(got, b.events...)
					gotLines += b.lines
					gotUnparsed += b.unparsed
				})
				if err != nil {
					t.Fatal(err)
				}
				if gotLines != lines || gotUnparsed != unparsed {
					t.Errorf("%d lines, %d of them not Exim's; want %d, %d", gotLines, gotUnparsed, lines, unparsed)
				}
				if len(got) != len(want) {
					t.Fatalf("%d events, want %d", len(got), len(want))
				}
				for i := range got {
					if got[i] != want[i] {
						t.Fatalf("event %d: %+v, want %+v", i, got[i], want[i])
					}
				}
			})
		}
	}
}

func TestReadBlocksEnds(t *testing.T) {
	broken := errors.New("broken")
	line := "2026-01-01 00:00:00 x\n"
	n := uint64(0)
	err := readBlocks(t.Context(), io.MultiReader(strings.NewReader(line), iotest.ErrReader(broken)), exim.New(time.UTC), func(b, _ *block) { n += b.lines })
	if !errors.Is(err, broken) || n != 1 {
		t.Errorf("%d lines, %v", n, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	endless := readerFunc(func(b []byte) (int, error) {
		return bytes.Count(b[:copy(b, strings.Repeat(line, len(b)/len(line)+1))], nil) - 1, nil
	})
	err = readBlocks(ctx, endless, exim.New(time.UTC), func(_, _ *block) { cancel() })
	if !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// A log in one piece and in any two gives the same blocks and the same
// summary, byte for byte.
func TestReplayInPieces(t *testing.T) {
	dir := t.TempDir()
	replay := func(files ...string) string {
		var out, fault bytes.Buffer
		if code := run(t.Context(), append([]string{"smtpguard", "--json", "replay", "--zone", "UTC"}, files...), strings.NewReader(""), &out, &fault); code != exitDone {
			t.Fatalf("replay %s: exit status %d: %s", files, code, fault.String())
		}
		return out.String()
	}
	// The pieces are named in the wrong order: their first lines tell the
	// right one.
	for _, name := range []string{"b-all", "d-pid-millisec", "g1-ipv6-one-64", "h-one-ip-hold", "j-rapid-churn"} {
		text, err := os.ReadFile("../../testdata/corpus/" + name + ".log")
		if err != nil {
			t.Fatal(err)
		}
		whole := filepath.Join(dir, "whole")
		if err := os.WriteFile(whole, text, 0o600); err != nil {
			t.Fatal(err)
		}
		want := replay(whole)
		if !strings.Contains(want, `"type":"block"`) {
			t.Fatalf("%s: nothing is blocked: %s", name, want)
		}
		for _, share := range []float64{0.2, 0.35, 0.5, 0.8} {
			at := int(share * float64(len(text)))
			at += bytes.IndexByte(text[at:], '\n') + 1
			first, second := filepath.Join(dir, "first"), filepath.Join(dir, "second")
			if err := errors.Join(os.WriteFile(first, text[:at], 0o600), os.WriteFile(second, text[at:], 0o600)); err != nil {
				t.Fatal(err)
			}
			if got := replay(second, first); got != want {
				t.Errorf("%s cut after %d bytes:\n%s\nwant\n%s", name, at, got, want)
			}
		}
	}
}

// FuzzReplay: any bytes are a log, of which at worst nothing is understood.
func FuzzReplay(f *testing.F) {
	f.Add([]byte("2026-01-01 00:00:00 SMTP connection from [192.0.2.1]:1 (TCP/IP connection count = 1)\n"))
	f.Add([]byte("\x1f\x8b\x08\x00"))
	f.Add([]byte("BZh91AY&SY"))
	f.Add([]byte{0xfd, '7', 'z', 'X', 'Z', 0, 0, 4})
	f.Add([]byte{0x28, 0xb5, 0x2f, 0xfd, 4, 0})
	f.Fuzz(func(t *testing.T, log []byte) {
		code := run(t.Context(), []string{"smtpguard", "--json", "replay", "-"}, bytes.NewReader(log), io.Discard, io.Discard)
		if code != exitDone && code != exitFailed {
			t.Errorf("exit status %d", code)
		}
	})
}

// BenchmarkReplay is the whole of replay on a log of proper senders at a busy
// hour, a hundred times in a row.
func BenchmarkReplay(b *testing.B) {
	one, err := os.ReadFile("../../testdata/corpus/k-legit-busy.log")
	if err != nil {
		b.Fatal(err)
	}
	log := bytes.Repeat(one, 100)
	lines := bytes.Count(log, []byte("\n"))
	b.SetBytes(int64(len(log)))
	for b.Loop() {
		if code := run(b.Context(), []string{"smtpguard", "--json", "replay", "-"}, bytes.NewReader(log), io.Discard, os.Stderr); code != 0 {
			b.Fatal(code)
		}
	}
	b.ReportMetric(float64(lines)*float64(b.N)/b.Elapsed().Seconds(), "lines/s")
}
