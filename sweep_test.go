package redfour_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// stand makes the client keep n idle connections, and kills the dead of them that it would use next.
func stand(t *testing.T, client *redis.Client, way *link, n, dead int) {
	t.Helper()
	conns := make([]*redis.Conn, n)
	for i := range conns {
		conns[i] = client.Conn()
		require.NoError(t, conns[i].Ping(t.Context()).Err())
	}
	for _, c := range conns {
		require.NoError(t, c.Close())
	}
	last := way.dials()
	way.swallow(func(c *linkConn) bool { return c.number > last-dead })
}

// standing makes a Lock whose client keeps n connections. The first 12 that it would use
// die silently when the returned function is called. (The race detector crashes with
// bubbles that have many more goroutines; real servers see 80 connections.)
func standing(t *testing.T, m *mini, n int) (*redfour.Lock, func()) {
	t.Helper()
	way := new(link)
	client := m.client(t, way)
	l := newLock(t, client)
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
	return l, func() { stand(t, client, way, n, 12) }
}

func TestAcquire_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	for _, n := range []int{30, 12} { // some of them, or all
		bubble(t, func(t *testing.T, m *mini) {
			l, die := standing(t, m, n)
			die()
			start := time.Now()
			lease := mustAcquire(t, l, "42", time.Hour)
			require.Less(t, time.Since(start), 1100*time.Millisecond)
			start = time.Now()
			require.NoError(t, l.Release(t.Context(), lease))
			require.Zero(t, time.Since(start), "they were found out together")
		})
	}
}

func TestWaitAcquire_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		die()
		got := <-waitFor(t.Context(), l, "42", time.Hour)
		require.NoError(t, got.err)
		require.Less(t, got.after, 1100*time.Millisecond)
	})
}

func TestRelease_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		lease := mustAcquire(t, l, "42", time.Hour)
		die()
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Less(t, time.Since(start), 1100*time.Millisecond)
	})
}

func TestKeepAlive_outlivesConnectionsThatDiedSilently(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		lease := mustAcquire(t, l, "42", 10*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		die()
		pass(time.Minute)
		require.NoError(t, context.Cause(kept))
	})
}

// All answers take 0.9 s, so the connections are asked about, but not given up.
func TestCalls_aSlowServerKeepsItsConnections(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		client := m.client(t, way)
		l := newLock(t, client)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		stand(t, client, way, 80, 0)
		before := way.dials()
		way.setLag(900 * time.Millisecond)
		for range 20 {
			require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Hour)))
		}
		way.setLag(0)
		pass(10 * time.Second)
		require.LessOrEqual(t, way.dials()-before, 2)
		require.GreaterOrEqual(t, client.PoolStats().IdleConns, uint32(80))
	})
}

// The reply is lost without an error, and the caller leaves. What the attempt took is given
// back when the attempt is given up, not when go-redis gives up the connection.
func TestCalls_whatAnAttemptTookWhoseConnectionDiedIsGivenBackWhenItIsGivenUp(t *testing.T) {
	for name, call := range map[string]func(context.Context, *redfour.Lock) error{
		"acquire": func(ctx context.Context, l *redfour.Lock) error {
			_, err := l.Acquire(ctx, "42", time.Hour)
			return err
		},
		"wait": func(ctx context.Context, l *redfour.Lock) error {
			_, err := l.WaitAcquire(ctx, "42", time.Hour)
			return err
		},
	} {
		for _, left := range []time.Duration{300 * time.Millisecond, 1010 * time.Millisecond} { // in an attempt, or after it
			t.Run(fmt.Sprint(name, left), func(t *testing.T) {
				bubble(t, func(t *testing.T, m *mini) {
					way := new(link)
					l := m.lock(t, way)
					require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
					before, err := m.Get("lockindex")
					require.NoError(t, err)
					way.mute(func(*linkConn) bool { return true })
					if left > time.Second { // The next attempt does not leave this process.
						way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
							if isAcquire(cmd) && m.Exists("lock:42") {
								return redis.ErrPoolTimeout
							}
							return nil
						})
					}
					ctx, cancel := context.WithTimeout(t.Context(), left)
					defer cancel()
					require.ErrorIs(t, call(ctx, l), context.DeadlineExceeded)
					pass(1300*time.Millisecond - left)
					after, err := m.Get("lockindex")
					require.NoError(t, err)
					require.NotEqual(t, before, after, "an attempt took the lock")
					require.False(t, m.Exists("lock:42"))
				})
			})
		}
	}
}

// The attempt was given up and its waiter has left when it comes through. Others wait then, in
// the same line.
func TestWaitAcquire_whatComesThroughForAWaiterThatLeftGoesBack(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l, other := m.lock(t, way), m.lock(t)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		deliver := way.keepBack()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, (<-waitFor(ctx, l, "42", time.Hour)).err, context.DeadlineExceeded)
		pass(time.Second)
		holder := <-waitFor(t.Context(), l, "42", time.Hour)
		require.NoError(t, holder.err)
		require.NoError(t, l.Release(t.Context(), holder.lease))
		deliver()
		got := waitFor(t.Context(), other, "42", time.Hour)
		pass(time.Millisecond)
		require.Len(t, got, 1, "what came through is given back at once")
		require.NoError(t, other.Release(t.Context(), (<-got).lease))
		pass(10 * time.Second)
		require.False(t, m.Exists("lock:42"))
		require.Empty(t, m.queued(t))
	})
}

// It came through when the holder's lease had ended, and took the line out of the queue, in
// which another process waits as well.
func TestWaitAcquire_whatComesThroughForAWaiterThatLeftKeepsTheNextInTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l, holder, third := m.lock(t, way), m.lock(t), m.lock(t)
		mustAcquire(t, holder, "42", time.Hour)
		mustAcquire(t, holder, "43", time.Hour)
		waitFor(t.Context(), l, "43", time.Hour) // keeps the subscription
		pass(100 * time.Millisecond)
		deliver := way.keepBack()
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, (<-waitFor(ctx, l, "42", time.Hour)).err, context.DeadlineExceeded)
		pass(time.Second)
		got := waitFor(t.Context(), l, "42", time.Hour)
		pass(100 * time.Millisecond)
		next := waitFor(t.Context(), third, "42", time.Hour)
		pass(100 * time.Millisecond)
		require.Len(t, m.queued(t), 2)
		m.Del("lock:42")
		deliver()
		pass(10 * time.Millisecond)
		require.Empty(t, got)
		require.Len(t, next, 1, "it was behind in the queue, and is first now")
		require.Len(t, m.queued(t), 1)
		require.NoError(t, third.Release(t.Context(), (<-next).lease))
		require.NoError(t, (<-got).err)
	})
}
