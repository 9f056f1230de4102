package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// ErrRunning: another daemon answers on the socket.
var ErrRunning = errors.New("another smtpguard is running")

// Listen makes the Unix socket at path, mode 0600, or 0660 for group if one is
// named. It takes the place of a socket that nobody answers on, never of a
// file of another kind. The error wraps ErrRunning if somebody answers.
func Listen(path, group string) (net.Listener, error) {
	if fi, err := os.Lstat(path); err == nil {
		if fi.Mode().Type() != fs.ModeSocket {
			return nil, fmt.Errorf("%s exists and is not a socket", path)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("%w and answers on %s", ErrRunning, path)
		} else if !errors.Is(err, unix.ECONNREFUSED) {
			return nil, fmt.Errorf("looking who answers on %s: %w", path, err)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing the socket of a daemon that is gone: %w", err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the directory of the socket: %w", err)
	}
	gid := -1
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return nil, fmt.Errorf("control.group: %w", err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return nil, fmt.Errorf("control.group: %w", err)
		}
	}
	// The socket must never be open to all, not even between bind and chmod.
	// Under another name first: whoever finds it under its own finds it ready.
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	os.Remove(tmp)
	mask := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	unix.Umask(mask)
	if err != nil {
		return nil, fmt.Errorf("making the socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	mode := fs.FileMode(0o600)
	if gid >= 0 {
		mode = 0o660
		err = os.Chown(tmp, -1, gid)
	}
	if err == nil {
		err = os.Chmod(tmp, mode)
	}
	var made fs.FileInfo
	if err == nil {
		made, err = os.Lstat(tmp)
	}
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		l.Close()
		os.Remove(tmp)
		return nil, fmt.Errorf("making the socket: %w", err)
	}
	return &listener{UnixListener: l, path: path, made: made, group: gid >= 0}, nil
}

// listener removes the socket when it is closed, if it is still its own.
type listener struct {
	*net.UnixListener
	group bool // it is open to a group
	path  string
	made  fs.FileInfo
	once  sync.Once
}

func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if fi, err := os.Lstat(l.path); err == nil && os.SameFile(fi, l.made) {
			os.Remove(l.path)
		}
	})
	return err
}

// peer is who is at the other end of a connection.
type peer struct {
	name string // as Operator has it
	ok   bool   // may be served
}

type peerKey struct{}

// Serve answers on l until ctx ends; it closes l. Only those whom the kernel
// names are served: root, the daemon's own user, and with a socket that is
// open to a group, whoever could open it; connectionsMost at a time. with adds what else is answered on: see WithReports.
func Serve(ctx context.Context, l net.Listener, g Guard, log *slog.Logger, with ...func(*http.ServeMux)) error {
	own, _ := l.(*listener)
	group := own != nil && own.group
	srv := &http.Server{
		Handler:           known(handler(g, with...)),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 2 * deadline, IdleTimeout: 30 * time.Second,
		MaxHeaderBytes: 16 << 10,
		ErrorLog:       slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, peerKey{}, who(c, group))
		},
	}
	done := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(done)
		grace, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			srv.Close()
		}
	})
	err := srv.Serve(&limited{Listener: l})
	if !stop() {
		<-done
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// handler answers the requests.
func handler(g Guard, with ...func(*http.ServeMux)) http.Handler {
	s := &server{guard: g}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+pathStatus, s.status)
	mux.HandleFunc("GET "+pathView, s.view)
	mux.HandleFunc("GET "+pathBlocks, s.blocks)
	mux.HandleFunc("GET "+pathHistory, s.history)
	mux.HandleFunc("GET "+pathExplain, s.explain)
	mux.HandleFunc("GET "+pathAllowed, s.allowed)
	mux.HandleFunc("POST "+pathBlock, s.block)
	mux.HandleFunc("POST "+pathUnblock, s.unblock)
	mux.HandleFunc("POST "+pathAllow, s.allow)
	mux.HandleFunc("POST "+pathForget, s.disallow)
	mux.HandleFunc("POST "+pathLearn, s.learn)
	mux.HandleFunc("POST "+pathSync, s.sync)
	mux.HandleFunc("POST "+pathCommit, s.commit)
	mux.HandleFunc("POST "+pathResume, s.resume)
	for _, add := range with {
		add(mux)
	}
	return http.MaxBytesHandler(mux, maxRequest)
}

// known turns away whom the kernel does not name.
func known(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if p, _ := r.Context().Value(peerKey{}).(peer); !p.ok {
			refuse(w, http.StatusForbidden, failure{Error: "only root, and the group that the policy names, may talk to the daemon"})
			return
		}
		h.ServeHTTP(w, r)
	})
}

// who names the user at the other end, by the kernel's word. Where the socket is
// open to a group the kernel has looked whether he is in it.
func who(c net.Conn, group bool) (p peer) {
	u, ok := c.(syscall.Conn)
	if !ok {
		return p
	}
	cred, err := credentials(u)
	if err != nil {
		return p
	}
	uid := int(cred.Uid)
	p.name = Operator(uid)
	p.ok = group || uid == 0 || uid == os.Getuid()
	return p
}

// Operator names a user as blocks and decisions record it.
func Operator(uid int) string {
	name := "user"
	if u, err := user.LookupId(strconv.Itoa(uid)); err == nil {
		name = u.Username
	}
	return fmt.Sprintf("%s (uid %d)", name, uid)
}

type server struct{ guard Guard }

