//go:build unix && !linux

package main

import (
	"os"
	"syscall"
)

func dieWithParent(*syscall.SysProcAttr) {}

func adoptOrphans() {}
func reap(int)      {}

// inForeground reports whether there is a terminal, and so takes a job in its background for one in the foreground.
func inForeground() bool {
	terminal, err := os.Open("/dev/tty")
	if err != nil {
		return false
	}
	_ = terminal.Close()
	return true
}
