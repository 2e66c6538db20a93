package redfour_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// A chronicle keeps what a Trace is told, in a line each.
type chronicle struct {
	mu    sync.Mutex // guards what follows
	lines []string
}

func (w *chronicle) note(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.lines = append(w.lines, fmt.Sprintf(format, args...))
}

func (w *chronicle) told() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.lines)
}

func (w *chronicle) trace() redfour.Trace {
	return redfour.Trace{
		Acquired: func(_ context.Context, id string, began time.Time, lease *redfour.Lease, err error) {
			if (lease == nil) != (err != nil) {
				w.note("BOTH OR NONE: %v, %v", lease, err)
			}
			how := "after waiting"
			switch {
			case err != nil:
				how = outcome(err)
			case lease.Immediate:
				how = "at once"
			}
			w.note("acquired %s in %v: %s", id, roughly(time.Since(began)), how)
		},
		Renewed: func(_ context.Context, id string, index int64, began time.Time, late time.Duration, err error) {
			w.note("renewed %s in %v, late by %v: %s", known(id, index), roughly(time.Since(began)), roughly(late), outcome(err))
		},
		Released: func(_ context.Context, id string, index int64, began time.Time, held time.Duration, err error) {
			w.note("released %s in %v, held for %v: %s", known(id, index), roughly(time.Since(began)), roughly(held), outcome(err))
		},
		Lost:         func(id string, index int64, err error) { w.note("lost %s: %s", known(id, index), outcome(err)) },
		Woken:        func(id, by string) { w.note("woken %s by %s", id, by) },
		Subscribed:   func(addr string) { w.note("subscribed%s", addr) },
		Unsubscribed: func(addr string, err error) { w.note("unsubscribed%s: %s", addr, outcome(err)) },
	}
}

// roughly leaves out the small random pauses.
func roughly(d time.Duration) time.Duration { return d.Round(100 * time.Millisecond) }

func known(id string, index int64) string {
	if index == 0 {
		return id + " WITHOUT INDEX"
	}
	return id
}

func outcome(err error) string {
	switch {
	case err == nil:
		return "done"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	case errors.Is(err, redfour.ErrLocked):
		return "locked"
	case errors.Is(err, redfour.ErrConflict):
		return "conflict"
	case errors.Is(err, redfour.ErrExpired):
		return "expired"
	}
	return "failed"
}

// An event is a situation, and all that it counts and tells.
type event struct {
	happens func(t *testing.T, s scene)
	stats   redfour.Stats // but what is sent, and durations roughly
	told    []string      // in no order, because several goroutines tell
}

// A scene is where a situation is played.
type scene struct {
	*mini

	l     *redfour.Lock // which counts and tells
	way   *link         // of l
	other *redfour.Lock
}

// waits starts a WaitAcquire on l, and returns when it waits and is subscribed.
func (s scene) waits(ctx context.Context) <-chan acquired {
	got := waitFor(ctx, s.l, "42", time.Minute)
	pass(time.Second)
	synctest.Wait()
	return got
}

// npmHolds makes an npm client hold the lock.
func (s scene) npmHolds(t *testing.T, ttl time.Duration) {
	t.Helper()
	s.HSet("lock:42", "index", "7")
	s.SetTTL("lock:42", ttl)
}

// subscribes is what is told, and counted, when the first waiter of a Lock has to wait.
var subscribes = []string{"subscribed", "woken 42 by subscription"}

func and(lines ...string) []string { return append(slices.Clone(subscribes), lines...) }

