package redfour

import (
	"context"
	"crypto/rand"
	"sync"
	"time"
)

// A quest is the attempts to get one lease, all under one token: the first that
// comes through takes the lock, and the others recognise it. So an attempt whose
// reply is late can be repeated over another connection, and one whose reply was
// lost can be repeated at all. A release that hands the lock over within the process is such
// an attempt, too: it names the token of the next waiter's quest.
type quest struct {
	id, token string
	echo      echo // of Acquire

	mu    sync.Mutex // guards what follows
	maybe bool       // an attempt whose outcome is unknown may have taken the lock, or may do so yet
	late  bool       // an attempt was given up; its outcome is still to come, or has come
	over  questEnd
	index int64 // of the last lease under the token that somebody has claimed, or gives back
}

type questEnd int

const (
	sought questEnd = iota
	won
	abandoned
)

func newQuest(id string) *quest { return &quest{id: id, token: rand.Text()} }

// try makes one attempt, and waits for it for at most d. If the attempt was given up,
// its outcome is the caller's to wait for, with late.
func (s *server) try(ctx context.Context, d time.Duration, q *quest, ttl time.Duration, p place) (reply, error) {
	r, err := s.acquire(ctx, d, q.id, q.token, ttl, p)
	if unheard(err) != nil {
		q.mu.Lock()
		q.late = true
		q.mu.Unlock()
	} else if judge(err) == unknown {
		s.doubt(q)
	}
	return r, err
}

// comesLate takes the outcome of an attempt that was given up. What it took is used
// by Acquire, or by the line, while that tries, or else given back: if the quest was
// won by another lease, no attempt looks for this one.
func (s *server) comesLate(ctx context.Context, q *quest, r reply, err error) {
	if judge(err) == unknown {
		s.doubt(q)
		return
	}
	mayHold := err == nil && (r.status == statusDone || r.status == statusAgain)
	q.mu.Lock()
	over := q.over
	q.maybe = q.maybe || mayHold && over == sought
	q.mu.Unlock()
	switch {
	case over == abandoned && mayHold:
		s.discard(ctx, q.id, q.token)
	case over == won && err == nil && r.status == statusDone && q.takes(r.index):
		s.giveBack(ctx, leaseKey{q.id, r.index, q.token})
	}
}

// doubt says that an attempt whose outcome nobody will hear may have taken the lock, or may do so yet.
func (s *server) doubt(q *quest) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.maybe = true
	s.settleLocked(q)
}

// win ends the quest by a lease that was got. It returns false if that is known already. After the first there may be another: an
// attempt that comes through late takes the lock again, and the next answer tells of that.
func (s *server) win(q *quest, index int64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over == abandoned || index <= q.index {
		return false
	}
	q.over, q.index = won, index
	s.settleLocked(q)
	return true
}

// abandon ends the quest without a lease. What an attempt has taken that was given up is
// given back now: its reply may be lost, and go-redis may wait for it for a long time.
func (s *server) abandon(q *quest) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.over == sought {
		q.over = abandoned
		q.maybe = q.maybe || q.late
	}
	s.settleLocked(q)
}

// settleLocked gives back, in the background, what the attempts of a quest that is over may have taken, or may take yet.
func (s *server) settleLocked(q *quest) {
	if !q.maybe || q.over == sought {
		return
	}
	q.maybe = false
	ctx, over := context.WithoutCancel(s.life), q.over
	s.crew.Start(func() {
		if over == abandoned {
			s.discard(ctx, q.id, q.token)
		}
		// A broken connection is noticed here before what it carried has arrived, if there is a proxy in between.
		sleep(s.life, s.life, patience)
		s.sweep(ctx, q)
	})
}

// sweep looks for a lease that an attempt has taken after its quest was over, and gives it back.
func (s *server) sweep(ctx context.Context, q *quest) {
	var r reply
	err := repeat(ctx, s.life, time.Now().Add(cleanupTime), verdict.transient, func() (err error) {
		r, err = s.look(ctx, q.id)
		return err
	})
	if err == nil && r.status == statusHeld && r.token() == q.token && q.takes(r.index) {
		s.giveBack(ctx, leaseKey{q.id, r.index, q.token})
	}
}

// takes tells whether nobody has claimed a lease, and sees to it that nobody does.
func (q *quest) takes(index int64) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if index <= q.index {
		return false
	}
	q.index = index
	return true
}

// discard releases whatever lease has this token.
func (s *server) discard(ctx context.Context, id, token string) {
	s.insist(ctx, func(ctx context.Context) (reply, error) { return s.releaseToken(ctx, id, token) })
}

// giveBack releases a lease that nobody has heard of.
func (s *server) giveBack(ctx context.Context, l leaseKey) {
	s.insist(ctx, func(ctx context.Context) (reply, error) { return s.release(ctx, l, heir{}) })
}

// cleanupTime bounds what the library does for a caller who is gone.
const cleanupTime = 5 * time.Second

// insist repeats a release for a while.
func (s *server) insist(ctx context.Context, release func(ctx context.Context) (reply, error)) {
	_ = repeat(ctx, ctx, time.Now().Add(cleanupTime), verdict.transient, func() error {
		_, err := release(ctx)
		return err
	})
}

// suit gives a lease that nobody has heard of the ttl that its taker wants.
func (s *server) suit(ctx context.Context, lease *Lease, ttl time.Duration) (*Lease, error) {
	r, err := s.renewNew(ctx, longestPatience, lease.key(), ttl)
	if err != nil {
		return nil, err
	}
	if r.status != statusDone {
		return nil, notHeld(r)
	}
	suited := newLease(lease.ID, lease.Token, ttl, r)
	suited.Immediate = lease.Immediate
	return suited, nil
}
