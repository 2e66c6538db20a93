// Package faults attacks the library with real faults, and judges every history.
//
// A run starts a redis-server, a master with replicas and sentinels, or a cluster, and several
// processes of this test binary which use the library (worker.go), beside one that uses
// npm redfour (npm.js). A fault befalls them: on the network (proxy.go), in the server, in a
// process, or several at once (fault.go, run.go). What the processes report becomes a history
// (fleet.go, history.go), and the judge (judge.go) holds that against what the library
// promises. The judge is tested in its turn, by libraries that are broken (mutants/).
package faults

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A fault is one thing that goes wrong.
type fault struct {
	name     string
	alone    bool // no other run may happen beside it
	steady   bool // nothing keeps anybody from renewing a lease
	proxied  bool // there are proxies between the processes and the server
	sentinel bool // there are a master, replicas and sentinels
	cluster  bool // there are three masters, and a replica of each

	rotates bool // the password of the processes; a server that restarts forgets it
	moves   bool // the name of the server, to a replica
	idle    int  // connections that a process keeps beside those it needs

	// What the judge has to know of it.
	outage bool          // there are no grants meanwhile
	lag    time.Duration // for which that goes on
	loses  bool          // leases, and perhaps the counter
	revive bool          // and releases
	delays bool          // requests, which then take effect when their callers have given up
	resets bool          // connections
	slows  bool          // replies
	cuts   bool          // connections, before a slow reply can arrive

	// ttl of the leases on quick ids. Only one that is much longer than patience shows that a
	// wake-up was lost; where somebody dies with such a lease it has to be short.
	ttl time.Duration

	lasts  time.Duration // about
	begin  func(r *run) (end func())
	parts  [][2]fault   // instead of begin: pairs that happen at the same time
	settle func(r *run) // returns when no more leases can be lost; nil: at the end at once
	then   func(r *run) // what else happens when that is over; nil: nothing
}

// standing is how many connections a process keeps where some die silently, and takes
// in turn. Half of them are more than the calls of some seconds find out.
const standing = 80

const (
	longTTL  = 15 * time.Second
	shortTTL = 2 * time.Second

	// This is longer than patience, and not much. It is for faults by which leases hold on to their end
	// although nobody has them: a failover loses releases as well, and a waiter that is killed may hold another lock.
	middleTTL = 6 * time.Second
)

