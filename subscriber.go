package redfour

import (
	"context"
	"errors"
	mathrand "math/rand/v2"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/crew"
)

// How the waiting is paced.
const (
	longestLook   = 30 * time.Second        // a waiting id looks at its lock at least this often
	lookJitter    = 10 * time.Millisecond   // spreads the looks of many processes at an expiry
	abreast       = 256                     // so many ids look at the same time: each needs a goroutine for it
	lookSpread    = 50 * time.Microsecond   // for each id that is to look after a resubscription
	shortestRetry = 50 * time.Millisecond   // after an attempt that failed
	longestRetry  = 2 * time.Second         // the same, after many
	idleTime      = 10 * time.Second        // the subscription outlives its last waiter by this
	pingEvery     = time.Second             // an otherwise silent subscription is checked this often
	silenceLimit  = 2500 * time.Millisecond // and is dead after this, which is more than two pings
	connectTime   = 5 * time.Second         // for connecting and subscribing
	resubscribe   = time.Second             // the longest pause between two tries to subscribe
	deniedPause   = 30 * time.Second        // the same, where the user may not subscribe
	steadyTime    = 10 * time.Second        // a subscription that lived so long is replaced quickly
)

// A subscriber makes the callers of WaitAcquire wait, in lines (line.go), and hears what wakes
// them: releases, grants, and that the subscription stands (again).
//
// A line is registered before its first look, so that no release falls between the look
// and the wait: if the subscription stood, its message wakes the line; if not,
// the confirmation of the subscription does.
type subscriber struct {
	server *server
	crew   *crew.Crew
	life   context.Context //nolint:containedctx // The Lock's own life, no request's.

	mu      sync.Mutex       // guards what follows, and every line
	lines   map[string]*line // by id
	backlog []look           // by lines that wait for their turn
	looking int              // goroutines that make attempts
	entries int              // made so far
	claimed int64            // the highest index of a lease that anybody here was given; observe may have left it out
	ear     *ear             // the subscription; nil if there is none
	idle    *time.Timer      // closes the ear after the last line has gone; nil before the first
}

func newSubscriber(life context.Context, s *server, c *crew.Crew) *subscriber {
	return &subscriber{server: s, crew: c, life: life, lines: make(map[string]*line)}
}

// idleLocked is called when the last line has gone.
func (s *subscriber) idleLocked() {
	if s.ear == nil || s.life.Err() != nil {
		return
	}
	if s.idle == nil {
		s.idle = time.AfterFunc(idleTime, s.rest)
	} else {
		s.idle.Reset(idleTime)
	}
}

// rest closes the subscription if there is still nobody to wait for. The lines have left the queue
// before they went, so nothing is lost with it.
func (s *subscriber) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines) == 0 && s.ear != nil {
		s.ear.close()
		s.ear = nil
	}
}

// end makes every line clear up, now that life has ended.
func (s *subscriber) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, ln := range s.lines {
		s.clearLocked(ln)
	}
	if s.idle != nil {
		s.idle.Stop()
	}
}

// wakeAll makes every line look, but not all in the same moment.
func (s *subscriber) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	spread := time.Duration(len(s.lines)) * lookSpread
	for _, ln := range s.lines {
		if ln.trying {
			s.wakeLocked(ln, false)
		} else if pause := mathrand.N(spread); pause < time.Until(ln.due) {
			s.lookInLocked(ln, pause)
		}
	}
}

// An ear is the one subscription of a Lock, and the goroutine that keeps it up.
type ear struct {
	close context.CancelFunc
	hears bool // grants: the inbox is confirmed. Guarded by subscriber.mu
}

// hearsLocked tells whether the member can be granted a lock.
func (s *subscriber) hearsLocked() bool { return s.ear != nil && s.ear.hears && s.server.mayQueue() }

// listenLocked sees to it that there is a subscription, now or soon. When it is
// confirmed, it wakes everybody, so nobody has to wait for it.
func (s *subscriber) listenLocked() {
	if s.ear != nil {
		return
	}
	ctx, cancel := context.WithCancel(s.life)
	e := &ear{close: cancel}
	s.ear = e
	s.crew.Start(func() { s.listen(ctx, e) })
}

