package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestNew_refusesByName(t *testing.T) {
	cluster := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}})
	ring := redis.NewRing(&redis.RingOptions{Addrs: map[string]string{"a": "127.0.0.1:1"}})
	sentinel := []string{"127.0.0.1:1"}
	failover := redis.NewFailoverClusterClient(&redis.FailoverOptions{MasterName: "m", SentinelAddrs: sentinel})
	universal := redis.NewUniversalClient(&redis.UniversalOptions{MasterName: "m", Addrs: sentinel, RouteRandomly: true})
	t.Cleanup(func() { _ = errors.Join(cluster.Close(), ring.Close(), failover.Close(), universal.Close()) })
	type wrapped struct{ redis.UniversalClient }
	for _, c := range []struct {
		client redis.UniversalClient
		says   string
	}{
		{nil, "nil client"},
		{(*redis.Client)(nil), "nil *redis.Client"},
		{(*redis.ClusterClient)(nil), "nil *redis.ClusterClient"},
		{failover, "a *redis.ClusterClient with ClusterSlots is not supported"},
		{universal, "a *redis.ClusterClient with ClusterSlots is not supported"},
		{ring, "*redis.Ring is not supported: it moves"},
		{(*redis.Ring)(nil), "*redis.Ring is not supported"},
		{wrapped{cluster}, "redfour_test.wrapped is not supported: want a *redis.Client or a *redis.ClusterClient"},
	} {
		l, err := redfour.New(c.client)
		require.Nil(t, l)
		require.ErrorContains(t, err, "redfour: new: "+c.says)
	}
}

func TestNew_validatesOptions(t *testing.T) {
	client := redis.NewClient(&redis.Options{})
	t.Cleanup(func() { _ = client.Close() })
	for ns, says := range map[string]string{
		"":                       "empty namespace",
		"a\nb":                   `namespace "a\nb" contains a control character`,
		"a\x00":                  `namespace "a\x00" contains a control character`,
		"\xff":                   `namespace "\xff" is not valid UTF-8`,
		strings.Repeat("n", 513): "namespace of 513 bytes: at most 512 are allowed",
	} {
		_, err := redfour.New(client, redfour.WithNamespace(ns))
		require.EqualError(t, err, "redfour: new: "+says)
	}
	_, err := redfour.New(client, nil)
	require.EqualError(t, err, "redfour: new: nil option")
	l, err := redfour.New(client, redfour.WithNamespace(strings.Repeat("ü", 256)))
	require.NoError(t, err)
	require.NoError(t, l.Close())
}

func TestOpen_errorsKeepTheURLSecret(t *testing.T) {
	for url, says := range map[string]string{
		"redis://me:hunter2@host:port/": "redfour: open: malformed URL",
		"redis://me:hunter2%zz@host/":   "redfour: open: malformed URL",
		"redis://:1/hunter2@host":       "redfour: open: malformed URL",
		"redis://me:1?hunter2=@host":    "redfour: open: malformed URL",
		"http://me:hunter2@host/":       "redfour: open: redis: invalid URL scheme: http",
		"redis://me:hunter2@host/x":     `redfour: open: redis: invalid database number: "x"`,
		"":                              "redfour: open: redis: invalid URL scheme: ",
	} {
		_, err := redfour.Open(url)
		require.EqualError(t, err, says)
	}
	_, err := redfour.Open("redis://me:hunter2@host/", redfour.WithNamespace(""))
	require.EqualError(t, err, "redfour: new: empty namespace")
}

func TestAcquire_unreachableThenBack(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.setDown(true)
		time.AfterFunc(3*time.Second, func() { way.setDown(false) })
		start := time.Now()
		lease := mustAcquire(t, l, "42", time.Minute)
		require.GreaterOrEqual(t, time.Since(start), 3*time.Second)
		require.Greater(t, lease.Remaining(), 59*time.Second, "counted from the attempt that got it")
	})
}

func TestAcquire_unreachableForFiveSeconds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.setDown(true)
		start := time.Now()
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.LessOrEqual(t, time.Since(start), 5*time.Second)
		require.Greater(t, time.Since(start), 4*time.Second)
		require.ErrorIs(t, err, io.ErrClosedPipe)
		require.NotErrorIs(t, err, redfour.ErrLocked)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		require.NotErrorIs(t, err, context.DeadlineExceeded)
	})
}

