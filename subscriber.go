package redfour

import (
	"container/list"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
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

// A subscriber makes the callers of WaitAcquire wait, and wakes them.
//
// The waiters of one id stand in a line. Attempts belong to the line, not to a
// waiter: one is in flight at a time, made for whoever is first then, and what it
// brings is given to whoever is first when it comes back. Thus a hundred waiters
// cost no more commands than one, and a waiter that leaves takes nothing with it.
//
// A wake-up is a hint that the line should look at its lock: a release message, a
// release in this process, a new subscription, or the line's timer. A line
// is registered before its first look, so that no release falls between the look
// and the wait: if the subscription stood, its message wakes the line; if not,
// the confirmation of the subscription does. A wake-up while an attempt is
// in flight is kept (line.again), because the attempt may have looked before.
type subscriber struct {
	server *server
	crew   *crew.Crew
	life   context.Context //nolint:containedctx // The Lock's own life, no request's.

	mu    sync.Mutex       // guards what follows, and every line
	lines map[string]*line // by id
	ear   *ear             // the subscription; nil if there is none
	idle  *time.Timer      // closes the ear after the last line has gone; nil before the first
}

// A line is the waiters of one id, first come first.
//
// It is in subscriber.lines as long as it has waiters or an attempt in flight. If
// it has waiters, it has an attempt in flight or its timer set.
type line struct {
	id       string
	waiters  list.List   // of *waiter
	trying   bool        // an attempt is in flight, or about to be
	again    bool        // a wake-up came since the attempt began
	fresh    bool        // no attempt has begun yet
	quest    *quest      // the attempts since the last lease; the goroutine's while trying
	failures backoff     // since the last answer
	news     error       // what the last attempt told: a *LockedError, or why there is no answer
	seen     time.Time   // when it told that
	timer    *time.Timer // the next look; nil before the first
	due      time.Time   // when that is
}

// A waiter is one call of WaitAcquire.
type waiter struct {
	ttl    time.Duration
	served chan served   // capacity 1: sent once, under the subscriber's mu, when the waiter has left the line
	place  *list.Element // in the line; nil when it has left
}

// served is what a waiter gets.
type served struct {
	lease *Lease
	err   error
}

func newSubscriber(life context.Context, s *server, c *crew.Crew) *subscriber {
	return &subscriber{server: s, crew: c, life: life, lines: make(map[string]*line)}
}

// wait joins the line of id and returns when it is served, or ctx or the Lock ends.
func (s *subscriber) wait(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	ln, w := s.join(id, ttl)
	select {
	case got := <-w.served:
		return got.lease, got.err
	case <-ctx.Done():
	case <-s.life.Done():
	}
	left, news := s.leave(ln, w)
	switch {
	case !left:
		// Served in the same moment. A lease is never thrown away: the caller has
		// asked for it, and releases it.
		got := <-w.served
		return got.lease, got.err
	case ctx.Err() == nil:
		return nil, ErrClosed
	}
	return nil, fmt.Errorf("%w: %w", contextError(ctx), news)
}

func (s *subscriber) join(id string, ttl time.Duration) (*line, *waiter) {
	w := &waiter{ttl: ttl, served: make(chan served, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lines[id]
	if ln == nil {
		ln = &line{
			id: id, fresh: true, quest: newQuest(id), news: errNoAnswer,
			failures: backoff{min: shortestRetry, max: longestRetry},
		}
		s.lines[id] = ln
		s.beginLocked(ln)
	}
	w.place = ln.waiters.PushBack(w)
	return ln, w
}

// leave takes w out of its line, and returns what the line knows of its lock. It
// returns false if w had been served.
func (s *subscriber) leave(ln *line, w *waiter) (left bool, news error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.place == nil {
		return false, nil
	}
	ln.waiters.Remove(w.place)
	w.place = nil
	news = ln.news
	if locked, ok := errors.AsType[*LockedError](news); ok {
		ttl := max(0, locked.TTL-time.Since(ln.seen)).Truncate(time.Millisecond)
		news = &LockedError{ID: locked.ID, Index: locked.Index, TTL: ttl}
	}
	switch {
	case ln.waiters.Len() > 0 || ln.trying:
	default:
		s.dropLocked(ln)
	}
	return true, news
}

// dropLocked forgets a line that has no attempt, and either no waiters or no life.
func (s *subscriber) dropLocked(ln *line) {
	if s.lines[ln.id] != ln {
		return // done already, when the Lock was closed
	}
	delete(s.lines, ln.id)
	s.server.abandon(s.life, ln.quest)
	if ln.timer != nil {
		ln.timer.Stop()
	}
	if len(s.lines) > 0 || s.ear == nil || s.life.Err() != nil {
		return
	}
	if s.idle == nil {
		s.idle = time.AfterFunc(idleTime, s.rest)
	} else {
		s.idle.Reset(idleTime)
	}
}

// rest closes the subscription if there is still nobody to wait for.
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
		if !ln.trying {
			s.dropLocked(ln)
		}
	}
	if s.idle != nil {
		s.idle.Stop()
	}
}

// wake makes the line of id look at its lock, if there is one.
func (s *subscriber) wake(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ln := s.lines[id]; ln != nil {
		s.wakeLocked(ln)
	}
}

func (s *subscriber) wakeLocked(ln *line) {
	if ln.trying {
		ln.again = true
		return
	}
	s.beginLocked(ln)
}

// wakeAll makes every line look, but not all in the same moment.
func (s *subscriber) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	spread := time.Duration(len(s.lines)) * lookSpread
	for _, ln := range s.lines {
		if ln.trying {
			ln.again = true
		} else if pause := mathrand.N(spread); pause < time.Until(ln.due) {
			s.lookInLocked(ln, pause)
		}
	}
}

