//go:build unix

package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// What a real server shows when replies are lost, connections are killed, and the
// server stops, dies or forgets.

// A hangup is a way to the server on which a reply can be lost as it is lost in the
// field: the script arrives and runs, and instead of its reply the client reads the
// end of the connection.
type hangup struct {
	mu    sync.Mutex // guards what follows
	armed bool       // the next script is the one
	ran   func()     // called when it has run
	lost  int        // replies so far

	answer string // of a proxy, in place of the reply; "": the connection ends
}

func (h *hangup) loseNext() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = true
}

func (h *hangup) losses() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.lost
}

func (h *hangup) through(dial dialer) dialer {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &hangupConn{Conn: conn, hangup: h}, nil
	}
}

type hangupConn struct {
	net.Conn

	hangup *hangup
	doomed atomic.Bool
}

func (c *hangupConn) Write(b []byte) (int, error) {
	h := c.hangup
	h.mu.Lock()
	if h.armed && strings.Contains(string(b), "\r\neval") {
		h.armed = false
		c.doomed.Store(true)
	}
	h.mu.Unlock()
	return c.Conn.Write(b)
}

func (c *hangupConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil || !c.doomed.Load() {
		return n, err
	}
	h := c.hangup
	h.mu.Lock()
	h.lost++
	ran := h.ran
	h.mu.Unlock()
	if ran != nil {
		ran()
	}
	if h.answer != "" {
		c.doomed.Store(false)
		return copy(b, h.answer), nil
	}
	return 0, errors.Join(io.EOF, c.Close())
}

// A loser makes a Lock that loses the reply to its first script that matches. When
// that has run, it calls ran.
type loser func(t *testing.T, r *realRedis, match func(redis.Cmder) bool, ran func()) *redfour.Lock

// eachLoser runs f with the reply lost inside the client, on the network, and by a
// proxy that answers with an error of its own.
func eachLoser(t *testing.T, f func(t *testing.T, r *realRedis, lossy loser)) {
	t.Helper()
	r := startReal(t)
	l := r.lock(t)
	require.NoError(t, l.Release(t.Context(), renewed(t, l, mustAcquire(t, l, "42", time.Minute))))

	for _, way := range []struct {
		name  string
		lossy loser
	}{
		{"client", loseInClient}, {"network", loseOnNetwork}, {"proxy", loseInProxy},
	} {
		t.Run(way.name, func(t *testing.T) {
			r.do(t, "FLUSHALL")
			f(t, r, way.lossy)
			require.Empty(t, r.locks(t))
		})
	}
}

// renewed makes the scripts known to the server, so that the one that is lost is not
// answered with NOSCRIPT.
func renewed(t *testing.T, l *redfour.Lock, lease *redfour.Lease) *redfour.Lease {
	t.Helper()
	require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
	return lease
}

func loseInClient(t *testing.T, r *realRedis, match func(redis.Cmder) bool, ran func()) *redfour.Lock {
	t.Helper()
	way, lost := new(link), new(atomic.Int64)
	way.afterScript(once(match, func() error {
		lost.Add(1)
		ran()
		return lostReply()
	}))
	t.Cleanup(func() { require.EqualValues(t, 1, lost.Load()) })
	return r.lock(t, way)
}

func loseOnNetwork(t *testing.T, r *realRedis, match func(redis.Cmder) bool, ran func()) *redfour.Lock {
	t.Helper()
	return loseBy(t, r, match, &hangup{ran: ran})
}

func loseInProxy(t *testing.T, r *realRedis, match func(redis.Cmder) bool, ran func()) *redfour.Lock {
	t.Helper()
	return loseBy(t, r, match, &hangup{ran: ran, answer: "-upstream failure\r\n"})
}

func loseBy(t *testing.T, r *realRedis, match func(redis.Cmder) bool, h *hangup) *redfour.Lock {
	t.Helper()
	way := new(link)
	way.beforeScript(once(match, func() error {
		h.loseNext()
		return nil
	}))
	t.Cleanup(func() { require.Equal(t, 1, h.losses()) })
	o := r.options(way)
	o.Dialer = h.through(o.Dialer)
	return newLock(t, newClient(t, o, way))
}

func nothing() {}

func TestRealAcquire_lostReplyChangesNothing(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		l := lossy(t, r, isAcquire, nothing)
		lease, err := l.Acquire(t.Context(), "42", time.Minute)
		require.NoError(t, err)
		requireOnlyIndex(t, r, lease)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

// requireOnlyIndex shows that no index was given since, and then lost.
func requireOnlyIndex(t *testing.T, r *realRedis, lease *redfour.Lease) {
	t.Helper()
	require.Equal(t, strconv.FormatInt(lease.Index, 10), r.do(t, "HGET", "lock:"+lease.ID, "index"))
	require.Equal(t, strconv.FormatInt(lease.Index, 10), r.do(t, "GET", "lockindex"))
}

func TestRealWaitAcquire_lostReplyChangesNothing(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		l := lossy(t, r, isAcquire, nothing)
		lease := takeLease(t, waitFor(t.Context(), l, "42", time.Minute))
		requireOnlyIndex(t, r, lease)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestRealAcquire_lostReplyOfHeldLockChangesNothing(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		holder := r.lock(t)
		held := mustAcquire(t, holder, "42", time.Minute)
		l := lossy(t, r, isAcquire, nothing)
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		locked := new(redfour.LockedError)
		require.ErrorAs(t, err, &locked)
		require.Equal(t, held.Index, locked.Index)
		require.NoError(t, holder.Release(t.Context(), held))
	})
}

