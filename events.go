package redfour

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"
)

// Stats is what a [Lock] has counted since it was made. All but Waiting and KeptAlive only grow, so that the
// difference of two Stats is what happened between them. Fields are read one by one: while calls run, one may be ahead
// of another. A lease that is held without KeepAlive is in no count until it is released.
type Stats struct {
	Waiting   int // callers of WaitAcquire and WithLock that wait now
	KeptAlive int // leases that are kept alive now, by WithLock or KeepAlive

	AtOnce    int64         // leases that did not have to be waited for: those with Lease.Immediate
	AfterWait int64         // leases that were waited for
	WaitTime  time.Duration // from the calls of WaitAcquire and WithLock to the leases of AfterWait, in all
	FoundHeld int64         // calls of Acquire that found the lock held
	TimedOut  int64         // calls of Acquire, WaitAcquire and WithLock whose ctx had ended, by a timeout or otherwise, before they got the lock
	Failed    int64         // the same calls that ended with any other error, ErrClosed included

	Released int64         // leases whose Release succeeded, that of WithLock included, and that of leases WithReplicas could not confirm
	HoldTime time.Duration // from the grant of these leases, where that was in this process, to their Release, in all
	Lost     int64         // leases that were found not to hold: by a renewal, by a release, or because their deadline passed
	Forced   int64         // leases of others that ForceRelease has ended

	Renewals       int64         // attempts to renew, by Renew or in the background, that succeeded
	RenewalsFailed int64         // attempts that did not, those that found the lease lost included; not those that a release cut short
	RenewalsLate   time.Duration // by how much those in the background that succeeded came after a third of the ttl, in all

	// How often the waiters of one id in this Lock were woken, to look at the lock or to get it, because…
	WokenByRelease      int64 // … a lease was released in this Lock
	WokenByGrant        int64 // … a message said that another process handed the lock to this Lock
	WokenByMessage      int64 // … a message said that the lock was released
	WokenByTimer        int64 // … the holder's lease should have ended, 30 s had passed, or an attempt had failed
	WokenBySubscription int64 // … a subscription was confirmed, the first included

	GrantsClaimed int64 // leases that another process handed to this Lock, by a message or found by asking
	Returned      int64 // leases that came when no caller waited any more, or when their ttl was over, and were given back

	Subscriptions     int64 // that were confirmed, the first included
	SubscriptionsLost int64 // that ended by themselves, and not because nobody waited any more: so often the Lock had to reconnect

	Unauthenticated int64 // outages in which Redis refused the password, or wanted one; one outage is over after 30 s without

	Scripts    int64 // sent to Redis, each time that it was sent; neither subscriptions nor their pings are in it
	RoundTrips int64 // in which they travelled, alone or in a batch
	Batches    int64 // round trips with more than one: of (Scripts-RoundTrips+Batches)/Batches on average
}

// Stats returns what l has counted so far. It sends nothing.
func (l *Lock) Stats() Stats {
	l.mu.Lock()
	kept := len(l.keepers)
	l.mu.Unlock()
	s := l.events.stats()
	s.Waiting, s.KeptAlive = l.subscriber.waiting(), kept
	return s
}

// A Trace is told what happens in a [Lock], as it happens. Any of its functions may be nil. See [WithTrace].
//
// A ctx has the values of the call's, or none for a renewal in the background. An err is nil if the call succeeded, and matches
// what the call returned if not.
type Trace struct {
	// Acquired is called before Acquire, WaitAcquire and WithLock return, or run the function. The call had begun at began. If err is not
	// nil, lease is. The lease runs meanwhile; that of WithLock is already renewed.
	Acquired func(ctx context.Context, id string, began time.Time, lease *Lease, err error)

	// Renewed is called after each attempt to renew, at began, by Renew or in the background. Late is by how much an attempt in the
	// background came after its time, a third of the ttl; 0 for Renew. One that a release cut short is not reported.
	Renewed func(ctx context.Context, id string, index int64, began time.Time, late time.Duration, err error)

	// Released is called when a Release has ended: before it returns, or afterwards if its caller did not wait. Held is
	// for how long the lease was held since it was granted in this process; 0 if that was elsewhere. ForceRelease is not reported.
	Released func(ctx context.Context, id string, index int64, began time.Time, held time.Duration, err error)

	// Lost is called once for a lease that was found not to hold, though this process has not released it. Err matches ErrNotHeld. Whoever
	// works on the lease has been told by then.
	Lost func(id string, index int64, err error)

	// Woken is called when the waiters of an id are woken: by "release" (in this Lock), "grant", "message" (of a release
	// elsewhere), "timer" or "subscription".
	Woken func(id string, by string)

	// Subscribed is called when the Lock is told of releases and grants, for the first time or again, by the server
	// at addr. That is "" where there is one master.
	Subscribed func(addr string)

	// Unsubscribed is called when that has ended by itself: not because nobody waits any more, nor because the user may not queue any more.
	Unsubscribed func(addr string, err error)
}

