package redfour_test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestWaitAcquire_uncontendedIsOneRoundTripWithoutSubscription(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, l, "the server knows the script", time.Minute)
		sent := way.sent()
		lease, err := l.WaitAcquire(t.Context(), "42", time.Minute)
		require.NoError(t, err)
		require.True(t, lease.Immediate)
		require.Equal(t, 1, way.sent()-sent)
		require.Zero(t, way.subscriptions())
	})
}

func TestWaitAcquire_isWokenByTheMessage(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(10 * time.Second)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, 10*time.Second, r.after)
		require.False(t, r.lease.Immediate)
		require.Equal(t, time.Minute, r.lease.TTL)
	})
}

// The attempt looked before the release; its answer comes after the message.
func TestWaitAcquire_releaseBetweenLookAndWait(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		other := mustAcquire(t, a, "so that b has subscribed", time.Hour)
		waitFor(t.Context(), b, other.ID, time.Hour)
		synctest.Wait()

		lease := mustAcquire(t, a, "42", time.Hour)
		way.afterScript(once(isAcquire, func() error {
			require.NoError(t, a.Release(t.Context(), lease))
			synctest.Wait()
			return nil
		}))
		r := <-waitFor(t.Context(), b, "42", time.Minute)
		require.NoError(t, r.err)
		require.Zero(t, r.after)
	})
}

// The first waiter looks, then subscribes. The release falls in between.
func TestWaitAcquire_releaseBeforeTheSubscriptionStands(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		way.afterScript(once(isAcquire, func() error {
			way.setDown(true)
			return nil
		}))
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(time.Second)
		require.NoError(t, a.Release(t.Context(), lease))
		pass(time.Second)
		require.Empty(t, got)
		way.setDown(false)
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, r.after, 4*time.Second)
	})
}

func TestWaitAcquire_noticesWhatWasReleasedWhileTheSubscriptionWasDown(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(10 * time.Second)
		way.setDown(true)
		way.cut(isSubscriber)
		pass(5 * time.Second)
		require.NoError(t, a.Release(t.Context(), lease))
		pass(3 * time.Second)
		require.Empty(t, got)
		back := time.Now()
		way.setDown(false)
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, time.Since(back), 2*time.Second)
	})
}

func TestWaitAcquire_noticesAHalfOpenSubscription(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(time.Minute)
		way.mute(isSubscriber)
		died := time.Now()
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, time.Since(died), 3*time.Second)
	})
}

func TestWaitAcquire_withoutPubSubWakesAtTheHoldersEnd(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a := m.lock(t)
		way := new(link)
		b := m.lock(t, way)
		mustAcquire(t, a, "42", 5*time.Second)
		way.afterScript(once(isAcquire, func() error { way.setDown(true); return nil }))
		r := <-waitFor(t.Context(), b, "42", time.Minute)
		require.NoError(t, r.err)
		require.GreaterOrEqual(t, r.after, 5*time.Second)
		require.Less(t, r.after, 5*time.Second+20*time.Millisecond)
	})
}

func TestWaitAcquire_looksEveryThirtySeconds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		mustAcquire(t, a, "42", 24*time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(5 * time.Minute)
		require.LessOrEqual(t, way.sent(), 13)
		m.Del("lock:42")
		gone := time.Now()
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, time.Since(gone), 31*time.Second)
		require.Equal(t, 1, way.subscriptions(), "the pings kept it up")
	})
}

func TestWaitAcquire_servesInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Hour)
		var waiting []<-chan acquired
		for range 10 {
			waiting = append(waiting, waitFor(t.Context(), l, "42", time.Hour))
			synctest.Wait()
		}
		for i, next := range waiting {
			require.NoError(t, l.Release(t.Context(), lease))
			synctest.Wait()
			for _, later := range waiting[i+1:] {
				require.Empty(t, later)
			}
			r := <-next
			require.NoError(t, r.err)
			require.Greater(t, r.lease.Index, lease.Index)
			lease = r.lease
		}
	})
}

func TestRelease_handsOverInOneScript(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		lease := mustAcquire(t, l, "42", time.Hour)
		var sections sync.WaitGroup
		for range 100 {
			sections.Go(func() {
				err := l.WithLock(t.Context(), "42", time.Hour, func(context.Context, *redfour.Lease) error { return nil })
				require.NoError(t, err)
			})
		}
		pass(time.Second)
		sent := way.sent()
		require.NoError(t, l.Release(t.Context(), lease))
		sections.Wait()
		require.Equal(t, 101, way.sent()-sent)
	})
}

