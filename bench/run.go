package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

const (
	leaseTime = 10 * time.Second
	// Idle waiters wait for leases that outlast the run.
	idleLeaseTime = time.Minute

	readyTime = time.Minute      // for which a worker may warm up
	endTime   = 30 * time.Second // for which it may finish
)

// A runner measures one library under one load at a time.
type runner struct {
	clock clock
	self  string // the binary, which is also the worker
	dir   string // for sections, and what clusters write

	cluster cluster // that the last run was in, for the next
}

// close ends what outlives a run.
func (r *runner) close() { r.cluster.stop() }

// run makes one repetition. Whatever goes wrong is in the Run.
func (r *runner) run(ctx context.Context, load Load, e entry, d time.Duration) Run {
	servers, err := r.servers(ctx, load)
	var run Run
	if err == nil {
		run, err = r.measure(ctx, servers, load, e, d)
	}
	if load.Masters == 0 {
		for _, s := range servers {
			s.stop()
		}
	}
	if err != nil {
		run.Failed = err.Error()
		r.cluster.stop() // Nobody knows what is in it.
	}
	return run
}

// servers returns what a load is put on: a new server, or a cluster. That takes seconds to form, so it is the one of the run
// before if that was as large.
func (r *runner) servers(ctx context.Context, load Load) ([]*server, error) {
	if len(r.cluster) == load.Masters && load.Masters > 0 {
		return r.cluster, r.cluster.empty(ctx)
	}
	r.cluster.stop()
	var err error
	if load.Masters > 0 {
		r.cluster, err = startCluster(ctx, r.dir, load.Masters)
		return r.cluster, err
	}
	s, err := startServer(ctx)
	if err != nil {
		return nil, err
	}
	return []*server{s}, nil
}

func (r *runner) measure(ctx context.Context, servers []*server, load Load, e entry, d time.Duration) (Run, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	where := placeOf(load, servers)
	if load.NetworkMS > 0 {
		n, err := startNetwork(where.Addr, load.NetworkMS)
		if err != nil {
			return Run{}, err
		}
		defer n.stop()
		where.Addr = n.addr()
	}
	if load.Workload == Idle {
		holder, err := holdAll(ctx, e, servers[0].addr, load.IDs)
		if err != nil {
			return Run{}, fmt.Errorf("hold: %w", err)
		}
		defer holder.close()
	}

	workers, err := r.start(ctx, load, e, where, d)
	defer func() {
		for _, w := range workers {
			w.kill()
		}
	}()
	if err != nil {
		return Run{}, err
	}
	return r.between(ctx, servers, load, e, workers, d)
}

func placeOf(load Load, servers []*server) place {
	if load.Masters == 0 {
		return place{Addr: servers[0].addr}
	}
	var p place
	for _, s := range servers {
		p.Cluster = append(p.Cluster, s.addr)
	}
	return p
}

// between measures what happens between go and stop.
func (r *runner) between(ctx context.Context, servers []*server, load Load, e entry, workers []*process, d time.Duration) (Run, error) {
	before, from, err := readAll(ctx, servers, r.clock)
	if err != nil {
		return Run{}, err
	}
	worked := busy()
	for _, w := range workers {
		w.say("go")
	}
	select {
	case <-time.After(d):
	case <-ctx.Done():
		return Run{}, ctx.Err()
	}
	after, to, err := readAll(ctx, servers, r.clock)
	if err != nil {
		return Run{}, err
	}
	worked = busy() - worked
	for _, w := range workers {
		w.say("stop")
	}
	run := Run{Seconds: time.Duration(to - from).Seconds()}.withServers(load, e, before, after)
	total, sections, err := gather(workers)
	if err != nil {
		return run, err
	}
	run.ClientCPU = total.CPU
	run.OtherCPU = max(0, worked-run.RedisCPU-run.ClientCPU)
	run.Resident = total.Resident
	run.WaiterBytes = total.HeapStack / float64(load.Waiters)
	switch load.Workload {
	case Cycles:
		run.Sections = total.Sections
	case Contend, Handover:
		if err := checkAlone(sections); err != nil {
			return run, err
		}
		run = run.withTurns(sections, load.Waiters, from, to)
	case Idle:
		return run, nil
	}
	if run.Sections == 0 {
		return run, errors.New("no section")
	}
	if load.Workload == Handover {
		took := handovers(sections, to)
		if len(took) == 0 {
			return run, errors.New("no waiter was handed the lock")
		}
		run.Handovers, run.P50, run.P99 = len(took), percentile(took, 0.5), percentile(took, 0.99)
	}
	return run, nil
}

// withServers adds what the servers counted between two readings.
func (r Run) withServers(load Load, e entry, before, after []figures) Run {
	for i := range after {
		sent := float64(after[i].sent(before[i], e.direct))
		r.Commands += sent
		r.RedisCPU += after[i].cpu - before[i].cpu
		if load.Masters > 0 {
			r.MasterCommands = append(r.MasterCommands, sent)
		}
	}
	return r
}

// gather adds up what all workers say at their end.
func gather(workers []*process) (total report, sections []section, err error) {
	waiters := int64(0) // of the workers before
	for _, w := range workers {
		r, err := w.report()
		if err != nil {
			return total, nil, err
		}
		if r.Errors > 0 {
			return total, nil, fmt.Errorf("%d of %d waiters of a process: %s", r.Errors, w.task.Waiters, r.Error)
		}
		total.Sections += r.Sections
		total.CPU += r.CPU
		total.Resident += r.Resident
		total.HeapStack += r.HeapStack
		if w.task.SectionsFile != "" {
			more, err := readSections(w.task.SectionsFile)
			if err != nil {
				return total, nil, err
			}
			for _, s := range more {
				s.waiter += waiters
				sections = append(sections, s)
			}
		}
		waiters += int64(w.task.Waiters)
	}
	return total, sections, nil
}

