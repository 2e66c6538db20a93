package redfour_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// queued returns the members in the queue of "42", first come first.
func (m *mini) queued(t *testing.T) []string {
	t.Helper()
	if !m.Exists("lock-waiters:42") {
		return nil
	}
	entries, err := m.List("lock-waiters:42")
	require.NoError(t, err)
	require.Positive(t, m.TTL("lock-waiters:42"), "a queue does not last for ever")
	members := make([]string, 0, len(entries))
	for _, e := range entries {
		member, _, _ := strings.Cut(e, " ")
		members = append(members, member)
	}
	return members
}

// inLine starts a WaitAcquire for "42", and returns when it is in the queue, or behind one that is.
func inLine(ctx context.Context, t *testing.T, m *mini, l *redfour.Lock, ttl time.Duration) <-chan acquired {
	t.Helper()
	got := waitFor(ctx, l, "42", ttl)
	synctest.Wait()
	pass(time.Millisecond) // A new subscription makes everybody look.
	synctest.Wait()
	require.NotEmpty(t, m.queued(t))
	return got
}

func TestRelease_grantsToTheFirstInTheQueueByAMessage(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		pass(7 * time.Second)
		sent := way.sent()
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, sent, way.sent(), "nothing was asked")
		require.Greater(t, r.lease.Index, lease.Index)
		require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
		require.Equal(t, time.Minute, r.lease.TTL)
		gained := 7 * time.Millisecond // by the server's clock at most, since the member's attempt
		require.InDelta(t, counted(time.Minute)-gained, r.lease.Remaining(), float64(time.Millisecond))
		require.LessOrEqual(t, r.lease.Remaining(), m.TTL("lock:42"))
		require.Empty(t, m.queued(t))
		require.NoError(t, b.Renew(t.Context(), r.lease, time.Hour))
		require.NoError(t, b.Release(t.Context(), r.lease))
	})
}

func TestWaitAcquire_processesAreServedInTheOrderInWhichTheyCame(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		locks := []*redfour.Lock{m.lock(t), m.lock(t), m.lock(t)}
		lease, holder := mustAcquire(t, locks[0], "42", time.Hour), 0
		var waiting []<-chan acquired
		for _, l := range []*redfour.Lock{locks[1], locks[2], locks[0]} {
			waiting = append(waiting, inLine(t.Context(), t, m, l, time.Hour))
		}
		for i, next := range waiting {
			require.NoError(t, locks[holder].Release(t.Context(), lease))
			r := <-next
			require.NoError(t, r.err)
			lease, holder = r.lease, (i+1)%3
		}
	})
}

// A busy process may serve sixteen of its own waiters before it is somebody else's turn.
func TestRelease_aTurnEnds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		busy, other := m.lock(t), m.lock(t)
		first := mustAcquire(t, other, "42", time.Hour)
		served := 0
		for range 50 {
			go func() {
				_ = busy.WithLock(t.Context(), "42", time.Hour, func(context.Context, *redfour.Lease) error {
					served++
					return nil
				})
			}()
		}
		synctest.Wait()
		pass(time.Millisecond)
		synctest.Wait()
		got := inLine(t.Context(), t, m, other, time.Hour)
		require.Len(t, m.queued(t), 2)
		require.NoError(t, other.Release(t.Context(), first))
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, 17, served, "one to begin with, and the turn")
		require.NoError(t, other.Release(t.Context(), r.lease))
		synctest.Wait()
		require.Equal(t, 50, served)
	})
}

func TestRelease_skipsWhoDoesNotListenAnyMore(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		dying := new(link)
		a, b, c := m.lock(t), m.lock(t, dying), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		inLine(t.Context(), t, m, b, time.Hour)
		got := inLine(t.Context(), t, m, c, time.Hour)
		dying.setDown(true)
		dying.cut(func(*linkConn) bool { return true })
		synctest.Wait()
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
	})
}

func TestWaitAcquire_theLastToLeaveLeavesTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		mustAcquire(t, m.lock(t), "42", time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		second := inLine(t.Context(), t, m, l, time.Hour)
		require.Len(t, m.queued(t), 1, "one entry a member")
		cancel()
		synctest.Wait()
		require.Len(t, m.queued(t), 1)
		require.NoError(t, l.Close())
		require.ErrorIs(t, (<-second).err, redfour.ErrClosed)
		require.Empty(t, m.queued(t), "when Close returns")
	})
}

// The grant is on its way when the last waiter leaves.
func TestWaitAcquire_aLeaverGivesBackTheGrantThatHeDidNotHear(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b, c := m.lock(t), m.lock(t, way), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		leaver := inLine(ctx, t, m, b, time.Hour)
		next := inLine(t.Context(), t, m, c, time.Hour)
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		synctest.Wait()
		require.Empty(t, next)
		cancel()
		require.ErrorIs(t, (<-leaver).err, context.Canceled)
		r := <-next
		require.NoError(t, r.err)
		require.Less(t, r.after, 100*time.Millisecond)
		resume()
		synctest.Wait()
		require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"), "the message that came late changed nothing")
	})
}

