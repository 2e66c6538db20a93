package interop_test

import (
	"bufio"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
)

// A monitor reads what MONITOR shows: every command that the server runs, in its order. So a test knows for certain, and without asking
// again and again, that Go has subscribed and then found the lock held.
type monitor struct {
	t     *testing.T
	conn  net.Conn
	lines *bufio.Scanner
}

func startMonitor(t *testing.T, addr string) *monitor {
	t.Helper()
	var d net.Dialer
	conn, err := d.DialContext(t.Context(), "tcp", addr)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	m := &monitor{t: t, conn: conn, lines: bufio.NewScanner(conn)}
	_, err = fmt.Fprint(conn, "MONITOR\r\n")
	require.NoError(t, err)
	m.await("+OK")
	return m
}

// await returns when a command has been shown that contains all of the words.
func (m *monitor) await(words ...string) {
	m.t.Helper()
	require.NoError(m.t, m.conn.SetReadDeadline(time.Now().Add(patience)))
	for m.lines.Scan() {
		if containsAll(m.lines.Text(), words) {
			return
		}
	}
	require.FailNowf(m.t, "the server has not run a command", "with %q: %v", words, m.lines.Err())
}

func containsAll(s string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(s, word) {
			return false
		}
	}
	return true
}

// awaitSubscriber returns when somebody subscribes to releases.
func (m *monitor) awaitSubscriber() {
	m.t.Helper()
	m.await(`"subscribe"`, `"`+namespace+`-release"`)
}

// awaitLook returns when a script looks at the lock. What the test sends from then on is run after that script.
func (m *monitor) awaitLook() {
	m.t.Helper()
	m.await(" lua] ", `"`+key+`"`)
}

// skip passes over everything that the server has run up to now.
func (m *monitor) skip(client *redis.Client) {
	m.t.Helper()
	const mark = "the test has come this far"
	require.NoError(m.t, client.Echo(m.t.Context(), mark).Err())
	m.await(mark)
}
