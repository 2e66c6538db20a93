package otelredfour

import (
	"context"
	"errors"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"github.com/redfour-go/redfour"
)

const (
	acquireOutcome = attribute.Key("redfour.acquire.outcome")
	renewalOutcome = attribute.Key("redfour.renewal.outcome")
	wakeupCause    = attribute.Key("redfour.wakeup.cause")
	leaseIndex     = attribute.Key("redfour.lease.index") // of spans only: each lease has another
)

// The values of acquireOutcome.
const (
	atOnce    = "at_once"
	afterWait = "after_wait"
	held      = "held"
	timedOut  = "timed_out"
	failed    = "failed"
)

// bounds are those of all histograms, in seconds. The lowest tell a round trip to a server nearby from one to a distant one, which is what a
// free lock costs; the highest, sections of seconds from those of minutes. Up to 10 s, each is at most two and a half times
// the one before.
var bounds = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}

func (i *Instrumentation) makeHistograms() error {
	var errs [3]error
	i.acquireDuration, errs[0] = i.makeHistogram("redfour.acquire.duration",
		"From a call of Acquire, WaitAcquire or WithLock to the lease, or to the error instead.")
	i.holdDuration, errs[1] = i.makeHistogram("redfour.hold.duration",
		"From the grant of a lease to its release.")
	i.renewalLateness, errs[2] = i.makeHistogram("redfour.renewal.lateness",
		"By how much a renewal in the background that succeeded came after a third of the ttl.")
	return errors.Join(errs[:]...)
}

func (i *Instrumentation) makeHistogram(name, description string) (metric.Float64Histogram, error) {
	return i.meter.Float64Histogram(name,
		metric.WithUnit("s"), metric.WithDescription(description), metric.WithExplicitBucketBoundaries(bounds...))
}

// A counted is a metric whose values are in Stats.
type counted struct {
	name, unit, description string

	falls bool          // it tells how many there are now, and not how many there were
	key   attribute.Key // tells its series apart; "" if there is one
	all   []series
}

// A series is one value of Stats.
type series struct {
	value string // of the attribute
	read  func(redfour.Stats) int64
}

// one is the only series of a metric.
func one(read func(redfour.Stats) int64) []series { return []series{{read: read}} }

