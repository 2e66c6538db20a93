// Package batch lets commands that are ready at the same time share a round trip.
//
// A command is sent at once while few round trips are under way. Beyond that, what comes is collected, and
// travels in one pipeline as soon as one of them is back. So a caller who is alone waits for nobody, and many
// callers cost a fraction of the system calls. A batch is bounded, and so is the number of those under way;
// enough of them are that a slow network carries many commands at a time.
package batch

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/crew"
)

const (
	// most is how many commands travel in one pipeline. More gain nothing: by then the server is busy.
	most = 64

	// abreast is how many batches are under way while the server answers. It is fewer than the connections that
	// go-redis keeps for pipelines.
	abreast = 8

	// stuck is after how long without an answer the next command is sent all the same, with what waits: those under
	// way may be on connections that have died. Who comes last has to give up, and to come again.
	stuck = 100 * time.Millisecond

	// parked is how many goroutines are kept for the next commands. A new one costs more than the wait for it.
	parked = 2

	// restTime is for how long they are kept without work. It is short, so that a Batcher which was dropped without
	// End leaves nothing behind, and far more than callers in turn need for what they do in between.
	restTime = 500 * time.Millisecond
)

// ErrEnded is the error of commands whose goroutine was ended by a hook of the client.
var ErrEnded = errors.New("the call was ended by the client")

// A Client is what commands are sent through: each by itself or several in a pipeline.
type Client interface {
	Process(ctx context.Context, cmd redis.Cmder) error
	Pipeline() redis.Pipeliner
}

// A Batcher sends commands through a client. It is safe for concurrent use.
type Batcher struct {
	client Client
	crew   *crew.Crew
	life   context.Context //nolint:containedctx // Of all batches: they belong to no single caller.
	limit  time.Duration
	sent   func(commands int)

	mu      sync.Mutex  // guards what follows
	queue   []*Call     // not sent yet
	working int         // goroutines that are not parked
	idle    int         // goroutines that are
	wake    sync.Cond   // on mu; signalled when one that was idle is counted as working
	ended   bool        // none is to park any more
	leaving int         // goroutines that were parked for long enough, and are to end
	rest    *time.Timer // looks after those that are parked; nil before the first
	watched bool        // it will
	last    time.Time   // when a batch was last answered, sent or begun
}

// New returns a Batcher whose goroutines belong to the given crew. Commands that travel together, and have found no
// connection after limit, are not sent; one that travels alone, when it is given up. The values of ctx are those of
// commands that travel together. The Batcher keeps some goroutines for half a second without work at most, or until
// End. It calls sent before each round trip, with how many commands share it.
func New(ctx context.Context, client Client, c *crew.Crew, limit time.Duration, sent func(commands int)) *Batcher {
	b := &Batcher{client: client, crew: c, life: context.WithoutCancel(ctx), limit: limit, sent: sent}
	b.wake.L = &b.mu
	return b
}

// A Call is a command that is to be sent, or was. The zero Call is made ready by Init.
//
// It is the context of a command that travels alone, and has the values of its caller's. It ends when the call is given
// up, so that nobody waits for a connection on behalf of a caller who has left.
type Call struct {
	Cmd redis.Cmder // its result may be read when Ready is closed

	ctx   context.Context //nolint:containedctx // The caller's, for as long as the command is under way.
	ready chan struct{}   // closed when Cmd has its result, or will not be sent
	sent  time.Time

	mu    sync.Mutex // guards what follows
	state callState
	left  chan struct{} // closed when the call is given up; nil before somebody asks for it
}

type callState int

const (
	waiting  callState = iota // for its turn to be sent
	underWay                  // sent, or about to be
	givenUp                   // by its caller
)

// Init prepares a call of cmd on behalf of a caller with this ctx, of which it uses the values only: it
// is for the caller to give up when ctx ends.
func (c *Call) Init(ctx context.Context, cmd redis.Cmder) {
	c.Cmd, c.ctx, c.ready = cmd, ctx, make(chan struct{})
}

// Caller returns the ctx of the caller.
func (c *Call) Caller() context.Context { return c.ctx }

// Ready returns a channel that is closed when the result is there.
func (c *Call) Ready() <-chan struct{} { return c.ready }

// Sent returns a time just before the command was sent. It may be called when Ready is closed.
func (c *Call) Sent() time.Time { return c.sent }

// GiveUp says that nobody waits for the result any longer. It returns true if that keeps the command from being
// sent. Otherwise Ready is still closed when the result is there.
func (c *Call) GiveUp() (unsent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	unsent = c.state == waiting
	if unsent {
		close(c.ready)
	}
	if c.left != nil && c.state != givenUp {
		close(c.left)
	}
	c.state = givenUp
	return unsent
}

// take tells whether the call is to be sent. From now on it is on its way.
func (c *Call) take(now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != waiting {
		return false
	}
	c.state, c.sent = underWay, now
	return true
}