// Whoever is first leaves while an attempt that was made for him is on its way.
func TestWaitAcquire_aLeaverPassesOnWhatTheAttemptBrings(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		hang, entered := make(chan struct{}), make(chan struct{})
		way.afterScript(once(isAcquire, func() error { close(entered); <-hang; return nil }))
		ctx, cancel := context.WithCancel(t.Context())
		first := waitFor(ctx, l, "42", time.Minute)
		<-entered
		second := waitFor(t.Context(), l, "42", time.Hour)
		synctest.Wait()
		cancel()
		r := <-first
		require.ErrorIs(t, r.err, context.Canceled)
		require.NotErrorIs(t, r.err, redfour.ErrLocked, "nothing is known yet")
		close(hang)
		r = <-second
		require.NoError(t, r.err)
		require.Zero(t, r.after)
		require.False(t, r.lease.Immediate)
		require.Equal(t, time.Hour, r.lease.TTL, "the ttl that the second asked for")
		require.Equal(t, counted(time.Hour), r.lease.Remaining())
		require.Equal(t, time.Hour, m.TTL("lock:42"))
		require.NoError(t, l.Release(t.Context(), r.lease))
	})
}

func TestWaitAcquire_theLastLeaverGivesBackWhatTheAttemptBrings(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		hang := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { <-hang; return nil }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r := <-waitFor(ctx, l, "42", time.Minute)
		require.ErrorIs(t, r.err, context.DeadlineExceeded)
		require.Equal(t, time.Second, r.after, "from a server that does not answer")
		require.True(t, m.Exists("lock:42"))
		close(hang)
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
	})
}

// The reply is lost, and nobody is there to repeat the attempt.
func TestWaitAcquire_theLastLeaverGivesBackWhatALostReplyBrought(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { cancel(); <-left; return io.EOF }))
		r := <-waitFor(ctx, l, "42", time.Minute)
		require.ErrorIs(t, r.err, context.Canceled)
		close(left)
		synctest.Wait()
		require.True(t, m.Exists("lockindex"))
		require.False(t, m.Exists("lock:42"))
	})
}

// The same, but the line was pausing before the next attempt.
func TestWaitAcquire_theLastLeaverGivesBackWhatALostReplyBroughtBefore(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lost := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { close(lost); return io.EOF }))
		ctx, cancel := context.WithCancel(t.Context())
		got := waitFor(ctx, l, "42", time.Minute)
		<-lost
		synctest.Wait()
		cancel()
		require.ErrorIs(t, (<-got).err, io.EOF)
		synctest.Wait()
		require.True(t, m.Exists("lockindex"))
		require.False(t, m.Exists("lock:42"))
	})
}

// The same at Close, which waits for it.
func TestClose_givesBackWhatALostReplyBrought(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		client := m.client(t, way)
		l := newLock(t, client)
		lost := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { close(lost); return io.EOF }))
		got := waitFor(t.Context(), l, "42", time.Hour)
		<-lost
		synctest.Wait()
		require.True(t, m.Exists("lock:42"))
		require.NoError(t, l.Close())
		require.False(t, m.Exists("lock:42"))
		require.ErrorIs(t, (<-got).err, redfour.ErrClosed)
	})
}

// The second waiter's ttl is short, and so would be the time to clear up after both
// if it were taken for the ttl of what the first one's attempt brought.
func TestWaitAcquire_clearsUpForAsLongAsItTakes(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lost := make(chan struct{}, 10) // more attempts than are made
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if !isAcquire(cmd) {
				return nil
			}
			lost <- struct{}{}
			return io.EOF
		})
		firstCtx, firstLeaves := context.WithCancel(t.Context())
		first := waitFor(firstCtx, l, "42", time.Hour)
		<-lost
		synctest.Wait()
		secondCtx, secondLeaves := context.WithCancel(t.Context())
		second := waitFor(secondCtx, l, "42", 5*time.Millisecond)
		synctest.Wait()
		firstLeaves()
		<-first
		<-lost
		synctest.Wait()
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		secondLeaves()
		<-second
		pass(500 * time.Millisecond)
		way.beforeScript(nil)
		pass(time.Second)
		require.False(t, m.Exists("lock:42"))
	})
}

// An attempt hangs, another gets the lock, and the first comes through only after
// the release.
func TestWaitAcquire_givesBackWhatComesThroughTooLate(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		deliver := way.keepBack()
		r := <-waitFor(t.Context(), l, "42", time.Hour)
		require.NoError(t, r.err)
		require.Less(t, r.after, 1100*time.Millisecond, "over another connection")
		require.NoError(t, l.Release(t.Context(), r.lease))
		deliver()
		synctest.Wait()
		counter, err := m.Get("lockindex")
		require.NoError(t, err)
		require.NotEqual(t, fmt.Sprint(r.lease.Index), counter, "it came through")
		require.False(t, m.Exists("lock:42"))
	})
}

