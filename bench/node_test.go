package main

import (
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// eachInNode runs a test for each library that has no locker.
func eachInNode(t *testing.T, test func(t *testing.T, e entry)) {
	t.Helper()
	for _, e := range lineup() {
		if e.open != nil {
			continue
		}
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			if _, err := e.version(); err != nil {
				if os.Getenv("REDFOUR_REQUIRE_INTEROP") == "1" {
					t.Fatalf("REDFOUR_REQUIRE_INTEROP=1 demands it: %v", err)
				}
				t.Skipf("this test did not run: %v", err)
			}
			test(t, e)
		})
	}
}

func TestNode_everyWorkload(t *testing.T) {
	eachInNode(t, func(t *testing.T, e entry) {
		r := newRunner(t)
		const length = 300 * time.Millisecond
		for _, l := range []Load{cycles(0, 16)[0], contend(0, 16, 4, 0), contend(networkMS, 4, 2, 1000)} {
			run := r.run(t.Context(), l, e, length)
			require.Empty(t, run.Failed, l)
			require.Positive(t, run.Sections, l)
			require.Positive(t, run.ClientCPU, l)
		}
		run := r.run(t.Context(), handover(0, 2), e, length)
		require.Empty(t, run.Failed)
		require.Positive(t, run.Handovers)
		for _, ids := range []int{1, 1000} {
			run = r.run(t.Context(), idle(1000, ids), e, length)
			require.Empty(t, run.Failed)
			require.Zero(t, run.Commands)
			require.Greater(t, run.WaiterBytes, 100.0)
		}
	})
}

func TestNode_inACluster(t *testing.T) {
	eachInNode(t, func(t *testing.T, e entry) {
		if !e.clusters {
			t.Skip("it takes no part in a cluster")
		}
		r := newRunner(t)
		for _, masters := range []int{1, 3} {
			for _, l := range inCluster(masters, cycles(0, 16)[0], handover(0, 2)) {
				run := r.run(t.Context(), l, e, 300*time.Millisecond)
				require.Empty(t, run.Failed, l)
				require.Positive(t, run.Sections, l)
			}
		}
	})
}

// startInNode starts one worker on a server where id is held, and leaves it to the test.
func startInNode(t *testing.T, e entry, load Load, id string) (*process, error) {
	t.Helper()
	addr := redistest.Start(t).Addr()
	holder, err := openRedfour(setting{place: place{Addr: addr}, ttl: leaseTime})
	require.NoError(t, err)
	t.Cleanup(holder.close)
	_, err = holder.acquire(t.Context(), id)
	require.NoError(t, err)
	workers, err := newRunner(t).start(t.Context(), load, e, place{Addr: addr}, time.Second)
	for _, w := range workers {
		t.Cleanup(w.kill)
	}
	if err != nil {
		return nil, err
	}
	return workers[0], nil
}

// What a worker thinks to be free is held. It says so, and goes on with the other waiters.
func TestNode_reportsAnError(t *testing.T) {
	eachInNode(t, func(t *testing.T, e entry) {
		w, err := startInNode(t, e, cycles(0, 4)[0], "p0-2")
		require.NoError(t, err)
		w.say("go")
		pause(100 * time.Millisecond)
		w.say("stop")
		answer, err := w.report()
		require.NoError(t, err)
		require.Equal(t, 1, answer.Errors)
		require.Contains(t, answer.Error, `acquire "p0-2": somebody has it`)
		require.Zero(t, answer.PerWaiter[2])
		require.Positive(t, answer.PerWaiter[1])
		require.Equal(t, answer.PerWaiter[0]+answer.PerWaiter[1]+answer.PerWaiter[3], answer.Sections)
	})
}

// The other id is free, so its waiter would not be idle.
func TestNode_isNotReadyWhileItsWaitersDoNotWait(t *testing.T) {
	eachInNode(t, func(t *testing.T, e entry) {
		_, err := startInNode(t, e, idle(2, 2), idOf(0, 2))
		require.ErrorContains(t, err, "worker 0 died")
	})
}
