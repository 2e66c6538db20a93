//go:build unix

package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// What miniredis cannot show: permissions, limits, roles, Lua's own numbers, and
// what a real server counts. How calls live through its failures is in
// real_faults_test.go.

// A realRedis is a server that a test has for itself.
type realRedis struct {
	*redistest.Server

	admin *redis.Client // for the test's own look at the server
}

func startReal(tb testing.TB, args ...string) *realRedis {
	tb.Helper()
	s := redistest.Start(tb, args...)
	return &realRedis{s, s.Client(tb)}
}

// options are go-redis's defaults, but for the way to the server.
func (r *realRedis) options(via ...*link) *redis.Options {
	o := r.Options()
	o.Dialer = new(net.Dialer).DialContext
	for _, l := range via {
		o.Dialer = l.through(o.Dialer)
	}
	return o
}

// lock makes a Lock with a client of its own.
func (r *realRedis) lock(tb testing.TB, via ...*link) *redfour.Lock {
	tb.Helper()
	return newLock(tb, newClient(tb, r.options(via...), via...))
}

func (r *realRedis) do(t *testing.T, args ...any) string {
	t.Helper()
	reply, err := r.admin.Do(t.Context(), args...).Result()
	require.NoError(t, err)
	return fmt.Sprint(reply)
}

// locks returns the keys of the locks that there are.
func (r *realRedis) locks(t *testing.T) []string {
	t.Helper()
	keys, err := r.admin.Keys(t.Context(), "lock:*").Result()
	require.NoError(t, err)
	return keys
}

// listeners counts the subscriptions to the release channel.
func (r *realRedis) listeners(t *testing.T) int64 {
	t.Helper()
	n, err := r.admin.PubSubNumSub(t.Context(), "lock-release").Result()
	require.NoError(t, err)
	return n["lock-release"]
}

// connections returns how the server describes its connections of a type.
func (r *realRedis) connections(t *testing.T, kind string) []string {
	t.Helper()
	return strings.Split(strings.TrimSpace(r.do(t, "CLIENT", "LIST", "TYPE", kind)), "\n")
}

// calls returns how often the server ran a command since CONFIG RESETSTAT.
func (r *realRedis) calls(t *testing.T, command string) int {
	t.Helper()
	_, stats, found := strings.Cut(r.do(t, "INFO", "commandstats"), "cmdstat_"+command+":calls=")
	if !found {
		return 0
	}
	digits, _, _ := strings.Cut(stats, ",")
	n, err := strconv.Atoi(digits)
	require.NoError(t, err)
	return n
}

// answered counts the scripts that match and whose replies came back over way.
func answered(way *link, match func(redis.Cmder) bool) *atomic.Int64 {
	n := new(atomic.Int64)
	way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
		if _, err := valuesOf(cmd); err == nil && match(cmd) {
			n.Add(1)
		}
		return nil
	})
	return n
}

// sleeper starts the first waiter of a Lock, on a lock that is held, and returns when
// it waits: it has looked, subscribed, and looked again.
func sleeper(t *testing.T, l *redfour.Lock, way *link, id string) <-chan acquired {
	t.Helper()
	looks := answered(way, isAcquire)
	got := waitFor(t.Context(), l, id, time.Minute)
	eventually(t, func() bool { return looks.Load() >= 2 }, "two looks")
	return got
}

