package faults

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

const (
	processes = 3
	workers   = 6 // in each

	namespace = "faults"
)

// A run is one server or several, one fleet, and the faults that befall them.
type run struct {
	t       *testing.T
	rand    *rand.Rand
	fault   fault
	server  *redistest.Server   // nil with Sentinel, and in a cluster
	data    string              // its directory
	replica *redis.Client       // of the server's replica; nil unless its name moves
	names   []*name             // of the server, one for each proxy; likewise
	master  *redistest.Failover // nil without Sentinel
	cluster *redistest.Cluster  // nil without one
	target  target              // there
	admins  []*redis.Client     // of each server; with Sentinel of the master alone
	proxies []*proxy
	fleet   *fleet
	expect  []expectation

	passwordFile string // what the processes know of their password; "": they need none
}

// An expectation is something that has to be so at the end of a run.
type expectation struct {
	otherwise string
	holds     func() bool
}

// runFault lets a fleet work, lets the fault happen, and judges the history.
func runFault(t *testing.T, f fault, seed uint64) *verdict {
	t.Helper()
	r := &run{t: t, rand: rand.New(rand.NewPCG(seed, 0)), fault: f, fleet: newFleet(t)}
	r.startServers()
	for place := range processes {
		r.startWorker(place)
	}
	if r.server != nil && haveNPM() {
		r.startNPM()
	}
	r.awaitGrants()
	pass(t.Context(), upTo(r.rand, 500*time.Millisecond))
	r.strike(f)
	r.demandGrants("afterwards")

	h := r.fleet.stop()
	h.steady, h.proxied = f.steady, f.proxied
	v := judge(h)
	r.checkEnd(h, v)
	return v
}

func (r *run) startServers() {
	args := []string{"--appendonly", "yes", "--appendfsync", "always"}
	if r.fault.sentinel {
		r.master = redistest.StartSentinels(r.t, 2, 3, 3*time.Second, args...)
		r.admins = append(r.admins, r.master.Client(r.t))
		return
	}
	if r.fault.cluster {
		r.startCluster()
		return
	}
	r.data = r.t.TempDir()
	r.server = redistest.Start(r.t, append(args, "--dir", r.data)...)
	r.admins = append(r.admins, r.server.Client(r.t))
	if r.fault.rotates {
		r.passwordFile = filepath.Join(r.t.TempDir(), "password")
		r.tellPassword(r.newPassword())
	}
	if r.fault.moves {
		r.replica = redistest.Start(r.t, append(args, "--replicaof", "127.0.0.1", strconv.Itoa(r.server.Port()))...).Client(r.t)
		awaitInfo(r, r.replica, "master_link_status:up")
	}
	for n := 0; r.fault.proxied && n < processes; n++ {
		addr := r.server.Addr()
		if r.fault.moves {
			r.names = append(r.names, newName(r.t, addr))
			addr = r.names[n].addr()
		}
		r.proxies = append(r.proxies, newProxy(r.t, addr, r.fault.resets))
	}
}

// strike lets a fault happen, and tells the judge.
func (r *run) strike(f fault) {
	for _, pair := range f.parts {
		r.t.Logf("%s, and %s", pair[0].name, pair[1].name)
		network := r.begin(pair[0])
		pass(r.t.Context(), upTo(r.rand, pair[0].lasts/2))
		r.strike(pair[1])
		pass(r.t.Context(), upTo(r.rand, pair[0].lasts/2))
		network()
	}
	if len(f.parts) > 0 {
		return
	}
	end := r.begin(f)
	pass(r.t.Context(), f.lasts/2+upTo(r.rand, f.lasts+1))
	end()
	if f.then != nil {
		f.then(r)
	}
}

// begin lets a fault begin. The function that it returns ends it, and tells the judge.
func (r *run) begin(f fault) (end func()) {
	from := now()
	endFault := f.begin(r)
	return func() {
		endFault()
		to := now()
		settled := to
		if f.settle != nil {
			f.settle(r)
			settled = now()
		}
		r.fleet.mu.Lock()
		defer r.fleet.mu.Unlock()
		h := &r.fleet.recorder.history
		if f.outage {
			h.outages = append(h.outages, outage{from, to.add(f.lag), r.target.silent})
		}
		if f.loses {
			r.loseLocked(from, settled)
		}
		h.mixed = len(r.fault.parts) > 0
		if f.delays {
			h.freezes = append(h.freezes, outage{from, to, r.target.ids})
		}
	}
}

// loseLocked tells the judge that leases may have been lost.
func (r *run) loseLocked(from, to instant) {
	h := &r.fleet.recorder.history
	h.losses = append(h.losses, loss{from, to, r.fault.revive, r.target.ids})
}

// awaitGrants waits until each id has been granted several times from now on, and for little longer than patience
// and the leases that nobody has if one is not. It returns the ids that were not granted at all, but for slow ones: all may be busy with another.
func (r *run) awaitGrants() (never []string) {
	r.fleet.mu.Lock()
	before := maps.Clone(r.fleet.grants)
	r.fleet.mu.Unlock()
	const few, some, many = 2, 3, 20
	enough := map[string]int{lineID: some, fickleID: many}
	for n := range quickIDs {
		enough[quickID(n)] = many
	}
	for n := range slowIDs {
		enough[slowID(n)] = few
	}
	for n := range processes {
		enough[calmID(n)] = many
	}
	for n := range forcedIDs {
		enough[forcedID(n)] = few
	}
	lost := shortTTL
	if r.fault.revive {
		lost = r.fault.ttl
	}
	r.fleet.awaitFor(r.fault.lag+lost+patience+time.Second, func() bool {
		never = nil
		all := true
		for id, n := range enough {
			got := r.fleet.grants[id] - before[id]
			if got == 0 && n > few {
				never = append(never, id)
			}
			all = all && got >= n
		}
		return all
	})
	return never
}

