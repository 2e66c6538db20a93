//go:build unix

package main_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// openLock returns a Lock in this process, to look with.
func openLock(t *testing.T, s *redistest.Server) *redfour.Lock {
	t.Helper()
	lock, err := redfour.Open(url(s))
	require.NoError(t, err)
	t.Cleanup(func() { _ = lock.Close() })
	return lock
}

// inspect returns who has the lock.
func inspect(t *testing.T, lock *redfour.Lock, id string) redfour.Status {
	t.Helper()
	status, err := lock.Inspect(t.Context(), id)
	require.NoError(t, err)
	return status
}

func TestRealRun_holdsTheLockWhileTheCommandRuns(t *testing.T) {
	s := redistest.Start(t)
	lock, g := openLock(t, s), newGate(t)

	c := start(t, url(s), "run", "a lock", "--", "sh", "-c", `echo "$REDFOUR_ID"; echo $REDFOUR_INDEX; echo $REDFOUR_TOKEN; read _ <`+g.path)
	id, index, token := c.line(), c.line(), c.line()

	assert.Equal(t, "a lock", id)
	status := inspect(t, lock, "a lock")
	assert.True(t, status.Held)
	assert.Equal(t, strconv.FormatInt(status.Index, 10), index)
	assert.Regexp(t, `^sh by redfour on .* \(pid `+strconv.Itoa(c.cmd.Process.Pid)+`\)$`, status.Owner)
	assert.InDelta(t, 30, status.TTL.Seconds(), 10)
	assert.Equal(t, s.Client(t).HGet(t.Context(), "lock:a lock", "token").Val(), token)
	g.open()
	assert.Equal(t, result{0, "a lock\n" + index + "\n" + token + "\n", ""}, c.wait())
	assert.False(t, inspect(t, lock, "a lock").Held)
}

func TestRealRun_hasTheStandardFilesAndTheStatusOfTheCommand(t *testing.T) {
	s := redistest.Start(t)
	for _, test := range []struct {
		script string
		code   int
	}{
		{"exit 0", 0},
		{"exit 3", 3},
		{"exit 255", 255},
		{"kill -9 $$", 128 + 9},
		{"kill -TERM $$", 128 + 15},
	} {
		t.Run(test.script, func(t *testing.T) {
			r := do(t, url(s), "run", "x", "--", "sh", "-c", "echo out; echo err >&2; "+test.script)
			assert.Equal(t, result{test.code, "out\n", "err\n"}, r)
			assert.False(t, inspect(t, openLock(t, s), "x").Held)
		})
	}
	t.Run("standard input", func(t *testing.T) {
		cmd := exec.Command(binary, "run", "--url", url(s), "x", "--", "cat")
		cmd.Stdin = strings.NewReader("in")
		out, err := cmd.Output()
		require.NoError(t, err)
		assert.Equal(t, "in", string(out))
	})
}

func TestRealRun_contendersTakeTurns(t *testing.T) {
	s := redistest.Start(t)
	log := filepath.Join(t.TempDir(), "log")
	const contenders = 12

	parallel(contenders, func(int) {
		r := do(t, url(s), "run", "x", "--", "sh", "-c", `echo "enter $REDFOUR_INDEX" >>`+log+`; echo "leave $REDFOUR_INDEX" >>`+log)
		assert.Equal(t, result{}, r)
	})

	text, err := os.ReadFile(log)
	require.NoError(t, err)
	lines, last := strings.Fields(string(text)), int64(0)
	require.Len(t, lines, 4*contenders)
	for i := 0; i < len(lines); i += 4 {
		index, err := strconv.ParseInt(lines[i+1], 10, 64)
		require.NoError(t, err)
		assert.Equal(t, []string{"enter", lines[i+1], "leave", lines[i+1]}, lines[i:i+4])
		assert.Greater(t, index, last)
		last = index
	}
}

func TestRealRun_aWaiterGetsTheLockFromTheHolder(t *testing.T) {
	s := redistest.Start(t)
	lock, g := openLock(t, s), newGate(t)
	first := start(t, url(s), "run", "--ttl", "1h", "x", "--", "sh", "-c", "echo runs; read _ <"+g.path)
	first.line()
	second := start(t, url(s), "run", "--verbose", "x", "--", "echo", "runs")
	eventually(t, "the second waits", func() bool { return len(inspect(t, lock, "x").Waiters) == 1 })

	g.open()

	assert.Zero(t, first.wait().code)
	r := second.wait()
	assert.Equal(t, "runs\n", r.stdout)
	assert.Regexp(t, `^redfour: waits for x, held by sh by redfour on .*, index \d+, \S+ left
redfour: holds x with index \d+, after .*s
redfour: the command ended with success
redfour: released x
$`, r.stderr)
}

