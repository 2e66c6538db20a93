//go:build unix

package redfour_test

import (
	"bytes"
	"context"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"runtime"
	"slices"
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

// listenersIn counts who hears the releases of an id on one server of a cluster.
func listenersIn(t *testing.T, s *redistest.Server, id string) int64 {
	t.Helper()
	lock, _ := clusterNames("lock", id)
	channel := lock[:len(lock)-len(id)-1] + "-release"
	n, err := s.Client(t).PubSubShardNumSub(t.Context(), channel).Result()
	require.NoError(t, err)
	return n[channel]
}

// slotOf is the slot of an id's lock.
func slotOf(id string) int {
	lock, _ := clusterNames("lock", id)
	return slot.Of(lock)
}

// Nobody sends a script meanwhile that would be told of the new master.
func TestClusterSubscription_followsAPromotionInSilence(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	holder, waiter := newLock(t, c.Client(t)), newLock(t, c.Client(t))
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := waitFor(t.Context(), waiter, "42", time.Minute)
	eventually(t, func() bool { return listenersIn(t, c.MasterOf(slotOf("42")), "42") == 1 }, "subscribed")
	promoted := c.Failover(slotOf("42"))
	requireFollowed(t, promoted, holder, lease, got)
}

// requireFollowed shows that the waiter subscribes to the new master soon, and is granted the lock there.
func requireFollowed(
	t *testing.T, to *redistest.Server, holder *redfour.Lock, lease *redfour.Lease, got <-chan acquired,
) {
	t.Helper()
	moved := time.Now()
	eventually(t, func() bool { return listenersIn(t, to, lease.ID) == 1 }, "subscribed anew")
	t.Logf("it followed in %v", time.Since(moved).Round(time.Millisecond))
	require.Less(t, time.Since(moved), 3*time.Second)
	lock, _ := clusterNames("lock", lease.ID)
	queue := strings.Replace(lock, "}:", "}-waiters:", 1)
	eventually(t, func() bool { return to.Client(t).LLen(t.Context(), queue).Val() == 1 }, "queued")
	require.NoError(t, holder.Release(t.Context(), lease))
	require.Contains(t, takeLease(t, got).Token, ":", "granted out of the queue")
}

// The client may ask a server that has not heard of the promotion, and the old master accepts subscriptions as a replica. So nothing
// seems to be wrong.
func TestClusterSubscription_leavesAReplicaThatTheClientTakesForTheMaster(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	holder := newLock(t, c.Client(t))
	lease := mustAcquire(t, holder, "42", time.Minute)
	waiter, belated := belatedLock(t, c)
	got := waitFor(t.Context(), waiter, "42", time.Minute)
	old := c.MasterOf(slotOf("42"))
	eventually(t, func() bool { return listenersIn(t, old, "42") == 1 }, "subscribed")

	belated.Store(2)
	promoted := c.Failover(slotOf("42"))
	eventually(t, func() bool { return listenersIn(t, old, "42") == 1 || belated.Load() < 0 }, "subscribed to the replica")
	requireFollowed(t, promoted, holder, lease, got)
}

// belatedLock returns a Lock whose client is told of the slots as they are now as often as belated says.
func belatedLock(t *testing.T, c *redistest.Cluster) (l *redfour.Lock, belated *atomic.Int64) {
	t.Helper()
	belated = new(atomic.Int64)
	admin := c.Client(t)
	before, err := slotsOf(t.Context(), admin)
	require.NoError(t, err)
	return lockTold(t, c, func(ctx context.Context) ([]redis.ClusterSlot, error) {
		if belated.Add(-1) >= 0 {
			return before, nil
		}
		return slotsOf(ctx, admin)
	}), belated
}

// askingLock returns a Lock whose client asks only the given server for the slots.
// Another server may be the one that hangs, and the client would wait for it.
func askingLock(t *testing.T, c *redistest.Cluster, s *redistest.Server) *redfour.Lock {
	t.Helper()
	asked := s.Client(t)
	return lockTold(t, c, func(ctx context.Context) ([]redis.ClusterSlot, error) { return slotsOf(ctx, asked) })
}

// lockTold returns a Lock whose client gets the slots from the given function. New
// refuses a client that is made so. The function is set after New, which sends nothing.
func lockTold(
	t *testing.T, c *redistest.Cluster, slots func(context.Context) ([]redis.ClusterSlot, error),
) *redfour.Lock {
	t.Helper()
	client := redis.NewClusterClient(c.Options())
	t.Cleanup(func() { _ = client.Close() })
	l := newLock(t, client)
	client.Options().ClusterSlots = slots
	return l
}

// slotsOf returns what redis.ClusterOptions want to be told.
func slotsOf(ctx context.Context, client redis.Cmdable) ([]redis.ClusterSlot, error) {
	return client.ClusterSlots(ctx).Result()
}

// Redis 6 knows no channels that belong to slots. (SHARDNUMSUB cannot be taken away from these servers, because it is a word of another
// command; what it counts is 0.)
var asRedis6 = []string{"--rename-command", "SPUBLISH", "", "--rename-command", "SSUBSCRIBE", ""}

func TestClusterRedis6Logger_saysThatWaitersCannotQueue(t *testing.T) {
	c, way := redistest.StartCluster(t, 3, 0, asRedis6...), new(link)
	requireFallback(t, newClusterClient(t, c, way), way)
}

func TestClusterRedis6Table(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1, asRedis6...)
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			row.run(t, site{func(t *testing.T, via ...*link) redis.UniversalClient {
				return newClusterClient(t, c, via...)
			}, clusterNames, false})
		})
	}
}

