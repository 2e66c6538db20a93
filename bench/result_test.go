package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestMedian(t *testing.T) {
	values := []float64{9, 1, 5}
	require.InDelta(t, 5, median(values), 0)
	require.Equal(t, []float64{9, 1, 5}, values, "they stay in order")
	require.InDelta(t, 3, median([]float64{9, 1, 2, 4}), 0)
	require.InDelta(t, 7, median([]float64{7}), 0)
}

func TestPercentile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[i] = float64(i + 1)
	}
	require.InDelta(t, 50, percentile(hundred, 0.5), 0)
	require.InDelta(t, 99, percentile(hundred, 0.99), 0)
	require.InDelta(t, 100, percentile(hundred, 1), 0)
	require.InDelta(t, 3, percentile([]float64{3}, 0.99), 0)
}

func TestFigure_leavesOutWhatFailed(t *testing.T) {
	c := Cell{Runs: []Run{
		{Sections: 10, Seconds: 1},
		{Sections: 99, Seconds: 1, Failed: "two held it"},
		{Sections: 40, Seconds: 2},
		{Sections: 5, Seconds: 1},
	}}
	require.Equal(t, Figure{Median: 10, Min: 5, Max: 20, N: 3}, c.Figure(Run.PerSecond))
	require.Equal(t, "two held it", c.Failure())
	require.Zero(t, Cell{Skipped: "not there"}.Figure(Run.PerSecond).N)
	require.Equal(t, "not there", Cell{Skipped: "not there"}.Failure())
}