func TestRealRun_doesNotRunWhatItGotNoLockFor(t *testing.T) {
	s := redistest.Start(t)
	g := newGate(t)
	holder := start(t, url(s), "run", "x", "--", "sh", "-c", "echo runs; read _ <"+g.path)
	holder.line()

	t.Run("--try", func(t *testing.T) {
		r := do(t, url(s), "run", "--try", "x", "--", "echo", "runs")
		assert.Equal(t, 75, r.code)
		assert.Empty(t, r.stdout)
		assert.Regexp(t, `^redfour: acquire "x": held by sh by redfour on .* \(pid \d+\), index \d+, \S+s left\n$`, r.stderr)
	})
	t.Run("--wait", func(t *testing.T) {
		began := time.Now()
		r := do(t, url(s), "run", "--wait", "300ms", "x", "--", "echo", "runs")
		assert.Equal(t, 75, r.code)
		assert.Empty(t, r.stdout)
		assert.Contains(t, r.stderr, `redfour: wait for "x": context deadline exceeded: held by sh by redfour on `)
		assert.GreaterOrEqual(t, time.Since(began), 300*time.Millisecond)
		assert.Less(t, time.Since(began), 10*time.Second)
	})
	t.Run("--json", func(t *testing.T) {
		r := do(t, url(s), "run", "--try", "--json", "x", "--", "echo", "runs")
		assert.Equal(t, 75, r.code)
		assert.Regexp(t, `^\{"error":"redfour: acquire .*","exit":75,"holder":\{"index":\d+,"owner":"sh by redfour on .*","ttl":\d+\}\}\n$`, r.stderr)
	})
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			lock := openLock(t, s)
			c := start(t, url(s), "run", "x", "--", "echo", "runs")
			eventually(t, "it waits", func() bool { return len(inspect(t, lock, "x").Waiters) == 1 })
			c.signal(sig)
			r := c.wait()
			assert.Equal(t, result{128 + int(sig), "", `redfour: the command had not run, for want of x, when the signal "` + sig.String() + `" came` + "\n"}, r)
			assert.Empty(t, inspect(t, lock, "x").Waiters)
		})
	}
	g.open()
	assert.Zero(t, holder.wait().code)
}

func TestRealRun_renewsTheLease(t *testing.T) {
	s := redistest.Start(t)
	lock, g := openLock(t, s), newGate(t)
	const ttl = time.Second
	began := time.Now()
	c := start(t, url(s), "run", "--ttl", ttl.String(), "x", "--", "sh", "-c", "echo $REDFOUR_INDEX; read _ <"+g.path)
	index := c.line()
	eventually(t, "two ttls are over", func() bool { return time.Since(began) > 2*ttl })
	assert.Equal(t, index, strconv.FormatInt(inspect(t, lock, "x").Index, 10))
	g.open()
	assert.Equal(t, result{0, index + "\n", ""}, c.wait())
}

func TestRealRun_keepsTheLockAfterSuccess(t *testing.T) {
	s := redistest.Start(t)
	lock := openLock(t, s)
	for _, test := range []struct {
		command string
		code    int
		held    bool
	}{{"true", 0, true}, {"false", 1, false}} {
		began := time.Now()
		r := do(t, url(s), "run", "--keep", "--ttl", "1h", test.command, "--", test.command)
		assert.Equal(t, result{code: test.code}, r)
		status := inspect(t, lock, test.command)
		assert.Equal(t, test.held, status.Held)
		if test.held {
			assert.Greater(t, status.TTL, time.Hour-time.Since(began))
			assert.Equal(t, 75, do(t, url(s), "run", "--try", test.command, "--", "echo", "runs").code)
		}
	}
	t.Run("a lost one is lost", func(t *testing.T) {
		g := newGate(t)
		c := start(t, url(s), "run", "--keep", "--ttl", "1h", "x", "--", "sh", "-c", "echo runs; read _ <"+g.path)
		c.line()
		require.NoError(t, lock.ForceRelease(t.Context(), "x", inspect(t, lock, "x").Index))
		g.open()
		assert.Equal(t, 76, c.wait().code)
		assert.False(t, inspect(t, lock, "x").Held)
	})
}

