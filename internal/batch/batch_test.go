package batch_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/alicebob/miniredis/v2"
	"github.com/alicebob/miniredis/v2/server"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour/internal/batch"
	"github.com/redfour-go/redfour/internal/crew"
)

const (
	abreast = 8  // batches that are under way at a time
	most    = 64 // commands of a batch
	stuck   = 100 * time.Millisecond
	limit   = 10 * time.Second // for finding a connection
)

func TestMain(m *testing.M) {
	logging.Disable() // go-redis reports every connection that the tests break
	m.Run()
}

// bubble runs f with a Batcher whose round trips end as the test says. What is
// left over of its goroutines fails the test.
func bubble(t *testing.T, f func(t *testing.T, b *batch.Batcher, way *link)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		way := newLink()
		b := newBatcher(t, new(crew.Crew), unreachable, way)
		t.Cleanup(way.open)
		f(t, b, way)
	})
}

// newBatcher makes a Batcher with a client of its own.
func newBatcher(t *testing.T, c *crew.Crew, dial dialer, hooks ...redis.Hook) *batch.Batcher {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", PoolSize: 1000, MaxRetries: 3, Dialer: dial})
	for _, h := range hooks {
		client.AddHook(h)
	}
	b := batch.New(context.WithValue(t.Context(), whose{}, "everybody"), client, c, limit, func(int) {})
	t.Cleanup(func() {
		b.End()
		pass(time.Minute) // The client's own dialing has a bound of its own.
		require.True(t, closed(c.Idle()), "goroutines are left over")
		_ = client.Close()
	})
	return b
}

type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// unreachable finds no connection for as long as it is asked to.
func unreachable(ctx context.Context, _, _ string) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// whose is the key of a context's value.
type whose struct{}

// pass lets time go by. It is for bubbles, where that takes none.
func pass(d time.Duration) { <-time.After(d) }

// A hook meets all round trips of a client: it gives the commands their results, or lets next do so.
type hook func(ctx context.Context, alone bool, cmds []redis.Cmder, next func() error) error

func (h hook) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h hook) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		return h(ctx, true, []redis.Cmder{cmd}, func() error { return next(ctx, cmd) })
	}
}

func (h hook) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		return h(ctx, false, cmds, func() error { return next(ctx, cmds) })
	}
}

// A link is a client's way to its server. It holds every round trip until the test says how it ends.
type link struct {
	over chan struct{} // closed when nothing is held any more

	mu   sync.Mutex // guards what follows
	sent []*trip
}

func newLink() *link { return &link{over: make(chan struct{})} }

// open lets pass what is held, and what may come.
func (l *link) open() { close(l.over) }

func (l *link) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *link) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return hook(l.travel).ProcessHook(next)
}

func (l *link) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return hook(l.travel).ProcessPipelineHook(next)
}

// travel ends as the test says, or with ctx like a client that finds no connection.
func (l *link) travel(ctx context.Context, alone bool, cmds []redis.Cmder, next func() error) error {
	if name := cmds[0].Name(); name == "hello" || name == "client" {
		return next() // go-redis greets the server
	}
	tr := &trip{alone: alone, whose: ctx.Value(whose{}), began: time.Now(), end: make(chan fate, 1)}
	for _, cmd := range cmds {
		tr.words = append(tr.words, word(cmd))
	}
	l.mu.Lock()
	l.sent = append(l.sent, tr)
	l.mu.Unlock()
	select {
	case end := <-tr.end:
		return end(cmds, next)
	case <-ctx.Done():
		return ctx.Err()
	case <-l.over:
		return answered(cmds, next)
	}
}

// trips returns the round trips so far, when all that can begin has begun.
func (l *link) trips() []*trip {
	synctest.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.sent)
}

// A trip is a round trip.
type trip struct {
	alone bool     // the command is in no pipeline
	words []string // of the commands
	whose any      // the context
	began time.Time
	end   chan fate // the test sends how the trip ends, once, and does not wait
}

// A fate is how a round trip ends.
type fate func(cmds []redis.Cmder, next func() error) error

// answered gives each command its word.
func answered(cmds []redis.Cmder, _ func() error) error {
	for _, cmd := range cmds {
		if c, ok := cmd.(*redis.Cmd); ok {
			c.SetVal(word(c))
		}
	}
	return nil
}

