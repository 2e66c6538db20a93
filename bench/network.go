package main

import (
	"bytes"
	"context"
	"encoding/json"
	"time"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/redis/go-redis/v9"
	"github.com/rs/zerolog"
)

// A network is a proxy that delays what comes back from the server. Half the delay each way would be closer to a
// network, but the proxy counts in whole ms; a caller sees no difference.
type network struct{ proxy *toxiproxy.Proxy }

// startNetwork puts a network with a round trip of some ms before the server at addr.
func startNetwork(addr string, roundTripMS int) (*network, error) {
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	n := &network{proxy: toxiproxy.NewProxy(server, "network", "127.0.0.1:0", addr)}
	delay, err := json.Marshal(map[string]any{
		"name": "delay", "type": "latency", "stream": "downstream", "attributes": map[string]int{"latency": roundTripMS},
	})
	if err != nil {
		return nil, err
	}
	if _, err := n.proxy.Toxics.AddToxicJson(bytes.NewReader(delay)); err != nil {
		return nil, err
	}
	return n, n.proxy.Start()
}

func (n *network) addr() string { return n.proxy.Listen }

func (n *network) stop() { n.proxy.Stop() }

// roundTrip returns the median of what some PINGs took over the network, in ms.
func (n *network) roundTrip(ctx context.Context) (float64, error) {
	client := redis.NewClient(&redis.Options{Addr: n.addr()})
	defer client.Close() //nolint:errcheck // It has done its work.
	var took []float64
	for range 100 {
		start := time.Now()
		if err := client.Ping(ctx).Err(); err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(start))/1e6)
	}
	return median(took), nil
}
