package faults

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// A report sums up the verdicts on many runs. It is safe for concurrent use.
type report struct {
	mu   sync.Mutex // guards what follows
	rows map[string]*row
}

// A row is what a report says of one fault.
type row struct {
	place      int
	runs       int
	operations int
	unknowns   int
	overlaps   int
	violations int
	stall      time.Duration
}

func newReport() *report { return &report{rows: make(map[string]*row)} }

// add adds a verdict to the row of a fault, which has the given place in the table.
func (r *report) add(place int, fault string, v *verdict) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rows[fault] == nil {
		r.rows[fault] = &row{place: place}
	}
	r.rows[fault].add(row{0, 1, v.operations, v.unknowns, v.overlaps, len(v.violations), v.stall})
}

func (r *row) add(other row) {
	r.runs += other.runs
	r.operations += other.operations
	r.unknowns += other.unknowns
	r.overlaps += other.overlaps
	r.violations += other.violations
	r.stall = max(r.stall, other.stall)
}

// table returns the table, a row for each fault. Its last line is the verdict, which is bad if anything failed.
func (r *report) table(remark string, failed bool) string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all row
	rows := []string{"fault\truns\toperations\tunknown outcomes\toverlaps counted\tviolations\tslowest recovery\t\n"}
	for _, name := range slices.SortedFunc(maps.Keys(r.rows), func(a, b string) int { return r.rows[a].place - r.rows[b].place }) {
		all.add(*r.rows[name])
		rows = append(rows, r.rows[name].text(name))
	}
	rows = append(rows, all.text("all"))

	var text strings.Builder
	aligned := tabwriter.NewWriter(&text, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = io.WriteString(aligned, strings.Join(rows, "")) // Nothing can go wrong in memory.
	_ = aligned.Flush()
	text.WriteString("\nOverlaps are of leases that Redis lost by a fault which loses data. The slowest recovery is the longest time for which a lock\n" +
		"was free, Redis was there, and a Go waiter did not get it; " + patience.String() + " are allowed.\n")
	found := "no violation"
	switch {
	case all.violations > 0:
		found = fmt.Sprintf("%d VIOLATIONS", all.violations)
	case failed:
		found = "FAILED, see above; no violation"
	}
	return text.String() + fmt.Sprintf("verdict: %s in %d runs, %d operations%s\n", found, all.runs, all.operations, remark)
}

func (r *row) text(name string) string {
	return fmt.Sprintf("%s\t%d\t%d\t%d\t%d\t%d\t%.2f s\t\n",
		name, r.runs, r.operations, r.unknowns, r.overlaps, r.violations, r.stall.Seconds())
}
