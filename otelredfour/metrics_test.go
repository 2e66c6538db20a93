package otelredfour_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/otelredfour"
)

// metricTests are events, and the points that each moves.
var metricTests = map[string]struct {
	prepare func(t *testing.T, s *scene) (happen func())
	want    map[string]int64
}{
	"nothing": {
		func(*testing.T, *scene) func() { return func() { pass(time.Hour) } },
		map[string]int64{},
	},
	"a lease at once": {
		func(t *testing.T, s *scene) func() {
			return func() { mustAcquire(t, s.lock, "42", time.Hour) }
		},
		map[string]int64{"acquire.calls at_once": 1, "acquire.duration at_once": 1, "scripts": 1, "round_trips": 1},
	},
	"held": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Hour)
			return func() {
				_, err := s.lock.Acquire(t.Context(), "42", time.Hour)
				require.ErrorIs(t, err, redfour.ErrLocked)
			}
		},
		map[string]int64{"acquire.calls held": 1, "acquire.duration held": 1, "scripts": 1, "round_trips": 1},
	},
	"failed": {
		func(t *testing.T, s *scene) func() {
			return func() {
				_, err := s.lock.Acquire(t.Context(), "", time.Hour)
				require.Error(t, err)
			}
		},
		map[string]int64{"acquire.calls failed": 1, "acquire.duration _OTHER failed": 1},
	},
	"a waiter comes": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Hour)
			return func() { waitFor(t.Context(), s.lock, "42") }
		},
		map[string]int64{
			"waiter.count": 1, "subscription.confirmed": 1, "wakeups subscription": 1, "scripts": some, "round_trips": some,
		},
	},
	"a waiter leaves": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Hour)
			ctx, cancel := context.WithCancel(t.Context())
			got := waitFor(ctx, s.lock, "42")
			return func() {
				cancel()
				require.ErrorIs(t, <-got, context.Canceled)
			}
		},
		map[string]int64{
			"waiter.count": -1, "acquire.calls timed_out": 1, "acquire.duration timed_out": 1, "scripts": some, "round_trips": some,
		},
	},
	"a release in this Lock": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			got := waitFor(t.Context(), s.lock, "42")
			return func() {
				require.NoError(t, s.lock.Release(t.Context(), lease))
				require.NoError(t, <-got)
			}
		},
		map[string]int64{
			"waiter.count": -1, "lease.released": 1, "hold.duration": 1, "wakeups release": 1,
			"acquire.calls after_wait": 1, "acquire.duration after_wait": 1, "scripts": 1, "round_trips": 1,
		},
	},
	"a grant by another process": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.other, "42", time.Hour)
			got := waitFor(t.Context(), s.lock, "42")
			return func() {
				require.NoError(t, s.other.Release(t.Context(), lease))
				require.NoError(t, <-got)
			}
		},
		map[string]int64{
			"waiter.count": -1, "wakeups grant": 1, "grant.claimed": 1,
			"acquire.calls after_wait": 1, "acquire.duration after_wait": 1,
		},
	},
	"the message of a release": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Hour)
			waitFor(t.Context(), s.lock, "42")
			return func() {
				s.Publish("lock-release", "lock:42") // as npm does; the lock is held again
				pass(time.Second)                    // It looks after a pause.
			}
		},
		map[string]int64{"wakeups message": 1, "scripts": some, "round_trips": some},
	},
	"the end of the holder's lease": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Second)
			got := waitFor(t.Context(), s.lock, "42")
			return func() { require.NoError(t, <-got) }
		},
		map[string]int64{
			"waiter.count": -1, "wakeups timer": 1, "acquire.calls after_wait": 1, "acquire.duration after_wait": 1,
			"scripts": some, "round_trips": some, // its subscription is checked once a second as well
			"wakeups message": maybe, // its own, to those who do not queue
		},
	},
	"a lease that comes for nobody": {
		func(t *testing.T, s *scene) func() {
			hang := make(chan struct{})
			s.link.afterScript(func() { <-hang })
			ctx, cancel := context.WithCancel(t.Context())
			got := waitFor(ctx, s.lock, "42")
			cancel()
			require.ErrorIs(t, <-got, context.Canceled)
			return func() {
				close(hang)
				synctest.Wait()
				require.False(t, s.Exists("lock:42"))
			}
		},
		map[string]int64{"lease.returned": 1, "scripts": some, "round_trips": some},
	},
	"a release": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			pass(time.Second)
			return func() { require.NoError(t, s.lock.Release(t.Context(), lease)) }
		},
		map[string]int64{"lease.released": 1, "hold.duration": 1, "scripts": 1, "round_trips": 1},
	},
	"a release of a lease that was granted elsewhere": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.other, "42", time.Hour)
			data, err := lease.MarshalJSON()
			require.NoError(t, err)
			var travelled redfour.Lease
			require.NoError(t, travelled.UnmarshalJSON(data))
			pass(time.Second)
			return func() { require.NoError(t, s.lock.Release(t.Context(), &travelled)) }
		},
		map[string]int64{"lease.released": 1, "scripts": 1, "round_trips": 1},
	},
	"a release that finds the lease lost": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			pass(time.Second)
			s.Del("lock:42")
			return func() { require.ErrorIs(t, s.lock.Release(t.Context(), lease), redfour.ErrExpired) }
		},
		map[string]int64{"lease.lost": 1, "scripts": 1, "round_trips": 1},
	},
	"a renewal": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			pass(time.Second)
			return func() { require.NoError(t, s.lock.Renew(t.Context(), lease, time.Hour)) }
		},
		map[string]int64{"renewal.attempts succeeded": 1, "scripts": 1, "round_trips": 1},
	},
	"a lease of somebody else is ended": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.other, "42", time.Hour)
			return func() { require.NoError(t, s.lock.ForceRelease(t.Context(), "42", lease.Index)) }
		},
		map[string]int64{"lease.forced": 1, "scripts": some, "round_trips": some},
	},
	"a renewal that finds the lease lost": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			s.Del("lock:42")
			return func() { require.ErrorIs(t, s.lock.Renew(t.Context(), lease, time.Hour), redfour.ErrExpired) }
		},
		map[string]int64{"renewal.attempts failed": 1, "lease.lost": 1, "scripts": 1, "round_trips": 1},
	},
	"a lease is kept alive": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", 3*time.Second)
			return func() {
				_, stop := s.lock.KeepAlive(t.Context(), lease)
				t.Cleanup(stop)
				pass(1500 * time.Millisecond)
			}
		},
		map[string]int64{"keepalive.count": 1, "renewal.attempts succeeded": 1, "scripts": 1, "round_trips": 1},
	},
	"a lease is kept alive no longer": {
		func(t *testing.T, s *scene) func() {
			_, stop := s.lock.KeepAlive(t.Context(), mustAcquire(t, s.lock, "42", 3*time.Second))
			return stop
		},
		map[string]int64{"keepalive.count": -1},
	},
	"a renewal in the background is late": {
		func(t *testing.T, s *scene) func() {
			_, stop := s.lock.KeepAlive(t.Context(), mustAcquire(t, s.lock, "42", time.Minute))
			t.Cleanup(stop)
			pass(time.Second)
			return func() {
				left := 2
				s.link.beforeScript(func() error {
					left--
					if left < 0 {
						return nil
					}
					return errors.New("not now")
				})
				pass(25 * time.Second)
			}
		},
		map[string]int64{
			"renewal.attempts failed": 2, "renewal.attempts succeeded": 1, "renewal.lateness": 1, "scripts": 3, "round_trips": 3,
		},
	},
	"a subscription is lost": {
		func(t *testing.T, s *scene) func() {
			mustAcquire(t, s.other, "42", time.Hour)
			waitFor(t.Context(), s.lock, "42")
			return func() {
				s.link.cut()
				synctest.Wait() // It is there again after a pause.
			}
		},
		map[string]int64{"subscription.lost": 1},
	},
	"the password is refused": {
		func(t *testing.T, s *scene) func() {
			lease := mustAcquire(t, s.lock, "42", time.Hour)
			return func() {
				s.SetError("WRONGPASS x")
				time.AfterFunc(time.Millisecond, func() { s.SetError("") })
				require.NoError(t, s.lock.Renew(t.Context(), lease, time.Hour))
			}
		},
		map[string]int64{"unauthenticated": 1, "renewal.attempts failed": 1, "renewal.attempts succeeded": 1, "scripts": 2, "round_trips": 2},
	},
	"calls at the same time": {
		func(t *testing.T, s *scene) func() {
			return func() {
				// While a few round trips are under way, those that come then gather.
				hang := make(chan struct{})
				s.link.beforeScript(func() error { <-hang; return nil })
				var calls sync.WaitGroup
				for n := range 12 {
					calls.Go(func() { _, _ = s.lock.Acquire(t.Context(), fmt.Sprint(n), time.Hour) })
					synctest.Wait()
				}
				close(hang)
				calls.Wait()
			}
		},
		map[string]int64{
			"acquire.calls at_once": 12, "acquire.duration at_once": 12, "scripts": 12, "round_trips": some, "batches": some,
		},
	},
}

