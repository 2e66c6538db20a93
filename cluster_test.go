//go:build unix

package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
	"github.com/redfour-go/redfour/internal/slot"
)

// clusterNames are those of "Redis Cluster" in docs/protocol.md.
func clusterNames(namespace, id string) (lock, counter string) {
	bucket := fmt.Sprintf("{%s:%d}", namespace, slot.Sum(id)%256)
	return bucket + ":" + id, bucket + "index"
}

// The names are shared with other versions of this library, byte by byte.
func TestCluster_names(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	for _, row := range []struct{ namespace, id, lock, counter, queue, release string }{
		{"orders", "42", "{orders:64}:42", "{orders:64}index", "{orders:64}-waiters:42", "{orders:64}-release"},
		{"my ns", "a:b {c}\n\x00", "{my ns:178}:a:b {c}\n\x00", "{my ns:178}index", "{my ns:178}-waiters:a:b {c}\n\x00", "{my ns:178}-release"},
		{"a{b", "{x}y", "{a{b:120}:{x}y", "{a{b:120}index", "{a{b:120}-waiters:{x}y", "{a{b:120}-release"},
		{"{one}slot", "42", "{one}slot:42", "{one}slotindex", "{one}slot-waiters:42", "{one}slot-release"},
	} {
		client := c.Client(t)
		a, b := newLock(t, client, redfour.WithNamespace(row.namespace), redfour.WithOwner("me")), newLock(t, client, redfour.WithNamespace(row.namespace))
		heard := client.SSubscribe(t.Context(), row.release)
		t.Cleanup(func() { _ = heard.Close() })
		_, err := heard.Receive(t.Context())
		require.NoError(t, err)

		lease := mustAcquire(t, a, row.id, time.Minute)
		require.Equal(t, map[string]string{"index": fmt.Sprint(lease.Index), "token": lease.Token, "owner": "me"},
			client.HGetAll(t.Context(), row.lock).Val())
		require.Equal(t, fmt.Sprint(lease.Index), client.Get(t.Context(), row.counter).Val())
		got := waitFor(t.Context(), b, row.id, time.Minute)
		eventually(t, func() bool { return client.LLen(t.Context(), row.queue).Val() == 1 }, "queued")
		require.NoError(t, a.Release(t.Context(), lease))
		r := <-got
		require.NoError(t, r.err)
		require.NoError(t, b.Release(t.Context(), r.lease))
		message, err := heard.ReceiveMessage(t.Context())
		require.NoError(t, err)
		require.Equal(t, row.lock, message.Payload)
	}
}

func TestCluster_refusesANamespaceThatCannotBeLaidOut(t *testing.T) {
	client := redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}})
	t.Cleanup(func() { _ = client.Close() })
	for _, namespace := range []string{"}", "a}b", "{}", "{}{a}", "}{"} {
		_, err := redfour.New(client, redfour.WithNamespace(namespace))
		require.ErrorContains(t, err, "cannot be laid out in a cluster", namespace)
	}
	for _, namespace := range []string{"{", "a{b", "{a}", "x{a}y", "}{a}", "{{a}", "ns"} {
		l, err := redfour.New(client, redfour.WithNamespace(namespace))
		require.NoError(t, err, namespace)
		require.NoError(t, l.Close())
	}
}

func TestClusterTable(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			row.run(t, site{func(t *testing.T, via ...*link) redis.UniversalClient {
				return newClusterClient(t, c, via...)
			}, clusterNames, true})
		})
	}
}

func newClusterClient(tb testing.TB, c *redistest.Cluster, via ...*link) *redis.ClusterClient {
	tb.Helper()
	client := c.Client(tb)
	for _, l := range via {
		client.AddHook(l)
	}
	return client
}

