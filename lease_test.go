package redfour_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"

	"github.com/redfour-go/redfour"
)

func TestLease_JSON(t *testing.T) {
	lease := redfour.Lease{ID: "a:b\n", Index: 1790000000000001, Token: "t", TTL: 1500 * time.Millisecond, Immediate: true}
	encoded, err := json.Marshal(lease)
	require.NoError(t, err)
	require.JSONEq(t, `{"id":"a:b\n","index":1790000000000001,"token":"t","ttl":1500}`, string(encoded))
	var decoded redfour.Lease
	require.NoError(t, json.Unmarshal(encoded, &decoded))
	require.Equal(t, lease.ID, decoded.ID)
	require.Equal(t, lease.Index, decoded.Index)
	require.Equal(t, lease.Token, decoded.Token)
	require.Equal(t, lease.TTL, decoded.TTL)
	require.Zero(t, decoded.Deadline())
	require.Zero(t, decoded.Remaining())
}

func TestLease_JSONFromNPM(t *testing.T) {
	for text, want := range map[string]redfour.Lease{
		`{"id":"42","success":true,"index":7,"ttl":60000}`: {ID: "42", Index: 7, TTL: time.Minute},
		`{"id":0.5512,"success":true,"index":7,"ttl":1}`:   {ID: "0.5512", Index: 7, TTL: time.Millisecond},
		`{"id":42,"index":9007199254740991,"ttl":1}`:       {ID: "42", Index: 9007199254740991, TTL: time.Millisecond},
	} {
		var lease redfour.Lease
		require.NoError(t, json.Unmarshal([]byte(text), &lease), text)
		require.Equal(t, want.ID, lease.ID)
		require.Equal(t, want.Index, lease.Index)
		require.Equal(t, want.TTL, lease.TTL)
		require.Empty(t, lease.Token)
	}
}

func TestLease_JSONThatIsNoLease(t *testing.T) {
	for text, says := range map[string]string{
		`{"id":"42","success":false,"index":-1,"ttl":500}`: "redfour: lease: the object says that the lock was not got",
		`{"index":7,"ttl":500}`:                            "redfour: lease: want an id that is a string or a number",
		`{"id":null,"index":7,"ttl":500}`:                  "redfour: lease: empty id",
		`{"id":["42"],"index":7,"ttl":500}`:                "redfour: lease: want an id that is a string or a number",
		`{"id":"42","index":7,"ttl":-1}`:                   "redfour: lease: impossible ttl of -1 ms",
		`{"id":"42","index":7,"ttl":9223372036854775807}`:  "redfour: lease: impossible ttl of 9223372036854775807 ms",
		`{"id":"42","index":"7","ttl":1}`:                  "redfour: lease: json: cannot unmarshal string into Go struct field .index of type int64",
		`{"id":"42","index":7.5,"ttl":1}`:                  "redfour: lease: json: cannot unmarshal number 7.5 into Go struct field .index of type int64",
	} {
		var lease redfour.Lease
		require.EqualError(t, json.Unmarshal([]byte(text), &lease), says, text)
	}
}

// travel sends a lease to another process.
func travel(t *testing.T, lease *redfour.Lease) *redfour.Lease {
	t.Helper()
	encoded, err := json.Marshal(lease)
	require.NoError(t, err)
	arrived := new(redfour.Lease)
	require.NoError(t, json.Unmarshal(encoded, arrived))
	return arrived
}

func TestLease_travels(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		here, there := m.lock(t), m.lock(t)
		lease := mustAcquire(t, here, "42", time.Minute)
		arrived := travel(t, lease)
		before := time.Now()
		require.NoError(t, there.Renew(t.Context(), arrived, 3*time.Minute))
		require.Equal(t, before.Add(counted(3*time.Minute)), arrived.Deadline())
		twin := *arrived
		kept, stop := there.KeepAlive(t.Context(), &twin)
		defer stop()
		pass(10 * time.Minute)
		require.NoError(t, kept.Err())
		require.Positive(t, arrived.Remaining(), "copies share what renewals change")
		require.NoError(t, there.Release(t.Context(), arrived))
		require.False(t, m.Exists("lock:42"))
		require.ErrorIs(t, here.Release(t.Context(), lease), redfour.ErrExpired)
	})
}

