package guard

import (
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/smtpguard/smtpguard/policy"
)

func trialWorld(t *testing.T, commit time.Duration) *world {
	return newWorld(t, func(p *policy.Policy) { p.Commit = commit })
}

func (w *world) status() Status {
	w.t.Helper()
	s, err := w.g.Status(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// Nobody gives the word: all blocks go, those by hand too, and what comes then
// is only observed, also after a restart.
func TestTrialRunsOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, 10*time.Minute)
		var told []string
		w.g.o.Notify = func(s string) {
			if strings.HasPrefix(s, "STATUS=") {
				told = append(told, s)
			}
		}
		stop := w.run()
		defer func() { stop() }()
		w.k.flood()
		time.Sleep(time.Minute)
		w.block("198.51.100.0/24", time.Hour)
		w.want("198.51.100.0/24 " + five)
		if s := w.status(); s.Mode != "enforce" || s.Trial == nil || s.Trial.State != OnTrial || !w.warned("every block is lifted at") {
			t.Errorf("%+v", s.Trial)
		}

		// A restart, whatever it is for, does not make it longer.
		stop()
		time.Sleep(3 * time.Minute)
		w.start()
		stop = w.run()
		time.Sleep(time.Until(time.Date(2000, 1, 1, 0, 9, 58, 0, time.UTC)))
		w.want("198.51.100.0/24 " + five)
		time.Sleep(3 * time.Second)
		w.want("")
		if s := w.status(); s.Mode != "observe" || s.Trial.State != TrialOver || !w.warned("ended at") || !s.Firewall.Agrees {
			t.Errorf("%+v, %v", s.Trial, s.Warnings)
		}
		for _, p := range []string{"198.51.100.0/24", "203.0.113.1/32"} {
			list, err := w.g.History(t.Context(), netip.MustParsePrefix(p))
			if err != nil || len(list) == 0 || list[0].State != IsLifted || !list[0].Pardoned() {
				t.Errorf("%+v, %v", list, err)
			}
		}
		w.k.flood()
		time.Sleep(time.Minute)
		w.want("")
		if s := w.status(); s.Watched != 5 {
			t.Errorf("%d are observed, want 5", s.Watched)
		}
		stop()
		w.start()
		w.block("192.0.2.77/32", time.Hour) // by a command alone
		w.want("")
		stop = w.run()
		time.Sleep(time.Minute)
		w.want("")

		// The word may come late.
		if tr, err := w.g.Commit(t.Context(), "root", 0); err != nil || tr.State != Committed || tr.By != "root" {
			t.Errorf("%+v, %v", tr, err)
		}
		time.Sleep(time.Minute)
		w.want("192.0.2.77/32 " + five) // also what was asked for by hand meanwhile
		if s := w.status(); s.Mode != "enforce" {
			t.Errorf("mode %s", s.Mode)
		}
		if len(told) == 0 || !strings.Contains(told[0], "on trial until") {
			t.Errorf("systemd was told %q", told)
		}
	})
}

func TestTrialCommitted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, 10*time.Minute)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		if tr, err := w.g.Commit(t.Context(), "root", 20*time.Minute); err != nil || tr.State != OnTrial {
			t.Errorf("again: %+v, %v", tr, err)
		}
		time.Sleep(15 * time.Minute)
		w.want("198.51.100.0/24")
		if _, err := w.g.Commit(t.Context(), "root", 0); err != nil {
			t.Error(err)
		}
		if _, err := w.g.Commit(t.Context(), "root", 0); !errors.Is(err, ErrNoTrial) {
			t.Errorf("twice: %v", err)
		}
		time.Sleep(time.Hour)
		w.want("198.51.100.0/24")
		stop()
		w.start() // committed is committed
		stop = w.run()
		time.Sleep(time.Hour)
		w.want("198.51.100.0/24")

		// A time of observing, and it begins anew.
		change := func(m policy.Mode) {
			p := *w.policy
			p.Mode = m
			if done, err := w.g.Reload(t.Context(), &p); err != nil || done.Undone != nil || len(done.Restart) > 0 {
				t.Errorf("reload: %v, %v", done, err)
			}
		}
		change(policy.Observe)
		w.k.flood()
		time.Sleep(time.Minute)
		w.want("198.51.100.0/24") // of before: it stays until its end
		if s := w.status(); s.Mode != "observe" || s.Trial != nil || s.Watched != 5 {
			t.Errorf("%+v", s)
		}
		change(policy.Enforce)
		time.Sleep(time.Minute)
		w.want("198.51.100.0/24 " + five)
		if s := w.status(); s.Mode != "enforce" || s.Trial == nil || s.Trial.State != OnTrial {
			t.Errorf("%+v", s.Trial)
		}
		time.Sleep(10 * time.Minute)
		w.want("")
	})
}