func TestAcquire_ctxEndsWhileUnreachable(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.setDown(true)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := l.Acquire(ctx, "42", time.Minute)
		require.Equal(t, time.Second, time.Since(start))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.NotErrorIs(t, err, redfour.ErrLocked)
	})
}

func TestAcquire_repeatsAfterALostReply(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.afterScript(once(isAcquire, lostReply))
		lease := mustAcquire(t, l, "42", time.Minute)
		require.Equal(t, 2, way.sent()-1, "the server did not know the script at first")
		require.LessOrEqual(t, lease.Remaining(), m.TTL("lock:42"))
		require.Greater(t, lease.Remaining(), time.Minute-time.Second)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

// A server that does not answer, seen through a client that ignores ctx.
func TestAcquire_cancelledReturnsAtOnceAndLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		hang := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { <-hang; return nil }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		_, err := l.Acquire(ctx, "42", time.Minute)
		require.Equal(t, time.Second, time.Since(start))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "outcome unknown")
		close(hang)
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
		require.True(t, m.Exists("lockindex"), "the attempt did take the lock")
	})
}

func TestAcquire_abandonedAfterALostReplyLeavesNothing(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		ctx, cancel := context.WithCancel(t.Context())
		way.afterScript(once(isAcquire, func() error { cancel(); return io.EOF }))
		_, err := l.Acquire(ctx, "42", time.Minute)
		require.ErrorIs(t, err, context.Canceled)
		synctest.Wait()
		require.True(t, m.Exists("lockindex"))
		require.False(t, m.Exists("lock:42"))
	})
}

// The first attempt took the lock, and no other was answered.
func TestAcquire_givesBackWhatAnEarlierAttemptTook(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.afterScript(once(isAcquire, func() error {
			way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
				if isAcquire(cmd) {
					return redis.ErrPoolTimeout
				}
				return nil
			})
			return io.EOF
		}))
		_, err := l.Acquire(t.Context(), "42", time.Hour)
		require.ErrorIs(t, err, redis.ErrPoolTimeout)
		synctest.Wait()
		require.True(t, m.Exists("lockindex"))
		require.False(t, m.Exists("lock:42"))
	})
}

// An attempt that was given up may come through when all is over.
func TestAcquire_givesBackWhatComesThroughTooLate(t *testing.T) {
	for name, held := range map[string]bool{"after the release": false, "after another's": true} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				l, other := m.lock(t, way), m.lock(t)
				require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
				deliver := way.keepBack()
				holder := l
				if held {
					holder = other
				}
				lease := mustAcquire(t, holder, "42", time.Hour)
				if held {
					_, err := l.Acquire(t.Context(), "42", time.Hour)
					require.ErrorIs(t, err, redfour.ErrLocked)
				}
				require.NoError(t, holder.Release(t.Context(), lease))
				deliver()
				synctest.Wait()
				counter, err := m.Get("lockindex")
				require.NoError(t, err)
				require.NotEqual(t, fmt.Sprint(lease.Index), counter, "it came through")
				require.False(t, m.Exists("lock:42"))
			})
		})
	}
}

// A broken connection may be noticed before what it carried arrives, and its reply then comes to nobody. The lock is taken for
// no longer than it takes to look.
func TestAcquire_givesBackWhatArrivesAfterItsConnectionBroke(t *testing.T) {
	for name, row := range map[string]struct {
		call  func(t *testing.T, l *redfour.Lock)
		after time.Duration
		free  time.Duration
	}{
		"after the release":       {acquireAndEnd, 0, time.Second},
		"a moment later":          {acquireAndEnd, 900 * time.Millisecond, 100 * time.Millisecond},
		"after it was given up":   {acquireInVain, 0, time.Second},
		"after nobody waited":     {waitInVain, 0, time.Second},
		"after a waiter released": {waitAndEnd, 0, time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				l, other := m.lock(t, way), m.lock(t)
				require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
				lease := mustAcquire(t, other, "42", 500*time.Millisecond)
				var late []any
				way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
					if late == nil && isAcquire(cmd) {
						late = written(cmd)
						return io.EOF
					}
					return nil
				})
				row.call(t, l)
				_ = other.Release(t.Context(), lease)
				synctest.Wait()
				require.False(t, m.Exists("lock:42"))

				pass(row.after)
				require.NoError(t, m.client(t).Do(t.Context(), late...).Err())
				require.True(t, m.Exists("lock:42"), "it came through")
				pass(row.free)
				synctest.Wait()
				require.False(t, m.Exists("lock:42"))
			})
		})
	}
}

