package lab

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"
)

const (
	mailDomain = "lab.example"    // the server takes all mail for it, and throws it away
	hostName   = "mx.lab.example" // the server's own
	backlog    = 50               // of the listening sockets, as in cPanel's Exim
)

// CPanelSelector is the log_selector of cPanel's Exim, which logs when
// connections begin and end, with their ports.
const CPanelSelector = "+incoming_port +smtp_connection +all_parents +retry_defer +subject +arguments +received_recipients"

// ErrNoExim: Exim is not installed, or cannot run in this world.
var ErrNoExim = errors.New("no Exim here")

// MTAOptions describe the mail server.
type MTAOptions struct {
	// Kind is "exim", "standin", or "" for Exim if it can be had and the
	// stand-in if not.
	Kind string
	// Slots is how many connections it takes at a time
	// (smtp_accept_max); 0 means 100.
	Slots int
	// ReceiveTimeout is how long it waits for a peer's next byte
	// (smtp_receive_timeout); 0 means Exim's own 5 minutes.
	ReceiveTimeout time.Duration
	// Selector is Exim's log_selector; "" means Exim's default, with which
	// neither the beginning nor the ordinary end of a connection is logged.
	Selector string
}

// MTA is a mail server in a world.
type MTA struct {
	Kind  string // "exim" or "standin"
	About string // in words: "Exim 4.96"
	Log   string // path of its main log
	Slots int
	stop  func()
}

// Stop ends the mail server and all its connections. It may be called more
// than once; Close does it too.
func (m *MTA) Stop() { m.stop() }

// StartMTA starts a mail server in the server's network and returns when it
// listens. There can be one at a time.
func (w *World) StartMTA(ctx context.Context, o MTAOptions) (*MTA, error) {
	o.Slots = cmp.Or(o.Slots, 100)
	o.ReceiveTimeout = cmp.Or(o.ReceiveTimeout, 5*time.Minute)
	var m *MTA
	var err error
	switch o.Kind {
	case "exim":
		m, err = w.startExim(ctx, o)
	case "standin":
		m, err = w.startStandIn(o)
	case "":
		if m, err = w.startExim(ctx, o); errors.Is(err, ErrNoExim) {
			m, err = w.startStandIn(o)
		}
	default:
		err = fmt.Errorf("no such kind of mail server: %q", o.Kind)
	}
	if err != nil {
		return nil, fmt.Errorf("starting the mail server: %w", err)
	}
	w.atClose(m.stop)
	return m, nil
}

// smtp is where a client with the address src finds the mail server.
func (w *World) smtp(src netip.Addr) netip.AddrPort {
	switch {
	case w.loopback:
		return netip.AddrPortFrom(loopbackServer, uint16(w.port.Load()))
	case src.Is4():
		return netip.AddrPortFrom(ServerV4, SMTPPort)
	}
	return netip.AddrPortFrom(ServerV6, SMTPPort)
}

// AppendLog appends text to the mail server's log in one write, as any
// program that may write there can.
func (m *MTA) AppendLog(text string) error {
	f, err := os.OpenFile(m.Log, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}