// delivered leaves it to the server.
func delivered(_ []redis.Cmder, next func() error) error { return next() }

// ended is a hook that is not to return, for example because it calls t.FailNow.
func ended([]redis.Cmder, func() error) error {
	runtime.Goexit()
	return nil
}

// refused is a hook that lets nothing pass.
func refused(err error) fate { return func([]redis.Cmder, func() error) error { return err } }

func word(cmd redis.Cmder) string { return fmt.Sprint(cmd.Args()[1]) }

// echo prepares the call of a command that is answered with its word.
func echo(ctx context.Context, word string) *batch.Call {
	return prepare(ctx, redis.NewCmd(ctx, "echo", word))
}

func prepare(ctx context.Context, cmd redis.Cmder) *batch.Call {
	c := new(batch.Call)
	c.Init(ctx, cmd)
	return c
}

// send sends a command for each word.
func send(ctx context.Context, b *batch.Batcher, words ...string) (calls []*batch.Call) {
	for _, w := range words {
		c := echo(ctx, w)
		b.Send(c)
		calls = append(calls, c)
	}
	return calls
}

// busy has as many round trips under way as there may be, each of one command.
func busy(t *testing.T, b *batch.Batcher, way *link) (calls []*batch.Call) {
	t.Helper()
	for i := range abreast {
		calls = append(calls, send(t.Context(), b, fmt.Sprint("busy ", i))...)
		require.Len(t, way.trips(), i+1, "at once")
	}
	return calls
}

// numbers returns n words.
func numbers(n int) (words []string) {
	for i := range n {
		words = append(words, strconv.Itoa(i))
	}
	return words
}

// reply waits for the result of a call.
func reply(c *batch.Call) (string, error) {
	select {
	case <-c.Ready():
	case <-time.After(time.Hour):
		return "", errors.New("no result")
	}
	cmd, ok := c.Cmd.(interface{ Text() (string, error) })
	if !ok {
		return "", fmt.Errorf("%T has no text", c.Cmd)
	}
	return cmd.Text()
}

// requireEchoes waits for commands that were answered with their own words.
func requireEchoes(t *testing.T, calls []*batch.Call) {
	t.Helper()
	for _, c := range calls {
		text, err := reply(c)
		require.NoError(t, err)
		require.Equal(t, word(c.Cmd), text)
	}
}

// requirePending says that commands have no results yet.
func requirePending(t *testing.T, calls []*batch.Call) {
	t.Helper()
	synctest.Wait()
	for _, c := range calls {
		require.False(t, closed(c.Ready()), word(c.Cmd))
	}
}

func TestSend_whoIsAloneGoesAtOnceWithHisContext(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		start := time.Now()
		mine := context.WithValue(t.Context(), whose{}, "mine")
		calls := send(mine, b, "a")
		trips := way.trips()
		require.Len(t, trips, 1)
		require.True(t, trips[0].alone)
		require.Equal(t, "mine", trips[0].whose)
		requirePending(t, calls)
		trips[0].end <- answered
		requireEchoes(t, calls)
		require.Zero(t, time.Since(start))
		require.Equal(t, mine, calls[0].Caller())
	})
}

// Those who come later must not wait for whoever happened to be first, and is gone.
func TestSend_aBatchBelongsToNoCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		way, c := newLink(), new(crew.Crew)
		client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", Dialer: unreachable})
		client.AddHook(way)
		life, end := context.WithCancel(context.WithValue(t.Context(), whose{}, "everybody"))
		b := batch.New(life, client, c, limit, func(int) {})
		busy(t, b, way)

		first, cancel := context.WithCancel(context.WithValue(t.Context(), whose{}, "mine"))
		calls := slices.Concat(send(first, b, "a"), send(t.Context(), b, "b"))
		way.trips()[0].end <- answered
		trips := way.trips()
		require.Equal(t, "everybody", trips[abreast].whose)
		cancel()
		require.False(t, calls[0].GiveUp())
		end()
		requirePending(t, calls)
		trips[abreast].end <- answered
		requireEchoes(t, calls)

		way.open()
		b.End()
		synctest.Wait()
		require.True(t, closed(c.Idle()))
		require.NoError(t, client.Close())
	})
}