// That a lease does not hold any more says nothing about how long it did.
func TestLease_deadlineOfALossStaysUnknown(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		arrived := travel(t, mustAcquire(t, l, "42", time.Second))
		pass(2 * time.Second)
		require.ErrorIs(t, l.Renew(t.Context(), arrived, time.Second), redfour.ErrExpired)
		require.Zero(t, arrived.Deadline())
	})
}

func TestLease_madeByHand(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Minute)
		made := &redfour.Lease{ID: lease.ID, Index: lease.Index, Token: lease.Token, TTL: lease.TTL}
		require.Zero(t, made.Deadline())
		require.NoError(t, l.Renew(t.Context(), made, 3*time.Minute))
		kept, stop := l.KeepAlive(t.Context(), made)
		defer stop()
		pass(10 * time.Minute)
		require.NoError(t, kept.Err())
		require.NoError(t, l.Release(t.Context(), made))
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
	})
}

// renewals records when renewals are sent.
func renewals(way *link) func() []time.Duration {
	start := time.Now()
	sent := make(chan time.Duration, 1000) // more than any test causes
	way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
		if isRenew(cmd) && cmd.Name() == "evalsha" {
			sent <- time.Since(start)
		}
		return nil
	})
	return func() (all []time.Duration) {
		for len(sent) > 0 {
			all = append(all, <-sent)
		}
		return all
	}
}

func TestKeepAlive_renewsAtAThird(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 30*time.Second)
		sent := renewals(way)
		kept, stop := l.KeepAlive(t.Context(), lease)
		again, stopAgain := l.KeepAlive(t.Context(), travel(t, lease))
		pass(35 * time.Second)
		require.Equal(t, []time.Duration{10 * time.Second, 20 * time.Second, 30 * time.Second}, sent())
		stop()
		require.Equal(t, context.Canceled, context.Cause(kept))
		require.NoError(t, again.Err())
		pass(10 * time.Second)
		require.Len(t, sent(), 1, "the second goes on with the renewals of the first")
		stopAgain()
		pass(time.Minute)
		require.Empty(t, sent())
		require.False(t, m.Exists("lock:42"))
	})
}

func TestKeepAlive_unknownDeadlineIsRenewedAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := travel(t, mustAcquire(t, l, "42", 30*time.Second))
		sent := renewals(way)
		_, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Second)
		require.Equal(t, []time.Duration{0}, sent())
		require.Equal(t, counted(30*time.Second)-time.Second, lease.Remaining())
	})
}

func TestKeepAlive_followsARenewalByHand(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 30*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, 3*time.Second))
		sent := renewals(way)
		pass(3500 * time.Millisecond)
		require.Equal(t, []time.Duration{time.Second, 2 * time.Second, 3 * time.Second}, sent())
		require.NoError(t, kept.Err())
	})
}

// A renewal by hand lowers the deadline before it is sent, which wakes the keeper. When
// its turn comes, the lease has been renewed for less, and is to stay so.
func TestKeepAlive_doesNotUndoARenewalByHand(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour)) // Redis knows the script from now on.
		_, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		synctest.Wait()
		way.beforeScript(once(isRenew, func() error { pass(100 * time.Millisecond); return nil }))
		require.NoError(t, l.Renew(t.Context(), lease, 3*time.Second))
		synctest.Wait()
		require.Equal(t, counted(3*time.Second)-100*time.Millisecond, lease.Remaining())
		require.LessOrEqual(t, m.TTL("lock:42"), 3*time.Second)
	})
}