// faults returns all of them.
func faults() []fault {
	const second = time.Second
	return []fault{
		{name: "none", steady: true, ttl: longTTL, lasts: second, begin: func(*run) func() { return func() {} }},

		{name: "latency", proxied: true, slows: true, ttl: longTTL, lasts: 4 * second, begin: onOneProxy(
			toxic{"latency", "downstream", 1, map[string]int{"latency": 150}},
			toxic{"latency", "upstream", 1, map[string]int{"latency": 50}},
		)},
		{name: "jitter", proxied: true, slows: true, ttl: longTTL, lasts: 2 * second, begin: onProxies(
			toxic{"latency", "downstream", 0.7, map[string]int{"latency": 30, "jitter": 30}},
			toxic{"latency", "upstream", 0.7, map[string]int{"latency": 20, "jitter": 20}},
		)},
		{name: "reset", proxied: true, resets: true, ttl: longTTL, lasts: 2 * second, begin: inBursts(
			toxic{"reset_peer", "downstream", 0.5, map[string]int{"timeout": 20}},
		)},
		{name: "reply lost", proxied: true, ttl: longTTL, lasts: 2 * second, begin: inBursts(
			toxic{"timeout", "downstream", 0.5, map[string]int{"timeout": 30}},
		)},
		{name: "late, and reply lost", proxied: true, ttl: longTTL, lasts: 2 * second, begin: inBursts(
			toxic{"latency", "upstream", 0.5, map[string]int{"latency": 60, "jitter": 30}},
			toxic{"timeout", "downstream", 0.5, map[string]int{"timeout": 30}},
		)},
		{name: "a proxy answers for the server", proxied: true, ttl: longTTL, lasts: 2 * second, begin: answeredByProxies},
		{name: "black hole upstream", proxied: true, outage: true, ttl: shortTTL, lasts: 2 * second, begin: onProxies(
			toxic{"timeout", "upstream", 1, nil},
		)},
		{name: "black hole downstream", proxied: true, outage: true, ttl: shortTTL, lasts: 2 * second, begin: onProxies(
			toxic{"timeout", "downstream", 1, nil},
		)},
		{name: "black hole both ways", proxied: true, outage: true, ttl: shortTTL, lasts: 2 * second, begin: onProxies(
			toxic{"timeout", "upstream", 1, nil}, toxic{"timeout", "downstream", 1, nil},
		)},
		{name: "half-open subscriber", proxied: true, ttl: longTTL, lasts: 2 * second, begin: filtered(
			func(f *filter, on bool) {
				if on {
					f.era.Add(1)
				}
			},
		)},
		{name: "connections die silently", proxied: true, idle: standing, ttl: longTTL, lasts: 2 * second, begin: filtered(
			func(f *filter, on bool) {
				if on {
					f.silence.Add(1)
				}
			},
		)},
		{name: "a name moves", proxied: true, moves: true, outage: true, ttl: longTTL, begin: movedName, then: servedAfterMove},
		{name: "no subscriptions", proxied: true, outage: true, ttl: longTTL, lasts: 4 * second, begin: filtered(
			func(f *filter, on bool) { f.subscribers.Store(on) },
		)},
		{name: "no commands", proxied: true, outage: true, ttl: shortTTL, lasts: 2 * second, begin: filtered(
			func(f *filter, on bool) { f.commands.Store(on) },
		)},

		{name: "server killed, data kept", outage: true, ttl: longTTL, lasts: second, begin: killServer},
		{name: "server killed, data lost", outage: true, loses: true, ttl: longTTL, lasts: second, begin: killServerAndData},
		{name: "server stopped", outage: true, delays: true, ttl: shortTTL, lasts: 3 * second, begin: func(r *run) func() {
			r.server.Pause()
			return func() {
				r.witness("the server answered", !answers(r.server.Addr(), 200*time.Millisecond))
				r.server.Resume()
			}
		}},
		{name: "CLIENT KILL normal", cuts: true, ttl: longTTL, lasts: 2 * second, begin: often(60*time.Millisecond, "client", "kill", "type", "normal")},
		{name: "CLIENT KILL pubsub", ttl: longTTL, lasts: 2 * second, begin: often(200*time.Millisecond, "client", "kill", "type", "pubsub")},
		{name: "SCRIPT FLUSH", ttl: longTTL, lasts: 2 * second, begin: often(20*time.Millisecond, "script", "flush")},
		{name: "a password rotates", rotates: true, ttl: longTTL, lasts: 3 * second, begin: rotatedPassword},
		{name: "FLUSHALL", loses: true, ttl: longTTL, lasts: 0, begin: func(r *run) func() {
			return func() { r.command("flushall") }
		}},
		{name: "maxmemory reached", outage: true, ttl: longTTL, lasts: 2 * second, begin: func(r *run) func() {
			r.command("config", "set", "maxmemory", "1")
			r.mustFail("OOM", "set", "probe", "x")
			return func() { r.command("config", "set", "maxmemory", "0") }
		}},
		{name: "CLIENT PAUSE", outage: true, ttl: longTTL, begin: pausedClients},
		{name: "slow script (BUSY)", outage: true, ttl: longTTL, lasts: 2 * second, begin: slowScript},
		{name: "read-only", outage: true, ttl: longTTL, lasts: 2 * second, begin: func(r *run) func() {
			r.command("replicaof", "127.0.0.1", "1")
			r.mustFail("READONLY", "set", "probe", "x")
			return func() { r.command("replicaof", "no", "one") }
		}},

		{name: "holder killed", ttl: shortTTL, lasts: 0, begin: killed("a holder", holds)},
		{name: "waiter killed", ttl: middleTTL, lasts: 0, begin: killed("a waiter", queues)},
		{name: "waiter stopped", ttl: shortTTL, lasts: 2 * second, begin: stoppedWaiter},
		{name: "holder stopped", ttl: shortTTL, lasts: 3 * second, begin: stoppedHolder},
		{name: "all cores busy", alone: true, steady: true, ttl: longTTL, lasts: 4 * second, begin: busyCores},

		{name: "SENTINEL FAILOVER", sentinel: true, outage: true, loses: true, revive: true, ttl: middleTTL, begin: func(r *run) func() {
			return r.master.Failover
		}, settle: demoted},
		{name: "master killed", sentinel: true, outage: true, loses: true, revive: true, ttl: middleTTL, begin: func(r *run) func() {
			return r.master.Crash
		}},

		{name: "cluster: none", cluster: true, steady: true, ttl: longTTL, lasts: second, begin: func(*run) func() { return func() {} }},
		{name: "cluster: subscribers are killed", cluster: true, ttl: longTTL, lasts: 2 * second, begin: often(200*time.Millisecond, "client", "kill", "type", "pubsub")},
		{name: "cluster: slots migrate", cluster: true, ttl: longTTL, begin: migratedSlots},
		{name: "cluster: a replica is promoted", cluster: true, outage: true, ttl: longTTL, begin: promotedReplica},
		{name: "cluster: a master hangs briefly", cluster: true, outage: true, delays: true, ttl: shortTTL, lasts: second, begin: pausedMaster},
		{name: "cluster: a master hangs", cluster: true, outage: true, lag: connectTime, loses: true, revive: true, ttl: middleTTL, begin: hungMaster, then: rejoined},
		{name: "cluster: a master is killed", cluster: true, outage: true, loses: true, revive: true, ttl: middleTTL, begin: killedMaster},
	}
}