func TestRealRelease_lostReplyChangesNothing(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		l := lossy(t, r, isRelease, nothing)
		lease := mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

func TestRealWithLock_lostReplyOfItsReleaseIsNoLoss(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		l := lossy(t, r, isRelease, nothing)
		require.NoError(t, l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error { return nil }))
	})
}

func TestRealAcquire_anErrorOfAProxyLeavesTheOutcomeUnknown(t *testing.T) {
	r := startReal(t)
	way, h := new(link), &hangup{answer: "-upstream failure\r\n"}
	way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
		if isAcquire(cmd) {
			h.loseNext()
		}
		return nil
	})
	o := r.options(way)
	o.Dialer = h.through(o.Dialer)
	l := newLock(t, newClient(t, o, way))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := l.Acquire(ctx, "42", time.Hour)
	require.ErrorContains(t, err, "outcome unknown: upstream failure")
	require.Positive(t, h.losses())
	eventually(t, func() bool { return len(r.locks(t)) == 0 }, "the lock was given back in the background")
}

func TestRealRelease_lostReplyLeavesTheNextHolderAlone(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		other := r.lock(t)
		var next *redfour.Lease
		l := lossy(t, r, isRelease, func() { next, _ = other.Acquire(t.Context(), "42", time.Minute) })
		lease := mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
		require.NotNil(t, next)
		require.NoError(t, other.Release(t.Context(), next))
	})
}

func TestRealRenew_lostReplyChangesNothing(t *testing.T) {
	eachLoser(t, func(t *testing.T, r *realRedis, lossy loser) {
		l := lossy(t, r, isRenew, nothing)
		lease := mustAcquire(t, l, "42", time.Minute)
		before := time.Now()
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		require.WithinRange(t, lease.Deadline(), before.Add(counted(time.Hour)), time.Now().Add(counted(time.Hour)))
		require.Greater(t, r.admin.PTTL(t.Context(), "lock:42").Val(), time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
	})
}

// quick measures f up to three times, until it takes less than limit. What is
// to be shown is how long the library takes, not the rest of the machine.
func quick(t *testing.T, limit time.Duration, f func() time.Duration) {
	t.Helper()
	var took []time.Duration
	for range 3 {
		d := f()
		if d < limit {
			return
		}
		took = append(took, d)
	}
	require.Fail(t, "too slow", "%v, not below %v", took, limit)
}

// A caller is a Lock with a connection of its own, that tells of the scripts that it
// sends.
type caller struct {
	*redfour.Lock

	lease *redfour.Lease
	wrote chan struct{} // a script is on its way; capacity for one
}

func newCaller(t *testing.T, r *realRedis, id string) *caller {
	t.Helper()
	c := &caller{wrote: make(chan struct{}, 1)}
	o := r.options()
	dial := o.Dialer
	o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &tellingConn{conn, "\r\neval", c.wrote}, nil
	}
	c.Lock = newLock(t, newClient(t, o))
	c.lease = renewed(t, c.Lock, mustAcquire(t, c.Lock, id, time.Minute))
	return c
}

// A tellingConn tells when a command of this kind has been written.
type tellingConn struct {
	net.Conn

	kind  string // how its name begins on the wire
	wrote chan<- struct{}
}

func (c *tellingConn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	if strings.Contains(string(b), c.kind) {
		select {
		case c.wrote <- struct{}{}:
		default:
		}
	}
	return n, err
}

// call calls the method that has this name in errors.
func (c *caller) call(ctx context.Context, op string) error {
	var err error
	switch op {
	case "acquire":
		_, err = c.Acquire(ctx, c.lease.ID, time.Minute)
	case "wait for":
		_, err = c.WaitAcquire(ctx, c.lease.ID, time.Minute)
	case "renew":
		err = c.Renew(ctx, c.lease, time.Minute)
	case "release":
		err = c.Release(ctx, c.lease)
	}
	return err
}