// lookInLocked sets the timer of a line that has no attempt in flight.
func (s *subscriber) lookInLocked(ln *line, d time.Duration) {
	ln.due = time.Now().Add(d)
	if ln.timer == nil {
		ln.timer = time.AfterFunc(d, func() { s.look(ln) })
	} else {
		ln.timer.Reset(d)
	}
}

// look is called by the timer of ln.
func (s *subscriber) look(ln *line) {
	s.mu.Lock()
	defer s.mu.Unlock()
	// The timer may have fired while an attempt began, or while ln was dropped.
	if s.lines[ln.id] == ln && !ln.trying {
		s.beginLocked(ln)
	}
}

func (s *subscriber) beginLocked(ln *line) {
	if ln.timer != nil {
		ln.timer.Stop()
	}
	ln.trying = true
	s.crew.Start(func() {
		for s.attempt(ln) {
		}
	})
}

// attempt makes one attempt for whoever is first in the line, or clears up if
// nobody is. It reports whether another is to follow at once.
func (s *subscriber) attempt(ln *line) bool {
	s.mu.Lock()
	first := ln.first()
	if s.life.Err() != nil {
		first = nil // the Lock is closed, and the waiters are leaving
	}
	if first == nil {
		ln.trying = false
		s.dropLocked(ln)
		s.mu.Unlock()
		return false
	}
	fresh := ln.fresh
	ln.fresh, ln.again = false, false
	s.mu.Unlock()

	r, err := s.server.try(s.life, ln.quest, first.ttl)
	if err == nil && r.status != statusHeld {
		lease := newLease(ln.id, ln.quest.token, first.ttl, r)
		lease.Immediate = fresh
		// An earlier attempt of the quest may have asked for another ttl.
		return s.give(ln, first, lease, r.status == statusDone)
	}
	return s.settle(ln, first, r, err)
}

// first returns the waiter who is first in the line, nil if there is none.
func (ln *line) first() *waiter {
	if e := ln.waiters.Front(); e != nil {
		return e.Value.(*waiter)
	}
	return nil
}

// settle ends an attempt, made for w, that did not get the lock.
func (s *subscriber) settle(ln *line, w *waiter, r reply, err error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := judge(err)
	switch {
	case v == final:
		if w.place != nil {
			s.serveLocked(ln, w, served{err: err})
		}
		return true
	case v != answered:
		return s.failLocked(ln, err)
	}
	return s.heldLocked(ln, &LockedError{ID: ln.id, Index: r.index, TTL: r.left})
}

// failLocked makes the line try again after a pause.
func (s *subscriber) failLocked(ln *line, err error) bool {
	ln.news, ln.seen = err, time.Now()
	if ln.waiters.Len() == 0 || s.life.Err() != nil {
		return true
	}
	ln.trying = false
	s.lookInLocked(ln, ln.failures.next())
	return false
}

// heldLocked makes the line wait, for a wake-up or for the end of the holder's lease.
// The answer does not count if nobody is left to wait, nor after a wake-up.
func (s *subscriber) heldLocked(ln *line, by *LockedError) bool {
	ln.news, ln.seen, ln.failures.step = by, time.Now(), 0
	if ln.again || ln.waiters.Len() == 0 || s.life.Err() != nil {
		return true
	}
	s.listenLocked()
	ln.trying = false
	s.lookInLocked(ln, min(by.TTL, longestLook)+time.Millisecond+mathrand.N(lookJitter))
	return false
}