// WithTrace makes a [Lock] call the functions of t. Given twice, the last counts.
//
// They are called by whatever goroutine made it happen, several at a time, and while no mutex of the library is held: they may
// use the Lock. But it waits for them. One that blocks holds up the call that it is told of, and [Lock.Close]; the end of a kept-alive context it
// does not. A Woken, Subscribed or Unsubscribed that blocks may hold up all waiters of the Lock, and the Release that woke one; what other
// processes hand to the Lock meanwhile nobody has until its ttl ends. So these must not wait for a lock. A function that panics in a
// goroutine of the library ends the program, as it does anywhere; if the panic of an Acquired is recovered, its lease lasts for its ttl, but for
// that of WithLock.
func WithTrace(t Trace) Option {
	return func(c *config) error {
		c.trace = t
		return nil
	}
}

// events are where a Lock notes what happens: it counts, tells the trace, and logs what an operator must see. Its methods
// that tell are called without a mutex.
type events struct {
	counts counts
	trace  Trace
	log    *slog.Logger
	denied atomic.Pointer[time.Time] // when Redis last refused the password
}

// counts are the fields of Stats that grow, durations in nanoseconds.
type counts struct {
	atOnce, afterWait, waitTime, foundHeld, timedOut, failed atomic.Int64
	released, holdTime, lost, forced                         atomic.Int64
	renewals, renewalsFailed, renewalsLate                   atomic.Int64
	woken                                                    [len(wakeups)]atomic.Int64
	grantsClaimed, returned                                  atomic.Int64
	subscriptions, subscriptionsLost, unauthenticated        atomic.Int64
	scripts, roundTrips, batches                             atomic.Int64
}

func (e *events) stats() Stats {
	c := &e.counts
	return Stats{
		AtOnce: c.atOnce.Load(), AfterWait: c.afterWait.Load(), WaitTime: time.Duration(c.waitTime.Load()),
		FoundHeld: c.foundHeld.Load(), TimedOut: c.timedOut.Load(), Failed: c.failed.Load(),
		Released: c.released.Load(), HoldTime: time.Duration(c.holdTime.Load()), Lost: c.lost.Load(), Forced: c.forced.Load(),
		Renewals: c.renewals.Load(), RenewalsFailed: c.renewalsFailed.Load(), RenewalsLate: time.Duration(c.renewalsLate.Load()),
		WokenByRelease: c.woken[byRelease].Load(), WokenByGrant: c.woken[byGrant].Load(), WokenByMessage: c.woken[byMessage].Load(),
		WokenByTimer: c.woken[byTimer].Load(), WokenBySubscription: c.woken[bySubscription].Load(),
		GrantsClaimed: c.grantsClaimed.Load(), Returned: c.returned.Load(),
		Subscriptions: c.subscriptions.Load(), SubscriptionsLost: c.subscriptionsLost.Load(),
		Unauthenticated: c.unauthenticated.Load(),
		Scripts:         c.scripts.Load(), RoundTrips: c.roundTrips.Load(), Batches: c.batches.Load(),
	}
}

// A wakeup is why waiters look at their lock, or get it.
type wakeup int

const (
	byRelease wakeup = iota
	byGrant
	byMessage
	byTimer
	bySubscription
)

var wakeups = [...]string{byRelease: "release", byGrant: "grant", byMessage: "message", byTimer: "timer", bySubscription: "subscription"}

