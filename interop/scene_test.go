package interop_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

const (
	namespace = "interop"
	id        = "token:42" // Ids with a colon are usual, and it must not be taken for the one after the namespace.
	key       = namespace + ":" + id
)

// owner is as odd as one may be. All tests are with locks that carry it.
const owner = `{"id": 7} 42 "it's" me; üñ%s`

// What leases are taken for.
const (
	longTTL  = time.Minute            // never runs out in a test
	shortTTL = 2 * time.Second        // runs out in a test, but not before what is meant to come first
	briefTTL = 200 * time.Millisecond // is meant to run out
)

// patience bounds what should take milliseconds. It is far below longTTL, so that whoever gets a lock within it was woken by the release,
// and did not wait for the TTL.
const patience = 10 * time.Second

// receive returns the next value, which must come promptly.
func receive[T any](t *testing.T, from <-chan T, what string) (v T) {
	t.Helper()
	select {
	case v = <-from:
	case <-time.After(patience):
		require.FailNowf(t, "nothing came", "after %v, while expecting: %s", patience, what)
	}
	return v
}

// A scene is a Redis of its own, where a Node.js process shares the lock of one id with Go.
type scene struct {
	t      *testing.T
	server *redistest.Server
	redis  *redis.Client // the test's own look at the server
	lock   *redfour.Lock
	node   *peer
}

// The npm libraries that share their locks.
var libraries = []string{"redfour", "ioredfour"}

// forEachLibrary runs a test against each npm library.
func forEachLibrary(t *testing.T, test func(s scene)) {
	t.Helper()
	t.Parallel()
	for _, library := range libraries {
		t.Run(library, func(t *testing.T) {
			t.Parallel()
			requireNode(t)
			s := newScene(t)
			s.node = startPeer(t, library, s.server.Addr())
			test(s)
		})
	}
}

// newScene returns a scene without Node.js.
func newScene(t *testing.T) scene {
	t.Helper()
	server := redistest.Start(t, "--notify-keyspace-events", "Ex") // for awaitExpiry
	return scene{t: t, server: server, redis: server.Client(t), lock: newLock(t, server)}
}

func newLock(t *testing.T, server *redistest.Server) *redfour.Lock {
	t.Helper()
	lock, err := redfour.New(server.Client(t), redfour.WithNamespace(namespace), redfour.WithOwner(owner))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, lock.Close()) })
	return lock
}

// inspect returns what Go sees of the lock, which must be held.
func (s scene) inspect(index int64) redfour.Status {
	s.t.Helper()
	status, err := s.lock.Inspect(s.t.Context(), id)
	require.NoError(s.t, err)
	require.True(s.t, status.Held)
	require.Equal(s.t, index, status.Index)
	return status
}

// hold takes the lock, which must be free.
func (s scene) hold(ttl time.Duration) *redfour.Lease {
	s.t.Helper()
	lease, err := s.lock.Acquire(s.t.Context(), id, ttl)
	require.NoError(s.t, err)
	require.True(s.t, lease.Immediate)
	return lease
}

// release gives back a lease that must still hold.
func (s scene) release(lease *redfour.Lease) {
	s.t.Helper()
	require.NoError(s.t, s.lock.Release(s.t.Context(), lease))
}

// renew prolongs a lease that must still hold.
func (s scene) renew(lease *redfour.Lease, ttl time.Duration) {
	s.t.Helper()
	require.NoError(s.t, s.lock.Renew(s.t.Context(), lease, ttl))
}

// requireHeld checks that Acquire reports a holder with this index and at most this TTL, and returns what is left.
func (s scene) requireHeld(index int64, ttl time.Duration) (left time.Duration) {
	s.t.Helper()
	_, err := s.lock.Acquire(s.t.Context(), id, longTTL)
	require.ErrorIs(s.t, err, redfour.ErrLocked)
	var held *redfour.LockedError
	require.ErrorAs(s.t, err, &held)
	require.Equal(s.t, id, held.ID)
	require.Equal(s.t, index, held.Index)
	require.Positive(s.t, held.TTL)
	require.LessOrEqual(s.t, held.TTL, ttl)
	return held.TTL
}

// requireLost checks that a lease can be neither renewed nor released, and why.
func (s scene) requireLost(lease *redfour.Lease, why error) {
	s.t.Helper()
	for _, err := range []error{
		s.lock.Renew(s.t.Context(), lease, longTTL),
		s.lock.Release(s.t.Context(), lease),
	} {
		require.ErrorIs(s.t, err, why)
		require.ErrorIs(s.t, err, redfour.ErrNotHeld)
	}
}

// awaitExpiry runs take, which takes the lock for a short time, and returns when Redis says that the lock has expired.
func (s scene) awaitExpiry(take func()) {
	s.t.Helper()
	expired := s.redis.Subscribe(s.t.Context(), "__keyevent@0__:expired")
	defer func() { require.NoError(s.t, expired.Close()) }()
	_, err := expired.Receive(s.t.Context())
	require.NoError(s.t, err)

	take()

	ctx, cancel := context.WithTimeout(s.t.Context(), patience)
	defer cancel()
	message, err := expired.ReceiveMessage(ctx)
	require.NoError(s.t, err)
	require.Equal(s.t, key, message.Payload)
}

// A goWaiter is a WaitAcquire under way.
type goWaiter struct {
	t       *testing.T
	monitor *monitor
	done    chan error     // one error, when WaitAcquire has returned
	lease   *redfour.Lease // what it got, if that error is nil
}

// wait starts a WaitAcquire of a lock that is held, and returns when it has subscribed and then found the lock held.
func (s scene) wait() *goWaiter {
	s.t.Helper()
	w := &goWaiter{t: s.t, monitor: startMonitor(s.t, s.server.Addr()), done: make(chan error, 1)}
	go func() {
		var err error
		w.lease, err = s.lock.WaitAcquire(s.t.Context(), id, longTTL)
		w.done <- err
	}()
	w.monitor.awaitSubscriber()
	w.monitor.awaitLook()
	return w
}

// requireWaiting checks that the waiter has got nothing yet.
func (w *goWaiter) requireWaiting() {
	w.t.Helper()
	require.Empty(w.t, w.done, "WaitAcquire has returned while the lock was held")
}

// lookAgain wakes the waiter with news of a release that did not happen, and returns when it has looked.
func (w *goWaiter) lookAgain(s scene) {
	w.t.Helper()
	w.monitor.skip(s.redis)
	require.NoError(w.t, s.redis.Publish(w.t.Context(), namespace+"-release", key).Err())
	w.monitor.awaitLook()
}

// got returns the waiter's lease, which must come promptly.
func (w *goWaiter) got() *redfour.Lease {
	w.t.Helper()
	require.NoError(w.t, receive(w.t, w.done, "WaitAcquire returns"))
	require.False(w.t, w.lease.Immediate)
	return w.lease
}

// decode makes what Node.js got a lease, as a Go program does that is handed it.
func (s scene) decode(lease nodeLease) *redfour.Lease {
	s.t.Helper()
	var l redfour.Lease
	require.NoError(s.t, json.Unmarshal(lease.raw, &l))
	require.Equal(s.t, id, l.ID)
	require.Equal(s.t, lease.Index, l.Index)
	require.Equal(s.t, time.Duration(lease.TTL)*time.Millisecond, l.TTL)
	require.Empty(s.t, l.Token)
	return &l
}

// encode is what a lease looks like to the npm libraries, which know no token.
func encode(lease *redfour.Lease) json.RawMessage {
	return fmt.Appendf(nil, `{"id": %q, "index": %d}`, lease.ID, lease.Index)
}
