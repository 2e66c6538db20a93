// Package redfour runs a section of code in one process at a time across a fleet,
// by a lock on Redis that a release hands to the next waiter.
//
//	err := lock.WithLock(ctx, "token:42", 10*time.Second, func(ctx context.Context, lease *redfour.Lease) error {
//		return refreshIfExpired(ctx)
//	})
//
// [Lock.WithLock] is the way to use it. [Lock.Acquire], [Lock.WaitAcquire],
// [Lock.Renew], [Lock.Release] and [Lock.KeepAlive] are its parts, for leases that
// outlive a function or travel to another process.
//
// # Guarantees
//
// A lock is a lease: it ends after its ttl unless it is renewed, so that a holder
// that died does not hold it for ever. While Redis keeps its data, at
// most one lease of an id holds in Redis at any time, and [Lease.Deadline] never
// promises more than Redis keeps, if the rates of their clocks differ by at most
// 1000 ppm, this host was not suspended, and nobody elsewhere renews the lease for less
// or ends it. But nothing stops a holder that is
// frozen, or slow to notice, from working on after its deadline. Nor does
// anything here help when Redis loses the lease: by a failover to a replica that had
// not received it, a restart without its data, an eviction or a FLUSHALL. [WithReplicas] makes the first
// rarer. What must not be done twice in such a case needs fencing.
//
// A lost reply changes nothing: every script may be repeated safely, and is. An error
// that is not about the lock never matches [ErrLocked] or [ErrNotHeld]; from Acquire,
// Renew and Release its text says "outcome unknown" if the call may have had its
// effect. A caller whose context ends returns at once (from Release within 100 ms, from
// WithLock when its function has returned), and what an attempt to acquire may still
// bring is given back in the background. The gaps: a request that the network
// delays for a second beyond all of that takes the lock for nobody, for one ttl. A process that is frozen when it is
// handed the lock holds it for one ttl, too.
//
// # Waiting
//
// A release hands the lock over: to the next waiter of the same [Lock], or to the first Lock in a queue
// in Redis, in the same script. So the waiters of one id in one Lock are served first come, first
// served, and cost Redis no more than one would. Between Locks it goes round: one that has its turn serves
// its first waiter and up to 16 more, if they were waiting then. Each Lock keeps one subscription
// while it waits, whatever the number of ids; a Lock whose subscription is gone is skipped.
//
// Waiting does not depend on messages: each id also looks at its lock when the holder's lease
// ends, after every reconnection, and every 30 s, so that without any message it works, more slowly and
// without an order. Waiting holds no connection of the client's pool.
//
// # Fencing
//
// [Lease.Index] grows with every lease of an id. A resource that remembers the
// highest index that it has seen, and refuses a lower one, is safe from a
// holder that came back too late; the README has an example in SQL. The index is
// at least the server's time in microseconds, so that it keeps growing when the
// counter in Redis is lost, as long as the new server's clock, or somebody who has
// seen the last index, is not behind.
//
// # Cluster
//
// With a [*redis.ClusterClient] the ids of a namespace are spread over 256 slots, and so over all masters; what belongs to
// an id is in one slot. A namespace with a hash tag, such as "{orders}", stays in that one slot. A Lock
// keeps a subscription for each master that has locks it waits for. While a slot moves, a free lock in it cannot be taken: Acquire
// returns an error if that lasts for longer than 5 s, and waiters are served once the slot has moved. Renew and Release
// work meanwhile, but a release may hand the lock to no waiter. A master that dies
// costs waiters the time until a replica is promoted, and a moment. The same goes for a client made by
// redis.NewFailoverClient, which follows a Sentinel failover. See Guarantees for what
// a failover can lose. The names of the keys are not those outside a cluster, nor those of npm ioredfour in
// a cluster. So all clients of a namespace must be of one kind, even where a server
// takes both kinds (Redis Enterprise, Dragonfly): two kinds make two holders. In a namespace
// with a hash tag both kinds have the same keys, and exclude each other, but do not wake
// each other. Redis 6 has no channels that belong to a slot: there, releases wake everybody who waits, and whoever is first wins.
//
// # npm redfour
//
// Locks are shared with the npm packages redfour (1.x and 2.x) and, outside
// Cluster, ioredfour: each side waits for, takes, renews and releases beside the
// other, in the same namespace. They know of no queue: while they listen, every 64th hand-over
// is left to them. The object that they return decodes into a [Lease]. Leases
// of theirs have no token, so their index alone proves ownership; and their
// indexes grow only while the counter survives.
package redfour

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/redis/go-redis/v9"

	"github.com/redfour-go/redfour/internal/crew"
)

// ErrLocked says that another lease holds the lock. [Lock.Acquire] returns it
// as a [*LockedError], which says for how long.
var ErrLocked = errors.New("held by another lease")

// ErrNotHeld says that the caller's lease holds no longer: the section that it
// protected may have overlapped with another. [ErrExpired] and [ErrConflict],
// which match it, say what Redis has instead. [ErrMaxHold] matches it too. A call whose context ended because
// another lease was lost matches them too, by its cause.
var ErrNotHeld = errors.New("lease not held")