func TestKeepAlive_ridesOutTrouble(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 30*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		for _, trouble := range []string{"READONLY x", "OOM x", "NOPERM x", "BUSY x", "ERR x"} {
			m.SetError(trouble)
			pass(15 * time.Second)
			m.SetError("")
			pass(10 * time.Second)
			require.NoError(t, kept.Err(), trouble)
		}
		way.afterScript(func(context.Context, redis.Cmder) error { return io.EOF })
		pass(15 * time.Second)
		way.afterScript(nil)
		pass(10 * time.Second)
		require.NoError(t, kept.Err())
	})
}

// A renewal hangs on a connection that has died; the next takes another.
func TestKeepAlive_doesNotDependOnOneConnection(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 3*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		hang := make(chan struct{})
		way.beforeScript(once(isRenew, func() error { <-hang; return io.EOF }))
		pass(time.Minute)
		require.NoError(t, kept.Err())
		close(hang)
	})
}

func TestKeepAlive_lossIsSignalledAtTheDeadlineWhileARenewalHangs(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 3*time.Second)
		deadline := lease.Deadline()
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return io.EOF })
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		<-kept.Done()
		require.Equal(t, deadline, time.Now())
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
		close(hang)
	})
}

// Somebody renews for less while a renewal of the keeper is on its way.
func TestKeepAlive_lossIsSignalledAtADeadlineThatCameNearer(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		hang := make(chan struct{})
		way.beforeScript(func(context.Context, redis.Cmder) error { <-hang; return io.EOF })
		pass(time.Second)
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		require.Error(t, l.Renew(ctx, lease, 5*time.Second))
		<-kept.Done()
		require.Equal(t, counted(5*time.Second), time.Since(start))
		close(hang)
	})
}

// For 5 s the renewal by hand is worth no more than the lost one, and the pace is that
// of the shorter.
func TestKeepAlive_isNotHurriedByALostReply(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 9*time.Second)
		_, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		way.afterScript(once(isRenew, lostReply))
		pass(4 * time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		sent := renewals(way)
		pass(28 * time.Second)
		require.Equal(t, []time.Duration{3 * time.Second, 6 * time.Second, 26 * time.Second}, sent())
	})
}

func TestKeepAlive_lossThatACallFoundIsSignalledAtOnce(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Hour)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Second)
		m.Del("lock:42")
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Hour), redfour.ErrExpired)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrExpired)
	})
}

// What is done with the lease from JSON is known to those who keep it alive.
func TestKeepAlive_followsALeaseFromJSON(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		arrived := travel(t, lease)
		require.NoError(t, l.Renew(t.Context(), arrived, 3*time.Second))
		require.Equal(t, counted(3*time.Second), lease.Remaining())
		require.Equal(t, counted(3*time.Second), arrived.Remaining())
		pass(time.Minute)
		require.NoError(t, kept.Err())
		require.Positive(t, lease.Remaining())
		require.NoError(t, l.Renew(t.Context(), arrived, time.Hour))

		way.afterScript(once(isRelease, lostReply))
		require.NoError(t, l.Release(t.Context(), arrived), "it was sent in time, as the keeper knows")
		require.Zero(t, lease.Remaining())
		require.Zero(t, arrived.Remaining())
	})
}

// A lease and what was decoded from its JSON are one, as soon as one Lock keeps both alive.
func TestKeepAlive_twinsShareWhatIsKnown(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", 10*time.Second)
		twin := travel(t, lease)
		keptTwin, stopTwin := l.KeepAlive(t.Context(), twin)
		defer stopTwin()
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		synctest.Wait()
		require.Equal(t, counted(10*time.Second), twin.Remaining())

		pass(20 * time.Second)
		require.NoError(t, kept.Err())
		require.Positive(t, lease.Remaining())
		require.Equal(t, twin.Deadline(), lease.Deadline())

		require.NoError(t, l.Release(t.Context(), twin))
		require.Zero(t, lease.Remaining())
		synctest.Wait()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
		require.ErrorIs(t, context.Cause(keptTwin), redfour.ErrNotHeld)
	})
}

