package main

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
)

type redfourLocker struct {
	client redis.UniversalClient
	lock   *redfour.Lock
	ttl    time.Duration
}

func openRedfour(s setting) (locker, error) {
	client := newClient(s)
	lock, err := redfour.New(client)
	if err != nil {
		return nil, err
	}
	return &redfourLocker{client: client, lock: lock, ttl: s.ttl}, nil
}

func (l *redfourLocker) acquire(ctx context.Context, id string) (release, error) {
	return l.held(l.lock.Acquire(ctx, id, l.ttl))
}

func (l *redfourLocker) wait(ctx context.Context, id string) (release, error) {
	return l.held(l.lock.WaitAcquire(ctx, id, l.ttl))
}

func (l *redfourLocker) held(lease *redfour.Lease, err error) (release, error) {
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error { return l.lock.Release(ctx, lease) }, nil
}

func (l *redfourLocker) close() {
	_ = l.lock.Close() // The process ends anyway.
	_ = l.client.Close()
}
