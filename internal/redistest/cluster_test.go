//go:build unix

package redistest_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

func TestStartCluster_servesKeysOnAllMasters(t *testing.T) {
	t.Parallel()
	began := time.Now()
	c := redistest.StartCluster(t, 3, 1, "--maxmemory", "64mb")
	t.Logf("started in %v", time.Since(began))
	client := c.Client(t)
	const keys = 100
	for i := range keys {
		require.NoError(t, client.Set(t.Context(), fmt.Sprint(i), "v", 0).Err())
	}

	require.Len(t, c.Servers(), 6)
	require.Len(t, c.Masters(), 3)
	var found int64
	for _, s := range c.Masters() {
		n := s.Client(t).DBSize(t.Context()).Val()
		require.NotZero(t, n)
		found += n
	}
	require.EqualValues(t, keys, found)
	for _, s := range c.Servers() {
		require.Equal(t, map[string]string{"maxmemory": "67108864"}, s.Client(t).ConfigGet(t.Context(), "maxmemory").Val())
	}
}

func TestStartCluster_returnsWithAllReplicasInSync(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 1, 2, "--cluster-node-timeout", "10000") // Which makes for slow gossip.
	for _, s := range c.Servers() {
		client := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{s.Addr()}})
		defer client.Close() //nolint:errcheck // The servers say what matters.
		var replicas atomic.Int64
		require.NoError(t, client.ForEachSlave(t.Context(), func(ctx context.Context, replica *redis.Client) error {
			replicas.Add(1)
			return replica.Ping(ctx).Err()
		}))
		require.EqualValues(t, 2, replicas.Load())
	}
	master := c.MasterOf(0)
	replica := c.ReplicaOf(master).Client(t)
	require.Equal(t, "up", replica.InfoMap(t.Context(), "replication").Item("Replication", "master_link_status"))
	require.NoError(t, master.Client(t).Set(t.Context(), "k", "v", 0).Err())
	require.EqualValues(t, 2, master.Client(t).Wait(t.Context(), 2, time.Second).Val())
}

func TestAwaitNewMaster_ofAKilledOne(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3, 1)
	slot := slotOf(t, c.Client(t), "b")
	old := c.MasterOf(slot)
	require.Equal(t, c.Servers()[0], old, "whoever is asked first is the one that must not be believed")
	heir := c.ReplicaOf(old)
	c.ReplicaOf(another(c, old)).Kill() // Nobody needs it, and nobody must wait for it.
	old.Kill()
	require.Equal(t, old, c.MasterOf(slot), "nobody has noticed yet")

	promoted := c.AwaitNewMaster(slot, old)

	require.Equal(t, heir, promoted)
	require.Equal(t, promoted, c.MasterOf(slot))
	require.Len(t, c.Masters(), 3)
	require.NotContains(t, c.Masters(), old)
	require.Equal(t, "master", role(t, promoted))
	require.NoError(t, promoted.Client(t).Set(t.Context(), "b", "v", 0).Err())
	require.Equal(t, "v", c.Client(t).Get(t.Context(), "b").Val())

	old.Restart()
	require.Equal(t, promoted, c.MasterOf(slot), "the restarted server knows no better yet")
	require.Equal(t, old, c.ReplicaOf(promoted))
}

func TestAwaitNewMaster_ofAPausedOne(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3, 1)
	old := c.MasterOf(0)
	old.Pause()

	promoted := c.AwaitNewMaster(0, old)

	require.NotEqual(t, old, promoted)
	asked := time.Now()
	require.Equal(t, promoted, c.MasterOf(0))
	require.Less(t, time.Since(asked), 10*time.Second)
	require.Equal(t, "master", role(t, promoted))
	old.Resume()
	require.Equal(t, old, c.ReplicaOf(promoted))
}

