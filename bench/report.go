package main

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// ours is the name of the library that is compared with its peers.
const ours = "redfour"

const reportFile = "results.md"

// writeReport writes tables and charts into a directory. Nothing but the results goes into them, so
// that the same results make the same bytes. A chart that has nothing to show is removed, because it would be that of
// another run.
func writeReport(dir string, r Results) error {
	shown := make(map[string]bool)
	for _, c := range chartsOf(r) {
		path := filepath.Join(dir, c.file)
		if c.empty() {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			continue
		}
		shown[c.file] = true
		if err := os.WriteFile(path, c.svg(), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, reportFile), []byte(markdown(r, shown)), 0o644)
}

// A metric is a number of a run, as tables name it.
type metric struct {
	name   string
	of     func(Run) float64
	better sense
}

// A sense says what is good.
type sense int

const (
	neither sense = iota // It explains other numbers.
	more
	less
)

// metricsOf returns the metrics of a workload. The first is what the workload is about.
func metricsOf(w Workload) []metric {
	sections := []metric{
		{"sections/s", Run.PerSecond, more},
		{"commands a section", Run.CommandsPerSection, less},
	}
	waits := []metric{
		{"longest wait, ms", func(r Run) float64 { return r.LongestWait }, less},
		{"mean wait, ms", func(r Run) float64 { return r.MeanWait }, neither}, // It is the rate again, where all are served.
		{"starved waiters", func(r Run) float64 { return float64(r.Starved) }, neither},
		{"fewest turns", func(r Run) float64 { return float64(r.FewestTurns) }, neither},
		{"most turns", func(r Run) float64 { return float64(r.MostTurns) }, neither},
	}
	cores := []metric{
		{"Redis, cores", Run.RedisShare, neither},
		{"clients, cores", Run.ClientShare, neither},
	}
	var metrics []metric
	switch w {
	case Cycles:
		metrics = append(metrics, sections...)
	case Handover:
		metrics = append(metrics,
			metric{"p50, ms", func(r Run) float64 { return r.P50 / 1e3 }, less},
			metric{"p99, ms", func(r Run) float64 { return r.P99 / 1e3 }, less},
			metric{"handovers", func(r Run) float64 { return float64(r.Handovers) }, neither},
		)
	case Contend:
		metrics = append(append(metrics, sections...), waits...)
	case Idle:
		metrics = append(metrics,
			metric{"commands/s", Run.CommandsPerSecond, less},
			metric{"heap and stack a waiter, kB", func(r Run) float64 { return r.WaiterBytes / 1e3 }, less},
			metric{"resident, MB", func(r Run) float64 { return r.Resident / 1e6 }, neither},
		)
	}
	return append(metrics, cores...)
}

// metrics returns those of the workload, and in a cluster how its masters share the work.
func (l Load) metrics() []metric {
	metrics := metricsOf(l.Workload)
	if l.Masters > 0 && l.Workload == Cycles {
		metrics = append(metrics,
			metric{"commands of the busiest master, %", Run.BusiestMaster, neither},
			metric{"of the idlest, %", Run.IdlestMaster, neither},
		)
	}
	return metrics
}

// A chapter of the report shows the loads of one name.
type chapter struct {
	name   string
	title  string
	text   string
	charts []string
}