func TestRealWaitAcquire_thousandIdsShareOneConnectionAndOneSubscription(t *testing.T) {
	const ids = 1000
	r := startReal(t)
	holder := r.lock(t)
	held := make([]*redfour.Lease, ids)
	inParallel(16, ids, func(i int) { held[i], _ = holder.Acquire(t.Context(), strconv.Itoa(i), time.Minute) })
	require.NotContains(t, held, (*redfour.Lease)(nil))
	r.do(t, "CONFIG", "RESETSTAT")

	way := new(link)
	looks := answered(way, isAcquire)
	o := r.options(way)
	o.PoolSize, o.PipelinePoolSize = 1, -1 // one connection for both
	o.ClientName = "waiter"
	l := newLock(t, newClient(t, o, way))
	waiting := make([]<-chan acquired, ids)
	for i := range waiting {
		waiting[i] = waitFor(t.Context(), l, strconv.Itoa(i), time.Minute)
	}
	eventually(t, func() bool { return looks.Load() >= ids && r.listeners(t) == 1 }, "a look at each")
	require.Len(t, r.connections(t, "pubsub"), 1)
	require.Equal(t, 1, strings.Count(r.do(t, "CLIENT", "LIST", "TYPE", "normal"), "name=waiter "))

	errs := make([]error, ids)
	inParallel(16, ids, func(i int) { errs[i] = holder.Release(t.Context(), held[i]) })
	require.NoError(t, errors.Join(errs...))
	for i, c := range waiting {
		lease := takeLease(t, c)
		require.Equal(t, strconv.Itoa(i), lease.ID)
		held[i] = lease
	}
	inParallel(16, ids, func(i int) { errs[i] = l.Release(t.Context(), held[i]) })
	require.NoError(t, errors.Join(errs...))
	require.Empty(t, r.locks(t))
	// One at a time, which is checked above; a machine that is slow to answer a ping may lose one.
	require.LessOrEqual(t, way.subscriptions(), 3)
	// For each id one release by its holder, and at most four by its waiter: a look, a
	// second one if the subscription came after it, the take and the release. The rest
	// is for attempts that a slow machine repeats. Those that found the one connection
	// taken, and were never sent, the server has not seen.
	require.Less(t, r.calls(t, "evalsha"), 6*ids)
}

// inParallel calls f for 0 to n-1, as many at a time as there are workers.
func inParallel(workers, n int, f func(i int)) {
	var wg sync.WaitGroup
	var next atomic.Int64
	for range workers {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

func TestRealWaitAcquire_hundredWaitersCostTwoCommandsPerSection(t *testing.T) {
	const waiters, rounds = 100, 10
	r := startReal(t)
	l := r.lock(t)
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "42", time.Minute)))
	r.do(t, "CONFIG", "RESETSTAT")
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	inParallel(waiters, waiters*rounds, func(int) {
		lease, err := l.WaitAcquire(ctx, "42", time.Minute)
		if assert.NoError(t, err) {
			assert.NoError(t, l.Release(ctx, lease))
		}
	})
	require.LessOrEqual(t, float64(r.calls(t, "evalsha"))/(waiters*rounds), 2.6)
}

func TestRealWaitAcquire_onlyChecksItsSubscriptionWhileItSleeps(t *testing.T) {
	r := startReal(t)
	mustAcquire(t, r.lock(t), "42", time.Minute)
	way := new(link)
	l := r.lock(t, way)
	sleeper(t, l, way, "42")
	r.do(t, "CONFIG", "RESETSTAT")
	sent := way.sent()
	ctx, cancel := context.WithTimeout(t.Context(), 2500*time.Millisecond)
	defer cancel()
	_, err := l.WaitAcquire(ctx, "42", time.Minute)
	require.ErrorIs(t, err, redfour.ErrLocked)
	require.Equal(t, sent, way.sent())
	require.LessOrEqual(t, r.calls(t, "evalsha"), 4)
	require.Positive(t, r.calls(t, "ping"), "the subscription is checked")
	require.LessOrEqual(t, r.calls(t, "ping"), 4)
}

func TestRealAcquire_indexGrowsThroughFlush(t *testing.T) {
	r := startReal(t)
	a, b := r.lock(t), r.lock(t)
	old := mustAcquire(t, a, "42", time.Minute)
	r.do(t, "FLUSHALL")
	require.ErrorIs(t, a.Renew(t.Context(), old, time.Hour), redfour.ErrExpired)
	require.Empty(t, r.locks(t), "not revived")

	// The other process has not seen the old index.
	next := mustAcquire(t, b, "42", time.Minute)
	require.Greater(t, next.Index, old.Index)
	requireSuperseded(t, r, a, old)
	require.NoError(t, b.Release(t.Context(), next))
}

