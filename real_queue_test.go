//go:build unix

package redfour_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

// What the queue promises to a fleet: that a section costs one script, that nobody starves, and that
// who dies or leaves costs the others next to nothing. The fleet is processes of its own, because the turns of
// a process and its death are part of the promise.

// A queueJob is what a worker process has to do. It gets it in its environment.
type queueJob struct {
	Addr     string `json:"addr"`
	Dir      string `json:"dir"`      // of the witness
	Waiters  int    `json:"waiters"`  // goroutines, each of which waits and releases again and again
	Sections int64  `json:"sections"` // until all processes together have had so many
}

const queueJobVariable = "REDFOUR_QUEUE_JOB"

// A queueReport is what a worker process has seen.
type queueReport struct {
	Sections []int         `json:"sections"` // of each waiter
	Waits    int           `json:"waits"`
	Total    time.Duration `json:"total"` // that they took
	Longest  time.Duration `json:"longest"`
	Passed   int64         `json:"passed"`  // sections of others during a wait, at most
	Failure  string        `json:"failure"` // the first; empty if all went well
}

// A queueWorker is the inside of a worker process.
type queueWorker struct {
	job     queueJob
	lock    *redfour.Lock
	witness *witness
	opened  chan struct{} // closed by the reader of stdin
	since   time.Time     // when it was closed

	mu     sync.Mutex // guards what follows
	report queueReport
}

// TestRealQueueWorker tests nothing: it is the body of the worker processes, which are this test binary.
func TestRealQueueWorker(t *testing.T) {
	text, ok := os.LookupEnv(queueJobVariable)
	if !ok {
		return
	}
	w := &queueWorker{opened: make(chan struct{})}
	require.NoError(t, json.Unmarshal([]byte(text), &w.job))
	w.lock = newLock(t, newClient(t, &redis.Options{Addr: w.job.Addr}))
	w.witness = openWitness(t, w.job.Dir)
	w.report.Sections = make([]int, w.job.Waiters)
	go w.follow(os.Stdin)
	ctx, cancel := context.WithTimeout(t.Context(), enough)
	defer cancel()
	var waiters sync.WaitGroup
	for n := range w.job.Waiters {
		waiters.Go(func() {
			if err := w.run(ctx, n); err != nil {
				w.fail(err)
				cancel() // The others would wait for sections that never come.
			}
		})
	}
	waiters.Wait()
	require.NoError(t, w.lock.Close())
	require.NoError(t, json.NewEncoder(os.Stdout).Encode(w.report))
}

// follow reads "go". It ends the process with its parent, which holds the other end, so that none is ever left behind.
func (w *queueWorker) follow(in io.Reader) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		w.since = time.Now()
		close(w.opened)
	}
	os.Exit(3)
}

// run is one waiter.
func (w *queueWorker) run(ctx context.Context, n int) error {
	for last, count := int64(0), int64(0); count < w.job.Sections; last = count {
		start := time.Now()
		lease, err := w.lock.WaitAcquire(ctx, "42", time.Minute)
		end := time.Now()
		if err != nil {
			return err
		}
		if count, err = w.witness.see(lease.Index); err != nil {
			return err
		}
		if err := w.lock.Release(ctx, lease); err != nil {
			return err
		}
		<-w.opened // Nobody had the lock before, but the parent.
		if start.Before(w.since) {
			start = w.since // The time before was for the others to queue up.
		}
		w.note(n, end.Sub(start), count-last)
	}
	return nil
}

func (w *queueWorker) note(n int, waited time.Duration, passed int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Sections[n]++
	w.report.Waits++
	w.report.Total += waited
	w.report.Longest = max(w.report.Longest, waited)
	w.report.Passed = max(w.report.Passed, passed)
}

func (w *queueWorker) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.report.Failure == "" {
		w.report.Failure = err.Error()
	}
}

// A witness sees all sections, of all processes, in the order in which they run. It is memory that the processes share,
// so that it costs Redis nothing, and never waits for a disk.
type witness struct {
	inside *atomic.Int64 // the index of whoever is in a section; 0 if nobody is
	last   *atomic.Int64 // the index of the last section
	count  *atomic.Int64 // how many there were
}

