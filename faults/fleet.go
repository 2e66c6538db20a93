package faults

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A fleet is the worker processes of one run, and the record of what they do.
type fleet struct {
	t *testing.T

	mu       sync.Mutex // guards what follows
	recorder *recorder
	children map[string]*child
	started  int              // so far, for their names
	stopping bool             // all processes are told to end
	grants   map[string]int   // of each id
	resource map[string]int64 // id to the highest index that has written
	refused  map[refusal]bool
	leaks    []string
	changed  chan struct{} // closed with each event, and replaced
}

func newFleet(t *testing.T) *fleet {
	t.Helper()
	return &fleet{
		t: t, recorder: newRecorder(), children: make(map[string]*child),
		grants: make(map[string]int), resource: make(map[string]int64),
		refused: make(map[refusal]bool), changed: make(chan struct{}),
	}
}

// A refusal is a write that came too late.
type refusal struct {
	process, id string
	index       int64
}

// A child is one worker process.
type child struct {
	name  string
	npm   bool
	pairs []int // the calm ids that it takes turns on
	cmd   *exec.Cmd
	stdin io.WriteCloser
	over  chan struct{} // closed when the process has ended and all its events are known

	// Guarded by fleet.mu:
	doing   map[int]what  // what each worker waits for; an operation
	inside  map[int]event // what each worker said last of the lease that it keeps alive
	stopped bool          // by a signal
	killed  bool
	ready   bool
	ended   bool // it said so
}

// start starts a worker process of the test binary, and returns when it works.
func (f *fleet) start(j job) *child {
	f.t.Helper()
	text, err := json.Marshal(j)
	require.NoError(f.t, err)
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), workerVariable+"="+string(text))
	return f.launch(cmd, "go", j.Pairs)
}

// launch starts a process that reports events. It is killed when the test ends.
func (f *fleet) launch(cmd *exec.Cmd, kind string, pairs []int) *child {
	f.t.Helper()
	stdin, err := cmd.StdinPipe()
	require.NoError(f.t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(f.t, err)
	cmd.Stderr = os.Stderr
	require.NoError(f.t, cmd.Start())
	f.mu.Lock()
	f.started++
	c := &child{
		name: fmt.Sprintf("%s-%d", kind, f.started), npm: kind == "npm", pairs: pairs, cmd: cmd, stdin: stdin,
		over: make(chan struct{}), doing: make(map[int]what), inside: make(map[int]event),
	}
	f.children[c.name] = c
	f.mu.Unlock()
	f.t.Cleanup(func() {
		_ = cmd.Process.Kill() // It has ended, if all went well.
		<-c.over
	})
	go f.follow(c, stdout)
	f.await(c.name+" to be ready", func() bool { return c.ready })
	return c
}

// follow takes the events of a process until it ends.
func (f *fleet) follow(c *child, events io.Reader) {
	defer close(c.over)
	lines := bufio.NewScanner(events)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			f.leak(fmt.Sprintf("%s: unreadable event %q", c.name, lines.Text()))
			continue
		}
		f.note(c, e)
	}
	_ = c.cmd.Wait() // Most are killed.
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.children, c.name)
	if !c.ended && !c.killed && !f.stopping {
		f.leaks = append(f.leaks, c.name+": died")
	}
	for _, n := range c.pairs {
		f.giveTurnLocked(calmID(n), nil) // The other must not wait for it.
	}
	f.tellLocked()
}

func (f *fleet) leak(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leaks = append(f.leaks, what)
}

func (f *fleet) tellLocked() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// note takes one event.
func (f *fleet) note(c *child, e event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer f.tellLocked()
	id := f.recorder.record(c.name, c.npm, e)
	switch e.What {
	case try, wait, renew:
		c.doing[e.Worker] = e.What
	case release:
		c.doing[e.Worker] = e.What
		delete(c.inside, e.Worker)
	case returned:
		delete(c.doing, e.Worker)
		if e.Result == granted {
			f.grants[id]++
			f.giveTurnLocked(id, c)
		}
	case hold:
		if e.Kept {
			c.inside[e.Worker] = e
		}
	case write:
		// The resource refuses whoever comes after somebody with a greater index.
		if e.Index < f.resource[e.ID] {
			f.refused[refusal{c.name, e.ID, e.Index}] = true
		} else {
			f.resource[e.ID] = e.Index
		}
	case hand:
		f.handLocked(c, e)
	case ready:
		c.ready = true
		for _, n := range c.pairs {
			f.giveTurnLocked(calmID(n), nil)
		}
	case ended:
		c.ended = true
	case leftover:
		f.leaks = append(f.leaks, c.name+": "+e.Text)
	}
}