// ErrExpired says that the lease ran out, was released already, was ended by [Lock.ForceRelease], or was lost with the
// server's data. From [Lock.Renew] and [Lock.Release] it means that nobody holds the
// lock; from a context that was kept alive, that the deadline passed without an answer
// may be all that is known. It matches [ErrNotHeld]. A caller of [Lock.Release] who
// does not mind a possible overlap can ignore it.
var ErrExpired error = &notHeldError{"lease expired"}

// ErrConflict says that another lease holds the lock, and was left alone. It
// matches [ErrNotHeld].
var ErrConflict error = &notHeldError{"lease superseded by another"}

// ErrMaxHold says that a lease was kept alive for as long as [WithMaxHold] allows. It
// ends the context of [Lock.KeepAlive] and of a section, whose [Lock.WithLock] returns it
// as well. It matches [ErrNotHeld]: the section may overlap with another if it goes on.
var ErrMaxHold error = &notHeldError{"lease held for as long as allowed"}

// ErrNotReplicated says that the lock was got, but that not enough replicas are known to have acknowledged it
// in the time that [WithReplicas] gives them. The lease is given back in the background.
var ErrNotReplicated = errors.New("not acknowledged by enough replicas")

// ErrClosed says that the [Lock] was closed.
var ErrClosed = errors.New("lock closed")

// errReleased ends the contexts that were kept alive for a lease which the
// caller released meanwhile. It is no loss, so it does not match [ErrExpired].
var errReleased error = &notHeldError{"lease released"}

type notHeldError struct{ text string }

func (e *notHeldError) Error() string { return e.text }
func (e *notHeldError) Unwrap() error { return ErrNotHeld }

// A LockedError tells who holds a lock, as of the last answer from Redis. It
// matches [ErrLocked].
type LockedError struct {
	ID    string        // the lock's id, as passed to Acquire
	Index int64         // the holder's fencing token; 0 if its lease has none
	TTL   time.Duration // what was left of the holder's lease; it may be renewed
	Owner string        // what the holder calls itself, see WithOwner, as it stands in Redis; "" if it does not, or is an npm client
}

// Error says who holds the lock, for how long, and the index.
func (e *LockedError) Error() string {
	by := "another lease"
	switch {
	case e.Owner == "":
	case checkOwner(e.Owner) != nil:
		by = quote(e.Owner) // not by this library
	default:
		by = e.Owner
	}
	return fmt.Sprintf("held by %s, index %d, %v left", by, e.Index, e.TTL)
}

// Unwrap returns [ErrLocked].
func (e *LockedError) Unwrap() error { return ErrLocked }

// A Lock takes, renews and releases the locks of one namespace on one Redis. A
// process needs one for each namespace, not one for each id. It is safe for
// concurrent use. Make it with [New] or [Open]; [Lock.Close] it.
//
// A Lock that does nothing keeps no goroutine: the last ends within a second of the
// last call, or of what is still cleaned up for it. Where a call waited, the
// subscription stays for 10 s more, in case that others wait.
type Lock struct {
	server      *server
	subscriber  *subscriber
	events      *events
	crew        *crew.Crew
	replication replication             // of every lease, before it is returned
	maxHold     time.Duration           // of leases that are kept alive; 0: no bound
	owned       redis.UniversalClient   // closed by Close, unless nil
	life        context.Context         //nolint:containedctx // The Lock's own life, no request's.
	end         context.CancelCauseFunc // of life

	mu       sync.Mutex // guards what follows
	closed   bool
	drained  bool                 // Close has waited
	sections int                  // WithLocks and Releases that run, and need the client
	keepers  map[leaseKey]*keeper // leases that are kept alive
}