func TestKeepAlive_twinsTellEachOtherWhatTheyKnew(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 10*time.Second)
		way.beforeScript(func(_ context.Context, cmd redis.Cmder) error {
			if isRenew(cmd) {
				return redis.ErrPoolTimeout
			}
			return nil
		})
		twin := travel(t, lease)
		kept, stop := l.KeepAlive(t.Context(), twin)
		defer stop()
		require.Zero(t, twin.Remaining(), "not known yet")
		require.ErrorIs(t, l.Renew(canceledAfter(t, time.Second), lease, time.Minute), redis.ErrPoolTimeout)
		require.Equal(t, counted(10*time.Second)-time.Second, twin.Remaining())
		require.NoError(t, kept.Err())

		over := mustAcquire(t, l, "43", 10*time.Second)
		require.NoError(t, l.Release(t.Context(), over))
		keptTwin, stopTwin := l.KeepAlive(t.Context(), travel(t, over))
		defer stopTwin()
		require.NoError(t, keptTwin.Err(), "not known yet")
		kept, stop = l.KeepAlive(t.Context(), over)
		defer stop()
		synctest.Wait()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
		require.ErrorIs(t, context.Cause(keptTwin), redfour.ErrNotHeld)
	})
}

func canceledAfter(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Two Locks keep the same two leases alive, each beginning with another one.
func TestKeepAlive_twinsThroughTwoLocks(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		locks := []*redfour.Lock{m.lock(t), m.lock(t)}
		lease := mustAcquire(t, locks[0], "42", 10*time.Second)
		leases := []*redfour.Lease{lease, travel(t, lease)}
		var kept []context.Context
		for _, first := range []int{0, 1} {
			for n, l := range locks {
				ctx, stop := l.KeepAlive(t.Context(), leases[(n+first)%2])
				defer stop()
				kept = append(kept, ctx)
			}
		}
		pass(time.Minute)
		require.Equal(t, leases[0].Deadline(), leases[1].Deadline())
		require.NoError(t, locks[1].Release(t.Context(), leases[0]))
		synctest.Wait()
		for _, ctx := range kept {
			require.ErrorIs(t, context.Cause(ctx), redfour.ErrNotHeld)
		}
		require.Zero(t, leases[0].Remaining()+leases[1].Remaining())
	})
}

// Copies of one lease are kept alive through two Locks, and both learn of all.
func TestKeepAlive_throughTwoLocks(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Minute)
		keptA, stopA := a.KeepAlive(t.Context(), lease)
		defer stopA()
		keptB, stopB := b.KeepAlive(t.Context(), lease)
		defer stopB()
		pass(time.Second)
		m.Del("lock:42")
		require.ErrorIs(t, a.Renew(t.Context(), lease, time.Minute), redfour.ErrExpired)
		synctest.Wait()
		require.ErrorIs(t, context.Cause(keptA), redfour.ErrExpired)
		require.ErrorIs(t, context.Cause(keptB), redfour.ErrExpired)
	})
}

func TestKeepAlive_badLease(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, l.Release(t.Context(), lease))
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
	})
}

// Release takes a copy and a lease from JSON for what they are: the same lease.
func TestRelease_stopsKeepAliveOfCopies(t *testing.T) {
	for name, twin := range map[string]func(*redfour.Lease) *redfour.Lease{
		"copy": func(l *redfour.Lease) *redfour.Lease { c := *l; return &c },
		"JSON": func(l *redfour.Lease) *redfour.Lease { return travel(t, l) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				way := new(link)
				l := m.lock(t, way)
				lease := mustAcquire(t, l, "42", time.Minute)
				kept, stop := l.KeepAlive(t.Context(), lease)
				defer stop()
				require.NoError(t, l.Release(t.Context(), twin(lease)))
				require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
				sent := renewals(way)
				pass(time.Hour)
				require.Empty(t, sent())
			})
		})
	}
}

