package main

import (
	"context"
	"errors"
	"math"

	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
)

type redsyncLocker struct {
	client redis.UniversalClient
	mutex  func(id string) *redsync.Mutex
}

func openRedsync(s setting) (locker, error) {
	client := newClient(s)
	sync := redsync.New(goredis.NewPool(client))
	return &redsyncLocker{client: client, mutex: func(id string) *redsync.Mutex {
		return sync.NewMutex(id,
			redsync.WithExpiry(s.ttl), redsync.WithTries(math.MaxInt), redsync.WithRetryDelay(s.poll))
	}}, nil
}

func (l *redsyncLocker) acquire(ctx context.Context, id string) (release, error) {
	m := l.mutex(id)
	return l.held(m, m.TryLockContext(ctx))
}

func (l *redsyncLocker) wait(ctx context.Context, id string) (release, error) {
	m := l.mutex(id)
	return l.held(m, m.LockContext(ctx))
}

func (l *redsyncLocker) held(m *redsync.Mutex, err error) (release, error) {
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		ok, err := m.UnlockContext(ctx)
		if err == nil && !ok {
			err = errors.New("not held")
		}
		return err
	}, nil
}

func (l *redsyncLocker) close() { _ = l.client.Close() } // The process ends anyway.
