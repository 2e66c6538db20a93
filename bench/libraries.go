package main

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"
)

// A locker is a library at work in one process. Its methods are called by many goroutines.
type locker interface {
	// acquire takes a lock that is free, without waiting.
	acquire(ctx context.Context, id string) (release, error)
	// wait takes a lock when it can have it, or returns when ctx ends.
	wait(ctx context.Context, id string) (release, error)
	close()
}

// A release gives back what was acquired, whatever became of the ctx that it was acquired with.
type release func(ctx context.Context) error

// A setting is what a locker can be told.
type setting struct {
	place

	ttl  time.Duration // of leases
	poll time.Duration // between attempts, where a library polls
}

// An entry is one of the libraries that are compared.
type entry struct {
	Library

	open     func(setting) (locker, error) // nil: it runs in Node.js
	pkg      string                        // its Go module or npm package, for the version
	waits    bool                          // it takes part in other workloads than cycles
	clusters bool                          // it takes part in a cluster
	direct   []string                      // commands on data that it sends itself, and no script of its calls
}

// takesPart tells whether the library can do what a load asks of it.
func (e entry) takesPart(l Load) bool {
	return (e.waits || l.Workload == Cycles) && (e.clusters || l.Masters == 0)
}

// pollText says what poll does.
const pollText = "10 ms, or 100 ms for 1000 waiters and more, who would keep the server busy"

// forever is later than any run ends. A library that is given no deadline may make one up.
const forever = time.Hour

// lineup returns all libraries, in the order of tables and charts.
func lineup() []entry {
	return []entry{
		{
			Library: Library{
				Name:     "redfour",
				Settings: "redfour.New on a go-redis client with default options, in a cluster a ClusterClient; Acquire for cycles, else WaitAcquire",
			},
			open: openRedfour, pkg: "github.com/redfour-go/redfour", waits: true, clusters: true,
		},
		{
			Library: Library{
				Name:     "rueidislock",
				Settings: "KeyMajority 1, NoLoopTracking, KeyValidity as the ttl of the others, and TryNextAfter no less; TryWithContext for cycles (WithContext is as fast), else WithContext",
			},
			open: openRueidislock, pkg: "github.com/redis/rueidis", waits: true, clusters: true,
		},
		{
			Library: Library{
				Name:     "redislock",
				Settings: "on a go-redis client as of redfour (a larger pool was no faster); no metadata; LinearBackoff of " + pollText,
			},
			open: openRedislock, pkg: "github.com/bsm/redislock", waits: true, clusters: true,
		},
		{
			Library: Library{
				Name:     "redsync",
				Settings: "one pool, as of redislock; TryLock for cycles, else WithTries without limit and a WithRetryDelay of " + pollText + "; its default is 50 to 250 ms",
			},
			open: openRedsync, pkg: "github.com/go-redsync/redsync/v4", waits: true, clusters: true,
			direct: []string{"set"},
		},
		{
			Library: Library{
				Name:     "npm redfour",
				Settings: "as it comes, which is not in a cluster; all waiters are async functions in the one thread of each process",
			},
			pkg: "redfour", waits: true,
		},
		{
			Library: Library{
				Name:     "npm ioredfour",
				Settings: "as npm redfour; in a cluster it is given all masters, and keeps all locks of a namespace on one of them",
			},
			pkg: "ioredfour", waits: true, clusters: true,
		},
		{
			Library: Library{
				Name:     "floor",
				Settings: "SET NX PX, and a script that compares and deletes, on a go-redis client as of redfour",
				Floor:    true,
			},
			open: openFloor, pkg: "github.com/redis/go-redis/v9", clusters: true,
			direct: []string{"set"},
		},
		{
			Library: Library{
				Name:     "floor, pipelined",
				Settings: "the same through go-redis' AutoPipeline, which is experimental",
				Floor:    true,
			},
			open: openPipelinedFloor, pkg: "github.com/redis/go-redis/v9", clusters: true,
			direct: []string{"set"},
		},
	}
}

// entryOf returns the library of that name.
func entryOf(name string) (entry, bool) {
	for _, e := range lineup() {
		if e.Name == name {
			return e, true
		}
	}
	return entry{}, false
}

// newClient returns a go-redis client as most applications have it.
func newClient(s setting) redis.UniversalClient {
	if len(s.Cluster) > 0 {
		return redis.NewClusterClient(&redis.ClusterOptions{Addrs: s.Cluster})
	}
	return redis.NewClient(&redis.Options{Addr: s.Addr})
}
