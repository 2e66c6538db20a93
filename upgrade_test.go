//go:build unix

package redfour_test

import (
	"context"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// A server is replaced, as by one of another version: a replica has its data, and is
// promoted under the same name. Leases that are held live on, and so do waits.
func TestRealUpgrade_aPromotedReplicaKeepsWhatIsHeld(t *testing.T) {
	old, replacement := redistest.Start(t), redistest.Start(t)
	admin := replacement.Client(t)
	require.NoError(t, old.Client(t).ConfigSet(t.Context(), "repl-diskless-sync-delay", "0").Err())
	replicate := func(host, port string) {
		require.NoError(t, admin.Do(t.Context(), "REPLICAOF", host, port).Err())
	}
	var addr atomic.Value // what the name stands for
	addr.Store(old.Addr())
	client := func() *redis.Client {
		return newClient(t, &redis.Options{
			Addr: "redis.internal:6379",
			Dialer: func(ctx context.Context, network, _ string) (net.Conn, error) {
				to, _ := addr.Load().(string)
				return new(net.Dialer).DialContext(ctx, network, to)
			},
		})
	}
	holder, waiting := newLock(t, client()), newLock(t, client())
	lease := mustAcquire(t, holder, "42", 3*time.Second)
	require.NoError(t, holder.Renew(t.Context(), lease, 3*time.Second)) // The old server knows the script.
	kept, stop := holder.KeepAlive(t.Context(), lease)
	defer stop()
	next := waitFor(t.Context(), waiting, "42", time.Minute)

	host, port, err := net.SplitHostPort(old.Addr())
	require.NoError(t, err)
	replicate(host, port)
	eventually(t, func() bool {
		return strings.Contains(admin.Info(t.Context(), "replication").Val(), "master_link_status:up") &&
			admin.LLen(t.Context(), "lock-waiters:42").Val() == 1
	}, "the replica has the lease and the queue")
	replicate("NO", "ONE")
	addr.Store(replacement.Addr())
	old.Kill()

	granted := lease.Deadline()
	eventually(t, func() bool { return lease.Deadline().After(granted) }, "renewed there")
	require.NoError(t, kept.Err())
	require.NoError(t, holder.Release(t.Context(), lease))
	got := takeLease(t, next)
	require.Greater(t, got.Index, lease.Index)
	require.NoError(t, waiting.Release(t.Context(), got))
}
