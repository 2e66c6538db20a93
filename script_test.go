package redfour_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/internal/slot"
)

// The names are shared with npm redfour, byte by byte.
func TestWire_names(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client, redfour.WithNamespace("my ns"))
		heard := client.Subscribe(t.Context(), "my ns-release")
		t.Cleanup(func() { _ = heard.Close() })
		_, err := heard.Receive(t.Context())
		require.NoError(t, err)

		lease := mustAcquire(t, l, "a:b {c}\n\x00", time.Minute)
		require.Equal(t, []string{"my ns:a:b {c}\n\x00", "my nsindex"}, m.Keys())
		fields, err := m.HKeys("my ns:a:b {c}\n\x00")
		require.NoError(t, err)
		require.Equal(t, []string{"index", "owner", "token"}, fields)
		require.NoError(t, l.Release(t.Context(), lease))
		message, err := heard.ReceiveMessage(t.Context())
		require.NoError(t, err)
		require.Equal(t, "my ns:a:b {c}\n\x00", message.Payload)
		require.Equal(t, []string{"my nsindex"}, m.Keys())
	})
}

// FuzzNames_oneSlot shows that a script can run in a cluster, whatever the namespace and the id.
func FuzzNames_oneSlot(f *testing.F) {
	for _, seed := range [][2]string{
		{"lock", "42"}, {"{a}", "b"}, {"x{a}y", "{b}"}, {"a{b", "}"}, {"{", "{}"}, {"{}", "x"}, {"}{", "{x}"}, {"{}{a}", "}{"}, {"}", ""}, {"ä", "\x00"},
	} {
		f.Add(seed[0], seed[1])
	}
	f.Fuzz(func(t *testing.T, namespace, id string) {
		names, err := redfour.NamesIn(namespace, id, true)
		if err != nil {
			require.Contains(t, namespace, "}")
			return
		}
		want := slot.Of(names[0])
		for _, name := range names {
			require.Equal(t, want, slot.Of(name), "%q", name)
		}
	})
}

func TestNames_idsAreSpreadOverTheSlots(t *testing.T) {
	slots := make(map[int]bool)
	for n := range 5000 {
		names, err := redfour.NamesIn("orders", fmt.Sprint(n), true)
		require.NoError(t, err)
		slots[slot.Of(names[0])] = true
	}
	require.InDelta(t, 256, len(slots), 10) // Two buckets may be in one slot.
}

func TestWire_scriptsDeclareTheirKeysAndAreNotRepeated(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		seen := make(map[string]bool)
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			require.True(t, cmd.NoRetry())
			require.True(t, cmd.Clone().NoRetry())
			for _, key := range cmd.Args()[3 : 3+cmd.Args()[2].(int)] {
				seen[key.(string)] = true
			}
			return nil
		})
		lease := mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.NoError(t, l.Release(t.Context(), lease))
		require.Equal(t, map[string]bool{"lock:42": true, "lockindex": true, "lock-waiters:42": true}, seen)
	})
}

// Some proxies read scripts, and refuse one that calls Redis by another name, or
// names a key by other than KEYS and a number.
func TestScripts_callRedisAndNameKeysLiterally(t *testing.T) {
	for name, source := range redfour.Scripts() {
		rest := regexp.MustCompile(`redis\.(p?call\("|error_reply\()|KEYS\[[1-9]\]`).ReplaceAllString(source, "")
		require.NotRegexp(t, `\b(redis|p?call|KEYS)\b`, rest, name)
	}
}

func TestIndex_isAtLeastTheServersTimeAndGrows(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		var last int64
		for i := range 100 {
			lease := mustAcquire(t, l, fmt.Sprint(i), time.Minute)
			require.GreaterOrEqual(t, lease.Index, time.Now().UnixMicro())
			require.Greater(t, lease.Index, last)
			last = lease.Index
			counter, err := m.Get("lockindex")
			require.NoError(t, err)
			require.Equal(t, fmt.Sprint(last), counter)
			require.Equal(t, fmt.Sprint(last), m.HGet("lock:"+lease.ID, "index"))
		}
	})
}

func TestIndex_growsWhenTheCounterIsLost(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		require.NoError(t, m.Set("lockindex", "4000000000000000"))
		lease := mustAcquire(t, l, "42", time.Minute)
		require.EqualValues(t, int64(4000000000000001), lease.Index)
		m.FlushAll()
		after := mustAcquire(t, l, "42", time.Minute)
		require.Greater(t, after.Index, lease.Index, "though the counter and the clock are behind")
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Hour), redfour.ErrConflict)
		require.ErrorIs(t, l.Release(t.Context(), lease), redfour.ErrConflict)
		require.Equal(t, time.Minute, m.TTL("lock:42"))
	})
}

