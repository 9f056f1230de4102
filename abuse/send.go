package abuse

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/smtp"
	"net/textproto"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// outcome is what is known of a handover.
type outcome string

const (
	taken    outcome = "taken"    // the mail server said yes
	refused  outcome = "refused"  // it certainly has not taken it, and may later
	rejected outcome = "rejected" // nor will it ever
	unsure   outcome = "doubtful" // nobody knows
)

// handover gives a message to the mail server, with these recipients and no
// others, whatever its header says. Only what certainly did not leave is
// refused or rejected; all that ends in between is unsure. The first recipient
// is the one that counts: a message that was taken for it is taken, and the
// error says what is the matter with the others.
func (d *Desk) handover(ctx context.Context, from string, rcpt []string, msg []byte) (outcome, error) {
	for _, a := range append([]string{from}, rcpt...) {
		if good, err := CheckAddress(a); err != nil || good != a {
			return refused, errors.Join(errAddress, err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, d.config.Delivery.Timeout)
	defer cancel()
	if d.config.Delivery.By == SMTP {
		return d.submit(ctx, from, rcpt, msg)
	}
	return d.sendmail(ctx, from, rcpt, msg)
}

// sendmail runs the local program, without a shell: -i (a line with a dot is
// no end), -f (where bounces go), and the recipients after --.
func (d *Desk) sendmail(ctx context.Context, from string, rcpt []string, msg []byte) (outcome, error) {
	argv := slices.Concat(d.config.Delivery.Before, []string{d.config.Delivery.Program, "-i", "-f", from, "--"}, rcpt)
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C"}
	cmd.Dir = "/"
	cmd.Stdin = bytes.NewReader(bytes.ReplaceAll(msg, []byte("\r\n"), []byte("\n")))
	said := &head{max: 2048}
	cmd.Stdout, cmd.Stderr = said, said
	cmd.WaitDelay = 2 * time.Second
	if err := cmd.Start(); err != nil {
		return refused, fmt.Errorf("starting the mail program: %w", err)
	}
	err := cmd.Wait()
	if err == nil || errors.Is(err, exec.ErrWaitDelay) && cmd.ProcessState.Success() {
		return taken, nil // a child that delivers may hold the pipe longer
	}
	if ctx.Err() != nil {
		return unsure, fmt.Errorf("the mail program did not end within %s", d.config.Delivery.Timeout)
	}
	if s := clean(string(said.b), 300); s != "" {
		err = fmt.Errorf("%w: %s", err, s)
	}
	switch cmd.ProcessState.ExitCode() {
	case 64, 77, 78: // EX_USAGE, EX_NOPERM, EX_CONFIG of sysexits.h: it took nothing
		return refused, fmt.Errorf("the mail program did not take it: %w", err)
	}
	return unsure, fmt.Errorf("the mail program failed: %w", err)
}

// head keeps the first bytes of what a program says.
type head struct {
	b   []byte
	max int
}

func (h *head) Write(p []byte) (int, error) {
	h.b = append(h.b, p[:min(len(p), h.max-len(h.b))]...)
	return len(p), nil
}

// submit hands the message to a server: TLS (STARTTLS, or from the beginning
// on port 465) unless it is on this machine, and a login if there is a user.
// Nobody stands between us and a server on loopback, so its certificate, which
// is rarely one for that name, is not looked at there.
func (d *Desk) submit(ctx context.Context, from string, rcpt []string, msg []byte) (outcome, error) {
	t := d.config.Delivery
	host, port, err := net.SplitHostPort(t.Server)
	if err != nil {
		return refused, err
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", t.Server)
	if err != nil {
		return refused, fmt.Errorf("reaching the mail server: %w", err)
	}
	defer conn.Close()
	local := isLocal(host, conn)
	if end, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(end)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	conf := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12, InsecureSkipVerify: local}
	if port == "465" {
		conn = tls.Client(conn, conf)
	}
	c, err := smtp.NewClient(&boundedConn{Conn: conn, left: maxBody}, host)
	if err != nil {
		return refused, fmt.Errorf("the mail server's greeting: %w", err)
	}
	defer c.Close()
	before := func() error {
		if err := c.Hello("localhost"); err != nil {
			return err
		}
		if ok, _ := c.Extension("STARTTLS"); ok && port != "465" {
			if err := c.StartTLS(conf); err != nil {
				return fmt.Errorf("STARTTLS: %w", err)
			}
		} else if port != "465" && !local {
			return errors.New("it offers no TLS")
		}
		if t.User == "" {
			return nil
		}
		pw, err := readBounded(t.PasswordFile, 4096)
		if err != nil {
			return fmt.Errorf("reading the password: %w", err)
		}
		line, _, _ := strings.Cut(string(pw), "\n")
		return c.Auth(smtp.PlainAuth("", t.User, strings.TrimRight(line, "\r"), host))
	}
	if err := before(); err != nil {
		return refused, fmt.Errorf("the mail server: %w", err) // which a person can mend
	}
	no := func(err error) (outcome, error) {
		err = fmt.Errorf("the mail server: %w", err)
		var said *textproto.Error
		if errors.As(err, &said) && said.Code >= 500 && said.Code < 600 {
			return rejected, err
		}
		return refused, err
	}
	if err := c.Mail(from); err != nil {
		return no(err)
	}
	var copies []error
	for i, r := range rcpt {
		err := c.Rcpt(r)
		if err != nil {
			err = fmt.Errorf("%s: %w", r, err)
		}
		var said *textproto.Error
		switch {
		case err == nil:
		case i > 0 && errors.As(err, &said):
			copies = append(copies, err)
		default:
			return no(err)
		}
	}
	w, err := c.Data()
	if err != nil {
		return no(err)
	}
	if _, err := w.Write(msg); err != nil {
		// Without the final dot no server takes a message.
		return refused, fmt.Errorf("handing over the message: %w", err)
	}
	if err := w.Close(); err != nil {
		var said *textproto.Error
		if errors.As(err, &said) {
			return no(err)
		}
		return unsure, fmt.Errorf("the mail server did not say whether it took the message: %w", err)
	}
	_ = c.Quit()
	return taken, errors.Join(copies...)
}

// isLocal reports whether a server that is named as this machine's is.
func isLocal(host string, conn net.Conn) bool {
	a, err := netip.ParseAddr(host)
	if host != "localhost" && (err != nil || !a.IsLoopback()) {
		return false
	}
	there, err := netip.ParseAddrPort(conn.RemoteAddr().String())
	return err == nil && there.Addr().Unmap().IsLoopback()
}

// boundedConn ends a dialogue in which the server says too much.
type boundedConn struct {
	net.Conn
	left int
}

func (b *boundedConn) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, errTooLong
	}
	n, err := b.Conn.Read(p[:min(len(p), b.left)])
	b.left -= n
	return n, err
}
