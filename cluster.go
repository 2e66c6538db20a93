package redfour

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/batch"
	"github.com/redfour-go/redfour/internal/slot"
)

// bucketCount is over how many buckets the ids of a namespace are spread in Redis Cluster. It is part of the wire.
const bucketCount = 256

// A bucket is those locks of a namespace whose keys are in the same slot. Redis Cluster runs a script only where all its keys are
// in one slot, so there a namespace has many buckets, with a counter and channels of its own each; elsewhere it has one.
type bucket struct {
	names

	counterKey any // a string, as an any here, so that it is not made one with each call
	prefix     any // of channels, likewise

	// What is known of one bucket says nothing about another, which may be on a server with another clock.
	highest atomic.Int64            // index seen so far
	claimed int64                   // the same of leases that anybody here was given; observe may have left it out. Guarded by subscriber.mu
	clock   atomic.Pointer[reading] // the last; nil before the first

	// Each bucket has its own, so that a master that hangs delays no attempts on others. Guarded by subscriber.mu.
	backlog []look // by lines that wait for their turn
	looking int    // goroutines that make attempts
}

func newBucket(namespace string) *bucket {
	n := names{namespace}
	return &bucket{names: n, counterKey: n.counter(), prefix: n.channels()}
}

// layOut returns the buckets of a namespace: in a cluster so many, unless the namespace has a hash tag, which then is what says
// where all of it is.
func layOut(namespace string, cluster bool) []*bucket {
	if _, tagged := slot.Tag(namespace); tagged || !cluster {
		return []*bucket{newBucket(namespace)}
	}
	all := make([]*bucket, bucketCount)
	for n := range all {
		all[n] = newBucket(fmt.Sprintf("{%s:%d}", namespace, n))
	}
	return all
}

// checkLayout returns an error for a namespace that layOut would not spread: a "}" would end the hash tag too early.
func checkLayout(namespace string) error {
	if _, tagged := slot.Tag(namespace); !tagged && strings.Contains(namespace, "}") {
		return fmt.Errorf("namespace %q has a } and no hash tag, so that it cannot be laid out in a cluster", namespace)
	}
	return nil
}

// bucket returns where the lock of id is.
func (s *server) bucket(id string) *bucket {
	if len(s.buckets) == 1 {
		return s.buckets[0]
	}
	return s.buckets[int(slot.Sum(id))%len(s.buckets)]
}

// A topology is what is known of the masters of a cluster. Calls to different masters do not share a batch, so that one which
// hangs delays nobody else.
type topology struct {
	client  *redis.ClusterClient
	located atomic.Bool // the client knows its slots: asking it sends nothing. Set under mu

	mu      sync.Mutex         // guards what follows
	masters map[string]*master // by address; by the bucket's namespace until the masters are known
	ended   bool
}

// A master is what sends scripts to one.
type master struct {
	*batch.Batcher

	pace pace
}

// batcherFor returns what sends the scripts for a bucket, and how long they are waited for.
func (s *server) batcherFor(b *bucket) (*batch.Batcher, *pace) {
	t := s.topology
	if t == nil {
		return s.batcher, &s.pace
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	to := b.namespace
	if t.located.Load() {
		if master, err := t.client.MasterForKey(s.life, b.namespace); err == nil {
			to = master.Options().Addr
		}
	}
	if t.masters[to] == nil {
		// One without goroutines costs nothing to make again. That of a master that has gone stays so.
		maps.DeleteFunc(t.masters, func(_ string, m *master) bool { return m.Rests() })
		t.masters[to] = &master{Batcher: s.newBatcher()}
		if t.ended {
			t.masters[to].End()
		}
	}
	return t.masters[to].Batcher, &t.masters[to].pace
}

// locate notes that the client knows its slots.
func (t *topology) locate() {
	if t.located.Load() {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.located.Store(true)
	for _, b := range t.masters {
		b.End() // What it has still to send it sends.
	}
	clear(t.masters)
}

// endBatchers lets the goroutines go that wait for scripts to send. Releases can still be sent.
func (s *server) endBatchers() {
	s.batcher.End()
	t := s.topology
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended = true
	for _, b := range t.masters {
		b.End()
	}
}

// heard notes what the outcome of a script, or of a subscription, says about the cluster. After any trouble with a master the client asks for the slots
// again, because it would keep to a dead one for a minute. It asks at most five times a second.
//
// That Redis refuses the password is noted, too.
func (s *server) heard(err error) {
	if err != nil && judge(err) == unauthenticated {
		s.events.unauthenticated(err)
	}
	switch t := s.topology; {
	case t == nil:
	case err == nil:
		t.locate()
	case judge(err).outOfReach():
		t.client.ReloadState(s.life)
	}
}

// master returns the client of the server that has the bucket, and its address. In a cluster it may have to ask for that.
func (s *server) master(ctx context.Context, b *bucket) (*redis.Client, string, error) {
	if s.topology == nil {
		client, _ := s.client.(*redis.Client)
		return client, "", nil
	}
	client, err := s.topology.client.MasterForKey(ctx, b.namespace)
	if err != nil {
		return nil, "", err
	}
	s.topology.locate()
	return client, client.Options().Addr, nil
}

// A movingError is what a cluster answers while a slot moves, for longer than the client follows.
type movingError struct{ err error }

func (e *movingError) Error() string { return e.err.Error() }
func (e *movingError) Unwrap() error { return e.err }

// inCluster tells the errors apart that mean something else in a cluster.
func (s *server) inCluster(err error) error {
	if s.topology != nil && (redis.HasErrorPrefix(err, "MOVED") || redis.HasErrorPrefix(err, "ASK")) {
		return &movingError{err}
	}
	return err
}

// unknownCommand tells whether a server says so.
func unknownCommand(err error) bool {
	serverErr, ok := errors.AsType[redis.Error](err)
	return ok && strings.HasPrefix(serverErr.Error(), "ERR unknown command")
}

// errMoved says that a subscription is not where its locks are.
var errMoved = errors.New("the slot has another master")

// sharded returns a script for a cluster, where a channel belongs to a slot as a key does. A server that does not know such channels
// (Redis 6) gets a message that every node passes on.
func (sc *script) sharded() *script {
	return newScript(`
local function publish(channel, message)
  local told = redis.pcall("SPUBLISH", channel, message)
  if type(told) == "table" and string.find(told.err, "nknown") then told = redis.pcall("PUBLISH", channel, message) end
  return told
end
` + strings.NewReplacer(
		`redis.pcall("PUBLISH", `, "publish(", `"NUMSUB"`, `"SHARDNUMSUB"`,
	).Replace(sc.source))
}
