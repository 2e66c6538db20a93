//go:build unix

package redistest

import (
	"crypto/tls"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/redis/go-redis/v9"
)

// Server is one redis-server process, which may be killed and started again under the same address. It belongs to the test that
// started it: its methods are for one goroutine at a time, and those that fail end that test.
type Server struct {
	tb      testing.TB
	binary  string
	port    int
	args    []string
	process *process
	tls     *tls.Config // of clients; nil without TLS
}

// Start runs redis-server on a free port of 127.0.0.1, without persistence, and returns when it accepts connections. The args are
// those of the redis-server command line and go last, so they win over the ones that Start gives. The server is killed when the
// test ends.
func Start(tb testing.TB, args ...string) *Server {
	tb.Helper()
	return start(tb, find(tb), nil, []string{"--port"}, args)
}

// StartTLS is Start for a server that speaks TLS, and nothing else: Port is that of TLS. The args name its certificate, its key and the
// authorities of its clients; the config is for its own Client and Options. A redis-server that was built without TLS counts as none.
func StartTLS(tb testing.TB, clients *tls.Config, args ...string) *Server {
	tb.Helper()
	binary := find(tb)
	demandTLS(tb, binary)
	return start(tb, binary, clients, []string{"--port", "0", "--tls-port"}, args)
}

// start starts the binary. The last of the listen args lacks its value, the port.
func start(tb testing.TB, binary string, clients *tls.Config, listen, args []string) *Server {
	tb.Helper()
	// TempDir comes before Cleanup: what is registered last runs first, and the server must be gone before its directory is.
	dir := tb.TempDir()
	s := &Server{tb: tb, binary: binary, tls: clients}
	s.port, s.process = startOnFreePort(tb, binary, func(port int) []string {
		s.args = slices.Concat([]string{"--bind", "127.0.0.1"}, listen, []string{strconv.Itoa(port)},
			[]string{"--dir", dir, "--save", "", "--appendonly", "no"}, args)
		return s.args
	}, "Ready to accept connections")
	tb.Cleanup(func() { s.process.kill() })
	return s
}

// demandTLS ends the test if the binary was built without TLS. One that was not ends as well, for want of the certificate.
func demandTLS(tb testing.TB, binary string) {
	tb.Helper()
	out, _ := exec.CommandContext(tb.Context(), binary, "--port", "0", "--tls-port", "1", "--tls-cert-file", tb.TempDir()).CombinedOutput()
	if !strings.Contains(string(out), "Bad directive") {
		return
	}
	if os.Getenv("REDFOUR_REQUIRE_REDIS") == "1" {
		tb.Fatal("redistest: redis-server was built without TLS, and REDFOUR_REQUIRE_REDIS=1 demands it")
	}
	tb.Skip("redis-server was built without TLS: this test did not run")
}

// find returns the path of redis-server, or ends the test.
func find(tb testing.TB) string {
	tb.Helper()
	binary, err := exec.LookPath("redis-server")
	if err == nil {
		return binary
	}
	if os.Getenv("REDFOUR_REQUIRE_REDIS") == "1" {
		tb.Fatal("redistest: redis-server is not in PATH, and REDFOUR_REQUIRE_REDIS=1 demands it")
	}
	tb.Skip("redis-server is not in PATH: this test did not run")
	return ""
}

// startOnFreePort launches the binary with the args for a random port until one is not taken, and returns when it has printed ready.
// Asking the kernel for a free port and closing it again would race with every other test binary that does the same; here Redis
// itself decides, by binding or refusing to.
func startOnFreePort(tb testing.TB, binary string, args func(port int) []string, ready string) (int, *process) {
	tb.Helper()
	const tries = 5
	var err error
	for range tries {
		port := randomPort()
		var p *process
		p, err = launch(binary, args(port))
		if err != nil {
			break
		}
		if err = p.await(tb.Context(), 0, ready); err == nil {
			return port, p
		}
		p.kill()
		if !strings.Contains(err.Error(), "Address already in use") {
			break
		}
	}
	tb.Fatalf("redistest: redis-server %v", err)
	return 0, nil
}

// randomPort chooses below the ports that the kernel gives to outgoing connections (32768 and up on Linux). From among those, a
// client that dials while its server is down could get the server's port as its own, connect to itself, and keep the server from
// coming back.
func randomPort() int {
	const low, high = 16384, 32768
	return low + rand.N(high-low)
}

// Port is the server's port. It stays the same through Restart.
func (s *Server) Port() int { return s.port }

// Addr is the server's address, such as "127.0.0.1:20123".
func (s *Server) Addr() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// Options returns new options that name this server and leave everything else as go-redis has it.
func (s *Server) Options() *redis.Options {
	return &redis.Options{Addr: s.Addr(), TLSConfig: s.tls.Clone()}
}

// Client returns a client of this server that is closed when the test ends, for the test's own look at the server.
func (s *Server) Client(tb testing.TB) *redis.Client {
	tb.Helper()
	client := redis.NewClient(s.Options())
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// Kill ends the server as a crash does, even if it is paused, and returns when it is gone.
func (s *Server) Kill() { s.process.kill() }

// Restart starts the server again on the same port, with the same args and directory, and returns when it accepts connections. It
// kills a server that is still running. The data survives only if the args of Start turned persistence on.
func (s *Server) Restart() {
	s.tb.Helper()
	s.process.kill()
	p, err := launch(s.binary, s.args)
	if err != nil {
		s.tb.Fatalf("redistest: restart: %v", err)
	}
	s.process = p // Before the wait, so that Cleanup kills it whatever comes.
	if err := p.await(s.tb.Context(), 0, "Ready to accept connections"); err != nil {
		s.tb.Fatalf("redistest: restart: redis-server %v", err)
	}
}

// Pause stops the process without ending it: its connections stay open and nothing answers, as on a machine that hangs.
func (s *Server) Pause() {
	s.tb.Helper()
	s.process.signal(s.tb, syscall.SIGSTOP)
}

// Resume lets a paused server go on, with all that was sent to it meanwhile.
func (s *Server) Resume() {
	s.tb.Helper()
	s.process.signal(s.tb, syscall.SIGCONT)
}
