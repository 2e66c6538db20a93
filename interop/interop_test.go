// Package interop_test lets Go and Node.js processes, these with npm redfour or ioredfour, share a lock on a real Redis.
package interop_test

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestRelease_goWakesNode(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(longTTL)
		waiter := s.node.wait()
		waiter.requireWaiting()

		s.release(lease)

		require.Greater(s.t, waiter.got().Index, lease.Index)
	})
}

func TestRelease_nodeWakesGo(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		held := s.node.hold(longTTL)
		waiter := s.wait()
		waiter.requireWaiting()

		require.Equal(s.t, released, s.node.release(held.raw))

		require.Greater(s.t, waiter.got().Index, held.Index)
	})
}

func TestAcquire_inTurnsWithGrowingIndexes(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		last := int64(0)
		for range 5 {
			held := s.node.hold(longTTL)
			require.Greater(s.t, held.Index, last)
			require.Equal(s.t, released, s.node.release(held.raw))

			lease := s.hold(longTTL)
			require.Greater(s.t, lease.Index, held.Index)
			s.release(lease)
			last = lease.Index
		}
	})
}

func TestAcquire_whileNodeHolds(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		held := s.node.hold(longTTL)

		s.requireHeld(held.Index, longTTL)

		require.Equal(s.t, released, s.node.release(held.raw))
	})
}

func TestAcquire_byNodeWhileGoHolds(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(longTTL)

		attempt := s.node.acquire(longTTL)

		require.False(s.t, attempt.Success)
		require.Positive(s.t, attempt.TTL)
		require.LessOrEqual(s.t, attempt.TTL, longTTL.Milliseconds())
		s.release(lease)
	})
}

//go:embed enter.lua
var enter string

// The keys of the resource that the contenders write to.
const (
	inside  = "inside"  // how many are in a section
	entries = "entries" // "<who> <index> <how many were inside>", in the order of entry
)

func TestContention_oneInsideAndIndexesGrow(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		const duration = 3 * time.Second
		second := startPeer(s.t, s.node.library, s.server.Addr())
		nodes := []<-chan message{s.node.contend(duration, "node-1"), second.contend(duration, "node-2")}
		ctx, cancel := context.WithTimeout(s.t.Context(), duration)
		defer cancel()
		var group sync.WaitGroup
		for i, lock := range []*redfour.Lock{s.lock, newLock(s.t, s.server)} {
			for range 3 {
				group.Go(func() { assert.NoError(s.t, contend(ctx, lock, s.redis, fmt.Sprintf("go-%d", i+1))) })
			}
		}
		group.Wait()
		for _, messages := range nodes {
			s.node.replyFrom(messages)
		}

		requireExclusive(s)
	})
}

// contend goes through sections until ctx ends.
func contend(ctx context.Context, lock *redfour.Lock, resource *redis.Client, who string) error {
	for {
		lease, err := lock.WaitAcquire(ctx, id, longTTL)
		switch {
		case err != nil && ctx.Err() != nil:
			return nil //nolint:nilerr // The time is over.
		case err != nil:
			return err
		}
		section := context.WithoutCancel(ctx) // A section that has begun is finished.
		if err := enterAndLeave(section, resource, who, lease.Index); err != nil {
			return err
		}
		if err := lock.Release(section, lease); err != nil {
			return err
		}
	}
}

// enterAndLeave is one section.
func enterAndLeave(ctx context.Context, resource *redis.Client, who string, index int64) error {
	if err := resource.Eval(ctx, enter, []string{inside, entries}, who, index).Err(); err != nil {
		return err
	}
	return resource.Decr(ctx, inside).Err()
}

// requireExclusive checks what the contenders have written down.
func requireExclusive(s scene) {
	s.t.Helper()
	lines, err := s.redis.LRange(s.t.Context(), entries, 0, -1).Result()
	require.NoError(s.t, err)
	sections := make(map[string]int)
	last := int64(0)
	for i, line := range lines {
		var who string
		var index, count int64
		_, err := fmt.Sscan(line, &who, &index, &count)
		require.NoError(s.t, err)
		require.EqualValues(s.t, 1, count, "inside at entry %d, %q", i, line)
		require.Greater(s.t, index, last, "index at entry %d, %q", i, line)
		last = index
		side, _, _ := strings.Cut(who, "-")
		sections[who]++
		sections[side]++
	}
	s.t.Logf("sections: %v", sections)
	require.Positive(s.t, sections["go"])
	require.Positive(s.t, sections["node"])
}

func TestRenew_byGoWhileNodeWaits(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(shortTTL)
		waiter := s.node.wait()

		s.renew(lease, longTTL)

		waiter.awaitLook() // when the first TTL would have been over
		s.release(lease)
		require.Greater(s.t, waiter.got().Index, lease.Index)
	})
}

// Node.js is woken, finds the lock held, and waits for the new end.
func TestRenew_forLessByGoReachesNode(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(longTTL)
		waiter := s.node.wait()

		s.renew(lease, briefTTL)

		waiter.awaitLook()
		require.Greater(s.t, waiter.got().Index, lease.Index)
	})
}