func TestSend_whatComesMeanwhileTravelsTogetherInOrder(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		first := busy(t, b, way)
		calls := send(t.Context(), b, numbers(20)...)
		require.Len(t, way.trips(), abreast)
		start := time.Now()
		pass(50 * time.Millisecond)
		way.trips()[3].end <- answered
		requireEchoes(t, first[3:4])
		trips := way.trips()
		require.Len(t, trips, abreast+1)
		require.False(t, trips[abreast].alone)
		require.Equal(t, numbers(20), trips[abreast].words)
		require.Equal(t, 50*time.Millisecond, trips[abreast].began.Sub(start), "at once")
		requirePending(t, calls)
		trips[abreast].end <- answered
		requireEchoes(t, calls)
		require.Len(t, way.trips(), abreast+1)
	})
}

func TestSend_whoComesAloneMeanwhileIsInNoPipeline(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(context.WithValue(t.Context(), whose{}, "mine"), b, "a")
		way.trips()[0].end <- answered
		trips := way.trips()
		require.Len(t, trips, abreast+1)
		require.True(t, trips[abreast].alone)
		require.Equal(t, "mine", trips[abreast].whose)
		trips[abreast].end <- answered
		requireEchoes(t, calls)
	})
}

func TestSend_noMoreThan64TravelTogether(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(t.Context(), b, numbers(2*most+1)...)
		way.trips()[0].end <- answered
		require.Equal(t, numbers(2*most + 1)[:most], way.trips()[abreast].words)
		way.trips()[1].end <- answered
		require.Equal(t, numbers(2*most + 1)[most:2*most], way.trips()[abreast+1].words)
		require.Len(t, way.trips(), abreast+2)
		way.trips()[abreast].end <- answered
		trips := way.trips()
		require.Len(t, trips, abreast+3, "who is back takes along what is left")
		require.Equal(t, []string{"128"}, trips[abreast+2].words)
		trips[abreast+1].end <- answered
		trips[abreast+2].end <- answered
		requireEchoes(t, calls)
	})
}

func TestSend_eightAreUnderWayAndTheNinthWaits(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		first := busy(t, b, way)
		for i := range 3 * abreast { // Batches of two take the places of what was under way.
			pass(time.Millisecond)
			calls := send(t.Context(), b, "a", "b")
			require.Len(t, way.trips(), abreast+i, "eight are under way")
			way.trips()[i].end <- answered
			require.Len(t, way.trips(), abreast+i+1)
			first = append(first, calls...)
		}
		for _, tr := range way.trips()[3*abreast:] {
			tr.end <- answered
		}
		requireEchoes(t, first)

		// All are back, and there is room for eight again.
		sent := len(way.trips())
		for i := range abreast {
			send(t.Context(), b, "c")
			require.Len(t, way.trips(), sent+i+1)
		}
		send(t.Context(), b, "d")
		require.Len(t, way.trips(), sent+abreast)
	})
}

func TestSend_whenAllAreStuckFor100msAnotherIsSent(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		send(t.Context(), b, "0")
		pass(stuck - 1)
		send(t.Context(), b, "1")
		require.Len(t, way.trips(), abreast)
		pass(1)
		send(t.Context(), b, "2")
		trips := way.trips()
		require.Len(t, trips, abreast+1)
		require.Equal(t, numbers(3), trips[abreast].words)

		// That one may be stuck as well, or be answered.
		pass(stuck - 1)
		send(t.Context(), b, "3")
		require.Len(t, way.trips(), abreast+1)
		pass(1)
		send(t.Context(), b, "4")
		trips = way.trips()
		require.Len(t, trips, abreast+2)
		require.Equal(t, []string{"3", "4"}, trips[abreast+1].words)
		calls := send(t.Context(), b, "5")
		require.Len(t, way.trips(), abreast+2)
		trips[abreast+1].end <- answered
		way.trips()[abreast+2].end <- answered
		requireEchoes(t, calls)
	})
}

