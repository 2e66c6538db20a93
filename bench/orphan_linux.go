package main

import (
	"os/exec"
	"syscall"
)

// dieWithParent lets the kernel kill a process with the one that started it, however that ends.
func dieWithParent(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
