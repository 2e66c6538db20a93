package faults

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
	"github.com/redfour-go/redfour/internal/slot"
)

// nodeTimeout is for how long a server of a cluster may be silent until the others believe it dead. On a busy machine a living one
// may be silent for a second.
const nodeTimeout = 3 * time.Second

// connectTime is for how long the library waits when it subscribes. Where it has begun that on a master which hangs, just before others
// replaced that, its waiters hear of nothing for so long.
const connectTime = 5 * time.Second

// bucket is what the names of keys begin with in a cluster, where others begin with the namespace.
var bucket = regexp.MustCompile(`^\{` + namespace + `:\d+\}`)

// slotOf returns where a lock is in a cluster.
func slotOf(id string) int {
	const buckets = 256
	return slot.Of(fmt.Sprintf("{%s:%d}", namespace, slot.Sum(id)%buckets))
}

// A target is what a fault befalls in a cluster.
type target struct {
	slot   int
	master *redistest.Server // of the slot, at first
	ids    []string          // of the locks there
	silent []string          // of those that cannot be had meanwhile; nil: all
}

// startCluster starts a cluster. When a master is gone, the others serve their own slots or none, depending on the seed.
func (r *run) startCluster() {
	coverage := []string{"yes", "no"}[r.rand.IntN(2)]
	r.cluster = redistest.StartCluster(r.t, 3, 1,
		"--cluster-node-timeout", strconv.FormatInt(nodeTimeout.Milliseconds(), 10), "--cluster-require-full-coverage", coverage)
	for _, server := range r.cluster.Servers() {
		r.admins = append(r.admins, server.Client(r.t))
	}
	ids := allIDs()
	r.target.slot = slotOf(ids[r.rand.IntN(len(ids))])
	r.target.master = r.cluster.MasterOf(r.target.slot)
	r.target.ids = slices.DeleteFunc(ids, func(id string) bool { return r.cluster.MasterOf(slotOf(id)) != r.target.master })
	if coverage == "no" {
		r.target.silent = r.target.ids
	}
	r.t.Logf("full coverage: %s; the target has %d ids", coverage, len(r.target.ids))
}

// migratedSlots moves each slot that is used to another master, under load.
func migratedSlots(r *run) func() {
	return func() {
		masters := r.cluster.Masters()
		var moved []int
		for _, id := range allIDs() {
			n := slotOf(id)
			if slices.Contains(moved, n) {
				continue
			}
			moved = append(moved, n)
			from := slices.Index(masters, r.cluster.MasterOf(n))
			to := masters[(from+1+r.rand.IntN(len(masters)-1))%len(masters)]
			r.cluster.BeginMigration(n, to)
			pass(r.t.Context(), upTo(r.rand, 100*time.Millisecond))
			r.cluster.MoveKeys(n, to)
			pass(r.t.Context(), upTo(r.rand, 50*time.Millisecond))
			r.cluster.FinishMigration(n, to)
		}
		for _, answer := range []string{"ASK", "TRYAGAIN", "MOVED"} {
			r.witness("nobody was told "+answer, r.errors(answer) > 0)
		}
	}
}

// errors returns how often servers have answered with an error.
func (r *run) errors(name string) int {
	count := regexp.MustCompile(`errorstat_` + name + `:count=(\d+)`)
	all := 0
	for _, admin := range r.admins {
		if found := count.FindStringSubmatch(admin.Info(r.t.Context(), "errorstats").Val()); found != nil {
			n, err := strconv.Atoi(found[1])
			require.NoError(r.t, err)
			all += n
		}
	}
	return all
}

// promotedReplica has a replica and its master change places, in good order.
func promotedReplica(r *run) func() {
	return func() {
		r.witness("the master stayed", r.cluster.Failover(r.target.slot) != r.target.master)
	}
}

// pausedMaster stops a master for so short a time that the others do not replace it.
func pausedMaster(r *run) func() {
	master := r.target.master
	master.Pause()
	return func() {
		r.witness("the master answered", !answers(master.Addr(), 200*time.Millisecond))
		master.Resume()
		r.witness("the master was replaced", r.cluster.MasterOf(r.target.slot) == master)
	}
}

// hungMaster stops a master until the others have replaced it.
func hungMaster(r *run) func() {
	r.target.master.Pause()
	return r.replaced
}

// killedMaster ends a master for good.
func killedMaster(r *run) func() {
	r.target.master.Kill()
	return r.replaced
}

func (r *run) replaced() { r.cluster.AwaitNewMaster(r.target.slot, r.target.master) }

// rejoined lets a master go on that has been replaced, once all do without it. Until it knows that it is none it takes writes, and
// loses them.
func rejoined(r *run) {
	r.demandGrants("while the old master hung")
	r.witness("the old master answered", !answers(r.target.master.Addr(), 200*time.Millisecond))
	from := now()
	r.target.master.Resume()
	r.cluster.ReplicaOf(r.cluster.MasterOf(r.target.slot))
	r.fleet.mu.Lock()
	defer r.fleet.mu.Unlock()
	r.loseLocked(from, now())
}
