package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

// A process is the command that is run.
type process struct {
	cmd    *exec.Cmd
	group  bool          // it has a process group of its own
	exited chan struct{} // closed by the goroutine of start, which has set err
	err    error         // how it ended
}

// start starts a command with the standard files of this process.
func start(path string, argv, env []string) (*process, error) {
	p := &process{
		cmd:    &exec.Cmd{Path: path, Args: argv, Env: env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr},
		exited: make(chan struct{}),
	}
	p.prepare()
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.exited)
	}()
	return p, nil
}

// signal returns the signal that has ended the process, if one has.
func (p *process) signal() (syscall.Signal, bool) {
	exit, ok := errors.AsType[*exec.ExitError](p.err)
	if !ok {
		return 0, false
	}
	return endedBy(exit)
}

// failure returns what the process ended with, or nil for success.
func (p *process) failure() error {
	exit, ok := errors.AsType[*exec.ExitError](p.err)
	sig, signaled := p.signal()
	switch {
	case p.err == nil:
		return nil
	case !ok:
		return &failure{code: exitNotRunnable, err: p.err}
	case signaled:
		return &failure{code: exitSignal + int(sig), err: fmt.Errorf("the signal \"%v\"", sig), silent: true}
	}
	return &failure{code: exit.ExitCode(), err: fmt.Errorf("status %d", exit.ExitCode()), silent: true}
}