var events = map[string]event{
	"at once, and released": {
		func(t *testing.T, s scene) {
			lease := mustAcquire(t, s.l, "42", time.Minute)
			pass(5 * time.Second)
			require.NoError(t, s.l.Release(t.Context(), lease))
		},
		redfour.Stats{AtOnce: 1, Released: 1, HoldTime: 5 * time.Second},
		[]string{"acquired 42 in 0s: at once", "released 42 in 0s, held for 5s: done"},
	},
	"at the second attempt": {func(t *testing.T, s scene) {
		hang := make(chan struct{})
		s.way.beforeScript(once(isAcquire, func() error { <-hang; return io.EOF }))
		mustAcquire(t, s.l, "42", time.Minute)
		close(hang)
	}, redfour.Stats{AtOnce: 1}, []string{"acquired 42 in 1s: at once"}},
	"held": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		_, err := s.l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
	}, redfour.Stats{FoundHeld: 1}, []string{"acquired 42 in 0s: locked"}},
	"ctx ends during the wait": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		got := s.waits(ctx)
		require.Equal(t, 1, s.l.Stats().Waiting)
		require.ErrorIs(t, (<-got).err, redfour.ErrLocked)
	}, redfour.Stats{TimedOut: 1, Subscriptions: 1, WokenBySubscription: 1}, and("acquired 42 in 3s: timeout")},
	"ctx had ended": {func(t *testing.T, s scene) {
		ctx, cancel := context.WithTimeout(t.Context(), 0)
		defer cancel()
		_, err := s.l.Acquire(ctx, "42", time.Minute)
		require.Error(t, err)
		_, err = s.l.WaitAcquire(ctx, "42", time.Minute)
		require.Error(t, err)
	}, redfour.Stats{TimedOut: 2}, []string{"acquired 42 in 0s: timeout", "acquired 42 in 0s: timeout"}},
	"bad arguments": {func(t *testing.T, s scene) {
		_, err := s.l.Acquire(t.Context(), "42", 0)
		require.Error(t, err)
		_, err = s.l.WaitAcquire(t.Context(), "", time.Minute)
		require.Error(t, err)
		require.Error(t, s.l.Renew(t.Context(), nil, time.Minute))
		require.Error(t, s.l.Release(t.Context(), nil))
	}, redfour.Stats{Failed: 2}, []string{"acquired 42 in 0s: failed", "acquired  in 0s: failed"}},
	"a foreign key": {func(t *testing.T, s scene) {
		require.NoError(t, s.Set("lock:42", "x"))
		_, err := s.l.WaitAcquire(t.Context(), "42", time.Minute)
		require.Error(t, err)
	}, redfour.Stats{Failed: 1}, []string{"acquired 42 in 0s: failed"}},
	"closed": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		got := s.waits(t.Context())
		require.NoError(t, s.l.Close())
		require.ErrorIs(t, (<-got).err, redfour.ErrClosed)
	}, redfour.Stats{Failed: 1, Subscriptions: 1, WokenBySubscription: 1}, and("acquired 42 in 1s: failed")},
	"a release in this Lock": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Minute)
		got := s.waits(t.Context())
		require.NoError(t, s.l.Release(t.Context(), lease))
		require.NoError(t, (<-got).err)
	}, redfour.Stats{
		AtOnce: 1, AfterWait: 1, WaitTime: time.Second, Released: 1, HoldTime: time.Second,
		WokenByRelease: 1, Subscriptions: 1, WokenBySubscription: 1,
	}, and("acquired 42 in 0s: at once", "released 42 in 0s, held for 1s: done", "woken 42 by release", "acquired 42 in 1s: after waiting")},
	"a grant": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.other, "42", time.Minute)
		got := s.waits(t.Context())
		require.NoError(t, s.other.Release(t.Context(), lease))
		require.NoError(t, (<-got).err)
	}, redfour.Stats{
		AfterWait: 1, WaitTime: time.Second, WokenByGrant: 1, GrantsClaimed: 1, Subscriptions: 1, WokenBySubscription: 1,
	}, and("woken 42 by grant", "acquired 42 in 1s: after waiting")},
	"a grant for nobody": {
		func(t *testing.T, s scene) {
			lease := mustAcquire(t, s.other, "42", time.Minute)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			got := s.waits(ctx)
			s.way.beforeScript(once(isLeave, func() error { return s.other.Release(t.Context(), lease) }))
			require.ErrorIs(t, (<-got).err, redfour.ErrLocked)
			synctest.Wait()
			require.False(t, s.Exists("lock:42"))
		},
		redfour.Stats{TimedOut: 1, GrantsClaimed: 1, Returned: 1, Subscriptions: 1, WokenBySubscription: 1},
		and("acquired 42 in 2s: timeout"),
	},
	"a message": {
		func(t *testing.T, s scene) {
			s.npmHolds(t, time.Minute)
			got := s.waits(t.Context())
			s.Del("lock:42")
			s.Publish("lock-release", "lock:42")
			require.NoError(t, (<-got).err)
		},
		redfour.Stats{AfterWait: 1, WaitTime: time.Second, WokenByMessage: 1, Subscriptions: 1, WokenBySubscription: 1},
		and("woken 42 by message", "acquired 42 in 1s: after waiting"),
	},
	"a message for nobody": {func(t *testing.T, s scene) {
		s.npmHolds(t, time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		require.Error(t, (<-s.waits(ctx)).err)
		s.Publish("lock-release", "lock:42")
		synctest.Wait()
	}, redfour.Stats{TimedOut: 1, Subscriptions: 1, WokenBySubscription: 1}, and("acquired 42 in 2s: timeout")},
	"the lease runs out": {func(t *testing.T, s scene) {
		mustAcquire(t, s.l, "the scripts have a connection", time.Minute)
		s.way.setDown(true) // In the queue it would also hear the message that the queue is gone.
		s.npmHolds(t, 10*time.Second)
		require.NoError(t, (<-s.waits(t.Context())).err)
	}, redfour.Stats{AtOnce: 1, AfterWait: 1, WaitTime: 10 * time.Second, WokenByTimer: 1}, []string{
		"acquired the scripts have a connection in 0s: at once", "woken 42 by timer", "acquired 42 in 10s: after waiting",
	}},
	"the lease runs out, after other wake-ups": {
		func(t *testing.T, s scene) {
			s.npmHolds(t, 2*time.Second)
			got := s.waits(t.Context())
			defer s.way.holdUp(isSubscriber)() // that the queue is gone is a message, too
			require.NoError(t, (<-got).err)
		},
		redfour.Stats{AfterWait: 1, WaitTime: 2 * time.Second, WokenByTimer: 1, Subscriptions: 1, WokenBySubscription: 1},
		and("woken 42 by timer", "acquired 42 in 2s: after waiting"),
	},
	"a release in this Lock that finds nothing": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Minute)
		got := s.waits(t.Context())
		s.Del("lock:42")
		defer s.way.holdUp(isSubscriber)() // that nobody holds it is a message, too
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrExpired)
		require.NoError(t, (<-got).err)
	}, redfour.Stats{
		AtOnce: 1, AfterWait: 1, WaitTime: time.Second, Lost: 1, WokenByRelease: 1, Subscriptions: 1, WokenBySubscription: 1,
	}, and("acquired 42 in 0s: at once", "released 42 in 0s, held for 1s: expired", "lost 42: expired", "woken 42 by release",
		"acquired 42 in 1s: after waiting")},
	"the subscription is lost": {
		func(t *testing.T, s scene) {
			mustAcquire(t, s.other, "42", time.Minute)
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			got := s.waits(ctx)
			s.way.cut(isSubscriber)
			require.Error(t, (<-got).err)
		},
		redfour.Stats{TimedOut: 1, Subscriptions: 2, SubscriptionsLost: 1, WokenBySubscription: 2},
		and("unsubscribed: failed", "subscribed", "woken 42 by subscription", "acquired 42 in 3s: timeout"),
	},
	"the subscription is closed when nobody waits": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		require.Error(t, (<-s.waits(ctx)).err)
		pass(time.Minute)
		require.Zero(t, s.way.matching(isSubscriber))
	}, redfour.Stats{TimedOut: 1, Subscriptions: 1, WokenBySubscription: 1}, and("acquired 42 in 2s: timeout")},
	"there is no subscription": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		mustAcquire(t, s.l, "the scripts have a connection", time.Minute)
		s.way.setDown(true)
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		require.Error(t, (<-s.waits(ctx)).err)
	}, redfour.Stats{AtOnce: 1, TimedOut: 1}, []string{"acquired the scripts have a connection in 0s: at once", "acquired 42 in 3s: timeout"}},
	"kept alive": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		kept, stop := s.l.KeepAlive(t.Context(), lease)
		pass(25 * time.Second)
		require.NoError(t, kept.Err())
		require.Equal(t, 1, s.l.Stats().KeptAlive)
		stop()
		synctest.Wait()
	}, redfour.Stats{AtOnce: 1, Renewals: 2}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: done", "renewed 42 in 0s, late by 0s: done",
	}},
	"renewed late": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		hang := make(chan struct{})
		s.way.beforeScript(once(isRenew, func() error { <-hang; return io.EOF }))
		_, stop := s.l.KeepAlive(t.Context(), lease)
		pass(12 * time.Second)
		stop()
		close(hang)
	}, redfour.Stats{AtOnce: 1, Renewals: 1, RenewalsFailed: 1, RenewalsLate: time.Second}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 1s, late by 0s: failed", "renewed 42 in 0s, late by 1s: done",
	}},
	"a release cuts a renewal short": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		hang := make(chan struct{})
		s.way.beforeScript(once(isRenew, func() error { <-hang; return io.EOF }))
		_, stop := s.l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(10*time.Second + 100*time.Millisecond)
		require.NoError(t, s.l.Release(t.Context(), lease))
		close(hang)
	}, redfour.Stats{AtOnce: 1, Released: 1, HoldTime: 10100 * time.Millisecond}, []string{
		"acquired 42 in 0s: at once", "released 42 in 100ms, held for 10.1s: done",
	}},
	"a renewal finds that the lease was lost": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		kept, stop := s.l.KeepAlive(t.Context(), lease)
		defer stop()
		s.Del("lock:42")
		<-kept.Done()
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrExpired)
		require.ErrorIs(t, s.l.Renew(t.Context(), lease, time.Minute), redfour.ErrNotHeld)
	}, redfour.Stats{AtOnce: 1, RenewalsFailed: 2, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: expired", "lost 42: expired",
		"released 42 in 0s, held for 10s: expired", "renewed 42 in 0s, late by 0s: expired",
	}},
	"the deadline passes": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 3*time.Second)
		s.way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		kept, stop := s.l.KeepAlive(t.Context(), lease)
		defer stop()
		<-kept.Done()
		pass(3 * time.Millisecond) // Redis keeps the lock a little longer.
		s.way.beforeScript(nil)
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrExpired)
	}, redfour.Stats{AtOnce: 1, RenewalsFailed: some, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "lost 42: expired", "released 42 in 0s, held for 3s: expired",
	}},
	"a release finds that the lease was lost": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Second)
		pass(2 * time.Second)
		mustAcquire(t, s.other, "42", time.Minute)
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrConflict)
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrConflict)
	}, redfour.Stats{AtOnce: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "released 42 in 0s, held for 2s: conflict", "lost 42: conflict", "released 42 in 0s, held for 2s: conflict",
	}},
	"renewed by the caller": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Second)
		require.NoError(t, s.l.Renew(t.Context(), lease, time.Minute))
		s.Del("lock:42")
		require.ErrorIs(t, s.l.Renew(t.Context(), lease, time.Minute), redfour.ErrExpired)
	}, redfour.Stats{AtOnce: 1, Renewals: 1, RenewalsFailed: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: done", "renewed 42 in 0s, late by 0s: expired", "lost 42: expired",
	}},
	"released twice": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Minute)
		require.NoError(t, s.l.Release(t.Context(), lease))
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrExpired)
	}, redfour.Stats{AtOnce: 1, Released: 1}, []string{
		"acquired 42 in 0s: at once", "released 42 in 0s, held for 0s: done", "released 42 in 0s, held for 0s: expired",
	}},
	"released again after a reply was lost": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Minute)
		s.way.afterScript(once(isRelease, lostReply))
		for range 3 {
			require.NoError(t, s.l.Release(t.Context(), lease))
		}
	}, redfour.Stats{AtOnce: 1, Released: 1}, []string{
		"acquired 42 in 0s: at once", "released 42 in 0s, held for 0s: done", "released 42 in 0s, held for 0s: done",
		"released 42 in 0s, held for 0s: done",
	}},
	"a second release finds that the lease was lost": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Second)
		s.way.beforeScript(once(isRelease, func() error { return redis.ErrClosed }))
		require.Error(t, s.l.Release(t.Context(), lease))
		pass(2 * time.Second)
		require.ErrorIs(t, s.l.Release(t.Context(), lease), redfour.ErrExpired)
	}, redfour.Stats{AtOnce: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "released 42 in 0s, held for 0s: failed", "lost 42: expired", "released 42 in 0s, held for 2s: expired",
	}},
	"a copy of a lost lease": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 3*time.Second)
		text, err := json.Marshal(lease)
		require.NoError(t, err)
		twin := new(redfour.Lease)
		require.NoError(t, json.Unmarshal(text, twin))
		kept, stop := s.l.KeepAlive(t.Context(), twin)
		defer stop()
		synctest.Wait()
		s.Del("lock:42")
		require.ErrorIs(t, s.l.Renew(t.Context(), lease, time.Minute), redfour.ErrExpired)
		<-kept.Done()
	}, redfour.Stats{AtOnce: 1, Renewals: 1, RenewalsFailed: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: done", "renewed 42 in 0s, late by 0s: expired", "lost 42: expired",
	}},
	"too late": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "the server knows the script", time.Minute)
		s.way.beforeScript(once(isAcquire, func() error { pass(500 * time.Millisecond); return nil }))
		_, err := s.l.Acquire(t.Context(), "42", 500*time.Millisecond)
		require.ErrorIs(t, err, redfour.ErrExpired)
		synctest.Wait()
		require.False(t, s.Exists("lock:42"))
	}, redfour.Stats{Failed: 1, Returned: 1}, []string{"acquired 42 in 500ms: expired"}},
	"released when its caller has gone": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", time.Minute)
		hang := make(chan struct{})
		s.way.beforeScript(once(isRelease, func() error { <-hang; return io.EOF }))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		require.ErrorContains(t, s.l.Release(ctx, lease), "outcome unknown")
		require.Zero(t, s.l.Stats().Released)
		pass(2 * time.Second)
		close(hang)
	}, redfour.Stats{AtOnce: 1, Released: 1}, []string{"acquired 42 in 0s: at once", "released 42 in 1s, held for 0s: done"}},
	"a section": {func(t *testing.T, s scene) {
		require.NoError(t, s.l.WithLock(t.Context(), "42", 9*time.Second, func(context.Context, *redfour.Lease) error {
			pass(5 * time.Second)
			return nil
		}))
	}, redfour.Stats{AtOnce: 1, Renewals: 1, Released: 1, HoldTime: 5 * time.Second}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: done", "released 42 in 0s, held for 5s: done",
	}},
	"a lease of somebody else is ended": {func(t *testing.T, s scene) {
		mustAcquire(t, s.other, "42", time.Minute)
		require.NoError(t, s.l.ForceRelease(t.Context(), "42", 0))
		require.Error(t, s.l.ForceRelease(t.Context(), "42", 0))
		_, err := s.l.Inspect(t.Context(), "42")
		require.NoError(t, err)
	}, redfour.Stats{Forced: 1}, nil},
	"a lease of this Lock is ended": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		kept, stop := s.l.KeepAlive(t.Context(), lease)
		defer stop()
		require.NoError(t, s.l.ForceRelease(t.Context(), "42", lease.Index))
		<-kept.Done()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
	}, redfour.Stats{AtOnce: 1, Forced: 1, RenewalsFailed: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: expired", "lost 42: expired",
	}},
	"somebody else ends a lease": {func(t *testing.T, s scene) {
		lease := mustAcquire(t, s.l, "42", 30*time.Second)
		kept, stop := s.l.KeepAlive(t.Context(), lease)
		defer stop()
		require.NoError(t, s.other.ForceRelease(t.Context(), "42", lease.Index))
		<-kept.Done()
	}, redfour.Stats{AtOnce: 1, RenewalsFailed: 1, Lost: 1}, []string{
		"acquired 42 in 0s: at once", "renewed 42 in 0s, late by 0s: expired", "lost 42: expired",
	}},
}