// The holder's index is as good a reason as one's own.
func TestIndex_growsBeyondWhatOthersHold(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		require.NoError(t, m.Set("lockindex", "4000000000000000"))
		lease := mustAcquire(t, a, "42", time.Minute)
		_, err := b.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		m.FlushAll()
		require.Greater(t, mustAcquire(t, b, "42", time.Minute).Index, lease.Index)
	})
}

// Somebody else's absurd index must not make ours run out.
func TestIndex_ignoresWhatTheClockWillNotReach(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		m.HSet("lock:42", "index", "9007199254740990")
		m.SetTTL("lock:42", time.Second)
		_, err := l.Acquire(t.Context(), "42", time.Minute)
		require.ErrorIs(t, err, redfour.ErrLocked)
		pass(time.Second)
		lease := mustAcquire(t, l, "42", time.Minute)
		require.Less(t, lease.Index, time.Now().Add(time.Second).UnixMicro())
	})
}

func TestScripts_areSentInFullWhenTheServerForgotThem(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client)
		flush := func() { require.NoError(t, client.ScriptFlush(t.Context()).Err()) }
		lease := mustAcquire(t, l, "42", time.Minute)
		flush()
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		flush()
		got := waitFor(t.Context(), l, "42", time.Minute)
		pass(time.Second)
		flush()
		require.NoError(t, l.Release(t.Context(), lease))
		require.NoError(t, (<-got).err)
	})
}

func TestErrors_nameAForeignKeyBehindAHookThatWraps(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
			if cmd.Err() != nil {
				return fmt.Errorf("my hook: %w", cmd.Err())
			}
			return nil
		})
		require.NoError(t, m.Set("lock:42", "x"))
		_, err := l.WaitAcquire(t.Context(), "42", time.Minute)
		require.ErrorContains(t, err, `redfour: wait for "42": key "lock:42" is a string`)
	})
}

func TestErrors_nameTheOperationAndQuoteTheID(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		id := strings.Repeat("ü", 40_000)
		lease := mustAcquire(t, l, id, time.Minute)
		_, err := l.Acquire(t.Context(), id, time.Minute)
		require.EqualError(t, err, fmt.Sprintf(
			`redfour: acquire "%s"… (80000 bytes): held by %s, index %d, 1m0s left`, strings.Repeat("ü", 50), m.HGet("lock:"+id, "owner"), lease.Index))
		_, err = l.Acquire(t.Context(), "\x00\n\"", time.Minute)
		require.NoError(t, err)
		_, err = l.Acquire(t.Context(), "\x00\n\"", time.Minute)
		require.ErrorContains(t, err, `redfour: acquire "\x00\n\"": held`)
	})
}

// The calls that a client of another make may send: they are shown here once, so
// that a change of the wire cannot pass unnoticed.
func TestWire_arguments(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := newLock(t, m.client(t, way), redfour.WithOwner("web 3"))
		var calls []string
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if cmd.Name() == "eval" {
				calls = append(calls, fmt.Sprintf("%v", cmd.Args()[2:]))
			}
			return nil
		})
		lease := mustAcquire(t, l, "42", 1500*time.Millisecond)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.NoError(t, l.Release(t.Context(), lease))
		require.Equal(t, []string{
			fmt.Sprintf(`[2 lock:42 lockindex 1500 %s 0 web 3]`, lease.Token),
			fmt.Sprintf(`[1 lock:42 %d %s 60000 lock- lock:42]`, lease.Index, lease.Token),
			fmt.Sprintf(`[3 lock:42 lockindex lock-waiters:42 %d %s lock- %d lock:42]`,
				lease.Index, lease.Token, lease.Index),
		}, calls)
	})
}

func TestErrClosed_isNotNotHeld(t *testing.T) {
	require.NotErrorIs(t, redfour.ErrClosed, redfour.ErrNotHeld)
	require.NotErrorIs(t, redfour.ErrLocked, redfour.ErrNotHeld)
	require.ErrorIs(t, redfour.ErrExpired, redfour.ErrNotHeld)
	require.ErrorIs(t, redfour.ErrConflict, redfour.ErrNotHeld)
	require.False(t, errors.Is(redfour.ErrExpired, redfour.ErrConflict))
}
