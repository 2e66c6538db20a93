package otelredfour_test

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/otelredfour"
)

func TestMain(m *testing.M) {
	logging.Disable() // go-redis reports every connection that the tests break
	m.Run()
}

// A scene is a Redis in a bubble, with one Lock that is instrumented and another that stands for another process.
type scene struct {
	*miniredis.Miniredis

	link      *link // of the instrumented Lock
	lock      *redfour.Lock
	other     *redfour.Lock
	telemetry *otelredfour.Instrumentation
	reader    *sdkmetric.ManualReader
	meters    *sdkmetric.MeterProvider
	exporter  *tracetest.InMemoryExporter
	tracer    trace.Tracer // of whoever calls the library
}

// bubble runs f in a scene whose clock is the bubble's. The server knows all scripts, and nothing is held.
func bubble(t *testing.T, f func(t *testing.T, s *scene), readers ...sdkmetric.Reader) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := &scene{
			Miniredis: miniredis.NewMiniRedis(),
			link:      new(link),
			reader:    sdkmetric.NewManualReader(),
			exporter:  tracetest.NewInMemoryExporter(),
		}
		s.ClockTTL(true)
		t.Cleanup(func() {
			pass(10 * time.Second) // What works for callers who are gone has bounds of its own.
			s.Close()
		})
		options := []sdkmetric.Option{sdkmetric.WithReader(s.reader)}
		for _, r := range readers {
			options = append(options, sdkmetric.WithReader(r))
		}
		s.meters = sdkmetric.NewMeterProvider(options...)
		tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(s.exporter))
		s.tracer = tracers.Tracer("caller")
		var err error
		s.telemetry, err = otelredfour.New(otelredfour.WithMeterProvider(s.meters), otelredfour.WithTracerProvider(tracers))
		require.NoError(t, err)

		s.other = s.newLock(t, new(link))
		s.lock = s.newLock(t, s.link, redfour.WithTrace(s.telemetry.Trace()))
		stop, err := s.telemetry.Observe(s.lock)
		require.NoError(t, err)
		t.Cleanup(func() { _ = stop() })

		lease := mustAcquire(t, s.lock, "warm-up", time.Hour)
		require.NoError(t, s.lock.Renew(t.Context(), lease, time.Hour))
		require.NoError(t, s.lock.Release(t.Context(), lease))
		s.exporter.Reset()
		f(t, s)
	})
}

func (s *scene) newLock(t *testing.T, l *link, opts ...redfour.Option) *redfour.Lock {
	t.Helper()
	// The pool is larger than any test needs: go-redis shares the timers of those who wait for a connection between bubbles.
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:6379", PoolSize: 10_000, Dialer: func(context.Context, string, string) (net.Conn, error) {
		conn, err := s.Dial()
		if err != nil {
			return nil, err
		}
		return l.keep(conn), nil
	}})
	client.AddHook(l)
	t.Cleanup(func() { _ = client.Close() })
	lock, err := redfour.New(client, opts...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = lock.Close() })
	return lock
}

// pass lets time go by. It is for bubbles, where that takes none.
func pass(d time.Duration) { <-time.After(d) }

func mustAcquire(t *testing.T, l *redfour.Lock, id string, ttl time.Duration) *redfour.Lease {
	t.Helper()
	lease, err := l.Acquire(t.Context(), id, ttl)
	require.NoError(t, err)
	return lease
}

// waitFor starts a WaitAcquire, and returns when it waits.
func waitFor(ctx context.Context, l *redfour.Lock, id string) <-chan error {
	c := make(chan error, 1) // the one result; the test may not take it
	go func() {
		_, err := l.WaitAcquire(ctx, id, time.Hour)
		c <- err
	}()
	synctest.Wait()
	pass(10 * time.Millisecond) // A new subscription makes everybody look.
	synctest.Wait()
	return c
}

// A link is a client's way to its server. It sees the scripts as a hook of the client.
type link struct {
	mu     sync.Mutex // guards what follows
	before func() error
	after  func()
	conns  []net.Conn
}

// beforeScript calls f before each script is sent; an error keeps it from being sent. A nil f ends that.
func (l *link) beforeScript(f func() error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.before = f
}