// The same, when the renewal is one by hand whose caller has left.
// What one writes without thinking: the context of KeepAlive takes the place of the one before. The release itself ends it.
func TestRelease_withTheContextOfItsKeepAlive(t *testing.T) {
	for name, test := range map[string]struct {
		delay time.Duration
		after time.Duration // the release has ended
		want  string        // of the error
	}{
		"a slow answer is waited for": {400 * time.Millisecond, 400 * time.Millisecond, ""},
		"a late answer is":            {2 * time.Second, 2 * time.Second, ""},
		"no answer is not":            {6 * time.Second, 5 * time.Second, "outcome unknown"}, // Release tries for 5 s.
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				var way link
				l := m.lock(t, &way)
				lease := mustAcquire(t, l, "42", 30*time.Second)
				ctx, stop := l.KeepAlive(t.Context(), lease)
				defer stop()

				way.afterScript(func(_ context.Context, cmd redis.Cmder) error {
					if isRelease(cmd) {
						pass(test.delay)
					}
					return nil
				})
				began := time.Now()
				err := l.Release(ctx, lease)

				require.ErrorIs(t, context.Cause(ctx), redfour.ErrNotHeld, "it has ended")
				require.InDelta(t, test.after.Seconds(), time.Since(began).Seconds(), 0.2)
				if test.want == "" {
					require.NoError(t, err)
					return
				}
				require.ErrorContains(t, err, test.want)
				require.NotErrorIs(t, err, redfour.ErrNotHeld, "nobody said so")
			})
		})
	}
}

func TestRelease_joinsARenewalByHandFirst(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		hang := make(chan struct{})
		way.afterScript(once(isRenew, func() error { <-hang; return nil }))
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		require.ErrorIs(t, l.Renew(ctx, lease, time.Hour), context.DeadlineExceeded)
		time.AfterFunc(50*time.Millisecond, func() { close(hang) })
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Equal(t, 50*time.Millisecond, time.Since(start))
	})
}

func TestRelease_endsEveryKeepAlive(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Minute)
		first, stopFirst := l.KeepAlive(t.Context(), lease)
		defer stopFirst()
		second, stopSecond := l.KeepAlive(t.Context(), travel(t, lease))
		defer stopSecond()
		stopped, stopThird := l.KeepAlive(t.Context(), lease)
		stopThird()
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Zero(t, time.Since(start))
		require.ErrorIs(t, context.Cause(first), redfour.ErrNotHeld)
		require.ErrorIs(t, context.Cause(second), redfour.ErrNotHeld)
		require.Equal(t, context.Canceled, context.Cause(stopped))
	})
}

func TestRelease_noRenewalComesAfterIt(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		require.NoError(t, l.Release(t.Context(), lease))
		sent := way.sent()
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Hour), redfour.ErrNotHeld)
		require.Equal(t, sent, way.sent())
	})
}

// The renewal is on its way when Release is called; the release waits for it, or
// else the renewal could come after it.
func TestRelease_joinsTheRenewalFirst(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 3*time.Second)
		hang, entered := make(chan struct{}), make(chan struct{})
		way.afterScript(once(isRenew, func() error { close(entered); <-hang; return nil }))
		_, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		<-entered
		sent := way.sent()
		time.AfterFunc(50*time.Millisecond, func() {
			require.Equal(t, sent, way.sent(), "the release was not sent")
			close(hang)
		})
		start := time.Now()
		require.NoError(t, l.Release(t.Context(), lease))
		require.Equal(t, 50*time.Millisecond, time.Since(start))
		synctest.Wait()
		require.False(t, m.Exists("lock:42"))
	})
}

func TestLease_isPrintedWithoutItsToken(t *testing.T) {
	lease := redfour.Lease{ID: "42", Index: 17, Token: "secret", TTL: time.Minute}
	var log strings.Builder
	for _, l := range []any{lease, &lease, []redfour.Lease{lease}, struct{ L *redfour.Lease }{&lease}} {
		slog.New(slog.NewTextHandler(&log, nil)).Info("got", "lease", l)
		for _, verb := range []string{"%v", "%+v", "%#v", "%s"} {
			require.NotContains(t, fmt.Sprintf(verb, l), "secret", verb)
		}
	}
	slog.New(slog.NewJSONHandler(&log, nil)).Info("got", "lease", lease)
	require.NotContains(t, log.String(), "secret")
	require.Contains(t, log.String(), "lease.id=42 lease.index=17 lease.ttl=1m0s")
	require.Equal(t, `lease of "42" (index 17, ttl 1m0s)`, lease.String())
	require.NotContains(t, fmt.Sprintf("%v %+v", (*redfour.Lease)(nil), (*redfour.Lease)(nil)), "secret")
}

