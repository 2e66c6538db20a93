package redfour_test

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

type valueKey struct{}

// withValue returns a context whose value hooks can see.
func withValue(ctx context.Context, value string) context.Context {
	return context.WithValue(ctx, valueKey{}, value)
}

// acquireValues collects the value that each acquire script carries past the link.
func acquireValues(way *link) (values func() []any) {
	var mu sync.Mutex
	var seen []any
	way.beforeScript(func(ctx context.Context, cmd redis.Cmder) error {
		mu.Lock()
		defer mu.Unlock()
		if isAcquire(cmd) {
			seen = append(seen, ctx.Value(valueKey{}))
		}
		return nil
	})
	return func() []any {
		mu.Lock()
		defer mu.Unlock()
		return seen
	}
}

// A hook that makes spans finds the caller's there.
func TestWaitAcquire_firstAttemptCarriesTheValuesOfTheCaller(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		values := acquireValues(way)
		l := m.lock(t, way)
		mustAcquire(t, m.lock(t), "another", time.Minute) // Redis knows the script then.
		lease, err := l.WaitAcquire(withValue(t.Context(), "wait"), "42", time.Minute)
		require.NoError(t, err)
		require.NoError(t, l.Release(t.Context(), lease))
		err = l.WithLock(withValue(t.Context(), "section"), "42", time.Minute,
			func(context.Context, *redfour.Lease) error { return nil })
		require.NoError(t, err)
		require.Equal(t, []any{"wait", "section"}, values())
	})
}

// The attempts after the first belong to the line, and so do those of who comes later.
func TestWaitAcquire_laterAttemptsCarryNoValues(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		values := acquireValues(way)
		l := m.lock(t, way)
		held := mustAcquire(t, m.lock(t), "42", 3*time.Second)
		first := waitFor(withValue(t.Context(), "first"), l, "42", time.Minute)
		pass(time.Second)
		second := waitFor(withValue(t.Context(), "second"), l, "42", time.Minute)
		pass(5 * time.Second) // The lease of the holder ends.
		require.NoError(t, l.Release(t.Context(), (<-first).lease))
		pass(time.Second)
		require.Greater(t, (<-second).lease.Index, held.Index)
		got := values()
		require.Equal(t, "first", got[0])
		for _, value := range got[1:] {
			require.Nil(t, value)
		}
		require.Greater(t, len(got), 1)
	})
}

// A line may outlast its waiters: it leaves the queue. Who comes then is the first to wait again.
func TestWaitAcquire_carriesValuesInALineThatIsLeft(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, m.lock(t), "42", time.Hour)
		ctx, cancel := context.WithCancel(withValue(t.Context(), "gone"))
		gone := waitFor(ctx, l, "42", time.Minute)
		pass(time.Second)
		leaving := make(chan struct{})
		values := acquireValues(way)
		collect := way.before
		way.beforeScript(func(ctx context.Context, cmd redis.Cmder) error {
			if isLeave(cmd) {
				<-leaving
			}
			return collect(ctx, cmd)
		})
		cancel()
		require.ErrorIs(t, (<-gone).err, redfour.ErrLocked)
		pass(time.Millisecond)
		ctx, cancel = context.WithCancel(withValue(t.Context(), "next"))
		next := waitFor(ctx, l, "42", time.Minute)
		pass(time.Millisecond)
		close(leaving)
		pass(time.Millisecond)
		require.Equal(t, []any{"next"}, values())
		cancel()
		require.ErrorIs(t, (<-next).err, redfour.ErrLocked)
	})
}

// An attempt belongs to the line: another waiter may be served by it.
func TestWaitAcquire_attemptOutlivesTheCallerWhoseValuesItCarries(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		mustAcquire(t, m.lock(t), "another", time.Minute) // Redis knows the script then.
		reached, goOn := make(chan context.Context, 1), make(chan struct{})
		way.beforeScript(func(ctx context.Context, cmd redis.Cmder) error {
			if isAcquire(cmd) {
				reached <- ctx
				<-goOn
			}
			return nil
		})
		ctx, cancel := context.WithCancel(withValue(t.Context(), "first"))
		first := waitFor(ctx, l, "42", time.Minute)
		attempt := <-reached
		second := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Millisecond)
		cancel()
		require.ErrorIs(t, (<-first).err, context.Canceled)
		require.NoError(t, attempt.Err())
		require.Equal(t, "first", attempt.Value(valueKey{}))
		way.beforeScript(nil)
		close(goOn)
		got := <-second
		require.NoError(t, got.err)
		require.Equal(t, 1, way.sent(), "the attempt that was made for the first")
	})
}