// requireSuperseded shows that a lease can do nothing to the one that holds.
func requireSuperseded(t *testing.T, r *realRedis, l *redfour.Lock, old *redfour.Lease) {
	t.Helper()
	key := "lock:" + old.ID
	holder := r.do(t, "HGETALL", key)
	require.ErrorIs(t, l.Renew(t.Context(), old, time.Hour), redfour.ErrConflict)
	require.ErrorIs(t, l.Release(t.Context(), old), redfour.ErrConflict)
	require.Equal(t, holder, r.do(t, "HGETALL", key))
	require.LessOrEqual(t, r.admin.PTTL(t.Context(), key).Val(), time.Minute)
}

func TestRealRelease_tokenProtectsWhereTheIndexRepeats(t *testing.T) {
	// A failover to a replica that is behind brings the same counter twice.
	const ahead int64 = 1 << 52
	r := startReal(t)
	a, b := r.lock(t), r.lock(t)
	r.do(t, "SET", "lockindex", ahead)
	old := mustAcquire(t, a, "42", time.Minute)
	r.do(t, "DEL", "lock:42")
	r.do(t, "SET", "lockindex", ahead)
	next := mustAcquire(t, b, "42", time.Minute)
	require.Equal(t, old.Index, next.Index)
	requireSuperseded(t, r, a, old)
	require.NoError(t, b.Release(t.Context(), next))
}

func TestRealAcquire_indexIsTheSameDigitsEverywhere(t *testing.T) {
	r := startReal(t)
	for _, row := range []struct{ counter, want string }{
		{counter: ""}, {counter: "0"}, {counter: "0007"}, {counter: "1700000000000000"}, // want: the server's time
		{"4000000000000000", "4000000000000001"}, // tostring of this is 4e+15
		{"4503599627370496", "4503599627370497"}, // 2^52
		{"9007199254740989", "9007199254740990"}, // 2^53 - 3
		{"9007199254740990", "9007199254740991"},
	} {
		t.Run(row.counter, func(t *testing.T) {
			ctx := t.Context()
			r.do(t, "FLUSHALL")
			if row.counter != "" {
				r.do(t, "SET", "lockindex", row.counter)
			}
			way := new(link)
			var replied int64
			way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
				if values, err := valuesOf(cmd); err == nil {
					replied = values[1]
				}
				return nil
			})
			l := r.lock(t, way)
			before := r.admin.Time(ctx).Val().UnixMicro()
			lease := mustAcquire(t, l, "42", time.Minute)
			after := r.admin.Time(ctx).Val().UnixMicro()

			index := strconv.FormatInt(lease.Index, 10)
			if row.want == "" {
				require.GreaterOrEqual(t, lease.Index, before)
				require.LessOrEqual(t, lease.Index, after)
			} else {
				require.Equal(t, row.want, index)
			}
			require.Equal(t, index, r.do(t, "HGET", "lock:42", "index"))
			require.Equal(t, index, r.do(t, "GET", "lockindex"))
			require.Equal(t, lease.Index, replied)
			_, err := l.Acquire(ctx, "42", time.Minute)
			locked := new(redfour.LockedError)
			require.ErrorAs(t, err, &locked)
			require.Equal(t, lease.Index, locked.Index)
			require.NoError(t, l.Renew(ctx, lease, time.Minute))
			require.NoError(t, l.Release(ctx, lease))
		})
	}
}