// some is a count that depends on random pauses. What is told is then not compared line by line.
const some = -1

func TestEvents_eachIsCountedAndTold(t *testing.T) {
	for name, e := range events {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				w, way := new(chronicle), new(link)
				l := newLock(t, m.client(t, way), redfour.WithTrace(w.trace()))
				require.Zero(t, l.Stats())
				e.happens(t, scene{m, l, way, m.lock(t)})
				synctest.Wait()

				got, told := l.Stats(), w.told()
				require.Positive(t, got.RoundTrips+got.Failed+got.TimedOut)
				got.Scripts, got.RoundTrips, got.Batches = 0, 0, 0
				got.WaitTime, got.HoldTime, got.RenewalsLate = roughly(got.WaitTime), roughly(got.HoldTime), roughly(got.RenewalsLate)
				if e.stats.RenewalsFailed == some {
					require.Positive(t, got.RenewalsFailed)
					got.RenewalsFailed = some
					told = slices.DeleteFunc(told, func(line string) bool { return strings.HasPrefix(line, "renewed") })
				}
				require.Equal(t, e.stats, got)
				require.ElementsMatch(t, e.told, told)
			})
		})
	}
}

func TestStats_countsWhatIsSent(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
		s := l.Stats()
		require.Equal(t, []int64{4, 4, 0}, []int64{s.Scripts, s.RoundTrips, s.Batches}, "each twice, because the server did not know it")

		const abreast, more = 8, 5
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return nil })
		for i := range abreast + more {
			go func() { _, _ = l.Acquire(t.Context(), fmt.Sprint(i), time.Minute) }()
			synctest.Wait()
		}
		s = l.Stats()
		require.Equal(t, []int64{4 + abreast, 4 + abreast, 0}, []int64{s.Scripts, s.RoundTrips, s.Batches})
		close(hang)
		synctest.Wait()
		s = l.Stats()
		require.Equal(t, []int64{4 + abreast + more, 4 + abreast + 1, 1}, []int64{s.Scripts, s.RoundTrips, s.Batches})
	})
}

