package otelredfour_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"github.com/alicebob/miniredis/v2"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/redfour-go/redfour"
	"github.com/redfour-go/redfour/otelredfour"
)

func Example() {
	server, err := miniredis.Run() // use your own server instead
	if err != nil {
		log.Fatal(err)
	}
	defer server.Close()

	// A program sets up providers with exporters, makes them the global ones, and needs no options here.
	reader := sdkmetric.NewManualReader()
	exporter := tracetest.NewInMemoryExporter()
	telemetry, err := otelredfour.New(
		otelredfour.WithMeterProvider(sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))),
		otelredfour.WithTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSyncer(exporter))),
		otelredfour.WithNamespace("tokens"),
	)
	if err != nil {
		log.Fatal(err)
	}

	lock, err := redfour.Open("redis://"+server.Addr(), redfour.WithNamespace("tokens"), redfour.WithTrace(telemetry.Trace()))
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = lock.Close() }()
	stop, err := telemetry.Observe(lock)
	if err != nil {
		log.Fatal(err)
	}
	defer func() { _ = stop() }()

	ctx := context.Background()
	err = lock.WithLock(ctx, "42", 10*time.Second, func(context.Context, *redfour.Lease) error {
		var metrics metricdata.ResourceMetrics
		if err := reader.Collect(ctx, &metrics); err != nil {
			return err
		}
		for _, m := range metrics.ScopeMetrics[0].Metrics {
			if kept, ok := m.Data.(metricdata.Sum[int64]); ok && m.Name == "redfour.keepalive.count" {
				fmt.Println(m.Name, kept.DataPoints[0].Value)
			}
		}
		return nil
	})
	fmt.Println(err)
	for _, span := range exporter.GetSpans() {
		fmt.Println(span.Name)
	}
	// Output:
	// redfour.keepalive.count 1
	// <nil>
	// redfour.acquire
	// redfour.release
}