// Redis refuses pings when it cannot save (MISCONF). The connection lives.
func TestSubscription_survivesARefusedPing(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(time.Second)
		m.SetError("MISCONF Redis is configured to save RDB snapshots")
		pass(20 * time.Second)
		m.SetError("")
		require.Equal(t, 1, way.subscriptions())
		require.NoError(t, a.Release(t.Context(), lease))
		require.NoError(t, (<-got).err)
	})
}

func TestWaitAcquire_survivesAHookThatEndsItsGoroutine(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.beforeScript(once(isAcquire, func() error { runtime.Goexit(); return nil }))
		r := <-waitFor(t.Context(), l, "42", time.Minute)
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
	})
}

func TestWaitAcquire_aHolderOfMoreThanADurationIsWaitedFor(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		client := m.client(t, way)
		l := newLock(t, client)
		require.NoError(t, client.HSet(t.Context(), "lock:42", "index", 7).Err())
		require.NoError(t, client.Do(t.Context(), "PEXPIRE", "lock:42", "9223372036854").Err())
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
		defer cancel()
		_, err := l.WaitAcquire(ctx, "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		require.Less(t, way.sent(), 10)
	})
}

func TestWaitAcquire_repeatsAfterALostReply(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.afterScript(once(isAcquire, lostReply))
		r := <-waitFor(t.Context(), l, "42", time.Hour)
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
		require.Equal(t, time.Hour, r.lease.TTL)
		require.LessOrEqual(t, r.lease.Remaining(), m.TTL("lock:42"))
		require.NoError(t, l.Release(t.Context(), r.lease))
	})
}

// What the lost reply brought has the ttl of somebody who has left since.
func TestWaitAcquire_repeatsAfterALostReplyForAnotherTTL(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lost := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { close(lost); return io.EOF }))
		ctx, cancel := context.WithCancel(t.Context())
		first := waitFor(ctx, l, "42", time.Second)
		<-lost
		second := waitFor(t.Context(), l, "42", time.Hour)
		synctest.Wait()
		cancel()
		<-first
		r := <-second
		require.NoError(t, r.err)
		require.Equal(t, time.Hour, r.lease.TTL)
		require.Equal(t, time.Hour, m.TTL("lock:42"))
	})
}

func TestWaitAcquire_lateGrantIsReleasedAndTriedAgain(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.afterScript(once(isAcquire, func() error { pass(600 * time.Millisecond); return nil }))
		r := <-waitFor(t.Context(), l, "42", 500*time.Millisecond)
		require.NoError(t, r.err)
		require.Equal(t, counted(500*time.Millisecond), r.lease.Remaining())
	})
}

// A wake-up while an attempt fails must not be lost either.
func TestWaitAcquire_recoversAfterFailures(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(time.Second)
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		m.Del("lock:42")
		m.Publish("lock-release", "lock:42")
		pass(10 * time.Second)
		require.Empty(t, got)
		way.beforeScript(nil)
		back := time.Now()
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, time.Since(back), 2*time.Second)
	})
}

// Who waits for a lease that a FLUSHALL has deleted is told by its holder.
func TestWaitAcquire_isWokenByTheReleaseOfADeletedLease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		holder := m.lock(t)
		lease := mustAcquire(t, holder, "42", time.Hour)
		got := waitFor(t.Context(), m.lock(t), "42", time.Hour)
		pass(time.Second) // The new subscription makes everybody look.
		m.FlushAll()
		pass(4 * time.Second)
		require.ErrorIs(t, holder.Release(t.Context(), lease), redfour.ErrExpired)
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, r.after, 5*time.Second+3*time.Millisecond)
	})
}

func TestWaitAcquire_localReleaseNeedsNoMessage(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		way.setDown(true) // there will be no subscription
		got := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Second)
		require.NoError(t, l.Release(t.Context(), lease))
		require.Equal(t, time.Second, (<-got).after)
	})
}

func TestSubscription_isOneAndIdleOnesAreClosed(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		wait := func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			var waiters sync.WaitGroup
			for i := range 20 {
				id := fmt.Sprint(i)
				_, _ = a.Acquire(t.Context(), id, time.Hour)
				waiters.Go(func() {
					_, err := b.WaitAcquire(ctx, id, time.Minute)
					require.ErrorIs(t, err, redfour.ErrLocked)
				})
			}
			waiters.Wait()
		}
		wait()
		require.Equal(t, 1, way.subscriptions())
		pass(5 * time.Second)
		wait()
		require.Equal(t, 1, way.subscriptions(), "kept for a while")
		require.Equal(t, 1, m.PubSubNumSub("lock-release")["lock-release"])
		pass(11 * time.Second)
		require.Zero(t, m.PubSubNumSub("lock-release")["lock-release"])
		wait()
		require.Equal(t, 2, way.subscriptions())
	})
}

