package faults

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"

	"github.com/redfour-go/redfour"
)

// A job is what a worker process has to do. It is handed over in workerVariable.
type job struct {
	Addr      string   `json:"addr"`                // of the server, or of a proxy before it
	Sentinels []string `json:"sentinels,omitempty"` // instead
	Master    string   `json:"master,omitempty"`    // its name there
	Cluster   []string `json:"cluster,omitempty"`   // instead: the addresses of its servers
	Namespace string   `json:"namespace"`
	Seed      uint64   `json:"seed"`
	Workers   int      `json:"workers"` // goroutines, besides those for one id each
	Pairs     []int    `json:"pairs"`   // the calm and the brief ids that this process shares with one other
	TTL       int64    `json:"ttl"`     // ms, of the leases of quick and calm ids
	Idle      int      `json:"idle"`    // connections that stand ready and are used in turn, if any

	PasswordFile string `json:"passwordFile,omitempty"` // has the present password of rotatedUser, if one is needed
}

const (
	workerVariable = "REDFOUR_FAULTS_JOB"

	// Many contend for the quick ids, in short sections. Sections on the slow ids last
	// longer than their leases, which need renewal, or travel to another process. Leases on
	// a brief id are held to their end. On a calm id two processes take turns, and whoever had it stays away until the
	// other has got it: nothing but the wake-up helps a waiter there. For the line id all processes wait all the time, so
	// that it is handed over from process to process, and what befalls one befalls somebody who is queued. For the fickle
	// id one caller of each process waits at a time, and most leave soon: everything there is for somebody who may be gone.
	// On the crowd ids all act at the same moments, so that their scripts travel together. The forced ids are inspected all
	// the time, and others end the leases on them, often on the first, and now and then on the second.
	quickIDs = 2
	slowIDs  = 2
	slowTTL  = time.Second

	briefTTL = 300 * time.Millisecond

	lineID   = "line"
	lineTime = 400 * time.Millisecond // about, of a section there
	fickleID = "fickle"

	crowdIDs  = 24
	crowdBeat = 200 * time.Millisecond

	forcedIDs = 2
	forcedTTL = 2 * time.Second // of what is kept alive there; its end, at which every loss is heard of, comes later than a judge allows

	waitTime = 30 * time.Second // for which a waiter waits
)

func quickID(n int) string  { return fmt.Sprintf("quick-%d", n) }
func slowID(n int) string   { return fmt.Sprintf("slow-%d", n) }
func calmID(n int) string   { return fmt.Sprintf("calm-%d", n) }
func briefID(n int) string  { return fmt.Sprintf("brief-%d", n) }
func crowdID(n int) string  { return fmt.Sprintf("crowd-%d", n) }
func forcedID(n int) string { return fmt.Sprintf("forced-%d", n) }

// allIDs returns all of them.
func allIDs() []string {
	ids := []string{lineID, fickleID}
	add := func(count int, id func(int) string) {
		for n := range count {
			ids = append(ids, id(n))
		}
	}
	add(quickIDs, quickID)
	add(slowIDs, slowID)
	add(processes, calmID)
	add(processes, briefID)
	add(crowdIDs, crowdID)
	add(forcedIDs, forcedID)
	return ids
}