func TestReal_cancelledCallersLeaveStoppedServerAtOnce(t *testing.T) {
	const promptly = 100 * time.Millisecond
	for _, row := range []struct {
		op    string
		limit time.Duration
	}{
		{"acquire", promptly}, {"wait for", promptly}, {"renew", promptly}, {"release", promptly + promptly},
	} {
		t.Run(row.op, func(t *testing.T) {
			r := startReal(t)
			callers := make(chan *caller, 3) // one for each try
			for i := range cap(callers) {
				c := newCaller(t, r, strconv.Itoa(i))
				if row.op == "acquire" || row.op == "wait for" {
					require.NoError(t, c.Release(t.Context(), c.lease))
				}
				callers <- c
			}
			taken := r.do(t, "GET", "lockindex")
			var gone []*caller
			r.Pause()
			quick(t, row.limit, func() time.Duration {
				c := <-callers
				gone = append(gone, c)
				ctx, cancel := context.WithCancel(t.Context())
				failed := make(chan error, 1)
				<-c.wrote
				go func() { failed <- c.call(ctx, row.op) }()
				take(t, c.wrote)
				cancel()
				start := time.Now()
				err := take(t, failed)
				took := time.Since(start)
				require.ErrorIs(t, err, context.Canceled)
				require.NotErrorIs(t, err, redfour.ErrLocked)
				require.NotErrorIs(t, err, redfour.ErrNotHeld)
				require.ErrorContains(t, err, "no answer from Redis")
				return took
			})

			r.Resume()
			resumed := time.Now()
			close(callers)
			for c := range callers { // the ones that were not needed
				_ = c.Release(t.Context(), c.lease)
			}
			switch row.op {
			case "acquire", "wait for":
				eventually(t, func() bool { return r.do(t, "GET", "lockindex") != taken }, "what was abandoned has run")
			case "renew":
				for _, c := range gone {
					require.NoError(t, c.Release(t.Context(), c.lease))
				}
			}
			eventually(t, func() bool { return len(r.locks(t)) == 0 }, "given back")
			require.Less(t, time.Since(resumed), 2*time.Second)
		})
	}
}

// The first call of a client hangs before it can send its script: go-redis greets the
// server on each new connection, and waits for the answer.
func TestReal_cancelledFirstCallersLeaveStoppedServerAtOnce(t *testing.T) {
	const promptly = 100 * time.Millisecond
	for _, row := range []struct {
		op    string
		limit time.Duration
	}{
		{"acquire", promptly}, {"wait for", promptly}, {"renew", promptly}, {"release", promptly + promptly},
	} {
		t.Run(row.op, func(t *testing.T) {
			r := startReal(t)
			var gone []*redfour.Lock
			r.Pause()
			quick(t, row.limit, func() time.Duration {
				greeted := make(chan struct{}, 1)
				o := r.options()
				dial := o.Dialer
				o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
					conn, err := dial(ctx, network, addr)
					if err != nil {
						return nil, err
					}
					return &tellingConn{conn, "\r\nhello", greeted}, nil
				}
				l := newLock(t, newClient(t, o))
				gone = append(gone, l)
				ctx, cancel := context.WithCancel(t.Context())
				failed := make(chan error, 1)
				go func() { failed <- everyCall[row.op](ctx, l) }()
				take(t, greeted)
				cancel()
				start := time.Now()
				err := take(t, failed)
				took := time.Since(start)
				require.ErrorIs(t, err, context.Canceled)
				require.NotErrorIs(t, err, redfour.ErrLocked)
				require.NotErrorIs(t, err, redfour.ErrNotHeld)
				require.ErrorContains(t, err, "no answer from Redis")
				return took
			})

			r.Resume()
			for _, l := range gone {
				require.NoError(t, l.Close()) // waits for what goes on in the background
			}
			require.Empty(t, r.locks(t))
		})
	}
}

func TestRealWaitAcquire_noticesReleaseWhenItsSubscriberReturns(t *testing.T) {
	r := startReal(t)
	holder := r.lock(t)
	lease := mustAcquire(t, holder, "42", time.Minute)
	way := new(link)
	dials := make(chan struct{}, 1000) // more than are made
	o := r.options(way)
	inner := o.Dialer
	o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
		dials <- struct{}{}
		return inner(ctx, network, addr)
	}
	l := newLock(t, newClient(t, o, way))
	got := sleeper(t, l, way, "42")
	for len(dials) > 0 {
		<-dials
	}

	way.setDown(true)
	way.cut(isSubscriber)
	// By then its pauses between two tries are at their longest.
	for range 8 {
		take(t, dials)
	}
	require.Zero(t, r.listeners(t))
	require.NoError(t, holder.Release(t.Context(), lease))
	way.setDown(false)
	back := time.Now()
	require.NoError(t, l.Release(t.Context(), takeLease(t, got)))
	require.Less(t, time.Since(back), 3*time.Second)
}

// A name moves (VIP, proxy, DNS): commands follow it, while the old master lives on
// as a replica, and keeps its subscribers. Others pass the lock on all the time, so that no release is published.
func TestRealSubscription_followsANameThatMoves(t *testing.T) {
	for name, cut := range map[string]bool{"commands are cut off": true, "standing connections stay": false} {
		t.Run(name, func(t *testing.T) {
			old := startReal(t, "--repl-diskless-sync-delay", "0")
			to := startReal(t, "--replicaof", "127.0.0.1", strconv.Itoa(old.Port()))
			var at atomic.Pointer[realRedis]
			at.Store(old)
			way := new(link)
			o := old.options()
			dial := o.Dialer
			o.Dialer = way.through(func(ctx context.Context, network, _ string) (net.Conn, error) {
				return dial(ctx, network, at.Load().Addr())
			})
			lease := mustAcquire(t, old.lock(t), "42", time.Minute)
			got := sleeper(t, newLock(t, newClient(t, o, way)), way, "42")
			eventually(t, func() bool { return to.admin.LLen(t.Context(), "lock-waiters:42").Val() == 1 }, "replicated")

			to.do(t, "REPLICAOF", "NO", "ONE")
			old.do(t, "REPLICAOF", "127.0.0.1", strconv.Itoa(to.Port()))
			passAround(t, "42", to.lock(t), to.lock(t))
			eventually(t, func() bool { return to.admin.LLen(t.Context(), "lock-waiters:42").Val() == 3 }, "queued")
			at.Store(to)
			moved := time.Now()
			if cut {
				way.cut(func(c *linkConn) bool { return !isSubscriber(c) })
			}
			require.NoError(t, to.lock(t).Release(t.Context(), lease))
			takeLease(t, got)
			t.Logf("served %v after the move", time.Since(moved).Round(time.Millisecond))
			require.Less(t, time.Since(moved), 3*time.Second)
		})
	}
}

