//go:build unix && !linux

package redistest

import "os/exec"

// dieWithTest does nothing here: only Linux can tie a child's life to its parent's.
func dieWithTest(*exec.Cmd) {}