func acquireAndEnd(t *testing.T, l *redfour.Lock) {
	t.Helper()
	pass(time.Second) // until the other's lease has ended
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Hour)))
}

func acquireInVain(t *testing.T, l *redfour.Lock) {
	t.Helper()
	_, err := l.Acquire(t.Context(), "42", time.Hour)
	require.ErrorIs(t, err, redfour.ErrLocked)
}

func waitInVain(t *testing.T, l *redfour.Lock) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := l.WaitAcquire(ctx, "42", time.Hour)
	require.ErrorIs(t, err, redfour.ErrLocked)
}

func waitAndEnd(t *testing.T, l *redfour.Lock) {
	t.Helper()
	lease, err := l.WaitAcquire(t.Context(), "42", time.Hour)
	require.NoError(t, err)
	require.NoError(t, l.Release(t.Context(), lease))
}

// The lease that the next attempt got has the same token, and holds.
func TestAcquire_doesNotGiveBackWhatIsHeld(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		looks := 0
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if isInspect(cmd) && cmd.Name() == "eval" { // after NOSCRIPT
				looks++
			}
			return nil
		})
		way.afterScript(once(isAcquire, lostReply))
		lease := mustAcquire(t, l, "42", time.Minute)
		pass(10 * time.Second)
		require.Equal(t, 1, looks)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestAcquire_lateGrantIsReleased(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, l, "the server knows the script", time.Minute)
		way.beforeScript(once(isAcquire, func() error { pass(500 * time.Millisecond); return nil }))
		way.afterScript(once(isAcquire, func() error { require.Equal(t, 500*time.Millisecond, m.TTL("lock:42")); return nil }))
		_, err := l.Acquire(t.Context(), "42", 500*time.Millisecond)
		require.ErrorIs(t, err, redfour.ErrExpired)
		require.ErrorContains(t, err, "granted too late for a ttl of 500ms")
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
	})
}

func TestAcquire_doesNotDependOnOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		hang := make(chan struct{})
		way.beforeScript(once(isAcquire, func() error { <-hang; return io.EOF }))
		start := time.Now()
		lease := mustAcquire(t, l, "42", time.Minute)
		require.Less(t, time.Since(start), 1100*time.Millisecond)
		close(hang)
		synctest.Wait()
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

// The first attempt may have done it, whatever the last one says.
func TestErrors_sayThatTheOutcomeIsUnknown(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		trouble := func() error {
			way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
			return io.EOF
		}
		_, acquireErr := func() (*redfour.Lease, error) {
			way.afterScript(once(isAcquire, trouble))
			return l.Acquire(t.Context(), "42", time.Minute)
		}()
		way.beforeScript(nil)
		pass(time.Minute)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.afterScript(once(isRenew, trouble))
		renewErr := l.Renew(t.Context(), lease, 10*time.Second)
		way.beforeScript(nil)
		lease = mustAcquire(t, l, "43", time.Minute)
		way.afterScript(once(isRelease, trouble))
		releaseErr := l.Release(t.Context(), lease)
		for _, err := range []error{acquireErr, renewErr, releaseErr} {
			require.ErrorIs(t, err, redis.ErrPoolTimeout)
			require.ErrorContains(t, err, "outcome unknown: ")
			require.NotErrorIs(t, err, redfour.ErrNotHeld)
			require.NotErrorIs(t, err, redfour.ErrLocked)
		}
	})
}

