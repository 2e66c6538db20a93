package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// A worker is the inside of a worker process.
type worker struct {
	task   task
	clock  clock
	locker locker

	stopped atomic.Bool // what ends from now on does not count

	waiters []*waiter
}

// A waiter is one goroutine of a worker.
type waiter struct {
	n        int64
	id       string
	holders  atomic.Int32 // who thinks to hold an id that nobody else wants
	ended    int64        // sections before the stop
	sections []section
	err      error

	// Of sections and releases, which are finished. It has a deadline, because a library that sees none may make one.
	steady context.Context //nolint:containedctx // As long-lived as the waiter; see contexts.
	// Of waits, which end when the work does.
	waiting context.Context //nolint:containedctx // The same.

	end func() // of both

	_ [64]byte // another's counter shares no cache line with this one
}

// runWorker does the task that comes first in its input, with one of the libraries that find knows, and prints what it did.
func runWorker(ctx context.Context, in io.Reader, out io.Writer, find func(name string) (entry, bool)) error {
	lines := bufio.NewScanner(in)
	if !lines.Scan() {
		return errors.New("no task")
	}
	var t task
	if err := json.Unmarshal(lines.Bytes(), &t); err != nil {
		return fmt.Errorf("task: %w", err)
	}
	e, ok := find(t.Library)
	if !ok || e.open == nil {
		return fmt.Errorf("no Go library %q", t.Library)
	}
	w, err := newWorker(t, e)
	if err != nil {
		return err
	}
	defer w.locker.close()
	return w.run(ctx, lines, json.NewEncoder(out))
}

func newWorker(t task, e entry) (*worker, error) {
	c, err := newClock()
	if err != nil {
		return nil, err
	}
	w := &worker{task: t, clock: c}
	s := setting{place: t.place, ttl: time.Duration(t.TTLMS) * time.Millisecond, poll: ms(t.PollMS)}
	if w.locker, err = e.open(s); err != nil {
		return nil, err
	}
	for n := range t.Waiters {
		id := idOf(n%max(t.IDs, 1), t.IDs)
		if t.Workload == Cycles {
			id = fmt.Sprintf("p%d-%d", t.Process, n)
		}
		w.waiters = append(w.waiters, &waiter{n: int64(n), id: id})
	}
	return w, nil
}

// idOf names one of the ids that waiters share.
func idOf(n, of int) string {
	if of <= 1 {
		return "contended"
	}
	return fmt.Sprintf("contended-%d", n)
}

func ms(n float64) time.Duration { return time.Duration(n * float64(time.Millisecond)) }

// run warms up, works from "go" to "stop", and reports.
func (w *worker) run(ctx context.Context, lines *bufio.Scanner, out *json.Encoder) error {
	if err := w.warm(ctx); err != nil {
		return fmt.Errorf("warm-up: %w", err)
	}
	stop, end := w.contexts(ctx)
	defer end()
	before := memory()           // the contexts are the callers' own, and count before
	begin := make(chan struct{}) // closed for all to begin
	var all sync.WaitGroup
	for _, one := range w.waiters {
		if w.task.Workload == Idle {
			all.Go(func() { w.idle(one) })
			continue
		}
		all.Go(func() {
			<-begin
			one.err = w.work(one)
		})
	}
	if w.task.Workload == Idle {
		pause(ms(w.task.SettleMS)) // with their first attempts
	}
	if err := out.Encode(ready{Ready: true}); err != nil {
		return err
	}

	awaitLine(lines, "go")
	used := cpu()
	close(begin)
	awaitLine(lines, "stop")
	w.stopped.Store(true)
	r := report{CPU: cpu() - used}
	if w.task.Workload == Idle {
		r.HeapStack = memory() - before
	}
	stop()
	all.Wait()
	return w.report(r, out)
}

// contexts gives each waiter its own, as a server gives each request. The first function ends the waits, the other all.
func (w *worker) contexts(ctx context.Context) (stop, end func()) {
	waiting, cancel := context.WithCancel(ctx)
	for _, one := range w.waiters {
		one.begin(context.WithoutCancel(ctx), waiting)
	}
	return cancel, func() {
		cancel()
		for _, one := range w.waiters {
			one.end()
		}
	}
}

func (w *waiter) begin(steady, waiting context.Context) {
	var endSteady, endWaiting context.CancelFunc
	w.steady, endSteady = context.WithTimeout(steady, forever)
	w.waiting, endWaiting = context.WithTimeout(waiting, forever)
	w.end = func() {
		endSteady()
		endWaiting()
	}
}

// awaitLine returns when a line has come, or the input has ended.
func awaitLine(lines *bufio.Scanner, line string) {
	for lines.Scan() {
		if strings.TrimSpace(lines.Text()) == line {
			return
		}
	}
}