// mixed is two pairs of faults, one on the network each, chosen by the seed.
func mixed(seed uint64) fault {
	r := rand.New(rand.NewPCG(seed, 1))
	var network, others []fault
	for _, f := range faults() {
		switch {
		case f.proxied && !f.outage:
			network = append(network, f)
		case !f.proxied && !f.sentinel && !f.cluster && !f.alone && !f.steady && !f.rotates:
			others = append(others, f)
		}
	}
	m := fault{name: "mixed", proxied: true, ttl: shortTTL}
	for range 2 {
		pair := [2]fault{network[r.IntN(len(network))], others[r.IntN(len(others))]}
		pair[1].outage = pair[1].outage || pair[0].slows && pair[1].cuts
		m.parts = append(m.parts, pair)
		m.resets = m.resets || pair[0].resets
		m.idle = max(m.idle, pair[0].idle)
	}
	return m
}

// onProxies poisons the connections of all processes.
func onProxies(ts ...toxic) func(*run) func() {
	return func(r *run) func() { return r.watch(r.poison(r.proxies, ts)) }
}

// onOneProxy poisons those of one.
func onOneProxy(ts ...toxic) func(*run) func() {
	return func(r *run) func() { return r.watch(r.poison(r.proxies[:1], ts)) }
}

// inBursts poisons again and again, because toxiproxy decides once for each connection whether it is
// spared, and only those that are spared last.
func inBursts(ts ...toxic) func(*run) func() {
	return func(r *run) func() {
		return r.watch(r.meanwhile(func(ctx context.Context) {
			heal := r.poison(r.proxies, ts)
			pass(ctx, 100*time.Millisecond)
			heal()
			pass(ctx, 30*time.Millisecond)
		}))
	}
}

// watch sees to it that the fault which end ends makes itself felt through the first proxy.
func (r *run) watch(end func()) func() {
	var slow atomic.Int64
	stop := r.meanwhile(func(ctx context.Context) {
		if !answers(r.proxies[0].addr(), 15*time.Millisecond) {
			slow.Add(1)
		}
		pass(ctx, 10*time.Millisecond)
	})
	return func() {
		stop()
		r.witness("everything came through at once", slow.Load() > 0)
		end()
	}
}