// Services of one fleet use namespaces of their own, on the same ids.
func TestWithNamespace_keepsLocksApart(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		orders := newLock(t, client, redfour.WithNamespace("orders"))
		mails := newLock(t, client, redfour.WithNamespace("mails"))
		lease := mustAcquire(t, orders, "42", time.Minute)
		other := mustAcquire(t, mails, "42", time.Minute)
		first, second := waitFor(t.Context(), orders, "42", time.Minute), waitFor(t.Context(), mails, "42", time.Minute)
		pass(time.Second)
		require.NoError(t, orders.Release(t.Context(), lease))
		takeLease(t, first)
		synctest.Wait()
		require.Empty(t, second)
		require.ErrorIs(t, orders.Release(t.Context(), other), redfour.ErrNotHeld)
		require.NoError(t, mails.Release(t.Context(), other))
		takeLease(t, second)
	})
}

func TestAcquire_deadlineIsCountedFromBeforeTheRequest(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, l, "the server knows the script", time.Minute)
		start := time.Now()
		way.beforeScript(once(isAcquire, func() error { pass(500 * time.Millisecond); return nil }))
		lease := mustAcquire(t, l, "42", time.Minute)
		require.Equal(t, start.Add(counted(time.Minute)), lease.Deadline())
		require.Equal(t, counted(time.Minute)-500*time.Millisecond, lease.Remaining())
	})
}

func TestWaitAcquire_ctxEndsWhileUnreachable(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		gone := errors.New("cable cut")
		way.beforeScript(func(context.Context, redis.Cmder) error { return gone })
		cause := errors.New("lunch")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, cause)
		defer cancel()
		_, err := l.WaitAcquire(ctx, "42", time.Minute)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, cause)
		require.ErrorIs(t, err, gone)
		require.NotErrorIs(t, err, redfour.ErrLocked)
		require.Greater(t, way.sent(), 30, "every two seconds or sooner")
		require.Less(t, way.sent(), 80)
	})
}

func TestWaitAcquire_survivesWhatPasses(t *testing.T) {
	for _, trouble := range []string{
		"LOADING Redis is loading the dataset in memory", "READONLY You can't write against a read only replica.",
		"CLUSTERDOWN The cluster is down", "OOM command not allowed when used memory > 'maxmemory'.",
		"MISCONF Redis is configured to save RDB snapshots", "NOREPLICAS Not enough good replicas to write.",
		"BUSY Redis is busy running a script.", "MASTERDOWN Link with MASTER is down", "TRYAGAIN Multiple keys request during rehashing of slot",
		"ERR max number of clients reached", "ERR something new",
	} {
		bubble(t, func(t *testing.T, m *mini) {
			l := m.lock(t)
			m.SetError(trouble)
			got := waitFor(t.Context(), l, "42", time.Minute)
			pass(time.Minute)
			m.SetError("")
			r := <-got
			require.NoError(t, r.err, trouble)
			require.Less(t, r.after, time.Minute+2*time.Second)
		})
	}
}

func TestWaitAcquire_returnsAtOnceForWhatStays(t *testing.T) {
	for _, trouble := range []string{
		"NOPERM this user has no permissions to run the 'evalsha' command", "WRONGTYPE Operation against a key",
		"CROSSSLOT Keys in request don't hash to the same slot",
		"ERR The user executing the script can't access at least one of the keys",
		"NOPERM ACL failure in script: user has no permissions",
	} {
		bubble(t, func(t *testing.T, m *mini) {
			l := m.lock(t)
			m.SetError(trouble)
			start := time.Now()
			_, err := l.WaitAcquire(t.Context(), "42", time.Minute)
			require.ErrorContains(t, err, trouble)
			require.ErrorContains(t, err, `redfour: wait for "42": `)
			require.Less(t, time.Since(start), time.Second)
			start = time.Now()
			_, err = l.Acquire(t.Context(), "42", time.Minute)
			require.ErrorContains(t, err, trouble)
			require.Less(t, time.Since(start), time.Second)
		})
	}
}

func TestWaitAcquire_closedClient(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client)
		require.NoError(t, client.Close())
		_, err := l.WaitAcquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redis.ErrClosed)
	})
}

func TestRelease_lostReplyIsASuccess(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.afterScript(once(isRelease, lostReply))
		require.NoError(t, l.Release(t.Context(), lease))
		require.False(t, m.Exists("lock:42"))

		lease = mustAcquire(t, l, "42", time.Minute)
		way.afterScript(once(isRelease, func() error {
			mustAcquire(t, l, "42", time.Hour)
			return io.EOF
		}))
		require.NoError(t, l.Release(t.Context(), lease), "another may have the lock by then")
		require.Equal(t, time.Hour, m.TTL("lock:42").Round(time.Minute))
	})
}

