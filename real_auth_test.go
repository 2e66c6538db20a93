//go:build unix

package redfour_test

import (
	"context"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// rotating makes a client of the user "app" whose password is the provider's, and
// a function that makes the server take another, and ends the user's connections.
func (r *realRedis) rotating(t *testing.T, way *link) (client *redis.Client, provided *atomic.Pointer[string], rotate func(to string)) {
	t.Helper()
	provided = new(atomic.Pointer[string])
	provided.Store(new("first"))
	r.do(t, "ACL", "SETUSER", "app", "reset", "on", ">first", "~*", "&*", "+@all")
	o := r.options(way)
	o.CredentialsProvider = func() (string, string) { return "app", *provided.Load() }
	return newClient(t, o, way), provided, func(to string) {
		r.do(t, "ACL", "SETUSER", "app", "resetpass", ">"+to)
		r.do(t, "CLIENT", "KILL", "USER", "app")
	}
}

// The member waits while the server has another password already, and its
// subscription is killed. A moment after the provider has that password as well, the
// member is in the queue, and hears of releases.
func TestRealRotation_theSubscriptionIsBackSoonAfterThePassword(t *testing.T) {
	r := startReal(t)
	way := new(link)
	client, provided, rotate := r.rotating(t, way)
	var out syncBuffer
	l := newLock(t, client, redfour.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
	holder := r.lock(t)
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := waitFor(t.Context(), l, "42", time.Minute)
	eventually(t, func() bool { return r.admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "queued")

	rotate("second")
	refused := way.subscriptions()
	eventually(t, func() bool { return r.refusedLogins(t) >= 5 }, "refused again and again")
	require.Equal(t, refused, way.subscriptions())
	provided.Store(new("second"))
	right := time.Now()
	eventually(t, func() bool { return l.Stats().Subscriptions == 2 }, "subscribed again")
	require.Less(t, time.Since(right), 3*time.Second)
	eventually(t, func() bool { return r.admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "queued")
	require.NoError(t, holder.Release(t.Context(), lease))
	released := time.Now()
	lease = takeLease(t, got)
	require.Less(t, time.Since(released), time.Second)
	require.Contains(t, lease.Token, ":", "it was granted out of the queue")
	require.NoError(t, l.Release(t.Context(), lease))

	require.EqualValues(t, 1, l.Stats().Unauthenticated)
	require.EqualValues(t, 1, l.Stats().SubscriptionsLost)
	require.Equal(t, 1, strings.Count(out.String(), "refuses the password"), out.String())
	require.NotContains(t, out.String(), "cannot queue")
}

// refusedLogins returns how often the server has refused a password.
func (r *realRedis) refusedLogins(t *testing.T) (n int64) {
	t.Helper()
	log, err := r.admin.ACLLog(t.Context(), 100).Result()
	require.NoError(t, err)
	for _, entry := range log {
		if entry.Reason == "auth" {
			n += entry.Count
		}
	}
	return n
}

// The right password is there 300 ms after the server wants it.
func TestRealRotation_callsOfThatMomentSucceed(t *testing.T) {
	for op, call := range map[string]func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error{
		"acquire": func(ctx context.Context, l *redfour.Lock, _ *redfour.Lease) error {
			_, err := l.Acquire(ctx, "7", time.Minute)
			return err
		},
		"wait": func(ctx context.Context, l *redfour.Lock, _ *redfour.Lease) error {
			_, err := l.WaitAcquire(ctx, "7", time.Minute)
			return err
		},
		"renew": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error {
			return l.Renew(ctx, lease, time.Minute)
		},
		"release": func(ctx context.Context, l *redfour.Lock, lease *redfour.Lease) error { return l.Release(ctx, lease) },
	} {
		t.Run(op, func(t *testing.T) {
			t.Parallel()
			r := startReal(t)
			client, provided, rotate := r.rotating(t, new(link))
			l := newLock(t, client)
			lease := mustAcquire(t, l, "42", time.Minute)
			rotate("second")
			start := time.Now()
			time.AfterFunc(300*time.Millisecond, func() { provided.Store(new("second")) })
			require.NoError(t, call(t.Context(), l, lease))
			require.Greater(t, time.Since(start), 300*time.Millisecond)
			require.Less(t, time.Since(start), 3*time.Second)
			require.Positive(t, r.refusedLogins(t))
			if op == "release" {
				require.Empty(t, r.locks(t))
			}
		})
	}
}
