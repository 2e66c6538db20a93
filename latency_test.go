package redfour_test

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// slow makes the reply to every script take this long.
func (l *link) slow(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.latency = d
}

// slowly runs f in bubbles with a Lock whose scripts take longer than one attempt is waited for at first. The server may
// know the scripts or not: if not, the first call of each costs two more round trips.
func slowly(t *testing.T, f func(t *testing.T, l *redfour.Lock, latency time.Duration)) {
	t.Helper()
	for _, latency := range []time.Duration{1100 * time.Millisecond, 1500 * time.Millisecond, 1900 * time.Millisecond} {
		for _, known := range []bool{true, false} {
			t.Run(fmt.Sprint(latency, known), func(t *testing.T) {
				bubble(t, func(t *testing.T, m *mini) {
					way := new(link)
					l := m.lock(t, way)
					if known {
						lease := mustAcquire(t, l, "scripts are known", time.Hour)
						require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
						require.NoError(t, l.Release(t.Context(), lease))
					}
					way.slow(latency)
					f(t, l, latency)
				})
			})
		}
	}
}

func TestAcquire_worksWithALatencyAboveASecond(t *testing.T) {
	slowly(t, func(t *testing.T, l *redfour.Lock, _ time.Duration) {
		start := time.Now()
		lease, err := l.Acquire(t.Context(), "42", 10*time.Second)
		require.NoError(t, err)
		require.Less(t, time.Since(start), 5*time.Second)
		_, err = l.Acquire(t.Context(), "42", 10*time.Second)
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestAcquire_usesTheFirstReplyThatComes(t *testing.T) {
	for _, latency := range []time.Duration{1500 * time.Millisecond, 4500 * time.Millisecond} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			l := m.lock(t, way)
			mustAcquire(t, l, "scripts are known", time.Hour)
			way.slow(latency)
			start := time.Now()
			lease, err := l.Acquire(t.Context(), "42", time.Minute)
			require.NoError(t, err)
			require.Equal(t, latency, time.Since(start))
			require.Equal(t, time.Minute-latency-time.Minute/1000, lease.Remaining())
			start = time.Now()
			_, err = l.Acquire(t.Context(), "42", time.Minute)
			require.ErrorIs(t, err, redfour.ErrLocked)
			require.Equal(t, latency, time.Since(start))
		})
	}
}

func TestWaitAcquire_worksWithALatencyAboveASecond(t *testing.T) {
	slowly(t, func(t *testing.T, l *redfour.Lock, latency time.Duration) {
		first := <-waitFor(t.Context(), l, "42", 10*time.Second)
		require.NoError(t, first.err)
		require.Less(t, first.after, 5*time.Second)
		second := waitFor(t.Context(), l, "42", 10*time.Second)
		synctest.Wait()
		require.NoError(t, l.Release(t.Context(), first.lease))
		got := <-second
		require.NoError(t, got.err)
		require.LessOrEqual(t, got.after, 5*time.Second)
		require.NoError(t, l.Release(t.Context(), got.lease))
		// Of the attempts that were sent meanwhile, none leaves a lock behind.
		pass(5 * time.Second)
		third := <-waitFor(t.Context(), l, "42", 10*time.Second)
		require.NoError(t, third.err)
		require.LessOrEqual(t, third.after, latency)
	})
}

// The reply comes when the waiter has left, or too late for the ttl.
func TestWaitAcquire_aLateLeaseForNobodyIsGivenBack(t *testing.T) {
	for _, ttl := range []time.Duration{time.Second, time.Hour} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			l := m.lock(t, way)
			mustAcquire(t, l, "scripts are known", time.Hour)
			way.slow(1500 * time.Millisecond)
			ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
			defer cancel()
			got := <-waitFor(ctx, l, "42", ttl)
			require.ErrorIs(t, got.err, context.DeadlineExceeded)
			way.slow(0)
			pass(5 * time.Second)
			require.False(t, m.Exists("lock:42"))
			require.Empty(t, m.queued(t))
		})
	}
}

