package redfour

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"sync"
	"time"
)

// A Lease is one holding of a lock. Its exported fields never change after the
// grant. Copies of a Lease are the same lease: they share what renewals change.
//
// A Lease can leave the process as JSON, and be renewed, kept alive and released
// elsewhere: {"id", "index", "token", "ttl"}, with the ttl in milliseconds. The
// object that npm redfour and ioredfour return decodes into a Lease as well. Who
// has the token can end the lease, so treat it as a secret.
//
// To hand a lease over, get it with [Lock.Acquire] or [Lock.WaitAcquire] (WithLock would
// release it) and send it. The receiver calls [Lock.Renew] first, which tells whether
// the lease still holds and makes its Deadline known; then KeepAlive and Release. A
// KeepAlive that the sender left running ends with [ErrExpired] or [ErrConflict] after
// the receiver has released. The owner stays the sender. What is sent must come once: two who
// receive a lease both hold it, under one index.
type Lease struct { //nolint:recvcheck // A value must encode as well as a pointer does.
	ID        string        // as passed to Acquire
	Index     int64         // fencing token: greater than that of every earlier lease of this ID (see Fencing)
	Token     string        // proof of ownership; empty in a lease that came from npm redfour
	TTL       time.Duration // as granted; renewals do not change it
	Immediate bool          // got at the first attempt; not in the JSON

	state *leaseState // shared by copies; nil in a Lease made by hand
}

// leaseKey is what makes two leases the same.
type leaseKey struct {
	id    string
	index int64
	token string
}

func (l *Lease) key() leaseKey { return leaseKey{l.ID, l.Index, l.Token} }

// newLease makes the lease that an attempt has got. Its deadline is counted from
// before the request was sent, so it passes here before it does in Redis.
func newLease(id, token string, ttl time.Duration, r reply) *Lease {
	return &Lease{
		ID: id, Index: r.index, Token: token, TTL: ttl,
		state: &leaseState{got: r.sent, deadline: deadlineOf(r.sent, min(ttl, r.left)), ttl: ttl, counted: ttl},
	}
}

// deadlineOf returns the deadline of a lease that was asked for at the given time, and
// lasts for ttl then. Every deadline is made here.
func deadlineOf(sent time.Time, ttl time.Duration) time.Time {
	return sent.Add(ttl - margin(ttl))
}

// margin is how long before the end of ttl a deadline is, by the clock of this process.
// It covers a clock of Redis that gains on ours by 1000 ppm, and 1 ms at least, because
// Redis counts in milliseconds. A ttl of 1 ms keeps a half of it.
func margin(ttl time.Duration) time.Duration {
	return min(max(drift(ttl), time.Millisecond), ttl/2)
}

// drift is by how much two clocks may differ after d: 1000 ppm of it. A chronyd or ntpd
// that slews both by 500 ppm, in opposite directions, makes them differ that much.
func drift(d time.Duration) time.Duration { return d.Abs() / 1000 }

// shared returns the lease's state, or a new one that nobody shares.
func (l *Lease) shared() *leaseState {
	if l.state == nil {
		return &leaseState{ttl: l.TTL}
	}
	return l.state
}

// stateOf returns the state of a lease. If the same lease is kept alive here, through a
// value that was decoded apart, both share one state from now on.
func (l *Lock) stateOf(lease *Lease) *leaseState {
	l.mu.Lock()
	defer l.mu.Unlock()
	state := lease.shared()
	if k := l.keepers[lease.key()]; k != nil {
		state.join(k.state)
	}
	return state
}

func checkLease(l *Lease) error {
	if l == nil {
		return errors.New("nil lease")
	}
	return checkID(l.ID)
}

// Deadline returns the time up to which the lease is held for certain, unless
// Redis lost it (by a failover, a restart without data, an eviction or a
// FLUSHALL). It is counted from before the request was sent, so Redis keeps the
// lock a little longer. Renewals move it; after a release or a loss it is in the
// past, or zero if it was.
//
// The clocks of this host and of Redis may differ in rate by 1000 ppm: Deadline is
// 0.1 % of the ttl before its end, at least 1 ms (or half of a ttl below 2 ms). If they
// differ by more, Deadline promises too much. The README says what to set in chronyd
// and ntpd. It also promises too much after a suspension of this host or virtual
// machine, whose monotonic clock stops meanwhile.
//
// It is zero in a process that has neither acquired nor renewed the lease, and in a
// Lease made by hand rather than decoded from JSON. What another process, or a Lease
// decoded apart from this one, does with the lease is not seen here, unless this
// Lock keeps it alive: if it renews the lease for less, or ends it, Deadline promises
// too much. The same goes for an npm client that renews it and for a PEXPIRE of its key:
// Deadline promises too much until the next renewal, which restores the ttl.
func (l *Lease) Deadline() time.Time {
	return l.shared().held()
}

