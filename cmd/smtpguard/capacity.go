package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/smtpguard/smtpguard/detector/exim"
	"github.com/smtpguard/smtpguard/guard"
	"github.com/smtpguard/smtpguard/store"
)

// stated is what Exim said of its settings, and when. The store keeps the
// last one: without a resolver Exim takes minutes to answer, or does not, and
// a server that starts with its network has none yet.
type stated struct {
	exim.Config
	At time.Time
}

const (
	metaStated = "exim-config"
	fromExim   = "Exim's smtp_accept_max"
)

// When Exim is asked again: soon if it did not answer, else now and then, for
// its settings may have been changed.
const (
	askFirst   = 5 * time.Second
	askMost    = 5 * time.Minute
	askAgain   = 10 * time.Minute
	answerMost = 2 * time.Minute // six names with a resolver that is dead
)

// askExim asks Exim for its settings. Where it does not answer, what it stated
// last is taken, if that is known; since is then when that was, else zero.
func askExim(ctx context.Context, st *store.Store, log *slog.Logger) (mta exim.Config, since time.Time, err error) {
	mta, err = exim.ReadConfig(ctx)
	if err == nil {
		keepStated(st, mta, log)
		return mta, since, nil
	}
	if errors.Is(err, exim.ErrNoExim) {
		return mta, since, err
	}
	b, metaErr := st.Meta(metaStated)
	var last stated
	if metaErr == nil && b != nil {
		metaErr = json.Unmarshal(b, &last)
	}
	if metaErr != nil {
		log.Warn("what Exim stated earlier of its settings could not be read", "err", metaErr)
	}
	if metaErr != nil || last.At.IsZero() {
		log.Warn("Exim's configuration could not be read; it is asked again. State logs:, capacity: and zone: in the policy", "err", err)
		return mta, since, err
	}
	log.Warn("Exim's configuration could not be read; what it stated earlier is taken, and it is asked again", "stated", last.At.Format(time.RFC3339), "err", err)
	return last.Config, last.At, nil
}

func keepStated(st *store.Store, mta exim.Config, log *slog.Logger) {
	b, err := json.Marshal(stated{mta, time.Now().UTC().Truncate(time.Second)})
	if err == nil {
		err = st.SetMeta(metaStated, b)
	}
	if err != nil {
		log.Warn("Exim's settings could not be noted for the next start", "err", err)
	}
}

// capacityFrom says whose word the capacity is; since as in askExim.
func capacityFrom(since time.Time) string {
	if since.IsZero() {
		return fromExim
	}
	return fmt.Sprintf("%s, as it stated on %s; it does not answer now", fromExim, since.Format(time.RFC3339))
}

// asker asks Exim for the number of its slots while the daemon runs.
type asker struct {
	guard *guard.Guard
	store *store.Store
	log   *slog.Logger
	logs  []string // that are followed; another Exim's settings are none of ours
	now   chan struct{}
	n     int  // what it said last
	knows bool // it has answered this daemon
}

// soon has Exim asked at once: the policy is read again, and so may be its
// configuration.
func (a *asker) soon() {
	select {
	case a.now <- struct{}{}:
	default:
	}
}

// run asks until ctx ends, or as long as there is an Exim that writes the log.
func (a *asker) run(ctx context.Context) {
	wait := askFirst
	for {
		pause := wait
		if a.knows {
			pause = askAgain
		}
		timer := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-a.now:
			timer.Stop()
		case <-timer.C:
		}
		patient, cancel := context.WithTimeout(ctx, answerMost)
		mta, err := exim.ReadConfig(patient)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			// Told once, at the start or when it began: the last word stays.
			a.log.Log(ctx, levelOnce(a.knows), "Exim does not answer; its last settings stay", "err", err)
			a.knows, wait = false, min(2*wait, askMost)
			continue
		case !slices.ContainsFunc(a.logs, func(l string) bool { return isLogOf(l, mta) }):
			return
		}
		if !a.knows || mta.AcceptMax != a.n {
			if err := a.guard.SetCapacity(ctx, mta.AcceptMax, fromExim); err != nil {
				return
			}
			a.log.Info("Exim has stated its number of slots", "smtp_accept_max", mta.AcceptMax, "before", a.n)
			keepStated(a.store, mta, a.log)
		}
		a.n, a.knows, wait = mta.AcceptMax, true, askFirst
	}
}

func levelOnce(news bool) slog.Level {
	if news {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}
