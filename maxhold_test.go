package redfour_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestWithMaxHold_isValidated(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		for _, d := range []time.Duration{-time.Second, 0, time.Millisecond - 1} {
			_, err := redfour.New(m.client(t), redfour.WithMaxHold(d))
			require.EqualError(t, err, "redfour: new: bound of "+d.String()+" on the hold is shorter than 1ms")
		}
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithMaxHold(time.Minute))
		_, err := l.Acquire(t.Context(), "42", time.Minute+1)
		require.EqualError(t, err, `redfour: acquire "42": ttl 1m0.000000001s is longer than the bound of 1m0s on the hold`)
		err = l.WithLock(t.Context(), "42", time.Hour, func(context.Context, *redfour.Lease) error { return nil })
		require.EqualError(t, err, `redfour: wait for "42": ttl 1h0m0s is longer than the bound of 1m0s on the hold`)
		require.Zero(t, way.sent())
		mustAcquire(t, l, "42", time.Minute)
	})
}

// A section hangs. Its context ends just before its lease does, at the bound, and the
// next waiter then has the lock, while the section still runs.
func TestWithMaxHold_endsASectionThatHangs(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way, gate := new(link), make(chan struct{})
		l, other := newLock(t, m.client(t, way), redfour.WithMaxHold(10*time.Second)), m.lock(t)
		mustAcquire(t, l, "the server knows the scripts", time.Second)
		began, ended := time.Now(), make(chan error, 1)
		sent := renewals(way)
		go func() {
			ended <- l.WithLock(t.Context(), "42", 3*time.Second, func(ctx context.Context, lease *redfour.Lease) error {
				<-ctx.Done()
				held := time.Since(began)
				require.LessOrEqual(t, held, 10*time.Second)
				require.Greater(t, held, 9990*time.Millisecond)
				require.Equal(t, lease.Deadline(), time.Now())
				require.LessOrEqual(t, m.TTL("lock:42"), 10*time.Second-held)
				require.True(t, m.Exists("lock:42"))
				require.ErrorIs(t, context.Cause(ctx), redfour.ErrMaxHold)
				require.ErrorIs(t, context.Cause(ctx), redfour.ErrNotHeld)
				require.NotErrorIs(t, context.Cause(ctx), redfour.ErrExpired)
				require.EqualError(t, context.Cause(ctx), `redfour: keep alive "42": lease held for as long as allowed (10s)`)
				<-gate
				return nil
			})
		}()
		synctest.Wait()
		next := waitFor(t.Context(), other, "42", time.Minute)
		r := take(t, next)
		require.NoError(t, r.err)
		require.Less(t, time.Since(began), 10*time.Second+20*time.Millisecond)
		s := time.Second
		require.Equal(t, []time.Duration{s, 2 * s, 3 * s, 4 * s, 5 * s, 6 * s, 7 * s, 8 * s, 9 * s}, sent())
		close(gate)
		err := <-ended
		require.ErrorIs(t, err, redfour.ErrMaxHold)
		require.NotErrorIs(t, err, redfour.ErrConflict, "said once")
		require.EqualValues(t, 1, l.Stats().Lost)
		require.NoError(t, other.Release(t.Context(), r.lease), "the section left it alone")
	})
}

// A section that returns when its context ends gives the lock back at once.
func TestWithMaxHold_theLeaseCanStillBeReleased(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second))
		err := l.WithLock(t.Context(), "42", 10*time.Second, func(ctx context.Context, _ *redfour.Lease) error {
			<-ctx.Done()
			return nil
		})
		require.ErrorIs(t, err, redfour.ErrMaxHold)
		require.False(t, m.Exists("lock:42"))
	})
}