func openWitness(t *testing.T, dir string) *witness {
	t.Helper()
	const size = 3 * 8
	file, err := os.OpenFile(filepath.Join(dir, "witness"), os.O_RDWR|os.O_CREATE, 0o600)
	require.NoError(t, err)
	defer file.Close() //nolint:errcheck // What it contains is in memory.
	require.NoError(t, file.Truncate(size))
	shared, err := syscall.Mmap(int(file.Fd()), 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
	require.NoError(t, err)
	t.Cleanup(func() { _ = syscall.Munmap(shared) })
	words := (*[3]atomic.Int64)(unsafe.Pointer(&shared[0]))
	return &witness{&words[0], &words[1], &words[2]}
}

// see is a section. It returns how many there were.
func (w *witness) see(index int64) (count int64, err error) {
	if !w.inside.CompareAndSwap(0, index) {
		return 0, fmt.Errorf("index %d is inside, and so is %d", index, w.inside.Load())
	}
	if last := w.last.Swap(index); index <= last {
		return 0, fmt.Errorf("index %d after %d", index, last)
	}
	count = w.count.Add(1)
	if !w.inside.CompareAndSwap(index, 0) {
		return 0, fmt.Errorf("index %d was inside, and so was %d", index, w.inside.Load())
	}
	return count, nil
}

// A queueProcess is a worker process, seen from outside.
type queueProcess struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	ended chan queueEnd // sent to once, when the process has been waited for; capacity 1
}

// queueEnd is how a worker process ended.
type queueEnd struct {
	report queueReport
	err    error
	output []byte
}

func startQueueProcess(t *testing.T, job queueJob) *queueProcess {
	t.Helper()
	text, err := json.Marshal(job)
	require.NoError(t, err)
	binary, err := os.Executable()
	require.NoError(t, err)
	p := &queueProcess{cmd: exec.Command(binary, "-test.run=^TestRealQueueWorker$"), ended: make(chan queueEnd, 1)}
	p.cmd.Env = append(os.Environ(), queueJobVariable+"="+string(text))
	p.stdin, err = p.cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := p.cmd.StdoutPipe()
	require.NoError(t, err)
	p.cmd.Stderr = p.cmd.Stdout
	require.NoError(t, p.cmd.Start())
	over := make(chan struct{}) // closed when the process has been waited for
	go func() {
		defer close(over)
		var end queueEnd
		end.output, _ = io.ReadAll(stdout) // A broken pipe is the end of the process.
		end.err = errors.Join(json.NewDecoder(strings.NewReader(string(end.output))).Decode(&end.report), p.cmd.Wait())
		p.ended <- end
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		<-over
	})
	return p
}

// open says that the lock is about to be free for the first time.
func (p *queueProcess) open(t *testing.T) {
	t.Helper()
	_, err := io.WriteString(p.stdin, "go\n")
	require.NoError(t, err)
}

// kill ends the process as a crash does, and returns when it is gone.
func (p *queueProcess) kill(t *testing.T) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Kill())
	take(t, p.ended)
}

// queueLength counts the members in the queue of the id 42.
func (r *realRedis) queueLength(t *testing.T) int64 {
	t.Helper()
	n, err := r.admin.LLen(t.Context(), "lock-waiters:42").Result()
	require.NoError(t, err)
	return n
}

func (r *realRedis) awaitQueue(t *testing.T, n int64) {
	t.Helper()
	eventually(t, func() bool { return r.queueLength(t) == n }, fmt.Sprintf("%d in the queue", n))
}

// onlyTheCounter tells whether nothing is left of any lock.
func (r *realRedis) onlyTheCounter(t *testing.T) bool {
	t.Helper()
	keys, err := r.admin.Keys(t.Context(), "*").Result()
	require.NoError(t, err)
	return slices.Equal(keys, []string{"lockindex"})
}

// A contest is how processes with many waiters shared one lock.
type contest struct {
	sections      int64
	scripts       int
	least, most   int // sections of a waiter
	mean, longest time.Duration
	passed        int64 // sections during the wait in which most passed
	took          time.Duration
}

