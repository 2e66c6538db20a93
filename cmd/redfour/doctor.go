package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour"
)

const doctorHelp = `
It looks at the version of the server, at what may evict a lock or lose it in a restart or a failover, at its clock and its replicas.
Then, with the rights of this user, it takes a lock that nobody uses, hands it from a holder to a waiter, and measures that. It
leaves nothing behind but the counter of the namespace. It exits with 1 if there is a problem; a warning is none.

Examples:
  redfour doctor
  REDIS_URL=rediss://app:secret@redis.example:6379 redfour doctor --namespace orders
  redfour doctor --json | jq 'select(.result != "ok")'
`

// What a check may come to.
const (
	fine    = "ok"
	warning = "warning" // it works, and could be safer or faster
	problem = "problem" // locks do not work, or not as they should
)

// A finding is what a check has come to.
type finding struct {
	Check  string `json:"check"`
	Result string `json:"result"`
	Found  string `json:"found"`
	Advice string `json:"advice,omitempty"`
	Server string `json:"server,omitempty"` // where not all masters of a cluster are meant
}

// A doctor is one call of "redfour doctor".
type doctor struct {
	*tool

	client    redis.UniversalClient
	roundTrip time.Duration
	problems  int
}

func newDoctor(t *tool, _ *flag.FlagSet) func(ctx context.Context, o operands) error {
	d := &doctor{tool: t}
	return d.do
}

func (d *doctor) do(ctx context.Context, o operands) error {
	if len(o.all()) > 0 {
		return usage("the doctor takes no operands; a URL goes behind --url") // It may contain a password.
	}
	client, err := d.server.client()
	if err != nil {
		return err
	}
	defer func() { _ = client.Close() }()
	d.client = client
	lock, err := d.lock(client) // finds what is wrong with the arguments
	if err != nil {
		return err
	}
	_ = lock.Close()
	ctx, stop := untilSignal(ctx)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute) // Each part takes seconds at most.
	defer cancel()
	for _, check := range []func(context.Context) ([]finding, error){d.connection, d.servers, d.locks} {
		found, err := check(ctx)
		if err != nil {
			return cmp.Or(context.Cause(ctx), err)
		}
		for _, f := range found {
			d.report(f)
		}
	}
	if d.problems > 0 {
		return &failure{code: exitNo, err: errors.New("there are problems"), silent: true}
	}
	return nil
}

func (d *doctor) report(f finding) {
	if f.Result == problem {
		d.problems++
	}
	if d.json {
		d.printJSON(os.Stdout, f)
		return
	}
	if f.Server != "" {
		f.Found = f.Server + ": " + f.Found
	}
	fmt.Printf("%-7s  %-11s  %s\n", f.Result, f.Check, printable(f.Found))
	if f.Advice != "" {
		fmt.Printf("%-7s  %-11s  -> %s\n", "", "", f.Advice)
	}
}

// connection finds out how long a round trip takes, if there is a server at all.
func (d *doctor) connection(ctx context.Context) ([]finding, error) {
	const pings = 5
	var took []time.Duration
	for range pings {
		began := time.Now()
		if err := d.client.Ping(ctx).Err(); err != nil {
			return nil, err
		}
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	d.roundTrip = took[pings/2]
	return []finding{{Check: "connection", Result: fine, Found: "a round trip takes " + short(d.roundTrip)}}, nil
}

// servers looks at the server, or at all masters of a cluster.
func (d *doctor) servers(ctx context.Context) ([]finding, error) {
	cluster, ok := d.client.(*redis.ClusterClient)
	if !ok {
		return examine(ctx, d.client, false)
	}
	var mu sync.Mutex
	var gone []finding
	of := make(map[string][]finding) // by address
	err := cluster.ForEachMaster(ctx, func(ctx context.Context, master *redis.Client) error {
		addr := master.Options().Addr
		found, err := examine(ctx, master, true)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			gone = append(gone, finding{"connection", problem, err.Error(), "see why; until a replica is promoted its locks are out of reach", addr})
			return ctx.Err()
		}
		of[addr] = found
		return nil
	})
	return append(gone, common(of)...), err
}

