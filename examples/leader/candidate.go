package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/redfour-go/redfour"
)

// leaderTTL is for how long nobody leads after a leader has died: seconds, where nobody watches the program run. It leads for as long as it likes: WithLock renews the lease.
const leaderTTL = 900 * time.Millisecond

// stand is a candidate: it leads whenever it is elected, until it is asked to resign.
func stand(ctx context.Context, name, namespace string) (err error) {
	lock, err := redfour.Open(os.Getenv("REDIS_URL"), redfour.WithNamespace(namespace), redfour.WithOwner(name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	ctx, resign := context.WithCancel(ctx)
	defer resign()
	go func() { // It may read for as long as the process lives.
		_, _ = io.Copy(io.Discard, os.Stdin)
		resign()
	}()
	for {
		err := lock.WithLock(ctx, "leader", leaderTTL, lead)
		switch {
		case ctx.Err() != nil:
			return nil // It has resigned. If its release did not reach Redis, the lease runs out.
		case errors.Is(err, redfour.ErrNotHeld):
			continue // It has lost the lead, because Redis could not be reached for example, and stands again.
		case err != nil:
			return err
		}
	}
}

// lead does the leader's work until ctx ends: because the candidate resigns, or has lost the lead.
func lead(ctx context.Context, lease *redfour.Lease) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for n := 1; ; n++ {
		fmt.Printf(workFormat, lease.Index, n)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// workFormat is how a leader tells the others of its work: the term, and how often it has worked in it.
const workFormat = "term %d, work %d\n"
