// Command tokenrefresh shows what redfour is for. The workers of several services share an access token and find it expired all at
// once. One of them refreshes it; the others wait, and find it fresh.
//
// It runs on a Redis inside the process, or on the server that the environment variable REDIS_URL names.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

const (
	workers = 4 // of each service

	// lockTTL is for how long the lock outlives a process that dies in the section. A section may take longer: WithLock renews the lease.
	lockTTL = 5 * time.Second
)

var services = []string{"billing", "search", "mail"}

func main() { demo.Main("tokenrefresh", run) }

func run(ctx context.Context, run *demo.Run) error {
	tokens := &tokenStore{expires: time.Now()}
	log := &timeline{run: run}
	run.Say("all", "%d services of %d workers find the access token expired", len(services), workers)

	var running sync.WaitGroup
	errs := make([]error, len(services))
	for i, name := range services {
		running.Go(func() {
			s := service{name: name, tokens: tokens, log: log}
			errs[i] = s.run(ctx, run)
		})
	}
	running.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return summarize(log, tokens)
}

// A service stands for one process of a fleet: its Lock is its own.
type service struct {
	name   string
	lock   *redfour.Lock
	tokens *tokenStore
	log    *timeline
}

func (s *service) run(ctx context.Context, run *demo.Run) (err error) {
	s.lock, err = redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner(s.name))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.lock.Close()) }()

	var running sync.WaitGroup
	errs := make([]error, workers)
	for i := range workers {
		running.Go(func() { errs[i] = s.work(ctx, fmt.Sprintf("%s/%d", s.name, i+1)) })
	}
	running.Wait()
	return errors.Join(errs...)
}

// work makes sure that there is a fresh token, as a worker does before it calls an API with it.
func (s *service) work(ctx context.Context, worker string) error {
	if s.tokens.fresh() {
		s.log.add(worker, "found it fresh, and needed no lock")
		return nil
	}
	asked := time.Now()
	return s.lock.WithLock(ctx, "access-token", lockTTL, func(ctx context.Context, lease *redfour.Lease) error {
		entry := fmt.Sprintf("waited %3d ms, got index %d: ", time.Since(asked).Milliseconds(), lease.Index)
		if err := s.log.enter(lease.Index); err != nil {
			return err
		}
		// Look again: whoever had the lock before may have done the work.
		if s.tokens.fresh() {
			s.log.add(worker, entry+"found it fresh")
			return nil
		}
		s.log.add(worker, entry+"refreshes it …")
		token, err := requestToken(ctx)
		if err != nil {
			return err
		}
		if err := s.tokens.save(token, lease.Index); err != nil {
			return err
		}
		s.log.add(worker, "refreshed it")
		return nil
	})
}

// requestToken stands for the slow request that must not be made twice. Its ctx ends when the lease is lost, too.
func requestToken(ctx context.Context) (string, error) {
	select {
	case <-time.After(150 * time.Millisecond):
		return rand.Text(), nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// A tokenStore stands for the database with the token.
type tokenStore struct {
	mu      sync.Mutex // guards what follows
	token   string
	expires time.Time
	index   int64 // of the lease under which the token was saved
	saved   int   // how often
}

func (s *tokenStore) fresh() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.expires)
}

// save refuses a lease that is older than that of the last save. A worker that is frozen while it holds the lock loses it without
// knowing; this keeps it from overwriting what its successor saved.
func (s *tokenStore) save(token string, index int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if index < s.index {
		return fmt.Errorf("index %d is older than %d, of the last save", index, s.index)
	}
	s.token, s.index, s.expires = token, index, time.Now().Add(time.Hour)
	s.saved++
	return nil
}

// A timeline prints what happens, and in which order the workers had the lock.
type timeline struct {
	run *demo.Run

	mu      sync.Mutex // guards what follows
	entered int        // how many workers had the lock
	index   int64      // of the last of them
}

func (t *timeline) add(worker, what string) {
	t.run.Say(worker, "%s", what)
}

// enter checks that who comes later has the greater index.
func (t *timeline) enter(index int64) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if index <= t.index {
		return fmt.Errorf("index %d came after index %d", index, t.index)
	}
	t.index = index
	t.entered++
	return nil
}

func summarize(log *timeline, tokens *tokenStore) error {
	if tokens.saved != 1 {
		return fmt.Errorf("%d refreshes, want 1", tokens.saved)
	}
	fmt.Printf("\n1 refresh. %d workers held the lock, each with a greater index than the one before.\n", log.entered)
	return nil
}
