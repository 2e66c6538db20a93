//go:build unix

package examples_test

import (
	"bufio"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/redistest"
)

// leasesThatRunOut says for how long the keys of a program may outlive it.
var leasesThatRunOut = map[string]time.Duration{"cronjob": 1500 * time.Millisecond}

func TestReal_programsLeaveNothingBehind(t *testing.T) {
	for name := range programs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, "--requirepass", "secret")
			check(t, name, "redis://:secret@"+server.Addr())
			nothingLeft(t, server, leasesThatRunOut[name])
		})
	}
}

// Each is interrupted when it is in the middle of its story.
func TestReal_interruptedProgramsLeaveNothingBehind(t *testing.T) {
	for name := range programs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := redistest.Start(t, "--requirepass", "secret")
			cmd := program(t, name, "redis://:secret@"+server.Addr())
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			var stderr strings.Builder
			cmd.Stderr = &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			out := bufio.NewReader(stdout)
			for line := ""; !strings.Contains(line, " ms  "); {
				if line, err = out.ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
			interrupted := time.Now()
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, out); err != nil {
				t.Fatal(err)
			}
			err = cmd.Wait()
			if err == nil || !strings.Contains(stderr.String(), name+": ") || strings.Contains(stderr.String(), "secret") {
				t.Errorf("%v\n%s", err, stderr.String())
			}
			if took := time.Since(interrupted); took > 5*time.Second {
				t.Errorf("it ended %v after it was interrupted", took)
			}
			// A lease may be nobody's then, and runs out.
			nothingLeft(t, server, 2*time.Second)
		})
	}
}

// nothingLeft fails if a key is left that does not run out in time.
func nothingLeft(t *testing.T, server *redistest.Server, within time.Duration) {
	t.Helper()
	options := server.Options()
	options.Password = "secret"
	client := redis.NewClient(options)
	t.Cleanup(func() { _ = client.Close() })
	keys, err := client.Keys(t.Context(), "*").Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys {
		if ttl := client.PTTL(t.Context(), key).Val(); ttl == -1 || ttl > within { // -2 is a key that has run out
			t.Errorf("%s is left, for %v", key, ttl)
		}
	}
}
