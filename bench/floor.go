package main

import (
	"context"
	"crypto/rand"
	"errors"
	"time"

	"github.com/redis/go-redis/v9"
)

// A floor is the least that a lock with a token can cost: SET NX PX, and a script that deletes what is
// still the caller's. It cannot wait, and promises less than any library.
type floor struct {
	client   redis.UniversalClient
	commands redis.Cmdable // the client, or what puts its commands into pipelines
	ttl      time.Duration
}

var compareAndDelete = redis.NewScript(`
if redis.call("GET", KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call("DEL", KEYS[1])
`)

func openFloor(s setting) (locker, error) {
	client := newClient(s)
	return &floor{client: client, commands: client, ttl: s.ttl}, nil
}

func openPipelinedFloor(s setting) (locker, error) {
	client := newClient(s)
	pipeliner, err := client.AutoPipeline()
	if err != nil {
		return nil, err
	}
	return &floor{client: client, commands: pipeliner, ttl: s.ttl}, nil
}

func (f *floor) acquire(ctx context.Context, id string) (release, error) {
	token := rand.Text()
	err := f.commands.SetArgs(ctx, id, token, redis.SetArgs{Mode: "NX", TTL: f.ttl}).Err()
	if errors.Is(err, redis.Nil) {
		err = errors.New("held")
	}
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		n, err := compareAndDelete.Run(ctx, f.commands, []string{id}, token).Int()
		if err == nil && n != 1 {
			err = errors.New("not held")
		}
		return err
	}, nil
}

func (f *floor) wait(context.Context, string) (release, error) {
	return nil, errors.ErrUnsupported
}

func (f *floor) close() { _ = f.client.Close() } // The process ends anyway.
