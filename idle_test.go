package redfour_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// goroutines counts those of all Locks.
func goroutines() (n int) {
	stacks := make([]byte, 1<<22)
	stacks = stacks[:runtime.Stack(stacks, true)]
	for stack := range strings.SplitSeq(string(stacks), "\n\n") {
		if strings.Contains(stack, "redfour/internal/crew.") {
			n++
		}
	}
	return n
}

// A client per request was the way of other libraries.
func TestLock_droppedWithoutCloseKeepsNoGoroutine(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		for i := range 20 {
			l, err := redfour.New(client)
			require.NoError(t, err)
			lease := mustAcquire(t, l, fmt.Sprint(i), time.Hour)
			require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
			kept, stop := l.KeepAlive(t.Context(), lease)
			require.NoError(t, l.Release(t.Context(), lease))
			require.Error(t, context.Cause(kept))
			stop()
		}
		pass(time.Second)
		synctest.Wait()
		require.Zero(t, goroutines())

		// The subscription stays for those who wait again.
		l, err := redfour.New(client)
		require.NoError(t, err)
		lease := mustAcquire(t, l, "42", time.Hour)
		next := waitFor(t.Context(), l, "42", time.Hour)
		pass(time.Second)
		require.NoError(t, l.Release(t.Context(), lease))
		require.NoError(t, l.Release(t.Context(), (<-next).lease))
		pass(11 * time.Second)
		synctest.Wait()
		require.Zero(t, goroutines())
	})
}

// Until the masters are known, each bucket stands for one.
func TestCluster_mastersThatAreGoneAreForgotten(t *testing.T) {
	bubble(t, func(t *testing.T, _ *mini) {
		client := redis.NewClusterClient(&redis.ClusterOptions{
			Addrs: []string{"127.0.0.1:6379"},
			Dialer: func(_ context.Context, network, _ string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: network, Err: io.ErrClosedPipe}
			},
		})
		t.Cleanup(func() { _ = client.Close() })
		l := newLock(t, client)
		for i := range 20 {
			_, err := l.Acquire(t.Context(), fmt.Sprint(i), time.Hour)
			require.Error(t, err)
			pass(time.Second)
		}
		require.Equal(t, 1, redfour.Masters(l))
	})
}