func TestClusterRedis6_waitersAreWokenAndNobodyQueues(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0, asRedis6...)
	client := c.Client(t)
	holder, waiter := newLock(t, c.Client(t)), newLock(t, c.Client(t))
	for _, id := range oneOfEach(t, c) {
		lease := mustAcquire(t, holder, id, time.Minute)
		got := waitFor(t.Context(), waiter, id, time.Minute)
		lock, _ := clusterNames("lock", id)
		release := lock[:len(lock)-len(id)-1] + "-release"
		server := c.MasterOf(slotOf(id)).Client(t)
		eventually(t, func() bool { return server.PubSubNumSub(t.Context(), release).Val()[release] == 1 }, "subscribed")
		require.NoError(t, holder.Release(t.Context(), lease))
		next := takeLease(t, got)
		require.NotContains(t, next.Token, ":")
		require.Zero(t, client.Exists(t.Context(), lock[:len(lock)-len(id)-1]+"-waiters:"+id).Val())
		require.NoError(t, waiter.Release(t.Context(), next))
	}
}

// oneOfEach returns an id for each master.
func oneOfEach(t *testing.T, c *redistest.Cluster) []string {
	t.Helper()
	var ids []string
	seen := make(map[*redistest.Server]bool)
	for n := 0; len(seen) < len(c.Masters()); n++ {
		id := fmt.Sprint("id ", n)
		if s := c.MasterOf(slotOf(id)); !seen[s] {
			seen[s] = true
			ids = append(ids, id)
		}
	}
	return ids
}

// Servers are replaced by newer ones one after another, and then releases are published where plain subscribers hear nothing.
func TestClusterRedis6_waitersHearTheServerThatReplacesIt(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	o := c.Options()
	var old atomic.Bool
	o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		return &oldConn{conn, &old}, err
	}
	client := redis.NewClusterClient(o)
	t.Cleanup(func() { _ = client.Close() })
	holder, waiter := newLock(t, c.Client(t)), newLock(t, client)
	lease := mustAcquire(t, holder, "42", time.Minute)
	server := c.MasterOf(slotOf("42"))
	old.Store(true)
	got := waitFor(t.Context(), waiter, "42", time.Minute)
	eventually(t, func() bool {
		return server.Client(t).PubSubNumSub(t.Context(), "{lock:64}-release").Val()["{lock:64}-release"] == 1
	}, "subscribed")
	old.Store(false)
	require.NoError(t, server.Client(t).ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	requireFollowed(t, server, holder, lease, got)
}

// An oldConn has a server that does not know SSUBSCRIBE while that is set.
type oldConn struct {
	net.Conn

	old *atomic.Bool
}

func (c *oldConn) Write(b []byte) (int, error) {
	if c.old.Load() {
		b = bytes.ReplaceAll(b, []byte("\r\nssubscribe\r\n"), []byte("\r\nxsubscribe\r\n"))
	}
	return c.Conn.Write(b)
}

// A master that has lost a slot for a moment refuses its channels, beside those of others that it serves.
func TestClusterSubscription_asksAgainForTheBucketThatWasRefused(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0, "--cluster-require-full-coverage", "no")
	server := c.Masters()[0]
	ids := idsOf(t, c, server, 2)
	holder, way := newLock(t, c.Client(t)), new(link)
	waiter := newLock(t, newClusterClient(t, c, way))
	mustAcquire(t, holder, ids[0], time.Minute)
	waitFor(t.Context(), waiter, ids[0], time.Minute)
	eventually(t, func() bool { return listenersIn(t, server, ids[0]) == 1 }, "subscribed")

	lease := mustAcquire(t, holder, ids[1], time.Minute)
	admin := server.Client(t)
	way.afterScript(once(isAcquire, func() error { return admin.ClusterDelSlots(t.Context(), slotOf(ids[1])).Err() }))
	got := waitFor(t.Context(), waiter, ids[1], time.Minute)
	eventually(t, func() bool { return strings.Contains(admin.Info(t.Context(), "errorstats").Val(), "CLUSTERDOWN") }, "refused")
	require.NoError(t, admin.ClusterAddSlots(t.Context(), slotOf(ids[1])).Err())
	requireFollowed(t, server, holder, lease, got)
}