// Somebody else begins to wait while the grant of one who has left is on its way: it is found by asking, and its
// message comes later.
func TestWaitAcquire_aGrantIsClaimedOnce(t *testing.T) {
	for name, third := range map[string]bool{"by one who waits": true, "when nobody waits": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				a, b := m.lock(t), m.lock(t, way)
				lease := mustAcquire(t, a, "42", time.Hour)
				ctx, cancel := context.WithCancel(t.Context())
				inLine(ctx, t, m, b, time.Hour)
				resume := way.holdUp(isSubscriber)
				require.NoError(t, a.Release(t.Context(), lease))
				synctest.Wait()
				hang := make(chan struct{})
				way.beforeScript(once(isLeave, func() error { <-hang; return redis.ErrPoolTimeout }))
				cancel()
				synctest.Wait()
				second := waitFor(t.Context(), b, "42", time.Hour)
				var more <-chan acquired
				if third {
					synctest.Wait()
					more = waitFor(t.Context(), b, "42", time.Hour)
				}
				synctest.Wait()
				close(hang)
				r := <-second
				require.NoError(t, r.err)
				require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
				resume()
				synctest.Wait()
				require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
				require.Empty(t, more)
				require.NoError(t, b.Release(t.Context(), r.lease))
				if third {
					require.NoError(t, (<-more).err)
				}
			})
		})
	}
}

// A lease that was granted to the member, and that nobody waits behind any more, is still held when somebody new asks.
func TestWaitAcquire_doesNotClaimWhatItsProcessHolds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		require.NoError(t, a.Release(t.Context(), lease))
		held := (<-got).lease
		require.NoError(t, b.Renew(t.Context(), held, time.Hour))
		pass(10 * time.Minute)
		second := inLine(t.Context(), t, m, b, time.Minute)
		pass(time.Minute)
		require.Empty(t, second)
		require.NoError(t, b.Release(t.Context(), held))
		require.NoError(t, (<-second).err)
	})
}

// The message is delayed by half the ttl, and by more.
func TestWaitAcquire_theDeadlineOfAGrantDoesNotDependOnItsMessage(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, 2*time.Second)
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		pass(time.Second)
		resume()
		r := <-got
		require.NoError(t, r.err)
		require.LessOrEqual(t, r.lease.Remaining(), m.TTL("lock:42"))
		require.InDelta(t, time.Second, r.lease.Remaining(), float64(10*time.Millisecond))
	})
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Second)
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		pass(1500 * time.Millisecond)
		require.False(t, m.Exists("lock:42"))
		resume()
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
		require.InDelta(t, time.Second, r.lease.Remaining(), float64(10*time.Millisecond))
	})
}

// Whoever is first when the grant comes wants another ttl than the entry in the queue says.
func TestWaitAcquire_aGrantGetsTheTTLOfWhoeverTakesIt(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		ctx, cancel := context.WithCancel(t.Context())
		inLine(ctx, t, m, b, time.Minute)
		got := inLine(t.Context(), t, m, b, time.Hour)
		cancel()
		synctest.Wait()
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, time.Hour, r.lease.TTL)
		require.Equal(t, time.Hour, m.TTL("lock:42"))
	})
}

// The release hands over, its reply is lost, and it is repeated.
func TestRelease_handsOverOnceThoughItsReplyIsLost(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		second := inLine(t.Context(), t, m, l, time.Hour)
		third := inLine(t.Context(), t, m, l, time.Hour)
		way.afterScript(once(isRelease, lostReply))
		require.NoError(t, l.Release(t.Context(), lease))
		r := <-second
		require.NoError(t, r.err)
		synctest.Wait()
		require.Empty(t, third)
		require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
		require.NoError(t, l.Release(t.Context(), r.lease))
		require.NoError(t, (<-third).err)
	})
}

// The same, but the release is given up: the next attempt finds what it has done.
func TestRelease_handsOverThoughItNeverHears(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		second := inLine(t.Context(), t, m, l, time.Hour)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if isRelease(cmd) {
				return lostReply()
			}
			return nil
		})
		require.ErrorContains(t, l.Release(t.Context(), lease), "outcome unknown")
		way.afterScript(nil)
		r := <-second
		require.NoError(t, r.err)
		require.Less(t, r.after, 10*time.Second)
		require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
	})
}

// The lease was lost, and whoever waits in the same process has the lock by now.
func TestRelease_ofALeaseThatTheNextWaiterHasTakenOverIsALoss(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		second := inLine(t.Context(), t, m, l, time.Hour)
		hang := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { <-hang; return nil }))
		m.Del("lock:42")
		m.Publish("lock-release", "lock:42")
		pass(10 * time.Millisecond)
		require.True(t, m.Exists("lock:42"), "the attempt took it, and has not been told")
		err := l.Release(t.Context(), lease)
		require.ErrorIs(t, err, redfour.ErrConflict)
		r := <-second
		require.NoError(t, r.err)
		close(hang)
		synctest.Wait()
		require.Equal(t, m.HGet("lock:42", "token"), r.lease.Token)
	})
}

// listener subscribes to releases as npm redfour does, and to nothing else.
func listener(t *testing.T, m *mini) <-chan *redis.Message {
	t.Helper()
	pubsub := m.client(t).Subscribe(t.Context(), "lock-release")
	t.Cleanup(func() { _ = pubsub.Close() })
	_, err := pubsub.Receive(t.Context())
	require.NoError(t, err)
	return pubsub.Channel()
}

// inTurns lets two Locks take turns, and calls between after each hand-over.
func inTurns(t *testing.T, m *mini, n int, between func(i int)) {
	t.Helper()
	locks := []*redfour.Lock{m.lock(t), m.lock(t)}
	lease := mustAcquire(t, locks[0], "42", time.Hour)
	for i := range n {
		got := inLine(t.Context(), t, m, locks[(i+1)%2], time.Hour)
		require.NoError(t, locks[i%2].Release(t.Context(), lease))
		between(i + 1)
		r := <-got
		require.NoError(t, r.err)
		lease = r.lease
	}
}

