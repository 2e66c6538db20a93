package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestRun_inACluster(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		r := newRunner(t)
		const length = 300 * time.Millisecond
		run := r.run(t.Context(), inCluster(3, cycles(0, 64)...)[0], e, length)
		require.Empty(t, run.Failed)
		require.Positive(t, run.Sections)
		require.Less(t, run.CommandsPerSection(), 2.5)
		require.Positive(t, run.RedisCPU)
		require.Len(t, run.MasterCommands, 3)
		require.Positive(t, run.IdlestMaster())
		if !e.waits {
			return
		}
		for _, l := range inCluster(3, handover(0, 2), contend(0, 8, 2, 0)) {
			run = r.run(t.Context(), l, e, length)
			require.Empty(t, run.Failed, l)
			require.Positive(t, run.Sections, l)
		}
	})
}

func TestRun_inAClusterABrokenLibraryFails(t *testing.T) {
	r := newRunner(t)
	e, _ := findOrBreak("open to all")
	run := r.run(t.Context(), inCluster(1, handover(0, 2))[0], e, 100*time.Millisecond)
	require.Contains(t, run.Failed, "mutual exclusion was violated")
	require.Empty(t, r.cluster, "the next run gets another")
}

func TestRunner_aClusterIsUsedAgainAndEmptied(t *testing.T) {
	r := newRunner(t)
	load := inCluster(2, cycles(0, 1)...)[0]
	first, err := r.servers(t.Context(), load)
	require.NoError(t, err)
	locks := openAt(t, entry{open: openFloor}, placeOf(load, first))
	_, err = locks.acquire(t.Context(), "id")
	require.NoError(t, err)

	again, err := r.servers(t.Context(), load)
	require.NoError(t, err)
	require.Equal(t, first, again)
	_, err = locks.acquire(t.Context(), "id")
	require.NoError(t, err)

	larger, err := r.servers(t.Context(), inCluster(3, load)[0])
	require.NoError(t, err)
	require.Len(t, larger, 3)
	require.NotNil(t, first[0].cmd.ProcessState, "the smaller has ended")

	alone, err := r.servers(t.Context(), cycles(0, 1)[0])
	require.NoError(t, err)
	t.Cleanup(alone[0].stop)
	require.Empty(t, r.cluster, "it would take the cores of the next load")
}

func TestRun_sharesOfMasters(t *testing.T) {
	r := Run{Commands: 200, MasterCommands: []float64{60, 100, 40}}
	require.InDelta(t, 50, r.BusiestMaster(), 1e-9)
	require.InDelta(t, 20, r.IdlestMaster(), 1e-9)
	require.Zero(t, Run{Commands: 1}.BusiestMaster())
	require.Zero(t, Run{Commands: 1}.IdlestMaster())
}