// contend makes all waiters of all processes queue up for one lock, and then take turns in as many
// sections as are wanted, all of them empty. No two overlap, and their indexes grow.
func contend(t *testing.T, processes, waiters int, sections int64) contest {
	t.Helper()
	r := startReal(t)
	job := queueJob{r.Addr(), t.TempDir(), waiters, sections}
	holder := r.lock(t)
	lease := mustAcquire(t, holder, "42", time.Minute)
	r.do(t, "CONFIG", "RESETSTAT")
	fleet := make([]*queueProcess, processes)
	for i := range fleet {
		fleet[i] = startQueueProcess(t, job)
	}
	r.awaitQueue(t, int64(processes))
	start := time.Now()
	for _, p := range fleet {
		p.open(t)
	}
	require.NoError(t, holder.Release(t.Context(), lease))

	var all queueReport
	for _, p := range fleet {
		end := take(t, p.ended)
		require.NoError(t, end.err, "%s", end.output)
		assert.Empty(t, end.report.Failure)
		all.Sections = append(all.Sections, end.report.Sections...)
		all.Waits += end.report.Waits
		all.Total += end.report.Total
		all.Longest = max(all.Longest, end.report.Longest)
		all.Passed = max(all.Passed, end.report.Passed)
	}
	require.False(t, t.Failed())
	c := contest{
		scripts: r.calls(t, "evalsha") + r.calls(t, "eval"),
		least:   slices.Min(all.Sections), most: slices.Max(all.Sections),
		mean: all.Total / time.Duration(all.Waits), longest: all.Longest, passed: all.Passed, took: time.Since(start),
	}
	c.sections = openWitness(t, job.Dir).count.Load()
	require.EqualValues(t, all.Waits, c.sections)
	t.Logf("%d processes with %d waiters: %.3f scripts a section, %d to %d sections a waiter, at most %d sections during a wait, "+
		"waits of %v on average and %v at most (%.2f times), %.0f sections a second",
		processes, waiters, float64(c.scripts)/float64(c.sections), c.least, c.most, c.passed,
		c.mean.Round(time.Microsecond), c.longest.Round(time.Microsecond), float64(c.longest)/float64(c.mean),
		float64(c.sections)/c.took.Seconds())
	require.True(t, r.onlyTheCounter(t), "all have left")
	return c
}

// requireFair shows that a section costs little more than a script, that each waiter gets a third of what any other gets at
// least, and that nobody waits three times as long as others do.
//
// The machine is part of how long a wait takes, and not of how many sections pass during it: as many as there are waiters, on
// average. So in sections the limit is strict. In time a busy machine that stops for a moment makes all the waits longer that are going
// on then, so that a second more is allowed: somebody who was forgotten would wait for the look after 30.
func requireFair(t *testing.T, processes, waiters int, sections int64) {
	t.Helper()
	quick(t, time.Second, func() time.Duration {
		c := contend(t, processes, waiters, sections)
		require.LessOrEqual(t, float64(c.scripts)/float64(c.sections), 1.1)
		require.Positive(t, c.least)
		require.LessOrEqual(t, c.most, 3*c.least)
		require.LessOrEqual(t, c.passed, int64(3*processes*waiters))
		return c.longest - 3*c.mean
	})
}

func TestRealQueue_sectionCostsOneScriptAndAllGetTheirShare(t *testing.T) {
	const processes, waiters = 4, 32
	requireFair(t, processes, waiters, 40*processes*waiters)
}

func TestRealQueue_thousandWaitersAreAllServed(t *testing.T) {
	const processes, waiters = 4, 250
	requireFair(t, processes, waiters, 4*processes*waiters)
}

// delays sorts what rounds took, and logs it. It returns the longest.
func delays(t *testing.T, took []time.Duration) time.Duration {
	t.Helper()
	slices.Sort(took)
	median, worst := took[len(took)/2], took[len(took)-1]
	t.Logf("%d rounds: the next holds %v after the release at the median, and %v at most",
		len(took), median.Round(time.Microsecond), worst.Round(time.Microsecond))
	return worst
}

// soon is generous for a few round trips, and far from any ttl.
const soon = 250 * time.Millisecond