func TestRelease_isOpenNowAndThenForThoseWhoAreNotInTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		heard := listener(t, m)
		inTurns(t, m, 130, func(i int) {
			synctest.Wait()
			if i%64 != 0 {
				require.Empty(t, heard)
				return
			}
			require.Len(t, heard, 1)
			require.Equal(t, "lock:42", (<-heard).Payload)
			pass(900 * time.Microsecond)
			require.False(t, m.Exists("lock:42"), "members leave it alone for a moment")
			pass(2200 * time.Microsecond)
			synctest.Wait()
			require.True(t, m.Exists("lock:42"))
		})
	})
}

// Those who are in line behind the holder in its own process do not take what was released for others.
func TestRelease_isOpenWithinOneProcessToo(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		heard := listener(t, m)
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Hour)
		for i := range 130 {
			got := inLine(t.Context(), t, m, l, time.Hour)
			require.NoError(t, l.Release(t.Context(), lease))
			synctest.Wait()
			require.Equal(t, (i+1)%64 != 0, m.Exists("lock:42"), "hand-over %d", i+1)
			r := <-got
			require.NoError(t, r.err)
			lease = r.lease
		}
		require.Len(t, heard, 2)
	})
}

func TestRelease_isNeverOpenInAFleetOfMembers(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		inTurns(t, m, 200, func(int) {
			synctest.Wait()
			require.True(t, m.Exists("lock:42"))
		})
	})
}

// Two members look alive to Redis and are not; so is the holder. Each of them alone would cost a ttl.
func TestWaitAcquire_manyWhoDiedAtOnceCostOneTTLTogether(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		mustAcquire(t, m.lock(t), "42", time.Minute)
		for _, dead := range []string{"dead1", "dead2"} {
			pubsub := m.client(t).Subscribe(t.Context(), "lock-grant:"+dead)
			t.Cleanup(func() { _ = pubsub.Close() })
			_, err := pubsub.Receive(t.Context())
			require.NoError(t, err)
			_, err = m.Push("lock-waiters:42", dead+" 60000 1")
			require.NoError(t, err)
		}
		first := inLine(t.Context(), t, m, m.lock(t), time.Second)
		second := inLine(t.Context(), t, m, m.lock(t), time.Second)
		require.Len(t, m.queued(t), 4)
		var r acquired
		select {
		case r = <-first:
		case r = <-second:
		}
		require.NoError(t, r.err)
		require.Less(t, r.after, 61*time.Second)
		pass(5 * time.Millisecond)
		synctest.Wait()
		require.Len(t, m.queued(t), 1, "the other came again")
	})
}

// Every answer to a release that is not "handed to the next" is a wake-up. Here the waiter comes when the release has
// left, so it is not named; it looks before the release has run; and there is no subscription yet.
func TestRelease_itsAnswerWakesWhoeverCameMeanwhile(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		hang := make(chan struct{})
		way.beforeScript(once(isRelease, func() error { <-hang; return nil }))
		released := make(chan error, 1)
		go func() { released <- l.Release(t.Context(), lease) }()
		synctest.Wait()
		way.setDown(true)
		got := waitFor(t.Context(), l, "42", time.Hour)
		synctest.Wait()
		close(hang)
		require.NoError(t, <-released)
		r := <-got
		require.NoError(t, r.err)
		require.Zero(t, r.after)
	})
}

func TestWaitAcquire_ignoresMessagesThatAreNoGrants(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		mustAcquire(t, m.lock(t), "42", time.Hour)
		got := inLine(t.Context(), t, m, l, time.Hour)
		inbox := "lock-grant:" + m.queued(t)[0]
		for _, text := range []string{
			"", "1", "1 2 3", "x 2 3 lock:42", "1 x 3 lock:42", "1 2 x lock:42", "-1 2 3 lock:42", "1 0 3 lock:42",
			"4503599627370496 1000 1 lock:42", "1 9223372036854775807 1 lock:42", "1 1000 1 other:42",
			"1 1000 1 lock:42", // an old one
			fmt.Sprintf("%d 1000 1 lock:nobody waits here", time.Now().UnixMicro()),
		} {
			require.Equal(t, 1, m.Publish(inbox, text))
		}
		synctest.Wait()
		require.Empty(t, got)
	})
}

// holdAsNPM takes the lock as npm redfour does.
func holdAsNPM(t *testing.T, m *mini) {
	t.Helper()
	m.HSet("lock:42", "index", fmt.Sprint(time.Now().UnixMicro()))
	m.SetTTL("lock:42", time.Hour)
}

func releaseAsNPM(m *mini) {
	m.Del("lock:42")
	m.Publish("lock-release", "lock:42")
}

// The attempt looked before an npm client released; its answer comes after the message.
func TestWaitAcquire_npmReleaseBetweenLookAndWait(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		holdAsNPM(t, m)
		got := inLine(t.Context(), t, m, l, time.Hour)
		way.afterScript(once(isAcquire, func() error {
			releaseAsNPM(m)
			pass(time.Millisecond)
			return nil
		}))
		m.Publish("lock-release", "lock:42")
		r := <-got
		require.NoError(t, r.err)
		require.Less(t, r.after, 100*time.Millisecond)
	})
}

// After an open release members pause. Npm clients that take the lock and release it meanwhile do not make the pause longer.
func TestWaitAcquire_aPauseIsNotPutOff(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		mustAcquire(t, m.lock(t), "42", time.Hour)
		inLine(t.Context(), t, m, m.lock(t, way), time.Hour)
		sent, start := way.sent(), time.Now()
		for time.Since(start) < 10*time.Millisecond {
			holdAsNPM(t, m)
			pass(500 * time.Microsecond)
			releaseAsNPM(m)
			pass(100 * time.Microsecond)
		}
		require.Greater(t, way.sent(), sent)
	})
}

