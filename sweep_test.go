package redfour_test

import (
	"context"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// stand makes the client keep n idle connections, and kills the dead of them that it would use next.
func stand(t *testing.T, client *redis.Client, way *link, n, dead int) {
	t.Helper()
	conns := make([]*redis.Conn, n)
	for i := range conns {
		conns[i] = client.Conn()
		require.NoError(t, conns[i].Ping(t.Context()).Err())
	}
	for _, c := range conns {
		require.NoError(t, c.Close())
	}
	last := way.dials()
	way.swallow(func(c *linkConn) bool { return c.number > last-dead })
}

// standing makes a Lock whose client keeps n connections. The first 12 that it would use
// die silently when the returned function is called. (The race detector crashes with
// bubbles that have many more goroutines; real servers see 80 connections.)
func standing(t *testing.T, m *mini, n int) (*redfour.Lock, func()) {
	t.Helper()
	way := new(link)
	client := m.client(t, way)
	l := newLock(t, client)
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
	return l, func() { stand(t, client, way, n, 12) }
}

func TestAcquire_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	for _, n := range []int{30, 12} { // some of them, or all
		bubble(t, func(t *testing.T, m *mini) {
			l, die := standing(t, m, n)
			die()
			start := time.Now()
			lease := mustAcquire(t, l, "42", time.Hour)
			require.Less(t, time.Since(start), 1100*time.Millisecond)
			start = time.Now()
			require.NoError(t, l.Release(t.Context(), lease))
			require.Zero(t, time.Since(start), "they were found out together")
		})
	}
}

func TestWaitAcquire_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		die()
		got := <-waitFor(t.Context(), l, "42", time.Hour)
		require.NoError(t, got.err)
		require.Less(t, got.after, 1100*time.Millisecond)
	})
}

func TestRelease_connectionsThatDiedSilentlyCostOneSecond(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		lease := mustAcquire(t, l, "42", time.Hour)
		die()
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Less(t, time.Since(start), 1100*time.Millisecond)
	})
}

func TestKeepAlive_outlivesConnectionsThatDiedSilently(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l, die := standing(t, m, 30)
		lease := mustAcquire(t, l, "42", 10*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		die()
		pass(time.Minute)
		require.NoError(t, context.Cause(kept))
	})
}

// All answers take 0.9 s, so the connections are asked about, but not given up.
func TestCalls_aSlowServerKeepsItsConnections(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		client := m.client(t, way)
		l := newLock(t, client)
		require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "scripts are known", time.Hour)))
		stand(t, client, way, 80, 0)
		before := way.dials()
		way.setLag(900 * time.Millisecond)
		for range 20 {
			require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Hour)))
		}
		way.setLag(0)
		pass(10 * time.Second)
		require.LessOrEqual(t, way.dials()-before, 2)
		require.GreaterOrEqual(t, client.PoolStats().IdleConns, uint32(80))
	})
}
