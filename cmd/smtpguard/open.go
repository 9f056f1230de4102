package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/urfave/cli/v2"
	"go4.org/netipx"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/sockets"
	"github.com/smtpguard/smtpguard/store"
)

// defaultPolicy is where the policy is installed; tests have another place.
var defaultPolicy = "/etc/smtpguard/policy.yaml"

// policy reads the policy that the flags name. Where none is named and none
// is installed, the shipped one is taken, and e.shipped says so: it allows
// nobody whom the operator does, and must not block.
func (e *env) policy(c *cli.Context) (*policy.Policy, error) {
	path := c.String("policy")
	var p *policy.Policy
	var err error
	if path == "" {
		path = defaultPolicy
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			path = ""
		}
	}
	if e.shipped = path == ""; e.shipped {
		p = policy.Default()
	} else {
		p, err = policy.Load(path)
	}
	if err != nil {
		return nil, err
	}
	// Where CSF is installed its administrator has said already whom never to
	// block.
	csf, err := policy.CSFAllowed(firewall.CSFAllowFiles("/"))
	if err != nil {
		return nil, withHint(fmt.Errorf("reading CSF's own allowlist: %w", err), "whom it allows must be known before anything is blocked")
	}
	p.Allow = append(p.Allow, csf...)
	if s := c.String("socket"); s != "" {
		p.Control.Socket = s
	}
	if s := c.String("store"); s != "" {
		p.Store.Path = s
	}
	return p, nil
}

// standIn is the shipped policy, in place of one that has a fault.
func (e *env) standIn(c *cli.Context, fault error) *policy.Policy {
	fmt.Fprintf(e.stderr, "smtpguard: %v\n", fault)
	fmt.Fprintln(e.stderr, "the policy cannot be used, and the shipped one stands in for it: its store and socket, and nobody on its allowlist")
	p := policy.Default()
	p.Control.Socket = cmp.Or(c.String("socket"), p.Control.Socket)
	p.Store.Path = cmp.Or(c.String("store"), p.Store.Path)
	return p
}

// soundPolicy fails where no daemon runs and the policy has a fault: for
// commands that must know whom never to block, or what the mode is.
func (e *env) soundPolicy(c *cli.Context) error {
	cl, p, err := e.daemon(c)
	if cl == nil && p == nil {
		return err
	}
	return nil
}

// csfListed reads whom CSF allows, again and again: what csf -a and csf -ta add
// counts without a reload.
func csfListed() func(now time.Time) ([]guard.Listed, error) {
	lists := policy.CSFLists{Paths: func() []string { return firewall.CSFAllowFiles("/") }}
	return func(now time.Time) (listed []guard.Listed, err error) {
		entries, err := lists.Look()
		for _, e := range entries {
			listed = append(listed, guard.Listed{AllowEntry: e})
		}
		temp, tempErr := firewall.CSFTempAllowed("/", now)
		for _, p := range temp {
			if p.Bits() > 0 && p == policy.Canonical(p) {
				listed = append(listed, guard.Listed{AllowEntry: policy.AllowEntry{Prefix: p, Why: "csf -ta"}, Passing: true})
			}
		}
		return listed, errors.Join(err, tempErr)
	}
}

// daemon is the daemon that runs, and the policy. The connection is closed when
// the command has ended. A daemon is reached though the policy has a fault by
// now: it goes by the one that it was started with.
func (e *env) daemon(c *cli.Context) (*control.Client, *policy.Policy, error) {
	p, policyErr := e.policy(c)
	socket := cmp.Or(c.String("socket"), policy.Default().Control.Socket)
	if policyErr == nil {
		socket = p.Control.Socket
	}
	cl, err := control.Dial(c.Context, socket)
	switch {
	case err == nil:
		e.atEnd = append(e.atEnd, func() error { cl.Close(); return nil })
		return cl, p, nil
	case policyErr != nil:
		if silent := (*control.SilentError)(nil); errors.As(err, &silent) {
			policyErr = errors.Join(policyErr, silent)
		}
		return nil, nil, policyErr
	}
	return nil, p, err
}