// New returns a Lock that works through the given client, which the caller
// keeps and closes after the Lock. Any [redis.Options] do, the smallest pool
// included. All clients of a namespace use the same DB, because a lock in one
// does not exclude that in another. Only a ReadTimeout that is switched off is dangerous, because
// go-redis then never gives up on a connection that has died silently.
// Connections of the pool that have died silently cost a call about a second,
// however many they are: the Lock pings the idle ones when an answer is missing,
// and go-redis closes those that do not answer.
//
// Calls that are made at the same time share round trips, in pipelines of go-redis: hooks of the client see them there, without
// the values of the callers' contexts. A call that is alone is a command, with those values.
// The first attempt of WaitAcquire and WithLock has them too, if no other caller
// of this Lock waits for the id. Later attempts serve every waiter of the id,
// and have no values; nor has what is cleaned up after a wait. The
// second of the Args of a command, the hash of a script or its source, is an [encoding.BinaryMarshaler] and
// a [fmt.Stringer]: go-redis asks for its bytes when it writes the command. A call that fails
// before that is known not to have run. So a hook that sends a command in a way of its own
// has to take these bytes.
//
// The commands are no [*redis.Cmd], though they have its methods: that type can't tell go-redis
// to send a script only once. A hook that asserts cmd.(*redis.Cmd) without a check panics. It
// can use cmd.Name, cmd.Args and cmd.Err, and read a reply by an interface, as
// cmd.(interface{ Result() (any, error) }).
//
// A hook may prefix the keys of the scripts, if it does so in every client of the namespace. Channels
// keep their names.
//
// The client is a [*redis.Client], made by redis.NewClient or, for Sentinel, by
// redis.NewFailoverClient, or a [*redis.ClusterClient] of a real cluster. New returns an
// error for every other client and for an invalid option; it sends nothing. It refuses
// a ClusterClient whose options have ClusterSlots, such as that of
// redis.NewFailoverClusterClient: its key names would differ from those of other
// clients of the same server.
func New(client redis.UniversalClient, opts ...Option) (*Lock, error) {
	if err := checkClient(client); err != nil {
		return nil, fmt.Errorf("redfour: new: %w", err)
	}
	c, err := newConfig(opts)
	if err != nil {
		return nil, fmt.Errorf("redfour: new: %w", err)
	}
	if err := c.replication.check(client); err != nil {
		return nil, fmt.Errorf("redfour: new: %w", err)
	}
	if _, ok := client.(*redis.ClusterClient); ok {
		if err := checkLayout(c.namespace); err != nil {
			return nil, fmt.Errorf("redfour: new: %w", err)
		}
	}
	// The Lock outlives the request in which it happens to be made.
	life, end := context.WithCancelCause(context.Background()) //nolint:forbidigo // See above.
	goroutines := new(crew.Crew)
	e := &events{trace: c.trace, log: c.log.With("namespace", c.namespace)}
	s := newServer(life, client, c, goroutines, e)
	return &Lock{
		server:      s,
		subscriber:  newSubscriber(life, s, goroutines, e),
		events:      e,
		crew:        goroutines,
		replication: c.replication,
		maxHold:     c.maxHold,
		life:        life,
		end:         end,
		keepers:     make(map[leaseKey]*keeper),
	}, nil
}

func checkClient(client redis.UniversalClient) error {
	switch c := client.(type) {
	case nil:
		return errors.New("nil client")
	case *redis.Client:
		if c == nil {
			return errors.New("nil *redis.Client")
		}
		return nil
	case *redis.ClusterClient:
		if c == nil {
			return errors.New("nil *redis.ClusterClient")
		}
		if c.Options().ClusterSlots != nil {
			// Such a client spreads the keys over slots where its neighbours, on the same server, do not.
			return errors.New("a *redis.ClusterClient with ClusterSlots is not supported: on a server that is no " +
				"cluster its locks have other keys than those of other clients, so that one lock gets two holders; " +
				"use redis.NewFailoverClient for Sentinel, redis.NewClient for one server, " +
				"or redis.NewClusterClient without ClusterSlots for a cluster")
		}
		return nil
	case *redis.Ring:
		return errors.New("*redis.Ring is not supported: it moves a key to another shard " +
			"while the old one may still be alive, so that one lock gets two holders")
	}
	return fmt.Errorf("%T is not supported: want a *redis.Client or a *redis.ClusterClient", client)
}

// Open is [New] with a client of its own, made from a URL as redis.ParseURL
// understands it: redis://…, rediss://… (TLS) or unix://…, with
// user, password, database and options. [Lock.Close] closes the client. Open
// connects to nothing yet. Its errors do not repeat the URL, which may
// contain a password.
func Open(rawURL string, opts ...Option) (*Lock, error) {
	o, err := redis.ParseURL(rawURL)
	if err != nil {
		// A "/", "?" or "#" in a password that is not escaped makes a path, a query or a fragment of the rest, which
		// would be quoted.
		_, malformed := errors.AsType[*url.Error](err)
		if _, rest, _ := strings.Cut(rawURL, "://"); malformed || strings.Contains(rest[strings.IndexAny(rest+"/", "/?#"):], "@") {
			err = errors.New("malformed URL")
		}
		return nil, fmt.Errorf("redfour: open: %w", err)
	}
	client := redis.NewClient(o)
	l, err := New(client, opts...)
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	l.owned = client
	return l, nil
}

// acquireTime is for how long Acquire tries to reach Redis.
const acquireTime = 5 * time.Second