// Remaining returns the time up to [Lease.Deadline], and 0 if that has passed or
// is not known.
func (l *Lease) Remaining() time.Duration {
	deadline := l.Deadline()
	if deadline.IsZero() {
		return 0
	}
	return max(0, time.Until(deadline))
}

// String describes the lease without its token, so that a lease can be printed and
// logged. A lease in an unexported field of another struct is printed with its
// token: package fmt calls no methods there.
func (l Lease) String() string {
	return fmt.Sprintf("lease of %s (index %d, ttl %v)", quote(l.ID), l.Index, l.TTL)
}

// GoString is [Lease.String]: %#v prints no token either.
func (l Lease) GoString() string { return l.String() }

// LogValue is the lease for package log/slog: id, index and ttl, without the token.
func (l Lease) LogValue() slog.Value {
	return slog.GroupValue(
		slog.String("id", l.ID), slog.Int64("index", l.Index), slog.Duration("ttl", l.TTL),
	)
}

type leaseJSON struct {
	ID    string `json:"id"`
	Index int64  `json:"index"`
	Token string `json:"token,omitempty"`
	TTL   int64  `json:"ttl"`
}

// MarshalJSON encodes the lease for another process. It contains the token.
func (l Lease) MarshalJSON() ([]byte, error) {
	return json.Marshal(leaseJSON{l.ID, l.Index, l.Token, l.TTL.Milliseconds()})
}

