// Command bench measures this library and others beside each other, and writes what it found as tables and charts.
//
// Everything runs on this machine: for each figure a redis-server of its own, or a cluster that was emptied, and worker processes that
// use one library. The repetitions of all libraries take turns, so that what disturbs the machine for a while disturbs all.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9/logging"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var o options
	flag.BoolVar(&o.quick, "quick", false, "take less than 3 minutes: fewer cells and repetitions, and shorter ones")
	flag.IntVar(&o.reps, "reps", 3, "repetitions of each cell; three times as many for one goroutine alone")
	only := flag.String("only", "", "only the workloads whose `name` matches: cycles, handover, contend, idle, network cycles, cluster cycles, …")
	flag.StringVar(&o.out, "out", "", "the `directory` for tables and charts (default results, or quick for less than a full run)")
	render := flag.Bool("render", false, "measure nothing: make tables and charts from results.json again")
	worker := flag.Bool("worker", false, "be a worker process, for a parent that says what to do")
	flag.Parse()

	if *worker {
		logging.Disable() // go-redis reports every connection that a full backlog delays
		return runWorker(ctx, os.Stdin, os.Stdout, entryOf)
	}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if flag.NArg() > 0 || o.reps < 1 {
		return errors.New("there are flags only, and at least one repetition")
	}
	if o.out == "" {
		o.out = "results"
		if o.quick || *only != "" {
			o.out = "quick" // what is checked in is of a full run
		}
	}
	if *render {
		results, err := readResults(o.out)
		if err != nil {
			return err
		}
		return writeReport(o.out, results)
	}
	return o.measure(ctx)
}

// options are what the command line says.
type options struct {
	quick bool
	reps  int
	only  *regexp.Regexp
	out   string
}

// measure runs everything, and writes what it found.
func (o options) measure(ctx context.Context) error {
	began := time.Now()
	c, err := newClock()
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "redfour-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // What is left behind is small.
	r := &runner{clock: c, self: self, dir: dir}
	defer r.close()

	results := Results{Date: began.UTC().Truncate(time.Second), Command: o.command(), Quick: o.quick, Machine: machine(ctx)}
	if results.NetworkMS, err = measureNetwork(ctx); err != nil {
		return err
	}
	libraries := lineup()
	absent := make(map[string]error)
	for i := range libraries {
		e := &libraries[i]
		if e.Version, err = e.version(); err != nil {
			absent[e.Name] = err
		}
		results.Libraries = append(results.Libraries, e.Library)
	}
	for _, p := range o.plan() {
		cells := o.cells(ctx, r, p, libraries, absent)
		if err := ctx.Err(); err != nil {
			return err
		}
		results.Cells = append(results.Cells, cells...)
		if err := printCells(os.Stdout, p.load, cells); err != nil {
			return err
		}
	}
	results.Took = time.Since(began).Seconds()
	return errors.Join(o.write(results), failures(results))
}

// failures says which cells have runs that failed, because an exit status of 0 would hide them.
func failures(results Results) error {
	var errs []error
	for _, c := range results.Cells {
		for _, r := range c.Runs {
			if r.Failed != "" {
				errs = append(errs, fmt.Errorf("%v: %s: %s", c.Load, c.Library, r.Failed))
			}
		}
	}
	return errors.Join(errs...)
}

// command is the command line that repeats the run.
func (o options) command() string {
	command := "go run ."
	if o.quick {
		command += " -quick"
	}
	if o.reps != 3 {
		command += fmt.Sprintf(" -reps %d", o.reps)
	}
	if o.only.String() != "" {
		command += fmt.Sprintf(" -only %q", o.only)
	}
	return command
}

// cells measures all libraries under one load, in turns.
func (o options) cells(ctx context.Context, r *runner, p part, libraries []entry, absent map[string]error) []Cell {
	var cells []Cell
	var turn []int // into libraries and cells
	for _, e := range libraries {
		if !e.takesPart(p.load) {
			continue
		}
		cell := Cell{Load: p.load, Library: e.Name}
		if err := absent[e.Name]; err != nil {
			cell.Skipped = err.Error()
		} else {
			turn = append(turn, len(cells))
		}
		cells = append(cells, cell)
	}
	for range p.reps {
		for _, i := range turn {
			e, _ := entryOf(cells[i].Library)
			run := r.run(ctx, p.load, e, p.length)
			if ctx.Err() != nil {
				return cells
			}
			cells[i].Runs = append(cells[i].Runs, run)
		}
		// Who was first comes last, so that nobody always runs behind the same one.
		if len(turn) > 0 {
			turn = append(turn[1:], turn[0])
		}
	}
	return cells
}

// write writes the raw figures first, so that a report that cannot be made loses nothing.
func (o options) write(results Results) error {
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	text, err := json.MarshalIndent(results, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(o.out, resultsFile), append(text, '\n'), 0o644); err != nil {
		return err
	}
	if err := writeReport(o.out, results); err != nil {
		return err
	}
	_, err = fmt.Printf("\nThe results are in %s.\n", filepath.Join(o.out, reportFile))
	return err
}

const resultsFile = "results.json"

func readResults(dir string) (Results, error) {
	var results Results
	text, err := os.ReadFile(filepath.Join(dir, resultsFile))
	if err != nil {
		return results, err
	}
	return results, json.Unmarshal(text, &results)
}

// measureNetwork returns what a round trip over the emulated network takes, in ms.
func measureNetwork(ctx context.Context) (float64, error) {
	s, err := startServer(ctx)
	if err != nil {
		return 0, err
	}
	defer s.stop()
	n, err := startNetwork(s.addr, networkMS)
	if err != nil {
		return 0, err
	}
	defer n.stop()
	return n.roundTrip(ctx)
}