// Its ttl is over when the answer comes.
func TestRealRun_doesNotRunUnderALeaseThatCameTooLate(t *testing.T) {
	s := redistest.Start(t)
	require.Zero(t, do(t, url(s), "run", "x", "--", "true").code) // From now on the server knows the scripts.
	require.NoError(t, s.Client(t).Do(t.Context(), "CLIENT", "PAUSE", 500, "WRITE").Err())
	r := do(t, url(s), "run", "--ttl", "100ms", "x", "--", "echo", "runs")
	assert.Equal(t, 69, r.code)
	assert.Empty(t, r.stdout)
	assert.Regexp(t, `^redfour: acquire "x": .*lease expired`, r.stderr)
}

func TestRealRun_aKilledHolderIsFollowedAfterItsTTL(t *testing.T) {
	s := redistest.Start(t)
	lock := openLock(t, s)
	// The command holds the output: were it left behind, the call would not end.
	first := start(t, url(s), "run", "--ttl", "1s", "x", "--", "sh", "-c", "echo $REDFOUR_INDEX; exec sleep 1000")
	index := first.line()
	second := start(t, url(s), "run", "x", "--", "sh", "-c", "echo $REDFOUR_INDEX")
	eventually(t, "the second waits", func() bool { return len(inspect(t, lock, "x").Waiters) == 1 })

	killed := time.Now()
	first.signal(syscall.SIGKILL)

	assert.Greater(t, second.line(), index)
	assert.Less(t, time.Since(killed), 5*time.Second)
	assert.Zero(t, second.wait().code)
	if runtime.GOOS == "linux" {
		ended := make(chan error, 1)
		go func() {
			_, err := first.stdout.ReadString('\n')
			ended <- err
		}()
		select {
		case err := <-ended:
			assert.Error(t, err, "the end of the output")
		case <-time.After(patience):
			t.Error("the command of a redfour that was killed goes on")
		}
	}
}

