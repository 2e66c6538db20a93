package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"regexp"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// The test binary is the worker as well, with libraries that are broken besides those that are compared.
func TestMain(m *testing.M) {
	if len(os.Args) != 2 || os.Args[1] != "-worker" {
		// Under the race detector each worker would linger for a second.
		if err := os.Setenv("GORACE", os.Getenv("GORACE")+" atexit_sleep_ms=0"); err != nil {
			panic(err)
		}
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	logging.Disable()
	if err := runWorker(ctx, os.Stdin, os.Stdout, findOrBreak); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func findOrBreak(name string) (entry, bool) {
	for _, e := range broken() {
		if e.Name == name {
			return e, true
		}
	}
	return entryOf(name)
}

func broken() []entry {
	open := func(l locker) func(setting) (locker, error) {
		return func(setting) (locker, error) { return l, nil }
	}
	return []entry{
		{Library: Library{Name: "open to all"}, open: open(openToAll{}), waits: true},
		{Library: Library{Name: "fails"}, open: open(fails{}), waits: true},
		{Library: Library{Name: "dies"}, open: func(setting) (locker, error) { return nil, errors.New("dead") }, waits: true},
	}
}

// openToAll excludes nobody.
type openToAll struct{}

func (openToAll) acquire(context.Context, string) (release, error) {
	return func(context.Context) error { return nil }, nil
}

func (l openToAll) wait(ctx context.Context, id string) (release, error) { return l.acquire(ctx, id) }
func (openToAll) close()                                                 {}

// fails works while nobody waits.
type fails struct{ openToAll }

func (fails) wait(context.Context, string) (release, error) { return nil, errors.New("out of order") }

// newRunner returns a runner that uses the test binary, unless there is no redis-server.
func newRunner(t *testing.T) *runner {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		redistest.Start(t) // It says that this test did not run, or fails it.
	}
	c, err := newClock()
	require.NoError(t, err)
	self, err := os.Executable()
	require.NoError(t, err)
	r := &runner{clock: c, self: self, dir: t.TempDir()}
	t.Cleanup(r.close)
	return r
}

func TestRun_everyWorkload(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		r := newRunner(t)
		const length = 100 * time.Millisecond
		run := r.run(t.Context(), cycles(0, 16)[0], e, length)
		require.Empty(t, run.Failed)
		require.Positive(t, run.Sections)
		// On a busy machine sections may end between the last reading of the server and the stop.
		require.Less(t, run.CommandsPerSection(), 2.2)
		require.Positive(t, run.Commands)
		require.Positive(t, run.ClientCPU)
		if !e.waits {
			return
		}
		for _, l := range []Load{contend(0, 16, 4, 0), contend(networkMS, 4, 2, 1000)} {
			run = r.run(t.Context(), l, e, length)
			require.Empty(t, run.Failed, l)
			require.Positive(t, run.Sections, l)
			require.Positive(t, run.LongestWait, l)
		}
		run = r.run(t.Context(), idle(20, 2), e, length)
		require.Empty(t, run.Failed)
		require.Positive(t, run.WaiterBytes)
	})
}

func TestRun_handover(t *testing.T) {
	r := newRunner(t)
	for _, name := range []string{"redfour", "redislock"} {
		e, _ := entryOf(name)
		run := r.run(t.Context(), handover(0, 2), e, 300*time.Millisecond)
		require.Empty(t, run.Failed, name)
		require.Positive(t, run.Handovers, name)
		require.LessOrEqual(t, run.P50, run.P99, name)
	}
}

func TestRun_aBrokenLibraryFails(t *testing.T) {
	r := newRunner(t)
	for _, c := range []struct {
		library string
		load    Load
		why     string
	}{
		{"open to all", contend(0, 8, 2, 1000), "mutual exclusion was violated"},
		{"open to all", handover(0, 2), "mutual exclusion was violated"},
		{"open to all", idle(4, 1), "a waiter was let in"},
		{"fails", contend(0, 8, 2, 0), "4 of 4 waiters of a process: out of order"},
		{"fails", idle(4, 1), "out of order"},
		{"dies", cycles(0, 1)[0], "worker 0 died"},
	} {
		t.Run(c.library+", "+c.load.String(), func(t *testing.T) {
			e, _ := findOrBreak(c.library)
			if e.Name == "dies" {
				e.open = openToAll{}.open // in the parent it lives
			}
			run := r.run(t.Context(), c.load, e, 100*time.Millisecond)
			require.Contains(t, run.Failed, c.why)
		})
	}
}

func (l openToAll) open(setting) (locker, error) { return l, nil }

func TestPlan_quickHasEveryKindOfWorkload(t *testing.T) {
	kinds := func(quick bool) map[string]bool {
		names := make(map[string]bool)
		for _, p := range (options{quick: quick, reps: 3, only: regexp.MustCompile("")}).plan() {
			names[p.load.name()] = true
		}
		return names
	}
	require.Len(t, kinds(false), 9)
	require.Equal(t, kinds(false), kinds(true))
}

func TestPlan_only(t *testing.T) {
	for _, p := range (options{reps: 3, only: regexp.MustCompile("^idle$")}).plan() {
		require.Equal(t, Idle, p.load.Workload)
	}
}

func TestClock_allProcessesShareIt(t *testing.T) {
	a, err := newClock()
	require.NoError(t, err)
	b, err := newClock()
	require.NoError(t, err)
	before := a.now()
	between := b.now()
	after := a.now()
	const tolerance = int64(20 * time.Microsecond)
	require.LessOrEqual(t, before, between+tolerance)
	require.LessOrEqual(t, between, after+tolerance)
}

func TestNetwork_delays(t *testing.T) {
	addr := redistest.Start(t).Addr()
	n, err := startNetwork(addr, networkMS)
	require.NoError(t, err)
	t.Cleanup(n.stop)
	took, err := n.roundTrip(t.Context())
	require.NoError(t, err)
	require.Greater(t, took, 1.0)
	require.Less(t, took, 20.0)
}