// Every function is called while the library holds no mutex, so it may call the Lock.
func TestTrace_mayUseTheLock(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		var l *redfour.Lock
		called := make(map[string]bool)
		var mu sync.Mutex
		use := func(what string) {
			mu.Lock()
			called[what] = true
			mu.Unlock()
			l.Stats()
			_, err := l.Inspect(t.Context(), "42")
			if !errors.Is(err, redfour.ErrClosed) {
				require.NoError(t, err)
			}
			require.ErrorIs(t, l.ForceRelease(t.Context(), "another", 0), redfour.ErrExpired)
		}
		way := new(link)
		l = newLock(t, m.client(t, way), redfour.WithTrace(redfour.Trace{
			Acquired:     func(context.Context, string, time.Time, *redfour.Lease, error) { use("acquired") },
			Renewed:      func(context.Context, string, int64, time.Time, time.Duration, error) { use("renewed") },
			Released:     func(context.Context, string, int64, time.Time, time.Duration, error) { use("released") },
			Lost:         func(string, int64, error) { use("lost") },
			Woken:        func(string, string) { use("woken") },
			Subscribed:   func(string) { use("subscribed") },
			Unsubscribed: func(string, error) { use("unsubscribed") },
		}))
		lease := mustAcquire(t, l, "42", time.Minute)
		got := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Second)
		way.cut(isSubscriber)
		pass(time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.NoError(t, l.Release(t.Context(), lease))
		lease = (<-got).lease
		m.Del("lock:42")
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Minute), redfour.ErrExpired)
		require.Len(t, called, 7, "%v", called)
	})
}