// idsOf returns some ids in different buckets of one master.
func idsOf(t *testing.T, c *redistest.Cluster, s *redistest.Server, n int) []string {
	t.Helper()
	var ids []string
	seen := make(map[int]bool)
	for i := 0; len(ids) < n; i++ {
		id := fmt.Sprint("id ", i)
		if at := slotOf(id); !seen[at] && c.MasterOf(at) == s {
			seen[at] = true
			ids = append(ids, id)
		}
	}
	return ids
}

// Whoever is in a census and may not queue makes open releases cease there, on which he depends himself.
func TestClusterRights_whoMayNotQueueLeavesEveryCensus(t *testing.T) {
	c := redistest.StartCluster(t, 2, 0)
	o := c.Options()
	o.Username, o.Password = "app", "any"
	eachMaster(t, c, "ACL", "SETUSER", "app", "on", "nopass", "~*", "&*", "+@all")
	client := redis.NewClusterClient(o)
	t.Cleanup(func() { _ = client.Close() })
	holder, waiter := newLock(t, c.Client(t)), newLock(t, client)
	ids := oneOfEach(t, c)
	for _, id := range ids {
		mustAcquire(t, holder, id, time.Minute)
		waitFor(t.Context(), waiter, id, time.Minute)
		eventually(t, func() bool { return membersIn(t, c, id) == 1 }, "in the census")
	}
	eachMaster(t, c, "ACL", "SETUSER", "app", "resetkeys", "~{lock:*}:*", "~{lock:*}index")
	waitFor(t.Context(), waiter, ids[0], time.Minute)
	lock, _ := clusterNames("lock", ids[0])
	require.NoError(t, c.Client(t).SPublish(t.Context(), lock[:len(lock)-len(ids[0])-1]+"-release", lock).Err())
	for _, id := range ids {
		eventually(t, func() bool { return membersIn(t, c, id) == 0 && listenersIn(t, c.MasterOf(slotOf(id)), id) == 1 }, "out of it")
	}
}

func eachMaster(t *testing.T, c *redistest.Cluster, args ...any) {
	t.Helper()
	for _, s := range c.Masters() {
		require.NoError(t, s.Client(t).Do(t.Context(), args...).Err())
	}
}

// membersIn counts who is in the census of an id.
func membersIn(t *testing.T, c *redistest.Cluster, id string) int64 {
	t.Helper()
	lock, _ := clusterNames("lock", id)
	channel := lock[:len(lock)-len(id)-1] + "-members"
	n, err := c.MasterOf(slotOf(id)).Client(t).PubSubShardNumSub(t.Context(), channel).Result()
	require.NoError(t, err)
	return n[channel]
}

// The clocks of masters differ, and so do the indexes that they give. What is ahead in one bucket says nothing about another.
func TestCluster_anIndexOfOneBucketDoesNotHideAGrantInAnother(t *testing.T) {
	c := redistest.StartCluster(t, 2, 0)
	holder, waiter := newLock(t, c.Client(t)), newLock(t, c.Client(t))
	ids := oneOfEach(t, c)
	_, counter := clusterNames("lock", ids[0])
	ahead := time.Now().Add(time.Hour).UnixMicro()
	require.NoError(t, c.Client(t).Set(t.Context(), counter, ahead, 0).Err())
	require.Greater(t, mustAcquire(t, waiter, ids[0], time.Minute).Index, ahead)

	lease := mustAcquire(t, holder, ids[1], time.Minute)
	got := waitFor(t.Context(), waiter, ids[1], time.Minute)
	requireFollowed(t, c.MasterOf(slotOf(ids[1])), holder, lease, got)
}

