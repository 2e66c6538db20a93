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

// prepare puts the process into a group of its own, so that what it starts can be ended with it. At a terminal it stays in
// the group of redfour: another could not read from the keyboard.
func (p *process) prepare() {
	terminal, err := os.Open("/dev/tty")
	if err == nil {
		_ = terminal.Close()
	}
	p.group = err != nil
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: p.group}
	dieWithParent(p.cmd.SysProcAttr)
}

// pass passes a signal on. What the terminal sends, the process has already.
func (p *process) pass(sig os.Signal) {
	if p.group || (sig != syscall.SIGINT && sig != syscall.SIGQUIT) {
		p.send(sig.(syscall.Signal))
	}
}

func (p *process) terminate() { p.send(syscall.SIGTERM) }
func (p *process) kill()      { p.send(syscall.SIGKILL) }

// send sends a signal to the group, or to the process. A process that has ended minds none.
func (p *process) send(sig syscall.Signal) {
	if p.group {
		_ = syscall.Kill(-p.cmd.Process.Pid, sig)
	} else {
		_ = p.cmd.Process.Signal(sig)
	}
}

// endRest waits for the others of the group until the grace period is over, and then kills them. Without a graceOver they have been killed.
func (p *process) endRest(graceOver <-chan struct{}) {
	look := time.NewTicker(20 * time.Millisecond) // Nobody tells when they end.
	defer look.Stop()
	for p.group && graceOver != nil && !errors.Is(syscall.Kill(-p.cmd.Process.Pid, 0), syscall.ESRCH) {
		select {
		case <-look.C:
		case <-graceOver:
			p.kill()
			return
		}
	}
}

// endedBy returns the signal that has ended a process, if one has.
func endedBy(exit *exec.ExitError) (syscall.Signal, bool) {
	status, ok := exit.Sys().(syscall.WaitStatus)
	return status.Signal(), ok && status.Signaled()
}
