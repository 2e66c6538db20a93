// Command fencedredis shows how a hash in Redis refuses a write that comes too late. A holder of the lock is stuck. An operator takes it
// for dead and ends its lease, another takes the lock and writes, and then the first goes on and writes as well. The hash remembers the
// highest index under which it was written, and a script refuses a lower one.
package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/examples/internal/demo"
)

// saveScript writes a value, unless a later lease has written one.
//
// KEYS[1] is the hash, ARGV[1] the index of the writer's lease, ARGV[2] the value. The reply is the highest index that has written: the
// writer's own if the value was written.
//
// Lua's numbers are exact up to 2^53, and an index is less. It is stored as the text that came, because Lua would round a number that
// it makes into text.
var saveScript = redis.NewScript(`
local fence = redis.call("HGET", KEYS[1], "fence")
if fence and tonumber(fence) > tonumber(ARGV[1]) then
  return fence
end
redis.call("HSET", KEYS[1], "value", ARGV[2], "fence", ARGV[1])
return ARGV[1]
`)

var errStale = errors.New("written under a later lease already")

func main() { demo.Main("fencedredis", run) }

func run(ctx context.Context, run *demo.Run) (err error) {
	// Each stands for a process.
	stuck, err := redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("stuck"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stuck.Close()) }()
	other, err := redfour.Open(run.URL, redfour.WithNamespace(run.Namespace), redfour.WithOwner("other"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, other.Close()) }()
	token := run.Namespace + "/token:42" // the hash, and not the key of the lock
	defer run.Remove(ctx, token)

	lease, err := stuck.Acquire(ctx, "token:42", 1500*time.Millisecond)
	if err != nil {
		return err
	}
	kept, stop := stuck.KeepAlive(ctx, lease)
	defer stop()
	run.Say("stuck", "got index %d, and gets stuck in a call that takes no context", lease.Index)

	status, err := other.Inspect(ctx, "token:42")
	if err != nil {
		return err
	}
	if !status.Held { // Its index would be 0, by which ForceRelease ends whichever lease there is.
		return errors.New("nobody holds the lock")
	}
	// The operator ends the lease that was seen, and not one that came after it.
	if err := other.ForceRelease(ctx, "token:42", status.Index); err != nil {
		return err
	}
	run.Say("operator", "ended the lease of %q", status.Owner)

	err = other.WithLock(ctx, "token:42", 10*time.Second, func(ctx context.Context, lease *redfour.Lease) error {
		run.Say("other", "got index %d", lease.Index)
		if err := save(ctx, run.Client(), token, "new", lease.Index); err != nil {
			return err
		}
		run.Say("other", "wrote")
		return nil
	})
	if err != nil {
		return err
	}

	// It is told by the next renewal, so even kept has not ended yet. Who is stuck does not look at it anyway.
	err = save(ctx, run.Client(), token, "old", lease.Index)
	run.Say("stuck", "goes on, and writes: %v", err)
	if !errors.Is(err, errStale) {
		return errors.Join(errors.New("a late write was not refused"), err)
	}
	<-kept.Done()
	if err := context.Cause(kept); !errors.Is(err, redfour.ErrNotHeld) {
		return err
	}
	run.Say("stuck", "is told by a renewal: %v", context.Cause(kept))

	value, err := run.Client().HGet(ctx, token, "value").Result()
	if err != nil {
		return err
	}
	if value != "new" {
		return fmt.Errorf("the token is %q", value)
	}
	fmt.Println("\nThe late write changed nothing.")
	return nil
}

// save writes a token, under the lease with the given index. It returns errStale if a later lease has written it already.
func save(ctx context.Context, client *redis.Client, key, value string, index int64) error {
	fence, err := saveScript.Run(ctx, client, []string{key}, index, value).Int64()
	if err != nil {
		return err
	}
	if fence != index {
		return fmt.Errorf("%w: index %d, not %d", errStale, fence, index)
	}
	return nil
}
