//go:build unix

package redfour_test

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
	"github.com/redfour-go/redfour/internal/slot"
)

// A pair is a master with one replica.
type pair struct {
	*realRedis

	replica *redistest.Server
}

func startPair(t *testing.T) *pair {
	t.Helper()
	both := redistest.StartSentinels(t, 1, 0, time.Second)
	p := &pair{&realRedis{both.Master(), both.Master().Client(t)}, both.Replica()}
	// A replica that has just come is sent nothing before it has acknowledged the beginning, which takes it up to a second.
	eventually(t, func() bool {
		cmds, err := p.admin.Pipelined(t.Context(), func(pipe redis.Pipeliner) error {
			pipe.Set(t.Context(), "any", "", 0)
			pipe.Do(t.Context(), "WAIT", 1, 2000)
			return nil
		})
		return err == nil && cmds[1].(*redis.Cmd).Val() == int64(1)
	}, "in sync")
	p.do(t, "CONFIG", "RESETSTAT")
	return p
}

// confirming makes a Lock whose leases wait for the replica for so long.
func (p *pair) confirming(t *testing.T, timeout time.Duration, via ...*link) *redfour.Lock {
	t.Helper()
	return newLock(t, newClient(t, p.options(via...), via...), redfour.WithReplicas(1, timeout))
}

// awaitWaits returns when so many connections wait for the replica.
func (r *realRedis) awaitWaits(t *testing.T, n int) {
	t.Helper()
	eventually(t, func() bool { return len(r.waits(t)) == n }, fmt.Sprintf("%d that wait for the replica", n))
}

// waits returns the numbers of the connections that wait for replicas.
func (r *realRedis) waits(t *testing.T) (ids []string) {
	t.Helper()
	for _, c := range r.connections(t, "normal") {
		if strings.Contains(c, " cmd=wait ") && strings.Contains(c, " flags=b ") {
			id, _, _ := strings.Cut(strings.TrimPrefix(c, "id="), " ")
			ids = append(ids, id)
		}
	}
	return ids
}

// awaitFree returns when nobody holds a lock.
func (r *realRedis) awaitFree(t *testing.T) {
	t.Helper()
	eventually(t, func() bool { return len(r.locks(t)) == 0 }, "free")
}

// inBackground makes one call of Acquire.
func inBackground(ctx context.Context, l *redfour.Lock, ttl time.Duration) <-chan acquired {
	c := make(chan acquired, 1) // the one result; the test may not take it
	go func() {
		lease, err := l.Acquire(ctx, "42", ttl)
		c <- acquired{lease: lease, err: err}
	}()
	return c
}

// The ways to a lease of a lock that is free.
var waysToALease = map[string]func(ctx context.Context, l *redfour.Lock, ttl time.Duration) (*redfour.Lease, error){
	"acquire": func(ctx context.Context, l *redfour.Lock, ttl time.Duration) (*redfour.Lease, error) {
		return l.Acquire(ctx, "42", ttl)
	},
	"wait for": func(ctx context.Context, l *redfour.Lock, ttl time.Duration) (*redfour.Lease, error) {
		return l.WaitAcquire(ctx, "42", ttl)
	},
}

func TestReplicas_validatesOptions(t *testing.T) {
	plain := func(readTimeout time.Duration) redis.UniversalClient {
		return newClient(t, &redis.Options{Addr: "127.0.0.1:1", ReadTimeout: readTimeout})
	}
	sentinel := func(readTimeout time.Duration) redis.UniversalClient {
		return redis.NewFailoverClient(&redis.FailoverOptions{MasterName: "m", SentinelAddrs: []string{"127.0.0.1:1"}, ReadTimeout: readTimeout})
	}
	cluster := func(readTimeout time.Duration) redis.UniversalClient {
		return redis.NewClusterClient(&redis.ClusterOptions{Addrs: []string{"127.0.0.1:1"}, ReadTimeout: readTimeout})
	}
	for _, client := range []func(time.Duration) redis.UniversalClient{plain, sentinel, cluster} {
		for _, row := range []struct {
			n                    int
			timeout, readTimeout time.Duration
			says                 string // "" is valid
		}{
			{1, time.Millisecond, 0, ""},
			{1, 5*time.Second - time.Millisecond, 0, ""},
			{100, time.Minute, 2 * time.Minute, ""},
			{1, time.Hour, -1, ""},
			{1, time.Hour, -2, ""},
			{0, time.Second, 0, "0 replicas to wait for: at least 1 is needed"},
			{-1, time.Second, 0, "-1 replicas to wait for: at least 1 is needed"},
			{1, 0, 0, "timeout 0s to wait for replicas is shorter than 1ms"},
			{1, 999 * time.Microsecond, 0, "timeout 999µs to wait for replicas is shorter than 1ms"},
			{1, -time.Second, -1, "timeout -1s to wait for replicas is shorter than 1ms"},
			{1, 5 * time.Second, 0, "timeout 5s to wait for replicas is not shorter than the client's ReadTimeout of 5s"},
			{1, time.Second, time.Second, "timeout 1s to wait for replicas is not shorter than the client's ReadTimeout of 1s"},
		} {
			c := client(row.readTimeout)
			l, err := redfour.New(c, redfour.WithReplicas(row.n, row.timeout))
			if row.says != "" {
				require.EqualError(t, err, "redfour: new: "+row.says)
				require.Nil(t, l)
			} else {
				require.NoError(t, err, "%+v", row)
				require.NoError(t, l.Close())
			}
			require.NoError(t, c.Close())
		}
	}
	_, err := redfour.Open("redis://127.0.0.1:1?read_timeout=1s", redfour.WithReplicas(1, time.Second))
	require.ErrorContains(t, err, "not shorter than the client's ReadTimeout of 1s")
}

