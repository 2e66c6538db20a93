package faults

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strconv"
	"sync"
)

// An exchange is what both directions of a connection share: the requests that
// have no reply yet. A proxy that answers for the server needs them, to give each
// error to the request whose reply it replaces.
type exchange struct {
	proxy  *proxy
	mortal bool // it is one of those that die silently

	mu         sync.Mutex // guards what follows
	requests   []byte     // the beginning of the next request
	replies    []byte     // the beginning of the next reply
	scripts    []bool     // for each request without a reply, whether it runs a script
	subscribed bool       // replies and messages cannot be told apart any more
}

// proxyErrors are what proxies answer when they have lost a reply: Envoy, an HTTP
// gateway before Redis, and twemproxy.
var proxyErrors = []string{"-upstream failure\r\n", "-upstream_rq_timeout\r\n", "-ERR upstream failure\r\n", "-ERR Connection timed out\r\n"}

// request notes the requests in the next bytes to the server.
func (x *exchange) request(data []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.requests = append(x.requests, data...)
	for n := frame(x.requests); n > 0 && !x.subscribed; n = frame(x.requests) {
		name := bytes.ToLower(x.requests[:min(n, len("*99\r\n$12\r\nPSUBSCRIBE\r\n"))])
		x.scripts = append(x.scripts, bytes.Contains(name, []byte("\r\neval")))
		x.subscribed = bytes.Contains(name, []byte("subscribe\r\n"))
		x.requests = x.requests[n:]
	}
	if x.subscribed {
		x.requests = nil
	}
}

// reply returns what the client gets for the next bytes from the server. While the
// proxy answers for the server, that is an error in place of some of the replies to
// scripts which ran. An incomplete reply is kept until its end comes.
func (x *exchange) reply(data []byte) []byte {
	x.mu.Lock()
	defer x.mu.Unlock()
	data = append(x.replies, data...)
	x.replies = nil
	if x.subscribed {
		return data
	}
	var out []byte
	for n := frame(data); n > 0; n = frame(data) {
		out = append(out, x.replacementLocked(data[:n])...)
		data = data[n:]
	}
	x.replies = slices.Clone(data)
	return out
}

func (x *exchange) replacementLocked(reply []byte) []byte {
	isPush := reply[0] == '>'
	if isPush || len(x.scripts) == 0 {
		return reply
	}
	isScript := x.scripts[0]
	x.scripts = x.scripts[1:]
	const share = 0.3
	if !x.proxy.answering.Load() || !isScript || reply[0] == '-' || rand.Float64() >= share {
		return reply
	}
	x.proxy.answered.Add(1)
	return []byte(proxyErrors[rand.IntN(len(proxyErrors))])
}

// frame returns the length of the RESP value at the beginning of b, or 0 if its end
// has not come yet.
func frame(b []byte) int {
	line := bytes.Index(b, []byte("\r\n"))
	if line < 1 {
		return 0
	}
	n := line + len("\r\n")
	count, _ := strconv.Atoi(string(b[1:line])) // Other kinds have no count.
	switch b[0] {
	case '$', '=', '!':
		if count < 0 {
			return n
		}
		n += count + len("\r\n")
		if n > len(b) {
			return 0
		}
	case '%':
		return elements(b, n, 2*count)
	case '*', '~', '>':
		return elements(b, n, count)
	}
	return n
}

// elements returns the length of a RESP value with count elements, of which the
// first begins at n.
func elements(b []byte, n, count int) int {
	for range max(count, 0) {
		m := frame(b[n:])
		if m == 0 {
			return 0
		}
		n += m
	}
	return n
}
