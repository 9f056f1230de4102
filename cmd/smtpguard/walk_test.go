package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestWalk takes a random walk over what can happen to a server: commands with
// and without a daemon, somebody who flushes everything, kills at any moment,
// another backend. After each step, what `blocks list` says is in force is what
// the kernel holds, and nobody who is allowed is among it. With a daemon that is
// so within seconds; without one nothing is put back, and it is said.
func TestWalk(t *testing.T) {
	if os.Geteuid() != 0 {
		skip(t, errors.New("network namespaces need root"))
	}
	for _, c := range []string{"nft", "iptables", "ipset", "ip"} {
		if _, err := exec.LookPath(c); err != nil {
			skip(t, err)
		}
	}
	const steps = 40
	seed := uint64(time.Now().UnixNano())
	w := &walker{t: t, dir: t.TempDir(), r: rand.New(rand.NewPCG(seed, 0)), allowed: make(map[netip.Prefix]bool), backend: "nftables"}
	done := make(chan struct{})
	go func() { // its thread is in a network namespace of its own, and ends with it
		defer close(done)
		runtime.LockOSThread()
		defer w.stop(syscall.SIGKILL)
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			t.Error(err)
			return
		}
		w.run("ip", "link", "set", "lo", "up")
		w.write()
		w.start()
		for range steps {
			step := w.step()
			if err := w.agree(); err != nil {
				log, _ := os.ReadFile(filepath.Join(w.dir, "run.log"))
				t.Errorf("seed %d, after %s:\n%v\nbefore:\n%s\nthe daemons said:\n%s", seed, step, err, strings.Join(w.past, "\n"), log[max(0, len(log)-4000):])
				return
			}
			w.past = append(w.past, step)
		}
	}()
	<-done
}

type walker struct {
	t       *testing.T
	dir     string
	r       *rand.Rand
	backend string
	daemon  *exec.Cmd // nil: none runs
	allowed map[netip.Prefix]bool
	past    []string
}

func (w *walker) write() {
	text := "mode: enforce\nconfirm: off\ncapacity: 50\nlogs: [DIR/main.log]\nfirewall: {backend: " + w.backend + "}\nstore: {path: DIR/s.db}\ncontrol: {socket: DIR/s.sock}\nreports: {mode: off}\n"
	err := os.WriteFile(filepath.Join(w.dir, "policy.yaml"), []byte(strings.ReplaceAll(text, "DIR", w.dir)), 0o600)
	if err = errors.Join(err, os.WriteFile(filepath.Join(w.dir, "main.log"), nil, 0o600)); err != nil {
		w.t.Error(err)
	}
}

func (w *walker) run(name string, args ...string) (out string, status int) {
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "SMTPGUARD_POLICY="+w.dir+"/policy.yaml")
	var said bytes.Buffer
	cmd.Stderr = &said
	b, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		w.t.Error(err)
	}
	if cmd.ProcessState.ExitCode() != 0 {
		b = append(b, said.Bytes()...)
	}
	return string(b), cmd.ProcessState.ExitCode()
}

func (w *walker) begin() {
	log, err := os.OpenFile(filepath.Join(w.dir, "run.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Error(err)
		return
	}
	defer log.Close()
	w.daemon = exec.Command("smtpguard", "run")
	w.daemon.Env = append(os.Environ(), "SMTPGUARD_POLICY="+w.dir+"/policy.yaml")
	w.daemon.Stderr = log
	if err := w.daemon.Start(); err != nil {
		w.t.Error(err)
	}
}

func (w *walker) start() {
	w.begin()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(w.dir, "s.sock")); err == nil {
			if _, status := w.run("smtpguard", "status"); status == 0 {
				return
			}
		}
	}
	w.t.Error("no daemon")
}

func (w *walker) stop(how syscall.Signal) {
	if w.daemon != nil {
		_ = w.daemon.Process.Signal(how)
		_ = w.daemon.Wait()
		w.daemon = nil
	}
}

// source is some prefix of a small net, so that they often overlap.
func (w *walker) source() netip.Prefix {
	if w.r.IntN(5) == 0 {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 7: byte(w.r.IntN(4))}), 64)
	}
	bits := []int{32, 32, 32, 28, 24}[w.r.IntN(5)]
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(w.r.IntN(256))}), bits).Masked()
}