func TestMetrics_moveByWhatTheyAreAboutAndByNothingElse(t *testing.T) {
	for name, test := range metricTests {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, s *scene) {
				happen := test.prepare(t, s)
				requireMoved(t, test.want, s.moved(t, happen))
			})
		})
	}
}

// The table in the package doc is what people read before they query.
func TestMetrics_areThoseOfThePackageDoc(t *testing.T) {
	type row struct{ kind, unit, attributes string }
	want := make(map[string]row)
	source, err := os.ReadFile("otelredfour.go")
	require.NoError(t, err)
	rows := regexp.MustCompile(`(?m)^//\t(redfour\.[\w.]+) +(histogram|counter|up-down counter) +(\S+) *(.*)$`)
	for _, cells := range rows.FindAllStringSubmatch(string(source), -1) {
		want[cells[1]] = row{cells[2], cells[3], cells[4]}
	}

	have := make(map[string]row)
	for _, test := range metricTests {
		bubble(t, func(t *testing.T, s *scene) {
			test.prepare(t, s)()
			for _, p := range collect(t, s.reader) {
				m := row{p.kind, p.unit, have[p.metric].attributes}
				for _, kv := range p.attributes.ToSlice() {
					if key := string(kv.Key); key != "redfour.namespace" && !strings.Contains(m.attributes, key) {
						keys := append(strings.FieldsFunc(m.attributes, func(r rune) bool { return r == ',' || r == ' ' }), key)
						slices.SortFunc(keys, func(a, b string) int { return strings.Compare(b, a) })
						m.attributes = strings.Join(keys, ", ")
					}
				}
				have[p.metric] = m
			}
		})
	}
	require.Equal(t, want, have)
}

