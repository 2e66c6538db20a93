//go:build unix

package main_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// A step is a line of the session in the README, and what is printed for it.
type step struct {
	command string
	printed []string
}

// session returns the session in the README.
func session(t *testing.T) []step {
	t.Helper()
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```console\n(.*?)```").FindAllSubmatch(readme, -1)
	require.Len(t, blocks, 1)
	var steps []step
	for line := range strings.Lines(string(blocks[0][1])) {
		line = strings.TrimSuffix(line, "\n")
		if command, ok := strings.CutPrefix(line, "$ "); ok {
			steps = append(steps, step{command: command})
		} else {
			last := &steps[len(steps)-1]
			last.printed = append(last.printed, line)
		}
	}
	return steps
}

// alike makes one text of those that differ in times, numbers, the host and the maker of the server.
func alike(text string) string {
	for _, r := range [][2]string{
		{`\d[\d:.-]*(ns|µs|ms|s|m|h)?`, "0"},
		{`0+( 0)*`, "0"},
		{` on \S+ \(pid`, " on host (pid"},
		{`Valkey`, "Redis"},
	} {
		text = regexp.MustCompile(r[0]).ReplaceAllString(text, r[1])
	}
	return text
}

// The session in the README is what redfour prints. Of a command in the background nothing is read, and "^C" is what ends a watch, whose
// next line is waited for before the next backup ends.
func TestRealReadme_sessionIsAsShown(t *testing.T) {
	s := redistest.Start(t)
	lock, g := openLock(t, s), newGate(t)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "backup.sh"), []byte("#!/bin/sh\nread _ <"+g.path+"\n"), 0o700))
	steps := session(t)
	t.Chdir(dir)
	var background []*call
	for _, step := range steps {
		command, inBackground := strings.CutSuffix(step.command, " &")
		c := startProgram(t, url(s), "sh", "-c", "exec 2>&1; exec "+command)
		switch {
		case inBackground:
			background = append(background, c)
			eventually(t, "it holds or waits", func() bool {
				status := inspect(t, lock, "backup")
				return status.Held && len(status.Waiters) == len(background)-1
			})
			assert.Empty(t, step.printed)
		case step.printed[len(step.printed)-1] == "^C":
			for i, line := range step.printed[:len(step.printed)-1] {
				if i > 0 {
					g.open()
				}
				assert.Equal(t, alike(line), alike(c.line()))
			}
			require.NoError(t, syscall.Kill(-c.cmd.Process.Pid, syscall.SIGINT))
			assert.Zero(t, c.wait().code)
		default:
			assert.Equal(t, alike(strings.Join(step.printed, "\n")), alike(strings.TrimSuffix(c.wait().stdout, "\n")))
		}
	}
	for _, c := range background {
		assert.Equal(t, result{}, c.wait())
	}
}
