//go:build unix

package main_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// patience bounds every wait. It is spent only when a test is going to fail.
const patience = 30 * time.Second

// binary is the path of the command, built by TestMain.
var binary string

func TestMain(m *testing.M) {
	// What is ignored here, as under nohup or in the background of a script, redfour and its commands would inherit. What is
	// caught they do not.
	for _, sig := range []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT} {
		if signal.Ignored(sig) {
			signal.Notify(make(chan os.Signal, 1), sig)
		}
	}
	dir, err := os.MkdirTemp("", "redfour")
	if err == nil {
		binary = filepath.Join(dir, "redfour")
		err = build(binary)
	}
	code := 1
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	} else {
		code = m.Run()
	}
	_ = os.RemoveAll(dir)
	os.Exit(code)
}

// build builds the command, with the race detector if this test has it.
func build(path string) error {
	args := []string{"build", "-buildvcs=false", "-o", path}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, ".")...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w\n%s", err, out)
	}
	return nil
}

// A call is a redfour that runs, without a terminal.
type call struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdout *bufio.Reader
	stderr bytes.Buffer

	// What has been read of stdout, for messages.
	read strings.Builder
}

// start starts redfour, and kills it at the end of the test. An url of "" is none.
func start(t *testing.T, url string, args ...string) *call {
	t.Helper()
	return startProgram(t, url, binary, args...)
}

func startProgram(t *testing.T, url, program string, args ...string) *call {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Env = environment(url)
	return startCmd(t, cmd)
}

// environment has redfour in PATH, and does not let the race detector sleep a second whenever one exits.
func environment(url string) []string {
	return append(os.Environ(), "REDIS_URL="+url, "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"), "GORACE=atexit_sleep_ms=0")
}

func startCmd(t *testing.T, cmd *exec.Cmd) *call {
	t.Helper()
	c := &call{t: t, cmd: cmd}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // Whoever runs the tests may sit at a terminal.
	c.cmd.Stderr = &c.stderr
	stdout, err := c.cmd.StdoutPipe()
	require.NoError(t, err)
	c.stdout = bufio.NewReader(stdout)
	require.NoError(t, c.cmd.Start())
	t.Cleanup(func() {
		if c.cmd.ProcessState == nil {
			_ = c.cmd.Process.Kill()
			_ = c.cmd.Wait()
		}
	})
	return c
}

// line returns the next line of the output.
func (c *call) line() string {
	c.t.Helper()
	type result struct {
		line string
		err  error
	}
	read := make(chan result, 1)
	go func() {
		line, err := c.stdout.ReadString('\n')
		read <- result{line, err}
	}()
	select {
	case r := <-read:
		c.read.WriteString(r.line)
		require.NoError(c.t, r.err, "after %q\n%s", c.read.String(), &c.stderr)
		return strings.TrimSuffix(r.line, "\n")
	case <-time.After(patience):
		c.t.Fatalf("no line after %q", c.read.String())
		return ""
	}
}

// signal sends a signal to redfour, and not to its command.
func (c *call) signal(sig syscall.Signal) {
	c.t.Helper()
	require.NoError(c.t, c.cmd.Process.Signal(sig))
}

// A result is what a call came to.
type result struct {
	code           int
	stdout, stderr string
}

// wait returns how the call ended, when all that had its output are gone.
func (c *call) wait() result {
	c.t.Helper()
	type output struct {
		text []byte
		err  error
	}
	all := make(chan output, 1)
	go func() {
		text, err := io.ReadAll(c.stdout)
		all <- output{text, err}
	}()
	select {
	case o := <-all:
		require.NoError(c.t, o.err)
		err := c.cmd.Wait()
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			require.NoError(c.t, err)
		}
		r := result{c.code(), c.read.String() + string(o.text), c.stderr.String()}
		for _, trace := range []string{"goroutine ", "panic", "DATA RACE"} {
			require.NotContains(c.t, r.stderr, trace)
		}
		return r
	case <-time.After(patience):
		c.t.Fatalf("does not end, or has left somebody behind, after %q", c.read.String())
		return result{}
	}
}

// code is what a shell would say. Only an interrupt may have ended redfour as a signal.
func (c *call) code() int {
	c.t.Helper()
	status, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if ok && status.Signaled() {
		require.Equal(c.t, syscall.SIGINT, status.Signal(), "redfour was ended\n%s", &c.stderr)
		return 128 + int(status.Signal())
	}
	return c.cmd.ProcessState.ExitCode()
}

// do runs redfour until it ends.
func do(t *testing.T, url string, args ...string) result {
	t.Helper()
	return start(t, url, args...).wait()
}

// url returns the URL of a server.
func url(s *redistest.Server) string { return "redis://" + s.Addr() }

// A gate lets shell commands wait for the test: "read _ <PATH" returns when it is opened.
type gate struct {
	t    *testing.T
	path string
}

func newGate(t *testing.T) gate {
	t.Helper()
	g := gate{t, filepath.Join(t.TempDir(), "gate")}
	require.NoError(t, syscall.Mkfifo(g.path, 0o600))
	return g
}

// open lets one that waits pass.
func (g gate) open() {
	g.t.Helper()
	opened := make(chan error, 1)
	go func() {
		f, err := os.OpenFile(g.path, os.O_WRONLY, 0) // blocks until somebody reads
		if err == nil {
			_, err = f.WriteString("\n")
			err = errors.Join(err, f.Close())
		}
		opened <- err
	}()
	select {
	case err := <-opened:
		require.NoError(g.t, err)
	case <-time.After(patience):
		g.t.Fatal("nobody waits at the gate")
	}
}

// eventually asks until the answer is yes.
func eventually(t *testing.T, what string, yes func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !yes() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("never: " + what)
		}
	}
}

// parallel runs f in so many goroutines, and waits for all.
func parallel(n int, f func(i int)) {
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { f(i) })
	}
	all.Wait()
}