func TestRenew_byNodeWhileGoWaits(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		held := s.node.hold(shortTTL)
		waiter := s.wait()

		require.True(s.t, s.node.renew(held.raw).Success)

		require.Greater(s.t, s.requireHeld(held.Index, longTTL), shortTTL)
		waiter.lookAgain(s)
		waiter.requireWaiting()
		require.Equal(s.t, released, s.node.release(held.raw))
		require.Greater(s.t, waiter.got().Index, held.Index)
	})
}

//go:embed renew.lua
var renew2 string

// TestRenew_byRedfour2 holds the contract of renewLock in npm redfour 2.2 against a lock that Go took. It needs no Node.js.
func TestRenew_byRedfour2(t *testing.T) {
	t.Parallel()
	s := newScene(t)
	renew := func(index int64) string {
		reply, err := s.redis.Eval(t.Context(), renew2, []string{key}, index, longTTL.Milliseconds()).Text()
		require.NoError(t, err)
		return reply
	}
	require.Equal(t, "missing", renew(1))

	lease := s.hold(patience)
	require.Equal(t, "conflict", renew(lease.Index-1))
	s.requireHeld(lease.Index, patience)

	require.Equal(t, "renewed", renew(lease.Index))
	require.Greater(t, s.requireHeld(lease.Index, longTTL), patience)
	s.renew(lease, patience)
	s.requireHeld(lease.Index, patience)

	s.release(lease)
	require.Equal(t, "missing", renew(lease.Index))
}

func TestLease_ofNodeIsRenewedAndReleasedByGo(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		held := s.node.hold(shortTTL)
		waiter := s.node.wait()
		lease := s.decode(held)
		require.Zero(s.t, lease.Deadline(), "Go did not see when Node.js sent its request")

		s.renew(lease, longTTL)

		waiter.awaitLook() // when the first TTL would have been over
		require.Greater(s.t, s.requireHeld(held.Index, longTTL), shortTTL)
		s.release(lease)
		require.Greater(s.t, waiter.got().Index, held.Index)
	})
}

func TestExpiry_ofNodeLeaseAsGoReportsIt(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		var lost *redfour.Lease
		s.awaitExpiry(func() { lost = s.decode(s.node.hold(briefTTL)) })
		s.requireLost(lost, redfour.ErrExpired)

		byNode := s.node.hold(longTTL)
		s.requireLost(lost, redfour.ErrConflict)
		require.Equal(s.t, released, s.node.release(byNode.raw))

		byGo := s.hold(longTTL)
		s.requireLost(lost, redfour.ErrConflict)
		s.release(byGo)
	})
}

func TestExpiry_ofGoLeaseAsNodeReportsIt(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		var lost json.RawMessage
		s.awaitExpiry(func() { lost = encode(s.hold(briefTTL)) })
		require.Equal(s.t, expired, s.node.release(lost))
		require.False(s.t, s.node.renew(lost).Success)

		byNode := s.node.hold(longTTL)
		require.Equal(s.t, conflict, s.node.release(lost))
		require.False(s.t, s.node.renew(lost).Success)
		require.Equal(s.t, released, s.node.release(byNode.raw))

		byGo := s.hold(longTTL)
		require.Equal(s.t, conflict, s.node.release(lost))
		require.False(s.t, s.node.renew(lost).Success)
		s.release(byGo)
	})
}

func TestInspect_tellsWhoHolds(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(longTTL)
		require.Equal(s.t, owner, s.inspect(lease.Index).Owner)
		waiter := s.node.wait()
		waiter.requireWaiting()
		s.release(lease)

		held := waiter.got()
		status := s.inspect(held.Index)
		require.Empty(s.t, status.Owner, "the owner before has gone")
		require.Zero(s.t, status.Since)
		require.Equal(s.t, released, s.node.release(held.raw))
	})
}

func TestForceRelease_ofNodesLeaseAndOfGos(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		held := s.node.hold(longTTL)
		require.ErrorIs(s.t, s.lock.ForceRelease(s.t.Context(), id, held.Index+1), redfour.ErrConflict)
		require.NoError(s.t, s.lock.ForceRelease(s.t.Context(), id, held.Index))
		require.Equal(s.t, expired, s.node.release(held.raw))

		lease := s.hold(longTTL)
		waiter := s.node.wait()
		waiter.requireWaiting()
		require.NoError(s.t, s.lock.ForceRelease(s.t.Context(), id, lease.Index))
		require.Greater(s.t, waiter.got().Index, lease.Index)
		s.requireLost(lease, redfour.ErrConflict)
	})
}

// TestRelease_indexAloneIsNoProof is about what *LockedError shows to every contender. The npm libraries have no tokens, and among them
// the index is the proof.
func TestRelease_indexAloneIsNoProof(t *testing.T) {
	forEachLibrary(t, func(s scene) {
		lease := s.hold(longTTL)
		var claim redfour.Lease
		require.NoError(s.t, json.Unmarshal(encode(lease), &claim))

		s.requireLost(&claim, redfour.ErrConflict)

		s.requireHeld(lease.Index, longTTL)
		require.Equal(s.t, released, s.node.release(encode(lease)))
		s.requireLost(lease, redfour.ErrExpired)
	})
}