// An attempt is on its way when the grant comes: its answer is older, so the line is not in the queue.
func TestWaitAcquire_aGrantDuringAnAttempt(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		first := inLine(t.Context(), t, m, b, time.Hour)
		second := inLine(t.Context(), t, m, b, time.Hour)
		way.afterScript(once(isAcquire, func() error {
			require.NoError(t, a.Release(t.Context(), lease))
			pass(time.Millisecond)
			return nil
		}))
		m.Publish("lock-release", "lock:42")
		r := <-first
		require.NoError(t, r.err)
		pass(5 * time.Millisecond)
		require.Len(t, m.queued(t), 1, "the second is in the queue again")
		require.NoError(t, a.Release(t.Context(), travel(t, r.lease)), "elsewhere")
		require.Less(t, (<-second).after, time.Second)
	})
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Hour)
		way.afterScript(once(isAcquire, func() error {
			require.NoError(t, a.Release(t.Context(), lease))
			pass(time.Millisecond)
			return nil
		}))
		leaves := 0
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if isLeave(cmd) {
				leaves++
			}
			return nil
		})
		m.Publish("lock-release", "lock:42")
		require.NoError(t, (<-got).err)
		pass(5 * time.Millisecond)
		require.Zero(t, leaves, "there was nothing to leave")
	})
}

// The server's clock is set back between the last reply and the grant, which then looks
// as if it had been on its way for an hour. The member asks, and has the lease.
func TestWaitAcquire_getsAGrantAfterTheServersClockWasSetBack(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", 2*time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		m.SetTime(time.Now().Add(-time.Hour))
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
		require.Greater(t, r.lease.Index, lease.Index, "the counter is ahead of the clock")
		require.InDelta(t, counted(time.Minute), r.lease.Remaining(), float64(time.Millisecond))
		require.LessOrEqual(t, r.lease.Remaining(), m.TTL("lock:42"))
		require.NoError(t, b.Release(t.Context(), r.lease))
	})
}

// The server's clock is set forward between the last reply and the grant, as when another server takes over.
func TestWaitAcquire_aGrantByAnotherClockIsRenewed(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", 2*time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		m.ClockTTL(false)
		m.SetTime(time.Now().Add(time.Hour))
		renewed := answeredIn(way, isRenew)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, 1, *renewed)
		require.LessOrEqual(t, r.lease.Remaining(), time.Minute)
	})
}

// answeredIn counts the scripts that match, for tests in a bubble that wait for them to be answered.
func answeredIn(way *link, match func(redis.Cmder) bool) *int {
	n := new(int)
	way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
		if match(cmd) {
			*n++
		}
		return nil
	})
	return n
}

// The grant is found by asking, and its message comes when nobody waits any more: within the ttl, and later.
func TestWaitAcquire_theMessageOfAGrantThatWasFoundEndsNothing(t *testing.T) {
	for _, entry := range []time.Duration{time.Hour, 500 * time.Millisecond} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			a, b := m.lock(t), m.lock(t, way)
			lease := mustAcquire(t, a, "42", 3*time.Second)
			ctx, leave := context.WithCancel(t.Context())
			inLine(ctx, t, m, b, entry)
			got := inLine(t.Context(), t, m, b, 500*time.Millisecond)
			leave()
			synctest.Wait()
			pass(time.Until(lease.Deadline()) - 50*time.Millisecond)
			resume := way.holdUp(isSubscriber)
			require.NoError(t, a.Release(t.Context(), lease))
			r := <-got
			require.NoError(t, r.err, "found when the holder's lease should have ended")
			kept, stop := b.KeepAlive(t.Context(), r.lease)
			defer stop()
			pass(700 * time.Millisecond)
			resume()
			synctest.Wait()
			require.NoError(t, kept.Err())
			require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"))
		})
	}
}

// The same, when the Lock is closed meanwhile.
func TestClose_endsNoLeaseByAMessageThatComesLate(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", 3*time.Second)
		got := inLine(t.Context(), t, m, b, time.Hour)
		pass(time.Until(lease.Deadline()) - 50*time.Millisecond)
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		closed := make(chan error, 1)
		go func() { closed <- b.Close() }()
		synctest.Wait()
		resume()
		require.NoError(t, <-closed)
		synctest.Wait()
		require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"))
	})
}

// Indexes that the clock will not reach before the next century are not taken for news of the counter.
func TestWaitAcquire_aGrantIsClaimedOnceWhateverItsIndex(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		require.NoError(t, m.Set("lockindex", "4503599627370500"))
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", 2*time.Second)
		got := inLine(t.Context(), t, m, b, 1500*time.Millisecond)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
		require.NoError(t, b.Renew(t.Context(), r.lease, time.Hour))
		pass(3 * time.Second)
		second := waitFor(t.Context(), b, "42", time.Second)
		pass(time.Second)
		require.Empty(t, second)
	})
}

func TestWaitAcquire_anEntryHasTheTTLOfWhoeverIsFirst(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Hour)
		waitFor(t.Context(), b, "42", time.Second)
		synctest.Wait()
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		inLine(t.Context(), t, m, a, time.Hour)
		m.Publish("lock-release", "lock:42") // b asks, and is in the queue again
		pass(5 * time.Millisecond)
		synctest.Wait()
		entries, err := m.List("lock-waiters:42")
		require.NoError(t, err)
		require.Len(t, entries, 2)
		require.Contains(t, entries[1], " 1000 ")
	})
}