// Waiters of many processes on many ids, as the issue of a fleet has them.
func TestCluster_allMastersCarryLoadOverOneSubscriptionEach(t *testing.T) {
	const processes, waiters, ids, rounds = 4, 64, 64, 3
	c := redistest.StartCluster(t, 3, 0)
	before := make(map[*redistest.Server]int)
	for _, s := range c.Masters() {
		before[s] = scriptCalls(t, s)
	}
	var locks []*redfour.Lock
	for range processes {
		locks = append(locks, newLock(t, c.Client(t)))
	}
	guard := newGuard(ids)
	var wg sync.WaitGroup
	for _, l := range locks {
		for n := range waiters {
			wg.Go(func() { guard.work(t, l, n%ids, rounds) })
		}
	}
	wg.Wait()
	require.EqualValues(t, processes*waiters*rounds, guard.sections.Load())
	for _, s := range c.Masters() {
		require.Greater(t, scriptCalls(t, s)-before[s], processes*waiters*rounds/6)
		require.LessOrEqual(t, subscribers(t, s), processes)
	}
}

// A guard sees to it that nobody is where another is.
type guard struct {
	inside   []atomic.Int32
	last     []atomic.Int64 // index
	sections atomic.Int64
}

func newGuard(ids int) *guard {
	return &guard{inside: make([]atomic.Int32, ids), last: make([]atomic.Int64, ids)}
}

// work goes through sections of the nth id.
func (g *guard) work(t *testing.T, l *redfour.Lock, n, rounds int) {
	t.Helper()
	for range rounds {
		lease, err := l.WaitAcquire(t.Context(), fmt.Sprint("id ", n), 10*time.Second)
		if !assert.NoError(t, err) {
			return
		}
		g.enter(t, n, lease)
		assert.NoError(t, l.Release(t.Context(), lease))
	}
}

func (g *guard) enter(t *testing.T, n int, lease *redfour.Lease) {
	t.Helper()
	assert.EqualValues(t, 1, g.inside[n].Add(1), "two hold %d", n)
	assert.Greater(t, lease.Index, g.last[n].Swap(lease.Index), "the index of %d", n)
	g.sections.Add(1)
	g.inside[n].Add(-1)
}

// scriptCalls counts the scripts that a server has run.
func scriptCalls(t *testing.T, s *redistest.Server) int {
	t.Helper()
	return (&realRedis{s, s.Client(t)}).calls(t, "evalsha")
}

// subscribers counts the connections of a server that have subscribed to something.
func subscribers(t *testing.T, s *redistest.Server) int {
	t.Helper()
	n := 0
	for line := range strings.Lines(s.Client(t).ClientList(t.Context()).Val()) {
		if !strings.Contains(line, " ssub=0") {
			n++
		}
	}
	return n
}

func TestCluster_aMasterIsKilledWhileManyWait(t *testing.T) {
	const waiters = 100
	c := redistest.StartCluster(t, 3, 1)
	a, b := newLock(t, c.Client(t)), newLock(t, c.Client(t))
	lock, _ := clusterNames("lock", "42")
	old := c.MasterOf(slot.Of(lock))
	// It is acknowledged by the replica before the master dies, so that the lease survives.
	lease := mustAcquire(t, a, "42", time.Minute)
	awaitReplica(t, c, old, lock)
	var served atomic.Int32
	var wg sync.WaitGroup
	for range waiters {
		wg.Go(func() {
			l, err := b.WaitAcquire(t.Context(), "42", time.Minute)
			if assert.NoError(t, err) {
				served.Add(1)
				assert.NoError(t, b.Release(t.Context(), l))
			}
		})
	}
	queue := strings.Replace(lock, "}:", "}-waiters:", 1)
	eventually(t, func() bool { return old.Client(t).LLen(t.Context(), queue).Val() == 1 }, "queued")

	old.Kill()
	c.AwaitNewMaster(slot.Of(lock), old)
	promoted := time.Now()
	require.NoError(t, a.Release(t.Context(), lease))
	wg.Wait()
	require.EqualValues(t, waiters, served.Load())
	t.Logf("all %d were served %v after the promotion", waiters, time.Since(promoted).Round(time.Millisecond))
	require.Less(t, time.Since(promoted), 3*time.Second)
}