// The daemon was dead when the time was up: the packet filter has ended the
// blocks by itself, and the next start enforces nothing.
func TestTrialRunsOutWhileDead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, 10*time.Minute)
		stop := w.run()
		w.block("198.51.100.0/24", time.Hour)
		stop()
		for _, left := range []int{1, 0} {
			time.Sleep(time.Until(w.g.trial.Until) - time.Duration(left)*time.Second)
			n := 0
			for _, err := range w.fw.List(t.Context()) {
				if n++; err != nil {
					t.Error(err)
				}
			}
			if n != left {
				t.Errorf("%d s before the end of the trial the packet filter holds %d", left, n)
			}
		}
		time.Sleep(10 * time.Minute)
		w.start() // for a command alone
		if n, err := w.g.Sync(t.Context()); n != 0 || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		w.want("")
		if list, err := w.g.Blocks(t.Context()); err != nil || len(list) != 1 || list[0].State != NotApplied || !strings.Contains(list[0].Error, "trial") {
			t.Errorf("%+v, %v", list, err)
		}
		stop = w.run()
		defer func() { stop() }()
		w.want("")
		if s := w.status(); s.Mode != "observe" || s.Blocks != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// Whatever the packet filter is given during a trial ends with it, and that
// is no difference from the store; the operator's word gives it its own end.
func TestTrialKeptByFilter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, 10*time.Minute)
		w.block("203.0.113.0/24", time.Hour) // before the daemon, and the trial
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		w.block("198.51.100.7/32", time.Minute)
		ends := func(want ...string) {
			t.Helper()
			got := map[string]string{}
			for e, err := range w.fw.List(t.Context()) {
				if err != nil {
					t.Fatal(err)
				}
				got[e.Prefix.String()] = e.Until.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).String()
			}
			for i := 0; i < len(want); i += 2 {
				if got[want[i]] != want[i+1] {
					t.Errorf("%s ends at %q, want %q", want[i], got[want[i]], want[i+1])
				}
			}
			if s := w.status(); !s.Firewall.Agrees || s.Firewall.Repairs > 0 {
				t.Errorf("drift: %+v", s.Firewall)
			}
		}
		ends("203.0.113.0/24", "10m0s", "198.51.100.0/24", "10m0s", "198.51.100.7/32", "1m0s")
		list, err := w.g.Blocks(t.Context())
		if err != nil || len(list) != 3 {
			t.Fatal(list, err)
		}
		for _, b := range list {
			if long := b.Prefix.Bits() < 32; long == b.Ends.IsZero() || b.State != InForce || long && !b.Ends.Equal(w.g.trial.Until) {
				t.Errorf("%+v", b)
			}
		}
		time.Sleep(3 * time.Minute) // the contents are looked at each minute
		ends("203.0.113.0/24", "10m0s", "198.51.100.0/24", "10m0s")
		stop()
		w.start()
		stop = w.run()
		ends("203.0.113.0/24", "10m0s", "198.51.100.0/24", "10m0s")
		if _, err := w.g.Commit(t.Context(), "root", 2*time.Minute); err != nil {
			t.Error(err)
		}
		ends("203.0.113.0/24", "5m0s", "198.51.100.0/24", "5m0s")
		if _, err := w.g.Commit(t.Context(), "root", 0); err != nil {
			t.Error(err)
		}
		ends("203.0.113.0/24", "1h0m0s", "198.51.100.0/24", "24h0m0s")
		if list, err := w.g.Blocks(t.Context()); err != nil || len(list) != 2 || !list[0].Ends.IsZero() {
			t.Errorf("%+v, %v", list, err)
		}
	})
}