func TestRealAcquire_hugeIndexOfAnotherDoesNotRaiseOurs(t *testing.T) {
	r := startReal(t)
	l := r.lock(t)
	r.do(t, "HSET", "lock:42", "index", "9007199254740991")
	r.do(t, "PEXPIRE", "lock:42", 60_000)
	_, err := l.Acquire(t.Context(), "42", time.Minute)
	require.ErrorContains(t, err, "index 9007199254740991")
	lease := mustAcquire(t, l, "43", time.Minute)
	require.LessOrEqual(t, lease.Index, r.admin.Time(t.Context()).Val().UnixMicro())
	require.NoError(t, l.Release(t.Context(), lease))
}

// Redis keeps expiries in milliseconds, of which a Duration holds only so many.
func TestRealAcquire_holderOfMoreThanADurationIsToldAsTheLongest(t *testing.T) {
	server := redistest.Start(t)
	client := server.Client(t)
	require.NoError(t, client.HSet(t.Context(), "lock:42", "index", 7).Err())
	require.NoError(t, client.Do(t.Context(), "PEXPIRE", "lock:42", "1000000000000000").Err())
	_, err := newLock(t, client).Acquire(t.Context(), "42", time.Minute)
	var locked *redfour.LockedError
	require.ErrorAs(t, err, &locked)
	require.Equal(t, time.Duration(math.MaxInt64).Truncate(time.Millisecond), locked.TTL)
}

func TestReal_foreignKeysAreErrorsAtOnce(t *testing.T) {
	r := startReal(t)
	for _, row := range []struct {
		kind string
		make []any // a command
	}{
		{"string without expiry", []any{"SET", "lock:42", "x"}},
		{"string", []any{"SET", "lock:42", "x", "PX", 60_000}},
		{"list without expiry", []any{"RPUSH", "lock:42", "x"}},
		{"set without expiry", []any{"SADD", "lock:42", "x"}},
		{"zset without expiry", []any{"ZADD", "lock:42", 1, "x"}},
		{"stream without expiry", []any{"XADD", "lock:42", "*", "index", 1}},
		{"hash without expiry", []any{"HSET", "lock:42", "index", 1, "token", "x"}},
		{"hash without expiry", []any{"HSET", "lock:42", "owner", "x"}},
	} {
		t.Run(row.kind, func(t *testing.T) {
			r.do(t, "FLUSHALL")
			r.do(t, row.make...)
			before := r.snapshot(t)
			for op := range everyCall {
				err := requireFinal(t, r, op, asAnybody)
				// To a lease it does not matter whether what is there expires.
				kind, _, _ := strings.Cut(row.kind, " ")
				if op == "acquire" || op == "wait for" {
					kind = row.kind + ", "
				}
				require.ErrorContains(t, err, `key "lock:42" is a `+kind)
			}
			require.Equal(t, before, r.snapshot(t))
		})
	}
}

func TestReal_foreignCountersAreErrorsAtOnce(t *testing.T) {
	r := startReal(t)
	for _, row := range []struct {
		kind string
		make []any // a command
	}{
		{"list", []any{"RPUSH", "lockindex", "1"}},
		{"hash", []any{"HSET", "lockindex", "index", 1}},
		{"string without a number", []any{"SET", "lockindex", "abc"}},
		{"string without a number", []any{"SET", "lockindex", "1e300"}},
		{"string without a number", []any{"SET", "lockindex", "inf"}},
		{"string without a number", []any{"SET", "lockindex", "nan"}},
		{"string without a number", []any{"SET", "lockindex", "0x10"}},
		{"string without a number", []any{"SET", "lockindex", "-1"}},
		{"string without a number", []any{"SET", "lockindex", "1.5"}},
		{"string without a number", []any{"SET", "lockindex", " 1"}},
		{"string without a number", []any{"SET", "lockindex", "1\n"}},
		{"string without a number", []any{"SET", "lockindex", ""}},
		{"number beyond 2^53", []any{"SET", "lockindex", "9007199254740991"}},
		{"number beyond 2^53", []any{"SET", "lockindex", "9007199254740992"}},
		{"number beyond 2^53", []any{"SET", "lockindex", strings.Repeat("9", 400)}},
	} {
		t.Run(fmt.Sprintf("%.20q", row.make), func(t *testing.T) {
			r.do(t, "FLUSHALL")
			r.do(t, row.make...)
			before := r.snapshot(t)
			for _, op := range []string{"acquire", "wait for"} {
				err := requireFinal(t, r, op, asAnybody)
				require.ErrorContains(t, err, `key "lockindex" is a `+row.kind+", ")
			}
			require.Equal(t, before, r.snapshot(t))
		})
	}
}