var chapters = []chapter{
	{
		"cycles", "Uncontended",
		"Goroutines in one process acquire and release, as fast as they can, each on an id of its own. A section is one such cycle.",
		[]string{"cycles.svg"},
	},
	{
		"handover", "From the release to the next holder",
		"Two take turns. Each holds the lock for so long that the other is certainly waiting. The time is from just before the release to the\nreturn of the other's acquire.",
		[]string{"handover.svg"},
	},
	{
		"contend", "Contended",
		"All waiters are on one id: they wait, hold the lock for a section, release it, and wait again. A wait that the end of the run cut short\ncounts with its length until then. Starved is who never held the lock.",
		[]string{"contended.svg", "commands.svg"},
	},
	{
		"idle", "Idle",
		"The waiters get nothing, because somebody else holds the locks. Heap and stack are what a collection leaves, less what it left\nbefore the waiters came; in Node.js there is a heap only. Resident is the whole process.",
		nil,
	},
	{"network cycles", "Uncontended, over a network", "The same over an emulated network with a round trip of 1 ms.", []string{"network.svg"}},
	{"network handover", "From the release to the next holder, over a network", "", nil},
	{"network contend", "Contended, over a network", "", nil},
	{
		"cluster cycles", "Uncontended, in a cluster",
		"The masters share the cores of this machine with each other and with the clients, so on two cores three masters cannot be faster than\none. What this shows is what the way through a cluster costs, and that all masters carry load; 16 ids are too few to be spread evenly.\nThe cores of Redis are those of all masters together. npm redfour knows no clusters.",
		nil,
	},
	{
		"cluster handover", "From the release to the next holder, in a cluster",
		"The lock of the two is on one of the masters.",
		nil,
	},
}

// markdown returns the report. It shows those charts that there are.
func markdown(r Results, charts map[string]bool) string {
	var b strings.Builder
	b.WriteString("# Results\n\n<!-- Written by the benchmark, which can write it again from results.json. -->\n\n")
	b.WriteString(table([]string{"", ""}, 2, r.circumstances()))
	if r.Quick {
		b.WriteString("\nThis was a quick run: short, with few repetitions, and not all there is to measure. It is a hint, and no more.\n")
	}
	b.WriteString("\n## Targets\n\nRatios of medians, in this run.\n\n")
	b.WriteString(targetsTable(r))
	b.WriteString("\n## At a glance\n\nMedians of the first number in the tables below. † marks where a waiter got nothing at all in some repetition. A peer is any other\nlibrary; the floors are no libraries, but the least that a lock can cost.\n\n")
	b.WriteString(r.glance())
	for _, c := range chapters {
		b.WriteString(r.chapter(c, charts))
	}
	b.WriteString("\n## Libraries\n\n")
	var rows [][]string
	for _, l := range r.Libraries {
		rows = append(rows, []string{emphasised(l.Name), l.Version, l.Settings})
	}
	b.WriteString(table([]string{"", "version", "settings"}, 3, rows))
	return b.String()
}

// circumstances are the machine and the time.
func (r Results) circumstances() [][]string {
	m := r.Machine
	node := "none"
	if m.Node != "" {
		node = m.Node
	}
	rows := [][]string{
		{"date", fmt.Sprintf("%s; it took %s", r.Date.UTC().Format("2 January 2006, 15:04 MST"), roundedTime(r.Took))},
		{"command", "`" + r.Command + "`"},
		{"CPU", fmt.Sprintf("%s, %d cores", m.CPU, m.Cores)},
		{"memory", m.Memory},
		{"system", m.System},
		{"Go", m.Go},
		{"Redis", m.Redis},
		{"Node.js", node},
	}
	if others := r.Others(); others.Max > 0 {
		rows = append(rows, []string{"other programs", fmt.Sprintf("%s cores in the median run, %s at most", short(others.Median), short(others.Max))})
	}
	if r.NetworkMS > 0 {
		rows = append(rows, []string{"PING over the network", fmt.Sprintf("%s ms, where it is emulated", short(r.NetworkMS))})
	}
	return rows
}

func roundedTime(seconds float64) string {
	if seconds < 120 {
		return plural(int(math.Round(seconds)), "second")
	}
	return plural(int(math.Round(seconds/60)), "minute")
}

// glance is one table of all loads and libraries.
func (r Results) glance() string {
	header := []string{""}
	for _, l := range r.Libraries {
		header = append(header, emphasised(l.Name))
	}
	header = append(header, "redfour ÷ best peer")
	var rows [][]string
	for _, c := range chapters {
		for _, load := range r.Loads(c.name) {
			m := load.metrics()[0]
			row := []string{fmt.Sprintf("%s, %s: %s", strings.ToLower(c.title[:1])+c.title[1:], load.title(), m.name)}
			for _, l := range r.Libraries {
				cell, _ := r.Cell(load, l.Name)
				row = append(row, cell.text(m, false))
			}
			rows = append(rows, append(row, r.againstBest(load, m)))
		}
	}
	return table(header, 1, rows)
}