// Acquire tries once to take the lock of id for ttl, and does not wait for a
// holder. The ttl is at least 1 ms, and is rounded down to whole milliseconds. A ttl
// of a few ms is mostly over when the reply arrives (see [Lease.Deadline]). The id
// is non-empty valid UTF-8; any content is fine.
//
// While others wait, a release hands the lock to them and it is never free, so that Acquire finds it
// held: use [Lock.WaitAcquire] to have a turn.
//
// A release may also hand the lock to a waiter whose context has just ended, while
// its request to leave the queue is on the way. That process gives the lock back
// at once, but until then, for a round trip or two, Acquire finds it
// held. A [Lock.WaitAcquire] with a short ctx waits for that.
//
// A lease need not be released: a cron job that is to run once in the fleet takes the
// lock for longer than the hosts' clocks differ, treats [ErrLocked] as "done
// elsewhere", and lets the lease run out.
//
// If the lock is held it returns a [*LockedError]. If Redis cannot be reached or refuses
// the password it tries again, within ctx and for at most 5 s, and then returns the last error,
// which matches neither [ErrLocked] nor [ErrNotHeld]. What Redis refuses for
// another reason (it is full, it cannot save, it lacks replicas) is an error at once, and so
// is what the Limiter of the client's options refuses: a circuit breaker is there to make
// calls fail fast. Release, Renew and waits try again after it. If ctx
// ends, the error matches ctx.Err() and context.Cause(ctx). A lease that such a
// call may still bring is released in the background.
// If Redis granted the lock so late that the ttl was over, the lease is
// released and the error matches [ErrExpired]. A key under the lock's name that
// is not a lock, or never expires, is an error that names it. With [WithReplicas] a lease that could not be
// confirmed is an error that matches [ErrNotReplicated], or as for [Lock.Renew] if it was lost meanwhile.
func (l *Lock) Acquire(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	began := time.Now()
	err := l.checkAcquire(ctx, id, ttl)
	var lease *Lease
	if err == nil {
		lease, err = l.acquire(ctx, id, ttl.Truncate(time.Millisecond))
	}
	err = wrap("acquire", id, err)
	l.events.acquired(ctx, id, began, lease, err)
	return lease, err
}

// acquire repeats an attempt under one token, so that the one whose reply was
// lost is recognised by the next.
func (l *Lock) acquire(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	l.crew.Join() // Close waits until it is certain that nothing stays behind
	defer l.crew.Leave()
	if l.life.Err() != nil {
		return nil, ErrClosed // it may not have waited for this
	}
	until := time.Now().Add(acquireTime)
	q := newQuest(id)
	var r reply
	var f failures
	err := repeat(ctx, l.life, until, verdict.outOfReach, func() (err error) {
		r, err = q.echo.during(ctx, func(ctx context.Context) (reply, error) {
			r, err := l.server.try(ctx, time.Until(until), q, ttl, place{})
			if c := unheard(err); c != nil {
				l.server.late(c, func(r reply, err error) {
					r = r.lasting(ttl)
					q.echo.take(r, err)
					l.server.comesLate(context.WithoutCancel(ctx), q, r, err)
				})
			}
			return r, err
		})
		return f.note(err)
	})
	if err != nil {
		l.server.abandon(q)
		return nil, l.orClosed(f.sum(ctx))
	}
	if r.status == statusHeld {
		l.server.abandon(q)
		return nil, r.locked(id)
	}
	lease := newLease(id, q.token, ttl, r)
	lease.state.by = l.server
	l.server.win(q, lease.Index)
	if lease.Remaining() <= 0 {
		l.events.counts.returned.Add(1)
		l.crew.Start(func() { l.server.giveBack(context.WithoutCancel(ctx), lease.key()) })
		return nil, errLate(ttl)
	}
	lease.Immediate = true
	if l.replication.replicas > 0 {
		return l.confirm(ctx, lease, until)
	}
	return lease, nil
}

// orClosed adds to the error of a call that Close may have ended that it did.
func (l *Lock) orClosed(err error) error {
	if l.life.Err() == nil || errors.Is(err, ErrNotHeld) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrClosed, err)
}

// errLate says that a lease was over before the caller heard of it.
func errLate(ttl time.Duration) error {
	return fmt.Errorf("granted too late for a ttl of %v: %w", ttl, ErrExpired)
}

// An echo is the first answer that comes from the attempts of a call that it has given up. It ends the attempt
// that is made then, and takes its place. The zero echo is ready.
type echo struct {
	mu     sync.Mutex // guards what follows
	tried  bool
	answer *reply             // nil before it comes
	stop   context.CancelFunc // ends the attempt that is made; nil for the first
}

// during makes an attempt, with a ctx that ends when the echo comes. It returns the echo instead of an error.
func (e *echo) during(ctx context.Context, try func(context.Context) (reply, error)) (reply, error) {
	e.mu.Lock()
	if e.answer != nil {
		defer e.mu.Unlock()
		return *e.answer, nil
	}
	if e.tried { // Before the first has been given up there is no echo.
		ctx, e.stop = context.WithCancel(ctx)
		defer e.stop()
	}
	e.tried = true
	e.mu.Unlock()
	r, err := try(ctx)
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil && e.answer != nil {
		return *e.answer, nil
	}
	return r, err
}

// take takes the outcome of an attempt that was given up.
func (e *echo) take(r reply, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if err != nil || e.answer != nil {
		return
	}
	e.answer = &r
	if e.stop != nil {
		e.stop()
	}
}

// failures are the errors of the attempts that one call made.
type failures struct {
	last  error // what Redis, or the way there, said last; nil if that was nothing
	final error // of the last attempt
	maybe bool  // one of them may have run
}

