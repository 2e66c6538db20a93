//go:build unix

package main

import (
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"syscall"
	"time"
)

// passedOn returns the signals that are passed on to the command, but for those that were switched off, as nohup does.
func passedOn() []os.Signal {
	all := []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2}
	return slices.DeleteFunc(all, signal.Ignored)
}

// prepare puts the process into a group of its own, so that what it starts can be ended with it. In the foreground of a terminal it
// stays in the group of redfour: another could not read from the keyboard.
func (p *process) prepare() {
	p.group = !inForeground()
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: p.group}
	dieWithParent(p.cmd.SysProcAttr)
	adoptOrphans()
}

// pass passes a signal on. What the terminal sends, the process has already.
func (p *process) pass(sig os.Signal) {
	if p.group || (sig != syscall.SIGINT && sig != syscall.SIGQUIT) {
		_ = p.send(sig.(syscall.Signal))
	}
}

// ends reports whether a signal is one that programs end by.
func ends(sig os.Signal) bool {
	return sig == syscall.SIGINT || sig == syscall.SIGQUIT || sig == syscall.SIGTERM
}

func (p *process) terminate() error { return p.send(syscall.SIGTERM) }
func (p *process) kill() error      { return p.send(syscall.SIGKILL) }

// send sends a signal to the group, or to the process. That it has ended is no error.
func (p *process) send(sig syscall.Signal) error {
	var err error
	if p.group {
		err = syscall.Kill(-p.cmd.Process.Pid, sig)
	} else {
		err = p.cmd.Process.Signal(sig)
	}
	if errors.Is(err, syscall.ESRCH) || errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

// others reports whether there are others in the group of the process, which has ended.
func (p *process) others() bool {
	if !p.group {
		return false
	}
	reap(p.cmd.Process.Pid)
	return !errors.Is(syscall.Kill(-p.cmd.Process.Pid, 0), syscall.ESRCH)
}

// endedBy returns the signal that has ended a process, if one has.
func endedBy(exit *exec.ExitError) (syscall.Signal, bool) {
	status, ok := exit.Sys().(syscall.WaitStatus)
	return status.Signal(), ok && status.Signaled()
}

// dieOfInterrupt ends redfour as an interrupt does, because a shell goes on with its loop after a command that has only
// exited, whatever its status.
func dieOfInterrupt() {
	if signal.Ignored(syscall.SIGINT) {
		return
	}
	signal.Reset(syscall.SIGINT)
	_ = syscall.Kill(os.Getpid(), syscall.SIGINT)
	<-time.After(time.Second) // It is on its way.
}