// table has all metrics that are not histograms.
var table = []counted{
	{
		name: "redfour.waiter.count", unit: "{waiter}", falls: true,
		description: "Callers of WaitAcquire and WithLock that wait now.",
		all:         one(func(s redfour.Stats) int64 { return int64(s.Waiting) }),
	},
	{
		name: "redfour.keepalive.count", unit: "{lease}", falls: true,
		description: "Leases that are kept alive now.",
		all:         one(func(s redfour.Stats) int64 { return int64(s.KeptAlive) }),
	},
	{
		name: "redfour.acquire.calls", unit: "{call}", key: acquireOutcome,
		description: "Calls of Acquire, WaitAcquire and WithLock, by whether and how they got a lease.",
		all: []series{
			{atOnce, func(s redfour.Stats) int64 { return s.AtOnce }},
			{afterWait, func(s redfour.Stats) int64 { return s.AfterWait }},
			{held, func(s redfour.Stats) int64 { return s.FoundHeld }},
			{timedOut, func(s redfour.Stats) int64 { return s.TimedOut }},
			{failed, func(s redfour.Stats) int64 { return s.Failed }},
		},
	},
	{
		name: "redfour.lease.released", unit: "{lease}",
		description: "Leases that were released.",
		all:         one(func(s redfour.Stats) int64 { return s.Released }),
	},
	{
		name: "redfour.lease.lost", unit: "{lease}",
		description: "Leases that were found not to hold, so that their sections may have overlapped with others.",
		all:         one(func(s redfour.Stats) int64 { return s.Lost }),
	},
	{
		name: "redfour.lease.forced", unit: "{lease}",
		description: "Leases of others that ForceRelease has ended.",
		all:         one(func(s redfour.Stats) int64 { return s.Forced }),
	},
	{
		name: "redfour.renewal.attempts", unit: "{attempt}", key: renewalOutcome,
		description: "Attempts to renew a lease, by Renew or in the background.",
		all: []series{
			{"succeeded", func(s redfour.Stats) int64 { return s.Renewals }},
			{failed, func(s redfour.Stats) int64 { return s.RenewalsFailed }},
		},
	},
	{
		name: "redfour.wakeups", unit: "{wakeup}", key: wakeupCause,
		description: "Times that the waiters of an id looked at their lock, or got it, by why.",
		all: []series{
			{"release", func(s redfour.Stats) int64 { return s.WokenByRelease }},
			{"grant", func(s redfour.Stats) int64 { return s.WokenByGrant }},
			{"message", func(s redfour.Stats) int64 { return s.WokenByMessage }},
			{"timer", func(s redfour.Stats) int64 { return s.WokenByTimer }},
			{"subscription", func(s redfour.Stats) int64 { return s.WokenBySubscription }},
		},
	},
	{
		name: "redfour.grant.claimed", unit: "{grant}",
		description: "Leases that another process handed to this one.",
		all:         one(func(s redfour.Stats) int64 { return s.GrantsClaimed }),
	},
	{
		name: "redfour.lease.returned", unit: "{lease}",
		description: "Leases that came when nobody waited any more, or when their ttl was over, and were given back.",
		all:         one(func(s redfour.Stats) int64 { return s.Returned }),
	},
	{
		name: "redfour.subscription.confirmed", unit: "{subscription}",
		description: "Subscriptions that Redis confirmed, the first included.",
		all:         one(func(s redfour.Stats) int64 { return s.Subscriptions }),
	},
	{
		name: "redfour.subscription.lost", unit: "{subscription}",
		description: "Subscriptions that ended though somebody waited, or might have.",
		all:         one(func(s redfour.Stats) int64 { return s.SubscriptionsLost }),
	},
	{
		name: "redfour.unauthenticated", unit: "{outage}",
		description: "Outages in which Redis refused the password, or wanted one.",
		all:         one(func(s redfour.Stats) int64 { return s.Unauthenticated }),
	},
	{
		name: "redfour.scripts", unit: "{script}",
		description: "Scripts that were sent to Redis, those that were sent again included.",
		all:         one(func(s redfour.Stats) int64 { return s.Scripts }),
	},
	{
		name: "redfour.round_trips", unit: "{round_trip}",
		description: "Round trips in which scripts travelled, alone or together.",
		all:         one(func(s redfour.Stats) int64 { return s.RoundTrips }),
	},
	{
		name: "redfour.batches", unit: "{batch}",
		description: "Round trips in which more than one script travelled.",
		all:         one(func(s redfour.Stats) int64 { return s.Batches }),
	},
}

// A counter is an instrument for one metric of the table, with the attributes of its series.
type counter struct {
	counted

	instrument metric.Int64Observable
	attributes []metric.MeasurementOption // of the series with the same index
}

func (i *Instrumentation) makeCounters() error {
	for _, c := range table {
		instrument, err := i.makeInstrument(c)
		if err != nil {
			return err
		}
		made := counter{counted: c, instrument: instrument}
		for _, s := range c.all {
			attrs := []attribute.KeyValue{i.namespace}
			if c.key != "" {
				attrs = append(attrs, c.key.String(s.value))
			}
			made.attributes = append(made.attributes, metric.WithAttributeSet(attribute.NewSet(attrs...)))
		}
		i.counters = append(i.counters, made)
	}
	return nil
}

func (i *Instrumentation) makeInstrument(c counted) (metric.Int64Observable, error) {
	if c.falls {
		return i.meter.Int64ObservableUpDownCounter(c.name, metric.WithUnit(c.unit), metric.WithDescription(c.description))
	}
	return i.meter.Int64ObservableCounter(c.name, metric.WithUnit(c.unit), metric.WithDescription(c.description))
}

// register makes the meter read lock's Stats, once in each collection.
func (i *Instrumentation) register(lock *redfour.Lock) (metric.Registration, error) {
	instruments := make([]metric.Observable, len(i.counters))
	for n, c := range i.counters {
		instruments[n] = c.instrument
	}
	return i.meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		stats := lock.Stats()
		for _, c := range i.counters {
			for n, s := range c.all {
				o.ObserveInt64(c.instrument, s.read(stats), c.attributes[n])
			}
		}
		return nil
	}, instruments...)
}
