//go:build unix

package redfour_test

import (
	"context"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// A lease that the replica has received survives the death of the master: it is kept
// alive, somebody waits for it all the time, and its release wakes him.
func TestFailover_waitsAndRenewalsSurviveACrash(t *testing.T) {
	sentinel := redistest.StartFailover(t)
	client := sentinel.Client(t)
	holder, waiter := newLock(t, client), newLock(t, sentinel.Client(t))
	lease := mustAcquire(t, holder, "42", 30*time.Second)
	require.EqualValues(t, 1, client.Do(t.Context(), "WAIT", 1, 10_000).Val())
	kept, stop := holder.KeepAlive(t.Context(), lease)
	defer stop()
	got := waitFor(t.Context(), waiter, "42", time.Minute)
	awaitSubscriber(t, client)

	sentinel.Crash()
	require.NoError(t, holder.Renew(t.Context(), lease, 30*time.Second))
	require.NoError(t, kept.Err())
	require.Empty(t, got)
	require.NoError(t, holder.Release(t.Context(), lease))
	released := time.Now()
	next := takeLease(t, got)
	require.Less(t, time.Since(released), 15*time.Second, "well before the ttl")
	require.Greater(t, next.Index, lease.Index)
	require.NoError(t, waiter.Release(t.Context(), next))
}

// After a failover that nobody died of, the old master keeps its subscribers for some
// time, and nobody releases anything there.
func TestFailover_subscriptionFollowsTheMaster(t *testing.T) {
	sentinel := redistest.StartSentinels(t, 2, 3, time.Second)
	client := sentinel.Client(t)
	lease := mustAcquire(t, newLock(t, client), "42", time.Minute)
	got := waitFor(t.Context(), newLock(t, sentinel.Client(t)), "42", time.Minute)
	awaitSubscriber(t, client)
	require.EqualValues(t, 2, client.Do(t.Context(), "WAIT", 2, 10_000).Val())

	sentinel.Failover()
	after := sentinel.Client(t) // knows the new master from the start
	awaitSubscriber(t, after)
	followed := time.Now()
	require.NoError(t, newLock(t, after).Release(t.Context(), lease))
	takeLease(t, got)
	require.Less(t, time.Since(followed), 5*time.Second)
}

// The channel that tells where the subscription is may be refused.
func TestFailover_userWithReleaseChannelAloneIsWoken(t *testing.T) {
	sentinel := redistest.StartFailover(t)
	admin := sentinel.Client(t)
	require.NoError(t, admin.Do(t.Context(), "ACL", "SETUSER", "app", "on", "nopass", "~*", "&lock-release", "+@all").Err())
	o := sentinel.Options()
	o.Username, o.Password = "app", "any"
	client := redis.NewFailoverClient(o)
	t.Cleanup(func() { _ = client.Close() })
	holder := newLock(t, admin)
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := waitFor(t.Context(), newLock(t, client), "42", time.Minute)
	awaitSubscriber(t, admin)
	require.NoError(t, holder.Release(t.Context(), lease))
	r := take(t, got)
	require.NoError(t, r.err)
	require.Less(t, r.after, 15*time.Second, "well before the ttl")
}

// awaitSubscriber returns when somebody has subscribed to the release channel.
func awaitSubscriber(t *testing.T, client *redis.Client) {
	t.Helper()
	eventually(t, func() bool {
		return client.PubSubNumSub(t.Context(), "lock-release").Val()["lock-release"] > 0
	}, "subscribed")
}

func TestFailoverTable(t *testing.T) {
	sentinel := redistest.StartFailover(t)
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			row.run(t, site{func(t *testing.T, via ...*link) redis.UniversalClient {
				client := redis.NewFailoverClient(sentinel.Options())
				t.Cleanup(func() { _ = client.Close() })
				for _, l := range via {
					client.AddHook(l)
				}
				return client
			}, plainNames, true})
		})
	}
}

// A replica may not have heard of the lease yet, so it must not deny it.
func TestFailoverReplica_doesNotDenyALease(t *testing.T) {
	replica := redistest.StartFailover(t).Replica()
	l := newLock(t, newClient(t, replica.Options()))
	lease := &redfour.Lease{ID: "42", Index: 1, Token: "t", TTL: time.Minute}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	for _, err := range []error{l.Renew(ctx, lease, time.Minute), l.Release(ctx, lease)} {
		require.Error(t, err)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
	}
	require.ErrorContains(t, l.Renew(t.Context(), lease, time.Minute), "READONLY")
}
