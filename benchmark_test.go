//go:build unix

package redfour_test

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// What a call costs without a server: its answers are there at once.
func BenchmarkLibrary(b *testing.B) {
	l := newLock(b, instant(b))
	for _, s := range sections {
		b.Run(s.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				s.run(b, l, "42")
			}
		})
	}
}

// sections are ways to run an empty section, and how many allocations each takes where nobody else wants the lock.
var sections = []struct {
	name   string
	run    func(tb testing.TB, l *redfour.Lock, id string)
	allocs float64
}{
	{"Acquire+Release", acquireAndRelease, 29},
	{"WaitAcquire+Release", waitAndRelease, 40},
	{"WithLock", withLock, 66},
}

// The same on a real server, for callers with an id each, and for waiters of one id.
func BenchmarkReal(b *testing.B) {
	l := startReal(b).lock(b)
	for _, s := range sections {
		for _, callers := range []int{1, 16, 256, 1024} {
			b.Run(fmt.Sprintf("%s/callers=%d", s.name, callers), func(b *testing.B) {
				inTurn(b, callers, func(i int) { s.run(b, l, strconv.Itoa(i)) })
			})
		}
	}
	for _, waiters := range []int{2, 16, 128} {
		b.Run(fmt.Sprintf("hand-over/waiters=%d", waiters), func(b *testing.B) {
			inTurn(b, waiters, func(int) { waitAndRelease(b, l, "42") })
		})
	}
}

// Cycles on an id that no other process wants, while so many processes wait for
// another. It reports the CPU time of Redis for a cycle.
func BenchmarkRealBesideWaiters(b *testing.B) {
	for _, waiting := range []int{0, 100, 1000} {
		b.Run(fmt.Sprintf("processes=%d", waiting), func(b *testing.B) {
			r := startReal(b)
			l, client := r.lock(b), newClient(b, r.options())
			for i := range waiting {
				// What a Lock subscribes to while its callers wait.
				pubsub := client.Subscribe(b.Context(), "lock-release", "lock-members", fmt.Sprint("lock-grant:", i))
				b.Cleanup(func() { _ = pubsub.Close() })
				for range 3 {
					_, err := pubsub.Receive(b.Context())
					require.NoError(b, err)
				}
			}
			before := r.cpu(b)
			for b.Loop() {
				acquireAndRelease(b, l, "42")
			}
			b.ReportMetric(float64((r.cpu(b)-before).Nanoseconds())/1000/float64(b.N), "redis-µs/op")
		})
	}
}

// cpu returns the CPU time that the server has taken.
func (r *realRedis) cpu(tb testing.TB) time.Duration {
	tb.Helper()
	info, err := r.admin.InfoMap(tb.Context(), "cpu").Result()
	require.NoError(tb, err)
	var sum float64
	for _, field := range []string{"used_cpu_user", "used_cpu_sys"} {
		seconds, err := strconv.ParseFloat(info["CPU"][field], 64)
		require.NoError(tb, err)
		sum += seconds
	}
	return time.Duration(sum * float64(time.Second))
}

// inTurn shares b.N calls among some callers.
func inTurn(b *testing.B, callers int, call func(caller int)) {
	b.Helper()
	b.ReportAllocs()
	var callersDone sync.WaitGroup
	for i := range callers {
		callersDone.Go(func() {
			for range (b.N + i) / callers {
				call(i)
			}
		})
	}
	callersDone.Wait()
}

func acquireAndRelease(tb testing.TB, l *redfour.Lock, id string) {
	tb.Helper()
	lease, err := l.Acquire(tb.Context(), id, time.Minute)
	if err == nil {
		err = l.Release(tb.Context(), lease)
	}
	if err != nil {
		tb.Error(err)
	}
}

func waitAndRelease(tb testing.TB, l *redfour.Lock, id string) {
	tb.Helper()
	lease, err := l.WaitAcquire(tb.Context(), id, time.Minute)
	if err == nil {
		err = l.Release(tb.Context(), lease)
	}
	if err != nil {
		tb.Error(err)
	}
}

func withLock(tb testing.TB, l *redfour.Lock, id string) {
	tb.Helper()
	err := l.WithLock(tb.Context(), id, time.Minute, func(context.Context, *redfour.Lease) error { return nil })
	if err != nil {
		tb.Error(err)
	}
}

// instant returns a client whose scripts are answered without a server: every lock is free, and is released.
func instant(tb testing.TB) *redis.Client {
	tb.Helper()
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	tb.Cleanup(func() { _ = client.Close() })
	client.AddHook(new(answers))
	return client
}

// answers is a hook that answers acquires with a growing index, and releases with 0.
type answers struct {
	mu    sync.Mutex
	index int64
}

func (a *answers) DialHook(next redis.DialHook) redis.DialHook { return next }

func (a *answers) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		a.answer(cmd)
		return nil
	}
}

func (a *answers) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		for _, cmd := range cmds {
			a.answer(cmd)
		}
		return nil
	}
}

func (a *answers) answer(cmd redis.Cmder) {
	a.mu.Lock()
	defer a.mu.Unlock()
	reply, ok := cmd.(interface{ SetVal(val any) })
	switch {
	case !ok:
	case isRelease(cmd):
		reply.SetVal(int64(0))
	default:
		a.index++
		reply.SetVal(a.index)
	}
}

// What a section allocates is counted, go-redis's commands included, so that it does not grow unnoticed. The race detector
// adds some: it makes pools forget.
func TestLibrary_allocatesNoMoreThanItDid(t *testing.T) {
	l := newLock(t, instant(t))
	for _, s := range sections {
		n := testing.AllocsPerRun(1000, func() { s.run(t, l, "42") })
		t.Logf("%s: %v allocations", s.name, n)
		require.LessOrEqual(t, n, 1.1*s.allocs, s.name)
	}
}