// meanwhile does something again and again, until the function that it returns is called.
func (r *run) meanwhile(do func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(r.t.Context())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			do(ctx)
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// witness notes whether a fault has really happened. Of two at a time, one may undo the other: a connection that was to
// be half-open is closed by a server that dies.
func (r *run) witness(otherwise string, happened bool) {
	if alone := len(r.fault.parts) == 0; alone && !happened {
		r.fleet.leak("the fault did not happen: " + otherwise)
	}
}

// mustFail sends a command that the fault makes fail with an error.
func (r *run) mustFail(with string, args ...any) {
	err := r.admins[0].Do(r.t.Context(), args...).Err()
	r.witness(fmt.Sprintf("%v: %v", args, err), err != nil && strings.HasPrefix(err.Error(), with))
}

// answers tells whether a server answers a ping over a new connection soon.
func answers(addr string, soon time.Duration) bool {
	conn, err := net.DialTimeout("tcp", addr, soon)
	if err != nil {
		return false
	}
	defer conn.Close() //nolint:errcheck // Nothing was promised to it.
	_ = conn.SetDeadline(time.Now().Add(soon))
	_, err = io.WriteString(conn, "PING\r\n")
	answer := make([]byte, len("+PONG\r\n"))
	if err == nil {
		_, err = io.ReadFull(conn, answer)
	}
	return err == nil
}

func (r *run) poison(proxies []*proxy, ts []toxic) func() {
	var heals []func(context.Context)
	for _, p := range proxies {
		heals = append(heals, p.poison(ts...))
	}
	return func() {
		for _, heal := range heals {
			heal(r.t.Context())
		}
	}
}

func filtered(set func(f *filter, on bool)) func(*run) func() {
	return func(r *run) func() {
		all := func(on bool) {
			for _, p := range r.proxies {
				for _, f := range p.filters {
					set(f, on)
				}
			}
		}
		swallowed := func() (n int64) {
			for _, p := range r.proxies {
				for _, f := range p.filters {
					n += f.swallowed.Load()
				}
			}
			return n
		}
		before := swallowed()
		all(true)
		return func() {
			r.witness("nothing was swallowed", swallowed() > before)
			all(false)
		}
	}
}

// answeredByProxies replaces replies to scripts which ran by errors of the proxies' own.
func answeredByProxies(r *run) func() {
	for _, p := range r.proxies {
		p.answering.Store(true)
	}
	return func() {
		var answered int64
		for _, p := range r.proxies {
			p.answering.Store(false)
			answered += p.answered.Load()
		}
		r.witness("no proxy answered for the server", answered > 0)
		r.t.Logf("%d replies were replaced", answered)
	}
}

func killServer(r *run) func() {
	r.server.Kill()
	return r.server.Restart
}

func killServerAndData(r *run) func() {
	r.server.Kill()
	return func() {
		files, err := os.ReadDir(r.data)
		require.NoError(r.t, err)
		r.witness("there was no data", len(files) > 0)
		for _, file := range files { // Which they are depends on the version.
			require.NoError(r.t, os.RemoveAll(filepath.Join(r.data, file.Name())))
		}
		left, err := os.ReadDir(r.data)
		require.NoError(r.t, err)
		r.witness("data was left", len(left) == 0)
		r.server.Restart()
	}
}

// often repeats a command until the end, on every server. Its reply is "OK", or how often it did something.
func often(pause time.Duration, args ...any) func(*run) func() {
	return func(r *run) func() {
		var hits atomic.Int64
		stop := r.meanwhile(func(ctx context.Context) {
			for _, admin := range r.admins {
				reply, err := admin.Do(ctx, args...).Result()
				if n, isNumber := reply.(int64); err == nil && (!isNumber || n > 0) {
					hits.Add(1)
				}
			}
			pass(ctx, pause)
		})
		return func() {
			stop()
			r.witness(fmt.Sprintf("%v had no effect", args), hits.Load() > 0)
		}
	}
}

// rotatedPassword changes the password of the processes again and again, and ends
// their connections. Their providers learn the new password a moment later.
func rotatedPassword(r *run) func() {
	refused := r.errors("WRONGPASS")
	pauses := rand.New(rand.NewPCG(r.rand.Uint64(), 0)) // r.rand is not for several goroutines
	stop := r.meanwhile(func(ctx context.Context) {
		password := r.newPassword()
		r.witness("connections could not be ended", r.admins[0].Do(r.t.Context(), "client", "kill", "user", rotatedUser).Err() == nil)
		pass(ctx, 50*time.Millisecond+upTo(pauses, 150*time.Millisecond))
		r.tellPassword(password)
		pass(ctx, 200*time.Millisecond+upTo(pauses, 400*time.Millisecond))
	})
	return func() {
		stop()
		r.witness("no password was wrong", r.errors("WRONGPASS") > refused)
	}
}

// rotatedUser is the name by which the processes authenticate.
const rotatedUser = "worker"

// newPassword gives the processes' user a new password, as the only one.
func (r *run) newPassword() string {
	password := fmt.Sprintf("secret-%d", rand.Uint64())
	err := r.admins[0].Do(r.t.Context(), "acl", "setuser", rotatedUser, "reset", "on", ">"+password, "~*", "&*", "+@all").Err()
	r.witness(fmt.Sprintf("the password stayed: %v", err), err == nil)
	return password
}

// tellPassword lets the processes know a password.
func (r *run) tellPassword(password string) {
	require.NoError(r.t, os.WriteFile(r.passwordFile+".new", []byte(password), 0o600))
	require.NoError(r.t, os.Rename(r.passwordFile+".new", r.passwordFile))
}

// pausedClients pauses all clients, this one included.
func pausedClients(r *run) func() {
	d := time.Second + upTo(r.rand, 2*time.Second)
	r.command("client", "pause", d.Milliseconds(), "all")
	return func() { pass(r.t.Context(), d) }
}

// slowScript keeps the server busy, which says so after a moment.
func slowScript(r *run) func() {
	r.command("config", "set", "lua-time-limit", "100")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// It ends by SCRIPT KILL, with an error.
		client := r.server.Client(r.t)
		_ = client.Eval(r.t.Context(), "while true do end", nil).Err()
		_ = client.Close()
	}()
	return func() {
		r.command("script", "kill")
		<-ended
	}
}

