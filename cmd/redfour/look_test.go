//go:build unix

package main_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/redistest"
)

// hold takes a lock in this process, as "the holder", and lets others wait, in this order.
func hold(t *testing.T, s *redistest.Server, id string, waiters ...string) *redfour.Lease {
	t.Helper()
	open := func(owner string) *redfour.Lock {
		lock, err := redfour.Open(url(s), redfour.WithOwner(owner))
		require.NoError(t, err)
		return lock
	}
	lock := open("the holder")
	lease, err := lock.Acquire(t.Context(), id, time.Hour)
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan struct{}, len(waiters))
	for i, owner := range waiters {
		waiter := open(owner)
		go func() {
			_, _ = waiter.WaitAcquire(ctx, id, time.Hour)
			_ = waiter.Close()
			left <- struct{}{}
		}()
		eventually(t, "it waits", func() bool { return len(inspect(t, lock, id).Waiters) == i+1 })
	}
	t.Cleanup(func() {
		cancel()
		for range waiters {
			<-left
		}
		_ = lock.Close()
	})
	return lease
}

func TestRealInspect_showsWhoHoldsAndWhoWaits(t *testing.T) {
	s := redistest.Start(t)
	lease := hold(t, s, "x", "first", "second")

	r := do(t, url(s), "inspect", "x")
	assert.Zero(t, r.code)
	assert.Empty(t, r.stderr)
	assert.Regexp(t, fmt.Sprintf(`^x is held by the holder
  index    %d
  since    %s
  left     (59m59|1h0m0).*s
  waiting  1. first
           2. second
$`, lease.Index, time.UnixMicro(lease.Index).Format(time.DateTime)), r.stdout)

	r = do(t, url(s), "inspect", "--json", "x")
	assert.Zero(t, r.code)
	var state struct {
		Time, Since time.Time
		ID, Owner   string
		Held        bool
		Index, TTL  int64
		Waiters     []string
	}
	require.NoError(t, json.Unmarshal([]byte(r.stdout), &state))
	assert.WithinDuration(t, time.Now(), state.Time, time.Minute)
	assert.WithinDuration(t, time.UnixMicro(lease.Index), state.Since, 0)
	assert.Equal(t, []any{"x", "the holder", true, lease.Index, []string{"first", "second"}},
		[]any{state.ID, state.Owner, state.Held, state.Index, state.Waiters})
	assert.InDelta(t, time.Hour.Milliseconds(), state.TTL, float64(time.Minute.Milliseconds()))
}

func TestRealInspect_ofALockThatNobodyHolds(t *testing.T) {
	s := redistest.Start(t)
	assert.Equal(t, result{1, "nobody holds x\n", ""}, do(t, url(s), "inspect", "x"))
	r := do(t, url(s), "inspect", "--json", "x")
	assert.Equal(t, 1, r.code)
	assert.Regexp(t, `^\{"time":"[^"]*Z","id":"x","held":false,"waiters":\[\]\}\n$`, r.stdout)
}

func TestRealInspect_ofAnNpmLease(t *testing.T) {
	s := redistest.Start(t)
	require.NoError(t, s.Client(t).HSet(t.Context(), "lock:x", "index", 5).Err())
	require.NoError(t, s.Client(t).Expire(t.Context(), "lock:x", time.Minute).Err())
	r := do(t, url(s), "inspect", "x")
	assert.Regexp(t, `^x is held by somebody without a name, perhaps an npm client\n  index    5\n  left     .*s\n$`, r.stdout)
}

// What stands in Redis must not move the cursor of whoever looks.
func TestRealInspect_quotesWhatCannotBePrinted(t *testing.T) {
	s := redistest.Start(t)
	client, id := s.Client(t), "a\x1b[2J\nb"
	require.NoError(t, client.HSet(t.Context(), "lock:"+id, "index", 5, "token", "t", "owner", "me\x1b[1A\nyou").Err())
	require.NoError(t, client.Expire(t.Context(), "lock:"+id, time.Hour).Err())
	for _, args := range [][]string{{"inspect", id}, {"run", "--try", id, "--", "true"}} {
		r := do(t, url(s), args...)
		assert.NotContains(t, r.stdout+r.stderr, "\x1b")
		assert.Contains(t, r.stdout+r.stderr, `"me\x1b[1A\nyou"`)
		assert.Contains(t, r.stdout+r.stderr, `a\x1b[2J\nb`)
	}
	c := start(t, url(s), "watch", id)
	assert.Contains(t, c.line(), `  "a\x1b[2J\nb"  held by "me\x1b[1A\nyou", index 5, `)
}

