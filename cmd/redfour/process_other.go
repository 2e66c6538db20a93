//go:build !unix

package main

import (
	"os"
	"os/exec"
	"syscall"
)

// Here there are neither process groups nor signals that could be passed on: Ctrl-C reaches the command, too.

func passedOn() []os.Signal { return []os.Signal{os.Interrupt} }

func (p *process) prepare()                {}
func (p *process) pass(os.Signal)          {}
func (p *process) terminate()              {}
func (p *process) kill()                   { _ = p.cmd.Process.Kill() }
func (p *process) endRest(<-chan struct{}) {}

func endedBy(*exec.ExitError) (syscall.Signal, bool) { return 0, false }