// Every attempt to release but the last finds no connection, and the last takes so long that nobody waits for it.
func releaseLate(t *testing.T, l *redfour.Lock, way *link, lease *redfour.Lease) (deliver func()) {
	t.Helper()
	start := time.Now()
	early := func() bool { return time.Since(start) < 4500*time.Millisecond }
	way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
		if isRelease(cmd) && early() {
			return redis.ErrPoolTimeout
		}
		return nil
	})
	released := make(chan error, 1)
	go func() { released <- l.Release(t.Context(), lease) }()
	pass(4500 * time.Millisecond)
	deliver = way.keepBack()
	require.ErrorContains(t, <-released, "outcome unknown")
	synctest.Wait()
	return deliver
}

func TestRelease_thatComesThroughLateHandsOver(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		lease := mustAcquire(t, l, "42", time.Hour)
		got := inLine(t.Context(), t, m, l, time.Hour)
		releaseLate(t, l, way, lease)()
		synctest.Wait()
		require.Len(t, got, 1)
		require.NoError(t, (<-got).err)
	})
}

func TestRelease_thatComesThroughLateForNobodyIsGivenBack(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		lease := mustAcquire(t, l, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		deliver := releaseLate(t, l, way, lease)
		leave()
		synctest.Wait()
		deliver()
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
		require.Empty(t, m.queued(t))
	})
}

// The reply of every release is lost, and the heir leaves.
func TestRelease_aHandOverOfWhichNobodyHearsIsGivenBack(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if isRelease(cmd) {
				return lostReply()
			}
			return nil
		})
		released := make(chan error, 1)
		go func() { released <- l.Release(t.Context(), lease) }()
		synctest.Wait()
		leave()
		require.ErrorContains(t, <-released, "outcome unknown")
		way.afterScript(nil)
		pass(time.Second)
		require.False(t, m.Exists("lock:42"))
	})
}

// The next waiter leaves while the answer is on its way that hands it the lock, and Redis answers nothing from then on.
func TestRelease_keepsItsBoundWhenTheNextWaiterHasLeftAsRedisHangs(t *testing.T) {
	calls := map[string]func(ctx context.Context, l *redfour.Lock) error{
		"Release": func(ctx context.Context, l *redfour.Lock) error {
			return l.Release(ctx, &redfour.Lease{ID: "42", Index: 1, Token: "t"})
		},
		"ForceRelease": func(ctx context.Context, l *redfour.Lock) error { return l.ForceRelease(ctx, "42", 0) },
	}
	others := map[string]time.Duration{"no other waits": 0, "another waits for another ttl": time.Minute}
	for name, call := range calls {
		for what, other := range others {
			t.Run(name+" "+what, func(t *testing.T) {
				bubble(t, func(t *testing.T, m *mini) {
					way := new(link)
					l := m.lock(t, way)
					m.HSet("lock:42", "index", "1", "token", "t")
					m.SetTTL("lock:42", time.Hour)
					wait, leave := context.WithCancel(t.Context())
					left := waitFor(wait, l, "42", time.Hour)
					synctest.Wait()
					var next <-chan acquired
					if other > 0 {
						next = waitFor(t.Context(), l, "42", other)
						synctest.Wait()
					}
					hang, resume := context.WithCancel(t.Context())
					defer resume()
					way.afterScript(once(isRelease, func() error {
						leave()
						assert.ErrorIs(t, (<-left).err, context.Canceled)
						way.beforeScript(func(context.Context, redis.Cmder) error { <-hang.Done(); return nil })
						return nil
					}))

					ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
					defer cancel()
					start := time.Now()
					require.NoError(t, call(ctx, l))
					require.LessOrEqual(t, time.Since(start), 600*time.Millisecond)

					resume()
					if next != nil {
						lease := takeLease(t, next)
						require.Equal(t, other, lease.TTL)
						require.NoError(t, l.Release(t.Context(), lease))
					}
					synctest.Wait()
					require.False(t, m.Exists("lock:42"))
					require.Empty(t, m.queued(t))
				})
			})
		}
	}
}

// As above, where the section held the lock that goes back.
func TestWithLock_returnsAlthoughTheNextWaiterHasLeftAsRedisHangs(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		wait, leave := context.WithCancel(t.Context())
		hang := make(chan struct{})
		defer close(hang)
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		start := time.Now()
		require.NoError(t, l.WithLock(ctx, "42", time.Hour, func(context.Context, *redfour.Lease) error {
			left := inLine(wait, t, m, l, time.Hour)
			way.afterScript(once(isRelease, func() error {
				leave()
				assert.ErrorIs(t, (<-left).err, context.Canceled)
				way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return nil })
				return nil
			}))
			return nil
		}))
		require.LessOrEqual(t, time.Since(start), 600*time.Millisecond)
	})
}

// What is given back is one lease: an attempt under the same token may come through while that is repeated.
func TestRelease_whatIsGivenBackIsNoOtherLease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		deliver := way.keepBack() // an attempt
		m.Publish("lock-release", "lock:42")
		pass(4 * time.Millisecond)
		handed, repeat := make(chan struct{}), make(chan struct{})
		releases := 0
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if !isRelease(cmd) {
				return nil
			}
			switch releases++; releases {
			case 1: // hands over to one who leaves
				<-handed
			case 2: // gives back
				<-repeat
				return lostReply()
			}
			return nil
		})
		released := make(chan error, 1)
		go func() { released <- l.Release(t.Context(), lease) }()
		synctest.Wait()
		leave()
		synctest.Wait()
		close(handed)
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
		second := waitFor(t.Context(), l, "42", time.Hour)
		synctest.Wait()
		deliver()
		r := <-second
		require.NoError(t, r.err)
		close(repeat)
		require.NoError(t, <-released)
		pass(100 * time.Millisecond)
		require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"))
	})
}

