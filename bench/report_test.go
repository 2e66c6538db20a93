package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// madeUp returns results of a full run that never was, always the same, of about the size of real ones. In it a peer fails, another is
// not installed, and others starve somebody.
func madeUp() Results {
	r := Results{
		Date:      time.Date(2026, time.November, 24, 16, 20, 0, 0, time.UTC),
		Took:      2520,
		Command:   "go run .",
		Machine:   Machine{CPU: "Made-up CPU", Cores: 2, Memory: "8 GB", System: "Linux 6.1", Go: "go1.26", Redis: "7.0.15", Node: "v20.20.2"},
		NetworkMS: 1.21,
	}
	for _, e := range lineup() {
		e.Version = "v1.2.3"
		r.Libraries = append(r.Libraries, e.Library)
	}
	for _, p := range (options{reps: 3, only: regexp.MustCompile("")}).plan() {
		for _, e := range lineup() {
			if e.takesPart(p.load) {
				r.Cells = append(r.Cells, madeUpCell(p, e.Library))
			}
		}
	}
	return r
}

// madeUpRates are sections a second: of cycles with 1, 16, 256 and 1024 goroutines, and contended with 2, 16, 128 and 1000 waiters.
var madeUpRates = map[string][2][4]float64{
	"redfour":          {{8200, 72_400, 118_000, 121_000}, {6100, 14_800, 14_100, 13_700}},
	"rueidislock":      {{6900, 57_000, 78_000, 77_000}, {3900, 5600, 5400, 5600}},
	"redislock":        {{8600, 39_000, 41_000, 35_000}, {8100, 10_100, 6900, 145}},
	"redsync":          {{8000, 35_000, 29_000, 28_000}, {7700, 7900, 17_700, 6200}},
	"npm redfour":      {{6800, 58_000, 65_000, 64_100}, {2900, 3300, 1300, 296}},
	"npm ioredfour":    {{5300, 45_000, 48_000, 47_500}, {2500, 2900, 1100, 180}},
	"floor":            {{8800, 41_000, 47_000, 43_000}},
	"floor, pipelined": {{8750, 164_000, 206_000, 198_000}},
}

func madeUpCell(p part, l Library) Cell {
	c := Cell{Load: p.load, Library: l.Name}
	if l.Name == "npm ioredfour" && p.load.NetworkMS > 0 {
		c.Skipped = "ioredfour is not installed: npm ci in node/"
		return c
	}
	place := 0 // among the loads of a workload
	for _, limit := range []int{2, 16, 256} {
		if p.load.Waiters > limit {
			place++
		}
	}
	kind := 0
	if p.load.Workload == Contend {
		kind = 1
	}
	rate := madeUpRates[l.Name][kind][place]
	if p.load.NetworkMS > 0 {
		rate = min(rate, 420*float64(p.load.Waiters))
	}
	if p.load.SectionUS > 0 {
		rate = min(rate/2, 780)
	}
	latency := map[string]float64{
		"redfour": 263, "rueidislock": 442, "redislock": 5300, "redsync": 5400, "npm redfour": 828, "npm ioredfour": 910,
	}[l.Name]
	for n := range p.reps {
		noise := []float64{1, 1.06, 0.93}[n%3]
		run := Run{Seconds: 2, Sections: int64(2 * rate * noise), RedisCPU: 1.4 * noise, ClientCPU: 1.9}
		run.Commands = float64(2 * run.Sections)
		switch p.load.Masters {
		case 1:
			run.MasterCommands = []float64{run.Commands}
		case 3:
			run.MasterCommands = []float64{run.Commands * 0.3, run.Commands * 0.4, run.Commands * 0.3}
		}
		switch p.load.Workload {
		case Contend:
			run.Commands = float64(run.Sections) * 1.004
			if l.Name != ours {
				run.Commands = float64(run.Sections) * (2 + float64(p.load.Waiters)*noise/2.7)
			}
			run.LongestWait, run.MeanWait = 1000*float64(p.load.Waiters)/rate*1.3, 1000*float64(p.load.Waiters)/rate
			run.FewestTurns, run.MostTurns = 4, 6
			if p.load.Waiters == 2 && (l.Name == "redislock" || l.Name == "redsync") {
				run.MostTurns = 100
			}
			if p.load.Waiters == 1000 && l.Name != ours {
				run.Starved, run.FewestTurns = 310, 0
			}
		case Handover:
			run.P50, run.P99, run.Handovers = latency*noise/float64(3-p.load.Processes)+1000*float64(p.load.NetworkMS), 4*latency, 120
		case Idle:
			run.Sections, run.Commands = 0, 2*noise
			if strings.HasPrefix(l.Name, "npm") {
				run.Commands = 0
			}
			run.WaiterBytes, run.Resident = 3400+0.25*float64(p.load.IDs), 60e6
		case Cycles:
		}
		if l.Name == "redsync" && p.load.Waiters == 128 && p.load.SectionUS == 0 && n == 1 {
			run.Failed = "mutual exclusion was violated: waiters 3 and 77\nboth held the lock for 1.2ms"
		}
		c.Runs = append(c.Runs, run)
	}
	return c
}

