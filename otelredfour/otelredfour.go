// Package otelredfour turns what a [redfour.Lock] tells into OpenTelemetry metrics and spans.
//
//	telemetry, err := otelredfour.New()
//	…
//	lock, err := redfour.Open("redis://localhost:6379", redfour.WithTrace(telemetry.Trace()))
//	…
//	stop, err := telemetry.Observe(lock)
//
// [Instrumentation.Trace] feeds the histograms and makes the spans; [Instrumentation.Observe] feeds everything else, from
// [redfour.Lock.Stats]. Either can be used alone. dashboard.json is a dashboard of all of it for
// Grafana, with the names that the Prometheus exporter gives to the metrics by default.
//
// # Metrics
//
//	name                             kind             unit            attribute of its own
//	redfour.acquire.duration         histogram        s               redfour.acquire.outcome, error.type
//	redfour.hold.duration            histogram        s
//	redfour.renewal.lateness         histogram        s
//	redfour.waiter.count             up-down counter  {waiter}
//	redfour.keepalive.count          up-down counter  {lease}
//	redfour.acquire.calls            counter          {call}          redfour.acquire.outcome
//	redfour.lease.released           counter          {lease}
//	redfour.lease.lost               counter          {lease}
//	redfour.lease.forced             counter          {lease}
//	redfour.lease.returned           counter          {lease}
//	redfour.renewal.attempts         counter          {attempt}       redfour.renewal.outcome
//	redfour.wakeups                  counter          {wakeup}        redfour.wakeup.cause
//	redfour.grant.claimed            counter          {grant}
//	redfour.subscription.confirmed   counter          {subscription}
//	redfour.subscription.lost        counter          {subscription}
//	redfour.unauthenticated          counter          {outage}
//	redfour.scripts                  counter          {script}
//	redfour.round_trips              counter          {round_trip}
//	redfour.batches                  counter          {batch}
//
// Hold times are those of releases that succeeded, of leases that were granted in this process. Lateness is that of renewals in the
// background that succeeded, beyond a third of the ttl; one that was retried is late by the time that took. The fields WaitTime,
// HoldTime and RenewalsLate of [redfour.Stats] are sums of histograms (WaitTime that of after_wait), and so no metrics of their own.
//
// # Attributes
//
// Their values are few, whatever is locked and whatever goes wrong. No id, index, token or owner is ever one of a metric.
//
//	redfour.namespace        of every metric and span: see WithNamespace
//	redfour.acquire.outcome  at_once, after_wait: a lease; held: Acquire found another; timed_out: ctx ended; failed: any other error
//	redfour.renewal.outcome  succeeded, failed
//	redfour.wakeup.cause     release (in this Lock), grant, message (of a release elsewhere), timer, subscription
//	error.type               of the histogram if the outcome is failed, and of spans: closed, not_replicated, canceled, timeout, conflict, expired, connection, an error code of Redis
//	                         such as OOM or NOPERM, or _OTHER
//
// The namespace is no db.namespace, which for Redis is the number of a database.
//
// # Spans
//
// A call that got a lease, or did not, is a span redfour.acquire, an attempt to renew redfour.renew, and a release
// redfour.release. Their parent is the span in the caller's context. They are internal: what they sent to Redis, and how often, is for an
// instrumentation of go-redis to tell, in client spans. Those stand beside them and not below, because a span here begins in retrospect,
// when the call has ended.
//
// The status is Error, with error.type, where something failed. That a lock is held is what Acquire was asked; and when a
// wait should end is for the caller to say: the spans of both have the outcome, and no status. Errors of the library name the id, and may name
// keys and owners, so neither a status nor an event repeats their text.
//
// A renewal in the background belongs to no trace, and happens at every third of a ttl. So a renewal outside a trace is a span
// only if it failed. What has no duration (a wake-up, a subscription, the moment at
// which a lease is found lost) is no span: the renewal or the release that found the loss is one, and redfour.lease.lost counts it.
//
// Spans have redfour.namespace, redfour.acquire.outcome, error.type, and redfour.lease.index with the fencing index. They have no id, which
// may be personal data, and which a caller who wants it can set on the span around the call.
package otelredfour

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"

	"github.com/redfour-go/redfour"
)

// scope is the instrumentation scope of all metrics and spans.
const scope = "github.com/redfour-go/redfour/otelredfour"

