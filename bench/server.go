package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/redis/go-redis/v9"
)

// A server is a redis-server process, without persistence. Each run has its own, so that none finds what
// another left.
type server struct {
	cmd    *exec.Cmd
	addr   string
	client *redis.Client // the parent's own, to read figures
}

// startServer runs redis-server on a free port of 127.0.0.1, and returns when it answers.
func startServer(ctx context.Context) (*server, error) {
	return start(ctx, func() []string { return nil })
}

// start does that with more arguments, which are asked for again with each port that is tried.
func start(ctx context.Context, more func() []string) (*server, error) {
	const tries = 5
	var errs error
	for range tries {
		port := strconv.Itoa(randomPort())
		args := append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no"}, more()...)
		cmd := exec.CommandContext(ctx, "redis-server", args...)
		dieWithParent(cmd)
		s, err := launch(cmd, net.JoinHostPort("127.0.0.1", port))
		if err == nil {
			return s, nil
		}
		errs = errors.Join(errs, err)
	}
	return nil, errs
}

// randomPort is below the ports that the kernel gives to outgoing connections. Redis itself finds out whether it is free.
func randomPort() int { return 16384 + rand.N(16384) }

// launch returns when the server has said that it is ready.
func launch(cmd *exec.Cmd, addr string) (*server, error) {
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var last string
	for lines := bufio.NewScanner(out); lines.Scan(); {
		last = lines.Text()
		if strings.Contains(last, "Ready to accept connections") {
			// It prints so little from now on that the pipe has room for it.
			return &server{cmd: cmd, addr: addr, client: redis.NewClient(&redis.Options{Addr: addr})}, nil
		}
	}
	_ = cmd.Wait() // What it printed says more.
	return nil, fmt.Errorf("redis-server: %s", last)
}

func (s *server) port() string {
	_, port, _ := net.SplitHostPort(s.addr)
	return port
}

func (s *server) stop() {
	_ = s.client.Close() // The server is going.
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// Figures are what a server has counted since it started.
type figures struct {
	at    int64            // ns of CLOCK_MONOTONIC, when it had answered
	calls map[string]int64 // of each command, those that scripts call included
	cpu   float64          // s, user and system
}

func (s *server) figures(ctx context.Context, c clock) (figures, error) {
	text, err := s.client.Info(ctx, "commandstats", "cpu").Result()
	f := figures{at: c.now(), calls: make(map[string]int64)}
	if err != nil {
		return f, err
	}
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		if command, ok := strings.CutPrefix(name, "cmdstat_"); ok {
			var calls int64
			if _, err := fmt.Sscanf(value, "calls=%d,", &calls); err != nil {
				return f, fmt.Errorf("INFO commandstats: %q: %w", line, err)
			}
			f.calls[command] = calls
			continue
		}
		if name == "used_cpu_user" || name == "used_cpu_sys" {
			seconds, err := strconv.ParseFloat(value, 64)
			if err != nil {
				return f, fmt.Errorf("INFO cpu: %q: %w", line, err)
			}
			f.cpu += seconds
		}
	}
	return f, nil
}

// readAll returns what each server has counted, and when the last had answered.
func readAll(ctx context.Context, servers []*server, c clock) (read []figures, at int64, err error) {
	for _, s := range servers {
		f, err := s.figures(ctx, c)
		if err != nil {
			return nil, 0, err
		}
		read, at = append(read, f), f.at
	}
	return read, at, nil
}

// bySession are the commands that clients send, and scripts do not.
var bySession = []string{
	"eval", "evalsha", "eval_ro", "evalsha_ro", "fcall", "script", "hello", "auth", "select", "client", "ping",
	"subscribe", "psubscribe", "unsubscribe", "punsubscribe", "ssubscribe", "sunsubscribe", "multi", "exec", "watch", "reset", "quit",
	"command", "cluster", "asking", "readonly", "readwrite",
}

// sent returns how many commands clients sent between two readings. The server counts what scripts
// call with what clients send, in total_commands_processed too, so commands on data count only where a library is known
// to send them itself.
func (f figures) sent(before figures, direct []string) int64 {
	var n int64
	for _, name := range slices.Sorted(maps.Keys(f.calls)) {
		command, _, _ := strings.Cut(name, "|") // such as client|setinfo
		if slices.Contains(bySession, command) || slices.Contains(direct, command) {
			n += f.calls[name] - before.calls[name]
		}
	}
	return n
}