func TestCluster_aMasterThatHangsIsLeftWithinSeconds(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1, "--cluster-require-full-coverage", "no")
	ids := oneOfEach(t, c)
	at := slotOf(ids[0])
	old := c.MasterOf(at)
	asked := c.MasterOf(slotOf(ids[1]))
	holder, waiter, closing := askingLock(t, c, asked), askingLock(t, c, asked), newLock(t, c.Client(t))
	lease := mustAcquire(t, holder, ids[0], time.Minute)
	got := waitFor(t.Context(), waiter, ids[0], time.Minute)
	waitFor(t.Context(), closing, ids[0], time.Minute)
	lock, _ := clusterNames("lock", ids[0])
	queue := strings.Replace(lock, "}:", "}-waiters:", 1)
	eventually(t, func() bool { return old.Client(t).LLen(t.Context(), queue).Val() == 2 }, "queued")
	awaitReplica(t, c, old, queue)

	old.Pause()
	elsewhere := busyUntil(t, []*redfour.Lock{holder, waiter}, ids[1:])
	began := time.Now()
	renewed := make(chan error, 1)
	go func() { renewed <- holder.Renew(t.Context(), lease, time.Minute) }()
	closed := make(chan time.Duration, 1)
	go func() {
		_ = closing.Close()
		closed <- time.Since(began)
	}()
	c.AwaitNewMaster(at, old)
	promoted := time.Now()
	require.NoError(t, take(t, renewed))
	require.NoError(t, holder.Release(t.Context(), lease))
	t.Logf("renewed and released %v after the promotion", time.Since(promoted).Round(time.Millisecond))
	released := time.Now()
	require.NoError(t, waiter.Release(t.Context(), takeLease(t, got)))
	t.Logf("served %v after that, and %v after the promotion",
		time.Since(released).Round(time.Millisecond), time.Since(promoted).Round(time.Millisecond))
	// The subscription is given up 2.5 s after the last word of the server, which may be later, and looks around within a second or two.
	// Connecting to the server that hangs takes 5 s.
	require.Less(t, time.Since(promoted), 3*time.Second)
	require.Less(t, take(t, closed), 6*time.Second)
	slowest := elsewhere()
	t.Logf("the slowest section elsewhere took %v", slowest.Round(time.Millisecond))
	require.Less(t, slowest, 700*time.Millisecond)
}

// busyUntil goes through sections, until the returned function is called, which returns how long the slowest took.
func busyUntil(t *testing.T, locks []*redfour.Lock, ids []string) (slowest func() time.Duration) {
	t.Helper()
	stop, worst := make(chan struct{}), make(chan time.Duration, 1) // the one result; the test may have failed
	go func() {
		var most time.Duration
		for n := 0; ; n++ {
			select {
			case <-stop:
				worst <- most
				return
			default:
			}
			l, start := locks[n%len(locks)], time.Now()
			lease, err := l.Acquire(t.Context(), ids[n/len(locks)%len(ids)], time.Minute)
			if err == nil {
				err = l.Release(t.Context(), lease)
			}
			if t.Context().Err() != nil || !assert.NoError(t, err) {
				return
			}
			most = max(most, time.Since(start))
		}
	}()
	return func() time.Duration {
		close(stop)
		return take(t, worst)
	}
}

// Not even while the client has yet to learn which master has what.
func TestCluster_aMasterThatHangsDelaysNoCallsToOthers(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0, "--cluster-require-full-coverage", "no")
	slots, err := slotsOf(t.Context(), c.Client(t))
	require.NoError(t, err)
	hung := c.Masters()[0]
	hangs := make(map[string]bool)
	for n := range 200 {
		id := fmt.Sprint("id ", n)
		hangs[id] = c.MasterOf(slotOf(id)) == hung
	}
	hung.Pause()
	// A client that asks for the slots may ask the server that hangs.
	l := lockTold(t, c, func(context.Context) ([]redis.ClusterSlot, error) { return slots, nil })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var wg sync.WaitGroup
	for id, in := range hangs {
		wg.Go(func() {
			lease, err := l.Acquire(ctx, id, time.Minute)
			if in {
				assert.Error(t, err)
			} else if assert.NoError(t, err) {
				assert.NoError(t, l.Release(ctx, lease))
			}
		})
	}
	wg.Wait()
	hung.Resume()
}