func TestRealQueue_processKilledWhileFirstDelaysTheNextByMilliseconds(t *testing.T) {
	const rounds = 20
	r := startReal(t)
	holder, l := r.lock(t), r.lock(t)
	job := queueJob{Addr: r.Addr(), Dir: t.TempDir(), Waiters: 1, Sections: 1}
	quick(t, soon, func() time.Duration {
		took := make([]time.Duration, rounds)
		for i := range took {
			lease := mustAcquire(t, holder, "42", time.Minute)
			victim := startQueueProcess(t, job)
			r.awaitQueue(t, 1)
			entry := r.do(t, "LINDEX", "lock-waiters:42", 0)
			next := waitFor(t.Context(), l, "42", time.Minute)
			r.awaitQueue(t, 2)
			victim.kill(t)

			// The server learns of the death from the connection, which the kernel has closed by now.
			member, _, _ := strings.Cut(entry, " ")
			inbox := "lock-grant:" + member
			eventually(t, func() bool { return r.admin.PubSubNumSub(t.Context(), inbox).Val()[inbox] == 0 }, "known to be dead")
			require.Equal(t, entry, r.do(t, "LINDEX", "lock-waiters:42", 0), "still the first")
			start := time.Now()
			require.NoError(t, holder.Release(t.Context(), lease))
			lease = takeLease(t, next)
			took[i] = time.Since(start)
			require.NoError(t, l.Release(t.Context(), lease))
		}
		return delays(t, took)
	})
	eventually(t, func() bool { return r.onlyTheCounter(t) }, "nothing is left")
}

// anyMoment returns a random time from now, within that in which two things meet that take a round trip each.
func anyMoment() time.Duration { return rand.N(2 * time.Millisecond) }

func TestRealQueue_waiterThatCancelsAtAnyMomentCostsNoMoreThanARoundTrip(t *testing.T) {
	const rounds = 100
	r := startReal(t)
	holder, fickle, l := r.lock(t), r.lock(t), r.lock(t)
	served := 0
	round := func() time.Duration {
		lease := mustAcquire(t, holder, "42", time.Minute)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		first := make(chan error, 1) // what became of the first waiter; sent once
		go func() { first <- brief(ctx, fickle) }()
		r.awaitQueue(t, 1)
		next := waitFor(t.Context(), l, "42", time.Minute)
		r.awaitQueue(t, 2)

		released := make(chan time.Time, 1) // when the release began; sent once
		time.AfterFunc(anyMoment(), cancel)
		time.AfterFunc(anyMoment(), func() {
			released <- time.Now()
			assert.NoError(t, holder.Release(t.Context(), lease))
		})
		lease = takeLease(t, next)
		took := time.Since(take(t, released))
		require.NoError(t, l.Release(t.Context(), lease))
		if err := take(t, first); err != nil {
			require.ErrorIs(t, err, redfour.ErrLocked)
			require.ErrorIs(t, err, context.Canceled)
		} else {
			served++
		}
		return took
	}
	quick(t, soon, func() time.Duration {
		took := make([]time.Duration, rounds)
		for i := range took {
			took[i] = round()
			// The member that was left without a waiter leaves the queue as well.
			eventually(t, func() bool { return r.onlyTheCounter(t) }, "nothing is left")
		}
		return delays(t, took)
	})
	t.Logf("the first was served %d times", served)
}

// brief is an empty section.
func brief(ctx context.Context, l *redfour.Lock) error {
	lease, err := l.WaitAcquire(ctx, "42", time.Minute)
	if err != nil {
		return err
	}
	return l.Release(ctx, lease)
}