// chapter returns charts and a table for each kind of section, or nothing if nothing was measured.
func (r Results) chapter(c chapter, charts map[string]bool) string {
	loads := r.Loads(c.name)
	if len(loads) == 0 {
		return ""
	}
	var b strings.Builder
	fmt.Fprintf(&b, "\n## %s\n", c.title)
	if c.text != "" {
		fmt.Fprintf(&b, "\n%s\n", c.text)
	}
	for _, file := range c.charts {
		if charts[file] {
			fmt.Fprintf(&b, "\n![%s](%s)\n", strings.TrimSuffix(file, ".svg"), file)
		}
	}
	metrics := loads[0].metrics()
	header := []string{""}
	for _, m := range metrics {
		header = append(header, m.name)
	}
	var rows [][]string
	for _, load := range loads {
		rows = append(rows, r.group(load, metrics)...)
	}
	fmt.Fprintf(&b, "\n%s%s", table(header, 1, rows), r.failures(loads))
	return b.String()
}

// failures is a list of why figures are missing, or nothing.
func (r Results) failures(loads []Load) string {
	var reasons []string
	cells := make(map[string][]string) // by reason
	for _, l := range r.Libraries {
		for _, load := range loads {
			cell, _ := r.Cell(load, l.Name)
			if cell.Failure() == "" {
				continue
			}
			reason := fmt.Sprintf("%s: %s", l.Name, strings.Join(strings.Fields(cell.Failure()), " "))
			if cells[reason] == nil {
				reasons = append(reasons, reason)
			}
			cells[reason] = append(cells[reason], load.title())
		}
	}
	if len(reasons) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\nNo figures:\n\n")
	for _, reason := range reasons {
		fmt.Fprintf(&b, "- %s (%s)\n", reason, strings.Join(cells[reason], "; "))
	}
	return b.String()
}

// group returns the rows of all libraries under one load.
func (r Results) group(load Load, metrics []metric) [][]string {
	heading := make([]string, len(metrics)+1)
	last := slices.Clone(heading)
	last[0] = "redfour ÷ best peer"
	for i, m := range metrics {
		last[i+1] = r.againstBest(load, m)
	}
	var rows [][]string
	repetitions := 0
	for _, l := range r.Libraries {
		cell, ok := r.Cell(load, l.Name)
		if !ok {
			continue
		}
		repetitions = max(repetitions, len(cell.Runs))
		row := []string{emphasised(l.Name)}
		for _, m := range metrics {
			row = append(row, cell.text(m, true))
		}
		rows = append(rows, row)
	}
	heading[0] = fmt.Sprintf("***%s***, %s", load.title(), plural(repetitions, "run"))
	return append(append([][]string{heading}, rows...), last)
}

// title says what is special about a load among those of its workload.
func (l Load) title() string {
	switch {
	case l.Masters == 1:
		return l.outsideCluster().title() + ", one master"
	case l.Masters > 1:
		return l.outsideCluster().title() + ", " + plural(l.Masters, "master")
	}
	switch l.Workload {
	case Cycles:
		return plural(l.Waiters, "goroutine")
	case Handover:
		return processes(l.Processes)
	case Idle:
		if l.IDs == 1 {
			return plural(l.Waiters, "waiter") + " on one id"
		}
		return plural(l.Waiters, "waiter") + " on " + plural(l.IDs, "id")
	}
	text := plural(l.Waiters, "waiter") + " in " + processes(l.Processes)
	if l.SectionUS == 0 {
		return text + ", empty sections"
	}
	return text + fmt.Sprintf(", sections of %s ms", short(float64(l.SectionUS)/1e3))
}