// passAround passes the lock of id between the given Locks until the test ends, so that two or more
// callers wait in each.
func passAround(t *testing.T, id string, locks ...*redfour.Lock) {
	t.Helper()
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	for i := range 3 * len(locks) {
		wg.Go(func() {
			for l := locks[i%len(locks)]; ctx.Err() == nil; {
				if lease, err := l.WaitAcquire(ctx, id, time.Minute); err == nil {
					_ = l.Release(ctx, lease)
				}
			}
		})
	}
}

func TestRealWaitAcquire_aClosedClientEndsItWithinASecond(t *testing.T) {
	r := startReal(t)
	mustAcquire(t, r.lock(t), "42", time.Minute)
	way := new(link)
	client := newClient(t, r.options(way), way)
	got := sleeper(t, newLock(t, client), way, "42")
	require.NoError(t, client.Close())
	closed := time.Now()
	require.ErrorIs(t, take(t, got).err, redis.ErrClosed)
	require.Less(t, time.Since(closed), time.Second)
}

func TestRealWaitAcquire_killedSubscriberLooksAgain(t *testing.T) {
	r := startReal(t)
	mustAcquire(t, r.lock(t), "42", time.Minute)
	way := new(link)
	l := r.lock(t, way)
	got := sleeper(t, l, way, "42")
	r.do(t, "DEL", "lock:42") // says nothing on the channel
	require.Empty(t, got)
	r.do(t, "CLIENT", "KILL", "TYPE", "pubsub")
	killed := time.Now()
	require.NoError(t, l.Release(t.Context(), takeLease(t, got)))
	require.Less(t, time.Since(killed), 3*time.Second)
	require.Len(t, r.connections(t, "pubsub"), 1)
}

func TestRealWaitAcquire_expiryWakesIt(t *testing.T) {
	const ttl = 500 * time.Millisecond
	r := startReal(t)
	held := mustAcquire(t, r.lock(t), "42", ttl)
	l := r.lock(t)
	lease, err := l.WaitAcquire(t.Context(), "42", time.Minute)
	require.NoError(t, err)
	require.Greater(t, time.Now(), held.Deadline())
	require.Less(t, time.Since(held.Deadline()), 2*time.Second)
	require.NoError(t, l.Release(t.Context(), lease))
}

func TestRealWaitAcquire_serverThatLostItsDataWakesIt(t *testing.T) {
	r := startReal(t)
	holder, way := r.lock(t), new(link)
	lease := mustAcquire(t, holder, "42", time.Minute)
	l := r.lock(t, way)
	got := sleeper(t, l, way, "42")
	r.Kill()
	r.Restart()
	back := time.Now()
	next := takeLease(t, got)
	require.Less(t, time.Since(back), 4*time.Second)
	require.Greater(t, next.Index, lease.Index)
	requireSuperseded(t, r, holder, lease)
	require.NoError(t, l.Release(t.Context(), next))
}

func TestRealWaitAcquire_serverThatKeptItsDataKeepsTheLock(t *testing.T) {
	r := startReal(t, "--appendonly", "yes", "--appendfsync", "always")
	holder, way := r.lock(t), new(link)
	lease := mustAcquire(t, holder, "42", time.Minute)
	l := r.lock(t, way)
	got := sleeper(t, l, way, "42")
	r.Kill()
	looks := answered(way, isAcquire)
	r.Restart()
	eventually(t, func() bool { return looks.Load() >= 1 }, "a look when it has subscribed again")
	require.NoError(t, holder.Renew(t.Context(), lease, time.Minute))
	require.Empty(t, got)
	require.NoError(t, holder.Release(t.Context(), lease))
	released := time.Now()
	next := takeLease(t, got)
	require.Less(t, time.Since(released), 3*time.Second)
	require.Greater(t, next.Index, lease.Index)
	require.NoError(t, l.Release(t.Context(), next))
}