// give is the one gate through which leases reach waiters. The lease goes to whoever
// is first now, for the ttl that he asked for, or back to Redis if nobody is there
// or it is too late. The attempt was made for tried; exact tells whether the
// lease's ttl is known for certain.
func (s *subscriber) give(ln *line, tried *waiter, lease *Lease, exact bool) bool {
	s.server.won(s.life, ln.quest, lease.Index)
	ln.quest = newQuest(ln.id)
	for ; ; exact = true {
		s.mu.Lock()
		w := ln.first()
		gone := w == nil || s.life.Err() != nil
		late := lease.Remaining() <= 0
		if !gone && !late && exact && w.ttl == lease.TTL {
			defer s.mu.Unlock()
			lease.Immediate = lease.Immediate && w == tried
			s.serveLocked(ln, w, served{lease: lease})
			return s.nextLocked(ln, lease)
		}
		s.mu.Unlock()

		switch {
		case gone:
			s.server.giveBack(context.WithoutCancel(s.life), lease)
			return true
		case late:
			s.server.giveBack(context.WithoutCancel(s.life), lease)
			return s.settle(ln, w, reply{}, errLate(lease.TTL))
		}
		renewed, err := s.server.suit(s.life, lease, w.ttl)
		if err != nil {
			s.server.giveBack(context.WithoutCancel(s.life), lease)
			return s.settle(ln, w, reply{}, err)
		}
		lease = renewed
	}
}

func (s *subscriber) serveLocked(ln *line, w *waiter, what served) {
	ln.waiters.Remove(w.place)
	w.place = nil
	w.served <- what
}

// nextLocked leaves the line to those who wait for the end of a lease that one of
// them just got. A wake-up that came meanwhile was about an earlier lease: nobody
// can have released this one yet.
func (s *subscriber) nextLocked(ln *line, lease *Lease) bool {
	if ln.waiters.Len() == 0 {
		ln.trying = false
		s.dropLocked(ln)
		return false
	}
	ln.again = false
	return s.heldLocked(ln, &LockedError{ID: ln.id, Index: lease.Index, TTL: lease.Remaining()})
}

// An ear is the one subscription of a Lock, and the goroutine that keeps it up.
type ear struct{ close context.CancelFunc }

// listenLocked sees to it that there is a subscription, now or soon. When it is
// confirmed, it wakes everybody, so nobody has to wait for it.
func (s *subscriber) listenLocked() {
	if s.ear != nil {
		return
	}
	ctx, cancel := context.WithCancel(s.life)
	s.ear = &ear{close: cancel}
	s.crew.Start(func() { s.listen(ctx) })
}

func (s *subscriber) listen(ctx context.Context) {
	inbox := ""
	if s.server.moves() {
		inbox = s.server.names.inbox(rand.Text())
	}
	for pauses := (backoff{min: shortestRetry, max: resubscribe}); ctx.Err() == nil; {
		start := time.Now()
		err := s.subscribe(ctx, inbox)
		// A closed subscription is our own doing, and is no reason to give up.
		denied := judge(err) == final && !errors.Is(err, redis.ErrClosed)
		if denied && inbox != "" {
			inbox = "" // Perhaps the user has no right to that alone.
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

// subscribe lives as long as one subscription, and returns why it ended.
//
// The connection is used once: go-redis repairs it silently when it breaks, and
// then nobody learns that messages were lost. If an inbox is given it is subscribed to,
// so that checkOn can tell where the subscription is.
func (s *subscriber) subscribe(ctx context.Context, inbox string) error {
	ctx, cancel := context.WithCancel(ctx)
	channels := []string{s.server.names.releaseChannel()}
	if inbox != "" {
		channels = append(channels, inbox)
	}
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
	pinger.Go(func() { s.checkOn(ctx, pubsub, inbox, placed) })
	for confirmed, found := false, false; err == nil; {
		var message any
		message, err = receive(ctx, pubsub)
		if _, refused := errors.AsType[redis.Error](err); refused && confirmed {
			err = nil // the answer to a ping: the connection lives
		}
		switch m := message.(type) {
		case *redis.Subscription:
			if m.Channel != inbox {
				confirmed = true
				s.wakeAll()
			} else if !found {
				found = true
				close(placed)
			}
		case *redis.Message:
			if id, ok := s.server.names.id(m.Payload); ok {
				s.wake(id)
			}
		}
	}
	return err
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
func (s *subscriber) checkOn(ctx context.Context, pubsub *redis.PubSub, inbox string, placed <-chan struct{}) {
	defer pubsub.Close() //nolint:errcheck // It is given up, or broken already.
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
			misplaced = err == nil && !s.server.hears(bounded, inbox)
		default:
		}
		cancel()
		if err != nil || misplaced {
			return
		}
	}
}
