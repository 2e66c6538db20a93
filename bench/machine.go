package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine says where this runs. What cannot be found out stays empty.
func machine(ctx context.Context) Machine {
	m := Machine{
		CPU:   field("/proc/cpuinfo", "model name"),
		Cores: runtime.NumCPU(),
		Go:    strings.TrimPrefix(runtime.Version(), "go"),
		Node:  strings.TrimPrefix(output(ctx, "node", "--version"), "v"),
	}
	if kib, err := strconv.Atoi(strings.TrimSuffix(field("/proc/meminfo", "MemTotal"), " kB")); err == nil {
		m.Memory = fmt.Sprintf("%d GiB", (kib+1<<19)>>20)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.System = unix.ByteSliceToString(name.Sysname[:]) + " " + unix.ByteSliceToString(name.Release[:])
	}
	// Redis server v=7.0.15 sha=…
	for word := range strings.FieldsSeq(output(ctx, "redis-server", "--version")) {
		if version, ok := strings.CutPrefix(word, "v="); ok {
			m.Redis = version
		}
	}
	return m
}

// busy returns for how many seconds the cores of this machine have worked, or were taken from it by its host; or 0 where
// nobody knows.
func busy() float64 {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	// In hundredths of a second. What comes after is counted in user and nice already.
	var user, nice, system, idle, iowait, irq, softirq, steal float64
	if _, err := fmt.Sscanf(string(text), "cpu %f %f %f %f %f %f %f %f",
		&user, &nice, &system, &idle, &iowait, &irq, &softirq, &steal); err != nil {
		return 0
	}
	return (user + nice + system + irq + softirq + steal) / 100
}

// field returns what a file of lines "name: value" says first under a name.
func field(path, name string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan(); {
		if key, value, _ := strings.Cut(lines.Text(), ":"); strings.TrimSpace(key) == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func output(ctx context.Context, program string, args ...string) string {
	text, err := exec.CommandContext(ctx, program, args...).Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// version returns which version of a library this measures, and an error if it is not there.
func (e entry) version() (string, error) {
	if e.open == nil {
		return npmVersion(e.pkg)
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "", nil
	}
	for _, module := range info.Deps {
		if module.Path == e.pkg && module.Replace == nil {
			return module.Version, nil
		}
	}
	return "as in this repository", nil
}

// nodeDir is where the worker for Node.js is, from where "go run ." is called.
const nodeDir = "node"

func npmVersion(pkg string) (string, error) {
	if _, err := exec.LookPath("node"); err != nil {
		return "", fmt.Errorf("node is not in PATH")
	}
	text, err := os.ReadFile(filepath.Join(nodeDir, "node_modules", pkg, "package.json"))
	if err != nil {
		return "", fmt.Errorf("not installed: run npm ci in bench/node")
	}
	var manifest struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(text, &manifest); err != nil {
		return "", err
	}
	return manifest.Version, nil
}
