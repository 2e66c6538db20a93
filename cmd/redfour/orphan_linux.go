package main

import "syscall"

// dieWithParent lets the kernel kill the process when this one is killed, because then nobody renews the lease. The kernel means the thread
// that starts the process, which main keeps.
func dieWithParent(attributes *syscall.SysProcAttr) { attributes.Pdeathsig = syscall.SIGKILL }
