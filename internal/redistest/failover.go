//go:build unix

package redistest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// Failover is a master with one replica, under one sentinel that alone decides.
type Failover struct {
	MasterName string // what clients ask the sentinel for

	tb       testing.TB
	sentinel *process
	addr     string // of the sentinel
	client   *redis.SentinelClient
	master   *Server
	replica  *Server
}

// StartFailover starts a master, a replica and a sentinel, and returns when the replica is in sync and the sentinel would promote it.
// The args go to both servers. One sentinel is enough for what a client can see of a failover, and it needs no election.
func StartFailover(tb testing.TB, args ...string) *Failover {
	tb.Helper()
	f := &Failover{tb: tb, MasterName: "redfour"}

	// Without the delay of 0 the master would wait for more replicas to come, for five seconds.
	args = append([]string{"--repl-diskless-sync-delay", "0"}, args...)
	f.master = Start(tb, args...)
	f.replica = Start(tb, append(args, "--replicaof", "127.0.0.1", strconv.Itoa(f.master.Port()))...)
	if err := f.replica.process.await(tb.Context(), 0, "sync: Finished with success"); err != nil {
		tb.Fatalf("redistest: replica %v", err)
	}

	// The sentinel comes last: it asks a master for its replicas when it first connects, and then only every ten seconds.
	f.startSentinel()
	f.awaitReplica(tb.Context())
	return f
}

func (f *Failover) startSentinel() {
	f.tb.Helper()
	dir := f.tb.TempDir()
	port, sentinel := startOnFreePort(f.tb, find(f.tb), func(port int) []string {
		return []string{f.writeConfig(dir, port), "--sentinel"}
	}, "+monitor")
	f.tb.Cleanup(sentinel.kill)
	f.sentinel = sentinel
	f.addr = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	f.client = redis.NewSentinelClient(&redis.Options{Addr: f.addr})
	f.tb.Cleanup(func() { _ = f.client.Close() })
}

// writeConfig returns the path of a new config file. A sentinel cannot do without one: it writes what it learns into it.
func (f *Failover) writeConfig(dir string, port int) string {
	f.tb.Helper()
	config := fmt.Sprintf(`bind 127.0.0.1
port %d
dir %q
sentinel monitor %[3]s 127.0.0.1 %[4]d 1
sentinel down-after-milliseconds %[3]s 500
sentinel failover-timeout %[3]s 5000
`, port, dir, f.MasterName, f.master.Port())
	path := filepath.Join(dir, fmt.Sprintf("sentinel-%d.conf", port))
	if err := os.WriteFile(path, []byte(config), 0o600); err != nil {
		f.tb.Fatalf("redistest: %v", err)
	}
	return path
}

// awaitReplica returns when the sentinel has heard from the replica itself that it follows the master. Until then a failover is
// refused with NOGOODSLAVE. The sentinel prints nothing at that moment, so it has to be asked.
func (f *Failover) awaitReplica(ctx context.Context) {
	f.tb.Helper()
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		replicas, err := f.client.Replicas(ctx, f.MasterName).Result()
		for _, r := range replicas {
			if r["port"] == strconv.Itoa(f.replica.Port()) && r["flags"] == "slave" && r["master-link-status"] == "ok" {
				return
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.tb.Fatalf("redistest: the sentinel does not know the replica: %v, %v, %v\n%s", ctx.Err(), err, replicas, f.sentinel.output())
		}
	}
}

// SentinelAddrs are the addresses for redis.FailoverOptions.
func (f *Failover) SentinelAddrs() []string { return []string{f.addr} }

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

// Master is the server that the sentinel names as the master at present.
func (f *Failover) Master() *Server { return f.master }

// Replica is the other server.
func (f *Failover) Replica() *Server { return f.replica }

// Failover has the sentinel promote the replica, and returns when the sentinel names it as the master. The old master runs on, and goes
// on as a master for the clients that it has, until the sentinel turns it into a replica some ten seconds later; a second
// Failover waits for that.
func (f *Failover) Failover() {
	f.tb.Helper()
	f.awaitReplica(f.tb.Context())
	f.switchMaster(func() {
		if err := f.client.Failover(f.tb.Context(), f.MasterName).Err(); err != nil {
			f.tb.Fatalf("redistest: SENTINEL FAILOVER: %v", err)
		}
	})
}

// Crash kills the master and returns when the sentinel has promoted the replica on its own. What the master had not replicated is
// lost. The old master can be started again with Restart, and then becomes the replica.
func (f *Failover) Crash() {
	f.tb.Helper()
	f.switchMaster(f.master.Kill)
}

func (f *Failover) switchMaster(cause func()) {
	f.tb.Helper()
	from := f.sentinel.printed()
	cause()
	if err := f.sentinel.await(f.tb.Context(), from, "+switch-master"); err != nil {
		f.tb.Fatalf("redistest: sentinel %v", err)
	}
	f.master, f.replica = f.replica, f.master
}