// Nothing is stuck when nothing was under way.
func TestSend_aBurstAfterAPauseIsBoundedAsWell(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		for range 2 { // the first ever, and one after a pause
			sent := len(way.trips())
			calls := send(t.Context(), b, numbers(2000)...)
			require.LessOrEqual(t, len(way.trips())-sent, abreast)
			for n := sent; n < len(way.trips()); n++ {
				way.trips()[n].end <- answered
			}
			requireEchoes(t, calls)
			pass(stuck)
		}
	})
}

// All are stuck, and one other is sent: not one for each that comes before it has left.
func TestSend_whenAllAreStuckNoMoreThanOneOtherIsSent(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		pass(stuck)
		send(t.Context(), b, numbers(2000)...)
		require.Len(t, way.trips(), abreast+1)
	})
}

func TestSend_whileOneIsAnsweredNothingIsStuck(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		for i := range 5 {
			pass(stuck - 1)
			send(t.Context(), b, "a")
			require.Len(t, way.trips(), abreast+i)
			way.trips()[i].end <- answered
			require.Len(t, way.trips(), abreast+i+1)
		}
	})
}

// A failing server answers one of several, and says of another why it does not.
func TestSend_eachHasItsOwnResultAndItsOwnError(t *testing.T) {
	overMiniredis(t, func(t *testing.T, b *batch.Batcher, way *link, _ *miniredis.Miniredis) {
		busy(t, b, way)
		ctx := t.Context()
		calls := []*batch.Call{
			echo(ctx, "a"),
			prepare(ctx, redis.NewCmd(ctx, "set", "k", "v")),
			prepare(ctx, redis.NewCmd(ctx, "incr", "k")),
			prepare(ctx, redis.NewCmd(ctx, "get", "nothing")),
			echo(ctx, "b"),
		}
		for _, c := range calls {
			b.Send(c)
		}
		way.trips()[0].end <- answered
		way.trips()[abreast].end <- delivered
		var results []string
		for _, c := range calls {
			text, err := reply(c)
			results = append(results, fmt.Sprint(text, err))
		}
		require.Equal(t, []string{
			"a<nil>", "OK<nil>", "ERR value is not an integer or out of range", "redis: nil", "b<nil>",
		}, results)
		require.False(t, way.trips()[abreast].alone)
	})
}

func TestSend_aLostConnectionIsTheErrorOfThoseWithoutAnAnswer(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(t.Context(), b, "a", "b", "c", "d")
		way.trips()[0].end <- answered
		way.trips()[abreast].end <- func(cmds []redis.Cmder, next func() error) error {
			for _, cmd := range cmds[2:] {
				cmd.SetErr(io.EOF)
			}
			return errors.Join(answered(cmds[:2], next), io.ErrUnexpectedEOF)
		}
		requireEchoes(t, calls[:2])
		for _, c := range calls[2:] {
			_, err := reply(c)
			require.Equal(t, io.EOF, err)
		}
	})
}

// By itself go-redis makes it the error of those as well whose answer was a value.
func TestSend_aServerThatHangsUpIsAnErrorBesideThoseItHasSent(t *testing.T) {
	overMiniredis(t, func(t *testing.T, b *batch.Batcher, way *link, m *miniredis.Miniredis) {
		require.NoError(t, m.Set("k", "v"))
		busy(t, b, way)
		calls := []*batch.Call{
			prepare(t.Context(), single{redis.NewCmd(t.Context(), "incr", "k")}),
			onceOnly(t, "hang up"),
			onceOnly(t, "a"),
		}
		for _, c := range calls {
			b.Send(c)
		}
		way.trips()[0].end <- answered
		require.False(t, way.trips()[abreast].alone)
		way.trips()[abreast].end <- delivered
		_, err := reply(calls[0])
		require.EqualError(t, err, "ERR value is not an integer or out of range")
		for _, c := range calls[1:] {
			_, err := reply(c)
			require.ErrorIs(t, err, io.EOF)
		}
	})
}

