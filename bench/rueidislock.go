package main

import (
	"context"

	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"
)

type rueidislockLocker struct{ locks rueidislock.Locker }

func openRueidislock(s setting) (locker, error) {
	addrs := s.Cluster
	if len(addrs) == 0 {
		addrs = []string{s.Addr}
	}
	locks, err := rueidislock.NewLocker(rueidislock.LockerOption{
		ClientOption:   rueidis.ClientOption{InitAddress: addrs},
		KeyMajority:    1,
		KeyValidity:    s.ttl,
		NoLoopTracking: true,
		// A busy server is no reason to try the next key, because there is none.
		TryNextAfter: s.ttl,
	})
	if err != nil {
		return nil, err
	}
	return &rueidislockLocker{locks: locks}, nil
}

func (l *rueidislockLocker) acquire(ctx context.Context, id string) (release, error) {
	return l.held(l.locks.TryWithContext(ctx, id))
}

// wait takes care that the end of ctx ends the wait only. The lock would end with the context that it was
// waited for with, in the middle of a section.
func (l *rueidislockLocker) wait(ctx context.Context, id string) (release, error) {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	unlock, err := l.held(l.locks.WithContext(life, id))
	if err == nil && !stop() {
		_ = unlock(ctx) // It is being released anyway.
		err = ctx.Err()
	}
	if err != nil {
		end()
		return nil, err
	}
	return func(ctx context.Context) error {
		defer end()
		return unlock(ctx)
	}, nil
}

// held returns a release that says whether the lock was lost before.
func (l *rueidislockLocker) held(section context.Context, cancel context.CancelFunc, err error) (release, error) {
	if err != nil {
		return nil, err
	}
	return func(context.Context) error {
		err := section.Err()
		cancel()
		return err
	}, nil
}

func (l *rueidislockLocker) close() { l.locks.Close() }