func TestRenew_afterReleaseMatchesErrExpired(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", time.Minute)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		require.NoError(t, l.Release(t.Context(), lease))
		require.ErrorIs(t, l.Renew(t.Context(), lease, time.Minute), redfour.ErrExpired)
		require.ErrorIs(t, context.Cause(kept), redfour.ErrNotHeld)
		require.NotErrorIs(t, context.Cause(kept), redfour.ErrExpired, "a release is no loss")
	})
}

func TestKeepAlive_restoresATTLThatWasShortenedFromOutside(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		l := m.lock(t)
		lease := mustAcquire(t, l, "42", 9*time.Second)
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		m.SetTTL("lock:42", 4*time.Second)
		pass(3100 * time.Millisecond) // the first renewal comes after 3 s
		require.NoError(t, kept.Err())
		require.Greater(t, m.TTL("lock:42"), 8*time.Second)
	})
}

// The margin of a deadline covers a clock of the server that gains 1000 ppm on ours.
func TestDeadline_isKeptByAServerWhoseClockGains1000ppm(t *testing.T) {
	for n, ttl := range []time.Duration{
		time.Millisecond, time.Millisecond, time.Second, time.Second, time.Hour, time.Hour,
	} {
		renewed := n%2 == 1
		t.Run(fmt.Sprint(ttl, renewed), func(t *testing.T) {
			bubble(t, func(t *testing.T, m *mini) {
				l := m.lock(t)
				began := time.Now()
				lease := mustAcquire(t, l, "42", ttl)
				require.Positive(t, lease.Remaining())
				if renewed {
					require.NoError(t, l.Renew(t.Context(), lease, 2*ttl))
				}
				pass(lease.Remaining())
				passed := time.Since(began)
				m.SetTime(began.Add(passed + passed/1000))
				require.True(t, m.Exists("lock:42"))
			})
		})
	}
}

// A grant is dated by the server's clock, which gained while the member waited.
func TestDeadline_ofAGrantIsKeptByAServerWhoseClockGains1000ppm(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		began := time.Now()
		gain := func() {
			passed := time.Since(began)
			m.SetTime(began.Add(passed + passed/1000))
		}
		pass(29 * time.Second)
		gain()
		require.NoError(t, a.Release(t.Context(), lease))
		granted := (<-got).lease
		pass(granted.Remaining())
		gain()
		require.Equal(t, granted.Token, m.HGet("lock:42", "token"))
	})
}

// What a waiter knows of a lease in its process is when it ends in Redis. A deadline
// that is earlier must not make it look twice.
func TestWaitAcquire_looksOnceAtTheEndOfALeaseOfItsProcess(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		a, b := m.lock(t), m.lock(t, way)
		lease := mustAcquire(t, a, "42", time.Hour)
		first := inLine(t.Context(), t, m, b, 15*time.Second)
		second := waitFor(t.Context(), b, "42", time.Second)
		synctest.Wait()
		require.NoError(t, a.Release(t.Context(), lease))
		takeLease(t, first)
		synctest.Wait()
		sent := way.sent()
		takeLease(t, second)
		require.Equal(t, sent+1, way.sent())
	})
}

// The reply to a renewal for less is lost. Once it can no longer come, later renewals
// count in full, and the lease is renewed at their pace.
func TestKeepAlive_recoversFromALostReplyToAShortRenewal(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Minute)
		way.afterScript(once(isRenew, lostReply))
		require.NoError(t, l.Renew(t.Context(), lease, 100*time.Millisecond))
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.Equal(t, counted(100*time.Millisecond), lease.Remaining(), "the other may still come")
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(5200 * time.Millisecond)
		require.Greater(t, lease.Remaining(), 59*time.Second)
		sent := renewals(way)
		pass(time.Minute)
		require.Len(t, sent(), 3)
		require.NoError(t, kept.Err())
	})
}