func (l Load) outsideCluster() Load {
	l.Masters = 0
	return l
}

func processes(n int) string {
	if n == 1 {
		return "one process"
	}
	return plural(n, "process")
}

func plural(n int, noun string) string {
	text := strconv.Itoa(n)
	if n >= 10_000 { // Four digits are read at a glance.
		text = text[:len(text)-3] + "," + text[len(text)-3:]
	}
	switch {
	case n == 1:
		return text + " " + noun
	case strings.HasSuffix(noun, "s"):
		return text + " " + noun + "es"
	}
	return text + " " + noun + "s"
}

// counts says whether the figures of a cell count. One repetition that failed is enough that they do not.
func (c Cell) counts() bool { return len(c.Runs) > 0 && c.Failure() == "" }

// text is what a table says of a cell: nothing, if the library does not take part.
func (c Cell) text(m metric, spread bool) string {
	switch {
	case c.Skipped != "":
		return "–"
	case len(c.Runs) == 0:
		return ""
	case !c.counts():
		return "failed"
	}
	f := c.Figure(m.of)
	text := short(f.Median)
	if !spread {
		return text + c.mark()
	}
	if f.N > 1 && f.Min != f.Max {
		text += fmt.Sprintf(" (%s–%s)", short(f.Min), short(f.Max))
	}
	return text
}

// mark is a † if somebody got nothing.
func (c Cell) mark() string {
	if c.Figure(func(r Run) float64 { return float64(r.Starved) }).Max > 0 {
		return "†"
	}
	return ""
}

// bestPeer returns the median of the best peer under a load, of those that qualify.
func (r Results) bestPeer(load Load, m metric, qualifies func(Cell) bool) (library string, median float64, ok bool) {
	for _, l := range r.Libraries {
		cell, found := r.Cell(load, l.Name)
		if l.Floor || l.Name == ours || !found || !cell.counts() || !qualifies(cell) {
			continue
		}
		value := cell.Figure(m.of).Median
		if !ok || m.better == more && value > median || m.better == less && value < median {
			library, median, ok = l.Name, value, true
		}
	}
	return library, median, ok
}

func anyPeer(Cell) bool { return true }

// againstBest returns the ratio to the best of all peers, and who that is.
func (r Results) againstBest(load Load, m metric) string {
	own, _ := r.Cell(load, ours)
	peer, best, ok := r.bestPeer(load, m, anyPeer)
	if m.better == neither || !ok || !own.counts() || best == 0 {
		return ""
	}
	return fmt.Sprintf("%s (%s)", short(own.Figure(m.of).Median/best), peer)
}

// emphasised sets off this library.
func emphasised(library string) string {
	if library == ours {
		return "**" + library + "**"
	}
	return library
}

// short returns three digits of a number, or all of a whole one that has no more.
func short(x float64) string {
	switch {
	case x == math.Trunc(x) && x < 1000:
		return strconv.FormatFloat(x, 'f', 0, 64)
	case x < 999.5:
		return digits(x)
	case x < 999.5e3:
		return digits(x/1e3) + "k"
	}
	return digits(x/1e6) + "M"
}

// digits returns three of them; fewer below 0.1.
func digits(x float64) string {
	decimals := 0
	for _, limit := range []float64{99.95, 9.995, 0.9995} {
		if x < limit {
			decimals++
		}
	}
	return strconv.FormatFloat(x, 'f', decimals, 64)
}

// table returns a table of GitHub's Markdown. So many columns have words, which stand to the left; the others have numbers.
func table(header []string, words int, rows [][]string) string {
	var b strings.Builder
	line := func(cells []string) {
		for _, c := range cells {
			fmt.Fprintf(&b, "| %s ", strings.ReplaceAll(c, "|", `\|`))
		}
		b.WriteString("|\n")
	}
	line(header)
	rule := slices.Repeat([]string{"---:"}, len(header))
	for i := range words {
		rule[i] = "---"
	}
	line(rule)
	for _, row := range rows {
		line(row)
	}
	return b.String()
}