// If the first attempt cannot have done it, or was sent too late to know, the
// lease was not there to be released.
func TestRelease_isNoSuccessWithoutProof(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Second)
		pass(2 * time.Second)
		way.afterScript(once(isRelease, lostReply))
		require.Error(t, l.Release(t.Context(), lease))
		require.ErrorIs(t, l.Release(t.Context(), lease), redfour.ErrExpired)

		lease = mustAcquire(t, l, "42", time.Minute)
		m.Del("lock:42")
		way.beforeScript(once(isRelease, func() error { return redis.ErrPoolTimeout }))
		require.ErrorIs(t, l.Release(t.Context(), lease), redfour.ErrExpired)
	})
}

func TestRelease_isRepeatedByTheCallerAfterAnUnknownOutcome(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.afterScript(func(context.Context, redis.Cmder) error { return io.EOF })
		start := time.Now()
		err := l.Release(t.Context(), lease)
		require.ErrorIs(t, err, io.EOF)
		require.ErrorContains(t, err, `redfour: release "42": outcome unknown`)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		require.LessOrEqual(t, time.Since(start), 5*time.Second)
		require.Greater(t, time.Since(start), 4*time.Second)
		way.afterScript(nil)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestRelease_goesOnWithoutItsCaller(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return nil })
		cause := errors.New("lunch")
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, cause)
		defer cancel()
		start := time.Now()
		err := l.Release(ctx, lease)
		require.Equal(t, 1100*time.Millisecond, time.Since(start))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, cause)
		require.ErrorContains(t, err, "outcome unknown")
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		require.True(t, m.Exists("lock:42"))
		close(hang)
		pass(time.Second) // for another attempt: the time of the first for finding a connection is over
		require.False(t, m.Exists("lock:42"))
	})
}

type contextKey struct{}

func TestRelease_keepsTheValuesOfCtx(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		var seen any
		way.beforeScript(func(ctx context.Context, _ redis.Cmder) error {
			seen = ctx.Value(contextKey{})
			return nil
		})
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), contextKey{}, "trace"))
		cancel()
		require.NoError(t, l.Release(ctx, lease))
		require.Equal(t, "trace", seen)
	})
}

// One connection has died silently; the others work.
func TestRelease_doesNotDependOnOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		hang := make(chan struct{})
		way.beforeScript(once(isRelease, func() error { <-hang; return io.EOF }))
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Less(t, time.Since(start), 1100*time.Millisecond)
		require.False(t, m.Exists("lock:42"))
		close(hang)
	})
}

func TestRelease_afterTheTTLAsksOnce(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Second)
		pass(time.Second)
		sent := way.sent()
		require.ErrorIs(t, l.Release(t.Context(), lease), redfour.ErrExpired)
		require.Equal(t, 2, way.sent()-sent, "EVALSHA and EVAL")
	})
}

// An owner whose lock somebody made permanent can still end it.
func TestLease_withoutExpiryCanBeEndedByItsOwner(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client)
		lease := mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, client.Persist(t.Context(), "lock:42").Err())
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.Equal(t, time.Minute, m.TTL("lock:42"))
		require.NoError(t, client.Persist(t.Context(), "lock:42").Err())
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestRenew_lostReply(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.afterScript(once(isRenew, lostReply))
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		require.Greater(t, lease.Remaining(), 59*time.Minute)
		require.LessOrEqual(t, lease.Remaining(), m.TTL("lock:42"))
	})
}

func TestRenew_deadlineIsCountedFromBeforeTheRequest(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		start := time.Now()
		way.afterScript(once(isRenew, func() error { pass(500 * time.Millisecond); return nil }))
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		require.Equal(t, start.Add(counted(time.Hour)), lease.Deadline())
	})
}

