package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/smtpguard/smtpguard/control"
	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/policy"
	"github.com/smtpguard/smtpguard/store"
)

func (e *env) firewallCommand() *cli.Command {
	return &cli.Command{
		Name: "firewall", Usage: "does the packet filter hold what the store says?",
		Subcommands: []*cli.Command{
			{Name: "status", Usage: "which packet filter, what it holds, what is missing", Action: e.firewallStatus},
			{Name: "sync", Usage: "make the packet filter hold what the store says, now", Action: e.firewallSync},
			{Name: "flush", Usage: "the emergency exit: lift every block and take everything of ours out of the packet filter", Action: e.firewallFlush,
				Description: "Works without a daemon, and also if the store cannot be opened."},
		},
	}
}

// firewallReport is what firewall status prints.
type firewallReport struct {
	guard.FirewallStatus
	Blocks     int `json:"blocks"`      // that should be in force
	NotApplied int `json:"not_applied"` // of these, that are not
}

func (e *env) firewallStatus(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	s, err := g.Status(c.Context)
	if err != nil {
		return err
	}
	list, err := g.Blocks(c.Context)
	if err != nil {
		return err
	}
	r := firewallReport{FirewallStatus: s.Firewall}
	r.Missing = nil // the blocks themselves say it, one by one
	for _, b := range list {
		if b.Observed {
			continue
		}
		if r.Blocks++; b.State == guard.NotApplied {
			r.NotApplied++
			r.Agrees = false
			if r.Error == "" {
				r.Error = b.Error
			}
			if len(r.Missing) < 20 {
				r.Missing = append(r.Missing, b.Prefix)
			}
		}
	}
	if c.Bool("json") {
		if err := e.json(r); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(e.stdout, "%s: %s in force", r.Backend, count(r.Blocks-r.NotApplied, "block", "blocks"))
		if r.NotApplied > 0 {
			fmt.Fprintf(e.stdout, ", %d NOT", r.NotApplied)
		}
		if r.Blocks > 0 && !r.Real {
			fmt.Fprint(e.stdout, ", and it drops no packet of anybody")
		}
		if len(r.Lingering) > 0 {
			fmt.Fprint(e.stdout, ", and others are STILL dropped whose block has ended")
		}
		if r.Error != "" {
			fmt.Fprintf(e.stdout, ": %s", r.Error)
		}
		fmt.Fprintln(e.stdout)
		for _, p := range r.Missing {
			fmt.Fprintln(e.stdout, "  missing:", p)
		}
		for _, p := range r.Lingering {
			fmt.Fprintln(e.stdout, "  still dropped:", p)
		}
		if r.Repairs > 0 {
			by := ""
			if r.By != "" {
				by = " after " + r.By
			}
			fmt.Fprintf(e.stdout, "put right %s, the last time at %s%s\n", count(int(r.Repairs), "time", "times"), clock(r.Repaired), by)
		}
		for _, w := range r.Warnings {
			fmt.Fprintln(e.stdout, "warning:", w)
		}
		if s := r.CSF; s != nil {
			fmt.Fprintf(e.stdout, "CSF is told of %d of %s (it has room for %d)", s.Told, count(s.Of, "block", "blocks"), s.Most)
			if s.Over > 0 {
				fmt.Fprintf(e.stdout, ", and still has %d that have ended", s.Over)
			}
			if s.Error != "" {
				fmt.Fprintf(e.stdout, ": %s", s.Error)
			}
			fmt.Fprintln(e.stdout)
		}
	}
	if !r.Agrees {
		return withHint(errors.New("the packet filter does not hold what the store says"), "`smtpguard firewall sync` tries again at once, and says what is in the way")
	}
	return nil
}

func (e *env) firewallSync(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	if err := e.soundPolicy(c); err != nil {
		return err
	}
	g, err := e.guard(c)
	if err != nil {
		return err
	}
	n, err := g.Sync(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return e.json(map[string]int{"blocks": n})
	}
	fmt.Fprintf(e.stdout, "the packet filter holds %s\n", count(n, "block", "blocks"))
	return nil
}

func (e *env) firewallFlush(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	by := control.Operator(os.Getuid())
	cl, p, err := e.daemon(c)
	if err == nil {
		var lifted []store.Block
		lifted, err = cl.Unblock(c.Context, netip.Prefix{}, by)
		done := errors.Join(e.lifted(c, lifted), err)
		if done == nil && !c.Bool("json") {
			fmt.Fprintf(e.stdout, "%s lifted; the daemon runs, and its table stays for the next\n", count(len(lifted), "block is", "blocks are"))
		}
		if silent := (*control.SilentError)(nil); !errors.As(err, &silent) {
			return done
		}
	}
	var silent *control.SilentError
	errors.As(err, &silent)
	if p == nil { // the emergency exit does not stay shut for a typing error
		fmt.Fprintf(e.stderr, "smtpguard: %v\n", err)
		fmt.Fprintln(e.stderr, "the policy cannot be used, and the shipped one stands in for it: blocks in a store elsewhere than "+policy.Default().Store.Path+" would come back with the next start")
		p = policy.Default()
		p.Store.Path = cmp.Or(c.String("store"), p.Store.Path)
	}
	// Without a daemon: first the store, as far as it can be, then the filter.
	var stErr error
	if silent == nil { // it holds the store
		stErr = e.liftAll(c, p, by)
	}
	flushed, err := e.emptyAll(c.Context, string(p.Firewall.Backend), p)
	if err != nil {
		return withHint(errors.Join(stErr, err), "the same command once more goes on with what is left")
	}
	if c.Bool("json") {
		stErr = errors.Join(stErr, e.json(map[string]any{"flushed": flushed}))
	} else {
		fmt.Fprintln(e.stdout, "nothing of ours is in the packet filter any more")
	}
	if silent != nil {
		return withHint(errors.Join(stErr, fmt.Errorf("%w: it still has every block, and puts them back when it goes on", silent)),
			endSilent(silent)+" ends it; then `smtpguard firewall flush` once more lifts the blocks for good")
	}
	return stErr
}