func TestTrace_oneThatBlocksHoldsUpItsCallAlone(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		gate := make(chan struct{})
		l := newLock(t, m.client(t), redfour.WithTrace(redfour.Trace{
			Acquired: func(_ context.Context, id string, _ time.Time, _ *redfour.Lease, _ error) {
				if id == "slow" {
					<-gate
				}
			},
		}))
		got := waitFor(t.Context(), l, "slow", time.Minute)
		pass(5 * time.Second)
		require.Empty(t, got)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
		close(gate)
		require.Equal(t, counted(time.Minute)-5*time.Second, (<-got).lease.Remaining())
	})
}

// Whoever works on a lease hears of its loss before anybody is told.
func TestTrace_oneThatBlocksDoesNotHideALoss(t *testing.T) {
	for name, lose := range map[string]func(m *mini, way *link) (after time.Duration){
		"found by a renewal": func(m *mini, _ *link) time.Duration {
			m.Del("lock:42")
			return time.Second
		},
		"at the deadline": func(_ *mini, way *link) time.Duration {
			way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
			return counted(3 * time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				l := newLock(t, m.client(t, way), redfour.WithTrace(redfour.Trace{
					Renewed: func(context.Context, string, int64, time.Time, time.Duration, error) { pass(9 * time.Second) },
					Lost:    func(string, int64, error) { pass(9 * time.Second) },
				}))
				kept, stop := l.KeepAlive(t.Context(), mustAcquire(t, l, "42", 3*time.Second))
				defer stop()
				start, want := time.Now(), lose(m, way)
				<-kept.Done()
				require.Equal(t, want, time.Since(start))
				require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
			})
		})
	}
}