func TestCluster_waitsOnAMasterThatHangsDelayNoWaitsOnOthers(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0, "--cluster-require-full-coverage", "no")
	slots, err := slotsOf(t.Context(), c.Client(t))
	require.NoError(t, err)
	hung := c.Masters()[0]
	var ids []string
	var free string
	for i := 0; len(ids) < 5000 || free == ""; i++ {
		id := fmt.Sprint("id ", i)
		for _, part := range slots {
			switch at := slotOf(id); {
			case at < part.Start || at > part.End:
			case part.Nodes[0].Addr == hung.Addr():
				ids = append(ids, id)
			default:
				free = id
			}
		}
	}
	// A client that asks for the slots may ask the server that hangs.
	l := lockTold(t, c, func(context.Context) ([]redis.ClusterSlot, error) { return slots, nil })
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, free, time.Minute)))
	hung.Pause()
	defer hung.Resume()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for _, id := range ids {
		waitFor(ctx, l, id, time.Minute)
	}
	eventually(t, func() bool { return l.Stats().Waiting == len(ids) }, "all wait")
	slowest := time.Duration(0)
	for range 5 { // The attempts of the others are given up, and repeated, meanwhile.
		lease := take(t, waitFor(ctx, l, free, time.Minute))
		require.NoError(t, lease.err)
		require.NoError(t, l.Release(ctx, lease.lease))
		slowest = max(slowest, lease.after)
		require.Less(t, slowest, time.Second)
	}
	t.Logf("the slowest wait took %v", slowest.Round(time.Millisecond))
}

// patience is less than an attempt that gets no answer takes, and more than this machine needs for many.
const patience = 900 * time.Millisecond

// RouteByLatency is left out, because go-redis 9.23 has a data race of its own with it. To scripts it is ReadOnly, as RouteRandomly is.
func TestCluster_anyOptionsOfTheClientDo(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	for name, set := range map[string]func(*redis.ClusterOptions){
		"ReadOnly":      func(o *redis.ClusterOptions) { o.ReadOnly = true },
		"RouteRandomly": func(o *redis.ClusterOptions) { o.RouteRandomly = true },
		"MaxRedirects":  func(o *redis.ClusterOptions) { o.MaxRedirects = -1 },
		"policies":      func(o *redis.ClusterOptions) { o.DisableRoutingPolicies = true },
		"small":         func(o *redis.ClusterOptions) { o.PoolSize, o.PipelinePoolSize, o.ContextTimeoutEnabled = 1, -1, true },
		"RESP2":         func(o *redis.ClusterOptions) { o.Protocol = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			o := c.Options()
			set(o)
			var locks [2]*redfour.Lock
			for i := range locks {
				client := redis.NewClusterClient(o)
				t.Cleanup(func() { _ = client.Close() })
				locks[i] = newLock(t, client)
			}
			ids := oneOfEach(t, c)
			handOver := func() {
				for _, id := range ids {
					lease := mustAcquire(t, locks[0], id, time.Minute)
					require.NoError(t, locks[0].Renew(t.Context(), lease, time.Minute))
					got := waitFor(t.Context(), locks[1], id, time.Minute)
					server := c.MasterOf(slotOf(id)).Client(t)
					lock, _ := clusterNames("lock", id)
					queue := strings.Replace(lock, "}:", "}-waiters:", 1)
					eventually(t, func() bool { return server.LLen(t.Context(), queue).Val() == 1 }, "queued")
					require.NoError(t, locks[0].Release(t.Context(), lease))
					next := takeLease(t, got)
					require.Contains(t, next.Token, ":")
					require.NoError(t, locks[1].Release(t.Context(), next))
				}
			}
			handOver()
			masters := c.Masters()
			for _, s := range c.Servers() {
				if !slices.Contains(masters, s) {
					require.Zero(t, scriptCalls(t, s), "a replica")
				}
			}
			from, to := c.MasterOf(slotOf(ids[0])), c.MasterOf(slotOf(ids[1]))
			c.Migrate(slotOf(ids[0]), to)
			handOver()
			c.Migrate(slotOf(ids[0]), from)
			handOver()
		})
	}
}

func TestCluster_afterAPromotionAnyOptionsDo(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	readOnly, noRedirects := c.Options(), c.Options()
	readOnly.ReadOnly, noRedirects.MaxRedirects = true, -1
	var locks []*redfour.Lock
	for _, o := range []*redis.ClusterOptions{readOnly, noRedirects} {
		client := redis.NewClusterClient(o)
		t.Cleanup(func() { _ = client.Close() })
		locks = append(locks, newLock(t, client))
	}
	holder := newLock(t, c.Client(t))
	lease := mustAcquire(t, holder, "42", time.Minute)
	var got []<-chan acquired
	for _, l := range locks {
		got = append(got, waitFor(t.Context(), l, "42", time.Minute))
	}
	eventually(t, func() bool { return listenersIn(t, c.MasterOf(slotOf("42")), "42") == 2 }, "subscribed")
	promoted := c.Failover(slotOf("42"))
	moved := time.Now()
	eventually(t, func() bool { return listenersIn(t, promoted, "42") == 2 }, "subscribed anew")
	require.Less(t, time.Since(moved), 3*time.Second)
	require.NoError(t, holder.Release(t.Context(), lease))
	for range got {
		select {
		case r := <-got[0]:
			require.NoError(t, r.err)
			require.NoError(t, locks[0].Release(t.Context(), r.lease))
		case r := <-got[1]:
			require.NoError(t, r.err)
			require.NoError(t, locks[1].Release(t.Context(), r.lease))
		case <-time.After(enough):
			require.Fail(t, "nobody")
		}
	}
}