// RunWorker makes a test binary the worker process that its environment asks for. It
// returns false if it asks for none.
func RunWorker() bool {
	text, ok := os.LookupEnv(workerVariable)
	if !ok {
		return false
	}
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		panic(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	logging.Disable() // go-redis reports every connection that breaks
	if err := newProcess(j, os.Stdout).run(ctx, os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	return true
}

// A process is the inside of a worker process.
type process struct {
	job    job
	client redis.UniversalClient
	lock   *redfour.Lock

	mu  sync.Mutex // guards what follows
	out io.Writer
}

func newProcess(j job, out io.Writer) *process {
	p := &process{job: j, out: out}
	switch {
	case len(j.Sentinels) > 0:
		p.client = redis.NewFailoverClient(&redis.FailoverOptions{MasterName: j.Master, SentinelAddrs: j.Sentinels})
	case len(j.Cluster) > 0:
		p.client = redis.NewClusterClient(&redis.ClusterOptions{Addrs: j.Cluster, ClientName: namespace})
	default:
		o := &redis.Options{Addr: j.Addr}
		if j.Idle > 0 {
			o.MinIdleConns, o.PoolSize, o.PoolFIFO = j.Idle, 2*j.Idle, true
		}
		if j.PasswordFile != "" {
			o.CredentialsProvider = func() (user, password string) {
				text, err := os.ReadFile(j.PasswordFile)
				if err != nil {
					panic(err)
				}
				return rotatedUser, string(text)
			}
		}
		p.client = redis.NewClient(o)
	}
	return p
}

// run works until its input says "stop", or ends. "turn" and an id lets the worker of that id take its
// turn. Any other line is a lease, which is renewed and released.
func (p *process) run(ctx context.Context, in io.Reader) error {
	var err error
	if p.lock, err = redfour.New(p.client, redfour.WithNamespace(p.job.Namespace)); err != nil {
		return err
	}
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	p.say(event{What: ready})

	var workers sync.WaitGroup
	for n := range p.job.Workers {
		w := p.worker(n)
		workers.Go(func() { w.run(work) })
	}
	turns := make(map[string]chan struct{}) // sent to by this goroutine; capacity 1, because a turn is a turn
	for _, n := range p.job.Pairs {
		turn := make(chan struct{}, 1)
		turns[calmID(n)] = turn
		calm, brief := p.worker(workerOfCalm+n), p.worker(workerOfBrief+n)
		workers.Go(func() { calm.takeTurns(work, calmID(n), turn) })
		workers.Go(func() { brief.expireAll(work, briefID(n)) })
	}
	line, fickle := p.worker(workerOfLine), p.worker(workerOfFickle)
	workers.Go(func() { line.standInLine(work) })
	workers.Go(func() { fickle.comeAndGo(work) })
	for n := range crowdIDs {
		w := p.worker(workerOfCrowd + n)
		workers.Go(func() { w.actWithOthers(work, crowdID(n)) })
	}
	for n := range forcedIDs {
		w := p.worker(workerOfForced + n)
		workers.Go(func() { w.suffer(work, forcedID(n)) })
	}
	operator := p.worker(workerOfOperator)
	workers.Go(func() { operator.operate(work) })
	w := p.worker(workerOfOthers)
	for lines := bufio.NewScanner(in); lines.Scan() && lines.Text() != "stop"; {
		if id, ok := strings.CutPrefix(lines.Text(), "turn "); ok {
			select {
			case turns[id] <- struct{}{}:
			default: // It has not taken the last one yet.
			}
			continue
		}
		w.receive(ctx, lines.Bytes())
	}
	cancel()
	workers.Wait()
	return p.end(ctx)
}

// end closes the Lock, and tells what it left.
func (p *process) end(ctx context.Context) error {
	if err := p.lock.Close(); err != nil {
		p.say(event{What: leftover, Text: err.Error()})
	}
	for _, stack := range p.leftGoroutines(ctx) {
		p.say(event{What: leftover, Text: stack})
	}
	if err := p.client.Close(); err != nil {
		return err
	}
	if n := p.leftSockets(ctx); n > 0 {
		p.say(event{What: leftover, Text: fmt.Sprintf("%d connections", n)})
	}
	p.say(event{What: ended})
	return nil
}

// leftGoroutines returns the stacks of goroutines that the library has left. One that
// has nothing more to do may take a moment to end.
func (p *process) leftGoroutines(ctx context.Context) []string {
	var left []string
	for range 100 {
		if left = libraryGoroutines(); len(left) == 0 {
			break
		}
		pass(ctx, 10*time.Millisecond)
	}
	return left
}

// leftSockets returns how many sockets this process has open. It knows only on Linux.
func (p *process) leftSockets(ctx context.Context) int {
	open := 0
	for range 100 {
		open = 0
		links, _ := filepath.Glob("/proc/self/fd/*")
		for _, link := range links {
			if target, err := os.Readlink(link); err == nil && strings.HasPrefix(target, "socket:") {
				open++
			}
		}
		if open == 0 {
			break
		}
		pass(ctx, 10*time.Millisecond)
	}
	return open
}

// libraryGoroutines returns the stacks of goroutines that the library has started.
func libraryGoroutines() []string {
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	var found []string
	for stack := range bytes.SplitSeq(buf, []byte("\n\n")) {
		if bytes.Contains(stack, []byte("created by github.com/redfour-go/redfour.")) ||
			bytes.Contains(stack, []byte("created by github.com/redfour-go/redfour/internal")) {
			found = append(found, string(stack))
		}
	}
	return found
}

// say writes an event at once, so that it is known even if the process is killed
// in the next moment.
func (p *process) say(e event) {
	if e.At == 0 {
		e.At = now()
	}
	line, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := p.out.Write(append(line, '\n')); err != nil {
		os.Exit(1) // Nobody listens any more.
	}
}

// A worker is one goroutine, which makes one operation after the other.
type worker struct {
	process *process
	number  int
	rand    *rand.Rand
}

// The numbers of workers with a task of their own; the others count from 0.
const (
	workerOfCalm     = 100 // plus n
	workerOfBrief    = 200 // plus n
	workerOfOthers   = 300 // goes on with leases of other processes
	workerOfLine     = 400
	workerOfFickle   = 500
	workerOfCrowd    = 600 // plus n
	workerOfForced   = 700 // plus n
	workerOfOperator = 800
)

func (p *process) worker(number int) *worker {
	return &worker{process: p, number: number, rand: rand.New(rand.NewPCG(p.job.Seed, uint64(number)))}
}

func (w *worker) run(ctx context.Context) {
	for ctx.Err() == nil {
		w.act(ctx)
		pass(ctx, upTo(w.rand, 5*time.Millisecond))
	}
}

// takeTurns waits for a calm id whenever it is its turn, until it gets it.
func (w *worker) takeTurns(ctx context.Context, id string, turn <-chan struct{}) {
	ttl := time.Duration(w.process.job.TTL) * time.Millisecond
	for {
		select {
		case <-turn:
		case <-ctx.Done():
			return
		}
		var lease *redfour.Lease
		for lease == nil && ctx.Err() == nil {
			lease = w.wait(ctx, id, ttl, waitTime)
		}
		if lease != nil {
			pass(ctx, upTo(w.rand, 15*time.Millisecond))
			w.release(ctx, lease)
		}
	}
}

// standInLine waits for the line id, again and again.
func (w *worker) standInLine(ctx context.Context) {
	ttl := time.Duration(w.process.job.TTL) * time.Millisecond
	for ctx.Err() == nil {
		if lease := w.wait(ctx, lineID, ttl, waitTime); lease != nil {
			w.write(lease)
			pass(ctx, lineTime/2+upTo(w.rand, lineTime))
			w.release(ctx, lease)
		}
	}
}

// comeAndGo waits for the fickle id again and again, and now and then until it gets it: a lock that stays behind must keep
// somebody waiting.
func (w *worker) comeAndGo(ctx context.Context) {
	ttl := time.Duration(w.process.job.TTL) * time.Millisecond
	for ctx.Err() == nil {
		patience := upTo(w.rand, 10*time.Millisecond)
		if w.rand.IntN(5) == 0 {
			patience = waitTime
		}
		w.section(ctx, fickleID, ttl, patience)
		pass(ctx, upTo(w.rand, 100*time.Millisecond)) // An attempt that is still in flight comes back to nobody.
	}
}

// actWithOthers uses a crowd id whenever the others do.
func (w *worker) actWithOthers(ctx context.Context, id string) {
	ttl := time.Duration(w.process.job.TTL) * time.Millisecond
	for {
		pass(ctx, time.Until(time.Now().Truncate(crowdBeat).Add(crowdBeat)))
		if ctx.Err() != nil {
			return
		}
		patience := waitTime
		switch n := w.rand.IntN(10); {
		case n < 2:
			w.tryOnce(ctx, id, ttl)
			continue
		case n < 4: // leaves, perhaps before its script does
			patience = upTo(w.rand, 2*time.Millisecond)
		}
		if lease := w.wait(ctx, id, ttl, patience); lease != nil {
			w.release(ctx, lease)
		}
	}
}

// suffer uses a forced id in every way. What it gets there others may end at any time. Now and then it leaves a long lease behind,
// and waits again: then nothing but force, and the wake-up by it, lets anybody go on.
func (w *worker) suffer(ctx context.Context, id string) {
	ttl := time.Duration(w.process.job.TTL) * time.Millisecond
	var left *redfour.Lease
	for ctx.Err() == nil {
		switch n := w.rand.IntN(10); {
		case n < 6:
			w.section(ctx, id, ttl, waitTime)
		case n < 7:
			w.outlast(ctx, id)
		case n < 8:
			if lease := w.wait(ctx, id, ttl, waitTime); lease != nil {
				w.write(lease)
				left = lease
			}
		default:
			w.longSection(ctx, id, forcedTTL)
		}
		pass(ctx, upTo(w.rand, 5*time.Millisecond))
	}
	if left != nil && left.Remaining() > 0 {
		w.release(ctx, left)
	}
}

// operate inspects the forced ids, and now and then ends a lease there: the one that it has just seen, one that it
// saw some time ago, or whichever it is.
func (w *worker) operate(ctx context.Context) {
	oneIn := [forcedIDs]int{4, 64} // for each of the three
	var before [forcedIDs]int64
	for ctx.Err() == nil {
		n := w.rand.IntN(forcedIDs)
		id := forcedID(n)
		seen := w.inspect(ctx, id)
		switch choice := w.rand.IntN(oneIn[n]); {
		case choice == 0 && seen != 0:
			w.force(ctx, id, seen)
		case choice == 1 && before[n] != 0:
			w.force(ctx, id, before[n])
		case choice == 2:
			w.force(ctx, id, 0)
		}
		if w.rand.IntN(3) == 0 {
			before[n] = seen
		}
		pass(ctx, upTo(w.rand, 100*time.Millisecond))
	}
}

// act does one of the things that callers do. A third of the workers keep to the slow
// ids, so that the others need not wait for those.
func (w *worker) act(ctx context.Context) {
	quick, ttl := quickID(w.rand.IntN(quickIDs)), time.Duration(w.process.job.TTL)*time.Millisecond
	slow := slowID(w.rand.IntN(slowIDs))
	n := w.rand.IntN(10)
	if w.number%3 > 0 {
		switch {
		case n < 5:
			w.section(ctx, quick, ttl, waitTime)
		case n < 8: // leaves after a moment
			w.section(ctx, quick, ttl, upTo(w.rand, 20*time.Millisecond))
		default:
			w.tryOnce(ctx, quick, ttl)
		}
		return
	}
	switch {
	case n < 5:
		w.longSection(ctx, slow, slowTTL)
	case n < 8:
		w.handOver(ctx, slow)
	default:
		w.section(ctx, slow, slowTTL, upTo(w.rand, 100*time.Millisecond))
	}
}

// section is the plain use: wait, work, release.
func (w *worker) section(ctx context.Context, id string, ttl, patience time.Duration) {
	if lease := w.wait(ctx, id, ttl, patience); lease != nil {
		w.write(lease)
		pass(ctx, upTo(w.rand, 3*time.Millisecond))
		w.release(ctx, lease)
	}
}

func (w *worker) tryOnce(ctx context.Context, id string, ttl time.Duration) {
	w.say(event{What: try, ID: id, TTL: ttl.Milliseconds()})
	lease, err := w.process.lock.Acquire(ctx, id, ttl)
	w.granted(lease, err)
	if lease == nil {
		return
	}
	w.write(lease)
	if w.rand.IntN(4) == 0 {
		w.renew(ctx, lease)
	}
	w.release(ctx, lease)
}

// longSection lasts longer than the lease does without renewals.
func (w *worker) longSection(ctx context.Context, id string, ttl time.Duration) {
	lease := w.wait(ctx, id, ttl, waitTime)
	if lease == nil {
		return
	}
	w.write(lease)
	kept, stop := w.process.lock.KeepAlive(ctx, lease)
	defer stop()
	w.say(event{What: hold, ID: id, Index: lease.Index, Until: instantOf(lease.Deadline()), Kept: true})
	pass(kept, ttl/2+upTo(w.rand, 4*ttl))
	lost := errors.Is(context.Cause(kept), redfour.ErrNotHeld)
	w.say(event{What: hold, ID: id, Index: lease.Index, Until: instantOf(lease.Deadline()), Lost: lost})
	w.write(lease)
	w.release(ctx, lease)
}

// expireAll uses a brief id, and leaves it alone for a while, so that a slow process gets it as well.
func (w *worker) expireAll(ctx context.Context, id string) {
	for ctx.Err() == nil {
		w.expire(ctx, id)
		pass(ctx, upTo(w.rand, 2*briefTTL))
	}
}

// expire holds a lease to its end, and then finds that it is over.
func (w *worker) expire(ctx context.Context, id string) {
	lease := w.wait(ctx, id, briefTTL, waitTime)
	if lease == nil {
		return
	}
	w.write(lease)
	pass(ctx, lease.Remaining()+upTo(w.rand, 30*time.Millisecond))
	w.write(lease)
	if w.rand.IntN(2) == 0 {
		w.renew(ctx, lease)
	}
	w.release(ctx, lease)
}

// outlast holds a lease to its end, and never hears whether it got there.
func (w *worker) outlast(ctx context.Context, id string) {
	if lease := w.wait(ctx, id, briefTTL, waitTime); lease != nil {
		w.write(lease)
		pass(ctx, lease.Remaining()+upTo(w.rand, 30*time.Millisecond))
	}
}

// handOver gives a lease to another process, which releases it.
func (w *worker) handOver(ctx context.Context, id string) {
	lease := w.wait(ctx, id, slowTTL, waitTime)
	if lease == nil {
		return
	}
	text, err := json.Marshal(lease)
	if err != nil {
		panic(err)
	}
	w.say(event{What: hand, ID: id, Index: lease.Index, Text: string(text)})
}

// receive goes on with a lease that another process got.
func (w *worker) receive(ctx context.Context, text []byte) {
	lease := new(redfour.Lease)
	if err := json.Unmarshal(text, lease); err != nil {
		panic(err)
	}
	w.renew(ctx, lease)
	w.release(ctx, lease)
}

func (w *worker) wait(ctx context.Context, id string, ttl, patience time.Duration) *redfour.Lease {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	w.say(event{What: wait, ID: id, TTL: ttl.Milliseconds(), Limit: patience.Milliseconds()})
	lease, err := w.process.lock.WaitAcquire(ctx, id, ttl)
	w.granted(lease, err)
	return lease
}

// granted reports how an attempt to get the lock ended.
func (w *worker) granted(lease *redfour.Lease, err error) {
	e := event{What: returned}
	held, isHeld := errors.AsType[*redfour.LockedError](err)
	switch {
	case err == nil:
		e.Result, e.Index, e.Until = granted, lease.Index, instantOf(lease.Deadline())
	case isHeld:
		e.Result, e.Holder = locked, held.Index
	default:
		e.Result, e.Text = unknown, err.Error()
	}
	w.say(e)
}

func (w *worker) renew(ctx context.Context, lease *redfour.Lease) {
	w.say(event{What: renew, ID: lease.ID, Index: lease.Index})
	err := w.process.lock.Renew(ctx, lease, lease.TTL)
	w.say(event{What: returned, Result: resultOf(err), Until: instantOf(lease.Deadline()), Text: textOf(err)})
}

func (w *worker) release(ctx context.Context, lease *redfour.Lease) {
	w.say(event{What: release, ID: lease.ID, Index: lease.Index})
	err := w.process.lock.Release(ctx, lease)
	w.say(event{What: returned, Result: resultOf(err), Text: textOf(err)})
}

// inspect returns the index of the lease that holds, 0 if none does or that is not known.
func (w *worker) inspect(ctx context.Context, id string) (index int64) {
	w.say(event{What: inspect, ID: id})
	status, err := w.process.lock.Inspect(ctx, id)
	e := event{What: returned, Result: expired}
	switch {
	case err != nil:
		e.Result, e.Text = unknown, err.Error()
	case status.Held:
		e.Result, e.Holder = locked, status.Index
	}
	w.say(e)
	return status.Index
}

// force ends a lease of somebody else, whichever it is if index is 0.
func (w *worker) force(ctx context.Context, id string, index int64) {
	w.say(event{What: force, ID: id, Index: index})
	err := w.process.lock.ForceRelease(ctx, id, index)
	w.say(event{What: returned, Result: resultOf(err), Text: textOf(err)})
}

// write changes the resource that the lock protects. Whether it is accepted is
// decided there.
func (w *worker) write(lease *redfour.Lease) {
	w.say(event{What: write, ID: lease.ID, Index: lease.Index})
}

func (w *worker) say(e event) {
	e.Worker = w.number
	w.process.say(e)
}

// instantOf turns a deadline into an instant. It is 0 for a deadline that is not known.
func instantOf(deadline time.Time) instant {
	if deadline.IsZero() {
		return 0
	}
	return now().add(time.Until(deadline))
}

func resultOf(err error) result {
	switch {
	case err == nil:
		return done
	case errors.Is(err, redfour.ErrExpired):
		return expired
	case errors.Is(err, redfour.ErrConflict):
		return conflict
	}
	return unknown
}

func textOf(err error) string {
	if err == nil {
		return ""
	}
	return strings.ToValidUTF8(err.Error(), "?")
}

// upTo returns a random duration of less than d.
func upTo(r *rand.Rand, d time.Duration) time.Duration { return time.Duration(r.Int64N(int64(d))) }