// The lease of a section is renewed while somebody is told of it, and released if that panics.
func TestTrace_doesNotUseUpASection(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		panics := false
		l := newLock(t, m.client(t), redfour.WithTrace(redfour.Trace{
			Acquired: func(context.Context, string, time.Time, *redfour.Lease, error) {
				if panics {
					panic("mine")
				}
				pass(5 * time.Second)
			},
		}))
		require.NoError(t, l.WithLock(t.Context(), "42", 3*time.Second, func(_ context.Context, lease *redfour.Lease) error {
			require.Greater(t, lease.Remaining(), time.Second)
			return nil
		}))
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
		defer cancel()
		err := l.WithLock(ctx, "42", 3*time.Second, func(context.Context, *redfour.Lease) error { panic("fn ran") })
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.False(t, m.Exists("lock:42"))

		panics = true
		require.PanicsWithValue(t, "mine", func() {
			_ = l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error { return nil })
		})
		require.False(t, m.Exists("lock:42"))
	})
}

// Whoever is told of a renewal may end the lease, as anybody may.
func TestTrace_mayEndTheLeaseThatItIsToldOf(t *testing.T) {
	for name, end := range map[string]func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error{
		"released": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error { return l.Release(ctx, lease) },
		"forced": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error {
			return l.ForceRelease(ctx, "42", lease.Index)
		},
		"renewed": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error {
			return l.Renew(ctx, lease, time.Second)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				var l *redfour.Lock
				var lease *redfour.Lease
				ended := make(chan error, 1)
				var first sync.Once // Ending it by a renewal is told as well.
				l = newLock(t, m.client(t), redfour.WithTrace(redfour.Trace{
					Renewed: func(_ context.Context, _ string, _ int64, _ time.Time, _ time.Duration, _ error) {
						mine := false
						first.Do(func() { mine = true })
						if mine {
							ended <- end(t.Context(), l, lease)
						}
					},
				}))
				lease = mustAcquire(t, l, "42", 3*time.Second)
				_, stop := l.KeepAlive(t.Context(), lease)
				defer stop()
				start := time.Now()
				require.NoError(t, <-ended)
				require.Equal(t, time.Second, time.Since(start))
			})
		})
	}
}