// Mode: observe during a trial, by reload or by restart: nobody gave his word
// for its blocks, and they go.
func TestTrialObserved(t *testing.T) {
	for _, how := range []string{"reload", "restart", "restart after its end"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := trialWorld(t, 10*time.Minute)
				stop := w.run()
				defer func() { stop() }()
				w.block("198.51.100.0/24", time.Hour)
				p := *w.policy
				p.Mode = policy.Observe
				if how == "reload" {
					if _, err := w.g.Reload(t.Context(), &p); err != nil {
						t.Error(err)
					}
				} else {
					stop()
					if how != "restart" {
						time.Sleep(11 * time.Minute)
					}
					w.policy = &p
					w.start()
					stop = w.run()
				}
				w.want("")
				if s := w.status(); s.Mode != "observe" || s.Trial != nil || s.Blocks != 0 || !s.Firewall.Agrees {
					t.Errorf("%+v", s)
				}
				list, err := w.g.History(t.Context(), netip.MustParsePrefix("198.51.100.0/24"))
				if err != nil || len(list) != 1 || list[0].State != IsLifted || !list[0].Pardoned() || !strings.Contains(list[0].LiftedBy, "trial") {
					t.Errorf("%+v, %v", list, err)
				}
			})
		})
	}
}

// Without commit: nothing of this happens, and what cannot be read is taken
// as over.
func TestNoTrial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, 0)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		if _, err := w.g.Commit(t.Context(), "root", 0); !errors.Is(err, ErrNoTrial) {
			t.Error(err)
		}
		time.Sleep(12 * time.Hour)
		w.want("198.51.100.0/24")
		if s := w.status(); s.Trial != nil || w.warned("trial") {
			t.Errorf("%+v", s.Trial)
		}
		if err := w.st.SetMeta(keyTrial, []byte("{")); err != nil {
			t.Fatal(err)
		}
		stop()
		w.start()
		stop = w.run()
		w.want("")
	})
}

// The store cannot be written when the time is up: the blocks go all the same.
func TestTrialRunsOutWithoutStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := trialWorld(t, time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.g.Run(ctx) }()
		synctest.Wait()
		w.block("198.51.100.0/24", time.Hour)
		if err := w.st.Close(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		w.want("")
		if s := w.status(); s.Mode != "observe" || s.Blocks != 0 {
			t.Errorf("%+v", s)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		w.start() // the store says so as well, in the end
		defer w.run()()
		w.want("")
		if v, err := w.st.Meta(keyTrial); err != nil || !json.Valid(v) || !strings.Contains(string(v), string(TrialOver)) {
			t.Errorf("%s, %v", v, err)
		}
		if in, err := w.st.InForce(time.Now()); err != nil || len(in) > 0 {
			t.Errorf("%+v, %v", in, err)
		}
	})
}

// TestCommitAddedLater: a server that enforces goes on no trial because the
// policy has a commit: one day; the next change from observe to enforce does.
func TestCommitAddedLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		stop := w.run()
		defer func() { stop() }()
		w.block("198.51.100.0/24", 24*time.Hour)
		p := *w.policy
		p.Commit = 10 * time.Minute
		must(w.g.Reload(t.Context(), &p))
		w.policy = &p
		for range 2 {
			if tr := w.status().Trial; tr != nil {
				t.Errorf("%+v", tr)
			}
			if !slices.ContainsFunc(w.status().Warnings, func(s string) bool { return strings.HasPrefix(s, "commit: begins no trial") }) {
				t.Errorf("status does not say that there is no net: %q", w.status().Warnings)
			}
			time.Sleep(time.Hour)
			w.want("198.51.100.0/24")
			stop()
			w.start()
			stop = w.run()
		}
		observing := p
		observing.Mode = policy.Observe
		must(w.g.Reload(t.Context(), &observing))
		must(w.g.Reload(t.Context(), &p))
		if tr := w.status().Trial; tr == nil || tr.State != OnTrial {
			t.Errorf("%+v", tr)
		}
	})
}
