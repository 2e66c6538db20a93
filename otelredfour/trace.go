package otelredfour

import (
	"context"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/redfour-go/redfour"
)

func (i *Instrumentation) acquired(ctx context.Context, _ string, began time.Time, lease *redfour.Lease, err error) {
	ended := time.Now()
	outcome := outcomeOf(ctx, lease, err)
	attrs := []attribute.KeyValue{i.namespace, acquireOutcome.String(outcome)}
	if outcome != failed {
		err = nil // An answer, or the caller's own decision.
	} else {
		attrs = append(attrs, errorType(err))
	}
	i.acquireDuration.Record(ctx, ended.Sub(began).Seconds(), metric.WithAttributes(attrs...))
	if lease != nil {
		attrs = append(attrs, leaseIndex.Int64(lease.Index))
	}
	i.span(ctx, "redfour.acquire", began, ended, err, attrs)
}

// outcomeOf tells how a call ended, in the words and the order in which [redfour.Stats] counts it.
func outcomeOf(ctx context.Context, lease *redfour.Lease, err error) string {
	switch {
	case err == nil && lease.Immediate:
		return atOnce
	case err == nil:
		return afterWait
	case ctx.Err() != nil:
		return timedOut
	case errors.Is(err, redfour.ErrLocked):
		return held
	}
	return failed
}

func (i *Instrumentation) renewed(ctx context.Context, _ string, index int64, began time.Time, late time.Duration, err error) {
	ended := time.Now()
	if err == nil && late > 0 { // It is 0 if Renew was called, which is never late.
		i.renewalLateness.Record(ctx, late.Seconds(), metric.WithAttributes(i.namespace))
	}
	traced := trace.SpanContextFromContext(ctx).IsValid()
	if !traced && err == nil {
		return
	}
	i.leaseSpan(ctx, "redfour.renew", index, began, ended, err)
}

func (i *Instrumentation) released(ctx context.Context, _ string, index int64, began time.Time, held time.Duration, err error) {
	ended := time.Now()
	// A release that failed may be one of many, or come long after the lease was over.
	if err == nil && held > 0 {
		i.holdDuration.Record(ctx, held.Seconds(), metric.WithAttributes(i.namespace))
	}
	i.leaseSpan(ctx, "redfour.release", index, began, ended, err)
}

// leaseSpan makes the span of what was done to a lease.
func (i *Instrumentation) leaseSpan(ctx context.Context, name string, index int64, began, ended time.Time, err error) {
	attrs := []attribute.KeyValue{i.namespace, leaseIndex.Int64(index)}
	if err != nil {
		attrs = append(attrs, errorType(err))
	}
	i.span(ctx, name, began, ended, err, attrs)
}

// span makes a span of what has ended. The status has no description: what may be said of err is its type.
func (i *Instrumentation) span(
	ctx context.Context, name string, began, ended time.Time, err error, attrs []attribute.KeyValue,
) {
	_, span := i.tracer.Start(ctx, name,
		trace.WithSpanKind(trace.SpanKindInternal), trace.WithTimestamp(began), trace.WithAttributes(attrs...))
	if err != nil {
		span.SetStatus(codes.Error, "")
	}
	span.End(trace.WithTimestamp(ended))
}

// codesOfRedis are the first words of the errors of Redis that may be an error.type, as they are in db.response.status_code.
// The list bounds them: a script, a module or a proxy can make others.
var codesOfRedis = []string{
	"BUSY", "CLUSTERDOWN", "ERR", "EXECABORT", "LOADING", "MASTERDOWN", "MISCONF", "NOAUTH", "NOPERM", "NOREPLICAS",
	"OOM", "READONLY", "TRYAGAIN", "WRONGPASS", "WRONGTYPE",
}

// errorType classifies what failed. The end of a caller's ctx comes before what Redis or the lock may have said: its cause may be an error about
// another lock, and matches as if it were about this one.
func errorType(err error) attribute.KeyValue {
	is := func(target error) bool { return errors.Is(err, target) }
	netErr, isNet := errors.AsType[net.Error](err)
	kind := ""
	switch {
	case is(redfour.ErrClosed):
		kind = "closed"
	case is(redfour.ErrNotReplicated):
		kind = "not_replicated"
	case is(context.Canceled):
		kind = "canceled"
	case is(context.DeadlineExceeded), is(redis.ErrPoolTimeout), isNet && netErr.Timeout():
		kind = "timeout"
	case is(redfour.ErrConflict):
		kind = "conflict"
	case is(redfour.ErrNotHeld):
		kind = "expired"
	case isNet, is(io.EOF), is(io.ErrUnexpectedEOF):
		kind = "connection"
	default:
		return codeOfRedis(err)
	}
	return semconv.ErrorTypeKey.String(kind)
}

func codeOfRedis(err error) attribute.KeyValue {
	if reply, ok := errors.AsType[redis.Error](err); ok {
		if code, _, _ := strings.Cut(reply.Error(), " "); slices.Contains(codesOfRedis, code) {
			return semconv.ErrorTypeKey.String(code)
		}
	}
	return semconv.ErrorTypeOther
}
