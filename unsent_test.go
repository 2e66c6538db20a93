package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A breaker is a Limiter that refuses while it is open.
type breaker struct {
	open  atomic.Bool
	asked atomic.Int64 // while it was open
}

var errOpen = errors.New("circuit open")

func (b *breaker) Allow() error {
	if !b.open.Load() {
		return nil
	}
	b.asked.Add(1)
	return errOpen
}

func (b *breaker) ReportResult(error) {}

func TestAcquire_returnsAtOnceWhatALimiterRefuses(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		o, b := m.client(t).Options(), new(breaker)
		o.Limiter = b
		l := newLock(t, newClient(t, o))
		mustAcquire(t, l, "7", time.Minute)
		b.open.Store(true)
		start := time.Now()
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, errOpen)
		require.NotContains(t, err.Error(), "unknown", "nothing ran")
		require.Zero(t, time.Since(start))
		pass(time.Minute)
		require.EqualValues(t, 1, b.asked.Load(), "nothing is to be cleared up")
	})
}

// What must not stay behind, and who waits, tries again after growing pauses.
func TestCalls_outlastALimiterThatRefuses(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		o, b := m.client(t).Options(), new(breaker)
		o.Limiter = b
		l := newLock(t, newClient(t, o))
		lease := mustAcquire(t, l, "7", time.Minute)
		kept := mustAcquire(t, l, "8", time.Minute)
		b.open.Store(true)
		time.AfterFunc(3*time.Second, func() { b.open.Store(false) })
		got := waitFor(t.Context(), l, "42", time.Minute)
		var calls sync.WaitGroup
		calls.Go(func() { require.NoError(t, l.Release(t.Context(), lease)) })
		calls.Go(func() { require.NoError(t, l.Renew(t.Context(), kept, time.Hour)) })
		calls.Wait()
		require.NoError(t, (<-got).err)
		require.False(t, m.Exists("lock:7"))
		require.Less(t, b.asked.Load(), int64(40), "of three calls")
	})
}

// A call knows whether go-redis has begun to write it, whatever the error is.
func TestAcquire_anErrorBeforeItIsWrittenMeansThatNothingRan(t *testing.T) {
	errOwn := errors.New("an error of the client's own")
	for name, spoil := range map[string]func(o *redis.Options, way *link){
		"hook": func(_ *redis.Options, way *link) {
			way.beforeScript(func(context.Context, redis.Cmder) error { return errOwn })
		},
		"dialer": func(o *redis.Options, _ *link) {
			o.DialerRetries = 1 // A call that is given up while the client dials is of unknown outcome.
			o.Dialer = func(context.Context, string, string) (net.Conn, error) { return nil, errOwn }
		},
		"connect": func(o *redis.Options, _ *link) {
			o.OnConnect = func(context.Context, *redis.Conn) error { return errOwn }
		},
		"provider": func(o *redis.Options, _ *link) {
			o.CredentialsProviderContext = func(context.Context) (string, string, error) { return "", "", errOwn }
		},
	} {
		for _, calls := range []int{1, 20} { // alone, and in batches
			bubble(t, func(t *testing.T, m *mini) {
				o, way := m.client(t).Options(), new(link)
				spoil(o, way)
				l := newLock(t, newClient(t, o, way))
				start := time.Now()
				var all sync.WaitGroup
				for range calls {
					all.Go(func() {
						_, err := l.Acquire(t.Context(), "42", time.Minute)
						require.ErrorIs(t, err, errOwn, name)
						require.NotContains(t, err.Error(), "unknown", name)
						require.NotErrorIs(t, err, context.DeadlineExceeded, name)
					})
				}
				all.Wait()
				require.InDelta(t, 5, time.Since(start).Seconds(), 0.6, name)
				synctest.Wait()
				sent := way.sent()
				pass(time.Minute)
				require.Equal(t, sent, way.sent(), "%s: nothing is to be cleared up", name)
			})
		}
	}
}

// An impatientHook returns an error while the rest of the client is still to work, as a
// hook with a timeout of its own may.
type impatientHook struct {
	redis.Hook // nil: not called

	later   chan struct{} // closed when the rest goes on
	working *sync.WaitGroup
}

var errImpatient = errors.New("a timeout of the hook's own")

func (h impatientHook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h impatientHook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (h impatientHook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if cmd.Name() != "evalsha" {
			return next(ctx, cmd)
		}
		h.working.Go(func() {
			<-h.later
			_ = next(context.WithoutCancel(ctx), cmd)
		})
		return errImpatient
	}
}

// A call of which it was said that nothing ran does not run later either.
func TestAcquire_whatAHookLeavesBehindIsNotWritten(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Minute)))
		h := impatientHook{later: make(chan struct{}), working: new(sync.WaitGroup)}
		client.AddHook(h)
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, errImpatient)
		require.NotContains(t, err.Error(), "unknown")
		pass(10 * time.Second)
		close(h.later)
		h.working.Wait()
		require.False(t, m.Exists("lock:42"))
	})
}

// What the doc of New promises to hooks.
func TestNew_hooksSeeCommandsByTheirMethods(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		seen := make(map[string]bool)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			require.Equal(t, "evalsha", cmd.Name())
			require.Regexp(t, "^[0-9a-f]{40}$", fmt.Sprint(cmd.Args()[1]))
			require.Contains(t, cmd.String(), fmt.Sprintf("evalsha %v 2 lock:42 lockindex 60000 ", cmd.Args()[1]))
			require.NoError(t, cmd.Err())
			reply, err := cmd.(interface{ Result() (any, error) }).Result()
			require.NoError(t, err)
			require.NotNil(t, reply)
			seen[fmt.Sprint(cmd.Args()[1])] = true
			return nil
		})
		_, err := m.lock(t).Acquire(t.Context(), "7", time.Minute) // The server knows the script from now on.
		require.NoError(t, err)
		mustAcquire(t, l, "42", time.Minute)
		require.Len(t, seen, 1)
	})
}
