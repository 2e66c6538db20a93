//go:build unix

package redistest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/slot"
)

// Cluster is a Redis Cluster on 127.0.0.1. Like its servers it belongs to the test that started it: its methods are for one goroutine at
// a time, and those that fail end that test. They ask the servers that run; a paused one runs, and a method that waits for all servers to
// agree waits for it in vain.
type Cluster struct {
	tb      testing.TB
	members []*member // in the order of their start: first those that were masters then, in the order of their slots
}

type member struct {
	server  *Server
	busPort int
	id      string // what the others call it; it stays the same through Restart, because it stands in the server's directory
	client  *redis.Client
}

// StartCluster starts masters that share the slots evenly, and for each of them that many replicas. It returns when all servers say
// that the cluster is well, agree about the slots, and would name every replica to a client. The args go to all servers. A promotion
// after a crash takes the votes of most masters, so only a cluster of three or more sees one.
//
// Servers believe one dead that has been silent for two seconds, unless the args say otherwise.
func StartCluster(tb testing.TB, masters, replicas int, args ...string) *Cluster {
	tb.Helper()
	c := &Cluster{tb: tb}
	for range masters * (1 + replicas) {
		c.start(args)
	}
	c.assignSlots(masters)
	c.meet()
	c.replicate(masters)
	c.await("the cluster did not form", func() error {
		_, err := c.agreement(nil)
		return errors.Join(err, c.listed(1+replicas))
	})
	return c
}

// start adds a server that is a cluster of its own. Start would not do, because it tries one port after another with the same args, and
// both ports have to be new. The bus has a random port as well, because its default is among those that the kernel gives to outgoing
// connections.
func (c *Cluster) start(args []string) {
	c.tb.Helper()
	dir := c.tb.TempDir()
	s := &Server{tb: c.tb, binary: find(c.tb)}
	m := &member{server: s}
	s.port, s.process = startOnFreePort(c.tb, s.binary, func(port int) []string {
		m.busPort = randomPort() // It may even be port: Redis then refuses to start, as it does when another program has it.
		s.args = slices.Concat(clusterArgs(dir, port, m.busPort), args)
		return s.args
	}, "Ready to accept connections")
	c.tb.Cleanup(func() { s.process.kill() })

	// Commands may take their time. Questions have a deadline, for the sake of paused servers.
	m.client = redis.NewClient(&redis.Options{Addr: s.Addr(), ReadTimeout: patience, ContextTimeoutEnabled: true})
	c.tb.Cleanup(func() { _ = m.client.Close() })
	m.id = fmt.Sprint(c.do(m, "CLUSTER", "MYID"))
	c.members = append(c.members, m)
}

// clusterArgs leaves the name of the file with the node id to Redis, which puts it into dir.
func clusterArgs(dir string, port, busPort int) []string {
	return []string{
		"--bind", "127.0.0.1", "--port", strconv.Itoa(port), "--dir", dir, "--save", "", "--appendonly", "no",
		"--cluster-enabled", "yes", "--cluster-port", strconv.Itoa(busPort), "--cluster-node-timeout", "2000",
		// Without the delay of 0 a master would wait for more replicas to come, for five seconds.
		"--repl-diskless-sync-delay", "0",
		// A replica stays with its slots, and a master that has given all of them away stays a master, so that a test knows who is who.
		"--cluster-allow-replica-migration", "no",
	}
}

// do sends a command to one server, and ends the test if the reply is an error.
func (c *Cluster) do(m *member, args ...any) any {
	c.tb.Helper()
	reply, err := m.client.Do(c.tb.Context(), args...).Result()
	if err != nil {
		c.tb.Fatalf("redistest: %v on %s: %v\n%s", args, m.server.Addr(), err, m.server.process.output())
	}
	return reply
}

// assignSlots comes before the servers meet, because an epoch can be set only until then. They all differ from the start: servers
// that meet with the same one have yet to settle which of them gives way.
func (c *Cluster) assignSlots(masters int) {
	c.tb.Helper()
	for i, m := range c.members {
		c.do(m, "CLUSTER", "SET-CONFIG-EPOCH", i+1)
		if i < masters {
			c.do(m, "CLUSTER", "ADDSLOTSRANGE", i*slot.Slots/masters, (i+1)*slot.Slots/masters-1)
		}
	}
}

// meet introduces every server to every other one. One introduction each would be enough, but then the rest would come by gossip,
// which takes seconds.
func (c *Cluster) meet() {
	c.tb.Helper()
	for i, m := range c.members {
		for _, other := range c.members[i+1:] {
			c.do(m, "CLUSTER", "MEET", "127.0.0.1", other.server.Port(), other.busPort)
		}
	}
}