func (s *server) status(w http.ResponseWriter, r *http.Request) {
	v, err := s.guard.Status(r.Context())
	answer(w, v, err)
}

func (s *server) view(w http.ResponseWriter, r *http.Request) {
	v, err := s.guard.View(r.Context())
	answer(w, v, err)
}

func (s *server) blocks(w http.ResponseWriter, r *http.Request) {
	v, err := s.guard.Blocks(r.Context())
	answer(w, v, err)
}

func (s *server) allowed(w http.ResponseWriter, r *http.Request) {
	v, err := s.guard.Allowed(r.Context())
	answer(w, v, err)
}

func (s *server) history(w http.ResponseWriter, r *http.Request) {
	if p, ok := query(w, r); ok {
		v, err := s.guard.History(r.Context(), p)
		answer(w, v, err)
	}
}

func (s *server) explain(w http.ResponseWriter, r *http.Request) {
	if p, ok := query(w, r); ok {
		v, err := s.guard.Explain(r.Context(), p)
		answer(w, v, err)
	}
}

func (s *server) block(w http.ResponseWriter, r *http.Request) {
	c, ok := body(w, r)
	if !ok {
		return
	}
	for i := range c.Block {
		c.Block[i].By = by(r)
		if err := Printable(c.Block[i].Reason); err != nil {
			refuse(w, http.StatusBadRequest, failure{Error: err.Error()})
			return
		}
	}
	v, err := s.guard.Block(r.Context(), c.Block, c.Dry)
	answer(w, v, err)
}

func (s *server) sync(w http.ResponseWriter, r *http.Request) {
	if _, ok := body(w, r); ok {
		v, err := s.guard.Sync(r.Context())
		answer(w, v, err)
	}
}

func (s *server) unblock(w http.ResponseWriter, r *http.Request) {
	if c, ok := body(w, r); ok {
		if c.All == c.Prefix.IsValid() {
			refuse(w, http.StatusBadRequest, failure{Error: "name a prefix, or all, not both"})
			return
		}
		v, err := s.guard.Unblock(r.Context(), c.Prefix, by(r))
		answerPartly(w, v, v, err)
	}
}

func (s *server) allow(w http.ResponseWriter, r *http.Request) {
	if c, ok := body(w, r); ok {
		v, err := s.guard.Allow(r.Context(), store.AllowEntry{Prefix: c.Prefix, Name: c.Name, Note: c.Text, By: by(r), Added: time.Now(), Until: c.Until})
		answerPartly(w, v, v, err)
	}
}

func (s *server) disallow(w http.ResponseWriter, r *http.Request) {
	if c, ok := body(w, r); ok {
		if c.Name != "" {
			v, err := s.guard.DisallowName(r.Context(), c.Name)
			answer(w, v, err)
			return
		}
		v, err := s.guard.Disallow(r.Context(), c.Prefix)
		answer(w, v, err)
	}
}

func (s *server) commit(w http.ResponseWriter, r *http.Request) {
	if c, ok := body(w, r); ok {
		v, err := s.guard.Commit(r.Context(), by(r), c.Again)
		answer(w, v, err)
	}
}

func (s *server) resume(w http.ResponseWriter, r *http.Request) {
	if _, ok := body(w, r); ok {
		v, err := s.guard.Resume(r.Context(), by(r))
		answer(w, v, err)
	}
}

func (s *server) learn(w http.ResponseWriter, r *http.Request) {
	if c, ok := body(w, r); ok {
		answer(w, len(c.Good), s.guard.Learn(r.Context(), c.Good))
	}
}

func by(r *http.Request) string {
	p, _ := r.Context().Value(peerKey{}).(peer)
	return p.name
}

func query(w http.ResponseWriter, r *http.Request) (netip.Prefix, bool) {
	p, err := netip.ParsePrefix(r.URL.Query().Get("prefix"))
	if err != nil {
		refuse(w, http.StatusBadRequest, failure{Error: "prefix: " + err.Error()})
		return p, false
	}
	return p, true
}

func body(w http.ResponseWriter, r *http.Request) (c change, ok bool) {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	err := dec.Decode(&c)
	if err == nil {
		if _, more := dec.Token(); more != io.EOF {
			err = errors.New("more than one value")
		}
	}
	if err == nil {
		err = Printable(c.Text)
	}
	if err != nil {
		refuse(w, http.StatusBadRequest, failure{Error: "reading the request: " + err.Error()})
		return c, false
	}
	return c, true
}

// Printable refuses text that would garble a terminal or a log line, or is
// longer than 500 bytes.
func Printable(s string) error {
	if len(s) > 500 {
		return errors.New("the text is longer than 500 bytes")
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f || r == '\uFFFD' || (r >= 0x80 && r < 0xa0) }) {
		return errors.New("the text has control characters")
	}
	return nil
}

func answer(w http.ResponseWriter, v any, err error) { answerPartly(w, v, nil, err) }

// answerPartly answers with v, or with the error and with what was done all
// the same.
func answerPartly(w http.ResponseWriter, v any, done []store.Block, err error) {
	if err != nil {
		f := failure{Error: err.Error(), Blocks: done, NoTrial: errors.Is(err, guard.ErrNoTrial)}
		code := http.StatusInternalServerError
		if errors.As(err, &f.Covered) {
			code = http.StatusConflict
		}
		refuse(w, code, f)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

func refuse(w http.ResponseWriter, code int, f failure) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(f)
}
