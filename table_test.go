package redfour_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// What each call does in each situation, on every kind of server. The situations
// that need time, or a broken network, are in the other files.

// A site is a server to run the table on. Each row uses an id of its own.
type site struct {
	client func(t *testing.T, via ...*link) redis.UniversalClient
	names  func(namespace, id string) (lock, counter string)
	queues bool // waiters can queue there
}

// lock is the key of a lock in the namespace that is the default.
func (s site) lock(id string) string {
	lock, _ := s.names("lock", id)
	return lock
}

// plainNames are those that npm redfour knows.
func plainNames(namespace, id string) (lock, counter string) {
	return namespace + ":" + id, namespace + "index"
}

func TestTable_miniredis(t *testing.T) {
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				row.run(t, site{func(t *testing.T, via ...*link) redis.UniversalClient { return m.client(t, via...) }, plainNames, true})
			})
		})
	}
}

var table = []struct {
	name string
	run  func(t *testing.T, s site)
}{
	{"Acquire/free", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client, redfour.WithOwner("worker 7, ü"))
		before := time.Now()
		lease := mustAcquire(t, l, "acquire free", time.Minute)
		require.Equal(t, time.Minute, lease.TTL)
		require.True(t, lease.Immediate)
		require.WithinRange(t, lease.Deadline(), before.Add(counted(time.Minute)), time.Now().Add(counted(time.Minute)))
		require.Equal(t, map[string]string{"index": strconv.FormatInt(lease.Index, 10), "token": lease.Token, "owner": "worker 7, ü"},
			client.HGetAll(t.Context(), s.lock("acquire free")).Val())
		require.LessOrEqual(t, client.PTTL(t.Context(), s.lock("acquire free")).Val(), time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
	}},
	{"Acquire/held", func(t *testing.T, s site) {
		l := newLock(t, s.client(t), redfour.WithOwner("worker 7, ü"))
		lease := mustAcquire(t, l, "acquire held", time.Minute)
		_, err := l.Acquire(t.Context(), "acquire held", time.Minute)
		locked := new(redfour.LockedError)
		require.ErrorAs(t, err, &locked)
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.Equal(t, lease.Index, locked.Index)
		require.Equal(t, "acquire held", locked.ID)
		require.Equal(t, "worker 7, ü", locked.Owner)
		require.InDelta(t, time.Minute, locked.TTL, float64(5*time.Second))
	}},
	{"any/bad arguments send nothing", func(t *testing.T, s site) {
		way := new(link)
		l := newLock(t, s.client(t, way))
		ctx := t.Context()
		good := &redfour.Lease{ID: "x", Index: 1, Token: "t", TTL: time.Second}
		acquire := func(id string, ttl time.Duration) error {
			_, err := l.Acquire(ctx, id, ttl)
			return err
		}
		wait := func(id string, ttl time.Duration) error {
			_, err := l.WaitAcquire(ctx, id, ttl)
			return err
		}
		inspect := func(id string) error {
			_, err := l.Inspect(ctx, id)
			return err
		}
		keep := func(lease *redfour.Lease) error {
			kept, _ := l.KeepAlive(ctx, lease)
			require.Error(t, kept.Err())
			return context.Cause(kept)
		}
		nothing := func(context.Context, *redfour.Lease) error { panic("fn ran") }
		for what, err := range map[string]error{
			`redfour: acquire "": empty id`:                           acquire("", time.Second),
			`redfour: acquire "\xff": id is not valid UTF-8`:          acquire("\xff", time.Second),
			`redfour: acquire "x": ttl 999.999µs is shorter than 1ms`: acquire("x", time.Millisecond-1),
			`redfour: wait for "": empty id`:                          wait("", time.Second),
			`redfour: wait for "x": ttl 0s is shorter than 1ms`:       wait("x", 0),
			`redfour: wait for "x": ttl -1s is shorter than 1ms`:      l.WithLock(ctx, "x", -time.Second, nothing),
			`redfour: with lock "x": nil func`:                        l.WithLock(ctx, "x", time.Second, nil),
			`redfour: renew: nil lease`:                               l.Renew(ctx, nil, time.Second),
			`redfour: renew: empty id`:                                l.Renew(ctx, &redfour.Lease{Index: 7}, time.Second),
			`redfour: renew "x": ttl 1ns is shorter than 1ms`:         l.Renew(ctx, good, 1),
			`redfour: release: nil lease`:                             l.Release(ctx, nil),
			`redfour: release: empty id`:                              l.Release(ctx, &redfour.Lease{Index: 7}),
			`redfour: inspect "": empty id`:                           inspect(""),
			`redfour: force release "": empty id`:                     l.ForceRelease(ctx, "", 0),
			`redfour: force release "x": negative index -1`:           l.ForceRelease(ctx, "x", -1),
			`redfour: keep alive: nil lease`:                          keep(nil),
			`redfour: keep alive: empty id`:                           keep(&redfour.Lease{TTL: time.Second}),
			`redfour: keep alive: ttl 0s is shorter than 1ms`:         keep(&redfour.Lease{ID: "x"}),
		} {
			require.EqualError(t, err, what)
		}
		require.Zero(t, way.sent())
	}},
	{"any/a lease is checked by index and token", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		ctx := t.Context()
		lease := mustAcquire(t, l, "both", time.Minute)
		for _, other := range []*redfour.Lease{
			{ID: lease.ID, Index: lease.Index, Token: ""},
			{ID: lease.ID, Index: lease.Index, Token: "guess"},
			{ID: lease.ID, Index: lease.Index + 1, Token: lease.Token},
			{ID: lease.ID, Index: -lease.Index, Token: lease.Token},
			{ID: lease.ID, Index: 0, Token: lease.Token},
		} {
			require.ErrorIs(t, l.Renew(ctx, other, time.Hour), redfour.ErrConflict)
			require.ErrorIs(t, l.Release(ctx, other), redfour.ErrConflict)
		}
		require.LessOrEqual(t, client.PTTL(ctx, s.lock("both")).Val(), time.Minute)
		require.NoError(t, l.Release(ctx, lease))
	}},
	{"any/a lease of npm has no token", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		ctx := t.Context()
		require.NoError(t, client.HSet(ctx, s.lock("npm"), "index", 7).Err())
		require.NoError(t, client.PExpire(ctx, s.lock("npm"), time.Minute).Err())
		_, err := l.Acquire(ctx, "npm", time.Minute)
		locked := new(redfour.LockedError)
		require.ErrorAs(t, err, &locked)
		require.EqualValues(t, 7, locked.Index)
		require.ErrorIs(t, l.Release(ctx, &redfour.Lease{ID: "npm", Index: 7, Token: "t"}), redfour.ErrConflict)

		var lease redfour.Lease
		require.NoError(t, json.Unmarshal([]byte(`{"id":"npm","success":true,"index":7,"ttl":60000}`), &lease))
		require.NoError(t, l.Renew(ctx, &lease, time.Hour))
		require.Greater(t, client.PTTL(ctx, s.lock("npm")).Val(), time.Minute)
		require.NoError(t, l.Release(ctx, &lease))
		require.Zero(t, client.Exists(ctx, s.lock("npm")).Val())
	}},
	{"any/a key of another type", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		ctx := t.Context()
		lease := &redfour.Lease{ID: "foreign", Index: 1, Token: "t", TTL: time.Second}
		calls := map[string]func() error{
			"acquire":  func() error { _, err := l.Acquire(ctx, "foreign", time.Second); return err },
			"wait for": func() error { _, err := l.WaitAcquire(ctx, "foreign", time.Second); return err },
			"renew":    func() error { return l.Renew(ctx, lease, time.Second) },
			"release":  func() error { return l.Release(ctx, lease) },
			"inspect":  func() error { _, err := l.Inspect(ctx, "foreign"); return err },

			"force release": func() error { return l.ForceRelease(ctx, "foreign", 0) },
		}
		for kind, makeIt := range map[string]func() error{
			"string":              func() error { return client.Set(ctx, s.lock("foreign"), "x", 0).Err() },
			"list":                func() error { return client.RPush(ctx, s.lock("foreign"), "x").Err() },
			"hash without expiry": func() error { return client.HSet(ctx, s.lock("foreign"), "index", "5").Err() },
		} {
			require.NoError(t, client.Del(ctx, s.lock("foreign")).Err())
			require.NoError(t, makeIt())
			for op, call := range calls {
				err := call()
				require.ErrorContains(t, err, `redfour: `+op+` "foreign": key "`+s.lock("foreign")+`" is a `+kind)
				require.NotErrorIs(t, err, redfour.ErrLocked)
				require.NotErrorIs(t, err, redfour.ErrNotHeld)
			}
			require.EqualValues(t, 1, client.Exists(ctx, s.lock("foreign")).Val())
		}
		require.NoError(t, client.Del(ctx, s.lock("foreign")).Err())
	}},
	{"any/a counter of another type", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client, redfour.WithNamespace("odd"))
		ctx := t.Context()
		lock, counter := s.names("odd", "x")
		for kind, makeIt := range map[string]func() error{
			"list":                    func() error { return client.RPush(ctx, counter, "x").Err() },
			"string without a number": func() error { return client.Set(ctx, counter, "inf", 0).Err() },
			"number beyond 2^53":      func() error { return client.Set(ctx, counter, "9007199254740991", 0).Err() },
		} {
			require.NoError(t, client.Del(ctx, counter).Err())
			require.NoError(t, makeIt())
			_, err := l.Acquire(ctx, "x", time.Second)
			require.ErrorContains(t, err, `redfour: acquire "x": key "`+counter+`" is a `+kind)
			require.Zero(t, client.Exists(ctx, lock).Val())
		}
	}},
	{"any/ctx had ended", func(t *testing.T, s site) {
		way := new(link)
		l := newLock(t, s.client(t, way))
		cause := errors.New("the request is gone")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		_, acquireErr := l.Acquire(ctx, "x", time.Second)
		_, waitErr := l.WaitAcquire(ctx, "x", time.Second)
		renewErr := l.Renew(ctx, &redfour.Lease{ID: "x", Index: 1}, time.Second)
		_, inspectErr := l.Inspect(ctx, "x")
		for _, err := range []error{acquireErr, waitErr, renewErr, inspectErr, l.ForceRelease(ctx, "x", 0)} {
			require.ErrorIs(t, err, context.Canceled)
			require.ErrorIs(t, err, cause)
		}
		kept, _ := l.KeepAlive(ctx, &redfour.Lease{ID: "x", Index: 1, TTL: time.Second})
		require.Equal(t, cause, context.Cause(kept))
		require.Zero(t, way.sent())
	}},
	{"WaitAcquire/free", func(t *testing.T, s site) {
		way := new(link)
		client := s.client(t, way)
		l := newLock(t, client)
		lease, err := l.WaitAcquire(t.Context(), "wait free", time.Minute)
		require.NoError(t, err)
		require.True(t, lease.Immediate)
		require.Equal(t, time.Minute, lease.TTL)
		require.NoError(t, l.Release(t.Context(), lease))
		require.Zero(t, client.Exists(t.Context(), s.lock("wait free")).Val())
	}},
	{"WaitAcquire/released", func(t *testing.T, s site) {
		a, b := newLock(t, s.client(t)), newLock(t, s.client(t))
		lease := mustAcquire(t, a, "wait", time.Minute)
		got := waitFor(t.Context(), b, "wait", time.Minute)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Greater(t, r.lease.Index, lease.Index)
		require.NoError(t, b.Release(t.Context(), r.lease))
	}},
	{"WaitAcquire/ctx ends while it is held", func(t *testing.T, s site) {
		l := newLock(t, s.client(t))
		lease := mustAcquire(t, l, "give up", time.Minute)
		cause := errors.New("lunch")
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, cause)
		defer cancel()
		_, err := l.WaitAcquire(ctx, "give up", time.Minute)
		locked := new(redfour.LockedError)
		require.ErrorAs(t, err, &locked)
		require.Equal(t, lease.Index, locked.Index)
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, cause)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
	}},
	{"Release/held, then nobody holds", func(t *testing.T, s site) {
		l := newLock(t, s.client(t))
		lease := mustAcquire(t, l, "release", time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
		require.Zero(t, lease.Remaining())
		err := l.Release(t.Context(), lease)
		require.EqualError(t, err, `redfour: release "release": lease expired`)
		require.ErrorIs(t, err, redfour.ErrExpired)
		require.ErrorIs(t, err, redfour.ErrNotHeld)
		require.NotErrorIs(t, err, redfour.ErrConflict)
	}},
	{"Release/another lease holds", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "conflict", time.Minute)
		require.NoError(t, client.Del(t.Context(), s.lock("conflict")).Err())
		other := mustAcquire(t, l, "conflict", time.Minute)
		require.Greater(t, other.Index, lease.Index)
		err := l.Release(t.Context(), lease)
		require.ErrorIs(t, err, redfour.ErrConflict)
		require.ErrorIs(t, err, redfour.ErrNotHeld)
		require.NoError(t, l.Release(t.Context(), other), "that lease is left alone")
	}},
	{"Release/ctx had ended", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "late release", time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_ = l.Release(ctx, lease) // nil if it was quick
		require.NoError(t, l.Close())
		require.Zero(t, client.Exists(t.Context(), s.lock("late release")).Val())
	}},
	{"Renew/held", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "renew", time.Minute)
		for _, ttl := range []time.Duration{time.Hour, time.Second} {
			before := time.Now()
			require.NoError(t, l.Renew(t.Context(), lease, ttl))
			require.WithinRange(t, lease.Deadline(), before.Add(counted(ttl)), time.Now().Add(counted(ttl)))
			left := client.PTTL(t.Context(), s.lock("renew")).Val()
			require.LessOrEqual(t, left, ttl)
			require.Greater(t, left, ttl/2)
		}
		require.Equal(t, time.Minute, lease.TTL)
	}},
	{"Renew/nobody or another holds", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "revive", time.Minute)
		require.NoError(t, client.Del(t.Context(), s.lock("revive")).Err())
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Hour), redfour.ErrExpired)
		require.Zero(t, client.Exists(t.Context(), s.lock("revive")).Val())
		require.Zero(t, lease.Remaining())
		mustAcquire(t, l, "revive", time.Minute)
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Hour), redfour.ErrConflict)
		require.LessOrEqual(t, client.PTTL(t.Context(), s.lock("revive")).Val(), time.Minute)
	}},
	{"KeepAlive/renews and ends with the release", func(t *testing.T, s site) {
		way := new(link)
		client := s.client(t, way)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "keep", 300*time.Millisecond)
		renewed := make(chan struct{}, 100)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if isRenew(cmd) {
				renewed <- struct{}{}
			}
			return nil
		})
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		for range 3 {
			<-renewed
		}
		require.NoError(t, kept.Err())
		require.NoError(t, l.Release(t.Context(), lease))
		<-kept.Done()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
		require.NotErrorIs(t, context.Cause(kept), redfour.ErrExpired)
	}},
	{"KeepAlive/lost", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "lose", 200*time.Millisecond)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		require.NoError(t, client.Del(t.Context(), s.lock("lose")).Err())
		<-kept.Done()
		require.ErrorIs(t, kept.Err(), context.Canceled)
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)

		lease = mustAcquire(t, l, "lose", 200*time.Millisecond)
		kept, stop = l.KeepAlive(t.Context(), lease)
		defer stop()
		require.NoError(t, client.Del(t.Context(), s.lock("lose")).Err())
		mustAcquire(t, l, "lose", time.Minute)
		<-kept.Done()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrConflict)
	}},
	{"WithLock/fn's error comes back unchanged", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		mine := errors.New("mine")
		err := l.WithLock(t.Context(), "section", time.Minute, func(ctx context.Context, lease *redfour.Lease) error {
			require.EqualValues(t, 1, client.Exists(ctx, s.lock("section")).Val())
			require.NotZero(t, lease.Index)
			return mine
		})
		require.Same(t, mine, err)
		require.Zero(t, client.Exists(t.Context(), s.lock("section")).Val())
	}},
	{"WithLock/the lease is lost", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		mine := errors.New("mine")
		err := l.WithLock(t.Context(), "lost", 200*time.Millisecond, func(ctx context.Context, _ *redfour.Lease) error {
			require.NoError(t, client.Del(ctx, s.lock("lost")).Err())
			<-ctx.Done()
			require.ErrorIs(t, context.Cause(ctx), redfour.ErrExpired)
			return mine
		})
		require.ErrorIs(t, err, mine)
		require.ErrorIs(t, err, redfour.ErrExpired)
	}},
	{"Inspect/nobody holds", func(t *testing.T, s site) {
		got, err := newLock(t, s.client(t)).Inspect(t.Context(), "inspect free")
		require.NoError(t, err)
		require.Equal(t, redfour.Status{ID: "inspect free"}, got)
	}},
	{"Inspect/held", func(t *testing.T, s site) {
		client := s.client(t)
		before := client.Time(t.Context()).Val()
		a, b := newLock(t, client, redfour.WithOwner("a")), newLock(t, client, redfour.WithOwner("b's (pid 7)"))
		lease := mustAcquire(t, a, "inspect", time.Minute)
		got, err := b.Inspect(t.Context(), "inspect")
		require.NoError(t, err)
		require.InDelta(t, time.Minute, got.TTL, float64(5*time.Second))
		require.WithinRange(t, got.Since, before.Add(-time.Second), client.Time(t.Context()).Val().Add(time.Second))
		got.TTL, got.Since = 0, time.Time{}
		require.Equal(t, redfour.Status{ID: "inspect", Held: true, Index: lease.Index, Owner: "a"}, got)
		if !s.queues {
			return
		}

		waiting := waitFor(t.Context(), b, "inspect", time.Minute)
		eventually(t, func() bool { return b.Stats().Waiting == 1 }, "waiting")
		waitingToo := waitFor(t.Context(), b, "inspect", time.Minute)
		eventually(t, func() bool { return b.Stats().Waiting == 2 }, "waiting")
		nameless := newLock(t, client, redfour.WithOwner(""))
		waiters := func() []string {
			got, err := a.Inspect(t.Context(), "inspect")
			require.NoError(t, err)
			return got.Waiters
		}
		eventually(t, func() bool { return len(waiters()) == 1 }, "queued")
		last := waitFor(t.Context(), nameless, "inspect", time.Minute)
		eventually(t, func() bool { return len(waiters()) == 2 }, "queued")
		require.Equal(t, []string{"b's (pid 7)", ""}, waiters())

		require.NoError(t, a.Release(t.Context(), lease))
		lease = takeLease(t, waiting)
		got, err = a.Inspect(t.Context(), "inspect")
		require.NoError(t, err)
		require.Equal(t, lease.Index, got.Index)
		require.Equal(t, "b's (pid 7)", got.Owner, "also where it was granted")
		require.NoError(t, b.Release(t.Context(), lease))
		lease = takeLease(t, waitingToo)
		got, err = a.Inspect(t.Context(), "inspect")
		require.NoError(t, err)
		require.Equal(t, "b's (pid 7)", got.Owner, "also where it was handed over")
		require.NoError(t, b.Release(t.Context(), lease))
		lease = takeLease(t, last)
		got, err = a.Inspect(t.Context(), "inspect")
		require.NoError(t, err)
		require.Empty(t, got.Owner, "not that of the one before")
		require.Empty(t, got.Waiters)
		require.NoError(t, nameless.Release(t.Context(), lease))
	}},
	{"Inspect and ForceRelease/a lease of npm", func(t *testing.T, s site) {
		client := s.client(t)
		l := newLock(t, client)
		ctx := t.Context()
		require.NoError(t, client.HSet(ctx, s.lock("npm holds"), "index", 7).Err())
		require.NoError(t, client.PExpire(ctx, s.lock("npm holds"), time.Minute).Err())
		got, err := l.Inspect(ctx, "npm holds")
		require.NoError(t, err)
		require.InDelta(t, time.Minute, got.TTL, float64(5*time.Second))
		got.TTL = 0
		require.Equal(t, redfour.Status{ID: "npm holds", Held: true, Index: 7}, got)
		require.ErrorIs(t, l.ForceRelease(ctx, "npm holds", 8), redfour.ErrConflict)
		require.NoError(t, l.ForceRelease(ctx, "npm holds", 7))
		require.Zero(t, client.Exists(ctx, s.lock("npm holds")).Val())
	}},
	{"ForceRelease/the holder hears of it", func(t *testing.T, s site) {
		holder, l := newLock(t, s.client(t)), newLock(t, s.client(t))
		for _, byIndex := range []bool{true, false} {
			lease := mustAcquire(t, holder, "force", 300*time.Millisecond)
			kept, stop := holder.KeepAlive(t.Context(), lease)
			defer stop()
			index := lease.Index
			if !byIndex {
				index = 0
			}
			require.NoError(t, l.ForceRelease(t.Context(), "force", index))
			<-kept.Done()
			require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
			require.ErrorIs(t, holder.Release(t.Context(), lease), redfour.ErrExpired)
		}
	}},
	{"ForceRelease/the next waiter gets it", func(t *testing.T, s site) {
		holder, l := newLock(t, s.client(t)), newLock(t, s.client(t))
		lease := mustAcquire(t, holder, "force on", time.Minute)
		waiting := waitFor(t.Context(), newLock(t, s.client(t)), "force on", time.Minute)
		eventually(t, func() bool {
			got, err := l.Inspect(t.Context(), "force on")
			require.NoError(t, err)
			return len(got.Waiters) == 1 || !s.queues
		}, "queued")
		require.NoError(t, l.ForceRelease(t.Context(), "force on", lease.Index))
		next := takeLease(t, waiting)
		require.Greater(t, next.Index, lease.Index)
		require.ErrorIs(t, holder.Renew(t.Context(), lease, time.Minute), redfour.ErrConflict)
		require.ErrorIs(t, l.ForceRelease(t.Context(), "force on", lease.Index), redfour.ErrConflict)
		require.NoError(t, holder.Renew(t.Context(), next, time.Minute), "that lease was left alone")
	}},
	{"Renew/for less reaches the waiters", func(t *testing.T, s site) {
		holder, l := newLock(t, s.client(t)), newLock(t, s.client(t))
		lease := mustAcquire(t, holder, "for less", time.Hour)
		waiting := waitFor(t.Context(), l, "for less", time.Minute)
		eventually(t, func() bool {
			got, err := l.Inspect(t.Context(), "for less")
			require.NoError(t, err)
			return len(got.Waiters) == 1 || !s.queues
		}, "queued")
		require.NoError(t, holder.Renew(t.Context(), lease, 300*time.Millisecond))
		require.NoError(t, l.Release(t.Context(), takeLease(t, waiting)), "long before it looks by itself")
	}},
	{"ForceRelease/nobody or another holds", func(t *testing.T, s site) {
		l := newLock(t, s.client(t))
		for _, index := range []int64{0, 7} {
			err := l.ForceRelease(t.Context(), "force nobody", index)
			require.EqualError(t, err, `redfour: force release "force nobody": nobody holds it: lease expired`)
			require.ErrorIs(t, err, redfour.ErrExpired)
		}
		lease := mustAcquire(t, l, "force nobody", time.Minute)
		err := l.ForceRelease(t.Context(), "force nobody", lease.Index-1)
		require.ErrorIs(t, err, redfour.ErrConflict)
		require.ErrorContains(t, err, fmt.Sprintf(`redfour: force release "force nobody": index %d does not hold (held by `, lease.Index-1))
		require.ErrorContains(t, err, strconv.FormatInt(lease.Index, 10))
		require.NotErrorIs(t, err, redfour.ErrLocked)
		require.NoError(t, l.Release(t.Context(), lease), "that lease was left alone")
	}},
	{"any/closed", func(t *testing.T, s site) {
		way := new(link)
		client := s.client(t, way)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "closed", time.Minute)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		waiting := waitFor(t.Context(), l, "closed", time.Minute)
		require.NoError(t, l.Close())
		require.ErrorIs(t, (<-waiting).err, redfour.ErrClosed)
		require.Equal(t, redfour.ErrClosed, context.Cause(kept))
		sent := way.sent()
		_, err := l.Acquire(t.Context(), "closed", time.Minute)
		require.ErrorIs(t, err, redfour.ErrClosed)
		_, err = l.WaitAcquire(t.Context(), "closed", time.Minute)
		require.ErrorIs(t, err, redfour.ErrClosed)
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Minute), redfour.ErrClosed)
		_, err = l.Inspect(t.Context(), "closed")
		require.ErrorIs(t, err, redfour.ErrClosed)
		require.ErrorIs(t, l.ForceRelease(t.Context(), "closed", 0), redfour.ErrClosed)
		kept, _ = l.KeepAlive(t.Context(), lease)
		require.ErrorIs(t, context.Cause(kept), redfour.ErrClosed)
		err = l.WithLock(t.Context(), "closed", time.Minute, func(context.Context, *redfour.Lease) error { panic("fn ran") })
		require.ErrorIs(t, err, redfour.ErrClosed)
		require.Equal(t, sent, way.sent())
		require.NoError(t, l.Release(t.Context(), lease))
		require.NoError(t, l.Close())
		require.NoError(t, client.Ping(t.Context()).Err(), "the caller's client is left alone")
	}},
}
