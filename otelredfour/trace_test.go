package otelredfour_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/redfour-go/redfour"
)

// spans returns the spans that ended since the last call.
func (s *scene) spans() tracetest.SpanStubs {
	synctest.Wait()
	defer s.exporter.Reset()
	return s.exporter.GetSpans()
}

// span returns the only span that f makes within one of its caller, after it has checked what is true of every span.
func (s *scene) span(t *testing.T, f func(ctx context.Context)) tracetest.SpanStub {
	t.Helper()
	s.spans()
	ctx, caller := s.tracer.Start(t.Context(), "caller")
	began := time.Now()
	f(ctx)
	ended := time.Now()
	spans := s.spans()
	caller.End()
	require.Len(t, spans, 1)
	require.Equal(t, caller.SpanContext(), spans[0].Parent)
	require.Equal(t, trace.SpanKindInternal, spans[0].SpanKind)
	require.Equal(t, "github.com/redfour-go/redfour/otelredfour", spans[0].InstrumentationScope.Name)
	require.True(t, began.Equal(spans[0].StartTime))
	require.True(t, ended.Equal(spans[0].EndTime))
	return spans[0]
}

// requireSpan checks what tells one span from another. Attributes are the name and the value of each beyond the namespace.
func requireSpan(t *testing.T, span tracetest.SpanStub, name string, status codes.Code, attributes ...any) {
	t.Helper()
	require.Equal(t, name, span.Name)
	require.Equal(t, status, span.Status.Code)
	want := map[attribute.Key]any{"redfour.namespace": "lock"}
	for n := 0; n < len(attributes); n += 2 {
		want[attribute.Key(attributes[n].(string))] = attributes[n+1]
	}
	have := make(map[attribute.Key]any)
	for _, kv := range span.Attributes {
		have[kv.Key] = kv.Value.AsInterface()
	}
	require.Equal(t, want, have)
}

func TestSpans_ofAcquire(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		var lease *redfour.Lease
		var err error
		span := s.span(t, func(ctx context.Context) {
			lease, err = s.lock.Acquire(ctx, "42", time.Hour)
			require.NoError(t, err)
		})
		requireSpan(t, span, "redfour.acquire", codes.Unset, "redfour.acquire.outcome", "at_once", "redfour.lease.index", lease.Index)

		span = s.span(t, func(ctx context.Context) {
			_, err := s.lock.Acquire(ctx, "42", time.Hour)
			require.ErrorIs(t, err, redfour.ErrLocked)
		})
		requireSpan(t, span, "redfour.acquire", codes.Unset, "redfour.acquire.outcome", "held")

		span = s.span(t, func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := s.lock.WaitAcquire(ctx, "42", time.Hour)
			require.ErrorIs(t, err, redfour.ErrLocked)
		})
		requireSpan(t, span, "redfour.acquire", codes.Unset, "redfour.acquire.outcome", "timed_out")
		require.Equal(t, time.Second, span.EndTime.Sub(span.StartTime))

		other := mustAcquire(t, s.other, "43", time.Hour)
		span = s.span(t, func(ctx context.Context) {
			time.AfterFunc(time.Minute, func() { _ = s.other.Release(t.Context(), other) })
			lease, err = s.lock.WaitAcquire(ctx, "43", time.Hour)
			require.NoError(t, err)
		})
		requireSpan(t, span, "redfour.acquire", codes.Unset, "redfour.acquire.outcome", "after_wait", "redfour.lease.index", lease.Index)
		require.Equal(t, time.Minute, span.EndTime.Sub(span.StartTime))

		require.NoError(t, s.lock.Close())
		span = s.span(t, func(ctx context.Context) {
			_, err := s.lock.Acquire(ctx, "44", time.Hour)
			require.ErrorIs(t, err, redfour.ErrClosed)
		})
		requireSpan(t, span, "redfour.acquire", codes.Error, "redfour.acquire.outcome", "failed", "error.type", "closed")
	})
}

func TestSpans_ofRenewAndRelease(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		lease := mustAcquire(t, s.lock, "42", time.Hour)
		span := s.span(t, func(ctx context.Context) { require.NoError(t, s.lock.Renew(ctx, lease, time.Hour)) })
		requireSpan(t, span, "redfour.renew", codes.Unset, "redfour.lease.index", lease.Index)
		span = s.span(t, func(ctx context.Context) { require.NoError(t, s.lock.Release(ctx, lease)) })
		requireSpan(t, span, "redfour.release", codes.Unset, "redfour.lease.index", lease.Index)

		lease = mustAcquire(t, s.lock, "42", time.Hour)
		s.Del("lock:42")
		other := mustAcquire(t, s.other, "42", time.Hour)
		span = s.span(t, func(ctx context.Context) {
			require.ErrorIs(t, s.lock.Renew(ctx, lease, time.Hour), redfour.ErrConflict)
		})
		requireSpan(t, span, "redfour.renew", codes.Error, "redfour.lease.index", lease.Index, "error.type", "conflict")
		require.NoError(t, s.other.Release(t.Context(), other))
		span = s.span(t, func(ctx context.Context) { require.ErrorIs(t, s.lock.Release(ctx, lease), redfour.ErrExpired) })
		requireSpan(t, span, "redfour.release", codes.Error, "redfour.lease.index", lease.Index, "error.type", "expired")
	})
}

