package redfour

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"
)

// A line is the waiters of one id in one Lock, first come first, and what is known of their
// lock. It is the member's side of "The queue" in docs/protocol.md, as a small state machine:
// what happens to it is a method below, called under the subscriber's mu.
//
// Attempts belong to the line, not to a waiter: one is in flight at a time, made for whoever
// is first then. Whatever brings a lease, an attempt, a message or a release in this process, passes
// one gate (claimLocked) and goes to whoever is first when it comes, or back to Redis. Thus a
// hundred waiters cost no more than one, and a waiter that leaves takes nothing with it.
//
// Answers and messages overtake each other. So a wake-up is a hint that the line should look at its
// lock, and while an attempt is in flight it is kept (again), because the attempt may have looked before.
//
// A line is in subscriber.lines until nothing is on its way any more that may enter the queue for it, or tell of a
// lease. If it has waiters, it has an attempt in flight or its timer set.
type line struct {
	id      string
	bucket  *bucket
	waiters list.List // of *waiter

	trying  bool // an attempt, or the leave that ends waiting, is in flight or about to be
	fresh   bool // no attempt has begun yet
	again   bool // a wake-up came since the attempt began
	shy     bool // it was an open release: those who are not in the queue go first
	pending int  // releases with an heir and late attempts, whose outcome is still to come
	late    int  // attempts among them

	quest    *quest    // the attempts since the last lease that one of them brought; nil before the first
	failures backoff   // since the last answer
	denied   time.Time // when Redis first refused the password, since the last answer; zero if it did not
	news     error     // what the last attempt told: a *LockedError, or why there is no answer
	seen     time.Time

	values context.Context //nolint:containedctx // The caller's who waits first, until an attempt begins for it; nil else.

	timer  *time.Timer // the next look; nil before the first
	due    time.Time   // when that is
	woken  bool        // it is because of a wake-up, which was told
	expiry bool        // it is the end of the holder's lease

	entry   string    // what stands for the line in the queue
	queued  bool      // it may be there
	doubted bool      // a copy of a request whose outcome is unknown may enter it yet
	leaving int       // entries that the line does not use any more, and that are taken out in the background
	out     int64     // the index of the last lease that took it out: what an attempt saw before does not count
	ours    bool      // a member holds the lock, and when it releases the line is served, or told
	claimed int64     // no lease up to this index passes the gate any more
	found   time.Time // until then the message of a grant that was found by asking may still come
	turn    int       // how many more waiters of this process go before those of others
}

// longestTurn is how many more waiters of one process are served, after the first, before those of others.
const longestTurn = 16

// lateMessage is how long a line lasts for the message of a grant that it found by
// asking. A live subscription is no later: it answers a ping within 2.5 s.
const lateMessage = 10 * time.Second

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

// first returns the waiter who is first in the line, nil if there is none.
func (ln *line) first() *waiter {
	if e := ln.waiters.Front(); e != nil {
		return e.Value.(*waiter)
	}
	return nil
}

// wait joins the line of id and returns when it is served, or ctx or the Lock ends.
func (s *subscriber) wait(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	ln, w := s.join(ctx, id, ttl)
	select {
	case got := <-w.served:
		return s.accept(ctx, got)
	case <-ctx.Done():
	case <-s.life.Done():
	}
	return s.giveUp(ctx, ln, w)
}

// giveUp ends a wait. It stands by itself, as waitUntold does.
func (s *subscriber) giveUp(ctx context.Context, ln *line, w *waiter) (*Lease, error) {
	left, news := s.leave(ln, w)
	switch {
	case !left:
		// Served in the same moment. If it is the Lock that has ended, the caller
		// gets the lease all the same, and releases it.
		return s.accept(ctx, <-w.served)
	case ctx.Err() == nil:
		return nil, ErrClosed
	}
	return nil, fmt.Errorf("%w: %w", contextError(ctx), news)
}

// accept returns what a waiter was served. A lease is for a caller whose ctx has not ended: this one may
// have ended before the lock was free.
func (s *subscriber) accept(ctx context.Context, got served) (*Lease, error) {
	if got.lease != nil && ctx.Err() != nil {
		return nil, fmt.Errorf("%w: %w", contextError(ctx), s.passOn(got.lease))
	}
	return got.lease, got.err
}