// The leave fails at first, and the entry is granted the lock; somebody new waits before the message comes.
func TestWaitAcquire_claimsWhatWasGrantedAfterALeaveThatFailed(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, b, time.Hour)
		way.beforeScript(once(isLeave, func() error { return redis.ErrPoolTimeout }))
		leave()
		synctest.Wait()
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		mustAcquire(t, b, "raises the highest index", time.Hour)
		second := waitFor(t.Context(), b, "42", time.Hour)
		synctest.Wait()
		resume()
		r := <-second
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
	})
}

func TestWaitAcquire_aLeaveThatFailsIsRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		b := m.lock(t, way)
		mustAcquire(t, m.lock(t), "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, b, time.Hour)
		way.beforeScript(once(isLeave, func() error { return redis.ErrPoolTimeout }))
		leave()
		pass(time.Second)
		require.Empty(t, m.queued(t))
	})
}

// A release enters the member into the queue for those it leaves behind. When they go, it leaves again, whether it
// was told that it had entered, or the reply was lost.
func TestRelease_whatItQueuedLeavesAgain(t *testing.T) {
	for name, harm := range map[string]func(way *link){
		"told":       func(*link) {},
		"reply lost": func(way *link) { way.afterScript(once(isRelease, lostReply)) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				a, b := m.lock(t), m.lock(t, way)
				lease := mustAcquire(t, a, "42", time.Hour)
				first := inLine(t.Context(), t, m, b, time.Hour)
				second := inLine(t.Context(), t, m, b, time.Hour)
				require.NoError(t, a.Release(t.Context(), lease))
				lease = (<-first).lease
				ctx, leave := context.WithCancel(t.Context())
				waitFor(ctx, b, "42", time.Hour) // He is not first, so nothing is asked for him.
				synctest.Wait()
				next := inLine(t.Context(), t, m, a, time.Hour)
				require.NoError(t, b.Release(t.Context(), lease))
				lease = (<-second).lease
				require.Len(t, m.queued(t), 1)
				harm(way)
				require.NoError(t, b.Release(t.Context(), lease))
				require.NoError(t, (<-next).err)
				require.Len(t, m.queued(t), 1, "for the third")
				leave()
				synctest.Wait()
				require.Empty(t, m.queued(t))
			})
		})
	}
}

// A hand-over within the process leaves the member in the queue for those who wait behind. When they go, it leaves.
func TestRelease_aHandOverKeepsThePlaceInTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Hour)
		first := inLine(t.Context(), t, m, l, time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		require.NoError(t, l.Release(t.Context(), lease))
		require.NoError(t, (<-first).err)
		require.Len(t, m.queued(t), 1)
		leave()
		synctest.Wait()
		require.Empty(t, m.queued(t))
	})
}

// The heir leaves while the release is on its way that queues the member for him.
func TestRelease_whatItQueuedForOneWhoHasLeftLeavesAgain(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, b, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, b, time.Hour)
		got := inLine(t.Context(), t, m, a, time.Hour)
		hang := make(chan struct{})
		way.beforeScript(once(isRelease, func() error { <-hang; return nil }))
		released := make(chan error, 1)
		go func() { released <- b.Release(t.Context(), lease) }()
		synctest.Wait()
		leave()
		synctest.Wait()
		close(hang)
		require.NoError(t, <-released)
		require.NoError(t, (<-got).err)
		synctest.Wait()
		require.Empty(t, m.queued(t))
	})
}

// An attempt that comes through late enters the queue when its line has got what it waited for.
func TestWaitAcquire_whatAnAttemptQueuesLateLeavesAgain(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Hour)
		deliver := way.keepBack()
		m.Publish("lock-release", "lock:42")
		pass(1200 * time.Millisecond) // It was given up, and another was made.
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.NoError(t, b.Release(t.Context(), r.lease))
		mustAcquire(t, a, "42", time.Hour)
		deliver()
		synctest.Wait()
		require.Empty(t, m.queued(t))
	})
}

// A hand-over whose reply was lost is recognised by the next attempt, and leaves the line in the queue for the others.
func TestWaitAcquire_whatItRecognisesDoesNotTakeItOutOfTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		first := inLine(t.Context(), t, m, l, time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, l, time.Hour)
		hang := make(chan struct{})
		way.afterScript(once(isRelease, func() error { <-hang; return nil }))
		released := make(chan error, 1)
		go func() { released <- l.Release(t.Context(), lease) }()
		synctest.Wait()
		m.Publish("lock-release", "lock:42")
		pass(5 * time.Millisecond)
		require.NoError(t, (<-first).err)
		close(hang)
		require.NoError(t, <-released)
		require.Len(t, m.queued(t), 1)
		leave()
		synctest.Wait()
		require.Empty(t, m.queued(t))
	})
}

// An attempt comes through when its quest was won and the lease released: it takes the lock again. Its own answer tells of
// that late, and the repetition of a release tells of it, too. One of them counts.
func TestWaitAcquire_aLeaseUnderTheSameTokenIsClaimedOnce(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		first := inLine(t.Context(), t, m, l, time.Hour)
		lose, answer := make(chan struct{}), make(chan struct{})
		loseFirst := once(isRelease, func() error { <-lose; return lostReply() })
		var holdBack func(context.Context, redis.Cmder) error
		way.afterScript(func(ctx context.Context, cmd redis.Cmder) error {
			if holdBack != nil {
				_ = holdBack(ctx, cmd)
			}
			return loseFirst(ctx, cmd)
		})
		deliver := way.keepBack()
		m.Publish("lock-release", "lock:42")
		pass(1200 * time.Millisecond) // The attempt was given up.
		released := make(chan error, 1)
		go func() { released <- l.Release(t.Context(), lease) }()
		synctest.Wait()
		m.Publish("lock-release", "lock:42")
		r := <-first
		require.NoError(t, r.err, "the next attempt recognised the hand-over")
		require.NoError(t, l.Release(t.Context(), r.lease))
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
		holdBack = once(isAcquire, func() error { <-answer; return nil })
		deliver()
		synctest.Wait()
		require.True(t, m.Exists("lock:42"))
		second := waitFor(t.Context(), l, "42", time.Hour)
		synctest.Wait()
		close(lose)
		r = <-second
		require.NoError(t, r.err)
		close(answer)
		pass(10 * time.Millisecond)
		require.NoError(t, <-released)
		require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"))
	})
}

