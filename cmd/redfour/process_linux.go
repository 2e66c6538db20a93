package main

import (
	"os"
	"syscall"
	"unsafe"
)

// dieWithParent lets the kernel kill the process when this one is killed, because then nobody renews the lease. The kernel means the thread
// that starts the process, which main keeps.
func dieWithParent(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }

// adoptOrphans makes this process the parent of what the command leaves behind, so that it can see it end. Where nothing else reaps
// the dead, as in many containers, they would seem to be there for ever.
func adoptOrphans() {
	const prSetChildSubreaper = 36
	_, _, _ = syscall.Syscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0) // Without it, dead ones count until somebody reaps them.
}

// reap takes leave of the dead of a process group.
func reap(group int) {
	for {
		if pid, err := syscall.Wait4(-group, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
			return
		}
	}
}

// inForeground reports whether this process is in the foreground of a terminal, and so reads from its keyboard and gets its Ctrl-C.
func inForeground() bool {
	terminal, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	defer func() { _ = terminal.Close() }()
	var group int32
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, terminal.Fd(), syscall.TIOCGPGRP, uintptr(unsafe.Pointer(&group)))
	return errno != 0 || int(group) == syscall.Getpgrp()
}
