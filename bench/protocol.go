package main

// A task is what a worker process has to do. It is the first line of the worker's input, and
// node/worker.mjs understands the same.
//
// The worker says {"ready":true} once it is connected and warmed up, or once all its waiters wait;
// begins when a line "go" comes; and ends when a line "stop" comes, or its input ends: then sections that have
// begun are finished, the sections file is written, and a report is printed.
type task struct {
	place

	Library   string   `json:"library"` // a name of libraries, or for Node.js a package
	Workload  Workload `json:"workload"`
	Process   int      `json:"process"` // number of the worker, from 0
	Waiters   int      `json:"waiters"` // of this process
	IDs       int      `json:"ids"`     // waiter n waits for number n modulo this
	SectionUS int      `json:"section_us"`
	TTLMS     int      `json:"ttl_ms"`
	// How long waiters who take turns hold the lock, at least and at most, and how long they stay away
	// afterwards. They hold it for longer than they stay away, so that the other certainly waits when it is released; and stay away for
	// longer than anybody polls, so that the other gets it.
	HoldMS  [2]float64 `json:"hold_ms"`
	PauseMS float64    `json:"pause_ms"`
	PollMS  float64    `json:"poll_ms"` // for libraries that poll

	SettleMS float64 `json:"settle_ms"` // for which idle waiters have time to come to rest

	SectionsFile string `json:"sections_file"` // written for contend and handover
}

// A place is where Redis is.
type place struct {
	Addr    string   `json:"addr"`    // of the server, or of the emulated network before it; empty in a cluster
	Cluster []string `json:"cluster"` // addresses of all masters; null: there is no cluster
}

// ready is the first line that a worker prints.
type ready struct {
	Ready bool `json:"ready"`
}

// A report is the last line that a worker prints.
type report struct {
	Sections  int64   `json:"sections"` // that ended before the stop
	PerWaiter []int64 `json:"per_waiter"`
	Errors    int     `json:"errors"`
	Error     string  `json:"error"` // the first
	CPU       float64 `json:"cpu_s"` // user and system, from go to stop
	Resident  float64 `json:"rss"`
	// Heap and stack of the waiters: what a collection left, less what it left before they came. Node.js has none.
	HeapStack float64 `json:"heap_stack"`
}