// An Instrumentation makes metrics and spans of what happens in one [redfour.Lock]. A process with several Locks needs
// one for each, with a namespace of its own; they may share their providers. It is safe for concurrent use. Make it with [New].
type Instrumentation struct {
	namespace attribute.KeyValue
	tracer    trace.Tracer
	meter     metric.Meter

	acquireDuration metric.Float64Histogram
	holdDuration    metric.Float64Histogram
	renewalLateness metric.Float64Histogram
	counters        []counter

	observing atomic.Bool // from an Observe to its stop
}

// An Option changes a default of [New].
type Option func(*config) error

// config is what the options set.
type config struct {
	namespace string
	tracers   trace.TracerProvider
	meters    metric.MeterProvider
}

// New returns an Instrumentation for one Lock. It returns an error for an option that is not valid, and if the meter provider
// refuses an instrument.
func New(opts ...Option) (*Instrumentation, error) {
	c := config{namespace: "lock", tracers: otel.GetTracerProvider(), meters: otel.GetMeterProvider()}
	for _, opt := range opts {
		if opt == nil {
			return nil, errors.New("otelredfour: new: nil option")
		}
		if err := opt(&c); err != nil {
			return nil, fmt.Errorf("otelredfour: new: %w", err)
		}
	}
	i := &Instrumentation{
		namespace: attribute.String("redfour.namespace", c.namespace),
		tracer:    c.tracers.Tracer(scope, trace.WithSchemaURL(semconv.SchemaURL)),
		meter:     c.meters.Meter(scope, metric.WithSchemaURL(semconv.SchemaURL)),
	}
	if err := errors.Join(i.makeHistograms(), i.makeCounters()); err != nil {
		return nil, fmt.Errorf("otelredfour: new: %w", err)
	}
	return i, nil
}

// WithNamespace sets the attribute redfour.namespace, "lock" by default. Give it what [redfour.WithNamespace] was given; or another
// name, if the Locks of two Redis share a namespace: with one name, and one meter provider, they cannot be told
// apart, and what becomes of two values of one time series is the provider's choice. Each name is a set of time series, so a process must not make
// them up without end. The empty name is an error.
func WithNamespace(ns string) Option {
	return func(c *config) error {
		if ns == "" {
			return errors.New("empty namespace")
		}
		c.namespace = ns
		return nil
	}
}

// WithTracerProvider sets where spans go. By default that is the global tracer provider, whether it is set before New or after. Nil
// is an error; the provider of go.opentelemetry.io/otel/trace/noop makes no spans.
func WithTracerProvider(p trace.TracerProvider) Option {
	return func(c *config) error {
		if p == nil {
			return errors.New("nil tracer provider")
		}
		c.tracers = p
		return nil
	}
}

// WithMeterProvider sets where metrics go. By default that is the global meter provider, whether it is set before New or after. Nil
// is an error.
func WithMeterProvider(p metric.MeterProvider) Option {
	return func(c *config) error {
		if p == nil {
			return errors.New("nil meter provider")
		}
		c.meters = p
		return nil
	}
}

// Trace returns what [redfour.WithTrace] is to be given, once: of two the last counts. It sets Acquired, Renewed and Released, and leaves
// the rest to you. To have one of these three as well, call both:
//
//	trace := telemetry.Trace()
//	trace.Lost = func(id string, index int64, err error) { … }
//	released := trace.Released
//	trace.Released = func(ctx context.Context, id string, index int64, began time.Time, held time.Duration, err error) {
//		released(ctx, id, index, began, held, err)
//		…
//	}
func (i *Instrumentation) Trace() redfour.Trace {
	return redfour.Trace{Acquired: i.acquired, Renewed: i.renewed, Released: i.released}
}

// Observe exports what lock counts, whenever the meter provider collects, until stop is called. It returns an error for a nil Lock, while
// another Lock is observed, and if the provider refuses.
//
// After stop these metrics end, and the Instrumentation holds the Lock no longer. A Lock that is closed during shutdown
// is better not stopped before the provider has collected for the last time, which would lose what was counted since the time before. Stop may be
// called twice.
func (i *Instrumentation) Observe(lock *redfour.Lock) (stop func() error, err error) {
	if lock == nil {
		return nil, errors.New("otelredfour: observe: nil Lock")
	}
	// Two would be two values of one time series, which need not be added up, and if they are, fall when one ends.
	if !i.observing.CompareAndSwap(false, true) {
		return nil, errors.New("otelredfour: observe: a Lock is observed already: stop that, or use an Instrumentation for each Lock")
	}
	registration, err := i.register(lock)
	if err != nil {
		i.observing.Store(false)
		return nil, fmt.Errorf("otelredfour: observe: %w", err)
	}
	return sync.OnceValue(func() error {
		err := registration.Unregister()
		i.observing.Store(false)
		return err
	}), nil
}