func TestMetrics_durationsAreInSeconds(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		lease := mustAcquire(t, s.other, "42", time.Hour)
		got := waitFor(t.Context(), s.lock, "42") // for 10 ms
		pass(1490 * time.Millisecond)
		require.NoError(t, s.other.Release(t.Context(), lease))
		require.NoError(t, <-got)

		lease = mustAcquire(t, s.lock, "43", time.Minute)
		_, stop := s.lock.KeepAlive(t.Context(), lease)
		defer stop()
		pass(19 * time.Second)
		s.link.beforeScript(func() error { return errors.New("not now") })
		pass(6 * time.Second) // The renewal was due after 20 s.
		s.link.beforeScript(nil)
		pass(time.Second)
		require.NoError(t, s.lock.Release(t.Context(), lease))

		sums := make(map[string]float64)
		for _, p := range collect(t, s.reader) {
			if p.unit == "s" {
				sums[p.String()] = p.sum
			}
		}
		require.InDelta(t, 1.5, sums["acquire.duration after_wait"], 1e-6)
		require.InDelta(t, 26, sums["hold.duration"], 1e-6)
		require.Greater(t, sums["renewal.lateness"], 5.0)
		require.Less(t, sums["renewal.lateness"], 6.0)
		stats := s.lock.Stats()
		require.InDelta(t, stats.WaitTime.Seconds(), sums["acquire.duration after_wait"]+sums["acquire.duration at_once"], 1e-6)
		require.InDelta(t, stats.HoldTime.Seconds(), sums["hold.duration"], 1e-6)
		require.InDelta(t, stats.RenewalsLate.Seconds(), sums["renewal.lateness"], 1e-6)
	})
}

// A field that is added to Stats has to become a metric.
func TestMetrics_haveEveryFieldOfStats(t *testing.T) {
	sums := []string{"WaitTime", "HoldTime", "RenewalsLate"} // of histograms
	read := make(map[string]string)
	for n, f := range reflect.VisibleFields(reflect.TypeFor[redfour.Stats]()) {
		var stats redfour.Stats
		reflect.ValueOf(&stats).Elem().Field(n).SetInt(7)
		for name, value := range otelredfour.Read(stats) {
			if value != 0 {
				require.EqualValues(t, 7, value, name)
				require.NotContains(t, read, name, f.Name)
				require.NotContains(t, read, f.Name, name)
				read[name], read[f.Name] = f.Name, name
			}
		}
		if _, ok := read[f.Name]; !ok {
			require.Contains(t, sums, f.Name, "a field that no metric has")
		}
	}
	for name := range otelredfour.Read(redfour.Stats{}) {
		require.Contains(t, read, name, "a metric that no field moves")
	}
}

