package main

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestSections_fileKeepsThem(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sections.bin")
	want := []section{{waiter: 1, wanted: 2, held: 3, released: 4}, {waiter: 5, wanted: 1 << 60}}
	require.NoError(t, writeSections(path, want))
	got, err := readSections(path)
	require.NoError(t, err)
	require.Equal(t, want, got)
}

func TestCheckAlone(t *testing.T) {
	for name, c := range map[string]struct {
		sections []section
		violated string
	}{
		"one after the other": {sections: []section{{1, 0, 10, 20}, {2, 0, 20, 30}, {1, 21, 31, 32}}},
		"in any order":        {sections: []section{{1, 21, 31, 32}, {2, 0, 20, 30}, {1, 0, 10, 20}}},
		"cut short":           {sections: []section{{1, 0, 10, 20}, {2, 5, 0, 0}, {3, 6, 0, 0}}},
		"overlap":             {[]section{{1, 0, 10, 20}, {2, 0, 19, 30}}, "waiters 1 and 2 both held"},
		"one inside another":  {[]section{{1, 0, 10, 50}, {2, 0, 20, 30}}, "waiters 1 and 2 both held"},
		"of one waiter":       {[]section{{1, 0, 10, 20}, {1, 0, 15, 30}}, "waiters 1 and 1 both held"},
		"backwards":           {[]section{{1, 0, 20, 10}}, "before it held"},
	} {
		t.Run(name, func(t *testing.T) {
			err := checkAlone(c.sections)
			if c.violated == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, c.violated)
			}
		})
	}
}

func TestTurns(t *testing.T) {
	const ms = 1e6
	r := Run{}.withTurns([]section{
		{waiter: 0, wanted: 0, held: 1 * ms, released: 2 * ms},
		{waiter: 1, wanted: 0, held: 2 * ms, released: 3 * ms},
		{waiter: 0, wanted: 2 * ms, held: 4 * ms, released: 10 * ms}, // which is when it ends
		{waiter: 2, wanted: 1 * ms},                                  // and is cut short
		{waiter: 1, wanted: 3 * ms, held: 11 * ms, released: 12 * ms},
		{waiter: 0, wanted: 10 * ms, held: 12 * ms, released: 13 * ms}, // too late to count
	}, 3, 0, 10*ms)
	require.Equal(t, Run{
		Seconds: 0.01, Sections: 3, Starved: 1, MostTurns: 2,
		LongestWait: 9, MeanWait: (1 + 2 + 2 + 9 + 7) / 5.,
	}, r)
}

func TestHandovers(t *testing.T) {
	const us = 1e3
	require.Equal(t, []float64{100, 300, 1200}, handovers([]section{
		{waiter: 0, wanted: 0, held: 50 * us, released: 1000 * us}, // from nobody
		{waiter: 1, wanted: 10 * us, held: 1100 * us, released: 2000 * us},
		{waiter: 0, wanted: 1500 * us, held: 2300 * us, released: 3000 * us},
		// Waiter 0 overtakes waiter 1, who has waited for 1200 µs since the first release.
		{waiter: 0, wanted: 3050 * us, held: 3100 * us, released: 4000 * us},
		{waiter: 1, wanted: 2500 * us, held: 4200 * us, released: 5000 * us},
		{waiter: 0, wanted: 6000 * us, held: 6100 * us, released: 7000 * us}, // it was free
		{waiter: 1, wanted: 6500 * us, held: 7100 * us, released: 8000 * us}, // after the end
	}, 7050*us))
}