// everyCall calls each method once, for the id 42, by the names that errors give them.
var everyCall = map[string]func(ctx context.Context, l *redfour.Lock) error{
	"acquire": func(ctx context.Context, l *redfour.Lock) error {
		_, err := l.Acquire(ctx, "42", time.Minute)
		return err
	},
	"wait for": func(ctx context.Context, l *redfour.Lock) error {
		_, err := l.WaitAcquire(ctx, "42", time.Minute)
		return err
	},
	"renew": func(ctx context.Context, l *redfour.Lock) error {
		return l.Renew(ctx, &redfour.Lease{ID: "42", Index: 7, Token: "t"}, time.Minute)
	},
	"release": func(ctx context.Context, l *redfour.Lock) error {
		return l.Release(ctx, &redfour.Lease{ID: "42", Index: 7, Token: "t"})
	},
}

// requireFinal shows that a call fails at its first attempt, and does not say that
// somebody holds the lock, or nobody.
func requireFinal(t *testing.T, r *realRedis, op string, as func(*redis.Options)) error {
	t.Helper()
	way := new(link)
	var attempts atomic.Int64
	way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
		if cmd.Name() == "evalsha" {
			attempts.Add(1)
		}
		return nil
	})
	o := r.options(way)
	as(o)
	l := newLock(t, newClient(t, o, way))
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	err := everyCall[op](ctx, l)
	require.ErrorContains(t, err, "redfour: "+op+` "42": `)
	for _, other := range []error{redfour.ErrLocked, redfour.ErrNotHeld, context.DeadlineExceeded} {
		require.NotErrorIs(t, err, other)
	}
	require.Positive(t, attempts.Load())
	require.LessOrEqual(t, attempts.Load(), int64(2), "with the queue, and without")
	return err
}

func asAnybody(*redis.Options) {}

// snapshot returns what each key contains.
func (r *realRedis) snapshot(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	keys, err := r.admin.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	for _, key := range keys {
		all[key] = r.do(t, "DUMP", key)
	}
	return all
}

// Nobody hears of such a release, so what is left to a waiter is the end of the ttl
// that it saw last.
func TestRealRelease_unpublishedWakesOthersAtItsDeadline(t *testing.T) {
	r := startReal(t)
	o := r.options()
	r.user(t, "~*", "+@all", "resetchannels")(o)
	holder := newLock(t, newClient(t, o))
	quick(t, 5*time.Second, func() time.Duration {
		lease := mustAcquire(t, holder, "42", time.Second)
		granted := lease.Deadline()
		way := new(link)
		l := r.lock(t, way)
		looks := answered(way, isAcquire)
		got := waitFor(t.Context(), l, "42", time.Minute)
		eventually(t, func() bool { return looks.Load() >= 2 || len(got) > 0 }, "two looks")
		r.do(t, "ACL", "LOG", "RESET")
		err := holder.Release(t.Context(), lease)
		next := takeLease(t, got)
		late := time.Since(granted)
		require.NoError(t, l.Release(t.Context(), next))
		if errors.Is(err, redfour.ErrNotHeld) {
			return enough // The machine was slower than the ttl, and nothing was shown.
		}
		require.NoError(t, err)
		denied := r.admin.ACLLog(t.Context(), 1).Val()
		require.Len(t, denied, 1)
		require.Equal(t, "lock-release", denied[0].Object)
		require.Empty(t, r.locks(t))
		return late
	})
}

