package redfour_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestAcquire_free(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		start := time.Now()
		lease := mustAcquire(t, l, "42", 1500*time.Millisecond+time.Microsecond)
		require.Equal(t, "42", lease.ID)
		require.Equal(t, 1500*time.Millisecond, lease.TTL)
		require.True(t, lease.Immediate)
		require.NotEmpty(t, lease.Token)
		require.Equal(t, start.Add(lease.TTL), lease.Deadline())
		require.Equal(t, lease.TTL, m.TTL("lock:42"))
		require.NoError(t, l.Release(t.Context(), lease))
		require.False(t, m.Exists("lock:42"))
	})
}

func TestAcquire_held(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Minute)
		pass(time.Second)
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		locked := new(redfour.LockedError)
		require.ErrorAs(t, err, &locked)
		require.Equal(t, redfour.LockedError{ID: "42", Index: lease.Index, TTL: 59 * time.Second}, *locked)
	})
}

func TestWaitAcquire_isWokenByRelease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := waitFor(t.Context(), b, "42", time.Minute)
		pass(5 * time.Minute)
		require.NoError(t, a.Release(t.Context(), lease))
		synctest.Wait()
		r := <-got
		require.NoError(t, r.err)
		require.Equal(t, 5*time.Minute, r.after)
		require.Greater(t, r.lease.Index, lease.Index)
		require.False(t, r.lease.Immediate)
	})
}