// replicate makes the servers without slots replicas, and returns when they have the masters' data.
func (c *Cluster) replicate(masters int) {
	c.tb.Helper()
	for i, replica := range c.members[masters:] {
		master := c.members[i%masters]
		from := replica.server.process.printed()
		// A server knows no other one for some moments after MEET, and until then refuses to follow it.
		c.await("a replica did not meet its master", func() error {
			return replica.client.ClusterReplicate(c.tb.Context(), master.id).Err()
		})
		if err := replica.server.process.await(c.tb.Context(), from, "sync: Finished with success"); err != nil {
			c.tb.Fatalf("redistest: replica %v", err)
		}
		// Clients are not told of a replica that has read nothing yet, and there may be nothing to read for ten seconds. FLUSHALL is
		// replicated even when there is nothing to flush.
		c.do(master, "FLUSHALL")
	}
}

// await calls condition until it returns no error.
func (c *Cluster) await(otherwise string, condition func() error) {
	c.tb.Helper()
	ctx, cancel := context.WithTimeout(c.tb.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := condition()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			c.tb.Fatalf("redistest: %s: %v", otherwise, err)
		}
	}
}

// agreement returns what all running servers but one say about the slots, or an error if they differ or one is not well. The one may be
// nil.
func (c *Cluster) agreement(but *Server) (view, error) {
	var agreed view
	for _, m := range c.running() {
		if m.server == but {
			continue
		}
		v, err := c.view(m)
		if err == nil {
			err = c.well(m)
		}
		if err == nil && agreed != nil && !maps.Equal(agreed, v) {
			err = fmt.Errorf("%s says %v, and another server %v", m.server.Addr(), v, agreed)
		}
		if err != nil {
			return nil, err
		}
		agreed = v
	}
	return agreed, nil
}

// running returns those whose process has not ended.
func (c *Cluster) running() []*member {
	return slices.DeleteFunc(slices.Clone(c.members), func(m *member) bool { return m.server.gone() })
}

func (s *Server) gone() bool {
	select {
	case <-s.process.exited:
		return true
	default:
		return false
	}
}

// ask sends a question to a server that may be paused.
func (c *Cluster) ask(m *member, args ...any) *redis.Cmd {
	ctx, cancel := context.WithTimeout(c.tb.Context(), time.Second)
	defer cancel()
	return m.client.Do(ctx, args...)
}

func (c *Cluster) well(m *member) error {
	info, err := c.ask(m, "CLUSTER", "INFO").Text()
	if err == nil && !strings.Contains(info, "cluster_state:ok") {
		err = fmt.Errorf("%s says %q", m.server.Addr(), info)
	}
	return err
}

// view is what one server believes about the slots: who has them. Those who have none are not in it.
type view map[*Server]claim

type claim struct {
	epoch int    // among claims to the same slot, the highest holds
	slots string // as CLUSTER NODES prints them, in ascending order: "0-99 200"
}

// view asks one server. Each line of the reply is an id, seven fields of which the last but one is the config epoch, and the slots,
// followed by those that are migrating, which are in brackets.
func (c *Cluster) view(m *member) (view, error) {
	reply, err := c.ask(m, "CLUSTER", "NODES").Text()
	if err != nil {
		return nil, err
	}
	v := view{}
	for line := range strings.Lines(reply) {
		fields := slices.DeleteFunc(strings.Fields(line), func(f string) bool { return strings.HasPrefix(f, "[") })
		if len(fields) <= 8 {
			continue
		}
		epoch, err := strconv.Atoi(fields[6])
		i := slices.IndexFunc(c.members, func(m *member) bool { return m.id == fields[0] })
		if err != nil || i < 0 {
			return nil, fmt.Errorf("%s says %q", m.server.Addr(), line)
		}
		v[c.members[i].server] = claim{epoch: epoch, slots: strings.Join(fields[8:], " ")}
	}
	return v, nil
}

// master returns who has the slot, or nil.
func (v view) master(slot int) *Server {
	for s, claim := range v {
		for span := range strings.FieldsSeq(claim.slots) {
			first, last, found := strings.Cut(span, "-")
			if !found {
				last = first
			}
			low, _ := strconv.Atoi(first)
			high, err := strconv.Atoi(last)
			if err == nil && low <= slot && slot <= high {
				return s
			}
		}
	}
	return nil
}

// epoch returns the highest that the server has heard of.
func (v view) epoch() int {
	highest := 0
	for _, claim := range v {
		highest = max(highest, claim.epoch)
	}
	return highest
}