// The answer of an attempt is older than the grant that took the line out of the queue, and than the release that
// entered it again.
func TestWaitAcquire_anOldAnswerDoesNotMakeALineForgetItsPlace(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		first := inLine(t.Context(), t, m, b, time.Hour)
		inLine(t.Context(), t, m, a, time.Hour)
		answer := make(chan struct{})
		way.afterScript(once(isAcquire, func() error { <-answer; return nil }))
		m.Publish("lock-release", "lock:42")
		pass(5 * time.Millisecond)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-first
		require.NoError(t, r.err)
		ctx, leave := context.WithCancel(t.Context())
		waitFor(ctx, b, "42", time.Hour)
		synctest.Wait()
		require.NoError(t, b.Release(t.Context(), r.lease))
		require.Len(t, m.queued(t), 1)
		close(answer)
		pass(5 * time.Millisecond)
		require.Len(t, m.queued(t), 1, "one entry a member")
		leave()
		pass(5 * time.Millisecond)
		require.Empty(t, m.queued(t))
	})
}

// capture makes the scripts that match fail as if their replies were lost, and
// returns a function that lets Redis run the first of them, as a late copy.
func (m *mini) capture(t *testing.T, way *link, match func(redis.Cmder) bool) (deliver func()) {
	t.Helper()
	client := m.client(t)
	var mu sync.Mutex
	var first []any
	way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
		if !match(cmd) {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		if words := written(cmd); first == nil {
			first = words
		}
		return lostReply()
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		require.NotNil(t, first)
		require.NoError(t, client.Do(t.Context(), first...).Err())
	}
}

// A proxy delivers a copy of an attempt when its waiter has left. The copy enters
// the queue again, and is granted the lock; the message of that is lost.
func TestWaitAcquire_aLateCopyOfAnAttemptCostsOthersASecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b, c := m.lock(t), m.lock(t, way), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		deliver := m.capture(t, way, func(cmd redis.Cmder) bool { return isAcquire(cmd) && keys(cmd) == 3 })
		waiting := waitFor(ctx, b, "42", time.Hour)
		pass(time.Millisecond) // A new subscription makes everybody look.
		synctest.Wait()
		leave()
		require.Error(t, (<-waiting).err)
		synctest.Wait()
		require.Empty(t, m.queued(t))

		deliver()
		way.mute(isSubscriber)
		require.Len(t, m.queued(t), 1)
		next := waitFor(t.Context(), c, "42", time.Hour)
		synctest.Wait()
		require.NoError(t, a.Release(t.Context(), lease))
		got := <-next
		require.NoError(t, got.err)
		require.Less(t, got.after, 1100*time.Millisecond)
	})
}

// The copy arrives when a later attempt has got the lock and the line was dropped,
// or when the line waits again with another entry.
func TestWaitAcquire_aLateCopyOfAnAttemptThatWasRepeatedLeavesTheQueue(t *testing.T) {
	for _, waitsAgain := range []bool{false, true} {
		bubble(t, func(t *testing.T, m *mini) {
			way := new(link)
			a, b := m.lock(t), m.lock(t, way)
			lease := mustAcquire(t, a, "42", time.Hour)
			deliver := m.capture(t, way, func(cmd redis.Cmder) bool { return isAcquire(cmd) && keys(cmd) == 3 })
			first := waitFor(t.Context(), b, "42", time.Hour)
			pass(time.Millisecond)
			synctest.Wait()
			way.beforeScript(nil)
			require.NoError(t, a.Release(t.Context(), lease))
			r := <-first
			require.NoError(t, r.err)
			require.NoError(t, b.Release(t.Context(), r.lease))
			mustAcquire(t, a, "42", time.Hour)
			ctx, leave := context.WithCancel(t.Context())
			defer leave()
			if waitsAgain {
				waitFor(ctx, b, "42", time.Hour)
				synctest.Wait()
			}
			deliver()
			require.NotEmpty(t, m.queued(t))
			leave()
			pass(1100 * time.Millisecond)
			require.Empty(t, m.queued(t))
		})
	}
}

// The copy of a release grants the lock to another member, and enters its own into
// the queue for waiters that have left.
func TestRelease_aLateCopyOfItLeavesTheQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		require.NoError(t, a.Release(t.Context(), mustAcquire(t, a, "loads the scripts", time.Hour)))
		lease := mustAcquire(t, b, "42", time.Hour)
		next := inLine(t.Context(), t, m, a, time.Hour)
		ctx, leave := context.WithCancel(t.Context())
		inLine(ctx, t, m, b, time.Hour)
		require.Len(t, m.queued(t), 2)
		deliver := m.capture(t, way, isRelease)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		require.Error(t, b.Release(gone, lease))
		leave()
		pass(5 * time.Second)
		require.Len(t, m.queued(t), 1, "the waiters of b have left")
		deliver()
		require.NoError(t, (<-next).err)
		require.Len(t, m.queued(t), 1, "the copy has entered b")
		pass(1100 * time.Millisecond)
		require.Empty(t, m.queued(t))
	})
}