func TestReplicas_aTTLThatLeavesNoRoomIsRefusedBeforeAnythingIsSent(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithReplicas(1, 2*time.Second))
		for op, get := range waysToALease {
			_, err := get(t.Context(), l, time.Second)
			require.EqualError(t, err, "redfour: "+op+` "42": ttl 1s leaves no room to wait 2s for replicas`)
			_, err = get(t.Context(), l, 2*time.Second+999*time.Microsecond)
			require.ErrorContains(t, err, "leaves no room")
		}
		require.Zero(t, way.sent())
	})
}

// The server is new: the renewal that WAIT is about has to bring its script along.
func TestRealReplicas_aLeaseIsReturnedOnceTheReplicaHasIt(t *testing.T) {
	for op, get := range waysToALease {
		t.Run(op, func(t *testing.T) {
			p := startPair(t)
			l := p.confirming(t, 4*time.Second)
			p.replica.Pause()
			got := make(chan acquired, 1)
			go func() {
				lease, err := get(t.Context(), l, time.Minute)
				got <- acquired{lease: lease, err: err}
			}()
			p.awaitWaits(t, 1)
			left := func() time.Duration { return p.admin.PTTL(t.Context(), "lock:42").Val() }
			eventually(t, func() bool { return left() < time.Minute-200*time.Millisecond }, "some time has passed")
			require.Empty(t, got)
			p.replica.Resume()
			lease := takeLease(t, got)
			require.True(t, lease.Immediate)
			require.Equal(t, strconv.FormatInt(lease.Index, 10), p.replica.Client(t).HGet(t.Context(), "lock:42", "index").Val())
			inRedis := left()
			require.LessOrEqual(t, lease.Remaining(), inRedis+time.Millisecond, "counted from before the wait")
			require.NoError(t, l.Release(t.Context(), lease))
		})
	}
}

// The lock is given back, and the lease with which it would have been held is not.
func TestRealReplicas_whatALaggingReplicaDoesNotAcknowledgeIsGivenBack(t *testing.T) {
	p := startPair(t)
	l := p.confirming(t, 100*time.Millisecond)
	p.replica.Pause()
	for op, get := range waysToALease {
		lease, err := get(t.Context(), l, time.Minute)
		require.Nil(t, lease)
		require.EqualError(t, err, "redfour: "+op+` "42": not acknowledged by enough replicas: 0 of 1 in 100ms`)
		require.ErrorIs(t, err, redfour.ErrNotReplicated)
		require.NotErrorIs(t, err, redfour.ErrLocked)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		p.awaitFree(t)
	}
	err := l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
		require.Fail(t, "it runs")
		return nil
	})
	require.ErrorIs(t, err, redfour.ErrNotReplicated)
	p.awaitFree(t)

	p.replica.Resume()
	eventually(t, func() bool {
		lease, err := l.Acquire(t.Context(), "42", time.Minute)
		return err == nil && l.Release(t.Context(), lease) == nil
	}, "it has caught up")
}