// listed returns an error unless all servers would name so many to clients for each part of the slots. They leave out a replica until they
// have heard from it that it has read something of its master's.
func (c *Cluster) listed(count int) error {
	for _, m := range c.members {
		shards, err := m.client.ClusterShards(c.tb.Context()).Result()
		if err != nil {
			return err
		}
		for _, shard := range shards {
			offline := slices.ContainsFunc(shard.Nodes, func(n redis.Node) bool { return n.Health != "online" })
			if len(shard.Nodes) != count || offline {
				return fmt.Errorf("%s lists %v", m.server.Addr(), shard)
			}
		}
	}
	return nil
}

// Options returns new options for redis.NewClusterClient that name all servers and leave everything else as go-redis has it.
func (c *Cluster) Options() *redis.ClusterOptions {
	addrs := make([]string, 0, len(c.members))
	for _, m := range c.members {
		addrs = append(addrs, m.server.Addr())
	}
	return &redis.ClusterOptions{Addrs: addrs}
}

// Client returns a cluster client that is closed when the test ends.
func (c *Cluster) Client(tb testing.TB) *redis.ClusterClient {
	tb.Helper()
	client := redis.NewClusterClient(c.Options())
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Servers are all servers, in the order of their start, whatever they are now and whether they run or not.
func (c *Cluster) Servers() []*Server {
	servers := make([]*Server, 0, len(c.members))
	for _, m := range c.members {
		servers = append(servers, m.server)
	}
	return servers
}

// Masters are the servers that have slots, in the order of their start. One that has been killed is still among them until it is
// replaced.
func (c *Cluster) Masters() []*Server {
	c.tb.Helper()
	v := c.latest()
	return slices.DeleteFunc(c.Servers(), func(s *Server) bool { return v[s] == claim{} })
}

// latest returns what the server believes that has heard of the highest epoch. Each promotion has a higher one than all before, so a
// server that was away during the last is not believed.
func (c *Cluster) latest() view {
	c.tb.Helper()
	var latest view
	for _, m := range c.running() {
		if v, err := c.view(m); err == nil && (latest == nil || v.epoch() > latest.epoch()) {
			latest = v
		}
	}
	if latest == nil {
		c.tb.Fatalf("redistest: no server of the cluster answers")
	}
	return latest
}

// MasterOf is the server that has the slot. One that has been killed still has it until it is replaced.
func (c *Cluster) MasterOf(slot int) *Server {
	c.tb.Helper()
	master := c.latest().master(slot)
	if master == nil {
		c.tb.Fatalf("redistest: slot %d has no master", slot)
	}
	return master
}

// ReplicaOf returns a running replica of the master, in sync with it if it runs as well. It waits until there is one, because a server
// that has just been restarted, or replaced as a master, takes a moment to become one.
func (c *Cluster) ReplicaOf(master *Server) *Server {
	c.tb.Helper()
	return c.replicaOf(master).server
}

func (c *Cluster) replicaOf(master *Server) *member {
	c.tb.Helper()
	var replica *member
	c.await(master.Addr()+" has no replica", func() error {
		for _, m := range c.running() {
			role, err := c.ask(m, "ROLE").Slice()
			// Of a replica that is "slave", the master's host and port, the state of the link, and an offset.
			if err == nil && len(role) == 5 && role[2] == int64(master.Port()) && (role[3] == "connected" || master.gone()) {
				replica = m
				return nil
			}
		}
		return errors.New("no running server says that it is one")
	})
	return replica
}

// Failover has a replica of the slot's master take its place, without loss, and returns the replica when all running servers agree. The old
// master becomes a replica, and may be put back at once. After that Redis puts off the next election for some eight seconds.
func (c *Cluster) Failover(slot int) *Server {
	c.tb.Helper()
	master := c.member(c.MasterOf(slot))
	replica := c.replicaOf(master.server)
	c.await("a replica is not known as one", func() error { return c.known(replica, master) })
	// Redis gives up after five seconds, silently. Asking again sooner would have it begin anew.
	const attempt = 6 * time.Second
	var asked time.Time
	c.await(fmt.Sprintf("slot %d has no new master", slot), func() error {
		if time.Since(asked) > attempt {
			asked = time.Now()
			if err := replica.client.ClusterFailover(c.tb.Context()).Err(); err != nil {
				return err
			}
		}
		return c.agreedMaster(slot, nil, func(s *Server) bool { return s == replica.server })
	})
	return replica.server
}

// known returns an error unless all running servers have heard that the replica is one. A master ignores the wish of a server that it does
// not know as its replica to take its place, and others do not vote for it.
func (c *Cluster) known(replica, master *member) error {
	for _, m := range c.running() {
		replicas, err := c.ask(m, "CLUSTER", "REPLICAS", master.id).StringSlice()
		if err == nil && !slices.ContainsFunc(replicas, func(line string) bool { return strings.HasPrefix(line, replica.id) }) {
			err = fmt.Errorf("%s says %q", m.server.Addr(), replicas)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// agreedMaster returns an error unless the running servers, but perhaps one, agree on a master of the slot that is wanted.
func (c *Cluster) agreedMaster(slot int, but *Server, wanted func(*Server) bool) error {
	v, err := c.agreement(but)
	if err == nil && !wanted(v.master(slot)) {
		err = fmt.Errorf("all say %v", v)
	}
	return err
}

// AwaitNewMaster returns when the running servers have replaced old, which the caller has killed or paused, as the master of the slot,
// and say that the cluster is well. What old had not replicated is lost. It becomes a replica when it is restarted or resumed.
func (c *Cluster) AwaitNewMaster(slot int, old *Server) *Server {
	c.tb.Helper()
	var master *Server
	c.await(fmt.Sprintf("slot %d has no new master", slot), func() error {
		return c.agreedMaster(slot, old, func(s *Server) bool {
			master = s
			return s != nil && s != old && !s.gone()
		})
	})
	return master
}

// BeginMigration opens the slot for its move to another master. From now on its present master answers ASK for a key that it does not
// have, and TRYAGAIN where it has some of several keys; the other one serves the slot after ASKING. New keys are made there, and
// those of old stay until MoveKeys.
func (c *Cluster) BeginMigration(slot int, to *Server) {
	c.tb.Helper()
	from, target := c.member(c.MasterOf(slot)), c.member(to)
	c.do(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", from.id)
	c.do(from, "CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
}

func (c *Cluster) member(s *Server) *member {
	c.tb.Helper()
	i := slices.IndexFunc(c.members, func(m *member) bool { return m.server == s })
	if i < 0 {
		c.tb.Fatalf("redistest: %s is not a server of this cluster", s.Addr())
	}
	return c.members[i]
}

// MoveKeys moves all keys of a slot in migration to the other master.
func (c *Cluster) MoveKeys(slot int, to *Server) {
	c.tb.Helper()
	const atOnce = 100
	from := c.member(c.MasterOf(slot))
	for {
		keys, err := from.client.ClusterGetKeysInSlot(c.tb.Context(), slot, atOnce).Result()
		if err != nil {
			c.tb.Fatalf("redistest: the keys of slot %d: %v", slot, err)
		}
		if len(keys) == 0 {
			return
		}
		migrate := []any{"MIGRATE", "127.0.0.1", to.Port(), "", 0, patience.Milliseconds(), "KEYS"}
		for _, key := range keys {
			migrate = append(migrate, key)
		}
		c.do(from, migrate...)
	}
}

// FinishMigration makes the other master the slot's master, and returns when all running servers agree. It fails the test if the
// present one still has keys of the slot, because they would be lost.
func (c *Cluster) FinishMigration(slot int, to *Server) {
	c.tb.Helper()
	from, target := c.member(c.MasterOf(slot)), c.member(to)
	if n := c.do(from, "CLUSTER", "COUNTKEYSINSLOT", slot); n != int64(0) {
		c.tb.Fatalf("redistest: %s has %v keys of slot %d: call MoveKeys first", from.server.Addr(), n, slot)
	}
	// The new master comes first: once the old one has let go of the slot, it answers MOVED, and there must be somebody to serve it.
	c.do(target, "CLUSTER", "SETSLOT", slot, "NODE", target.id)
	c.do(from, "CLUSTER", "SETSLOT", slot, "NODE", target.id)
	for _, s := range c.Masters() {
		if m := c.member(s); m != from && m != target && !s.gone() {
			c.do(m, "CLUSTER", "SETSLOT", slot, "NODE", target.id)
		}
	}
	c.await(fmt.Sprintf("slot %d did not move", slot), func() error {
		return c.agreedMaster(slot, nil, func(s *Server) bool { return s == to })
	})
}

// Migrate moves the slot with its keys to another master, and returns when all running servers agree. Clients may go on using it.
func (c *Cluster) Migrate(slot int, to *Server) {
	c.tb.Helper()
	// Keys that appear meanwhile need no second look: from the beginning of the migration they appear at their new place.
	c.BeginMigration(slot, to)
	c.MoveKeys(slot, to)
	c.FinishMigration(slot, to)
}