// passOn gives a lease that its waiter does not take to the next in the line, or back to Redis. It
// returns what the waiter is to hear of the lock: that it is held, unless it was free when the waiter came.
func (s *subscriber) passOn(lease *Lease) (news error) {
	news = s.held(lease)
	if lease.Immediate {
		news = errors.New("the lock was got too late, and is given back")
	}
	y := yield{lease: lease, exact: true} // It passed the gate when it was claimed.
	s.mu.Lock()
	defer s.mu.Unlock()
	if ln := s.lines[lease.ID]; !s.giveLocked(ln, y) {
		s.crew.Start(func() { _, _ = s.give(ln, y) })
	}
	return news
}

// held returns that a lease of this process holds its lock.
func (s *subscriber) held(lease *Lease) *LockedError {
	owner, _ := s.server.owner.(string)
	left := lease.Remaining() + margin(lease.TTL) // in Redis, where the lease ends for the waiters
	return &LockedError{ID: lease.ID, Index: lease.Index, TTL: left, Owner: owner}
}

// join registers a waiter. For the first in a line it looks at the lock, even while an attempt
// is in flight: that may have looked before there was anybody to wake. That look has the values of ctx.
func (s *subscriber) join(ctx context.Context, id string, ttl time.Duration) (*line, *waiter) {
	w := &waiter{ttl: ttl, served: make(chan served, 1)}
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lines[id]
	if ln == nil {
		ln = s.newLineLocked(id)
	}
	w.place = ln.waiters.PushBack(w)
	s.waiters++
	if ln.first() == w {
		ln.values = ctx
		s.wakeLocked(ln, false)
	}
	return ln, w
}

// newLineLocked makes the line of an id that has none. Nothing that came before can be claimed
// in it: an earlier line of the id was dropped when it was out of the queue, and whatever
// it was granted was claimed, or given up. Whatever comes has a greater index.
func (s *subscriber) newLineLocked(id string) *line {
	b := s.server.bucket(id)
	ln := &line{
		id: id, bucket: b, fresh: true, news: errNoAnswer,
		failures: backoff{min: shortestRetry, max: longestRetry},
		claimed:  max(b.highest.Load(), b.claimed),
	}
	s.lines[id] = ln
	return ln
}

// questLocked returns the quest that attempts belong to now. It is not made before there is one, because randomness takes
// more of a stack than all else that a waiter does.
func (ln *line) questLocked() *quest {
	if ln.quest == nil {
		ln.quest = newQuest(ln.id)
	}
	return ln.quest
}

// leave takes w out of its line, and returns what the line knows of its lock. It
// returns false if w had been served.
func (s *subscriber) leave(ln *line, w *waiter) (left bool, news error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w.place == nil {
		return false, nil
	}
	s.removeLocked(ln, w)
	news = ln.news
	if locked, ok := errors.AsType[*LockedError](news); ok {
		now := *locked
		now.TTL = max(0, locked.TTL-time.Since(ln.seen)).Truncate(time.Millisecond)
		news = &now
	}
	s.clearLocked(ln)
	return true, news
}

// removeLocked takes a waiter out of its line.
func (s *subscriber) removeLocked(ln *line, w *waiter) {
	if ln.first() == w {
		ln.values = nil
	}
	ln.waiters.Remove(w.place)
	w.place = nil
	s.waiters--
}

// clearLocked does what remains to be done for a line that nobody waits in, if nothing is in flight: it
// takes it out of the queue, waits for what is still to come, and drops it.
func (s *subscriber) clearLocked(ln *line) {
	switch {
	case ln.trying, ln.waiters.Len() > 0 && s.life.Err() == nil:
	case ln.pending > 0: // It may enter the queue yet, and its outcome clears.
		if ln.pending == ln.late { // No release offers the lock to the quest.
			s.abandonLocked(ln)
		}
	case ln.queued:
		s.beginLocked(ln, false)
	default:
		s.endLocked(ln)
	}
}