func TestRealReplicas_moreThanThereAre(t *testing.T) {
	p := startPair(t)
	l := newLock(t, newClient(t, p.options()), redfour.WithReplicas(3, time.Second))
	_, err := l.Acquire(t.Context(), "42", time.Minute)
	require.EqualError(t, err, `redfour: acquire "42": not acknowledged by enough replicas: 1 of 3 in 1s`)

	alone := startReal(t)
	l = newLock(t, newClient(t, alone.options()), redfour.WithReplicas(3, 10*time.Millisecond))
	for range 3 {
		_, err = l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorContains(t, err, "0 of 3")
		require.ErrorIs(t, err, redfour.ErrNotReplicated)
		alone.awaitFree(t)
	}
}

func TestRealReplicas_leasesThatAreHandedOverAreConfirmedToo(t *testing.T) {
	p := startPair(t)
	var way link
	holder, waiter := p.confirming(t, 4*time.Second), p.confirming(t, 4*time.Second, &way)
	queue := func() int64 { return p.admin.LLen(t.Context(), "lock-waiters:42").Val() }
	lease := mustAcquire(t, holder, "42", time.Minute)
	require.Equal(t, 1, p.calls(t, "wait"))

	// By a message, from another process.
	got := sleeper(t, waiter, &way, "42")
	eventually(t, func() bool { return queue() == 1 }, "queued")
	p.do(t, "CONFIG", "RESETSTAT")
	require.NoError(t, holder.Release(t.Context(), lease))
	lease = takeLease(t, got)
	require.Equal(t, 1, p.calls(t, "wait"))

	// In the process.
	got = waitFor(t.Context(), waiter, "42", time.Minute)
	eventually(t, func() bool { return queue() == 1 }, "queued")
	p.do(t, "CONFIG", "RESETSTAT")
	require.NoError(t, waiter.Release(t.Context(), lease))
	lease = takeLease(t, got)
	require.Equal(t, 1, p.calls(t, "wait"))

	// By asking, because the message is lost.
	require.NoError(t, waiter.Release(t.Context(), lease))
	lease = mustAcquire(t, holder, "42", time.Minute)
	got = waitFor(t.Context(), waiter, "42", time.Minute)
	eventually(t, func() bool { return queue() == 1 }, "queued")
	p.do(t, "CONFIG", "RESETSTAT")
	way.mute(isSubscriber)
	require.NoError(t, holder.Release(t.Context(), lease))
	lease = takeLease(t, got)
	require.Equal(t, 1, p.calls(t, "wait"))
	require.NoError(t, waiter.Release(t.Context(), lease))
}

// The next waiter does not wait for the ttl of a lease that another could not have confirmed.
func TestRealReplicas_aLeaseThatIsNotConfirmedGoesToTheNextWaiter(t *testing.T) {
	p := startPair(t)
	l := p.confirming(t, time.Second)
	lease := mustAcquire(t, l, "42", time.Minute)
	waiting := []<-chan acquired{waitFor(t.Context(), l, "42", time.Minute), waitFor(t.Context(), l, "42", time.Minute)}
	eventually(t, func() bool { return p.admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "queued")
	p.replica.Pause()
	require.NoError(t, l.Release(t.Context(), lease))
	for _, got := range waiting {
		require.ErrorIs(t, take(t, got).err, redfour.ErrNotReplicated)
	}
	p.awaitFree(t)
}

func TestRealReplicas_aCallerWhoLeavesDoesNotWaitForThem(t *testing.T) {
	p := startPair(t)
	l := p.confirming(t, 3*time.Second)
	p.replica.Pause()
	under := 0
	for op, get := range waysToALease {
		under++
		ctx, cancel := context.WithCancelCause(t.Context())
		got := make(chan acquired, 1)
		go func() {
			lease, err := get(ctx, l, time.Minute)
			got <- acquired{lease: lease, err: err}
		}()
		p.awaitWaits(t, under)
		cancel(fmt.Errorf("of another lock: %w", redfour.ErrConflict))
		left := time.Now()
		err := take(t, got).err
		require.Less(t, time.Since(left), time.Second)
		require.ErrorIs(t, err, context.Canceled, op)
		require.ErrorIs(t, err, redfour.ErrNotReplicated, op)
		p.awaitFree(t)
		require.Len(t, p.waits(t), under, "before WAIT is over")
	}
}

func TestRealReplicas_closeGivesBackWhatIsNotConfirmed(t *testing.T) {
	p := startPair(t)
	p.replica.Pause()
	for op, get := range waysToALease {
		l := p.confirming(t, time.Second)
		got := make(chan acquired, 1)
		go func() {
			lease, err := get(t.Context(), l, time.Minute)
			got <- acquired{lease: lease, err: err}
		}()
		p.awaitWaits(t, 1)
		require.NoError(t, l.Close())
		require.Empty(t, p.locks(t), "Close has waited")
		require.Empty(t, p.waits(t))
		require.ErrorIs(t, take(t, got).err, redfour.ErrClosed, op)
	}
}

func TestRealReplicas_aLeaseThatIsLostMeanwhileIsALoss(t *testing.T) {
	p := startPair(t)
	for want, meanwhile := range map[error]func(){
		redfour.ErrExpired:  func() { p.do(t, "DEL", "lock:42") },
		redfour.ErrConflict: func() { p.do(t, "HSET", "lock:42", "index", "7") },
	} {
		var way link
		l := p.confirming(t, time.Second, &way)
		way.afterScript(once(isAcquire, func() error {
			meanwhile()
			return nil
		}))
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, want)
		require.NotErrorIs(t, err, redfour.ErrNotReplicated)
		p.do(t, "DEL", "lock:42")
	}
}