// awaitReplica returns when a replica of the master has the key.
func awaitReplica(t *testing.T, c *redistest.Cluster, master *redistest.Server, key string) {
	t.Helper()
	replica := c.ReplicaOf(master).Client(t)
	eventually(t, func() bool {
		cmds, err := replica.Pipelined(t.Context(), func(p redis.Pipeliner) error {
			p.Do(t.Context(), "READONLY")
			p.Exists(t.Context(), key)
			return nil
		})
		return err == nil && cmds[1].(*redis.IntCmd).Val() == 1
	}, "replicated")
}

func TestCluster_aReplicaIsPromotedWhileManyWait(t *testing.T) {
	const processes, waiters, ids = 3, 20, 6
	c := redistest.StartCluster(t, 3, 1)
	guard, stop := newGuard(ids), make(chan struct{})
	var wg sync.WaitGroup
	for range processes {
		l := newLock(t, c.Client(t))
		for n := range waiters {
			wg.Go(func() { guard.workUntil(t, l, n%ids, stop) })
		}
	}
	lock, _ := clusterNames("lock", "id 0")
	for range 3 {
		c.Failover(slot.Of(lock))
		before := guard.sections.Load()
		eventually(t, func() bool { return guard.sections.Load() > before+1000 }, "it goes on")
	}
	close(stop)
	wg.Wait()
}

// workUntil is work for as long as nobody closes stop. Mutual exclusion and the growth of the index are not what a promotion
// promises, so it only looks for progress.
func (g *guard) workUntil(t *testing.T, l *redfour.Lock, n int, stop <-chan struct{}) {
	t.Helper()
	for {
		select {
		case <-stop:
			return
		default:
		}
		ctx, cancel := context.WithTimeout(t.Context(), enough)
		lease, err := l.WaitAcquire(ctx, fmt.Sprint("id ", n), 10*time.Second)
		cancel()
		if !assert.NoError(t, err) {
			return
		}
		g.sections.Add(1)
		_ = l.Release(t.Context(), lease) // What a promotion lost is lost.
	}
}

func TestCluster_everySlotOfABucketMovesUnderLoad(t *testing.T) {
	const processes, waiters = 3, 16
	c := redistest.StartCluster(t, 3, 0)
	lock, _ := clusterNames("lock", "id 0")
	at := slot.Of(lock)
	guard, stop := newGuard(1), make(chan struct{})
	var wg sync.WaitGroup
	for range processes {
		l := newLock(t, c.Client(t))
		for range waiters {
			wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						guard.work(t, l, 0, 1)
					}
				}
			})
		}
	}
	for range 6 {
		from := c.MasterOf(at)
		for _, to := range c.Masters() {
			if to != from {
				c.Migrate(at, to)
				break
			}
		}
		before := guard.sections.Load()
		began := time.Now()
		eventually(t, func() bool { return guard.sections.Load() > before+500 }, "it goes on")
		t.Logf("500 sections in %v after the slot had moved", time.Since(began).Round(time.Millisecond))
	}
	close(stop)
	wg.Wait()
}

// One server may be reached by clients of both kinds. Either kind has keys of its own
// there, and channels; in a namespace with a hash tag the keys are the same.
func TestCluster_aClientOfOneServerSharesTheKeysOfATaggedNamespaceAlone(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	master := c.MasterOf(slot.Of("{orders}:42")).Client(t)
	tagged := redfour.WithNamespace("{orders}")
	lease := mustAcquire(t, newLock(t, c.Client(t), tagged), "42", time.Minute)
	_, err := newLock(t, master, tagged).Acquire(t.Context(), "42", time.Minute)
	locked, ok := errors.AsType[*redfour.LockedError](err)
	require.True(t, ok, "%v", err)
	require.Equal(t, lease.Index, locked.Index)
	_, err = newLock(t, master).Acquire(t.Context(), "42", time.Minute)
	require.Error(t, err)
	require.NotErrorIs(t, err, redfour.ErrLocked)
}