// The loss of a lease that lasts up to the bound is noticed as before.
func TestWithMaxHold_noticesALossBefore(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second))
		began := time.Now()
		kept, stop := l.KeepAlive(t.Context(), mustAcquire(t, l, "42", 9*time.Second))
		defer stop()
		pass(4 * time.Second) // renewed at 3 s, for 7 s
		m.Del("lock:42")
		<-kept.Done()
		require.Equal(t, 6*time.Second, time.Since(began))
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
		require.NotErrorIs(t, context.Cause(kept), redfour.ErrMaxHold)
	})
}

func TestWithMaxHold_anOutageBeforeIsALossByItself(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithMaxHold(time.Minute))
		kept, stop := l.KeepAlive(t.Context(), mustAcquire(t, l, "42", 3*time.Second))
		defer stop()
		way.beforeScript(func(context.Context, redis.Cmder) error { return redis.ErrPoolTimeout })
		<-kept.Done()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
		require.NotErrorIs(t, context.Cause(kept), redfour.ErrMaxHold)
	})
}

func TestWithMaxHold_isSharedByThoseWhoKeepALeaseAlive(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		bounded, free := newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second)), m.lock(t)
		began := time.Now()
		lease := mustAcquire(t, bounded, "42", 3*time.Second)
		first, stop := bounded.KeepAlive(t.Context(), lease)
		defer stop()
		endless, stop := free.KeepAlive(t.Context(), lease)
		defer stop()
		pass(8 * time.Second)
		second, stop := bounded.KeepAlive(t.Context(), travel(t, lease))
		defer stop()
		<-first.Done()
		require.Greater(t, time.Since(began), 9990*time.Millisecond)
		<-second.Done()
		require.LessOrEqual(t, time.Since(began), 10*time.Second)
		require.ErrorIs(t, context.Cause(second), redfour.ErrMaxHold)

		third, stop := bounded.KeepAlive(t.Context(), lease)
		defer stop()
		synctest.Wait()
		require.ErrorIs(t, context.Cause(third), redfour.ErrMaxHold, "it cannot begin anew")
		pass(5 * time.Second)
		require.NoError(t, endless.Err(), "that Lock has no bound")
		require.Greater(t, m.TTL("lock:42"), 1900*time.Millisecond, "and renews for the whole ttl")
	})
}

// Nobody here knows when a lease was acquired elsewhere.
func TestWithMaxHold_countsFromTheFirstKeepAliveOfALeaseFromElsewhere(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		there, here := m.lock(t), newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second))
		arrived := travel(t, mustAcquire(t, there, "42", time.Hour))
		pass(time.Minute)
		began := time.Now()
		_, stop := here.KeepAlive(t.Context(), arrived)
		synctest.Wait()
		require.LessOrEqual(t, m.TTL("lock:42"), 10*time.Second)
		pass(5 * time.Second)
		stop()
		synctest.Wait()
		kept, stop := here.KeepAlive(t.Context(), arrived)
		defer stop()
		<-kept.Done()
		require.InDelta(t, 10*time.Second, time.Since(began), float64(11*time.Millisecond))
		require.ErrorIs(t, context.Cause(kept), redfour.ErrMaxHold)
	})
}

// A caller that renews by hand is there, and means it. The context ends all the same.
// A third of the ttl passes before the bound, so that another renewal is due.
func TestWithMaxHold_doesNotCutBackARenewalByHand(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second))
		lease := mustAcquire(t, l, "42", 3*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, 15*time.Second))
		<-kept.Done()
		require.Greater(t, m.TTL("lock:42"), 5*time.Second)
	})
}

func TestWithMaxHold_doesNotBoundARenewalByHand(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := newLock(t, m.client(t), redfour.WithMaxHold(10*time.Second))
		began := time.Now()
		lease := mustAcquire(t, l, "42", 3*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		<-kept.Done()
		require.Equal(t, 10*time.Second, time.Since(began))
		require.ErrorIs(t, context.Cause(kept), redfour.ErrMaxHold)
		require.Greater(t, m.TTL("lock:42"), 59*time.Minute)
		require.Greater(t, lease.Remaining(), 59*time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}