// endLocked ends a line that nobody waits in and that is not in the queue. It lasts
// while an entry of it may be granted the lock yet, because it knows what was claimed.
func (s *subscriber) endLocked(ln *line) {
	s.abandonLocked(ln)
	switch {
	case ln.doubted:
		s.retireLocked(ln)
	case ln.leaving > 0: // The end of that clears.
	case time.Now().Before(ln.found) && s.life.Err() == nil:
		s.lookInLocked(ln, time.Until(ln.found))
	default:
		s.dropLocked(ln)
	}
}

// abandonLocked ends the quest of a line that nobody waits in.
func (s *subscriber) abandonLocked(ln *line) {
	if ln.quest != nil {
		s.server.abandon(ln.quest)
		ln.quest = nil
	}
}

// dropLocked forgets a line.
func (s *subscriber) dropLocked(ln *line) {
	if s.lines[ln.id] != ln {
		return // done already, when the Lock was closed
	}
	delete(s.lines, ln.id)
	if ln.timer != nil {
		ln.timer.Stop()
	}
	if len(s.lines) == 0 {
		s.idleLocked()
	}
}

// wake makes the line of id look at its lock, if there is one; after a pause, if it is told
// to be shy. It reports whether that wakes somebody.
func (s *subscriber) wake(id string, shy bool) (wakes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lines[id]
	if ln == nil {
		return false
	}
	s.wakeLocked(ln, shy)
	return ln.first() != nil
}

// released wakes the line of id because of a message. A member that held the lock would have handed it over, so that
// was an open release.
func (s *subscriber) released(id string) (wakes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lines[id]
	if ln == nil {
		return false
	}
	s.wakeLocked(ln, ln.ours)
	return ln.first() != nil
}

func (s *subscriber) wakeLocked(ln *line, shy bool) {
	switch {
	case ln.trying:
		ln.shy = shy && (ln.shy || !ln.again)
		ln.again = true
	case shy: // What is due before is not put off.
		if pause := shyPause(); pause < time.Until(ln.due) {
			s.lookInLocked(ln, pause)
			ln.woken = true
		}
	default:
		s.beginLocked(ln, false)
	}
}

// shyPause is for how long members leave a lock alone that was released openly.
func shyPause() time.Duration { return time.Millisecond + mathrand.N(2*time.Millisecond) }

// lookInLocked sets the timer of a line that has no attempt in flight.
func (s *subscriber) lookInLocked(ln *line, d time.Duration) {
	ln.due, ln.expiry, ln.woken = time.Now().Add(d), false, false
	if ln.timer == nil {
		ln.timer = time.AfterFunc(d, func() { s.look(ln) })
	} else {
		ln.timer.Reset(d)
	}
}

// look is called by the timer of ln.
func (s *subscriber) look(ln *line) {
	s.mu.Lock()
	// The timer may have fired while an attempt began, or while ln was dropped.
	looks := s.lines[ln.id] == ln && !ln.trying
	told := looks && !ln.woken && ln.first() != nil
	if looks {
		s.beginLocked(ln, ln.expiry)
	}
	if told {
		s.crew.Join()
		defer s.crew.Leave()
	}
	s.mu.Unlock()
	if told {
		s.events.woken(ln.id, byTimer)
	}
}

// beginLocked makes attempts, now or as soon as fewer lines make theirs, until none is to follow at once. The first may be
// made because the holder's lease should have ended.
func (s *subscriber) beginLocked(ln *line, expiry bool) {
	if ln.timer != nil {
		ln.timer.Stop()
	}
	ln.trying = true
	b := ln.bucket
	b.backlog = append(b.backlog, look{ln, expiry})
	if b.looking < max(abreast/len(s.server.buckets), abreastEach) {
		b.looking++
		s.crew.Start(func() { s.makeLooks(b) })
	}
}

// makeLooks makes attempts for lines of a bucket, one line at a time, until none is due.
func (s *subscriber) makeLooks(b *bucket) {
	for {
		s.mu.Lock()
		if len(b.backlog) == 0 {
			b.looking--
			s.mu.Unlock()
			return
		}
		l := b.backlog[0]
		b.backlog[0] = look{}
		b.backlog = b.backlog[1:]
		s.mu.Unlock()
		for again := true; again; l.expiry = false {
			again = s.attempt(l.line, l.expiry)
		}
	}
}