// A ctx may have ended because another lock was lost, or Redis had failed somebody
// else. That says nothing about this renewal.
func TestRenew_causesOfTheCallersCtxAreNotTakenForAnswers(t *testing.T) {
	for name, cause := range map[string]error{
		"none":        nil,
		"lease lost":  redfour.ErrExpired,
		"dial failed": &net.OpError{Op: "dial", Err: io.EOF},
		"closed":      redis.ErrClosed,
		"refused":     redis.Nil,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				l := m.lock(t, way)
				lease := mustAcquire(t, l, "42", 10*time.Second)
				require.NoError(t, l.Renew(t.Context(), lease, 10*time.Second))
				deliver := way.keepBack()
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
				require.ErrorContains(t, l.Renew(ctx, lease, time.Second), "outcome unknown")

				require.NoError(t, l.Renew(t.Context(), lease, 10*time.Second))
				deliver()
				synctest.Wait()
				require.Equal(t, time.Second, m.TTL("lock:42"), "it came after all")
				require.LessOrEqual(t, lease.Remaining(), time.Second)
			})
		})
	}
}

func TestRenew_refusedLeavesTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := l.Renew(ctx, lease, 2*time.Second)
		require.ErrorIs(t, err, redis.ErrPoolTimeout)
		require.NotContains(t, err.Error(), "outcome unknown")
		require.Equal(t, counted(time.Minute)-time.Second, lease.Remaining())
	})
}

func TestRenew_triesUntilTheDeadline(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.beforeScript(func(context.Context, redis.Cmder) error { return io.EOF })
		start := time.Now()
		err := l.Renew(t.Context(), lease, time.Hour)
		require.ErrorIs(t, err, io.EOF)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		require.Less(t, time.Since(start), time.Minute)
		require.Greater(t, time.Since(start), 59*time.Second)
	})
}

func TestRenew_cancelledReturnsAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return nil })
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		err := l.Renew(ctx, lease, 10*time.Second)
		require.Equal(t, 300*time.Millisecond, time.Since(start))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "outcome unknown")
		require.LessOrEqual(t, lease.Remaining(), 10*time.Second, "it may come to be so")
		close(hang)
	})
}

// A renewal for a short ttl hangs on its way. One for a long ttl overtakes it, so
// that the short one comes last.
func TestRenew_deadlineAllowsForARenewalThatIsStillOnItsWay(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		hang := make(chan struct{})
		way.beforeScript(once(isRenew, func() error { <-hang; return nil }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		require.Error(t, l.Renew(ctx, lease, 10*time.Second))
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		close(hang)
		synctest.Wait()
		require.LessOrEqual(t, lease.Remaining(), m.TTL("lock:42"))
	})
}

func TestWithLock_releasesOnPanicAndGoexit(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		require.PanicsWithValue(t, "oh", func() {
			_ = l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error { panic("oh") })
		})
		require.False(t, m.Exists("lock:42"))
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
				runtime.Goexit()
				return nil
			})
		}()
		<-done
		require.False(t, m.Exists("lock:42"))
	})
}

func TestWithLock_keepsTheLeaseUntilFnReturns(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		err := l.WithLock(ctx, "42", time.Second, func(ctx context.Context, lease *redfour.Lease) error {
			<-ctx.Done()
			require.ErrorIs(t, ctx.Err(), context.DeadlineExceeded)
			pass(time.Minute)
			require.Greater(t, lease.Remaining(), 600*time.Millisecond)
			require.True(t, m.Exists("lock:42"))
			return nil
		})
		require.NoError(t, err)
		require.False(t, m.Exists("lock:42"))
	})
}

func TestWithLock_doesNotRunFnWithoutTheLock(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		mustAcquire(t, l, "42", time.Minute)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := l.WithLock(ctx, "42", time.Second, func(context.Context, *redfour.Lease) error { panic("fn ran") })
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

// The ctx ends before the answer is there; then the waiter is served as often as not.
func TestWithLock_doesNotRunFnWithACtxThatHasEnded(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		for range 50 {
			ctx, cancel := context.WithCancel(t.Context())
			way.afterScript(once(isAcquire, func() error { cancel(); return nil }))
			err := l.WithLock(ctx, "42", time.Minute, func(context.Context, *redfour.Lease) error { panic("fn ran") })
			require.ErrorIs(t, err, context.Canceled)
			synctest.Wait()
			require.False(t, m.Exists("lock:42"))
		}
	})
}