func TestCommands_canBeInterruptedWhileRedisHangs(t *testing.T) {
	for _, args := range []string{"inspect x", "watch x", "release x --index 1", "doctor", "run x -- true"} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			hung, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer func() { _ = hung.Close() }()
			c := start(t, "redis://"+hung.Addr().String(), strings.Fields(args)...)
			conn, err := hung.Accept()
			require.NoError(t, err)
			defer func() { _ = conn.Close() }()
			c.signal(syscall.SIGTERM)
			r := c.wait()
			if args == "watch x" {
				assert.Equal(t, result{}, r)
				return
			}
			assert.Equal(t, 128+15, r.code)
			assert.Contains(t, r.stderr, `when the signal "terminated" came`)
		})
	}
}

func TestRealRelease_endsTheLeaseWithThatIndex(t *testing.T) {
	s := redistest.Start(t)
	lease := hold(t, s, "x")
	index := fmt.Sprint(lease.Index)

	r := do(t, url(s), "release", "x", "--index", fmt.Sprint(lease.Index+1))
	assert.Equal(t, 1, r.code)
	assert.Regexp(t, `^redfour: force release "x": index \d+ does not hold \(held by the holder, index `+index+`, .*\): lease superseded by another\n$`, r.stderr)

	r = do(t, url(s), "release", "x", "--index", index)
	assert.Equal(t, result{0, "ended lease " + index + " of x; its holder hears of it at its next renewal\n", ""}, r)

	r = do(t, url(s), "release", "x", "--index", index)
	assert.Equal(t, result{1, "", "redfour: force release \"x\": nobody holds it: lease expired\n"}, r)
}

func TestRealRelease_asJSON(t *testing.T) {
	s := redistest.Start(t)
	index := fmt.Sprint(hold(t, s, "x").Index)
	r := do(t, url(s), "release", "--json", "--index", index, "x")
	assert.Equal(t, result{0, `{"id":"x","index":` + index + `,"released":true}` + "\n", ""}, r)
	r = do(t, url(s), "release", "--json", "--index", index, "x")
	assert.Equal(t, result{1, "", `{"error":"redfour: force release \"x\": nobody holds it: lease expired","exit":1}` + "\n"}, r)
}

func TestRealWatch_printsWhatChanges(t *testing.T) {
	s := redistest.Start(t)
	c := start(t, url(s), "watch", "--interval", "10ms", "long name", "y")
	const clock = `^\d\d:\d\d:\d\d\.\d{3}  `
	assert.Regexp(t, clock+`long name  free$`, c.line())
	assert.Regexp(t, clock+`y          free$`, c.line())

	lease := hold(t, s, "y")
	assert.Regexp(t, clock+fmt.Sprintf(`y          held by the holder, index %d, .*s left$`, lease.Index), c.line())

	// Looks in which nothing is new but the time print nothing.
	lock, err := redfour.Open(url(s), redfour.WithOwner("the waiter"))
	require.NoError(t, err)
	for range 3 {
		lease, err := lock.Acquire(t.Context(), "long name", time.Hour)
		require.NoError(t, err)
		assert.Regexp(t, `long name  held by the waiter, .* left$`, c.line())
		require.NoError(t, lock.Release(t.Context(), lease))
		assert.Regexp(t, `long name  free$`, c.line())
	}

	ctx, cancel := context.WithCancel(t.Context())
	left := make(chan error, 1)
	go func() {
		_, err := lock.WaitAcquire(ctx, "y", time.Hour)
		left <- err
	}()
	assert.Regexp(t, `held by the holder, .* left; waiting: the waiter$`, c.line())
	cancel()
	require.Error(t, <-left)
	assert.Regexp(t, `held by the holder, .* left$`, c.line())
	require.NoError(t, lock.ForceRelease(t.Context(), "y", lease.Index))
	require.NoError(t, lock.Close())
	assert.Regexp(t, `  y          free$`, c.line())

	s.Kill()
	lines := []string{c.line(), c.line()}
	for _, line := range lines {
		assert.Regexp(t, clock+`(long name|y        )  not known: redfour: inspect .*: connect: connection refused$`, line)
	}
	s.Restart()
	assert.Contains(t, c.line(), "  free")
	assert.Contains(t, c.line(), "  free")

	c.signal(syscall.SIGINT)
	r := c.wait()
	assert.Zero(t, r.code)
	assert.Empty(t, r.stderr)
}

