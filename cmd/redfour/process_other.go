//go:build !unix

package main

import (
	"os"
	"os/exec"
	"syscall"
)

// Here there are neither process groups nor signals that could be passed on: Ctrl-C reaches the command, too, and nothing but killing
// ends it.

func passedOn() []os.Signal { return []os.Signal{os.Interrupt} }

func ends(os.Signal) bool { return false }

func (p *process) prepare()         {}
func (p *process) pass(os.Signal)   {}
func (p *process) terminate() error { return p.kill() }
func (p *process) kill() error      { return p.cmd.Process.Kill() }
func (p *process) others() bool     { return false }

func endedBy(*exec.ExitError) (syscall.Signal, bool) { return 0, false }

func dieOfInterrupt() {}