func TestRealQueue_memberClosedWhileAGrantIsOnItsWayLeavesNothing(t *testing.T) {
	const rounds = 50
	r := startReal(t)
	holder := r.lock(t)
	client := newClient(t, r.options())
	served := 0
	for range rounds {
		lease := mustAcquire(t, holder, "42", time.Minute)
		l := newLock(t, client)
		waiter := make(chan error, 1) // what became of it; sent once
		go func() { waiter <- brief(t.Context(), l) }()
		r.awaitQueue(t, 1)

		var ends sync.WaitGroup
		ends.Add(2)
		time.AfterFunc(anyMoment(), func() {
			defer ends.Done()
			assert.NoError(t, l.Close())
		})
		time.AfterFunc(anyMoment(), func() {
			defer ends.Done()
			assert.NoError(t, holder.Release(t.Context(), lease))
		})
		ends.Wait()
		if err := take(t, waiter); err != nil {
			require.ErrorIs(t, err, redfour.ErrClosed)
		} else {
			served++
		}
		require.True(t, r.onlyTheCounter(t), "%v", r.snapshot(t))
	}
	t.Logf("it was served %d of %d times", served, rounds)
}

func TestRealQueue_tenThousandWaitersAreCheapWhileIdle(t *testing.T) {
	const waiters = 10_000
	for _, row := range []struct {
		name   string
		ids    int
		memory int // bytes for each waiter
	}{
		{"on one id", 1, 8 << 10},
		{"on as many ids", waiters, 12 << 10},
	} {
		t.Run(row.name, func(t *testing.T) {
			r := startReal(t)
			r.holdForOthers(t, row.ids)
			l := r.lock(t)
			before := memoryInUse()
			groups := make([]*waitingGroup, waiters/groupSize)
			for i := range groups {
				groups[i] = startGroup(t, l, i, row.ids)
				r.awaitQueues(t, row.ids, (i+1)*groupSize)
			}
			eventually(t, func() bool { return goroutinesIn(t, "(*Lock).WaitAcquire") == waiters }, "all waiting")
			r.requireIdle(t, row.ids)

			each := (memoryInUse() - before) / waiters
			t.Logf("%d bytes for each waiter", each)
			assert.LessOrEqual(t, each, row.memory)
			for i, g := range groups {
				g.cancel()
				g.wg.Wait()
				r.awaitQueues(t, row.ids, waiters-(i+1)*groupSize)
			}
			require.NoError(t, l.Close())
		})
	}
}

func TestRealQueue_manyIdsShareTheGoroutinesThatLook(t *testing.T) {
	const ids, looking = 2 * groupSize, 256
	r := startReal(t)
	r.holdForOthers(t, ids)
	l := r.lock(t)
	r.do(t, "CLIENT", "PAUSE", 60_000, "WRITE") // which includes scripts
	for i := range ids / groupSize {
		startGroup(t, l, i, ids)
	}
	eventually(t, func() bool { return goroutinesIn(t, "(*Lock).WaitAcquire") == ids }, "all waiting")
	n := 0
	eventually(t, func() bool { n = goroutinesIn(t, "(*subscriber).attempt"); return n >= looking }, "some looking")
	require.Equal(t, looking, n)
	r.do(t, "CLIENT", "UNPAUSE")
	r.awaitQueues(t, ids, ids)
	eventually(t, func() bool { return goroutinesIn(t, "(*subscriber).attempt") == 0 }, "nobody looking")
}

// A waitingGroup is waiters who come and go together. Ten thousand at once would be more than a busy machine sends in the
// second that an attempt may take.
type waitingGroup struct {
	wg     sync.WaitGroup
	cancel context.CancelFunc
}

const groupSize = 500

// startGroup starts the waiters of the nth group, on the ids from 0, in turn.
func startGroup(t *testing.T, l *redfour.Lock, n, ids int) *waitingGroup {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	g := &waitingGroup{cancel: cancel}
	for i := range groupSize {
		id := strconv.Itoa((n*groupSize + i) % ids)
		g.wg.Go(func() {
			_, err := l.WaitAcquire(ctx, id, time.Minute)
			assert.ErrorIs(t, err, redfour.ErrLocked)
			assert.ErrorIs(t, err, context.Canceled)
		})
	}
	return g
}

// awaitQueues returns when there is a queue for each id that one of so many waiters waits for. Besides these, there is a key for
// each lock.
func (r *realRedis) awaitQueues(t *testing.T, ids, waiters int) {
	t.Helper()
	keys := int64(ids + min(ids, waiters))
	eventually(t, func() bool { return r.admin.DBSize(t.Context()).Val() == keys }, "all in queues, or out of them")
}

