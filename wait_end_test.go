package redfour_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// A lateCtx has ended some time before the caller that waits for it can run
// again: Err tells first, and Done is closed only if the test says so.
type lateCtx struct {
	context.Context //nolint:containedctx // It stands for that.

	done  chan struct{}
	ended atomic.Bool
	pause time.Duration // that the first call of Done takes; then it has ended
}

func newLateCtx(ctx context.Context) *lateCtx {
	return &lateCtx{Context: ctx, done: make(chan struct{})}
}

func (c *lateCtx) Done() <-chan struct{} {
	if c.pause > 0 && !c.ended.Load() {
		pass(c.pause)
		c.ended.Store(true)
		close(c.done)
	}
	return c.done
}

func (c *lateCtx) Err() error {
	if c.ended.Load() {
		return context.Canceled
	}
	return nil
}

func (c *lateCtx) Deadline() (time.Time, bool) { return time.Time{}, false }

// The caller whose ctx ended is not scheduled before the lease arrives.
func TestWaitAcquire_getsNoLeaseIfItsContextEndedBeforeTheRelease(t *testing.T) {
	for _, here := range []bool{false, true} {
		t.Run(fmt.Sprintf("holder in this process: %v", here), func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				other, l := m.lock(t), m.lock(t)
				holder := other
				if here {
					holder = l
				}
				held := mustAcquire(t, holder, "42", time.Minute)
				ctx := newLateCtx(t.Context())
				got := waitFor(ctx, l, "42", time.Minute)
				pass(time.Second)
				ctx.ended.Store(true)
				require.NoError(t, holder.Release(t.Context(), held))
				end := <-got
				require.Nil(t, end.lease)
				require.ErrorIs(t, end.err, context.Canceled)
				require.ErrorIs(t, end.err, redfour.ErrLocked)
				pass(time.Millisecond)
				next := mustAcquire(t, other, "42", time.Minute)
				require.NoError(t, other.Release(t.Context(), next))
				stats := l.Stats()
				require.EqualValues(t, 1, stats.Returned)
				require.EqualValues(t, 1, stats.TimedOut)
				require.Zero(t, stats.AfterWait)
			})
		})
	}
}

func TestWaitAcquire_passesOnTheLeaseThatItsContextEndedBefore(t *testing.T) {
	for _, ttl := range []time.Duration{time.Minute, time.Hour} {
		t.Run(ttl.String(), func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				other, l := m.lock(t), m.lock(t, way)
				held := mustAcquire(t, other, "42", time.Minute)
				ended := newLateCtx(t.Context())
				first := waitFor(ended, l, "42", time.Minute)
				pass(time.Second)
				second := waitFor(t.Context(), l, "42", ttl)
				pass(time.Second)
				third := waitFor(t.Context(), l, "42", time.Minute)
				pass(time.Second)
				ended.ended.Store(true)
				sent := way.sent()
				require.NoError(t, other.Release(t.Context(), held))
				require.ErrorIs(t, (<-first).err, redfour.ErrLocked)
				got := <-second
				require.NoError(t, got.err)
				require.EqualValues(t, 1, l.Stats().GrantsClaimed, "the same lease")
				require.Equal(t, ttl, got.lease.TTL)
				require.InDelta(t, counted(ttl), got.lease.Remaining(), float64(10*time.Millisecond))
				pass(time.Millisecond)
				if ttl == time.Minute { // Another ttl is a renewal.
					require.Equal(t, sent, way.sent())
				}
				require.Empty(t, third)
				require.NoError(t, l.Release(t.Context(), got.lease))
				last := <-third
				require.NoError(t, last.err)
				require.NoError(t, l.Release(t.Context(), last.lease))
				require.Zero(t, l.Stats().Returned)
			})
		})
	}
}

// Both are ready in the same moment, so that either may be seen first.
func TestWaitAcquire_getsNoLeaseIfItsContextEndedInTheSameMoment(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		for i := range 40 {
			id := fmt.Sprint(i)
			ctx := newLateCtx(t.Context())
			ctx.pause = time.Second
			_, err := l.WaitAcquire(ctx, id, time.Minute)
			require.ErrorIs(t, err, context.Canceled)
			require.NotErrorIs(t, err, redfour.ErrLocked, "nobody else had it")
			pass(time.Millisecond)
			mustAcquire(t, l, id, time.Minute)
		}
		require.EqualValues(t, 40, l.Stats().Returned)
		require.EqualValues(t, 40, l.Stats().TimedOut)
	})
}

// A section that is not to run leaves no lock behind.
func TestWithLock_doesNotRunIfItsContextEndedBeforeTheRelease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		other, l := m.lock(t), m.lock(t)
		held := mustAcquire(t, other, "42", time.Minute)
		ctx := newLateCtx(t.Context())
		done := make(chan error)
		go func() {
			done <- l.WithLock(ctx, "42", time.Minute, func(context.Context, *redfour.Lease) error {
				t.Error("it runs")
				return nil
			})
		}()
		pass(time.Second)
		ctx.ended.Store(true)
		require.NoError(t, other.Release(t.Context(), held))
		require.ErrorIs(t, <-done, context.Canceled)
		pass(time.Millisecond)
		mustAcquire(t, other, "42", time.Minute)
	})
}

// Only the end of the context takes the lease away, not that of the Lock.
func TestWaitAcquire_returnsTheLeaseThatItGotBeforeClose(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		ctx := newLateCtx(t.Context())
		ctx.pause = time.Second
		got := waitFor(keptOpen{ctx}, l, "42", time.Minute)
		pass(time.Millisecond)
		require.NoError(t, l.Close())
		end := <-got
		require.NoError(t, end.err)
		require.NoError(t, l.Release(t.Context(), end.lease))
	})
}

// keptOpen pauses as a lateCtx does, but does not end.
type keptOpen struct{ *lateCtx }

func (keptOpen) Err() error { return nil }

func (c keptOpen) Done() <-chan struct{} {
	_ = c.lateCtx.Done()
	return nil
}
