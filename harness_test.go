package redfour_test

import (
	"context"
	"encoding"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestMain(m *testing.M) {
	logging.Disable() // go-redis reports every connection that the tests break
	m.Run()
}

// bubble runs f with a miniredis whose clock is the bubble's. Nothing sleeps in
// it for real, durations are exact, and a goroutine that is left over fails the
// test.
func bubble(t *testing.T, f func(t *testing.T, m *mini)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := &mini{miniredis.NewMiniRedis()}
		m.ClockTTL(true)
		t.Cleanup(func() {
			// What works for callers who are gone, and the client's own dialing,
			// have bounds of their own.
			pass(10 * time.Second)
			m.Close()
		})
		f(t, m)
	})
}

// pass lets time go by. It is for bubbles, where that takes none.
func pass(d time.Duration) { <-time.After(d) }

// A mini is a miniredis that is reached without sockets.
type mini struct{ *miniredis.Miniredis }

func (m *mini) client(t *testing.T, via ...*link) *redis.Client {
	t.Helper()
	// The pool is larger than any test needs: go-redis shares the timers of those
	// who wait for a connection between all clients, and so between bubbles.
	o := &redis.Options{Addr: "127.0.0.1:6379", PoolSize: 10_000, MaxRetries: 3}
	o.Dialer = func(context.Context, string, string) (net.Conn, error) {
		conn, err := m.Dial()
		if err != nil {
			return nil, err
		}
		return newSocket(conn), nil
	}
	for _, l := range via {
		o.Dialer = l.through(o.Dialer)
	}
	return newClient(t, o, via...)
}

func newClient(tb testing.TB, o *redis.Options, via ...*link) *redis.Client {
	tb.Helper()
	client := redis.NewClient(o)
	for _, l := range via {
		client.AddHook(l)
	}
	tb.Cleanup(func() { _ = client.Close() })
	return client
}

// A socket buffers what is written to a pipe, as a kernel does. Without that a
// client that writes a long pipeline and a server that answers its first command
// block each other until a timeout.
type socket struct {
	net.Conn

	mu      sync.Mutex // guards what follows
	more    sync.Cond  // on mu
	written []byte     // not yet in the pipe
	err     error      // of the pipe
}

func newSocket(pipe net.Conn) *socket {
	s := &socket{Conn: pipe}
	s.more.L = &s.mu
	go s.flush()
	return s
}

// flush writes to the pipe until it is closed.
func (s *socket) flush() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.err == nil {
		if len(s.written) == 0 {
			s.more.Wait()
			continue
		}
		b := s.written
		s.written = nil
		s.mu.Unlock()
		_, err := s.Conn.Write(b)
		s.mu.Lock()
		if s.err == nil {
			s.err = err
		}
	}
}

func (s *socket) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return 0, s.err
	}
	s.written = append(s.written, b...)
	s.more.Signal()
	return len(b), nil
}

func (s *socket) Close() error {
	s.mu.Lock()
	s.err = io.ErrClosedPipe
	s.more.Signal()
	s.mu.Unlock()
	return s.Conn.Close()
}

func (s *socket) SetDeadline(t time.Time) error { return s.SetReadDeadline(t) }

// SetWriteDeadline does nothing, because writes do not block.
func (s *socket) SetWriteDeadline(time.Time) error { return nil }

// lock makes a Lock with a client of its own.
func (m *mini) lock(t *testing.T, via ...*link) *redfour.Lock {
	t.Helper()
	return newLock(t, m.client(t, via...))
}

func newLock(tb testing.TB, client redis.UniversalClient, opts ...redfour.Option) *redfour.Lock {
	tb.Helper()
	l, err := redfour.New(client, opts...)
	require.NoError(tb, err)
	tb.Cleanup(func() { _ = l.Close() })
	return l
}

