package main

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/redistest"
)

// eachInGo runs a test for each library that has a locker.
func eachInGo(t *testing.T, test func(t *testing.T, e entry)) {
	t.Helper()
	for _, e := range lineup() {
		if e.open != nil {
			t.Run(e.Name, func(t *testing.T) {
				t.Parallel()
				test(t, e)
			})
		}
	}
}

// openFor returns a locker as one process has it.
func openFor(t *testing.T, e entry, addr string) locker {
	t.Helper()
	return openAt(t, e, place{Addr: addr})
}

func openAt(t *testing.T, e entry, where place) locker {
	t.Helper()
	l, err := e.open(setting{place: where, ttl: leaseTime, poll: 5 * time.Millisecond})
	require.NoError(t, err)
	t.Cleanup(l.close)
	return l
}

// waitAgain waits until it is served. On a busy machine rueidislock forgets a waiter now and then: the goroutine that follows a
// failed attempt may look at its outcome before that is noted, and then removes what the waiter is to be woken by. Who waits
// again is served.
func waitAgain(ctx context.Context, l locker, id string) (release, error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTime)
	defer cancel()
	for {
		brief, cancel := context.WithTimeout(ctx, time.Second)
		release, err := l.wait(brief, id)
		cancel()
		if err == nil || ctx.Err() != nil {
			return release, err
		}
	}
}

func TestLibraries_twoHoldersAreImpossible(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		addr := redistest.Start(t).Addr()
		for name, other := range map[string]locker{
			"in one process": nil,
			"in another":     openFor(t, e, addr),
		} {
			t.Run(name, func(t *testing.T) {
				one := openFor(t, e, addr)
				if other == nil {
					other = one
				}
				release, err := one.acquire(t.Context(), "id")
				require.NoError(t, err)
				_, err = other.acquire(t.Context(), "id")
				require.Error(t, err)
				require.NoError(t, release(t.Context()))
				release, err = other.acquire(t.Context(), "id")
				require.NoError(t, err)
				require.NoError(t, release(t.Context()))
			})
		}
	})
}

func TestLibraries_aWaiterIsServedAfterTheRelease(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		if !e.waits {
			t.Skip("it cannot wait")
		}
		addr := redistest.Start(t).Addr()
		one, other := openFor(t, e, addr), openFor(t, e, addr)
		release, err := one.wait(t.Context(), "id")
		require.NoError(t, err)

		brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err = other.wait(brief, "id")
		require.Error(t, err, "the lock is held")
		require.Error(t, brief.Err(), "it waited")

		served := make(chan error, 1) // one
		go func() {
			release, err := waitAgain(t.Context(), other, "id")
			if err == nil {
				err = release(t.Context())
			}
			served <- err
		}()
		select {
		case err := <-served:
			t.Fatalf("served while the lock was held: %v", err)
		case <-time.After(50 * time.Millisecond):
		}
		require.NoError(t, release(t.Context()))
		select {
		case err := <-served:
			require.NoError(t, err)
		case <-time.After(leaseTime / 2):
			t.Fatal("not served after the release")
		}
	})
}

// A wait that ends must not end the section of somebody whose wait was successful: rueidislock ties the
// lock to the context.
func TestLibraries_theEndOfWaitingEndsNoSection(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		if !e.waits {
			t.Skip("it cannot wait")
		}
		addr := redistest.Start(t).Addr()
		one, other := openFor(t, e, addr), openFor(t, e, addr)
		waiting, cancel := context.WithCancel(t.Context())
		release, err := one.wait(waiting, "id")
		require.NoError(t, err)
		cancel()
		brief, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		_, err = other.wait(brief, "id")
		require.Error(t, err)
		require.NoError(t, release(t.Context()))
	})
}

// What MONITOR shows as sent by clients is what is counted.
func TestFigures_countWhatClientsSend(t *testing.T) {
	eachInGo(t, func(t *testing.T, e entry) {
		r := redistest.Start(t)
		s := &server{client: r.Client(t)}
		c, err := newClock()
		require.NoError(t, err)
		processes := []locker{openFor(t, e, r.Addr()), openFor(t, e, r.Addr())}
		for _, l := range processes {
			// As a worker warms up. A new connection may ask for what an old server does not know, and does not count.
			release, err := l.acquire(t.Context(), "warm")
			require.NoError(t, err)
			require.NoError(t, release(t.Context()))
		}
		lines := monitor(t, r.Addr())

		before, err := s.figures(t.Context(), c)
		require.NoError(t, err)
		var all sync.WaitGroup
		for process, l := range processes {
			for waiter := range 3 {
				all.Go(func() {
					for range 10 {
						var release release
						var err error
						if e.waits {
							release, err = waitAgain(t.Context(), l, "id")
						} else {
							release, err = l.acquire(t.Context(), fmt.Sprint(process, waiter))
						}
						if err == nil {
							err = release(t.Context())
						}
						if err != nil {
							t.Error(err)
							return
						}
					}
				})
			}
		}
		all.Wait()
		after, err := s.figures(t.Context(), c)
		require.NoError(t, err)
		require.Equal(t, clientLines(t, lines), after.sent(before, e.direct))
	})
}

// monitor returns what the server says of all commands, from now on.
func monitor(t *testing.T, addr string) *bufio.Scanner {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	_, err = conn.Write([]byte("MONITOR\r\n"))
	require.NoError(t, err)
	lines := bufio.NewScanner(conn)
	require.True(t, lines.Scan())
	require.Equal(t, "+OK", lines.Text())
	return lines
}

// clientLines counts the commands between the first INFO and the second that no script called.
func clientLines(t *testing.T, lines *bufio.Scanner) int64 {
	t.Helper()
	infos, n := 0, int64(0)
	for infos < 2 {
		require.True(t, lines.Scan(), "%v", lines.Err())
		line := strings.ToLower(lines.Text())
		switch {
		case strings.Contains(line, `] "info"`):
			infos++
		case infos == 1 && !strings.Contains(line, " lua]"):
			n++
		}
	}
	return n
}