// Somebody between us and Redis hangs up on subscribers as soon as they are there.
func TestSubscription_thatFlapsIsNotAskedForAllTheTime(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		mustAcquire(t, a, "42", time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		waitFor(ctx, b, "42", time.Minute)
		for range 1000 {
			pass(10 * time.Millisecond)
			way.cut(isSubscriber)
		}
		require.Less(t, way.subscriptions(), 50)
		cancel()
	})
}

// Some services count no subscribers. Each new subscription wakes every waiting id.
func TestSubscription_thatIsNeverCountedIsRarelyReplaced(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if counted, ok := cmd.(interface{ SetVal(val any) }); ok && isCheck(cmd) {
				counted.SetVal(int64(0))
			}
			return nil
		})
		mustAcquire(t, m.lock(t), "42", time.Hour)
		got := waitFor(t.Context(), m.lock(t, way), "42", time.Minute)
		pass(5 * time.Minute)
		require.LessOrEqual(t, way.subscriptions(), 17, "after 1, 2, 4, 8 and 16 s, then every 30 s")
		require.Empty(t, got)
	})
}

func TestWaitAcquire_aClosedClientEndsEveryWaitWithinASecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		holder, l := m.lock(t), newLock(t, client)
		var waiting []<-chan acquired
		for i := range 200 {
			id := fmt.Sprint(i % 100)
			if i < 100 {
				mustAcquire(t, holder, id, time.Hour)
			}
			waiting = append(waiting, waitFor(t.Context(), l, id, time.Minute))
		}
		pass(20 * time.Second)
		require.NoError(t, client.Close())
		closed := time.Now()
		for _, got := range waiting {
			require.ErrorIs(t, (<-got).err, redis.ErrClosed)
		}
		require.Less(t, time.Since(closed), time.Second)
		require.NoError(t, l.Close())
	})
}

func TestSubscription_mayTakeLongToConnect(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		_, err := b.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		way.setDelay(4 * time.Second)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(20 * time.Second)
		require.Equal(t, 1, way.subscriptions())
		require.NoError(t, a.Release(t.Context(), lease))
		require.Equal(t, 20*time.Second, (<-got).after)
	})
}

func TestSubscription_manyIdsLookOneAfterTheOther(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		for i := range 200 {
			mustAcquire(t, a, fmt.Sprint(i), time.Hour)
			waitFor(t.Context(), b, fmt.Sprint(i), time.Minute)
		}
		pass(10 * time.Second)
		var mu sync.Mutex
		looks := make(map[time.Duration]int)
		start := time.Now()
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if isCheck(cmd) {
				return nil
			}
			mu.Lock()
			defer mu.Unlock()
			looks[time.Since(start).Truncate(time.Millisecond)]++
			return nil
		})
		way.cut(isSubscriber)
		pass(10 * time.Second)
		mu.Lock()
		defer mu.Unlock()
		sum, most := 0, 0
		for _, n := range looks {
			sum, most = sum+n, max(most, n)
		}
		require.Equal(t, 200, sum)
		require.LessOrEqual(t, most, 50, "in one millisecond")
	})
}

func TestWaitAcquire_randomCancellationsLeaveNothing(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		locks := []*redfour.Lock{m.lock(t, new(link)), m.lock(t), m.lock(t)}
		var inside sync.Map
		var workers sync.WaitGroup
		for range 20 {
			workers.Go(func() {
				for range 10 {
					l, id := locks[rand.N(3)], fmt.Sprint(rand.N(2))
					ctx, cancel := context.WithTimeout(t.Context(), rand.N(20*time.Millisecond))
					_ = l.WithLock(ctx, id, time.Duration(1+rand.N(2))*time.Minute, func(context.Context, *redfour.Lease) error {
						_, other := inside.LoadOrStore(id, true)
						require.False(t, other)
						pass(rand.N(time.Millisecond))
						inside.Delete(id)
						return nil
					})
					cancel()
				}
			})
		}
		workers.Wait()
		synctest.Wait()
		require.False(t, m.Exists("lock:0"))
		require.False(t, m.Exists("lock:1"))
		start := time.Now()
		for _, l := range locks {
			require.NoError(t, l.Close())
		}
		require.Zero(t, time.Since(start))
	})
}