// The server runs what it was sent, and hangs up. By itself go-redis sends it again.
func TestSend_whatMustNotBeRepeatedIsNot(t *testing.T) {
	run := func(call func(t *testing.T, word string) *batch.Call, words ...string) (runs string) {
		overMiniredis(t, func(t *testing.T, b *batch.Batcher, way *link, m *miniredis.Miniredis) {
			busy(t, b, way)
			var calls []*batch.Call
			for _, w := range words {
				c := call(t, w)
				b.Send(c)
				calls = append(calls, c)
			}
			way.trips()[0].end <- answered
			tr := way.trips()[abreast]
			require.Equal(t, len(words) == 1, tr.alone)
			tr.end <- delivered
			_, err := reply(calls[len(calls)-1])
			require.ErrorIs(t, err, io.EOF)
			runs, err = m.Get("runs of " + words[0])
			require.NoError(t, err)
		})
		return runs
	}
	repeatable := func(t *testing.T, word string) *batch.Call {
		t.Helper()
		return echo(t.Context(), word)
	}
	require.Equal(t, "1", run(onceOnly, "hang up"))
	require.Equal(t, "1", run(onceOnly, "a", "b", "hang up"))
	require.Equal(t, "4", run(repeatable, "hang up"))
	require.Equal(t, "4", run(repeatable, "a", "b", "hang up"))
}

// overMiniredis is bubble with a server. It counts how often it has run each echo, and hangs up when it is told so.
func overMiniredis(t *testing.T, f func(t *testing.T, b *batch.Batcher, way *link, m *miniredis.Miniredis)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := miniredis.NewMiniRedis()
		t.Cleanup(m.Close)
		way := newLink()
		b := newBatcher(t, new(crew.Crew), func(context.Context, string, string) (net.Conn, error) {
			conn, err := m.Dial()
			if err != nil {
				return nil, err
			}
			m.Server().SetPreHook(func(p *server.Peer, name string, args ...string) bool {
				if name != "ECHO" {
					return false
				}
				if _, err := m.Incr("runs of "+args[0], 1); err != nil {
					p.WriteError(err.Error())
					return true
				}
				if args[0] == "hang up" {
					pass(time.Millisecond) // until the client waits for the answer
					p.Close()
					return true
				}
				return false
			})
			return conn, nil
		}, way)
		t.Cleanup(way.open)
		f(t, b, way, m)
	})
}

// A single is a command that go-redis is not to repeat.
type single struct{ *redis.Cmd }

func (single) NoRetry() bool { return true }

func onceOnly(t *testing.T, word string) *batch.Call {
	t.Helper()
	return prepare(t.Context(), single{redis.NewCmd(t.Context(), "echo", word)})
}

func TestSend_aRefusedBatchIsRefusedToEach(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(t.Context(), b, "a", "b", "c")
		way.trips()[0].end <- answered
		no := errors.New("no")
		way.trips()[abreast].end <- refused(no)
		for _, c := range calls {
			_, err := reply(c)
			require.Equal(t, no, err)
		}
		calls = send(t.Context(), b, "d")
		way.trips()[abreast+1].end <- refused(no)
		_, err := reply(calls[0])
		require.Equal(t, no, err)
	})
}

func TestSend_anEndedGoroutineIsTheErrorOfItsCommandAlone(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		calls := busy(t, b, way)
		for i, c := range calls[1:] {
			way.trips()[1+i].end <- ended
			_, err := reply(c)
			require.Equal(t, batch.ErrEnded, err)
		}
		requirePending(t, calls[:1])

		// There is room for seven again, and no more.
		for i := 1; i < abreast; i++ {
			send(t.Context(), b, "a")
			require.Len(t, way.trips(), abreast+i)
		}
		later := send(t.Context(), b, "b", "c")
		require.Len(t, way.trips(), 2*abreast-1)
		way.trips()[0].end <- answered
		requireEchoes(t, calls[:1])
		way.trips()[2*abreast-1].end <- answered
		requireEchoes(t, later)
	})
}