func TestWithLock_joinsAnUnknownRelease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mine := errors.New("mine")
		err := l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
			way.afterScript(func(context.Context, redis.Cmder) error { return io.EOF })
			return mine
		})
		require.ErrorIs(t, err, mine)
		require.ErrorIs(t, err, io.EOF)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
	})
}

func TestWithLock_reportsALossThatOnlyTheReleaseNoticed(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		err := l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
			m.FlushAll()
			return nil
		})
		require.ErrorIs(t, err, redfour.ErrExpired)
	})
}

func TestClose_fromInsideASection(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		err := l.WithLock(t.Context(), "42", time.Second, func(ctx context.Context, _ *redfour.Lease) error {
			start := time.Now()
			require.NoError(t, l.Close())
			require.Zero(t, time.Since(start))
			require.Equal(t, redfour.ErrClosed, context.Cause(ctx))
			return nil
		})
		require.NoError(t, err)
		require.False(t, m.Exists("lock:42"))
	})
}

func TestClose_endsCallsThatTryAgain(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "41", time.Minute)
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		errs := make(chan error, 2)
		go func() {
			_, err := l.Acquire(t.Context(), "42", time.Minute)
			errs <- err
		}()
		go func() { errs <- l.Renew(t.Context(), lease, time.Minute) }()
		pass(time.Second)
		start := time.Now()
		require.NoError(t, l.Close())
		for range 2 {
			err := <-errs
			require.ErrorIs(t, err, redfour.ErrClosed)
			require.ErrorIs(t, err, redis.ErrPoolTimeout)
		}
		require.Zero(t, time.Since(start))
	})
}

func TestClose_waitsForWhatIsOnItsWayButNotForEver(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return nil })
		waiting := waitFor(t.Context(), l, "42", time.Minute)
		synctest.Wait()
		start := time.Now()
		require.EqualError(t, l.Close(), "redfour: close: the client has not answered for 5s")
		require.Equal(t, 5*time.Second, time.Since(start))
		r := <-waiting
		require.ErrorIs(t, r.err, redfour.ErrClosed)
		require.Zero(t, r.after)
		close(hang)
		require.NoError(t, l.Close())
		require.False(t, m.Exists("lock:42"), "what the attempt brought was given back")
	})
}

// A proxy that forwards a script, loses the reply and answers with an error of its own proves nothing.
func TestCalls_anErrorOfAProxyLeavesTheOutcomeUnknown(t *testing.T) {
	for _, text := range []string{"upstream failure", "ERR Connection timed out", "ERR server closed connection"} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			l := m.lock(t, way)
			answer := func() error { return proxyError(text) }
			way.afterScript(once(isAcquire, answer))
			lease, err := l.Acquire(t.Context(), "42", time.Minute)
			require.NoError(t, err, "the next attempt recognises the token of the first")
			way.afterScript(once(isRenew, answer))
			require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
			way.afterScript(once(isRelease, answer))
			require.NoError(t, l.Release(t.Context(), lease), "the release before it was sent in time")
			require.False(t, m.Exists("lock:42"))

			err = l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
				way.afterScript(once(isRelease, answer))
				return nil
			})
			require.NoError(t, err, "no lease was lost")

			way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
				if isAcquire(cmd) {
					return answer()
				}
				return nil
			})
			_, err = l.Acquire(t.Context(), "42", time.Hour)
			require.ErrorContains(t, err, "outcome unknown: "+text)
			way.afterScript(nil)
			synctest.Wait()
			pass(10 * time.Second)
			require.False(t, m.Exists("lock:42"), "given back in the background")
		})
	}
}

// proxyError is an error that came over the wire.
type proxyError string

func (e proxyError) Error() string { return string(e) }
func (proxyError) RedisError()     {}

// Another lease has the lock by the time that the release runs, and ctx ends
// before the answer is there. The lease that was to be ended is gone.
func TestForceRelease_ofAnyLeaseSucceedsIfItIsGoneThoughItsContextEnds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, operator := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		way.beforeScript(once(isRelease, func() error {
			if err := a.Release(t.Context(), lease); err != nil {
				return err
			}
			_, err := a.Acquire(t.Context(), "42", time.Minute)
			cancel()
			return err
		}))
		require.NoError(t, operator.ForceRelease(ctx, "42", 0))
	})
}