func TestCluster_theIndexGrowsWhereverTheBucketGoes(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	l := newLock(t, c.Client(t))
	lock, counter := clusterNames("lock", "42")
	last := int64(0)
	next := func() {
		t.Helper()
		lease := mustAcquire(t, newLock(t, c.Client(t)), "42", time.Minute)
		require.Greater(t, lease.Index, last)
		last = lease.Index
		require.NoError(t, l.Release(t.Context(), lease))
	}
	next()
	at := slot.Of(lock)
	for _, to := range c.Masters() {
		if to != c.MasterOf(at) {
			c.Migrate(at, to)
			next()
		}
	}
	old := c.MasterOf(at)
	require.NoError(t, old.Client(t).Del(t.Context(), counter).Err()) // as if the replica had not got it
	old.Kill()
	c.AwaitNewMaster(at, old)
	next()
}

func TestCluster_aClosedClientEndsCallsAndWaits(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	client := c.Client(t)
	l := newLock(t, client)
	mustAcquire(t, newLock(t, c.Client(t)), "42", time.Minute)
	got := waitFor(t.Context(), l, "42", time.Minute)
	eventually(t, func() bool { return listenersIn(t, c.MasterOf(slotOf("42")), "42") == 1 }, "subscribed")
	require.NoError(t, client.Close())
	closed := time.Now()
	require.ErrorIs(t, take(t, got).err, redis.ErrClosed)
	require.Less(t, time.Since(closed), time.Second)
	_, err := l.Acquire(t.Context(), "43", time.Minute)
	require.ErrorIs(t, err, redis.ErrClosed)
	require.ErrorIs(t, take(t, waitFor(t.Context(), l, "44", time.Minute)).err, redis.ErrClosed)
	start := time.Now()
	require.NoError(t, l.Close())
	require.Less(t, time.Since(start), 3*time.Second)
}

func TestCluster_nothingRunsAfterClose(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	client := c.Client(t)
	l, holder := newLock(t, client), newLock(t, client)
	for _, id := range oneOfEach(t, c) {
		mustAcquire(t, holder, id, time.Minute)
		waitFor(t.Context(), l, id, time.Minute)
		eventually(t, func() bool { return listenersIn(t, c.MasterOf(slotOf(id)), id) == 1 }, "subscribed")
	}
	c.Failover(slotOf("42"))
	require.NoError(t, l.Close())
	require.NoError(t, holder.Close())
	require.Empty(t, libraryGoroutines())
	eventually(t, func() bool { return !strings.Contains(stacks(), "LazyReload") }, "the client does not ask for slots")
}

func stacks() string {
	buf := make([]byte, 1<<22)
	return string(buf[:runtime.Stack(buf, true)])
}

// Of many buckets on one master some move, one after another, while nobody sends anything.
func TestClusterSubscription_followsThoseBucketsThatMove(t *testing.T) {
	const moves, stay = 10, 2
	c := redistest.StartCluster(t, 3, 0)
	from, to := c.Masters()[0], c.Masters()[1]
	ids := idsOf(t, c, from, moves+stay)
	holder, waiter := newLock(t, c.Client(t)), newLock(t, c.Client(t))
	leases, got := make(map[string]*redfour.Lease), make(map[string]<-chan acquired)
	for _, id := range ids {
		leases[id] = mustAcquire(t, holder, id, time.Minute)
		got[id] = waitFor(t.Context(), waiter, id, time.Minute)
		eventually(t, func() bool { return listenersIn(t, from, id) == 1 }, "subscribed")
	}
	var took []time.Duration
	for _, id := range ids[:moves] {
		c.Migrate(slotOf(id), to)
		moved := time.Now()
		for i, id := range []string{ids[moves], id} {
			server := []*redistest.Server{from, to}[i]
			eventually(t, func() bool { return listenersIn(t, server, id) == 1 }, "subscribed anew")
		}
		took = append(took, time.Since(moved).Round(time.Millisecond))
	}
	require.Less(t, slices.Min(took[moves/2:]), 400*time.Millisecond, "%v", took)
	for i, id := range ids {
		server := from
		if i < moves {
			server = to
		}
		requireFollowed(t, server, holder, leases[id], got[id])
	}
	require.Equal(t, 1, subscribers(t, from))
	require.Equal(t, 1, subscribers(t, to))
}