func TestSend_anEndedGoroutineIsReplacedWhileCommandsWait(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		first := busy(t, b, way)
		waiting := send(t.Context(), b, numbers(most+2)...)
		for i := range first {
			way.trips()[i].end <- ended // All, so that nobody else comes back.
		}
		for _, c := range first {
			_, err := reply(c)
			require.Equal(t, batch.ErrEnded, err)
		}
		trips := way.trips()
		require.Len(t, trips, abreast+2)
		pipelines := trips[abreast:]
		slices.SortFunc(pipelines, func(a, b *trip) int { return len(b.words) - len(a.words) })
		require.Equal(t, numbers(most + 2)[:most], pipelines[0].words)
		require.Equal(t, numbers(most + 2)[most:], pipelines[1].words)

		pipelines[0].end <- ended
		for _, c := range waiting[:most] {
			_, err := reply(c)
			require.Equal(t, batch.ErrEnded, err)
		}
		requirePending(t, waiting[most:])
		pipelines[1].end <- answered
		requireEchoes(t, waiting[most:])

		calls := busyAgain(t, b, way)
		require.NotEmpty(t, calls)
	})
}

func TestGiveUp_beforeItsTurnIsInTime(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(t.Context(), b, numbers(4)...)
		for _, c := range []*batch.Call{calls[0], calls[2]} {
			require.True(t, c.GiveUp())
			require.True(t, closed(c.Ready()))
			require.NoError(t, c.Cmd.Err())
		}
		never := echo(t.Context(), "never")
		require.True(t, never.GiveUp())
		b.Send(never)
		way.trips()[0].end <- answered
		trips := way.trips()
		require.Equal(t, []string{"1", "3"}, trips[abreast].words)
		trips[abreast].end <- answered
		requireEchoes(t, []*batch.Call{calls[1], calls[3]})
	})
}

func TestGiveUp_whatIsUnderWayIsTooLate(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		first := busy(t, b, way)
		calls := send(t.Context(), b, "a", "b")
		require.False(t, first[0].GiveUp())
		way.trips()[0].end <- answered
		trips := way.trips()
		require.Len(t, trips, abreast+1)
		require.False(t, calls[1].GiveUp())
		requirePending(t, calls)
		trips[abreast].end <- answered
		requireEchoes(t, calls)
		require.False(t, calls[1].GiveUp())
		require.False(t, first[0].GiveUp())
	})
}

// They take no place in the batch, and the one who finds nothing else to send does not send an empty one.
func TestGiveUp_aQueueOfTheGivenUpIsDropped(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		first := busy(t, b, way)
		for _, c := range send(t.Context(), b, numbers(3*most)...) {
			require.True(t, c.GiveUp())
		}
		way.trips()[0].end <- answered
		requireEchoes(t, first[:1])
		require.Len(t, way.trips(), abreast)
		send(t.Context(), b, "there is room again")
		require.Len(t, way.trips(), abreast+1)

		for _, c := range send(t.Context(), b, numbers(3*most)...) {
			require.True(t, c.GiveUp())
		}
		calls := send(t.Context(), b, "a", "b")
		way.trips()[1].end <- answered
		trips := way.trips()
		require.Len(t, trips, abreast+2)
		require.Equal(t, []string{"a", "b"}, trips[abreast+1].words)
		trips[abreast+1].end <- answered
		requireEchoes(t, calls)
	})
}

// The others are served when the goroutine of one ends behind which nobody waits any longer.
func TestGiveUp_whatIsLeftByAnEndedGoroutineIsDropped(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		for _, c := range send(t.Context(), b, "a", "b") {
			require.True(t, c.GiveUp())
		}
		way.trips()[0].end <- ended
		require.Len(t, way.trips(), abreast)
		send(t.Context(), b, "there is room again")
		require.Len(t, way.trips(), abreast+1)
		send(t.Context(), b, "c")
		require.Len(t, way.trips(), abreast+1)
	})
}

func TestSend_aBatchThatFindsNoConnectionWithinTheLimitFails(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		calls := send(t.Context(), b, "a", "b")
		pass(limit / 2)
		start := time.Now()
		way.trips()[0].end <- answered
		way.trips()[abreast].end <- delivered
		pass(limit - 1)
		requirePending(t, calls)
		for _, c := range calls {
			_, err := reply(c)
			require.ErrorIs(t, err, context.DeadlineExceeded)
		}
		require.Equal(t, limit, time.Since(start), "counted from the turn of the batch")
	})
}

func TestGiveUp_whoIsAloneNeedsNoConnectionAnyMore(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		ctx, cancel := context.WithCancel(t.Context())
		calls := send(ctx, b, "a")
		way.trips()[0].end <- delivered
		cancel()
		requirePending(t, calls) // It is for the caller to say so.
		pass(time.Second)
		start := time.Now()
		require.False(t, calls[0].GiveUp())
		_, err := reply(calls[0])
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, time.Since(start))
	})
}

