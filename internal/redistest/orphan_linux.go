package redistest

import (
	"os/exec"
	"syscall"
)

// dieWithTest lets the kernel kill the server with the test binary. A panic or a timeout of "go test" runs no Cleanup, and servers
// would be left behind.
func dieWithTest(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
