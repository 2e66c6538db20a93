package redfour_test

import (
	"bytes"
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/auth"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// passwordRefusals are what servers say to a password that is wrong or missing.
var passwordRefusals = []string{
	"NOAUTH Authentication required.",
	"WRONGPASS invalid username-password pair or user is disabled.",
	"ERR Protocol error: unauthenticated multibulk length",
	"ERR invalid password",
	"ERR AUTH failed: WRONGPASS invalid username-password pair",
}

func TestCalls_aWrongPasswordIsAnErrorAfterFiveSeconds(t *testing.T) {
	for _, trouble := range passwordRefusals {
		for op, call := range map[string]func(context.Context, *redfour.Lock, *redfour.Lease) error{
			"acquire": func(ctx context.Context, l *redfour.Lock, _ *redfour.Lease) error {
				_, err := l.Acquire(ctx, "42", time.Minute)
				return err
			},
			"wait for": func(ctx context.Context, l *redfour.Lock, _ *redfour.Lease) error {
				_, err := l.WaitAcquire(ctx, "42", time.Minute)
				return err
			},
			"renew": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error {
				return l.Renew(ctx, lease, time.Minute)
			},
			"release": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error {
				return l.Release(ctx, lease)
			},
		} {
			t.Run(op, func(t *testing.T) {
				bubble(t, func(t *testing.T, m *mini) {
					way := new(link)
					l := m.lock(t, way)
					lease := mustAcquire(t, l, "7", time.Minute)
					m.SetError(trouble)
					sent, start := way.sent(), time.Now()
					err := call(t.Context(), l, lease)
					require.ErrorContains(t, err, trouble)
					require.NotContains(t, err.Error(), "unknown", "nothing ran")
					require.InDelta(t, 5*time.Second, time.Since(start), float64(500*time.Millisecond))
					require.Less(t, way.sent()-sent, 30)
					require.EqualValues(t, 1, l.Stats().Unauthenticated)
				})
			})
		}
	}
}

// Whatever the waiters of one id were told before, each gets the error, and one
// that comes later has time of its own.
func TestWaitAcquire_aWrongPasswordEndsEveryWait(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, holder := m.lock(t), m.lock(t)
		mustAcquire(t, holder, "42", time.Hour)
		got := []<-chan acquired{waitFor(t.Context(), l, "42", time.Minute), waitFor(t.Context(), l, "42", time.Minute)}
		pass(10 * time.Second)
		m.SetError("WRONGPASS x")
		for _, c := range got {
			r := <-c
			require.ErrorContains(t, r.err, "WRONGPASS")
			require.Less(t, r.after, 46*time.Second, "5 s after the next look, which is 30 s after the last")
		}
		r := <-waitFor(t.Context(), l, "42", time.Minute)
		require.ErrorContains(t, r.err, "WRONGPASS")
		require.Equal(t, 5*time.Second, r.after.Truncate(time.Second))
	})
}

func TestWaitAcquire_aProvidersPasswordMayBeRightAtAnyTime(t *testing.T) {
	for name, provide := range providers {
		bubble(t, func(t *testing.T, m *mini) {
			m.RequireUserAuth("app", "new")
			var word atomic.Pointer[string]
			word.Store(new("old"))
			o := m.client(t).Options()
			provide(o, func() string { return *word.Load() })
			l := newLock(t, newClient(t, o))

			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			r := <-waitFor(ctx, l, "7", time.Minute)
			require.ErrorContains(t, r.err, "WRONGPASS", name)
			require.Equal(t, time.Minute, r.after, name)

			got := waitFor(t.Context(), l, "42", time.Minute)
			pass(time.Hour)
			word.Store(new("new"))
			right := time.Now()
			require.NoError(t, (<-got).err, name)
			require.LessOrEqual(t, time.Since(right), 3*time.Second, name)
			require.EqualValues(t, 1, l.Stats().Unauthenticated, "one outage, however many attempts")
		})
	}
}