// holdForOthers makes locks for the ids from 0 that a member holds which never releases them.
func (r *realRedis) holdForOthers(t *testing.T, ids int) {
	t.Helper()
	_, err := r.admin.Pipelined(t.Context(), func(p redis.Pipeliner) error {
		for i := range ids {
			key := "lock:" + strconv.Itoa(i)
			p.HSet(t.Context(), key, "index", 1, "token", "of a member")
			p.PExpire(t.Context(), key, time.Hour)
		}
		return nil
	})
	require.NoError(t, err)
}

// requireIdle shows that waiters of so many ids cost a ping and a check a second, and a look for each id every 30 seconds. It
// watches for as long as three pings take.
func (r *realRedis) requireIdle(t *testing.T, ids int) {
	t.Helper()
	start := time.Now()
	r.do(t, "CONFIG", "RESETSTAT")
	eventually(t, func() bool { return r.calls(t, "ping") >= 3 }, "three pings")
	stats := r.do(t, "INFO", "commandstats")
	took := time.Since(start)
	calls := make(map[string]int)
	for line := range strings.Lines(stats) {
		name, rest, _ := strings.Cut(strings.TrimPrefix(line, "cmdstat_"), ":calls=")
		digits, _, _ := strings.Cut(rest, ",")
		calls[name], _ = strconv.Atoi(digits)
	}
	checks := calls["pubsub|numsub"]
	looks := calls["evalsha"] - checks
	t.Logf("%d pings, %d checks and %d looks in %v", calls["ping"], checks, looks, took.Round(time.Millisecond))
	require.LessOrEqual(t, calls["ping"], 2+int(took/time.Second))
	require.LessOrEqual(t, checks, 2+int(took/time.Second))
	require.LessOrEqual(t, looks, ids)
	if looks == 0 {
		for _, name := range []string{
			"# Commandstats\r\n", "ping", "info", "config|resetstat", "evalsha", "eval", "del", "pubsub|numsub",
		} {
			delete(calls, name)
		}
		require.Empty(t, calls)
	}
}

// memoryInUse counts the bytes of the heap and of stacks.
func memoryInUse() int {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

// goroutinesIn counts the goroutines that are in a method.
func goroutinesIn(t *testing.T, method string) int {
	t.Helper()
	var text strings.Builder
	require.NoError(t, pprof.Lookup("goroutine").WriteTo(&text, 1))
	sum := 0
	for group := range strings.SplitSeq(text.String(), "\n\n") {
		if strings.Contains(group, "."+method+"+") {
			digits, _, _ := strings.Cut(group[strings.LastIndex(group[:strings.Index(group, " @ ")], "\n")+1:], " ")
			n, err := strconv.Atoi(digits)
			require.NoError(t, err)
			sum += n
		}
	}
	return sum
}

// The user of the waiter may not write the queue, or Redis is full. The members
// channel must not count such a member as one that is in the queue.
func TestRealWaitAcquire_aMemberThatTheQueueRefusesHearsReleases(t *testing.T) {
	for name, refuse := range map[string]func(t *testing.T, r *realRedis) *redis.Options{
		"no right to RPUSH": func(t *testing.T, r *realRedis) *redis.Options {
			o := r.options()
			r.user(t, "~*", "&*", "+@all", "-rpush")(o)
			return o
		},
		"a queue that is none": func(t *testing.T, r *realRedis) *redis.Options {
			r.do(t, "SET", "lock-waiters:42", "not a list")
			return r.options()
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := startReal(t)
			a, b := r.lock(t), newLock(t, newClient(t, refuse(t, r)))
			lease := mustAcquire(t, a, "42", time.Hour)
			got := waitFor(t.Context(), b, "42", time.Hour)
			eventually(t, func() bool {
				n, err := r.admin.PubSubNumSub(t.Context(), "lock-release", "lock-members").Result()
				return err == nil && n["lock-release"] == 1 && n["lock-members"] == 0
			}, "the waiter listens to releases alone")
			start := time.Now()
			require.NoError(t, a.Release(t.Context(), lease))
			w := <-got
			require.NoError(t, w.err)
			require.Less(t, time.Since(start), time.Second)
		})
	}
}