func (w *walker) step() string {
	guard := func(args ...string) string {
		out, status := w.run("smtpguard", args...)
		return fmt.Sprintf("%s: %d\n%.400s", strings.Join(args, " "), status, out)
	}
	p := w.source()
	switch n := w.r.IntN(20); {
	case n < 5:
		return guard("block", p.String(), "--for", "1h")
	case n < 6:
		return guard("block", p.String(), "--for", "2s")
	case n < 8:
		return guard("unblock", p.String())
	case n < 9:
		return guard("unblock", "--all")
	case n < 11:
		w.allowed[p] = true
		return guard("allow", "add", p.String())
	case n < 12:
		for q := range w.allowed {
			delete(w.allowed, q)
			return guard("allow", "remove", q.String())
		}
		return "nothing"
	case n < 14:
		w.run("ipset", "flush")
		w.run("nft", "flush", "ruleset")
		return "flush ruleset"
	case n < 15:
		return guard("firewall", "sync")
	case n < 16:
		w.stop(syscall.SIGTERM)
		return "stop"
	case n < 17:
		w.stop(syscall.SIGKILL)
		return "kill"
	case n < 18:
		w.stop(syscall.SIGKILL)
		w.backend = []string{"nftables", "iptables"}[w.r.IntN(2)]
		w.write()
		return "kill, backend " + w.backend
	case n < 19 && w.daemon == nil:
		w.begin()
		late := time.Duration(w.r.IntN(250)) * time.Millisecond
		time.Sleep(late)
		w.stop(syscall.SIGKILL)
		return "start, kill after " + late.String()
	case w.daemon == nil:
		w.start()
		return "start"
	}
	return "nothing"
}

// agree waits until everything agrees.
func (w *walker) agree() (err error) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = w.look(); err == nil {
			return nil
		}
	}
	return err
}

func (w *walker) look() error {
	out, status := w.run("smtpguard", "blocks", "list", "--json")
	if status != 0 {
		return fmt.Errorf("blocks list: %d\n%s", status, out)
	}
	said, inForce := make(map[netip.Prefix]bool), make(map[netip.Prefix]bool)
	for line := range strings.Lines(out) {
		var b struct {
			Prefix netip.Prefix
			State  string
		}
		if err := json.Unmarshal([]byte(line), &b); err != nil {
			return fmt.Errorf("%w: %s", err, line)
		}
		said[b.Prefix] = true
		if b.State == "in force" {
			inForce[b.Prefix] = true
		}
	}
	held := w.kernel()
	for p := range held {
		if !said[p] {
			return fmt.Errorf("the kernel holds %s, and no block is for it", p)
		}
		for a := range w.allowed {
			if a.Overlaps(p) {
				return fmt.Errorf("the kernel holds %s, and %s is allowed", p, a)
			}
		}
	}
	for p := range inForce {
		if !held[p] {
			return fmt.Errorf("%s is said to be in force, and the kernel does not hold it", p)
		}
	}
	if w.daemon != nil && !maps.Equal(said, inForce) {
		return fmt.Errorf("%d of %d blocks are in force", len(inForce), len(said))
	}
	return nil
}

// kernel is what the sets of every backend hold.
func (w *walker) kernel() map[netip.Prefix]bool {
	held := make(map[netip.Prefix]bool)
	put := func(s string) {
		if p, err := source(s); err == nil {
			held[p] = true
		} else {
			w.t.Error(err)
		}
	}
	for _, v := range []string{"4", "6"} {
		out, _ := w.run("ipset", "-o", "save", "list", "smtpguard"+v)
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) > 2 && f[0] == "add" {
				put(f[2])
			}
		}
	}
	out, status := w.run("nft", "-j", "list", "table", "inet", "smtpguard")
	if status != 0 {
		return held // none is there
	}
	var all struct {
		NFTables []struct {
			Set *struct {
				Name string
				Elem []struct{ Elem struct{ Val string } }
			}
		}
	}
	// The elements of the other sets are of other kinds.
	var raw struct{ NFTables []json.RawMessage }
	if err := json.Unmarshal([]byte(out), &raw); err != nil {
		w.t.Error(err)
	}
	ours := slices.DeleteFunc(raw.NFTables, func(m json.RawMessage) bool { return !bytes.Contains(m, []byte(`"name": "b`)) })
	if text, err := json.Marshal(map[string]any{"nftables": ours}); err != nil || json.Unmarshal(text, &all) != nil {
		w.t.Error(err, out)
	}
	for _, o := range all.NFTables {
		if o.Set != nil {
			_, bits, _ := strings.Cut(o.Set.Name, "_")
			for _, e := range o.Set.Elem {
				put(e.Elem.Val + "/" + bits)
			}
		}
	}
	return held
}