// afterScript calls f once, after the next script has run and before its reply is heard.
func (l *link) afterScript(f func()) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.after = f
}

// cut closes all connections, of commands and of the subscription.
func (l *link) cut() {
	l.mu.Lock()
	conns := slices.Clone(l.conns)
	l.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

func (l *link) keep(conn net.Conn) net.Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns = append(l.conns, conn)
	return conn
}

func (l *link) DialHook(next redis.DialHook) redis.DialHook { return next }

func (l *link) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if !strings.HasPrefix(cmd.Name(), "eval") {
			return next(ctx, cmd)
		}
		l.mu.Lock()
		before, after := l.before, l.after
		l.after = nil
		l.mu.Unlock()
		if before != nil {
			if err := before(); err != nil {
				cmd.SetErr(err)
				return err
			}
		}
		err := next(ctx, cmd)
		if after != nil {
			after()
		}
		return err
	}
}

func (l *link) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// A point is the value of one time series: its number, or how many values a histogram has.
type point struct {
	metric     string
	kind       string
	unit       string
	attributes attribute.Set
	value      int64
	sum        float64 // of a histogram
}

// String returns the metric without its prefix, and the attributes without the namespace.
func (p point) String() string {
	var attrs []string
	for _, kv := range p.attributes.ToSlice() {
		if kv.Key != "redfour.namespace" {
			attrs = append(attrs, kv.Value.String())
		}
	}
	return strings.TrimSpace(strings.TrimPrefix(p.metric, "redfour.") + " " + strings.Join(attrs, " "))
}

// collect returns all points.
func collect(t *testing.T, r sdkmetric.Reader) []point {
	t.Helper()
	var all metricdata.ResourceMetrics
	require.NoError(t, r.Collect(t.Context(), &all))
	var points []point
	for _, scope := range all.ScopeMetrics {
		require.Equal(t, "github.com/redfour-go/redfour/otelredfour", scope.Scope.Name)
		for _, m := range scope.Metrics {
			require.NotEmpty(t, m.Description, m.Name)
			switch data := m.Data.(type) {
			case metricdata.Sum[int64]:
				require.Equal(t, metricdata.CumulativeTemporality, data.Temporality)
				kind := "up-down counter"
				if data.IsMonotonic {
					kind = "counter"
				}
				for _, p := range data.DataPoints {
					points = append(points, point{m.Name, kind, m.Unit, p.Attributes, p.Value, 0})
				}
			case metricdata.Histogram[float64]:
				require.Equal(t, metricdata.CumulativeTemporality, data.Temporality)
				for _, p := range data.DataPoints {
					require.Equal(t, []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300}, p.Bounds)
					points = append(points, point{m.Name, "histogram", m.Unit, p.Attributes, int64(p.Count), p.Sum})
				}
			default:
				require.Fail(t, "unexpected data", "%s is a %T", m.Name, data)
			}
		}
	}
	return points
}

func values(t *testing.T, r sdkmetric.Reader) map[string]int64 {
	t.Helper()
	all := make(map[string]int64)
	for _, p := range collect(t, r) {
		require.NotContains(t, all, p.String())
		all[p.String()] = p.value
	}
	return all
}

const (
	some  = 1e6 // a number of scripts or round trips, of which more than one is right
	maybe = 2e6 // depends on which of two messages comes first
)

// moved returns which points f moves, and by how much.
func (s *scene) moved(t *testing.T, f func()) map[string]int64 {
	t.Helper()
	synctest.Wait()
	before := values(t, s.reader)
	f()
	synctest.Wait()
	moved := make(map[string]int64)
	for name, value := range values(t, s.reader) {
		if by := value - before[name]; by != 0 {
			moved[name] = by
		}
	}
	return moved
}

// requireMoved fails unless exactly the points in want have moved, by these numbers.
func requireMoved(t *testing.T, want, moved map[string]int64) {
	t.Helper()
	for name, value := range want {
		if value == some && moved[name] > 0 || value == maybe {
			moved[name] = value
		}
	}
	require.Equal(t, want, moved)
}
