//go:build unix

package redistest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Failover is a master with replicas, under sentinels.
type Failover struct {
	MasterName string // what clients ask the sentinels for

	tb        testing.TB
	downAfter time.Duration
	sentinels []*sentinel
	servers   []*Server // the master and its replicas, in no order
	master    *Server
}

type sentinel struct {
	process *process
	addr    string
	client  *redis.SentinelClient
}

// StartFailover starts a master, a replica and a sentinel. One sentinel is enough for most of what a client can see of a failover, and
// it needs no election. The args go to both servers.
func StartFailover(tb testing.TB, args ...string) *Failover {
	tb.Helper()
	return StartSentinels(tb, 1, 1, 500*time.Millisecond, args...)
}

// StartSentinels starts a master, replicas and sentinels, and returns when the replicas are in sync and the sentinels would promote
// one. They believe a master dead that has been silent for downAfter; on a busy machine a living one may be silent for a second. The args go
// to all servers.
func StartSentinels(tb testing.TB, replicas, sentinels int, downAfter time.Duration, args ...string) *Failover {
	tb.Helper()
	f := &Failover{tb: tb, MasterName: "redfour", downAfter: downAfter}

	// Without the delay of 0 the master would wait for more replicas to come, for five seconds.
	args = append([]string{"--repl-diskless-sync-delay", "0"}, args...)
	f.master = Start(tb, args...)
	f.servers = append(f.servers, f.master)
	for range replicas {
		r := Start(tb, append(args, "--replicaof", "127.0.0.1", strconv.Itoa(f.master.Port()))...)
		if err := r.process.await(tb.Context(), 0, "sync: Finished with success"); err != nil {
			tb.Fatalf("redistest: replica %v", err)
		}
		f.servers = append(f.servers, r)
	}

	// The sentinels come last: they ask a master for its replicas when they first connect, and then only every ten seconds.
	for range sentinels {
		f.startSentinel(sentinels/2 + 1)
	}
	f.awaitReplicas(tb.Context())
	return f
}

func (f *Failover) startSentinel(quorum int) {
	f.tb.Helper()
	dir := f.tb.TempDir()
	port, p := startOnFreePort(f.tb, find(f.tb), func(port int) []string {
		return []string{f.writeConfig(dir, port, quorum), "--sentinel"}
	}, "+monitor")
	f.tb.Cleanup(p.kill)
	s := &sentinel{process: p, addr: net.JoinHostPort("127.0.0.1", strconv.Itoa(port))}
	s.client = redis.NewSentinelClient(&redis.Options{Addr: s.addr})
	f.tb.Cleanup(func() { _ = s.client.Close() })
	f.sentinels = append(f.sentinels, s)
}

// writeConfig returns the path of a new config file. A sentinel cannot do without one: it writes what it learns into it.
func (f *Failover) writeConfig(dir string, port, quorum int) string {
	f.tb.Helper()
	config := fmt.Sprintf(`bind 127.0.0.1
port %d
dir %q
sentinel monitor %[3]s 127.0.0.1 %[4]d %[5]d
sentinel down-after-milliseconds %[3]s %[6]d
sentinel failover-timeout %[3]s 5000
`, port, dir, f.MasterName, f.master.Port(), quorum, f.downAfter.Milliseconds())
	path := filepath.Join(dir, fmt.Sprintf("sentinel-%d.conf", port))
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		f.tb.Fatalf("redistest: %v", err)
	}
	return path
}

// awaitReplicas returns when every sentinel has heard from the replicas themselves that they follow the master, and from the other
// sentinels. Until then a failover is refused with NOGOODSLAVE, or finds no majority. The sentinels print nothing at that moment, so they
// have to be asked.
func (f *Failover) awaitReplicas(ctx context.Context) {
	f.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for _, s := range f.sentinels {
		f.awaitUntil(ctx, "a sentinel does not know the replicas", func() bool {
			known, err := s.client.Replicas(ctx, f.MasterName).Result()
			ready := 0
			for _, r := range known {
				if f.serverAt(r["port"]) != nil && r["flags"] == "slave" && r["master-link-status"] == "ok" {
					ready++
				}
			}
			others, othersErr := s.client.Sentinels(ctx, f.MasterName).Result()
			return err == nil && othersErr == nil && ready == len(f.servers)-1 && len(others) == len(f.sentinels)-1
		})
	}
}

func (f *Failover) awaitUntil(ctx context.Context, otherwise string, condition func() bool) {
	f.tb.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.tb.Fatalf("redistest: %s: %v\n%s", otherwise, ctx.Err(), f.sentinels[0].process.output())
		}
	}
}

func (f *Failover) serverAt(port string) *Server {
	for _, s := range f.servers {
		if strconv.Itoa(s.Port()) == port {
			return s
		}
	}
	return nil
}

// SentinelAddrs are the addresses for redis.FailoverOptions.
func (f *Failover) SentinelAddrs() []string {
	addrs := make([]string, 0, len(f.sentinels))
	for _, s := range f.sentinels {
		addrs = append(addrs, s.addr)
	}
	return addrs
}

// Options returns new options for redis.NewFailoverClient that name this master and leave everything else as go-redis has it.
func (f *Failover) Options() *redis.FailoverOptions {
	return &redis.FailoverOptions{MasterName: f.MasterName, SentinelAddrs: f.SentinelAddrs()}
}

// Client returns a failover client that is closed when the test ends.
func (f *Failover) Client(tb testing.TB) *redis.Client {
	tb.Helper()
	client := redis.NewFailoverClient(f.Options())
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Master is the server that the sentinels name as the master at present.
func (f *Failover) Master() *Server { return f.master }

// Replica is one of the others.
func (f *Failover) Replica() *Server { return f.Replicas()[0] }

// Replicas are the servers that are not the master at present, whatever they believe themselves.
func (f *Failover) Replicas() []*Server {
	return slices.DeleteFunc(slices.Clone(f.servers), func(s *Server) bool { return s == f.master })
}

// Failover has the sentinels promote a replica, and returns when they name it as the master. The old master runs on, and goes
// on as a master for the clients that it has, until the sentinels turn it into a replica some ten seconds later; a second
// Failover waits for that.
func (f *Failover) Failover() {
	f.tb.Helper()
	f.awaitReplicas(f.tb.Context())
	f.switchMaster(func() {
		if err := f.sentinels[0].client.Failover(f.tb.Context(), f.MasterName).Err(); err != nil {
			f.tb.Fatalf("redistest: SENTINEL FAILOVER: %v", err)
		}
	})
}

// Crash kills the master and returns when the sentinels have promoted a replica on their own. What the master had not replicated is
// lost. The old master can be started again with Restart, and then becomes a replica.
func (f *Failover) Crash() {
	f.tb.Helper()
	f.switchMaster(f.master.Kill)
}

// switchMaster returns when every sentinel names another master than before.
func (f *Failover) switchMaster(cause func()) {
	f.tb.Helper()
	cause()
	ctx, cancel := context.WithTimeout(f.tb.Context(), patience)
	defer cancel()
	before := f.master
	for _, s := range f.sentinels {
		f.awaitUntil(ctx, "the sentinels promoted no replica", func() bool {
			addr, err := s.client.GetMasterAddrByName(ctx, f.MasterName).Result()
			if err != nil || len(addr) != 2 {
				return false
			}
			f.master = f.serverAt(addr[1])
			return f.master != nil && f.master != before
		})
	}
}
