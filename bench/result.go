package main

import (
	"cmp"
	"slices"
	"time"
)

// Results are what one run measured, raw and in the order in which tables and charts show it, so
// that they can be rendered again from results.json.
type Results struct {
	Date      time.Time `json:"date"`    // when the run began
	Took      float64   `json:"took_s"`  // how long it took
	Command   string    `json:"command"` // the command line that repeats it
	Quick     bool      `json:"quick"`   // shorter and fewer cells than a full run
	Machine   Machine   `json:"machine"`
	NetworkMS float64   `json:"network_ms"` // what a PING took over the emulated network, median; 0: not measured
	Libraries []Library `json:"libraries"`  // in the order of rows, bars and colours
	Cells     []Cell    `json:"cells"`
}

// Machine is where the run took place.
type Machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Memory string `json:"memory"`
	System string `json:"system"` // kernel and its version
	Go     string `json:"go"`
	Redis  string `json:"redis"`
	Node   string `json:"node"` // empty: there was none
}

// A Library is one of those that are compared.
type Library struct {
	Name     string `json:"name"`
	Version  string `json:"version"`
	Settings string `json:"settings"` // one line: what was chosen, and why
	Floor    bool   `json:"floor"`    // not a lock library: the least that a lock can cost
}

// A Workload is a kind of cell. Its cells differ in the number of waiters and the like.
type Workload string

// The workloads, in the order in which they run.
const (
	Cycles   Workload = "cycles"   // acquire and release, each goroutine on an id of its own
	Handover Workload = "handover" // two take turns: from the release to the other's acquire
	Contend  Workload = "contend"  // all waiters on one id
	Idle     Workload = "idle"     // waiters who get nothing, because the parent holds the locks
)

// A Load is what is asked of every library in the same way.
type Load struct {
	Workload  Workload `json:"workload"`
	Processes int      `json:"processes"`
	Waiters   int      `json:"waiters"`           // of all processes together: goroutines, or async functions in Node.js
	IDs       int      `json:"ids"`               // on which they are, for idle
	SectionUS int      `json:"section_us"`        // how long a section sleeps, for contend; 0: it is empty
	NetworkMS int      `json:"network_ms"`        // round trip that is added; 0: loopback as it is
	Masters   int      `json:"masters,omitempty"` // of a cluster; 0: there is one server, and no cluster
}

// A Cell is one library under one load.
type Cell struct {
	Load

	Library string `json:"library"`
	Skipped string `json:"skipped,omitempty"` // why it has no runs
	Runs    []Run  `json:"runs,omitempty"`
}

// A Run is one repetition of a cell. Figures that its workload does not have are 0.
type Run struct {
	Failed  string  `json:"failed,omitempty"` // why its figures do not count
	Seconds float64 `json:"seconds"`          // from go to stop

	// Of cycles, handover and contend.
	Sections int64 `json:"sections"`

	// What the server counted between go and stop, or all masters of a cluster together.
	Commands float64 `json:"commands"`    // that clients sent; a script is one
	RedisCPU float64 `json:"redis_cpu_s"` // user and system
	// The commands of each master of a cluster, in the order of their slots.
	MasterCommands []float64 `json:"master_commands,omitempty"`

	// What all workers used together between go and stop.
	ClientCPU float64 `json:"client_cpu_s"`
	// What the machine was busy with besides, between go and stop: other programs, and other virtual machines on its
	// cores. An emulated network is included. 0 where the system does not say.
	OtherCPU float64 `json:"other_cpu_s"`

	// Of contend: from the beginning of a wait to the lock, in ms. A wait that the end of the run
	// cut short counts with what it took until then.
	LongestWait float64 `json:"longest_wait_ms,omitempty"`
	MeanWait    float64 `json:"mean_wait_ms,omitempty"`
	Starved     int     `json:"starved"`      // waiters who never held
	FewestTurns int     `json:"fewest_turns"` // sections of the waiter who had fewest
	MostTurns   int     `json:"most_turns"`

	// Of handover: from just before the release to the return of the other's acquire, in µs.
	P50       float64 `json:"p50_us,omitempty"`
	P99       float64 `json:"p99_us,omitempty"`
	Handovers int     `json:"handovers,omitempty"` // that these are percentiles of

	// Of idle.
	WaiterBytes float64 `json:"waiter_bytes,omitempty"` // heap and stack for each waiter; 0 for Node.js, which cannot tell
	Resident    float64 `json:"resident,omitempty"`     // memory of all workers together, in bytes, with all that is not for waiters
}