// A link is a client's way to its server, on which things go wrong. It sees the
// scripts as a hook of the client, and the bytes as its dialer.
type link struct {
	mu      sync.Mutex // guards what follows
	scripts int        // sent so far, but for the checks of the subscription
	shared  int        // round trips so far that carried several
	ears    int        // connections that subscribed so far
	before  func(ctx context.Context, cmd redis.Cmder) error
	after   func(ctx context.Context, cmd redis.Cmder) error
	dialed  int // connections so far
	conns   map[*linkConn]struct{}
	kept    *kept         // a script on the wire; nil: none is kept back
	down    bool          // no new connections
	delay   time.Duration // of new connections
	latency time.Duration // of replies to scripts
	lag     time.Duration // of whatever the server sends
}

// beforeScript calls f before each script is sent; an error keeps it from being
// sent, and lostReply makes it look as if it had been. A nil f ends that.
func (l *link) beforeScript(f func(ctx context.Context, cmd redis.Cmder) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.before = f
}

// afterScript calls f after each script has run; its error takes the place of the reply.
func (l *link) afterScript(f func(ctx context.Context, cmd redis.Cmder) error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.after = f
}

// once makes f apply to the first script that matches only.
func once(match func(redis.Cmder) bool, f func() error) func(context.Context, redis.Cmder) error {
	var mu sync.Mutex
	done := false
	return func(_ context.Context, cmd redis.Cmder) error {
		mu.Lock()
		hit := !done && match(cmd)
		done = done || hit
		mu.Unlock()
		if hit {
			return f()
		}
		return nil
	}
}

// Scripts are told apart by their keys and arguments.
func isAcquire(cmd redis.Cmder) bool {
	return keys(cmd) >= 2 && !isRelease(cmd) && !isLeave(cmd) && !isInspect(cmd)
}

func isRelease(cmd redis.Cmder) bool {
	args := cmd.Args()
	first := 3 + keys(cmd)
	return len(args) > first+2 && strings.HasSuffix(argument(args, first+2), "-")
}

func isLeave(cmd redis.Cmder) bool { return strings.Contains(argument(cmd.Args(), 4), "-waiters:") }
func isRenew(cmd redis.Cmder) bool {
	return keys(cmd) == 1 && !isRelease(cmd) && !isInspect(cmd) && !isCheck(cmd)
}

// isCheck matches the script that counts the subscribers of an inbox.
func isCheck(cmd redis.Cmder) bool {
	return keys(cmd) == 1 && strings.Contains(argument(cmd.Args(), 4), "-grant:")
}

// isInspect tells of the script that looks, and of the one that does so for the library itself.
func isInspect(cmd redis.Cmder) bool {
	args := cmd.Args()
	return len(args) == 4+keys(cmd) && strings.HasSuffix(argument(args, len(args)-1), "-")
}

func keys(cmd redis.Cmder) int {
	n, _ := cmd.Args()[2].(int)
	return n
}

func argument(args []any, i int) string {
	s, _ := args[i].(string)
	return s
}

// written returns the words of a command as go-redis writes them, which it takes for written from then on.
func written(cmd redis.Cmder) []any {
	words := slices.Clone(cmd.Args())
	for i, word := range words {
		if m, ok := word.(encoding.BinaryMarshaler); ok {
			words[i], _ = m.MarshalBinary()
		}
	}
	return words
}

// valuesOf returns what a script replied: status, index, milliseconds left, time.
func valuesOf(cmd redis.Cmder) ([]int64, error) {
	reply, ok := cmd.(interface {
		Val() any
		Slice() ([]any, error)
	})
	if !ok {
		return nil, fmt.Errorf("%s has no reply of a script", cmd.Name())
	}
	if index, ok := reply.Val().(int64); ok && cmd.Err() == nil {
		return []int64{1, index, 0, 0}, nil
	}
	values, err := reply.Slice()
	numbers := make([]int64, min(4, len(values)))
	for i := range numbers {
		numbers[i], _ = values[i].(int64)
	}
	return numbers, err
}

// lostReply is what go-redis returns when the server hung up before it answered.
func lostReply() error { return io.EOF }

func (l *link) sent() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.scripts
}

func (l *link) subscriptions() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ears
}

func (l *link) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *link) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if err := l.send(ctx, cmd); err != nil {
			return err
		}
		return l.answer(ctx, cmd, next(ctx, cmd))
	}
}