func TestWaitAcquire_aLateLeaseGoesToWhoeverIsFirst(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, l, "scripts are known", time.Hour)
		way.slow(1500 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 1200*time.Millisecond)
		defer cancel()
		first := waitFor(ctx, l, "42", time.Hour)
		synctest.Wait()
		second := waitFor(t.Context(), l, "42", time.Hour)
		require.ErrorIs(t, (<-first).err, context.DeadlineExceeded)
		got := <-second
		require.NoError(t, got.err)
		require.Equal(t, 1500*time.Millisecond, got.after)
	})
}

func TestRenew_worksWithALatencyAboveASecond(t *testing.T) {
	slowly(t, func(t *testing.T, l *redfour.Lock, latency time.Duration) {
		lease := mustAcquire(t, l, "42", 10*time.Second)
		for range 3 {
			require.NoError(t, l.Renew(t.Context(), lease, 10*time.Second))
			require.LessOrEqual(t, 10*time.Second-2*latency, lease.Remaining())
		}
	})
}

// A lease that lasts hardly longer than a renewal takes is renewed by a reply that comes after its attempt.
func TestRenew_usesALateReply(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		require.NoError(t, l.Renew(t.Context(), lease, 2*time.Second))
		way.slow(1500 * time.Millisecond)
		start := time.Now()
		require.NoError(t, l.Renew(t.Context(), lease, 10*time.Second))
		require.Equal(t, 1500*time.Millisecond, time.Since(start))
		require.Equal(t, 8490*time.Millisecond, lease.Remaining())
	})
}

func TestRelease_worksWithALatencyAboveASecond(t *testing.T) {
	slowly(t, func(t *testing.T, l *redfour.Lock, _ time.Duration) {
		for range 3 {
			lease := mustAcquire(t, l, "42", 10*time.Second)
			start := time.Now()
			require.NoError(t, l.Release(t.Context(), lease))
			require.LessOrEqual(t, time.Since(start), 5*time.Second)
		}
	})
}

func TestRelease_usesTheFirstReplyThatComes(t *testing.T) {
	for _, latency := range []time.Duration{1500 * time.Millisecond, 4500 * time.Millisecond} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			l := m.lock(t, way)
			require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
			lease := mustAcquire(t, l, "42", time.Hour)
			next := inLine(t.Context(), t, m, l, time.Hour)
			way.slow(latency)
			start := time.Now()
			require.NoError(t, l.Release(t.Context(), lease))
			require.Equal(t, latency, time.Since(start))
			require.NoError(t, (<-next).err)
		})
	}
}

func TestKeepAlive_worksWithALatencyAboveASecond(t *testing.T) {
	for _, ttl := range []time.Duration{4 * time.Second, 10 * time.Second} {
		slowly(t, func(t *testing.T, l *redfour.Lock, _ time.Duration) {
			lease := mustAcquire(t, l, "42", time.Minute)
			require.NoError(t, l.Renew(t.Context(), lease, ttl))
			kept, stop := l.KeepAlive(t.Context(), lease)
			defer stop()
			pass(time.Minute)
			require.NoError(t, context.Cause(kept))
		})
	}
}

// A server that stalls gets fewer and fewer copies of what it has not answered.
func TestAcquire_sendsAgainMoreRarelyToAServerThatStalls(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, l, "scripts are known", time.Hour)
		way.slow(time.Minute)
		before := way.sent()
		_, err := l.Acquire(t.Context(), "42", time.Hour)
		require.ErrorContains(t, err, "outcome unknown")
		require.Equal(t, 3, way.sent()-before) // at 0 s, 1 s and 3 s
		way.slow(0)
		pass(2 * time.Minute)
		mustAcquire(t, l, "43", time.Hour)

		// One that answered is asked again within a second.
		way.beforeScript(once(isAcquire, func() error { pass(time.Minute); return nil }))
		start := time.Now()
		mustAcquire(t, l, "44", time.Hour)
		require.Less(t, time.Since(start), 1100*time.Millisecond)
		pass(time.Minute)
	})
}