// note adds the error of an attempt, and returns it.
func (f *failures) note(err error) error {
	f.final = err
	v := judge(err)
	f.maybe = f.maybe || v == unknown
	// That the library's bound or the caller's ctx ended says nothing about Redis.
	_, givenUp := errors.AsType[*givenUpError](err)
	ended := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
	if e, ok := errors.AsType[*unsentError](err); ok {
		v = judge(e.why)
	}
	if !givenUp && (v != unknown || !ended) {
		f.last = err
	}
	return err
}

// sum says why the call failed, whether something may have happened all the same,
// and that ctx ended where it did.
func (f *failures) sum(ctx context.Context) error {
	err := f.last
	switch v := judge(f.final); {
	case v == lost:
		return f.final
	case err == nil:
		err = errNoAnswer
	}
	if f.maybe {
		err = fmt.Errorf("outcome unknown: %w", err)
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w: %w", contextError(ctx), err)
	}
	return err
}

// check refuses what no call can work with, and calls that come too late.
func (l *Lock) check(ctx context.Context, id string, ttl time.Duration) error {
	if err := checkID(id); err != nil {
		return err
	}
	if ttl < time.Millisecond {
		return fmt.Errorf("ttl %v is shorter than 1ms", ttl)
	}
	if ctx.Err() != nil {
		return contextError(ctx)
	}
	if l.life.Err() != nil {
		return ErrClosed
	}
	return nil
}

func checkID(id string) error {
	if id == "" {
		return errors.New("empty id")
	}
	if !utf8.ValidString(id) {
		return errors.New("id is not valid UTF-8")
	}
	return nil
}

// wrap names the operation and the id in an error, once, where the call returns.
func wrap(op, id string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("redfour: %s %s: %w", op, quote(id), err)
}

// WaitAcquire takes the lock of id for ttl, and waits for it until ctx ends. The
// waiters of one id in one Lock are served first come, first served; between Locks
// it goes round (see Waiting above). [Lease.Immediate] tells
// whether the first attempt got it, which is one round trip. The ttl and the id are
// as for [Lock.Acquire].
//
// While it waits, Redis may be unreachable, restart or refuse writes:
// WaitAcquire tries again. It returns early, with the error, only for what
// waiting cannot mend: missing permissions, a closed client, a key under the
// lock's name that is not a lock, a password that Redis has refused for 5 s. A password that
// comes from a credentials provider of the client's options may be right later, and
// is tried again until ctx ends. With [WithReplicas] it also ends with the first lease that could not be
// confirmed, with the errors of [Lock.Acquire]. If ctx ends, the error matches
// ctx.Err() and context.Cause(ctx), and also: [ErrLocked] and [*LockedError] if
// the lock was held; or the last error of Redis if there was one. A lease that arrives
// after ctx has ended goes to the next waiter, or back to Redis in the background.
func (l *Lock) WaitAcquire(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	began := time.Now()
	lease, err := l.waitUntold(ctx, id, ttl)
	l.events.acquired(ctx, id, began, lease, err)
	return lease, err
}

// waitUntold is WaitAcquire, which nobody is told of yet. The frames of those who wait for long are as much of their memory as the
// rest, so what is not needed meanwhile stands in functions of its own.
func (l *Lock) waitUntold(ctx context.Context, id string, ttl time.Duration) (lease *Lease, err error) {
	if err = l.checkAcquire(ctx, id, ttl); err == nil && l.replication.replicas == 0 {
		lease, err = l.subscriber.wait(ctx, id, ttl.Truncate(time.Millisecond))
	} else if err == nil {
		lease, err = l.waitConfirmed(ctx, id, ttl.Truncate(time.Millisecond))
	}
	if err != nil {
		return nil, wrap("wait for", id, err)
	}
	return lease, nil
}

// checkAcquire refuses what no lease can be got for.
func (l *Lock) checkAcquire(ctx context.Context, id string, ttl time.Duration) error {
	if err := l.check(ctx, id, ttl); err != nil {
		return err
	}
	if l.maxHold > 0 && ttl > l.maxHold {
		return fmt.Errorf("ttl %v is longer than the bound of %v on the hold", ttl, l.maxHold)
	}
	return l.replication.checkTTL(ttl)
}

// waitConfirmed waits for a lease, and for replicas to have it. It stands by itself because the frames of those who wait for long are
// as much of their memory as the rest.
func (l *Lock) waitConfirmed(ctx context.Context, id string, ttl time.Duration) (*Lease, error) {
	l.crew.Join() // as in acquire: what is not confirmed does not stay behind
	defer l.crew.Leave()
	if l.life.Err() != nil {
		return nil, ErrClosed
	}
	lease, err := l.subscriber.wait(ctx, id, ttl)
	if err != nil {
		return nil, err
	}
	return l.confirm(ctx, lease, lease.Deadline())
}

