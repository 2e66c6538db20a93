package main

import (
	"context"
	"time"

	"github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"
)

type redislockLocker struct {
	client redis.UniversalClient
	locks  *redislock.Client
	ttl    time.Duration
	waits  redislock.Options // for those who wait
}

func openRedislock(s setting) (locker, error) {
	client := newClient(s)
	return &redislockLocker{
		client: client, locks: redislock.New(client), ttl: s.ttl,
		waits: redislock.Options{RetryStrategy: redislock.LinearBackoff(s.poll)},
	}, nil
}

func (l *redislockLocker) acquire(ctx context.Context, id string) (release, error) {
	return l.held(l.locks.Obtain(ctx, id, l.ttl, nil))
}

func (l *redislockLocker) wait(ctx context.Context, id string) (release, error) {
	return l.held(l.locks.Obtain(ctx, id, l.ttl, &l.waits))
}

func (l *redislockLocker) held(lock *redislock.Lock, err error) (release, error) {
	if err != nil {
		return nil, err
	}
	return lock.Release, nil
}

func (l *redislockLocker) close() { _ = l.client.Close() } // The process ends anyway.