// What it is told of has happened by then, and is finished, so nothing is left undone by a panic that somebody recovers.
func TestTrace_panicLeavesNothingUndone(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		panics := func() { panic("mine") }
		l := newLock(t, m.client(t), redfour.WithTrace(redfour.Trace{
			Released: func(context.Context, string, int64, time.Time, time.Duration, error) { panics() },
			Woken: func(_, by string) {
				if by == "release" {
					panics()
				}
			},
		}))
		lease := mustAcquire(t, l, "42", time.Minute)
		got := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Second)
		require.PanicsWithValue(t, "mine", func() { _ = l.Release(t.Context(), lease) })
		lease = (<-got).lease
		panics = func() {}
		require.NoError(t, l.Release(t.Context(), lease))
		pass(time.Minute)
		require.Zero(t, m.PubSubNumSub("lock-release")["lock-release"], "the subscription rests")
		require.NoError(t, l.Close())
	})
}

func TestTrace_panicReachesTheCaller(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := newLock(t, m.client(t), redfour.WithTrace(redfour.Trace{
			Acquired: func(context.Context, string, time.Time, *redfour.Lease, error) { panic("mine") },
		}))
		require.PanicsWithValue(t, "mine", func() { _, _ = l.Acquire(t.Context(), "42", time.Minute) })
		require.PanicsWithValue(t, "mine", func() {
			_ = l.WithLock(t.Context(), "43", time.Minute, func(context.Context, *redfour.Lease) error { return nil })
		})
		require.NoError(t, l.Close(), "nothing waits for the call that it ended")
	})
}

func TestLogger_saysWhatAnOperatorMustSee(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		var out bytes.Buffer
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
		lease := mustAcquire(t, l, "42", time.Minute)
		got := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Second)
		require.NoError(t, l.Release(t.Context(), lease))
		next := (<-got).lease
		synctest.Wait()
		require.Empty(t, out.String(), "nothing went wrong")

		waitFor(t.Context(), l, "42", time.Minute)
		synctest.Wait()
		way.cut(isSubscriber)
		pass(time.Second)
		m.Del("lock:42")
		require.Error(t, l.Renew(t.Context(), next, time.Minute))
		require.NoError(t, l.Close())
		for _, want := range []string{
			`level=WARN msg="redfour: subscription lost`, `level=INFO msg="redfour: subscribed again" namespace=lock`,
			fmt.Sprintf(`level=WARN msg="redfour: lease lost: its section may have overlapped with another" namespace=lock id=42 index=%d error=`, next.Index),
		} {
			require.Equal(t, 1, strings.Count(out.String(), want), "%s in %s", want, out.String())
		}
		require.Equal(t, 3, strings.Count(out.String(), "\n"), out.String())
		require.NotContains(t, out.String(), next.Token)
	})
}

func TestLogger_saysThatWaitersCannotQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		var out bytes.Buffer
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if keys(cmd) == 3 {
				return noPermissionError{}
			}
			return nil
		})
		mustAcquire(t, l, "42", time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		_, err := l.WaitAcquire(ctx, "42", time.Minute)
		require.Error(t, err)
		require.Equal(t, 1, strings.Count(out.String(), `level=WARN msg="redfour: waiters cannot queue`), out.String())
	})
}

// A noPermissionError is what a user hears who may not use a key.
type noPermissionError struct{}

func (noPermissionError) RedisError()   {}
func (noPermissionError) Error() string { return "NOPERM No permissions to access a key" }

func TestOwner_isCheckedAndQuoted(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		for owner, want := range map[string]string{
			"two\nlines":             `owner "two\nlines" contains what cannot be printed`,
			"  ":                     `owner "  " is blank`,
			"\xff":                   `owner "\xff" is not valid UTF-8`,
			strings.Repeat("x", 257): "owner of 257 bytes: at most 256 are allowed",
			"a\u2028next line":       "contains what cannot be printed",
		} {
			_, err := redfour.New(client, redfour.WithOwner(owner))
			require.ErrorContains(t, err, want)
		}
		_, err := redfour.New(client, redfour.WithLogger(nil))
		require.EqualError(t, err, "redfour: new: nil logger")

		l := m.lock(t)
		for owner, want := range map[string]string{
			"worker-7 (pid 4121)": "held by worker-7 (pid 4121), index 7, 1m0s left",
			"":                    "held by another lease, index 7, 1m0s left",
			"two\nlines":          `held by "two\nlines", index 7, 1m0s left`, // not by this library
		} {
			m.HSet("lock:42", "index", "7", "token", "t", "owner", owner)
			m.SetTTL("lock:42", time.Minute)
			_, err := l.Acquire(t.Context(), "42", time.Minute)
			require.EqualError(t, err, `redfour: acquire "42": `+want)
		}
		m.FlushAll()
		mustAcquire(t, l, "42", time.Minute)
		require.Regexp(t, `^redfour\.test on .+ \(pid \d+\)$`, m.HGet("lock:42", "owner"))
	})
}

