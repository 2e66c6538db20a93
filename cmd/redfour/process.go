package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
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

// wasSignaled reports whether a signal has ended the process.
func (p *process) wasSignaled() bool {
	exit, ok := errors.AsType[*exec.ExitError](p.err)
	if !ok {
		return false
	}
	_, ok = endedBy(exit)
	return ok
}

// failure returns what the process ended with, or nil for success.
func (p *process) failure() error {
	if p.err == nil {
		return nil
	}
	exit, ok := errors.AsType[*exec.ExitError](p.err)
	if !ok {
		return &failure{code: exitNotRunnable, err: p.err}
	}
	if sig, ok := endedBy(exit); ok {
		return &failure{code: exitSignal + int(sig), err: fmt.Errorf("the signal \"%v\"", sig), silent: true}
	}
	return &failure{code: exit.ExitCode(), err: fmt.Errorf("status %d", exit.ExitCode()), silent: true}
}