func TestClusterFailover_movesTheSlotThereAndBack(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3, 1)
	client := c.Client(t)
	slot := slotOf(t, client, "k")
	require.NoError(t, client.Set(t.Context(), "k", "v", 0).Err())
	old := c.MasterOf(slot)
	heir := c.ReplicaOf(old)

	require.Equal(t, heir, c.Failover(slot))

	requireMoved(t, c, "k", heir)
	require.Equal(t, heir, c.MasterOf(slot))
	require.Equal(t, "master", role(t, heir))
	require.Equal(t, "v", heir.Client(t).Get(t.Context(), "k").Val())
	require.Equal(t, "v", client.Get(t.Context(), "k").Val())
	require.Equal(t, old, c.ReplicaOf(heir))

	began := time.Now()
	require.Equal(t, old, c.Failover(slot))
	require.Less(t, time.Since(began), 5*time.Second, "Redis accepted the first attempt")
	require.Equal(t, "master", role(t, old))
}

func TestMigrate_movesTheSlotWithItsKeys(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3, 1)
	client := c.Client(t)
	slot := slotOf(t, client, "{k}")
	const keys = 250 // More than are moved at once.
	for i := range keys {
		require.NoError(t, client.Set(t.Context(), fmt.Sprintf("{k}%d", i), i, 0).Err())
	}
	from := c.MasterOf(slot)
	to := another(c, from)

	c.Migrate(slot, to)

	requireMoved(t, c, "{k}", to)
	require.Equal(t, to, c.MasterOf(slot))
	require.EqualValues(t, keys, to.Client(t).DBSize(t.Context()).Val())
	require.Equal(t, "42", to.Client(t).Get(t.Context(), "{k}42").Val())
	require.Equal(t, "42", client.Get(t.Context(), "{k}42").Val())
}

func TestBeginMigration_showsAskAndTryAgain(t *testing.T) {
	t.Parallel()
	c := redistest.StartCluster(t, 3, 0)
	client := c.Client(t)
	slot := slotOf(t, client, "{k}")
	require.NoError(t, client.Set(t.Context(), "{k}old", "v", 0).Err())
	from := c.MasterOf(slot)
	to := another(c, from)
	ask := fmt.Sprintf("ASK %d %s", slot, to.Addr())
	direct := from.Options()
	direct.MaxRetries = -1 // go-redis would repeat what is answered TRYAGAIN.
	source := redis.NewClient(direct)
	defer source.Close() //nolint:errcheck // The server says what matters.

	c.BeginMigration(slot, to)

	require.Equal(t, "v", source.Get(t.Context(), "{k}old").Val())
	require.EqualError(t, source.Get(t.Context(), "{k}new").Err(), ask)
	require.NoError(t, client.Set(t.Context(), "{k}new", "v", 0).Err(), "the client follows ASK")
	require.ErrorContains(t, source.MGet(t.Context(), "{k}old", "{k}new").Err(), "TRYAGAIN")

	c.MoveKeys(slot, to)

	require.EqualError(t, source.Get(t.Context(), "{k}old").Err(), ask)
	require.Equal(t, from, c.MasterOf(slot), "the slot has not moved yet")

	c.FinishMigration(slot, to)

	require.Equal(t, []any{"v", "v"}, client.MGet(t.Context(), "{k}old", "{k}new").Val())
	require.Equal(t, to, c.MasterOf(slot))
}

func slotOf(t *testing.T, client *redis.ClusterClient, key string) int {
	t.Helper()
	slot, err := client.ClusterKeySlot(t.Context(), key).Result()
	require.NoError(t, err)
	return int(slot)
}

// another returns a master that is not this one.
func another(c *redistest.Cluster, master *redistest.Server) *redistest.Server {
	for _, s := range c.Masters() {
		if s != master {
			return s
		}
	}
	return nil
}

// requireMoved fails the test unless all servers but this one send those who ask for the key to this one.
func requireMoved(t *testing.T, c *redistest.Cluster, key string, master *redistest.Server) {
	t.Helper()
	for _, s := range c.Servers() {
		if s != master {
			err := s.Client(t).Get(t.Context(), key).Err()
			require.ErrorContains(t, err, "MOVED")
			require.ErrorContains(t, err, master.Addr())
		}
	}
}