// As long as the client has not given it up, a renewal for less may still be sent.
func TestRenew_countsInFullOnlyAfterARenewalThatHangsIsOver(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", time.Hour)
		hang := make(chan struct{})
		way.beforeScript(once(isRenew, func() error { <-hang; return nil }))
		require.Error(t, l.Renew(canceledAfter(t, time.Second), lease, 10*time.Second))
		remaining := func() time.Duration {
			require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
			return lease.Remaining()
		}
		pass(time.Second)
		require.Equal(t, counted(10*time.Second), remaining())
		pass(9 * time.Second)
		require.Equal(t, counted(10*time.Second), remaining())
		close(hang)
		pass(4 * time.Second)
		require.Equal(t, counted(10*time.Second), remaining())
		pass(time.Second)
		require.Equal(t, counted(time.Hour), remaining())
	})
}

// The holder dies after it has renewed its lease for less.
func TestRenew_forLessReachesTheWaiters(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		a, b := m.lock(t), m.lock(t)
		lease := mustAcquire(t, a, "42", time.Hour)
		got := inLine(t.Context(), t, m, b, time.Minute)
		pass(5 * time.Second)
		require.NoError(t, a.Renew(t.Context(), lease, time.Second))
		began := time.Now()
		takeLease(t, got)
		require.Less(t, time.Since(began), time.Second+20*time.Millisecond)
	})
}

// A message reaches every process that waits in the namespace.
func TestRenew_wakesNobodyIfTheLeaseGetsNoShorter(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		client := m.client(t)
		l := newLock(t, client)
		ear := client.Subscribe(t.Context(), "lock-release")
		defer func() { _ = ear.Close() }()
		_, err := ear.Receive(t.Context())
		require.NoError(t, err)
		lease := mustAcquire(t, l, "42", 9*time.Second)
		_, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		pass(time.Minute)
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour))
		require.NoError(t, l.Renew(t.Context(), lease, time.Hour-10*time.Millisecond))
		synctest.Wait()
		require.Empty(t, ear.Channel())
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		require.Equal(t, "lock:42", (<-ear.Channel()).Payload)
	})
}

// The reply comes when its attempt was given up. The ttl that it brings is kept.
func TestKeepAlive_keepsTheTTLOfARenewalThatWasAnsweredLate(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		lease := mustAcquire(t, l, "42", 10*time.Second)
		require.NoError(t, l.Renew(t.Context(), lease, 10*time.Second))
		kept, stop := l.KeepAlive(t.Context(), lease)
		defer stop()
		way.slow(1500 * time.Millisecond)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		way.slow(0)
		pass(30 * time.Second)
		require.NoError(t, kept.Err())
		require.Greater(t, m.TTL("lock:42"), 20*time.Second)
	})
}

// The caller's ctx is that of another lease, which is released meanwhile.
func TestRenew_whoseContextEndsByAReleaseIsNoLoss(t *testing.T) {
	bubble(t, func(t *testing.T, m *mini) {
		way := new(link)
		l := m.lock(t, way)
		other, lease := mustAcquire(t, l, "other", time.Minute), mustAcquire(t, l, "42", time.Minute)
		require.NoError(t, l.Renew(t.Context(), lease, time.Minute))
		kept, stop := l.KeepAlive(t.Context(), other)
		defer stop()
		hang := make(chan struct{})
		way.afterScript(once(isRenew, func() error {
			<-hang
			return nil
		}))
		renewed := make(chan error, 1)
		go func() { renewed <- l.Renew(kept, lease, time.Minute) }()
		synctest.Wait()
		require.NoError(t, l.Release(t.Context(), other))
		err := <-renewed
		require.ErrorIs(t, err, context.Canceled)
		require.NotErrorIs(t, err, redfour.ErrExpired)
		close(hang)
	})
}