// providers are the ways in which an application yields its password.
var providers = map[string]func(o *redis.Options, password func() string){
	"function": func(o *redis.Options, password func() string) {
		o.CredentialsProvider = func() (string, string) { return "app", password() }
	},
	"function with a context": func(o *redis.Options, password func() string) {
		o.CredentialsProviderContext = func(context.Context) (string, string, error) { return "app", password(), nil }
	},
	"stream": func(o *redis.Options, password func() string) {
		o.StreamingCredentialsProvider = stream{password}
	},
}

// A right that is refused is asked for again over the same connection, so that no
// message is missed.
func TestSubscription_asksAgainForARightThatWasRefused(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		var asked atomic.Int64
		m.Server().SetPreHook(func(c *server.Peer, cmd string, args ...string) bool {
			if cmd != "SUBSCRIBE" || !strings.Contains(strings.Join(args, " "), "lock-grant:") {
				return false
			}
			asked.Add(1)
			c.WriteError("NOPERM No permissions to access a channel")
			return true
		})
		got := waitFor(t.Context(), b, "42", time.Hour)
		pass(100 * time.Second)
		require.EqualValues(t, 4, asked.Load(), "at once, and every 30 s")
		require.Empty(t, m.queued(t))

		m.Server().SetPreHook(nil)
		pass(30 * time.Second)
		require.Len(t, m.queued(t), 1)
		require.EqualValues(t, 1, b.Stats().Subscriptions, "no message was missed")
		require.NoError(t, a.Release(t.Context(), lease))
		synctest.Wait()
		r := <-got
		require.NoError(t, r.err)
		require.Contains(t, r.lease.Token, ":", "it was granted out of the queue")
	})
}

// A user who may use the queue later than the rest waits in it soon after.
func TestWaitAcquire_asksAgainForAQueueThatWasRefused(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		var out bytes.Buffer
		a := m.lock(t)
		b := newLock(t, m.client(t), redfour.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
		lease := mustAcquire(t, a, "42", time.Hour)
		m.Server().SetPreHook(func(c *server.Peer, cmd string, args ...string) bool {
			refuses := strings.HasPrefix(cmd, "EVAL") && slices.Contains(args, "lock-waiters:42")
			if refuses {
				c.WriteError("NOPERM No permissions to access a key")
			}
			return refuses
		})
		got := waitFor(t.Context(), b, "42", time.Hour)
		pass(100 * time.Second)
		require.Empty(t, m.queued(t))
		synctest.Wait()
		require.Equal(t, 1, strings.Count(out.String(), "cannot queue"), out.String())

		m.Server().SetPreHook(nil)
		pass(32 * time.Second)
		require.Len(t, m.queued(t), 1)
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.Contains(t, r.lease.Token, ":", "it was granted out of the queue")
	})
}

// A user who may not subscribe to anything may do so later.
func TestSubscription_asksAgainWhereEveryChannelWasRefused(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		mustAcquire(t, a, "42", time.Hour)
		m.Server().SetPreHook(func(c *server.Peer, cmd string, _ ...string) bool {
			if cmd == "SUBSCRIBE" {
				c.WriteError("NOPERM No permissions to access a channel")
			}
			return cmd == "SUBSCRIBE"
		})
		ctx, cancel := context.WithCancel(t.Context())
		got := waitFor(ctx, b, "42", time.Hour)
		pass(40 * time.Second)
		m.Server().SetPreHook(nil)
		pass(30 * time.Second)
		require.Len(t, m.queued(t), 1)
		cancel()
		<-got
	})
}

// A stream yields the password that is right when a connection is made.
type stream struct{ password func() string }

func (s stream) Subscribe(auth.CredentialsListener) (auth.Credentials, auth.UnsubscribeFunc, error) {
	return auth.NewBasicCredentials("app", s.password()), func() error { return nil }, nil
}