// UnmarshalJSON decodes what MarshalJSON encoded, or the object that npm redfour or
// ioredfour returned. An object that says that the lock was not got is an error,
// and so is one without an id. Npm takes ids that are numbers; they become the
// decimal text that it makes of them.
func (l *Lease) UnmarshalJSON(data []byte) error {
	var v struct {
		ID      json.RawMessage `json:"id"`
		Success *bool           `json:"success"`
		Index   int64           `json:"index"`
		Token   string          `json:"token"`
		TTL     int64           `json:"ttl"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("redfour: lease: %w", err)
	}
	if v.Success != nil && !*v.Success {
		return errors.New("redfour: lease: the object says that the lock was not got")
	}
	id, err := decodeID(v.ID)
	if err != nil {
		return fmt.Errorf("redfour: lease: %w", err)
	}
	ttl := time.Duration(v.TTL) * time.Millisecond
	if v.TTL < 0 || ttl/time.Millisecond != time.Duration(v.TTL) {
		return fmt.Errorf("redfour: lease: impossible ttl of %d ms", v.TTL)
	}
	*l = Lease{ID: id, Index: v.Index, Token: v.Token, TTL: ttl, state: &leaseState{ttl: ttl}}
	return nil
}

func decodeID(raw json.RawMessage) (string, error) {
	var id string
	if err := json.Unmarshal(raw, &id); err == nil {
		return id, checkID(id)
	}
	var number json.Number
	if err := json.Unmarshal(raw, &number); err != nil {
		return "", errors.New("want an id that is a string or a number")
	}
	return number.String(), checkID(number.String())
}

// confirm returns a lease that was just got once enough replicas have acknowledged it. Until the given time it tries again where
// Redis cannot be reached. A lease that nobody is going to hear of is released, so that it goes to the next waiter.
func (l *Lock) confirm(ctx context.Context, lease *Lease, until time.Time) (*Lease, error) {
	if deadline := lease.Deadline(); deadline.Before(until) {
		until = deadline
	}
	var acked int64
	var f failures
	err := repeat(ctx, l.life, until, verdict.outOfReach, func() (err error) {
		acked, err = l.confirmOnce(ctx, lease)
		return f.note(err)
	})
	want := l.replication
	switch {
	case judge(err) == lost:
		return nil, err
	case err != nil:
		err = fmt.Errorf("%w: %w", ErrNotReplicated, cmp.Or(f.last, errNoAnswer))
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", contextError(ctx), err)
		}
		err = l.orClosed(err)
	case acked < int64(want.replicas):
		err = fmt.Errorf("%w: %d of %d in %v", ErrNotReplicated, acked, want.replicas, want.timeout)
	case lease.Remaining() <= 0:
		err = errLate(lease.TTL)
	default:
		return lease, nil
	}
	detached := context.WithoutCancel(ctx)
	l.crew.Start(func() { _ = l.Release(detached, lease) })
	return nil, err
}

// confirmOnce makes one attempt to have a lease acknowledged, and waits neither for ever nor after ctx. It returns how many
// replicas have.
//
// An attempt that nobody waits for any more does no harm: it renews the lease, if that still holds.
func (l *Lock) confirmOnce(ctx context.Context, lease *Lease) (acked int64, err error) {
	// Not from ctx, whose cause may be an error about another lease.
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), min(l.replication.timeout+patience, lease.TTL))
	defer cancel()
	done := make(chan confirmation, 1) // the one result, which nobody may wait for
	over := make(chan struct{})        // closed after that
	l.crew.Start(func() {
		defer close(over)
		done <- l.server.confirm(bounded, lease.key(), lease.TTL, l.replication)
	})
	got := confirmation{err: &givenUpError{errNoAnswer, nil}}
	select {
	case got = <-done:
	case <-ctx.Done():
	case <-l.life.Done():
	case <-bounded.Done():
		l.server.heard(got.err)
	}
	switch _, givenUp := errors.AsType[*givenUpError](got.err); {
	case givenUp, judge(got.err) == unknown:
		l.doubtRenewal(lease.state, lease.TTL, over)
	case got.err == nil:
		lease.state.renewed(got.sent, lease.TTL, lease.TTL)
	}
	return got.acked, got.err
}

// A leaseState is what changes in the life of a lease.
type leaseState struct {
	by *server // the Lock that got the lease; nil: not known here. Never changes once a caller has the lease

	mu       sync.Mutex    // guards what follows; taken by lock
	same     *leaseState   // what counts instead of this; nil: this does
	got      time.Time     // when it was asked for; zero: not here
	kept     time.Time     // when it was first kept alive here; zero: not yet
	deadline time.Time     // zero: not known here
	ttl      time.Duration // of the last grant or renewal
	counted  time.Duration // of it, for the deadline: less, if a renewal for less may come yet
	before   counting      // deadline and counted, before the last attempt to renew
	doubts   []*doubt      // renewals that may come yet
	over     error         // why the lease does not hold; nil while it may
	overAt   time.Time     // when that became known
	answered time.Time     // when the last renewal that was answered was sent
	trying   time.Duration // the ttl of the renewal that is made; 0: none is
	hand     time.Time     // when a lease renewed by a caller ends; zero: none was
	released bool          // a release was sent in time, and may have run
	ended    bool          // a release has succeeded
	told     bool          // that it was lost, to the trace

	turn    chan struct{}   // holds one element while a renewal is made; nil before the first
	renewal chan struct{}   // closed when the last one is over; nil before the first
	keepers []chan struct{} // told when the rest changes; one for each Lock that keeps the lease alive
}

// A counting is how a deadline came about.
type counting struct {
	deadline time.Time
	counted  time.Duration
}

// A doubt is a renewal of unknown outcome. Redis may run it late, after renewals that
// were answered, and it then leaves its own ttl.
type doubt struct {
	ttl   time.Duration
	until time.Time // then it cannot come any more; zero while it is on its way
}

// lock locks the state that counts, and returns it.
func (s *leaseState) lock() *leaseState {
	for {
		s.mu.Lock()
		same := s.same
		if same == nil {
			return s
		}
		s.mu.Unlock()
		s = same
	}
}

// joining is held while two states become one, so that no two do so in opposite directions.
var joining sync.Mutex

// join makes other, which is kept alive, count instead of s from now on. Both are states
// of the same lease. Attempts that s has begun go on as those of another process would.
func (s *leaseState) join(other *leaseState) {
	joining.Lock()
	defer joining.Unlock()
	s = s.lock()
	defer s.mu.Unlock()
	if other.isSame(s) {
		return
	}
	other = other.lock()
	defer other.mu.Unlock()
	s.same = other
	if other.got.IsZero() {
		other.got = s.got
	}
	if other.kept.IsZero() || !s.kept.IsZero() && s.kept.Before(other.kept) {
		other.kept = s.kept
	}
	other.released = other.released || s.released
	other.ended = other.ended || s.ended
	other.told = other.told || s.told
	if other.deadline.IsZero() {
		other.deadline, other.counted = s.deadline, s.counted
	}
	other.doubts = append(other.doubts, s.doubts...)
	if s.hand.After(other.hand) {
		other.hand = s.hand
	}
	if other.over == nil {
		other.over, other.overAt = s.over, s.overAt
	}
	other.keepers = append(other.keepers, s.keepers...)
	other.tellKeepers()
}

// isSame tells whether s counts for this state.
func (s *leaseState) isSame(as *leaseState) bool {
	for s != as {
		s.mu.Lock()
		same := s.same
		s.mu.Unlock()
		if same == nil {
			return false
		}
		s = same
	}
	return true
}

// held is up to when the lease is held for certain.
func (s *leaseState) held() time.Time {
	s = s.lock()
	defer s.mu.Unlock()
	if s.over != nil && s.overAt.Before(s.deadline) {
		return s.overAt
	}
	return s.deadline
}

// renewUntil is up to when it makes sense to try a renewal. A deadline that
// has passed leaves time to ask, because Redis keeps the lock a little longer.
func (s *leaseState) renewUntil() time.Time {
	s = s.lock()
	defer s.mu.Unlock()
	now := time.Now()
	switch {
	case s.deadline.IsZero():
		return now.Add(cleanupTime)
	case s.deadline.Before(now):
		return now.Add(patience)
	}
	return s.deadline
}

// releaseUntil is up to when it makes sense to try a release: as long as the
// lease lasts, but somebody may be waiting for the answer.
func (s *leaseState) releaseUntil() time.Time {
	s = s.lock()
	defer s.mu.Unlock()
	now := time.Now()
	if s.deadline.IsZero() {
		return now.Add(cleanupTime)
	}
	return now.Add(min(cleanupTime, s.deadline.Sub(now)))
}

// attemptTime is how long one renewal may hang at most before another is tried.
func (s *leaseState) attemptTime() time.Duration {
	s = s.lock()
	defer s.mu.Unlock()
	left := time.Until(s.deadline)
	if s.deadline.IsZero() || left <= 0 {
		return longestPatience
	}
	return min(longestPatience, max(left/3, 10*time.Millisecond))
}

// end says that the lease does not hold, and why. It returns false if that is known already.
func (s *leaseState) end(why error) (first bool) {
	s = s.lock()
	defer s.mu.Unlock()
	if s.over != nil {
		return false
	}
	s.over, s.overAt = why, time.Now()
	s.tellKeepers()
	return true
}

// concluded notes that a release has succeeded, if it has. It returns true for the first that has.
func (s *leaseState) concluded(succeeded bool) (first bool) {
	s = s.lock()
	defer s.mu.Unlock()
	first = succeeded && !s.ended
	s.ended = s.ended || succeeded
	return first
}

// wasEnded tells whether a release has succeeded.
func (s *leaseState) wasEnded() bool {
	s = s.lock()
	defer s.mu.Unlock()
	return s.ended
}

// tell returns whether it is still to be told that the lease was lost, and true only once.
func (s *leaseState) tell() bool {
	s = s.lock()
	defer s.mu.Unlock()
	told := s.told
	s.told = true
	return !told
}

// heldFor returns for how long the lease was held at that time, or 0 if it was got elsewhere.
func (s *leaseState) heldFor(then time.Time) time.Duration {
	s = s.lock()
	defer s.mu.Unlock()
	if s.got.IsZero() {
		return 0
	}
	return then.Sub(s.got)
}

// takeTurn waits until no other renewal of this lease is made here, so that the
// order in which Redis sees them is the order in which their replies count.
func (s *leaseState) takeTurn(ctx context.Context) (giveTurn func(), err error) {
	s = s.lock()
	if s.turn == nil {
		s.turn = make(chan struct{}, 1)
	}
	turn := s.turn
	s.mu.Unlock()
	select {
	case turn <- struct{}{}:
		return func() { <-turn }, nil
	case <-ctx.Done():
		return nil, &givenUpError{contextError(ctx), nil}
	}
}

// begin says that the lease is about to be renewed for ttl, from now at the earliest.
// If that is less than is left, the lease may be shorter at once. The call is known
// from here on, so that a release, which ends the lease first, waits for it or keeps
// it from being sent. It is nil if the turn came when nothing was due any more. One that
// is due ends at the bound on the hold at the latest.
func (s *leaseState) begin(ttl, maxHold time.Duration) (over chan struct{}, _ time.Duration, err error) {
	s = s.lock()
	defer s.mu.Unlock()
	if errors.Is(s.over, errReleased) {
		return nil, 0, s.over
	}
	if ttl == whenDue {
		now, bound := time.Now(), s.boundLocked(maxHold)
		end := bound
		if s.hand.After(end) {
			end = s.hand // Renew is not bounded, and is not cut back.
		}
		ttl = min(s.ttl, end.Sub(now).Truncate(time.Millisecond))
		if now.Before(s.dueLocked(bound)) || ttl < time.Millisecond {
			return nil, 0, nil
		}
	}
	s.before = counting{s.deadline, s.counted}
	if deadline := deadlineOf(time.Now(), ttl); !s.deadline.IsZero() && deadline.Before(s.deadline) {
		s.deadline, s.counted = deadline, ttl
		s.tellKeepers()
	}
	s.renewal, s.trying = make(chan struct{}), ttl
	return s.renewal, ttl, nil
}

// whenDue stands for the ttl of the last renewal, if it is time for another.
const whenDue = 0

// refused says that a renewal that had begun was not made, and will not be.
func (s *leaseState) refused(renewal chan struct{}) {
	s = s.lock()
	defer s.mu.Unlock()
	if s.renewal == renewal && !s.before.deadline.IsZero() {
		s.deadline, s.counted = s.before.deadline, s.before.counted
		s.tellKeepers()
	}
}

// renewed says that the renewal that was sent at that time is in force. It counts for
// no more than one that may still come after it. The ttl that was asked for is that of
// those to follow, unless it was whenDue.
func (s *leaseState) renewed(sent time.Time, ttl, asked time.Duration) {
	s = s.lock()
	defer s.mu.Unlock()
	s.counted = ttl
	s.takeAskedLocked(sent, asked)
	s.dropDoubtsLocked(sent)
	for _, d := range s.doubts {
		s.counted = min(s.counted, d.ttl)
	}
	s.deadline, s.answered = deadlineOf(sent, s.counted), sent
	s.tellKeepers()
}

// takeAskedLocked notes the ttl that a caller asked for, which those that are due keep.
func (s *leaseState) takeAskedLocked(sent time.Time, asked time.Duration) {
	if asked != whenDue {
		s.ttl, s.hand = asked, sent.Add(asked)
	}
}

// dropDoubtsLocked drops the doubts that were over when a renewal was sent.
func (s *leaseState) dropDoubtsLocked(sent time.Time) {
	s.doubts = slices.DeleteFunc(s.doubts, func(d *doubt) bool { return !d.until.IsZero() && !sent.Before(d.until) })
}

// renewedLate is renewed for one that was given up. It returns false if that does not count, because the
// lease does not hold, or one that was sent later has been answered.
// Those that were begun since may have come after it, and then leave their own ttl.
func (s *leaseState) renewedLate(sent time.Time, ttl, asked time.Duration) bool {
	s = s.lock()
	defer s.mu.Unlock()
	if s.over != nil || sent.Before(s.answered) {
		return false
	}
	s.takeAskedLocked(sent, asked)
	s.dropDoubtsLocked(sent)
	if s.trying > 0 {
		ttl = min(ttl, s.trying)
	}
	for _, d := range s.doubts {
		ttl = min(ttl, d.ttl)
	}
	if deadline := deadlineOf(sent, ttl); deadline.After(s.deadline) {
		s.deadline, s.counted, s.answered = deadline, ttl, sent
		if s.before.deadline.Before(deadline) {
			s.before.deadline, s.before.counted = deadline, ttl
		}
		s.tellKeepers()
	}
	return true
}

// tried says that no renewal is made any more.
func (s *leaseState) tried() {
	s = s.lock()
	defer s.mu.Unlock()
	s.trying = 0
}

// doubtRenewal notes that a renewal for ttl may or may not have come, or may come yet.
// The channel is closed when the client is done with it. What the client had sent by
// then may be on its way for a little longer: in a proxy, or in the send buffer of a
// connection that was closed. That it takes longer than cleanupTime is taken to be as
// rare as any request that comes so late.
func (l *Lock) doubtRenewal(state *leaseState, ttl time.Duration, over <-chan struct{}) {
	d := state.addDoubt(ttl)
	l.crew.Start(func() {
		<-over
		state.settle(d, time.Now().Add(cleanupTime))
	})
}

// addDoubt adds a doubt. One that lasts no longer than it, and caps no more, is dropped.
func (s *leaseState) addDoubt(ttl time.Duration) *doubt {
	s = s.lock()
	defer s.mu.Unlock()
	s.doubts = slices.DeleteFunc(s.doubts, func(d *doubt) bool { return !d.until.IsZero() && d.ttl >= ttl })
	d := &doubt{ttl: ttl}
	s.doubts = append(s.doubts, d)
	return d
}

// settle says when a doubt ends.
func (s *leaseState) settle(d *doubt, until time.Time) {
	s = s.lock()
	defer s.mu.Unlock()
	d.until = until
}

func (s *leaseState) tellKeepers() {
	for _, changed := range s.keepers {
		select {
		case changed <- struct{}{}:
		default: // it has been told
		}
	}
}

// inTime tells whether the lease still holds for certain, were it not released.
func (s *leaseState) inTime() bool {
	s = s.lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.deadline)
}

func (s *leaseState) mayBeReleased() {
	s = s.lock()
	defer s.mu.Unlock()
	s.released = true
}

func (s *leaseState) wasReleased() bool {
	s = s.lock()
	defer s.mu.Unlock()
	return s.released
}

// An attempt is one to renew that has come back.
type attempt struct {
	began time.Time // zero: nothing was sent
	err   error
	lost  bool // it was the first to find that the lease does not hold
}

// renewOnce makes one attempt to renew for ttl, or whenDue, and waits neither for ever
// nor after ctx. If it succeeds after that, late is called with the answer.
func (l *Lock) renewOnce(
	ctx context.Context, key leaseKey, state *leaseState, ttl time.Duration, late func(reply, error),
) attempt {
	patience := state.attemptTime()
	bounded, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	giveTurn, err := state.takeTurn(bounded)
	if err != nil {
		return attempt{err: err}
	}
	defer giveTurn()
	if ctx.Err() != nil {
		return attempt{err: &givenUpError{contextError(ctx), nil}}
	}
	asked := ttl
	over, ttl, err := state.begin(asked, l.maxHold)
	if over == nil {
		return attempt{err: err}
	}
	a := attempt{began: time.Now()}
	r, err := l.server.renew(ctx, patience, key, ttl)
	switch {
	case err != nil && judge(err) == unknown:
		l.doubtRenewal(state, ttl, over)
	case err != nil:
		state.refused(over)
	case r.status != statusDone:
		err = notHeld(r)
		a.lost = state.end(err)
	default:
		state.renewed(r.sent, ttl, asked)
	}
	state.tried()
	if c := unheard(err); c != nil {
		l.server.late(c, func(r reply, err error) {
			if err == nil && r.status == statusDone && state.renewedLate(r.sent, ttl, asked) {
				late(r, nil)
			}
			close(over)
		})
	} else {
		close(over)
	}
	a.err = err
	return a
}

// tellRenewal notes an attempt that was due so long before it began.
func (l *Lock) tellRenewal(ctx context.Context, key leaseKey, state *leaseState, a attempt, late time.Duration) {
	if !a.began.IsZero() {
		l.events.renewed(ctx, key, a.began, late, a.err)
	}
	if a.lost {
		l.lost(key, state, a.err)
	}
}

// renewDue makes an attempt for a keeper. Whoever waits for its outcome does not wait for a trace.
func (l *Lock) renewDue(ctx context.Context, k *keeper, due time.Time, outcome chan<- error) {
	a := l.renewOnce(ctx, k.key, k.state, whenDue, func(reply, error) {})
	outcome <- a.err
	// That the keeping alive has ended, by a release most often, says nothing about the renewal that it cut short.
	if _, givenUp := errors.AsType[*givenUpError](a.err); !givenUp || ctx.Err() == nil {
		l.tellRenewal(ctx, k.key, k.state, a, a.began.Sub(due))
	}
}

// renewing tells whether a renewal has begun and is not over.
func (s *leaseState) renewing() bool {
	s = s.lock()
	defer s.mu.Unlock()
	if s.renewal == nil {
		return false
	}
	select {
	case <-s.renewal:
		return false
	default:
		return true
	}
}

// joinRenewal waits for the last renewal to be over, for at most d: the connection
// that it hangs on may have died.
func (s *leaseState) joinRenewal(ctx context.Context, d time.Duration) {
	s = s.lock()
	over := s.renewal
	s.mu.Unlock()
	if over == nil {
		return
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-over:
	case <-ctx.Done():
	case <-timer.C:
	}
}

// KeepAlive renews the lease at every third of its ttl, in the background, until ctx
// ends, the returned function is called, the lease is released through this Lock
// (also through a copy, or from its JSON), or the Lock is closed. It renews for the
// ttl of the last grant or renewal that the lease, a copy or a KeepAlive of this Lock
// has seen; for a lease decoded from JSON that is its TTL, as granted. A lease whose
// deadline is not known is renewed at once, and its context lives until the answer:
// call [Lock.Renew] before, to be sure. A second KeepAlive of a lease shares the renewals
// of the first. Renewals do not wait for replicas. The function ends the returned context and this call's share of the
// renewals, and does not release the lease. Call it in any case, as with
// context.WithCancel.
//
// The returned context ends with ctx, and as soon as the lease is lost: another
// lease holds the lock, nobody does, or the deadline passed without a successful
// renewal, even while one hangs. context.Cause then matches [ErrConflict] or
// [ErrExpired]. After a release the cause matches [ErrNotHeld], after
// [Lock.Close] it is [ErrClosed]. At the bound of [WithMaxHold] it
// matches [ErrMaxHold]. For a lease that cannot be kept alive the
// context has ended already, with the reason as its cause.
func (l *Lock) KeepAlive(ctx context.Context, lease *Lease) (context.Context, context.CancelFunc) {
	kept, cancel := context.WithCancelCause(ctx)
	stop := func() { cancel(nil) }
	if err := checkKeepAlive(lease); err != nil {
		cancel(fmt.Errorf("redfour: keep alive: %w", err))
		return kept, stop
	}
	if kept.Err() != nil {
		return kept, stop
	}
	leave, err := l.keep(lease, cancel)
	if err != nil {
		cancel(wrap("keep alive", lease.ID, err))
		return kept, stop
	}
	context.AfterFunc(kept, leave)
	return kept, stop
}

func checkKeepAlive(lease *Lease) error {
	if err := checkLease(lease); err != nil {
		return err
	}
	if lease.TTL < time.Millisecond {
		return fmt.Errorf("ttl %v is shorter than 1ms", lease.TTL)
	}
	return nil
}

// A keeper keeps one lease alive for everybody who asked for it.
type keeper struct {
	key     leaseKey
	state   *leaseState
	changed chan struct{}           // sent to by state; capacity 1, because one news is enough
	cancel  context.CancelCauseFunc // ends run
	done    chan struct{}           // closed when run has ended

	// Guarded by Lock.mu:
	users  map[*context.CancelCauseFunc]struct{} // told when run ends
	ending bool                                  // the last user has left
}

// keep keeps the lease alive, and calls ended once if that comes to an end before
// leave is called.
func (l *Lock) keep(lease *Lease, ended context.CancelCauseFunc) (leave func(), err error) {
	key, state := lease.key(), lease.shared()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	k := l.keepers[key]
	if k != nil {
		state.join(k.state)
	}
	if over := state.whyOver(); over != nil {
		return nil, over
	}
	if k == nil || k.ending {
		k = l.newKeeper(key, state, k)
		l.keepers[key] = k
	}
	k.users[&ended] = struct{}{}
	return func() { l.leaveKeeper(k, &ended) }, nil
}

func (s *leaseState) whyOver() error {
	s = s.lock()
	defer s.mu.Unlock()
	return s.over
}

// newKeeper starts a keeper, which begins when the one before it has ended.
func (l *Lock) newKeeper(key leaseKey, state *leaseState, before *keeper) *keeper {
	ctx, cancel := context.WithCancelCause(l.life)
	k := &keeper{
		key: key, state: state, changed: make(chan struct{}, 1), cancel: cancel,
		done: make(chan struct{}), users: make(map[*context.CancelCauseFunc]struct{}),
	}
	state.addKeeper(k.changed)
	l.crew.Start(func() {
		why := l.keepUp(ctx, k, before)
		if errors.Is(why, ErrNotHeld) && !errors.Is(why, errReleased) {
			l.lost(key, state, why) // Only now, because those who work on it hear first.
		}
	})
	return k
}

// keepUp is the life of a keeper. It returns why that ended.
func (l *Lock) keepUp(ctx context.Context, k, before *keeper) error {
	defer close(k.done)
	defer k.state.removeKeeper(k.changed)
	defer k.cancel(nil)
	if before != nil {
		<-before.done
	}
	why := l.runKeeper(ctx, k)
	l.endKeeper(k, why)
	return why
}

func (s *leaseState) addKeeper(changed chan struct{}) {
	s = s.lock()
	defer s.mu.Unlock()
	s.keepers = append(s.keepers, changed)
}

func (s *leaseState) removeKeeper(changed chan struct{}) {
	s = s.lock()
	defer s.mu.Unlock()
	s.keepers = slices.DeleteFunc(s.keepers, func(c chan struct{}) bool { return c == changed })
}

// leaveKeeper takes a user from k, which ends with the last.
func (l *Lock) leaveKeeper(k *keeper, user *context.CancelCauseFunc) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(k.users, user)
	if len(k.users) == 0 {
		k.ending = true
		k.cancel(nil)
	}
}

// endKeeper tells the users of k why it ended.
func (l *Lock) endKeeper(k *keeper, why error) {
	l.mu.Lock()
	if l.keepers[k.key] == k {
		delete(l.keepers, k.key)
	}
	users := k.users
	k.users = nil
	l.mu.Unlock()
	if !errors.Is(why, ErrClosed) {
		why = wrap("keep alive", k.key.id, why)
	}
	for cancel := range users {
		(*cancel)(why)
	}
}

// awaitKeeper ends the renewals of a lease that is about to be released, and returns
// when those who kept it alive here know.
func (l *Lock) awaitKeeper(key leaseKey) {
	l.mu.Lock()
	k := l.keepers[key]
	l.mu.Unlock()
	if k != nil {
		k.state.end(errReleased) // It may have been kept alive only now, through a twin.
		<-k.done
	}
}

// runKeeper renews until ctx ends or the lease is lost, and returns why. A
// renewal runs beside it, so that a hanging one does not hide the deadline.
func (l *Lock) runKeeper(ctx context.Context, k *keeper) error {
	var (
		started = time.Now()
		timer   = time.NewTimer(0)
		pending chan error // a renewal's outcome; nil when none is made
		retry   time.Time  // when to try again after a failure
		last    error      // of the failures since the last success
		pauses  = backoff{min: 10 * time.Millisecond, max: 500 * time.Millisecond}
	)
	defer timer.Stop()
	defer func() {
		if pending != nil {
			k.cancel(nil)
			<-pending //nolint:errcheck // It ended because it was cancelled.
		}
	}()
	for {
		if over := k.state.whyOver(); over != nil {
			return over
		}
		due, deadline, _ := k.state.terms(started, l.maxHold)
		begin := due
		if retry.After(due) {
			begin = retry
		}
		next := deadline
		if pending == nil && begin.Before(deadline) {
			next = begin
		}
		timer.Reset(time.Until(next))

		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-k.changed:
		case err := <-pending:
			pending = nil
			switch {
			case errors.Is(err, ErrNotHeld):
				return err
			case err != nil:
				retry, last = time.Now().Add(pauses.next()), err
			default:
				retry, last, pauses.step = time.Time{}, nil, 0
			}
		case <-timer.C:
			now := time.Now()
			// Both may be so, that it passed and that a renewal was in time, and then select does not care.
			_, deadline, final := k.state.terms(started, l.maxHold)
			switch {
			case !now.Before(deadline) && final:
				return fmt.Errorf("%w (%v)", ErrMaxHold, l.maxHold)
			case !now.Before(deadline):
				return deadlinePassed(last)
			case pending == nil && !now.Before(begin):
				pending = make(chan error, 1)
				result := pending
				l.crew.Start(func() { l.renewDue(ctx, k, due, result) })
			}
		}
	}
}

// terms returns when to renew, and when the lease is lost if that fails. A lease whose
// deadline is not known ran when it was first kept alive, if it ran at all. Final is true
// if the lease lasts up to the bound on the hold, so that it is not lost earlier.
func (s *leaseState) terms(started time.Time, maxHold time.Duration) (due, deadline time.Time, final bool) {
	s = s.lock()
	defer s.mu.Unlock()
	if s.kept.IsZero() {
		s.kept = started
	}
	due, deadline = started, deadlineOf(started, s.ttl)
	bound := s.boundLocked(maxHold)
	if !s.deadline.IsZero() {
		due, deadline, final = s.dueLocked(bound), s.deadline, s.finalLocked(bound)
	}
	if bound.Before(deadline) {
		deadline = bound
	}
	return due, deadline, final
}

// boundLocked is when the lease has been held for maxHold: far from now if that is 0.
func (s *leaseState) boundLocked(maxHold time.Duration) time.Time {
	switch {
	case maxHold == 0:
		return time.Now().Add(math.MaxInt64)
	case s.got.IsZero():
		return s.kept.Add(maxHold)
	}
	return s.got.Add(maxHold)
}

// endLocked is when the lease ends, were the clocks alike. If the deadline is not known
// that is long ago.
func (s *leaseState) endLocked() time.Time { return s.deadline.Add(margin(s.counted)) }

// finalLocked reports whether the lease lasts up to the bound, in whole milliseconds.
func (s *leaseState) finalLocked(bound time.Time) bool {
	return s.endLocked().After(bound.Add(-time.Millisecond))
}

// dueLocked is when a third of the ttl has passed. A lease that lasts up to the bound is
// renewed at that pace, too, to notice its loss, and not ever faster.
func (s *leaseState) dueLocked(bound time.Time) time.Time {
	step := s.counted / 3
	if s.finalLocked(bound) {
		step = s.ttl / 3
	}
	return s.endLocked().Add(step - s.counted)
}

// deadlinePassed says why a lease could not be kept alive.
func deadlinePassed(last error) error {
	if last == nil {
		return fmt.Errorf("%w: no renewal was answered in time", ErrExpired)
	}
	return fmt.Errorf("%w: last renewal: %w", ErrExpired, last)
}