func TestRealWaitAcquire_anyIdIsWokenByItsMessage(t *testing.T) {
	r := startReal(t)
	holder, way := r.lock(t), new(link)
	l := r.lock(t, way)
	mustAcquire(t, holder, "first", time.Minute)
	sleeper(t, l, way, "first") // so that the subscription stands
	for _, id := range []string{
		" ", "a b", "line\nbreak\r\n", "a:b:c", ":", "::", "{tag}", "}{", "{}", "nul\x00nul", "\x00",
		"lock:", "lock:first", "index", "-release", "日本", "%s%d", `"quoted"`, "'", `\`, "*",
		strings.Repeat("x", 64<<10), strings.Repeat("世", 20<<10),
	} {
		if !t.Run(fmt.Sprintf("%.20q", id), func(t *testing.T) {
			lease := mustAcquire(t, holder, id, time.Minute)
			looks := answered(way, isAcquire)
			got := waitFor(t.Context(), l, id, time.Minute)
			eventually(t, func() bool { return looks.Load() == 1 }, "one look")
			require.NoError(t, holder.Release(t.Context(), lease))
			next := takeLease(t, got)
			require.Equal(t, id, next.ID)
			require.NoError(t, l.Renew(t.Context(), next, time.Minute))
			require.Equal(t, []string{"lock:" + id}, r.admin.Keys(t.Context(), "lock:[^f]*").Val())
			require.NoError(t, l.Release(t.Context(), next))
			require.Equal(t, []string{"lock:first"}, r.locks(t))
		}) {
			return // not a long wait for each
		}
	}
}

// A prefixer is a hook that prefixes every key of a script, as some clients share a server.
type prefixer string

func (p prefixer) prefix(cmds ...redis.Cmder) {
	for _, cmd := range cmds {
		if args := cmd.Args(); strings.HasPrefix(cmd.Name(), "eval") {
			for i := range keys(cmd) {
				args[3+i] = string(p) + argument(args, 3+i)
			}
		}
	}
}

func (p prefixer) DialHook(next redis.DialHook) redis.DialHook { return next }

func (p prefixer) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		p.prefix(cmd)
		return next(ctx, cmd)
	}
}

func (p prefixer) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		p.prefix(cmds...)
		return next(ctx, cmds)
	}
}

func TestReal_locksUnderAHookThatPrefixesKeysWakeEachOther(t *testing.T) {
	r := startReal(t)
	lock := func(via ...*link) *redfour.Lock {
		client := newClient(t, r.options(via...), via...)
		client.AddHook(prefixer("padlock:"))
		return newLock(t, client)
	}
	way := new(link)
	holder, waiter := lock(), lock(way)
	lease := mustAcquire(t, holder, "42", time.Minute)
	found, err := r.admin.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"padlock:lock:42", "padlock:lockindex"}, found)

	heard := r.admin.Subscribe(t.Context(), "lock-release")
	t.Cleanup(func() { _ = heard.Close() })
	_, err = heard.Receive(t.Context())
	require.NoError(t, err)
	got := sleeper(t, waiter, way, "42")
	start := time.Now()
	require.NoError(t, holder.Release(t.Context(), lease))
	lease = takeLease(t, got)
	require.Less(t, time.Since(start), time.Second)
	require.Contains(t, lease.Token, ":", "granted")
	require.NoError(t, waiter.Release(t.Context(), lease))
	require.Equal(t, "lock:42", take(t, heard.Channel()).Payload)
	require.NoError(t, holder.Release(t.Context(), mustAcquire(t, holder, "43", time.Minute)))
	require.Equal(t, "lock:43", take(t, heard.Channel()).Payload)
}

func TestReal_everyClientOptionWorks(t *testing.T) {
	r := startReal(t)
	for name, set := range map[string]func(*redis.Options){
		"defaults":              func(*redis.Options) {},
		"PoolSize 1":            func(o *redis.Options) { o.PoolSize = 1 },
		"ContextTimeoutEnabled": func(o *redis.Options) { o.ContextTimeoutEnabled = true },
		"Protocol 2":            func(o *redis.Options) { o.Protocol = 2 },
		"Protocol 3":            func(o *redis.Options) { o.Protocol = 3 },
		"DB 3":                  func(o *redis.Options) { o.DB = 3 },
		"PoolFIFO":              func(o *redis.Options) { o.PoolFIFO, o.PoolSize = true, 2 },
		"MaxRetries -1":         func(o *redis.Options) { o.MaxRetries = -1 },
		"several": func(o *redis.Options) {
			o.PoolSize, o.Protocol, o.ContextTimeoutEnabled, o.MaxRetries = 1, 2, true, -1
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := t.Context()
			client := func(via ...*link) *redis.Client {
				o := r.options(via...)
				set(o)
				return newClient(t, o, via...)
			}
			way := new(link)
			a, b := newLock(t, client()), newLock(t, client(way))
			lease := mustAcquire(t, a, "42", 1500*time.Millisecond)
			granted := lease.Deadline()
			kept, stop := a.KeepAlive(ctx, lease)
			eventually(t, func() bool { return lease.Deadline().After(granted) }, "renewed")
			require.NoError(t, kept.Err())
			stop()
			require.NoError(t, a.Renew(ctx, lease, time.Minute))

			_, err := b.Acquire(ctx, "42", time.Minute)
			require.ErrorIs(t, err, redfour.ErrLocked)
			got := sleeper(t, b, way, "42")
			short, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
			defer cancel()
			_, err = b.WaitAcquire(short, "42", time.Minute)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorIs(t, err, redfour.ErrLocked)

			require.NoError(t, a.Release(ctx, lease))
			next := takeLease(t, got)
			require.Greater(t, next.Index, lease.Index)
			require.NoError(t, b.Release(ctx, next))
			require.NoError(t, a.WithLock(ctx, "42", time.Minute, func(ctx context.Context, _ *redfour.Lease) error {
				return ctx.Err()
			}))
			require.Empty(t, client().Keys(ctx, "lock:*").Val())
		})
	}
}

func FuzzLock(f *testing.F) {
	for _, id := range []string{"42", "", "\xff", "a b", "nul\x00", "index"} {
		for _, ttl := range []time.Duration{
			-1, 0, 1, time.Millisecond - 1, time.Millisecond, 1500500 * time.Microsecond, time.Minute, math.MaxInt64,
		} {
			f.Add(id, int64(ttl), int64(time.Second))
			f.Add(id, int64(time.Second), int64(ttl))
		}
	}
	client := redistest.Start(f).Client(f)
	l, err := redfour.New(client)
	require.NoError(f, err)
	f.Cleanup(func() { _ = l.Close() })

	f.Fuzz(func(t *testing.T, id string, ttl, renewal int64) {
		ctx := t.Context()
		// ends shows that every lock there is ends by itself, within the given time.
		ends := func(within int64) (locks int) {
			t.Helper()
			keys, err := client.Keys(ctx, "lock:*").Result()
			require.NoError(t, err)
			for _, key := range keys {
				left, err := client.PTTL(ctx, key).Result()
				require.NoError(t, err)
				require.NotEqual(t, time.Duration(-1), left, "%q stays for ever", key)
				require.LessOrEqual(t, left, time.Duration(within))
			}
			return len(keys)
		}
		lease, err := l.Acquire(ctx, id, time.Duration(ttl))
		ends(ttl)
		if time.Duration(ttl) < time.Millisecond {
			require.Error(t, err)
			require.NotErrorIs(t, err, redfour.ErrNotHeld, "it was sent")
		}
		brief, cancel := context.WithTimeout(ctx, time.Millisecond)
		defer cancel()
		waited, waitErr := l.WaitAcquire(brief, id, time.Duration(renewal))
		ends(max(ttl, renewal))
		if err == nil {
			renewErr := l.Renew(ctx, lease, time.Duration(renewal))
			ends(max(ttl, renewal))
			releaseErr := l.Release(ctx, lease)
			if time.Duration(min(ttl, renewal)) > time.Minute {
				require.NoError(t, renewErr)
				require.NoError(t, releaseErr)
			}
		}
		if waitErr == nil {
			_ = l.Release(ctx, waited)
		}
		eventually(t, func() bool { return ends(max(ttl, renewal)) == 0 }, "all released")
	})
}

func TestRealTable(t *testing.T) {
	server := redistest.Start(t)
	for _, row := range table {
		t.Run(row.name, func(t *testing.T) {
			row.run(t, site{func(t *testing.T, via ...*link) redis.UniversalClient {
				return newClient(t, server.Options(), via...)
			}, plainNames, true})
		})
	}
}

// The caller's ctx ends, and Redis is in trouble, after Close: the release goes on.
func TestRealOpen_closesItsClientAfterAReleaseInTheBackground(t *testing.T) {
	server := redistest.Start(t)
	admin := server.Client(t)
	l, err := redfour.Open("redis://" + server.Addr())
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	_ = l.WithLock(ctx, "42", time.Hour, func(context.Context, *redfour.Lease) error {
		require.NoError(t, l.Close())
		server.Pause()
		cancel()
		return nil
	})
	server.Resume()
	require.Eventually(t, func() bool { return admin.Exists(t.Context(), "lock:42").Val() == 0 }, 5*time.Second, time.Millisecond)
}

// A client made by Open is still there when the last section releases.
func TestRealOpen_closesItsClientAfterTheLastSection(t *testing.T) {
	server := redistest.Start(t)
	admin := server.Client(t)
	l, err := redfour.Open("redis://" + server.Addr())
	require.NoError(t, err)
	require.NoError(t, l.Release(t.Context(), mustAcquire(t, l, "41", time.Minute)))
	err = l.WithLock(t.Context(), "42", time.Minute, func(context.Context, *redfour.Lease) error {
		require.NoError(t, l.Close())
		require.NoError(t, l.Close())
		require.EqualValues(t, 1, admin.Exists(t.Context(), "lock:42").Val())
		return nil
	})
	require.NoError(t, err)
	require.Zero(t, admin.Exists(t.Context(), "lock:42").Val())
	require.ErrorIs(t, l.Release(t.Context(), &redfour.Lease{ID: "42", Index: 1}), redis.ErrClosed)
}

func TestRealLogger_saysThatAUserMayNotHearGrants(t *testing.T) {
	r := startReal(t)
	login := r.user(t, "~*", "+@all", "resetchannels", "&lock-release")
	way := new(link)
	o := r.options(way)
	login(o)
	requireFallback(t, newClient(t, o, way), way)
}

// requireFallback demands that a waiter is woken all the same, and that one line is logged.
func requireFallback(t *testing.T, client redis.UniversalClient, way *link) {
	t.Helper()
	var out syncBuffer
	l := newLock(t, client, redfour.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
	lease := mustAcquire(t, l, "42", time.Minute)
	got := sleeper(t, l, way, "42")
	require.NoError(t, l.Release(t.Context(), lease))
	takeLease(t, got)
	require.Equal(t, 1, strings.Count(out.String(), "\n"), out.String())
	require.Contains(t, out.String(), `level=WARN msg="redfour: waiters cannot queue`)
}

// A syncBuffer is a buffer that several goroutines may use.
type syncBuffer struct {
	mu  sync.Mutex // guards buf
	buf strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
