package redfour_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
)

// exampleLock stands for a Lock on your server.
func exampleLock(opts ...redfour.Option) (*redfour.Lock, func()) {
	server, err := miniredis.Run()
	if err != nil {
		log.Fatal(err)
	}
	client := redis.NewClient(&redis.Options{Addr: server.Addr()})
	lock, err := redfour.New(client, opts...)
	if err != nil {
		log.Fatal(err)
	}
	return lock, func() {
		_ = lock.Close()
		_ = client.Close()
		server.Close()
	}
}

func Example() {
	server, err := miniredis.Run() // use your own server instead
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	lock, err := redfour.Open("redis://" + server.Addr())
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = lock.Close() }()

	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = lock.WithLock(ctx, "token:42", 10*time.Second, func(context.Context, *redfour.Lease) error {
		fmt.Println("one process at a time")
		return nil
	})
	fmt.Println(err)
	// Output:
	// one process at a time
	// <nil>
}

func ExampleLock_Acquire() {
	lock, done := exampleLock()
	defer done()
	ctx := context.Background()

	lease, err := lock.Acquire(ctx, "report", time.Minute)
	fmt.Println(lease.ID, lease.TTL, err)

	_, err = lock.Acquire(ctx, "report", time.Minute)
	if locked, ok := errors.AsType[*redfour.LockedError](err); ok {
		fmt.Println("somebody else has it:", locked.Index == lease.Index)
	}

	fmt.Println(lock.Release(ctx, lease))
	// Output:
	// report 1m0s <nil>
	// somebody else has it: true
	// <nil>
}

func ExampleLock_WaitAcquire() {
	lock, done := exampleLock()
	defer done()

	first, err := lock.Acquire(context.Background(), "report", time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { _ = lock.Release(context.Background(), first) })

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	lease, err := lock.WaitAcquire(ctx, "report", time.Minute)
	fmt.Println(err, lease.Immediate, lease.Index > first.Index)
	// Output: <nil> false true
}

// A section that is skipped when somebody else is in it.
func ExampleLock_KeepAlive() {
	lock, done := exampleLock()
	defer done()
	ctx := context.Background()

	lease, err := lock.Acquire(ctx, "report", time.Minute)
	if errors.Is(err, redfour.ErrLocked) {
		return
	}
	if err != nil {
		log.Fatal(err)
	}
	kept, stop := lock.KeepAlive(ctx, lease)
	defer stop()

	// Work with kept: it ends when the lease is lost.
	fmt.Println(kept.Err())

	// Release with ctx, because kept may have ended.
	fmt.Println(lock.Release(ctx, lease))
	<-kept.Done()
	fmt.Println(errors.Is(context.Cause(kept), redfour.ErrNotHeld))
	// Output:
	// <nil>
	// <nil>
	// true
}

// A lease is handed to another process, which ends it.
func ExampleLease_MarshalJSON() {
	lock, done := exampleLock()
	defer done()

	lease, err := lock.Acquire(context.Background(), "upload", time.Minute)
	if err != nil {
		log.Fatal(err)
	}
	job, err := json.Marshal(lease)
	if err != nil {
		log.Fatal(err)
	}

	// In the worker:
	var taken redfour.Lease
	if err := json.Unmarshal(job, &taken); err != nil {
		log.Fatal(err)
	}
	fmt.Println(lock.Renew(context.Background(), &taken, time.Minute))
	fmt.Println(lock.Release(context.Background(), &taken))
	// Output:
	// <nil>
	// <nil>
}

// Somebody who knows that the holder is gone looks, and ends the lease that he saw.
func ExampleLock_ForceRelease() {
	lock, stop := exampleLock(redfour.WithOwner("worker 7"))
	defer stop()
	ctx := context.Background()
	if _, err := lock.Acquire(ctx, "42", time.Hour); err != nil {
		log.Fatal(err)
	}

	status, err := lock.Inspect(ctx, "42")
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(status.Held, status.Owner, status.TTL > 59*time.Minute, len(status.Waiters))
	if status.Held {
		fmt.Println(lock.ForceRelease(ctx, "42", status.Index))
		fmt.Println(errors.Is(lock.ForceRelease(ctx, "42", status.Index), redfour.ErrExpired))
	}
	// Output:
	// true worker 7 true 0
	// <nil>
	// true
}

func ExampleWithTrace() {
	lock, stop := exampleLock(redfour.WithTrace(redfour.Trace{
		Acquired: func(_ context.Context, id string, began time.Time, _ *redfour.Lease, err error) {
			fmt.Println("acquired", id, time.Since(began) < time.Minute, err)
		},
		Lost: func(id string, _ int64, err error) { fmt.Println("lost", id, err) },
	}))
	defer stop()
	err := lock.WithLock(context.Background(), "42", 10*time.Second, func(context.Context, *redfour.Lease) error { return nil })
	fmt.Println(err, lock.Stats().Released)
	// Output:
	// acquired 42 true <nil>
	// <nil> 1
}