// A message goes to every waiting process of the namespace, so a release for no
// waiter sends one only to clients that do not know of the queue.
func TestRelease_isPublishedOnlyWhereAClientKnowsNoQueue(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		all := m.client(t).PSubscribe(t.Context(), "*")
		defer func() { _ = all.Close() }()
		_, err := all.Receive(t.Context())
		require.NoError(t, err)
		messages := all.Channel()
		a, b := m.lock(t), m.lock(t)
		mustAcquire(t, a, "42", time.Hour)
		inLine(t.Context(), t, m, b, time.Hour)
		synctest.Wait()
		require.Empty(t, messages)
		free := func() {
			require.NoError(t, a.Release(t.Context(), mustAcquire(t, a, "free", time.Hour)))
			synctest.Wait()
		}
		free()
		require.Empty(t, messages)
		listener(t, m)
		free()
		require.Len(t, messages, 1)
	})
}

// A lease was granted by a message, so the waiters behind its holder are not in the
// queue. It is released by another Lock, which does not know of them.
func TestRelease_byAnotherLockWakesTheWaitersBehindTheHolder(t *testing.T) {
	for name, release := range map[string]func(t *testing.T, b *redfour.Lock, lease *redfour.Lease) error{
		"a copy of the lease": func(t *testing.T, b *redfour.Lock, lease *redfour.Lease) error {
			return b.Release(t.Context(), &redfour.Lease{ID: lease.ID, Index: lease.Index, Token: lease.Token})
		},
		"the lease itself": func(t *testing.T, b *redfour.Lock, lease *redfour.Lease) error {
			return b.Release(t.Context(), lease)
		},
		"by force": func(t *testing.T, b *redfour.Lock, lease *redfour.Lease) error {
			return b.ForceRelease(t.Context(), lease.ID, lease.Index)
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				a, b := m.lock(t), m.lock(t)
				lease := mustAcquire(t, b, "42", time.Hour)
				first := inLine(t.Context(), t, m, a, time.Hour)
				second := inLine(t.Context(), t, m, a, time.Hour)
				require.NoError(t, b.Release(t.Context(), lease))
				r := <-first
				require.NoError(t, r.err)
				synctest.Wait()
				require.Empty(t, m.queued(t))
				require.NoError(t, release(t, b, r.lease))
				r = <-second
				require.NoError(t, r.err)
				require.Less(t, r.after, time.Second)
			})
		})
	}
}

// The message of the grant was lost, so it was found by asking. Nothing of its id is
// left some seconds later, though its ttl is an hour.
func TestWaitAcquire_aGrantThatWasFoundIsRememberedForSeconds(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Hour)
		way.mute(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Less(t, r.after, 5*time.Second, "found when the subscription was replaced")
		pass(21 * time.Second)
		require.Zero(t, m.PubSubNumSub("lock-release")["lock-release"], "the subscription rests")
	})
}

// The message comes when nothing of its id is left: it is too old to be believed.
func TestWaitAcquire_anOldMessageOfAGrantEndsNothing(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		mustAcquire(t, b, "other", time.Hour)
		other := waitFor(t.Context(), b, "other", time.Hour) // keeps the subscription
		synctest.Wait()
		lease := mustAcquire(t, a, "42", 3*time.Second)
		got := inLine(t.Context(), t, m, b, time.Hour)
		pass(time.Until(lease.Deadline()) - 50*time.Millisecond)
		resume := way.holdUp(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err, "found when the holder's lease should have ended")
		pass(15 * time.Second)
		resume()
		synctest.Wait()
		require.Equal(t, r.lease.Token, m.HGet("lock:42", "token"))
		require.Empty(t, other)
	})
}

// A queue refuses entries where Redis is full. The Lock then waits without queues, over another
// subscription. A grant may be on its way over the one that it gives up.
func TestWaitAcquire_aGrantIsFoundWhenTheQueueRefusesAnEntry(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		mustAcquire(t, a, "43", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Hour)
		pass(100 * time.Millisecond)
		require.Len(t, m.queued(t), 1)
		way.mute(isSubscriber)
		require.NoError(t, a.Release(t.Context(), lease))
		require.NoError(t, m.Set("lock-waiters:43", "is no list"))
		waitFor(t.Context(), b, "43", time.Hour)
		pass(2 * time.Second)
		require.Len(t, got, 1)
		require.NoError(t, (<-got).err)
	})
}

// A release by another Lock grants the lock to a member that is queued. Its release
// must not leave the waiters behind that are not in the queue.
func TestRelease_byAnotherLockWakesTheWaitersBehindTheHolderThoughItGrants(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b, c := m.lock(t), m.lock(t), m.lock(t)
		lease := mustAcquire(t, b, "42", time.Hour)
		first := inLine(t.Context(), t, m, a, time.Hour)
		second := inLine(t.Context(), t, m, a, time.Hour)
		require.NoError(t, b.Release(t.Context(), lease))
		r := <-first
		require.NoError(t, r.err)
		granted := inLine(t.Context(), t, m, c, time.Hour)
		require.Len(t, m.queued(t), 1)
		require.NoError(t, b.Release(t.Context(), r.lease))
		r = <-granted
		require.NoError(t, r.err)
		pass(10 * time.Millisecond)
		require.NoError(t, c.Release(t.Context(), r.lease))
		r = <-second
		require.NoError(t, r.err)
		require.Less(t, r.after, time.Second)
	})
}