func TestSpans_ofWithLockStandBesideEachOther(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		ctx, caller := s.tracer.Start(t.Context(), "caller")
		err := s.lock.WithLock(ctx, "42", time.Minute, func(context.Context, *redfour.Lease) error {
			pass(time.Hour)
			return nil
		})
		require.NoError(t, err)
		spans := s.spans()
		require.Len(t, spans, 2, "renewals that succeed are none")
		require.Equal(t, "redfour.acquire", spans[0].Name)
		require.Equal(t, "redfour.release", spans[1].Name)
		for _, span := range spans {
			require.Equal(t, caller.SpanContext(), span.Parent)
		}
	})
}

func TestSpans_withoutACaller(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		lease := mustAcquire(t, s.lock, "42", time.Minute)
		spans := s.spans()
		require.Len(t, spans, 1)
		require.False(t, spans[0].Parent.IsValid())
		require.NoError(t, s.lock.Renew(t.Context(), lease, time.Minute))
		require.Empty(t, s.spans())

		_, stop := s.lock.KeepAlive(t.Context(), lease)
		defer stop()
		pass(30 * time.Second)
		require.Empty(t, s.spans())

		s.Del("lock:42")
		pass(20 * time.Second)
		spans = s.spans()
		require.Len(t, spans, 1)
		require.False(t, spans[0].Parent.IsValid())
		requireSpan(t, spans[0], "redfour.renew", codes.Error, "redfour.lease.index", lease.Index, "error.type", "expired")
	})
}

func TestSpans_aRenewalThatTheEndOfTheSectionCutsShortIsNone(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		lease := mustAcquire(t, s.lock, "42", time.Minute)
		_, stop := s.lock.KeepAlive(t.Context(), lease)
		defer stop()
		hang := make(chan struct{})
		s.link.beforeScript(func() error { <-hang; return nil })
		pass(20*time.Second + time.Millisecond)
		s.spans()
		require.Zero(t, s.moved(t, stop)["renewal.attempts failed"])
		require.Empty(t, s.spans())
		s.link.beforeScript(nil)
		close(hang)
	})
}

func TestErrorType(t *testing.T) {
	text := func(err error) error { return fmt.Errorf("redfour: acquire 42: outcome unknown: %w", err) }
	cause := func(ctxErr, cause error) error { return fmt.Errorf("%w: %w", ctxErr, cause) }
	for _, test := range []struct {
		err  error
		want string
	}{
		{redfour.ErrClosed, "closed"},
		{cause(context.Canceled, redfour.ErrClosed), "closed"},
		{cause(redfour.ErrNotReplicated, &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}), "not_replicated"},
		{context.Canceled, "canceled"},
		{cause(context.Canceled, redfour.ErrConflict), "canceled"},
		{context.DeadlineExceeded, "timeout"},
		{cause(context.DeadlineExceeded, redis.ErrPoolTimeout), "timeout"},
		{redis.ErrPoolTimeout, "timeout"},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, "timeout"},
		{redfour.ErrConflict, "conflict"},
		{redfour.ErrExpired, "expired"},
		{redfour.ErrNotHeld, "expired"},
		{&net.OpError{Op: "dial", Err: io.ErrClosedPipe}, "connection"},
		{&net.DNSError{Name: "redis-42"}, "connection"},
		{io.EOF, "connection"},
		{io.ErrUnexpectedEOF, "connection"},
		{redisError("OOM command not allowed"), "OOM"},
		{redisError("NOPERM this user has no permissions to access one of the keys"), "NOPERM"},
		{redisError("ERR unknown command"), "ERR"},
		{redisError("PERSON-42 is no code"), "_OTHER"},
		{redisError(""), "_OTHER"},
		{redis.Nil, "_OTHER"},
		{errors.New("OOM is not what Redis said"), "_OTHER"},
	} {
		bubble(t, func(t *testing.T, s *scene) {
			trace := s.telemetry.Trace()
			trace.Acquired(t.Context(), "42", time.Now(), nil, text(test.err))
			trace.Released(t.Context(), "42", 7, time.Now(), time.Second, text(test.err))
			spans := s.spans()
			require.Len(t, spans, 2)
			requireSpan(t, spans[0], "redfour.acquire", codes.Error, "redfour.acquire.outcome", "failed", "error.type", test.want)
			requireSpan(t, spans[1], "redfour.release", codes.Error, "redfour.lease.index", int64(7), "error.type", test.want)
			points := values(t, s.reader)
			require.EqualValues(t, 1, points["acquire.duration "+test.want+" failed"], points)
			require.NotContains(t, points, "hold.duration", "of a release that failed nothing is known")
		})
	}
}

type redisError string

func (e redisError) Error() string { return string(e) }
func (redisError) RedisError()     {}