// Renew gives a lease that still holds a new ttl, which counts from now and may
// be shorter than what was left; [Lease.Deadline] follows. Waiters are told of a lease
// that gets shorter by more than 10 ms. The ttl is at least 1 ms,
// and is rounded down to whole milliseconds. Renew never revives a
// lease: if the lock is free, or the lease was released here, the error matches
// [ErrExpired]; if another lease holds it, [ErrConflict]. It does not wait for replicas.
//
// While Redis cannot be reached, or takes no writes for now, it tries again until
// the lease's deadline, or for 5 s if that is not known. A password that Redis refuses is tried again for as
// long, but for at most 5 s unless the client has a credentials provider. Any other error says what is in the way; where it
// says that the outcome is unknown, Deadline is the earlier of the old and the
// new one, and a later renewal counts for at most this ttl until 5 s after the client
// has given up this one. A key under the lock's name that is not a lock, or never expires, is an
// error that names it; it matches neither ErrExpired nor ErrConflict.
// When ctx ends, Renew returns at once with an error that matches
// ctx.Err() and its cause.
func (l *Lock) Renew(ctx context.Context, lease *Lease, ttl time.Duration) error {
	if err := checkLease(lease); err != nil {
		return fmt.Errorf("redfour: renew: %w", err)
	}
	if err := l.check(ctx, lease.ID, ttl); err != nil {
		return wrap("renew", lease.ID, err)
	}
	err := l.renew(ctx, lease.key(), l.stateOf(lease), ttl.Truncate(time.Millisecond))
	return wrap("renew", lease.ID, err)
}

// renew is Renew without its checks.
func (l *Lock) renew(ctx context.Context, key leaseKey, state *leaseState, ttl time.Duration) error {
	until := state.renewUntil()
	bounded, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	var f failures
	var refused time.Time // when Redis first refused the password; zero: the last attempt was not
	again := func(v verdict) bool {
		if v != unauthenticated {
			refused = time.Time{}
			return v.transient()
		}
		if refused.IsZero() {
			refused = time.Now()
		}
		return !l.server.lasts(time.Since(refused))
	}
	var e echo
	err := repeat(bounded, l.life, until, again, func() error {
		_, err := e.during(bounded, func(attempt context.Context) (reply, error) {
			a := l.renewOnce(attempt, key, state, ttl, e.take)
			if attempt.Err() == nil || bounded.Err() != nil { // An echo says nothing about the attempt that it ended.
				l.tellRenewal(ctx, key, state, a, 0)
			}
			return reply{}, a.err
		})
		return f.note(err)
	})
	switch {
	case judge(err) == lost && errors.Is(err, errReleased): // and not the cause of ctx, which may be another lease's
		return fmt.Errorf("%w: %w", ErrExpired, errReleased)
	case err != nil:
		return l.orClosed(f.sum(ctx))
	}
	return nil
}

// Release gives the lock back. If the lease no longer held, the error matches
// [ErrExpired] or [ErrConflict], and another's lease is left alone. A key under the
// lock's name that is not a lock, or never expires, is left alone as well; the error
// names it and matches neither. Release stops a
// [Lock.KeepAlive] of the lease first. It works after [Lock.Close], too.
//
// While Redis cannot be reached, takes no writes for now or refuses the password, Release tries again until the lease's deadline, for at
// most 5 s; past the deadline it makes one attempt of at most a second, or of 2 s
// where Redis was slow to answer before. A lock must
// not stay behind because a request has ended, so this goes on in the background
// when ctx has ended or ends; of ctx it uses the values only. The caller then
// waits for at most 100 ms more, and gets an error that matches ctx.Err() and
// says that the outcome is unknown. (The end of the context that KeepAlive returned, by this release, does not count.) The lock is then free, or held until its ttl
// ends. Releasing again is harmless, and takes "not held" for a success if an attempt before was sent in time.
func (l *Lock) Release(ctx context.Context, lease *Lease) error {
	if err := checkLease(lease); err != nil {
		return fmt.Errorf("redfour: release: %w", err)
	}
	r := &release{l: l, key: lease.key(), state: l.stateOf(lease), ours: true, began: time.Now()}
	return wrap("release", lease.ID, r.run(ctx))
}

// run is Release without its checks.
func (r *release) run(ctx context.Context) error {
	l := r.l
	detached := context.WithoutCancel(ctx)
	left := ctx.Done() // closed when the caller has left
	wasHere := ctx.Err() == nil
	l.enterSection()
	if r.begin(ctx, detached) {
		l.leaveSection()
		r.tell(detached)
		return r.outcome
	}
	done := make(chan struct{}) // closed when nothing of r changes any more
	l.crew.Start(func() {
		defer l.leaveSection()
		defer close(done)
		r.goOn(detached)
		r.tell(detached)
	})
	if wasHere && errors.Is(context.Cause(ctx), errReleased) {
		left = nil // It is the context of a KeepAlive, which this release has ended: r.until bounds the wait.
	}
	select {
	case <-done:
		return r.outcome
	case <-left:
	}
	grace := time.NewTimer(releaseGrace)
	defer grace.Stop()
	select {
	case <-done:
		return r.outcome
	case <-grace.C:
		return fmt.Errorf("%w: outcome unknown: %w", contextError(ctx), errNoAnswer)
	}
}

