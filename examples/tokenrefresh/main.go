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
	"os"
	"os/signal"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
)

const (
	workers = 4 // of each service

	// lockTTL is for how long the lock outlives a process that dies in the section. A section may take longer: WithLock renews the lease.
	lockTTL = 5 * time.Second
)

var services = []string{"billing", "search", "mail"}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "tokenrefresh:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	options, stop, err := findRedis()
	if err != nil {
		return err
	}
	defer stop()
	client := redis.NewClient(options)
	defer func() { _ = client.Close() }()
	// Not needed for the lock, which would wait for the server to come up.
	if err := client.Ping(ctx).Err(); err != nil {
		return err
	}
	// A namespace of its own keeps this run apart from everything else on the server.
	namespace := "tokenrefresh-" + rand.Text()
	defer cleanUp(ctx, client, namespace)

	tokens := &tokenStore{expires: time.Now()}
	log := &timeline{start: time.Now()}
	fmt.Printf("%d services of %d workers find the access token expired.\n\n", len(services), workers)

	var running sync.WaitGroup
	errs := make([]error, len(services))
	for i, name := range services {
		running.Go(func() {
			s := service{name: name, tokens: tokens, log: log}
			errs[i] = s.run(ctx, options, namespace)
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

// findRedis returns how to reach Redis, and a function to call when it is no longer needed.
func findRedis() (*redis.Options, func(), error) {
	if url := os.Getenv("REDIS_URL"); url != "" {
		options, err := redis.ParseURL(url)
		if err != nil {
			return nil, nil, errors.New("REDIS_URL is not the URL of a Redis") // The cause might show a password.
		}
		fmt.Printf("Redis: the server at %s, from REDIS_URL\n", options.Addr)
		return options, func() {}, nil
	}
	server, err := miniredis.Run()
	if err != nil {
		return nil, nil, err
	}
	fmt.Println("Redis: miniredis, inside this process; REDIS_URL=redis://host:6379 takes a server instead")
	return &redis.Options{Addr: server.Addr()}, server.Close, nil
}

// cleanUp removes the counter of indexes, the one key that stays behind when all locks have been released.
func cleanUp(ctx context.Context, client *redis.Client, namespace string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := client.Del(ctx, namespace+"index").Err(); err != nil {
		fmt.Fprintf(os.Stderr, "tokenrefresh: the key %sindex may be left: %v\n", namespace, err)
	}
}

// A service stands for one process of a fleet: its client and its Lock are its own.
type service struct {
	name   string
	lock   *redfour.Lock
	tokens *tokenStore
	log    *timeline
}

func (s *service) run(ctx context.Context, options *redis.Options, namespace string) (err error) {
	client := redis.NewClient(options)
	defer func() { err = errors.Join(err, client.Close()) }()
	s.lock, err = redfour.New(client, redfour.WithNamespace(namespace))
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

// A timeline prints what happens, and when.
type timeline struct {
	start time.Time

	mu      sync.Mutex // guards what follows
	entered int        // how many workers had the lock
	index   int64      // of the last of them
}

func (t *timeline) add(worker, what string) {
	fmt.Printf("%4d ms  %-9s  %s\n", time.Since(t.start).Milliseconds(), worker, what)
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
