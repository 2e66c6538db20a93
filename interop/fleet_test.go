package interop_test

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// A fleet is some Locks, each with waiters that go through one section after the other.
type fleet struct {
	group   sync.WaitGroup
	mu      sync.Mutex // guards what follows
	longest time.Duration
	counts  []int // sections of each waiter
}

const (
	fleetLocks   = 3
	fleetWaiters = 8 // of each Lock
)

// startFleet starts a fleet, which works until ctx ends.
func startFleet(ctx context.Context, s scene) *fleet {
	f := new(fleet)
	for i := range fleetLocks {
		lock := newLock(s.t, s.server)
		for range fleetWaiters {
			f.group.Go(func() { f.work(ctx, s, lock, fmt.Sprintf("go-%d", i+1)) })
		}
	}
	return f
}

func (f *fleet) work(ctx context.Context, s scene, lock *redfour.Lock, who string) {
	sections, longest := 0, time.Duration(0)
	for ctx.Err() == nil {
		from := time.Now()
		lease, err := lock.WaitAcquire(ctx, id, longTTL)
		longest = max(longest, time.Since(from))
		if err != nil {
			assert.ErrorIs(s.t, err, ctx.Err())
			break
		}
		section := context.WithoutCancel(ctx) // A section that has begun is finished.
		assert.NoError(s.t, enterAndLeave(section, s.redis, who, lease.Index))
		assert.NoError(s.t, lock.Release(section, lease))
		sections++
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.longest = max(f.longest, longest)
	f.counts = append(f.counts, sections)
}

// stopped waits for the end of the fleet, and returns how many sections it went through.
func (f *fleet) stopped() (sections int) {
	f.group.Wait()
	for _, n := range f.counts {
		sections += n
	}
	return sections
}

// Npm clients are told of open releases only, which a busy fleet makes now and then. So each side waits for a
// bounded time: two seconds are many times what it takes. It is not run beside other tests, and may be tried three times, because
// the head start of an npm client is a millisecond, and a machine that is busy with something else takes longer to let it run.
func TestFleet_npmAndGoWaitForABoundedTime(t *testing.T) {
	const bound, tries = 2 * time.Second, 3
	for _, library := range libraries {
		t.Run(library, func(t *testing.T) {
			requireNode(t)
			longest := bound
			for try := 0; try < tries && longest >= bound; try++ {
				npm, ours := waitsBeside(t, library)
				longest = max(npm, ours)
			}
			require.Less(t, longest, bound)
		})
	}
}

// waitsBeside lets two processes with npm work beside a busy fleet, and returns the longest wait of each side.
func waitsBeside(t *testing.T, library string) (npm, ours time.Duration) {
	t.Helper()
	const duration = 5 * time.Second
	s := newScene(t)
	s.node = startPeer(t, library, s.server.Addr())
	second := startPeer(t, library, s.server.Addr())
	ctx, cancel := context.WithTimeout(t.Context(), duration)
	defer cancel()
	f := startFleet(ctx, s)
	for _, messages := range []<-chan message{s.node.contend(duration, "node-1"), second.contend(duration, "node-2")} {
		var did struct{ Sections, Longest int64 }
		require.NoError(t, json.Unmarshal(s.node.replyFrom(messages), &did))
		t.Logf("a process with npm: %d sections, longest wait %d ms", did.Sections, did.Longest)
		require.Positive(t, did.Sections)
		npm = max(npm, time.Duration(did.Longest)*time.Millisecond)
	}
	sections := f.stopped()
	t.Logf("%d waiters in Go: %d sections, longest wait %v", len(f.counts), sections, f.longest)
	require.Positive(t, slices.Min(f.counts))
	requireExclusive(s)
	return npm, f.longest
}

// A fleet without npm clients hands over only. A monitor, which is no npm client, does not change that.
func TestFleet_withoutNPMMakesNoOpenRelease(t *testing.T) {
	s := newScene(t)
	releases := s.redis.PSubscribe(t.Context(), namespace+"-*")
	t.Cleanup(func() { _ = releases.Close() })
	_, err := releases.Receive(t.Context())
	require.NoError(t, err)
	heard := releases.Channel(redis.WithChannelSize(100_000))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	sections := startFleet(ctx, s).stopped()
	open := 0
	for range len(heard) {
		if m := <-heard; m.Channel == namespace+"-release" {
			open++
		}
	}
	t.Logf("%d sections, %d messages on the release channel", sections, open)
	require.Greater(t, sections, 640)
	// At the beginning and at the end nobody waits.
	require.Less(t, open, sections/128)
}