// common makes one finding of those that all masters have in common.
func common(of map[string][]finding) []finding {
	var all []finding
	addrs := slices.Sorted(maps.Keys(of))
	if len(addrs) == 0 {
		return nil
	}
	for i := range of[addrs[0]] {
		first := of[addrs[0]][i]
		if !slices.ContainsFunc(addrs, func(addr string) bool { return of[addr][i] != first }) {
			all = append(all, first)
			continue
		}
		for _, addr := range addrs {
			f := of[addr][i]
			f.Server = addr
			all = append(all, f)
		}
	}
	return all
}

// examine looks at one server. What it finds is in the same order for each.
func examine(ctx context.Context, client redis.UniversalClient, cluster bool) ([]finding, error) {
	text, err := client.Info(ctx).Result()
	if err != nil && !redis.IsPermissionError(err) {
		return nil, err
	}
	i := parseInfo(text)
	found := []finding{i.version(cluster), i.role(cluster), i.eviction(), i.persistence(fsync(ctx, client)), i.replicas()}
	if err != nil {
		for n := range found {
			found[n] = finding{
				Check: found[n].Check, Result: warning, Found: "not known: this user may not ask INFO", Advice: "run the doctor as a user with +info",
			}
		}
	}
	clock, err := clock(ctx, client)
	return append(found, clock), err
}

// clock compares the clocks of the server and of this host. Leases need no agreement, because Redis alone ends them, but an index
// is at least the server's time, and another server must not be behind it after a failover.
func clock(ctx context.Context, client redis.UniversalClient) (finding, error) {
	const tolerable = time.Second
	f := finding{Check: "clock", Result: fine}
	before := time.Now()
	there, err := client.Time(ctx).Result()
	after := time.Now()
	if err != nil {
		f.Result, f.Found = problem, "it does not tell the time: "+err.Error()
		if redis.IsPermissionError(err) {
			f.Advice = rightsAdvice
		}
		return f, ctx.Err()
	}
	ahead := there.Sub(before.Add(after.Sub(before) / 2))
	uncertain := after.Sub(before) / 2
	switch {
	case ahead.Abs()-uncertain <= tolerable:
		f.Found = fmt.Sprintf("that of Redis and that of this host differ by less than %v", tolerable)
	default:
		f.Result = warning
		f.Found = fmt.Sprintf("that of Redis is %s ahead of this host's", short(ahead))
		if ahead < 0 {
			f.Found = fmt.Sprintf("that of Redis is %s behind this host's", short(-ahead))
		}
		f.Advice = "let NTP keep both, by slewing: indexes grow across a failover only if the new server's clock is not behind, " +
			"and a clock that is set forward ends leases early"
	}
	return f, nil
}

// fsync returns when the server writes its append-only file to disk, "" if this user may not know.
func fsync(ctx context.Context, client redis.UniversalClient) string {
	settings, err := client.ConfigGet(ctx, "appendfsync").Result()
	if err != nil {
		return ""
	}
	return settings["appendfsync"]
}

// An info is what INFO says.
type info map[string]string

func parseInfo(text string) info {
	i := make(info)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), ":"); ok {
			i[name] = value
		}
	}
	return i
}

func (i info) int(name string) int64 {
	n, _ := strconv.ParseInt(i[name], 10, 64)
	return n
}

func (i info) version(cluster bool) finding {
	f := finding{Check: "version", Result: fine, Found: "Redis " + i["redis_version"]}
	if i["valkey_version"] != "" {
		f.Found = "Valkey " + i["valkey_version"]
	}
	var major, minor int
	_, _ = fmt.Sscanf(i["redis_version"], "%d.%d", &major, &minor)
	switch {
	case major < 6 || major == 6 && minor < 2:
		f.Result, f.Advice = problem, "Redis 6.2 or newer is needed"
	case cluster && major < 7:
		f.Result = warning
		f.Advice = "before Redis 7 a cluster has no channels that belong to slots: releases wake all waiters, and whoever is first wins"
	}
	return f
}