func TestRealWatch_asJSON(t *testing.T) {
	s := redistest.Start(t)
	c := start(t, url(s), "watch", "--interval", "10ms", "--json", "x")
	assert.Regexp(t, `^\{"time":"[^"]*","id":"x","held":false,"waiters":\[\]\}$`, c.line())
	s.Kill()
	assert.Regexp(t, `^\{"error":"redfour: inspect .*","id":"x","time":"[^"]*"\}$`, c.line())
	c.signal(syscall.SIGTERM)
	assert.Zero(t, c.wait().code)
}

// badInput are calls of which each gets a sentence, and an exit code of its kind.
func TestRealBadInput_isASentenceAndACode(t *testing.T) {
	s := redistest.Start(t)
	require.NoError(t, s.Client(t).Set(t.Context(), "lock:string", 1, 0).Err())
	good, nobody := url(s), "redis://127.0.0.1:1"
	tests := []struct {
		args string // separated by spaces; _ is an empty one
		url  string
		code int
		text string // of stderr
	}{
		{"", good, 64, `no command given; "redfour help" lists them`},
		{"redis://app:secret@host run", good, 64, `a URL goes behind --url, and that behind the command; see "redfour help"`},
		{"doctor redis://app:secret@host", good, 64, `the doctor takes no operands; a URL goes behind --url`},
		{"steal", good, 64, `there is no command "steal"; "redfour help" lists those there are`},
		{"help steal", good, 64, `there is no command "steal"; "redfour help" lists those there are`},
		{"run", good, 64, `which lock? An ID is missing; see "redfour help run"`},
		{"run x", good, 64, `the command goes behind a "--", and one ID before it; see "redfour help run"`},
		{"run x true", good, 64, `the command goes behind a "--", and one ID before it; see "redfour help run"`},
		{"run x y -- true", good, 64, `the command goes behind a "--", and one ID before it; see "redfour help run"`},
		{"run -- true", good, 64, `which lock? An ID is missing; see "redfour help run"`},
		{"run x --", good, 64, `there is no command behind the "--"; see "redfour help run"`},
		{"run --nonsense x -- true", good, 64, `flag provided but not defined: -nonsense; see "redfour help run"`},
		{"run --ttl 30 x -- true", good, 64, `invalid value "30" for flag -ttl: a time is wanted, such as 500ms, 30s or 5m; see "redfour help run"`},
		{"run --ttl 0s x -- true", good, 64, `invalid value "0s" for flag -ttl: at least 1ms is needed; see "redfour help run"`},
		{"run --wait -1s x -- true", good, 64, `invalid value "-1s" for flag -wait: at least 1ms is needed; see "redfour help run"`},
		{"run --try --wait 1s x -- true", good, 64, `--try does not wait, so that --wait makes no sense with it; see "redfour help run"`},
		{"run x -- /nowhere/to/be/found", good, 127, `/nowhere/to/be/found: no such file or directory`},
		{"run x -- nowheretobefound", good, 127, `exec: "nowheretobefound": executable file not found in $PATH`},
		{"run x -- /etc/passwd", good, 126, `exec: "/etc/passwd": permission denied`},
		{"run x -- _", good, 127, `exec: "": executable file not found in $PATH`},
		{"run _ -- true", good, 64, `which lock? An ID is missing; see "redfour help run"`},
		{"run \xff -- true", good, 64, `the ID "\xff" is not UTF-8; see "redfour help run"`},
		{"run string -- true", good, 69, `acquire "string": key "lock:string" is a string`},
		{"run --namespace _ x -- true", good, 64, `new: empty namespace`},
		{"run x -- true", nobody, 69, `dial tcp 127.0.0.1:1: connect: connection refused`},
		{"run --wait 1s x -- true", nobody, 69, `connection refused`},
		{"run x -- true", "redis://app:secret@" + s.Addr(), 69, `acquire "x": WRONGPASS `},
		{"run x -- true", "redis://app:secret@127.0.0.1:port", 64, `the URL in REDIS_URL is not understood; see "redfour help run"`},
		{"run x -- true", "redis://:1/secret@" + s.Addr(), 64, `the URL in REDIS_URL is not understood; see "redfour help run"`},
		{"run --url secret x -- true", good, 64, `the URL in --url is not understood; see "redfour help run"`},
		{"run --cluster x -- true", good, 69, `ERR This instance has cluster support disabled`},
		{"inspect", good, 64, `which lock? An ID is missing; see "redfour help inspect"`},
		{"inspect x y", good, 64, `one ID is wanted, and there are 2; see "redfour help inspect"`},
		{"inspect --ttl 1s x", good, 64, `flag provided but not defined: -ttl; see "redfour help inspect"`},
		{"inspect _", good, 64, `which lock? An ID is missing; see "redfour help inspect"`},
		{"watch x _", good, 64, `which lock? An ID is missing; see "redfour help watch"`},
		{"inspect string", good, 69, `inspect "string": key "lock:string" is a string`},
		{"inspect x", nobody, 69, `inspect "x": dial tcp 127.0.0.1:1: connect: connection refused`},
		{"watch", good, 64, `which lock? An ID is missing; see "redfour help watch"`},
		{"watch --interval soon x", good, 64, `invalid value "soon" for flag -interval: a time is wanted`},
		{"watch x", nobody, 69, `inspect "x": dial tcp 127.0.0.1:1: connect: connection refused`},
		{"release x", good, 64, `which lease? --index is missing, or not an index; see "redfour help release"`},
		{"release x --index 0", good, 64, `which lease? --index is missing, or not an index; see "redfour help release"`},
		{"release x --index one", good, 64, `invalid value "one" for flag -index: parse error; see "redfour help release"`},
		{"release --index 1", good, 64, `which lock? An ID is missing; see "redfour help release"`},
		{"release x --index 1", good, 1, `force release "x": nobody holds it: lease expired`},
		{"release x --index 1", nobody, 69, `connection refused`},
		{"doctor --namespace _", good, 64, `new: empty namespace`},
		{"doctor x", good, 64, `the doctor takes no operands; a URL goes behind --url; see "redfour help doctor"`},
		{"doctor", nobody, 69, `dial tcp 127.0.0.1:1: connect: connection refused`},
		{"doctor", "redis://app:secret@" + s.Addr(), 69, `WRONGPASS `},
	}
	calls := make([]*call, len(tests)) // All at once, because some take five seconds.
	for i, test := range tests {
		args := strings.Fields(test.args)
		for j := range args {
			args[j] = strings.TrimSuffix(args[j], "_")
		}
		calls[i] = start(t, test.url, args...)
	}
	for i, test := range tests {
		t.Run(test.args, func(t *testing.T) {
			r := calls[i].wait()
			assert.Equal(t, test.code, r.code)
			assert.Empty(t, r.stdout)
			assert.Contains(t, r.stderr, "redfour: ")
			assert.Contains(t, r.stderr, test.text)
			assert.NotContains(t, r.stderr, "secret")
			assert.Equal(t, 1, strings.Count(r.stderr, "\n"), r.stderr)
		})
	}
}

