package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"time"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

// leaseTTL is for how long a job may stand in the queue: minutes, perhaps, where nobody watches the program run. The work may take
// longer, because the worker renews the lease.
const leaseTTL = 900 * time.Millisecond

// A handler takes orders for reports.
type handler struct {
	run  *demo.Run
	lock *redfour.Lock

	// What is sent here ends leases, so nobody but the workers may read it. And nobody must get it twice: two workers with the same
	// lease would not exclude each other.
	queue chan<- []byte
}

func (h *handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	lease, err := h.lock.Acquire(r.Context(), "report:"+r.PathValue("id"), leaseTTL)
	if held, ok := errors.AsType[*redfour.LockedError](err); ok {
		h.run.Say("web-1", "finds it ordered already, from %s", held.Owner) // The owner is for the operator, and not for strangers.
		http.Error(w, "ordered already", http.StatusConflict)
		return
	}
	if err != nil {
		http.Error(w, "the lock cannot be reached", http.StatusServiceUnavailable)
		return
	}
	if err := h.handOff(lease); err != nil {
		h.run.Say("web-1", "releases what it could not hand over: %v", err)
		// Release goes on when the client has hung up, and the request's context has ended. If the message has got through all the
		// same, the worker finds the lease ended.
		if err := h.lock.Release(r.Context(), lease); err != nil {
			h.run.Say("web-1", "%v", err)
		}
		http.Error(w, "try again later", http.StatusServiceUnavailable)
		return
	}
	// From here on the lease is the worker's. Nothing may go on under the request's context, which ends now: no KeepAlive either.
	w.WriteHeader(http.StatusAccepted)
}

func (h *handler) handOff(lease *redfour.Lease) error {
	message, err := json.Marshal(lease)
	if err != nil {
		return err
	}
	select {
	case h.queue <- message:
		return nil
	default:
		return errors.New("the queue is full")
	}
}

// A worker makes reports.
type worker struct {
	run    *demo.Run
	lock   *redfour.Lock
	finish chan struct{} // closed when a report may be finished
}

// work makes the report for which a message hands the lease over.
func (w *worker) work(ctx context.Context, message []byte) error {
	var lease redfour.Lease
	if err := json.Unmarshal(message, &lease); err != nil {
		return err
	}
	// The lease may have run out in the queue, and another be at work on a later order. If the error matches ErrNotHeld the message is
	// of no use any more; after another it may be tried again.
	if err := w.lock.Renew(ctx, &lease, lease.TTL); err != nil {
		return err
	}
	w.run.Say("worker-1", "makes %s, with index %d", lease.ID, lease.Index)
	kept, stop := w.lock.KeepAlive(ctx, &lease)
	defer stop()
	err := w.makeReport(kept)
	// Not with kept, which has ended if the lease was lost. If the error matches ErrNotHeld, another may have made the report at the
	// same time.
	err = errors.Join(err, w.lock.Release(ctx, &lease))
	if err == nil {
		w.run.Say("worker-1", "made %s, and released", lease.ID)
	}
	return err
}

// makeReport stands for the work. Its ctx ends when the lease is lost, too.
func (w *worker) makeReport(ctx context.Context) error {
	select {
	case <-w.finish:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