// PerSecond is how many sections there were in a second.
func (r Run) PerSecond() float64 { return ratio(float64(r.Sections), r.Seconds) }

// CommandsPerSection is how many commands a section cost the server.
func (r Run) CommandsPerSection() float64 { return ratio(r.Commands, float64(r.Sections)) }

// CommandsPerSecond is how many commands there were in a second, which is what an idle waiter costs.
func (r Run) CommandsPerSecond() float64 { return ratio(r.Commands, r.Seconds) }

// RedisShare is how many cores Redis used. A server uses hardly more than one.
func (r Run) RedisShare() float64 { return ratio(r.RedisCPU, r.Seconds) }

// BusiestMaster is how many percent of the commands the master of a cluster had that had most.
func (r Run) BusiestMaster() float64 {
	return 100 * ratio(slices.Max(append(r.MasterCommands, 0)), r.Commands)
}

// IdlestMaster is the same of the one that had fewest.
func (r Run) IdlestMaster() float64 {
	if len(r.MasterCommands) == 0 {
		return 0
	}
	return 100 * ratio(slices.Min(r.MasterCommands), r.Commands)
}

// ClientShare is how many cores the workers used.
func (r Run) ClientShare() float64 { return ratio(r.ClientCPU, r.Seconds) }

// OtherShare is how many cores were not there for what is measured.
func (r Run) OtherShare() float64 { return ratio(r.OtherCPU, r.Seconds) }

// Others is what was going on besides the runs without a network, in cores. Figures from a busy machine mean little.
func (r Results) Others() Figure {
	var all Cell
	for _, c := range r.Cells {
		if c.NetworkMS == 0 {
			all.Runs = append(all.Runs, c.Runs...)
		}
	}
	return all.Figure(Run.OtherShare)
}

func ratio(a, b float64) float64 {
	if b == 0 {
		return 0
	}
	return a / b
}

// A Figure is one number of a cell, over its repetitions.
type Figure struct {
	Median, Min, Max float64
	N                int // repetitions that did not fail; 0: there is no figure
}

// Figure returns a number of the runs that did not fail, such as cell.Figure(Run.PerSecond).
func (c Cell) Figure(of func(Run) float64) Figure {
	var values []float64
	for _, r := range c.Runs {
		if r.Failed == "" {
			values = append(values, of(r))
		}
	}
	if len(values) == 0 {
		return Figure{}
	}
	low, high := spread(values)
	return Figure{Median: median(values), Min: low, Max: high, N: len(values)}
}

// Failure is the first failure of a cell, or why it was skipped, or empty.
func (c Cell) Failure() string {
	for _, r := range c.Runs {
		if r.Failed != "" {
			return r.Failed
		}
	}
	return c.Skipped
}

// Cell returns what a library did under a load, and whether it was asked to.
func (r Results) Cell(load Load, library string) (Cell, bool) {
	for _, c := range r.Cells {
		if c.Load == load && c.Library == library {
			return c, true
		}
	}
	return Cell{}, false
}

// Loads returns the loads of a name, such as "network cycles", in the order in which they ran.
func (r Results) Loads(name string) []Load {
	var loads []Load
	for _, c := range r.Cells {
		if c.name() == name && !slices.Contains(loads, c.Load) {
			loads = append(loads, c.Load)
		}
	}
	return loads
}

// median returns the middle one of some values, or the mean of the two middle ones.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// spread returns the least and the greatest of some values.
func spread(values []float64) (low, high float64) { return slices.Min(values), slices.Max(values) }

// percentile returns the least of the sorted values that p of all (0 < p ≤ 1) do not exceed.
func percentile[T cmp.Ordered](sorted []T, p float64) T {
	rank := int(p*float64(len(sorted)) + 0.999999)
	return sorted[min(max(rank, 1), len(sorted))-1]
}
