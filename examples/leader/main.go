// Command leader lets three processes elect one that leads. The first leader is killed, and another takes over when its lease has run
// out. The second resigns, and another takes over at once. The index of the lease is the term: whoever is told something by a leader
// refuses it from one of an earlier term.
//
// The program starts itself once for each candidate, and asks one to resign by closing its standard input. What a candidate does is in
// candidate.go.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"time"

	"github.com/redfour-go/redfour/examples/internal/demo"
)

func main() {
	if len(os.Args) == 4 && os.Args[1] == "stand" {
		demo.Process("leader", func(ctx context.Context) error { return stand(ctx, os.Args[2], os.Args[3]) })
		return
	}
	demo.Main("leader", run)
}

// A candidate is a process that stands for election.
type candidate struct {
	name   string
	cmd    *exec.Cmd
	resign io.Closer // its standard input
	out    io.Reader
}

// A message is what a candidate has printed.
type message struct {
	from *candidate
	term int64
	work int
}

func run(ctx context.Context, run *demo.Run) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	messages := make(chan message) // sent by the goroutines that follow a candidate, closed when the last has ended
	var running sync.WaitGroup
	var failed error
	for _, name := range []string{"ann", "bob", "cat"} {
		c, err := start(ctx, run, name)
		if err != nil {
			failed = err
			cancel()
			break
		}
		running.Go(func() { c.follow(messages) })
	}
	go func() {
		running.Wait()
		close(messages)
	}()

	w := watch{run: run, led: make(map[string]bool)}
	for m := range messages { // to the end in any case, so that no candidate is left behind
		if err := w.see(m); err != nil && failed == nil {
			failed = err
			cancel()
		}
	}
	if failed != nil || ctx.Err() != nil {
		return errors.Join(failed, context.Cause(ctx))
	}
	if len(w.led) != 3 || !w.killed {
		return fmt.Errorf("%d of 3 candidates have led, and that one was killed is %t", len(w.led), w.killed)
	}
	fmt.Println("\n3 leaders, one after the other, and each term greater than the one before.")
	return nil
}

// start starts a candidate. When ctx ends, it is asked to resign.
func start(ctx context.Context, run *demo.Run, name string) (*candidate, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self, "stand", name, run.Namespace)
	cmd.Env = append(os.Environ(), "REDIS_URL="+run.URL) // Everybody may see the arguments of a process, and the URL may contain a password.
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Cancel = stdin.Close
	cmd.WaitDelay = 5 * time.Second // Then it is killed.
	return &candidate{name: name, cmd: cmd, resign: stdin, out: stdout}, cmd.Start()
}

// follow reads what the candidate prints, and returns when its process is gone.
func (c *candidate) follow(messages chan<- message) {
	lines := bufio.NewScanner(c.out)
	for lines.Scan() {
		m := message{from: c}
		if _, err := fmt.Sscanf(lines.Text()+"\n", workFormat, &m.term, &m.work); err == nil {
			messages <- m
		}
	}
	_ = c.cmd.Wait() // One of them is killed, and what another fails with is on its standard error.
}

// A watch is who receives the leaders' work, and makes them leave.
type watch struct {
	run    *demo.Run
	term   int64           // the newest seen
	led    map[string]bool // which candidates have
	killed bool            // one of them
}

func (w *watch) see(m message) error {
	if m.term < w.term {
		// A leader that was frozen, for one, does not know yet that another has been elected.
		w.run.Say(m.from.name, "is refused, because term %d is over", m.term)
		return nil
	}
	if m.term > w.term {
		w.term = m.term
		w.led[m.from.name] = true
		w.run.Say(m.from.name, "leads, in term %d", m.term)
	}
	if m.work != 3 {
		return nil
	}
	w.run.Say(m.from.name, "has worked %d times", m.work)
	if !w.killed {
		w.killed = true
		w.run.Say(m.from.name, "is killed")
		return m.from.cmd.Process.Kill()
	}
	w.run.Say(m.from.name, "is asked to resign")
	return m.from.resign.Close()
}
