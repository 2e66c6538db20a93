package interop_test

import (
	"crypto/sha256"
	"encoding/hex"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// clusterNamespace is what a namespace of ioredfour is called here in a cluster, as the README says.
func clusterNamespace() string {
	sum := sha256.Sum256([]byte(namespace))
	digits := hex.EncodeToString(sum[:])
	return namespace + ":{ior4_" + digits[len(digits)-12:] + "}"
}

// In a cluster ioredfour has a layout of its own, which a namespace with a hash tag amounts to.
func TestCluster_aLockIsSharedWithIoredfour(t *testing.T) {
	requireNode(t)
	c := redistest.StartCluster(t, 3, 0)
	client := c.Client(t)
	l, err := redfour.New(client, redfour.WithNamespace(clusterNamespace()))
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	var ports []string
	for _, s := range c.Servers() {
		ports = append(ports, strconv.Itoa(s.Port()))
	}
	node := startPeerAt(t, "ioredfour", "cluster:"+strings.Join(ports, ","))

	theirs := node.hold(longTTL)
	_, err = l.Acquire(t.Context(), id, longTTL)
	locked := new(redfour.LockedError)
	require.ErrorAs(t, err, &locked)
	require.Equal(t, theirs.Index, locked.Index)

	got := make(chan *redfour.Lease, 1)
	go func() {
		lease, _ := l.WaitAcquire(t.Context(), id, longTTL)
		got <- lease
	}()
	channel := clusterNamespace() + "-release"
	require.Eventually(t, func() bool {
		master, err := client.MasterForKey(t.Context(), channel)
		return err == nil && master.PubSubShardNumSub(t.Context(), channel).Val()[channel] == 2
	}, patience, time.Millisecond, "both listen")
	require.Equal(t, released, node.release(theirs.raw))
	ours := receive(t, got, "Go is served")
	require.NotNil(t, ours)
	require.False(t, node.acquire(longTTL).Success)

	waiter := node.wait()
	require.NoError(t, l.Release(t.Context(), ours))
	require.Equal(t, released, node.release(waiter.got().raw))
}
