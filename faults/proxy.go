package faults

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"
	"github.com/stretchr/testify/require"
)

// A proxy stands between one process and the server.
type proxy struct {
	t       *testing.T
	proxy   *toxiproxy.Proxy
	filters []*filter

	// For the next connection. The filter of its way up makes it, that of its way
	// down takes it: toxiproxy makes both links in one goroutine.
	exchange *exchange

	answering atomic.Bool  // in place of the server, now and then
	answered  atomic.Int64 // replies that were replaced
}

// newProxy returns a proxy before the server at addr. It ends with the test. If it resets, it closes no
// connection in good order.
func newProxy(t *testing.T, addr string, resets bool) *proxy {
	t.Helper()
	server := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := &proxy{t: t, proxy: toxiproxy.NewProxy(server, t.Name(), "127.0.0.1:0", addr)}
	for _, direction := range []string{"upstream", "downstream"} {
		wrapper := p.add("filter-"+direction, "redis_filter", direction, 1, nil)
		f, ok := wrapper.Toxic.(*filter)
		require.True(t, ok)
		f.proxy, f.upstream = p, direction == "upstream"
		p.filters = append(p.filters, f)
	}
	if resets {
		// Toxiproxy looks for such a toxic when a connection comes, whatever its share is.
		p.add("resets", "reset_peer", "downstream", 0, nil)
	}
	require.NoError(t, p.proxy.Start())
	t.Cleanup(p.proxy.Stop)
	return p
}

func (p *proxy) addr() string { return p.proxy.Listen }

func (p *proxy) add(name, kind, direction string, share float32, attributes any) *toxics.ToxicWrapper {
	p.t.Helper()
	text, err := json.Marshal(map[string]any{
		"name": name, "type": kind, "stream": direction, "toxicity": share, "attributes": attributes,
	})
	require.NoError(p.t, err)
	wrapper, err := p.proxy.Toxics.AddToxicJson(bytes.NewReader(text))
	require.NoError(p.t, err)
	return wrapper
}

// A toxic is something that a proxy does to a share of its connections.
type toxic struct {
	kind, direction string
	share           float32
	attributes      map[string]int
}

// poison does something to connections, those that stand included, until the returned
// function is called.
func (p *proxy) poison(ts ...toxic) (heal func(ctx context.Context)) {
	p.t.Helper()
	for _, t := range ts {
		p.add(t.kind+"-"+t.direction, t.kind, t.direction, t.share, t.attributes)
	}
	return func(ctx context.Context) {
		for _, t := range ts {
			_ = p.proxy.Toxics.RemoveToxic(ctx, t.kind+"-"+t.direction) // Some connections end meanwhile.
		}
	}
}

// silentShare is the share of the standing connections that die silently together.
const silentShare = 0.5

// A filter is a toxic that knows the connections of subscribers. It swallows
// what goes over those, or over the others, without closing them.
type filter struct {
	proxy    *proxy
	upstream bool

	subscribers atomic.Bool
	commands    atomic.Bool
	era         atomic.Int64 // subscribers of an earlier one are swallowed
	silence     atomic.Int64 // so are a share of the other connections of an earlier one
	swallowed   atomic.Int64 // chunks
}

// A link is one direction of a connection that has a filter.
type link struct {
	era        int64
	silence    int64
	subscriber bool
	dead       bool // something was swallowed, so that what follows has no meaning
	exchange   *exchange
}

// NewState returns the state of a new link.
func (f *filter) NewState() any {
	if f.upstream {
		f.proxy.exchange = &exchange{proxy: f.proxy, mortal: rand.Float64() < silentShare}
	}
	return &link{era: f.era.Load(), silence: f.silence.Load(), exchange: f.proxy.exchange}
}

// swallows tells whether what comes next over a link is to be swallowed.
func (f *filter) swallows(l *link) bool {
	if l.subscriber {
		return f.subscribers.Load() || l.era < f.era.Load()
	}
	return f.commands.Load() || l.exchange.mortal && l.silence < f.silence.Load()
}

// Pipe passes on what comes, until something is to be swallowed. On the way down the
// proxy may answer for the server.
func (f *filter) Pipe(stub *toxics.ToxicStub) {
	l, _ := stub.State.(*link)
	for {
		select {
		case <-stub.Interrupt:
			return
		case chunk := <-stub.Input:
			if chunk == nil {
				stub.Close()
				return
			}
			if bytes.Contains(chunk.Data, []byte("\r\nsubscribe\r\n")) {
				l.subscriber = true
			}
			l.dead = l.dead || f.swallows(l)
			switch {
			case l.dead:
				f.swallowed.Add(1)
				continue
			case f.upstream:
				l.exchange.request(chunk.Data)
			default:
				chunk.Data = l.exchange.reply(chunk.Data)
			}
			if len(chunk.Data) > 0 {
				stub.Output <- chunk
			}
		}
	}
}

// registerToxics makes toxiproxy know our own.
func registerToxics() { toxics.Register("redis_filter", new(filter)) }
