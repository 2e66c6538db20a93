package redfour

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// A sweep closes the connections of a client that died silently: behind a NAT or a
// load balancer that forgot them, or to a host that was suspended. Go-redis does not
// notice. It uses the idle connection that was used last, and an attempt that gets no
// answer keeps its connection for go-redis's read timeout. So the next attempts take
// one dead connection after another, for a second each.
//
// An attempt that was sent and has had no answer for most of its time starts a sweep,
// in two steps. A new connection is pinged: if that is not answered either, the
// server is slow or gone, and nothing else is done. If the attempt has no answer even
// then, all idle connections are pinged at the same time, and go-redis closes those that
// do not answer. The next attempt finds what is left, or a new connection.
//
// This needs no client of its own, which would lack the hooks of the caller's client,
// and it mends the connections for everybody. It works alike for a server, a Sentinel's
// master and a master of a cluster.

const (
	// sweepEvery is the shortest time between two sweeps of one master. A sweep of a
	// slow server costs one connection, so that is at most one a second.
	sweepEvery = time.Second

	// shortestPing is how long an idle connection may take for a ping, at least. Where
	// a pause of this process or of the server is longer, its idle connections are
	// closed, and made again when they are needed.
	shortestPing = 100 * time.Millisecond

	// holdTime is how long a connection that has answered is kept from being used
	// again. The pings of the others are sent meanwhile, each over its own connection.
	// It is also what an answer may come later than one that was sent at the same time.
	holdTime = 10 * time.Millisecond
)

// A sweeper says when the connections to one master were last swept. The zero sweeper is ready.
type sweeper struct{ last atomic.Int64 } // ns since 1970

// due reports whether it is time for a sweep, which then counts as made.
func (w *sweeper) due() bool {
	now, last := time.Now().UnixNano(), w.last.Load()
	return now-last >= int64(sweepEvery) && w.last.CompareAndSwap(last, now)
}

// sweepConns closes the dead connections to the master that c was sent to, in the background, if it is time for that.
func (s *server) sweepConns(c *call) {
	if !c.pace.due() {
		return
	}
	s.crew.Start(func() {
		ctx, cancel := context.WithTimeout(s.life, patience)
		defer cancel()
		client, _, err := s.master(ctx, c.bucket)
		if err != nil {
			return
		}
		began := time.Now()
		if !pingNew(ctx, client) {
			return
		}
		took := time.Since(began)
		timer := time.NewTimer(holdTime) // A server that has just come out of a stall has answered the call as well.
		defer timer.Stop()
		select {
		case <-c.Ready():
		case <-timer.C:
			pingIdle(ctx, client, max(2*took, shortestPing))
		}
	})
}

// pingNew reports whether a new connection is answered. That of a subscription is never one of the pool's.
func pingNew(ctx context.Context, client *redis.Client) bool {
	pubsub := client.Subscribe(ctx) // to no channel
	defer pubsub.Close()            //nolint:errcheck // It was opened for this ping.
	if pubsub.Ping(ctx) != nil {
		return false
	}
	_, err := receive(ctx, pubsub)
	_, refused := errors.AsType[redis.Error](err)
	return ctx.Err() == nil && (err == nil || refused) // The user may lack the right to ping.
}

// pingIdle pings every idle connection of a client. One that does not answer within limit is closed by go-redis.
func pingIdle(ctx context.Context, client *redis.Client, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit) // for a turn in the pool
	defer cancel()
	stats := client.PoolStats()
	client = client.WithTimeout(limit)
	var pings sync.WaitGroup
	for range stats.IdleConns {
		pings.Go(func() {
			conn := client.Conn()
			defer conn.Close() //nolint:errcheck // This only gives it back to the pool.
			_ = conn.Process(ctx, newPing(ctx))
			sleep(ctx, ctx, holdTime)
		})
	}
	if stats.PipelineStats != nil { // Its connections cannot be held, so some of the dead may stay below the others.
		for range stats.PipelineStats.IdleConns {
			pings.Go(func() {
				p := client.Pipeline()
				_ = p.Process(ctx, newPing(ctx))
				_, _ = p.Exec(ctx)
			})
		}
	}
	pings.Wait()
}

// newPing returns a ping that go-redis does not repeat over another connection.
func newPing(ctx context.Context) command { return command{redis.NewCmd(ctx, "ping")} }