// Scripts that travel together meet the same fate as if they had travelled alone.
func (l *link) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		l.mu.Lock()
		l.shared++
		l.mu.Unlock()
		var sent []redis.Cmder
		for _, cmd := range cmds {
			if l.send(ctx, cmd) == nil {
				sent = append(sent, cmd)
			}
		}
		if len(sent) > 0 {
			_ = next(ctx, sent)
		}
		var first error
		for _, cmd := range cmds {
			err := cmd.Err()
			if slices.Contains(sent, cmd) {
				err = l.answer(ctx, cmd, err)
			}
			if first == nil {
				first = err
			}
		}
		return first
	}
}

// send returns why a command is not to be sent, if that is so.
func (l *link) send(ctx context.Context, cmd redis.Cmder) error {
	if !strings.HasPrefix(cmd.Name(), "eval") {
		return nil
	}
	l.mu.Lock()
	if !isCheck(cmd) {
		l.scripts++
	}
	before := l.before
	l.mu.Unlock()
	if before == nil {
		return nil
	}
	err := before(ctx, cmd)
	if errors.Is(err, lostReply()) {
		written(cmd)
	}
	if err != nil {
		cmd.SetErr(err)
	}
	return err
}

// answer returns the outcome of a command that was sent, or that its reply was lost.
func (l *link) answer(ctx context.Context, cmd redis.Cmder, err error) error {
	l.mu.Lock()
	after, latency := l.after, l.latency
	l.mu.Unlock()
	if latency > 0 && strings.HasPrefix(cmd.Name(), "eval") {
		pass(latency)
	}
	if after == nil || !strings.HasPrefix(cmd.Name(), "eval") || redis.HasErrorPrefix(err, "NOSCRIPT") {
		return err
	}
	cmd.SetErr(err) // the client does so later
	if lost := after(ctx, cmd); lost != nil {
		cmd.SetErr(lost)
		return lost
	}
	return err
}

type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

func (l *link) through(dial dialer) dialer {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		l.mu.Lock()
		down, delay := l.down, l.delay
		l.mu.Unlock()
		pass(delay)
		if down {
			return nil, &net.OpError{Op: "dial", Net: network, Err: io.ErrClosedPipe}
		}
		conn, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		l.mu.Lock()
		defer l.mu.Unlock()
		l.dialed++
		lc := &linkConn{Conn: conn, link: l, number: l.dialed}
		if l.conns == nil {
			l.conns = make(map[*linkConn]struct{})
		}
		l.conns[lc] = struct{}{}
		return lc, nil
	}
}

// setDown refuses new connections, or lets them through again.
func (l *link) setDown(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
}

// setDelay makes new connections take this long.
func (l *link) setDelay(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.delay = d
}

// setLag makes whatever the server sends take this long.
func (l *link) setLag(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lag = d
}

func (l *link) lagging() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lag
}

// cut closes the connections that match.
func (l *link) cut(match func(*linkConn) bool) {
	for _, c := range l.matching(match) {
		_ = c.Close()
	}
}

// mute makes the connections that match lose what the server sends, without an error.
func (l *link) mute(match func(*linkConn) bool) {
	for _, c := range l.matching(match) {
		c.mu.Lock()
		c.muted = true
		c.mu.Unlock()
	}
}

// swallow makes the connections that match lose whatever is sent, both ways, without an error.
func (l *link) swallow(match func(*linkConn) bool) {
	l.mute(match)
	for _, c := range l.matching(match) {
		c.mu.Lock()
		c.swallows = true
		c.mu.Unlock()
	}
}

// dials returns how many connections were dialed so far.
func (l *link) dials() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dialed
}

// holdUp makes the connections that match keep what the server sends to themselves, until the
// returned function is called.
func (l *link) holdUp(match func(*linkConn) bool) (resume func()) {
	gate := make(chan struct{})
	for _, c := range l.matching(match) {
		c.mu.Lock()
		c.heldUp = gate
		c.mu.Unlock()
	}
	return func() { close(gate) }
}