// A look is that a line is to make attempts.
type look struct {
	line   *line
	expiry bool // because the holder's lease should have ended
}

// attempt makes one attempt for whoever is first in the line, or clears up if
// nobody is. It reports whether another is to follow at once.
func (s *subscriber) attempt(ln *line, expiry bool) bool {
	s.mu.Lock()
	first := ln.first()
	if s.life.Err() != nil {
		first = nil // the Lock is closed, and the waiters are leaving
	}
	fresh := ln.fresh
	ln.fresh, ln.again, ln.shy = false, false, false
	if first == nil {
		defer s.mu.Unlock()
		ln.denied = time.Time{} // Who comes later has time of his own.
		return s.leaveLocked(ln)
	}
	if ln.queued && ln.pending == 0 && !s.server.mayQueue() {
		// The subscription is made anew, and a message on its way is lost. Attempts without a queue do not find its lease.
		defer s.mu.Unlock()
		return s.leaveLocked(ln)
	}
	q, p, e := ln.questLocked(), place{}, s.heardBy[ln.bucket]
	if s.hearsLocked(ln.bucket) {
		p = place{s.entryLocked(ln, first.ttl, ln.pending == 0), ln.claimed, expiry}
		ln.queued = true // from the moment that the request leaves
	}
	ctx := s.life
	if ln.values != nil {
		ctx = valued{ctx, ln.values}
		ln.values = nil
	}
	s.mu.Unlock()

	r, err := s.server.try(ctx, longestPatience, q, first.ttl, p)
	if err == nil && r.brings() {
		return s.won(ln, first, fresh, q, p, r)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := unheard(err); c != nil {
		ln.pending++
		ln.late++
		s.server.late(c, func(r reply, err error) { s.comesLate(ln, first.ttl, q, p, r.lasting(first.ttl), err) })
	} else {
		ln.doubtLocked(p.entry, err)
	}
	if p.entry != "" && !s.server.mayQueue() && s.heardBy[ln.bucket] == e {
		s.listenAnewLocked(e) // The others must not take it for one who can be handed a lock.
	}
	switch v := judge(err); {
	case v == final, v == unauthenticated && s.lastsLocked(ln):
		if first.place != nil {
			s.serveLocked(ln, first, served{err: err})
		}
		return true
	case v != answered:
		return s.failLocked(ln, err)
	}
	if p.entry != "" {
		ln.queued = ln.queued || r.index >= ln.out
	}
	ln.ours = r.status == statusQueued
	ln.toldLocked(r.locked(ln.id))
	return s.restLocked(ln)
}

// A valued is a context that also has the values of another, whose end does
// not end it.
type valued struct {
	context.Context //nolint:containedctx // As below.

	values context.Context //nolint:containedctx // For one attempt only.
}

// Value returns the context's own value first: what package context keeps there
// must be of the context that ends.
func (v valued) Value(key any) any {
	if value := v.Context.Value(key); value != nil {
		return value
	}
	return v.values.Value(key)
}

// won ends an attempt, made for w, that has got the lock, or found that the line has it already.
func (s *subscriber) won(ln *line, w *waiter, fresh bool, q *quest, p place, r reply) bool {
	y := s.yielded(ln, w.ttl, q, p, r)
	y.tried, y.lease.Immediate = w, fresh && y.quest != nil
	claimed, err := s.take(ln.id, y)
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		return s.failLocked(ln, err)
	case !claimed:
		return true // It was claimed meanwhile. That is no news of whether the line is in the queue.
	}
	return s.restLocked(ln)
}

// yielded returns the lease that an attempt of q for this ttl has brought.
func (s *subscriber) yielded(ln *line, ttl time.Duration, q *quest, p place, r reply) yield {
	if r.status == statusFound {
		return yield{lease: newLease(ln.id, s.server.grantToken(r.index), r.left, r), asked: true, out: true}
	}
	// If it had the lock already, an earlier attempt may have asked for another ttl, and a hand-over leaves the
	// line in the queue.
	done := r.status == statusDone
	return yield{lease: newLease(ln.id, q.token, ttl, r), quest: q, exact: done, out: done && p.entry != ""}
}