// demandGrants demands that the ids can be had.
func (r *run) demandGrants(when string) {
	for _, id := range r.awaitGrants() {
		r.fleet.leak(id + " was granted to nobody " + when)
	}
}

// startWorker starts a process of ours. Each place needs one, because two that are neighbours share a calm id.
func (r *run) startWorker(place int) {
	j := job{
		Namespace: namespace, Seed: r.rand.Uint64(), Workers: workers, TTL: r.fault.ttl.Milliseconds(),
		Pairs: []int{place, (place + 1) % processes}, Idle: r.fault.idle, PasswordFile: r.passwordFile,
	}
	switch {
	case r.master != nil:
		j.Master, j.Sentinels = r.master.MasterName, r.master.SentinelAddrs()
	case r.cluster != nil:
		j.Cluster = r.cluster.Options().Addrs
		j.Workers = workers / 2 // The machine has six servers to run beside them.
	case len(r.proxies) > 0:
		j.Addr = r.proxies[place].addr()
	default:
		j.Addr = r.server.Addr()
	}
	r.fleet.start(j)
}

// startNPM starts a process with npm redfour, on the quick ids.
func (r *run) startNPM() {
	ids := make([]string, 0, quickIDs)
	for n := range quickIDs {
		ids = append(ids, quickID(n))
	}
	addr := r.server.Addr()
	if len(r.proxies) > 0 {
		addr = r.proxies[0].addr()
	}
	cmd := exec.Command("node", "npm.js", "redis://"+addr, namespace, strings.Join(ids, ","),
		fmt.Sprint(shortTTL.Milliseconds()))
	cmd.Env = append(cmd.Environ(), "NODE_PATH="+npmPackages)
	r.fleet.launch(cmd, "npm", nil)
}

const npmPackages = "../interop/node_modules"

// haveNPM tells whether npm redfour can take part.
func haveNPM() bool {
	_, errNode := exec.LookPath("node")
	_, errPackage := os.Stat(npmPackages + "/redfour")
	return errNode == nil && errPackage == nil
}

func (r *run) command(args ...any) {
	r.t.Helper()
	require.NoError(r.t, r.admins[0].Do(r.t.Context(), args...).Err(), args)
}

// checkEnd demands that nothing is left when everybody has gone.
func (r *run) checkEnd(h *history, v *verdict) {
	for _, leak := range r.fleet.leaks {
		v.violate("end: %s", leak)
	}
	for _, e := range r.expect {
		if !e.holds() {
			v.violate("end: %s", e.otherwise)
		}
	}
	// A lease that was on its way to a process when all ended lasts its time.
	all, _ := h.leases()
	leases := byGrant(all)
	for _, key := range r.keys() {
		id, isLock := strings.CutPrefix(key, namespace+":")
		if busy := h.of(id).busy(id, leases[id]); isLock && len(busy) > 0 {
			pass(r.t.Context(), busy[len(busy)-1].to.sub(now())+100*time.Millisecond)
		}
	}
	for _, key := range r.keys() {
		if key != namespace+"index" {
			v.violate("end: key %s is left: %v", key, r.contents(key))
		}
	}
	for _, client := range r.connections() {
		v.violate("end: a connection is left: %s", client)
	}
}

// keys returns all keys, with their names as they are outside a cluster.
func (r *run) keys() []string {
	r.t.Helper()
	admins := r.admins
	if r.cluster != nil {
		admins = nil
		for _, master := range r.cluster.Masters() {
			admins = append(admins, master.Client(r.t))
		}
	}
	var all []string
	for _, admin := range admins {
		keys, err := admin.Keys(r.t.Context(), "*").Result()
		require.NoError(r.t, err)
		for _, key := range keys {
			all = append(all, bucket.ReplaceAllLiteralString(key, namespace))
		}
	}
	return all
}

// contents returns what can be told of a key that should not be there; outside a cluster, whose keys have other names here.
func (r *run) contents(key string) any {
	hash, _ := r.admins[0].HGetAll(r.t.Context(), key).Result()
	list, _ := r.admins[0].LRange(r.t.Context(), key, 0, -1).Result()
	return fmt.Sprint(hash, list, ", ", r.admins[0].PTTL(r.t.Context(), key).Val(), " left")
}

// connections returns what the servers say of connections that have to be closed by now. With Sentinel, and in a cluster, some
// are not from the processes; those that are have a name in a cluster.
func (r *run) connections() []string {
	var all []string
	for _, admin := range r.admins {
		for line := range strings.Lines(admin.ClientList(r.t.Context()).Val()) {
			named, mine := strings.Contains(line, " name="+namespace+" "), strings.Contains(line, " cmd=client")
			link := strings.Contains(line, " flags=S") || strings.Contains(line, " flags=M") // between two servers
			if named || r.server != nil && !mine && !link {
				all = append(all, line)
			}
		}
	}
	return all
}

// pass lets time go by.
func pass(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