func TestReal_callsThatBeginWhileTheServerIsDownSucceed(t *testing.T) {
	for _, op := range []string{"renew", "release"} {
		t.Run(op, func(t *testing.T) {
			r := startReal(t, "--appendonly", "yes", "--appendfsync", "always")
			way := new(link)
			l := r.lock(t, way)
			lease := mustAcquire(t, l, "42", time.Minute)
			r.Kill()

			failed := make(chan struct{}, 1000) // more than there are tries
			way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
				if cmd.Err() != nil {
					failed <- struct{}{}
				}
				return nil
			})
			done := make(chan error, 1)
			go func() {
				if op == "renew" {
					done <- l.Renew(t.Context(), lease, time.Hour)
				} else {
					done <- l.Release(t.Context(), lease)
				}
			}()
			take(t, failed)
			r.Restart()
			require.NoError(t, take(t, done))
			if op == "renew" {
				require.Greater(t, r.admin.PTTL(t.Context(), "lock:42").Val(), time.Minute)
				require.NoError(t, l.Release(t.Context(), lease))
			}
			require.Empty(t, r.locks(t))
		})
	}
}

// refusals is a hook that counts the scripts to which the server replied an error
// with this code.
type refusals struct {
	code string
	n    atomic.Int64
}

func (r *refusals) DialHook(next redis.DialHook) redis.DialHook { return next }

func (r *refusals) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (r *refusals) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if strings.HasPrefix(cmd.Name(), "eval") && redis.HasErrorPrefix(err, r.code) {
			r.n.Add(1)
		}
		return err
	}
}

// refusedLock makes a Lock, and counts how often the server refuses what it sends.
func (r *realRedis) refusedLock(t *testing.T, code string) (*redfour.Lock, *refusals) {
	t.Helper()
	refused := &refusals{code: code}
	client := newClient(t, r.options())
	client.AddHook(refused)
	return newLock(t, client), refused
}

// Servers that take no writes for a time, and how they get there and back.
var spoilt = map[string]struct {
	spoil, mend []any // commands
	tryAgain    bool  // Acquire tries again, too
}{
	"OOM": {
		spoil: []any{"CONFIG", "SET", "maxmemory", "1"},
		mend:  []any{"CONFIG", "SET", "maxmemory", "0"},
	},
	"NOREPLICAS": {
		spoil: []any{"CONFIG", "SET", "min-replicas-to-write", "1"},
		mend:  []any{"CONFIG", "SET", "min-replicas-to-write", "0"},
	},
	"READONLY": {
		spoil:    []any{"REPLICAOF", "127.0.0.1", "1"},
		mend:     []any{"REPLICAOF", "NO", "ONE"},
		tryAgain: true,
	},
	"MASTERDOWN": {
		spoil:    []any{"REPLICAOF", "127.0.0.1", "1"},
		mend:     []any{"REPLICAOF", "NO", "ONE"},
		tryAgain: true,
	},
	"BUSY": {
		mend:     []any{"SCRIPT", "KILL"},
		tryAgain: true,
	},
}

func TestReal_serverThatTakesNoWrites(t *testing.T) {
	for code, row := range spoilt {
		t.Run(code, func(t *testing.T) {
			r := startReal(t, "--replica-serve-stale-data", map[bool]string{true: "no", false: "yes"}[code == "MASTERDOWN"])
			if code == "BUSY" {
				r.runForever(t)
			} else {
				r.do(t, row.spoil...)
			}

			waiter, waits := r.refusedLock(t, code)
			trier, tries := r.refusedLock(t, code)
			got := waitFor(t.Context(), waiter, "wait", time.Minute)
			tried := make(chan error, 1)
			go func() {
				lease, err := trier.Acquire(t.Context(), "try", time.Minute)
				if err == nil {
					err = trier.Release(t.Context(), lease)
				}
				tried <- err
			}()
			eventually(t, func() bool { return waits.n.Load() >= 2 && tries.n.Load() >= 1 }, "refused")
			if !row.tryAgain {
				err := take(t, tried)
				require.True(t, redis.HasErrorPrefix(err, code), err)
				require.NotErrorIs(t, err, redfour.ErrLocked)
				require.NotErrorIs(t, err, redfour.ErrNotHeld)
				require.EqualValues(t, 1, tries.n.Load())
			}
			require.Empty(t, got)

			r.do(t, row.mend...)
			lease := takeLease(t, got)
			require.False(t, lease.Immediate)
			require.NoError(t, waiter.Release(t.Context(), lease))
			if row.tryAgain {
				require.NoError(t, take(t, tried))
			}
			require.Empty(t, r.locks(t))
		})
	}
}

// Who gives up waiting learns why there was nothing to wait for.
func TestRealWaitAcquire_cancelledOnFullServerTellsOfIt(t *testing.T) {
	r := startReal(t)
	r.do(t, "CONFIG", "SET", "maxmemory", 1)
	l, refused := r.refusedLock(t, "OOM")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	got := waitFor(ctx, l, "42", time.Minute)
	// The first is known to the waiter when the second arrives.
	eventually(t, func() bool { return refused.n.Load() >= 2 }, "refused")
	cancel()
	err := take(t, got).err
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorContains(t, err, "OOM ")
	require.NotErrorIs(t, err, redfour.ErrLocked)
	require.Empty(t, r.locks(t))
}

// runForever keeps the server busy with a script, and returns when others notice.
func (r *realRedis) runForever(t *testing.T) {
	t.Helper()
	r.do(t, "CONFIG", "SET", "lua-time-limit", 1)
	o := r.Options()
	o.ReadTimeout = -1
	client := newClient(t, o)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = client.Do(t.Context(), "EVAL", "while true do end", 0).Err() // SCRIPT KILL, or the end of the test
	}()
	t.Cleanup(func() {
		_ = r.admin.ScriptKill(context.WithoutCancel(t.Context())).Err()
		<-done
	})
	eventually(t, func() bool { return redis.HasErrorPrefix(r.admin.Ping(t.Context()).Err(), "BUSY") }, "busy")
}

