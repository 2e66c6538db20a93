package interop_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A peer is a Node.js process that works one npm library.
type peer struct {
	t       *testing.T
	library string
	stdin   io.Writer
	last    int // number of the last request

	mu      sync.Mutex           // guards what follows
	pending map[int]chan message // by request number; listen sends, nobody closes
}

// A request is a line to the process. What a command does not need is left out.
type request struct {
	N        int             `json:"n"`
	Do       string          `json:"do"`
	ID       string          `json:"id,omitempty"`
	TTL      int64           `json:"ttl,omitempty"`      // ms
	Patience int64           `json:"patience,omitempty"` // ms
	Lease    json.RawMessage `json:"lease,omitempty"`
	Who      string          `json:"who,omitempty"`
	Inside   string          `json:"inside,omitempty"`
	Entries  string          `json:"entries,omitempty"`
}

// A message is a line from the process.
type message struct {
	N       int             `json:"n"` // of the request; 0 says that the process is ready
	Waiting bool            `json:"waiting"`
	Reply   json.RawMessage `json:"reply"`
}

// A nodeLease is what both libraries return for an attempt.
type nodeLease struct {
	Success bool  `json:"success"`
	Index   int64 `json:"index"`
	TTL     int64 `json:"ttl"` // ms; the holder's if the attempt failed

	raw json.RawMessage // as it came
}

// A nodeResult is what both libraries return for a release. For a renewal they agree on Success only.
type nodeResult struct {
	Success bool   `json:"success"`
	Result  string `json:"result"`
}

var (
	released = nodeResult{true, "released"}
	expired  = nodeResult{true, "expired"}
	conflict = nodeResult{false, "conflict"}
)

// requireNode returns the path of node, or ends the test if node or its packages are missing.
func requireNode(t *testing.T) string {
	t.Helper()
	node, err := exec.LookPath("node")
	if err == nil {
		_, err = os.Stat(filepath.Join("node_modules", "ioredfour"))
	}
	if err == nil {
		return node
	}
	if os.Getenv("REDFOUR_REQUIRE_INTEROP") == "1" {
		t.Fatalf("REDFOUR_REQUIRE_INTEROP=1 demands node in PATH and \"npm ci\" in interop: %v", err)
	}
	t.Skipf("needs node in PATH and \"npm ci\" in interop, so this test did not run: %v", err)
	return ""
}

// startPeer starts a Node.js process and returns when it is subscribed to releases. It ends with the test.
func startPeer(t *testing.T, library, addr string) *peer {
	t.Helper()
	return startPeerAt(t, library, "redis://"+addr)
}

func startPeerAt(t *testing.T, library, url string) *peer {
	t.Helper()
	// Old packages on new versions of Node.js use what is deprecated.
	cmd := exec.Command(requireNode(t), "--no-deprecation", "client.js", library, url, namespace)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())

	ready := make(chan message, 1)
	p := &peer{t: t, library: library, stdin: stdin, pending: map[int]chan message{0: ready}}
	silent := make(chan struct{})
	go func() {
		defer close(silent)
		p.listen(stdout)
	}()
	t.Cleanup(func() {
		_ = stdin.Close() // which tells the process to end
		select {
		case <-silent:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			<-silent
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("node with %s: %v\n%s", library, err, stderr.Bytes())
		}
	})
	receive(t, ready, "node is ready")
	return p
}

// listen hands each message to whoever sent the request, until the process ends.
func (p *peer) listen(stdout io.Reader) {
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		var m message
		if json.Unmarshal(lines.Bytes(), &m) != nil {
			continue // Whoever waits for it will fail.
		}
		p.mu.Lock()
		replies := p.pending[m.N]
		p.mu.Unlock()
		select {
		case replies <- m:
		default: // Only a test that has failed is so far behind.
		}
	}
}

// send sends a request and returns where its messages will come.
func (p *peer) send(r request) <-chan message {
	p.t.Helper()
	p.last++
	r.N, r.ID = p.last, id
	replies := make(chan message, 64) // A waiter speaks up a few times, and listen does not wait for the test.
	p.mu.Lock()
	p.pending[r.N] = replies
	p.mu.Unlock()
	require.NoError(p.t, json.NewEncoder(p.stdin).Encode(r))
	return replies
}

// acquire tries once.
func (p *peer) acquire(ttl time.Duration) nodeLease {
	p.t.Helper()
	return p.leaseFrom(p.send(request{Do: "acquire", TTL: ttl.Milliseconds()}))
}

// hold takes the lock, which must be free.
func (p *peer) hold(ttl time.Duration) nodeLease {
	p.t.Helper()
	lease := p.acquire(ttl)
	require.True(p.t, lease.Success)
	return lease
}

func (p *peer) release(lease json.RawMessage) nodeResult {
	p.t.Helper()
	return p.resultFrom(p.send(request{Do: "release", Lease: lease}))
}

// renew tries to give a lease longTTL.
func (p *peer) renew(lease json.RawMessage) nodeResult {
	p.t.Helper()
	return p.resultFrom(p.send(request{Do: "renew", Lease: lease, TTL: longTTL.Milliseconds()}))
}

// contend starts to go through sections, for the given time.
func (p *peer) contend(d time.Duration, who string) <-chan message {
	p.t.Helper()
	return p.send(request{
		Do: "contend", TTL: longTTL.Milliseconds(), Patience: d.Milliseconds(),
		Who: who, Inside: inside, Entries: entries,
	})
}

// A nodeWaiter is a waitAcquireLock under way.
type nodeWaiter struct {
	peer     *peer
	messages <-chan message
}

// wait starts to wait for the lock, and returns when the process has found it held and listens.
func (p *peer) wait() *nodeWaiter {
	p.t.Helper()
	w := &nodeWaiter{p, p.send(request{Do: "wait", TTL: longTTL.Milliseconds(), Patience: longTTL.Milliseconds()})}
	w.awaitLook()
	return w
}

// awaitLook returns when the waiter has looked again, found the lock held, and listens.
func (w *nodeWaiter) awaitLook() {
	w.peer.t.Helper()
	require.True(w.peer.t, receive(w.peer.t, w.messages, "node waits").Waiting, "node did not find the lock held")
}

// requireWaiting checks that the waiter has got nothing yet.
func (w *nodeWaiter) requireWaiting() {
	w.peer.t.Helper()
	require.Empty(w.peer.t, w.messages, "waitAcquireLock has returned, or looked again, while the lock was held")
}

// got returns the waiter's lease, which must come promptly.
func (w *nodeWaiter) got() nodeLease {
	w.peer.t.Helper()
	lease := w.peer.leaseFrom(w.messages)
	require.True(w.peer.t, lease.Success)
	return lease
}

func (p *peer) leaseFrom(messages <-chan message) nodeLease {
	p.t.Helper()
	lease := nodeLease{raw: p.replyFrom(messages)}
	require.NoError(p.t, json.Unmarshal(lease.raw, &lease))
	return lease
}

func (p *peer) resultFrom(messages <-chan message) (result nodeResult) {
	p.t.Helper()
	require.NoError(p.t, json.Unmarshal(p.replyFrom(messages), &result))
	return result
}

// replyFrom returns the reply to a request, after whatever a waiter says before.
func (p *peer) replyFrom(messages <-chan message) json.RawMessage {
	p.t.Helper()
	for {
		if m := receive(p.t, messages, "node replies"); m.Reply != nil {
			return m.Reply
		}
	}
}