func TestRealRun_endsTheCommandWhenTheLeaseIsLost(t *testing.T) {
	s := redistest.Start(t)
	lock := openLock(t, s)
	for _, test := range []struct {
		name, script, stdout, outcome string
	}{
		{"a command that ends", `trap 'echo ended; exit 0' TERM; echo runs; while :; do sleep 0.01; done`, "runs\nended\n", "success"},
		{"one that fails then", `trap 'echo ended; exit 5' TERM; echo runs; while :; do sleep 0.01; done`, "runs\nended\n", "status 5"},
		{"one that has no trap", `echo runs; exec sleep 1000`, "runs\n", `the signal "terminated"`},
		{"one that ignores it", `trap '' TERM; echo runs; while :; do sleep 0.01; done`, "runs\n", `the signal "killed"`},
		{"one whose child ignores it", `(trap '' TERM; echo runs; while :; do sleep 0.01; done) & trap 'exit 6' TERM; wait`, "runs\n", "status 6"},
		{"a stopped one", `echo runs; kill -STOP $$`, "runs\n", `the signal "killed"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, url(s), "run", "--ttl", "600ms", "--grace", "300ms", "x", "--", "sh", "-c", test.script)
			c.line()

			ended := time.Now()
			require.NoError(t, lock.ForceRelease(t.Context(), "x", inspect(t, lock, "x").Index))

			r := c.wait()
			assert.Less(t, time.Since(ended), 5*time.Second)
			assert.Equal(t, 76, r.code)
			assert.Equal(t, test.stdout, r.stdout)
			assert.Regexp(t, `(?m)^redfour: x was lost, index \d+, while the command ran, which ended with `+regexp.QuoteMeta(test.outcome)+`: redfour: keep alive "x": lease expired\n$`, r.stderr)
		})
	}
}

func TestRealRun_endsTheCommandWhenRedisHangs(t *testing.T) {
	s := redistest.Start(t)
	c := start(t, url(s), "run", "--ttl", "1s", "--json", "x", "--", "sh", "-c", "echo runs; exec sleep 1000")
	c.line()

	s.Pause()
	hung := time.Now()
	r := c.wait()

	assert.Equal(t, 76, r.code)
	assert.Less(t, time.Since(hung), 10*time.Second)
	assert.Regexp(t, `\{"error":".*lease expired.*","event":"lost","id":"x"\}`, r.stderr)
}

// The command has ended when Redis loses the lease, and so nobody can have told it.
func TestRealRun_tellsThatTheLeaseWasLostWithoutNotice(t *testing.T) {
	s := redistest.Start(t)
	lock, g := openLock(t, s), newGate(t)
	c := start(t, url(s), "run", "--ttl", "1h", "x", "--", "sh", "-c", "echo runs; read _ <"+g.path)
	c.line()
	require.NoError(t, lock.ForceRelease(t.Context(), "x", inspect(t, lock, "x").Index))
	g.open()
	r := c.wait()
	assert.Equal(t, 76, r.code)
	assert.Regexp(t, `^redfour: x was lost, index \d+, while the command ran, which ended with success: redfour: release "x": .*lease expired\n$`, r.stderr)
}

// The shell ends at once, and what it has started does not. It sets its trap
// first, because the child's line may be read before the shell goes on.
func TestRealRun_holdsTheLockUntilAllHaveEndedWhomASignalTold(t *testing.T) {
	s := redistest.Start(t)
	lock := openLock(t, s)
	for _, test := range []struct {
		name, child, stdout string
		gate                bool // the child waits at it
	}{
		{"one that takes its time", `trap 'read _ <GATE; echo cleaned up; exit' TERM`, "runs\ncleaned up\n", true},
		{"one that does not end", `trap '' TERM`, "runs\n", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newGate(t)
			child := strings.ReplaceAll(test.child, "GATE", g.path)
			c := start(t, url(s), "run", "--grace", map[bool]string{true: "1h", false: "500ms"}[test.gate], "x", "--", "sh", "-c",
				"trap 'exit 5' TERM; ("+child+"; echo runs; while :; do sleep 0.01; done) & wait")
			c.line()
			told := time.Now()
			c.signal(syscall.SIGTERM)
			if test.gate {
				next := start(t, url(s), "run", "x", "--", "true")
				eventually(t, "the next waits", func() bool { return len(inspect(t, lock, "x").Waiters) == 1 })
				g.open()
				assert.Zero(t, next.wait().code)
			}
			r := c.wait()
			assert.Equal(t, 5, r.code)
			assert.Equal(t, test.stdout, r.stdout)
			if !test.gate {
				assert.Greater(t, time.Since(told), 500*time.Millisecond)
			}
			assert.False(t, inspect(t, lock, "x").Held)
		})
	}
}

// Nobody reads what redfour says: it must not die of that while it holds the lock.
func TestRealRun_nobodyNeedsToListen(t *testing.T) {
	s := redistest.Start(t)
	for _, flag := range []string{"--verbose", "--json"} {
		read, write, err := os.Pipe()
		require.NoError(t, err)
		require.NoError(t, read.Close())
		cmd := exec.Command(binary, "run", flag, "x", "--", "sh", "-c", "exit 3")
		cmd.Env, cmd.Stderr = environment(url(s)), write
		err = cmd.Run()
		require.NoError(t, write.Close())
		exit, ok := errors.AsType[*exec.ExitError](err)
		require.True(t, ok, "%v", err)
		assert.Equal(t, 3, exit.ExitCode(), "%v", exit)
		assert.False(t, inspect(t, openLock(t, s), "x").Held)
	}
}

// What redfour says before it starts the command has to wait for its reader, and meanwhile the lease is lost.
func TestRealRun_startsNothingWhenTheLeaseIsOver(t *testing.T) {
	s := redistest.Start(t)
	lock := openLock(t, s)
	read, write, err := os.Pipe()
	require.NoError(t, err)
	defer func() { _ = read.Close() }()
	require.NoError(t, write.SetWriteDeadline(time.Now().Add(100*time.Millisecond)))
	full, err := write.Write(make([]byte, 1<<20))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	cmd := exec.Command(binary, "run", "--verbose", "--ttl", "600ms", "x", "--", "echo", "runs")
	cmd.Env, cmd.Stderr = environment(url(s)), write
	stdout := new(strings.Builder)
	cmd.Stdout = stdout
	require.NoError(t, cmd.Start())
	require.NoError(t, write.Close())
	eventually(t, "it holds", func() bool { return inspect(t, lock, "x").Held })
	lost := inspect(t, lock, "x")
	require.NoError(t, lock.ForceRelease(t.Context(), "x", lost.Index))
	next, err := lock.Acquire(t.Context(), "x", time.Hour)
	require.NoError(t, err)
	eventually(t, "it has looked", func() bool { return time.Since(lost.Since) > time.Second }) // A renewal is due every 0.2 s.

	_, err = io.CopyN(io.Discard, read, int64(full))
	require.NoError(t, err)
	said, err := io.ReadAll(read)
	require.NoError(t, err)
	_ = cmd.Wait()
	assert.Equal(t, 76, cmd.ProcessState.ExitCode())
	assert.Empty(t, stdout.String())
	assert.Regexp(t, `\nredfour: x was lost, index \d+, before the command was started: `, string(said))
	assert.Equal(t, next.Index, inspect(t, lock, "x").Index)
}

func TestRealRun_passesSignalsOn(t *testing.T) {
	s := redistest.Start(t)
	for _, test := range []struct {
		sig  syscall.Signal
		name string
	}{
		{syscall.SIGHUP, "HUP"},
		{syscall.SIGINT, "INT"},
		{syscall.SIGQUIT, "QUIT"},
		{syscall.SIGTERM, "TERM"},
		{syscall.SIGUSR1, "USR1"},
		{syscall.SIGUSR2, "USR2"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := start(t, url(s), "run", "x", "--", "sh", "-c", `trap 'echo got; exit 7' `+test.name+`; echo runs; while :; do sleep 0.01; done`)
			c.line()
			c.signal(test.sig)
			r := c.wait()
			assert.Equal(t, result{7, "runs\ngot\n", r.stderr}, r) // The shell may tell that its sleep was ended.
			assert.False(t, inspect(t, openLock(t, s), "x").Held)
		})
	}
	t.Run("INT, so that a shell ends its loop", func(t *testing.T) {
		c := startProgram(t, url(s), "bash", "-c", `for i in 1 2; do redfour run x -- sh -c 'echo runs; exec sleep 1'; done; echo went on`)
		c.line()
		require.NoError(t, syscall.Kill(-c.cmd.Process.Pid, syscall.SIGINT)) // as a terminal sends it: to the shell, too
		r := c.wait()
		assert.Equal(t, result{130, "runs\n", r.stderr}, r)
	})
	t.Run("but for HUP under nohup", func(t *testing.T) {
		c := startProgram(t, url(s), "sh", "-c", `trap '' HUP; exec redfour run x -- sh -c 'trap "exit 7" USR1; echo runs; while :; do sleep 0.01; done'`)
		c.line()
		c.signal(syscall.SIGHUP)
		c.signal(syscall.SIGUSR1) // comes after HUP, and so is passed on after it
		assert.Equal(t, 7, c.wait().code)
	})
}

// Ctrl-C at a terminal reaches redfour and its command. It must not reach the command twice.
func TestRealRun_atATerminal(t *testing.T) {
	script, err := exec.LookPath("script")
	switch {
	case runtime.GOOS != "linux":
		t.Skip("script has other arguments here: this test did not run")
	case err != nil && os.Getenv("REDFOUR_REQUIRE_REDIS") == "1":
		t.Fatal("script of util-linux is not in PATH, and REDFOUR_REQUIRE_REDIS=1 demands all tests")
	case err != nil:
		t.Skip("script of util-linux is not in PATH: this test did not run")
	}
	s := redistest.Start(t)
	command := `n=0; trap "n=\$((n+1)); echo INT" INT; trap "echo got \$n; exit 9" USR1
read line; echo "redfour $PPID has read $line"; while :; do sleep 0.01; done`
	// Script would stop with its child: so that is a shell, which Ctrl-C reaches as well.
	cmd := exec.Command(script, "-qec", "trap : INT; "+binary+` run x -- sh -c '`+command+`'; exit $?`, "/dev/null")
	cmd.Env = append(environment(url(s)), "SHELL=/bin/sh")
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	c := startCmd(t, cmd)
	_, err = stdin.Write([]byte("a key\n"))
	require.NoError(t, err)
	var redfour int
	for redfour == 0 {
		_, _ = fmt.Sscanf(c.line(), "redfour %d has read a key", &redfour)
	}

	require.NoError(t, syscall.Kill(redfour, syscall.SIGSTOP))
	_, err = stdin.Write([]byte{3}) // Ctrl-C
	require.NoError(t, err)
	for line := ""; !strings.Contains(line, "INT"); {
		line = c.line()
	}
	require.NoError(t, syscall.Kill(redfour, syscall.SIGUSR1)) // comes after INT, and so is passed on after it
	require.NoError(t, syscall.Kill(redfour, syscall.SIGCONT))

	r := c.wait()
	assert.Equal(t, 9, r.code)
	assert.Contains(t, r.stdout, "got 1")
}
