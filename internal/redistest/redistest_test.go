//go:build unix

package redistest_test

import (
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

func TestStart_serversAreApart(t *testing.T) {
	t.Parallel()
	a, b := redistest.Start(t), redistest.Start(t)
	require.NotEqual(t, a.Addr(), b.Addr())
	require.NoError(t, a.Client(t).Set(t.Context(), "k", "a", 0).Err())
	require.Zero(t, b.Client(t).Exists(t.Context(), "k").Val())
}

func TestStart_argsOverrideDefaults(t *testing.T) {
	t.Parallel()
	c := redistest.Start(t, "--appendonly", "yes", "--maxmemory", "64mb").Client(t)
	require.Equal(t, map[string]string{"appendonly": "yes"}, c.ConfigGet(t.Context(), "appendonly").Val())
	require.Equal(t, map[string]string{"maxmemory": "67108864"}, c.ConfigGet(t.Context(), "maxmemory").Val())
	require.Equal(t, map[string]string{"save": ""}, c.ConfigGet(t.Context(), "save").Val())
}

func TestStart_serverEndsWithItsTest(t *testing.T) {
	t.Parallel()
	var s *redistest.Server
	t.Run("inner", func(t *testing.T) {
		s = redistest.Start(t)
		s.Pause() // A stopped process must be killed as well.
	})
	if s == nil {
		t.Skip("redis-server is not in PATH: this test did not run")
	}
	require.False(t, accepts(t, s))
}

func TestRestart_losesDataWithoutPersistence(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	require.NoError(t, s.Client(t).Set(t.Context(), "k", "v", 0).Err())
	s.Kill()
	require.False(t, accepts(t, s))
	s.Restart()
	require.Zero(t, s.Client(t).Exists(t.Context(), "k").Val())
}

func TestRestart_ofARunningServer(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	runID := func() string { return s.Client(t).InfoMap(t.Context(), "server").Item("Server", "run_id") }
	before := runID()
	s.Restart()
	require.NotEmpty(t, before)
	require.NotEqual(t, before, runID())
}

func TestRestart_keepsDataWithAOF(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t, "--appendonly", "yes", "--appendfsync", "always")
	port := s.Port()
	require.NoError(t, s.Client(t).Set(t.Context(), "k", "v", 0).Err())
	s.Kill()
	s.Restart()
	require.Equal(t, port, s.Port())
	require.Equal(t, "v", s.Client(t).Get(t.Context(), "k").Val())
}

func TestPause_leavesRequestsUnanswered(t *testing.T) {
	t.Parallel()
	s := redistest.Start(t)
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", s.Addr())
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck // The server says what matters.

	s.Pause()
	_, err = conn.Write([]byte("PING\r\n"))
	require.NoError(t, err)
	require.NoError(t, conn.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	reply := make([]byte, len("+PONG\r\n"))
	_, err = io.ReadFull(conn, reply)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)

	s.Resume()
	require.NoError(t, conn.SetReadDeadline(time.Time{}))
	_, err = io.ReadFull(conn, reply)
	require.NoError(t, err)
	require.Equal(t, "+PONG\r\n", string(reply), "the paused server received the command")
}

func TestFailover_rightAfterStart(t *testing.T) {
	t.Parallel()
	f := redistest.StartFailover(t)
	c := f.Client(t)
	require.NoError(t, c.Set(t.Context(), "k", "v", 0).Err())
	require.EqualValues(t, 1, c.Wait(t.Context(), 1, time.Second).Val())
	old := f.Master()

	f.Failover()

	require.NotEqual(t, old, f.Master())
	require.Equal(t, old, f.Replica())
	require.Equal(t, "master", role(t, f.Master()))
	fresh := f.Client(t)
	require.Equal(t, "v", fresh.Get(t.Context(), "k").Val())
	require.Contains(t, fresh.Info(t.Context(), "server").Val(), "tcp_port:"+strconv.Itoa(f.Master().Port()))
}

func TestCrash_promotesTheReplica(t *testing.T) {
	t.Parallel()
	f := redistest.StartFailover(t)
	old := f.Master()

	f.Crash()

	require.False(t, accepts(t, old))
	require.Equal(t, "master", role(t, f.Master()))
	require.NoError(t, f.Client(t).Set(t.Context(), "k", "v", 0).Err())
}

func TestStart_withoutRedisSkipsUnlessRequired(t *testing.T) {
	for required, want := range map[string]string{"": "skipped", "0": "skipped", "1": "failed"} {
		t.Run("REDFOUR_REQUIRE_REDIS="+required, func(t *testing.T) {
			t.Setenv("PATH", "")
			t.Setenv("REDFOUR_REQUIRE_REDIS", required)
			probe := &verdict{TB: t}
			done := make(chan struct{})
			go func() { // Skip and Fatal end the goroutine that calls them.
				defer close(done)
				redistest.Start(probe)
			}()
			<-done
			require.Equal(t, want, probe.got)
		})
	}
}

func TestStartTLS_ofAServerWithoutTLSSkipsUnlessRequired(t *testing.T) {
	dir := t.TempDir()
	fake := "#!/bin/sh\necho '*** FATAL CONFIG FILE ERROR ***'; echo 'Bad directive or wrong number of arguments'; exit 1\n"
	require.NoError(t, os.WriteFile(filepath.Join(dir, "redis-server"), []byte(fake), 0o700))
	t.Setenv("PATH", dir)
	for required, want := range map[string]string{"": "skipped", "0": "skipped", "1": "failed"} {
		t.Run("REDFOUR_REQUIRE_REDIS="+required, func(t *testing.T) {
			t.Setenv("REDFOUR_REQUIRE_REDIS", required)
			probe := &verdict{TB: t}
			done := make(chan struct{})
			go func() { // Skip and Fatal end the goroutine that calls them.
				defer close(done)
				redistest.StartTLS(probe, nil)
			}()
			<-done
			require.Equal(t, want, probe.got)
		})
	}
}

// verdict is a test that remembers how it ended.
type verdict struct {
	testing.TB

	got string
}

func (v *verdict) Skip(...any) {
	v.got = "skipped"
	runtime.Goexit()
}

func (v *verdict) Fatal(...any) {
	v.got = "failed"
	runtime.Goexit()
}

// accepts says whether the server takes connections. A plain dial, unlike a client's, is not repeated.
func accepts(t *testing.T, s *redistest.Server) bool {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", s.Addr())
	if err != nil {
		return false
	}
	require.NoError(t, conn.Close())
	return true
}

func role(t *testing.T, s *redistest.Server) any {
	t.Helper()
	reply, err := s.Client(t).Do(t.Context(), "ROLE").Slice()
	require.NoError(t, err)
	return reply[0]
}