// What is locked, by whom, and how it ends leaves the number of time series as it is.
func TestMetrics_idsAreNoAttributes(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		var secrets []string
		use := func(from, to int) {
			for n := from; n < to; n++ {
				secrets = append(secrets, s.liveThrough(t, fmt.Sprintf("person-%d", n))...)
			}
		}
		use(0, 3)
		few := collect(t, s.reader)
		use(3, 30)
		points := collect(t, s.reader)
		require.Len(t, points, len(few))
		require.Less(t, len(points), 60)

		known := []attribute.Key{"redfour.namespace", "redfour.acquire.outcome", "redfour.renewal.outcome", "redfour.wakeup.cause", "error.type"}
		require.Len(t, secrets, 30*5)
		for _, p := range points {
			for _, kv := range p.attributes.ToSlice() {
				require.Contains(t, known, kv.Key)
				requireNoSecret(t, secrets, kv)
			}
			namespace, ok := p.attributes.Value("redfour.namespace")
			require.True(t, ok, p.metric)
			require.Equal(t, "lock", namespace.AsString())
		}
		for _, span := range s.exporter.GetSpans() {
			require.NotContains(t, span.Name, "person")
			require.Empty(t, span.Status.Description)
			require.Empty(t, span.Events)
			for _, kv := range span.Attributes {
				if kv.Key != "redfour.lease.index" {
					requireNoSecret(t, secrets, kv)
				}
			}
		}
	})
}

func requireNoSecret(t *testing.T, secrets []string, kv attribute.KeyValue) {
	t.Helper()
	for _, secret := range secrets {
		if strings.Contains(kv.Value.String(), secret) {
			require.Fail(t, "a secret in an attribute", "%s is %s", kv.Key, kv.Value.String())
		}
	}
}

// liveThrough does with an id all that can be done, well or not. It returns what must not be in an attribute.
func (s *scene) liveThrough(t *testing.T, id string) []string {
	t.Helper()
	lease := mustAcquire(t, s.other, id, time.Hour)
	_, err := s.lock.Acquire(t.Context(), id, time.Hour)
	locked, ok := errors.AsType[*redfour.LockedError](err)
	require.True(t, ok)
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = s.lock.WaitAcquire(ctx, id, time.Hour)
	require.ErrorIs(t, err, context.DeadlineExceeded)
	got := waitFor(t.Context(), s.lock, id)
	require.NoError(t, s.other.Release(t.Context(), lease))
	require.NoError(t, <-got)
	s.Del("lock:" + id)

	lease = mustAcquire(t, s.lock, id, time.Hour)
	require.NoError(t, s.lock.Renew(t.Context(), lease, time.Hour))
	s.Del("lock:" + id)
	require.ErrorIs(t, s.lock.Renew(t.Context(), lease, time.Hour), redfour.ErrExpired)
	require.ErrorIs(t, s.lock.Release(t.Context(), lease), redfour.ErrExpired)
	// Redis and the library both name the key, in errors of their own.
	require.NoError(t, s.Set("lock:"+id, "no lock"))
	_, err = s.lock.Acquire(t.Context(), id, time.Hour)
	require.ErrorContains(t, err, "lock:"+id)
	s.Del("lock:" + id)
	return []string{id, fmt.Sprint(lease.Index), lease.Token, fmt.Sprint(locked.Index), locked.Owner}
}

func TestObserve_ends(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		meters, reader := newMeters()
		telemetry, err := otelredfour.New(otelredfour.WithMeterProvider(meters), otelredfour.WithNamespace("orders"))
		require.NoError(t, err)
		require.Empty(t, collect(t, reader))
		_, err = telemetry.Observe(nil)
		require.ErrorContains(t, err, "nil Lock")

		stop, err := telemetry.Observe(s.other)
		require.NoError(t, err)
		require.NotEmpty(t, collect(t, reader))
		_, err = telemetry.Observe(s.lock)
		require.ErrorContains(t, err, "a Lock is observed already")
		require.NoError(t, stop())
		require.Empty(t, collect(t, reader))

		again, err := telemetry.Observe(s.lock)
		require.NoError(t, err)
		require.NoError(t, stop(), "the second call does nothing")
		require.NotEmpty(t, collect(t, reader))
		_, err = telemetry.Observe(s.other)
		require.Error(t, err)
		require.NoError(t, again())
	})
}