// Done is that of a context.
func (c *Call) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left == nil {
		c.left = make(chan struct{})
		if c.state == givenUp {
			close(c.left)
		}
	}
	return c.left
}

// Err is that of a context.
func (c *Call) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == givenUp {
		return context.Canceled
	}
	return nil
}

// Deadline is that of a context.
func (c *Call) Deadline() (deadline time.Time, ok bool) { return time.Time{}, false }

// Value is that of a context: the caller's.
func (c *Call) Value(key any) any { return c.ctx.Value(key) }

// Send sends the command of c now or soon, and does not wait for that.
func (b *Batcher) Send(c *Call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = append(b.queue, c)
	now := time.Now()
	if b.working >= abreast && now.Sub(b.last) < stuck {
		return // Whoever is back first takes it along.
	}
	b.last = now
	b.working++
	if b.idle == 0 {
		b.crew.Start(b.work)
		return
	}
	b.idle--
	b.wake.Signal()
}

// End lets the goroutines go that wait for commands. Commands can still be sent.
func (b *Batcher) End() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended = true
	b.dismissLocked()
}

// Rests reports whether there is no goroutine: nothing was sent for a while, or nothing yet.
func (b *Batcher) Rests() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.working+b.idle == 0
}

// dismissLocked wakes the goroutines that are parked, for which there is no work.
func (b *Batcher) dismissLocked() {
	b.leaving = b.idle
	b.working += b.idle
	b.idle = 0
	b.wake.Broadcast()
}

// parkLocked waits for commands.
func (b *Batcher) parkLocked() {
	b.idle++
	switch {
	case b.watched:
	case b.rest == nil:
		b.rest = time.AfterFunc(restTime, b.lookAfter)
	default:
		b.rest.Reset(restTime)
	}
	b.watched = true
	b.wake.Wait()
}

// lookAfter dismisses the goroutines that are parked, unless there was something to send meanwhile.
func (b *Batcher) lookAfter() {
	b.mu.Lock()
	defer b.mu.Unlock()
	left := restTime - time.Since(b.last)
	b.watched = b.working+b.idle > 0 && left > 0
	if b.watched {
		b.rest.Reset(left)
		return
	}
	b.dismissLocked()
}

// work sends what is to be sent, until nothing is and enough others wait for it.
func (b *Batcher) work() {
	ended := true // by a hook of the client, unless it is said below
	defer func() {
		if ended {
			b.replace()
		}
	}()
	for several := false; ; {
		if several {
			// Those who have just been answered run first, and may have more to send.
			runtime.Gosched()
		}
		calls := b.take()
		if calls == nil {
			ended = false
			return
		}
		b.exec(calls)
		several = len(calls) > 1
	}
}

// replace does what a goroutine would have done next that a hook has ended.
func (b *Batcher) replace() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queue) > 0 {
		b.crew.Start(b.work)
	} else {
		b.working--
	}
}

// take returns the commands that are to travel next, and waits for some where there are none. It returns nil if enough
// others wait for them.
func (b *Batcher) take() []*Call {
	b.mu.Lock()
	defer b.mu.Unlock()
	for {
		if calls := b.takeLocked(); len(calls) > 0 {
			return calls
		}
		b.working--
		if b.ended || b.leaving > 0 || b.idle == parked {
			b.leaving = max(0, b.leaving-1)
			return nil
		}
		b.parkLocked()
	}
}

// takeLocked takes what travels in one batch from the queue.
func (b *Batcher) takeLocked() (calls []*Call) {
	b.last = time.Now()
	calls = make([]*Call, 0, min(len(b.queue), most))
	n := 0
	for ; n < len(b.queue) && len(calls) < most; n++ {
		if c := b.queue[n]; c.take(b.last) {
			calls = append(calls, c)
		}
	}
	left := copy(b.queue, b.queue[n:])
	clear(b.queue[left:]) // nobody else frees them
	b.queue = b.queue[:left]
	return calls
}

// exec sends commands, and returns when all have their results.
func (b *Batcher) exec(calls []*Call) {
	ended := true // by a hook of the client, unless it is said below
	defer func() {
		for _, c := range calls {
			if ended {
				c.Cmd.SetErr(ErrEnded)
			}
			close(c.ready)
		}
	}()
	b.sent(len(calls))
	if len(calls) == 1 {
		_ = b.client.Process(calls[0], calls[0].Cmd)
		ended = false
		return
	}
	ctx, cancel := context.WithTimeout(b.life, b.limit)
	defer cancel()
	p := b.client.Pipeline()
	for _, c := range calls {
		_ = p.Process(ctx, c.Cmd)
	}
	cmds, err := p.Exec(ctx)
	ended = false
	if err == nil {
		return
	}
	for _, cmd := range cmds {
		if cmd.Err() != nil {
			return // Each command has the error that is its own.
		}
	}
	for _, cmd := range cmds { // A hook has refused them all.
		cmd.SetErr(err)
	}
}
