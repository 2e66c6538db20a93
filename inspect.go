package redfour

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// A Status is what Redis knows of one lock at one moment. The owners in it are as whoever wrote them made them: quote
// them where that matters.
type Status struct {
	ID    string
	Held  bool
	Index int64         // of the lease that holds; 0 if nobody holds, or it has none: ForceRelease would take that for any lease
	TTL   time.Duration // what is left of it, in whole milliseconds; it may be renewed
	Owner string        // what the holder calls itself, see WithOwner; "" if it does not, or is an npm client

	// Since is when the lease began, by the server's clock; zero if that is not known, as of leases of npm. It is
	// what Index says, in µs: a lease that came after another whose index was ahead of the clock looks younger by that.
	Since time.Time

	// Waiters are the owners of the Locks that stand in the queue, next first, "" for one that has none. A Lock has one
	// place, however many goroutines wait in it. One that cannot queue, or came a moment ago, is missing. The holder's Lock is there
	// only if more of its callers wait, and not always then. There are a thousand at most, and none if the user may not read the queue.
	// While the slot moves to another master of a cluster, there may be none.
	Waiters []string
}

// Inspect tells who holds the lock of id, and who waits for it. It changes nothing. A lock that nobody holds is no error.
//
// If Redis cannot be reached it tries again, within ctx and for at most 5 s. Other errors are as for [Lock.Acquire].
func (l *Lock) Inspect(ctx context.Context, id string) (Status, error) {
	r, err := l.inspect(ctx, id)
	if err != nil {
		return Status{ID: id}, wrap("inspect", id, err)
	}
	return r.inspected(id), nil
}

// inspect asks who has the lock of id, and repeats that.
func (l *Lock) inspect(ctx context.Context, id string) (reply, error) {
	if err := l.check(ctx, id, time.Millisecond); err != nil {
		return reply{}, err
	}
	l.crew.Join()
	defer l.crew.Leave()
	until := time.Now().Add(acquireTime)
	bounded, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	var r reply
	var f failures
	err := repeat(bounded, l.life, until, verdict.outOfReach, func() (err error) {
		r, err = l.server.inspect(bounded, id)
		return f.note(err)
	})
	if err != nil {
		f.maybe = false // It has no effect that could be in doubt.
		return reply{}, l.orClosed(f.sum(ctx))
	}
	return r, nil
}

// token returns the token of the lease that an inspection has found, "" if it has none.
func (r reply) token() string { return r.words[1] }

// inspected returns what an inspection has found.
func (r reply) inspected(id string) Status {
	s := Status{ID: id, Held: r.status == statusHeld, Index: r.index, TTL: r.left, Owner: r.owner()}
	if s.Held && r.token() != "" && r.index <= r.micros {
		s.Since = time.UnixMicro(r.index)
	}
	for _, entry := range r.words[2:] {
		owner := ""
		if words := strings.SplitN(entry, " ", 4); len(words) == 4 {
			owner = words[3]
		}
		s.Waiters = append(s.Waiters, owner)
	}
	return s
}

// ForceRelease ends a lease that is not the caller's, if its index is the given one, or whichever it is if index is 0. The
// lock then goes to the next waiter. It is for people who know that the holder is gone, or stuck.
//
// The holder is not asked, and may still be at work, also if it is in this process: its next renewal or release reports [ErrConflict]
// or [ErrExpired], and a context that is kept alive ends with it, after a third of the ttl, or at its deadline if it cannot reach Redis. Until then both may be in
// their sections, unless what they change refuses the older index. So may a waiter to whom the lease was on its way. A lease of npm can be ended as well.
//
// If nobody holds the lock, the error matches [ErrExpired]; if another lease does, or the one that holds has an index other than the
// given one, [ErrConflict]. With index 0 a lease that has ended meanwhile is a success, and never are two ended. Otherwise the errors are
// those of [Lock.Release].
func (l *Lock) ForceRelease(ctx context.Context, id string, index int64) error {
	return wrap("force release", id, l.forceRelease(ctx, id, index))
}

func (l *Lock) forceRelease(ctx context.Context, id string, index int64) error {
	if index < 0 {
		return fmt.Errorf("negative index %d", index)
	}
	r, err := l.inspect(ctx, id)
	switch {
	case err != nil:
		return err
	case r.status != statusHeld:
		return fmt.Errorf("nobody holds it: %w", ErrExpired)
	case r.index == 0:
		return &keyError{key: l.server.bucket(id).lock(id), kind: "hash without index"}
	case index != 0 && r.index != index:
		return fmt.Errorf("index %d does not hold (%s): %w", index, r.locked(id).Error(), ErrConflict)
	}
	forced := &release{
		l: l, key: leaseKey{id, r.index, r.token()}, state: &leaseState{deadline: r.sent.Add(r.left)}, began: time.Now(),
	}
	err = forced.run(ctx)
	// The cause of ctx may be another lease's loss. Then err matches ctx.Err() as well.
	if index == 0 && errors.Is(err, ErrNotHeld) && (ctx.Err() == nil || !errors.Is(err, ctx.Err())) {
		return nil
	}
	return err
}
