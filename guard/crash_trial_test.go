package guard

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/smtpguard/smtpguard/firewall"
	"github.com/smtpguard/smtpguard/store"
)

// TestCrashTrial kills daemons in a trial of mode: enforce that nobody commits:
// within it, around its end, and while the next ones come to terms with it.
// However that falls, it ends when the first one said, no block outlives it in
// kernel or store, and nobody enforces afterwards.
func TestCrashTrial(t *testing.T) {
	if os.Geteuid() != 0 && os.Getenv("CI") != "true" {
		t.Skip("only root can give a network namespace to another process")
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("SMTPGUARD_TEST_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("SMTPGUARD_TEST_SEED=%d draws the same operations and moments", seed)
	for i, how := range []string{"dead at its end", "alive at its end", "killed around its end", "starting at its end"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			crashTrial(t, how, rand.New(rand.NewPCG(seed, uint64(i))))
		})
	}
}

func crashTrial(t *testing.T, how string, r *rand.Rand) {
	ns, dir := newNamespace(t), t.TempDir()
	lines, stop := crashLog(t, filepath.Join(dir, "mainlog"))
	defer stop()
	var trial Trial // as the first daemon said
	var words []crashWord
	round, over, enforced := 0, 0, 0
	live := func(k crashKill) {
		t.Helper()
		life := crashLife{Dir: dir, Round: round, Seed: r.Uint64(), Lines: int(lines.Load()), Commit: 2 * time.Second}
		said, complaint := crashRun(t, ns, life, k)
		words = append(words, said...)
		for _, w := range said {
			switch s := w.State; {
			case s == nil:
			case trial == (Trial{}):
				trial = s.Trial
				if !s.Enforce || trial.State != OnTrial {
					t.Errorf("it began with %+v", *s)
				}
			default:
				if !s.Trial.Until.Equal(trial.Until) || !s.Trial.Since.Equal(trial.Since) {
					t.Errorf("the trial was %+v, and is %+v after a restart", trial, s.Trial)
				}
				crashTrialState(t, *s)
			}
			if s := w.State; s != nil && s.Enforce {
				enforced++
			} else if s != nil {
				over++
			}
		}
		if t.Failed() {
			t.Logf("%s, round %d, %+v; the daemon said:\n%s", how, round, k, complaint)
		}
		round++
	}
	ms := func(from, to int) time.Duration { return time.Duration(from+r.IntN(to-from)) * time.Millisecond }

	for trial == (Trial{}) && !t.Failed() {
		live(crashKill{after: ms(100, 800)})
	}
	for range 3 { // within it
		if time.Until(trial.Until) < 700*time.Millisecond {
			break
		}
		live(crashKill{after: ms(5, 200), early: r.IntN(3) == 0})
	}
	crashTrialKernel(t, ns, trial)
	switch how {
	case "alive at its end":
		live(crashKill{after: max(0, time.Until(trial.Until)) + ms(500, 1000)})
	case "killed around its end": // the look of each tick ends it
		live(crashKill{after: max(0, time.Until(trial.Until)+ms(-50, 350)), early: true})
		crashTrialKernel(t, ns, trial)
	case "starting at its end":
		time.Sleep(time.Until(trial.Until) - ms(0, 60))
		live(crashKill{after: ms(1, 100), early: true})
	}
	time.Sleep(time.Until(trial.Until) + 100*time.Millisecond) // the moment itself, not something to happen
	for range 4 {
		live(crashKill{after: ms(1, 60), early: true})
	}
	for before := over; over == before && !t.Failed(); {
		live(crashKill{after: ms(50, 150)})
	}

	st, err := store.Open(filepath.Join(dir, "s.db"), store.Options{ReadOnly: true, Wait: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if err := st.Check(); err != nil {
		t.Errorf("the store is damaged: %v", err)
	}
	all, err := st.History(netip.Prefix{}, time.Time{}, 0)
	if err != nil {
		t.Fatal(err)
	}
	real := 0
	for _, b := range all {
		if b.Observed {
			continue
		}
		real++
		if b.Since.After(trial.Until.Add(time.Second)) {
			t.Errorf("made in force after the trial's end at %s: %+v", trial.Until, b)
		}
		if b.Lifted.IsZero() && b.Until.After(time.Now()) {
			t.Errorf("it outlives the trial: %+v", b)
		}
	}
	if real == 0 || enforced == 0 {
		t.Errorf("%d blocks in %d lives that enforced: the test shows nothing", real, enforced)
	}
	t.Logf("%d lives, %d told of enforcing and %d of observing, %d words, %d blocks in force and %d observed", round, enforced, over, len(words), real, len(all)-real)
}

// crashTrialState compares what a later daemon came to at its start.
func crashTrialState(t *testing.T, s crashState) {
	t.Helper()
	switch {
	case s.Enforce && s.From.After(s.Trial.Until.Add(2*tickEvery)) && s.Began.After(s.Trial.Until):
		t.Errorf("started after the trial, it enforces: %+v", s)
	case !s.Enforce && s.To.Before(s.Trial.Until):
		t.Errorf("it observes before the trial's end: %+v", s)
	case !s.Enforce && len(s.InForce) > 0:
		t.Errorf("after the trial blocks are in force: %+v", s.InForce)
	case !s.Enforce && len(s.Kernel) > 0:
		t.Errorf("after the trial the kernel blocks: %+v", s.Kernel)
	}
	crashEnds(t, s.Kernel, s.Trial, s.slack())
}

// crashTrialKernel looks at the kernel while no daemon lives.
func crashTrialKernel(t *testing.T, ns int, trial Trial) {
	t.Helper()
	fw, err := firewall.NewNFTables(firewall.Options{Ports: []uint16{25}, NetNS: ns})
	if err != nil {
		t.Fatal(err)
	}
	var kernel []firewall.Installed
	for in, err := range fw.List(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		kernel = append(kernel, in)
	}
	if err := fw.Close(t.Context(), false); err != nil {
		t.Error(err)
	}
	// The ends are told as what is left, by a process that may have had to wait
	// for its turn; most blocks would last for many minutes.
	crashEnds(t, kernel, trial, 30*time.Second)
}

func crashEnds(t *testing.T, kernel []firewall.Installed, trial Trial, slack time.Duration) {
	t.Helper()
	for _, e := range kernel {
		if late := e.Until.Sub(trial.Until); late > slack {
			t.Errorf("the kernel blocks %s for %s beyond the trial's end", e.Prefix, late)
		}
	}
}