// listenAnewLocked replaces the subscription.
func (s *subscriber) listenAnewLocked() {
	if s.ear != nil {
		s.ear.close()
		s.ear = nil
	}
	s.listenLocked()
}

func (s *subscriber) listen(ctx context.Context, e *ear) {
	refused := false
	for pauses := (backoff{min: shortestRetry, max: resubscribe}); ctx.Err() == nil; {
		channels := []string{s.server.names.releases(), s.server.names.census(), s.server.inbox()}
		if refused || !s.server.mayQueue() {
			channels = channels[:1]
		}
		start := time.Now()
		err := s.subscribe(ctx, e, channels)
		// A closed subscription is our own doing, and is no reason to give up.
		denied := judge(err) == final && !errors.Is(err, redis.ErrClosed)
		if denied && len(channels) > 1 {
			refused = true // Perhaps the user has a right to the first alone.
			continue
		}
		if time.Since(start) > steadyTime {
			pauses.step = 0
		}
		pause := pauses.next()
		if denied {
			pause = deniedPause
		}
		sleep(ctx, ctx, pause)
	}
}

// subscribe lives as long as one subscription, and returns why it ended. The last of the channels, if there are
// several, is the inbox: when it is confirmed, all are.
//
// The connection is used once: go-redis repairs it silently when it breaks, and
// then nobody learns that messages were lost.
func (s *subscriber) subscribe(ctx context.Context, e *ear, channels []string) error {
	ctx, cancel := context.WithCancel(ctx)
	inbox := s.server.inbox()
	last := channels[len(channels)-1]
	pubsub := s.server.client.Subscribe(ctx) // to no channel: this does not connect yet
	connect, done := context.WithTimeout(ctx, connectTime)
	err := pubsub.Subscribe(connect, channels...)
	done()
	placed := make(chan struct{}) // closed when the inbox is confirmed

	// Only now, because a ping would wait for the connection beyond its own time,
	// and then break it.
	var pinger sync.WaitGroup
	defer pinger.Wait()
	defer cancel()
	defer s.setHears(e, false)
	pinger.Go(func() { s.checkOn(ctx, pubsub, placed) })
	for confirmed := false; err == nil; {
		var message any
		message, err = receive(ctx, pubsub)
		if _, refused := errors.AsType[redis.Error](err); refused && confirmed {
			err = nil // the answer to a ping: the connection lives
		}
		switch m := message.(type) {
		case *redis.Subscription:
			if m.Channel != last || confirmed {
				continue
			}
			confirmed = true
			if last == inbox {
				close(placed)
				s.setHears(e, true)
			}
			s.wakeAll()
		case *redis.Message:
			if m.Channel == inbox {
				if g, ok := s.server.parseGrant(m.Payload); ok {
					s.hear(e, g)
				}
			} else if id, ok := s.server.names.id(m.Payload); ok {
				s.released(id)
			}
		}
	}
	return err
}

func (s *subscriber) setHears(e *ear, hears bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e.hears = hears
}

// receive waits for one message, or the answer to a ping. It is bounded by ctx,
// because go-redis connects again before it returns an error.
func receive(ctx context.Context, pubsub *redis.PubSub) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, silenceLimit)
	defer cancel()
	return pubsub.Receive(ctx)
}

// checkOn pings the subscription, so that a connection that died silently is
// noticed by whoever receives from it, and closes it when ctx ends.
//
// It also closes one that is not on the server that runs the scripts. After a failover
// the client sends commands to the new master at once, while the old one, where
// nobody releases anything any more, keeps its subscribers for ten seconds or so.
func (s *subscriber) checkOn(ctx context.Context, pubsub *redis.PubSub, placed <-chan struct{}) {
	defer pubsub.Close() //nolint:errcheck // It is given up, or broken already.
	if !s.server.moves() {
		placed = nil
	}
	ticker := time.NewTicker(pingEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		bounded, cancel := context.WithTimeout(ctx, pingEvery)
		err := pubsub.Ping(bounded)
		misplaced := false
		select {
		case <-placed:
			misplaced = err == nil && !s.server.hears(bounded, s.server.inbox())
		default:
		}
		cancel()
		if err != nil || misplaced {
			return
		}
	}
}