// Whoever begins to wait while the subscription is closed for want of waiters, or is being replaced, is heard nevertheless.
func TestClusterSubscription_hearsWhoeverComesAtAnyMoment(t *testing.T) {
	const locks, idle = 16, 10 * time.Second
	c := redistest.StartCluster(t, 2, 0)
	ids := append(idsOf(t, c, c.Masters()[0], 2), idsOf(t, c, c.Masters()[1], 2)...)
	holder := newLock(t, c.Client(t))
	for _, id := range ids {
		mustAcquire(t, holder, id, 5*time.Minute)
	}
	var wg sync.WaitGroup
	for range locks {
		l := newLock(t, c.Client(t))
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			first := waitFor(ctx, l, ids[0], time.Minute)
			time.AfterFunc(time.Duration(mathrand.N(int64(50*time.Millisecond))), cancel)
			<-first
			timer := time.NewTimer(idle - 5*time.Millisecond + time.Duration(mathrand.N(int64(10*time.Millisecond))))
			defer timer.Stop()
			<-timer.C
			for _, id := range ids {
				waitFor(t.Context(), l, id, time.Minute)
			}
		})
	}
	wg.Wait()
	for _, s := range c.Masters() { // and then it is replaced
		require.NoError(t, s.Client(t).ClientKillByFilter(t.Context(), "TYPE", "pubsub").Err())
	}
	for _, id := range ids {
		eventually(t, func() bool { return listenersIn(t, c.MasterOf(slotOf(id)), id) == locks }, "all hear")
	}
}

func TestClusterSubscription_aReleaseBetweenItsConfirmationAndTheLookIsNoticed(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	holder, way := newLock(t, c.Client(t)), new(link)
	lease := mustAcquire(t, holder, "42", time.Minute)
	looks := 0
	way.beforeScript(func(ctx context.Context, cmd redis.Cmder) error {
		if isAcquire(cmd) {
			looks++ // One at a time is in flight.
			if looks == 2 {
				return holder.Release(ctx, lease)
			}
		}
		return nil
	})
	got := waitFor(t.Context(), newLock(t, newClusterClient(t, c, way)), "42", time.Minute)
	takeLease(t, got)
}

// The rights that a user may lack are those outside of a cluster, and so is what works without them.
func TestClusterRights_whatWorksWithoutThem(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	least := documentedRights(t, "fleet")[3:] // but for the password
	for name, rules := range map[string]struct {
		rules  []any
		queues bool // it is granted locks
		heard  bool // it hears releases
	}{
		"all":            {[]any{"~*", "&*", "+@all"}, true, true},
		"least":          {least, true, true},
		"no queues":      {[]any{"~{lock:*}:*", "~{lock:*}index", "&*", "+@all"}, false, true},
		"releases alone": {[]any{"~*", "&{lock:*}-release", "+@all"}, false, true},
		"no counting":    {[]any{"~*", "&*", "+@all", "-pubsub"}, true, true},
		"no channels":    {[]any{"~*", "resetchannels", "+@all"}, false, false},
		"no messages":    {[]any{"~*", "&*", "+@all", "-spublish", "-ssubscribe"}, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			eachMaster(t, c, append([]any{"ACL", "SETUSER", "app", "reset", "on", "nopass"}, rules.rules...)...)
			o := c.Options()
			o.Username, o.Password = "app", "any"
			client := redis.NewClusterClient(o)
			t.Cleanup(func() { _ = client.Close() })
			l, other := newLock(t, client), newLock(t, c.Client(t))
			lease := mustAcquire(t, l, name, time.Minute)
			require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
			local := waitFor(t.Context(), l, name, time.Minute)
			require.NoError(t, l.Release(t.Context(), lease))
			require.NoError(t, l.Release(t.Context(), takeLease(t, local)))

			if !rules.heard { // It waits for the end of the lease, and others for the end of its own.
				mustAcquire(t, other, name, 500*time.Millisecond)
				require.NoError(t, l.Release(t.Context(), takeLease(t, waitFor(t.Context(), l, name, time.Minute))))
				return
			}
			lease = mustAcquire(t, other, name, time.Minute)
			got := waitFor(t.Context(), l, name, time.Minute)
			server := c.MasterOf(slotOf(name))
			eventually(t, func() bool { return listenersIn(t, server, name) == 1 }, "subscribed")
			eventually(t, func() bool { return rules.queues == (membersIn(t, c, name) == 1) }, "in the census, or out of it")
			require.NoError(t, other.Release(t.Context(), lease))
			lease = takeLease(t, got)
			got = waitFor(t.Context(), other, name, time.Minute)
			eventually(t, func() bool { return listenersIn(t, server, name) == 2 }, "subscribed")
			require.NoError(t, l.Release(t.Context(), lease))
			require.NoError(t, other.Release(t.Context(), takeLease(t, got)))
		})
	}
}