func (i info) role(cluster bool) finding {
	f := finding{Check: "role", Result: fine, Found: i["redis_mode"] + " " + i["role"]}
	switch {
	case i["redis_mode"] == "sentinel":
		f.Result, f.Found, f.Advice = problem, "a Sentinel", "say whose: redis://host:26379?master_name=NAME"
	case i["redis_mode"] == "cluster" && !cluster:
		f.Result, f.Advice = problem, "say --cluster: a lock has another name in a cluster"
	case i["role"] != "master":
		f.Result, f.Advice = problem, "locks need the master"
	}
	return f
}

func (i info) eviction() finding {
	policy, limit := i["maxmemory_policy"], i.int("maxmemory")
	f := finding{Check: "eviction", Result: fine, Found: "maxmemory-policy " + policy}
	switch {
	case limit == 0:
		f.Found += ", and no maxmemory, so nothing is evicted"
		if policy != "noeviction" {
			f.Result, f.Advice = warning, "set maxmemory-policy noeviction before anybody sets maxmemory"
		}
	case policy != "noeviction":
		f.Result, f.Advice = problem, "set maxmemory-policy noeviction: any other may evict a lock that is held"
	case i.int("used_memory") > limit/10*9:
		f.Result = warning
		f.Found += fmt.Sprintf(", and %d%% of maxmemory are used", i.int("used_memory")*100/limit)
		f.Advice = "give it more memory: a Redis that is full grants no lock"
	}
	return f
}

func (i info) persistence(fsync string) finding {
	f := finding{Check: "persistence", Result: fine}
	switch {
	case i["aof_enabled"] != "1":
		f.Result, f.Found = warning, "appendonly no: a restart loses leases that are held"
		f.Advice = "set appendonly yes and appendfsync always, or let nothing depend on a lease that a restart may lose"
	case i["aof_last_write_status"] != "ok":
		f.Result, f.Found, f.Advice = problem, "appendonly yes, but the last write to the file has failed", "look into the log of Redis"
	case fsync == "always":
		f.Found = "appendonly yes, appendfsync always: a restart keeps all leases"
	case fsync == "":
		f.Result, f.Found = warning, "appendonly yes; this user may not ask for appendfsync: if it is not \"always\", a crash loses leases of the last moment"
		f.Advice = "run the doctor as a user with +config|get"
	default:
		f.Result, f.Found = warning, "appendonly yes, appendfsync "+fsync+": a crash of the machine loses leases of the last moment"
		f.Advice = "set appendfsync always, or let nothing depend on a lease that a restart may lose"
	}
	return f
}

func (i info) replicas() finding {
	const (
		tolerable = 1       // s since a replica has acknowledged; they do so every second
		behind    = 1 << 20 // bytes
	)
	n := i.int("connected_slaves")
	f := finding{Check: "replicas", Result: fine, Found: fmt.Sprintf("%d", n)}
	if n == 0 {
		f.Found = "none: when the server is gone, so are its locks until it is back"
		return f
	}
	var lag, missing int64
	for r := range n {
		state, replica := "", i[fmt.Sprintf("slave%d", r)]
		for pair := range strings.SplitSeq(replica, ",") {
			name, value, _ := strings.Cut(pair, "=")
			number, _ := strconv.ParseInt(value, 10, 64)
			switch name {
			case "state":
				state = value
			case "lag":
				lag = max(lag, number)
			case "offset":
				missing = max(missing, i.int("master_repl_offset")-number)
			}
		}
		if state != "online" {
			f.Result, f.Found = warning, fmt.Sprintf("%d, of which one is not online but %q", n, state)
			f.Advice = "see why; a failover to it would lose leases"
			return f
		}
	}
	f.Found = fmt.Sprintf("%d, the last of them %d bytes behind, heard of within %d s", n, missing, lag+1)
	if lag > tolerable || missing > behind {
		f.Result, f.Advice = warning, "see why it lags: a failover to it would lose leases; WithReplicas waits for n of them"
	}
	return f
}