// holdAll takes the locks of all ids that waiters will wait for, in the parent.
func holdAll(ctx context.Context, e entry, addr string, ids int) (locker, error) {
	if e.open == nil {
		e.open = openRedfour // which shares its locks with the npm packages
	}
	l, err := e.open(setting{place: place{Addr: addr}, ttl: idleLeaseTime})
	if err != nil {
		return nil, err
	}
	errs := make([]error, ids)
	var all sync.WaitGroup
	turn := make(chan struct{}, 64) // a slot for each that is under way
	for n := range ids {
		turn <- struct{}{}
		all.Go(func() {
			_, errs[n] = l.acquire(ctx, idOf(n, ids))
			<-turn
		})
	}
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// A process is a worker process, as its parent sees it.
type process struct {
	task    task
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	answers chan []byte   // a line each; closed by follow at the end
	ended   chan struct{} // closed by follow, once the process is gone and err is set
	err     error         // what became of it
}

// start starts the workers for a load, and returns when all are ready.
func (r *runner) start(ctx context.Context, load Load, e entry, where place, d time.Duration) ([]*process, error) {
	var workers []*process
	for n := range load.Processes {
		t := task{
			place: where, Library: e.Name, Workload: load.Workload, Process: n,
			Waiters: load.Waiters / load.Processes, IDs: load.IDs, SectionUS: load.SectionUS,
			TTLMS:  int(leaseTime.Milliseconds()),
			HoldMS: [2]float64{14, 24}, PauseMS: 12,
			PollMS:   float64(poll(load)) / 1e6,
			SettleMS: float64(d) / 1e6, // as long as the run
		}
		if load.Workload == Idle {
			t.TTLMS = int(idleLeaseTime.Milliseconds())
		}
		if load.Workload == Contend || load.Workload == Handover {
			t.SectionsFile = filepath.Join(r.dir, fmt.Sprintf("%d.bin", n))
		}
		cmd := exec.CommandContext(ctx, r.self, "-worker")
		if e.open == nil {
			t.Library = e.pkg
			cmd = exec.CommandContext(ctx, "node", filepath.Join(nodeDir, "worker.mjs"))
		}
		w, err := startProcess(cmd, t)
		if err != nil {
			return workers, err
		}
		workers = append(workers, w)
	}
	for _, w := range workers {
		var answer ready
		if err := w.answer(&answer, readyTime); err != nil {
			return workers, err
		}
		if !answer.Ready {
			return workers, errors.New("a worker is not ready")
		}
	}
	return workers, nil
}

func startProcess(cmd *exec.Cmd, t task) (*process, error) {
	dieWithParent(cmd)
	cmd.Stderr = os.Stderr
	w := &process{task: t, cmd: cmd, answers: make(chan []byte, 2), ended: make(chan struct{})}
	var err error
	if w.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	go w.follow(stdout)
	w.say(string(text))
	return w, nil
}

// follow reads what the worker prints, until it ends.
func (w *process) follow(stdout io.Reader) {
	lines := bufio.NewScanner(stdout)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		w.answers <- append([]byte(nil), lines.Bytes()...)
	}
	close(w.answers)
	w.err = w.cmd.Wait()
	close(w.ended)
}

// say sends a line. A worker that has died shows in what it answers.
func (w *process) say(line string) { _, _ = io.WriteString(w.stdin, line+"\n") }

// answer waits for the next line of the worker.
func (w *process) answer(into any, d time.Duration) error {
	select {
	case line, ok := <-w.answers:
		if !ok {
			return fmt.Errorf("worker %d died", w.task.Process)
		}
		if err := json.Unmarshal(line, into); err != nil {
			return fmt.Errorf("worker %d said %q: %w", w.task.Process, line, err)
		}
		return nil
	case <-time.After(d):
		return fmt.Errorf("worker %d has not answered for %v", w.task.Process, d)
	}
}

// report waits for the last line of the worker, and for its end.
func (w *process) report() (report, error) {
	var answer report
	if err := w.answer(&answer, endTime); err != nil {
		return answer, err
	}
	select {
	case <-w.ended:
		if w.err != nil {
			return answer, fmt.Errorf("worker %d: %w", w.task.Process, w.err)
		}
		return answer, nil
	case <-time.After(endTime):
		return answer, fmt.Errorf("worker %d has not ended for %v", w.task.Process, endTime)
	}
}

// kill ends a worker that may have ended, and waits for that.
func (w *process) kill() {
	_ = w.cmd.Process.Kill() // It has ended, if all went well.
	for range w.answers {    // follow must not wait for somebody who asks
	}
	<-w.ended
}

// poll is how often those try again who poll. Less often gives more sections a second, because whoever releases takes the lock again
// at once, but starves others: with 128 waiters some at 30 ms, and none at 10. More often keeps the server busy with
// attempts that fail, which 1000 waiters do at 10 ms.
func poll(load Load) time.Duration {
	if load.Waiters >= 1000 {
		return 100 * time.Millisecond
	}
	return 10 * time.Millisecond
}