func TestCall_isAContextThatEndsWhenItIsGivenUp(t *testing.T) {
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), whose{}, "mine"))
	cancel()
	early, late := echo(ctx, "early"), echo(ctx, "late")
	require.False(t, closed(early.Done()))
	require.Equal(t, early.Done(), early.Done())
	for _, c := range []*batch.Call{early, late} {
		require.Equal(t, "mine", c.Value(whose{}))
		require.NoError(t, c.Err())
		_, ok := c.Deadline()
		require.False(t, ok)
		require.True(t, c.GiveUp())
		require.True(t, closed(c.Ready()))
		require.True(t, closed(c.Done()))
		require.Equal(t, context.Canceled, c.Err())
		c.GiveUp()
		require.True(t, closed(c.Done()))
	}
}

func TestEnd_nobodyWaitsForCommandsAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		way, c := newLink(), new(crew.Crew)
		b := newBatcher(t, c, unreachable, way)
		t.Cleanup(way.open)
		calls := busy(t, b, way)
		for _, tr := range way.trips() {
			tr.end <- answered
		}
		requireEchoes(t, calls)
		idle := c.Idle()
		synctest.Wait()
		require.False(t, closed(idle), "some are kept for the next commands")
		b.End()
		b.End()
		synctest.Wait()
		require.True(t, closed(idle))

		calls = busyAgain(t, b, way)
		calls = append(calls, send(t.Context(), b, "a", "b")...)
		b.End()
		for _, tr := range way.trips()[abreast:] {
			tr.end <- answered
		}
		last := way.trips()[2*abreast]
		require.Equal(t, []string{"a", "b"}, last.words)
		last.end <- answered
		requireEchoes(t, calls)
		synctest.Wait()
		require.True(t, closed(c.Idle()))
		b.End()
	})
}

// busyAgain is busy when none is under way, but some were.
func busyAgain(t *testing.T, b *batch.Batcher, way *link) (calls []*batch.Call) {
	t.Helper()
	sent := len(way.trips())
	for i := range abreast {
		calls = append(calls, send(t.Context(), b, fmt.Sprint("busy ", i))...)
		require.Len(t, way.trips(), sent+i+1, "at once")
	}
	waiting := send(t.Context(), b, "waiting")
	require.Len(t, way.trips(), sent+abreast)
	require.True(t, waiting[0].GiveUp())
	return calls
}

func closed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Nobody has to end a Batcher that is not used any more.
func TestSend_noGoroutineIsKeptForLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		way, c := newLink(), new(crew.Crew)
		b := newBatcher(t, c, unreachable, way)
		t.Cleanup(way.open)
		require.True(t, b.Rests())
		calls := busy(t, b, way)
		require.False(t, b.Rests())
		for _, tr := range way.trips() {
			tr.end <- answered
		}
		requireEchoes(t, calls)
		for trip := abreast; trip < abreast+10; trip++ {
			if trip == abreast+5 {
				<-time.After(time.Second)
				synctest.Wait()
				require.True(t, closed(c.Idle()))
				require.True(t, b.Rests())
			}
			call := send(t.Context(), b, "again")
			way.trips()[trip].end <- answered
			requireEchoes(t, call)
			<-time.After(400 * time.Millisecond)
			require.False(t, closed(c.Idle()), "some are kept while there is something to send now and then")
		}
		<-time.After(time.Second)
		synctest.Wait()
		require.True(t, b.Rests())
	})
}

func TestSend_whatWasSentIsNotKept(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		busy(t, b, way)
		var sent []weak.Pointer[batch.Call]
		for _, c := range send(t.Context(), b, numbers(most+6)...) {
			sent = append(sent, weak.Make(c))
		}
		way.trips()[0].end <- answered
		way.trips()[abreast].end <- answered
		require.Len(t, way.trips(), abreast+2)
		runtime.GC()
		for _, c := range sent[:most] {
			require.Nil(t, c.Value())
		}
		for _, c := range sent[most:] {
			require.NotNil(t, c.Value(), "they are under way")
		}
		way.trips()[abreast+1].end <- answered
		synctest.Wait()
		runtime.GC()
		for _, c := range sent {
			require.Nil(t, c.Value())
		}
	})
}