// movedName makes the server and its replica change places, in good order, and moves
// the name of the server. The connections for commands follow it. The subscriptions of
// one process or more stay on the old master, which lives on as a replica.
func movedName(r *run) func() {
	const aMoment = 100 * time.Millisecond
	staying := 1 + r.rand.IntN(processes)
	return func() {
		old := r.admins[0]
		r.command("failover")
		awaitInfo(r, old, "role:slave")
		awaitInfo(r, r.replica, "role:master")
		pass(r.t.Context(), upTo(r.rand, aMoment)) // in which the old master answers READONLY
		for _, n := range r.names {
			n.move(r.replica.Options().Addr)
		}
		r.command("client", "kill", "type", "normal", "skipme", "yes")
		for line := range strings.Lines(old.Do(r.t.Context(), "client", "list", "type", "pubsub").String()) {
			id, addr := clientID.FindStringSubmatch(line), clientAddr.FindStringSubmatch(line)
			goes := func(n *name) bool { return addr != nil && n.owns(addr[1]) }
			if id != nil && slices.ContainsFunc(r.names[staying:], goes) {
				_ = old.Do(r.t.Context(), "client", "kill", "id", id[1]).Err() // It may have ended.
			}
		}
		left := old.Do(r.t.Context(), "client", "list", "type", "pubsub").String()
		r.witness("no subscription stayed on the old master", strings.Contains(left, "cmd="))
		r.t.Logf("the subscriptions of %d processes stayed", staying)
		r.admins = []*redis.Client{r.replica, old}
	}
}

var clientID, clientAddr = regexp.MustCompile(`\bid=(\d+)`), regexp.MustCompile(`\baddr=(\S+)`)

// awaitInfo waits until a server says something of its replication.
func awaitInfo(r *run, client *redis.Client, text string) {
	for !strings.Contains(client.Info(r.t.Context(), "replication").Val(), text) {
		require.NoError(r.t, r.t.Context().Err(), text)
		pass(r.t.Context(), 10*time.Millisecond)
	}
}

