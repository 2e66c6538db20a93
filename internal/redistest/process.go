//go:build unix

package redistest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds every wait for something that Redis says. It is generous, because it is only spent when a test is going to fail.
const patience = 30 * time.Second

// process is one run of the redis-server binary, as a server or as a sentinel. What it prints is kept, because that is
// how a test learns, without asking again and again, that it is ready or that a failover has happened.
type process struct {
	cmd    *exec.Cmd
	exited chan struct{} // closed by follow, once the process is gone and has been waited for

	mu    sync.Mutex    // guards what follows
	lines []string      // all that the process has printed
	more  chan struct{} // closed by follow with each line, then replaced; closed for good at the end
}

// launch starts the binary. Whoever calls it must kill the process.
func launch(binary string, args []string) (*process, error) {
	cmd := exec.Command(binary, args...)
	dieWithTest(cmd)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, exited: make(chan struct{}), more: make(chan struct{})}
	go p.follow(out)
	return p, nil
}

// follow reads what the process prints until it has ended, so that it is never blocked by a full pipe, and then waits for it.
func (p *process) follow(out io.Reader) {
	scanner := bufio.NewScanner(out)
	for scanner.Scan() {
		p.mu.Lock()
		p.lines = append(p.lines, scanner.Text())
		close(p.more)
		p.more = make(chan struct{})
		p.mu.Unlock()
	}
	_ = p.cmd.Wait() // Killing is how these processes end, so their exit status says nothing.
	close(p.exited)
	p.mu.Lock()
	close(p.more)
	p.mu.Unlock()
}

// printed returns how many lines there are, as the point from which a later await looks.
func (p *process) printed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.lines)
}

// await blocks until a line from the given one on contains text.
func (p *process) await(ctx context.Context, from int, text string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		p.mu.Lock()
		fresh, more := p.lines[from:], p.more
		p.mu.Unlock()
		for _, line := range fresh {
			if strings.Contains(line, text) {
				return nil
			}
		}
		from += len(fresh)
		select {
		case <-more:
			if err := p.ended(from); err != nil {
				return fmt.Errorf("ended before it printed %q: %w", text, err)
			}
		case <-ctx.Done():
			return fmt.Errorf("did not print %q: %w\n%s", text, ctx.Err(), p.output())
		}
	}
}

// ended returns an error with all that was printed if the process is gone and everything up to the given line has been looked at.
func (p *process) ended(seen int) error {
	select {
	case <-p.exited:
	default:
		return nil
	}
	if p.printed() > seen {
		return nil
	}
	return errors.New(p.output())
}

func (p *process) output() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// signal sends a signal by process id, and fails the test if the process has ended.
func (p *process) signal(tb testing.TB, sig syscall.Signal) {
	tb.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		tb.Fatalf("redistest: %v: %v", sig, err)
	}
}

// kill ends the process at once, even a stopped one, and returns when it is gone. Killing twice does no harm.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // The only possible error says that it has ended.
	<-p.exited
}