func TestForceRelease_namesALockWithoutAnIndex(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		m.HSet("lock:42", "owner", "who knows")
		m.SetTTL("lock:42", time.Minute)
		require.EqualError(t, l.ForceRelease(t.Context(), "42", 0),
			`redfour: force release "42": key "lock:42" is a hash without index, which redfour did not make`)
		require.True(t, m.Exists("lock:42"))
	})
}

// Between the look and the release another gets the lock: never are two leases ended.
func TestForceRelease_endsTheLeaseThatItSaw(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l, holder := m.lock(t, way), m.lock(t)
		lease := mustAcquire(t, holder, "42", time.Minute)
		var next *redfour.Lease
		way.afterScript(once(isInspect, func() error {
			require.NoError(t, holder.Release(t.Context(), lease))
			next = mustAcquire(t, holder, "42", time.Minute)
			return nil
		}))
		require.NoError(t, l.ForceRelease(t.Context(), "42", 0), "it has ended")
		require.NoError(t, holder.Renew(t.Context(), next, time.Minute))

		way.afterScript(once(isInspect, func() error {
			require.NoError(t, holder.Release(t.Context(), next))
			next = mustAcquire(t, holder, "42", time.Minute)
			return nil
		}))
		require.ErrorIs(t, l.ForceRelease(t.Context(), "42", next.Index), redfour.ErrConflict)
		require.NoError(t, holder.Renew(t.Context(), next, time.Minute))
		require.Zero(t, l.Stats().Lost, "it had none")
	})
}

// That the caller's ctx ended because another lease was lost says nothing about this one.
func TestForceRelease_ofAnyLeaseDoesNotTakeTheCauseForAnAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, m.lock(t), "42", time.Minute)
		ctx, cancel := context.WithCancelCause(t.Context())
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if isRelease(cmd) {
				cancel(redfour.ErrExpired)
				pass(900 * time.Millisecond)
				return io.EOF
			}
			return nil
		})
		require.ErrorContains(t, l.ForceRelease(ctx, "42", 0), "outcome unknown")
		require.True(t, m.Exists("lock:42"))
	})
}

func TestForceRelease_namesALockWhoseIndexIsNone(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		for _, index := range []string{"007", "1e3", "0", "-1", "x", "99999999999999999999"} {
			m.HSet("lock:42", "index", index)
			m.SetTTL("lock:42", time.Minute)
			require.ErrorContains(t, l.ForceRelease(t.Context(), "42", 0), `key "lock:42" is a hash without index`)
			require.True(t, m.Exists("lock:42"))
		}
	})
}

// The reply to a forced release is lost, and the lock has gone on to another.
func TestForceRelease_mayBeRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l, holder := m.lock(t, way), m.lock(t)
		lease := mustAcquire(t, holder, "42", time.Minute)
		got := waitFor(t.Context(), holder, "42", time.Minute)
		pass(time.Second)
		way.afterScript(once(isRelease, lostReply))
		require.NoError(t, l.ForceRelease(t.Context(), "42", lease.Index))
		require.NoError(t, holder.Renew(t.Context(), (<-got).lease, time.Minute))
	})
}

func TestInspect_triesAgainWhereRedisCannotBeReached(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.beforeScript(once(isInspect, func() error { return redis.ErrPoolTimeout }))
		_, err := l.Inspect(t.Context(), "42")
		require.NoError(t, err)
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		start := time.Now()
		_, err = l.Inspect(t.Context(), "42")
		require.ErrorIs(t, err, redis.ErrPoolTimeout)
		require.InDelta(t, 5*time.Second, time.Since(start), float64(time.Second))
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		way.afterScript(func(context.Context, redis.Cmder) error { return io.EOF })
		way.beforeScript(nil)
		_, err = l.Inspect(t.Context(), "42")
		require.ErrorIs(t, err, io.EOF)
		require.NotContains(t, err.Error(), "outcome unknown", "it has none")
	})
}
