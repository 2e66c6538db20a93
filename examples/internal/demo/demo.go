// Package demo is what the examples share: a Redis to run on, a namespace there for each run, and a clock for what they print. What has
// to do with locks stands in the examples.
package demo

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

// Main runs an example, on a Redis inside the process or on the server that the environment variable REDIS_URL names. The ctx of play
// ends when the user interrupts the program, or it takes much longer than it should. If play fails, the process ends with status 1.
func Main(name string, play func(ctx context.Context, run *Run) error) {
	Process(name, func(ctx context.Context) error {
		run, stop, err := start(ctx, name)
		if err != nil {
			return err
		}
		defer stop()
		ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it has not ended after %v", patience))
		defer cancel()
		return cmp.Or(play(ctx, run), context.Cause(ctx))
	})
}

// patience is with an example that waits for what does not happen.
const patience = 20 * time.Second

// Process is Main for a process that needs no Redis of its own, because another has told it of one.
func Process(name string, main func(ctx context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := main(ctx)
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// A Run is one run of an example.
type Run struct {
	URL       string // of the server; it may contain a password
	Namespace string // keeps this run apart from everything else on the server

	client *redis.Client
	began  time.Time
}

// start finds Redis, and returns a function that removes what the run has left there.
func start(ctx context.Context, name string) (*Run, func(), error) {
	url, stop, err := findRedis()
	if err != nil {
		return nil, nil, err
	}
	options, err := redis.ParseURL(url)
	if err != nil {
		return nil, nil, errors.New("REDIS_URL is not the URL of a Redis") // The cause might show a password.
	}
	run := &Run{URL: url, Namespace: name + "-" + rand.Text(), client: redis.NewClient(options), began: time.Now()}
	end := func() {
		_ = run.client.Close()
		stop()
	}
	// Not needed for a lock, which would wait for the server to come up.
	if err := run.client.Ping(ctx).Err(); err != nil {
		end()
		return nil, nil, err
	}
	fmt.Printf("Redis: %s\n\n", whereabouts(options))
	return run, func() {
		// The counter of indexes is the one key that stays behind when all locks have been released.
		run.Remove(ctx, run.Namespace+"index")
		end()
	}, nil
}

// findRedis returns the URL of a Redis, and a function to call when it is no longer needed.
func findRedis() (string, func(), error) {
	if url := os.Getenv("REDIS_URL"); url != "" {
		return url, func() {}, nil
	}
	server := miniredis.NewMiniRedis()
	server.ClockTTL(true) // Else no lease would ever run out.
	if err := server.Start(); err != nil {
		return "", nil, err
	}
	return "redis://" + server.Addr(), server.Close, nil
}

func whereabouts(options *redis.Options) string {
	if os.Getenv("REDIS_URL") == "" {
		return "miniredis, inside this process; REDIS_URL=redis://host:6379 takes a server instead"
	}
	return fmt.Sprintf("the server at %s, from REDIS_URL", options.Addr)
}

// Client is a client of the server, for what an example keeps there. Main closes it.
func (r *Run) Client() *redis.Client { return r.client }

// Remove deletes keys that an example has made beside its locks. It does so even when ctx has ended.
func (r *Run) Remove(ctx context.Context, keys ...string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	if err := r.client.Del(ctx, keys...).Err(); err != nil {
		fmt.Fprintf(os.Stderr, "these keys may be left: %q: %v\n", keys, err)
	}
}

// Say prints what somebody does, and when.
func (r *Run) Say(who, format string, args ...any) {
	fmt.Printf("%4d ms  %-10s  %s\n", time.Since(r.began).Milliseconds(), who, fmt.Sprintf(format, args...))
}
