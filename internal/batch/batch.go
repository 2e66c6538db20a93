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
	"sync/atomic"
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

	// stuck is after how long without an answer another batch is sent all the same: those under
	// way may be on connections that have died.
	stuck = 100 * time.Millisecond

	// parked is how many goroutines are kept for the next commands. A new one costs more than the wait for it.
	parked = 2
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

	mu      sync.Mutex // guards what follows
	queue   []*Call    // not sent yet
	working int        // goroutines that are not parked
	idle    int        // goroutines that are
	wake    sync.Cond  // on mu; signalled when one that was idle is counted as working
	ended   bool       // none is to park any more
	last    time.Time  // when a batch was last sent or answered
}

// New returns a Batcher whose goroutines belong to the given crew. A command that has found no connection after
// limit is not sent. The values of ctx are those of commands that travel together; one that travels
// alone has the ctx of its caller. The Batcher keeps some goroutines until End.
func New(ctx context.Context, client Client, c *crew.Crew, limit time.Duration) *Batcher {
	b := &Batcher{client: client, crew: c, life: context.WithoutCancel(ctx), limit: limit}
	b.wake.L = &b.mu
	return b
}

// A Call is a command that is to be sent, or was.
type Call struct {
	Cmd redis.Cmder // its result may be read when Done is closed

	ctx   context.Context //nolint:containedctx // The caller's, for as long as the command is under way.
	state atomic.Int32    // a callState
	sent  time.Time
	done  chan struct{} // closed when Cmd has its result, or will not be sent
}

type callState = int32

const (
	waiting   callState = iota // for its turn to be sent
	underWay                   // sent, or about to be
	withdrawn                  // never sent
)

// NewCall prepares a call of cmd. While it travels alone, ctx bounds how long it waits for a connection.
func NewCall(ctx context.Context, cmd redis.Cmder) *Call {
	return &Call{Cmd: cmd, ctx: ctx, done: make(chan struct{})}
}

// Again prepares a call of another command for the same caller.
func (c *Call) Again(cmd redis.Cmder) *Call { return NewCall(c.ctx, cmd) }

// Done returns a channel that is closed when the result is there.
func (c *Call) Done() <-chan struct{} { return c.done }

// Sent returns a time just before the command was sent. It may be called when Done is closed.
func (c *Call) Sent() time.Time { return c.sent }

// Withdraw keeps a command from being sent. It returns false if it is too late for that.
func (c *Call) Withdraw() bool {
	if !c.state.CompareAndSwap(waiting, withdrawn) {
		return false
	}
	close(c.done)
	return true
}

// Send sends the command of c now or soon, and does not wait for that.
func (b *Batcher) Send(c *Call) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.queue = append(b.queue, c)
	if b.working >= abreast && time.Since(b.last) < stuck {
		return // Whoever is back first takes it along.
	}
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
	b.working += b.idle
	b.idle = 0
	b.wake.Broadcast()
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
		if b.ended || b.idle == parked {
			return nil
		}
		b.idle++
		b.wake.Wait()
	}
}

// takeLocked takes what travels in one batch from the queue.
func (b *Batcher) takeLocked() (calls []*Call) {
	b.last = time.Now()
	calls = make([]*Call, 0, min(len(b.queue), most))
	n := 0
	for ; n < len(b.queue) && len(calls) < most; n++ {
		if c := b.queue[n]; c.state.CompareAndSwap(waiting, underWay) {
			c.sent = b.last
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
			close(c.done)
		}
	}()
	if len(calls) == 1 {
		ctx, cancel := context.WithTimeout(calls[0].ctx, b.limit)
		defer cancel()
		_ = b.client.Process(ctx, calls[0].Cmd)
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