// comesLate takes the outcome of an attempt that was given up. A lease that it
// brings passes the gate like any other, or goes back if all have left for whom it
// was made. Otherwise it may have entered the queue, but says nothing about the
// lock: what woke the line since the attempt looked was not kept for it.
func (s *subscriber) comesLate(ln *line, ttl time.Duration, q *quest, p place, r reply, err error) {
	brings := err == nil && r.brings()
	claimed := false
	if brings {
		claimed, _ = s.take(ln.id, s.yielded(ln, ttl, q, p, r)) // The line lasts, because this attempt is pending.
	}
	if !claimed {
		s.server.comesLate(context.WithoutCancel(s.life), q, r, err)
	}
	took := brings && r.status == statusDone || judge(err) == unknown
	s.mu.Lock()
	defer s.mu.Unlock()
	ln.pending--
	ln.late--
	if p.entry != "" && took && !claimed && q != ln.quest && ln.waiters.Len() > 0 {
		s.wakeLocked(ln, false) // It may have taken the line out of the queue for nobody.
	}
	ln.doubtLocked(p.entry, err)
	ln.queued = ln.queued || p.entry != "" && !brings // The entry is the same as then, because pending kept it.
	if ln.queued && ln.waiters.Len() > 0 && !s.server.mayQueue() {
		s.wakeLocked(ln, false) // It leaves the queue, which the attempt has kept it from.
	}
	s.clearLocked(ln)
}

// doubtLocked notes that a request of unknown outcome, if err says so, may enter
// the entry that it carried. A broken connection is noticed here before its last
// request has arrived, if there is a proxy in between.
func (ln *line) doubtLocked(entry string, err error) {
	ln.doubted = ln.doubted || entry != "" && judge(err) == unknown
}

// toldLocked notes who holds the lock.
func (ln *line) toldLocked(by *LockedError) {
	ln.news, ln.seen, ln.failures.step, ln.denied = by, time.Now(), 0, time.Time{}
}

// restLocked makes the line wait, for a wake-up or for the end of the holder's lease. It returns true if another
// attempt is to follow instead: the last does not count if nobody is left to wait, nor after a wake-up.
func (s *subscriber) restLocked(ln *line) bool {
	if ln.again && !ln.shy || ln.waiters.Len() == 0 || s.life.Err() != nil {
		return true
	}
	s.listenLocked(ln.bucket)
	ln.trying = false
	if ln.again {
		ln.again, ln.shy = false, false
		s.lookInLocked(ln, shyPause())
		ln.woken = true
		return false
	}
	left := longestLook
	if locked, ok := errors.AsType[*LockedError](ln.news); ok {
		left = locked.TTL - time.Since(ln.seen)
	}
	s.lookInLocked(ln, min(left, longestLook)+time.Millisecond+mathrand.N(lookJitter))
	ln.expiry = left <= longestLook
	return false
}

// failLocked makes the line try again after a pause.
func (s *subscriber) failLocked(ln *line, err error) bool {
	if judge(err) == lost {
		err = errors.New(err.Error()) // It was nobody's lease yet, so it is not for the waiter to hear that his was lost.
	}
	ln.news, ln.seen = err, time.Now()
	ln.again, ln.shy = false, false // The pause is short enough.
	if ln.waiters.Len() == 0 || s.life.Err() != nil {
		return true
	}
	ln.trying = false
	pause := ln.failures.next()
	if !s.server.rotates && judge(err) == unauthenticated {
		pause = min(pause, acquireTime-time.Since(ln.denied)) // It is the last attempt by then.
	}
	s.lookInLocked(ln, pause)
	return false
}

// lastsLocked notes that Redis has refused the password. It reports whether that is
// not going to change.
func (s *subscriber) lastsLocked(ln *line) bool {
	if ln.denied.IsZero() {
		ln.denied = time.Now()
	}
	return s.server.lasts(time.Since(ln.denied))
}

// A yield is a lease that somebody of this process has got, and how.
type yield struct {
	lease *Lease
	exact bool    // its ttl is known for certain
	quest *quest  // whose token it has; nil if the member was granted it
	asked bool    // it was granted, and found by asking: the message may still come
	local bool    // it was handed over within the process
	out   bool    // the script that made it took the line out of the queue
	tried *waiter // for whom the attempt was made that brought it; nil if none was
}

