package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"runtime"
	"slices"
	"sync"

	"github.com/smtpguard/smtpguard/detector"
	"github.com/smtpguard/smtpguard/detector/exim"
)

const (
	// maxLine is the longest line that is parsed; Exim's own are cut at 8,192
	// bytes (log.c, LOG_BUFFER_SIZE), of a longer one nothing is believed.
	maxLine = 64 << 10
	// blockSize is how much of a log is parsed at a time. Logs are cut at the
	// same places whatever the number of cores, so the result is the same.
	blockSize = 512 << 10
)

// block is a piece of a log, whole lines, and the events in it.
type block struct {
	buf    []byte // len: what is used
	whole  int    // the lines end here; what follows belongs to the next block
	parser *exim.Parser

	events          []detector.Event
	lines, unparsed uint64
	count           uint64 // events that are not Tick
	parsed          chan struct{}
}

// parse turns the lines into events. Of Ticks one soon after the other only
// the last is kept: it says how far time has gone.
func (b *block) parse(p *exim.Parser) {
	b.events, b.lines, b.unparsed, b.count = b.events[:0], 0, 0, 0
	tick := false
	for rest := b.buf[:b.whole]; len(rest) > 0; {
		line := rest
		if i := bytes.IndexByte(rest, '\n'); i >= 0 {
			line, rest = rest[:i], rest[i+1:]
		} else {
			rest = nil
		}
		b.lines++
		// Parsed in its place: an event is large, and most lines give one.
		n := len(b.events)
		if n == cap(b.events) {
			b.events = slices.Grow(b.events, 1)
		}
		ev := &b.events[:n+1][n]
		if len(line) > maxLine || !p.Parse(line, ev) {
			b.unparsed++
			continue
		}
		if ev.Kind == detector.Tick {
			if tick {
				if off := ev.Time.Sub(b.events[n-1].Time); -dateSlack <= off && off <= dateSlack {
					b.events[n-1] = *ev
					continue
				}
			}
			tick = true
		} else {
			tick = false
			b.count++
		}
		b.events = b.events[:n+1]
	}
}

// readBlocks parses r on all cores and hands the blocks to take in order, each
// with the one after it, nil for the last. take must be done with the block
// when it returns.
func readBlocks(ctx context.Context, r io.Reader, parser *exim.Parser, take func(b, next *block)) error {
	workers := runtime.GOMAXPROCS(0)
	var (
		free  = make(chan *block, workers+2)
		work  = make(chan *block, workers+2)
		order = make(chan *block, workers+2)
		wg    sync.WaitGroup
		fault error // of the reader; read after order is closed
	)
	for range cap(free) {
		free <- &block{buf: make([]byte, 0, blockSize), parsed: make(chan struct{}, 1)}
	}
	for range workers {
		wg.Go(func() {
			for b := range work {
				b.parser = parser.Fork()
				b.parse(b.parser)
				b.parsed <- struct{}{}
			}
		})
	}
	root := parser
	parser = root.Fork() // what workers fork from, while root goes on below
	ctx, cancel := context.WithCancel(ctx)
	wg.Go(func() {
		defer close(order)
		defer close(work)
		fault = cut(ctx, r, free, func(b *block) {
			order <- b
			work <- b
		})
	})
	var last *block
	for b := range order {
		<-b.parsed
		if !root.Join(b.parser) {
			b.parse(root) // its times depend on what came before it
		}
		if last != nil {
			take(last, b)
			free <- last
		}
		last = b
	}
	if last != nil {
		take(last, nil)
	}
	cancel()
	wg.Wait()
	return fault
}

// cut reads r into blocks of whole lines.
func cut(ctx context.Context, r io.Reader, free <-chan *block, send func(*block)) error {
	var carry []byte // the beginning of a line
	skip := false    // in the middle of a line that is too long
	for {
		var b *block
		select {
		case b = <-free:
		case <-ctx.Done():
			return ctx.Err()
		}
		b.buf = append(b.buf[:0], carry...)
		n, err := io.ReadFull(r, b.buf[len(b.buf):cap(b.buf)])
		b.buf = b.buf[:len(b.buf)+n]
		end := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if skip {
			i := bytes.IndexByte(b.buf, '\n')
			if i < 0 {
				i = len(b.buf) - 1
			} else {
				skip = false
			}
			b.buf = b.buf[:copy(b.buf, b.buf[i+1:])]
		}
		b.whole = bytes.LastIndexByte(b.buf, '\n') + 1
		if err != nil {
			b.whole = len(b.buf) // the last line may lack its end
		} else if b.whole == 0 && len(b.buf) > maxLine {
			b.whole, skip = len(b.buf), true
		}
		carry = append(carry[:0], b.buf[b.whole:]...)
		send(b)
		if err != nil {
			if end {
				err = nil
			}
			return err
		}
	}
}