// releaseGrace is how long Release stays with a caller whose ctx has ended.
const releaseGrace = 100 * time.Millisecond

// A release is one call of Release, or of ForceRelease. Nearly always its first attempt is answered while the caller waits, and
// that is all. Otherwise it goes on in the background, where it may outlive its caller.
type release struct {
	l     *Lock
	key   leaseKey
	state *leaseState
	ours  bool // the caller holds the lease
	began time.Time
	until time.Time

	offered bool  // to whoever is next in this process
	offer   offer // since then
	call    *call // an attempt that was sent and not given up; nil if there is none
	echo    echo  // of those that were
	inTime  bool  // it was sent before the deadline

	reply    reply // the last one
	err      error // of the last attempt
	failures failures

	// At the end:
	outcome error // what the caller is to know
	woken   bool  // that woke somebody here
}

// begin ends the lease here, and makes the first attempt. It returns false if there is more to be done.
//
// From now on the lease is not held for certain, and is not renewed: its last
// renewal has come back, or was given up, before the release is sent.
func (r *release) begin(ctx, detached context.Context) bool {
	r.l.crew.Join()
	defer r.l.crew.Leave()
	r.until = r.state.releaseUntil()
	r.state.end(errReleased)
	if r.ours {
		r.l.awaitKeeper(r.key)
	}
	if ctx.Err() != nil || r.state.renewing() {
		return false
	}
	r.send(detached)
	if !r.await(ctx) || judge(r.err).transient() {
		return false
	}
	r.end(detached)
	return true
}

// goOn repeats attempts for as long as that makes sense.
func (r *release) goOn(ctx context.Context) {
	r.state.joinRenewal(ctx, releaseGrace)
	r.echo.tried = true // by begin
	r.err = repeat(ctx, ctx, r.until, verdict.transient, func() error {
		r.reply, r.err = r.echo.during(ctx, func(ctx context.Context) (reply, error) {
			r.send(ctx)
			_ = r.await(ctx) // this ctx ends with an echo only
			return r.reply, r.err
		})
		r.giveUp()
		return r.err
	})
	r.end(ctx)
}

// send sends an attempt, unless one is under way.
func (r *release) send(ctx context.Context) {
	if !r.offered {
		r.offered, r.offer = true, r.l.subscriber.offer(r.key.id)
	}
	if r.call == nil {
		r.inTime = r.state.inTime()
		r.call = r.l.server.sendRelease(ctx, r.key, r.state.by != r.l.server, r.offer.heir)
	}
}

// await waits for the attempt that is under way. It returns false if ctx has ended before the answer came, which
// is then to be waited for again. After an attempt that was sent in time and whose outcome
// is unknown, an answer that the lease is gone means that it did its work.
func (r *release) await(ctx context.Context) bool {
	r.reply, r.err = r.l.server.awaitRelease(ctx, max(patience, time.Until(r.until)), r.call)
	r.call = unheard(r.err)
	if _, givenUp := errors.AsType[*givenUpError](r.err); givenUp && ctx.Err() != nil {
		return false
	}
	r.giveUp()
	if r.inTime && judge(r.err) == unknown {
		r.state.mayBeReleased()
	}
	if r.err != nil {
		_ = r.failures.note(r.err)
	}
	return true
}

// giveUp leaves an attempt that is under way to the background, if there is one.
func (r *release) giveUp() {
	if r.call != nil {
		r.l.subscriber.answersLate(r.offer, r.call, r.echo.take)
	}
	r.call = nil
}

// end concludes. It wakes the waiters of this process, who need not wait for the message: it may have been
// refused, or lost.
func (r *release) end(ctx context.Context) {
	r.woken = r.l.subscriber.answer(r.offer, r.key.id, r.reply, r.err, r.failures.maybe)
	switch {
	case r.err != nil:
		r.outcome = r.failures.sum(ctx)
	case !r.reply.released() && !r.state.wasReleased():
		r.outcome = notHeld(r.reply)
	}
}

// tell notes how it ended.
func (r *release) tell(ctx context.Context) {
	e := r.l.events
	if r.woken {
		e.woken(r.key.id, byRelease)
	}
	if !r.ours {
		e.forced(r.outcome)
		return
	}
	ended := r.state.concluded(r.outcome == nil)
	e.released(ctx, r.key, r.began, r.state.heldFor(r.began), r.outcome, ended)
	if errors.Is(r.outcome, ErrNotHeld) && r.err == nil && !r.state.wasEnded() {
		r.l.lost(r.key, r.state, r.outcome)
	}
}

// lost notes that a lease does not hold, once.
func (l *Lock) lost(key leaseKey, state *leaseState, why error) {
	if state.tell() {
		l.events.lost(key, why)
	}
}