// take lets a lease through the gate once, however often the process hears of it, and gives it to a waiter.
func (s *subscriber) take(id string, y yield) (claimed bool, err error) {
	s.mu.Lock()
	ln := s.lines[id]
	claimed = s.claimLocked(ln, y)
	s.mu.Unlock()
	if !claimed {
		return false, nil
	}
	_, err = s.give(ln, y)
	return true, err
}

// give gives a lease that was claimed to whoever is first in the line, for the ttl that he asked for. It goes back to
// Redis if nobody is there, or if it comes too late, which is an error.
func (s *subscriber) give(ln *line, y yield) (given bool, err error) {
	for ; ; y.exact = true {
		s.mu.Lock()
		if s.giveLocked(ln, y) {
			s.mu.Unlock()
			return true, nil
		}
		var w *waiter
		if ln != nil && s.life.Err() == nil {
			w = ln.first()
		}
		s.mu.Unlock()

		switch {
		case w == nil:
		case y.lease.Remaining() <= 0:
			err = errLate(y.lease.TTL)
		default:
			var suited *Lease
			if suited, err = s.server.suit(s.life, y.lease, w.ttl); err == nil {
				y.lease = suited
				continue
			}
		}
		s.events.counts.returned.Add(1)
		s.server.giveBack(context.WithoutCancel(s.life), y.lease.key())
		if s.wake(y.lease.ID, false) {
			s.events.woken(y.lease.ID, byRelease)
		}
		return false, err
	}
}

// giveLocked is give where nothing needs to be sent.
func (s *subscriber) giveLocked(ln *line, y yield) bool {
	if ln == nil || ln.first() == nil || s.life.Err() != nil {
		return false
	}
	w := ln.first()
	if !y.exact || w.ttl != y.lease.TTL || y.lease.Remaining() <= 0 {
		return false
	}
	y.lease.Immediate = y.lease.Immediate && w == y.tried
	s.serveLocked(ln, w, served{lease: y.lease})
	s.heldHereLocked(ln, y)
	return true
}

// claimLocked tells whether the lease has not been claimed before, and claims it.
func (s *subscriber) claimLocked(ln *line, y yield) bool {
	index, b := y.lease.Index, s.server.bucket(y.lease.ID)
	b.claimed = max(b.claimed, index)
	if ln != nil && !s.gateLocked(ln, y) {
		return false
	}
	if y.quest == nil {
		s.events.counts.grantsClaimed.Add(1)
	}
	return true
}

// gateLocked is claimLocked where there is a line.
func (s *subscriber) gateLocked(ln *line, y yield) bool {
	index := y.lease.Index
	if index <= ln.claimed || y.quest != nil && !s.server.win(y.quest, index) {
		return false
	}
	ln.claimed = index
	if y.out {
		ln.queued, ln.out = false, index
	}
	if y.asked {
		ln.found = time.Now().Add(min(y.lease.TTL, lateMessage))
	}
	if y.quest != nil && y.quest == ln.quest {
		ln.quest = nil
	}
	if y.local && ln.turn > 0 {
		ln.turn--
	} else {
		ln.turn = min(ln.waiters.Len()-1, longestTurn)
	}
	return true
}

func (s *subscriber) serveLocked(ln *line, w *waiter, what served) {
	s.removeLocked(ln, w)
	if what.lease != nil {
		what.lease.state.by = s.server
	}
	w.served <- what
}

// heldHereLocked leaves the line to those who wait for the end of a lease that one of them just got. What an attempt
// looked at before it was claimed does not count. A wake-up that came before the attempt which brought it was
// about an earlier lease: nobody can have released this one yet.
func (s *subscriber) heldHereLocked(ln *line, y yield) {
	ln.ours = true
	ln.toldLocked(s.held(y.lease))
	ln.again, ln.shy = ln.trying && y.tried == nil, false
	switch {
	case ln.trying:
	case ln.waiters.Len() > 0:
		s.restLocked(ln)
	default:
		s.clearLocked(ln)
	}
}

// hear takes the message that this member was granted a lock. One that was on its way for longer
// than the lease lasts only makes the line look, which finds the lease if it is there after all. What an ear hears that
// was closed does not count: Close and idling have left the queues, and been told what was granted.
func (s *subscriber) hear(e *ear, b *bucket, g grant) {
	if s.hearGrant(e, b, g) {
		s.events.woken(g.id, byGrant)
	}
}