// servedAfterMove demands that each process gets the line id, for which all wait, soon
// after the name moved: a subscription that stayed behind must not starve its process.
func servedAfterMove(r *run) {
	const aRound = 2 * time.Second // in which each process is served once
	from := now()
	var starved []string
	r.fleet.awaitFor(patience+aRound, func() bool {
		starved = nil
		for _, c := range r.fleet.children {
			isServed := func(op *operation) bool {
				return op.process == c.name && op.id == lineID && op.result == granted && op.sent() > from
			}
			if !c.npm && !slices.ContainsFunc(r.fleet.recorder.operations, isServed) {
				starved = append(starved, c.name)
			}
		}
		return len(starved) == 0
	})
	for _, process := range starved {
		r.fleet.leak(process + " was starved after the name had moved")
	}
}

// killed kills a process that does something, and starts another in its place.
func killed(what string, does func(*child) bool) func(*run) func() {
	return func(r *run) func() {
		c := r.fleet.pick(what, does)
		r.fleet.signal(c, syscall.SIGKILL)
		return func() { r.startWorker(c.pairs[0]) }
	}
}

// stoppedHolder stops a process for longer than its leases last. When it goes on, its
// section must find that the resource refuses it.
func stoppedHolder(r *run) func() {
	c := r.fleet.pick("a holder", holds)
	r.fleet.signal(c, syscall.SIGSTOP)
	return func() {
		sections := r.fleet.sections(c)
		superseded := func(s event) bool { return r.fleet.resource[s.ID] > s.Index }
		over := r.fleet.awaitFor(waitTime, func() bool { return len(sections) == 0 || slices.ContainsFunc(sections, superseded) })
		r.fleet.signal(c, syscall.SIGCONT)
		switch {
		case len(sections) == 0: // It had just released.
			end := stoppedHolder(r)
			pass(r.t.Context(), r.fault.lasts)
			end()
			return
		case !over:
			r.witness("nobody wrote after the holder that was stopped", false)
			return
		}
		r.expect = append(r.expect, expectation{
			"the resource refused nobody, though a holder was stopped for longer than its lease",
			func() bool {
				return slices.ContainsFunc(sections, func(s event) bool { return r.fleet.refused[refusal{c.name, s.ID, s.Index}] })
			},
		})
	}
}

// stoppedWaiter stops a process that is in the queue. It is granted the lock meanwhile, which costs the others one ttl
// if it goes on too late, and nothing if it goes on before the lease has ended.
func stoppedWaiter(r *run) func() {
	c := r.fleet.pick("a waiter", queues)
	r.fleet.signal(c, syscall.SIGSTOP)
	return func() { r.fleet.signal(c, syscall.SIGCONT) }
}

// demoted returns when all but the master know that they are none. Until then an old one takes writes, and
// loses them.
func demoted(r *run) {
	for _, replica := range r.master.Replicas() {
		client := replica.Client(r.t)
		for !strings.Contains(client.Info(r.t.Context(), "replication").Val(), "role:slave") {
			pass(r.t.Context(), 50*time.Millisecond)
		}
	}
}

// busyCores gives each core two processes that never rest.
func busyCores(r *run) func() {
	var burners []*exec.Cmd
	for range 2 * runtime.NumCPU() {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), burnVariable+"="+strconv.Itoa(os.Getpid()))
		require.NoError(r.t, cmd.Start())
		burners = append(burners, cmd)
	}
	return func() {
		for _, cmd := range burners {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			r.witness("a core was not kept busy to the end", cmd.ProcessState.ExitCode() == -1) // by the signal
		}
	}
}

const burnVariable = "REDFOUR_FAULTS_BURN"

// RunBurner makes a test binary use one core until it is killed, if its environment asks for that.
func RunBurner() bool {
	parent, ok := os.LookupEnv(burnVariable)
	for ok && strconv.Itoa(os.Getppid()) == parent {
		for range 1_000_000_000 {
			_ = rand.Uint64()
		}
	}
	return ok
}