func TestReal_fullServerStillRenewsAndReleases(t *testing.T) {
	r := startReal(t)
	a, b := r.lock(t), new(link)
	other := r.lock(t, b)
	lease := mustAcquire(t, a, "42", time.Minute)
	got := sleeper(t, other, b, "42")
	r.do(t, "CONFIG", "SET", "maxmemory", 1)
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	require.NoError(t, a.Renew(ctx, lease, time.Hour))
	require.NoError(t, a.Release(ctx, lease))
	require.NoError(t, other.Release(ctx, takeLease(t, got)), "it was handed over")
	require.Empty(t, r.locks(t))
}

func TestReal_loadingServerIsWaitedFor(t *testing.T) {
	r := startReal(t, "--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024", "--rdbcompression", "no")
	const keys = 800 // 20 ms each, until both have been refused
	pipe := r.admin.Pipeline()
	for i := range keys {
		pipe.Set(t.Context(), "data:"+strconv.Itoa(i), strings.Repeat("x", 1024), 0)
	}
	_, err := pipe.Exec(t.Context())
	require.NoError(t, err)
	r.do(t, "SAVE")
	r.Kill()

	waiter, waits := r.refusedLock(t, "LOADING")
	trier, tries := r.refusedLock(t, "LOADING")
	got := waitFor(t.Context(), waiter, "wait", time.Minute)
	tried := make(chan error, 1)
	go func() {
		_, err := trier.Acquire(t.Context(), "try", time.Minute)
		tried <- err
	}()
	hurried := make(chan bool, 1)
	go func() {
		hurried <- assert.Eventually(t, func() bool { return waits.n.Load() > 0 && tries.n.Load() > 0 }, enough, time.Millisecond)
		_ = r.admin.ConfigSet(t.Context(), "key-load-delay", "0").Err()
	}()
	r.Restart() // returns when all is loaded
	require.True(t, take(t, hurried))
	require.NoError(t, take(t, tried))
	takeLease(t, got)
}

func TestReal_pausedClientsAreServedLater(t *testing.T) {
	r := startReal(t)
	o := r.options()
	o.ReadTimeout = 200 * time.Millisecond // so that attempts pile up on the server
	l := newLock(t, newClient(t, o))
	lease := mustAcquire(t, l, "mine", time.Minute)
	start := time.Now()
	r.do(t, "CLIENT", "PAUSE", 1000, "ALL")
	got := waitFor(t.Context(), l, "wait", time.Minute)
	renewed, released := make(chan error, 1), make(chan error, 1)
	go func() {
		renewed <- l.Renew(t.Context(), lease, time.Hour)
		released <- l.Release(t.Context(), lease)
	}()
	tried, err := l.Acquire(t.Context(), "try", time.Minute)
	require.NoError(t, err)
	require.Greater(t, time.Since(start), 900*time.Millisecond)
	require.NoError(t, l.Release(t.Context(), tried))
	require.NoError(t, take(t, renewed))
	require.NoError(t, take(t, released))
	require.NoError(t, l.Release(t.Context(), takeLease(t, got)))
	require.Empty(t, r.locks(t))
}

func TestReal_randomCancellationsLeaveNothing(t *testing.T) {
	const calls, workers = 5000, 20
	r := startReal(t)
	clients := make([]*redis.Client, 3)
	locks := make([]*redfour.Lock, len(clients))
	for i := range locks {
		clients[i] = newClient(t, r.options())
		locks[i] = newLock(t, clients[i])
	}
	var got, missed atomic.Int64
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	begin := time.Now()
	inParallel(workers, calls, func(i int) {
		rnd := rand.New(rand.NewPCG(seed, uint64(i)))
		// On a slow machine calls get longer, so that some still succeed.
		limit := 4 * time.Millisecond * time.Duration(1+missed.Load()/(10*(got.Load()+1)))
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.Int64N(int64(limit))))
		defer cancel()
		err := cancelledCall(ctx, rnd, locks[rnd.IntN(len(locks))], strconv.Itoa(rnd.IntN(4)))
		switch {
		case err == nil:
			got.Add(1)
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, redfour.ErrLocked):
			missed.Add(1)
			assert.NotErrorIs(t, err, redfour.ErrNotHeld)
		default:
			assert.NoError(t, err)
		}
	})
	require.Less(t, time.Since(begin), 3*enough)

	for _, l := range locks {
		require.NoError(t, l.Close())
	}
	require.Empty(t, r.locks(t))
	eventually(t, func() bool { return len(libraryGoroutines()) == 0 }, "no goroutines")
	require.Greater(t, got.Load(), int64(calls/500))
	require.Greater(t, missed.Load(), int64(calls/500))
}