// hearGrant reports whether that wakes somebody.
func (s *subscriber) hearGrant(e *ear, b *bucket, g grant) (wakes bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.heardBy[b] != e || s.life.Err() != nil {
		return false
	}
	y := yield{out: true}
	y.lease, y.exact = s.server.lease(b, g) // Now, because a line that is made later does not claim what was seen before.
	ln := s.lines[g.id]
	wakes = ln != nil && ln.first() != nil
	switch {
	case y.lease.Remaining() <= 0:
		if ln != nil {
			s.wakeLocked(ln, false)
		}
	case ln == nil && (!y.exact || time.Since(y.lease.state.got) > lateMessage):
		return false // A line that is gone may have found the grant, and a caller may hold it.
	case !s.claimLocked(ln, y):
		return false
	case s.giveLocked(ln, y):
	default:
		s.crew.Start(func() { _, _ = s.give(ln, y) }) // What is given back wakes the line.
	}
	return wakes
}

// An offer is what a release holds out to the waiters of its own process.
type offer struct {
	heir

	line  *line // nil: nobody waits
	quest *quest
}

// offer returns who is next in the process to get the lock of id. The line lasts until answer is called.
func (s *subscriber) offer(id string) offer {
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lines[id]
	if ln == nil || ln.first() == nil || s.life.Err() != nil {
		return offer{}
	}
	w := ln.first()
	q := ln.questLocked()
	o := offer{line: ln, quest: q, heir: heir{
		token: q.token, ttl: w.ttl, turn: ln.turn > 0, more: ln.waiters.Len() > 1,
	}}
	if s.hearsLocked(ln.bucket) {
		o.entry = s.entryLocked(ln, w.ttl, ln.pending == 0 && !ln.trying)
	}
	ln.pending++
	return o
}

// answer takes the answer to a release of id. Every answer but "handed to the next waiter" is a wake-up, and so is
// "granted to another" unless it says that the line is in the queue. If an attempt of unknown outcome may
// have handed the lock over, and the last has not told, the next attempt of the quest recognises it. It reports whether
// that wakes somebody.
func (s *subscriber) answer(o offer, id string, r reply, err error, maybe bool) (wakes bool) {
	ln := o.line
	if ln == nil {
		return s.wake(id, r.status == statusOpen)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err == nil:
		wakes = s.inheritLocked(o, r)
	case maybe:
		s.server.doubt(o.quest)
	}
	ln.pending--
	if maybe && o.entry != "" {
		ln.queued, ln.doubted = true, true
	}
	switch {
	case err == nil && r.status == statusHanded:
	case err == nil && r.status == statusGranted:
		ln.queued = ln.queued || r.index >= ln.out
		if r.index > ln.claimed && !ln.trying && ln.waiters.Len() > 0 {
			ln.ours = true
			ln.toldLocked(r.locked(ln.id))
			s.restLocked(ln)
		}
	default:
		wakes = wakes || ln.first() != nil
		s.wakeLocked(ln, r.status == statusOpen)
	}
	s.clearLocked(ln)
	return wakes
}

// inheritLocked takes a lease that was handed over. It reports whether that wakes
// somebody. It runs in the goroutine of Release, whose ctx may end, so it sends
// nothing: a lease that has to be renewed or given back is left to the background.
func (s *subscriber) inheritLocked(o offer, r reply) (wakes bool) {
	if r.status != statusHanded && r.status != statusTaken {
		return false
	}
	ln := o.line
	y := yield{lease: newLease(ln.id, o.quest.token, o.ttl, r), quest: o.quest, local: true, exact: r.status == statusHanded}
	y.out = y.exact && o.entry != "" && !o.more
	switch {
	case !s.claimLocked(ln, y): // The line lasts, because its answer is to come.
		s.wakeLocked(ln, false)
		return ln.first() != nil
	case s.giveLocked(ln, y):
		return true
	}
	s.crew.Start(func() { // What is given back wakes the line.
		if given, _ := s.give(ln, y); given {
			s.events.woken(ln.id, byRelease)
		}
	})
	return false
}

