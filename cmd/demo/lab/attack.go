package lab

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Kind is a way to hold a mail server's slots. All kinds try again after a
// refusal, 0.1 to 0.4 s later, until they have a slot: a flood of more
// connections than there are slots keeps the server full.
type Kind string

const (
	// Silent reads the greeting and says nothing. It does not come back when
	// it has lost its connection.
	Silent Kind = "silent"
	// Slow sends one byte every Attack.Pause: each starts Exim's timeout
	// anew.
	Slow Kind = "slow"
	// Reconnect is Silent, but connects again 0.1 to 0.4 s after each loss.
	Reconnect Kind = "reconnect"
	// NonReader sends 40,000 recipients in one go and never reads the
	// answers, so that the server blocks in write, for which it has no
	// timeout.
	NonReader Kind = "nonreader"
)

// Kinds are all the kinds of attackers.
var Kinds = []Kind{Silent, Slow, Reconnect, NonReader}

const (
	slowPause   = 5 * time.Second
	recipients  = 40_000
	rampPause   = 5 * time.Millisecond // between two connections, so that the listen queue (50) never overflows
	dialTimeout = 3 * time.Second
	// greetingTimeout is how long an attacker waits for a greeting.
	greetingTimeout = 10 * time.Second
)

// Attack describes attackers.
type Attack struct {
	Kind    Kind
	Sources []netip.Addr // all of one family, or of both
	Each    int          // connections at the same time from each source
	// Pause of slow attackers between two bytes; 0 means 5 s.
	Pause time.Duration
}

// Attackers are an attack under way.
type Attackers struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup

	connected, refused, lost, unanswered, open atomic.Int64
}

// AttackStats is what the attackers have seen so far.
type AttackStats struct {
	Connected  int64 // connections that got a greeting
	Refused    int64 // connections turned away with 421, or reset before any greeting
	Lost       int64 // connections with a greeting that the server's side ended later
	Unanswered int64 // attempts to which nothing at all came back
	Open       int64 // connections with a greeting that are open as far as the attacker knows
}

// Attack starts attackers, which go on until Stop, or until the world ends.
// They connect one after the other, Each rounds of all sources.
func (w *World) Attack(ctx context.Context, a Attack) *Attackers {
	ctx, cancel := context.WithCancel(ctx)
	a.Pause = cmp.Or(a.Pause, slowPause)
	at := &Attackers{cancel: cancel}
	at.wg.Go(func() {
		for range a.Each {
			for _, src := range a.Sources {
				at.wg.Go(func() { at.one(ctx, w, a, src) })
				if !pause(ctx, rampPause) {
					return
				}
			}
		}
	})
	w.atClose(at.Stop)
	return at
}

// Stop ends the attack; its connections are reset. It may be called more
// than once.
func (at *Attackers) Stop() {
	at.cancel()
	at.wg.Wait()
}

// Stats tells how the attackers fare.
func (at *Attackers) Stats() AttackStats {
	return AttackStats{
		Connected:  at.connected.Load(),
		Refused:    at.refused.Load(),
		Lost:       at.lost.Load(),
		Unanswered: at.unanswered.Load(),
		Open:       at.open.Load(),
	}
}

// one is one of the attackers' connections and all that follow it.
func (at *Attackers) one(ctx context.Context, w *World, a Attack, src netip.Addr) {
	for {
		refused := at.connection(ctx, w, a, src)
		if !refused && a.Kind != Reconnect || !pause(ctx, time.Duration(100+rand.IntN(300))*time.Millisecond) {
			return
		}
	}
}

// connection makes one connection and holds it as long as it can. It reports
// whether the server refused it for want of a slot.
func (at *Attackers) connection(ctx context.Context, w *World, a Attack, src netip.Addr) (refused bool) {
	rcvbuf := 0
	if a.Kind == NonReader {
		rcvbuf = 4096
	}
	c, err := w.dial(ctx, src, w.smtp(src), rcvbuf, dialTimeout)
	if err != nil {
		at.failed(ctx, err)
		return false
	}
	defer c.abort()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()

	in := bufio.NewReaderSize(c, 512)
	// A connection in the listen queue waits here for its greeting, and one
	// that was blocked just now waits in vain.
	c.SetReadDeadline(time.Now().Add(greetingTimeout))
	greeting, err := in.ReadString('\n')
	switch {
	case ctx.Err() != nil:
		return false
	case strings.HasPrefix(greeting, "421"):
		at.refused.Add(1)
		return true
	case err != nil:
		at.failed(ctx, err)
		return false
	}
	c.SetReadDeadline(time.Time{})
	if ctx.Err() != nil {
		return false
	}
	at.connected.Add(1)
	at.open.Add(1)
	defer at.open.Add(-1)

	switch a.Kind {
	case Slow:
		go drip(ctx, c, a.Pause)
		io.Copy(io.Discard, in)
	case NonReader:
		drown(c, in)
		// Everything is sent, or the window is shut. Wait for the end
		// without reading: only an error wakes us.
		waitForReset(ctx, c)
	default:
		io.Copy(io.Discard, in)
	}
	if ctx.Err() == nil {
		at.lost.Add(1)
	}
	return false
}

// failed counts an attempt that came to nothing.
func (at *Attackers) failed(ctx context.Context, err error) {
	var timeout net.Error
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, os.ErrDeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout(), errors.Is(err, syscall.ETIMEDOUT):
		at.unanswered.Add(1)
	default:
		at.refused.Add(1)
	}
}

// drip sends a byte now and then until the connection ends.
func drip(ctx context.Context, c conn, every time.Duration) {
	for pause(ctx, every) {
		if _, err := c.Write([]byte{'x'}); err != nil {
			return
		}
	}
}

// drown starts a transaction and sends recipients without reading what
// comes back.
func drown(c conn, in *bufio.Reader) {
	// The server allows this only to who waited for its answer to EHLO.
	if _, err := io.WriteString(c, "EHLO bot.example\r\n"); err != nil {
		return
	}
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		if strings.HasPrefix(line, "250 ") {
			break
		}
	}
	var b strings.Builder
	b.WriteString("MAIL FROM:<a@bot.example>\r\n")
	for i := range recipients {
		fmt.Fprintf(&b, "RCPT TO:<u%d@%s>\r\n", i, mailDomain)
	}
	io.WriteString(c, b.String())
}

// waitForReset returns when the connection has an error or ctx ends. It
// does not read.
func waitForReset(ctx context.Context, c conn) {
	for pause(ctx, 50*time.Millisecond) {
		if socketError(c) {
			return
		}
	}
}

// pause waits for d; it reports false if ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// Addresses are n addresses of p: the first of its first n subnets of sub
// bits, or simply its first n addresses if sub is the length of an address.
// The very first, which names the network, is left out in that case.
func Addresses(p netip.Prefix, sub, n int) []netip.Addr {
	host := p.Addr().BitLen() - sub
	a := p.Masked().Addr()
	var list []netip.Addr
	for i := range n {
		offset := uint64(i + 1)
		b := a.AsSlice()
		// Add offset << host, byte by byte from the right.
		for shift := host; offset > 0; {
			at := len(b) - 1 - shift/8
			if at < 0 {
				break
			}
			sum := uint64(b[at]) + (offset<<(shift%8))&0xff
			b[at] = byte(sum)
			offset = offset>>(8-shift%8) + sum>>8
			shift += 8 - shift%8
		}
		addr, _ := netip.AddrFromSlice(b)
		if host > 0 {
			addr = addr.Next()
		}
		list = append(list, addr)
	}
	return list
}