// cancelledCall takes the lock one way or another, and gives it back with the ctx
// that it was taken with.
func cancelledCall(ctx context.Context, rnd *rand.Rand, l *redfour.Lock, id string) error {
	var lease *redfour.Lease
	var err error
	switch rnd.IntN(4) {
	case 0:
		return l.WithLock(ctx, id, time.Minute, func(context.Context, *redfour.Lease) error { return nil })
	case 1:
		return l.WithLock(ctx, id, time.Minute, func(ctx context.Context, _ *redfour.Lease) error {
			<-ctx.Done()
			return ctx.Err()
		})
	case 2:
		lease, err = l.Acquire(ctx, id, time.Minute)
	case 3:
		lease, err = l.WaitAcquire(ctx, id, time.Duration(1+rnd.IntN(2))*time.Minute)
	}
	if err != nil {
		return err
	}
	return l.Release(ctx, lease)
}

// libraryGoroutines returns the stacks that this library's code is in.
func libraryGoroutines() []string {
	buf := make([]byte, 1<<22)
	var ours []string
	for stack := range strings.SplitSeq(string(buf[:runtime.Stack(buf, true)]), "\n\n") {
		if strings.Contains(stack, "redfour-go/redfour.") || strings.Contains(stack, "redfour/internal/crew.") {
			ours = append(ours, stack)
		}
	}
	return ours
}

func TestReal_scriptFlushBetweenCallsChangesNothing(t *testing.T) {
	r := startReal(t)
	way := new(link)
	a, b := r.lock(t), r.lock(t, way)
	flush := func() { r.do(t, "SCRIPT", "FLUSH") }
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	for range 3 {
		flush()
		lease := mustAcquire(t, a, "42", time.Minute)
		flush()
		_, err := b.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		looks := answered(way, isAcquire)
		flush()
		got := waitFor(t.Context(), b, "42", time.Minute)
		eventually(t, func() bool { return looks.Load() >= 1 }, "one look")
		flush()
		require.NoError(t, a.Renew(ctx, lease, time.Minute))
		flush()
		require.NoError(t, a.Release(ctx, lease))
		lease = takeLease(t, got)
		flush()
		require.ErrorIs(t, a.Release(t.Context(), &redfour.Lease{ID: "42", Index: 1}), redfour.ErrConflict)
		flush()
		require.NoError(t, b.Release(t.Context(), lease))
	}
	require.Empty(t, r.locks(t))
}