// beginMove opens the slot of an id for its move to another master, and moves some of its keys.
func beginMove(t *testing.T, c *redistest.Cluster, id string, to *redistest.Server, keys ...string) {
	t.Helper()
	from := c.MasterOf(slotOf(id)).Client(t)
	c.BeginMigration(slotOf(id), to)
	for _, key := range keys {
		require.Equal(t, "OK", from.Do(t.Context(), "MIGRATE", "127.0.0.1", to.Port(), key, 0, 5000).Val())
	}
}

// finishMove moves the rest.
func finishMove(c *redistest.Cluster, id string, to *redistest.Server) {
	c.MoveKeys(slotOf(id), to)
	c.FinishMigration(slotOf(id), to)
}

// A slot stays half-way: scripts with several keys are answered TRYAGAIN, the one whose queue does not exist included.
func TestCluster_aReleaseEndsTheLeaseWhileItsSlotMoves(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	from, to := c.Masters()[0], c.Masters()[1]
	ids := idsOf(t, c, from, 4)
	for i, name := range []string{"no key has moved", "the lock has moved", "the counter has moved", "all keys have moved"} {
		t.Run(name, func(t *testing.T) {
			id := ids[i]
			lock, counter := clusterNames("lock", id)
			holder, other := newLock(t, c.Client(t)), newLock(t, c.Client(t))
			lease := mustAcquire(t, holder, id, time.Minute)
			var waiters []<-chan acquired
			if i > 0 {
				for _, l := range []*redfour.Lock{other, holder} {
					waiters = append(waiters, waitFor(t.Context(), l, id, time.Minute))
				}
				eventually(t, func() bool {
					s, err := holder.Inspect(t.Context(), id)
					return err == nil && len(s.Waiters) == 2
				}, "in the queue")
			}
			beginMove(t, c, id, to, [][]string{nil, {lock}, {counter}, {lock, counter}}[i]...)

			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			began := time.Now()
			require.NoError(t, holder.Release(ctx, lease))
			t.Logf("released after %v", time.Since(began).Round(time.Millisecond))
			for _, s := range []*redistest.Server{from, to} {
				n, err := s.Client(t).ClusterCountKeysInSlot(t.Context(), slotOf(id)).Result()
				require.NoError(t, err)
				keys, err := s.Client(t).ClusterGetKeysInSlot(t.Context(), slotOf(id), int(n)).Result()
				require.NoError(t, err)
				require.NotContains(t, keys, lock)
			}

			finishMove(c, id, to)
			moved := time.Now()
			served := make(chan *redfour.Lease, len(waiters)) // as many as wait
			for _, w := range waiters {
				go func() {
					got := <-w
					if assert.NoError(t, got.err) {
						served <- got.lease
					}
				}()
			}
			for range waiters {
				next := take(t, served)
				t.Logf("the next had it %v after the slot had moved", time.Since(moved).Round(time.Millisecond))
				require.Less(t, time.Since(moved), 3*time.Second)
				require.Greater(t, next.Index, lease.Index)
				require.NoError(t, other.Release(t.Context(), next))
			}
		})
	}
}

func TestCluster_whatASlotThatMovesCosts(t *testing.T) {
	c := redistest.StartCluster(t, 3, 0)
	from, to := c.Masters()[0], c.Masters()[1]
	id := idsOf(t, c, from, 1)[0]
	l := newLock(t, c.Client(t))
	lease := mustAcquire(t, l, id, time.Minute)
	beginMove(t, c, id, to)

	status, err := l.Inspect(t.Context(), id)
	require.NoError(t, err)
	require.True(t, status.Held)
	require.Equal(t, lease.Index, status.Index)
	_, err = l.Acquire(t.Context(), id, time.Minute)
	require.ErrorIs(t, err, redfour.ErrLocked)
	require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
	require.NoError(t, l.ForceRelease(t.Context(), id, lease.Index))

	began := time.Now()
	_, err = l.Acquire(t.Context(), id, time.Minute)
	require.Less(t, time.Since(began), 6*time.Second)
	require.ErrorContains(t, err, "TRYAGAIN")
	require.NotErrorIs(t, err, redfour.ErrLocked)
	require.NotContains(t, err.Error(), "outcome unknown")
	got := waitFor(t.Context(), l, id, time.Minute)
	finishMove(c, id, to)
	moved := time.Now()
	require.Greater(t, takeLease(t, got).Index, lease.Index)
	require.Less(t, time.Since(moved), 3*time.Second)
}