func TestRealReplicas_aDeadConnectionIsReplaced(t *testing.T) {
	p := startPair(t)
	l := p.confirming(t, 4*time.Second)
	p.replica.Pause()
	got := inBackground(t.Context(), l, time.Minute)
	p.awaitWaits(t, 1)
	first := p.waits(t)[0]
	p.do(t, "CLIENT", "KILL", "ID", first)
	eventually(t, func() bool { w := p.waits(t); return len(w) == 1 && w[0] != first }, "another")
	require.Empty(t, got)
	p.replica.Resume()
	require.NoError(t, l.Release(t.Context(), takeLease(t, got)))
}

// What confirms a lease is a renewal. One that nobody has heard of for long may come after those of the holder.
func TestRealReplicas_aDeadlineAllowsForAnAttemptThatIsStillOnItsWay(t *testing.T) {
	p := startPair(t)
	var way link
	var deliver func()
	l := p.confirming(t, time.Second, &way)
	way.afterScript(once(isAcquire, func() error {
		deliver = way.keepBack()
		return nil
	}))
	lease := mustAcquire(t, l, "42", time.Minute)
	require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
	require.NotNil(t, deliver)
	deliver()
	left := func() time.Duration { return p.admin.PTTL(t.Context(), "lock:42").Val() }
	eventually(t, func() bool { return left() < time.Minute }, "it has come")
	inRedis := left()
	require.LessOrEqual(t, lease.Remaining(), inRedis+time.Millisecond)
	require.NoError(t, l.Release(t.Context(), lease))
}

func TestRealReplicas_aMasterThatIsGoneIsAClearError(t *testing.T) {
	for op, get := range waysToALease {
		p := startPair(t)
		l := p.confirming(t, 200*time.Millisecond)
		p.replica.Pause()
		got := make(chan acquired, 1)
		go func() {
			lease, err := get(t.Context(), l, time.Second)
			got <- acquired{lease: lease, err: err}
		}()
		p.awaitWaits(t, 1)
		p.Kill()
		killed := time.Now()
		err := take(t, got).err
		require.Less(t, time.Since(killed), 2*time.Second, op)
		require.ErrorIs(t, err, redfour.ErrNotReplicated)
		require.NotErrorIs(t, err, redfour.ErrNotHeld)
		require.NotContains(t, err.Error(), "outcome unknown")
	}
}

func TestRealReplicas_aUserWhoMayNotWaitIsToldAtOnce(t *testing.T) {
	p := startPair(t)
	o := p.options()
	p.user(t, "~*", "&*", "+@all", "-wait")(o)
	l := newLock(t, newClient(t, o), redfour.WithReplicas(1, time.Second))
	for op, get := range waysToALease {
		start := time.Now()
		_, err := get(t.Context(), l, time.Minute)
		require.Less(t, time.Since(start), time.Second, op)
		require.ErrorIs(t, err, redfour.ErrNotReplicated)
		require.ErrorContains(t, err, "NOPERM")
		p.awaitFree(t)
	}
}

// A client that waits for its only connection gives the lease back over it.
func TestRealReplicas_oneConnectionIsEnough(t *testing.T) {
	p := startPair(t)
	o := p.options()
	o.PoolSize, o.PipelinePoolSize = 1, -1
	l := newLock(t, newClient(t, o), redfour.WithReplicas(1, 2*time.Second))
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
	p.replica.Pause()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := inBackground(ctx, l, time.Minute)
	p.awaitWaits(t, 1)
	cancel()
	require.ErrorIs(t, take(t, got).err, context.Canceled)
	p.awaitFree(t)
}