func TestReal_killedConnectionsAndFlushedScriptsBreakNothing(t *testing.T) {
	const sections, workers, ids = 120, 8, 2
	r := startReal(t)
	locks := []*redfour.Lock{r.lock(t), r.lock(t)}
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()

	stop := make(chan struct{})
	var killer sync.WaitGroup
	killer.Go(func() {
		tick := time.NewTicker(6 * time.Millisecond)
		defer tick.Stop()
		for i := range 150 { // not for ever: a slow machine gets less done between two
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			switch i % 5 {
			case 0:
				_ = r.admin.Do(ctx, "CLIENT", "KILL", "TYPE", "pubsub").Err()
			case 1:
				_ = r.admin.ScriptFlush(ctx).Err()
			default:
				_ = r.admin.Do(ctx, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes").Err()
			}
		}
	})

	var inside, last [ids]atomic.Int64
	section := func(i int, lease *redfour.Lease) {
		assert.EqualValues(t, 1, inside[i].Add(1), "mutual exclusion")
		assert.Greater(t, lease.Index, last[i].Swap(lease.Index), "fencing")
		inside[i].Add(-1)
	}
	inParallel(workers, sections, func(n int) {
		l, i := locks[n%len(locks)], n/len(locks)%ids
		id := strconv.Itoa(i)
		if n%3 == 0 {
			assert.NoError(t, l.WithLock(ctx, id, time.Minute, func(_ context.Context, lease *redfour.Lease) error {
				section(i, lease)
				return nil
			}))
			return
		}
		lease, err := l.WaitAcquire(ctx, id, time.Minute)
		if !assert.NoError(t, err) {
			return
		}
		section(i, lease)
		assert.NoError(t, l.Renew(ctx, lease, time.Hour))
		assert.NoError(t, l.Release(ctx, lease))
	})
	close(stop)
	killer.Wait()
	require.NoError(t, ctx.Err())
	require.Greater(t, r.calls(t, "hello"), 10, "connections were killed")
	for _, l := range locks {
		require.NoError(t, l.Close())
	}
	require.Empty(t, r.locks(t))
}

func TestRealKeepAlive_lossIsKnownAtTheDeadlineOnStoppedServer(t *testing.T) {
	const ttl = 600 * time.Millisecond
	r := startReal(t)
	way := new(link)
	l := r.lock(t, way)
	quick(t, 100*time.Millisecond, func() time.Duration {
		lease := mustAcquire(t, l, "42", ttl)
		renewals := answered(way, isRenew)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		// A machine may be so slow that the lease is lost by itself. That is late, too.
		eventually(t, func() bool { return renewals.Load() > 0 || kept.Err() != nil }, "a renewal")
		r.Pause()
		defer func() {
			r.Resume()
			eventually(t, func() bool { return len(r.locks(t)) == 0 }, "expired")
		}()
		take(t, kept.Done())
		late := time.Since(lease.Deadline())
		require.GreaterOrEqual(t, late, time.Duration(0), "before the deadline")
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
		return late
	})
}

func TestRealKeepAlive_outlivesServerThatStopsForLessThanTheTTL(t *testing.T) {
	const ttl = 3 * time.Second
	r := startReal(t)
	way := new(link)
	l := r.lock(t, way)
	lease := renewed(t, l, mustAcquire(t, l, "42", time.Minute)) // the script is known
	require.NoError(t, l.Release(t.Context(), lease))
	lease = mustAcquire(t, l, "42", ttl)
	granted := lease.Deadline()
	sent := make(chan struct{}, 100) // more than are sent
	way.beforeScript(func(context.Context, redis.Cmder) error { sent <- struct{}{}; return nil })
	kept, stop := l.KeepAlive(t.Context(), lease)
	defer stop()

	r.Pause()
	take(t, sent) // hangs
	take(t, sent) // so does the next
	require.Equal(t, granted, lease.Deadline())
	r.Resume()
	eventually(t, func() bool { return lease.Deadline().After(granted) }, "renewed")
	require.NoError(t, kept.Err())
	require.NoError(t, l.Release(t.Context(), lease))
	require.Empty(t, r.locks(t))
}

// Whatever the server sends takes 1.5 s. Its connections stand, because a new one would take several times that.
func TestReal_callsWorkWithALatencyAboveASecond(t *testing.T) {
	t.Parallel()
	r := startReal(t)
	way := new(link)
	l := r.lock(t, way)
	warm(t, l, 16)
	lease := mustAcquire(t, l, "scripts are known", time.Hour)
	require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
	require.NoError(t, l.Release(t.Context(), lease))
	way.setLag(1500 * time.Millisecond)

	got := take(t, waitFor(t.Context(), l, "42", time.Minute))
	require.NoError(t, got.err)
	require.Less(t, got.after, 2*time.Second)
	for what, call := range map[string]func() error{
		"renew":   func() error { return l.Renew(t.Context(), got.lease, time.Minute) },
		"acquire": func() error { _, err := l.Acquire(t.Context(), "43", time.Minute); return err },
	} {
		start := time.Now()
		require.NoError(t, call(), what)
		require.Less(t, time.Since(start), 2*time.Second, what)
	}
	start := time.Now()
	require.NoError(t, l.Release(t.Context(), got.lease))
	require.Less(t, time.Since(start), 2*time.Second)
	require.Equal(t, []string{"lock:43"}, r.locks(t))
}

// warm makes calls at the same time, so that the client keeps some connections.
func warm(t *testing.T, l *redfour.Lock, calls int) {
	t.Helper()
	var group sync.WaitGroup
	for i := range calls {
		group.Go(func() {
			lease, err := l.Acquire(t.Context(), fmt.Sprint("warm ", i), time.Hour)
			if assert.NoError(t, err) {
				assert.NoError(t, l.Release(t.Context(), lease))
			}
		})
	}
	group.Wait()
}

// startWithWidePool starts a server that knows the scripts, and a Lock whose client may
// have 100 connections.
func startWithWidePool(t *testing.T) (*realRedis, *link, *redis.Client, *redfour.Lock) {
	t.Helper()
	r, way := startReal(t), new(link)
	o := r.options(way)
	o.PoolSize = 100
	client := newClient(t, o, way)
	l := newLock(t, client)
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
	return r, way, client, l
}

func TestReal_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	t.Parallel()
	_, way, client, l := startWithWidePool(t)

	stand(t, client, way, 80, 20)
	start := time.Now()
	lease := mustAcquire(t, l, "42", time.Hour)
	require.Less(t, time.Since(start), 2*time.Second)

	stand(t, client, way, 80, 20)
	start = time.Now()
	require.NoError(t, l.Release(t.Context(), lease))
	require.Less(t, time.Since(start), 2*time.Second)

	lease = mustAcquire(t, l, "42", 10*time.Second)
	before := lease.Deadline()
	kept, stop := l.KeepAlive(t.Context(), lease)
	defer stop()
	stand(t, client, way, 80, 20)
	eventually(t, func() bool { return kept.Err() != nil || lease.Deadline().After(before) }, "renewed")
	require.NoError(t, context.Cause(kept))
}

// A server that stalls for 3 s while many calls are made is not asked for connections beyond those of the calls
// themselves, but for one a second.
func TestReal_aServerThatStallsKeepsItsConnections(t *testing.T) {
	t.Parallel()
	r, way, client, l := startWithWidePool(t)
	stand(t, client, way, 80, 0)
	before := way.dials()
	require.NoError(t, r.admin.Do(t.Context(), "client", "pause", 3000, "all").Err())
	var calls sync.WaitGroup
	for i := range 40 {
		calls.Go(func() {
			lease, err := l.Acquire(t.Context(), fmt.Sprint(i), time.Hour)
			if assert.NoError(t, err) {
				assert.NoError(t, l.Release(t.Context(), lease))
			}
		})
	}
	calls.Wait()
	require.LessOrEqual(t, way.dials()-before, 20)
	require.GreaterOrEqual(t, client.PoolStats().TotalConns, uint32(80), "some may be in use")
}