// guard is the daemon if one runs, else a guard of its own on the store: the
// same decisions either way. It is closed when the command has ended.
func (e *env) guard(c *cli.Context) (control.Guard, error) {
	cl, p, err := e.daemon(c)
	var silent *control.SilentError
	switch {
	case err == nil:
		return cl, nil
	case p == nil && !errors.As(err, &silent) && !errors.Is(err, fs.ErrPermission):
		p = e.standIn(c, err) // who is locked out is not, for a typing error
	case !errors.Is(err, control.ErrNoDaemon):
		return nil, err
	}
	if _, err := os.Stat(p.Store.Path); errors.Is(err, fs.ErrNotExist) {
		return nil, withHint(fmt.Errorf("no daemon answers on %s, and there is no state in %s", p.Control.Socket, p.Store.Path),
			"start it with `smtpguard run`, or name its --policy, --socket or --store")
	}
	if e.shipped {
		fmt.Fprintf(e.stderr, "there is no %s, and the shipped policy stands in for it: mode observe, nobody on its allowlist\n", defaultPolicy)
	}
	st, err := store.Open(p.Store.Path, store.Options{Wait: 2 * time.Second})
	if err != nil {
		return nil, err
	}
	tellRestored(st, slog.New(slog.NewTextHandler(e.stderr, nil)))
	var enforce atomic.Bool
	enforce.Store(p.Mode == policy.Enforce)
	o := guard.Options{Policy: p, Store: st, OpenFirewall: openFirewall(p, &enforce, st, nil, e.slowly()), Version: programVersion(), Listed: csfListed()}
	if o.Teller, err = csfTeller(p, e.slowly()); err != nil {
		return nil, errors.Join(err, st.Close())
	}
	if p.Mode == policy.Enforce && p.Confirm == policy.ConfirmSockets {
		if t, err := sockets.Open(sockets.Options{}); err == nil {
			o.Sockets = t
		}
	}
	lone, err := guard.New(c.Context, o)
	if err != nil {
		st.Close()
		return nil, err
	}
	e.atEnd = append(e.atEnd, func() error {
		err := lone.Close(c.Context, false)
		if err != nil {
			err = withHint(fmt.Errorf("what the command did is in force, but: %w", err), "the next start of the daemon takes them away; now: `csf -trd ADDRESS` removes one, `csf -t` shows them")
		}
		return errors.Join(err, st.Close())
	})
	if len(backendsUsed(st)) > 1 {
		// A daemon was killed while it moved from one packet filter to another:
		// what is lifted in one would stay in the other.
		if _, err := lone.Sync(c.Context); err == nil {
			leaveOldBackends(c.Context, p, st, lone.Backend(), slog.New(slog.NewTextHandler(e.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
		}
	}
	return lone, nil
}

// openFirewall returns what opens the packet filter of the policy and tells
// why it is this one. enforce is whether the mode is enforce, which a reload
// can change. In observe mode it is one that drops nothing, unless
// blocks of an earlier enforce mode are still in force: those stay until they
// end or are lifted. Where they are not, the one that was in use before can
// still drop what it did not let go of: a daemon leaves it (leaveOldBackends),
// and a command without one, which has no tell, works on it, also where the
// policy names another one by now.
// progress is firewall.Options.Progress.
func openFirewall(p *policy.Policy, enforce *atomic.Bool, st *store.Store, tell func(why string), progress func(done, of int)) func(context.Context, []netip.Prefix, int) (firewall.Firewall, error) {
	return func(ctx context.Context, allow []netip.Prefix, entries int) (firewall.Firewall, error) {
		name, why, idle := string(p.Firewall.Backend), "", false
		used := backendsUsed(st)
		inUse := tell == nil && len(used) > 0
		if !enforce.Load() {
			old, err := st.InForce(time.Now())
			if err != nil {
				return nil, err
			}
			if idle = len(old) == 0; idle && !inUse {
				name, why = firewall.Memory, "mode: observe"
			}
		}
		otherwise := name
		if idle {
			otherwise = firewall.Memory
		}
		if inUse {
			name = used[0]
		}
		o := firewall.Options{
			Ports: p.BlockedPorts(), MaxEntries: entries, Hook: string(p.Firewall.Hook), Allow: allow, State: filepath.Dir(p.Store.Path), Progress: progress}
		fw, chosen, err := firewall.Open(ctx, name, o)
		if name != otherwise && errors.Is(err, firewall.ErrUnavailable) { // gone since
			fw, chosen, err = firewall.Open(ctx, otherwise, o)
		}
		if err != nil {
			return nil, err
		}
		if fw.Name() != firewall.Memory {
			// Before it drops anything. Without the note it blocks all the same.
			_ = useBackend(st, fw.Name())
		}
		if tell != nil {
			tell(cmp.Or(why, chosen))
		}
		return fw, nil
	}
}

// slowly shows how far a slow packet filter is, where that takes more than a
// moment.
func (e *env) slowly() func(done, of int) {
	var told time.Time
	return func(done, of int) {
		switch now := time.Now(); {
		case told.IsZero() || done == 1:
			told = now
		case now.Sub(told) >= 2*time.Second && done < of:
			told = now
			fmt.Fprintf(e.stderr, "CSF makes a few changes a second: %d of %d are made (Ctrl-C stops, and says what is left)\n", done, of)
		}
	}
}

// hint says what to do about an error.
func hint(err error) string {
	var h *hinted
	var r *guard.Refusal
	var cov *guard.CoveredError
	var still *guard.StillDroppedError
	var owed *guard.OwedError
	var silent *control.SilentError
	switch {
	case errors.As(err, &still) && still.Alone:
		return "`smtpguard firewall sync` goes on, and so does the next start of the daemon"
	case errors.As(err, &owed):
		return "make room where the store is (`df -h`), then say it again"
	case errors.As(err, &h):
		return h.hint
	case errors.As(err, &r):
		return r.Hint
	case errors.As(err, &cov):
		return fmt.Sprintf("`smtpguard unblock %s` lifts that block; `smtpguard allow add %s` frees that source alone, for good", cov.By, cov.Asked)
	case errors.As(err, &silent):
		if silent.Waited > control.AliveWithin {
			return "it lives, and may be at it still: `smtpguard status` says what it waits for (a disk?). " + endSilent(silent) + " ends it; blocks stay in force"
		}
		return endSilent(silent) + " ends it, and `systemctl start smtpguard` starts it again; blocks stay in force meanwhile, and `smtpguard firewall flush` takes them out without it"
	case errors.Is(err, store.ErrLocked):
		return "a command that needs the daemon finds it by --socket; stop the other one before you start a second"
	case errors.Is(err, store.ErrDamaged):
		return "restore a backup, or move the file away and start again. Kept are blocks that are in the packet filter, the policy, and what `allow add` was told, from the copy in " + store.AllowCopy("STORE") + " if there is one; lost are earlier offences, known good senders and cases of reports"
	case errors.Is(err, store.ErrNewer):
		return "it was written by a newer smtpguard: install that one again"
	case errors.Is(err, control.ErrRunning):
		return "stop it first (`systemctl stop smtpguard`), or give this one its own --socket, --store and --log"
	case errors.Is(err, control.ErrNoDaemon):
		return "`systemctl start smtpguard`, or `smtpguard run`"
	case errors.Is(err, firewall.ErrUnavailable):
		return "`smtpguard run --mode observe` needs no packet filter"
	case errors.Is(err, fs.ErrPermission):
		return "run as root, or as a user who may open that file"
	}
	return ""
}

// endSilent is the command that ends a daemon that does not answer.
func endSilent(e *control.SilentError) string {
	if e.PID == 0 {
		return "`systemctl kill -s KILL smtpguard`"
	}
	return fmt.Sprintf("`kill -KILL %d`", e.PID)
}

// source reads an address or a prefix as people write it.
func source(s string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		a = a.Unmap().WithZone("")
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := policy.ParsePrefix(s)
	if err != nil {
		return p, &usageError{err.Error()}
	}
	return p, nil
}

// sources reads an address, a prefix or a range FROM-TO, which becomes the
// prefixes that cover it exactly.
func sources(s string) ([]netip.Prefix, error) {
	if !strings.Contains(s, "-") {
		p, err := source(s)
		return []netip.Prefix{p}, err
	}
	r, err := netipx.ParseIPRange(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		return nil, &usageError{fmt.Sprintf("%q is not a range: want FROM-TO, as in 192.0.2.10-192.0.2.20", s)}
	}
	return r.Prefixes(), nil
}

// oneSource reads the only argument of a command.
func oneSource(c *cli.Context) (netip.Prefix, error) {
	if c.NArg() != 1 {
		got := "none is named"
		if c.NArg() > 0 {
			got = fmt.Sprintf("%d are named", c.NArg())
		}
		return netip.Prefix{}, &usageError{fmt.Sprintf("it takes one source, and %s; usage: %s %s", got, c.Command.HelpName, c.Command.ArgsUsage)}
	}
	return source(c.Args().First())
}

// json prints one value a line.
func (e *env) json(v any) error {
	enc := json.NewEncoder(e.stdout)
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// span shows a duration in at most two units.
func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 10*time.Second:
		return d.Round(100 * time.Millisecond).String()
	case d < time.Minute:
		return d.Round(time.Second).String()
	case d < time.Hour:
		return trimZero(d.Round(time.Second).String(), "0s")
	case d < 48*time.Hour:
		return trimZero(strings.TrimSuffix(d.Round(time.Minute).String(), "0s"), "0m")
	}
	days := d / (24 * time.Hour)
	return fmt.Sprintf("%dd%dh", days, (d%(24*time.Hour))/time.Hour)
}

// trimZero takes a zero unit off the end, but not the zero off "30m".
func trimZero(s, zero string) string {
	if t, ok := strings.CutSuffix(s, zero); ok && t != "" && (t[len(t)-1] < '0' || t[len(t)-1] > '9') {
		return t
	}
	return s
}

// tellRestored says what a new store has of an earlier one.
func tellRestored(st *store.Store, log *slog.Logger) {
	switch r := st.Restored(); {
	case r.Err != nil:
		log.Error("the store is new, and the allowlist of the one before could be read in part only; add what is missing with `smtpguard allow add`",
			"entries", r.Entries, "rest_in", r.Unread, "err", r.Err)
	case r.Entries > 0:
		log.Warn("the store is new; the allowlist of the one before is taken over from its copy", "entries", r.Entries)
	}
}