func TestRealReplicas_nobodyWaitsForThemWithoutTheOption(t *testing.T) {
	p := startPair(t)
	var way link
	holder := p.lock(t)
	waiter := newLock(t, newClient(t, p.options(&way), &way))
	p.replica.Pause()
	lease := mustAcquire(t, holder, "42", time.Minute)
	got := sleeper(t, waiter, &way, "42")
	require.NoError(t, holder.Release(t.Context(), lease))
	require.NoError(t, waiter.Release(t.Context(), takeLease(t, got)))
	require.Zero(t, p.calls(t, "wait"))
}

// Renew and KeepAlive are not waited for, as is documented.
func TestRealReplicas_renewalsDoNotWait(t *testing.T) {
	p := startPair(t)
	l := p.confirming(t, 4*time.Second)
	lease := mustAcquire(t, l, "42", time.Minute)
	p.replica.Pause()
	require.NoError(t, l.Renew(t.Context(), lease, 2*time.Minute))
	require.NoError(t, l.Release(t.Context(), lease))
	require.Equal(t, 1, p.calls(t, "wait"))
}

func TestClusterReplicas_eachMasterHasItsOwn(t *testing.T) {
	const ids = 60
	c := redistest.StartCluster(t, 3, 1)
	l := newLock(t, c.Client(t), redfour.WithReplicas(1, 2*time.Second))
	at := func(id string) *redistest.Server {
		lock, _ := clusterNames("lock", id)
		return c.MasterOf(slot.Of(lock))
	}
	masters := c.Masters()
	counts := func() (n int) {
		for _, s := range masters {
			calls := (&realRedis{s, s.Client(t)}).calls(t, "wait")
			require.Positive(t, calls)
			n += calls
		}
		return n
	}
	for id := range ids {
		lease := mustAcquire(t, l, strconv.Itoa(id), time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
	}
	require.GreaterOrEqual(t, counts(), ids)

	// A replica that lags concerns the locks of its master alone.
	lagging := at("0")
	other := slices.IndexFunc(masters, func(s *redistest.Server) bool { return s != lagging })
	elsewhere := 1
	for at(strconv.Itoa(elsewhere)) != masters[other] {
		elsewhere++
	}
	replica := c.ReplicaOf(lagging)
	replica.Pause()
	_, err := l.Acquire(t.Context(), "0", time.Minute)
	require.ErrorContains(t, err, "0 of 1 in 2s")
	lease := mustAcquire(t, l, strconv.Itoa(elsewhere), time.Minute)
	require.NoError(t, l.Release(t.Context(), lease))
	replica.Resume()
	lock, _ := clusterNames("lock", "0")
	eventually(t, func() bool { return lagging.Client(t).Exists(t.Context(), lock).Val() == 0 }, "free")
}

// The slot moves after the lease was got, so that it is confirmed by the new master.
func TestClusterReplicas_aSlotMovesMeanwhile(t *testing.T) {
	c := redistest.StartCluster(t, 3, 1)
	var way link
	client := newClusterClient(t, c, &way)
	l := newLock(t, client, redfour.WithReplicas(1, 2*time.Second))
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
	lock, _ := clusterNames("lock", "42")
	at := slot.Of(lock)
	from := c.MasterOf(at)
	to := c.Masters()[(slices.Index(c.Masters(), from)+1)%3]
	before := (&realRedis{to, to.Client(t)}).calls(t, "wait")
	way.afterScript(once(isAcquire, func() error {
		c.Migrate(at, to) // The test's goroutine waits meanwhile.
		return nil
	}))
	lease := mustAcquire(t, l, "42", time.Minute)
	require.Positive(t, (&realRedis{to, to.Client(t)}).calls(t, "wait")-before)
	require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
	require.NoError(t, l.Release(t.Context(), lease))
}

// What the replica has acknowledged is there when it is promoted.
func TestFailoverReplicas_aConfirmedLeaseSurvivesTheMastersDeath(t *testing.T) {
	sentinel := redistest.StartFailover(t)
	l := newLock(t, sentinel.Client(t), redfour.WithReplicas(1, 4*time.Second))
	lease := mustAcquire(t, l, "42", time.Minute)
	sentinel.Crash()
	require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
	next, err := l.Acquire(t.Context(), "43", time.Minute)
	require.Nil(t, next, "the promoted one has no replica")
	require.ErrorContains(t, err, "0 of 1 in 4s")
	require.NoError(t, l.Release(t.Context(), lease))
}