// written returns the files that writeReport writes.
func written(t *testing.T, r Results) map[string]string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, writeReport(dir, r))
	return files(t, dir)
}

func files(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	files := make(map[string]string)
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join(dir, e.Name()))
		require.NoError(t, err)
		files[e.Name()] = string(text)
	}
	return files
}

func TestReport_sameResultsMakeTheSameBytes(t *testing.T) {
	r := madeUp()
	first := written(t, r)
	text, err := json.Marshal(r)
	require.NoError(t, err)
	var again Results
	require.NoError(t, json.Unmarshal(text, &again))
	require.Equal(t, first, written(t, again))
}

func TestReport_says(t *testing.T) {
	report := written(t, madeUp())["results.md"]
	for what, line := range map[string]string{
		"when":               "| date | 24 November 2026, 16:20 UTC; it took 42 minutes |",
		"where":              "| CPU | Made-up CPU, 2 cores |",
		"spread":             "| **redfour** | 8.20k (7.63k–8.69k) | 2 | 0.700 (0.651–0.742) | 0.950 |",
		"repetitions":        "| ***1 goroutine***, 9 runs |  |  |  |  |",
		"best peer":          "| redfour ÷ best peer | 0.953 (redislock) | 1 (rueidislock) |  |  |",
		"no better with 0":   "| idle, 10,000 waiters on one id: commands/s | 1 | 1 | 1 | 1 | 0 | 0 |  |  |  |",
		"starved and failed": "| contended, 1000 waiters in 4 processes, empty sections: sections/s | 13.7k | 5.60k† | 145† | 6.20k† | 296† | 180† |  |  | 2.21 (redsync) |",
		"one failed run":     "| contended, 128 waiters in 4 processes, empty sections: sections/s | 14.1k | 5.40k | 6.90k | failed | 1.30k | 1.10k |  |  | 2.04 (redislock) |",
		"why it failed":      "- redsync: mutual exclusion was violated: waiters 3 and 77 both held the lock for 1.2ms (128 waiters in one process, empty sections; 128 waiters in 4 processes, empty sections)",
		"why it is missing":  "- npm ioredfour: ioredfour is not installed: npm ci in node/ (2 processes)",
		"in a cluster":       "| uncontended, in a cluster, 1024 goroutines, one master: sections/s | 121k | 77.0k | 35.0k | 28.0k |  | 47.5k | 43.0k | 198k | 1.57 (rueidislock) |",
		"of several":         "| from the release to the next holder, in a cluster, 2 processes, 3 masters: p50, ms | 0.263 | 0.442 | 5.30 | 5.40 |  | 0.910 |  |  | 0.595 (rueidislock) |",
		"load of masters":    "| **redfour** | 121k (113k–128k) | 2 | 0.700 (0.651–0.742) | 0.950 | 40 | 30 |",
		"settings":           "| floor | v1.2.3 | SET NX PX, and a script that compares and deletes, on a go-redis client as of redfour |",
	} {
		require.Contains(t, strings.Split(report, "\n"), line, what)
	}
	for _, chart := range []string{"cycles", "handover", "contended", "commands", "network"} {
		require.Contains(t, report, "!["+chart+"]("+chart+".svg)")
	}
	require.NotContains(t, report, "quick run")
	r := madeUp()
	r.Quick = true
	require.Contains(t, written(t, r)["results.md"], "quick run")
}

func TestReport_leavesNoChartOfAnotherRun(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, writeReport(dir, madeUp()))
	r := madeUp()
	r.Cells = slices.DeleteFunc(r.Cells, func(c Cell) bool { return c.name() != "cycles" })
	require.NoError(t, writeReport(dir, r))

	left := files(t, dir)
	require.Contains(t, left, "cycles.svg")
	require.Len(t, left, 2, "the report and one chart")
	require.NotContains(t, left["results.md"], "network.svg")
}

func TestReport_withoutFigures(t *testing.T) {
	r := madeUp()
	for i := range r.Cells {
		r.Cells[i].Runs, r.Cells[i].Skipped = nil, "nothing works here"
	}
	report := written(t, r)
	require.Contains(t, report["results.md"], "nothing works here")
	require.Contains(t, report["cycles.svg"], "not measured")
	r.Cells = nil
	require.Len(t, written(t, r), 1, "the report without charts")
}