// acquired notes how a call to get a lease ended that had begun at began.
func (e *events) acquired(ctx context.Context, id string, began time.Time, lease *Lease, err error) {
	switch {
	case err == nil && lease.Immediate:
		e.counts.atOnce.Add(1)
	case err == nil:
		e.counts.afterWait.Add(1)
		e.counts.waitTime.Add(int64(time.Since(began)))
	case ctx.Err() != nil:
		e.counts.timedOut.Add(1)
	case errors.Is(err, ErrLocked):
		e.counts.foundHeld.Add(1)
	default:
		e.counts.failed.Add(1)
	}
	if e.trace.Acquired != nil {
		e.trace.Acquired(ctx, id, began, lease, err)
	}
}

// renewed notes an attempt to renew, which was due so long before.
func (e *events) renewed(ctx context.Context, key leaseKey, began time.Time, late time.Duration, err error) {
	if err == nil {
		e.counts.renewals.Add(1)
		e.counts.renewalsLate.Add(int64(late))
	} else {
		e.counts.renewalsFailed.Add(1)
	}
	if e.trace.Renewed != nil {
		e.trace.Renewed(ctx, key.id, key.index, began, late, err)
	}
}

// released notes how a release ended, and whether it was the one that ended the lease.
func (e *events) released(ctx context.Context, key leaseKey, began time.Time, held time.Duration, err error, ended bool) {
	if ended {
		e.counts.released.Add(1)
		e.counts.holdTime.Add(int64(held))
	}
	if e.trace.Released != nil {
		e.trace.Released(ctx, key.id, key.index, began, held, err)
	}
}

// forced notes how the release of somebody else's lease ended.
func (e *events) forced(err error) {
	if err == nil {
		e.counts.forced.Add(1)
	}
}

// lost notes that a lease does not hold.
func (e *events) lost(key leaseKey, why error) {
	e.counts.lost.Add(1)
	e.log.Warn("redfour: lease lost: its section may have overlapped with another", "id", key.id, "index", key.index, "error", why)
	if e.trace.Lost != nil {
		e.trace.Lost(key.id, key.index, why)
	}
}

// woken notes that the waiters of an id were woken.
func (e *events) woken(id string, by wakeup) {
	e.counts.woken[by].Add(1)
	if e.trace.Woken != nil {
		e.trace.Woken(id, wakeups[by])
	}
}

// subscribed notes that a subscription was confirmed, after another was lost if it says so.
func (e *events) subscribed(addr string, again bool) {
	e.counts.subscriptions.Add(1)
	if again {
		e.log.Info("redfour: subscribed again", at(addr)...)
	}
	if e.trace.Subscribed != nil {
		e.trace.Subscribed(addr)
	}
}

// unsubscribed notes that a subscription has ended of itself.
func (e *events) unsubscribed(addr string, err error) {
	e.counts.subscriptionsLost.Add(1)
	e.log.Warn("redfour: subscription lost: waiters are woken late, or by nothing but timers, until there is another", append(at(addr), "error", err)...)
	if e.trace.Unsubscribed != nil {
		e.trace.Unsubscribed(addr, err)
	}
}

// at returns what is logged of a server: nothing where there is one.
func at(addr string) []any {
	if addr == "" {
		return nil
	}
	return []any{"addr", addr}
}

// fellBack notes that the lock is not handed over any more, but raced for.
func (e *events) fellBack(why string) {
	e.log.Warn("redfour: waiters cannot queue: a release wakes everybody, and whoever is first gets the lock", "reason", why)
}

// unauthenticated notes that Redis refused the password, once for each outage: calls and
// subscriptions try again, every 2 s at least, and all of them meet it.
func (e *events) unauthenticated(err error) {
	now := time.Now()
	if last := e.denied.Swap(&now); last != nil && now.Sub(*last) < deniedPause {
		return
	}
	e.counts.unauthenticated.Add(1)
	e.log.Warn("redfour: Redis refuses the password: calls and subscriptions try again", "error", err)
}

// sent notes a round trip with so many scripts.
func (e *events) sent(scripts int) {
	e.counts.scripts.Add(int64(scripts))
	e.counts.roundTrips.Add(1)
	if scripts > 1 {
		e.counts.batches.Add(1)
	}
}