func TestRealOperands_mayLookLikeFlags(t *testing.T) {
	s := redistest.Start(t)
	hold(t, s, "--json")
	assert.Contains(t, do(t, url(s), "inspect", "--", "--json").stdout, "--json is held by the holder\n")
	assert.Equal(t, 75, do(t, url(s), "run", "--try", "--", "--json", "--", "true").code)
	r := do(t, url(s), "run", "--try", "--", "-x", "--", "sh", "-c", `echo "$REDFOUR_ID" "$@"`, "sh", "--", "--json")
	assert.Equal(t, result{0, "-x -- --json\n", ""}, r)
}

func TestHelp_showsExamplesAndExitCodes(t *testing.T) {
	for _, args := range [][]string{{"help"}, {"--help"}, {"-h"}} {
		r := do(t, "", args...)
		assert.Zero(t, r.code)
		assert.Contains(t, r.stdout, "\nExit codes:\n")
		assert.Contains(t, r.stdout, "\n  redfour doctor ")
	}
	for _, command := range []string{"run", "inspect", "watch", "release", "doctor"} {
		r := do(t, "", "help", command)
		assert.Zero(t, r.code)
		assert.Empty(t, r.stderr)
		for _, text := range []string{"redfour " + command + " [flags]", "\nExamples:\n  redfour ", "\nExit codes:\n", "\n  --url URL  "} {
			assert.Contains(t, r.stdout, text)
		}
		for _, args := range [][]string{{command, "-h"}, {command, "x", "--help"}} {
			assert.Equal(t, r, do(t, "", args...))
		}
	}
}

func TestVersion(t *testing.T) {
	for _, word := range []string{"version", "--version"} {
		r := do(t, "", word)
		assert.Zero(t, r.code)
		assert.Regexp(t, `^redfour \S+\n$`, r.stdout)
	}
}