// A refusing is a meter that makes no instruments, or no callbacks.
type refusing struct {
	metric.Meter

	instruments, callbacks bool
}

var errRefused = errors.New("refused")

func (r *refusing) Float64Histogram(name string, opts ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	if r.instruments {
		return nil, errRefused
	}
	return r.Meter.Float64Histogram(name, opts...)
}

func (r *refusing) RegisterCallback(f metric.Callback, of ...metric.Observable) (metric.Registration, error) {
	if r.callbacks {
		return nil, errRefused
	}
	return r.Meter.RegisterCallback(f, of...)
}

// A provider has one meter.
type provider struct {
	noop.MeterProvider

	meter metric.Meter
}

func (p provider) Meter(string, ...metric.MeterOption) metric.Meter { return p.meter }

func TestObserve_aProviderThatRefuses(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		meter := &refusing{Meter: noop.Meter{}, instruments: true, callbacks: true}
		_, err := otelredfour.New(otelredfour.WithMeterProvider(provider{meter: meter}))
		require.ErrorIs(t, err, errRefused)
		meter.instruments = false
		telemetry, err := otelredfour.New(otelredfour.WithMeterProvider(provider{meter: meter}))
		require.NoError(t, err)
		_, err = telemetry.Observe(s.lock)
		require.ErrorIs(t, err, errRefused)
		meter.callbacks = false
		stop, err := telemetry.Observe(s.lock)
		require.NoError(t, err, "nothing is observed yet")
		require.NoError(t, stop())
	})
}

// After Close the last counts are still to be collected.
func TestObserve_aLockThatWasClosed(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		mustAcquire(t, s.lock, "42", time.Hour)
		require.NoError(t, s.lock.Close())
		require.EqualValues(t, 2, values(t, s.reader)["acquire.calls at_once"])
	})
}

func TestObserve_severalLocksAreToldApart(t *testing.T) {
	bubble(t, func(t *testing.T, s *scene) {
		telemetry, err := otelredfour.New(otelredfour.WithMeterProvider(s.meters), otelredfour.WithNamespace("orders"))
		require.NoError(t, err)
		orders := s.newLock(t, new(link), redfour.WithNamespace("orders"), redfour.WithTrace(telemetry.Trace()))
		stop, err := telemetry.Observe(orders)
		require.NoError(t, err)
		defer func() { _ = stop() }()
		for n := range 3 {
			mustAcquire(t, orders, fmt.Sprint(n), time.Hour)
		}

		calls := make(map[string]int64)
		for _, p := range collect(t, s.reader) {
			if strings.HasSuffix(p.String(), " at_once") {
				namespace, _ := p.attributes.Value("redfour.namespace")
				calls[p.metric+" "+namespace.AsString()] = p.value
			}
		}
		require.Equal(t, map[string]int64{
			"redfour.acquire.calls lock": 1, "redfour.acquire.duration lock": 1, // the warm-up
			"redfour.acquire.calls orders": 3, "redfour.acquire.duration orders": 3,
		}, calls)
	})
}

func TestNew_validatesOptions(t *testing.T) {
	for want, opt := range map[string]otelredfour.Option{
		"nil option":          nil,
		"empty namespace":     otelredfour.WithNamespace(""),
		"nil tracer provider": otelredfour.WithTracerProvider(nil),
		"nil meter provider":  otelredfour.WithMeterProvider(nil),
	} {
		_, err := otelredfour.New(opt)
		require.EqualError(t, err, "otelredfour: new: "+want)
	}
}

func TestNew_usesTheGlobalProviders(t *testing.T) {
	meters, reader := newMeters()
	exporter := tracetest.NewInMemoryExporter()
	otel.SetMeterProvider(meters)
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter)))
	telemetry, err := otelredfour.New()
	require.NoError(t, err)
	telemetry.Trace().Acquired(t.Context(), "42", time.Now(), nil, redfour.ErrClosed)
	require.Len(t, collect(t, reader), 1)
	require.Len(t, exporter.GetSpans(), 1)
}

func newMeters() (*sdkmetric.MeterProvider, *sdkmetric.ManualReader) {
	reader := sdkmetric.NewManualReader()
	return sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)), reader
}
