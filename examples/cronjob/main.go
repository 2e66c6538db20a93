// Command cronjob runs a job once in the fleet, although every host's cron starts it.
//
// Whoever is first takes a lease, named after the job and the time for which it was scheduled, and the others find that it is done
// elsewhere. Clocks differ, so the lease outlives the job: it is not released, and runs out.
package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

const (
	// period is from one run of the job to the next.
	period = 400 * time.Millisecond

	// leaseTTL is longer than the hosts' clocks differ: by 0.2 s here, for which a minute would do in a fleet. It may be longer than the
	// period, because each run has a lease of its own.
	leaseTTL = 1500 * time.Millisecond
)

// clocks says by how much the clock of each host is ahead of the time.
var clocks = map[string]time.Duration{
	"host-a": 80 * time.Millisecond,
	"host-b": 0,
	"host-c": -120 * time.Millisecond,
}

func main() { demo.Main("cronjob", run) }

func run(ctx context.Context, run *demo.Run) error {
	first := time.Now().Add(200 * time.Millisecond).Truncate(time.Millisecond)
	schedule := []time.Time{first, first.Add(period), first.Add(2 * period)}
	reports := &reportStore{made: make(map[time.Time]int)}

	var running sync.WaitGroup
	errs := make(chan error, len(clocks)) // one from each host
	for name, ahead := range clocks {
		running.Go(func() {
			h := &host{name: name, ahead: ahead, run: run, reports: reports}
			errs <- h.cron(ctx, schedule)
		})
	}
	running.Wait()
	for range clocks {
		if err := <-errs; err != nil {
			return err
		}
	}
	for _, due := range schedule {
		if n := reports.made[due]; n != 1 {
			return fmt.Errorf("the report of %v was made %d times", due, n)
		}
	}
	fmt.Printf("\n%d hosts, %d reports, each made once.\n", len(clocks), len(reports.made))
	return nil
}

// A host stands for one machine of the fleet: its clock and its Lock are its own.
type host struct {
	name    string
	ahead   time.Duration
	run     *demo.Run
	reports *reportStore
}

// cron starts the job whenever the host's clock shows that it is due.
func (h *host) cron(ctx context.Context, schedule []time.Time) (err error) {
	lock, err := redfour.Open(h.run.URL, redfour.WithNamespace(h.run.Namespace), redfour.WithOwner(h.name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	for _, due := range schedule {
		select {
		case <-time.After(time.Until(due) - h.ahead):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := h.job(ctx, lock, due); err != nil {
			return err
		}
	}
	return nil
}

// job makes the report that was due, if no other host does or has.
func (h *host) job(ctx context.Context, lock *redfour.Lock, due time.Time) error {
	// The time for which it was scheduled is the same on all hosts, and the time now is not.
	id := "report:" + due.UTC().Format(time.RFC3339Nano)
	lease, err := lock.Acquire(ctx, id, leaseTTL)
	if locked, ok := errors.AsType[*redfour.LockedError](err); ok {
		h.run.Say(h.name, "done elsewhere: %s has the lease for another %d ms", locked.Owner, locked.TTL.Milliseconds())
		return nil
	}
	if err != nil {
		// Redis did not answer. That is not "done elsewhere": perhaps nobody makes the report, and somebody must hear of it.
		return err
	}
	// The lease is not released: a host whose clock is behind comes when the report has long been made, and must still find the lease.
	// So a host that dies in the job leaves it undone. If it had better be done twice than not at all, release after a failure.
	// Nor is it renewed, and each run has a lease of its own: a job that takes longer than the period overlaps with the next.
	h.run.Say(h.name, "makes the report, as number %d", lease.Index)
	if err := h.reports.add(ctx, due); err != nil {
		return err
	}
	h.run.Say(h.name, "made it; the lease runs out in %d ms", lease.Remaining().Milliseconds())
	return nil
}

// A reportStore stands for what the job does.
type reportStore struct {
	mu   sync.Mutex // guards what follows
	made map[time.Time]int
}

func (s *reportStore) add(ctx context.Context, due time.Time) error {
	select {
	case <-time.After(20 * time.Millisecond):
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.made[due]++
	return nil
}