func TestSent_isJustBeforeTheCommandLeaves(t *testing.T) {
	bubble(t, func(t *testing.T, b *batch.Batcher, way *link) {
		early := echo(t.Context(), "early")
		pass(time.Millisecond)
		start := time.Now()
		b.Send(early)
		pass(time.Millisecond)
		way.trips()[0].end <- answered
		requireEchoes(t, []*batch.Call{early})
		require.Equal(t, start, early.Sent())
		require.Equal(t, start, way.trips()[0].began)

		first := busyAgain(t, b, way)
		calls := send(t.Context(), b, "a", "b")
		pass(50 * time.Millisecond)
		turn := time.Now()
		way.trips()[1].end <- answered
		trips := way.trips()
		pass(50 * time.Millisecond)
		trips[len(trips)-1].end <- answered
		requireEchoes(t, append(calls, first[0]))
		for _, c := range calls {
			require.Equal(t, turn, c.Sent())
		}
		require.Equal(t, turn, trips[len(trips)-1].began)
	})
}

func TestSend_manyAtOnceAreAllAnswered(t *testing.T) {
	const callers, times = 200, 50
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		underWay, largest := 0, 0
		runs := make(map[string]int)
		b := newBatcher(t, new(crew.Crew), unreachable, hook(
			func(_ context.Context, alone bool, cmds []redis.Cmder, next func() error) error {
				mu.Lock()
				underWay++
				largest = max(largest, underWay)
				for _, cmd := range cmds {
					runs[word(cmd)]++
				}
				mu.Unlock()
				defer func() {
					mu.Lock()
					defer mu.Unlock()
					underWay--
				}()
				if alone == (len(cmds) > 1) || len(cmds) > most {
					return fmt.Errorf("%d commands travel together", len(cmds))
				}
				pass(rand.N(stuck))
				return answered(cmds, next)
			}))
		requireEchoes(t, send(t.Context(), b, "the first"))
		var wg sync.WaitGroup
		var dropped atomic.Int64
		for i := range callers {
			wg.Go(func() {
				for j := range times {
					c := echo(t.Context(), fmt.Sprint(i, "/", j))
					b.Send(c)
					if rand.N(4) == 0 {
						pass(rand.N(stuck))
						if c.GiveUp() {
							dropped.Add(1)
							continue
						}
					}
					text, err := reply(c)
					if err != nil || text != word(c.Cmd) {
						t.Errorf("%s: %q, %v", word(c.Cmd), text, err)
					}
				}
			})
		}
		wg.Wait()
		mu.Lock()
		defer mu.Unlock()
		require.Len(t, runs, 1+callers*times-int(dropped.Load()))
		for w, n := range runs {
			require.Equal(t, 1, n, w)
		}
		require.NotZero(t, dropped.Load())
		require.Equal(t, abreast, largest)
	})
}

func BenchmarkBatcher(b *testing.B) {
	for _, callers := range []int{1, 16, 256} {
		b.Run(fmt.Sprint("callers=", callers), func(b *testing.B) {
			var trips, ops atomic.Int64
			client := redis.NewClient(new(redis.Options))
			client.AddHook(hook(func(_ context.Context, _ bool, cmds []redis.Cmder, next func() error) error {
				trips.Add(1)
				return answered(cmds, next)
			}))
			goroutines := new(crew.Crew)
			batcher := batch.New(b.Context(), client, goroutines, limit, func(int) {})
			var wg sync.WaitGroup
			b.ReportAllocs()
			b.ResetTimer()
			for range callers {
				wg.Go(func() {
					for ops.Add(1) <= int64(b.N) {
						c := echo(b.Context(), "a")
						batcher.Send(c)
						<-c.Ready()
					}
				})
			}
			wg.Wait()
			b.StopTimer()
			b.ReportMetric(float64(trips.Load())/float64(b.N), "trips/op")
			batcher.End()
			<-goroutines.Idle()
			if err := client.Close(); err != nil {
				b.Error(err)
			}
		})
	}
}