// answersLate waits for the answer to a release that was given up, and may have handed the lock over. It calls told
// with the answer.
func (s *subscriber) answersLate(o offer, c *call, told func(reply, error)) {
	if o.line == nil {
		s.server.late(c, told)
		return
	}
	s.mu.Lock()
	o.line.pending++
	s.mu.Unlock()
	s.server.late(c, func(r reply, err error) {
		told(r, err)
		wakes := false
		s.mu.Lock()
		if err == nil {
			wakes = s.inheritLocked(o, r)
		}
		wakes = wakes || o.line.first() != nil
		o.line.pending--
		s.wakeLocked(o.line, false)
		s.mu.Unlock()
		if wakes {
			s.events.woken(o.line.id, byRelease)
		}
	})
}

// entryLocked returns what stands for the line in the queue, and says who waits. Its ttl is that of whoever is first when it is made, and
// its number makes it differ from those before: a request to leave that comes late does not take it out. A line that
// is not in the queue, and where nothing is on its way that would enter it, gets a new one.
func (s *subscriber) entryLocked(ln *line, ttl time.Duration, still bool) string {
	if ln.entry == "" || still && !ln.queued {
		if ln.doubted {
			s.retireLocked(ln)
		}
		s.entries++
		ln.entry = fmt.Sprintf("%s %d %d", s.server.member, ttl.Milliseconds(), s.entries)
		if owner := s.server.owner; owner != "" {
			ln.entry += fmt.Sprint(" ", owner)
		}
	}
	return ln.entry
}

// leaveLocked is the turn of a line's goroutine when nobody waits. It takes the line out of the queue, so that it is not
// granted a lock for nobody, and returns true if something came up meanwhile.
func (s *subscriber) leaveLocked(ln *line) bool {
	if !ln.queued || ln.pending > 0 {
		ln.trying = false
		s.clearLocked(ln)
		return false
	}
	p, doubted := ln.retire()
	s.mu.Unlock()
	err := s.leaveOnce(ln.id, p)
	s.mu.Lock()
	if doubted {
		s.leaveLaterLocked(ln, p, patience)
	}
	if judge(err).transient() && s.life.Err() == nil {
		s.leaveLaterLocked(ln, p, 0)
	}
	return true
}

// retire returns the entry of the line, which does not use it any more: what
// enters the queue from now on has another. It reports whether a late copy of a
// request may enter the entry again.
func (ln *line) retire() (p place, doubted bool) {
	p, doubted = place{entry: ln.entry, claimed: ln.claimed}, ln.doubted
	ln.entry, ln.queued, ln.doubted = "", false, false
	return p, doubted
}

// retireLocked retires an entry that is doubted, and takes it out of the queue when
// no late copy can arrive any more. Until then a copy may be granted the lock, for
// no waiter, and the message may be lost. The leave finds that grant as well.
func (s *subscriber) retireLocked(ln *line) {
	p, _ := ln.retire()
	s.leaveLaterLocked(ln, p, patience)
}

// leaveOnce takes an entry out of the queue, and a lease that it was granted through the gate. What is given back then wakes
// the line.
func (s *subscriber) leaveOnce(id string, p place) error {
	r, err := s.server.leave(context.WithoutCancel(s.life), id, p)
	if err == nil && r.status == statusFound {
		lease := newLease(id, s.server.grantToken(r.index), r.left, r)
		_, _ = s.take(id, yield{lease: lease, asked: true})
	}
	return err
}

// leaveLaterLocked tries for a while, from after on, to take out an entry that the line does not use any more. The line
// lasts meanwhile, because it knows what was claimed. If that fails it costs those who wait a message, or nothing once
// there is no subscription.
func (s *subscriber) leaveLaterLocked(ln *line, p place, after time.Duration) {
	ln.leaving++
	s.crew.Start(func() {
		if after > 0 {
			sleep(s.life, s.life, after)
		}
		_ = repeat(s.life, s.life, time.Now().Add(cleanupTime), verdict.transient, func() error { return s.leaveOnce(ln.id, p) })
		s.mu.Lock()
		defer s.mu.Unlock()
		ln.leaving--
		s.clearLocked(ln)
	})
}