// giveTurnLocked lets those wait for a calm id who take turns on it, but for the one who has it.
func (f *fleet) giveTurnLocked(id string, but *child) {
	for _, c := range f.children {
		if c != but && slices.ContainsFunc(c.pairs, func(n int) bool { return calmID(n) == id }) {
			_, _ = io.WriteString(c.stdin, "turn "+id+"\n")
		}
	}
}

// handLocked gives a lease to another process, if there is one.
func (f *fleet) handLocked(from *child, e event) {
	for _, name := range slices.Sorted(maps.Keys(f.children)) {
		if to := f.children[name]; to != from && !to.npm && to.ready && !to.stopped {
			// The lease is small, and the pipe is not.
			_, _ = io.WriteString(to.stdin, e.Text+"\n")
			return
		}
	}
}

// await waits until a condition, which is evaluated under the fleet's mutex, holds.
func (f *fleet) await(what string, condition func() bool) {
	f.t.Helper()
	if !f.awaitFor(30*time.Second, condition) {
		require.FailNow(f.t, "waited too long for "+what)
	}
}

func (f *fleet) awaitFor(limit time.Duration, condition func() bool) bool {
	ctx, cancel := context.WithTimeout(f.t.Context(), limit)
	defer cancel()
	for {
		f.mu.Lock()
		holds, changed := condition(), f.changed
		f.mu.Unlock()
		if holds {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// pick waits for a process of ours of which the condition holds.
func (f *fleet) pick(what string, condition func(*child) bool) *child {
	f.t.Helper()
	var found *child
	f.await(what, func() bool {
		for _, name := range slices.Sorted(maps.Keys(f.children)) {
			if c := f.children[name]; c.ready && !c.npm && !c.stopped && condition(c) {
				found = c
				return true
			}
		}
		return false
	})
	return found
}

func holds(c *child) bool { return len(c.inside) > 0 }

// queues tells of a process that it stands in line, and keeps no lease alive.
func queues(c *child) bool { return len(c.inside) == 0 && c.doing[workerOfLine] == wait }

// sections returns what a process said of the leases that it keeps alive.
func (f *fleet) sections(c *child) []event {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(c.inside))
}

// signal sends a signal to a process, and notes when it stopped, went on or died of it.
func (f *fleet) signal(c *child, s syscall.Signal) {
	f.t.Helper()
	f.mu.Lock()
	away := f.recorder.away[c.name]
	switch s {
	case syscall.SIGSTOP:
		away = append(away, span{now(), never})
	case syscall.SIGCONT:
		away[len(away)-1].to = now()
	}
	f.recorder.away[c.name] = away
	c.stopped = s == syscall.SIGSTOP
	c.killed = s == syscall.SIGKILL
	f.mu.Unlock()
	require.NoError(f.t, c.cmd.Process.Signal(s))
	if c.killed {
		<-c.over
		f.mu.Lock()
		f.recorder.away[c.name] = append(away, span{now(), never})
		f.mu.Unlock()
	}
}

// stop ends all processes in good order, and returns the history.
func (f *fleet) stop() *history {
	f.t.Helper()
	f.mu.Lock()
	f.recorder.end = now()
	f.stopping = true
	children := slices.Collect(maps.Values(f.children))
	f.mu.Unlock()
	for _, c := range children {
		_, _ = io.WriteString(c.stdin, "stop\n")
	}
	for _, c := range children {
		limit := 30 * time.Second
		if c.npm {
			limit = 3 * time.Second // It waits for ever on a connection that has died silently.
		}
		select {
		case <-c.over:
		case <-time.After(limit):
			_ = c.cmd.Process.Kill()
			<-c.over
		}
		if !c.ended && !c.npm {
			f.leak(c.name + ": ended without cleaning up")
		}
	}
	return &f.recorder.history
}