func TestShort(t *testing.T) {
	for text, numbers := range map[string][]float64{
		"0": {0}, "1": {1}, "999": {999, 999.4}, "0.050": {0.05}, "0.999": {0.9994}, "1.00": {0.9996, 1.004}, "9.99": {9.99},
		"10.0": {9.996}, "99.9": {99.9}, "100": {99.96, 100}, "1.00k": {999.6, 1000}, "78.0k": {78_000}, "121k": {121_300},
		"1.00M": {999_600, 1e6},
	} {
		for _, x := range numbers {
			require.Equal(t, text, short(x), "%v", x)
		}
	}
}

func TestTargets(t *testing.T) {
	r := madeUp()
	lines := strings.Split(targetsTable(r), "\n")
	for _, line := range []string{
		"| uncontended, 1 goroutine | sections/s ÷ floor | 0.932 | ≥ 0.900 | met |",
		"| release to held, 2 processes | p50 ÷ npm redfour | 0.318 | ≤ 0.350 | met |",
		"| one id, 16 waiters in 4 processes, empty sections | commands a section | 1.00 | ≤ 1.10 | met |",
		"| one id, 1000 waiters in 4 processes, empty sections | starved waiters, in the worst repetition | 0 | ≤ 0 | met |",
		// Others are faster, because one of the two waiters has most of the turns.
		"| one id, 2 waiters in 2 processes, empty sections | sections/s ÷ the best peer that serves both " +
			"(one at most ten times as often as the other): rueidislock | 1.56 | ≥ 1 | met |",
		"| idle, 10,000 waiters on 10,000 ids | heap and stack a waiter, kB | 5.90 | ≤ 6 | met |",
	} {
		require.Contains(t, lines, line)
	}
	require.NotContains(t, strings.Join(lines, "\n"), "not met")

	// All that is measured gets worse: sections are fewer, and the rest is more.
	for i, c := range r.Cells {
		for j := range c.Runs {
			if run := &r.Cells[i].Runs[j]; c.Library == ours {
				run.Sections /= 4
				run.P50 *= 4
				run.Commands *= 600
				run.WaiterBytes *= 4
				run.Starved = 1
			}
		}
	}
	require.Equal(t, len(lines)-3, strings.Count(targetsTable(r), "| **not met** |"), targetsTable(r))

	r.Cells = nil
	require.Equal(t, len(lines)-3, strings.Count(targetsTable(r), "| not measured |"))
}

func TestTargets_figuresThatDoNotCount(t *testing.T) {
	r := madeUp()
	for i, c := range r.Cells {
		if c.Load == cycles(0, 1)[0] && c.Library == "floor" || c.Load == handover(0, 2) && c.Library == ours {
			r.Cells[i].Runs[0].Failed = "lost its connection"
		}
	}
	table := targetsTable(r)
	require.Contains(t, table, "| uncontended, 1 goroutine | sections/s ÷ floor | floor has no figures | ≥ 0.900 | – |")
	require.Contains(t, table, "| release to held, 2 processes | p50 ÷ rueidislock | redfour has no figures | ≤ 0.650 | – |")
}

// The figures in the README are the same as in the results.
func TestReadme_hasTheFiguresOfTheResults(t *testing.T) {
	rows := func(path, head string) map[string]map[string]string {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		_, table, found := strings.Cut(string(text), "\n"+head)
		require.True(t, found, head)
		table, _, _ = strings.Cut(head+table, "\n\n")
		lines := strings.Split(table, "\n")
		names := cells(lines[0])
		rows := make(map[string]map[string]string) // of the first cell, by the names of the others
		for _, line := range lines[2:] {
			row := cells(line)
			rows[row[0]] = make(map[string]string)
			for i, name := range names {
				rows[row[0]][name] = row[i]
			}
		}
		return rows
	}
	const head = "|  | **redfour** | rueidislock | redislock | redsync | npm redfour |"
	results := rows("results/results.md", strings.TrimSuffix(head, "|"))
	readme := rows("../README.md", head)
	require.NotEmpty(t, readme)
	for name, row := range readme {
		for library, figure := range row {
			require.Equal(t, results[name][library], figure, "%s, %s", name, library)
		}
	}
}

// cells returns those of a row of a table.
func cells(row string) []string {
	var all []string
	for cell := range strings.SplitSeq(strings.Trim(row, "|"), "|") {
		all = append(all, strings.TrimSpace(cell))
	}
	return all
}