// emptyAll takes everything of ours out of every packet filter that there is:
// also what an earlier backend left and what CSF was told, as nobody looks
// after it any more. It returns their names.
func (e *env) emptyAll(ctx context.Context, backend string, p *policy.Policy) (flushed []string, err error) {
	var errs, without []error
	for _, name := range []string{firewall.NFTables, firewall.IPTables, firewall.CSF} {
		fw, err := removeFrom(ctx, p, name, e.slowly())
		switch {
		case err == nil:
			flushed = append(flushed, fw)
		case name == backend || !errors.Is(err, firewall.ErrUnavailable):
			errs = append(errs, err) // of one; the others are emptied all the same
		default:
			without = append(without, err)
		}
	}
	if len(flushed) == 0 && len(errs) == 0 {
		errs = without
	}
	return flushed, errors.Join(errs...)
}

// removeFrom takes everything of ours out of the packet filter of that name.
func removeFrom(ctx context.Context, p *policy.Policy, name string, progress func(done, of int)) (string, error) {
	fw, _, err := firewall.Open(ctx, name, firewall.Options{Ports: p.BlockedPorts(), Hook: string(p.Firewall.Hook), State: filepath.Dir(p.Store.Path), Progress: progress})
	if err != nil {
		return "", err
	}
	return fw.Name(), fw.Close(ctx, true)
}

// csfTeller is what tells CSF of blocks that another backend makes. It works on
// hosts with CSF only, and with csf: ignore takes away what was told before.
func csfTeller(p *policy.Policy, progress func(done, of int)) (guard.Teller, error) {
	t, err := firewall.NewCSFTeller(firewall.Options{Ports: p.BlockedPorts(), State: filepath.Dir(p.Store.Path), Progress: progress})
	if err != nil {
		return nil, err
	}
	return t, nil
}

// metaBackend is where the store remembers which backends may hold something of
// ours: the one in use, and those before it that were not left yet.
const metaBackend = "backend"

// backendsUsed are the backends that the store remembers, the one in use first.
func backendsUsed(st *store.Store) []string {
	v, err := st.Meta(metaBackend)
	if err != nil {
		return nil
	}
	return slices.DeleteFunc(strings.Fields(string(v)), func(name string) bool { return name == firewall.Memory })
}

var backendsTurn sync.Mutex

// useBackend remembers that name is in use from now on, and that gone are left.
func useBackend(st *store.Store, name string, gone ...string) error {
	backendsTurn.Lock()
	defer backendsTurn.Unlock()
	old := backendsUsed(st)
	used := slices.DeleteFunc(slices.Clone(old), func(n string) bool { return n == name || slices.Contains(gone, n) })
	if name != firewall.Memory {
		used = slices.Insert(used, 0, name)
	}
	if slices.Equal(old, used) {
		return nil
	}
	return st.SetMeta(metaBackend, []byte(cmp.Or(strings.Join(used, " "), firewall.Memory)))
}

// leaveOldBackends takes our entries out of the backends that were in use before
// this one: nothing would lift them there before their time. It comes after
// the new one has them, and reports whether all are left.
func leaveOldBackends(ctx context.Context, p *policy.Policy, st *store.Store, now string, log *slog.Logger) bool {
	var gone []string
	all := true
	for _, old := range backendsUsed(st) {
		if old == now {
			continue
		}
		if _, err := removeFrom(ctx, p, old, nil); err != nil && !errors.Is(err, firewall.ErrUnavailable) {
			log.Error("blocks are still in a packet filter that was in use before; it is tried again", "backend", old, "err", err)
			all = false
			continue
		}
		log.Info("our rules are taken out of the packet filter that was in use before", "backend", old, "now", now)
		gone = append(gone, old)
	}
	if err := useBackend(st, now, gone...); err != nil {
		log.Error("noting which packet filter is in use", "err", err)
	}
	return all
}

// liftAll ends every block in the store.
func (e *env) liftAll(c *cli.Context, p *policy.Policy, by string) error {
	if _, err := os.Stat(p.Store.Path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	st, err := store.Open(p.Store.Path, store.Options{Wait: 2 * time.Second})
	if err != nil {
		return fmt.Errorf("the blocks are still in the store, and come back with the next start: %w", err)
	}
	defer st.Close()
	now := time.Now()
	active, err := st.Active(now)
	if err != nil && !errors.Is(err, store.ErrBadValue) {
		return err
	}
	var ids []uint64
	for i := range active {
		ids = append(ids, active[i].ID)
	}
	if err := st.End(now, by+": firewall flush", ids...); err != nil {
		return err
	}
	return e.lifted(c, active)
}