// A kept is what one write sent, on its way.
type kept struct {
	conn net.Conn // nil before the write
	data []byte
}

// keepBack makes the next script that is sent arrive only when the returned function is called.
func (l *link) keepBack() (deliver func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	k := new(kept)
	l.kept = k
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		_, _ = k.conn.Write(k.data)
	}
}

// keeps takes what a connection sends, if it is to be kept back.
func (l *link) keeps(conn net.Conn, b []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.kept == nil || !strings.Contains(string(b), "\r\neval") {
		return false
	}
	*l.kept = kept{conn, slices.Clone(b)}
	l.kept = nil
	return true
}

func (l *link) matching(match func(*linkConn) bool) []*linkConn {
	l.mu.Lock()
	defer l.mu.Unlock()
	var found []*linkConn
	for c := range l.conns {
		if match(c) {
			found = append(found, c)
		}
	}
	return found
}

// isSubscriber matches the connections that have subscribed.
func isSubscriber(c *linkConn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subscribed
}

type linkConn struct {
	net.Conn

	link   *link
	number int // in the order in which they were dialed

	mu         sync.Mutex // guards what follows
	subscribed bool
	muted      bool
	swallows   bool
	heldUp     chan struct{} // closed by the test; nil: it is not
}

func (c *linkConn) Write(b []byte) (int, error) {
	if strings.Contains(string(b), "\r\nsubscribe\r\n") {
		c.mu.Lock()
		c.subscribed = true
		c.mu.Unlock()
		c.link.mu.Lock()
		c.link.ears++
		c.link.mu.Unlock()
	}
	c.mu.Lock()
	swallows := c.swallows
	c.mu.Unlock()
	if swallows || c.link.keeps(c.Conn, b) {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

func (c *linkConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		c.mu.Lock()
		muted, heldUp := c.muted, c.heldUp
		c.mu.Unlock()
		pass(c.link.lagging())
		if heldUp != nil {
			<-heldUp
		}
		if err != nil || !muted {
			return n, err
		}
	}
}

func (c *linkConn) Close() error {
	c.link.mu.Lock()
	delete(c.link.conns, c)
	c.link.mu.Unlock()
	return c.Conn.Close()
}

// acquired is what a WaitAcquire in the background brought.
type acquired struct {
	lease *redfour.Lease
	err   error
	after time.Duration
}

// waitFor starts a WaitAcquire. In a bubble, follow it with synctest.Wait.
func waitFor(ctx context.Context, l *redfour.Lock, id string, ttl time.Duration) <-chan acquired {
	c := make(chan acquired, 1) // the one result; the test may not take it
	start := time.Now()
	go func() {
		lease, err := l.WaitAcquire(ctx, id, ttl)
		c <- acquired{lease, err, time.Since(start)}
	}()
	return c
}

func mustAcquire(t *testing.T, l *redfour.Lock, id string, ttl time.Duration) *redfour.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), id, ttl)
	require.NoError(t, err)
	return lease
}

// counted is how much of a ttl counts for the deadline of a lease: all but the margin for
// clocks that differ in rate.
func counted(ttl time.Duration) time.Duration { return ttl - max(ttl/1000, time.Millisecond) }

// enough bounds everything that is to happen in a moment. A test that passes does
// not wait that long; it is shorter than the looks that waiters take unasked.
const enough = 20 * time.Second

// eventually is for what the server knows, and tells nobody by itself.
func eventually(t *testing.T, cond func() bool, what string) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(enough); !cond(); <-tick.C {
		require.True(t, time.Now().Before(end), "still not: %s", what)
	}
}

// take returns what a channel brings.
func take[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	timer := time.NewTimer(enough)
	defer timer.Stop()
	select {
	case v := <-c:
		return v
	case <-timer.C:
		require.FailNow(t, "nothing came")
		panic("unreachable")
	}
}

// takeLease returns the lease that a waiter got.
func takeLease(t *testing.T, c <-chan acquired) *redfour.Lease {
	t.Helper()
	got := take(t, c)
	require.NoError(t, got.err)
	return got.lease
}