const rightsAdvice = "docs/security.md lists the least rights"

// locks uses a lock. In a cluster it uses several, which are on all masters most likely.
func (d *doctor) locks(ctx context.Context) ([]finding, error) {
	locks := 1
	if d.cluster {
		locks = 16
	}
	var found []finding
	for range locks {
		found = d.exercise(ctx)
		if slices.ContainsFunc(found, func(f finding) bool { return f.Result != fine }) {
			break
		}
	}
	return found, ctx.Err()
}

// exercise does with a lock what two processes would do that share it: one holds it, the other waits, and gets it.
func (d *doctor) exercise(ctx context.Context) []finding {
	ttl := 3*time.Second + 20*d.roundTrip
	trouble := func(err error) []finding {
		f := finding{Check: "locks", Result: problem, Found: err.Error()}
		if redis.IsPermissionError(err) {
			f.Advice = rightsAdvice
		}
		return []finding{f}
	}
	var log bytes.Buffer
	holder, err := d.lock(d.client)
	if err != nil {
		return trouble(err)
	}
	defer func() { _ = holder.Close() }()
	waiter, err := d.lock(d.client, redfour.WithLogger(slog.New(slog.NewJSONHandler(&log, nil))))
	if err != nil {
		return trouble(err)
	}
	defer func() { _ = waiter.Close() }()

	id := "redfour-doctor-" + rand.Text()
	lease, err := holder.Acquire(ctx, id, ttl)
	if err != nil {
		return trouble(err)
	}
	if err := holder.Renew(ctx, lease, ttl); err != nil {
		return trouble(err)
	}
	type result struct {
		at  time.Time
		err error
	}
	done := make(chan result, 1)
	go func() {
		next, err := waiter.WaitAcquire(ctx, id, ttl)
		at := time.Now()
		if err == nil {
			err = waiter.Release(ctx, next)
		}
		done <- result{at, err}
	}()
	awaitWaiter(ctx, holder, waiter, id, time.Second+10*d.roundTrip)
	released := time.Now()
	if err := holder.Release(ctx, lease); err != nil {
		return trouble(err)
	}
	r := <-done
	if r.err != nil {
		return trouble(r.err)
	}
	_ = waiter.Close() // After this nothing is logged.
	return []finding{
		{Check: "locks", Result: fine, Found: "acquired, renewed and released one"},
		handOver(waiter.Stats(), r.at.Sub(released), reason(log.Bytes())),
	}
}

// awaitWaiter waits until the waiter stands in the queue, or at least hears of releases, or seems unable to either.
func awaitWaiter(ctx context.Context, holder, waiter *redfour.Lock, id string, limit time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		status, err := holder.Inspect(ctx, id)
		if err == nil && len(status.Waiters) > 0 && waiter.Stats().Subscriptions > 0 {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// handOver tells how the waiter came to its lease, from what it has counted.
func handOver(s redfour.Stats, took time.Duration, why string) finding {
	f := finding{Check: "hand-over", Result: fine}
	switch {
	case s.WokenByGrant > 0:
		f.Found = "a release handed the lock to a waiter, who had it after " + short(took)
		return f
	case s.WokenByMessage > 0:
		f.Result, f.Found = warning, "waiters hear of releases, but cannot queue: whoever is first wins"
	default:
		f.Result, f.Found = problem, "waiters do not hear of releases, and wait until a lease would have ended"
	}
	if why != "" {
		f.Found += ": " + why
	}
	if strings.Contains(why, "NOPERM") || strings.Contains(why, "can't") { // The latter is what scripts are told.
		f.Advice = rightsAdvice
	}
	return f
}

// reason returns why waiters could not queue, or hear of releases, as the Lock has logged it.
func reason(log []byte) string {
	for line := range bytes.Lines(log) {
		var entry struct{ Reason, Error string }
		if json.Unmarshal(line, &entry) == nil && entry.Reason+entry.Error != "" {
			return cmp.Or(entry.Reason, entry.Error)
		}
	}
	return ""
}