// notHeld is the error for a reply that says that a lease does not hold.
func notHeld(r reply) error {
	if r.status == statusConflict || r.status == statusTaken {
		return fmt.Errorf("%w (index %d, %v left)", ErrConflict, r.index, r.left)
	}
	return ErrExpired
}

// WithLock waits for the lock of id as [Lock.WaitAcquire] does, runs fn, and
// releases the lock when fn returns, panics or ends its goroutine. If the lock
// was not got, or ctx has ended by then, fn does not run. So ctx bounds the wait and fn. To bound the wait alone, or
// to try only once, use [Lock.WaitAcquire] or [Lock.Acquire], then [Lock.KeepAlive] and [Lock.Release].
//
// The ttl is how long others wait after a holder died, and not how long fn may take. A
// section survives an outage of Redis of about two thirds of it. Ten seconds suit most
// uses.
//
// The lease is renewed until fn has returned, even when ctx ends first, or until
// [Lock.Close]. The context that fn gets ends with ctx; when the Lock is closed, with
// cause [ErrClosed], and fn then has until [Lease.Deadline] to finish; and as soon as the
// lease is lost, with a cause that matches [ErrExpired] or [ErrConflict]. With
// [WithMaxHold] it also ends at that bound, with a cause that matches [ErrMaxHold]. What must not
// be done twice should let the resource that it changes refuse an older lease.Index as
// well. The lease belongs to WithLock: fn may read it, renew it and hand its index on.
// A lock is not reentrant: fn that waits for its own id waits for itself, until ctx ends.
//
// WithLock returns fn's error, unchanged if the lease held to the end. Otherwise
// it is joined with what happened: the loss, or a release whose outcome is unknown. An
// error of fn may match the same sentinels; where that matters, fn should note that it ran.
func (l *Lock) WithLock(
	ctx context.Context, id string, ttl time.Duration, fn func(ctx context.Context, lease *Lease) error,
) (err error) {
	if fn == nil {
		return wrap("with lock", id, errors.New("nil func"))
	}
	l.enterSection()
	defer l.leaveSection()
	began := time.Now()
	lease, err := l.waitUntold(ctx, id, ttl)
	if err != nil {
		l.events.acquired(ctx, id, began, nil, err)
		return err
	}

	section, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	loss := make(chan error, 1) // one at most; nobody takes that of the release
	_, err = l.keep(lease, func(why error) {
		loss <- why
		cancel(why)
	})
	// Deferred, because fn may panic or call runtime.Goexit.
	defer func() {
		var lost error
		select {
		case lost = <-loss:
		default:
		}
		err = joinLoss(err, lost, l.Release(ctx, lease))
	}()
	l.events.acquired(ctx, id, began, lease, nil) // Only now, because it may take long, or panic.
	if err == nil && section.Err() != nil {
		err = contextError(section) // Fn is spared a context that has ended.
	}
	if err != nil {
		return wrap("with lock", id, err)
	}
	return fn(section, lease)
}

// joinLoss adds to fn's error how the lease ended, if it did not hold to the end.
func joinLoss(err, lost, released error) error {
	if !errors.Is(lost, ErrNotHeld) {
		lost = nil // the Lock was closed: the lease still holds for a while
	}
	if lost != nil && errors.Is(released, ErrNotHeld) {
		released = nil // said already
	}
	if lost == nil && released == nil {
		return err
	}
	return errors.Join(err, lost, released)
}

// closeTime is for how long Close waits.
const closeTime = 5 * time.Second

// Close ends the Lock. Waiters get [ErrClosed] at once, and so does every later
// call but [Lock.Release], which still works. Contexts that are kept alive end
// with cause ErrClosed. Leases are not released: that is their holders' task.
//
// Close waits for the library's goroutines, at most 5 s, and returns an error if
// some are still waiting for the client then. It does not wait for the functions of
// [Lock.WithLock], which still need the client to release: close a client of your own
// after they have returned. A client made by [Open] is closed, after the last running
// [Lock.WithLock] has released; a lease that was got otherwise is better released
// before. Close may be called twice, and from inside a section.
func (l *Lock) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.end(ErrClosed)
	l.subscriber.end()
	l.server.endBatchers()

	timer := time.NewTimer(closeTime)
	defer timer.Stop()
	var err error
	select {
	case <-l.crew.Idle():
	case <-timer.C:
		err = fmt.Errorf("redfour: close: the client has not answered for %v", closeTime)
	}
	l.mu.Lock()
	l.drained = true
	l.mu.Unlock()
	return errors.Join(err, l.closeClient())
}

// closeClient closes a client of our own once nobody needs it.
func (l *Lock) closeClient() error {
	l.mu.Lock()
	client := l.owned
	if !l.drained || l.sections > 0 {
		client = nil
	}
	if client != nil {
		l.owned = nil
	}
	l.mu.Unlock()
	if client == nil {
		return nil
	}
	return client.Close()
}

func (l *Lock) enterSection() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.sections++
}

func (l *Lock) leaveSection() {
	l.mu.Lock()
	l.sections--
	l.mu.Unlock()
	_ = l.closeClient()
}