// report adds to a report what all waiters did.
func (w *worker) report(r report, out *json.Encoder) error {
	r.Resident = resident()
	var sections []section
	for _, one := range w.waiters {
		r.PerWaiter = append(r.PerWaiter, one.ended)
		r.Sections += one.ended
		sections = append(sections, one.sections...)
		if one.err != nil {
			r.Errors++
			if r.Error == "" {
				r.Error = one.err.Error()
			}
		}
	}
	if w.task.Workload == Contend || w.task.Workload == Handover {
		if err := writeSections(w.task.SectionsFile, sections); err != nil {
			return err
		}
	}
	return out.Encode(r)
}

// warm goes through some sections that nobody else wants, so that connections are made and scripts are known
// before the clock runs.
func (w *worker) warm(ctx context.Context) error {
	goroutines, length := w.task.Waiters, warmTime
	if w.task.Workload == Idle {
		// Goroutines that have ended leave memory behind, which the waiters would have for nothing.
		goroutines, length = min(goroutines, 64), 0
	}
	errs := make([]error, goroutines)
	until := time.Now().Add(length)
	var all sync.WaitGroup
	for n := range goroutines {
		all.Go(func() {
			for i := 0; errs[n] == nil && (i < 3 || time.Now().Before(until)); i++ {
				var release release
				// In a cluster such ids are on all masters, in all likelihood.
				id := fmt.Sprintf("warm-%d-%d-%d", w.task.Process, n, i%16)
				if release, errs[n] = w.locker.acquire(ctx, id); errs[n] == nil {
					errs[n] = release(ctx)
				}
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			return err // One tells as much as all.
		}
	}
	return nil
}

const warmTime = 200 * time.Millisecond

// work is what one waiter does until the stop.
func (w *worker) work(one *waiter) error {
	for !w.stopped.Load() {
		var err error
		switch w.task.Workload {
		case Cycles:
			err = w.cycle(one)
		case Contend:
			err = w.section(one, time.Duration(w.task.SectionUS)*time.Microsecond)
		case Handover:
			least, most := ms(w.task.HoldMS[0]), ms(w.task.HoldMS[1])
			if err = w.section(one, least+rand.N(most-least+1)); err == nil {
				pause(ms(w.task.PauseMS))
			}
		}
		if errors.Is(err, errCutShort) {
			return nil
		}
		if err != nil {
			return err
		}
		if !w.stopped.Load() {
			one.ended++
		}
	}
	return nil
}

// cycle takes and releases a lock that nobody else wants.
func (w *worker) cycle(one *waiter) error {
	release, err := w.locker.acquire(one.steady, one.id)
	if err != nil {
		return err
	}
	if one.holders.Add(1) != 1 {
		return errors.New("mutual exclusion was violated: two hold " + one.id)
	}
	one.holders.Add(-1)
	return release(one.steady)
}

// errCutShort says that the end came before the lock.
var errCutShort = errors.New("cut short")

// section waits for a lock, holds it, and releases it.
func (w *worker) section(one *waiter, hold time.Duration) error {
	s := section{waiter: one.n, wanted: w.clock.now()}
	release, err := w.locker.wait(one.waiting, one.id)
	if err != nil && one.waiting.Err() != nil {
		one.sections = append(one.sections, s)
		return errCutShort
	}
	if err != nil {
		return err
	}
	s.held = w.clock.now()
	if hold > 0 {
		pause(hold)
	}
	s.released = w.clock.now()
	one.sections = append(one.sections, s)
	return release(one.steady)
}

// idle waits for a lock that nobody releases. It has as little on its stack as it can, because that is measured.
func (w *worker) idle(one *waiter) {
	_, err := w.locker.wait(one.waiting, one.id)
	if !w.stopped.Load() {
		one.err = early(err)
	}
}

func early(err error) error {
	if err == nil {
		return errors.New("a waiter was let in")
	}
	return err
}

// pause is what a section does, or a waiter between sections.
func pause(d time.Duration) {
	<-time.After(d)
}

// cpu returns the CPU time of this process so far, in s.
func cpu() float64 {
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		return 0
	}
	return time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
}

// memory returns the bytes of heap and stacks that are in use after a collection. The room between objects does not count: it
// depends on what was there before.
func memory() float64 {
	for range 3 { // The first shrinks stacks, and others free what finalizers held.
		runtime.GC()
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return float64(m.HeapAlloc + m.StackInuse)
}

// resident returns the bytes of memory that this process occupies, or 0 where nobody knows.
func resident() float64 {
	text, err := os.ReadFile("/proc/self/statm")
	var size, pages float64
	if err != nil {
		return 0
	}
	if _, err := fmt.Sscan(string(text), &size, &pages); err != nil {
		return 0
	}
	return pages * float64(os.Getpagesize())
}
